"""Signal handlers that survive the start of Ray."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_sigterm() -> Iterator[None]:
    """The SIGTERM handler from before the block is in force again after it, if a program had set one.

    Starting Ray puts its own in place, which dumps the stack and ends the process without stopping what it started.
    """
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)
