"""CachePool: who does which item, what to do when somebody dies, and the fold of what all have collected.

What is behind which state is a ledger of items. An item is to do, or being worked on, or behind the state of one actor,
or behind one object that an actor has handed over, and it moves from one to the other only when an answer says so;
whatever is lost, the items behind it are to do again. So a result has every item once, or there is none.
"""

from __future__ import annotations

import functools
import logging
import operator
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import nn

from distcache import errors
from distcache.cache import ActivationCache
from distcache.collect import Samples, check_foreseen, check_samples, showing
from distcache.errors import DistcacheError, PeerFailed
from distcache.ledger import IntervalSet
from distcache.packed import Packed
from distcache.pool.actors import FOLDED_HERE, Handed, Holder, ModelFactory, Worker, fold_all, options, the_ray
from distcache.pool.crew import Crew, Member, why_of
from distcache.pool.ranks import THREADS, Group
from distcache.pool.service import Link, Service, Staff, found, linked
from distcache.pool.work import Failure, Job, Receipt, State
from distcache.sites import Sites
from distcache.strategies import Function

log = logging.getLogger("distcache")

# A state of 200 MB kept its actor from work for up to 0.3 s, and another process for 0.4 s to fold it (2 busy cores):
# at five minutes 1 GB costs half a per cent, and a dead actor five minutes of its own work at most.
HAND_OVER_S = 300.0


