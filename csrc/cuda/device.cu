#include <cuda_runtime.h>

#include "device.h"

namespace otdd::cuda {

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
