"""Cat and Stack: strategies that keep every row, bit for bit, in the samples' order where it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distcache.errors import SchemaMismatch
from distcache.strategies.base import Columns, Rowwise, Value, Weighted


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows that came together: value_n [n, …] and what is known of each."""

    value_n: Tensor
    columns: Columns | None


class Rows:
    """The state of a Rowwise strategy: pieces in the order they came, joined only when somebody reads them.

    All pieces agree in row shape, dtype and in whether samples carry indices.
    """

    __slots__ = ("pieces",)

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = list(pieces)

    @property
    def num_rows(self) -> int:
        return sum(len(piece.value_n) for piece in self.pieces)

    @property
    def head(self) -> Piece:
        """The piece that shows row shape and dtype: the first that has rows, else the first."""
        return next((piece for piece in self.pieces if len(piece.value_n)), self.pieces[0])

    @property
    def indexed(self) -> bool | None:
        """Whether rows carry the samples' indices; None where there are no rows yet."""
        for piece in self.pieces:
            if len(piece.value_n):
                return piece.columns is not None and piece.columns.indexed
        return None

    def check_joins(self, other: Rows, key: str = "rows") -> None:
        """SchemaMismatch if `other`'s rows can't follow these."""
        mine, theirs = self.head.value_n, other.head.value_n
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype:
            raise SchemaMismatch(
                f"cannot concatenate {key!r}: expected rows of {tuple(mine.shape[1:])} {mine.dtype}, "
                f"got {tuple(theirs.shape[1:])} {theirs.dtype}. Give every value one row shape and dtype, "
                "or register a function that aligns them."
            )
        if None not in (self.indexed, other.indexed) and self.indexed != other.indexed:
            raise SchemaMismatch(
                f"cannot order {key!r}: some of its values came with an index and some without. "
                "On one key either every cat has index= or none has."
            )

    def order(self) -> Tensor | None:
        """The permutation (and selection) that puts rows in (sample, position) order, each once; None to keep as is.

        A row that was seen twice stays where it came first.
        """
        if not self.indexed:
            return None
        sample, position = self.column("sample"), self.column("position")
        by_position = torch.sort(position, stable=True).indices
        order = by_position[torch.sort(sample[by_position], stable=True).indices]
        sample, position = sample[order], position[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = (sample[1:] != sample[:-1]) | (position[1:] != position[:-1])
        order = order[new]
        if torch.equal(order, torch.arange(self.num_rows)):
            return None
        return order

    def column(self, name: str) -> Tensor:
        """One column of all rows in the order they came, int64 [n] or what was recorded."""
        parts = [
            piece.columns.by_name[name] for piece in self.pieces if piece.columns is not None and len(piece.value_n)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def columns(self) -> Mapping[str, Tensor]:
        """All columns, aligned to the joined rows; empty where nothing is known of them."""
        known = [piece for piece in self.pieces if len(piece.value_n)]
        if not known or any(piece.columns is None for piece in known):
            return {}
        shared = set.intersection(*(set(piece.columns.by_name) for piece in known if piece.columns is not None))
        order = self.order()
        names = [name for name in known[0].columns.by_name if name in shared]  # type: ignore[union-attr]
        return {name: self.column(name) if order is None else self.column(name)[order] for name in names}

    def joined(self) -> Tensor:
        """[n, …], in the samples' order where they carry indices."""
        parts = [piece.value_n for piece in self.pieces if len(piece.value_n)] or [self.pieces[0].value_n]
        value_n = parts[0] if len(parts) == 1 else torch.cat(parts)
        order = self.order()
        return value_n if order is None else value_n[order.to(value_n.device)]


@dataclass(frozen=True, slots=True)
class Cat(Rowwise):
    """Concatenation along `dim`, bit for bit. State: the rows."""

    dim: int | Literal["auto"] = 0

    def take(self, value: Value) -> Rows:
        data = _tensor(value, "Cat")
        if data.dim() == 0:
            raise ValueError("Cat expects tensors with at least one dim, got one without: use Stack().")
        if value.rows or self.dim in ("auto", 0):
            return Rows([Piece(data, value.columns)])
        assert isinstance(self.dim, int)
        return Rows([Piece(data.movedim(self.dim, 0), value.columns)])

    def combine(self, a: Rows, b: Rows) -> Rows:
        a.check_joins(b)
        return Rows([*a.pieces, *b.pieces])

    def finalize(self, state: Rows) -> Tensor:
        value_n = state.joined()
        return value_n.movedim(0, self.dim) if isinstance(self.dim, int) and self.dim else value_n


@dataclass(frozen=True, slots=True)
class Stack(Rowwise):
    """Values side by side along a new `dim`. State: one row per value."""

    dim: int | Literal["auto"] = 0

    def take(self, value: Value) -> Rows:
        data = _tensor(value, "Stack")
        if value.rows:  # a recorded value's rows are its samples
            return Rows([Piece(data, value.columns)])
        columns = value.columns
        if columns is not None and len(columns) != 1:
            raise ValueError(f"Stack makes one row of a value: expected one sample's index, got {len(columns)}.")
        return Rows([Piece(data.unsqueeze(0), columns)])

    def combine(self, a: Rows, b: Rows) -> Rows:
        a.check_joins(b)
        return Rows([*a.pieces, *b.pieces])

    def finalize(self, state: Rows) -> Tensor:
        value_n = state.joined()
        return value_n.movedim(0, self.dim) if isinstance(self.dim, int) and self.dim else value_n


def _tensor(value: Value, strategy: str) -> Tensor:
    data = value.data
    if isinstance(data, Weighted) or value.weight is not None:
        raise TypeError(f"{strategy} keeps values as they are and takes no weights: use Mean() or Sum().")
    if not isinstance(data, Tensor):
        raise TypeError(f"{strategy} expects tensors, got {type(data).__name__}: use Extend() for lists.")
    return data.detach()
