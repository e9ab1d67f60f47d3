"""A small table that prints in a terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from finecf.metrics.bootstrap import Interval

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_NAME_WIDTH = 24
"""Names of rows that are longer go over several lines in a terminal."""

Value = str | int | float | Interval


@dataclass
class Table:
    """Named rows of named values under a title; a value that a row does not have prints as a dash.

    `notes` are sentences printed under the table: what a reader must know to read it right.
    """

    title: str
    columns: list[str]
    rows: dict[str, dict[str, Value]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """The table as text, without its header: three decimals for a float."""
        return [[name, *(_text(row.get(column)) for column in self.columns)] for name, row in self.rows.items()]

    def markdown(self) -> str:
        """GitHub Markdown: title in bold, table, notes."""
        lines = [f"**{self.title}**", "", f"| | {' | '.join(self.columns)} |", "|---|" + "---:|" * len(self.columns)]
        lines += [f"| {' | '.join(row)} |" for row in self.cells()]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """What `rich.print` shows: as many columns side by side as the terminal has room for, the others below."""
        from rich.table import Table as RichTable

        cells = self.cells()
        frame = 3  # of a column: its line and a space on either side
        widths = [
            max(map(len, [*name.split(), *(row[number] for row in cells)]))
            for number, name in enumerate(self.columns, 1)
        ]
        named = min(max((len(row[0]) for row in cells), default=0), _NAME_WIDTH)
        blocks: list[list[int]] = [[]]
        for number, width in enumerate(widths):
            room = options.max_width - named - frame - 1 - sum(widths[each] + frame for each in blocks[-1])
            if blocks[-1] and width + frame > room:
                blocks.append([])
            blocks[-1].append(number)
        for place, block in enumerate(blocks):
            last = place == len(blocks) - 1
            table = RichTable(title=None if place else self.title, caption_justify="left")
            table.caption = "\n".join(self.notes) if last and self.notes else None
            table.add_column("", width=named)
            for number in block:
                table.add_column(self.columns[number], justify="right", width=widths[number])
            for row in cells:
                table.add_row(row[0], *(row[1 + number] for number in block))
            yield table

    def to_dict(self) -> dict[str, Any]:
        """Plain values at full precision, for JSON."""
        return asdict(self)


def _text(value: Value | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
