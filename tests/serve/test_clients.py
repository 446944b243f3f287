"""Each protocol by the client that people already have, over a socket of this machine; no Ray."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
import uvicorn
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from replicas import LABELS, InProcess, encoder, talker

TEXTS = ["i feel so happy today", "the whole evening was a surprise", "naïve 😀"]
TURNS: list[Any] = [{"role": "user", "content": "two and three"}]


@contextmanager
def listening(asked: InProcess) -> Iterator[str]:
    """The address of an application that is served from a thread."""
    taken = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(asked.app, log_level="error", lifespan="off", ws="none"))
    # Who connects before it runs waits in the socket's queue.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield f"127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        asked.close()


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Task -> where it is answered."""
    folder: Path = tmp_path_factory.mktemp("clients")
    with ExitStack() as stack:
        engines = {task: encoder(folder / task, task) for task in ("text-classification", "feature-extraction")}
        engines["text-generation"] = talker(folder / "text-generation")
        yield {task: stack.enter_context(listening(InProcess(engine))) for task, engine in engines.items()}


def posted(address: str, inputs: Any, **parameters: Any) -> Any:
    """What Hugging Face's protocol answers."""
    response = httpx.post(f"http://{address}/", json={"inputs": inputs, "parameters": parameters}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def openai_client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0, timeout=60)


def test_openai_lists_models_and_gets_embeddings(addresses: dict[str, str]) -> None:
    address = addresses["feature-extraction"]
    expected = np.array(posted(address, TEXTS))
    with openai_client(address) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "banjoray"
        # The client asks for base64 by itself, and for numbers where it is told to.
        for form in ({}, {"encoding_format": "float"}):
            told = client.embeddings.create(model="tiny", input=TEXTS, **form)  # type: ignore[arg-type]
            assert np.array([row.embedding for row in told.data]) == pytest.approx(expected, abs=1e-6)
        assert told.usage.prompt_tokens == told.usage.total_tokens > len(TEXTS)
        short = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=4).data[0].embedding
        assert len(short) == 4
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="other", input="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="nothing but blanks") as wrong:
            client.embeddings.create(model="tiny", input=[" "])
        assert (wrong.value.param, wrong.value.type) == ("input", "invalid_request_error")


def test_openai_completes_texts_and_conversations_whole_and_streamed(addresses: dict[str, str]) -> None:
    address = addresses["text-generation"]
    (expected,) = posted(address, "one two", max_new_tokens=8)
    with openai_client(address) as client:
        told = client.completions.create(model="tiny", prompt="one two", max_tokens=8)
        assert told.choices[0].text == expected["generated_text"]
        assert told.usage is not None
        assert told.usage.prompt_tokens == 2
        stream = client.completions.create(model="tiny", prompt="one two", max_tokens=8, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected["generated_text"]
        turn = client.chat.completions.create(model="tiny", messages=TURNS, max_completion_tokens=8)
        assert turn.choices[0].finish_reason in ("stop", "length")
        assert turn.choices[0].message.content
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=TURNS,
                max_completion_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == turn.choices[0].message.content
        assert chunks[-1].usage == turn.usage
        with pytest.raises(openai.BadRequestError, match="n: found 2"):
            client.chat.completions.create(model="tiny", messages=TURNS, n=2)


def tensor(name: str, texts: list[str], binary: bool = True) -> Any:
    cells = np.array(texts, dtype=np.object_)
    found = triton.InferInput(name, list(cells.shape), np_to_triton_dtype(cells.dtype))
    found.set_data_from_numpy(cells, binary_data=binary)
    return found


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_infers_labels_and_scores(addresses: dict[str, str], binary: bool) -> None:
    address = addresses["text-classification"]
    expected = posted(address, TEXTS)
    with triton.InferenceServerClient(address, connection_timeout=60, network_timeout=60) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny", "1")
        assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
        assert client.get_model_metadata("tiny")["inputs"][0]["name"] == "text"
        wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("label", "scores")]
        outputs = wanted if not binary else None
        told = client.infer("tiny", [tensor("text", TEXTS, binary)], outputs=outputs, request_id="7")
        assert told.get_response()["id"] == "7"
        assert [_text(cell) for cell in told.as_numpy("label")] == [row[0]["label"] for row in expected]
        scores = [[{e["label"]: e["score"] for e in row}[label] for label in LABELS] for row in expected]
        assert told.as_numpy("scores") == pytest.approx(np.array(scores, np.float32), abs=1e-6)
        with pytest.raises(InferenceServerException, match="this model reads text and text_pair"):
            client.infer("tiny", [tensor("words", TEXTS)])
        assert not client.is_model_ready("other")


def test_tritonclient_gets_vectors(addresses: dict[str, str]) -> None:
    address = addresses["feature-extraction"]
    with triton.InferenceServerClient(address, connection_timeout=60, network_timeout=60) as client:
        vectors = client.infer("tiny", [tensor("text", TEXTS)], model_version="1").as_numpy("embedding")
    assert vectors == pytest.approx(np.array(posted(address, TEXTS), np.float32), abs=1e-6)


def _text(cell: Any) -> str:
    return cell.decode() if isinstance(cell, bytes) else str(cell)


def test_hugging_faces_client_reads_what_text_embeddings_inference_answers(
    addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    import huggingface_hub.constants

    # This client talks to this machine, however offline the rest of the process is.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    address = addresses["feature-extraction"]
    with huggingface_hub.InferenceClient(model=f"http://{address}/embed") as client:
        assert client.feature_extraction(TEXTS[0]).tolist() == np.array(posted(address, TEXTS[0]), np.float32).tolist()
