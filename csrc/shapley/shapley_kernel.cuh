// CUDA kernels of the `shapley` operators, free of torch: nvcc compiles them for the device, g++ for the host emulator.
// The contract is in shapley.h. The drivers at the end say which kernels run, in which order and with which grid; they
// are written against a launcher, so that the emulator runs the same sequence as the device.
//
// Versions:
//   masked_class_scores   naive: a thread per score walks all classes twice.
//                         fast: logits as float32 tile products, reduced to log-sum-exps in registers, never written.
//   permutation_shapley   naive: a thread per prefix sums its coalition anew.
//                         fast: a warp per walk, running logits in registers, eight sums reduced together.
#pragma once

#include <type_traits>

#include "../simt/platform.cuh"
#include "../simt/reduce.cuh"
#include "../simt/tile.cuh"
#include "shapley.h"

namespace finecf {

// ---- masked_class_scores
// ---------------------------------------------------------------------------------------------------------

// Classes that one block of the fast version covers. A constant, so that the order of the additions, and with it the
// bits, depends on C alone.
constexpr int kSplitClasses = 4 * kTileColumns;

// (target logit, log-sum-exp over the classes) -> value. `others` leaves the target out for log_odds only.
FINECF_DEVICE float finish_value(Value value, float wanted, const LogSum& others) {
  if (value == Value::kLogit) return wanted;
  if (value == Value::kProb) return expf(wanted - others.peak) / others.sum;
  return (wanted - others.peak) - logf(others.sum);
}

// A thread per (image, mask).
template <typename T>
__global__ void __launch_bounds__(128)
    masked_scores_naive(const T* __restrict__ cell_logits,      // [B, P, C]
                        const float* __restrict__ base_logits,  // [B, C]
                        const float* __restrict__ masks,        // [M, P]
                        const int64_t* __restrict__ target,     // [B]
                        Value value, int64_t images, int64_t count, int64_t cells, int64_t classes,
                        float* __restrict__ scores) {  // [B, M]
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < images * count; i += step) {
    const int64_t b = i / count, m = i % count;
    const auto logit = [&](int64_t c) {
      float sum = base_logits[b * classes + c];
      for (int64_t p = 0; p < cells; ++p)
        sum = fmaf(masks[m * cells + p], to_float(cell_logits[(b * cells + p) * classes + c]), sum);
      return sum;
    };
    const auto counts = [&](int64_t c) { return value != Value::kLogOdds || c != target[b]; };
    LogSum total = empty_log_sum();
    for (int64_t c = 0; c < classes; ++c)
      if (counts(c)) total.peak = fmaxf(total.peak, logit(c));
    for (int64_t c = 0; c < classes; ++c)
      if (counts(c)) total.sum += expf(logit(c) - total.peak);
    scores[i] = finish_value(value, logit(target[b]), total);
  }
}

// A block per (image, 32 masks, 256 classes); see tile.cuh for which thread owns which logits. Each thread folds its
// logits of four class tiles into one LogSum per row; the 16 threads of a row, half a warp, merge theirs at the end.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    masked_logit_sums(const T* __restrict__ cell_logits,      // [B, P, C]
                      const float* __restrict__ base_logits,  // [B, C]
                      const float* __restrict__ masks,        // [M, P]
                      const int64_t* __restrict__ target,     // [B]
                      Value value, int64_t images, int64_t count, int cells, int classes,
                      LogSum* __restrict__ sums,     // [B, splits, M]
                      float* __restrict__ wanted) {  // [B, M]
  FINECF_STATIC_SHARED(float, slab, kTileFloats);
  const int splits = static_cast<int>(ceil_div(classes, kSplitClasses));
  const int64_t row_tiles = ceil_div(count, kTileRows), units = images * row_tiles * splits;
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t b = unit / (row_tiles * splits), first_row = unit / splits % row_tiles * kTileRows;
    const int split = static_cast<int>(unit % splits), chosen = static_cast<int>(target[b]);
    const T* const cell_rows = cell_logits + b * cells * classes;
    const auto load_mask = [&](int row, int p) {
      return first_row + row < count && p < cells ? masks[(first_row + row) * cells + p] : 0.0f;
    };
    LogSum totals[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) totals[i] = empty_log_sum();
    const int split_end = (split + 1) * kSplitClasses, last_class = split_end < classes ? split_end : classes;
    for (int first = split * kSplitClasses; first < last_class; first += kTileColumns) {
      const auto load_cell = [&](int column, int p) {
        return first + column < classes && p < cells ? to_float(cell_rows[int64_t{p} * classes + first + column])
                                                     : 0.0f;
      };
      float logits[kPerThread][kPerThread];
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int c = first + tile_column() + j;
        const float base = c < classes ? base_logits[b * classes + c] : 0.0f;
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) logits[i][j] = base;
      }
      tile_product<true, false>(slab, cells, load_mask, load_cell, logits);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int64_t row = first_row + tile_row() + i;
        float peak = totals[i].peak;
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          const int c = first + tile_column() + j;
          if (c == chosen && row < count) wanted[b * count + row] = logits[i][j];
          if (c >= classes || (c == chosen && value == Value::kLogOdds)) logits[i][j] = -INFINITY;
          peak = fmaxf(peak, logits[i][j]);
        }
        float sum = totals[i].sum * expf(totals[i].peak - peak);
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sum += expf(logits[i][j] - peak);
        totals[i].peak = peak;
        totals[i].sum = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) totals[i] = merge(totals[i], shuffle_xor(totals[i], offset));
      const int64_t row = first_row + tile_row() + i;
      if (tile_column() == 0 && row < count) sums[(b * splits + split) * count + row] = totals[i];
    }
  }
}

