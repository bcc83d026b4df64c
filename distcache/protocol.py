"""How ranks begin and end one attempt together, in the store: arrive, vote, give up.

Every attempt has a number that all ranks count alike, and one decision, made by one compare-and-set: to commit, or to
abort with the rank at fault and its message. Whoever fails before the decision makes it; whoever waits looks for it.
Waiting happens here, in the store, and never in a collective.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from distcache.comm import CommFailed, Communicator, Poll, StoreLost
from distcache.errors import DistcacheError, DuplicateSamples, MergeAborted, MergeInDoubt, PeerFailed, SchemaMismatch

log = logging.getLogger("distcache")

COMMIT = b'{"commit":true}'

# A call to the store takes a tenth of a millisecond, and a small merge two or three milliseconds in all.
SHORTEST_NAP_S = 0.00005
TELLING_S = 0.01  # whoever waits for longer tells who it is


# -- an attempt and its end ------------------------------------------------------------------------------------


class Decided(Exception):
    """This attempt has been ended, by another rank or this one."""

    def __init__(self, decision: bytes) -> None:
        self.decision = decision


def decision_key(number: int) -> str:
    return f"{number}/decision"


def describe_error(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {str(error) or repr(error)}"


def as_error(decision: bytes, comm: Communicator, again: str = "merge") -> DistcacheError:
    """The exception that a decision to abort means for this rank. `again`: the call that can be repeated."""
    found = json.loads(decision)["abort"]
    rank, message = found["rank"], found["message"]
    if found["kind"] in _ALIKE:
        return _ALIKE[found["kind"]](message)
    message = message.rstrip(".")
    kept = f"Content and delta of this rank are as they were; once every rank is there, cache.{again}() tries again."
    if rank == comm.rank:
        return MergeAborted(f"given up by the cluster, because this rank {message}. {kept}")
    return PeerFailed(f"{comm.name(rank)} {message}. {kept}")


# Ranks disagree: every rank raises this, with the same text, whichever finds it first.
_ALIKE = {"SchemaMismatch": SchemaMismatch, "DuplicateSamples": DuplicateSamples}


@contextmanager
def attempt(comm: Communicator, number: int, again: str = "merge") -> Iterator[None]:
    """One attempt at something collective: whatever ends it here is decided for everybody."""
    try:
        yield
    except Decided as ended:
        raise as_error(ended.decision, comm, again) from None
    except StoreLost as error:
        seen = comm.heart.decision if comm.heart is not None else None
        if seen not in (None, COMMIT):
            raise as_error(seen, comm, again) from error
        raise MergeAborted(
            f"this rank lost the store before its vote, so nothing has changed anywhere: {error}. "
            f"cache.rejoin() connects anew, then cache.{again}() tries again."
        ) from error
    except MergeInDoubt:
        raise
    except CommFailed as error:
        raise as_error(_blame(comm, number, error), comm, again) from error
    except (SchemaMismatch, DuplicateSamples) as error:
        decision = leave_attempt(comm, number, comm.rank, str(error), type(error).__name__)
        raise as_error(decision, comm, again) from error
    except BaseException as error:
        decision = leave_attempt(comm, number, comm.rank, describe_error(error))
        first = json.loads(decision).get("abort", {}).get("rank") == comm.rank
        if first or not isinstance(error, DistcacheError):
            raise
        raise as_error(decision, comm, again) from error


@contextmanager
def moving(comm: Communicator) -> Iterator[None]:
    """Where collectives are made. Whoever fails here leaves groups on which ranks may be out of step for good: one
    has sent what another never received. So they are spent, for everybody (`arrive`).
    """
    try:
        yield
    except BaseException:
        comm.broken = True
        raise


def abort_record(rank: int, message: str, kind: str = "") -> bytes:
    """`rank`: whose fault it is. `kind`: of the error, where every rank raises the same."""
    abort = {"rank": rank, "message": message[:20_000], "kind": kind}
    return json.dumps({"abort": abort}, separators=(",", ":")).encode()


def end_attempt(comm: Communicator, number: int, rank: int, message: str) -> bytes:
    """End an attempt for everybody; the decision that stands, which is another where one was made before."""
    return comm.store.decide(decision_key(number), abort_record(rank, message))


def leave_attempt(comm: Communicator, number: int, rank: int, message: str, kind: str = "") -> bytes:
    """As `end_attempt`, for a rank that has not voted: what it says holds for itself, though the store be lost."""
    record = abort_record(rank, message, kind)
    try:
        return comm.store.decide(decision_key(number), record)
    except StoreLost:
        return record


def _blame(comm: Communicator, number: int, error: CommFailed) -> bytes:
    """The decision after a collective has failed: it names the peer whose heart has stopped, if one has."""
    heart = comm.heart
    assert heart is not None  # alone, no collective fails
    limit_s = 3.5 * heart.interval_s
    deadline = time.monotonic() + 1.5 * limit_s
    watch = _Watch(comm, lambda: _peers(comm), limit_s / 4)
    try:
        while True:
            decision = comm.store.get(decision_key(number))
            if decision is not None:
                return decision
            silent_s, rank = max(((heart.silent_s(rank), rank) for rank in watch.due()), default=(0.0, -1))
            if silent_s > limit_s:
                return end_attempt(comm, number, rank, "was lost in the middle of the merge")
            if time.monotonic() > deadline:
                break
            time.sleep(heart.interval_s / 4)
    except StoreLost:
        pass
    return leave_attempt(comm, number, comm.rank, f"lost touch with its peers in the middle of the merge ({error})")


class _Watch:
    """Whose heart to look at now: a few ranks at a time, each once a round, so that a look costs the store little.

    Up to 16 ranks are looked at every time. `whom`: the ranks that matter, asked for once a round. `longest_s`: of a
    round; the limits on silence that callers keep are four times that.
    """

    def __init__(self, comm: Communicator, whom: Callable[[], list[int]], longest_s: float) -> None:
        assert comm.heart is not None
        self._whom, self._look_s = whom, comm.heart.interval_s / 2
        self._round_s = min(longest_s, self._look_s * comm.world_size / 16)
        self._ranks: list[int] = []
        self._done = 0
        self._started = -math.inf

    def due(self) -> list[int]:
        now = time.monotonic()
        if self._done == len(self._ranks) and now - self._started >= self._round_s - self._look_s:
            self._ranks, self._done, self._started = self._whom(), 0, now
        passed = (now - self._started + self._look_s) / self._round_s
        stop = min(len(self._ranks), math.ceil(passed * len(self._ranks)))
        ranks, self._done = self._ranks[self._done : stop], max(self._done, stop)
        return ranks


def _peers(comm: Communicator) -> list[int]:
    """The other ranks, beginning with the next: not all look at the same one at the same time."""
    return [*range(comm.rank + 1, comm.world_size), *range(comm.rank)]


# -- arrive ----------------------------------------------------------------------------------------------------

_SPENT, _SAVING = 1 << 20, 1 << 40  # in the count of arrivals: whose groups are spent, who came to save
_BITS = 62  # ranks a counter of the store can tell apart


def _missing(comm: Communicator, place: str) -> list[int]:
    """The ranks that have not come, beginning with the next."""
    here = [comm.store.add(f"{place}/here/{i}", 0) for i in range(-(-comm.world_size // _BITS))]
    return [rank for rank in _peers(comm) if not here[rank // _BITS] >> rank % _BITS & 1]


def arrive(comm: Communicator, number: int, wait_s: float, what: str, stage: str = "") -> None:
    """Wait in the store, never in a collective, until every rank has come; then no rank waits for work.

    A peer that is alive is waited for up to `wait_s`; one that is silent for `comm.timeout_s` is given up.
    `what`: "merge" or "save"; `SchemaMismatch` on every rank where they differ. `stage`: of an attempt in which ranks
    work in between, another than the first; `leave_stage` once all have come.
    """
    store, heart, everyone = comm.store, comm.heart, comm.world_size
    if heart is None:
        return
    place = f"{number}{stage}"
    heart.watch(decision_key(number))
    # With the count all learn, at no further cost, whether groups must be made anew and whether all want the same. It
    # comes first, and who came is told only by those who wait: a rank that is lost in between is counted or missing,
    # and never neither.
    count = store.add(f"{place}/count", 1 + _SPENT * comm.broken + _SAVING * (what == "save"))
    started = looked = time.monotonic()
    nap_s, named, told = SHORTEST_NAP_S, set[int](), False
    longest_nap_s = 0.05 * max(1.0, everyone / 256)
    watch = _Watch(comm, lambda: _missing(comm, place), comm.timeout_s / 4)
    while count % _SPENT < everyone:
        time.sleep(nap_s)
        nap_s = min(nap_s * 1.3, longest_nap_s)
        count = store.add(f"{place}/count", 0)
        now = time.monotonic()
        if not told and now - started > TELLING_S:
            store.add(f"{place}/here/{comm.rank // _BITS}", 1 << comm.rank % _BITS)
            told = True
        if now - looked < heart.interval_s / 2 or count % _SPENT == everyone:
            continue
        looked = now
        check_decision(comm, number)
        for rank in watch.due():
            silent_s = heart.silent_s(rank)
            if silent_s > comm.timeout_s:
                gone = "has left" if silent_s == float("inf") else f"was silent for {comm.timeout_s:g} s"
                raise Decided(end_attempt(comm, number, rank, f"{gone} while others waited to {what}"))
            if silent_s > comm.timeout_s / 2 and rank not in named:
                named.add(rank)
                log.warning("rank %d waits for %s, silent for %.0f s", comm.rank, comm.name(rank), silent_s)
        if now - started > wait_s and (missing := _missing(comm, place)):
            raise Decided(end_attempt(comm, number, min(missing), f"is alive but did not come within {wait_s=:g}"))
    if what == "save":  # in a merge, a decision that was made before this rank came is seen while ranks agree
        check_decision(comm, number)
    if comm.rank == 0 and number > 0 and not stage:
        # Everybody has come here, so nobody looks at the last attempt any more.
        for key in ("count", "votes", "decision", *_here(comm)):
            store.delete(f"{number - 1}/{key}")
    saving = count // _SAVING
    if saving not in (0, everyone):
        raise SchemaMismatch(
            f"{saving} of {everyone} ranks came to save, the others to merge: collectives must be called in one order "
            "on every rank. Nothing has changed."
        )
    if count % _SAVING >= _SPENT:
        comm.rebuild(str(number))


def leave_stage(comm: Communicator, number: int, stage: str) -> None:
    """Forget a stage of an attempt, on one rank, once all have passed it."""
    for key in ("count", *_here(comm)):
        comm.store.delete(f"{number}{stage}/{key}")


def _here(comm: Communicator) -> list[str]:
    return [f"here/{i}" for i in range(-(-comm.world_size // _BITS))]


def check_decision(comm: Communicator, number: int) -> None:
    found = comm.store.get(decision_key(number))
    if found is not None and found != COMMIT:
        raise Decided(found)


def poll_decision(comm: Communicator) -> Poll:
    """A look at what the heart has seen: no call to the store."""

    def poll() -> None:
        decision = comm.heart.decision if comm.heart is not None else None
        if decision is not None and decision != COMMIT:
            raise Decided(decision)

    return poll


def tell_all(comm: Communicator, blob: bytes) -> list[bytes]:
    """Every rank's bytes, of a length that only it knows: a collective."""
    poll = poll_decision(comm)
    sizes = [row[0] for row in comm.gather([len(blob)], poll)]
    return comm.gather_bytes(blob, sizes, poll)


