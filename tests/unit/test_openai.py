"""OpenAI's API: the answers of Hugging Face's protocol in its shapes; what is refused, it names as its clients do."""

import base64
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from banjoray.serving.protocols.completions import Before
from engines import near
from replicas import MAX_ROWS, InProcess, encoder, talker

TEXTS = ["i feel so happy today", "the whole evening was a surprise", "sad"]
GREEDY = {"temperature": 0, "max_tokens": 8}
TURNS = [{"role": "system", "content": "count: one"}, {"role": "user", "content": "two and three"}]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    found = InProcess(encoder(tmp_path_factory.mktemp("embedder"), "feature-extraction"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    found = InProcess(talker(tmp_path_factory.mktemp("talker")))
    yield found
    found.close()


def written(chat: InProcess, inputs: Any, **parameters: Any) -> dict[str, Any]:
    """What Hugging Face's protocol answers, with how it came about."""
    (found,) = chat.post("/", {"inputs": inputs, "parameters": {"details": True} | parameters})
    return dict(found)


def events(chat: InProcess, path: str, body: dict[str, Any]) -> list[Any]:
    """The chunks of a stream, which has to end with [DONE]."""
    response = chat.request("POST", path, json=body | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *found, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in found]


def test_the_model_is_listed_and_found_by_its_name(embedder: InProcess) -> None:
    listed = embedder.request("GET", "/v1/models").json()
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert model == {
        "id": "tiny",
        "object": "model",
        "created": 1767323045,
        "owned_by": "banjoray",
        "version": 1,
        "task": "feature-extraction",
    }
    for name in ("tiny", "tiny@1"):
        assert embedder.request("GET", f"/v1/models/{name}").json() == model
    error = embedder.request("GET", "/v1/models/other")
    assert error.status_code == 404
    assert error.json()["error"]["code"] == "model_not_found"
    assert error.json()["error"]["param"] == "model"


def test_embeddings_are_those_of_feature_extraction_as_numbers_and_as_bytes(embedder: InProcess) -> None:
    expected = embedder.post("/", {"inputs": TEXTS})
    told = embedder.post("/v1/embeddings", {"model": "tiny", "input": TEXTS, "user": "me"})
    assert [row["embedding"] for row in told["data"]] == expected
    assert [(row["index"], row["object"]) for row in told["data"]] == [(n, "embedding") for n in range(3)]
    lengths = [len(embedder.engine.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert told["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    coded = embedder.post("/v1/embeddings", {"input": TEXTS, "encoding_format": "base64"})["data"]
    for row, vector in zip(coded, expected, strict=True):
        assert np.frombuffer(base64.b64decode(row["embedding"]), "<f4").tolist() == vector
    short = embedder.post("/v1/embeddings", {"input": TEXTS[0], "dimensions": 4})["data"]
    assert [row["embedding"] for row in short] == embedder.post("/", {"inputs": TEXTS[0], "dimensions": 4})


def test_token_ids_are_the_text_that_they_stand_for(embedder: InProcess) -> None:
    ids = [embedder.engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:2]]
    expected = embedder.post("/v1/embeddings", {"input": TEXTS[:2]})
    assert embedder.post("/v1/embeddings", {"input": ids}) == expected
    assert embedder.post("/v1/embeddings", {"input": ids[0]})["data"] == near(expected["data"][:1])


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}, {"stop": "two"}], ids=str)
def test_a_completion_is_what_text_generation_writes(chat: InProcess, parameters: dict[str, Any]) -> None:
    for prompt in ("one two", "six five four"):
        whole = written(chat, prompt, max_new_tokens=8, **parameters)
        told = chat.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 8} | parameters)
        (choice,) = told["choices"]
        stop = parameters.get("stop")
        assert choice["text"] == (whole["generated_text"].split(stop)[0] if stop else whole["generated_text"])
        assert (choice["index"], choice["logprobs"]) == (0, None)
        assert choice["finish_reason"] == ("length" if whole["details"]["finish_reason"] == "length" else "stop")
        count = whole["details"]["generated_tokens"]
        read = len(prompt.split())
        assert told["usage"] == {"prompt_tokens": read, "completion_tokens": count, "total_tokens": read + count}
        assert (told["object"], told["model"]) == ("text_completion", "tiny")
        assert told["id"].startswith("cmpl-")


def test_prompts_are_completed_together_and_as_token_ids(chat: InProcess) -> None:
    prompts = ["one two", "six"]
    alone = [chat.post("/v1/completions", {"prompt": prompt} | GREEDY)["choices"][0]["text"] for prompt in prompts]
    together = chat.post("/v1/completions", {"prompt": prompts} | GREEDY)["choices"]
    assert [(choice["index"], choice["text"]) for choice in together] == list(enumerate(alone))
    ids = chat.engine.tokenizer(prompts[0])["input_ids"]
    assert chat.post("/v1/completions", {"prompt": ids} | GREEDY)["choices"][0]["text"] == alone[0]


