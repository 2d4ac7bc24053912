// From the host: what a device has to offer, and the start of a kernel on it.
#pragma once

#include <cstdint>
#include <string>

#include "kernels.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace otdd::cuda {

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// What of the device decides how a problem is shared out.
struct Chip {
  int multiprocessors;
  i64 shared;        // bytes of shared memory a block may have
  int cluster;       // blocks of a cluster, at most; 1 where there are none
  double barrier = 13500;  // of all blocks, in numbers that one of them reads from device memory meanwhile
};

struct Shape {
  int grid, block;
  i64 shared = 0;
  int cluster = 1;
  bool cooperative = false;  // all blocks run at the same time
};

inline std::string& error_text() {
  static thread_local std::string text;
  return text;
}

#if defined(__CUDACC__)

// The error, if any, is kept for `last_error`; CUDA's own state is cleared.
inline int status_of(cudaError_t error) {
  if (error == cudaSuccess) return kOk;
  error_text() = cudaGetErrorString(error);
  cudaGetLastError();
  return error == cudaErrorMemoryAllocation ? kNoMemory : kFailed;
}

int chip_of(int device, Chip& chip);  // of the current device; device.cu

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const Shape& shape, void* stream, const Args&... args) {
  cudaError_t error = cudaSuccess;
  if (shape.shared > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared));
  if (error == cudaSuccess && shape.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return status_of(error);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.grid), config.blockDim = dim3(shape.block);
  config.dynamicSmemBytes = shape.shared, config.stream = static_cast<cudaStream_t>(stream), config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = shape.cluster, a.val.clusterDim.y = 1, a.val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  return status_of(cudaLaunchKernelEx(&config, kernel, Params(args)...));
}

inline int clear(void* p, i64 pitch, i64 bytes, i64 count, void* stream) {
  return status_of(cudaMemset2DAsync(p, pitch, 0, bytes, count, static_cast<cudaStream_t>(stream)));
}

// The device of the caller's tensors for the time of a call.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    status_ = status_of(cudaGetDevice(&before_));
    moved_ = status_ == kOk && before_ != device;
    if (moved_) status_ = status_of(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  int status() const { return status_; }

 private:
  int before_ = 0, status_;
  bool moved_;
};

#else  // the emulator

inline Chip emulated_chip = {4, i64(227) << 10, 16};  // of few processors: grids go round

// What a call is told of, other than what would be taken without.
constexpr int kEmulatedDevice = 1;
constexpr std::uintptr_t kEmulatedStream = 64;
inline int current_device = 0;

inline int chip_of(int device, Chip& chip) {
  chip = emulated_chip;
  if (device == kEmulatedDevice) return kOk;
  error_text() = "asked of another device";
  return kFailed;
}

inline void check_place(void* stream) {
  if (current_device != kEmulatedDevice) throw emulator::Error("work on another device than the caller's");
  if (reinterpret_cast<std::uintptr_t>(stream) != kEmulatedStream)
    throw emulator::Error("work in another stream than the caller's");
}

template <class... Params, class... Args>
int launch(void (*kernel)(Params...), const Shape& shape, void* stream, const Args&... args) {
  try {
    check_place(stream);
    emulator::machine.launch(shape.grid, shape.block, shape.shared, shape.cluster, shape.cooperative,
                             [&] { kernel(args...); });
  } catch (const std::exception& error) {
    error_text() = error.what();
    return kFailed;
  }
  return kOk;
}

inline int clear(void* p, i64 pitch, i64 bytes, i64 count, void* stream) {
  try {
    check_place(stream);
  } catch (const std::exception& error) {
    error_text() = error.what();
    return kFailed;
  }
  for (i64 k = 0; k < count; ++k) std::memset(static_cast<char*>(p) + k * pitch, 0, bytes);
  return kOk;
}

class OnDevice {
 public:
  explicit OnDevice(int device) : before_(current_device) { current_device = device; }
  ~OnDevice() { current_device = before_; }
  int status() const { return kOk; }

 private:
  int before_;
};

#endif

// run(chip) with `device` the current one.
template <class Run>
int on_device(int device, Run run) {
  const OnDevice current(device);
  Chip chip;
  const int status = current.status() == kOk ? chip_of(device, chip) : current.status();
  return status == kOk ? run(chip) : status;
}

}  // namespace otdd::cuda
