"""Zero-shot classification: a text and labels of the caller's own in, a score for each label out.

The model is trained on natural language inference: does the second text of a pair follow from the first? A label is
then a question: does "This example is LABEL." follow from the text? (Yin et al. 2019, arXiv:1909.00161.)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.splits import Splits, named_columns
from banjoray.errors import ConfigError, DataError, RequestError
from banjoray.tasks.task import Ask, Seen, log_softmax, only_known, text_of, true_or_false
from banjoray.tasks.text_classification import TextClassification

# A few MiB of labels and texts would otherwise make millions of rows before anybody counts them.
MOST_PAIRS = 10_000
TEMPLATE = "This example is {}."
_PARAMETERS = ("candidate_labels", "multi_label", "hypothesis_template")
_SHAPES = "a text, or a list of texts"


class ZeroShot(TextClassification):
    """Pairs of texts, premise and hypothesis, each with a label; trained and scored as text classification is."""

    name = "zero-shot-classification"
    # Entailment is compared across pairs.
    highest_answers = False

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Pairs, each with a label; raises ConfigError: no pairs; DataError: no label that says entailment."""
        if job.data.columns.text_pair is None:
            raise ConfigError(
                f"data.columns.text_pair: found null; {self.name} learns from pairs, a premise in "
                f"'{job.data.columns.text}' and a hypothesis; set data.columns.text_pair=NAME"
            )
        found = super().splits(job, token)
        entailment_of(found.labels)
        return found

    def asked(self, data: DataConfig) -> dict[str, str]:
        """The text; what has to follow from it comes from the request's labels."""
        return named_columns(data, ("text",))

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """A row for every text and candidate label, label by label: the text, and what has to follow from it."""
        only_known(parameters, _PARAMETERS, self.name)
        candidates, template = _candidates(parameters), _template(parameters)
        true_or_false(parameters, "multi_label", False)
        texts = inputs if isinstance(inputs, list) else [inputs]
        if not texts:
            raise RequestError(f"inputs: an empty list; needed {_SHAPES}")
        if len(texts) * len(candidates) > MOST_PAIRS:
            found = f"{len(texts)} texts with {len(candidates)} labels"
            raise RequestError(f"inputs: found {found}; needed at most {MOST_PAIRS} pairs of them", 413)
        named = [
            text_of(text, f"inputs[{number}]" if texts is inputs else "inputs") for number, text in enumerate(texts)
        ]
        hypotheses = [template.replace("{}", label) for label in candidates]
        rows = [{"text": text, "text_pair": hypothesis} for text in named for hypothesis in hypotheses]
        return Ask(rows, parameters, texts is not inputs)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """[{"label", "score"}] by falling score for one text, a list of those for a list of texts.

        The scores of a text sum to 1: a softmax over the logits of entailment. With ``multi_label``, and for one label
        alone, each is the probability of entailment against contradiction, or against all others where no label says
        contradiction. As transformers' ZeroShotClassificationPipeline computes them.
        """
        candidates = _candidates(ask.parameters)
        logits = np.stack([row.outputs[0] for row in seen]).astype(np.float64)
        logits = logits.reshape(-1, len(candidates), logits.shape[-1])
        entailment = entailment_of(labels)
        if true_or_false(ask.parameters, "multi_label", False) or len(candidates) == 1:
            against = contradiction_of(labels)
            asked = [entailment, *(range(len(labels)) if against is None else [against])]
            asked = list(dict.fromkeys(asked))
            scores = np.exp(log_softmax(logits[..., asked]))[..., 0]
        else:
            scores = np.exp(log_softmax(logits[..., entailment]))
        answers = []
        for row in scores:
            best = np.argsort(-row, kind="stable")
            answers.append([{"label": candidates[number], "score": float(row[number])} for number in best])
        return answers[0] if ask.single else answers


def entailment_of(labels: Sequence[str]) -> int:
    """The id of the label that says entailment: the one whose name starts with "entail", in any case.

    Raises DataError: none, or several.
    """
    found = [number for number, label in enumerate(labels) if label.lower().startswith("entail")]
    if len(found) != 1:
        shown = ", ".join(f"'{label}'" for label in labels)
        raise DataError(
            f"data: found labels {shown}; needed one whose name starts with 'entail'. Where the data has numbers, "
            "data.labels gives them names in their order: [entailment, neutral, contradiction], say; "
            "names in the data have to be changed there"
        )
    return found[0]


def contradiction_of(labels: Sequence[str]) -> int | None:
    """The id of the first label whose name starts with "contra", in any case; None where there is none."""
    return next((number for number, label in enumerate(labels) if label.lower().startswith("contra")), None)


def _candidates(parameters: Mapping[str, Any]) -> list[str]:
    """The caller's labels, in order; raises RequestError: none, blank ones, one twice, no text."""
    where, found = "parameters.candidate_labels", parameters.get("candidate_labels")
    needed = "needed a list of labels, or labels with commas between them"
    if isinstance(found, str):
        # As transformers reads it: what stands between two commas counts if it is more than blanks.
        found = [label for label in found.split(",") if label.strip()]
    if not isinstance(found, list):
        raise RequestError(f"{where}: found {type(found).__name__}; {needed}")
    if not found:
        raise RequestError(f"{where}: found no label; {needed}")
    if len(found) > MOST_PAIRS:
        raise RequestError(f"{where}: found {len(found)} labels; needed at most {MOST_PAIRS}", 413)
    labels = [text_of(label, f"{where}[{number}]").strip() for number, label in enumerate(found)]
    if len(set(labels)) < len(labels):
        twice = Counter(labels).most_common(1)[0][0]
        raise RequestError(f"{where}: found {twice!r} twice; needed every label once")
    return labels


def _template(parameters: Mapping[str, Any]) -> str:
    where, found = "parameters.hypothesis_template", parameters.get("hypothesis_template")
    if found is None:
        return TEMPLATE
    if text_of(found, where).count("{}") != 1:
        raise RequestError(f"{where}: found {found!r}; needed text with {{}} in it once, where the label goes")
    return str(found)
