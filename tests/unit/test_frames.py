"""Rows of data frames train the model that the same rows in files train."""

from pathlib import Path

import pandas as pd
import pytest

import banjoray
from banjoray.errors import DataError
from banjoray.tasks.task import task_for
from factories import make_job, sample_rows, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")


def test_a_frame_holds_the_rows_that_a_file_holds(tmp_path: Path) -> None:
    """Equal fingerprints, whatever the frame's index is."""
    rows = {split: list(sample_rows(split)) for split in ("train", "validation", "test")}
    files = {split: str(write_rows(tmp_path / f"{split}.jsonl", found)) for split, found in rows.items()}
    job = make_job(tmp_path)
    frames = {split: pd.DataFrame(found, index=range(7, 7 + len(found))) for split, found in rows.items()}
    framed = banjoray.with_rows(job, **frames)
    filed = job.with_values({"data.source": None, "data.files": files})
    task = task_for(job.task)
    assert task.splits(framed).fingerprint() == task.splits(filed).fingerprint()


def test_equal_frames_are_one_file(tmp_path: Path) -> None:
    """Kept by content: the same call again gives the same job, so an unfinished run of it goes on."""
    frame = pd.DataFrame(sample_rows("train"))
    job = make_job(tmp_path)
    first, second = banjoray.with_rows(job, frame), banjoray.with_rows(job, frame.copy())
    assert first.digest() == second.digest()
    other = banjoray.with_rows(job, frame.iloc[:-1])
    assert first.digest() != other.digest()
    assert len(list(Path(job.storage).rglob("*.parquet"))) == 2


def test_what_is_no_frame_is_refused(tmp_path: Path) -> None:
    """And so is a column of mixed kinds, by name."""
    job = make_job(tmp_path)
    with pytest.raises(DataError, match=r"rows of train: found list; needed a pandas\.DataFrame"):
        banjoray.with_rows(job, [{"text": "a"}])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="rows of train: a column holds cells of several kinds"):
        banjoray.with_rows(job, pd.DataFrame({"text": ["a", 1], "label": ["x", "y"]}))
