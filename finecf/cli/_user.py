"""The user's model and images, as the command line names them."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich
import torch
from rich.markup import escape
from torch import Tensor, nn

from finecf.cli._runs import progress_bar
from finecf.data import ImageFolderDataset
from finecf.explainers.fgvce import MICRO_BATCH
from finecf.models import Classifier, wrap
from finecf.models.layers import close_names

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def user_classifier(
    model: str,
    weights: Path | None,
    data: Path,
    labels: Path | None,
    layer: str | None,
    size: int,
    normalise: str,
    device: torch.device,
) -> tuple[ImageFolderDataset, Classifier]:
    """The images of a folder and the model that the options name, once it has been seen to take one of them."""
    images = ImageFolderDataset(data, size=size)
    class_names = images.class_names if labels is None else _lines(labels)
    if normalise not in ("auto", "imagenet", "none"):
        raise ValueError(f"--normalise must be auto, imagenet or none; got {normalise!r}")
    if normalise == "auto":
        normalise = "imagenet" if model.startswith("torchvision:") else "none"
    module = _model(model, weights, len(class_names)).to(device)
    classifier = wrap(
        module, layer=layer, class_names=class_names, preprocess=_imagenet if normalise == "imagenet" else None
    )
    try:
        classifier.logits(classifier.prepare(images.images([0])))
    except ValueError as error:
        if labels is None and classifier.num_classes not in (None, len(class_names)):
            raise ValueError(
                f"--data: {data} has {len(class_names)} subfolders, which are taken for the model's outputs, and the "
                f"model has {classifier.num_classes}: give --labels FILE, a name for each output, one a line"
            ) from error
        raise
    return images, classifier


def _imagenet(images: Tensor) -> Tensor:
    mean, deviation = (values.view(3, 1, 1).to(images.device) for values in IMAGENET)
    return (images - mean) / deviation


def _model(spec: str, weights: Path | None, classes: int) -> nn.Module:
    """The model that `torchvision:NAME` or `FILE.py:FUNCTION` stands for, with its weights."""
    kind, _, name = spec.rpartition(":")
    if kind == "torchvision":
        from torchvision.models import get_model, list_models

        if name.lower() not in list_models():
            raise ValueError(f"--model: torchvision has no model {name!r}: {close_names(name, list_models())}")
        if weights is None:
            raise ValueError(f"--model {spec} needs --weights FILE: pretrained weights are not downloaded")
        module = get_model(name, weights=None, num_classes=classes)
    elif kind.endswith(".py"):
        module = from_file(Path(kind), name)
    else:
        raise ValueError(f"--model must be torchvision:NAME or FILE.py:FUNCTION; got {spec!r}")
    if weights is not None:
        try:
            module.load_state_dict(_state_dict(weights, module))
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit --model {spec}: {error}") from error
    return module.eval()


def from_file(path: Path, function: str) -> nn.Module:
    """What that function of a Python file returns, where it is a model."""
    if not path.is_file():
        raise FileNotFoundError(f"--model: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--model: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    if str(path.parent.resolve()) not in sys.path:
        sys.path.insert(0, str(path.parent.resolve()))  # as Python does: files beside it can be imported
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"--model: {path} cannot be run: {_short(error)}") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"--model: {path} has no function {function!r}")
    needed = [
        name
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise TypeError(
            f"--model: {function} of {path} needs arguments ({', '.join(needed)}): give a function that takes none"
        )
    try:
        model = make()
    except Exception as error:
        raise ValueError(f"--model: {function} of {path} failed: {_short(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model: {function} of {path} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _state_dict(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """The state dict for `module` that a file holds, taken out of what training scripts wrap around it."""
    loaded, unwrapped = _tensors(path), []
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        key = next((key for key in STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)), None)
        if key is None:
            break
        loaded = loaded[key]
        unwrapped.append(f"its entry {key!r} is taken")
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(
            f"--weights: {path} holds no state dict (names and tensors), neither itself nor as one of its entries "
            f"{', '.join(map(repr, STATE_DICT_KEYS))}"
        )
    prefix = "module."
    if all(name.startswith(prefix) for name in loaded) and not all(n.startswith(prefix) for n in module.state_dict()):
        loaded = {name.removeprefix(prefix): value for name, value in loaded.items()}
        unwrapped.append(f"{prefix!r} is cut off its names")
    if unwrapped:
        rich.print(escape(f"Weights of {path}: {', '.join(unwrapped)}."))
    return dict(loaded)


def _tensors(path: Path) -> Any:
    """What a file of safetensors or of torch.save holds (tensors only, nothing is executed)."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"--weights: there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return {
                name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()
            }
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises a LookupError for files that are no pickle at all.
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError) as error:
        if "TorchScript" in str(error) or _holds_modules(path):
            raise ValueError(f"--weights: {path} holds a whole model: save model.state_dict()") from error
        raise ValueError(f"--weights: {path} is truncated or holds more than tensors ({_short(error)})") from error


def _holds_modules(path: Path) -> bool:
    """Whether a file of torch.save names classes of layers, which a state dict does not."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError):  # a zip file that torch.save did not write
        return False
    return any(name.startswith("torch.nn.modules.") for name in named)


def _short(error: Exception) -> str:
    """An error's kind and the one line of its message that says what is wrong, without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition("WeightsUnpickler error:")[2].strip()
    line = text.splitlines()[0].strip() if text else ""
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def device_named(name: str) -> torch.device:
    """The device of that name, once it is known to be there."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError(f"--device {name}: no CUDA device here; use --device cpu")
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: the last CUDA device here is cuda:{count - 1}")
    return device


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"--labels: there is no file {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def index_of_folders(images: ImageFolderDataset, classifier: Classifier) -> list[int]:
    """The model's class index of each subfolder."""
    return [classifier.class_index(name) for name in images.class_names]


def batches(
    images: ImageFolderDataset, indices: Iterable[int], names: Sequence[int], step: int = MICRO_BATCH
) -> Iterator[tuple[Tensor, list[int], list[str]]]:
    """The images of these indices, `step` at a time, with their classes and the names of their files."""
    chosen = list(indices)
    for start in range(0, len(chosen), step):
        own = chosen[start : start + step]
        yield images.images(own), [names[images.labels[i]] for i in own], [str(images.paths[i]) for i in own]


def predict(
    classifier: Classifier, images: ImageFolderDataset, chosen: Sequence[int], names: Sequence[int]
) -> list[int]:
    """What the model takes the chosen images for."""
    predicted: list[int] = []
    with progress_bar() as bar:
        task = bar.add_task("looking for mistakes", total=len(chosen))
        for batch, labels, _ in batches(images, chosen, names):
            predicted += classifier.logits(classifier.prepare(batch)).argmax(1).tolist()
            bar.advance(task, len(labels))
    return predicted


def misclassified(
    classifier: Classifier, images: ImageFolderDataset, chosen: Sequence[int], names: Sequence[int]
) -> list[int]:
    """Those of the chosen images that the model takes for something else than their folder says."""
    predicted = predict(classifier, images, chosen, names)
    return [i for i, said in zip(chosen, predicted, strict=True) if said != names[images.labels[i]]]
