// CUDA kernels of the `replacement` operators, free of torch: nvcc compiles them for the device, g++ for the host
// emulator. The contract and the algebra are in replacement.h. The drivers at the end say which kernels run, in which
// order and with which grid.
//
// Versions:
//   nearest_candidates   naive: a thread per cosine, a thread per query picks one neighbour after the other.
//                        fast: cosines as float32 tile products in chunks of the bank, a radix select per query and
//                        chunk.
//   the search           naive: a thread per pair, scored directly in float64.
//                        fast: one float32 tile product an edit rules pairs out, the few left are scored directly by a
//                        warp each.
#pragma once

#include <utility>

#include "../simt/platform.cuh"
#include "../simt/reduce.cuh"
#include "../simt/tile.cuh"
#include "replacement.h"

namespace finecf {

// ---- nearest_candidates
// ----------------------------------------------------------------------------------------------------------

// A cosine and its row as one number: larger is better, and of equal cosines the lowest row. Never 0, which means
// "none".
using Key = unsigned long long;

FINECF_DEVICE Key make_key(float cosine, int64_t row) {
  const unsigned bits = __float_as_uint(cosine + 0.0f);  // -0 becomes 0: equal cosines must have equal bits
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return Key{ordered} << 32 | (0xffffffffu - static_cast<unsigned>(row));
}
FINECF_DEVICE float key_cosine(Key key) {
  const unsigned ordered = static_cast<unsigned>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
FINECF_DEVICE int64_t key_row(Key key) { return 0xffffffffu - static_cast<unsigned>(key); }

// Neighbours that one selection finds. More take several rounds.
constexpr int kMostSelected = 2048;
constexpr int kSelectThreads = 256;

// Rounding may take the cosine of a row with itself past 1.
FINECF_DEVICE float unit_range(float cosine) { return fminf(1.0f, fmaxf(-1.0f, cosine)); }

// A warp per row: 1 / |row|, and 0 for a zero row, whose cosines are 0.
template <typename T>
__global__ void __launch_bounds__(256) inverse_norms(const T* __restrict__ rows,  // [R, D]
                                                     int64_t count, int64_t width,
                                                     float* __restrict__ inverse) {  // [R]
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = int64_t{gridDim.x} * blockDim.x / kWarp;
  for (int64_t r = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; r < count; r += warps) {
    float sum = 0.0f;
    for (int64_t d = lane; d < width; d += kWarp) {
      const float x = to_float(rows[r * width + d]);
      sum = fmaf(x, x, sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) inverse[r] = sum > 0.0f ? 1.0f / sqrtf(sum) : 0.0f;
  }
}

// A thread per (query, row of the chunk).
template <typename T>
__global__ void __launch_bounds__(128)
    cosines_naive(const T* __restrict__ query,            // [P, D]
                  const T* __restrict__ bank,             // [N, D]
                  const float* __restrict__ query_scale,  // [P]
                  const float* __restrict__ bank_scale,   // [N]
                  int64_t queries, int64_t first, int64_t rows, int64_t width,
                  float* __restrict__ cosines) {  // [P, rows], rows [first, first + rows) of the bank
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < queries * rows; i += step) {
    const int64_t q = i / rows, n = first + i % rows;
    float dot = 0.0f;
    for (int64_t d = 0; d < width; ++d) dot = fmaf(to_float(query[q * width + d]), to_float(bank[n * width + d]), dot);
    cosines[i] = unit_range(dot * query_scale[q] * bank_scale[n]);
  }
}

// A block per tile of 32 queries x 64 rows; see tile.cuh. Blocks that follow each other share the rows of the bank,
// which are the larger operand, through the L2 cache.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks)
    cosine_tiles(const T* __restrict__ query,            // [P, D]
                 const T* __restrict__ bank,             // [N, D]
                 const float* __restrict__ query_scale,  // [P]
                 const float* __restrict__ bank_scale,   // [N]
                 int64_t queries, int64_t first, int64_t rows, int width,
                 float* __restrict__ cosines) {  // [P, rows], rows [first, first + rows) of the bank
  FINECF_STATIC_SHARED(float, slab, kTileFloats);
  const int64_t query_tiles = ceil_div(queries, kTileRows), units = query_tiles * ceil_div(rows, kTileColumns);
  for (int64_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const int64_t first_query = unit % query_tiles * kTileRows, first_row = unit / query_tiles * kTileColumns;
    const T* const my_bank = bank + (first + first_row) * width;
    const auto load_query = [&](int row, int d) {
      return first_query + row < queries && d < width ? to_float(query[(first_query + row) * width + d]) : 0.0f;
    };
    const auto load_bank = [&](int column, int d) {
      return first_row + column < rows && d < width ? to_float(my_bank[int64_t{column} * width + d]) : 0.0f;
    };
    float dots[kPerThread][kPerThread] = {};
    tile_product<true, true>(slab, width, load_query, load_bank, dots);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t q = first_query + tile_row() + i;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) {
        const int64_t n = first_row + tile_column() + j;
        if (q < queries && n < rows)
          cosines[q * rows + n] = unit_range(dots[i][j] * query_scale[q] * bank_scale[first + n]);
      }
    }
  }
}

