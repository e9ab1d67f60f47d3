"""A run of an explainer over many images, and how it is shown: a table, the totals, figures and a report."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import rich
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from finecf.explainers import (
    FGVCE,
    SMDL,
    Explanation,
    FGVCEExplanation,
    Interrupted,
    MirrorCFE,
    MirrorExplanation,
    SMDLExplanation,
)
from finecf.report.drawing import Truth, short_source
from finecf.report.figures import plot
from finecf.report.html import Report, Row
from finecf.report.methods import METHODS, Method
from finecf.report.mirror_animation import animate

TABLE_WIDTH = 80
NAMES_WIDTH = 36
"""Characters that the names of image and classes have at least, where columns can be left out for them."""
MISTAKES = ("image", "is", "taken for")
ASKED = ("image", "asked", "taken for")
PREDICTED = ("image", "explained", "named")


@dataclass
class Run:
    """Explanations as they come in, and how they are shown: a table, figures, a report.

    `names` heads the columns of the image, the class explained and the class predicted: `MISTAKES` where the first of
    these is the true one, `ASKED` where nothing says so, `PREDICTED` where it is the predicted class itself. `options`
    go to the explainer's `explain`. `grades` holds a share for each image, where the right answer is known. With
    `folder` each result is written there as it comes in, and then kept without its images, which can be many.
    """

    title: str
    intro: str
    explainer: FGVCE | SMDL | MirrorCFE
    figures: bool = True
    save: bool = False
    names: tuple[str, str, str] = MISTAKES
    options: dict[str, Any] = field(default_factory=dict)
    results: list[Explanation] = field(default_factory=list)
    grades: list[float] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)
    totals: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def method(self) -> Method:
        """What is particular to the explainer's method."""
        if isinstance(self.explainer, MirrorCFE):
            return METHODS[MirrorExplanation]
        return METHODS[SMDLExplanation if isinstance(self.explainer, SMDL) else FGVCEExplanation]

    def explain(
        self, images: Tensor, targets: Sequence[int | str] | None, sources: Sequence[str]
    ) -> Sequence[Explanation]:
        """Explain a batch and keep the results; targets None: the predicted classes, which only SMDL explains.

        Raises:
            Interrupted: Ctrl-C; what was finished is kept.
        """
        named = None if targets is None else list(targets)
        new: Sequence[Explanation]
        try:
            if isinstance(self.explainer, SMDL):
                new = self.explainer.explain(images, named, sources=list(sources), **self.options)
            elif isinstance(self.explainer, MirrorCFE):
                with warnings.catch_warnings():
                    # The totals say it once.
                    warnings.filterwarnings("ignore", "the decoder was not trained on the pair", UserWarning)
                    new = self.explainer.explain(images, named or [], sources=list(sources), **self.options)
            else:
                new = self.explainer.explain(images, named or [], sources=list(sources), **self.options)
        except Interrupted as stop:
            self._keep(stop.explanations)
            raise
        self._keep(new)
        return new

    def _keep(self, new: Sequence[Explanation]) -> None:
        for result in new:
            if self.folder is not None:
                if not self.results:
                    _prepare(self.folder)
                self._write(len(self.results), result, self.folder)
                result = self.method.light(result)
            self.results.append(result)

    def publish(self, out: Path, more: Sequence[tuple[str, Run]] = ()) -> None:
        """Print the table and the totals; write the figures, the table and the report.

        `more` names runs that follow in the same report; their tables and figures go into a folder of that name. Where
        `out` holds figures of an earlier run, as its table lists them, they are removed.
        """
        reports = [self._publish(out), *(run._publish(out / name) for name, run in more)]
        reports[0].parts = reports[1:]
        path = reports[0].write(out / "report.html").resolve()
        rich.print(f"Report: {escape(str(path))}", flush=True)
        if self.figures and self.results:
            runs = [(path.parent, self), *((path.parent / name, run) for name, run in more)]
            where = [f"{folder}{os.sep}*.{kind}" for folder, run in runs for kind in ("png", *run._moving)]
            rich.print(f"Figures: {', '.join(map(escape, where))}")

    @property
    def _moving(self) -> tuple[str, ...]:
        return ("gif",) if isinstance(self.explainer, MirrorCFE) else ()

    def _publish(self, out: Path) -> Report:
        if self.folder is None or not self.results:
            _prepare(out)
        method = self.method
        columns = [*self.names, *(column for column in method.columns if self.grades or column != method.grade)]
        self.totals = self._totals() | self.totals
        rows = [self._row(i, columns) for i in range(len(self.results))]
        self._print(columns, rows, method.secondary)
        report = Report(self.title, self.intro, columns, self.totals, guide=method.guide)
        drawing = self.figures and self.folder is None
        for i, values in enumerate(track(rows, "drawing", transient=True, disable=not drawing)):
            if self.folder is None:
                self._write(i, self.results[i], out)
            name = out / _file_name(i, values[0])
            files = [name.with_name(f"{name.name}.{kind}") for kind in ("png", *self._moving)] if self.figures else []
            report.rows.append(Row(values, *files))
        with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        return report

    def _write(self, i: int, result: Explanation, out: Path) -> None:
        """The files of one result: its figure, its animation, the result itself."""
        name = _file_name(i, short_source(result))
        if self.figures:
            plot(result, out / f"{name}.png", self.truths[i] if self.truths else None)
            if self._moving:
                animate(result, out / f"{name}.gif")
        if self.save:
            result.save(out / f"{name}.safetensors")

    def _totals(self) -> dict[str, str]:
        count = len(self.results)
        totals = {"mistakes explained" if self.names == MISTAKES else "images explained": str(count)}
        if count:
            totals |= self.method.totals(self.results)
        if self.grades:
            name, share = self.method.graded
            totals[name] = f"{fmean(self.grades):.0%} {share}"
        return totals

    def _row(self, i: int, columns: Sequence[str]) -> list[str]:
        result = self.results[i]
        names = (short_source(result), result.target_name, result.predicted_name)
        values = dict(zip(self.names, names, strict=True)) | self.method.row(result)
        if self.grades:
            values[self.method.grade] = f"{self.grades[i]:.0%}"
        return [values[column] for column in columns]

    def _print(self, columns: Sequence[str], rows: Sequence[Sequence[str]], secondary: Sequence[str] = ()) -> None:
        console = Console(width=max(TABLE_WIDTH, min(Console().width, 120)))
        if rows:
            self._print_table(console, columns, rows, secondary)
        else:
            console.print(f"{escape(self.title)}: {'no mistakes' if self.names == MISTAKES else 'no images'}")
        for name, value in self.totals.items():
            console.print(f"  {name}: [bold]{escape(value)}[/]", highlight=False)

    def _print_table(
        self, console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]], secondary: Sequence[str]
    ) -> None:
        table = Table(title=escape(self.title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        # Where the terminal is narrow, class names may be cut, and the image's name if it is long.
        cells = {column: [column, *(row[i] for row in rows)] for i, column in enumerate(columns)}
        widths = {column: max(map(len, own)) for column, own in cells.items() if column not in self.names}

        def room() -> int:
            return console.width - sum(widths.values()) - 2 * (len(widths) + len(self.names)) - 1  # gaps are 2 wide

        needed = [max(map(len, cells[name])) for name in self.names]
        wanted = min(NAMES_WIDTH, sum(needed))
        left_out = []
        for column in secondary:
            if room() < wanted and column in widths:
                left_out.append(column)
                del widths[column]
        image = min(needed[0], room() // 2)
        rest = room() - image
        # What one of the class names does not need, the other may have.
        widest = (image, max(rest // 2, rest - needed[2]), max(rest // 2, rest - needed[1]))
        most = dict(zip(self.names, widest, strict=True))
        for column in columns:
            if column in self.names:
                table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=most[column])
            elif column in widths:
                table.add_column(column, justify="right", min_width=widths[column], no_wrap=True)
        for row in rows:
            pairs = zip(columns, row, strict=True)
            table.add_row(*(escape(value) for column, value in pairs if column not in left_out))
        console.print(table)
        if left_out:
            console.print(f"  (and in the report: {', '.join(column for column in columns if column in left_out)})")


def _file_name(row: int, image: str) -> str:
    """The name, without a suffix, of the files of a row of the table."""
    return f"{row + 1:04d}_" + "_".join(Path(os.path.splitext(image)[0]).parts)


def _prepare(out: Path) -> None:
    """Make a run's folder; where it holds figures of an earlier run, as its table lists them, they are removed."""
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier_figures(out)


def _remove_earlier_figures(out: Path) -> None:
    """Remove the figures that the table of an earlier run lists: only names that this module gave are touched."""
    path = out / "table.csv"
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or tuple(lines[0].split(",")[:3]) not in (MISTAKES, ASKED, PREDICTED):
        return
    for i, row in enumerate(csv.reader(lines[1:])):
        if row:
            for kind in ("png", "gif"):
                (out / f"{_file_name(i, row[0])}.{kind}").unlink(missing_ok=True)
