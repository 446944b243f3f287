"""Fill-mask: plain texts in, a model that knows which words fit into their gaps out; how an encoder learns a domain."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.splits import Split, Splits, plain_splits
from banjoray.data.tokens import IGNORED, Features, Tokens, inputs_of
from banjoray.errors import ConfigError, DataError, ModelError, RequestError
from banjoray.tasks.masking import Masks, how_many, ordinary_ids, special_ids
from banjoray.tasks.task import Ask, Collate, Score, Seen, Task, only_known, text_of, whole_number
from banjoray.tasks.token_loss import WIDE

if TYPE_CHECKING:
    from torch import Tensor

# exp of more is no number any more.
_LARGEST = 700.0
# Losses of a hidden token that differ by no more nats are the same.
_NEAR = 0.02


class FillMask(Task):
    """A softmax over the vocabulary for every hidden token, by ``AutoModelForMaskedLM``.

    A text that is longer than data.max_length gives several features, without overlap; nothing of it is left out.
    ``mask_id`` is the mask token of the model that answers; training does without.
    """

    name = "fill-mask"
    auto_model = "AutoModelForMaskedLM"
    metrics: tuple[str, ...] = ("perplexity", "loss", "accuracy")
    steady = False

    def __init__(self, mask_id: int = -1) -> None:
        self._mask_id = mask_id

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """One column of texts."""
        return plain_splits(job, (), ("text",), token)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """Features of at most data.max_length tokens; their targets are the number of the word that each token is in.

        `IGNORED` stands for special tokens. A tokenizer in Python tells no words: each token is one.
        """
        texts = list(rows["text"])
        inputs, words, of = (_windows if tokenizer.is_fast else _plain_windows)(texts, tokenizer, data.max_length)
        special = special_ids(tokenizer)
        targets = [
            [IGNORED if word is None or number in special else word for number, word in zip(ids, numbers, strict=True)]
            for ids, numbers in zip(inputs["input_ids"], words, strict=True)
        ]
        return Features(inputs, of, targets=targets)

    def collate(self, job: JobConfig, tokenizer: Any, config: Any) -> Collate:
        """What hides words, anew in every epoch.

        Raises ModelError: no mask token, no head for this task; ConfigError: whole words of a tokenizer without words.
        """
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as known

        if tokenizer.mask_token_id is None:
            raise ModelError(
                f"model.base: the tokenizer of '{job.model.base}' ({config.model_type}) has no mask token; {self.name} "
                "needs an encoder that was made to fill masks, as distilbert-base-uncased or roberta-base"
            )
        if config.model_type not in known and "AutoModelForMaskedLM" not in (getattr(config, "auto_map", None) or {}):
            raise ModelError(
                f"model.base: '{job.model.base}' ({config.model_type}) has no head that fills masks in transformers; "
                "take an encoder that has, as distilbert-base-uncased or roberta-base"
            )
        if job.train.masking.whole_words and not tokenizer.is_fast:
            raise ConfigError(
                f"train.masking.whole_words: {type(tokenizer).__name__} does not tell which tokens make a word; "
                "set train.masking.whole_words=false"
            )
        vocabulary = ordinary_ids(tokenizer, config.vocab_size)
        return Masks(job.train.masking, job.train.seed, tokenizer.mask_token_id, vocabulary)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """Mean cross-entropy of a feature's hidden tokens; of ``outputs.logits`` (rows, tokens, words), there alone."""
        import torch
        from torch.nn import functional

        known = targets != IGNORED
        logits = outputs.logits[known].float()
        found = functional.cross_entropy(logits, targets[known], reduction="none", label_smoothing=smoothing)
        sums = torch.zeros(len(targets), device=found.device).index_add(0, known.nonzero()[:, 0], found)
        return sums / known.sum(1).clamp(min=1)

    def weights(self, tokens: Tokens, job: JobConfig) -> np.ndarray:
        """How many tokens of each feature are hidden, in every epoch."""
        return how_many(super().weights(tokens, job), job.train.masking.share).astype(np.float32)

    def sizes(self, tokens: Tokens) -> np.ndarray:
        """The tokens, for the width of the logits."""
        return tokens.lengths * WIDE

    def for_tokenizer(self, tokenizer: Any) -> Task:
        """The task, knowing the mask token."""
        return FillMask(tokenizer.mask_token_id)

    def kept(self, outputs: Any, inputs: "Mapping[str, Tensor]", targets: "Tensor | None") -> list[np.ndarray]:
        """For a score (nats, hidden tokens, how many of them were found), (3,) float64.

        For an answer the log-probabilities of all words at each mask, (masks, words) fp32.
        """
        from torch.nn import functional

        if targets is None:
            masks = inputs["input_ids"] == self._mask_id
            tables = functional.log_softmax(outputs.logits[masks].float(), -1).cpu().numpy()
            return np.split(tables, masks.sum(1).cumsum(0)[:-1].tolist())
        known = targets != IGNORED
        logits = outputs.logits[known].float()
        losses = functional.cross_entropy(logits, targets[known], reduction="none")
        nats, right = losses.cpu().numpy(), (logits.argmax(-1) == targets[known]).cpu().numpy()
        table = np.zeros((len(targets), 3))
        rows = known.nonzero()[:, 0].cpu().numpy()
        np.add.at(table, rows, np.stack([nats, np.ones(len(nats)), right], axis=1))
        return list(table)

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """Over all hidden tokens: mean cross-entropy (nats), its exponential, and the share that came out first."""
        nats, hidden, right = np.sum(list(outputs), axis=0).tolist()
        if not hidden:
            raise DataError(f"data: no text of split '{rows.name}' has a token that can be hidden")
        loss = nats / hidden
        return Score({"perplexity": float(np.exp(min(loss, _LARGEST))), "loss": loss, "accuracy": right / hidden})

    def same(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether the mean loss of a feature's hidden tokens differs by less than 0.02 nats; of what a score keeps."""
        return np.asarray(np.abs(found[:1] - wanted[:1]) <= _NEAR * np.maximum(1, wanted[1:2]))

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """Rows of {"text"}; whether they hold a mask is seen by `answer`, which knows how the model writes it."""
        texts = inputs if isinstance(inputs, list) else [inputs]
        if not texts:
            raise RequestError("inputs: an empty list; needed a text with a mask, or a list of such texts")
        where = [f"inputs[{number}]" for number in range(len(texts))] if texts is inputs else ["inputs"]
        rows = [{"text": text_of(text, at)} for text, at in zip(texts, where, strict=True)]
        return Ask(rows, parameters, single=texts is not inputs)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """[{"score", "token", "token_str", "sequence"}] by falling score; a list of those where a text has more masks.

        Of a list of texts, a list of answers. ``top_k`` (5) is how many words; ``targets`` are the only words that
        count, each of one token; scores stay shares of all words. As transformers' pipeline answers.
        """
        only_known(ask.parameters, ("top_k", "targets"), self.name)
        top_k = whole_number(ask.parameters, "top_k", 5)
        targets = _target_ids(ask.parameters.get("targets"), tokenizer)
        answers = []
        for number, row in enumerate(seen):
            ids = _joined(row, tokenizer)
            masks = np.flatnonzero(ids == tokenizer.mask_token_id)
            if not len(masks):
                where = "inputs" if ask.single else f"inputs[{number}]"
                raise RequestError(f"{where}: found no {tokenizer.mask_token}; needed at least one, this model's mask")
            tables = np.concatenate(list(row.outputs))
            filled = [_filled(ids, masks, at, _best(tables[at], targets, top_k), tokenizer) for at in range(len(masks))]
            answers.append(filled if len(masks) > 1 else filled[0])
        return answers[0] if ask.single else answers


_Windows = tuple[dict[str, list[list[int]]], list[list[int | None]], list[int]]
"""Model inputs, the word of every token, and the text that each feature is of."""


def _windows(texts: list[str], tokenizer: Any, max_length: int) -> _Windows:
    encoded = tokenizer(texts, truncation=True, max_length=max_length, stride=0, return_overflowing_tokens=True)
    words = [encoded.word_ids(number) for number in range(len(encoded["input_ids"]))]
    return inputs_of(encoded), words, encoded["overflow_to_sample_mapping"]


def _plain_windows(texts: list[str], tokenizer: Any, max_length: int) -> _Windows:
    room = max_length - tokenizer.num_special_tokens_to_add()
    parts = [
        (row, ids[start : start + room])
        for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for start in range(0, max(1, len(ids)), room)
    ]
    found = [tokenizer.build_inputs_with_special_tokens(part) for _, part in parts]
    return {"input_ids": found}, [list(range(len(ids))) for ids in found], [row for row, _ in parts]


def _target_ids(found: Any, tokenizer: Any) -> np.ndarray | None:
    """The ids of the words that a request wants to choose from, each once; None where it is from all words."""
    if found is None:
        return None
    words = found if isinstance(found, list) else [found]
    if not words:
        raise RequestError("parameters.targets: an empty list; needed a word, or a list of words")
    ids = [_target_id(word, f"parameters.targets[{number}]", tokenizer) for number, word in enumerate(words)]
    return np.array(list(dict.fromkeys(ids)))


def _target_id(found: Any, where: str, tokenizer: Any) -> int:
    """The id of a word as it stands in the vocabulary, or of the one token that the tokenizer makes of it."""
    word, unknown = text_of(found, where), tokenizer.unk_token_id
    number = tokenizer.convert_tokens_to_ids(word)
    if number is not None and (number != unknown or word == tokenizer.unk_token):
        return int(number)
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if unknown in ids or not ids:
        raise RequestError(f"{where}: {word!r} is not in the model's vocabulary; needed words that are")
    if len(ids) > 1:
        pieces = ", ".join(tokenizer.convert_ids_to_tokens(ids))
        raise RequestError(
            f"{where}: {word!r} is {len(ids)} tokens of this model ({pieces}); needed words of one token"
        )
    return int(ids[0])


def _joined(row: Seen, tokenizer: Any) -> np.ndarray:
    """The ids of a text, its windows put together: special tokens at its two ends only."""
    aside = special_ids(tokenizer) - {tokenizer.mask_token_id, tokenizer.unk_token_id}
    pieces = [np.asarray(feature.inputs["input_ids"], dtype=np.int64) for feature in row.features]
    for number, piece in enumerate(pieces):
        words = np.flatnonzero(~np.isin(piece, list(aside)))
        start = words[0] if number and len(words) else 0
        end = words[-1] + 1 if number + 1 < len(pieces) and len(words) else len(piece)
        pieces[number] = piece[start:end]
    return np.concatenate(pieces)


def _best(table: np.ndarray, targets: np.ndarray | None, top_k: int) -> list[tuple[int, float]]:
    """(id, probability) of the words that fit best, of all or of ``targets``, by falling probability."""
    ids = np.arange(len(table)) if targets is None else targets
    scores = table[ids]
    if top_k < len(ids):
        first = np.argpartition(-scores, top_k - 1)[:top_k]
        ids, scores = ids[first], scores[first]
    order = np.lexsort((ids, -scores))
    return list(zip(ids[order].tolist(), np.exp(scores[order].astype(np.float64)).tolist(), strict=True))


def _filled(
    ids: np.ndarray, masks: np.ndarray, at: int, best: Sequence[tuple[int, float]], tokenizer: Any
) -> list[dict[str, Any]]:
    """A list of answers for mask ``at`` of a text. Of several masks the others show, and so do all special tokens."""
    answers = []
    for token, score in best:
        whole = ids.copy()
        whole[masks[at]] = token
        whole = whole[whole != tokenizer.pad_token_id]
        sequence = tokenizer.decode(whole.tolist(), skip_special_tokens=len(masks) == 1)
        answers.append({"score": score, "token": token, "token_str": tokenizer.decode([token]), "sequence": sequence})
    return answers
