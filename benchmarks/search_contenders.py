"""One round of one contender of a search: `python -m benchmarks.search_contenders CASE` prints one JSON line.

`search_cost.py` makes the cases and compares what they print. Of a study: wall_s (the whole command), start_s (of it,
until the first trial can start), search_s (the trials) and end_s (what comes after them), trials_s (the seconds of all
trials together) and every trial. Of a single run: rows_per_s, with what was computed ahead and without evaluation;
accuracy of the validation rows after the last epoch, in fp32; steps.

The peer of a study is Ray Tune and transformers.Trainer as their documentation puts them together: a function that
builds the Trainer and reports each evaluation by a TrainerCallback, with what all trials share in Ray's object store.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import train_contenders
from benchmarks.train_contenders import Peer, bf16_is_native, last_accuracy, peer, schedule

ROOT = Path(__file__).parents[1]
Told = dict[str, Any]


@dataclass(frozen=True)
class Case(train_contenders.Case):
    """What a contender is to do: every one of ``freezes`` (as in a job file) at every one of ``rates``.

    A single run has one of each, and all threads; in a study each trial has one thread, and there are as many trials at
    once as threads.
    """

    freezes: list[Any]
    rates: list[float]


def name_of(freeze: Any) -> str:
    """How results call a freezing choice."""
    return freeze if isinstance(freeze, str) else f"layers {freeze['layers']}"


def job(case: Case) -> dict[str, Any]:
    """What the job files of all banjoray contenders have in common."""
    return {
        "name": "bench",
        "task": "text-classification",
        "model": {"base": "banjoray:minilm"},
        "data": {"files": case.files, "max_length": case.max_length},
        "train": case.train | {"seed": case.seed, "metric": "accuracy"},
        "storage": str(Path(case.folder, "runs")),
        "registry": {"root": str(Path(case.folder, "registry")), "gate": {"metric": "accuracy"}},
        "cache": {"prefix": "never" if case.contender == "banjoray_never" else "auto", "budget_gib": 10},
    }


def banjoray(case: Case) -> Told:
    """`banjoray tune` as a user runs it; when trials start and end is told by the lines that it prints."""
    space = {"freeze": {"choice": case.freezes}, "train.learning_rate": {"choice": case.rates}}
    search = {"space": space, "searcher": "grid", "scheduler": "none", "concurrent": "auto"}
    file, answer = Path(case.folder, "job.yaml"), Path(case.folder, "answer.json")
    scale = {"workers": 1, "cpus_per_worker": 1}
    file.write_text(json.dumps(job(case) | {"tune": search, "scale": scale}), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "banjoray"), "tune", str(file), "--json"]
    moments: dict[str, float] = {}
    began = time.perf_counter()
    with answer.open("w") as stdout, subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stderr or ():
            sys.stderr.write(line)
            moments["ended" if " epoch " in line else line.split(" ")[0]] = time.perf_counter()
    ended = time.perf_counter()
    if run.returncode:
        raise SystemExit(f"banjoray tune ended with {run.returncode}")
    found = json.loads(answer.read_text(encoding="utf-8"))["trials"]
    if failed := [trial["status"] for trial in found if trial["status"] != "done"]:
        raise SystemExit(f"trials that did not end well: {failed}")
    trials = [
        {
            "freeze": name_of(trial["values"]["freeze"]),
            # To YAML 5e-05 is a text.
            "learning_rate": float(trial["values"]["train.learning_rate"]),
            "accuracy": trial["score"],
            "epochs": trial["epochs"],
            "seconds": trial["seconds"],
            "prefix": trial["prefix"],
        }
        for trial in found
    ]
    return study(trials, [began, moments["starting"], moments["ended"], ended])


def study(trials: list[Told], moments: list[float]) -> Told:
    """What is told of a study; ``moments``, in seconds: when it began, when its trials did, when they and it ended."""
    began, first, last, ended = moments
    return {
        "wall_s": ended - began,
        "start_s": first - began,
        "search_s": last - first,
        "end_s": ended - last,
        "trials_s": sum(trial["seconds"] for trial in trials),
        "accuracy": max(trial["accuracy"] for trial in trials),
        "trials": sorted(trials, key=lambda trial: (trial["freeze"], trial["learning_rate"])),
    }


def ray_trainer(case: Case) -> Told:
    """Ray Tune with Trainer, from the start of its process to the end."""
    inner = json.dumps(asdict(replace(case, contender="ray_trainer_study")))
    command = [sys.executable, "-m", "benchmarks.search_contenders", inner]
    began = time.time()
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    ended = time.time()
    told = json.loads(output.strip().splitlines()[-1])
    return study(told["trials"], [began, told["first"], told["last"], ended])


def ray_trainer_study(case: Case) -> Told:
    """The study itself; rows and the model with its fresh head are read once, and every trial gets a copy."""
    import ray
    from ray import tune

    start = with_lengths(peer(case))
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    # What trials print would come to stdout, where the answer goes.
    options: dict[str, Any] = {"address": "local", "include_dashboard": False, "log_to_driver": False}
    ray.init(num_cpus=case.threads, runtime_env={"env_vars": environment}, **options)
    trainable = tune.with_resources(tune.with_parameters(trial, case=case, start=start), {"cpu": 1})
    tuner = tune.Tuner(
        trainable,
        param_space={"freeze": tune.grid_search(case.freezes), "learning_rate": tune.grid_search(case.rates)},
        tune_config=tune.TuneConfig(metric="best", mode="max", max_concurrent_trials=case.threads, reuse_actors=True),
        run_config=tune.RunConfig(name="study", storage_path=str(Path(case.folder, "ray")), verbose=0),
    )
    first = time.time()
    results = tuner.fit()
    last = time.time()
    if results.errors:
        raise SystemExit(f"trials failed: {results.errors}")
    trials = [
        {
            "freeze": name_of(result.config["freeze"]),
            "learning_rate": result.config["learning_rate"],
            "accuracy": result.metrics["best"],
            "epochs": result.metrics["epochs"],
            "seconds": result.metrics["seconds"],
        }
        for result in (results[number] for number in range(len(results)))
        if result.config and result.metrics
    ]
    return {"trials": trials, "first": first, "last": last}


def trial(config: dict[str, Any], case: Case, start: Peer) -> None:
    """One trial: a Trainer that evaluates and reports every epoch; nothing but its end follows the last report."""
    import torch
    from transformers import TrainerCallback

    from ray import tune

    began = time.perf_counter()
    torch.set_num_threads(1)
    scores: list[float] = []

    class Report(TrainerCallback):
        def on_evaluate(self, *told: Any, **more: Any) -> None:
            scores.append(more["metrics"]["eval_accuracy"])
            seconds = time.perf_counter() - began
            tune.report({"accuracy": scores[-1], "best": max(scores), "epochs": len(scores), "seconds": seconds})

    def metrics(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions.argmax(axis=1) == found.label_ids).mean())}

    run = trainer_of(
        case,
        start,
        config,
        {"eval_strategy": "epoch", "per_device_eval_batch_size": 64},
        {"eval_dataset": start.validation, "compute_metrics": metrics, "callbacks": [Report()]},
    )
    run.train()


def with_lengths(start: Peer) -> Peer:
    """A peer whose rows know how long they are; else Trainer would measure each of them when training starts."""

    def measured(rows: Any) -> Any:
        return rows.add_column("length", [len(row) for row in rows["input_ids"]])

    return replace(start, train=measured(start.train), validation=measured(start.validation))


def trainer_of(case: Case, start: Peer, point: dict[str, Any], settings: dict[str, Any], more: dict[str, Any]) -> Any:
    """A tuned Trainer: bf16 where native, rows of like lengths together, nothing saved; frozen as ``point`` says."""
    from transformers import Trainer, TrainingArguments

    frozen(start.model, point["freeze"])
    arguments = TrainingArguments(
        output_dir=str(Path(case.folder, "trainer")),
        num_train_epochs=case.train["epochs"],
        per_device_train_batch_size=case.train["batch_size"],
        learning_rate=point["learning_rate"],
        weight_decay=case.train["weight_decay"],
        warmup_steps=schedule(case, len(start.train))[1],
        seed=case.seed,
        use_cpu=True,
        bf16=bf16_is_native(gpu=False),
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model=start.model, args=arguments, train_dataset=start.train, data_collator=start.collate, **more)


def frozen(model: Any, freeze: Any) -> None:
    """Freeze all but the classifier, or the embeddings and the lowest blocks."""
    if freeze == "backbone":
        model.base_model.requires_grad_(False)
        return
    model.base_model.embeddings.requires_grad_(False)
    for block in model.base_model.encoder.layer[: freeze["layers"]]:
        block.requires_grad_(False)


def banjoray_loop(case: Case) -> Told:
    """The loop that `banjoray train` runs inside a Ray worker, in this process, without Ray; its cache is empty."""
    import torch
    import transformers.optimization  # noqa: F401

    from banjoray.config.job import JobConfig
    from banjoray.config.section import validate
    from banjoray.training.interface import Callbacks
    from banjoray.training.loop import fit
    from banjoray.training.preflight import prepare

    torch.set_num_threads(case.threads)
    train = {"learning_rate": case.rates[0]} | job(case)["train"]
    scale = {"workers": 1, "cpus_per_worker": case.threads}
    tree = job(case) | {"freeze": case.freezes[0], "train": train, "scale": scale}
    config = validate(JobConfig, tree, "benchmark")
    ready = prepare(config)
    run = Path(case.folder, "runs", "outside-ray")
    spent: list[float] = []

    def model(say: Callable[[str], None] = print, /) -> Any:
        began = time.perf_counter()
        found = ready.start.model(say)
        spent.append(time.perf_counter() - began)
        return found

    result = fit(config, ready.rows, ready.task, replace(ready.start, model=model), str(run), Callbacks())
    # Trainer has read its model, and imported the schedules, before its time begins.
    aside = sum(spent) + sum(result.profile.get(phase, 0.0) for phase in ("evaluate", "checkpoint"))
    loop = result.seconds - aside
    return {
        "rows_per_s": case.train["epochs"] * len(ready.rows.train) / loop,
        "accuracy": last_accuracy(run, result.steps),
        "steps": result.steps,
        "loop_s": loop,
        "prefix_s": result.profile.get("prefix", 0.0),
        "steps_s": case.train["epochs"] * len(ready.rows.train) / result.rows_per_s,
    }


def trainer(case: Case) -> Told:
    """The tuned Trainer, from its first step to its last; it does not evaluate between them."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(case.threads)
    start = with_lengths(peer(case))
    times: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, *told: Any, **more: Any) -> None:
            times["begin"] = time.perf_counter()

        def on_train_end(self, *told: Any, **more: Any) -> None:
            times["end"] = time.perf_counter()

    point = {"freeze": case.freezes[0], "learning_rate": case.rates[0]}
    run = trainer_of(case, start, point, {"eval_strategy": "no"}, {"callbacks": [Watch()]})
    run.train()
    loop = times["end"] - times["begin"]
    # Without the wrapper that casts to bf16.
    model = run.accelerator.unwrap_model(run.model_wrapped, keep_fp32_wrapper=False)
    return {
        "rows_per_s": case.train["epochs"] * len(start.train) / loop,
        "accuracy": start.accuracy(model),
        "steps": run.state.global_step,
        "loop_s": loop,
    }


CONTENDERS: dict[str, Callable[[Case], Told]] = {
    "banjoray": banjoray,
    "banjoray_never": banjoray,
    "ray_trainer": ray_trainer,
    "ray_trainer_study": ray_trainer_study,
    "banjoray_loop": banjoray_loop,
    "trainer": trainer,
}


if __name__ == "__main__":
    given = Case(**json.loads(sys.argv[1]))
    print(json.dumps(CONTENDERS[given.contender](given)), flush=True)
