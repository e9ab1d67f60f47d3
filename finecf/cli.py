"""The command line: `finecf demo | explain | evaluate | train | bench | doctor`."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, ParamSpec, TypeVar

import rich
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

import finecf
from finecf.data import Digits, ImageFolderDataset, LabelledImages, SyntheticBirds, digits
from finecf.explainers import FGVCE, PRESETS, SMDL, FGVCEExplanation, MirrorCFE
from finecf.explainers._mirror_fit import PRECISIONS, checked_checkpoint, checked_weights
from finecf.explainers._reflection import REFLECTIONS
from finecf.explainers._shared import one_of
from finecf.explainers.fgvce import MICRO_BATCH
from finecf.explainers.mirror_cfe import CORRECTIONS
from finecf.explainers.smdl import BASELINES, SEARCHES
from finecf.metrics import area_before, dilate_masks, share_on_mask, visible_parts
from finecf.metrics.evaluate import Mistake, evaluate_birds, find_mistakes
from finecf.models import CandidateBank, Classifier, wrap
from finecf.models.decoder import load_decoder
from finecf.models.layers import close_names
from finecf.regions import METHODS as DIVISIONS
from finecf.report import Run, Truth
from finecf.report.run import ASKED, MISTAKES, PREDICTED
from finecf.training import (
    load_birds_net,
    load_digits_net,
    shipped_decoder,
    train_birds,
    train_decoder,
    train_digits,
    train_fashion,
    train_mirror,
)
from finecf.training.train import thread_count

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Why was a fine-grained image classifier wrong, and what would have made it right?",
)

DEMO_REFERENCES = 800
DEMO_CHOICE = 3
DEMO_EDITS = 10
DEMO_RANKED = 4
"""So many of the demo's mistakes are also explained by SMDL, which takes a second or two for each."""
SMDL_BATCH = 4
DEMO_DIGIT_PAIRS = ((3, 8), (4, 9), (5, 6))
DEMO_BIRDS_MIRRORED = 2
DEMO_SURE = 0.9
"""The demo mirrors birds of whose class the network is at least so sure."""
DEMO_BIRDS_LOOKED_AT = 40
"""So many test birds are looked through for those that the demo mirrors."""
MIRROR_BATCH = 8
MIRROR_STEPS = 21
INTERRUPTED = "interrupted"
"""The total that says so; such a run is written like any other, and ends with code 130."""
METHODS = ("fgvce", "smdl", "mirror")
OPTIONS_OF = {
    "fgvce": ("preset", "max_edits", "minimal"),
    "smdl": ("regions", "region_count", "search", "max_regions", "baseline"),
    "mirror": ("decoder", "steps", "reflection", "corrections", "trim"),
}
"""The options of `explain` that only one method has."""
OF_OWN = ("weights", "pair", "labels", "layer", "size", "normalise", "device", "learning_rate", "reflection")
OF_SHIPPED = ("on", "classifier", "images", "workers")
"""The options of `train` that need --model, and those that it excludes."""
EVALUATE_IMAGES = 20_000
SLOW_HEAD_EDITS = 10
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
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
    runs: dict[str, Callable[[int], list[Run]]] = {"birds": _demo_birds, "digits": _demo_digits}
    if dataset not in runs:
        raise ValueError(f"--dataset must be one of {', '.join(runs)}; got {dataset!r}")
    _make_folder(out)
    first, *more = runs[dataset](n)
    first.publish(out, [("mirror" if isinstance(run.explainer, MirrorCFE) else "smdl", run) for run in more])
    rich.print(f"The whole demo took {time.perf_counter() - started:.0f} s.")


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
    for option, value, allowed in (
        ("preset", preset, PRESETS),
        ("regions", regions, DIVISIONS),
        ("search", search, SEARCHES),
        ("baseline", baseline, BASELINES),
        ("reflection", reflection, REFLECTIONS),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"--{option} must be one of {', '.join(allowed)}; got {value!r}")
    place = _device(device)
    _make_folder(out)
    images, classifier = _user_classifier(model, weights, data, labels, layer, size, normalise, place)
    names = _index_of_folders(images, classifier)
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
        intro = _about_smdl(baseline, target, all_mistakes)
        if all_mistakes:
            mistakes = _mistakes(classifier, images, chosen, names)
    elif method == "mirror":
        explainer = _mirror(classifier, decoder, size, reflection, corrections)
        intro = _about_mirror()
        if all_mistakes:
            mistakes = _mistakes(classifier, images, chosen, names)
    else:
        if not chosen:
            raise ValueError(f"{data} holds no images of class {target!r} to take replacements from")
        bank = CandidateBank.from_loader(classifier, _batches(images, chosen, names), progress=None)
        if max_edits is None:
            max_edits = _default_edits(classifier, images.images(chosen[:1]))
        explainer = FGVCE(classifier, bank, preset, max_edits=max_edits, minimal=minimal)
        intro = _about(preset, target)
        if all_mistakes:
            kept = set(bank.sources)
            # Every image that the bank did not keep was classified as something else.
            wrong = [i for i in chosen if str(images.paths[i]) not in kept]
            mistakes, skipped = _with_references(wrong, [names[images.labels[i]] for i in wrong], bank, classifier)
    run = Run(
        _title(method, preset, data, image, target),
        intro,
        explainer,
        figures=figures,
        save=save,
        names=MISTAKES if all_mistakes else PREDICTED if target is None else ASKED,
        options={"steps": steps, "trim": trim} if method == "mirror" else {},
        folder=out if method == "mirror" else None,
    )
    if image is not None:
        picture = LabelledImages([image], [0], [str(target)], size).images()
        _explain_all(run, [(picture, None if target is None else [target], [str(image)])], 1)
    else:
        slow = {"smdl": SMDL_BATCH, "mirror": MIRROR_BATCH}
        step = slow.get(method, MICRO_BATCH) if place.type == "cpu" else MICRO_BATCH
        _explain_all(run, _batches(images, mistakes, names, step), len(mistakes))
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
    what: Annotated[str, typer.Argument(help="birds, digits, fashion, or mirror (a decoder for Mirror-CFE).")],
    out: Annotated[Path | None, typer.Option(help="The checkpoint to write; default: birds.safetensors, ...")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Not for mirror.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Images to train on (birds, mirror).")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where fashion_mnist.npz is; with --model the folder of images, a subfolder for each class."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="The same number gives the same weights; default: 1, with --model as many as torch."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that draw birds.")] = 0,
    on: Annotated[str, typer.Option(help="mirror: digits, birds or fashion.")] = "digits",
    classifier: Annotated[Path | None, typer.Option(help="mirror: a net's file, instead of the shipped one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="mirror: steps of the optimiser.")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--loss-weight", "--weight", help="mirror: a loss's weight, as in triangulation=0; may be repeated."
        ),
    ] = None,
    spatial_prior: Annotated[bool, typer.Option(help="mirror: whether only cells of evidence may change.")] = True,
    previews: Annotated[
        Path | None, typer.Option(help="mirror: a folder for strips of images, one every 500 steps.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="mirror: your own, torchvision:NAME or FILE.py:FUNCTION, as for explain.")
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
        str | None, typer.Option(help=f"With --model: {', '.join(REFLECTIONS)}; default: closed_form.")
    ] = None,
) -> None:
    """Train the small networks that ship with finecf, or a decoder for them or for your own model; an interrupted
    training goes on from its file.
    """
    _check_training(what, model, context)
    path = out or Path(f"{what}.safetensors")
    settings: dict[str, Any] = {"seed": seed, "precision": precision, "progress": True}
    if what == "mirror":
        if epochs is not None:
            raise ValueError("train mirror counts steps, not epochs: give --steps")
        named = [each.partition("=") for each in weight or []]
        try:
            losses = {name: float(value) for name, _, value in named}
        except ValueError:
            raise ValueError(f"--loss-weight takes a loss and a number, as in triangulation=0; got {weight}") from None
        settings |= {"steps": steps, "weights": losses, "spatial_prior": spatial_prior, "previews": previews}
        if model is not None:
            if data is None:
                raise ValueError("--model needs --data, a folder of images with one subfolder for each class")
            if reflection is not None:
                one_of("--reflection", reflection, REFLECTIONS)
            one_of("--precision", precision, PRECISIONS)  # what follows may look through all images first
            checked_weights(losses)
            checked_checkpoint(path)
            place = _device(device)
            pictures, wrapped = _user_classifier(model, weights, data, labels, layer, size, normalise, place)
            settings |= {"learning_rate": learning_rate, "reflection": reflection}
            settings["about"] = {"images": len(pictures), "command": " ".join(["finecf", *sys.argv[1:]])}
            with thread_count(threads):
                _train_own(wrapped, pictures, size, path, pair, settings)
            return
        meta = train_mirror(on, path, data, classifier, images=images, threads=threads or 1, **settings)
        rich.print(f"A decoder for {len(meta['pairs'])} pairs of {on}; the checkpoint is {path}.")
        return
    settings["threads"] = threads or 1
    runs: dict[str, Callable[..., dict[str, Any]]] = {
        "birds": train_birds,
        "digits": train_digits,
        "fashion": train_fashion,
    }
    if what not in runs:
        raise ValueError(f"train takes {', '.join(runs)} or mirror; got {what!r}")
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


def _demo_birds(n: int) -> list[Run]:
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
    ranking = Run(
        "Which regions speak for the true class?",
        "Some of these mistakes, seen by another method. SMDL divides the image "
        "into regions and puts them into the order in which they speak for the true class; regions that are left out "
        "are blurred. The column 'parts at' says how much of the image stands before the parts that really tell the "
        "two classes apart.",
        SMDL(classifier, search="window", baseline="blur"),
    )
    for mistake in mistakes:
        item = mistake.item
        (result,) = run.explain(item.tensor[None], [mistake.target], [item.source])
        differing = torch.from_numpy(item.mask(mistake.visible))
        run.truths.append(Truth(differing, " and ".join(mistake.visible)))
        assert isinstance(result, FGVCEExplanation)
        grown = dilate_masks(differing, result.grid)
        run.grades.append(share_on_mask([edit.cell for edit in result.edits], grown, result.grid))
    ranking.truths = run.truths[:DEMO_RANKED]
    tensors = ((m.item.tensor[None], [m.target], [m.item.source]) for m in mistakes[:DEMO_RANKED])
    _explain_all(ranking, tensors, len(ranking.truths), "ranking regions")
    for result, truth in zip(ranking.results, ranking.truths, strict=False):  # after Ctrl-C there are fewer results
        ranking.grades += area_before(result.maps["saliency"][None], truth.mask[None]).tolist()
    run.totals["test images looked at"] = str(looked_at)
    return [run, ranking, *_mirrored("birds", classifier, lambda mirror: _look_alikes(mirror, test, n))]


def _varied(mistakes: Sequence[Mistake]) -> list[Mistake]:
    """The mistakes, the first of every pair of classes before the second of any."""
    seen: Counter[tuple[int, int]] = Counter()
    ranked = []
    for mistake in mistakes:
        pair = (mistake.predicted, mistake.target)
        ranked.append((seen[pair], mistake))
        seen[pair] += 1
    return [mistake for _, mistake in sorted(ranked, key=lambda entry: entry[0])]


def _demo_digits(n: int) -> list[Run]:
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
    ranking = Run(
        "Which regions speak for the true digit?",
        "Some of these mistakes, seen by another method. SMDL divides the image into regions and puts them into the "
        "order in which they speak for the true class; regions that are left out are black, like the ground.",
        SMDL(classifier, "grid", region_count=16),
    )
    for i in wrong[:n]:
        image, label, source = test[i]
        run.explain(image[None], [label], [source])
    some = [test[i] for i in wrong[: min(n, DEMO_RANKED)]]
    _explain_all(ranking, ((x[None], [label], [source]) for x, label, source in some), len(some), "ranking regions")
    run.totals["test images looked at"] = str(len(test))
    return [run, ranking, *_mirrored("digits", classifier, lambda _: _digit_pairs(classifier, test, n))]


class _ToMirror(NamedTuple):
    """A correctly classified image that the demo leads to another class."""

    image: Tensor
    target: int
    source: str
    truth: Truth | None = None


def _mirrored(name: str, classifier: Classifier, choose: Callable[[MirrorCFE], Sequence[_ToMirror]]) -> list[Run]:
    """Mirror-CFE on a few images, where its decoder ships with finecf; else a line that says that it does not."""
    try:
        path = shipped_decoder(name)
    except FileNotFoundError as missing:
        rich.print(f"Mirror-CFE is left out: {escape(str(missing))}.")
        return []
    explainer = MirrorCFE(classifier, path)
    chosen = choose(explainer)
    run = Run(
        "How must an image change to be taken for something else?",
        f"Some {name} that the network gets right. {_about_mirror()}",
        explainer,
        names=ASKED,
        options={"steps": MIRROR_STEPS, "trim": True},
    )
    run.truths = [each.truth for each in chosen if each.truth is not None]
    _explain_all(run, ((x[None], [to], [source]) for x, to, source, _ in chosen), len(chosen), "mirroring")
    if run.truths:
        for result, truth in zip(run.results, run.truths, strict=False):  # after Ctrl-C there are fewer results
            run.grades += area_before(result.maps["change"][None], truth.mask[None]).tolist()
    return [run]


def _digit_pairs(classifier: Classifier, test: Digits, n: int) -> list[_ToMirror]:
    """For each pair the first test digit that the network gets right."""
    predicted, labels = classifier.logits(test.batch()).argmax(1), torch.from_numpy(test.labels)
    chosen = []
    for label, other in DEMO_DIGIT_PAIRS[:n]:
        for index in ((predicted == label) & (labels == label)).nonzero()[:1, 0].tolist():
            image, _, source = test[index]
            chosen.append(_ToMirror(image, other, source))
    return chosen


def _look_alikes(mirror: MirrorCFE, test: SyntheticBirds, n: int) -> list[_ToMirror]:
    """Birds of different families that the network gets right, each to be led to the nearest class of its family."""
    items = [test[index] for index in range(min(DEMO_BIRDS_LOOKED_AT, len(test)))]
    images = torch.stack([item.tensor for item in items])
    distances = mirror.class_distances(images)
    sure = (mirror.classifier.logits(mirror.classifier.prepare(images)).softmax(1).amax(1) >= DEMO_SURE).tolist()
    families: set[int] = set()
    chosen: list[_ToMirror] = []
    for item, source, distance, certain in zip(items, distances.source.tolist(), distances.distance, sure, strict=True):
        family = test.family_of(item.label)
        enough = len(chosen) == min(n, DEMO_BIRDS_MIRRORED)
        if source != item.label or not certain or family in families or enough:
            continue
        others = [label for label in test.families[family] if label != item.label]
        target = min(others, key=lambda label: float(distance[label]))
        redrawn = test.redraw(item, target)
        shown = visible_parts(item.part_masks, test.differing_parts(item.label, target))
        if not shown:
            continue
        families.add(family)
        differing = torch.from_numpy(item.mask(shown) | redrawn.mask(shown))
        truth = Truth(differing, " and ".join(shown), redrawn.tensor)
        chosen.append(_ToMirror(item.tensor, target, item.source, truth))
    return chosen


def _user_classifier(
    model: str,
    weights: Path | None,
    data: Path,
    labels: Path | None,
    layer: str | None,
    size: int,
    normalise: str,
    device: torch.device,
) -> tuple[ImageFolderDataset, Classifier]:
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
        module = _from_file(Path(kind), name)
    else:
        raise ValueError(f"--model must be torchvision:NAME or FILE.py:FUNCTION; got {spec!r}")
    if weights is not None:
        try:
            module.load_state_dict(_state_dict(weights, module))
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


def _device(name: str) -> torch.device:
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


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"--labels: there is no file {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _index_of_folders(images: ImageFolderDataset, classifier: Classifier) -> list[int]:
    """The model's class index of each subfolder."""
    return [classifier.class_index(name) for name in images.class_names]


def _batches(
    images: ImageFolderDataset, indices: Iterable[int], names: Sequence[int], step: int = MICRO_BATCH
) -> Iterator[tuple[Tensor, list[int], list[str]]]:
    chosen = list(indices)
    for start in range(0, len(chosen), step):
        own = chosen[start : start + step]
        yield images.images(own), [names[images.labels[i]] for i in own], [str(images.paths[i]) for i in own]


def _predicted(
    classifier: Classifier, images: ImageFolderDataset, chosen: Sequence[int], names: Sequence[int]
) -> list[int]:
    """What the model takes the chosen images for."""
    predicted: list[int] = []
    with _progress() as bar:
        task = bar.add_task("looking for mistakes", total=len(chosen))
        for batch, labels, _ in _batches(images, chosen, names):
            predicted += classifier.logits(classifier.prepare(batch)).argmax(1).tolist()
            bar.advance(task, len(labels))
    return predicted


def _mistakes(
    classifier: Classifier, images: ImageFolderDataset, chosen: Sequence[int], names: Sequence[int]
) -> list[int]:
    """Those of the chosen images that the model takes for something else than their folder says."""
    predicted = _predicted(classifier, images, chosen, names)
    return [i for i, said in zip(chosen, predicted, strict=True) if said != names[images.labels[i]]]


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
    classifier: Classifier,
    images: ImageFolderDataset,
    size: int,
    out: Path,
    pair: list[str] | None,
    settings: dict[str, Any],
) -> None:
    """A decoder for the user's model, trained on the user's images."""
    names = _index_of_folders(images, classifier)
    truth = [names[label] for label in images.labels]
    if pair:
        parts = [each.partition("=") for each in pair]
        if not all(q for _, _, q in parts):
            raise ValueError(f"--pair takes two classes, as in --pair A=B; got {pair}")
        pairs = [(classifier.class_index(p), classifier.class_index(q)) for p, _, q in parts]
    else:
        pairs = _confused(classifier, _predicted(classifier, images, range(len(images)), names), truth)
    black_and_white = torch.stack([torch.zeros(3, size, size), torch.ones(3, size, size)])
    low, high = classifier.prepare(black_and_white)[:, :, 0, 0].tolist()
    of_pairs = [i for i, label in enumerate(truth) if any(label in each for each in pairs)]
    shown = [of_pairs[number * len(of_pairs) // 8] for number in range(min(8, len(of_pairs)))]
    samples = images.images(shown), torch.tensor([truth[i] for i in shown])
    mirror = train_decoder(
        classifier,
        LabelledImages(images.paths, truth, classifier.class_names or [], size),
        pairs,
        out,
        image_range=(low, high),
        preview_images=samples,
        **settings,
    )
    count = len(mirror.meta["pairs"])
    rich.print(f"A decoder for {count} pair{'' if count == 1 else 's'} of classes; the checkpoint is {out}.")
    rich.print(f"`finecf explain --method mirror --decoder {out}` explains by it, the model and --size as here.")


def _explain_all(
    run: Run,
    batches: Iterable[tuple[Tensor, Sequence[int | str] | None, Sequence[str]]],
    count: int,
    doing: str = "explaining",
) -> None:
    """Explain batch by batch under a progress bar; after Ctrl-C the run holds, and says, what was finished."""
    with _progress() as bar:
        task = bar.add_task(doing, total=count)
        try:
            for batch, targets, sources in batches:
                run.explain(batch, targets, sources)
                bar.advance(task, len(sources))
        except KeyboardInterrupt:
            if not run.results:
                raise
            run.totals[INTERRUPTED] = f"{len(run.results)} of {count} images explained"


def _progress() -> Progress:
    """A bar that is seen to be alive also while one image takes minutes, and that leaves nothing behind."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(SpinnerColumn(), TextColumn("{task.description}"), *columns, transient=True)


def _given(names: Iterable[str], context: typer.Context) -> list[str]:
    """Those of the options that stand on the command line."""
    return [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]


def _check_training(what: str, model: str | None, context: typer.Context) -> None:
    """Refuse options of `train` that go with another thing to train."""
    own, shipped = (_given(names, context) for names in (OF_OWN, OF_SHIPPED))
    if what != "mirror" and model is not None:
        raise ValueError(f"--model belongs to `finecf train mirror`; got {what}")
    if model is None and own:
        raise ValueError(
            f"--{own[0].replace('_', '-')} needs --model, whose decoder is trained on the images of --data"
        )
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
    classifier: Classifier, decoder: Path | None, size: int, reflection: str | None, corrections: int
) -> MirrorCFE:
    """The explainer with the decoder of that file, else with the shipped one for this model."""
    file = decoder or _shipped_for(classifier)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        explainer = MirrorCFE(classifier, file, reflection=reflection, corrections=corrections)
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


def _title(method: str, preset: str, data: Path, image: Path | None, target: str | None) -> str:
    if method == "fgvce":
        return f"{preset} on {data}" if target is None else f"What would make it {target}?"
    if method == "mirror":
        asked = "its true class" if target is None or image is None else target
        return f"What would it have to look like to be {asked}?" + (f" mirror on {data}" if image is None else "")
    if image is not None:
        return "Which regions make the model say so?" if target is None else f"What speaks for {target}?"
    return f"Which regions speak for the true class? smdl on {data}"


def _about_smdl(baseline: str, asked: str | None, mistakes: bool) -> str:
    what = "the true class" if mistakes else "the class that the network named" if asked is None else asked
    hidden = {"black": "black", "mean": "the image's mean colour", "blur": "blurred"}[baseline]
    return (
        "SMDL divides an image into regions and puts them into an order: first the one that, shown alone, speaks most "
        f"for {what}, then whichever adds most to those before it. Regions that are left out are {hidden}. Each figure "
        "shows the order, the few first regions that are enough for the network to name the class, and how the "
        "network's probability moves as regions are shown and hidden."
    )


def _about_mirror() -> str:
    return (
        "Mirror-CFE mirrors the network's own features of an image at the boundary between two classes, step by step "
        "(k from 0 to 1), and a decoder draws the image that belongs to each step. Each figure shows the way from the "
        "class that the network named to the other one: which images should still be the first, which the second, "
        "which of them the network really takes for the second, and what changed until then."
    )


def _about(preset: str, asked: str | None) -> str:
    whose, answer = ("the true class", "gave the right answer") if asked is None else (asked, f"said {asked}")
    return (
        f"Each figure shows which cells of the network's last feature map FG-VCE (preset {preset!r}) replaced by cells "
        f"of real images of {whose} until the network {answer}."
    )
