"""Token classification: a text in, a label for every word out; named entities, parts of speech and their like.

A model learns and answers on one and the same tokens: those of the text. Where rows are words, the text is the words
with a blank between them, so that a tokenizer which marks blanks (byte-level BPE, SentencePiece) gives in training what
it gives for a request; words that it is handed one by one would all look like the first of a text, or none would.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.splits import Split, Splits, named_columns
from banjoray.data.tags import OUTSIDE, tagged_splits
from banjoray.data.tokens import IGNORED, Features, Tokens
from banjoray.data.windows import pieces_of, windows
from banjoray.errors import ConfigError, RequestError
from banjoray.tasks.alignment import NONE, bounds_of, first_tokens, texts_of
from banjoray.tasks.entities import STRATEGIES, Read, entity_metrics, entries, gone_on, pieces_read
from banjoray.tasks.task import Ask, Score, Seen, Task, log_softmax, only_known, text_of, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_SHAPES = "a text, or a list of texts"
_PARAMETERS = ("aggregation_strategy", "ignore_labels", "stride")


class TokenClassification(Task):
    """A label per word, that of its first token; a softmax over ``AutoModelForTokenClassification``'s logits."""

    name = "token-classification"
    auto_model = "AutoModelForTokenClassification"
    metrics: tuple[str, ...] = ("precision", "recall", "f1", "accuracy", "loss")
    labelled = True

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Words with a tag each, or texts with named spans."""
        return tagged_splits(job, token)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """Windows of data.max_length tokens, of which neighbours share data.stride, or what a row's ``stride`` says.

        Aside of rows with ``tags``, at the first token of a word: its number, ``word``, and ``until`` which word the
        token goes; their targets are there, each once. Aside of other rows: a token's ``start`` and ``end`` in
        characters. -1 where nothing is read. Raises ConfigError: a slow tokenizer, too large a stride (RequestError,
        where it is a row's).
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                f"model.base: its tokenizer, {type(tokenizer).__name__}, does not say which characters a token is of; "
                "token-classification needs a fast one (a tokenizer.json beside the model)"
            )
        texts = texts_of(rows)
        numbers: list[int] = []
        inputs: dict[str, list[list[int]]] = {}
        beside: dict[str, list[list[int]]] = {}
        for row, pieces in enumerate(pieces_of(texts, tokenizer)):
            told = {"start": [start for start, _ in pieces.offsets], "end": [end for _, end in pieces.offsets]}
            if "tags" in rows:
                word, until = first_tokens(texts[row], pieces, bounds_of(rows, row))
                tags = rows["tags"][row]
                learned = [IGNORED if number == NONE else tags[number] for number in word]
                told = {"word": word, "until": until, "targets": learned}
            room = data.max_length - pieces.head - pieces.tail
            for window in windows(pieces.words, room, _stride(rows, row, room, data)):
                numbers.append(row)
                for name, ids in pieces.part(window).items():
                    inputs.setdefault(name, []).append(ids)
                for name, cells in told.items():
                    fill = IGNORED if name == "targets" else NONE
                    beside.setdefault(name, []).append(pieces.beside(window, cells, fill))
        targets = beside.pop("targets", None)
        return Features(inputs, numbers, beside, targets)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """Mean cross-entropy of ``outputs.logits`` (features, tokens, labels) over each feature's known targets."""
        from torch.nn import functional

        logits = outputs.logits.float().transpose(1, 2)
        found = functional.cross_entropy(
            logits, targets, reduction="none", ignore_index=IGNORED, label_smoothing=smoothing
        )
        return found.sum(1) / (targets != IGNORED).sum(1).clamp(min=1)

    def kept(self, outputs: Any, inputs: "Mapping[str, Tensor]", targets: "Tensor | None") -> list[np.ndarray]:
        """Logits of every token of a feature, (tokens, labels), without padding."""
        logits = outputs.logits.float().cpu().numpy()
        lengths = inputs["attention_mask"].sum(1).tolist()
        # Copies: a view would keep the whole batch.
        return [row[:length].copy() for row, length in zip(logits, lengths, strict=True)]

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """Precision, recall and F1 of entities as seqeval counts them; accuracy and mean cross-entropy of words.

        A word without a token of its own counts as outside; of words in one token, the later ones go on with what the
        first is. They have no loss.
        """
        gold = [[labels[tag] for tag in tags] for tags in rows.added["tags"]]
        predicted = [[OUTSIDE] * len(tags) for tags in gold]
        losses: list[np.ndarray] = [np.zeros(0)]
        for number, logits in enumerate(outputs):
            row = number if tokens.rows is None else int(tokens.rows[number])
            aside, targets = tokens.feature(number).aside, tokens.target(number)
            read = np.flatnonzero(np.asarray(aside["word"]) != NONE)
            words, untils = (np.asarray(aside[name])[read].tolist() for name in ("word", "until"))
            for word, until, best in zip(words, untils, logits[read].argmax(1).tolist(), strict=True):
                shared = [gone_on(labels[best])] * (until - word - 1)
                predicted[row][word:until] = [labels[best], *shared]
            losses.append(-log_softmax(logits[read].astype(np.float64))[np.arange(len(read)), targets[read]])
        metrics, by_type = entity_metrics(gold, predicted)
        right = np.array(list(chain.from_iterable(gold))) == np.array(list(chain.from_iterable(predicted)))
        known = np.concatenate(losses)
        metrics["accuracy"] = float(right.mean())
        metrics["loss"] = float(known.sum() / max(1, len(known)))
        return Score(metrics, per_label=by_type)

    def asked(self, data: DataConfig) -> dict[str, str]:
        """The words where the job has words, or else the text."""
        return named_columns(data, ("text",) if data.columns.spans is not None else ("tokens", "text"))

    def inputs(self, row: Mapping[str, Any]) -> Any:
        """The text; of words, these with a blank between them, as training reads them."""
        if "tokens" not in row:
            return row["text"]
        words = row["tokens"]
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise RequestError(f"tokens: found {words!r}; needed a list of words")
        return " ".join(words)

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """Rows of {"text"}, with the request's {"stride"} if it has one."""
        only_known(parameters, _PARAMETERS, self.name)
        _strategy(parameters)
        _ignored(parameters)
        rows = inputs if isinstance(inputs, list) else [inputs]
        if not rows:
            raise RequestError(f"inputs: an empty list; needed {_SHAPES}")
        stride = None if parameters.get("stride") is None else whole_number(parameters, "stride", 0, least=0)
        asked = {} if stride is None else {"stride": stride}
        found = [
            {"text": text_of(row, f"inputs[{number}]" if rows is inputs else "inputs")} | asked
            for number, row in enumerate(rows)
        ]
        return Ask(found, parameters, rows is not inputs)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """A list per row, of what its tokens or entities are; of a single text, the list itself.

        ``aggregation_strategy`` none (the default): {"entity", "index", "score", "word", "start", "end"} per token;
        simple, first, average, max: {"entity_group", "score", "word", "start", "end"} per entity. ``ignore_labels``
        (["O"]) leaves entities out by their name. Positions are characters of the text, [start, end).
        """
        strategy, ignored = _strategy(ask.parameters), _ignored(ask.parameters)
        answers = []
        for row, found in zip(ask.rows, seen, strict=True):
            pieces = pieces_read(row["text"], _read(found), tokenizer)
            told = entries(pieces, strategy, labels, tokenizer)
            answers.append([entry for entry in told if entry.get("entity", entry.get("entity_group")) not in ignored])
        return answers[0] if ask.single else answers