// A thread per (image, mask): joins the class splits in order and forms the value.
static __global__ void __launch_bounds__(128) masked_finish(const LogSum* __restrict__ sums,   // [B, splits, M]
                                                            const float* __restrict__ wanted,  // [B, M]
                                                            Value value, int64_t images, int64_t count, int splits,
                                                            float* __restrict__ scores) {  // [B, M]
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < images * count; i += step) {
    const int64_t b = i / count, m = i % count;
    LogSum total = sums[b * splits * count + m];
    for (int s = 1; s < splits; ++s) total = merge(total, sums[(b * splits + s) * count + m]);
    scores[i] = finish_value(value, wanted[i], total);
  }
}

// ---- permutation_shapley_tiles
// ---------------------------------------------------------------------------------------------------

// Everything below is relative to the target: e_c = logit_c - logit_t, so that e_t = 0 and
//   prob = 1 / sum_c exp(e_c)   log_prob = -logsumexp_c e_c   log_odds = -logsumexp_{c != t} e_c
// The sum for prob holds exp(0) = 1, so it needs no shift: overflow to inf gives exactly 0. The log values do (inf -
// inf).

// Registers of a lane hold at most this many classes of a walk: 1024 classes a warp. More classes are cut into tiles of
// 1024, each walked by a warp of its own: no barrier, and more warps in flight than one block over all tiles would
// have.
constexpr int kMostPerLane = 32;
constexpr int kWalkTile = kMostPerLane * kWarp;
// Prefixes whose sums a warp reduces together.
constexpr int kStepsAtOnce = 8;
constexpr int kWalkWarps = 8;
// Staging a game in shared memory reads it once a block; below this many walks a block the reads through L1 cost less.
// An estimate, not a measurement.
constexpr int64_t kWalksWorthStaging = 4 * kWalkWarps;

template <bool kShifted>
struct PrefixSum {
  using Type = float;
};
template <>
struct PrefixSum<true> {
  using Type = LogSum;
};

// Differences beyond +-1e30 are equivalent (exp is 0 or inf), and clamped there no sum over cells becomes infinite.
FINECF_DEVICE float clamp_difference(float x) { return fminf(fmaxf(x, -1e30f), 1e30f); }

// A thread per (image, cell or base, class): E[b,p,c] = L[b,p,c] - L[b,p,t], row P the base. For log_odds the base of
// the target is -inf, which keeps that class out of every later sum.
template <typename T>
__global__ void __launch_bounds__(256)
    subtract_target(const T* __restrict__ cell_logits,      // [B, P, C]
                    const float* __restrict__ base_logits,  // [B, C]
                    const int64_t* __restrict__ target,     // [B]
                    bool leave_target_out, int64_t images, int64_t cells, int64_t classes,
                    float* __restrict__ excess) {  // [B, P + 1, C]
  const int64_t step = int64_t{gridDim.x} * blockDim.x, total = images * (cells + 1) * classes;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t c = i % classes, p = i / classes % (cells + 1), b = i / (classes * (cells + 1));
    const int64_t t = target[b];
    float difference;
    if (p < cells) {
      const T* const row = cell_logits + (b * cells + p) * classes;
      difference = to_float(row[c]) - to_float(row[t]);
    } else {
      const float* const row = base_logits + b * classes;
      difference = row[c] - row[t];
    }
    excess[i] = p == cells && c == t && leave_target_out ? -INFINITY : clamp_difference(difference);
  }
}

