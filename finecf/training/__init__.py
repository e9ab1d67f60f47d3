"""Training of the small shipped networks, and reading them back."""

from finecf.models.checkpoints import load_checkpoint, save_checkpoint
from finecf.training.mirror import (
    MirrorRecipe,
    mirror_classifier,
    mirror_data,
    mirror_recipe,
    train_decoder,
    train_mirror,
)
from finecf.training.nets import (
    BirdsNet,
    DigitsNet,
    load_birds_net,
    load_digits_net,
    load_fashion_net,
    shipped_decoder,
    shipped_painter,
)
from finecf.training.repaint import train_painter, train_repainter
from finecf.training.train import predict, train_birds, train_digits, train_fashion

__all__ = [
    "BirdsNet",
    "DigitsNet",
    "MirrorRecipe",
    "load_birds_net",
    "load_checkpoint",
    "load_digits_net",
    "load_fashion_net",
    "mirror_classifier",
    "mirror_data",
    "mirror_recipe",
    "predict",
    "save_checkpoint",
    "shipped_decoder",
    "shipped_painter",
    "train_birds",
    "train_decoder",
    "train_digits",
    "train_fashion",
    "train_mirror",
    "train_painter",
    "train_repainter",
]
