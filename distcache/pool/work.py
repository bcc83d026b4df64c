"""From a work item to a state: what every actor runs. Pure: the same items give the same state, wherever they run.

An *item* is a number, i: the batch of samples i·batch_size up to (i + 1)·batch_size, as `collect` deals them. A state
knows the items that it counts, so that whoever receives it needs nobody's word for it.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from distcache.cache import ActivationCache
from distcache.collect import Samples, kept_bytes, pad_and_stack, run_batch, run_samples
from distcache.hooks import Recording, record
from distcache.sites import Site, Sites
from distcache.strategies import Strategy


@dataclass(frozen=True, slots=True)
class Job:
    """What to collect: the arguments of `collect`, and the registrations of the cache that the result is for."""

    sites: Sites
    batch_size: int
    collate: Callable[[list[Any]], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    columns: Sequence[str] = ()
    registry: tuple[tuple[str, Strategy], ...] = ()

    @property
    def optional(self) -> bool:
        """Whether there are sites that may report nothing of a batch."""
        sites = self.sites.values() if isinstance(self.sites, Mapping) else self.sites
        each = [sites] if isinstance(sites, (str, Site)) else sites
        return any(isinstance(site, Site) and site.optional for site in each)

    def num_items(self, num_samples: int) -> int:
        return -(-num_samples // self.batch_size)

    def samples(self, item: int, num_samples: int) -> range:
        """The numbers of an item's samples."""
        return range(item * self.batch_size, min((item + 1) * self.batch_size, num_samples))


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, in words that any process can read."""

    kind: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """An actor's answer to one item.

    Args:
        counted: whether its state counts the item now; False where `forward` ran no pass, or something raised.
        failure: what the item raised.
        spoiled: where the item raised after some of it was counted: the items of the state, which was thrown away.
        kept_nbytes: of the first item in a state, the bytes of the rows that it keeps.
    """

    counted: bool
    failure: Failure | None = None
    spoiled: tuple[int, ...] = ()
    kept_nbytes: int = 0


class State(ActivationCache):
    """A cache that notes the items it counts, at the fold itself. Plain functions collect their values in it."""

    def __init__(self, registry: Sequence[tuple[str, Strategy]] = ()) -> None:
        super().__init__()
        self._registry = dict(registry)
        self._keeps_lists = True
        self.counted: dict[int, None] = {}  # items, in order
        self.item = -1  # the one that is under way

    def _take_pass(self, *args: Any, **kwargs: Any) -> None:
        self.counted[self.item] = None  # before, because it may be counted in part where this raises
        super()._take_pass(*args, **kwargs)


class Work:
    """One model at one job: runs items, and accumulates what they show in `state`.

    SiteError and what else `record` raises for sites that can't be.
    """

    def __init__(self, model: nn.Module, data: Samples, job: Job, collate: Callable[[list[Any]], Any] | None) -> None:
        self.job = job
        self._model, self._data = model, data
        self._collate = job.collate or collate or pad_and_stack
        self._stack = contextlib.ExitStack()
        self._begin()

    def run(self, item: int) -> Receipt:
        """Run one item. What it raises is in the receipt; the state is then what it was before, or empty."""
        self.state.item = item
        try:
            with torch.no_grad():
                index = self.job.samples(item, len(self._data))
                forward = self.job.forward or run_batch
                run_samples(self._rec, self._model, self._data, index, self._collate, forward, self.job.columns)
        except Exception as error:
            spoiled = tuple(self.take().counted) if item in self.state.counted else ()
            return Receipt(False, Failure.of(error), spoiled)
        counted = item in self.state.counted
        first = counted and len(self.state.counted) == 1
        return Receipt(counted, kept_nbytes=kept_bytes(self.state).total() if first else 0)

    def take(self) -> State:
        """The state; a new one begins."""
        state = self.state
        self._begin()
        return state

    def close(self) -> None:
        """Take the hooks off."""
        self._stack.close()

    def _begin(self) -> None:
        self._stack.close()
        self.state = State(self.job.registry)
        self._rec: Recording = self._stack.enter_context(record(self._model, self.job.sites, into=self.state))
