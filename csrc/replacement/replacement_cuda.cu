// CUDA entry points of the `replacement` operators: checks, allocation, dispatch, launch. The contract is in
// replacement.h, the kernels and the order of their launches in replacement_kernel.cuh.
//
// Values on the device (targets, ranges) are not looked at here: that would wait for the device. finecf/ops does.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "../common/cuda_launch.h"
#include "replacement_kernel.cuh"

namespace finecf {
namespace {

// Rows of a bank, cells and classes are counted in 32 bits on the device.
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

std::tuple<Tensor, Tensor> nearest_candidates(Tensor query, Tensor bank, int64_t k) {
  const char* op = "nearest_candidates";
  check_rank(op, "query", query, 2, "P, D");
  check_rank(op, "bank", bank, 2, "N, D");
  check_cuda_float(op, "query", query);
  check_dtype(op, "bank", bank, query.scalar_type());
  check_same_device(op, "bank", bank, query);
  const int64_t queries = query.size(0), width = query.size(1), rows = bank.size(0);
  check_shape(op, "bank", bank, {rows, width}, "N, D");
  check(rows <= kMostRows, op, ": bank must have at most ", kMostRows, " rows, got ", rows);
  check(k >= 1 && k <= rows, op, ": k must be between 1 and the number of bank rows, ", rows, ", got ", k);
  Tensor cosine = empty(query, {queries, k}, ScalarType::Float);
  Tensor index = empty(query, {queries, k}, ScalarType::Long);
  if (cosine.numel() == 0) return {cosine, index};
  const Tensor left = to_contiguous(query), right = to_contiguous(bank);
  CudaLauncher launcher(op, query);
  dispatch_cuda_float(op, query, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    run_nearest_candidates(launcher, Version::kFast, data<T>(left), data<T>(right), queries, rows, width, k,
                           mutable_data<float>(cosine), mutable_data<int64_t>(index));
  });
  return {cosine, index};
}

// The checked, contiguous arguments that both searches share.
struct Problem {
  Tensor cell_logits, candidate_logits, similarity, target, range;
  std::optional<Tensor> shortlist;
  int64_t images, cells, classes, candidates, listed;
  double weight_sim, weight_cls;