def test_a_stop_ends_the_text_before_it_whole_and_streamed(chat: InProcess) -> None:
    words = written(chat, "one two", do_sample=False, max_new_tokens=8)["generated_text"].split()
    stop = words[2]
    expected = " ".join(words).split(stop)[0]
    told = chat.post("/v1/completions", {"prompt": "one two", "stop": [stop, "never"]} | GREEDY)["choices"][0]
    assert (told["text"], told["finish_reason"]) == (expected, "stop")
    chunks = events(chat, "/v1/completions", {"prompt": "one two", "stop": [stop, "never"]} | GREEDY)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


def test_a_stream_says_what_the_whole_completion_says(chat: InProcess) -> None:
    body = {"prompt": "one two", "max_tokens": 6, "temperature": 1.3, "seed": 3}
    whole = chat.post("/v1/completions", body)
    *chunks, usage = events(chat, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_conversation_is_read_as_the_chat_template_writes_it(chat: InProcess) -> None:
    told = chat.post("/v1/chat/completions", {"model": "tiny", "messages": TURNS, "max_completion_tokens": 8})
    (choice,) = told["choices"]
    whole = written(chat, {"messages": TURNS}, max_new_tokens=8)
    prompt = "system count: one . user two and three . assistant"
    assert whole == written(chat, prompt, max_new_tokens=8)
    assert choice["message"] == {"role": "assistant", "content": whole["generated_text"]}
    assert told["usage"]["prompt_tokens"] == len(prompt.split())
    assert (told["object"], told["id"][:9]) == ("chat.completion", "chatcmpl-")
    parts = [{"type": "text", "text": "two "}, {"type": "text", "text": "and three"}]
    other = [{"role": "developer", "content": "count: one"}, {"role": "user", "name": "me", "content": parts}]
    same = chat.post("/v1/chat/completions", {"messages": other, "max_tokens": 8})
    assert same["choices"] == told["choices"]


def test_a_streamed_turn_says_what_the_whole_one_says(chat: InProcess) -> None:
    body = {"messages": TURNS} | GREEDY
    whole = chat.post("/v1/chat/completions", body)["choices"][0]
    first, *chunks = events(chat, "/v1/chat/completions", body)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_a_stream_that_breaks_off_ends_with_an_error_and_without_done(
    chat: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: Any) -> Any:
        async def pieces() -> Any:
            yield {"token": {"text": "one", "special": False}, "details": None}
            raise ValueError("a secret path")

        return pieces()

    monkeypatch.setattr(chat.served, "stream", broken)
    told = chat.request("POST", "/v1/completions", json={"prompt": "one", "stream": True}).text
    first, last, end = told.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == "one"
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert (end, "secret" in told) == ("", False)


def test_text_before_a_stop_is_the_same_in_any_pieces_of_what_ends_with_it() -> None:
    draws = random.Random(1)
    stopped = 0
    for _ in range(400):
        stops = ["".join(draws.choice("ab") for _ in range(draws.randint(1, 4))) for _ in range(draws.randint(0, 3))]
        said, pieces, told = Before(stops), "", ""
        # Nothing is written after the piece that completes a stop.
        while len(pieces) < 12 and not any(stop in pieces for stop in stops):
            piece = "".join(draws.choice("ab") for _ in range(draws.randint(1, 3)))
            pieces += piece
            told += said.more(piece)
            assert pieces.startswith(told)
        expected = min((pieces.split(stop)[0] for stop in stops), key=len, default=pieces)
        stopped += expected != pieces
        assert told + said.rest() == expected
        whole = Before(stops)
        assert whole.more(pieces) + whole.rest() == expected
    assert 100 < stopped < 400


ABOUT_EMBEDDINGS = [
    ({"input": "a", "model": "gpt-4"}, 404, "model", "this endpoint serves 'tiny'"),
    ({}, 400, "input", "found None"),
    ({"input": []}, 400, "input", "found []"),
    ({"input": ""}, 400, "input", "nothing but blanks"),
    ({"input": ["a", " "]}, 400, "input", "input[1]: found nothing but blanks"),
    ({"input": {"source_sentence": "a", "sentences": ["b"]}}, 400, "input", "needed a text"),
    ({"input": ["a", 5]}, 400, "input", "input[1]: found 5"),
    ({"input": [1, True]}, 400, "input", "input[0]: found 1"),
    ({"input": [10**9]}, 400, "input", "token ids from 0 to"),
    ({"input": [-1]}, 400, "input", "token ids from 0 to"),
    ({"input": [[]]}, 400, "input", "input[0]: found []"),
    ({"input": ["a"] * (MAX_ROWS + 1)}, 413, "input", "9 rows; this endpoint takes 8"),
    ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "needed float or base64"),
    ({"input": "a", "dimensions": 0}, 400, "dimensions", "found 0"),
    ({"input": "a", "dimensions": 1000}, 400, "dimensions", "vectors have 32"),
    ({"input": "a", "colour": 1}, 400, "colour", "not known here"),
]


