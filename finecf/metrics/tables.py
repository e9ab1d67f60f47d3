"""A small table that prints in a terminal, as Markdown and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from finecf.metrics.bootstrap import Interval

if TYPE_CHECKING:
    from rich.table import Table as RichTable

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

    def rich(self) -> RichTable:
        """The table for `rich.print`."""
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption="\n".join(self.notes) or None, caption_justify="left")
        table.add_column("")
        for column in self.columns:
            table.add_column(column, justify="right")
        for row in self.cells():
            table.add_row(*row)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values at full precision, for JSON."""
        return asdict(self)


def _text(value: Value | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
