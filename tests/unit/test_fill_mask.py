"""Fill-mask: what is read, refused, learned and scored; answers are tested in test_fill_mask_answers.py."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch.nn import functional
from transformers.modeling_outputs import MaskedLMOutput

from banjoray.config.job import JobConfig
from banjoray.config.section import validate
from banjoray.data.batches import padded, targets_of
from banjoray.data.splits import Split
from banjoray.data.tokens import IGNORED, Tokens, tokens_of
from banjoray.errors import ConfigError, DataError, GateRefused, ModelError
from banjoray.models.readout import read_first_only
from banjoray.registry import ModelVersion, Registry
from banjoray.tasks.fill_mask import FillMask
from banjoray.tasks.task import check_metrics
from banjoray.training.checkpoints import Store
from banjoray.training.clock import Clock
from banjoray.training.compatibility import check
from banjoray.training.interface import Callbacks
from banjoray.training.learned import ROWS as NARROWED
from banjoray.training.learned import WEIGHTS
from banjoray.training.loop import fit
from banjoray.training.objective import Objective
from banjoray.training.prefix_cache import kept_prefix
from banjoray.training.preflight import prepare
from banjoray.tuning.plan import plan
from engines import registered
from factories import make_job, tiny_model, write_rows
from masked import FAMILIES, ROWS, masked_base, masked_job, pieces_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = FillMask()
TEXT = "He sprang out of bed with a whoop, thrilled!"
LONG = " ".join([TEXT] * 9)
WORDS = ("i", "was", "in", "the", "dark", "when", "you", "saw", "my", "old", "car")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return masked_job(tmp_path_factory.mktemp("fill-mask"))


def test_its_usual_metric_is_minimised_and_its_gate_says_at_most() -> None:
    tree: dict[str, Any] = {"name": "t", "task": "fill-mask", "data": {"source": "banjoray:emotion"}}
    job = validate(JobConfig, tree | {"registry": {"gate": {"at_most": 20}}}, "job")
    assert (job.train.metric, job.train.mode) == ("perplexity", "min")
    assert (job.registry.gate.metric, job.registry.gate.at_most) == ("perplexity", 20)
    check_metrics(job)
    for gate, words in (
        ({"at_least": 3}, "registry.gate: at_least: found 3 with metric perplexity, of which less is better; set at_m"),
        ({"metric": "accuracy", "at_most": 0.5}, "registry.gate: at_most: found 0.5 with metric accuracy, of which mo"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(JobConfig, tree | {"registry": {"gate": gate}}, "job")
    for share in (0, 1, -0.1):
        with pytest.raises(ConfigError, match=r"train\.masking\.share: found"):
            job.with_values({"train.masking.share": share})


@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_texts_are_read_from_files_of_every_kind(suffix: str, tmp_path: Path) -> None:
    texts = ["first text", "the second, longer", "third"]
    lines = {"txt": texts, "csv": ["text", *(f'"{text}"' for text in texts)]}
    lines["jsonl"] = [json.dumps({"text": text, "other": 1}) for text in texts]
    path = tmp_path / f"rows.{suffix}"
    path.write_text("\n".join(lines[suffix]) + "\n", encoding="utf-8")
    files = {"train": str(path), "validation": str(path), "test": None}
    splits = TASK.splits(masked_job(tmp_path, data__files=files))
    assert list(splits.train.rows["text"]) == texts
    assert splits.labels == ()


def test_a_row_without_a_text_is_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "fine"}, {"text": "  "}])
    job = masked_job(tmp_path, data__files={"train": str(path), "validation": None, "test": None})
    with pytest.raises(DataError, match=r"rows\.jsonl row 2, column 'text' holds only blanks; needed text"):
        TASK.splits(job)
    with pytest.raises(DataError, match=r"column 'body' not in rows\.jsonl; it has 'text'\. Set data\.columns\.text"):
        TASK.splits(job.with_values({"data.columns.text": "body"}))


def test_a_long_text_gives_several_features_and_nothing_of_it_is_lost(job: JobConfig) -> None:
    tokenizer = pieces_tokenizer()
    whole = tokenizer([TEXT, LONG], add_special_tokens=False)["input_ids"]
    data = job.data.model_copy(update={"max_length": 20})
    found = TASK.encode({"text": [TEXT, LONG]}, tokenizer, data)
    assert len(whole[0]) == 14
    assert found.rows == [0] + [1] * 7
    assert [len(ids) for ids in found.inputs["input_ids"]] == [16] + [20] * 7
    assert found.cut == 0
    for row, ids in enumerate(whole):
        parts = [part for part, of in zip(found.inputs["input_ids"], found.rows, strict=True) if of == row]
        assert all((part[0], part[-1]) == (2, 3) for part in parts)
        assert [number for part in parts for number in part[1:-1]] == ids


def test_tokens_of_a_word_bear_its_number_and_special_ones_none(job: JobConfig) -> None:
    tokenizer = pieces_tokenizer()
    found = TASK.encode({"text": ["Sausages thrilled [MASK] zzz the machine [SEP]"]}, tokenizer, job.data)
    assert found.targets is not None
    pieces = tokenizer.convert_ids_to_tokens(found.inputs["input_ids"][0])
    told = list(zip(pieces, found.targets[0], strict=True))
    no = IGNORED
    # zzz is no word of the tokenizer: what is unknown teaches nothing.
    assert told == [
        ("[CLS]", no), ("saus", 0), ("##ages", 0), ("thri", 1), ("##lled", 1), ("[MASK]", no), ("[UNK]", no),
        ("the", 4), ("mach", 5), ("##ine", 5), ("[SEP]", no), ("[SEP]", no),
    ]  # fmt: skip


def test_a_tokenizer_in_python_cuts_the_same_windows_but_knows_no_words(job: JobConfig, tmp_path: Path) -> None:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    fast = pieces_tokenizer()
    words = sorted(fast.get_vocab(), key=fast.get_vocab().__getitem__)
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    slow = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    data = job.data.model_copy(update={"max_length": 20})
    rows = {"text": [TEXT, LONG, " "]}
    expected, found = TASK.encode(rows, fast, data), TASK.encode(rows, slow, data)
    assert list(found.rows) == list(expected.rows)
    assert found.inputs["input_ids"] == expected.inputs["input_ids"]
    assert expected.targets is not None
    assert found.targets is not None
    for ours, theirs in zip(found.targets, expected.targets, strict=True):
        assert [number == IGNORED for number in ours] == [number == IGNORED for number in theirs]
    config = prepare(job).start.model().config
    assert TASK.collate(job, slow, config) is not None
    with pytest.raises(ConfigError, match=r"train\.masking\.whole_words: BertTokenizerLegacy does not tell which"):
        TASK.collate(job.with_values({"train.masking.whole_words": True}), slow, config)


def test_a_model_without_a_mask_token_or_a_head_is_refused_before_anything_starts(tmp_path: Path) -> None:
    job = masked_job(tmp_path, model__base=str(tiny_model(tmp_path / "gpt2", "gpt2")))
    with pytest.raises(
        ModelError, match=r"model\.base: the tokenizer of '.*gpt2' \(gpt2\) has no mask token; .* as dis"
    ):
        prepare(job)
    pieces_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(
        ModelError, match=r"model\.base: '.*gpt2' \(gpt2\) has no head that fills masks .* take an enco"
    ):
        prepare(job)


def test_kept_states_are_refused_and_the_plan_says_why_there_are_none(job: JobConfig) -> None:
    always = job.with_values({"cache.prefix": "always", "freeze": "backbone"})
    with pytest.raises(ConfigError, match=r"^cache\.prefix: found always with task fill-mask, which .*=auto$"):
        check(always)
    with pytest.raises(ConfigError, match="found always with task fill-mask"):
        plan(always)
    (frozen,) = plan(job.with_values({"freeze": "backbone", "train.epochs": 50})).freezes
    assert (frozen.keep, frozen.prefix_bytes) == (False, 0)
    assert frozen.reason == "fill-mask gives the model a row in other ways than by its words alone"


def tokens_for(job: JobConfig, texts: list[str]) -> Tokens:
    return tokens_of([TASK.encode({"text": texts}, pieces_tokenizer(), job.data)])


@pytest.mark.parametrize("whole_words", [False, True])
def test_what_features_weigh_is_how_many_targets_they_have_in_every_epoch(job: JobConfig, whole_words: bool) -> None:
    changed = job.with_values({"train.masking": {"share": 0.3, "whole_words": whole_words}})
    tokens = tokens_for(changed, [TEXT, "lake", " ", LONG])
    tokenizer = pieces_tokenizer()
    collate = TASK.collate(changed, tokenizer, prepare(changed).start.model().config)
    rows = np.arange(len(tokens))
    weights = TASK.weights(tokens, changed)
    assert weights.dtype == np.float32
    assert weights[:3].tolist() == [4, 1, 0]
    for epoch in (None, 0, 1, 2):
        _, targets = collate(padded(tokens, rows, 0), targets_of(tokens, rows), rows, epoch)
        assert ((targets != IGNORED).sum(1) == weights).all()


def drawn(rows: int = 5, tokens: int = 7, words: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, tokens, words), and targets (rows, tokens), none in the last row."""
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, words, (rows, tokens), generator=generator)
    targets[torch.rand(rows, tokens, generator=generator) < 0.6] = IGNORED
    targets[-1] = IGNORED
    return torch.randn(rows, tokens, words, generator=generator) * 3, targets


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_feature_is_torchs_mean_over_its_hidden_tokens(smoothing: float) -> None:
    logits, targets = drawn()
    logits.requires_grad_()
    found = TASK.losses(MaskedLMOutput(logits=logits), targets, smoothing)
    for row, value in enumerate(found[:-1]):
        expected = functional.cross_entropy(logits[row], targets[row], label_smoothing=smoothing)
        torch.testing.assert_close(value, expected)
    assert found[-1] == 0
    known = (targets != IGNORED).sum(1)
    whole = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    torch.testing.assert_close((found * known).sum() / known.sum(), whole)
    gradient = torch.autograd.grad(found.sum(), logits)[0]
    assert torch.isfinite(gradient).all()
    assert (gradient[targets == IGNORED] == 0).all()


