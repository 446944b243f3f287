"""Files and data sets become rows, or one error that names the file and the row that is wrong."""

import csv
import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from banjoray.config.data import DataConfig
from banjoray.config.job import HubConfig
from banjoray.config.section import validate
from banjoray.data.sources import Source, check_text, read
from banjoray.data.splits import named_columns
from banjoray.errors import DataError
from banjoray.models.loading import use_hub

pytestmark = pytest.mark.usefixtures("own_cache")

Rows = Sequence[Mapping[str, Any]]
ROWS: Rows = [
    {"text": "plain", "label": "joy"},
    {"text": 'a "quoted" word, and a comma', "label": "anger"},
    {"text": "naïve café 😀", "label": "joy"},
    {"text": "NA", "label": "anger"},
    {"text": "007", "label": "joy"},
    {"text": "null", "label": "anger"},
    {"text": "1e5", "label": "joy"},
    {"text": "True", "label": "anger"},
]


def write(path: Path, rows: Rows) -> Path:
    """The rows as a file of the kind that the path's name says."""
    match path.suffix.lower():
        case ".csv" | ".tsv":
            with path.open("w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
                table.writeheader()
                table.writerows(rows)
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".parquet":
            import datasets

            datasets.Dataset.from_list([dict(row) for row in rows]).to_parquet(str(path))
    return path


def load(path: object, **columns: str) -> Source:
    data = validate(DataConfig, {"files": {"train": str(path)}, "columns": columns}, "data")
    return read_texts(data)["train"]


def read_texts(data: DataConfig, hub: HubConfig | None = None) -> dict[str, Source]:
    """As a task that classifies texts reads them."""
    texts = named_columns(data, ("text", "text_pair"))
    sources = read(data, hub or HubConfig(), texts | named_columns(data, ("label",)))
    for source in sources.values():
        for column in texts.values():
            check_text(source, column)
    return sources


def refusal(path: object, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **columns)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "JSONL"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind.lower()}", ROWS).rename(tmp_path / f"rows.{kind}")
    source = load(path)
    assert source.name == f"rows.{kind}"
    assert source.rows.to_list() == ROWS


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_both_texts_of_a_pair_stay_text(tmp_path: Path, kind: str) -> None:
    rows = [{"first": "1", "second": "02", "label": "x"}, {"first": "2", "second": "03", "label": "y"}]
    source = load(write(tmp_path / f"pairs.{kind}", rows), text="first", text_pair="second")
    assert source.rows.to_list() == rows


def test_a_text_may_hold_line_breaks(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "label": "x"}, {"text": "three", "label": "y"}]
    assert load(write(tmp_path / "rows.csv", rows)).rows.to_list() == rows


