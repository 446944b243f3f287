"""Questions with contexts as features: a context that is too long is cut into windows that overlap.

Every window has the whole question, so each can be answered alone. They are those of the tokenizer's own
``truncation="only_second"`` with a stride. They are cut here since a tokenizer keeps such settings in itself: two
requests with different ones, at the same time, would get each other's.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.data.tokens import IGNORED, Features
from banjoray.errors import ConfigError, RequestError

# What `starts` says of a token that is no part of an answer, and of the one that stands for "no answer" (BERT's [CLS]).
NO_PART, NO_ANSWER = -1, -2
# What a request may set for its rows, as columns beside question and context.
LENGTH, STRIDE, QUESTION = "max_seq_len", "doc_stride", "max_question_len"


@dataclass(frozen=True)
class _Room:
    """Tokens: of a window, that two neighbours share, and of a question at most; ``cuts``: a longer one is cut."""

    length: int
    shared: int
    question: int
    cuts: bool


@dataclass(frozen=True)
class _Pair:
    """A question with its whole context, token by token: model inputs, and where in the context each stands.

    ``before``, ``context`` and ``after`` are token numbers: of how a window begins, of what is cut into windows, and of
    how a window ends; ``question`` those of the question, all of them in ``before``.
    """

    inputs: Mapping[str, np.ndarray]
    starts: np.ndarray
    ends: np.ndarray
    question: np.ndarray
    before: np.ndarray
    context: np.ndarray
    after: np.ndarray


def context_windows(rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
    """The windows of every row, in order.

    ``rows`` has question and context; answers, of which the first is to be found; and what a request may set, the same
    for all its rows. ``aside`` is ``starts`` and ``ends``: characters of the context that a token covers, without
    blanks around them; NO_PART and NO_ANSWER elsewhere. With answers, ``targets`` are (first token, last token, tokens
    of the window): the token for "no answer" twice where a window does not hold all of it, IGNORED twice where the
    tokenizer drops it. ``cut`` counts questions that were too long. Raises ConfigError or RequestError: no room.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.base: {type(tokenizer).__name__} can't say where in a text its tokens stand; question-answering "
            "needs a model with a fast tokenizer (tokenizer.json)"
        )
    encoded = tokenizer(
        rows["question"], rows["context"], truncation=False, return_offsets_mapping=True, return_attention_mask=False
    )
    known = "answers" in rows
    windows: list[tuple[_Pair, np.ndarray]] = []
    numbers: list[int] = []
    targets: list[list[int]] = []
    cut = 0
    for number, context in enumerate(rows["context"]):
        whole = _pair(encoded, number, context, tokenizer.cls_token_id)
        room = _room(rows, data, len(whole.before) - len(whole.question) + len(whole.after))
        pair = _fitted(whole, room, rows["question"][number])
        cut += pair is not whole
        found = list(_windows(pair, room))
        windows += [(pair, tokens) for tokens in found]
        numbers += [number] * len(found)
        if known:
            answer = _answer(pair, rows["answers"][number])
            targets += [_target(pair, tokens, answer) for tokens in found]
    return Features(
        inputs={name: [pair.inputs[name][tokens] for pair, tokens in windows] for name in _inputs(encoded)},
        rows=numbers,
        aside={name: [getattr(pair, name)[tokens] for pair, tokens in windows] for name in ("starts", "ends")},
        targets=targets if known else None,
        cut=cut,
    )


def _inputs(encoded: Mapping[str, Any]) -> list[str]:
    return [name for name in ("input_ids", "token_type_ids") if name in encoded]


