"""What a request asks of the writing of a text, and which of it can be asked."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from banjoray.config.generation import SAMPLING
from banjoray.errors import RequestError

# More, in one request, would keep a replica from all others for minutes.
MOST_NEW_TOKENS = 4096
LARGEST_SEED = 2**63 - 1
# Parameter -> its kind, the least and the most of it; transformers' names and meanings.
NUMBERS: dict[str, tuple[type, float, float]] = {
    "max_new_tokens": (int, 1, MOST_NEW_TOKENS),
    "min_new_tokens": (int, 0, MOST_NEW_TOKENS),
    "max_length": (int, 2, MOST_NEW_TOKENS + 1),
    "min_length": (int, 0, MOST_NEW_TOKENS + 1),
    "num_beams": (int, 1, 16),
    "length_penalty": (float, -100, 100),
    "no_repeat_ngram_size": (int, 0, 100),
    "repetition_penalty": (float, 1e-3, 100),
    "temperature": (float, 1e-3, 100),
    "top_k": (int, 0, 1_000_000),
    "top_p": (float, 1e-6, 1),
    "seed": (int, 0, LARGEST_SEED),
}
SWITCHES = ("do_sample", "early_stopping")
WRITING = (*NUMBERS, *SWITCHES)


@dataclass(frozen=True)
class Settings:
    """How one text is written, where it is not as the version says.

    ``asked`` are arguments of transformers' ``generate``, sorted by name. With a ``seed``, what is drawn depends on
    it and the text alone. Writing ends after any text of ``stop``. With ``logprobs``, the log-probability of every
    token is wanted too. ``src_lang`` is read by `encode` alone, as are ``whole`` (a text that is too long is refused,
    not cut) and ``truncate`` (only so many last tokens of it are read).
    """

    asked: tuple[tuple[str, Any], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    src_lang: str | None = None
    tgt_lang: str | None = None
    whole: bool = False
    truncate: int | None = None


def read_asked(parameters: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """The arguments of ``generate`` among ``parameters``, checked; those that are null are left out.

    ``known`` are those that the task has. Raises RequestError: of the wrong kind, too small, too large.
    """
    asked: dict[str, Any] = {}
    for name in known:
        value = parameters.get(name)
        if value is None:
            continue
        if name in SWITCHES:
            if not isinstance(value, bool):
                raise RequestError(f"{where}.{name}: found {value!r}; needed true or false")
            asked[name] = value
        else:
            asked[name] = _number(name, value, where)
    if asked.get("do_sample") is False:
        # Greedy, then: clients send their usual temperature with it.
        return {name: value for name, value in asked.items() if name not in SAMPLING}
    if any(name in asked for name in SAMPLING):
        # As text-generation-inference has it: who names a temperature wants it used.
        asked["do_sample"] = True
    return asked


def settled(asked: dict[str, Any], **other: Any) -> Settings:
    """Settings of what was asked; ``max_length`` and ``min_length`` count the token that a decoder starts from.

    Raises RequestError: at least more tokens than at most.
    """
    found = dict(asked)
    for whole, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if whole in found:
            found.setdefault(new, max(0, found.pop(whole) - 1))
            found.pop(whole, None)
    least, most = found.get("min_new_tokens", 0), found.get("max_new_tokens", MOST_NEW_TOKENS)
    if least > most:
        raise RequestError(f"parameters: found at least {least} new tokens and at most {most}; needed least <= most")
    seed = found.pop("seed", None)
    return Settings(tuple(sorted(found.items())), seed, **other)


def _number(name: str, value: Any, where: str) -> float:
    kind, least, most = NUMBERS[name]
    wanted = (int,) if kind is int else (int, float)
    if not isinstance(value, wanted) or isinstance(value, bool) or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{where}.{name}: found {value!r}; needed {what} from {least} to {most}")
    return value if kind is int else float(value)
