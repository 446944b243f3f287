"""Of a set that is larger than the disk, the first rows are fetched and kept, and no more."""

import json
from pathlib import Path

import pytest

from banjoray.config.data import DataConfig
from banjoray.config.job import HubConfig
from banjoray.config.section import validate
from banjoray.data.sources import read
from banjoray.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")

COLUMNS = {"text": "text", "label": "label"}


def lines(path: Path, count: int, word: str = "row") -> Path:
    """A JSON Lines file of numbered texts."""
    rows = [{"text": f"{word} {number}", "label": ("even", "odd")[number % 2]} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: object, columns: dict[str, str] = COLUMNS, **keys: object) -> list[str]:
    """The texts of a train file, read as ``keys`` of data say."""
    data = validate(DataConfig, {"files": {"train": str(path)}} | keys, "data")
    return list(read(data, HubConfig(), columns)["train"].rows["text"])


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_rows_are_read_and_no_more(tmp_path: Path, streaming: bool) -> None:
    """In the order of the file, however many there are."""
    path = lines(tmp_path / "train.jsonl", 2500)
    assert texts(path, max_rows=1200, streaming=streaming) == [f"row {number}" for number in range(1200)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_short_set_is_read_whole(tmp_path: Path, streaming: bool) -> None:
    """max_rows is no demand."""
    path = lines(tmp_path / "train.jsonl", 5)
    assert texts(path, max_rows=9, streaming=streaming) == [f"row {number}" for number in range(5)]


def test_what_comes_after_is_never_looked_at(tmp_path: Path) -> None:
    """A line that can't be read, far behind the rows that are kept, does not matter to a stream."""
    path = lines(tmp_path / "train.jsonl", 400_000, "a row that is long enough to fill several blocks of a reader")
    with path.open("a") as file:
        file.write("no JSON\n")
    assert len(texts(path, max_rows=100, streaming=True)) == 100
    with pytest.raises(DataError, match="row 400001 is not JSON"):
        texts(path, max_rows=100)


def test_kept_rows_are_read_again_until_the_set_changes(tmp_path: Path) -> None:
    """The same file is fetched once; another content is another set."""
    import datasets

    def kept() -> dict[Path, int]:
        files = Path(datasets.config.HF_DATASETS_CACHE).rglob("banjoray-first-rows/*.arrow")
        return {file: file.stat().st_mtime_ns for file in files}

    path = lines(tmp_path / "train.jsonl", 50)
    before = kept()
    first = texts(path, max_rows=10, streaming=True)
    after = kept()
    assert len(after) == len(before) + 1
    assert texts(path, max_rows=10, streaming=True) == first
    assert kept() == after
    lines(path, 60, "changed")
    assert texts(path, max_rows=10, streaming=True) == [f"changed {number}" for number in range(10)]


def test_csv_cells_stay_texts(tmp_path: Path) -> None:
    """A stream reads a csv as a whole file is read: NA and 007 are words."""
    path = tmp_path / "train.csv"
    path.write_text("text,label\nNA,a\n007,b\nplain,a\n")
    assert texts(path, max_rows=2, streaming=True) == ["NA", "007"]


def test_a_stream_needs_an_end() -> None:
    """Before anything is fetched."""
    with pytest.raises(ConfigError, match="streaming: found true without max_rows"):
        validate(DataConfig, {"source": "some/set", "streaming": True}, "data")


def test_kinds_that_are_read_whole_are_refused(tmp_path: Path) -> None:
    """A CoNLL file has no rows before it has been read."""
    path = tmp_path / "train.conll"
    path.write_text("a O\nb O\n")
    with pytest.raises(DataError, match="streaming"):
        texts(path, {"tokens": "tokens", "tags": "tags"}, max_rows=2, streaming=True)


def test_of_a_set_the_first_rows_of_every_split_are_kept(tmp_path: Path) -> None:
    """A folder with a file per split is a data set, read as one of the hub is."""
    lines(tmp_path / "train.jsonl", 40)
    lines(tmp_path / "test.jsonl", 30, "held out")
    data = validate(DataConfig, {"source": str(tmp_path), "streaming": True, "max_rows": 7}, "data")
    found = read(data, HubConfig(), COLUMNS)
    assert {name: len(source.rows) for name, source in found.items()} == {"train": 7, "test": 7}
    assert found["test"].rows["text"][6] == "held out 6"
