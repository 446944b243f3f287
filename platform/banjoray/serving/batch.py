"""`predict`: answers for files of any size, by actors that hold the engine an endpoint would hold.

A row goes the way of a request: parsed, encoded, batched by length, answered by the version's task. Rows keep their
order; one that can't be answered is written beside its error, and the rest go on.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from pyarrow import csv

from banjoray.config.job import JobConfig, is_url, load_job
from banjoray.data.bad_rows import BadCell
from banjoray.data.batches import sorted_batches
from banjoray.data.lines import parsed
from banjoray.errors import ConfigError, DataError, RequestError
from banjoray.garbage import collect_later
from banjoray.registry import Registry

with collect_later():
    import ray
    from banjoray.serving.engine import Engine, load
    from banjoray.training.run import Say, cluster

ROWS = 512
LINES = (".jsonl", ".txt")
TABLES = (".csv", ".parquet")
# Bytes of a csv file that are read at once: no row may be longer.
CSV_BLOCK = 2**26


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
    # Lines and cells of a csv file are bytes in disguise: one that is not UTF-8 fails alone.
    if suffix == ".parquet":
        rows = ray.data.read_parquet(path)
    elif suffix == ".csv":
        rows = ray.data.read_csv(path, **_csv_options(job))
    else:
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


def _csv_options(job: JobConfig) -> dict[str, Any]:
    """How a csv file is read: what a row is asked by is text, also where it is a number or says NA."""
    texts = {name for name in job.data.columns.model_dump().values() if name} | {"inputs"}
    return {
        "read_options": csv.ReadOptions(use_threads=False, encoding="latin-1", block_size=CSV_BLOCK),
        "parse_options": csv.ParseOptions(newlines_in_values=True),
        "convert_options": csv.ConvertOptions(
            column_types={name.encode().decode("latin-1"): pa.string() for name in texts}, strings_can_be_null=False
        ),
    }


class Scorer:
    """An actor of `predict`: turns rows into what is told of each, as JSON."""

    def __init__(self, version: str, registry: str, kind: str, parameters: dict[str, Any], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._engine: Engine = load(version, registry)
        self._kind, self._parameters = kind, parameters
        job = load_job(Registry(registry).fetch(self._engine.version) / "job.yaml")
        self._columns = self._engine.task.asked(job.data)

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
            return self._asked(self._read(row))
        except UnicodeDecodeError as error:
            part = "line" if self._kind in LINES else "cell"
            return RequestError(f"not UTF-8 (byte {error.start + 1} of the {part})")
        except BadCell as error:
            return RequestError(error.told)
        except RequestError as error:
            return error

    def _read(self, row: Mapping[str, Any]) -> Any:
        """A row as its file has it; raises UnicodeDecodeError, BadCell."""
        if self._kind in LINES:
            line = _undisguised(row["text"]).rstrip("\r")
            return line if self._kind == ".txt" else parsed(line)
        if self._kind == ".csv":
            return {_undisguised(name): _undisguised(cell) for name, cell in row.items()}
        return row

    def _asked(self, found: Any) -> Any:
        """What a row of a file asks; raises RequestError."""
        if isinstance(found, str):
            return found
        if not isinstance(found, Mapping):
            raise RequestError(f"found {type(found).__name__}; needed an object with columns")
        if "inputs" in found:
            return found["inputs"]
        asked = {}
        for key, name in self._columns.items():
            with suppress(KeyError):
                asked[key] = _cell(found, name)
        if not asked:
            needed = ", ".join(f"'{name}'" for name in self._columns.values())
            raise RequestError(f"none of the columns {needed}, and no 'inputs'; found {sorted(map(str, found))}")
        return self._engine.task.inputs(asked)


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """A cell as plain values; a dot reaches into a nested column (translation.en). KeyError: there is none."""
    outer, _, inner = name.partition(".")
    if name not in row and isinstance(row.get(outer), Mapping):
        return _cell(row[outer], inner)
    cell = row[name]
    return cell.tolist() if isinstance(cell, np.ndarray) else cell


def _undisguised(cell: Any) -> Any:
    return cell.encode("latin-1").decode("utf-8") if isinstance(cell, str) else cell


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
    if engine.task.generates:
        # It makes batches of its own: rows that are written alike, of like lengths.
        return engine.forward(features) if features else []
    lengths = np.fromiter(map(len, features), dtype=np.int64)
    outputs: list[Any] = [None] * len(features)
    for batch in sorted_batches(lengths, engine.pass_tokens):
        for number, found in zip(batch, engine.forward([features[number] for number in batch]), strict=True):
            outputs[number] = found
    return outputs
