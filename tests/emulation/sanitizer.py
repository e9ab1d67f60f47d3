"""How the emulated kernels are built and run with the address and the undefined-behaviour sanitizer."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

# Left out is what the kernels cannot do or what the address sanitizer sees as well: these checks double the compile.
_REDUNDANT = "vptr,null,object-size,return,nonnull-attribute,returns-nonnull-attribute"
FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    f"-fno-sanitize={_REDUNDANT}",
    "-fno-sanitize-recover=all",
)


def environment(compiler: str) -> dict[str, str]:
    """For a process that loads a sanitized module though it is not sanitized itself; skips the test where none can."""
    macros = subprocess.run(
        [compiler, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True, check=True
    )
    if "__clang__" in macros.stdout:
        pytest.skip(f"the sanitized run preloads gcc's libasan, and {compiler} is clang")
    libraries = []
    # Python itself is C: without libstdc++ in place from the start, the sanitizer finds no __cxa_throw to stand before.
    for name in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not found.is_absolute():
            pytest.skip(f"the sanitized run needs {name}, which {compiler} does not have")
        libraries.append(str(found))
    return os.environ | {
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
