"""Ray: actors whose states are folded with the same strategies. Nothing here imports ray before it is used."""

from distcache.pool.caches import pool_caches
from distcache.pool.data import collect_batches, fold
from distcache.pool.driver import CachePool
from distcache.pool.service import Status

__all__ = ["CachePool", "Status", "collect_batches", "fold", "pool_caches"]
