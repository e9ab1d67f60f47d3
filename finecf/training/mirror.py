"""Decoders of Mirror-CFE for the small shipped nets, for Fashion-MNIST, and for classifiers and images of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from finecf.data.birds import SyntheticBirds
from finecf.data.digits import digits
from finecf.data.fashion import fashion_mnist
from finecf.explainers import MirrorCFE
from finecf.explainers._mirror_fit import Items, Pool
from finecf.models import Classifier, wrap
from finecf.models.decoder import PLAIN_SIDE
from finecf.training.nets import load_birds_net, load_digits_net, load_fashion_net
from finecf.training.train import command_of, thread_count

Pair = tuple[int, int]
RECIPES: Final = ("digits", "birds", "fashion", "photographs", "pictures")
"""The last two are for images of one's own, of more than 64 pixels and of at most as many."""
BIRDS: Final = 4_000
"""Birds that a decoder is trained on."""
KNOWN_BIRDS: Final = 12_000
"""The first so many of the training split are those that the shipped net was trained on. It recognises them too surely;
a decoder is trained on the birds behind them."""


@dataclass(frozen=True)
class MirrorRecipe:
    """What `train_mirror` and `train_decoder` tell `MirrorCFE.fit` for one set of images.

    Attributes:
        pairs: classes that are trained together; none where they are the user's.
        settings: arguments of `MirrorCFE.fit`.
        shift, soften: those of `MirrorCFE`.
        reflection: that by which images are explained; trainings take the closed form.
    """

    pairs: tuple[Pair, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    shift: str = "uniform"
    soften: float = 0.0
    reflection: str = "closed_form"


DIGIT_PAIRS: Final = ((3, 8), (4, 9), (5, 6))
FASHION_PAIRS: Final = ((0, 2), (4, 6), (7, 9))
"""T-shirt and pullover, coat and shirt, sneaker and ankle boot: those of the paper."""


def bird_pairs(birds: SyntheticBirds) -> tuple[Pair, ...]:
    """All pairs of look-alikes: classes of one family."""
    family = [birds.family_of(label) for label in range(len(birds.class_names))]
    return tuple((p, q) for p in range(len(family)) for q in range(p + 1, len(family)) if family[p] == family[q])


def mirror_data(
    on: str, split: str, classifier: Classifier, data: str | os.PathLike[str] | None = None, images: int | None = None
) -> tuple[Tensor, Tensor]:
    """Images float32 [N,Ch,H,W] in [0,1] and labels int64 [N] of one set; `images`: so many of them, drawn evenly."""
    if on == "birds":
        first = KNOWN_BIRDS if split == "train" else 0
        birds = SyntheticBirds(split, n=first + (images or (BIRDS if split == "train" else 400)))
        drawn = np.stack([birds[number].image for number in range(first, len(birds))])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(birds.labels[first:])
    if on == "digits":
        found = digits(split)
        pictures, labels = found.batch(), torch.from_numpy(found.labels)
    else:
        garments = fashion_mnist(_needed(data), split)
        pictures, labels = garments.batch(), torch.from_numpy(garments.labels)
        wanted = torch.isin(labels, torch.tensor(sorted({index for pair in FASHION_PAIRS for index in pair})))
        pictures, labels = pictures[wanted].float() / 255, labels[wanted]
    if images is not None and images < len(pictures):
        chosen = torch.arange(images) * len(pictures) // images
        pictures, labels = pictures[chosen], labels[chosen]
    return pictures, labels


def mirror_classifier(on: str, path: str | os.PathLike[str] | None = None) -> Classifier:
    """The small net of one set: the shipped one, or that of a file."""
    loaders: dict[str, Callable[..., tuple[torch.nn.Module, dict[str, Any]]]] = {
        "digits": load_digits_net,
        "birds": load_birds_net,
        "fashion": load_fashion_net,
    }
    if on not in loaders:
        raise ValueError(f"mirror decoders are trained on {', '.join(loaders)}; got {on!r}")
    if on == "fashion" and path is None:
        raise ValueError(
            "no Fashion-MNIST net ships with finecf: make one with `finecf train fashion`, and give its file"
        )
    net, meta = loaders[on]() if path is None else loaders[on](path)
    return wrap(net, class_names=meta["classes"])


def mirror_recipe(on: str) -> MirrorRecipe:
    """The recipe for one set, or for "photographs" or "pictures" of one's own, whose pairs it does not name (O)."""
    if on not in RECIPES:
        raise ValueError(f"there are recipes for {', '.join(RECIPES)}; got {on!r}")
    weights = {"classification": 2.0, "feature": 2.0, "adversarial": 0.3}
    if on == "digits":
        settings = {"steps": 4000, "augment": 2, "blend": 0.45, "weights": weights, "decoder": {"output": "change"}}
        # The shortest way changes least; a decoder that is trained along it draws more for every step of it.
        return MirrorRecipe(DIGIT_PAIRS, settings, reflection="two_class")
    if on in ("fashion", "pictures"):
        weights |= {"reconstruction": 4.0, "classification": 3.0}
        seen = {"augment": 1, "blend": 0.45, "unsure": 8.0}
        settings = {"steps": 10_000, "warm_up": 500, "kl_order": "latent", "weights": weights, **seen}
        pairs = FASHION_PAIRS if on == "fashion" else ()
        return MirrorRecipe(pairs, {**settings, "decoder": {"output": "change"}})
    # Look-alikes differ in a few cells: the change is kept to those, and every cell is mirrored by itself.
    decoder = {"width": 16, "most": 96, "inner": 64, "subpixel": 2, "pooled": True, "output": "change"}
    decoder |= {"prior": "contrast", "prior_range": (0.25, 0.5)}
    settings = {"steps": 3000, "batch": 16, "learning_rate": 1.5e-3, "warm_up": 200, "kl_order": "latent"}
    settings |= {"noise": 0.03, "blur": 1.0, "unsure": 2.0, "conditional": True, "discriminator": (32, 64, 128)}
    # What two pictures differ in is mostly their background, and the triangulation loss would have the bird follow it.
    weights = {"classification": 2.0, "reconstruction": 3.0, "feature": 0.05, "triangulation": 0.05, "adversarial": 0.5}
    settings |= {"decoder": decoder, "weights": weights}
    if on == "photographs":
        settings |= {"steps": 2700, "batch": 8, "learning_rate": 4e-4, "augment": 8, "noise": 0.05, "blur": 2.0}
        settings |= {"discriminator": (32, 64, 128, 256), "weights": {**weights, "adversarial": 1.0}}
        settings["decoder"] = {**decoder, "editor": "local"}
        return MirrorRecipe((), settings, shift="per_cell", soften=1.5)
    return MirrorRecipe(bird_pairs(SyntheticBirds("test", n=1)), settings, shift="per_cell", soften=1.5)


def train_mirror(
    on: str = "digits",
    out: str | os.PathLike[str] = "mirror.safetensors",
    data: str | os.PathLike[str] | None = None,
    classifier: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    images: int | None = None,
    seed: int = 0,
    precision: str = "float32",
    threads: int | None = 1,
    weights: dict[str, float] | None = None,
    spatial_prior: bool = True,
    resume: bool = True,
    progress: bool = False,
    previews: str | os.PathLike[str] | None = None,
    preview_every: int = 500,
    command: str | None = None,
) -> dict[str, Any]:
    """Trains the decoder of one set and writes it to `out`; returns its description.

    Args:
        on: "digits", "birds" or "fashion".
        out: the safetensors file; `<out>.resume` beside it keeps the state.
        data: where `fashion_mnist.npz` is.
        classifier: the file of a net, instead of the shipped one.
        steps: how many, instead of the recipe's.
        images: how many training images, instead of all.
        seed: of everything drawn.
        precision: "float32", or "bfloat16" for decoder and discriminator.
        threads: of torch (None: as they are); the same number gives the same weights on one machine.
        weights: of the losses, instead of the recipe's.
        spatial_prior: whether the decoder is restricted by one, where the recipe has one.
        resume: whether to go on from `<out>.resume`.
        progress: whether to show a bar.
        previews: a folder for strips of test images, each drawn once.
        preview_every: steps between two of them.
        command: what the description says made the file.

    Raises:
        ValueError: unknown set, or settings that `MirrorCFE.fit` refuses.
        FileNotFoundError: data or classifier are not there.
    """
    with thread_count(threads):
        wrapped = mirror_classifier(on, classifier)
        recipe = mirror_recipe(on)
        pictures, labels = mirror_data(on, "train", wrapped, data, images)
        files = {"data": data, "classifier": classifier}
        named = {name: None if file is None else Path(file) for name, file in files.items()}
        told = {"on": on, **named, "seed": seed, "precision": precision, "steps": steps, "images": images}
        default = command_of("mirror", **told)
        default += "".join(f" --loss-weight {name}={value}" for name, value in (weights or {}).items())
        default += "" if spatial_prior else " --no-spatial-prior"
        mirror = train_decoder(
            wrapped,
            (pictures, labels),
            recipe.pairs,
            out,
            recipe,
            steps=steps,
            seed=seed,
            precision=precision,
            weights=weights,
            spatial_prior=spatial_prior,
            resume=resume,
            progress=progress,
            previews=previews,
            preview_images=mirror_data(on, "test", wrapped, data, 40) if previews is not None else None,
            preview_every=preview_every,
            about={"command": command or default, "images": len(pictures)},
        )
        return mirror.meta


def train_decoder(
    classifier: Classifier,
    data: Items,
    pairs: Sequence[tuple[int | str, int | str]],
    out: str | os.PathLike[str],
    recipe: MirrorRecipe | None = None,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int = 0,
    precision: str = "float32",
    weights: Mapping[str, float] | None = None,
    spatial_prior: bool = True,
    image_range: tuple[float | Sequence[float], float | Sequence[float]] = (0.0, 1.0),
    reflection: str | None = None,
    resume: bool = True,
    progress: bool = False,
    previews: str | os.PathLike[str] | None = None,
    preview_images: tuple[Tensor, Tensor] | None = None,
    preview_every: int = 500,
    about: Mapping[str, object] | None = None,
) -> MirrorCFE:
    """Trains a decoder for a classifier of one's own by a recipe, and writes it to `out`.

    Args:
        classifier: what `finecf.wrap` returned.
        data: as of `MirrorCFE.fit`: a Dataset of (image, label), a loader of one, or tensors.
        pairs: classes to lead between, by index or name; those of the recipe are not used.
        out: the safetensors file; `<out>.resume` beside it keeps the state.
        recipe: None: `mirror_recipe("photographs")`, and "pictures" where no side has more than 64 pixels.
        steps: how many, instead of the recipe's.
        learning_rate: instead of the recipe's.
        seed: of everything drawn.
        precision: "float32", or "bfloat16" for decoder and discriminator.
        weights: of the losses, instead of the recipe's.
        spatial_prior: whether the decoder is restricted by one, where the recipe has one.
        image_range: least and largest value of the images as the model takes them, a number or one per channel.
        reflection: by which it is trained, and explains; None: trained by the closed form, explains by the recipe's.
            With "lbfgs", which knows no single cells, all cells of a map are moved alike.
        resume: whether to go on from `<out>.resume`.
        progress: whether to show a bar.
        previews: a folder for strips of `preview_images`, each drawn once.
        preview_images: a batch of images as the classifier's `preprocess` takes them, and labels.
        preview_every: steps between two of them.
        about: what else the file's description says; what it says itself stays.

    Returns:
        The explainer, ready to explain; `MirrorCFE(classifier, out)` reads it again.

    Raises:
        ValueError: previews without images, or what `MirrorCFE` or `MirrorCFE.fit` refuse.
        TrainingStopped: as of `MirrorCFE.fit`.
    """
    if previews is not None and preview_images is None:
        raise ValueError("previews: give preview_images, images and their labels, to draw")
    height, width = Pool(classifier, data).take(torch.arange(1)).shape[2:]
    if recipe is None:
        recipe = mirror_recipe("photographs" if max(height, width) > PLAIN_SIDE else "pictures")
    settings = dict(recipe.settings)
    drawn = {**settings.pop("decoder", {}), "spatial_prior": spatial_prior, "image_range": image_range}
    if height % drawn.get("subpixel", 1) or width % drawn.get("subpixel", 1):
        drawn["subpixel"] = 1
    settings["weights"] = {**settings.get("weights", {}), **(weights or {})}
    settings |= {} if steps is None else {"steps": steps}
    settings |= {} if learning_rate is None else {"learning_rate": learning_rate}
    shift = "uniform" if reflection == "lbfgs" else recipe.shift
    mirror = MirrorCFE(classifier, reflection=reflection, shift=shift, soften=recipe.soften, progress=progress)
    mirror.fit(
        data,
        list(pairs),
        decoder=drawn,
        seed=seed,
        precision=precision,
        checkpoint=out,
        resume=resume,
        preview=None if previews is None or preview_images is None else _previews(Path(previews), *preview_images),
        preview_every=preview_every,
        **settings,
    )
    mirror.reflection = recipe.reflection if reflection is None else reflection
    own = {"threads": torch.get_num_threads(), "reflection": mirror.reflection}
    mirror.meta = {**(about or {}), **mirror.meta, **own}
    mirror.save(out)
    return mirror


def _previews(folder: Path, pictures: Tensor, labels: Tensor) -> Callable[[int, MirrorCFE], object]:
    """Writes strips of a few images of the decoder's pairs, one row each: each image drawn once, as it is learnt."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)

    def write(step: int, mirror: MirrorCFE) -> None:
        assert mirror.decoder is not None
        once = MirrorCFE(
            mirror.classifier,
            mirror.decoder,
            reflection=mirror.reflection,
            shift=mirror.shift,
            corrections=0,
            soften=mirror.soften,
            resolution=0.5,
        )
        partner = {p: q for pair in mirror.meta["pairs"] for p, q in (pair, pair[::-1])}
        chosen = [i for i, label in enumerate(labels.tolist()) if label in partner][:8]
        predicted = mirror.classifier.logits(mirror.classifier.prepare(pictures[chosen])).argmax(1).tolist()
        shown = [i for i, label in zip(chosen, predicted, strict=True) if label in partner]
        targets = [partner[label] for label in predicted if label in partner]
        if not shown:
            return
        found = once.explain(pictures[shown], targets, steps=9)
        low, high = (each[0].cpu() for each in (mirror.decoder.low, mirror.decoder.high))
        rows = [(torch.cat([each.prepared[None], each.images]).cpu() - low) / (high - low) for each in found]
        strips = torch.cat([row.clamp(0, 1).permute(1, 2, 0, 3).flatten(2) for row in rows], 1)
        pixels = (strips.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(folder / f"step_{step:06d}.png")

    return write


def _needed(data: str | os.PathLike[str] | None) -> str | os.PathLike[str]:
    if data is None:
        raise ValueError("data: give the folder or file of Fashion-MNIST (fashion_mnist.npz)")
    return data
