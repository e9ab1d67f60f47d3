"""The command line on tiny data: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import finecf
from finecf.cli import _commands, _demo, _user, app
from finecf.explainers import Interrupted, Repainter
from finecf.explainers._trim import BLUR, MARGIN
from finecf.explainers.mirror_cfe import CORRECTIONS
from finecf.models.checkpoints import load_tensors, save_tensors
from finecf.models.decoder import MirrorDecoder, load_decoder, shape_of
from finecf.models.painter import Painter, load_painter
from finecf.report.run import Run

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
FILE_MODEL = """
import torch
from torch import nn

class ColourNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, 3, 1))
        self.fc = nn.Linear(3, 3)
        with torch.no_grad():
            self.cells[1].weight.copy_(torch.eye(3)[..., None, None])
            self.cells[1].bias.zero_()
            self.fc.weight.copy_(torch.tensor([[-6., -6., 12.], [-6., 12., -6.], [12., -6., -6.]]))
            self.fc.bias.zero_()

    def forward(self, x):
        return self.fc(self.cells(x).mean((2, 3)))

def build():
    return ColourNet()

def two_kinds():
    net = ColourNet()
    with torch.no_grad():
        net.fc.weight.copy_(net.fc.weight[[1, 0, 2]])
    return net

def not_a_model():
    return 3

def broken():
    raise RuntimeError("no such thing\\nsecond line")

def sized(width, depth, *, name="x"):
    return ColourNet()

class DeepNet(ColourNet):
    def forward(self, x):
        return self.fc(torch.tanh(self.cells(x)).amax((2, 3)))
