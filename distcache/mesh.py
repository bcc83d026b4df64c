"""Where ranks stand on a mesh of named axes, which of them reduce together, and how a key lies over the others.

Over *data axes* ranks have samples of their own: what they hold is reduced, or put one after the other. Over the other
axes, those of the model, ranks have seen the same samples: a key is replicated there and counts once, is split along a
dim of its value, or belongs to some of them alone, as layers belong to stages.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distcache.errors import SchemaMismatch

DATA_AXES = ("data", "dp", "ddp", "fsdp", "dp_replicate", "dp_shard", "replicate", "shard")
MODEL_AXES = ("tp", "tensor", "pp", "pipeline", "ep", "expert", "cp", "context", "sp", "sequence")
REPLICATED = "replicated"


@dataclass(frozen=True, slots=True)
class Mesh:
    """One rank's place: `ranks`, places in the group in the order of coordinates, the last axis the fastest."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    data_axes: frozenset[str]
    rank: int

    def coordinate(self, rank: int) -> dict[str, int]:
        """A rank's place along each axis."""
        number, found = self.ranks.index(rank), {}
        for axis, size in zip(reversed(self.axes), reversed(self.shape), strict=True):
            found[axis] = number % size
            number //= size
        return found

    def size(self, axis: str) -> int:
        return self.shape[self.axes.index(axis)]

    @property
    def data_ranks(self) -> tuple[int, ...]:
        """The ranks with samples of their own for what this rank has of the model, this one among them."""
        return self._along(True)

    @property
    def model_ranks(self) -> tuple[int, ...]:
        """The ranks that have seen the same samples, this one among them."""
        return self._along(False)

    @property
    def model_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.axes if axis not in self.data_axes)

    def _along(self, data: bool) -> tuple[int, ...]:
        """The ranks that differ from this one along these axes alone."""
        mine = self.coordinate(self.rank)
        fixed = [axis for axis in self.axes if (axis in self.data_axes) != data]
        return tuple(r for r in self.ranks if all(self.coordinate(r)[axis] == mine[axis] for axis in fixed))


def mesh_of(mesh: Any, data_axes: Iterable[str] | None, ranks: Sequence[int], rank: int) -> Mesh:
    """A torch DeviceMesh as one rank of a group sees it; `ranks`: the group's, as the job numbers them.

    `data_axes`: None for those whose names say so. ValueError for axes without names, unknown ones, and a mesh over
    other ranks than the group's.
    """
    axes, numbers = getattr(mesh, "mesh_dim_names", None), [int(n) for n in mesh.mesh.flatten().tolist()]
    if not axes:
        raise ValueError("the mesh's axes have no names: make it with mesh_dim_names=('dp', 'tp').")
    if sorted(numbers) != sorted(ranks):
        raise ValueError(
            f"the mesh is over the ranks {sorted(numbers)}, and the cache over {sorted(ranks)}: give both."
        )
    if data_axes is None:
        data_axes = [axis for axis in axes if axis in DATA_AXES]
        others = [axis for axis in axes if axis not in DATA_AXES and axis not in MODEL_AXES]
        if others:
            raise ValueError(
                f"is {others[0]!r} of the axes {tuple(axes)} one along which ranks have samples of their own? Say so: "
                f"data_axes=[…], those that are; DATA_AXES of distcache.mesh names what is known."
            )
    found = frozenset([data_axes] if isinstance(data_axes, str) else data_axes)
    unknown = sorted(found - set(axes))
    if unknown:
        raise ValueError(f"data_axes={unknown} are no axes of the mesh, which has {tuple(axes)}.")
    places = tuple(ranks.index(number) for number in numbers)
    return Mesh(tuple(axes), tuple(mesh.mesh.shape), places, found, rank)