class CachePool(Service):
    """Actors on a Ray cluster that collect what one process would collect, each sample once. Close it, or use `with`.

    Joins the cluster that `ray.init()` finds, if this process hasn't joined one. No two threads at once.

    Args:
        model_factory: called in each actor: gives the model, in evaluation mode and on the device that it is to run on,
            or (model, collate). Ray pickles it.
        sites: see `distcache.record`; what `collect` takes where it's given none.
        num_actors: how many, or (low, high): then it starts with `low` and grows up to `high` while there is work and
            the cluster has room.
        num_ranks: with more than one, each of these is a group of so many actors, which do each item together, as the
            ranks of a process group of their own.
        resources: what each actor needs, {"CPU": 1, "GPU": 1, "memory": bytes, "any name": 1}; one CPU by default.
        retries: how often an item is tried again that raised or killed its actor, on another actor if there is one.
        timeout_s: how long an actor may be silent, making its model or at one item, before it's taken for dead.
        hand_over_s: how often an actor hands over its state, so that its death costs no more than that.
        name: of a pool that other jobs can `connect` to. What is collected and contributed is kept by an actor of its
            own, the keeper; see `Service`.
        detached: the pool stays when its maker leaves, until somebody calls `shutdown`.
        save_to: a folder to which the keeper saves what is pooled, and takes it up from where there is something: on
            a file system that the nodes share, or it's lost with the node.
        save_every_s: how long something new waits to be saved; what a keeper that dies hadn't saved is lost, and told.

    PeerFailed if the actors aren't there in `timeout_s` or a model can't be made; ImportError without Ray; ValueError
    for a name that is taken, or the folder of another pool.
    """

    def __init__(
        self,
        model_factory: ModelFactory,
        sites: Sites | None = None,
        *,
        num_actors: int | tuple[int, int] = 2,
        num_ranks: int = 1,
        resources: Mapping[str, float] | None = None,
        retries: int = 3,
        timeout_s: float = 600.0,
        hand_over_s: float = HAND_OVER_S,
        name: str | None = None,
        detached: bool = False,
        save_to: str | PathLike[str] | None = None,
        save_every_s: float = 600.0,
    ) -> None:
        low, high = (num_actors, num_actors) if isinstance(num_actors, int) else num_actors
        if not 1 <= low <= high:
            raise ValueError(f"num_actors is at least 1, or (low, high) of that order, got {num_actors!r}.")
        if retries < 0 or timeout_s <= 0 or hand_over_s < 0 or num_ranks < 1:
            raise ValueError(
                "expected retries >= 0, timeout_s > 0, hand_over_s >= 0 and num_ranks >= 1, got "
                f"{retries}, {timeout_s}, {hand_over_s} and {num_ranks}."
            )
        if name is None and (detached or save_to is not None):
            raise ValueError("detached= and save_to= are of pools with a name: give name=.")
        resources = {"CPU": 1.0} if resources is None else dict(resources)
        made: dict[str, Any] = {
            "model_factory": model_factory, "sites": sites, "num_actors": (low, high), "num_ranks": num_ranks,
            "resources": resources, "retries": retries, "timeout_s": timeout_s, "hand_over_s": hand_over_s,
        }  # fmt: skip
        self._set_up(None if name is None else found(name, made, detached, save_to, save_every_s), **made)
        self._made_here = True
        try:
            with self._staffed():
                self._crew.assemble()
        except BaseException:
            self._give_up()
            raise

    def _set_up(
        self,
        link: Link | None,
        model_factory: ModelFactory,
        sites: Sites | None,
        num_actors: tuple[int, int],
        num_ranks: int,
        resources: Mapping[str, float],
        retries: int,
        timeout_s: float,
        hand_over_s: float,
    ) -> None:
        self._sites, self._retries, self._timeout_s, self._hand_over_s = sites, retries, timeout_s, hand_over_s
        self._link, self._made_here, self._num_ranks = link, False, num_ranks
        ray = the_ray()

        def make(**named: Any) -> Any:
            if num_ranks == 1:
                return ray.remote(Worker).options(**options(resources), **named).remote(model_factory)
            group = ray.remote(concurrency_groups=THREADS)(Group).options(**options({}), **named)
            return group.remote(model_factory, num_ranks, resources, timeout_s)

        needs = {name: amount * num_ranks for name, amount in resources.items()}
        of_crew = (make, needs, *num_actors, timeout_s, retries)
        self._crew = Crew(*of_crew) if link is None else Staff(link, *of_crew)

    @classmethod
    def connect(cls, name: str, *, timeout_s: float = 120.0) -> CachePool:
        """The pool of this name on the cluster, made by this job or another: it collects, contributes and reads.

        `timeout_s`: how long its keeper may take to answer, and the workers to be free; a contribution waits for those
        before it. LookupError, with the names that there are; PeerFailed if its keeper is silent.
        """
        link, made = linked(name, timeout_s)
        pool = cls.__new__(cls)
        pool._set_up(link, **made)
        return pool

    def collect(
        self,
        data: Samples | Callable[[], Samples],
        sites: Sites | None = None,
        *,
        batch_size: int,
        collate: Callable[[list[Any]], Any] | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        columns: Sequence[str] = (),
        cache: ActivationCache | None = None,
        progress: bool = True,
    ) -> ActivationCache:
        """Run the actors' models over a data set and return what they showed, on the CPU, as `dc.collect` does.

        Batches are those of `dc.collect`, so that their bits are the same for any number of actors. Concatenations come
        out in the samples' order. Who dies is replaced, and what only he had is done again.

        Args:
            data: samples by number, put into Ray's object store once; or a function that gives them, called in each
                actor.
            sites, batch_size, collate, forward, columns: see `dc.collect`.
            cache: fold the result into this cache, by its registrations; by default into a new one. It changes only
                when all is done. In a pool with a name the result is contributed, too, behind that.
            progress: whether to say how many samples the whole pool has done.

        Raises what `record` raises for sites that can't be; PeerFailed for an item that raised, or killed its actor,
        `retries` + 1 times, and where no actor is left; `TooLarge` after the first batch if the rows that are kept
        would not fit here. The pool can be used again after each of these.
        """
        if not callable(data) or hasattr(data, "__getitem__"):
            check_samples(data, batch_size)
        sites = self._sites if sites is None else sites
        if sites is None:
            raise ValueError("give sites, to CachePool(…) or to collect(…).")
        cache = ActivationCache() if cache is None else cache
        if not isinstance(cache, ActivationCache):
            raise TypeError(f"cache is an ActivationCache, got {type(cache).__name__}.")
        registry = tuple(cache._registry.items())
        for _, strategy in registry:
            if isinstance(strategy, Function):
                strategy.check_importable()
        job = Job(sites, batch_size * self._num_ranks, collate, forward, tuple(columns), registry)  # a batch for each
        collection = _Collection(self._crew, job, self._retries, self._timeout_s, self._hand_over_s)
        with self._staffed(collection.progress):
            try:
                found = collection.run(data, progress)
            finally:
                collection.close()
        cache._receiving._absorb(found)
        if self._link is not None:
            self.contribute(found)
        return cache

    def close(self) -> None:
        """End the actors; a pool with a name ends only where this process made it and it isn't detached. It may be
        called again.
        """
        ends = self._link is not None and self._made_here and not self._link.detached
        self._made_here = False
        if ends:
            self.shutdown()
        self._crew.close()

    def _staffed(self, progress: Callable[[], tuple[int, int]] = lambda: (0, 0)) -> AbstractContextManager[None]:
        """A block in which the crew's members are there, and this process's."""
        return self._crew.borrowed(progress) if isinstance(self._crew, Staff) else nullcontext()

    def _give_up(self) -> None:
        """End a pool that could not be made."""
        self._crew.close()
        if self._link is not None:
            self._link.end()

    def __enter__(self) -> CachePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(eq=False, slots=True)
