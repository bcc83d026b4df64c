"""The actors, as thin as can be, and the few things that everything here asks of Ray. They are plain classes: who makes
actors of them decides on what they need.
"""

from __future__ import annotations

import ipaddress
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from distcache.cache import ActivationCache
from distcache.collect import Samples, check_samples, warn_if_training
from distcache.packed import Packed, pack, unpack
from distcache.pool.work import Failure, Job, Receipt, State, Work

log = logging.getLogger("distcache")

# States that who asks for them folds by itself; more are folded by the actors first, in a tree, or they would all go
# through one host's network.
FOLDED_HERE = 4

ModelFactory = Callable[[], nn.Module | tuple[nn.Module, Callable[[list[Any]], Any]]]

_warned = False


def the_ray() -> ModuleType:
    """The package ray, in a process that has joined a cluster; by itself it joins what `ray.init()` finds.

    ImportError that names the extra where there is no Ray. Warns once of a cluster that anybody can run code in.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("pools of actors need Ray: pip install 'distcache[ray]'.") from error
    if not ray.is_initialized():
        ray.init()
    warn_if_open(ray.get_runtime_context().gcs_address)
    return ray


def warn_if_open(address: str) -> None:
    """Warn, once in a process, if the cluster at this address, `host:port`, asks nobody for a token and isn't on
    loopback.
    """
    global _warned
    host = address.rsplit(":", 1)[0].strip("[]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    # Ray sets the variable itself where it chooses the mode.
    if _warned or loopback or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        return
    _warned = True
    log.warning(
        "the Ray cluster at %s has no authentication: whoever reaches that address can run code on it. Set "
        "RAY_AUTH_MODE=token and give every node and driver the same token (`ray get-auth-token --generate`, from Ray "
        "2.52 on).",
        address,
    )


def options(resources: Mapping[str, float] | None) -> dict[str, Any]:
    """What an actor needs, {"CPU": 1, "GPU": 1, "memory": bytes, "any other": 1}, as Ray's options; never restarted by
    Ray, because a restarted actor has an empty state and says nothing of it.
    """
    rest = {"CPU": 1.0} if resources is None else dict(resources)
    found: dict[str, Any] = {"num_cpus": rest.pop("CPU", 0), "num_gpus": rest.pop("GPU", 0)}
    if "memory" in rest:
        found["memory"] = rest.pop("memory")
    return {**found, "resources": rest, "max_restarts": 0, "max_task_retries": 0}


@dataclass(frozen=True, slots=True)
class Handed:
    """What is said of a state that is handed over: the items behind it, and its bytes."""

    items: tuple[int, ...]
    nbytes: int


class Worker:
    """A model in a process of its own, and the state of the items that it has done since its last hand-over.

    Methods run one after the other, in the order in which they were called. They return `Failure`s rather than raise
    what users' code raises, which may not survive pickling.
    """

    def __init__(self, factory: ModelFactory) -> None:
        self._factory = factory
        self._work: Work | None = None
        self._pooled: State | None = None  # on the CPU: what others handed over, and own items taken before

    def start(self) -> Failure | None:
        """Make the model."""
        try:
            made: Any = self._factory()
            self._model, self._collate = made if isinstance(made, tuple) else (made, None)
            if not isinstance(self._model, nn.Module):
                raise TypeError(
                    f"the model factory gives a torch.nn.Module, or (model, collate), got {type(self._model).__name__}."
                )
            warn_if_training(self._model)
        except Exception as error:
            return Failure.of(error)
        return None

    def begin(self, job: Job, data: Samples | Callable[[], Samples]) -> int | Failure:
        """A new job, with an empty state. Returns the number of samples."""
        self.end()
        try:
            samples: Any = data() if callable(data) and not hasattr(data, "__getitem__") else data
            check_samples(samples, job.batch_size)
            self._work = Work(self._model, samples, job, self._collate)
            return len(samples)
        except Exception as error:
            return Failure.of(error)

    def work(self, item: int) -> Receipt:
        """Do an item."""
        assert self._work is not None, "begin() comes first"
        return self._work.run(item)

    def hand_over(self) -> tuple[Handed | Failure, Packed | None]:
        """What is behind the state, and the state, packed; from now on it's the caller's, and this actor's is empty."""
        try:
            state, self._pooled = self._taken(), None
            packed = pack(state)
        except Exception as error:
            return Failure.of(error), None
        return Handed(tuple(state.counted), packed.nbytes), packed

    def absorb(self, items: Sequence[int], packed: Packed) -> Failure | None:
        """Fold what another actor has handed over into this one's state: all or nothing."""
        try:
            self._pooled = self._taken()
            fold(self._pooled, packed)
            self._pooled.counted.update(dict.fromkeys(items))
        except Exception as error:
            return Failure.of(error)
        return None

    def end(self) -> None:
        """Forget the job and its state."""
        if self._work is not None:
            self._work.close()
        self._work = self._pooled = None

    def _taken(self) -> State:
        """Everything, on the CPU."""
        assert self._work is not None, "begin() comes first"
        if self._pooled is None:
            return on_cpu(self._work.take())
        if self._work.state.counted:
            state = on_cpu(self._work.take())
            self._pooled._absorb(state)
            self._pooled.counted.update(state.counted)
        return self._pooled


class Holder:
    """Folds states that actors have handed over, while they work on. It keeps nothing."""

    def fold(self, packed: Packed, *others: Packed) -> tuple[int | Failure, Packed | None]:
        """Packed states as one, and its bytes before it."""
        try:
            if others:
                packed = pack(fold_all([packed, *others]))
        except Exception as error:
            return Failure.of(error), None
        return packed.nbytes, packed

    def reach(self, _packed: Packed) -> None:
        """Whether an object can be had still: Ray raises where it can't."""


def on_cpu(state: State) -> State:
    """The same state, moved if any of it may be elsewhere."""
    if any(schema.device != "cpu" or schema.kind == "list" for schema in state._schemas().values()):
        state.cpu()
    return state


def fold_all(packed: Iterable[Packed]) -> ActivationCache:
    """One cache of several that were received: at least one."""
    first, *others = packed
    cache = own(first)
    for other in others:
        fold(cache, other)
    return cache


def own(packed: Packed) -> ActivationCache:
    """A received state in memory of one's own, that others can be folded into."""
    cache = unpack(packed, own=True)
    cache._keeps_lists = True  # plain functions are called once, on everything
    return cache


def fold(cache: ActivationCache, packed: Packed) -> None:
    """Fold a received state, which is read where it lies, into a cache of one's own: all or nothing."""
    cache._absorb(unpack(packed, own=False))
