"""What a search costs: banjoray beside Ray Tune with Trainer, and both training above a frozen bottom without Ray.

    python -m benchmarks.search_cost [--train rows.jsonl --validation rows.jsonl] [--name emotion] [--part study]

Files are JSON Lines with columns text and label; without them, the sample set that ships with banjoray.

The study is 12 trials, four freezing choices at three learning rates, every contender with as many trials at once as
the machine has cores, one thread each; its time is that of the whole command. Single runs are one process with all
threads, and count epochs x rows per second of the training loop: what is computed ahead is in it, evaluation is not.

Every contender runs in a process of its own, in turn, round after round, each round with another seed; a first round
on few rows warms the machine up and is not counted. Times are told only if the contenders learn alike. In a study: our
best accuracy at most 3 points below the peer's best, and the best of each freezing choice within 5 points of the
peer's. In a single run: at most 3 points below the peer's. Else the script ends with exit code 1 and leaves no results
file. Results go to benchmarks/results (those of one part alone to a file of its name) and, as one JSON line, to stdout;
progress goes to stderr.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.search_contenders import ROOT, Told, name_of
from benchmarks.train_throughput import MAX_LENGTH, PACKAGES, THREADS, WARM_UP_ROWS, first_rows, machine, summary

from banjoray.data.sources import SHIPPED

FREEZES: tuple[Any, ...] = ({"layers": 2}, {"layers": 4}, {"layers": 6}, "backbone")
RATES = (5e-5, 2e-4, 1e-3)
TRAIN: dict[str, Any] = {"batch_size": 32, "weight_decay": 0.01, "warmup_ratio": 0.1}
AT_ONCE = f"{THREADS} trial{'s' * (THREADS > 1)} at once, 1 thread each"
SETTINGS = {
    "banjoray": f"`banjoray tune`, states of frozen blocks kept; {AT_ONCE}",
    "banjoray_never": f"`banjoray tune`, `cache.prefix: never`; {AT_ONCE}",
    "ray_trainer": f"Ray Tune with Trainer (bf16 where native, group_by_length, reuse_actors); {AT_ONCE}",
    "banjoray_loop": f"banjoray's loop outside Ray, nothing kept before, {THREADS} threads",
    "trainer": f"Trainer tuned (bf16 where native, group_by_length), {THREADS} threads",
}
STUDY, LOOPS = ("banjoray", "banjoray_never", "ray_trainer"), ("banjoray_loop", "trainer")
BEST, EACH = 0.03, 0.05


@dataclass(frozen=True)
class Work:
    """What contenders are given, the last of them a peer: every freezing choice at every rate, for so many epochs."""

    part: str
    contenders: tuple[str, ...]
    freezes: tuple[Any, ...]
    rates: tuple[float, ...]
    epochs: int
    repeats: int

    def to_json(self) -> dict[str, Any]:
        """What the results say of the work."""
        said = {"freeze": [name_of(freeze) for freeze in self.freezes], "learning_rate": self.rates}
        return said | {"epochs": self.epochs, "repeats": self.repeats, "seeds": list(range(1, self.repeats + 1))}


WORKS = {
    "study": Work("study", STUDY, FREEZES, RATES, epochs=3, repeats=1),
    "backbone_4": Work("single", LOOPS, ("backbone",), (1e-3,), epochs=4, repeats=3),
    "backbone_10": Work("single", LOOPS, ("backbone",), (1e-3,), epochs=10, repeats=3),
    "layers_4": Work("single", LOOPS, ({"layers": 4},), (2e-4,), epochs=4, repeats=3),
}
# Contender -> what it told in each counted round.
Rounds = dict[str, list[Told]]


def main() -> int:
    """Run the contenders in turn, compare, write; 1 if they don't agree."""
    options = parsed()
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "train": first_rows(options.train, options.rows, Path(folder, "train.jsonl")),
            "validation": first_rows(options.validation, options.validation_rows, Path(folder, "validation.jsonl")),
        }
        result = facts(options.name, files)
        works = asked(options)
        warm_up(works, files, Path(folder))
        found = {name: rounds(name, work, files, Path(folder)) for name, work in works.items()}
    result["works"] = {name: compared(works[name], told) for name, told in found.items()}
    agrees = all(told["agrees"] is not False for told in result["works"].values())
    if agrees:
        part = "" if options.part == "all" else f"_{options.part}"
        path = ROOT / "benchmarks" / "results" / f"search_cost_{options.name}{part}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return int(not agrees)


