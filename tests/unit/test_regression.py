"""A number per text: trained, scored and answered as it is."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from banjoray.config.job import JobConfig
from banjoray.data.targets import number_splits
from banjoray.errors import ConfigError, DataError
from banjoray.registry import ModelVersion
from banjoray.reports.profile import findings, profile_lines, profile_page
from banjoray.reports.tables import score_tables
from banjoray.tasks.regression import Regression
from banjoray.tasks.task import check_metrics, task_for
from banjoray.training.preflight import prepare, profiled
from banjoray.training.scoring import score_folder
from engines import ask, engine_of, folder_of, registered
from factories import make_job, write_rows
from problems import FAMILIES, TEXTS, files_of, problem_job, rows

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = Regression()
Trained = tuple[JobConfig, ModelVersion]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A version of every family, barely trained."""
    job = problem_job(tmp_path_factory.mktemp(request.param), "regression", request.param, train__epochs=2)
    return job, registered(job)


def plain(job: JobConfig, version: ModelVersion, texts: Sequence[str]) -> np.ndarray:
    """What the model as transformers loads it says of each text, (texts,)."""
    folder = folder_of(job, version)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return np.array([model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts])


def test_the_score_of_a_version_is_scipys_of_the_plain_model(trained: Trained) -> None:
    job, version = trained
    held = rows(3, 30)
    predicted, targets = plain(job, version, [row["text"] for row in held]), np.array([row["score"] for row in held])
    score, _ = score_folder(folder_of(job, version), job, "test")
    assert score.metrics == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(predicted, targets).statistic,
            "spearman": scipy.stats.spearmanr(predicted, targets).statistic,
            "mae": np.abs(predicted - targets).mean(),
            "loss": ((predicted - targets) ** 2).mean(),
        },
        abs=1e-3,
    )
    assert tuple(score.metrics) == TASK.metrics
    assert (score.confusion, score.labels, score_tables(score), version.labels) == ((), (), [], ())


def test_answers_are_those_of_transformers_pipeline(trained: Trained) -> None:
    job, version = trained
    engine, folder = engine_of(job, version), folder_of(job, version)
    told = json.loads((folder / "config.json").read_text())
    assert (told["problem_type"], told["id2label"]) == ("regression", {"0": "LABEL_0"})
    pipeline: Any = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    answers = ask(engine, {"inputs": list(TEXTS)})
    expected = pipeline(list(TEXTS), top_k=None)
    assert [len(answer) for answer in answers] == [1] * len(TEXTS)
    for answer, theirs in zip(answers, expected, strict=True):
        assert answer == [{"label": "LABEL_0", "score": pytest.approx(theirs[0]["score"], abs=1e-5)}]
    for asked in ({"top_k": 3}, {"function_to_apply": "none"}):
        (again,) = ask(engine, {"inputs": TEXTS[0], "parameters": asked})
        assert again == [{"label": "LABEL_0", "score": pytest.approx(answers[0][0]["score"], abs=1e-5)}]


def test_an_answer_alone_is_the_answer_in_any_batch(trained: Trained) -> None:
    job, version = trained
    engine = engine_of(job, version)
    alone = [ask(engine, {"inputs": text})[0][0]["score"] for text in TEXTS]
    together = [answer[0]["score"] for answer in ask(engine, {"inputs": list(TEXTS)})]
    turned = [answer[0]["score"] for answer in ask(engine, {"inputs": list(TEXTS)[::-1]})][::-1]
    one_pass_each = [answer[0]["score"] for answer in ask(engine, {"inputs": list(TEXTS)}, together=False)]
    for other in (together, turned, one_pass_each):
        assert other == pytest.approx(alone, abs=1e-5)


def test_a_model_learns_the_number_of_a_text(tmp_path: Path) -> None:
    files = files_of(tmp_path / "more", {"train": 400, "validation": 60, "test": 60})
    job = problem_job(tmp_path, "regression", data__files=files, train__epochs=4)
    version = registered(job)
    found = score_folder(folder_of(job, version), job, "test")[0].metrics
    assert found["pearson"] > 0.8
    # The variance of the numbers is 1.5.
    assert found["loss"] < 0.75


def test_the_loss_of_a_row_is_its_squared_error() -> None:
    logits, targets = torch.tensor([[1.0], [2.0], [-3.0]]), torch.tensor([1.5, 2.0, 1.0], dtype=torch.float64)
    found = TASK.losses(SequenceClassifierOutput(logits=logits), targets, 0.0)
    assert found.tolist() == [0.25, 0.0, 16.0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.mean(), functional.mse_loss(logits[:, 0], targets.float()))


