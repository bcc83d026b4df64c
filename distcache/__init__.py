"""Collect activations from models that run on many ranks, aggregate them, merge across the cluster once."""

from distcache.cache import ActivationCache
from distcache.comm import init
from distcache.distributed import DistributedCache

__all__ = ["ActivationCache", "DistributedCache", "init"]
