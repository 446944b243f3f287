"""A graph of ONNX with the weights of its matrix products in int8, so that few labels become others.

Weights are rounded once, each column with a scale of its own. What they multiply is rounded as the graph runs, with one
scale for all of it, and that is where answers get lost: a few channels, or a few rows, are much larger than the rest,
of which the scale then leaves little. Therefore

- rows that a product makes narrower, as a feed-forward block's second does, are divided by their largest cell before
  it and multiplied after it: an activation's rows differ more than those that come out of a norm;
- channels of what other products are given are evened: divided by one number each, by which the weights are multiplied
  (SmoothQuant, arXiv 2211.10438). They come from how large the channels are on the probe rows.

Products of one position per row (a pooler, a classifier's head) stay in fp32: they cost nothing and decide everything.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from banjoray.serving.onnx import OnnxModel, failed

# How much of the difference between channels the weights take, between 0 and 1; 0.6 to 0.7 made no difference (MiniLM).
TAKEN = 0.65
# A channel is evened by no more.
MOST = 16.0
# A product that leaves so little of the width is a head as well: one that reads every position, of a tagger, say.
HEAD = 8
SILENT = 1e-6
# How far below zero activations come at most.
LOWEST = {"Gelu": 0.17, "Relu": 0.0}
# Passes rows through a model that it is given.
Passes = Callable[[Callable[..., Any]], object]


def to_int8(source: Path, file: Path, passes: Passes | None) -> None:
    """Write a graph with its products in int8, for CPUs of as many `bits` as this one's.

    Channels are evened by what ``passes`` shows, if there is anything.

    MiniLM after two epochs of emotion, 2,000 rows of validation: 99.75 % of the labels are those of fp32, 99.45 % where
    channels are not evened, and 98.85 % with neither.
    Raises ConfigError: a graph of which that can't be made; OSError: no room for the file.
    """
    import onnx

    try:
        model = onnx.load(source)
        turn(model.graph)
        rounded = [product for product in products(model.graph) if product.width * HEAD > product.given]
        if not rounded:
            # An empty list is all of them to what rounds.
            raise ValueError("it has no products but heads")
        if passes is not None:
            peaks = largest(model, file.with_name(f".{file.name}-watched"), passes)
            even(model.graph, peaks, [product.node.name for product in rounded if not product.narrows])
        names = [product.node.name for product in rounded]
        level(model.graph, names)
        _quantize(model, file, names)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  ONNX and its runtime raise whatever a graph makes them raise
        raise failed("the graph can't be made int8", error) from None


def bits() -> int:
    """How many bits of a weight this CPU multiplies right.

    An x86 without VNNI adds two products in 16 bits, where those of 8 bits overflow (ONNX Runtime's documentation of
    quantization); 7 bits fit.
    """
    able = torch.cpu.get_capabilities()
    narrow = able.get("architecture") == "x86_64" and not (able.get("avx512_vnni") or able.get("avx_vnni"))
    return 7 if narrow else 8


def _quantize(model: Any, file: Path, names: list[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # It advises, at every call, to do what is done already or does not help here.
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(
            model,
            file,
            # The word table is read, not multiplied: in int8 it saves no time and costs labels.
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=bits() < 8,
            nodes_to_quantize=names,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Product:
    """A node that multiplies rows by a fixed weight, (given, width); ``alone``: no other node has that weight."""

    node: Any
    stored: Any
    alone: bool

    @property
    def source(self) -> str:
        """The name of what is multiplied."""
        return str(self.node.input[0])

    @property
    def given(self) -> int:
        """How wide a row is that goes in."""
        return int(self.stored.dims[0])

    @property
    def width(self) -> int:
        """And one that comes out."""
        return int(self.stored.dims[1])

    @property
    def narrows(self) -> bool:
        """Whether what comes out is narrower than what goes in."""
        return self.width < self.given

    def weight(self) -> np.ndarray:
        """(given, width)."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.stored)


