"""The HTML report: one file that holds the table, the totals and every figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from matplotlib.figure import Figure

EMBEDDED_DPI = 80


@dataclass
class Row:
    """One explanation in the report: the values of the table's columns, and its figure (None: none was drawn)."""

    values: Sequence[str]
    figure: Figure | None = None
    file: str | None = None


@dataclass
class Report:
    """What a report says: a title, a paragraph, the totals, and a table with a figure for each row.

    `columns` names the values of every `Row`.
    """

    title: str
    intro: str
    columns: Sequence[str]
    totals: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def write(self, path: str | Path) -> Path:
        """Write the report as one HTML file that refers to no other."""
        from jinja2 import Environment

        source = files("finecf.report").joinpath("templates", "report.html").read_text(encoding="utf-8")
        template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
        rows = [(row.values, _embedded(row.figure) if row.figure is not None else None) for row in self.rows]
        text = template.render(report=self, rows=rows)
        path = Path(path)
        path.write_text(text, encoding="utf-8")
        return path


def _embedded(figure: Figure) -> str:
    """A figure as a data address: JPEG, since a report may hold a hundred of them."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=EMBEDDED_DPI, pil_kwargs={"quality": 82})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
