"""Ways to train, tried one after the other by workers without Ray; started as a script by `run_cases`.

Everything is imported once and then the workers are forked; one process group serves all cases. Each case is a whole
run over few rows: prepared, trained, scored, with a checkpoint.
"""

import gc
import importlib
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.training.compatibility import Cell
from factories import make_job, sample_rows, tiny_model, write_rows

FREEZES: dict[str, Any] = {
    "none": "none",
    "embeddings": "embeddings",
    "backbone": "backbone",
    "layers": {"layers": 1},
    "patterns": {"patterns": ["encoder.layer.0.*"]},
    "bitfit": {"bitfit": True},
}
# How far a weight may be from that of another strategy, as a share of the way that training takes weights. In bf16
# ZeRO-3 sums up in another order than the others.
BOUNDS = {"fp32": 0.01, "tf32": 0.1, "bf16": 0.1, "fp16": 0.1}
# What a run imports on its way.
IMPORTED = (
    "accelerate",
    "deepspeed",
    "evaluate",
    "peft",
    "sklearn.metrics",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.cpp_extension",
    "transformers.models.bert.modeling_bert",
)


@dataclass(frozen=True)
class Case:
    """A way to train: dotted keys of a job, and the case before it that has to learn the same weights.

    ``poisoned``: the last worker's first loss is no number.
    """

    name: str
    values: dict[str, Any]
    like: str
    poisoned: bool = False


@dataclass(frozen=True)
class Told:
    """What became of a case. ``failure`` is a traceback; ``missing``, what this machine lacks for it; or both empty.

    ``loss`` is that of the validation rows; ``still`` names trained weights that did not move; ``saved`` and
    ``moments`` are the names in the checkpoint, ``trained`` those of the weights that it should hold; ``agreed``: what
    workers hold whole is the same on all; ``distance`` is the farthest that a weight is from the case it should be
    like, as a share of the way that all weights went; ``skipped`` counts steps.
    """

    failure: str = ""
    missing: str = ""
    loss: float = 0.0
    still: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)
    moments: list[str] = field(default_factory=list)
    agreed: bool = False
    distance: float = 0.0
    skipped: int = 0

    def complaints(self, case: Case) -> list[str]:
        """What is wrong with it; a finite loss, moved weights and a whole checkpoint are right."""
        if self.failure:
            return [self.failure]
        precision = case.values.get("train.precision", "fp32")
        moments = [f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in self.trained]
        # The word table of such few rows is cut where it is trained.
        rows = ["banjoray.vocabulary_rows"] * any("word_embeddings" in name for name in self.trained)
        wrong = {
            f"the loss is {self.loss}": not math.isfinite(self.loss),
            "nothing is trained": not self.trained,
            f"{self.still} did not move": self.still != [],
            f"the checkpoint holds {self.saved}": set(self.saved) != {*self.trained, *rows},
            f"it holds the moments {self.moments}": set(self.moments)
            != {*moments, *(["loss_scale"] if precision == "fp16" else [])},
            "workers hold different weights": not self.agreed,
            f"{self.distance:.1%} off {case.like}": not self.distance <= BOUNDS[precision],
            # Under fp16 an overflow is how the loss scale finds its place.
            f"{self.skipped} steps were skipped": self.skipped != case.poisoned and precision != "fp16",
        }
        return [complaint for complaint, true in wrong.items() if true]


def case_of(cell: Cell) -> Case:
    """A cell as a case, like the ddp one that trains the same weights in the same precision."""
    values: dict[str, Any] = {
        "scale.strategy": cell.strategy,
        "freeze": FREEZES[cell.freeze],
        "train.precision": cell.precision,
        "scale.offload": cell.offload,
        "scale.gpus_per_worker": int(cell.device == "gpu"),
    }
    if cell.adapter != "none":
        values["adapter"] = {"type": cell.adapter, "dropout": 0.0}
    same = (cell.freeze, cell.adapter, cell.precision)
    return Case("-".join((cell.strategy, *same, cell.offload)), values, "-".join(("ddp", *same, "none")))


