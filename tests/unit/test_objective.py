"""The loss of a batch is a weighted mean over its rows, whoever computes which of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from banjoray.config.job import JobConfig
from banjoray.data.tokens import Tokens
from banjoray.errors import ConfigError
from banjoray.tasks.task import task_for
from banjoray.training.objective import Objective, row_weights
from factories import make_job

LABELS = ("anger", "joy", "love")
TARGETS = np.array([0, 1, 1, 2, 1, 0, 1, 1])
TOKENS = Tokens({}, np.arange(9), TARGETS)
TASK = task_for("text-classification")
LOGITS = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return make_job(tmp_path_factory.mktemp("objective"))


def loss(job: JobConfig, parts: list[list[int]], **changes: Any) -> float:
    """The loss of all rows, in parts; an empty part is of row 0 and has no weight."""
    changed = job.with_values({key.replace("__", "."): value for key, value in changes.items()})
    objective = Objective(changed, TASK, TOKENS, LABELS)
    total = objective.total(np.arange(8))
    found = 0.0
    for part in parts:
        rows = np.array(part or [0])
        share = objective.share(rows, TARGETS[rows], total, empty=not part)
        found += float(share(SequenceClassifierOutput(logits=LOGITS[rows])))
    return found


ONE, MANY = [[0, 1, 2, 3, 4, 5, 6, 7]], [[7, 0], [], [3, 1, 4, 2], [5, 6]]
WEIGHTS = {"joy": 0.5, "love": 3}


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({}, [1.0, 1.0, 1.0]),
        ({"train__class_weights": WEIGHTS}, [1.0, 0.5, 3.0]),
        ({"train__class_weights": "balanced"}, [8 / 6, 8 / 15, 8 / 3]),
        ({"train__label_smoothing": 0.1}, [1.0, 1.0, 1.0]),
        ({"train__label_smoothing": 0.2, "train__class_weights": WEIGHTS}, [1.0, 0.5, 3.0]),
    ],
)
def test_the_loss_is_torchs_weighted_mean_however_the_rows_are_shared_out(
    job: JobConfig, changes: dict[str, Any], weights: list[float]
) -> None:
    rows = functional.cross_entropy(
        LOGITS, torch.from_numpy(TARGETS), reduction="none", label_smoothing=changes.get("train__label_smoothing", 0.0)
    )
    each = torch.tensor(weights)[torch.from_numpy(TARGETS)]
    expected = float((rows * each).sum() / each.sum())
    assert loss(job, ONE, **changes) == pytest.approx(expected, rel=1e-6)
    assert loss(job, MANY, **changes) == pytest.approx(expected, rel=1e-6)


def test_balanced_weights_give_every_label_the_same_sum(job: JobConfig) -> None:
    weights = row_weights(job.with_values({"train.class_weights": "balanced"}), TASK, TOKENS, LABELS)
    assert [weights[label == TARGETS].sum() for label in range(3)] == pytest.approx([8 / 3] * 3)


def test_a_weight_for_a_label_that_the_data_does_not_have_is_refused(job: JobConfig) -> None:
    wanted = job.with_values({"train.class_weights": {"hate": 2.0}})
    with pytest.raises(
        ConfigError, match=r"train\.class_weights: no label 'hate' in the data; it has anger, joy, love"
    ):
        row_weights(wanted, TASK, TOKENS, LABELS)


def test_a_weight_for_an_unknown_label_stops_a_job_before_anything_starts(tmp_path: Path) -> None:
    from banjoray.training.preflight import prepare

    with pytest.raises(ConfigError, match="no label 'hate'"):
        prepare(make_job(tmp_path, train__class_weights={"hate": 2.0}))
    assert not (tmp_path / "runs/checkpoints").exists()
