"""Token classification: scores are seqeval's, answers are those of transformers' pipeline, on words and on raw text."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import TokenClassificationOutputElement
from seqeval import metrics as seqeval_metrics

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.splits import Split
from banjoray.data.tags import tagged_splits
from banjoray.data.tokens import IGNORED, Tokens, tokenise
from banjoray.errors import ConfigError, RequestError
from banjoray.registry import ModelVersion
from banjoray.serving.engine import Engine
from banjoray.tasks.entities import STRATEGIES, entity_metrics
from banjoray.tasks.task import Ask, Score, check_metrics, task_for
from banjoray.tasks.token_classification import TokenClassification
from banjoray.training.objective import row_weights
from engines import ask, engine_of, folder_of, registered
from factories import make_job, write_rows
from tagged import KINDS, sentences, tagging_job, tokenizer_of

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = TokenClassification()
TEXTS = (
    "Ada Lund meets Bo in New Ulm today .",
    "Emi isn't with Dag!",
    "  Cleo\tQuist,   in Oslo-Lima\n(Pune) \U0001f600 Faraz",
    "\ufe0f",
    "x",
)


def split_of(folder: Path, rows: Sequence[Mapping[str, Any]], **data: Any) -> tuple[Split, tuple[str, ...]]:
    path = str(write_rows(folder / "rows.jsonl", rows))
    tree = {"name": "t", "task": "token-classification", "data": {"files": {"train": path, "validation": path}, **data}}
    found = tagged_splits(JobConfig.model_validate(tree | {"hub": {"offline": True}}))
    return found.train, found.labels


def encoded(split: Split, architecture: str, max_length: int = 64, stride: int = 8) -> Tokens:
    return tokenise(
        split, TASK, tokenizer_of(architecture), DataConfig(source="-", max_length=max_length, stride=stride)
    )


def targets_of(tokens: Tokens) -> list[list[int]]:
    return [tokens.target(number).tolist() for number in range(len(tokens))]


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "electra"])
def test_wordpiece_targets_are_those_of_words_given_one_by_one(tmp_path: Path, architecture: str) -> None:
    rows = sentences(20)
    split, _ = split_of(tmp_path, rows)
    tokens, tokenizer = encoded(split, architecture), tokenizer_of(architecture)
    for number, (row, tags) in enumerate(zip(rows, split.added["tags"], strict=True)):
        own = tokenizer(row["tokens"], is_split_into_words=True)
        words, seen = own.word_ids(), set[int | None]({None})
        expected = []
        for word in words:
            expected.append(tags[word] if word not in seen else IGNORED)
            seen.add(word)
        assert list(tokens.feature(number).inputs["input_ids"]) == own["input_ids"]
        assert targets_of(tokens)[number] == expected


@pytest.mark.parametrize("architecture", KINDS)
def test_words_are_learned_on_the_tokens_that_their_text_will_have_in_a_request(
    tmp_path: Path, architecture: str
) -> None:
    rows = sentences(20)
    split, _ = split_of(tmp_path, rows)
    tokens, tokenizer = encoded(split, architecture), tokenizer_of(architecture)
    data = DataConfig(source="-", max_length=64)
    asked = TASK.encode({"text": [" ".join(row["tokens"]) for row in rows]}, tokenizer, data).by_row()
    for number, (row, [feature]) in enumerate(zip(rows, asked, strict=True)):
        learned = tokens.feature(number)
        assert list(learned.inputs["input_ids"]) == list(feature.inputs["input_ids"])
        assert (
            sorted(learned.inputs)
            == sorted(feature.inputs)
            == sorted(set(tokenizer.model_input_names) - {"attention_mask"})
        )
        words = np.asarray(learned.aside["word"])
        at = np.flatnonzero(words != -1).tolist()
        assert words[at].tolist() == list(range(len(row["tokens"])))
        text = " ".join(row["tokens"])
        for place, word in zip(at, row["tokens"], strict=True):
            assert word.startswith(text[feature.aside["start"][place] : feature.aside["end"][place]].strip())


@pytest.mark.parametrize("architecture", KINDS)
def test_a_word_without_tokens_shifts_nothing_and_counts_as_outside(tmp_path: Path, architecture: str) -> None:
    words = ["Ada", "\ufe0f", "Bo", "", "\u00a0", "Oslo"]
    row = {"tokens": words, "tags": ["B-A", "B-B", "B-C", "B-D", "B-E", "B-F"]}
    split, labels = split_of(tmp_path, [row, {"tokens": ["x"], "tags": ["O"]}])
    tokens = encoded(split, architecture)
    known = [labels[target] for target in targets_of(tokens)[0] if target != IGNORED]
    gone = {"B-B", "B-D", "B-E"} if KINDS[architecture].startswith("wordpiece") else {"B-D", "B-E"}
    assert [label for label in known if label not in gone] == [tag for tag in row["tags"] if tag not in gone]
    # Certain of every target; the words that are left out were not asked.
    score = TASK.score(certain(tokens, labels), tokens, split, labels)
    lost = 6 - len(known)
    assert score.metrics["accuracy"] == pytest.approx(1 - lost / 7)
    assert score.metrics["recall"] == pytest.approx(1 - lost / 6)
    assert score.metrics["precision"] == 1


def certain(tokens: Tokens, labels: Sequence[str]) -> list[np.ndarray]:
    """Logits that are right at every target."""
    return [30 * np.eye(len(labels), dtype=np.float32)[np.maximum(0, targets)] for targets in targets_of(tokens)]


def test_words_that_share_a_token_go_on_with_what_its_first_is(tmp_path: Path) -> None:
    spans = [{"start": 0, "end": 4, "label": "A"}, {"start": 6, "end": 8, "label": "B"}]
    split, labels = split_of(tmp_path, [{"text": "u.s. Accra", "spans": spans}], columns={"spans": "spans"})
    assert split.added["starts"] == [[0, 1, 2, 3, 5, 6, 8]]
    tokens = SimpleNamespace(offsets=[(0, 4), (4, 10)], words=[0, 1])
    from banjoray.tasks.alignment import first_tokens

    bounds = list(zip(split.added["starts"][0], split.added["ends"][0], strict=True))
    assert first_tokens("u.s. Accra", tokens, bounds) == ([0, 4], [4, 7])  # type: ignore[arg-type]
    asides = {"word": np.array([0, 4]), "until": np.array([4, 7])}
    made = Tokens(
        {"input_ids": np.array([5, 6])},
        np.array([0, 2]),
        np.array([split.added["tags"][0][0], split.added["tags"][0][4]]),
        target_offsets=np.array([0, 2]),
        aside=asides,
    )
    score = TASK.score(certain(made, labels), made, split, labels)
    # u . s . are one entity, as they should be; A(cc)ra was one word for the model, and outside.
    assert score.per_label["A"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1}
    assert score.per_label["B"]["recall"] == 0
    assert score.metrics["accuracy"] == pytest.approx(6 / 7)


def referred(outputs: Sequence[np.ndarray], tokens: Tokens, split: Split, labels: Sequence[str]) -> dict[str, float]:
    """The score by seqeval and torch, of rows of which each word has a token."""
    gold = [[labels[tag] for tag in tags] for tags in split.added["tags"]]
    predicted: list[list[str]] = [[] for _ in gold]
    losses = []
    assert tokens.rows is not None
    for number, targets in enumerate(targets_of(tokens)):
        at = [place for place, target in enumerate(targets) if target != IGNORED]
        predicted[tokens.rows[number]] += [labels[best] for best in outputs[number][at].argmax(1)]
        logits = torch.from_numpy(outputs[number][at]).double()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(targets)[at], reduction="none"))
    report = seqeval_metrics.classification_report(gold, predicted, output_dict=True, zero_division=0)
    return {
        "precision": report["micro avg"]["precision"],
        "recall": report["micro avg"]["recall"],
        "f1": seqeval_metrics.f1_score(gold, predicted),
        "accuracy": seqeval_metrics.accuracy_score(gold, predicted),
        "loss": torch.cat(losses).mean().item(),
    }


@pytest.mark.parametrize("max_length", [64, 8])
@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_what_seqeval_and_torch_compute(tmp_path: Path, seed: int, max_length: int) -> None:
    split, labels = split_of(tmp_path, sentences(30))
    tokens = encoded(split, "bert", max_length, stride=3)
    assert (len(tokens) > len(split)) == (max_length == 8)
    generator = np.random.default_rng(seed)
    right = certain(tokens, labels)
    outputs = [cells / 12 + generator.normal(size=cells.shape).astype(np.float32) for cells in right]
    score = TASK.score(outputs, tokens, split, labels)
    assert tuple(score.metrics) == TASK.metrics
    assert score.metrics == pytest.approx(referred(outputs, tokens, split, labels), abs=1e-9)
    assert 0.1 < score.metrics["f1"] < 0.99
    assert set(score.per_label) == {"PER", "LOC"}
    assert all(type(value) is float for row in (score.metrics, *score.per_label.values()) for value in row.values())


def test_labels_without_marks_count_as_runs_and_bilou_as_the_scheme_that_seqeval_knows() -> None:
    whole, table = entity_metrics([["NOUN", "NOUN", "VERB", "O"]], [["NOUN", "VERB", "VERB", "O"]])
    assert set(table) == {"NOUN", "VERB"}
    assert whole["f1"] == 0
    assert entity_metrics([["U-A", "B-B", "L-B"]], [["U-A", "B-B", "L-B"]])[1]["B"]["support"] == 1
    assert entity_metrics([["U-A", "U-A"]], [["U-A", "O"]])[0]["recall"] == 0.5
    assert entity_metrics([["O"]], [["O"]]) == ({"precision": 0, "recall": 0, "f1": 0}, {})


def test_a_feature_has_the_mean_loss_of_its_words_and_weighs_as_much_as_it_has(tmp_path: Path) -> None:
    split, labels = split_of(tmp_path, sentences(8))
    tokens = encoded(split, "bert", 10, stride=6)
    counts = [sum(target != IGNORED for target in targets) for targets in targets_of(tokens)]
    assert TASK.weights(tokens, make_job(tmp_path)).tolist() == counts
    assert sum(counts) == sum(len(tags) for tags in split.added["tags"])
    targets = torch.tensor([[1, IGNORED, 2, 0], [IGNORED, 3, IGNORED, IGNORED], [IGNORED] * 4])
    logits = torch.randn(3, 4, len(labels), generator=torch.Generator().manual_seed(1), requires_grad=True)
    for smoothing in (0.0, 0.2):
        found = TASK.losses(SimpleNamespace(logits=logits), targets, smoothing)
        own = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)
        assert found[:2].tolist() == pytest.approx([own(logits[row], targets[row]).item() for row in (0, 1)], abs=1e-6)
        assert found[2] == 0
        assert found.dtype == torch.float32
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_a_slow_tokenizer_and_a_stride_that_does_not_move_on_are_refused() -> None:
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(ConfigError, match=r"model.base: its tokenizer, SimpleNamespace, .* needs a fast one"):
        TASK.encode({"text": ["a"]}, slow, DataConfig(source="-"))
    tokenizer = tokenizer_of("bert")
    with pytest.raises(ConfigError, match=r"data.stride: found 14; .* needed less than 14; set data.stride=3"):
        TASK.encode({"text": ["a"]}, tokenizer, DataConfig(source="-", max_length=16, stride=14))
    with pytest.raises(RequestError, match=r"parameters.stride: found 20; a window has 14 tokens"):
        TASK.encode({"text": ["a"], "stride": [20]}, tokenizer, DataConfig(source="-", max_length=16, stride=2))


def test_a_class_weight_and_a_metric_that_the_task_does_not_have_are_refused(tmp_path: Path) -> None:
    job = tagging_job(tmp_path, train__class_weights="balanced")
    assert (job.train.metric, job.registry.gate.metric) == ("f1", "f1")
    split, labels = split_of(tmp_path, sentences(4))
    with pytest.raises(ConfigError, match="rows of token-classification don't have one label"):
        row_weights(job, task_for(job.task), encoded(split, "bert"), labels)
    with pytest.raises(
        ConfigError, match="token-classification has no metric 'f1_macro'; it has precision, recall, f1"
    ):
        check_metrics(tagging_job(tmp_path, train__metric="f1_macro"))


@dataclass(frozen=True)
class Trained:
    job: JobConfig
    version: ModelVersion
    engine: Engine
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """A registered version of a family, trained for an epoch, as we serve it and as plain transformers loads it."""
    known: dict[str, Trained] = {}

    def get(architecture: str) -> Trained:
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        if architecture not in known:
            job = tagging_job(tmp_path_factory.mktemp(architecture), architecture)
            version = registered(job)
            folder = folder_of(job, version)
            model = AutoModelForTokenClassification.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            known[architecture] = Trained(job, version, engine_of(job, version), model, tokenizer)
        return known[architecture]

    return get


def close(found: Any, expected: Any) -> bool:
    """Equal but for 1e-5 in every score."""
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    rest = {key: value for key, value in found.items() if key != "score"}
    return rest == {key: expected[key] for key in rest} and abs(found["score"] - expected["score"]) < 1e-5


def plain(one: Any) -> Any:
    """A pipeline's answer as plain values."""
    if isinstance(one, list):
        return [plain(part) for part in one]
    return {key: value.item() if hasattr(value, "item") else value for key, value in one.items()}


