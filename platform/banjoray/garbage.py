"""When a process looks for garbage: not while it imports torch, transformers and Ray."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collect_later() -> Iterator[None]:
    """Nothing looks for garbage while the block, or the function that is decorated, runs.

    Python looks after every 700 new objects that hold others. Modules are a million of them, none is garbage, and
    looking is a fifth of the time of importing them. What was off before stays off.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
