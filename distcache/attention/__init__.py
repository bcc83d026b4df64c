"""Averaged attention patterns and statistics, exact, from Q and K as the model's own fast attention gets them."""

from distcache.attention.blockwise import check, pattern
from distcache.attention.dispatch import pattern_sum, sum_scratch_bytes
from distcache.attention.functions import tap_functions
from distcache.attention.statistics import (
    ByClass,
    Distance,
    Pooled,
    Statistic,
    as_statistics,
    pattern_statistics,
    scratch_bytes,
    state_bytes,
)
from distcache.attention.steps import Steps, shared_copy
from distcache.attention.taps import AttentionCall, compiled_flex_attention, tap_attention

__all__ = [
    "AttentionCall",
    "ByClass",
    "Distance",
    "Pooled",
    "Statistic",
    "Steps",
    "as_statistics",
    "check",
    "compiled_flex_attention",
    "pattern",
    "pattern_statistics",
    "pattern_sum",
    "scratch_bytes",
    "shared_copy",
    "state_bytes",
    "sum_scratch_bytes",
    "tap_attention",
    "tap_functions",
]
