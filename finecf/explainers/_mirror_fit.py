"""Training of Mirror-CFE's mapping network against a frozen classifier.

What step n does depends on the seed and n alone (which images, classes and k), so that a training that was interrupted
and resumed gives the same bits as one that was not, on one machine and as many threads.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from finecf.explainers import _mirror_losses as losses
from finecf.explainers._mirror_draw import draw_pair
from finecf.explainers._reflection import GapHead, map_steps, shifted_maps
from finecf.explainers._shared import check_range
from finecf.explainers._training import (
    TrainingStopped,
    check_finite,
    check_same_images,
    choice,
    fingerprint_of,
    joined,
    moments_of,
    said_of,
    seeded,
    set_moments,
    state_of,
    under,
)
from finecf.models import Classifier
from finecf.models.checkpoints import save_tensors
from finecf.models.decoder import PLAIN_SIDE, MirrorDecoder, PatchDiscriminator
from finecf.regions.baseline import blur_every_second

LOSSES: Final = ("classification", "adversarial", "reconstruction", "feature", "triangulation")
PRECISIONS: Final = ("float32", "bfloat16")
_WHOLE: Final = ("steps", "batch", "seed", "augment", "warm_up")
_BATCH_WHILE_LOOKING = 64
DECODER_RANGE: Final = "the decoder's image_range"
_TRAIN_OTHERWISE = (
    "train with decoder={'image_range': (least, largest)}, two numbers or two lists of one a channel, of the images as "
    "the model takes them"
)


@dataclass(frozen=True)
class Recipe:
    """What the training is told."""

    steps: int
    batch: int
    learning_rate: float
    betas: tuple[float, float]
    seed: int
    weights: dict[str, float]
    alpha: float
    kl_order: str
    precision: str
    reflection: str
    shift: str
    discriminator: tuple[int, ...]
    augment: int
    blend: float
    warm_up: int
    noise: float
    unsure: float
    conditional: bool
    blur: float

    def weight_of(self, loss: str, step: int) -> float:
        """A loss's weight at a step: all but the reconstruction rise from 0 in the second half of the warm-up."""
        if loss == "reconstruction" or step >= self.warm_up:
            return self.weights[loss]
        return self.weights[loss] * max(0.0, 2 * step / self.warm_up - 1)

    def __post_init__(self) -> None:
        # Plain numbers, whoever made them: they are written with the decoder.
        for kind, names in ((_whole, _WHOLE), (float, ("learning_rate", "alpha", "blend", "noise", "unsure", "blur"))):
            for name in names:
                object.__setattr__(self, name, kind(getattr(self, name)))
        object.__setattr__(self, "betas", tuple(float(each) for each in self.betas))
        object.__setattr__(self, "discriminator", tuple(_whole(each) for each in self.discriminator))
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is half the width of a band and must lie in [0, 1); got {self.alpha}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
        if self.noise < 0:
            raise ValueError(f"noise is a standard deviation, at least 0; got {self.noise}")
        if not 0 <= self.unsure < math.inf:
            raise ValueError(f"unsure is a number of at least 0; got {self.unsure}")
        if not 0 <= self.blur < math.inf:
            raise ValueError(f"blur is a standard deviation in pixels, at least 0; got {self.blur}")
        if self.warm_up < 0:
            raise ValueError(f"warm_up is a number of steps, at least 0; got {self.warm_up}")
        if self.augment < 0:
            raise ValueError(f"augment is a number of pixels, at least 0; got {self.augment}")
        if not 0 <= self.blend < 0.5:
            raise ValueError(f"blend is a share of another image and must lie in [0, 0.5); got {self.blend}")


