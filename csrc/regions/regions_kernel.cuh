// CUDA kernels of the `regions` operators and the order of their launches. The contract is in regions.h.
//
// Memory-bound: a thread owns one pixel of one output and writes all its channels, so that the label is read once and
// the 32 lanes of a warp touch 32 neighbouring elements of each channel plane.
#pragma once

#include "../simt/platform.cuh"
#include "regions.h"

namespace finecf {

constexpr int kPixelThreads = 256;

// A pixel of an output: all channels, from the image where `kept`, else from the baseline.
template <typename T>
FINECF_DEVICE void write_pixel(const Pixels<T>& p, int64_t b, int64_t row, int64_t pixel, bool kept) {
  const int64_t step = p.channels_last ? 1 : p.pixels, size = p.channels * p.pixels;
  const int64_t at = p.channels_last ? pixel * p.channels : pixel;
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t offset = at + c * step;
    p.out[row * size + offset] =
        kept ? p.images[b * size + offset] : (p.one_colour ? p.baseline[c] : p.baseline[b * size + offset]);
  }
}

// ---- naive: one thread an element, everything looked up anew

template <typename T>
__global__ void compose_naive(Pixels<T> p, const int32_t* labels, const int64_t* image, const unsigned char* keep,
                              int64_t outputs, int64_t regions, bool complement) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x, rows = complement ? 2 * outputs : outputs;
  const int64_t size = p.channels * p.pixels;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < rows * size; e += step) {
    const int64_t row = e / size, within = e % size, i = row % outputs, b = image[i];
    const int64_t pixel = p.channels_last ? within / p.channels : within % p.pixels;
    const int64_t c = p.channels_last ? within % p.channels : within / p.pixels;
    const bool kept = (keep[i * regions + labels[b * p.pixels + pixel]] != 0) == (row < outputs);
    p.out[e] = kept ? p.images[b * size + within] : (p.one_colour ? p.baseline[c] : p.baseline[b * size + within]);
  }
}

// ---- fast: a block stays within one output, so that the choice of its regions is staged in shared memory

// Block k of an output takes pixels [256 k, 256 k + 256); `keep` of that output lies in shared memory. Both outputs of
// a pair are written in the same pass.
template <typename T>
__global__ void compose_pixels(Pixels<T> p, const int32_t* labels, const int64_t* image, const unsigned char* keep,
                               int64_t outputs, int64_t regions, bool complement) {
  FINECF_DYNAMIC_SHARED(unsigned char, chosen);  // [regions]
  const int64_t blocks = ceil_div(p.pixels, kPixelThreads);
  for (int64_t work = blockIdx.x; work < outputs * blocks; work += gridDim.x) {
    const int64_t i = work / blocks, b = image[i];
    for (int64_t s = threadIdx.x; s < regions; s += kPixelThreads) chosen[s] = keep[i * regions + s];
    __syncthreads();  // the choice of output i is staged
    const int64_t pixel = work % blocks * kPixelThreads + threadIdx.x;
    if (pixel < p.pixels) {
      const bool kept = chosen[labels[b * p.pixels + pixel]] != 0;
      write_pixel(p, b, i, pixel, kept);
      if (complement) write_pixel(p, b, outputs + i, pixel, !kept);
    }
    __syncthreads();  // nobody reads the choice any more
  }
}

template <typename T>
__global__ void mask_ranks(Pixels<T> p, const int32_t* rank, const int64_t* image, const int32_t* threshold,
                           int64_t outputs, bool insert) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; e < outputs * p.pixels; e += step) {
    const int64_t i = e / p.pixels, pixel = e % p.pixels, b = image[i];
    write_pixel(p, b, i, pixel, (rank[b * p.pixels + pixel] < threshold[i]) == insert);
  }
}

// ---- drivers. Sizes are positive: empty input returns earlier.

template <typename T, typename Launcher>
void run_compose_regions(Launcher& launcher, Version version, const Pixels<T>& p, const int32_t* labels,
                         const int64_t* image, const unsigned char* keep, int64_t outputs, int64_t regions,
                         bool complement) {
  const size_t shared = static_cast<size_t>(regions);
  if (version == Version::kNaive || shared > launcher.shared_limit()) {
    const int64_t elements = (complement ? 2 : 1) * outputs * p.channels * p.pixels;
    launcher.run("compose_naive", compose_naive<T>, blocks_for(elements, kPixelThreads), kPixelThreads, 0, p, labels,
                 image, keep, outputs, regions, complement);
    return;
  }
  const int64_t blocks = outputs * ceil_div(p.pixels, kPixelThreads);
  launcher.run("compose_pixels", compose_pixels<T>, blocks_for(blocks, 1), kPixelThreads, shared, p, labels, image,
               keep, outputs, regions, complement);
}

template <typename T, typename Launcher>
void run_rank_masks(Launcher& launcher, const Pixels<T>& p, const int32_t* rank, const int64_t* image,
                    const int32_t* threshold, int64_t outputs, bool insert) {
  launcher.run("mask_ranks", mask_ranks<T>, blocks_for(outputs * p.pixels, kPixelThreads), kPixelThreads, 0, p, rank,
               image, threshold, outputs, insert);
}

}  // namespace finecf
