"""pool_caches: the caches of anybody's actors as one, folded actor to actor in a tree.

What is done in the actors is done by functions that Ray runs there, so that an actor needs nothing of ours but a method
that returns a cache. What it returned is kept in the actor's process until the fold has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from distcache.cache import ActivationCache
from distcache.errors import DuplicateSamples, PeerFailed
from distcache.ledger import Ledger
from distcache.packed import Packed, pack
from distcache.pool.actors import FOLDED_HERE, fold, own, the_ray
from distcache.pool.crew import why_of
from distcache.pool.driver import as_error
from distcache.pool.work import Failure

_numbers = count()


def pool_caches(actors: Sequence[Any], method: str = "cache", *, timeout_s: float = 600.0) -> ActivationCache:
    """The caches of Ray actors as one, on the CPU of this process: states are combined by their strategies, keys are a
    union, and values without an index come in the actors' order.

    The actors' own caches stay as they are. Plain functions are called once, here, on the values of all.

    Args:
        actors: of any class, each with
        method: that returns an `ActivationCache`; it's called once.
        timeout_s: a limit for each step: the method, and each of the log2(actors) steps of the fold.

    Raises:
        PeerFailed: an actor is dead, silent, or raised.
        DuplicateSamples: two actors have seen one sample, in a reduction.
        SchemaMismatch: states of two actors don't fit.
        TypeError: what the method returns is no ActivationCache.
    """
    ray = the_ray()
    actors = list(actors)
    if not actors:
        raise ValueError("pool_caches expects one actor at least, got none.")
    names = [f"actor {number} of {len(actors)} [{actor!r}]" for number, actor in enumerate(actors)]
    token = f"{ray.get_runtime_context().get_job_id()}/{ray.get_runtime_context().get_worker_id()}/{next(_numbers)}"

    def call(number: int, function: Any, *args: Any, num_returns: int = 1) -> Any:
        return actors[number].__ray_call__.options(num_returns=num_returns).remote(function, token, *args)

    def answer(number: int, ref: Any, doing: str) -> Any:
        try:
            found = ray.get(ref, timeout=timeout_s)
        except Exception as error:
            raise PeerFailed(f"{names[number]} failed {doing}: {why_of(error)}") from error
        if isinstance(found, Failure):
            raise as_error(found, f"{names[number]} failed {doing}: ")
        return found

    try:
        asked = [call(number, _begin, method) for number in range(len(actors))]
        shown = [answer(number, ref, f"at {method}()") for number, ref in enumerate(asked)]
        _check_apart([Ledger.from_plain(ledger) for ledger in shown], names)
        holding = list(range(len(actors)))
        while len(holding) > FOLDED_HERE:
            step = []
            for mine, theirs in zip(holding[::2], holding[1::2], strict=False):
                said, packed = call(theirs, _hand_over, num_returns=2)
                step.append((mine, theirs, said, call(mine, _absorb, said, packed)))
            for mine, theirs, said, absorbed in step:
                answer(theirs, said, "to hand over its cache")
                answer(mine, absorbed, f"to take in the cache of {names[theirs]}")
            holding = holding[::2]
        handed = [(number, *call(number, _hand_over, num_returns=2)) for number in holding]
        result: ActivationCache | None = None
        for number, said, ref in handed:
            answer(number, said, "to hand over its cache")
            packed = answer(number, ref, "to hand over its cache")
            if result is None:
                result = own(packed)
                continue
            try:
                fold(result, packed)
            except Exception as error:
                words = f"the cache of {names[number]} doesn't fit those of the actors before it: "
                raise as_error(Failure.of(error), words) from error
        assert result is not None
    finally:
        for number in range(len(actors)):
            call(number, _forget)
    result._call_functions()
    result._keeps_lists = False
    return result


def _check_apart(ledgers: Sequence[Ledger], names: Sequence[str]) -> None:
    """DuplicateSamples, with the names of two, if they have seen one sample."""
    everyone = Ledger()
    for number, ledger in enumerate(ledgers):
        try:
            everyone.check_all(ledger)
        except DuplicateSamples:
            for other in range(number):
                ledgers[other].check_all(ledger, who=f"beside {names[number]}, {names[other]}")
            raise
        everyone.add_all(ledger)


# -- in the actors ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """A cache that waits to be folded. `ours`: whether it may change; the actor's own may not."""

    cache: ActivationCache
    ours: bool = False


_held: dict[str, _Held] = {}


def _begin(actor: Any, token: str, method: str) -> list[Any] | Failure:
    """Have the method called, and keep what it returns. Returns the samples that its reductions have seen."""
    try:
        cache = getattr(actor, method)()
        if not isinstance(cache, ActivationCache):
            raise TypeError(f"{method}() returns an ActivationCache, got {type(cache).__name__}.")
        _held[token] = _Held(cache)
        return cache._ledger.to_plain()
    except Exception as error:
        return Failure.of(error)


def _absorb(_actor: Any, token: str, said: Failure | None, packed: Packed) -> Failure | None:
    """Fold in what another has handed over, unless it failed."""
    try:
        held = _held[token]
        if said is None:
            if not held.ours:
                _held[token] = held = _Held(own(pack(held.cache)), ours=True)
            fold(held.cache, packed)
    except Exception as error:
        return Failure.of(error)
    return None


def _hand_over(_actor: Any, token: str) -> tuple[Failure | None, Packed | None]:
    """What is kept, packed; it's forgotten."""
    try:
        return None, pack(_held.pop(token).cache)
    except Exception as error:
        return Failure.of(error), None


def _forget(_actor: Any, token: str) -> None:
    _held.pop(token, None)
