"""ActivationCache: a mapping of names to values that merges with others of its kind, strategy by strategy."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distcache import codec
from distcache.errors import SchemaMismatch
from distcache.ledger import IntervalSet, Ledger, samples_of
from distcache.schema import DIGEST_MODULUS, KeySchema, strategy_facts
from distcache.segments import Arena
from distcache.strategies import (
    Columns,
    Default,
    Fieldwise,
    Function,
    Piece,
    Rows,
    Rowwise,
    State,
    Strategy,
    Value,
    Weighted,
    as_strategy,
    default_aggregation,
    describe,
    described,
)

if TYPE_CHECKING:
    from os import PathLike

_SITE_KEY = re.compile(r"^(?P<site>.*?)_L?(?P<layer>\d+)(?:H(?P<head>\d+))?$")


@dataclass(slots=True)
class RawEntry:
    """Values as they were set or recorded, before any strategy has seen them."""

    values: list[Value]


@dataclass(slots=True)
class KeptEntry:
    """The state of a strategy that keeps its values: `Rows`, or a list of `Value`."""

    strategy: Strategy
    state: Any
    schema: KeySchema


class ReducedEntry:
    """A mark: the key's state lies in the cache's arena."""


REDUCED = ReducedEntry()


@dataclass(slots=True)
class LazyEntry:
    """An entry of a saved cache that is read when somebody asks for it."""

    read: Callable[[], RawEntry | KeptEntry | tuple[Fieldwise, State, torch.dtype]]


Entry = RawEntry | KeptEntry | ReducedEntry | LazyEntry


@dataclass(frozen=True, slots=True)
class Explained:
    """How one key is held and how it will merge; `collective` is None for values that no strategy has seen."""

    strategy: str
    fields: tuple[str, ...]
    collective: str | None
    dtype: str
    nbytes: int


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


@dataclass(frozen=True, slots=True, eq=False)
class Slab:
    """A state for several keys at once: every field has a leading dim of len(keys)."""

    keys: tuple[str, ...]
    strategy: Fieldwise
    state: State
    result: torch.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A value that a forward pass showed for a key; `strategy`: the site's own, or None for the cache's."""

    key: str
    value: Value
    strategy: Strategy | None = None


@dataclass(slots=True)
class _Join:
    """What a `cat` is about to do, worked out in full before anything changes."""

    same_layout: Arena | None = None
    reduced: list[Slab] = field(default_factory=list)
    alone: dict[str, Slab] = field(default_factory=dict)  # of `reduced`, those of one key, by key
    entries: dict[str, RawEntry | KeptEntry] = field(default_factory=dict)
    order: dict[str, None] = field(default_factory=dict)
    samples: IntervalSet | None = None
    reduced_keys: frozenset[str] = frozenset()


