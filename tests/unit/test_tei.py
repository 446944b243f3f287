"""text-embeddings-inference's API: vectors, ranks and labels are those of Hugging Face's protocol."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest

from engines import near
from replicas import LABELS, MAX_ROWS, InProcess, encoder

TEXTS = ["i feel so happy today", "the whole evening was a surprise", "sad"]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    found = InProcess(encoder(tmp_path_factory.mktemp("embedder"), "feature-extraction"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    found = InProcess(encoder(tmp_path_factory.mktemp("classifier"), "text-classification"))
    yield found
    found.close()


def test_embed_gives_vectors_of_length_one_unless_asked_otherwise(embedder: InProcess) -> None:
    for inputs in (TEXTS, TEXTS[0]):
        assert embedder.post("/embed", {"inputs": inputs}) == embedder.post("/", {"inputs": inputs, "normalize": True})
    raw = embedder.post("/embed", {"inputs": TEXTS, "normalize": False, "truncate": True})
    assert raw == embedder.post("/", {"inputs": TEXTS, "normalize": False})
    assert math.hypot(*raw[0]) != pytest.approx(1, abs=1e-2)
    assert math.hypot(*embedder.post("/embed", {"inputs": "sad"})[0]) == pytest.approx(1)


def test_rerank_orders_texts_by_their_cosine_to_the_query(embedder: InProcess) -> None:
    query = "so happy"
    cosines = embedder.post("/", {"inputs": {"source_sentence": query, "sentences": TEXTS}})
    raw = embedder.post("/rerank", {"query": query, "texts": TEXTS, "raw_scores": True, "return_text": True})
    assert [rank["score"] for rank in raw] == sorted(cosines, reverse=True)
    assert [rank["text"] for rank in raw] == [TEXTS[rank["index"]] for rank in raw]
    assert {rank["index"]: rank["score"] for rank in raw} == dict(enumerate(cosines))
    ranks = embedder.post("/rerank", {"query": query, "texts": TEXTS})
    assert [rank["index"] for rank in ranks] == [rank["index"] for rank in raw]
    assert [rank["score"] for rank in ranks] == [(1 + rank["score"]) / 2 for rank in raw]
    assert all(set(rank) == {"index", "score"} for rank in ranks)
    assert len(embedder.post("/rerank", {"query": query, "texts": ["a"] * MAX_ROWS})) == MAX_ROWS


def test_a_regression_on_pairs_ranks_by_its_number(tmp_path_factory: pytest.TempPathFactory) -> None:
    changes = {"classification.problem_type": "regression"}
    ranker = InProcess(encoder(tmp_path_factory.mktemp("ranker"), "text-classification", **changes))
    pairs = ranker.post("/", {"inputs": [{"text": "happy", "text_pair": text} for text in TEXTS]})
    raw = ranker.post("/rerank", {"query": "happy", "texts": TEXTS, "raw_scores": True})
    assert {rank["index"]: rank["score"] for rank in raw} == {n: row[0]["score"] for n, row in enumerate(pairs)}
    assert [rank["score"] for rank in raw] == sorted((row[0]["score"] for row in pairs), reverse=True)
    found = ranker.post("/rerank", {"query": "happy", "texts": TEXTS})
    assert [rank["score"] for rank in found] == near([1 / (1 + math.exp(-rank["score"])) for rank in raw])
    assert ranker.request("GET", "/info").json()["model_type"] == {"reranker": {}}
    ranker.close()


def test_predict_gives_labels_of_one_text_a_pair_or_a_list(classifier: InProcess) -> None:
    whole = classifier.post("/", {"inputs": TEXTS})
    assert classifier.post("/predict", {"inputs": TEXTS[0]}) == near(whole[0])
    assert classifier.post("/predict", {"inputs": [TEXTS[0]]}) == near(whole[0])
    assert classifier.post("/predict", {"inputs": [[text] for text in TEXTS], "truncate": True}) == whole
    pair = classifier.post("/", {"inputs": {"text": "happy", "text_pair": "sad"}})
    assert classifier.post("/predict", {"inputs": ["happy", "sad"]}) == pair[0]
    assert classifier.post("/predict", {"inputs": [["happy", "sad"], ["sad"]]})[0] == near(pair[0])
    logits = classifier.post("/", {"inputs": "sad", "parameters": {"function_to_apply": "none"}})
    assert classifier.post("/predict", {"inputs": "sad", "raw_scores": True}) == logits[0]


def test_info_says_what_answers(embedder: InProcess, classifier: InProcess) -> None:
    told = embedder.request("GET", "/info").json()
    assert (told["model_id"], told["model_type"], told["max_input_length"]) == ("tiny", {"embedding": {}}, 40)
    assert (told["max_client_batch_size"], told["auto_truncate"]) == (MAX_ROWS, True)
    names = classifier.request("GET", "/info").json()["model_type"]["classifier"]
    assert names["id2label"] == {str(n): label for n, label in enumerate(LABELS)}
    assert names["label2id"] == {label: n for n, label in enumerate(LABELS)}


WRONG: list[tuple[str, Any, int, str]] = [
    ("/embed", {}, 422, "the body holds keys []; needed inputs"),
    ("/embed", {"inputs": "a", "colour": 1}, 422, "the body holds keys ['colour', 'inputs']"),
    ("/embed", {"inputs": []}, 422, "inputs: an empty list"),
    ("/embed", {"inputs": ["a", 1]}, 422, "inputs[1]: found int"),
    ("/embed", {"inputs": {"source_sentence": "a", "sentences": ["b"]}}, 422, "inputs: found an object"),
    ("/embed", {"inputs": "a", "normalize": 1}, 422, "normalize: found 1"),
    ("/embed", {"inputs": "joy " * 50, "truncate": False}, 422, "52 tokens, and truncate false"),
    ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, "truncation_direction: found 'up'"),
    ("/embed", {"inputs": ["a"] * (MAX_ROWS + 1)}, 413, "found 9 rows"),
    ("/rerank", {"query": "a"}, 422, "needed query, texts"),
    ("/rerank", {"query": 1, "texts": ["a"]}, 422, "query: found int"),
    ("/rerank", {"query": "a", "texts": "b"}, 422, "texts: found str"),
    ("/rerank", {"query": "a", "texts": []}, 422, "texts: found list"),
    ("/rerank", {"query": "a", "texts": ["b", ""]}, 422, "texts[1]: found nothing but blanks"),
    ("/rerank", {"query": "a", "texts": ["b"] * (MAX_ROWS + 1)}, 413, "texts: found 9; this endpoint takes 8"),
    ("/rerank", {"query": "a", "texts": ["b"], "return_text": "yes"}, 422, "return_text: found 'yes'"),
    ("/predict", {"inputs": "a"}, 400, "this model's task is feature-extraction; /predict is answered by models for"),
]


@pytest.mark.parametrize(("path", "body", "status", "says"), WRONG)
def test_what_is_wrong_with_a_request_is_named(
    embedder: InProcess, path: str, body: Any, status: int, says: str
) -> None:
    assert_refused(embedder, path, body, (status, says))


@pytest.mark.parametrize(
    ("inputs", "more", "status", "says"),
    [
        (["a", "b", "c"], {}, 422, "inputs: found list; needed a text, a pair"),
        ([], {}, 422, "inputs: an empty list"),
        (["a", ["b"]], {}, 422, "inputs: found list; needed"),
        ([["a"], "b"], {}, 422, "inputs: found list; needed"),
        ([["a"], []], {}, 422, "inputs[1]: found list; needed"),
        ([["a"], 5], {}, 422, "inputs[1]: found int; needed"),
        ([["a"], [" "]], {}, 422, "inputs[1].text: found nothing but blanks"),
        ([["a"]] * (MAX_ROWS + 1), {}, 413, "found 9 rows"),
        ("a", {"truncate": False}, 422, "truncate: found false"),
        ("a", {"truncation_direction": "Left"}, 422, "truncation_direction: found 'Left'"),
        ("a", {"raw_scores": 1}, 422, "raw_scores: found 1"),
    ],
)
def test_what_is_wrong_with_a_prediction_is_named(
    classifier: InProcess, inputs: Any, more: dict[str, Any], status: int, says: str
) -> None:
    assert_refused(classifier, "/predict", {"inputs": inputs} | more, (status, says))


def assert_refused(asked: InProcess, path: str, body: Any, expected: tuple[int, str]) -> None:
    response = asked.request("POST", path, content=json.dumps(body))
    assert response.status_code == expected[0], response.text
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == "Validation"
    assert expected[1] in response.json()["error"]