// A thread per query: k times the largest key below the last. Same interface as select_keys, of which it is the plain
// form.
static __global__ void __launch_bounds__(32) select_keys_naive(const float* __restrict__ cosines,  // [P, rows]
                                                               int64_t queries, int64_t first, int64_t rows,
                                                               int64_t known, int64_t wanted, int64_t offset, int64_t k,
                                                               const Key* __restrict__ old_keys,  // [P, k]
                                                               Key* __restrict__ new_keys) {      // [P, k]
  for (int64_t q = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; q < queries; q += int64_t{gridDim.x} * blockDim.x) {
    Key below = offset > 0 ? old_keys[q * k + offset - 1] : ~Key{0};
    for (int64_t i = 0; i < offset; ++i) new_keys[q * k + i] = old_keys[q * k + i];
    for (int64_t i = 0; i < wanted; ++i) {
      Key best = 0;
      for (int64_t n = 0; n < rows + known; ++n) {
        const Key key = n < rows ? make_key(cosines[q * rows + n], first + n) : old_keys[q * k + n - rows];
        if (key < below && key > best) best = key;
      }
      new_keys[q * k + offset + i] = below = best;
    }
  }
}

// A block per query: finds the `wanted` largest keys among the cosines of a chunk and the first `known` of old_keys,
// and writes them sorted behind `offset` keys that earlier rounds found (only keys below the last of those count; known
// is 0 then). First a radix select from the top byte down finds the smallest key wanted: keys are distinct, so exactly
// `wanted` reach it. Then these are gathered, in no particular order, and sorted (bitonic) in shared memory. The order
// of the integer atomics does not show.
static __global__ void __launch_bounds__(kSelectThreads, 1)
    select_keys(const float* __restrict__ cosines,  // [P, rows]
                int64_t queries, int64_t first, int64_t rows, int64_t known, int64_t wanted, int64_t offset, int64_t k,
                const Key* __restrict__ old_keys,  // [P, k]
                Key* __restrict__ new_keys) {      // [P, k]
  FINECF_DYNAMIC_SHARED(Key, list);                // the next power of two >= wanted
  FINECF_STATIC_SHARED(unsigned, count_from, kSelectThreads + 1);
  FINECF_STATIC_SHARED(unsigned, filled, 1);
  FINECF_STATIC_SHARED(Key, found, 2);  // the prefix so far, and how many of its keys are wanted
  const int me = static_cast<int>(threadIdx.x);
  int room = 1;
  while (room < wanted) room *= 2;
  for (int64_t q = blockIdx.x; q < queries; q += gridDim.x) {
    const Key below = offset > 0 ? old_keys[q * k + offset - 1] : ~Key{0};
    const auto key_at = [&](int64_t n) {
      return n < rows ? make_key(cosines[q * rows + n], first + n) : old_keys[q * k + n - rows];
    };
    Key prefix = 0, left = static_cast<Key>(wanted);
    for (int shift = 56; shift >= 0; shift -= 8) {
      count_from[me] = 0;
      if (me == 0) count_from[kSelectThreads] = 0;
      __syncthreads();
      const Key decided = shift == 56 ? 0 : ~Key{0} << (shift + 8);
      for (int64_t n = me; n < rows + known; n += kSelectThreads) {
        const Key key = key_at(n);
        if (key < below && (key & decided) == prefix) atomicAdd(&count_from[(key >> shift) & 0xff], 1u);
      }
      __syncthreads();
      // count_from[digit] becomes the number of keys with this digit or a higher one.
      for (int reach = 1; reach < kSelectThreads; reach *= 2) {
        const unsigned more = me + reach < kSelectThreads ? count_from[me + reach] : 0u;
        __syncthreads();
        count_from[me] += more;
        __syncthreads();
      }
      // Exactly one digit has fewer than `left` keys above it and at least `left` from it on.
      if (count_from[me + 1] < left && count_from[me] >= left) {
        found[0] = prefix | static_cast<Key>(me) << shift;
        found[1] = left - count_from[me + 1];
      }
      __syncthreads();
      prefix = found[0];
      left = found[1];
    }
    if (me == 0) *filled = 0;
    __syncthreads();
    for (int64_t n = me; n < rows + known; n += kSelectThreads) {
      const Key key = key_at(n);
      if (key < below && key >= prefix) list[atomicAdd(filled, 1u)] = key;
    }
    __syncthreads();
    for (int i = static_cast<int>(wanted) + me; i < room; i += kSelectThreads) list[i] = 0;
    for (int64_t i = me; i < offset; i += kSelectThreads) new_keys[q * k + i] = old_keys[q * k + i];
    for (int size = 2; size <= room; size *= 2) {
      for (int distance = size / 2; distance > 0; distance /= 2) {
        __syncthreads();
        for (int i = me; i < room; i += kSelectThreads) {
          const int other = i ^ distance;
          if (other <= i) continue;
          const bool falling = (i & size) == 0;
          if ((list[i] < list[other]) == falling) {
            const Key held = list[i];
            list[i] = list[other];
            list[other] = held;
          }
        }
      }
    }
    __syncthreads();
    for (int64_t i = me; i < wanted; i += kSelectThreads) new_keys[q * k + offset + i] = list[i];
    __syncthreads();
  }
}

