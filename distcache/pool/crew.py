"""The actors of a pool as they come and go: who is there, what each was asked, and who died or fell silent.

Each actor answers in the order in which it was asked, so only the oldest question of each is waited for, and answers
are dealt with in that order too.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from distcache.errors import PeerFailed
from distcache.pool.actors import options, the_ray
from distcache.pool.work import Failure

log = logging.getLogger("distcache")

GROW_EVERY_S = 1.0  # between looks at what the cluster has free


class Asked(NamedTuple):
    """A question: its answer to be, what is done with it, and what if there is none (None: the actor is dead then)."""

    ref: Any
    answered: Callable[[Any], None]
    failed: Callable[[Exception], None] | None
    item: int | None


@dataclass(eq=False, slots=True)
class Member:
    """An actor, and what it has been asked and hasn't answered."""

    number: int
    handle: Any
    asked: deque[Asked] = field(default_factory=deque)
    heard_s: float = 0.0  # when it last answered, or was asked something with nothing else to do

    def __str__(self) -> str:
        return f"actor {self.number}"


class Crew:
    """Actors of one kind, `low` of them at least and `high` at most. Who dies is replaced.

    Args:
        make: makes an actor with the methods of `Worker`.
        needs: what one takes of the cluster, {"CPU": 1, …}.
        timeout_s: an actor that has been asked something and says nothing for so long is ended and taken for dead.
        retries: how many actors in a row may die or fail before they have made their model.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        needs: Mapping[str, float],
        low: int,
        high: int,
        timeout_s: float,
        retries: int,
    ) -> None:
        self._ray = the_ray()
        self._make, self._needs = make, dict(needs)
        self._low, self._high, self._timeout_s, self._retries = low, high, timeout_s, retries
        self.members: list[Member] = []  # that have their model
        # Called with a member that is gone, behind its last answer, why, and the item that it was at.
        self.lost: Callable[[Member, str, int | None], None] = lambda member, why, item: None
        self._starting: list[Member] = []
        self._number = self._failed = 0
        self._closed = False
        self._alone_s = self._looked_s = time.monotonic()

    def assemble(self) -> None:
        """Wait for the least number of actors. PeerFailed if they aren't there in time, or a model can't be made."""
        end_s = time.monotonic() + self._timeout_s
        while len(self.members) < self._low:
            self.keep_up(0)
            if time.monotonic() > end_s:
                raise self._unplaced()
            self.wait()

    def keep_up(self, wanted: int) -> None:
        """Replace who is missing; start another where `wanted` actors more would have work and the cluster has room.

        PeerFailed if nobody is left and nobody comes.
        """
        if self._closed:
            raise RuntimeError("the pool is closed: make a new one.")
        now_s = time.monotonic()
        if self.members or not self._starting:
            self._alone_s = now_s
        elif now_s - self._alone_s > self._timeout_s:
            raise self._unplaced()
        while len(self.members) + len(self._starting) < self._low:
            self._start()
        there = len(self.members) + len(self._starting)
        if wanted > 0 and there < self._high and not self._starting and now_s - self._looked_s > GROW_EVERY_S:
            self._looked_s = now_s
            free = self._ray.available_resources()
            if all(free.get(name, 0) >= amount for name, amount in self._needs.items()):
                self._start()

    def ask(
        self,
        member: Member,
        answered: Callable[[Any], None],
        method: str,
        *args: Any,
        failed: Callable[[Exception], None] | None = None,
        item: int | None = None,
        num_returns: int = 1,
    ) -> list[Any]:
        """Call a method of an actor. `answered` is given the answer, or the first of `num_returns` of them; the others,
        as refs, are returned.

        Args:
            failed: what to do if there is no answer; by default the actor is taken for dead.
            item: what the actor works on, to answer this.
        """
        found = getattr(member.handle, method).options(num_returns=num_returns).remote(*args)
        first, *rest = found if num_returns > 1 else [found]
        if not member.asked:
            member.heard_s = time.monotonic()
        member.asked.append(Asked(first, answered, failed, item))
        return rest

    def wait(self, *others: Member) -> None:
        """Wait for answers, a second at most, and deal with those that have come; also with those of `others`."""
        everyone = [m for m in (*self.members, *self._starting, *others) if m.asked]
        if not everyone:
            time.sleep(0.1)
            return
        heads = {member.asked[0].ref: member for member in everyone}
        ready, _ = self._ray.wait(list(heads), num_returns=1, timeout=1.0)
        if ready:  # and whoever else has answered meanwhile
            ready, _ = self._ray.wait(list(heads), num_returns=len(heads), timeout=0)
        for ref in ready:
            member = heads[ref]
            if member.asked and member.asked[0].ref is ref:  # not dismissed by what another's answer has brought
                self._deal_with(member)
        now_s = time.monotonic()
        for member in everyone:
            starts = member in self._starting  # it may wait for a place, which `keep_up` looks after
            if member.asked and not starts and now_s - member.heard_s > self._timeout_s:
                error = TimeoutError(f"it has said nothing for {self._timeout_s:g} s")
                self._unanswered(member, member.asked.popleft(), error)

    def _deal_with(self, member: Member) -> None:
        asked = member.asked.popleft()
        member.heard_s = time.monotonic()
        answer, failed = None, None
        try:
            answer = self._ray.get(asked.ref, timeout=self._timeout_s)
        except Exception as error:
            failed = error
        if failed is None:
            asked.answered(answer)
        else:
            self._unanswered(member, asked, failed)

    def _unanswered(self, member: Member, asked: Asked, error: Exception) -> None:
        if asked.failed is not None:
            asked.failed(error)
        else:
            unmade = getattr(error, "actor_init_failed", False)  # what it was given can't be unpickled there
            self.dismiss(member, why_of(error), asked.item, at_once=unmade)

    def dismiss(self, member: Member, why: str, item: int | None = None, at_once: bool = False) -> None:
        """Take an actor for dead: end it, so that whatever it does still can't be taken for another's, and say so."""
        self._kill(member)
        member.asked.clear()
        if member in self._starting:
            self._starting.remove(member)
            self._count_failed(f"{member} died before it had made its model: {why}", at_once)
        elif member in self.members:
            self.members.remove(member)
            log.warning("%s is gone (%s); what only it had is done again.", member, why)
            self.lost(member, why, item)

    def hire(self, kind: type) -> Member:
        """An actor of another kind, that needs nothing, on this process's own node if there is room."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=True)
        handle = self._ray.remote(kind).options(**options({}), scheduling_strategy=here).remote()
        return Member(-1, handle)

    def fire(self, member: Member) -> None:
        """End an actor that was hired."""
        member.asked.clear()
        self._kill(member)

    def close(self) -> None:
        """End every actor."""
        self._closed = True
        for member in (*self.members, *self._starting):
            self._kill(member)
        self.members, self._starting = [], []

    def _kill(self, member: Member) -> None:
        with contextlib.suppress(Exception):  # dead already, or the cluster is
            self._ray.kill(member.handle, no_restart=True)

    def _start(self) -> None:
        member = Member(self._number, self._make())
        self._number += 1
        self._starting.append(member)
        self.ask(member, lambda failure: self._started(member, failure), "start")

    def _started(self, member: Member, failure: Failure | None) -> None:
        self._starting.remove(member)
        if failure is None:
            self._failed = 0
            self.members.append(member)
            return
        self._kill(member)
        self._count_failed(f"the model factory raised in {member}: {failure}\n{failure.trace}", at_once=True)

    def _count_failed(self, words: str, at_once: bool) -> None:
        """A few may fail, where others have made it; `at_once`: unless one has, it's the caller's mistake."""
        self._failed += 1
        if self._failed > self._retries or (at_once and not self.members):
            raise PeerFailed(words)
        log.warning("%s", words)

    def _unplaced(self) -> PeerFailed:
        total, free = self._ray.cluster_resources(), self._ray.available_resources()
        shown = {name: f"{free.get(name, 0):g} of {total.get(name, 0):g} free" for name in self._needs}
        return PeerFailed(
            f"{len(self.members)} of at least {self._low} actors were there after {self._timeout_s:g} s. Each needs "
            f"{self._needs}; the cluster has {shown}. Ask for fewer actors or resources, add nodes, or give models "
            "that load slowly more time: timeout_s=…."
        )


def why_of(error: Exception) -> str:
    """An error of Ray's in a line."""
    words = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {words[-1] if words else ''}"[:300]
