"""Tables: the three ways out of one table."""

import json

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


def test_rich_and_json_hold_the_same_rows():
    assert table().rich().row_count == 2
    plain = json.loads(json.dumps(table().to_dict()))
    assert plain["rows"]["one"] == {"a": 1, "b": 0.12345}
    assert plain["rows"]["two"]["b"]["high"] == 0.75