# -- decide ----------------------------------------------------------------------------------------------------------


def vote(comm: Communicator, number: int, let_through: Poll) -> bytes:
    """This rank's yes; the decision, which the last vote makes, or whoever finds that a rank is lost."""
    store, heart, key = comm.store, comm.heart, decision_key(number)
    if heart is None:
        return COMMIT
    votes = store.add(f"{number}/votes", 1)
    started = progress = looked = time.monotonic()
    nap_s, longest_nap_s, told = SHORTEST_NAP_S, 0.02 * max(1.0, comm.world_size / 256), False
    watch = _Watch(comm, lambda: _peers(comm), comm.timeout_s / 4)
    while votes < comm.world_size:
        found = store.get(key)
        if found is not None:
            return found
        time.sleep(nap_s)
        nap_s = min(nap_s * 1.3, longest_nap_s)
        let_through()
        now = time.monotonic()
        if not told and now - started > TELLING_S:  # whom to blame matters to those who wait for long
            store.set(f"voted/{comm.rank}", str(number).encode())
            told = True
        if now - looked < heart.interval_s / 2:
            continue
        looked = now
        seen = store.add(f"{number}/votes", 0)
        if seen > votes:
            votes, progress = seen, now
        for rank in watch.due():
            if heart.silent_s(rank) > comm.timeout_s:
                return end_attempt(comm, number, rank, f"was silent for {comm.timeout_s:g} s while others voted")
        if now - progress > comm.timeout_s:
            late = [r for r in range(comm.world_size) if store.get(f"voted/{r}") != str(number).encode()]
            blamed = (late or [comm.rank])[0]
            return end_attempt(comm, number, blamed, f"had not voted {comm.timeout_s:g} s after the last vote")
    # Whoever sees the last vote may decide: its rank may have died since.
    return store.decide(key, COMMIT)


def announce(comm: Communicator, number: int) -> None:
    """Tell everybody that this rank has done what all others wait for in `learn`."""
    decision = comm.store.decide(decision_key(number), COMMIT)
    if decision != COMMIT:
        raise Decided(decision)


def learn(comm: Communicator, number: int, rank: int) -> None:
    """Wait until `rank` has done it, for as long as it's alive."""
    heart = comm.heart
    assert heart is not None
    while (decision := comm.store.get(decision_key(number))) is None:
        time.sleep(heart.interval_s / 10)
        if heart.silent_s(rank) > comm.timeout_s:
            decision = end_attempt(comm, number, rank, f"was silent for {comm.timeout_s:g} s")
            break
    if decision != COMMIT:
        raise Decided(decision)
