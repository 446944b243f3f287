"""Graphs with products in int8: what is changed before rounding changes no output, and what it is there for."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from banjoray.errors import ConfigError
from banjoray.serving.int8 import even, largest, level, products, to_int8, turn
from banjoray.serving.onnx import OPSET, OnnxModel

WIDTH, WIDE, LABELS = 32, 64, 4


def graph(shared: bool = False, seed: int = 0, activation: str = "Relu") -> Any:
    """Feed-forward: (rows, tokens, 32) made wider, then narrower, then labels; ``shared``: its first weight twice."""
    rng = np.random.default_rng(seed)
    sizes = {"up": (WIDTH, WIDE), "down": (WIDE, WIDTH), "head": (WIDTH, LABELS)}
    weights = [numpy_helper.from_array(rng.normal(size=size).astype(np.float32), name) for name, size in sizes.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["wide"], name="first"),
        helper.make_node(activation, ["wide"], ["active"], name="activation"),
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
    """An output of a model, or of the file of one."""
    with tempfile.TemporaryDirectory() as folder:
        file = model if isinstance(model, Path) else Path(folder) / "graph.onnx"
        if file is not model:
            onnx.checker.check_model(model)
            onnx.save(model, file)
        return np.asarray(vars(OnnxModel(file, None, 1)(x=x))[name])


def apart(model: Any, x: torch.Tensor, folder: Path, seen: torch.Tensor | None = None) -> float:
    """How far states in int8 are from those in fp32, in the mean; ``seen``: rows that channels are evened by."""
    onnx.save(model, folder / "graph.onnx")
    to_int8(folder / "graph.onnx", folder / "int8.onnx", None if seen is None else lambda run: run(x=seen))
    return float(np.abs(ran(folder / "int8.onnx", x) - ran(model, x)).mean())


@pytest.mark.parametrize("shared", [False, True])
def test_evening_and_levelling_change_no_output(shared: bool, tmp_path: Path) -> None:
    model, x = graph(shared), cells()
    x[..., 3] *= 40
    wanted = {name: ran(model, x, name) for name in ("states", "logits")}
    peaks = largest(model, tmp_path / "watched", lambda run: run(x=x))
    assert list(tmp_path.iterdir()) == []
    assert sorted(peaks) == ["active", "states", "x"]
    assert peaks["x"] == pytest.approx(np.abs(x.numpy()).max(axis=(0, 1)))
    even(model.graph, peaks, ["first"])
    level(model.graph, ["second"])
    for name, found in wanted.items():
        assert ran(model, x, name) == pytest.approx(found, rel=1e-4, abs=1e-3)
    sources = {product.node.name: product.source for product in products(model.graph)}
    # A weight that others multiply too stays what it is; so does what it is given.
    assert sources["first"] == ("x" if shared else "x/evened")
    assert sources["second"] == "states/level"


@pytest.mark.parametrize("activation", ["Relu", "Gelu", "Elu", "Identity"])
def test_rows_are_levelled_by_their_largest_cell_on_either_side_of_zero(activation: str) -> None:
    model = graph(activation=activation)
    x = cells(4)
    # A row that nearly all of is below zero, and one of nothing.
    x[2] = -50 * x[2].abs()
    x[3] = 0
    wanted = ran(model, x)
    level(model.graph, ["second"])
    shape: list[str | int | None] = ["rows", "tokens", WIDE]
    model.graph.output.append(helper.make_tensor_value_info("states/level", TensorProto.FLOAT, shape))
    assert ran(model, x) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
    rows = np.abs(ran(model, x, "states/level")).max(axis=-1)
    assert rows[:3] == pytest.approx(1)
    assert rows[3] == pytest.approx(0)
    # One pass less over rows of which no cell is far below zero.
    assert ("Abs" in {node.op_type for node in model.graph.node}) == (activation in ("Elu", "Identity"))


def test_channels_are_evened_for_products_in_int8_that_do_not_narrow(tmp_path: Path) -> None:
    apart(graph(), cells(), tmp_path, seen=cells())
    made = onnx.load(tmp_path / "int8.onnx").graph
    assert [node.name for node in made.node if node.name.endswith("/even")] == ["x/even"]


def test_a_channel_that_is_larger_than_the_others_costs_little_once_it_is_evened(tmp_path: Path) -> None:
    x = cells(64)
    x[..., 3] *= 100
    assert 0 < apart(graph(), x, tmp_path, seen=x) < apart(graph(), x, tmp_path) / 2


def test_channels_that_were_silent_cost_no_more_than_without_evening_when_they_speak(tmp_path: Path) -> None:
    seen, spoken = cells(64), cells(64, seed=2)
    for x in (seen, spoken):
        x[..., 3] *= 100
    seen[..., 8:] = 0
    assert apart(graph(), spoken, tmp_path, seen=seen) < apart(graph(), spoken, tmp_path) / 2
    nothing = torch.zeros_like(seen)
    assert apart(graph(), spoken, tmp_path, seen=nothing) == pytest.approx(apart(graph(), spoken, tmp_path), rel=0.2)


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


@pytest.mark.parametrize(
    ("able", "bits"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_vnni": False, "avx_vnni": False}, 7),
        ({"architecture": "x86_64", "avx512_vnni": True, "avx_vnni": False}, 8),
        ({"architecture": "x86_64", "avx512_vnni": False, "avx_vnni": True}, 8),
        ({"architecture": "aarch64"}, 8),
    ],
)
def test_weights_have_the_bits_that_the_processor_multiplies_without_overflow(
    able: dict[str, Any], bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    onnx.save(graph(), tmp_path / "graph.onnx")
    to_int8(tmp_path / "graph.onnx", tmp_path / "int8.onnx", None)
    stored = [numpy_helper.to_array(one) for one in onnx.load(tmp_path / "int8.onnx").graph.initializer]
    weights = [one for one in stored if one.dtype == np.int8 and one.ndim == 2]
    assert len(weights) == 2
    # Each column is rounded so that its largest cell takes what there is.
    assert {int(np.abs(one.astype(int)).max()) for one in weights} == {2 ** (bits - 1) - (bits == 8)}


def test_products_are_in_int8_and_a_head_is_not(tmp_path: Path) -> None:
    apart(graph(), cells(), tmp_path, seen=cells())
    made = onnx.load(tmp_path / "int8.onnx").graph
    assert [node.name for node in made.node if node.op_type == "MatMul"] == ["third"]
    assert len([node for node in made.node if node.op_type == "MatMulInteger"]) == 2


@pytest.mark.parametrize("turned", [0, 1])
def test_rows_of_all_positions_are_turned_into_products_and_one_position_per_row_stays(turned: int) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(WIDTH, WIDE) if not turned else (WIDE, WIDTH)).astype(np.float32)
    stored = [
        numpy_helper.from_array(weight, "weight"),
        numpy_helper.from_array(rng.normal(size=WIDE).astype(np.float32), "bias"),
        numpy_helper.from_array(np.array([-1, WIDTH]), "flat"),
        numpy_helper.from_array(np.array(0), "first"),
    ]
    nodes = [
        helper.make_node("Reshape", ["x", "flat"], ["rows"], name="flatten"),
        helper.make_node("Gemm", ["rows", "weight", "bias"], ["states"], name="conv", transB=turned),
        helper.make_node("Gather", ["x", "first"], ["position"], name="pick", axis=1),
        helper.make_node("Gemm", ["position", "weight", "bias"], ["pooled"], name="pooler", transB=turned),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", WIDE]) for name in ("states", "pooled")]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", "tokens", WIDTH])]
    made = helper.make_graph(nodes, "flat", given, outputs, stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    wanted = {name: ran(model, cells(), name) for name in ("states", "pooled")}
    turn(model.graph)
    assert [node.op_type for node in model.graph.node] == ["Reshape", "MatMul", "Add", "Gather", "Gemm"]
    assert [(product.given, product.width) for product in products(model.graph)] == [(WIDTH, WIDE)]
    for name, found in wanted.items():
        assert ran(model, cells(), name) == pytest.approx(found, rel=1e-5, abs=1e-5)


def test_a_graph_that_cannot_be_made_int8_is_refused_with_the_reason(tmp_path: Path) -> None:
    onnx.save(graph(), tmp_path / "graph.onnx")

    def failing(_: object) -> None:
        raise RuntimeError("no rows today")

    with pytest.raises(ConfigError, match=r"the graph can't be made int8 \(RuntimeError: no rows today\)"):
        to_int8(tmp_path / "graph.onnx", tmp_path / "int8.onnx", failing)


def test_a_graph_of_heads_alone_stays_in_fp32(tmp_path: Path) -> None:
    model = graph()
    del model.graph.node[:3]
    model.graph.node[0].input[0] = "x"
    del model.graph.output[0]
    onnx.save(model, tmp_path / "graph.onnx")
    with pytest.raises(ConfigError, match="it has no products but heads"):
        to_int8(tmp_path / "graph.onnx", tmp_path / "int8.onnx", None)
