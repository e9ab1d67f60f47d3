"""The mapping network of Mirror-CFE: feature maps back to images.

Marks: P the paper (arXiv 2509.16822, eq. 12-14), O ours. The classifier is the encoder; the decoder upsamples the moved
map f_k step by step. With skips, the classifier's shallower maps f_s^i of the source image come in where the image may
stay as it is, and what the spatial pattern editor makes of them where it must change:

    u_i  = D_i(concat(B_i(f_s^i), f_k))      f'_i = (1 - M) f_s^i + M u_i

M being the CAM-guided spatial prior: 1 where the source's or the target's class activation is above a threshold that
falls with k.
"""

from __future__ import annotations

import math
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finecf.models.checkpoints import load_checkpoint, save_tensors
from finecf.models.classifier import Classifier

Range = tuple[float | Sequence[float], float | Sequence[float]]
"""Least and largest value of images, a number or one per channel."""

KIND: Final = "mirror decoder"
PLAIN_SIDE: Final = 64
"""Images whose longer side is at most this are decoded without skips."""
EDITORS: Final = ("residual", "replace", "local")
OUTPUTS: Final = ("image", "change")
PRIORS: Final = ("activation", "contrast")
PRIOR_RANGE: Final = (0.1, 0.5)
"""Least and largest threshold of the spatial prior (not public; O)."""


class Shape(NamedTuple):
    """What a decoder is built for: map [D,h,w], image [Ch,H,W] and skip levels [D_i,h_i,w_i], shallow first."""

    features: tuple[int, int, int]
    image: tuple[int, int, int]
    skips: tuple[tuple[int, int, int], ...]


def shape_of(classifier: Classifier, image: Tensor, skips: bool | None = None) -> Shape:
    """The shape for images like `image` [Ch,H,W]; `skips` None: where the image is larger than `PLAIN_SIDE`."""
    if skips is None:
        skips = max(image.shape[1:]) > PLAIN_SIDE
    maps = classifier.pyramid(image[None])
    *shallow, features = [_triple(each[0].shape) for each in maps]
    return Shape(features, _triple(image.shape), tuple(shallow) if skips else ())


def _triple(sizes: Iterable[int]) -> tuple[int, int, int]:
    depth, height, width = sizes
    return int(depth), int(height), int(width)


def _block(c_in: int, c_out: int) -> nn.Sequential:
    """Two convolutions of 3, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for first in (c_in, c_out):
        layers += [nn.Conv2d(first, c_out, 3, 1, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class SkipEditor(nn.Module, ABC):
    """Draws what a skip level would look like under the moved map; the subclasses say how."""

    draw: nn.Conv2d
    """The last convolution, whose bias there is."""

    @abstractmethod
    def prepare(self, skip: Tensor) -> Tensor:
        """What of the source's map [B,c,H,W] does not depend on k."""

    @abstractmethod
    def forward(self, prepared: Tensor, features: Tensor) -> Tensor:
        """[B,c,H,W] of what `prepare` gave and the moved map [B,D,h,w]."""


class PatternEditor(SkipEditor):
    """What a skip level would look like under the moved map (P, eq. 12): [B,c,H,W] and [B,D,h,w] to [B,c,H,W].

    B_i and D_i are not public. Where a cell of the map covers a whole block of s x s places of the level, B_i is a
    convolution over the block and D_i draws all of its places at once (pixel shuffle), so that what lies inside a cell
    is not averaged away; elsewhere they pool and enlarge (O).
    """

    def __init__(self, level: tuple[int, int, int], features: tuple[int, int, int], inner: int) -> None:
        super().__init__()
        channels, *size = level
        depth, *grid = features
        side, rest = divmod(size[0], grid[0])
        self.block = side if not rest and (size[0], size[1]) == (side * grid[0], side * grid[1]) else 0
        self.grid, self.size = (grid[0], grid[1]), (size[0], size[1])
        side = max(self.block, 1)
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, inner, side, side, bias=False), nn.BatchNorm2d(inner), nn.ReLU()
        )
        self.mix = nn.Sequential(
            nn.Conv2d(inner + depth, inner, 3, 1, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels * side * side, 1),
        )
        self.draw = nn.Conv2d(channels, channels, 3, 1, 1)

    def prepare(self, skip: Tensor) -> Tensor:
        """B_i(f_s^i) at the size of the deepest map: it does not depend on k."""
        reduced: Tensor = self.reduce(skip)
        return reduced if self.block else F.adaptive_avg_pool2d(reduced, self.grid)

    def forward(self, prepared: Tensor, features: Tensor) -> Tensor:
        mixed = self.mix(torch.cat([prepared, features], 1))
        if self.block:
            large = F.pixel_shuffle(mixed, self.block)
        else:
            large = F.interpolate(mixed, size=self.size, mode="bilinear", align_corners=False)
        drawn: Tensor = self.draw(large)
        return drawn


