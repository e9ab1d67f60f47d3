"""Masked images from label maps and ranks, of every implementation, against copies made region by region.

Pixels are copied, so everything is compared bit by bit: of NaN and of -0.0 too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import cases
import pytest
import sizes
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from finecf import ops

pytestmark = cases.every_implementation

DTYPES = (
    *(torch.uint8, torch.int8, torch.bool, torch.float8_e4m3fn),
    *(torch.int16, torch.uint16, torch.float16, torch.bfloat16),
    *(torch.int32, torch.uint32, torch.float32),
    *(torch.int64, torch.uint64, torch.float64, torch.complex64, torch.complex128),
)

# No output at all is one size more here: CUDA launches nothing for it.
SIZES = [*sizes.REGIONS, sizes.Regions(0, 2, 3, 9, 7, 6)]
each_size = pytest.mark.parametrize("size", SIZES, ids=sizes.names(SIZES))


def bits(values: Tensor) -> Tensor:
    """The same as integers, so that NaN equals itself and -0.0 differs from 0.0."""
    if values.dtype == torch.complex128:
        values = torch.view_as_real(values)
    widths = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(widths[values.element_size()])


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def random_pixels(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Any bits that the type knows: of floats also NaN, infinities and -0.0."""
    rng = cases.generator(seed)
    if dtype == torch.bool:
        return cases.integers(rng, 2, *shape).bool()
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (*shape, size), generator=rng, dtype=torch.uint8)
    return data.view(dtype)[..., 0].to(cases.DEVICE)


