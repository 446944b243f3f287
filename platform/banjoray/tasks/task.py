"""What a task has to say for itself; training, scoring and HTTP all go through one such object."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.bad_rows import TOO_LONG, half_a_character
from banjoray.data.splits import Split, Splits, named_columns
from banjoray.data.tokens import IGNORED, Feature, Features, Tokens
from banjoray.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    """What a model is worth on a split: metrics by name, and where there are labels, how each one fares.

    ``confusion[i][j]`` counts rows of label ``i`` that were answered with label ``j``; ``per_label`` maps a label to
    its precision, recall, f1 and support (how often it is right), and its threshold where labels have one.
    """

    metrics: dict[str, float]
    confusion: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()
    per_label: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def thresholds(self) -> dict[str, float]:
        """Label -> the score from which on a row has it; empty where labels have none."""
        return {label: told["threshold"] for label, told in self.per_label.items() if "threshold" in told}

    def to_json(self) -> dict[str, Any]:
        """The score as plain values."""
        return {
            "metrics": self.metrics,
            "confusion": [list(row) for row in self.confusion],
            "labels": self.labels,
            "per_label": {label: dict(told) for label, told in self.per_label.items()},
        }


@dataclass(frozen=True)
class Ask:
    """What a request asks: rows for the model, and parameters for the answer; ``single`` if it was not a list.

    ``stream``: to be answered piece by piece, as `Task.stream` tells them.
    """

    rows: list[dict[str, Any]]
    parameters: Mapping[str, Any]
    single: bool = False
    stream: bool = False


@dataclass(frozen=True)
class Seen:
    """One row as the model saw it: its features, in order, and what was kept of each one's outputs."""

    features: Sequence[Feature]
    outputs: Sequence[np.ndarray]


