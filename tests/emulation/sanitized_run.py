"""Runs calls from a file through a build of `_finecf_emulated`: `sanitized_run.py MODULE CALLS.npz`.

For a process of its own, with the sanitizer's runtime preloaded: it imports numpy and the module, nothing else. Each
call is made with both versions of the kernels and every seed, and its results are compared with those of the file.
Prints the names of the kernels that ran; ends with status 1 at a result that is off. See sanitized_cases.py.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import numpy as np


def main(module_path: str, calls_path: str) -> None:
    spec = importlib.util.spec_from_file_location("_finecf_emulated", module_path)
    assert spec is not None
    assert spec.loader is not None
    emulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(emulated)
    kernels: set[str] = set()
    with np.load(calls_path) as arrays:
        calls: list[dict[str, Any]] = json.loads(str(arrays["calls"]))
        for number, call in enumerate(calls):
            given = {name: arrays[f"{number}.argument.{name}"] for name in call["arrays"]} | call["others"]
            for version in ("naive", "fast"):
                for seed in call["seeds"]:
                    plan = emulated.Plan(version=version, seed=seed, **call["plan"])
                    results = getattr(emulated, call["operator"])(**given, plan=plan)
                    results = results if isinstance(results, tuple) else (results,)
                    kernels.update(emulated.kernels())
                    for which, tolerance in call["tolerances"].items():
                        result, want = results[int(which)], arrays[f"{number}.expected.{which}"]
                        if result.shape != want.shape or not np.allclose(result, want, rtol=0, atol=tolerance):
                            what = f"result {which} of call {number}"
                            sys.exit(f"{call['operator']}, {version}, seed {seed}: {what} is off")
    print(json.dumps(sorted(kernels)))


if __name__ == "__main__":
    main(*sys.argv[1:])
