// Whether the caller still wants the result of a long call.
#pragma once

#include <time.h>

#include "simd.h"

namespace otdd::cpu::OTDD_ISA {

// One for a call, shared by its threads. Only the thread that made the call asks, as only that one
// may run a signal's handler; all threads then see that it is over.
class Patience {
 public:
  static constexpr i64 kWork = 1 << 18;  // elements worked on after which to look again

  bool over() const { return __atomic_load_n(&over_, __ATOMIC_RELAXED); }

  // Asks if 50 ms have gone by. A clock reading: not for every row.
  bool look() {
    if (interrupted && calling_thread()) {
      const double now = seconds();
      if (next_ == 0) next_ = now + 0.05;
      if (now >= next_) {
        next_ = now + 0.05;
        if (interrupted()) __atomic_store_n(&over_, true, __ATOMIC_RELAXED);
      }
    }
    return over();
  }

  // For a thread that has nothing left to do: the calling one stays awake until all `threads` came.
  void wait(int threads) {
    __atomic_add_fetch(&waiting_, 1, __ATOMIC_ACQ_REL);
    if (!calling_thread()) return;
    const double start = seconds();
    while (__atomic_load_n(&waiting_, __ATOMIC_ACQUIRE) < threads) {
      const double waited = seconds() - start;
      look();
      if (waited < 5e-5) continue;
      const timespec pause{0, long(1e9 * (waited < 0.1 ? waited / 10 : 0.01))};
      nanosleep(&pause, nullptr);
    }
  }

 private:
  bool over_ = false;
  int waiting_ = 0;
  double next_ = 0;

  static double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  static bool calling_thread() {
#ifdef _OPENMP
    return omp_get_thread_num() == 0;
#else
    return true;
#endif
  }
};

}  // namespace otdd::cpu::OTDD_ISA