class Collate(Protocol):
    """Changes a batch before the model sees it."""

    def __call__(
        self, inputs: dict[str, np.ndarray], targets: np.ndarray, rows: np.ndarray, epoch: int | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs and targets, each (rows, ...), of the features with these numbers.

        What is drawn depends on the seed, the feature's number and the epoch alone; ``epoch`` None: of no epoch, always
        the same, for evaluation.
        """
        ...


class Task(Protocol):
    """One kind of work, end to end. A row is what a user counts; a feature is what a model sees at once."""

    name: str
    auto_model: str
    """The transformers class that loads a model for this task."""
    metrics: tuple[str, ...]
    """Names of the metrics in a score; every one may be asked for in a job file."""
    labelled: bool = False
    """Whether a model of this task has named labels."""
    weighted: bool = False
    """Whether each row has one label, so that rows can be weighted by it and confused."""
    outputs: int | None = None
    """How many numbers the head of a task without labels gives for a row or token; None: as the base has it."""
    problem_type: str | None = None
    """What transformers calls the kind of the head's answer, so that its pipelines make the same scores of it."""
    highest_answers: bool = False
    """Whether the answer to a row is the label of its highest logit."""
    steady: bool = True
    """Whether a row gives the model the same inputs in every epoch, those that `encode` made.

    So a frozen bottom's states can be kept, and of the word table only the words in use have to be trained.
    """
    generates: bool = False
    """Whether answers are texts that the model writes: `generate` is called for them, instead of a forward pass."""
    text_metrics: tuple[str, ...] = ()
    """Names of the metrics of written texts: they cost a generation of every row, so `score` alone has them."""

    def settled(self, job: JobConfig) -> "Task":
        """The task with the settings that a job has for it; itself where it needs none."""
        return self

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """The rows of a job, every cell that is read checked; raises DataError with file, row and reason."""
        ...

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """Some rows, column by column, as features."""
        ...

    def check(self, job: JobConfig, tokenizer: Any, config: Any) -> None:
        """Refuse a base model, by its tokenizer and config, that can't learn this task as the job says."""
        return

    def collate(self, job: JobConfig, tokenizer: Any, config: Any) -> Collate | None:
        """What is done to a batch before the model sees it; None: nothing.

        Raises ModelError: a tokenizer or a model (by its ``config``) that the task can't use.
        """
        return None

    def for_tokenizer(self, tokenizer: Any) -> "Task":
        """The task, knowing of the tokens of the model that answers; itself, where `kept` needs to know nothing."""
        return self

    def for_config(self, config: Any) -> "Task":
        """The task, knowing what was decided when a model was trained, from its config; itself, where nothing was."""
        return self

    def losses(self, outputs: Any, targets: "Tensor", smoothing: float) -> "Tensor":
        """The loss of every feature (features,), fp32, of a model's outputs against ``targets``, in nats.

        ``smoothing`` is the share of each target that is spread over all labels.
        """
        ...

    def weights(self, tokens: Tokens, job: JobConfig) -> np.ndarray:
        """What every feature counts in a batch's mean, (features,) fp32: one, or how many targets it has."""
        if tokens.target_offsets is None:
            return np.ones(len(tokens), dtype=np.float32)
        known = np.concatenate([[0], np.cumsum(np.asarray(tokens.targets) != IGNORED)])
        counts: np.ndarray = np.diff(known[tokens.target_offsets]).astype(np.float32)
        return counts

    def sizes(self, tokens: Tokens) -> np.ndarray:
        """How many tokens every feature counts for in a batch of an evaluation, (features,) int64."""
        return tokens.lengths

    def kept(self, outputs: Any, inputs: "Mapping[str, Tensor]", targets: "Tensor | None") -> list[np.ndarray]:
        """What scores and answers need of a forward pass, an array per feature, in fp32 on the CPU."""
        return list(outputs.logits.float().cpu().numpy())

    def score(self, outputs: Sequence[np.ndarray], tokens: Tokens, rows: Split, labels: Sequence[str]) -> Score:
        """The score of what was kept of every feature of a split, in their order."""
        ...

    def same(self, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Whether what two engines kept of one feature's outputs says the same, a bool for everything that it says.

        Here: whether the same entry of the last axis is the highest.
        """
        return np.atleast_1d(found.argmax(-1) == wanted.argmax(-1))

    def generate(self, model: Any, features: Sequence[Feature], tokenizer: Any) -> list[np.ndarray]:
        """What the model writes for each feature, as token ids; each as its settings say, whatever it stands beside."""
        raise TypeError(f"{self.name} writes no text")

    def text_score(self, written: Sequence[np.ndarray], rows: Split, tokenizer: Any) -> dict[str, float]:
        """`text_metrics` of what `generate` gave for every row of a split."""
        raise TypeError(f"{self.name} writes no text")

    def check_stream(self, model: Any, feature: Feature) -> None:
        """Refuse, with a RequestError, a feature whose answer `stream` can't tell."""
        raise RequestError(f"stream: found true; {self.name} sends whole answers, leave it out")

    def stream(self, model: Any, ask: Ask, feature: Feature, tokenizer: Any, tell: Callable[[Any], None]) -> None:
        """Call ``tell`` with the pieces of the answer to ``ask``, a row of one feature, as the model writes them.

        Together they say what `generate` and `answer` would. What ``tell`` raises ends the writing and is raised here.
        """
        raise TypeError(f"{self.name} writes no text")

    def probe(self, tokenizer: Any) -> Feature:
        """What a loaded model is tried with before any request."""
        return Feature({"input_ids": [tokenizer.pad_token_id] * 8})

    def asked(self, data: DataConfig) -> dict[str, str]:
        """The columns of a file's row that a request is made of: keys of data.columns and their names."""
        return named_columns(data, ("text",))

    def inputs(self, row: Mapping[str, Any]) -> Any:
        """What `parse` takes for the cells of a row, those of `asked` that it has."""
        return row["text"] if list(row) == ["text"] else dict(row)

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """What an HTTP request asks; raises RequestError that says what was wrong with its inputs."""
        ...

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """The body of the answer, as Hugging Face's clients read it; raises RequestError for unknown parameters."""
        ...


def task_for(name: str) -> Task:
    """The task of that name, as it is without a job."""
    from banjoray.tasks.embeddings import Embeddings
    from banjoray.tasks.fill_mask import FillMask
    from banjoray.tasks.question_answering import QuestionAnswering
    from banjoray.tasks.sequence_to_sequence import Summarization, Translation
    from banjoray.tasks.text_classification import TextClassification
    from banjoray.tasks.text_generation import TextGeneration
    from banjoray.tasks.token_classification import TokenClassification
    from banjoray.tasks.zero_shot import ZeroShot

    known: tuple[Task, ...] = (
        TextClassification(),
        TokenClassification(),
        FillMask(),
        QuestionAnswering(),
        Summarization(),
        Translation(),
        TextGeneration(),
        ZeroShot(),
        Embeddings(),
    )
    tasks = {task.name: task for task in known}
    return tasks[name]


def varies(job: JobConfig) -> bool:
    """Whether a row's inputs are more than what `encode` made of it: no states of a frozen bottom can be kept then."""
    return job.data.packing or not task_for(job.task).steady


def check_metrics(job: JobConfig) -> None:
    """Refuse a metric that the job's task does not have."""
    known, problem = task_for(job.task).settled(job).metrics, job.classification.problem_type
    named = job.task if problem == "single_label" else f"{job.task} ({problem})"
    for key, metric in (("train.metric", job.train.metric), ("registry.gate.metric", job.registry.gate.metric)):
        if metric not in known:
            raise ConfigError(f"{key}: {named} has no metric {metric!r}; it has {', '.join(known)}")


def text_of(found: Any, where: str) -> str:
    """A request's value that has to be text, of a length that rows may have; raises RequestError."""
    if not isinstance(found, str):
        raise RequestError(f"{where}: found {type(found).__name__}; needed text")
    if not found.strip():
        raise RequestError(f"{where}: found nothing but blanks; needed text")
    if len(found) >= TOO_LONG:
        raise RequestError(f"{where}: found {len(found):,} characters; needed fewer than {TOO_LONG:,}")
    if half_a_character(found):
        raise RequestError(f"{where}: found half a character (a lone surrogate); needed text")
    return found


def only_known(parameters: Mapping[str, Any], known: Sequence[str], task: str) -> None:
    """Refuse parameters that a task does not have."""
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise RequestError(f"parameters: unknown {unknown}; {task} has {', '.join(known)}")


def whole_number(parameters: Mapping[str, Any], key: str, usual: int, least: int = 1) -> int:
    """A parameter that is a whole number of at least ``least``; ``usual`` where it is absent or null."""
    found = parameters.get(key)
    if found is None:
        return usual
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise RequestError(f"parameters.{key}: found {found!r}; needed a whole number >= {least}")
    return found


def true_or_false(parameters: Mapping[str, Any], key: str, usual: bool) -> bool:
    """A parameter that is true or false; ``usual`` where it is absent or null."""
    found = parameters.get(key)
    if found is None:
        return usual
    if not isinstance(found, bool):
        raise RequestError(f"parameters.{key}: found {found!r}; needed true or false")
    return found


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, without overflow."""
    shifted: np.ndarray = logits - logits.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
