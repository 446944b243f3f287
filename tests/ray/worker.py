"""Workers without Ray: forked from one process that has imported everything, so that a case costs its training alone.

Run as a script by the fixture `launch`: a plan's path per line of stdin, a line of stdout when it is done. A plan's
case is a run; each of its attempts is a group of ranks over gloo, in the same folder. A rank that dies takes its
group with it, and the next attempt goes on, as Ray Train would have it.
"""

import importlib
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.errors import TrainingFailed
from banjoray.models import vocabulary
from banjoray.training import loop, scoring, shared_memory, strategies
from banjoray.training.interface import Callbacks, Moment
from banjoray.training.parallel import DataParallel, FullySharded
from banjoray.training.preflight import prepare
from banjoray.training.pulse import Pulse
from banjoray.training.signals import sigterm_is_a_wish
from banjoray.training.strategies import Strategy
from banjoray.training.zero import Zero

# What a run imports on its way.
IMPORTED = (
    "accelerate",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "evaluate",
    "peft",
    "scipy.io",
    "sklearn.metrics",
    "torch.utils.cpp_extension",
    "transformers.models.bert.modeling_bert",
    "transformers.optimization",
)
# Groups at a time: two ranks wait for each other half of the time.
ABREAST = 2
# How a rank ends whose run did.
FAILED = 3
SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP, "term": signal.SIGTERM}
# How the ranks of a group may end, by what one of them does.
ENDS = {"kill": (-signal.SIGKILL, FAILED), "hang": (-signal.SIGKILL, FAILED), "term": (0,), "": (0,)}


@dataclass(frozen=True)
class Seen:
    """What one rank knows of its strategy once the run is over.

    ``wrapped`` is the class that takes part in the exchange, and ``together`` whether steps are made in shared memory;
    ``sharded`` names the modules that are FSDP2's;
    ``held`` counts the numbers of AdamW's first moment on this rank and ``trainable`` those of the whole model;
    ``released`` names the parameters that were not whole here after the last step, and ``pieces`` counts the numbers of
    the part of every parameter that this rank owns.
    """

    wrapped: str
    together: bool
    sharded: tuple[str, ...]
    workers: int
    stage: int | None
    held: int
    trainable: int
    released: tuple[str, ...]
    pieces: int


def main() -> None:
    """Plans from stdin until it ends; the answer to each is its failure, empty if there was none."""
    answers = os.fdopen(os.dup(1), "w")
    # What libraries print is no answer.
    os.dup2(2, 1)
    _import_all()
    for line in sys.stdin:
        print(json.dumps(_serve(Path(line.strip()))), file=answers, flush=True)


def _import_all() -> None:
    """What ranks would import and build one by one. A forked process has no threads but one, so none may run yet."""
    for name in IMPORTED:
        importlib.import_module(name)
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("bert")
    assert sys.modules["deepspeed.ops"].__compatible_ops__
    torch.set_num_threads(1)
    # Many small passes, so that the rows of an evaluation don't divide evenly between ranks.
    scoring.EVALUATION_TOKENS["cpu"] = 256
    assert threading.active_count() == 1, threading.enumerate()


def _serve(plan: Path) -> str:
    waiting: Iterator[dict[str, Any]] = iter(json.loads(plan.read_text()))
    going: list[_Group] = []
    try:
        for case in waiting:
            going.append(_Group(case, 0, plan.parent))
            while len(going) == ABREAST:
                _wait(going)
        while going:
            _wait(going)
    except _Surprise as surprise:
        return str(surprise)
    finally:
        for group in going:
            group.end()
    return ""


def _wait(going: "list[_Group]") -> None:
    """Until one of the groups has ended; its place is taken by the case's next attempt, if there is one."""
    pid, status = os.wait()
    (group,) = [group for group in going if pid in group.ranks]
    if group.reaped(pid, os.waitstatus_to_exitcode(status)):
        going.remove(group)
        if following := group.following():
            going.append(following)


class _Surprise(Exception):
    """A rank that ended as it should not."""


