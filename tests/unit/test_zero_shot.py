"""Zero-shot classification: trained as inference between two texts, answered as transformers' pipeline answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

from banjoray.config.job import JobConfig
from banjoray.errors import ConfigError, DataError, RequestError
from banjoray.registry import ModelVersion
from banjoray.serving.protocols import huggingface
from banjoray.tasks.task import Ask, Seen, task_for
from banjoray.tasks.zero_shot import TEMPLATE, ZeroShot, contradiction_of, entailment_of
from banjoray.training.preflight import prepare
from engines import ask, engine_of, folder_of, registered
from factories import write_rows
from pairs import nli_job, pairs

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = ZeroShot()
FAMILIES = ("bert", "distilbert", "roberta", "electra", "albert", "modernbert")
LABELS = ("contradiction", "entailment", "neutral")
TEXTS = (
    "they walked down to the beach",
    "the door of the kitchen was open",
    "my teacher read it to the whole class again",
)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, ModelVersion]:
    """A version of every family, barely trained."""
    job = nli_job(tmp_path_factory.mktemp(request.param), request.param)
    return job, registered(job)


def scores_of(answer: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in answer}


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("candidates", [["home", "sea", "school"], ["sea"]])
def test_answers_are_those_of_transformers_pipeline(
    trained: tuple[JobConfig, ModelVersion], candidates: list[str], multi_label: bool
) -> None:
    job, version = trained
    parameters = {"candidate_labels": candidates, "multi_label": multi_label, "hypothesis_template": "this is {}."}
    pipeline = transformers.pipeline("zero-shot-classification", model=str(folder_of(job, version)), device="cpu")
    answers = ask(engine_of(job, version), {"inputs": list(TEXTS), "parameters": parameters})
    assert len(answers) == len(TEXTS)
    for text, answer in zip(TEXTS, answers, strict=True):
        expected: Any = pipeline(text, **parameters)
        assert scores_of(answer) == pytest.approx(
            dict(zip(expected["labels"], expected["scores"], strict=True)), abs=1e-5
        )
        scores = [entry["score"] for entry in answer]
        assert scores == sorted(scores, reverse=True)


def test_an_answer_alone_is_the_answer_in_any_batch(trained: tuple[JobConfig, ModelVersion]) -> None:
    job, version = trained
    engine = engine_of(job, version)
    parameters = {"candidate_labels": "home, the boy from the boat, sea"}
    together = ask(engine, {"inputs": list(TEXTS), "parameters": parameters})
    turned = ask(engine, {"inputs": list(TEXTS)[::-1], "parameters": parameters})
    one_pass_each = ask(engine, {"inputs": list(TEXTS), "parameters": parameters}, together=False)
    for number, text in enumerate(TEXTS):
        alone = scores_of(ask(engine, {"inputs": text, "parameters": parameters}))
        assert set(alone) == {"home", "the boy from the boat", "sea"}
        for other in (together[number], turned[-1 - number], one_pass_each[number]):
            assert scores_of(other) == pytest.approx(alone, abs=1e-5)


def test_a_model_learns_which_hypotheses_follow_and_answers_with_them_first(tmp_path: Path) -> None:
    # Of any text, for it to be learned in seconds; what is learned stands in the second text alone.
    follows = {"home": "entailment", "sea": "contradiction", "it": "neutral"}
    rows = [row | {"label": follows[named]} for row in pairs(3, 320) if (named := row["hypothesis"][8:-1]) in follows]
    files = {
        "train": str(write_rows(tmp_path / "more" / "train.jsonl", rows[:160])),
        "validation": str(write_rows(tmp_path / "more" / "validation.jsonl", rows[160:])),
    }
    rates: dict[str, Any] = {"train__learning_rate": 5e-3, "train__adam_epsilon": 1e-8}
    job = nli_job(tmp_path, data__files=files, train__epochs=5, train__batch_size=8, **rates)
    version = registered(job)
    assert version.metrics["accuracy"] > 0.9
    parameters = {"candidate_labels": ["sea", "it", "home"], "hypothesis_template": "this is {}."}
    engine = engine_of(job, version)
    for multi_label in (False, True):
        answers = ask(engine, {"inputs": list(TEXTS), "parameters": parameters | {"multi_label": multi_label}})
        assert [answer[0]["label"] for answer in answers] == ["home"] * len(TEXTS)
        assert all(answer[0]["score"] > 0.8 for answer in answers)
        assert all(scores_of(answer)["sea"] < 0.2 for answer in answers)


def test_a_job_without_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^data\.columns\.text_pair: found null; .* learns from pairs"):
        prepare(nli_job(tmp_path, data__columns={"text": "premise"}))


def test_labels_without_entailment_are_refused_and_numbers_can_be_named(tmp_path: Path) -> None:
    rows = [row | {"label": LABELS.index(row["label"])} for row in pairs(5, 40)]
    job = nli_job(tmp_path, data__files={"train": str(write_rows(tmp_path / "numbers.jsonl", rows))})
    with pytest.raises(DataError, match=r"labels '0', '1', '2'; needed one whose name starts with 'entail'.*data\.lab"):
        prepare(job)
    named = prepare(job.with_values({"data.labels": list(LABELS)}))
    assert named.splits.labels == LABELS
    assert named.splits.train.targets is not None
    assert set(named.splits.train.targets.tolist()) == {0, 1, 2}


def test_a_pair_without_a_hypothesis_is_named_by_file_and_row(tmp_path: Path) -> None:
    rows = pairs(5, 40)
    rows[6]["hypothesis"] = "  "
    job = nli_job(tmp_path, data__files={"train": str(write_rows(tmp_path / "blank.jsonl", rows))})
    with pytest.raises(DataError, match=r"blank\.jsonl row 7, column 'hypothesis' holds only blanks"):
        prepare(job)


@pytest.mark.parametrize(
    ("labels", "entailment", "contradiction"),
    [
        (("contradiction", "entailment", "neutral"), 1, 0),
        (("ENTAILMENT", "NEUTRAL", "CONTRADICTION"), 0, 2),
        (("neutral", "entails", "contradicts"), 1, 2),
        (("not_entailment", "entailment"), 1, None),
    ],
)
def test_labels_are_found_by_name(labels: tuple[str, ...], entailment: int, contradiction: int | None) -> None:
    assert (entailment_of(labels), contradiction_of(labels)) == (entailment, contradiction)


@pytest.mark.parametrize("labels", [("yes", "no"), ("not_entailment", "other"), ("entailment", "entailed")])
def test_no_entailment_and_two_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"found labels '{labels[0]}', '{labels[1]}'; needed one whose name"):
        entailment_of(labels)


def answered(logits: np.ndarray, labels: Sequence[str], **parameters: Any) -> dict[str, float]:
    """The answer for one text whose candidates got ``logits`` (candidates, labels)."""
    named = {"candidate_labels": [f"c{number}" for number in range(len(logits))]} | parameters
    asked = Ask([{}] * len(logits), named, single=True)
    return scores_of(TASK.answer(asked, [Seen([], [row]) for row in logits], labels, None))


def test_several_labels_are_weighed_against_contradiction_or_against_all_others() -> None:
    logits = np.random.default_rng(1).normal(0, 3, (4, 3)).astype(np.float32)
    plain = torch.from_numpy(logits).double()
    names = [f"c{number}" for number in range(4)]
    against = plain[:, [1, 2]].softmax(1)[:, 0]
    found = answered(logits, ("neutral", "entailment", "contradiction"), multi_label=True)
    assert found == pytest.approx(dict(zip(names, against.tolist(), strict=True)), abs=1e-12)
    others = plain.softmax(1)[:, 1]
    found = answered(logits, ("unclear", "entailment", "no"), multi_label=True)
    assert found == pytest.approx(dict(zip(names, others.tolist(), strict=True)), abs=1e-12)
    found = answered(logits, ("neutral", "entailment", "contradiction"))
    assert found == pytest.approx(dict(zip(names, plain[:, 1].softmax(0).tolist(), strict=True)), abs=1e-12)


def test_large_logits_give_finite_scores() -> None:
    logits = np.array([[1e4, -1e4, 0], [-1e4, 1e4, 0]], np.float32)
    for multi_label in (False, True):
        assert answered(logits, LABELS, multi_label=multi_label) == {"c0": 0.0, "c1": 1.0}


@pytest.mark.parametrize("labels", [["a", "b"], "a,b", " a , b ", "a,,b,"])
def test_a_row_is_a_text_and_a_hypothesis(labels: Any) -> None:
    parameters = {"candidate_labels": labels, "multi_label": None}
    asked = TASK.parse(["x", "y"], parameters)
    assert asked.rows == [
        {"text": text, "text_pair": TEMPLATE.replace("{}", label)} for text in ("x", "y") for label in ("a", "b")
    ]
    assert not asked.single
    assert TASK.parse("x", parameters).single
    other = TASK.parse("x", {"candidate_labels": ["{b}"], "hypothesis_template": "{0} is {}"})
    assert other.rows == [{"text": "x", "text_pair": "{0} is {b}"}]


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ("x", {}, "parameters.candidate_labels: found NoneType; needed a list of labels"),
        ("x", {"candidate_labels": []}, "parameters.candidate_labels: found no label"),
        ("x", {"candidate_labels": " , "}, "parameters.candidate_labels: found no label"),
        ("x", {"candidate_labels": 7}, "parameters.candidate_labels: found int"),
        ("x", {"candidate_labels": ["a", " "]}, "parameters.candidate_labels[1]: found nothing but blanks"),
        ("x", {"candidate_labels": ["a", 7]}, "parameters.candidate_labels[1]: found int"),
        ("x", {"candidate_labels": ["a", "b", "a "]}, "parameters.candidate_labels: found 'a' twice"),
        (
            "x",
            {"candidate_labels": "a", "hypothesis_template": "This."},
            "parameters.hypothesis_template: found 'This.'",
        ),
        ("x", {"candidate_labels": "a", "hypothesis_template": "{}{}"}, "parameters.hypothesis_template: found '{}{}'"),
        ("x", {"candidate_labels": "a", "hypothesis_template": 7}, "parameters.hypothesis_template: found int"),
        ("x", {"candidate_labels": "a", "multi_label": "yes"}, "parameters.multi_label: found 'yes'; needed true or"),
        (
            "x",
            {"candidate_labels": "a", "top_k": 1},
            "parameters: unknown ['top_k']; zero-shot-classification has cand",
        ),
        ([], {"candidate_labels": "a"}, "inputs: an empty list; needed a text, or a list of texts"),
        (["x", 7], {"candidate_labels": "a"}, "inputs[1]: found int"),
        ({"text": "x"}, {"candidate_labels": "a"}, "inputs: found dict"),
        (" ", {"candidate_labels": "a"}, "inputs: found nothing but blanks"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_computed(inputs: Any, parameters: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        TASK.parse(inputs, parameters)
    assert str(caught.value).startswith(words)
    assert caught.value.status == 422


def test_rows_of_texts_and_labels_are_counted_together() -> None:
    body = b'{"inputs": ["a", "b"], "parameters": {"candidate_labels": ["x", "y", "z"]}}'
    assert len(huggingface.parse(body, TASK, 6).rows) == 6
    with pytest.raises(RequestError, match="6 rows to compute; this endpoint takes 5") as caught:
        huggingface.parse(body, TASK, 5)
    assert caught.value.status == 413


def test_the_client_reads_the_answer() -> None:
    asked = Ask([{}, {}], {"candidate_labels": "a,b"}, single=True)
    rows = [Seen([], [np.array([0.0, 2.0, 1.0])]), Seen([], [np.array([0.0, 3.0, 1.0])])]
    answer = TASK.answer(asked, rows, LABELS, None)
    read = huggingface_hub.ZeroShotClassificationOutputElement.parse_obj_as_list(answer)
    assert [element.label for element in read] == ["b", "a"]
    assert sum(element.score for element in read) == pytest.approx(1)


def test_the_task_is_found_by_its_name_and_has_the_scores_of_text_classification() -> None:
    assert isinstance(task_for(TASK.name), ZeroShot)
    assert TASK.metrics == task_for("text-classification").metrics
