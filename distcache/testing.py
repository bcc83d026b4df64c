"""What our tests rest on, shipped for those who write strategies: a harness of ranks, and the laws of strategies.

    with RankPool() as pool:
        outcomes = pool.run(world_size, function, *args)   # function(rank, world_size, *args) on every rank

    check_strategy_laws(MyStrategy(), samples)             # AssertionError that names the law it breaks

In the harness the caller keeps the store, as torchrun's agent does, so that it outlives every rank, and every wait has
a limit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distcache import codec
from distcache.strategies import (
    Columns,
    Fieldwise,
    Function,
    Gathered,
    Grouped,
    Listwise,
    Piece,
    Rows,
    Rowwise,
    State,
    Strategy,
    Value,
    describe,
    described,
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank ended: with `value`, with `error` ("PeerFailed: …") and its traceback, or dead (both None)."""

    rank: int
    value: Any = None
    error: str | None = None
    traceback: str | None = None
    died: bool = False


class RankFailed(AssertionError):
    """A rank raised, died or took too long; the message holds its traceback."""


class RankPool:
    """Worker processes that have imported torch once and are used for one job after the other."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["distcache", "distcache.testing"])
        self._idle: list[tuple[Any, Connection]] = []
        self._jobs = itertools.count()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every worker."""
        for process, pipe in self._idle:
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join(5)
        self._idle.clear()

    def _worker(self) -> tuple[Any, Connection]:
        if self._idle:
            return self._idle.pop()
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._store.port), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def outcomes(
        self, world_size: int, function: Callable[..., Any], *args: Any, lost: int | None = None, timeout_s: float = 60
    ) -> list[Outcome]:
        """Run `function(rank, world_size, *args)` on ranks with a gloo process group; how each of them ended.

        A rank that is still at it after `timeout_s` is killed, and `RankFailed` raised. `lost`: a rank that is
        expected to end by no means (stopped, or stuck): not waited for, it counts as dead.
        """
        job = next(self._jobs)
        workers = [self._worker() for _ in range(world_size)]
        for rank, (_, pipe) in enumerate(workers):
            pipe.send((job, rank, world_size, function, args))
        found: dict[int, Outcome] = {}
        by_pipe = {pipe: rank for rank, (_, pipe) in enumerate(workers)}
        deadline = time.monotonic() + timeout_s
        awaited = set(range(world_size)) - {lost}
        while awaited - found.keys() and (left := deadline - time.monotonic()) > 0:
            for ready in wait([p for p, rank in by_pipe.items() if rank not in found], left):
                assert isinstance(ready, Connection)
                rank = by_pipe[ready]
                try:
                    value, error, trace = ready.recv()
                    found[rank] = Outcome(rank, value, error, trace)
                except (EOFError, ConnectionResetError):
                    found[rank] = Outcome(rank, died=True)
        if lost is not None:
            found.setdefault(lost, Outcome(lost, died=True))
        late = [rank for rank in range(world_size) if rank not in found]
        for rank, (process, pipe) in enumerate(workers):
            # A rank that raised may have left its groups in pieces: a fresh worker is cheap.
            if rank in found and not found[rank].died and found[rank].error is None:
                self._idle.append((process, pipe))
            else:
                process.kill()
                process.join(10)
                pipe.close()
        if late:
            ended = "\n".join(f"rank {o.rank}: {o.traceback or o.value or 'died'}" for o in found.values())
            raise RankFailed(f"rank(s) {late} of {world_size} did not end within {timeout_s:g} s.\n{ended}")
        return [found[rank] for rank in range(world_size)]

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60) -> list[Any]:
        """As `outcomes`, for functions that must succeed: their values, by rank. `RankFailed` with every traceback."""
        ended = self.outcomes(world_size, function, *args, timeout_s=timeout_s)
        failed = [o for o in ended if o.error is not None or o.died]
        if failed:
            raise RankFailed("\n".join(f"rank {o.rank} of {world_size}: {o.traceback or 'died'}" for o in failed))
        return [o.value for o in ended]


