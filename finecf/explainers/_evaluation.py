"""Scores sets of regions of many images: composes masked images, runs them through the model, reads the four terms.

The searches of `_subset.py` ask; here the questions of all images of a group are put into common micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from finecf import ops
from finecf.explainers._subset import Answer, Ask, AskSlopes, Search, Slopes

_PROBES = 8
"""Masked images that are run a second time, one by one, to measure the noise of the model's forward."""
_LEAST_NOISE = 2.0**-24


class Forward(Protocol):
    """Runs masked images through a model; `finecf.models.runner.Runner` is one."""

    channels_last: bool
    """Whether it wants its images channels last."""

    def __call__(self, x: Tensor, /) -> Tensor:
        """Logits [B,C]."""

    def with_features(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Logits [B,C] and features [B,D]."""


class Terms(NamedTuple):
    """How the set function is put together."""

    weights: Tensor
    """float64 [4] on the CPU, in the order of `finecf.ops.submodular.TERMS`."""
    confidence: str
    consistency: str
    collaboration: str
    target_features: Tensor | None
    """[D] what the cosine variants compare with; None: the features of the whole image."""
    report_all: bool = False
    """Whether the effectiveness is computed where its weight is 0, too."""

    @property
    def pooled(self) -> bool:
        """Whether every masked image's features are needed."""
        return "cosine" in (self.consistency, self.collaboration)

    @property
    def distances(self) -> bool:
        """Whether the distances between single regions are needed."""
        return self.report_all or bool(self.weights[1] != 0)

    @property
    def deletion(self) -> bool:
        """Whether the search needs images with the regions removed."""
        return bool(self.weights[3] != 0)


class Outputs(NamedTuple):
    """What the model says of masked images: with the regions kept, and with them removed (None: not asked)."""

    kept: Tensor
    removed: Tensor | None
    kept_features: Tensor | None
    removed_features: Tensor | None


@dataclass
class Group:
    """Images that are searched side by side.

    Attributes:
        images, baseline: [B,Ch,H,W] in the runner's layout ([Ch]: a baseline of one colour).
        labels: int32 [B,H,W]; regions: how many each image has.
        target: int64 [B].
        whole, blank: logits [B,C] of the images and of their baselines; whole_features [B,D].
        numbers: the images' places in the user's batch, for messages.
        forwards: images through the model so far, for each image; a gradient counts as one more.
        singles: the model's outputs for each region alone and for the image without it, [B,M,...].
        distance: float64 [B,M,M] between the features of single regions; 0 where they are not needed.
    """

    images: Tensor
    baseline: Tensor
    labels: Tensor
    regions: list[int]
    target: Tensor
    whole: Tensor
    whole_features: Tensor | None
    numbers: list[int]
    blank: Tensor = field(init=False)
    blank_features: Tensor | None = field(init=False)
    singles: Outputs = field(init=False)
    distance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.forwards = [1] * len(self.regions)

    @property
    def most(self) -> int:
        """M: the largest number of regions."""
        return max(self.regions)


TakeSlopes = Callable[[Group, dict[int, AskSlopes]], dict[int, Slopes | None]]
"""Slopes of sets, by the images' places in the group; `_slopes.RegionSlopes` gives them."""


class Evaluation:
    """Runs searches over a group of images."""

    def __init__(
        self, runner: Forward, terms: Terms, micro_batch: int, slopes: TakeSlopes = lambda _, asks: dict.fromkeys(asks)
    ) -> None:
        self.runner = runner
        self.terms = terms
        self.micro_batch = micro_batch
        self.slopes = slopes

    def start(self, group: Group) -> float:
        """Score the baselines and every single region of the group; return the noise of a score.

        Features of single regions give the distances of the effectiveness term; single regions and their complements
        are the sets of size 1 and m-1, so they are scored once.
        """
        pooled = self.terms.pooled or self.terms.distances
        everyone = torch.arange(len(group.regions))
        nothing = torch.zeros(len(group.regions), group.most, dtype=torch.bool)
        blank = self._forward(group, everyone, nothing, removed=False, pooled=self.terms.pooled)
        group.blank, group.blank_features = blank.kept, blank.kept_features
        image = torch.cat([torch.full((m,), b) for b, m in enumerate(group.regions)])
        region = torch.cat([torch.arange(m) for m in group.regions])
        keep = torch.nn.functional.one_hot(region, group.most).bool()
        outputs = self._forward(group, image, keep, removed=self.terms.deletion, pooled=pooled)
        place = image.to(group.images.device), region.to(group.images.device)

        def padded(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            room = values.new_zeros(len(group.regions), group.most, values.shape[1])
            room[place] = values
            return room

        kept = padded(outputs.kept)
        assert kept is not None
        group.singles = Outputs(kept, *(padded(each) for each in outputs[1:]))
        features = group.singles.kept_features
        group.distance = torch.zeros(
            len(group.regions), group.most, group.most, dtype=torch.float64, device=group.images.device
        )
        if features is not None and self.terms.distances:
            group.distance = angles(features)
        return self._noise(group, image, region, keep)

    def empty_scores(self, group: Group) -> list[float]:
        """F of the empty set for each image."""
        everyone = torch.arange(len(group.regions))
        outputs = Outputs(group.blank, group.whole, group.blank_features, group.whole_features)
        if not self.terms.deletion:
            outputs = outputs._replace(removed=None)
        return self._gains(group, everyone, torch.zeros_like(everyone), outputs).total.tolist()

    def run(
        self,
        group: Group,
        searches: Sequence[Search],
        removed: bool | None = None,
        after_round: Callable[[], object] = lambda: None,
    ) -> None:
        """Run one search for each image, side by side; `removed`: whether their sets are also scored as removed."""
        removed = self.terms.deletion if removed is None else removed
        asks = {b: ask for b, search in enumerate(searches) if (ask := next(search, None)) is not None}
        while asks:
            steep = {b: ask for b, ask in asks.items() if isinstance(ask, AskSlopes)}
            answers: dict[int, Answer | Slopes | None] = dict(self.slopes(group, steep)) if steep else {}
            for both in (True, False):
                some = {b: ask for b, ask in asks.items() if isinstance(ask, Ask) and ask.removed is both}
                if some:
                    answers |= self._answer(group, some, removed and both)
            for b, answer in answers.items():
                try:
                    asks[b] = searches[b].send(answer)
                except StopIteration:
                    del asks[b]
            after_round()

    # One round of questions

    def _answer(self, group: Group, asks: dict[int, Ask], removed: bool) -> dict[int, Answer]:
        device = group.images.device
        active = list(asks)
        counts = [len(asks[b].candidates) for b in active]
        row = torch.repeat_interleave(torch.arange(len(active)), torch.tensor(counts))
        candidate = torch.tensor([region for b in active for region in asks[b].candidates])
        selected = torch.zeros(len(active), group.most, dtype=torch.bool)
        nearest = torch.full((len(active), group.most), torch.inf, dtype=torch.float64)
        for i, b in enumerate(active):
            selected[i, : group.regions[b]] = asks[b].chosen.selected
            nearest[i, : group.regions[b]] = asks[b].chosen.nearest
        keep = selected[row]
        keep[torch.arange(len(row)), candidate] = True
        image = torch.tensor(active)[row]
        outputs = self._look_up(group, image, candidate, keep, removed)
        gains = self._gains(
            group,
            image,
            candidate,
            outputs,
            active=torch.tensor(active, device=device),
            row=row,
            nearest=nearest,
            selected=selected,
        )
        wanted = group.target[image.to(device)]
        kept = _probability(outputs.kept, wanted)
        gone = torch.full_like(kept, torch.nan) if outputs.removed is None else _probability(outputs.removed, wanted)
        own = _probability(outputs.kept, group.whole.argmax(1)[image.to(device)])
        reached = (outputs.kept.argmax(1) == wanted).double()
        # One transfer a round: everything that the searches read.
        columns = [gains.total, kept, gone, own, reached]
        everything = torch.cat([gains.scores, torch.stack(columns, dim=1)], dim=1).cpu()
        answers = {}
        for b, part in zip(active, everything.split(counts), strict=True):
            answers[b] = Answer(
                list(asks[b].candidates), part[:, :4], part[:, 4], part[:, 5:8], part[:, 8].bool().tolist()
            )
        return answers

    def _look_up(self, group: Group, image: Tensor, candidate: Tensor, keep: Tensor, removed: bool) -> Outputs:
        """The model's outputs for sets of regions; those known already are not computed again."""
        sizes = keep.sum(1)
        totals = torch.tensor(group.regions)[image]
        last = sizes == totals
        first = sizes == 1
        single = group.singles
        if removed and single.removed is None:
            first = torch.zeros_like(first)
        # Without one region: what is kept is that region's complement, and what is removed leaves that region alone.
        all_but_one = (sizes == totals - 1) & ~first
        if single.removed is None:
            all_but_one = torch.zeros_like(all_but_one)
        new = ~(last | first | all_but_one)
        rows = new.nonzero()[:, 0]
        found = self._forward(group, image[rows], keep[rows], removed, self.terms.pooled, candidate[rows])
        if len(rows) == len(image):
            return found
        missing = (~keep & (torch.arange(group.most) < totals[:, None])).int().argmax(1)
        device = group.images.device
        outputs: list[Tensor | None] = []
        sources = (
            (found.kept, single.kept, single.removed, group.whole),
            (found.removed, single.removed, single.kept, group.blank),
            (found.kept_features, single.kept_features, single.removed_features, group.whole_features),
            (found.removed_features, single.removed_features, single.kept_features, group.blank_features),
        )
        asked = (True, removed, self.terms.pooled, self.terms.pooled and removed)
        for wanted, (computed, alone, without, end) in zip(asked, sources, strict=True):
            if not wanted:
                outputs.append(None)
                continue
            assert end is not None
            values = end.new_empty(len(image), end.shape[1])
            for where, source, region in ((first, alone, candidate), (all_but_one, without, missing)):
                if bool(where.any()):
                    assert source is not None
                    values[where.to(device)] = source[image[where].to(device), region[where].to(device)]
            values[last.to(device)] = end[image[last].to(device)]
            if computed is not None and len(rows):
                values[rows.to(device)] = computed
            outputs.append(values)
        kept = outputs[0]
        assert kept is not None
        return Outputs(kept, *outputs[1:])

    def _forward(
        self,
        group: Group,
        image: Tensor,
        keep: Tensor,
        removed: bool,
        pooled: bool,
        candidate: Tensor | None = None,
        micro_batch: int | None = None,
    ) -> Outputs:
        """Compose and run masked images, a micro-batch at a time."""
        device = group.images.device
        rows = max(1, (micro_batch or self.micro_batch) // (2 if removed else 1))
        places, choices = image.to(device), keep.to(device)
        kept: list[Tensor] = []
        gone: list[Tensor] = []
        kept_features: list[Tensor] = []
        gone_features: list[Tensor] = []
        for start in range(0, len(image), rows):
            own = slice(start, start + rows)
            composed = ops.compose_regions(
                group.images,
                group.labels,
                places[own],
                choices[own],
                group.baseline,
                complement=removed,
                channels_last=self.runner.channels_last,
            )
            features = None
            if pooled:
                logits, features = self.runner.with_features(composed)
            else:
                logits = self.runner(composed)
            if not bool(torch.isfinite(logits).all()):
                _refuse(group, logits, image[own], keep[own], None if candidate is None else candidate[own])
            half = len(places[own])
            kept.append(logits[:half])
            gone.append(logits[half:])
            if features is not None:
                kept_features.append(features[:half])
                gone_features.append(features[half:])
        for b, count in enumerate(torch.bincount(image, minlength=len(group.regions)).tolist()):
            group.forwards[b] += count * (2 if removed else 1)
        nothing = group.whole.new_empty(0, group.whole.shape[1])
        return Outputs(
            torch.cat(kept) if kept else nothing,
            (torch.cat(gone) if gone else nothing) if removed else None,
            torch.cat(kept_features) if kept_features else None,
            torch.cat(gone_features) if gone_features and removed else None,
        )

    def _gains(
        self,
        group: Group,
        image: Tensor,
        candidate: Tensor,
        outputs: Outputs,
        active: Tensor | None = None,
        row: Tensor | None = None,
        nearest: Tensor | None = None,
        selected: Tensor | None = None,
    ) -> ops.Gains:
        """The scores of rows; by default each is scored as the only region of its set."""
        device = group.images.device
        if active is None or row is None or nearest is None or selected is None:
            active, row = torch.arange(len(group.regions), device=device), image
            nearest = torch.full((len(group.regions), group.most), torch.inf, dtype=torch.float64)
            selected = torch.zeros(len(group.regions), group.most, dtype=torch.bool)
        image = image.to(device)
        consistency = collaboration = None
        if self.terms.consistency == "cosine":
            assert outputs.kept_features is not None
            consistency = self._cosine(group, image, outputs.kept_features)
        if self.terms.collaboration == "cosine" and outputs.removed_features is not None:
            collaboration = 1 - self._cosine(group, image, outputs.removed_features)
        return ops.submodular_gains(
            outputs.kept,
            outputs.removed,
            row.to(device),
            candidate.to(device),
            group.distance[active],
            nearest.to(device),
            selected.to(device),
            group.target[active],
            self.terms.weights,
            self.terms.confidence,
            consistency,
            collaboration,
        )

    def _cosine(self, group: Group, image: Tensor, features: Tensor) -> Tensor:
        if self.terms.target_features is None:
            assert group.whole_features is not None
            wanted = group.whole_features[image]
        else:
            wanted = self.terms.target_features.to(features)[None]
        return torch.cosine_similarity(features.double(), wanted.double(), dim=1)

    def _noise(self, group: Group, image: Tensor, region: Tensor, keep: Tensor) -> float:
        """How far a score moves when the same masked images go through the model in another company."""
        step = max(1, len(image) // _PROBES)
        some = torch.arange(0, len(image), step)[:_PROBES]
        again = self._forward(
            group, image[some], keep[some], self.terms.deletion, pooled=self.terms.pooled, micro_batch=1
        )
        place = image[some].to(group.images.device), region[some].to(group.images.device)
        features = group.singles[2:] if self.terms.pooled else (None, None)
        rest = (None if each is None else each[place] for each in (group.singles.removed, *features))
        before = Outputs(group.singles.kept[place], *rest)
        scores = [self._gains(group, image[some], region[some], each).total for each in (before, again)]
        return max(float((scores[0] - scores[1]).abs().max()), _LEAST_NOISE)


def angles(features: Tensor) -> Tensor:
    """Angular distance arccos(cos) / pi between rows of [B,M,D], float64 [B,M,M] in [0,1]; zero rows have cosine 0."""
    rows = features.double()
    rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    cosine = (rows @ rows.mT).clamp(-1, 1)
    return torch.arccos(cosine) / torch.pi


def _probability(logits: Tensor, wanted: Tensor) -> Tensor:
    return logits.double().softmax(1).gather(1, wanted[:, None])[:, 0]


def _refuse(group: Group, logits: Tensor, image: Tensor, keep: Tensor, candidate: Tensor | None) -> None:
    """Say for which set of regions the model gave NaN or infinity."""
    wrong = int((~torch.isfinite(logits).all(1)).nonzero()[0])
    row = wrong % len(image)
    what = "removed" if wrong >= len(image) else "kept"
    added = "" if candidate is None else f", region {int(candidate[row])} being tried as the next"
    raise ValueError(
        f"the model gave NaN or inf logits for image {group.numbers[int(image[row])]} with "
        f"{int(keep[row].sum())} of its regions {what}{added} (step {int(keep[row].sum())}); "
        "check the model on images that are partly baseline, or choose another baseline"
    )
