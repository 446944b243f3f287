"""Conversations as a tokenizer's chat template writes them: their token ids, and which of these the assistant wrote.

The template alone says what stands where, special tokens included; none are added to what it wrote.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from banjoray.config.data import DataConfig
from banjoray.errors import ModelError, RequestError

Turn = Mapping[str, str]
# What a template raises that can't write some turns.
_REFUSED = (jinja2.TemplateError, ValueError, TypeError)
# How a template marks what the assistant writes, where it does; transformers reads it.
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chatting(data: DataConfig, tokenizer: Any) -> bool:
    """Whether a job's rows, and the prompts that its version is asked with, go through the tokenizer's chat template.

    Raises ModelError: they have to, and the tokenizer has none.
    """
    columns, wanted = data.columns, data.chat_template
    if wanted == "never" or (columns.messages is None and columns.target is None):
        return False
    if tokenizer.chat_template:
        return True
    if wanted == "always" or columns.messages is not None:
        key = "data.columns.messages" if columns.messages is not None else "data.chat_template"
        found = columns.messages if columns.messages is not None else "always"
        raise ModelError(
            f"{key}: found {found}; the tokenizer of '{tokenizer.name_or_path}' has no chat template; name a base that "
            "was made for conversations, or put a chat_template.jinja into the base's folder"
        )
    return False


def conversations(rows: Mapping[str, Sequence[Any]]) -> list[list[Turn]]:
    """The turns of every row: its ``messages``; or its ``text`` by the user, and its ``target`` by the assistant."""
    if "messages" in rows:
        return [[{key: turn[key] for key in ("role", "content")} for turn in found] for found in rows["messages"]]
    return [
        [{"role": "user", "content": text}, {"role": "assistant", "content": target}]
        for text, target in zip(rows["text"], rows["target"], strict=True)
    ]


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """What a model reads before it answers: each text as a turn of the user, up to where the assistant's begins."""
    return _ids([_written([{"role": "user", "content": text}], tokenizer, asking=True) for text in texts], tokenizer)


def turns_ids(turns: Sequence[Turn], tokenizer: Any) -> list[int]:
    """What a model reads before it answers the last of some turns of a request.

    Raises RequestError: turns that the template refuses, or a tokenizer without a template.
    """
    if not tokenizer.chat_template:
        raise RequestError("messages: found a conversation; this model has no chat template, ask it with a text")
    try:
        written = _template(turns, tokenizer, asking=True)
    except _REFUSED as error:
        raise RequestError(
            f"messages: this model's chat template refuses these turns ({error}); needed turns in the order that it "
            "takes"
        ) from None
    (ids,) = _ids([written], tokenizer)
    return ids or [tokenizer.pad_token_id]


def conversation_ids(turns: Sequence[Turn], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids of a conversation up to its last assistant turn, and of each whether the assistant wrote it.

    Who wrote what is as the template marks it; or else by what it adds to the turns before and its generation prompt,
    up to the end of the turn. So ids before an answer are those that `prompt_ids` gives for the same turns.
    Raises ModelError: a template that refuses the turns, or writes earlier ones otherwise when others follow.
    """
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    turns = turns[: last + 1]
    whole = _written(turns, tokenizer)
    if _MARKED.search(tokenizer.get_chat_template()):
        return _as_marked(turns, tokenizer)
    borders: list[int] = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before, after = _written(turns[:number], tokenizer, asking=True), _written(turns[: number + 1], tokenizer)
            if not after.startswith(before):
                raise _no_prefix(turns, number, tokenizer, "after another beginning than its generation prompt")
            if not whole.startswith(after):
                raise _no_prefix(turns, number, tokenizer, "otherwise once other turns follow")
            borders += [len(before), len(after)]
    return _parted(whole, borders, tokenizer)


def turn_end(tokenizer: Any) -> list[int]:
    """The token by which the template ends a turn of the assistant; no token where it uses words for that."""
    turns = [{"role": "user", "content": "banjo"}, {"role": "assistant", "content": "banjo"}]
    (ids,) = _ids([_written(turns, tokenizer).rpartition("banjo")[2]], tokenizer)
    return [number for number in ids if number in tokenizer.added_tokens_decoder][:1]


def _as_marked(turns: Sequence[Turn], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """What stands between a template's ``{% generation %}`` marks, and the token that ends a turn behind them."""
    found = tokenizer.apply_chat_template(list(turns), return_dict=True, return_assistant_tokens_mask=True)
    ids, wrote = list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]
    ends = {tokenizer.eos_token_id, *turn_end(tokenizer)}
    for place in range(1, len(ids)):
        wrote[place] |= wrote[place - 1] and ids[place] in ends and ids[place - 1] not in ends
    if not any(wrote[1:]):
        raise _no_prefix(turns, len(turns) - 1, tokenizer, "outside its {% generation %} marks")
    return ids, wrote


def _parted(whole: str, borders: Sequence[int], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids of a text, and of each whether it lies behind an odd number of ``borders``, which are characters.

    No token reaches over a border: where the tokenizer would make one, what follows is cut into tokens by itself.
    """
    known: list[int] = []
    start = 0
    (ids,) = _ids([whole], tokenizer)
    wrote: list[bool] = []
    for number, border in enumerate(borders):
        left = known + _ids([whole[start:border]], tokenizer)[0]
        if ids[: len(left)] != left:
            known, start = left, border
            ids = left + _ids([whole[border:]], tokenizer)[0]
        wrote += [number % 2 == 1] * (len(left) - len(wrote))
    return ids, wrote + [len(borders) % 2 == 1] * (len(ids) - len(wrote))


def _written(turns: Sequence[Turn], tokenizer: Any, asking: bool = False) -> str:
    """What the template makes of some turns; ``asking``: with what stands before an answer."""
    try:
        return _template(turns, tokenizer, asking)
    except _REFUSED as error:
        raise ModelError(
            f"model.base: the chat template of '{tokenizer.name_or_path}' refuses {_told(turns)} ({error}); needed "
            "turns in the order that it takes"
        ) from None


def _template(turns: Sequence[Turn], tokenizer: Any, asking: bool) -> str:
    text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asking)
    return text


def _ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return found


def _no_prefix(turns: Sequence[Turn], number: int, tokenizer: Any, how: str) -> ModelError:
    return ModelError(
        f"model.base: the chat template of '{tokenizer.name_or_path}' writes turn {number + 1} of {_told(turns)} {how}"
        ", so what the assistant wrote can't be told from the rest; needed {% generation %} and {% endgeneration %} "
        "around it in the template, or another template"
    )


def _told(turns: Sequence[Turn]) -> str:
    roles = ", ".join(turn["role"] for turn in turns)
    return f"a conversation of {roles} that begins with {turns[0]['content'][:40]!r}"
