"""Averaged attention patterns, exact, from Q and K as the model's own fast attention gets them."""

from distcache.attention.blockwise import pattern, pattern_sum
from distcache.attention.taps import AttentionCall, tap_attention

__all__ = ["AttentionCall", "pattern", "pattern_sum", "tap_attention"]
