// Compiled with baseline flags only: it runs before anything is known about the processor.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace otdd::cpu {

bool (*interrupted)() = nullptr;

#define OTDD_DECLARE(isa)         \
  namespace isa {                 \
  Kernels<float> kernels_f32();   \
  Kernels<double> kernels_f64();  \
  }
OTDD_DECLARE(baseline)
#ifdef OTDD_ISAS_X86
OTDD_DECLARE(avx2)
OTDD_DECLARE(avx512)
#endif

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

int best_level() {
#ifdef OTDD_ISAS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return wide ? 2 : 1;
#else
  return 0;
#endif
}

int chosen_level() {
  const int best = best_level();
  if (const char* wanted = std::getenv("OTDD_CPU_ISA"))
    for (int level = 0; level < best; ++level)
      if (std::strcmp(wanted, kNames[level]) == 0) return level;
  return best;
}

int level() {
  static const int chosen = chosen_level();
  return chosen;
}

}  // namespace

const char* isa() { return kNames[level()]; }

template <>
Kernels<float> kernels<float>() {
#ifdef OTDD_ISAS_X86
  if (level() == 2) return avx512::kernels_f32();
  if (level() == 1) return avx2::kernels_f32();
#endif
  return baseline::kernels_f32();
}

template <>
Kernels<double> kernels<double>() {
#ifdef OTDD_ISAS_X86
  if (level() == 2) return avx512::kernels_f64();
  if (level() == 1) return avx2::kernels_f64();
#endif
  return baseline::kernels_f64();
}

}  // namespace otdd::cpu