@pytest.mark.parametrize(("body", "status", "param", "says"), ABOUT_EMBEDDINGS)
def test_what_is_wrong_with_a_request_for_embeddings_is_named(
    embedder: InProcess, body: Any, status: int, param: str, says: str
) -> None:
    assert_refused(embedder, "/v1/embeddings", body, (status, param, says))


ABOUT_WRITING = [
    ({"prompt": {"messages": TURNS}}, 400, "prompt", "needed a text"),
    ({"prompt": "one", "n": 2}, 400, "n", "n: found 2; it is not supported here"),
    ({"prompt": "one", "logprobs": 0}, 400, "logprobs", "not supported"),
    ({"prompt": "one", "tools": [{}]}, 400, "tools", "not supported"),
    ({"prompt": "one", "presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
    ({"prompt": "one", "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ({"prompt": "one", "max_completion_tokens": 4}, 400, "max_completion_tokens", "not supported"),
    ({"prompt": "one", "max_tokens": 0}, 400, "max_tokens", "max_tokens: found 0"),
    ({"prompt": "one", "temperature": "hot"}, 400, "temperature", "temperature: found 'hot'"),
    ({"prompt": "one", "top_p": 2}, 400, "top_p", "top_p: found 2"),
    ({"prompt": "one", "seed": 0.5}, 400, "seed", "seed: found 0.5"),
    ({"prompt": "one", "stop": ["a"] * 5}, 400, "stop", "found 5 texts"),
    ({"prompt": "one", "stop": [""]}, 400, "stop", "none of them empty"),
    ({"prompt": "one", "stream": "yes"}, 400, "stream", "needed true or false"),
    ({"prompt": ["one", "two"], "stream": True}, 400, "prompt", "2 prompts with stream: true"),
    ({"prompt": "one", "stream": True, "stream_options": [1]}, 400, "stream_options", "include_usage"),
    ({"prompt": "one", "\ud800": 1}, 400, None, "not supported"),
]


@pytest.mark.parametrize(("body", "status", "param", "says"), ABOUT_WRITING)
def test_what_is_wrong_with_a_request_for_a_completion_is_named(
    chat: InProcess, body: Any, status: int, param: str, says: str
) -> None:
    assert_refused(chat, "/v1/completions", body, (status, param, says))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (None, "messages: found NoneType"),
        ([], "messages: found list"),
        (["hello"], "messages[0]: found str; needed role and content"),
        ([{"role": "user"}], "messages[0].content: found NoneType"),
        ([{"role": "tool", "content": "a"}], "messages[0].role: found 'tool'"),
        ([{"role": [], "content": "a"}], "messages[0].role: found []"),
        ([{"role": "user", "content": " "}], "messages[0].content: found nothing but blanks"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]: needed"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls: is not supported"),
        ([{"role": "assistant", "content": "a"}], "messages: this model's chat template refuses these turns"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named(chat: InProcess, messages: Any, says: str) -> None:
    assert_refused(chat, "/v1/chat/completions", {"messages": messages}, (400, "messages", says))


def test_a_model_without_a_template_has_no_chat(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = InProcess(talker(tmp_path_factory.mktemp("plain"), template=None))
    says = "messages: found a conversation; this model has no chat template"
    assert_refused(plain, "/v1/chat/completions", {"messages": TURNS}, (400, "messages", says))
    plain.close()


def test_a_route_that_does_not_fit_says_what_the_model_is_for(embedder: InProcess, chat: InProcess) -> None:
    for asked, path in ((chat, "/v1/embeddings"), (embedder, "/v1/completions"), (embedder, "/v1/chat/completions")):
        body = {"input": "a", "prompt": "a", "messages": TURNS}
        error = asked.request("POST", path, json=body)
        assert error.status_code == 400
        assert f"this model's task is {asked.served.task.name}; {path}" in error.json()["error"]["message"]


def assert_refused(asked: InProcess, path: str, body: Any, expected: tuple[int, str | None, str]) -> None:
    response = asked.request("POST", path, content=json.dumps(body))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == expected[:2], error
    assert expected[2] in error["message"]
    assert list(response.json()) == ["error"]
    assert set(error) == {"message", "type", "param", "code"}