class ActivationCache:
    """Values by name, dict-like, that merge with another cache's, key by key, by registered strategies.

    A value comes back as it was set until a `cat` makes it a state; from then on the finalized value does: of
    a `Mean` the mean, not its total. See `cat`, `deferred_mode` and `register_aggregation`.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._arena = Arena()
        self._registry: dict[str, Strategy] = {}
        self._notes: dict[str, str] = {}
        self._ledger = Ledger()
        self._kept_digest = 0
        self._pending: ActivationCache | None = None
        self._num_samples = 0  # recorded without an index; an index given to `cat` has one entry for each

    # -- a dict of values --------------------------------------------------------------------------------------

    def __getitem__(self, key: str | tuple[Any, ...]) -> Any:
        """The value of a key; of `(site, layer)` the layer's, all heads stacked [H, …]; of `(site, :)` all layers'."""
        if isinstance(key, tuple):
            return self._by_site(*key)
        value = self._value(key)
        return Noted(value, self._notes[key]) if key in self._notes else value

    def __setitem__(self, key: str, value: Any) -> None:
        self._check_key(key)
        self._remove(key)
        self._entries[key] = RawEntry([Value(value)])

    def __delitem__(self, key: str) -> None:
        if key not in self._entries:
            raise KeyError(self._unknown(key))
        self._remove(key)
        del self._entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> KeysView[str]:
        return KeysView(self)  # type: ignore[arg-type]

    def values(self) -> ValuesView[Any]:
        return ValuesView(self)  # type: ignore[arg-type]

    def items(self) -> ItemsView[str, Any]:
        return ItemsView(self)  # type: ignore[arg-type]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self._entries else default

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._entries)})"

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}: {value}' for key, value in self.items())})"

    def __add__(self, other: ActivationCache | Mapping[str, Any]) -> ActivationCache:
        """A new cache with both; `other` wins on a shared key."""
        if not isinstance(other, (ActivationCache, Mapping)):
            return NotImplemented
        both = copy.copy(self)
        both.update(other)
        if isinstance(other, ActivationCache):
            both._registry.update({p: s for p, s in other._registry.items() if p not in both._registry})
        return both

    def update(self, other: ActivationCache | Mapping[str, Any]) -> None:
        """Overwrite with another cache's or a dict's values. TypeError for anything else."""
        if isinstance(other, ActivationCache):
            for key in other._entries:
                self._remove(key)
                self._entries.pop(key, None)
            self._take_over(other)
        elif isinstance(other, Mapping):
            for key in other:
                self._check_key(key)
            for key, value in other.items():
                self[key] = value
        else:
            raise TypeError(f"update expects a dict or an ActivationCache, got {type(other).__name__}.")

    def add_with_info(self, key: str, value: Any, info: str) -> None:
        """Set a value with a note that stays with it through merges: `cache[key].info()`, `.value()`."""
        self[key] = value
        self._notes[key] = info

    # -- devices and copies ------------------------------------------------------------------------------------

    def to(self, device: str | torch.device) -> ActivationCache:
        """Move every tensor, in nested values and in states too, in place; returns the cache."""
        device = torch.device(device)
        self._resolve_all()
        self._arena = self._arena.copy(device)
        for key, entry in list(self._entries.items()):
            if isinstance(entry, RawEntry):
                entry.values = [_moved(value, device) for value in entry.values]
            elif isinstance(entry, KeptEntry):
                if isinstance(entry.state, Rows):
                    state: Any = Rows(Piece(p.value_n.to(device), p.columns) for p in entry.state.pieces)
                else:
                    state = [_moved(value, device) for value in entry.state]
                self._set_kept(key, entry.strategy, state)
        return self

    def cpu(self) -> ActivationCache:
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device = "cuda") -> ActivationCache:
        return self.to(f"cuda:{device}" if isinstance(device, int) else device)

    def __copy__(self) -> ActivationCache:
        """A cache with the same values and its own states: folding into one leaves the other as it is."""
        twin = type(self)()
        twin._registry = dict(self._registry)
        twin._take_over(self)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationCache:
        twin = copy.copy(self)
        for key, entry in list(twin._entries.items()):
            if isinstance(entry, RawEntry):
                entry.values = copy.deepcopy(entry.values, memo)
            elif isinstance(entry, KeptEntry):
                pieces = entry.state.pieces if isinstance(entry.state, Rows) else None
                if pieces is None:
                    twin._set_kept(key, entry.strategy, copy.deepcopy(entry.state, memo))
                else:
                    twin._set_kept(key, entry.strategy, Rows(Piece(p.value_n.clone(), p.columns) for p in pieces))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_plain, (codec.encode(self._to_plain()),)

    def _to_plain(self) -> dict[str, Any]:
        """Everything but code as plain values; functions by the path they can be imported from, or ValueError."""
        self._resolve_all()
        registry = []
        for pattern, strategy in self._registry.items():
            if isinstance(strategy, Function):
                strategy.importable()
            registry.append([pattern, _plain(describe(strategy))])
        entries: list[list[Any]] = []
        tables: dict[int, tuple[int, Columns]] = {}
        for key, entry in self._entries.items():
            if isinstance(entry, RawEntry):
                entries.append([key, "raw", [_value_to_plain(value, tables) for value in entry.values]])
            elif isinstance(entry, KeptEntry):
                strategy, state = _plain(describe(entry.strategy)), entry.state
                if isinstance(state, Rows):
                    pieces = [[p.value_n, _table(p.columns, tables)] for p in state.pieces]
                    entries.append([key, "rows", strategy, pieces])
                else:
                    entries.append([key, "list", strategy, [_value_to_plain(value, tables) for value in state]])
            else:
                held = self._arena.entries[key]
                state = {name: tensor.clone() for name, tensor in self._arena.state(key).items()}
                entries.append([key, "fields", _plain(describe(held.strategy)), state, held.schema.result])
        return {
            "registry": registry,
            "entries": entries,
            "tables": [[dict(c.by_name), c.indexed] for _, c in tables.values()],
            "notes": dict(self._notes),
            "ledger": self._ledger.to_plain(),
            "num_samples": self._num_samples,
        }

    # -- merging -----------------------------------------------------------------------------------------------

    def register_aggregation(self, key_pattern: str, strategy: Strategy | str | Callable[[list[Any]], Any]) -> None:
        """Choose how keys that equal or begin with `key_pattern` merge; an exact match wins, then the longest.

        A pattern that ends in a digit doesn't match where another digit follows: `resid_out_1` isn't
        `resid_out_10`. `strategy`: an object, its name, or any function of a list of values. ValueError if a
        key that the pattern decides holds a state of another strategy already.
        """
        chosen = as_strategy(strategy)
        registry = {**self._registry, key_pattern: chosen}
        for key in self._entries:
            held = self._state_strategy(key)
            if held is None or not _matches(key_pattern, key):
                continue
            if _registered(registry, key) is chosen and chosen != held:
                raise ValueError(
                    f"cannot register {chosen} for {key_pattern!r}: {key!r} already holds a state of {held}. "
                    "Register strategies before the first cat, or delete the key."
                )
        self._registry = registry

    @staticmethod
    def default_aggregation(values: list[Any]) -> Any:
        """Tensors: concatenate along dim 0, where shapes forbid it stack, where both fail ValueError with the
        shapes; lists: chain; anything else: the first.
        """
        return default_aggregation(values)

    def cat(self, external: ActivationCache) -> None:
        """Merge a cache into this one, key by key, by strategy; in deferred mode, note it for the block's end.

        An empty cache takes over the other's content, an empty external changes nothing. ValueError naming
        what each side lacks if the keys differ, `SchemaMismatch` if values don't fit; TypeError if `external`
        is no ActivationCache. Nothing changes where it raises.
        """
        if not isinstance(external, ActivationCache):
            raise TypeError(
                f"cat expects an ActivationCache, got {type(external).__name__}. "
                "Put values into one first: local = ActivationCache(); local.update({...})."
            )
        if not external:
            return
        reference = self._entries or (self._pending._entries if self._pending is not None else {})
        if reference and reference.keys() != external._entries.keys():
            mine, theirs = (
                reference.keys() - external._entries.keys(),
                external._entries.keys() - reference.keys(),
            )
            raise ValueError(
                f"cannot cat caches with other keys: the external one lacks {sorted(mine)}, "
                f"this one lacks {sorted(theirs)}."
            )
        if self._pending is not None:
            self._pending._absorb(external, whole_lists=True)
        elif not self._entries:
            self._take_over(external)
        else:
            self._absorb(external)

    @contextlib.contextmanager
    def deferred_mode(self) -> Iterator[ActivationCache]:
        """Within the block `cat` only notes; at its end every strategy is called once on the whole list.

        If the block raises, nothing is merged and the error passes through. RuntimeError when nested.
        """
        if self._pending is not None:
            raise RuntimeError("deferred_mode is open already: end the outer block first.")
        self._pending = ActivationCache()
        self._pending._registry = self._registry
        try:
            yield self
            pending = self._pending
            if not pending:
                return
            if not self._entries:
                self._take_over(pending)
                self._finish_functions(self)
            else:
                self._absorb(pending, whole_lists=True, finish=True)
        finally:
            self._pending = None

    def add(
        self,
        key: str,
        value: Any,
        index: int | Iterable[int] | Tensor | None = None,
        weight: float | Tensor | None = None,
        **columns: Tensor,
    ) -> None:
        """Fold one value into the key's state by its strategy.

        `index`: the samples' indices in the data set, one per sample. `weight`: a number, or one per sample or
        element. `columns`: tensors [n] that are kept beside the rows of a concatenation.
        """
        self._check_key(key)
        one = ActivationCache()
        known = None
        if columns:
            n = len(next(iter(columns.values())))
            rows = torch.arange(n) if index is None else samples_of(index)
            known = Columns(
                {"sample": rows, "position": torch.zeros(n, dtype=torch.int64), **columns}, index is not None
            )
            if any(len(column) != len(rows) for column in columns.values()):
                raise ValueError(
                    f"columns of {key!r} have lengths { {k: len(v) for k, v in columns.items()} }, expected {n}."
                )
        scaled = None if weight is None else torch.as_tensor(weight, dtype=torch.float64)
        one._entries[key] = RawEntry([Value(value, columns=known, weight=scaled)])
        self._absorb(one, index=None if known is not None else index, whole_lists=self._pending is not None)

    # -- what is behind a value --------------------------------------------------------------------------------

    def count(self, key: str) -> Tensor:
        """How many samples (tokens, queries) stand behind a reduced value, int64, broadcastable to it.

        Of a concatenation, its number of rows. ValueError for a value that no strategy has reduced.
        """
        entry = self._resolved(key)
        if isinstance(entry, KeptEntry) and isinstance(entry.state, Rows):
            return torch.tensor(len(entry.strategy.finalize(entry.state).movedim(_row_dim(entry.strategy), 0)))
        if entry is not REDUCED or "count" not in self._arena.entries[key].slots:
            raise ValueError(f"{key!r} is not a reduced value, so nothing was counted behind it.")
        count = self._arena.state(key)["count"]
        value = self._value(key)
        shape = value["mean"].shape if isinstance(value, dict) else value.shape
        cut = count[tuple(slice(n) for n in shape[: count.dim()])] if count.dim() else count
        return cut.clone()

    def rows(self, key: str) -> dict[str, Tensor]:
        """Columns aligned to the rows of a concatenation: sample, position, and what was recorded beside.

        Empty where nothing is known of them. ValueError for a value that isn't made of rows.
        """
        entry = self._resolved(key)
        if isinstance(entry, RawEntry) and all(value.rows for value in entry.values):
            return dict(Rows(Piece(value.data, value.columns) for value in entry.values).columns())
        if isinstance(entry, KeptEntry) and isinstance(entry.state, Rows):
            return dict(entry.state.columns())
        raise ValueError(f"{key!r} is not a concatenation: it has no rows.")

    def explain(self) -> dict[str, Explained]:
        """Per key: strategy, state fields, the collective that merges it, dtype and bytes."""
        found = {}
        for key in self._entries:
            entry = self._resolved(key)
            if entry is REDUCED:
                held = self._arena.entries[key]
                state = self._arena.state(key)
                fields = tuple(f"{f.name} {f.reduction}" for f in held.schema.fields)
                nbytes = sum(t.nbytes for t in state.values())
                found[key] = Explained(repr(held.strategy), fields, "all_reduce", held.schema.fields[0].dtype, nbytes)
            elif isinstance(entry, KeptEntry):
                rows = isinstance(entry.state, Rows)
                tensors = [p.value_n for p in entry.state.pieces] if rows else _leaves([v.data for v in entry.state])
                dtype = entry.schema.dtype or "any"
                name, collective = ("rows", "broadcast of rows") if rows else ("values", "broadcast of encoded values")
                nbytes = sum(t.nbytes for t in tensors)
                found[key] = Explained(repr(entry.strategy), (name,), collective, dtype, nbytes)
            else:
                assert isinstance(entry, RawEntry)
                tensors = _leaves([value.data for value in entry.values])
                strategy = self._strategy(key, entry.values[0])
                dtype = codec.dtype_name(tensors[0].dtype) if tensors else type(entry.values[0].data).__name__
                found[key] = Explained(repr(strategy), (), None, dtype, sum(t.nbytes for t in tensors))
        return found

    def save(self, path: str | PathLike[str], **info: str) -> None:
        """Write the cache to a new folder: safetensors and a JSON manifest, published by one rename. See `dc.load`."""
        from distcache import store  # above this module in the import order, so only when asked

        store.save(self, path, info=info)

    # -- inside ------------------------------------------------------------------------------------------------

    @staticmethod
    def _check_key(key: object) -> None:
        if not isinstance(key, str):
            raise TypeError(f"keys are str, got {key!r} ({type(key).__name__}).")

    def _unknown(self, key: Any) -> str:
        some = ", ".join(list(self._entries)[:6]) or "none"
        return f"no key {key!r}: the cache has {len(self)} keys ({some}{', …' if len(self) > 6 else ''})."

    def _resolved(self, key: str) -> RawEntry | KeptEntry | ReducedEntry:
        """The entry of a key, read from its file if it's a lazy one. KeyError."""
        try:
            entry = self._entries[key]
        except (KeyError, TypeError):
            raise KeyError(self._unknown(key)) from None
        if isinstance(entry, LazyEntry):
            found = entry.read()
            if isinstance(found, tuple):
                self._put_state((key,), *found, leading=False)
            elif isinstance(found, KeptEntry):
                self._set_kept(key, found.strategy, found.state)
            else:
                self._entries[key] = found
            return self._entries[key]  # type: ignore[return-value]
        return entry

    def _resolve_all(self) -> None:
        for key in list(self._entries):
            self._resolved(key)

    def _value(self, key: str) -> Any:
        entry = self._resolved(key)
        if isinstance(entry, RawEntry):
            if len(entry.values) > 1:  # recorded in several forward passes
                rows = Rows(Piece(value.data, value.columns) for value in entry.values)
                columns = Columns(rows.columns(), bool(rows.indexed)) if rows.columns() else None
                entry.values = [Value(rows.joined(), rows=True, columns=columns)]
            return entry.values[0].data
        if isinstance(entry, KeptEntry):
            if isinstance(entry.state, Rows) and (len(entry.state.pieces) > 1 or entry.state.order() is not None):
                joined = entry.state.joined()
                known = entry.state.columns()
                columns = Columns(known, bool(entry.state.indexed)) if known else None
                entry.state = Rows([Piece(joined, columns)])
            return entry.strategy.finalize(entry.state)
        held = self._arena.entries[key]
        result = codec.dtype_named(held.schema.result or "float32")
        value = held.strategy.finalize(self._arena.state(key))
        if isinstance(value, dict):
            return {name: _as_result(tensor, result) for name, tensor in value.items()}
        return _as_result(value, result)

    def _by_site(self, site: str, layer: int | slice) -> Tensor:
        by_layer: dict[int, list[tuple[int, str]]] = {}
        for key in self._entries:
            match = _SITE_KEY.match(key)
            if match and match["site"] == site:
                by_layer.setdefault(int(match["layer"]), []).append((int(match["head"] or -1), key))
        layers = sorted(by_layer)
        if isinstance(layer, slice):
            wanted = layers[layer] if layers == list(range(len(layers))) else [
                n for n in layers if n in range(*layer.indices(layers[-1] + 1))
            ] if layers else []  # fmt: skip
        else:
            wanted = [layer] if layer in by_layer else []
        if not wanted:
            raise KeyError(f"no layer {layer} of site {site!r}: the cache has its layers {layers}.")
        stacked = []
        for n in wanted:
            values = [self._value(key) for _, key in sorted(by_layer[n])]
            heads = sorted(by_layer[n])[0][0] >= 0
            stacked.append(torch.stack(values) if heads else values[0])
        return torch.stack(stacked) if isinstance(layer, slice) else stacked[0]

    def _strategy(self, key: str, value: Value) -> Strategy:
        return (_registered(self._registry, key) or Default()).resolve(value)

    def _state_strategy(self, key: str) -> Strategy | None:
        entry = self._resolved(key) if key in self._entries else None
        if entry is REDUCED:
            return self._arena.entries[key].strategy
        return entry.strategy if isinstance(entry, KeptEntry) else None

    def _remove(self, key: str) -> None:
        """Drop a key's state and note, keeping its place among the keys."""
        entry = self._entries.get(key)
        if entry is REDUCED:
            self._arena.drop(key)
        elif isinstance(entry, KeptEntry):
            self._kept_digest = (self._kept_digest - entry.schema.digest) % DIGEST_MODULUS
        self._notes.pop(key, None)

    def _set_kept(self, key: str, strategy: Strategy, state: Any) -> None:
        old = self._entries.get(key)
        schema = _kept_schema(key, strategy, state)
        if isinstance(old, KeptEntry):
            self._kept_digest -= old.schema.digest
        self._kept_digest = (self._kept_digest + schema.digest) % DIGEST_MODULUS
        self._entries[key] = KeptEntry(strategy, state, schema)

    def _take_over(self, other: ActivationCache) -> None:
        """Add copies of the other's entries, none of whose keys this cache has; values are shared, states aren't."""
        other._resolve_all()
        if len(self._arena):
            self._arena.fold_arena(other._arena)
        elif len(other._arena):
            self._arena = other._arena.copy()
        for key, entry in other._entries.items():
            if isinstance(entry, RawEntry):
                self._entries[key] = RawEntry(list(entry.values))
            elif isinstance(entry, KeptEntry):
                state = Rows(entry.state.pieces) if isinstance(entry.state, Rows) else list(entry.state)
                self._set_kept(key, entry.strategy, state)
            else:
                self._entries[key] = entry
        self._notes.update(other._notes)
        self._ledger.add_all(other._ledger)
        self._num_samples += other._num_samples

    def _put_state(
        self,
        keys: tuple[str, ...],
        strategy: Fieldwise,
        state: State,
        result: torch.dtype,
        leading: bool = True,
    ) -> None:
        """Fold a state, with a leading dim of len(keys), into keys of one slab; make room first if they're new."""
        if not leading:
            state = {name: tensor.unsqueeze(0) for name, tensor in state.items()}
        if keys[0] not in self._arena:
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in state.items()}
            dtypes = strategy.accumulators({name: tensor.dtype for name, tensor in state.items()})
            device = next(iter(state.values())).device
            self._arena.reserve(keys, strategy, shapes, dtypes, result, device)
        self._arena.fold(keys, state, result)
        for key in keys:
            self._entries[key] = REDUCED

    def _absorb(
        self,
        other: ActivationCache,
        *,
        index: Any = None,
        whole_lists: bool = False,
        finish: bool = False,
    ) -> None:
        """Fold another cache's keys into this one's: their union; all or nothing.

        `index`: the samples' indices, for an `other` that has none. `whole_lists`: plain functions collect
        their values instead of folding pairwise; `finish`: they are called on the whole list now.
        """
        other._resolve_all()
        join = self._plan_join(other, index, whole_lists and not finish)
        self._apply(join)
        self._notes.update({key: note for key, note in other._notes.items() if key not in self._notes})
        self._ledger.add_all(other._ledger)
        self._num_samples += other._num_samples

    def _apply(self, join: _Join) -> None:
        if join.same_layout is not None:
            self._arena.fold_arena(join.same_layout)
        for key in join.order:  # new keys come in the other's order
            self._entries.setdefault(key, REDUCED)
        for slab in join.reduced:
            self._put_state(slab.keys, slab.strategy, slab.state, slab.result)
        for key, entry in join.entries.items():
            if isinstance(entry, KeptEntry):
                self._set_kept(key, entry.strategy, entry.state)
            else:
                self._entries[key] = entry
        if join.samples is not None:
            self._ledger.add(join.reduced_keys, join.samples)

    @property
    def _receiving(self) -> ActivationCache:
        """Where contributions go: what is noted for the end of a deferred block, or this cache."""
        return self if self._pending is None else self._pending

    def _take_pass(
        self,
        slabs: Sequence[Slab],
        shown: Sequence[Shown],
        order: Iterable[str],
        num_samples: int,
        samples: Tensor | None,
        raw: bool,
    ) -> None:
        """Fold what one forward pass has shown: all or nothing.

        `order`: of new keys, which need not all have been shown. `samples`: the samples' indices, int64 [B], if they
        have any. `raw`: values without a strategy stay values, so that the cache they are merged into decides.
        """
        join = _Join(samples=None if samples is None else IntervalSet.of(samples))
        there = {key for slab in slabs for key in slab.keys}.union(one.key for one in shown)
        join.order = dict.fromkeys(key for key in order if key in there)
        keys: list[str] = []
        for slab in slabs:
            keys.extend(slab.keys)
            self._plan_slab(join, slab)
        values = []
        for one in shown:
            mine = self._resolved(one.key) if one.key in self._entries else None
            if raw and one.strategy is None and not isinstance(mine, KeptEntry):
                values.append(one)
                continue
            strategy = one.strategy or self._state_strategy(one.key) or self._strategy(one.key, one.value)
            if self._plan_key(join, one.key, strategy, mine, RawEntry([one.value]), _Indexer(None), True):
                keys.append(one.key)
        join.reduced_keys = frozenset(keys)
        if join.samples is not None:
            self._ledger.check(join.reduced_keys, join.samples)
        self._apply(join)
        for one in values:
            entry = self._entries[one.key]
            if isinstance(entry, RawEntry):
                entry.values.append(one.value)
            else:  # the place that `order` has kept for a new key
                self._entries[one.key] = RawEntry([one.value])
        if samples is None:
            self._num_samples += num_samples

    def _plan_join(self, other: ActivationCache, index: Any, collect: bool) -> _Join:
        samples = None if index is None else samples_of(index)
        if samples is not None and other._num_samples and len(samples) != other._num_samples:
            raise ValueError(f"index has {len(samples)} entries, the cache holds {other._num_samples} samples.")
        join = _Join(samples=None if samples is None else IntervalSet.of(samples))
        columns = _Indexer(samples)
        reduced = []
        arena = other._arena
        if (
            len(arena)
            and arena.layout_digest == self._arena.layout_digest
            and arena.content_digest == self._arena.content_digest
        ):
            join.same_layout = arena
            reduced.extend(arena.entries)
        else:
            for slab in arena.slabs():
                self._plan_arena_slab(join, arena, slab)
                reduced.extend(slab)
        for key, entry in other._entries.items():
            join.order[key] = None
            if entry is REDUCED:
                continue
            mine = self._resolved(key) if key in self._entries else None
            first = entry.values[0] if isinstance(entry, RawEntry) else None
            strategy = self._state_strategy(key)
            if isinstance(entry, KeptEntry):
                if strategy is not None and strategy != entry.strategy:
                    raise SchemaMismatch(
                        f"cannot merge {key!r}: it holds a state of {strategy}, got one of {entry.strategy}."
                    )
                strategy = entry.strategy
            elif strategy is None:
                assert first is not None
                strategy = self._strategy(key, mine.values[0] if isinstance(mine, RawEntry) else first)
            try:
                done = self._plan_key(join, key, strategy, mine, entry, columns, collect)
            except (TypeError, ValueError) as error:
                if isinstance(error, SchemaMismatch) or repr(key) in str(error):
                    raise
                raise type(error)(f"cannot merge {key!r}: {error}") from error
            if done:
                reduced.append(key)
        join.reduced_keys = frozenset(reduced)
        if join.samples is not None:
            if other._ledger:
                raise ValueError("the cache was recorded with an index already: leave out index=.")
            self._ledger.check(join.reduced_keys, join.samples)
        self._ledger.check_all(other._ledger)
        return join

    def _plan_arena_slab(self, join: _Join, arena: Arena, keys: tuple[str, ...]) -> None:
        entry = arena.entries[keys[0]]
        result = codec.dtype_named(entry.schema.result or "float32")
        together = arena.slab(keys)
        if together is not None:
            self._plan_slab(join, Slab(keys, entry.strategy, together, result))
            return
        for key in keys:
            self._plan_slab(join, Slab((key,), entry.strategy, _one(arena.state(key)), result))

    def _plan_slab(self, join: _Join, slab: Slab) -> None:
        known = {key for key in slab.keys if key in self._entries}
        for key in known:
            mine = self._resolved(key)
            if isinstance(mine, KeptEntry):
                raise SchemaMismatch(
                    f"cannot merge {key!r}: it holds a state of {mine.strategy}, got one of {slab.strategy}."
                )
            if isinstance(mine, RawEntry):
                self._plan_values(join, key, slab.strategy, mine.values)
            else:
                fields = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in slab.state.items()}
                self._arena.check(key, slab.strategy, fields, slab.result)
        together = not known or (known == set(slab.keys) and not any(key in join.alone for key in known))
        if together:
            join.reduced.append(slab)
            return
        for k, key in enumerate(slab.keys):
            state = {name: tensor[k] for name, tensor in slab.state.items()}
            self._plan_state(join, key, slab.strategy, state, slab.result)

    def _plan_values(self, join: _Join, key: str, strategy: Fieldwise, values: Iterable[Value]) -> None:
        for value in values:
            self._plan_state(join, key, strategy, strategy.take(value), strategy.result_dtype(_dtype_of(value)))

    def _plan_state(self, join: _Join, key: str, strategy: Fieldwise, state: State, result: torch.dtype) -> None:
        """Plan to fold one state of one key, checked against what is held and what is planned for it."""
        before = join.alone.get(key)
        if before is not None:
            if result != before.result or set(before.state) != set(state):
                raise SchemaMismatch(
                    f"cannot merge {key!r}: its values differ in dtype ({before.result}, {result}) or weight."
                )
            before.state.update(_one(strategy.combine({name: t[0] for name, t in before.state.items()}, state)))
            return
        if key in self._arena:
            fields = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
            self._arena.check(key, strategy, fields, result)
        join.alone[key] = Slab((key,), strategy, _one(state), result)
        join.reduced.append(join.alone[key])

    def _plan_key(
        self,
        join: _Join,
        key: str,
        strategy: Strategy,
        mine: Entry | None,
        entry: RawEntry | KeptEntry | LazyEntry | ReducedEntry,
        columns: _Indexer,
        collect: bool,
    ) -> bool:
        """Plan one key; True if it is a reduction."""
        own = mine.values if isinstance(mine, RawEntry) else []
        assert isinstance(entry, (RawEntry, KeptEntry))
        if isinstance(strategy, Fieldwise):
            assert isinstance(entry, RawEntry)
            self._plan_values(join, key, strategy, [*own, *entry.values])
            return True
        state = mine.state if isinstance(mine, KeptEntry) else None
        for value in own:
            state = _combined(strategy, state, strategy.take(value))
        if isinstance(entry, KeptEntry):
            state = _combined(strategy, state, columns.state(entry.state), key)
        else:
            for value in entry.values:
                state = _combined(strategy, state, _checked(strategy.take(columns.value(value)), key), key)
        if isinstance(strategy, Function) and not collect:
            join.entries[key] = RawEntry([Value(strategy.finalize(state))])
        else:
            join.entries[key] = KeptEntry(strategy, state, _kept_schema(key, strategy, state))
        return False

    def _finish_functions(self, cache: ActivationCache) -> None:
        """Call plain functions on the lists they have collected."""
        for key, entry in list(cache._entries.items()):
            if isinstance(entry, KeptEntry) and isinstance(entry.strategy, Function):
                value = entry.strategy.finalize(entry.state)
                note = cache._notes.get(key)
                cache._remove(key)
                cache._entries[key] = RawEntry([Value(value)])
                if note is not None:
                    cache._notes[key] = note

    # -- what the merge asks of a delta ------------------------------------------------------------------------

    @property
    def _content_digest(self) -> int:
        return (self._arena.content_digest + self._kept_digest) % DIGEST_MODULUS

    def _schemas(self) -> dict[str, KeySchema]:
        """The schema of every key that holds a state."""
        found = {key: entry.schema for key, entry in self._arena.entries.items()}
        found.update({key: entry.schema for key, entry in self._entries.items() if isinstance(entry, KeptEntry)})
        return found

    def _kept(self) -> dict[str, KeptEntry]:
        """Keys whose values are kept, in order."""
        return {key: entry for key, entry in self._entries.items() if isinstance(entry, KeptEntry)}


