"""Feature extraction: a text in, a vector out that lies near those of texts that mean the same.

A row of training data is a pair of texts that belong together. The loss is a ranking: of all second texts in a forward
pass, a first text has to find its own (multiple negatives ranking, Henderson et al. 2017, arXiv:1705.00652). So the
negatives are those of one microbatch: with more workers or microbatches per step, also those that a full memory makes,
there are fewer, and the task is easier. Nothing else that is learned here depends on who computes which rows.

A pair is one feature, so that it stays together: the ids of both texts, one after the other, each with its own special
tokens. Its targets are the two lengths; a batch is unfolded into twice as many rows before the model sees it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import EmbeddingConfig, JobConfig
from banjoray.data.splits import Split, Splits, plain_splits
from banjoray.data.tokens import Features, Tokens, inputs_of
from banjoray.errors import ConfigError, RequestError
from banjoray.tasks.ranking import rank_pairs
from banjoray.tasks.task import Ask, Collate, Score, Seen, Task, only_known, text_of, true_or_false, whole_number

if TYPE_CHECKING:
    from torch import Tensor

_SHAPES = 'a text, a list of texts, or {"source_sentence": ..., "sentences": [...]}'
_CUTTING = ("truncate", "truncation_direction")
_PARAMETERS = ("normalize", *_CUTTING, "prompt_name", "dimensions", "encoding_format")
# In an Ask's parameters: the first row is compared with the others. No request can name it.
_COMPARED = "compared"
# A length below which a vector counts as having none; torch.nn.functional.normalize's.
_SHORTEST = 1e-12
# Vectors whose cosine is at least this are the same.
_NEAR = 0.999


class Embeddings(Task):
    """A vector per text: the states of `AutoModel`'s last layer, pooled over the text's tokens."""

    name = "feature-extraction"
    auto_model = "AutoModel"
    metrics: tuple[str, ...] = ("mrr", "recall_at_1", "loss")
    # A pair is two rows of the model's, and kept states are of features.
    steady = False

    def __init__(self, settings: EmbeddingConfig | None = None) -> None:
        self._settings = settings or EmbeddingConfig()

    def settled(self, job: JobConfig) -> "Embeddings":
        """The task with the job's pooling, normalization and scale."""
        return Embeddings(job.embedding)

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Pairs of texts; raises ConfigError: no second text, or microbatches of one pair, which has no negatives."""
        columns, train = job.data.columns, job.train
        if columns.text_pair is None:
            raise ConfigError(
                f"data.columns.text_pair: found null; {self.name} learns from pairs, a text in '{columns.text}' and "
                "one that belongs to it; set data.columns.text_pair=NAME"
            )
        microbatches = job.scale.most_workers * train.gradient_accumulation_steps
        if train.batching.mode == "rows" and train.batch_size < 2 * microbatches:
            raise ConfigError(
                f"train.batch_size: found {train.batch_size}; {self.name} compares the pairs of a microbatch, so it "
                f"needs two in each: at least {2 * microbatches} (scale.workers {job.scale.most_workers} x "
                f"gradient_accumulation_steps {train.gradient_accumulation_steps} x 2), and more is better"
            )
        return plain_splits(job, (), ("text", "text_pair"), token)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """A feature per text or pair, each text cut to data.max_length.

        A request's rows may say where a text is cut, and that it may not be: raises RequestError for those too long.
        """
        first, first_cut = _encoded(rows["text"], rows, tokenizer, data.max_length)
        numbers = range(len(first_cut))
        if "text_pair" not in rows:
            return Features(first, numbers, cut=sum(first_cut))
        second, second_cut = _encoded(rows["text_pair"], rows, tokenizer, data.max_length)
        both = {name: [a + b for a, b in zip(first[name], second[name], strict=True)] for name in first}
        lengths = [[len(first["input_ids"][row]), len(second["input_ids"][row])] for row in numbers]
        cut = sum(a or b for a, b in zip(first_cut, second_cut, strict=True))
        return Features(both, numbers, targets=lengths, cut=cut)

    def collate(self, job: JobConfig, tokenizer: Any, config: Any) -> Collate:
        """Pairs unfolded: all first texts, then all second ones."""
        return Unfold(tokenizer.pad_token_id)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """Cross-entropy of each first text's cosines to all second ones, times the scale, against its own.

        ``outputs.last_hidden_state`` (2 * pairs, tokens, width); ``targets`` (pairs, 4) as `Unfold` gives them. What
        belongs to an equal text is no negative.
        """
        import torch
        from torch.nn.functional import normalize

        states, lengths = outputs.last_hidden_state, targets[:, :2].T.reshape(-1)
        # The scale makes bf16's steps of 1/256 as large as what is to be told apart.
        with torch.autocast(states.device.type, enabled=False):
            mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
            first, second = normalize(pool(states, mask, self._settings.pooling), dim=1).chunk(2)
            logits = self._settings.scale * first @ second.T
            own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
            same = (targets[:, None, 2:] == targets[None, :, 2:]).any(dim=2) & ~own
            surprise = -logits.masked_fill(same, -torch.inf).log_softmax(dim=1)
            spread = surprise.masked_fill(same, 0).sum(dim=1) / (~same).sum(dim=1)
            return (1 - smoothing) * surprise.diagonal() + smoothing * spread

    def weights(self, tokens: Tokens, job: JobConfig) -> np.ndarray:
        """One per pair."""
        return np.ones(len(tokens), dtype=np.float32)

    def kept(self, outputs: Any, inputs: "Mapping[str, Tensor]", targets: "Tensor | None") -> list[np.ndarray]:
        """A text's vector (width,), or both of a pair (2, width); not normalized."""
        vectors = pool(outputs.last_hidden_state, inputs["attention_mask"].bool(), self._settings.pooling).cpu().numpy()
        return list(vectors) if targets is None else list(np.stack(np.split(vectors, 2), axis=1))

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """How high each first text ranks its own among the split's second texts, by cosine: see `rank_pairs`."""
        return Score(rank_pairs(unit(np.stack(list(outputs))), identities(tokens), self._settings.scale))

    def same(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Of every vector, whether the cosine of the two is at least 0.999."""
        return np.atleast_1d((unit(found) * unit(wanted)).sum(-1) >= _NEAR)

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """A row per text; raises RequestError for other shapes and parameters.

        Texts that are too long are cut, unless ``truncate`` is false: then `encode` refuses them. A source
        sentence and others (sentence_similarity) are rows too, the source first.
        """
        compared = isinstance(inputs, dict)
        only_known(parameters, _CUTTING if compared else _PARAMETERS, self.name)
        _check_form(parameters)
        how = _cutting(parameters)
        rows = [{"text": text_of(text, where)} | how for where, text in _named(inputs)]
        return Ask(rows, {**parameters, _COMPARED: compared}, not isinstance(inputs, list))

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """A vector per text, as a list of lists also for one text; of two sentences or more, the cosines to the first.

        ``normalize`` (the job's embedding.normalize where it is not given) makes vectors one long; ``dimensions`` keeps
        the first of them, before that.
        """
        vectors = np.stack([row.outputs[0] for row in seen])
        if ask.parameters[_COMPARED]:
            source, *others = unit(vectors.astype(np.float64))
            return [float(other @ source) for other in others]
        width = vectors.shape[1]
        dimensions = whole_number(ask.parameters, "dimensions", width)
        if dimensions > width:
            raise RequestError(f"parameters.dimensions: found {dimensions}; this model's vectors have {width}")
        vectors = vectors[:, :dimensions]
        normalized = true_or_false(ask.parameters, "normalize", self._settings.normalize)
        return (unit(vectors) if normalized else vectors).tolist()


@dataclass(frozen=True)
class Unfold:
    """Takes pairs apart: (pairs, longest pair) becomes (2 * pairs, longest text), all first texts, then all second."""

    pad_id: int

    def __call__(
        self,
        inputs: dict[str, np.ndarray],
        targets: np.ndarray,
        rows: np.ndarray,
        epoch: int | None,
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The inputs of both texts, and targets (pairs, 4): both lengths, and which pairs have equal texts.

        Column 2 has the same number for pairs whose first texts are equal, column 3 for second ones.
        """
        lengths = targets.T.reshape(-1, 1)
        starts = np.concatenate([np.zeros_like(targets[:, :1]), targets[:, :1]])
        places = np.arange(int(lengths.max()))
        mask = places < lengths
        where = np.where(mask, starts + places, 0)
        cells = {
            name: np.where(mask, np.take_along_axis(np.concatenate([ids, ids]), where, axis=1), 0)
            for name, ids in inputs.items()
        }
        cells["input_ids"][~mask] = self.pad_id
        cells["attention_mask"] = mask.astype(np.int64)
        texts = [ids[:length].tobytes() for ids, length in zip(cells["input_ids"], lengths[:, 0], strict=True)]
        equal = [numbered(texts[: len(targets)]), numbered(texts[len(targets) :])]
        return cells, np.column_stack([targets, *equal])


def pool(states: "Tensor", mask: "Tensor", mode: str) -> "Tensor":
    """A vector per text (texts, width), fp32, of states (texts, tokens, width) where ``mask`` is true."""
    states = states.float()
    if mode == "cls":
        return states[:, 0]
    if mode == "max":
        return states.masked_fill(~mask[..., None], float("-inf")).amax(dim=1)
    return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors one long, over the last axis; as torch.nn.functional.normalize does."""
    scaled: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), _SHORTEST)
    return scaled


def identities(tokens: Tokens) -> np.ndarray:
    """A number for each text of each pair, (pairs, 2); equal where the token ids are, per column."""
    pairs = [np.split(tokens.feature(pair).inputs["input_ids"], tokens.target(pair)[:1]) for pair in range(len(tokens))]
    return np.column_stack([numbered([pair[side].tobytes() for pair in pairs]) for side in (0, 1)])


def numbered(texts: Sequence[bytes]) -> np.ndarray:
    """A number for every text, the same for equal ones, in order of first appearance."""
    known: dict[bytes, int] = {}
    return np.array([known.setdefault(text, len(known)) for text in texts])


def _encoded(
    texts: Sequence[str], asked: Mapping[str, Sequence[Any]], tokenizer: Any, longest: int
) -> tuple[dict[str, list[list[int]]], list[bool]]:
    """Texts by themselves, as ids by model input, and which were cut to ``longest`` tokens.

    Cut here, between the special tokens, since the tokenizer would keep where it cuts for the requests beside this one.
    """
    encoded = tokenizer(list(texts), truncation=False, return_special_tokens_mask=True, verbose=False)
    inputs, cut = inputs_of(encoded), [len(special) > longest for special in encoded["special_tokens_mask"]]
    may, sides = asked.get("truncate"), asked.get("truncation_direction")
    for row in np.flatnonzero(cut).tolist():
        special = encoded["special_tokens_mask"][row]
        if may is not None and not may[row]:
            raise RequestError(
                f"inputs: found a text of {len(special)} tokens, and truncate false; this model reads {longest}"
            )
        side = sides[row] if sides is not None else tokenizer.truncation_side
        for ids in inputs.values():
            ids[row] = _shortened(ids[row], special, longest, side)
    return inputs, cut


def _shortened(ids: list[int], special: Sequence[int], longest: int, side: str) -> list[int]:
    """``longest`` of ``ids``: the special tokens at both ends, and of what is between them the first or last."""
    lead = next((place for place, mark in enumerate(special) if not mark), 0)
    trail = next((place for place, mark in enumerate(reversed(special)) if not mark), 0)
    inner, room = ids[lead : len(ids) - trail], longest - lead - trail
    return ids[:lead] + (inner[-room:] if side == "left" else inner[:room]) + ids[len(ids) - trail :]


def _named(inputs: Any) -> Iterator[tuple[str, Any]]:
    """What should be the texts of a request, each with where it stands; raises RequestError for other shapes."""
    if isinstance(inputs, dict):
        if set(inputs) != {"source_sentence", "sentences"}:
            raise RequestError(f"inputs: found keys {sorted(map(str, inputs))}; needed {_SHAPES}")
        sentences = inputs["sentences"]
        if not isinstance(sentences, list) or not sentences:
            raise RequestError(f"inputs.sentences: found {sentences!r}; needed a list of texts")
        yield "inputs.source_sentence", inputs["source_sentence"]
        yield from ((f"inputs.sentences[{number}]", text) for number, text in enumerate(sentences))
        return
    if inputs == []:
        raise RequestError(f"inputs: an empty list; needed {_SHAPES}")
    if isinstance(inputs, list):
        yield from ((f"inputs[{number}]", text) for number, text in enumerate(inputs))
    else:
        yield "inputs", inputs


def _cutting(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How the texts of a request are cut, where it says so, as columns of its rows."""
    side = parameters.get("truncation_direction")
    how = {} if side is None else {"truncation_direction": str(side).lower()}
    if how and how["truncation_direction"] not in ("left", "right"):
        raise RequestError(f"parameters.truncation_direction: found {side!r}; needed left or right")
    return how if true_or_false(parameters, "truncate", True) else how | {"truncate": False}


def _check_form(parameters: Mapping[str, Any]) -> None:
    """Refuse what could only be found wrong after the vectors are computed."""
    true_or_false(parameters, "normalize", True)
    whole_number(parameters, "dimensions", 1)
    form, prompt = parameters.get("encoding_format"), parameters.get("prompt_name")
    if form not in (None, "float"):
        raise RequestError(f"parameters.encoding_format: found {form!r}; vectors are answered as float")
    if prompt is not None:
        raise RequestError(
            f"parameters.prompt_name: found {prompt!r}; this model has no prompts, put it before the text"
        )
