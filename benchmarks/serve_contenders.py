"""One server of the serving benchmark, run as a process of its own: one replica, one thread.

    python -m benchmarks.serve_contenders '{"contender": "banjoray", "folder": ..., "registry": ..., "port": 8123}'

It prints a line when it answers, and ends when its input is closed.
"""

import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
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
    """`banjoray serve` with a replica of one CPU."""
    import yaml

    from banjoray.serving.app import serving

    application = {
        "name": "emotion",
        "route_prefix": "/",
        "import_path": "banjoray.serving.app:build",
        "args": {"model": "emotion@1", "registry": case["registry"]} | args,
        "deployments": [{"name": "Endpoint", "max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 1}}],
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
def litserve(case: dict[str, Any], short: bool = False) -> Iterator[None]:
    """LitServe with batching, one worker."""
    import litserve as ls
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    class Classifier(ls.LitAPI):  # type: ignore[misc]
        """Tokenises a batch, pads it to its longest, and answers the best label of each."""

        def setup(self, device: str) -> None:
            torch.set_num_threads(1)
            self._tokenizer = AutoTokenizer.from_pretrained(case["folder"])
            model = AutoModelForSequenceClassification.from_pretrained(case["folder"]).eval().to(device)
            self._model = model.to(torch.bfloat16) if short else model

        def decode_request(self, request: dict[str, str]) -> str:
            return request["inputs"]

        def batch(self, inputs: Sequence[str]) -> list[str]:
            return list(inputs)

        def unbatch(self, output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            return list(output)

        def predict(self, texts: list[str]) -> list[dict[str, Any]]:
            batch = self._tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            with torch.inference_mode():
                scores, best = self._model(**batch).logits.float().softmax(-1).max(-1)
            names = self._model.config.id2label
            return [
                {"label": names[label], "score": score}
                for label, score in zip(best.tolist(), scores.tolist(), strict=True)
            ]

        def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
            return output

    api = Classifier(max_batch_size=PEER_BATCH, batch_timeout=PEER_WAIT_S, api_path="/")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=1)
    port: int = case["port"]
    with _running(lambda: server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error"), port):
        yield


@contextmanager
def litserve_bf16(case: dict[str, Any]) -> Iterator[None]:
    """The same with weights in bf16."""
    with litserve(case, short=True):
        yield


@contextmanager
def _running(serve: Callable[[], None], port: int) -> Iterator[None]:
    """A server in a process of its own, from when it listens; it is told to end afterwards with all that it started."""
    process: BaseProcess = multiprocessing.get_context("fork").Process(target=serve)
    process.start()
    try:
        until = time.monotonic() + PATIENCE_S
        while not _listens(port):
            if not process.is_alive() or time.monotonic() > until:
                raise SystemExit(f"nobody listens on port {port}")
            time.sleep(0.1)
        yield
    finally:
        assert process.pid is not None
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for member in alive:
            member.kill()
        process.join()


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
