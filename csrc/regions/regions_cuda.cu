// CUDA entry points of the `regions` operators: checks, allocation, dispatch, launch. The contract is in regions.h, the
// kernels in regions_kernel.cuh.
//
// Values on the device (images, labels) are not looked at here: that would wait for the device. finecf/ops does.
#include <torch/csrc/stable/library.h>

#include "../common/cuda_launch.h"
#include "regions_checks.h"
#include "regions_kernel.cuh"

namespace finecf {
namespace {

Tensor compose_regions(Tensor images, Tensor labels, Tensor image, Tensor keep, Tensor baseline, bool complement,
                       bool channels_last) {
  const char* op = "compose_regions";
  const Batch batch = check_batch(op, images, "labels", labels, image, baseline, channels_last);
  const int64_t outputs = image.size(0);
  const Tensor kept = check_keep(op, keep, batch);
  Tensor out = empty_images(batch, complement ? 2 * outputs : outputs);
  if (out.numel() == 0) return as_images(batch, out);
  CudaLauncher launcher(op, images);
  dispatch_width(op, images, [&](auto zero) {
    using T = decltype(zero);
    run_compose_regions(launcher, Version::kFast, pixels_of<T>(batch, out), data<int32_t>(batch.map),
                        data<int64_t>(batch.image), data<unsigned char>(kept), outputs, keep.size(1), complement);
  });
  return as_images(batch, out);
}

Tensor rank_masks(Tensor images, Tensor rank, Tensor image, Tensor threshold, Tensor baseline, bool insert) {
  const char* op = "rank_masks";
  const Batch batch = check_batch(op, images, "rank", rank, image, baseline, false);
  const int64_t outputs = image.size(0);
  const Tensor limits = check_threshold(op, threshold, batch);
  Tensor out = empty_images(batch, outputs);
  if (out.numel() == 0) return out;
  CudaLauncher launcher(op, images);
  dispatch_width(op, images, [&](auto zero) {
    using T = decltype(zero);
    run_rank_masks(launcher, pixels_of<T>(batch, out), data<int32_t>(batch.map), data<int64_t>(batch.image),
                   data<int32_t>(limits), outputs, insert);
  });
  return out;
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CUDA, m) {
  m.impl("compose_regions", TORCH_BOX(&finecf::compose_regions));
  m.impl("rank_masks", TORCH_BOX(&finecf::rank_masks));
}