class LocalEditor(SkipEditor):
    """As `PatternEditor`, place by place: three convolutions over the level's own map and the enlarged map f_k (O).

    f_k comes in by `inner` channels, after the first of them. A `PatternEditor` draws a whole block of places from what
    one cell of the map says, and draws the same in every cell that says the same. This one sees the image at every
    place, so that what it draws keeps to the image's own edges.
    """

    def __init__(self, level: tuple[int, int, int], features: tuple[int, int, int], inner: int) -> None:
        super().__init__()
        channels, *size = level
        self.size = (size[0], size[1])
        wide = 2 * channels
        self.own = nn.Conv2d(channels, wide, 3, 1, 1, bias=False)
        self.read = nn.Sequential(nn.Conv2d(features[0], inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU())
        self.enlarged = nn.Conv2d(inner, wide, 1, bias=False)
        self.mix = nn.Sequential(nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 3, 1, 1, bias=False))
        self.norm = nn.BatchNorm2d(wide)
        self.draw = nn.Conv2d(wide, channels, 3, 1, 1)

    def prepare(self, skip: Tensor) -> Tensor:
        """What of the first convolution does not depend on k."""
        own: Tensor = self.own(skip)
        return own

    def forward(self, prepared: Tensor, features: Tensor) -> Tensor:
        # Pointwise and linear, so that it may come before the enlargement, where there are fewer places.
        enlarged = F.interpolate(self.enlarged(self.read(features)), self.size, mode="bilinear", align_corners=False)
        drawn: Tensor = self.draw(self.norm(self.mix(prepared + enlarged)).relu())
        return drawn