def test_a_byte_order_mark_is_no_part_of_the_first_column_name(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("\ufefftext,label\nhello,x\n", encoding="utf-8")
    assert load(path).rows.to_list() == [{"text": "hello", "label": "x"}]


def test_other_columns_are_left_alone(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x", "id": 1, "note": None}, {"text": "b", "label": "y", "id": 2, "note": "n"}]
    assert load(write(tmp_path / "rows.jsonl", rows)).rows.to_list() == rows


def test_a_file_is_read_again_after_it_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[:2])
    assert len(load(path).rows) == 2
    write(path, ROWS)
    assert len(load(path).rows) == len(ROWS)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo for one test what `use_hub` did to the process before, and afterwards what the test makes it do."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_may_be_an_fsspec_url(tmp_path: Path, kind: str) -> None:
    local = write(tmp_path / f"rows.{kind}", ROWS)
    remote = f"memory://{tmp_path.name}/rows.{kind}"
    with fsspec.open(remote, "wb") as file:
        file.write(local.read_bytes())
    for url in (local.as_uri(), remote):
        assert load(url).rows.to_list() == ROWS


@pytest.mark.usefixtures("online")
def test_an_offline_job_reads_files_and_refuses_other_urls(tmp_path: Path) -> None:
    use_hub(HubConfig(offline=True))
    local = write(tmp_path / "rows.jsonl", ROWS)
    remote = f"memory://{tmp_path.name}/rows.jsonl"
    with fsspec.open(remote, "wb") as file:
        file.write(local.read_bytes())
    assert load(local).rows.to_list() == load(local.as_uri()).rows.to_list() == ROWS
    message = refusal(remote)
    assert message.startswith(f"data.files.train: '{remote}' can't be fetched (Offline mode is enabled.")
    assert message.endswith("; with hub.offline, files have to be here already")


def test_a_url_of_no_known_protocol_is_refused() -> None:
    assert refusal("nowhere://bucket/rows.csv").startswith(
        "data.files.train: 'nowhere://bucket/rows.csv' is behind no known protocol ("
    )


GOOD = b'{"text": "fine", "label": "x"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"text,label\nx,a\n,b\n", ["a.csv row 2, column 'text' holds only blanks; needed text"]),
        ("a.csv", b"text,label\nx,a\n \t,b\n  ,c\n", ["a.csv row 2, column 'text'", "only blanks", "2 such rows"]),
        ("a.jsonl", GOOD * 2 + b'{"text": null, "label": "x"}\n', ["a.jsonl row 3, column 'text' holds nothing"]),
        ("a.jsonl", GOOD + b'{"label": "x"}\n', ["a.jsonl row 2, column 'text' holds nothing"]),
        (
            "a.jsonl",
            GOOD + b'{"text": "\\u3000 \\n", "label": "x"}\n',
            ["a.jsonl row 2, column 'text' holds only blanks"],
        ),
        ("a.jsonl", b'{"text": 7, "label": "x"}\n' * 2, ["a.jsonl row 1, column 'text' holds 7; needed text"]),
        ("a.jsonl", GOOD * 2 + b'{"text": 7, "label": "x"}\n', ["a.jsonl row 3, column 'text' holds 7; needed text"]),
        ("a.jsonl", GOOD + b'{"text": ["y"], "label": "x"}\n', ["a.jsonl row 2, column 'text' holds ['y']"]),
        ("a.jsonl", GOOD * 3 + b'{"text": "y", label}\n', ["a.jsonl can't be read: row 4 is not JSON (Expecting"]),
        ("a.jsonl", GOOD + b'{"text": "y", "lab\n', ["a.jsonl can't be read: row 2 is not JSON"]),
        ("a.jsonl", GOOD + b"[1]\n", ["a.jsonl can't be read: row 2 holds list, needed an object with columns"]),
        (
            "a.jsonl",
            GOOD + b'{"text": "\xff", "label": "x"}\n',
            ["a.jsonl can't be read: line 2 is not UTF-8 (byte 11 "],
        ),
        ("a.jsonl", GOOD + b'{"text": "y", "label": "\xff"}\n', ["a.jsonl can't be read: line 2 is not UTF-8"]),
        ("a.csv", b"text,label\nx,a\ncaf\xe9,b\n", ["a.csv can't be read: line 3 is not UTF-8 (byte 4 of the line)"]),
        ("a.csv", b"text,label\nx,a\ny,b,c\n", ["a.csv can't be read: row 2 has 3 cells; the header has 2"]),
        # Where every row has one cell more, pandas would take the first column for row names and shift the rest.
        ("a.csv", b"text,label\nx,y,a\nz,w,b\n", ["a.csv can't be read: row 1 has 3 cells; the header has 2"]),
        ("a.csv", b"text,label\n", ["a.csv can't be read: it has no rows"]),
        ("a.csv", b"\n", ["a.csv can't be read: "]),
        (
            "a.csv",
            b"text;label\nx;a\n",
            ["column 'text' not in a.csv; it has 'text;label'. Set data.columns.text=NAME"],
        ),
        ("a.jsonl", b"", ["data.files.train: ", "a.jsonl' is empty; needed rows"]),
        ("a.jsonl", b"\n\n", ["a.jsonl can't be read: it has no rows"]),
        ("a.json", b'[{"text": "x", "label": "a"}', ["a.json can't be read: "]),
        ("a.parquet", b"not parquet at all", ["a.parquet can't be read: "]),
        (
            "a.xml",
            b"<text/>",
            ["data.files.train: ", "a.xml' is of no known kind; needed one of .bio .conll .csv .iob .json .jsonl"],
        ),
        ("a", b"text", ["is of no known kind"]),
        ("a.txt", b"hello\nworld\n", ["column 'label' not in a.txt; it has 'text'"]),
        ("a.txt", b"hello\nw\xff\n", ["a.txt can't be read: line 2 is not UTF-8"]),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_wrong_file_is_refused_in_one_line_with_its_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    logging.getLogger("datasets").addHandler(caplog.handler)
    try:
        message = refusal(path)
    finally:
        logging.getLogger("datasets").removeHandler(caplog.handler)
    assert [word for word in words if word not in message] == [], message
    assert caplog.records == []


def test_a_missing_column_is_refused_with_the_columns_there_are_and_the_key_to_set(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [{"sentence": "x", "target": "a"}])
    columns = "train.jsonl; it has 'sentence', 'target'"
    assert refusal(path) == f"data: column 'text' not in {columns}. Set data.columns.text=NAME."
    message = refusal(path, text="sentence")
    assert message == f"data: column 'label' not in {columns}. Set data.columns.label=NAME."
    message = refusal(path, text="sentence", label="target", text_pair="other")
    assert message == f"data: column 'other' not in {columns}. Set data.columns.text_pair=NAME."


@pytest.mark.parametrize("where", ["{}/nowhere.csv", "file://{}/nowhere.csv", "memory://{}/nowhere.csv", "{}"])
def test_a_file_that_is_not_there_is_refused_with_its_key(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder.csv").mkdir()
    path = where.format(tmp_path) if "nowhere" in where else str(tmp_path / "folder.csv")
    assert refusal(path).startswith(f"data.files.train: no file '{path}'; ")


def test_each_split_is_checked_and_named_by_its_own_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "held-out.jsonl", [{"text": "x", "label": "joy"}, {"text": " ", "label": "joy"}])
    files = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "held-out.jsonl")}
    with pytest.raises(DataError, match=r"held-out\.jsonl row 2, column 'text' holds only blanks"):
        read_texts(validate(DataConfig, {"files": files}, "data"))