def composition(
    size: tuple[int, ...] = (5, 2, 3, 9, 7, 6), dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    outputs, images, channels, height, width, regions = size
    given_sizes = {"outputs": outputs, "images": images, "height": height, "width": width, "regions": regions}
    arguments: dict[str, Any] = cases.composition(**given_sizes, channels=channels, seed=seed)
    arguments["images"] = random_pixels(dtype, images, channels, height, width, seed=seed)
    arguments["baseline"] = random_pixels(dtype, images, channels, height, width, seed=seed + 1)
    return arguments


def masking(
    size: tuple[int, ...] = (5, 2, 3, 9, 7, 6), dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Arguments of `rank_masks`: every rank once in each image, thresholds at both ends and between."""
    arguments = composition(size, dtype, seed)
    outputs, images, _, height, width, _ = size
    pixels = height * width
    rng = cases.generator(seed + 2)
    ranks = [torch.randperm(pixels, generator=rng).view(height, width) for _ in range(images)]
    ends = torch.tensor([0, pixels, pixels + 5, -3], device=cases.DEVICE)
    thresholds = torch.cat([ends, cases.integers(rng, pixels + 1, max(outputs - 4, 0))])[:outputs]
    return {
        "images": arguments["images"],
        "rank": torch.stack(ranks).to(cases.DEVICE, torch.int32),
        "image": arguments["image"],
        "threshold": thresholds.to(torch.int32),
        "baseline": arguments["baseline"],
    }


def outside(baseline: Tensor, images: Tensor) -> Tensor:
    """The baseline of every image, also where it is one colour."""
    if baseline.ndim == 4:
        return baseline
    return baseline[None, :, None, None].expand(images.shape)


def exact_composition(
    images: Tensor, labels: Tensor, image: Tensor, keep: Tensor, baseline: Tensor, complement: bool
) -> Tensor:
    """Each region of each output is copied as a whole, from the one or the other."""
    other = outside(baseline, images)
    results = []
    for reverse in (False, True)[: 1 + complement]:
        for b, row in zip(image.tolist(), keep.tolist(), strict=True):
            out = torch.full_like(images[b], 1)
            for region, kept in enumerate(row):
                where = labels[b] == region
                source = images[b] if kept != reverse else other[b]
                bits_of(out)[:, where] = bits_of(source)[:, where]
            results.append(out)
    return torch.stack(results) if results else images.new_empty(0, *images.shape[1:])


def exact_masks(
    images: Tensor, rank: Tensor, image: Tensor, threshold: Tensor, baseline: Tensor, insert: bool
) -> Tensor:
    other = outside(baseline, images)
    results = []
    for b, limit in zip(image.tolist(), threshold.tolist(), strict=True):
        before, after = (images[b], other[b]) if insert else (other[b], images[b])
        out = after.clone(memory_format=torch.contiguous_format)
        where = rank[b] < limit
        bits_of(out)[:, where] = bits_of(before)[:, where]
        results.append(out)
    return torch.stack(results) if results else images.new_empty(0, *images.shape[1:])


def bits_of(values: Tensor) -> Tensor:
    """A view of the same memory as integers [Ch,H,W,...], since masks cannot index every dtype."""
    if values.dtype == torch.complex128:
        return torch.view_as_real(values)
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


# ---- compose_regions


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64], ids=str)
@each_size
def test_compositions_match_their_definition(size: sizes.Regions, dtype: torch.dtype) -> None:
    arguments = composition(size, dtype)
    for colour in (False, True):
        if colour:
            arguments["baseline"] = arguments["baseline"][0, :, 0, 0].clone()
        for complement in (False, True):
            exact = exact_composition(**arguments, complement=complement)
            for channels_last in (False, True):
                result = ops.compose_regions(**arguments, complement=complement, channels_last=channels_last)
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert result.is_contiguous(memory_format=layout)
                assert same_bits(result, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype(dtype: torch.dtype) -> None:
    arguments, masks = composition(dtype=dtype), masking(dtype=dtype)
    for colour in (False, True):
        if colour:
            arguments["baseline"] = masks["baseline"] = arguments["baseline"][0, :, 0, 0].clone()
        for last in (False, True):
            result = ops.compose_regions(**arguments, complement=True, channels_last=last)
            assert same_bits(result, exact_composition(**arguments, complement=True))
        for insert in (False, True):
            assert same_bits(ops.rank_masks(**masks, insert=insert), exact_masks(**masks, insert=insert))


def test_bits_are_copied_not_values() -> None:
    """NaN with a payload, -0.0 and infinities arrive as they are."""
    arguments = composition(dtype=torch.float32)
    payload = torch.tensor([0x7FC00123, -0x800000, -(2**31), 0x7F800000, 1], dtype=torch.int32, device=cases.DEVICE)
    for name, shift in (("images", 0), ("baseline", 2)):
        arguments[name] = payload.roll(shift).repeat(76)[: 2 * 3 * 9 * 7].view(torch.float32).view(2, 3, 9, 7)
    assert arguments["images"].isnan().any()
    result = ops.compose_regions(**arguments, complement=True)
    assert same_bits(result, exact_composition(**arguments, complement=True))


def test_all_regions_and_none() -> None:
    arguments = composition((4, 2, 3, 9, 7, 6), torch.int64)
    for kept in (False, True):
        arguments["keep"] = torch.full((4, 6), kept, device=cases.DEVICE)
        result = ops.compose_regions(**arguments, complement=True)
        shown, hidden = arguments["images"][arguments["image"]], arguments["baseline"][arguments["image"]]
        assert torch.equal(result, torch.cat([shown, hidden] if kept else [hidden, shown]))


def test_a_region_without_pixels_changes_nothing() -> None:
    arguments = composition((4, 2, 3, 9, 7, 3), torch.int32)
    plain = ops.compose_regions(**arguments)
    arguments["keep"] = torch.cat([arguments["keep"], ~arguments["keep"]], 1)
    assert torch.equal(ops.compose_regions(**arguments), plain)


def test_complement_is_the_choice_reversed() -> None:
    arguments = composition((7, 2, 3, 13, 11, 6), torch.int64)
    both = ops.compose_regions(**arguments, complement=True)
    assert torch.equal(both[:7], ops.compose_regions(**arguments))
    arguments["keep"] = ~arguments["keep"]
    assert torch.equal(both[7:], ops.compose_regions(**arguments))


def test_layouts_of_the_arguments_do_not_matter() -> None:
    for dtype in (torch.bool, torch.int16, torch.float32, torch.float64):
        arguments, masks = composition(dtype=dtype), masking(dtype=dtype)
        views = {name: cases.strided(each) for name, each in arguments.items()}
        last = arguments | {
            name: arguments[name].contiguous(memory_format=torch.channels_last) for name in ("images", "baseline")
        }
        half_last = last | {"images": arguments["images"]}
        for channels_last in (False, True):
            plain = ops.compose_regions(**arguments, complement=True, channels_last=channels_last)
            for other in (views, last, half_last):
                result = ops.compose_regions(**other, complement=True, channels_last=channels_last)
                assert same_bits(result, plain)
                assert result.stride() == plain.stride()
        for insert in (False, True):
            plain = ops.rank_masks(**masks, insert=insert)
            strides = {name: cases.strided(each) for name, each in masks.items()}
            again = masks | {"images": masks["images"].contiguous(memory_format=torch.channels_last)}
            for other in (strides, again):
                assert same_bits(ops.rank_masks(**other, insert=insert), plain)


def test_one_image_repeated_without_being_copied() -> None:
    arguments = composition((4, 1, 3, 9, 7, 6))
    repeated = {
        name: arguments[name].expand(3, *arguments[name].shape[1:]) for name in ("images", "labels", "baseline")
    }
    image = torch.tensor([0, 2, 1, 2], device=cases.DEVICE)
    once = ops.compose_regions(**arguments)
    assert same_bits(ops.compose_regions(**arguments | repeated | {"image": image}), once)
    # One colour, one grey value for all channels.
    grey = torch.tensor([0.25], device=cases.DEVICE).expand(3)
    result = ops.compose_regions(**arguments | {"baseline": grey})
    assert same_bits(result, exact_composition(**arguments | {"baseline": grey}, complement=False))


def test_outputs_in_chunks_on_any_number_of_threads() -> None:
    arguments = composition((17, 3, 3, 33, 31, 12))
    whole = ops.compose_regions(**arguments, complement=True)
    masks = masking((17, 3, 3, 33, 31, 12))
    masked = ops.rank_masks(**masks)
    for threads, count in ((1, 1), (2, 5), (3, 16)):
        torch.set_num_threads(threads)
        assert same_bits(ops.compose_regions(**arguments, complement=True), whole)
        assert same_bits(ops.rank_masks(**masks), masked)
        for rows in torch.arange(17, device=cases.DEVICE).split(count):
            part = arguments | {name: arguments[name][rows] for name in ("image", "keep")}
            assert same_bits(ops.compose_regions(**part, complement=True), torch.cat([whole[rows], whole[17 + rows]]))
            part = masks | {name: masks[name][rows] for name in ("image", "threshold")}
            assert same_bits(ops.rank_masks(**part), masked[rows])


@pytest.mark.parametrize("integer", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_integers_of_any_width(integer: torch.dtype) -> None:
    arguments, masks = composition(), masking((5, 2, 3, 9, 7, 6))
    narrow = {name: arguments[name].to(integer) for name in ("labels", "image")}
    assert same_bits(ops.compose_regions(**arguments | narrow), ops.compose_regions(**arguments))
    masks["threshold"] = masks["threshold"].clamp_min(0)
    narrow = {name: masks[name].to(integer) for name in ("rank", "image", "threshold")}
    assert same_bits(ops.rank_masks(**masks | narrow), ops.rank_masks(**masks))


def test_arguments_are_left_as_they_are() -> None:
    for operator, arguments in ((ops.compose_regions, composition()), (ops.rank_masks, masking())):
        copies = {name: each.clone() for name, each in arguments.items()}
        result: Tensor = operator(**arguments)
        result.fill_(7)  # not a view of an argument either
        assert all(same_bits(arguments[name], each) for name, each in copies.items())


def test_empty_in_empty_out() -> None:
    for size in ((0, 2, 3, 9, 7, 6), (0, 0, 3, 9, 7, 6), (4, 2, 0, 9, 7, 6), (4, 2, 3, 0, 7, 6), (4, 2, 3, 9, 0, 0)):
        outputs, _, *shape, _ = size
        arguments = composition((4, 2, 3, 9, 7, 6))
        arguments = {
            "images": torch.zeros(size[1], *shape),
            "labels": torch.zeros(size[1], *shape[1:], dtype=torch.int32),
            "image": torch.zeros(outputs, dtype=torch.int64),
            "keep": torch.zeros(outputs, size[5], dtype=torch.bool),
            "baseline": torch.zeros(size[1], *shape),
        }
        arguments = {name: each.to(cases.DEVICE) for name, each in arguments.items()}
        for baseline in (arguments["baseline"], torch.zeros(shape[0], device=cases.DEVICE)):
            for last in (False, True):
                given_all = arguments | {"baseline": baseline, "channels_last": last}
                assert ops.compose_regions(**given_all).shape == (outputs, *shape)
                assert ops.compose_regions(**given_all, complement=True).shape == (2 * outputs, *shape)
            masked = ops.rank_masks(
                arguments["images"],
                arguments["labels"],
                arguments["image"],
                torch.zeros(outputs, dtype=torch.int32, device=cases.DEVICE),
                baseline,
            )
            assert masked.shape == (outputs, *shape)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_compositions_of_every_shape(data: st.DataObject) -> None:
    size = tuple(data.draw(st.integers(low, high)) for low, high in ((0, 6), (1, 3), (1, 5), (1, 9), (1, 40), (1, 9)))
    arguments = composition(size, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 1000)))
    if data.draw(st.booleans()):  # regions in one piece, as superpixels are: long runs
        arguments["labels"] = arguments["labels"].sort(-1).values
    if data.draw(st.booleans()):
        arguments["baseline"] = arguments["baseline"][0, :, 0, 0].clone()
    complement, last = data.draw(st.booleans()), data.draw(st.booleans())
    result = ops.compose_regions(**arguments, complement=complement, channels_last=last)
    assert same_bits(result, exact_composition(**arguments, complement=complement))


# ---- rank_masks


@pytest.mark.parametrize("insert", [True, False])
@each_size
def test_masks_match_their_definition(size: sizes.Regions, insert: bool) -> None:
    for dtype in (torch.uint8, torch.float32, torch.float64):
        arguments = masking(size, dtype)
        result = ops.rank_masks(**arguments, insert=insert)
        assert result.is_contiguous()
        assert same_bits(result, exact_masks(**arguments, insert=insert))
        arguments["baseline"] = arguments["baseline"][0, :, 0, 0].clone()
        assert same_bits(ops.rank_masks(**arguments, insert=insert), exact_masks(**arguments, insert=insert))


def test_as_many_pixels_are_shown_as_were_asked_for() -> None:
    arguments = masking((13, 2, 3, 9, 7, 6))
    arguments["images"] = torch.ones(2, 3, 9, 7, device=cases.DEVICE)
    arguments["baseline"] = torch.zeros(3, device=cases.DEVICE)
    counts = [0, 63, 63, 0, *arguments["threshold"][4:].tolist()]
    inserted, deleted = (ops.rank_masks(**arguments, insert=insert) for insert in (True, False))
    assert inserted.sum((2, 3)).tolist() == [[float(count)] * 3 for count in counts]
    assert torch.equal(inserted + deleted, torch.ones_like(inserted))


def test_ranks_may_repeat_and_be_negative() -> None:
    arguments = masking((17, 2, 3, 9, 7, 6))
    rng = cases.generator(9)
    arguments["rank"] = cases.integers(rng, 5, 2, 9, 7, low=-5).int()
    arguments["rank"][0, 0, 0], arguments["rank"][0, 0, 1] = 2**31 - 1, -(2**31)
    arguments["threshold"] = cases.integers(rng, 6, 17, low=-6).int()
    arguments["threshold"][0], arguments["threshold"][1] = 2**31 - 1, -(2**31)
    for insert in (True, False):
        assert same_bits(ops.rank_masks(**arguments, insert=insert), exact_masks(**arguments, insert=insert))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_masks_of_every_shape(data: st.DataObject) -> None:
    """Deletion is insertion with the image and the baseline exchanged; both are as defined."""
    size = tuple(data.draw(st.integers(low, high)) for low, high in ((0, 6), (1, 3), (1, 5), (1, 9), (1, 40)))
    arguments = masking((*size, 2), data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 1000)))
    inserted = ops.rank_masks(**arguments)
    assert same_bits(inserted, exact_masks(**arguments, insert=True))
    exchanged = arguments | {"images": arguments["baseline"], "baseline": arguments["images"]}
    assert same_bits(inserted, ops.rank_masks(**exchanged, insert=False))


# ---- bad arguments

OPERATORS: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], dict[str, str]]] = {
    "compose_regions": (
        ops.compose_regions,
        composition,
        {"images": "B, K, H, W", "labels": "B, H, W", "image": "N", "keep": "N, M", "baseline": "B, K, H, W"},
    ),
    "rank_masks": (
        ops.rank_masks,
        masking,
        {"images": "B, K, H, W", "rank": "B, H, W", "image": "N", "threshold": "N", "baseline": "B, K, H, W"},
    ),
}
ARGUMENTS = [(operator, name) for operator, (_, _, tensors) in OPERATORS.items() for name in tensors]


def refusal(operator: str, changes: dict[str, Any], kind: type[Exception] = ValueError) -> str:
    function, good, _ = OPERATORS[operator]
    with pytest.raises(kind) as caught:
        function(**good() | changes)
    message = str(caught.value)
    assert message.startswith(f"finecf.ops.{operator}: ")
    assert "; " in message
    return message.removeprefix(f"finecf.ops.{operator}: ")


@pytest.mark.parametrize(("operator", "name"), ARGUMENTS)
def test_wrong_shapes_are_refused(operator: str, name: str) -> None:
    _, good, tensors = OPERATORS[operator]
    value: Tensor = good()[name]
    for wrong in (value[None], value[0]):
        message = refusal(operator, {name: wrong})
        assert message.startswith(f"{name} must have shape [{tensors[name]}], got {list(wrong.shape)}; ")
    for axis in range(value.ndim):
        if (name, axis) == ("keep", 1):
            continue  # as many regions as one likes
        grown = torch.cat([value, value.narrow(axis, 0, 1)], axis)
        message = refusal(operator, {name: grown})
        assert re.match(r"\w+ must have shape \[[A-Z, ]+\] with [A-Z] = \d+ \(.*\), got \[.*\]; ", message)
        if name != "images" and (name, axis) != ("image", 0):
            assert message.startswith(f"{name} ")
            assert f", got {list(grown.shape)}; " in message


def test_baselines_of_one_colour_have_as_many_values_as_channels() -> None:
    for operator in OPERATORS:
        message = refusal(operator, {"baseline": torch.zeros(4, device=cases.DEVICE)})
        assert message.startswith("baseline must have shape [K] with K = 3 (K as in images), got [4]; ")
        message = refusal(operator, {"baseline": torch.zeros(3, 9, 7, device=cases.DEVICE)})
        assert message.startswith("baseline must have shape [B, K, H, W], got [3, 9, 7]; ")


@pytest.mark.parametrize(("operator", "name"), ARGUMENTS)
def test_wrong_kinds_are_refused(operator: str, name: str) -> None:
    value: Tensor = OPERATORS[operator][1]()[name]
    assert refusal(operator, {name: value.tolist()}, TypeError).startswith(f"{name} must be a tensor, got list; ")
    assert re.search(r"\w+ must be on .* like \w+, got .*; move it with", refusal(operator, {name: value.to("meta")}))
    if name in ("images", "baseline"):
        wrong = value.double()
        message = refusal(operator, {name: wrong}, TypeError)
        assert re.match(r"baseline must be torch\.\w+ like the images, got torch\.\w+; use baseline\.to\(", message)
        message = refusal(operator, {name: value.clone().requires_grad_()})
        assert message.startswith(f"{name} requires grad, but no gradient flows through this operator; use {name}.det")
    else:
        kind = "booleans" if value.dtype == torch.bool else "integers"
        message = refusal(operator, {name: value.double()}, TypeError)
        assert message.startswith(f"{name} must hold {kind}, got torch.float64; use {name}.")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_out_of_range_are_refused(data: st.DataObject) -> None:
    operator, name, size, what = data.draw(
        st.sampled_from(
            [
                ("compose_regions", "labels", 6, "regions (columns of keep)"),
                ("compose_regions", "image", 2, "images"),
                ("rank_masks", "image", 2, "images"),
            ]
        )
    )
    value: Tensor = OPERATORS[operator][1]()[name].long()
    bad = data.draw(st.one_of(st.integers(-(2**31), -1), st.integers(size, 2**31 - 1)))
    value.view(-1)[data.draw(st.integers(0, value.numel() - 1))] = bad
    expected = f"{name} must lie in 0..{size - 1} ({size} {what}), got {bad}; "
    assert refusal(operator, {name: value}).startswith(expected)


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1, 2**62])
def test_integers_that_do_not_fit_are_refused(number: int) -> None:
    """They would wrap round to a label or a rank that exists."""
    for operator, name in (("compose_regions", "labels"), ("rank_masks", "rank"), ("rank_masks", "threshold")):
        value: Tensor = OPERATORS[operator][1]()[name].long()
        value.view(-1)[-1] = number
        low, high = min(number, int(value.min())), max(number, int(value.max()))
        expected = f"{name} must fit torch.int32, got values from {low} to {high}; "
        assert refusal(operator, {name: value}).startswith(expected)


def test_direct_calls_are_checked_too(implementation: str) -> None:
    """A call past the wrapper is refused, not read out of bounds."""
    if implementation == "reference":
        pytest.skip("about the compiled operators")
    for operator, flags, names in (
        ("compose_regions", {"complement": False, "channels_last": False}, ["labels", "keep"]),
        ("rank_masks", {"insert": True}, ["rank", "threshold"]),
    ):
        arguments = OPERATORS[operator][1]() | flags
        call = getattr(torch.ops.finecf, operator)
        assert call(**arguments).shape == (5, 3, 9, 7)
        changes = [(name, arguments[name][..., 1:]) for name in names if name != "keep"]
        changes += [(name, arguments[name].double()) for name in (*names, "image", "baseline")]
        changes += [("keep", arguments[name][1:]) for name in names if name == "keep"]
        changes += [("images", arguments["images"][0]), ("image", arguments["image"][None])]
        changes += [("baseline", arguments["baseline"][:, 1:]), ("baseline", arguments["baseline"][0, :2, 0, 0])]
        if cases.DEVICE.type == "cpu":  # values on a device are not looked at past the wrapper
            changes += [("image", arguments["image"] + 2), ("image", arguments["image"] - 2)]
            if operator == "compose_regions":
                changes += [("labels", arguments["labels"] + 6), ("labels", arguments["labels"] - 6)]
        for name, bad in changes:
            with pytest.raises(RuntimeError, match=f"{operator}: {name} must"):
                call(**arguments | {name: bad})
        wide = {name: arguments[name].to(torch.complex128) for name in ("images", "baseline")}
        with pytest.raises(RuntimeError, match="images must have elements of 1, 2, 4 or 8 bytes, got ComplexDouble"):
            call(**arguments | wide)
    assert math.isfinite(float(ops.compose_regions(**composition(dtype=torch.uint8)).sum()))
