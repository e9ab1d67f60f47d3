"""Explainers: which parts of an image decided, and what would have decided otherwise."""

from finecf.explainers.fgvce import FGVCE, PRESETS
from finecf.explainers.result import (
    Edit,
    Explanation,
    FGVCEExplanation,
    Maps,
    Part,
    Probabilities,
    SMDLExplanation,
    load,
)
from finecf.explainers.smdl import SMDL, Interrupted

__all__ = [
    "FGVCE",
    "PRESETS",
    "SMDL",
    "Edit",
    "Explanation",
    "FGVCEExplanation",
    "Interrupted",
    "Maps",
    "Part",
    "Probabilities",
    "SMDLExplanation",
    "load",
]
