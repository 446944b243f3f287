"""The first rows of a set that is larger than the disk: read as they come, and kept once.

A kept file is named by what the rows are of (files by size and time or etag, a hub set by its commit), so every worker
and every later run reads the same rows, and a set that has changed is read anew.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

_BATCH = 1000


def first_rows(builder: "datasets.DatasetBuilder", split: str, most: int) -> "datasets.Dataset":
    """The first ``most`` rows of a split, memory-mapped; what comes after them is not fetched.

    Two processes that read the same rows at once both succeed. Raises what `datasets` raises for rows that it can't
    read or fetch.
    """
    import datasets

    facts = f"{builder.cache_dir} {split} {most}"
    name = f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.arrow"
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "banjoray-first-rows" / name
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        _keep(builder.as_streaming_dataset(split), most, kept)
    return datasets.Dataset.from_file(str(kept))


def first_rows_of_all(builder: "datasets.DatasetBuilder", most: int) -> "dict[str, datasets.Dataset]":
    """`first_rows` of every split that there is."""
    return {split: first_rows(builder, split, most) for split in map(str, builder.as_streaming_dataset())}


def _keep(rows: "datasets.IterableDataset", most: int, kept: Path) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    from datasets.arrow_writer import ArrowWriter

    with tempfile.TemporaryDirectory(prefix=".staging-", dir=kept.parent) as staging:
        written = Path(staging) / kept.name
        with ArrowWriter(features=rows.features, path=str(written)) as writer:
            batches: Any = rows.take(most).with_format("arrow").iter(batch_size=_BATCH)
            for table in batches:
                writer.write_table(table)
            writer.finalize()
        written.replace(kept)
