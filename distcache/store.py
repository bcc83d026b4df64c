"""A cache as a folder of safetensors and a JSON manifest: written whole or not at all, mapped when it is read.

    activations/
      manifest.json        what there is: keys in order, strategies, state fields, dtypes, shapes, versions, `info`
      data.safetensors     the tensors, by number; the manifest says which is whose
      SHA256SUMS           of both, as `sha256sum -c` reads it

A cache whose content lies in shards has a data file of each rank instead (see `sharded`).

What is saved are states, so that a loaded cache merges on. Reductions of one strategy and shape lie stacked in
one tensor per field, [K, …]: an entry of their own for each of thousands of keys would cost more than their bytes.

Nothing in a folder is ever run or imported: the manifest is checked against the types below before anything is
believed, strategies are built from the table of names alone, and a plain function is a line of text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import math
import os
import platform
import re
import secrets
import shutil
import stat
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import safetensors
import torch
from msgspec import Meta, Struct
from safetensors import safe_open
from torch import Tensor

from distcache import codec
from distcache.cache import ActivationCache
from distcache.entries import REDUCED, KeptEntry, LazyEntry, RawEntry
from distcache.errors import BadCache
from distcache.ledger import Ledger
from distcache.memory import human
from distcache.segments import capacity
from distcache.strategies import (
    Columns,
    Fieldwise,
    Function,
    Grouped,
    Listwise,
    Piece,
    Rows,
    Rowwise,
    State,
    Strategy,
    Value,
    Weighted,
    describe,
    described,
)

VERSION = 1  # of the format; raised when an older distcache could misread a folder
MANIFEST, DATA, SUMS = "manifest.json", "data.safetensors", "SHA256SUMS"
BLOCK_BYTES = 64 * 2**20  # rows are put in order, and files are hashed, this much at a time

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors", re.ASCII)

# What every safetensors >= 0.4.3 carries as it is. Other dtypes are stored as their bytes, with a last dim of itemsize.
_NATIVE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

# -- the manifest ----------------------------------------------------------------------------------------------

Size = Annotated[int, Meta(ge=0, le=2**62)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]


class _Part(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of the manifest: a field more, or of another type, and it's no manifest of ours."""


