"""The operators by their definitions, in float64 numpy: what the emulated kernels are compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def widen(values: NDArray) -> Array:
    """Float64 of what a kernel reads: float16, float32, or bfloat16 bits in uint16."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def bfloat16_bits(values: NDArray) -> NDArray[np.uint16]:
    """The upper half of float32: bfloat16, rounded towards zero."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def logsumexp(x: Array) -> Array:
    peak = x.max(-1, keepdims=True)
    return (peak + np.log(np.exp(x - peak).sum(-1, keepdims=True)))[..., 0]


def value_of(logits: Array, target: NDArray, value: str) -> Array:
    """Value of logits [B, ..., C] for the target class of each image."""
    chosen = np.broadcast_to(target.reshape(-1, *[1] * (logits.ndim - 1)), (*logits.shape[:-1], 1))
    wanted = np.take_along_axis(logits, chosen, -1)[..., 0]
    if value == "logit":
        return wanted
    if value == "log_odds":
        others = logits.copy()
        np.put_along_axis(others, chosen, -np.inf, -1)
        return wanted - logsumexp(others)
    log_prob = wanted - logsumexp(logits)
    return np.exp(log_prob) if value == "prob" else log_prob


def masked_class_scores(
    cell_logits: NDArray, base_logits: NDArray, masks: NDArray, target: NDArray, value: str
) -> Array:
    logits = widen(base_logits)[:, None] + np.einsum("mp,bpc->bmc", widen(masks), widen(cell_logits))
    return value_of(logits, target, value)


def samples(
    cell_logits: NDArray, base_logits: NDArray, permutations: NDArray, target: NDArray, value: str, antithetic: bool
) -> Array:
    """Marginals [B, M, P] of each permutation, or of it and its reversal on average."""
    cells, base = widen(cell_logits), widen(base_logits)
    out = np.zeros((cells.shape[0], *permutations.shape))
    for m, row in enumerate(permutations):
        orders = [row, row[::-1]] if antithetic else [row]
        for order in orders:
            walk = np.concatenate([base[:, None], cells[:, order]], 1).cumsum(1)
            out[:, m, order] += np.diff(value_of(walk, target, value), axis=1) / len(orders)
    return out


def tiles(marginals: Array) -> tuple[Array, Array]:
    """Mean and squared deviations over tiles of 32 samples, [B, T, P] each."""
    parts = [marginals[:, start : start + 32] for start in range(0, marginals.shape[1], 32)]
    mean = np.stack([part.mean(1) for part in parts], 1)
    m2 = np.stack([((part - part.mean(1, keepdims=True)) ** 2).sum(1) for part in parts], 1)
    return mean, m2


def cosines(query: NDArray, bank: NDArray) -> Array:
    def unit(rows: Array) -> Array:
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms == 0, 1, norms)

    return unit(widen(query)) @ unit(widen(bank)).T


def losses(arguments: dict, image: int, logits: NDArray) -> Array:
    """Loss of every pair [P, N] of one image; +inf where the pair is not allowed by the image's range or shortlist."""
    cells, candidates = widen(arguments["cell_logits"])[image], widen(arguments["candidate_logits"])
    after = logits.astype(np.float64) - cells[:, None] + candidates[None]
    unlikely = logsumexp(after) - after[..., arguments["target"][image]]
    similarity = widen(arguments["similarity"])[image]
    out = arguments["weight_sim"] * (1 - similarity) + arguments["weight_cls"] * unlikely
    start, stop = arguments["candidate_range"][image]
    allowed = np.zeros(out.shape, bool)
    allowed[:, start:stop] = True
    if arguments["shortlist"] is not None:
        listed = np.zeros(out.shape, bool)
        for cell, rows in enumerate(arguments["shortlist"][image]):
            listed[cell, rows[(rows >= 0) & (rows < out.shape[1])]] = True
        allowed &= listed
    return np.where(allowed, out, np.inf)


def search(arguments: dict, base: NDArray, scores: NDArray, top: int, edits: int, reuse: bool) -> tuple[list, float]:
    """What `replace_until_flip` returns, all edits decided in float64, and the narrowest margin of any decision."""
    cell_logits, candidates = widen(arguments["cell_logits"]), widen(arguments["candidate_logits"])
    images, cells, classes = cell_logits.shape
    chosen, taken = np.full((2, images, edits), -1)
    loss = np.full((images, edits), np.inf)
    path = np.zeros((images, edits + 1, classes))
    count, flipped = np.zeros(images, int), np.zeros(images, bool)
    margin = np.inf
    for b in range(images):
        logits = widen(base)[b] + cell_logits[b].sum(0)
        left = list(np.argsort(-scores[b], kind="stable"))
        used = np.zeros(len(candidates), bool)
        for t in range(edits + 1):
            path[b, t:] = logits
            second, first = np.sort(logits)[-2:]
            margin = min(margin, first - second)
            flipped[b] = logits.argmax() == arguments["target"][b]
            exact = np.full((cells, len(candidates)), np.inf)
            exact[left[:top]] = losses(arguments, b, logits)[left[:top]]
            exact[:, used & (not reuse)] = np.inf
            if flipped[b] or t == edits or not np.isfinite(exact).any():
                count[b] = t
                break
            p, n = np.unravel_index(exact.argmin(), exact.shape)
            chosen[b, t], taken[b, t], loss[b, t] = p, n, exact[p, n]
            margin = min(margin, np.partition(exact, 1, None)[1] - exact[p, n]) if exact.size > 1 else margin
            logits = logits - cell_logits[b, p] + candidates[n]
            left.remove(p)
            used[n] = True
    return [chosen, taken, loss, path, count, flipped], margin