@pytest.mark.parametrize("architecture", KINDS)
def test_the_registered_folder_gives_the_same_entities_in_transformers_own_pipeline(
    trained: Callable[[str], Trained], architecture: str
) -> None:
    from transformers import pipeline

    made = trained(architecture)
    for strategy in STRATEGIES:
        for ignored in ([], ["O"], ["PER", "B-PER"]):
            with warnings.catch_warnings():
                # That a tokenizer without a mark for parts of words is guessed about.
                warnings.simplefilter("ignore", UserWarning)
                own = pipeline(
                    "token-classification", made.model, tokenizer=made.tokenizer, aggregation_strategy=strategy
                )
                expected = [plain(own(text, ignore_labels=ignored)) for text in TEXTS]
            parameters = {"aggregation_strategy": strategy, "ignore_labels": ignored}
            found = ask(made.engine, {"inputs": list(TEXTS), "parameters": parameters})
            assert close(found, expected), (strategy, ignored)
    assert any(found[:3])


@pytest.mark.parametrize("architecture", KINDS)
def test_answers_are_those_of_a_plain_forward_pass(trained: Callable[[str], Trained], architecture: str) -> None:
    made = trained(architecture)
    for text in TEXTS:
        inputs = made.tokenizer(text, return_tensors="pt", return_offsets_mapping=True, return_special_tokens_mask=True)
        offsets, special = inputs.pop("offset_mapping")[0].tolist(), inputs.pop("special_tokens_mask")[0].tolist()
        with torch.inference_mode():
            scores = made.model(**inputs).logits[0].softmax(-1)
        best = scores.max(-1)
        expected = [
            {"entity": made.model.config.id2label[label], "score": score, "start": start, "end": end, "index": index}
            for index, (label, score, (start, end)) in enumerate(
                zip(best.indices.tolist(), best.values.tolist(), offsets, strict=True)
            )
            if not special[index]
        ]
        found = ask(made.engine, {"inputs": text, "parameters": {"ignore_labels": []}})
        assert close([{key: one[key] for key in one if key != "word"} for one in found], expected)


