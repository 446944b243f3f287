"""An endpoint that nobody asks has no replica, and the next request waits for one."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from banjoray.cluster.deploy import Place, deploy
from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.errors import ClusterError
from banjoray.serving.app import serving
from ray import serve
from serve.trained import Shelf, free_port, stock

ZERO = {
    "min_replicas": 0,
    "initial_replicas": 1,
    "max_replicas": 1,
    "upscale_delay_s": 0,
    "downscale_to_zero_delay_s": 1,
    "look_back_period_s": 11,
}


def scaled(shelf: Shelf) -> Path:
    """A serve config that scales to zero."""
    file = shelf.config(access_log=False)
    whole: Any = yaml.safe_load(file.read_text())
    whole["applications"][0]["deployments"][0]["autoscaling_config"] = ZERO
    file.write_text(yaml.safe_dump(whole))
    return file


def running() -> int:
    """How many replicas there are, whatever their state."""
    return sum(serve.status().applications["tiny"].deployments["Endpoint"].replica_states.values())


@pytest.mark.usefixtures("local_ray")
def test_the_last_replica_goes_and_comes_back_with_the_next_request(
    tmp_path: Path, lively_job: Callable[..., JobConfig]
) -> None:
    shelf = stock(tmp_path, lively_job)
    asked = {"inputs": "what a lovely surprise"}
    with serving(scaled(shelf), free_port(), lambda _: None) as url:
        before = httpx.post(url, json=asked, timeout=60)
        assert before.status_code == 200
        place = Place("tiny", validate(ServeConfig, {"model": "tiny@1"}, "args"))
        assert place.wanted() == 1
        until = time.monotonic() + 60
        while running() and time.monotonic() < until:
            time.sleep(0.1)
        assert running() == 0
        assert place.wanted() == 0
        with pytest.raises(ClusterError, match="no replica is running, it is scaled to zero; send it a request"):
            deploy("tiny@2", "production", {}, ("auto", None), lambda _: None)
        again = httpx.post(url, json=asked, timeout=120)
        assert (again.status_code, again.json()) == (200, before.json())
        assert place.settled() == 1
        with pytest.raises(ClusterError, match="application other: it is not deployed any more"):
            Place("other", place.config).wanted()
