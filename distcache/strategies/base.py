"""What a strategy is: how the values of one key become a state, how states combine, what a state says.

Abstract kinds, by what their state is and so by how it crosses the cluster:

    Fieldwise   a few tensors of a fixed shape, each with a reduction: one all_reduce per segment
    Gathered    the same, but combined as a whole: a segment is sent from rank to rank along a tree, and folded
    Rowwise     rows that are kept: exactly their bytes move
    Listwise    whole values that are kept, as a list: their encoded bytes move

`distcache.testing.check_strategy_laws` says whether a strategy keeps what the merge relies on.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.errors import SchemaMismatch

State = dict[str, Tensor]
Kinds = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of every field


class Reduction(enum.Enum):
    """How one field of a state combines, element by element; of a `Gathered` one, only what an idle rank holds."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"

    def identity(self, dtype: torch.dtype) -> int | float | bool:
        """The value that changes nothing: what an idle rank holds."""
        if self is Reduction.SUM:
            return 0
        if dtype == torch.bool:
            return self is Reduction.MIN
        if dtype.is_floating_point:
            return float("-inf") if self is Reduction.MAX else float("inf")
        info = torch.iinfo(dtype)
        return info.min if self is Reduction.MAX else info.max

    def fold_(self, into: Tensor, other: Tensor) -> None:
        """`into` ⊕= `other`, in place; the shapes broadcast."""
        if self is Reduction.SUM:
            into.add_(other)
        elif self is Reduction.MAX:
            torch.maximum(into, other.to(into.dtype), out=into)
        else:
            torch.minimum(into, other.to(into.dtype), out=into)

    def fold_at_(self, into: Tensor, rows: Tensor, other: Tensor) -> None:
        """`into[rows]` ⊕= `other`, in place; each row is named once, or sums would depend on the order on a GPU."""
        if self is Reduction.SUM:
            into.index_add_(0, rows, other.to(into.dtype))
        else:
            mine = into.index_select(0, rows)
            self.fold_(mine, other)
            into.index_copy_(0, rows, mine)


SUM, MAX, MIN = Reduction.SUM, Reduction.MAX, Reduction.MIN
BLOCK_ROWS = 256  # of samples that are converted at a time


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a state.

    `round`: fields of round 1 are reduced after those of round 0, so that they can be re-centred on what
    round 0 gave (`Fieldwise.recentre_`).
    """

    name: str
    reduction: Reduction
    round: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """What is known of each of n rows: `sample` and `position`, int64 [n], and what was recorded beside.

    `indexed`: `sample` holds indices of the data set; otherwise it numbers the samples as they came.
    Shared by every key that was selected in the same way.
    """

    by_name: Mapping[str, Tensor]
    indexed: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Columns:
        return self  # never written to, so it stays shared

    def __len__(self) -> int:
        return len(self.by_name["sample"])


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One contribution to a key, as it was given: a tensor or a plain value.

    `rows`: dim 0 of `data` are rows (a recorded value); otherwise the strategy's `dim` says what they are.
    `weight`: a scalar, one per row, or one per element.
    """

    data: Any
    rows: bool = False
    columns: Columns | None = None
    weight: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """A value and its weight: a number, or a tensor of one weight per sample or per element."""

    value: Any
    weight: float | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which of `num` groups each of n samples is in: `of_n`, int64 [n], on the samples' device."""

    of_n: Tensor
    num: int

    def sum(self, x_n: Tensor, dtype: torch.dtype) -> Tensor:
        """Σ x of each group [num, …], added up in `dtype` in the samples' order.

        The same in every bit each time, but for floats on a GPU: see `Grouped`.
        """
        total = x_n.new_zeros((self.num, *x_n.shape[1:]), dtype=dtype)
        for start in range(0, len(x_n), BLOCK_ROWS):  # or all of them would lie there again, in float64
            block = slice(start, start + BLOCK_ROWS)
            total.index_add_(0, self.of_n[block], x_n[block].to(dtype))
        return total

    def extreme(self, x_n: Tensor, reduction: Reduction) -> Tensor:
        """The largest or smallest x of each group [num, …], NaN where there is one; the identity of none."""
        best = x_n.new_full((self.num, *x_n.shape[1:]), reduction.identity(x_n.dtype))
        of_n = wide(self.of_n, x_n).expand_as(x_n)
        return best.scatter_reduce_(0, of_n, x_n, "amax" if reduction is Reduction.MAX else "amin")

    def count(self) -> Tensor:
        """How many samples each group has, int64 [num]."""
        return self.sum(torch.ones_like(self.of_n), torch.int64)

    def spread(self, x_g: Tensor) -> Tensor:
        """x of each sample's group, [n, …]."""
        return x_g.index_select(0, self.of_n)

    def split(self, x_n: Tensor) -> tuple[Tensor, ...]:
        """The samples of each group, in their order."""
        return x_n[torch.sort(self.of_n, stable=True).indices].split(self.count().tolist())


