"""The commands and their options."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import rich
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

import finecf
from finecf.cli._demo import bird_runs, digit_runs
from finecf.cli._runs import INTERRUPTED, MIRROR_STEPS, about_fgvce, about_mirror, about_smdl, explain_all, title
from finecf.cli._user import batches, device_named, index_of_folders, misclassified, predict, user_classifier
from finecf.data import ImageFolderDataset, LabelledImages, SyntheticBirds
from finecf.explainers import FGVCE, JUST_ACROSS, PRESETS, SMDL, MirrorCFE
from finecf.explainers._mirror_fit import PRECISIONS, checked_checkpoint, checked_weights
from finecf.explainers._reflection import REFLECTIONS
from finecf.explainers._shared import one_of
from finecf.explainers.fgvce import MICRO_BATCH
from finecf.explainers.mirror_cfe import CORRECTIONS
from finecf.explainers.smdl import BASELINES, SEARCHES
from finecf.metrics.evaluate import evaluate_birds
from finecf.models import CandidateBank, Classifier, wrap
from finecf.models.decoder import load_decoder
from finecf.regions import METHODS as DIVISIONS
from finecf.report import Run
from finecf.report.run import ASKED, MISTAKES, PREDICTED
from finecf.training import (
    load_birds_net,
    shipped_decoder,
    train_birds,
    train_decoder,
    train_digits,
    train_fashion,
    train_mirror,
    train_painter,
    train_repainter,
)
from finecf.training.train import thread_count

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Why was a fine-grained image classifier wrong, and what would have made it right?",
)

SMDL_BATCH = 4
MIRROR_BATCH = 8
METHODS = ("fgvce", "smdl", "mirror")
OPTIONS_OF = {
    "fgvce": ("preset", "max_edits", "minimal"),
    "smdl": ("regions", "region_count", "search", "max_regions", "baseline"),
    "mirror": ("decoder", "steps", "reflection", "corrections", "trim", "just_across", "repainter"),
}
"""The options of `explain` that only one method has."""
OF_OWN = ("weights", "pair", "labels", "layer", "size", "normalise", "device", "learning_rate", "reflection", "flip")
OF_SHIPPED = ("on", "classifier", "images")
"""The options of `train` that need --model, and those that --model excludes."""
OF_BOTH = ("on", "classifier", "steps", "images", "data", "model", *OF_OWN[:-2])
TRAINED = {
    "birds": ("epochs", "images", "workers"),
    "digits": ("epochs",),
    "fashion": ("epochs", "data"),
    "mirror": (*OF_BOTH, "reflection", "weight", "spatial_prior", "previews"),
    "repainter": (*OF_BOTH, "flip"),
}
"""What can be trained, and the options of `train` that not all of them have."""
EVALUATE_IMAGES = 20_000
SLOW_HEAD_EDITS = 10

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

OutDir = Annotated[Path, typer.Option("--out", help="Folder for the figures and report.html.")]


def _sentences(command: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Print what the library refuses as one sentence, and end with code 2."""

    @functools.wraps(command)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return command(*args, **kwargs)
        # A FloatingPointError is a training that became NaN.
        except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
            Console(stderr=True, highlight=False).print(f"[bold red]finecf:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as stop:
            Console(stderr=True, highlight=False).print(escape(str(stop) or "interrupted"), soft_wrap=True)
            raise typer.Exit(130) from stop

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
    runs: dict[str, Callable[[int], list[Run]]] = {"birds": bird_runs, "digits": digit_runs}
    if dataset not in runs:
        raise ValueError(f"--dataset must be one of {', '.join(runs)}; got {dataset!r}")
    _make_folder(out)
    first, *more = runs[dataset](n)
    first.publish(out, [("mirror" if isinstance(run.explainer, MirrorCFE) else "smdl", run) for run in more])
    rich.print(f"The whole demo took {time.perf_counter() - started:.0f} s.")
    if any(INTERRUPTED in run.totals for run in more):
        raise typer.Exit(130)


@app.command()
@_sentences
def explain(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="torchvision:NAME, or FILE.py:FUNCTION that returns a torch.nn.Module.")],
    data: Annotated[Path, typer.Option(help="Folder of images, one subfolder for each class.")],
    method: Annotated[str, typer.Option(help=f"The explainer: {', '.join(METHODS)}.")] = "fgvce",
    weights: Annotated[Path | None, typer.Option(help="State dict: .safetensors, or a file of torch.save.")] = None,
    image: Annotated[Path | None, typer.Option(help="Explain this image; fgvce and mirror need --target.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The class that --image is to be taken for; default for smdl: what it is taken for."),
    ] = None,
    all_mistakes: Annotated[
        bool, typer.Option("--all-mistakes", help="Explain every wrongly classified image.")
    ] = False,
    preset: Annotated[str, typer.Option(help=f"fgvce: one of {', '.join(PRESETS)}.")] = "fgvce",
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
        int | None,
        typer.Option(
            min=1, help="fgvce: most replacements in one image; default: all cells, or 10 if the head is not linear."
        ),
    ] = None,
    minimal: Annotated[
        bool, typer.Option(help="fgvce: afterwards remove the replacements that are not needed.")
    ] = True,
    regions: Annotated[str, typer.Option(help=f"smdl: {', '.join(DIVISIONS)}.")] = "slico",
    region_count: Annotated[int, typer.Option(min=2, help="smdl: how many regions to divide an image into.")] = 49,
    search: Annotated[
        str, typer.Option(help=f"smdl: {', '.join(SEARCHES)}; greedy is exact, the others are quicker.")
    ] = "greedy",
    max_regions: Annotated[
        int | None, typer.Option(min=1, help="smdl: most regions to rank in one image; default: all.")
    ] = None,
    baseline: Annotated[str, typer.Option(help=f"smdl: what hidden regions show, {', '.join(BASELINES)}.")] = "black",
    decoder: Annotated[
        Path | None,
        typer.Option(help="mirror: the file that MirrorCFE.fit or `finecf train mirror` wrote for this model."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=2, help="mirror: images from k = 0 to k = 1; the figure shows some, the animation all.")
    ] = MIRROR_STEPS,
    reflection: Annotated[
        str | None, typer.Option(help=f"mirror: {', '.join(REFLECTIONS)}; default: as the decoder's file says.")
    ] = None,
    corrections: Annotated[
        int, typer.Option(min=0, help="mirror: how often at most to draw an image anew for what it is short of.")
    ] = CORRECTIONS,
    trim: Annotated[
        bool, typer.Option("--trim", help="mirror: also look for a small part of the change that suffices.")
    ] = False,
    just_across: Annotated[
        bool,
        typer.Option("--just-across", help="mirror: with --trim, cross the boundary, whatever a blur does."),
    ] = False,
    repainter: Annotated[
        Path | None,
        typer.Option(help="mirror: with --trim, paint marks of the target in first: the file of Repainter.save."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or cuda:N.")] = "cpu",
    figures: Annotated[bool, typer.Option(help="Draw a figure for each image.")] = True,
    save: Annotated[bool, typer.Option(help="Also keep each explanation, for finecf.load.")] = False,
) -> None:
    """Explain the mistakes of your model on your images."""
    _check_method(method, context)
    if (image is None) == (not all_mistakes):
        raise ValueError("give --image FILE --target NAME, or --all-mistakes")
    if image is not None and target is None and method != "smdl":
        raise ValueError("--image needs --target NAME, the class that the image is to be taken for")
    if image is not None and not image.is_file():
        raise FileNotFoundError(f"--image: there is no file {image}")
    if decoder is not None and not decoder.is_file():
        raise FileNotFoundError(f"--decoder: there is no file {decoder}")
    if repainter is not None and not repainter.is_file():
        raise FileNotFoundError(f"--repainter: there is no file {repainter}")
    if repainter is not None and not trim:
        raise ValueError("--repainter is where --trim starts from: give both")
    if just_across and not trim:
        raise ValueError("--just-across says how far --trim goes: give both")
    for option, value, allowed in (
        ("preset", preset, PRESETS),
        ("regions", regions, DIVISIONS),
        ("search", search, SEARCHES),
        ("baseline", baseline, BASELINES),
        ("reflection", reflection, REFLECTIONS),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"--{option} must be one of {', '.join(allowed)}; got {value!r}")
    place = device_named(device)
    _make_folder(out)
    images, classifier = user_classifier(model, weights, data, labels, layer, size, normalise, place)
    names = index_of_folders(images, classifier)
    wanted = None if target is None else [classifier.class_index(target)]
    chosen = [i for i in range(len(images)) if wanted is None or names[images.labels[i]] in wanted]
    skipped = ""
    mistakes: list[int] = []
    explainer: FGVCE | SMDL | MirrorCFE
    if method == "smdl":
        black = classifier.prepare(torch.zeros(1, 3, size, size))[0, :, 0, 0]
        explainer = SMDL(
            classifier,
            regions,
            search,
            region_count=region_count,
            max_regions=max_regions,
            baseline=baseline,
            black=black,  # of the images as the model takes them: not zero where they are normalised
        )
        intro = about_smdl(baseline, target, all_mistakes)
        if all_mistakes:
            mistakes = misclassified(classifier, images, chosen, names)
    elif method == "mirror":
        explainer = _mirror(classifier, decoder, size, reflection, corrections, repainter)
        intro = about_mirror()
        if all_mistakes:
            mistakes = misclassified(classifier, images, chosen, names)
    else:
        if not chosen:
            raise ValueError(f"{data} holds no images of class {target!r} to take replacements from")
        bank = CandidateBank.from_loader(classifier, batches(images, chosen, names), progress=None)
        if max_edits is None:
            max_edits = _default_edits(classifier, images.images(chosen[:1]))
        explainer = FGVCE(classifier, bank, preset, max_edits=max_edits, minimal=minimal)
        intro = about_fgvce(preset, target)
        if all_mistakes:
            kept = set(bank.sources)
            # Every image that the bank did not keep was classified as something else.
            wrong = [i for i in chosen if str(images.paths[i]) not in kept]
            mistakes, skipped = _with_references(wrong, [names[images.labels[i]] for i in wrong], bank, classifier)
    run = Run(
        title(method, preset, data, image, target),
        intro,
        explainer,
        figures=figures,
        save=save,
        names=MISTAKES if all_mistakes else PREDICTED if target is None else ASKED,
        options={"steps": steps, "trim": JUST_ACROSS if just_across else trim} if method == "mirror" else {},
        folder=out if method == "mirror" else None,
    )
    if image is not None:
        picture = LabelledImages([image], [0], [str(target)], size).images()
        explain_all(run, [(picture, None if target is None else [target], [str(image)])], 1)
    else:
        slow = {"smdl": SMDL_BATCH, "mirror": MIRROR_BATCH}
        step = slow.get(method, MICRO_BATCH) if place.type == "cpu" else MICRO_BATCH
        explain_all(run, batches(images, mistakes, names, step), len(mistakes))
        run.totals["images looked at"] = str(len(images) if method == "fgvce" else len(chosen))
        if skipped:
            run.totals["skipped"] = skipped
    run.publish(out)
    if INTERRUPTED in run.totals:
        raise typer.Exit(130)


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
        rich.print(table)
    if markdown is not None:
        markdown.write_text(result.markdown(), encoding="utf-8")
        rich.print(f"The tables are in {markdown}.")


@app.command()
@_sentences
def train(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(help="birds, digits, fashion, mirror (a decoder) or repainter (a painter)."),
    ],
    out: Annotated[Path | None, typer.Option(help="The checkpoint to write; default: birds.safetensors, ...")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Not for mirror and repainter.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images to train on (birds, mirror, repainter).")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="fashion: where fashion_mnist.npz is; --model: images, a subfolder for each class."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="The same number gives the same weights; default: 1, with --model as many as torch."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="birds: processes that draw them.")] = 0,
    on: Annotated[
        str | None,
        typer.Option(help="mirror: digits, birds or fashion, by default digits; repainter: birds."),
    ] = None,
    classifier: Annotated[
        Path | None, typer.Option(help="mirror, repainter: a net's file, instead of the shipped one.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="mirror, repainter: steps of the optimiser.")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--loss-weight", "--weight", help="mirror: a loss's weight, as in triangulation=0; may be repeated."
        ),
    ] = None,
    spatial_prior: Annotated[bool, typer.Option(help="mirror: whether only cells of evidence may change.")] = True,
    previews: Annotated[
        Path | None, typer.Option(help="mirror: a folder for strips, one every 500 steps; each image drawn once.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="mirror, repainter: your own, torchvision:NAME or FILE.py:FUNCTION.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="With --model: its state dict.")] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(help="With --model: classes to lead between, A=B; may be repeated. Default: those it confuses."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="With --model: class names, one a line, as for explain.")] = None,
    layer: Annotated[str | None, typer.Option(help="With --model: the layer whose map is read.")] = None,
    size: Annotated[int, typer.Option(min=8, help="With --model: side in pixels of the images.")] = 224,
    normalise: Annotated[str, typer.Option(help="With --model: imagenet, none, or auto, as for explain.")] = "auto",
    device: Annotated[str, typer.Option(help="With --model: cpu, cuda, or cuda:N.")] = "cpu",
    learning_rate: Annotated[
        float | None, typer.Option(help="With --model: of the optimiser; default: the recipe's.")
    ] = None,
    reflection: Annotated[
        str | None, typer.Option(help=f"mirror with --model: {', '.join(REFLECTIONS)}; default: closed_form.")
    ] = None,
    flip: Annotated[
        bool, typer.Option(help="repainter with --model: mirror images left to right in half of the steps.")
    ] = True,
) -> None:
    """Train the small networks that ship with finecf, or a decoder or a painter for them or for your own model; an
    interrupted training goes on from its file.
    """
    _check_training(what, model, context)
    path = out or Path(f"{what}.safetensors")
    settings: dict[str, Any] = {"seed": seed, "precision": precision, "progress": True}
    if what in ("mirror", "repainter"):
        settings["steps"] = steps
    if what == "mirror":
        named = [each.partition("=") for each in weight or []]
        try:
            losses = {name: float(value) for name, _, value in named}
        except ValueError:
            raise ValueError(f"--loss-weight takes a loss and a number, as in triangulation=0; got {weight}") from None
        settings |= {"weights": losses, "spatial_prior": spatial_prior, "previews": previews}
        checked_weights(losses)  # what follows may look through all images first
    if model is not None:
        if data is None:
            raise ValueError("--model needs --data, a folder of images with one subfolder for each class")
        if reflection is not None:
            one_of("--reflection", reflection, REFLECTIONS)
        one_of("--precision", precision, PRECISIONS)
        checked_checkpoint(path)
        place = device_named(device)
        pictures, wrapped = user_classifier(model, weights, data, labels, layer, size, normalise, place)
        settings |= {"learning_rate": learning_rate}
        settings |= {"reflection": reflection} if what == "mirror" else {"flip": flip}
        settings["about"] = {"images": len(pictures), "command": " ".join(["finecf", *sys.argv[1:]])}
        with thread_count(threads):
            _train_own(what, wrapped, pictures, size, path, pair, settings)
        return
    if what == "repainter":
        meta = train_repainter(on or "birds", path, classifier, images=images, threads=threads or 1, **settings)
        rich.print(f"A painter for {len(meta['pairs'])} pairs of {on or 'birds'}; the checkpoint is {path}.")
        return
    if what == "mirror":
        meta = train_mirror(on or "digits", path, data, classifier, images=images, threads=threads or 1, **settings)
        rich.print(f"A decoder for {len(meta['pairs'])} pairs of {on or 'digits'}; the checkpoint is {path}.")
        return
    settings["threads"] = threads or 1
    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "birds": train_birds,
        "digits": train_digits,
        "fashion": train_fashion,
    }
    if epochs is not None:
        settings["epochs"] = epochs
    if what == "birds":
        settings |= {"workers": workers} | ({} if images is None else {"images": images})
    if what == "fashion":
        if data is None:
            raise ValueError("train fashion needs --data: the folder or file of fashion_mnist.npz")
        settings["data"] = data
    meta = runs[what](out=path, **settings)
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
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("cuda device", ", ".join(devices) or "none here")
    table.add_row("operators", "\n".join(info["operators"]))
    rich.print(table)


