"""Errors against an oracle of more digits stay within the bounds that docs/numerics.md states, for every operator."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cases
import numpy as np
import pytest

from finecf import _native

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, PAGE = ROOT / "benchmarks" / "numerics.py", ROOT / "docs" / "numerics.md"

pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks/ is not beside the tests (a copy of the package alone)"),
    pytest.mark.skipif(np.finfo(np.longdouble).nmant <= 52, reason="longdouble is no wider than float64 here"),
]


@pytest.fixture(scope="module")
def numerics() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finecf_numerics", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_errors_are_rounding(numerics: ModuleType) -> None:
    """Every operator, quantity, type and backend has a row, and none is beyond its bound."""
    assert set(numerics.OPERATORS) == set(_native.OPERATORS), "an operator needs an entry in benchmarks/numerics.py"
    rows = numerics.measure(numerics.QUICK, cases.DEVICE.type)
    found = {(row.operator, row.quantity, row.dtype, row.backend) for row in rows}
    expected = {
        (name, quantity, dtype, backend)
        for name in _native.OPERATORS
        for quantity in numerics.OPERATORS[name].bounds
        for dtype in numerics.DTYPES
        for backend in numerics.backends(cases.DEVICE.type)
        if numerics.has_kernel(name, backend, dtype)
    }
    assert found == expected
    assert all(np.isfinite([row.absolute, row.scaled]).all() for row in rows)
    assert numerics.beyond(rows) == []


def test_the_page_has_every_operator_within_the_bounds_of_the_script(numerics: ModuleType) -> None:
    page = PAGE.read_text()
    tables = page.split("<!-- numerics cpu -->")[1].split("<!-- end of numerics cpu -->")[0]
    sections = dict(re.findall(r"### `(\w+)`\n(.*?)(?=\n###|\Z)", tables, flags=re.DOTALL))
    assert set(sections) == set(_native.OPERATORS)
    for name, section in sections.items():
        header, _, *lines = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("|")
        ]
        columns = header[3:-1]
        assert columns[0] == "plain torch"
        assert any(column.startswith("CPU ") for column in columns)
        assert columns[-1] == "CUDA, emulated"
        operator = numerics.OPERATORS[name]
        assert {(line[0], line[1]) for line in lines} == {(q, d) for q in operator.bounds for d in numerics.DTYPES}
        for quantity, _, stated, *figures in lines:
            bound, on_cuda = operator.bounds[quantity], operator.bounds_cuda.get(quantity)
            assert stated == f"{bound:g}" + ("" if on_cuda is None else f" (CUDA {on_cuda:g})")
            for column, figure in zip(columns, figures[:-1], strict=True):
                scaled = re.fullmatch(r"\d\.\de[+-]\d\d \((\d+\.\d\d)\)|0|–", figure)
                assert scaled, figure
                limit = on_cuda if on_cuda is not None and column.startswith("CUDA") else bound
                assert float(scaled[1] or 0) <= limit


# ---- what measures is itself tested


def spoilt(numerics: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, change: Any) -> set[str]:
    """The quantities found beyond their bounds where `change` has changed what the operator returned."""
    honest = numerics.run
    monkeypatch.setattr(numerics, "run", lambda *given: change(*honest(*given)))
    monkeypatch.setattr(numerics, "backends", lambda device="cpu": ["plain torch"])
    rows = numerics.measure(numerics.QUICK, operators=[name])
    return {row.quantity for row in rows if row.dtype == "float32" and row.scaled > numerics.bound_of(row)}


@pytest.mark.parametrize("name", _native.OPERATORS)
def test_a_lost_digit_is_seen(numerics: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An error of 1e-4 in one place: float32 with its last digits gone."""

    def change(*result: Any) -> tuple[Any, ...]:
        parts = [part.copy() for part in result]
        for part in parts:
            if part.dtype == np.longdouble:
                part.flat[0] += 1e-4 * max(1, abs(part.flat[0]))
        return tuple(parts)

    assert spoilt(numerics, monkeypatch, name, change)


