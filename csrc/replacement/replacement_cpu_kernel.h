// CPU kernels of the `replacement` operators, compiled once per instruction set (see common/vec.h). Pointers only:
// shapes are checked, workspaces owned and winners picked by replacement_cpu.cpp.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_table.h"
#include "replacement.h"

namespace finecf {
namespace FINECF_ISA_NS {

// ---- nearest_candidates -------------------------------------------------------------------------------------------

// Both operands are contiguous along D, so a tile is a set of dot products: every accumulator is a vector over D, and
// its order of summation is the same wherever the pair falls.
#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotCols = 6;
#elif defined(__AVX2__)
constexpr int kDotRows = 3, kDotCols = 4;
#elif defined(__aarch64__)
constexpr int kDotRows = 4, kDotCols = 5;
#else
constexpr int kDotRows = 2, kDotCols = 4;
#endif

// out[i] = 1 / |row i|, 0 for a zero row. The norm is taken of the row over its largest entry, so that no square over-
// or underflows.
template <class T>
void inverse_norms(const T* rows, int64_t count, int64_t width, T* out) {
  constexpr int w = Simd<T>::lanes;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = rows + i * width;
    Vec<T> magnitude = {};
    int64_t d = 0;
    for (; d + w <= width; d += w) {
      const Vec<T> x = load<T>(row + d);
      magnitude = vmax<T>(magnitude, vmax<T>(x, -x));
    }
    T largest = hmax<T>(magnitude);
    for (; d < width; ++d) {
      const T x = row[d] < 0 ? -row[d] : row[d];
      largest = x > largest ? x : largest;
    }
    // Far from the ends of the range the plain sum of squares is safe, and quicker.
    const bool safe = largest < T(1e15) && largest > T(1e-15);
    const T shrink = safe ? T(1) : (largest > 0 ? T(1) / largest : T(0));
    Vec<T> s = {};
    for (d = 0; d + w <= width; d += w) {
      const Vec<T> x = load<T>(row + d) * shrink;
      s += x * x;
    }
    T sum = hsum<T>(s);
    for (; d < width; ++d) sum += row[d] * shrink * (row[d] * shrink);
    out[i] =
        sum > 0 ? shrink / (sizeof(T) == 4 ? T(__builtin_sqrtf(float(sum))) : T(__builtin_sqrt(double(sum)))) : T(0);
  }
}

// Entries of D that a block of bank rows and the queries are walked by, so that the block stays in the first-level
// cache.
constexpr int64_t kDotDepth = 512;

// Cosines of every query with `count` bank rows: out[q * out_stride + n].
// scratch [round_up(queries, kDotRows) * kDotCols * lanes]: the accumulators of a block between depths.
template <class T>
void cosine_block(const T* query, const T* query_scale, int64_t queries, const T* bank, int64_t count, int64_t width,
                  T* out, int64_t out_stride, T* scratch) {
  constexpr int w = Simd<T>::lanes;
  const int64_t whole = width / w * w;
  T bank_scale[kDotCols];
  for (int64_t n0 = 0; n0 < count; n0 += kDotCols) {
    const int cols = int(count - n0 < kDotCols ? count - n0 : kDotCols);
    const T* column[kDotCols];
    for (int j = 0; j < kDotCols; ++j) column[j] = bank + (n0 + (j < cols ? j : 0)) * width;
    for (int j = 0; j < cols; ++j) inverse_norms<T>(column[j], 1, width, bank_scale + j);
    // One pass at least, so that a width below one vector still clears the accumulators.
    for (int64_t d0 = 0; d0 == 0 || d0 < whole; d0 += kDotDepth) {
      const int64_t d1 = whole - d0 < kDotDepth ? whole : d0 + kDotDepth;
      for (int64_t q0 = 0; q0 < queries; q0 += kDotRows) {
        const T* row[kDotRows];
        for (int i = 0; i < kDotRows; ++i) row[i] = query + (q0 + i < queries ? q0 + i : q0) * width;
        T* kept = scratch + q0 * kDotCols * w;
        Vec<T> acc[kDotRows][kDotCols];
#pragma GCC unroll 8
        for (int i = 0; i < kDotRows; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kDotCols; ++j) acc[i][j] = d0 ? load<T>(kept + (i * kDotCols + j) * w) : Vec<T>{};
        for (int64_t d = d0; d < d1; d += w) {
          Vec<T> a[kDotRows];
#pragma GCC unroll 8
          for (int i = 0; i < kDotRows; ++i) a[i] = load<T>(row[i] + d);
#pragma GCC unroll 8
          for (int j = 0; j < kDotCols; ++j) {
            const Vec<T> b = load<T>(column[j] + d);
#pragma GCC unroll 8
            for (int i = 0; i < kDotRows; ++i) acc[i][j] += a[i] * b;
          }
        }
        // Constant bounds: an accumulator indexed by a run-time value would live in memory through the loop above.
#pragma GCC unroll 8
        for (int i = 0; i < kDotRows; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < kDotCols; ++j) store<T>(kept + (i * kDotCols + j) * w, acc[i][j]);
      }
    }
    for (int64_t q = 0; q < queries; ++q)
      for (int j = 0; j < cols; ++j) {
        T sum = hsum<T>(load<T>(scratch + (q * kDotCols + j) * w));
        for (int64_t d = whole; d < width; ++d) sum += query[q * width + d] * column[j][d];
        const T cosine = (sum * query_scale[q]) * bank_scale[j];
        out[q * out_stride + n0 + j] = cosine > T(1) ? T(1) : (cosine < T(-1) ? T(-1) : cosine);
      }
  }
}

// ---- the factorised scan ------------------------------------------------------------------------------------------

// exp(row - maximum) into scratch [round_up(classes, lanes)]; returns the maximum. `magnitude` grows to the largest
// |row|.
template <class T>
FINECF_INLINE T exp_row(const T* row, int64_t classes, T* scratch, T& magnitude) {
  constexpr int w = Simd<T>::lanes;
  const int64_t whole = classes / w * w;
  Vec<T> high = splat<T>(row[0]), low = high;
  for (int64_t c = 0; c < whole; c += w) {
    high = vmax<T>(high, load<T>(row + c));
    low = vmin<T>(low, load<T>(row + c));
  }
  T best = hmax<T>(high), least = hmin<T>(low);
  for (int64_t c = whole; c < classes; ++c) {
    best = row[c] > best ? row[c] : best;
    least = row[c] < least ? row[c] : least;
  }
  magnitude = best > magnitude ? best : magnitude;
  magnitude = -least > magnitude ? -least : magnitude;
  for (int64_t c = 0; c < whole; c += w) store<T>(scratch + c, vexp<T>(load<T>(row + c) - best));
  if (whole < classes) {
    T tail[w];
    for (int i = 0; i < w; ++i) tail[i] = whole + i < classes ? row[whole + i] - best : T(0);
    store<T>(scratch + whole, vexp<T>(load<T>(tail)));
  }
  return best;
}

// out[c * stride + i] = rows[i * row_stride + c] for `lanes` rows; their tails past `classes` may be read, up to a
// multiple of the lanes.
template <class T>
FINECF_INLINE void scatter_rows(const T* rows, int64_t row_stride, int64_t classes, T* out, int64_t stride) {
  constexpr int w = Simd<T>::lanes;
#ifdef FINECF_HAVE_SHUFFLEVECTOR
  for (int64_t c0 = 0; c0 < classes; c0 += w) {
    Vec<T> block[w];
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i) block[i] = load<T>(rows + i * row_stride + c0);
    transpose<T>(block);
    const int64_t present = classes - c0;
#pragma GCC unroll 16
    for (int i = 0; i < w; ++i)
      if (i < present) store<T>(out + (c0 + i) * stride, block[i]);
  }
#else
  for (int i = 0; i < w; ++i)
    for (int64_t c = 0; c < classes; ++c) out[c * stride + i] = rows[i * row_stride + c];
#endif
}

