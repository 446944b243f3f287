"""Graphs with products in int8: what is changed before rounding changes no output, and what it is there for."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from banjoray.serving.int8 import MOST, even, largest, level, products, to_int8
from banjoray.serving.onnx import OPSET, OnnxModel

WIDTH, WIDE, LABELS = 32, 64, 4


def graph(shared: bool = False, seed: int = 0) -> Any:
    """Feed-forward: (rows, tokens, 32) made wider, then narrower, then labels; ``shared``: its first weight twice."""
    rng = np.random.default_rng(seed)
    sizes = {"up": (WIDTH, WIDE), "down": (WIDE, WIDTH), "head": (WIDTH, LABELS)}
    weights = [numpy_helper.from_array(rng.normal(size=size).astype(np.float32), name) for name, size in sizes.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["wide"], name="first"),
        helper.make_node("Relu", ["wide"], ["active"], name="activation"),
        helper.make_node("MatMul", ["active", "down"], ["states"], name="second"),
        helper.make_node("MatMul", ["states", "head"], ["logits"], name="third"),
    ]
    outputs = ["states", "logits"]
    if shared:
        nodes.append(helper.make_node("MatMul", ["states", "up"], ["again"], name="fourth"))
        outputs.append("again")
    made = helper.make_graph(
        nodes,
        "feed_forward",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "tokens", None]) for name in outputs],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


def cells(rows: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, 5, WIDTH)).astype(np.float32))


def ran(model: Any, x: torch.Tensor, name: str = "states") -> np.ndarray:
    content = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    return np.asarray(vars(OnnxModel(content, None, 1)(x=x))[name])


@pytest.mark.parametrize("shared", [False, True])
def test_evening_and_levelling_change_no_output(shared: bool) -> None:
    model, x = graph(shared), cells()
    x[..., 3] *= 40
    wanted = {name: ran(model, x, name) for name in ("states", "logits")}
    peaks = largest(model, lambda run: run(x=x))
    assert sorted(peaks) == ["active", "states", "x"]
    assert peaks["x"] == pytest.approx(np.abs(x.numpy()).max(axis=(0, 1)))
    even(model.graph, peaks)
    level(model.graph)
    onnx.checker.check_model(model)
    for name, found in wanted.items():
        assert ran(model, x, name) == pytest.approx(found, rel=1e-4, abs=1e-3)
    given = {product.node.name: product.given for product in products(model.graph)}
    # A weight that others multiply too stays what it is; so does what it is given.
    assert given["first"] == ("x" if shared else "x/evened")


def test_a_channel_that_is_larger_than_the_others_costs_little_once_it_is_evened(tmp_path: Path) -> None:
    onnx.save(graph(), tmp_path / "graph.onnx")
    x = cells(64)
    x[..., 3] *= 100
    wanted = ran(graph(), x)
    to_int8(tmp_path / "graph.onnx", tmp_path / "plain.onnx", None)
    to_int8(tmp_path / "graph.onnx", tmp_path / "evened.onnx", lambda run: run(x=x))
    plain, evened = (np.abs(ran(tmp_path / f"{name}.onnx", x) - wanted).mean() for name in ("plain", "evened"))
    assert 0 < evened < plain / 2


def test_a_row_that_is_larger_than_the_others_costs_them_little_where_it_becomes_narrower(tmp_path: Path) -> None:
    model = graph()
    # The narrowing product alone, of rows as they come.
    del model.graph.node[0]
    model.graph.node[0].input[0] = "x"
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = WIDE
    onnx.save(model, tmp_path / "graph.onnx")
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(8, 5, WIDE)).astype(np.float32))
    alone = x[:7]
    x[7] *= 1000
    to_int8(tmp_path / "graph.onnx", tmp_path / "int8.onnx", None)
    wanted, found = ran(model, alone), ran(tmp_path / "int8.onnx", x)[:7]
    assert np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


def test_products_are_in_int8_and_a_head_is_not(tmp_path: Path) -> None:
    onnx.save(graph(), tmp_path / "graph.onnx")
    to_int8(tmp_path / "graph.onnx", tmp_path / "int8.onnx", lambda run: run(x=cells()))
    made = onnx.load(tmp_path / "int8.onnx").graph
    assert [node.name for node in made.node if node.op_type == "MatMul"] == ["third"]
    assert len([node for node in made.node if node.op_type == "MatMulInteger"]) == 2


def test_a_channel_that_was_silent_is_not_made_loud() -> None:
    model, x = graph(), cells()
    x[..., 3] = 0
    even(model.graph, largest(model, lambda run: run(x=x)))
    (scale,) = (numpy_helper.to_array(found) for found in model.graph.initializer if found.name == "x/scale")
    assert scale.max() == pytest.approx(MOST)
    spoken = cells(seed=2)
    assert ran(model, spoken) == pytest.approx(ran(graph(), spoken), rel=1e-4, abs=1e-3)
