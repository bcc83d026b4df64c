"""Pools with a name: an actor, the keeper, holds what was pooled, so that other jobs reach it and its maker may leave.

The keeper counts every contribution once, by its id, and is the only one that changes the content: one thread of it
folds them, one after the other, another saves, and others answer questions meanwhile. It lends the pool's workers to
one collection at a time, and ends those that a silent borrower may still be using, so that no worker serves two.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from distcache.cache import ActivationCache
from distcache.collect import kept_bytes
from distcache.distributed import DistributedCache
from distcache.errors import BadCache, DistcacheError, DuplicateSamples, PeerFailed
from distcache.ledger import IntervalSet, Ledger
from distcache.packed import Packed, pack, unpack
from distcache.pool.actors import own, the_ray
from distcache.pool.crew import Crew, Member, why_of
from distcache.pool.folder import Accepted, Contribution, Folder, now
from distcache.strategies import Columns, Rows

log = logging.getLogger("distcache")

NAMESPACE = "distcache"  # of the actors' names
QUESTIONS, SAVES = "questions", "saves"  # threads of the keeper beside the one that folds
LOAN_S = 60.0  # a borrower of workers that says nothing for so long is taken for dead
BEAT_S = 5.0

_NAME = re.compile(r"[^\s/][^/\n]*")


@dataclass(frozen=True, slots=True)
class Status:
    """How a pool with a name is.

    Args:
        name: the pool's.
        since: when its keeper began, ISO 8601, UTC, as every time here.
        workers: how many are alive.
        collecting: who has them, if somebody collects.
        items_done: of collections, since the keeper began.
        items_under_way: of the collection that goes on, those that aren't done.
        keys: of the content.
        nbytes: of its states and rows.
        contributions: how many the content counts.
        unsaved: how many of them came after the last save.
        lost: those that were accepted and then lost with a keeper that died before it saved. Who contributes one anew,
            by its id, takes it off this list.
        saved: when the content was saved last.
        saved_to: where, for `dc.load`; until the next save.
        error: what went wrong last, and still is: such as a disk that is full.
    """

    name: str
    since: str
    workers: int
    collecting: str | None
    items_done: int
    items_under_way: int
    keys: int
    nbytes: int
    contributions: int
    unsaved: int
    lost: tuple[str, ...]
    saved: str | None
    saved_to: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class Told:
    """What the keeper says beside an answer."""

    lost: tuple[str, ...]
    error: str | None


@dataclass(slots=True)
class Loan:
    """The workers are with a collection."""

    id: str
    who: str
    end_s: float
    done: int = 0
    total: int = 0


class Keeper:
    """Holds the content of a pool with a name. A plain class; `found` makes an actor of it.

    Args:
        name: the pool's.
        born: of this keeper, and of those that Ray restarts in its place.
        made: what `CachePool.connect` makes its pool of.
        save_to: the folder to save to; nothing is saved where it's None.
        save_every_s: how long something new waits for a save at most.
    """

    def __init__(self, name: str, born: str, made: Mapping[str, Any], save_to: str | None, save_every_s: float) -> None:
        self._name, self._born, self._made, self._save_every_s = name, born, made, save_every_s
        self._folder = None if save_to is None else Folder(Path(save_to), name)
        self._since = now()
        self._content = ActivationCache()
        self._book: dict[str, Contribution] = {}
        self._seen = Ledger()  # of all contributions
        self._lost: dict[str, Accepted] = {}
        self._nbytes = self._kept_nbytes = self._unsaved = self._items_done = 0
        self._error: str | None = None
        self._idle: list[str] = []  # workers that are known to be at nothing
        self._loan: Loan | None = None
        self._returned = ""  # the loan before
        self._changing = threading.Lock()  # held while content and book change, so that a save has both as they belong
        self._saving = threading.Lock()
        self._lending = threading.Lock()
        self._closed = threading.Event()
        self._why_not: Exception | None = PeerFailed(
            f"the keeper of the pool {name!r} has not begun"
            if self._folder is None or self._folder.path.exists()
            else f"the keeper of the pool {name!r} was restarted on {socket.gethostname()}, where its folder {save_to} "
            "isn't: give a folder on a file system that the nodes share."
        )
        self._waits = False  # for a folder that another keeper has
        if self._folder is not None and self._folder.knows(born):  # Ray has restarted it, with an empty state
            # Who has the workers is to say so; until then nobody else is lent them.
            who = "a collection that began before the keeper was restarted"
            self._loan = Loan("", who, time.monotonic() + 2 * BEAT_S)
            self._take_up()

    def _take_up(self) -> None:
        """What `open` raises is told to whoever asks; raised here it would end the actor."""
        with self._saving:
            if self._why_not is None:
                return
            try:
                self.open()
            except Exception as error:
                self._why_not = error
                # The keeper before may live on for a while, on a node that Ray has given up.
                self._waits = isinstance(error, DistcacheError) and not isinstance(error, BadCache)

    # -- the content: one thread, so that nothing here waits for anything but the fold before it

    def open(self) -> Told:
        """Take up the folder. What `Folder.open` raises."""
        if self._folder is not None:
            self._content, self._book, self._lost = self._folder.open(self._born)
            for one in self._book.values():
                self._seen.add_all(one.seen)
            self._kept_nbytes = kept_bytes(self._content).total()
            self._nbytes = self._kept_nbytes + _arena_nbytes(self._content)
            saver = threading.Thread(target=self._save_now_and_then, name="distcache-saver", daemon=True)
            saver.start()
        self._content._keeps_lists = True  # plain functions are called by who reads, on everything
        self._why_not = None
        return self._told()

    def contribute(self, id: str, who: str, packed: Packed) -> Told:
        """Fold a packed cache into the content, once for each id; all or nothing. `who` is said in messages.

        Raises:
            DuplicateSamples: a sample is in already, by another contribution, which is named.
            SchemaMismatch: it doesn't fit the content.
            ValueError: the id is another contribution's.
        """
        self._check_open()
        found = unpack(packed, own=False)
        seen = samples_seen(found)
        digest = _digest(found, seen)
        known = self._book.get(id)
        if known is not None:
            if known.digest != digest:
                raise ValueError(
                    f"the id {id!r} is that of another contribution, of {known.who} at {known.when}, with other keys "
                    "or samples: nothing was changed. Give each contribution an id of its own."
                )
            return self._told()
        self._check_new(id, seen)
        one = Contribution(id, who, now(), digest, seen)
        with self._changing:
            self._content._absorb(found)
            self._content._registry.update(found._registry)
            self._book[id] = one
            self._seen.add_all(seen)
            self._lost.pop(id, None)
            self._unsaved += 1
            self._kept_nbytes += kept_bytes(found).total()
            self._nbytes = self._kept_nbytes + _arena_nbytes(self._content)
        if self._folder is not None:
            try:
                self._folder.note(Accepted(id, who, one.when))
            except OSError as error:  # it's in, and may be saved yet
                self._error = (
                    f"{now()}: {id!r} is counted and not in the journal, so that its loss would not be told: {error}"
                )
        return self._told()

    def content(self) -> tuple[Told, Packed]:
        """The content, packed: in the thread that folds, so that nothing changes before it's sent."""
        self._check_open()
        return self._told(), pack(self._content)

    def _check_new(self, id: str, seen: Ledger) -> None:
        """DuplicateSamples, naming who contributed a sample that comes again."""
        if _overlap(seen, self._seen) is None:
            return
        for one in self._book.values():
            twice = _overlap(seen, one.seen)
            if twice is not None:
                key, num_keys, samples = twice
                raise DuplicateSamples(
                    f"{len(samples)} sample(s) of {id!r} would count twice in {num_keys} key(s) such as {key!r}: "
                    f"{samples.words()} came with the contribution {one.id!r} of {one.who} at {one.when}. Nothing was "
                    "changed: contribute what is new alone."
                )
        raise AssertionError("what was seen is in one of the contributions")

    # -- saving: a thread of its own, and whoever asks for it

    def save(self) -> str:
        """Save what isn't saved yet; where the newest save is. What `Folder.save` raises."""
        self._check_open()
        if self._folder is None:
            raise ValueError(
                f"the pool {self._name!r} has no folder: make it with save_to=, or save what cache() gives."
            )
        with self._saving:
            with self._changing:  # rows are shared with the copy, states are not
                content, book, unsaved = copy.copy(self._content), dict(self._book), self._unsaved
            if unsaved or self._folder.newest is None:
                try:
                    self._folder.save(content, book)
                except Exception as error:
                    self._error = f"{now()}: cannot save: {type(error).__name__}: {error}"
                    raise
                with self._changing:
                    self._unsaved -= unsaved
                self._error = None
            return str(self._folder.newest)

    def _save_now_and_then(self) -> None:
        while not self._closed.wait(self._save_every_s):
            if self._unsaved:
                with contextlib.suppress(Exception):  # the status has it; it's tried again
                    self.save()

    def shut_down(self) -> None:
        """Save what isn't saved, and do nothing more. What `save` raises, and it's all as it was then."""
        if self._folder is not None and self._why_not is None:
            if self._unsaved:
                self.save()
            self._folder.close()
        self._closed.set()
        self._why_not = PeerFailed(f"the pool {self._name!r} was shut down at {now()}.")

    # -- questions: several threads, which wait for no fold and no save

    def made(self) -> Mapping[str, Any]:
        """What a pool that connects is made of: see `linked`."""
        return self._made

    def status(self) -> Status:
        """See `Status`."""
        self._check_open()
        loan, folder = self._loan, self._folder
        newest = None if folder is None else folder.newest
        return Status(
            name=self._name,
            since=self._since,
            workers=len(named(f"{self._name}/worker/")),
            collecting=loan.who if loan is not None and loan.id else None,
            items_done=self._items_done + (0 if loan is None else loan.done),
            items_under_way=0 if loan is None else loan.total - loan.done,
            keys=len(self._content),
            nbytes=self._nbytes,
            contributions=len(self._book),
            unsaved=self._unsaved,
            lost=self._told().lost,
            saved=None if folder is None else folder.saved,
            saved_to=None if newest is None else str(newest),
            error=self._error,
        )

    def keys(self) -> list[str]:
        """The content's keys."""
        self._check_open()
        return list(self._content)

    def has(self, id: str) -> bool:
        """Whether the content counts a contribution."""
        self._check_open()
        return id in self._book

    def borrow(self, loan: str, who: str) -> list[str] | str:
        """The names of the workers, which are the borrower's until it gives them back or falls silent; or who has them.
        The same again for a loan that is known.
        """
        self._check_open()
        with self._lending:
            held = self._loan
            if held is not None and held.id != loan and time.monotonic() < held.end_s:
                return held.who
            if held is None or held.id != loan:
                end_workers(self._name, keep=self._idle)  # a silent borrower's, a dead keeper's: nobody may use them
                self._loan = Loan(loan, who, time.monotonic() + LOAN_S)
            return list(self._idle)

    def beat(self, loan: str, who: str, done: int, total: int) -> bool:
        """A borrower is alive and has done so many items of so many. Whether the workers are its still."""
        with self._lending:
            if self._loan is None or not self._loan.id:  # this keeper was restarted, and nobody else has asked
                self._loan = Loan(loan, who, 0.0)
            if self._loan.id != loan:
                return False
            self._loan.end_s, self._loan.done, self._loan.total = time.monotonic() + LOAN_S, done, total
            return True

    def give_back(self, loan: str, workers: Sequence[str]) -> None:
        """The workers, which are at nothing, are back. Those of a loan that has ended are ended too."""
        with self._lending:
            if self._loan is not None and self._loan.id == loan:
                self._items_done += self._loan.done
                self._idle, self._loan, self._returned = list(workers), None, loan
            if loan != self._returned:
                for name in workers:
                    end_actor(name)

    def _told(self) -> Told:
        return Told(tuple(map(str, self._lost.copy().values())), self._error)

    def _check_open(self) -> None:
        if self._waits and not self._closed.is_set():
            self._take_up()
        if self._why_not is not None:
            raise self._why_not