class MirrorDecoder(nn.Module):
    """Maps [B,D,h,w] of a classifier to images [B,Ch,H,W].

    Args:
        shape: of map, image and skip levels.
        width: channels at the last stage, at the image's size divided by `subpixel`; they double with every halving, up
            to `most`.
        most: channels at the deepest stage.
        inner: channels of the pattern editor's reduced skip, or of the local editor's reduced map (O).
        image_range: (least, largest) value of the images, a number or one per channel.
        spatial_prior: whether M restricts the editing; without it the editor draws everywhere.
        editor: "replace": u_i is what the pattern editor draws (P); "residual": it is the source's own map plus that,
            so that what need not change stays sharp (O); "local": as "residual", by `LocalEditor` (O).
        prior_range: least and largest threshold of the spatial prior.
        prior: what the spatial prior is made of, `activation_prior` (P) or `contrast_prior` (O).
        output: "image": x_k is what is drawn of f_k (P); "change": it is the source image plus what is drawn of f_k
            minus what is drawn of f_s, so that what the decoder cannot draw of an image stays in it, and x_0 is the
            image itself (O). With skips, and with the contrast prior, the change is kept to the spatial prior.
        subpixel: side of the blocks of pixels that the last convolution draws at once; the stages end at the image's
            size divided by it (O).
        pooled: whether the map's mean over cells, which is all that the classifier's head reads, is given to every cell
            beside the map: a step of the latent is small beside what tells one cell from another (O).
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        shape: Shape,
        width: int = 24,
        most: int = 128,
        inner: int = 128,
        image_range: Range = (0.0, 1.0),
        spatial_prior: bool = True,
        editor: str = "residual",
        prior_range: tuple[float, float] = PRIOR_RANGE,
        prior: str = "activation",
        output: str = "image",
        subpixel: int = 1,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        width, most, inner, subpixel = (operator.index(each) for each in (width, most, inner, subpixel))
        spatial_prior, pooled = bool(spatial_prior), bool(pooled)
        shape = Shape(_triple(shape[0]), _triple(shape[1]), tuple(_triple(each) for each in shape[2]))
        self.shape = shape
        self.settings: dict[str, Any] = {
            "width": width,
            "most": most,
            "inner": inner,
            "image_range": plain_range(image_range),
            "spatial_prior": spatial_prior,
            "editor": editor,
            "prior_range": [float(each) for each in prior_range],
            "prior": prior,
            "output": output,
            "subpixel": subpixel,
            "pooled": pooled,
        }
        if not 0 <= prior_range[0] <= prior_range[1] <= 1:
            raise ValueError(f"prior_range must be (least, largest) threshold between 0 and 1; got {prior_range}")
        self.prior_range = (float(prior_range[0]), float(prior_range[1]))
        if editor not in EDITORS:
            raise ValueError(f"editor must be one of {', '.join(EDITORS)}; got {editor!r}")
        if output not in OUTPUTS:
            raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}")
        if prior not in PRIORS:
            raise ValueError(f"prior must be one of {', '.join(PRIORS)}; got {prior!r}")
        self.contrasts = prior == "contrast"
        self.residual = editor != "replace"
        make = LocalEditor if editor == "local" else PatternEditor
        self.changes = output == "change"
        self.spatial_prior = spatial_prior
        depth, *grid = shape.features
        channels, *size = shape.image
        self.pooled = nn.BatchNorm2d(depth) if pooled else None
        read = 2 * depth if pooled else depth
        for name, bound in zip(("low", "high"), bounds_of(image_range, channels), strict=True):
            self.register_buffer(name, bound)
        if subpixel < 1 or size[0] % subpixel or size[1] % subpixel:
            raise ValueError(f"subpixel must be at least 1 and divide the image's sides {size}; got {subpixel}")
        if size[0] // subpixel < grid[0] or size[1] // subpixel < grid[1]:
            raise ValueError(f"subpixel {subpixel} leaves images of {size} fewer places than the map has, {grid}")
        self.subpixel = subpixel
        by_size = {(height, length): number for number, (_, height, length) in enumerate(shape.skips)}
        self.sizes = _stages((grid[0], grid[1]), (size[0] // subpixel, size[1] // subpixel), list(by_size))
        self.skip_at = [by_size.get(each) for each in self.sizes]
        self.skips = any(number is not None for number in self.skip_at)
        self.masks = spatial_prior and (self.skips or (self.changes and self.contrasts))
        if spatial_prior and self.contrasts and not self.masks:
            raise ValueError('prior="contrast" has nothing to mask: it needs skips, or output="change"')
        # Levels that are larger than the last stage are not used.
        self.editors = nn.ModuleList(
            make(level, (read, grid[0], grid[1]), inner) if number in self.skip_at else nn.Identity()
            for number, level in enumerate(shape.skips)
        )
        if self.residual:
            for each in self.editors:
                if isinstance(each, SkipEditor):  # at first nothing is edited
                    nn.init.zeros_(each.draw.weight)
                    nn.init.zeros_(each.draw.bias)  # type: ignore[arg-type]  # it has one
        last = len(self.sizes) - 1
        widths = [min(most, width * 2 ** (last - stage)) for stage in range(last + 1)]
        self.stem = _block(read, widths[0])
        self.stages = nn.ModuleList(
            _block(widths[stage - 1] + (0 if skip is None else shape.skips[skip][0]), widths[stage])
            for stage, skip in enumerate(self.skip_at)
            if stage
        )
        self.to_image = nn.Conv2d(widths[-1], channels * subpixel**2, 3, 1, 1)

    def prepare(self, skips: Sequence[Tensor]) -> list[Tensor]:
        """What the editors need of the source's skip maps, whatever k is."""
        dtype = self.low.dtype  # maps of a classifier in double precision are wider
        return [
            editor.prepare(skip.to(dtype)) if isinstance(editor, SkipEditor) else skip.new_zeros(len(skip), 0)
            for editor, skip in zip(self.editors, skips, strict=True)
        ]

    def forward(
        self,
        features: Tensor,
        skips: Sequence[Tensor] = (),
        prepared: Sequence[Tensor] = (),
        prior: Tensor | None = None,
    ) -> Tensor:
        """Images [B,Ch,H,W] of maps [B,D,h,w].

        Args:
            features: the moved maps f_k.
            skips: the source's maps at the skip levels, shallow first.
            prepared: what `prepare` made of them.
            prior: float [B,h,w], 1 where the image may change; None: everywhere.
        """
        features = features.to(self.low.dtype)
        skips = [each.to(features.dtype) for each in skips]
        if self.pooled is not None:
            mean = self.pooled(features.mean((2, 3), keepdim=True))
            features = torch.cat([features, mean.expand_as(features)], 1)
        x = self.stem(features)
        for stage, size in enumerate(self.sizes[1:], 1):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
            number = self.skip_at[stage]
            if number is not None:
                edited = self.editors[number](prepared[number], features)
                if self.residual:
                    edited = skips[number] + edited
                if prior is not None and self.spatial_prior:
                    mask = F.interpolate(prior[:, None].to(features.dtype), size=size, mode="nearest")
                    edited = (1 - mask) * skips[number] + mask * edited
                x = torch.cat([x, edited], 1)
            x = self.stages[stage - 1](x)
        # Widened first: a sigmoid in bfloat16 has steps of up to 1/256, as large as many a change.
        share = torch.sigmoid(F.pixel_shuffle(self.to_image(x), self.subpixel).to(self.low.dtype))
        return self.low + (self.high - self.low) * share

    def shown(self, image: Tensor, moved: Tensor, start: Tensor, prior: Tensor | None = None) -> Tensor:
        """The images x_k of source images and of what is drawn of f_k and of f_s, [B,Ch,H,W] each.

        prior: float [B,h,w]; a change reaches half a cell beyond it, and fades there.
        """
        if not self.changes:
            return moved
        change = moved - start
        if prior is not None and self.spatial_prior:
            mask = F.interpolate(prior[:, None].to(change.dtype), image.shape[2:], mode="bilinear", align_corners=False)
            change = mask * change
        return torch.clamp(image + change, self.low, self.high)


