"""First, Extend, functions of lists, and the default: strategies that keep whole values in order."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.strategies.base import Listwise, Strategy, Value, Weighted, is_indexed
from distcache.strategies.rows import Cat, Stack


def _sample(value: Value) -> int:
    """The lowest index of a value's samples, or -1 where it has none."""
    if value.columns is None or not is_indexed(value.columns) or not len(value.columns):
        return -1
    return int(value.columns.by_name["sample"].min())


def in_sample_order(values: Iterable[Value]) -> list[Value]:
    """Values by their lowest index; those without stay in the order they came (the sort is stable)."""
    return sorted(values, key=_sample)


@dataclass(frozen=True, slots=True)
class First(Listwise):
    """The first value; of the lowest index where samples carry one. State: that value."""

    dim: int | Literal["auto"] = "auto"

    def fold_(self, into: list[Value], other: list[Value]) -> None:
        into[:] = in_sample_order([*into, *other])[:1]

    def finalize(self, state: list[Value]) -> Any:
        return state[0].data


@dataclass(frozen=True, slots=True)
class Extend(Listwise):
    """Lists chained into one. State: the lists.

    With an index a list has one entry per sample, and entries come in the samples' order, each sample once.
    """

    dim: int | Literal["auto"] = "auto"

    def take(self, value: Value) -> list[Value]:
        if not isinstance(value.data, (list, tuple)):
            raise TypeError(f"Extend expects lists, got {type(value.data).__name__}: wrap single values, [value].")
        if is_indexed(value.columns) and value.columns is not None and len(value.columns) != len(value.data):
            raise ValueError(
                f"Extend with an index expects one entry per sample: got {len(value.data)} entries for "
                f"{len(value.columns)} samples."
            )
        return [Value(list(value.data), value.rows, value.columns)]  # the user may go on filling the list

    def finalize(self, state: list[Value]) -> list[Any]:
        if not any(is_indexed(value.columns) for value in state):
            return [item for value in state for item in value.data]
        by_sample: dict[int, Any] = {}
        for value in state:
            assert value.columns is not None  # either all have an index or none has, see `check`
            for sample, item in zip(value.columns.by_name["sample"].tolist(), value.data, strict=True):
                by_sample.setdefault(sample, item)
        return [by_sample[sample] for sample in sorted(by_sample)]


@dataclass(frozen=True, slots=True)
class Function(Listwise):
    """Any function of a list of values, as in `lambda values: torch.stack(values)`.

    Outside deferred mode it folds pairwise, as the documented class does: its result is a value like any
    other. State in between: the list of values.
    """

    function: Callable[[list[Any]], Any]
    dim: int | Literal["auto"] = "auto"

    def check(self, a: list[Value], b: list[Value], key: str = "value") -> None:
        """Everything fits: what a function made belongs to no sample, and comes before values that do."""

    def finalize(self, state: list[Value]) -> Any:
        """The function's value of two or more; one value stays as it is, as where an empty cache takes over."""
        values = [value.data for value in in_sample_order(state)]
        return self.function(values) if len(values) > 1 else values[0]

    @property
    def path(self) -> str:
        """`module:qualname`, by which ranks agree on the function."""
        module = getattr(self.function, "__module__", None)
        return f"{module}:{getattr(self.function, '__qualname__', type(self.function).__qualname__)}"

    @classmethod
    def at(cls, path: str) -> Function:
        """The function that can be imported from a path. ValueError where there is none."""
        module, _, qualname = path.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in qualname.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot import the aggregation {path}: {error}.") from error
        return cls(found)

    def check_importable(self) -> None:
        """ValueError with the fix, if importing `path` doesn't give this function."""
        try:
            found = self.at(self.path).function
        except ValueError:
            found = None
        if found is not self.function:
            raise ValueError(
                f"cannot pickle the aggregation {self.path}: importing it does not give this function. Define it at "
                "a module's top level, or use a strategy by name, as in register_aggregation(pattern, 'stack')."
            )

    def __repr__(self) -> str:
        return f"Function({self.path})"


@dataclass(frozen=True, slots=True)
class Default(Listwise):
    """What keys without a registration get, decided by the first value.

    Tensors: concatenated along dim 0, those without dims stacked. Lists: chained. Anything else: the first.
    """

    dim: int | Literal["auto"] = "auto"

    def resolve(self, value: Value) -> Strategy:
        if isinstance(value.data, Weighted):
            raise TypeError("a Weighted value needs a strategy that weighs: register Mean(), Sum() or Moments().")
        if isinstance(value.data, Tensor):
            return Cat() if value.data.dim() else Stack()
        if isinstance(value.data, list):
            return Extend()
        return First()

    def finalize(self, state: list[Value]) -> Any:
        raise AssertionError("the default is resolved by the first value")


def default_aggregation(values: list[Any]) -> Any:
    """What keys without a registration get, as a function; the first value decides.

    Tensors: concatenated along dim 0; where shapes forbid it (tensors without dims) stacked; where both fail,
    ValueError with the shapes. Lists are chained; of anything else the first is kept. TypeError if a later value is
    of another kind than the first.
    """
    kind = next((kind for kind in (Tensor, list) if isinstance(values[0], kind)), None)
    if kind is None:
        return values[0]
    if not all(isinstance(value, kind) for value in values):
        found = ", ".join(type(value).__name__ for value in values[:8])
        raise TypeError(f"cannot aggregate values of different kinds: {found}. Register a function that can.")
    if kind is list:
        return [item for value in values for item in value]
    for join in (torch.cat, torch.stack):
        with contextlib.suppress(RuntimeError):
            return join(values, dim=0)
    raise ValueError(f"cannot concatenate or stack tensors of shapes {[tuple(value.shape) for value in values]}.")
