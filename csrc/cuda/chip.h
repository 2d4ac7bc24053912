// What a kernel sees of the chip: its thread's place, barriers, exchanges within a warp, memory.
//
// Kernels are written against this header alone. nvcc makes device code of them; with
// OTDD_EMULATED any compiler makes functions that the emulator (emulator.h) runs on the CPU, thread for
// thread: the same index arithmetic, order of reductions and barriers. Grids and blocks have one dimension.
#pragma once

#include <math.h>

#if defined(__CUDACC__)

#include <cooperative_groups.h>

#define OTDD_KERNEL __global__ void
#define OTDD_THREADS(count, blocks) __launch_bounds__(count, blocks)
#define OTDD_DEVICE __device__ __forceinline__
#define OTDD_BOTH __host__ __device__ __forceinline__
#define OTDD_UNROLL _Pragma("unroll")
#define OTDD_UNROLL_BY_2 _Pragma("unroll 2")
#define OTDD_UNROLL_BY_8 _Pragma("unroll 8")
#define OTDD_NO_UNROLL _Pragma("unroll 1")
#define OTDD_ARGUMENT const __grid_constant__

namespace otdd::cuda::chip {

OTDD_DEVICE int thread() { return threadIdx.x; }
OTDD_DEVICE int threads() { return blockDim.x; }
OTDD_DEVICE int block() { return blockIdx.x; }
OTDD_DEVICE int blocks() { return gridDim.x; }

// Meets all threads of the block; what they wrote is then seen by all of them.
OTDD_DEVICE void sync() { __syncthreads(); }
OTDD_DEVICE bool any_of_block(bool x) { return __syncthreads_or(x); }
OTDD_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
OTDD_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
OTDD_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
OTDD_DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }

// Shared memory of the block, as much as the launch asked for, aligned to 16 bytes.
OTDD_DEVICE char* shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Arguments and results of a kernel, in device memory.
template <class T>
OTDD_DEVICE T read(const T* p) {
  return __ldg(p);
}
// 16 bytes at once, at a multiple of 16.
template <class T>
OTDD_DEVICE T read_16(const T* p) {
  static_assert(sizeof(T) == 16, "");
  const int4 bits = __ldg(reinterpret_cast<const int4*>(p));
  T x;
  memcpy(&x, &bits, 16);
  return x;
}
template <class T>
OTDD_DEVICE void write(T* p, T x) {
  *p = x;
}
// The same for memory that the kernel itself reads and writes; `fresh` is for what another block wrote.
template <class T>
OTDD_DEVICE T fetch(const T* p) {
  return *p;
}
template <class T>
OTDD_DEVICE T fetch_fresh(const T* p) {
  return __ldcg(p);
}
template <class T>
OTDD_DEVICE void put(T* p, T x) {
  *p = x;
}

// x, so that what is computed from it is computed here, not kept in registers from before a loop.
OTDD_DEVICE long long fresh(long long x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Clusters: blocks that can reach each other's shared memory (compute capability 9.0 and later).
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
OTDD_DEVICE int block_of_cluster() { return cooperative_groups::this_cluster().block_rank(); }
OTDD_DEVICE int blocks_of_cluster() { return cooperative_groups::this_cluster().num_blocks(); }
OTDD_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }
// Where block `rank` of the cluster has what this block has at p.
template <class T>
OTDD_DEVICE T* of_block(T* p, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#else
OTDD_DEVICE int block_of_cluster() { return 0; }
OTDD_DEVICE int blocks_of_cluster() { return 1; }
OTDD_DEVICE void sync_cluster() { __trap(); }
template <class T>
OTDD_DEVICE T* of_block(T* p, int) {
  return p;
}
#endif

// Meets all threads of `count` blocks that run at the same time. *arrived starts at 0 and is theirs
// alone; `meetings` counts their barriers so far, in each thread.
OTDD_DEVICE void sync_blocks(unsigned* arrived, int count, unsigned& meetings) {
  meetings += 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1u);
    while (static_cast<int>(*static_cast<volatile unsigned*>(arrived) - meetings * count) < 0) {}
    __threadfence();
  }
  __syncthreads();
}

OTDD_DEVICE float exp2_fast(float x) { return ::exp2f(x); }
OTDD_DEVICE double exp2_fast(double x) { return ::exp2(x); }

// float16, as its bits.
OTDD_DEVICE float float_of_half(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
OTDD_DEVICE unsigned short half_of(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

}  // namespace otdd::cuda::chip

#elif defined(OTDD_EMULATED)

#include "emulator.h"

#else  // a caller of the kernels: nothing here is run

#define OTDD_DEVICE inline
#define OTDD_BOTH inline

namespace otdd::cuda::chip {
template <class T>
T read(const T* p);
template <class T>
void write(T* p, T x);
float float_of_half(unsigned short bits);
unsigned short half_of(float x);
}  // namespace otdd::cuda::chip

#endif
