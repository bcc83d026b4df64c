"""What a cluster of ranks says, against what plain torch says of all samples in one process."""

from __future__ import annotations

import pytest
import torch

import distcache as dc
from distcache.testing import splits

STRATEGIES = ["sum", "mean", "max", "min", "cat", "stack", "extend", "moments"]


def samples(n: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(n))


def merge_split(rank, world_size, split, indexed):
    x = samples(sum(split))
    start = sum(split[:rank])
    cache = dc.DistributedCache(timeout_s=20)
    for name in STRATEGIES:
        cache.register_aggregation(f"{name}_", name)
    with cache.deferred_mode():
        for i in range(start, start + split[rank]):
            local = dc.ActivationCache()
            for name in STRATEGIES:
                value = [i] if name == "extend" else x[i : i + 1] if name == "cat" else x[i]
                local[f"{name}_a"] = value
            cache.cat(local, index=[sum(split) - 1 - i] if indexed else None)
    return {key: cache[key] for key in cache}


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_merged_ranks_say_what_one_process_says_of_all_samples(ranks, world_size, indexed):
    for split in splits(7, world_size):
        x = samples(7)
        in_order = x.flip(0) if indexed else x
        for found in ranks.run(world_size, merge_split, split, indexed):
            assert torch.equal(found["cat_a"], in_order)
            assert torch.equal(found["stack_a"], in_order)
            assert found["extend_a"] == (list(range(7))[::-1] if indexed else list(range(7)))
            torch.testing.assert_close(found["sum_a"], x.sum(0), rtol=0, atol=1e-6 * float(x.abs().sum()))
            torch.testing.assert_close(found["mean_a"], x.mean(0), rtol=0, atol=1e-6 * float(x.abs().mean()))
            assert torch.equal(found["max_a"], x.amax(0))
            assert torch.equal(found["min_a"], x.amin(0))
            torch.testing.assert_close(found["moments_a"]["variance"], x.var(0), rtol=1e-5, atol=1e-6)
            assert int(found["moments_a"]["count"]) == 7
