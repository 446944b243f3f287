"""Workers without Ray, shared by the tests of a session."""

from collections.abc import Iterator

import pytest

from launched import Launch, workers


@pytest.fixture(scope="session")
def launch() -> Iterator[Launch]:
    """Runs cases on workers, which a process that is started here forks."""
    with workers() as run:
        yield run
