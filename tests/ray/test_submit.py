"""A job file goes to a cluster's job server as it is; its log, its answer and its exit code come back.

The cluster is one more Ray on this machine, with its dashboard on a free port.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from banjoray.cluster.submit import submit
from banjoray.errors import ClusterError, ConfigError
from banjoray.registry import Registry
from factories import make_job

SCRIPTS = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A job server, and the environment of somebody who may use it."""

    address: str
    environment: dict[str, str]

    def run(self, *command: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """A command, run in ``folder`` with `banjoray` and `ray` in its path."""
        program = str(SCRIPTS / command[0])
        return subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The job server of a Ray that this fixture starts, and ends with everything that runs in it."""
    environment = os.environ | {
        # Its jobs find the command `banjoray` there.
        "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
        # A job server runs what it is sent: this one only for those who know its token.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    # Every port that Ray would otherwise fix: another Ray on this machine, the tests' own too, holds some of them.
    ports = {
        name: free_port()
        for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    }
    log = tmp_path_factory.mktemp("head") / "head.log"
    # Ray's sockets are below this folder, and a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder, log.open("w") as file:
        command = [str(SCRIPTS / "ray"), "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1"]
        command += [f"--temp-dir={folder}", *(f"--{name}={number}" for name, number in ports.items())]
        head = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        try:
            _wait_until_answering(ports["dashboard-port"], head, log)
            yield Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", environment)
        finally:
            # Nothing here is worth the half minute that Ray takes to end its parts in order.
            started = psutil.Process(head.pid).children(recursive=True)
            for process in (head, *started):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()
            psutil.wait_procs(started)


def _wait_until_answering(port: int, head: "subprocess.Popen[bytes]", log: Path) -> None:
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert head.poll() is None, log.read_text()
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a job file, its rows and its base model, all named by paths inside it."""
    folder = tmp_path_factory.mktemp("project")
    tree = make_job(folder, train__epochs=1).to_json()
    tree["model"]["base"] = "base"
    tree["data"]["files"] = {split: f"data/{split}.jsonl" for split in ("train", "validation", "test")}
    tree["storage"], tree["registry"]["root"] = "./runs", "./registry"
    write_job(folder, tree, at_least=0.0)
    return folder


def write_job(folder: Path, tree: dict[str, Any], at_least: float) -> None:
    """The job file, with what its gate asks for."""
    tree["registry"]["gate"]["at_least"] = at_least
    (folder / "job.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where jobs leave what they make, as a shared disk would be."""
    return tmp_path_factory.mktemp("results")


def places(results: Path) -> list[str]:
    """The options that name them."""
    return ["--set", f"storage={results}/runs", "--set", f"registry.root={results}/registry"]


def answers(output: str) -> list[dict[str, Any]]:
    """The JSON objects in a text, one to a line."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def test_job_comes_back_with_the_exit_code_3_of_its_gate_and_then_with_its_result(
    cluster: Cluster, project: Path, results: Path
) -> None:
    command = ["banjoray", "submit", "job.yaml", "--address", cluster.address, *places(results)]
    tree = yaml.safe_load((project / "job.yaml").read_text())
    write_job(project, tree, at_least=0.999)
    refused = cluster.run(*command, folder=project)
    assert refused.returncode == 3, refused.stderr
    assert "error: registry.gate: f1_macro is 0." in refused.stderr
    assert "Traceback" not in refused.stderr
    assert refused.stdout == ""
    assert not (results / "registry/tiny").exists()

    # The run that the gate refused goes on, though the working directory is another one now.
    write_job(project, tree, at_least=0.0)
    done = cluster.run(*command, folder=project)
    assert done.returncode == 0, done.stderr
    (told,) = answers(done.stdout)
    assert answers(done.stderr) == [told]
    assert set(told) == {"run_id", "checkpoint", "version", "metrics", "steps", "seconds", "rows_per_s", "profile"}
    assert (told["version"], told["steps"]) == ("tiny@1", 6)
    assert f"continuing run {told['run_id']}" in done.stderr
    version = Registry(f"{results}/registry").resolve(told["version"])
    assert dict(version.metrics) == told["metrics"]
    assert version.lineage["run"] == told["run_id"]


def test_rays_own_job_command_runs_the_same_command(cluster: Cluster, project: Path, results: Path) -> None:
    entrypoint = ["banjoray", "train", "job.yaml", "--json", "--set", "name=plain", *places(results)]
    done = cluster.run(
        *["ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", *entrypoint], folder=project
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = answers(done.stdout)
    assert Registry(f"{results}/registry").resolve("plain@1").lineage["run"] == told["run_id"]


def test_job_server_that_refuses_the_caller_is_one_line_and_exit_code_1(
    cluster: Cluster, project: Path, results: Path
) -> None:
    command = ["banjoray", "submit", "job.yaml", "--address", cluster.address, *places(results)]
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}):
        done = cluster.run(*command, folder=project, **stranger)
        assert done.returncode == 1
        assert f"error: {cluster.address} refuses this command" in done.stderr
        assert "set RAY_AUTH_MODE=token" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([], r"storage: './runs' is relative; .* --set storage=/a/shared/path"),
        (["storage=/shared/runs"], r"registry\.root: './registry' is relative"),
        (["storage=s3://bucket/runs"], r"registry\.root: './registry' is relative"),
        (["train.epohcs=1"], r"unknown key 'train\.epohcs'; did you mean 'train\.epochs'\?"),
    ],
)
def test_job_that_cannot_run_elsewhere_is_refused_before_anything_is_sent(
    project: Path, monkeypatch: pytest.MonkeyPatch, values: list[str], says: str
) -> None:
    monkeypatch.chdir(project)
    with pytest.raises(ConfigError, match=says):
        submit("train", "job.yaml", f"http://127.0.0.1:{free_port()}", values, pytest.fail)


def test_job_file_outside_the_working_directory_is_refused(project: Path) -> None:
    values = ["storage=/shared/runs", "registry.root=/shared/registry"]
    with pytest.raises(ConfigError, match="inside the working directory"):
        submit("train", str(project / "job.yaml"), f"http://127.0.0.1:{free_port()}", values, pytest.fail)


def test_nobody_at_the_address_is_a_cluster_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    port = free_port()
    with pytest.raises(ClusterError, match=f"no Ray job server answers at http://127.0.0.1:{port}"):
        submit("train", "job.yaml", f"http://127.0.0.1:{port}", ["storage=/a", "registry.root=/b"], pytest.fail)
