"""Engines of real models: the same answers from ONNX Runtime as from torch, and what `load` takes and tells."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx import load as load_graph
from onnx import save as save_graph

from banjoray.config.job import JobConfig
from banjoray.data.probe import FILE, read_probe, write_probe
from banjoray.data.tokens import tokenise
from banjoray.errors import ConfigError
from banjoray.models.packed import PackedLinear
from banjoray.models.readout import read_first_only
from banjoray.registry import ModelVersion, Registry
from banjoray.serving import engine as engines
from banjoray.serving import int8, onnx
from banjoray.serving import models as makers
from banjoray.serving.borders import OnBorders
from banjoray.serving.choosing import PLAIN, Kind
from banjoray.serving.engine import Engine, load
from banjoray.serving.models import Models
from banjoray.serving.probe import Probe, probe_for
from banjoray.tasks.text_classification import TextClassification
from banjoray.training.preflight import Ready, prepare
from banjoray.training.strategies import native_bf16
from engines import ask, registered
from factories import make_job, sample_rows
from masked import masked_job
from pairs import nli_job
from problems import problem_job
from questions import base, job_of, rows
from tagged import tagging_job

pytestmark = pytest.mark.usefixtures("own_cache")

TEXTS = [row["text"] for row in sample_rows("test")[:12]]
QUESTIONS = [{key: row[key] for key in ("question", "context")} for row in rows(4, 9)]
JOBS: dict[str, tuple[Callable[[Path], JobConfig], Any]] = {
    "text-classification": (make_job, TEXTS),
    "distilbert": (lambda folder: nli_job(folder, "distilbert", task="text-classification"), TEXTS),
    "roberta": (lambda folder: nli_job(folder, "roberta", task="text-classification"), TEXTS),
    "several-labels": (lambda folder: problem_job(folder, "multi_label"), TEXTS),
    "regression": (lambda folder: problem_job(folder, "regression"), TEXTS),
    "token-classification": (tagging_job, ["Ada Lund meets Bo in New Ulm today .", "Bo"]),
    "question-answering": (
        lambda folder: job_of(folder, base(folder / "base", "bert"), rows(16, 1), rows(8, 2)),
        QUESTIONS,
    ),
    "fill-mask": (masked_job, ["i was in the [MASK] when you saw my old car", "[MASK]"]),
    "feature-extraction": (
        lambda folder: nli_job(folder, task="feature-extraction", train__metric="mrr", registry__gate__metric="mrr"),
        TEXTS,
    ),
}


class Made:
    """A model that was not trained, and what an engine needs of it."""

    def __init__(self, folder: Path, job: JobConfig) -> None:
        self.ready: Ready = prepare(job)
        self.job, self.folder = job, folder
        self.model: Any = self.ready.start.model().eval()
        read_first_only(self.model)
        self.tokenizer = self.ready.start.tokenizer
        self.task = self.ready.task.for_config(self.model.config).for_tokenizer(self.tokenizer)
        self.version = ModelVersion("m", 1, job.task, (), {}, {}, {}, "", "a" * 64, "")
        self.models = Models(self.version, str(folder / "registry"), self.model, self.tokenizer, self.probe)

    def engine(self, kind: Kind) -> Engine:
        return Engine(self.version, self.task, self.models.of(kind), self.tokenizer, self.job)

    def probe(self) -> Probe:
        write_probe(self.ready.splits.validation, 256, self.folder)
        found = probe_for(read_probe(self.folder), self.task, self.tokenizer, self.model.config, self.job)
        assert found is not None
        return found


@pytest.fixture(scope="module", params=JOBS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    job_for, inputs = JOBS[request.param]
    return Made(folder, job_for(folder)), inputs


def numbers(found: Any) -> list[float]:
    """All numbers of an answer, in order."""
    if isinstance(found, dict):
        return [number for key in sorted(found) for number in numbers(found[key])]
    if isinstance(found, list):
        return [number for one in found for number in numbers(one)]
    return [float(found)] if isinstance(found, int | float) else []


def test_onnx_runtime_gives_the_answers_of_torch_alone_and_in_batches(made: tuple[Made, Any]) -> None:
    found, inputs = made
    plain, graph = found.engine(PLAIN), found.engine(Kind("onnx", "fp32"))
    assert type(graph.model) is onnx.OnnxModel
    assert type(graph.model._session).__module__.startswith("onnxruntime")
    request = {"inputs": inputs}
    expected = numbers(ask(plain, request))
    assert len(set(expected)) > 3
    for together in (True, False):
        assert numbers(ask(graph, request, together)) == pytest.approx(expected, abs=1e-4)


def test_attention_is_written_out_in_the_graph_and_stays_as_it_was_in_the_model(made: tuple[Made, Any]) -> None:
    found = made[0]
    found.models.of(Kind("onnx", "fp32"))
    steps = {node.op_type for node in load_graph(found.models.cache / "fp32.onnx").graph.node}
    assert "Softmax" in steps
    # Torch's own attention gives rows of which all is masked zeros.
    assert "IsNaN" not in steps
    assert found.model.config._attn_implementation == "sdpa"


def test_a_graph_has_no_denormals_and_the_thread_that_calls_it_keeps_its_own(tmp_path: Path) -> None:
    cells = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["cells"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["cells"])
    least = helper.make_tensor("least", TensorProto.FLOAT, [], [1e-30])
    steps = helper.make_graph([helper.make_node("Mul", ["x", "least"], ["y"])], "small", [cells], [out], [least])
    opset = helper.make_opsetid("", onnx.OPSET)
    save_graph(helper.make_model(steps, opset_imports=[opset], ir_version=10), tmp_path / "small.onnx")
    model = onnx.OnnxModel(tmp_path / "small.onnx", None, 1)
    small = torch.tensor([1e-10, 1.0])
    assert model(x=small).y.tolist() == [0.0, float(torch.tensor(1e-30))]
    assert (small * 1e-30)[0] > 0


def test_the_graph_in_int8_runs_and_is_near(made: tuple[Made, Any]) -> None:
    found, _ = made
    probe = found.probe()
    plain = probe.outputs(found.model)
    short = probe.outputs(found.models.of(Kind("onnx", "int8")))
    apart = max(float(np.abs(a - b).max()) for a, b in zip(short, plain, strict=True))
    size = max(float(np.abs(a).max()) for a in plain)
    assert 0 < apart < 0.2 * max(1.0, size)
    int8_file = f"int8-{int8.bits()}bit.onnx"
    names = [node.name for node in load_graph(found.models.cache / int8_file).graph.node]
    # By what the probe rows show.
    assert any(name.endswith("/even") for name in names)
    files = {path.name for path in found.models.cache.iterdir()}
    assert {"fp32.onnx", "fp32.onnx.sha256", int8_file, f"{int8_file}.sha256"} <= files


def test_bf16_on_a_cpu_that_has_it_is_packed(made: tuple[Made, Any]) -> None:
    if not native_bf16("cpu"):
        pytest.skip("this processor has no bf16")
    model = made[0].models.of(Kind("torch", "bf16"))
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {PackedLinear}


def test_int8_that_cannot_be_made_leaves_the_others_and_the_reason(
    shelved: tuple[JobConfig, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, reference = shelved

    def broken(*_: object) -> Any:
        raise RuntimeError("no such node")

    monkeypatch.setattr(int8, "largest", broken)
    monkeypatch.setattr(makers, "engine_cache", lambda *_: tmp_path)
    found = load(reference, job.registry.root, "auto", "auto")
    assert found.chosen.precision != "int8"
    assert "onnx int8: onnx: the graph can't be made int8 (RuntimeError: no such node)" in found.chosen.why


def test_a_probe_is_the_rows_of_validation_as_the_task_reads_them(made: tuple[Made, Any]) -> None:
    found, _ = made
    validation = found.ready.splits.validation
    write_probe(validation, 256, found.folder)
    probe = read_probe(found.folder)
    assert probe is not None
    tokens, again = (tokenise(split, found.task, found.tokenizer, found.job.data) for split in (validation, probe))
    for name, stream in tokens.streams.items():
        assert np.array_equal(stream, again.streams[name])
    assert np.array_equal(tokens.targets, again.targets)
    assert {key: [list(cell) for cell in cells] for key, cells in probe.added.items()} == {
        key: [list(cell) for cell in cells] for key, cells in validation.added.items()
    }


def test_a_probe_finds_no_fault_with_the_checkpoint_itself_and_tells_those_of_another_model(
    made: tuple[Made, Any],
) -> None:
    found, _ = made
    probe = found.probe()
    plain = probe.outputs(found.model)
    assert probe.disagreement(plain, plain) == ""
    told = probe.disagreement([1.0 - 3.0 * kept for kept in plain], plain)
    assert "answers are those of fp32, needed 99.5%" in told
    probe.pass_over(found.model)


def test_labels_are_compared_for_the_rows_that_judge(made: tuple[Made, Any]) -> None:
    found = made[0]
    if not found.task.highest_answers:
        pytest.skip("its rows have other answers than one label")
    probe = found.probe()
    wanted = probe.outputs(found.model)
    # Another label for every second row, from the first on.
    given = [-one if at % 2 == 0 else one for at, one in enumerate(wanted)]
    assert probe.disagreement(given, wanted).startswith("50.0% of")
    assert probe.disagreement(given, wanted, slice(0, None, 2)).startswith("0.0% of")
    assert "answers" not in probe.disagreement(given, wanted, slice(1, None, 2))


def test_a_metric_that_is_worse_is_told_though_labels_agree(tmp_path: Path) -> None:
    found = Made(tmp_path, make_job(tmp_path, train__metric="loss", train__mode="min"))
    probe = found.probe()
    plain = probe.outputs(found.model)
    told = probe.disagreement([1000 * kept for kept in plain], plain)
    assert told.startswith("loss is ")
    assert "needed a difference of at most" in told


def test_rows_of_a_probe_come_from_all_over_the_split(tmp_path: Path) -> None:
    validation = prepare(make_job(tmp_path)).splits.validation
    write_probe(validation, 4, tmp_path)
    found = read_probe(tmp_path)
    assert found is not None
    assert found.rows["text"][:] == [validation.rows[number]["text"] for number in (0, 9, 19, 29)]
    write_probe(validation, 0, tmp_path / "none")
    assert read_probe(tmp_path / "none") is None


@pytest.fixture(scope="module")
def shelved(tmp_path_factory: pytest.TempPathFactory, lively_job: Callable[..., JobConfig]) -> tuple[JobConfig, str]:
    job = lively_job(tmp_path_factory.mktemp("shelved"), train__epochs=4)
    return job, str(registered(job))


def test_a_version_holds_its_probe_as_one_of_its_files(shelved: tuple[JobConfig, str]) -> None:
    job, reference = shelved
    version = Registry(job.registry.root).resolve(reference)
    assert FILE in version.files
    assert len((Path(version.location) / FILE).read_text().splitlines()) == 30


def fast(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Whatever is measured, this kind is the fastest, and the others follow as they were given."""
    monkeypatch.setattr(
        makers, "timed", lambda passes: {each: 0.1 if each == kind else 1.0 + at for at, each in enumerate(passes)}
    )


