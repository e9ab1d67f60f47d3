"""The mapping network of Mirror-CFE: its sizes, what it may change, and its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models.small_nets import DEVICE, PooledNet, images, seeded
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finecf
from finecf.models.checkpoints import SHIPPED
from finecf.models.decoder import (
    EDITORS,
    MirrorDecoder,
    PatchDiscriminator,
    Shape,
    load_decoder,
    save_decoder,
    shape_of,
)

SMALL: dict[str, Any] = {"width": 4, "most": 8, "inner": 4}
SHAPES = {
    "28 px": Shape((6, 7, 7), (1, 28, 28), ()),
    "28 px, skip": Shape((6, 7, 7), (1, 28, 28), ((3, 14, 14),)),
    "32 px": Shape((6, 8, 8), (3, 32, 32), ()),
    "32 px, skip at full size": Shape((6, 4, 4), (3, 32, 32), ((2, 32, 32), (3, 8, 8))),
    "64 px": Shape((6, 2, 2), (3, 64, 64), ()),
    "64 px, skips": Shape((6, 4, 4), (3, 64, 64), ((4, 32, 32), (5, 16, 16))),
    "128 px": Shape((6, 8, 8), (3, 128, 128), ()),
    "128 px, skips": Shape((6, 8, 8), (3, 128, 128), ((4, 32, 32), (5, 16, 16))),
    "224 px": Shape((6, 7, 7), (3, 224, 224), ()),
    "224 px, skips": Shape((6, 7, 7), (3, 224, 224), ((3, 56, 56), (4, 28, 28), (5, 14, 14))),
    "odd": Shape((6, 3, 4), (2, 33, 47), ()),
    "odd, skips": Shape((6, 3, 4), (2, 33, 47), ((3, 17, 24), (4, 9, 12), (5, 5, 6))),
    "one cell": Shape((6, 1, 1), (3, 8, 8), ((3, 4, 4),)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def decoder(shape: Shape, seed: int = 0, **settings: Any) -> MirrorDecoder:
    """A decoder in eval mode; its editors are not at their start, where they edit nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = MirrorDecoder(shape, **SMALL | settings)
        for editor in net.editors:
            nn.init.normal_(editor.draw.weight, std=0.5)
            nn.init.normal_(editor.draw.bias)
    return net.eval().requires_grad_(False).to(DEVICE)


def maps_of(shape: Shape, count: int = 2, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(count, *sizes, generator=generator).to(DEVICE) for sizes in (shape.features, *shape.skips)]
    return drawn[0], drawn[1:]


def seen_at_the_stages(net: MirrorDecoder, *arguments: Any) -> dict[int, Tensor]:
    """What each skip level gives to the decoder in a forward."""
    seen: dict[int, Tensor] = {}
    handles = []
    for stage, number in enumerate(net.skip_at):
        if number is not None:
            channels = net.shape.skips[number][0]
            handles.append(
                net.stages[stage - 1].register_forward_pre_hook(
                    lambda _, inputs, number=number, channels=channels: seen.__setitem__(
                        number, inputs[0][:, -channels:].clone()
                    )
                )
            )
    net(*arguments)
    for handle in handles:
        handle.remove()
    return seen


# ---- sizes and values


@every_shape
def test_images_have_the_size_asked_for(shape: Shape) -> None:
    net = decoder(shape)
    features, skips = maps_of(shape)
    prepared = net.prepare(skips)
    assert [tuple(each.shape) for each in prepared] == [(2, 4, *shape.features[1:])] * len(skips)
    prior = torch.ones(2, *shape.features[1:], device=DEVICE)
    drawn = net(features, skips, prepared, prior)
    assert drawn.shape == (2, *shape.image)
    assert float(drawn.std()) > 0
    assert [number for number in net.skip_at if number is not None] == list(range(len(skips)))[::-1]
    for small, large in zip(net.sizes, net.sizes[1:], strict=False):
        assert small[0] <= large[0] <= 3 * small[0]
        assert small[1] <= large[1] <= 3 * small[1]
    # In eval mode an image does not depend on the others.
    alone = net(features[1:], [each[1:] for each in skips], [each[1:] for each in prepared], prior[1:])
    torch.testing.assert_close(alone, drawn[1:], rtol=0, atol=1e-5)


