"""Feature extraction: vectors are those of a plain forward pass, and pairs are learned from each other's company."""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

from banjoray.config.data import DataConfig
from banjoray.config.job import EmbeddingConfig, JobConfig
from banjoray.data.batches import padded, targets_of
from banjoray.data.tokens import Tokens, tokens_of
from banjoray.errors import ConfigError, DataError, ModelError, RequestError
from banjoray.models.loading import load_trained, sketch
from banjoray.registry import ModelVersion
from banjoray.serving.protocols import huggingface
from banjoray.tasks import ranking
from banjoray.tasks.embeddings import Embeddings, Unfold, pool
from banjoray.tasks.task import Ask, Seen, task_for
from banjoray.training.objective import Objective
from banjoray.training.preflight import prepare
from engines import ask, engine_of, folder_of, registered
from factories import make_job, tiny_model, tiny_tokenizer, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = Embeddings()
POOLING = {
    "bert": "mean",
    "distilbert": "cls",
    "roberta": "max",
    "electra": "mean",
    "albert": "mean",
    "modernbert": "cls",
}
WORDS = ["house", "room", "door", "kitchen", "window", "boat", "water", "beach", "harbour", "teacher", "class", "dog"]
WORDS += ["train", "car", "mother", "brother", "table", "phone", "chair", "roof", "school", "letter", "song", "tent"]
TEXTS = ("they walked down to the beach", "the door", "my teacher read it to the whole class again and again , today")
LENGTH = 12


def pairs(seed: int, count: int) -> list[dict[str, str]]:
    """Texts and others about the same thing."""
    draws = random.Random(seed)
    before, after = ("we saw the", "he found a", "she left her"), ("was there", "is gone now", "will come back")
    rows = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        rows.append({"said": f"{draws.choice(before)} {word} again", "meant": f"the {word} {draws.choice(after)}"})
    return rows


def pair_job(folder: Path, architecture: str = "bert", **changes: Any) -> JobConfig:
    (folder / "base").exists() or tiny_model(folder / "base", architecture)
    files = {
        split: str(write_rows(folder / "pairs" / f"{split}.jsonl", pairs(seed, count)))
        for split, seed, count in (("train", 1, 48), ("validation", 2, 24))
    }
    values: dict[str, Any] = {
        "task": TASK.name,
        "data__files": files,
        "data__columns": {"text": "said", "text_pair": "meant"},
        "data__max_length": LENGTH,
        "train__metric": "mrr",
        "registry__gate__metric": "mrr",
        "train__epochs": 1,
    }
    return make_job(folder, **(values | changes))


@pytest.fixture(scope="module", params=POOLING)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, ModelVersion]:
    """A version of every family, barely trained; each kind of pooling is somebody's."""
    folder = tmp_path_factory.mktemp(request.param)
    # Enough for vectors to be told apart.
    rates: dict[str, Any] = {"train__batch_size": 8, "train__learning_rate": 5e-3, "train__adam_epsilon": 1e-8}
    job = pair_job(folder, request.param, embedding__pooling=POOLING[request.param], **rates)
    return job, registered(job)


def plain_vector(model: Any, tokenizer: Any, text: str, pooling: str) -> np.ndarray:
    """What a text's vector is, by transformers alone."""
    inputs = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state[0]
    vector = {"cls": states[0], "mean": states.mean(0), "max": states.max(0).values}[pooling]
    return np.asarray(vector / vector.norm())


