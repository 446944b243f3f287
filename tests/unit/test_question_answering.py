"""Question answering from rows to answers: architectures, scores, and what is read and answered over HTTP."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import QuestionAnsweringOutputElement

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.data.tokens import IGNORED, Tokens
from banjoray.errors import RequestError
from banjoray.models.readout import read_first_only
from banjoray.tasks.question_answering import QuestionAnswering
from banjoray.tasks.task import Ask, task_for
from banjoray.training.interface import Callbacks
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.scoring import Feed, outputs
from engines import ask, engine_of, folder_of, registered
from factories import DEPTH, sample_rows, tiny_model, tiny_tokenizer, write_rows

TASK = QuestionAnswering()
LENGTH, STRIDE = 40, 8
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "albert", "deberta-v2", "modernbert")


def base(folder: Path, architecture: str, **changes: Any) -> Path:
    """A tiny base whose weights are large enough for unlike answers to unlike rows."""
    import transformers

    usual: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "pad_token_id": 0,
        "hidden_size": 32,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 80,
    }
    special = {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config: Any
    if architecture == "deberta-v2":
        relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        config = transformers.DebertaV2Config(**usual, **relative)
    elif architecture == "modernbert":
        config = transformers.ModernBertConfig(**usual, **special, global_attn_every_n_layers=2, local_attention=16)
    else:
        config = transformers.AutoConfig.from_pretrained(tiny_model(folder, architecture))
    for name, value in ({"initializer_range": 0.3} | changes).items():
        setattr(config, name, value)
    torch.manual_seed(7)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def rows(count: int, seed: int, words: int = 60) -> list[dict[str, Any]]:
    """Questions about texts of up to ``words`` words, which may be more than a window holds; a word or two answers."""
    generator = np.random.default_rng(seed)
    texts = [row["text"].split() for row in sample_rows("train")]
    vocabulary = sorted({word for text in texts for word in text})
    found = []
    for number in range(count):
        told = generator.choice(vocabulary, generator.integers(8, words)).tolist()
        place = int(generator.integers(0, len(told) - 1))
        answer = " ".join(told[place : place + 1 + number % 2])
        start = len(" ".join([*told[:place], ""]))
        answers = {"text": [answer], "answer_start": [start]}
        question = " ".join(texts[number][:6])
        found.append({"question": question, "context": " ".join(told), "answers": answers})
    return found


def job_of(folder: Path, model: Path, train: list[Any], validation: list[Any], **changes: Any) -> JobConfig:
    files = {"train": train, "validation": validation}
    tree = {
        "name": "tiny",
        "task": "question-answering",
        "model": {"base": str(model), "dropout": 0.0},
        "data": {
            "files": {name: str(write_rows(folder / f"{name}.jsonl", rows)) for name, rows in files.items()},
            "max_length": LENGTH,
            "stride": STRIDE,
        },
        "train": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
        "storage": str(folder / "runs"),
        "registry": {"root": str(folder / "registry")},
        "hub": {"offline": True},
    }
    job = validate(JobConfig, tree, "test job")
    return job.with_values({key.replace("__", "."): value for key, value in changes.items()})


def plainly(folder: Path, row: dict[str, str]) -> tuple[float, str, int, int]:
    """The best answer of the files of a version, with transformers alone, by loops; window by window, unpadded."""
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    cut = AutoTokenizer.from_pretrained(folder)
    encoded = cut(
        row["question"],
        row["context"],
        truncation="only_second",
        max_length=LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best = (-1.0, "", 0, 0)
    for number, ids in enumerate(encoded["input_ids"]):
        with torch.inference_mode():
            given = model(input_ids=torch.tensor([ids]))
        inside = [token for token, part in enumerate(encoded.sequence_ids(number)) if part == 1]
        counted = torch.tensor([0, *inside])
        first = dict(zip([0, *inside], given.start_logits[0, counted].softmax(0).tolist(), strict=True))
        last = dict(zip([0, *inside], given.end_logits[0, counted].softmax(0).tolist(), strict=True))
        for start in inside:
            for end in range(start, min(start + 15, inside[-1] + 1)):
                left, right = encoded["offset_mapping"][number][start][0], encoded["offset_mapping"][number][end][1]
                best = max(best, (first[start] * last[end], row["context"][left:right], left, right))
    return best


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_version_answers_as_plain_transformers_does_alone_and_in_any_batch(
    tmp_path: Path, architecture: str
) -> None:
    # A base that was made for five labels.
    model = base(tmp_path / "base", architecture, num_labels=5)
    job = job_of(tmp_path, model, rows(24, 1), rows(12, 2))
    version = registered(job)
    assert set(version.metrics) == set(TASK.metrics)
    assert version.labels == ()
    engine = engine_of(job, version)
    asked = [{"question": row["question"], "context": row["context"]} for row in rows(12, 2)]
    alone = [ask(engine, {"inputs": one}, together=False) for one in asked]
    assert len({answer["answer"] for answer in alone}) > 6
    for one, answer in list(zip(asked, alone, strict=True))[:6]:
        score, text, start, end = plainly(folder_of(job, version), one)
        assert (answer["answer"], answer["start"], answer["end"]) == (text, start, end)
        assert answer["score"] == pytest.approx(score, abs=1e-5)
    for order in (range(12), range(11, -1, -1)):
        together = ask(engine, {"inputs": [asked[number] for number in order]})
        for number, answer in zip(order, together, strict=True):
            assert answer == alone[number] | {"score": pytest.approx(alone[number]["score"], abs=1e-5)}
            assert answer["answer"] == asked[number]["context"][answer["start"] : answer["end"]]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine of a version that was trained for one epoch, with rows that have no answer among its data."""
    folder = tmp_path_factory.mktemp("served")
    none = {"answers": {"text": [], "answer_start": []}}
    train = [row | (none if number % 3 == 0 else {}) for number, row in enumerate(rows(24, 1))]
    job = job_of(folder, base(folder / "base", "bert"), train, train[:9])
    return engine_of(job, registered(job))


