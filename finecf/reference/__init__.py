"""Plain-torch twins of the compiled operators: the same names, signatures and results, the formulas as they stand.

They are the oracle of the tests (in float64) and serve wherever no compiled operator is loaded. They check nothing:
the public functions in `finecf.ops` do. They know torch alone.
"""

from finecf.reference.regions import compose_regions, rank_masks
from finecf.reference.replacement import (
    best_replacement,
    nearest_candidates,
    replace_until_flip,
    replace_until_flip_factorised,
)
from finecf.reference.shapley import masked_class_scores, permutation_shapley_tiles
from finecf.reference.submodular import submodular_gains

__all__ = [
    "best_replacement",
    "compose_regions",
    "masked_class_scores",
    "nearest_candidates",
    "permutation_shapley_tiles",
    "rank_masks",
    "replace_until_flip",
    "replace_until_flip_factorised",
    "submodular_gains",
]
