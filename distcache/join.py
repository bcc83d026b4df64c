"""What a cache is about to take in, worked out and checked in full before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distcache import codec
from distcache.entries import Entry, KeptEntry, RawEntry, Slab, copied, registered, taken
from distcache.errors import DistcacheError, SchemaMismatch
from distcache.segments import Arena
from distcache.strategies import Columns, Default, Fieldwise, First, Function, Piece, Rows, State, Strategy, Value

_BUILT_IN: Mapping[str, Strategy] = {"mapping_index": First()}


class Join:
    """The plan of one `cat`, one value or one forward pass.

    Args:
        arena: the receiving cache's states.
        held: the receiving cache's entry of a key, or None.
        registry: the receiving cache's registrations; they apply to raw values, states combine by their own.
        keeps_lists: functions of a list collect their values; otherwise they are called now, on what there is.
    """

    def __init__(
        self,
        arena: Arena,
        held: Callable[[str], Entry | None],
        registry: Mapping[str, Strategy],
        keeps_lists: bool,
    ) -> None:
        self._arena = arena
        self._held = held
        self._registry = registry
        self._keeps_lists = keeps_lists
        self._alone: dict[str, Slab] = {}  # of `slabs`, those of one key, which may come in several parts
        self.whole: Arena | None = None  # folded as it is
        self.slabs: list[Slab] = []  # states to fold
        self.reduced: list[str] = []  # the keys of `whole` and `slabs`
        self.grown: list[tuple[KeptEntry, Any]] = []  # entries that are there, and what they grow by
        self.new: dict[str, KeptEntry | RawEntry] = {}  # entries to put in place of what is there
        self.raw: dict[str, list[Value]] = {}  # values to keep as they are

    def chosen(self, key: str) -> Strategy:
        """The strategy for raw values of a key, before the first of them is seen."""
        return registered(self._registry, key) or registered(_BUILT_IN, key) or Default()

    def add_arena(self, other: Arena) -> None:
        """States of another cache: its segments as they are, where layouts agree."""
        if self._arena.lies_like(other) or not (len(self._arena) or any(map(self._held, other.entries))):
            self.whole = other
            self.reduced.extend(other.entries)
            return
        for keys in other.slabs():
            entry = other.entries[keys[0]]
            state = other.slab(keys)
            assert state is not None
            self.add_slab(Slab(keys, entry.strategy, state, codec.dtype_named(entry.schema.result or "float32")))

    def add_slab(self, slab: Slab) -> None:
        """A state of several keys: one operation, where they lie as a slab or are all new."""
        held = {} if self._arena.is_slab(slab.keys) else {key: self._held(key) for key in slab.keys}
        if not any(held.values()) and not any(key in self._alone for key in slab.keys):
            if not held:
                self._arena.check(slab.keys[0], slab.strategy, slab.strategy.kinds(slab.state, 1), slab.result)
            self.slabs.append(slab)
            self.reduced.extend(slab.keys)
            return
        slab = slab.computed()
        for k, key in enumerate(slab.keys):
            self._add_own(key, slab.strategy, self._held(key))
            self._add_state(key, slab.strategy, {name: tensor[k] for name, tensor in slab.state.items()}, slab.result)

    def add_kept(self, key: str, other: KeptEntry, renumber: Renumber) -> None:
        """The state of a strategy that keeps its values."""
        self._add_kept_state(key, other.strategy, renumber.state(copied(other.state), key))

    def add_values(self, key: str, values: Iterable[Value], strategy: Strategy | None, renumber: Renumber) -> None:
        """Raw values; `strategy`: a site's own, else that of the state which is there, else the registered one."""
        values = [renumber.value(value) for value in values]
        held = self._held(key)
        if strategy is None:
            strategy = self._state_strategy(key, held)
        if strategy is None:
            strategy = self.chosen(key).resolve(held.values[0] if isinstance(held, RawEntry) else values[0])
        with _naming(key, strategy):
            if isinstance(strategy, Fieldwise):
                self._add_own(key, strategy, held)
                for value in values:
                    self._add_state(
                        key, strategy, strategy.take(value), strategy.result_dtype(strategy.given_dtype(value))
                    )
            else:
                self._add_kept_state(key, strategy, taken(strategy, values, key))

    def _state_strategy(self, key: str, held: Entry | None) -> Strategy | None:
        if key in self._arena:
            return self._arena.entries[key].strategy
        return held.strategy if isinstance(held, KeptEntry) else None

    def _check_strategy(self, key: str, strategy: Strategy, held: Entry | None) -> None:
        """`SchemaMismatch` if what is held, or a registration for raw values that are held, asks for another."""
        mine = self._state_strategy(key, held)
        if isinstance(held, RawEntry):
            mine = registered(self._registry, key)
            mine = None if mine is None else mine.resolve(held.values[0])
        if mine is not None and mine != strategy:
            what = "values to be merged by" if isinstance(held, RawEntry) else "a state of"
            raise SchemaMismatch(f"cannot merge {key!r}: it holds {what} {mine}, got a state of {strategy}.")

    def _add_own(self, key: str, strategy: Fieldwise, held: Entry | None) -> None:
        """Raw values that are there come first."""
        self._check_strategy(key, strategy, held)
        if isinstance(held, RawEntry) and key not in self._alone:
            for value in held.values:
                self._add_state(key, strategy, strategy.take(value), strategy.result_dtype(strategy.given_dtype(value)))

    def _add_state(self, key: str, strategy: Fieldwise, state: State, result: torch.dtype) -> None:
        before = self._alone.get(key)
        if before is not None:
            so_far = {name: tensor[0] for name, tensor in before.state.items()}
            if result != before.result:
                raise SchemaMismatch(
                    f"cannot merge {key!r}: results of its values would be {before.result} and {result}. "
                    "Give all values of a key one dtype."
                )
            strategy.check(so_far, state, key)
            both = _one(strategy.combine(so_far, state))
            before.state.clear()
            before.state.update(both)
            return
        if key in self._arena:
            self._arena.check(key, strategy, strategy.kinds(state), result)
        self._alone[key] = Slab((key,), strategy, _one(state), result)
        self.slabs.append(self._alone[key])
        self.reduced.append(key)

    def _add_kept_state(self, key: str, strategy: Strategy, state: Any) -> None:
        held = self._held(key)
        self._check_strategy(key, strategy, held)
        if isinstance(held, KeptEntry):
            strategy.check(held.state, state, key)
            if not isinstance(strategy, Function) or self._keeps_lists:
                self.grown.append((held, state))
                return
            state = [*held.state, *state]
        elif isinstance(held, RawEntry):
            with _naming(key, strategy):
                own = taken(strategy, held.values, key)
                strategy.check(own, state, key)
                strategy.fold_(own, state)
                state = own
        if isinstance(strategy, Function) and not self._keeps_lists:
            self.new[key] = RawEntry([Value(strategy.finalize(state))])
        else:
            self.new[key] = KeptEntry.of(key, strategy, state)


