"""Rows per second of fine-tuning: banjoray beside Trainer and Accelerate; same rows, model, steps and threads.

    python -m benchmarks.train_throughput [--train rows.jsonl --validation rows.jsonl] [--name emotion] [--gpu]
    python -m benchmarks.train_throughput --accuracy --train rows.jsonl --validation rows.jsonl --name emotion

Files are JSON Lines with columns text and label; without them, the sample set that ships with banjoray. Every
contender runs in a process of its own, in turn, round after round, each round with another seed; the first round warms
the machine up and is not counted. Speeds are told only if the contenders learn alike: a banjoray contender whose mean
accuracy is below the tuned Trainer's by more than 3 points, and by more than seeds differ (two standard errors of the
difference), ends the script with exit code 1 and leaves no results file.

--accuracy makes no claim about time: all rows, banjoray and the tuned Trainer only, the mean accuracy of each over the
seeds, and whether banjoray's is at most half a point below. Results go to benchmarks/results and, as one JSON line, to
stdout; progress goes to stderr.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from banjoray.data.sources import SHIPPED

HERE = Path(__file__).parent
THREADS = os.cpu_count() or 1
MAX_LENGTH = 128
TRAIN: dict[str, Any] = {
    "batch_size": 32,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_ratio": 0.1,
}
HALF = max(1, THREADS // 2)
ON_CPU = {
    "banjoray": f"`banjoray train`, 1 worker, {THREADS} threads, defaults",
    "banjoray_2_workers": f"`banjoray train`, 2 workers, {HALF} thread{'s' * (HALF > 1)} each, defaults",
    "trainer": f"Trainer with its defaults (fp32, random batches), {THREADS} threads",
    "trainer_tuned": f"Trainer tuned (bf16 where native, group_by_length), {THREADS} threads",
    "accelerate_2": f"Accelerate loop (bf16 where native), 2 processes, {HALF} thread{'s' * (HALF > 1)} each",
}
ON_GPU = {
    "banjoray": "`banjoray train`, 1 GPU, defaults",
    "banjoray_zero2": "`banjoray train`, 1 GPU, DeepSpeed ZeRO-2",
    "trainer": "Trainer with its defaults (fp32, random batches), 1 GPU",
    "trainer_tuned": "Trainer tuned (bf16 where native, group_by_length), 1 GPU",
}
PEER = "trainer_tuned"
NOISE, HALF_A_POINT = 0.03, 0.005
WARM_UP_ROWS = 128
PACKAGES = ("banjoray", "torch", "transformers", "accelerate", "ray", "deepspeed")
# Counted rounds -> what every contender told: numbers by name.
Rounds = dict[str, list[dict[str, float]]]


def main() -> int:
    """Run the contenders in turn, compare, write; 1 if they don't agree."""
    options = parsed()
    settings = ON_GPU if options.gpu else ON_CPU
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "train": first_rows(options.train, options.rows, Path(folder, "train.jsonl")),
            "validation": first_rows(options.validation, 0, Path(folder, "validation.jsonl")),
        }
        rows = len(Path(files["train"]).read_text(encoding="utf-8").splitlines())
        result = facts(options, rows)
        found = rounds(options, files, Path(folder))
    each = f"{threads(options)} thread{'s' * (threads(options) > 1)}"
    told_of = {name: text.replace(f"{THREADS} threads", each) for name, text in settings.items()}
    contenders = {name: summary(told) | {"settings": told_of[name]} for name, told in found.items()}
    agrees = agreement(contenders, HALF_A_POINT, 0) if options.accuracy else agreement(contenders, NOISE, 2)
    if options.accuracy:
        keys = ("accuracy", "accuracy_error", "accuracy_min", "accuracy_max", "steps", "settings")
        contenders = {name: {key: told[key] for key in keys} for name, told in contenders.items()}
        result |= {"contenders": contenders, "within_half_a_point": agrees}
    else:
        result |= {"contenders": compared(contenders), "agrees": agrees}
    if options.accuracy or agrees is not False:
        path = HERE / "results" / f"{result['benchmark']}_{options.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(agrees is False)


