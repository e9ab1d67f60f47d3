// CUDA entry points of the `shapley` operators: checks, allocation, dispatch, launch. The contract is in shapley.h, the
// kernels and the order of their launches in shapley_kernel.cuh.
//
// Values on the device (targets, permutations) are not looked at here: that would wait for the device. finecf/ops does.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../common/cuda_launch.h"
#include "shapley_kernel.cuh"
#include "shapley_value.h"

namespace finecf {
namespace {

struct Game {
  Tensor cell_logits, base_logits, target;
  int64_t images, cells, classes;
};

Game check_game(const char* op, const Tensor& cell_logits, const Tensor& base_logits, const Tensor& target) {
  check_rank(op, "cell_logits", cell_logits, 3, "B, P, C");
  check_cuda_float(op, "cell_logits", cell_logits);
  const int64_t images = cell_logits.size(0), cells = cell_logits.size(1), classes = cell_logits.size(2);
  check(classes >= 2, op, ": cell_logits must have at least 2 classes, got shape ", shape_text(cell_logits));
  check_shape(op, "base_logits", base_logits, {images, classes}, "B, C");
  check_same_device(op, "base_logits", base_logits, cell_logits);
  check_shape(op, "target", target, {images}, "B");
  check_dtype(op, "target", target, ScalarType::Long);
  check_same_device(op, "target", target, cell_logits);
  return {to_contiguous(cell_logits),
          to_float32(op, "base_logits", base_logits),
          to_contiguous(target),
          images,
          cells,
          classes};
}

Tensor masked_class_scores(Tensor cell_logits, Tensor base_logits, Tensor masks, Tensor target, std::string value) {
  const char* op = "masked_class_scores";
  const Value kind = value_named(op, value);
  const Game game = check_game(op, cell_logits, base_logits, target);
  check_rank(op, "masks", masks, 2, "M, P");
  const int64_t count = masks.size(0);
  check_shape(op, "masks", masks, {count, game.cells}, "M, P");
  check_same_device(op, "masks", masks, cell_logits);
  const Tensor rows = to_float32(op, "masks", masks);
  Tensor scores = empty(cell_logits, {game.images, count}, ScalarType::Float);
  if (scores.numel() == 0) return scores;
  CudaLauncher launcher(op, cell_logits);
  dispatch_cuda_float(op, cell_logits, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    run_masked_class_scores(launcher, Version::kFast, data<T>(game.cell_logits), data<float>(game.base_logits),
                            data<float>(rows), data<int64_t>(game.target), kind, game.images, count, game.cells,
                            game.classes, mutable_data<float>(scores));
  });
  return scores;
}

std::tuple<Tensor, Tensor> permutation_shapley_tiles(Tensor cell_logits, Tensor base_logits, Tensor permutations,
                                                     Tensor target, std::string value, bool antithetic) {
  const char* op = "permutation_shapley_tiles";
  const Value kind = value_named(op, value);
  const Game game = check_game(op, cell_logits, base_logits, target);
  check_rank(op, "permutations", permutations, 2, "M, P");
  const int64_t count = permutations.size(0);
  check_shape(op, "permutations", permutations, {count, game.cells}, "M, P");
  check_dtype(op, "permutations", permutations, ScalarType::Int);
  check_same_device(op, "permutations", permutations, cell_logits);
  const Tensor orders = to_contiguous(permutations);
  const int64_t tiles = ceil_div(count, kShapleyTile);
  Tensor mean = empty(cell_logits, {game.images, tiles, game.cells}, ScalarType::Double);
  Tensor m2 = empty(cell_logits, {game.images, tiles, game.cells}, ScalarType::Double);
  if (mean.numel() == 0) return {mean, m2};
  CudaLauncher launcher(op, cell_logits);
  dispatch_cuda_float(op, cell_logits, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    run_permutation_shapley_tiles(launcher, Version::kFast, data<T>(game.cell_logits), data<float>(game.base_logits),
                                  data<int32_t>(orders), data<int64_t>(game.target), kind, antithetic, game.images,
                                  count, game.cells, game.classes, mutable_data<double>(mean),
                                  mutable_data<double>(m2));
  });
  return {mean, m2};
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CUDA, m) {
  m.impl("masked_class_scores", TORCH_BOX(&finecf::masked_class_scores));
  m.impl("permutation_shapley_tiles", TORCH_BOX(&finecf::permutation_shapley_tiles));
}