// A thread per neighbour.
static __global__ void __launch_bounds__(256) unpack_keys(const Key* __restrict__ keys,  // [P, k]
                                                          int64_t count,
                                                          float* __restrict__ cosine,     // [P, k]
                                                          int64_t* __restrict__ index) {  // [P, k]
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    cosine[i] = key_cosine(keys[i]);
    index[i] = key_row(keys[i]);
  }
}

// ---- the search
// ------------------------------------------------------------------------------------------------------------------

constexpr int kScoreWarps = kTileThreads / kWarp;

// A shortlist may be empty (K = 0): then nothing is allowed.
constexpr int64_t kNoShortlist = -1;

// What stays the same through a search. Passed to kernels by value.
template <typename T>
struct SearchInput {
  const T* cell_logits;            // [B, P, C]
  const T* candidate_logits;       // [N, C]
  const T* similarity;             // [B, P, N]
  const int64_t* target;           // [B]
  const int64_t* candidate_range;  // [B, 2]
  const int64_t* shortlist;        // [B, P, K]
  int64_t images, candidates;
  int64_t listed;  // K, or kNoShortlist
  int cells, classes;
  double weight_sim, weight_cls;
};

// What an edit changes. `done` is null in best_replacement; a block of a finished image returns at once.
struct SearchState {
  const float* logits;  // [B, C], rows logits_stride apart: the logits now
  int64_t logits_stride;
  int* active;                // [B, P]: the cells that may be edited now, the first active_count of a row
  int* active_count;          // [B]
  float* factors;             // [B, P, C]: A of active cell i in row i
  double* lift;               // [B, P]: m_p - (l_t - L_pt) of active cell i
  float* peak;                // [N]: n_n, for rows in the range of some image
  const unsigned char* used;  // [B, N] or null
  const int* done;            // [B] or null
  Found* found;               // [B, blocks_per_image]: each block's best pair
  int blocks_per_image;
};

// The loss of a pair by direct log-sum-exp over the classes c0, c0 + stride, ...; in float64, so that what the
// factorised form could not tell apart is decided as exactly as the float32 inputs allow. `join_max` and `join_sum`
// combine the threads of a pair.
template <typename T, typename JoinMax, typename JoinSum>
FINECF_DEVICE double direct_loss(const SearchInput<T>& in, const float* logits, int64_t b, int64_t cell,
                                 int64_t candidate, int c0, int stride, JoinMax join_max, JoinSum join_sum) {
  const T* const from = in.cell_logits + (b * in.cells + cell) * in.classes;
  const T* const to = in.candidate_logits + candidate * in.classes;
  const auto logit = [&](int64_t c) {
    return (static_cast<double>(logits[c]) - static_cast<double>(to_float(from[c]))) +
           static_cast<double>(to_float(to[c]));
  };
  double peak = -HUGE_VAL, sum = 0.0;
  for (int c = c0; c < in.classes; c += stride) {
    const double x = logit(c);
    peak = x > peak ? x : peak;
  }
  peak = join_max(peak);
  for (int c = c0; c < in.classes; c += stride) sum += exp(logit(c) - peak);
  sum = join_sum(sum);
  const double unlikely = (peak - logit(in.target[b])) + log(sum);
  const double similarity = to_float(in.similarity[(b * in.cells + cell) * in.candidates + candidate]);
  return in.weight_sim * (1.0 - similarity) + in.weight_cls * unlikely;
}

// The same by a whole warp, lanes striding over the classes. Every lane gets the loss.
template <typename T>
FINECF_DEVICE double warp_direct_loss(const SearchInput<T>& in, const float* logits, int64_t b, int64_t cell,
                                      int64_t candidate, int lane) {
  return direct_loss(
      in, logits, b, cell, candidate, lane, kWarp, [](double x) { return warp_max(x); },
      [](double x) { return warp_sum(x); });
}

template <typename T>
FINECF_DEVICE bool may_use(const SearchInput<T>& in, const SearchState& state, int64_t b, int64_t candidate) {
  return candidate >= in.candidate_range[2 * b] && candidate < in.candidate_range[2 * b + 1] &&
         (state.used == nullptr || state.used[b * in.candidates + candidate] == 0);
}

// Joins the warps' bests and writes the block's. All threads call.
FINECF_DEVICE void write_block_best(Found best, Found* out) {
  FINECF_STATIC_SHARED(Found, of_warp, kScoreWarps);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  best = warp_first(best);
  if (lane == 0) of_warp[warp] = best;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kScoreWarps; ++w)
      if (precedes(of_warp[w], best)) best = of_warp[w];
    *out = best;
  }
}

// A warp per row of image b's range: n_n = max_c K_nc. A row in the range of several images is the first one's.
template <typename T>
__global__ void __launch_bounds__(256)
    find_peaks(SearchInput<T> in, int blocks_per_image, float* __restrict__ peak) {  // [N]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t b = blockIdx.x / blocks_per_image, block = blockIdx.x % blocks_per_image;
  for (int64_t n = in.candidate_range[2 * b] + block * warps + warp; n < in.candidate_range[2 * b + 1];
       n += int64_t{blocks_per_image} * warps) {
    bool taken = false;
    for (int64_t other = 0; other < b; ++other)
      taken = taken || (n >= in.candidate_range[2 * other] && n < in.candidate_range[2 * other + 1]);
    if (taken) continue;
    float largest = -FLT_MAX;
    for (int c = lane; c < in.classes; c += kWarp)
      largest = fmaxf(largest, to_float(in.candidate_logits[n * in.classes + c]));
    largest = warp_max(largest);
    if (lane == 0) peak[n] = largest;
  }
}

