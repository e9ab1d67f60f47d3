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
_TF32_TOLERANCE = 1e-2
_PROBE_BYTES = 32 << 20


def tolerance(dtype: torch.dtype, reference: Tensor, least: float = 1.0) -> float:
    """Difference from `reference` that rounding in `dtype` explains, with room to spare; `least`: its least scale."""
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    share = _TOLERANCE[dtype]
    # The user's model runs as the user has set it up: with these on, its float32 layers round as coarsely as this.
    coarse = torch.get_float32_matmul_precision() != "highest" or (
        reference.is_cuda and torch.backends.cudnn.allow_tf32
    )
    if dtype == torch.float32 and coarse:
        share = _TF32_TOLERANCE
    return share * max(least, scale)


@dataclass(frozen=True, eq=False)
class HeadFold:
    """A head as sums over the cells of a map.

    Attributes:
        kind: `linear` (cells add to the logits) or `first_linear` (cells add to the first linear layer's output).
        weight: [C,D] for `linear`; for `first_linear` [Q,Hd,D], what each of Q pooled cells is multiplied with.
        bias: [C] or [Hd].
        max_error: largest difference from the real head on the first map that `Classifier.fold` was given.
        cells: P, the cells of the map the fold was made for.
        pooling: [Q,P] for `first_linear`: what cell p adds to pooled cell q; None for `linear`, where it is 1/P.
    """

    kind: str
    weight: Tensor = field(repr=False)
    bias: Tensor = field(repr=False)
    max_error: float
    cells: int
    pooling: Tensor | None = field(default=None, repr=False)
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
        pooling = self._pooling_weights("cell_preactivations")
        cells = features.to(self.weight.dtype).flatten(2).transpose(1, 2)
        out = cells.new_zeros(cells.shape[0], self.cells, self.weight.shape[1])
        for share, weight in zip(pooling, self.weight, strict=True):
            used = share.nonzero().flatten()
            out[:, used] += torch.matmul(cells[:, used] * share[used, None], weight.T)
        return out

    def candidate_preactivations(self, rows: Tensor, cell_index: int | Tensor) -> Tensor:
        """What bank rows [N,D] would add in place of a cell, [N,Hd]; `cell_index`: one cell, or one per row [N]."""
        pooling = self._pooling_weights("candidate_preactivations")
        rows = rows.to(self.weight.dtype)
        index = torch.as_tensor(cell_index, device=rows.device).expand(rows.shape[0])
        out = rows.new_empty(rows.shape[0], self.weight.shape[1])
        for cell in index.unique().tolist():
            used = pooling[:, cell].nonzero().flatten()
            # Usually one pooled cell of weight one, or the only one there is: no other product is needed.
            share = pooling[used, cell]
            if len(used) == 1:
                weight, factor = self.weight[int(used)], float(share)
            else:
                weight, factor = torch.einsum("q,qhd->hd", share, self.weight[used]), 1.0
            chosen = index == cell
            out[chosen] = torch.matmul(rows[chosen], weight.T).mul_(factor)
        return out

    def tail(self, preactivations: Tensor) -> Tensor:
        """Logits [B,C] of the first linear layer's output [B,Hd] (`bias` plus the cells' sum). `first_linear` only."""
        self._require("first_linear", "tail")
        assert self._tail is not None
        return self._tail(preactivations)

    def _pooling_weights(self, what: str) -> Tensor:
        self._require("first_linear", what)
        assert self.pooling is not None
        return self.pooling

    def _require(self, kind: str, what: str) -> None:
        if self.kind != kind:
            raise ValueError(f"{what} needs a fold of kind {kind!r}; this one is {self.kind!r}")