def _make_folder(out: Path) -> None:
    """Make the folder of --out before any work is done, or say why it cannot be."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: the folder {out} cannot be made ({error.strerror})") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ValueError(f"--out: the folder {out} cannot be written to")


def _default_edits(classifier: Classifier, images: Tensor) -> int | None:
    """Most edits where the user gave no number: all cells, but few where each edit runs the head."""
    features = classifier.features(images)
    fold = classifier.fold(features)
    if (fold is not None and fold.kind == "linear") or features.shape[-2:].numel() <= SLOW_HEAD_EDITS:
        return None
    rich.print(
        f"The head is not linear, so edits are slow: at most {SLOW_HEAD_EDITS} in one image (--max-edits changes it)."
    )
    return SLOW_HEAD_EDITS


def _with_references(
    mistakes: Sequence[int], labels: Sequence[int], bank: CandidateBank, classifier: Classifier
) -> tuple[list[int], str]:
    """The mistakes whose class the bank has cells of, and a line about the others, if any."""
    held = set(bank.labels.tolist())
    lost = Counter(label for label in labels if label not in held)
    if not lost:
        return list(mistakes), ""
    names = ", ".join(classifier.class_name(label) for label in sorted(lost))
    why = f"of classes without a correctly classified image to take replacements from ({names})"
    if lost.total() == len(mistakes):
        raise ValueError(f"no mistake can be explained: all {len(mistakes)} are {why}")
    line = f"{lost.total()} of {len(mistakes)} mistakes, {why}"
    rich.print(escape(f"Skipped: {line}."))
    return [i for i, label in zip(mistakes, labels, strict=True) if label in held], line


def _confused(classifier: Classifier, predicted: Sequence[int], truth: Sequence[int]) -> list[tuple[int, int]]:
    """The pairs of classes that the model takes for each other, most mistakes first, where a decoder can be trained:
    of each class it needs two images that are recognised.
    """
    both = list(zip(predicted, truth, strict=True))
    recognised = Counter(said for said, label in both if said == label)
    mistakes = Counter((min(each), max(each)) for each in both if each[0] != each[1])
    pairs = [pair for pair, _ in mistakes.most_common() if min(recognised[p] for p in pair) >= 2]
    if not pairs:
        raise ValueError(
            f"the model confuses no two classes on these {len(truth)} images (of which it recognises at least two "
            "each): name pairs to lead between, --pair A=B"
        )
    few = [f"{classifier.class_name(p)} - {classifier.class_name(q)} ({mistakes[p, q]})" for p, q in pairs[:5]]
    more = f" and {len(pairs) - 5} more" if len(pairs) > 5 else ""
    rich.print(escape(f"Pairs that it confuses, and how often: {', '.join(few)}{more}. --pair A=B names others."))
    return pairs


def _train_own(
    what: str,
    classifier: Classifier,
    images: ImageFolderDataset,
    size: int,
    out: Path,
    pair: list[str] | None,
    settings: dict[str, Any],
) -> None:
    """A decoder or a painter for the user's model, trained on the user's images."""
    names = index_of_folders(images, classifier)
    truth = [names[label] for label in images.labels]
    if pair:
        parts = [each.partition("=") for each in pair]
        if not all(q for _, _, q in parts):
            raise ValueError(f"--pair takes two classes, as in --pair A=B; got {pair}")
        pairs = [(classifier.class_index(p), classifier.class_index(q)) for p, _, q in parts]
    else:
        pairs = _confused(classifier, predict(classifier, images, range(len(images)), names), truth)
    black_and_white = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    low, high = classifier.prepare(black_and_white)[:, :, 0, 0].tolist()
    labelled = LabelledImages(images.paths, truth, classifier.class_names or [], size)
    settings["image_range"] = low, high
    if what == "mirror":
        of_pairs = [i for i, label in enumerate(truth) if any(label in each for each in pairs)]
        shown = [of_pairs[number * len(of_pairs) // 8] for number in range(min(8, len(of_pairs)))]
        settings["preview_images"] = images.images(shown), torch.tensor([truth[i] for i in shown])
        meta = train_decoder(classifier, labelled, pairs, out, **settings).meta
        made, use = "decoder", f"--decoder {out}"
    else:
        meta = train_painter(classifier, labelled, pairs, out, **settings).meta
        made, use = "painter", f"--decoder FILE --trim --repainter {out}"
    count = len(meta["pairs"])
    rich.print(f"A {made} for {count} pair{'' if count == 1 else 's'} of classes; the checkpoint is {out}.")
    rich.print(f"`finecf explain --method mirror {use}` explains by it, the model and --size as here.")


def _given(names: Iterable[str], context: typer.Context) -> list[str]:
    """Those of the options that stand on the command line."""
    return [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def _check_training(what: str, model: str | None, context: typer.Context) -> None:
    """Refuse options of `train` that go with another thing to train."""
    if what not in TRAINED:
        *most, last = TRAINED
        raise ValueError(f"train takes {', '.join(most)} or {last}; got {what!r}")
    own, shipped = (_given(names, context) for names in (OF_OWN, OF_SHIPPED))
    for name in _given(dict.fromkeys(("model", *itertools.chain(*TRAINED.values()))), context):
        if name == "epochs" and "steps" in TRAINED[what]:
            raise ValueError(f"train {what} counts steps, not epochs: give --steps")
        if name not in TRAINED[what]:
            option = "loss-weight" if name == "weight" else name.replace("_", "-")
            those = " and ".join(f"`finecf train {other}`" for other, names in TRAINED.items() if name in names)
            raise ValueError(f"--{option} belongs to {those}; got {what}")
    if model is None and own:
        raise ValueError(f"--{own[0].replace('_', '-')} needs --model: it trains for that, on the images of --data")
    data, pictures = (context.params[name] for name in ("data", "on"))
    if "model" in TRAINED[what] and model is None and data is not None and pictures != "fashion":
        raise ValueError("--data belongs to --on fashion, and to --model")
    if model is not None and shipped:
        raise ValueError(f"--{shipped[0]} belongs to the small nets that ship; got --model {model}")


def _check_method(method: str, context: typer.Context) -> None:
    """Refuse a method that is not there, and options of another method than the one chosen."""
    if method not in METHODS:
        raise ValueError(f"--method must be one of {', '.join(METHODS)}; got {method!r}")
    for other, names in OPTIONS_OF.items():
        given = _given(names, context)
        if other != method and given:
            raise ValueError(f"--{given[0].replace('_', '-')} belongs to --method {other}; got --method {method}")


def _mirror(
    classifier: Classifier,
    decoder: Path | None,
    size: int,
    reflection: str | None,
    corrections: int,
    repainter: Path | None,
) -> MirrorCFE:
    """The explainer with the decoder of that file, else with the shipped one for this model."""
    file = decoder or _shipped_for(classifier)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        explainer = MirrorCFE(classifier, file, reflection=reflection, corrections=corrections, repainter=repainter)
    _check_order(explainer)
    for warning in (each for each in said if issubclass(each.category, UserWarning)):
        Console(stderr=True, highlight=False).print(f"[bold]finecf:[/] {escape(str(warning.message))}", soft_wrap=True)
    assert explainer.decoder is not None
    _, height, width = explainer.decoder.shape.image
    if (height, width) != (size, size):
        drawn = f"--size {height}" if height == width else "a decoder for square images"
        raise ValueError(f"--size {size}: this decoder draws images of {height} x {width} pixels; give {drawn}")
    return explainer


def _check_order(explainer: MirrorCFE) -> None:
    """Refuse names that the decoder's file has too, for other outputs: every image would be called something else."""
    classifier, theirs = explainer.classifier, explainer.names_in_file()
    for index in explainer.otherwise_named():
        if theirs[index] in (classifier.class_names or []):
            raise ValueError(
                f"output {index} is {theirs[index]!r} in the decoder's file and {classifier.class_name(index)!r} here: "
                "the names are not in the order of the model's outputs (without --labels they are the subfolders', "
                "sorted). Give --labels FILE with one name a line, in the outputs' order"
            )


def _shipped_for(classifier: Classifier) -> Path:
    """The shipped decoder that was made for this model."""
    for name in ("digits", "birds"):
        try:
            path = shipped_decoder(name)
        except FileNotFoundError:
            continue
        if classifier.differs_from(load_decoder(path)[1]["classifier"]) is None:
            return path
    raise ValueError(
        "--method mirror needs --decoder FILE, a decoder for this very model: `finecf train mirror --model ... "
        "--data ...` trains one (docs/mirror.md); fgvce and smdl need no training"
    )
