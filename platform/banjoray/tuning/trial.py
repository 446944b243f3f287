"""One trial: a run at one point of the space, that reports every epoch and leaves a record."""

import time
from collections.abc import Callable
from dataclasses import replace

from banjoray.config.job import JobConfig
from banjoray.training.checkpoints import Store
from banjoray.training.interface import Moment
from banjoray.tuning.failures import classify
from banjoray.tuning.record import recorded

Report = Callable[[dict[str, float]], None]
Run = Callable[[JobConfig, str, Report, Callable[[Moment], None]], None]


def history_of(folder: str) -> tuple[dict[str, float], ...]:
    """The finished epochs of a trial: by its record, or by its newest checkpoint if that has more of them."""
    saved = Store(folder, lambda line: None).all()
    by_checkpoint = saved[-1].position.history if saved else ()
    return max(recorded(folder).history, by_checkpoint, key=len)


def run_trial(job: JobConfig, folder: str, report: Report, run: Run) -> None:
    """Train in ``folder`` by ``run`` and report every epoch; epochs that are finished there are reported alone.

    Ends without an error where the values can't be trained with, and says so in its record. Raises what else it meets,
    with the reason in the record too: that is a bug, or unreadable data.
    """
    record = replace(recorded(folder), history=history_of(folder))
    for entry in record.history:
        report(entry)
    if record.done or (record.failure and record.failure.kind == "no_score"):
        return
    record = replace(record, failure=None)
    spent, began = record.seconds, time.perf_counter()

    def save(**changes: object) -> None:
        nonlocal record
        record = replace(record, seconds=spent + time.perf_counter() - began, **changes)  # type: ignore[arg-type]
        record.save(folder)

    def told(entry: dict[str, float]) -> None:
        # Before the report: a scheduler may end this process with it, also after the last epoch.
        save(history=record.with_epoch(entry).history, done=entry["epoch"] >= job.train.epochs)
        report(entry)

    def watch(moment: Moment) -> None:
        nonlocal record
        record = replace(record, prefix=moment.prefix)

    if recorded(folder).failure:
        # Mended meanwhile; if this process dies, it was not of that.
        save()
    try:
        run(job, folder, told, watch)
    except Exception as error:
        failure = classify(error)
        save(failure=failure)
        if failure.kind == "no_score":
            return
        raise
    save(history=history_of(folder), done=True)
