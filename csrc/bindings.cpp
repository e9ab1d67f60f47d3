// Every operator schema of finecf, and nothing else. The contract of each is in the header of its family
// (csrc/<family>/<family>.h); each kernel is registered at the end of its own file.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(finecf, m) {
  // shapley
  m.def(
      "masked_class_scores(Tensor cell_logits, Tensor base_logits, Tensor masks, Tensor target, str value) -> Tensor");
  m.def(
      "permutation_shapley_tiles(Tensor cell_logits, Tensor base_logits, Tensor permutations, Tensor target, "
      "str value, bool antithetic) -> (Tensor mean, Tensor m2)");

  // replacement
  m.def("nearest_candidates(Tensor query, Tensor bank, int k) -> (Tensor cosine, Tensor index)");
  m.def(
      "best_replacement(Tensor cell_logits, Tensor candidate_logits, Tensor similarity, Tensor logits, Tensor target, "
      "Tensor allowed, Tensor candidate_range, Tensor? shortlist, Tensor? used, float weight_sim, float weight_cls) "
      "-> (Tensor cell, Tensor candidate, Tensor loss)");
  m.def(
      "replace_until_flip(Tensor cell_logits, Tensor candidate_logits, Tensor similarity, Tensor base_logits, "
      "Tensor target, Tensor cell_scores, Tensor candidate_range, Tensor? shortlist, int top_cells, int max_edits, "
      "bool reuse_candidates, float weight_sim, float weight_cls) "
      "-> (Tensor cells, Tensor candidates, Tensor losses, Tensor logits, Tensor n_edits, Tensor flipped)");

  // submodular
  m.def(
      "submodular_gains(Tensor insertion_logits, Tensor? deletion_logits, Tensor image, Tensor candidate, "
      "Tensor distance, Tensor running_min, Tensor selected, Tensor target, Tensor weights, str confidence, "
      "Tensor? consistency, Tensor? collaboration, bool largest) -> (Tensor scores, Tensor total, Tensor best)");

  // regions
  m.def(
      "compose_regions(Tensor images, Tensor labels, Tensor image, Tensor keep, Tensor baseline, bool complement, "
      "bool channels_last) -> Tensor");
  m.def(
      "rank_masks(Tensor images, Tensor rank, Tensor image, Tensor threshold, Tensor baseline, bool insert) "
      "-> Tensor");
}
