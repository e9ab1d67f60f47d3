"""The HTML report: one file that holds the table, the totals and every figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

EMBEDDED_WIDTH = 1100
MEANINGS = {
    "image": "the image explained; its name leads to its figure",
    "is": "the true class, which the network should have named",
    "asked": "the class asked for: what would have to change for the network to name it?",
    "taken for": "the class that the network named instead",
    "flip": "whether the network names the class of the second column once the cells are replaced",
    "edits": "how many cells of the feature map were replaced, one after the other",
    "needed": "how many of these replacements are enough; the others can be taken back and the answer stays flipped",
    "on parts": "the share of the edits that lie on a part in which the two classes really differ",
    "ms": "milliseconds for the explanation, the network's own forwards apart",
}
"""What the columns and totals of a table mean, for a reader who has never heard of the method."""


@dataclass
class Row:
    """One explanation in the report: the values of the table's columns, and the file of its figure, if any."""

    values: Sequence[str]
    figure: Path | None = None


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
        rows = [(row.values, None if row.figure is None else _embedded(row.figure)) for row in self.rows]
        text = template.render(report=self, rows=rows, legend=self._legend())
        path = Path(path)
        path.write_text(text, encoding="utf-8")
        return path

    def _legend(self) -> dict[str, str]:
        shown = {*self.columns, *self.totals}
        return {name: meaning for name, meaning in MEANINGS.items() if name in shown}


def _embedded(figure: Path) -> str:
    """A figure's file as a data address: a smaller JPEG, since a report may hold a hundred of them."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(figure) as picture:
        picture.thumbnail((EMBEDDED_WIDTH, 4 * EMBEDDED_WIDTH))
        picture.convert("RGB").save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