// The cell that joins at `step` of walk `walk`: a permutation, or, on odd walks of antithetic pairs, its reversal.
FINECF_DEVICE int64_t joining_cell(const int32_t* permutations, int64_t walk, int directions, int64_t step,
                                   int64_t cells) {
  const int64_t row = walk / directions;
  return permutations[row * cells + (walk % directions == 0 ? step : cells - 1 - step)];
}

// A thread per (image, walk, prefix): sums the prefix anew. Writes what walk_permutations writes, with one class tile.
template <bool kShifted>
__global__ void __launch_bounds__(128)
    walk_permutations_naive(const float* __restrict__ excess,          // [B, P + 1, C]
                            const int32_t* __restrict__ permutations,  // [M, P]
                            int64_t images, int64_t walks, int directions, int64_t cells, int64_t classes,
                            typename PrefixSum<kShifted>::Type* __restrict__ sums) {  // [B, walks, P + 1]
  const int64_t step = int64_t{gridDim.x} * blockDim.x, total = images * walks * (cells + 1);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t size = i % (cells + 1), walk = i / (cells + 1) % walks, b = i / ((cells + 1) * walks);
    const float* const game = excess + b * (cells + 1) * classes;
    const auto relative_logit = [&](int64_t c) {
      float sum = game[cells * classes + c];
      for (int64_t s = 0; s < size; ++s)
        sum += game[joining_cell(permutations, walk, directions, s, cells) * classes + c];
      return sum;
    };
    if constexpr (kShifted) {
      LogSum total_sum = empty_log_sum();
      for (int64_t c = 0; c < classes; ++c) total_sum.peak = fmaxf(total_sum.peak, relative_logit(c));
      for (int64_t c = 0; c < classes; ++c) total_sum.sum += expf(relative_logit(c) - total_sum.peak);
      sums[i] = total_sum;
    } else {
      float total_sum = 0.0f;
      for (int64_t c = 0; c < classes; ++c) total_sum += expf(relative_logit(c));
      sums[i] = total_sum;
    }
  }
}

// The running logits of one lane, folded into one prefix sum.
template <int kPerLane>
FINECF_DEVICE float fold(const float (&running)[kPerLane], float) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) sum += expf(running[j]);
  return sum;
}
template <int kPerLane>
FINECF_DEVICE LogSum fold(const float (&running)[kPerLane], LogSum) {
  LogSum out = empty_log_sum();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) out.peak = fmaxf(out.peak, running[j]);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) out.sum += expf(running[j] - out.peak);
  return out;
}

