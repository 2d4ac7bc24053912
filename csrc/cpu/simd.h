// Vectors of the widest registers the translation unit is compiled for, and exp on them.
//
// Everything lives in a namespace named after the instruction set: the same source is compiled once
// for each, and the linker must never take one's code for another's. For the same reason the
// kernels use no templates of the standard library.
#pragma once

#include <math.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#include "../numerics.h"
#include "problem.h"

namespace otdd::cpu::OTDD_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kBytes)));
typedef double VecD __attribute__((vector_size(kBytes)));
typedef int VecI32 __attribute__((vector_size(kBytes)));
typedef long long VecI64 __attribute__((vector_size(kBytes)));

template <class T>
struct Traits;
template <>
struct Traits<float> {
  using Vec = VecF;
  using Int = VecI32;
  static constexpr int kBits = 23;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2Hi = 0.693145751953125f, kLn2Lo = 1.42860677e-6f;
  static constexpr double kTiny = 1.1754943508222875e-38, kHuge = 3.4028234663852886e38;
  static constexpr float kLowest = -87.0f, kHighest = 88.0f;
};
template <>
struct Traits<double> {
  using Vec = VecD;
  using Int = VecI64;
  static constexpr int kBits = 52;
  static constexpr double kMagic = 6755399441055744.0;
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kTiny = 2.2250738585072014e-308, kHuge = 1.7976931348623157e308;
  static constexpr double kLowest = -708.0, kHighest = 709.0;
};

template <class T>
using Vec = typename Traits<T>::Vec;
template <class T>
constexpr i64 kWidth = kBytes / i64(sizeof(T));

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, kBytes);
}
// AddressSanitizer does not see masked loads and stores: built with it, lanes are taken one by one.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
#define OTDD_MASKED 1
// The first `count` lanes; count >= 0.
inline unsigned lanes(i64 count) { return count > 15 ? ~0u : (1u << count) - 1; }
#endif
template <class T>
inline Vec<T> load_some(const T* p, i64 count, T fill = T(0)) {
  if (count >= kWidth<T>) return load(p);
#ifdef OTDD_MASKED
  if constexpr (sizeof(T) == 4)
    return (VecF)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), lanes(count), p);
  else
    return (VecD)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), lanes(count), p);
#else
  alignas(kBytes) T lane[kWidth<T>];
  for (i64 l = 0; l < kWidth<T>; ++l) lane[l] = l < count ? p[l] : fill;
  return load(lane);
#endif
}
template <class T>
inline void store_some(T* p, Vec<T> v, i64 count) {
  if (count >= kWidth<T>) return store(p, v);
#ifdef OTDD_MASKED
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, lanes(count), (__m512)v);
  else _mm512_mask_storeu_pd(p, lanes(count), (__m512d)v);
#else
  alignas(kBytes) T lane[kWidth<T>];
  store(lane, v);
  for (i64 l = 0; l < count; ++l) p[l] = lane[l];
#endif
}
template <class T>
inline Vec<T> broadcast(T s) {
  return s - Vec<T>{};  // s + 0 would be an addition: it turns -0 into 0
}
template <class T>
inline Vec<T> vmax(Vec<T> x, Vec<T> y) {
  return x > y ? x : y;
}
// All bits but the sign.
template <class T>
inline typename Traits<T>::Int magnitude_bits() {
  if constexpr (sizeof(T) == 4) return VecI32{} + 0x7fffffff;
  else return VecI64{} + 0x7fffffffffffffffLL;
}
template <class T>
inline Vec<T> vabs(Vec<T> x) {
  return (Vec<T>)((typename Traits<T>::Int)x & magnitude_bits<T>());
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own _mm512_reduce_add
#endif
template <class T>
inline T sum(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)v);
#endif
  T s = 0;
  for (int l = 0; l < kWidth<T>; ++l) s += v[l];
  return s;
}
template <class T>
inline T max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_max_pd((__m512d)v);
#endif
  T s = v[0];
  for (int l = 1; l < kWidth<T>; ++l) s = v[l] > s ? v[l] : s;
  return s;
}

// 0, 1, ... as a pack, without the standard library.
template <int... l>
struct Numbers {};
template <int n, int... l>
struct NumbersTo : NumbersTo<n - 1, n - 1, l...> {};
template <int... l>
struct NumbersTo<0, l...> {
  using type = Numbers<l...>;
};