def test_vectors_and_scores_are_those_of_plain_transformers(trained: tuple[JobConfig, ModelVersion]) -> None:
    job, version = trained
    folder, pooling = folder_of(job, version), job.embedding.pooling
    assert yaml.safe_load((folder / "job.yaml").read_text())["embedding"] == job.embedding.model_dump()
    model, tokenizer = transformers.AutoModel.from_pretrained(folder).eval(), tiny_tokenizer()
    engine = engine_of(job, version)
    expected = np.stack([plain_vector(model, tokenizer, text, pooling) for text in TEXTS])
    found = np.array(ask(engine, {"inputs": list(TEXTS)}), dtype="float32")
    assert found.shape == (3, 32)
    assert found == pytest.approx(expected, abs=1e-5)
    cosines = ask(engine, {"inputs": {"source_sentence": TEXTS[0], "sentences": list(TEXTS[1:])}, "parameters": {}})
    assert cosines == pytest.approx((expected[1:] @ expected[0]).tolist(), abs=1e-5)
    # The score counts what HTTP answers: each text looks for its pair.
    rows = pairs(2, 24)
    first, second = (
        np.array(ask(engine, {"inputs": [row[side] for row in rows]})).astype(np.float64) for side in ("said", "meant")
    )
    cosines = first @ second.T
    ranks = (cosines > np.diag(cosines)[:, None] - ranking.TIE).sum(axis=1)
    assert len({row["meant"] for row in rows}) == len(rows)
    assert version.metrics["mrr"] == pytest.approx((1 / ranks).mean(), abs=1e-9)
    assert version.metrics["recall_at_1"] == pytest.approx((ranks == 1).mean(), abs=1e-9)


def test_a_vector_alone_is_the_vector_in_any_batch(trained: tuple[JobConfig, ModelVersion]) -> None:
    job, version = trained
    engine = engine_of(job, version)
    together = ask(engine, {"inputs": list(TEXTS)})
    turned = ask(engine, {"inputs": list(TEXTS)[::-1]})
    for number, text in enumerate(TEXTS):
        alone = ask(engine, {"inputs": text})
        assert len(alone) == 1
        assert together[number] == pytest.approx(alone[0], abs=1e-5)
        assert turned[-1 - number] == pytest.approx(alone[0], abs=1e-5)


def test_a_served_model_has_no_pooler_and_computes_every_position(trained: tuple[JobConfig, ModelVersion]) -> None:
    job, version = trained
    model, _ = load_trained(folder_of(job, version), TASK)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    assert not any(module._forward_pre_hooks for module in model.modules())


def batch_of(
    rows: Sequence[Mapping[str, str]], tokenizer: Any, longest: int = LENGTH
) -> tuple[dict[str, Any], torch.Tensor, Tokens]:
    """The inputs and targets of pairs in one forward pass."""
    columns = {"text": [row["said"] for row in rows], "text_pair": [row["meant"] for row in rows]}
    tokens = tokens_of([TASK.encode(columns, tokenizer, DataConfig(source="-", max_length=longest))])
    numbers = np.arange(len(rows))
    inputs, targets = Unfold(0)(padded(tokens, numbers, 0), targets_of(tokens, numbers), numbers, 0)
    return {name: torch.from_numpy(ids) for name, ids in inputs.items()}, torch.from_numpy(targets), tokens


