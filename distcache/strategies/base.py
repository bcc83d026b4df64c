"""What a strategy is: how the values of one key become a state, how states combine, what a state says.

Three abstract kinds, by what their state is and so by how it crosses the cluster:

    Fieldwise   a few tensors of a fixed shape, each with a reduction: one all_reduce per segment
    Rowwise     rows that are kept: exactly their bytes move
    Listwise    whole values that are kept, as a list: their encoded bytes move
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.errors import SchemaMismatch

State = dict[str, Tensor]


class Reduction(enum.Enum):
    """How one field of a state combines, element by element."""

    SUM = "sum"
    MAX = "max"
    MIN = "min"

    def identity(self, dtype: torch.dtype) -> int | float | bool:
        """The value that changes nothing: what an idle rank holds."""
        if self is Reduction.SUM:
            return 0
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


SUM, MAX, MIN = Reduction.SUM, Reduction.MAX, Reduction.MIN


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor of a state.

    `round`: fields of round 1 are reduced after those of round 0, so that they can be re-centred on what
    round 0 gave (`Fieldwise.recentre`).
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


class Strategy(abc.ABC):
    """How values of one key become one. Subclasses are frozen dataclasses: their parameters are their identity."""

    dim: int | Literal["auto"]

    @abc.abstractmethod
    def take(self, value: Value) -> Any:
        """The state of one contribution."""

    @abc.abstractmethod
    def combine(self, a: Any, b: Any) -> Any:
        """The state of what `a` and `b` saw together; neither is changed."""

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
    """

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

    def accumulators(self, state: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
        """The dtype in which each field of a state like this one is accumulated: its own, if not said otherwise."""
        return dict(state)

    def samples(self, value: Value) -> tuple[Tensor, Tensor | None]:
        """(value_n [n, …], weight_n [n] or [n, …] or None) of a contribution."""
        data, weight = value.data, value.weight
        if isinstance(data, Weighted):
            data, weight = data.value, _weight(data.weight, data.value)
        if isinstance(data, (bool, int, float)):
            data = torch.tensor(data, dtype=torch.float64 if isinstance(data, float) else None)
        if not isinstance(data, Tensor):
            raise TypeError(f"{type(self).__name__} reduces tensors and numbers, got {type(data).__name__}.")
        if data.is_complex():
            raise TypeError(
                f"{type(self).__name__} reduces real numbers, got {data.dtype}: use torch.view_as_real first."
            )
        data = data.detach()
        dim = 0 if value.rows and self.dim == "auto" else self.dim
        if dim == "auto":
            weight = None if weight is None else weight.expand(data.shape) if weight.dim() else weight
            return data.unsqueeze(0), None if weight is None else weight.unsqueeze(0)
        if data.dim() == 0:
            raise ValueError(
                f"{type(self).__name__}(dim={dim}) expects samples along a dim, got a tensor without dims. "
                "Leave out dim= to count it as one sample."
            )
        value_n = data.movedim(dim, 0)
        if weight is not None and weight.shape == data.shape:
            weight = weight.movedim(dim, 0)
        elif weight is not None and weight.dim() == 0:
            weight = weight.expand(len(value_n))
        return value_n, weight

    def combine(self, a: State, b: State) -> State:
        shapes = {
            name: torch.Size(map(max, a[name].shape, b[name].shape)) if a[name].shape != b[name].shape else None
            for name in a
        }
        into = {}
        for field in self.layout(a):
            grown, held = shapes[field.name], a[field.name]
            if grown is None:
                into[field.name] = held.clone()
            else:
                self._forbid_unless_ragged(held.shape, b[field.name].shape)
                into[field.name] = held.new_full(grown, field.reduction.identity(held.dtype))
                into[field.name][corner(held.shape)] = held
        self.fold_(into, b)
        return into

    def fold_(self, into: State, other: State) -> None:
        """`into` ⊕= `other`, in place; a ragged `other` joins at index 0 of every dim."""
        for field in self.layout(into):
            mine, theirs = into[field.name], other[field.name]
            field.reduction.fold_(mine if mine.shape == theirs.shape else mine[corner(theirs.shape)], theirs)

    def recentre(self, local: State, merged: State) -> State:
        """Round-1 fields of `local`, moved to the centre that the merged round-0 fields give.

        Arithmetic that broadcasts, so that many states of one shape are done at once: leading dims of both
        are [K, …]. Only strategies with round-1 fields need it.
        """
        raise NotImplementedError

    def layout(self, state: Mapping[str, Any]) -> tuple[Field, ...]:
        """The fields that this state has, in order (a weighted mean has one more)."""
        return tuple(field for field in self.fields if field.name in state)

    def ragged_dims(self, field: str, ndim: int) -> tuple[bool, ...]:
        """Which dims of a field may grow."""
        if isinstance(self.ragged, bool):
            return (self.ragged,) * ndim
        return tuple(d in self.ragged or d - ndim in self.ragged for d in range(ndim))

    def result_dtype(self, given: torch.dtype) -> torch.dtype:
        """The dtype of results for values of this dtype: float32, unless float64 went in or was asked for."""
        if torch.float64 in (given, self.accumulate):
            return torch.float64
        return torch.float32

    def _forbid_unless_ragged(self, mine: Sequence[int], theirs: Sequence[int]) -> None:
        if not self.ragged or len(mine) != len(theirs):
            raise SchemaMismatch(
                f"cannot combine samples of shape {tuple(mine)} with {tuple(theirs)}: {type(self).__name__} expects "
                f"one shape. For values of different sizes use {type(self).__name__}(ragged=True)."
            )


class Rowwise(Strategy):
    """A state of rows that are kept, `Rows` (see strategies/rows.py)."""


class Listwise(Strategy):
    """A state of whole values that are kept in order: a list of `Value`."""

    dim: int | Literal["auto"] = "auto"

    def take(self, value: Value) -> list[Value]:
        return [value]

    def combine(self, a: list[Value], b: list[Value]) -> list[Value]:
        return [*a, *b]


def corner(shape: Sequence[int]) -> tuple[slice, ...]:
    """The index of a block of this shape at the origin."""
    return tuple(slice(n) for n in shape)


def _weight(weight: float | Tensor, value: Any) -> Tensor:
    device = value.device if isinstance(value, Tensor) else None
    return torch.as_tensor(weight, dtype=torch.float64, device=device).detach()