@every_shape
def test_gradients_reach_the_map_and_every_parameter(shape: Shape) -> None:
    net = decoder(shape).requires_grad_(True).train()
    features, skips = maps_of(shape)
    features.requires_grad_()
    net(
        features, skips, net.prepare(skips), torch.ones(2, *shape.features[1:], device=DEVICE)
    ).square().sum().backward()
    assert float(features.grad.abs().sum()) > 0
    missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
    assert missing == []


@pytest.mark.parametrize("name", ["28 px, skip", "64 px, skips", "128 px"])
def test_pixels_drawn_in_blocks(name: str) -> None:
    """The stages end at half the size, the image has all of its pixels, and no block is one colour."""
    shape = SHAPES[name]
    net = decoder(shape, subpixel=2)
    features, skips = maps_of(shape)
    drawn = net(features, skips, net.prepare(skips))
    assert drawn.shape == (2, *shape.image)
    assert net.sizes[-1] == (shape.image[1] // 2, shape.image[2] // 2)
    blocks = nn.functional.pixel_unshuffle(drawn, 2).unflatten(1, (shape.image[0], 4))
    assert float(blocks.std(2).min()) > 0


def test_the_pooled_map_reaches_every_cell() -> None:
    """What one cell holds is seen everywhere; without it, only as far as the convolutions reach."""
    shape = Shape((6, 16, 16), (3, 32, 32), ((3, 32, 32),))
    features, skips = maps_of(shape)
    moved = features.clone()
    moved[:, :, 0, 0] += 30
    for pooled in (True, False):
        net = decoder(shape, pooled=pooled)
        prepared = net.prepare(skips)
        change = (net(moved, skips, prepared) - net(features, skips, prepared)).abs().amax((0, 1))
        assert float(change[0, 0]) > 0
        assert (float(change[-4:, -4:].max()) > 0) == pooled


@pytest.mark.parametrize(
    "bounds", [(0.0, 1.0), (-1, 1), (0, 255), ([-2.1, -2.0, -1.8], [2.2, 2.4, 2.6]), (-0.5, [0.5, 1.0, 2.0])]
)
def test_the_image_range_is_kept(bounds: tuple[Any, Any]) -> None:
    shape = SHAPES["32 px"]
    net = decoder(shape, image_range=bounds)
    low, high = (torch.as_tensor(each, dtype=torch.float32).expand(3)[:, None, None].to(DEVICE) for each in bounds)
    features, _ = maps_of(shape, 3)
    for scale, wanted in ((1e4, None), (1.0, None), (0.0, 0.5)):
        if wanted is not None:
            nn.init.zeros_(net.to_image.weight)
            nn.init.zeros_(net.to_image.bias)
        drawn = net(features * scale)
        assert bool((drawn >= low).all())
        assert bool((drawn <= high).all())
        if wanted is not None:
            torch.testing.assert_close(drawn, (low + wanted * (high - low)).expand_as(drawn))
    for sign, bound in ((-1, low), (1, high)):  # both ends can be drawn
        nn.init.constant_(net.to_image.bias, sign * 100.0)
        torch.testing.assert_close(net(features), bound.expand(3, *shape.image))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_range": (1.0, 0.0)}, r"image_range must be \(least, largest\) with least < largest"),
        ({"image_range": (0.0, [1.0, 0.0, 1.0])}, r"least < largest"),
        ({"prior_range": (0.6, 0.4)}, r"prior_range must be \(least, largest\) threshold between 0 and 1"),
        ({"prior_range": (0.1, 1.4)}, r"between 0 and 1; got \(0\.1, 1\.4\)"),
        ({"editor": "blend"}, r"editor must be one of residual, replace, local; got 'blend'"),
        ({"output": "both"}, r"output must be one of image, change; got 'both'"),
        ({"prior": "cam"}, r"prior must be one of activation, contrast; got 'cam'"),
        ({"subpixel": 3}, r"subpixel must be at least 1 and divide the image's sides \[32, 32\]; got 3"),
        ({"subpixel": 0}, "subpixel must be at least 1"),
        ({"subpixel": 8}, r"subpixel 8 leaves images of \[32, 32\] fewer places than the map has, \[8, 8\]"),
        ({"prior": "contrast"}, 'prior="contrast" has nothing to mask'),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MirrorDecoder(SHAPES["32 px"], **SMALL | settings)


def test_a_double_map_is_drawn_in_single_precision() -> None:
    shape = SHAPES["64 px, skips"]
    net = decoder(shape)
    features, skips = maps_of(shape)
    prior = torch.ones(2, 4, 4, device=DEVICE)
    wide = [each.double() for each in skips]
    drawn = net(features.double(), wide, net.prepare(wide), prior.double())
    torch.testing.assert_close(drawn, net(features, skips, net.prepare(skips), prior))


# ---- skips and the prior


@pytest.mark.parametrize("name", ["224 px, skips", "odd, skips", "32 px, skip at full size"])
@pytest.mark.parametrize("editor", EDITORS)
def test_the_prior_says_where_the_skip_may_be_edited(name: str, editor: str) -> None:
    """Outside the mask the source's own map goes through, to the bit; inside there is what the editor draws."""
    shape = SHAPES[name]
    net = decoder(shape, editor=editor)
    features, skips = maps_of(shape)
    prepared = net.prepare(skips)
    prior = (torch.rand(2, *shape.features[1:], generator=torch.Generator().manual_seed(3)) < 0.4).float().to(DEVICE)
    seen = seen_at_the_stages(net, features, skips, prepared, prior)
    free = seen_at_the_stages(net, features, skips, prepared, None)
    assert set(seen) == set(range(len(skips)))
    for number, (_, height, width) in enumerate(shape.skips):
        rows = torch.arange(height) * shape.features[1] // height
        columns = torch.arange(width) * shape.features[2] // width
        inside = prior[:, rows][:, :, columns].bool()[:, None].expand_as(seen[number])
        assert torch.equal(seen[number][~inside], skips[number][~inside])
        assert torch.equal(seen[number][inside], free[number][inside])
        drawn = net.editors[number](prepared[number], features)
        wanted = drawn if editor == "replace" else drawn + skips[number]
        torch.testing.assert_close(free[number], wanted)
        assert float((free[number] - skips[number]).abs().min(1).values.max()) > 0


def test_a_change_is_added_under_the_prior_and_fades_within_half_a_cell() -> None:
    shape = SHAPES["64 px, skips"]
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    moved, start = image.flip(0).flip(2), image.flip(3)
    prior = torch.zeros(2, 4, 4, device=DEVICE)
    prior[:, 1, 2] = 1
    assert torch.equal(decoder(shape).shown(image, moved, start, prior), moved)
    net = decoder(shape, output="change")
    whole = (image + moved - start).clamp(0, 1)
    torch.testing.assert_close(net.shown(image, moved, start), whole)
    torch.testing.assert_close(net.shown(image, moved, start, torch.ones_like(prior)), whole)
    shown = net.shown(image, moved, start, prior)
    assert torch.equal(net.shown(image, moved, moved, prior), image)
    torch.testing.assert_close(shown[:, :, 23:25, 39:41], whole[:, :, 23:25, 39:41], atol=0.1, rtol=0)
    outside = torch.ones(64, 64, dtype=torch.bool, device=DEVICE)
    outside[8:40, 24:56] = False
    assert torch.equal(shown[:, :, outside], image[:, :, outside])
    assert not torch.equal(shown[:, :, 8:16, 32:48], image[:, :, 8:16, 32:48])  # the edge is soft
    free = decoder(shape, output="change", spatial_prior=False)
    torch.testing.assert_close(free.shown(image, moved, start, prior), whole)


def test_in_half_precision_the_last_step_is_taken_at_full_width() -> None:
    """A sigmoid in bfloat16 would have steps of 1/256 above one half."""
    net = decoder(SHAPES["32 px"])
    nn.init.zeros_(net.to_image.weight)
    nn.init.constant_(net.to_image.bias, 0.6875)  # which bfloat16 has
    features, _ = maps_of(SHAPES["32 px"])
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        drawn = net(features)
    wanted = torch.sigmoid(torch.tensor(0.6875))
    assert abs(float(wanted.bfloat16()) - float(wanted)) > 1e-4
    torch.testing.assert_close(drawn, wanted.to(DEVICE).expand_as(drawn))


def test_without_the_spatial_prior_everything_may_be_edited() -> None:
    shape = SHAPES["64 px, skips"]
    net, free = decoder(shape), decoder(shape, spatial_prior=False)
    free.load_state_dict(net.state_dict())
    features, skips = maps_of(shape)
    prepared = net.prepare(skips)
    nothing, everything = torch.zeros(2, 4, 4, device=DEVICE), torch.ones(2, 4, 4, device=DEVICE)
    wanted = net(features, skips, prepared)
    assert torch.equal(free(features, skips, prepared, nothing), wanted)
    assert torch.equal(net(features, skips, prepared, everything), wanted)
    assert not torch.equal(net(features, skips, prepared, nothing), wanted)


def test_the_residual_editor_starts_from_the_sources_own_maps() -> None:
    shape = SHAPES["64 px, skips"]
    features, skips = maps_of(shape)
    for editor, same in (("residual", True), ("local", True), ("replace", False)):
        torch.manual_seed(0)
        net = MirrorDecoder(shape, editor=editor, **SMALL).eval().to(DEVICE)
        seen = seen_at_the_stages(net, features, skips, net.prepare(skips))
        assert all(torch.equal(seen[number], skip) == same for number, skip in enumerate(skips))


def test_a_cell_is_edited_from_the_cells_around_it() -> None:
    """Where cells cover whole blocks, what a cell shows changes the block's own places and those beside it."""
    shape = Shape((6, 6, 6), (3, 96, 96), ((3, 24, 24),))
    net = decoder(shape)
    features, skips = maps_of(shape)
    moved = features.clone()
    moved[:, :, 0, 0] += 3
    prepared = net.prepare(skips)
    difference = (net.editors[0](prepared[0], moved) - net.editors[0](prepared[0], features)).abs().amax((0, 1))
    assert bool((difference[:8, :8] > 0).all())
    assert float(difference[9:].max()) == float(difference[:, 9:].max()) == 0


def test_the_local_editor_sees_the_image_at_every_place() -> None:
    """Where cells say the same, equal places are edited equally, and what differs is edited otherwise."""
    shape = Shape((6, 6, 6), (3, 96, 96), ((3, 24, 24),))
    net = decoder(shape, editor="local")
    features, skips = maps_of(shape)
    same, flat = features[:, :, :1, :1].expand_as(features), torch.zeros_like(skips[0])
    drawn = net.editors[0](net.prepare([flat])[0], same)[:, :, 3:-3, 3:-3]  # beside the border all is alike
    torch.testing.assert_close(drawn, drawn[:, :, :1, :1].expand_as(drawn), rtol=0, atol=1e-5)
    edge = flat.clone()
    edge[:, :, :, 10:] = 1
    drawn = net.editors[0](net.prepare([edge])[0], same)[:, :, 3:-3, 3:-3]
    sides = drawn.std(3), (drawn[:, :, 0, 0] - drawn[:, :, 0, -1]).abs()
    assert float(sides[0].min()) > 0 < float(sides[1].min())
    rows = drawn.std(2)
    assert float(rows.max()) < 1e-5
    # A pattern editor draws each place of a block otherwise, also where all is alike.
    blocks = decoder(shape).editors[0]
    drawn = blocks(blocks.prepare(flat), same)[:, :, 3:-3, 3:-3]
    assert float(drawn.std((2, 3)).min()) > 0.01


@pytest.mark.parametrize("name", ["224 px, skips", "odd, skips", "32 px, skip at full size"])
def test_the_local_editor_learns(name: str) -> None:
    """Gradients reach the moved map and every parameter, and what is prepared is what does not depend on k."""
    shape = SHAPES[name]
    net = decoder(shape, editor="local").requires_grad_(True).train()
    features, skips = maps_of(shape)
    features.requires_grad_()
    prepared = net.prepare(skips)
    sizes = [(2, 2 * depth, height, width) for depth, height, width in shape.skips]
    assert [tuple(each.shape) for each in prepared] == sizes
    for editor, own in zip(net.editors, prepared, strict=True):  # each by itself: the stem reads the map as well
        (slope,) = torch.autograd.grad(editor(own, features).square().sum(), features, retain_graph=True)
        assert float(slope.abs().sum()) > 0
    net(features, skips, prepared).square().sum().backward()
    still = [name for name, each in net.named_parameters() if each.grad is None or not bool(each.grad.any())]
    # Norms of a batch take away what a convolution before them adds.
    assert [name for name in still if "bias" not in name] == []


def test_the_shape_is_read_off_the_classifier() -> None:
    clf = finecf.wrap(seeded(PooledNet))
    assert shape_of(clf, images(1)[0]) == Shape((12, 8, 8), (3, 32, 32), ())
    assert shape_of(clf, images(1)[0], skips=True) == Shape((12, 8, 8), (3, 32, 32), ((8, 16, 16),))
    assert shape_of(clf, images(1, 64)[0]).skips == ()
    assert shape_of(clf, images(1, 66)[0]) == Shape((12, 17, 17), (3, 66, 66), ((8, 33, 33),))
    assert shape_of(clf, images(1, 66)[0], skips=False).skips == ()


@pytest.mark.parametrize(("side", "widths"), [(28, (8, 12)), (32, (4, 8, 16)), (64, (8, 8, 16, 16)), (37, (5, 6))])
def test_the_discriminator_scores_patches(side: int, widths: tuple[int, ...]) -> None:
    scores = PatchDiscriminator(3, widths).to(DEVICE)(images(2, side))
    assert scores.shape == (2, 1, side >> len(widths), side >> len(widths))
    assert torch.isfinite(scores).all()


# ---- the file


def same_images(one: MirrorDecoder, two: MirrorDecoder, tolerance: float = 5e-3) -> None:
    features, skips = maps_of(one.shape)
    prior = torch.ones(2, *one.shape.features[1:], device=DEVICE)
    drawn = [net.to(DEVICE)(features, skips, net.prepare(skips), prior) for net in (one, two)]
    span = float((one.high - one.low).max())
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=tolerance * span)


