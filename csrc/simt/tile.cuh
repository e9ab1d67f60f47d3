// One tile of a float32 matrix product, the inner part of every kernel here that multiplies matrices.
//
// 128 threads own a 32 x 64 tile: thread (y, x) of 8 x 16 keeps rows 4y..4y+3 and columns 4x..4x+3 in registers, so
// that the 16 threads of a row are one half of a warp. The depth is walked in slabs of 16, staged in shared memory as
// a[k][row] and b[k][column]; the next slab travels from memory into registers while the present one is multiplied.
// Plain fused multiply-adds in order of depth: float32 all the way (no TF32), and the bits of an element do not depend
// on which tile it fell into.
#pragma once

#include "platform.cuh"

namespace finecf {

constexpr int kTileThreads = 128;
// Blocks that a multiprocessor should hold at once: caps the registers at 128 a thread.
constexpr int kTileBlocks = 4;
constexpr int kTileRows = 32;
constexpr int kTileColumns = 64;
constexpr int kTileDepth = 16;
constexpr int kPerThread = 4;
// Four floats of padding keep rows 16-byte aligned and make the transposing stores below free of bank conflicts.
constexpr int kTileRowStride = kTileRows + 4;
constexpr int kTileColumnStride = kTileColumns + 4;
constexpr int kTileFloats = kTileDepth * (kTileRowStride + kTileColumnStride);

FINECF_DEVICE int tile_row() { return static_cast<int>(threadIdx.x) / (kTileColumns / kPerThread) * kPerThread; }
FINECF_DEVICE int tile_column() { return static_cast<int>(threadIdx.x) % (kTileColumns / kPerThread) * kPerThread; }

// Where the i-th element that this thread stages lies in a slab of `kExtent` rows (or columns).
// kAlongDepth: memory is contiguous along the depth; 8 neighbours in depth x 4 rows a warp read whole 32-byte sectors,
// and their stores hit 32 different banks (8 steps of stride 4 mod 32, 4 consecutive words). Otherwise the rows are
// contiguous.
template <int kExtent, bool kAlongDepth>
FINECF_DEVICE void slab_position(int i, int& outer, int& depth) {
  const int me = static_cast<int>(threadIdx.x);
  if (kAlongDepth) {
    constexpr int kRowsAtOnce = kTileThreads / 8, kSteps = kExtent / kRowsAtOnce;
    outer = me / 8 + i % kSteps * kRowsAtOnce;
    depth = me % 8 + i / kSteps * 8;
  } else {
    constexpr int kDepthAtOnce = kTileThreads / kExtent;
    outer = me % kExtent;
    depth = me / kExtent + i * kDepthAtOnce;
  }
}

// sums[i][j] += sum_k a(row + i, k) * b(column + j, k), rows and columns local to the tile.
// load_a(row, k) and load_b(column, k) return 0 outside the matrix; they are called for every k of the last slab too.
// `slab` holds kTileFloats floats of shared memory, 16-byte aligned; all 128 threads call, and on return none reads it
// any more.
template <bool kADepth, bool kBDepth, typename LoadA, typename LoadB>
FINECF_DEVICE void tile_product(float* slab, int depth, LoadA load_a, LoadB load_b,
                                float (&sums)[kPerThread][kPerThread]) {
  constexpr int kLoadsA = kTileRows * kTileDepth / kTileThreads, kLoadsB = kTileColumns * kTileDepth / kTileThreads;
  float* const a = slab;
  float* const b = slab + kTileDepth * kTileRowStride;
  float next_a[kLoadsA], next_b[kLoadsB];
  const auto fetch = [&](int from) {
    int outer, k;
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i) {
      slab_position<kTileRows, kADepth>(i, outer, k);
      next_a[i] = load_a(outer, from + k);
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i) {
      slab_position<kTileColumns, kBDepth>(i, outer, k);
      next_b[i] = load_b(outer, from + k);
    }
  };
  fetch(0);
  for (int from = 0; from < depth; from += kTileDepth) {
    int outer, k;
#pragma unroll
    for (int i = 0; i < kLoadsA; ++i) {
      slab_position<kTileRows, kADepth>(i, outer, k);
      a[k * kTileRowStride + outer] = next_a[i];
    }
#pragma unroll
    for (int i = 0; i < kLoadsB; ++i) {
      slab_position<kTileColumns, kBDepth>(i, outer, k);
      b[k * kTileColumnStride + outer] = next_b[i];
    }
    __syncthreads();  // the slab is whole
    if (from + kTileDepth < depth) fetch(from + kTileDepth);
    const float* const my_a = a + tile_row();
    const float* const my_b = b + tile_column();
#pragma unroll 8
    for (int step = 0; step < kTileDepth; ++step) {
      const float4 left = *reinterpret_cast<const float4*>(my_a + step * kTileRowStride);
      const float4 right = *reinterpret_cast<const float4*>(my_b + step * kTileColumnStride);
      const float rows[kPerThread] = {left.x, left.y, left.z, left.w};
      const float columns[kPerThread] = {right.x, right.y, right.z, right.w};
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) sums[i][j] = fmaf(rows[i], columns[j], sums[i][j]);
    }
    __syncthreads();  // nobody reads the slab any more
  }
}

}  // namespace finecf