// Lists the first `most` cells of `order` (null: 0, 1, ...) that `open(cell)` admits. One warp, in order.
template <typename Open>
FINECF_DEVICE void list_cells(const int* order, int cells, int most, Open open, int* active, int* count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int listed = 0;
  for (int first = 0; first < cells && listed < most; first += kWarp) {
    const int i = first + lane;
    const int cell = i >= cells ? -1 : order == nullptr ? i : order[i];
    const bool admitted = cell >= 0 && open(cell);
    const unsigned ballot = __ballot_sync(kAllLanes, admitted);
    const int place = listed + __popc(ballot & ((1u << lane) - 1u));
    if (admitted && place < most) active[place] = cell;
    listed += __popc(ballot);
  }
  if (lane == 0) *count = listed < most ? listed : most;
}

// A warp per image: the allowed cells of best_replacement.
static __global__ void __launch_bounds__(kWarp) list_allowed(const unsigned char* __restrict__ allowed,  // [B, P]
                                                             int cells,
                                                             int* __restrict__ active,          // [B, P]
                                                             int* __restrict__ active_count) {  // [B]
  const int64_t b = blockIdx.x;
  list_cells(
      nullptr, cells, cells, [&](int cell) { return allowed[b * cells + cell] != 0; }, active + b * cells,
      active_count + b);
}

// A warp per (image, active cell): A_p = exp(l - L_p - m_p) and the lift m_p - (l_t - L_pt). The exponents are formed
// in float64 and rounded once: rounded at the size of the logits instead, they would be off by more than the guard at
// logits of some hundreds.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) prepare_cells(SearchInput<T> in, SearchState state) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = int64_t{gridDim.x} * kScoreWarps;
  for (int64_t i = int64_t{blockIdx.x} * kScoreWarps + threadIdx.x / kWarp; i < in.images * in.cells; i += warps) {
    const int64_t b = i / in.cells;
    if (i % in.cells >= state.active_count[b] || (state.done != nullptr && state.done[b] != 0)) continue;
    const float* const logits = state.logits + b * state.logits_stride;
    const T* const row = in.cell_logits + (b * in.cells + state.active[i]) * in.classes;
    const auto rest = [&](int64_t c) { return static_cast<double>(logits[c]) - static_cast<double>(to_float(row[c])); };
    double peak = -HUGE_VAL;
    for (int c = lane; c < in.classes; c += kWarp) {
      const double x = rest(c);
      peak = x > peak ? x : peak;
    }
    peak = warp_max(peak);
    for (int c = lane; c < in.classes; c += kWarp)
      state.factors[i * in.classes + c] = expf(static_cast<float>(rest(c) - peak));
    if (lane == 0) state.lift[i] = peak - rest(in.target[b]);
  }
}