def body(row: int = 0, **parameters: Any) -> dict[str, Any]:
    found = sorted(rows(12, 2), key=lambda row: -len(row["context"]))[row]
    return {"inputs": {"question": found["question"], "context": found["context"]}, "parameters": parameters}


def test_one_row_gets_one_answer_and_several_get_a_list_as_the_client_reads_them(served: Any) -> None:
    one = ask(served, body())
    assert list(one) == ["answer", "score", "start", "end"]
    assert QuestionAnsweringOutputElement.parse_obj(one).answer == one["answer"]
    assert ask(served, {"inputs": [body()["inputs"]]}) == [one]
    several = ask(served, body(top_k=4))
    assert several[0] == one
    assert len(several) == 4
    assert [answer["score"] for answer in several] == sorted((answer["score"] for answer in several), reverse=True)
    assert len({(answer["start"], answer["end"]) for answer in several}) == 4
    assert len(QuestionAnsweringOutputElement.parse_obj(several)) == 4
    assert ask(served, {"inputs": [body()["inputs"]], "parameters": {"top_k": 4}}) == [several]
    assert ask(served, body(top_k=1, doc_stride=None, max_answer_len=None)) == one


def longest(answers: list[dict[str, Any]]) -> int:
    """Tokens of the longest answer, for the tokenizer of these models."""
    return max(len(re.findall(r"\w+|[^\w\s]+", answer["answer"])) for answer in answers)


