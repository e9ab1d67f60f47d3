"""SMDL: which few regions of an image carry the decision, in order.

Chen et al., "Less is More: Fewer Interpretable Region via Submodular Subset Selection", ICLR 2024 (arXiv 2402.09164);
bidirectional search after LiMA (arXiv 2504.00470), window search after PhaseWin (arXiv 2511.10914). docs/smdl.md says
what is the papers', what the released classes', what ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from finecf.explainers import _subset
from finecf.explainers._evaluation import Evaluation, Group, Terms
from finecf.explainers._memory import budget_for, checked_micro_batch
from finecf.explainers._shared import class_indices, one_of, originals, plain, progress_bar, versions, wrapped
from finecf.explainers._slopes import RegionSlopes
from finecf.explainers._subset import NOISE_FACTOR, Problem, Trace
from finecf.explainers._subset import SEARCHES as SEARCHES  # for those who offer a choice of them
from finecf.explainers._surrogate import Surrogate
from finecf.explainers.result import Interrupted, Maps, Probabilities, SMDLExplanation
from finecf.models import Classifier
from finecf.models.layers import close_names
from finecf.models.runner import PRECISIONS, Runner
from finecf.ops.submodular import TERMS
from finecf.reference.submodular import CONFIDENCES
from finecf.regions import METHODS, baseline_images, check_labels, grid, region_sizes, saliency_patches, slico

VARIANTS: Final = ("probability", "cosine")
BASELINES: Final = ("black", "mean", "blur")

_GROUP: Final = {"cpu": 8, "cuda": 32}
"""Images that are searched side by side, so that late steps, which have few candidates, still fill a micro-batch."""
_LEAST_DROP: Final = 1e-6
"""Share of the range by which the saliency falls from one region to the next at least, so that it keeps the order."""


class SMDL:
    """Ranks the regions of an image by what they contribute to a class, by submodular subset selection.

    Args:
        classifier: what `finecf.wrap` returned.
        regions: "slico", "grid" or "saliency" (patches in falling order of the class activation map), or a function
            from an image [Ch,H,W] to a label map.
        region_count: how many regions are asked for.
        search: "greedy" (exact), "bidirectional", "window" or "lazy".
        weights: of the terms, by name ("confidence", "effectiveness", "consistency", "collaboration"), at least 0;
            terms that are not named keep weight 1.
        confidence: "entropy" (any classifier) or "evidential" (for heads whose exp(logits) are evidence).
        consistency, collaboration: "probability" of the target, or "cosine" of the pooled features with
            `target_features`.
        target_features: [D]; None: the features of the whole image.
        baseline: what removed regions show: "black" (needs `black`, or images in 0..1), "mean" (the image's own mean
            colour), "blur", a colour [Ch] or an image [Ch,H,W], in the space of the images.
        black: the colour [Ch] of black in the space of the images, e.g. -mean/std; None: zeros.
        max_regions, max_area, stop_score: rank no more regions than this, no more than this share of the area, or stop
            once the score reaches this; None: rank all.
        precision: "float32", or "bfloat16" or "float16" (then the ranking is not exact, and the result says so).
        channels_last, fold_batch_norm, compile: how the copy of the model is made fast (`finecf.models.runner`).
        micro_batch: images through the model at a time; None: measured.
        memory_budget: bytes for what is computed beside the model's weights; None: a quarter of what is free, at most
            1 GiB.
        generator: taken for the sake of one signature; nothing is drawn.
        progress: whether to show a progress bar over the regions ranked.

    Raises:
        ValueError: a setting is unknown or out of range.
    """

    def __init__(
        self,
        classifier: Classifier,
        regions: str | Callable[[Tensor], Tensor] = "slico",
        search: str = "greedy",
        weights: Mapping[str, float] | None = None,
        *,
        region_count: int = 49,
        confidence: str = "entropy",
        consistency: str = "probability",
        collaboration: str = "probability",
        target_features: Tensor | None = None,
        baseline: str | Tensor = "black",
        black: Tensor | None = None,
        max_regions: int | None = None,
        max_area: float | None = None,
        stop_score: float | None = None,
        precision: str = "float32",
        channels_last: bool = True,
        fold_batch_norm: bool = True,
        compile: bool = False,
        micro_batch: int | None = None,
        memory_budget: int | None = None,
        generator: torch.Generator | None = None,
        progress: bool | None = None,
    ) -> None:
        self.classifier = wrapped(classifier)
        self.regions = regions if callable(regions) else one_of("regions", regions, METHODS)
        self.region_count = region_count
        self.search = one_of("search", search, tuple(SEARCHES))
        self.weights = checked_weights(weights)
        self.terms = Terms(
            torch.tensor([self.weights[name] for name in TERMS], dtype=torch.float64),
            one_of("confidence", confidence, CONFIDENCES),
            one_of("consistency", consistency, VARIANTS),
            one_of("collaboration", collaboration, VARIANTS),
            target_features,
        )
        self.baseline = baseline if isinstance(baseline, Tensor) else one_of("baseline", baseline, BASELINES)
        self.black = black
        self.max_regions = max_regions
        self.max_area = max_area
        self.stop_score = stop_score
        if max_regions is not None and max_regions < 1:
            raise ValueError(f"max_regions must be at least 1, or None; got {max_regions}")
        if max_area is not None and not 0 < max_area <= 1:
            raise ValueError(f"max_area is a share of the image and must lie in (0, 1], or be None; got {max_area}")
        self.precision = one_of("precision", precision, tuple(PRECISIONS))
        self.channels_last = channels_last
        self.fold_batch_norm = fold_batch_norm
        self.compile = compile
        self.micro_batch = checked_micro_batch(micro_batch)
        self.budget = budget_for(classifier.device, memory_budget)
        self.generator = generator
        self.progress = progress
        self._runner: Runner | None = None
        self._micro_batches: dict[tuple[object, ...], int] = {}

    def explain(
        self,
        images: Tensor,
        target: int | str | Tensor | Sequence[int | str] | None = None,
        regions: str | Tensor | Sequence[Tensor] | None = None,
        *,
        sources: Sequence[str] | None = None,
    ) -> list[SMDLExplanation]:
        """Rank the regions of images by what they contribute to a class.

        Args:
            images: [B,C,H,W], or one image [C,H,W], as the classifier's `preprocess` (else the model) takes them.
            target: the class, by index or name, for all images or one for each; None: the predicted one. For a mistake
                give the true class: which regions would speak for it.
            regions: a label map [H,W], or one for each image [B,H,W] (int; the number of regions may differ), or the
                name of a division; None: the one chosen at construction.
            sources: names of the images.

        Returns:
            One explanation for each image.

        Raises:
            ValueError: a target that is unknown or out of range, a label map that is none, a model that gives NaN or
                inf, or images that are not finite or of the wrong shape.
            Interrupted: Ctrl-C; what was finished is in its `explanations`.
        """
        x = self.classifier.prepare(images)
        shown = originals(images, x)
        if sources is not None and len(sources) != len(x):
            raise ValueError(f"sources must name each of the {len(x)} images, got {len(sources)} names")
        names: list[str | None] = [None] * len(x) if sources is None else list(sources)
        targets = None if target is None else class_indices(self.classifier, target, len(x))
        given = self._given(regions, len(x), (int(x.shape[2]), int(x.shape[3])))
        done: list[SMDLExplanation] = []
        if len(x) == 0:
            return done
        total = len(x) * self.region_count
        # The window search takes gradients, which the user's own inference mode would not give.
        with (
            torch.inference_mode(False),
            plain(self.classifier.device),
            progress_bar(self.progress, total, "region") as advance,
        ):
            x = x.clone() if x.is_inference() else x
            runner = self._ready(x)
            size = self._group_size(x[0])
            for start in range(0, len(x), size):
                own = slice(start, start + size)
                try:
                    done += self._explain(
                        runner,
                        x[own],
                        shown[own],
                        None if targets is None else targets[own],
                        regions if isinstance(regions, str) else None,
                        None if given is None else given[own],
                        names[own],
                        start,
                        advance,
                    )
                except Interrupted as stop:
                    raise Interrupted(done + stop.explanations, len(x)) from stop
                except KeyboardInterrupt as stop:
                    raise Interrupted(done, len(x)) from stop
        return done

    def attribute(
        self, inputs: Tensor, target: int | str | Tensor | Sequence[int | str] | None = None, **options: Any
    ) -> Tensor:
        """The rank-preserving saliency map at image size, [B,1,H,W] in [0,1]; `target` None: the predicted class."""
        found = self.explain(inputs, target, **options)
        if not found:
            return inputs.new_zeros(0, 1, *inputs.shape[-2:])
        return torch.stack([each.maps["saliency"] for each in found])[:, None].float()

    # Preparation

    def _given(
        self, regions: str | Tensor | Sequence[Tensor] | None, count: int, size: tuple[int, int]
    ) -> list[Tensor] | None:
        """The user's label maps, checked; None where a method makes them."""
        if regions is None:
            return None
        if isinstance(regions, str):
            one_of("regions", regions, METHODS)
            return None
        several = not hasattr(regions, "ndim") or regions.ndim == 3
        maps = list(regions) if several else [regions] * count
        if len(maps) != count:
            raise ValueError(f"regions must be one label map, or one for each of the {count} images; got {len(maps)}")
        return [check_labels(each, size) for each in maps]

    def _ready(self, x: Tensor) -> Runner:
        """The runner, made again when the model's weights have changed since."""
        if self._runner is None or self.classifier.differs_from(self._runner.fingerprint) is not None:
            self._runner = Runner(
                self.classifier, self.precision, self.channels_last, self.fold_batch_norm, self.compile
            )
            self._runner.verify(x[:1])
            self._micro_batches.clear()
        return self._runner

    def _micro_batch(self, runner: Runner, image: Tensor) -> int:
        if self.micro_batch is not None:
            return self.micro_batch
        key = (tuple(image.shape), torch.get_num_threads())
        if key not in self._micro_batches:
            self._micro_batches[key] = runner.best_micro_batch(image, self.budget // 2, 2 * self.region_count)
        return self._micro_batches[key]

    def _group_size(self, image: Tensor) -> int:
        """How many images are searched side by side within the budget."""
        regions = max(2, self.region_count)
        classes = self.classifier.num_classes or 1000
        # The image, its baseline, its labels; logits of single regions and of their complements; distances.
        cost = 3 * image.numel() * image.element_size() + 8 * regions * classes + 8 * regions * regions
        return max(1, min(_GROUP.get(image.device.type, 8), self.budget // 4 // cost))

    def _labels(self, image: Tensor, shown: Tensor, target: int, method: str | None) -> Tensor:
        height, width = int(image.shape[1]), int(image.shape[2])
        chosen = method or self.regions
        if callable(chosen):
            return check_labels(chosen(shown), (height, width))
        if chosen == "slico":
            return slico(shown, self.region_count)
        if chosen == "grid":
            return grid(height, width, self.region_count)
        features = self.classifier.features(image[None])
        saliency = self.classifier.cam(features, target)[0]
        side = min(10, height, width)
        return saliency_patches(saliency, (height, width), side, max(1, side * side // self.region_count))

    def _baseline(self, x: Tensor) -> Tensor:
        """What removed regions show: [Ch], or [B,Ch,H,W]."""
        channels = x.shape[1]
        if isinstance(self.baseline, Tensor):
            given = self.baseline.to(x)
            if given.shape not in ((channels,), x.shape[1:]):
                raise ValueError(
                    f"baseline must be a colour [{channels}] or an image {list(x.shape[1:])} in the space of the "
                    f"images; got {list(given.shape)}"
                )
            return given if given.ndim == 1 else given.expand_as(x)
        if self.baseline == "black":
            black = torch.zeros(channels) if self.black is None else self.black
            if black.shape != (channels,):
                raise ValueError(f"black must be a colour [{channels}]; got {list(black.shape)}")
            return black.to(x)
        if self.baseline == "mean":
            return x.mean((2, 3), keepdim=True).expand_as(x)
        return baseline_images(self.baseline, x)

    # The work

    def _explain(
        self,
        runner: Runner,
        x: Tensor,
        shown: Tensor,
        targets: list[int] | None,
        method: str | None,
        given: list[Tensor] | None,
        names: list[str | None],
        first: int,
        advance: Callable[[int], object],
    ) -> list[SMDLExplanation]:
        """One group: label maps, single regions, the searches side by side, then the results."""
        started = time.perf_counter()
        micro_batch = self._micro_batch(runner, x[0])
        logits, maps = _looked_at(runner, x, micro_batch)
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model gives NaN or inf logits for these images; check the model or the images")
        predicted = logits.argmax(1)
        target = predicted if targets is None else torch.tensor(targets, device=x.device)
        labels = given or [self._labels(x[i], shown[i], int(target[i]), method) for i in range(len(x))]
        baseline = self._baseline(x)
        group = Group(
            images=runner.layout(x),
            baseline=baseline if baseline.ndim == 1 else runner.layout(baseline),
            labels=torch.stack(labels).to(x.device),
            regions=[int(each.max()) + 1 for each in labels],
            target=target,
            whole=logits,
            whole_features=maps.mean((2, 3)) if self.terms.pooled else None,
            numbers=list(range(first, first + len(x))),
        )
        slopes = RegionSlopes(runner, self.terms, micro_batch, self.budget // 2)
        evaluation = Evaluation(runner, self.terms, micro_batch, slopes)
        noise = evaluation.start(group)
        guesses = self._guesses(runner, group, maps, micro_batch)
        problems = [
            Problem(
                distance=group.distance[b, :m, :m].cpu(),
                weights=self.terms.weights,
                sizes=region_sizes(labels[b], m).tolist(),
                empty_score=score,
                noise=noise,
                max_regions=self.max_regions or m,
                max_area=1.0 if self.max_area is None else self.max_area,
                stop_score=math.inf if self.stop_score is None else self.stop_score,
                guesser=guesses[b],
            )
            for b, (m, score) in enumerate(zip(group.regions, evaluation.empty_scores(group), strict=True))
        ]
        traces = [Trace(problem) for problem in problems]
        interrupted, shown_progress = None, 0

        def report(done: int) -> None:
            nonlocal shown_progress
            advance(max(0, done - shown_progress))  # an order that swaps end earlier takes nothing back
            shown_progress = max(done, shown_progress)

        def count_ranked() -> None:  # the last region counts when the search is done: it may go on after ranking it
            report(sum(min(len(trace.order), self.region_count - 1) for trace in traces))

        try:
            evaluation.run(group, [SEARCHES[self.search](trace) for trace in traces], after_round=count_ranked)
            evaluation.run(group, [_subset.prefixes(trace) for trace in traces], removed=True)
            report(len(x) * self.region_count)
        except KeyboardInterrupt as stop:
            interrupted = stop
        seconds = (time.perf_counter() - started) / len(x)
        results = []
        for b, trace in enumerate(traces):
            if interrupted is not None:
                trace.keep_scored()
            if trace.order:
                results.append(
                    self._result(runner, group, b, trace, shown[b], labels[b], names[b], micro_batch, seconds)
                )
        if slopes.refusal is not None:
            for result in results:
                result.notes.append(f"candidates were guessed without the model's gradients: {slopes.refusal}")
        if self.search == "window" and all(guess is None for guess in guesses):
            for result in results:
                result.notes.append(f"candidates were not guessed from feature maps ({self.classifier.fold_reason})")
        if interrupted is not None:
            for result in results:
                result.notes.append(
                    f"interrupted after {len(result.order)} of {result.region_count} regions"
                    + (", perhaps before the search was done with them" if self.search == "window" else "")
                )
            raise Interrupted(results, len(x)) from interrupted
        return results

    def _guesses(self, runner: Runner, group: Group, maps: Tensor, micro_batch: int) -> list[Surrogate | None]:
        """What the window search orders its candidates by; None where it is not asked for or the head does not fold."""
        count = len(group.regions)
        fold = self.classifier.fold(maps, group.images) if self.search == "window" else None
        if fold is None:
            return [None] * count
        one_colour = group.baseline.ndim == 1
        baseline = group.baseline[None, :, None, None].expand_as(group.images[:1]) if one_colour else group.baseline
        _, blank = _looked_at(runner, baseline, micro_batch)
        for b in range(count):
            group.forwards[b] += 1
        return [
            Surrogate(
                fold,
                maps[b],
                blank[0 if one_colour else b],
                group.labels[b],
                group.regions[b],
                int(group.target[b]),
                self.terms.weights,
                self.terms.confidence,
            )
            for b in range(count)
        ]

    def _result(
        self,
        runner: Runner,
        group: Group,
        b: int,
        trace: Trace,
        shown: Tensor,
        labels: Tensor,
        source: str | None,
        micro_batch: int,
        seconds: float,
    ) -> SMDLExplanation:
        target = int(group.target[b])
        whole, blank = (each[b].double().softmax(0) for each in (group.whole, group.blank))
        predicted = int(whole.argmax())
        steps = [step for step in trace.steps if step is not None]
        scores = torch.tensor([step.scores for step in steps], dtype=torch.float64)
        total = torch.tensor([step.total for step in steps], dtype=torch.float64)
        first_best = int(total.argmax())
        reached = [step.reached for step in steps]
        after = steps[first_best].kept
        empty = trace.problem.empty_score
        saliency = rank_saliency(trace.order, total, empty, group.regions[b])
        start, end = float(blank[target]), float(whole[target])
        return SMDLExplanation(
            image=shown,
            source=source,
            predicted=predicted,
            target=target,
            predicted_name=self.classifier.class_name(predicted),
            target_name=self.classifier.class_name(target),
            probabilities_before=Probabilities(float(whole[predicted]), end),
            probabilities_after=Probabilities(steps[first_best].kept_predicted, after),
            maps=Maps({"saliency": saliency[labels.long()], "regions": labels}),
            evaluations=group.forwards[b],
            seconds=seconds,
            seed=None,
            versions=versions()
            | {
                "precision": self.precision,
                "micro_batch": str(micro_batch),
                "channels_last": str(runner.channels_last),
                "folded_batch_norms": str(runner.folded),
            },
            notes=[*runner.notes, *self._notes(trace)],
            search=self.search,
            weights=dict(self.weights),
            order=trace.order,
            scores=scores,
            total=total,
            empty_score=empty,
            insertion=torch.tensor([start, *(step.kept for step in steps)], dtype=torch.float64),
            deletion=torch.tensor([end, *(step.removed for step in steps)], dtype=torch.float64),
            best_prefix=first_best + 1,
            sufficient_prefix=reached.index(True) + 1 if any(reached) else None,
            region_count=group.regions[b],
            regions_asked=self.region_count,
            tied_steps=trace.ties,
            noise=trace.problem.noise,
            violation_rate=trace.violations / trace.compared if trace.compared else None,
            guarantee=self._guarantee(trace),
            baseline="given" if isinstance(self.baseline, Tensor) else self.baseline,
        )

    def _guarantee(self, trace: Trace) -> str:
        """What can be said of the order, in a sentence."""
        ties = f", but for {len(trace.ties)} ties" if trace.ties else ""
        if self.precision != "float32":
            return f"none: scores are of {self.precision} forwards"
        if self.search == "greedy":
            return f"every region is the best next one given those before it{ties}"
        if self.search == "lazy":
            certain = len(trace.order) - trace.uncertain
            return (
                f"{certain} of {len(trace.order)} picks are greedy's if no gain grows as the set does; the largest "
                f"growth that was measured is {trace.growth:.2g}"
            )
        if self.search == "bidirectional":
            return "the front half is greedy among the regions that the back end has left"
        return (
            "no candidate that was scored in full in a step scored more, beyond the noise, than the region ranked there"
        )

    def _notes(self, trace: Trace) -> list[str]:
        notes = []
        if trace.compared:
            rate = trace.violations / trace.compared
            notes.append(
                f"diminishing returns failed in {rate:.0%} of {trace.compared} repeated gains: the score is not "
                "submodular here, and the bound of 1 - 1/e does not hold"
                if trace.violations
                else f"diminishing returns held in all of {trace.compared} repeated gains"
            )
        if trace.ties:
            named = ", ".join(map(str, trace.ties[:8])) + (", ..." if len(trace.ties) > 8 else "")
            notes.append(
                f"tie: at step {named} another region scored the same within {NOISE_FACTOR} times the noise of the "
                f"forward ({trace.problem.noise:.1e})"
            )
        return notes


def _looked_at(runner: Runner, images: Tensor, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Logits [B,C] and maps [B,D,H,W] of whole images, a micro-batch at a time."""
    parts = [runner.with_maps(runner.layout(part)) for part in images.split(micro_batch)]
    return torch.cat([logits for logits, _ in parts]), torch.cat([maps for _, maps in parts])


def rank_saliency(order: Sequence[int], total: Tensor, empty_score: float, regions: int) -> Tensor:
    """The saliency [m] in [0,1] of regions: A_1 = -|gain_1|, A_i = A_{i-1} - |F_i - F_{i-1}|, scaled to 0..1 (R).

    Ours: it falls by at least 1e-6 of its range from one region to the next, so that it keeps the order, and regions
    that were not ranked have 0, below the last that was.
    """
    saliency = torch.zeros(regions, dtype=torch.float64)
    if not order:
        return saliency
    before = torch.cat([total.new_tensor([empty_score]), total[:-1]])
    drops = (total - before).abs()
    drops = drops.clamp_min(_LEAST_DROP * max(float(drops.sum()), 1e-12))
    falling = -drops.cumsum(0)
    last = falling[-1] - (drops[-1] if len(order) < regions else 0)
    spread = float(falling[0] - last)
    saliency[torch.tensor(order)] = (falling - last) / spread if spread > 0 else torch.ones_like(falling)
    return saliency


def checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights of all four terms by name, refused where one is unknown, negative or no number."""
    chosen = dict.fromkeys(TERMS, 1.0)
    for name, weight in (weights or {}).items():
        if name not in chosen:
            raise ValueError(f"unknown weight {name!r}: {close_names(name, list(TERMS))}")
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(
                f"weight {name!r} must be a number of at least 0, got {weight!r}: every term is to be large for a good "
                "set, so a negative weight would look for a bad one; leave a term out with 0"
            )
        chosen[name] = float(weight)
    if not any(chosen.values()):
        raise ValueError("all weights are 0: every order would be as good; give one term a weight")
    return chosen
