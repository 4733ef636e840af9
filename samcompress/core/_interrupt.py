"""Ctrl-C between two steps instead of anywhere."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stop:
    """Whether to stop."""

    asked = False


@contextmanager
def interruptible(wanted: bool) -> Iterator[Stop]:
    """Turn the first Ctrl-C into a question that is looked at between steps.

    Nothing changes where not `wanted`, outside the main thread, or where the caller has a handler
    of its own.

    Raises:
        KeyboardInterrupt: at once, when Ctrl-C is pressed again; else at the end.
    """
    stop = Stop()
    before = signal.getsignal(signal.SIGINT)
    usual = before is signal.default_int_handler
    if not wanted or not usual or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.asked:
        raise KeyboardInterrupt
