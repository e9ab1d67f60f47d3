"""Finding the layer whose output is the map of cells, and reading that output as [B,D,H,W]."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Side lengths (pixels) tried, in this order, to see what shapes an unknown model's layers give. 128 leaves 2 x 2 cells
# at a stride of 64; the others serve models that insist on their own size.
PROBE_SIDES = (128, 224, 299, 256, 384, 96, 64, 32, 28, 16, 8)

# A pooled or dropped-out map is not a layer of its own: the map before it is the finer one.
_PASSIVE = (
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.AvgPool2d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Identity,
)


@dataclass(frozen=True)
class Layout:
    """How a layer lays out its cells: `nchw` [B,D,H,W], `nhwc` [B,H,W,D] or `tokens` [B,H*W,D] on an H x W grid."""

    kind: str
    height: int
    width: int

    @staticmethod
    def of(output: Tensor, layer: str, image: Sequence[int]) -> Layout:
        """Read the layout off a layer's output for images of some height and width.

        A 4-D tensor is NHWC where its last side is the longest and the middle ones are the image's over one stride, and
        the last two are not; where that tells nothing, where the middle ones are equal.
        """
        shape = tuple(output.shape)
        if output.dim() == 4:
            first, last = (_scaled(sides, image) for sides in (shape[1:3], shape[2:4]))
            told = first and not last
            if shape[3] > max(shape[1:3]) and (told or (first == last and shape[1] == shape[2])):
                return Layout("nhwc", shape[1], shape[2])
            return Layout("nchw", shape[2], shape[3])
        if output.dim() == 3:
            side = round(shape[1] ** 0.5)
            if side * side == shape[1]:
                return Layout("tokens", side, side)
            raise ValueError(
                f"layer {layer!r} gives {shape[1]} tokens, which form no square grid of cells (a class token among "
                "them?): name a layer that gives a map [B,D,H,W], such as the patch embedding of a transformer"
            )
        raise ValueError(
            f"layer {layer!r} gives a tensor of shape {list(shape)}; expected a map of cells [B,D,H,W]: "
            "name an earlier layer"
        )

    def to_map(self, output: Tensor) -> Tensor:
        """The layer's output as [B,D,H,W]."""
        if self.kind == "nchw":
            return output
        if self.kind == "nhwc":
            return output.permute(0, 3, 1, 2)
        return output.transpose(1, 2).unflatten(2, (self.height, self.width))

    def from_map(self, features: Tensor) -> Tensor:
        """A map [B,D,H,W] as the layer would have given it."""
        if self.kind == "nchw":
            return features
        if self.kind == "nhwc":
            return features.permute(0, 2, 3, 1)
        return features.flatten(2).transpose(1, 2)


def _scaled(sides: Sequence[int], image: Sequence[int]) -> bool:
    """Whether both sides are the image's over one stride, up to a cell that rounding or padding may add or take."""
    strides = [(whole / (side + 1), whole / max(side - 1, 0.5)) for side, whole in zip(sides, image, strict=True)]
    return max(low for low, _ in strides) <= min(high for _, high in strides)