def test_a_batch_in_which_nothing_is_hidden_has_a_loss_of_nothing(job: JobConfig) -> None:
    tokens = tokens_for(job, [" ", " ", TEXT])
    objective = Objective(job, TASK, tokens, ())
    rows = np.array([0, 1])
    assert objective.total(rows) == 0
    logits = torch.randn(2, 2, 50, requires_grad=True)
    share = objective.share(rows, np.full((2, 2), IGNORED), 0.0, empty=False)
    loss = share(MaskedLMOutput(logits=logits))
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_the_score_is_what_torch_and_scikit_learn_compute() -> None:
    logits, targets = drawn(rows=9)
    kept = TASK.kept(MaskedLMOutput(logits=logits), {}, targets)
    assert [value.shape for value in kept] == [(3,)] * 9
    tokens = Tokens({}, np.arange(10), targets.numpy())
    score = TASK.score(kept, tokens, Split("test", datasets.Dataset.from_dict({}), {}), ())
    loss = functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()
    known = targets != IGNORED
    accuracy = sklearn_metrics.accuracy_score(targets[known], logits.argmax(-1)[known])
    assert score.metrics == pytest.approx({"perplexity": np.exp(loss), "loss": loss, "accuracy": accuracy}, rel=1e-6)
    assert tuple(score.metrics) == TASK.metrics