// Where lane l of a fold comes from: lanes of x, then lanes of y. Within 16 bytes rows take turns,
// and then whole blocks of 16 bytes do: the shuffles that processors have.
template <class T>
constexpr int fold_source(int rows, int l) {
  constexpr int W = kWidth<T>, q = 16 / sizeof(T);
  if (rows < q) {
    const int i = l % q;
    return (i / rows % 2) * W + l - i + i / (2 * rows) * rows + i % rows;
  }
  const int block = l / q, half = W / q / 2;
  return (block / half) * W + (block % half) * 2 * q + l % q;
}

// x and y each hold partial sums of `rows` rows: those of both, with half as many parts.
template <class T, int rows, int... l>
inline Vec<T> fold(Vec<T> x, Vec<T> y, Numbers<l...>) {
  constexpr int other = rows < int(16 / sizeof(T)) ? 8 / sizeof(T) : 16 / sizeof(T);
#if defined(__clang__)
  return __builtin_shufflevector(x, y, fold_source<T>(rows, l)...) +
         __builtin_shufflevector(x, y, (fold_source<T>(rows, l) + other)...);
#else
  using Int = typename Traits<T>::Int;
  const Int low = {fold_source<T>(rows, l)...}, high = {(fold_source<T>(rows, l) + other)...};
  return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high);
#endif
}

// Lane k is the sum over the lanes of vector(k), for `count` = kWidth vectors.
template <class T, int count, class Vector>
__attribute__((always_inline)) inline Vec<T> sums(int k, Vector vector) {
  if constexpr (count == 1) {
    return vector(k);
  } else {
    const Vec<T> x = sums<T, count / 2>(k, vector), y = sums<T, count / 2>(k + count / 2, vector);
    return fold<T, count / 2>(x, y, typename NumbersTo<int(kWidth<T>)>::type());
  }
}

template <class Mask>
inline bool any(Mask m) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)m, (__m512i)m) != 0;
#else
  bool found = false;
  for (unsigned l = 0; l < sizeof(m) / sizeof(m[0]); ++l) found |= m[l] != 0;
  return found;
#endif
}

// exp(x), within 2 ulp; exactly 0 below kLowest (-inf included), x above kHighest is not expected.
// x = n ln 2 + r with |r| <= ln 2 / 2, exp(r) by its Taylor series, 2^n through the exponent bits.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  using R = Traits<T>;
  using Int = typename R::Int;
  const Vec<T> low = broadcast<T>(R::kLowest), high = broadcast<T>(R::kHighest);
  const auto lost = x < low;
  x = lost ? low : x;
  x = x > high ? high : x;
  const Vec<T> shifted = x * T(1.4426950408889634) + R::kMagic;
  const Vec<T> n = shifted - R::kMagic;
  const Vec<T> r = (x - n * R::kLn2Hi) - n * R::kLn2Lo;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    p = broadcast<T>(T(1.0 / 5040));
    p = p * r + T(1.0 / 720);
  } else {
    p = broadcast<T>(T(1.0 / 6227020800.0));
    p = p * r + T(1.0 / 479001600);
    p = p * r + T(1.0 / 39916800);
    p = p * r + T(1.0 / 3628800);
    p = p * r + T(1.0 / 362880);
    p = p * r + T(1.0 / 40320);
    p = p * r + T(1.0 / 5040);
    p = p * r + T(1.0 / 720);
  }
  p = p * r + T(1.0 / 120);
  p = p * r + T(1.0 / 24);
  p = p * r + T(1.0 / 6);
  p = p * r + T(0.5);
  p = p * r + T(1);
  p = p * r + T(1);
  const Int scale = ((Int)shifted - (Int)broadcast<T>(R::kMagic)) << R::kBits;
  const Vec<T> y = (Vec<T>)((Int)p + scale);
  return lost ? Vec<T>{} : y;
}

constexpr double kLog2e = 1.442695040888963407;

template <class T>
struct Powers;
template <>
struct Powers<float> {
  static constexpr int kMantissa = 23, kDegree = 6;
  static constexpr float kLowest = -125.0f;
  static constexpr float kMinimax[] = {
      1.0f, 0.69314721496788f, 0.24022652782876f, 0.055503105512070f, 0.0096176929761432f,
      0.0013406643847480f, 0.00015594677015105f};
};
template <>
struct Powers<double> {
  static constexpr int kMantissa = 52, kDegree = 11;
  static constexpr double kLowest = -1021.0;
  static constexpr double kMinimax[] = {
      1.0, 0.69314718055994569675, 0.24022650695910098006, 0.055504108664790394528,
      0.0096181291076070026171, 0.001333355815343996974, 0.00015403530441571850099,
      0.00001525272738518977478, 1.3215442675455852182e-6, 1.0180647660573069343e-7,
      7.0725703945407994337e-9, 4.0780717860928704165e-10};
};

