"""A registered version, loaded and ready to answer. Knows nothing of Ray or HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from banjoray.config.job import load_job
from banjoray.data.batches import padded
from banjoray.data.tokens import Tokens
from banjoray.models.loading import labels_of, load_trained, quiet_libraries
from banjoray.registry import ModelVersion, Registry
from banjoray.tasks.task import Task, task_for
from banjoray.training.scoring import to_tensors


@dataclass(frozen=True)
class Encoded:
    """One row as token ids: model input -> ids, all of the same length."""

    inputs: dict[str, list[int]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


class Engine:
    """The model of one version on one device, in fp32: answers are those of the checkpoint."""

    def __init__(self, version: ModelVersion, task: Task, model: Any, tokenizer: Any, max_length: int) -> None:
        self.version = version
        self.task = task
        self.labels = labels_of(model)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device)
        self._tokenizer = tokenizer
        self._max_length = max_length

    def encode(self, rows: Sequence[dict[str, str]]) -> list[Encoded]:
        """Rows as token ids, cut where training cut them."""
        encoded: list[Encoded] = []
        for row in rows:
            ids = self._tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=self._max_length)
            encoded.append(Encoded({name: ids[name] for name in ("input_ids", "token_type_ids") if name in ids}))
        return encoded

    def forward(self, rows: Sequence[Encoded]) -> np.ndarray:
        """The raw outputs of some rows, (rows, outputs) fp32, in their order; one pass through the model."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64)
        streams = {
            name: np.fromiter((number for row in rows for number in row.inputs[name]), dtype=np.int64)
            for name in rows[0].inputs
        }
        tokens = Tokens(streams, np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(rows), dtype=np.int64))
        batch = padded(tokens, np.arange(len(rows)), self._tokenizer.pad_token_id)
        with torch.inference_mode():
            outputs: np.ndarray = self._model(**to_tensors(batch, self._device)).logits.float().cpu().numpy()
        return outputs


def load(reference: str, registry: str) -> Engine:
    """The engine of ``name@version`` or ``name@alias``; the first pass is made here, so that no request waits for it.

    Raises RegistryError, and BrokenVersion if a file differs from its manifest.
    """
    quiet_libraries()
    store = Registry(registry)
    version = store.resolve(reference)
    folder = store.fetch(version)
    task = task_for(version.task)
    model, tokenizer = load_trained(folder, task)
    engine = Engine(version, task, model, tokenizer, load_job(folder / "job.yaml").data.max_length)
    engine.forward(engine.encode([{"text": "warm up"}]))
    return engine