// A warp per (walk, class tile). Lane l keeps the running e of classes l, l + 32, ... of its tile in registers; masked
// lanes hold -inf and add exp(-inf) = 0. After every eight prefixes the warp reduces their eight sums together and
// lanes 0, 4, ... 28 write them side by side. Blocks stay on one image; with kStaged they first copy its game to shared
// memory (needs one class tile).
template <int kPerLane, bool kShifted, bool kStaged>
__global__ void __launch_bounds__(kWalkWarps* kWarp, 2)
    walk_permutations(const float* __restrict__ excess,          // [B, P + 1, C]
                      const int32_t* __restrict__ permutations,  // [M, P]
                      int64_t walks, int directions, int cells, int classes, int class_tiles, int blocks_per_image,
                      typename PrefixSum<kShifted>::Type* __restrict__ sums) {  // [B, walks, tiles, P + 1]
  using Sum = typename PrefixSum<kShifted>::Type;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t b = blockIdx.x / blocks_per_image, block = blockIdx.x % blocks_per_image;
  const float* game = excess + b * (cells + 1) * classes;
  if constexpr (kStaged) {
    FINECF_DYNAMIC_SHARED(float, staged);  // [P + 1, C]
    const int floats = (cells + 1) * classes;
    for (int i = static_cast<int>(threadIdx.x); i < floats; i += kWalkWarps * kWarp) staged[i] = game[i];
    __syncthreads();  // the game is staged
    game = staged;
  }
  const int64_t units = walks * class_tiles, stride = int64_t{blocks_per_image} * kWalkWarps;
  for (int64_t unit = block * kWalkWarps + warp; unit < units; unit += stride) {
    const int64_t walk = unit / class_tiles;
    const int first = static_cast<int>(unit % class_tiles) * kWalkTile + lane;
    const float* const base = game + int64_t{cells} * classes;
    const int32_t* const order = permutations + walk / directions * cells;
    const bool reversed = walk % directions != 0;
    Sum* const out = sums + (b * units + unit) * (cells + 1);
    float running[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) running[j] = first + j * kWarp < classes ? base[first + j * kWarp] : -INFINITY;
    for (int size = 0; size <= cells; size += kStepsAtOnce) {
      Sum prefix[kStepsAtOnce];
#pragma unroll
      for (int k = 0; k < kStepsAtOnce; ++k) {
        // The prefix of size 0 adds no cell, prefixes past the full coalition repeat it and are not written.
        const int step = size + k - 1;
        if (step >= 0 && step < cells) {
          const float* const row = game + int64_t{order[reversed ? cells - 1 - step : step]} * classes;
#pragma unroll
          for (int j = 0; j < kPerLane; ++j) running[j] += first + j * kWarp < classes ? row[first + j * kWarp] : 0.0f;
        }
        prefix[k] = fold(running, Sum{});
      }
      const Sum total = warp_merge_many<kStepsAtOnce>(prefix, lane);
      const int mine = size + lane / (kWarp / kStepsAtOnce);
      if (lane % (kWarp / kStepsAtOnce) == 0 && mine <= cells) out[mine] = total;
    }
  }
}

// The value of a prefix from its sums over the class tiles, joined in order. Float64, so that the differences below
// lose nothing more than the sums have lost.
template <bool kShifted>
FINECF_DEVICE double prefix_value(const typename PrefixSum<kShifted>::Type* sums, int class_tiles,
                                  int64_t tile_stride) {
  typename PrefixSum<kShifted>::Type total = sums[0];
  for (int t = 1; t < class_tiles; ++t) total = merge(total, sums[t * tile_stride]);
  if constexpr (kShifted) {
    return -(static_cast<double>(total.peak) + static_cast<double>(logf(total.sum)));
  } else {
    return 1.0 / static_cast<double>(total);
  }
}

// A thread per (image, walk, step): the marginal of the cell that joined there, written once to the cell's place.
template <bool kShifted>
__global__ void __launch_bounds__(256)
    take_marginals(const typename PrefixSum<kShifted>::Type* __restrict__ sums,  // [B, walks, tiles, P + 1]
                   const int32_t* __restrict__ permutations,                     // [M, P]
                   int64_t images, int64_t walks, int directions, int64_t cells, int class_tiles,
                   float* __restrict__ marginals) {  // [B, walks, P]
  const int64_t grid_step = int64_t{gridDim.x} * blockDim.x, total = images * walks * cells;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < total; i += grid_step) {
    const int64_t step = i % cells, bw = i / cells, walk = bw % walks;
    const auto* const row = sums + bw * class_tiles * (cells + 1) + step;
    const double before = prefix_value<kShifted>(row, class_tiles, cells + 1);
    const double after = prefix_value<kShifted>(row + 1, class_tiles, cells + 1);
    marginals[bw * cells + joining_cell(permutations, walk, directions, step, cells)] =
        static_cast<float>(after - before);
  }
}

// A thread per (image, tile of 32 samples, cell): mean and squared deviations in float64, samples in order, so that the
// bits depend on the tile's own permutations alone.
static __global__ void __launch_bounds__(128)
    reduce_marginals(const float* __restrict__ marginals,  // [B, walks, P], walks = samples * directions
                     int64_t images, int64_t samples, int directions, int64_t cells, int64_t first_tile,
                     int64_t all_tiles,
                     double* __restrict__ mean,  // [B, T, P]
                     double* __restrict__ m2) {  // [B, T, P]
  const int64_t grid_step = int64_t{gridDim.x} * blockDim.x, tiles = ceil_div(samples, kShapleyTile);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < images * tiles * cells; i += grid_step) {
    const int64_t p = i % cells, tile = i / cells % tiles, b = i / (cells * tiles);
    const int64_t first = tile * kShapleyTile, left = samples - first,
                  count = left < kShapleyTile ? left : kShapleyTile;
    const float* const column = marginals + (b * samples + first) * directions * cells + p;
    const auto sample = [&](int64_t s) {
      double sum = column[s * directions * cells];
      if (directions == 2) sum = 0.5 * (sum + column[(s * directions + 1) * cells]);
      return sum;
    };
    double sum = 0.0, squares = 0.0;
    for (int64_t s = 0; s < count; ++s) sum += sample(s);
    const double center = sum / static_cast<double>(count);
    for (int64_t s = 0; s < count; ++s) {
      const double deviation = sample(s) - center;
      squares += deviation * deviation;
    }
    const int64_t at = (b * all_tiles + first_tile + tile) * cells + p;
    mean[at] = center;
    m2[at] = squares;
  }
}

