// Kernels on the CPU, thread for thread, with what chip.h promises them: barriers, shuffles, shared
// memory, clusters. Slow and strict; for tests.
//
// Every thread is a fiber. A fiber runs until it has to wait for others, then others of its warp do, and
// only when all of them wait other warps, and then other blocks: so a barrier that is missing shows as
// a wrong result under one of the orders in which they are taken (forward, backward, random). Shared
// memory and results start as NaN. Arguments must have been announced as `Memory`: a read outside them, a
// second write of a result or one that never comes is an error. So are a look at another block's
// shared memory before it has started or after it has ended, and a plain read of what another
// block wrote.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define OTDD_KERNEL inline void
#define OTDD_THREADS(count, blocks)
#define OTDD_DEVICE inline
#define OTDD_BOTH inline
#define OTDD_UNROLL
#define OTDD_UNROLL_BY_2
#define OTDD_UNROLL_BY_8
#define OTDD_NO_UNROLL
#define OTDD_ARGUMENT const

namespace otdd::cuda::emulator {

enum class Order { kForward, kBackward, kRandom };

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Stopped {};  // thrown in a fiber once another one has failed

// What a kernel may touch.
struct Region {
  const char* base;
  std::size_t bytes, item;  // item: size of a result's elements, 0 for what may be written often
  bool writable;
  std::vector<unsigned char> writes;
  std::vector<int> writers;  // of memory written often: block of the last write to each 4 bytes, or -1
  std::size_t reads = 0;     // of an input
};

class Memory {
 public:
  std::vector<Region> regions;
  std::size_t reads_of_first = 0;  // argument of the last call

  void clear() {
    reads_of_first = regions.empty() ? 0 : regions.front().reads;
    regions.clear();
  }
  void input(const void* p, std::size_t bytes) { add(p, bytes, 0, false); }
  void workspace(void* p, std::size_t bytes) { add(p, bytes, 0, true); }
  // Filled with bytes that are NaN as a number; every element is to be written exactly once.
  void output(void* p, std::size_t bytes, std::size_t item) {
    if (p) std::memset(p, 0xff, bytes);
    add(p, bytes, item, true);
  }

  Region& of(const void* p, std::size_t bytes, const char* verb) {
    const char* at = static_cast<const char*>(p);
    for (Region& r : regions)
      if (at >= r.base && at + bytes <= r.base + r.bytes) return r;
    std::string text = std::string(verb) + " outside every argument:";
    for (const Region& r : regions)
      text += " [" + std::to_string(at - r.base) + " of " + std::to_string(r.bytes) + "]";
    throw Error(text);
  }
  void wrote(const void* p, std::size_t bytes, bool once, int block) {
    Region& r = of(p, bytes, "write");
    if (!r.writable) throw Error("write to an input");
    for (std::size_t k = first_of(r, p); k < r.writers.size() && k < first_of(r, p) + bytes / 4; ++k)
      r.writers[k] = block;
    if (!r.item || !once) return;
    const std::size_t index = (static_cast<const char*>(p) - r.base) / r.item;
    for (std::size_t k = index; k < index + bytes / r.item; ++k)
      if (++r.writes[k] > 1) throw Error("element " + std::to_string(k) + " is written twice");
  }
  // A plain read: what another block wrote may not be seen by it.
  void looked_at(const void* p, std::size_t bytes, int block) {
    const Region& r = of(p, bytes, "read");
    for (std::size_t k = first_of(r, p); k < r.writers.size() && k < first_of(r, p) + bytes / 4; ++k)
      if (r.writers[k] >= 0 && r.writers[k] != block) throw Error("plain read of what another block wrote");
  }
  void all_written() const {
    for (const Region& r : regions)
      for (std::size_t k = 0; k < r.writes.size(); ++k)
        if (r.writes[k] == 0)
          throw Error("element " + std::to_string(k) + " of " + std::to_string(r.writes.size()) +
                      " of a result is never written");
  }

