"""Which positions of texts of different lengths are asked for, counted from their first token or from their last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from distcache.errors import SiteError

Positions = slice | range | None
Align = Literal["start", "end"]


def positions(which: Positions, size: int, align: Align = "start", what: str = "queries") -> range:
    """The positions that an average over texts has, ascending.

    They count 0, 1, … from each text's first token, or with align="end" …, −2, −1 to its last, whose number is −1 in
    every text. A range names them, whether a text has them or not; a slice takes those of `size` positions, the
    longest text's; None takes all of these. `SiteError` for what counts from the other end, or backwards.
    """
    from_end = align == "end"
    if align not in ("start", "end"):
        raise SiteError(f"align is 'start' (positions count from texts' first tokens) or 'end', got {align!r}.")
    which = _ascending(which, what)
    if isinstance(which, slice):
        found = (range(-size, 0) if from_end else range(size))[which]
        named = [n for n in (which.start, which.stop) if n is not None]
    else:
        found, named = which, [*which[:1], *which[-1:]]
    if any((n < 0) != from_end for n in named):
        raise SiteError(
            f"{what}={which} count from texts' {'first' if from_end else 'last'} tokens, where align={align!r}: "
            + ("give negative numbers, −1 is the last token." if from_end else "take align='end'.")
        )
    return found


def positions_of_text(which: Positions, length: int, what: str = "queries") -> range:
    """Those positions, ascending, that one text has; a slice counts as in Python, so that −1 is the last token.

    `SiteError` for a range of negative numbers.
    """
    which = _ascending(which, what)
    if isinstance(which, slice):
        return range(length)[which]
    if which and which[0] < 0:
        raise SiteError(f"{what}={which} has negative numbers: give a slice to count from the end of each text.")
    return which[between(which, 0, length)]


def within(wanted: range, length: int, align: Align = "start") -> tuple[range, slice]:
    """Of `positions`, those that a text of this length has: (their places in the text, where in `wanted` they are)."""
    shift = length if align == "end" else 0
    places = range(wanted.start + shift, wanted.stop + shift, wanted.step)
    at = between(places, 0, length)
    return places[at], at


def between(numbers: range, low: int, high: int) -> slice:
    """Where an ascending range has the numbers from `low` up to `high`."""
    start, step = numbers.start, numbers.step
    first = min(max(0, -((start - low) // step)), len(numbers))
    return slice(first, min(max(first, -((start - high) // step)), len(numbers)))


def query_counts(spans: Sequence[tuple[int, int]], wanted: range, align: Align = "start") -> Tensor:
    """How many texts have each of `positions`, int64 [len(wanted)] on the CPU: what a sum of patterns is divided by."""
    length_b = torch.tensor([stop - start for start, stop in spans], dtype=torch.int64)
    position_q = torch.tensor(wanted, dtype=torch.int64)
    needed_q = -position_q if align == "end" else position_q + 1
    return (length_b[:, None] >= needed_q).sum(0)


def _ascending(which: Positions, what: str) -> slice | range:
    which = slice(None) if which is None else which
    if not isinstance(which, (slice, range)) or (which.step or 1) < 1:
        raise SiteError(f"{what} is a slice or a range of ascending positions, or None for all, got {which!r}.")
    return which