// A thread per (image, tile, cell). The logit is additive: every marginal of cell p is L[p, t].
template <typename T>
__global__ void __launch_bounds__(128) logit_marginals(const T* __restrict__ cell_logits,   // [B, P, C]
                                                       const int64_t* __restrict__ target,  // [B]
                                                       int64_t images, int64_t tiles, int64_t cells, int64_t classes,
                                                       double* __restrict__ mean,  // [B, T, P]
                                                       double* __restrict__ m2) {  // [B, T, P]
  const int64_t grid_step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < images * tiles * cells; i += grid_step) {
    const int64_t p = i % cells, b = i / (cells * tiles);
    mean[i] = to_float(cell_logits[(b * cells + p) * classes + target[b]]);
    m2[i] = 0.0;
  }
}

// ---- drivers
// ---------------------------------------------------------------------------------------------------------------------
// `Launcher` is CudaLauncher (common/cuda_launch.h) or simt::HostLauncher. Sizes are positive: empty input returns
// earlier.

template <typename T, typename Launcher>
void run_masked_class_scores(Launcher& launcher, Version version, const T* cell_logits, const float* base_logits,
                             const float* masks, const int64_t* target, Value value, int64_t images, int64_t count,
                             int64_t cells, int64_t classes, float* scores) {
  if (version == Version::kNaive) {
    launcher.run("masked_scores_naive", masked_scores_naive<T>, blocks_for(images * count, 128), 128, 0, cell_logits,
                 base_logits, masks, target, value, images, count, cells, classes, scores);
    return;
  }
  const int64_t splits = ceil_div(classes, kSplitClasses);
  LogSum* const sums = launcher.template scratch<LogSum>(images * splits * count);
  float* const wanted = launcher.template scratch<float>(images * count);
  launcher.run("masked_logit_sums", masked_logit_sums<T>, blocks_for(images * ceil_div(count, kTileRows) * splits, 1),
               kTileThreads, 0, cell_logits, base_logits, masks, target, value, images, count, cells, classes, sums,
               wanted);
  launcher.run("masked_finish", masked_finish, blocks_for(images * count, 128), 128, 0, sums, wanted, value, images,
               count, splits, scores);
}

template <int kPerLane, bool kShifted, typename Launcher>
void run_walks(Launcher& launcher, const float* excess, const int32_t* permutations, int64_t images, int64_t walks,
               int directions, int64_t cells, int64_t classes, typename PrefixSum<kShifted>::Type* sums) {
  const int64_t tiles = ceil_div(classes, kWalkTile), processors = launcher.multiprocessors();
  const size_t game_bytes = static_cast<size_t>((cells + 1) * classes) * sizeof(float);
  const int64_t blocks_wanted = ceil_div(walks * tiles, kWalkWarps), most = ceil_div(kMostBlocks, images);
  const bool staged =
      tiles == 1 && game_bytes <= launcher.shared_limit() && images * walks >= kWalksWorthStaging * processors;
  // Staged blocks fill a multiprocessor's shared memory: as many as there are, each with many walks.
  const int64_t per_image = staged ? ceil_div(processors, images) : most;
  const int64_t blocks = blocks_wanted < per_image ? blocks_wanted : per_image;
  const unsigned grid = static_cast<unsigned>(blocks * images);
  if (staged) {
    launcher.run("walk_permutations (staged)", walk_permutations<kPerLane, kShifted, true>, grid, kWalkWarps * kWarp,
                 game_bytes, excess, permutations, walks, directions, cells, classes, tiles, blocks, sums);
  } else {
    launcher.run("walk_permutations", walk_permutations<kPerLane, kShifted, false>, grid, kWalkWarps * kWarp, 0, excess,
                 permutations, walks, directions, cells, classes, tiles, blocks, sums);
  }
}

