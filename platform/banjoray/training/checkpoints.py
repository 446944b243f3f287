"""Checkpoints of one run: complete or absent, the best and the newest kept.

<run>/checkpoints/step-00000038/
    weights.safetensors      what training changes, whole, by name; frozen weights are the base model's
    optimizer.safetensors    AdamW's moments, whole, by parameter name: any number of workers can go on
    checkpoint.json          where the run stood, and the digest of every file; written last
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from banjoray.errors import TrainingFailed

MANIFEST = "checkpoint.json"
MICROBATCHES = "microbatches.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` optimizer steps are done, the next batch is ``batch`` of ``epoch``.

    ``loss`` sums the losses of the steps done in this epoch; ``history`` has one entry per finished epoch: its metrics
    and training loss. ``skipped`` steps changed nothing, ``broken`` of them since their loss or gradients were no
    numbers (the others look for fp16's loss scale); ``decay`` is the number by which weight decay has multiplied the
    rows of a word table that no text uses.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    history: tuple[dict[str, float], ...] = ()
    skipped: int = 0
    broken: int = 0
    decay: float = 1.0


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; ``metrics`` is empty for one taken inside an epoch.

    ``frozen`` is the digest of the weights that are not in it. ``thresholds`` are the score's: label -> the score from
    which on a row has it; empty where labels have none.
    """

    name: str
    position: Position
    metrics: dict[str, float]
    frozen: str
    files: dict[str, str] = field(repr=False)
    thresholds: dict[str, float] = field(repr=False, default_factory=dict)


