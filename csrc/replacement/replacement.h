// The contract of the `replacement` operators, in words, once. Every backend (CPU, CUDA, plain torch) follows it.
//
// nearest_candidates(query [P,D], bank [N,D], k) -> (cosine [P,k], index [P,k] i64)
//   The k bank rows of largest cosine with each query, best first; ties: lowest row. A zero row has cosine 0 with
//   everything. 1 <= k <= N.
//
// Replacing cell p by candidate n changes the logits of an image from l to l - cell_logits[p] + candidate_logits[n];
// candidate_logits are W f / P, as the cells'. The loss of the pair is
//     loss(p, n) = weight_sim (1 - similarity[p,n]) + weight_cls (-log softmax(l - cell_logits[p] +
//     candidate_logits[n])_t)
//
// best_replacement(cell_logits [B,P,C], candidate_logits [N,C], similarity [B,P,N], logits [B,C], target [B] i64,
//                  allowed [B,P] bool, candidate_range [B,2] i64, shortlist [B,P,K] i64?, used [B,N] bool?,
//                  weight_sim, weight_cls) -> (cell [B] i64, candidate [B] i64, loss [B])
//   The pair of smallest loss among the allowed cells and the unused candidates of the half-open row range (and, where
//   given, of the cell's shortlist; entries outside the range or negative are ignored). Ties: lowest cell, then lowest
//   candidate. Nothing allowed: -1, -1, +inf.
//
// replace_until_flip(cell_logits, candidate_logits, similarity, base_logits [B,C], target, cell_scores [B,P],
//                    candidate_range, shortlist?, top_cells, max_edits, reuse_candidates, weight_sim, weight_cls)
//     -> (cells [B,T] i64, candidates [B,T] i64, losses [B,T], logits [B,T+1,C], n_edits [B] i64, flipped [B] bool)
//   T = max_edits. Starts from l = base + sum_p cell_logits[p]. Each edit takes the best pair among the `top_cells` not
//   yet edited cells of highest score (ties: lowest cell); a cell is edited at most once, a candidate too unless
//   reuse_candidates. Stops when argmax l (ties: lowest class) is the target, when no pair is left, or after T edits.
//   Padding: cells and candidates -1, losses +inf; rows of logits after the last edit repeat it.
//
// float32 and float64 on the CPU; float32, float16, bfloat16 (accumulated in float32) on CUDA. Same bits for any number
// of threads. The factorised form below decides nothing: it only rules out, and what remains is scored directly.
//
// Factorised form (kernels.md): with A_p = exp(l - L_p - m_p) and B_n = exp(K_n - n_n), m_p and n_n the row maxima,
//     -log softmax(l - L_p + K_n)_t = m_p + n_n + log(A_p . B_n) - (l_t - L_pt + K_nt).
// One matrix product an edit; B is constant through the search. Pairs whose product may have lost digits to underflow
// (A_p . B_n < C 2^-106), and pairs within a guard of the smallest loss, are scored again by direct log-sum-exp.
#pragma once

#include <cstdint>

namespace finecf {

// A product below C times this may have lost terms that matter to underflow.
constexpr double kUnderflowGuard = 0x1p-106;
// Half-width of the band around the smallest factorised loss that is scored again, relative to max(1, |loss|).
constexpr double kRescoreGuardFloat = 1e-5;
constexpr double kRescoreGuardDouble = 1e-12;

}  // namespace finecf
