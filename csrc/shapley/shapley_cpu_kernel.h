// CPU kernels of the `shapley` operators, compiled once per instruction set (see common/vec.h). Pointers only: shapes
// are checked and workspaces owned by shapley_cpu.cpp.
//
// Everything is written relative to the target: e_c = logits_c - logits_t, so that e_t = 0 and
//     prob = 1 / sum_c exp(e_c),   log_prob = -logsumexp_c e_c,   log_odds = -logsumexp_{c != t} e_c.
// The sum for `prob` holds the term exp(0) = 1, so it needs no max: overflow to inf gives exactly 0.
#pragma once

#include "../common/gemm.h"
#include "../common/kernel_table.h"
#include "shapley.h"

namespace finecf {
namespace FINECF_ISA_NS {

// Differences beyond this are equivalent (exp is 0 or inf) and keep every sum over cells finite.
constexpr double kClampDifference = 1e30;

template <class T>
FINECF_INLINE T clamp_difference(T x) {
  const T limit = T(kClampDifference);
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// relative [P + 1, width]: rows of cell_logits, then base_logits, each minus its target entry; padding columns are 0 in
// the cells and -1e30 in the base, so that they add exp(-inf) = 0 to every sum.
template <class T>
void shapley_relative(const T* cell_logits, const T* base_logits, int64_t cells, int64_t classes, int64_t target,
                      int64_t width, T* relative) {
  for (int64_t p = 0; p <= cells; ++p) {
    const T* row = p < cells ? cell_logits + p * classes : base_logits;
    T* out = relative + p * width;
    const T shift = row[target];
    for (int64_t c = 0; c < classes; ++c) out[c] = clamp_difference<T>(row[c] - shift);
    const T pad = p < cells ? T(0) : T(-kClampDifference);
    for (int64_t c = classes; c < width; ++c) out[c] = pad;
  }
}

// The value of one coalition from its relative logits e [width].
template <class T>
FINECF_INLINE T relative_value(const T* e, int64_t width, int64_t target, Value value) {
  constexpr int w = Simd<T>::lanes;
  if (value == Value::kProb) {
    Vec<T> s = {};
    for (int64_t c = 0; c < width; c += w) s += vexp<T>(load<T>(e + c));
    return T(1) / hsum<T>(s);
  }
  // Leaving the target out of the sum: its lane is set to -inf in a copy of its vector.
  const int64_t skip = value == Value::kLogOdds ? target / w * w : int64_t(-1);
  Vec<T> skipped = {};
  if (skip >= 0) {
    T lane[w];
    store<T>(lane, load<T>(e + skip));
    lane[target - skip] = -Simd<T>::infinity;
    skipped = load<T>(lane);
  }
  Vec<T> best = splat<T>(-Simd<T>::infinity);
  for (int64_t c = 0; c < width; c += w) best = vmax<T>(best, c == skip ? skipped : load<T>(e + c));
  const T m = hmax<T>(best);
  Vec<T> s = {};
  for (int64_t c = 0; c < width; c += w) s += vexp<T>((c == skip ? skipped : load<T>(e + c)) - m);
  return -(m + vlog<T>(splat<T>(hsum<T>(s)))[0]);
}

// Masks [begin, end) of one image: a register tile of masks by classes, then the value of each row.
template <class T>
void shapley_masked_scores(const MaskedScoresArgs<T>& a, int64_t begin, int64_t end, T* scratch) {
  constexpr int w = Simd<T>::lanes, cols = kTileCols<T>;
  if (a.value == Value::kLogit) {
    for (int64_t m = begin; m < end; ++m) {
      T sum = a.base_logits[a.target];
      for (int64_t p = 0; p < a.cells; ++p) sum += a.masks[m * a.cells + p] * a.cell_logits[p * a.classes + a.target];
      a.out[m] = sum;
    }
    return;
  }
  const T* base = a.relative + a.cells * a.width;
  T* packed = scratch;                   // [P, rows]
  T* e = scratch + a.cells * kTileRows;  // [rows, width]
  for (int64_t m0 = begin; m0 < end; m0 += kTileRows) {
    const int rows = int(end - m0 < kTileRows ? end - m0 : kTileRows);
    for (int64_t p = 0; p < a.cells; ++p)
      for (int i = 0; i < rows; ++i) packed[p * rows + i] = a.masks[(m0 + i) * a.cells + p];
    with_rows(rows, [&](auto n) {
      constexpr int MR = decltype(n)::value;
      for (int64_t c = 0; c < a.width; c += cols) {
        Vec<T> acc[MR][kTileVecs];
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kTileVecs; ++v) acc[i][v] = load<T>(base + c + v * w);
        tile_product<T, MR>(packed, rows, a.relative + c, a.width, a.cells, acc);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kTileVecs; ++v) store<T>(e + i * a.width + c + v * w, acc[i][v]);
      }
    });
    for (int i = 0; i < rows; ++i) a.out[m0 + i] = relative_value<T>(e + i * a.width, a.width, a.target, a.value);
  }
}

// How many steps of a permutation may multiply instead of exponentiate. Within a run of `steps` cells the logits move
// by at most steps * max|E|; kept below this, a term that under- or overflows at the start of a run is, at its end,
// below e^-47 (float) or above e^47 times the target's, so that treating it as 0 or inf is exact to 1e-20.
template <class T>
constexpr double kRunDrift = sizeof(T) == 4 ? 40.0 : 300.0;
// A range of log-terms inside which no product over the whole permutation leaves the normal numbers. It must hold each
// cell's own factor too: a base far on the other side of 0 can keep every term in range while one factor leaves it.
template <class T>
constexpr double kSafeRange = sizeof(T) == 4 ? 85.0 : 700.0;
// Accumulators of a run: one per step, held in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRunSteps = 16;
#else
constexpr int kRunSteps = 8;
#endif

// Chooses the walk of `prob` for one image and fills what it needs:
// growth [P, width] = exp(relative cells), start [width] = exp(relative base).
// Returns the number of steps a run may have: -1 for "no refresh needed", else 0 (exponentiate every step) to
// kRunSteps.
template <class T>
int shapley_prepare_walk(const T* relative, int64_t cells, int64_t width, int64_t classes, T* growth, T* start) {
  constexpr int w = Simd<T>::lanes;
  const T* base = relative + cells * width;
  Vec<T> largest = {};
  bool safe = true;
  for (int64_t c = 0; c < width; c += w) {
    Vec<T> up = load<T>(base + c), down = up;
    for (int64_t p = 0; p < cells; ++p) {
      const Vec<T> e = load<T>(relative + p * width + c);
      const Vec<T> zero = {};
      up += vmax<T>(e, zero);
      down += vmin<T>(e, zero);
      largest = vmax<T>(largest, vmax<T>(e, -e));
    }
    for (int i = 0; i < w && c + i < classes; ++i) safe &= up[i] < T(kSafeRange<T>) && down[i] > T(-kSafeRange<T>);
  }
  const T most = hmax<T>(largest);
  safe &= most < T(kSafeRange<T>);
  int steps = kRunSteps;
  if (!safe && double(most) * kRunSteps > kRunDrift<T>) steps = int(kRunDrift<T> / double(most));
  if (!safe && steps < 2) return 0;
  for (int64_t i = 0; i < cells * width; i += w) store<T>(growth + i, vexp<T>(load<T>(relative + i)));
  for (int64_t c = 0; c < width; c += w) store<T>(start + c, vexp<T>(load<T>(base + c)));
  return safe ? -1 : steps;
}

// A run of `Steps` cells over all classes. Each vector of classes is carried through the run in registers:
//   x *= exp(E), sum of the step += x, and, where terms are refreshed (Refresh), e += E.
template <class T, bool Refresh, int Steps>
FINECF_INLINE void walk_run(const int32_t* order, int stride, const T* growth, const T* relative, int64_t width, T* x,
                            T* e, T* value) {
  constexpr int w = Simd<T>::lanes;
  Vec<T> s[Steps];
#pragma GCC unroll 16
  for (int k = 0; k < Steps; ++k) s[k] = Vec<T>{};
  const T* g_row[Steps];
  const T* e_row[Steps];
#pragma GCC unroll 16
  for (int k = 0; k < Steps; ++k) {
    g_row[k] = growth + order[k * stride] * width;
    e_row[k] = relative + order[k * stride] * width;
  }
  for (int64_t c = 0; c < width; c += w) {
    Vec<T> ev = {}, xv;
    if (Refresh) {
      ev = load<T>(e + c);
      xv = vexp<T>(ev);
    } else {
      xv = load<T>(x + c);
    }
#pragma GCC unroll 16
    for (int k = 0; k < Steps; ++k) {
      xv *= load<T>(g_row[k] + c);
      if (Refresh) ev += load<T>(e_row[k] + c);
      s[k] += xv;
    }
    if (Refresh)
      store<T>(e + c, ev);
    else
      store<T>(x + c, xv);
  }
  hsum_many<T, Steps>(s, value);
  for (int k = 0; k < Steps; ++k) value[k] = T(1) / value[k];
}

template <class T, bool Refresh>
FINECF_INLINE void walk_prob(const WalkArgs<T>& a, const int32_t* order, int stride, int run, T* state, T* marginal,
                             T weight) {
  constexpr int w = Simd<T>::lanes;
  const T* base = a.relative + a.cells * a.width;
  for (int64_t c = 0; c < a.width; c += w) store<T>(state + c, load<T>((Refresh ? base : a.start) + c));
  T value[kRunSteps];
  T before = a.empty_value;
  int64_t i = 0;
  while (i < a.cells) {
    const int32_t* cell = order + i * stride;
    int n = int(a.cells - i < run ? a.cells - i : run);
    if (n == kRunSteps) {
      walk_run<T, Refresh, kRunSteps>(cell, stride, a.growth, a.relative, a.width, state, state, value);
    } else if (n >= 4) {
      n = 4;
      walk_run<T, Refresh, 4>(cell, stride, a.growth, a.relative, a.width, state, state, value);
    } else {
      n = 1;
      walk_run<T, Refresh, 1>(cell, stride, a.growth, a.relative, a.width, state, state, value);
    }
    for (int k = 0; k < n; ++k) {
      marginal[cell[k * stride]] += weight * (value[k] - before);
      before = value[k];
    }
    i += n;
  }
}

// One step at a time from the running log-terms: for the log values, and for `prob` at extreme logits.
template <class T>
FINECF_INLINE void walk_direct(const WalkArgs<T>& a, const int32_t* order, int stride, T* e, T* marginal, T weight) {
  constexpr int w = Simd<T>::lanes;
  const T* base = a.relative + a.cells * a.width;
  for (int64_t c = 0; c < a.width; c += w) store<T>(e + c, load<T>(base + c));
  T before = a.empty_value;
  for (int64_t i = 0; i < a.cells; ++i) {
    const int32_t cell = order[i * stride];
    const T* row = a.relative + cell * a.width;
    for (int64_t c = 0; c < a.width; c += w) store<T>(e + c, load<T>(e + c) + load<T>(row + c));
    const T now = relative_value<T>(e, a.width, a.target, a.value);
    marginal[cell] += weight * (now - before);
    before = now;
  }
}

// One tile of at most 32 permutations: samples [count, P], then their mean and squared deviations in float64.
template <class T>
void shapley_walk_tile(const WalkArgs<T>& a, int64_t begin, int64_t count, T* scratch, double* mean, double* m2) {
  T* state = scratch;              // [width]
  T* samples = scratch + a.width;  // [count, P]
  const T weight = a.antithetic ? T(0.5) : T(1);
  for (int64_t i = 0; i < count; ++i) {
    T* sample = samples + i * a.cells;
    for (int64_t p = 0; p < a.cells; ++p) sample[p] = T(0);
    for (int pass = 0; pass < (a.antithetic ? 2 : 1); ++pass) {
      const int stride = pass ? -1 : 1;
      const int32_t* order = a.permutations + (begin + i) * a.cells + (pass ? a.cells - 1 : 0);
      if (a.value == Value::kProb && a.run < 0)
        walk_prob<T, false>(a, order, stride, kRunSteps, state, sample, weight);
      else if (a.value == Value::kProb && a.run > 0)
        walk_prob<T, true>(a, order, stride, a.run, state, sample, weight);
      else
        walk_direct<T>(a, order, stride, state, sample, weight);
    }
  }
  for (int64_t p = 0; p < a.cells; ++p) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; ++i) sum += double(samples[i * a.cells + p]);
    const double m = sum / double(count);
    for (int64_t i = 0; i < count; ++i) {
      const double d = double(samples[i * a.cells + p]) - m;
      squares += d * d;
    }
    mean[p] = m;
    m2[p] = squares;
  }
}

template <class T>
T shapley_value_of(const T* relative_row, int64_t width, int64_t target, Value value) {
  return relative_value<T>(relative_row, width, target, value);
}

}  // namespace FINECF_ISA_NS
}  // namespace finecf
