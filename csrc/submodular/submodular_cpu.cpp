// CPU entry point of the `submodular` operator: checks, scratch memory, threads. The contract is in submodular.h, the
// arithmetic on logits in submodular_cpu_kernel.h.
#include "submodular.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "../common/isa.h"
#include "../common/workspace.h"
#include "confidence_name.h"
#include "submodular_checks.h"

namespace finecf {
namespace {

constexpr int64_t kRowWidth = 8;      // doubles: rows are padded to whole vectors of every instruction set
constexpr int64_t kRowsPerTile = 16;  // what one thread takes at a time

// sum_{i in S} min(running_min[i], distance[i, c]) + running_min[c]: the term for S with c added.
double effectiveness(const double* distance, const double* running_min, const bool* selected, int64_t regions,
                     int64_t candidate) {
  double total = 0;
  bool alone = true;
  for (int64_t i = 0; i < regions; ++i) {
    if (!selected[i] || i == candidate) continue;
    const double d = distance[i * regions + candidate];
    total += d < running_min[i] ? d : running_min[i];
    alone = false;
  }
  return alone ? 0 : total + running_min[candidate];
}

template <class T>
void score_rows(const Inputs& in, Confidence confidence, double* scores, double* total) {
  const Kernels<T>& k = cpu_kernels_for<T>();
  const int64_t width = (in.classes + kRowWidth - 1) / kRowWidth * kRowWidth;
  const double log_classes = std::log(double(in.classes));
  const double* weights = in.weights.const_data_ptr<double>();
  const T* insertion = in.insertion.const_data_ptr<T>();
  const T* deletion = in.deletion ? in.deletion->const_data_ptr<T>() : nullptr;
  const double* consistency = in.consistency ? in.consistency->const_data_ptr<double>() : nullptr;
  const double* collaboration = in.collaboration ? in.collaboration->const_data_ptr<double>() : nullptr;
  parallel_tiles(in.rows, kRowsPerTile, [&](int64_t begin, int64_t end) {
    Workspace<double> scratch(width);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t b = in.image.const_data_ptr<int64_t>()[r], c = in.candidate.const_data_ptr<int64_t>()[r];
      const int64_t target = in.target.const_data_ptr<int64_t>()[b];
      double* score = scores + r * kSubmodularTerms;
      const double kept = k.submodular_confidence(insertion + r * in.classes, in.classes, width, target, confidence,
                                                  log_classes, scratch.data(), score);
      score[1] = effectiveness(in.distance.const_data_ptr<double>() + b * in.regions * in.regions,
                               in.running_min.const_data_ptr<double>() + b * in.regions,
                               in.selected.const_data_ptr<bool>() + b * in.regions, in.regions, c);
      score[2] = consistency ? consistency[r] : kept;
      score[3] = collaboration ? collaboration[r]
                 : deletion    ? 1 - k.submodular_probability(deletion + r * in.classes, in.classes, width, target,
                                                              scratch.data())
                               : 0;
      // Terms of weight 0 are left out, so that an infinite distance does not make NaN of them.
      total[r] = 0;
      for (int i = 0; i < kSubmodularTerms; ++i)
        if (weights[i] != 0) total[r] += weights[i] * score[i];
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> submodular_gains(Tensor insertion_logits, std::optional<Tensor> deletion_logits,
                                                    Tensor image, Tensor candidate, Tensor distance, Tensor running_min,
                                                    Tensor selected, Tensor target, Tensor weights,
                                                    std::string confidence, std::optional<Tensor> consistency,
                                                    std::optional<Tensor> collaboration, bool largest) {
  const char* op = "submodular_gains";
  const Confidence kind = confidence_named(op, confidence);
  check_float(op, "insertion_logits", insertion_logits);
  const Inputs in = check_inputs(op, insertion_logits, deletion_logits, image, candidate, distance, running_min,
                                 selected, target, weights, consistency, collaboration);
  check_range(op, "image", in.image, 0, in.images);
  check_range(op, "candidate", in.candidate, 0, in.regions);
  check_range(op, "target", in.target, 0, in.classes);

  Tensor scores = empty(insertion_logits, {in.rows, kSubmodularTerms}, ScalarType::Double);
  Tensor total = empty(insertion_logits, {in.rows}, ScalarType::Double);
  Tensor best = empty(insertion_logits, {in.images}, ScalarType::Long);
  double* sums = total.mutable_data_ptr<double>();
  dispatch_float(op, insertion_logits,
                 [&](auto scalar) { score_rows<decltype(scalar)>(in, kind, scores.mutable_data_ptr<double>(), sums); });
  int64_t* winner = best.mutable_data_ptr<int64_t>();
  for (int64_t b = 0; b < in.images; ++b) winner[b] = -1;
  const int64_t* of = in.image.const_data_ptr<int64_t>();
  const int64_t* region = in.candidate.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < in.rows; ++r) {
    int64_t& first = winner[of[r]];
    const bool better = first < 0 || (largest ? sums[r] > sums[first] : sums[r] < sums[first]);
    if (better || (sums[r] == sums[first] && region[r] < region[first])) first = r;
  }
  return {scores, total, best};
}

}  // namespace
}  // namespace finecf

STABLE_TORCH_LIBRARY_IMPL(finecf, CPU, m) { m.impl("submodular_gains", TORCH_BOX(&finecf::submodular_gains)); }