def samples_seen(cache: ActivationCache) -> Ledger:
    """The samples behind a cache, where they carry indices: of reductions, and of rows and values that are kept."""
    seen = cache._ledger.copy()
    by_columns: dict[tuple[int, ...], tuple[list[str], list[Columns]]] = {}
    for key, entry in cache._kept().items():
        held = entry.state.pieces if isinstance(entry.state, Rows) else entry.state
        indexed = [one.columns for one in held if one.columns is not None and one.columns.indexed]
        by_columns.setdefault(tuple(map(id, indexed)), ([], indexed))[0].append(key)
    for keys, columns in by_columns.values():  # which keys share, as a rule
        samples = [one.by_name["sample"] for one in columns]
        seen.add(frozenset(keys), IntervalSet.of(torch.cat(samples)) if samples else IntervalSet())
    return seen


def _overlap(mine: Ledger, theirs: Ledger) -> tuple[str, int, IntervalSet] | None:
    """Samples that both have seen of one key: such a key, how many there are, and the samples."""
    for keys, parts in mine._seen.items():
        for others, more in theirs._seen.items():
            shared = keys & others
            if shared:
                for twice in (part & other for part in parts for other in more):
                    if len(twice):
                        return min(shared), len(shared), twice
    return None


def _digest(cache: ActivationCache, seen: Ledger) -> str:
    """Of keys and samples, not of values: a job that runs again may round otherwise."""
    plain = [sorted(cache), sorted(seen.to_plain()), cache._num_samples]
    return hashlib.blake2b(msgspec.json.encode(plain), digest_size=16).hexdigest()


