"""Extractive question answering: a question and a context in, the piece of the context that answers it out."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.contexts import LENGTH, QUESTION, STRIDE, context_windows
from banjoray.data.splits import Split, Splits, named_columns, plain_splits
from banjoray.data.squad import misplaced_answers
from banjoray.data.tokens import IGNORED, Feature, Features, Tokens
from banjoray.errors import RequestError
from banjoray.tasks.spans import Span, Wanted, Window, best_spans, exact_match, f1
from banjoray.tasks.task import Ask, Score, Seen, Task, log_softmax, only_known, text_of, true_or_false, whole_number

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of an answer at most: in scores; and over HTTP unless the request says otherwise, as in transformers 4.
ANSWER_TOKENS = 30
_SHAPES = '{"question": ..., "context": ...}, or a list of those'
_CUTTING = {LENGTH: 1, STRIDE: 0, QUESTION: 1}
_PARAMETERS = ("top_k", "max_answer_len", "handle_impossible_answer", "align_to_words", *_CUTTING)


class QuestionAnswering(Task):
    """The first and the last token of an answer; two numbers per token from ``AutoModelForQuestionAnswering``."""

    name = "question-answering"
    auto_model = "AutoModelForQuestionAnswering"
    metrics: tuple[str, ...] = ("exact_match", "f1", "loss")
    outputs = 2

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Questions and contexts, each with its answers; see `squad` for their shape."""
        texts = ("question", "context")
        findings = partial(misplaced_answers, columns=named_columns(job.data, (*texts, "answers")))
        return plain_splits(job, ("answers",), texts, token, findings)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """A feature per window of the context, of data.max_length tokens; two neighbours share data.stride of them."""
        return context_windows(rows, tokenizer, data)

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """The mean of two cross-entropies, of the first token and of the last, over a window's own tokens.

        ``targets`` (windows, 3) hold how many those are in their last column: what a window is padded to depends on the
        others in its batch, and may not change its loss. ``smoothing`` spreads over the window's tokens.
        """
        import torch
        from torch.nn import functional

        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
        wanted, lengths = targets[:, :2], targets[:, 2:]
        padding = (torch.arange(logits.shape[-1], device=logits.device) >= lengths)[:, None]
        found = torch.log_softmax(logits.masked_fill(padding, -torch.inf), dim=-1)
        losses = functional.nll_loss(found.transpose(1, 2), wanted, reduction="none", ignore_index=IGNORED)
        if smoothing:
            spread = -found.masked_fill(padding, 0).sum(-1) / lengths
            losses = (1 - smoothing) * losses + smoothing * spread.masked_fill(wanted == IGNORED, 0)
        return losses.mean(dim=1)

    def weights(self, tokens: Tokens, job: JobConfig) -> np.ndarray:
        """One per window; 0 where the tokenizer drops the answer."""
        weights: np.ndarray = (_targets(tokens)[:, 0] != IGNORED).astype(np.float32)
        return weights

    def kept(self, outputs: Any, inputs: "Mapping[str, Tensor]", targets: "Tensor | None") -> list[np.ndarray]:
        """Logits to be the first and the last token of the answer, (2, tokens) of each window, without padding."""
        import torch

        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu().numpy()
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        return [cells[:, :length] for cells, length in zip(logits, lengths, strict=True)]

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """Exact match and F1, 0..1, of each row's best answer with the nearest of its expected ones; and the loss.

        Both are means over rows, as SQuAD's scripts compute them (in per cent there). Where some row has no answer, "no
        answer" counts too, and wins where it is likelier than the best piece.
        """
        assert tokens.rows is not None
        answers = [(row or {}).get("text") or [] for batch in rows.batches(1000) for row in batch["answers"]]
        contexts = [context for batch in rows.batches(1000) for context in batch["context"]]
        wanted = Wanted(ANSWER_TOKENS, nothing=not all(answers))
        bounds = np.searchsorted(tokens.rows, np.arange(len(rows) + 1))
        exact, overlap = [], []
        for number, (context, expected) in enumerate(zip(contexts, answers, strict=True)):
            part = slice(bounds[number], bounds[number + 1])
            features = [tokens.feature(window) for window in range(part.start, part.stop)]
            best = best_spans(_windows(features, outputs[part]), context, wanted)[0]
            answer = context[best.start : best.end]
            exact.append(exact_match(answer, expected))
            overlap.append(f1(answer, expected))
        metrics = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}
        return Score(metrics | {"loss": _loss(outputs, _targets(tokens))})

    def asked(self, data: DataConfig) -> dict[str, str]:
        """The question and its context."""
        return named_columns(data, ("question", "context"))

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """Rows of {"question", "context"}, with the parameters that say how a context is cut."""
        only_known(parameters, _PARAMETERS, self.name)
        found = inputs if isinstance(inputs, list) else [inputs]
        if not found:
            raise RequestError(f"inputs: an empty list; needed {_SHAPES}")
        cutting = {
            key: whole_number(parameters, key, 0, least)
            for key, least in _CUTTING.items()
            if parameters.get(key) is not None
        }
        rows = [_row(row, f"inputs[{number}]" if found is inputs else "inputs") for number, row in enumerate(found)]
        return Ask([row | cutting for row in rows], parameters, found is not inputs)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """{"answer", "score", "start", "end"} for a row, a list of at most ``top_k`` where that is above 1.

        ``answer`` is characters [start, end) of the context; "", 0 and 0 for "no answer", which is among the answers
        with ``handle_impossible_answer``. ``score`` is its probability. ``max_answer_len`` counts tokens (30 unless
        given); ``align_to_words`` (true unless given) makes whole words of an answer that begins or ends inside of one.
        ``max_seq_len`` and ``doc_stride`` replace data.max_length, data.stride; ``max_question_len`` cuts a question.
        """
        count = whole_number(ask.parameters, "top_k", 1)
        longest = whole_number(ask.parameters, "max_answer_len", ANSWER_TOKENS)
        nothing = true_or_false(ask.parameters, "handle_impossible_answer", False)
        wanted = Wanted(longest, nothing, true_or_false(ask.parameters, "align_to_words", True))
        answers: list[Any] = []
        for row, found in zip(ask.rows, seen, strict=True):
            spans = best_spans(_windows(found.features, found.outputs), row["context"], wanted, count)
            told = [_told(span, row["context"]) for span in spans]
            answers.append(told[0] if count == 1 else told)
        return answers[0] if ask.single else answers


