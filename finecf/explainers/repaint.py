"""Where a counterfactual image may start from: the image with the marks of the other class painted in (ours).

Mirror-CFE's decoder is asked to cross the classifier's boundary, and what crosses it need not look like the other
class. A painter is asked for looks alone. Nothing here is of the paper; docs/mirror.md says what it is worth.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf.explainers._memory import checked_micro_batch
from finecf.explainers._mirror_fit import PRECISIONS, Items, Pool, checked_checkpoint, named_pairs
from finecf.explainers._mirror_train import run_training
from finecf.explainers._repaint_fit import PainterRecipe, PainterTrainer
from finecf.explainers._shared import Target, check_made_for, check_range, classes_of, one_of, plain, wrapped
from finecf.explainers._spoiling import SQUARES, Windows, marks_of, middles_of, spoil, window_step
from finecf.explainers._training import TrainingStopped
from finecf.models import Classifier
from finecf.models.decoder import Range
from finecf.models.painter import WIDTHS, Painter, load_painter, save_painter

SHARE: Final = 0.5
DRAWS: Final = 3
ROUNDS: Final = 2
LEARNING_RATE: Final = 1.5e-3
THRESHOLD: Final = 0.03
_MICRO_BATCH: Final = 32


@dataclass(frozen=True, eq=False)
class Repainted:
    """B images, repainted.

    Attributes:
        images: [B,Ch,H,W], as the model takes them.
        source: int64 [B], the classes moved away from.
        target: int64 [B], the classes wanted.
        mask: bool [B,1,H,W], where they may have changed.
        rounds: int64 [B], how often each was repainted; 0 where the painter does not know both classes.
        found: bool [B], whether the classifier calls it the target now.
        evaluations: int64 [B], how often the classifier was run for each.
    """

    images: Tensor
    source: Tensor
    target: Tensor
    mask: Tensor
    rounds: Tensor
    found: Tensor
    evaluations: Tensor

    def __repr__(self) -> str:
        return f"Repainted({len(self.images)} images, {int(self.found.sum())} called the target)"


class Repainter:
    """Paints what tells the target from the source into images, where the classifier sees it.

    In training, real images are spoiled where the classifier's evidence for their class against a look-alike lies
    (or for the look-alike against it), and a small U-net that is told the class mends them: no pair of images, and no
    gradient of the classifier. An image is repainted by adding what is mended for the target minus what is mended for
    the source, from the same spoiled image, so that what the painter does not know cancels.

    Most repainted images are not called the target: nothing asks the classifier. `MirrorCFE(..., repainter=...)` goes
    on from them.

    Args:
        classifier: what `finecf.wrap` returned; its head must be linear behind global average pooling.
        painter: a `Painter`, which is moved to the classifier's device, set to eval and frozen, or a file that `save`
            wrote; None: `fit` makes one.
        share: marks are where the evidence is above this share of its largest, in (0,1).
        draws: spoiled images over which what is added is a mean.
        rounds: how often an image is repainted at most; it ends with the round after which it is called the target.
        threshold: a share of the image range; in each round a pixel's change is shortened by so much of its mean over
            channels, and smaller ones are left out (soft thresholding, as of Donoho, IEEE Trans. Inf. Theory 1995):
            where the painter knows no difference between the classes, what is left of one is noise. 0: nothing is.
        micro_batch: images painted at a time; None: 32.
        progress: whether `fit` shows a bar.

    Raises:
        ValueError: a setting that cannot be, or a painter made for another classifier.
    """

    def __init__(
        self,
        classifier: Classifier,
        painter: Painter | str | os.PathLike[str] | None = None,
        *,
        share: float = SHARE,
        draws: int = DRAWS,
        rounds: int = ROUNDS,
        threshold: float = THRESHOLD,
        micro_batch: int | None = None,
        progress: bool | None = None,
    ) -> None:
        self.classifier = wrapped(classifier)
        if not 0 < share < 1:
            raise ValueError(f"share is one of the largest evidence and must lie in (0, 1); got {share}")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a share of the image range and must lie in [0, 1); got {threshold}")
        for name, value in (("draws", draws), ("rounds", rounds)):
            if not isinstance(value, SupportsIndex) or operator.index(value) < 1:
                raise ValueError(f"{name} is a whole number of at least 1; got {value}")
        self.share, self.threshold = float(share), float(threshold)
        self.draws, self.rounds = operator.index(draws), operator.index(rounds)
        self.micro_batch = checked_micro_batch(micro_batch) or _MICRO_BATCH
        self.progress = progress
        self.meta: dict[str, Any] = {}
        self.painter: Painter | None = None
        if isinstance(painter, Painter):
            self.painter = painter.to(classifier.device).eval().requires_grad_(False)
        elif painter is not None:
            loaded, meta = load_painter(painter)
            check_made_for(self.classifier, meta, "painter", painter)
            self.painter, self.meta = loaded.to(classifier.device), meta
        if self.painter is not None and self.painter.window % window_step(self.painter.settings["widths"]):
            raise ValueError(
                f"the painter's window has {self.painter.window} pixels a side; what is spoiled of it are squares, and "
                f"it must be a multiple of {window_step(self.painter.settings['widths'])}"
            )

    def __repr__(self) -> str:
        known = "no painter yet" if self.painter is None else f"a painter of {self.painter.window}-pixel windows"
        return f"Repainter({self.classifier!r}, {known})"

    @torch.inference_mode(False)  # it needs gradients, which the user's own inference mode would not give
    def fit(
        self,
        data: Items,
        pairs: Sequence[tuple[int | str, int | str]] | None = None,
        *,
        steps: int = 20_000,
        batch: int = 32,
        learning_rate: float = LEARNING_RATE,
        window: int | None = None,
        widths: Sequence[int] = WIDTHS,
        image_range: Range = (0.0, 1.0),
        flip: bool = True,
        seed: int = 0,
        precision: str = "float32",
        checkpoint: str | os.PathLike[str] | None = None,
        save_every: int = 500,
        resume: bool = True,
    ) -> list[dict[str, float]]:
        """Train the painter on real images; the classifier stays as it is.

        Args:
            data: as of `MirrorCFE.fit`; images that the classifier does not recognise as their label are left out.
            pairs: look-alikes, by index or name, each led to the other; None: all pairs, at most 200.
            steps: of the optimiser.
            batch: images in a step.
            learning_rate: of AdamW; it rises in the first tenth of the steps, then falls along a cosine.
            window: pixels a side of what the painter sees of an image, a multiple of 16 and of 2 to the power of the
                number of stages (together 32 by default); None: half of the image's shorter side, or the next such
                multiple below, at least one.
            widths: channels of the U-net's stages.
            image_range: least and largest value of the images as the model takes them, a number or one per channel.
            flip: whether all images of a step are mirrored left to right in half of the steps; False where a mirrored
                image may be of another class.
            seed: everything drawn depends on it and on the number of the step.
            precision: "float32" or "bfloat16".
            checkpoint: a file, as of `MirrorCFE.fit`; the state is in `<checkpoint>.resume` until it is written.
            save_every: steps between two states; one is also written at an interruption.
            resume: whether to go on from `<checkpoint>.resume`.

        Returns:
            The loss of each step, "mending": mean absolute error where images were spoiled, as a share of the range.

        Raises:
            ValueError: settings, pairs, images beyond the range, a head that is not linear, or a state of another
                training.
            TrainingStopped: the loss, or in the last step a weight, became NaN or infinite; the painter is then the
                one that it was before, if any.

        Warns:
            UserWarning: the state is of other images.
        """
        one_of("precision", precision, PRECISIONS)
        if save_every < 1:
            raise ValueError(f"save_every is a number of steps, at least 1; got {save_every}")
        out = None if checkpoint is None else checked_checkpoint(checkpoint)
        pool = Pool(self.classifier, data)
        first = pool.take(torch.arange(1))
        with plain(self.classifier.device):
            weight = self._weight(self.classifier.features(first))
        named = named_pairs(self.classifier, pairs, "the painter")
        side = min(first.shape[2:])
        step = window_step(widths)
        if window is None:
            window = max(step, side // 2 // step * step)
        if window % step:
            raise ValueError(f"window is a number of pixels, a multiple of {step} here; got {window}")
        if window > side:
            raise ValueError(f"the images have {side} pixels a side, and the painter sees {window}: enlarge them")
        recipe = PainterRecipe(int(steps), int(batch), float(learning_rate), int(seed), precision, bool(flip))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.seed)  # torch.manual_seed would seed CUDA as well
            painter = Painter(len(weight), first.shape[1], window, widths, image_range=image_range)
        trainer = PainterTrainer(self.classifier, painter, pool, named, weight, recipe)
        state = None if out is None else out.with_name(out.name + ".resume")
        if state is not None and resume and state.is_file():
            trainer.load(state)
        before = self.painter, self.meta
        self.painter = painter
        classes = sorted({index for pair in named for index in pair})
        meta: dict[str, Any] = {
            "classifier": self.classifier.fingerprint(),
            "pairs": named,
            "classes": [self.classifier.class_name(index) for index in classes],
            "recipe": {**recipe.__dict__},
            "torch": torch.__version__,
        }
        self.meta = meta
        try:
            run_training(trainer, state, save_every, progress=self.progress)
        except TrainingStopped:
            self.painter, self.meta = before
            raise
        finally:
            painter.eval().requires_grad_(False)
            meta["steps_done"] = trainer.step
        if out is not None:
            self.save(out)
        if state is not None:
            state.unlink(missing_ok=True)
        return trainer.history

    def save(self, path: str | os.PathLike[str], **more: object) -> None:
        """Write the painter, what it was trained on and the classifier's fingerprint to a safetensors file."""
        save_painter(path, self._ready(), {"classifier": self.classifier.fingerprint(), **self.meta, **more})

    def repaint(self, images: object, target: Target, *, source: Target | None = None) -> Repainted:
        """Paint what tells the target from the source into images.

        Args:
            images: as the classifier's `preprocess` (else the model) takes them, [B,Ch,H,W] or [Ch,H,W].
            target: the class wanted, by index or name, for all images or one for each.
            source: the class to move away from; None: the predicted one.

        Raises:
            ValueError: there is no painter, the images are not of its range or smaller than its window, a class is
                unknown, target and source are the same, or the head is not linear.

        Warns:
            UserWarning: the painter was not trained on a class; such images stay as they are.
        """
        self._ready()
        done = self.repaint_prepared(self.classifier.prepare(images), target, source=source)
        self.warn_of_unknown(done.source, done.target)
        return done

    @torch.inference_mode(False)
    def repaint_prepared(self, x: Tensor, target: Target, *, source: Target | None = None) -> Repainted:
        """As `repaint`, of images [B,Ch,H,W] as the model takes them: neither preprocesses nor warns."""
        painter = self._fitting(x)
        with plain(self.classifier.device):
            x = x.clone() if x.is_inference() else x
            if len(x) == 0:
                none = torch.zeros(0, dtype=torch.bool, device=x.device)
                number = none.long()
                return Repainted(x, number, number, none.new_zeros(0, 1, *x.shape[2:]), number, none, number)
            logits = torch.cat([self.classifier.logits(part) for part in x.split(self.micro_batch)])
            _check_classes(painter, logits)
            own, wanted = classes_of(self.classifier, logits, source, target)
            done = Repainted(
                x.clone(),
                own,
                wanted,
                torch.zeros_like(x[:, :1], dtype=torch.bool),
                torch.zeros_like(wanted),
                logits.argmax(1) == wanted,
                torch.ones_like(wanted),
            )
            known = self._known(own, wanted).nonzero()[:, 0]
            for rows in known.split(self.micro_batch) if len(known) else ():
                part = self._repaint(painter, x[rows], own[rows], wanted[rows])
                for whole, some in zip((done.images, done.mask, done.rounds, done.found), part, strict=True):
                    whole[rows] = some
                done.evaluations[rows] += 1 + done.rounds[rows]  # for the evidence, and after each round
        return done

    def check_prepared(self, x: Tensor) -> None:
        """Raise as `repaint` where images [B,Ch,H,W] as the model takes them cannot be repainted, B at least 1."""
        painter = self._fitting(x)
        maps, logits = self.classifier.features_and_logits(x[:1])
        _check_classes(painter, logits)
        self._weight(maps)

    def _fitting(self, x: Tensor) -> Painter:
        """The painter, if images are of its channels, size and range."""
        painter = self._ready()
        channels, side = painter.settings["channels"], painter.window
        if x.shape[1] != channels or min(x.shape[2:]) < side:
            raise ValueError(
                f"the painter takes images of {channels} channels and at least {side} pixels a side; got "
                f"{list(x.shape[1:])}"
            )
        check_range(x, painter.low, painter.high, "give images scaled as those it was trained on")
        return painter

    def warn_of_unknown(self, source: Tensor, target: Tensor) -> None:
        """Warn, in the name of what the caller was called by, of classes [B] that the painter was not trained on."""
        learned = self._learned()
        asked = {*source.tolist(), *target.tolist()}
        if learned is None or not asked - learned:
            return
        new, old = (
            ", ".join(self.classifier.class_name(index) for index in sorted(some))
            for some in (asked - learned, learned)
        )
        warnings.warn(
            f"the painter was not trained on {new} (it knows {old}): images from or to these stay as they are",
            UserWarning,
            stacklevel=3,
        )

    def _learned(self) -> set[int] | None:
        """The classes that the painter was trained on; None where nothing says so."""
        pairs = self.meta.get("pairs")
        return None if pairs is None else {index for pair in pairs for index in pair}

    def _known(self, source: Tensor, target: Tensor) -> Tensor:
        """Whether the painter was trained on both classes of images, bool [B]."""
        learned = self._learned()
        if learned is None:
            return torch.ones_like(source, dtype=torch.bool)
        numbers = source.new_tensor(sorted(learned))
        return torch.isin(source, numbers) & torch.isin(target, numbers)

    def _repaint(
        self, painter: Painter, x: Tensor, source: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images, mask, rounds and found of `Repainted` for images [n,Ch,H,W] and classes [n]."""
        maps = self.classifier.features(x)
        weight = self._weight(maps)
        evidence = torch.einsum("nd,ndhw->nhw", weight[source] - weight[target], maps.to(weight))
        masks = F.interpolate(marks_of(evidence, evidence.new_full((len(x),), self.share)), x.shape[2:])
        windows = Windows(middles_of(masks), painter.window, x.shape[2:])
        mask = windows.cut(masks)
        square, spread = painter.window // SQUARES, painter.high - painter.low
        draws = torch.Generator().manual_seed(0)
        shown = (x.float() - painter.low) / spread
        rounds = torch.zeros_like(target)
        left = torch.ones_like(target, dtype=torch.bool)
        for _ in range(self.rounds):
            apart = torch.zeros_like(windows.cut(shown))
            for _ in range(self.draws):
                spoiled = spoil(windows.cut(shown), mask, square, draws, alike=True)
                apart += mask * (painter(spoiled, mask, target) - painter(spoiled, mask, source)) / self.draws
            size = apart.abs().mean(1, keepdim=True)
            apart = apart * ((size - self.threshold) / size.clamp_min(1e-12)).clamp_min(0)
            change = windows.put_back(apart)
            shown = torch.where(left[:, None, None, None], (shown + change).clamp(0, 1), shown)
            rounds += left
            images = torch.where(windows.put_back(mask) > 0, (painter.low + spread * shown).to(x), x)
            found = self.classifier.logits(images).argmax(1) == target
            left = left & ~found
            if not bool(left.any()):
                break
        return images, windows.put_back(mask) > 0, rounds, found

    def _weight(self, maps: Tensor) -> Tensor:
        """The weight of a linear head, float32 [C,D]; checked on these maps."""
        fold = self.classifier.fold(maps)
        if fold is None or fold.kind != "linear":
            raise ValueError(
                "a painter's marks are where the head's evidence lies, which needs a linear head behind global average "
                f"pooling; the one of this model is not ({self.classifier.fold_reason})"
            )
        return fold.weight.float()

    def _ready(self) -> Painter:
        if self.painter is None:
            raise ValueError(
                "there is no painter yet: call fit(data, pairs=...), or give Repainter(classifier, painter=FILE)"
            )
        return self.painter.to(self.classifier.device)  # the model may have moved


def _check_classes(painter: Painter, logits: Tensor) -> None:
    """Refuse a painter that knows another number of classes than the classifier gives logits [B,C] of."""
    if logits.shape[1] != painter.settings["classes"]:
        raise ValueError(
            f"the painter knows {painter.settings['classes']} classes and the classifier has {logits.shape[1]}: it was "
            "made for another classifier"
        )
