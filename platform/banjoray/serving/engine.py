"""A registered version, loaded and ready to answer. Knows nothing of Ray or HTTP."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from banjoray.config.job import JobConfig, load_job
from banjoray.data.batches import padded
from banjoray.data.probe import read_probe
from banjoray.data.tokens import Feature, Features, tokens_of
from banjoray.models.loading import labels_of, load_trained, quiet_libraries
from banjoray.registry import ModelVersion, Registry
from banjoray.serving.borders import OnBorders
from banjoray.serving.choosing import ASKED, PLAIN, Chosen, candidates, kept_choice
from banjoray.serving.costs import FREE, Cost, measured
from banjoray.serving.models import Models, choose
from banjoray.serving.probe import probe_for
from banjoray.tasks.task import Ask, Seen, Task, task_for
from banjoray.training.scoring import EVALUATION_TOKENS, to_tensors


class Engine:
    """The model of one version on one device: answers are those of the checkpoint; ``chosen`` says what computes."""

    def __init__(
        self, version: ModelVersion, task: Task, model: Any, tokenizer: Any, job: JobConfig, chosen: Chosen = ASKED
    ) -> None:
        self.version = version
        self.chosen = chosen
        self.task = task
        self.labels = labels_of(model) if task.labelled else ()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self._device)
        self.tokenizer = tokenizer
        self.job = job
        self._data = job.data

    @property
    def max_length(self) -> int:
        """How many tokens of a text are read."""
        return self._data.max_length

    @property
    def cells(self) -> tuple[str, ...]:
        """What a row of a request is made of, as the rows that it was trained on: text, and text_pair, say."""
        return tuple(self.task.asked(self._data))

    @property
    def pass_tokens(self) -> int:
        """Rows x longest of a pass, where many rows wait."""
        return EVALUATION_TOKENS[self._device.type]

    def cost(self) -> Cost:
        """What `forward` costs by rows and tokens, measured now; `FREE` where the model writes texts."""
        if self.task.generates:
            return FREE
        pad = self.tokenizer.pad_token_id
        # Rows of padding say nothing of how many texts lie on a border; what those cost is learned from passes.
        model = self.model.rounded if isinstance(self.model, OnBorders) else self.model
        forward = partial(self._pass, model)
        return measured(forward, lambda tokens: Feature({"input_ids": [pad] * tokens}), self._data.max_length)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[list[Feature]]:
        """The features of every row, cut where training cut them."""
        if any(row.keys() != rows[0].keys() for row in rows):
            # Texts and pairs in one request.
            return [found for row in rows for found in self.encode([row])]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        return self.task.encode(columns, self.tokenizer, self._data).by_row()

    def inputs(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """Some features as the model takes them, padded to the longest of them, on its device."""
        inputs = {name: [feature.inputs[name] for feature in features] for name in features[0].inputs}
        tokens = tokens_of([Features(inputs, range(len(features)))])
        return to_tensors(padded(tokens, np.arange(len(features)), self.tokenizer.pad_token_id), self._device)

    def forward(self, features: Sequence[Feature]) -> list[np.ndarray]:
        """What the task keeps of some features' outputs, in their order; one pass through the model.

        Where answers are texts: what the model writes for each, as its own settings say.
        """
        if self.task.generates:
            return self.task.generate(self.model, features, self.tokenizer)
        return self._pass(self.model, features)

    def warm(self) -> None:
        """Make the first pass of all that may answer."""
        probe = [self.task.probe(self.tokenizer)]
        self.forward(probe)
        if isinstance(self.model, OnBorders):
            self._pass(self.model.plain, probe)

    def _pass(self, model: Any, features: Sequence[Feature]) -> list[np.ndarray]:
        batch = self.inputs(features)
        with torch.inference_mode():
            return self.task.kept(model(**batch), batch, None)

    def streamed(self, ask: Ask, rows: Sequence[Sequence[Feature]]) -> Callable[[Callable[[Any], None]], None]:
        """What writes the answer to ``ask`` when it is called, and tells who it is given of every piece as it comes.

        It takes as long as a `forward` of the same features, and must not run beside one: what sampling draws would be
        another. Raises RequestError, before anything is written: an answer that has no pieces.
        """
        ((feature,),) = rows
        self.task.check_stream(self.model, feature)
        return lambda tell: self.task.stream(self.model, ask, feature, self.tokenizer, tell)

    def answer(self, ask: Ask, rows: Sequence[Sequence[Feature]], outputs: Sequence[np.ndarray]) -> Any:
        """The body of the answer to ``ask``; ``outputs`` of the features of all ``rows``, one after the other."""
        left = iter(outputs)
        seen = [Seen(features, [next(left) for _ in features]) for features in rows]
        return self.task.answer(ask, seen, self.labels, self.tokenizer)


def load(reference: str, registry: str, engine: str = PLAIN.engine, precision: str = PLAIN.precision) -> Engine:
    """The engine of ``name@version`` or ``name@alias``; the first pass is made here, so that no request waits for it.

    ``engine`` and ``precision`` as in a serve config; what auto comes to is kept beside the version for the next start.
    Raises RegistryError, BrokenVersion if a file differs from its manifest, ConfigError: an engine that can't be had.
    """
    quiet_libraries()
    store = Registry(registry)
    version = store.resolve(reference)
    folder = store.fetch(version)
    job = load_job(folder / "job.yaml")
    task = task_for(version.task).settled(job)
    model, tokenizer = load_trained(folder, task)
    task = task.for_config(model.config).for_tokenizer(tokenizer)
    models = Models(
        version, registry, model, tokenizer, lambda: probe_for(read_probe(folder), task, tokenizer, model.config, job)
    )
    kinds = candidates(engine, precision, task.generates, models.device.type)
    if len(kinds) == 1:
        auto = engine == precision == "auto"
        why = "texts that a model writes have no labels to compare faster engines by" if auto else "asked for"
        chosen = Chosen(kinds[0].engine, kinds[0].precision, why)
    else:
        chosen = kept_choice(models.cache, [engine, precision], lambda: choose(models, kinds))
    found = Engine(version, task, models.chosen(chosen), tokenizer, job, chosen)
    found.warm()
    return found