def test_a_discriminator_that_is_told_the_class_judges_by_it() -> None:
    torch.manual_seed(0)
    net = PatchDiscriminator(3, (4, 8), classes=5).to(DEVICE)
    x = torch.rand(1, 3, 32, 32, device=DEVICE).repeat(2, 1, 1, 1)
    scores = net(x, torch.tensor([1, 4], device=DEVICE))
    assert scores.shape == (2, 1, 8, 8)
    assert not torch.allclose(scores[0], scores[1])
    with torch.no_grad():
        net.of_class.weight.zero_()
    torch.testing.assert_close(net(x, torch.tensor([1, 4], device=DEVICE)), net.score(net.layers(x)))


@pytest.mark.parametrize("name", ["28 px", "128 px, skips", "odd, skips"])
def test_a_decoder_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    settings = {"editor": "replace", "prior_range": (0.2, 0.6), "image_range": (-2.1179, 2.64), "output": "change"}
    settings |= {"prior": "contrast", "pooled": True}
    net = decoder(SHAPES[name], **settings)
    file = tmp_path / "folder" / "decoder.safetensors"
    save_decoder(file, net, {"pairs": [[0, 1]], "made": "for a test"})
    again, meta = load_decoder(file)
    assert again.shape == net.shape
    assert again.settings == net.settings
    assert (meta["pairs"], meta["made"]) == ([[0, 1]], "for a test")
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    for name, value in net.state_dict().items():
        wanted = value.half().float() if value.is_floating_point() and name not in ("low", "high") else value
        assert torch.equal(again.state_dict()[name].cpu(), wanted.cpu()), name
    stored = load_file(file)
    assert {stored[name].dtype for name, _ in net.named_parameters()} == {torch.float16}
    same_images(net, again)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("bounds", [(0, 65_535), (-1e6, 1e6), (0.0, 0.1)])
