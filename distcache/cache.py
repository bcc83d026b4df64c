"""ActivationCache: a mapping of names to values that merges with others of its kind, strategy by strategy."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distcache import codec
from distcache.entries import (
    REDUCED,
    Entry,
    KeptEntry,
    LazyEntry,
    Noted,
    RawEntry,
    ReducedEntry,
    Shown,
    Slab,
    copied,
    leaves,
    matches,
    moved,
    registered,
    taken,
)
from distcache.errors import DistcacheError, DuplicateSamples
from distcache.interrupts import held_interrupts
from distcache.join import Join, Renumber
from distcache.ledger import IntervalSet, Ledger, samples_of
from distcache.schema import DIGEST_MODULUS, KeySchema, strategy_facts
from distcache.segments import Arena
from distcache.strategies import (
    Columns,
    Default,
    Fieldwise,
    Function,
    Gathered,
    Piece,
    Rows,
    State,
    Strategy,
    Value,
    Weighted,
    as_strategy,
    default_aggregation,
)

if TYPE_CHECKING:
    from os import PathLike

_SITE_KEY = re.compile(r"^(?P<site>.*?)_L?(?P<layer>\d+)(?:H(?P<head>\d+))?$")


@dataclass(frozen=True, slots=True)
class Explained:
    """How one key is held and how it will merge; `collective` is None for values that no strategy has seen."""

    strategy: str
    fields: tuple[str, ...]
    collective: str | None
    dtype: str
    nbytes: int


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
        self._kept_keys: dict[str, None] = {}
        self._pending: ActivationCache | None = None
        self._keeps_lists = False  # a delta's plain functions are called once, by the merge
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
        self._forget(key)
        if isinstance(value, Noted):
            self._notes[key], value = value.info(), value.value()
        self._entries[key] = RawEntry([Value(value)])

    def __delitem__(self, key: str) -> None:
        if key not in self._entries:
            raise KeyError(self._unknown(key))
        self._forget(key)
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
            if other is not self:
                for key in other._entries:
                    self._forget(key)
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
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", or whichever is current
        self._resolve_all()
        self._arena = self._arena.copy(device)
        for key, entry in list(self._entries.items()):
            self._put(key, moved(entry, device))
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
                twin._entries[key] = copy.deepcopy(entry, memo)
            elif isinstance(entry, KeptEntry) and isinstance(entry.state, Rows):
                entry.state = Rows(Piece(piece.value_n.clone(), piece.columns) for piece in entry.state.pieces)
            elif isinstance(entry, KeptEntry):
                entry.state = copy.deepcopy(entry.state, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        """By name, states in flat buffers that protocol 5 ships out of band; what is unpickled has its own memory.

        ValueError for a function that can't be imported; TypeError, naming the key, for a value that is neither plain
        nor a tensor.
        """
        from distcache.packed import owned, pack  # above this module in the import order, so only when asked

        return owned, (pack(self),)

    # -- merging -----------------------------------------------------------------------------------------------

    def register_aggregation(self, key_pattern: str, strategy: Strategy | str | Callable[[list[Any]], Any]) -> None:
        """Choose how keys that equal or begin with `key_pattern` merge; an exact match wins, then the longest.

        A pattern that ends in a digit doesn't match where another digit follows: `resid_out_1` isn't
        `resid_out_10`. `strategy`: an object, its name, or any function of a list of values. ValueError if a
        key that the pattern decides holds a state of another strategy already.
        """
        self._check_key(key_pattern)
        chosen = as_strategy(strategy)
        strategy_facts(chosen)  # raises for one that ranks could not compare
        registry = {**self._registry, key_pattern: chosen}
        caches = [self] if self._pending is None else [self, self._pending]
        for cache in caches:
            for key in cache._entries:
                held = cache._state_strategy(key) if matches(key_pattern, key) else None
                decides = held is not None and registered(registry, key) is chosen
                if decides and chosen != held and not isinstance(chosen, Default):
                    raise ValueError(
                        f"cannot register {chosen} for {key_pattern!r}: {key!r} already holds a state of {held}. "
                        "Register strategies before the first cat, or delete the key."
                    )
        for cache in caches:
            cache._registry = registry

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
        target = self._receiving
        reference = self._entries or target._entries
        if reference and reference.keys() != external._entries.keys():
            mine, theirs = reference.keys() - external._entries.keys(), external._entries.keys() - reference.keys()
            raise ValueError(
                f"cannot cat caches with other keys: the external one lacks {sorted(mine)}, "
                f"this one lacks {sorted(theirs)}."
            )
        if target:
            target._absorb(external)
        else:
            target._take_over(external)

    @contextlib.contextmanager
    def deferred_mode(self) -> Iterator[ActivationCache]:
        """Within the block `cat` only notes; at its end every strategy is called once on the whole list.

        If the block raises, nothing is merged and the error passes through. RuntimeError when nested.
        """
        if self._pending is not None:
            raise RuntimeError("deferred_mode is open already: end the outer block first.")
        self._pending = self._collecting()
        try:
            yield self
            pending = self._pending
            if self._entries:
                self._absorb(pending)
            else:
                pending._call_functions()
                self._take_over(pending)
        finally:
            self._pending = None

    def _collecting(self) -> ActivationCache:
        """An empty cache with the same registrations, in which functions of a list collect their values."""
        pending = ActivationCache()
        pending._registry = self._registry
        pending._keeps_lists = True
        return pending

    def add(
        self,
        key: str,
        value: Any,
        index: int | Iterable[int] | Tensor | None = None,
        weight: float | Tensor | None = None,
        **columns: Tensor | float,
    ) -> None:
        """Fold one value into the key's state by its strategy; in deferred mode, note it for the block's end.

        `index`: the samples' indices in the data set, one per sample. `weight`: a number, or one per sample or
        element. `columns`: tensors [n], or a number of one sample, that are kept beside the rows of a concatenation,
        one row per sample, and that `Grouped` goes by. ValueError, TypeError, `SchemaMismatch` for what doesn't fit;
        nothing has changed then.
        """
        self._check_key(key)
        if "sample" in columns:
            raise ValueError("the samples' numbers are given as index=, not as a column.")
        known = None
        if columns:
            by_name = {name: _column(key, name, column) for name, column in columns.items()}
            lengths = {name: len(column) for name, column in by_name.items()}
            n = next(iter(lengths.values()))
            if any(length != n for length in lengths.values()):
                raise ValueError(f"columns of {key!r} differ in length: {lengths}.")
            entry = self._receiving._held(key)
            before = entry.state.num_rows if isinstance(entry, KeptEntry) and isinstance(entry.state, Rows) else 0
            sample = torch.arange(n) if index is not None else torch.arange(before, before + n)
            known = Columns({"sample": sample, "position": torch.zeros(n, dtype=torch.int64), **by_name})
        one = ActivationCache()
        given = None if weight is None else torch.as_tensor(weight, dtype=torch.float64)
        one._entries[key] = RawEntry([Value(value, columns=known, weight=given)])
        one._num_samples = 0 if known is None or index is None else len(known)
        self._receiving._absorb(one, index=index)

    # -- what is behind a value --------------------------------------------------------------------------------

    def count(self, key: str) -> Tensor:
        """How many samples (tokens, queries) stand behind a reduced value, int64, broadcastable to it.

        Of a grouped value, behind each cell [size]; of a concatenation, its number of rows. ValueError for a value that
        no strategy has reduced.
        """
        rows = self._rows(key)
        if rows is not None:
            return torch.tensor(rows.num_read)
        if self._entries[key] is not REDUCED or "count" not in self._arena.entries[key].slots:
            raise ValueError(f"{key!r} is not a reduced value, so nothing was counted behind it.")
        count, value = self._arena.entries[key].strategy.counts(self._arena.state(key)), self._value(key)
        shape = max((tensor.shape for tensor in leaves(value)), key=len)
        return count[tuple(map(slice, shape[: count.dim()]))].clone()

    def rows(self, key: str) -> dict[str, Tensor]:
        """Columns aligned to the rows of a concatenation: sample, position, and what was recorded beside.

        Empty where nothing is known of them. ValueError for a value that isn't made of rows.
        """
        rows = self._rows(key)
        if rows is None:
            raise ValueError(f"{key!r} is not a concatenation: it has no rows.")
        return dict(rows.columns())

    def _rows(self, key: str) -> Rows | None:
        """The rows of a key, in the order in which they are read; None if it isn't made of rows."""
        entry = self._resolved(key)
        if isinstance(entry, KeptEntry):
            return entry.state.together() if isinstance(entry.state, Rows) else None
        if isinstance(entry, RawEntry) and entry.values[0].rows and isinstance(self._raw_value(key, entry), Tensor):
            return Rows([Piece(entry.values[0].data, entry.values[0].columns)])
        return None

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
                collective = "sends along a tree" if isinstance(held.strategy, Gathered) else "all_reduce"
                found[key] = Explained(repr(held.strategy), fields, collective, held.schema.fields[0].dtype, nbytes)
            elif isinstance(entry, KeptEntry):
                rows = isinstance(entry.state, Rows)
                tensors = [p.value_n for p in entry.state.pieces] if rows else leaves([v.data for v in entry.state])
                dtype = entry.schema.dtype or "any"
                name, collective = ("rows", "broadcast of rows") if rows else ("values", "broadcast of encoded values")
                nbytes = sum(t.nbytes for t in tensors)
                found[key] = Explained(repr(entry.strategy), (name,), collective, dtype, nbytes)
            else:
                assert isinstance(entry, RawEntry)
                tensors = leaves([value.data for value in entry.values])
                strategy = self._join().chosen(key)
                if not isinstance(entry.values[0].data, Weighted):
                    strategy = strategy.resolve(entry.values[0])
                dtype = codec.dtype_name(tensors[0].dtype) if tensors else type(entry.values[0].data).__name__
                found[key] = Explained(repr(strategy), (), None, dtype, sum(t.nbytes for t in tensors))
        return found

    def save(self, path: str | PathLike[str], **info: str) -> None:
        """Write the cache to a new folder: safetensors and a JSON manifest, published by one rename. See `dc.load`."""
        from distcache.store import save  # above this module in the import order, so only when asked

        save(self, path, info=info)

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
        for key in [key for key, entry in self._entries.items() if isinstance(entry, LazyEntry)]:
            self._resolved(key)

    def _held(self, key: str) -> RawEntry | KeptEntry | ReducedEntry | None:
        return self._resolved(key) if key in self._entries else None

    def _value(self, key: str) -> Any:
        entry = self._resolved(key)
        if isinstance(entry, RawEntry):
            return self._raw_value(key, entry)
        if isinstance(entry, KeptEntry):
            if isinstance(entry.state, Rows):
                entry.state = entry.state.together()
            return entry.strategy.finalize(entry.state)
        held, state = self._arena.entries[key], self._arena.state(key)
        result = codec.dtype_named(held.schema.result or "float32")
        chunks = {tensor.untyped_storage().data_ptr() for tensor in state.values()}

        def own(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                tensor = tensor.to(result if result.is_floating_point else torch.float32)
            elif not result.is_floating_point:
                tensor = tensor.to(result)
            return tensor.clone() if tensor.untyped_storage().data_ptr() in chunks else tensor

        value = held.strategy.finalize(state)
        if isinstance(value, dict):
            return {name: own(tensor) for name, tensor in value.items()}
        return own(value) if isinstance(value, Tensor) else value

    def _raw_value(self, key: str, entry: RawEntry) -> Any:
        """A value as it was set; recorded ones, of one or several forward passes, in the samples' order."""
        first = entry.values[0]
        if len(entry.values) == 1 and not first.rows:
            return first.data
        strategy = Default().resolve(first)
        state = taken(strategy, entry.values, key)
        if not isinstance(state, Rows):
            return strategy.finalize(state)
        piece = state.together().pieces[0]
        entry.values = [Value(piece.value_n, rows=True, columns=piece.columns)]
        return piece.value_n

    def _by_site(self, *place: Any) -> Any:
        values = []
        for heads in site_keys(self._entries, place):
            if heads[0][0] < 0:
                values.append(self._value(heads[0][1]))
            else:
                values.append(_stacked([self._value(key) for _, key in heads], place[0]))
        return _stacked(values, place[0]) if isinstance(place[1], slice) else values[0]

    def _state_strategy(self, key: str) -> Strategy | None:
        entry = self._held(key)
        if entry is REDUCED:
            return self._arena.entries[key].strategy
        return entry.strategy if isinstance(entry, KeptEntry) else None

    def _forget(self, key: str) -> None:
        """Drop what is known of a key, keeping its place among the keys."""
        if key in self._entries:
            self._put(key, RawEntry([]))
            self._notes.pop(key, None)
            self._ledger.forget(key)

    def _put(self, key: str, entry: Entry) -> None:
        """Put an entry in the place of what is there, keeping the arena and the digest in step."""
        old = self._entries.get(key)
        if old is REDUCED and entry is not REDUCED:
            self._arena.drop(key)
        if isinstance(old, KeptEntry):
            self._kept_digest -= old.schema.digest
            del self._kept_keys[key]
        if isinstance(entry, KeptEntry):
            self._kept_digest += entry.schema.digest
            self._kept_keys[key] = None
        self._kept_digest %= DIGEST_MODULUS
        self._entries[key] = entry

    def _set_placement(self, key: str, placement: str) -> None:
        """Note in a state's schema how its key lies over a mesh. `SchemaMismatch` for one that can't be split so."""
        entry = self._entries[key]
        if entry is REDUCED:
            self._arena.set_placement(key, placement)
        elif isinstance(entry, KeptEntry) and entry.schema.placement != placement:
            self._put(key, KeptEntry(entry.strategy, entry.state, replace(entry.schema, placement=placement)))

    def _set_kept(self, key: str, strategy: Strategy, state: Any) -> None:
        self._put(key, KeptEntry.of(key, strategy, state))

    @held_interrupts()
    def _take_over(self, other: ActivationCache) -> None:
        """Add copies of the other's entries, which hold nothing here; values are shared, states aren't."""
        other._resolve_all()
        self._arena.fold_arena(other._arena)
        renumber = Renumber(first=self._num_samples)
        for key, entry in other._entries.items():
            if isinstance(entry, RawEntry):
                self._put(key, RawEntry([renumber.value(value) for value in entry.values]))
            elif isinstance(entry, KeptEntry):
                state = renumber.state(copied(entry.state), key)
                self._put(key, KeptEntry(entry.strategy, state, entry.schema))
            else:
                self._put(key, entry)
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
        self._arena.make_room(keys, strategy, state, result)
        self._arena.fold(keys, state)
        for key in keys:
            self._entries[key] = REDUCED

    def _join(self) -> Join:
        return Join(self._arena, self._held, self._registry, self._keeps_lists)

    def _absorb(self, other: ActivationCache, *, index: Any = None) -> None:
        """Fold another cache's keys into this one's: their union; all or nothing.

        `index`: the samples' indices, for an `other` that has none.
        """
        other._resolve_all()
        samples = None if index is None else samples_of(index)
        if samples is not None and other._num_samples and len(samples) != other._num_samples:
            raise ValueError(f"index has {len(samples)} entries, the cache holds {other._num_samples} samples.")
        if samples is not None and other._ledger:
            raise ValueError("the cache was recorded with an index already: leave out index=.")
        join, renumber = self._join(), Renumber(samples, self._num_samples)
        if len(other._arena):
            join.add_arena(other._arena)
        for key, entry in other._entries.items():
            if isinstance(entry, KeptEntry):
                join.add_kept(key, entry, renumber)
            elif isinstance(entry, RawEntry):
                join.add_values(key, entry.values, None, renumber)
        ledger = other._ledger if samples is None else _ledger_of(join.reduced, samples)
        self._ledger.check_all(ledger)
        with held_interrupts():  # what counts and what is known to count change together
            self._apply(join, other._entries)
            self._ledger.add_all(ledger)
            self._notes.update({key: note for key, note in other._notes.items() if key not in self._notes})
            if samples is None:
                self._num_samples += other._num_samples

    def _apply(self, join: Join, order: Iterable[str]) -> None:
        """Do what was planned, while callers hold Ctrl-C; new keys come in the given order."""
        made: list[str] = []
        begun: list[str] = []  # that are held, and that something is being added to
        try:  # what may fail for want of memory comes before the first change
            for slab in join.slabs:
                made.extend(self._arena.make_room(slab.keys, slab.strategy, slab.state, slab.result))
            for slab in join.slabs:
                if slab.adds is not None:
                    begun.extend(() if slab.keys[0] in made else slab.keys)
                    self._arena.add(slab.keys, slab.adds)
        except BaseException as error:
            for key in made:
                self._arena.drop(key)
            self._arena.spoil(begun)
            if begun and isinstance(error, Exception):  # such as a GPU without memory for what is computed on the way
                raise DistcacheError(
                    f"what a pass gives {begun[0]!r} was added in part ({type(error).__name__}: {error}), so that "
                    f"the values of {len(begun)} keys are NaN from now on. Make a new cache, and take smaller batches."
                ) from error
            raise
        if join.whole is not None:
            self._arena.fold_arena(join.whole)
        unknown = [key for key in order if key not in self._entries]
        coming = {*join.reduced, *join.new, *join.raw} if unknown else ()
        for key in unknown:
            if key in coming:
                self._entries[key] = REDUCED if key in self._arena else RawEntry([])
        for slab in join.slabs:
            if slab.adds is None:
                self._arena.fold(slab.keys, slab.state)
            for key in slab.keys:
                self._entries[key] = REDUCED
        for entry, state in join.grown:
            entry.strategy.fold_(entry.state, state)
        for key, fresh in join.new.items():
            self._put(key, fresh)
        for key, values in join.raw.items():
            raw = self._entries[key]
            assert isinstance(raw, RawEntry)
            raw.values.extend(values)

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
        join, renumber = self._join(), Renumber()
        for slab in slabs:
            join.add_slab(slab)
        for one in shown:
            if raw and one.strategy is None and not isinstance(self._held(one.key), KeptEntry):
                join.raw.setdefault(one.key, []).append(one.value)
            else:
                join.add_values(one.key, [one.value], one.strategy, renumber)
        ledger = Ledger() if samples is None else _ledger_of(join.reduced, samples)
        self._ledger.check_all(ledger)
        with held_interrupts():
            self._apply(join, order)
            self._ledger.add_all(ledger)
            if samples is None:
                self._num_samples += num_samples

    def _call_functions(self) -> None:
        """Call plain functions on the lists they have collected."""
        for key, entry in list(self._entries.items()):
            if isinstance(entry, KeptEntry) and isinstance(entry.strategy, Function):
                self._put(key, RawEntry([Value(entry.strategy.finalize(entry.state))]))

    # -- what the merge asks of a delta ------------------------------------------------------------------------

    @property
    def _content_digest(self) -> int:
        return (self._arena.content_digest + self._kept_digest) % DIGEST_MODULUS

    def _schemas(self) -> dict[str, KeySchema]:
        """The schema of every key that holds a state."""
        found = {key: entry.schema for key, entry in self._arena.entries.items()}
        found.update({key: entry.schema for key, entry in self._entries.items() if isinstance(entry, KeptEntry)})
        return found

    def _share_keys(self, other: ActivationCache) -> None:
        """Take over the entries of a cache that holds the same keys; neither changes any of them from now on."""
        self._entries, self._kept_keys, self._kept_digest = other._entries, other._kept_keys, other._kept_digest

    def _kept(self) -> dict[str, KeptEntry]:
        """Keys whose values are kept."""
        return {key: self._entries[key] for key in self._kept_keys}  # type: ignore[misc]


def site_keys(keys: Iterable[str], place: tuple[Any, ...]) -> list[list[tuple[int, str]]]:
    """By wanted layer of a site, its keys with their heads' numbers (-1: no head). KeyError if there is none.

    `place`: (site, layer) or (site, slice of layers).
    """
    site, layer = place if len(place) == 2 else (None, None)
    if not isinstance(site, str) or not isinstance(layer, (int, slice)):
        raise KeyError(f"no key {place!r}: give a key, (site, layer) or (site, :).")
    by_layer: dict[int, list[tuple[int, str]]] = {}
    for key in keys:
        match = _SITE_KEY.match(key)
        if match and match["site"] == site:
            by_layer.setdefault(int(match["layer"]), []).append((int(match["head"] or -1), key))
    wanted = range(max(by_layer, default=-1) + 1)[layer] if isinstance(layer, slice) else [layer]
    found = [sorted(by_layer[n]) for n in wanted if n in by_layer]
    if not found:
        raise KeyError(f"no layer {layer} of site {site!r}: the cache has its layers {sorted(by_layer)}.")
    return found


def _column(key: str, name: str, column: Any) -> Tensor:
    """A column [n] on the CPU; a number is one of one sample. TypeError for what isn't made of numbers."""
    try:
        return torch.atleast_1d(torch.as_tensor(column).detach().cpu())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"column {name!r} of {key!r}: expected a number per sample, got {column!r}: {error}. Number words first."
        ) from error


def _ledger_of(keys: Sequence[str], samples: Tensor) -> Ledger:
    """What reductions of these keys have seen. `DuplicateSamples` if one index comes twice."""
    ledger, seen = Ledger(), IntervalSet.of(samples)
    if keys and len(seen) < len(samples):
        raise DuplicateSamples(
            f"{len(samples) - len(seen)} sample(s) would count twice in {len(keys)} reduction(s) such as {keys[0]!r}: "
            f"index has {len(samples)} entries, of which {len(seen)} differ. Give one index per sample."
        )
    ledger.add(frozenset(keys), seen)
    return ledger


def _stacked(values: Sequence[Any], site: str) -> Any:
    """Tensors side by side [n, …]; of dicts of tensors (moments) each. ValueError if they differ in shape."""
    if all(isinstance(value, dict) for value in values):
        return {name: _stacked([value[name] for value in values], site) for name in values[0]}
    shapes = {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in values}
    if len(shapes) > 1 or not isinstance(values[0], Tensor):
        raise ValueError(f"cannot stack the values of site {site!r}: expected tensors of one shape, got {shapes}.")
    return torch.stack(list(values))
