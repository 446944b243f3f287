"""The API of text-embeddings-inference: /embed, /rerank and /predict, with its /info."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from banjoray import __version__
from banjoray.errors import RequestError
from banjoray.serving.protocols.bodies import asked, body_of, check_task, documented, in_words, json_object, refusals
from banjoray.serving.replica import Replica
from banjoray.serving.served import Served
from banjoray.tasks.task import true_or_false

PATHS: tuple[str, ...] = ("/embed", "/rerank", "/predict", "/info")
_ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "string"},
        "error_type": {"enum": ["Validation", "Overloaded", "Backend"]},
    },
}
_SWITCH = {"type": "boolean"}
_CUTTING: dict[str, Any] = {"truncate": _SWITCH, "truncation_direction": {"enum": ["Left", "Right"]}}
_TEXTS = {"description": "A text, or a list of texts.", "example": "what a lovely surprise"}
_EMBED = documented(
    {"inputs": _TEXTS, "normalize": _SWITCH | {"default": True}, "dimensions": {"type": "integer"}} | _CUTTING,
    ["inputs"],
    "A vector per text, as a list of lists.",
    _ERROR,
)
_RERANK = documented(
    {
        "query": {"type": "string"},
        "texts": {"type": "array", "minItems": 1, "items": {"type": "string"}},
        "return_text": _SWITCH,
        "raw_scores": _SWITCH | {"description": "Cosines, or the model's number, instead of scores in 0..1."},
    }
    | _CUTTING,
    ["query", "texts"],
    "{index, score} of every text by falling score.",
    _ERROR,
)
_RERANK_WORDS = {"inputs.source_sentence": "query", "inputs.sentences": "texts", "inputs[": "texts["}
_PREDICT = documented(
    {
        "inputs": {"description": "A text; a pair [text, text]; or a list of [text] and [text, text]."},
        "raw_scores": _SWITCH,
        "truncate": _SWITCH,
    },
    ["inputs"],
    "{label, score} of every label by falling score; of a list, a list of those.",
    _ERROR,
)


def routes(replica: Callable[[], Replica]) -> APIRouter:
    """``/embed``, ``/rerank``, ``/predict`` and ``/info``, where there is one model: no request names one."""
    router = APIRouter(tags=["text-embeddings-inference"])

    @router.post("/embed", summary="Vectors of texts", **_EMBED)
    async def embed(request: Request) -> Response:
        """For feature-extraction models; vectors are one long unless normalize is false."""
        return await _embed(replica().pick(), request)

    @router.post("/rerank", summary="Texts by how well they fit a query", **_RERANK)
    async def rerank(request: Request) -> Response:
        """By the cosine of feature-extraction models, or the number that a regression on pairs gives."""
        with in_words(_RERANK_WORDS):
            return await _rerank(replica().pick(), request)

    @router.post("/predict", summary="Labels of texts", **_PREDICT)
    async def predict(request: Request) -> Response:
        """For text-classification models."""
        return await _predict(replica().pick(), request)

    @router.get("/info", summary="What answers here", responses=refusals(_ERROR))
    async def info() -> Response:
        """The model, and how much of it can be asked at once."""
        found = replica().pick()
        return JSONResponse(_info(found), headers=found.headers)

    return router


def refusal(message: str, status: int) -> JSONResponse:
    """An error as text-embeddings-inference's clients read it."""
    kind = "Overloaded" if status == 429 else "Backend" if status >= 500 else "Validation"
    return JSONResponse({"error": message, "error_type": kind}, status)


async def _embed(served: Served, request: Request) -> Response:
    body = await _read(served, request, ("inputs", "normalize", "dimensions", "prompt_name", *_CUTTING), "inputs")
    check_task(served, ("feature-extraction",), "/embed")
    inputs = body.pop("inputs")
    if isinstance(inputs, dict):
        raise RequestError("inputs: found an object; needed a text, or a list of texts")
    parameters = body | {"normalize": true_or_false(body, "normalize", True)}
    answered = await served.answer(asked(inputs, parameters, served.task, served.limits.max_rows))
    return JSONResponse(answered.body, headers=served.headers)