class _Group:
    """The ranks of one attempt at a case; they live and die together."""

    def __init__(self, case: dict[str, Any], number: int, out: Path) -> None:
        self._case, self._number, self._out = case, number, out
        self._attempt = case["attempts"][number]
        self._codes: dict[int, int] = {}
        # Bound here and inherited: nobody else can take the port in between.
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.ranks = {self._fork(rank, listening): rank for rank in range(self._attempt["workers"])}

    def _fork(self, rank: int, listening: socket.socket) -> int:
        pid = os.fork()
        if pid == 0:
            _rank(self._case, self._number, rank, listening, self._out)
        return pid

    def reaped(self, pid: int, code: int) -> bool:
        """Note how a rank has ended; the others end too if it was no good end. Whether all have."""
        self._codes[self.ranks[pid]] = code
        if code:
            self.end()
        if len(self._codes) < len(self.ranks):
            return False
        self._judge()
        return True

    def _judge(self) -> None:
        """Raise if the group ended in another way than its attempt should."""
        does = self._attempt.get("does", "")
        if does and not _stem(self._out, self._case, self._number, self._attempt["rank"]).with_suffix(".did").exists():
            raise _Surprise(self._told(f"never came to {does}"))
        for rank, code in self._codes.items():
            # Killed by us, or quicker than that: it has seen that the other one is gone.
            if code not in ENDS[does]:
                raise _Surprise(self._told(f"rank {rank} ended with {code}"))

    def following(self) -> "_Group | None":
        """The next attempt, where there is one; before it starts the newest checkpoint may be torn."""
        if torn := self._attempt.get("tear"):
            newest = max(Path(self._case["run"]).glob("checkpoints/step-*"))
            os.truncate(newest / torn, (newest / torn).stat().st_size // 2)
        if self._number + 1 == len(self._case["attempts"]):
            return None
        return _Group(self._case, self._number + 1, self._out)

    def end(self) -> None:
        """Kill the ranks that are left."""
        for pid, rank in self.ranks.items():
            if rank not in self._codes:
                os.kill(pid, signal.SIGKILL)

    def _told(self, what: str) -> str:
        stems = [_stem(self._out, self._case, self._number, rank) for rank in self.ranks.values()]
        logs = "\n".join(f"{stem.name}:\n{stem.with_suffix('.log').read_text()[-3000:]}" for stem in stems)
        return f"{self._case['name']}, attempt {self._number}: {what}\n{logs}"


def _stem(out: Path, case: dict[str, Any], attempt: int, rank: int) -> Path:
    return out / f"{case['name']}-{attempt}-rank{rank}"


def _rank(case: dict[str, Any], number: int, rank: int, listening: socket.socket, out: Path) -> NoReturn:
    """The life of a forked process."""
    code, stem = 1, _stem(out, case, number, rank)
    try:
        with stem.with_suffix(".log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        attempt = case["attempts"][number]
        job = validate(JobConfig, case["job"], case["name"]).with_values({"scale.workers": attempt["workers"]})
        _join(job, rank, listening)
        vocabulary.LARGEST_SHARE = case.get("largest_share", 0.8)
        if case.get("sockets"):
            shared_memory._host = lambda: None
        code = _run(job, case["run"], attempt, stem)
    finally:
        if sys.exception():
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # gloo's threads and DeepSpeed's exit hooks have nothing left to do, and take seconds.
        os._exit(code)


def _join(job: JobConfig, rank: int, listening: socket.socket) -> None:
    """Make the process group of a job's workers, as Ray Train does; libraries read the environment too."""
    workers, (address, port) = job.scale.most_workers, listening.getsockname()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, workers, is_master=rank == 0, master_listen_fd=listening.fileno() if rank == 0 else None
    )
    timeout = timedelta(seconds=job.scale.collective_timeout_s)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=timeout)