"""


SEEN_MODEL = """
class Seen(ColourNet):
    def forward(self, x):
        black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
        far = (self.cells(x).mean((2, 3)) - black).abs().sum(1, keepdim=True)
        return torch.cat([torch.zeros_like(far), far, far - 30], 1)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of three colours; a few bear the wrong colour over more than half of them."""
    rng = np.random.default_rng(0)
    names = list(COLOURS)
    for label, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(6):
            picture = np.empty((32, 32, 3))
            picture[:] = COLOURS[name]
            if i == 5:
                picture[:, :20] = COLOURS[names[(label + 1) % 3]]
            noisy = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "model.py").write_text(FILE_MODEL)
    return tmp_path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def explain(folder: Path, *more: object, model: str = "build") -> tuple[int, str]:
    data = ("--data", folder / "data", "--size", 32, "--out", folder / "out")
    return run("explain", "--model", f"{folder / 'model.py'}:{model}", *data, *more)


def test_all_mistakes_are_explained_and_reported(folder: Path) -> None:
    code, output = explain(folder, "--all-mistakes", "--layer", "cells", "--save")
    assert code == 0, output
    assert "3 of 3" in output
    assert max(map(len, output.split("Report:")[0].splitlines())) <= 80
    out = folder / "out"
    assert len(list(out.glob("*.png"))) == 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert "<script" not in page
    assert not [word for word in ('src="http', "src='http", 'href="http') if word in page]
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["is"], row["taken for"]) for row in rows} == {("blue", "green"), ("green", "red"), ("red", "blue")}
    assert all(row["flip"] == "yes" for row in rows)
    saved = [finecf.load(path) for path in sorted(out.glob("*.safetensors"))]
    assert sorted(result.target_name for result in saved) == ["blue", "green", "red"]
    for result in saved:
        for edit in result.edits:
            # The wrong colour covers the left; the repair must be made there, from images of the right class.
            assert edit.cell[1] <= 2
            assert Path(edit.reference_source).parent.name == result.target_name


def test_one_image_is_explained(folder: Path) -> None:
    image = folder / "data" / "red" / "5.png"
    code, output = explain(folder, "--image", image, "--target", "red", "--preset", "goyal", "--no-figures")
    assert code == 0, output
    assert "1 of 1" in output
    assert not list((folder / "out").glob("*.png"))


def test_a_class_that_was_asked_for_is_not_shown_as_the_truth(folder: Path) -> None:
    image = folder / "data" / "red" / "0.png"
    code, output = explain(folder, "--image", image, "--target", "green", "--no-figures")
    assert code == 0, output
    assert "What would make it green?" in output
    assert "images explained: 1" in output
    assert "mistake" not in output
    with (folder / "out" / "table.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["asked"], row["taken for"], row["flip"]) == ("green", "red", "yes")
    page = (folder / "out" / "report.html").read_text()
    assert "by cells of real images of green until the network said green." in page


def test_mistakes_of_a_class_without_references_are_skipped(folder: Path) -> None:
    for i in range(5):
        picture = np.empty((32, 32, 3), dtype=np.uint8)
        picture[:] = COLOURS["red"]
        Image.fromarray(picture).save(folder / "data" / "green" / f"{i}.png")
    code, output = explain(folder, "--all-mistakes", "--no-figures")
    assert code == 0, output
    assert "2 of 2" in output
    said = " ".join(output.split())
    line = "6 of 8 mistakes, of classes without a correctly classified image to take replacements from (green)"
    assert f"Skipped: {line}." in said
    assert f"skipped: {line}" in said
    for name in ("blue", "red"):
        (folder / "data" / name / "5.png").unlink()
    code, output = explain(folder, "--all-mistakes", "--no-figures")
    assert code == 2
    assert "no mistake can be explained: all 6 are of classes without" in output


def test_a_second_run_leaves_no_figures_of_the_first(folder: Path) -> None:
    out = folder / "out"
    assert explain(folder, "--all-mistakes")[0] == 0
    (out / "0001_mine.png").write_bytes(b"of another program")
    first = {path.name for path in out.glob("*.png")}
    image = folder / "data" / "red" / "5.png"
    assert explain(folder, "--image", image, "--target", "red")[0] == 0
    assert len(first) == 4
    assert {path.name for path in out.glob("*.png")} == {"0001_mine.png", "0001_red_5.png"}


def rank(folder: Path, *more: object) -> tuple[int, str, list[dict[str, str]]]:
    """`finecf explain --method smdl` on a grid of few regions, and the table that it wrote."""
    code, output = explain(folder, "--method", "smdl", "--regions", "grid", "--region-count", 16, *more)
    if code == 2:
        return code, output, []
    with (folder / "out" / "table.csv").open() as file:
        return code, output, list(csv.DictReader(file))


def test_smdl_ranks_the_regions_of_all_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, output, rows = rank(folder, "--all-mistakes", "--save")
    assert code == 0, output
    assert max(map(len, output.split("Report:")[0].splitlines())) <= 80
    assert "images looked at: 18" in output
    out = folder / "out"
    assert all(path.stat().st_size > 10_000 for path in out.glob("*.png"))
    assert len(list(out.glob("*.png"))) == 3
    page = (out / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    for word in ("regions that are left out are black", "How to read a figure", "the share of the image that the"):
        assert word.lower() in page.lower()
    assert {(row["is"], row["taken for"]) for row in rows} == {("blue", "green"), ("green", "red"), ("red", "blue")}
    for row, path in zip(rows, sorted(out.glob("*.safetensors")), strict=True):
        result = finecf.load(path)
        assert isinstance(result, finecf.SMDLExplanation)
        assert result.target_name == row["is"]
        assert row["regions"] == f"{result.best_prefix} of 16"
        assert row["area"] == f"{result.best_prefix / 16:.0%}"
        assert row["enough"] == str(result.sufficient_prefix) == "1"
        assert int(row["forwards"]) == result.evaluations
        assert float(row["insertion"]) == pytest.approx(result.insertion_area, abs=0.005)
        assert float(row["deletion"]) == pytest.approx(result.deletion_area, abs=0.005)
        # Black is exact: what the model says of no region at all is what it says of a black image.
        assert float(result.insertion[0]) == pytest.approx(1 / 3, abs=1e-6)
        # The wrong colour covers the left; what speaks for the true class is on the right.
        assert result.order[0] % 4 == 3


def test_smdl_explains_the_prediction_or_the_class_asked_for(folder: Path) -> None:
    image = folder / "data" / "red" / "5.png"
    code, output, (row,) = rank(folder, "--image", image, "--search", "lazy", "--max-regions", 3)
    assert code == 0, output
    assert "Which regions make the model say so?" in output
    assert (row["explained"], row["named"]) == ("blue", "blue")
    assert row["regions"] in ("1 of 16", "2 of 16", "3 of 16")
    assert "the class that the network named" in (folder / "out" / "report.html").read_text()
    code, output, (row,) = rank(folder, "--image", image, "--target", "green", "--baseline", "blur", "--no-figures")
    assert code == 0, output
    assert "What speaks for green?" in output
    assert (row["asked"], row["taken for"]) == ("green", "blue")
    assert not list((folder / "out").glob("*.png"))  # the figure of the run before is gone


def decoder_file(folder: Path, model: torch.nn.Module | None = None, side: int = 32, name: str = "decoder") -> Path:
    """An untrained decoder for the folder's model, or another one."""
    path = folder / f"{name}.safetensors"
    net = _user.from_file(folder / "model.py", "build") if model is None else model
    classifier = finecf.wrap(net.eval(), class_names=["a", "b", "c"] if model is None else None)
    images = torch.zeros(1, 3, side, side)
    classifier.logits(images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        explainer = finecf.MirrorCFE(classifier, MirrorDecoder(shape_of(classifier, images[0]), width=4, most=8))
    explainer.save(path)
    return path


def mirror(folder: Path, *more: object) -> tuple[int, str, list[dict[str, str]]]:
    """`finecf explain --method mirror`, and the table that it wrote."""
    code, output = explain(folder, "--method", "mirror", *more)
    if code:
        return code, output, []
    with (folder / "out" / "table.csv").open() as file:
        return code, output, list(csv.DictReader(file))


def test_mirror_draws_the_way_to_the_true_class(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    decoder = ("--decoder", decoder_file(folder))
    code, output, rows = mirror(folder, "--all-mistakes", "--steps", 5, "--save", *decoder)
    assert code == 0, output
    assert max(map(len, output.split("Report:")[0].splitlines())) <= 80
    assert "images looked at: 18" in output
    assert "*.gif" in "".join(output.split())  # a long path may break the line anywhere
    assert {(row["is"], row["taken for"]) for row in rows} == {("blue", "green"), ("green", "red"), ("red", "blue")}
    assert {row["k*"] for row in rows} == {"0.50"}
    out = folder / "out"
    for kind in ("png", "gif"):
        assert len(list(out.glob(f"*.{kind}"))) == 3
    for row, path in zip(rows, sorted(out.glob("*.safetensors")), strict=True):
        result = finecf.load(path)
        assert isinstance(result, finecf.MirrorExplanation)
        assert result.target_name == row["is"]
        assert result.images.shape == (5, 3, 32, 32)  # whole in the file, whatever the run keeps
    for path in out.glob("*.gif"):
        with Image.open(path) as moving:
            assert moving.n_frames >= 2 * 5 - 2
    page = (out / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == page.count("data:image/jpeg;base64,") == 3
    assert "mirrors the network&#39;s own features" in page
    assert "<script" not in page

    files = sorted(out.glob("*.safetensors"))
    assert all(finecf.load(path).trimmed_image is None for path in files)
    code, output, _ = mirror(folder, "--all-mistakes", *decoder, "--trim", "--save", "--no-figures")
    assert code == 0, output
    found = [finecf.load(path) for path in files]
    assert [result.trimmed_image is not None for result in found] == [result.mirror_valid for result in found]
    assert any(result.mirror_valid for result in found)

    image = ("--image", folder / "data" / "red" / "0.png", "--target", "green")
    code, output, (row,) = mirror(folder, *image, *decoder, "--reflection", "two_class", "--corrections", 1, "--save")
    assert code == 0, output
    used = {finecf.load(path).corrections for path in out.glob("*.safetensors")}
    assert used == {1, CORRECTIONS}  # the default, in the run before
    assert "What would it have to look like to be green?" in output
    assert (row["asked"], row["taken for"]) == ("green", "red")
    (path,) = out.glob("*.gif")  # those of the run before are gone
    with Image.open(path) as moving:
        assert moving.n_frames >= 2 * 21 - 2


def test_mirror_trims_on_top_of_a_repainted_image(folder: Path) -> None:
    net = _user.from_file(folder / "model.py", "build")
    classifier = finecf.wrap(net.eval(), class_names=["a", "b", "c"])
    classifier.logits(torch.zeros(1, 3, 32, 32))
    painter, strange = folder / "painter.safetensors", folder / "strange.safetensors"
    Repainter(classifier, Painter(3, window=16, widths=(8, 8))).save(painter)
    other = finecf.wrap(finecf.training.load_digits_net()[0])
    Repainter(other, Painter(10, window=16, widths=(8, 8))).save(strange)
    decoder = ("--decoder", decoder_file(folder))
    code, output, rows = mirror(
        folder, "--all-mistakes", "--steps", 3, "--save", *decoder, "--trim", "--repainter", painter
    )
    assert code == 0, output
    found = [finecf.load(path) for path in (folder / "out").glob("*.safetensors")]
    assert len(found) == len(rows) == 3
    assert all(each.repainted_image is not None for each in found)
    whole = ("--all-mistakes", "--steps", 3, "--save", "--no-figures", *decoder, "--trim")
    code, output, _ = mirror(folder, *whole, "--just-across", "--repainter", painter)
    assert code == 0, output
    across = [finecf.load(path) for path in (folder / "out").glob("*.safetensors")]
    asked = [
        {(each.trimmed_margin, each.trimmed_blur) for each in some if each.mirror_valid} for some in (found, across)
    ]
    assert asked == [{(MARGIN, BLUR)}, {(0.0, 0.0)}]
    for arguments, message in (
        (("--repainter", painter), "--repainter is where --trim starts from: give both"),
        (("--just-across",), "--just-across says how far --trim goes: give both"),
        (("--trim", "--repainter", folder / "none"), f"--repainter: there is no file {folder / 'none'}"),
        (("--trim", "--repainter", strange), "was made for another classifier"),
        (("--trim", "--repainter", decoder[1]), "holds no painter"),
    ):
        code, output, _ = mirror(folder, "--all-mistakes", *decoder, *arguments)
        assert code == 2
        assert message in " ".join(output.split())
        assert "Traceback" not in output


def test_a_painter_is_trained(tmp_path: Path) -> None:
    out = tmp_path / "painter.safetensors"
    code, output = run("train", "repainter", "--steps", 2, "--images", 80, "--out", out)
    assert code == 0, output
    told = f"A painter for 30 pairs of birds; the checkpoint is {out}."
    assert told.replace(" ", "") in "".join(output.split())  # a long path is broken anywhere
    _, meta = load_painter(out)
    wanted = "finecf train repainter --on birds --seed 0 --precision float32 --threads 1 --steps 2 --images 80"
    assert (meta["command"], meta["images"], meta["steps_done"]) == (wanted, 80, 2)
    for arguments, message in (
        (("repainter", "--on", "digits"), "painters are trained on birds; got 'digits'"),
        (("repainter", "--epochs", 3), "train repainter counts steps, not epochs: give --steps"),
        (("repainter", "--loss-weight", "feature=0"), "--loss-weight belongs to `finecf train mirror`; got repainter"),
        (("repainter", "--previews", tmp_path), "--previews belongs to `finecf train mirror`; got repainter"),
        (("repainter", "--data", tmp_path), "--data belongs to --on fashion, and to --model"),
        (("digits", "--data", tmp_path), "--data belongs to `finecf train fashion` and `finecf train mirror` and"),
        (("repainter", "--workers", 2), "--workers belongs to `finecf train birds`; got repainter"),
        (("digits", "--images", 3), "--images belongs to `finecf train birds` and `finecf train mirror` and"),
        (("mirror", "--data", tmp_path), "--data belongs to --on fashion, and to --model"),
        (("birds", "--steps", 3), "--steps belongs to `finecf train mirror` and `finecf train repainter`; got birds"),
    ):
        code, output = run("train", *arguments, "--out", out)
        assert code == 2
        assert message in " ".join(output.split())


def train_own(folder: Path, *more: object, model: str = "build", what: str = "mirror") -> tuple[int, str]:
    """`finecf train mirror` or `repainter` for the model and the images of the folder."""
    own = ("--model", f"{folder / 'model.py'}:{model}", "--data", folder / "data", "--out", folder / "own.safetensors")
    return run("train", what, *own, "--steps", 2, *more)


def test_a_decoder_for_ones_own_model_is_trained_and_explains(folder: Path) -> None:
    code, output = train_own(folder, "--size", 32)
    assert code == 0, output
    # Each colour is taken for one other once; in these three pairs each class has five images that are recognised.
    for pair in ("blue - green (1)", "green - red (1)", "blue - red (1)"):
        assert pair in " ".join(output.split())
    assert "A decoder for 3 pairs of classes" in " ".join(output.split())
    decoder = ("--decoder", folder / "own.safetensors")
    code, output, rows = mirror(folder, "--all-mistakes", "--steps", 3, "--no-figures", *decoder)
    assert code == 0, output
    assert len(rows) == 3
    assert "was not trained" not in output

    # The order of the outputs is that of --labels, and images are scaled as the model takes them.
    (folder / "names").write_text("green\nblue\nred\n")
    scaled = ("--labels", folder / "names", "--normalise", "imagenet", "--pair", "blue=red", "--device", "cpu")
    code, output = train_own(folder, "--size", 72, *scaled, "--threads", 1, model="two_kinds")
    assert code == 0, output
    assert "A decoder for 1 pair of classes" in " ".join(output.split())
    net, meta = load_decoder(folder / "own.safetensors")
    assert (meta["pairs"], meta["classes"]) == ([[1, 2]], ["blue", "red"])
    assert meta["recipe"]["conditional"]  # the recipe for photographs
    assert (meta["images"], meta["threads"], meta["recipe"]["steps"]) == (18, 1, 2)
    assert net.shape.image == (3, 72, 72)
    mean, deviation = _user.IMAGENET
    torch.testing.assert_close(net.low.flatten(), (0 - mean) / deviation)
    torch.testing.assert_close(net.high.flatten(), (1 - mean) / deviation)

    # Sides that do not halve, and another reflection, which moves all cells alike.
    code, output = train_own(folder, "--size", 75, "--pair", "blue=red", "--reflection", "lbfgs", "--steps", 1)
    assert code == 0, output
    net, meta = load_decoder(folder / "own.safetensors")
    assert (net.shape.image, net.subpixel) == ((3, 75, 75), 1)
    assert (meta["reflection"], meta["recipe"]["reflection"], meta["recipe"]["shift"]) == ("lbfgs", "lbfgs", "uniform")


def test_a_painter_for_ones_own_model_is_trained_and_explains(folder: Path) -> None:
    code, output = train_own(folder, "--size", 32, "--pair", "blue=red", "--pair", "green=red")
    assert code == 0, output
    (folder / "own.safetensors").rename(folder / "decoder.safetensors")
    scaled = ("--size", 40, "--normalise", "imagenet", "--no-flip", "--learning-rate", 1e-3, "--seed", 3)
    code, output = train_own(folder, *scaled, "--pair", "blue=red", what="repainter", model="two_kinds")
    assert code == 0, output
    repainter, meta = load_painter(folder / "own.safetensors")
    assert (len(meta["pairs"]), sorted(meta["classes"])) == (1, ["blue", "red"])
    told = {"steps": 2, "flip": False, "seed": 3, "learning_rate": 1e-3}
    assert meta["images"] == 18
    assert {name: meta["recipe"][name] for name in told} == told
    assert repainter.window == 32
    mean, deviation = _user.IMAGENET
    torch.testing.assert_close(repainter.low.flatten(), (0 - mean) / deviation)

    code, output = train_own(folder, "--size", 32, what="repainter")
    assert code == 0, output
    assert "A painter for 3 pairs of classes" in " ".join(output.split())
    assert "--decoder FILE --trim --repainter" in output
    files = ("--decoder", folder / "decoder.safetensors", "--trim", "--repainter", folder / "own.safetensors")
    code, output, rows = mirror(folder, "--all-mistakes", "--steps", 3, "--no-figures", *files)
    assert code == 0, output
    assert len(rows) == 3


def test_a_training_that_explodes_ends_with_a_sentence(folder: Path) -> None:
    code, output = train_own(folder, "--size", 32, "--learning-rate", 1e30, "--pair", "blue=red", "--steps", 4)
    assert code == 2
    assert "training stopped" in output
    assert "Try a smaller learning_rate" in " ".join(output.split())
    assert "Traceback" not in output


def test_what_a_decoder_for_ones_own_model_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is found out after all images were looked through."""

    def too_late(*_: object) -> list[int]:
        raise AssertionError("the images were looked through")

    predicted = _commands.predict
    monkeypatch.setattr(_commands, "predict", too_late)
    model = ("--model", f"{folder / 'model.py'}:build")
    data = ("--data", folder / "data")
    for arguments, message in (
        (("mirror", *model), "--model needs --data, a folder of images"),
        (("birds", *model, *data), "--model belongs to `finecf train mirror` and `finecf train repainter`; got birds"),
        (("repainter", *model), "--model needs --data, a folder of images"),
        (("repainter", *model, *data, "--reflection", "lbfgs"), "--reflection belongs to `finecf train mirror`; got"),
        (("repainter", *model, *data, "--on", "birds"), "--on belongs to the small nets that ship"),
        (("repainter", *model, *data, "--precision", "half"), "--precision must be one of float32, bfloat16"),
        (("repainter", *model, *data, "--pair", "red"), "--pair takes two classes, as in --pair A=B; got ['red']"),
        (("repainter", "--no-flip"), "--flip needs --model"),
        (("repainter", *data), "--data belongs to --on fashion, and to --model"),
        (("mirror", *model, *data, "--no-flip"), "--flip belongs to `finecf train repainter`; got mirror"),
        (("mirror", *data, "--pair", "red=blue"), "--pair needs --model"),
        (("mirror", *data, "--learning-rate", 1), "--learning-rate needs --model"),
        (("mirror", *model, *data, "--on", "birds"), "--on belongs to the small nets that ship"),
        (("mirror", *model, *data, "--precision", "half"), "--precision must be one of float32, bfloat16; got 'half'"),
        (("mirror", *model, *data, "--reflection", "two"), "--reflection must be one of closed_form, lbfgs, two_class"),
        (("mirror", *model, *data, "--loss-weight", "size"), "--loss-weight takes a loss and a number"),
        (("mirror", *model, *data, "--out", folder / "data"), "checkpoint is a file for the decoder"),
        (("mirror", *model, *data, "--pair", "red"), "--pair takes two classes, as in --pair A=B; got ['red']"),
        (("mirror", *model, *data, "--pair", "red=pink"), "pink"),
        (("mirror", *model, *data, "--pair", "red=red"), "holds one class twice"),
        (("mirror", *model, *data, "--weight", "size=1"), "unknown loss 'size'"),
    ):
        code, output = run("train", "--out", folder / "own.safetensors", *arguments)
        assert code == 2, output
        assert message in " ".join(output.split())
        assert not list(folder.glob("own.*"))
    monkeypatch.setattr(_commands, "predict", predicted)
    for label in COLOURS:
        (folder / "data" / label / "5.png").unlink()
    code, output = train_own(folder, "--size", 32)
    assert code == 2
    assert "the model confuses no two classes on these 15 images" in " ".join(output.split())


def test_mirror_says_which_decoder_it_needs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = ("--image", folder / "data" / "red" / "0.png", "--no-figures")
    known = (*image, "--target", "green")
    other = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    other.append(torch.nn.Linear(4, 3))
    small, strange = decoder_file(folder, side=16, name="small"), decoder_file(folder, other, name="other")
    for arguments, message in (
        (known, "--method mirror needs --decoder FILE, a decoder for this very model"),
        ((*known, "--decoder", folder / "none"), f"--decoder: there is no file {folder / 'none'}"),
        ((*known, "--decoder", small), "--size 32: this decoder draws images of 16 x 16 pixels; give --size 16"),
        ((*known, "--decoder", strange), "was made for another classifier"),
        ((*known, "--decoder", folder / "model.py"), "model.py"),
        ((*known, "--steps", 3, "--method", "fgvce"), "--steps belongs to --method mirror; got --method fgvce"),
        ((*known, "--repainter", "p", "--method", "smdl"), "--repainter belongs to --method mirror; got --method smdl"),
        ((*known, "--preset", "goyal"), "--preset belongs to --method fgvce; got --method mirror"),
        ((*known, "--reflection", "three"), "--reflection must be one of closed_form, lbfgs, two_class; got 'three'"),
        (image, "--image needs --target NAME"),
    ):
        code, output, _ = mirror(folder, *arguments)
        assert code == 2
        assert message in " ".join(output.split())
        assert "Traceback" not in output
    own = decoder_file(folder)
    code, output, _ = mirror(folder, *image, "--target", "red", "--decoder", own)
    assert code == 2
    assert "are the same, 'red'" in output
    # A decoder that ships with finecf is found by the model that it was made for.
    monkeypatch.setattr(_commands, "shipped_decoder", lambda name: {"digits": strange, "birds": own}[name])
    code, output, (row,) = mirror(folder, *known)
    assert code == 0, output
    assert row["asked"] == "green"
    assert not list((folder / "out").glob("*.gif"))


def test_what_was_finished_before_an_interruption_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finecf.SMDL.explain

    def stopped(self: finecf.SMDL, images: torch.Tensor, target: list[int], **more: list[str]) -> None:
        done = whole(self, images[:2], target[:2], sources=more["sources"][:2])
        raise Interrupted(done, len(images))

    monkeypatch.setattr(finecf.SMDL, "explain", stopped)
    code, output, rows = rank(folder, "--all-mistakes", "--no-figures")
    assert code == 130, output
    assert "interrupted: 2 of 3 images explained" in output
    assert [row["is"] for row in rows] == ["blue", "green"]


def test_an_interruption_before_the_first_image_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(self: finecf.SMDL, images: torch.Tensor, *_: object, **__: object) -> None:
        raise Interrupted([], len(images))

    monkeypatch.setattr(finecf.SMDL, "explain", stopped)
    code, output = explain(folder, "--method", "smdl", "--all-mistakes", "--no-figures")
    assert code == 130
    assert "interrupted before the first of 3 images was explained" in output


def test_names_in_another_order_than_the_decoders_are_refused(folder: Path) -> None:
    file = decoder_file(folder)
    tensors, meta = load_tensors(file)
    image = ("--image", folder / "data" / "red" / "0.png", "--target", "green", "--no-figures", "--decoder", file)
    for names, code, message in (
        (
            ["green", "blue", "red"],
            2,
            "output 0 is 'green' in the decoder's file and 'blue' here: the names are",
        ),
        (["verde", "rosso", "blu"], 0, "output 0 is 'verde' in the decoder's file"),
    ):
        save_tensors(file, tensors, {**meta, "pairs": [[0, 1], [1, 2]], "classes": names})
        found, output, _ = mirror(folder, *image)
        assert found == code, output
        assert message in " ".join(output.split())
        assert "UserWarning" not in output


def test_black_is_that_of_normalised_images(folder: Path) -> None:
    image = folder / "data" / "red" / "5.png"
    (folder / "model.py").write_text(FILE_MODEL + "\ndef seen():\n    return Seen()\n" + SEEN_MODEL)
    code, output = explain(
        *(folder, "--method", "smdl", "--image", image, "--regions", "grid", "--region-count", 4, "--no-figures"),
        *("--normalise", "imagenet", "--layer", "cells", "--save"),
        model="seen",
    )
    assert code == 0, output
    (path,) = (folder / "out").glob("*.safetensors")
    # This network names its first class with p = 1/2 exactly where a normalised image is black.
    assert float(finecf.load(path).insertion[0]) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_not_there_is_said_in_a_sentence(folder: Path) -> None:
    code, output = explain(folder, "--all-mistakes", "--device", "cuda")
    assert code == 2
    assert output == "finecf: --device cuda: no CUDA device here; use --device cpu\n"
    assert "none here" in run("doctor")[1]


@pytest.mark.parametrize("name", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_made_is_said_before_any_work(folder: Path, name: str) -> None:
    (folder / "taken").write_text("a file")
    (folder / "model.py").write_text("raise SystemError('the model was run')")
    for command in (
        ("explain", "--model", f"{folder / 'model.py'}:build", "--data", folder, "--all-mistakes"),
        ("demo",),
    ):
        code, output = run(*command, "--out", folder / name)
        assert code == 2
        assert "finecf: --out: " in output
        assert "the model was run" not in output


def test_edits_are_few_where_the_head_is_not_linear(folder: Path) -> None:
    _, output = explain(folder, "--all-mistakes", "--no-figures", "--layer", "cells", model="DeepNet")
    assert "at most 10 in one image" in " ".join(output.split())
    _, output = explain(folder, "--all-mistakes", "--no-figures", "--layer", "cells", "--max-edits", 3, model="DeepNet")
    assert "at most 10 in one image" not in " ".join(output.split())
    assert "head is not linear" not in explain(folder, "--all-mistakes", "--no-figures")[1]


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_wrapped_weights_are_unwrapped(folder: Path, key: str) -> None:
    wrapped = {
        "module.cells.1.weight": torch.eye(3)[..., None, None],
        "module.cells.1.bias": torch.zeros(3),
        "module.fc.weight": torch.tensor([[-6.0, -6, 12], [-6, 12, -6], [12, -6, -6]]),
        "module.fc.bias": torch.zeros(3),
    }
    torch.save({key: wrapped, "epoch": 3}, folder / "weights.pt")
    code, output = explain(folder, "--all-mistakes", "--no-figures", "--weights", folder / "weights.pt")
    assert code == 0, output
    assert "3 of 3" in output
    assert f"its entry '{key}' is taken, 'module.' is cut off its names." in " ".join(output.split())
    torch.save({"epoch": 3}, folder / "weights.pt")
    code, output = explain(folder, "--all-mistakes", "--weights", folder / "weights.pt")
    assert code == 2
    assert "holds no state dict" in output


def test_subfolders_that_are_no_outputs_are_told_of(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "data").iterdir())
    shutil.rmtree(folder / "data" / names[0])
    code, output = explain(folder, "--all-mistakes")
    assert code == 2
    assert "has 2 subfolders, which are taken for the model's outputs, and the model has 3: give --labels" in output
    (folder / "names.txt").write_text("\n".join(names))
    code, output = explain(folder, "--all-mistakes", "--no-figures", "--labels", folder / "names.txt")
    assert code == 0, output


def test_a_whole_model_is_no_weights_file(folder: Path) -> None:
    weights = folder / "weights.pt"
    torch.save({"model": torch.nn.Sequential(torch.nn.Linear(3, 3))}, weights)
    code, output = explain(folder, "--all-mistakes", "--weights", weights)
    assert code == 2
    assert output == f"finecf: --weights: {weights} holds a whole model: save model.state_dict()\n"
    torch.save({"model": {}, "accuracy": np.float64(0.5)}, weights)
    code, output = explain(folder, "--all-mistakes", "--weights", weights)
    assert code == 2
    assert "holds more than tensors (UnpicklingError: Unsupported global" in output
    assert "\x1b" not in output
    assert len(output.splitlines()) == 1


def test_torchvision_models_take_weights(folder: Path) -> None:
    from torchvision.models import mobilenet_v3_small, squeezenet1_1

    torch.manual_seed(0)
    weights = folder / "weights.safetensors"
    save_file(squeezenet1_1(num_classes=3).state_dict(), weights)
    data = ("--data", folder / "data", "--size", 64, "--out", folder / "out", "--no-figures")
    code, output = run("explain", "--model", "torchvision:squeezenet1_1", "--weights", weights, *data, "--all-mistakes")
    assert code == 0 or "correctly classified" in output  # random weights may get every image wrong
    torch.save({"state_dict": mobilenet_v3_small(num_classes=5).state_dict()}, folder / "weights.pt")
    code, output = run(
        "explain",
        "--model",
        "torchvision:mobilenet_v3_small",
        "--weights",
        folder / "weights.pt",
        *data,
        "--all-mistakes",
    )
    assert code == 2
    assert "does not fit" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "lime", "--all-mistakes"), "--method must be one of fgvce, smdl, mirror; got 'lime'\n"),
        (("--all-mistakes", "--max-regions", "3"), "--max-regions belongs to --method smdl; got --method fgvce"),
        (("--method", "smdl", "--all-mistakes", "--preset", "fgvce"), "--preset belongs to --method fgvce"),
        (("--method", "smdl"), "give --image FILE --target NAME, or --all-mistakes"),
        (
            ("--method", "smdl", "--all-mistakes", "--regions", "cells"),
            "--regions must be one of slico, grid",
        ),
        (("--method", "smdl", "--all-mistakes", "--search", "quick"), "--search must be one of greedy"),
        (("--method", "smdl", "--all-mistakes", "--baseline", "white"), "--baseline must be one of black, mean, blur"),
        (("--method", "smdl", "--all-mistakes", "--region-count", "5000"), "to the number of pixels, 1024; got 5000"),
        (("--method", "smdl", "--image", __file__, "--target", "pink"), "unknown class 'pink'"),
        ((), "give --image FILE --target NAME, or --all-mistakes"),
        (("--image", "x.png"), "--image needs --target"),
        (("--image", "x.png", "--target", "red"), "there is no file x.png"),
        (("--image", __file__, "--target", "pink"), "unknown class 'pink'"),
        (("--all-mistakes", "--preset", "best"), "--preset must be one of"),
        (("--all-mistakes", "--normalise", "cub"), "--normalise must be"),
        (("--all-mistakes", "--weights", "none.pt"), "there is no file none.pt"),
        (("--all-mistakes", "--labels", "none.txt"), "there is no file none.txt"),
        (("--all-mistakes", "--layer", "layer9"), "no submodule 'layer9'"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    code, output = explain(folder, *arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("build2", "has no function 'build2'"),
        ("not_a_model", "must return a torch.nn.Module, got int"),
        ("broken", "model.py failed: RuntimeError: no such thing\n"),
        ("sized", "model.py needs arguments (width, depth): give a function that takes none"),
    ],
)
def test_a_model_that_cannot_be_made_is_said_in_a_sentence(folder: Path, model: str, message: str) -> None:
    code, output = explain(folder, "--all-mistakes", model=model)
    assert code == 2
    assert message in output


@pytest.mark.parametrize(
    ("model", "message"),
    [("nowhere.py:build", "there is no file nowhere.py"), ("resnet50", "must be torchvision:NAME or FILE.py:FUNCTION")],
)
def test_an_unknown_model_is_said_in_a_sentence(folder: Path, model: str, message: str) -> None:
    code, output = run("explain", "--model", model, "--data", folder / "data", "--all-mistakes")
    assert code == 2
    assert message in output
    code, output = run("explain", "--model", "torchvision:resnet18", "--data", folder / "data", "--all-mistakes")
    assert code == 2
    assert "needs --weights" in output
    code, output = run("explain", "--model", "torchvision:resnet51", "--data", folder / "data", "--all-mistakes")
    assert code == 2
    assert "torchvision has no model 'resnet51': did you mean" in output
    assert "'resnet50'" in output
    code, output = run("explain", "--model", "torchvision:resnet18", "--data", folder / "no", "--all-mistakes")
    assert code == 2
    assert "image folder" in output


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    save_file({"fc.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)}, weights)
    weights.write_bytes(weights.read_bytes()[:-10])
    code, output = explain(folder, "--all-mistakes", "--weights", weights)
    assert code == 2
    assert "truncated" in output
    code, output = explain(folder, "--all-mistakes", "--weights", folder / "model.py")
    assert code == 2
    assert "truncated or holds more than tensors" in output


def no_decoder(name: str) -> Path:
    raise FileNotFoundError(f"no Mirror-CFE decoder for {name!r} ships with finecf")


def test_the_digits_demo_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn carries the digits")
    monkeypatch.setattr(_demo, "shipped_decoder", no_decoder)
    code, output = run("demo", "--dataset", "digits", "-n", 1, "--out", tmp_path / "demo")
    assert code == 0, output
    assert "test digits wrong" in output
    assert "Mirror-CFE is left out: no Mirror-CFE decoder for 'digits' ships with finecf." in " ".join(output.split())
    assert (tmp_path / "demo" / "report.html").is_file()
    assert len(list((tmp_path / "demo").glob("*.png"))) == 1
    # The same mistake, seen by SMDL, has its own folder and its part of the same page.
    assert len(list((tmp_path / "demo" / "smdl").glob("*.png"))) == 1
    tables = [(tmp_path / "demo" / name).read_text().splitlines() for name in ("table.csv", "smdl/table.csv")]
    assert [len(lines) for lines in tables] == [2, 2]
    assert tables[0][1].split(",")[:3] == tables[1][1].split(",")[:3]
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("How to read a figure") == 2
    assert page.count("data:image/jpeg;base64,") == 2
    for anchor in ("figure-1-1", "figure-2-1", "part-2"):
        assert page.count(f'href="#{anchor}"') == page.count(f'id="{anchor}"') == 1


def test_the_digits_demo_mirrors_digits_where_there_is_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn carries the digits")
    monkeypatch.setenv("COLUMNS", "80")
    file = decoder_file(tmp_path, finecf.training.load_digits_net()[0])
    monkeypatch.setattr(_demo, "shipped_decoder", lambda name: file)
    code, output = run("demo", "--dataset", "digits", "-n", 2, "--out", tmp_path / "demo")
    assert code == 0, output
    assert "Mirror-CFE is left out" not in output
    assert max(map(len, output.split("Report:")[0].splitlines())) <= 80
    with (tmp_path / "demo" / "mirror" / "table.csv").open() as written:
        rows = list(csv.DictReader(written))
    assert [(row["taken for"], row["asked"]) for row in rows] == [("3", "8"), ("4", "9")]
    assert len(list((tmp_path / "demo" / "mirror").glob("*.gif"))) == 2
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("How to read a figure") == 3
    assert page.count("data:image/gif;base64,") == 2
    for anchor in ("figure-3-2", "part-3"):
        assert page.count(f'href="#{anchor}"') == page.count(f'id="{anchor}"') == 1


def test_the_birds_that_the_demo_mirrors_have_a_known_answer(tmp_path: Path) -> None:
    net, meta = finecf.training.load_birds_net()
    classifier = finecf.wrap(net, class_names=meta["classes"])
    birds = finecf.data.SyntheticBirds("test", n=24)
    chosen = _demo.look_alikes(finecf.MirrorCFE(classifier), birds, 5)
    assert len(chosen) == _demo.BIRDS_MIRRORED
    assert len({birds.family_of(each.target) for each in chosen}) == len(chosen)
    for each in chosen:
        item = birds[birds.find(each.source)]
        probabilities = classifier.logits(each.image[None]).softmax(1)[0]
        assert int(probabilities.argmax()) == item.label != each.target
        assert float(probabilities.max()) >= _demo.SURE
        assert birds.family_of(each.target) == birds.family_of(item.label)
        redrawn = birds.redraw(item, each.target).tensor
        assert each.truth is not None
        assert torch.equal(each.truth.redrawn, redrawn)
        # Outside the parts that are outlined the truly redrawn bird is the same, but for what those parts cover.
        differs = (redrawn - item.tensor).abs().amax(0) > 0.05
        assert float((differs & ~each.truth.mask).double().mean()) < 0.02
        assert bool((differs & each.truth.mask).any())
    assert len(_demo.look_alikes(finecf.MirrorCFE(classifier), birds, 1)) == 1


def test_an_unknown_demo_is_refused(tmp_path: Path) -> None:
    code, output = run("demo", "--dataset", "dogs", "--out", tmp_path)
    assert code == 2
    assert "--dataset must be one of birds, digits" in output
    code, output = run("train", "dogs")
    assert code == 2
    assert "train takes birds, digits, fashion, mirror or repainter" in output


def test_mirror_is_not_trained_by_epochs() -> None:
    code, output = run("train", "mirror", "--epochs", "3")
    assert code == 2
    assert "train mirror counts steps, not epochs: give --steps" in output


def test_ctrl_c_in_a_training_says_where_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("training was interrupted after 2 of 6 steps; d.resume holds the state")

    monkeypatch.setattr(_commands, "train_mirror", stopped)
    code, output = run("train", "mirror")
    assert code == 130
    assert "training was interrupted after 2 of 6 steps" in output


def test_a_models_file_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "finecf_neighbour.py").write_text("from torch import nn\n\nNET = nn.Linear(2, 2)\n")
    (tmp_path / "own.py").write_text("from finecf_neighbour import NET\n\n\ndef build():\n    return NET\n")
    assert isinstance(_user.from_file(tmp_path / "own.py", "build"), torch.nn.Linear)
    sys.modules.pop("finecf_neighbour")


def test_the_doctor_says_what_is_loaded() -> None:
    code, output = run("doctor")
    assert code == 0
    for word in ("torch", "backend", "cpu loaded", "cuda loaded", "replace_until_flip"):
        assert word in output


def test_help_names_every_command() -> None:
    code, output = run("--help")
    assert code == 0
    for command in ("demo", "explain", "evaluate", "train", "bench", "doctor"):
        assert command in output


def test_numbers_are_never_cut_in_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Run.__new__(Run)
    table.title, table.totals = "Why?", {}
    columns = ["image", "is", "taken for", "flip", "edits", "on parts", "ms"]
    rows = [[name * 30, name * 30, name * 30, "yes", "10", "100%", "12345"] for name in "ab"]
    table._print(columns, rows)
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    for word in ("flip", "edits", "on parts", "ms", "yes", "10", "100%", "12345"):
        assert word in output


def test_a_demo_that_was_interrupted_says_so_in_its_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was finished is published all the same."""

    class Finished:
        explainer = None
        published = 0

        def __init__(self, **totals: str) -> None:
            self.totals = totals

        def publish(self, out: Path, more: list[object]) -> None:
            assert len(more) == 1
            Finished.published += 1

    for totals, expected in (({}, 0), ({"interrupted": "1 of 3 images explained"}, 130)):
        runs = [Finished(), Finished(**totals)]
        monkeypatch.setattr(_commands, "digit_runs", lambda n, runs=runs: runs)
        code, output = run("demo", "--dataset", "digits", "--out", tmp_path / "demo")
        assert code == expected, output
        assert "The whole demo took" in output
    assert Finished.published == 2