class Strategy(abc.ABC):
    """How values of one key become one. Subclasses are frozen dataclasses: their parameters are their identity.

    `needs_index`: values must say which samples of the data set they are; `take` raises where they don't.
    """

    dim: int | Literal["auto"]
    needs_index = False

    @abc.abstractmethod
    def take(self, value: Value) -> Any:
        """The state of one contribution."""

    @abc.abstractmethod
    def combine(self, a: Any, b: Any) -> Any:
        """The state of what `a` and `b` saw together; neither is changed. `SchemaMismatch` if they can't be."""

    @abc.abstractmethod
    def fold_(self, into: Any, other: Any) -> None:
        """`into` becomes the state of both, in place; `other` stays as it is. They are known to fit."""

    @abc.abstractmethod
    def check(self, a: Any, b: Any, key: str = "value") -> None:
        """`SchemaMismatch`, naming the key, if the states `a` and `b` can't be combined."""

    @abc.abstractmethod
    def finalize(self, state: Any) -> Any:
        """What the user reads."""

    def resolve(self, value: Value) -> Strategy:
        """The strategy to use for a key whose first value is this one; the strategy itself, but for the default."""
        return self


class Fieldwise(Strategy):
    """A state of a few tensors, each reduced element by element; combining follows from the fields.

    To write one: a frozen dataclass with `fields`, `lift` and `finalize`. An idle rank holds identities.
    A `count` field, int64, says how many samples stand behind a value, as `[]`, `[…, 1]` or per element.

    `groupable`: `finalize` reads many keys at once, with leading dims [K, …] on every field, as `fold_` and `recentre_`
    must in any case: what `Grouped` asks of it.
    """

    groupable = False
    fields: tuple[Field, ...] = ()
    ragged: bool | tuple[int, ...]
    size: int | tuple[int, ...] | None
    accumulate: torch.dtype | None

    @abc.abstractmethod
    def lift(self, value_n: Tensor, weight_n: Tensor | None = None) -> State:
        """The state of n samples, value_n [n, …]; n may be 0."""

    def take(self, value: Value) -> State:
        """The state of one contribution, with its samples along dim 0. TypeError if it is no number."""
        return self.lift(*self.samples(value))

    def take_slab(self, value: Value) -> State:
        """The states of K keys whose values lie side by side in dim 1, value.data [n, K, …]: fields [K, …]."""
        data = value.data
        states = [self.take(Value(data[:, k], value.rows, value.columns)) for k in range(data.shape[1])]
        return {name: torch.stack([state[name] for state in states]) for name in states[0]}

    def lift_groups(self, value_n: Tensor, weight_n: Tensor | None, groups: Groups) -> State:
        """The states of groups of samples, side by side: fields [num, …]."""
        values = groups.split(value_n) or (value_n,)
        weights = (None,) * len(values) if weight_n is None else groups.split(weight_n) or (weight_n,)
        states = [self.lift(value, weight) for value, weight in zip(values, weights, strict=True)]
        return {name: torch.stack([state[name] for state in states])[: groups.num] for name in states[0]}

    def lift_groups_slab(self, value_nk: Tensor, groups: Groups) -> State:
        """The same of k keys whose samples lie side by side, value_nk [n, k, …]: fields [k, num, …]."""
        k, m = value_nk.shape[1], groups.num  # a key is one more thing that tells groups apart
        of_nk = groups.of_n.unsqueeze(1) + torch.arange(k, device=groups.of_n.device) * m
        state = self.lift_groups(value_nk.flatten(0, 1), None, Groups(of_nk.flatten(), k * m))
        return {name: tensor.unflatten(0, (k, m)) for name, tensor in state.items()}

    def kinds(self, state: State, num_leading: int = 0) -> Kinds:
        """What a key that takes in such a state holds of every field, behind leading dims: as much, if not more."""
        return {name: (tuple(tensor.shape[num_leading:]), tensor.dtype) for name, tensor in state.items()}

    def accumulators(self, state: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """The dtype in which each field of a state like this one is accumulated: its own, if not said otherwise."""
        return dict(state)

    def samples(self, value: Value) -> tuple[Tensor, Tensor | None]:
        """(value_n [n, …], weight_n [n] or [n, …] or None) of a contribution. TypeError if it is no real number."""
        data, weight = value.data, value.weight
        if isinstance(data, Weighted):
            data, weight = data.value, torch.as_tensor(data.weight)
        if isinstance(data, (bool, int, float)):
            data = torch.tensor(data, dtype=torch.float64 if isinstance(data, float) else None)
        if not isinstance(data, Tensor):
            raise TypeError(f"{type(self).__name__} reduces tensors and numbers, got {type(data).__name__}.")
        if data.is_complex():
            raise TypeError(
                f"{type(self).__name__} reduces real numbers, got {data.dtype}: use torch.view_as_real first."
            )
        if data.dtype == torch.uint64:
            raise TypeError(f"{type(self).__name__} reduces integers as int64, which uint64 can exceed: convert first.")
        data = data.detach()
        dim = 0 if value.rows and self.dim == "auto" else self.dim
        if dim == "auto":
            data, dim = data.unsqueeze(0), 0
            weight = None if weight is None else weight.unsqueeze(0)
        if not -data.dim() <= dim < data.dim():
            raise ValueError(
                f"{type(self).__name__}(dim={dim}) expects samples along that dim, got a tensor {tuple(data.shape)}. "
                "Leave out dim= to count it as one sample."
            )
        value_n = data.movedim(dim, 0)
        if weight is None:
            return value_n, None
        weight = weight.detach().to(value_n.device, torch.float64)
        if weight.shape == data.shape:
            return value_n, weight.movedim(dim, 0)
        if weight.dim() == 0 or weight.shape == value_n.shape[:1]:
            return value_n, weight.expand(len(value_n))
        raise ValueError(
            f"a weight for {len(value_n)} sample(s) of shape {tuple(value_n.shape[1:])} is a number, one per sample or "
            f"one per element; got {tuple(weight.shape)}."
        )

    def given_dtype(self, value: Value) -> torch.dtype:
        """The dtype that a contribution came in; Python's floats count as float64."""
        data = value.data.value if isinstance(value.data, Weighted) else value.data
        if isinstance(data, bool):
            return torch.bool
        return data.dtype if isinstance(data, Tensor) else torch.float64 if isinstance(data, float) else torch.int64

    def check(self, a: State, b: State, key: str = "value") -> None:
        held, more = self.kinds(a), self.kinds(b)
        if set(held) != set(more):
            raise SchemaMismatch(
                f"cannot combine {key!r}: one state has {sorted(held)}, the other {sorted(more)}. Give every value of "
                "a key a weight, or none."
            )
        for name in held:
            (mine, _), (theirs, _) = held[name], more[name]
            may_grow = self.ragged_dims(name, len(mine))
            if len(mine) != len(theirs) or any(
                m != n and not grows for m, n, grows in zip(mine, theirs, may_grow, strict=True)
            ):
                raise SchemaMismatch(
                    f"cannot combine {key!r}: {name} has shape {mine} in one state and {theirs} in the other. "
                    f"{type(self).__name__} expects samples of one shape{self.ragged_advice}."
                )

    def combine(self, a: State, b: State) -> State:
        self.check(a, b)
        into = {}
        for field in self.layout(a):
            held, more = a[field.name], b[field.name]
            if held.shape == more.shape:
                into[field.name] = held.clone()
                continue
            both = torch.Size(map(max, held.shape, more.shape))
            into[field.name] = held.new_full(both, field.reduction.identity(held.dtype))
            into[field.name][corner(held.shape)] = held
        self.fold_(into, b)
        return into

    def fold_(self, into: State, other: State) -> None:
        """`into` ⊕= `other`, in place; a ragged `other` joins at index 0 of every dim."""
        for field in self.layout(into):
            mine, theirs = into[field.name], other[field.name]
            field.reduction.fold_(mine if mine.shape == theirs.shape else mine[corner(theirs.shape)], theirs)

    def recentre_(self, local: State, merged: State) -> None:
        """Move the round-1 fields of `local`, in place, to the centre that the round-0 fields of `merged` give.

        Many states of one shape are done at once: leading dims of both are [K, …]. What `merged` has in round-1
        fields means nothing. Only strategies with round-1 fields need it.
        """
        raise NotImplementedError

    def layout(self, state: Mapping[str, Any]) -> tuple[Field, ...]:
        """The fields that this state has, in order (a weighted mean has one more)."""
        return tuple(field for field in self.fields if field.name in state)

    @property
    def ragged_advice(self) -> str:
        """What to do about samples of different sizes, as the end of a sentence; nothing, where they can't be."""
        may_be = any(field.name == "ragged" for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"; for different sizes use {type(self).__name__}(ragged=True)" if may_be else ""

    def ragged_dims(self, field: str, ndim: int) -> tuple[bool, ...]:
        """Which dims of a field may grow."""
        if isinstance(self.ragged, bool):
            return (self.ragged,) * ndim
        return tuple(d in self.ragged or d - ndim in self.ragged for d in range(ndim))

    def limits(self, field: str, ndim: int) -> tuple[int | None, ...]:
        """Of a field's dims that may grow, how far they may; None for no limit."""
        return self.size if isinstance(self.size, tuple) else (self.size,) * ndim

    def split_dim(self, field: str, ndim: int, dim: int) -> int | None:
        """Which dim of a field, from its end, lies along a dim of the values, where these are split over ranks; None:
        none does, and the field is the same on all of them. ValueError where the pieces' states aren't pieces of one.
        """
        return dim if ndim >= -dim else None

    def counts(self, state: State) -> Tensor:
        """How many samples stand behind the value of a state that has a `count`, where the value has its cells."""
        return state["count"]

    def result_dtype(self, given: torch.dtype) -> torch.dtype:
        """The dtype of results for values of this dtype: float32, unless float64 went in or was asked for."""
        if torch.float64 in (given, self.accumulate):
            return torch.float64
        return torch.float32


class Gathered(Fieldwise):
    """A state of a few tensors of a fixed shape and any dtype that combine as a whole, as the best of all do.

    To write one: a frozen dataclass with `fields`, `lift` (or `take`), `fold_` and `finalize`. A field's reduction
    names the identity that an idle rank holds and nothing more. `fold_` says how states combine, in place: of many
    keys at once, with leading dims [K, …] on every field, of what it is given in any order and grouping alike, and
    identities change nothing. Merging takes a send of every state along a tree of ranks, log2 of their number deep,
    each end of it folded by `fold_`, where a `Fieldwise` takes one all_reduce.
    """

    @abc.abstractmethod
    def fold_(self, into: State, other: State) -> None: ...


class Rowwise(Strategy):
    """A state of rows that are kept, `Rows` (see strategies/rows.py)."""

    def check(self, a: Any, b: Any, key: str = "value") -> None:
        a.check_joins(b, key)

    def combine(self, a: Any, b: Any) -> Any:
        self.check(a, b)
        return type(a)([*a.pieces, *b.pieces])

    def fold_(self, into: Any, other: Any) -> None:
        into.pieces.extend(other.pieces)


class Listwise(Strategy):
    """A state of whole values that are kept in order: a list of `Value`."""

    dim: int | Literal["auto"] = "auto"

    def take(self, value: Value) -> list[Value]:
        return [value]

    def check(self, a: list[Value], b: list[Value], key: str = "value") -> None:
        if a and b and is_indexed(a[0].columns) != is_indexed(b[0].columns):
            raise SchemaMismatch(
                f"cannot order {key!r}: some of its values came with an index and some without. "
                "On one key either every cat has index= or none has."
            )

    def combine(self, a: list[Value], b: list[Value]) -> list[Value]:
        self.check(a, b)
        both = list(a)
        self.fold_(both, b)
        return both

    def fold_(self, into: list[Value], other: list[Value]) -> None:
        into.extend(other)


def wide(few: Tensor, like: Tensor) -> Tensor:
    """`few` with dims added behind its own, so that it broadcasts to `like`."""
    return few.reshape((*few.shape, *[1] * (like.dim() - few.dim())))


def corner(shape: Sequence[int]) -> tuple[slice, ...]:
    """The index of a block of this shape at the origin."""
    return tuple(slice(n) for n in shape)


def is_indexed(columns: Columns | None) -> bool:
    """Whether columns say which samples of the data set these are."""
    return columns is not None and columns.indexed
