"""A trained encoder as a graph of ONNX in fp32, and ONNX Runtime as a model of a graph."""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from banjoray.errors import ConfigError

# What a tokenizer gives a model, in the order of the graph's inputs.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# What tasks read of a model's outputs.
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")
PACKAGES = ("onnx", "onnxruntime")
# What `serving.int8` adds to a graph is written in this one.
OPSET = 20
# A file holds no more.
LARGEST_GIB = 1.9
# Outputs of the graph and of the model, on rows that the export did not see, differ by no more.
NEAR = 1e-3
# What ONNX Runtime makes of a sum and its norm takes three times what the two take by themselves.
SLOW = ["SkipLayerNormFusion"]


class OnnxModel:
    """A session of ONNX Runtime that is called as the model is: tensors by name in, outputs by name out."""

    def __init__(self, file: Path, config: Any, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        # Threads that spin while they wait take the core that reads requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Its own threads; the one that calls is told at every call.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.log_severity_level = 3
        self.config = config
        with _no_denormals():
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW
            )
        self._inputs = [found.name for found in self._session.get_inputs()]
        self._outputs = [found.name for found in self._session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> SimpleNamespace:
        """The outputs that tasks read; an input that the graph has and nobody gives is zeros, as in transformers."""
        cells = {name: inputs[name].numpy() for name in self._inputs if name in inputs}
        for name in self._inputs:
            if name not in cells:
                cells[name] = np.zeros_like(cells["input_ids"])
        with _no_denormals():
            found = self._session.run(None, cells)
        return SimpleNamespace(**dict(zip(self._outputs, map(torch.from_numpy, found), strict=True)))

    def to(self, device: torch.device) -> "OnnxModel":
        """Itself; raises ConfigError on a device that is no CPU."""
        if device.type != "cpu":
            raise ConfigError(
                f"engine: onnx runs on the CPU here, and this replica has {device.type}; set engine=torch"
            )
        return self


@contextmanager
def _no_denormals() -> Iterator[None]:
    """Numbers below 1.2e-38, in this thread while the block runs, are zero, as a processor has them fastest.

    The runtime's Softmax gives what is masked a probability of that size; of padded rows it takes four times as long
    with them.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def missing_packages() -> str:
    """What has to be installed for ONNX, in words; empty where it is."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed (pip install 'banjoray[onnx]')" if missing else ""


def failed(what: str, error: Exception) -> ConfigError:
    """What can't be done with a graph, and the first line of what ONNX or its runtime said."""
    told = str(error).strip().splitlines() or [""]
    return ConfigError(f"onnx: {what} ({type(error).__name__}: {told[0]})")


class _Flat(nn.Module):
    """A model with its inputs and outputs in a row, as a graph has them."""

    def __init__(self, model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self._inputs, self._outputs = model, inputs, outputs

    def forward(self, *cells: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(self._inputs, cells, strict=True)))
        return tuple(found[name] for name in self._outputs)


def export(model: Any, tokenizer: Any, file: Path) -> None:
    """Write a model in fp32 on the CPU as a graph for any number of rows and tokens.

    Raises ConfigError: a model that can't be written so, or whose graph gives other outputs on rows of another shape.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**30
    if weights > LARGEST_GIB:
        raise ConfigError(f"onnx: the weights take {weights:.1f} GiB; a file of a graph holds {LARGEST_GIB:g}")
    names = tuple(name for name in INPUTS if name in tokenizer.model_input_names or name == "attention_mask")
    example = _example(model, names, rows=2, tokens=11)
    with torch.inference_mode():
        found = model(**example)
    outputs = tuple(name for name in OUTPUTS if found.get(name) is not None)
    if not outputs:
        raise ConfigError(f"onnx: the model gives {', '.join(found)}; needed one of {', '.join(OUTPUTS)}")
    axes = {name: {0: "rows", 1: "tokens"} for name in names}
    for name in outputs:
        # A head that reads one position has no tokens.
        axes[name] = {0: "rows", 1: "tokens"} if found[name].shape[1] == example["input_ids"].shape[1] else {0: "rows"}
    try:
        # In evaluation mode itself: the exporter puts back, in all of it, what it found here.
        _write(
            _Flat(model, names, outputs).eval(), tuple(example[name] for name in names), file, (names, outputs, axes)
        )
        made = OnnxModel(file, model.config, torch.get_num_threads())
    except Exception as error:  # noqa: BLE001  the exporter and the runtime raise whatever a model's code makes them raise
        raise failed(f"{type(model).__name__} can't be exported", error) from None
    check(model, made, names, outputs)


def check(model: Any, made: Any, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Refuse, with a ConfigError, a graph that gives other outputs than its model."""
    for rows, tokens in ((1, 5), (3, 17)):
        example = _example(model, names, rows, tokens)
        with torch.inference_mode():
            wanted, found = model(**example), made(**example)
        for name in outputs:
            # What stands at padding is nobody's answer.
            known = example["attention_mask"].bool() if wanted[name].shape[:2] == (rows, tokens) else slice(None)
            apart = (getattr(found, name)[known] - wanted[name][known]).abs().max().item()
            if not apart <= NEAR * max(1.0, wanted[name].abs().max().item()):
                raise ConfigError(f"onnx: {name} of the exported graph and of the model differ by {apart:.2g}")


def _example(model: Any, names: tuple[str, ...], rows: int, tokens: int) -> dict[str, Tensor]:
    """Rows of words, the last one shorter than the others."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) * 7 % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[-1, tokens - 3 :] = 0
    found = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: found[name] for name in names}


@contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """While the block runs, attention is products and a softmax: torch's own has steps more, for rows all masked."""
    usual = model.config._attn_implementation  # noqa: SLF001  the name by which transformers' own code asks for it
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _write(
    flat: nn.Module,
    example: tuple[Tensor, ...],
    file: Path,
    named: tuple[tuple[str, ...], tuple[str, ...], dict[str, dict[int, str]]],
) -> None:
    inputs, outputs, axes = named
    with warnings.catch_warnings(), torch.no_grad(), _plain_attention(flat.model):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            flat,
            example,
            str(file),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
