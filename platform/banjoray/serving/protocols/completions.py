"""Written texts in the shapes of OpenAI's completions and chat completions, whole or as a stream of chunks."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse

from banjoray.errors import RequestError
from banjoray.serving.protocols.bodies import asked
from banjoray.serving.served import Served
from banjoray.serving.streaming import BROKEN, EventStream, event, log_broken
from banjoray.tasks.pieces import finish_reason
from banjoray.tasks.settings import Settings
from banjoray.tasks.task import Ask, true_or_false

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """What the two kinds of completions differ in."""

    path: str
    asks: str
    prefix: str
    object: str
    chunk: str


TEXT = Form("/v1/completions", "prompt", "cmpl-", "text_completion", "text_completion")
CHAT = Form("/v1/chat/completions", "messages", "chatcmpl-", "chat.completion", "chat.completion.chunk")

_PARAMETERS = {"parameters.max_new_tokens": "max_tokens", "parameters.num_beams": "stream", "parameters.": ""}
WORDS = {"inputs": "prompt"} | _PARAMETERS
CHAT_WORDS = {"inputs.messages": "messages", "inputs": "messages"} | _PARAMETERS
DOCUMENTED: dict[str, Any] = {
    "max_tokens": {"type": "integer", "minimum": 1, "description": "The version's own where it is not given."},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "description": "The same; chat completions alone."},
    "temperature": {"type": "number", "minimum": 0, "description": "0 takes the likeliest token each time."},
    "top_p": {"type": "number", "maximum": 1},
    "stop": {"description": "A text or up to 4; the answer ends before it."},
    "seed": {"type": "integer"},
    "n": {"type": "integer", "enum": [1]},
    "stream": {"type": "boolean"},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "user": {"type": "string"},
}
# What changes nothing in an answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_READ = ("model", "max_tokens", "temperature", "top_p", "stop", "seed", "stream", "stream_options")
# The one value of what is not supported that asks for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


async def answer(served: Served, body: Mapping[str, Any], form: Form) -> Response:
    """The answer to a request's body; raises RequestError, also for parameters that are not supported, by name."""
    parameters = _parameters(body, form)
    if form is CHAT:
        inputs: Any = {"messages": _messages(body.get("messages"))}
    else:
        inputs = texts_of(body.get("prompt"), served, "prompt")
    ask = asked(inputs, parameters, served.task, served.limits.max_rows)
    told = {"id": f"{form.prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": served.version.model}
    if ask.stream:
        options = body.get("stream_options") or {}
        if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
            raise RequestError(f"stream_options: found {options!r:.100}; needed an object with include_usage")
        usage = true_or_false(options, "include_usage", False)
        return EventStream(_chunks(await served.stream(ask), ask, form, told, usage), served.headers)
    found = await served.answer(ask)
    texts = [row["generated_text"] for row in found.body]
    choices = []
    written = [(output[0] if output.ndim == 2 else output).astype(np.int64).tolist() for output in found.outputs]
    for number, (text, ids, row) in enumerate(zip(texts, written, ask.rows, strict=True)):
        reason = _reason(finish_reason(ids, row["settings"], served.tokenizer))
        said = Before(row["settings"].stop)
        text = said.more(text) + said.rest()
        what: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if form is CHAT else {"text": text}
        choices.append({"index": number} | what | {"logprobs": None, "finish_reason": reason})
    told |= {"object": form.object, "choices": choices, "usage": _usage(found.tokens_read, sum(map(len, written)))}
    return JSONResponse(told, headers=served.headers)


def texts_of(found: Any, served: Served, where: str) -> str | list[str]:
    """A text or texts of a request; token ids are read as the text that they stand for.

    Raises RequestError: another shape, ids that are not the tokenizer's, too many texts.
    """
    if isinstance(found, str):
        return found
    if not isinstance(found, list) or not found:
        raise RequestError(f"{where}: found {found!r:.100}; needed a text, a list of texts, or token ids")
    if all(_whole(number) for number in found):
        return _text(found, served, where)
    if len(found) > served.limits.max_rows:
        limit = served.limits.max_rows
        raise RequestError(f"{where}: found {len(found)} rows; this endpoint takes {limit} in one request", 413)
    rows = enumerate(found)
    return [row if isinstance(row, str) else _text(row, served, f"{where}[{place}]") for place, row in rows]


