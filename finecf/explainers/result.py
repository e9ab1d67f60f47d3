"""What an explainer returns: the shared result, what each method adds, and how they are kept in a file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

FORMAT = 1

Images = Callable[[int], Tensor | None]
"""Finds the image that a bank row came from: uint8 [H,W,3], or None where it is not at hand."""


class Maps(Mapping[str, Tensor]):
    """Named maps of one explanation; a map given as a function is computed when it is first asked for."""

    def __init__(self, entries: Mapping[str, Tensor | Callable[[], Tensor]]) -> None:
        self._entries: dict[str, Tensor | Callable[[], Tensor]] = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._entries:
            raise KeyError(f"no map is named {name!r}; there are {', '.join(self._entries)}")
        value = self._entries[name]
        if not isinstance(value, Tensor):
            value = self._entries[name] = value()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Probabilities(NamedTuple):
    """Softmax probabilities of the two classes that an explanation is about."""

    predicted: float
    target: float


class Part(NamedTuple):
    """A connected region of the partition.

    `cells` are (row, column) on the feature grid, `box` is (left, top, right, bottom) in image pixels (right and bottom
    exclusive), `score` is the summed contribution of its pixels in units of cells.
    """

    cells: tuple[tuple[int, int], ...]
    box: tuple[int, int, int, int]
    score: float


@dataclass(frozen=True)
class Edit:
    """One replacement: a cell of the image's feature map and the bank cell that took its place.

    Attributes:
        cell: (row, column) of the replaced cell.
        candidate_row: row of the bank.
        reference_source: name of the image that the row came from.
        reference_class: name of that image's class.
        reference_cell: (row, column) in that image's grid.
        reference_grid: (rows, columns) of that grid.
        similarity: cosine of the cell and its replacement.
        loss: the weighted sum of similarity and class loss that this pair minimised.
        target_probability: softmax probability of the target class after this edit.
    """

    cell: tuple[int, int]
    candidate_row: int
    reference_source: str
    reference_class: str
    reference_cell: tuple[int, int]
    reference_grid: tuple[int, int]
    similarity: float
    loss: float
    target_probability: float
    images: Images = field(default=lambda _: None, repr=False, compare=False)

    @property
    def reference_image(self) -> Tensor | None:
        """The whole reference image, uint8 [H,W,3]; None where the bank kept none and its file is gone."""
        return self.images(self.candidate_row)

    @property
    def reference_patch(self) -> Tensor | None:
        """The part of the reference image that the cell stands for, uint8 [h,w,3]; None without an image."""
        image = self.reference_image
        if image is None:
            return None
        left, top, right, bottom = cell_box(self.reference_cell, self.reference_grid, tuple(image.shape[:2]))
        return image[top:bottom, left:right]


def cell_box(cell: tuple[int, int], grid: tuple[int, ...], size: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels of one cell of a (rows, columns) grid laid over a (height, width) image."""
    (row, column), (rows, columns), (height, width) = cell, grid, size
    return (
        round(column * width / columns),
        round(row * height / rows),
        round((column + 1) * width / columns),
        round((row + 1) * height / rows),
    )