@contextmanager
def plain_eval(model: nn.Module, device_type: str) -> Iterator[None]:
    """Evaluate `model` with no gradients and no autocast; every submodule's mode is put back, also after an exception.

    The `training` flags are set one by one: `train()` and `eval()` may be overridden, and a submodule that its owner
    keeps in eval mode (frozen batch norm) has to stay there.
    """
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def input_gradients(model: nn.Module) -> Iterator[None]:
    """Gradients on, and none for the parameters of `model`, whose `requires_grad` is put back.

    Parameters made in inference mode are left alone: outside it torch does not let their flag be set again.
    """
    trainable = [each for each in model.parameters() if each.requires_grad and not each.is_inference()]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. The sum tells in one pass; only a sum that overflows needs a second look."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def unwrap(model: object) -> nn.Module:
    """The plain module inside DataParallel, DistributedDataParallel or `torch.compile`; else the model itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a torch.nn.Module that maps images [B,3,H,W] to logits [B,C]"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "model is a TorchScript module, whose layers call no hooks: wrap the Python module it was compiled from"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError("model has lazy layers that were never run: call it once on a batch before wrapping it")
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def close_names(name: str, names: list[str]) -> str:
    """The few of `names` nearest to `name`, else the first few, as the end of a message."""
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    if near:
        return "did you mean " + ", ".join(repr(n) for n in near) + "?"
    shown = ", ".join(repr(n) for n in names[:12])
    return f"there are {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _stage_names(model: nn.Module) -> dict[str, str]:
    """VGG's published names (`conv5_3`, `relu5_3`, `pool5`) -> module names, for a plain `features` stack."""
    features = getattr(model, "features", None)
    plain = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
    if not isinstance(features, nn.Sequential) or not all(isinstance(m, plain) for m in features):
        return {}
    names, stage, conv = {}, 1, 0
    for index, module in features.named_children():
        if isinstance(module, nn.Conv2d):
            conv += 1
            names[f"conv{stage}_{conv}"] = f"features.{index}"
        elif isinstance(module, nn.ReLU):
            names[f"relu{stage}_{conv}"] = f"features.{index}"
        elif isinstance(module, nn.MaxPool2d):
            names[f"pool{stage}"] = f"features.{index}"
            stage, conv = stage + 1, 0
    return names


def resolve_module(model: nn.Module, wanted: str | nn.Module, role: str) -> str:
    """The dotted name of a submodule given by name, by VGG's published name, or as the module itself."""
    modules = dict(model.named_modules())
    if isinstance(wanted, nn.Module):
        for name, module in modules.items():
            if module is wanted and name:
                return name
        raise ValueError(f"{role} is a {type(wanted).__name__} that is not a submodule of the model")
    if not isinstance(wanted, str):
        raise TypeError(
            f"{role} is a {type(wanted).__name__}; expected the name of a submodule or the submodule itself"
        )
    wanted = _stage_names(model).get(wanted, wanted)
    names = [name for name in modules if name]
    if wanted not in names:
        raise ValueError(f"the model has no submodule {wanted!r} for {role}: {close_names(wanted, names)}")
    return resolve_module(model, modules[wanted], role)


def input_channels(model: nn.Module) -> int | None:
    """Channels of the images, read off the first parameter when that is an ungrouped convolution's; else None."""
    first = next(model.parameters(), None)
    return int(first.shape[1]) if first is not None and first.dim() == 4 and first.shape[1] > 0 else None


def find_layer(model: nn.Module, forward: Callable[[Tensor], object], device: torch.device, dtype: torch.dtype) -> str:
    """The outermost submodule that gives the last map of more than one cell, found by one forward of a zero image."""
    channels = input_channels(model) or 3
    failures = []
    for side in PROBE_SIDES:
        seen: list[str] = []
        handles = []

        def note(name: str, module: nn.Module, output: object, seen: list[str] = seen, side: int = side) -> None:
            if isinstance(output, Tensor) and output.dim() == 4 and not isinstance(module, _PASSIVE):
                layout = Layout.of(output, name, (side, side))
                if layout.height * layout.width > 1:
                    seen.append(name)

        try:
            for name, module in model.named_modules():
                if name:
                    handles.append(module.register_forward_hook(lambda m, _, out, name=name: note(name, m, out)))
            with plain_eval(model, device.type):
                forward(torch.zeros(1, channels, side, side, device=device, dtype=dtype))
        except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
            # Models with a fixed input size refuse the others in their own ways; the last refusal is reported below.
            failures.append(f"{side} px: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        finally:
            for handle in handles:
                handle.remove()
        if seen:
            return resolve_module(model, seen[-1], "layer")
    names = [name for name, _ in model.named_modules() if name]
    why = f" (zero images were refused: {failures[-1]})" if len(failures) == len(PROBE_SIDES) else ""
    raise ValueError(
        f"no layer of {type(model).__name__} was found that gives a map of cells [B,D,H,W]{why}: "
        f"name one with layer=; {close_names('', names)}"
    )
