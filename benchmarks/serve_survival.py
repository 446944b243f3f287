"""Load at 80 % of capacity while replicas are killed and versions change: what is lost, wrong, or grows.

    python -m benchmarks.serve_survival [--registry FOLDER] [--seconds 600] [--kill-every 60] [--swaps 2]

`banjoray serve` with two replicas of one thread in fp32 and MiniLM, fine-tuned by the quickstart's job (or emotion@1,
and emotion@2 for swaps, of a registry). An open loop (`benchmarks.serve_open`) sends 80 % of the capacity that is left
when one replica is down: half of what a closed loop of 32 clients gets. Every minute a replica is killed; at
``--swaps`` moments `banjoray deploy` brings the other version. Every answer is compared with the label that
transformers alone, text by text, finds with the version that the answer names. A request is sent again where its
connection broke or it got 502, 503 or HAProxy's 500 before an answer, twice at most, and after a 429 when it says so.
Resident memory is that of all replicas, of HAProxy and of Serve's controller; both versions were held before the load
began. Ends with 1, and leaves no results file, unless none is lost, none wrong, and memory is flat. Results go to
benchmarks/results and, as one JSON line, to stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from benchmarks.serve_open import AGAIN
from benchmarks.serve_throughput import (
    ROOT,
    described,
    environment,
    free_port,
    labels,
    loaded,
    registry_of,
    run,
    server,
    texts_file,
    trained,
    version_of,
    written,
)

CLIENTS, WARMUP_S, SHARE, TRIES, REPLICAS = 32, 5.0, 0.8, 3, 2
KINDS = {"replica": "ServeReplica", "haproxy": "haproxy", "controller": "ServeController"}
# Serve gives replicas that HAProxy asks ports of these.
PORTS = range(30000, 31001)
# Of memory: what may be more at the end than at the start.
GROWTH, GROWTH_MIB = 0.1, 32.0


def main() -> int:
    """Serve, load, kill, swap, compare; 1 if it did not hold."""
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        texts, wanted = texts_file(options, place), place / "labels.json"
        registry = registry_of(options, place)
        if options.swaps and not options.registry:
            trained(place, "train.seed=1")
        known = {f"emotion@{path.name}": labels(path, texts) for path in (registry / "emotion").glob("[12]")}
        wanted.write_text(json.dumps(known), encoding="utf-8")
        result = described("serve_survival", options.name, texts) | {"version": version_of(registry)}
        result |= survival(options, registry, texts, wanted)
    return written(result, options, result["holds"])


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--registry", help="a folder with emotion@1 and @2; otherwise they are trained first")
    parser.add_argument("--texts", help="a file with a text per line")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--kill-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--swaps", type=int, default=2)
    parser.add_argument("--name", default="sample", help="what the results call the texts")
    parser.add_argument("--dry", action="store_true", help="write no results file")
    options = parser.parse_args()
    if options.registry and options.swaps and not Path(options.registry, "emotion", "2").exists():
        parser.error("--registry: no emotion@2 to swap with; add one that is not worse, or --swaps 0")
    return options


def survival(options: argparse.Namespace, registry: Path, texts: Path, wanted: Path) -> dict[str, Any]:
    """What came of it, and whether it holds."""
    port = free_port()
    case = {"contender": "banjoray", "registry": str(registry), "port": port, "args": {"precision": "fp32"}}
    with server(case | {"deployment": {"num_replicas": REPLICAS}}) as process:
        loaded(port, texts, 8, 0)
        loaded(port, texts, CLIENTS, WARMUP_S)
        whole = loaded(port, texts, CLIENTS, WARMUP_S)["requests_per_s"]
        capacity = round(whole * (REPLICAS - 1) / REPLICAS, 2)
        if options.swaps:
            banjoray("deploy", "emotion@2")
            banjoray("rollback", "emotion")
        load = {"port": port, "texts": str(texts), "labels": str(wanted), "tries": TRIES}
        load |= {"rate": SHARE * capacity, "seconds": options.seconds}
        command = [sys.executable, "-m", "benchmarks.serve_open", json.dumps(load)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()) as client:
            events, memory = during(options, psutil.Process(process.pid))
            told = json.loads(client.communicate()[0])
    checks = {
        "none_lost": told["lost"] == 0 and told["unsent"] == 0 and told["answered"] == told["sent"],
        "none_wrong": told["wrong"] == 0,
        "no_5xx_but_those_to_retry": set(told["statuses"]) <= {"200", "429"} | AGAIN,
        "memory_flat": all(flat(samples) for samples in memory.values()),
        "killed_and_swapped": len(events) >= options.seconds // options.kill_every - 1 + options.swaps,
    }
    return {
        "seconds": options.seconds,
        "replicas": REPLICAS,
        "capacity_of_all_per_s": whole,
        "capacity_per_s": capacity,
        "share": SHARE,
        "events": events,
        "load": told,
        "memory_mib": {kind: [round(statistics.median(part)) for part in ends(held)] for kind, held in memory.items()},
        "checks": checks,
        "holds": all(checks.values()),
    }


def during(options: argparse.Namespace, root: Any) -> tuple[list[str], dict[str, list[float]]]:
    """Kill and swap at their moments while the load goes on: what was done when, and MiB of each kind per second."""
    begun, events = time.monotonic(), list[str]()
    memory: dict[str, list[float]] = {kind: [] for kind in KINDS}
    kills = [options.kill_every * number for number in range(1, int(options.seconds // options.kill_every) + 1)]
    swaps = [options.seconds * number / (options.swaps + 1) for number in range(1, options.swaps + 1)]
    # The last replica that dies has time to be replaced.
    kills = [moment for moment in kills if moment < options.seconds - options.kill_every / 4]
    while (now := time.monotonic() - begun) < options.seconds:
        found = processes(root)
        # As on any other day, one replica is left when another dies.
        if kills and now >= kills[0] and sum(map(answers, found["replica"])) > 1:
            kills.pop(0)
            found["replica"][0].kill()
            events.append(f"{now:.0f} s: killed a replica")
        if swaps and now >= swaps[0]:
            swaps.pop(0)
            # The server began with emotion@1.
            version = 1 + (options.swaps - len(swaps)) % 2
            banjoray("deploy", f"emotion@{version}")
            events.append(f"{now:.0f} s: deployed emotion@{version}")
        for kind, members in found.items():
            if held := [size for member in members if (size := resident(member))]:
                memory[kind].append(max(held))
        time.sleep(1.0)
    return events, memory


def banjoray(*words: str) -> None:
    """A command that talks to the endpoint; raises CalledProcessError if it fails."""
    run([str(Path(sys.executable).with_name("banjoray")), *words])


def processes(root: Any) -> dict[str, list[Any]]:
    """The server's processes by kind, oldest first."""
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for process in root.children(recursive=True):
        try:
            command, begun = " ".join([process.name(), *process.cmdline()]), process.create_time()
        except psutil.Error:
            continue
        for kind, word in KINDS.items():
            if word in command and "HAProxyManager" not in command:
                found[kind].append((begun, process.pid, process))
    return {kind: [process for *_, process in sorted(members)] for kind, members in found.items()}


def answers(process: Any) -> bool:
    """Whether a replica listens on the port where HAProxy asks it, which it does once its model is loaded."""
    try:
        return any(link.status == psutil.CONN_LISTEN and link.laddr.port in PORTS for link in process.net_connections())
    except psutil.Error:
        return False


def resident(process: Any) -> float:
    """MiB of a process; 0 if it is gone."""
    try:
        return float(process.memory_info().rss) / 2**20
    except psutil.Error:
        return 0.0


def ends(held: list[float]) -> tuple[list[float], list[float]]:
    """The first fifth of some samples, after a tenth that is for warming up, and the last."""
    fifth = max(1, len(held) // 5)
    return held[len(held) // 10 :][:fifth] or [0.0], held[-fifth:] or [0.0]


def flat(held: list[float]) -> bool:
    """Whether memory is at the end what it was at the start."""
    first, last = map(statistics.median, ends(held))
    return last <= first * (1 + GROWTH) + GROWTH_MIB


if __name__ == "__main__":
    sys.exit(main())