class Before:
    """The text before the first of some stops; piece by piece, what may begin one is held back until it is known.

    Nothing is written after the piece that completes one, so pieces or not, it is the same.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self._ended = False

    def more(self, piece: str) -> str:
        """What can be told once ``piece`` is there."""
        if self._ended:
            return ""
        self._held += piece
        ends = [place for place in map(self._held.find, self._stops) if place >= 0]
        if ends:
            self._ended = True
            return self._held[: min(ends)]
        sure = len(self._held) - max((_begun(self._held, stop) for stop in self._stops), default=0)
        told, self._held = self._held[:sure], self._held[sure:]
        return told

    def rest(self) -> str:
        """What was held back, when nothing follows."""
        return "" if self._ended else self._held


def _begun(text: str, stop: str) -> int:
    """How many letters at the end of a text may be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


def _parameters(body: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """A request's parameters in the task's words."""
    known = (*_READ, form.asks, *(("max_completion_tokens",) if form is CHAT else ()))
    for key, value in body.items():
        nothing = any(value == one and type(value) is type(one) for one in _NOTHING.get(key, ()))
        if key not in (*known, *_IGNORED) and value is not None and not nothing:
            raise RequestError(f"{key:.100}: found {value!r:.100}; it is not supported here, leave it out")
    stream = true_or_false(body, "stream", False)
    most = body.get("max_completion_tokens") if form is CHAT else None
    found = {
        "max_new_tokens": body.get("max_tokens") if most is None else most,
        "temperature": body.get("temperature"),
        "top_p": body.get("top_p"),
        "stop": body.get("stop"),
        "seed": body.get("seed"),
        "stream": stream,
        # Of a stream it costs nothing, and says why the text ends.
        "details": stream,
    }
    temperature = found["temperature"]
    if isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0:
        found |= {"temperature": None, "do_sample": False}
    return {key: value for key, value in found.items() if value is not None}


def _messages(found: Any) -> Any:
    """A conversation in the task's words: texts alone, without names; a developer speaks as the system."""
    if not isinstance(found, list) or not found:
        raise RequestError(f"messages: found {type(found).__name__}; needed a list with a turn or more")
    return [_turn(turn, f"messages[{place}]") for place, turn in enumerate(found)]


def _turn(found: Any, where: str) -> Any:
    if not isinstance(found, dict):
        return found
    role = "system" if found.get("role") == "developer" else found.get("role")
    for key, value in found.items():
        if key not in ("role", "content", "name") and value is not None and value != []:
            raise RequestError(f"{where}.{key:.100}: is not supported here; a turn has role and content")
    return {"role": role, "content": _content(found.get("content"), where)}


def _content(found: Any, where: str) -> Any:
    if not isinstance(found, list):
        return found
    for place, part in enumerate(found):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f'{where}.content[{place}]: needed {{"type": "text", "text": ...}}; only texts are read')
    return "".join(part["text"] for part in found)


async def _chunks(
    pieces: AsyncGenerator[Any, None], ask: Ask, form: Form, told: Mapping[str, Any], usage: bool
) -> AsyncGenerator[bytes, None]:
    """The events of a stream; what goes wrong on the way is the last one. Closing it closes ``pieces``."""
    (row,) = ask.rows
    settings: Settings = row["settings"]
    said = Before(settings.stop)
    counted = _usage(0, 0)
    head = {"object": form.chunk} | dict(told) | ({"usage": None} if usage else {})

    def chunk(text: str, reason: str | None = None, first: bool = False) -> bytes:
        if form is CHAT:
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            what: dict[str, Any] = {"delta": delta}
        else:
            what = {"text": text}
        return event(head | {"choices": [{"index": 0} | what | {"logprobs": None, "finish_reason": reason}]})

    async with aclosing(pieces):
        try:
            if form is CHAT:
                yield chunk("", first=True)
            async for piece in pieces:
                token, details = piece["token"], piece["details"]
                text = "" if token["special"] else said.more(token["text"])
                if details is not None:
                    yield chunk(text + said.rest(), _reason(details["finish_reason"]))
                    counted = _usage(details["input_length"], details["generated_tokens"])
                elif text:
                    yield chunk(text)
            if usage:
                yield event(head | {"choices": [], "usage": counted})
            yield DONE
        except Exception as error:  # noqa: BLE001  the boundary to the client, who can be told in no other way
            log_broken(error)
            yield event({"error": {"message": BROKEN, "type": "server_error", "param": None, "code": None}})


def _reason(found: str) -> str:
    return "length" if found == "length" else "stop"


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _whole(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool)


def _text(ids: Any, served: Served, where: str) -> str:
    known = len(served.tokenizer)
    if not isinstance(ids, list) or not ids or not all(_whole(number) and 0 <= number < known for number in ids):
        raise RequestError(f"{where}: found {ids!r:.100}; needed a text, or token ids from 0 to {known - 1}")
    text: str = served.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text