def parsed() -> argparse.Namespace:
    """The options; ``only`` as the list of contenders that run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="JSON Lines file")
    parser.add_argument("--validation", help="JSON Lines file")
    parser.add_argument("--rows", type=int, help="the first so many train rows; 0: all (default 2000; --accuracy: 0)")
    parser.add_argument("--repeats", type=int, default=3, help="counted rounds, with seeds 1, 2, 3, ...")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--only", help="names of contenders, with commas between")
    parser.add_argument("--name", help="what the results call the data (default: sample)")
    parser.add_argument("--gpu", action="store_true", help="on one GPU instead of the CPU")
    parser.add_argument("--accuracy", action="store_true", help="compare accuracies, not speeds")
    options = parser.parse_args()
    if bool(options.train) != bool(options.validation):
        parser.error("--train and --validation go together")
    if not options.train:
        options.train, options.validation = (str(SHIPPED / f"emotion/{name}.jsonl") for name in ("train", "validation"))
    if options.rows is None:
        options.rows = 0 if options.accuracy else 2000
    if options.repeats < 1 or options.rows < 0 or options.epochs < 1:
        parser.error("--repeats and --epochs are at least 1, --rows at least 0")
    if options.name is None:
        options.name = "sample_gpu" if options.gpu else "sample"
    known = ["banjoray", PEER] if options.accuracy else list(ON_GPU if options.gpu else ON_CPU)
    asked = options.only.split(",") if options.only else known
    if strange := sorted(set(asked) - set(known)):
        parser.error(f"--only: no {', '.join(strange)} here; there is {', '.join(known)}")
    options.only = [name for name in known if name in asked]
    return options


def first_rows(path: str, rows: int, short: Path) -> str:
    """A copy of a file with its first rows; with all of them if ``rows`` is 0."""
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    short.write_text("\n".join(lines[: rows or None]) + "\n", encoding="utf-8")
    return str(short)


def rounds(options: argparse.Namespace, files: dict[str, str], folder: Path) -> Rounds:
    """Every contender, round after round, in turn; round 0 is for warming up, on a few rows.

    Where no time is told there is no warm-up, and the contenders of a round run side by side, each with its part of
    the threads.
    """
    found: Rounds = {name: [] for name in options.only}
    few = files | {"train": first_rows(files["train"], WARM_UP_ROWS, folder / "few.jsonl")}
    for seed in range(1 if options.accuracy else 0, options.repeats + 1):
        with ThreadPoolExecutor(len(options.only) if options.accuracy else 1) as pool:
            start = partial(one, seed=seed, options=options, files=files if seed else few, folder=folder)
            rows = list(pool.map(start, options.only))
        for name, told in zip(options.only, rows, strict=True):
            round_is = f"seed {seed}" if seed else "warm-up"
            print(
                f"{round_is}  {name}  {told['rows_per_s']:.1f} rows/s  accuracy {told['accuracy']:.4f}", file=sys.stderr
            )
            if seed:
                found[name].append(told)
    counts = {name: {told["steps"] for told in rows} for name, rows in found.items()}
    if len(set[float]().union(*counts.values())) != 1:
        raise SystemExit(f"contenders differ in optimizer steps, so nothing is compared: {counts}")
    return found


def one(name: str, seed: int, options: argparse.Namespace, files: dict[str, str], folder: Path) -> dict[str, float]:
    """One round of one contender in a process of its own; its log is shown only if it fails."""
    # Only what Ray, the hub and CUDA would otherwise take from this machine's user.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if options.gpu:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case: dict[str, Any] = {
            "contender": name,
            "seed": seed,
            "threads": threads(options),
            "gpu": options.gpu,
            "folder": place,
            "files": files,
            "max_length": MAX_LENGTH,
            "train": TRAIN | {"epochs": options.epochs},
        }
        command = [sys.executable, str(HERE / "train_contenders.py"), json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed}, ended with {done.returncode}:\n{done.stderr[-4000:]}")
    told: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def threads(options: argparse.Namespace) -> int:
    """Threads of a contender: all, or where accuracies are compared, side by side, its share."""
    return max(1, THREADS // len(options.only)) if options.accuracy else THREADS


def summary(told: list[dict[str, float]]) -> dict[str, Any]:
    """The medians of a contender's rounds; of the accuracy mean and range."""
    medians = {key: round(statistics.median(one[key] for one in told), 3) for key in told[0]}
    accuracies = [one["accuracy"] for one in told]
    speeds = [one["rows_per_s"] for one in told]
    return medians | {
        "rows_per_s_min": round(min(speeds), 3),
        "rows_per_s_max": round(max(speeds), 3),
        "accuracy": round(statistics.mean(accuracies), 5),
        "accuracy_error": round(statistics.stdev(accuracies) / len(told) ** 0.5, 5) if len(told) > 1 else 0.0,
        "accuracy_min": round(min(accuracies), 5),
        "accuracy_max": round(max(accuracies), 5),
    }


def agreement(contenders: dict[str, dict[str, Any]], margin: float, errors: float) -> bool | None:
    """Whether no mean accuracy of ours is below the tuned Trainer's by more than ``margin``; None if one is missing.

    Where seeds differ much, the margin is ``errors`` standard errors of the difference, if that is more.
    """
    ours = [told for name, told in contenders.items() if name.startswith("banjoray")]
    if not ours or PEER not in contenders:
        return None
    peer = contenders[PEER]
    # Accuracies are rounded to five digits.
    return all(
        told["accuracy"]
        >= peer["accuracy"] - max(margin, errors * math.hypot(told["accuracy_error"], peer["accuracy_error"])) - 1e-5
        for told in ours
    )


def compared(contenders: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Contenders with ``banjoray_is``: how many times as fast `banjoray train` with one worker is."""
    if "banjoray" not in contenders:
        return contenders
    ours = contenders["banjoray"]["rows_per_s"]
    return {name: told | {"banjoray_is": round(ours / told["rows_per_s"], 3)} for name, told in contenders.items()}


def facts(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip()
    train = TRAIN | {"epochs": options.epochs}
    return {
        "benchmark": "train_accuracy" if options.accuracy else "train_throughput",
        "data": f"{options.name}, {rows} train rows, {options.epochs} epochs, batch {train['batch_size']}, MiniLM",
        "repeats": options.repeats,
        "seeds": list(range(1, options.repeats + 1)),
        "machine": machine(options.gpu),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "commit": commit,
        "settings": train | {"max_length": MAX_LENGTH, "model": "banjoray:minilm", "threads": threads(options)},
    }


def machine(gpu: bool) -> str:
    """The GPU, or the CPU's model, its cores and the bf16 that it has."""
    if gpu:
        import torch

        return f"{torch.cuda.get_device_name(0)}, {THREADS} CPU cores"
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    native = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in known.get("flags", "").split()]
    return ", ".join([known.get("model name", platform.machine()), f"{THREADS} cores", *native[:1]])


if __name__ == "__main__":
    sys.exit(main())