@pytest.mark.parametrize("architecture", KINDS)
def test_an_answer_alone_is_the_answer_in_any_batch(trained: Callable[[str], Trained], architecture: str) -> None:
    made = trained(architecture)
    long = " ".join(" ".join(row["tokens"]) for row in sentences(12))
    texts = [*TEXTS, long]
    parameters: dict[str, Any] = {"ignore_labels": []}
    alone = [ask(made.engine, {"inputs": text, "parameters": parameters}, together=False) for text in texts]
    for order in (range(len(texts)), [5, 0, 3, 1, 4, 2]):
        asked = {"inputs": [texts[number] for number in order], "parameters": parameters}
        assert close(ask(made.engine, asked), [alone[number] for number in order])


@pytest.mark.parametrize("stride", [None, 0, 5, 40])
def test_a_long_text_is_answered_from_the_windows_with_most_context(
    trained: Callable[[str], Trained], stride: int | None
) -> None:
    made = trained("bert")
    text = " ".join(" ".join(row["tokens"]) for row in sentences(14))
    asked = {"inputs": text, "parameters": {"ignore_labels": [], "stride": stride}}
    found = ask(made.engine, asked)
    room, shared = made.job.data.max_length - 2, made.job.data.stride if stride is None else stride
    whole = made.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, words = whole["input_ids"], whole.word_ids()
    best: list[Any] = [None] * len(ids)
    for start in range(0, len(ids) - shared, room - shared):
        end = min(start + room, len(ids))
        with torch.inference_mode():
            scores = made.model(torch.tensor([[2, *ids[start:end], 3]])).logits[0, 1:-1].softmax(-1)
        for at in range(start, end):
            first, last = words.index(words[at]), len(words) - 1 - words[::-1].index(words[at])
            # Worse than in any window that holds the word; among such, by the token itself.
            less = 1000 if first < start or last >= end else 0
            first, last = (at, at) if less else (first, last)
            before = np.inf if start == 0 else first - start
            after = np.inf if end == len(ids) else end - 1 - last
            context = min(before, after) - less
            if best[at] is None or context > best[at][0]:
                best[at] = (context, scores[at - start].max().item())
    assert [one["index"] for one in found] == list(range(1, len(ids) + 1))
    assert [(one["start"], one["end"]) for one in found] == whole["offset_mapping"]
    assert [one["score"] for one in found] == pytest.approx([score for _, score in best], abs=1e-5)


