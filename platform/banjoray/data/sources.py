"""Raw rows by split, from the hub, from files, or from a set that ships with banjoray.

Rows come as `datasets.Dataset`, memory-mapped; every cell that training will read has been looked at.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from banjoray.config.job import DataConfig, FilesConfig, HubConfig
from banjoray.data.squad import flattened
from banjoray.errors import DataError

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
SHIPPED = Path(__file__).parent / "samples"
_READERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".conll": "conll",
    ".iob": "conll",
    ".bio": "conll",
}


@dataclass(frozen=True)
class Source:
    """The rows of one split and the name that errors call it by (a file name, or set:split)."""

    rows: "datasets.Dataset"
    name: str

    def where(self, row: int) -> str:
        """How an error points at a row; rows count from 1, as lines of a JSON Lines file do."""
        return f"{self.name} row {row + 1}"


def read(data: DataConfig, hub: HubConfig, columns: Mapping[str, str], token: str | None = None) -> dict[str, Source]:
    """Split name -> rows, for the splits that exist; ``train`` always does.

    ``columns`` are those that have to be there: keys of data.columns and their names. Raises DataError: an unreadable
    file (with the line that broke it), no such data set, a missing column, no rows.
    """
    # Not above: it imports huggingface_hub, which reads the job's hub settings at that moment, once.
    import datasets

    # Reading a file of one's own would tell the hub.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    # What can't be read is raised below, in one line.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    files = _shipped(data.source) if data.source and data.source.startswith("banjoray:") else data.files
    sources = _read_files(files, columns) if files else _read_hub(data, hub, token)
    if "train" not in sources:
        raise DataError(f"data.source: '{data.source}' has no train split; it has {', '.join(sources) or 'nothing'}")
    sources = {split: _opened(source, columns) for split, source in sources.items()}
    for source in sources.values():
        check_columns(source, columns)
    return sources


def _opened(source: Source, columns: Mapping[str, str]) -> Source:
    """The source with what is read out of nested columns (``translation.en``) beside them, under the dotted name."""
    import datasets

    rows = source.rows
    dotted = {column for column in columns.values() if column not in rows.column_names}
    outer = [name for name in rows.column_names if any(column.startswith(f"{name}.") for column in dotted)]
    if not outer:
        return source
    # flatten() opens every nested column of a set: these alone are taken out for it.
    inner = rows.select_columns(outer).flatten()
    wanted = [name for name in inner.column_names if name in dotted]
    if not wanted:
        return source
    beside = datasets.concatenate_datasets([rows, inner.select_columns(wanted)], axis=1)
    return Source(beside, source.name)


def _shipped(source: str) -> FilesConfig:
    """The files of a data set that ships with banjoray."""
    folder = SHIPPED / source.removeprefix("banjoray:")
    if not (folder / "train.jsonl").is_file():
        known = ", ".join(sorted(f"banjoray:{path.name}" for path in SHIPPED.iterdir() if path.is_dir()))
        raise DataError(f"data.source: no data set '{source}' ships with banjoray; there is {known}")
    return FilesConfig(**{split: str(folder / f"{split}.jsonl") for split in SPLITS})


def _read_files(files: FilesConfig, columns: Mapping[str, str]) -> dict[str, Source]:
    paths = {split: getattr(files, split) for split in SPLITS}
    return {split: _read_file(path, columns, split) for split, path in paths.items() if path}


def _read_file(path: str, columns: Mapping[str, str], split: str) -> Source:
    """One file as one split."""
    import datasets

    name = PurePosixPath(path).name
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"data.files.{split}: '{path}' is of no known kind; needed one of {' '.join(sorted(_READERS))}")
    _check_there(path, split)
    if _READERS[suffix] == "conll":
        from banjoray.data.conll import read_conll

        return read_conll(path, name, columns)
    if suffix == ".json" and "answers" in columns and (nested := flattened(path, name, columns)) is not None:
        return Source(nested, name)
    options: dict[str, Any] = {}
    if _READERS[suffix] == "csv":
        # Without these, pandas turns the text "NA" into a missing value and the text "007" into a number.
        texts = [column for key, column in columns.items() if key != "label"]
        options = {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False}
        options["converters"] = dict.fromkeys(texts, str)
    try:
        rows = datasets.load_dataset(_READERS[suffix], data_files={split: path}, split=split, **options)
        # The JSON reader takes any bytes for text.
        rows.data.validate(full=True)
        if "__index_level_0__" in rows.column_names:
            raise ValueError("every row has more cells than the header")
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(_why_unreadable(path, name, suffix, error)) from None
    except ConnectionError as error:
        # Also what `datasets` raises for any URL where hub.offline is true.
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.files.{split}: '{path}' can't be fetched ({reason}); with hub.offline, files have to be here already"
        ) from None
    return Source(rows, name)


def _check_there(path: str, split: str) -> None:
    try:
        filesystem, plain = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"data.files.{split}: '{path}' is behind no known protocol ({error})") from None
    if not filesystem.isfile(plain):
        raise DataError(f"data.files.{split}: no file '{path}'; paths are looked up from the working directory")
    if filesystem.size(plain) == 0:
        raise DataError(f"data.files.{split}: '{path}' is empty; needed rows")


def _why_unreadable(path: str, name: str, suffix: str, error: Exception) -> str:
    """The first line of the file that breaks it, or what the reader said."""
    finding = None
    if suffix != ".parquet":
        finding = _first_foreign_line(path)
        if finding is None:
            with fsspec.open(path, "rt", encoding="utf-8", newline="") as file:
                finding = _first_bad_line(file, suffix)
    cause = str(error.__cause__ or error).splitlines()[0]
    if "corresponds to no data" in cause:
        cause = "it has no rows"
    return f"data: {name} can't be read: {finding or cause}"


def _first_foreign_line(path: str) -> str | None:
    with fsspec.open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte {error.start + 1} of the line)"
    return None


def _first_bad_line(file: Any, suffix: str) -> str | None:
    if suffix == ".jsonl":
        kinds: dict[str, type] = {}
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"row {number} is not JSON ({error.msg} at character {error.pos})"
            if not isinstance(row, dict):
                return f"row {number} holds {type(row).__name__}, needed an object with columns"
            for column, cell in row.items():
                kind = kinds.setdefault(column, type(cell))
                if cell is not None and kind is not type(None) and type(cell) is not kind:
                    return f"row {number}, column '{column}' holds {cell!r}; the rows before hold {kind.__name__}"
    if suffix in (".csv", ".tsv"):
        reader = csv.reader(file, delimiter="\t" if suffix == ".tsv" else ",")
        width = len(next(reader, []))
        for number, cells in enumerate(reader, start=1):
            if cells and len(cells) != width:
                return f"row {number} has {len(cells)} cells; the header has {width}"
    return None


def _read_hub(data: DataConfig, hub: HubConfig, token: str | None) -> dict[str, Source]:
    import datasets

    try:
        loaded = datasets.load_dataset(data.source, data.config, revision=data.revision, token=token)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        cure = "hub.offline is true: set it to false, or use data.files" if hub.offline else "check the id, the network"
        raise DataError(f"data.source: '{data.source}' can't be had ({reason}); {cure}") from None
    names = {"validation": ("validation", "valid", "dev"), "train": ("train",), "test": ("test",)}
    return {
        split: Source(loaded[name], f"{data.source}:{name}")
        for split, known in names.items()
        for name in known
        if name in loaded
    }


def check_columns(source: Source, columns: Mapping[str, str]) -> None:
    """Refuse a source without rows, or without one of the columns (keys of data.columns and their names)."""
    have = source.rows.column_names
    for key, column in columns.items():
        if column not in have:
            listed = ", ".join(f"'{name}'" for name in _names(source.rows))
            raise DataError(
                f"data: column '{column}' not in {source.name}; it has {listed}. Set data.columns.{key}=NAME."
            )
    if len(source.rows) == 0:
        raise DataError(f"data: {source.name} has no rows")


def _names(rows: "datasets.Dataset") -> list[str]:
    """The columns as a job file can name them: of a nested one, what is in it."""
    found: list[str] = []
    for name, kind in rows.features.items():
        nested = isinstance(kind, dict) or type(kind).__name__ == "Translation"
        found += rows.select_columns([name]).flatten().column_names if nested else [name]
    return list(dict.fromkeys(found))


def check_text(source: Source, column: str) -> None:
    """Refuse a column with a cell that is missing, not text, or only blanks."""
    cells = column_of(source.rows, column)
    if not pa.types.is_string(cells.type) and not pa.types.is_large_string(cells.type):
        values = enumerate(source.rows[column][:])
        row, found = next((row, cell) for row, cell in values if not isinstance(cell, str))
        raise DataError(f"data: {source.where(row)}, column '{column}' holds {found!r}; needed text")
    empty = pc.or_kleene(pc.is_null(cells), pc.equal(pc.utf8_trim_whitespace(cells), ""))
    first = pc.index(empty, True).as_py()
    if first >= 0:
        found = "nothing" if cells[first].as_py() is None else "only blanks"
        count = pc.sum(empty).as_py()
        others = f" ({count} such rows in all)" if count > 1 else ""
        raise DataError(f"data: {source.where(first)}, column '{column}' holds {found}; needed text{others}")


def column_of(rows: "datasets.Dataset", column: str) -> pa.ChunkedArray:
    """A column as Arrow, in row order."""
    return rows.select_columns([column]).with_format("arrow")[:].column(0)
