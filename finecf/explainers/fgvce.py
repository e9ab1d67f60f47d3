"""FG-VCE: which cells of the feature map caused a mistake, and which real cells of the true class repair it.

Zhang, Yin, Lee: "Towards Fine-Grained Interpretability: Counterfactual Explanations for Misclassification with Saliency
Partition", CVPR 2025 (arXiv 2511.07974). docs/fgvce.md says what is the paper's, what the released script's, what ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from finecf.explainers import _contributions, _partition, _search
from finecf.explainers._contributions import Contributions, minmax
from finecf.explainers._games import Game, Head, LinearGame, play
from finecf.explainers._memory import budget_for
from finecf.explainers._pool import Pool, PoolCache
from finecf.explainers._search import Rules, Trace
from finecf.explainers._shared import class_indices, one_of, originals, plain, progress_bar, versions, wrapped
from finecf.explainers.result import Edit, FGVCEExplanation, Maps, Part, Probabilities, upsample
from finecf.models import CandidateBank, Classifier, HeadFold

_EVERY: Final = {"top_cells": None, "top_candidates": None, "weight_sim": 1.0, "weight_cls": 1.0, "temperature": None}

PRESETS: Final[dict[str, dict[str, Any]]] = {
    "fgvce": _EVERY | {"top_cells": 20, "weight_sim": "balanced"},
    "paper": _EVERY | {"top_cells": 20, "top_candidates": 50},
    "exhaustive": _EVERY | {"weight_sim": "balanced"},
    "goyal": _EVERY | {"weight_sim": 0.0},
    "vandenhende": _EVERY | {"weight_sim": 0.4, "temperature": 0.1},
}
"""What each preset stands for; an argument of `FGVCE` that is given overrides it."""

PARITY: Final = ("before_target", "cam_unedited", "cam_difference")
"""The released script's readings of the maps, each of which can be switched on (docs/fgvce.md, "Maps")."""

HEAD_CANDIDATES: Final = 50
HEAD_CELLS: Final = 20
"""Shortlists for heads whose every pair costs a forward of the head, where the preset leaves them open."""

MICRO_BATCH: Final = 32

FOLD_TOLERANCE: Final = 1e-4
"""Share of the largest logit by which a fold may miss the head's own logits."""