# -- placements ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placement:
    """How a key lies over the model's axes: split along a dim, from the end of its value's, over each of `dims`' axes;
    over the others it's replicated.
    """

    dims: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if not self.dims:
            return REPLICATED
        return "split(" + ", ".join(f"dim {dim} over {axis}" for axis, dim in self.dims) + ")"

    @classmethod
    def named(cls, words: str) -> Placement:
        """The inverse of `str`."""
        found = re.findall(r"dim (-\d+) over ([^,)]+)", words)
        return cls(tuple((axis, int(dim)) for dim, axis in found))

    def check(self, mesh: Mesh, key: str) -> None:
        """`SchemaMismatch` for an axis that isn't the model's, or isn't there."""
        for axis, _ in self.dims:
            if axis in mesh.data_axes:
                raise SchemaMismatch(
                    f"{key!r} is {self}, and {axis!r} is one of data_axes={sorted(mesh.data_axes)}, along which ranks "
                    "have samples of their own: leave it out there, or its pieces would be added to each other."
                )
            if axis not in mesh.axes:
                raise SchemaMismatch(f"{key!r} is {self}, and the mesh has the axes {mesh.axes}.")


def sources(
    key: str, placement: Placement, holders: Sequence[int], coordinates: Mapping[int, Mapping[str, int]], mesh: Mesh
) -> dict[tuple[int, ...], int]:
    """By coordinate along the axes that a key is split over, the first of `holders` there: who has which piece.

    One entry, (), for a key that isn't split. `SchemaMismatch` where a piece is held by nobody. Pure.
    """
    axes = [axis for axis, _ in placement.dims]
    found: dict[tuple[int, ...], int] = {}
    for rank in holders:
        found.setdefault(tuple(coordinates[rank][axis] for axis in axes), rank)
    wanted = list(itertools.product(*(range(mesh.size(axis)) for axis in axes)))
    missing = [place for place in wanted if place not in found]
    if missing:
        raise SchemaMismatch(
            f"{key!r} is {placement}, and nobody holds its piece at {dict(zip(axes, missing[0], strict=True))} "
            f"({len(wanted) - len(missing)} of {len(wanted)} are there): every rank along these axes brings its own."
        )
    return {place: found[place] for place in wanted}


def put_together(
    shapes: Mapping[tuple[int, ...], tuple[int, ...]], dims: Sequence[int], key: str
) -> tuple[tuple[int, ...], dict[tuple[int, ...], tuple[slice, ...]]]:
    """(the whole's shape, where each piece lies in it): `shapes` by coordinate, `dims` of each coordinate's axis.

    Pieces may differ in size along the dims they are split over, alike wherever their other coordinates stand, and in
    no other. `SchemaMismatch`. Pure.
    """
    first = next(iter(shapes.values()))
    sizes: dict[int, list[int]] = {}
    for number, dim in enumerate(dims):
        if len(first) < -dim:
            raise SchemaMismatch(f"{key!r} is split along dim {dim}, and its pieces have shape {first}.")
        along: dict[int, set[int]] = {}
        for place, shape in shapes.items():
            along.setdefault(place[number], set()).add(shape[dim] if len(shape) == len(first) else -1)
        if any(len(found) > 1 for found in along.values()):
            raise SchemaMismatch(f"the pieces of {key!r} don't fit along dim {dim}: {sorted(shapes.values())}.")
        sizes[dim] = [found.pop() for _, found in sorted(along.items())]
    whole = list(first)
    for dim, found in sizes.items():
        whole[dim] = sum(found)
    where = {}
    for place, shape in shapes.items():
        cut = [slice(0, n) for n in whole]
        for number, dim in enumerate(dims):
            start = sum(sizes[dim][: place[number]])
            cut[dim] = slice(start, start + shape[dim])
        if len(shape) != len(whole) or any(s.stop - s.start != n for s, n in zip(cut, shape, strict=True)):
            raise SchemaMismatch(
                f"the pieces of {key!r} don't fit together: {sorted(shapes.values())} along dims {list(dims)}."
            )
        where[place] = tuple(cut)
    return tuple(whole), where
