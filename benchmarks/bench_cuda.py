"""The operators on a GPU against plain torch on the same GPU, and against the roofline measured in the same run.

    python benchmarks/bench_cuda.py [--quick] [--json FILE] [--only OPERATOR]
    python benchmarks/bench_cuda.py --device cpu --quick          the harness and the cases, tried without a GPU

`make gpu-check` runs it. Each row holds, as median and quartiles in milliseconds,

    ours_ms    the compiled operator: time on the device between two CUDA events. A kernel that only waits is queued
               first, so that the host has queued all launches before the first one starts: the time of the kernels and
               of the gaps between them, not of Python
    call_ms    the public function with its checks, from the call to the result being there, by the host's clock
    plain_ms   the same work in plain torch, measured as ours_ms (a form that asks for values waits for the host)

Inputs are rotated: there are so many copies of them, with numbers of their own, that all copies together exceed twice
the L2 cache, and none is found there. float32 matrix products run without TF32 on both sides.

The roofline of a row is the longest of three times, each an amount over a rate that is measured in the same run:

    bytes        every input read once and every output written once    over a device-to-device copy (read + write)
    operations   additions and multiplications                           over a float32 matrix product of 8192^3
    exponentials what the factorised algebra cannot leave out            over a loop of expf in registers

The amounts are written beside every case below. `share` is roofline / ours: 1 is the machine's limit. Cases of a few
microseconds are bound by their launches instead: `peaks` holds the time of an empty launch.

A new operator is one function that yields its cases, under `@cases_of("name")`; a test asks for at least one each.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from finecf import _native, ops
from finecf.reference import compose_regions as plain_compose
from finecf.reference import rank_masks as plain_rank_masks
from finecf.reference import submodular_gains as plain_gains
from finecf.reference.replacement import replace_until_flip_factorised

Inputs = tuple[Any, ...]
MOST_COPIES = 2048
DEFAULT_L2 = 64 << 20


@dataclass(frozen=True)
class Amounts:
    """What a case must move and compute at least."""

    bytes: float
    flops: float = 0.0
    exps: float = 0.0

    def times(self, peaks: dict[str, float | None]) -> dict[str, float]:
        """Milliseconds that each amount takes at the measured rates; an amount without a rate is left out."""
        rates = {
            "memory": (self.bytes, peaks.get("copy_bytes_per_s")),
            "arithmetic": (self.flops, peaks.get("gemm_flops_per_s")),
            "exponentials": (self.exps, peaks.get("exps_per_s")),
        }
        return {name: 1e3 * amount / rate for name, (amount, rate) in rates.items() if rate}


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    operator: str
    shape: str
    inputs: Callable[[Random], Inputs]
    ours: Callable[..., Any]
    """The compiled operator, its arguments checked by nobody."""
    call: Callable[..., Any]
    """The public function."""
    plain: Callable[..., Any] | None
    amounts: Amounts
    agree: Callable[[Any, Any], float] | None = None
    """Largest difference of the result of `ours` from that of `plain`, in units of what is allowed; 1 is the most."""
    quick: bool = False
    """Whether `--quick` takes it: small enough for a CPU."""
    needs: float = 0.0
    """Bytes of device memory, where they are many."""


@dataclass
class Random:
    """Fresh inputs on a device."""

    device: torch.device
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype) * scale

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def orders(self, count: int, size: int) -> Tensor:
        return self.uniform(count, size).argsort(1).int()


CASES: dict[str, Callable[[], Iterator[Case]]] = {}


def cases_of(operator: str) -> Callable[[Callable[[], Iterator[Case]]], Callable[[], Iterator[Case]]]:
    def register(function: Callable[[], Iterator[Case]]) -> Callable[[], Iterator[Case]]:
        CASES[operator] = function
        return function

    return register


def native(operator: str) -> Callable[..., Any]:
    return lambda *arguments: getattr(torch.ops.finecf, operator)(*arguments)


def public(operator: str) -> Callable[..., Any]:
    return lambda *arguments: getattr(ops, operator)(*arguments)


def difference(allowed: float, which: int | None = None) -> Callable[[Any, Any], float]:
    """Compares results, or their part `which`: the largest absolute difference over `allowed`."""

    def agree(ours: Any, plain: Any) -> float:
        if which is not None:
            ours, plain = ours[which], plain[which]
        return float((ours.double() - plain.double()).abs().max()) / allowed

    return agree


# ---- shapley ---------------------------------------------------------------------------------------------------------


@cases_of("permutation_shapley_tiles")
def permutation_shapley_tiles() -> Iterator[Case]:
    """Bytes: game, orders, moments of every tile of 32. Operations: an addition per (order, cell, class).
    Exponentials: one per (order, prefix, class); the factorised walk may need fewer, so a share above 1 is no fault."""

    def plain(cells: Tensor, base: Tensor, orders: Tensor, target: Tensor, *_: Any) -> Tensor:
        """Gather the cells in order, prefix sums, softmax, differences: the mean over all orders."""
        index = orders.long()
        start = base[:, None].expand(-1, len(orders), -1)[0][:, None]
        values = torch.cat([start, cells[0][index]], 1).cumsum(1).softmax(-1)
        wanted = values.gather(2, target.expand(*values.shape[:2])[..., None])[..., 0]
        return torch.zeros(orders.shape, device=cells.device).scatter_(1, index, wanted.diff(dim=1)).mean(0)

    def mean_of(tiles: tuple[Tensor, Tensor], count: int) -> Tensor:
        sizes = torch.full((tiles[0].shape[1],), 32.0, dtype=torch.float64, device=tiles[0].device)
        sizes[-1] = count - 32 * (len(sizes) - 1)
        return (tiles[0][0] * sizes[:, None]).sum(0) / count

    for count, cells, classes in ((100, 49, 200), (100, 196, 200), (100, 49, 1000), (1000, 196, 200)):
        yield Case(
            "permutation_shapley_tiles",
            f"{count} orders x {cells} cells x {classes}",
            lambda rng, m=count, p=cells, c=classes: (
                rng.normal(1, p, c, scale=0.2),
                rng.normal(1, c),
                rng.orders(m, p),
                rng.integers(c, 1),
                "prob",
                False,
            ),
            native("permutation_shapley_tiles"),
            lambda *given: ops.permutation_shapley(*given[:4], antithetic=False),
            plain,
            Amounts(
                bytes=4 * (cells * classes + classes + count * cells) + 16 * -(-count // 32) * cells,
                flops=count * cells * classes,
                exps=count * (cells + 1) * classes,
            ),
            lambda ours, theirs, m=count: float((mean_of(ours, m) - theirs.double()).abs().max()) / 1e-5,
            quick=cells * classes * count < 2_000_000,
        )


@cases_of("masked_class_scores")
def masked_class_scores() -> Iterator[Case]:
    """Bytes: game, masks, scores. Operations: one product of masks and cell logits per image.
    Exponentials: one per (image, mask, class)."""

    def plain(cells: Tensor, base: Tensor, masks: Tensor, target: Tensor, _: str) -> Tensor:
        values = (base[:, None] + masks @ cells).softmax(-1)
        return values.gather(2, target[:, None, None].expand(-1, len(masks), 1))[..., 0]

    for images, count, cells, classes in ((32, 50, 49, 200), (1, 1000, 196, 200), (32, 50, 49, 1000)):
        yield Case(
            "masked_class_scores",
            f"{images} images x {count} masks x {cells} x {classes}",
            lambda rng, b=images, m=count, p=cells, c=classes: (
                rng.normal(b, p, c, scale=0.3),
                rng.normal(b, c),
                rng.uniform(m, p),
                rng.integers(c, b),
                "prob",
            ),
            native("masked_class_scores"),
            public("masked_class_scores"),
            plain,
            Amounts(
                bytes=4 * (images * (cells + 1) * classes + count * cells + images * count),
                flops=2 * images * count * cells * classes,
                exps=images * count * classes,
            ),
            difference(1e-5),
            quick=images == 32 and classes == 200,
        )


# ---- replacement -----------------------------------------------------------------------------------------------------


@cases_of("nearest_candidates")
def nearest_candidates() -> Iterator[Case]:
    """Bytes: queries and bank. Operations: one product. The cosines need not leave the chip."""

    def plain(query: Tensor, bank: Tensor, k: int) -> Any:
        left, right = F.normalize(query.float()).to(query.dtype), F.normalize(bank.float()).to(bank.dtype)
        return (left @ right.T).float().topk(k)

    for rows, dtype in ((3000, torch.float32), (577_612, torch.float16)):
        size = dtype.itemsize
        yield Case(
            "nearest_candidates",
            f"49 x {rows:,} x 2048, k = 20, {str(dtype).removeprefix('torch.')}",
            lambda rng, n=rows, kind=dtype: (
                rng.normal(49, 2048, dtype=kind),
                rng.normal(n, 2048, dtype=kind),
                20,
            ),
            native("nearest_candidates"),
            public("nearest_candidates"),
            plain,
            Amounts(bytes=size * 2048 * (49 + rows) + 49 * 20 * 12, flops=2 * 49 * rows * 2048),
            difference(1e-5 if size == 4 else 2e-3, 0),
            quick=rows == 3000,
            needs=0 if rows == 3000 else 8 * size * 2048 * rows,
        )


def search_inputs(rng: Random, images: int, cells: int, candidates: int, classes: int) -> dict[str, Tensor]:
    """A search that no edit ends: class 5 stays far above every target."""
    base = rng.normal(images, classes)
    base[:, 5] += 60
    return {
        "cell_logits": rng.normal(images, cells, classes, scale=0.3),
        "candidate_logits": rng.normal(candidates, classes, scale=0.3),
        "similarity": rng.uniform(images, cells, candidates),
        "base": base,
        "target": rng.integers(5, images),
        "range": torch.tensor([[0, candidates]], device=rng.device).repeat(images, 1),
    }


def search_bytes(images: int, cells: int, candidates: int, classes: int) -> float:
    return 4 * (images * cells * classes + candidates * classes + images * cells * candidates)


@cases_of("best_replacement")
def best_replacement() -> Iterator[Case]:
    """Bytes: both sides' logits and the similarities. Operations: one product of cells and candidates.
    Exponentials: (cells + candidates) x classes, after the factorisation."""

    def inputs(rng: Random, cells: int, candidates: int, classes: int) -> Inputs:
        made = search_inputs(rng, 1, cells, candidates, classes)
        logits = made["base"] + made["cell_logits"].sum(1)
        allowed = torch.ones(1, cells, dtype=torch.bool, device=rng.device)
        first = (made["cell_logits"], made["candidate_logits"], made["similarity"], logits, made["target"])
        return (*first, allowed, made["range"], None, None, 1.0, 1.0)

    def plain(cells: Tensor, bank: Tensor, similarity: Tensor, logits: Tensor, target: Tensor, *_: Any) -> Tensor:
        """One factorised product and its minimum, without the second look at what rounding could not tell apart."""
        rest, index = logits - cells[0], target.expand(len(bank), 1)
        peak, top = rest.amax(1, keepdim=True), bank.amax(1)
        sums = (rest - peak).exp() @ (bank - top[:, None]).exp().T
        wanted = rest.gather(1, target.expand(len(rest), 1)) + bank.gather(1, index).T
        return (1 - similarity[0] + peak + top + sums.log() - wanted).min()

    for cells, candidates, classes in ((49, 3000, 200), (196, 3000, 200), (49, 3000, 1000), (49, 577_612, 200)):
        size = search_bytes(1, cells, candidates, classes)
        yield Case(
            "best_replacement",
            f"{cells} cells x {candidates:,} x {classes}",
            lambda rng, p=cells, n=candidates, c=classes: inputs(rng, p, n, c),
            native("best_replacement"),
            public("best_replacement"),
            plain,
            Amounts(size, 2 * cells * candidates * classes, (cells + candidates) * classes),
            lambda ours, theirs: abs(float(ours[2][0]) - float(theirs)) / 1e-3,
            quick=candidates * cells * classes < 50_000_000,
            needs=0 if candidates == 3000 else 6 * size,
        )


@cases_of("replace_until_flip")
def replace_until_flip() -> Iterator[Case]:
    """Ten edits. Bytes: every input once (candidates and similarities of the middle cases stay in the L2 cache from
    edit to edit). Operations: ten products. Exponentials: candidates once, cells at every edit."""

    def inputs(rng: Random, images: int, cells: int, candidates: int, classes: int) -> Inputs:
        made = search_inputs(rng, images, cells, candidates, classes)
        first = (made["cell_logits"], made["candidate_logits"], made["similarity"], made["base"], made["target"])
        return (*first, rng.uniform(images, cells), made["range"], None, cells, 10, False, 1.0, 1.0)

    for images, cells, candidates, classes in (
        (1, 49, 3000, 200),
        (1, 196, 3000, 200),
        (1, 49, 3000, 1000),
        (16, 49, 3000, 200),
    ):
        yield Case(
            "replace_until_flip",
            f"{images} x {cells} cells x {candidates:,} x {classes}, 10 edits",
            lambda rng, b=images, p=cells, n=candidates, c=classes: inputs(rng, b, p, n, c),
            native("replace_until_flip"),
            public("replace_until_flip"),
            replace_until_flip_factorised,
            Amounts(
                search_bytes(images, cells, candidates, classes),
                20 * images * cells * candidates * classes,
                (10 * images * cells + candidates) * classes,
            ),
            difference(1e-3, 2),
            quick=images == 1 and cells * classes < 10_000,
        )


# ---- submodular and regions ------------------------------------------------------------------------------------------


@cases_of("submodular_gains")
def submodular_gains() -> Iterator[Case]:
    """Bytes: both logits of every row, distances, scores. Exponentials (in float64, so the share says little): two per
    logit kept, one per logit removed."""

    def inputs(rng: Random, images: int, regions: int, classes: int) -> Inputs:
        rows = images * regions
        distance = rng.uniform(images, regions, regions, dtype=torch.float64)
        index = torch.arange(rows, device=rng.device)
        return (
            rng.normal(rows, classes),
            rng.normal(rows, classes),
            index // regions,
            index % regions,
            distance,
            rng.uniform(images, regions, dtype=torch.float64),
            rng.uniform(images, regions) > 0.5,
            rng.integers(classes, images),
            torch.ones(4, dtype=torch.float64, device=rng.device),
            "entropy",
            None,
            None,
            True,
        )

    for images, regions, classes in ((1, 49, 200), (32, 49, 1000)):
        rows = images * regions
        yield Case(
            "submodular_gains",
            f"{images} images x {regions} regions x {classes}",
            lambda rng, b=images, m=regions, c=classes: inputs(rng, b, m, c),
            native("submodular_gains"),
            public("submodular_gains"),
            plain_gains,
            Amounts(8 * rows * classes + 8 * images * regions**2 + 40 * rows, exps=3 * rows * classes),
            difference(1e-9, 1),
            quick=images == 1,
        )


@cases_of("compose_regions")
def compose_regions() -> Iterator[Case]:
    """Bytes: image, labels and baseline once, every output once."""
    for images, side in ((1, 224), (8, 224)):
        outputs, pixels = 49 * images, side * side
        yield Case(
            "compose_regions",
            f"{images} images, 2 x {outputs} outputs of 3 x {side} x {side}",
            lambda rng, b=images, n=outputs, s=side: (
                rng.normal(b, 3, s, s),
                rng.integers(49, b, s, s, dtype=torch.int32),
                torch.arange(n, device=rng.device) % b,
                rng.uniform(n, 49) > 0.5,
                rng.normal(3),
                True,
                False,
            ),
            native("compose_regions"),
            public("compose_regions"),
            plain_compose,
            Amounts(4 * (images * pixels * 4 + 2 * outputs * 3 * pixels)),
            difference(1e-30),
            quick=images == 1,
        )


@cases_of("rank_masks")
def rank_masks() -> Iterator[Case]:
    """Bytes: image, ranks and baseline once, every output once."""
    for outputs, side in ((50, 224), (400, 224)):
        pixels = side * side
        yield Case(
            "rank_masks",
            f"{outputs} outputs of 3 x {side} x {side}",
            lambda rng, n=outputs, s=side: (
                rng.normal(1, 3, s, s),
                rng.uniform(1, s * s).argsort(1).int().view(1, s, s),
                torch.zeros(n, dtype=torch.int64, device=rng.device),
                rng.integers(s * s, n, dtype=torch.int32),
                rng.normal(1, 3, s, s),
                True,
            ),
            native("rank_masks"),
            public("rank_masks"),
            plain_rank_masks,
            Amounts(4 * (7 * pixels + outputs * 3 * pixels)),
            difference(1e-30),
            quick=outputs == 50,
        )


# ---- timing ----------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """How long a call takes, in milliseconds."""

    def device(self, work: Callable[[], Any]) -> float:
        """Its time on the device."""

    def call(self, work: Callable[[], Any]) -> float:
        """Until its result is there."""


class CudaClock:
    """CUDA events behind a kernel that waits, so that the host is ahead of the device while it is measured."""

    WAIT = 800_000  # cycles, about 0.4 ms: longer than it takes to queue the launches of one call

    def device(self, work: Callable[[], Any]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(self.WAIT)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def call(self, work: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)


class HostClock:
    """The host's clock, for the CPU."""

    def device(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - began)

    call = device


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(times) < 2:
        return {"median": times[0], "q1": times[0], "q3": times[0], "count": len(times)}
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "count": len(times)}


