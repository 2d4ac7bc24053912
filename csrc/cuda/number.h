// Costs and plans in the type that the caller has them in; what is computed with them is of the solve's.
#pragma once

#include <string.h>

#include "chip.h"

namespace otdd::cuda {

using i64 = long long;

enum Number : int { kFloat32, kFloat64, kFloat16, kBfloat16 };

OTDD_BOTH i64 size_of(Number type) { return type == kFloat64 ? 8 : type == kFloat32 ? 4 : 2; }

template <class To, class From>
OTDD_DEVICE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The upper half of a float, rounded to the nearest, or to the even one of two.
OTDD_DEVICE float float_of_bfloat16(unsigned short bits) { return same_bits<float>(unsigned(bits) << 16); }
OTDD_DEVICE unsigned short bfloat16_of(float x) {
  const unsigned bits = same_bits<unsigned>(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : 0x7fffu;
}

// How numbers of a type are read.
template <class X>
struct Whole {
  static OTDD_DEVICE X read(const void* data, i64 index) { return chip::read(static_cast<const X*>(data) + index); }
};
struct Float16 {
  static OTDD_DEVICE float read(const void* data, i64 index) {
    return chip::float_of_half(chip::read(static_cast<const unsigned short*>(data) + index));
  }
};
struct Bfloat16 {
  static OTDD_DEVICE float read(const void* data, i64 index) {
    return float_of_bfloat16(chip::read(static_cast<const unsigned short*>(data) + index));
  }
};

// use(Whole, Float16 or Bfloat16), what `type` says; float64 is for a solve in float64 alone.
template <class T, class Use>
OTDD_DEVICE void with_number(Number type, Use use) {
  if (type == kFloat16) use(Float16());
  else if (type == kBfloat16) use(Bfloat16());
  else if (sizeof(T) == 4 || type == kFloat64) use(Whole<T>());
  else use(Whole<float>());
}

template <class T>
OTDD_DEVICE void write_number(void* data, Number type, i64 index, T x) {
  if (type == kFloat16) chip::write(static_cast<unsigned short*>(data) + index, chip::half_of(float(x)));
  else if (type == kBfloat16) chip::write(static_cast<unsigned short*>(data) + index, bfloat16_of(float(x)));
  else chip::write(static_cast<T*>(data) + index, x);
}

// A batch of matrices of costs whose rows are contiguous.
struct Costs {
  const void* data;
  i64 batch, row;
  Number type;

  OTDD_DEVICE const void* of(i64 problem) const {
    return static_cast<const char*>(data) + problem * batch * size_of(type);
  }
  template <class T>
  OTDD_DEVICE T at(i64 problem, i64 i, i64 j) const {
    T c = 0;
    with_number<T>(type, [&](auto number) { c = T(number.read(data, problem * batch + i * row + j)); });
    return c;
  }
};

}  // namespace otdd::cuda