template <class T>
inline Vec<T> larger(Vec<T> x, Vec<T> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)x, (__m512)y);
  else return (Vec<T>)_mm512_max_pd((__m512d)x, (__m512d)y);
#else
  return vmax<T>(x, y);
#endif
}

// t becomes 2^t for t < 127 (1023), about 1 ulp; below kLowest it is 2^kLowest. t = n + r with
// |r| <= 1/2, and a minimax polynomial for 2^r whose relative error is 3e-9 (2e-17). Several vectors
// take each step together: one alone would wait for every result.
template <class T, int kCount>
inline void exp2(Vec<T> (&t)[kCount]) {
  using R = Traits<T>;
  using P = Powers<T>;
  using Int = typename R::Int;
  Vec<T> p[kCount];
  Int n[kCount];
  for (int v = 0; v < kCount; ++v) t[v] = larger<T>(t[v], P::kLowest - Vec<T>{});
  for (int v = 0; v < kCount; ++v) p[v] = t[v] + R::kMagic;
  for (int v = 0; v < kCount; ++v) n[v] = (Int)p[v] << R::kBits, t[v] -= p[v] - R::kMagic;
  for (int v = 0; v < kCount; ++v) p[v] = t[v] * P::kMinimax[P::kDegree] + P::kMinimax[P::kDegree - 1];
#pragma GCC unroll 16
  for (int k = P::kDegree - 2; k >= 0; --k)
    for (int v = 0; v < kCount; ++v) p[v] = p[v] * t[v] + P::kMinimax[k];
  for (int v = 0; v < kCount; ++v) t[v] = (Vec<T>)((Int)p[v] + n[v]);
}

// The same, 0 below kLowest (-inf included) and whatever above; t may be beyond 127 (1023).
template <class T, int kCount>
inline void powers_or_zero(Vec<T> (&t)[kCount]) {
  constexpr T kHighest = -Powers<T>::kLowest;
  decltype(t[0] > t[0]) kept[kCount];
  for (int v = 0; v < kCount; ++v) kept[v] = t[v] > Powers<T>::kLowest - Vec<T>{};
  for (int v = 0; v < kCount; ++v) t[v] = t[v] > kHighest - Vec<T>{} ? kHighest - Vec<T>{} : t[v];
  exp2<T>(t);
  for (int v = 0; v < kCount; ++v) t[v] = kept[v] ? t[v] : Vec<T>{};
}

// kWidth<double> numbers of either type as doubles, and back.
inline VecD widen(const double* p) { return load(p); }
inline VecD widen(const float* p) {
  typedef float Half __attribute__((vector_size(kBytes / 2)));
  Half h;
  __builtin_memcpy(&h, p, kBytes / 2);
  return __builtin_convertvector(h, VecD);
}
inline void narrow(VecD x, double* p) { store(p, x); }
inline void narrow(VecD x, float* p) {
  typedef float Half __attribute__((vector_size(kBytes / 2)));
  const Half h = __builtin_convertvector(x, Half);
  __builtin_memcpy(p, &h, kBytes / 2);
}

// kWidth<T> numbers of T from as many doubles: part(h) gives those from lane h on.
template <class T, class Part>
__attribute__((always_inline)) inline Vec<T> narrowed(Part part) {
  if constexpr (sizeof(T) == 8) {
    return part(0);
  } else {
    const VecD low = part(0), high = part(kWidth<double>);
#if defined(__AVX512F__)
    const __m512 half = _mm512_castps256_ps512(_mm512_cvtpd_ps((__m512d)low));
    return (VecF)_mm512_insertf32x8(half, _mm512_cvtpd_ps((__m512d)high), 1);
#else
    alignas(kBytes) T lane[kWidth<T>];
    narrow(low, lane), narrow(high, lane + kWidth<double>);
    return load(lane);
#endif
  }
}

// log(x) for normal x > 0, within 2 ulp: x = 2^n m, m about 1, log m = 2 atanh((m - 1) / (m + 1)).
inline VecD log(VecD x) {
  const VecI64 bits = (VecI64)x - (VecI64{} + 0x3fe6a09e667f3bcdLL);  // so that m is in [.7, 1.4]
  const VecI64 n = bits >> 52;
  const VecD m = (VecD)((VecI64)x - (n << 52));
  const VecD s = (m - 1.0) / (m + 1.0), z = s * s;
  VecD p = VecD{} + 1.0 / 21;
  for (int k = 19; k >= 3; k -= 2) p = p * z + 1.0 / k;
  const VecD whole = __builtin_convertvector(n, VecD);
  return whole * 6.93147180369123816490e-01 +
         (2 * (s + s * (z * p)) + whole * 1.90821492927058770002e-10);
}

