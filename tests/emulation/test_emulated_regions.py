"""The CUDA kernels of `compose_regions` and `rank_masks`, on the host, against copies made pixel by pixel."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import sizes
from emulation.unmapped import unmapped_entry

VERSIONS = ["naive", "fast"]
TYPES = [np.uint8, np.bool_, np.int8, np.uint16, np.float16, np.float32, np.uint32, np.int64, np.float64, np.complex64]
each_size = pytest.mark.parametrize("size", sizes.REGIONS, ids=sizes.names(sizes.REGIONS))


def composition(
    outputs: int, images: int, channels: int, height: int, width: int, regions: int, dtype: Any = np.float32
) -> dict[str, Any]:
    rng = np.random.default_rng(outputs * 1000 + width)

    def pixels() -> np.ndarray:
        """Any bits; the images are [B, Ch, H, W]."""
        if dtype == np.bool_:
            return rng.random((images, channels, height, width)) < 0.5
        size = np.dtype(dtype).itemsize
        raw = rng.integers(0, 256, (images, channels, height, width * size), dtype=np.uint8)
        return raw.view(dtype)

    return {
        "images": pixels(),
        "labels": rng.integers(0, regions, (images, height, width)).astype(np.int32),
        "image": rng.integers(0, images, outputs),
        "keep": rng.random((outputs, regions)) < 0.5,
        "baseline": pixels(),
    }


def masking(outputs: int, images: int, channels: int, height: int, width: int, dtype: Any = np.float32) -> dict:
    arguments = composition(outputs, images, channels, height, width, 2, dtype)
    rng = np.random.default_rng(outputs)
    count = height * width
    ranks = [rng.permutation(count).reshape(height, width) for _ in range(images)]
    return {
        "images": arguments["images"],
        "rank": np.stack(ranks).astype(np.int32),
        "image": arguments["image"],
        "threshold": np.concatenate([[0, count, -1], rng.integers(0, count + 1, outputs)])[:outputs].astype(np.int32),
        "baseline": arguments["baseline"],
    }


def shown(p: dict[str, Any], kept: np.ndarray) -> np.ndarray:
    """Outputs [., Ch, H, W] from which pixels [., H, W] are kept; rows beyond the images asked for begin anew."""
    baseline = p["baseline"]
    if baseline.ndim == 1:
        baseline = np.broadcast_to(baseline[:, None, None], p["images"].shape)
    out = np.empty((len(kept), *p["images"].shape[1:]), p["images"].dtype)
    for i, mask in enumerate(kept):
        b = p["image"][i % len(p["image"])]
        out[i][:, mask] = p["images"][b][:, mask]
        out[i][:, ~mask] = baseline[b][:, ~mask]
    return out


def expected_composition(p: dict[str, Any], complement: bool) -> np.ndarray:
    kept = np.stack([row[p["labels"][b]] for b, row in zip(p["image"], p["keep"], strict=True)])
    return shown(p, np.concatenate([kept, ~kept]) if complement else kept)


def expected_masks(p: dict[str, Any], insert: bool) -> np.ndarray:
    before = p["rank"][p["image"]] < p["threshold"][:, None, None]
    return shown(p, before if insert else ~before)


def compose(emulated: ModuleType, p: dict[str, Any], complement: bool, last: bool = False, **plan: Any) -> np.ndarray:
    """With `last` the arrays go in and come out as channels-last images lie in memory."""
    if last:
        p = p | {name: p[name].transpose(0, 2, 3, 1) for name in ("images", "baseline") if p[name].ndim == 4}
    out = emulated.compose_regions(*p.values(), complement, last, emulated.Plan(**plan))
    return out.transpose(0, 3, 1, 2) if last else out


def same_bits(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert np.ascontiguousarray(one).tobytes() == np.ascontiguousarray(other).tobytes()


def one_colour(p: dict[str, Any]) -> dict[str, Any]:
    return p | {"baseline": p["baseline"][0, :, 0, 0].copy()}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@each_size
def test_compositions(emulated: ModuleType, size: sizes.Regions, last: bool, version: str) -> None:
    p = composition(*size)
    for complement in (False, True):
        for each in (p, one_colour(p)):
            expected = expected_composition(each, complement)
            for seed in sizes.SEEDS:
                same_bits(compose(emulated, each, complement, last, version=version, seed=seed), expected)
    assert emulated.kernels() == ["compose_naive" if version == "naive" else "compose_pixels"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_elements_of_any_width(emulated: ModuleType, dtype: Any, version: str) -> None:
    p, masks = composition(3, 2, 3, 7, 9, 6, dtype), masking(5, 2, 3, 7, 9, dtype)
    for last in (False, True):
        got = compose(emulated, p, complement=True, last=last, version=version)
        same_bits(got, expected_composition(p, complement=True))
    for insert in (True, False):
        got = emulated.rank_masks(*masks.values(), insert, emulated.Plan())
        same_bits(got, expected_masks(masks, insert))


def test_more_regions_than_shared_memory_holds(emulated: ModuleType) -> None:
    """At the limit the choice is staged, one region beyond it is looked up anew: the same pixels."""
    p = composition(3, 2, 3, 7, 9, 40)
    staged = compose(emulated, p, complement=True, shared_limit=40)
    assert emulated.kernels() == ["compose_pixels"]
    unstaged = compose(emulated, p, complement=True, shared_limit=39)
    assert emulated.kernels() == ["compose_naive"]
    same_bits(staged, unstaged)
    same_bits(staged, expected_composition(p, complement=True))


@pytest.mark.parametrize("insert", [True, False])
@each_size
def test_masks(emulated: ModuleType, size: sizes.Regions, insert: bool) -> None:
    p = masking(*size[:-1])
    for each in (p, one_colour(p)):
        for seed in sizes.SEEDS:
            got = emulated.rank_masks(*each.values(), insert, emulated.Plan(seed=seed))
            same_bits(got, expected_masks(each, insert))
    assert emulated.kernels() == ["mask_ranks"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bad_image_is_an_error_that_says_where(emulated: ModuleType, version: str) -> None:
    p = composition(3, 2, 3, 7, 9, 6)
    p["image"][1] = unmapped_entry(p["image"])
    where = r"kernel compose_\w+, block .*, thread .*: access to .* outside every array"
    with pytest.raises(RuntimeError, match=where):
        compose(emulated, p, complement=False, version=version)
    masks = masking(3, 2, 3, 7, 9)
    masks["image"][1] = unmapped_entry(masks["image"])
    with pytest.raises(RuntimeError, match=r"kernel mask_ranks, block .*, thread .*: access to .* outside every array"):
        emulated.rank_masks(*masks.values(), True, emulated.Plan())


def test_arrays_that_do_not_fit_are_refused(emulated: ModuleType) -> None:
    p = composition(3, 2, 3, 7, 9, 6)
    with pytest.raises(ValueError, match=r"labels must have shape \[2, 7, 9\], got \[2, 7, 8\]"):
        compose(emulated, p | {"labels": p["labels"][..., 1:]}, complement=False)
    with pytest.raises(ValueError, match=r"baseline must have shape \[3\], got \[2\]"):
        compose(emulated, p | {"baseline": np.zeros(2, np.float32)}, complement=False)
    wide = {name: np.zeros(p[name].shape, np.complex128) for name in ("images", "baseline")}
    with pytest.raises(TypeError, match="elements of 1, 2, 4 or 8 bytes, got complex128"):
        compose(emulated, p | wide, complement=False)
