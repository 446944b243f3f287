"""A job file: every key, its default, its unit and its rule."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import Field, field_validator, model_validator

from banjoray.config.classification import ClassificationConfig
from banjoray.config.data import DataConfig
from banjoray.config.generation import GenerationConfig
from banjoray.config.metrics import MINIMISED, with_usual_metrics
from banjoray.config.search import SearchConfig
from banjoray.config.section import Section, known_keys, nearest, validate
from banjoray.config.train import AdapterConfig, Freeze, ScaleConfig, TrainConfig, clear_freeze
from banjoray.errors import ConfigError

TaskName = Literal[
    "text-classification",
    "token-classification",
    "fill-mask",
    "question-answering",
    "summarization",
    "translation",
    "text-generation",
    "zero-shot-classification",
    "feature-extraction",
]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class ModelConfig(Section):
    """The transformer that training starts from."""

    base: str = Field(
        "distilbert-base-uncased",
        description="Hub id, local folder, banjoray:minilm (all-MiniLM-L6-v2 from the quickstart extra), or a small "
        "model of random weights to try a job out with: banjoray:tiny-bert, tiny-gpt2, tiny-t5, tiny-bart.",
    )
    revision: str = Field("main", description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Replaces every dropout probability of the base's config; null keeps them."
    )


class EmbeddingConfig(Section):
    """How feature-extraction makes a vector of a text, and how training compares vectors.

    In training each first text of a pair has to find its own among the second texts of the same microbatch, which has
    train.batch_size / (workers x gradient_accumulation_steps) pairs: another number of workers trains another task.
    """

    pooling: Literal["mean", "cls", "max"] = Field(
        "mean",
        description="Of the last layer's states: the mean over the text's tokens, the first one, or the largest.",
    )
    normalize: bool = Field(True, description="Answer with vectors of length 1, where a request does not say.")
    scale: float = Field(
        20.0,
        gt=0,
        description="Cosines are multiplied by it in the loss; 1 / temperature, as in sentence-transformers.",
    )


class GateConfig(Section):
    """The score that a model needs to be registered."""

    metric: str = Field("auto", description="The validation metric that is looked at; auto: the task's usual one.")
    at_least: float = Field(0.0, description="The lowest score that passes.")
    at_most: float | None = Field(
        None, description="The highest score that passes, of a metric of which less is better; null: any."
    )

    @model_validator(mode="after")
    def _on_the_side_that_is_better(self) -> "GateConfig":
        less = self.metric in MINIMISED
        if less and self.at_least:
            raise ValueError(
                f"at_least: found {self.at_least:g} with metric {self.metric}, of which less is better; set at_most"
            )
        if not less and self.at_most is not None and self.metric != "auto":
            raise ValueError(
                f"at_most: found {self.at_most:g} with metric {self.metric}, of which more is better; set at_least"
            )
        return self


class RegistryConfig(Section):
    """Where a trained model goes."""

    root: str = Field("./registry", description="Folder or fsspec URL of the registry.")
    model: str | None = Field(
        None, pattern=NAME, description="Name of the model in the registry; null: the job's name."
    )
    gate: GateConfig = Field(default_factory=GateConfig, description="What the model has to reach.")
    probe_rows: int = Field(
        256, ge=0, description="Validation rows kept in the version, to compare faster engines by; 0: it stays fp32."
    )


class HubConfig(Section):
    """How models and data sets are fetched; reaches every Ray worker."""

    endpoint: str | None = Field(None, description="A mirror's address; null: the Hugging Face hub.")
    offline: bool = Field(False, description="Use only what is on this machine already.")
    token_env: str = Field("HF_TOKEN", description="Name of the environment variable that holds the hub token.")

    def environment(self) -> dict[str, str]:
        """The variables that huggingface_hub reads once, when it is first imported."""
        variables = {"HF_ENDPOINT": self.endpoint} if self.endpoint else {}
        return variables | ({"HF_HUB_OFFLINE": "1"} if self.offline else {})


class CacheConfig(Section):
    """What is kept of a frozen bottom: the states that it gives for every row, for all epochs, runs and trials."""

    prefix: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: where reading them is faster than computing them again; always: or fail."
    )
    budget_gib: float = Field(10.0, gt=0, description="Disk space of all entries; the longest unread make room.")


class JobConfig(Section):
    """One run, from raw text to a registered version."""

    name: str = Field(pattern=NAME, description="Names the run, its folder and, by default, the model.")
    task: TaskName = Field(description="What the model learns to do.")
    model: ModelConfig = Field(default_factory=ModelConfig, description="What training starts from.")
    data: DataConfig = Field(description="What it learns from.")
    classification: ClassificationConfig = Field(
        default_factory=ClassificationConfig, description="For text-classification: what a row's label is."
    )
    embedding: EmbeddingConfig = Field(
        default_factory=EmbeddingConfig, description="For feature-extraction: how texts become vectors."
    )
    freeze: Freeze = Field(
        "none", description="none, embeddings, backbone, {layers: k}, {patterns: [...]} or {bitfit: true}."
    )
    adapter: AdapterConfig | None = Field(
        None, description="Train a PEFT adapter and the head; null or none: the weights."
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="How the weights are changed.")
    scale: ScaleConfig = Field(default_factory=ScaleConfig, description="On how many workers.")
    generation: GenerationConfig = Field(
        default_factory=GenerationConfig, description="How text is written, for the tasks whose answers are texts."
    )
    cache: CacheConfig = Field(default_factory=CacheConfig, description="What is kept of what never changes.")
    tracking: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        ("tensorboard",),
        description="Who is told of every step: tensorboard (files in the run's folder), mlflow (a server), wandb.",
    )
    tune: SearchConfig | None = Field(None, description="What `banjoray tune` searches.")
    storage: str = Field("./runs", description="Folder or fsspec URL for runs: checkpoints, results, token cache.")
    registry: RegistryConfig = Field(default_factory=RegistryConfig, description="Where the model goes.")
    hub: HubConfig = Field(default_factory=HubConfig, description="How models and data sets are fetched.")

    @field_validator("adapter", mode="before")
    @classmethod
    def _none_is_no_adapter(cls, value: Any) -> Any:
        # So that a choice of tune.space can be written as it is for freeze.
        return None if value == "none" else value

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_clear_message(cls, value: Any) -> Any:
        return clear_freeze(value)

    @model_validator(mode="before")
    @classmethod
    def _usual_metrics(cls, value: Any) -> Any:
        return with_usual_metrics(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _batches_reach_every_worker(self) -> "JobConfig":
        shares = self.scale.most_workers * self.train.gradient_accumulation_steps
        if self.train.batching.mode == "rows" and self.train.batch_size < shares:
            raise ValueError(
                f"train.batch_size: found {self.train.batch_size}, needed at least {shares} "
                f"(scale.workers {self.scale.most_workers} x gradient_accumulation_steps "
                f"{self.train.gradient_accumulation_steps}); batch_size counts rows over all workers"
            )
        return self

    @model_validator(mode="after")
    def _sections_are_read(self) -> "JobConfig":
        for key, task in (("embedding", "feature-extraction"), ("classification", "text-classification")):
            section = getattr(self, key)
            if self.task != task and section != type(section)():
                raise ValueError(f"{key}: found it with task {self.task}; {task} alone reads it; leave it out")
        return self

    @property
    def model_name(self) -> str:
        """The name that the trained model gets in the registry."""
        return self.registry.model or self.name

    def digest(self) -> str:
        """sha256 of the resolved job; two jobs that could differ in any result differ here."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def training_digest(self) -> str:
        """sha256 of the keys that decide the weights: not of where they go, on how many workers, or how often saved."""
        aside = ("registry", "storage", "tune", "hub", "scale", "tracking", "cache")
        tree = {key: value for key, value in self.to_json().items() if key not in aside}
        tree["train"] = {key: value for key, value in tree["train"].items() if "checkpoint" not in key}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The resolved job: every key with its value."""
        return self.model_dump(mode="json")

    def anchored(self, root: Path) -> "JobConfig":
        """The same job with relative paths taken from ``root``: workers run in other folders than the driver."""

        def fixed(path: str) -> str:
            return path if is_url(path) else str((root / Path(path.removeprefix("file://")).expanduser()).absolute())

        tree = self.to_json()
        tree["storage"], tree["registry"]["root"] = fixed(self.storage), fixed(self.registry.root)
        if (root / self.model.base).is_dir():
            tree["model"]["base"] = fixed(self.model.base)
        if self.data.files:
            tree["data"]["files"] = {split: path and fixed(path) for split, path in tree["data"]["files"].items()}
        return validate(JobConfig, tree, self.name)

    def with_values(self, values: Mapping[str, Any]) -> "JobConfig":
        """A copy with dotted keys replaced; raises ConfigError as a file with those values would."""
        tree = self.to_json()
        for key, value in values.items():
            _set(tree, key, value)
        return validate(JobConfig, tree, self.name)


def is_url(path: str) -> bool:
    """Whether a path is an fsspec URL of something else than this machine's files."""
    return urlsplit(path).scheme not in ("", "file")


def load_job(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """The job in a YAML file, with ``a.b=value`` overrides applied; values are read as YAML.

    Raises ConfigError: no such file, not YAML, a wrong key or value (all of them, one line each).
    """
    tree = read_yaml(path)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}: needed key=value, as --set train.epochs=1")
        try:
            _set(tree, key.strip(), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML ({_where(error)})") from None
    return validate(JobConfig, tree, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises ConfigError if there is none."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({_where(error)})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: needed keys and values, found {type(tree).__name__}")
    return tree


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put ``value`` at a dotted key, making the sections on the way."""
    keys = known_keys(JobConfig)
    if key not in keys and not key.startswith("tune.space."):
        near = nearest(key, keys)
        raise ConfigError(f"unknown key '{key}'{f'; did you mean {near!r}?' if near else ''}")
    *sections, last = key.split(".") if not key.startswith("tune.space.") else ["tune", "space", key[11:]]
    for section in sections:
        child = tree.get(section)
        tree[section] = child if isinstance(child, dict) else {}
        tree = tree[section]
    tree[last] = value