// Blocks per image stride over tiles of 32 active cells x 64 candidates of the image's range. For each tile:
//   1. products A_p . B_n (tile.cuh), B formed from the candidate logits while they are staged: kept, it would take N x
//   C floats;
//   2. factorised losses into shared memory; +inf: not allowed, -inf: the product may have lost digits, decide
//   directly;
//   3. the smallest of them in the tile;
//   4. every pair within the guard of it scored directly, one warp a pair, warp w the pairs of its quarter of the tile.
// Measured against the tile's minimum the guard lets through more pairs than against the whole search's, never fewer,
// so nothing has to be carried from block to block, and no list can overflow.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 3) score_pairs(SearchInput<T> in, SearchState state) {
  constexpr int kPairs = kTileRows * kTileColumns;
  // Holds a slab of the product, then the losses of its tile.
  FINECF_STATIC_SHARED(float, slab, kPairs > kTileFloats ? kPairs : kTileFloats);
  FINECF_STATIC_SHARED(float, least_of_warp, kScoreWarps);
  const int64_t b = blockIdx.x / state.blocks_per_image;
  if (state.done != nullptr && state.done[b] != 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int rows = state.active_count[b], classes = in.classes;
  const int* const active = state.active + b * in.cells;
  const float* const factors = state.factors + b * in.cells * classes;
  const float* const logits = state.logits + b * state.logits_stride;
  const int64_t begin = in.candidate_range[2 * b], end = in.candidate_range[2 * b + 1], target = in.target[b];
  const int64_t row_tiles = ceil_div(rows, kTileRows),
                units = begin < end ? row_tiles * ceil_div(end - begin, kTileColumns) : 0;
  const float lost = static_cast<float>(classes * kUnderflowGuard);
  // Twice the worst rounding: C terms of the product, exponents up to 74 (beyond, the product is below `lost`), the
  // logarithm.
  const double slack = 0x1p-24 * (in.weight_cls * (2.0 * classes + 512.0) + 8.0 * in.weight_sim);
  Found best = none_found();
  for (int64_t unit = blockIdx.x % state.blocks_per_image; unit < units; unit += state.blocks_per_image) {
    const int first_row = static_cast<int>(unit % row_tiles) * kTileRows;
    const int64_t first = begin + unit / row_tiles * kTileColumns;
    const auto load_factor = [&](int row, int c) {
      return first_row + row < rows && c < classes ? factors[int64_t{first_row + row} * classes + c] : 0.0f;
    };
    const auto load_candidate = [&](int column, int c) {
      const int64_t n = first + column;
      return n < end && c < classes ? expf(to_float(in.candidate_logits[n * classes + c]) - state.peak[n]) : 0.0f;
    };
    float products[kPerThread][kPerThread] = {};
    tile_product<true, true>(slab, classes, load_factor, load_candidate, products);

    float least = INFINITY;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      const int64_t n = first + tile_column() + j;
      const bool usable = n < end && (state.used == nullptr || state.used[b * in.candidates + n] == 0);
      const double fall =
          usable ? static_cast<double>(state.peak[n]) - to_float(in.candidate_logits[n * classes + target]) : 0.0;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int row = first_row + tile_row() + i;
        float loss = INFINITY;
        if (usable && row < rows) {
          const double similarity = to_float(in.similarity[(b * in.cells + active[row]) * in.candidates + n]);
          const double unlikely = state.lift[b * in.cells + row] + fall + static_cast<double>(logf(products[i][j]));
          loss = products[i][j] < lost
                     ? -INFINITY
                     : static_cast<float>(in.weight_sim * (1.0 - similarity) + in.weight_cls * unlikely);
          if (loss > -INFINITY) least = fminf(least, loss);
        }
        slab[(tile_row() + i) * kTileColumns + tile_column() + j] = loss;
      }
    }
    least = warp_min(least);
    if (lane == 0) least_of_warp[warp] = least;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kScoreWarps; ++w) least = fminf(least, least_of_warp[w]);
    const double bar =
        static_cast<double>(least) + slack + kRescoreGuardFloat * fmax(1.0, fabs(static_cast<double>(least)));

    for (int from = warp * (kPairs / kScoreWarps); from < (warp + 1) * (kPairs / kScoreWarps); from += kWarp) {
      const float mine = slab[from + lane];
      unsigned near = __ballot_sync(kAllLanes, mine < INFINITY && static_cast<double>(mine) <= bar);
      while (near != 0) {
        const int pair = from + __ffs(near) - 1;
        near &= near - 1;
        Found one = none_found();
        one.cell = active[first_row + pair / kTileColumns];
        one.candidate = first + pair % kTileColumns;
        one.loss = warp_direct_loss(in, logits, b, one.cell, one.candidate, lane);
        if (precedes(one, best)) best = one;
      }
    }
    __syncthreads();  // the next tile overwrites the losses
  }
  write_block_best(best, state.found + blockIdx.x);
}

// A warp per shortlisted pair: few enough to be scored directly.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) score_shortlist(SearchInput<T> in, SearchState state) {
  const int64_t b = blockIdx.x / state.blocks_per_image;
  if (state.done != nullptr && state.done[b] != 0) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const float* const logits = state.logits + b * state.logits_stride;
  const int64_t pairs = state.active_count[b] * in.listed, stride = int64_t{state.blocks_per_image} * kScoreWarps;
  Found best = none_found();
  for (int64_t i = int64_t{blockIdx.x % state.blocks_per_image} * kScoreWarps + warp; i < pairs; i += stride) {
    Found one = none_found();
    one.cell = state.active[b * in.cells + i / in.listed];
    one.candidate = in.shortlist[(b * in.cells + one.cell) * in.listed + i % in.listed];
    if (!may_use(in, state, b, one.candidate)) continue;
    one.loss = warp_direct_loss(in, logits, b, one.cell, one.candidate, lane);
    if (precedes(one, best)) best = one;
  }
  write_block_best(best, state.found + blockIdx.x);
}

// A thread per (active cell, candidate), all of the classes of its pair.
template <typename T>
__global__ void __launch_bounds__(kTileThreads) score_pairs_naive(SearchInput<T> in, SearchState state) {
  const int64_t b = blockIdx.x / state.blocks_per_image;
  if (state.done != nullptr && state.done[b] != 0) return;
  const float* const logits = state.logits + b * state.logits_stride;
  const int64_t pairs = state.active_count[b] * in.candidates, stride = int64_t{state.blocks_per_image} * kTileThreads;
  const auto same = [](double x) { return x; };
  Found best = none_found();
  for (int64_t i = int64_t{blockIdx.x % state.blocks_per_image} * kTileThreads + threadIdx.x; i < pairs; i += stride) {
    Found one = none_found();
    one.cell = state.active[b * in.cells + i / in.candidates];
    one.candidate = i % in.candidates;
    bool listed = in.listed == kNoShortlist;
    for (int64_t s = 0; s < in.listed && !listed; ++s)
      listed = in.shortlist[(b * in.cells + one.cell) * in.listed + s] == one.candidate;
    if (!listed || !may_use(in, state, b, one.candidate)) continue;
    one.loss = direct_loss(in, logits, b, one.cell, one.candidate, 0, 1, same, same);
    if (precedes(one, best)) best = one;
  }
  write_block_best(best, state.found + blockIdx.x);
}

// The best of an image's blocks, by one warp; every lane gets it.
FINECF_DEVICE Found best_of_blocks(const SearchState& state, int64_t b) {
  Found best = none_found();
  for (int i = static_cast<int>(threadIdx.x) % kWarp; i < state.blocks_per_image; i += kWarp) {
    const Found other = state.found[b * state.blocks_per_image + i];
    if (precedes(other, best)) best = other;
  }
  return warp_first(best);
}