def test_int8_that_disagrees_is_not_taken_and_the_reason_is_told(
    shelved: tuple[JobConfig, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, reference = shelved
    other = Made(tmp_path, make_job(tmp_path))

    def broken(_: Path, file: Path, __: Any) -> None:
        # The graph of a model that knows nothing of the version's labels.
        other.model.classifier.weight.data.uniform_(-1, 1)
        onnx.export(other.model, other.tokenizer, file)

    monkeypatch.setattr(int8, "to_int8", broken)
    monkeypatch.setattr(makers, "engine_cache", lambda *_: tmp_path)
    fast(monkeypatch, Kind("onnx", "int8"))
    found = load(reference, job.registry.root, "auto", "auto")
    assert (found.chosen.engine, found.chosen.precision) != ("onnx", "int8")
    assert "onnx int8: " in found.chosen.why
    assert "answers are those of fp32, needed 99.5%" in found.chosen.why


def test_the_fastest_that_agrees_answers_and_the_next_start_does_not_measure_again(
    shelved: tuple[JobConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, reference = shelved
    fast(monkeypatch, Kind("onnx", "fp32"))
    found = load(reference, job.registry.root, "auto", "auto")
    assert (found.chosen.engine, found.chosen.precision) == ("onnx", "fp32")
    assert "agrees with torch fp32" in found.chosen.why
    plain = load(reference, job.registry.root)
    assert (plain.chosen.engine, plain.chosen.precision, plain.chosen.why) == ("torch", "fp32", "asked for")
    request = {"inputs": TEXTS}
    assert numbers(ask(found, request)) == pytest.approx(numbers(ask(plain, request)), abs=1e-4)
    monkeypatch.setattr(engines, "choose", lambda *_: pytest.fail("it was measured again"))
    again = load(reference, job.registry.root, "auto", "auto")
    assert again.chosen == found.chosen
    assert type(again.model) is onnx.OnnxModel
    # What is kept stands in the registry and is no part of a version.
    assert Registry(job.registry.root).models() == ["tiny"]


def test_int8_leaves_rows_near_a_border_to_fp32_and_the_next_start_does_too(
    shelved: tuple[JobConfig, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, reference = shelved
    monkeypatch.setattr(makers, "engine_cache", lambda *_: tmp_path)
    monkeypatch.setattr(makers, "MOST_AGAIN", 1.0)
    fast(monkeypatch, Kind("onnx", "int8"))
    found = load(reference, job.registry.root, "auto", "auto")
    assert (found.chosen.engine, found.chosen.precision) == ("onnx", "int8")
    assert "are computed in fp32 too" in found.chosen.why
    assert 0 < found.chosen.border < 1
    assert isinstance(found.model, OnBorders)
    assert found.cost()(1, 8) > 0
    rows = [{"text": text} for text in TEXTS]
    plain = load(reference, job.registry.root)
    features = [feature for row in plain.encode(rows) for feature in row]
    outputs, wanted = (np.stack(engine.forward(features)) for engine in (found, plain))
    # Rows near the border, of which a version that was hardly trained has many, and no others, have fp32's logits.
    rounded = found.model.rounded(**found.inputs(features)).logits.numpy()
    highest = np.sort(rounded, axis=1)
    near = highest[:, -1] - highest[:, -2] <= found.chosen.border
    assert near.any()
    assert outputs[near] == pytest.approx(wanted[near], abs=1e-4)
    assert outputs[~near] == pytest.approx(rounded[~near], abs=1e-6)
    monkeypatch.setattr(engines, "choose", lambda *_: pytest.fail("it was measured again"))
    again = load(reference, job.registry.root, "auto", "auto")
    assert isinstance(again.model, OnBorders)
    assert again.chosen == found.chosen


def test_only_labels_that_are_the_highest_logit_have_borders_and_only_narrow_ones(
    made: tuple[Made, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, kind = made[0], Kind("onnx", "int8")
    model = found.models.of(kind)
    monkeypatch.setattr(makers, "MOST_AGAIN", 1.0)
    monkeypatch.setattr(makers, "border_of", lambda *_: 0.1)
    assert found.models.border(kind, model) == (0.1 if type(found.task) is TextClassification else 0)
    assert found.models.border(Kind("onnx", "fp32"), model) == 0
    monkeypatch.setattr(makers, "MOST_AGAIN", -1.0)
    assert found.models.border(kind, model) == 0
    monkeypatch.setattr(makers, "MOST_AGAIN", 1.0)
    monkeypatch.setattr(makers, "border_of", lambda *_: float("nan"))
    assert found.models.border(kind, model) == 0


@pytest.mark.parametrize("kind", [Kind("onnx", "int8"), Kind("torch", "bf16")])
def test_what_is_asked_for_answers(shelved: tuple[JobConfig, str], kind: Kind) -> None:
    job, reference = shelved
    found = load(reference, job.registry.root, kind.engine, kind.precision)
    assert (found.chosen.engine, found.chosen.precision, found.chosen.why) == (kind.engine, kind.precision, "asked for")
    answers = ask(found, {"inputs": TEXTS})
    wanted = ask(load(reference, job.registry.root), {"inputs": TEXTS})
    for one, other in zip(answers, wanted, strict=True):
        expected = {entry["label"]: entry["score"] for entry in other}
        assert {entry["label"]: entry["score"] for entry in one} == pytest.approx(expected, abs=0.15)
    assert numbers(answers) != numbers(wanted)


def test_a_version_without_a_probe_stays_in_fp32_and_says_why(tmp_path: Path) -> None:
    job = make_job(tmp_path, train__epochs=1, registry__probe_rows=0)
    reference = str(registered(job))
    found = load(reference, job.registry.root, "auto", "auto")
    assert (found.chosen.engine, found.chosen.precision) == ("torch", "fp32")
    assert "no probe rows" in found.chosen.why


def test_onnx_without_its_packages_is_refused_and_auto_goes_on_with_torch(
    shelved: tuple[JobConfig, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, reference = shelved
    monkeypatch.setattr(onnx, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(makers, "engine_cache", lambda *_: tmp_path)
    with pytest.raises(ConfigError, match=r"no_such_package not installed \(pip install 'banjoray\[onnx\]'\)"):
        load(reference, job.registry.root, "onnx", "fp32")
    found = load(reference, job.registry.root, "auto", "auto")
    assert found.chosen.engine == "torch"
    assert "no_such_package not installed" in found.chosen.why


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    made = Made(tmp_path, make_job(tmp_path))

    def stuck(*_: Any, **__: Any) -> Any:
        raise RuntimeError("this layer decides by what it sees")

    layer = made.model.base_model.encoder.layer[0]
    layer.register_forward_hook(lambda *_: stuck() if torch._C._get_tracing_state() else None)
    with pytest.raises(
        ConfigError, match=r"BertForSequenceClassification can't be exported \(RuntimeError: this layer"
    ):
        made.models.of(Kind("onnx", "fp32"))
    assert not (made.models.cache / "fp32.onnx").exists()


def test_a_graph_that_is_not_its_model_is_refused(tmp_path: Path) -> None:
    made = Made(tmp_path, make_job(tmp_path))
    graph = made.models.of(Kind("onnx", "fp32"))
    made.model.classifier.bias.data += 1
    with pytest.raises(ConfigError, match="logits of the exported graph and of the model differ by 1"):
        onnx.check(made.model, graph, ("input_ids", "attention_mask"), ("logits",))


def test_the_cost_of_a_pass_is_measured_and_grows_with_it(shelved: tuple[JobConfig, str]) -> None:
    job, reference = shelved
    cost = load(reference, job.registry.root).cost()
    assert 0 < cost(1, 8) <= cost(1, 40) <= cost(16, 40)


def test_a_full_disk_leaves_torch_and_the_reason(
    shelved: tuple[JobConfig, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job, reference = shelved

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(makers, "kept_file", full)
    monkeypatch.setattr(makers, "engine_cache", lambda *_: tmp_path)
    found = load(reference, job.registry.root, "auto", "auto")
    assert found.chosen.engine == "torch"
    assert f"{tmp_path} can't be written to (No space left on device)" in found.chosen.why
