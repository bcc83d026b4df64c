"""Collect activations from models that run on many ranks, aggregate them, merge across the cluster once."""

from typing import TYPE_CHECKING, Any

from distcache import plot
from distcache.attention import ByClass, Distance, Pooled
from distcache.cache import ActivationCache
from distcache.collect import collect
from distcache.comm import init
from distcache.distributed import DistributedCache
from distcache.errors import (
    BadCache,
    DistcacheError,
    DuplicateSamples,
    HeldElsewhere,
    MergeAborted,
    MergeInDoubt,
    PeerFailed,
    SchemaMismatch,
    SiteError,
    TooLarge,
)
from distcache.hooks import record
from distcache.sites import Site
from distcache.store import load
from distcache.strategies import (
    AveragePattern,
    Cat,
    Covariance,
    Extend,
    First,
    Grouped,
    Histogram,
    Max,
    Mean,
    Min,
    Moments,
    Stack,
    Sum,
    TopK,
    Weighted,
    register_strategy,
)
from distcache.unembed import unembed

if TYPE_CHECKING:
    from distcache.pool import CachePool, collect_batches, fold, pool_caches

__all__ = [
    "ActivationCache",
    "AveragePattern",
    "BadCache",
    "ByClass",
    "CachePool",
    "Cat",
    "Covariance",
    "Distance",
    "DistcacheError",
    "DistributedCache",
    "DuplicateSamples",
    "Extend",
    "First",
    "Grouped",
    "HeldElsewhere",
    "Histogram",
    "Max",
    "Mean",
    "MergeAborted",
    "MergeInDoubt",
    "Min",
    "Moments",
    "PeerFailed",
    "Pooled",
    "SchemaMismatch",
    "Site",
    "SiteError",
    "Stack",
    "Sum",
    "TooLarge",
    "TopK",
    "Weighted",
    "collect",
    "collect_batches",
    "fold",
    "init",
    "load",
    "plot",
    "pool_caches",
    "record",
    "register_strategy",
    "unembed",
]


def __getattr__(name: str) -> Any:
    """What needs Ray, when it's asked for."""
    if name in ("CachePool", "collect_batches", "fold", "pool_caches"):
        from distcache import pool

        return getattr(pool, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
