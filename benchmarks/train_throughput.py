"""Rows per second of fine-tuning: banjoray beside transformers.Trainer, same rows, model, steps and threads.

    python benchmarks/train_throughput.py --train rows.jsonl --validation rows.jsonl [--rows 2000] [--repeats 3]

Files have columns text and label; without them, the sample set that ships with banjoray. Every contender runs in a
process of its own, in turn; the first round warms the machine up and is not counted. Accuracies are printed beside
the speeds, so that nobody is fast by learning nothing; the median of the counted rounds is written to results/.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
THREADS = os.cpu_count() or 1
SETTINGS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 32,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "warmup_ratio": 0.1,
}
CONTENDERS = {
    "banjoray": f"`banjoray train`, 1 worker, {THREADS} threads, precision auto",
    "trainer": f"Trainer with its defaults: fp32, random batches; {THREADS} threads",
    "trainer_tuned": f"Trainer, bf16, group_by_length; {THREADS} threads",
}


def banjoray(data: dict[str, Any], folder: Path, seed: int) -> dict[str, float]:
    """The command as a user runs it; Ray's start is in wall_s and not in rows_per_s."""
    job = {
        "name": "bench",
        "task": "text-classification",
        "model": {"base": "banjoray:minilm"},
        "data": data | {"max_length": 128},
        "train": SETTINGS | {"seed": seed, "metric": "accuracy"},
        "scale": {"cpus_per_worker": THREADS},
        "storage": str(folder / "runs"),
        "registry": {"root": str(folder / "registry"), "gate": {"metric": "accuracy"}},
    }
    (folder / "job.yaml").write_text(json.dumps(job))
    began = time.perf_counter()
    command = [str(Path(sys.executable).parent / "banjoray"), "train", str(folder / "job.yaml"), "--json"]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    wall = time.perf_counter() - began
    return {"rows_per_s": told["rows_per_s"], "accuracy": told["metrics"]["accuracy"], "wall_s": wall}


def trainer(data: dict[str, Any], folder: Path, seed: int, tuned: bool) -> dict[str, float]:
    """transformers.Trainer on the same rows; its own tokenising is not in rows_per_s."""
    import numpy as np
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from banjoray.config.job import JobConfig
    from banjoray.config.section import validate
    from banjoray.training.preflight import prepare

    torch.set_num_threads(THREADS)
    tree = {"name": "bench", "task": "text-classification", "model": {"base": "banjoray:minilm"}, "data": data}
    ready = prepare(validate(JobConfig, tree | {"train": {"seed": seed}, "storage": str(folder)}, "benchmark"))
    tokenizer = ready.start.tokenizer

    def encoded(split: Any) -> Any:
        rows = split.rows.remove_columns([name for name in split.rows.column_names if name != "text"])
        rows = rows.add_column("labels", split.targets.tolist())
        return rows.map(lambda part: tokenizer(part["text"], truncation=True, max_length=128), batched=True)

    steps = SETTINGS["epochs"] * -(-len(ready.splits.train) // SETTINGS["batch_size"])
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=SETTINGS["epochs"],
        per_device_train_batch_size=SETTINGS["batch_size"],
        learning_rate=SETTINGS["learning_rate"],
        weight_decay=SETTINGS["weight_decay"],
        warmup_steps=int(SETTINGS["warmup_ratio"] * steps),
        seed=seed,
        use_cpu=True,
        bf16=tuned,
        train_sampling_strategy="group_by_length" if tuned else "random",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    run = Trainer(
        model=ready.start.model(None),
        args=arguments,
        train_dataset=encoded(ready.splits.train),
        eval_dataset=encoded(ready.splits.validation),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float(np.mean(np.argmax(found.predictions, 1) == found.label_ids))},
    )
    began = time.perf_counter()
    run.train()
    seconds = time.perf_counter() - began
    rows_per_s = SETTINGS["epochs"] * len(ready.splits.train) / seconds
    return {"rows_per_s": rows_per_s, "accuracy": run.evaluate()["eval_accuracy"], "wall_s": seconds}


def measure(contender: str, data: dict[str, Any], seed: int) -> dict[str, float]:
    """One round of one contender, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        if contender == "banjoray":
            return banjoray(data, Path(folder), seed)
        return trainer(data, Path(folder), seed, tuned=contender == "trainer_tuned")


def shortened(path: str | None, rows: int, folder: Path, name: str) -> str | None:
    """The first rows of a file."""
    if path is None:
        return None
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
    short = folder / f"{name}.jsonl"
    short.write_text("".join(lines), encoding="utf-8")
    return str(short)


def main() -> None:
    """Run the contenders in turn and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train")
    parser.add_argument("--validation")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="sample", help="what the results call the data")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {
            "train": shortened(options.train, options.rows, Path(folder), "train"),
            "validation": shortened(options.validation, 10**9, Path(folder), "validation"),
        }
        data: dict[str, Any] = {"files": files} if files["train"] else {"source": "banjoray:emotion"}
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for seed in range(options.repeats + 1):
            for contender in CONTENDERS:
                command = [sys.executable, __file__, "--one", json.dumps([contender, data, seed])]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                told = json.loads(done.stdout.strip().splitlines()[-1])
                print(f"{'warm-up' if seed == 0 else f'seed {seed}'} {contender} {told}", file=sys.stderr)
                if seed:
                    found[contender].append(told)
    write(options.name, options.rows if options.train else 600, found)


def write(name: str, rows: int, found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, settings, versions and machine as one JSON file, and as one JSON line on stdout."""
    medians = {
        contender: {key: round(statistics.median(told[key] for told in rounds), 4) for key in rounds[0]}
        | {"settings": CONTENDERS[contender]}
        for contender, rounds in found.items()
    }
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE
    )
    result = {
        "benchmark": "train_throughput",
        "data": f"{name}, {rows} train rows, {SETTINGS['epochs']} epochs, batch {SETTINGS['batch_size']}, MiniLM",
        "repeats": len(next(iter(found.values()))),
        "machine": f"{platform.machine()}, {THREADS} cores",
        "versions": {package: version(package) for package in ("torch", "transformers", "ray")},
        "commit": commit.stdout.strip(),
        "contenders": medians,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / f"train_throughput_{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