class FGVCE:
    """Explains misclassifications by replacing cells of the feature map with real cells of the class wanted.

    Args:
        classifier: what `finecf.wrap` returned.
        bank: cells of correctly classified reference images.
        preset: "fgvce", "paper", "exhaustive", "goyal" or "vandenhende" (see `PRESETS`). In "exhaustive", "goyal" and
            "vandenhende" the contributions play no part in the choice of cells.
        contribution: "gaussian", "permutation" or "exact".
        contribution_class: "predicted" or "true": whose contributions decide which cells may be replaced.
        value: what a coalition of cells is worth: "prob", "log_prob", "log_odds" or "logit" of that class.
        sigma: width of the Gaussian coalitions, in cells.
        weight_sim, weight_cls: weights of 1 - cosine and of -log p(target); None: the preset's. "balanced" finds
            weight_sim for each image, so that both losses have comparable spans (docs/fgvce.md, "Weights").
        top_cells: the K_p cells of highest contribution that an edit chooses among; "all", or None for the preset's.
        top_candidates: the K_c most similar candidates per cell; "all", or None for the preset's.
        max_edits: most edits; None: as many as there are cells.
        reuse_candidates: whether one bank cell may serve several edits of an image.
        minimal: whether edits that the flip does not need are removed afterwards (both lists are reported).
        candidate_classes: "target", "all", or class names and indices that replacements may come from.
        refresh_contributions: compute the contributions again after every so many edits; None: never.
        permutations, tolerance: most orders of cells drawn for "permutation", and the standard error to stop at.
        parity: any of "before_target", "cam_unedited", "cam_difference": the released script's readings of the maps.
        memory_budget: bytes for what is computed beside the trunk; None: a quarter of what is free, at most 1 GiB.
        generator: source of the permutations; None: one seeded with 0, so that results repeat.
        progress: whether to show a progress bar over the images.

    Raises:
        ValueError: a setting is unknown or out of range, or the bank does not fit the classifier.
    """

    def __init__(
        self,
        classifier: Classifier,
        bank: CandidateBank,
        preset: str = "fgvce",
        *,
        contribution: str = "gaussian",
        contribution_class: str = "predicted",
        value: str = "prob",
        sigma: float = 0.8,
        weight_sim: float | str | None = None,
        weight_cls: float | None = None,
        top_cells: int | str | None = None,
        top_candidates: int | str | None = None,
        max_edits: int | None = None,
        reuse_candidates: bool = False,
        minimal: bool = False,
        candidate_classes: str | Sequence[str | int] = "target",
        refresh_contributions: int | None = None,
        permutations: int = 256,
        tolerance: float = 0.005,
        parity: Collection[str] = (),
        memory_budget: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        chosen = PRESETS[one_of("preset", preset, tuple(PRESETS))]
        self.classifier = wrapped(classifier)
        self.bank = bank
        self.preset = preset
        self.contribution = one_of("contribution", contribution, _contributions.METHODS)
        self.contribution_class = one_of("contribution_class", contribution_class, ("predicted", "true"))
        self.value = one_of("value", value, ("prob", "log_prob", "log_odds", "logit"))
        self.sigma = _positive("sigma", sigma)
        self.rules = Rules(
            top_cells=_count("top_cells", top_cells, chosen["top_cells"]),
            top_candidates=_count("top_candidates", top_candidates, chosen["top_candidates"]),
            max_edits=_count("max_edits", max_edits, None),
            reuse_candidates=reuse_candidates,
            weight_sim=_weight_sim(chosen["weight_sim"] if weight_sim is None else weight_sim),
            weight_cls=_weight("weight_cls", chosen["weight_cls"] if weight_cls is None else weight_cls),
            temperature=chosen["temperature"],
            refresh=_count("refresh_contributions", refresh_contributions, None),
        )
        self.minimal = minimal
        self.permutations = _positive("permutations", permutations)
        self.tolerance = tolerance
        self.parity = frozenset(one_of("parity", name, PARITY) for name in parity)
        self.budget = budget_for(classifier.device, memory_budget)
        self.generator = generator
        self.progress = progress
        self.candidate_classes: str | list[int] = "target"
        if isinstance(candidate_classes, str):
            self.candidate_classes = one_of("candidate_classes", candidate_classes, ("target", "all"))
        else:
            self.candidate_classes = [classifier.class_index(name) for name in candidate_classes]
        bank.check(classifier)
        self._pools = PoolCache(bank, self.budget // 2)
        self._folds: dict[tuple[object, ...], HeadFold | None] = {}
        self._places: dict[str, int] | None = None
        self._versions = versions() | {"micro_batch": str(MICRO_BATCH)}

    def explain(
        self,
        images: Tensor,
        target: int | str | Tensor | Sequence[int | str],
        *,
        sources: Sequence[str] | None = None,
        features: Tensor | None = None,
    ) -> list[FGVCEExplanation]:
        """Explain why images are not classified as `target`, and repair their feature maps until they are.

        Args:
            images: [B,C,H,W], or one image [C,H,W], as the classifier's `preprocess` (else the model) takes them.
            target: the class wanted (for a mistake: the true one), by index or name, for all images or one for each.
            sources: names of the images; bank cells of an image of the same name are not used on it.
            features: the trunk's output [B,D,H,W] for these images, where it has been computed already.

        Returns:
            One explanation for each image. No solution within the budget is a result with `flipped` False.

        Raises:
            ValueError: a target is unknown, out of range or equal to the prediction, the bank holds no cell to replace
                with, or images or features are not finite or of the wrong shape.
        """
        x = self.classifier.prepare(images)
        shown = originals(images, x)
        targets = class_indices(self.classifier, target, len(x))
        if sources is not None and len(sources) != len(x):
            raise ValueError(f"sources must name each of the {len(x)} images, got {len(sources)} names")
        if features is not None and (features.ndim != 4 or len(features) != len(x)):
            raise ValueError(f"features must be [{len(x)},D,H,W] for these images, got {list(features.shape)}")
        names: list[str | None] = [None] * len(x) if sources is None else list(sources)
        done: list[FGVCEExplanation] = []
        with plain(self.classifier.device), progress_bar(self.progress, len(x)) as advance:
            for start in range(0, len(x), MICRO_BATCH):
                own = slice(start, start + MICRO_BATCH)
                given = None if features is None else features[own]
                done += self._explain(shown[own], *self._look(x[own], given), targets[own], names[own])
                advance(len(x[own]))
        return done

    def contribution_map(self, images: Tensor, target: int | str | None = None, method: str | None = None) -> Tensor:
        """The map phi [B,H,W] in [0,1]: how much every cell contributes to a class (None: the predicted one)."""
        game, contributions = self._contribute(images, target, method)
        return contributions.map.unflatten(1, game.grid)

    def attribute(self, inputs: Tensor, target: int | str | None = None, method: str | None = None) -> Tensor:
        """The contribution map at image size, [B,1,H,W] in [0,1], as captum's attribution methods return theirs.

        `target` is the class that is attributed; None: the predicted one.
        """
        maps = self.contribution_map(inputs, target, method)
        return upsample(maps, tuple(inputs.shape[-2:]))[:, None]

    def _contribute(self, images: Tensor, target: int | str | None, method: str | None) -> tuple[Game, Contributions]:
        x = self.classifier.prepare(images)
        with plain(self.classifier.device):
            game = self._game(*self._look(x))
            if target is None:
                classes = game.logits.argmax(1)
            else:
                classes = torch.tensor(class_indices(self.classifier, target, len(x)), device=game.logits.device)
            return game, self._contributions(game, classes, method)

    def _look(self, x: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features [B,D,H,W] and logits [B,C] of prepared images, in float32 as the bank's rows are."""
        if features is None:
            features, logits = self.classifier.features_and_logits(x)
        else:
            features = features.to(self.classifier.device)
            logits = self.classifier.logits_from(features)
        return features.float(), logits.float()

    def _game(self, features: Tensor, logits: Tensor) -> Game:
        """The head as a game of cells, checked against the logits that the head really gave."""
        key = (features.shape[1:], features.dtype, features.device)
        game = self._play(key, features, logits) if key in self._folds else None
        if game is None or game.head.noise > FOLD_TOLERANCE * max(1.0, float(logits.abs().amax())):
            # Seen for the first time, or the head has changed since; a fold that does not hold is refused here.
            self._folds[key] = self.classifier.fold(features)
            game = self._play(key, features, logits)
        return game

    def _play(self, key: tuple[object, ...], features: Tensor, logits: Tensor) -> Game:
        return play(Head(self.classifier, self._folds[key], self.budget), features, logits)

    def _explain(
        self, images: Tensor, features: Tensor, logits: Tensor, targets: list[int], sources: list[str | None]
    ) -> list[FGVCEExplanation]:
        """One micro-batch: contributions of all images, then a search for each group of images with the same target."""
        started = time.perf_counter()
        game = self._game(features, logits)
        predicted = game.logits.argmax(1)
        target = torch.tensor(targets, device=predicted.device)
        self._check_targets(predicted, target)
        classes = predicted if self.contribution_class == "predicted" else target
        contributions = self._contributions(game, classes)
        results: dict[int, FGVCEExplanation] = {}
        for wanted in sorted(set(targets)):
            group = (target == wanted).nonzero()[:, 0]
            own = game if len(group) == len(targets) else game.select(group)
            part = Contributions(
                contributions.raw[group],
                None if contributions.stderr is None else contributions.stderr[group],
                contributions.evaluations,
                contributions.samples,
            )
            indices = group.tolist()
            found = self._explain_group(own, part, wanted, images[indices], [sources[i] for i in indices])
            results.update(zip(indices, found, strict=True))
        share = (time.perf_counter() - started) / len(targets)
        for result in results.values():
            result.seconds = share
        return [results[i] for i in range(len(targets))]

    def _explain_group(
        self, game: Game, contributions: Contributions, wanted: int, images: Tensor, sources: list[str | None]
    ) -> list[FGVCEExplanation]:
        predicted = game.logits.argmax(1)
        target = torch.full_like(predicted, wanted)
        classes = predicted if self.contribution_class == "predicted" else target
        pool = self._pool(game, wanted)
        traces = _search.replace_until_flip(
            game,
            pool,
            target,
            contributions.raw,
            self._rules_for(game),
            rescore=lambda edited: self._contributions(edited, classes).raw,
            excluded=self._own_rows(pool, sources),
        )
        edited = _apply(game, pool, traces)
        maps = self._maps(game, edited, predicted, target, contributions)
        return [
            self._result(game, i, pool, trace, wanted, images[i], sources[i], maps, contributions)
            for i, trace in enumerate(traces)
        ]

    def _contributions(self, game: Game, classes: Tensor, method: str | None = None) -> Contributions:
        method = one_of("method", method or self.contribution, _contributions.METHODS)
        if method == "gaussian":
            return _contributions.gaussian(game, classes, self.value, self.sigma)
        if method == "exact":
            return _contributions.exact(game, classes, self.value)
        generator = self.generator or torch.Generator().manual_seed(0)
        return _contributions.permutation(game, classes, self.value, self.permutations, self.tolerance, generator)

    def _maps(
        self, game: Game, edited: Game, predicted: Tensor, target: Tensor, contributions: Contributions
    ) -> dict[str, Tensor]:
        """The maps [B,P] before and after the edits, and where they differ (docs/fgvce.md, "Maps")."""
        before_class = target if "before_target" in self.parity else predicted
        known = predicted if self.contribution_class == "predicted" else target
        phi = contributions.map
        phi_before = phi if torch.equal(before_class, known) else self._contributions(game, before_class).map
        phi_after = self._contributions(edited, target).map
        cam_predicted = minmax(game.class_maps(predicted))
        cam_target = minmax((game if "cam_unedited" in self.parity else edited).class_maps(target))
        before = minmax(phi_before * cam_predicted)
        after = minmax(phi_after * cam_target)
        reached = cam_target if "cam_difference" in self.parity else after
        maps = {
            "contribution": phi,
            "cam_predicted": cam_predicted,
            "cam_target": cam_target,
            "before": before,
            "after": after,
            "dominant": minmax((reached - before).relu()),
            "invariant": minmax((before - reached).relu()),
        }
        if contributions.stderr is not None:
            spread = contributions.raw.relu().amax(1, keepdim=True) - contributions.raw.relu().amin(1, keepdim=True)
            maps["contribution_stderr"] = contributions.stderr / torch.where(spread > 0, spread, 1)
        return maps

    def _result(
        self,
        game: Game,
        i: int,
        pool: Pool,
        trace: Trace,
        wanted: int,
        image: Tensor,
        source: str | None,
        maps: dict[str, Tensor],
        contributions: Contributions,
    ) -> FGVCEExplanation:
        probabilities = trace.logits.softmax(1)
        flipped = int(trace.logits[-1].argmax()) == wanted
        predicted = int(trace.logits[0].argmax())
        edits = self._edits(game, pool, trace, probabilities[:, wanted].tolist())
        kept, kept_probability = list(range(trace.edits)), float(probabilities[-1, wanted])
        if self.minimal and flipped:
            kept, logits = _search.needed_edits(game, i, pool, trace, wanted)
            kept_probability = float(logits.softmax(0)[wanted])
        size = (int(image.shape[-2]), int(image.shape[-1]))
        grids = {name: values[i].unflatten(0, game.grid) for name, values in maps.items()}
        cam, phi = grids["cam_predicted"], grids["contribution"]
        partition = _Partition(cam, phi, size)
        first, last = probabilities[0].tolist(), probabilities[-1].tolist()
        return FGVCEExplanation(
            image=image,
            source=source,
            predicted=predicted,
            target=wanted,
            predicted_name=self.classifier.class_name(predicted),
            target_name=self.classifier.class_name(wanted),
            probabilities_before=Probabilities(first[predicted], first[wanted]),
            probabilities_after=Probabilities(last[predicted], last[wanted]),
            maps=Maps(
                grids | {"object_mask": lambda: _partition.object_mask(cam, size), "part_labels": partition.labels}
            ),
            evaluations=contributions.evaluations + trace.evaluations,
            seconds=0.0,
            seed=self._seed(contributions),
            versions=self._versions,
            notes=self._notes(game, trace, flipped),
            grid=game.grid,
            edits=edits,
            flipped=flipped,
            weights=(trace.weight_sim, self.rules.weight_cls),
            logits_path=trace.logits,
            minimal_edits=[edits[k] for k in kept],
            minimal_probability=kept_probability,
            partition=partition.parts,
            rivals=trace.ties,
        )

    def _edits(self, game: Game, pool: Pool, trace: Trace, probabilities: list[float]) -> list[Edit]:
        columns = game.grid[1]
        edits = []
        for k, (cell, candidate) in enumerate(zip(trace.cells, trace.candidates, strict=True)):
            row = pool.bank_row(candidate)
            image, reference = divmod(row, self.bank.cells)
            edits.append(
                Edit(
                    cell=(cell // columns, cell % columns),
                    candidate_row=row,
                    reference_source=self.bank.sources[image],
                    reference_class=self.classifier.class_name(int(self.bank.labels[image])),
                    reference_cell=(reference // self.bank.grid[1], reference % self.bank.grid[1]),
                    reference_grid=self.bank.grid,
                    similarity=trace.similarities[k],
                    loss=trace.losses[k],
                    target_probability=probabilities[k + 1],
                    images=self._reference_image,
                )
            )
        return edits

    def _reference_image(self, row: int) -> Tensor | None:
        image, _ = self.bank.patch_image(row)
        return None if image is None else torch.as_tensor(image)

    def _notes(self, game: Game, trace: Trace, flipped: bool) -> list[str]:
        notes = []
        if not isinstance(game, LinearGame):
            notes.append(f"the head was scored as {game.kind!r}: {self.classifier.fold_reason}")
            if self.rules.top_candidates is None:
                notes.append(f"this head was given the {HEAD_CANDIDATES} most similar candidates of each cell")
        noise = _search.NOISE_FACTOR * game.head.noise
        for name, logits in (("prediction", trace.logits[0]), ("flip", trace.logits[-1])):
            gap = float(logits.topk(2).values.diff().abs())
            if gap <= noise:
                notes.append(f"tie: the {name} hangs on a difference of {gap:.1e} between two logits")
        if not flipped:
            why = "max_edits was reached" if trace.edits == self.rules.max_edits else "no replacement was left"
            notes.append(f"no solution: {why} after {trace.edits} edits; the whole trace is kept")
        return notes

    def _rules_for(self, game: Game) -> Rules:
        """The preset's rules, with shortlists where each pair costs a forward of the head."""
        if isinstance(game, LinearGame):
            return self.rules
        rules = self.rules.__dict__ | {"top_candidates": self.rules.top_candidates or HEAD_CANDIDATES}
        return Rules(**rules)

    def _seed(self, contributions: Contributions) -> int | None:
        if not contributions.samples:
            return None
        return 0 if self.generator is None else self.generator.initial_seed()

    def _pool(self, game: Game, wanted: int) -> Pool:
        if self.candidate_classes == "all":
            ranges = [(0, len(self.bank))]
        else:
            classes = [wanted] if self.candidate_classes == "target" else self.candidate_classes
            ranges = sorted(self.bank.class_range(int(number)) for number in classes)
        ranges = [(start, stop) for start, stop in ranges if stop > start]
        if not ranges:
            raise ValueError(
                f"the bank holds no cell of class {self.classifier.class_name(wanted)!r}: none of its images was "
                "classified correctly when the bank was built; extend the bank, or pass candidate_classes"
            )
        if self.bank.width != game.features.shape[1]:
            raise ValueError(
                f"the bank's rows have {self.bank.width} features, the classifier's map {game.features.shape[1]}; "
                "build the bank with this classifier and layer"
            )
        return self._pools.get(ranges, game.head.fold, game.logits.device)

    def _own_rows(self, pool: Pool, sources: list[str | None]) -> Tensor | None:
        """Candidates [B,N] that come from the explained images themselves; None where there are none."""
        if self._places is None or len(self._places) != len(self.bank.sources):
            self._places = {name: index for index, name in enumerate(self.bank.sources)}
        found = [None if name is None else self._places.get(name) for name in sources]
        if all(index is None for index in found):
            return None
        nothing = torch.zeros(pool.size, dtype=torch.bool, device=pool.device)
        return torch.stack([nothing if index is None else pool.rows_of(index) for index in found])

    def _check_targets(self, predicted: Tensor, target: Tensor) -> None:
        same = (predicted == target).nonzero()[:, 0].tolist()
        if same:
            name = self.classifier.class_name(int(target[same[0]]))
            raise ValueError(
                f"image {same[0]} is already classified as its target {name!r}; "
                "pass the class it should have been, or leave out images that are classified correctly"
            )


class _Partition:
    """The part-level partition of one image, computed once when the labels or the parts are first asked for."""

    def __init__(self, cam: Tensor, contribution: Tensor, size: tuple[int, int]) -> None:
        self._arguments = cam, contribution, size
        self._found: tuple[Tensor, list[Part]] | None = None

    def _compute(self) -> tuple[Tensor, list[Part]]:
        if self._found is None:
            self._found = _partition.parts(*self._arguments)
        return self._found

    def labels(self) -> Tensor:
        return self._compute()[0]

    def parts(self) -> list[Part]:
        return self._compute()[1]


def _apply(game: Game, pool: Pool, traces: list[Trace]) -> Game:
    """The game after all edits of all images."""
    image = [i for i, trace in enumerate(traces) for _ in trace.cells]
    cell = [cell for trace in traces for cell in trace.cells]
    row = [row for trace in traces for row in trace.candidates]
    device = game.logits.device
    return game.edited(
        torch.tensor(image, dtype=torch.int64, device=device),
        torch.tensor(cell, dtype=torch.int64, device=device),
        pool,
        torch.tensor(row, dtype=torch.int64, device=device),
    )


def _positive(name: str, value: float) -> Any:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value}")
    return value


def _count(name: str, value: int | str | None, default: int | None) -> int | None:
    """A count of at least 1; "all" is no limit, None the default."""
    if value is None or value == "all":
        return default if value is None else None
    if not isinstance(value, int) or value < 1:
        raise ValueError(f'{name} must be a whole number of at least 1, "all" or None; got {value!r}')
    return value


def _weight(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    return float(value)


def _weight_sim(value: float | str) -> float | None:
    if isinstance(value, str):
        one_of("weight_sim", value, ("balanced",))
        return None
    return _weight("weight_sim", value)