@dataclass(repr=False)
class Explanation:
    """What all explanations share.

    Attributes:
        image: the image explained, [C,H,W] as it was given (before the classifier's own preprocessing).
        source: its file or name, where known.
        predicted, target: class indices; the names stand beside them.
        probabilities_before, probabilities_after: softmax probabilities of both classes.
        maps: named maps, on the classifier's device.
        evaluations: feature maps that the head had to score (coalitions and replacements), one image's share.
        seconds: wall time after the trunk, one image's share of its batch.
        seed: seed of the generator that drew samples; None where nothing was drawn.
        versions: library versions, backend, device and micro-batch that the numbers depend on.
        notes: what a reader must know: why the head was not folded, where a decision was close to a tie.
    """

    kind: ClassVar[str] = "explanation"

    image: Tensor
    source: str | None
    predicted: int
    target: int
    predicted_name: str
    target_name: str
    probabilities_before: Probabilities
    probabilities_after: Probabilities
    maps: Maps
    evaluations: int
    seconds: float
    seed: int | None
    versions: dict[str, str]
    notes: list[str]

    def __repr__(self) -> str:
        """One line: the tensors inside would fill screens."""
        name = f"{self.source!r}: " if self.source else ""
        return f"<{type(self).__name__} {name}{self.predicted_name} -> {self.target_name}{self._outcome()}>"

    def __str__(self) -> str:
        return self.summary()

    def _outcome(self) -> str:
        """What the one-line form says of the result."""
        return ""

    def upsampled(self, name: str) -> Tensor:
        """A map at image size [H,W]: bilinear (corners not aligned); label maps and masks are at image size already."""
        chosen = self.maps[name]
        size = tuple(self.image.shape[-2:])
        if not chosen.is_floating_point() or tuple(chosen.shape) == size:
            return chosen
        return upsample(chosen, size)

    def summary(self) -> str:
        """The result as a few lines of plain text."""
        return "\n".join(self._summary_lines())

    def _summary_lines(self) -> list[str]:
        before, after = self.probabilities_before, self.probabilities_after
        lines = [
            f"{self.source or 'image'}: predicted {self.predicted_name}, target {self.target_name}",
            f"  p(target) {before.target:.3f} -> {after.target:.3f}, "
            f"p(predicted) {before.predicted:.3f} -> {after.predicted:.3f}",
        ]
        return lines + [f"  note: {note}" for note in self.notes]

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the figure of this explanation (matplotlib) and return it; with `path` it is also written there."""
        # finecf.report lies above this layer: it is looked up when it is asked for, never imported from here.
        return importlib.import_module("finecf.report").plot(self, path)

    def save(self, path: str | Path) -> Path:
        """Write everything into one safetensors file (JSON in its header) that `finecf.load` reads.

        Raises:
            FileNotFoundError: the folder of `path` does not exist.
        """
        from safetensors.torch import save

        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"cannot save to {path}: there is no folder {path.parent}; create it first")
        tensors, fields = self._state()
        header = json.dumps({"format": FORMAT, "kind": self.kind, **fields})
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path.write_bytes(save(ready, metadata={"finecf": header}))  # `save_file` would hide the file from others
        return path

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"map/{name}": self.maps[name] for name in self.maps} | {"image": self.image}
        fields = {
            "source": self.source,
            "predicted": self.predicted,
            "target": self.target,
            "predicted_name": self.predicted_name,
            "target_name": self.target_name,
            "probabilities_before": list(self.probabilities_before),
            "probabilities_after": list(self.probabilities_after),
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "seed": self.seed,
            "versions": self.versions,
            "notes": self.notes,
        }
        return tensors, fields

    @classmethod
    def _from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> Explanation:
        return cls(**cls._arguments(tensors, fields))

    @staticmethod
    def _arguments(tensors: dict[str, Tensor], fields: dict[str, Any]) -> dict[str, Any]:
        shared = dict(fields)
        for name in ("probabilities_before", "probabilities_after"):
            shared[name] = Probabilities(*shared[name])
        maps = Maps({key.removeprefix("map/"): value for key, value in tensors.items() if key.startswith("map/")})
        return shared | {"image": tensors["image"], "maps": maps}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during `explain`; `explanations` holds what was finished (in a shell: `sys.last_value`)."""

    def __init__(self, explanations: list[Any], count: int) -> None:
        done = f"interrupted after {len(explanations)} of {count} images; they are in .explanations"
        super().__init__(done if explanations else f"interrupted before the first of {count} images was explained")
        self.explanations = explanations


