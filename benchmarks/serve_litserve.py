"""LitServe's part of the serving benchmark: `python -m benchmarks.serve_litserve FOLDER PORT fp32|bf16`.

A file of its own, since LitServe's worker processes import the class that they run.
"""

import sys
from collections.abc import Sequence
from typing import Any

import litserve as ls
import torch
from benchmarks.serve_contenders import MAX_LENGTH, PEER_BATCH, PEER_WAIT_S
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(ls.LitAPI):  # type: ignore[misc]
    """Tokenises a batch, pads it to its longest, and answers the best label of each."""

    def __init__(self, folder: str, precision: str) -> None:
        super().__init__(max_batch_size=PEER_BATCH, batch_timeout=PEER_WAIT_S, api_path="/")
        self._folder, self._precision = folder, precision

    def setup(self, device: str) -> None:
        """Load, in a worker's process."""
        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder)
        model = AutoModelForSequenceClassification.from_pretrained(self._folder).eval().to(device)
        self._model = model.to(torch.bfloat16) if self._precision == "bf16" else model

    def decode_request(self, request: dict[str, str]) -> str:
        """The text."""
        return request["inputs"]

    def batch(self, inputs: Sequence[str]) -> list[str]:
        """Texts as they are."""
        return list(inputs)

    def unbatch(self, output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers as they are."""
        return list(output)

    def predict(self, texts: list[str]) -> list[dict[str, Any]]:
        """A label and its score for each."""
        batch = self._tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        with torch.inference_mode():
            scores, best = self._model(**batch).logits.float().softmax(-1).max(-1)
        names = self._model.config.id2label
        pairs = zip(best.tolist(), scores.tolist(), strict=True)
        return [{"label": names[label], "score": score} for label, score in pairs]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """The answer as it is."""
        return output


if __name__ == "__main__":
    folder, port, precision = sys.argv[1:]
    server = ls.LitServer(Classifier(folder, precision), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="error")