def _run(job: JobConfig, run: str, attempt: dict[str, Any], stem: Path) -> int:
    """One attempt at a run on this rank; its exit code."""
    ready = prepare(job)
    built: list[Strategy] = []
    start: dict[str, Tensor] = {}
    released: list[str] = []

    def build(job: JobConfig, model: nn.Module, precision: strategies.Precision) -> Strategy:
        start.update({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        built.append(_watched(strategies.build(job, model, precision), released))
        return built[-1]

    loop.build = build  # type: ignore[attr-defined]
    if attempt.get("does"):
        loop.Pulse = _dooming(attempt, stem.with_suffix(".did"))  # type: ignore[attr-defined]
    try:
        with sigterm_is_a_wish() as told, stem.with_suffix(".jsonl").open("w") as moments:

            def watch(moment: Moment) -> None:
                print(json.dumps({"step": moment.step, "note": moment.note}), file=moments, flush=True)

            callbacks = Callbacks(watch=watch, should_stop=told.is_set)
            result = loop.fit(job, ready.rows, ready.task, ready.start, run, callbacks)
    except TrainingFailed as error:
        _tell(stem, {"error": str(error)})
        return FAILED
    checkpoint = result.checkpoint
    ended = {"checkpoint": checkpoint.name, "metrics": checkpoint.metrics, "decay": checkpoint.position.decay}
    ended |= {"steps": result.steps, "stopped": result.stopped, "seen": asdict(_look(built[-1], released))}
    _keep(_own_weights(built[-1]), stem.with_suffix(".safetensors"))
    if built[-1].rank == 0:
        _keep(start, stem.with_suffix(".start.safetensors"))
    _tell(stem, ended)
    return 0


def _tell(stem: Path, facts: dict[str, Any]) -> None:
    """Write the facts all at once: the rank may be killed meanwhile."""
    stem.with_suffix(".part").write_text(json.dumps(facts))
    stem.with_suffix(".part").rename(stem.with_suffix(".json"))


def _dooming(attempt: dict[str, Any], did: Path) -> type[Pulse]:
    """A pulse that sends a rank a signal when it has begun a step, before it does anything for it."""
    doomed = (attempt["at_step"], attempt["rank"])

    class Doomed(Pulse):
        def mark(self, step: int, phase: int) -> None:
            super().mark(step, phase)
            if (step + 1, self._rank) == doomed and phase == 0:
                did.touch()
                os.kill(os.getpid(), SIGNALS[attempt["does"]])

    return Doomed


def _watched(strategy: Strategy, released: list[str]) -> Strategy:
    """The strategy; after each of its steps ``released`` names the parameters that are not whole."""
    step = strategy.step

    def watched(learning_rate: float) -> float:
        norm = step(learning_rate)
        released[:] = [name for name, p in strategy.module.named_parameters() if _local(p).numel() < _size(p)]
        return norm

    strategy.step = watched  # type: ignore[method-assign]
    return strategy


def _local(tensor: Any) -> Tensor:
    """The part of a tensor that is on this rank."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _size(parameter: nn.Parameter) -> int:
    size: int = getattr(parameter, "ds_numel", parameter.numel())
    return size


def _piece(parameter: Any) -> int:
    """How many numbers of a parameter this rank owns."""
    return int(_local(getattr(parameter, "ds_tensor", parameter)).numel())


def _look(strategy: Strategy, released: list[str]) -> Seen:
    from torch.distributed.fsdp import FSDPModule

    parameters = list(strategy.module.parameters())
    if isinstance(strategy, DataParallel):
        kind, stage, optimizer = type(strategy._wrapped), None, strategy._optimizer
    elif isinstance(strategy, FullySharded):
        kind, stage, optimizer = type(strategy.module), None, strategy._optimizer
    else:
        assert isinstance(strategy, Zero)
        kind, stage = type(strategy.engine), strategy.engine.zero_optimization_stage()
        optimizer = strategy.engine.optimizer.optimizer if stage else strategy.engine.optimizer
    return Seen(
        wrapped=f"{kind.__module__}.{kind.__name__}",
        together=getattr(strategy, "_together", None) is not None,
        sharded=tuple(name for name, module in strategy.module.named_modules() if isinstance(module, FSDPModule)),
        workers=strategy.workers,
        stage=stage,
        held=sum(_local(state["exp_avg"]).numel() for state in optimizer.state.values()),
        trainable=sum(_size(p) for p in parameters if p.requires_grad),
        released=tuple(released),
        pieces=sum(map(_piece, parameters)),
    )


def _own_weights(strategy: Strategy) -> dict[str, Tensor]:
    """Every weight as this rank sees it; what is cut up is put together on each rank."""
    import deepspeed

    whole: dict[str, Tensor] = {}
    for name, parameter in strategy.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            whole[name] = full.detach().clone()
    return whole


def _keep(weights: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, file)


if __name__ == "__main__":
    main()