template <bool kShifted, typename Launcher>
void run_permutations(Launcher& launcher, Version version, const float* excess, const int32_t* permutations,
                      int64_t images, int64_t count, int directions, int64_t cells, int64_t classes, double* mean,
                      double* m2) {
  using Sum = typename PrefixSum<kShifted>::Type;
  const int64_t tiles = version == Version::kNaive ? 1 : ceil_div(classes, kWalkTile);
  // Whole tiles of permutations at a time, as many as the scratch budget holds; at least one.
  const int64_t bytes_a_sample =
      images * directions *
      ((cells + 1) * tiles * static_cast<int64_t>(sizeof(Sum)) + cells * static_cast<int64_t>(sizeof(float)));
  const int64_t affordable =
      static_cast<int64_t>(launcher.scratch_budget()) / bytes_a_sample / kShapleyTile * kShapleyTile;
  const int64_t chunk = affordable < kShapleyTile ? kShapleyTile : affordable < count ? affordable : count;
  Sum* const sums = launcher.template scratch<Sum>(images * chunk * directions * tiles * (cells + 1));
  float* const marginals = launcher.template scratch<float>(images * chunk * directions * cells);
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t samples = chunk < count - first ? chunk : count - first, walks = samples * directions;
    const int32_t* const orders = permutations + first * cells;
    const auto walk = [&](auto per_lane) {
      run_walks<decltype(per_lane)::value, kShifted>(launcher, excess, orders, images, walks, directions, cells,
                                                     classes, sums);
    };
    if (version == Version::kNaive) {
      launcher.run("walk_permutations_naive", walk_permutations_naive<kShifted>,
                   blocks_for(images * walks * (cells + 1), 128), 128, 0, excess, orders, images, walks, directions,
                   cells, classes, sums);
    } else if (classes <= 1 * kWarp) {
      walk(std::integral_constant<int, 1>{});
    } else if (classes <= 2 * kWarp) {
      walk(std::integral_constant<int, 2>{});
    } else if (classes <= 4 * kWarp) {
      walk(std::integral_constant<int, 4>{});
    } else if (classes <= 8 * kWarp) {
      walk(std::integral_constant<int, 8>{});
    } else if (classes <= 16 * kWarp) {
      walk(std::integral_constant<int, 16>{});
    } else {
      walk(std::integral_constant<int, kMostPerLane>{});
    }
    launcher.run("take_marginals", take_marginals<kShifted>, blocks_for(images * walks * cells, 256), 256, 0, sums,
                 orders, images, walks, directions, cells, tiles, marginals);
    launcher.run("reduce_marginals", reduce_marginals,
                 blocks_for(images * ceil_div(samples, kShapleyTile) * cells, 128), 128, 0, marginals, images, samples,
                 directions, cells, first / kShapleyTile, ceil_div(count, kShapleyTile), mean, m2);
  }
}

template <typename T, typename Launcher>
void run_permutation_shapley_tiles(Launcher& launcher, Version version, const T* cell_logits, const float* base_logits,
                                   const int32_t* permutations, const int64_t* target, Value value, bool antithetic,
                                   int64_t images, int64_t count, int64_t cells, int64_t classes, double* mean,
                                   double* m2) {
  if (value == Value::kLogit) {
    const int64_t tiles = ceil_div(count, kShapleyTile);
    launcher.run("logit_marginals", logit_marginals<T>, blocks_for(images * tiles * cells, 128), 128, 0, cell_logits,
                 target, images, tiles, cells, classes, mean, m2);
    return;
  }
  const int directions = antithetic ? 2 : 1;
  float* const excess = launcher.template scratch<float>(images * (cells + 1) * classes);
  launcher.run("subtract_target", subtract_target<T>, blocks_for(images * (cells + 1) * classes, 256), 256, 0,
               cell_logits, base_logits, target, value == Value::kLogOdds, images, cells, classes, excess);
  if (value == Value::kProb) {
    run_permutations<false>(launcher, version, excess, permutations, images, count, directions, cells, classes, mean,
                            m2);
  } else {
    run_permutations<true>(launcher, version, excess, permutations, images, count, directions, cells, classes, mean,
                           m2);
  }
}

}  // namespace finecf
