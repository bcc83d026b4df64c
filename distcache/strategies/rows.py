"""Cat and Stack: strategies that keep every row, bit for bit, in the samples' order where it is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distcache.errors import SchemaMismatch
from distcache.strategies.base import Columns, Rowwise, Value, Weighted, is_indexed


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows that came together: value_n [n, …] and what is known of each."""

    value_n: Tensor
    columns: Columns | None


class Rows:
    """The state of a Rowwise strategy: pieces in the order they came, joined only when somebody reads them.

    There is at least one piece, if only of 0 rows. All agree in row shape, dtype, type of device and in whether
    samples carry indices.
    """

    __slots__ = ("pieces",)

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = list(pieces)

    @property
    def num_rows(self) -> int:
        return sum(len(piece.value_n) for piece in self.pieces)

    @property
    def num_read(self) -> int:
        """How many of them are read: samples that carry indices once each."""
        order = self.order()
        return self.num_rows if order is None else len(order)

    @property
    def head(self) -> Piece:
        """The piece that shows row shape and dtype: the first that has rows, else the first."""
        return next((piece for piece in self.pieces if len(piece.value_n)), self.pieces[0])

    @property
    def indexed(self) -> bool | None:
        """Whether rows carry the samples' indices; None where there are no rows yet."""
        for piece in self.pieces:
            if len(piece.value_n):
                return is_indexed(piece.columns)
        return None

    def check_joins(self, other: Rows, key: str = "rows") -> None:
        """SchemaMismatch if `other`'s rows can't follow these; 0 rows must fit too, as on a rank that has no others."""
        mine, theirs = self.head.value_n, other.head.value_n
        if mine.shape[1:] != theirs.shape[1:] or mine.dtype != theirs.dtype or mine.device.type != theirs.device.type:
            raise SchemaMismatch(
                f"cannot concatenate {key!r}: expected rows of {_words(mine)}, got {_words(theirs)} in a value "
                f"{tuple(theirs.shape)}. Give every value one row shape, dtype and device, or register a function that "
                "aligns them."
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
        later = (sample[1:] > sample[:-1]) | ((sample[1:] == sample[:-1]) & (position[1:] > position[:-1]))
        if bool(later.all()):
            return None
        by_position = torch.sort(position, stable=True).indices
        order = by_position[torch.sort(sample[by_position], stable=True).indices]
        sample, position = sample[order], position[order]
        new = torch.ones(len(order), dtype=torch.bool)
        new[1:] = (sample[1:] != sample[:-1]) | (position[1:] != position[:-1])
        return order[new]

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
        with torch.inference_mode(False):  # what is joined may be read, and trained on, outside of it
            value_n = parts[0] if len(parts) == 1 else torch.cat(parts)
            order = self.order()
            return value_n if order is None else value_n[order.to(value_n.device)]

    def together(self) -> Rows:
        """The same rows as one piece, in the order in which they are read."""
        if len(self.pieces) == 1 and self.order() is None:
            return self
        known = self.columns()
        return Rows([Piece(self.joined(), Columns(known, bool(self.indexed)) if known else None)])


@dataclass(frozen=True, slots=True)
class Cat(Rowwise):
    """Concatenation along `dim`, bit for bit. State: the rows; tensors that were set by hand are copied once.

    Values must agree in dtype and in every other dim: nothing is promoted or padded.
    """

    dim: int | Literal["auto"] = 0

    def take(self, value: Value) -> Rows:
        data = _tensor(value, "Cat")
        dim = 0 if self.dim == "auto" else self.dim
        if not -data.dim() <= dim < data.dim():
            raise ValueError(f"Cat(dim={dim}) expects tensors with that dim, got {tuple(data.shape)}: use Stack().")
        if value.rows and dim not in (0, -data.dim()):
            raise ValueError(f"Cat(dim={dim}) cannot join recorded rows, which lie along dim 0: use Cat().")
        return Rows([Piece(data.movedim(dim, 0), value.columns)])

    def finalize(self, state: Rows) -> Tensor:
        value_n = state.joined()
        return value_n.movedim(0, self.dim) if isinstance(self.dim, int) and self.dim else value_n


@dataclass(frozen=True, slots=True)
class Stack(Rowwise):
    """Values side by side along a new `dim`; of a recorded value each row. State: one row per value."""

    dim: int | Literal["auto"] = 0

    def take(self, value: Value) -> Rows:
        data = _tensor(value, "Stack")
        if isinstance(self.dim, int) and not -(data.dim() + 1 - value.rows) <= self.dim <= data.dim() - value.rows:
            raise ValueError(f"Stack(dim={self.dim}) cannot place values of shape {tuple(data.shape)} along that dim.")
        if value.rows:  # a recorded value's rows are its samples
            return Rows([Piece(data, value.columns)])
        if value.columns is not None and len(value.columns) != 1:
            raise ValueError(f"Stack makes one row of a value: expected one sample's index, got {len(value.columns)}.")
        return Rows([Piece(data.unsqueeze(0), value.columns)])

    def finalize(self, state: Rows) -> Tensor:
        value_n = state.joined()
        return value_n.movedim(0, self.dim) if isinstance(self.dim, int) and self.dim else value_n


def _tensor(value: Value, strategy: str) -> Tensor:
    data = value.data
    if isinstance(data, Weighted) or value.weight is not None:
        raise TypeError(f"{strategy} keeps values as they are and takes no weights: use Mean() or Sum().")
    if not isinstance(data, Tensor):
        raise TypeError(f"{strategy} expects tensors, got {type(data).__name__}: use Extend() for lists.")
    if value.rows:
        return data.detach()  # made for this cache by the hook that recorded it
    # Somebody else's: it may be written to later, be part of a graph, or of a storage that is far larger.
    with torch.inference_mode(False):
        return data.detach().clone()


def _words(value_n: Tensor) -> str:
    return f"{tuple(value_n.shape[1:])} {value_n.dtype} on {value_n.device.type}"
