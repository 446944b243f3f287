"""What Ray costs of a run after start-up: one run in Ray and the same outside, in turns of 10 s on the same cores.

    python -m benchmarks.ray_share [--train rows.jsonl --validation rows.jsonl] [--name emotion] [--epochs 8]

Both sides train the same model on the same rows with one worker and all cores: `banjoray.training.run.train` with its
driver, Ray's own processes and the worker, and banjoray's loop in a process without Ray. While one side has its turn,
all processes of the other are stopped, so an hour in which the machine is slow is slow for both. What is compared is
the time that a side had from one step to another, the same steps for both, with what a run does between (scores and
checkpoints). The share is told only if both end with the same score. The result goes to benchmarks/results and, as one
JSON line, to stdout.
"""

import argparse
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from benchmarks.train_contenders import Case, job, last_accuracy
from benchmarks.train_throughput import MAX_LENGTH, THREADS, TRAIN, facts, first_rows

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.data.sources import SHIPPED
from banjoray.training.interface import Callbacks, Moment
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.run import train, worker_environment
from banjoray.training.tracking import tracked

ROOT = Path(__file__).parents[1]
SIDES = ("inside", "outside")
# Seconds of a turn: when one begins, all timers of Ray's processes are due at once, which is no part of a run, and the
# shorter turns are, the more of it is measured. Steps at the start that are not counted; parts whose shares tell how
# sure the whole one is.
TURN, WARM_UP, PARTS = 10.0, 10, 10
LEAST_STEPS, LIMIT_S = 50, 3600
# (begin, end) of each turn, in seconds; (seconds, step) of each moment that was told.
Turns = list[tuple[float, float]]
Marks = list[tuple[float, int]]


def main() -> int:
    """Run both sides in turns, or be one of them; 1 if they end with different scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default=str(SHIPPED / "emotion/train.jsonl"), help="JSON Lines file")
    parser.add_argument("--validation", default=str(SHIPPED / "emotion/validation.jsonl"), help="JSON Lines file")
    parser.add_argument("--rows", type=int, default=2000, help="the first so many train rows")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--name", default="sample", help="what the results call the data")
    parser.add_argument("--gpu", action="store_true", help="on one GPU instead of the CPU")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.set_defaults(repeats=1, accuracy=False)
    options = parser.parse_args()
    if options.side:
        side(options.side, Case(**json.loads(options.case)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        train_file = first_rows(options.train, options.rows, Path(folder, "train.jsonl"))
        rows = len(Path(train_file).read_text(encoding="utf-8").splitlines())
        files = {"train": train_file, "validation": str(Path(options.validation).resolve())}
        settings = TRAIN | {"epochs": options.epochs}
        cases = {
            name: Case("banjoray", 1, THREADS, options.gpu, f"{folder}/{name}", files, MAX_LENGTH, settings)
            for name in SIDES
        }
        # Before anything runs, so that the load is that of others.
        told = facts(options, rows)
        turns = taken(cases)
        ended = {name: json.loads(Path(case.folder, "ended.json").read_text()) for name, case in cases.items()}
        if ended["inside"] != ended["outside"]:
            print(f"the sides end differently, so nothing is told: {ended}", file=sys.stderr)
            return 1
        marks = {name: read_marks(Path(case.folder, "marks.txt")) for name, case in cases.items()}
    kept = ("data", "machine", "load_before", "versions", "commit", "settings")
    result = {"benchmark": "ray_share"} | {key: told[key] for key in kept}
    result |= ended["inside"] | compared(marks, turns)
    path = ROOT / "benchmarks" / "results" / f"ray_share_{options.name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


def side(name: str, case: Case) -> None:
    """One side's whole run; a line of marks.txt for every moment that it tells of: when, and after which step."""
    folder = Path(case.folder)
    config = validate(JobConfig, job(case), "benchmark")
    with (folder / "marks.txt").open("w", buffering=1, encoding="utf-8") as marks:

        def mark(moment: Moment) -> None:
            marks.write(f"{time.monotonic()} {moment.step}\n")

        if name == "inside":
            told = train(config, mark)
            run, steps = Path(config.storage, told.run_id), told.steps
        else:
            run = Path(config.storage, "outside-ray")
            torch.set_num_threads(case.threads)
            ready = prepare(config)
            with tracked(config, str(run), Callbacks(watch=mark)) as watched:
                steps = fit(config, ready.rows, ready.task, ready.start, str(run), watched).steps
    (folder / "ended.json").write_text(json.dumps({"steps": steps, "accuracy": last_accuracy(run, steps)}))