// panel [C, cols] = exp(rows - row maxima), transposed; columns past `count` are 1, so that no product is 0 there.
// scratch [lanes * round_up(classes, lanes)]. Returns the largest magnitude among the rows.
template <class T>
T pack_panel(const T* rows, int64_t count, int64_t classes, T* panel, T* row_max, T* scratch) {
  constexpr int cols = kTileCols<T>, w = Simd<T>::lanes;
  const int64_t width = round_up(classes, w);
  T magnitude = 0;
  for (int j0 = 0; j0 < cols; j0 += w) {
    for (int i = 0; i < w; ++i) {
      T* exps = scratch + i * width;
      if (j0 + i < count) {
        row_max[j0 + i] = exp_row<T>(rows + (j0 + i) * classes, classes, exps, magnitude);
      } else {
        row_max[j0 + i] = T(0);
        for (int64_t c = 0; c < width; ++c) exps[c] = T(1);
      }
    }
    scatter_rows<T>(scratch, width, classes, panel + j0, cols);
  }
  return magnitude;
}

// factors: for each block of rows, [C, rows of the block] = exp(l - L_p - row maximum).
// scratch [2 * round_up(classes, lanes)]. Returns the largest |l - L_p|.
template <class T>
T pack_factors(const T* logits, const T* cell_logits, const int64_t* cells, int64_t rows, int64_t classes, T* factors,
               T* row_max, T* scratch) {
  const int64_t height = block_height(rows);
  T magnitude = 0;
  T* difference = scratch;
  T* exps = scratch + round_up(classes, Simd<T>::lanes);
  for (int64_t r0 = 0; r0 < rows; r0 += height) {
    const int64_t block = rows - r0 < height ? rows - r0 : height;
    T* out = factors + r0 * classes;
    for (int64_t i = 0; i < block; ++i) {
      const T* row = cell_logits + cells[r0 + i] * classes;
      for (int64_t c = 0; c < classes; ++c) difference[c] = logits[c] - row[c];
      row_max[r0 + i] = exp_row<T>(difference, classes, exps, magnitude);
      for (int64_t c = 0; c < classes; ++c) out[c * block + i] = exps[c];
    }
  }
  return magnitude;
}

