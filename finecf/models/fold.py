"""Head folding: what each cell of the map adds to the logits, or to the first linear layer's output.

For global average pooling + Linear, cell p adds `L_p = (W f_p) / P` and `logits = b + sum_p L_p` exactly. Where more
layers follow (VGG, MobileNetV3) the same holds for the first linear layer's pre-activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from finecf.models.tail import Tail

# Largest difference allowed between the folded head and the real one, as a share of the largest logit (at least 1).
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_PROBE_BYTES = 32 << 20


def tolerance(dtype: torch.dtype, reference: Tensor) -> float:
    """Difference from `reference` that rounding in `dtype` explains, with room to spare."""
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    return _TOLERANCE[dtype] * max(1.0, scale)


@dataclass(frozen=True, eq=False)
class HeadFold:
    """A head as sums over the cells of a map.

    Attributes:
        kind: `linear` (cells add to the logits) or `first_linear` (cells add to the first linear layer's output).
        weight: [C,D] for `linear`; for `first_linear` the layer's own weight [Hd,D*Q], Q pooled cells.
        bias: [C] or [Hd].
        max_error: largest difference from the real head on the features that `Classifier.fold` was given.
        cells: P, the cells of the map the fold was made for.
        pooling: [Q,P] for `first_linear`: what cell p adds to pooled cell q; None for `linear`, where it is 1/P.
    """

    kind: str
    weight: Tensor
    bias: Tensor
    max_error: float
    cells: int
    pooling: Tensor | None = None
    _tail: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def cell_logits(self, features: Tensor) -> Tensor:
        """What each cell adds to the logits: [B,D,H,W] -> [B,P,C], already divided by P. `linear` only."""
        self._require("linear", "cell_logits")
        cells = features.to(self.weight.dtype).flatten(2)
        # D x P times C x D from the left keeps both operands as they lie in memory; only the small result is turned.
        return torch.matmul(self.weight, cells).div_(self.cells).transpose(1, 2).contiguous()

    def base_logits(self, batch: int) -> Tensor:
        """The logits of a map of zeros, [batch,C]."""
        if self.kind == "linear":
            return self.bias.expand(batch, -1).clone()
        return self.tail(self.bias.expand(batch, -1))

    def candidate_logits(self, rows: Tensor, cells: int | None = None) -> Tensor:
        """What bank rows [N,D] would add to the logits in place of a cell: [N,C], divided by `cells`. `linear` only."""
        self._require("linear", "candidate_logits")
        return torch.matmul(rows.to(self.weight.dtype), self.weight.T).div_(cells or self.cells)

    def cell_preactivations(self, features: Tensor) -> Tensor:
        """What each cell adds to the first linear layer's output: [B,D,H,W] -> [B,P,Hd]. `first_linear` only."""
        self._require("first_linear", "cell_preactivations")
        cells = features.to(self.weight.dtype).flatten(2)
        out = cells.new_empty(cells.shape[0], self.cells, self.weight.shape[0])
        for cell in range(self.cells):
            torch.matmul(cells[:, :, cell], self._cell_weight(cell).T, out=out[:, cell])
        return out

    def candidate_preactivations(self, rows: Tensor, cell_index: int | Tensor) -> Tensor:
        """What bank rows [N,D] would add in place of a cell, [N,Hd]; `cell_index`: one cell, or one per row [N]."""
        self._require("first_linear", "candidate_preactivations")
        rows = rows.to(self.weight.dtype)
        if isinstance(cell_index, int):
            return torch.matmul(rows, self._cell_weight(cell_index).T)
        out = rows.new_empty(rows.shape[0], self.weight.shape[0])
        for cell in cell_index.unique().tolist():
            chosen = cell_index == cell
            out[chosen] = torch.matmul(rows[chosen], self._cell_weight(int(cell)).T)
        return out

    def tail(self, preactivations: Tensor) -> Tensor:
        """Logits [B,C] of the first linear layer's output [B,Hd] (`bias` plus the cells' sum). `first_linear` only."""
        self._require("first_linear", "tail")
        assert self._tail is not None
        return self._tail(preactivations)

    def _cell_weight(self, cell: int) -> Tensor:
        """The first linear layer's weight as one cell's channels meet it, [Hd,D]."""
        assert self.pooling is not None
        weights = self.pooling[:, cell]
        blocks = self.weight.unflatten(1, (-1, weights.numel()))
        used = weights.nonzero().flatten().tolist()
        if len(used) == 1:
            block = blocks[:, :, used[0]]
            return block if float(weights[used[0]]) == 1.0 else block * weights[used[0]]
        return torch.matmul(blocks, weights)

    def _require(self, kind: str, what: str) -> None:
        if self.kind != kind:
            raise ValueError(f"{what} needs a fold of kind {kind!r}; this one is {self.kind!r}")


class _InputSeen(Exception):
    """Ends a forward once the first linear layer's input is known."""


class HeadFolder:
    """Looks at a tail, decides how it folds, and remembers it by the grid of the map.

    Args:
        model: the model.
        head: name of the module in which the first linear layer is sought; anywhere behind the layer when None.
        run: features [B,D,H,W] -> logits [B,C] through the real head.
        finish: a layer's name and its output -> logits [B,C] through the layers behind it.
        tail_of: the tail behind a layer.
        dtype: in which the model computes; it sets the tolerance of the checks.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str | None,
        run: Callable[[Tensor], Tensor],
        finish: Callable[[str, Tensor], Tensor],
        tail_of: Callable[[str], Tail],
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._head = head
        self._run = run
        self._finish = finish
        self._tail_of = tail_of
        self._dtype = dtype
        self._plans: dict[tuple[int, ...], tuple[str, str, Tensor | None]] = {}

    def fold(self, features: Tensor) -> tuple[HeadFold | None, str]:
        """The fold for maps like `features` [B,D,H,W], checked on them, and the reason in words."""
        grid = tuple(features.shape[1:])
        if grid not in self._plans:
            self._plans[grid] = self._plan(features)
        kind, subject, pooling = self._plans[grid]
        if kind == "none":
            return None, subject
        fold = self._build(kind, subject, pooling, features)
        probe = torch.cat([features, _mixed(features[:1])])
        want = self._run(probe)
        got = _folded_logits(fold, probe)
        error = float((got - want).abs().max())
        if not error <= tolerance(self._dtype, want):
            return None, (
                f"none: the head behind {subject!r} is not a function of a sum over cells "
                f"(the fold differs from the real head by {error:.2g})"
            )
        fold = replace(fold, max_error=error)
        where = f"average pooling and {subject!r}" if kind == "linear" else f"a sum over cells up to {subject!r}"
        return fold, f"{kind}: {where} (largest difference from the real head {error:.1e})"

    def _build(self, kind: str, name: str, pooling: Tensor | None, features: Tensor) -> HeadFold:
        weight, bias = _weight_and_bias(self._model.get_submodule(name))
        dtype = features.dtype
        weight, bias = weight.to(dtype), bias.to(dtype)
        cells = features.shape[2] * features.shape[3]
        if kind == "linear":
            return HeadFold("linear", weight, bias, 0.0, cells)
        return HeadFold(
            "first_linear", weight, bias, 0.0, cells, pooling, lambda preactivations: self._finish(name, preactivations)
        )

    def _plan(self, features: Tensor) -> tuple[str, str, Tensor | None]:
        """(kind, name of the linear layer, pooling), or ("none", reason, None)."""
        # At a scale of one, so that a head is not taken for a sum because the cells hardly count beside its bias.
        scale = float(features.abs().mean())
        features = features / scale if scale > 0 else features
        name, value = self._first_linear(features)
        if name is None:
            within = f" in {self._head!r}" if self._head else ""
            return "none", f"none: no linear layer was called{within} behind the map", None
        probe = torch.cat([features[:1], _mixed(features[:1])])
        logits = self._run(probe)
        weight, _ = _weight_and_bias(self._model.get_submodule(name))
        if weight.shape == (logits.shape[1], features.shape[1]):
            fold = self._build("linear", name, None, features)
            if self._agrees(_folded_logits(fold, probe), logits):
                return "linear", name, None
        pooling = self._pooling(features, value)
        if pooling is None:
            return "none", f"none: the input of {name!r} is not a fixed weighted sum of the cells", None
        rest = self._tail_of(name)
        if not rest.traced:
            return "none", f"none: the layers behind {name!r} cannot be run alone: {rest.reason}", None
        if rest.needs_image:
            return "none", f"none: the layers behind {name!r} read the image's shape", None
        return "first_linear", name, pooling

    def _agrees(self, got: Tensor, want: Tensor) -> bool:
        return float((got - want).abs().max()) <= tolerance(self._dtype, want)

    def _first_linear(self, features: Tensor) -> tuple[str | None, Tensor]:
        """Name and input of the first linear layer that a forward of the head calls."""
        seen: list[tuple[str, Tensor]] = []

        def note(name: str, inputs: tuple[Tensor, ...]) -> None:
            seen.append((name, inputs[0].detach().to(features.dtype).clone()))
            raise _InputSeen

        handles = []
        prefix = f"{self._head}." if self._head else ""
        try:
            for name, module in self._model.named_modules():
                if _is_linear(module) and (name == self._head or name.startswith(prefix)):
                    handles.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args)))  # type: ignore[misc]
            self._run(features)
        except _InputSeen:
            return seen[0]
        finally:
            for handle in handles:
                handle.remove()
        return None, features

    def _pooling(self, features: Tensor, value: Tensor) -> Tensor | None:
        """What a cell adds to each pooled cell, [Q,P], if `value` is such a sum over the cells of `features`; else None.

        It is seen by lighting the cells one at a time, in all channels at once.
        """
        _, channels, height, width = features.shape
        cells = height * width
        if value.shape[0] != features.shape[0] or value[0].numel() != value.shape[1] or value.shape[1] % channels:
            return None
        if bool(self._first_linear(torch.zeros_like(features[:1]))[1].any()):
            return None
        columns = []
        step = max(1, _PROBE_BYTES // (channels * cells * features.element_size()))
        for lit in torch.eye(cells, dtype=features.dtype, device=features.device).split(step):
            maps = lit.view(-1, 1, height, width).expand(-1, channels, -1, -1)
            seen = self._first_linear(maps)[1].view(len(lit), channels, -1)
            columns.append(seen[:, 0])
        pooling = torch.cat(columns).T.contiguous()
        expected = torch.einsum("qp,bdp->bdq", pooling, features.flatten(2))
        return pooling if self._agrees(expected.flatten(1), value.flatten(1)) else None


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1 and module.stride == (1, 1)
    return isinstance(module, nn.Linear)


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor]:
    weight = module.weight.detach()
    assert isinstance(weight, Tensor)
    weight = weight.flatten(1)
    bias = module.bias
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()  # type: ignore[operator]


def _folded_logits(fold: HeadFold, features: Tensor) -> Tensor:
    if fold.kind == "linear":
        return fold.bias + fold.cell_logits(features).sum(1)
    return fold.tail(fold.bias + fold.cell_preactivations(features).sum(1))


def _mixed(features: Tensor) -> Tensor:
    """A map such as the explainers make of `features` [1,D,H,W]: every third cell gone, every fourth one another's."""
    cells = features.flatten(2)
    mixed = cells.clone()
    mixed[:, :, ::4] = cells.flip(2)[:, :, ::4]
    mixed[:, :, 1::3] = 0
    return mixed.view_as(features)
