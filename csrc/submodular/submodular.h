// The contract of the `submodular` operator, in words, once. Every backend (CPU, CUDA, plain torch) follows it.
//
// A set S of an image's m regions is scored by four terms (methods page of SMDL):
//     confidence     of the logits with only S kept: 1 + sum_k P_k ln(P_k + 1e-7) / ln C        ("entropy")
//                                                    1 - C / sum_k (exp(clamp(z_k, -10, 10)) + 1)   ("evidential")
//     effectiveness  sum_{i in S} min_{j in S, j != i} distance[i,j]; 0 where S has one region
//     consistency    p_target with only S kept, or the number given for the row
//     collaboration  1 - p_target with S removed, or the number given for the row
//
// submodular_gains(insertion_logits [R,C], deletion_logits [R,C]?, image [R] i64, candidate [R] i64,
//                  distance [B,m,m] f64, running_min [B,m] f64, selected [B,m] bool, target [B] i64, weights [4] f64,
//                  confidence, consistency [R] f64?, collaboration [R] f64?, largest)
//     -> (scores [R,4] f64, total [R] f64, best [B] i64)
//   Row r asks what image[r] scores with candidate[r] added to its selected regions: insertion_logits[r] belong to that
//   set kept, deletion_logits[r] to that set removed. running_min[b,i] is the least distance from region i to another
//   selected region (+inf where there is none), for selected and open regions alike, so that a candidate costs O(|S|);
//   the diagonal of `distance` is not read, and a candidate that is selected already leaves the set as it is. weights
//   are those of the four terms in the order above; total is their sum.
//   best[b] is the row of the largest (or, with largest = false, the smallest) total of image b, ties to the lowest
//   candidate, then to the lowest row; -1 where the image has no row. Without deletion_logits and without
//   `collaboration` that term is 0.
//
// All arithmetic is float64, whatever the type of the logits: regions alone on black have cosines near 0.999, where a
// float32 distance is off by 5e-6. C >= 2; float32 and float64 logits on the CPU; float32, float16 and bfloat16 on
// CUDA. A row's scores have the same bits in any company of rows.
#pragma once

#include <cstdint>

namespace finecf {

enum class Confidence : int { kEntropy = 0, kEvidential = 1 };

constexpr int kSubmodularTerms = 4;
constexpr double kEntropyFloor = 1e-7;   // keeps the logarithm finite where a probability is 0
constexpr double kEvidenceLimit = 10.0;  // evidence is exp of the logits clamped to +- this

}  // namespace finecf