class Store:
    """The checkpoints of one run, in a local folder or under any fsspec URL."""

    def __init__(self, run: str, warn: Callable[[str], None]) -> None:
        self._filesystem, root = fsspec.core.url_to_fs(run)
        self._local = isinstance(self._filesystem, LocalFileSystem)
        self.root = f"{root.rstrip('/')}/checkpoints"
        self._warn = warn

    def all(self) -> list[Checkpoint]:
        """Every complete checkpoint, oldest first; files are not read."""
        found = []
        for path in self._filesystem.glob(f"{self.root}/step-*/{MANIFEST}"):
            try:
                saved = json.loads(self._filesystem.cat_file(path))
            except ValueError as error:
                self._warn(f"checkpoint {path.split('/')[-2]} is torn ({MANIFEST}: {error}); using the one before")
                continue
            position = Position(**saved["position"] | {"history": tuple(saved["position"]["history"])})
            found.append(Checkpoint(**saved | {"name": path.split("/")[-2], "position": position}))
        return sorted(found, key=lambda checkpoint: checkpoint.name)

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint whose files are what its manifest says; torn ones are named, and deleted."""
        for checkpoint in reversed(self.all()):
            torn = self._first_torn(checkpoint)
            if torn is None:
                return checkpoint
            self._warn(f"checkpoint {checkpoint.name} is torn ({torn}); using the one before")
            # Left there it would pass for the newest, and `prune` would delete what is made after it.
            self._filesystem.rm(f"{self.root}/{checkpoint.name}", recursive=True)
        return None

    def best(self, metric: str, mode: str) -> Checkpoint | None:
        """The scored checkpoint with the best metric; the earlier one of two equals."""
        scored = [checkpoint for checkpoint in self.all() if checkpoint.metrics]
        sign = 1 if mode == "max" else -1
        return max(scored, key=lambda checkpoint: sign * checkpoint.metrics[metric], default=None)

    def save(
        self,
        position: Position,
        metrics: Mapping[str, float],
        frozen: str,
        write: Callable[[Path], None],
        thresholds: Mapping[str, float] | None = None,
    ) -> Checkpoint:
        """A new checkpoint with the files that ``write`` puts into the folder it is given.

        Raises TrainingFailed if the disk is full; earlier checkpoints stay whole.
        """
        name = f"step-{position.step:08d}"
        parent = self.root if self._local else None
        if parent:
            Path(parent).mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=parent))
        try:
            write(staging)
            files = _digests(staging)
            checkpoint = Checkpoint(name, position, dict(metrics), frozen, files, dict(thresholds or {}))
            (staging / MANIFEST).write_text(json.dumps(asdict(checkpoint), indent=1))
            self._publish(staging, name)
        # A full disk is an OSError from Python, and a SafetensorError from safetensors.
        except (OSError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise TrainingFailed(
                f"checkpoint {name} can't be written to {self.root} ({getattr(error, 'strerror', None) or error}); "
                "the checkpoints before it are whole. Free space, then run the same command to go on."
            ) from None
        return checkpoint

    def _publish(self, staging: Path, name: str) -> None:
        target = f"{self.root}/{name}"
        if self._local:
            # A crash between two runs of the same step leaves an old folder; it is equal or torn.
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
            return
        for path in sorted(staging.rglob("*"), key=lambda path: (path.name == MANIFEST, path)):
            if path.is_file():
                self._filesystem.put_file(str(path), f"{target}/{path.relative_to(staging)}")
        shutil.rmtree(staging)

    def prune(self, metric: str, mode: str, keep: int) -> None:
        """Delete all but ``keep`` checkpoints, the best and the newest others, and what crashed writers left."""
        best = self.best(metric, mode)
        others = [checkpoint.name for checkpoint in self.all() if checkpoint != best]
        kept = {best.name, *others[-(keep - 1) :]} if best else set(others[-keep:])
        for path in self._filesystem.ls(self.root, detail=False):
            if path.rstrip("/").rsplit("/", 1)[-1] not in {*kept, MICROBATCHES}:
                self._filesystem.rm(path, recursive=True)

    def keep_only(self, kept: Collection[Checkpoint]) -> int:
        """Delete every other checkpoint, and what crashed writers left; the bytes that this freed."""
        freed = 0
        names = self._filesystem.ls(self.root, detail=False) if self._filesystem.isdir(self.root) else []
        for path in names:
            if path.rstrip("/").rsplit("/", 1)[-1] not in {checkpoint.name for checkpoint in kept}:
                freed += int(self._filesystem.du(path))
                self._filesystem.rm(path, recursive=True)
        return freed

    def size(self, *checkpoints: Checkpoint) -> int:
        """How many bytes checkpoints take."""
        paths = [f"{self.root}/{checkpoint.name}/{name}" for checkpoint in checkpoints for name in checkpoint.files]
        return sum(int(self._filesystem.size(path)) for path in paths)

    def make_room(self, metric: str, mode: str, incoming: int, budget: int) -> None:
        """Delete the oldest checkpoints until ``incoming`` bytes more are within ``budget``.

        The best and the newest stay: with them a run can go on and end.
        """
        whole = self.all()
        sizes = {checkpoint.name: self.size(checkpoint) for checkpoint in whole}
        best = self.best(metric, mode)
        for checkpoint in whole[:-1]:
            if sum(sizes.values()) + incoming > budget and checkpoint != best:
                self._filesystem.rm(f"{self.root}/{checkpoint.name}", recursive=True)
                del sizes[checkpoint.name]

    def microbatches(self, at_least: int) -> int:
        """Into how many microbatches a worker cuts its part of a batch: ``at_least`` so many, more after a failure."""
        path = f"{self.root}/{MICROBATCHES}"
        noted = json.loads(self._filesystem.cat_file(path)) if self._filesystem.exists(path) else at_least
        return max(at_least, int(noted))

    def note_microbatches(self, count: int) -> None:
        """Make every later start of this run cut its batches into at least ``count`` microbatches."""
        self._filesystem.makedirs(self.root, exist_ok=True)
        self._filesystem.pipe_file(f"{self.root}/{MICROBATCHES}", str(count).encode())

    def local(self, checkpoint: Checkpoint) -> Path:
        """A local folder with the checkpoint's files: the folder itself, or a download."""
        if self._local:
            return Path(self.root) / checkpoint.name
        into = Path(tempfile.mkdtemp(prefix="banjoray-checkpoint-"))
        for name in (*checkpoint.files, MANIFEST):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            self._filesystem.get_file(f"{self.root}/{checkpoint.name}/{name}", str(into / name))
        return into

    def _first_torn(self, checkpoint: Checkpoint) -> str | None:
        for name, digest in checkpoint.files.items():
            path = f"{self.root}/{checkpoint.name}/{name}"
            if not self._filesystem.isfile(path):
                return f"{name} is missing"
            with self._filesystem.open(path, "rb") as file:
                if _sha256(file) != digest:
                    return f"{name} differs from its digest"
        return None


class Saver:
    """Writes checkpoints while training goes on: one at a time, in the order in which they were made.

    Used as a context: at its end what was begun is written.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="banjoray-checkpoint")
        self._pending: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do ``work`` beside the caller; first wait for what was begun before, and raise what it raised."""
        self.settle()
        self._pending = self._pool.submit(work)

    def settle(self) -> None:
        """Wait until everything is written; raises TrainingFailed if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(wait=True)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = _sha256(file)
    return digests


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