class Renumber:
    """Gives rows their samples' numbers: their indices in the data set, or the numbers that come next.

    Columns that keys share stay shared.

    Args:
        samples: int64 [n], the indices of the samples that rows know as 0 … n − 1; None if nobody knows them.
        first: the number of the first sample, where there are no indices.
    """

    def __init__(self, samples: Tensor | None = None, first: int = 0) -> None:
        self._samples = samples
        self._first = first
        self._done: dict[int, tuple[Columns, Columns]] = {}
        self._bare: Columns | None = None

    def columns(self, columns: Columns | None) -> Columns | None:
        if columns is None:
            if self._samples is not None and self._bare is None:
                self._bare = Columns({"sample": self._samples, "position": torch.zeros_like(self._samples)}, True)
            return self._bare
        if self._samples is None and (columns.indexed or not self._first):
            return columns
        if columns.indexed:
            raise ValueError("its rows carry an index already: leave out index=.")
        if id(columns) not in self._done:
            number = columns.by_name["sample"]
            sample = number + self._first if self._samples is None else self._samples[number]
            self._done[id(columns)] = (
                columns,
                Columns({**columns.by_name, "sample": sample}, self._samples is not None),
            )
        return self._done[id(columns)][1]

    def value(self, value: Value) -> Value:
        columns = self.columns(value.columns)
        return value if columns is value.columns else Value(value.data, value.rows, columns, value.weight)

    def state(self, state: Any, key: str) -> Any:
        """A kept state with its rows renumbered. ValueError if there are more or fewer indices than rows."""
        if not isinstance(state, Rows):
            return [self.value(value) for value in state]
        if self._samples is not None and all(piece.columns is None for piece in state.pieces):
            if state.num_rows != len(self._samples):
                raise ValueError(
                    f"cannot order {key!r}: index has {len(self._samples)} entries for {state.num_rows} rows."
                )
            return Rows([Piece(state.joined(), self.columns(None))])
        return Rows(Piece(piece.value_n, self.columns(piece.columns)) for piece in state.pieces)


@contextmanager
def _naming(key: str, strategy: Strategy) -> Iterator[None]:
    """What goes wrong with a value names its key; what a user's own function raises is left alone."""
    try:
        yield
    except DistcacheError:
        raise
    except (TypeError, ValueError) as error:
        if isinstance(strategy, Function) or repr(key) in str(error):
            raise
        raise type(error)(f"cannot merge {key!r}: {error}") from error


def _one(state: State) -> State:
    """A state as a slab of one key."""
    return {name: tensor.unsqueeze(0) for name, tensor in state.items()}
