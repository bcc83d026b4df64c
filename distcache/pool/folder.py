"""A pool's folder: numbered saves, of which the newest counts, and a journal of what was accepted.

    attn/
      00000007/        the newest save, as `cache.save` writes it, with the contributions behind it in its manifest
      journal.jsonl    a line for each contribution that was accepted, locked by the one keeper that writes here

A save is published by one rename, content and contributions together, and only then is the one before removed:
whatever is killed or full when, the newest that is there is whole. The journal is synced before an acceptance is told,
so what it names and the newest save doesn't is known to be lost.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from distcache.cache import ActivationCache
from distcache.errors import BadCache, DistcacheError
from distcache.ledger import Ledger
from distcache.store import Int64, Size, load, read_manifest
from distcache.strategies import Function

JOURNAL = "journal.jsonl"
LOCK_WAIT_S = 10.0  # a keeper that was killed a moment ago may not be gone yet

_SAVE = re.compile(r"[0-9]{8}")
_DRAFT = re.compile(r"\.[0-9]{8}\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True, slots=True)
class Contribution:
    """What was folded into a pool's content at once.

    Args:
        id: by which a retry is known.
        who: the job and process that it came from.
        when: ISO 8601, UTC.
        digest: of keys and samples, so that another contribution of the same id is known from a retry.
        seen: its samples, where they carry indices: of reductions and of rows.
    """

    id: str
    who: str
    when: str
    digest: str
    seen: Ledger


class Accepted(Struct, frozen=True, forbid_unknown_fields=True, tag="accepted", tag_field="what"):
    """A line of the journal: a contribution is in the content."""

    id: str
    who: str
    when: str

    def __str__(self) -> str:
        return f"{self.id!r} of {self.who} at {self.when}"


class Begun(Struct, frozen=True, forbid_unknown_fields=True, tag="begun", tag_field="what"):
    """A line of the journal: a keeper has begun. `born` names it, and those that Ray restarts in its place."""

    pool: str
    born: str


class _Counted(Struct, frozen=True, forbid_unknown_fields=True):
    """A contribution in a manifest; `seen`: numbers of sets of keys, and samples as bounds of intervals."""

    id: str
    who: str
    when: str
    digest: str
    seen: list[tuple[Size, list[Int64]]]


class _Book(Struct, frozen=True, forbid_unknown_fields=True):
    """The contributions behind a save. Sets of keys, of which there are few, are named by number."""

    keys: list[list[str]]
    contributions: list[_Counted]


def now() -> str:
    """ISO 8601, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


_LINE = msgspec.json.Decoder(Accepted | Begun)


