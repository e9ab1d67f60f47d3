// What the entry points of the `regions` operators ask of their arguments, on every backend.
#pragma once

#include "../common/checks.h"
#include "regions.h"

namespace finecf {

// A checked call: images, the map over their pixels, and which image each output is made from.
struct Batch {
  Tensor images, baseline, map, image;
  int64_t count, channels, height, width;
  bool one_colour, channels_last;
};

// [., Ch, H, W] as it lies in memory: with its channels last where asked for.
inline Tensor in_layout(const Tensor& images, bool channels_last) {
  return channels_last ? to_contiguous(torch::stable::transpose(torch::stable::transpose(images, 1, 2), 2, 3))
                       : to_contiguous(images);
}

inline Batch check_batch(const char* op, const Tensor& images, const char* map_name, const Tensor& map,
                         const Tensor& image, const Tensor& baseline, bool channels_last) {
  check_rank(op, "images", images, 4, "B, Ch, H, W");
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  check_shape(op, map_name, map, {count, height, width}, "B, H, W");
  check_dtype(op, map_name, map, ScalarType::Int);
  check_same_device(op, map_name, map, images);
  check_rank(op, "image", image, 1, "n");
  check_dtype(op, "image", image, ScalarType::Long);
  check_same_device(op, "image", image, images);
  check_dtype(op, "baseline", baseline, images.scalar_type());
  check_same_device(op, "baseline", baseline, images);
  const bool one_colour = baseline.dim() == 1;
  if (one_colour) {
    check_shape(op, "baseline", baseline, {channels}, "Ch");
  } else {
    check_shape(op, "baseline", baseline, {count, channels, height, width}, "B, Ch, H, W");
  }
  return {in_layout(images, channels_last),
          one_colour ? to_contiguous(baseline) : in_layout(baseline, channels_last),
          to_contiguous(map),
          to_contiguous(image),
          count,
          channels,
          height,
          width,
          one_colour,
          channels_last};
}

// Which regions each output keeps, bool [n, m].
inline Tensor check_keep(const char* op, const Tensor& keep, const Batch& batch) {
  check_rank(op, "keep", keep, 2, "n, m");
  check_dtype(op, "keep", keep, ScalarType::Bool);
  check_same_device(op, "keep", keep, batch.images);
  check_shape(op, "keep", keep, {batch.image.size(0), keep.size(1)}, "n, m");
  return to_contiguous(keep);
}

inline Tensor check_threshold(const char* op, const Tensor& threshold, const Batch& batch) {
  check_shape(op, "threshold", threshold, {batch.image.size(0)}, "n");
  check_dtype(op, "threshold", threshold, ScalarType::Int);
  check_same_device(op, "threshold", threshold, batch.images);
  return to_contiguous(threshold);
}

// Room for `rows` composed images, as they lie in memory.
inline Tensor empty_images(const Batch& batch, int64_t rows) {
  const ScalarType dtype = batch.images.scalar_type();
  return batch.channels_last ? empty(batch.images, {rows, batch.height, batch.width, batch.channels}, dtype)
                             : empty(batch.images, {rows, batch.channels, batch.height, batch.width}, dtype);
}

// The same as [rows, Ch, H, W].
inline Tensor as_images(const Batch& batch, const Tensor& out) {
  return batch.channels_last ? torch::stable::transpose(torch::stable::transpose(out, 2, 3), 1, 2) : out;
}

template <typename T>
Pixels<T> pixels_of(const Batch& batch, Tensor& out) {
  return {static_cast<const T*>(batch.images.const_data_ptr()),
          static_cast<const T*>(batch.baseline.const_data_ptr()),
          static_cast<T*>(out.mutable_data_ptr()),
          batch.channels,
          batch.height * batch.width,
          batch.one_colour,
          batch.channels_last};
}

// Calls f with a zero of the unsigned type as wide as the elements: they are only copied.
template <typename F>
void dispatch_width(const char* op, const Tensor& images, F&& f) {
  switch (images.element_size()) {
    case 1:
      return f(uint8_t());
    case 2:
      return f(uint16_t());
    case 4:
      return f(uint32_t());
    case 8:
      return f(uint64_t());
    default:
      fail(op, ": images must have elements of 1, 2, 4 or 8 bytes, got ",
           torch::headeronly::toString(images.scalar_type()));
  }
}

}  // namespace finecf
