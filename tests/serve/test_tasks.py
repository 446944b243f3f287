"""Every task over HTTP, asked by Hugging Face's own client: what it reads is what the engine says in this process."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from banjoray.config.job import JobConfig
from banjoray.registry import Registry
from banjoray.serving.app import serving
from banjoray.serving.engine import Engine
from engines import ask, engine_of, near, registered
from factories import make_job
from masked import masked_job
from pairs import nli_job
from problems import problem_job
from questions import base, job_of, rows
from serve.trained import free_port
from tagged import tagging_job
from writers import writing_job

pytestmark = pytest.mark.usefixtures("local_ray")

TEXT = "i was in the dark when you saw my old car"
JOBS: dict[str, Callable[[Path], JobConfig]] = {
    "text-classification": make_job,
    "several-labels": lambda folder: problem_job(folder, "multi_label"),
    "token-classification": tagging_job,
    "question-answering": lambda folder: job_of(folder, base(folder / "base", "bert"), rows(16, 1), rows(8, 2)),
    "fill-mask": masked_job,
    "zero-shot-classification": nli_job,
    "feature-extraction": lambda folder: nli_job(
        folder, task="feature-extraction", train__metric="mrr", registry__gate__metric="mrr"
    ),
    "summarization": lambda folder: writing_job(folder, "summarization", "bart"),
    "translation": lambda folder: writing_job(folder, "translation", "t5"),
    "text-generation": lambda folder: writing_job(folder, "text-generation", "gpt2"),
}


class Served:
    """All tasks behind one address, each at the path of one of two applications, and their engines in this process."""

    def __init__(self, url: str, engines: dict[str, Engine]) -> None:
        self._url, self._engines = url, engines

    def address(self, task: str) -> str:
        return f"{self._url}{path_of(task)}/models/{task}"

    def client(self, task: str) -> InferenceClient:
        return InferenceClient(model=self.address(task))

    def ask(self, task: str, inputs: Any, **parameters: Any) -> Any:
        return ask(self._engines[task], {"inputs": inputs, "parameters": parameters})


def path_of(task: str) -> str:
    """Where the application is that answers for a task: those that write texts are in another one."""
    return "/writers" if task in ("summarization", "translation", "text-generation") else "/readers"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tasks")
    root, engines = str(folder / "registry"), {}
    for task, job_for in JOBS.items():
        values = {"train.epochs": 1, "registry.root": root, "registry.model": task}
        job = job_for(folder / task).with_values(values)
        version = registered(job)
        Registry(root).promote(task, version.version, "production")
        engines[task] = engine_of(job, version)
    applications = [
        {
            "name": path.removeprefix("/"),
            "route_prefix": path,
            "import_path": "banjoray.serving.app:build",
            "args": {
                "models": [f"{task}@production" for task in JOBS if path_of(task) == path],
                "registry": root,
                "engine": "torch",
                "precision": "fp32",
            },
            "deployments": [{"name": "Endpoint", "ray_actor_options": {"num_cpus": 0.1}}],
        }
        for path in ("/readers", "/writers")
    ]
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    with serving(file, free_port(), print) as url:
        yield Served(url, engines)


@pytest.fixture(autouse=True)
def talking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs are offline and say so for the whole process; these clients talk to this machine."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def plain(found: Any) -> Any:
    """What the client made of an answer, as plain values; what it adds and the answer did not have left out."""
    if isinstance(found, list):
        return [plain(one) for one in found]
    told = asdict(found) if is_dataclass(found) and not isinstance(found, type) else found
    return {key: value for key, value in told.items() if value is not None} if isinstance(told, dict) else told


def test_text_classification(served: Served) -> None:
    found = served.client("text-classification").text_classification(TEXT, top_k=3)
    assert plain(found) == near(served.ask("text-classification", TEXT, top_k=3)[0])
    assert len(found) == 3


def test_several_labels_each_with_what_its_threshold_says(served: Served) -> None:
    text = "we saw kitchen door beach boat today"
    found = served.client("several-labels").text_classification(text)
    expected = served.ask("several-labels", text)[0]
    assert plain(found) == near([{"label": entry["label"], "score": entry["score"]} for entry in expected])
    assert [dict(entry) for entry in found] == near(expected)
    assert [entry.predicted for entry in found] == [entry["predicted"] for entry in expected]  # type: ignore[attr-defined]


def test_token_classification(served: Served) -> None:
    text = "Ada Lund meets Bo in New Ulm today ."
    found = served.client("token-classification").token_classification(text, aggregation_strategy="simple")
    expected = served.ask("token-classification", text, aggregation_strategy="simple")
    assert plain(found) == near(expected)


def test_question_answering(served: Served) -> None:
    row = rows(1, 7)[0]
    client = served.client("question-answering")
    inputs = {"question": row["question"], "context": row["context"]}
    found = client.question_answering(**inputs)
    assert plain(found) == near(served.ask("question-answering", inputs))
    assert row["context"][found.start : found.end] == found.answer  # type: ignore[union-attr]
    several = client.question_answering(**inputs, top_k=3)
    assert plain(several) == near(served.ask("question-answering", inputs, top_k=3))


def test_fill_mask(served: Served) -> None:
    text = "i was in the [MASK] when you saw my old car"
    found = served.client("fill-mask").fill_mask(text, top_k=4)
    assert plain(found) == near(served.ask("fill-mask", text, top_k=4))
    assert len(found) == 4


def test_zero_shot_classification(served: Served) -> None:
    labels = ["sea", "home", "school"]
    found = served.client("zero-shot-classification").zero_shot_classification(TEXT, labels, multi_label=True)
    asked = {"candidate_labels": labels, "multi_label": True}
    assert plain(found) == near(served.ask("zero-shot-classification", TEXT, **asked))


def test_feature_extraction(served: Served) -> None:
    client = served.client("feature-extraction")
    found = client.feature_extraction(TEXT, normalize=False)
    assert found.tolist() == near(served.ask("feature-extraction", TEXT, normalize=False))


def test_sentence_similarity(served: Served) -> None:
    others = ["my old car", "we saw the sea again"]
    found = served.client("feature-extraction").sentence_similarity(TEXT, others)
    inputs = {"source_sentence": TEXT, "sentences": others}
    assert found == near(served.ask("feature-extraction", inputs))


def test_summarization(served: Served) -> None:
    found = served.client("summarization").summarization("one two three")
    assert plain(found) == served.ask("summarization", "one two three")[0]


def test_translation(served: Served) -> None:
    found = served.client("translation").translation("one two three")
    assert plain(found) == served.ask("translation", "one two three")[0]


def test_text_generation(served: Served) -> None:
    client = served.client("text-generation")
    found = client.text_generation("one two", max_new_tokens=4)
    expected = served.ask("text-generation", "one two", max_new_tokens=4)
    assert found == expected[0]["generated_text"]
    told = client.text_generation("one two", max_new_tokens=4, details=True)
    assert told.generated_text == found
    assert told.details is not None
    assert told.details.generated_tokens == len(told.details.tokens)


@pytest.mark.parametrize("parameters", [{}, {"temperature": 2.0, "seed": 4}, {"stop": ["zwei"]}])
def test_streamed_text_generation_is_the_whole_answer_piece_by_piece(
    served: Served, parameters: dict[str, Any]
) -> None:
    client = served.client("text-generation")
    asked = {"prompt": "one two", "max_new_tokens": 5, **parameters}
    whole = client.text_generation(**asked, details=True)
    told = list(client.text_generation(**asked, details=True, stream=True))
    assert [plain(event.token) for event in told] == near([plain(token) for token in whole.details.tokens])
    assert [event.index for event in told] == list(range(1, len(told) + 1))
    assert [event.generated_text for event in told] == [None] * (len(told) - 1) + [whole.generated_text]
    assert told[-1].details.finish_reason == whole.details.finish_reason
    assert list(client.text_generation(**asked, stream=True)) == [event.token.text for event in told]


def test_a_stream_says_which_version_answers_and_one_that_is_left_keeps_nobody_waiting(served: Served) -> None:
    body = {"inputs": "one two", "stream": True, "parameters": {"max_new_tokens": 60, "min_new_tokens": 60}}
    with httpx.stream("POST", served.address("text-generation"), json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-model-version"].startswith("text-generation@")
        assert next(response.iter_lines()).startswith("data: {")
    answer = served.client("text-generation").text_generation("one two", max_new_tokens=4)
    assert answer == served.ask("text-generation", "one two", max_new_tokens=4)[0]["generated_text"]


def test_what_cannot_be_streamed_is_refused_before_a_stream_begins(served: Served) -> None:
    address = served.address("text-generation")
    for body, message in (
        ({"inputs": "one", "parameters": {"num_beams": 2}}, "parameters.num_beams: found 2"),
        ({"inputs": ["one", "two"]}, "inputs: found 2 prompts with stream: true"),
    ):
        refused = httpx.post(address, json=body | {"stream": True}, timeout=60)
        assert refused.status_code == 422
        assert message in refused.json()["error"]
    with pytest.raises(HfHubHTTPError, match="422"):
        list(served.client("text-generation").text_generation("one", stream=True, top_n_tokens=3))