def activation_prior(
    activation_source: Tensor, activation_target: Tensor, k: Tensor, prior_range: tuple[float, float] = PRIOR_RANGE
) -> Tensor:
    """M of P, eq. 13: [B,h,w], 1 where the class activation of source or target, each scaled to its largest, is above
    `rho = min(max(1 - k, rho_l), rho_u)`; k [B]. For fixed maps the mask never shrinks as k grows.
    """
    activations = (activation_source, activation_target)
    source, target = (_above(each, k, prior_range) for each in activations)
    return (source | target).to(activation_source.dtype)


def contrast_prior(
    activation_source: Tensor, activation_target: Tensor, k: Tensor, prior_range: tuple[float, float] = PRIOR_RANGE
) -> Tensor:
    """As `activation_prior`, of what speaks for the source rather than the target: by how much the activation of the
    source is above that of the target, in the source image (O). Look-alikes have nearly the same activations; they
    differ where their marks differ.
    """
    return _above(activation_source - activation_target, k, prior_range).to(activation_source.dtype)


def _above(activation: Tensor, k: Tensor, prior_range: tuple[float, float]) -> Tensor:
    """Where an activation [B,h,w], scaled to its largest, is above the threshold of k [B]; bool."""
    rho = (1 - k).clamp(*prior_range)[:, None, None]
    positive = activation.relu()
    largest = positive.amax((1, 2), keepdim=True)
    return (positive > rho * largest) & (largest > 0)