// One panel of candidates against all rows. Keeps every pair whose factorised loss is within the guard of the smallest
// seen by this thread (`best`, which only falls), and every pair whose product is too small to be trusted.
template <class T>
void scan_panel(const ScanArgs<T>& a, const T* panel, int64_t panel_index, double* best, PairList* pairs) {
  constexpr int w = Simd<T>::lanes, cols = kTileCols<T>;
  const int64_t n0 = a.first + panel_index * cols;
  const int64_t present = a.candidates - n0 < cols ? a.candidates - n0 : cols;
  const T* column_bias = a.column_bias + panel_index * cols;
  const T limit = T(double(a.classes) * kUnderflowGuard);
  const int64_t height = block_height(a.rows);
  for (int64_t r0 = 0; r0 < a.rows; r0 += height) {
    const int rows = int(a.rows - r0 < height ? a.rows - r0 : height);
    with_rows(rows, [&](auto n) {
      constexpr int MR = decltype(n)::value;
      Vec<T> acc[MR][kTileVecs];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) acc[i][v] = Vec<T>{};
      tile_product<T, MR>(a.factors + r0 * a.classes, MR, panel, cols, a.classes, acc);
      // The losses from a logarithm that is at most 0.06 too low: nearly every tile is ruled out by these.
      const auto losses = [&](int i, int v, const T* similarity, Vec<T> log) FINECF_ALWAYS_INLINE {
        return a.row_bias[r0 + i] - a.weight_sim * load<T>(similarity + v * w) +
               (a.weight_cls * log + load<T>(column_bias + v * w));
      };
      T padded[MR * cols];
      const T* similarity[MR];
      Vec<T> smallest = splat<T>(Simd<T>::infinity), product = smallest;
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        similarity[i] = a.similarity + a.cells[r0 + i] * a.candidates + n0;
        if (present < cols) {  // the row ends inside this panel
          for (int64_t j = 0; j < cols; ++j) padded[i * cols + j] = j < present ? similarity[i][j] : T(0);
          similarity[i] = padded + i * cols;
        }
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) {
          smallest = vmin<T>(smallest, losses(i, v, similarity[i], log_below<T>(acc[i][v])));
          product = vmin<T>(product, acc[i][v]);
        }
      }
      const bool doubtful = hmin<T>(product) < limit;
      const auto reach = [&](double b) {
        const double size = b < 0 ? -b : b;
        return b + a.guard_slack + a.guard_relative * (size > 1 ? size : 1);
      };
      if (!doubtful && !(double(hmin<T>(smallest)) <= reach(*best))) return;
      T loss[MR * cols];
      smallest = splat<T>(Simd<T>::infinity);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) {
          const Vec<T> x = losses(i, v, similarity[i], vlog<T>(acc[i][v]));
          store<T>(loss + i * cols + v * w, x);
          smallest = vmin<T>(smallest, x);
        }
      if (!doubtful && !(double(hmin<T>(smallest)) <= reach(*best))) return;
      if (pairs->capacity - pairs->size < MR * cols) pairs->grow(pairs, MR * cols, reach(*best));
      T value[MR * cols];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kTileVecs; ++v) store<T>(value + i * cols + v * w, acc[i][v]);
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < cols; ++j) {
          const T x = loss[i * cols + j];
          if (column_bias[j] == Simd<T>::infinity) continue;
          const bool keep = value[i * cols + j] < limit;
          if (!keep && !(double(x) <= reach(*best))) continue;
          if (!keep && double(x) < *best) *best = double(x);
          pairs->data[pairs->size++] = Pair{int32_t(r0 + i), int32_t(keep), n0 + j, double(x)};
        }
    });
  }
}

