"""The training loop: rows and a model in, scored checkpoints out. Knows nothing of Ray.

Every worker runs `fit` with the same arguments. What happens at a step depends on (seed, step, rank) alone, and
which rows it sees on (seed, epoch) alone; so a run that goes on from a checkpoint does what it would have done.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from banjoray.config.job import JobConfig
from banjoray.data.batches import epoch_batches, padded, shares
from banjoray.data.tokens import Tokens
from banjoray.errors import TrainingFailed
from banjoray.tasks.task import Task
from banjoray.training.checkpoints import Checkpoint, Position, Store
from banjoray.training.scoring import outputs, to_tensors
from banjoray.training.strategies import Strategy, build, choose_precision


@dataclass(frozen=True)
class Rows:
    """What `fit` learns from, and is steered by."""

    train: Tokens
    validation: Tokens
    labels: tuple[str, ...]
    pad_id: int


@dataclass(frozen=True)
class Moment:
    """How far a run is, for people who watch it. ``loss`` is that of the last step, in nats per row."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    rows_per_s: float
    padding: float
    note: str = ""


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind, equal on every worker.

    ``seconds`` is the time of this call, evaluation and checkpoints included; ``rows_per_s`` counts training steps
    only. A resumed run reports both for the part since it was resumed.
    """

    checkpoint: Checkpoint
    steps: int
    seconds: float
    rows_per_s: float
    precision: str


@dataclass(frozen=True)
class Callbacks:
    """Where `fit` tells what it does.

    ``report`` gets the metrics of every finished epoch, on every worker; ``watch`` gets a `Moment` per step, on
    rank 0; ``should_stop`` is asked after every epoch, on every worker, and must answer all of them alike.
    """

    report: Callable[[dict[str, float]], None] = lambda metrics: None
    watch: Callable[[Moment], None] = lambda moment: None
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Start:
    """What `fit` starts from: a way to the model (given a folder of weights, or None for the base) and a tokenizer."""

    model: Callable[[Path | None], torch.nn.Module]
    tokenizer: Any


def fit(job: JobConfig, rows: Rows, task: Task, start: Start, run: str, callbacks: Callbacks) -> FitResult:
    """Train to the end from the newest whole checkpoint of ``run`` (a folder or URL), or from the base model.

    Raises TrainingFailed: a loss that is not a number (with the step and rows), a full disk.
    """
    began = time.perf_counter()
    notes: list[str] = []
    store = Store(run, notes.append)
    found = _agree(store.newest_whole)
    folder = store.local(found) if found else None
    choice = choose_precision(job.train.precision, job.scale.gpus_per_worker > 0)
    # from_pretrained hands out models in evaluation mode, without dropout.
    model = start.model(folder / "model" if folder else None).train()
    strategy = build(job, model, choice.precision)
    session = _Session(job, rows, task, start.tokenizer, strategy, store, callbacks)
    notes.append(f"precision {choice.precision}: {choice.reason}")
    if found and folder:
        session.resume(found, folder)
        notes.append(f"going on from {found.name}")
    session.note = "; ".join(notes)
    best = session.run()
    return FitResult(best, session.steps, time.perf_counter() - began, session.rows_per_s, choice.precision)


class _Session:
    """The state of one `fit`: where it stands, and how fast it was."""

    def __init__(
        self, job: JobConfig, rows: Rows, task: Task, tokenizer: Any, strategy: Strategy, store: Store, calls: Callbacks
    ) -> None:
        self._job, self._rows, self._task, self._tokenizer = job, rows, task, tokenizer
        self._strategy, self._store, self._calls = strategy, store, calls
        self._position = Position()
        self._trained_rows, self._trained_seconds = 0, 0.0
        self._per_epoch = len(epoch_batches(rows.train.lengths, job.train.batch_size, job.train.seed, 0))
        self.steps = self._per_epoch * job.train.epochs
        self._factor = _schedule(job, self.steps)
        self.note = ""

    @property
    def rows_per_s(self) -> float:
        return self._trained_rows / self._trained_seconds if self._trained_seconds else 0.0

    def resume(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Go on from a checkpoint; its weights are in the model already."""
        from safetensors.torch import load_file

        self._strategy.restore(load_file(folder / "optimizer.safetensors"), checkpoint.position.step)
        self._position = checkpoint.position

    def run(self) -> Checkpoint:
        """All epochs that are left; the best checkpoint of the run."""
        train = self._job.train
        while self._position.epoch < train.epochs:
            self._epoch()
            if self._calls.should_stop():
                break
        best: Checkpoint | None = _agree(lambda: self._store.best(train.metric, train.mode))
        if best is None:
            raise TrainingFailed(
                f"no scored checkpoint in {self._store.root}; it was emptied while the run wrote to it"
            )
        return best

    def _epoch(self) -> None:
        """The rest of the current epoch, then a score and a checkpoint."""
        train, position = self._job.train, self._position
        batches = epoch_batches(self._rows.train.lengths, train.batch_size, train.seed, position.epoch)
        for number in range(position.batch, len(batches)):
            loss = self._position.loss + self._step(batches[number])
            self._position = replace(self._position, step=self._position.step + 1, batch=number + 1, loss=loss)
            every = train.checkpoint_every
            if every != "epoch" and self._position.step % every == 0 and number + 1 < len(batches):
                self._checkpoint({})
        metrics = self._evaluate()
        entry = metrics | {"epoch": position.epoch + 1, "train_loss": self._position.loss / len(batches)}
        history = (*self._position.history, entry)
        self._position = Position(self._position.step, position.epoch + 1, history=history)
        self._checkpoint(metrics)
        self._calls.report(entry)

    def _step(self, batch: np.ndarray) -> float:
        """One optimizer step over a global batch; its loss, in nats per row."""
        began = time.perf_counter()
        strategy, position = self._strategy, self._position
        rate = self._job.train.learning_rate * self._factor(position.step)
        _seed(self._job.train.seed, position.step, strategy.rank)
        mine = shares(batch, strategy.workers, self._job.train.gradient_accumulation_steps)[strategy.rank]
        loss, cells = 0.0, 0
        for number, part in enumerate(mine):
            # A worker with no rows left still takes part in the exchange: one row, of no weight.
            chosen = part if len(part) else batch[:1]
            inputs = padded(self._rows.train, chosen, self._rows.pad_id)
            cells += inputs["input_ids"].size
            inputs["labels"] = self._rows.train.targets[chosen]
            tensors = to_tensors(inputs, strategy.device)
            loss += strategy.gradients(tensors, len(part) / len(batch), last=number + 1 == len(mine))
        strategy.step(rate)
        if not np.isfinite(loss):
            raise TrainingFailed(_not_a_number(loss, position.step, batch, rate))
        self._trained_rows += len(batch)
        self._trained_seconds += time.perf_counter() - began
        tokens = sum(int(self._rows.train.lengths[part].sum()) for part in mine)
        self._watch(loss * strategy.workers, rate, cells, tokens)
        return loss * strategy.workers

    def _watch(self, loss: float, rate: float, cells: int, tokens: int) -> None:
        if self._strategy.rank == 0:
            step, epochs = self._position.step + 1, self._job.train.epochs
            padding = 1 - tokens / cells
            epoch = self._position.epoch + 1
            moment = Moment(step, self.steps, epoch, epochs, loss, rate, self.rows_per_s, padding, self.note)
            self._calls.watch(moment)

    def _evaluate(self) -> dict[str, float]:
        """Validation metrics over the rows of all workers, in fp32, whatever precision trains."""
        strategy = self._strategy
        strategy.module.eval()
        whole = outputs(
            strategy.module,
            self._rows.validation,
            self._rows.pad_id,
            strategy.device,
            (strategy.rank, strategy.workers),
        )
        strategy.module.train()
        return self._task.score(whole, self._rows.validation.targets, self._rows.labels).metrics

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        """Gather on every worker, write on rank 0, go on together."""
        weights, moments = self._strategy.weights(), self._strategy.moments()

        def write(folder: Path) -> None:
            from safetensors.torch import save_file

            save_model(self._strategy.module, weights, self._tokenizer, self._job, folder / "model")
            save_file(moments, folder / "optimizer.safetensors")

        if self._strategy.rank == 0:
            train = self._job.train
            self._store.save(self._position, metrics, write)
            self._store.prune(train.metric, train.mode, train.keep_checkpoints)
        _agree(lambda: None)


