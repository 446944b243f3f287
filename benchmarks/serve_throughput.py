"""Requests per second of one replica with one thread: banjoray beside a pipeline in Ray Serve and beside LitServe.

    python -m benchmarks.serve_throughput [--registry FOLDER] [--texts texts.txt] [--rounds 3] [--seconds 5]

The model is MiniLM, fine-tuned by the quickstart's job, or emotion@1 of a registry; texts are those of the sample set's
test rows, or the lines of a file. Every contender (`--only banjoray,litserve`: of these) runs in a process of its own,
in turn, round after round; the client is another process, in a closed loop at concurrency 1 and 32, then at 32 with 5 %
texts of 400 words among the short ones: p99_ms_mixed is what those do to the short ones. Speeds are told only if the
contenders answer alike: one that gives another label than the checkpoint in fp32 (transformers alone, text by text) for
more than half a per cent of the texts ends the script with exit code 1 and leaves no results file. Results go to
benchmarks/results and, as one JSON line, to stdout; progress goes to stderr. Times of a machine that does other work
are worth nothing; load_before says how busy it was.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from benchmarks.serve_contenders import CONTENDERS, MAX_LENGTH, PEER_BATCH, PEER_WAIT_S
from benchmarks.train_throughput import machine

from banjoray.data.sources import SHIPPED
from banjoray.registry import Registry

ROOT = Path(__file__).parents[1]
CONCURRENCY = (1, 32)
SAME = 0.995
SETTINGS = {
    "banjoray": "`banjoray serve`, defaults (engine: auto)",
    "banjoray_fp32": "`banjoray serve`, engine: torch, precision: fp32",
    "serve_pipeline": "transformers' pipeline in a Ray Serve deployment",
    "litserve": f"LitServe, fp32, batches of up to {PEER_BATCH} within {1000 * PEER_WAIT_S:g} ms",
    "litserve_bf16": f"LitServe, bf16, batches of up to {PEER_BATCH} within {1000 * PEER_WAIT_S:g} ms",
}
PACKAGES = ("banjoray", "ray", "torch", "transformers", "onnxruntime")


def main() -> int:
    """Train, serve in turn, compare, write; 1 if the contenders don't agree."""
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        texts = texts_file(options, place)
        registry = registry_of(options, place)
        wanted = labels(registry / "emotion" / "1", texts)
        found, engine = rounds(options, registry, texts, wanted)
        result = facts(options, texts) | {"version": version_of(registry), "engine": engine}
    contenders = {name: summary(told) | {"settings": SETTINGS[name]} for name, told in found.items()}
    if engine:
        chosen = f"auto, here {engine['engine']} {engine['precision']}"
        contenders["banjoray"] |= {"settings": SETTINGS["banjoray"].replace("auto", chosen)}
    agrees = all(told["same_labels"] >= SAME for told in contenders.values())
    result |= {"contenders": compared(contenders), "agrees": agrees}
    return written(result, options, agrees)


def written(result: dict[str, Any], options: argparse.Namespace, good: bool) -> int:
    """The script's exit code; the result is on stdout, and in benchmarks/results if it is good and no dry run."""
    if good and not options.dry:
        path = ROOT / "benchmarks" / "results" / f"{result['benchmark']}_{options.name}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(not good)


def texts_file(options: argparse.Namespace, folder: Path) -> Path:
    """The texts that are asked, as a JSON file in a folder."""
    file = folder / "texts.json"
    file.write_text(json.dumps(read_texts(options.texts)), encoding="utf-8")
    return file