class _Indexer:
    """Gives values the indices of their samples; columns that keys share stay shared."""

    def __init__(self, samples: Tensor | None) -> None:
        self.samples = samples
        self._done: dict[int, tuple[Columns, Columns]] = {}
        self._bare: Columns | None = None

    def columns(self, columns: Columns | None) -> Columns | None:
        if self.samples is None:
            return columns
        if columns is None:
            if self._bare is None:
                self._bare = Columns({"sample": self.samples, "position": torch.zeros_like(self.samples)}, True)
            return self._bare
        if columns.indexed:
            raise ValueError("its rows carry an index already: leave out index=.")
        if id(columns) not in self._done:
            sample = self.samples[columns.by_name["sample"]]
            self._done[id(columns)] = (columns, Columns({**columns.by_name, "sample": sample}, True))
        return self._done[id(columns)][1]

    def value(self, value: Value) -> Value:
        if self.samples is None:
            return value
        return Value(value.data, value.rows, self.columns(value.columns), value.weight)

    def state(self, state: Any) -> Any:
        if self.samples is None:
            return state
        if not isinstance(state, Rows):
            return [self.value(value) for value in state]
        if all(piece.columns is None for piece in state.pieces):
            if state.num_rows != len(self.samples):
                raise ValueError(f"index has {len(self.samples)} entries for {state.num_rows} rows.")
            joined = Rows([Piece(state.joined(), self.columns(None))])
            return joined
        return Rows(Piece(piece.value_n, self.columns(piece.columns)) for piece in state.pieces)