 private:
  void add(const void* p, std::size_t bytes, std::size_t item, bool writable) {
    if (!p || !bytes) return;
    regions.push_back({static_cast<const char*>(p), bytes, item, writable, {}, {}, 0});
    if (item) regions.back().writes.assign(bytes / item, 0);
    if (writable) regions.back().writers.assign(bytes / 4, -1);
  }
  static std::size_t first_of(const Region& r, const void* p) {
    return (static_cast<const char*>(p) - r.base) / 4;
  }
};

inline Memory memory;
inline Order order = Order::kForward;

struct Barrier {
  int expected = 0, arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slot[2][32][16];
};

struct Cluster;
struct Block {
  int index = 0, rank = 0, unfinished = 0;
  bool started = false;
  Barrier barrier;
  bool any[3] = {false, false, false};
  std::vector<Warp> warps;
  char* shared = nullptr;
  Cluster* cluster = nullptr;
};
struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  Block* block = nullptr;
  int thread = 0, warp_parity = 0, votes = 0;
  bool finished = false;
  const Barrier* waits_at = nullptr;  // for its generation to leave `generation`
  long generation = 0;
  const unsigned* counter = nullptr;  // or for this to reach `target`
  unsigned target = 0;

  bool ready() const {
    if (waits_at) return waits_at->generation != generation;
    return !counter || static_cast<int>(*counter - target) >= 0;
  }
};

class Machine {
 public:
  static constexpr std::size_t kStack = std::size_t(256) << 10;
  Fiber* current = nullptr;
  int blocks = 0, threads = 0, launches = 0;
  bool failed = false;
  std::string reason;
  std::function<void()> kernel;

  ~Machine() {
    for (char* stack : stacks_) munmap(stack, kStack);
  }

  // `together` blocks run at the same time: a cluster, or all of a cooperative launch.
  void launch(int grid, int block, std::size_t shared, int cluster, bool cooperative,
              std::function<void()> run) {
    kernel = std::move(run), blocks = grid, threads = block, failed = false, ++launches;
    if (grid % cluster) throw Error("the grid is no multiple of the cluster");
    if (block % 32 || block > 1024) throw Error("threads of a block: " + std::to_string(block));
    const int together = cooperative ? grid : cluster;
    for (int first = 0; first < grid; first += together) run_blocks(first, together, cluster, shared);
  }

  void wait(Barrier& barrier) {
    if (++barrier.arrived == barrier.expected) {
      barrier.arrived = 0, ++barrier.generation;
      return;
    }
    current->waits_at = &barrier, current->generation = barrier.generation;
    yield();
    current->waits_at = nullptr;
  }
  void wait_for(const unsigned* counter, unsigned target) {
    current->counter = counter, current->target = target;
    if (!current->ready()) yield();
    current->counter = nullptr;
  }
  Warp& warp() { return current->block->warps[current->thread / 32]; }

 private:
  std::vector<char*> stacks_;
  std::mt19937 random_{1};
#if defined(__x86_64__)
  void* scheduler_ = nullptr;
#else
  ucontext_t scheduler_;
#endif

  // A block's shared memory ends where a page begins that nothing may touch.
  struct Arena {
    char *base, *begin;
    std::size_t bytes;
    explicit Arena(std::size_t wanted) {
      const std::size_t page = sysconf(_SC_PAGESIZE), used = (wanted + 15) / 16 * 16;
      const std::size_t room = (used + page - 1) / page * page;
      bytes = room + page;
      base = static_cast<char*>(
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      mprotect(base + room, page, PROT_NONE);
      std::memset(base, 0xff, room);
      begin = base + room - used;
    }
    ~Arena() { munmap(base, bytes); }
    Arena(Arena&& other) : base(other.base), begin(other.begin), bytes(other.bytes) {
      other.base = nullptr, other.bytes = 0;
    }
  };

