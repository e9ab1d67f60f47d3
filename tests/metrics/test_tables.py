"""Tables: the three ways out of one table."""

import io
import json

from rich.console import Console

from finecf.metrics import Interval
from finecf.metrics.tables import Table


def table() -> Table:
    interval = Interval(0.5, 0.25, 0.75, 0.95, 10)
    return Table("Title", ["a", "b"], {"one": {"a": 1, "b": 0.12345}, "two": {"b": interval}}, ["A note."])


def test_markdown():
    assert table().markdown().splitlines() == [
        "**Title**",
        "",
        "| | a | b |",
        "|---|---:|---:|",
        "| one | 1 | 0.123 |",
        "| two | – | 0.500 [0.250, 0.750] |",
        "",
        "A note.",
    ]


def printed(shown: Table, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(shown)
    return console.file.getvalue().splitlines()


def test_a_terminal_shows_every_value_in_full_however_narrow_it_is():
    words = ["found", "denoised valid", "latent error", "classifier LPIPS-like"]
    columns = [f"{word} {number}" for number in range(3) for word in words]
    wide = Table("Title", columns, {"the first row": dict(zip(columns, range(1000, 1012), strict=True))}, ["A note."])
    for width in (300, 80, 40):
        lines = printed(wide, width)
        text = "\n".join(lines)
        assert max(map(len, lines)) <= width
        assert all(str(value) in text for value in range(1000, 1012))
        assert text.count("Title") == text.count("A note.") == 1
        assert text.count("the first row") == sum("┏" in line for line in lines)
        assert "…" not in text
    assert sum("┏" in line for line in printed(wide, 300)) == 1
    assert sum("┏" in line for line in printed(wide, 80)) > 1


def test_a_table_without_rows_shows_its_columns():
    assert any("a" in line and "b" in line for line in printed(Table("Title", ["a", "b"]), 80))


def test_rich_and_json_hold_the_same_rows():
    text = "\n".join(printed(table(), 80))
    assert "0.123" in text
    assert "0.500 [0.250, 0.750]" in text
    plain = json.loads(json.dumps(table().to_dict()))
    assert plain["rows"]["one"] == {"a": 1, "b": 0.12345}
    assert plain["rows"]["two"]["b"]["high"] == 0.75
