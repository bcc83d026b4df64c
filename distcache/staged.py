"""What the passes of a contribution have shown and no cache has counted yet."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from distcache.entries import Shown, Slab
from distcache.strategies import Columns, State, Value


class Staged:
    """States and rows of one forward pass, or of the many of a generation. They count all together, or never."""

    def __init__(self) -> None:
        self.shown: list[Shown] = []
        # By keys, each with the number of states that it's made of: those that don't fit, and those of other cells.
        self._slabs: dict[tuple[str, ...], list[tuple[Slab, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._slabs or self.shown)

    @property
    def slabs(self) -> list[Slab]:
        """The states; few of the same keys, whatever the number of passes."""
        return [slab for found in self._slabs.values() for slab, _ in found]

    def fold(self, slab: Slab) -> None:
        """Add a state: to that of the same keys, if an earlier pass has shown one that it fits.

        Joining states that bring other cells takes as long as they have cells, so only those of as many passes are
        joined: of a thousand passes ten joins each, and not a thousand.
        """
        found = self._slabs.setdefault(slab.keys, [])
        found.append((slab, 1))
        while len(found) > 1:
            (before, n), (after, m) = found[-2:]
            if n > m and not _beside_alike(before, after):
                break
            joined = _joined(before, after)
            if joined is None:
                break
            found[-2:] = [(joined, n + m)]

    def keep(self, shown: Shown) -> None:
        """Add a value that is kept."""
        self.shown.append(shown)

    def in_order(self) -> list[Shown]:
        """What was kept, by key: the rows of several passes as one value, by sample, then by position."""
        by_key: dict[str, list[Shown]] = {}
        for one in self.shown:
            by_key.setdefault(one.key, []).append(one)
        orders: dict[tuple[int, ...], tuple[Tensor, Columns]] = {}
        found = []
        for parts in by_key.values():
            columns = [part.value.columns for part in parts if part.value.columns is not None]
            if len(parts) == 1 or not parts[0].value.rows or len(columns) < len(parts):
                found.extend(parts)
                continue
            passes = tuple(map(id, columns))  # sites that select alike share them
            if passes not in orders:
                orders[passes] = _order(columns)
            order, ordered = orders[passes]
            data = torch.cat([part.value.data for part in parts])[order.to(parts[0].value.data.device)]
            found.append(dataclasses.replace(parts[0], value=Value(data, rows=True, columns=ordered)))
        return found


def _order(columns: list[Columns]) -> tuple[Tensor, Columns]:
    """The order by sample of the rows of several passes, and what is known of all of them, in that order."""
    names = [name for name in columns[0].by_name if all(name in one.by_name for one in columns)]
    by_name = {name: torch.cat([one.by_name[name] for one in columns]) for name in names}
    order = by_name["sample"].argsort(stable=True)
    return order, Columns({name: column[order] for name, column in by_name.items()}, columns[0].indexed)


def _joined(before: Slab, slab: Slab) -> Slab | None:
    """Two states of the same keys as one; None where they can't be, which will be said when they are counted."""
    before, slab = before.computed(), slab.computed()
    strategy, a, b = before.strategy, before.state, slab.state
    if before.result != slab.result or strategy.kinds(a, 1) != strategy.kinds(b, 1):
        return None
    if _beside_alike(before, slab):
        fields = [field.name for field in strategy.layout(a)]
        state = {name: a[name].clone(memory_format=torch.contiguous_format) for name in fields}
        strategy.fold_(state, {name: b[name] for name in fields})
        return dataclasses.replace(before, state={**a, **state})
    both = [strategy.combine(_of_key(a, k), _of_key(b, k)) for k in range(len(slab.keys))]
    return dataclasses.replace(before, state={name: torch.stack([one[name] for one in both]) for name in both[0]})


def _beside_alike(before: Slab, slab: Slab) -> bool:
    """Whether states have alike what is beside their fields: of groups, the cells that they bring."""
    fields = {field.name for field in before.strategy.layout(before.state)}
    beside = before.state.keys() - fields
    return beside == slab.state.keys() - fields and all(_same(before.state[n], slab.state[n]) for n in beside)


def _of_key(state: State, k: int) -> State:
    return {name: x[k] for name, x in state.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
