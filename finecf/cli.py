"""The command line: `finecf demo | explain | evaluate | train | bench | doctor`."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import rich
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import finecf
from finecf.data import ImageFolderDataset, LabelledImages, SyntheticBirds, digits
from finecf.explainers import FGVCE, PRESETS
from finecf.explainers.fgvce import MICRO_BATCH
from finecf.metrics import dilate_masks, share_on_mask
from finecf.metrics.evaluate import Mistake, evaluate_birds, find_mistakes
from finecf.models import CandidateBank, Classifier, wrap
from finecf.report import Run, Truth
from finecf.training import load_birds_net, load_digits_net, train_birds, train_digits

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Why was a fine-grained image classifier wrong, and what would have made it right?",
)

DEMO_REFERENCES = 800
DEMO_CHOICE = 3
DEMO_EDITS = 10
EVALUATE_IMAGES = 20_000
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

OutDir = Annotated[Path, typer.Option("--out", help="Folder for the figures and report.html.")]


def _sentences(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Print what the library refuses as one sentence, and end with code 2."""

    @functools.wraps(command)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, ImportError) as error:
            Console(stderr=True, highlight=False).print(f"[bold red]finecf:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error

    return guarded


@app.command()
@_sentences
def demo(
    dataset: Annotated[
        str, typer.Option(help="birds (drawn, with known answers) or digits (real handwriting).")
    ] = "birds",
    out: OutDir = Path("finecf-demo"),
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="How many mistakes to explain.")] = 8,
) -> None:
    """Explain real mistakes of a small shipped network and grade the explanations against the known answer."""
    started = time.perf_counter()
    runs = {"birds": _demo_birds, "digits": _demo_digits}
    if dataset not in runs:
        raise ValueError(f"--dataset must be one of {', '.join(runs)}; got {dataset!r}")
    runs[dataset](n).publish(out)
    rich.print(f"The whole demo took {time.perf_counter() - started:.0f} s.")