def refusal(folder: Path, **files: str) -> str:
    job = make_job(folder, classification={"problem_type": "regression"}, data__files=files)
    with pytest.raises(DataError) as caught:
        number_splits(job)
    return str(caught.value)


@pytest.mark.parametrize(
    ("cells", "row", "shown"),
    [
        ([1.5, None], 2, "None"),
        (["one", "two"], 1, "'one'"),
        # No table, so it was meant as text.
        (["1.5", "2"], 1, "'1.5'"),
        ([True, False], 1, "True"),
        ([[1.0], [2.0]], 1, "[1.0]"),
    ],
)
def test_what_is_no_number_is_refused_with_file_row_and_reason(
    tmp_path: Path, cells: list[Any], row: int, shown: str
) -> None:
    told = [{"text": f"text {number}", "label": cell} for number, cell in enumerate(cells)]
    found = refusal(tmp_path, train=str(write_rows(tmp_path / "a.jsonl", told)))
    assert found.startswith(f"data: a.jsonl row {row}, column 'label' holds {shown}; needed a finite number")


@pytest.mark.parametrize(("cell", "shown"), [("", "''"), ("much", "'much'"), ("nan", "'nan'"), ("inf", "inf")])
def test_a_cell_of_a_table_that_is_no_number_is_named_and_not_the_numbers_before_it(
    tmp_path: Path, cell: str, shown: str
) -> None:
    (tmp_path / "a.csv").write_text(f"text,label\none,1.5\ntwo,2\nthree,{cell}\n")
    assert refusal(tmp_path, train=str(tmp_path / "a.csv")) == (
        f"data: a.csv row 3, column 'label' holds {shown}; needed a finite number"
    )


def test_numbers_are_read_as_they_are_and_a_validation_share_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {n},{n / 4}\n" for n in range(20)))
    file = str(tmp_path / "a.csv")
    splits = number_splits(
        make_job(tmp_path, classification={"problem_type": "regression"}, data__files={"train": file})
    )
    assert (len(splits.train), len(splits.validation), splits.labels) == (18, 2, ())
    for split in (splits.train, splits.validation):
        assert split.targets is not None
        assert split.targets.dtype == np.float64
        assert split.targets.tolist() == [int(text.split()[1]) / 4 for text in split.rows["text"][:]]


def test_keys_about_labels_are_refused(tmp_path: Path) -> None:
    for key, value in (("data__labels", ["a", "b"]), ("train__label_smoothing", 0.1)):
        changes: dict[str, Any] = {key: value}
        with pytest.raises(ConfigError, match=rf"^{key.replace('__', '.')}: found .* a number has no labels"):
            prepare(problem_job(tmp_path, "regression", **changes))
    with pytest.raises(
        ConfigError, match=r"^train\.class_weights: found 'balanced'; rows of text-classification have no"
    ):
        prepare(problem_job(tmp_path, "regression", train__class_weights="balanced"))


def test_a_job_may_ask_for_the_metrics_of_its_problem_type_only(tmp_path: Path) -> None:
    check_metrics(problem_job(tmp_path, "regression"))
    told = r"^train\.metric: text-classification \(regression\) has no metric 'f1_macro'; it has pearson, spearman, mae"
    with pytest.raises(ConfigError, match=told):
        check_metrics(problem_job(tmp_path, "regression", train__metric="f1_macro"))
    told = r"^train\.metric: text-classification \(multi_label\) has no metric 'matthews'; it has f1_macro, f1_micro"
    with pytest.raises(ConfigError, match=told):
        check_metrics(problem_job(tmp_path, "multi_label", train__metric="matthews"))


def test_the_profile_describes_the_numbers(tmp_path: Path) -> None:
    told = [{"text": "so happy", "label": 1}, {"text": "so happy", "label": 3}, {"text": "my car", "label": 5}]
    file = str(write_rows(tmp_path / "a.jsonl", told))
    job = make_job(tmp_path, classification={"problem_type": "regression"})
    found = profiled(job.with_values({"data.files": {"train": file, "validation": file}}))
    numbers = found.splits[0].numbers
    assert numbers is not None
    assert (numbers.lowest, numbers.median, numbers.mean, numbers.highest) == (1, 3, 3, 5)
    assert dict(found.splits[0].labels) == {}
    assert "train: 2 rows have a text that stands under another number too (rows 1, 2)" in findings(found)
    assert len(profile_lines(found)) == 3 + len(findings(found))
    assert "<h2>Numbers</h2>" in profile_page("numbers", found)


def test_the_task_is_found_by_the_jobs_problem_type(tmp_path: Path) -> None:
    job = problem_job(tmp_path, "regression")
    assert isinstance(task_for(job.task).settled(job), Regression)
