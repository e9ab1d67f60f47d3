"""Blurring, against scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from finecf.regions.baseline import gaussian_blur


@pytest.mark.parametrize("sigma", [0.2, 1.0, 2.5])
def test_a_blur_is_that_of_scipy(sigma):
    images = torch.rand(2, 3, 17, 12, generator=torch.Generator().manual_seed(0))
    radius = max(1, round(3 * sigma))
    own = [ndimage.gaussian_filter(plane, sigma, mode="nearest", radius=radius) for plane in images.flatten(0, 1)]
    torch.testing.assert_close(gaussian_blur(images, sigma).flatten(0, 1), torch.from_numpy(np.stack(own)))


def test_hardly_any_blur_leaves_an_image_as_it_is():
    """The square of such a standard deviation is 0 in single precision."""
    images = torch.rand(1, 1, 5, 5)
    assert torch.equal(gaussian_blur(images, 1e-30), images)


def test_integers_are_not_blurred() -> None:
    with pytest.raises(TypeError, match=r"a blur needs floating images, got torch.uint8"):
        gaussian_blur(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1.0)