def _read(seen: Seen) -> Read:
    """What the windows of a text say of its tokens, each token from the window that reads it."""
    ids, starts, ends, scores = [], [], [], []
    for feature, logits in zip(seen.features, seen.outputs, strict=True):
        start = np.asarray(feature.aside["start"])
        read = np.flatnonzero(start != NONE)
        ids.append(np.asarray(feature.inputs["input_ids"])[read])
        starts.append(start[read])
        ends.append(np.asarray(feature.aside["end"])[read])
        scores.append(np.exp(log_softmax(logits[read].astype(np.float64))))
    special = np.asarray(seen.features[0].aside["start"]) == NONE
    join = np.concatenate
    return Read(join(ids), join(starts), join(ends), join(scores), head=int(special.argmin()))


def _stride(rows: Mapping[str, Sequence[Any]], row: int, room: int, data: DataConfig) -> int:
    """How many tokens neighbouring windows share; refused if they could not move on."""
    asked = rows["stride"][row] if "stride" in rows else None
    stride: int = data.stride if asked is None else asked
    if stride < room:
        return stride
    why = f"found {stride}; a window has {room} tokens of a text, so needed less than {room}"
    if asked is not None:
        raise RequestError(f"parameters.stride: {why}")
    raise ConfigError(f"data.stride: {why}; set data.stride={room // 4}, or a larger data.max_length")


def _strategy(parameters: Mapping[str, Any]) -> str:
    found = parameters.get("aggregation_strategy")
    if found is None:
        return "none"
    if found not in STRATEGIES:
        raise RequestError(f"parameters.aggregation_strategy: found {found!r}; needed one of {', '.join(STRATEGIES)}")
    return str(found)


def _ignored(parameters: Mapping[str, Any]) -> list[str]:
    found = parameters.get("ignore_labels")
    if found is None:
        return [OUTSIDE]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise RequestError(f"parameters.ignore_labels: found {found!r}; needed a list of labels")
    return found
