"""Which samples reductions have seen, as sets of intervals: what makes a sample that comes twice an error."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distcache.errors import BadCache, DuplicateSamples


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
        few, many = sorted((self.bounds, other.bounds), key=len)
        # Each interval of `few` meets those of `many` from `first` up to `last`.
        first = np.searchsorted(many[:, 1], few[:, 0], side="right")
        last = np.searchsorted(many[:, 0], few[:, 1], side="left")
        meets = last - first
        mine = np.repeat(np.arange(len(few)), meets)
        theirs = np.arange(len(mine)) - np.repeat(np.cumsum(meets) - meets, meets) + np.repeat(first, meets)
        low = np.maximum(few[mine, 0], many[theirs, 0])
        high = np.minimum(few[mine, 1], many[theirs, 1])
        return IntervalSet(np.stack([low, high], axis=1))

    def words(self, limit: int = 4) -> str:
        """`3, 7..9` for messages."""
        shown = [str(a) if b == a + 1 else f"{a}..{b - 1}" for a, b in self.bounds[:limit].tolist()]
        return ", ".join(shown) + (", …" if len(self.bounds) > limit else "")


class Ledger:
    """The samples behind reductions, by the set of keys that saw them."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        # Sets that shrink by half or more from one to the next, as in a binary counter: shuffled samples make many
        # intervals, and one set would be written anew at every `add`.
        self._seen: dict[frozenset[str], list[IntervalSet]] = {}

    def __bool__(self) -> bool:
        return bool(self._seen)

    def seen(self, key: str) -> IntervalSet:
        """The samples that a key has seen."""
        sets = [part for keys, parts in self._seen.items() if key in keys for part in parts]
        return functools.reduce(operator.or_, sets, IntervalSet())

    def check(self, keys: frozenset[str], samples: IntervalSet, who: str = "this cache") -> None:
        """`DuplicateSamples` if one of `keys` has seen one of `samples` already."""
        for held, parts in self._seen.items():
            shared = keys if held == keys else held & keys
            if not shared:
                continue
            twice = functools.reduce(operator.or_, (part & samples for part in parts))
            if len(twice):
                raise DuplicateSamples(
                    f"{len(twice)} sample(s) would count twice in {len(shared)} reduction(s) such as {min(shared)!r}: "
                    f"{who} has seen {twice.words()} already. A reduction cannot take a sample out again: deal each "
                    "sample to one rank once, or keep its rows with Cat(), where it counts once."
                )

    def add(self, keys: frozenset[str], samples: IntervalSet) -> None:
        """Note samples that `check` has let through."""
        if not keys or not len(samples):
            return
        parts = self._seen.setdefault(keys, [])
        parts.append(samples)
        while len(parts) > 1 and 2 * len(parts[-1].bounds) > len(parts[-2].bounds):
            last = parts.pop()
            parts[-1] = parts[-1] | last

    def check_all(self, other: Ledger, who: str = "this cache") -> None:
        """`check` for everything another ledger holds."""
        for keys, parts in other._seen.items():
            for samples in parts:
                self.check(keys, samples, who)

    def add_all(self, other: Ledger) -> None:
        """`add` for everything another ledger holds."""
        for keys, parts in list(other._seen.items()):
            for samples in list(parts):
                self.add(keys, samples)

    def forget(self, key: str) -> None:
        """Take a key out: its state is gone, so nothing that it saw counts any more."""
        for keys in [keys for keys in self._seen if key in keys]:
            parts = self._seen.pop(keys)
            for samples in parts:
                self.add(keys - {key}, samples)

    def copy(self) -> Ledger:
        twin = Ledger()
        twin.add_all(self)
        return twin

    def to_plain(self, everything: Set[str] = frozenset()) -> list[Any]:
        """As lists of keys and bounds, for the wire and for manifests; None for keys that are `everything`."""
        seen = {keys: functools.reduce(operator.or_, parts) for keys, parts in self._seen.items()}
        return [
            [None if keys == everything else sorted(keys), samples.bounds.reshape(-1).tolist()]
            for keys, samples in seen.items()
        ]

    @classmethod
    def from_plain(cls, plain: Iterable[Sequence[Any]]) -> Ledger:
        """The inverse of `to_plain`. `BadCache` for what it didn't make."""
        ledger = cls()
        try:
            for keys, flat in plain:
                samples = IntervalSet(np.asarray(flat, dtype=np.int64))
                named = isinstance(keys, frozenset) or all(isinstance(key, str) for key in keys)  # a set is our own
                if not named or (np.diff(samples.bounds.reshape(-1)) <= 0).any():
                    raise ValueError("expected keys and the rising bounds of intervals")
                ledger.add(frozenset(keys), samples)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadCache(f"cannot read which samples were seen: {error}.") from error
        return ledger


def samples_of(index: Iterable[int] | Tensor | int) -> Tensor:
    """An index as an int64 tensor [n] on the CPU. TypeError for what holds no integers."""
    given: Any = [index] if isinstance(index, int) else index
    samples = torch.as_tensor(given if isinstance(given, (Tensor, np.ndarray)) else list(given)).detach().cpu()
    if samples.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if samples.dim() > 1 or samples.dtype.is_floating_point or samples.dtype.is_complex or samples.dtype == torch.bool:
        raise TypeError(f"expected one integer index per sample, [n], got {samples.dtype} {tuple(samples.shape)}.")
    return samples.to(torch.int64).reshape(-1)
