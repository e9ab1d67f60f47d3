// CPU kernel of `submodular_gains`, compiled once per instruction set (see common/vec.h): what of a row depends on its
// logits. Everything is double, whatever the logits are.
#pragma once

#include "../common/kernel_table.h"
#include "../common/vec.h"
#include "submodular.h"

namespace finecf {
namespace FINECF_ISA_NS {

// The row as double in scratch [width], width a multiple of 8 and >= classes; padding is -inf, so that exp gives 0.
template <class T>
FINECF_INLINE void widen_row(const T* logits, int64_t classes, int64_t width, double limit, double* scratch) {
  for (int64_t c = 0; c < classes; ++c) {
    const double x = double(logits[c]);
    scratch[c] = x > limit ? limit : (x < -limit ? -limit : x);
  }
  for (int64_t c = classes; c < width; ++c) scratch[c] = -Simd<double>::infinity;
}

// softmax(logits)_target; leaves exp(logits - max) in scratch and their sum in `sum`.
template <class T>
FINECF_INLINE double row_probability(const T* logits, int64_t classes, int64_t width, int64_t target, double* scratch,
                                     double& sum) {
  constexpr int w = Simd<double>::lanes;
  widen_row(logits, classes, width, Simd<double>::infinity, scratch);
  Vec<double> most = splat<double>(-Simd<double>::infinity), total = {};
  for (int64_t c = 0; c < width; c += w) most = vmax<double>(most, load<double>(scratch + c));
  const Vec<double> peak = splat<double>(hmax<double>(most));
  for (int64_t c = 0; c < width; c += w) {
    const Vec<double> e = vexp<double>(load<double>(scratch + c) - peak);
    store<double>(scratch + c, e);
    total += e;
  }
  sum = hsum<double>(total);
  return scratch[target] / sum;
}

template <class T>
double submodular_probability(const T* logits, int64_t classes, int64_t width, int64_t target, double* scratch) {
  double sum;
  return row_probability(logits, classes, width, target, scratch, sum);
}

// Returns the target's probability; `score` is the confidence term, `log_classes` = ln C.
template <class T>
double submodular_confidence(const T* logits, int64_t classes, int64_t width, int64_t target, Confidence confidence,
                             double log_classes, double* scratch, double* score) {
  constexpr int w = Simd<double>::lanes;
  double sum;
  const double probability = row_probability(logits, classes, width, target, scratch, sum);
  Vec<double> total = {};
  if (confidence == Confidence::kEntropy) {
    for (int64_t c = 0; c < width; c += w) {
      const Vec<double> p = load<double>(scratch + c) / splat<double>(sum);
      total += p * vlog<double>(p + kEntropyFloor);
    }
    *score = 1 + hsum<double>(total) / log_classes;
  } else {
    widen_row(logits, classes, width, kEvidenceLimit, scratch);
    for (int64_t c = 0; c < width; c += w) total += vexp<double>(load<double>(scratch + c));
    *score = 1 - double(classes) / (hsum<double>(total) + double(classes));
  }
  return probability;
}

}  // namespace FINECF_ISA_NS
}  // namespace finecf
