"""An endpoint comes up in a Ray of its own, and takes all of it away again."""

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil  # type: ignore[import-untyped]

from banjoray.config.job import JobConfig
from serve.trained import free_port, stock

SERVE = """
import sys
from banjoray.serving.app import serving
with serving(sys.argv[1], int(sys.argv[2]), lambda line: None) as url:
    print(url, flush=True)
    sys.stdin.readline()
print("closed", flush=True)
sys.stdin.readline()
"""


def told_of(process: psutil.Process) -> Iterator[str]:
    """The name and command line of a process; nothing of one that has just ended, as HAProxy's former one does."""
    with suppress(psutil.NoSuchProcess):
        yield f"{process.name()} {' '.join(process.cmdline())}"


def test_endpoint_closes_its_port_and_leaves_no_process_behind(
    tmp_path: Path, lively_job: Callable[..., JobConfig]
) -> None:
    shelf, port = stock(tmp_path, lively_job), free_port()
    command = [sys.executable, "-c", SERVE, str(shelf.config()), str(port)]
    # Ray's own parts start in a session of their own and would outlive this process's children: look at all of them.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            assert httpx.post(url, json={"inputs": "what a day"}, timeout=60).status_code == 200
            started = psutil.Process(server.pid).children(recursive=True)
            told = [line for process in started for line in told_of(process)]
            for part in ("raylet", "haproxy", "ServeReplica"):
                assert any(part in line for line in told)
            server.stdin.write("\n")
            server.stdin.flush()
            # Ray writes a line of its own here when Serve's controller goes.
            assert "closed\n" in iter(server.stdout.readline, "")
            # Ray tells them to end and does not wait for the last of them.
            _, alive = psutil.wait_procs(started, timeout=60)
            assert [process.name() for process in alive] == []
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0
        finally:
            server.kill()
