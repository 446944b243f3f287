"""Languages of translation models that are told which one to read and to write: mBART, mBART-50, NLLB, M2M100.

Their tokenizers put a token for the language beside the text. Which one is a state of the tokenizer, so that it is set
and put back around every use, by one thread at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

_LOCK = RLock()


def knows_languages(tokenizer: Any) -> bool:
    """Whether the tokenizer has to be told a language."""
    return hasattr(tokenizer, "set_tgt_lang_special_tokens")


def languages_of(tokenizer: Any) -> dict[str, int]:
    """Language, as the tokenizer names it (en_XX, eng_Latn, en) -> the id of its token; empty where it knows none."""
    if not knows_languages(tokenizer):
        return {}
    codes = getattr(tokenizer, "lang_code_to_id", None)
    if codes is None:
        # NLLB in transformers 5: its languages are its special tokens, such as deu_Latn.
        codes = {name: tokenizer.convert_tokens_to_ids(name) for name in tokenizer.all_special_tokens if "_" in name}
    return dict(codes)


def why_unknown(tokenizer: Any, language: str) -> str | None:
    """What is wrong with a language for this tokenizer, in words; None if it knows it."""
    known = languages_of(tokenizer)
    if not known:
        return "this model is not told languages by name (mBART, NLLB and M2M100 are); leave it out"
    if language in known:
        return None
    some = sorted(known)
    return f"needed a language that the model knows: {', '.join(some[:8])}{', ...' * (len(some) > 8)}"


@contextmanager
def speaking(tokenizer: Any, source: str | None, target: str | None) -> Iterator[None]:
    """The tokenizer reads ``source`` and, given text_target, writes ``target`` while the block runs."""
    if not knows_languages(tokenizer):
        yield
        return
    with _LOCK:
        before = tokenizer.src_lang, tokenizer.tgt_lang
        tokenizer.src_lang, tokenizer.tgt_lang = source or before[0], target or before[1]
        try:
            yield
        finally:
            tokenizer.tgt_lang = before[1]
            # Last, since setting it also sets what stands beside a text.
            tokenizer.src_lang = before[0]


def starting_in(tokenizer: Any, language: str) -> dict[str, int]:
    """The argument of ``generate`` that has a model write in a language.

    Where the language's token comes first in a target (mBART-50, NLLB, M2M100), it is forced after the start; where it
    comes last (mBART), the model was trained to start from it.
    """
    number = languages_of(tokenizer)[language]
    with speaking(tokenizer, None, language):
        tokenizer.set_tgt_lang_special_tokens(language)
        first = number in tokenizer.prefix_tokens
    return {"forced_bos_token_id": number} if first else {"decoder_start_token_id": number}