def taken(cases: dict[str, Case]) -> dict[str, Turns]:
    """Both sides started, and run in turns to their end: when each had its turns, on the clock of their marks."""
    turns: dict[str, Turns] = {name: [] for name in SIDES}
    sides: dict[str, subprocess.Popen[bytes]] = {}
    deadline = time.monotonic() + LIMIT_S
    try:
        for name, case in cases.items():
            sides[name] = started(name, case)
            await_steps(name, case, sides[name], deadline)
            send(sides[name], signal.SIGSTOP)
        order = random.Random(0)
        while all(each.poll() is None for each in sides.values()):
            if time.monotonic() > deadline:
                raise SystemExit(f"the sides did not end within {LIMIT_S} s")
            for name in order.sample(SIDES, len(SIDES)):
                began = time.monotonic()
                send(sides[name], signal.SIGCONT)
                time.sleep(TURN)
                send(sides[name], signal.SIGSTOP)
                turns[name].append((began, time.monotonic()))
        for each in sides.values():
            send(each, signal.SIGCONT)
        if any(each.wait(LIMIT_S) for each in sides.values()):
            raise SystemExit("a side failed: see above")
    finally:
        for each in sides.values():
            send(each, signal.SIGCONT)
            # It ends the Ray that it started.
            each.terminate()
        for each in sides.values():
            each.wait(60)
    return turns


def started(name: str, case: Case) -> subprocess.Popen[bytes]:
    """A side, in a process of its own."""
    Path(case.folder).mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"HF_HUB_OFFLINE": "1"}
    if name == "outside":
        # What differs is to be Ray: `train` gives this environment to the worker.
        environment |= worker_environment(validate(JobConfig, job(case), "benchmark"))
    command = [sys.executable, "-m", "benchmarks.ray_share", "--side", name, "--case", json.dumps(asdict(case))]
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def await_steps(name: str, case: Case, process: subprocess.Popen[bytes], deadline: float) -> None:
    """Return when a side is in its first steps."""
    marks = Path(case.folder, "marks.txt")
    while not (marks.exists() and marks.stat().st_size):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{name} did not come to its first step: see above")
        time.sleep(0.2)


def send(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """A signal to a side and to all that it started; to none that has ended."""
    try:
        first = psutil.Process(process.pid)
        family = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in family:
        try:
            each.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def read_marks(path: Path) -> Marks:
    """When a side was seen after which step, in order."""
    lines = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return [(float(when), int(step)) for when, step in lines]


def compared(marks: dict[str, Marks], turns: dict[str, Turns]) -> dict[str, Any]:
    """Seconds that each side had for the same steps, and the share of them that Ray costs, with its standard error."""
    # Before the turns a side is alone; when one has ended, there are no more; and the last moment of a run is told when
    # it ends, not when the step does.
    first, over = (pick(turns[name][at][at] for name in SIDES) for pick, at in ((min, 0), (max, -1)))
    marks = {name: [mark for mark in told[:-1] if first < mark[0] < over] for name, told in marks.items()}
    begin = max(told[0][1] for told in marks.values()) + WARM_UP
    end = min(told[-1][1] for told in marks.values())
    if end - begin < LEAST_STEPS:
        raise SystemExit(f"{end - begin} steps can be compared, which is too few: more --rows or --epochs")
    edges = [begin + (end - begin) * part // PARTS for part in range(PARTS + 1)]
    had = {name: [reached(had_time(marks[name], turns[name]), edge) for edge in edges] for name in SIDES}
    seconds = {name: told[-1] - told[0] for name, told in had.items()}
    parts = {name: [later - earlier for earlier, later in itertools.pairwise(told)] for name, told in had.items()}
    shares = [1 - outside / inside for inside, outside in zip(parts["inside"], parts["outside"], strict=True)]
    return {
        "compared_steps": end - begin,
        "turns": len(turns["inside"]),
        "seconds_inside": round(seconds["inside"], 2),
        "seconds_outside": round(seconds["outside"], 2),
        "ray_share": round(1 - seconds["outside"] / seconds["inside"], 4),
        "ray_share_error": round(statistics.stdev(shares) / PARTS**0.5, 4),
        "ray_share_of_parts": [round(share, 3) for share in shares],
        "turn_s": TURN,
    }


def had_time(marks: Marks, turns: Turns) -> Marks:
    """Marks on another clock: the seconds of turns that a side had had."""
    return [(sum(max(0.0, min(end, when) - begin) for begin, end in turns), step) for when, step in marks]


def reached(marks: Marks, step: int) -> float:
    """When a step was reached, between the two marks around it."""
    for (earlier, low), (later, high) in itertools.pairwise(marks):
        if low <= step < high:
            return earlier + (later - earlier) * (step - low) / (high - low)
    return marks[-1][0]


if __name__ == "__main__":
    sys.exit(main())
