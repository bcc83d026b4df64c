"""A loader's batches dealt to ranks: each to one, once, with the numbers of its samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from distcache.schema import digest_of


def share(loader: Any, rank: int, world_size: int) -> tuple[int, Iterator[tuple[Tensor, Any]]]:
    """A digest of a loader's order, and (index, batch) of every batch that falls to a rank: batch i to rank i mod world
    size. Not a collective.

    `loader`: a DataLoader over a data set with a length, of which only this rank's samples are read; or anything sized
    that gives batches, which is read whole; or a sampler, whose samples' numbers, one by one or in batches, are both
    index and batch. `index`: int64 [B], the samples' numbers. A DataLoader that shuffles is read in order, because
    every rank would shuffle in its own way; any other order must be the same on every rank.

    TypeError for what has no length or no batches; ValueError for a loader that deals samples itself.
    """
    if isinstance(loader, DataLoader):
        return _share_loader(loader, rank, world_size)
    if not isinstance(loader, Sized):
        raise TypeError(f"share expects a DataLoader or a sized iterable of batches, got {type(loader).__name__}.")
    if isinstance(loader, Sampler):
        _check_deals_all(getattr(loader, "sampler", loader))
        found = list(loader)
        numbers = [torch.atleast_1d(torch.as_tensor(item)).tolist() for item in found]
        own = zip(numbers[rank::world_size], found[rank::world_size], strict=True)
        return digest_of(numbers), ((torch.tensor(index, dtype=torch.int64), item) for index, item in own)
    return digest_of(len(loader)), _share_batches(loader, rank, world_size)


def _share_loader(loader: DataLoader[Any], rank: int, world_size: int) -> tuple[int, Iterator[tuple[Tensor, Any]]]:
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise TypeError(
            "share needs a DataLoader that makes batches of numbered samples: a map-style data set and a batch_size."
        )
    sampler = getattr(loader.batch_sampler, "sampler", None)
    _check_deals_all(sampler)
    batches: Any = loader.batch_sampler
    if isinstance(sampler, RandomSampler):
        batches = BatchSampler(SequentialSampler(loader.dataset), loader.batch_size or 1, loader.drop_last)  # type: ignore
    everything = [list(batch) for batch in batches]
    own = everything[rank::world_size]
    part = DataLoader(
        loader.dataset,
        batch_sampler=own,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
    indices = (torch.tensor(index, dtype=torch.int64) for index in own)
    return digest_of(everything), zip(indices, part, strict=True)


def _check_deals_all(sampler: Any) -> None:
    if isinstance(sampler, DistributedSampler):
        raise ValueError(
            "the loader's DistributedSampler deals samples itself and repeats some to make shares equal: leave it out, "
            "share() deals without padding."
        )


def _share_batches(batches: Any, rank: int, world_size: int) -> Iterator[tuple[Tensor, Any]]:
    start = 0
    for i, batch in enumerate(batches):
        stop = start + _num_samples(batch)
        if i % world_size == rank:
            yield torch.arange(start, stop), batch
        start = stop


def _num_samples(batch: Any) -> int:
    """The length of the first tensor or list in a batch."""
    if isinstance(batch, Mapping):
        return _num_samples(next(iter(batch.values())))
    if isinstance(batch, (tuple, list)) and len(batch) and isinstance(batch[0], (Tensor, Mapping)):
        return _num_samples(batch[0])
    if not isinstance(batch, Sized):
        raise TypeError(
            f"share deals batches, got {type(batch).__name__} among them: give a DataLoader with a batch_size, a "
            "sampler, or a list of batches."
        )
    return len(batch)