@app.command()
@_sentences
def explain(
    model: Annotated[str, typer.Option(help="torchvision:NAME, or FILE.py:FUNCTION that returns a torch.nn.Module.")],
    data: Annotated[Path, typer.Option(help="Folder of images, one subfolder for each class.")],
    method: Annotated[str, typer.Option(help="The explainer.")] = "fgvce",
    weights: Annotated[Path | None, typer.Option(help="State dict: .safetensors, or a file of torch.save.")] = None,
    image: Annotated[Path | None, typer.Option(help="Explain this image; needs --target.")] = None,
    target: Annotated[str | None, typer.Option(help="The class that --image should have been.")] = None,
    all_mistakes: Annotated[
        bool, typer.Option("--all-mistakes", help="Explain every wrongly classified image.")
    ] = False,
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "fgvce",
    out: OutDir = Path("finecf-out"),
    labels: Annotated[
        Path | None,
        typer.Option(help="Class names, one a line, in the order of the model's outputs; default: the subfolders."),
    ] = None,
    layer: Annotated[str | None, typer.Option(help="Name of the layer whose map is explained; default: found.")] = None,
    size: Annotated[int, typer.Option(min=8, help="Side in pixels that images are resized to.")] = 224,
    normalise: Annotated[
        str, typer.Option(help="imagenet, none, or auto: imagenet for torchvision's models, none for your own.")
    ] = "auto",
    max_edits: Annotated[
        int | None, typer.Option(min=1, help="Most replacements in one image; default: all cells.")
    ] = None,
    minimal: Annotated[bool, typer.Option(help="Afterwards remove the replacements that are not needed.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    figures: Annotated[bool, typer.Option(help="Draw a figure for each image.")] = True,
    save: Annotated[bool, typer.Option(help="Also keep each explanation, for finecf.load.")] = False,
) -> None:
    """Explain the mistakes of your model on your images."""
    if method != "fgvce":
        raise ValueError(f"--method must be fgvce; got {method!r}")
    if (image is None) == (not all_mistakes):
        raise ValueError("give --image FILE --target NAME, or --all-mistakes")
    if image is not None and target is None:
        raise ValueError("--image needs --target NAME, the class that the image should have been")
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"--image: there is no file {image}")
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    images, classifier = _user_classifier(model, weights, data, labels, layer, size, normalise, device)
    names = _index_of_folders(images, classifier)
    wanted = None if target is None else [classifier.class_index(target)]
    chosen = [i for i in range(len(images)) if wanted is None or names[images.labels[i]] in wanted]
    if not chosen:
        raise ValueError(f"{data} holds no images of class {target!r} to take replacements from")
    bank = CandidateBank.from_loader(classifier, _batches(images, chosen, names), progress=None)
    explainer = FGVCE(classifier, bank, preset, max_edits=max_edits, minimal=minimal)
    run = Run(f"{preset} on {data}", _about(preset), explainer, figures=figures, save=save)
    if image is not None:
        run.explain(LabelledImages([image], [0], [str(target)], size).images(), [str(target)], [str(image)])
    else:
        kept = set(bank.sources)
        # Every image that the bank did not keep was classified as something else.
        wrong = [i for i in chosen if str(images.paths[i]) not in kept]
        for batch, numbers, sources in track(list(_batches(images, wrong, names)), "explaining", transient=True):
            run.explain(batch, numbers, sources)
        run.totals["images looked at"] = str(len(images))
    run.publish(out)


@app.command()
@_sentences
def evaluate(
    mistakes: Annotated[int, typer.Option(min=1, help="In-family mistakes to grade.")] = 300,
    references: Annotated[int, typer.Option(min=20, help="Images that the bank is made of.")] = 1000,
    presets: Annotated[str, typer.Option(help="Presets to grade, with commas between.")] = ",".join(PRESETS),
    max_edits: Annotated[int, typer.Option(min=1, help="Most replacements in one image.")] = 10,
    checkpoint: Annotated[Path | None, typer.Option(help="Another net than the shipped one.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the tables to this file.")] = None,
) -> None:
    """Grade FG-VCE on SyntheticBirds, where the parts that tell two classes apart are known."""
    net, _ = load_birds_net(checkpoint)
    drawn = SyntheticBirds("val", n=references)
    classifier = wrap(net, class_names=drawn.class_names)
    bank = CandidateBank.from_loader(classifier, DataLoader(drawn.tensors(), batch_size=64))
    result = evaluate_birds(
        classifier,
        bank,
        SyntheticBirds("test", n=EVALUATE_IMAGES),
        drawn,
        mistakes=mistakes,
        presets=[name.strip() for name in presets.split(",")],
        max_edits=max_edits,
        progress=True,
    )
    for table in result.tables():
        rich.print(table.rich())
    if markdown is not None:
        markdown.write_text(result.markdown(), encoding="utf-8")
        rich.print(f"The tables are in {markdown}.")


@app.command()
@_sentences
def train(
    what: Annotated[str, typer.Argument(help="birds or digits.")],
    out: Annotated[Path | None, typer.Option(help="The checkpoint to write; default: birds.safetensors, ...")] = None,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Birds to train on.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="The same number gives the same weights.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw birds.")] = 0,
) -> None:
    """Train the small networks that ship with finecf."""
    runs: dict[str, Callable[..., dict[str, Any]]] = {"birds": train_birds, "digits": train_digits}
    if what not in runs:
        raise ValueError(f"train takes {' or '.join(runs)}; got {what!r}")
    settings: dict[str, Any] = {"seed": seed, "precision": precision, "threads": threads, "progress": True}
    if epochs is not None:
        settings["epochs"] = epochs
    if what == "birds":
        settings |= {"workers": workers} | ({} if images is None else {"images": images})
    path = out or Path(f"{what}.safetensors")
    meta = runs[what](path, **settings)
    rich.print(f"Accuracy {meta['accuracy']:.4f} on the test split; the checkpoint is {path}.")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@_sentences
