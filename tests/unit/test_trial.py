"""A trial reports every epoch once it is kept, ends without an error, and does nothing twice."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError, DataError, TrainingFailed, Untrainable
from banjoray.training.checkpoints import Store
from banjoray.training.interface import Callbacks, Moment
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.tuning.record import Record, recorded
from banjoray.tuning.trial import Report, run_trial

pytestmark = pytest.mark.usefixtures("own_cache")

Watch = Callable[[Moment], None]


@pytest.fixture
def job(tmp_path: Path, lively_job: Callable[..., JobConfig]) -> JobConfig:
    return lively_job(tmp_path, train__epochs=3)


def alone(job: JobConfig, folder: str, report: Report, watch: Watch) -> None:
    """What Tune's process does with a trial of one worker."""
    ready = prepare(job)
    fit(job, ready.rows, ready.task, ready.start, folder, Callbacks(report=report, watch=watch))


def run(job: JobConfig, folder: Path, runs: Any = alone) -> list[dict[str, float]]:
    """What a trial reports."""
    told: list[dict[str, float]] = []
    run_trial(job, str(folder), told.append, runs)
    return told


def never(*given: Any) -> None:  # noqa: ARG001
    raise AssertionError("a finished trial was run again")


def test_every_epoch_is_reported_and_recorded(job: JobConfig, tmp_path: Path) -> None:
    told = run(job, tmp_path / "trial")
    assert [entry["epoch"] for entry in told] == [1, 2, 3]
    record = recorded(str(tmp_path / "trial"))
    assert (record.history, record.done, record.failure) == (tuple(told), True, None)
    assert record.seconds > 0


def test_finished_trial_that_is_started_again_reports_and_trains_nothing(job: JobConfig, tmp_path: Path) -> None:
    told = run(job, tmp_path / "trial")
    assert run(job, tmp_path / "trial", never) == told


def test_trial_that_died_reports_what_it_had_and_trains_the_rest(job: JobConfig, tmp_path: Path) -> None:
    whole = run(job, tmp_path / "whole")

    def dies(job: JobConfig, folder: str, report: Report, watch: Watch) -> None:
        def once(entry: dict[str, float]) -> None:
            report(entry)
            if entry["epoch"] == 2:
                raise KeyboardInterrupt

        alone(job, folder, once, watch)

    with pytest.raises(KeyboardInterrupt):
        run(job, tmp_path / "halves", dies)
    steps: list[int] = []

    def rest(job: JobConfig, folder: str, report: Report, watch: Watch) -> None:
        def counted(moment: Moment) -> None:
            steps.append(moment.step)
            watch(moment)

        alone(job, folder, report, counted)

    assert run(job, tmp_path / "halves", rest) == whole
    assert steps == list(range(13, 19))


def test_record_that_is_behind_the_checkpoints_is_made_up_for(job: JobConfig, tmp_path: Path) -> None:
    whole = run(job, tmp_path / "trial")
    Record(history=tuple(whole[:1])).save(str(tmp_path / "trial"))
    assert run(job, tmp_path / "trial") == whole


def test_losses_that_are_no_numbers_cost_the_trial_its_score_and_nothing_else(job: JobConfig, tmp_path: Path) -> None:
    assert run(job.with_values({"train.weight_decay": 1e30}), tmp_path / "trial") == []
    failure = recorded(str(tmp_path / "trial")).failure
    assert failure
    assert failure.kind == "no_score"
    assert "the gradients' norm nan at step" in failure.reason
    assert run(job, tmp_path / "trial", never) == []


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (KeyError("logits"), "bug", "KeyError: 'logits'"),
        (DataError("rows.jsonl row 7 holds nothing"), "bug", "DataError: rows.jsonl row 7 holds nothing"),
        (AttributeError(), "bug", "AttributeError: AttributeError"),
        (TrainingFailed("the disk is full"), "bug", "TrainingFailed: the disk is full"),
        (Untrainable("a microbatch of one row does not fit"), "no_score", "a microbatch of one row does not fit"),
        (ConfigError("freeze: found backbone with adapter"), "no_score", "freeze: found backbone with adapter"),
    ],
)
def test_bad_rows_and_bugs_are_told_from_points_that_cannot_be_trained(
    job: JobConfig, tmp_path: Path, error: Exception, kind: str, reason: str
) -> None:
    def fails(*given: Any) -> None:  # noqa: ARG001
        raise error

    raised: AbstractContextManager[Any] = pytest.raises(type(error)) if kind == "bug" else nullcontext()
    with raised:
        run(job, tmp_path / "trial", fails)
    assert vars(recorded(str(tmp_path / "trial")).failure) == {"kind": kind, "reason": reason}
    # A bug may be mended, a point stays what it is.
    assert len(run(job, tmp_path / "trial", alone if kind == "bug" else never)) == (3 if kind == "bug" else 0)


def test_trial_that_does_not_fit_into_memory_is_halved_until_it_does(
    job: JobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification

    plain, sizes = BertForSequenceClassification.forward, list[int]()

    def narrow(self: Any, input_ids: torch.Tensor, **named: Any) -> Any:
        if self.training:
            sizes.append(len(input_ids))
            if len(input_ids) > 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(self, input_ids=input_ids, **named)

    whole = run(job, tmp_path / "whole")
    monkeypatch.setattr(BertForSequenceClassification, "forward", narrow)
    told = run(job, tmp_path / "trial")
    assert sizes[:3] == [16, 8, 4]
    assert max(sizes[2:]) == 4
    assert recorded(str(tmp_path / "trial")).done
    assert Store(str(tmp_path / "trial"), pytest.fail).microbatches(1) == 4
    assert [entry["loss"] for entry in told] == pytest.approx([entry["loss"] for entry in whole], abs=1e-4)