def _pair(encoded: Any, number: int, context: str, no_answer_id: int | None) -> _Pair:
    """One row of a tokenizer's result."""
    part = np.array([NO_PART if part is None else part for part in encoded.sequence_ids(number)])
    inputs = {name: np.asarray(encoded[name][number]) for name in _inputs(encoded)}
    starts, ends = np.full((2, len(part)), NO_PART)
    inside = np.flatnonzero(part == 1)
    offsets = encoded["offset_mapping"][number]
    for token in inside.tolist():
        start, end = _without_blanks(context, *offsets[token])
        if start < end:
            starts[token], ends[token] = start, end
    # A tokenizer that marks no beginning (GPT-2's): its first token stands for "no answer".
    ids = inputs["input_ids"].tolist()
    starts[ids.index(no_answer_id) if no_answer_id in ids else 0] = NO_ANSWER
    first, last = (inside[0], inside[-1] + 1) if len(inside) else (len(part), len(part))
    before, after = np.arange(first), np.arange(last, len(part))
    return _Pair(inputs, starts, ends, np.flatnonzero(part == 0), before, inside, after)


def _without_blanks(text: str, start: int, end: int) -> tuple[int, int]:
    """The same piece of a text without the blanks that some tokenizers count to a word."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def _room(rows: Mapping[str, Sequence[Any]], data: DataConfig, fixed: int) -> _Room:
    """How rows are cut; ``fixed`` counts the tokens of a window that are neither question nor context.

    A question may have half of what is left of a window.
    """
    length, stride, question = (rows[key][0] if key in rows else None for key in (LENGTH, STRIDE, QUESTION))
    if length is not None and length > data.max_length:
        raise RequestError(
            f"parameters.{LENGTH}: found {length}; this model was trained on windows of {data.max_length} tokens, "
            "so needed no more"
        )
    size = length or data.max_length
    most = (size - fixed) // 2
    least = size - fixed - most
    # A request for small windows need not know the job's stride.
    shared = stride if stride is not None else min(data.stride, least // 2) if length else data.stride
    if most < 1 or shared >= least:
        told = f"windows of {size} tokens have {least} for the context beside a long question"
        if length is not None or stride is not None:
            raise RequestError(
                f"parameters: {LENGTH} {size} with {STRIDE} {shared}; {told}, and need more than they share"
            )
        raise ConfigError(f"data.stride: found {shared}; with data.max_length {size} {told}, so needed less")
    return _Room(
        size, shared, most if question is None else min(most, question), question is not None or "answers" in rows
    )


def _fitted(pair: _Pair, room: _Room, question: str) -> _Pair:
    """The pair with a question that leaves room for the context; the same object where it did already."""
    if len(pair.question) <= room.question:
        return pair
    if not room.cuts:
        raise RequestError(
            f"inputs: a question of {len(pair.question)} tokens ({question[:40]!r}...); there is room for "
            f"{room.question}. With parameters.{QUESTION} it is cut."
        )
    dropped = pair.question[room.question :]
    return replace(pair, question=pair.question[: room.question], before=np.setdiff1d(pair.before, dropped))


def _windows(pair: _Pair, room: _Room) -> Iterator[np.ndarray]:
    """The token numbers of every window; the last one ends where the context does."""
    size = room.length - len(pair.before) - len(pair.after)
    for start in range(0, max(1, len(pair.context)), size - room.shared):
        yield np.concatenate([pair.before, pair.context[start : start + size], pair.after])
        if start + size >= len(pair.context):
            return


def _answer(pair: _Pair, answers: Any) -> tuple[int, int] | None:
    """First and last token of the first answer; None where there is none, IGNORED where no token shows it."""
    if not answers or not answers["text"]:
        return None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    touched = np.flatnonzero((pair.starts >= 0) & (pair.starts < end) & (pair.ends > start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else (IGNORED, IGNORED)


def _target(pair: _Pair, tokens: np.ndarray, answer: tuple[int, int] | None) -> list[int]:
    """What is to be found in a window: (first, last, how many tokens it has)."""
    if answer == (IGNORED, IGNORED):
        return [IGNORED, IGNORED, len(tokens)]
    if answer is not None:
        first, last = (np.flatnonzero(tokens == token) for token in answer)
        if len(first) and len(last):
            return [int(first[0]), int(last[0]), len(tokens)]
    nothing = int(np.flatnonzero(pair.starts[tokens] == NO_ANSWER)[0])
    return [nothing, nothing, len(tokens)]