def bench(context: typer.Context) -> None:
    """Measure the operators against plain torch (needs a checkout; options go to pytest)."""
    script = Path(finecf.__file__).resolve().parents[1] / "benchmarks" / "bench_ops.py"
    if not script.is_file():
        raise FileNotFoundError("finecf bench needs the benchmarks folder, which only a checkout of the project has")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "pytest", "-q", "-s", str(script), *context.args]))


@app.command()
def doctor() -> None:
    """Say what is compiled, what is loaded, and why not."""
    info = finecf.build_info()
    table = Table(title="finecf", show_header=False)
    for name in ("finecf", "torch", "torch_cuda", "python", "backend"):
        table.add_row(name, str(info[name]))
    for part in ("cpu", "cuda"):
        for name, value in info[part].items():
            table.add_row(f"{part} {name}", ", ".join(value) if isinstance(value, list) else str(value))
    table.add_row("operators", "\n".join(info["operators"]))
    rich.print(table)


def _demo_birds(n: int) -> Run:
    net, _ = load_birds_net()
    # Labels of the training split are flipped here and there, on purpose; those of the validation split are not.
    references = SyntheticBirds("val", n=DEMO_REFERENCES)
    test = SyntheticBirds("test")
    classifier = wrap(net, class_names=test.class_names)
    weights = sum(parameter.numel() for parameter in net.parameters())
    rich.print(f"A network of {weights:,} weights tells {len(test.classes)} kinds of drawn birds apart.")
    rich.print(f"Bank: the cells of {len(references)} reference images, those that the network gets right.")
    bank = CandidateBank.from_loader(
        classifier, DataLoader(references.tensors(), batch_size=64), keep_images=True, progress=None
    )
    rich.print(f"Looking for {n} test images that it really gets wrong ...")
    found, looked_at = find_mistakes(classifier, test, DEMO_CHOICE * n)
    mistakes = _varied([mistake for mistake in found if mistake.visible])[:n]
    run = Run(
        "Why did the network take one bird for another?",
        "A small network, trained on drawn birds, makes real mistakes on test images that it never saw. Each figure "
        "shows which cells of its last feature map FG-VCE replaced by cells of other images of the true class until "
        "the network gave the right answer. The generator knows which parts tell the two classes apart; the column "
        "'on parts' says how many of the replacements fall on them.",
        FGVCE(classifier, bank, max_edits=DEMO_EDITS, minimal=True),
    )
    for mistake in mistakes:
        item = mistake.item
        (result,) = run.explain(item.tensor[None], [mistake.target], [item.source])
        differing = torch.from_numpy(item.mask(mistake.visible))
        grown = dilate_masks(differing, result.grid)
        run.on_parts.append(share_on_mask([edit.cell for edit in result.edits], grown, result.grid))
        run.truths.append(Truth(differing, " and ".join(mistake.visible)))
    run.totals["test images looked at"] = str(looked_at)
    return run


