"""When a process looks for garbage."""

import gc
import threading

import pytest

from banjoray.garbage import collect_later


def test_nothing_is_collected_in_the_block_and_again_after_it_whatever_happens_there() -> None:
    @collect_later()
    def breaks() -> None:
        seen.append(gc.isenabled())
        raise KeyError

    seen = [gc.isenabled()]
    with pytest.raises(KeyError):
        breaks()
    assert [*seen, gc.isenabled()] == [True, False, True]


def test_a_function_may_be_the_block_each_time_that_it_is_called() -> None:
    @collect_later()
    def looks() -> bool:
        return gc.isenabled()

    assert [looks(), gc.isenabled(), looks(), gc.isenabled()] == [False, True, False, True]


def test_blocks_of_two_threads_overlap() -> None:
    inside, left = threading.Event(), threading.Event()

    def other() -> None:
        with collect_later():
            inside.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    with collect_later():
        thread.start()
        assert inside.wait(60)
    assert not gc.isenabled()
    left.set()
    thread.join()
    assert gc.isenabled()


def test_what_was_off_stays_off() -> None:
    gc.disable()
    try:
        with collect_later(), collect_later():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
