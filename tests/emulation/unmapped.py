"""An index that no emulated kernel can follow into memory of this process."""

from __future__ import annotations

import numpy as np


def unmapped_entry(indices: np.ndarray) -> int:
    """An entry for `indices` (int32, or int64 where its elements may be single bytes) that always faults.

    The kernel's arrays are mapped below the libraries of the process, and below all of them lie terabytes that nobody
    maps; a few megabytes above an array may lie another library's data, which a kernel would silently overwrite.
    """
    return max(np.iinfo(indices.dtype).min, -(2**40))
