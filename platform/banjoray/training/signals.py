"""SIGTERM as a wish: finish the step, write a checkpoint, then end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_told = threading.Event()
_listening = threading.Event()


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """The SIGTERM handler from before the block is in force again after it, if a program had set one.

    Starting Ray puts its own in place, which dumps the stack and ends the process without stopping what it started.
    """
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def catch_sigterm() -> None:
    """From now on a SIGTERM inside `sigterm_is_a_wish` is one; called in the main thread of a process."""
    before = signal.getsignal(signal.SIGTERM)

    def handler(number: int, frame: Any) -> None:
        # A second one means it.
        if _listening.is_set() and not _told.is_set():
            _told.set()
        elif callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, handler)


@contextmanager
def sigterm_is_a_wish() -> Iterator[threading.Event]:
    """While the block runs a SIGTERM sets the event that the block is given.

    In the main thread it is caught from here on; in another one `catch_sigterm` has to have been called before.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    if main:
        catch_sigterm()
    _told.clear()
    _listening.set()
    try:
        yield _told
    finally:
        _listening.clear()
        if main:
            signal.signal(signal.SIGTERM, before)
