"""Question answering: its score, and what it reads and answers over HTTP."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import QuestionAnsweringOutputElement

from banjoray.data.tokens import Feature, Tokens
from banjoray.errors import RequestError
from banjoray.tasks.question_answering import QuestionAnswering
from banjoray.tasks.task import Ask, Seen, task_for
from engines import ask, engine_of, registered
from questions import LENGTH, base, job_of, rows

TASK = QuestionAnswering()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine of a version that was trained for one epoch, with rows that have no answer among its data."""
    folder = tmp_path_factory.mktemp("served")
    none: dict[str, Any] = {"answers": {"text": [], "answer_start": []}}
    train = [row | (none if number % 3 == 0 else {}) for number, row in enumerate(rows(24, 1))]
    job = job_of(folder, base(folder / "base", "bert"), train, train[:9])
    return engine_of(job, registered(job))


def body(row: int = 0, **parameters: Any) -> dict[str, Any]:
    found = sorted(rows(12, 2), key=lambda row: -len(row["context"]))[row]
    return {"inputs": {"question": found["question"], "context": found["context"]}, "parameters": parameters}


def test_one_row_gets_one_answer_and_several_get_a_list_as_the_client_reads_them(served: Any) -> None:
    one = ask(served, body())
    assert list(one) == ["answer", "score", "start", "end"]
    read = QuestionAnsweringOutputElement.parse_obj(one)
    assert isinstance(read, QuestionAnsweringOutputElement)
    assert (read.answer, read.score, read.start, read.end) == tuple(one.values())
    assert ask(served, {"inputs": [body()["inputs"]]}) == [one]
    several = ask(served, body(top_k=4))
    assert several[0] == one
    assert len(several) == 4
    assert [answer["score"] for answer in several] == sorted((answer["score"] for answer in several), reverse=True)
    assert len({(answer["start"], answer["end"]) for answer in several}) == 4
    listed = QuestionAnsweringOutputElement.parse_obj(several)
    assert isinstance(listed, list)
    assert [found.answer for found in listed] == [answer["answer"] for answer in several]
    assert ask(served, {"inputs": [body()["inputs"]], "parameters": {"top_k": 4}}) == [several]
    assert ask(served, body(top_k=1, doc_stride=None, max_answer_len=None)) == one


def longest(answers: list[dict[str, Any]]) -> int:
    """Tokens of the longest answer, for the tokenizer of these models."""
    return max(len(re.findall(r"\w+|[^\w\s]+", answer["answer"])) for answer in answers)


def test_every_parameter_has_its_effect(served: Any) -> None:
    many = ask(served, body(top_k=5000))
    # As many as a score counts: the windows of these models have room for little more.
    assert 15 < longest(many) <= 30
    assert longest(ask(served, body(top_k=5000, max_answer_len=15))) == 15
    assert longest(ask(served, body(top_k=5000, max_answer_len=2))) == 2
    assert not [answer for answer in many if not answer["answer"]]
    with_none = ask(served, body(top_k=5000, handle_impossible_answer=True))
    nothing = [answer for answer in with_none if not answer["answer"]]
    assert [(answer["start"], answer["end"]) for answer in nothing] == [(0, 0)]
    assert 0 < nothing[0]["score"] < 1
    row = {"inputs": {"question": "who", "context": "undreamtof feeling"}, "parameters": {"top_k": 9}}
    assert {answer["answer"] for answer in ask(served, row)} == {"undreamtof feeling", "undreamtof", "feeling"}
    assert ask(served, body(max_seq_len=24)) != ask(served, body())
    assert ask(served, body(max_question_len=2)) != ask(served, body())
    assert ask(served, body(doc_stride=0, top_k=50)) != ask(served, body(top_k=50))


def test_words_are_made_whole_unless_the_request_says_otherwise() -> None:
    feature = Feature({"input_ids": [2, 5]}, {"starts": [-2, 2], "ends": [-1, 4]})
    row = {"question": "q", "context": "Strasbourg"}
    for parameters, answer in (({}, "Strasbourg"), ({"align_to_words": False}, "ra")):
        seen = [Seen([feature], [np.zeros((2, 2), np.float32)])]
        assert TASK.answer(Ask([row], parameters, single=True), seen, (), None)["answer"] == answer


