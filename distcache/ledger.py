"""Which samples reductions have seen, as sets of intervals: what makes a sample that comes twice an error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distcache.errors import DuplicateSamples


class IntervalSet:
    """A set of integers as sorted, disjoint, half-open intervals: int64 [m, 2]."""

    __slots__ = ("bounds",)

    def __init__(self, bounds: np.ndarray | Sequence[Sequence[int]] = ()) -> None:
        self.bounds = np.asarray(bounds, dtype=np.int64).reshape(-1, 2)

    @classmethod
    def of(cls, samples: Iterable[int] | Tensor) -> IntervalSet:
        """The set of these samples, in any order."""
        unique = np.unique(np.asarray(samples if isinstance(samples, Tensor) else list(samples), dtype=np.int64))
        if not len(unique):
            return cls()
        breaks = np.flatnonzero(np.diff(unique) != 1)
        return cls(np.stack([unique[np.r_[0, breaks + 1]], unique[np.r_[breaks, len(unique) - 1]] + 1], axis=1))

    def __len__(self) -> int:
        return int((self.bounds[:, 1] - self.bounds[:, 0]).sum())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IntervalSet) and np.array_equal(self.bounds, other.bounds)

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, sample: int) -> bool:
        at = int(np.searchsorted(self.bounds[:, 0], sample, side="right")) - 1
        return at >= 0 and sample < self.bounds[at, 1]

    def __or__(self, other: IntervalSet) -> IntervalSet:
        both = np.concatenate([self.bounds, other.bounds])
        if not len(both):
            return IntervalSet()
        both = both[np.argsort(both[:, 0], kind="stable")]
        reach = np.maximum.accumulate(both[:, 1])
        starts = np.r_[True, both[1:, 0] > reach[:-1]]
        return IntervalSet(np.stack([both[starts, 0], reach[np.r_[np.flatnonzero(starts)[1:] - 1, len(both) - 1]]], 1))

    def __and__(self, other: IntervalSet) -> IntervalSet:
        found = []
        i = j = 0
        while i < len(self.bounds) and j < len(other.bounds):
            low = max(self.bounds[i, 0], other.bounds[j, 0])
            high = min(self.bounds[i, 1], other.bounds[j, 1])
            if low < high:
                found.append((low, high))
            if self.bounds[i, 1] < other.bounds[j, 1]:
                i += 1
            else:
                j += 1
        return IntervalSet(found)

    def words(self, limit: int = 4) -> str:
        """`3, 7..9` for messages."""
        shown = [str(a) if b == a + 1 else f"{a}..{b - 1}" for a, b in self.bounds[:limit].tolist()]
        return ", ".join(shown) + (", …" if len(self.bounds) > limit else "")


class Ledger:
    """The samples behind reductions, by the set of keys that saw them."""

    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen: dict[frozenset[str], IntervalSet] = {}

    def __bool__(self) -> bool:
        return bool(self.seen)

    def check(self, keys: frozenset[str], samples: IntervalSet, who: str = "this cache") -> None:
        """`DuplicateSamples` if one of `keys` has seen one of `samples` already."""
        for held, inside in self.seen.items():
            shared = held & keys
            twice = inside & samples if shared else IntervalSet()
            if len(twice):
                raise DuplicateSamples(
                    f"{len(twice)} sample(s) would count twice in {len(shared)} reduction(s) such as {min(shared)!r}: "
                    f"{who} has seen {twice.words()} already. A reduction cannot take a sample out again: deal each "
                    "sample to one rank once, or keep its rows with Cat(), where it counts once."
                )

    def add(self, keys: frozenset[str], samples: IntervalSet) -> None:
        """Note samples that `check` has let through."""
        if keys and len(samples):
            self.seen[keys] = self.seen.get(keys, IntervalSet()) | samples

    def check_all(self, other: Ledger, who: str = "this cache") -> None:
        """`check` for everything another ledger holds."""
        for keys, samples in other.seen.items():
            self.check(keys, samples, who)

    def add_all(self, other: Ledger) -> None:
        """`add` for everything another ledger holds."""
        for keys, samples in other.seen.items():
            self.add(keys, samples)

    def copy(self) -> Ledger:
        twin = Ledger()
        twin.seen = dict(self.seen)
        return twin

    def to_plain(self) -> list[Any]:
        """As lists of keys and bounds, for the wire and for manifests."""
        return [[sorted(keys), samples.bounds.reshape(-1).tolist()] for keys, samples in self.seen.items()]

    @classmethod
    def from_plain(cls, plain: Iterable[Sequence[Any]]) -> Ledger:
        ledger = cls()
        for keys, bounds in plain:
            ledger.seen[frozenset(keys)] = IntervalSet(np.asarray(bounds, dtype=np.int64))
        return ledger


def samples_of(index: Iterable[int] | Tensor | int) -> Tensor:
    """An index as an int64 tensor [n]. TypeError for what holds no integers."""
    if isinstance(index, int):
        index = [index]
    samples = torch.as_tensor(index if isinstance(index, (Tensor, np.ndarray)) else list(index)).detach().cpu()
    if samples.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if samples.dim() != 1 or samples.dtype.is_floating_point or samples.dtype == torch.bool:
        raise TypeError(f"expected one integer index per sample, [n], got {samples.dtype} {tuple(samples.shape)}.")
    return samples.to(torch.int64)
