"""Many forwards of one model: a copy made fast, and the micro-batch that this machine runs it best with."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from finecf.models.classifier import Classifier
from finecf.models.fold import tolerance
from finecf.models.layers import input_gradients, plain_eval

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRIED_SIZES = {"cpu": (4, 8, 16, 32, 64), "cuda": (32, 64, 128, 256, 512)}
_WORTH_MORE_MEMORY = 0.97
"""A larger micro-batch is taken where it needs less than this share of the time per image."""


class Runner:
    """Runs a copy of a classifier's model in eval mode; the user's own model is never changed.

    There are no gradients but in `frozen`. In the copy, batch norms are folded into the convolutions before them, and
    on request tensors lie channels last and numbers are of half precision.

    Args:
        classifier: what `finecf.wrap` returned.
        precision: "float32" (the model's own precision), "bfloat16" or "float16".
        channels_last: whether images and weights lie channels last.
        fold_batch_norm: whether batch norms are folded.
        compiled: whether the copy goes through torch.compile.

    Attributes:
        notes: what was not possible, in sentences.
        folded: number of batch norms that were folded.
        error: largest difference seen between the copy's logits and the model's own; None before `verify`.
    """

    def __init__(
        self,
        classifier: Classifier,
        precision: str = "float32",
        channels_last: bool = False,
        fold_batch_norm: bool = True,
        compiled: bool = False,
    ) -> None:
        self.classifier = classifier
        self.channels_last = channels_last
        self.notes: list[str] = []
        self.folded = 0
        self.error: float | None = None
        self.fingerprint = classifier.fingerprint()
        self._dtype = classifier.dtype if precision == "float32" else PRECISIONS[precision]
        changes = fold_batch_norm or channels_last or self._dtype != classifier.dtype
        self._plain = self._copy(fold_batch_norm) if changes else classifier.model
        self._run: Callable[[Tensor], object] = torch.compile(self._plain, dynamic=True) if compiled else self._plain

    def _copy(self, fold_batch_norm: bool) -> nn.Module:
        try:
            model = copy.deepcopy(self.classifier.model)
        except Exception as error:
            self.notes.append(f"the model cannot be copied ({error}): it runs as it is, without folded batch norms")
            self.channels_last = False
            self._dtype = self.classifier.dtype
            return self.classifier.model
        model.eval()
        if fold_batch_norm:
            self.folded = _fold_batch_norms(model, self.classifier.layer_name)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        return model.to(self._dtype) if self._dtype != self.classifier.dtype else model

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B,C] of prepared images [B,Ch,H,W], float32 or the model's float64."""
        with plain_eval(self._plain, x.device.type):
            return self.classifier.logits_of(self._run(self._own(x)))

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B,C], and the mean [B,D] over the cells of the wrapped layer's map."""
        return self._hooked(x, lambda maps: maps.mean((2, 3)))

    def with_maps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B,C], and the wrapped layer's map [B,D,H,W]."""
        return self._hooked(x, torch.clone)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The copy in eval mode, with gradients on and none for its weights: for `with_graph`."""
        with plain_eval(self._plain, self.classifier.device.type), input_gradients(self._plain):
            yield

    @property
    def model(self) -> nn.Module:
        """The copy, not compiled; the user's model where it could not be copied."""
        return self._plain

    def _own(self, x: Tensor) -> Tensor:
        """Images for the copy: of its precision, and its own, since a model may work in place."""
        return x.to(self._dtype, copy=True)

    def with_graph(self, x: Tensor) -> Tensor:
        """Logits [B,C] with their graph, inside `frozen`."""
        return self.classifier.logits_of(self._plain(self._own(x)))

    def _hooked(self, x: Tensor, take: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, and what `take` gives of the map: at once, since layers behind may work in place."""
        taken: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: object) -> None:
            taken.append(take(self.classifier.map_of(output, x.shape[2:])))

        with plain_eval(self._plain, x.device.type):
            handle = self._plain.get_submodule(self.classifier.layer_name).register_forward_hook(keep)
            try:
                logits = self.classifier.logits_of(self._plain(self._own(x)))
            finally:
                handle.remove()
        return logits, taken[0]

    def verify(self, x: Tensor) -> None:
        """Compare the copy with the model itself on images [B,Ch,H,W]; a fold that changed the logits is undone."""
        if self._plain is self.classifier.model:
            self.error = 0.0
            return
        own = self.classifier.logits(x)
        self.error = float((self(self.layout(x)) - own).abs().max())
        if self._dtype == self.classifier.dtype and not self.error <= tolerance(self._dtype, own):
            self.notes.append(
                f"folding batch norms changed the logits by {self.error:.1e} (something else reads what the norms or "
                "their convolutions give): the copy keeps its batch norms"
            )
            self._run = self._plain = self._copy(fold_batch_norm=False)
            self.folded = 0
            self.error = float((self(self.layout(x)) - own).abs().max())

    def image_bytes(self, image: Tensor) -> int:
        """Bytes that one more image [Ch,H,W] in a micro-batch costs: its largest layer's input and output, twice."""
        most = image.numel() * image.element_size()

        def weigh(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            nonlocal most
            tensors = [each for each in (*inputs, output) if isinstance(each, Tensor)]
            most = max(most, sum(each.numel() * each.element_size() for each in tensors))

        leaves = [module for module in self._plain.modules() if not list(module.children())]
        handles = [module.register_forward_hook(weigh) for module in leaves]
        try:
            with plain_eval(self._plain, image.device.type):
                self._plain(self._own(image[None]))
        finally:
            for handle in handles:
                handle.remove()
        return 2 * most

    def best_micro_batch(self, image: Tensor, budget: int, most: int, sizes: Sequence[int] | None = None) -> int:
        """The number of images to run at a time, found by timing; within `budget` bytes and at most `most`."""
        affordable = max(1, min(most, budget // max(1, self.image_bytes(image))))
        sizes = sizes or _TRIED_SIZES.get(image.device.type, _TRIED_SIZES["cpu"])
        tried = [size for size in sizes if size <= affordable] or [affordable]
        best, least = tried[0], math.inf
        for size in tried:
            batch = self.layout(image.expand(size, -1, -1, -1).clone())
            seconds = self._seconds(batch) / size
            if seconds < least * _WORTH_MORE_MEMORY:
                best, least = size, seconds
            elif seconds > 1.5 * least:  # it only gets worse from here on
                break
        return best

    def layout(self, images: Tensor) -> Tensor:
        """The images in the layout that the copy wants."""
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images.contiguous()

    def _seconds(self, batch: Tensor) -> float:
        """The shorter of two forwards, in seconds, after one to warm up."""
        times = []
        for _ in range(3):
            if self.classifier.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            self(batch)
            if self.classifier.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])


def _fold_batch_norms(model: nn.Module, layer: str) -> int:
    """Fold every batch norm of `model` that follows one convolution and nothing else reads; return how many.

    The graph is only read, so that names and hooks stay. `layer` must keep its own output.
    """
    folded = 0
    for convolution, norm in _pairs(model):
        if convolution == layer:
            continue
        first, second = model.get_submodule(convolution), model.get_submodule(norm)
        assert isinstance(first, _CONVOLUTIONS)
        assert isinstance(second, _NORMS)
        if second.running_mean is None or second.running_var is None:
            continue
        precision = first.weight.dtype
        fused = fuse_conv_bn_eval(first.double(), second.double()).to(precision)
        _replace(model, convolution, fused)
        _replace(model, norm, nn.Identity())
        folded += 1
    return folded


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and of the batch norms right behind them, both run once in a forward."""
    modules = dict(model.named_modules())
    try:
        nodes = [node for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    except Exception:  # a forward that cannot be traced: neighbours in a Sequential are all that is certain
        return [
            (f"{prefix}{one}", f"{prefix}{two}")
            for name, module in modules.items()
            if isinstance(module, nn.Sequential)
            for prefix in [f"{name}." if name else ""]
            for (one, first), (two, second) in zip(
                list(module.named_children())[:-1], list(module.named_children())[1:], strict=True
            )
            if isinstance(first, _CONVOLUTIONS) and isinstance(second, _NORMS)
        ]
    often = Counter(str(node.target) for node in nodes)
    return [
        (str(before.target), str(node.target))
        for node in nodes
        for before in node.all_input_nodes[:1]
        if before.op == "call_module"
        and len(before.users) == 1
        and isinstance(modules[str(node.target)], _NORMS)
        and isinstance(modules[str(before.target)], _CONVOLUTIONS)
        and often[str(node.target)] == often[str(before.target)] == 1
    ]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