class _InputSeen(Exception):
    """Ends a forward once the first linear layer's input is known."""


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a head folds: kind, the linear layer's name and the pooling; or kind `none` and why."""

    kind: str = "none"
    name: str = ""
    pooling: Tensor | None = None
    reason: str = ""


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
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._turned: dict[str, tuple[tuple[int, int, torch.dtype], Tensor]] = {}

    def fold(self, features: Tensor) -> tuple[HeadFold | None, str]:
        """The fold for maps like `features` [B,D,H,W], checked on the first of them, and the reason in words."""
        grid = tuple(features.shape[1:])
        if grid not in self._plans:
            self._plans[grid] = self._plan(features)
        plan = self._plans[grid]
        if plan.kind == "none":
            return None, plan.reason
        fold = self._build(plan, features)
        want = self._run(features[:1])
        error = float((_summed_logits(fold, features[:1]) - want).abs().max())
        if not error <= tolerance(self._dtype, want):
            del self._plans[grid]
            return None, (
                f"none: the head behind {plan.name!r} is not a function of a sum over cells "
                f"(the fold differs from the real head by {error:.2g})"
            )
        where = (
            f"average pooling and {plan.name!r}" if fold.kind == "linear" else f"a sum over cells up to {plan.name!r}"
        )
        return (
            replace(fold, max_error=error),
            f"{fold.kind}: {where} (largest difference from the real head {error:.1e})",
        )

    def _build(self, plan: _Plan, features: Tensor) -> HeadFold:
        weight, bias = _weight_and_bias(self._model.get_submodule(plan.name))
        bias = bias.to(features.dtype)
        cells = features.shape[2] * features.shape[3]
        if plan.kind == "linear":
            return HeadFold("linear", weight.to(features.dtype), bias, 0.0, cells)
        return HeadFold(
            "first_linear",
            self._by_cell(plan.name, weight, features),
            bias,
            0.0,
            cells,
            plan.pooling,
            lambda preactivations: self._finish(plan.name, preactivations),
        )

    def _by_cell(self, name: str, weight: Tensor, features: Tensor) -> Tensor:
        """A first linear layer's weight [Hd,D*Q] as [Q,Hd,D] in memory, turned once while the layer stays the same."""
        state = (weight.data_ptr(), -1 if weight.is_inference() else weight._version, features.dtype)
        kept = self._turned.get(name)
        if kept is None or kept[0] != state or state[1] < 0:
            turned = weight.unflatten(1, (features.shape[1], -1)).permute(2, 0, 1).to(features.dtype).contiguous()
            self._turned = {name: (state, turned)}
        return self._turned[name][1]

    def _plan(self, features: Tensor) -> _Plan:
        # At a scale of one, so that a head is not taken for a sum because the cells hardly count beside its bias.
        features = features[:1]
        scale = float(features.abs().mean())
        if scale > 0:
            features = features / scale
        else:
            features = torch.linspace(0, 2, features.numel(), dtype=features.dtype, device=features.device).view_as(
                features
            )
        features = torch.cat([features, _mixed(features)])
        name, value = self._first_linear(features)
        if name is None:
            within = f" in {self._head!r}" if self._head else ""
            return _Plan(reason=f"none: no linear layer was called{within} behind the map")
        logits = self._run(features)
        weight, _ = _weight_and_bias(self._model.get_submodule(name))
        if weight.shape == (logits.shape[1], features.shape[1]):
            plan = _Plan("linear", name)
            if self._agrees(_summed_logits(self._build(plan, features), features), logits):
                return plan
        pooling = self._pooling(features, value)
        if pooling is None:
            return _Plan(reason=f"none: the input of {name!r} is not a fixed weighted sum of the cells")
        rest = self._tail_of(name)
        if not rest.traced:
            return _Plan(reason=f"none: the layers behind {name!r} cannot be run alone: {rest.reason}")
        if rest.needs_image:
            return _Plan(reason=f"none: the layers behind {name!r} read the image's shape")
        return _Plan("first_linear", name, pooling)

    def _agrees(self, got: Tensor, want: Tensor) -> bool:
        return float((got - want).abs().max()) <= tolerance(self._dtype, want, least=1e-2)

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
                    handles.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args)))
            self._run(features)
        except _InputSeen:
            return seen[0]
        finally:
            for handle in handles:
                handle.remove()
        return None, features

    def _pooling(self, features: Tensor, value: Tensor) -> Tensor | None:
        """What a cell adds to each pooled cell, [Q,P], if `value` is such a sum over the cells of `features`.

        It is seen by lighting the cells one at a time, in all channels at once. None: it is no such sum.
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
    weight, bias = module.weight, module.bias
    if not isinstance(weight, Tensor):
        raise TypeError(f"the weight of {type(module).__name__} is a {type(weight).__name__}; expected a tensor")
    flat = weight.detach().flatten(1)
    return flat, bias.detach() if isinstance(bias, Tensor) else flat.new_zeros(flat.shape[0])


def _summed_logits(fold: HeadFold, features: Tensor) -> Tensor:
    """The logits as a sum over cells."""
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
