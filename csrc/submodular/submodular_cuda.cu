// CUDA entry point of the `submodular` operator: checks, allocation, dispatch, launch. The contract is in submodular.h,
// the kernels in submodular_kernel.cuh.
//
// Values on the device (images, candidates, targets) are not looked at here: that would wait for the device.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/cuda_launch.h"
#include "confidence_name.h"
#include "submodular_checks.h"
#include "submodular_kernel.cuh"

namespace finecf {
namespace {

std::tuple<Tensor, Tensor, Tensor> submodular_gains(Tensor insertion_logits, std::optional<Tensor> deletion_logits,
                                                    Tensor image, Tensor candidate, Tensor distance, Tensor running_min,
                                                    Tensor selected, Tensor target, Tensor weights,
                                                    std::string confidence, std::optional<Tensor> consistency,
                                                    std::optional<Tensor> collaboration, bool largest) {
  const char* op = "submodular_gains";
  const Confidence kind = confidence_named(op, confidence);
  check_cuda_float(op, "insertion_logits", insertion_logits);
  const Inputs in = check_inputs(op, insertion_logits, deletion_logits, image, candidate, distance, running_min,
                                 selected, target, weights, consistency, collaboration);
  Tensor scores = empty(in.insertion, {in.rows, kSubmodularTerms}, ScalarType::Double);
  Tensor total = empty(in.insertion, {in.rows}, ScalarType::Double);
  Tensor best = empty(in.insertion, {in.images}, ScalarType::Long);
  if (in.images == 0) return {scores, total, best};
  CudaLauncher launcher(op, in.insertion);
  dispatch_cuda_float(op, in.insertion, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    const GainsInput<T> input{data<T>(in.insertion),
                              in.deletion ? data<T>(*in.deletion) : nullptr,
                              data<int64_t>(in.image),
                              data<int64_t>(in.candidate),
                              data<double>(in.distance),
                              data<double>(in.running_min),
                              data<unsigned char>(in.selected),
                              data<int64_t>(in.target),
                              data<double>(in.weights),
                              in.consistency ? data<double>(*in.consistency) : nullptr,
                              in.collaboration ? data<double>(*in.collaboration) : nullptr,
                              kind,
                              in.rows,
                              in.images,
                              static_cast<int>(in.classes),
                              static_cast<int>(in.regions)};
    run_submodular_gains(launcher, Version::kFast, input, largest, mutable_data<double>(scores),
                         mutable_data<double>(total), mutable_data<int64_t>(best));
  });
  return {scores, total, best};
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CUDA, m) { m.impl("submodular_gains", TORCH_BOX(&finecf::submodular_gains)); }
