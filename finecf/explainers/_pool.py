"""The candidates of a search: a slice of the bank, with all that does not change from image to image."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from finecf.models import CandidateBank, HeadFold


class Pool:
    """N candidates: the bank rows of one or more half-open ranges, numbered through from 0.

    Holds the rows themselves where `rows_budget` bytes allow; otherwise they are streamed from the bank.

    Attributes:
        logits: [N,C] what each row adds to the logits, for a linear head; [N,0] for other heads.
        inverse_norm: [N] one over the length of each row; 0 for a zero row, whose cosine is 0.
    """

    def __init__(
        self,
        bank: CandidateBank,
        ranges: Sequence[tuple[int, int]],
        logits: Sequence[Tensor],
        device: torch.device,
        rows_budget: int,
    ) -> None:
        self.bank = bank
        self.device = device
        self.ranges = list(ranges)
        self.parts = list(logits)
        self.size = sum(stop - start for start, stop in ranges)
        self._rows: Tensor | None = None
        if self.size * bank.width * 4 <= rows_budget:
            self._rows = _joined([bank.rows(start, stop).to(device) for start, stop in ranges])
        norms = _joined([bank.norms[start:stop].to(device) for start, stop in ranges])
        self.inverse_norm = torch.where(norms > 0, 1 / norms, 0)
        self.logits = _joined(self.parts) if self.parts else norms.new_empty(self.size, 0)

    @cached_property
    def peaks(self) -> Tensor:
        """[N] the highest of each row's logits."""
        return self.logits.amax(1)

    @cached_property
    def exponentials(self) -> Tensor:
        """[N,C] exp(logits - peaks): with them a sum over classes for all pairs is one matrix product."""
        return (self.logits - self.peaks[:, None]).exp_()

    @property
    def bytes(self) -> int:
        """Bytes held, the rows included, and the exponentials, which are computed on first use."""
        held = 2 * self.logits.nbytes + self.inverse_norm.nbytes
        return held + (self._rows.nbytes if self._rows is not None else 0)

    def light(self, budget: int) -> bool:
        """Whether a few tensors of the size of `logits` are well within a memory budget in bytes."""
        return self.logits.nbytes <= budget // 8

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """(first candidate, rows [n,D]) in order: all at once where the rows are held, else piece by piece."""
        if self._rows is not None:
            yield 0, self._rows
            return
        first = 0
        for start, stop in self.ranges:
            for low, high in self.bank.slices(start, stop):
                yield first, self.bank.rows(low, high).to(self.device)
                first += high - low

    def similarity(self, vectors: Tensor) -> Tensor:
        """Cosine [Q,N] of vectors [Q,D] with every candidate."""
        norm = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        unit = vectors / torch.where(norm > 0, norm, 1)
        if self._rows is not None:
            # The lengths are divided out of the product: a normalised copy of the rows would cost more than it. The
            # tall factor comes first, which the matrix product serves faster.
            return (self._rows @ unit.T).T * self.inverse_norm
        cosine = unit.new_empty(len(unit), self.size)
        for first, rows in self.chunks():
            own = slice(first, first + len(rows))
            torch.mul(unit @ rows.T, self.inverse_norm[own], out=cosine[:, own])
        return cosine

    def vectors(self, candidates: Tensor) -> Tensor:
        """Feature vectors [K,D] of candidates [K]."""
        if self._rows is not None:
            return self._rows[candidates]
        rows = [self.bank.rows(row, row + 1) for row in map(self.bank_row, candidates.tolist())]
        return torch.cat([self.inverse_norm.new_empty(0, self.bank.width), *(row.to(self.device) for row in rows)])

    def bank_row(self, candidate: int) -> int:
        """The bank row of a candidate."""
        for start, stop in self.ranges:
            if candidate < stop - start:
                return start + candidate
            candidate -= stop - start
        raise IndexError(f"the pool has {self.size} candidates")

    def rows_of(self, image: int) -> Tensor:
        """Which candidates [N] bool come from one image of the bank."""
        rows = torch.cat([torch.arange(start, stop) for start, stop in self.ranges])
        return (rows // self.bank.cells == image).to(self.device)


class PoolCache:
    """The pools used last, up to a number of bytes; a pool is made again when the head's weights have changed."""

    def __init__(self, bank: CandidateBank, budget: int) -> None:
        self.bank = bank
        self.budget = budget
        self._pools: OrderedDict[tuple[object, ...], Pool] = OrderedDict()

    def get(self, ranges: Sequence[tuple[int, int]], fold: HeadFold | None, device: torch.device) -> Pool:
        """The pool of these bank ranges for a head."""
        logits = []
        if fold is not None and fold.kind == "linear":
            logits = [self.bank.candidate_logits(fold, start, stop) for start, stop in ranges]
        key = (tuple(ranges), len(self.bank), device)
        pool = self._pools.pop(key, None)
        # The bank gives the same tensor again for as long as it fits the head.
        if pool is None or list(map(id, pool.parts)) != list(map(id, logits)):
            pool = Pool(self.bank, ranges, logits, device, self.budget // 4)
        self._pools[key] = pool
        while len(self._pools) > 1 and sum(held.bytes for held in self._pools.values()) > self.budget:
            self._pools.popitem(last=False)
        return pool


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