def parsed() -> argparse.Namespace:
    """The options; ``only`` as the list of contenders that run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="JSON Lines file")
    parser.add_argument("--validation", help="JSON Lines file")
    parser.add_argument("--rows", type=int, default=2000, help="the first so many train rows; 0: all")
    parser.add_argument("--validation-rows", type=int, default=500, help="the first so many of them; 0: all")
    parser.add_argument("--repeats", type=int, help="counted rounds (default: 1 of the study, 3 of single runs)")
    parser.add_argument("--epochs", type=int, help="of every trial and run (default: 3; single runs: 4 and 10)")
    parser.add_argument("--only", help="names of contenders, with commas between")
    parser.add_argument("--part", choices=("study", "single", "all"), default="all")
    parser.add_argument("--name", default="sample", help="what the results call the data")
    options = parser.parse_args()
    if bool(options.train) != bool(options.validation):
        parser.error("--train and --validation go together")
    if not options.train:
        options.train, options.validation = (str(SHIPPED / f"emotion/{name}.jsonl") for name in ("train", "validation"))
    counts = [count for count in (options.repeats, options.epochs) if count is not None]
    if min(counts, default=1) < 1 or min(options.rows, options.validation_rows) < 0:
        parser.error("--repeats and --epochs are at least 1, --rows and --validation-rows at least 0")
    known = [
        name for part, names in (("study", STUDY), ("single", LOOPS)) if options.part in (part, "all") for name in names
    ]
    wanted = options.only.split(",") if options.only else known
    if strange := sorted(set(wanted) - set(known)):
        parser.error(f"--only: no {', '.join(strange)} here; there is {', '.join(known)}")
    options.only = wanted
    return options


def asked(options: argparse.Namespace) -> dict[str, Work]:
    """The works that the options name, with the contenders that they leave in."""
    works = {}
    for name, work in WORKS.items():
        contenders = tuple(one for one in work.contenders if one in options.only)
        epochs, repeats = options.epochs or work.epochs, options.repeats or work.repeats
        if contenders and options.part in (work.part, "all"):
            works[name] = replace(work, contenders=contenders, epochs=epochs, repeats=repeats)
    return works


def warm_up(works: dict[str, Work], files: dict[str, str], folder: Path) -> None:
    """Every contender once, one freezing choice at two rates at most, one epoch over a few rows."""
    few = files | {"train": first_rows(files["train"], WARM_UP_ROWS, folder / "few.jsonl")}
    for work in {work.part: work for work in works.values()}.values():
        short = replace(work, freezes=work.freezes[:1], rates=work.rates[:2], epochs=1)
        for contender in work.contenders:
            one(contender, short, 0, few, folder)
            print(f"warm-up  {contender}", file=sys.stderr)


def rounds(name: str, work: Work, files: dict[str, str], folder: Path) -> Rounds:
    """Every contender of a work, round after round, in turn."""
    found: Rounds = {contender: [] for contender in work.contenders}
    for seed in range(1, work.repeats + 1):
        for contender, rows in found.items():
            told = one(contender, work, seed, files, folder)
            speed = f"{told['wall_s']:.1f} s" if work.part == "study" else f"{told['rows_per_s']:.1f} rows/s"
            print(f"{name}  seed {seed}  {contender}  {speed}  accuracy {told['accuracy']:.4f}", file=sys.stderr)
            rows.append(told)
    did = {contender: sorted({amount(told) for told in rows}) for contender, rows in found.items()}
    if len({str(amounts) for amounts in did.values()}) != 1:
        raise SystemExit(f"{name}: contenders differ in what they did, so nothing is compared: {did}")
    return found


def amount(told: Told) -> tuple[int, ...]:
    """How much a contender did: epochs of every trial of a study, or optimizer steps of a run."""
    return tuple(trial["epochs"] for trial in told["trials"]) if "trials" in told else (told["steps"],)


def one(contender: str, work: Work, seed: int, files: dict[str, str], folder: Path) -> Told:
    """One round of one contender in a process of its own; its log is shown only if it fails."""
    # Only what Ray, the hub and the CPU would otherwise take from this machine's user.
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with tempfile.TemporaryDirectory(dir=folder) as place:
        case = {
            "contender": contender,
            "seed": seed,
            "threads": THREADS,
            "gpu": False,
            "folder": place,
            "files": files,
            "max_length": MAX_LENGTH,
            "train": TRAIN | {"epochs": work.epochs},
            "freezes": work.freezes,
            "rates": work.rates,
        }
        command = [sys.executable, "-m", "benchmarks.search_contenders", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{contender}, seed {seed}, ended with {done.returncode}:\n{done.stderr[-4000:]}")
    told: Told = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def compared(work: Work, found: Rounds) -> dict[str, Any]:
    """A work's contenders by their medians, and whether they agree; ``banjoray_is``: how many times as fast."""
    summarise = of_study if work.part == "study" else summary
    contenders = {name: summarise(told) | {"settings": SETTINGS[name]} for name, told in found.items()}
    ours = contenders.get("banjoray") or contenders.get("banjoray_loop")
    for told in contenders.values():
        if ours and work.part == "study":
            told["banjoray_is"] = round(told["wall_s"] / ours["wall_s"], 3)
        elif ours:
            told["banjoray_is"] = round(ours["rows_per_s"] / told["rows_per_s"], 3)
    return work.to_json() | {"contenders": contenders, "agrees": agreement(contenders)}