class Stored(_Part, frozen=True):
    """One tensor: the number of its file, its name in it, and what it is."""

    file: Size
    name: str
    dtype: str
    shape: tuple[Size, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * codec.dtype_named(self.dtype).itemsize

    def header(self) -> tuple[str, list[int]]:
        """Dtype and shape as the file's header has them."""
        if self.dtype in _NATIVE:
            return _NATIVE[self.dtype], list(self.shape)
        return "U8", [*self.shape, codec.dtype_named(self.dtype).itemsize]


class DataFile(_Part, frozen=True):
    name: str
    nbytes: Size


class StrategyText(_Part, frozen=True):
    """A strategy as `describe` describes it: its registered name and its parameters."""

    name: str
    parameters: dict[str, Any]


class Registration(_Part, frozen=True):
    """What `register_aggregation` was told; of a plain function only the path, as text."""

    pattern: str
    strategy: StrategyText | None = None
    function: str | None = None


class Table(_Part, frozen=True):
    """Columns that keys share: `sample`, `position` and what was recorded beside, each [n, …]."""

    indexed: bool
    columns: dict[str, Stored]


class Group(_Part, frozen=True):
    """The states of K reductions of one strategy and shape: each field stacked, [K, …]."""

    strategy: StrategyText
    result: str
    fields: dict[str, Stored]


class StoredValue(_Part, frozen=True):
    """One `Value`: a tensor as it is, anything else as the codec's bytes (a `Weighted` as the pair of its parts)."""

    data: Stored
    encoded: bool = False
    weighted: bool = False
    rows: bool = False
    table: Size | None = None
    weight: Stored | None = None


class Reduced(_Part, frozen=True, tag="reduced", tag_field="kind"):
    """A reduction: one row of a group."""

    key: str
    group: Size
    row: Size


class Concatenated(_Part, frozen=True, tag="rows", tag_field="kind"):
    """Rows [n, …], joined, in the samples' order; without a strategy as they were recorded."""

    key: str
    data: Stored
    table: Size | None = None
    strategy: StrategyText | None = None


class Scattered(_Part, frozen=True, tag="scattered", tag_field="kind"):
    """Rows [n, …] in parts, one after the other, and `order`, int64: the rows of these to read, each at its place."""

    key: str
    parts: Annotated[tuple[Stored, ...], Meta(min_length=1)]
    order: Stored | None = None
    table: Size | None = None
    strategy: StrategyText | None = None


class Listed(_Part, frozen=True, tag="values", tag_field="kind"):
    """Whole values; without a strategy they are as they were set or recorded."""

    key: str
    values: Annotated[tuple[StoredValue, ...], Meta(min_length=1)]
    strategy: StrategyText | None = None


class Seen(_Part, frozen=True):
    """Samples that reductions have seen, as half-open intervals one after the other."""

    keys: list[str]
    bounds: list[Int64]


class Manifest(_Part, frozen=True, kw_only=True):
    """All that a saved cache says of itself. `entries` are the keys in order; `info` is the user's."""

    format: Literal["distcache"]
    version: int
    created: str
    versions: dict[str, str]
    world_size: Annotated[int, Meta(ge=1)]
    info: dict[str, str]
    files: list[DataFile]
    entries: list[Reduced | Concatenated | Scattered | Listed]
    groups: list[Group]
    tables: list[Table]
    registry: list[Registration]
    notes: dict[str, str]
    ledger: list[Seen]
    num_samples: Size


class _Head(Struct):
    """What is read first: a newer format may have changed everything else."""

    format: str
    version: int


class Unregistered:
    """Stands for the function that a saved cache's keys were merged by, and raises when a merge needs it."""

    def __init__(self, pattern: str, path: str) -> None:
        self.pattern, self.path = pattern, path

    def __call__(self, values: list[Any]) -> Any:
        raise ValueError(
            f"keys {self.pattern!r} were merged by the function {self.path}, and loading never imports code: register "
            f"it again, cache.register_aggregation({self.pattern!r}, function)."
        )


# -- saving ----------------------------------------------------------------------------------------------------


def save(
    cache: ActivationCache, path: str | PathLike[str], *, info: Mapping[str, str] | None = None, world_size: int = 1
) -> None:
    """Write a cache to a new folder, whose parents are made where they're missing; see `load`.

    All is written beside the target, under a name that begins with a dot, synced to the disk, and published by
    one rename: whatever goes wrong, the target is whole or isn't there. A process that is killed leaves a folder
    `.{name}.….tmp`, to be removed by hand. Memory: at most a copy of the largest concatenation.

    Args:
        info: words for the manifest, such as the model's name.
        world_size: how many ranks made the cache.

    Raises:
        FileExistsError: the target is there, were it an empty folder.
        OSError: as the disk reports it (full, read-only), with the path; nothing is left behind.
        TypeError: a value that can't be stored, with its key.
    """
    target = Path(path)
    writer = Writer()
    check_target(target, info or {})
    parts = collect(cache, writer)
    draft = target.parent / draft_name(target)
    try:
        with saying(target, writer):
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.mkdir()
            data = writer.write(draft / DATA)
            publish(draft, target, [data], info=dict(info or {}), world_size=world_size, **parts)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_target(target: Path, info: Mapping[str, str]) -> None:
    """FileExistsError, TypeError: before anything is written."""
    for name, word in info.items():
        if not isinstance(name, str) or not isinstance(word, str):
            raise TypeError(f"info is words by name, got {name!r}: {word!r}. Write it as text: {name}={str(word)!r}.")
    refuse_existing(target)


def draft_name(target: Path) -> str:
    """Of a folder beside the target, in which a save is written."""
    return f".{target.name[:48]}.{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def saying(target: Path, writer: Writer) -> Iterator[None]:
    """What the disk reports is told with what was to be written, and where."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        size = human(sum(stored.nbytes for stored, _ in writer.tensors))
        where = f" ({error.filename})" if error.filename else ""
        why = f"cannot save {size} to {target}: {error.strerror}{where}. Nothing was left there"
        raise OSError(error.errno, why) from error


def publish(draft: Path, target: Path, data: Sequence[tuple[DataFile, str]], **parts: Any) -> None:
    """Write the manifest and the sums beside the data files, each given with its SHA-256, and rename the folder."""
    manifest = Manifest(
        format="distcache",
        version=VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions=_versions(),
        files=[file for file, _ in data],
        **parts,
    )
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    sums = [*((digest, file.name) for file, digest in data), (_write(draft / MANIFEST, [text]), MANIFEST)]
    _write(draft / SUMS, ["".join(f"{digest}  {name}\n" for digest, name in sums).encode()])
    _sync_folder(draft)
    try:
        draft.rename(target)
    except OSError:
        refuse_existing(target)  # made by somebody else in the meantime
        raise
    _sync_folder(target.parent)


def refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(
            f"cannot save to {target}: it is there already, and a save never overwrites. Choose another name, or "
            "remove it first."
        )


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems sync files, but know no sync of folders
            os.fsync(number)
    finally:
        os.close(number)


def _versions() -> dict[str, str]:
    found = {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "safetensors": safetensors.__version__,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["distcache"] = importlib.metadata.version("distcache")
    return found


def _write(path: Path, pieces: Iterable[Any]) -> str:
    """Write bytes-like pieces to a new file and sync it; their SHA-256."""
    digest = hashlib.sha256()
    with open(path, "xb", buffering=2**20) as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class Writer:
    """Collects what is to be written, as recipes for pieces: no tensor is copied before its turn comes.

    safetensors' own `save_file` copies every tensor to bytes before it writes the first. `file`: its number.
    """

    def __init__(self, file: int = 0) -> None:
        self._file = file
        self.tensors: list[tuple[Stored, Callable[[], Iterable[Tensor]]]] = []
        self.tables: list[Table] = []
        self._numbers: dict[int, tuple[int, Columns]] = {}  # of tables; columns are kept, so that ids stay theirs
        self._orders: dict[tuple[int, ...], tuple[Tensor | None, int | None]] = {}

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], pieces: Callable[[], Iterable[Tensor]]) -> Stored:
        """Plan a tensor whose elements `pieces` gives, one after the other."""
        stored = Stored(self._file, str(len(self.tensors)), codec.dtype_name(dtype), tuple(shape))
        self.tensors.append((stored, pieces))
        return stored

    def whole(self, tensor: Tensor) -> Stored:
        return self.tensor(tensor.dtype, tensor.shape, lambda: [tensor])

    def value(self, key: str, value: Value) -> StoredValue:
        data, weighted = value.data, isinstance(value.data, Weighted)
        if weighted:
            data = (value.data.value, value.data.weight)
        codec.check_plain(data, f"cannot save {key!r}")
        encoded = not isinstance(data, Tensor)
        if encoded:
            data = torch.frombuffer(bytearray(codec.encode(data)), dtype=torch.uint8)
        table = None if value.columns is None else self.table(value.columns)
        weight = None if value.weight is None else self.whole(value.weight)
        return StoredValue(self.whole(data), encoded, weighted, value.rows, table, weight)

    def rows(self, rows: Rows) -> tuple[Stored, int | None]:
        """Rows and the number of their table: joined in the samples' order, a block at a time."""
        pieces = [piece for piece in rows.pieces if len(piece.value_n)] or rows.pieces[:1]
        columns = [piece.columns for piece in pieces]
        shared = tuple(map(id, columns))
        if shared not in self._orders:  # once for all keys that share their columns
            order, known = rows.order(), columns[0]
            if len(columns) > 1 or order is not None:
                joined = rows.columns()
                known = Columns(joined, bool(rows.indexed)) if joined else None
            self._orders[shared] = (order, None if known is None else self.table(known))
        order, table = self._orders[shared]
        parts = [piece.value_n for piece in pieces]
        row_shape = parts[0].shape[1:]

        def in_order() -> Iterable[Tensor]:
            if order is None:
                return parts
            value_n = parts[0] if len(parts) == 1 else torch.cat(parts)
            step = max(1, BLOCK_BYTES // max(1, value_n.element_size() * math.prod(row_shape)))
            return (value_n[block.to(value_n.device)] for block in order.split(step))

        n = rows.num_rows if order is None else len(order)
        return self.tensor(parts[0].dtype, (n, *row_shape), in_order), table

    def table(self, columns: Columns) -> int:
        """The number of these columns' table."""
        if id(columns) not in self._numbers:
            by_name = {name: self.whole(column) for name, column in columns.by_name.items()}
            self.tables.append(Table(columns.indexed, by_name))
            self._numbers[id(columns)] = (len(self.tables) - 1, columns)
        return self._numbers[id(columns)][0]

    def write(self, path: Path, poll: Callable[[], None] = lambda: None) -> tuple[DataFile, str]:
        """Write a safetensors file; what it is and its SHA-256. `poll` is called now and then, and may raise.

        Larger elements come first, so that all are aligned when mapped.
        """
        ordered = sorted(self.tensors, key=lambda pair: -codec.dtype_named(pair[0].dtype).itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for stored, _ in ordered:
            dtype, shape = stored.header()
            header[stored.name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + stored.nbytes]}
            end += stored.nbytes
        head = msgspec.json.encode(header)
        head += b" " * (-(8 + len(head)) % 64)

        def pieces() -> Iterable[Any]:
            yield len(head).to_bytes(8, "little")
            yield head
            for stored, recipe in ordered:
                nbytes = 0
                for piece in recipe():
                    flat = codec.as_bytes(piece).cpu().numpy()
                    nbytes += flat.nbytes
                    yield flat.data
                    poll()
                assert nbytes == stored.nbytes, f"a tensor of {stored.nbytes} bytes gave {nbytes}"

        digest = _write(path, pieces())
        return DataFile(path.name, path.stat().st_size), digest


def collect(cache: ActivationCache, writer: Writer, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """The manifest's account of a cache, and what is to be written: all that a save knows of a cache's inside.

    `keys`: those to write, all by default.
    """
    entries: list[Reduced | Concatenated | Listed] = []
    alike: dict[Any, tuple[int, list[str]]] = {}  # numbers and keys of groups
    texts: dict[Strategy, StrategyText] = {}
    arena = cache._arena
    for key in cache if keys is None else keys:
        entry = cache._resolved(key)
        codec.check_plain(key, f"cannot save {key!r}")
        if entry is REDUCED:
            held, room = arena.entries[key], arena.capacities(key)
            fields = tuple((f.name, f.dtype, room[f.name]) for f in held.schema.fields)
            number, keys = alike.setdefault((held.strategy, held.schema.result, fields), (len(alike), []))
            entries.append(Reduced(key, number, len(keys)))
            keys.append(key)
        elif isinstance(entry, KeptEntry) and isinstance(entry.state, Rows):
            entries.append(Concatenated(key, *writer.rows(entry.state), _text(entry.strategy, texts)))
        elif isinstance(entry, KeptEntry) and not isinstance(entry.strategy, Function):
            values = tuple(writer.value(key, value) for value in entry.state)
            entries.append(Listed(key, values, _text(entry.strategy, texts)))
        elif isinstance(entry, KeptEntry):  # what a function made is a value like any other
            value = Value(entry.strategy.finalize(entry.state))
            entries.append(Listed(key, (writer.value(key, value),)))
        else:
            assert isinstance(entry, RawEntry)
            if all(_is_row_tensor(value) for value in entry.values):
                rows = Rows(Piece(value.data, value.columns) for value in entry.values)
                entries.append(Concatenated(key, *writer.rows(rows)))
            else:
                entries.append(Listed(key, tuple(writer.value(key, value) for value in entry.values)))
    groups = []
    for (strategy, result, fields), (_, keys) in alike.items():
        stacked = {
            name: writer.tensor(
                codec.dtype_named(dtype),
                (len(keys), *shape),
                lambda keys=keys, name=name: (arena.state(key)[name] for key in keys),  # type: ignore[misc]
            )
            for name, dtype, shape in fields
        }
        groups.append(Group(_text(strategy, texts), result, stacked))
    registry = []
    for pattern, strategy in cache._registry.items():
        if isinstance(strategy, Function):
            function = strategy.function
            path = function.path if isinstance(function, Unregistered) else strategy.path
            registry.append(Registration(pattern, function=path))
        else:
            registry.append(Registration(pattern, _text(strategy, texts)))
    for key, note in cache._notes.items():
        if not isinstance(note, str):
            raise TypeError(f"cannot save the note of {key!r}: expected a str, got {type(note).__name__}.")
    return {
        "entries": entries,
        "groups": groups,
        "tables": writer.tables,
        "registry": registry,
        "notes": dict(cache._notes),
        "ledger": [Seen(keys, bounds) for keys, bounds in cache._ledger.to_plain()],
        "num_samples": cache._num_samples,
    }


def _is_row_tensor(value: Value) -> bool:
    return value.rows and value.weight is None and isinstance(value.data, Tensor)


def _text(strategy: Strategy, texts: dict[Strategy, StrategyText]) -> StrategyText:
    """A strategy's description, if it comes back from JSON as the same; ValueError if it doesn't."""
    if strategy not in texts:
        text = StrategyText(**describe(strategy))
        again = _strategy(msgspec.json.decode(msgspec.json.encode(text), type=StrategyText), "the cache to save")
        if again != strategy:
            raise ValueError(f"cannot save {strategy}: from a manifest it would come back as {again}.")
        texts[strategy] = text
    return texts[strategy]


# -- loading ---------------------------------------------------------------------------------------------------


def load(path: str | PathLike[str], *, verify: bool = False) -> ActivationCache:
    """A saved cache: its folder is opened and checked, its tensors are mapped when a key is first read.

    It reads, merges and registers on as the cache that was saved, on the CPU. Reading copies nothing that can stay
    mapped, and nothing that is done to the cache touches the file. A key whose aggregation was a plain function
    is readable, but a merge of it raises ValueError until the function is registered again: loading runs and
    imports nothing.

    Safe for a stranger's folder: sizes, shapes, dtypes, names and strategies are checked before they're used.
    Altered payload bytes have no shape to betray them; `verify=True` reads every file and compares it with
    SHA256SUMS, which finds damage (not forgery: who forges a file can forge its sum).

    Raises:
        FileNotFoundError: there is no such folder.
        BadCache: it's no whole cache, or one that this version or this process can't read; also when a key is
            first read and its file has been changed or removed since.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if verify:
        _verify(folder, [MANIFEST, *(file.name for file in manifest.files)])
    reader = _Reader(folder, manifest)
    cache = ActivationCache()
    cache._entries.update({entry.key: LazyEntry(reader.entry(entry)) for entry in manifest.entries})
    for registration in manifest.registry:
        pattern = registration.pattern
        if registration.strategy is not None:
            cache._registry[pattern] = _strategy(registration.strategy, f"the registration of {pattern!r}")
        else:
            cache._registry[pattern] = Function(Unregistered(pattern, registration.function or "unknown"))
    cache._notes.update(manifest.notes)
    cache._ledger = Ledger.from_plain((seen.keys, seen.bounds) for seen in manifest.ledger)
    cache._num_samples = manifest.num_samples
    return cache


def read_manifest(path: str | PathLike[str]) -> Manifest:
    """What a saved cache says of itself, checked for consistency. FileNotFoundError, `BadCache`."""
    folder = Path(path)
    if not os.path.lexists(folder):
        raise FileNotFoundError(f"no saved cache at {folder}: there is nothing of that name.")
    if not folder.is_dir():
        raise BadCache(f"{folder} is no saved cache: expected a folder with {MANIFEST}, got a file.")
    _regular(folder / MANIFEST)
    try:
        text = (folder / MANIFEST).read_bytes()
        head = msgspec.json.decode(text, type=_Head)
        if head.format == "distcache" and head.version != VERSION:
            raise BadCache(
                f"{folder} has format version {head.version}, this distcache reads {VERSION}: "
                + ("upgrade distcache." if head.version > VERSION else "read it with the version that wrote it.")
            )
        manifest = msgspec.json.decode(text, type=Manifest)
        _check(manifest)
    except BadCache:
        raise
    except (msgspec.DecodeError, OSError, ValueError, RecursionError) as error:
        raise BadCache(f"{folder / MANIFEST} is no manifest of a saved cache: {error}.") from error
    return manifest


def _check(manifest: Manifest) -> None:
    """ValueError for what types alone can't say."""
    names = [file.name for file in manifest.files]
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"expected plain file names such as {DATA!r}, got {name!r}")
    keys = [entry.key for entry in manifest.entries]
    for what, found in (
        ("files", names),
        ("keys", keys),
        ("registrations", [registration.pattern for registration in manifest.registry]),
    ):
        if len(set(found)) < len(found):
            raise ValueError(f"{what} come twice, such as {Counter(found).most_common(1)[0][0]!r}")
    if not manifest.notes.keys() <= set(keys):
        raise ValueError(f"notes of keys that aren't there: {sorted(manifest.notes.keys() - set(keys))[:4]}")
    for seen in manifest.ledger:
        pairs = list(zip(seen.bounds[::2], seen.bounds[1::2], strict=False))
        rising = all(a[1] <= b[0] for a, b in itertools.pairwise(pairs))
        if len(seen.bounds) % 2 or not rising or any(low >= high for low, high in pairs):
            raise ValueError("the ledger's bounds are no disjoint intervals in order")


def _regular(path: Path) -> os.stat_result:
    """The file's facts; `BadCache` if it's missing, or a link, a pipe or anything but a plain file."""
    try:
        facts = path.lstat()
    except OSError as error:
        raise BadCache(f"{path.parent} is no whole cache: {path.name} can't be read ({error.strerror}).") from error
    if not stat.S_ISREG(facts.st_mode):
        raise BadCache(f"{path} is no plain file: a saved cache has no links; copy it with links followed, cp -rL.")
    return facts


def _verify(folder: Path, names: Sequence[str]) -> None:
    _regular(folder / SUMS)
    lines = (folder / SUMS).read_bytes().decode(errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in names:
        digest = hashlib.sha256()
        _regular(folder / name)
        with open(folder / name, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        if expected.get(name) != digest.hexdigest():
            raise BadCache(
                f"{folder / name} is damaged: its SHA-256 is {digest.hexdigest()}, {SUMS} says {expected.get(name)}."
            )


def _strategy(text: StrategyText, whose: str) -> Strategy:
    """The strategy of a description, its parameters checked against its annotations; `BadCache`."""
    try:
        strategy = described({"name": text.name, "parameters": text.parameters})
    except BadCache:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise BadCache(f"cannot use the strategy {text.name} of {whose}: {error}") from error
    _check_parameters(strategy, text.name, whose)
    return strategy


def _check_parameters(strategy: Strategy, name: str, whose: str) -> None:
    for field in dataclasses.fields(strategy):  # type: ignore[arg-type]
        value = getattr(strategy, field.name)
        try:
            msgspec.convert(value, typing.get_type_hints(type(strategy))[field.name])
        except msgspec.ValidationError as error:
            raise BadCache(f"cannot use {name}({field.name}={value!r}) of {whose}: {error}.") from error
        except (NameError, TypeError):  # an annotation that can't be resolved or checked; the class's own affair
            continue
        if isinstance(value, Strategy):
            _check_parameters(value, describe(value)["name"], whose)


class _Reader:
    """The open files of one saved cache; gives recipes for its entries.

    Recipes run when a key is first read. They find out first whether the file is still what was opened: memory
    that is mapped from a file which somebody cut short would end the process.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        self.paths = [folder / file.name for file in manifest.files]
        self.facts = []
        self.files = []
        self._tables: dict[int, Columns] = {}
        self._strategies: dict[bytes, Strategy] = {}
        self._tried: set[int] = set()
        for path, file in zip(self.paths, manifest.files, strict=True):
            facts = _regular(path)
            if facts.st_size != file.nbytes:
                raise BadCache(f"{path} is cut short or altered: expected {file.nbytes} bytes, got {facts.st_size}.")
            self.facts.append(_identity(facts))
            try:
                self.files.append(safe_open(path, framework="pt", device="cpu"))
            except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
                raise BadCache(f"{path} is no safetensors file: {error}.") from error
        self.names = [set(file.keys()) for file in self.files]
        for number, table in enumerate(manifest.tables):
            self._check_table(number, table)
        self.groups = [self._check_group(number, group) for number, group in enumerate(manifest.groups)]

    # -- checks that read headers alone

    def _check_stored(self, stored: Stored, whose: str) -> None:
        if stored.file >= len(self.files) or stored.name not in self.names[stored.file]:
            raise BadCache(f"the data of {whose} is missing: no tensor {stored.name!r} in file {stored.file}.")
        found = self.files[stored.file].get_slice(stored.name)
        if stored.header() != (found.get_dtype(), found.get_shape()):
            raise BadCache(
                f"the data of {whose} is not what the manifest says: expected {stored.dtype} {list(stored.shape)} in "
                f"{self.paths[stored.file].name}, got {found.get_dtype()} {found.get_shape()}."
            )

    def _strategy(self, text: StrategyText, whose: str) -> Strategy:
        name = msgspec.json.encode(text)
        if name not in self._strategies:  # thousands of keys share few
            self._strategies[name] = _strategy(text, whose)
        return self._strategies[name]

    def _check_table(self, number: int, table: Table) -> None:
        whose = f"table {number}"
        for stored in table.columns.values():
            self._check_stored(stored, whose)
        needed = {"sample", "position"} if table.indexed else {"sample"}
        if not needed <= table.columns.keys():
            raise BadCache(f"{whose} lacks columns: expected {sorted(needed)}, got {sorted(table.columns)}.")
        for name, stored in table.columns.items():
            kind = stored.dtype if name in needed else "int64"
            if not stored.shape or stored.shape[0] != table.columns["sample"].shape[0] or kind != "int64":
                raise BadCache(f"column {name!r} of {whose} doesn't fit: {stored.dtype} {list(stored.shape)}.")

    def _check_group(self, number: int, group: Group) -> tuple[Fieldwise, torch.dtype]:
        whose = f"group {number} of reductions"
        strategy = self._strategy(group.strategy, whose)
        if not isinstance(strategy, Fieldwise):
            raise BadCache(f"{whose} is of {strategy}, which has no state of fields.")
        for name, stored in group.fields.items():
            self._check_stored(stored, whose)
            try:
                fits = bool(stored.shape) and capacity(strategy, name, stored.shape[1:]) == stored.shape[1:]
            except Exception as error:
                raise BadCache(f"field {name!r} of {whose} doesn't fit {strategy}: {error}") from error
            if not fits:
                raise BadCache(f"field {name!r} of {whose} doesn't fit {strategy}: {list(stored.shape)}.")
        shapes = [stored.shape[1:] for stored in group.fields.values()]
        if isinstance(strategy, Grouped):
            if any(shape[:1] != (strategy.size,) for shape in shapes):
                raise BadCache(f"{whose} doesn't fit {strategy}: its fields have shapes {shapes}.")
            shapes = [shape[1:] for shape in shapes]  # cells meet cell by cell
        numel = sum(map(math.prod, shapes))
        together = math.prod(map(max, itertools.zip_longest(*(shape[::-1] for shape in shapes), fillvalue=1)))
        if together > max(2**24, 100 * numel):  # [n, 1] and [1, n] make n × n when they meet
            raise BadCache(f"{whose} would take {together} elements for the {numel} that are stored.")
        return strategy, codec.dtype_named(group.result)

    # -- reading

    def entry(
        self, entry: Reduced | Concatenated | Scattered | Listed
    ) -> Callable[[], RawEntry | KeptEntry | tuple[Fieldwise, State, torch.dtype]]:
        """A recipe for an entry, which is checked now as far as headers tell."""
        key = entry.key
        if isinstance(entry, Reduced):
            fields = self.manifest.groups[entry.group].fields if entry.group < len(self.groups) else {}
            if not fields or any(entry.row >= stored.shape[0] for stored in fields.values()):
                raise BadCache(f"the state of {key!r} is missing: no row {entry.row} in group {entry.group}.")
            return lambda: self._reduced(entry)
        strategy = None if entry.strategy is None else self._strategy(entry.strategy, repr(key))
        if isinstance(entry, Concatenated):
            self._check_stored(entry.data, repr(key))
            self._check_table_of(entry.table, repr(key), entry.data.shape[:1])
            if not entry.data.shape or not isinstance(strategy, (Rowwise, type(None))):
                raise BadCache(f"{key!r} has rows of {list(entry.data.shape)}, which doesn't fit {strategy}.")
            return lambda: self._concatenated(entry, strategy)
        if isinstance(entry, Scattered):
            self._check_scattered(entry, strategy)
            return lambda: self._scattered(entry, strategy)
        if not isinstance(strategy, (Listwise, type(None))):
            raise BadCache(f"{key!r} has whole values, which doesn't fit {strategy}.")
        for value in entry.values:
            self._check_stored(value.data, repr(key))
            if value.encoded and (value.data.dtype != "uint8" or len(value.data.shape) != 1):
                raise BadCache(f"the encoded bytes of {key!r} are {value.data.dtype} {list(value.data.shape)}.")
            self._check_table_of(value.table, repr(key), value.data.shape[:1] if value.rows else None)
            if value.weight is not None:
                self._check_stored(value.weight, repr(key))
        return lambda: self._listed(entry, strategy)

    def _check_scattered(self, entry: Scattered, strategy: Strategy | None) -> None:
        first, whose = entry.parts[0], repr(entry.key)
        for stored in entry.parts:
            self._check_stored(stored, whose)
            if not stored.shape or (stored.dtype, stored.shape[1:]) != (first.dtype, first.shape[1:]):
                raise BadCache(
                    f"parts of {whose} don't fit: {first.dtype} {first.shape}, {stored.dtype} {stored.shape}."
                )
        rows: tuple[int, ...] = (sum(stored.shape[0] for stored in entry.parts),)
        if entry.order is not None:
            self._check_stored(entry.order, whose)
            rows = entry.order.shape
            if entry.order.dtype != "int64" or len(rows) != 1:
                raise BadCache(f"the order of the rows of {whose} is {entry.order.dtype} {list(rows)}.")
        self._check_table_of(entry.table, whose, rows)
        if not isinstance(strategy, (Rowwise, type(None))):
            raise BadCache(f"{whose} has rows in parts, which doesn't fit {strategy}.")

    def _check_table_of(self, number: int | None, whose: str, rows: tuple[int, ...] | None) -> None:
        if number is None:
            return
        if number >= len(self.manifest.tables):
            raise BadCache(f"the columns of {whose} are missing: there is no table {number}.")
        if rows is not None and self.manifest.tables[number].columns["sample"].shape[:1] != rows:
            raise BadCache(f"table {number} doesn't have one entry for each row of {whose}.")

    def _reduced(self, entry: Reduced) -> tuple[Fieldwise, State, torch.dtype]:
        strategy, result = self.groups[entry.group]
        fields = self.manifest.groups[entry.group].fields
        state = {name: self._tensor(stored, entry.row) for name, stored in fields.items()}
        if entry.group not in self._tried:  # what would go wrong with a forged state goes wrong here, once a group
            trial = ActivationCache()
            trial._entries["trial"] = LazyEntry(lambda: (strategy, state, result))
            self._fits(entry.key, strategy, trial.__getitem__, "trial")
            self._tried.add(entry.group)
        return strategy, state, result

    def _concatenated(self, entry: Concatenated, strategy: Strategy | None) -> RawEntry | KeptEntry:
        return self._rows(entry.key, self._tensor(entry.data), entry.table, strategy)

    def _scattered(self, entry: Scattered, strategy: Strategy | None) -> RawEntry | KeptEntry:
        parts = [self._tensor(stored) for stored in entry.parts]
        if entry.order is None:
            value_n = parts[0] if len(parts) == 1 else torch.cat(parts)
            return self._rows(entry.key, value_n, entry.table, strategy)
        order, start = self._tensor(entry.order), 0
        if len(order) and not 0 <= int(order.min()) <= int(order.max()) < sum(map(len, parts)):
            raise BadCache(f"the order of the rows of {entry.key!r} names rows that aren't there.")
        value_n = parts[0].new_empty((len(order), *parts[0].shape[1:]))
        for part in parts:  # one at a time: all of them beside the result would be twice the memory
            here = ((order >= start) & (order < start + len(part))).nonzero().flatten()
            value_n[here] = part[order[here] - start]
            start += len(part)
        return self._rows(entry.key, value_n, entry.table, strategy)

    def _rows(self, key: str, value_n: Tensor, table: int | None, strategy: Strategy | None) -> RawEntry | KeptEntry:
        columns = self._columns(table)
        if strategy is None:
            return RawEntry([Value(value_n, rows=True, columns=columns)])
        self._fits(key, strategy, strategy.finalize, Rows([Piece(value_n, None)]))
        return KeptEntry.of(key, strategy, Rows([Piece(value_n, columns)]))

    def _listed(self, entry: Listed, strategy: Strategy | None) -> RawEntry | KeptEntry:
        values = []
        for stored in entry.values:
            data: Any = self._tensor(stored.data)
            if stored.encoded:
                data = self._fits(entry.key, strategy, codec.decode, data.numpy().tobytes())
            if stored.weighted:
                data = self._fits(entry.key, strategy, _weighted, data)
            weight = None if stored.weight is None else self._tensor(stored.weight)
            values.append(Value(data, stored.rows, self._columns(stored.table), weight))
        if strategy is None:
            return RawEntry(values)
        self._fits(entry.key, strategy, strategy.finalize, values)
        return KeptEntry.of(entry.key, strategy, values)

    @staticmethod
    def _fits(key: str, strategy: Strategy | None, use: Callable[..., Any], *what: Any) -> Any:
        """What `use` makes of it; `BadCache` where it raises, because what was stored isn't what it says it is."""
        try:
            return use(*what)
        except Exception as error:
            of = "" if strategy is None else f" of {strategy}"
            raise BadCache(f"what is stored of {key!r} is no state{of}: {type(error).__name__}: {error}") from error

    def _columns(self, number: int | None) -> Columns | None:
        """A table's columns: one object for all keys that share them."""
        if number is None:
            return None
        if number not in self._tables:
            table = self.manifest.tables[number]
            by_name = {name: self._tensor(stored) for name, stored in table.columns.items()}
            self._tables[number] = Columns(by_name, table.indexed)
        return self._tables[number]

    def _tensor(self, stored: Stored, row: int | None = None) -> Tensor:
        """A tensor, or one row of it: private memory, mapped from the file until somebody writes to it."""
        path = self.paths[stored.file]
        try:
            found = _identity(path.stat())
        except OSError as error:
            raise BadCache(f"{path} can't be read any more: {error.strerror}. Load the cache again.") from error
        if found != self.facts[stored.file]:
            raise BadCache(f"{path} has been changed since it was loaded: load the cache again.")
        try:
            with torch.inference_mode(False):
                if row is None:
                    raw, shape = self.files[stored.file].get_tensor(stored.name), stored.shape
                else:
                    raw, shape = self.files[stored.file].get_slice(stored.name)[row : row + 1], stored.shape[1:]
                if stored.dtype in _NATIVE:
                    return raw.reshape(shape)
                return codec.from_bytes(raw.reshape(-1), codec.dtype_named(stored.dtype), shape)
        except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
            raise BadCache(f"cannot read tensor {stored.name!r} of {path}: {error}.") from error


def _identity(facts: os.stat_result) -> tuple[int, ...]:
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _weighted(pair: Any) -> Weighted:
    value, weight = pair
    if not isinstance(weight, (int, float, Tensor)):
        raise TypeError(f"a weight is a number or a tensor, got {type(weight).__name__}")
    return Weighted(value, weight)