def test_the_score_and_the_answers_read_long_rows_alike(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("roberta")
    rows = [
        {key: [cell for row in sentences(10, seed) for cell in row[key]] for key in ("tokens", "tags")}
        for seed in (1, 2)
    ]
    split, _ = split_of(tmp_path, rows, labels=list(made.engine.labels))
    tokens = tokenise(split, TASK, made.tokenizer, made.job.data)
    outputs = made.engine.forward([tokens.feature(number) for number in range(len(tokens))])
    score = TASK.score(outputs, tokens, split, made.engine.labels)
    gold, predicted = [row["tags"] for row in rows], []
    for row in rows:
        asked = {"inputs": " ".join(row["tokens"]), "parameters": {"ignore_labels": []}}
        at = {one["start"]: one["entity"] for one in reversed(ask(made.engine, asked))}
        starts = np.cumsum([0, *(len(word) + 1 for word in row["tokens"][:-1])])
        predicted.append([at[start] for start in starts.tolist()])
    assert len(tokens) > 6
    assert score.metrics["accuracy"] == pytest.approx(seqeval_metrics.accuracy_score(gold, predicted))
    assert score.metrics["f1"] == pytest.approx(seqeval_metrics.f1_score(gold, predicted))


def test_the_answer_to_one_text_is_a_list_and_to_several_a_list_of_lists(trained: Callable[[str], Trained]) -> None:
    engine = trained("bert").engine
    one = ask(engine, {"inputs": TEXTS[0], "parameters": {"ignore_labels": []}})
    assert {tuple(entry) for entry in one} == {("entity", "score", "index", "word", "start", "end")}
    assert close(ask(engine, {"inputs": [TEXTS[0]], "parameters": {"ignore_labels": []}}), [one])
    parameters = {"aggregation_strategy": "simple", "ignore_labels": []}
    for entry in ask(engine, {"inputs": TEXTS[0], "parameters": parameters}):
        assert tuple(entry) == ("entity_group", "score", "word", "start", "end")
    read = TokenClassificationOutputElement.parse_obj_as_list(one)
    assert [(entry.word, entry.start, entry.end) for entry in read] == [(e["word"], e["start"], e["end"]) for e in one]
    assert ask(engine, {"inputs": "\ufe0f", "parameters": {"ignore_labels": []}}) == []
    assert ask(engine, {"inputs": ["x", "y"], "parameters": {"ignore_labels": list(engine.labels)}}) == [[], []]


def test_inputs_become_rows_and_a_stride_goes_with_them() -> None:
    assert TASK.parse("a", {}) == Ask([{"text": "a"}], {}, single=True)
    assert TASK.parse([" a\n", "b"], {"stride": None}).rows == [{"text": " a\n"}, {"text": "b"}]
    assert TASK.parse(["a", "b"], {"stride": 0}).rows == [{"text": "a", "stride": 0}, {"text": "b", "stride": 0}]
    told = {"aggregation_strategy": None, "ignore_labels": None, "stride": None}
    assert TASK.parse("a", told) == Ask([{"text": "a"}], told, single=True)


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ([], {}, "inputs: an empty list; needed a text, or a list of texts"),
        (None, {}, "inputs: found NoneType; needed text"),
        ({"text": "a"}, {}, "inputs: found dict; needed text"),
        ("  ", {}, "inputs: found nothing but blanks"),
        (["a", 7], {}, "inputs[1]: found int; needed text"),
        (["a", ["b"]], {}, "inputs[1]: found list"),
        (["a", "b\ud83d"], {}, "inputs[1]: found half a character"),
        (
            "a",
            {"aggregation_strategy": "mean"},
            "parameters.aggregation_strategy: found 'mean'; needed one of none, sim",
        ),
        ("a", {"aggregation_strategy": ["max"]}, "parameters.aggregation_strategy: found ['max']"),
        ("a", {"ignore_labels": "O"}, "parameters.ignore_labels: found 'O'; needed a list of labels"),
        ("a", {"ignore_labels": [1]}, "parameters.ignore_labels: found [1]"),
        ("a", {"stride": -1}, "parameters.stride: found -1; needed a whole number >= 0"),
        ("a", {"stride": "4"}, "parameters.stride: found '4'"),
        ("a", {"stride": True}, "parameters.stride: found True"),
        (
            "a",
            {"top_k": 1},
            "parameters: unknown ['top_k']; token-classification has aggregation_strategy, ignore_labe",
        ),
    ],
)
def test_what_can_not_be_asked_is_refused_by_name(inputs: Any, parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError) as caught:
        TASK.parse(inputs, parameters)
    assert str(caught.value).startswith(words)
    assert caught.value.status == 422