def of_study(found: list[Told]) -> Told:
    """The medians of a contender's studies; of accuracies, the mean; and every trial of every study."""
    keys = [key for key, value in found[0].items() if isinstance(value, float)]
    told: Told = {key: round(statistics.median(one[key] for one in found), 3) for key in keys}
    walls = [one["wall_s"] for one in found]
    return told | {
        "wall_s_min": round(min(walls), 3),
        "wall_s_max": round(max(walls), 3),
        "accuracy": round(statistics.mean(one["accuracy"] for one in found), 5),
        "best_of_freeze": {
            freeze: round(statistics.mean(max(of_freeze(one, freeze, "accuracy")) for one in found), 5)
            for freeze in dict.fromkeys(trial["freeze"] for trial in found[0]["trials"])
        },
        "seconds_of_freeze": {
            freeze: round(statistics.median(sum(of_freeze(one, freeze, "seconds")) for one in found), 3)
            for freeze in dict.fromkeys(trial["freeze"] for trial in found[0]["trials"])
        },
        "studies": [one["trials"] for one in found],
    }


def of_freeze(told: Told, freeze: str, key: str) -> Iterable[float]:
    """What the trials of a study with one freezing choice say under ``key``."""
    return [trial[key] for trial in told["trials"] if trial["freeze"] == freeze]


def agreement(contenders: dict[str, Told]) -> bool | None:
    """Whether ours learn what the peer learns, as the top of this file says; None if there is nothing to compare."""
    peer = contenders.get("ray_trainer") or contenders.get("trainer")
    ours = [told for name, told in contenders.items() if name.startswith("banjoray")]
    if peer is None or not ours:
        return None
    # Accuracies are rounded to five digits.
    best = all(told["accuracy"] >= peer["accuracy"] - BEST - 1e-5 for told in ours)
    apart = [
        abs(told["best_of_freeze"][freeze] - score)
        for told in ours
        for freeze, score in peer.get("best_of_freeze", {}).items()
    ]
    return best and max(apart, default=0.0) <= EACH + 1e-5


def facts(name: str, files: dict[str, str]) -> dict[str, Any]:
    """What was measured, on what, with which versions."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    rows = {split: len(Path(path).read_text(encoding="utf-8").splitlines()) for split, path in files.items()}
    return {
        "benchmark": "search_cost",
        "data": f"{name}, {rows['train']} train and {rows['validation']} validation rows, batch 32, MiniLM",
        "machine": machine(gpu=False),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "commit": commit,
        "settings": TRAIN | {"max_length": MAX_LENGTH, "model": "banjoray:minilm", "threads": THREADS},
    }


if __name__ == "__main__":
    sys.exit(main())
