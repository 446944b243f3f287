"""Four heads over one frozen backbone in one replica, with what they share computed and held once, and apart.

    python -m benchmarks.serve_many [--texts texts.txt] [--rounds 3] [--seconds 5] [--only shared,apart]

The backbone is MiniLM, the heads are fresh ones of six labels: what a pass costs does not depend on what they learned.
Every contender runs in a process of its own, in turn, round after round, without HTTP: a closed loop of 32 clients in
the replica's event loop, one thread for passes. In the load `each` a client asks one model, the next one at every
request; in `all` it asks all four about a text at once, and that counts as four requests. Outputs are compared first:
contenders in fp32 that differ from a model alone by more than 1e-4 end the script with exit code 1 and leave no results
file. Results go to benchmarks/results and, as one JSON line, to stdout; progress goes to stderr. Memory is that of the
process, after the loads. Beside other programs, cpu_ms (per request) says more than requests_per_s.
"""

import argparse
import asyncio
import ctypes
import gc
import json
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from benchmarks.serve_throughput import ROOT, described, run, summary, texts_file, written

NAMES = ("a", "b", "c", "d")
CLIENTS = 32
BOUND = 1e-4
# Engine, precision, and whether the versions are in one replica's groups.
CONTENDERS: dict[str, tuple[str, str, bool]] = {
    "shared": ("torch", "fp32", True),
    "apart": ("torch", "fp32", False),
    "shared_bf16": ("torch", "bf16", True),
    "apart_bf16": ("torch", "bf16", False),
    "onnx_fp32": ("onnx", "fp32", False),
    "onnx_int8": ("onnx", "int8", False),
}


def main() -> int:
    """Run the contenders in turn, compare, write; 1 if outputs differ."""
    options = parsed()
    if options.case:
        print(json.dumps(asyncio.run(told(json.loads(options.case)))))
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        texts = texts_file(options, Path(folder))
        result = described("serve_many", options.name, texts) | {
            "rounds": options.rounds,
            "seconds": options.seconds,
            "settings": {"heads": len(NAMES), "threads": 1, "requests_at_once": CLIENTS},
        }
        for number in range(1, options.rounds + 1):
            for name in options.only:
                case = {"contender": name, "texts": str(texts), "folder": folder, "seconds": options.seconds}
                given = run([sys.executable, "-m", "benchmarks.serve_many", "--case", json.dumps(case)])
                found[name].append(json.loads(given.splitlines()[-1]))
                print(f"round {number}  {name}  {found[name][-1]}", file=sys.stderr)
    contenders = {name: summary(each) | {"settings": settings(name)} for name, each in found.items()}
    plain = [each["differs_by"] for name in found for each in found[name] if CONTENDERS[name][:2] == ("torch", "fp32")]
    result |= {"contenders": contenders, "differs_by": max(plain, default=0.0)}
    result["agrees"] = result["differs_by"] <= BOUND
    return written(result, options, result["agrees"])