class Part:
    """A state that was handed over: an object that this process owns, which outlives the actor that made it."""

    items: tuple[int, ...]
    nbytes: int
    ref: Any
    held: bool = False  # by this node


@dataclass(eq=False, slots=True)
class Share:
    """What one actor has of a collection."""

    working: list[int] = field(default_factory=list)  # asked for, not answered yet
    own: set[int] = field(default_factory=set)  # behind its state, and behind nothing else
    absorbed: list[Part] = field(default_factory=list)  # behind its state, and kept until that is handed over
    handed_s: float = field(default_factory=time.monotonic)


class _Collection:
    """One `collect`: the ledger of its items."""

    def __init__(self, crew: Crew, job: Job, retries: int, timeout_s: float, hand_over_s: float) -> None:
        self._ray = the_ray()
        self._crew, self._job = crew, job
        self._retries, self._timeout_s, self._hand_over_s = retries, timeout_s, hand_over_s
        self._shares: dict[Member, Share] = {}  # of actors that have begun
        self._begun: set[Member] = set()  # those, and those that were asked to
        self._num_samples: int | None = None
        self._todo: deque[int] = deque()
        self._tries: Counter[int] = Counter()
        self._failed_on: defaultdict[int, set[Member]] = defaultdict(set)
        self._silent: set[int] = set()  # done, and nothing to count
        self._suspects: set[int] = set()  # one of those that an actor died at, which isn't known: each is done alone
        self._parts: list[Part] = []
        self._holder: Member | None = None
        self._holders = 0  # that there have been
        self._folding: list[Part] = []  # what the holder is at, in no other list
        self._foreseen = False
        self._trouble = 0  # folds that failed, and actors that could not begin where others could
        self._done = 0  # samples
        crew.lost = self._lost

    def run(self, data: Any, progress: bool) -> ActivationCache:
        self._data = self._ray.put(data)
        self._put_job = self._ray.put(self._job)
        while self._num_samples is None:
            self._turn()
        if self._num_samples == 0:
            return ActivationCache()
        self._todo.extend(range(self._job.num_items(self._num_samples)))
        if not progress:
            return self._to_the_end()
        with showing(lambda: self._done, self._num_samples):
            return self._to_the_end()

    def _to_the_end(self) -> ActivationCache:
        while True:
            while self._todo or self._folding or any(share.working for share in self._shares.values()):
                self._turn()
            found = self._pooled() if self._shares else None
            if found is not None:
                return found
            if self._shares:
                self._trouble += 1
            if self._trouble > self._retries:
                raise PeerFailed(f"the fold failed {self._trouble} times: actors or nodes die in it, see the warnings.")
            self._turn()

    def progress(self) -> tuple[int, int]:
        """Items that are done, and all of them; from any thread."""
        total = 0 if self._num_samples is None else self._job.num_items(self._num_samples)
        left = len(self._todo) + sum(len(share.working) for share in list(self._shares.values()))
        return max(0, total - left), total

    def close(self) -> None:
        """Leave the actors in order: their states are forgotten behind what they are at."""
        self._crew.lost = lambda member, why, item: None
        for member in self._crew.members:
            member.asked.clear()
            if member in self._begun:
                self._crew.ask(member, lambda _: None, "end")
        self._drop_holder()

    # -- the items ---------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Give out what can be given out, and deal with the next answers."""
        self._crew.keep_up(len(self._todo))
        for member in self._crew.members:
            if member not in self._begun:
                self._begun.add(member)
                self._crew.ask(member, partial(self._began, member), "begin", self._put_job, self._data)
        # One more than it works on, so that no actor waits for this process; but at the end nobody hoards.
        for depth in (1, 2) if len(self._todo) > len(self._shares) else (1,):
            for member, share in self._shares.items():
                if len(share.working) < depth and (item := self._next_for(member, share)) is not None:
                    share.working.append(item)
                    self._crew.ask(member, partial(self._worked, member, item), "work", item, item=item)
        self._hold()
        self._crew.wait(*([] if self._holder is None else [self._holder]))

    def _next_for(self, member: Member, share: Share) -> int | None:
        """An item for an actor: not one that failed there, as long as there is another actor."""
        if not self._suspects.isdisjoint(share.working):
            return None
        for item in self._todo:
            if share.working and item in self._suspects:
                continue
            if member not in self._failed_on[item] or self._failed_on[item].issuperset(self._shares):
                self._todo.remove(item)
                return item
        return None

    def _began(self, member: Member, found: int | Failure) -> None:
        if isinstance(found, Failure):
            self._trouble += 1
            if not self._shares or self._trouble > self._retries:
                raise as_error(found, f"{member} can't begin: ")
            self._crew.dismiss(member, f"it can't begin: {found}")
            return
        if self._num_samples not in (None, found):
            raise PeerFailed(
                f"{member} has {found} samples where others have {self._num_samples}: what gives the data must give "
                "the same in every actor."
            )
        self._num_samples = found
        self._shares[member] = Share()

    def _worked(self, member: Member, item: int, receipt: Receipt) -> None:
        share = self._shares[member]
        share.working.remove(item)
        if receipt.failure is not None:
            self._again([i for i in receipt.spoiled if i != item])
            share.own.difference_update(receipt.spoiled)
            self._failed_on[item].add(member)
            self._blame(item, f"raised in {member}: {receipt.failure}", receipt.failure.trace)
            self._todo.appendleft(item)
            return
        (share.own if receipt.counted else self._silent).add(item)
        self._done += len(self._samples(item))
        if receipt.kept_nbytes and not self._foreseen:
            self._foreseen = True
            self._foresee(receipt.kept_nbytes / len(self._samples(item)))
        if share.own and time.monotonic() - share.handed_s >= self._hand_over_s:
            share.handed_s = time.monotonic()
            self._have_handed_over(member)

    def _blame(self, item: int, what: str, trace: str = "") -> None:
        """An item didn't come to its end. PeerFailed where that was its last try."""
        self._tries[item] += 1
        samples = self._samples(item)
        words = f"item {item} (samples {samples.start}..{samples.stop - 1}) {what}"
        if self._tries[item] > self._retries:
            raise PeerFailed(f"{words}. It was tried {self._tries[item]} times, and nothing was pooled.\n{trace}")
        log.warning("%s; it is tried again.", words)

    def _again(self, items: Iterable[int]) -> None:
        """Items that were done are to do once more."""
        for item in items:
            self._todo.append(item)
            self._done -= len(self._samples(item))

    def _lost(self, member: Member, why: str, item: int | None) -> None:
        """An actor is dead, and its state with it."""
        self._begun.discard(member)
        share = self._shares.pop(member, None)
        if share is None:
            return
        self._todo.extendleft(share.working)
        self._again(share.own)
        self._parts.extend(share.absorbed)
        for each in share.working:
            self._failed_on[each].add(member)
        if item is not None and len(share.working) == 1:
            self._blame(item, f"was what {member} died at: {why}")
        else:  # the answer to the first of them may have died with the actor, at the second
            self._suspects.update(share.working)

    def _samples(self, item: int) -> range:
        assert self._num_samples is not None
        return self._job.samples(item, self._num_samples)

    def _foresee(self, nbytes_a_sample: float) -> None:
        """The rows come here: once in Ray's object store, once as the result."""
        assert self._num_samples is not None
        check_foreseen(2 * nbytes_a_sample * self._num_samples, torch.device("cpu"), self._num_samples)

    # -- the states --------------------------------------------------------------------------------------------

    def _have_handed_over(self, member: Member, then: Callable[[Part], None] = lambda part: None) -> None:
        """Have an actor hand over its state, which becomes a part; from then on it has nothing."""

        def answered(handed: Handed | Failure) -> None:
            if isinstance(handed, Failure):
                raise as_error(handed, f"{member} can't hand over its state: ")
            share = self._shares[member]
            known = [*share.own, *(item for part in share.absorbed for item in part.items)]
            if sorted(handed.items) != sorted(known):
                raise DistcacheError(
                    f"{member} has handed over a state of the items {sorted(handed.items)}, where {sorted(known)} are "
                    "known to be behind it: nothing was pooled."
                )
            share.own, share.absorbed = set(), []
            if handed.items:
                self._parts.append(Part(handed.items, handed.nbytes, ref))
                then(self._parts[-1])

        (ref,) = self._crew.ask(member, answered, "hand_over", num_returns=2)

    def _hold(self) -> None:
        """Have new parts brought to this node, where they last as long as this process, and folded on the way.

        Those that are there are folded with them as long as they aren't twice as large. So parts shrink by half or more
        from one to the next, as in a binary counter: states whose size doesn't grow are one, and rows are copied log n
        times at most.
        """
        new = [part for part in self._parts if not part.held]
        busy = self._holder is not None and self._holder.asked
        if busy or not new or self._holders > self._retries:
            return
        held = sorted((part for part in self._parts if part.held), key=lambda part: -part.nbytes)
        while held and held[-1].nbytes < 2 * sum(part.nbytes for part in new):
            new.insert(0, held.pop())
        if self._holder is None:
            self._holder = self._crew.hire(Holder)
            self._holders += 1
        self._folding, self._parts = new, held

        def answered(found: int | Failure) -> None:
            if isinstance(found, Failure):
                raise as_error(found, "states don't fit together: ")
            items = tuple(item for part in self._folding for item in part.items)
            self._parts.append(Part(items, found, ref, held=True))
            self._folding = []

        refs = [part.ref for part in new]
        (ref,) = self._crew.ask(self._holder, answered, "fold", *refs, failed=self._not_held, num_returns=2)

    def _not_held(self, error: Exception) -> None:
        """The holder, or what it was to fold, is gone: of each part it's found out whether it is."""
        parts, self._folding = self._folding, []
        self._parts.extend(parts)
        log.warning("states that were handed over could not be folded: %s", why_of(error))
        if self._is_dead(error):
            self._drop_holder()
            return
        holder = self._holder
        assert holder is not None
        for part in parts:
            self._crew.ask(holder, lambda _: None, "reach", part.ref, failed=partial(self._not_reached, part))

    def _not_reached(self, part: Part, error: Exception) -> None:
        if self._is_dead(error):
            self._drop_holder()
        elif part in self._parts:
            self._lose(part, error)

    def _drop_holder(self) -> None:
        if self._holder is not None:
            self._crew.fire(self._holder)
            self._holder = None

    def _lose(self, part: Part, error: Exception) -> None:
        log.warning("a state of %d items is lost (%s); they are done again.", len(part.items), why_of(error))
        self._parts.remove(part)
        self._again(part.items)

    def _is_dead(self, error: Exception) -> bool:
        """Whether an error says that who was asked is gone, and not what it was given."""
        return isinstance(error, (self._ray.exceptions.RayActorError, TimeoutError))

    def _have_absorbed(self, member: Member, part: Part) -> None:
        """Have an actor fold a part into its state. The part is kept until that state is handed over in its turn."""

        def answered(failure: Failure | None) -> None:
            if failure is not None:
                raise as_error(failure, "states don't fit together: ")
            self._parts.remove(part)
            self._shares[member].absorbed.append(part)

        def failed(error: Exception) -> None:
            if self._is_dead(error):
                self._crew.dismiss(member, why_of(error))
            else:
                self._lose(part, error)

        self._crew.ask(member, answered, "absorb", part.items, part.ref, failed=failed)

    def _pooled(self) -> ActivationCache | None:
        """Everything as one state, folded actor to actor in a tree, the last few here. None if something got lost:
        there are items to do again then, or parts to fold again.
        """
        self._answered()
        holding = self._holding()
        while len(holding) + len(self._parts) > FOLDED_HERE and not self._todo:
            if self._parts:
                takers = holding or [*self._shares]
                for number, part in enumerate(list(self._parts)):
                    self._have_absorbed(takers[number % len(takers)], part)
            else:
                for mine, theirs in zip(holding[::2], holding[1::2], strict=False):
                    self._have_handed_over(theirs, partial(self._have_absorbed, mine))
            self._answered()
            if not self._shares:
                return None
            holding = self._holding()
        for member in holding:
            self._have_handed_over(member)
        self._answered()
        if self._todo or self._holding():
            return None
        found: list[Packed] = []
        for part in list(self._parts):
            try:
                found.append(self._ray.get(part.ref, timeout=self._timeout_s))
            except self._ray.exceptions.RayError as error:
                self._lose(part, error)
        if self._todo:
            return None
        return self._result(fold_all(found) if found else State(), [i for part in self._parts for i in part.items])

    def _holding(self) -> list[Member]:
        """Who has something behind its state."""
        return [member for member, share in self._shares.items() if share.own or share.absorbed]

    def _result(self, found: ActivationCache, items: Sequence[int]) -> ActivationCache:
        assert self._num_samples is not None
        wanted = set(range(self._job.num_items(self._num_samples))) - self._silent
        checked(found, items, self._job, wanted, self._num_samples)
        found._call_functions()
        return found

    def _answered(self) -> None:
        """Wait until everybody has answered."""
        while any(member.asked for member in self._shares):
            self._crew.wait()