def _arena_nbytes(cache: ActivationCache) -> int:
    return sum(part.nbytes for segment in cache._arena.segments.values() for part in segment.filled())


# -- names -----------------------------------------------------------------------------------------------------


def lasting(detached: bool) -> dict[str, Any]:
    """Ray's options for an actor with a name that stays when its maker leaves, or doesn't."""
    return {"namespace": NAMESPACE, "lifetime": "detached" if detached else "non_detached"}


def named(prefix: str) -> list[str]:
    """The names of the package's actors that are alive and begin so."""
    ray = the_ray()
    actors = ray.util.list_named_actors(all_namespaces=True)
    return sorted(a["name"] for a in actors if a["namespace"] == NAMESPACE and a["name"].startswith(prefix))


def pools() -> list[str]:
    """The names of the pools on this cluster."""
    return [name.removesuffix("/keeper") for name in named("") if name.endswith("/keeper")]


def end_actor(name: str) -> None:
    ray = the_ray()
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it's gone
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)


def end_workers(pool: str, keep: Iterable[str]) -> None:
    """End the workers of a pool, but for some."""
    for name in set(named(f"{pool}/worker/")).difference(keep):
        end_actor(name)


# -- the other side --------------------------------------------------------------------------------------------


class Link:
    """A process's way to the keeper of a pool.

    Args:
        timeout_s: how long an answer may take; contributions wait for those before them.
    """

    def __init__(
        self, name: str, handle: Any, timeout_s: float, detached: bool = False, save_to: str | None = None
    ) -> None:
        self._ray = the_ray()
        self.name, self.timeout_s, self.detached = name, timeout_s, detached
        self._handle, self._save_to = handle, save_to
        self._warned: set[str] = set()

    @property
    def who(self) -> str:
        """This process, in words."""
        job = self._ray.get_runtime_context().get_job_id()
        return f"job {job} (process {os.getpid()} on {socket.gethostname()})"

    def ask(self, method: str, *args: Any, group: str | None = None) -> Any:
        """The keeper's answer; it's asked again where Ray restarts it meanwhile, so all it's asked may be asked twice.

        What the keeper raises; PeerFailed where it's dead, or has not answered in time.
        """
        exceptions = self._ray.exceptions
        end_s = time.monotonic() + self.timeout_s
        while True:
            try:
                call = getattr(self._handle, method)
                call = call if group is None else call.options(concurrency_group=group)
                return self._ray.get(call.remote(*args), timeout=max(0.0, end_s - time.monotonic()))
            except exceptions.RayTaskError as error:
                raise error.cause from error
            except exceptions.ActorUnavailableError as error:
                if time.monotonic() > end_s:
                    raise self._failed(f"could not be reached for {self.timeout_s:g} s", error) from error
                time.sleep(0.2)
            except exceptions.GetTimeoutError as error:
                raise self._failed(f"has not answered {method}() in {self.timeout_s:g} s", error) from error
            except exceptions.RayError as error:
                raise self._failed("is dead, or was shut down", error) from error

    def heed(self, told: Told) -> None:
        """Say, once, what the keeper says that somebody should know."""
        lost = [one for one in told.lost if one not in self._warned]
        self._warned.update(lost)
        if lost:
            log.warning(
                "distcache: %d contribution(s) to the pool %r were accepted and are lost, because its keeper died "
                "before it saved them: %s%s. They can be contributed again, by the same id.",
                len(lost), self.name, "; ".join(lost[:8]), "; …" if len(lost) > 8 else "",
            )  # fmt: skip
        if told.error is not None and told.error not in self._warned:
            self._warned.add(told.error)
            log.warning("distcache: the pool %r: %s", self.name, told.error)

    def end(self) -> None:
        """End the workers, and the keeper as it is, and wait until its name is free."""
        end_workers(self.name, keep=())
        self._ray.kill(self._handle, no_restart=True)
        end_s = time.monotonic() + self.timeout_s
        while named(f"{self.name}/keeper") and time.monotonic() < end_s:
            time.sleep(0.05)

    def _failed(self, what: str, error: Exception) -> PeerFailed:
        if self._save_to is None:
            advice = "It saved nothing (save_to=None), so where it's dead its content is lost"
        else:
            advice = (
                f"CachePool(…, name={self.name!r}, save_to={self._save_to!r}) takes up what it saved, and its status "
                "tells what is lost"
            )
        return PeerFailed(f"the keeper of the pool {self.name!r} {what} ({why_of(error)}). {advice}.")


