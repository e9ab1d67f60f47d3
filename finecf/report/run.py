"""A run of an explainer over many images, and how it is shown: a table, the totals, figures and a report."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import rich
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torch import Tensor

from finecf.explainers import FGVCE, FGVCEExplanation
from finecf.report.figures import Truth, plot, short_source
from finecf.report.html import Report, Row

TABLE_WIDTH = 80
MISTAKES = ("image", "is", "taken for")
ASKED = ("image", "asked", "taken for")


@dataclass
class Run:
    """Explanations as they come in, and how they are shown: a table, figures, a report.

    `names` heads the columns of the image, the class explained towards and the class predicted: `MISTAKES` where that
    class is the true one, `ASKED` where nothing says so.
    """

    title: str
    intro: str
    explainer: FGVCE
    figures: bool = True
    save: bool = False
    names: tuple[str, str, str] = MISTAKES
    results: list[FGVCEExplanation] = field(default_factory=list)
    on_parts: list[float] = field(default_factory=list)
    truths: list[Truth] = field(default_factory=list)
    totals: dict[str, str] = field(default_factory=dict)

    def explain(self, images: Tensor, targets: Sequence[int | str], sources: Sequence[str]) -> list[FGVCEExplanation]:
        """Explain a batch and keep the results."""
        new = self.explainer.explain(images, list(targets), sources=list(sources))
        self.results += new
        return new

    def publish(self, out: Path) -> None:
        """Print the table and the totals; write the figures, the table and the report.

        Figures of an earlier run in `out`, as its table lists them, are removed.
        """
        out.mkdir(parents=True, exist_ok=True)
        _remove_earlier_figures(out)
        columns = [*self.names, "flip", "edits", *(["on parts"] if self.on_parts else []), "ms"]
        self.totals = self._totals() | self.totals
        rows = [self._row(i) for i in range(len(self.results))]
        self._print(columns, rows)
        report = Report(self.title, self.intro, columns, self.totals)
        for i, values in enumerate(track(rows, "drawing", transient=True, disable=not self.figures)):
            result = self.results[i]
            name = _file_name(i, values[0])
            report.rows.append(Row(values, out / f"{name}.png" if self.figures else None))
            if self.figures:
                plot(result, out / f"{name}.png", self.truths[i] if self.truths else None)
            if self.save:
                result.save(out / f"{name}.safetensors")
        with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
        path = report.write(out / "report.html").resolve()
        rich.print(f"Report: {escape(str(path))}", flush=True)
        if self.figures:
            rich.print(f"Figures: {escape(str(path.parent))}{os.sep}*.png")

    def _totals(self) -> dict[str, str]:
        count = len(self.results)
        explained = "mistakes explained" if self.names == MISTAKES else "images explained"
        if not count:
            return {explained: "0"}
        edits = [len(result.edits) for result in self.results]
        totals = {
            explained: str(count),
            "flipped": f"{sum(result.flipped for result in self.results)} of {count}",
            "edits": f"{fmean(edits):.2f} on average, at most {max(edits)}",
            "needed": f"{fmean(len(result.minimal_edits) for result in self.results):.2f} on average",
            "seconds": f"{sum(result.seconds for result in self.results):.2f} for all, the network's forwards apart",
        }
        cosines = [edit.similarity for result in self.results for edit in result.edits]
        if cosines:
            totals["cosine"] = f"{fmean(cosines):.2f} on average between a cell and its replacement"
        if self.on_parts:
            totals["on differing parts"] = f"{fmean(self.on_parts):.0%} of the edits"
        return totals

    def _row(self, i: int) -> list[str]:
        result = self.results[i]
        row = [
            short_source(result),
            result.target_name,
            result.predicted_name,
            "yes" if result.flipped else "no",
            str(len(result.edits)),
        ]
        if self.on_parts:
            row.append(f"{self.on_parts[i]:.0%}")
        return [*row, f"{1000 * result.seconds:.0f}"]

    def _print(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        console = Console(width=max(TABLE_WIDTH, min(Console().width, 120)))
        table = Table(title=escape(self.title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        # Where the terminal is narrow, class names may be cut, and the image's name if it is long.
        cells = {column: [column, *(row[i] for row in rows)] for i, column in enumerate(columns)}
        widths = {column: max(map(len, own)) for column, own in cells.items() if column not in self.names}
        room = console.width - sum(widths.values()) - 2 * len(columns) - 1  # gaps are 2 wide
        image = min(max(map(len, cells[self.names[0]])), room // 2)
        for column in columns:
            if column in self.names:
                most = image if column == self.names[0] else (room - image) // (len(self.names) - 1)
                table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=most)
            else:
                table.add_column(column, justify="right", min_width=widths[column], no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for name, value in self.totals.items():
            console.print(f"  {name}: [bold]{escape(value)}[/]", highlight=False)


def _file_name(row: int, image: str) -> str:
    """The name, without a suffix, of the files of a row of the table."""
    return f"{row + 1:04d}_" + "_".join(Path(os.path.splitext(image)[0]).parts)


def _remove_earlier_figures(out: Path) -> None:
    """Remove the figures that the table of an earlier run lists: only names that this module gave are touched."""
    path = out / "table.csv"
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or tuple(lines[0].split(",")[:3]) not in (MISTAKES, ASKED):
        return
    for i, row in enumerate(csv.reader(lines[1:])):
        if row:
            (out / f"{_file_name(i, row[0])}.png").unlink(missing_ok=True)
