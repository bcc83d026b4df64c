"""Ray: actors whose states are folded with the same strategies. Nothing here imports ray before it is used."""

from distcache.pool.caches import pool_caches
from distcache.pool.driver import CachePool

__all__ = ["CachePool", "pool_caches"]
