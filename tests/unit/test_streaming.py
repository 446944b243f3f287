"""Answers token by token: those of the whole answer, as events that a client reads, for as long as somebody reads."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import GenerationError
from huggingface_hub.inference._common import _stream_text_generation_response

from banjoray.errors import RequestError
from banjoray.models.loading import Base, load_tokenizer
from banjoray.serving.batch import answered
from banjoray.serving.batching import Batcher
from banjoray.serving.engine import Engine
from banjoray.serving.protocols import huggingface
from banjoray.serving.streaming import EventStream
from banjoray.tasks.generation import Told, set_generation
from banjoray.tasks.pieces import Events, details, text_of_ids
from banjoray.tasks.settings import Settings
from banjoray.tasks.task import task_for
from engines import ask
from writers import DECODERS, END, bytes_tokenizer, writer, writing_job

PATIENCE_S = 60.0
PARAMETERS: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 6},
    {"temperature": 1.5, "seed": 5},
    {"do_sample": True, "top_k": 5, "seed": 3, "min_new_tokens": 4},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "max_new_tokens": 9},
    {"stop": ["eins", "two", "four"], "min_new_tokens": 6},
    {"return_full_text": True},
    {"truncate": 2},
]


@pytest.fixture(scope="module", params=DECODERS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine around a decoder that was not trained; its random weights are wide, so that texts differ."""
    folder = tmp_path_factory.mktemp(request.param)
    base = writer(folder / "base", request.param, initializer_range=0.3)
    job = writing_job(folder, "text-generation", request.param, data__columns__target=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = load_tokenizer(Base(str(base), "", {}))
    set_generation(model, tokenizer, job)
    version: Any = None
    return Engine(version, task_for("text-generation"), model, tokenizer, job)


def model_of(engine: Engine) -> Any:
    return engine.model


def writing(engine: Engine, inputs: Any, parameters: dict[str, Any]) -> Callable[[Callable[[Any], None]], None]:
    """What the endpoint would run for a streaming request."""
    body = {"inputs": inputs, "stream": True, "parameters": parameters}
    asked = huggingface.parse(json.dumps(body).encode(), engine.task, 10)
    assert asked.stream
    return engine.streamed(asked, engine.encode(asked.rows))


def told(engine: Engine, inputs: Any, parameters: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    writing(engine, inputs, parameters)(found.append)
    return found


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_a_stream_tells_the_tokens_and_the_text_of_the_whole_answer(engine: Engine, parameters: dict[str, Any]) -> None:
    for prompt in ("one two", "three", "six five four two one one"):
        (whole,) = ask(engine, {"inputs": prompt, "parameters": parameters | {"details": True}})
        events = told(engine, prompt, parameters | {"details": True})
        expected = whole["details"]["tokens"]
        assert [event["token"] | {"logprob": 0} for event in events] == [token | {"logprob": 0} for token in expected]
        assert [event["token"]["logprob"] for event in events] == pytest.approx(
            [token["logprob"] for token in expected], abs=1e-5
        )
        assert [event["index"] for event in events] == list(range(1, len(expected) + 1))
        *others, last = events
        assert all(event["generated_text"] is None and event["details"] is None for event in others)
        assert last["generated_text"] == whole["generated_text"]
        pieces = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
        assert whole["generated_text"] == prompt * parameters.get("return_full_text", False) + pieces
        assert last["details"] == {
            "finish_reason": whole["details"]["finish_reason"],
            "generated_tokens": len(expected),
            "input_length": min(len(prompt.split()), parameters.get("truncate", 16)),
            "seed": parameters.get("seed"),
        }


def test_without_details_a_stream_says_nothing_of_how_the_text_came_about(engine: Engine) -> None:
    events = told(engine, "one two", {})
    assert [event["details"] for event in events] == [None] * len(events)
    assert events[-1]["generated_text"] == ask(engine, {"inputs": "one two"})[0]["generated_text"]


def test_seeds_draw_as_they_do_for_whole_answers_and_leave_no_trace(engine: Engine) -> None:
    state = torch.get_rng_state()
    texts = set()
    for seed in range(5):
        parameters = {"temperature": 3.0, "seed": seed, "min_new_tokens": 6}
        text = told(engine, "one two", parameters)[-1]["generated_text"]
        assert ask(engine, {"inputs": "one two", "parameters": parameters}) == [{"generated_text": text}]
        texts.add(text)
    assert len(texts) > 3
    assert torch.equal(torch.get_rng_state(), state)


def test_every_token_is_told_before_the_next_pass_begins(engine: Engine) -> None:
    write = writing(engine, "one two", {"min_new_tokens": 5, "max_new_tokens": 5})
    log: list[str] = []
    hook = model_of(engine).register_forward_hook(lambda *_: log.append("pass"))
    try:
        write(lambda event: log.append("token"))
    finally:
        hook.remove()
    assert log == ["pass", "token"] * 5


def test_a_listener_who_leaves_ends_the_writing_without_another_pass(engine: Engine) -> None:
    class Gone(Exception):
        pass

    passes: list[int] = []
    events: list[Any] = []

    def listen(event: Any) -> None:
        events.append(event)
        if len(events) == 2:
            raise Gone

    write = writing(engine, "one two", {"min_new_tokens": 40, "max_new_tokens": 40})
    model = model_of(engine)
    hooks = len(model._forward_pre_hooks), len(model._forward_hooks)
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(Gone):
            write(listen)
    finally:
        hook.remove()
    assert (len(events), len(passes)) == (2, 2)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == hooks
    whole = ask(engine, {"inputs": "one two"})
    assert told(engine, "one two", {})[-1]["generated_text"] == whole[0]["generated_text"]


def test_beams_are_refused_before_anything_is_written(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=r"parameters.num_beams: found 3 .* needed num_beams: 1") as refused:
        writing(engine, "one", {"num_beams": 3})
    assert refused.value.status == 422
    assert "model_kwargs" not in str(refused.value)
    monkeypatch.setattr(model_of(engine).generation_config, "num_beams", 2)
    with pytest.raises(RequestError, match=r"parameters\.num_beams: found 2"):
        writing(engine, "one", {})
    assert told(engine, "one", {"num_beams": 1})[-1]["generated_text"] is not None


def test_several_prompts_are_refused_and_a_list_of_one_is_not(engine: Engine) -> None:
    with pytest.raises(RequestError, match="inputs: found 2 prompts with stream: true; needed one"):
        writing(engine, ["one", "two"], {})
    assert told(engine, ["one"], {}) == told(engine, "one", {})


def test_rows_of_a_file_get_whole_answers(engine: Engine) -> None:
    assert answered(engine, ["one"], {"stream": True}) == [
        {"error": "stream: found true; the rows of a file get whole answers, leave it out"}
    ]


@pytest.mark.parametrize(
    ("text", "dropped", "ended", "pieces", "whole"),
    [
        ("a€b", 0, True, ["a", "", "", "€", "b", "</s>"], "a€b"),
        ("a😀", 0, False, ["a", "", "", "", "😀"], "a😀"),
        # The last token of a text that was cut off shows that half a letter is there; before an end it is left out.
        ("a😀", 1, False, ["a", "", "", "\ufffd"], "a\ufffd"),
        ("a😀", 1, True, ["a", "", "", "", "</s>"], "a"),
    ],
)
def test_a_letter_of_several_tokens_comes_with_the_last_of_them(
    text: str, dropped: int, ended: bool, pieces: list[str], whole: str
) -> None:
    tokenizer = bytes_tokenizer()
    ids = tokenizer(text).input_ids
    ids = ids[: len(ids) - dropped] + [0] * ended
    events = Events(tokenizer, Settings(), "", 1, detailed=True)
    found = [events.event(Told(number, -0.5, place == len(ids))) for place, number in enumerate(ids, start=1)]
    assert [event["token"]["text"] for event in found] == pieces
    assert found[-1]["generated_text"] == whole == text_of_ids(ids, tokenizer)
    assert "".join(event["token"]["text"] for event in found if not event["token"]["special"]) == whole
    told_at_once = details(ids, [-0.5] * len(ids), Settings(), tokenizer)
    assert told_at_once["tokens"] == [event["token"] for event in found]
    assert told_at_once["finish_reason"] == ("eos_token" if ended else "length")


def lines_of(chunks: list[bytes]) -> Iterator[str]:
    yield from b"".join(chunks).decode().splitlines()


async def pieces_of(found: list[Any], error: Exception | None = None) -> AsyncGenerator[Any, None]:
    for piece in found:
        yield piece
    if error is not None:
        raise error


def sent(pieces: AsyncGenerator[Any, None]) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [chunk async for chunk in huggingface.events(pieces)]

    return asyncio.run(collect())


def test_hugging_faces_client_reads_the_events(engine: Engine) -> None:
    events = told(engine, "one two", {"details": True})
    chunks = sent(pieces_of(events))
    assert all(chunk.startswith(b"data: {") and chunk.endswith(b"}\n\n") for chunk in chunks)
    read: list[Any] = list(_stream_text_generation_response(lines_of(chunks), details=True))
    assert [one.token.id for one in read] == [event["token"]["id"] for event in events]
    assert read[-1].generated_text == events[-1]["generated_text"]
    assert read[-1].details.generated_tokens == len(events)


def test_letters_that_end_lines_for_some_clients_end_no_event() -> None:
    (chunk,) = sent(pieces_of([{"text": "a\u2028b\x85c\nd"}]))
    (line, _) = chunk.decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": "a\u2028b\x85c\nd"}


@pytest.mark.parametrize("broken", [RuntimeError("no memory"), float("nan")], ids=["raised", "no number"])
def test_what_goes_wrong_on_the_way_is_an_event_that_the_client_raises_and_the_log_explains(
    broken: Any, caplog: pytest.LogCaptureFixture
) -> None:
    token = {"id": 1, "text": "a", "logprob": -1.0, "special": False}
    event = {"index": 1, "token": token, "generated_text": None, "details": None}
    wrong = isinstance(broken, float)
    more = [event | {"token": token | {"logprob": broken}}] if wrong else []
    chunks = sent(pieces_of([event, *more], None if wrong else broken))
    assert json.loads(chunks[-1].removeprefix(b"data: "))["error_type"] == "generation"
    read = _stream_text_generation_response(lines_of(chunks), details=False)
    assert next(iter(read)) == "a"
    with pytest.raises(GenerationError, match=r"^the answer broke off; the server's log says why$"):
        next(iter(read))
    assert ("ValueError at " if wrong else "RuntimeError at ") in caplog.text
    # What an error says may hold texts of a request.
    assert "no memory" not in caplog.text


class Client:
    """The ASGI side of a client who reads some events and goes away in one of three ways."""

    def __init__(self, way: str) -> None:
        self._way = way
        self.first = asyncio.Event()
        self.leaves = asyncio.Event()
        self.messages: list[Any] = []

    @property
    def scope(self) -> dict[str, Any]:
        return {"type": "http", "asgi": {"spec_version": "2.3" if self._way == "says so" else "2.4"}}

    async def receive(self) -> dict[str, str]:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.leaves.is_set():
            raise OSError("nobody there")
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.first.set()


@pytest.mark.parametrize("way", ["says so", "can't be sent to", "cancelled"])
def test_a_client_who_goes_away_ends_the_writing_and_the_batcher_goes_on(way: str) -> None:
    passes: list[int] = []
    noticed, ended = threading.Event(), threading.Event()

    def write(tell: Callable[[Any], None]) -> None:
        try:
            for number in range(1000):
                passes.append(number)
                tell({"number": number})
                if number == 0:
                    assert noticed.wait(PATIENCE_S)
        finally:
            ended.set()

    async def scene() -> list[str]:
        batcher: Batcher[str, str] = Batcher(lambda rows: [row.upper() for row in rows], 100)
        client = Client(way)
        response = EventStream(huggingface.events(batcher.stream(write)), {"x-model-version": "m@1"})
        answering = asyncio.create_task(response(client.scope, client.receive, client.send))
        await client.first.wait()
        waiting = asyncio.create_task(batcher.outputs(["after"]))
        client.leaves.set()
        if way == "can't be sent to":
            # Only the next token shows that nobody is there.
            noticed.set()
        elif way == "cancelled":
            answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)
        noticed.set()
        start = client.messages[0]
        assert (b"x-model-version", b"m@1") in start["headers"]
        assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
        return await waiting

    assert asyncio.run(asyncio.wait_for(scene(), PATIENCE_S)) == ["AFTER"]
    assert ended.is_set()
    if way != "can't be sent to":
        # The pass that had begun, as it may, and none after it.
        assert len(passes) <= 2


def test_the_end_token_is_told_as_special(engine: Engine) -> None:
    events = [event for seed in range(12) for event in told(engine, "one", {"temperature": 2.0, "seed": seed})]
    ends = [event["token"] for event in events if event["token"]["id"] == END]
    assert ends
    assert all(token["special"] and token["text"] == "</s>" for token in ends)