@pytest.mark.parametrize(
    ("inputs", "where"),
    [
        ([], "inputs: an empty list"),
        ("what?", "inputs: found str"),
        (None, "inputs: found NoneType"),
        ({"question": "q"}, "inputs: found keys ['question']"),
        ({"question": "q", "context": "c", "answers": {}}, "inputs: found keys ['answers', 'context', 'question']"),
        ({"question": "q", "context": " "}, "inputs.context: found nothing but blanks"),
        ([{"question": "q", "context": "c"}, {"question": 7, "context": "c"}], "inputs[1].question: found int"),
        ([{"question": "q", "context": "c"}, "c"], "inputs[1]: found str"),
        ({"question": ["q"], "context": ["c"]}, "inputs.question: found list"),
    ],
)
def test_other_inputs_are_refused(inputs: Any, where: str) -> None:
    with pytest.raises(RequestError) as caught:
        TASK.parse(inputs, {})
    assert str(caught.value).startswith(where)
    assert "needed" in str(caught.value)


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": 0},
        {"max_answer_len": "15"},
        {"max_seq_len": True},
        {"max_seq_len": LENGTH + 1},
        {"doc_stride": -1},
        {"doc_stride": LENGTH},
        {"max_question_len": 0},
        {"handle_impossible_answer": "yes"},
        {"align_to_words": 1},
        {"padding": True},
    ],
)
def test_wrong_parameters_are_refused_by_name(served: Any, parameters: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(parameters))):
        ask(served, body(**parameters))


def test_a_question_that_is_too_long_is_refused_unless_it_may_be_cut(served: Any) -> None:
    long = body()["inputs"] | {"question": "feeling " * 50}
    with pytest.raises(RequestError, match=r"a question of 50 tokens .* room for 18"):
        ask(served, {"inputs": long})
    short = ask(served, {"inputs": long | {"question": "feeling " * 18}})
    assert ask(served, {"inputs": long, "parameters": {"max_question_len": 64}}) == short


def test_a_row_that_was_learned_without_an_answer_counts_as_such_in_the_score() -> None:
    def scored(found: list[Any], favourite: int) -> dict[str, float]:
        starts = np.array([-2, -1, 0, 4, -1], dtype=np.int32)
        ends = np.array([-1, -1, 3, 7, -1], dtype=np.int32)
        count = len(found)
        targets = [[0, 0, 5] if not answers else [2, 2, 5] for answers in found]
        tokens = Tokens(
            {"input_ids": np.zeros(5 * count, np.int32)},
            np.arange(count + 1) * 5,
            np.array(targets).ravel(),
            target_offsets=np.arange(count + 1) * 3,
            aside={"starts": np.tile(starts, count), "ends": np.tile(ends, count)},
            rows=np.arange(count),
        )
        logits = np.zeros((2, 5), np.float32)
        logits[:, favourite] = 5
        answers = [{"text": ["Aar"], "answer_start": [0]} if answer else None for answer in found]
        split = _split({"question": ["q"] * count, "context": ["Aar Rhi"] * count, "answers": answers})
        return TASK.score([logits] * count, tokens, split, ()).metrics

    assert scored([True, True], 2) == pytest.approx(
        {"exact_match": 1, "f1": 1, "loss": -math.log(math.exp(5) / (math.exp(5) + 4))}, abs=1e-12
    )
    # Where every row has an answer, "no answer" is none.
    assert scored([True, True], 0)["exact_match"] == 1
    assert scored([True, False], 0)["exact_match"] == 0.5
    assert scored([False, True, True, True], 0)["f1"] == 0.25
    assert scored([False, True, True, True], 2)["f1"] == 0.75


def _split(columns: dict[str, Any]) -> Any:
    import datasets

    from banjoray.data.splits import Split

    return Split("test", datasets.Dataset.from_dict(columns), {key: key for key in columns})


def test_the_task_is_found_by_its_name_and_its_usual_metric_is_f1(tmp_path: Path) -> None:
    job = job_of(tmp_path, tmp_path, rows(2, 1), rows(2, 2))
    assert isinstance(task_for(job.task), QuestionAnswering)
    assert (job.train.metric, job.registry.gate.metric) == ("f1", "f1")
