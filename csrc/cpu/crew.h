// The threads that share one problem, together for all of its solve.
//
// An iteration is some ten microseconds of work between two points where all must meet. A parallel
// region for each costs as much as that and, where its threads went to sleep, several times more.
#pragma once

#include <sched.h>

#include "patience.h"

namespace otdd::cpu::OTDD_ISA {

class Crew {
 public:
  static constexpr int kMaxThreads = 64;

  Crew(int threads, Patience& patience)
      : threads_(threads < kMaxThreads ? threads : kMaxThreads), patience_(patience) {}
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;

  // Lets the calling thread run `work`, which may use for_parts, with the others at hand.
  template <class Work>
  void together(Work work) {
    if (threads_ == 1) return work();
#pragma omp parallel num_threads(threads_)
    {
      FlushDenormals guard;
      int thread = 0;
#ifdef _OPENMP
      thread = omp_get_thread_num();
#pragma omp single
      present_ = omp_get_num_threads();  // it may be fewer than asked for
#endif
      if (thread == 0) {
        work();
        post(nullptr, nullptr, 0);
      } else {
        serve(thread);
      }
    }
  }

  // fn(part, thread) for parts 0 .. parts - 1, each once; the calling thread returns when all are
  // done. A thread starts with the parts that it had in the loop before, which are in its cache.
  template <class Fn>
  void for_parts(i64 parts, Fn fn) {
    if (threads_ == 1) {
      for (i64 p = 0; p < parts; ++p) fn(p, 0);
      return;
    }
    post([](void* f, i64 part, int thread) { (*(Fn*)f)(part, thread); }, &fn, parts);
    take_parts(0);
    // Others may still be at their last parts.
    for (i64 waited = 0; __atomic_load_n(&done_, __ATOMIC_ACQUIRE) < present_ - 1; ++waited) {
      if (waited % 4096 == 4095) patience_.look();
      pause(waited);
    }
  }

 private:
  struct alignas(64) Counter {
    i64 next;
  };
  int threads_, present_ = 1;
  Patience& patience_;
  alignas(64) i64 posted_ = 0;  // jobs so far
  alignas(64) i64 done_ = 0;    // threads that have done with the last one
  void (*call_)(void*, i64, int) = nullptr;
  void* fn_ = nullptr;
  i64 parts_ = 0;
  Counter counters_[kMaxThreads];

  i64 first_of(int thread) const { return parts_ * thread / present_; }

  void post(void (*call)(void*, i64, int), void* fn, i64 parts) {
    call_ = call, fn_ = fn, parts_ = parts;
    for (int t = 0; t < present_; ++t) counters_[t].next = first_of(t);
    __atomic_store_n(&done_, 0, __ATOMIC_RELAXED);
    __atomic_add_fetch(&posted_, 1, __ATOMIC_RELEASE);
  }

  void serve(int thread) {
    for (i64 seen = 0;; ++seen) {
      for (i64 waited = 0; __atomic_load_n(&posted_, __ATOMIC_ACQUIRE) == seen; ++waited)
        pause(waited);
      if (!call_) return;
      take_parts(thread);
      __atomic_add_fetch(&done_, 1, __ATOMIC_ACQ_REL);
    }
  }

  // Its own share first, then what others have not begun.
  void take_parts(int thread) {
    for (int k = 0; k < present_; ++k) {
      const int owner = (thread + k) % present_;
      const i64 end = first_of(owner + 1);
      i64* next = &counters_[owner].next;
      while (__atomic_load_n(next, __ATOMIC_RELAXED) < end) {
        const i64 part = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
        if (part < end) call_(fn_, part, thread);
      }
    }
  }

  // A while awake; then any other thread may have the core.
  static void pause(i64 waited) {
    if (waited > 2000) {
      sched_yield();
      return;
    }
#if defined(__SSE2__)
    _mm_pause();
#endif
  }
};

}  // namespace otdd::cpu::OTDD_ISA