  void run_blocks(int first, int count, int cluster, std::size_t shared) {
    std::vector<Arena> arenas;
    std::vector<Block> all(count);
    std::vector<Cluster> clusters(count / cluster);
    std::vector<Fiber> fibers(std::size_t(count) * threads);
    for (int k = 0; k < count; ++k) {
      arenas.emplace_back(shared);
      Block& b = all[k];
      b.index = first + k, b.rank = k % cluster, b.cluster = &clusters[k / cluster];
      b.cluster->blocks.push_back(&b);
      b.barrier.expected = b.unfinished = threads, b.cluster->barrier.expected = cluster * threads;
      b.shared = arenas.back().begin;
      b.warps = std::vector<Warp>(threads / 32);
      for (Warp& w : b.warps) w.barrier.expected = 32;
      for (int t = 0; t < threads; ++t) {
        Fiber& f = fibers[std::size_t(k) * threads + t];
        f.block = &b, f.thread = t;
        prepare(f, std::size_t(k) * threads + t);
      }
    }
    std::vector<int> order_of_blocks(count);
    std::iota(order_of_blocks.begin(), order_of_blocks.end(), 0);
    std::size_t left = fibers.size();
    while (left > 0) {
      const bool progress = in_order(order_of_blocks, [&](int k) {
        return until_all_wait([&] { return run_block(fibers.data() + std::size_t(k) * threads, left); });
      });
      if (!progress) failed = true, reason = "threads wait for each other at different barriers";
    }
    current = nullptr;
    if (failed) throw Error(reason);
  }