def parsed() -> argparse.Namespace:
    """The options; ``only`` as the list of contenders that run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", help="a file with a text per line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load")
    parser.add_argument("--only", help="names of contenders, with commas between")
    parser.add_argument("--name", default="sample", help="what the results call the texts")
    parser.add_argument("--dry", action="store_true", help="write no results file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    asked = options.only.split(",") if options.only else list(CONTENDERS)
    if strange := sorted(set(asked) - set(CONTENDERS)):
        parser.error(f"--only: no {', '.join(strange)} here; there is {', '.join(CONTENDERS)}")
    options.only = [name for name in CONTENDERS if name in asked]
    return options


async def told(case: dict[str, Any]) -> dict[str, float]:
    """What one contender gives: how far it is from models alone, requests per second of both loads, memory."""
    engine, precision, together = CONTENDERS[case["contender"]]
    wanted, versions = served(Path(case["folder"]), engine, precision, together)
    texts = json.loads(Path(case["texts"]).read_text(encoding="utf-8"))
    asks = [[each.task.parse(text, {}) for each in versions] for text in texts]
    plain = [[outputs_of(each, ask) for each, ask in zip(wanted, asked, strict=True)] for asked in asks]
    del wanted
    found = await asyncio.gather(
        *(each.answer(ask) for asked in asks for each, ask in zip(versions, asked, strict=True))
    )
    alone = [outputs for each in plain for outputs in each]
    differs = max(float(abs(one.outputs[0] - other).max()) for one, other in zip(found, alone, strict=True))
    same = [one.outputs[0].argmax() == other.argmax() for one, other in zip(found, alone, strict=True)]
    rates: dict[str, float] = {}
    for load in ("each", "all"):
        rates |= await rate(versions, asks, load, case["seconds"])
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        # What was freed while models were loaded goes back first.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    memory = psutil.Process().memory_info().rss / 2**20
    return {"differs_by": differs, "same_labels": sum(same) / len(same)} | rates | {"rss_mib": round(memory, 1)}


def served(folder: Path, engine: str, precision: str, together: bool) -> tuple[list[Any], list[Any]]:
    """Four engines in torch and fp32, and the four versions of one replica that answer."""
    from banjoray.config.job import load_job
    from banjoray.config.section import validate
    from banjoray.config.serve import ServeConfig
    from banjoray.models.loading import quiet_libraries
    from banjoray.models.readout import read_first_only
    from banjoray.registry import ModelVersion
    from banjoray.serving.choosing import PLAIN, Kind
    from banjoray.serving.engine import Engine
    from banjoray.serving.limits import Queue
    from banjoray.serving.models import Models
    from banjoray.serving.served import Served
    from banjoray.serving.sharing import Shares
    from banjoray.serving.telemetry import Telemetry
    from banjoray.training.preflight import prepare

    quiet_libraries()
    limits = validate(ServeConfig, {"model": "a@1", "latency_target_ms": 600_000}, "args")
    queue: Any = Queue(limits, Telemetry(limits, "", lambda: ()))
    # One thread makes the passes of all versions, whether they share any or not.
    thread = ThreadPoolExecutor(1)
    one, plain, versions = Shares(limits, queue, thread), [], []
    for number, name in enumerate(NAMES):
        values = [f"storage={folder}", f"train.seed={number}", "scale.workers=1", "freeze=backbone"]
        job = load_job(ROOT / "jobs" / "quickstart.yaml", values)
        ready = prepare(job)
        model: Any = ready.start.model().eval()
        read_first_only(model)
        tokenizer = ready.start.tokenizer
        found = ModelVersion(name, 1, job.task, (), {}, {"run": "none"}, {}, "", f"{number}" * 64, "")
        models = Models(found, str(folder / "registry"), model, tokenizer, lambda: None)
        task = ready.task.for_config(model.config)
        plain.append(Engine(found, task, models.of(PLAIN), tokenizer, job))
        mine = Engine(found, task, models.of(Kind(engine, precision)), tokenizer, job)
        versions.append(Served(mine, limits, queue, one if together else Shares(limits, queue, thread)))
    return plain, versions


def outputs_of(engine: Any, ask: Any) -> Any:
    """What a model keeps of a text's outputs in a pass of its own."""
    ((feature,),) = engine.encode(ask.rows)
    return engine.forward([feature])[0]


async def rate(versions: Sequence[Any], asks: Sequence[Sequence[Any]], load: str, seconds: float) -> dict[str, float]:
    """Requests answered per second, and the CPU's milliseconds for one, which other programs change less."""
    answered, turn = 0, iter(range(10**9))
    began, used = time.perf_counter(), time.process_time()
    at_once = len(versions) if load == "all" else 1

    async def client() -> None:
        nonlocal answered
        while time.perf_counter() - began < seconds:
            number = next(turn)
            asked = asks[number % len(asks)]
            chosen = range(len(versions)) if load == "all" else [number % len(versions)]
            await asyncio.gather(*(versions[each].answer(asked[each]) for each in chosen))
            answered += at_once

    await asyncio.gather(*(client() for _ in range(CLIENTS // at_once)))
    took, worked = time.perf_counter() - began, time.process_time() - used
    return {f"requests_per_s_{load}": answered / took, f"cpu_ms_{load}": 1000 * worked / answered}


def settings(name: str) -> str:
    """A contender in words."""
    engine, precision, together = CONTENDERS[name]
    return f"{engine} {precision}, {'one backbone' if together else 'each version by itself'}"


if __name__ == "__main__":
    sys.exit(main())
