// Compiled with baseline flags only: it runs before anything is known about the processor.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace otdd::cpu {
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

}  // namespace

const char* isa() {
  static const int level = chosen_level();
  return kNames[level];
}

}  // namespace otdd::cpu