def test_a_range_that_float16_does_not_hold_is_kept(bounds: tuple[float, float], tmp_path: Path) -> None:
    net = decoder(SHAPES["28 px"], image_range=bounds)
    save_decoder(tmp_path / "d.safetensors", net, {})
    again, _ = load_decoder(tmp_path / "d.safetensors")
    for name in ("low", "high"):
        assert torch.equal(getattr(again, name), getattr(net, name).cpu())
    same_images(net, again)


def test_statistics_that_float16_does_not_hold_are_kept(tmp_path: Path) -> None:
    """A classifier's maps may be large: the decoder's first batch norm then knows variances beyond 65,504."""
    net = decoder(SHAPES["28 px"])
    net.stem[1].running_var.mul_(1e6)
    net.stem[0].weight.mul_(1e3)
    save_decoder(tmp_path / "d.safetensors", net, {})
    again, _ = load_decoder(tmp_path / "d.safetensors")
    assert all(torch.isfinite(value).all() for value in again.state_dict().values())
    same_images(net, again)


def test_truncated_and_changed_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    save_decoder(file, decoder(SHAPES["28 px"]), {})
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"d\.safetensors \(\d+ bytes\) is truncated or not a safetensors file"):
        load_decoder(file)
    file.write_bytes(whole[:-3] + bytes(3))
    with pytest.raises(ValueError, match=r"the weights in .*d\.safetensors are not those that were saved"):
        load_decoder(file)
    with pytest.raises(FileNotFoundError, match=r"expected a file at .*none\.safetensors, found none"):
        load_decoder(tmp_path / "none.safetensors")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"digits\.safetensors holds no mirror decoder; expected a file that"):
        load_decoder(SHIPPED / "digits.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"it was not written by finecf"):
        load_decoder(tmp_path / "w.safetensors")


def test_a_decoder_of_another_classifier_is_refused(tmp_path: Path) -> None:
    clf, other = (finecf.wrap(seeded(PooledNet, seed=seed)) for seed in (0, 1))
    file = tmp_path / "d.safetensors"
    finecf.MirrorCFE(clf, decoder(shape_of(clf, images(1)[0]))).save(file)
    assert finecf.MirrorCFE(clf, file).decoder is not None
    assert finecf.MirrorCFE(finecf.wrap(seeded(PooledNet)), str(file)).decoder is not None
    mine, theirs = (str(each.fingerprint()["weights"])[:8] for each in (clf, other))
    with pytest.raises(
        ValueError,
        match=rf"made for another classifier: PooledNet with weights {mine}, layer 'body', 5 classes; this one is "
        rf"PooledNet with weights {theirs}, layer 'body', 5 classes.*fit a decoder for this classifier",
    ):
        finecf.MirrorCFE(other, file)
