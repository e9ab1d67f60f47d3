"""Mirror-CFE: how an image must change, step by step, until the classifier crosses its boundary.

Chowdhury et al., "Looking in the mirror: A faithful counterfactual explanation method for interpreting deep image
classification models", ICCV 2025 (arXiv 2509.16822). Its code is not public; docs/mirror.md says what is the paper's,
what readers report of it, and what is ours.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, SupportsIndex

import torch
from torch import Tensor

from finecf.explainers import _mirror_fit as fitting
from finecf.explainers._latent_path import ClassDistances, LatentPath, path_of
from finecf.explainers._memory import budget_for, checked_micro_batch
from finecf.explainers._mirror_correct import Counts, Drawing, first_counterfactual
from finecf.explainers._mirror_draw import Canvas, Steps, places_of
from finecf.explainers._mirror_train import run_training
from finecf.explainers._reflection import (
    REFLECTIONS,
    GapHead,
    linear_flip,
    map_steps,
)
from finecf.explainers._shared import (
    Target,
    check_made_for,
    check_range,
    classes_of,
    one_of,
    originals,
    plain,
    progress_bar,
    sources_of,
    versions,
    wrapped,
)
from finecf.explainers._training import TrainingStopped
from finecf.explainers._trim import Trimmed, check_gradients, trim, trim_settings
from finecf.explainers.repaint import Repainted, Repainter
from finecf.explainers.result import Interrupted, Maps, MirrorExplanation, Probabilities
from finecf.models import Classifier
from finecf.models.decoder import PLAIN_SIDE, MirrorDecoder, load_decoder, save_decoder, shape_of
from finecf.models.fold import tolerance

SHIFTS: Final = ("uniform", "per_cell")
UNTRAINED: Final = ("warn", "refuse")

CORRECTIONS: Final = 8
"""How often an image is drawn anew at most, unless another number is given."""
_MICRO_BATCH: Final = {"cpu": 32, "cuda": 256}
_PIXELS: Final = 8 * 128 * 128
"""So many pixels are drawn at once on the CPU."""


class MirrorCFE:
    """Counterfactual images by reflection in the classifier's own feature space.

    Args:
        classifier: what `finecf.wrap` returned; its head must read the mean over cells (global average pooling).
        decoder: a `MirrorDecoder`, or a file that `save` wrote; None: `latent_path` and `class_distances` work, and
            `fit` makes one.
        reflection: "closed_form" (needs a linear head), "lbfgs" (the paper's search; any head) or "two_class"
            (eq. 1; other classes' logits move along). None: as the decoder's file says, else as it was trained, and
            `fit` as that one was trained; "closed_form" for a decoder that is no file, and where there is none yet.
        shift: "uniform" moves every cell of the map by z_k - z; "per_cell" mirrors every cell by itself (the mean is
            the same; not with "lbfgs"). None: as the decoder's file says that it was trained; "uniform" for a decoder
            that is no file, and where there is none yet.
        corrections: how often at most an image at k > 0 is drawn anew, from a map moved by the least change that makes
            up for what the image is short of: how far its target is behind the source, or the best other class,
            against what its latent says (O); 0: never (P). Each costs a forward and a backward of decoder and
            classifier, and most images need fewer. A latent may be missed in other directions as before.
        correction_blur: standard deviation in pixels: what is measured is the mean of the image and of the image so
            blurred, so that what is found withstands a blur (O), at another forward of the classifier; 0: of the image
            alone.
        soften: standard deviation in pixels of a blur of what a decoder of changes (`output="change"`) adds to an
            image: such decoders may draw checkered patches where the classifier wants texture (O). Training is not
            touched. None: as the decoder's file says, else 0.
        repainter: a `Repainter` of the same classifier, or a file that its `save` wrote (O). `trim` then looks for what
            suffices of the change on top of the repainted image, where that leads to the target, and of the change to
            the image itself elsewhere. The images along k are not touched.
        untrained_pairs: "warn" or "refuse", where the decoder was not trained on a pair that is asked for.
        resolution: in how fine steps of k the first counterfactual image is looked for.
        micro_batch: images decoded at a time; None: 256 on CUDA, and elsewhere 32, or fewer where they are large (8 of
            128 pixels a side): more are not faster there, and after Ctrl-C those that were finished together count.
        memory_budget: bytes for what is computed beside the model's weights; None: a quarter of what is free, at most
            1 GiB.
        generator: taken for the sake of one signature; explaining draws nothing, and `fit` has its own seed.
        progress: whether to show progress bars.

    Raises:
        ValueError: a setting is unknown, decoder or repainter were made for another classifier, or the decoder draws
            whole images, which cannot be softened.
    """

    def __init__(
        self,
        classifier: Classifier,
        decoder: MirrorDecoder | str | os.PathLike[str] | None = None,
        *,
        reflection: str | None = None,
        shift: str | None = None,
        corrections: int = CORRECTIONS,
        correction_blur: float = 0.0,
        soften: float | None = None,
        repainter: Repainter | str | os.PathLike[str] | None = None,
        untrained_pairs: str = "warn",
        resolution: float = 0.02,
        micro_batch: int | None = None,
        memory_budget: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        self.classifier = wrapped(classifier)
        self.reflection = "closed_form" if reflection is None else one_of("reflection", reflection, REFLECTIONS)
        self._trains_along = self.reflection
        self.shift = "uniform" if shift is None else one_of("shift", shift, SHIFTS)
        self.untrained_pairs = one_of("untrained_pairs", untrained_pairs, UNTRAINED)
        if not isinstance(corrections, SupportsIndex) or operator.index(corrections) < 0:
            raise ValueError(f"corrections is a whole number of at least 0; got {corrections}")
        if not 0 <= correction_blur < math.inf:
            raise ValueError(f"correction_blur is a standard deviation in pixels, at least 0; got {correction_blur}")
        if not 0 < resolution <= 0.5:
            raise ValueError(f"resolution is a step of k and must lie in (0, 0.5]; got {resolution}")
        self.resolution = resolution
        self.corrections, self.correction_blur = operator.index(corrections), float(correction_blur)
        self._asked_soften = soften
        if repainter is not None and not isinstance(repainter, Repainter):
            repainter = Repainter(classifier, repainter)
        if repainter is not None and repainter.classifier.differs_from(classifier.fingerprint()) is not None:
            raise ValueError("the repainter was made for another classifier: its marks are not where this one looks")
        self.repainter = repainter
        asked = checked_micro_batch(micro_batch)
        self.micro_batch = asked or _MICRO_BATCH.get(classifier.device.type, 32)
        self._pixels = _PIXELS if asked is None and classifier.device.type == "cpu" else None
        self.budget = budget_for(classifier.device, memory_budget)
        self.generator = generator
        self.progress = progress
        self.meta: dict[str, Any] = {}
        self.decoder: MirrorDecoder | None = None
        self._head: GapHead | None = None
        self._head_of: dict[str, object] = {}
        if isinstance(decoder, MirrorDecoder):
            self.decoder = decoder.to(classifier.device).eval()
        elif decoder is not None:
            self._load(decoder)
            trained = self.meta.get("recipe", self.meta)
            if shift is None:
                self.shift = trained.get("shift", "uniform")
            if reflection is None:
                self._trains_along = trained.get("reflection", "closed_form")
                self.reflection = self.meta.get("reflection", self._trains_along)
        if self.shift == "per_cell" and self.reflection == "lbfgs":
            raise ValueError('shift="per_cell" needs a reflection that is known cell by cell: not "lbfgs"')
        self.soften = self._softening(self.decoder, self.meta.get("soften", 0.0))
        if self.meta:
            self.meta |= self._ways()

    def __repr__(self) -> str:
        drawn = "no decoder yet"
        if self.decoder is not None:
            pairs = self.meta.get("pairs")
            drawn = "a decoder" + ("" if pairs is None else f" of {len(pairs)} pair{'' if len(pairs) == 1 else 's'}")
        return f"MirrorCFE({self.classifier!r}, {self.reflection!r}, {drawn})"

    # Latents

    def latent_path(
        self, images: object, target: Target, steps: Steps = 11, *, source: Target | None = None
    ) -> LatentPath:
        """Latents and logits along k; needs no decoder.

        Args:
            images: as the classifier's `preprocess` (else the model) takes them, [B,Ch,H,W] or [Ch,H,W].
            target: the class wanted, by index or name, for all images or one for each.
            steps: how many k from 0 to 1, or the k themselves.
            source: the class to move away from; None: the predicted one.

        Raises:
            ValueError: the model has no global average pooling, a class is unknown, target and source are the same, or
                the head is not linear and the reflection needs one that is.
        """
        x = self.classifier.prepare(images)
        # A search needs gradients, which the user's own inference mode would not give.
        with torch.inference_mode(False), plain(self.classifier.device):
            features, logits = self.classifier.features_and_logits(x)
            head = self._gap_head(features, logits)
            own, wanted = classes_of(self.classifier, logits, source, target)
            reflected = head.reflect(features.mean((2, 3)), own, wanted, self.reflection)
            return path_of(
                head, reflected, own, wanted, places_of("steps", steps, x.device), features.dtype, self.reflection
            )

    def class_distances(self, images: object, *, source: Target | None = None) -> ClassDistances:
        """How far each image is from every class: all targets at once, by the closed form (or eq. 1).

        Raises:
            ValueError: as `latent_path`; or the reflection is "lbfgs", which would be a search for each class.
        """
        if self.reflection == "lbfgs":
            raise ValueError('class_distances needs a reflection without a search: "closed_form" or "two_class"')
        x = self.classifier.prepare(images)
        with plain(self.classifier.device):
            features, logits = self.classifier.features_and_logits(x)
            head = self._gap_head(features, logits)
            own = sources_of(self.classifier, logits, source)
            classes = logits.shape[1]
            everyone = torch.arange(classes, device=x.device)
            step = max(1, self.budget // (4 * 8 * classes * max(classes, features.shape[1])))
            distances, stars = [], []
            for latents, mine in zip(features.mean((2, 3)).split(step), own.split(step), strict=True):
                rows, pairs = mine.repeat_interleave(classes), everyone.repeat(len(mine))
                reflected = head.reflect(latents.repeat_interleave(classes, 0), rows, pairs, self.reflection)
                assert reflected.slope is not None
                star = linear_flip(reflected.logits, reflected.slope, pairs)
                star = torch.where(rows == pairs, math.nan, star)
                length = torch.where(star.isnan(), math.inf, star * reflected.step.norm(dim=1))
                distances.append(torch.where(rows == pairs, 0.0, length).view(-1, classes))
                stars.append(star.view(-1, classes))
            return ClassDistances(torch.cat(distances), torch.cat(stars), own)

    def _gap_head(self, features: Tensor, logits: Tensor) -> GapHead:
        """The head as a function of the mean over cells; checked on these maps, and built once per classifier."""
        fingerprint = self.classifier.fingerprint() | {"device": str(features.device)}
        if self._head is not None and self._head_of == fingerprint:
            return self._head
        empty = len(features) == 0
        if empty:
            features = features.new_zeros(1, *features.shape[1:])
            logits = self.classifier.logits_from(features)
        (height, width), dtype = features.shape[2:], features.dtype

        def of_means(latents: Tensor) -> Tensor:  # it is kept: the maps must not be
            maps = latents.to(dtype)[:, :, None, None].expand(-1, -1, height, width)
            wanted = torch.is_grad_enabled()
            with self.classifier.eval_mode(), torch.set_grad_enabled(wanted):
                return self.classifier.head(maps)

        seen = of_means(features[:2].mean((2, 3)))
        if not float((seen - logits[:2]).abs().max()) <= tolerance(self.classifier.dtype, logits[:2]):
            raise ValueError(
                f"the head behind layer {self.classifier.layer_name!r} reads more than the mean over cells, and "
                "Mirror-CFE reflects that mean: it needs a model with global average pooling (ResNet, DenseNet, "
                "MobileNet, EfficientNet...). finecf.FGVCE and finecf.SMDL explain this one"
            )
        fold = self.classifier.fold(features[:1])
        if fold is not None and fold.kind == "linear":
            head = GapHead.linear(fold.weight, fold.bias)
        elif self.reflection == "lbfgs":
            head = GapHead(of_means)
        else:
            raise ValueError(
                f"reflection {self.reflection!r} needs a linear head behind the pooling, and the one of this model is "
                f'not ({self.classifier.fold_reason}): use reflection="lbfgs"'
            )
        if not empty:  # zeros do not show what a head reads
            self._head, self._head_of = head, fingerprint
        return head

    # The decoder

    @torch.inference_mode(False)  # it needs gradients, which the user's own inference mode would not give
    def fit(
        self,
        data: fitting.Items,
        pairs: Sequence[tuple[int | str, int | str]] | None = None,
        epochs: int = 30,
        *,
        steps: int | None = None,
        batch: int = 32,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.5, 0.999),
        weights: Mapping[str, float] | None = None,
        alpha: float = 0.2,
        kl_order: str = "image",
        decoder: Mapping[str, Any] | None = None,
        skips: bool | None = None,
        discriminator: Sequence[int] | None = None,
        conditional: bool = False,
        augment: int = 0,
        blend: float = 0.0,
        warm_up: int = 0,
        noise: float = 0.0,
        blur: float = 0.0,
        unsure: float = 0.0,
        seed: int = 0,
        precision: str = "float32",
        compile: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int = 200,
        resume: bool = True,
        preview: Callable[[int, MirrorCFE], object] | None = None,
        preview_every: int = 500,
    ) -> list[dict[str, float]]:
        """Train the mapping network; the classifier stays as it is.

        Args:
            data: a Dataset of images or (image, label, ...), a DataLoader of one (its order and batches are not used),
                images [N,Ch,H,W], or (images, labels); as the classifier's `preprocess` takes them. Images that the
                classifier does not recognise as their label are left out.
            pairs: classes between which the decoder shall lead, by index or name, both ways; None: all pairs, at most
                200.
            epochs: passes over the images of the pairs' classes.
            steps: how many steps, instead of epochs.
            batch: images in a step.
            learning_rate: of Adam; it falls along a cosine (P: 2e-4, constant).
            betas: of Adam.
            weights: of the losses "classification", "adversarial", "reconstruction", "feature" and "triangulation", by
                name; 1 where none is given. Without a weight of "adversarial" no discriminator is trained.
            alpha: half the width of the triangulation loss's band.
            kl_order: "image" or "latent": of which distribution the classification loss is the mean.
            decoder: arguments of `MirrorDecoder` (`width`, `image_range`...).
            skips: whether the decoder gets shallower maps of the source; None: for images of more than 64 pixels.
            discriminator: its widths; None: (32, 64, 128), and (64, 128, 256, 512) above 64 pixels.
            conditional: whether the discriminator is told which class an image is to show (O).
            augment: pixels by which training images are moved at random.
            warm_up: steps at the start in which all losses but the reconstruction have less weight: none in the first
                half, then rising (O). Large decoders need it, or they learn textures that fool the classifier first.
            noise: standard deviation, as a share of the image range, of noise added to half of the drawn images before
                the classifier sees them, so that what it is told does not hang on single pixels (O).
            blur: largest standard deviation, in pixels, of a blur of every second drawn image before the classifier
                sees it, so that its class survives one (O).
            unsure: how much more often images are drawn of which the classifier is unsure: with a weight of
                1 + `unsure` (1 - confidence); they are where a small error of the image turns the prediction (O).
            blend: largest share of another image that is blended into every second one, so that the decoder sees
                latents of little confidence as held-out images have them (O).
            seed: everything drawn depends on it and on the number of the step.
            precision: "float32", or "bfloat16" for decoder and discriminator.
            compile: whether these two go through torch.compile.
            checkpoint: a file. The state goes to `<checkpoint>.resume`, which is removed when the decoder is written at
                the end. A file that is there already is written over: a call goes on from a state alone, and every
                other training starts from nothing, whatever decoder the explainer holds.
            save_every: steps between two states; one is also written at an interruption.
            resume: whether to go on from `<checkpoint>.resume`.
            preview: called with the number of steps done and this explainer.
            preview_every: steps between two previews.

        Returns:
            The losses of each step.

        Raises:
            ValueError: settings, pairs, images beyond the decoder's range, or a state of another training.
            TrainingStopped: a loss, or in the last step a weight, became NaN or infinite; the decoder is then the one
                that it was before, if any.

        Warns:
            UserWarning: the state is of other images, or no reflection crosses the boundary of some pair.
        """
        one_of("precision", precision, fitting.PRECISIONS)
        one_of("kl_order", kl_order, ("image", "latent"))
        for name, value in (("save_every", save_every), ("preview_every", preview_every)):
            if value < 1:
                raise ValueError(f"{name} is a number of steps, at least 1; got {value}")
        out = None if checkpoint is None else fitting.checked_checkpoint(checkpoint)  # not after hours
        pool = fitting.Pool(self.classifier, data)
        known = list(inspect.signature(MirrorDecoder).parameters)[1:]  # the first is the shape, which the model gives
        for name in decoder or {}:
            if name not in known:
                raise ValueError(f"decoder holds {name!r}; MirrorDecoder takes {', '.join(known)}")
        first = pool.take(torch.arange(min(2, len(pool))))
        with plain(self.classifier.device):
            head = self._gap_head(*self.classifier.features_and_logits(first))
        named = fitting.named_pairs(self.classifier, pairs)  # now the number of classes is known
        self._warn_of_closed_ways(head, named)
        large = max(first.shape[2:]) > PLAIN_SIDE
        shape = shape_of(self.classifier, first[0], skips)
        wanted = {index for pair in named for index in pair}
        recipe = fitting.Recipe(
            steps=1 if steps is None else steps,
            batch=batch,
            learning_rate=learning_rate,
            betas=betas,
            seed=seed,
            weights=fitting.checked_weights(weights),
            alpha=alpha,
            kl_order=kl_order,
            precision=precision,
            reflection=self._trains_along,
            shift=self.shift,
            discriminator=tuple(discriminator or ((64, 128, 256, 512) if large else (32, 64, 128))),
            augment=augment,
            blend=blend,
            warm_up=warm_up,
            noise=noise,
            unsure=unsure,
            conditional=conditional,
            blur=blur,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would seed CUDA as well
            net = MirrorDecoder(shape, **dict(decoder or {}))
            soften = self._softening(net)
            trainer = fitting.Trainer(self.classifier, head, net, pool, named, recipe, compile)
        if steps is None:
            trainer.set_epochs(epochs)
        state = None if out is None else out.with_name(out.name + ".resume")
        if state is not None and resume and state.is_file():
            trainer.load(state)
        before = self.decoder, self.soften, self.reflection, self.meta
        self.decoder, self.soften, self.reflection = net, soften, self._trains_along
        meta: dict[str, Any] = {
            "classifier": self.classifier.fingerprint(),
            "pairs": named,
            "classes": [self.classifier.class_name(index) for index in sorted(wanted)],
            "recipe": {**trainer.recipe.__dict__},
            "torch": torch.__version__,
            **self._ways(),
        }
        self.meta = meta
        shown = None if preview is None else lambda step: preview(step, self)
        try:
            run_training(trainer, state, save_every, shown, preview_every, self.progress)
        except TrainingStopped:
            self.decoder, self.soften, self.reflection, self.meta = before
            raise
        finally:
            net.eval().requires_grad_(False)
            meta["steps_done"] = trainer.step
        if out is not None:
            self.save(out)
        if state is not None:
            state.unlink(missing_ok=True)
        return trainer.history

    def _warn_of_closed_ways(self, head: GapHead, pairs: list[tuple[int, int]]) -> None:
        """Warn of pairs whose boundary the reflection does not reach: where the head has not full rank."""
        if head.weight is None or self._trains_along == "lbfgs":
            return
        source, target = torch.tensor(pairs, device=head.weight.device).T
        # By how much the margin falls from k = 0 to 1, in shares of itself: 2 where the logits are swapped.
        normal = head.weight[target] - head.weight[source]
        gains = (normal * head.directions(source, target, self._trains_along)).sum(1)
        closed = (gains < 1 + 1e-6).nonzero()[:, 0]
        if len(closed):
            names = [self.classifier.class_name(index) for index in pairs[int(closed[0])]]
            warnings.warn(
                f"along the reflection {self._trains_along!r} no image becomes the other class in {len(closed)} of "
                f"{len(pairs)} pairs ({names[0]} - {names[1]}): the head's weight has rank {head.rank} for "
                f'{len(head.weight)} classes. MirrorCFE(classifier, reflection="two_class") crosses the boundary of '
                "any two classes whose weights differ",
                UserWarning,
                stacklevel=4,  # above fit's inference_mode
            )

    def save(self, path: str | os.PathLike[str], **more: object) -> None:
        """Write the decoder, what it was trained on and the classifier's fingerprint to a safetensors file."""
        if self.decoder is None:
            raise ValueError("there is no decoder to save: fit one first")
        meta = {"classifier": self.classifier.fingerprint(), "shift": self.shift, **self._ways()}
        meta |= {**self.meta, **more}
        save_decoder(path, self.decoder, meta)

    def _load(self, path: str | os.PathLike[str]) -> None:
        decoder, meta = load_decoder(path)
        check_made_for(self.classifier, meta, "decoder", path)
        self.decoder, self.meta = decoder.to(self.classifier.device), meta
        self._compare_names(path)

    def _compare_names(self, path: str | os.PathLike[str]) -> None:
        """Warn where the file calls a class otherwise: names in another order than the outputs lead anywhere."""
        other, theirs = self.otherwise_named(), self.names_in_file()
        if other:
            mine = self.classifier.class_name(other[0])
            warnings.warn(
                f"output {other[0]} is {theirs[other[0]]!r} in the decoder's file {path} and {mine!r} in class_names "
                f"({len(other)} of {len(theirs)} classes differ): if the names are not in the order of the model's "
                "outputs, targets are other classes than they are called",
                UserWarning,
                stacklevel=4,
            )

    def names_in_file(self) -> dict[int, str]:
        """What the decoder's file calls the classes of its pairs."""
        numbers = sorted({index for pair in self.meta.get("pairs", []) for index in pair})
        return dict(zip(numbers, self.meta.get("classes", []), strict=False))

    def otherwise_named(self) -> list[int]:
        """The classes of the decoder's pairs that its file calls otherwise than the classifier's `class_names` do."""
        theirs = self.names_in_file()
        if self.classifier.class_names is None:
            return []
        mine = {index: self.classifier.class_name(index) for index in theirs}
        unnamed = all(name == str(index) for index, name in theirs.items())
        if unnamed and not {*theirs.values()} & {*mine.values()}:  # else they are digits, and their names
            return []
        return [index for index in theirs if theirs[index] != mine[index]]

    # Explaining

    def explain(
        self,
        images: object,
        target: Target,
        steps: Steps = 11,
        *,
        source: Target | None = None,
        sources: Sequence[str] | None = None,
        trim: bool | Mapping[str, Any] = False,
    ) -> list[MirrorExplanation]:
        """Draw images along k, find the first that the classifier calls the target, and see what it says of each.

        Args:
            images: as of `latent_path`.
            target: as of `latent_path`.
            steps: the places of the strip, as of `latent_path`.
            source: as of `latent_path`.
            sources: names of the images.
            trim: whether to look for a part of the change to the image of k = 1 that suffices
                (`finecf.explainers.trim`, O): 20 gradients of the classifier for the image, and 20 for the blurred
                one; with a repainter, on top of the repainted image. Its settings by name,
                {"blur": 0, "grid": (16, 16)}, instead of True: those, and else its own.

        Returns:
            One explanation for each image.

        Raises:
            TypeError: `trim` is neither a bool nor a mapping.
            ValueError: there is no decoder, the images are not of its size or range, an untrained pair where they are
                refused, settings that trimming refuses, images that the repainter refuses, or as `latent_path`.
            Interrupted: Ctrl-C; what was finished is in its `explanations`.
        """
        decoder = self._ready()
        x = self.classifier.prepare(images)
        shown = originals(images, x)
        if sources is not None and len(sources) != len(x):
            raise ValueError(f"sources must name each of the {len(x)} images, got {len(sources)} names")
        names: list[str | None] = [None] * len(x) if sources is None else list(sources)
        if len(x) == 0:
            return []
        if tuple(x.shape[1:]) != decoder.shape.image:
            raise ValueError(
                f"the images are {list(x.shape[1:])}, and the decoder draws {list(decoder.shape.image)}: resize them, "
                "or fit a decoder for this size"
            )
        advice = "give images scaled as those it was trained on (a preprocess is applied here, not by you)"
        check_range(x, decoder.low, decoder.high, advice, bounds=fitting.DECODER_RANGE)
        k = places_of("steps", steps, x.device)
        settings = trim_settings(trim, decoder.shape.features[1:], x.shape[2:])
        trimming = settings if trim or isinstance(trim, Mapping) else None
        results: list[MirrorExplanation] = []
        # Corrections need gradients, which the user's own inference mode would not give.
        with (
            torch.inference_mode(False),
            plain(self.classifier.device),
            progress_bar(self.progress, len(x)) as advance,
        ):
            x = x.clone() if x.is_inference() else x
            # What cannot be asked for is refused before anything is drawn.
            said = torch.cat([self.classifier.logits(part) for part in x.split(self.micro_batch)])
            own, wanted = classes_of(self.classifier, said, source, target)
            self._check_pairs(own, wanted)
            if self.repainter is not None:
                places = self.repainter.classifier.device, self.classifier.device
                if places[0] != places[1]:
                    raise ValueError(
                        f"the repainter's model is on {places[0]} and this one on {places[1]}: give both one classifier"
                    )
                self.repainter.check_prepared(x)
                self.repainter.warn_of_unknown(own, wanted)
            if trimming is not None:
                check_gradients(self.classifier, x[:1])
            # The strip of an image, drawn and encoded again, is what takes memory.
            strip = 4 * (len(k) + 3) * x[0].numel() * x.element_size()
            most = self.micro_batch
            if self._pixels is not None:
                most = min(most, self._pixels // x[0, 0].numel())
            size = max(1, min(most, self.budget // strip))
            try:
                for start in range(0, len(x), size):
                    rows = slice(start, start + size)
                    results += self._explain(
                        decoder, x[rows], shown[rows], own[rows], wanted[rows], k, names[rows], trimming
                    )
                    advance(len(x[rows]))
            except KeyboardInterrupt as stop:
                raise Interrupted(results, len(x)) from stop
        return results

    def _explain(
        self,
        decoder: MirrorDecoder,
        x: Tensor,
        shown: Tensor,
        own: Tensor,
        wanted: Tensor,
        k: Tensor,
        names: list[str | None],
        trimming: Mapping[str, Any] | None,
    ) -> list[MirrorExplanation]:
        started = time.perf_counter()
        drawing = self._drawing(decoder, x, own, wanted)
        canvas = drawing.canvas
        moved = drawing.head, drawing.reflected, canvas.source, canvas.target
        path = path_of(*moved, k, canvas.features.dtype, self.reflection)
        strip, strip_logits, strip_latents = [], [], []
        rows = torch.arange(len(x), device=x.device)
        for each in k:
            image, features, logits = drawing.at(rows, each.expand(len(x)))
            strip.append(image)
            strip_logits.append(logits.double())
            strip_latents.append(features.mean((2, 3)))
        first_k, first, first_logits = first_counterfactual(drawing, self.resolution)
        in_strip = {place: number for number, place in enumerate(k.tolist())}

        def drawn_at(place: float) -> tuple[Tensor, Tensor]:
            if place in in_strip:
                return strip[in_strip[place]], strip_logits[in_strip[place]]
            image, _, logits = drawing.at(rows, torch.full((len(x),), place, dtype=torch.float64, device=x.device))
            return image, logits.double()

        blank, blank_logits = drawn_at(0.0)
        mirror, mirror_logits = drawn_at(1.0)
        errors = (torch.stack(strip_latents, 1) - path.latents).abs().mean(-1).double()
        painted = (
            None if self.repainter is None else self.repainter.repaint_prepared(x, canvas.target, source=canvas.source)
        )
        less = upon = None
        if trimming is not None:
            less, upon = self._trim(x, mirror, painted, canvas, trimming)
        shares = None
        if less is not None:
            whole = _size_of(mirror - x)
            shares = torch.where(whole > 0, _size_of(less.images - x) / whole, 0.0)  # of nothing nothing is needed
        seconds = (time.perf_counter() - started) / len(x)
        before = drawing.logits.double().softmax(1)
        results = []
        for b in range(len(x)):
            cut = less is not None and bool(less.found[b])
            source, target = int(canvas.source[b]), int(canvas.target[b])
            predicted = int(before[b].argmax())
            found = not math.isnan(float(first_k[b]))
            chosen = first[b] if found else mirror[b]
            after = (first_logits[b] if found else mirror_logits[b]).double().softmax(0)
            results.append(
                MirrorExplanation(
                    image=shown[b],
                    source=names[b],
                    predicted=predicted,
                    target=target,
                    predicted_name=self.classifier.class_name(predicted),
                    target_name=self.classifier.class_name(target),
                    probabilities_before=Probabilities(float(before[b, predicted]), float(before[b, target])),
                    probabilities_after=Probabilities(float(after[predicted]), float(after[target])),
                    maps=Maps(
                        {
                            "difference": (chosen - x[b]).abs().mean(0),
                            "change": (chosen - blank[b]).abs().mean(0),
                        }
                    ),
                    # The image itself was run twice.
                    evaluations=2
                    + int(drawing.counts.seen[b])
                    + (0 if painted is None else int(painted.evaluations[b]))
                    + (0 if less is None else int(less.evaluations[b]) + (painted is not None)),
                    seconds=seconds,
                    seed=None,
                    versions=versions() | {"device": str(x.device), "micro_batch": str(self.micro_batch)},
                    notes=[
                        *path.notes,
                        *self._notes(source, predicted, target),
                        *_note_of_painting(painted, b),
                        *_note_of_trim(less, b),
                    ],
                    reflection=self.reflection,
                    origin=source,
                    origin_name=self.classifier.class_name(source),
                    k=k.cpu(),
                    images=torch.stack([each[b] for each in strip]).cpu(),
                    prepared=x[b].cpu().clone(),  # it may be `image` itself
                    reconstruction=blank[b].cpu(),
                    first_image=first[b].cpu() if found else None,
                    first_k=float(first_k[b]) if found else None,
                    mirror_image=mirror[b].cpu(),
                    mirror_valid=bool(mirror_logits[b].argmax() == target),
                    redrawn_as=int(blank_logits[b].argmax()),
                    redrawn_name=self.classifier.class_name(int(blank_logits[b].argmax())),
                    latent_first_k=None if math.isnan(float(path.k_star[b])) else float(path.k_star[b]),
                    latent_logits=path.logits[b].cpu(),
                    image_logits=torch.stack([each[b] for each in strip_logits]).cpu(),
                    latent_error=errors[b].cpu(),
                    residual=float(path.residual[b]),
                    corrections=self.corrections,
                    correction_blur=self.correction_blur,
                    soften=self.soften,
                    trimmed_image=less.images[b].cpu() if less is not None and cut else None,
                    trimmed_mask=less.mask[b].cpu() if less is not None and cut else None,
                    trimmed_share=float(shares[b]) if shares is not None and cut else None,
                    trimmed_margin=float(trimming["margin"]) if trimming is not None and cut else None,
                    trimmed_blur=float(trimming["blur"]) if trimming is not None and cut else None,
                    trimmed_stands=bool(less.stands[b]) if less is not None and cut else None,
                    repainted_image=None if painted is None else painted.images[b].cpu(),
                    repainted_valid=None if painted is None else bool(painted.found[b]),
                    trimmed_upon_repainted=bool(upon[b]) if upon is not None and cut else None,
                )
            )
        return results

    def _trim(
        self, x: Tensor, ends: Tensor, painted: Repainted | None, canvas: Canvas, settings: Mapping[str, Any]
    ) -> tuple[Trimmed, Tensor | None]:
        """What suffices of the changes from images to ends [B,Ch,H,W]; and bool [B], whether that is what comes on top
        of the repainted image, where there is one.
        """
        starts, upon = x, None
        if painted is not None:
            low, high = canvas.decoder.low, canvas.decoder.high
            further = torch.clamp(painted.images + (ends - x), low, high)
            upon = (painted.rounds > 0) & (self.classifier.logits(further).argmax(1) == canvas.target)
            chosen = upon[:, None, None, None]
            starts, ends = torch.where(chosen, painted.images, x), torch.where(chosen, further, ends)
        limits: Mapping[str, Any] = {"micro_batch": self.micro_batch, "memory_budget": self.budget}
        return trim(self.classifier, starts, ends, canvas.target, **settings, **limits), upon

    def _drawing(self, decoder: MirrorDecoder, x: Tensor, own: Tensor, wanted: Tensor) -> Drawing:
        if decoder.shape.skips:
            *skips, features = self.classifier.pyramid(x)
            logits = self.classifier.logits_from(features)
        else:
            skips = []
            features, logits = self.classifier.features_and_logits(x)
        if tuple(features.shape[1:]) != decoder.shape.features:
            raise ValueError(
                f"the decoder reads maps {list(decoder.shape.features)} and the classifier gives "
                f"{list(features.shape[1:])}: it was made for another classifier"
            )
        head = self._gap_head(features, logits)
        reflected = head.reflect(features.mean((2, 3)), own, wanted, self.reflection)
        moves = map_steps(head, reflected, features, own, wanted, self.shift, self.reflection)
        if self.shift == "per_cell":  # a map for each image: half the memory will do
            moves = moves.to(features.dtype)
        canvas = Canvas.of(self.classifier, decoder, x, features, own, wanted, skips, self.soften)
        counts = Counts(torch.zeros(len(x), dtype=torch.int64, device=x.device))
        settings = self.corrections, self.correction_blur, self.budget
        return Drawing(canvas, head, logits, reflected, moves, *settings, counts)

    def _ways(self) -> dict[str, object]:
        """How this explainer draws, as a decoder's file says it."""
        return {"reflection": self.reflection, "soften": self.soften}

    def _softening(self, decoder: MirrorDecoder | None, own: object = 0.0) -> float:
        """The softening that was asked for, else the decoder's own."""
        soften = own if self._asked_soften is None else self._asked_soften
        if not isinstance(soften, int | float) or not 0 <= soften < math.inf:
            raise ValueError(f"soften is a standard deviation in pixels, at least 0; got {soften}")
        if soften and decoder is not None and not decoder.changes:
            raise ValueError(
                f"soften={soften:g} blurs what is added to an image, and this decoder draws whole images: leave it "
                'at 0, or fit a decoder of changes, fit(..., decoder={"output": "change"})'
            )
        return float(soften)

    def _ready(self) -> MirrorDecoder:
        if self.decoder is None:
            raise ValueError(
                "there is no decoder yet: call fit(data, pairs=...), or give MirrorCFE(classifier, decoder=FILE) "
                "(finecf.training.shipped_decoder names the files for the small nets that ship); latent_path and "
                "class_distances need none"
            )
        return self.decoder.to(self.classifier.device)  # the model may have moved

    def _untrained(self, source: int, target: int) -> bool:
        pairs = self.meta.get("pairs")
        return pairs is not None and [min(source, target), max(source, target)] not in [list(pair) for pair in pairs]

    def _check_pairs(self, own: Tensor, wanted: Tensor) -> None:
        for source, target in sorted(set(zip(own.tolist(), wanted.tolist(), strict=True))):
            if not self._untrained(source, target):
                continue
            names = [self.classifier.class_name(index) for index in (source, target)]
            text = (
                f"the decoder was not trained on the pair {names[0]} -> {names[1]} (it knows "
                f"{_named_pairs(self.classifier, self.meta['pairs'])}): the images may be of neither class"
            )
            if self.untrained_pairs == "refuse":
                raise ValueError(text)
            warnings.warn(text, UserWarning, stacklevel=3)

    def _notes(self, source: int, predicted: int, target: int) -> list[str]:
        notes = []
        if source != predicted:
            notes.append(
                f"the source {self.classifier.class_name(source)} is not the predicted class: the target may not win "
                "anywhere on the path"
            )
        if self._untrained(source, target):
            notes.append("the decoder was not trained on this pair")
        return notes

    def attribute(self, inputs: Tensor, target: Target, **options: Any) -> Tensor:
        """How much each pixel changes up to the first counterfactual image (else to k = 1), [B,1,H,W]: mean absolute
        difference over channels from the image as it is decoded at k = 0.
        """
        found = self.explain(inputs, target, steps=2, **options)
        if not found:
            return inputs.new_zeros(0, 1, *inputs.shape[-2:])
        return torch.stack([each.maps["change"] for each in found])[:, None]


def _size_of(change: Tensor) -> Tensor:
    """Mean absolute value of each image's change, float64 [B]."""
    return change.double().abs().mean((1, 2, 3))


def _note_of_painting(painted: Repainted | None, row: int) -> list[str]:
    """What to say of one image that was to be repainted and could not be."""
    if painted is None or int(painted.rounds[row]):
        return []
    return ["the painter was not trained on both classes: the image was not repainted"]


def _note_of_trim(trimmed: Trimmed | None, row: int) -> list[str]:
    """What to say of one image that was to be trimmed and could not be."""
    if trimmed is None or bool(trimmed.found[row]):
        return []
    return ["the image of k = 1 is not classified as the target, and was not trimmed"]


def _named_pairs(classifier: Classifier, pairs: Sequence[Sequence[int]]) -> str:
    named = [f"{classifier.class_name(p)}-{classifier.class_name(q)}" for p, q in pairs]
    return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