def _varied(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The mistakes, the first of every pair of classes before the second of any."""
    seen: Counter[tuple[int, int]] = Counter()
    ranked = []
    for mistake in mistakes:
        pair = (mistake.predicted, mistake.target)
        ranked.append((seen[pair], mistake))
        seen[pair] += 1
    return [mistake for _, mistake in sorted(ranked, key=lambda entry: entry[0])]


def _demo_digits(n: int) -> Run:
    net, _ = load_digits_net()
    references, test = digits("train"), digits("test")
    classifier = wrap(net, class_names=test.class_names)
    rich.print(f"Bank: the cells of {len(references)} handwritten digits, those that the network gets right.")
    bank = CandidateBank.from_loader(
        classifier, DataLoader(references, batch_size=128), keep_images=True, progress=None
    )
    wrong = (classifier.logits(test.batch()).argmax(1) != torch.from_numpy(test.labels)).nonzero()[:, 0].tolist()
    rich.print(f"The network gets {len(wrong)} of {len(test)} test digits wrong; {min(n, len(wrong))} are explained.")
    run = Run(
        "Why did the network take one digit for another?",
        "A small network, trained on handwritten digits, makes a few real mistakes on test digits. Each figure shows "
        "which cells of its last feature map FG-VCE replaced by cells of other digits of the true class until the "
        "network gave the right answer.",
        FGVCE(classifier, bank, max_edits=DEMO_EDITS, minimal=True),
    )
    for i in wrong[:n]:
        image, label, source = test[i]
        run.explain(image[None], [label], [source])
    run.totals["test images looked at"] = str(len(test))
    return run


def _user_classifier(
    model: str,
    weights: Path | None,
    data: Path,
    labels: Path | None,
    layer: str | None,
    size: int,
    normalise: str,
    device: str,
) -> tuple[ImageFolderDataset, Classifier]:
    images = ImageFolderDataset(data, size=size)
    class_names = images.class_names if labels is None else _lines(labels)
    if normalise not in ("auto", "imagenet", "none"):
        raise ValueError(f"--normalise must be auto, imagenet or none; got {normalise!r}")
    if normalise == "auto":
        normalise = "imagenet" if model.startswith("torchvision:") else "none"
    module = _model(model, weights, len(class_names)).to(device)
    return images, wrap(
        module, layer=layer, class_names=class_names, preprocess=_imagenet if normalise == "imagenet" else None
    )


def _imagenet(images: Tensor) -> Tensor:
    mean, deviation = (values.view(3, 1, 1).to(images.device) for values in IMAGENET)
    return (images - mean) / deviation


def _model(spec: str, weights: Path | None, classes: int) -> nn.Module:
    """The model that `torchvision:NAME` or `FILE.py:FUNCTION` stands for, with its weights."""
    kind, _, name = spec.rpartition(":")
    if kind == "torchvision":
        from torchvision.models import get_model

        if weights is None:
            raise ValueError(f"--model {spec} needs --weights FILE: pretrained weights are not downloaded")
        module = get_model(name, weights=None, num_classes=classes)
    elif kind.endswith(".py"):
        module = _from_file(Path(kind), name)
    else:
        raise ValueError(f"--model must be torchvision:NAME or FILE.py:FUNCTION; got {spec!r}")
    if weights is not None:
        try:
            module.load_state_dict(_state_dict(weights))
        except RuntimeError as error:
            raise ValueError(f"{weights} does not fit --model {spec}: {error}") from error
    return module.eval()


def _from_file(path: Path, function: str) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"--model: there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--model: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--model: {path} has no function {function!r}")
    model = getattr(module, function)()
    if not isinstance(model, nn.Module):
        raise TypeError(f"--model: {function} of {path} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors, or from torch.save (tensors only, nothing is executed)."""
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
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"--weights: {path} is truncated or holds more than tensors ({error})") from error
    return loaded.get("state_dict", loaded)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"--labels: there is no file {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _index_of_folders(images: ImageFolderDataset, classifier: Classifier) -> list[int]:
    """The model's class index of each subfolder."""
    return [classifier.class_index(name) for name in images.class_names]


def _batches(
    images: ImageFolderDataset, indices: Iterable[int], names: Sequence[int]
) -> Iterator[tuple[Tensor, list[int], list[str]]]:
    chosen = list(indices)
    for start in range(0, len(chosen), MICRO_BATCH):
        own = chosen[start : start + MICRO_BATCH]
        yield images.images(own), [names[images.labels[i]] for i in own], [str(images.paths[i]) for i in own]


def _about(preset: str) -> str:
    return (
        f"Each figure shows which cells of the network's last feature map FG-VCE (preset {preset!r}) replaced by cells "
        "of real images of the true class until the network gave the right answer."
    )
