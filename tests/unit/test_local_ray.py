"""What Ray's own processes are told where a command starts them: of a run's own cluster, and of no other."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ray
from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.training.local_ray import QUIET
from banjoray.training.run import _same_machine, cluster

JOB = {"name": "any", "task": "text-classification", "data": {"source": "banjoray:emotion"}}
# Where Ray's Python processes keep what they read of QUIET.
READ = """
import json
from ray._private import log_monitor, ray_constants
from ray.dashboard.modules.reporter import reporter_consts
print(json.dumps([
    log_monitor.LOG_NAME_UPDATE_INTERVAL_S,
    log_monitor.RAY_LOG_MONITOR_MANY_FILES_THRESHOLD,
    ray_constants.LOG_MONITOR_MAX_OPEN_FILES,
    reporter_consts.REPORTER_UPDATE_INTERVAL_MS,
]))
"""
# A run's own cluster, and the variables that its processes have.
START = """
import json
import psutil
from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.training.run import cluster
found = []
with cluster(validate(JobConfig, json.loads(JOB), "test job"), print):
    for each in psutil.Process().children(recursive=True):
        try:
            found.append([" ".join(each.cmdline()), each.environ()])
        except psutil.NoSuchProcess:
            # Some help Ray to start, and end.
            continue
print(json.dumps(found))
"""


@pytest.mark.parametrize("address", [None, "ray://elsewhere:10001"])
def test_ray_starts_quiet_for_a_run_and_is_joined_as_it_is(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    def stop(**_: Any) -> None:
        seen.append(dict(os.environ))
        raise InterruptedError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", stop)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_event_stats", "1")
    before = dict(os.environ)
    with pytest.raises(InterruptedError), cluster(validate(JobConfig, JOB, "test job"), print):
        pytest.fail("Ray did not start")
    told = {} if address else QUIET
    # What the user has set stays.
    assert seen == [before | told | {"RAY_event_stats": "1"}]
    assert dict(os.environ) == before


def test_the_processes_of_a_run_s_own_ray_are_told_to_be_quiet() -> None:
    loud = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS" and name not in QUIET}
    code = START.replace("JOB", repr(json.dumps(JOB | {"scale": {"cpus_per_worker": 1}})))
    run = subprocess.run(
        [sys.executable, "-c", code], env=loud, capture_output=True, text=True, check=True, timeout=240
    )
    started: list[tuple[str, dict[str, str]]] = json.loads(run.stdout.splitlines()[-1])
    for name in ("gcs_server", "raylet/raylet", "log_monitor.py"):
        told = [environment for command, environment in started if name in command.split("--")[0]]
        assert told
        assert all(QUIET.items() <= environment.items() for environment in told)


def test_the_ray_that_is_installed_reads_every_variable() -> None:
    """A Ray that gives one another name would be as loud as before, and nothing else would tell."""
    run = subprocess.run(
        [sys.executable, "-c", READ], env=os.environ | QUIET, capture_output=True, text=True, check=True, timeout=120
    )
    assert json.loads(run.stdout) == [60.0, 0, 0, 600000]
    # As whole words between the zeros of C: one of these is how another begins.
    raylet = Path(ray.__file__).parent.joinpath("core/src/ray/raylet/raylet").read_bytes()
    native = [name for name in QUIET if name.startswith("RAY_") and "LOG_MONITOR" not in name]
    assert len(native) + len(json.loads(run.stdout)) == len(QUIET)
    assert [name for name in native if f"\0{name}\0".encode() not in raylet] == []


def node(**changes: Any) -> dict[str, Any]:
    """What Ray says of a node, which is this machine unless told otherwise."""
    return {"Alive": True, "NodeManagerHostname": socket.gethostname(), "Resources": {"CPU": 2.0}} | changes


@pytest.mark.parametrize(
    ("nodes", "gpus", "same"),
    [
        ([node()], 0, True),
        ([node(), node(Alive=False)], 0, True),
        ([node(), node()], 0, False),
        ([node()], 1, False),
        ([node(NodeManagerHostname="elsewhere")], 0, False),
        # A head that runs nothing, whose workers are still to come.
        ([node(Resources={"CPU": 0.0})], 0, False),
        ([node(Resources={})], 0, False),
    ],
)
def test_a_command_scores_what_it_trained_only_where_a_worker_would(
    nodes: list[dict[str, Any]], gpus: int, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    job = validate(JobConfig, JOB | {"scale": {"gpus_per_worker": gpus}}, "test job")
    assert _same_machine(job) is same