// The losses of pairs by direct log-sum-exp in float64, into Pair::loss. scratch [round_up(classes, lanes)].
template <class T>
void exact_losses(const ExactArgs<T>& a, const int64_t* cells, Pair* pairs, int64_t count, double* scratch) {
  constexpr int w = Simd<double>::lanes;
  const int64_t padded = round_up(a.classes, w);
  for (int64_t k = 0; k < count; ++k) {
    Pair& pair = pairs[k];
    const int64_t cell = cells[pair.row];
    double loss = 0;
    if (a.weight_sim != 0) loss += a.weight_sim * (1.0 - double(a.similarity[cell * a.candidates + pair.candidate]));
    if (a.weight_cls != 0) {
      const T* from = a.cell_logits + cell * a.classes;
      const T* to = a.candidate_logits + pair.candidate * a.classes;
      for (int64_t c = 0; c < a.classes; ++c) scratch[c] = double(a.logits[c]) - double(from[c]) + double(to[c]);
      for (int64_t c = a.classes; c < padded; ++c) scratch[c] = -Simd<double>::infinity;
      Vec<double> top = load<double>(scratch);
      for (int64_t c = w; c < padded; c += w) top = vmax<double>(top, load<double>(scratch + c));
      const double m = hmax<double>(top);
      Vec<double> s = {};
      for (int64_t c = 0; c < padded; c += w) s += vexp<double>(load<double>(scratch + c) - m);
      loss += a.weight_cls * (m + vlog<double>(splat<double>(hsum<double>(s)))[0] - scratch[a.target]);
    }
    pair.loss = loss;
  }
}

}  // namespace FINECF_ISA_NS
}  // namespace finecf
