// Which CUDA devices this machine has, asked without torch.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace otdd::cuda {

struct Device {
  std::string name;
  int major;  // compute capability
  int minor;
  int multiprocessors;
  std::size_t memory;  // bytes
};

struct DeviceQuery {
  int runtime;  // 13000 = 13.0: the toolkit this module is linked with
  int driver;   // newest CUDA version the driver supports; 0 without a driver
  std::vector<Device> devices;
  std::string error;  // why devices is empty or incomplete; "" otherwise
};

DeviceQuery query_devices();

}  // namespace otdd::cuda
