"""When a process looks for garbage: not while it imports torch, transformers and Ray."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class _Pause:
    """How many blocks of this process are in it, in whichever threads, and whether it was on before the first."""

    lock = Lock()
    blocks = 0
    on = False


@contextmanager
def collect_later() -> Iterator[None]:
    """Nothing looks for garbage while the block, or the function that is decorated, runs.

    Python (3.11) looks after every 700 new objects that hold others. These modules are half a million of them, none is
    garbage, and looking is a fifth of the time of importing them. What was off before stays off; blocks may overlap.
    """
    with _Pause.lock:
        if not _Pause.blocks:
            _Pause.on = gc.isenabled()
            gc.disable()
        _Pause.blocks += 1
    try:
        yield
    finally:
        with _Pause.lock:
            _Pause.blocks -= 1
            if not _Pause.blocks and _Pause.on:
                gc.enable()