  template <typename T>
  SearchInput<T> input() const {
    return {data<T>(cell_logits),
            data<T>(candidate_logits),
            data<T>(similarity),
            data<int64_t>(target),
            data<int64_t>(range),
            shortlist ? data<int64_t>(*shortlist) : nullptr,
            images,
            candidates,
            listed,
            static_cast<int>(cells),
            static_cast<int>(classes),
            weight_sim,
            weight_cls};
  }
};

Problem check_problem(const char* op, const Tensor& cell_logits, const Tensor& candidate_logits,
                      const Tensor& similarity, const Tensor& target, const Tensor& range,
                      const std::optional<Tensor>& shortlist, double weight_sim, double weight_cls) {
  check_rank(op, "cell_logits", cell_logits, 3, "B, P, C");
  check_cuda_float(op, "cell_logits", cell_logits);
  const ScalarType dtype = cell_logits.scalar_type();
  check_rank(op, "candidate_logits", candidate_logits, 2, "N, C");
  const int64_t images = cell_logits.size(0), cells = cell_logits.size(1), classes = cell_logits.size(2);
  const int64_t candidates = candidate_logits.size(0);
  check(classes >= 2, op, ": cell_logits must have at least 2 classes, got shape ", shape_text(cell_logits));
  check(candidates <= kMostRows, op, ": candidate_logits must have at most ", kMostRows, " rows, got ", candidates);
  check_shape(op, "candidate_logits", candidate_logits, {candidates, classes}, "N, C");
  check_dtype(op, "candidate_logits", candidate_logits, dtype);
  check_same_device(op, "candidate_logits", candidate_logits, cell_logits);
  check_shape(op, "similarity", similarity, {images, cells, candidates}, "B, P, N");
  check_dtype(op, "similarity", similarity, dtype);
  check_same_device(op, "similarity", similarity, cell_logits);
  check_shape(op, "target", target, {images}, "B");
  check_dtype(op, "target", target, ScalarType::Long);
  check_same_device(op, "target", target, cell_logits);
  check_shape(op, "candidate_range", range, {images, 2}, "B, 2");
  check_dtype(op, "candidate_range", range, ScalarType::Long);
  check_same_device(op, "candidate_range", range, cell_logits);
  check(std::isfinite(weight_sim) && std::isfinite(weight_cls) && weight_sim >= 0 && weight_cls >= 0, op,
        ": weight_sim and weight_cls must be finite and not negative, got ", weight_sim, " and ", weight_cls);
  Problem problem{to_contiguous(cell_logits),
                  to_contiguous(candidate_logits),
                  to_contiguous(similarity),
                  to_contiguous(target),
                  to_contiguous(range),
                  std::nullopt,
                  images,
                  cells,
                  classes,
                  candidates,
                  kNoShortlist,
                  weight_sim,
                  weight_cls};
  if (shortlist) {
    check_rank(op, "shortlist", *shortlist, 3, "B, P, K");
    problem.listed = shortlist->size(2);
    check_shape(op, "shortlist", *shortlist, {images, cells, problem.listed}, "B, P, K");
    check_dtype(op, "shortlist", *shortlist, ScalarType::Long);
    check_same_device(op, "shortlist", *shortlist, cell_logits);
    problem.shortlist = to_contiguous(*shortlist);
  }
  return problem;
}

std::tuple<Tensor, Tensor, Tensor> best_replacement(Tensor cell_logits, Tensor candidate_logits, Tensor similarity,
                                                    Tensor logits, Tensor target, Tensor allowed,
                                                    Tensor candidate_range, std::optional<Tensor> shortlist,
                                                    std::optional<Tensor> used, double weight_sim, double weight_cls) {
  const char* op = "best_replacement";
  const Problem problem = check_problem(op, cell_logits, candidate_logits, similarity, target, candidate_range,
                                        shortlist, weight_sim, weight_cls);
  check_shape(op, "logits", logits, {problem.images, problem.classes}, "B, C");
  check_same_device(op, "logits", logits, cell_logits);
  check_shape(op, "allowed", allowed, {problem.images, problem.cells}, "B, P");
  check_dtype(op, "allowed", allowed, ScalarType::Bool);
  check_same_device(op, "allowed", allowed, cell_logits);
  std::optional<Tensor> spent;
  if (used) {
    check_shape(op, "used", *used, {problem.images, problem.candidates}, "B, N");
    check_dtype(op, "used", *used, ScalarType::Bool);
    check_same_device(op, "used", *used, cell_logits);
    spent = to_contiguous(*used);
  }
  const Tensor now = to_float32(op, "logits", logits), open = to_contiguous(allowed);
  Tensor cell = empty(cell_logits, {problem.images}, ScalarType::Long);
  Tensor candidate = empty(cell_logits, {problem.images}, ScalarType::Long);
  Tensor loss = empty(cell_logits, {problem.images}, ScalarType::Float);
  if (problem.images == 0) return {cell, candidate, loss};
  CudaLauncher launcher(op, cell_logits);
  dispatch_cuda_float(op, cell_logits, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    run_best_replacement(launcher, Version::kFast, problem.input<T>(), data<float>(now), data<unsigned char>(open),
                         spent ? data<unsigned char>(*spent) : nullptr, mutable_data<int64_t>(cell),
                         mutable_data<int64_t>(candidate), mutable_data<float>(loss));
  });
  return {cell, candidate, loss};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> replace_until_flip(
    Tensor cell_logits, Tensor candidate_logits, Tensor similarity, Tensor base_logits, Tensor target,
    Tensor cell_scores, Tensor candidate_range, std::optional<Tensor> shortlist, int64_t top_cells, int64_t max_edits,
    bool reuse_candidates, double weight_sim, double weight_cls) {
  const char* op = "replace_until_flip";
  const Problem problem = check_problem(op, cell_logits, candidate_logits, similarity, target, candidate_range,
                                        shortlist, weight_sim, weight_cls);
  check_shape(op, "base_logits", base_logits, {problem.images, problem.classes}, "B, C");
  check_same_device(op, "base_logits", base_logits, cell_logits);
  check_shape(op, "cell_scores", cell_scores, {problem.images, problem.cells}, "B, P");
  check_same_device(op, "cell_scores", cell_scores, cell_logits);
  check(top_cells >= 1, op, ": top_cells must be at least 1, got ", top_cells);
  check(max_edits >= 0, op, ": max_edits must not be negative, got ", max_edits);
  const Tensor base = to_float32(op, "base_logits", base_logits), scores = to_float32(op, "cell_scores", cell_scores);
  Tensor cells = empty(cell_logits, {problem.images, max_edits}, ScalarType::Long);
  Tensor candidates = empty(cell_logits, {problem.images, max_edits}, ScalarType::Long);
  Tensor losses = empty(cell_logits, {problem.images, max_edits}, ScalarType::Float);
  Tensor path = empty(cell_logits, {problem.images, max_edits + 1, problem.classes}, ScalarType::Float);
  Tensor n_edits = empty(cell_logits, {problem.images}, ScalarType::Long);
  Tensor flipped = empty(cell_logits, {problem.images}, ScalarType::Bool);
  if (problem.images == 0) return {cells, candidates, losses, path, n_edits, flipped};
  SearchResult result{};
  result.cells = mutable_data<int64_t>(cells);
  result.candidates = mutable_data<int64_t>(candidates);
  result.losses = mutable_data<float>(losses);
  result.logits = mutable_data<float>(path);
  result.n_edits = mutable_data<int64_t>(n_edits);
  result.flipped = mutable_data<unsigned char>(flipped);
  result.max_edits = max_edits;
  result.top_cells = static_cast<int>(top_cells < problem.cells ? top_cells : problem.cells);
  CudaLauncher launcher(op, cell_logits);
  dispatch_cuda_float(op, cell_logits, [&](auto* type) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(type)>>;
    run_replace_until_flip(launcher, Version::kFast, problem.input<T>(), data<float>(base), data<float>(scores),
                           reuse_candidates, result);
  });
  return {cells, candidates, losses, path, n_edits, flipped};
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CUDA, m) {
  m.impl("nearest_candidates", TORCH_BOX(&finecf::nearest_candidates));
  m.impl("best_replacement", TORCH_BOX(&finecf::best_replacement));
  m.impl("replace_until_flip", TORCH_BOX(&finecf::replace_until_flip));
}
