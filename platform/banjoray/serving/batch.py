"""`predict`: answers for files of any size, by actors that hold the engine an endpoint would hold.

A row goes the way of a request: parsed, encoded, batched by length, answered by the version's task. Rows keep their
order; one that can't be answered is written beside its error, and the rest go on.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np

import ray
from banjoray.config.job import JobConfig, is_url, load_job
from banjoray.data.batches import sorted_batches
from banjoray.errors import ConfigError, DataError, RequestError
from banjoray.registry import Registry
from banjoray.serving.engine import Engine, load
from banjoray.training.run import Say, cluster
from banjoray.training.scoring import EVALUATION_TOKENS

# Columns that a request may have, by the names in data.columns of the version's job.
ASKED = ("text", "text_pair", "question", "context")
ROWS = 512
LINES = (".jsonl", ".txt")
TABLES = {".csv": "read_csv", ".parquet": "read_parquet"}


@dataclass(frozen=True)
class Predicted:
    """What became of a file's rows; ``first_errors`` are the first few, each with its row."""

    version: str
    output: str
    rows: int
    failed: int
    first_errors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


def predict(
    reference: str,
    file: str,
    output: str,
    registry: str = "./registry",
    parameters: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Predicted:
    """Answer every row of ``file`` with a registered version; ``output`` gets a JSON line per row.

    A line holds ``row`` (from 1), and ``answer`` or ``error``. ``parameters`` are those of a request. The output is
    complete or absent. Raises RegistryError, ConfigError, DataError: a file that can't be read.
    """
    if not is_url(registry):
        registry = str(Path(registry).expanduser().absolute())
    version = Registry(registry).resolve(reference)
    folder = Registry(registry).fetch(version)
    job = load_job(folder / "job.yaml")
    _check(file, output)
    failed: list[str] = []
    count = rows = 0
    with cluster(job, say), _written(output) as lines:
        say(f"{version} answers {file}")
        for told in _answers(job, str(version), registry, file, dict(parameters or {})):
            rows += 1
            if "error" in told:
                count += 1
                failed += [f"row {rows}: {told['error']}"] if len(failed) < 10 else []
            lines.write(json.dumps({"row": rows} | told, ensure_ascii=False) + "\n")
    return Predicted(str(version), output, rows, count, tuple(failed))


def _check(file: str, output: str) -> None:
    suffix = PurePosixPath(file).suffix.lower()
    if suffix not in (*LINES, *TABLES):
        known = " ".join((*LINES, *TABLES))
        raise DataError(f"'{file}' is of no known kind; needed one of {known}")
    try:
        filesystem, plain = fsspec.core.url_to_fs(file)
    except (ImportError, ValueError) as error:
        raise DataError(f"'{file}' is behind no known protocol ({error})") from None
    if not filesystem.isfile(plain):
        raise DataError(f"no file '{file}'; paths are looked up from the working directory")
    if not is_url(output) and not Path(output).absolute().parent.is_dir():
        raise ConfigError(f"-o {output}: there is no folder {Path(output).absolute().parent}")


@contextmanager
def _written(output: str) -> Iterator[Any]:
    """A text file that appears when all of it is written."""
    if is_url(output):
        with fsspec.open(output, "w", encoding="utf-8") as file:
            yield file
        return
    beside = Path(output).with_name(f".{Path(output).name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            yield file
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)


def _answers(
    job: JobConfig, version: str, registry: str, file: str, parameters: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """What is told of every row, in the file's order."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    ray.data.DataContext.get_current().enable_progress_bars = False
    path = file if is_url(file) else str(Path(file).absolute())
    suffix = PurePosixPath(file).suffix.lower()
    if suffix in TABLES:
        rows = getattr(ray.data, TABLES[suffix])(path)
    else:
        # As bytes in disguise: a line that is not UTF-8 fails alone.
        rows = ray.data.read_text(path, encoding="latin-1", drop_empty_lines=False)
    each, gpus = job.scale.cpus_per_worker, job.scale.gpus_per_worker
    have = ray.cluster_resources()
    actors = max(1, int(have.get("CPU", 1) // each)) if not gpus else max(1, int(have.get("GPU", 1) // gpus))
    told = rows.map_batches(
        Scorer,
        fn_constructor_args=(version, registry, suffix, parameters, each),
        batch_size=ROWS,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=each,
        num_gpus=gpus,
    )
    for batch in told.iter_batches(batch_size=ROWS, batch_format="numpy"):
        for line in batch["told"]:
            yield json.loads(line)


class Scorer:
    """An actor of `predict`: turns rows into what is told of each, as JSON."""

    def __init__(self, version: str, registry: str, kind: str, parameters: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._engine: Engine = load(version, registry)
        self._kind, self._parameters = kind, parameters
        named = load_job(Registry(registry).fetch(self._engine.version) / "job.yaml").data.columns
        self._columns = {key: name for key in ASKED if (name := getattr(named, key, None)) is not None}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """{"told": a JSON object per row}."""
        names = list(batch)
        rows = [dict(zip(names, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
        return {
            "told": [json.dumps(told) for told in answered(self._engine, map(self._inputs, rows), self._parameters)]
        }

    def _inputs(self, row: Mapping[str, Any]) -> Any:
        """A row as the inputs of a request; an exception that says what is wrong with it."""
        try:
            found: Any = row
            if self._kind in LINES:
                line = row["text"].encode("latin-1").decode("utf-8").rstrip("\r")
                found = line if self._kind == ".txt" else json.loads(line)
        except UnicodeDecodeError as error:
            return RequestError(f"not UTF-8 (byte {error.start + 1})")
        except json.JSONDecodeError as error:
            return RequestError(f"not JSON ({error.msg} at character {error.pos})")
        if not isinstance(found, Mapping | str):
            return RequestError(f"found {type(found).__name__}; needed an object with columns")
        if isinstance(found, str):
            return found
        if "inputs" in found:
            return found["inputs"]
        asked = {key: found[name] for key, name in self._columns.items() if name in found}
        if not asked:
            needed = ", ".join(f"'{name}'" for name in self._columns.values())
            return RequestError(f"none of the columns {needed}, and no 'inputs'; found {sorted(map(str, found))}")
        return asked["text"] if list(asked) == ["text"] else asked


def answered(engine: Engine, inputs: Iterable[Any], parameters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"answer"} or {"error"} for every row's inputs, in order; forward passes are batched by length over all rows."""
    told: list[dict[str, Any]] = []
    kept: list[tuple[int, Any, list[Any], int]] = []
    features: list[Any] = []
    for number, row in enumerate(inputs):
        told.append({})
        try:
            if isinstance(row, RequestError):
                raise row
            ask = engine.task.parse(row, parameters)
            if ask.stream:
                raise RequestError("stream: found true; the rows of a file get whole answers, leave it out")
            encoded = engine.encode(ask.rows)
        except RequestError as error:
            told[number] = {"error": error.message}
            continue
        kept.append((number, ask, encoded, len(features)))
        features += [feature for found in encoded for feature in found]
    outputs = _forward(engine, features)
    for number, ask, encoded, start in kept:
        mine = outputs[start : start + sum(map(len, encoded))]
        try:
            told[number] = {"answer": engine.answer(ask, encoded, mine)}
        except RequestError as error:
            told[number] = {"error": error.message}
    return told


def _forward(engine: Engine, features: Sequence[Any]) -> list[np.ndarray]:
    lengths = np.fromiter(map(len, features), dtype=np.int64)
    outputs: list[Any] = [None] * len(features)
    for batch in sorted_batches(lengths, EVALUATION_TOKENS):
        for number, found in zip(batch, engine.forward([features[number] for number in batch]), strict=True):
            outputs[number] = found
    return outputs