def checked(found: ActivationCache, items: Sequence[int], job: Job, wanted: set[int], num_samples: int) -> None:
    """DistcacheError unless a result is of every wanted item once, by what its states say of themselves: the items that
    came with them, and the samples in the ledger of its reductions.
    """
    twice = sorted(item for item, times in Counter(items).items() if times > 1)
    lacking, foreign = sorted(wanted.difference(items)), sorted(set(items) - wanted)
    if twice or lacking or foreign:
        raise DistcacheError(
            f"the pool's result is wrong, and is not returned: of {len(wanted)} items it lacks {lacking[:9]}, "
            f"counts {twice[:9]} twice, and has {foreign[:9]} that it should not have. Please report this."
        )
    bounds = [np.asarray(flat, dtype=np.int64).reshape(-1, 2) for _, flat in found._ledger.to_plain()]
    seen = functools.reduce(operator.or_, map(IntervalSet, bounds), IntervalSet())
    counted = IntervalSet.of(sample for item in wanted for sample in job.samples(item, num_samples))
    if len(seen | counted) > len(counted) or (len(found._arena) and not job.optional and seen != counted):
        raise DistcacheError(
            f"the pool's result is wrong, and is not returned: its reductions have seen the samples {seen.words()}, "
            f"where it is of {counted.words()}. Please report this."
        )


def as_error(failure: Failure, words: str) -> Exception:
    """What happened in an actor as an error here: of the same kind where it's one of ours, or Python's for a caller's
    mistake; else PeerFailed.
    """
    kind = getattr(errors, failure.kind, None) or {"TypeError": TypeError, "ValueError": ValueError}.get(failure.kind)
    if kind is None:
        return PeerFailed(f"{words}{failure}\n{failure.trace}")
    return kind(f"{words}{failure.message}")