def measure(
    sides: dict[str, Callable[[Inputs], Any]],
    sets: Sequence[Inputs],
    sample: dict[str, Callable[[Callable[[], Any]], float]],
    repeats: int,
    seconds: float = 5.0,
) -> dict[str, dict[str, float]]:
    """Times of several sides, in turn, each call on the next of the input sets; at least five, within `seconds`."""
    for number, side in enumerate(list(sides.values()) * 3):  # warm-up: module load, workspaces, clocks
        side(sets[number % len(sets)])
    times: dict[str, list[float]] = {name: [] for name in sides}
    turn = 0
    gc.collect()  # of a large process this takes seconds, which are not to be counted
    gc.disable()
    began = time.perf_counter()
    try:
        for done in range(repeats):
            for name, side in sides.items():
                given = sets[turn % len(sets)]
                times[name].append(sample[name](functools.partial(side, given)))
                turn += 1
            if done >= 4 and time.perf_counter() - began > seconds:
                break
    finally:
        gc.enable()
    return {name: spread(own) for name, own in times.items()}


def tensor_bytes(inputs: Inputs) -> int:
    return sum(each.numel() * each.element_size() for each in inputs if isinstance(each, Tensor))


def copies_for(size: int, l2: int) -> int:
    """How many sets of inputs exceed twice the L2 cache together."""
    return min(MOST_COPIES, 2 * l2 // max(1, size) + 1)


# ---- the machine -----------------------------------------------------------------------------------------------------


def exp_loop(device: torch.device) -> tuple[Callable[[], Any], int]:
    """A call that computes exponentials, and how many; on CUDA in registers, where memory does not count."""
    if device.type == "cpu":
        buffer = torch.randn(4096)
        out = torch.empty_like(buffer)
        return lambda: torch.exp(buffer, out=out), len(buffer)
    turns, size = 256, 1 << 22
    code = (
        "template <typename T> T many(T x) { T sum = 0;"
        f" for (int i = 0; i < {turns}; ++i) {{ sum += expf(x); x -= T(0.001); }} return sum; }}"
    )
    kernel = torch.cuda.jiterator._create_jit_fn(code)
    values = torch.rand(size, device=device)
    return lambda: kernel(values), turns * size


def measure_peaks(device: torch.device, clock: Clock, quick: bool) -> dict[str, float | None]:
    """The rates that the rooflines are made of, per second, and the milliseconds of an empty launch."""

    def fastest(work: Callable[[], Any]) -> float:
        for _ in range(3):
            work()
        return min(clock.device(work) for _ in range(5 if quick else 15)) / 1e3

    size = 1 << (22 if quick else 30)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * size / fastest(lambda: target.copy_(source))
    side = 256 if quick else 8192
    left = torch.randn(side, side, device=device)
    gemm = 2 * side**3 / fastest(lambda: left @ left)
    one = torch.zeros(1, device=device)
    found: dict[str, float | None] = {
        "copy_bytes_per_s": copy,
        "gemm_flops_per_s": gemm,
        "exps_per_s": None,
        "launch_ms": 1e3 * fastest(one.zero_),
    }
    try:
        work, count = exp_loop(device)
        found["exps_per_s"] = count / fastest(work)
    except (RuntimeError, AttributeError) as error:  # no run-time compiler: rooflines then lack this term
        print(f"finecf: the rate of exponentials cannot be measured: {error}", file=sys.stderr)
    return found


# ---- running ---------------------------------------------------------------------------------------------------------


def run_case(
    case: Case, device: torch.device, clock: Clock, peaks: dict[str, float | None], l2: int, quick: bool
) -> dict[str, Any]:
    """One row: check ours against plain torch, then time both."""
    first = case.inputs(Random(device))
    count = 2 if quick else copies_for(tensor_bytes(first), l2)
    sets = [first] + [case.inputs(Random(device, seed)) for seed in range(1, count)]
    row: dict[str, Any] = {"operator": case.operator, "shape": case.shape, "copies": count}
    sides: dict[str, Callable[[Inputs], Any]] = {
        "ours_ms": lambda given: case.ours(*given),
        "call_ms": lambda given: case.call(*given),
    }
    sample = {"ours_ms": clock.device, "call_ms": clock.call, "plain_ms": clock.device}
    if case.plain is not None:
        plain = case.plain
        sides["plain_ms"] = lambda given: plain(*given)
        if case.agree is not None:
            row["difference"] = case.agree(case.ours(*first), plain(*first))
            if not row["difference"] <= 1:
                detail = f"differs from plain torch by {row['difference']:.3g} times what is allowed"
                return row | {"state": "failed", "detail": detail}
    row |= measure(sides, sets, sample, 3 if quick else 200, 0.5 if quick else 3.0)
    times = case.amounts.times(peaks)
    bound = max(times, key=lambda name: times[name])
    ours = row["ours_ms"]["median"]
    row |= {"bytes": case.amounts.bytes, "flops": case.amounts.flops, "exps": case.amounts.exps}
    row |= {"roofline_ms": times[bound], "bound": bound, "share": times[bound] / ours if ours > 0 else None}
    return row | {"state": "passed"}


def fgvce_row(device: torch.device, clock: Clock, quick: bool) -> dict[str, Any]:
    """FG-VCE after the trunk, from the feature map to the result, as in bench_ops.py; by the host's clock."""
    import bench_ops

    import finecf

    _, reference, features = bench_ops.resnet_like()
    clf = finecf.wrap(reference.model.to(device), layer="trunk", head="fc")
    loader = [(torch.randn(61, 2048, 7, 7, generator=torch.Generator().manual_seed(1)).relu(), torch.ones(61).long())]
    bank = finecf.CandidateBank.from_loader(clf, loader, correct_only=False, keep_images=False)
    explainer = finecf.FGVCE(clf, bank, max_edits=10)
    sets = [(torch.randn(features.shape, device=device).relu(),) for _ in range(4)]
    start, stop = bank.class_range(1)
    rows = bank.rows(start, stop).to(device)
    weight, bias = clf.model.fc.weight.detach(), clf.model.fc.bias.detach()
    candidate_logits = rows @ weight.T / 49

    def plain(given: Inputs) -> int:
        with torch.device(device):
            return bench_ops.plain_fgvce(given[0], weight, bias, rows, candidate_logits, 1, 10)

    def ours(given: Inputs) -> Any:
        return explainer.explain(given[0], 1, features=given[0])

    edits = len(ours(sets[0])[0].edits)
    shape = f"2048 x 7 x 7, 200 classes, {len(rows)} candidates, 10 edits"
    row = {"operator": "FGVCE.explain, after the trunk", "shape": shape, "copies": len(sets)}
    if edits != 10:
        return row | {"state": "failed", "detail": f"{edits} edits were made, 10 were expected"}
    times = measure(
        {"ours_ms": ours, "plain_ms": plain},
        sets,
        {"ours_ms": clock.call, "plain_ms": clock.call},
        3 if quick else 50,
        1.0 if quick else 5.0,
    )
    return row | times | {"state": "passed"}


def free_bytes(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2e9


def line_of(row: dict[str, Any]) -> str:
    if row["state"] != "passed":
        return f"{row['operator']} {row['shape']}: {row['detail']}"
    ours, plain = row["ours_ms"], row.get("plain_ms")
    text = f"{row['operator']} {row['shape']}: {ours['median']:.4g} ms ({ours['q1']:.4g} to {ours['q3']:.4g})"
    if "call_ms" in row:
        text += f", called {row['call_ms']['median']:.4g}"
    if plain:
        text += f", plain torch {plain['median']:.4g} ({plain['median'] / ours['median']:.3g}x)"
    if row.get("share") is not None:
        text += f", {100 * row['share']:.2g} % of the roofline ({row['bound']})"
    return text


def run(device: torch.device, quick: bool, only: str | None, file: Path | None, seconds: float) -> int:
    """All cases, the results written after each; return how many failed."""
    began = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", DEFAULT_L2) if device.type == "cuda" else 0
    results: dict[str, Any] = {"peaks": {}, "l2_bytes": l2, "rows": [], "left_out": []}

    def flush() -> None:
        if file is not None:
            unfinished = file.with_name(file.name + ".part")
            unfinished.write_text(json.dumps(results, indent=1) + "\n")
            unfinished.replace(file)

    results["peaks"] = peaks = measure_peaks(device, clock, quick)
    print(", ".join(f"{name} {value:.4g}" for name, value in peaks.items() if value is not None), flush=True)
    flush()

    def add(name: str, shape: str, work: Callable[[], dict[str, Any]]) -> None:
        try:
            row = work()
        except Exception as error:  # one case that fails must not hide the others
            row = {"operator": name, "shape": shape, "state": "failed", "detail": f"{type(error).__name__}: {error}"}
        results["rows"].append(row)
        print(line_of(row), flush=True)
        flush()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    every = [case for name in _native.OPERATORS for case in CASES[name]() if not quick or case.quick]
    for case in sorted(every, key=lambda case: case.needs > 0):  # the large ones last, should the time run out
        if only and only not in case.operator:
            continue
        reason = None
        if case.needs > free_bytes(device):
            reason = f"needs {case.needs / 1e9:.0f} GB, {free_bytes(device) / 1e9:.0f} GB are free"
        elif time.monotonic() - began > seconds:
            reason = "the time is up"
        if reason:
            results["left_out"].append({"operator": case.operator, "shape": case.shape, "reason": reason})
            print(f"{case.operator} {case.shape}: left out, {reason}", flush=True)
            continue
        add(case.operator, case.shape, lambda case=case: run_case(case, device, clock, peaks, l2, quick))
    if not only or only in "FGVCE":
        add("FGVCE.explain, after the trunk", "", lambda: fgvce_row(device, clock, quick))
    flush()
    return sum(row["state"] != "passed" for row in results["rows"])


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time the operators against plain torch and the roofline.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats: tries the harness out")
    parser.add_argument("--only", help="operators whose name holds this")
    parser.add_argument("--json", type=Path, help="results, written after every case")
    parser.add_argument("--seconds", type=float, default=600, help="no new case is begun after this long")
    options = parser.parse_args(given)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("finecf: torch sees no CUDA device", file=sys.stderr)
        return 2
    half = _native.build_info()[options.device]
    if not half["loaded"]:
        print(f"finecf: the compiled operators for {options.device} are not loaded: {half['reason']}", file=sys.stderr)
        return 1
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # for bench_ops
    with torch.no_grad():
        return min(1, run(torch.device(options.device), options.quick, options.only, options.json, options.seconds))


if __name__ == "__main__":
    sys.exit(main())
