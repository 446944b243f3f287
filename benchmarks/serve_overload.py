"""What a replica does with five times the requests that it can answer: which it takes, how fast, what the others get.

    python -m benchmarks.serve_overload [--registry FOLDER] [--times 5] [--seconds 30] [--target-ms 1000]

`banjoray serve` with one replica of one thread and MiniLM, fine-tuned by the quickstart's job, or emotion@1 of a
registry. Capacity is what a closed loop of 32 clients gets; then an open loop sends a multiple of it
(`benchmarks.serve_open`).
Ends with 1, and leaves no results file, unless accepted requests keep their p99 within twice the target, all others
get 429, and 5 s later the endpoint is healthy. Results go to benchmarks/results and, as one JSON line, to stdout.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from benchmarks.serve_throughput import (
    described,
    free_port,
    loaded,
    registry_of,
    run,
    server,
    texts_file,
    version_of,
    written,
)

CLIENTS, WARMUP_S = 32, 5.0
AFTER_S = 5.0


def main() -> int:
    """Serve, measure what it can, send too much, look again; 1 if it did not hold."""
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        texts = texts_file(options, place)
        registry = registry_of(options, place)
        result = described("serve_overload", options.name, texts) | {"version": version_of(registry)}
        result |= overload(options, registry, texts)
    return written(result, options, result["holds"])


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", help="a folder with emotion@1; otherwise that is trained first")
    parser.add_argument("--texts", help="a file with a text per line")
    parser.add_argument("--times", type=float, default=5.0, help="of capacity")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--target-ms", type=float, default=1000.0, help="latency_target_ms")
    parser.add_argument("--name", default="sample", help="what the results call the texts")
    parser.add_argument("--dry", action="store_true", help="write no results file")
    return parser.parse_args()


def overload(options: argparse.Namespace, registry: Path, texts: Path) -> dict[str, Any]:
    """What came of it, and whether it holds."""
    port = free_port()
    case = {"contender": "banjoray", "registry": str(registry), "port": port}
    with server(case | {"args": {"latency_target_ms": options.target_ms}}):
        loaded(port, texts, 8, 0)
        loaded(port, texts, CLIENTS, WARMUP_S)
        capacity = loaded(port, texts, CLIENTS, WARMUP_S)["requests_per_s"]
        load = {"port": port, "texts": str(texts), "rate": options.times * capacity, "seconds": options.seconds}
        told = json.loads(run([sys.executable, "-m", "benchmarks.serve_open", json.dumps(load)]))
        time.sleep(AFTER_S)
        later = health(port, json.loads(texts.read_text(encoding="utf-8"))[:20])
    statuses = told["statuses"]
    holds = {
        "p99_within_twice_the_target": told["answered_p99_ms"] <= 2 * options.target_ms,
        "others_get_429": set(statuses) <= {"200", "429"} and not told["unsent"],
        "healthy_later": later["healthz"] == 200 and later["slowest_ms"] <= options.target_ms,
    }
    return {
        "seconds": options.seconds,
        "target_ms": options.target_ms,
        "capacity_per_s": capacity,
        "times": options.times,
        "refused_share": round(statuses.get("429", 0) / max(1, told["sent"]), 3),
        "answered_per_s": round(told["answered"] / options.seconds, 1),
        "load": told,
        "later": later,
        "checks": holds,
        "holds": all(holds.values()),
    }


def health(port: int, texts: list[str]) -> dict[str, float]:
    """The status of /healthz, and how long the slowest of some texts takes, one after the other."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        status = client.get("/healthz").status_code
        times = []
        for text in texts:
            began = time.perf_counter()
            client.post("/", json={"inputs": text}).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
    return {"healthz": status, "p50_ms": round(sorted(times)[len(times) // 2], 2), "slowest_ms": round(max(times), 2)}


if __name__ == "__main__":
    sys.exit(main())