def parsed() -> argparse.Namespace:
    """The options; ``only`` as the list of contenders that run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", help="a folder with emotion@1; otherwise that is trained first")
    parser.add_argument("--texts", help="a file with a text per line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--only", help="names of contenders, with commas between")
    parser.add_argument("--name", default="sample", help="what the results call the texts")
    parser.add_argument("--dry", action="store_true", help="write no results file")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds is at least 1, --seconds above 0")
    asked = options.only.split(",") if options.only else list(CONTENDERS)
    if strange := sorted(set(asked) - set(CONTENDERS)):
        parser.error(f"--only: no {', '.join(strange)} here; there is {', '.join(CONTENDERS)}")
    options.only = [name for name in CONTENDERS if name in asked]
    return options


def read_texts(file: str | None) -> list[str]:
    """The lines of a file, or the texts of the sample's test rows."""
    if file:
        return [line for line in Path(file).read_text(encoding="utf-8").split("\n") if line.strip()]
    lines = (SHIPPED / "emotion" / "test.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def registry_of(options: argparse.Namespace, folder: Path) -> Path:
    """A registry in a folder: a copy of the one that was named, without what was chosen on other days, or a new one."""
    if not options.registry:
        return trained(folder)
    return Path(shutil.copytree(options.registry, folder / "registry", ignore=shutil.ignore_patterns(".engines")))


def version_of(registry: Path) -> dict[str, Any]:
    """What a registry's manifest says of emotion@1: which model was served."""
    found = Registry(str(registry)).resolve("emotion@1")
    return {"digest": found.digest, "metrics": dict(found.metrics), "lineage": dict(found.lineage)}


def trained(folder: Path, *changes: str) -> Path:
    """A registry with emotion@1, or the next version, from the quickstart's job with one worker."""
    registry = folder / "registry"
    values = [
        f"registry.root={registry}",
        f"storage={folder / 'runs'}",
        "scale.workers=1",
        f"data.max_length={MAX_LENGTH}",
        *changes,
    ]
    command = [sys.executable, "-m", "banjoray.cli", "train", str(ROOT / "jobs" / "quickstart.yaml")]
    run(command + [part for value in values for part in ("--set", value)])
    return registry


def labels(folder: Path, texts: Path) -> list[str]:
    """The checkpoint's own label of every text: transformers in fp32, one at a time."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in json.loads(texts.read_text(encoding="utf-8")):
        with torch.inference_mode():
            logits = model(**tokenizer(text, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")).logits
        found.append(str(model.config.id2label[int(logits.argmax())]))
    return found


def rounds(
    options: argparse.Namespace, registry: Path, texts: Path, wanted: list[str]
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Any]]:
    """What every contender gave in every round, and what banjoray said of the engine that it chose.

    Asking every text once comes first, and warms a contender up.
    """
    engine: dict[str, Any] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for number in range(1, options.rounds + 1):
        for name in options.only:
            port = free_port()
            case = {"contender": name, "folder": str(registry / "emotion" / "1"), "registry": str(registry)}
            # None of the others refuses what waits for long.
            case["args"] = {"latency_target_ms": 60_000}
            with server(case | {"port": port}):
                given = loaded(port, texts, 8, 0)["labels"]
                if name == "banjoray":
                    engine = httpx.get(f"http://127.0.0.1:{port}/").json()["engine"]
                    print(f"engine  {engine}", file=sys.stderr)
                told = {"same_labels": statistics.mean(a == b for a, b in zip(given, wanted, strict=True))}
                for connections in CONCURRENCY:
                    one = loaded(port, texts, connections, options.seconds)
                    told |= {f"{key}_at_{connections}": one[key] for key in ("requests_per_s", "p50_ms", "p99_ms")}
                told["p99_ms_mixed"] = loaded(port, texts, CONCURRENCY[-1], options.seconds, long=True)["p99_ms"]
            print(f"round {number}  {name}  {told}", file=sys.stderr)
            found[name].append(told)
    return found, engine


@contextmanager
def server(case: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """The process of a contender that answers while the block runs; its log is shown only if it does not come up."""
    command = [sys.executable, "-m", "benchmarks.serve_contenders", json.dumps(case)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment()
        )
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            if not any(line.strip() == "answering" for line in process.stdout):
                log.seek(0)
                raise SystemExit(f"{case['contender']} did not come up:\n{log.read()[-4000:]}")
            yield process
        finally:
            process.stdin.close()
            process.wait(120)


def loaded(port: int, texts: Path, connections: int, seconds: float, long: bool = False) -> dict[str, Any]:
    """What a load told."""
    case = {"port": port, "texts": str(texts), "connections": connections, "seconds": seconds, "long": long}
    told: dict[str, Any] = json.loads(run([sys.executable, "-m", "benchmarks.serve_load", json.dumps(case)]))
    return told


def run(command: list[str]) -> str:
    """A command's output; its log is shown only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def environment() -> dict[str, str]:
    """One thread for whoever computes, no hub, and a Ray of its own."""
    found = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return found | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def summary(told: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of a contender's rounds."""
    return {key: round(statistics.median(one[key] for one in told), 4) for key in told[0]}


def compared(contenders: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Contenders with ``banjoray_is``: how many times as many requests per second it answers at the higher load."""
    key = f"requests_per_s_at_{CONCURRENCY[-1]}"
    if "banjoray" not in contenders:
        return contenders
    ours = contenders["banjoray"][key]
    return {name: told | {"banjoray_is": round(ours / told[key], 3)} for name, told in contenders.items()}


def facts(options: argparse.Namespace, texts: Path) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    told = described("serve_throughput", options.name, texts)
    told["versions"] |= {"litserve": version("litserve")}
    return told | {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "settings": {"threads": 1, "replicas": 1, "concurrency": CONCURRENCY, "max_length": MAX_LENGTH},
    }


def described(benchmark: str, name: str, texts: Path) -> dict[str, Any]:
    """A benchmark's name and texts, the machine, versions and commit."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    return {
        "benchmark": benchmark,
        "data": f"{name}, {len(json.loads(texts.read_text(encoding='utf-8')))} texts, MiniLM",
        "machine": machine(False),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "commit": commit,
    }


if __name__ == "__main__":
    sys.exit(main())
