"""Which engine answers for a version: the fastest that says what torch in fp32 says on the version's probe rows."""

import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, TypeVar

import torch

from banjoray.config.job import is_url
from banjoray.errors import ConfigError
from banjoray.registry import ModelVersion
from banjoray.tasks.task import task_for
from banjoray.training.strategies import native_bf16

NATIVE_ONNX = ("fp32", "int8")
Named = TypeVar("Named", bound=Hashable)
# Raise it when the code that makes files of a version changes: those that were made under another number are not used.
RECIPE = 6
# Rounds of timing, of which the fastest counts.
ROUNDS = 2


@dataclass(frozen=True)
class Kind:
    """An engine and the precision of its weights."""

    engine: str
    precision: str

    def __str__(self) -> str:
        """``onnx int8``."""
        return f"{self.engine} {self.precision}"


PLAIN, GRAPH = Kind("torch", "fp32"), Kind("onnx", "fp32")


@dataclass(frozen=True)
class Chosen:
    """What answers, why, and what a round over the probe's first rows took each candidate, in milliseconds.

    ``border``: rows whose two highest logits are within it are computed in fp32 as well; 0: none are.
    """

    engine: str = PLAIN.engine
    precision: str = PLAIN.precision
    why: str = "asked for"
    measured_ms: tuple[tuple[str, float], ...] = ()
    border: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"measured_ms": dict(self.measured_ms)}


ASKED = Chosen()


def candidates(engine: str, precision: str, generates: bool, device: str) -> list[Kind]:
    """The kinds that fit what was asked for, on a device; raises ConfigError: none does.

    A task that writes texts has torch alone, and what it writes has no labels to compare: auto is then fp32.
    """
    known = [PLAIN]
    if device == "cuda":
        known += [Kind("torch", "bf16"), Kind("torch", "fp16")]
    else:
        known += [Kind("torch", "bf16")] + [Kind("onnx", each) for each in NATIVE_ONNX if not generates]
    fit = [kind for kind in known if engine in ("auto", kind.engine) and precision in ("auto", kind.precision)]
    if not fit:
        where = "a task that writes texts" if generates and device != "cuda" else f"a version on {device}"
        raise ConfigError(
            f"args: found engine: {engine}, precision: {precision}; {where} has {', '.join(map(str, known))}"
        )
    if len(fit) == 1:
        return fit
    if generates:
        return fit[:1]
    # Where a processor has to emulate bf16 it is slower than fp32, and of two short kinds bf16 is the safer one.
    native = native_bf16(device)
    slow = {Kind("torch", "bf16")} if not native else {Kind("torch", "fp16")}
    return [kind for kind in fit if kind not in slow]


def check_kind(engine: str, precision: str, task: str) -> None:
    """Refuse, before anything starts, what no machine has; raises ConfigError."""
    if task_for(task).generates and (engine == "onnx" or precision == "int8"):
        raise ConfigError(
            f"args: found engine: {engine}, precision: {precision}; {task} writes texts, which runs in "
            "torch alone; that has fp32, bf16 and fp16"
        )
    if (engine, precision) in {("torch", "int8"), ("onnx", "bf16"), ("onnx", "fp16")}:
        raise ConfigError(
            f"args.precision: found {precision} with engine: {engine}; torch has fp32, bf16, fp16, and onnx fp32, int8"
        )


def fastest_that_agrees(
    times: Mapping[Kind, float], wrong: Callable[[Kind], str], failed: Sequence[str] = ()
) -> Chosen:
    """The fastest kind that nothing is wrong with; what was wrong with faster ones is told.

    ``times`` are in seconds; ``wrong`` is asked from the fastest on, and not at all about torch in fp32. ``failed`` are
    reasons why other kinds are no candidates. Raises ConfigError where none is left.
    """
    told = list(failed)
    measured = tuple((str(kind), round(1000 * seconds, 2)) for kind, seconds in times.items())
    for kind in sorted(times, key=lambda kind: times[kind]):
        reason = "" if kind == PLAIN else wrong(kind)
        if reason:
            told.append(f"{kind}: {reason}")
            continue
        found = "the fastest here" if kind == PLAIN else "the fastest that agrees with torch fp32 on the probe rows"
        return Chosen(kind.engine, kind.precision, "; ".join([found, *told]), measured)
    raise ConfigError(f"args.engine: no engine that was asked for agrees with torch fp32: {'; '.join(told)}")


def timed(
    passes: Mapping[Named, Callable[[], object]], clock: Callable[[], float] = time.perf_counter
) -> dict[Named, float]:
    """Seconds of each one's passes over the same rows, in turn, the fastest of some rounds; one more warms up."""
    found = {name: float("inf") for name in passes}
    for round_is in range(ROUNDS + 1):
        for name, run in passes.items():
            began = clock()
            run()
            if round_is:
                found[name] = min(found[name], clock() - began)
    return found


def engine_cache(root: str, version: ModelVersion) -> Path:
    """Where what is made of a version is kept: beside it in a local registry, else in the home folder.

    In a folder of the version's digest and of what made it, so that nothing old is ever taken for it. Where neither can
    be written to, in a folder that no other start finds.
    """
    name = f"{version.digest[:32]}-{_digest_of(_makers())[:8]}"
    places = [] if is_url(root) else [Path(root) / ".engines"]
    for place in (*places, Path.home() / ".cache" / "banjoray" / "engines"):
        folder = place / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="banjoray-engines-"))


def kept_file(file: Path, make: Callable[[Path], None]) -> Path:
    """``file`` as ``make`` writes it, made only where it is not there or is not what its digest says; appears whole."""
    note = file.with_name(f"{file.name}.sha256")
    if file.is_file() and note.is_file() and note.read_text(encoding="ascii") == _sha256(file):
        return file
    fresh = file.with_name(f".{uuid.uuid4().hex}-{file.name}")
    try:
        make(fresh)
        write_whole(note, _sha256(fresh))
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
    return file


def write_whole(file: Path, text: str) -> None:
    """Text in a file that is there whole, or as it was before."""
    fresh = file.with_name(f".{uuid.uuid4().hex}-{file.name}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)


def kept_choice(folder: Path, asked: Sequence[str], choose: Callable[[], Chosen]) -> Chosen:
    """What was chosen before for what is ``asked`` on a machine like this, or what ``choose`` says now, and keeps.

    A file that can't be read is as good as none, and one that can't be written is made by the next start.
    """
    file = folder / f"choice-{_digest_of([*asked, *_machine()])[:16]}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Chosen(**{**found, "measured_ms": tuple(found["measured_ms"].items())})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        chosen = choose()
    # A full disk is no reason not to answer.
    with suppress(OSError):
        write_whole(file, json.dumps(chosen.to_json(), indent=2) + "\n")
    return chosen


def _makers() -> list[str]:
    found = [f"recipe {RECIPE}"]
    for package in ("banjoray", "torch", "transformers", "onnxruntime", "onnx"):
        try:
            found.append(f"{package} {installed(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return found


def _machine() -> list[str]:
    flags = sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return [*flags, gpu, f"{torch.get_num_threads()} threads"]


def _digest_of(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