// A warp per image.
static __global__ void __launch_bounds__(kWarp) report_best(SearchState state,
                                                            int64_t* __restrict__ cell,       // [B]
                                                            int64_t* __restrict__ candidate,  // [B]
                                                            float* __restrict__ loss) {       // [B]
  const int64_t b = blockIdx.x;
  const Found best = best_of_blocks(state, b);
  if (threadIdx.x == 0) {
    cell[b] = best.candidate < 0 ? -1 : best.cell;
    candidate[b] = best.candidate;
    loss[b] = static_cast<float>(best.loss);
  }
}

// ---- replace_until_flip
// ----------------------------------------------------------------------------------------------------------

constexpr int kEditThreads = 256;

// A search's own memory and its outputs.
struct SearchResult {
  int* order;              // [B, P]: the cells, best score first
  unsigned char* edited;   // [B, P]
  unsigned char* used;     // [B, N] or null: candidates may be used again
  int* done;               // [B]
  int64_t* cells;          // [B, T]
  int64_t* candidates;     // [B, T]
  float* losses;           // [B, T]
  float* logits;           // [B, T + 1, C]
  int64_t* n_edits;        // [B]
  unsigned char* flipped;  // [B]
  int64_t max_edits;
  int top_cells;
};

// A thread per (image, cell): its rank by falling score, ties the lowest cell first.
static __global__ void __launch_bounds__(256) rank_cells(const float* __restrict__ cell_scores,  // [B, P]
                                                         int64_t images, int64_t cells,
                                                         int* __restrict__ order) {  // [B, P]
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < images * cells; i += step) {
    const int64_t b = i / cells, p = i % cells;
    const float mine = cell_scores[i];
    int rank = 0;
    for (int64_t q = 0; q < cells; ++q) {
      const float other = cell_scores[b * cells + q];
      rank += other > mine || (other == mine && q < p) ? 1 : 0;
    }
    order[b * cells + rank] = static_cast<int>(p);
  }
}

// Whether the largest of a row of logits (ties: lowest class) is the target. The whole block calls; every thread gets
// the answer.
FINECF_DEVICE bool is_top(const float* row, int classes, int64_t target) {
  FINECF_STATIC_SHARED(float, value_of_warp, kEditThreads / kWarp);
  FINECF_STATIC_SHARED(int, class_of_warp, kEditThreads / kWarp);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  float largest = -INFINITY;
  int best = 0x7fffffff;
  for (int c = static_cast<int>(threadIdx.x); c < classes; c += kEditThreads) {
    if (row[c] > largest) {
      largest = row[c];
      best = c;
    }
  }
  best = warp_argmax(largest, best);
  largest = warp_max(largest);
  if (lane == 0) {
    value_of_warp[warp] = largest;
    class_of_warp[warp] = best;
  }
  __syncthreads();
  for (int w = 0; w < kEditThreads / kWarp; ++w) {
    if (value_of_warp[w] > largest || (value_of_warp[w] == largest && class_of_warp[w] < best)) {
      largest = value_of_warp[w];
      best = class_of_warp[w];
    }
  }
  __syncthreads();  // the next call writes these
  return best == target;
}

// A block per image: the logits before any edit, empty outputs, and the cells open to the first edit.
template <typename T>
__global__ void __launch_bounds__(kEditThreads, 1)
    begin_search(SearchInput<T> in, SearchState state, SearchResult result,
                 const float* __restrict__ base_logits) {  // [B, C]
  const int64_t b = blockIdx.x;
  const int me = static_cast<int>(threadIdx.x);
  float* const row = result.logits + b * (result.max_edits + 1) * in.classes;
  for (int c = me; c < in.classes; c += kEditThreads) {
    double sum = base_logits[b * in.classes + c];
    for (int64_t p = 0; p < in.cells; ++p) sum += to_float(in.cell_logits[(b * in.cells + p) * in.classes + c]);
    row[c] = static_cast<float>(sum);
  }
  for (int64_t t = me; t < result.max_edits; t += kEditThreads) {
    result.cells[b * result.max_edits + t] = -1;
    result.candidates[b * result.max_edits + t] = -1;
    result.losses[b * result.max_edits + t] = INFINITY;
  }
  for (int p = me; p < in.cells; p += kEditThreads) result.edited[b * in.cells + p] = 0;
  if (result.used != nullptr)
    for (int64_t n = in.candidate_range[2 * b] + me; n < in.candidate_range[2 * b + 1]; n += kEditThreads)
      result.used[b * in.candidates + n] = 0;
  __syncthreads();  // the row is whole
  const bool top = is_top(row, in.classes, in.target[b]);
  if (me == 0) {
    result.n_edits[b] = 0;
    result.flipped[b] = top;
    result.done[b] = top;
  }
  if (me < kWarp)
    list_cells(
        result.order + b * in.cells, in.cells, result.top_cells, [](int) { return true; }, state.active + b * in.cells,
        state.active_count + b);
}