def run_cases(folder: Path, cases: Iterable[Case], workers: int) -> dict[str, Told]:
    """Try all cases, ddp first; name -> what became of it. Where the workers died, the rest have their last words."""
    plan = sorted(cases, key=lambda case: case.name != case.like)
    job = _tiny_job(folder).with_values({"scale.workers": workers, "scale.collective_timeout_s": 120})
    (folder / "plan.json").write_text(json.dumps({"job": job.to_json(), "cases": [asdict(case) for case in plan]}))
    settings = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if not any(case.values.get("scale.gpus_per_worker") for case in plan):
        settings["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, __file__, str(folder / "plan.json")]
    with (folder / "log").open("wb") as log:
        subprocess.run(command, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT, check=False)
    lines = (folder / "told.jsonl").read_text().splitlines() if (folder / "told.jsonl").exists() else []
    told = {case.name: Told(**json.loads(line)) for case, line in zip(plan, lines, strict=False)}
    last_words = (folder / "log").read_text(errors="replace")[-4000:]
    return {case.name: told.get(case.name, Told(f"not reached:\n{last_words}")) for case in plan}


def _tiny_job(folder: Path) -> JobConfig:
    """Two steps over 16 rows, with a tiny BERT of two blocks whose weights are large enough to tell texts apart."""
    import torch
    from transformers import AutoConfig, AutoModel

    tiny_model(folder / "base")
    config = AutoConfig.from_pretrained(folder / "base", initializer_range=0.3, num_hidden_layers=2)
    torch.manual_seed(7)
    AutoModel.from_config(config).save_pretrained(folder / "base")
    job = make_job(folder, train__epochs=1, train__batch_size=8, tracking=[], train__torch_compile="off")
    assert job.data.files
    assert job.data.files.validation
    write_rows(Path(job.data.files.train), sample_rows("train")[:16])
    write_rows(Path(job.data.files.validation), sample_rows("train")[:6])
    return job.with_values({"data.files.test": None, "scale.nvme_path": None})


def main(plan: Path) -> None:
    """Every case of the plan, with as many workers as its job has."""
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    told = json.loads(plan.read_text())
    job, cases = validate(JobConfig, told["job"], "plan"), [Case(**case) for case in told["cases"]]
    workers = job.scale.most_workers
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    # DeepSpeed collects garbage for every engine that it makes, among all that was imported.
    gc.collect()
    gc.freeze()
    children = []
    for rank in range(1, workers):
        if not (child := os.fork()):
            _end(_rank(job, cases, rank, store.port, plan.parent))
        children.append(child)
    code = _rank(job, cases, 0, store.port, plan.parent)
    if code:
        for child in children:
            os.kill(child, 9)
    _end(code)


def _end(code: int) -> None:
    """gloo's threads and DeepSpeed's exit hooks have nothing left to do, and take seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank(job: JobConfig, cases: list[Case], rank: int, port: int, folder: Path) -> int:
    import torch

    try:
        place: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.scale.most_workers}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
        cuda = bool(cases[0].values.get("scale.gpus_per_worker"))
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=job.scale.most_workers,
            timeout=timedelta(seconds=job.scale.collective_timeout_s),
        )
        bench = _Bench(job, folder)
        with (folder / "told.jsonl").open("w") if rank == 0 else Path(os.devnull).open("w") as file:
            for case in cases:
                print(json.dumps(asdict(bench.told(case))), file=file, flush=True)
    except Exception:  # noqa: BLE001  the others end too, and the log says why
        traceback.print_exc()
        return 1
    return 0


class _Bench:
    """One worker's place: tries cases, and keeps what the first of their kind learned."""

    def __init__(self, job: JobConfig, folder: Path) -> None:
        from deepspeed.runtime.swap_tensor import optimizer_utils

        from banjoray.training import loop
        from banjoray.training.zero import Zero

        self._job, self._folder = job, folder
        self._ready: dict[str, Any] = {}
        self._learned: dict[str, Any] = {}
        self._strategy: Any = None
        self._poisoned = False
        vars(loop)["build"] = self._build
        config = Zero._config

        def cut(zero: Zero, *asked: Any) -> dict[str, Any]:
            # Parameters as small as these would stay whole on every worker under ZeRO-3, and off the disk.
            found = config(zero, *asked)
            found["zero_optimization"]["stage3_param_persistence_threshold"] = 256
            return found | {"aio": {"block_size": 4096}}

        Zero._config = cut  # type: ignore[method-assign, assignment]
        vars(optimizer_utils)["MIN_AIO_BYTES"] = 4096

    def told(self, case: Case) -> Told:
        """What became of a case, as all workers agree."""
        import torch

        try:
            told = self._try(case)
        except Exception:  # noqa: BLE001  one case fails, the rest go on
            told = Told(traceback.format_exc())
        # What DeepSpeed keeps of its engines would be looked through by every collection from now on.
        gc.freeze()
        everyones: list[Any] = [None] * self._job.scale.most_workers
        torch.distributed.all_gather_object(everyones, told)
        found: Told = next((one for one in everyones if one.failure), everyones[0])
        return found

    def _build(self, job: JobConfig, model: Any, precision: Any) -> Any:
        from banjoray.training import strategies

        self._strategy = strategy = strategies.build(job, model, precision)
        gradients, poisoned = strategy.gradients, [self._poisoned and strategy.rank == strategy.workers - 1]

        def watched(forward: Any, last: bool) -> Any:
            bad, poisoned[0] = poisoned[0], False
            return gradients((lambda module: forward(module) * float("nan")) if bad else forward, last)

        strategy.gradients = watched  # type: ignore[method-assign]
        return strategy

    def _try(self, case: Case) -> Told:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        from banjoray.training.compatibility import check
        from banjoray.training.interface import Callbacks
        from banjoray.training.loop import fit

        values = case.values
        if values.get("scale.offload") == "nvme":
            if not AsyncIOBuilder().is_compatible(verbose=False):
                return Told(missing="DeepSpeed's async_io can't be built here: it needs libaio-dev")
            values = {**values, "scale.nvme_path": str(self._folder / "nvme")}
        job = self._job.with_values(values)
        check(job)
        ready, model = self._prepared(job)
        self._poisoned = case.poisoned
        run = self._folder / "runs" / case.name
        checkpoint = fit(job, ready.rows, ready.task, ready.start, str(run), Callbacks()).checkpoint
        told = self._looked_at(case, model, checkpoint, run) if self._strategy.rank == 0 else Told()
        return replace(told, agreed=self._agreed())

    def _prepared(self, job: JobConfig) -> Any:
        """What jobs that freeze and adapt alike have in common: what `prepare` found, and the model at its start."""
        from banjoray.training.preflight import prepare

        key = f"{job.freeze!r} {job.adapter!r}"
        if key not in self._ready:
            ready = prepare(job)
            self._ready[key] = ready, ready.start.model()
        return self._ready[key]

    def _looked_at(self, case: Case, model: Any, checkpoint: Any, run: Path) -> Told:
        """What stands in a case's checkpoint, given the model as it was at the start."""
        import torch
        from safetensors.torch import load_file

        from banjoray.training.learned import WEIGHTS, load

        folder = run / "checkpoints" / checkpoint.name
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        load(model, folder, None, checkpoint.position.decay)
        learned = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model.load_state_dict(start, strict=False)
        self._learned.setdefault(case.like, learned)
        return Told(
            loss=checkpoint.metrics["loss"],
            still=[name for name, tensor in learned.items() if torch.equal(tensor, start[name])],
            trained=sorted(learned),
            saved=sorted(load_file(folder / WEIGHTS)),
            moments=sorted(load_file(folder / "optimizer.safetensors")),
            distance=_distance(learned, self._learned[case.like], start),
            skipped=checkpoint.position.skipped,
        )

    def _agreed(self) -> bool:
        """Whether the parameters that every worker holds whole are the same on all; others are held once."""
        import torch

        from banjoray.training.learned import digest

        whole = {
            name: p.detach().cpu()
            for name, p in self._strategy.module.named_parameters()
            if not hasattr(p, "full_tensor") and p.numel() == getattr(p, "ds_numel", p.numel())
        }
        found: list[Any] = [None] * self._job.scale.most_workers
        torch.distributed.all_gather_object(found, digest(whole))
        return len(set(found)) == 1


def _distance(learned: Mapping[str, Any], like: Mapping[str, Any], start: Mapping[str, Any]) -> float:
    """The largest root mean square of a weight's differences, per root mean square of the way all of them went.

    Of all but the biases of key projections: they have no true gradient, and go where rounding sends them.
    """
    import torch

    way = torch.cat([(like[name] - start[name]).flatten() for name in like]).square().mean().sqrt()
    far = {name: (learned[name] - like[name]).square().mean().sqrt() / way for name in like}
    return max(float(share) for name, share in far.items() if not name.endswith("key.bias"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
