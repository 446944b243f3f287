"""What is told of written tokens, in the words of text-generation-inference: all at once, or one after the other."""

from collections.abc import Sequence
from typing import Any

from banjoray.tasks.generation import Told
from banjoray.tasks.settings import Settings


def text_of_ids(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of written tokens, without special ones; half a letter before the token that ended it is left out."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if ids[-1] in special_ids(tokenizer) else text


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that are no text: those with a name, and those that were added as such (Llama's <|eot_id|>)."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def details(ids: Sequence[int], logprobs: Sequence[float], settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """How a text came about, token by token."""
    pieces = Pieces(tokenizer)
    pairs = enumerate(zip(ids, logprobs, strict=True), start=1)
    tokens = [pieces.token(Told(number, logprob, place == len(ids))) for place, (number, logprob) in pairs]
    return {
        "finish_reason": finish_reason(ids, settings, tokenizer),
        "generated_tokens": len(ids),
        "seed": settings.seed,
        "prefill": [],
        "tokens": tokens,
    }


def finish_reason(ids: Sequence[int], settings: Settings, tokenizer: Any) -> str:
    """Why nothing follows."""
    whole = tokenizer.decode(ids)
    if any(text in whole for text in settings.stop):
        return "stop_sequence"
    return "eos_token" if ids[-1] in special_ids(tokenizer) else "length"


class Pieces:
    """Tells tokens one by one; the texts of those that are not special give the whole text one after the other.

    A letter that several tokens make up stands with the last of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        self._ids: list[int] = []
        self._told = 0

    def token(self, told: Told) -> dict[str, Any]:
        """The next token. If it is the last, half a letter is told as it is."""
        special = told.number in self._special
        text = self._text(told.number, special, told.last)
        return {"id": told.number, "text": text, "logprob": told.logprob, "special": special}

    def _text(self, number: int, special: bool, last: bool) -> str:
        self._ids.append(number)
        if special:
            return str(self._tokenizer.convert_ids_to_tokens(number))
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        sure = whole if last else whole.rstrip("\ufffd")
        piece: str = sure[self._told :]
        self._told = len(sure)
        return piece


class Events:
    """What a stream says of every token of an answer, as soon as it is written; the last has the whole text too.

    ``prompt`` is put before that text; ``read`` is how many tokens the model was given. Without ``detailed`` nothing is
    said of how the text came about.
    """

    def __init__(self, tokenizer: Any, settings: Settings, prompt: str, read: int, detailed: bool) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._prompt, self._read, self._detailed = prompt, read, detailed
        self._pieces = Pieces(tokenizer)
        self._ids: list[int] = []

    def event(self, told: Told) -> dict[str, Any]:
        """What is said of the next token."""
        self._ids.append(told.number)
        token = self._pieces.token(told)
        event = {"index": len(self._ids), "token": token, "generated_text": None, "details": None}
        if told.last:
            event["generated_text"] = self._prompt + text_of_ids(self._ids, self._tokenizer)
        if told.last and self._detailed:
            event["details"] = {
                "finish_reason": finish_reason(self._ids, self._settings, self._tokenizer),
                "generated_tokens": len(self._ids),
                "input_length": self._read,
                "seed": self._settings.seed,
            }
        return event
