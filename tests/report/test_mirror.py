"""What is seen of Mirror-CFE: the figure, the animation, and its part of a run's report."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from explainers.nets import CLASSES, SIZE, images, network
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

import finecf
from finecf.explainers._reflection import REFLECTIONS
from finecf.explainers.result import Maps
from finecf.models.decoder import MirrorDecoder, shape_of
from finecf.report import Report, Row, Run, Truth, plot
from finecf.report import html as pages
from finecf.report.drawing import DPI, SMALLEST_TYPE, WIDTH, blank_figure, fit_text
from finecf.report.mirror_figure import WAYS, _outline
from finecf.report.mirror_path import SIDES, places, shown_as
from finecf.report.run import ASKED

NAME = "American_Three_toed_Woodpecker_of_the_Northern_Woods"


def mirror(shape: tuple[int, int] = (SIZE, SIZE)) -> finecf.MirrorCFE:
    """A small network, with a decoder that was not trained."""
    classifier = finecf.wrap(network(), layer="trunk", class_names=[f"class {i}" for i in range(CLASSES)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = MirrorDecoder(shape_of(classifier, images(1)[0, :, : shape[0], : shape[1]]), width=4, most=8)
    return finecf.MirrorCFE(classifier, decoder.eval())


def explained(steps: Any = 11, shape: tuple[int, int] = (SIZE, SIZE), **fields: Any) -> finecf.MirrorExplanation:
    """One explanation; `fields` are set afterwards."""
    explainer, x = mirror(shape), images(1)[..., : shape[0], : shape[1]]
    target = int(explainer.classifier.logits(x).argsort(1)[0, -2])
    (result,) = explainer.explain(x, target, steps, sources=["a/one.png"])
    return replace(result, **fields)


def found(k: float = 0.56, **fields: Any) -> finecf.MirrorExplanation:
    """The same, with a first counterfactual image and images along k that are told apart by their brightness."""
    result = explained(**fields)
    strip = result.k.float().view(-1, 1, 1, 1).expand(-1, *result.prepared.shape).clone().to(result.prepared)
    logits = torch.zeros(len(result.k), CLASSES, dtype=torch.float64)
    logits[:, result.origin], logits[:, result.target] = 4 - 8 * result.k, 8 * result.k - 4.2
    change = torch.zeros_like(result.maps["change"])
    change[:3, :3] = 0.5
    return replace(
        result,
        images=strip,
        image_logits=logits,
        latent_logits=logits,
        maps=Maps({"change": change, "difference": change}),
        first_image=torch.full_like(result.prepared, k),
        first_k=k,
        mirror_valid=True,
        redrawn_as=result.origin,
        redrawn_name=result.predicted_name,
        latent_first_k=0.5,
        probabilities_after=result.probabilities_after._replace(target=0.61),
    )


def words(result: finecf.MirrorExplanation, truth: Truth | None = None) -> list[str]:
    return [text.get_text() for text in plot(result, truth=truth).findobj(Text) if text.get_text()]


def test_a_figure_says_what_was_found(tmp_path: Path) -> None:
    result = found()
    said = words(result)
    text = " | ".join(said)
    asked = result.target_name
    assert f"The model says {result.predicted_name}. What would it have to look like to be {asked}?" in text
    assert f"At k = 0.56 it is first taken for {asked}, on the way" in text
    assert "First taken: k = 0.56" in said
    assert f"says {asked} (61%)" in said
    assert "at k = 1 too" in said
    assert said.count("★ first") == 1
    for k in ("0", "0.1", "0.5", "0.56", "0.6", "1"):
        assert f"k = {k}" in said
    for name, _ in SIDES.values():
        assert name in said
    assert "features: 0.50" in said
    assert "image: 0.56" in said
    assert "dashed: of the features it is drawn from" in said
    assert "mean 0.004, largest 0.500" in said
    assert "here they are 0.0% apart" in " ".join(text.split())
    assert "of the swapped ones (the two classes were 8 apart)." in " ".join(text.split())
    assert "one.png" in text
    result.plot(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_figure_shows_what_is_enough_where_it_was_looked_for() -> None:
    result = found()
    asked = result.target_name
    assert not [text for text in words(result) if "nough of it" in text]
    trimmed = replace(
        result,
        trimmed_image=result.prepared,
        trimmed_mask=torch.ones(2, 2),
        trimmed_share=0.31,
        trimmed_blur=1.0,
        trimmed_stands=True,
    )
    said = words(trimmed)
    assert "Enough of it" in said
    assert "31.0% of the change to k = 1" in said
    assert f"says {asked}, blurred 1 px too" in said
    assert "a blend of the two that no decoder drew." in " ".join(" ".join(said).split())
    assert f"says {asked}, not blurred 1 px" in words(replace(trimmed, trimmed_stands=False))
    panels = [len(plot(each).axes) for each in (result, trimmed)]
    assert panels[1] == panels[0] + 1
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[:4, :4] = True
    truth = Truth(mask, "tail", result.prepared.clamp(0, 1))
    both = plot(trimmed, truth=truth)
    assert len(both.axes) == panels[1] + 1
    titles = [text.get_text() for text in both.findobj(Text)]
    assert titles.index("Enough of it") < titles.index("Truly redrawn") < titles.index("What changed")


def test_a_line_runs_round_what_is_enough() -> None:
    result = found()
    part = result.prepared.clone()
    part[:, 2:5, 9:12] += 0.01  # faint, as such parts are
    part[:, 11:14, 3:6] += 0.004
    (white, near), (black, dark) = round_it(result, part)
    assert (white, black) == ((1, 1, 1), (0, 0, 0))
    assert len(near) == len(dark) == 2  # two parts, a line round each
    for (left, top, right, bottom), (column, row) in zip(sorted(near), ((4, 12), (10, 3)), strict=True):
        assert column - 4 < left < column - 1
        assert row - 4 < top < row - 1
        assert column + 1 < right < column + 4
        assert row + 1 < bottom < row + 4
    assert round_it(result, result.prepared) == []  # nothing changed
    assert round_it(result, result.prepared + 0.01) == []  # as much everywhere: there is nothing to point at


@pytest.mark.parametrize("shape", [(1, SIZE), (SIZE, 1)])
def test_a_line_needs_more_than_one_row_and_column(shape: tuple[int, int]) -> None:
    image = torch.zeros(3, *shape)
    axes = blank_figure(4.0).add_subplot()
    _outline(axes, image, image + torch.linspace(0, 1, SIZE).view(1, *shape))
    assert len(axes.collections) == 0


def round_it(
    result: finecf.MirrorExplanation, image: torch.Tensor
) -> list[tuple[tuple[float, ...], list[tuple[float, ...]]]]:
    """The colour of each line in the panel of a trimmed image, and left, top, right and bottom of its loops."""
    explanation = replace(
        result,
        trimmed_image=image,
        trimmed_mask=torch.ones(2, 2),
        trimmed_share=0.01,
        trimmed_blur=1.0,
        trimmed_stands=True,
    )
    (panel,) = (each for each in plot(explanation).axes if each.get_title(loc="left") == "Enough of it")
    lines = []
    for each in panel.collections:
        loops = [loop for path in each.get_paths() for loop in path.to_polygons(closed_only=False)]
        boxes = [(*loop.min(0).tolist(), *loop.max(0).tolist()) for loop in loops]
        lines.append((tuple(each.get_edgecolor()[0][:3].tolist()), boxes))
    return lines


def test_a_figure_says_what_was_not_found() -> None:
    result = found()
    asked = result.target_name
    at_once = replace(result, redrawn_as=result.target, redrawn_name=asked)
    of_earlier_files = replace(result, redrawn_as=None, image_logits=-result.image_logits)
    for each in (at_once, of_earlier_files):
        said = " ".join(words(each))
        assert f"Redrawn at k = 0, with nothing changed, it is already taken for {asked}: " in said
    third = next(index for index in range(CLASSES) if index not in (result.origin, result.target))
    lost = replace(result, redrawn_as=third, redrawn_name="kiwi")
    assert "Redrawn at k = 0, with nothing changed, it is taken for kiwi: the decoder does" in " ".join(words(lost))
    assert "  redrawn at k = 0, with nothing changed, it is taken for kiwi: " in lost.summary()
    assert "nothing changed" not in result.summary()
    none = torch.zeros_like(result.image_logits)
    none[:, result.origin] = 5
    never = replace(result, first_image=None, first_k=None, mirror_valid=False, image_logits=none)
    for latent, end in ((0.5, "; the features it is drawn from are, from k = 0.50 on."), (None, ".")):
        said = words(replace(never, latent_first_k=latent))
        assert f"to its mirror image (k = 1) it is never taken for {asked}{end}" in " ".join(said)
        assert "Its mirror image, k = 1" in said
        assert f"not taken for {asked}" in said
        assert not [text for text in said if text.startswith(("First taken", "★", "image: "))]
        assert ("features: 0.50" in said) == (latent is not None)
    blank = torch.zeros_like(result.maps["change"])
    assert "nothing" in words(replace(result, maps=Maps({"change": blank})))
    assert "not at k = 1" in words(replace(result, mirror_valid=False))
    assert f"from class {result.origin} (k = 0)" in " ".join(words(replace(result, predicted=result.origin + 1)))
    assert "The note." in " ".join(words(replace(result, notes=["the note"])))


def test_frames_tell_the_sides_apart() -> None:
    result = found(0.6)  # a place that the strip has already
    axes = [each for each in plot(result).axes if each.texts and each.texts[0].get_text().startswith("k = ")]
    assert [each.texts[0].get_text() for each in axes] == [
        f"k = {k}" for k in ("0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "1")
    ]
    colours = [to_hex(each.spines["left"].get_edgecolor()) for each in axes]
    sides = ["semifactual"] * 5 + ["boundary"] + ["counterfactual"] * 5
    assert colours == [SIDES[side][1] for side in sides]
    assert [each.get_title() for each in axes].count("★ first") == 1
    assert axes[6].get_title() == "★ first"
    shown = [float(each.images[0].get_array().mean()) for each in axes]
    assert shown == pytest.approx([i / 10 for i in range(11)], abs=1e-6)


@pytest.mark.parametrize(("corrections", "times"), [(0, None), (1, "once"), (8, "up to 8 times")])
def test_the_figure_says_how_often_images_were_corrected(corrections: int, times: str | None) -> None:
    said = " ".join(" ".join(words(found(corrections=corrections))).split())
    assert (f"What an image was short of was corrected {times}, along the model's gradient." in said) == (
        times is not None
    )
    assert ("corrected" in said) == (times is not None)


@pytest.mark.parametrize("reflection", REFLECTIONS)
def test_the_figure_names_the_reflection(reflection: str) -> None:
    said = " ".join(" ".join(words(found(reflection=reflection))).split())
    assert f"The features are mirrored by {WAYS[reflection]};" in said


@pytest.mark.parametrize("soften", [0.0, 1.5])
def test_the_figure_says_how_far_changes_were_softened(soften: float) -> None:
    said = " ".join(" ".join(words(found(soften=soften))).split())
    assert ("What is drawn into the image is softened by a blur of 1.5 pixels." in said) == (soften > 0)
    assert ("softened" in said) == (soften > 0)


def test_a_long_name_is_cut_before_its_share() -> None:
    long = "thick-billed brown red-cheeked redstart with two white wing bars and a crest"
    result = found(target_name=long, predicted_name=long)
    said = words(result)
    before, after = result.probabilities_before, result.probabilities_after
    for start, share in (("says", before.predicted), ("wanted", before.target), ("says", after.target)):
        assert any(text.startswith(f"{start}") and text.endswith(f"… ({share:.0%})") for text in said)


def test_a_text_is_made_smaller_before_it_is_cut_and_keeps_its_end() -> None:
    text, end = "wanted: Bohemian Waxwing", " (12%)"
    cut = 0
    for pixels in range(100, 240, 3):
        written = blank_figure(2).text(0.02, 0.5, text + end, fontsize=8.5)
        fit_text(written, pixels / (WIDTH * DPI), end)
        assert written.get_window_extent().x1 <= pixels
        assert written.get_text().endswith(end)
        smallest = blank_figure(2).text(0.02, 0.5, text + end, fontsize=SMALLEST_TYPE)
        fits = smallest.get_window_extent().x1 <= pixels
        assert (written.get_text() == text + end) == fits
        cut += not fits
    assert 0 < cut < 47


def test_a_long_path_is_shown_in_part_and_in_order() -> None:
    steps = [1.0, 0.0, 0.5, *torch.linspace(0.01, 0.99, 38, dtype=torch.float64).tolist()]
    result = found(0.553, steps=steps)
    path = places(result, 11)
    assert len(path) == 12
    assert [place.k for place in path] == sorted(place.k for place in path)
    assert (path[0].k, path[-1].k) == (0, 1)
    assert [place.k for place in path if place.first] == [0.553]
    for place in path:
        assert float(place.picture.mean()) == pytest.approx(place.k, abs=1e-6)
    assert len(places(result)) == 42
    assert "11 of the 41 images that were drawn are shown." in " ".join(" ".join(words(result)).split())


def test_images_are_shown_as_they_were_before_the_model_s_own_scaling() -> None:
    result = found()
    mean, deviation = torch.tensor([0.485, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
    image, strip = result.prepared.cpu(), result.images.cpu()
    scaled = replace(result, prepared=(image - mean) / deviation, images=(strip - mean) / deviation)
    shown = shown_as(scaled)
    for given, own in ((image, scaled.prepared), (strip[3], scaled.images[3])):
        assert torch.allclose(torch.from_numpy(shown(own)), given.permute(1, 2, 0), atol=1e-4)
    # Where nothing leads back (the image was resized, say) all images share one stretch.
    resized = replace(scaled, image=image[:, :5, :5])
    low = min(float(scaled.prepared.min()), float(scaled.images.min()))
    high = max(float(scaled.prepared.max()), float(scaled.images.max()))
    seen = torch.from_numpy(shown_as(resized)(scaled.images[3]))
    assert torch.allclose(seen, ((scaled.images[3] - low) / (high - low)).permute(1, 2, 0), atol=1e-5)
    assert torch.allclose(torch.from_numpy(shown_as(result)(strip[3])), strip[3].permute(1, 2, 0))


def test_grey_images_are_shown_grey(tmp_path: Path) -> None:
    result = found()
    grey = replace(
        result,
        image=result.image[:1],
        prepared=result.prepared[:1],
        images=result.images[:, :1],
        first_image=result.counterfactual[:1],
        reconstruction=result.reconstruction[:1],
        mirror_image=result.mirror_image[:1],
    )
    assert shown_as(grey)(grey.prepared).shape == (SIZE, SIZE, 3)
    grey.plot(tmp_path / "grey.png")
    with Image.open(grey.animate(tmp_path / "grey.gif")) as moving:
        assert moving.n_frames == 22


@pytest.mark.parametrize("shape", [(32, 32), (32, 12), (12, 32)])
@pytest.mark.parametrize("graded", [False, True])
def test_texts_of_a_figure_do_not_overlap(shape: tuple[int, int], graded: bool) -> None:
    truth = Truth(torch.ones(shape, dtype=torch.bool).tril(), "beak and wing", images(1)[0, :, : shape[0], : shape[1]])
    note = "the decoder was not trained on this pair"
    result = found(shape=shape, target_name=NAME, predicted_name=NAME, notes=[note])
    missing = replace(result, first_image=None, first_k=None, mirror_valid=False)
    for each in (result,) if graded else (missing, replace(result, first_k=0.98)):
        figure = plot(each, truth=truth if graded else None)
        figure.canvas.draw()
        texts = [
            text for axes in figure.axes for text in [*axes.texts, axes.title, axes._left_title] if text.get_text()
        ]
        outside = [text for text in texts if not text.axes.bbox.overlaps(text.get_window_extent())]
        legends = [each for each in [*figure.legends, *(axes.get_legend() for axes in figure.axes)] if each]
        labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.label.get_text()]
        marks = [text for text in texts if text.get_text().startswith(("features: ", "image: "))]
        things = [*outside, *figure.texts, *legends, *labels, *marks]
        boxes = [thing.get_window_extent() for thing in things]
        assert len(boxes) > 30
        for i, one in enumerate(boxes):
            assert one.x0 >= 0
            assert one.x1 <= figure.bbox.width
            assert one.y0 >= 0
            for j, other in enumerate(boxes[:i]):
                across = min(one.x1, other.x1) - max(one.x0, other.x0)
                down = min(one.y1, other.y1) - max(one.y0, other.y0)
                # Lines of one paragraph may share the room for letters that hang down.
                assert across <= 0 or down <= 3, (str(things[i]), str(things[j]))


def test_where_the_answer_is_known_the_figure_shows_it() -> None:
    result = found()
    redrawn = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    truth = Truth(torch.ones(SIZE, SIZE, dtype=torch.bool).tril(), "beak", redrawn)
    said = words(result, truth)
    assert "Truly redrawn" in said
    assert "dashed: they differ (beak)" in said
    assert "Truly redrawn" not in words(result, truth._replace(redrawn=None))
    shown = [each.get_array() for axes in plot(result, truth=truth).axes for each in axes.images]
    assert any(torch.equal(torch.as_tensor(each), redrawn.permute(1, 2, 0)) for each in shown if each.ndim == 3)


def test_an_animation_goes_there_and_back(tmp_path: Path) -> None:
    result = found(target_name=NAME)
    path = result.animate(tmp_path / "way.gif", size=96, frame_seconds=0.05)
    assert path == tmp_path / "way.gif"
    with Image.open(path) as moving:
        assert moving.n_frames == 2 * 12 - 2
        assert moving.info["loop"] == 0
        frames, seconds = [], []
        for i in range(moving.n_frames):
            moving.seek(i)
            frames.append(moving.convert("RGB"))
            seconds.append(moving.info["duration"] / 1000)
    ends = {0, 11}
    assert {i for i, each in enumerate(seconds) if each == max(seconds)} == ends
    assert {i for i, each in enumerate(seconds) if each > min(seconds)} - ends == {6, 22 - 6}
    assert min(seconds) == pytest.approx(0.05)
    middle = frames[0].width // 2
    for i, frame in enumerate(frames):
        assert frame.size == frames[0].size
        place = i if i < 12 else 22 - i
        k = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.56, 0.6, 0.7, 0.8, 0.9, 1][place]
        assert frame.getpixel((middle, 50))[0] / 255 == pytest.approx(k, abs=0.02)
        side = SIDES["boundary" if k == 0.5 else "semifactual" if k < 0.5 else "counterfactual"][1]
        edge = frame.getpixel((middle, 1))
        assert edge == pytest.approx(tuple(int(side[j : j + 2], 16) for j in (1, 3, 5)), abs=1)
        # The words fit: the last column is white.
        column = frame.crop((frame.width - 3, 96 + 12, frame.width, frame.height))
        assert min(low for low, _ in column.getextrema()) == 255


def test_an_animation_that_cannot_be_is_refused(tmp_path: Path) -> None:
    result = found()
    for arguments, message in (
        (("way.png",), "ends in .gif; got 'way.png'"),
        (("none/way.gif",), "there is no folder"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            result.animate(tmp_path / arguments[0])
    with pytest.raises(ValueError, match="size must be at least 16"):
        result.animate(tmp_path / "way.gif", size=3)
    with pytest.raises(ValueError, match="frame_seconds must be between"):
        result.animate(tmp_path / "way.gif", frame_seconds=0)
    with pytest.raises(TypeError, match="an animation for MirrorExplanation, not for str"):
        finecf.report.animate("result", tmp_path / "way.gif")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def mirrored(folder: Path | None = None, **fields: Any) -> Run:
    """A run over three images."""
    explainer, x = mirror(), images(3)
    run = Run("Why?", "Look.", explainer, names=ASKED, options={"steps": 5}, folder=folder, **fields)
    targets = explainer.classifier.logits(x).argsort(1)[:, -2].tolist()
    run.explain(x, targets, ["a/one.png", "a/two.png", "three"])
    return run


def test_a_run_writes_figures_animations_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = mirrored()
    (tmp_path / "out").mkdir()
    run.publish(tmp_path / "out")
    output = capsys.readouterr().out
    assert max(map(len, output.split("Report:")[0].splitlines())) <= 80
    for word in ("first k", "k = 1", "change", "latent error", "images explained: 3"):
        assert word in output
    names = ["0001_a_one", "0002_a_two", "0003_three"]
    for kind in ("png", "gif"):
        assert sorted(path.stem for path in (tmp_path / "out").glob(f"*.{kind}")) == names
    with (tmp_path / "out" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, result in zip(rows, run.results, strict=True):
        assert isinstance(result, finecf.MirrorExplanation)
        assert row["first k"] == ("none" if result.first_k is None else f"{result.first_k:.2f}")
        assert row["k = 1"] == ("yes" if result.mirror_valid else "no")
        assert float(row["k*"]) == pytest.approx(result.latent_first_k, abs=0.005)
        assert float(row["change"]) == pytest.approx(float(result.maps["change"].mean()), abs=0.0005)
        assert float(row["gap"]) == pytest.approx(result.confidence_gap, abs=0.005)
        assert float(row["latent error"]) == pytest.approx(float(result.latent_error.mean()), abs=0.005)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/gif;base64,") == page.count("data:image/jpeg;base64,") == 3
    for word in ("How to read a figure", "the features that the images are drawn from", "prefers-reduced-motion"):
        assert word in page


def test_results_that_are_written_at_once_are_kept_without_their_images(tmp_path: Path) -> None:
    whole, light = mirrored(), mirrored(tmp_path / "light")
    assert len(list((tmp_path / "light").glob("*.gif"))) == 3  # before anything is published
    kept = [result.images.untyped_storage().nbytes() for result in light.results]
    assert max(kept) < 100
    whole.publish(tmp_path / "whole")
    light.publish(tmp_path / "light")
    one, other = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "light"))
    assert one == other
    for name in ("table.csv", "0002_a_two.gif", "0002_a_two.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "light" / name).read_bytes(), name
    assert {**whole.totals, "seconds": ""} == {**light.totals, "seconds": ""}
    # A second run into the same folder leaves nothing of the first.
    again = Run("Why?", "Look.", mirror(), names=ASKED, folder=tmp_path / "light")
    again.publish(tmp_path / "light")
    assert sorted(path.name for path in (tmp_path / "light").iterdir()) == ["report.html", "table.csv"]


def test_totals_say_what_the_decoder_is_to_blame_for() -> None:
    run = mirrored()
    result = found(notes=["the decoder was not trained on this pair"])
    third = next(index for index in range(CLASSES) if index not in (result.origin, result.target))
    taken = replace(found(), redrawn_as=result.target, first_k=None, first_image=None)
    run.results = [result, found(), taken, replace(found(), redrawn_as=third)]
    totals = run.method.totals(run.results)
    assert totals["first k"] == "3 of 4; in these at k = 0.56 on average"
    blamed = ("already at k = 0", "another class at k = 0", "untrained pairs")
    assert [totals[name] for name in blamed] == ["1 of 4"] * 3
    assert not {*blamed, "enough of the change"} & set(run.method.totals([found()]))
    whole = found()
    apart = replace(whole, maps=Maps({"change": torch.full((2, 2), 0.25), "difference": torch.full((2, 2), 0.5)}))
    assert run.method.totals([apart])["change"] == "0.250 on average, and 0.500 against the image itself"
    alike = replace(whole, maps=Maps({"change": torch.full((2, 2), 0.25), "difference": torch.full((2, 2), 0.25)}))
    assert run.method.totals([alike])["change"] == "0.250 on average"
    shares = [replace(found(), trimmed_image=each.image, trimmed_share=0.2) for each in run.results[:2]]
    assert run.method.totals([*shares, found()])["enough of the change"] == "20.0% on average, in 2 of 3"
    assert run.method.light(shares[0]).trimmed_share == 0.2
    rows = [run.method.row(each) for each in run.results]
    assert [row["at k = 0"] for row in rows] == ["", "", "wanted", "another"]
    assert [row["trained"] for row in rows] == ["no", "yes", "yes", "yes"]


def test_a_change_that_cannot_be_seen_does_not_shine() -> None:
    result, drawn = found(), {}
    for size in (0.5, 0.001):
        change = result.maps["change"] * (size / 0.5)
        figure = plot(replace(result, maps=Maps({"change": change, "difference": change})))
        (axes,) = [each for each in figure.axes if "What changed" in [text.get_text() for text in each.findobj(Text)]]
        drawn[size] = float(axes.images[-1].get_array().max())
    assert drawn[0.5] == 1
    assert drawn[0.001] < 0.05


@pytest.mark.filterwarnings("error")
def test_a_run_does_not_warn_of_every_untrained_pair(tmp_path: Path) -> None:
    explainer, x = mirror(), images(1)
    explainer.meta["pairs"] = []
    run = Run("Why?", "Look.", explainer, figures=False, names=ASKED, options={"steps": 3})
    run.explain(x, [int(explainer.classifier.logits(x).argsort(1)[0, -2])], ["one"])
    run.publish(tmp_path)
    assert run.totals["untrained pairs"] == "1 of 1"
    assert not list(tmp_path.glob("*.gif"))


def test_a_page_holds_so_many_animations_and_names_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "EMBEDDED_ANIMATIONS", 2)
    report = Report("title", "intro", ["image"])
    for number in range(3):
        figure, animation = tmp_path / f"{number}.png", tmp_path / f"{number}.gif"
        Image.new("RGB", (8, 8)).save(figure)
        Image.new("RGB", (8, 8)).save(animation)
        report.rows.append(Row([f"row {number}"], figure, animation))
    page = report.write(tmp_path / "page.html").read_text()
    assert page.count("data:image/gif;base64,") == 2
    assert page.count("The animation is in the file 2.gif.") == page.count("The animation is in") == 1
