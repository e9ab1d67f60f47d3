"""The operators: checked arguments in, tensors out, from the compiled kernels or from their plain-torch twins.

float32 and float64 on the CPU, where half precision is raised to float32; float32 and half precision (accumulated in
float32) on CUDA, where float64 runs in plain torch. Tensors may have any strides. No operator is differentiable.
"""

from finecf.ops.regions import compose_regions, rank_masks
from finecf.ops.replacement import (
    Nearest,
    Replacement,
    Replacements,
    best_replacement,
    nearest_candidates,
    replace_until_flip,
)
from finecf.ops.shapley import (
    PermutationShapley,
    ShapleyState,
    masked_class_scores,
    permutation_shapley,
    permutation_shapley_tiles,
)
from finecf.ops.submodular import Gains, submodular_gains

__all__ = [
    "Gains",
    "Nearest",
    "PermutationShapley",
    "Replacement",
    "Replacements",
    "ShapleyState",
    "best_replacement",
    "compose_regions",
    "masked_class_scores",
    "nearest_candidates",
    "permutation_shapley",
    "permutation_shapley_tiles",
    "rank_masks",
    "replace_until_flip",
    "submodular_gains",
]
