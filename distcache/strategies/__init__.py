"""Strategies by name: the table that a new one is added to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from distcache.codec import dtype_name, dtype_named
from distcache.strategies.base import (
    MAX,
    MIN,
    SUM,
    Columns,
    Field,
    Fieldwise,
    Gathered,
    Groups,
    Listwise,
    Reduction,
    Rowwise,
    State,
    Strategy,
    Value,
    Weighted,
)
from distcache.strategies.covariance import Covariance
from distcache.strategies.grouped import Grouped
from distcache.strategies.histogram import Histogram
from distcache.strategies.lists import Default, Extend, First, Function, default_aggregation
from distcache.strategies.pattern import AveragePattern
from distcache.strategies.reductions import Max, Mean, Min, Moments, Sum
from distcache.strategies.rows import Cat, Piece, Rows, Stack
from distcache.strategies.topk import TopK

_BY_NAME: dict[str, type[Strategy]] = {
    "cat": Cat,
    "stack": Stack,
    "sum": Sum,
    "mean": Mean,
    "moments": Moments,
    "max": Max,
    "min": Min,
    "covariance": Covariance,
    "histogram": Histogram,
    "topk": TopK,
    "grouped": Grouped,
    "first": First,
    "extend": Extend,
    "average_pattern": AveragePattern,
    "default": Default,
}


def register_strategy(name: str, cls: type[Strategy]) -> None:
    """Make `cls` known by `name`, on this rank; every rank must register it alike.

    `cls` is a frozen dataclass: its fields are its parameters: plain values, dtypes or strategies. ValueError if
    the name is taken by another class, TypeError if it isn't a strategy.
    """
    if not (isinstance(cls, type) and issubclass(cls, (Fieldwise, Rowwise, Listwise))):
        raise TypeError(f"expected a subclass of Fieldwise, Rowwise or Listwise, got {cls!r}.")
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} must be a dataclass, so that ranks can compare its parameters.")
    taken = Function if name == "function" else _BY_NAME.get(name, cls)
    if taken is not cls:
        raise ValueError(f"the strategy name {name!r} is taken by {taken.__name__}: choose another.")
    _BY_NAME[name] = cls


def registered_strategies() -> Mapping[str, type[Strategy]]:
    """Every strategy by its name."""
    return dict(_BY_NAME)


def as_strategy(strategy: Strategy | str | Callable[[list[Any]], Any]) -> Strategy:
    """A strategy object from itself, its name, or a function of a list of values. TypeError, ValueError."""
    if isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, str):
        if strategy not in _BY_NAME:
            raise ValueError(f"unknown strategy {strategy!r}: expected one of {', '.join(sorted(_BY_NAME))}.")
        strategy = _BY_NAME[strategy]
    if isinstance(strategy, type) and issubclass(strategy, Strategy):
        needed = [f.name for f in dataclasses.fields(strategy) if _is_needed(f)]  # type: ignore[arg-type]
        if needed:
            raise ValueError(f"{strategy.__name__} needs its parameters: {strategy.__name__}({', '.join(needed)}).")
        return strategy()
    if callable(strategy):
        return Function(strategy)
    raise TypeError(f"expected a strategy, its name or a function of a list, got {type(strategy).__name__}.")


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def describe(strategy: Strategy) -> dict[str, Any]:
    """Name and parameters as plain values, for manifests, schemas and pickles. A function by its path."""
    if isinstance(strategy, Function):
        return {"name": "function", "parameters": {"function": strategy.path}}
    cls = type(strategy)
    name = next((name for name, known in _BY_NAME.items() if known is cls), None)
    if name is None:
        raise ValueError(
            f"{cls.__name__} has no name: call dc.register_strategy('{cls.__name__.lower()}', {cls.__name__})."
        )
    parameters = {}
    for field in dataclasses.fields(strategy):  # type: ignore[arg-type]
        value = getattr(strategy, field.name)
        if isinstance(value, torch.dtype):
            value = {"dtype": dtype_name(value)}
        elif isinstance(value, Strategy):
            value = {"strategy": describe(value)}
        parameters[field.name] = value
    return {"name": name, "parameters": parameters}


def described(description: Mapping[str, Any]) -> Strategy:
    """The strategy that `describe` described; never imports anything.

    ValueError for a name that isn't registered, or that takes other parameters.
    """
    if set(description) != {"name", "parameters"} or not isinstance(description["parameters"], dict):
        raise ValueError(f"expected the name and the parameters of a strategy, got {description}.")
    name, given = description["name"], description["parameters"]
    if name not in _BY_NAME:
        raise ValueError(f"unknown strategy {name!r}: register it first, dc.register_strategy({name!r}, …).")
    parameters = {}
    for field, value in given.items():
        if isinstance(value, dict) and set(value) == {"dtype"}:
            value = dtype_named(value["dtype"])
        elif isinstance(value, dict) and set(value) == {"strategy"} and isinstance(value["strategy"], dict):
            value = described(value["strategy"])
        parameters[field] = tuple(value) if isinstance(value, list) else value
    try:
        return _BY_NAME[name](**parameters)
    except TypeError as error:
        raise ValueError(f"the strategy {name!r} cannot be made of {parameters}: {error}.") from error


__all__ = [
    "MAX",
    "MIN",
    "SUM",
    "AveragePattern",
    "Cat",
    "Columns",
    "Covariance",
    "Default",
    "Extend",
    "Field",
    "Fieldwise",
    "First",
    "Function",
    "Gathered",
    "Grouped",
    "Groups",
    "Histogram",
    "Listwise",
    "Max",
    "Mean",
    "Min",
    "Moments",
    "Piece",
    "Reduction",
    "Rows",
    "Rowwise",
    "Stack",
    "State",
    "Strategy",
    "Sum",
    "TopK",
    "Value",
    "Weighted",
    "as_strategy",
    "default_aggregation",
    "describe",
    "described",
    "register_strategy",
    "registered_strategies",
]
