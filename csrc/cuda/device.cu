#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "device.h"
#include "launch.h"

namespace otdd::cuda {

static OTDD_KERNEL in_a_cluster() {}

// Blocks of the largest cluster of which each block can have a whole multiprocessor, or 1: by the
// processors of a part of the chip that are left in this one, and by what the code was compiled for.
static int largest_cluster(int shared) {
  cudaFuncAttributes code;
  if (cudaFuncGetAttributes(&code, in_a_cluster) != cudaSuccess || code.ptxVersion < 90) return 1;
  cudaFuncSetAttribute(in_a_cluster, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(in_a_cluster, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = dim3(512), config.dynamicSmemBytes = shared;
  config.attrs = &attribute, config.numAttrs = 1;
  for (int blocks = 16; blocks > 1; blocks /= 2) {
    config.gridDim = dim3(blocks), attribute.val.clusterDim.x = blocks;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, in_a_cluster, &config) == cudaSuccess && clusters > 0)
      return blocks;
  }
  return 1;
}

int chip_of(int device, Chip& chip) {
  static std::mutex mutex;
  static std::map<int, Chip> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    chip = found->second;
    return kOk;
  }
  int major = 0, shared = 0, processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return status_of(error);
  chip = {processors, shared, major >= 9 ? largest_cluster(shared) : 1};
  cudaGetLastError();  // a cluster that is too large is no error
  known[device] = chip;
  return kOk;
}

DeviceQuery query_devices() {
  DeviceQuery query{CUDART_VERSION, 0, {}, ""};
  cudaDriverGetVersion(&query.driver);
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  for (int index = 0; status == cudaSuccess && index < count; ++index) {
    cudaDeviceProp properties;
    status = cudaGetDeviceProperties(&properties, index);
    if (status == cudaSuccess)
      query.devices.push_back({properties.name, properties.major, properties.minor,
                               properties.multiProcessorCount, properties.totalGlobalMem});
  }
  if (status != cudaSuccess) {
    query.error = cudaGetErrorString(status);
    cudaGetLastError();  // the error is reported here: later calls must not see it again
  }
  return query;
}

}  // namespace otdd::cuda
