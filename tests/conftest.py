"""What several test files share: one Ray on this machine, caches of its own, and a model that tells texts apart."""

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.serving import ingress
from banjoray.training.local_ray import environment
from factories import make_job, tiny_model

CPUS = 4

_caches: list[str] = []


def pytest_configure() -> None:
    """Keep what `datasets` reads out of the home folder, here and in every process that a test starts.

    It looks for its cache's place when it is first imported, which test modules do.
    """
    _caches.append(tempfile.mkdtemp(prefix="banjoray-datasets-"))
    os.environ["HF_DATASETS_CACHE"] = _caches[0]
    # Before torch is imported: threads that spin while they wait take the cores from Ray's workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # As a command does.
    gc.set_threshold(50_000, 20, 20)


def pytest_unconfigure() -> None:
    """Remove the cache, and end without a last look for garbage."""
    gc.freeze()
    for cache in _caches:
        shutil.rmtree(cache, ignore_errors=True)


def cpu_environment() -> dict[str, str]:
    """What `banjoray train` would put into the environment of a CPU job's workers."""
    from banjoray.training.run import worker_environment

    tree = {"name": "any", "task": "text-classification", "data": {"source": "banjoray:emotion"}}
    return worker_environment(validate(JobConfig, tree | {"hub": {"offline": True}}, "test job"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this test session alone, with more logical CPUs than a small machine has: tiny models wait, not work."""
    import ray

    told = cpu_environment()
    with pytest.MonkeyPatch.context() as patch:
        # In the test process too, where DeepSpeed and the tokenizers read theirs.
        for name, value in told.items():
            patch.setenv(name, value)
        # As `banjoray serve` starts it, so that what tests ask goes through HAProxy where its program is there.
        with environment({} if ingress.haproxy() else ingress.fast_path()):
            ray.init(
                address="local",
                num_cpus=CPUS,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": told},
            )
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def lively_model() -> Callable[..., Path]:
    """Makes `factories.tiny_model` with larger weights, and with a table of ``words`` words if given.

    With weights as small as BERT's, 32 wide and 3 deep, all texts get the same answer to four digits: every row could
    be mixed up with every other, and no test of an answer would notice.
    """

    def make(folder: Path, words: int | None = None) -> Path:
        import torch
        from transformers import AutoConfig, AutoModel

        tiny_model(folder)
        config = AutoConfig.from_pretrained(folder, initializer_range=0.3)
        config.vocab_size = words or config.vocab_size
        torch.manual_seed(7)
        AutoModel.from_config(config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def lively_job(lively_model: Callable[..., Path]) -> Callable[..., JobConfig]:
    """`factories.make_job` on a lively model."""

    def make(folder: Path, **changes: Any) -> JobConfig:
        if not (folder / "base").exists():
            lively_model(folder / "base")
        return make_job(folder, **changes)

    return make