async def _rerank(served: Served, request: Request) -> Response:
    body = await _read(served, request, ("query", "texts", "return_text", "raw_scores", *_CUTTING), "query", "texts")
    raw, told = true_or_false(body, "raw_scores", False), true_or_false(body, "return_text", False)
    query, texts, task, most = body["query"], body["texts"], served.task, served.limits.max_rows
    if not isinstance(texts, list) or not texts:
        raise RequestError(f"texts: found {type(texts).__name__}; needed a list with a text or more")
    if len(texts) > most:
        raise RequestError(f"texts: found {len(texts)}; this endpoint takes {most} in one request", 413)
    if task.problem_type == "regression":
        _check_cut(body)
        pairs = [{"text": query, "text_pair": text} for text in texts]
        found = await served.answer(asked(pairs, {"function_to_apply": "none" if raw else "sigmoid"}, task, most))
        scores = [row[0]["score"] for row in found.body]
    else:
        check_task(served, ("feature-extraction",), "/rerank")
        cutting = {key: body.get(key) for key in _CUTTING}
        ask = asked({"source_sentence": query, "sentences": texts}, cutting, task, most + 1)
        cosines = (await served.answer(ask)).body
        scores = cosines if raw else [(1 + cosine) / 2 for cosine in cosines]
    order = sorted(range(len(texts)), key=lambda number: -scores[number])
    ranks = [{"index": n, "score": scores[n]} | ({"text": texts[n]} if told else {}) for n in order]
    return JSONResponse(ranks, headers=served.headers)


async def _predict(served: Served, request: Request) -> Response:
    body = await _read(served, request, ("inputs", "raw_scores", *_CUTTING), "inputs")
    check_task(served, ("text-classification",), "/predict")
    _check_cut(body)
    raw, inputs = true_or_false(body, "raw_scores", False), body["inputs"]
    single = not isinstance(inputs, list) or any(isinstance(text, str) for text in inputs)
    rows = [_row(inputs, "inputs")] if single else [_row(row, f"inputs[{n}]") for n, row in enumerate(inputs)]
    parameters = {"function_to_apply": "none"} if raw else {}
    answered = await served.answer(asked(rows, parameters, served.task, served.limits.max_rows))
    told = [[{"label": entry["label"], "score": entry["score"]} for entry in row] for row in answered.body]
    return JSONResponse(told[0] if single else told, headers=served.headers)


def _row(found: Any, where: str) -> Any:
    """A text or pair in the task's words."""
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or len(texts) not in (1, 2) or not all(isinstance(text, str) for text in texts):
        raise RequestError(
            f"{where}: found {type(found).__name__}; needed a text, a pair [text, text], or a list of [text] and "
            "[text, text]"
        )
    return dict(zip(("text", "text_pair"), texts, strict=False))


async def _read(served: Served, request: Request, known: tuple[str, ...], *needed: str) -> dict[str, Any]:
    """The object in the body, its keys checked."""
    body = json_object(await body_of(request, served.limits), " and ".join(f"'{key}'" for key in needed))
    unknown, missing = sorted(set(body) - set(known)), [key for key in needed if key not in body]
    if unknown or missing:
        raise RequestError(f"the body holds keys {sorted(body)!r:.200}; needed {', '.join(needed)}, known are {known}")
    return body


def _check_cut(body: dict[str, Any]) -> None:
    """Refuse what a classifier, which cuts texts as it was trained to, can't be asked."""
    if not true_or_false(body, "truncate", True):
        raise RequestError("truncate: found false; this model cuts texts that are too long, leave it out")
    if body.get("truncation_direction") not in (None, "Right", "right"):
        raise RequestError(f"truncation_direction: found {body['truncation_direction']!r:.100}; needed Right")


def _info(served: Served) -> dict[str, Any]:
    names = dict(enumerate(served.labels))
    kinds: dict[str, Any] = {
        "feature-extraction": {"embedding": {}},
        "text-classification": {"classifier": {"id2label": names, "label2id": {v: k for k, v in names.items()}}},
    }
    kind = {"reranker": {}} if served.task.problem_type == "regression" else kinds.get(served.task.name, {})
    return {
        "model_id": served.version.model,
        "model_sha": served.version.digest,
        "model_pipeline_tag": served.task.name,
        "model_type": kind,
        "max_input_length": served.max_length,
        "max_batch_tokens": served.limits.max_batch_tokens,
        "max_client_batch_size": served.limits.max_rows,
        "auto_truncate": True,
        "version": __version__,
    }
