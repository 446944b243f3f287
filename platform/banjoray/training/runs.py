"""The folders of runs: an unfinished one is found again, two processes never share one."""

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import fsspec

from banjoray.config.job import JobConfig, is_url


@dataclass(frozen=True)
class Run:
    """One run's folder."""

    id: str
    url: str
    resumed: bool

    def finish(self, result: Mapping[str, Any]) -> None:
        """Mark the run as done; the same job started again makes a new one."""
        filesystem, folder = fsspec.core.url_to_fs(self.url)
        filesystem.pipe_file(f"{folder}/.result.json", json.dumps(result, indent=1).encode())
        filesystem.mv(f"{folder}/.result.json", f"{folder}/result.json")


@contextmanager
def claim_run(job: JobConfig, stem: str, resume: bool = True) -> Iterator[Run]:
    """The unfinished run called ``stem``-number, or a new one; held by this process until the end of the block.

    Without ``resume``, always a new one. On local storage a lock file keeps two processes apart; behind a URL there
    is none, so start a job there once at a time.
    """
    root = job.storage.rstrip("/") if is_url(job.storage) else str(Path(job.storage).absolute())
    filesystem, _ = fsspec.core.url_to_fs(root)
    for number in itertools.count(1):
        url = f"{root}/{stem}-{number}"
        known = filesystem.exists(url)
        if filesystem.exists(f"{url}/result.json") or (known and not resume):
            continue
        run = Run(f"{stem}-{number}", url, resumed=filesystem.exists(f"{url}/checkpoints"))
        if is_url(root):
            yield run
            return
        Path(url).mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(f"{url}/.lock", blocking=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            continue
        with lock:
            yield run
        return
