"""Job files and serve configs: what is refused and in which words, and what ``--set`` does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from banjoray.config.job import JobConfig, load_job
from banjoray.config.section import validate
from banjoray.config.serve import ServeConfig
from banjoray.config.train import FreezeBitfit, FreezeLayers, FreezePatterns
from banjoray.errors import ConfigError

SMALLEST = "name: tiny\ntask: text-classification\ndata: {source: 'banjoray:emotion'}\n"
SEARCH = {"tune.space.train.learning_rate": {"loguniform": [1e-5, 1e-3]}}


def job_tree(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest valid job, with dotted keys changed; a key of ``tune.space`` keeps its dots."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "task": "text-classification",
        "data": {"source": "banjoray:emotion"},
    }
    for key, value in changes.items():
        *sections, last = key.split(".", 2) if key.startswith("tune.space.") else key.split(".")
        section = tree
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return tree


def make(changes: Mapping[str, Any]) -> JobConfig:
    return validate(JobConfig, job_tree(changes), "job.yaml")


def complaints(changes: Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(changes)
    return str(caught.value).splitlines()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("trian", "train"),
        ("registry.gate.atleast", "registry.gate.at_least"),
        ("data.text_pair", "data.columns.text_pair"),
        ("train.offload", "scale.offload"),
        ("tune.trails", "tune.trials"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_right_one(key: str, near: str) -> None:
    assert f"job.yaml: unknown key '{key}'; did you mean '{near}'?" in complaints({key: 1})


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    assert complaints({"qqqqqqq": 1}) == ["job.yaml: unknown key 'qqqqqqq'"]


def test_all_mistakes_are_listed_one_a_line() -> None:
    lines = complaints({"train.epochs": 0, "train.batchsize": 1, "scale.workers": "many", "data.labels": ["one"]})
    for start in (
        "job.yaml: train.epochs: found 0, needed ",
        "job.yaml: unknown key 'train.batchsize'; did you mean 'train.batch_size'?",
        "job.yaml: scale.workers: found 'many', needed ",
        "job.yaml: data.labels: found ['one'], needed at least 2",
    ):
        assert [line for line in lines if line.startswith(start)], (start, lines)
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.files": {"train": "a.csv"}}, "data: needs either 'source' or 'files', found both"),
        ({"data.source": None}, "data: needs either 'source' or 'files', found neither"),
        ({"data.source": None, "data.files": {"test": "a.csv"}}, "key 'data.files.train' is missing"),
        ({"train.metric": "loss", "train.mode": "max"}, "train: metric 'loss' with mode 'max'; only loss, "),
        ({"train.mode": "min"}, "train: metric 'f1_macro' with mode 'min'; only loss, perplexity, mae, calibr"),
        (
            {"train.batch_size": 5, "scale.workers": 2, "train.gradient_accumulation_steps": 3},
            "train.batch_size: found 5, needed at least 6 (scale.workers 2 x gradient_accumulation_steps 3)",
        ),
        (
            {"train.batch_size": 7, "scale.workers": [1, 4], "train.gradient_accumulation_steps": 2},
            "train.batch_size: found 7, needed at least 8 (scale.workers 4 x gradient_accumulation_steps 2)",
        ),
        ({"train.checkpoint_every": 0}, "train.checkpoint_every: needs 'epoch' or a number of steps >= 1, found 0"),
        ({"train.checkpoint_every": "step"}, "train.checkpoint_every: found 'step', needed 'epoch'"),
        ({"train.keep_checkpoints": 1}, "train.keep_checkpoints: found 1, needed "),
        ({"name": "two words"}, "name: found 'two words', needed letters, digits"),
        ({"train": None}, "train: found None, needed keys and values"),
        ({"tune.trials": 3}, "key 'tune.space' is missing"),
    ],
)
def test_each_rule_between_keys_is_kept_and_its_breach_named(changes: dict[str, Any], words: str) -> None:
    assert words in "\n".join(complaints(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"train.metric": "loss", "train.mode": "min"},
        {"train.batch_size": 6, "scale.workers": 2, "train.gradient_accumulation_steps": 3},
        {"train.batch_size": 4, "scale.workers": [1, 4]},
        # What counts there is tokens.
        {"train.batch_size": 1, "scale.workers": 4, "train.batching.mode": "tokens"},
        {"train.checkpoint_every": 1},
        {"data.source": None, "data.files": {"train": "a.csv"}},
    ],
)
def test_each_rule_lets_its_border_case_pass(changes: dict[str, Any]) -> None:
    assert make(changes).name == "tiny"


@pytest.mark.parametrize("freeze", ["none", "embeddings", "backbone"])
def test_freeze_takes_each_name(freeze: str) -> None:
    assert make({"freeze": freeze}).freeze == freeze


def test_freeze_takes_a_depth_patterns_or_bitfit() -> None:
    assert make({"freeze": {"layers": 2}}).freeze == FreezeLayers(layers=2)
    assert make({"freeze": {"patterns": ["a.*", "b"]}}).freeze == FreezePatterns(patterns=["a.*", "b"])
    assert make({"freeze": {"bitfit": True}}).freeze == FreezeBitfit(bitfit=True)


@pytest.mark.parametrize(
    "wrong",
    [
        "all",
        None,
        True,
        {},
        ["layers"],
        {"layers": -1},
        {"layers": "two"},
        {"layer": 1},
        {"layers": 1, "patterns": ["a"]},
        {"patterns": []},
        {"patterns": "a"},
        {"patterns": ["a", 1]},
        {"bitfit": False},
        {"bitfit": "yes"},
        {"bitfit": True, "layers": 1},
    ],
    ids=repr,
)
def test_any_other_freeze_gets_one_line_that_lists_the_shapes(wrong: object) -> None:
    needed = "needed none, embeddings, backbone, {layers: k}, {patterns: [...]} or {bitfit: true}"
    assert complaints({"freeze": wrong}) == [f"job.yaml: freeze: found {wrong!r}, {needed}"]


@pytest.mark.parametrize(("workers", "least", "most"), [(1, 1, 1), (4, 4, 4), ([1, 4], 1, 4), ([2, 2], 2, 2)], ids=repr)
def test_workers_are_a_number_or_the_least_and_the_most(workers: object, least: int, most: int) -> None:
    scale = make({"scale.workers": workers}).scale
    assert (scale.least_workers, scale.most_workers) == (least, most)


@pytest.mark.parametrize(
    "wrong",
    [0, -1, True, 2.0, None, "4", [], [1], [0, 1], [4, 1], [1, 2, 3], [1, "2"], [True, 2], {"least": 1}],
    ids=repr,
)
def test_any_other_number_of_workers_gets_one_line_that_says_what_it_may_be(wrong: object) -> None:
    needed = "needed a number >= 1, or [least, most]"
    assert complaints({"scale.workers": wrong}) == [f"job.yaml: scale.workers: found {wrong!r}, {needed}"]


@pytest.mark.parametrize("weights", ["none", "balanced", {"joy": 1}, {"joy": 0.5, "fear": 2}], ids=repr)
def test_class_weights_are_a_name_or_a_weight_for_labels(weights: object) -> None:
    assert make({"train.class_weights": weights}).train.class_weights == weights


@pytest.mark.parametrize(
    "wrong", ["even", None, 2, ["joy"], {}, {"joy": 0}, {"joy": -1.0}, {"joy": True}, {"joy": "2"}], ids=repr
)
def test_any_other_class_weights_get_one_line_that_says_what_they_may_be(wrong: object) -> None:
    needed = "needed none, balanced, or a weight above 0 for labels"
    assert complaints({"train.class_weights": wrong}) == [f"job.yaml: train.class_weights: found {wrong!r}, {needed}"]


def test_an_adapter_sits_where_peft_says_or_on_modules_by_name() -> None:
    for modules in ("auto", ["query", "value"]):
        adapter = make({"adapter.target_modules": modules}).adapter
        assert adapter is not None
        assert adapter.target_modules == modules
    assert make({}).adapter is None


@pytest.mark.parametrize("wrong", ["query", None, 1, [], ["query", 1], {"query": 1}], ids=repr)
def test_any_other_target_modules_get_one_line_that_says_what_they_may_be(wrong: object) -> None:
    needed = "needed auto or a list of module names"
    assert complaints({"adapter.target_modules": wrong}) == [
        f"job.yaml: adapter.target_modules: found {wrong!r}, {needed}"
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "lora"}, "adapter: found 'lora', needed keys and values"),
        ({"adapter.type": "qlora"}, "adapter.type: found 'qlora', needed 'lora', 'dora' or 'ia3'"),
        ({"adapter.r": 0}, "adapter.r: found 0, needed "),
        ({"train.batching": "tokens"}, "train.batching: found 'tokens', needed keys and values"),
        ({"train.batching.mode": "words"}, "train.batching.mode: found 'words', needed 'rows' or 'tokens'"),
        ({"train.batching.max_tokens": 0}, "train.batching.max_tokens: found 0, needed "),
        ({"train.max_tokens": 9}, "unknown key 'train.max_tokens'; did you mean 'train.batching.max_tokens'?"),
        ({"train.layerwise_lr_decay": 1.1}, "train.layerwise_lr_decay: found 1.1, needed "),
        ({"train.max_grad_norm": 0}, "train.max_grad_norm: found 0, needed "),
        ({"train.label_smoothing": 1}, "train.label_smoothing: found 1, needed "),
        ({"train.max_skipped_steps": -1}, "train.max_skipped_steps: found -1, needed "),
        ({"train.early_stopping_patience": 0}, "train.early_stopping_patience: found 0, needed "),
        ({"train.checkpoint_budget_gib": 0}, "train.checkpoint_budget_gib: found 0, needed "),
        ({"scale.collective_timeout_s": 4}, "scale.collective_timeout_s: found 4, needed "),
        ({"scale.offload": "disk"}, "scale.offload: found 'disk', needed 'none', 'cpu' or 'nvme'"),
        ({"tracking": ["comet"]}, "tracking.0: found 'comet', needed 'tensorboard', 'mlflow' or 'wandb'"),
    ],
)
def test_a_wrong_value_of_the_training_engine_is_one_line_with_its_key(changes: dict[str, Any], words: str) -> None:
    (line,) = complaints(changes)
    assert words in line


@pytest.mark.parametrize(
    ("dimension", "words"),
    [
        ({}, "train.learning_rate: needs one of loguniform, uniform and choice, found none"),
        (
            {"uniform": [1, 2], "choice": [1]},
            "train.learning_rate: needs one of loguniform, uniform and choice, found ",
        ),
        ({"uniform": [2, 1]}, "train.learning_rate: uniform needs low < high, found [2.0, 1.0]"),
        ({"uniform": [1, 1]}, "train.learning_rate: uniform needs low < high"),
        ({"loguniform": [0, 1]}, "train.learning_rate: loguniform needs values above 0"),
        ({"loguniform": [1]}, "train.learning_rate.loguniform.1' is missing"),
        ({"choice": []}, "train.learning_rate.choice: found [], needed at least 1"),
        ({"choices": [1]}, "unknown key 'tune.space.train.learning_rate.choices'"),
    ],
)
def test_a_wrong_dimension_is_named_by_the_key_it_searches(dimension: dict[str, Any], words: str) -> None:
    lines = complaints({"tune.space.train.learning_rate": dimension})
    assert len(lines) == 1
    assert "tune.space." in lines[0]
    assert words in lines[0]


def test_set_reads_values_as_yaml(file: Path) -> None:
    job = load_job(
        file,
        [
            "train.epochs=7",
            "train.learning_rate=2e-5",
            "model.dropout=null",
            "hub.offline=true",
            "data.labels=[a, b]",
            "freeze={layers: 3}",
            "data.columns.text=a=b",
        ],
    )
    assert (job.train.epochs, job.train.learning_rate, job.model.dropout) == (7, 2e-5, None)
    assert (job.hub.offline, job.data.labels, job.freeze) == (True, ["a", "b"], FreezeLayers(layers=3))
    assert job.data.columns.text == "a=b"


def test_set_comes_after_the_file_and_the_last_one_counts(file: Path) -> None:
    file.write_text(SMALLEST + "train: {epochs: 2, batch_size: 8}\n", encoding="utf-8")
    job = load_job(file, ["train.epochs=3", "train.epochs=4"])
    assert (job.train.epochs, job.train.batch_size) == (4, 8)


def test_set_makes_sections_that_the_file_lacks(file: Path) -> None:
    job = load_job(file, ["registry.gate.at_least=0.5", "freeze.layers=2"])
    assert job.registry.gate.at_least == 0.5
    assert job.freeze == FreezeLayers(layers=2)


def test_set_replaces_a_name_by_a_section(file: Path) -> None:
    file.write_text(SMALLEST + "freeze: backbone\n", encoding="utf-8")
    assert load_job(file, ["freeze.layers=2"]).freeze == FreezeLayers(layers=2)


def test_set_keeps_the_dots_of_a_searched_key(file: Path) -> None:
    job = load_job(file, ["tune.space.train.learning_rate={loguniform: [1e-5, 1e-3]}", "tune.trials=3"])
    assert job.tune is not None
    assert list(job.tune.space) == ["train.learning_rate"]
    assert job.tune.space["train.learning_rate"].loguniform == (1e-5, 1e-3)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "unknown key 'train.epoch'; did you mean 'train.epochs'?"),
        ("train.epochs", "--set train.epochs: needed key=value, as --set train.epochs=1"),
        ("=3", "--set =3: needed key=value"),
        ("train.epochs=[1", "--set train.epochs=[1: the value is not YAML (line 1: "),
        ("train.epochs=", "train.epochs: found None, needed "),
        ("train.epochs=0", "train.epochs: found 0, needed "),
    ],
)
def test_a_wrong_set_is_refused_with_its_key(file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(file, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "not YAML (line 1: "),
        (b"- a", "needed keys and values, found list"),
        (b"", "needed keys and values, found NoneType"),
        (b"a: \xff", "not YAML ("),
        (None, "can't be read (No such file"),
    ],
)
def test_a_file_that_is_no_job_is_refused_with_its_name(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_job(path)
    assert str(caught.value).startswith(f"{path}: {words}")


def test_yaml_without_a_dot_in_the_mantissa_is_still_a_number(file: Path) -> None:
    # YAML 1.1 reads 2e-5 as text; people write it all the same.
    file.write_text(SMALLEST + "train: {learning_rate: 2e-5, adam_epsilon: 1e-06}\n", encoding="utf-8")
    assert (load_job(file).train.learning_rate, load_job(file).train.adam_epsilon) == (2e-5, 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SEARCH,
        {"freeze": {"layers": 2}},
        {"freeze": {"patterns": ["a"]}},
        {"freeze": {"bitfit": True}},
        {"train.checkpoint_every": 9},
        {"train.class_weights": {"joy": 2}},
        {"scale.workers": [1, 4]},
        {"adapter": {"type": "dora", "target_modules": ["query"]}},
        {"tracking": []},
    ],
    ids=repr,
)
def test_a_job_comes_back_equal_from_json(changes: dict[str, Any]) -> None:
    job = make(changes)
    assert validate(JobConfig, json.loads(json.dumps(job.to_json())), "json") == job


def test_with_values_is_a_checked_copy() -> None:
    job = make({})
    other = job.with_values({"train.epochs": 9, "freeze": {"layers": 1}})
    assert (job.train.epochs, other.train.epochs, other.freeze) == (3, 9, FreezeLayers(layers=1))
    with pytest.raises(ConfigError, match=r"tiny: train\.epochs: found 0"):
        job.with_values({"train.epochs": 0})


@pytest.mark.parametrize(
    ("problem", "metric"), [("single_label", "f1_macro"), ("multi_label", "f1_macro"), ("regression", "pearson")]
)
def test_the_usual_metric_is_that_of_the_problem_type(problem: str, metric: str) -> None:
    job = make({"classification": {"problem_type": problem}})
    assert (job.train.metric, job.train.mode, job.registry.gate.metric) == (metric, "max", metric)
    for less in ("mae", "calibration_error"):
        assert make({"train.metric": less}).train.mode == "min"


def test_only_text_classification_has_a_problem_type() -> None:
    classified = {"classification": {"problem_type": "multi_label"}}
    assert complaints({"task": "token-classification", **classified}) == [
        "job.yaml: classification: found it with task token-classification; text-classification alone reads it; "
        "leave it out"
    ]
    (line,) = complaints({"classification": {"problem_type": "many"}})
    assert line.startswith("job.yaml: classification.problem_type: found 'many', needed 'single_label', 'multi_label'")


def test_a_config_cannot_be_changed() -> None:
    job = make({})
    for section, key in ((job, "name"), (job.train, "epochs"), (job.registry.gate, "at_least")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_a_serve_config_knows_its_keys_and_their_limits() -> None:
    config = validate(ServeConfig, {"model": "emotion@production", "max_rows": 3}, "args")
    assert (config.model, config.max_rows) == ("emotion@production", 3)
    wrong = {"max_row": 1, "max_batch_tokens": 3, "max_body_mib": 0}
    with pytest.raises(ConfigError) as caught:
        validate(ServeConfig, wrong, "args")
    lines = str(caught.value).splitlines()
    assert "args: unknown key 'max_row'; did you mean 'max_rows'?" in lines
    assert len(lines) == 3
    neither: dict[str, object] = {}
    for none_or_both in (neither, {"model": "a@1", "models": ["b@1"]}):
        with pytest.raises(ConfigError, match="args: found neither model nor models, or both"):
            validate(ServeConfig, none_or_both, "args")
    with pytest.raises(ConfigError, match="needed another name for each"):
        validate(ServeConfig, {"models": ["a@1", "a@2"]}, "args")
    assert validate(ServeConfig, {"models": ["a@1", "b@2"]}, "args").references == ("a@1", "b@2")
