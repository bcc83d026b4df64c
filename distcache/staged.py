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
        self.slabs: list[Slab] = []
        self.shown: list[Shown] = []
        self._place: dict[tuple[str, ...], int] = {}  # of keys in `slabs`

    def __bool__(self) -> bool:
        return bool(self.slabs or self.shown)

    def fold(self, slab: Slab) -> None:
        """Add a state; to that of the same keys, if an earlier pass has shown one that it fits."""
        place = self._place.get(slab.keys)
        joined = None if place is None else _joined(self.slabs[place], slab)
        if place is not None and joined is not None:
            self.slabs[place] = joined
        else:
            self._place[slab.keys] = len(self.slabs)
            self.slabs.append(slab)

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
    strategy, a, b = before.strategy, before.state, slab.state
    if before.result != slab.result or strategy.kinds(a, 1) != strategy.kinds(b, 1):
        return None
    fields = {field.name for field in strategy.layout(a)}
    beside = {name: x for name, x in a.items() if name not in fields}  # of groups, the cells that it brings
    if beside.keys() == b.keys() - fields and all(_same(x, b[name]) for name, x in beside.items()):
        state = {name: a[name].clone(memory_format=torch.contiguous_format) for name in fields}
        strategy.fold_(state, {name: b[name] for name in fields})
        return dataclasses.replace(before, state={**state, **beside})
    both = [strategy.combine(_of_key(a, k), _of_key(b, k)) for k in range(len(slab.keys))]
    return dataclasses.replace(before, state={name: torch.stack([one[name] for one in both]) for name in both[0]})


def _of_key(state: State, k: int) -> State:
    return {name: x[k] for name, x in state.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