def test_every_parameter_has_its_effect(served: Any) -> None:
    many = ask(served, body(top_k=5000))
    assert longest(many) == 15
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
    from banjoray.data.tokens import Feature
    from banjoray.tasks.task import Seen

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


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_window_has_the_loss_that_the_model_itself_gives_it_whatever_it_is_padded_to(
    tmp_path: Path, smoothing: float
) -> None:
    ready = prepare(job_of(tmp_path, base(tmp_path / "base", "bert"), rows(12, 1), rows(12, 2)))
    model, tokens = ready.start.model().eval(), ready.rows.train
    feed = Feed(tokens, 0, torch.device("cpu"))
    inputs, targets = feed.batch(np.arange(len(tokens)))
    assert len(set(tokens.lengths)) > 3
    with torch.inference_mode():
        losses = TASK.losses(model(**inputs), torch.from_numpy(targets), smoothing)
        kept = outputs(model, feed, TASK)
        for number in range(len(tokens)):
            alone, (wanted,) = feed.batch(np.array([number]))
            found = model(**alone, start_positions=torch.tensor([wanted[0]]), end_positions=torch.tensor([wanted[1]]))
            cells = torch.stack([found.start_logits[0], found.end_logits[0]])
            smooth = torch.nn.functional.cross_entropy(cells, torch.from_numpy(wanted[:2]), label_smoothing=smoothing)
            assert losses[number].item() == pytest.approx(smooth.item(), abs=1e-5)
            assert smoothing or smooth.item() == pytest.approx(found.loss.item(), abs=1e-5)
            assert kept[number] == pytest.approx(cells.numpy(), abs=1e-5)
    assert losses.dtype == torch.float32
    if not smoothing:
        score = TASK.score(kept, tokens, ready.splits.train, ())
        assert score.metrics["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_window_whose_answer_no_token_shows_weighs_nothing_and_has_a_finite_gradient(smoothing: float) -> None:
    from types import SimpleNamespace

    targets = np.array([[1, 2, 3], [IGNORED, IGNORED, 4]])
    tokens = Tokens({}, np.array([0, 3, 7]), targets.ravel(), target_offsets=np.array([0, 3, 6]))
    assert TASK.weights(tokens).tolist() == [1, 0]
    logits = torch.randn(2, 2, 4, requires_grad=True)
    given = SimpleNamespace(start_logits=logits[:, 0], end_logits=logits[:, 1])
    losses = TASK.losses(given, torch.from_numpy(targets), smoothing)
    losses.sum().backward()
    assert losses[1].item() == 0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[1].any()
    assert not logits.grad[0, :, 3].any()


def names(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows that can be learned: of all words of a context, one is a name, and it is the answer."""
    generator = np.random.default_rng(seed)
    vocabulary = sorted({word for row in sample_rows("train")[:200] for word in row["text"].split()})
    known, filler = vocabulary[:5], vocabulary[5:105]
    found = []
    for _ in range(count):
        told = generator.choice(filler, generator.integers(6, 20)).tolist()
        place = int(generator.integers(0, len(told)))
        told[place] = str(generator.choice(known))
        start = len(" ".join([*told[:place], ""]))
        answers = {"text": [told[place]], "answer_start": [start]}
        found.append({"question": "who is it", "context": " ".join(told), "answers": answers})
    return found


def test_what_can_be_learned_is_learned(tmp_path: Path, lively_model: Callable[..., Path]) -> None:
    job = job_of(
        tmp_path,
        lively_model(tmp_path / "base"),
        names(160, 1),
        names(40, 2),
        train__epochs=9,
        train__learning_rate=3e-3,
    )
    ready = prepare(job)
    feed = Feed(ready.rows.validation, 0, torch.device("cpu"))
    before = TASK.score(
        outputs(ready.start.model().eval(), feed, TASK), ready.rows.validation, ready.splits.validation, ()
    ).metrics
    after = fit(job, ready.rows, ready.task, ready.start, f"{job.storage}/run", Callbacks()).checkpoint.metrics
    assert before["exact_match"] < 0.3
    assert after["exact_match"] > 0.8
    assert after["f1"] >= after["exact_match"]
    assert after["loss"] < before["loss"] / 3


def test_a_head_that_gives_every_token_the_same_is_not_taken_for_one_that_reads_the_first() -> None:
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    config = AutoConfig.for_model(
        "bert", vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = AutoModelForQuestionAnswering.from_config(config)
    torch.nn.init.zeros_(model.qa_outputs.weight)
    assert not read_first_only(model)
    assert model(input_ids=torch.ones(1, 6, dtype=torch.int64)).start_logits.shape == (1, 6)


def test_the_task_is_found_by_its_name_and_its_usual_metric_is_f1(tmp_path: Path) -> None:
    job = job_of(tmp_path, tmp_path, rows(2, 1), rows(2, 2))
    assert isinstance(task_for(job.task), QuestionAnswering)
    assert (job.train.metric, job.registry.gate.metric) == ("f1", "f1")