def found(
    name: str, made: Mapping[str, Any], detached: bool, save_to: str | os.PathLike[str] | None, save_every_s: float
) -> Link:
    """Make the keeper of a new pool, which takes up the folder if there is something in it.

    Raises ValueError for a name that is taken, or is none, and what `Folder.open` raises.
    """
    ray = the_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not _NAME.fullmatch(name):
        raise ValueError(f"a pool's name is a word or several, without '/', got {name!r}.")
    if save_every_s <= 0:
        raise ValueError(f"save_every_s is more than 0, got {save_every_s}.")
    path = None if save_to is None else str(Path(save_to).absolute())
    options = {
        "name": f"{name}/keeper",
        **lasting(detached),
        "num_cpus": 0,
        # One that Ray restarts is empty: it's restarted where there is a folder to take up.
        "max_restarts": 0 if path is None else -1,
        "max_task_retries": 0,
        # Here, where the folder is, if it isn't shared; elsewhere if this node has gone.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    }
    kind = ray.remote(concurrency_groups={QUESTIONS: 4, SAVES: 1})(Keeper)
    of_link: dict[str, Any] = {"detached": detached, "save_to": path}
    try:
        handle = kind.options(**options).remote(name, uuid.uuid4().hex, {**made, "link": of_link}, path, save_every_s)
    except ValueError as error:  # Ray's own kind of it, in versions that have one
        if not named(f"{name}/keeper"):
            raise
        raise ValueError(
            f"there is a pool {name!r} on this cluster already: CachePool.connect({name!r}) joins it, its shutdown() "
            "ends it, or choose another name."
        ) from error
    link = Link(name, handle, made["timeout_s"], **of_link)
    try:
        link.heed(link.ask("open"))
    except BaseException:
        link.end()
        raise
    return link


def linked(name: str, timeout_s: float) -> tuple[Link, Mapping[str, Any]]:
    """The way to a pool that is there, and what it was made of. LookupError, with the names that there are."""
    ray = the_ray()
    try:
        handle = ray.get_actor(f"{name}/keeper", namespace=NAMESPACE)
    except ValueError:
        there = ", ".join(map(repr, pools())) or "none"
        raise LookupError(f"there is no pool {name!r} on this cluster; the pools are: {there}.") from None
    made = dict(Link(name, handle, timeout_s).ask("made", group=QUESTIONS))
    return Link(name, handle, timeout_s, **made.pop("link")), made


class Staff(Crew):
    """The workers of a pool with a name: borrowed for as long as somebody collects, and kept by nobody in between."""

    def __init__(self, link: Link, make: Callable[..., Any], *args: Any) -> None:
        super().__init__(self._made, *args)
        self._link, self._make_named = link, make
        self._handles: list[Any] = []  # or Ray would end workers that aren't detached between collections
        self._loan = ""
        self._names: dict[int, str] = {}
        self._failure: Exception | None = None

    @contextlib.contextmanager
    def borrowed(self, progress: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> Iterator[None]:
        """In this block the workers are this process's. `progress`: items that are done, and all of them.

        TimeoutError if another has them all the time; what `Link.ask` raises.
        """
        self._loan, self._failure = uuid.uuid4().hex, None
        for name in self._free_workers():
            with contextlib.suppress(ValueError):  # it has died in between
                self.members.append(Member(self._number, self._ray.get_actor(name, namespace=NAMESPACE)))
                self._names[self._number] = name
                self._number += 1
        stop = threading.Event()
        beating = threading.Thread(target=self._beat, args=(stop, progress), name="distcache-loan", daemon=True)
        beating.start()
        try:
            yield
        finally:
            try:
                for member in self._starting:
                    self._kill(member)
                while any(member.asked for member in self.members):  # amid an item, whose answer nobody wants
                    self.wait()
                self._link.ask("beat", self._loan, self._link.who, *progress(), group=QUESTIONS)
                names = [self._names[member.number] for member in self.members]
                self._link.ask("give_back", self._loan, names, group=QUESTIONS)
            except BaseException:  # nobody may use them any more
                for member in self.members:
                    self._kill(member)
                raise
            finally:
                stop.set()
                beating.join()
                self.members, self._starting, self._names = [], [], {}

    def keep_up(self, wanted: int) -> None:
        if self._failure is not None:
            raise self._failure
        super().keep_up(wanted)

    def _free_workers(self) -> list[str]:
        end_s, told = time.monotonic() + self._link.timeout_s, False
        while True:
            found = self._link.ask("borrow", self._loan, self._link.who, group=QUESTIONS)
            if not isinstance(found, str):
                return found
            if time.monotonic() > end_s:
                raise TimeoutError(
                    f"the workers of the pool {self._link.name!r} have been with {found} for "
                    f"{self._link.timeout_s:g} s: wait until it has collected, or make a pool of your own and "
                    "contribute what it gives."
                )
            if not told:
                log.info("distcache: waiting for the workers of %r, which are with %s", self._link.name, found)
            told = True
            time.sleep(0.5)

    def _beat(self, stop: threading.Event, progress: Callable[[], tuple[int, int]]) -> None:
        while not stop.wait(BEAT_S):
            try:
                if not self._link.ask("beat", self._loan, self._link.who, *progress(), group=QUESTIONS):
                    self._failure = PeerFailed(
                        f"this process said nothing to the pool {self._link.name!r} for {LOAN_S:g} s, and its workers "
                        "went to another: nothing was pooled."
                    )
                    return
            except Exception as error:
                self._failure = error
                return

    def _made(self) -> Any:
        """A worker with a name."""
        name = f"{self._link.name}/worker/{self._loan[:12]}-{self._number}"
        self._names[self._number] = name
        self._handles.append(self._make_named(name=name, **lasting(self._link.detached)))
        return self._handles[-1]


class Service:
    """What a pool with a name can do, whoever holds it; its part of `CachePool`. RuntimeError for one without."""

    _link: Link | None

    def contribute(
        self, cache: ActivationCache, index: Iterable[int] | Tensor | None = None, *, id: str | None = None
    ) -> str:
        """Fold a cache into the pool's content, whole or not at all, and once; returns the contribution's id.

        Keys are a union. `index`: the samples' numbers in the data set, one each, for a cache that has none; without
        numbers contributions come in the order in which they arrive.

        Args:
            cache: an ActivationCache of this process; it stays as it is.
            id: by which the contribution is known; a new one by default. Who isn't sure whether a contribution was
                counted, as after PeerFailed, gives the same id and cache again: it counts once. A job that may run
                again gives ids of its own, such as "shard 3".

        Raises:
            DuplicateSamples: a sample is in by another contribution already, which is named.
            SchemaMismatch: it doesn't fit what is there.
            BadCache: it has a strategy or a function that the keeper can't import: what the module of the model factory
                registers, it knows.
            ValueError: the id is another contribution's.
            PeerFailed: the keeper is dead or silent; the message has the id.
        """
        link = self._linked("contribute")
        if isinstance(cache, DistributedCache) or not isinstance(cache, ActivationCache):
            raise TypeError(
                f"contribute expects an ActivationCache, got {type(cache).__name__}. What a cluster has merged, one "
                "process contributes: cache.save(path) on all, contribute(dc.load(path)) on one."
            )
        part = cache._collecting()
        part._absorb(cache, index=index)
        id = uuid.uuid4().hex if id is None else id
        packed = the_ray().put(pack(part))
        try:
            link.heed(link.ask("contribute", id, link.who, packed))
        except PeerFailed as error:
            raise PeerFailed(
                f"{error} Whether the contribution {id!r} is counted isn't known: has({id!r}) tells."
            ) from error
        return id

    def cache(self) -> ActivationCache:
        """The pool's content as it is now, a copy in this process's memory."""
        link = self._linked("cache")
        told, packed = link.ask("content")
        link.heed(told)
        content = own(packed)
        content._call_functions()
        content._keeps_lists = False
        return content

    def keys(self) -> list[str]:
        """The keys of the pool's content."""
        return self._linked("keys").ask("keys", group=QUESTIONS)

    def has(self, id: str) -> bool:
        """Whether the content counts a contribution: False also for one that was accepted and lost."""
        return self._linked("has").ask("has", id, group=QUESTIONS)

    def status(self) -> Status:
        """How the pool is, at any time: no fold and no save holds it up."""
        link = self._linked("status")
        status = link.ask("status", group=QUESTIONS)
        link.heed(Told(status.lost, status.error))
        return status

    def save(self) -> str:
        """Save the content now, to a folder in `save_to`, which `dc.load` reads until the next save; returns its path.

        ValueError for a pool without `save_to`, OSError as the disk reports it.
        """
        return self._linked("save").ask("save", group=SAVES)

    def shutdown(self) -> None:
        """Save what isn't saved, then end the pool, for everybody. What `save` raises, and the pool stays then.

        Of a keeper that could not take up its folder there is nothing to save.
        """
        link = self._linked("shutdown")
        link.ask("shut_down")
        link.end()

    def _linked(self, what: str) -> Link:
        if self._link is None:
            raise RuntimeError(f"{what}() is of pools with a name: CachePool(…, name=…), CachePool.connect(name).")
        return self._link
