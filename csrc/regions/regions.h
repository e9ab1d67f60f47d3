// The contract of the `regions` operators, in words, once. Every backend (CPU, CUDA, plain torch) follows it.
//
// Both copy pixels of an image or of a baseline; nothing is computed, so they take elements of any type of 1, 2, 4 or 8
// bytes, and every backend gives the same bits. B images of Ch channels; `baseline` [B,Ch,H,W], or [Ch] for one colour.
//
// compose_regions(images [B,Ch,H,W], labels [B,H,W] i32, image [n] i64, keep [n,m] bool, baseline, complement,
//                 channels_last) -> [n or 2n,Ch,H,W]
//   Output i is image[i] where keep[i, label of the pixel], else the baseline. With `complement` outputs n..2n-1 are
//   the same with the choice reversed. Labels lie in 0..m-1. With `channels_last` the output is laid
//   out channels last in memory; images and baseline that are not are copied first.
//
// rank_masks(images [B,Ch,H,W], rank [B,H,W] i32, image [n] i64, threshold [n] i32, baseline, insert) -> [n,Ch,H,W]
//   Output i is image[i] where (rank < threshold[i]) == insert, else the baseline.
//
// One read of the image and one write per output. Empty batch in, empty batch out.
#pragma once

#include <cstdint>

namespace finecf {

// Where the operators read and write: elements of an unsigned type T as wide as the images'.
template <class T>
struct Pixels {
  const T* images;    // [B, Ch, pixels], or [B, pixels, Ch] with channels_last
  const T* baseline;  // the same shape, or [Ch] where `one_colour`
  T* out;
  int64_t channels, pixels;
  bool one_colour, channels_last;
};

}  // namespace finecf
