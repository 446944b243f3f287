"""Rows that are in memory already, as a job's data: the Python API's way in."""

import hashlib
import io
from typing import TYPE_CHECKING, Any

import fsspec

from banjoray.config.job import JobConfig
from banjoray.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def with_rows(
    job: JobConfig, train: "pd.DataFrame", validation: "pd.DataFrame | None" = None, test: "pd.DataFrame | None" = None
) -> JobConfig:
    """The job with rows of pandas data frames as its data; the index of a frame is no column.

    Each frame is kept as a parquet file under the job's storage, named by its content: workers, resumes and a later
    `score` read it there. Raises DataError: something else than a frame, or a column that parquet can't hold.
    """
    given = {"train": train, "validation": validation, "test": test}
    folder = f"{job.storage.rstrip('/')}/rows"
    files = {split: _kept(frame, folder, split) for split, frame in given.items() if frame is not None}
    return job.with_values({"data.source": None, "data.config": None, "data.files": files})


def _kept(frame: Any, folder: str, split: str) -> str:
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"rows of {split}: found {type(frame).__name__}; needed a pandas.DataFrame")
    content = io.BytesIO()
    try:
        parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), content)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = " ".join(str(part) for part in error.args).splitlines()[0]
        raise DataError(f"rows of {split}: a column holds cells of several kinds ({reason}); make them one") from None
    path = f"{folder}/{hashlib.sha256(content.getvalue()).hexdigest()[:32]}.parquet"
    filesystem, plain = fsspec.core.url_to_fs(path)
    if not filesystem.isfile(plain):
        filesystem.makedirs(plain.rpartition("/")[0], exist_ok=True)
        # Beside, then renamed: a reader never sees half a file, and a file of this name always holds the same rows.
        with filesystem.transaction, filesystem.open(plain, "wb") as file:
            file.write(content.getvalue())
    return path
