"""Raw rows by split, from the hub, from files, or from a set that ships with banjoray.

Rows come as `datasets.Dataset`, memory-mapped; every cell that training will read has been looked at.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from banjoray.config.data import DataConfig, FilesConfig
from banjoray.config.job import HubConfig
from banjoray.data.bad_rows import TOO_LONG, BadRow, Finding, LeftOut, text_problem
from banjoray.data.first_rows import first_rows, first_rows_of_all
from banjoray.data.lines import SEPARATORS, records, without_bad
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
# Whose first rows are there before the last.
_STREAMED = (".csv", ".tsv", ".jsonl", ".parquet", ".txt")


@dataclass(frozen=True)
class Source:
    """The rows of one split and the name that errors call it by (a file name, or set:split).

    ``skips``: rows that can't be used are left out, and stand in ``bad``. ``numbers``, (rows,), has the place of every
    row in the file, from 0; None where it is that in ``rows``.
    """

    rows: "datasets.Dataset"
    name: str
    skips: bool = False
    numbers: np.ndarray | None = None
    bad: tuple[BadRow, ...] = ()

    def number(self, row: int) -> int:
        """The number of a row in the file, from 1, as lines of a JSON Lines file count."""
        return (row if self.numbers is None else int(self.numbers[row])) + 1

    def where(self, row: int) -> str:
        """How an error points at a row."""
        return f"{self.name} row {self.number(row)}"

    def without(self, findings: Iterable[Finding]) -> "Source":
        """The source without the rows that are found bad; raises DataError about the first unless the job skips them.

        Also where no row would be left.
        """
        found = sorted(findings, key=lambda finding: finding.row)
        if not found:
            return self
        if not self.skips:
            raise self._named(found[0]).refusal(len(found))
        kept = np.setdiff1d(np.arange(len(self.rows)), [finding.row for finding in found])
        return replace(
            self,
            rows=self.rows.select(kept),
            numbers=kept if self.numbers is None else self.numbers[kept],
            bad=(*self.bad, *map(self._named, found)),
        ).some_left()

    def some_left(self) -> "Source":
        """The same source; raises DataError if all of its rows were left out."""
        if self.bad and len(self.rows) == 0:
            raise DataError(
                f"data: none of the {len(self.bad)} rows of {self.name} can be used; the first: {self.bad[0]}"
            )
        return self

    def _named(self, finding: Finding) -> BadRow:
        number, where = self.number(finding.row), self.where(finding.row) + finding.called
        return BadRow(self.name, number, where, finding.kind, finding.told, finding.column)


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
    sources = _read_files(files, columns, data) if files else _read_hub(data, hub, token)
    if "train" not in sources:
        raise DataError(f"data.source: '{data.source}' has no train split; it has {', '.join(sources) or 'nothing'}")
    sources = {split: _opened(_first(source, data.max_rows), columns) for split, source in sources.items()}
    for source in sources.values():
        check_columns(source, columns)
    return sources


def _first(source: Source, most: int | None) -> Source:
    """The source with its first ``most`` rows alone; those that a reader could not take are not counted."""
    if most is None or len(source.rows) <= most:
        return source
    numbers = None if source.numbers is None else source.numbers[:most]
    return replace(source, rows=source.rows.select(range(most)), numbers=numbers)


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
    return replace(source, rows=beside)


def _shipped(source: str) -> FilesConfig:
    """The files of a data set that ships with banjoray."""
    folder = SHIPPED / source.removeprefix("banjoray:")
    if not (folder / "train.jsonl").is_file():
        known = ", ".join(sorted(f"banjoray:{path.name}" for path in SHIPPED.iterdir() if path.is_dir()))
        raise DataError(f"data.source: no data set '{source}' ships with banjoray; there is {known}")
    return FilesConfig(**{split: str(folder / f"{split}.jsonl") for split in SPLITS})


def _read_files(files: FilesConfig, columns: Mapping[str, str], data: DataConfig) -> dict[str, Source]:
    paths = {split: getattr(files, split) for split in SPLITS}
    return {split: _read_file(path, columns, split, data) for split, path in paths.items() if path}


def _read_file(path: str, columns: Mapping[str, str], split: str, data: DataConfig) -> Source:
    """One file as one split."""
    import datasets

    skips = data.skip_bad_rows
    name = PurePosixPath(path).name
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in _READERS:
        raise DataError(f"data.files.{split}: '{path}' is of no known kind; needed one of {' '.join(sorted(_READERS))}")
    _check_there(path, split)
    if data.streaming and suffix not in _STREAMED:
        needed = " ".join(_STREAMED)
        raise DataError(f"data.streaming: '{path}' has no rows before all of it is read; needed one of {needed}")
    if _READERS[suffix] == "conll":
        from banjoray.data.conll import read_conll

        return read_conll(path, name, columns, skips)
    if suffix == ".json" and "answers" in columns:
        from banjoray.data.squad import flattened

        nested = flattened(path, name, columns, skips)
        if nested is not None:
            return nested
    try:
        return Source(_rows_of(path, columns, split, data.max_rows if data.streaming else None), name, skips)
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if data.streaming:
            raise DataError(f"data: {name} can't be read: {_reason(error)}") from None
        return _read_around(path, columns, split, skips, error)
    except OSError as error:
        # A ConnectionError also for any URL where hub.offline is true; no room for the rows is one too.
        reason = str(error).splitlines()[0]
        raise DataError(
            f"data.files.{split}: '{path}' can't be fetched ({reason}); with hub.offline, files have to be here already"
        ) from None


def _rows_of(path: str, columns: Mapping[str, str], split: str, most: int | None = None) -> "datasets.Dataset":
    """The rows of a file, all or the first ``most``; raises ValueError or DatasetGenerationError."""
    import datasets

    suffix = PurePosixPath(path).suffix.lower()
    options: dict[str, Any] = {}
    if suffix in SEPARATORS:
        # Without these, pandas turns the text "NA" into a missing value and the text "007" into a number.
        texts = [column for key, column in columns.items() if key != "label"]
        options = {"sep": SEPARATORS[suffix], "keep_default_na": False}
        options["converters"] = dict.fromkeys(texts, str)
    options["data_files"] = {split: path}
    if most is None:
        rows = datasets.load_dataset(_READERS[suffix], split=split, **options)
    else:
        rows = first_rows(datasets.load_dataset_builder(_READERS[suffix], **options), split, most)
    # The JSON reader takes any bytes for text.
    rows.data.validate(full=True)
    if "__index_level_0__" in rows.column_names:
        raise ValueError("every row has more cells than the header")
    return rows


def _read_around(path: str, columns: Mapping[str, str], split: str, skips: bool, cause: Exception) -> Source:
    """The rows of a file that a reader refuses, without those that it can't take; raises DataError about the first."""
    import datasets

    name = PurePosixPath(path).name
    for kinds in (False, True):
        good, bad = _parted(path, name, kinds)
        if not bad:
            continue
        if not skips:
            raise bad[0].refusal(len(bad), " can't be read")
        if not good:
            raise DataError(f"data: none of the {len(bad)} rows of {name} can be read; the first: {bad[0]}")
        copy = without_bad(path, (record for record in records(path, name, kinds) if not record.told))
        try:
            rows = _rows_of(str(copy), columns, split)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            cause = error
            continue
        if len(rows) == len(good):
            return Source(rows, name, skips, np.array(good), tuple(bad))
    raise DataError(f"data: {name} can't be read: {_reason(cause)}")


