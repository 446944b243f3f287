"""Question answering as it is trained: architectures beside plain transformers, losses, and whether they fall."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from banjoray.data.tokens import IGNORED, Tokens
from banjoray.models.readout import read_first_only
from banjoray.tasks.question_answering import QuestionAnswering
from banjoray.training.interface import Callbacks
from banjoray.training.loop import fit
from banjoray.training.preflight import prepare
from banjoray.training.scoring import Feed, outputs
from engines import ask, engine_of, folder_of, registered
from factories import sample_rows
from questions import LENGTH, STRIDE, base, job_of, rows

TASK = QuestionAnswering()
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "albert", "deberta-v2", "modernbert")


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
            for end in range(start, min(start + 30, inside[-1] + 1)):
                left, right = encoded["offset_mapping"][number][start][0], encoded["offset_mapping"][number][end][1]
                best = max(best, (first[start] * last[end], row["context"][left:right], left, right))
    return best


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_version_answers_as_plain_transformers_does_alone_and_in_any_batch(
    tmp_path: Path, architecture: str
) -> None:
    from transformers import AutoConfig

    # A base that was made for five labels.
    model = base(tmp_path / "base", architecture, num_labels=5)
    assert AutoConfig.from_pretrained(model).num_labels == 5
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
def test_a_window_whose_answer_no_token_shows_weighs_nothing_and_has_a_finite_gradient(
    tmp_path: Path, smoothing: float
) -> None:
    targets = np.array([[1, 2, 3], [IGNORED, IGNORED, 4]])
    tokens = Tokens({}, np.array([0, 3, 7]), targets.ravel(), target_offsets=np.array([0, 3, 6]))
    assert TASK.weights(tokens, job_of(tmp_path, tmp_path, [], [])).tolist() == [1, 0]
    logits = torch.randn(2, 2, 4, requires_grad=True)
    given = SimpleNamespace(start_logits=logits[:, 0], end_logits=logits[:, 1])
    losses = TASK.losses(given, torch.from_numpy(targets), smoothing)
    losses.sum().backward()  # type: ignore[no-untyped-call]
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


def test_training_from_the_kept_states_of_a_frozen_bottom_is_training_from_the_words(tmp_path: Path) -> None:
    model = base(tmp_path / "base", "bert")
    losses = []
    for kept in ("always", "never"):
        changes = {"freeze": {"layers": 2}, "cache__prefix": kept, "train__adam_epsilon": 1e-5}
        job = job_of(tmp_path / kept, model, rows(24, 1), rows(12, 2), **changes)
        ready = prepare(job)
        result = fit(job, ready.rows, ready.task, ready.start, f"{job.storage}/run", Callbacks())
        losses.append(result.checkpoint.metrics)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_head_that_gives_every_token_the_same_is_not_taken_for_one_that_reads_the_first() -> None:
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    config = AutoConfig.for_model(
        "bert", vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = AutoModelForQuestionAnswering.from_config(config)
    torch.nn.init.zeros_(model.qa_outputs.weight)
    assert not read_first_only(model)
    assert model(input_ids=torch.ones(1, 6, dtype=torch.int64)).start_logits.shape == (1, 6)