def test_the_shipped_set_has_three_splits() -> None:
    sources = read_texts(DataConfig(source="banjoray:emotion"))
    assert {split: len(source.rows) for split, source in sources.items()} == {
        "train": 600,
        "validation": 60,
        "test": 60,
    }


@pytest.mark.parametrize("name", ["banjoray:emotions", "banjoray:", "banjoray:../samples"])
def test_a_set_that_does_not_ship_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_texts(DataConfig(source=name))
    known = ["answers", "dialogues", "emotion", "entailment", "entities", "likeness", "phrases", "questions"]
    listed = ", ".join(f"banjoray:{one}" for one in (*known, "subjects"))
    assert str(caught.value) == f"data.source: no data set '{name}' ships with banjoray; there is {listed}"


@pytest.mark.usefixtures("online")
def test_reading_a_file_tells_nobody(tmp_path: Path, asked_hosts: list[str]) -> None:
    assert len(load(write(tmp_path / "rows.jsonl", ROWS)).rows) == len(ROWS)
    assert asked_hosts == []


@pytest.mark.usefixtures("online")
def test_an_offline_job_refuses_a_hub_set_without_touching_the_network(asked_hosts: list[str]) -> None:
    hub = HubConfig(offline=True)
    use_hub(hub)
    with pytest.raises(DataError) as caught:
        read_texts(DataConfig(source="nobody/nothing"), hub)
    message = str(caught.value)
    assert message.startswith("data.source: 'nobody/nothing' can't be had (")
    assert message.endswith("; hub.offline is true: set it to false, or use data.files")
    assert asked_hosts == []


def test_the_jobs_hub_settings_come_before_the_first_import_of_the_hub_library() -> None:
    """huggingface_hub reads its settings at import, so nothing on the way to `prepare` may import it."""
    source = """
import sys
import banjoray.data.splits, banjoray.data.tokens, banjoray.training.preflight
assert not {"huggingface_hub", "datasets", "transformers"} & set(sys.modules), "imported too early"
from banjoray.config.job import HubConfig
from banjoray.models.loading import use_hub
use_hub(HubConfig(endpoint="https://mirror.invalid/", offline=True))
import datasets, huggingface_hub.constants as constants
assert (constants.ENDPOINT, constants.HF_HUB_OFFLINE) == ("https://mirror.invalid", True), vars(constants)
assert datasets.config.HF_HUB_OFFLINE
"""
    ran = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
