"""Which positions of texts of different lengths are asked for, counted from their first token or from their last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distcache.errors import SiteError

Align = Literal["start", "end"]


class Stretch(NamedTuple):
    """Positions from `start` up to `stop`, each `step`-th: None where that is left to the texts."""

    start: int | None
    stop: int | None
    step: int


Positions = slice | range | tuple[int | None, ...] | None


def as_stretch(which: Positions, align: Align = "start", what: str = "queries") -> Stretch | None:
    """What a slice, a range or the three numbers of a `Stretch` ask for; None for all positions.

    Positions count 0, 1, … from each text's first token, or with align="end" …, −2, −1 to its last, whose number is −1
    in every text. `SiteError` for what counts from the other end, or backwards, or means no position at all.
    """
    from_end = align == "end"
    if align not in ("start", "end"):
        raise SiteError(f"align is 'start' (positions count from texts' first tokens) or 'end', got {align!r}.")
    if which is None:
        return None
    start, stop, step = _three(which, what)
    # An end that is past the last token is no number of one.
    named = [*([] if start is None else [start]), *([] if stop is None or (from_end and stop == 0) else [stop])]
    if any((n < 0) != from_end for n in named):
        raise SiteError(
            f"{what}={which} count from texts' {'first' if from_end else 'last'} tokens, where align={align!r}: "
            + ("give negative numbers, −1 is the last token." if from_end else "take align='end'.")
        )
    stop = None if from_end and stop == 0 else stop
    if from_end and start is None and step > 1:
        raise SiteError(
            f"{what}={which} would begin at another token in texts of another length: say where, as in range(−9, 0, 2)."
        )
    found = Stretch(start, stop, step)
    if num_positions(found, align) == 0:
        raise SiteError(f"{what}={which} are no positions at all.")
    return None if found == (None, None, 1) else found


def num_positions(stretch: Stretch | None, align: Align) -> int | None:
    """How many positions there are in texts of any length; None if that has no limit."""
    if stretch is None:
        return None
    start, stop, step = stretch
    if align == "end":
        return None if start is None else len(range(start, 0 if stop is None else stop, step))
    return None if stop is None else len(range(start or 0, stop, step))


def positions(which: Positions, size: int, align: Align = "start", what: str = "queries") -> range:
    """The positions, ascending, that some text of at most `size` tokens has. `SiteError` as of `as_stretch`."""
    stretch = as_stretch(which, align, what)
    start, stop, step = Stretch(None, None, 1) if stretch is None else stretch
    if align == "start":
        return range(start or 0, size if stop is None else min(stop, size), step)
    first = -size if start is None else start
    if first < -size:
        first += -(-(-size - first) // step) * step  # each step-th of those that were named
    return range(first, 0 if stop is None else stop, step)


def places(which: Positions, length: int, align: Align = "start", what: str = "queries") -> range:
    """Those `positions`, ascending, that one text of this length has, counted from its first token."""
    return within(positions(which, length, align, what), length, align)[0]


def within(wanted: range, length: int, align: Align = "start") -> tuple[range, slice]:
    """Of `positions`, those that a text of this length has: (their places in the text, where in `wanted` they are)."""
    shift = length if align == "end" else 0
    places = range(wanted.start + shift, wanted.stop + shift, wanted.step)
    at = between(places, 0, length)
    return places[at], at


def mirrored(at: slice, num: int) -> slice:
    """Where, counted from the other end, those lie that are at these places of `num`."""
    return slice(num - at.stop, num - at.start)


def between(numbers: range, low: int, high: int) -> slice:
    """Where an ascending range has the numbers from `low` up to `high`."""
    start, step = numbers.start, numbers.step
    first = min(max(0, -((start - low) // step)), len(numbers))
    return slice(first, min(max(first, -((start - high) // step)), len(numbers)))


def counts_at(lengths: Sequence[int], wanted: range, align: Align = "start") -> Tensor:
    """How many texts have each of `positions`, int64 [len(wanted)] on the CPU: what a sum of patterns is divided by.

    With align="end" in the order of such a sum: from the last position on.
    """
    length_b = torch.tensor(lengths, dtype=torch.int64)
    position_q = torch.tensor(wanted if align == "start" else wanted[::-1], dtype=torch.int64)
    needed_q = -position_q if align == "end" else position_q + 1
    return (length_b[:, None] >= needed_q).sum(0)


def _three(which: Positions, what: str) -> tuple[int | None, int | None, int]:
    """Start, stop and step of what asks for ascending positions."""
    three: tuple[Any, ...] = (
        (which.start, which.stop, which.step) if isinstance(which, (slice, range)) else tuple(which or ())
    )
    numbers = all(n is None or (isinstance(n, int) and not isinstance(n, bool)) for n in three)
    if len(three) != 3 or not numbers or (three[2] or 1) < 1:
        raise SiteError(f"{what} is a slice or a range of ascending positions, or None for all, got {which!r}.")
    return three[0], three[1], 1 if three[2] is None else three[2]
