"""First, Extend, functions of lists, and the default: strategies that keep whole values in order."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distcache.strategies.base import Listwise, Strategy, Value, Weighted
from distcache.strategies.rows import Cat, Stack


def _sample(value: Value) -> int:
    """The lowest index of a value's samples, or -1 where it has none."""
    if value.columns is None or not value.columns.indexed or not len(value.columns):
        return -1
    return int(value.columns.by_name["sample"].min())


def in_sample_order(values: Iterable[Value]) -> list[Value]:
    """Values by their lowest index; those without stay in the order they came (the sort is stable)."""
    return sorted(values, key=_sample)


@dataclass(frozen=True, slots=True)
class First(Listwise):
    """The first value; of the lowest index where samples carry one. State: that value."""

    dim: int | Literal["auto"] = "auto"

    def combine(self, a: list[Value], b: list[Value]) -> list[Value]:
        return in_sample_order([*a, *b])[:1]

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
        if value.columns is not None and value.columns.indexed and len(value.columns) != len(value.data):
            raise ValueError(
                f"Extend with an index expects one entry per sample: got {len(value.data)} entries for "
                f"{len(value.columns)} samples."
            )
        return [value]

    def finalize(self, state: list[Value]) -> list[Any]:
        if not any(value.columns is not None and value.columns.indexed for value in state):
            return [item for value in state for item in value.data]
        by_sample: dict[int, Any] = {}
        for value in state:
            assert value.columns is not None
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

    def finalize(self, state: list[Value]) -> Any:
        values = [value.data for value in in_sample_order(state)]
        return self.function(values) if len(values) > 1 else values[0]

    @property
    def path(self) -> str:
        """`module:qualname`, by which ranks agree on the function."""
        module = getattr(self.function, "__module__", None)
        return f"{module}:{getattr(self.function, '__qualname__', type(self.function).__qualname__)}"

    def importable(self) -> str:
        """The path, if importing it gives this function; ValueError with the fix otherwise."""
        module, _, qualname = self.path.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in qualname.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError, ValueError):
            found = None
        if found is not self.function:
            raise ValueError(
                f"cannot pickle the aggregation {self.path}: importing it does not give this function. Define it at "
                "a module's top level, or use a strategy by name, as in register_aggregation(pattern, 'stack')."
            )
        return self.path

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
    """Tensors: concatenate along dim 0; where shapes forbid it stack; where both fail, ValueError with the shapes.

    Lists are chained; of anything else the first is kept.
    """
    if all(isinstance(value, Tensor) for value in values):
        for join in (torch.cat, torch.stack):
            try:
                return join(values, dim=0)
            except (RuntimeError, ValueError, IndexError):
                continue
        raise ValueError(f"cannot concatenate or stack tensors of shapes {[tuple(value.shape) for value in values]}.")
    if all(isinstance(value, list) for value in values):
        return [item for value in values for item in value]
    return values[0]