def test_a_pair_is_unfolded_into_what_each_text_is_alone(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    rows = [{"said": text, "meant": other} for text, other in zip(TEXTS, TEXTS[::-1], strict=True)]
    inputs, targets, tokens = batch_of(rows, tokenizer)
    expected = tokenizer(
        [*TEXTS, *TEXTS[::-1]],
        truncation=True,
        max_length=LENGTH,
        padding=True,
        return_tensors="pt",
        padding_side="right",
    )
    assert set(inputs) == set(expected)
    for name, ids in inputs.items():
        assert torch.equal(ids, expected[name]), name
    lengths = expected["attention_mask"].sum(1)
    assert targets[:, :2].T.flatten().tolist() == lengths.tolist()
    assert tokens.cut == 2
    assert TASK.weights(tokens, pair_job(tmp_path)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("longest", [4, 5, 8, 12, 40])
def test_texts_are_cut_where_the_tokenizer_cuts_them(side: str, longest: int) -> None:
    cutting, other = tiny_tokenizer(), tiny_tokenizer()
    cutting.truncation_side = side
    data = DataConfig(source="-", max_length=longest)
    expected = cutting(list(TEXTS), truncation=True, max_length=longest)["input_ids"]
    found = TASK.encode({"text": TEXTS}, cutting, data)
    assert list(found.inputs["input_ids"]) == expected
    assert found.cut == sum(len(ids) > longest for ids in other(list(TEXTS))["input_ids"])
    asked = TASK.encode({"text": TEXTS, "truncation_direction": [side] * 3}, other, data)
    assert list(asked.inputs["input_ids"]) == expected


def naive_losses(
    first: np.ndarray, second: np.ndarray, rows: Sequence[Mapping[str, str]], smoothing: float
) -> list[float]:
    """Multiple negatives ranking, pair by pair, in plain Python."""
    found = []
    for i, row in enumerate(rows):
        logits = {}
        for j, other in enumerate(rows):
            if i == j or (row["said"] != other["said"] and row["meant"] != other["meant"]):
                a, b = first[i].tolist(), second[j].tolist()
                length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
                logits[j] = 20 * sum(x * y for x, y in zip(a, b, strict=True)) / length
        whole = math.log(sum(map(math.exp, logits.values())))
        surprise = {j: whole - logit for j, logit in logits.items()}
        found.append((1 - smoothing) * surprise[i] + smoothing * sum(surprise.values()) / len(surprise))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("doubles", [False, True])
def test_the_loss_is_the_published_one_and_equal_texts_are_no_negatives(smoothing: float, doubles: bool) -> None:
    rows = pairs(4, 6)
    if doubles:
        rows += [{"said": rows[0]["said"], "meant": "a song"}, {"said": "a song", "meant": rows[1]["meant"]}]
    inputs, targets, _ = batch_of(rows, tiny_tokenizer())
    torch.manual_seed(0)
    states = torch.randn(*inputs["input_ids"].shape, 16, requires_grad=True)
    outputs = SimpleNamespace(last_hidden_state=states)
    losses = TASK.losses(outputs, targets, smoothing)
    assert losses.dtype == torch.float32
    vectors = pool(states, inputs["attention_mask"].bool(), "mean").detach().double().numpy()
    expected = naive_losses(vectors[: len(rows)], vectors[len(rows) :], rows, smoothing)
    assert losses.tolist() == pytest.approx(expected, abs=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(TASK.losses(outputs, targets, smoothing), losses)
    torch.autograd.backward(losses.sum())
    assert states.grad is not None
    assert states.grad.isfinite().all()
    assert not states.grad[inputs["attention_mask"] == 0].any()


def test_a_pair_alone_has_nothing_to_learn_from() -> None:
    _, targets, _ = batch_of(pairs(4, 1), tiny_tokenizer())
    outputs = SimpleNamespace(last_hidden_state=torch.randn(2, LENGTH, 16))
    assert TASK.losses(outputs, targets, 0.0).tolist() == [0.0]


def test_the_negatives_are_those_of_a_microbatch(tmp_path: Path) -> None:
    job, rows = pair_job(tmp_path), pairs(4, 8)
    whole, halves = (
        batch_of(rows, tiny_tokenizer()),
        [batch_of(part, tiny_tokenizer()) for part in (rows[:4], rows[4:])],
    )
    objective = Objective(job, TASK, whole[2], ())
    model = transformers.AutoModel.from_pretrained(tmp_path / "base").eval()
    total = objective.total(np.arange(8))
    assert total == 8

    def loss(batch: tuple[dict[str, Any], torch.Tensor, Tokens], numbers: np.ndarray) -> float:
        with torch.inference_mode():
            return float(objective.share(numbers, batch[1].numpy(), total, False)(model(**batch[0])))

    parts = [loss(half, numbers) for half, numbers in zip(halves, np.split(np.arange(8), 2), strict=True)]
    # Twice as many to tell apart are a harder task: up to log 2 more.
    assert 0.3 < loss(whole, np.arange(8)) - sum(parts) < 1.5


@pytest.mark.parametrize("architecture", POOLING)
def test_every_weight_gets_a_gradient(architecture: str, tmp_path: Path) -> None:
    ready = prepare(pair_job(tmp_path, architecture))
    model = ready.start.model().train()
    inputs, targets, _ = batch_of(pairs(4, 4), ready.start.tokenizer)
    torch.autograd.backward(TASK.losses(model(**inputs), targets, 0.0).sum())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_a_model_learns_which_texts_belong_together(architecture: str, tmp_path: Path) -> None:
    files = {
        split: str(write_rows(tmp_path / "more" / f"{split}.jsonl", pairs(seed, count)))
        for split, seed, count in (("train", 5, 192), ("validation", 6, 24))
    }
    rates: dict[str, Any] = {"train__learning_rate": 3e-3, "train__adam_epsilon": 1e-8}
    job = pair_job(tmp_path, architecture, data__files=files, train__epochs=3, **rates)
    version = registered(job)
    # By chance: 0.16 and 1 in 24.
    assert version.metrics["mrr"] > 0.9
    assert version.metrics["recall_at_1"] > 0.8
    near, far = ask(
        engine_of(job, version),
        {
            "inputs": {
                "source_sentence": "he found a boat again",
                "sentences": ["the boat is gone now", "the dog was there"],
            }
        },
    )
    assert near > far + 0.2


@pytest.mark.parametrize(
    "changes", [{"freeze": {"layers": 1}}, {"adapter": {"type": "lora"}}, {"train__gradient_accumulation_steps": 3}]
)
def test_a_part_of_the_model_and_parts_of_a_batch_are_trained(changes: dict[str, Any], tmp_path: Path) -> None:
    version = registered(pair_job(tmp_path, **changes))
    assert set(version.metrics) == set(TASK.metrics)


def test_wrong_jobs_are_refused_before_anything_starts(tmp_path: Path) -> None:
    job = pair_job(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^data\.columns\.text_pair: found null; feature-extraction learns from pairs"
    ):
        prepare(job.with_values({"data.columns.text_pair": None}))
    with pytest.raises(
        ConfigError, match=r"^train\.batch_size: found 5; .* at least 8 \(scale\.workers 2 x .* 2 x 2\)"
    ):
        prepare(job.with_values({"train.batch_size": 5, "scale.workers": 2, "train.gradient_accumulation_steps": 2}))
    with pytest.raises(
        ConfigError, match=r"embedding: found it with task text-classification; feature-extraction alone"
    ):
        make_job(tmp_path / "other", embedding__pooling="cls")
    with pytest.raises(ConfigError, match=r"embedding\.pooling: found 'last'"):
        job.with_values({"embedding.pooling": "last"})
    rows: list[dict[str, Any]] = [*pairs(1, 8)]
    rows[4] = rows[4] | {"meant": None}
    broken = job.with_values({"data.files.train": str(write_rows(tmp_path / "broken.jsonl", rows))})
    with pytest.raises(DataError, match=r"broken\.jsonl row 5, column 'meant' holds nothing; needed text"):
        prepare(broken)
    with pytest.raises(
        ModelError, match=r"^model\.base: found an encoder-decoder \(t5\); feature-extraction needs one"
    ):
        sketch(transformers.T5Config(d_model=8, d_ff=8, num_layers=1, num_heads=1), TASK)


def answered(vectors: np.ndarray, inputs: Any, task: Embeddings = TASK, **parameters: Any) -> Any:
    return task.answer(task.parse(inputs, parameters), [Seen([], [vector]) for vector in vectors], (), None)


def test_vectors_are_normalized_and_shortened_as_asked() -> None:
    vectors = np.random.default_rng(3).normal(0, 3, (2, 6)).astype(np.float32)
    raw = Embeddings(EmbeddingConfig(normalize=False))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for found, expected in (
        (answered(vectors, ["a", "b"]), unit),
        (answered(vectors, ["a", "b"], normalize=False), vectors),
        (answered(vectors, ["a", "b"], raw), vectors),
        (answered(vectors, ["a", "b"], raw, normalize=True), unit),
        (answered(vectors, ["a", "b"], normalize=None, dimensions=None, prompt_name=None), unit),
        (answered(vectors, ["a", "b"], normalize=False, dimensions=2, encoding_format="float"), vectors[:, :2]),
    ):
        assert np.array(found) == pytest.approx(expected, abs=1e-6)
    short = np.array(answered(vectors, ["a", "b"], dimensions=2))
    assert np.linalg.norm(short, axis=1) == pytest.approx([1, 1], abs=1e-6)
    assert answered(np.zeros((1, 4), np.float32), "a") == [[0, 0, 0, 0]]
    with pytest.raises(RequestError, match=r"parameters\.dimensions: found 7; this model's vectors have 6"):
        answered(vectors, ["a", "b"], dimensions=7)


def test_options_come_beside_the_inputs_and_a_source_is_the_first_row() -> None:
    body = b'{"inputs": ["a", "b"], "normalize": false, "truncate": true, "truncation_direction": "Left"}'
    asked = huggingface.parse(body, TASK, 8)
    assert asked.rows == [{"text": text, "truncation_direction": "left"} for text in ("a", "b")]
    body = b'{"inputs": {"source_sentence": "a", "sentences": ["b", "c"]}, "parameters": {}}'
    assert [row["text"] for row in huggingface.parse(body, TASK, 3).rows] == ["a", "b", "c"]
    with pytest.raises(RequestError, match="3 rows to compute; this endpoint takes 2"):
        huggingface.parse(body, TASK, 2)
    assert TASK.parse("a", {}).single


def test_a_text_that_may_not_be_cut_is_refused_where_it_is_too_long() -> None:
    data = DataConfig(source="-", max_length=6)
    rows = TASK.parse(["the door", TEXTS[2]], {"truncate": False}).rows
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    with pytest.raises(RequestError, match="found a text of 15 tokens, and truncate false; this model reads 6"):
        TASK.encode(columns, tiny_tokenizer(), data)
    kept = TASK.encode({key: cells[:1] for key, cells in columns.items()}, tiny_tokenizer(), data)
    assert len(kept.inputs["input_ids"][0]) == 4


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ([], {}, "inputs: an empty list; needed a text, a list of texts"),
        (["a", 7], {}, "inputs[1]: found int"),
        (["a", " "], {}, "inputs[1]: found nothing but blanks"),
        (None, {}, "inputs: found NoneType"),
        ([["a"]], {}, "inputs[0]: found list"),
        ({"text": "a"}, {}, "inputs: found keys ['text']"),
        ({"source_sentence": "a", "sentences": "b"}, {}, "inputs.sentences: found 'b'; needed a list of texts"),
        ({"source_sentence": "a", "sentences": []}, {}, "inputs.sentences: found []"),
        ({"source_sentence": 7, "sentences": ["b"]}, {}, "inputs.source_sentence: found int"),
        ({"source_sentence": "a", "sentences": ["b", ""]}, {}, "inputs.sentences[1]: found nothing but blanks"),
        ({"source_sentence": "a", "sentences": ["b"]}, {"normalize": True}, "parameters: unknown ['normalize']"),
        ("a", {"compared": True}, "parameters: unknown ['compared']"),
        ("a", {"normalize": "yes"}, "parameters.normalize: found 'yes'; needed true or false"),
        ("a", {"truncate": 1}, "parameters.truncate: found 1; needed true or false"),
        ("a", {"truncation_direction": "up"}, "parameters.truncation_direction: found 'up'; needed left or right"),
        ("a", {"prompt_name": "query"}, "parameters.prompt_name: found 'query'; this model has no prompts"),
        (
            "a",
            {"encoding_format": "base64"},
            "parameters.encoding_format: found 'base64'; vectors are answered as float",
        ),
        ("a", {"dimensions": 0}, "parameters.dimensions: found 0; needed a whole number >= 1"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_computed(inputs: Any, parameters: Any, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        TASK.parse(inputs, parameters)
    assert str(caught.value).startswith(words)
    assert caught.value.status == 422


def test_the_task_is_found_by_its_name_and_settled_by_a_job(tmp_path: Path) -> None:
    assert isinstance(task_for(TASK.name), Embeddings)
    vectors = np.full((1, 4), 2, np.float32)
    settled = TASK.settled(pair_job(tmp_path, embedding__normalize=False))
    assert answered(vectors, "a", settled) == [[2, 2, 2, 2]]
    assert isinstance(settled.parse("a", {}), Ask)