def test_a_hopeless_loss_gives_a_number_and_nothing_to_find_is_an_error() -> None:
    split, tokens = Split("validation", datasets.Dataset.from_dict({}), {}), Tokens({}, np.arange(2), np.zeros(1))
    assert np.isfinite(TASK.score([np.array([5000.0, 2, 0])], tokens, split, ()).metrics["perplexity"])
    with pytest.raises(DataError, match="no text of split 'validation' has a token that can be hidden"):
        TASK.score([np.zeros(3)], tokens, split, ())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_head_reads_the_first_position_alone(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(masked_base(tmp_path, family))
    assert not read_first_only(model)
    # Every token is answered with the same numbers, so that they could be stretched.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "norm" in name.lower():
                parameter.zero_()
    assert not read_first_only(model)


def test_the_word_table_stays_whole_where_the_head_does_not_share_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    # So large that the texts use less of it than is worth a cut.
    base = masked_base(tmp_path / "base", "electra", tie_word_embeddings=False, vocab_size=2000)
    job = masked_job(tmp_path, model__base=str(base), train__epochs=1)
    ready = prepare(job)
    model: Any = ready.start.model()
    table = model.get_input_embeddings().weight
    assert [name for name, found in model.named_parameters(remove_duplicate=False) if found is table] == [
        "electra.embeddings.word_embeddings.weight"
    ]
    result = fit(job, ready.rows, ready.task, ready.start, str(tmp_path / "run"), Callbacks())
    files = Store(str(tmp_path / "run"), print).local(result.checkpoint)
    saved = load_file(files / WEIGHTS)
    assert NARROWED not in saved
    found = saved["electra.embeddings.word_embeddings.weight"]
    assert found.shape == table.shape
    # The mask token is in no text; it has been learned.
    mask = pieces_tokenizer().mask_token_id
    assert (found[mask] - table[mask]).abs().max() > 1e-4


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[JobConfig, ModelVersion]:
    """A job on texts that say one word again and again, and what came of it."""
    folder = tmp_path_factory.mktemp("learned")
    texts = [" ".join([word] * 9) for word in WORDS]
    path = str(write_rows(folder / "words.jsonl", [{"text": text} for text in texts * 4]))
    files = {"train": path, "validation": path, "test": None}
    masked_base(folder / "base", initializer_range=0.1)
    values = {"train__epochs": 16, "train__learning_rate": 1e-2, "train__masking__share": 0.3}
    job = masked_job(folder, data__files=files, registry__gate__at_most=2.5, **values)
    return job, registered(job)


def test_it_learns_which_word_is_missing_from_the_words_around_it(learned: tuple[JobConfig, ModelVersion]) -> None:
    metrics = learned[1].metrics
    # Who only knew how often each of them occurs would have a perplexity of 11.
    assert metrics["perplexity"] < 2
    assert metrics["accuracy"] > 0.9
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))


