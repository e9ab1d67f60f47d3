"""The operators against plain torch, and against what the machine can do, measured in turn in one run.

    python -m pytest benchmarks/bench_ops.py                     # two threads for both sides
    FINECF_BENCH_THREADS=1 python -m pytest benchmarks/bench_ops.py
    FINECF_BENCH_BIG=1 python -m pytest benchmarks/bench_ops.py -k all_classes      # a bank of 2.4 GB on disk

pytest-benchmark prints the times of ours; the table at the end holds the ratios. All sides of a duel take turns in one
loop, warm, and the ratio is that of the medians. A "limit" is what the same machine needs, in the same run, for the
part that cannot be left out: the matrix products, or as many exponentials.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import finecf
from finecf import _native, ops
from finecf.reference import replacement as plain_replacement

Work = Callable[[], Any]
THREADS = int(os.environ.get("FINECF_BENCH_THREADS", torch.get_num_threads()))
ROUNDS = int(os.environ.get("FINECF_BENCH_ROUNDS", 40))
_table: list[str] = []


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    where = f"{THREADS} thread(s), {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    print("\n\n" + "\n".join([f"ratios on {where}", *_table]))


def duel(benchmark: Any, name: str, ours: Work, others: dict[str, Work], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians in milliseconds of ours and of the others, taken in turn; prints how they stand to each other."""
    sides = {"finecf": ours, **others}
    for work in sides.values():
        work()
        work()
    times: dict[str, list[float]] = {side: [] for side in sides}
    gc.collect()
    gc.disable()  # as timeit does: a collection walks all that pytest holds, on whoever's time it falls
    try:
        for _ in range(rounds):
            for side, work in sides.items():
                start = time.perf_counter()
                work()
                times[side].append(1e3 * (time.perf_counter() - start))
    finally:
        gc.enable()
    medians = {side: statistics.median(own) for side, own in times.items()}
    parts = [f"{side} {ms:.2f} ms ({ms / medians['finecf']:.2f}x)" for side, ms in medians.items() if side != "finecf"]
    _table.append(f"{name}: finecf {medians['finecf']:.3f} ms; " + ", ".join(parts))
    benchmark.extra_info.update({f"ms {side}": round(ms, 4) for side, ms in medians.items()})
    benchmark.pedantic(ours, rounds=max(3, rounds // 4))
    return medians


def levels() -> list[str]:
    """The instruction sets of this machine, or one entry for the plain-torch backend."""
    return list(_native.cpu_isa_levels()) or ["reference"]


@pytest.fixture(params=levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.cpu_isa()
    if before is not None:
        _native.set_cpu_isa(request.param)
    yield request.param
    if before is not None:
        _native.set_cpu_isa(before)


# ---- shapley --------------------------------------------------------------------------------------------------------


def folded_permutation_shapley(cell_logits: Tensor, base: Tensor, orders: Tensor, target: int) -> Tensor:
    """Plain torch on folded logits: gather the cells in order, prefix sums, softmax, differences."""
    steps = torch.cat([base.expand(len(orders), 1, -1), cell_logits[orders]], dim=1).cumsum(1)
    values = steps.softmax(-1)[..., target]
    marginals = torch.zeros(len(orders), cell_logits.shape[0])
    return marginals.scatter_(1, orders, values.diff(dim=1)).mean(0)


def test_permutation_shapley(benchmark: Any, isa: str) -> None:
    cells, classes, count = 196, 200, 100
    cell_logits, base = torch.randn(1, cells, classes) * 0.2, torch.randn(1, classes)
    orders = torch.stack([torch.randperm(cells) for _ in range(count)])
    target = torch.tensor([7])
    few = orders.int()
    found = ops.permutation_shapley(cell_logits, base, few, target, antithetic=False).mean[0]
    torch.testing.assert_close(found, folded_permutation_shapley(cell_logits[0], base, orders, 7), atol=1e-6, rtol=1e-4)
    buffer = torch.randn(4096)  # fits the first-level cache, so that the limit is arithmetic, not memory
    out = torch.empty_like(buffer)

    def exponentials() -> None:
        for _ in range(cells * classes * count // len(buffer)):
            torch.exp(buffer, out=out)

    duel(
        benchmark,
        f"permutation_shapley {count} x {cells} cells x {classes} classes [{isa}]",
        lambda: ops.permutation_shapley(cell_logits, base, few, target, antithetic=False),
        {
            "plain torch, folded": lambda: folded_permutation_shapley(cell_logits[0], base, orders, 7),
            "torch.exp as often": exponentials,
        },
    )


def test_masked_class_scores(benchmark: Any, isa: str) -> None:
    cells, classes, count, images = 49, 200, 50, 32
    cell_logits, base = torch.randn(images, cells, classes) * 0.3, torch.randn(images, classes)
    masks, target = torch.rand(count, cells), torch.randint(classes, (images,))

    def plain() -> Tensor:
        logits = base[:, None] + masks @ cell_logits
        return logits.softmax(-1).gather(2, target[:, None, None].expand(-1, count, 1))

    torch.testing.assert_close(ops.masked_class_scores(cell_logits, base, masks, target), plain()[..., 0])
    duel(
        benchmark,
        f"masked_class_scores {images} images x {count} masks x {cells} cells x {classes} classes [{isa}]",
        lambda: ops.masked_class_scores(cell_logits, base, masks, target),
        {"plain torch, folded": plain, "bare product": lambda: masks @ cell_logits},
    )


# ---- replacement ----------------------------------------------------------------------------------------------------


def search_problem(cells: int = 49, candidates: int = 3000, classes: int = 200) -> tuple[Any, ...]:
    """A search that no edit ends: class 5 stays far above the target."""
    cell_logits, candidate_logits = torch.randn(1, cells, classes) * 0.3, torch.randn(candidates, classes) * 0.3
    base = torch.randn(1, classes)
    base[:, 5] += 60
    similarity = torch.rand(1, cells, candidates)
    everything = torch.tensor([[0, candidates]])
    return cell_logits, candidate_logits, similarity, base, torch.tensor([3]), torch.rand(1, cells), everything, None


def test_replace_until_flip(benchmark: Any, isa: str) -> None:
    cells, candidates, classes, edits = 49, 3000, 200, 10
    problem = search_problem(cells, candidates, classes)
    rest = (cells, edits, False, 1.0, 1.0)
    ours, factorised = ops.replace_until_flip(*problem, *rest), plain_replacement.replace_until_flip_factorised
    torch.testing.assert_close(ours.losses, factorised(*problem, *rest)[2], atol=1e-4, rtol=1e-5)
    left, right = torch.rand(cells, classes), torch.rand(classes, candidates)

    def products() -> None:
        for _ in range(edits):
            left @ right

    name = f"replace_until_flip {cells} cells x {candidates} candidates x {classes} classes, {edits} edits [{isa}]"
    duel(
        benchmark,
        name,
        lambda: ops.replace_until_flip(*problem, *rest),
        {"factorised plain torch": lambda: factorised(*problem, *rest), "bare products": products},
    )


def test_replace_until_flip_direct_form(benchmark: Any) -> None:
    problem, rest = search_problem(), (49, 10, False, 1.0, 1.0)
    duel(
        benchmark,
        "the same against the direct form (shown, not claimed)",
        lambda: ops.replace_until_flip(*problem, *rest),
        {"direct plain torch": lambda: plain_replacement.replace_until_flip(*problem, *rest)},
        rounds=3,
    )


def test_nearest_candidates(benchmark: Any, isa: str) -> None:
    query, bank, k = torch.randn(49, 2048), torch.randn(3000, 2048), 20
    duel(
        benchmark,
        f"nearest_candidates 49 x 3000 x 2048, k = {k} [{isa}]",
        lambda: ops.nearest_candidates(query, bank, k),
        {
            "plain torch": lambda: (torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(bank).T).topk(
                k
            ),
            "bare product": lambda: query @ bank.T,
        },
    )


# ---- FG-VCE, after the trunk ----------------------------------------------------------------------------------------


class Pooled(torch.nn.Module):
    """A classifier whose trunk gives its input back: what is left is the head of a ResNet."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.trunk = torch.nn.Identity()
        self.fc = torch.nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).mean((2, 3)))


def resnet_like(width: int = 2048, classes: int = 200) -> tuple[finecf.CandidateBank, Any, Tensor]:
    """Bank of 3,000 cells of class 1 (61 images), classifier, and a feature map that ten edits do not flip."""
    torch.manual_seed(0)  # the same weights in every process: a bank belongs to the classifier that it was built with
    model = Pooled(width, classes).eval()
    with torch.no_grad():
        model.fc.weight.mul_(8)
        model.fc.bias.zero_()
        model.fc.bias[0], model.fc.bias[1] = 30.0, -30.0
    clf = finecf.wrap(model, layer="trunk", head="fc")
    references = torch.randn(61, width, 7, 7).relu()
    loader = [(references, torch.ones(61, dtype=torch.long))]
    bank = finecf.CandidateBank.from_loader(clf, loader, correct_only=False, keep_images=False)
    return bank, clf, torch.randn(1, width, 7, 7).relu()


def plain_fgvce(
    features: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, candidate_logits: Tensor, target: int, edits: int
) -> int:
    """The same algebra in plain torch: fold, Gaussian map, similarity, and a factorised product an edit (20 cells)."""
    cells = features[0].flatten(1).T
    count = len(cells)
    cell_logits = cells @ weight.T / count
    logits = cell_logits.sum(0) + bias
    predicted = int(logits.argmax())
    side = torch.arange(7.0)
    at = torch.cartesian_prod(side, side)
    masks = 1 - torch.exp(-torch.cdist(at, at).square() / (2 * 0.8**2))
    scores = logits.softmax(0)[predicted] - (masks @ cell_logits + bias).softmax(1)[:, predicted]
    similarity = torch.nn.functional.normalize(cells) @ rows.T / rows.norm(dim=1)
    top = candidate_logits.amax(1)
    exponentials = (candidate_logits - top[:, None]).exp()
    order = scores.argsort(descending=True).tolist()
    done = 0
    while done < edits and int(logits.argmax()) != target:
        at20 = torch.tensor(order[:20])
        rest = logits - cell_logits[at20]
        peak = rest.amax(1, keepdim=True)
        sums = (rest - peak).exp() @ exponentials.T
        loss = 1 - similarity[at20] + peak + top + sums.log() - rest[:, target, None] - candidate_logits[:, target]
        cell, row = divmod(int(loss.argmin()), len(rows))
        logits = rest[cell] + candidate_logits[row]
        order.remove(int(at20[cell]))
        done += 1
    return done


def test_fgvce_after_the_trunk(benchmark: Any) -> None:
    """Contribution map and whole search of ten edits on a 2048 x 7 x 7 map, with nothing of the figure."""
    bank, clf, features = resnet_like()
    explainer = finecf.FGVCE(clf, bank, max_edits=10)
    assert len(explainer.explain(features, 1, features=features)[0].edits) == 10
    start, stop = bank.class_range(1)
    rows = bank.rows(start, stop)
    weight, bias = clf.model.fc.weight.detach(), clf.model.fc.bias.detach()
    candidate_logits = rows @ weight.T / 49
    cells = features[0].flatten(1).T.contiguous()
    left, right = torch.rand(49, 200), torch.rand(200, len(rows))

    def products() -> None:
        cells @ rows.T
        for _ in range(10):
            left @ right

    duel(
        benchmark,
        f"FG-VCE after the trunk, 2048 x 7 x 7, 200 classes, {len(rows)} candidates, 10 edits",
        lambda: explainer.explain(features, 1, features=features),
        {
            "plain torch, same algebra": lambda: plain_fgvce(features, weight, bias, rows, candidate_logits, 1, 10),
            "bare products (49 cells)": products,
        },
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    explainer.explain(features, 1, features=features)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    _table.append(f"  peak memory grew by {grown:.0f} MB in one more explanation")


@pytest.mark.skipif(not os.environ.get("FINECF_BENCH_BIG"), reason="writes 2.4 GB; set FINECF_BENCH_BIG=1")
def test_all_classes_within_memory(tmp_path: Any) -> None:
    """One image against every cell of a bank of 577,612 x 2048 in float16: the peak of the process."""
    script = textwrap.dedent(
        """
        import resource, sys, time, torch, finecf
        sys.path.insert(0, sys.argv[2])
        import bench_ops
        _, clf, features = bench_ops.resnet_like()
        bank = finecf.CandidateBank.load(sys.argv[1])
        explainer = finecf.FGVCE(clf, bank, max_edits=10, candidate_classes="all")
        start = time.perf_counter()
        found = explainer.explain(features, 1, features=features)[0]
        print(f"{len(found.edits)} edits, {time.perf_counter() - start:.1f} s, "
              f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
        """
    )
    path = tmp_path / "bank.safetensors"
    write_big_bank(path)
    command = [sys.executable, "-c", script, str(path), os.path.dirname(__file__)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    _table.append(f"FG-VCE, candidate_classes='all', 577,612 x 2048 float16: {result.stdout.strip()}")
    assert float(result.stdout.split("peak ")[1].split(" ")[0]) < 2.0


def write_big_bank(path: Any) -> None:
    """A bank of the size of all of CUB: 11,788 images of 49 cells, random float16 features, 200 classes."""
    images, width, classes = 11_788, 2048, 200
    _, clf, _ = resnet_like(width, classes)
    labels = torch.arange(images) % classes
    batches = ((torch.randn(49, width, 7, 7).relu(), labels[i : i + 49]) for i in range(0, images, 49))
    loader = ((x[: len(y)], y) for x, y in batches)
    bank = finecf.CandidateBank.from_loader(
        clf, loader, correct_only=False, keep_images=False, dtype=torch.float16, path=path
    )
    bank.save(path)
