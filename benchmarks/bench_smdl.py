"""SMDL: time beside the model's forward, against the bare forwards of the same images and against a slow transcription.

    python benchmarks/bench_smdl.py [--threads N] [--repeats N] [--no-peer] [--memory] [--markdown FILE]

Every side of a comparison is warm and they take turns, so that a busy machine slows both. `--memory` measures instead
how much memory a ranking of 200 regions of a 512 x 512 image by a ResNet-101 takes beside the model, in a process of
its own.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import rich
import torch
from torch import Tensor, nn

import finecf
from finecf.data import SyntheticBirds
from finecf.explainers._memory import graph_bytes
from finecf.metrics.tables import Table
from finecf.models.runner import Runner
from finecf.training import load_birds_net

REGIONS = 49


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(name: str, model: nn.Module, image: Tensor, repeats: int, table: Table, peer: bool) -> None:
    """One row: a whole explanation, the bare forwards of as many images, and the transcription."""
    clf = finecf.wrap(model)
    labels = finecf.regions.slico(image, REGIONS)
    explainer = finecf.SMDL(clf)
    explainer.explain(image, regions=labels)  # warm; also chooses the micro-batch
    runner = explainer._runner
    assert runner is not None
    size = explainer._micro_batch(runner, image)
    batch = runner.layout(image.expand(size, -1, -1, -1).clone())
    whole, outside, bare, bare_as_given, slow, slico = [], [], [], [], [], []
    result = explainer.explain(image, regions=labels)[0]
    for _ in range(repeats):
        timer = Stopwatch(runner)
        with timer:
            whole.append(seconds(lambda: explainer.explain(image, regions=labels)))
        outside.append(1 - timer.seconds / whole[-1])
        rounds = -(-result.evaluations // size)
        bare.append(
            seconds(lambda rounds=rounds: [runner(batch) for _ in range(rounds)]) * result.evaluations / (rounds * size)
        )
        few = max(1, rounds // 8)
        own = batch.contiguous()
        as_given = seconds(lambda own=own, few=few: [clf.logits(own) for _ in range(few)])
        bare_as_given.append(as_given * result.evaluations / (few * size))
        slico.append(seconds(lambda: finecf.regions.slico(image, REGIONS)))
        if peer:
            slow.append(transcription(clf, image, labels, result))
    row: dict[str, Any] = {
        "images": result.evaluations,
        "micro-batch": size,
        "seconds": median(whole),
        "outside the forward": median(outside),
        "to bare forwards": median(a / b for a, b in zip(whole, bare, strict=True)),
        "to bare, model as given": median(a / b for a, b in zip(whole, bare_as_given, strict=True)),
        "with SLICO": median((a + c) / b for a, b, c in zip(whole, bare, slico, strict=True)),
    }
    if peer:
        row["transcription to ours"] = median(b / a for a, b in zip(whole, slow, strict=True))
    table.rows[name] = row


class Stopwatch:
    """While entered, measures the time inside the forwards of a runner."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.seconds = runner, 0.0

    def __enter__(self) -> Stopwatch:
        self._handles = [
            self.runner._plain.register_forward_pre_hook(self._start),
            self.runner._plain.register_forward_hook(self._stop),
        ]
        return self

    def _start(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def transcription(clf: Any, image: Tensor, labels: Tensor, result: Any) -> float:
    """Seconds that the slow transcription needs for the same ranking (scaled up from its first few steps)."""
    from smdl_transcription import seconds_of_greedy

    return seconds_of_greedy(clf, image, labels, result)


def memory(budget: int) -> None:
    """Peak memory of a ranking's first steps beside the model and what one forward needs."""
    import torchvision

    model = torchvision.models.resnet101(weights=None).eval()
    image = torch.rand(3, 512, 512)
    clf = finecf.wrap(model)
    labels = finecf.regions.grid(512, 512, 200)
    clf.logits(image[None])
    explainer = finecf.SMDL(clf, region_count=200, memory_budget=budget, max_regions=1)
    explainer._ready(image[None])  # the copy of the model
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    result = explainer.explain(image, regions=labels)[0]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    rich.print(
        f"ResNet-101, {result.region_count} regions of 512 x 512, budget {budget >> 20} MiB: peak grew by "
        f"{grown:.0f} MiB; {result.evaluations} images in {time.perf_counter() - started:.0f} s, micro-batch "
        f"{result.versions['micro_batch']}; {result.region_count} full images would be "
        f"{result.region_count * image.numel() * 4 >> 20} MiB"
    )
    graph(explainer._ready(image[None]), image)


def graph(runner: Runner, image: Tensor) -> None:
    """What a gradient of the window search holds and takes."""
    seconds: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(3):
        with runner.frozen():
            x = image[None].clone().requires_grad_()
            started = time.perf_counter()
            with graph_bytes(runner.model) as held:
                logits = runner.with_graph(x)
            seconds["forward"].append(time.perf_counter() - started)
            started = time.perf_counter()
            torch.autograd.grad(logits.sum(), x)
            seconds["backward"].append(time.perf_counter() - started)
    rich.print(
        f"one image's graph holds {sum(held.values()) >> 20} MiB; a backward takes "
        f"{min(seconds['backward']) / min(seconds['forward']):.2f} times as long as a forward"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave the slow transcription out")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--budget", type=int, default=256 << 20, help="bytes, for --memory")
    parser.add_argument("--models", nargs="*", default=["birds", "resnet18"])
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(Path(__file__).parent))
    if arguments.memory:
        memory(arguments.budget)
        return
    table = Table(f"SMDL, greedy, {REGIONS} regions, {arguments.threads} threads", [])
    table.columns = [
        "images",
        "micro-batch",
        "seconds",
        "outside the forward",
        "to bare forwards",
        "to bare, model as given",
        "with SLICO",
        "transcription to ours",
    ]
    if "birds" in arguments.models:
        net, _ = load_birds_net()
        image = SyntheticBirds("test", n=1).tensors()[0][0]
        compare("shipped birds net, 128", net, image, arguments.repeats, table, not arguments.no_peer)
    if "resnet18" in arguments.models:
        import torchvision

        torch.manual_seed(0)
        model = torchvision.models.resnet18(weights=None).eval()
        repeats = max(1, arguments.repeats // 2)
        compare("ResNet-18, 224", model, torch.rand(3, 224, 224), repeats, table, not arguments.no_peer)
    rich.print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table.markdown())


if __name__ == "__main__":
    main()