def _reason(error: Exception) -> str:
    """What a reader says of a file."""
    told = str(error.__cause__ or error).splitlines()[0]
    return "it has no rows" if "corresponds to no data" in told else told


def _parted(path: str, name: str, kinds: bool) -> tuple[list[int], list[BadRow]]:
    """The numbers of the rows of a file that a reader can take, from 0, and the other rows."""
    good: list[int] = []
    bad: list[BadRow] = []
    for one in records(path, name, kinds):
        if one.told:
            bad.append(BadRow(name, one.number + 1, name, one.kind, one.told))
        elif one.number >= 0:
            good.append(one.number)
    return good, bad


def _check_there(path: str, split: str) -> None:
    try:
        filesystem, plain = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"data.files.{split}: '{path}' is behind no known protocol ({error})") from None
    if not filesystem.isfile(plain):
        raise DataError(f"data.files.{split}: no file '{path}'; paths are looked up from the working directory")
    if filesystem.size(plain) == 0:
        raise DataError(f"data.files.{split}: '{path}' is empty; needed rows")


def _read_hub(data: DataConfig, hub: HubConfig, token: str | None) -> dict[str, Source]:
    import datasets

    try:
        named = {"path": data.source, "name": data.config, "revision": data.revision, "token": token}
        loaded: Mapping[str, Any]
        if data.streaming and data.max_rows:
            loaded = first_rows_of_all(datasets.load_dataset_builder(**named), data.max_rows)
        else:
            loaded = datasets.load_dataset(**named)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).splitlines()[0]
        cure = "hub.offline is true: set it to false, or use data.files" if hub.offline else "check the id, the network"
        raise DataError(f"data.source: '{data.source}' can't be had ({reason}); {cure}") from None
    names = {"validation": ("validation", "valid", "dev"), "train": ("train",), "test": ("test",)}
    return {
        split: Source(loaded[name], f"{data.source}:{name}", data.skip_bad_rows)
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


def check_text(source: Source, column: str) -> Source:
    """The source without rows whose cell is missing, not text, only blanks, or too long; refused as `without` does."""
    cells = column_of(source.rows, column)
    if not pa.types.is_string(cells.type) and not pa.types.is_large_string(cells.type):
        return source.without(_text_findings(column, enumerate(source.rows[column][:])))
    empty = pc.or_kleene(pc.is_null(cells), pc.equal(pc.utf8_trim_whitespace(cells), ""))
    bad = pc.indices_nonzero(pc.or_kleene(empty, pc.greater_equal(pc.utf8_length(cells), TOO_LONG))).to_pylist()
    return source.without(_text_findings(column, ((row, cells[row].as_py()) for row in bad)))


def _text_findings(column: str, cells: Iterable[tuple[int, Any]]) -> Iterable[Finding]:
    for row, cell in cells:
        problem = text_problem(cell)
        if problem:
            kind, told = problem
            yield Finding(row, kind, f" holds {told}", column)


def left_out(sources: Mapping[str, Source]) -> tuple[LeftOut, ...]:
    """The rows that are left out of every source that has any."""
    return tuple(
        LeftOut(split, source.name, len(source.rows) + len(source.bad), source.bad)
        for split, source in sources.items()
        if source.bad
    )


def column_of(rows: "datasets.Dataset", column: str) -> pa.ChunkedArray:
    """A column as Arrow, in row order."""
    return rows.select_columns([column]).with_format("arrow")[:].column(0)
