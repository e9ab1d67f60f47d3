// CUDA kernels of the `submodular` operator and the order of their launches. The contract is in submodular.h.
//
// A step has a few thousand rows of C logits at most, so the kernels are bound by their launches: one warp a row, then
// one warp an image. All arithmetic is double.
#pragma once

#include "../simt/platform.cuh"
#include "../simt/reduce.cuh"
#include "submodular.h"

namespace finecf {

constexpr int kRowWarps = 4;  // rows that a block scores at a time

template <typename T>
struct GainsInput {
  const T* insertion;             // [R, C]
  const T* deletion;              // [R, C] or null
  const int64_t* image;           // [R]
  const int64_t* candidate;       // [R]
  const double* distance;         // [B, m, m]
  const double* running_min;      // [B, m]
  const unsigned char* selected;  // [B, m]
  const int64_t* target;          // [B]
  const double* weights;          // [4]
  const double* consistency;      // [R] or null
  const double* collaboration;    // [R] or null
  Confidence confidence;
  int64_t rows, images;
  int classes, regions;
};

FINECF_DEVICE double clamp_evidence(double z) {
  return z > kEvidenceLimit ? kEvidenceLimit : (z < -kEvidenceLimit ? -kEvidenceLimit : z);
}

// The four terms and their weighted sum, written by one thread. Terms of weight 0 are left out of the sum, so that an
// infinite distance does not make NaN of them.
FINECF_DEVICE void write_terms(const double* weights, double confidence, double effectiveness, double consistency,
                               double collaboration, double* scores, double* total) {
  const double terms[kSubmodularTerms] = {confidence, effectiveness, consistency, collaboration};
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kSubmodularTerms; ++i) {
    scores[i] = terms[i];
    if (weights[i] != 0) sum += weights[i] * terms[i];
  }
  *total = sum;
}

// ---- naive: one thread a row, one thread an image

template <typename T>
__global__ void score_rows_naive(GainsInput<T> in, double* scores, double* total) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < in.rows; r += step) {
    const int64_t b = in.image[r], c = in.candidate[r], target = in.target[b];
    double kept = 0, removed = 1, confidence = 0;  // without deletion logits the last term is 0
    for (int side = 0; side < 2; ++side) {
      const T* row = side == 0 ? in.insertion : in.deletion;
      if (row == nullptr) continue;
      row += r * in.classes;
      double peak = -HUGE_VAL, sum = 0, score = 0;
      for (int k = 0; k < in.classes; ++k) peak = fmax(peak, static_cast<double>(to_float(row[k])));
      for (int k = 0; k < in.classes; ++k) sum += exp(to_float(row[k]) - peak);
      if (side == 1) {
        removed = exp(to_float(row[target]) - peak) / sum;
        continue;
      }
      kept = exp(to_float(row[target]) - peak) / sum;
      for (int k = 0; k < in.classes; ++k) {
        const double p = exp(to_float(row[k]) - peak) / sum;
        score += in.confidence == Confidence::kEntropy ? p * log(p + kEntropyFloor)
                                                       : exp(clamp_evidence(to_float(row[k]))) + 1;
      }
      confidence = in.confidence == Confidence::kEntropy ? 1 + score / log(static_cast<double>(in.classes))
                                                         : 1 - in.classes / score;
    }
    double effectiveness = 0;
    bool alone = true;
    for (int i = 0; i < in.regions; ++i) {
      if (!in.selected[b * in.regions + i] || i == c) continue;
      effectiveness += fmin(in.running_min[b * in.regions + i], in.distance[(b * in.regions + i) * in.regions + c]);
      alone = false;
    }
    if (!alone) effectiveness += in.running_min[b * in.regions + c];
    write_terms(in.weights, confidence, effectiveness, in.consistency ? in.consistency[r] : kept,
                in.collaboration ? in.collaboration[r] : 1 - removed, scores + r * kSubmodularTerms, total + r);
  }
}

__global__ void pick_best_naive(const int64_t* image, const int64_t* candidate, const double* total, int64_t rows,
                                int64_t images, bool largest, int64_t* best) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t b = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; b < images; b += step) {
    int64_t first = -1;
    for (int64_t r = 0; r < rows; ++r) {
      if (image[r] != b) continue;
      const bool better = first < 0 || (largest ? total[r] > total[first] : total[r] < total[first]);
      if (better || (total[r] == total[first] && candidate[r] < candidate[first])) first = r;
    }
    best[b] = first;
  }
}

// ---- fast: a warp a row, a warp an image

