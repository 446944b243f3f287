"""One server of the serving benchmark, run as a process of its own: one replica, one thread.

    python -m benchmarks.serve_contenders '{"contender": "banjoray", "folder": ..., "registry": ..., "port": 8123}'

It prints a line when it answers, and ends when its input is closed.
"""

import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

# Rows of LitServe's batches, and how long it waits for them.
PEER_BATCH, PEER_WAIT_S = 32, 0.005
# Longer texts are cut.
MAX_LENGTH = 512
PATIENCE_S = 120.0


def main() -> None:
    """Serve until the input ends."""
    case = json.loads(sys.argv[1])
    with CONTENDERS[case["contender"]](case):
        print("answering", flush=True)
        sys.stdin.read()


@contextmanager
def banjoray(case: dict[str, Any], **args: str) -> Iterator[None]:
    """`banjoray serve` with a replica of one CPU; the case may have other args, and settings of the deployment."""
    import yaml

    from banjoray.serving.app import serving

    application = {
        "name": "emotion",
        "route_prefix": "/",
        "import_path": "banjoray.serving.app:build",
        "args": {"model": "emotion@1", "registry": case["registry"]} | case.get("args", {}) | args,
        "deployments": [{"name": "Endpoint", "ray_actor_options": {"num_cpus": 1}} | case.get("deployment", {})],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "serve.yaml")
        file.write_text(yaml.safe_dump({"applications": [application]}), encoding="utf-8")
        with serving(file, case["port"], lambda line: print(line, file=sys.stderr)):
            yield


@contextmanager
def banjoray_fp32(case: dict[str, Any]) -> Iterator[None]:
    """The same with torch in fp32."""
    with banjoray(case, engine="torch", precision="fp32"):
        yield


@contextmanager
def serve_pipeline(case: dict[str, Any]) -> Iterator[None]:
    """A pipeline in a deployment, as Ray Serve's documentation begins."""
    import ray
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=256)
    class Classifier:
        def __init__(self, folder: str) -> None:
            from transformers import pipeline

            self._model = pipeline("text-classification", model=folder)

        async def __call__(self, request: Any) -> Any:
            return self._model((await request.json())["inputs"], truncation=True, max_length=MAX_LENGTH)

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": case["port"]})
    serve.run(Classifier.bind(case["folder"]))  # type: ignore[attr-defined]
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def litserve(case: dict[str, Any], precision: str = "fp32") -> Iterator[None]:
    """LitServe with batching, one worker; told to end afterwards with all that it started."""
    command = [sys.executable, "-m", "benchmarks.serve_litserve", case["folder"], str(case["port"]), precision]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            until = time.monotonic() + PATIENCE_S
            while not _listens(case["port"]):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"nobody listens on port {case['port']}")
                time.sleep(0.1)
            yield
        finally:
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for member in (process, *family):
                member.terminate()
            _, alive = psutil.wait_procs(family, timeout=10)
            for member in alive:
                member.kill()


@contextmanager
def litserve_bf16(case: dict[str, Any]) -> Iterator[None]:
    """The same with weights in bf16."""
    with litserve(case, "bf16"):
        yield


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


CONTENDERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "banjoray": banjoray,
    "banjoray_fp32": banjoray_fp32,
    "serve_pipeline": serve_pipeline,
    "litserve": litserve,
    "litserve_bf16": litserve_bf16,
}

if __name__ == "__main__":
    main()