  // Whether fn(k) is true for any of some numbers; it is called for all, in the order that is set.
  template <class Fn>
  bool in_order(std::vector<int>& numbers, Fn fn) {
    if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), random_);
    bool any = false;
    for (std::size_t k = 0; k < numbers.size(); ++k)
      any |= fn(numbers[order == Order::kBackward ? numbers.size() - 1 - k : k]);
    return any;
  }
  template <class Fn>
  static bool until_all_wait(Fn run) {
    bool any = false;
    while (run()) any = true;
    return any;
  }
  // One round of a block: every warp goes on until all its lanes wait. Whether any did something.
  bool run_block(Fiber* fibers, std::size_t& left) {
    std::vector<int> warps(threads / 32), lanes(32);
    std::iota(warps.begin(), warps.end(), 0), std::iota(lanes.begin(), lanes.end(), 0);
    return in_order(warps, [&](int w) {
      return until_all_wait([&] {
        return in_order(lanes, [&](int lane) {
          Fiber& f = fibers[32 * w + lane];
          if (f.finished || (!failed && !f.ready())) return false;
          f.block->started = true;
          resume(f);
          if (f.finished) --left, --f.block->unfinished;
          return true;
        });
      });
    });
  }

  static void enter();

  void body() {
    try {
      if (failed) throw Stopped();
      kernel();
    } catch (const Stopped&) {
    } catch (const std::exception& e) {
      failed = true;
      reason = std::string(e.what()) + " (block " + std::to_string(current->block->index) +
               ", thread " + std::to_string(current->thread) + ")";
    }
    current->finished = true;
  }

  char* stack(std::size_t index) {
    while (stacks_.size() <= index)
      stacks_.push_back(static_cast<char*>(
          mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
    return stacks_[index];
  }

#if defined(__x86_64__)
  // Saves the callee's registers and the stack at *from, goes on at `to`.
  __attribute__((naked, noinline)) static void switch_stacks(void** /*from*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
  }
  void prepare(Fiber& f, std::size_t index) {
    void** top = reinterpret_cast<void**>(stack(index) + kStack - 64);
    *--top = nullptr;  // enter() never returns
    *--top = reinterpret_cast<void*>(&Machine::enter);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    f.stack_pointer = top;
  }
  void resume(Fiber& f) {
    current = &f;
    switch_stacks(&scheduler_, f.stack_pointer);
  }
  void leave() { switch_stacks(&current->stack_pointer, scheduler_); }
#else
  void prepare(Fiber& f, std::size_t index) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack(index), f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, &Machine::enter, 0);
  }
  void resume(Fiber& f) {
    current = &f;
    swapcontext(&scheduler_, &f.context);
  }
  void leave() { swapcontext(&current->context, &scheduler_); }
#endif

  void yield() {
    leave();
    if (failed) throw Stopped();
  }
};

inline Machine machine;

inline void Machine::enter() {
  machine.body();
  machine.leave();
}

}  // namespace otdd::cuda::emulator

namespace otdd::cuda::chip {

using emulator::machine;
using emulator::memory;

inline int thread() { return machine.current->thread; }
inline int threads() { return machine.threads; }
inline int block() { return machine.current->block->index; }
inline int blocks() { return machine.blocks; }

inline void sync() { machine.wait(machine.current->block->barrier); }
// Three in turn: of the next vote's no one reads any more, and no one writes yet.
inline bool any_of_block(bool x) {
  emulator::Block& b = *machine.current->block;
  const int vote = machine.current->votes++;
  b.any[vote % 3] |= x, b.any[(vote + 1) % 3] = false;
  sync();
  return b.any[vote % 3];
}
inline void sync_warp() { machine.wait(machine.warp().barrier); }

// Two slots in turn: nobody can be two exchanges ahead.
template <class T>
T shuffle(T x, int lane) {
  static_assert(sizeof(T) <= 16, "");
  emulator::Warp& w = machine.warp();
  const int parity = machine.current->warp_parity ^= 1;
  std::memcpy(w.slot[parity][thread() % 32], &x, sizeof(T));
  sync_warp();
  std::memcpy(&x, w.slot[parity][lane], sizeof(T));
  return x;
}
template <class T>
T shuffle_xor(T x, int mask) {
  return shuffle(x, thread() % 32 ^ mask);
}
inline bool any_of_warp(bool x) {
  for (int mask = 1; mask < 32; mask *= 2) x = shuffle_xor(int(x), mask) || x;
  return x;
}

inline char* shared() { return machine.current->block->shared; }

template <class T>
T read(const T* p) {
  ++memory.of(p, sizeof(T), "read").reads;
  return *p;
}
template <class T>
T read_16(const T* p) {
  static_assert(sizeof(T) == 16, "");
  memory.of(p, 16, "read");
  if (reinterpret_cast<std::uintptr_t>(p) % 16) throw emulator::Error("read of 16 bytes astride of them");
  return *p;
}
template <class T>
void write(T* p, T x) {
  memory.wrote(p, sizeof(T), true, block());
  *p = x;
}
template <class T>
T fetch(const T* p) {
  memory.looked_at(p, sizeof(T), block());
  return *p;
}
template <class T>
T fetch_fresh(const T* p) {
  memory.of(p, sizeof(T), "read");
  return *p;
}
template <class T>
void put(T* p, T x) {
  memory.wrote(p, sizeof(T), false, block());
  *p = x;
}

inline long long fresh(long long x) { return x; }

inline int block_of_cluster() { return machine.current->block->rank; }
inline int blocks_of_cluster() { return int(machine.current->block->cluster->blocks.size()); }
inline void sync_cluster() { machine.wait(machine.current->block->cluster->barrier); }
template <class T>
T* of_block(T* p, int rank) {
  const emulator::Block &own = *machine.current->block, &other = *own.cluster->blocks[rank];
  if (!other.started) throw emulator::Error("memory of a block that may not have started");
  if (other.unfinished == 0) throw emulator::Error("memory of a block that may have ended");
  return reinterpret_cast<T*>(other.shared + (reinterpret_cast<char*>(p) - own.shared));
}

inline void sync_blocks(unsigned* arrived, int count, unsigned& meetings) {
  meetings += 1;
  sync();
  if (thread() == 0) {
    put(arrived, fetch_fresh(arrived) + 1);
    machine.wait_for(arrived, meetings * count);
  }
  sync();
}

inline float exp2_fast(float x) { return ::exp2f(x); }
inline double exp2_fast(double x) { return ::exp2(x); }

inline float float_of_half(unsigned short bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 1023;
  const float size = exponent == 31  ? (digits ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(float(digits), -24)
                                     : std::ldexp(float(digits + 1024), exponent - 25);
  return bits & 0x8000 ? -size : size;
}
// To the nearest, or to the even one of two, as nearbyint does it.
inline unsigned short half_of(float x) {
  const unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  if (x != x) return 0x7fff;
  const float size = std::fabs(x);
  if (size >= 65520) return sign | 0x7c00;
  const int exponent = size < 6.1035156e-5f ? -14 : std::ilogb(size);
  const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 2^10 more is the next exponent
  return sign | (exponent == -14 ? units : units + ((exponent + 14) << 10));
}

}  // namespace otdd::cuda::chip