def test_a_value_that_is_no_number_is_seen(numerics: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = spoilt(numerics, monkeypatch, "masked_class_scores", lambda scores: (scores * np.nan,))
    assert nothing == set(numerics.VALUES)


@pytest.mark.parametrize(
    ("name", "quantity", "change"),
    [
        ("nearest_candidates", "regret", lambda cosine, index: (cosine, (index + 1) % 20)),
        ("nearest_candidates", "regret", lambda cosine, index: (cosine, index[:, :1].repeat(index.shape[1], 1))),
        ("best_replacement", "regret", lambda cell, row, loss: (cell, (row + 1) % 20, loss)),
        ("replace_until_flip", "regret", lambda cells, rows, *rest: (cells, np.where(rows < 0, -1, 20 - rows), *rest)),
        ("replace_until_flip", "stop", lambda *parts: (*parts[:-1], ~parts[-1])),
        ("replace_until_flip", "stop", lambda *parts: (*parts[:4], np.maximum(parts[4] - 1, 0), parts[5])),
    ],
)
def test_a_wrong_choice_is_seen(
    numerics: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, quantity: str, change: Any
) -> None:
    assert quantity in spoilt(numerics, monkeypatch, name, change)


def test_the_oracle_has_the_digits_that_it_claims(numerics: ModuleType) -> None:
    """Scores and losses by fifty digits of mpmath: a thousandth of a float64 unit lies between the two."""
    mpmath = pytest.importorskip("mpmath", reason="mpmath comes with torch, but no torch needs to bring it for ever")
    case = numerics.QUICK[1]._replace(cells=4, classes=5, rows=6)
    unit = np.finfo(np.float64).eps / 1000

    def logsumexp(logits: list[Any]) -> Any:
        return mpmath.log(mpmath.fsum(mpmath.exp(each) for each in logits))

    def longdouble(value: Any) -> np.longdouble:
        return np.longdouble(mpmath.nstr(value, 40))

    with mpmath.workdps(50):
        for _, given in numerics.score_arguments(case, np.random.default_rng(0)):
            target, value = given["target"].tolist(), given["value"]
            scores = np.zeros((2, 32), np.longdouble)
            for image, row in np.ndindex(2, 32):
                logits = [mpmath.mpf(each) for each in given["base_logits"][image]]
                for share, cell in zip(given["masks"][row], given["cell_logits"][image], strict=True):
                    logits = [
                        each + mpmath.mpf(share) * mpmath.mpf(add) for each, add in zip(logits, cell, strict=True)
                    ]
                wanted = logits[target[image]]
                others = logits[: target[image]] + logits[target[image] + 1 :]
                log_prob = wanted - logsumexp(logits)
                odds = wanted - logsumexp(others)
                exact = {"prob": mpmath.exp(log_prob), "log_prob": log_prob, "log_odds": odds, "logit": wanted}
                scores[image, row] = longdouble(exact[value])
            error, scale = numerics.score_oracle(numerics.widened(numerics.rounded(given, numerics.torch.float64, ())))(
                (scores,)
            )[""]
            assert error <= unit * scale
        _, given = numerics.best_arguments(case, np.random.default_rng(0))[0]
        losses = numerics.Losses(numerics.widened(numerics.rounded(given, numerics.torch.float64, ())), 1)
        logits = given["logits"][1]
        _, table = losses.of(logits.astype(np.longdouble), (), range(4))
        target = int(given["target"][1])
        for cell, row in np.ndindex(4, 6):
            parts = zip(logits, given["cell_logits"][1, cell], given["candidate_logits"][row], strict=True)
            after = [mpmath.mpf(a) - mpmath.mpf(b) + mpmath.mpf(c) for a, b, c in parts]
            exact = 1 - mpmath.mpf(given["similarity"][1, cell, row]) + logsumexp(after) - after[target]
            if np.isfinite(table[cell, row]):
                assert abs(table[cell, row] - longdouble(exact)) <= unit * numerics.size(logits)