// out = log(x) of `count` numbers, rounded up to whole vectors. For a float the logarithm of the
// mantissa is one too; that of the exponent keeps its digits.
inline void logs(const double* x, i64 count, double* out) {
  for (i64 k = 0; k < count; k += kWidth<double>) store(out + k, log(load(x + k)));
}
inline void logs(const float* x, i64 count, double* out) {
  for (i64 k = 0; k < count; k += kWidth<float>) {
    const VecI32 bits = (VecI32)load(x + k) - (VecI32{} + 0x3f3504f3);  // mantissa in [.7, 1.4]
    const VecI32 n = bits >> 23;
    const VecF m = (VecF)((VecI32)load(x + k) - (n << 23));
    const VecF s = (m - 1.0f) / (m + 1.0f), z = s * s;
    VecF p = VecF{} + 1.0f / 9;
    for (int d = 7; d >= 3; d -= 2) p = p * z + 1.0f / d;
    alignas(kBytes) float whole[kWidth<float>], part[kWidth<float>];
    store(whole, __builtin_convertvector(n, VecF)), store(part, 2 * (s + s * (z * p)));
    for (i64 h = 0; h < kWidth<float>; h += kWidth<double>)
      store(out + k + h, widen(whole + h) * 0.693147180559945309 + widen(part + h));
  }
}

// Products of tiny numbers count as 0: they are far below any sum they enter, and slow otherwise.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// A thread's last block of memory, for its next call: fresh pages of a matrix cost as much as ten
// iterations on it. All threads together keep at most kMost bytes.
struct Kept {
  static constexpr i64 kMost = i64(320) << 20;
  static inline i64 all = 0;
  char* base = nullptr;
  i64 size = 0;

  ~Kept() {
    if (base) __atomic_sub_fetch(&all, size, __ATOMIC_RELAXED);
    ::free(base);
  }
  // A block of at least `wanted` bytes, which becomes its true size; null if there is no memory.
  char* take(i64& wanted) {
    if (base) __atomic_sub_fetch(&all, size, __ATOMIC_RELAXED);
    char* block = base;
    base = nullptr;
    if (block && size >= wanted) {
      wanted = size;
      return block;
    }
    ::free(block);
    constexpr i64 kHugePage = 1 << 21;
    const bool large = wanted >= 2 * kHugePage;
    void* fresh = nullptr;
    if (posix_memalign(&fresh, large ? kHugePage : 64, wanted + 64) != 0) return nullptr;
#if defined(__linux__)
    // Pages of 4 kB cost a fault each and, walked by rows, most of the translation cache.
    if (large) madvise(fresh, wanted, MADV_HUGEPAGE);
#endif
    return (char*)fresh;
  }
  void give_back(char* block, i64 bytes) {
    if (!base && __atomic_add_fetch(&all, bytes, __ATOMIC_RELAXED) <= kMost) {
      base = block, size = bytes;
      return;
    }
    if (!base) __atomic_sub_fetch(&all, bytes, __ATOMIC_RELAXED);
    ::free(block);
  }
};
inline thread_local Kept kept;

// One block of memory handed out in aligned pieces. Without memory it counts what is taken, so that the
// size of a block comes from the code that takes it apart.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(i64 bytes) : size_(bytes), base_(kept.take(size_)) {
    if (base_) close(base_, size_);
  }
  ~Scratch() {
    if (base_) kept.give_back(base_, size_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  bool ok() const { return base_ != nullptr; }
  i64 used() const { return used_; }
  void rewind() {
    close(base_, used_);
    used_ = 0;
  }
  template <class T>
  T* take(i64 count) {
    const i64 bytes = count * i64(sizeof(T));
    T* p = base_ ? (T*)(base_ + used_) : nullptr;
    if (p && used_ + bytes <= size_) open(p, bytes);
    used_ += padded(bytes);
    return p;
  }

 private:
#if defined(__SANITIZE_ADDRESS__)  // it then sees where a piece or the block is left
  static constexpr i64 kGap = 64;
  static void close(void* p, i64 bytes) { __asan_poison_memory_region(p, bytes); }
  static void open(void* p, i64 bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
  static constexpr i64 kGap = 0;
  static void close(void*, i64) {}
  static void open(void*, i64) {}
#endif
  i64 size_ = 0, used_ = 0;
  char* base_ = nullptr;

  static i64 padded(i64 bytes) { return (bytes + 63) / 64 * 64 + kGap; }
};

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }
constexpr i64 least(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 most(i64 a, i64 b) { return a > b ? a : b; }

}  // namespace otdd::cpu::OTDD_ISA
