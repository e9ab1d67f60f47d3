// The register tile of every small matrix product: MR rows by NV vectors of columns, accumulated over k in order.
// An element's sum does not depend on the tile it falls in, so results are the same bits for any cut of rows or
// columns.
#pragma once

#include "vec.h"

namespace finecf {
namespace FINECF_ISA_NS {

// Rows and vectors of a tile that fill the register file: 24 of 32 (AVX-512), 12 of 16 (AVX2), 8 of 16 (SSE2, which
// needs a temporary for every multiply-add), 16 of 32 (NEON).
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVecs = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVecs = 2;
#elif defined(__aarch64__)
constexpr int kTileRows = 8, kTileVecs = 2;
#else
constexpr int kTileRows = 4, kTileVecs = 2;
#endif

template <class T>
constexpr int kTileCols = kTileVecs * Simd<T>::lanes;

// acc[i][v] += sum_k a[k * lda + i] * b[k * ldb + v * lanes ...]
template <class T, int MR>
FINECF_INLINE void tile_product(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t k_count,
                                Vec<T> (&acc)[MR][kTileVecs]) {
  constexpr int w = Simd<T>::lanes;
  for (int64_t k = 0; k < k_count; ++k) {
    Vec<T> bv[kTileVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVecs; ++v) bv[v] = load<T>(b + k * ldb + v * w);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const Vec<T> av = splat<T>(a[k * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVecs; ++v) acc[i][v] += av * bv[v];
    }
  }
}

// Calls body(Rows<MR>{}) with the number of rows as a constant.
template <int N>
struct Rows {
  static constexpr int value = N;
};

template <class F>
FINECF_INLINE void with_rows(int rows, F&& body) {
  static_assert(kTileRows <= 8, "extend the switch");
  switch (rows) {
    case 1:
      body(Rows<1>{});
      break;
    case 2:
      body(Rows<2>{});
      break;
    case 3:
      body(Rows<3>{});
      break;
    case 4:
      body(Rows<4>{});
      break;
#if defined(__AVX2__) || defined(__aarch64__)
    case 5:
      body(Rows<5>{});
      break;
    case 6:
      body(Rows<6>{});
      break;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
    case 7:
      body(Rows<7>{});
      break;
    case 8:
      body(Rows<8>{});
      break;
#endif
    default:
      __builtin_unreachable();
  }
}

// Rows are cut into blocks of nearly equal height: 49 rows are 7 blocks of 7, not 6 of 8 and one of 1.
FINECF_INLINE int64_t block_height(int64_t rows) {
  const int64_t blocks = (rows + kTileRows - 1) / kTileRows;
  return blocks ? (rows + blocks - 1) / blocks : 1;
}

}  // namespace FINECF_ISA_NS
}  // namespace finecf
