"""The training loop: rows and a model in, scored checkpoints out. Knows nothing of Ray.

Every worker runs `fit` with the same arguments. What happens at a step depends on (seed, step, rank) alone, and
which rows it sees on (seed, epoch) alone; so a run that goes on from a checkpoint does what it would have done.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from banjoray.config.job import JobConfig
from banjoray.data.batches import batches_of, shares
from banjoray.errors import ConfigError, OutOfMemory, TrainingFailed, Untrainable
from banjoray.models.readout import read_first_only
from banjoray.models.vocabulary import narrow
from banjoray.tasks.task import Collate, Score, Task
from banjoray.training.checkpoints import Checkpoint, Position, Saver, Store
from banjoray.training.clock import Clock
from banjoray.training.dropout import FastDropout
from banjoray.training.interface import Callbacks, FitResult, Moment, Rows, Start
from banjoray.training.learned import Learned, digest, load
from banjoray.training.objective import Objective
from banjoray.training.optimizer import rate_scales
from banjoray.training.prefix_cache import Prefix, kept_prefix
from banjoray.training.pulse import Beat, Pulse
from banjoray.training.scoring import Feed, outputs
from banjoray.training.strategies import Strategy, build, choose_precision, coarse, compiles


def fit(job: JobConfig, rows: Rows, task: Task, start: Start, run: str, callbacks: Callbacks) -> FitResult:
    """Train to the end from the newest whole checkpoint of ``run`` (a folder or URL), or from the base model.

    Where a microbatch does not fit into a GPU's memory, a single worker starts again with halves of it; of several
    workers all have to, so each raises. Raises TrainingFailed: too many steps without numbers (with the step and
    rows), a full disk, a worker that fell silent; OutOfMemory.
    """
    notes: list[str] = []
    while True:
        try:
            return _fit(job, rows, task, start, run, callbacks, notes)
        except OutOfMemory as error:
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise
            notes.append(str(error))


def _fit(
    job: JobConfig, rows: Rows, task: Task, start: Start, run: str, calls: Callbacks, notes: list[str]
) -> FitResult:
    began = time.perf_counter()
    store = Store(run, notes.append)
    found = _agree(store.newest_whole)
    folder = store.local(found) if found else None
    job = job.with_values({"train.torch_compile": "on" if compiles(job, _steps(job, rows)) else "off"})
    if job.scale.nvme_path:
        # DeepSpeed's file names do not tell runs apart.
        job = job.with_values({"scale.nvme_path": f"{job.scale.nvme_path}/{run.rstrip('/').rsplit('/', 1)[-1]}"})
    job = _microbatched(job, _agree(lambda: store.microbatches(job.train.gradient_accumulation_steps)), notes)
    choice = choose_precision(job)
    # from_pretrained hands out models in evaluation mode, without dropout.
    heads: list[str] = []
    model = start.model(heads.append).train()
    ids = (part.streams["input_ids"] for part in (rows.train, rows.validation))
    learned = Learned.of(model, narrow(model, ids) if task.steady else None)
    if found and folder:
        load(model, folder, learned.vocabulary, found.position.decay)
    else:
        notes += heads
    read_first_only(model)
    if job.train.gradient_checkpointing:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    clock = Clock(torch.cuda.synchronize) if job.scale.gpus_per_worker and calls.exact else Clock()
    prefix = _all_or_none(kept_prefix(job, model, rows, choice.precision == "bf16", notes, clock))
    strategy = build(job, model, choice.precision)
    with Saver() as saver:
        collate = task.collate(job, start.tokenizer, model.config)
        session = _Session(job, rows, task, collate, strategy, store, saver, learned, calls, clock)
        session.start_above(prefix)
        notes.append(f"precision {choice.precision}: {choice.reason}")
        if found and folder:
            session.resume(found, folder)
            notes.append(f"going on from {found.name}")
        session.note = "; ".join(notes)
        try:
            best = session.run()
        except RuntimeError as error:
            raise (session.pulse.blame(error) or error) from error
    seconds = time.perf_counter() - began
    told = session.profile()
    return FitResult(best, session.step, seconds, session.rows_per_s, choice.precision, session.stopped, told)


def _steps(job: JobConfig, rows: Rows) -> int:
    """Optimizer steps of all epochs."""
    return sum(len(batches_of(rows.train.lengths, job.train, epoch)) for epoch in range(job.train.epochs))


def _microbatched(job: JobConfig, count: int, notes: list[str]) -> JobConfig:
    """The job with at least ``count`` microbatches per worker and step; raises Untrainable below one row each."""
    if count == job.train.gradient_accumulation_steps:
        return job
    notes.append(f"{count} microbatches per step, since larger ones did not fit into memory")
    try:
        return job.with_values({"train.gradient_accumulation_steps": count})
    except ConfigError:
        raise Untrainable(
            "a microbatch of one row does not fit into memory; lower data.max_length, or set "
            "train.gradient_checkpointing=true, an adapter, or scale.strategy=zero3"
        ) from None


class _Session:
    """The state of one `fit`: where it stands, and how fast it was."""

    def __init__(
        self,
        job: JobConfig,
        rows: Rows,
        task: Task,
        collate: Collate | None,
        strategy: Strategy,
        store: Store,
        saver: Saver,
        learned: Learned,
        calls: Callbacks,
        clock: Clock,
    ) -> None:
        self._job, self._rows, self._task, self._calls = job, rows, task, calls
        self._strategy, self._store, self._saver, self._learned = strategy, store, saver, learned
        self._objective, self._collate = Objective(job, task, rows.train, rows.labels), collate
        self._position = Position()
        self._trained_rows, self._clock = 0, clock
        self.start_above(None)
        self.steps = _steps(job, rows)
        self._factor = _schedule(job, self.steps)
        # By which the rows of a word table that no text uses shrink, per learning rate.
        name = learned.vocabulary.name if learned.vocabulary else ""
        self._shrink = job.train.weight_decay * rate_scales(job, strategy.module).get(name, 0.0)
        cuda = strategy.device.type == "cuda"
        self._draws = not (cuda or job.train.gradient_checkpointing or job.train.torch_compile == "on")
        self.pulse = Pulse(strategy.rank, strategy.workers, strategy.device, job.scale.collective_timeout_s)
        self._frozen = self._digest_of_frozen()
        self.note, self.stopped = "", False

    def start_above(self, prefix: Prefix | None) -> None:
        """Read the rows from where their kept states begin; from their words without any."""
        rows, device, self._prefix = self._rows, self._strategy.device, prefix.origin if prefix else ""
        above = (prefix.train, prefix.validation) if prefix else (None, None)
        self._train = Feed(rows.train, rows.pad_id, device, above[0], self._collate, coarse(self._job))
        self._validation = Feed(rows.validation, rows.pad_id, device, above[1], self._collate)

    @property
    def step(self) -> int:
        """How many optimizer steps are done."""
        return self._position.step

    @property
    def rows_per_s(self) -> float:
        spent = self._clock.seconds["step"]
        return self._trained_rows / spent if spent else 0.0

    def profile(self) -> dict[str, float]:
        """Phase -> seconds; phases follow each other."""
        told = dict(self._clock.seconds)
        whole = told.pop("step", 0.0)
        told["backward"] = told.pop("gradients", 0.0) - told.get("forward", 0.0)
        steps = ("collate", "forward", "backward", "optimizer", "exchange")
        return told | {"other": whole - sum(told.get(phase, 0.0) for phase in steps)}

    def resume(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Go on from a checkpoint; its weights are in the model already."""
        from safetensors.torch import load_file

        position = checkpoint.position
        self._strategy.restore(load_file(folder / "optimizer.safetensors"), position.step - position.skipped)
        self._position = position

    def run(self) -> Checkpoint:
        """All epochs that are left; the best checkpoint of the run, or the newest if it was stopped."""
        train = self._job.train
        while self._position.epoch < train.epochs and not self._stagnant() and not self.stopped:
            self._epoch()
        if self._digest_of_frozen() != self._frozen:
            raise TrainingFailed("frozen weights have changed in training; this is a bug in banjoray, please report it")
        with self._clock("checkpoint"):
            self._saver.settle()
        found: Checkpoint | None = _agree(
            self._store.newest_whole if self.stopped else lambda: self._store.best(train.metric, train.mode)
        )
        if found is None:
            raise TrainingFailed(f"no checkpoint in {self._store.root}; it was emptied while the run wrote to it")
        return found

    def _stagnant(self) -> bool:
        """Whether the metric has not improved for as many epochs as the job has patience."""
        train = self._job.train
        scores = [entry[train.metric] * (1 if train.mode == "max" else -1) for entry in self._position.history]
        patience = train.early_stopping_patience
        return patience is not None and len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])

    def _epoch(self) -> None:
        """The rest of the current epoch, then a score and a checkpoint; less if the run is told to end."""
        train, epoch = self._job.train, self._position.epoch
        batches = batches_of(self._rows.train.lengths, train, epoch)
        for number in range(self._position.batch, len(batches)):
            with self._clock("step"):
                beat = self._step(batches[number], number)
            last = number + 1 == len(batches)
            every = train.checkpoint_every
            if not last and (beat.stop or (every != "epoch" and self._position.step % every == 0)):
                self._checkpoint(Score({}))
            if beat.stop and not last:
                self.stopped = True
                return
        with self._clock("evaluate"):
            score = self._evaluate()
        entry = score.metrics | {"epoch": epoch + 1, "train_loss": self._position.loss / len(batches)}
        position, history = self._position, (*self._position.history, entry)
        self._position = replace(position, epoch=epoch + 1, batch=0, loss=0.0, history=history)
        self._checkpoint(score)
        if self._strategy.rank == 0:
            self._calls.scored(position.step, entry)
        if self._calls.report is not None:
            with self._clock("report"):
                # Whoever is told of a score may end the process there and then, and look for its checkpoint.
                self._saver.settle()
                self._calls.report(entry)

    def _step(self, batch: np.ndarray, number: int) -> Beat:
        """One optimizer step over a global batch, batch ``number`` of its epoch."""
        strategy, position = self._strategy, self._position
        rate = self._job.train.learning_rate * self._factor(position.step)
        self.pulse.mark(position.step, 0)
        try:
            loss, padding = self._gradients(batch)
            with self._clock("optimizer"):
                norm = strategy.step(rate)
        except torch.OutOfMemoryError as error:
            raise self._smaller(error) from error
        with self._clock("exchange"):
            beat = self.pulse.exchange(loss, self._calls.should_stop())
        # Under fp16 an overflow is how the loss scale finds its place.
        broken = not (np.isfinite(beat.loss) and (np.isfinite(norm) or self._fp16))
        if broken and position.broken >= self._job.train.max_skipped_steps:
            raise Untrainable(self._not_a_number(beat.loss, norm, batch, rate))
        moved = np.isfinite(norm) and not broken
        self._position = replace(
            position,
            step=position.step + 1,
            batch=number + 1,
            loss=position.loss + (0.0 if broken else beat.loss),
            skipped=position.skipped + (not moved),
            broken=position.broken + broken,
            decay=position.decay * (1 - rate * self._shrink if moved else 1),
        )
        self._trained_rows += len(batch)
        self._watch(beat.loss, rate, padding, norm)
        return beat

    def _gradients(self, batch: np.ndarray) -> tuple[torch.Tensor, float]:
        """This worker's share of a batch forward and backward: its loss, and its share of padding."""
        strategy, lengths = self._strategy, self._rows.train.lengths
        draws = _seeded(self._job.train.seed, self._position.step, strategy.rank)
        dropout = FastDropout(draws) if self._draws else nullcontext()
        total = self._objective.total(batch)
        mine = shares(batch, strategy.workers, self._job.train.gradient_accumulation_steps)[strategy.rank]
        losses: list[torch.Tensor] = []
        cells, tokens = 0, 0
        for number, part in enumerate(mine):
            with self._clock("collate"):
                # A worker with no rows left still takes part in the exchange: one row, of no weight.
                chosen = part if len(part) else batch[:1]
                tensors, targets = self._train.batch(chosen, self._position.epoch)
                cells += len(chosen) * self._train.width(chosen)
                tokens += int(lengths[chosen].sum())
                loss = self._objective.share(chosen, targets, total, empty=not len(part))
            last = number + 1 == len(mine)

            def forward(module: Any, tensors: Any = tensors, loss: Any = loss, last: bool = last) -> torch.Tensor:
                with self._clock("forward"), dropout:
                    found: torch.Tensor = loss(module(**tensors))
                if last:
                    self.pulse.mark(self._position.step, 1)
                return found

            with self._clock("gradients"):
                losses.append(strategy.gradients(forward, last))
        return torch.stack(losses).sum(), 1 - tokens / cells

    def _smaller(self, error: Exception) -> OutOfMemory:
        """Have the next start cut its microbatches in half."""
        count = 2 * self._job.train.gradient_accumulation_steps
        self._store.note_microbatches(count)
        reason = str(error).splitlines()[0]
        return OutOfMemory(f"step {self.step + 1} did not fit into memory ({reason}); next with {count} microbatches")

    @property
    def _fp16(self) -> bool:
        return choose_precision(self._job).precision == "fp16"

    def _watch(self, loss: float, rate: float, padding: float, norm: float) -> None:
        if self._strategy.rank == 0:
            at, epochs = self._position, self._job.train.epochs
            told = (loss, rate, self.rows_per_s, padding, norm, self.note, self._prefix)
            self._calls.watch(Moment(at.step, self.steps, at.epoch + 1, epochs, *told))

    def _evaluate(self) -> Score:
        """The validation score over the rows of all workers, in fp32, whatever precision trains."""
        strategy, rows = self._strategy, self._rows
        strategy.module.eval()
        part = (strategy.rank, strategy.workers)
        whole = outputs(strategy.module, self._validation, self._task, part)
        strategy.module.train()
        return self._task.score(whole, rows.validation, rows.held, rows.labels)

    def _checkpoint(self, score: Score) -> None:
        """Gather on every worker; rank 0 writes while training goes on."""
        with self._clock("checkpoint"):
            weights, moments = self._strategy.weights(self._learned.kept), self._strategy.moments()
            if self._strategy.rank == 0:
                position = self._position
                self._saver.begin(lambda: self._save(position, score, weights, moments))

    def _save(self, position: Position, score: Score, weights: Any, moments: Any) -> None:
        import yaml
        from safetensors.torch import save_file

        def write(folder: Path) -> None:
            self._learned.save(weights, folder)
            save_file(moments, folder / "optimizer.safetensors")
            (folder / "job.yaml").write_text(yaml.safe_dump(self._job.to_json(), sort_keys=False), encoding="utf-8")

        train, store = self._job.train, self._store
        if train.checkpoint_budget_gib:
            incoming = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
            store.make_room(train.metric, train.mode, incoming, int(train.checkpoint_budget_gib * 2**30))
        store.save(position, score.metrics, self._frozen, write, score.thresholds)
        store.prune(train.metric, train.mode, train.keep_checkpoints)

    def _digest_of_frozen(self) -> str:
        """Of the weights that may not move; equal on every worker."""
        found: str = digest(self._strategy.weights(self._learned.frozen, copy=False))
        return found

    def _not_a_number(self, loss: float, norm: float, batch: np.ndarray, rate: float) -> str:
        rows = ", ".join(str(row + 1) for row in batch[:8])
        skipped = f", after {self._position.broken} skipped steps" if self._position.broken else ""
        return (
            f"loss is {loss} and the gradients' norm {norm} at step {self.step + 1} (learning rate {rate:.2e}, train "
            f"rows {rows}{', ...' * (len(batch) > 8)}){skipped}; lower train.learning_rate, set train.precision=fp32, "
            "or look at these rows and set train.max_skipped_steps"
        )


