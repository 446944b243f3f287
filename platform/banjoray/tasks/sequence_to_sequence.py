"""Summarization and translation: a text in, a text out, by an encoder-decoder (T5, BART, mBART, NLLB, Marian).

While a model trains it is told the right words before each word (teacher forcing): that gives ``loss`` and
``perplexity``, per token, after every epoch and when a version is registered. What it writes by itself, and so ROUGE,
BLEU and chrF, is computed by `score` alone: it costs a pass through the decoder for every token of every row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.splits import Split, Splits, plain_splits
from banjoray.data.tokens import IGNORED, Features, Tokens
from banjoray.errors import ConfigError, RequestError
from banjoray.tasks.languages import knows_languages, speaking, starting_in, why_unknown
from banjoray.tasks.settings import WRITING, Settings, read_asked, settled
from banjoray.tasks.task import Ask, Collate, Seen, only_known, text_of, true_or_false
from banjoray.tasks.text_metrics import ROUGE, TRANSLATION, bleu_and_chrf, rouge
from banjoray.tasks.token_loss import WIDE
from banjoray.tasks.writer import Writer

_TRUNCATION = ("do_not_truncate", "longest_first", "only_first", "only_second")


class SequenceToSequence(Writer):
    """Texts from texts, by ``AutoModelForSeq2SeqLM``; the rows are data.columns.text and data.columns.target."""

    auto_model = "AutoModelForSeq2SeqLM"
    answers_as: str
    """The key of an answer's text."""
    parameters: tuple[str, ...] = ("generate_parameters", "clean_up_tokenization_spaces", "truncation")

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Texts and what should be written for each."""
        if job.data.columns.target is None:
            raise ConfigError(f"data.columns.target: found null; {self.name} needs the column of what is to be written")
        return plain_splits(job, (), ("text", "target"), token)

    def check(self, job: JobConfig, tokenizer: Any, config: Any) -> None:
        """Refuse a model without a decoder of its own, targets beyond its positions, languages it does not know."""
        if not config.is_encoder_decoder:
            raise ConfigError(
                f"model.base: {job.model.base} is of kind {config.model_type}, which has no encoder and decoder; "
                f"{self.name} needs one that has, such as T5, BART, mBART or Marian"
            )
        shifted(np.array([[0, IGNORED]]), config, job.model.base)
        limit = getattr(config, "max_position_embeddings", None)
        if limit and job.data.max_target_length > limit:
            raise ConfigError(
                f"data.max_target_length: found {job.data.max_target_length}; {job.model.base} has {limit} positions"
            )
        for key in ("src_lang", "tgt_lang"):
            language = getattr(job.data, key)
            if language is None and knows_languages(tokenizer):
                raise ConfigError(f"data.{key}: found null; {why_unknown(tokenizer, '')}")
            wrong = language is not None and why_unknown(tokenizer, language)
            if wrong:
                raise ConfigError(f"data.{key}: found {language!r}; {wrong}")

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """A feature per row: the text, after data.prefix, and as its targets the tokens of what should be written.

        Rows that a request asks for carry ``settings``. Raises RequestError: a language that the model does not know, a
        text that is too long and may not be cut.
        """
        texts = [data.prefix + text for text in rows["text"]]
        wanted: Sequence[Settings] = rows.get("settings") or [Settings()] * len(texts)
        ids: list[list[int]] = []
        cut: list[bool] = []
        for language, part in groupby(zip(texts, wanted, strict=True), lambda pair: pair[1].src_lang):
            _check_spoken(tokenizer, "src_lang", language)
            with speaking(tokenizer, language or data.src_lang, data.tgt_lang):
                found, longer = _cut([text for text, _ in part], tokenizer, data.max_length)
            ids, cut = ids + found, cut + longer
        for row, (asked, over) in enumerate(zip(wanted, cut, strict=True)):
            if asked.whole and over:
                raise RequestError(
                    f"inputs[{row}]: found more than the {data.max_length} tokens that this model reads, and "
                    "parameters.truncation do_not_truncate; shorten it, or let it be cut"
                )
        if "target" not in rows:
            settings = [_in_language(asked, tokenizer) for asked in wanted]
            return Features({"input_ids": ids}, range(len(ids)), cut=sum(cut), settings=settings)
        with speaking(tokenizer, data.src_lang, data.tgt_lang):
            targets, longer = _cut(rows["target"], tokenizer, data.max_target_length, "text_target")
        either = sum(map(any, zip(cut, longer, strict=True)))
        return Features({"input_ids": ids}, range(len(ids)), targets=targets, cut=either)

    def collate(self, job: JobConfig, tokenizer: Any, config: Any) -> Collate | None:
        """Gives the decoder its targets one place later, as the model's own function does."""

        def told(
            inputs: dict[str, np.ndarray],
            targets: np.ndarray,
            rows: np.ndarray,  # noqa: ARG001
            epoch: int | None,  # noqa: ARG001
        ) -> tuple[dict[str, np.ndarray], np.ndarray]:
            return inputs | {"decoder_input_ids": shifted(targets, config, job.model.base)}, targets

        return told

    def sizes(self, tokens: Tokens) -> np.ndarray:
        """Source and target together, for the width of the logits."""
        assert tokens.target_offsets is not None
        return (tokens.lengths + np.diff(tokens.target_offsets)) * WIDE

    def text_score(self, written: Sequence[np.ndarray], rows: Split, tokenizer: Any) -> dict[str, float]:
        """`text_metrics` of what was written beside data.columns.target, the whole of it."""
        return self.compare([_text(ids, tokenizer) for ids in written], rows.rows[rows.columns["target"]][:])

    def compare(self, written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """`text_metrics` of texts beside their references."""
        raise NotImplementedError

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """A text or a list of texts; arguments of ``generate`` in generate_parameters, or among the others."""
        texts = inputs if isinstance(inputs, list) else [inputs]
        if not texts:
            raise RequestError("inputs: an empty list; needed a text or a list of texts")
        only_known(parameters, (*self.parameters, *WRITING), self.name)
        settings = self._settings(parameters)
        rows = [
            {"text": text_of(text, f"inputs[{number}]" if texts is inputs else "inputs"), "settings": settings}
            for number, text in enumerate(texts)
        ]
        return Ask(rows, parameters, texts is not inputs)

    def _settings(self, parameters: Mapping[str, Any]) -> Settings:
        inner = parameters.get("generate_parameters") or {}
        if not isinstance(inner, dict):
            raise RequestError(f"parameters.generate_parameters: found {type(inner).__name__}; needed an object")
        unknown = sorted(set(inner) - set(WRITING))
        if unknown:
            raise RequestError(f"parameters.generate_parameters: unknown {unknown}; there is {', '.join(WRITING)}")
        truncation = parameters.get("truncation")
        if truncation is not None and truncation not in _TRUNCATION:
            raise RequestError(f"parameters.truncation: found {truncation!r}; needed one of {', '.join(_TRUNCATION)}")
        true_or_false(parameters, "clean_up_tokenization_spaces", False)
        asked = read_asked(parameters, WRITING, "parameters") | read_asked(
            inner, WRITING, "parameters.generate_parameters"
        )
        languages = {key: parameters.get(key) for key in ("src_lang", "tgt_lang")}
        for key, language in languages.items():
            if language is not None and not isinstance(language, str):
                raise RequestError(f"parameters.{key}: found {language!r}; needed a language's name")
        return settled(asked, whole=truncation == _TRUNCATION[0], **languages)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """A list with an object per text, also for a single one: the client reads the first."""
        clean = ask.parameters.get("clean_up_tokenization_spaces")
        return [{self.answers_as: _text(row.outputs[0], tokenizer, clean)} for row in seen]


class Summarization(SequenceToSequence):
    """What a long text says, in short."""

    name = "summarization"
    text_metrics = ROUGE
    answers_as = "summary_text"

    def compare(self, written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """ROUGE, from 0 to 1."""
        return rouge(written, references)


class Translation(SequenceToSequence):
    """What a text says, in another language."""

    name = "translation"
    text_metrics = TRANSLATION
    answers_as = "translation_text"
    parameters = (*SequenceToSequence.parameters, "src_lang", "tgt_lang")

    def compare(self, written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """BLEU and chrF, from 0 to 100."""
        return bleu_and_chrf(written, references)


def shifted(targets: np.ndarray, config: Any, base: str) -> np.ndarray:
    """What a decoder is given so that it finds ``targets``: these, one place to the right, (rows, tokens) int64.

    As ``prepare_decoder_input_ids_from_labels`` of the model's class does: before the first stands the token that the
    decoder starts from; in mBART, whose targets end with their language, that last one. Raises ConfigError: a config
    that does not say where a decoder starts.
    """
    known = np.where(targets == IGNORED, config.pad_token_id, targets)
    found = np.empty_like(known)
    found[:, 1:] = known[:, :-1]
    if config.model_type in ("mbart", "plbart"):
        last = (known != config.pad_token_id).sum(axis=1) - 1
        found[:, 0] = known[np.arange(len(known)), last]
        return found
    if config.decoder_start_token_id is None:
        raise ConfigError(f"model.base: the config of {base} has no decoder_start_token_id; set it there")
    found[:, 0] = config.decoder_start_token_id
    return found


def _cut(texts: Sequence[str], tokenizer: Any, most: int, argument: str = "text") -> tuple[list[list[int]], list[bool]]:
    """The ids of every text, at most so many, and whether it has more; ``argument`` is the tokenizer's."""
    encoded = tokenizer(**{argument: list(texts)}, truncation=True, max_length=most)
    ids: list[list[int]] = encoded["input_ids"]
    if encoded.encodings:
        return ids, [bool(part.overflowing) for part in encoded.encodings]
    # A tokenizer in Python (Marian) does not say what it left out: what is full may have been longer.
    full = [number for number, found in enumerate(ids) if len(found) >= most]
    longer = [False] * len(ids)
    for number in full:
        longer[number] = len(tokenizer(**{argument: texts[number]})["input_ids"]) > most
    return ids, longer


def _check_spoken(tokenizer: Any, key: str, language: str | None) -> None:
    wrong = language is not None and why_unknown(tokenizer, language)
    if wrong:
        raise RequestError(f"parameters.{key}: found {language!r}; {wrong}")


def _in_language(settings: Settings, tokenizer: Any) -> Settings:
    """The settings with what has the model write in their language."""
    if settings.tgt_lang is None:
        return settings
    _check_spoken(tokenizer, "tgt_lang", settings.tgt_lang)
    asked = dict(settings.asked) | starting_in(tokenizer, settings.tgt_lang)
    return replace(settings, asked=tuple(sorted(asked.items())))


def _text(ids: np.ndarray, tokenizer: Any, clean: bool | None = None) -> str:
    """What was written, in words; scores and answers read it here."""
    options = {} if clean is None else {"clean_up_tokenization_spaces": clean}
    found: str = tokenizer.decode(ids, skip_special_tokens=True, **options)
    return found.strip()
