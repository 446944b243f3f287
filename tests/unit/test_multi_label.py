"""Several labels per text: trained, scored, registered and answered with one threshold per label."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from sklearn import metrics as sklearn_metrics
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from banjoray.config.job import JobConfig
from banjoray.data.splits import Splits
from banjoray.data.targets import multi_label_splits
from banjoray.errors import ConfigError, DataError
from banjoray.registry import ModelVersion
from banjoray.reports.profile import profile_lines, profile_page
from banjoray.reports.tables import score_tables
from banjoray.serving.batch import answered
from banjoray.tasks.multi_label import MultiLabel
from banjoray.tasks.task import task_for
from banjoray.training.objective import row_weights
from banjoray.training.preflight import prepare, profiled
from banjoray.training.scoring import score_folder
from engines import ask, engine_of, folder_of, registered
from factories import make_job, write_rows
from pairs import TOPICS
from problems import FAMILIES, TEXTS, files_of, problem_job, rows

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = MultiLabel()
LABELS = tuple(sorted(TOPICS))
Trained = tuple[JobConfig, ModelVersion]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A version of every family, barely trained."""
    job = problem_job(tmp_path_factory.mktemp(request.param), "multi_label", request.param, train__epochs=2)
    return job, registered(job)


def plain(job: JobConfig, version: ModelVersion, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Logits (texts, labels) of the model as transformers loads it, each text alone, and its thresholds (labels,)."""
    folder = folder_of(job, version)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in texts]
    thresholds = [model.config.thresholds[model.config.id2label[number]] for number in range(model.config.num_labels)]
    return np.stack(logits), np.array(thresholds)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    found: np.ndarray = torch.from_numpy(logits).double().sigmoid().numpy()
    return found


def many_hot(found: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([[label in row["labels"] for label in LABELS] for row in found]).astype(int)


def test_the_score_of_a_version_is_scikit_learns_of_the_plain_model(trained: Trained) -> None:
    job, version = trained
    held = rows(3, 30)
    logits, thresholds = plain(job, version, [row["text"] for row in held])
    predicted, targets = (sigmoid(logits) >= thresholds).astype(int), many_hot(held)
    score, _ = score_folder(folder_of(job, version), job, "test")
    expected = {
        f"f1_{average}": sklearn_metrics.f1_score(targets, predicted, average=average, zero_division=0)
        for average in ("macro", "micro", "weighted")
    }
    expected["accuracy"] = sklearn_metrics.accuracy_score(targets, predicted)
    loss = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(targets).float())
    assert score.metrics == pytest.approx(expected | {"loss": loss.item()}, abs=1e-5)
    assert tuple(score.metrics) == TASK.metrics
    assert score.thresholds == dict(zip(LABELS, thresholds, strict=True))
    support = targets.sum(axis=0)
    assert [score.per_label[label]["support"] for label in LABELS] == support.tolist()
    assert len(score_tables(score)) == 1


def test_the_thresholds_are_those_with_the_best_f1_on_the_validation_rows(trained: Trained) -> None:
    job, version = trained
    held = rows(2, 40)
    logits, thresholds = plain(job, version, [row["text"] for row in held])
    scores, targets = sigmoid(logits), many_hot(held)
    found = []
    for label, threshold in enumerate(thresholds):
        own = np.sort(scores[:, label])
        # Cuts between scores that more than rounding tells apart.
        clear = own[np.diff(own, prepend=0) > 1e-5]
        f1 = [
            sklearn_metrics.f1_score(targets[:, label], scores[:, label] >= other, zero_division=0)
            for other in (threshold, 0.5, *clear)
        ]
        assert f1[0] >= max(f1) - 1e-9
        found.append(f1[0])
    assert version.metrics["f1_macro"] == pytest.approx(np.mean(found), abs=1e-9)
    assert version.labels == LABELS


def test_answers_are_those_of_transformers_pipeline_with_the_thresholds_of_the_score(trained: Trained) -> None:
    job, version = trained
    engine = engine_of(job, version)
    folder = folder_of(job, version)
    told = json.loads((folder / "config.json").read_text())
    assert told["problem_type"] == "multi_label_classification"
    pipeline: Any = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    logits, thresholds = plain(job, version, TEXTS)
    answers = ask(engine, {"inputs": list(TEXTS)})
    assert len(answers) == len(TEXTS)
    for answer, expected, own in zip(answers, pipeline(list(TEXTS), top_k=None), logits, strict=True):
        assert {entry["label"]: entry["score"] for entry in answer} == pytest.approx(
            {entry["label"]: entry["score"] for entry in expected}, abs=1e-5
        )
        scores = [entry["score"] for entry in answer]
        assert scores == sorted(scores, reverse=True)
        predicted = {entry["label"] for entry in answer if entry["predicted"]}
        assert predicted == {
            label for label, score, least in zip(LABELS, sigmoid(own), thresholds, strict=True) if score >= least
        }
    asked = {"inputs": TEXTS[0], "parameters": {"top_k": 1, "function_to_apply": "none"}}
    (first,) = ask(engine, asked)[0]
    assert first["score"] == pytest.approx(logits[0].max(), abs=1e-5)
    assert first["predicted"] == answers[0][0]["predicted"]
    lines = answered(engine, TEXTS, {})
    assert [line["answer"][0] for line in lines] == [
        [entry | {"score": pytest.approx(entry["score"], abs=1e-5)} for entry in answer] for answer in answers
    ]


def test_an_answer_alone_is_the_answer_in_any_batch(trained: Trained) -> None:
    job, version = trained
    engine = engine_of(job, version)
    together = ask(engine, {"inputs": list(TEXTS)})
    turned = ask(engine, {"inputs": list(TEXTS)[::-1]})
    one_pass_each = ask(engine, {"inputs": list(TEXTS)}, together=False)
    for number, text in enumerate(TEXTS):
        (alone,) = ask(engine, {"inputs": text})
        for other in (together[number], turned[-1 - number], one_pass_each[number]):
            assert {entry["label"]: entry["predicted"] for entry in other} == {
                entry["label"]: entry["predicted"] for entry in alone
            }
            assert {entry["label"]: entry["score"] for entry in other} == pytest.approx(
                {entry["label"]: entry["score"] for entry in alone}, abs=1e-5
            )


def test_a_model_learns_which_topics_a_text_is_about(tmp_path: Path) -> None:
    files = files_of(tmp_path / "more", {"train": 400, "validation": 60, "test": 60})
    job = problem_job(tmp_path, "multi_label", data__files=files, train__epochs=4)
    version = registered(job)
    found = score_folder(folder_of(job, version), job, "test")[0].metrics
    # Whoever says that every text has every label gets less than 0.6.
    assert found["f1_macro"] > 0.8


def test_a_version_as_a_base_brings_no_thresholds_and_no_problem_type_along(tmp_path: Path) -> None:
    job = problem_job(tmp_path, "multi_label", train__epochs=1)
    base = str(folder_of(job, registered(job)))
    one: Any = prepare(make_job(tmp_path / "one", model__base=base)).start.model().config
    assert one.problem_type == "single_label_classification"
    assert not hasattr(one, "thresholds")
    number: Any = prepare(problem_job(tmp_path / "number", "regression", model__base=base)).start.model().config
    assert (number.problem_type, number.id2label) == ("regression", {0: "LABEL_0"})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_row_is_the_mean_over_its_labels_of_torchs(smoothing: float) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]], dtype=torch.int8)
    found = TASK.losses(SequenceClassifierOutput(logits=logits), targets, smoothing)
    wanted = torch.where(targets == 1, 1 - smoothing / 2, smoothing / 2)
    probability = logits.sigmoid()
    expected = -(wanted * probability.log() + (1 - wanted) * (1 - probability).log()).mean(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if not smoothing:
        whole = functional.binary_cross_entropy_with_logits(logits, targets.float())
        torch.testing.assert_close(found.mean(), whole)


def splits_of(folder: Path, train: Sequence[Any], validation: Sequence[Any] | None = None, **data: Any) -> Splits:
    """The splits of rows with these lists of labels."""
    files: dict[str, Any] = {}
    for name, cells in (("train", train), ("validation", validation)):
        if cells is not None:
            told = [{"text": f"text {number}", "labels": cell} for number, cell in enumerate(cells)]
            files[name] = str(write_rows(folder / f"{name}.jsonl", told))
    return multi_label_splits(job_of(folder, files, **data))


def job_of(folder: Path, files: dict[str, Any], **data: Any) -> JobConfig:
    changes: dict[str, Any] = {f"data__{key}": value for key, value in data.items()}
    columns = {"data__columns": {"label": "labels"}}
    return make_job(folder, classification={"problem_type": "multi_label"}, data__files=files, **columns, **changes)


def test_lists_become_rows_of_zeros_and_ones_and_an_empty_one_says_none(tmp_path: Path) -> None:
    splits = splits_of(tmp_path, [["b", "a "], [], ["c"], ["a", "a"]], [["c", "b"]])
    assert splits.labels == ("a", "b", "c")
    assert splits.train.targets is not None
    assert splits.train.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert splits.validation.targets is not None
    assert splits.validation.targets.tolist() == [[0, 1, 1]]


def test_numbers_are_labels_too_and_count_through_the_names_of_the_job(tmp_path: Path) -> None:
    assert splits_of(tmp_path, [[10, 2], [9]], [[9]]).labels == ("2", "9", "10")
    splits = splits_of(tmp_path, [[1], [0, 1]], [[0]], labels=["glad", "sad"])
    assert splits.labels == ("glad", "sad")
    assert splits.train.targets is not None
    assert splits.train.targets.tolist() == [[0, 1], [1, 1]]


def test_a_data_set_that_names_its_numbers_keeps_its_order(tmp_path: Path) -> None:
    names = datasets.List(datasets.ClassLabel(names=["pos", "neg", "odd"]))
    features = datasets.Features({"text": datasets.Value("string"), "labels": names})
    told = {"text": ["one", "two"], "labels": [[1, 2], [0]]}
    datasets.Dataset.from_dict(told, features=features).to_parquet(tmp_path / "a.parquet")
    file = str(tmp_path / "a.parquet")
    for labels, expected in ((None, [[0, 1, 1], [1, 0, 0]]), (["odd", "pos", "neg"], [[1, 0, 1], [0, 1, 0]])):
        splits = multi_label_splits(job_of(tmp_path, {"train": file, "validation": file}, labels=labels))
        assert splits.labels == tuple(labels or ["pos", "neg", "odd"])
        assert splits.train.targets is not None
        assert splits.train.targets.tolist() == expected


def test_without_a_validation_split_a_seeded_share_is_cut_off(tmp_path: Path) -> None:
    cells = [["a"], ["b"], ["a", "b"], []] * 10
    first, again = (splits_of(tmp_path, cells, validation_fraction=0.25) for _ in range(2))
    assert (len(first.train), len(first.validation)) == (30, 10)
    assert first.validation.rows["text"][:] == again.validation.rows["text"][:]
    numbers = [int(text.split()[1]) for text in first.validation.rows["text"][:]]
    assert first.validation.targets is not None
    assert first.validation.targets.tolist() == [["a" in cells[row], "b" in cells[row]] for row in numbers]


@pytest.mark.parametrize(
    ("train", "validation", "words"),
    [
        (["a", "b"], [["a"]], "train.jsonl row 1, column 'labels' holds 'a'; needed a list of labels, [] for none"),
        ([["a"], None], [["a"]], "train.jsonl row 2, column 'labels' holds None; needed a list of labels, [] for none"),
        ([["a"], ["b", " "]], [["a"]], "train.jsonl row 2, column 'labels' holds ' ' in its list; needed labels' name"),
        ([["a"], ["b", None]], [["a"]], "train.jsonl row 2, column 'labels' holds None in its list; needed labels' "),
        ([[1.5], [2.0]], [[1.5]], "train.jsonl row 1, column 'labels' holds 1.5 in its list; needed labels' names, or"),
        (
            [[True], [False]],
            [[True]],
            "train.jsonl row 1, column 'labels' holds True in its list; needed labels' names",
        ),
        (
            [["a"], ["b"]],
            [["a"], ["a", "c"]],
            "validation.jsonl row 2, column 'labels' holds label 'c', which train never shows; known are a, b",
        ),
        ([["a"], []], [["a"]], "train.jsonl shows one label ('a'); needed at least two"),
    ],
)
def test_a_bad_row_is_refused_with_file_row_and_reason(
    tmp_path: Path, train: list[Any], validation: list[Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        splits_of(tmp_path, train, validation)
    assert str(caught.value).startswith(f"data: {words}")


def test_a_label_that_the_job_does_not_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 2, .* holds label 'c', which data\.labels does not list; known are a, b"):
        splits_of(tmp_path, [["a"], ["c"]], [["a"]], labels=["a", "b"])
    with pytest.raises(DataError, match=r"^data\.labels: a name stands twice"):
        splits_of(tmp_path, [["a"], ["b"]], [["a"]], labels=["a", "a"])


@pytest.mark.parametrize("cells", [[["a", 1]], [["a", "b"], [1], ["b"]]], ids=["in a row", "between rows"])
def test_names_and_numbers_are_not_labels_of_one_job(tmp_path: Path, cells: list[list[Any]]) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": "one", "labels": cell}) + "\n" for cell in [["a"], ["b"], *cells])
    )
    with pytest.raises(DataError) as caught:
        multi_label_splits(job_of(tmp_path, {"train": str(tmp_path / "a.jsonl")}))
    row = 3 if len(cells) == 1 else 4
    assert str(caught.value) == (
        f"data: a.jsonl row {row}, column 'labels' holds 1 in its list; needed labels' names, or whole numbers, "
        "the same kind in every row"
    )


def test_a_csv_file_can_hold_no_lists_and_what_can_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,labels\none,a;b\ntwo,b\n")
    with pytest.raises(DataError) as caught:
        multi_label_splits(job_of(tmp_path, {"train": str(tmp_path / "a.csv")}))
    assert str(caught.value).startswith(
        "data: a.csv row 1, column 'labels' holds 'a;b'; needed a list of labels, [] for none; a.csv can't hold lists: "
        "use jsonl or parquet"
    )


def test_the_same_rows_with_one_label_each_have_another_fingerprint(tmp_path: Path) -> None:
    several = splits_of(tmp_path, [["a"], ["b"]], [["a"]]).train
    assert several.targets is not None
    assert several.fingerprint() != several.taken(np.array([1, 0]), "train").fingerprint()


def test_rows_with_several_labels_have_no_weight_of_one(tmp_path: Path) -> None:
    job = problem_job(tmp_path, "multi_label", train__class_weights="balanced")
    with pytest.raises(
        ConfigError, match=r"^train\.class_weights: found 'balanced'; rows of text-classification don't"
    ):
        prepare(job)
    ready = prepare(problem_job(tmp_path, "multi_label"))
    assert set(row_weights(problem_job(tmp_path, "multi_label"), TASK, ready.rows.train, LABELS)) == {1.0}


def test_the_profile_counts_every_label_and_shares_are_of_rows(tmp_path: Path) -> None:
    found = profiled(problem_job(tmp_path, "multi_label"))
    train = found.splits[0]
    expected = many_hot(rows(1, 96)).sum(axis=0)
    assert dict(train.labels) == dict(zip(LABELS, expected.tolist(), strict=True))
    assert (train.labelled, train.numbers) == (96, None)
    assert profile_lines(found)
    assert "home" in profile_page("topics", found)


def test_the_task_is_found_by_the_jobs_problem_type(tmp_path: Path) -> None:
    job = problem_job(tmp_path, "multi_label")
    assert isinstance(task_for(job.task).settled(job), MultiLabel)
    assert not isinstance(task_for(job.task).settled(make_job(tmp_path)), MultiLabel)
