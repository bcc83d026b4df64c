"""What pooling costs: caches that arrive packed folded into one, and the bare numpy fold of as many bytes.

All in one process, in which buffers are handed over as they are: what Ray does beside that is Ray's. A receiver that
has states already, as every one has after its first cache, takes in four more. Accumulators are float64, and so are the
flat arrays of the limit, which have as many bytes. What a fold into fresh memory takes stands beside it: most of that
are the pages' first touches, on either side.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import distcache as dc
from benchmarks.harness import Candidate, time_on_rank
from distcache.packed import pack, unpack

NUM_CACHES = 4
# By name: how many means, and the number of elements of each.
SHAPES = {
    "pooling 16 keys": (16, 200 * 10**6 // 8 // 16),
    "pooling 2000 keys": (2000, 200 * 10**6 // 8 // 2000),
    "pooling 2000 small keys": (2000, 64),
}
WORKLOADS = tuple(SHAPES)


def caches_of(num_keys: int, numel: int) -> list[dc.ActivationCache]:
    """Caches of means, each of which has seen one sample: of cache c and key k, c + k in every element."""
    found = []
    for c in range(NUM_CACHES):
        cache = dc.ActivationCache()
        cache.register_aggregation("key", "mean")
        for k in range(num_keys):
            cache.add(f"key{k:05d}", torch.full((numel,), float(c + k)))
        found.append(cache)
    return found


def packed(cache: dc.ActivationCache, own: bool) -> dc.ActivationCache:
    return unpack(pack(cache), own=own)


def pickled(cache: dc.ActivationCache, out_of_band: bool) -> dc.ActivationCache:
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(cache, protocol=5, buffer_callback=buffers.append if out_of_band else None)
    return pickle.loads(data, buffers=buffers)


def candidates_of(num_keys: int, numel: int) -> Iterator[Candidate]:
    repeats = 1 if num_keys * numel > 10**6 else 10
    caches = caches_of(num_keys, numel)
    flat = [np.full(cache._arena.nbytes // 8, 1.0) for cache in caches]
    total, into, by_key = np.ones_like(flat[0]), dc.ActivationCache(), {}

    def numpy_fold() -> np.ndarray:
        for other in flat:
            np.add(total, other, out=total)  # `total += other`
        return total

    def numpy_fold_fresh() -> np.ndarray:
        fresh = flat[0].copy()
        for other in flat[1:]:
            fresh += other
        return fresh

    def check_numpy(found: np.ndarray) -> None:
        assert (found == found[0]).all() and found[0] >= NUM_CACHES

    def with_states() -> None:
        """The receiver's: what the first cache holds."""
        nonlocal into
        into = dc.ActivationCache()
        into.cat(caches[0])

    def with_tensors() -> None:
        by_key.clear()
        by_key.update({key: {n: t.clone() for n, t in caches[0]._arena.state(key).items()} for key in caches[0]})

    def fold(through: Callable[[dc.ActivationCache], dc.ActivationCache]) -> dc.ActivationCache:
        for cache in caches:
            into.cat(through(cache))
        return into

    def fold_fresh() -> dc.ActivationCache:
        fresh = dc.ActivationCache()
        for cache in caches:
            fresh.cat(packed(cache, own=False))
        return fresh

    def tensor_by_tensor() -> dict[str, Any]:
        """What one would write by hand: pickled dicts of tensors, added key by key."""
        for cache in caches:
            plain = {key: {n: t.clone() for n, t in cache._arena.state(key).items()} for key in cache}
            for key, state in pickle.loads(pickle.dumps(plain, protocol=5)).items():
                for name, tensor in state.items():
                    by_key[key][name] += tensor
        return {key: state["total"] / state["count"] for key, state in by_key.items()}

    def checked(first: int) -> Callable[[Any], None]:
        """`first`: how often the first cache, whose values are the smallest, was counted."""

        def check(found: Any) -> None:
            mean = sum(range(NUM_CACHES)) / (NUM_CACHES + first - 1)
            for k in (0, num_keys // 2, num_keys - 1):
                expected = torch.full((numel,), mean + k)
                torch.testing.assert_close(found[f"key{k:05d}"].float(), expected, rtol=1e-6, atol=0)

        return check

    def ours(
        name: str, through: Callable[[dc.ActivationCache], dc.ActivationCache], rounds: int | None = None
    ) -> Candidate:
        return Candidate(name, lambda: fold(through), with_states, checked(2), rounds, repeats)

    yield Candidate("limit: numpy a += b", numpy_fold, check=check_numpy, repeats=repeats)
    yield ours("distcache", lambda cache: packed(cache, own=False))
    yield ours("distcache, in memory of its own first", lambda cache: packed(cache, own=True))
    yield ours("distcache, pickled out of band", lambda cache: pickled(cache, True))
    yield ours("distcache, pickled in band", lambda cache: pickled(cache, False), 2)
    yield Candidate("limit: numpy, fresh memory", numpy_fold_fresh, check=check_numpy, repeats=repeats)
    yield Candidate("distcache, fresh memory", fold_fresh, check=checked(1), repeats=repeats)
    yield Candidate("tensors pickled, key by key", tensor_by_tensor, with_tensors, checked(2), rounds=1)


def on_rank(
    rank: int, world_size: int, name: str, rounds: int, device: str
) -> tuple[list[str], list[list[float]], list[float | None]]:
    """Names of the candidates, milliseconds by candidate and time, and peaks. On the CPU, whatever the device."""
    candidates = list(candidates_of(*SHAPES[name]))
    return [c.name for c in candidates], *time_on_rank(candidates, rounds, torch.device("cpu"))
