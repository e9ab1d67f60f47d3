// One SIMD vector type per scalar, at the width of the instruction set this translation unit is compiled for.
//
// Compiled once per instruction set into its own namespace (FINECF_ISA_NS), so that no inline function built with wide
// instructions can be picked by the linker for the baseline. For the same reason nothing here, or in the headers built
// on it, may instantiate templates of the standard library.
#pragma once

#include <stdint.h>

#include <utility>  // integer_sequence: types, no code

#if defined(__AVX512F__)
#define FINECF_VEC_BYTES 64
#elif defined(__AVX2__)
#define FINECF_VEC_BYTES 32
#else
#define FINECF_VEC_BYTES 16
#endif

#define FINECF_INLINE inline __attribute__((always_inline))
#define FINECF_ALWAYS_INLINE __attribute__((always_inline))  // for lambdas

namespace finecf {
namespace FINECF_ISA_NS {

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float vec __attribute__((vector_size(FINECF_VEC_BYTES)));
  typedef int32_t ivec __attribute__((vector_size(FINECF_VEC_BYTES)));
  typedef int32_t scalar_int;
  static constexpr int lanes = FINECF_VEC_BYTES / 4;
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t bias = 127;
  static constexpr int32_t mantissa_mask = 0x007fffff;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float exp_min = -87.0f;           // below, exp is taken as 0: no subnormals
  static constexpr float exp_max = 89.0f;            // above, exp overflows to inf
  static constexpr float ln2_hi = 0x1.62e400p-1f;    // 11 trailing zero bits: n * ln2_hi is exact
  static constexpr float ln2_lo = 0x1.7f7d1cp-20f;
  static constexpr int exp_degree = 7;  // Taylor on |r| <= ln2/2: remainder below 6e-9
  static constexpr int log_terms = 5;   // atanh series on |s| <= 0.172: remainder below 2e-9
  static constexpr float epsilon = 0x1p-24f;
  static constexpr float tiny = 0x1p-126f;
  static constexpr float infinity = __builtin_inff();
};

template <>
struct Simd<double> {
  typedef double vec __attribute__((vector_size(FINECF_VEC_BYTES)));
  typedef int64_t ivec __attribute__((vector_size(FINECF_VEC_BYTES)));
  typedef int64_t scalar_int;
  static constexpr int lanes = FINECF_VEC_BYTES / 8;
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t bias = 1023;
  static constexpr int64_t mantissa_mask = 0x000fffffffffffffLL;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double exp_min = -708.0;
  static constexpr double exp_max = 710.0;
  static constexpr double ln2_hi = 0x1.62e42fee00000p-1;
  static constexpr double ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr int exp_degree = 13;
  static constexpr int log_terms = 11;
  static constexpr double epsilon = 0x1p-53;
  static constexpr double tiny = 0x1p-1022;
  static constexpr double infinity = __builtin_inf();
};

template <class T>
using Vec = typename Simd<T>::vec;
template <class T>
using IVec = typename Simd<T>::ivec;

template <class T>
FINECF_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
FINECF_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class T>
FINECF_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};
}

template <class To, class From>
FINECF_INLINE To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To r;
  __builtin_memcpy(&r, &v, sizeof(r));
  return r;
}

