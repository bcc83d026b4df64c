"""Ctrl-C between changes that belong together, never amid them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the function this yields is called, or the end: never between lines that belong together."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    caught: list[tuple[int, Any]] = []

    def let_through() -> None:
        if caught:
            before(*caught.pop())

    signal.signal(signal.SIGINT, lambda number, frame: caught.append((number, frame)))
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, before)
        let_through()
