"""Data: the synthetic birds, the digits of scikit-learn, and readers for what users have."""

from finecf.data._bird_classes import PARTS
from finecf.data.birds import BirdItem, BirdSettings, SyntheticBirds, config_hash

__all__ = ["PARTS", "BirdItem", "BirdSettings", "SyntheticBirds", "config_hash"]