// exp(row - peak) summed over the classes; every lane gets peak, sum and softmax(row)_target.
template <typename T>
FINECF_DEVICE double warp_softmax(const T* row, int classes, int64_t target, int lane, double& peak, double& sum) {
  peak = -HUGE_VAL;
  for (int k = lane; k < classes; k += kWarp) peak = fmax(peak, static_cast<double>(to_float(row[k])));
  peak = warp_max(peak);
  sum = 0;
  for (int k = lane; k < classes; k += kWarp) sum += exp(to_float(row[k]) - peak);
  sum = warp_sum(sum);
  return exp(to_float(row[target]) - peak) / sum;
}

// Warp w of a block takes rows w, w + warps of the grid, ...; its lanes stride over the classes, then over the regions.
template <typename T>
__global__ void score_rows(GainsInput<T> in, double* scores, double* total) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * kRowWarps;
  for (int64_t r = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; r < in.rows; r += warps) {
    const int64_t b = in.image[r], c = in.candidate[r], target = in.target[b];
    const T* const row = in.insertion + r * in.classes;
    double peak, sum;
    const double kept = warp_softmax(row, in.classes, target, lane, peak, sum);
    double score = 0, confidence;
    if (in.confidence == Confidence::kEntropy) {
      for (int k = lane; k < in.classes; k += kWarp) {
        const double p = exp(to_float(row[k]) - peak) / sum;
        score += p * log(p + kEntropyFloor);
      }
      confidence = 1 + warp_sum(score) / log(static_cast<double>(in.classes));
    } else {
      for (int k = lane; k < in.classes; k += kWarp) score += exp(clamp_evidence(to_float(row[k]))) + 1;
      confidence = 1 - in.classes / warp_sum(score);
    }
    double removed = 1;  // without deletion logits the term is 0
    if (in.deletion != nullptr) {
      removed = warp_softmax(in.deletion + r * in.classes, in.classes, target, lane, peak, sum);
    }
    // Lane i % 32 owns region i: its distance to the nearest of the selected regions and the candidate.
    double effectiveness = 0;
    int others = 0;
    for (int i = lane; i < in.regions; i += kWarp) {
      if (!in.selected[b * in.regions + i] || i == c) continue;
      effectiveness += fmin(in.running_min[b * in.regions + i], in.distance[(b * in.regions + i) * in.regions + c]);
      others = 1;
    }
    effectiveness = warp_sum(effectiveness);
    if (warp_sum(others) != 0) effectiveness += in.running_min[b * in.regions + c];
    if (lane == 0) {
      write_terms(in.weights, confidence, effectiveness, in.consistency ? in.consistency[r] : kept,
                  in.collaboration ? in.collaboration[r] : 1 - removed, scores + r * kSubmodularTerms, total + r);
    }
  }
}

// One warp an image: lanes stride over all rows and keep the best of their image's.
__global__ void pick_best(const int64_t* image, const int64_t* candidate, const double* total, int64_t rows,
                          int64_t images, bool largest, int64_t* best) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t{gridDim.x} * kRowWarps;
  for (int64_t b = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp; b < images; b += warps) {
    // As an arg-min: the loss is minus the total, ties go to the lowest region, then to the lowest row.
    Found mine = none_found();
    for (int64_t r = lane; r < rows; r += kWarp) {
      if (image[r] != b) continue;
      const Found other = {largest ? -total[r] : total[r], r, static_cast<int>(candidate[r]), 0};
      if (mine.candidate < 0 || precedes(other, mine)) mine = other;
    }
    const Found first = warp_first(mine);
    if (lane == 0) best[b] = first.candidate;
  }
}

// ---- driver

template <typename T, typename Launcher>
void run_submodular_gains(Launcher& launcher, Version version, const GainsInput<T>& in, bool largest, double* scores,
                          double* total, int64_t* best) {
  if (version == Version::kNaive) {
    if (in.rows > 0) {
      launcher.run("score_rows_naive", score_rows_naive<T>, blocks_for(in.rows, 128), 128, 0, in, scores, total);
    }
    launcher.run("pick_best_naive", pick_best_naive, blocks_for(in.images, 128), 128, 0, in.image, in.candidate, total,
                 in.rows, in.images, largest, best);
    return;
  }
  if (in.rows > 0) {
    launcher.run("score_rows", score_rows<T>, blocks_for(in.rows, kRowWarps), kRowWarps * kWarp, 0, in, scores, total);
  }
  launcher.run("pick_best", pick_best, blocks_for(in.images, kRowWarps), kRowWarps * kWarp, 0, in.image, in.candidate,
               total, in.rows, in.images, largest, best);
}

}  // namespace finecf
