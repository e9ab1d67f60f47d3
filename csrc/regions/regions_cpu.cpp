// CPU entry points of the `regions` operators: checks, and copies in runs of pixels that share a label. The contract is
// in regions.h. Memory-bound, so compiled once: no instruction set copies faster than another.
#include "regions.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "../common/workspace.h"
#include "regions_checks.h"

namespace finecf {
namespace {

// Pixels [start, stop) with one label.
struct Run {
  int64_t start, stop;
  int32_t label;
};

// Copies pixels [start, stop) of image b to output `row`, from the image or from the baseline.
template <class T>
void copy_run(const Pixels<T>& p, int64_t b, int64_t row, int64_t start, int64_t stop, bool kept) {
  const int64_t size = p.channels * p.pixels;
  T* out = p.out + row * size;
  if (p.channels_last) {
    const int64_t from = start * p.channels, length = (stop - start) * p.channels;
    if (kept || !p.one_colour) {
      std::memcpy(out + from, (kept ? p.images : p.baseline) + b * size + from, length * sizeof(T));
    } else {
      for (int64_t i = 0; i < length; i += p.channels)
        for (int64_t c = 0; c < p.channels; ++c) out[from + i + c] = p.baseline[c];
    }
    return;
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t from = c * p.pixels + start;
    if (kept || !p.one_colour) {
      std::memcpy(out + from, (kept ? p.images : p.baseline) + b * size + from, (stop - start) * sizeof(T));
    } else {
      const T colour = p.baseline[c];
      for (int64_t i = 0; i < stop - start; ++i) out[from + i] = colour;
    }
  }
}

// The runs of an image's label map, in reading order; refuses labels outside 0..regions-1.
std::vector<Run> runs_of(const char* op, const int32_t* labels, int64_t pixels, int64_t regions) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < pixels;) {
    const int32_t label = labels[i];
    check(label >= 0 && label < regions, op, ": labels must lie in [0, ", regions, "), got ", label);
    int64_t stop = i + 1;
    while (stop < pixels && labels[stop] == label) ++stop;
    runs.push_back({i, stop, label});
    i = stop;
  }
  return runs;
}

Tensor compose_regions(Tensor images, Tensor labels, Tensor image, Tensor keep, Tensor baseline, bool complement,
                       bool channels_last) {
  const char* op = "compose_regions";
  const Batch batch = check_batch(op, images, "labels", labels, image, baseline, channels_last);
  const int64_t outputs = image.size(0);
  const Tensor kept = check_keep(op, keep, batch);
  check_range(op, "image", batch.image, 0, batch.count);
  const int64_t regions = keep.size(1);
  Tensor out = empty_images(batch, complement ? 2 * outputs : outputs);
  if (out.numel() == 0) return as_images(batch, out);

  // Runs are found once for each image that is asked for.
  std::vector<std::vector<Run>> runs(batch.count);
  const int64_t* of = batch.image.const_data_ptr<int64_t>();
  const int64_t pixels = batch.height * batch.width;
  for (int64_t i = 0; i < outputs; ++i)
    if (runs[of[i]].empty())
      runs[of[i]] = runs_of(op, batch.map.const_data_ptr<int32_t>() + of[i] * pixels, pixels, regions);

  dispatch_width(op, images, [&](auto zero) {
    const Pixels<decltype(zero)> p = pixels_of<decltype(zero)>(batch, out);
    parallel_tiles(outputs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const bool* chosen = kept.const_data_ptr<bool>() + i * regions;
        const std::vector<Run>& own = runs[of[i]];
        // Neighbouring runs with the same choice are copied as one.
        for (size_t first = 0; first < own.size();) {
          const bool choice = chosen[own[first].label];
          size_t last = first + 1;
          while (last < own.size() && chosen[own[last].label] == choice) ++last;
          const int64_t start = own[first].start, stop = own[last - 1].stop;
          copy_run(p, of[i], i, start, stop, choice);
          if (complement) copy_run(p, of[i], outputs + i, start, stop, !choice);
          first = last;
        }
      }
    });
  });
  return as_images(batch, out);
}

Tensor rank_masks(Tensor images, Tensor rank, Tensor image, Tensor threshold, Tensor baseline, bool insert) {
  const char* op = "rank_masks";
  const Batch batch = check_batch(op, images, "rank", rank, image, baseline, false);
  const int64_t outputs = image.size(0), pixels = batch.height * batch.width;
  const Tensor limits = check_threshold(op, threshold, batch);
  check_range(op, "image", batch.image, 0, batch.count);
  Tensor out = empty_images(batch, outputs);
  if (out.numel() == 0) return out;
  const int64_t* of = batch.image.const_data_ptr<int64_t>();
  dispatch_width(op, images, [&](auto zero) {
    using T = decltype(zero);
    const Pixels<T> p = pixels_of<T>(batch, out);
    parallel_tiles(outputs * batch.channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t i = plane / p.channels, c = plane % p.channels, b = of[i];
        const int32_t limit = limits.const_data_ptr<int32_t>()[i];
        const int32_t* place = batch.map.const_data_ptr<int32_t>() + b * pixels;
        const T* from = p.images + (b * p.channels + c) * pixels;
        const T* base = p.baseline + (p.one_colour ? c : (b * p.channels + c) * pixels);
        T* to = p.out + plane * pixels;
        if (p.one_colour) {
          const T colour = *base;
          for (int64_t x = 0; x < pixels; ++x) to[x] = (place[x] < limit) == insert ? from[x] : colour;
        } else {
          for (int64_t x = 0; x < pixels; ++x) to[x] = (place[x] < limit) == insert ? from[x] : base[x];
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CPU, m) {
  m.impl("compose_regions", TORCH_BOX(&finecf::compose_regions));
  m.impl("rank_masks", TORCH_BOX(&finecf::rank_masks));
}