// A block per image: makes edit `t` from the blocks' bests, or repeats the logits when the search is over.
template <typename T>
__global__ void __launch_bounds__(kEditThreads, 1)
    apply_edit(SearchInput<T> in, SearchState state, SearchResult result, int64_t t) {
  FINECF_STATIC_SHARED(Found, chosen, 1);
  const int64_t b = blockIdx.x;
  const int me = static_cast<int>(threadIdx.x);
  const float* const before = result.logits + (b * (result.max_edits + 1) + t) * in.classes;
  float* const after = result.logits + (b * (result.max_edits + 1) + t + 1) * in.classes;
  const bool over = result.done[b] != 0;
  if (!over && me < kWarp) {
    const Found best = best_of_blocks(state, b);
    if (me == 0) *chosen = best;
  }
  __syncthreads();  // the choice is known, and every thread has read `done`
  if (over || chosen->candidate < 0) {
    for (int c = me; c < in.classes; c += kEditThreads) after[c] = before[c];
    if (me == 0) result.done[b] = 1;
    return;
  }
  const int cell = chosen->cell;
  const int64_t candidate = chosen->candidate;
  const T* const from = in.cell_logits + (b * in.cells + cell) * in.classes;
  const T* const to = in.candidate_logits + candidate * in.classes;
  for (int c = me; c < in.classes; c += kEditThreads) after[c] = (before[c] - to_float(from[c])) + to_float(to[c]);
  if (me == 0) {
    const int64_t at = b * result.max_edits + t;
    result.cells[at] = cell;
    result.candidates[at] = candidate;
    result.losses[at] = static_cast<float>(chosen->loss);
    result.n_edits[b] = t + 1;
    result.edited[b * in.cells + cell] = 1;
    if (result.used != nullptr) result.used[b * in.candidates + candidate] = 1;
  }
  __syncthreads();  // the row and `edited` are whole
  const bool top = is_top(after, in.classes, in.target[b]);
  if (me == 0 && top) {
    result.flipped[b] = 1;
    result.done[b] = 1;
  }
  if (me < kWarp)
    list_cells(
        result.order + b * in.cells, in.cells, result.top_cells,
        [&](int p) { return result.edited[b * in.cells + p] == 0; }, state.active + b * in.cells,
        state.active_count + b);
}

// ---- drivers
// ---------------------------------------------------------------------------------------------------------------------
// `Launcher` is CudaLauncher (common/cuda_launch.h) or simt::HostLauncher. Sizes are positive: empty input returns
// earlier.

template <typename T, typename Launcher>
void run_nearest_candidates(Launcher& launcher, Version version, const T* query, const T* bank, int64_t queries,
                            int64_t count, int64_t width, int64_t k, float* cosine, int64_t* index) {
  float* const query_scale = launcher.template scratch<float>(queries);
  float* const bank_scale = launcher.template scratch<float>(count);
  const auto norms = [&](const T* rows, int64_t number, float* scale) {
    launcher.run("inverse_norms", inverse_norms<T>, blocks_for(number, 256 / kWarp), 256, 0, rows, number, width,
                 scale);
  };
  norms(query, queries, query_scale);
  norms(bank, count, bank_scale);
  // Up to kMostSelected neighbours are carried from chunk to chunk; more are found in rounds over all cosines at once.
  const bool rounds = k > kMostSelected;
  const int64_t affordable =
      static_cast<int64_t>(launcher.scratch_budget() / sizeof(float)) / queries / kTileColumns * kTileColumns;
  const int64_t chunk = rounds || affordable > count ? count : affordable < kTileColumns ? kTileColumns : affordable;
  float* const cosines = launcher.template scratch<float>(queries * chunk);
  Key* old_keys = launcher.template scratch<Key>(queries * k);
  Key* new_keys = launcher.template scratch<Key>(queries * k);
  const auto select = [&](int64_t first, int64_t rows, int64_t known, int64_t wanted, int64_t offset) {
    if (version == Version::kNaive) {
      launcher.run("select_keys_naive", select_keys_naive, blocks_for(queries, 32), 32, 0, cosines, queries, first,
                   rows, known, wanted, offset, k, old_keys, new_keys);
    } else {
      size_t room = 1;
      while (static_cast<int64_t>(room) < wanted) room *= 2;
      launcher.run("select_keys", select_keys, blocks_for(queries, 1), kSelectThreads, room * sizeof(Key), cosines,
                   queries, first, rows, known, wanted, offset, k, old_keys, new_keys);
    }
    std::swap(old_keys, new_keys);
  };
  int64_t known = 0;
  for (int64_t first = 0; first < count; first += chunk) {
    const int64_t rows = chunk < count - first ? chunk : count - first;
    if (version == Version::kNaive) {
      launcher.run("cosines_naive", cosines_naive<T>, blocks_for(queries * rows, 128), 128, 0, query, bank, query_scale,
                   bank_scale, queries, first, rows, width, cosines);
    } else {
      launcher.run("cosine_tiles", cosine_tiles<T>,
                   blocks_for(ceil_div(queries, kTileRows) * ceil_div(rows, kTileColumns), 1), kTileThreads, 0, query,
                   bank, query_scale, bank_scale, queries, first, rows, width, cosines);
    }
    if (rounds) break;
    const int64_t wanted = known + rows < k ? known + rows : k;
    select(first, rows, known, wanted, 0);
    known = wanted;
  }
  for (int64_t offset = 0; rounds && offset < k; offset += kMostSelected)
    select(0, count, 0, k - offset < kMostSelected ? k - offset : kMostSelected, offset);
  launcher.run("unpack_keys", unpack_keys, blocks_for(queries * k, 256), 256, 0, old_keys, queries * k, cosine, index);
}