def products(graph: Any) -> list[Product]:
    """The matrix products of a graph that have a fixed weight."""
    stored = {weight.name: weight for weight in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    return [
        Product(node, found, uses[found.name] == 1)
        for node in graph.node
        if node.op_type == "MatMul" and (found := stored.get(node.input[1])) is not None and len(found.dims) == 2
    ]


def turn(graph: Any) -> None:
    """Write products over rows of all positions at once (GPT-2's) as those of other models, in place.

    They are Gemm, of what a Reshape gives; one of anything else is of one position per row.
    """
    from onnx import helper, numpy_helper

    made = {name: node for node in graph.node for name in node.output}
    stored = {weight.name: weight for weight in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Gemm"]:
        before = made.get(node.input[0])
        told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = told.get("alpha", 1.0) == told.get("beta", 1.0) == 1.0 and not told.get("transA", 0)
        if before is None or before.op_type != "Reshape" or not plain:
            continue
        source, weight, out = node.input[0], node.input[1], node.output[0]
        if told.get("transB", 0):
            turned = np.ascontiguousarray(numpy_helper.to_array(stored[weight]).T)
            weight = f"{out}/turned"
            graph.initializer.append(numpy_helper.from_array(turned, weight))
        bias = list(node.input[2:])
        product = f"{out}/product" if bias else out
        new = [helper.make_node("MatMul", [source, weight], [product], name=f"{node.name}/product")]
        new += [helper.make_node("Add", [product, *bias], [out], name=f"{node.name}/bias")] if bias else []
        _insert(graph, node, new)
        graph.node.remove(node)


def largest(model: Any, file: Path, passes: Passes) -> dict[str, np.ndarray]:
    """Of everything that a product of the graph multiplies: the largest absolute value of each channel, (given,).

    ``file`` is where the graph stands, with all of that among its outputs, while ``passes`` runs.
    """
    import onnx

    graph = model.graph
    known = [output.name for output in graph.output]
    names = sorted({product.source for product in products(graph)})
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    try:
        onnx.save(model, file)
        session = OnnxModel(file, None, torch.get_num_threads())
    finally:
        file.unlink(missing_ok=True)
        del graph.output[len(known) :]
    found: dict[str, np.ndarray] = {}

    def watched(**inputs: Any) -> Any:
        outputs = session(**inputs)
        for name in names:
            cells = np.abs(vars(outputs)[name].numpy())
            peak = cells.reshape(-1, cells.shape[-1]).max(axis=0)
            found[name] = np.maximum(found.get(name, peak), peak)
        return outputs

    passes(watched)
    return found


def even(graph: Any, peaks: Mapping[str, np.ndarray], names: Collection[str]) -> None:
    """Divide what products, of those named, are given by a number per channel, and multiply their weights by it.

    In place. Products of the same rows (query, key and value) share the numbers. A weight that several products use
    (ALBERT's) stays as it is.
    """
    from onnx import helper, numpy_helper

    together: dict[str, list[Product]] = {}
    for product in products(graph):
        if product.node.name in names:
            together.setdefault(product.source, []).append(product)
    for name, group in together.items():
        if name not in peaks or not all(product.alone for product in group):
            continue
        weights = [product.weight() for product in group]
        scale = _scale(peaks[name], np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0))
        _insert(
            graph,
            group[0].node,
            [helper.make_node("Mul", [name, f"{name}/scale"], [f"{name}/evened"], name=f"{name}/even")],
        )
        graph.initializer.append(numpy_helper.from_array(1 / scale, f"{name}/scale"))
        for product, weight in zip(group, weights, strict=True):
            product.stored.CopyFrom(numpy_helper.from_array(weight * scale[:, None], product.stored.name))
            product.node.input[0] = f"{name}/evened"


def _scale(peaks: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The number of each channel, of its largest activation and weight; about 1 in the mean."""
    live = peaks > SILENT
    if not live.any():
        return np.ones(len(peaks), dtype=np.float32)
    # A channel that is silent here may speak elsewhere, and is taken to be as loud as the others then.
    usual = np.exp(np.log(peaks[live]).mean())
    scale = np.where(live, peaks, usual) ** TAKEN / np.maximum(weights, SILENT) ** (1 - TAKEN)
    found: np.ndarray = np.clip(scale / np.exp(np.log(scale).mean()), 1 / MOST, MOST).astype(np.float32)
    return found


def level(graph: Any, names: Collection[str]) -> None:
    """Divide the rows of narrowing products, of those named, by their largest cell; multiply what comes out by it."""
    from onnx import helper, numpy_helper

    made = {name: node.op_type for node in graph.node for name in node.output}
    graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last_axis"))
    for product in products(graph):
        if not product.narrows or product.node.name not in names:
            continue
        node, given, out = product.node, product.source, product.node.output[0]
        # Of the product's own: others may be given the same rows.
        size, found, least, peak, rows = (f"{out}/{each}" for each in ("size", "found", "least", "peak", "level"))
        # Of an activation with little below zero, what is there is never the largest.
        bounded = made.get(given) in LOWEST
        new = [] if bounded else [helper.make_node("Abs", [given], [size], name=f"{size}/node")]
        cells = given if bounded else size
        new += [
            helper.make_node("ReduceMax", [cells, "last_axis"], [found], keepdims=1, name=f"{found}/node"),
            helper.make_node("Max", [found, least], [peak], name=f"{peak}/node"),
            helper.make_node("Div", [given, peak], [rows], name=f"{rows}/node"),
        ]
        floor = np.array(max(LOWEST.get(made.get(given, ""), 0.0), SILENT), dtype=np.float32)
        graph.initializer.append(numpy_helper.from_array(floor, least))
        _insert(graph, node, new)
        node.input[0], node.output[0] = rows, f"{out}/raw"
        at = list(graph.node).index(node) + 1
        graph.node.insert(at, helper.make_node("Mul", [f"{out}/raw", peak], [out], name=f"{out}/node"))


def _insert(graph: Any, node: Any, nodes: list[Any]) -> None:
    """Put nodes before another."""
    at = list(graph.node).index(node)
    for offset, each in enumerate(nodes):
        graph.node.insert(at + offset, each)
