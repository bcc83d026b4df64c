"""Grouped: the states of another strategy, one for each value of a column, side by side.

Legend of names: n rows, c cells of all, m cells that a contribution brings, k keys that lie side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.strategies.base import (
    Columns,
    Field,
    Fieldwise,
    Gathered,
    Groups,
    Kinds,
    State,
    Strategy,
    Value,
    corner,
)
from distcache.strategies.pattern import AveragePattern


@dataclass(frozen=True, slots=True)
class Grouped(Fieldwise):
    """`strategy` over the rows of each cell apart: class means, means per position or per token.

    Reads as what `strategy` reads as, with a leading dim of `size`, and so does its count. A cell that no row was in
    has a count of 0 and reads as `strategy` does of no samples: a mean is NaN, a sum 0.

    State: that of `strategy` with a leading dim of `size` on every field, wherever rows were: ranks that saw other
    cells agree in layout. A contribution holds only the m cells that it brings, in order, and names them in `cells`,
    int64 [m] (which is left out where it brings all): a pass over a thousand tokens makes no state of the vocabulary's
    size. Within a batch sums are float64, in the rows' order, so that other cells change no bit of a cell. On a GPU
    that order is left to chance, and last bits differ from run to run (`torch.use_deterministic_algorithms` fixes it).

    Args:
        strategy: a strategy that is `groupable`: Mean, Sum, Moments, Max, Min, Covariance, Histogram; AveragePattern
            with a size. TypeError or ValueError for one that isn't, with the reason.
        size: the number of cells, 1 or more.
        by: the column that names each row's cell, integers from 0 to size − 1; −1 leaves a row out. What was recorded
            beside (`label=`), or `"position"`, `"token_id"`. ValueError for another value, and where it's missing.
    """

    strategy: Fieldwise
    size: int
    by: str

    ragged = False
    accumulate = None

    def __post_init__(self) -> None:
        _check_groupable(self.strategy)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Grouped has size=1 or more cells, got {self.size!r}.")
        if not isinstance(self.by, str) or not self.by:
            raise ValueError(f"Grouped goes by a column's name, such as by='label', got by={self.by!r}.")

    @property
    def dim(self) -> int | Literal["auto"]:  # type: ignore[override]  # the wrapped one's, which can't be set here
        """Where samples lie: as `strategy` says."""
        return self.strategy.dim

    # -- contributions -----------------------------------------------------------------------------------------

    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        raise TypeError("Grouped needs to know which cells these are in: use take().")

    def take(self, value: Value) -> State:
        value_n, weight_n = self.strategy.samples(value)
        rows, cells, group_n = self._cells(value.columns, len(value_n))
        if rows is not None:
            rows = rows.to(value_n.device)
            value_n, weight_n = value_n[rows], None if weight_n is None else weight_n[rows]
        groups = Groups(group_n.to(value_n.device), len(cells))
        return self._bringing(cells, self.strategy.lift_groups(value_n, weight_n, groups))

    def take_slab(self, value: Value) -> State:
        value_nk, _ = self.strategy.samples(value)
        rows, cells, group_n = self._cells(value.columns, len(value_nk))
        if rows is not None:
            value_nk = value_nk[rows.to(value_nk.device)]
        groups = Groups(group_n.to(value_nk.device), len(cells))
        state = self.strategy.lift_groups_slab(value_nk, groups)
        return self._bringing(cells.expand(value_nk.shape[1], -1), state)

    def cells(self, columns: Columns | None, num_rows: int) -> Tensor:
        """Each row's cell, int64 [n] on the CPU; −1 of one that is left out. ValueError, TypeError for a column that
        isn't there or doesn't fit.
        """
        known: Mapping[str, Tensor] = {} if columns is None else columns.by_name
        if self.by not in known:
            there = ", ".join(known) or "none"
            raise ValueError(
                f"Grouped goes by the column {self.by!r}, and these rows have the columns: {there}. Give it beside "
                f"them, dc.record(model, sites, {self.by}={self.by}), or for values of your own "
                f"cache.add(key, value, {self.by}={self.by})."
            )
        cell_n = known[self.by]
        if cell_n.is_floating_point() or cell_n.is_complex() or cell_n.dtype == torch.bool:
            raise TypeError(
                f"Grouped goes by integers, got {cell_n.dtype} in the column {self.by!r}: convert it, {self.by}.long()."
            )
        if cell_n.shape != (num_rows,):
            raise ValueError(
                f"Grouped expects one {self.by!r} per sample, got {list(cell_n.shape)} for {num_rows} sample(s)."
            )
        cell_n = cell_n.to("cpu", torch.int64)
        outside = cell_n[(cell_n < -1) | (cell_n >= self.size)]
        if len(outside):
            raise ValueError(
                f"the column {self.by!r} holds {int(outside[0])}, and {len(outside)} of {num_rows} row(s) are outside "
                f"of the cells 0 to {self.size - 1} of size={self.size}: give a larger size, or −1 to rows that are to "
                "be left out."
            )
        return cell_n

    def _cells(self, columns: Columns | None, num_rows: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """(the rows that count, or None for all; the cells they are in, [m]; which of these each of them is in)."""
        cell_n, rows = self.cells(columns, num_rows), None
        if bool((cell_n < 0).any()):
            rows = (cell_n >= 0).nonzero()[:, 0]
            cell_n = cell_n[rows]
        cells, group_n = cell_n.unique(return_inverse=True)
        return rows, cells, group_n

    def _bringing(self, cells: Tensor, state: State) -> State:
        """A contribution of these cells, [m] or [k, m], to which the state's last leading dim belongs."""
        if cells.shape[-1] == self.size:
            return state
        return {**state, "cells": cells.to(next(iter(state.values())).device)}

    # -- states ------------------------------------------------------------------------------------------------

    def kinds(self, state: State, num_leading: int = 0) -> Kinds:
        fields = {name: tensor for name, tensor in state.items() if name != "cells"}
        kinds = Fieldwise.kinds(self, fields, num_leading)
        if "cells" not in state:
            return kinds
        return {name: ((self.size, *shape[1:]), dtype) for name, (shape, dtype) in kinds.items()}

    def layout(self, state: Mapping[str, Any]) -> tuple[Field, ...]:
        return self.strategy.layout(state)

    def accumulators(self, state: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        return self.strategy.accumulators(state)

    def combine(self, a: State, b: State) -> State:
        self.check(a, b)
        cells = torch.cat([a["cells"], b["cells"]]).unique() if "cells" in a and "cells" in b else None
        into, more = self._spread(a, cells), self._spread(b, cells)
        if any(into[name].shape != more[name].shape for name in into):  # of longer sequences
            into = Fieldwise.combine(self, into, more)
        else:
            self.strategy.fold_(into, more)
        return into if cells is None else self._bringing(cells, into)

    def _spread(self, state: State, cells: Tensor | None = None) -> State:
        """A new state of these cells, in order, or of all, with identities in those that `state` doesn't bring."""
        mine = state.get("cells")
        size = self.size if cells is None else len(cells)
        at = mine if cells is None or mine is None else torch.searchsorted(cells, mine)
        spread = {}
        for field in self.layout(state):
            held = state[field.name]
            if at is None:
                spread[field.name] = held.clone()
                continue
            identity = field.reduction.identity(held.dtype)
            spread[field.name] = held.new_full((size, *held.shape[1:]), identity).index_copy_(0, at, held)
        return spread

    def ragged_dims(self, field: str, ndim: int) -> tuple[bool, ...]:
        return (False, *self.strategy.ragged_dims(field, ndim - 1))

    def limits(self, field: str, ndim: int) -> tuple[int | None, ...]:
        return (None, *self.strategy.limits(field, ndim - 1))

    def split_dim(self, field: str, ndim: int, dim: int) -> int | None:
        return self.strategy.split_dim(field, ndim - 1, dim)

    def counts(self, state: State) -> Tensor:
        return self.strategy.counts(state)

    def fold_(self, into: State, other: State) -> None:
        """`into`: of all cells, and of keys side by side if `cells` is [k, m]."""
        if "cells" not in other:
            self.strategy.fold_(into, other)
            return
        cells = other["cells"]
        if cells.dim() > 1:  # as one key of k · size cells
            k = len(cells)
            cells = (cells + torch.arange(k, device=cells.device).unsqueeze(1) * self.size).flatten()
            into = {name: held.view(k * self.size, *held.shape[2:]) for name, held in into.items()}
            other = {name: tensor.flatten(0, 1) for name, tensor in other.items()}
        if type(self.strategy).fold_ is Fieldwise.fold_:
            for field in self.layout(into):
                theirs = other[field.name]
                room = into[field.name][corner((len(into[field.name]), *theirs.shape[1:]))]
                field.reduction.fold_at_(room, cells, theirs)
            return
        mine = {name: held.index_select(0, cells) for name, held in into.items()}
        self.strategy.fold_(mine, {name: other[name] for name in mine})
        for name, held in into.items():
            held.index_copy_(0, cells, mine[name])

    def recentre_(self, local: State, merged: State) -> None:
        self.strategy.recentre_(local, merged)

    def finalize(self, state: State) -> Any:
        return self.strategy.finalize(self._spread(state) if "cells" in state else state)

    def result_dtype(self, given: torch.dtype) -> torch.dtype:
        return self.strategy.result_dtype(given)


def _check_groupable(strategy: Any) -> None:
    """TypeError or ValueError, with the reason, for what can't be kept by cell."""
    name = type(strategy).__name__
    if not isinstance(strategy, Strategy):
        raise TypeError(f"Grouped takes a strategy, such as dc.Grouped(dc.Mean(), 2, by='label'), got {strategy!r}.")
    if not isinstance(strategy, Fieldwise):
        raise ValueError(
            f"{name} keeps what it is given, and Grouped reduces: keep the rows ungrouped, and their cells are in "
            "cache.rows(key)."
        )
    if isinstance(strategy, Grouped):
        raise ValueError(
            "Grouped in Grouped: make one column of two, as in by='both', size=a_size * b_size with "
            "both = a * b_size + b, and view the result as [a_size, b_size, …]."
        )
    if isinstance(strategy, Gathered):
        raise ValueError(f"{name} combines as a whole, not field by field, so its states can't be kept by cell.")
    if isinstance(strategy, AveragePattern) and not strategy.groupable:
        raise ValueError(
            "AveragePattern is ragged, and cells lie side by side, so their values have one shape: give it size=, the "
            "longest sequence's, or bounds of queries= and keys=."
        )
    if strategy.ragged and not isinstance(strategy, AveragePattern):
        raise ValueError(
            f"{name} is ragged: cells lie side by side, so their values have one shape. Leave out ragged=."
        )
    if not strategy.groupable:
        raise ValueError(
            f"{name} doesn't say that it reads many states at once: where its finalize, fold_ and recentre_ take "
            "states with leading dims, say so, groupable = True in the class. distcache.testing checks it."
        )
