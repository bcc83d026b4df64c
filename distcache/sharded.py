"""Saving a content that lies in shards: every rank writes its part into one folder, which rank 0 publishes.

    activations/
      manifest.json
      data-00001-of-00002.safetensors    rank 0's rows, as they came, and reductions; what all hold; orders and columns
      data-00002-of-00002.safetensors    rank 1's rows and reductions

Rows aren't moved: the manifest names the parts of a concatenation, and where needed the order that puts them where one
rank that got them all would have. Only what is known of rows, their columns, comes together, on rank 0. Ranks must
share the file system. Before the rename nothing is there that `load` takes, and rank 0 renames when it has everyone's
report.
"""

from __future__ import annotations

import itertools
import operator
import shutil
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct

from distcache import codec
from distcache.cache import ActivationCache
from distcache.comm import Communicator, Transfer
from distcache.merge import Held, ShardRows
from distcache.protocol import (
    Decided,
    announce,
    arrive,
    attempt,
    check_decision,
    learn,
    leave_stage,
    moving,
    poll_decision,
    tell_all,
)
from distcache.store import (
    Concatenated,
    DataFile,
    Group,
    Listed,
    Reduced,
    Scattered,
    Stored,
    Writer,
    check_target,
    collect,
    draft_name,
    publish,
    saying,
)
from distcache.strategies import Columns, Piece, Rows

WRITTEN = "/written"  # the stage of an attempt at which all files are there


class _Report(Struct, frozen=True):
    """What a rank has written."""

    file: DataFile
    digest: str
    entries: list[Reduced | Concatenated | Listed]
    groups: list[Group]


class _PartWriter(Writer):
    """Writes rows as they came; what is known of them is rank 0's to write."""

    def rows(self, rows: Rows) -> tuple[Stored, int | None]:
        parts = [piece.value_n for piece in rows.pieces]
        return self.tensor(parts[0].dtype, (rows.num_rows, *parts[0].shape[1:]), lambda: parts), None


def save(
    comm: Communicator, number: int, wait_s: float, held: Held, path: str | PathLike[str], info: Mapping[str, str]
) -> None:
    """Save what all ranks hold: a collective. See `store.save`.

    What went wrong is raised where it did, `PeerFailed` on the other ranks; nothing that `load` takes is there then.
    """
    target, schemas = Path(path), held.facts.schemas
    concatenations = [key for key, schema in schemas.items() if schema.kind == "rows"]
    mine = [key for key in held.content if comm.rank == 0 or schemas[key].kind != "list"]
    draft: Path | None = None
    reported = False
    writer = _PartWriter(comm.rank)
    try:
        with attempt(comm, number, "save"):
            arrive(comm, number, wait_s, "save")
            with moving(comm):
                if comm.rank == 0:
                    check_target(target, info)
                    draft = target.parent / draft_name(target)
                    with saying(target, writer):
                        target.parent.mkdir(parents=True, exist_ok=True)
                        draft.mkdir()
                draft = target.parent / tell_all(comm, draft.name.encode() if draft is not None else b"")[0].decode()
                told = _tell_first(comm, codec.encode(_account(held.content, concatenations)))
            placed = _place(concatenations, [codec.decode(theirs) for theirs in told], writer) if comm.rank == 0 else {}
            parts = collect(held.content, writer, mine)
            file, digest = _write(comm, number, draft, target, writer)
            arrive(comm, number, wait_s, "save", WRITTEN)
            with moving(comm):
                reported = True
                report = _Report(file, digest, parts["entries"], parts["groups"])
                told = _tell_first(comm, msgspec.json.encode(report))
            if comm.rank:
                learn(comm, number, 0)
                return
            reports = [msgspec.json.decode(theirs, type=_Report) for theirs in told]
            parts["entries"], parts["groups"] = _entries(list(schemas), reports, placed)
            data = [(report.file, report.digest) for report in reports]
            with saying(target, writer):
                publish(draft, target, data, info=dict(info), world_size=comm.world_size, **parts)
            try:
                announce(comm, number)
            except Decided:  # a rank gave up at the last moment, and the others know
                target.rename(draft)
                raise
            if comm.heart is not None:
                leave_stage(comm, number, WRITTEN)
    except BaseException:
        # By now all are told, and nobody wonders where the folder is. Rank 0 may publish once it has all reports:
        # whoever has sent its own leaves the folder to it.
        if draft is not None and (comm.rank == 0 or not reported):
            shutil.rmtree(draft, ignore_errors=True)
        raise


def _tell_first(comm: Communicator, blob: bytes) -> list[bytes]:
    """Every rank's bytes, on rank 0; elsewhere its own alone: a collective."""
    poll = poll_decision(comm)
    sizes = [row[0] for row in comm.gather([len(blob)], poll)]
    mine = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    if comm.rank:
        comm.run([Transfer(mine, "copy", root=comm.rank, to=0)], poll)
        return [blob]
    theirs = [torch.empty(size, dtype=torch.uint8) for size in sizes[1:]]
    comm.run([Transfer(buffer, "copy", root=rank, to=0) for rank, buffer in enumerate(theirs, 1)], poll)
    return [blob, *(buffer.numpy().tobytes() for buffer in theirs)]