// Scratch of a search; `logits`, `used` and `done` are the caller's.
template <typename T, typename Launcher>
SearchState make_search_state(Launcher& launcher, Version version, const SearchInput<T>& in) {
  SearchState state{};
  const bool factorised = version == Version::kFast && in.listed == kNoShortlist;
  state.active = launcher.template scratch<int>(in.images * in.cells);
  state.active_count = launcher.template scratch<int>(in.images);
  if (factorised) {
    state.factors = launcher.template scratch<float>(in.images * in.cells * in.classes);
    state.lift = launcher.template scratch<double>(in.images * in.cells);
    state.peak = launcher.template scratch<float>(in.candidates);
  }
  // Enough blocks for every tile or a few per multiprocessor, whichever is less. The ranges are on the device: a class
  // may have far fewer tiles than the bank, and the blocks beyond find nothing to do.
  const int64_t work = factorised ? ceil_div(in.cells, kTileRows) * ceil_div(in.candidates, kTileColumns)
                       : version == Version::kFast ? ceil_div(in.cells * in.listed, kScoreWarps)
                                                   : ceil_div(in.cells * in.candidates, kTileThreads);
  const int64_t most = ceil_div(8 * launcher.multiprocessors(), in.images);
  state.blocks_per_image = static_cast<int>(work < 1 ? 1 : work < most ? work : most);
  state.found = launcher.template scratch<Found>(in.images * state.blocks_per_image);
  return state;
}

template <typename T, typename Launcher>
void run_peaks(Launcher& launcher, Version version, const SearchInput<T>& in, const SearchState& state) {
  if (version == Version::kNaive || in.listed != kNoShortlist) return;
  const int64_t most = ceil_div(8 * launcher.multiprocessors(), in.images), work = ceil_div(in.candidates, 256 / kWarp);
  const int blocks = static_cast<int>(work < 1 ? 1 : work < most ? work : most);
  launcher.run("find_peaks", find_peaks<T>, static_cast<unsigned>(in.images * blocks), 256, 0, in, blocks, state.peak);
}

// Finds each block's best pair for the logits of `state`.
template <typename T, typename Launcher>
void run_scores(Launcher& launcher, Version version, const SearchInput<T>& in, const SearchState& state) {
  const unsigned grid = static_cast<unsigned>(in.images * state.blocks_per_image);
  if (version == Version::kNaive) {
    launcher.run("score_pairs_naive", score_pairs_naive<T>, grid, kTileThreads, 0, in, state);
  } else if (in.listed != kNoShortlist) {
    launcher.run("score_shortlist", score_shortlist<T>, grid, kTileThreads, 0, in, state);
  } else {
    launcher.run("prepare_cells", prepare_cells<T>, blocks_for(in.images * in.cells, kScoreWarps), kTileThreads, 0, in,
                 state);
    launcher.run("score_pairs", score_pairs<T>, grid, kTileThreads, 0, in, state);
  }
}

template <typename T, typename Launcher>
void run_best_replacement(Launcher& launcher, Version version, const SearchInput<T>& in, const float* logits,
                          const unsigned char* allowed, const unsigned char* used, int64_t* cell, int64_t* candidate,
                          float* loss) {
  SearchState state = make_search_state(launcher, version, in);
  state.logits = logits;
  state.logits_stride = in.classes;
  state.used = used;
  launcher.run("list_allowed", list_allowed, static_cast<unsigned>(in.images), kWarp, 0, allowed, in.cells,
               state.active, state.active_count);
  run_peaks(launcher, version, in, state);
  run_scores(launcher, version, in, state);
  launcher.run("report_best", report_best, static_cast<unsigned>(in.images), kWarp, 0, state, cell, candidate, loss);
}

// The whole search is queued at once: what an image does after its last edit is decided on the device, by its `done`
// flag.
template <typename T, typename Launcher>
void run_replace_until_flip(Launcher& launcher, Version version, const SearchInput<T>& in, const float* base_logits,
                            const float* cell_scores, bool reuse_candidates, SearchResult result) {
  SearchState state = make_search_state(launcher, version, in);
  result.order = launcher.template scratch<int>(in.images * in.cells);
  result.edited = launcher.template scratch<unsigned char>(in.images * in.cells);
  result.done = launcher.template scratch<int>(in.images);
  result.used = reuse_candidates ? nullptr : launcher.template scratch<unsigned char>(in.images * in.candidates);
  state.used = result.used;
  state.done = result.done;
  state.logits_stride = (result.max_edits + 1) * in.classes;
  launcher.run("rank_cells", rank_cells, blocks_for(in.images * in.cells, 256), 256, 0, cell_scores, in.images,
               in.cells, result.order);
  run_peaks(launcher, version, in, state);
  launcher.run("begin_search", begin_search<T>, static_cast<unsigned>(in.images), kEditThreads, 0, in, state, result,
               base_logits);
  for (int64_t t = 0; t < result.max_edits; ++t) {
    state.logits = result.logits + t * in.classes;
    run_scores(launcher, version, in, state);
    launcher.run("apply_edit", apply_edit<T>, static_cast<unsigned>(in.images), kEditThreads, 0, in, state, result, t);
  }
}

}  // namespace finecf
