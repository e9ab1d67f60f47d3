"""Explainers: which parts of an image decided, and what would have decided otherwise."""

from finecf.explainers.fgvce import FGVCE, PRESETS
from finecf.explainers.result import Edit, Explanation, FGVCEExplanation, Maps, Part, Probabilities, load

__all__ = [
    "FGVCE",
    "PRESETS",
    "Edit",
    "Explanation",
    "FGVCEExplanation",
    "Maps",
    "Part",
    "Probabilities",
    "load",
]
