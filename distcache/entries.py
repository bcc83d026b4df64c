"""How a cache holds one key: as it was set, as a strategy keeps it, or as a mark for a state in the arena."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distcache import codec
from distcache.schema import KeySchema, strategy_facts
from distcache.strategies import Fieldwise, Piece, Rows, State, Strategy, Value, Weighted


@dataclass(slots=True)
class RawEntry:
    """Values as they were set or recorded, before any strategy has seen them."""

    values: list[Value]


@dataclass(slots=True)
class KeptEntry:
    """The state of a strategy that keeps its values: `Rows`, or a list of `Value`. It is this cache's alone."""

    strategy: Strategy
    state: Any
    schema: KeySchema

    @classmethod
    def of(cls, key: str, strategy: Strategy, state: Any) -> KeptEntry:
        facts = strategy_facts(strategy)
        if not isinstance(state, Rows):
            return cls(strategy, state, KeySchema(key, "list", facts))
        head = state.head.value_n
        row_shape, dtype = tuple(head.shape[1:]), codec.dtype_name(head.dtype)
        schema = KeySchema(key, "rows", facts, row_shape=row_shape, dtype=dtype, device=head.device.type)
        return cls(strategy, state, schema)


class ReducedEntry:
    """A mark: the key's state lies in the cache's arena."""


REDUCED = ReducedEntry()


@dataclass(slots=True)
class LazyEntry:
    """An entry of a saved cache that is read when somebody asks for it."""

    read: Callable[[], RawEntry | KeptEntry | tuple[Fieldwise, State, torch.dtype]]


Entry = RawEntry | KeptEntry | ReducedEntry | LazyEntry


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """A state for several keys at once: every field has a leading dim of len(keys).

    `adds`: of a state that isn't computed yet, what adds it to a state of at least its extents; `state` then says the
    shapes, dtypes and the device that it will have, in fields that take no memory and mean nothing.
    """

    keys: tuple[str, ...]
    strategy: Fieldwise
    state: State
    result: torch.dtype
    adds: Callable[[State], None] | None = None

    def computed(self) -> Slab:
        """The same, with a state that is computed."""
        if self.adds is None:
            return self
        with torch.inference_mode(False):
            state = {name: torch.zeros(x.shape, dtype=x.dtype, device=x.device) for name, x in self.state.items()}
            self.adds(state)
        return replace(self, state=state, adds=None)


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A value that a forward pass showed for a key; `strategy`: the site's own, or None for the cache's."""

    key: str
    value: Value
    strategy: Strategy | None = None


class Noted:
    """A value and the note it was added with. Attributes, indexing and torch functions reach the value."""

    __slots__ = ("_note", "_value")

    def __init__(self, value: Any, note: str) -> None:
        self._value = value
        self._note = note

    def info(self) -> str:
        """The note."""
        return self._note

    def value(self) -> Any:
        """The value alone."""
        return self._value

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_value"), name)

    def __getitem__(self, item: Any) -> Any:
        return self._value[item]

    def __len__(self) -> int:
        return len(self._value)

    def __repr__(self) -> str:
        return f"Noted({self._value!r}, info={self._note!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Noted, (self._value, self._note)

    def __deepcopy__(self, memo: dict[int, Any]) -> Noted:  # or the value's own would be found
        return Noted(copy.deepcopy(self._value, memo), self._note)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        def bare(x: Any) -> Any:
            if isinstance(x, Noted):
                return x.value()
            return type(x)(map(bare, x)) if type(x) in (list, tuple) else x

        return func(*map(bare, args), **{name: bare(value) for name, value in (kwargs or {}).items()})


def taken(strategy: Strategy, values: Iterable[Value], key: str) -> Any:
    """The state of some values under a strategy that keeps them. ValueError, TypeError or `SchemaMismatch`."""
    state: Any = None
    for value in values:
        more = strategy.take(value)
        _check_taken(more, key)
        if state is None:
            state = more
        else:
            strategy.check(state, more, key)
            strategy.fold_(state, more)
    return state


def _check_taken(state: Any, key: str) -> None:
    """Rows have one entry in every column; whole values can travel."""
    if not isinstance(state, Rows):
        for value in state:
            codec.check_plain(value.data, repr(key))
        return
    for piece in state.pieces:
        if piece.columns is not None and len(piece.columns) != len(piece.value_n):
            raise ValueError(
                f"cannot order {key!r}: index has {len(piece.columns)} entries for {len(piece.value_n)} rows. "
                "Give one index per sample."
            )


def copied(state: Any) -> Any:
    """A kept state that can grow without the other; the values are shared."""
    return Rows(state.pieces) if isinstance(state, Rows) else list(state)


def leaves(value: Any) -> list[Tensor]:
    """Every tensor in a nested value."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Weighted):
        return leaves([value.value, value.weight])
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def moved(entry: Entry, device: torch.device) -> Entry:
    """The same entry with every tensor on `device`, but for columns, which stay on the CPU."""
    if isinstance(entry, RawEntry):
        return RawEntry([_moved_value(value, device) for value in entry.values])
    if not isinstance(entry, KeptEntry):
        return entry
    if isinstance(entry.state, Rows):
        state: Any = Rows(Piece(piece.value_n.to(device), piece.columns) for piece in entry.state.pieces)
    else:
        state = [_moved_value(value, device) for value in entry.state]
    return KeptEntry.of(entry.schema.key, entry.strategy, state)


def _moved_value(value: Value, device: torch.device) -> Value:
    return Value(_on(value.data, device), value.rows, value.columns, _on(value.weight, device))


def _on(value: Any, device: torch.device) -> Any:
    """A nested value with its tensors on `device`; containers keep their type, what holds no tensor is left alone."""
    if isinstance(value, Tensor):
        return value.to(device)
    if not leaves(value):
        return value
    if isinstance(value, Weighted):
        return Weighted(_on(value.value, device), _on(value.weight, device))
    kind: Callable[..., Any] = type(value)
    if isinstance(value, Mapping):
        return kind({name: _on(item, device) for name, item in value.items()})
    items = [_on(item, device) for item in value]
    return kind(*items) if hasattr(value, "_fields") else kind(items)  # a named tuple takes its fields one by one


def matches(pattern: str, key: str) -> bool:
    """Whether a key equals or begins with a pattern; one that ends in a digit wants no further digit."""
    if not key.startswith(pattern):
        return False
    rest = key[len(pattern) :]
    return not (pattern[-1:].isdigit() and rest[:1].isdigit())


def registered(registry: Mapping[str, Strategy], key: str) -> Strategy | None:
    """The strategy that is registered for a key: an exact match wins, then the longest pattern that matches."""
    if key in registry:
        return registry[key]
    found = [pattern for pattern in registry if matches(pattern, key)]
    return registry[max(found, key=len)] if found else None
