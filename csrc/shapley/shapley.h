// The contract of the `shapley` operators, in words, once. Every backend (CPU, CUDA, plain torch) follows it.
//
// A game over the P cells of a feature map whose head is linear: coalition m of image b has the logits
//     logits[c] = base_logits[b,c] + sum_p masks[m,p] * cell_logits[b,p,c],
// and is worth value(logits, t) for the target class t:
//     prob      softmax(logits)_t                       in [0, 1]
//     log_prob  log softmax(logits)_t                   in (-inf, 0]
//     log_odds  logits_t - logsumexp_{c != t} logits_c
//     logit     logits_t
//
// masked_class_scores(cell_logits [B,P,C], base_logits [B,C], masks [M,P], target [B] i64, value) -> [B,M]
//   masks are any reals (0/1 for coalitions, soft masks too) and are shared by the images.
//
// permutation_shapley_tiles(cell_logits, base_logits, permutations [M,P] i32, target, value, antithetic)
//     -> (mean [B,T,P] f64, m2 [B,T,P] f64),  T = ceil(M / 32)
//   Walks each permutation from the empty to the full coalition; the marginal of a cell is the value after it joined
//   minus the value before. A sample is one permutation's marginals, or, if antithetic, the mean of its and of its
//   reversal's. Tile i holds the mean and the sum of squared deviations over samples [32 i, min(32 i + 32, M)).
//
// Both: C >= 2; float32 and float64 on the CPU; float32, float16, bfloat16 (accumulated in float32) on CUDA. Inputs are
// finite; outputs are never NaN, whatever the size of the logits. Same bits for any number of threads and for any
// split of `masks`, or of `permutations` at multiples of 32. Empty batch in, empty batch out.
#pragma once

#include <cstdint>

namespace finecf {

enum class Value : int { kProb = 0, kLogProb = 1, kLogOdds = 2, kLogit = 3 };

// Samples whose moments are reduced together, in a fixed order. Part of the result's bits: never change it.
constexpr int64_t kShapleyTile = 32;

}  // namespace finecf