class Folder:
    """The folder of one pool, for its keeper. Made by `open`, which takes the lock."""

    def __init__(self, path: Path, pool: str) -> None:
        self.path, self._pool = path, pool
        self._journal: Any = None
        self._number = 0  # of the newest save
        self.saved: str | None = None  # when that was

    def knows(self, born: str) -> bool:
        """Whether a keeper of this name has begun here before."""
        with contextlib.suppress(FileNotFoundError, BadCache):
            return any(isinstance(line, Begun) and line.born == born for line in self._lines())
        return False

    def open(self, born: str) -> tuple[ActivationCache, dict[str, Contribution], dict[str, Accepted]]:
        """Take the folder: the content of its newest save, in memory of its own, the contributions behind it, and those
        that were accepted and aren't; all empty of a folder without a save.

        Raises:
            ValueError: it's the folder of another pool.
            DistcacheError: another keeper writes here.
            BadCache: the newest save, or the journal, is damaged.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            lines = self._lines()
            for line in lines:
                if isinstance(line, Begun) and line.pool != self._pool:
                    raise ValueError(
                        f"{self.path} is the folder of the pool {line.pool!r}, not of {self._pool!r}: give each pool a "
                        "folder of its own."
                    )
            found = sorted(int(entry.name) for entry in self.path.iterdir() if _SAVE.fullmatch(entry.name))
            content, book = ActivationCache(), dict[str, Contribution]()
            if found:
                self._number = found[-1]
                content, book = self._loaded(self._place(found[-1]))
            for number in found[:-1]:
                self._remove(number)
            for entry in self.path.iterdir():  # of a keeper that was killed as it saved
                if _DRAFT.fullmatch(entry.name):
                    shutil.rmtree(entry, ignore_errors=True)
            self._write(Begun(self._pool, born))
        except BaseException:
            self.close()
            raise
        accepted = {line.id: line for line in lines if isinstance(line, Accepted)}
        return content, book, {name: line for name, line in accepted.items() if name not in book}

    @property
    def newest(self) -> Path | None:
        """The newest save."""
        return self._place(self._number) if self._number else None

    def note(self, line: Accepted) -> None:
        """Write down, to the disk, that a contribution was accepted. OSError."""
        self._write(line)

    def save(self, content: ActivationCache, book: Mapping[str, Contribution]) -> Path:
        """Save content and contributions as the newest, and remove what was it before. What `ActivationCache.save`
        raises; the save before is as it was then.
        """
        target = self._place(self._number + 1)
        content.save(target, pool=self._pool, contributions=_as_text(book))
        self._number, self.saved = self._number + 1, now()
        self._remove(self._number - 1)
        return target

    def close(self) -> None:
        """Give the lock back."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    # -- inside

    def _place(self, number: int) -> Path:
        return self.path / f"{number:08d}"

    def _loaded(self, path: Path) -> tuple[ActivationCache, dict[str, Contribution]]:
        manifest = read_manifest(path)
        info, self.saved = manifest.info, manifest.created
        if info.get("pool") != self._pool:
            raise ValueError(
                f"{path} is a save of the pool {info.get('pool')!r}, not of {self._pool!r}: give each pool a folder of "
                "its own."
            )
        content = copy.deepcopy(load(path, verify=True))  # its own memory, as the files are removed some day
        # A plain function is a line of text in a file; whoever contributes to its keys brings it along.
        content._registry = {p: s for p, s in content._registry.items() if not isinstance(s, Function)}
        return content, _from_text(info.get("contributions", ""), path)

    def _remove(self, number: int) -> None:
        """Remove a save, which is none from the first moment on."""
        draft = self.path / f".{number:08d}.{secrets.token_hex(4)}.tmp"
        with contextlib.suppress(OSError):  # as the first has none before it; what stays is removed by the next keeper
            self._place(number).rename(draft)
        shutil.rmtree(draft, ignore_errors=True)

    def _lock(self) -> None:
        """Open the journal, and lock it as long as this process lives."""
        import fcntl

        self._journal = open(self.path / JOURNAL, "ab", buffering=0)  # noqa: SIM115  it stays open
        end_s = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return  # a file system without locks
                if time.monotonic() > end_s:
                    self.close()
                    raise DistcacheError(
                        f"{self.path} is in use: the keeper of another pool writes there. Give each pool a folder of "
                        "its own, or shut the other one down: CachePool.connect(name).shutdown()."
                    ) from None
            time.sleep(0.1)

    def _lines(self) -> list[Accepted | Begun]:
        """The journal's lines. A last one that was cut short was never told to anybody, and isn't there."""
        path = self.path / JOURNAL
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn and self._journal is not None:
            os.truncate(path, path.stat().st_size - len(torn))
        try:
            return [_LINE.decode(line) for line in whole.splitlines()]
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadCache(f"{path} is damaged: {error}. Set it aside to go on with the newest save alone.") from error

    def _write(self, line: Accepted | Begun) -> None:
        assert self._journal is not None, "open() comes first"
        number = self._journal.fileno()
        before, text = os.fstat(number).st_size, msgspec.json.encode(line) + b"\n"
        try:
            if os.write(number, text) < len(text):
                raise OSError(errno.ENOSPC, "cannot write a whole line", str(self.path / JOURNAL))
            os.fsync(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(number, before)  # or what is written next would stand in the same line
            raise


def _as_text(book: Mapping[str, Contribution]) -> str:
    keys: dict[tuple[str, ...], int] = {}
    counted = [
        _Counted(
            c.id, c.who, c.when, c.digest, [(keys.setdefault(tuple(k), len(keys)), b) for k, b in c.seen.to_plain()]
        )
        for c in book.values()
    ]
    return msgspec.json.encode(_Book([list(names) for names in keys], counted)).decode()


def _from_text(text: str, whose: Path) -> dict[str, Contribution]:
    try:
        book = msgspec.json.decode(text, type=_Book)
        return {
            c.id: Contribution(
                c.id, c.who, c.when, c.digest, Ledger.from_plain((book.keys[number], flat) for number, flat in c.seen)
            )
            for c in book.contributions
        }
    except (msgspec.DecodeError, IndexError, BadCache) as error:
        raise BadCache(f"cannot read which contributions are in {whose}: {error}.") from error
