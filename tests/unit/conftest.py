"""What unit tests share: nothing that they read or write outlives them."""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from banjoray.config.job import JobConfig
from factories import ARCHITECTURES, make_job, tiny_model


@pytest.fixture(autouse=True)
def asked_hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names that a test looks up in the network; a test that leaves any fails."""
    asked: list[str] = []

    def refuse(host: object, *_: object, **__: object) -> None:
        asked.append(str(host))
        raise OSError(f"a unit test looks for {host!r}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield asked
    assert asked == []


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps what it reads in a folder of this test session, not in the home folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A tiny base model of every family; tests leave the folders as they are."""
    root = tmp_path_factory.mktemp("bases")
    return {name: tiny_model(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def shared_job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    """A job that several tests read rows and models through; none trains it."""
    return make_job(tmp_path_factory.mktemp("job"))
