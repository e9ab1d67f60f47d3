"""The result: what it says, and that it comes back from its file as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from explainers.nets import images, other_classes, setting
from safetensors.torch import save_file

import finecf
from finecf.explainers.result import Maps, cell_box
from finecf.report import Truth, plot


@pytest.fixture(params=["linear", "generic"])
def results(request: pytest.FixtureRequest) -> list[finecf.FGVCEExplanation]:
    classifier, bank = setting(request.param)
    x = images(3)
    explainer = finecf.FGVCE(classifier, bank, minimal=True)
    return explainer.explain(x, other_classes(classifier, bank, x, far=True), sources=["a/one.png", "two", "three"])


def test_a_saved_explanation_comes_back(results: list[finecf.FGVCEExplanation], tmp_path: Path) -> None:
    for result in results:
        path = result.save(tmp_path / "explanation.safetensors")
        back = finecf.load(path)
        assert isinstance(back, finecf.FGVCEExplanation)
        assert back.summary() == result.summary()
        assert back.edits == result.edits
        assert back.minimal_edits == result.minimal_edits
        assert back.parts == result.parts
        assert back.probabilities_before == result.probabilities_before
        assert set(back.maps) == set(result.maps)
        for name in result.maps:
            assert torch.equal(back.maps[name], result.maps[name].cpu())
        assert torch.equal(back.logits_path, result.logits_path.cpu())
        assert torch.equal(back.image, result.image.cpu())
        for name in ("weights", "grid", "flipped", "notes", "versions", "evaluations", "seed", "tied_edits", "source"):
            assert getattr(back, name) == getattr(result, name), name
        for one, other in zip(back.edits, result.edits, strict=True):
            assert torch.equal(one.reference_image, other.reference_image)
            assert torch.equal(one.reference_patch, other.reference_patch)
        again = finecf.load(back.save(tmp_path / "again.safetensors"))
        assert again.summary() == result.summary()


def test_the_summary_says_what_happened(results: list[finecf.FGVCEExplanation]) -> None:
    for result in results:
        text = result.summary()
        assert result.predicted_name in text
        assert result.target_name in text
        assert f"{len(result.edits)} edit" in text
        for edit in result.edits:
            assert edit.reference_source in text


def test_an_explanation_prints_as_its_summary_and_shows_as_one_line(results: list[finecf.FGVCEExplanation]) -> None:
    result = results[0]
    assert str(result) == result.summary()
    assert f"{result.predicted_name} -> {result.target_name}" in repr(result)
    assert f"by {len(result.edits)} edits" in repr(result)
    assert len(repr(results)) < 200 * len(results)
    assert "\n" not in repr(results)


def test_probabilities_and_fields_fit_the_path(results: list[finecf.FGVCEExplanation]) -> None:
    for result in results:
        path = result.logits_path.softmax(1)
        assert result.probabilities_before.predicted == pytest.approx(float(path[0, result.predicted]))
        assert result.probabilities_after.target == pytest.approx(float(path[-1, result.target]))
        for step, edit in enumerate(result.edits, 1):
            assert edit.target_probability == pytest.approx(float(path[step, result.target]))
        assert result.seconds > 0
        assert result.evaluations > 0
        assert {"finecf", "torch", "backend", "micro_batch"} <= set(result.versions)


def test_patches_are_the_cells_of_their_images(results: list[finecf.FGVCEExplanation]) -> None:
    edit = results[0].edits[0]
    left, top, right, bottom = cell_box(edit.reference_cell, edit.reference_grid, edit.reference_image.shape[:2])
    assert torch.equal(edit.reference_patch, edit.reference_image[top:bottom, left:right])
    assert edit.reference_patch.shape == (8, 8, 3)
    assert results[0].cell_box((1, 2)) == (16, 8, 24, 16)


def test_cells_cover_an_image_that_they_do_not_divide() -> None:
    covered = torch.zeros(50, 31)
    for row in range(7):
        for column in range(4):
            left, top, right, bottom = cell_box((row, column), (7, 4), (50, 31))
            covered[top:bottom, left:right] += 1
    assert bool((covered == 1).all())


def test_maps_are_computed_once_and_an_unknown_name_lists_them() -> None:
    calls = []

    def late() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2)

    maps = Maps({"now": torch.zeros(2), "late": late})
    assert list(maps) == ["now", "late"]
    assert not calls
    assert torch.equal(maps["late"], maps["late"])
    assert len(calls) == 1
    with pytest.raises(KeyError, match="now, late"):
        maps["never"]


def test_files_that_hold_no_explanation_are_refused(tmp_path: Path) -> None:
    classifier, bank = setting()
    x = images(1)
    (result,) = finecf.FGVCE(classifier, bank).explain(x, other_classes(classifier, bank, x))
    path = result.save(tmp_path / "whole.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="truncated"):
        finecf.load(cut)
    with pytest.raises(FileNotFoundError, match="no explanation at"):
        finecf.load(tmp_path / "nothing")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="holds no explanation"):
        finecf.load(other)
    with pytest.raises(FileNotFoundError, match="create it first"):
        result.save(tmp_path / "missing" / "x.safetensors")


def test_a_figure_is_drawn_without_touching_matplotlib_s_state(tmp_path: Path) -> None:
    import matplotlib
    import matplotlib.pyplot as plt
    from matplotlib.text import Text

    classifier, bank = setting()
    x = images(2)
    normalised = x * 2 - 1
    targets = other_classes(classifier, bank, normalised, far=True)
    before = dict(matplotlib.rcParams), matplotlib.get_backend()
    for weight, result in enumerate(finecf.FGVCE(classifier, bank, preset="vandenhende").explain(normalised, targets)):
        figure = result.plot(tmp_path / f"{weight}.png")
        assert (tmp_path / f"{weight}.png").stat().st_size > 10_000
        words = " ".join(text.get_text() for text in figure.findobj(Text))
        assert result.predicted_name in words
        assert result.target_name in words
        mask = torch.zeros(result.image.shape[-2:], dtype=torch.bool)
        mask[4:20, 6:12] = True
        graded = plot(result, truth=Truth(mask, "beak"))
        assert any("beak" in text.get_text() for text in graded.findobj(Text))
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == before
    assert not plt.get_fignums()


def _words(result: finecf.explainers.Explanation) -> list[str]:
    from matplotlib.text import Text

    return [text.get_text() for text in plot(result).findobj(Text)]


def test_a_figure_says_that_places_do_not_matter_only_where_they_do_not() -> None:
    for kind in ("linear", "first_linear", "generic"):
        classifier, bank = setting(kind)
        x = images(1)
        (result,) = finecf.FGVCE(classifier, bank).explain(x, other_classes(classifier, bank, x, far=True))
        assert result.edits
        assert any("averages over positions" in text for text in _words(result)) == (kind == "linear")


def test_a_figure_says_how_much_a_faint_difference_was_stretched() -> None:
    classifier, bank = setting()
    x = images(1)
    (result,) = finecf.FGVCE(classifier, bank).explain(x, other_classes(classifier, bank, x, far=True))
    drawn = torch.linspace(0, 1, 16, device=x.device).reshape(4, 4)
    before = torch.full((4, 4), 0.5, device=x.device)
    for peak, faint in ((0.1, True), (0.4, False)):
        maps = dict(result.maps) | {"before": before, "after": before + peak * drawn, "dominant": drawn}
        said = [text for text in _words(replace(result, maps=Maps(maps))) if "faint" in text]
        assert said == (["faint: drawn 10 times as strong as it is"] if faint else [])
    # Where the difference drawn is not that of the maps at hand, nothing is claimed.
    maps = dict(result.maps) | {"before": before, "after": before + 0.1 * drawn, "dominant": drawn.flip(0)}
    assert not [text for text in _words(replace(result, maps=Maps(maps))) if "faint" in text]


@pytest.mark.parametrize("shape", [(32, 32), (32, 12), (12, 32)])
def test_texts_of_a_figure_do_not_overlap(shape: tuple[int, int]) -> None:
    classifier, bank = setting()
    x = images(1)
    (result,) = finecf.FGVCE(classifier, bank).explain(x, other_classes(classifier, bank, x, far=True))
    name = "American_Three_toed_Woodpecker_of_the_Northern_Woods"
    edits = [replace(edit, reference_class=name) for edit in result.edits]
    image = result.image[:, : shape[0], : shape[1]]
    result.maps._entries |= {n: result.maps[n][: shape[0], : shape[1]] for n in ("part_labels", "object_mask")}
    figure = plot(
        replace(result, image=image, edits=edits, predicted_name=name, target_name=name),
        truth=Truth(torch.ones(shape, dtype=torch.bool).tril(), "beak"),
    )
    figure.canvas.draw()
    for text in figure.texts:
        assert text.get_window_extent().x1 <= figure.bbox.width
    texts = [text for axes in figure.axes for text in [*axes.texts, axes.title, axes._left_title] if text.get_text()]
    outside = [text for text in texts if not text.axes.bbox.overlaps(text.get_window_extent())]
    boxes = [text.get_window_extent() for text in outside]
    assert len(boxes) > 12
    for i, one in enumerate(boxes):
        assert one.x1 <= figure.bbox.width
        for j, other in enumerate(boxes[:i]):
            across = min(one.x1, other.x1) - max(one.x0, other.x0)
            down = min(one.y1, other.y1) - max(one.y0, other.y0)
            # Lines of one paragraph may share the room for letters that hang down.
            assert across <= 0 or down <= 3, (outside[i].get_text(), outside[j].get_text())


def ranked(
    search: str = "greedy", target: int | None = None, max_regions: int | None = None, **fields: Any
) -> finecf.SMDLExplanation:
    """The regions of a small image, ranked; `fields` are set afterwards."""
    explainer = finecf.SMDL(setting()[0], "grid", search, region_count=9, max_regions=max_regions)
    (result,) = explainer.explain(images(1), target, sources=["a/one.png"])
    return replace(result, **fields)


def test_a_figure_of_ranked_regions_says_what_was_found(tmp_path: Path) -> None:
    (predicted,) = setting()[0].logits(images(1)).argmax(1).tolist()
    result = ranked(target=(predicted + 1) % 5)
    for enough, says in ((2, "The first 2 of its 9 regions"), (1, "The first one of its 9"), (None, "However many")):
        said = " | ".join(_words(replace(result, sufficient_prefix=enough)))
        assert f"The model says {result.predicted_name}. What speaks for {result.target_name}?" in said
        assert says in said
        assert ("Nothing is enough" in said) == (enough is None)
        shown = enough or result.best_prefix
        assert f"{result.area(shown):.0%} of the image; grey: hidden" in said
        assert f"({float(result.insertion[shown]):.0%})" in said
        assert f"best score: {result.best_prefix}" in said
        assert (f"enough: {enough}" in said) == (enough is not None)
        assert f"(area {result.insertion_area:.2f})" in said
        assert f"(area {result.deletion_area:.2f})" in said
        assert result.guarantee in " ".join(said.split())
        assert f"{result.evaluations} images went through the model" in " ".join(said.split())
    plot(result, tmp_path / "figure.png", Truth(torch.ones(32, 32, dtype=torch.bool).tril(), "beak"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "Which regions make it say so?" in " ".join(_words(ranked()))


def test_numbers_stand_in_their_regions() -> None:
    result = ranked()
    numbered = {
        text.get_text(): text.get_position() for text in plot(result).axes[1].texts if text.get_text().isdigit()
    }
    assert sorted(map(int, numbered)) == list(range(1, 10))
    for number, (column, row) in numbered.items():
        assert int(result.maps["regions"][int(row), int(column)]) == result.order[int(number) - 1]
    # A region of several pieces has its number on each of them.
    checks = torch.zeros(32, 32, dtype=torch.int32)
    checks[:16, 16:] = checks[16:, :16] = 1
    (result,) = finecf.SMDL(setting()[0]).explain(images(1), regions=checks)
    texts = [text.get_text() for text in plot(result).axes[1].texts]
    assert sorted(text for text in texts if text.isdigit()) == ["1", "1", "2", "2"]


def test_a_ranking_that_stopped_early_is_not_drawn_as_whole() -> None:
    result = ranked("lazy", max_regions=4)
    said = " ".join(_words(result))
    assert "Of 9 regions 4 were ranked." in said
    assert "(dotted: not ranked)" in said
    assert float(result.shares[-1]) == pytest.approx(result.area(4))
    assert "(dotted: not ranked)" not in " ".join(_words(ranked()))
    # The areas are means over what was ranked.
    ones = torch.ones(5, dtype=torch.float64)
    assert replace(result, insertion=ones).insertion_area == pytest.approx(1)
    # Nor is a curve that an interruption left unmeasured, after its first point or its third.
    for known in (1, 3):
        cut = replace(result, deletion=torch.where(torch.arange(5) < known, ones / 2, torch.nan))
        assert cut.deletion_area == pytest.approx(0.5)
        assert "(area 0.50)" in " ".join(_words(cut))


@pytest.mark.parametrize("shape", [(32, 32), (32, 12), (12, 32)])
def test_texts_of_a_figure_of_regions_do_not_overlap(shape: tuple[int, int]) -> None:
    name = "American_Three_toed_Woodpecker_of_the_Northern_Woods"
    explainer = finecf.SMDL(setting()[0], "grid", region_count=9)
    (result,) = explainer.explain(images(1)[..., : shape[0], : shape[1]], 0, sources=["a/one.png"])
    tie = "tie: at step 3 another region scored the same within 10 times the noise of the forward"
    result = replace(result, target_name=name, predicted_name=name, predicted=1, notes=[tie])
    for enough in (None, 3):
        truth = Truth(torch.ones(shape, dtype=torch.bool).tril(), "beak")
        figure = plot(replace(result, sufficient_prefix=enough), truth=truth)
        figure.canvas.draw()
        texts = [text for axes in figure.axes for text in [*axes.texts, axes._left_title] if text.get_text()]
        outside = [text for text in texts if not text.axes.bbox.overlaps(text.get_window_extent())] + figure.texts
        legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
        labels = [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) if axis.label.get_text()]
        boxes = [each.get_window_extent() for each in [*outside, *legends, *labels]]
        assert len(boxes) > 12
        for i, one in enumerate(boxes):
            assert one.x1 <= figure.bbox.width
            assert one.y0 >= 0
            for j, other in enumerate(boxes[:i]):
                across = min(one.x1, other.x1) - max(one.x0, other.x0)
                down = min(one.y1, other.y1) - max(one.y0, other.y0)
                assert across <= 0 or down <= 3, (str((outside + legends)[i]), str((outside + legends)[j]))


def test_a_report_explains_its_columns_and_figures(tmp_path: Path) -> None:
    from PIL import Image

    from finecf.report.html import Report, Row

    Image.new("RGB", (8, 8)).save(tmp_path / "figure.png")
    report = Report("title", "intro", ["image", "flip"], {"needed": "2.0 on average"}, guide="Look here first.")
    report.rows = [Row(["one", "yes"])]
    bare = report.write(tmp_path / "bare.html").read_text()
    assert "once the cells are replaced" in bare
    assert "are enough" in bare
    assert "milliseconds" not in bare
    assert "How to read a figure" not in bare
    assert "Further down" not in bare
    report.rows = [Row(["one", "yes"], tmp_path / "figure.png")]
    full = report.write(tmp_path / "full.html").read_text()
    assert "How to read a figure" in full
    assert "Look here first." in full