template <class T>
FINECF_INLINE Vec<T> vmax(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T>
FINECF_INLINE Vec<T> vmin(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// A vector of N lanes, for the halves that reductions fold.
template <class T, int N>
struct Lanes {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

template <class T, int N>
FINECF_INLINE void split(typename Lanes<T, N>::type v, typename Lanes<T, N / 2>::type& low,
                         typename Lanes<T, N / 2>::type& high) {
  __builtin_memcpy(&low, &v, sizeof(low));
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
}

// Folds lanes i and i + N/2 down to one: the one order of every horizontal reduction.
template <class T, int N, class F>
FINECF_INLINE T fold(typename Lanes<T, N>::type v, F combine) {
  if constexpr (N == 2) {
    return combine(v[0], v[1]);
  } else {
    typename Lanes<T, N / 2>::type low, high;
    split<T, N>(v, low, high);
    return fold<T, N / 2>(combine(low, high), combine);
  }
}

template <class T>
FINECF_INLINE T hsum(Vec<T> v) {
  return fold<T, Simd<T>::lanes>(v, [](auto a, auto b) { return a + b; });
}

template <class T>
FINECF_INLINE T hmax(Vec<T> v) {
  return fold<T, Simd<T>::lanes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

template <class T>
FINECF_INLINE T hmin(Vec<T> v) {
  return fold<T, Simd<T>::lanes>(v, [](auto a, auto b) { return a < b ? a : b; });
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FINECF_HAVE_SHUFFLEVECTOR 1
#endif
#endif

#ifdef FINECF_HAVE_SHUFFLEVECTOR
// x and y each hold `Segments` runs of lanes; the result holds twice as many of half the length, each run folded upon
// itself as in `fold`.
template <class T, int Segments, int... J>
FINECF_INLINE Vec<T> fold_pair(Vec<T> x, Vec<T> y, std::integer_sequence<int, J...>) {
  constexpr int w = Simd<T>::lanes, run = w / Segments, half = run / 2;
  // Lane j of the result: run j / half (of y from run `Segments` on, which is where its lanes start), place j % half.
  return __builtin_shufflevector(x, y, (J / half * run + J % half)...) +
         __builtin_shufflevector(x, y, (J / half * run + half + J % half)...);
}

template <class T, int Segments>
FINECF_INLINE Vec<T> fold_all(Vec<T>* s) {
  constexpr int w = Simd<T>::lanes;
  if constexpr (Segments == w) {
    return s[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < w / Segments / 2; ++i)
      s[i] = fold_pair<T, Segments>(s[2 * i], s[2 * i + 1], std::make_integer_sequence<int, w>{});
    return fold_all<T, 2 * Segments>(s);
  }
}
#endif

// out[k] = hsum(s[k]) for Count vectors, the same bits; destroys s.
template <class T, int Count>
FINECF_INLINE void hsum_many(Vec<T>* s, T* out) {
  constexpr int w = Simd<T>::lanes;
#ifdef FINECF_HAVE_SHUFFLEVECTOR
  if constexpr (Count % w == 0) {
#pragma GCC unroll 16
    for (int k = 0; k < Count; k += w) store<T>(out + k, fold_all<T, 1>(s + k));
    return;
  }
#endif
  for (int k = 0; k < Count; ++k) out[k] = hsum<T>(s[k]);
}

// Coefficients of r^k in exp(r), and of s z^k, z = s^2, in 2 atanh(s).
template <class T>
struct Series {
  T exp[16], log[16];
  constexpr Series() : exp(), log() {
    double factorial = 1;
    for (int k = 0; k < 16; ++k) {
      exp[k] = T(1.0 / factorial);
      log[k] = T(2.0 / (2 * k + 1));
      factorial *= k + 1;
    }
  }
};
template <class T>
constexpr Series<T> kSeries{};

// exp(x) for any x but NaN: exactly 0 below exp_min, inf from exp_max on; about 1 ulp (float), 2 ulp (double) between.
// x = n ln2 + r, exp(x) = 2^n * Taylor(r); 2^n in two factors, so that n = 128 (1024) overflows only when it should.
template <class T>
FINECF_INLINE Vec<T> vexp(Vec<T> x) {
  using S = Simd<T>;
  const Vec<T> lo = splat<T>(S::exp_min), hi = splat<T>(S::exp_max);
  const Vec<T> c = vmin<T>(vmax<T>(x, lo), hi);
  const Vec<T> t = c * T(1.4426950408889634074) + S::round_magic;
  const Vec<T> n = t - S::round_magic;
  const Vec<T> r = (c - n * S::ln2_hi) - n * S::ln2_lo;
  Vec<T> p = splat<T>(kSeries<T>.exp[S::exp_degree]);
#pragma GCC unroll 16
  for (int k = S::exp_degree - 1; k >= 0; --k) p = p * r + kSeries<T>.exp[k];
  const IVec<T> i = bit_cast<IVec<T>>(t) - bit_cast<IVec<T>>(splat<T>(S::round_magic));
  const IVec<T> i1 = i >> 1;
  const IVec<T> i2 = i - i1;
  const Vec<T> s1 = bit_cast<Vec<T>>((i1 + S::bias) << S::mantissa_bits);
  const Vec<T> s2 = bit_cast<Vec<T>>((i2 + S::bias) << S::mantissa_bits);
  const Vec<T> y = p * s1 * s2;
  return x < lo ? Vec<T>{} : y;
}

// log(x) for normal x > 0 (subnormals and 0 are taken as the smallest normal). x = 2^e m, m in [sqrt(1/2), sqrt(2)),
// log(m) = 2 atanh(s) with s = (m - 1) / (m + 1).
template <class T>
FINECF_INLINE Vec<T> vlog(Vec<T> x) {
  using S = Simd<T>;
  using I = typename S::scalar_int;
  const Vec<T> c = vmax<T>(x, splat<T>(S::tiny));
  const IVec<T> bits = bit_cast<IVec<T>>(c);
  IVec<T> e = (bits >> S::mantissa_bits) - S::bias;
  Vec<T> m = bit_cast<Vec<T>>((bits & S::mantissa_mask) | (I(S::bias) << S::mantissa_bits));
  const auto above = m > T(1.41421356237309504880);
  m = above ? m * T(0.5) : m;
  e -= above;  // a true lane is -1
  const Vec<T> s = (m - T(1)) / (m + T(1));
  const Vec<T> z = s * s;
  Vec<T> p = splat<T>(kSeries<T>.log[S::log_terms]);
#pragma GCC unroll 16
  for (int k = S::log_terms - 1; k >= 0; --k) p = p * z + kSeries<T>.log[k];
  // e as a float through the rounding constant: no 64-bit integer conversion instruction is needed.
  const Vec<T> ef = bit_cast<Vec<T>>(e + bit_cast<IVec<T>>(splat<T>(S::round_magic))) - S::round_magic;
  return ef * S::ln2_hi + (s * p + ef * S::ln2_lo);
}

// At most log(x), and within 0.06 of it (float), at a twentieth of the cost: log2(2^e (1 + m)) >= e + m, which is what
// the bits say when they are read as a number. The 3e-5 covers their rounding.
template <class T>
FINECF_INLINE Vec<T> log_below(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    constexpr double ln2 = 0.69314718055994530942;
    return __builtin_convertvector(bit_cast<IVec<T>>(x), Vec<T>) * T(ln2 * 0x1p-23) - T(127 * ln2 + 3e-5);
  } else {
    return vlog<T>(x);  // no conversion from 64-bit integers below AVX-512
  }
}

#ifdef FINECF_HAVE_SHUFFLEVECTOR
// One butterfly of a transpose: swaps the blocks of D lanes that lie across the diagonal in rows i and i + D.
template <class T, int D, int... L>
FINECF_INLINE void cross(Vec<T>& x, Vec<T>& y, std::integer_sequence<int, L...>) {
  constexpr int w = Simd<T>::lanes;
  const Vec<T> upper = __builtin_shufflevector(x, y, (L & D ? w + L - D : L)...);
  y = __builtin_shufflevector(x, y, (L & D ? w + L : L + D)...);
  x = upper;
}

template <class T, int D = Simd<T>::lanes / 2>
FINECF_INLINE void transpose(Vec<T>* rows) {
  constexpr int w = Simd<T>::lanes;
#pragma GCC unroll 16
  for (int i = 0; i < w; ++i)
    if (!(i & D)) cross<T, D>(rows[i], rows[i + D], std::make_integer_sequence<int, w>{});
  if constexpr (D > 1) transpose<T, D / 2>(rows);
}
#endif

FINECF_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace FINECF_ISA_NS
}  // namespace finecf