def test_a_perplexity_above_the_gate_is_not_registered(tmp_path: Path) -> None:
    job = masked_job(tmp_path, train__epochs=1, registry__gate__at_most=2.0)
    with pytest.raises(
        GateRefused, match=r"registry\.gate: perplexity is \d+\.\d+, needed at most 2\.0; not registered"
    ):
        registered(job)
    assert not Registry(job.registry.root).models()


def test_the_encoder_that_learned_is_the_base_of_another_task(
    learned: tuple[JobConfig, ModelVersion], tmp_path: Path
) -> None:
    folder = Registry(learned[0].registry.root).fetch(learned[1])
    (tmp_path / "base").symlink_to(folder)
    model: Any = prepare(make_job(tmp_path)).start.model()
    from transformers import AutoModelForMaskedLM

    trained: Any = AutoModelForMaskedLM.from_pretrained(folder)
    theirs = trained.bert.state_dict()
    for name, weight in model.bert.named_parameters():
        if "pooler" not in name:
            assert torch.equal(weight, theirs[name]), name


def test_a_run_on_twice_as_many_microbatches_is_the_same_run(job: JobConfig, tmp_path: Path) -> None:
    ready = prepare(job)
    told = []
    for count in (1, 4):
        changed = job.with_values({"train.gradient_accumulation_steps": count, "train.epochs": 1})
        result = fit(changed, ready.rows, ready.task, ready.start, str(tmp_path / str(count)), Callbacks())
        told.append(result.checkpoint.metrics)
    assert len(ready.rows.train) == ROWS
    assert told[0] == pytest.approx(told[1], rel=1e-4)


def test_a_frozen_bottom_runs_without_dropout_though_no_states_are_kept(job: JobConfig) -> None:
    frozen = job.with_values({"freeze": {"layers": 1}, "model.dropout": 0.5})
    ready = prepare(frozen)
    model = ready.start.model().train()
    assert kept_prefix(frozen, model, ready.rows, False, [], Clock()) is None
    silent = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    below = {name for name in silent if "embeddings" in name or ".layer.0." in name}
    assert below
    assert {silent[name] for name in below} == {0.0}
    assert {silent[name] for name in silent.keys() - below} == {0.5}