def _schedule(job: JobConfig, steps: int) -> Callable[[int], float]:
    """step -> share of the peak learning rate; transformers' schedule, asked as a function so that it has no state."""
    from transformers import get_scheduler

    probe = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = int(job.train.warmup_ratio * steps)
    scheduler = get_scheduler(job.train.schedule, probe, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = scheduler.lr_lambdas[0]
    return factor


def _seeded(seed: int, step: int, rank: int) -> np.random.SFC64:
    """A generator for a step's dropout, and torch's own for what else draws: of (seed, step, rank) alone.

    So nothing has to be saved to go on exactly. torch.manual_seed also leaves word for absent devices, in 0.4 ms.
    """
    seeds = np.random.SeedSequence([seed, step, rank])
    for generator in (torch.default_generator, *torch.cuda.default_generators):
        generator.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
    return np.random.SFC64(seeds)


def _all_or_none(prefix: Prefix | None) -> Prefix | None:
    """The prefix, if every worker has one: sharded weights are gathered by all workers or by none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found: list[bool] = [False] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, prefix is not None)
        if prefix is not None and not all(found):
            prefix.train.cut.restore()
            return None
    return prefix


def _agree(decide: Callable[[], Any]) -> Any:
    """What rank 0 decides, on every worker; also a point that all have to reach."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decide()
    box = [decide() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