def _combined(strategy: Strategy, mine: Any, theirs: Any, key: str = "") -> Any:
    if mine is None:
        return theirs
    if isinstance(mine, Rows):
        mine.check_joins(theirs, key)
    return strategy.combine(mine, theirs)


def _checked(state: Any, key: str) -> Any:
    """The state, if its columns have one entry for each of its rows."""
    if isinstance(state, Rows):
        for piece in state.pieces:
            if piece.columns is not None and len(piece.columns) != len(piece.value_n):
                raise ValueError(
                    f"cannot order {key!r}: index has {len(piece.columns)} entries for {len(piece.value_n)} rows. "
                    "Give one index per sample."
                )
    else:
        for value in state:
            codec.check_plain(value.data, key)
    return state


def _kept_schema(key: str, strategy: Strategy, state: Any) -> KeySchema:
    facts = strategy_facts(strategy)
    if isinstance(state, Rows):
        head = state.head.value_n
        row_shape, dtype = tuple(head.shape[1:]), codec.dtype_name(head.dtype)
        return KeySchema(key, "rows", facts, row_shape=row_shape, dtype=dtype, device=head.device.type)
    return KeySchema(key, "list", facts)


def _row_dim(strategy: Strategy) -> int:
    return strategy.dim if isinstance(strategy, Rowwise) and isinstance(strategy.dim, int) else 0