class PatchDiscriminator(nn.Module):
    """Tells drawn patches from real ones: images [B,Ch,H,W] to scores [B,1,h,w], large for real (form: O).

    With `classes` it is told what each image is to show, int64 [B], and judges whether a patch is one of that class
    (projection, Miyato and Koyama 2018).
    """

    def __init__(self, channels: int, widths: Sequence[int] = (64, 128, 256, 512), classes: int | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, width in enumerate(widths):
            layers.append(nn.Conv2d(widths[number - 1] if number else channels, width, 4, 2, 1))
            if number:
                layers.append(nn.GroupNorm(math.gcd(8, width), width))
            layers.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers)
        self.score = nn.Conv2d(widths[-1], 1, 3, 1, 1)
        self.of_class = None if classes is None else nn.Embedding(classes, widths[-1])

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        seen: Tensor = self.layers(x)
        scores: Tensor = self.score(seen)
        if self.of_class is not None:
            scores = scores + (self.of_class(shown)[:, :, None, None] * seen).sum(1, keepdim=True)
        return scores


def save_decoder(path: str | os.PathLike[str], decoder: MirrorDecoder, meta: Mapping[str, Any]) -> None:
    """Write a decoder (float16, where that holds the values) and what is known of it to one safetensors file."""
    weights = {}
    for name, value in decoder.state_dict().items():
        half = value.half() if value.is_floating_point() else value
        weights[name] = half if bool(torch.isfinite(half).all()) else value
    save_tensors(path, weights, {**meta, "kind": KIND, "shape": decoder.shape, "settings": decoder.settings})


@torch.inference_mode(False)  # the user's own must not make weights that no gradient passes
def load_decoder(path: str | os.PathLike[str]) -> tuple[MirrorDecoder, dict[str, Any]]:
    """A decoder in eval mode, without gradients, and its description.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is truncated, changed, or holds something else.
    """
    weights, meta = load_checkpoint(path)
    if meta.get("kind") != KIND:
        raise ValueError(f"{path} holds no {KIND}; expected a file that `finecf train mirror` or MirrorCFE.save wrote")
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and replaced at once
        decoder = MirrorDecoder(Shape(*meta["shape"]), **meta["settings"])
    # The range is that of the settings: float16 would round it.
    decoder.load_state_dict({**weights, "low": decoder.low, "high": decoder.high})
    return decoder.eval().requires_grad_(False), meta


def bounds_of(image_range: Range, channels: int) -> tuple[Tensor, Tensor]:
    """Least and largest value of images with so many channels, float32 [1,Ch,1,1] each.

    Raises:
        ValueError: the least is not less than the largest.
    """
    low, high = (
        torch.as_tensor(value, dtype=torch.float32).expand(channels).clone().view(1, channels, 1, 1)
        for value in image_range
    )
    if not bool((low < high).all()):
        raise ValueError(f"image_range must be (least, largest) with least < largest; got {image_range}")
    return low, high


def plain_range(image_range: Range) -> list[float | list[float]]:
    """A range as a file can say it."""
    plain = (each.tolist() if hasattr(each, "tolist") else each for each in image_range)
    return [[float(one) for one in each] if isinstance(each, Iterable) else float(each) for each in plain]


def _stages(grid: tuple[int, int], image: tuple[int, int], skips: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes from the deepest map's to the image's: the skip levels', and doublings where the next is further away."""
    sizes = [grid]
    within = [each for each in skips if each[0] <= image[0] and each[1] <= image[1]]
    for size in [*sorted(within, key=lambda each: each[0] * each[1]), image]:
        while 3 * sizes[-1][0] < size[0] or 3 * sizes[-1][1] < size[1]:
            sizes.append((min(2 * sizes[-1][0], size[0]), min(2 * sizes[-1][1], size[1])))
        if size != sizes[-1]:
            sizes.append(size)
    return sizes
