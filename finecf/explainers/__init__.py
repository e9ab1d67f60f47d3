"""Explainers: which parts of an image decided, and what would have decided otherwise."""

from finecf.explainers._latent_path import ClassDistances, LatentPath
from finecf.explainers._training import TrainingStopped
from finecf.explainers._trim import JUST_ACROSS, Trimmed, trim
from finecf.explainers.fgvce import FGVCE, PRESETS
from finecf.explainers.mirror_cfe import MirrorCFE
from finecf.explainers.repaint import Repainted, Repainter
from finecf.explainers.result import (
    Edit,
    Explanation,
    FGVCEExplanation,
    Interrupted,
    Maps,
    MirrorExplanation,
    Part,
    Probabilities,
    SMDLExplanation,
    load,
)
from finecf.explainers.smdl import SMDL

__all__ = [
    "FGVCE",
    "JUST_ACROSS",
    "PRESETS",
    "SMDL",
    "ClassDistances",
    "Edit",
    "Explanation",
    "FGVCEExplanation",
    "Interrupted",
    "LatentPath",
    "Maps",
    "MirrorCFE",
    "MirrorExplanation",
    "Part",
    "Probabilities",
    "Repainted",
    "Repainter",
    "SMDLExplanation",
    "TrainingStopped",
    "Trimmed",
    "load",
    "trim",
]