def _one(state: State) -> State:
    """A state as a slab of one key."""
    return {name: tensor.unsqueeze(0) for name, tensor in state.items()}


def _dtype_of(value: Value) -> torch.dtype:
    """The dtype of a value that a reduction takes; Python's floats count as float64."""
    data = value.data.value if isinstance(value.data, Weighted) else value.data
    return data.dtype if isinstance(data, Tensor) else torch.float64 if isinstance(data, float) else torch.int64


def _as_result(tensor: Tensor, result: torch.dtype) -> Tensor:
    if tensor.is_floating_point() == result.is_floating_point:
        tensor = tensor.to(result)
    return tensor.clone() if tensor._is_view() else tensor


def _matches(pattern: str, key: str) -> bool:
    if not key.startswith(pattern):
        return False
    rest = key[len(pattern) :]
    return not (pattern[-1:].isdigit() and rest[:1].isdigit())


def _registered(registry: Mapping[str, Strategy], key: str) -> Strategy | None:
    if key in registry:
        return registry[key]
    found = [pattern for pattern in registry if _matches(pattern, key)]
    return registry[max(found, key=len)] if found else None


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return []


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to_device(item, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_device(item, device) for item in value)
    return value


def _moved(value: Value, device: torch.device) -> Value:
    weight = None if value.weight is None else value.weight.to(device)
    return Value(_to_device(value.data, device), value.rows, value.columns, weight)