def _work(pipe: Connection, port: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30), wait_for_workers=False)
    while True:
        try:
            item = pipe.recv()
        except (EOFError, OSError):
            return
        if item is None:
            return
        job, rank, world_size, function, args = item
        answer: tuple[Any, str | None, str | None]
        try:
            with joined(dist.PrefixStore(f"job{job}", store), rank, world_size):
                answer = (function(rank, world_size, *args), None, None)
        except BaseException as error:
            answer = (None, f"{type(error).__name__}: {error}", traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return
        except Exception as error:  # a value that can't be sent
            pipe.send((None, f"{type(error).__name__}: {error}", traceback.format_exc()))


@contextlib.contextmanager
def joined(store: dist.Store, rank: int, world_size: int, timeout_s: float = 30) -> Iterator[None]:
    """A gloo process group over `store`, always destroyed."""
    if world_size == 1:
        yield
        return
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    try:
        # A rank that is done at once would close the connections that its peers are still making.
        deadline = time.monotonic() + timeout_s
        connected = store.add("connected", 1)
        while connected < world_size and time.monotonic() < deadline:
            time.sleep(0.001)
            connected = store.add("connected", 0)
        yield
    finally:
        dist.destroy_process_group()


def kill_self(how: int = signal.SIGKILL) -> None:
    """End this process as an out-of-memory killer would, or stop it with SIGSTOP."""
    os.kill(os.getpid(), how)


def splits(num_samples: int, world_size: int) -> Sequence[tuple[int, ...]]:
    """Ways to deal samples to ranks that tell averages of averages from averages: even, uneven, with idle ranks."""
    if world_size == 1:
        return [(num_samples,)]
    even = [num_samples // world_size] * world_size
    even[0] += num_samples - sum(even)
    one_each = [1] * (world_size - 1)
    return [tuple(even), (num_samples - len(one_each), *one_each), (*[0] * (world_size - 1), num_samples)]


# -- the laws of strategies ------------------------------------------------------------------------------------


def check_strategy_laws(strategy: Strategy, samples: Sequence[Any], weights: Tensor | None = None) -> None:
    """`AssertionError`, naming the law, if a strategy breaks one that the merge relies on.

    - split: however samples are dealt to ranks, the ranks together say what one rank says that saw all of them;
    - order: in any order of ranks (strategies that keep values: where samples carry an index);
    - idle: a rank without samples changes nothing, in no bit;
    - pure: combining and finalizing change no state but the one that is folded into;
    - bytes: states and parameters survive a journey as bytes, in every bit;
    - slab: states of several keys, side by side in a leading dim, fold as each of them does;
    - cells: of a `Grouped`, each cell reads as its strategy does of that cell's samples alone;
    - rounds: field by field, in rounds, reductions give what combining gives (not of `Gathered`, which has none).

    What is kept must come out bit for bit, reductions within 1e-6 of the mean of |x| (of the result's, if larger).

    Args:
        samples: one value per sample: tensors, for strategies that reduce or keep rows; at least 2, of unlike values.
        weights: one per sample [n], for strategies that weigh.
    """
    strategy = strategy.resolve(Value(samples[0]))
    laws = _Laws(strategy, samples, weights)
    laws.pure()
    laws.split()
    laws.order()
    laws.idle()
    laws.through_bytes()
    if isinstance(strategy, Fieldwise):
        laws.slab()
        laws.cells()
        if not isinstance(strategy, Gathered):
            laws.rounds()


class _Laws:
    """The laws for one strategy and some samples."""

    def __init__(self, strategy: Strategy, samples: Sequence[Any], weights: Tensor | None) -> None:
        self.strategy = strategy
        self.samples = samples
        self.weights = weights
        self.everything = range(len(samples))
        self.reduces = isinstance(strategy, Fieldwise)
        self.alone = self.finalized(self.state(self.everything))

    def state(self, numbers: Sequence[int], indexed: bool = True) -> Any:
        """The state of a rank that saw these samples: in one batch where it can, as the hooks do."""
        if isinstance(self.strategy, Listwise):
            return self.together([self.take([n], indexed) for n in numbers])
        batch = {self.samples[n].shape for n in self.everything}
        if len(batch) > 1 and numbers:
            return self.together([self.take([n], indexed) for n in numbers])
        return self.take(numbers, indexed)

    def take(self, numbers: Sequence[int], indexed: bool) -> Any:
        if isinstance(self.strategy, Listwise):
            return self.strategy.take(Value(self.samples[numbers[0]], columns=self.columns(numbers, indexed)))
        return self.strategy.take(self.batch(numbers, indexed))

    def batch(self, numbers: Sequence[int], indexed: bool) -> Value:
        some = [self.samples[n] for n in numbers]
        data = torch.stack(some) if some else self.samples[0].new_empty(0, *self.samples[0].shape)
        if isinstance(self.strategy.dim, int) and self.reduces:
            data = data.movedim(0, self.strategy.dim)
        weight = None if self.weights is None else self.weights[torch.tensor(numbers, dtype=torch.int64)]
        return Value(data, rows=True, columns=self.columns(numbers, indexed), weight=weight)

    def columns(self, numbers: Sequence[int], indexed: bool) -> Columns | None:
        sample = torch.tensor(numbers, dtype=torch.int64)
        known = {"sample": sample, "position": torch.zeros_like(sample)}
        if isinstance(self.strategy, Grouped):
            known[self.strategy.by] = torch.tensor([self.cell(n) for n in numbers], dtype=torch.int64)
        return Columns(known, indexed) if indexed or isinstance(self.strategy, Grouped) else None

    def cell(self, number: int) -> int:
        """The cell of one sample, of a `Grouped`: −1, 0, 1, … by turns."""
        assert isinstance(self.strategy, Grouped)
        return number % (self.strategy.size + 1) - 1

    def together(self, states: Sequence[Any]) -> Any:
        return functools.reduce(self.strategy.combine, states)

    def finalized(self, state: Any) -> Any:
        return self.strategy.finalize(state)

    def demand(self, law: str, found: Any, expected: Any, what: str, exact: bool = False) -> None:
        try:
            _assert_same(found, expected, None if exact or not self.reduces else self.scale(expected))
        except AssertionError as error:
            raise AssertionError(f"{self.strategy} breaks the law of {law}: {what}.\n{error}") from None

    def scale(self, expected: Any) -> float:
        """What errors are measured by: the mean of |x|, or of the result."""
        given = torch.cat([torch.as_tensor(x).double().flatten() for x in self.samples])
        results = [x.double().flatten() for x in _tensors(expected)]
        means = [x.abs().nanmean().item() for x in (given, *results) if x.numel()]
        return max((m for m in means if math.isfinite(m)), default=0.0)

    def deals(self) -> Iterator[list[list[int]]]:
        """Samples by rank: parts in order, without empty hands."""
        for world_size in range(2, min(len(self.samples), 4) + 1):
            for sizes in splits(len(self.samples), world_size):
                numbers = iter(self.everything)
                parts = [list(itertools.islice(numbers, size)) for size in sizes]
                yield [part for part in parts if part]

    def split(self) -> None:
        for deal in self.deals():
            for indexed in (True,) if self.strategy.needs_index else (True, False):
                found = self.finalized(self.together([self.state(part, indexed) for part in deal]))
                self.demand("splits", found, self.alone, f"dealt as {deal}")

    def order(self) -> None:
        n = len(self.samples)
        by_turns = [[list(self.everything)[rank::size] for rank in range(size)] for size in range(2, min(n, 4) + 1)]
        for deal in (*self.deals(), *by_turns):
            for ranks in (deal, deal[::-1], [*deal[1:], *deal[:1]]):
                found = self.finalized(self.together([self.state(part) for part in ranks]))
                self.demand("order", found, self.alone, f"dealt as {ranks}")

    def idle(self) -> None:
        if isinstance(self.strategy, Listwise):
            return  # a rank without values has no state
        state = self.state(self.everything)
        idle = [self.take([], True)]
        if isinstance(self.strategy, Fieldwise):
            idle.append(_identity(self.strategy, state))
        for nothing in idle:
            for found in (self.strategy.combine(state, nothing), self.strategy.combine(nothing, state)):
                self.demand(
                    "idle ranks", self.finalized(found), self.alone, "beside a rank without samples", exact=True
                )

    def pure(self) -> None:
        a, b = self.state(self.everything[:1]), self.state(self.everything[1:])
        before = [codec.encode(_plain_state(state)) for state in (a, b)]
        self.finalized(self.strategy.combine(a, b))
        self.finalized(a)
        after = [codec.encode(_plain_state(state)) for state in (a, b)]
        self.demand("purity", after, before, "combine or finalize changed a state that it was given", exact=True)
        into = self.laid_out(a) if isinstance(self.strategy, Fieldwise) else a
        self.strategy.fold_(into, b)
        self.demand("purity", codec.encode(_plain_state(b)), before[1], "fold_ changed what it folds in", exact=True)
        self.demand(
            "purity",
            self.finalized(into),
            self.finalized(self.strategy.combine(self.state(self.everything[:1]), b)),
            "fold_ gives something else than combine",
        )

    def through_bytes(self) -> None:
        for part in (self.everything, self.everything[:1]):
            state = self.state(part)
            again = _state_of_plain(self.strategy, codec.decode(codec.encode(_plain_state(state))))
            found = self.finalized(again)
            self.demand("bytes", found, self.finalized(state), "a state came back from bytes as another", exact=True)
        if not isinstance(self.strategy, Function):  # known by its path
            again = described(json.loads(json.dumps(describe(self.strategy))))
            assert again == self.strategy, f"{self.strategy} breaks the law of bytes: it came back as {again}."

    def slab(self) -> None:
        assert isinstance(self.strategy, Fieldwise)
        parts = [self.everything[:1], self.everything[1:]]
        one, other = (self.laid_out(self.state(part)) for part in parts)
        into = {name: torch.stack([one[name], other[name]]) for name in one}
        self.strategy.fold_(into, {name: torch.stack([other[name], one[name]]) for name in one})
        for k in range(2):
            found = self.finalized({name: tensor[k] for name, tensor in into.items()})
            self.demand("slabs", found, self.alone, f"key {k} of two that were folded as one")

    def cells(self) -> None:
        if not isinstance(self.strategy, Grouped):
            return
        alone = self.strategy.strategy
        for cell in range(self.strategy.size):
            numbers = [n for n in self.everything if self.cell(n) == cell]
            expected = alone.finalize(alone.take(self.batch(numbers, True)))
            found = _of_cell(self.alone, cell, expected)
            self.demand("cells", found, expected, f"cell {cell}, of samples {numbers}")

    def rounds(self) -> None:
        assert isinstance(self.strategy, Fieldwise)
        for deal in self.deals():
            states = [self.laid_out(self.state(part)) for part in deal]
            fields = self.strategy.layout(states[0])
            merged = {name: tensor.clone() for name, tensor in states[0].items()}
            for number in sorted({field.round for field in fields}):
                for state in states if number else ():
                    self.strategy.recentre_(state, {**state, **merged})
                for field in fields:
                    if field.round == number:
                        merged[field.name] = states[0][field.name].clone()
                        for state in states[1:]:
                            field.reduction.fold_(merged[field.name], state[field.name])
            self.demand("rounds", self.finalized(merged), self.alone, f"reduced field by field, dealt as {deal}")

    def laid_out(self, state: State) -> State:
        """The state with as much room in every field as the state of all samples has."""
        assert isinstance(self.strategy, Fieldwise)
        return self.strategy.combine(_identity(self.strategy, self.state(self.everything)), state)


def _identity(strategy: Fieldwise, state: State) -> State:
    """What an idle rank holds: identities in the shapes of a state."""
    kinds = strategy.kinds(state)
    found = {}
    for field in strategy.layout(state):
        shape, dtype = kinds[field.name]
        found[field.name] = torch.full(shape, field.reduction.identity(dtype), dtype=dtype)
    return found


def _of_cell(value: Any, cell: int, like: Any) -> Any:
    """What a grouped value says of one cell; `like`: what its strategy says of it."""
    if isinstance(like, dict):
        return {name: _of_cell(value[name], cell, like[name]) for name in like}
    return value[cell] if value.shape[1:] == like.shape and value.dim() > like.dim() else value  # the same for all


def _plain_state(state: Any) -> Any:
    """A state as plain values: what crosses the wire."""
    if isinstance(state, Rows):
        pieces = [(piece.value_n, piece.columns) for piece in state.pieces]
        return [[value_n, None if known is None else [dict(known.by_name), known.indexed]] for value_n, known in pieces]
    if isinstance(state, list):
        known = [value.columns for value in state]
        samples = [columns.by_name["sample"] if columns is not None and columns.indexed else None for columns in known]
        return [[value.data, sample] for value, sample in zip(state, samples, strict=True)]
    return state


def _state_of_plain(strategy: Strategy, plain: Any) -> Any:
    if isinstance(strategy, Rowwise):
        return Rows(Piece(value_n, None if known is None else Columns(*known)) for value_n, known in plain)
    if isinstance(strategy, Listwise):
        bare = [(data, None if s is None else {"sample": s, "position": torch.zeros_like(s)}) for data, s in plain]
        return [Value(data, columns=None if by_name is None else Columns(by_name, True)) for data, by_name in bare]
    return plain


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _assert_same(found: Any, expected: Any, scale: float | None) -> None:
    """Equal in every bit, or floats within 1e-6 of `scale`."""
    if isinstance(expected, Tensor):
        atol = 0.0 if scale is None or not expected.is_floating_point() else 1e-6 * scale
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, equal_nan=True)
    elif isinstance(expected, (dict, list, tuple)):
        assert type(found) is type(expected) and len(found) == len(expected), f"{found} is not {expected}"
        names = expected if isinstance(expected, dict) else range(len(expected))
        for name in names:
            _assert_same(found[name], expected[name], scale)
    else:
        assert found == expected, f"{found!r} is not {expected!r}"
