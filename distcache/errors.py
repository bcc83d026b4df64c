"""The errors that callers may want to catch, each a kind of `DistcacheError`.

A caller's mistake that Python has a name for (a wrong type, a missing key) stays a `TypeError`,
`ValueError` or `KeyError`. Every message names the key or site, what was expected, what was found and
what to do about it.
"""

from __future__ import annotations


class DistcacheError(Exception):
    """The base of every error that only distcache raises."""


class SchemaMismatch(DistcacheError, ValueError):
    """Ranks, or a value and the state it should join, disagree on strategy, shape, dtype or device.

    In a merge every rank raises it with the same text, before anything has moved.
    """


class DuplicateSamples(DistcacheError, ValueError):
    """A sample would count twice in a reduction, where it could not be taken out again."""


class PeerFailed(DistcacheError, RuntimeError):
    """Another rank raised, died or fell silent; this rank's delta is intact and mergeable again."""


class MergeAborted(DistcacheError, RuntimeError):
    """A merge ended without a commit on any rank; the delta is intact and mergeable again."""


class MergeInDoubt(DistcacheError, RuntimeError):
    """The store was lost after this rank voted yes: the cluster may or may not have committed.

    Nothing is thrown away: old content, delta and the merged result are all kept.
    """


class HeldElsewhere(DistcacheError, KeyError):
    """What is read lives on another rank (`dst=r`, or a reduction with `dst="shard"`); this one knows only its name."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


class SiteError(DistcacheError, ValueError):
    """A site, a template, a mask or a model family cannot be used as it was asked for."""


class TooLarge(DistcacheError, MemoryError):
    """The accumulators or the merge would not fit; raised before the memory is taken."""


class BadCache(DistcacheError, ValueError):
    """A saved or packed cache is incomplete, cut short, forged, or of a format this version cannot read."""
