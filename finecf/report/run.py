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
NAMES = ("image", "is", "taken for")


@dataclass
class Run:
    """Explanations as they come in, and how they are shown: a table, figures, a report."""

    title: str
    intro: str
    explainer: FGVCE
    figures: bool = True
    save: bool = False
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
        """Print the table and the totals; write the figures, the table and the report."""
        out.mkdir(parents=True, exist_ok=True)
        columns = [*NAMES, "flip", "edits", *(["on parts"] if self.on_parts else []), "ms"]
        self.totals = self._totals() | self.totals
        rows = [self._row(i) for i in range(len(self.results))]
        self._print(columns, rows)
        report = Report(self.title, self.intro, columns, self.totals)
        for i, values in enumerate(track(rows, "drawing", transient=True, disable=not self.figures)):
            result = self.results[i]
            name = f"{i + 1:04d}_{_stem(result)}"
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
        if not count:
            return {"mistakes explained": "0"}
        edits = [len(result.edits) for result in self.results]
        totals = {
            "mistakes explained": str(count),
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
        widths = {column: max(map(len, own)) for column, own in cells.items() if column not in NAMES}
        room = console.width - sum(widths.values()) - 2 * len(columns) - 1  # gaps are 2 wide
        image = min(max(map(len, cells[NAMES[0]])), room // 2)
        for column in columns:
            if column in NAMES:
                most = image if column == NAMES[0] else (room - image) // (len(NAMES) - 1)
                table.add_column(column, overflow="ellipsis", no_wrap=True, max_width=most)
            else:
                table.add_column(column, justify="right", min_width=widths[column], no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for name, value in self.totals.items():
            console.print(f"  {name}: [bold]{escape(value)}[/]", highlight=False)


def _stem(result: FGVCEExplanation) -> str:
    return "_".join(Path(short_source(result)).with_suffix("").parts)