def checked_checkpoint(checkpoint: str | os.PathLike[str]) -> Path:
    """A file that a decoder can be written to, in a folder that is there."""
    out = Path(checkpoint)
    if out.is_dir():
        raise ValueError(f"checkpoint is a file for the decoder, and {out} is a folder: name a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """A weight of every loss: 1 where none is given (P)."""
    chosen = dict.fromkeys(LOSSES, 1.0)
    for name, weight in (weights or {}).items():
        if name not in chosen:
            raise ValueError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of the {name} loss must be a number of at least 0; got {weight}")
        chosen[name] = float(weight)
    return chosen


def named_pairs(
    classifier: Classifier, pairs: Sequence[tuple[int | str, int | str]] | None, what: str = "the decoder"
) -> list[tuple[int, int]]:
    """Pairs of classes by index, each once and in order; None: all, where there are not too many.

    Raises:
        ValueError: too many, none, or what is no pair of two classes of the classifier.
    """
    if pairs is None:
        count = classifier.num_classes or 0
        if count * (count - 1) // 2 > 200:
            raise ValueError(
                f"{count} classes have {count * (count - 1) // 2} pairs: name those that {what} shall lead between, "
                "pairs=[(p, q), ...]"
            )
        return [(p, q) for p in range(count) for q in range(p + 1, count)]
    for pair in pairs:
        if isinstance(pair, str) or not hasattr(pair, "__len__") or len(pair) != 2:
            raise ValueError(f"name pairs of classes, pairs=[(p, q), ...]; got {pair!r} among them")
    named = [(classifier.class_index(p), classifier.class_index(q)) for p, q in pairs]
    if not named:
        raise ValueError("pairs is empty: name at least one pair of classes")
    for p, q in named:
        if p == q:
            name = classifier.class_name(p)
            raise ValueError(f"the pair ({name}, {name}) holds one class twice; there is no boundary inside it")
    return sorted({(min(pair), max(pair)) for pair in named})


def partners_of(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """The classes that each class of the pairs may be led to."""
    partners: dict[int, list[int]] = {}
    for first, second in pairs:
        partners.setdefault(first, []).append(second)
        partners.setdefault(second, []).append(first)
    return partners


Items = Dataset[Any] | DataLoader[Any] | tuple[Tensor, Tensor] | Tensor


class Pool:
    """The images to train on, by number, as the model takes them."""

    def __init__(self, classifier: Classifier, data: Items) -> None:
        if isinstance(data, DataLoader):
            data = _chosen(data)
        self._classifier = classifier
        self._whole: Tensor | None = None
        self._data: Any = data
        if isinstance(data, Tensor):
            self._whole = data
        elif isinstance(data, tuple):
            if len(data) != 2:
                raise ValueError(f"training data in a tuple is (images, labels); got {len(data)} parts")
            if len(data[0]) != len(data[1]):
                raise ValueError(f"there are {len(data[0])} training images and {len(data[1])} labels")
            self._whole = data[0]
        elif not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise TypeError(
                f"the training data is a {type(data).__name__}; expected a Dataset with a length, a DataLoader of one, "
                "or images [N,Ch,H,W]"
            )
        if len(self) == 0:
            raise ValueError("the training data is empty")

    def __len__(self) -> int:
        return len(self._data if self._whole is None else self._whole)

    def take(self, numbers: Tensor) -> Tensor:
        """Images [n,Ch,H,W]."""
        return self.read(numbers)[0]

    def read(self, numbers: Tensor) -> tuple[Tensor, list[Any]]:
        """Images [n,Ch,H,W], and what comes with each as its label, or None."""
        if self._whole is not None:
            labels = self._data[1] if isinstance(self._data, tuple) else None
            named = [None if labels is None else labels[number] for number in numbers]
            return self._classifier.prepare(self._whole[numbers]), named
        found = [self._data[int(number)] for number in numbers]
        pairs = [each if isinstance(each, (tuple, list)) else (each,) for each in found]
        images, named = [each[0] for each in pairs], [each[1] if len(each) > 1 else None for each in pairs]
        if all(isinstance(each, Tensor) for each in images):
            sizes = {tuple(each.shape) for each in images}
            if len(sizes) > 1 and self._classifier.preprocess is not None:
                return self._classifier.prepare(images), named
            if len(sizes) > 1:
                raise ValueError(f"the training images have different sizes, {sorted(sizes)}; resize them")
            return self._classifier.prepare(torch.stack(images)), named
        return self._classifier.prepare(images), named


def _chosen(loader: DataLoader[Any]) -> Dataset[Any]:
    """What a loader loads from: its data set, or the part of it that its sampler is confined to."""
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset  # refused by what it is
    batches = loader.batch_sampler
    sampler = loader.sampler if batches is None else getattr(batches, "sampler", None)
    if batches is None or type(batches) is BatchSampler:
        if isinstance(sampler, SubsetRandomSampler):
            return Subset(loader.dataset, sampler.indices)
        if isinstance(sampler, (SequentialSampler, RandomSampler)) and cast(Any, sampler.data_source) is loader.dataset:
            return loader.dataset
        batches = sampler
    raise ValueError(
        f"the DataLoader draws by a {type(batches).__name__}, and fit draws by its own seed: give the data set, or a "
        "torch.utils.data.Subset of the images to train on"
    )


class Classes(NamedTuple):
    """Which images the classifier takes for which class."""

    said: dict[str, Tensor]
    """Of all images, as of `said_of`."""
    members: dict[int, Tensor]
    """The images of every class of the pairs."""


def look_through(
    pool: Pool, classifier: Classifier, pairs: Sequence[tuple[int, int]], decoder: MirrorDecoder
) -> Classes:
    """One pass over the images: what the classifier predicts, and that the decoder draws images of their size and
    range.
    """
    said, labels = [], []
    for numbers in torch.arange(len(pool)).split(_BATCH_WHILE_LOOKING):
        x, named = pool.read(numbers)
        labels += named
        if tuple(x.shape[1:]) != decoder.shape.image:
            sizes = f"{list(decoder.shape.image)} and {list(x.shape[1:])}"
            raise ValueError(f"the training images have different sizes, {sizes}; resize them")
        check_range(x, decoder.low, decoder.high, _TRAIN_OTHERWISE, bounds=DECODER_RANGE)
        said.append(said_of(classifier.logits(x)))
    whole = joined(said)
    found = whole["predicted"]
    members = {}
    for index in sorted({index for pair in pairs for index in pair}):
        own = (found == index).nonzero()[:, 0]
        own = own[[label_index(classifier, labels[number]) in (None, index) for number in own.tolist()]]
        if len(own) < 2:
            raise ValueError(
                f"class {classifier.class_name(index)!r} of the pairs has {len(own)} training images that the "
                "classifier recognises; at least 2 are needed"
            )
        members[index] = own
    return Classes(whole, members)


class Sample(NamedTuple):
    """What one step works on."""

    images: Tensor
    references: Tensor
    source: Tensor
    target: Tensor
    k: Tensor
    noise: Tensor
    """What is added to the drawn images before the classifier sees them, [B,Ch,H,W] or a zero."""
    sigma: float
    """By how much every second one is blurred then."""

    def seen(self, images: Tensor) -> Tensor:
        """The drawn images as the classifier sees them."""
        images = images + self.noise
        return blur_every_second(images, self.sigma, 1) if self.sigma else images


@dataclass
class Trainer:
    """A decoder in training, with its discriminator and optimisers.

    `k`, classes and images of step n are drawn by a generator that is seeded with (seed, n). `whole` is false in the
    middle of a step, when one net may have been updated and the other not.
    """

    classifier: Classifier
    head: GapHead
    decoder: MirrorDecoder
    pool: Pool
    pairs: list[tuple[int, int]]
    recipe: Recipe
    compile: bool = False
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    whole: bool = True

    def __post_init__(self) -> None:
        device = self.classifier.device
        self.decoder.to(device).train().requires_grad_(True)
        if max(self.decoder.shape.image[1:]) > PLAIN_SIDE and device.type == "cpu":
            self.decoder.to(memory_format=torch.channels_last)  # a quarter faster on large images
        classes = self.classifier.num_classes if self.recipe.conditional else None
        if self.recipe.conditional and classes is None:
            raise ValueError("conditional: the number of classes is not known yet; run the classifier once")
        channels = self.decoder.shape.image[0]
        self.discriminator = PatchDiscriminator(channels, self.recipe.discriminator, classes).to(device)
        settings: dict[str, Any] = {"lr": self.recipe.learning_rate, "betas": self.recipe.betas}
        self.optimisers = {
            "decoder": torch.optim.Adam(self.decoder.parameters(), **settings),
            "discriminator": torch.optim.Adam(self.discriminator.parameters(), **settings),
        }
        self.classes = look_through(self.pool, self.classifier, self.pairs, self.decoder)
        self.partners = partners_of(self.pairs)
        self.sources = torch.cat([self.classes.members[index] for index in sorted(self.partners)])
        self._decode: Callable[..., Tensor] = torch.compile(self.decoder) if self.compile else self.decoder
        self._judge: Callable[..., Tensor] = torch.compile(self.discriminator) if self.compile else self.discriminator

    @property
    def steps(self) -> int:
        """How many in all."""
        return self.recipe.steps

    @property
    def network(self) -> MirrorDecoder:
        """What draws."""
        return self.decoder

    def set_epochs(self, epochs: int) -> None:
        """Set the number of steps to that of so many passes over the images of the pairs."""
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1; got {epochs}")
        self.recipe = replace(self.recipe, steps=epochs * self._per_epoch)

    @property
    def _count(self) -> int:
        return min(self.recipe.batch, len(self.sources))

    @property
    def _per_epoch(self) -> int:
        return max(1, len(self.sources) // self._count)

    # One step

    def draw(self, step: int) -> Sample:
        """The sample of a step."""
        count = self._count
        epoch, place = divmod(step, self._per_epoch)
        order = self._order(seeded(self.recipe.seed, 2 * epoch + 1))
        numbers = self.sources[order[place * count : (place + 1) * count]]
        draws = seeded(self.recipe.seed, 2 * step)
        source = self.classes.said["predicted"][numbers]
        target = torch.tensor([choice(self.partners[int(index)], draws) for index in source])
        k = torch.rand(count, generator=draws, dtype=torch.float64)
        references = []
        for number, own, other, share in zip(numbers, source, target, k, strict=True):
            members = self.classes.members[int(other if share >= 0.5 else own)]
            chosen = int(members[int(torch.randint(len(members), (), generator=draws))])
            if chosen == int(number):
                chosen = int(members[(members == number).nonzero()[0, 0] - 1])
            references.append(chosen)
        device = self.classifier.device
        noise = torch.zeros(())
        if self.recipe.noise:
            noisy = (torch.rand(count, generator=draws) < 0.5).float()[:, None, None, None]
            noise = self.recipe.noise * noisy * torch.randn(count, *self.decoder.shape.image, generator=draws)
            noise = noise.to(device) * (self.decoder.high - self.decoder.low)
        images, shown = (self.pool.take(each).float() for each in (numbers, torch.tensor(references)))
        if self.recipe.augment:
            images, shown = (_moved(each, self.recipe.augment, draws) for each in (images, shown))
        if self.recipe.blend:
            # Images that were trained on are recognised too surely; held-out ones are not.
            share = self.recipe.blend * torch.rand(count, generator=draws) * (torch.rand(count, generator=draws) < 0.5)
            other = images[torch.randperm(count, generator=draws)]
            images = torch.lerp(images, other, share.to(images)[:, None, None, None])
        sigma = self.recipe.blur * float(torch.rand((), generator=draws)) if self.recipe.blur else 0.0
        return Sample(images, shown, source.to(device), target.to(device), k.to(device), noise.to(device), sigma)

    def _order(self, draws: torch.Generator) -> Tensor:
        """The order of the sources in an epoch; with `unsure`, drawn with replacement."""
        if not self.recipe.unsure:
            return torch.randperm(len(self.sources), generator=draws)
        weights = 1 + self.recipe.unsure * (1 - self.classes.said["confidence"][self.sources])
        return torch.multinomial(weights, len(weights), replacement=True, generator=draws)

    def advance(self) -> dict[str, float]:
        """One step of both optimisers; the losses by name."""
        self.whole = False
        recipe = self.recipe
        weights = {name: recipe.weight_of(name, self.step) for name in LOSSES}
        sample = self.draw(self.step)
        rate = recipe.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * self.step / recipe.steps)) / 2)
        for optimiser in self.optimisers.values():
            optimiser.param_groups[0]["lr"] = rate
        with self.classifier.frozen():
            with torch.no_grad():
                maps = [each.detach() for each in self._pyramid(sample.images)]
                features = maps[-1]
                latents = features.mean((2, 3))
                reference_latents = self.classifier.encode(sample.references)[0].mean((2, 3))
                # What an image shows is the source class, also where moving the image changed the prediction.
                reflected = self.head.reflect(latents, sample.source, sample.target, recipe.reflection)
                wanted = (reflected.start + sample.k[:, None] * reflected.step).to(latents.dtype)
                latent_logits = self.head.logits(wanted.double()).to(latents.dtype)
            skips = maps[: len(self.decoder.shape.skips)]
            with self._precision():
                moved, start = self._decode_pair(features, skips, reflected, sample)
                real_scores = drawn_scores = None
                shown = torch.where(sample.k >= 0.5, sample.target, sample.source)
                if weights["adversarial"]:
                    real_scores = self._judge(sample.references, shown)
                    drawn_scores = self._judge(moved.detach(), shown)
            if real_scores is not None and drawn_scores is not None:
                judged = losses.discriminator_adversarial(real_scores.float(), drawn_scores.float())
                self._descend("discriminator", judged, {"discriminator": judged})
            encoded_map, image_logits = self.classifier.encode(sample.seen(moved))
            if not (encoded_map.requires_grad and image_logits.requires_grad):
                raise ValueError(
                    "the decoder learns by the classifier's gradients, and this model gives none (frozen by torch.jit, "
                    "quantised, or run without gradients)"
                )
            encoded = encoded_map.mean((2, 3))
            terms = {
                "classification": losses.classification(image_logits, latent_logits, recipe.kl_order),
                "reconstruction": losses.reconstruction(sample.images, start),
                "feature": losses.feature(wanted, encoded),
                "triangulation": losses.triangulation(
                    losses.distance_ratio(wanted, reference_latents, latents),
                    (moved - sample.references).abs().mean((1, 2, 3)),
                    (sample.images - moved).abs().mean((1, 2, 3)),
                    recipe.alpha,
                ),
            }
            if weights["adversarial"]:
                with self._precision():
                    scores = self._judge(moved, shown)
                terms["adversarial"] = losses.generator_adversarial(scores.float())
            total = cast(Tensor, sum(weights[name] * term for name, term in terms.items()))
            self._descend("decoder", total, terms)
        self.step += 1
        named = {name: float(term.detach()) for name, term in terms.items()}
        self.history.append(named)
        self.whole = True
        return named

    def _decode_pair(
        self, features: Tensor, skips: list[Tensor], reflected: Any, sample: Sample
    ) -> tuple[Tensor, Tensor]:
        """The images at k and what is drawn at 0."""
        classes, recipe = (sample.source, sample.target), self.recipe
        steps = map_steps(self.head, reflected, features, *classes, recipe.shift, recipe.reflection)
        maps = shifted_maps(features, steps, sample.k), features
        return draw_pair(self.classifier, self.decoder, sample.images, maps, skips, classes, sample.k, self._decode)

    def _pyramid(self, images: Tensor) -> list[Tensor]:
        return self.classifier.pyramid(images) if self.decoder.shape.skips else [self.classifier.encode(images)[0]]

    def _descend(self, which: str, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        for name, term in terms.items():
            if not math.isfinite(float(term.detach())):
                raise TrainingStopped(name, self.step, float(term.detach()))
        optimiser = self.optimisers[which]
        parameters = optimiser.param_groups[0]["params"]
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()

    def check_weights(self) -> None:
        """Stop where the decoder holds NaN or infinity: the losses of a step are those of the weights before it."""
        check_finite(self.decoder, self.step - 1)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        half = self.recipe.precision == "bfloat16"
        # Cached weights last until the outermost autocast is left, which is not this one: they would not be updated.
        with torch.autocast(self.classifier.device.type, dtype=torch.bfloat16, enabled=half, cache_enabled=False):
            yield

    # The state

    def fingerprint(self) -> str:
        """What a state must be the state of."""
        return fingerprint_of(
            asdict(self.recipe),
            pairs=self.pairs,
            images=len(self.pool),
            classifier=self.classifier.fingerprint(),
            shape=self.decoder.shape,
            decoder=self.decoder.settings,
        )

    def save(self, path: Path) -> None:
        """Write all that the next step needs."""
        tensors = {f"images/{name}": value for name, value in self.classes.said.items()}
        for name, net in (("decoder", self.decoder), ("discriminator", self.discriminator)):
            tensors |= {f"{name}/{key}": value for key, value in net.state_dict().items()}
            tensors |= moments_of(self.optimisers[name], f"adam-{name}/")
        save_tensors(path, tensors, {"step": self.step, "of": self.fingerprint(), "history": self.history})

    def load(self, path: Path) -> None:
        """Go on from a state that `save` wrote.

        Raises:
            ValueError: it is of another training, or broken.

        Warns:
            UserWarning: as of `check_same_images`.
        """
        tensors, meta = state_of(path, self.fingerprint())
        check_same_images(path, under(tensors, "images/"), self.classes.said, "decoder")
        self.step, self.history = meta["step"], meta["history"]
        for name, net in (("decoder", self.decoder), ("discriminator", self.discriminator)):
            net.load_state_dict(under(tensors, f"{name}/"))
            set_moments(self.optimisers[name], tensors, f"adam-{name}/")


def _whole(value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]  # what it refuses is what we refuse
    except TypeError:
        raise TypeError(
            f"{', '.join(_WHOLE)} and the discriminator's widths are whole numbers; got {value!r}"
        ) from None


def label_index(classifier: Classifier, label: Any) -> int | None:
    """A class that comes with an image, by index or name; None where none comes."""
    if label is None:
        return None
    return classifier.class_index(label) if isinstance(label, str) else int(label)


def _moved(images: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `reach` pixels; what comes in repeats the border."""
    padded = nn.functional.pad(images, (reach,) * 4, mode="replicate")
    height, width = images.shape[-2:]
    offsets = torch.randint(2 * reach + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([each[:, y : y + height, x : x + width] for each, (y, x) in zip(padded, offsets, strict=True)])
