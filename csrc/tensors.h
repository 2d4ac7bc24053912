// PyTorch's tensors as arguments: read by DLPack's C interface, without torch's headers, and faster than
// by their attributes in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace otdd {

// Of DLPack 1, whose layout stays as it is: github.com/dmlc/dlpack, dlpack.h.
struct DLTensor {
  void* data;
  std::int32_t device_type, device_id, dims;
  std::uint8_t type_code, bits;
  std::uint16_t lanes;
  std::int64_t *sizes, *strides;
  std::uint64_t byte_offset;
};

constexpr int kDLBfloat = 4;  // of the codes of types

struct DLPackExchangeAPI {
  std::uint32_t major, minor;
  void *earlier, *allocate, *from_tensor, *to_tensor;
  int (*view)(void* tensor, DLTensor* out);  // sizes and strides stay the tensor's
};

// None, or a tensor that its caller keeps alive: a batch of things of so many dimensions, or one of
// them. Dimensions are counted from the last, which is 1; strides are in elements.
struct Tensor : DLTensor {
  Tensor() : DLTensor{} {}

  std::int64_t batch(int own) const { return dims > own ? sizes[0] : 1; }
  std::int64_t batch_stride(int own) const { return dims > own ? strides[0] : 0; }
  std::int64_t size(int dim) const {
    // Its data may have been replaced since it was checked: t.data = ...
    if (dims < dim) throw pybind11::value_error("got a tensor of fewer dimensions than it had before");
    return sizes[dims - dim];
  }
  std::int64_t stride(int dim) const { return dims < dim ? 0 : strides[dims - dim]; }
};

// A derivative's costs are those of the solve, unless C.data has been replaced in between.
inline void check_costs(const Tensor& C, const Tensor& f, const Tensor& g) {
  if (C.size(2) != f.size(1) || C.size(1) != g.size(1) || C.batch(2) != f.batch(1))
    throw pybind11::value_error("C: got other sizes than when it was solved; accepted: the same");
}

}  // namespace otdd

template <>
struct pybind11::detail::type_caster<otdd::Tensor> {
  PYBIND11_TYPE_CASTER(otdd::Tensor, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    static const otdd::DLPackExchangeAPI* api = nullptr;
    if (!api) {
      const capsule found = type::handle_of(source).attr("__dlpack_c_exchange_api__");
      api = found.get_pointer<const otdd::DLPackExchangeAPI>();
      if (api->major != 1 || !api->view) throw type_error("otdd needs a PyTorch with DLPack 1.3");
    }
    if (api->view(source.ptr(), &value) != 0) throw error_already_set();
    value.data = static_cast<char*>(value.data) + value.byte_offset;
    return true;
  }
};