def test_a_model_learns_to_find_names_and_says_where_they_are(tmp_path: Path) -> None:
    job = tagging_job(tmp_path, train__epochs=8)
    version = registered(job)
    assert version.metrics["f1"] > 0.9
    assert version.metrics["loss"] < 0.3
    assert version.labels == ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")
    text = "Faraz Okafor visits Emi in Oslo ."
    asked = {"inputs": text, "parameters": {"aggregation_strategy": "first"}}
    found = ask(engine_of(job, version), asked)
    assert [(one["entity_group"], text[one["start"] : one["end"]]) for one in found] == [
        ("PER", "Faraz Okafor"),
        ("PER", "Emi"),
        ("LOC", "Oslo"),
    ]


def test_states_that_are_kept_of_a_frozen_bottom_change_no_score(tmp_path: Path) -> None:
    job = tagging_job(tmp_path, freeze={"layers": 1}, data__max_length=12, data__stride=4)
    metrics = [
        registered(job.with_values({"cache.prefix": kept, "storage": f"{job.storage}-{kept}"})).metrics
        for kept in ("always", "never")
    ]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


def test_texts_with_spans_and_conll_files_are_trained_registered_and_scored_afresh(tmp_path: Path) -> None:
    rows = []
    for row in sentences(40):
        text, spans = "", []
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            if tag.startswith("B-"):
                spans.append({"start": len(text), "end": len(text), "label": tag[2:]})
            text += word
            if tag != "O":
                spans[-1]["end"] = len(text)
            text += " "
        rows.append({"text": text, "named": spans})
    write_rows(tmp_path / "spans.jsonl", rows)
    lines = "\n".join("".join(f"{w} {t}\n" for w, t in zip(*row.values(), strict=True)) for row in sentences(40))
    (tmp_path / "train.conll").write_text(lines, encoding="utf-8")
    changes = {"data.columns.spans": "named", "data.files": {"train": str(tmp_path / "spans.jsonl")}}
    job = tagging_job(tmp_path)
    by_spans = registered(job.with_values(changes))
    by_lines = registered(
        job.with_values({"data.files": {"train": str(tmp_path / "train.conll")}, "storage": f"{job.storage}2"})
    )
    assert by_spans.labels == by_lines.labels
    assert set(by_spans.metrics) == set(TASK.metrics)


def test_a_score_can_be_told(tmp_path: Path) -> None:
    split, labels = split_of(tmp_path, sentences(4))
    tokens = encoded(split, "albert")
    score: Score = TASK.score(certain(tokens, labels), tokens, split, labels)
    assert score.to_json()["metrics"]["f1"] == 1
    assert score.to_json()["per_label"]["PER"]["support"] > 4
