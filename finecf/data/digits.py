"""The handwritten digits that scikit-learn carries."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from finecf.data._files import Sample

TRAIN_DIGITS = 1_000
"""The first so many of the 1,797 digits are the training split, the other 797 the test split."""
SIZE = 32


class Digits(Dataset[Sample]):
    """Handwritten digits; item i is (float32 [3,32,32] in [0,1], three equal channels, label, source). See `digits`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, split: str, first: int) -> None:
        self.images, self.labels, self.split, self.first = images, labels, split, first
        self.class_names = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self) -> torch.Tensor:
        """All digits: float32 [n,3,32,32] in [0,1]."""
        return torch.from_numpy(self.images)[:, None].expand(-1, 3, -1, -1).contiguous()

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        tensor = torch.from_numpy(self.images[index]).expand(3, SIZE, SIZE).contiguous()
        return tensor, int(self.labels[index]), f"digits/{self.first + index}"


def digits(split: str = "test") -> Digits:
    """The 1,797 digits (8 x 8, 17 grey levels, UCI test set) enlarged to 32 x 32 (bicubic), white on black.

    split: "train" (the first 1,000), "test" (the last 797) or "all". Needs scikit-learn; an ImportError says how to
        get it.
    """
    ranges = {"train": (0, TRAIN_DIGITS), "test": (TRAIN_DIGITS, None), "all": (0, None)}
    if split not in ranges:
        raise ValueError(f"split: expected one of {list(ranges)}, got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits: expected scikit-learn, which carries the images; install it: pip install scikit-learn"
        ) from error
    first, last = ranges[split]
    bunch = load_digits()
    small = torch.from_numpy(bunch.images[first:last].astype(np.float32) / 16.0)
    large = torch.nn.functional.interpolate(small[:, None], size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return Digits(large[:, 0].clamp(0, 1).numpy(), bunch.target[first:last].astype(np.int64), split, first)