def _plain(description: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(description))


def _table(columns: Columns | None, tables: dict[int, tuple[int, Columns]]) -> int | None:
    if columns is None:
        return None
    return tables.setdefault(id(columns), (len(tables), columns))[0]


def _value_to_plain(value: Value, tables: dict[int, tuple[int, Columns]]) -> list[Any]:
    data, weight = value.data, value.weight
    weighted = isinstance(data, Weighted)
    if isinstance(data, Weighted):
        data, weight = data.value, torch.as_tensor(data.weight, dtype=torch.float64)
    return [data, value.rows, _table(value.columns, tables), weight, weighted]


def _from_plain(data: bytes) -> ActivationCache:
    """The inverse of pickling. Functions are imported from the paths that pickling checked."""
    plain = codec.decode(data)
    cache = ActivationCache()
    tables = [Columns(by_name, indexed) for by_name, indexed in plain["tables"]]

    def columns(number: int | None) -> Columns | None:
        return None if number is None else tables[number]

    def value(fields: list[Any]) -> Value:
        data, rows, table, weight, weighted = fields
        if weighted:
            return Value(Weighted(data, weight), rows, columns(table))
        return Value(data, rows, columns(table), weight)

    for pattern, description in plain["registry"]:
        cache._registry[pattern] = _imported(description)
    for key, kind, *rest in plain["entries"]:
        if kind == "raw":
            cache._entries[key] = RawEntry([value(fields) for fields in rest[0]])
        elif kind == "rows":
            cache._set_kept(key, _imported(rest[0]), Rows(Piece(t, columns(c)) for t, c in rest[1]))
        elif kind == "list":
            cache._set_kept(key, _imported(rest[0]), [value(fields) for fields in rest[1]])
        else:
            strategy = described(rest[0])
            assert isinstance(strategy, Fieldwise)
            cache._put_state((key,), strategy, rest[1], codec.dtype_named(rest[2]), leading=False)
    cache._notes = plain["notes"]
    cache._ledger = Ledger.from_plain(plain["ledger"])
    cache._num_samples = plain["num_samples"]
    return cache


def _imported(description: dict[str, Any]) -> Strategy:
    if description["name"] != "function":
        return described(description)
    module, _, qualname = description["parameters"]["function"].partition(":")
    found: Any = __import__("importlib").import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return Function(found)