def save_model(module: Any, weights: dict[str, torch.Tensor], tokenizer: Any, job: JobConfig, folder: Path) -> None:
    """A folder that `from_pretrained` reads, with the resolved job beside the weights."""
    import yaml

    module.save_pretrained(folder, state_dict=weights)
    if tokenizer.is_fast:
        # Where it cut rows would be saved with it if it made the tokens, but not if they came from the cache.
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    (folder / "job.yaml").write_text(yaml.safe_dump(job.to_json(), sort_keys=False), encoding="utf-8")


def _schedule(job: JobConfig, steps: int) -> Callable[[int], float]:
    """step -> share of the peak learning rate; transformers' schedule, asked as a function so that it has no state."""
    from transformers import get_scheduler

    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = int(job.train.warmup_ratio * steps)
    scheduler = get_scheduler(job.train.schedule, probe, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of a step depends on (seed, step, rank): nothing has to be saved to go on exactly."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def _not_a_number(loss: float, step: int, batch: np.ndarray, rate: float) -> str:
    rows = ", ".join(str(row + 1) for row in batch[:8])
    return (
        f"loss is {loss} at step {step + 1} (learning rate {rate:.2e}, train rows {rows}{', ...' * (len(batch) > 8)}); "
        "lower train.learning_rate, or set train.precision=fp32"
    )


def _agree(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every worker; also a point that all have to reach."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decide()
    box = [decide() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