@dataclass(repr=False)
class FGVCEExplanation(Explanation):
    """The result of FG-VCE for one image.

    Maps at grid size [H,W], values in [0,1]: "contribution", "cam_predicted", "cam_target", "before", "after",
    "dominant", "invariant" (and "contribution_stderr" where it was sampled). Maps at image size: "object_mask" (bool)
    and "part_labels" (int64; 0 is no part, 1 the part of highest score).

    Attributes:
        grid: (rows, columns) of the feature map.
        edits: the replacements in the order in which they were made.
        flipped: whether the edited feature map is classified as the target.
        weights: of the similarity loss and of the class loss in the edits' losses.
        logits_path: [T+1,C] logits before the first edit and after each.
        minimal_edits: what backward elimination left of `edits` (equal to them where it was not asked for).
        minimal_probability: softmax probability of the target with `minimal_edits` alone.
        partition, rivals: functions that compute `parts` and `tied_edits`; called once, on first use.
    """

    kind: ClassVar[str] = "fgvce"

    grid: tuple[int, int]
    edits: list[Edit]
    flipped: bool
    weights: tuple[float, float]
    logits_path: Tensor
    minimal_edits: list[Edit]
    minimal_probability: float
    partition: Callable[[], list[Part]] = field(repr=False)
    rivals: Callable[[], list[int]] = field(repr=False)

    def __post_init__(self) -> None:
        self._parts: list[Part] | None = None
        self._tied_edits: list[int] | None = None

    def _outcome(self) -> str:
        return f", {'flipped' if self.flipped else 'not flipped'} by {len(self.edits)} edits"

    @property
    def parts(self) -> list[Part]:
        """The part-level partition, highest score first."""
        if self._parts is None:
            self._parts = self.partition()
        return self._parts

    @property
    def tied_edits(self) -> list[int]:
        """Edits (from 1) whose choice another pair of cell and candidate missed by no more than the numeric noise."""
        if self._tied_edits is None:
            self._tied_edits = self.rivals()
            self.rivals = list  # what it was computed from may be large
        return self._tied_edits

    def cell_box(self, cell: tuple[int, int]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a grid cell in pixels of `image`."""
        return cell_box(cell, self.grid, tuple(self.image.shape[-2:]))

    def _summary_lines(self) -> list[str]:
        head, *notes = super()._summary_lines()
        verdict = "flipped" if self.flipped else "not flipped (no solution within the budget)"
        lines = [head, f"  {verdict} after {len(self.edits)} edit{'s' * (len(self.edits) != 1)}"]
        for number, edit in enumerate(self.edits, 1):
            lines.append(
                f"  {number}. cell {edit.cell} <- {edit.reference_source} cell {edit.reference_cell}: "
                f"similarity {edit.similarity:.2f}, p(target) {edit.target_probability:.3f}"
            )
        if len(self.minimal_edits) < len(self.edits):
            kept = ", ".join(str(self.edits.index(edit) + 1) for edit in self.minimal_edits)
            lines.append(f"  enough without the others: edits {kept}, p(target) {self.minimal_probability:.3f}")
        if self.tied_edits:
            numbers = ", ".join(map(str, self.tied_edits))
            lines.append(f"  tie: another choice was as good, within the numeric noise, at edit {numbers}")
        return lines + notes

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, fields = super()._state()
        tensors["logits_path"] = self.logits_path
        for edit in self.edits:
            image = edit.reference_image
            if image is not None:
                tensors[f"reference/{edit.candidate_row}"] = image
        plain = [name for name in Edit.__dataclass_fields__ if name != "images"]
        fields |= {
            "grid": list(self.grid),
            "edits": [{name: getattr(edit, name) for name in plain} for edit in self.edits],
            "flipped": self.flipped,
            "weights": list(self.weights),
            "minimal": [self.edits.index(edit) for edit in self.minimal_edits],
            "minimal_probability": self.minimal_probability,
            "tied_edits": self.tied_edits,
            "parts": [[part.cells, part.box, part.score] for part in self.parts],
        }
        return tensors, fields

    @classmethod
    def _from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> FGVCEExplanation:
        arguments = cls._arguments(tensors, fields)

        def images(row: int) -> Tensor | None:
            return tensors.get(f"reference/{row}")

        pairs = ("cell", "reference_cell", "reference_grid")
        edits = [Edit(**edit | {name: tuple(edit[name]) for name in pairs}, images=images) for edit in fields["edits"]]
        parts = [
            Part(tuple((row, column) for row, column in cells), cast(tuple[int, int, int, int], tuple(box)), score)
            for cells, box, score in arguments.pop("parts")
        ]
        tied = arguments.pop("tied_edits")
        arguments |= {
            "grid": tuple(fields["grid"]),
            "weights": tuple(fields["weights"]),
            "edits": edits,
            "minimal_edits": [edits[index] for index in arguments.pop("minimal")],
            "logits_path": tensors["logits_path"],
            "partition": lambda: parts,
            "rivals": lambda: tied,
        }
        return cls(**arguments)


@dataclass(repr=False)
class SMDLExplanation(Explanation):
    """The result of SMDL for one image: its regions in the order of what they contribute to the target class.

    Maps at image size: "regions" (int32 labels 0..m-1) and "saliency" (float64 in [0,1], falling in the order).
    `probabilities_after` are those of the image that shows only the best prefix.

    Attributes:
        evaluations: images through the model; in the window search, a gradient counts as one more.
        search: "greedy", "bidirectional", "window" or "lazy".
        weights: of the terms, by name.
        order: regions, first the one that matters most; all of them unless the search was told to stop.
        scores: float64 [k,4]: confidence, effectiveness, consistency and collaboration of each prefix of the order.
        total: float64 [k]: their weighted sum, F.
        empty_score: F of no region.
        insertion: float64 [k+1]: p(target) with the first 0..k regions kept.
        deletion: float64 [k+1]: p(target) with the first 0..k regions removed.
        best_prefix: number of regions at which F is largest, the first of equal ones.
        sufficient_prefix: the least number of first regions that alone are classified as the target; None: none.
        region_count, regions_asked: m, and how many were asked for.
        tied_steps: steps (from 1) at which another region was as good within the noise.
        noise: how far a score moves when an image goes through the model in another company.
        violation_rate: share of repeated gains that had grown, against diminishing returns; None: none was repeated.
        guarantee: what can be said of the order, in a sentence.
        baseline: what removed regions showed: "black", "mean", "blur", or "given" (a colour or an image).
    """

    kind: ClassVar[str] = "smdl"

    search: str
    weights: dict[str, float]
    order: list[int]
    scores: Tensor
    total: Tensor
    empty_score: float
    insertion: Tensor
    deletion: Tensor
    best_prefix: int
    sufficient_prefix: int | None
    region_count: int
    regions_asked: int
    tied_steps: list[int]
    noise: float
    violation_rate: float | None
    guarantee: str
    baseline: str = "unknown"  # in files of an earlier version

    def _outcome(self) -> str:
        return f", {self.best_prefix} of {self.region_count} regions reach the best score"

    def shown(self, regions: int | None = None) -> Tensor:
        """Bool [H,W]: the pixels of the first `regions` regions of the order; None: of the best prefix."""
        count = self.best_prefix if regions is None else regions
        chosen = torch.zeros(self.region_count, dtype=torch.bool)
        chosen[self.order[:count]] = True
        return chosen[self.maps["regions"].long()]

    def area(self, regions: int | None = None) -> float:
        """Share of the image that the first `regions` regions cover, in [0,1]."""
        return float(self.shown(regions).double().mean())

    @property
    def shares(self) -> Tensor:
        """Float64 [k+1]: the share of the image that the first 0..k regions cover, where the two curves are read."""
        sizes = torch.bincount(self.maps["regions"].flatten().long().cpu(), minlength=self.region_count).double()
        return torch.cat([sizes.new_zeros(1), sizes[self.order].cumsum(0)]) / sizes.sum()

    @property
    def insertion_area(self) -> float:
        """Mean height of the insertion curve over the share of the image that was ranked; large is good."""
        return self._mean_height(self.insertion)

    @property
    def deletion_area(self) -> float:
        """Mean height of the deletion curve over the share of the image that was ranked; small is good."""
        return self._mean_height(self.deletion)

    def _mean_height(self, curve: Tensor) -> float:
        # An interrupted search has not measured all of its deletion curve: the mean is over what it has.
        measured = ~curve.cpu().isnan()
        heights, shares = curve.cpu()[measured], self.shares[measured]
        return float(torch.trapezoid(heights, shares) / shares[-1]) if shares[-1] > 0 else float(heights[0])

    def _summary_lines(self) -> list[str]:
        head, probabilities, *notes = super()._summary_lines()
        enough = (
            "no prefix of the order is classified as the target"
            if self.sufficient_prefix is None
            else f"the first {self.sufficient_prefix} ({self.area(self.sufficient_prefix):.0%} of the area) "
            "are classified as the target"
        )
        lines = [
            head,
            f"{probabilities} (the best prefix alone)",
            f"  {len(self.order)} of {self.region_count} regions ranked; the first {self.best_prefix} "
            f"({self.area():.0%} of the area) have the best score, {float(self.total[self.best_prefix - 1]):.3f}",
            f"  {enough}",
            f"  {self.evaluations} images through the model; {self.search}: {self.guarantee}",
        ]
        return lines + notes

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, fields = super()._state()
        return _split(self, SMDLExplanation, tensors, fields)

    @classmethod
    def _from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> SMDLExplanation:
        arguments = cls._arguments(tensors, fields)
        return cls(**arguments | {name: tensors[name] for name in ("scores", "total", "insertion", "deletion")})


@dataclass(repr=False)
class MirrorExplanation(Explanation):
    """The result of Mirror-CFE for one image: how it changes until the classifier calls it the target.

    Images are in the space that the model takes. Maps at image size, mean absolute differences over channels between
    the first counterfactual image (that of k = 1 where there is none) and: "difference", the image; "change", the
    image as it is decoded at k = 0, which leaves out what the decoder cannot draw. `probabilities_after` are those of
    the same image.

    Attributes:
        reflection: "closed_form", "lbfgs" or "two_class".
        origin, origin_name: the class that the path leads away from; the predicted one unless another was asked for.
            The name is None in files of earlier versions.
        k: float64 [K], the places of the strip.
        images: [K,C,H,W], the strip: semifactual below 1/2, counterfactual above.
        prepared: [C,H,W], the image as the model takes it.
        reconstruction: [C,H,W], what is decoded at k = 0.
        first_image, first_k: the first image beyond k = 1/2 that the classifier calls the target, and its k, or None.
        mirror_image, mirror_valid: the image at k = 1, and whether the classifier calls it the target.
        redrawn_as, redrawn_name: the class that the classifier calls the image of k = 0; None in files of earlier
            versions.
        latent_first_k: where the latent becomes a counterfactual; None: nowhere.
        latent_logits, image_logits: float64 [K,C]: what the head says of the latents, and the classifier of the images
            drawn from them. Where both agree the images are faithful; corrections bring the margin of the two classes
            nearer by construction, and `latent_error` shows the rest.
        latent_error: float64 [K]: mean absolute difference between the latents and those of the drawn images.
        residual: largest difference, at k = 1, between the latent's logits and the swapped ones.
        corrections, correction_blur, soften: those of the `MirrorCFE`.
        trimmed_image: [C,H,W], the image with as small a part of its change to `mirror_image` as was found to suffice
            (`finecf.explainers.trim`): a blend of the two that no decoder drew. None where that was not asked for, or
            `mirror_image` is not the target.
        trimmed_mask: [h,w] in [0,1], how much of the change is kept at the middle of each cell of a grid.
        trimmed_share: that image's mean absolute change as a share of `mirror_image`'s.
        trimmed_margin: the share of the target's lead that was to be kept.
        trimmed_blur, trimmed_stands: a standard deviation in pixels, and whether the trimmed image is the target
            blurred by it too. With a blur of 0, which was not asked for, False.
        repainted_image, repainted_valid: [C,H,W], the image with marks of the target painted in
            (`finecf.explainers.Repainter`), and whether the classifier calls it the target; None without a repainter.
        trimmed_upon_repainted: whether the trimmed image is a blend of the repainted image and of that with the change
            to `mirror_image` added, instead of the image itself and `mirror_image`. None without a repainter.
    """

    kind: ClassVar[str] = "mirror"

    reflection: str
    origin: int
    k: Tensor
    images: Tensor
    prepared: Tensor
    reconstruction: Tensor
    first_image: Tensor | None
    first_k: float | None
    mirror_image: Tensor
    mirror_valid: bool
    latent_first_k: float | None
    latent_logits: Tensor
    image_logits: Tensor
    latent_error: Tensor
    residual: float
    corrections: int = 0
    correction_blur: float = 0.0
    soften: float = 0.0
    origin_name: str | None = None
    redrawn_as: int | None = None
    redrawn_name: str | None = None
    trimmed_image: Tensor | None = None
    trimmed_mask: Tensor | None = None
    trimmed_share: float | None = None
    trimmed_margin: float | None = None
    trimmed_blur: float | None = None
    trimmed_stands: bool | None = None
    repainted_image: Tensor | None = None
    repainted_valid: bool | None = None
    trimmed_upon_repainted: bool | None = None

    def _outcome(self) -> str:
        return (
            ", no counterfactual image" if self.first_k is None else f", first counterfactual at k = {self.first_k:.2f}"
        )

    @property
    def counterfactual(self) -> Tensor:
        """The first counterfactual image, else that of k = 1, [C,H,W]."""
        return self.mirror_image if self.first_image is None else self.first_image

    def confidences(self, latent: bool = False) -> Tensor:
        """Probabilities of source and target along k, float64 [K,2]: of the drawn images, or of the latents."""
        logits = self.latent_logits if latent else self.image_logits
        return logits.softmax(1)[:, [self.origin, self.target]]

    @property
    def confidence_gap(self) -> float:
        """Mean absolute difference along k between the target's probability for the latent and for the image."""
        return float((self.confidences() - self.confidences(latent=True))[:, 1].abs().mean())

    @property
    def taken_at_once(self) -> bool:
        """Whether the classifier takes the image for the target as soon as it is redrawn (k = 0), nothing changed."""
        if self.redrawn_as is not None:
            return self.redrawn_as == self.target
        named = self.image_logits.argmax(1) == self.target
        return bool((named & (self.k < 1e-6)).any())

    @property
    def lost_at_once(self) -> bool:
        """Whether the image, redrawn (k = 0) with nothing changed, is taken for neither its class nor the target."""
        return self.redrawn_as not in (None, self.predicted, self.origin, self.target)

    def animate(self, path: str | Path, *, size: int = 256, frame_seconds: float = 0.1) -> Path:
        """Write the whole path, there and back, to a GIF file; each frame says its k and the target's probability.

        Args:
            path: the file, with the suffix .gif.
            size: pixels of the pictures' longer side.
            frame_seconds: how long an image is seen; both ends and the first counterfactual image are seen longer.

        Raises:
            ValueError: another suffix, or a size or a time that cannot be.
            FileNotFoundError: the folder of `path` does not exist.
        """
        # As for `plot`: the layer above is looked up when it is asked for.
        report = importlib.import_module("finecf.report")
        written: Path = report.animate(self, path, size=size, frame_seconds=frame_seconds)
        return written

    def _summary_lines(self) -> list[str]:
        head, probabilities, *notes = super()._summary_lines()
        drawn = (
            "no image on the path is classified as the target"
            if self.first_k is None
            else f"first counterfactual image at k = {self.first_k:.2f}"
        )
        latent = "none" if self.latent_first_k is None else f"k = {self.latent_first_k:.3f}"
        mirror = "is" if self.mirror_valid else "is not"
        change, difference = (f"{float(self.maps[name].mean()):.3f}" for name in ("change", "difference"))
        lines = [
            head,
            f"{probabilities} ({'the image of k = 1' if self.first_k is None else 'that image'})",
            f"  {drawn} (of the latent: {latent}); the image of k = 1 {mirror} classified as the target",
            f"  mean pixel change {change} from what is redrawn at k = 0, {difference} from the image itself"
            if change != difference
            else f"  mean pixel change {change}",
            f"  latent against image: confidence gap {self.confidence_gap:.3f}, latent error "
            f"{float(self.latent_error.mean()):.3f}",
        ]
        if self.trimmed_image is not None:
            part = float((self.trimmed_image - self.prepared).abs().mean())
            stands = "also" if self.trimmed_stands else "but not"
            blurred = f", {stands} where it is blurred by {self.trimmed_blur:g} pixels" if self.trimmed_blur else ""
            size = f"mean pixel change {part:.4f}{blurred}"
            lines.append(
                f"  repainted, with what suffices of the change to the image of k = 1 on top: {size}"
                if self.trimmed_upon_repainted
                else f"  {self.trimmed_share:.1%} of the change to the image of k = 1 suffices, {size}"
            )
        if self.repainted_image is not None:
            named = "is" if self.repainted_valid else "is not"
            part = float((self.repainted_image - self.prepared).abs().mean())
            lines.append(f"  repainted alone it {named} classified as the target, mean pixel change {part:.4f}")
        if self.taken_at_once:
            lines.append(
                f"  redrawn at k = 0, with nothing changed, it is already taken for {self.target_name}: what the "
                "decoder cannot draw decides"
            )
        if self.lost_at_once:
            lines.append(
                f"  redrawn at k = 0, with nothing changed, it is taken for {self.redrawn_name}: the decoder does not "
                "draw what the model sees"
            )
        return lines + notes

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, fields = super()._state()
        return _split(self, MirrorExplanation, tensors, fields)

    @classmethod
    def _from_state(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> MirrorExplanation:
        names = [name for name in _own_fields(cls) if name in tensors]
        return cls(**{"first_image": None} | cls._arguments(tensors, fields) | {name: tensors[name] for name in names})


_PERHAPS: Final = ("first_image", "trimmed_image", "trimmed_mask", "repainted_image")
"""Tensors that an explanation may be without."""


def _own_fields(kind: type[Explanation]) -> list[str]:
    """The fields that a kind of explanation adds."""
    return [name for name in kind.__dataclass_fields__ if name not in Explanation.__dataclass_fields__]


def _split(
    found: Explanation, kind: type[Explanation], tensors: dict[str, Tensor], fields: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The shared state, with the fields that a kind adds sorted into tensors and the rest."""
    for name in _own_fields(kind):
        value = getattr(found, name)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value is not None or name not in _PERHAPS:
            fields[name] = value
    return tensors, fields


def upsample(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Bilinear enlargement of [H,W] or [B,H,W] maps, corners not aligned (the rule of torch and OpenCV)."""
    batched = maps if maps.ndim == 3 else maps[None]
    large = F.interpolate(batched[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return large if maps.ndim == 3 else large[0]


def load(path: str | Path) -> Explanation:
    """Read an explanation that `Explanation.save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, is no explanation, or was written in a later format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no explanation at {path}; expected a file that Explanation.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("finecf")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}); save the explanation again") from error
    fields = json.loads(header) if header else {}
    kinds = {cls.kind: cls for cls in (FGVCEExplanation, SMDLExplanation, MirrorExplanation)}
    if fields.get("kind") not in kinds:
        raise ValueError(f"{path} holds no explanation; expected a file that Explanation.save wrote")
    if fields.pop("format") > FORMAT:
        raise ValueError(f"{path} was written by a later finecf; update finecf to read it")
    return kinds[fields.pop("kind")]._from_state(tensors, fields)
