// What the entry points of the `submodular` operator ask of their arguments, on every backend.
#pragma once

#include <optional>

#include "../common/checks.h"
#include "submodular.h"

namespace finecf {

// A checked call; every tensor contiguous.
struct Inputs {
  Tensor insertion, image, candidate, distance, running_min, selected, target, weights;
  std::optional<Tensor> deletion, consistency, collaboration;
  int64_t rows, classes, images, regions;
};

inline Inputs check_inputs(const char* op, const Tensor& insertion_logits, const std::optional<Tensor>& deletion_logits,
                           const Tensor& image, const Tensor& candidate, const Tensor& distance,
                           const Tensor& running_min, const Tensor& selected, const Tensor& target,
                           const Tensor& weights, const std::optional<Tensor>& consistency,
                           const std::optional<Tensor>& collaboration) {
  check_rank(op, "insertion_logits", insertion_logits, 2, "R, C");
  check_rank(op, "distance", distance, 3, "B, m, m");
  const int64_t rows = insertion_logits.size(0), classes = insertion_logits.size(1);
  const int64_t images = distance.size(0), regions = distance.size(1);
  check(classes >= 2, op, ": insertion_logits must have at least 2 classes, got shape ", shape_text(insertion_logits));
  const auto take = [&](const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* axes,
                        ScalarType dtype) {
    check_shape(op, name, tensor, sizes, axes);
    check_dtype(op, name, tensor, dtype);
    check_same_device(op, name, tensor, insertion_logits);
    return to_contiguous(tensor);
  };
  const auto given = [&](const char* name, const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(take(name, *tensor, {rows}, "R", ScalarType::Double)) : std::nullopt;
  };
  Inputs in{to_contiguous(insertion_logits),
            take("image", image, {rows}, "R", ScalarType::Long),
            take("candidate", candidate, {rows}, "R", ScalarType::Long),
            take("distance", distance, {images, regions, regions}, "B, m, m", ScalarType::Double),
            take("running_min", running_min, {images, regions}, "B, m", ScalarType::Double),
            take("selected", selected, {images, regions}, "B, m", ScalarType::Bool),
            take("target", target, {images}, "B", ScalarType::Long),
            take("weights", weights, {kSubmodularTerms}, "4", ScalarType::Double),
            std::nullopt,
            given("consistency", consistency),
            given("collaboration", collaboration),
            rows,
            classes,
            images,
            regions};
  if (deletion_logits) {
    in.deletion = take("deletion_logits", *deletion_logits, {rows, classes}, "R, C", insertion_logits.scalar_type());
  }
  return in;
}

}  // namespace finecf
