"""The operators: checked arguments in, tensors out, from the compiled kernels or from their plain-torch twins.

float32 and float64 on the CPU, where half precision is raised to float32; float32 and half precision (accumulated in
float32) on CUDA, where float64 runs in plain torch. Tensors may have any strides. No operator is differentiable.
"""

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

__all__ = [
    "Nearest",
    "PermutationShapley",
    "Replacement",
    "Replacements",
    "ShapleyState",
    "best_replacement",
    "masked_class_scores",
    "nearest_candidates",
    "permutation_shapley",
    "permutation_shapley_tiles",
    "replace_until_flip",
]