def _write(comm: Communicator, number: int, draft: Path, target: Path, writer: Writer) -> tuple[DataFile, str]:
    """This rank's file. What the disk says of a folder that was removed because another rank failed isn't reported."""
    name = f"data-{comm.rank + 1:05}-of-{comm.world_size:05}.safetensors"
    try:
        with saying(target, writer):
            if not draft.is_dir():
                check_decision(comm, number)
                raise FileNotFoundError(
                    f"cannot save to {target}: {comm.name(comm.rank)} doesn't see the folder that rank 0 made there. "
                    'With dst="shard" all ranks write into one folder: save to a file system that they share.'
                )
            written = writer.write(draft / name, poll_decision(comm))
    except OSError:
        check_decision(comm, number)
        raise
    check_decision(comm, number)
    return written


# -- where rows belong -----------------------------------------------------------------------------------------


def _account(content: ActivationCache, keys: Sequence[str]) -> list[Any]:
    """What is known of this rank's rows of these keys: tables, and the number of each key's."""
    kept = content._kept()
    tables: list[list[Any]] = []
    which: list[int] = []
    numbers: dict[Any, int] = {}
    for key in keys:
        rows = kept[key].state
        identity = tuple(
            (epoch, len(piece.value_n), id(piece.columns))
            for epoch, piece in zip(rows.epochs, rows.pieces, strict=True)
        )
        if identity not in numbers:
            numbers[identity] = len(tables)
            tables.append(list(_by_merge(rows)))
        which.append(numbers[identity])
    return [tables, which]


def _by_merge(rows: ShardRows) -> Iterator[list[Any]]:
    """For each merge that brought rows: its number, how many, what is known of them, and whether it has an index."""
    for epoch, group in itertools.groupby(zip(rows.epochs, rows.pieces, strict=True), operator.itemgetter(0)):
        pieces = [piece for _, piece in group if len(piece.value_n)]
        if pieces:
            known = [piece.columns.by_name if piece.columns is not None else {} for piece in pieces]
            names = [name for name in known[0] if all(name in columns for columns in known)]
            part = Rows(pieces)
            yield [epoch, part.num_rows, {name: part.column(name) for name in names}, bool(part.indexed)]


def _place(keys: Sequence[str], accounts: Sequence[Any], writer: Writer) -> dict[str, tuple[Stored | None, int | None]]:
    """By key, the order in which its parts' rows are read, and the number of the table of what is known of them."""
    found: dict[tuple[int, ...], tuple[Stored | None, int | None]] = {}
    placed = {}
    for i, key in enumerate(keys):
        numbers = tuple(which[i] for _, which in accounts)
        if numbers not in found:
            order, columns = in_order([tables[n] for (tables, _), n in zip(accounts, numbers, strict=True)])
            found[numbers] = (
                None if order is None else writer.whole(order),
                None if columns is None else writer.table(columns),
            )
        placed[key] = found[numbers]
    return placed


def in_order(by_rank: Sequence[Sequence[Any]]) -> tuple[torch.Tensor | None, Columns | None]:
    """The order of rows that lie rank by rank, as one rank would read them, and their columns in it.

    That rank would have got them merge by merge, and in each rank by rank; samples that carry indices it puts in their
    order, each once. None for rows that lie so already. Pure.
    """
    pieces: list[tuple[int, Piece]] = []
    start = 0
    for merges in by_rank:
        for epoch, num_rows, by_name, indexed in merges:
            numbers = torch.arange(start, start + num_rows)
            pieces.append((epoch, Piece(numbers, Columns(by_name, indexed) if by_name else None)))
            start += num_rows
    if not pieces:
        return None, None
    (read,) = Rows(piece for _, piece in sorted(pieces, key=operator.itemgetter(0))).together().pieces
    return None if torch.equal(read.value_n, torch.arange(start)) else read.value_n, read.columns


def _entries(
    keys: Sequence[str], reports: Sequence[_Report], placed: Mapping[str, tuple[Stored | None, int | None]]
) -> tuple[list[Any], list[Group]]:
    """All ranks' entries as one cache's, in the order of `keys`, and their groups."""
    groups: list[Group] = []
    whole: dict[str, Reduced | Listed] = {}
    rows: dict[str, list[Concatenated]] = {}
    for report in reports:
        for entry in report.entries:
            if isinstance(entry, Concatenated):
                rows.setdefault(entry.key, []).append(entry)
            elif isinstance(entry, Reduced):
                whole[entry.key] = msgspec.structs.replace(entry, group=entry.group + len(groups))
            else:
                whole[entry.key] = entry
        groups.extend(report.groups)
    entries: list[Any] = []
    for key in keys:
        if key in whole:
            entries.append(whole[key])
            continue
        parts = tuple(entry.data for entry in rows[key] if entry.data.shape[0]) or (rows[key][0].data,)
        entries.append(Scattered(key, parts, *placed[key], rows[key][0].strategy))
    return entries, groups