def _windows(features: Sequence[Feature], outputs: Sequence[np.ndarray]) -> list[Window]:
    """The windows of one row, with what was kept of their outputs."""
    asides = (feature.aside for feature in features)
    return [
        Window(np.asarray(aside["starts"]), np.asarray(aside["ends"]), logits)
        for aside, logits in zip(asides, outputs, strict=True)
    ]


def _targets(tokens: Tokens) -> np.ndarray:
    """First token, last token and number of tokens of every window, (windows, 3)."""
    return np.asarray(tokens.targets).reshape(-1, 3)


def _loss(outputs: Sequence[np.ndarray], targets: np.ndarray) -> float:
    """The mean of `losses` over all windows, from what was kept of them."""
    losses = [
        -log_softmax(logits.astype(np.float64))[[0, 1], wanted].mean()
        for logits, (*wanted, _) in zip(outputs, targets.tolist(), strict=True)
        if IGNORED not in wanted
    ]
    return float(np.mean(losses)) if losses else 0.0


def _told(span: Span, context: str) -> dict[str, Any]:
    return {"answer": context[span.start : span.end], "score": span.score, "start": span.start, "end": span.end}


def _row(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise RequestError(f"{where}: found {type(found).__name__}; needed {_SHAPES}")
    if set(found) != {"question", "context"}:
        raise RequestError(f"{where}: found keys {sorted(map(str, found))}; needed question and context")
    return {key: text_of(found[key], f"{where}.{key}") for key in ("question", "context")}
