"""Summarization and translation: from nested rows to texts over HTTP, by every kind of encoder-decoder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
import transformers
from huggingface_hub import SummarizationOutput, TranslationOutput
from rouge_score.rouge_scorer import RougeScorer

from banjoray.config.job import JobConfig
from banjoray.data.batches import padded, targets_of
from banjoray.data.tokens import IGNORED, tokenise
from banjoray.errors import ConfigError, DataError, RequestError
from banjoray.models.vocabulary import narrow
from banjoray.registry import ModelVersion
from banjoray.serving.engine import Engine
from banjoray.tasks.sequence_to_sequence import Summarization, Translation, shifted
from banjoray.tasks.task import check_metrics, task_for
from banjoray.training.preflight import prepare
from banjoray.training.scoring import score_folder
from engines import ask, engine_of, folder_of, registered
from factories import tiny_model, write_rows
from writers import (
    ENCODER_DECODERS,
    END,
    PAD,
    WORDS,
    language_tokenizer,
    phrases,
    words_tokenizer,
    writer,
    writing_job,
)

Version = tuple[JobConfig, ModelVersion, Engine]
SENTENCES = ["one two", "three", "six five four two", "two two", "five one six"]


@pytest.fixture(scope="module", params=ENCODER_DECODERS)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A registered translation model of each architecture, and its engine."""
    changes: dict[str, Any] = {"generation__min_new_tokens": 2, "data__prefix": "count: "}
    folder = tmp_path_factory.mktemp(request.param)
    # Wide random weights, so that texts differ.
    writer(folder / "base", request.param, **({} if request.param == "t5" else {"init_std": 0.3}))
    job = writing_job(folder, "translation", request.param, **changes)
    found = registered(job)
    return job, found, engine_of(job, found)


def model_of(folder: Path) -> Any:
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_decoders_are_given_their_targets_as_each_models_own_function_does(tmp_path: Path, architecture: str) -> None:
    model = model_of(writer(tmp_path, architecture))
    generator = np.random.default_rng(3)
    for rows in (1, 5):
        targets = generator.integers(4, 20, (rows, 7))
        lengths = generator.integers(1, 8, rows)
        lengths[0] = 7
        targets[np.arange(7) >= lengths[:, None]] = IGNORED
        own = model.prepare_decoder_input_ids_from_labels(torch.from_numpy(targets.copy()))
        assert np.array_equal(shifted(targets, model.config, "base"), own.numpy())


@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_the_loss_of_a_batch_is_the_models_own(tmp_path: Path, architecture: str) -> None:
    job = writing_job(tmp_path, "summarization", architecture)
    ready, task = prepare(job), Summarization()
    model, tokens, rows = model_of(Path(job.model.base)), ready.rows.train, np.arange(9)
    collate = task.collate(job, ready.start.tokenizer, model.config)
    assert collate is not None
    inputs, targets = collate(padded(tokens, rows, PAD), targets_of(tokens, rows), rows, 0)
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    labels = torch.from_numpy(targets)
    with torch.no_grad():
        own = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], labels=labels)
    losses, weights = task.losses(model(**tensors), labels, 0.0), torch.from_numpy(task.weights(tokens, job)[rows])
    assert torch.dot(losses, weights / weights.sum()).item() == pytest.approx(own.loss.item(), abs=1e-6)
    assert weights.tolist() == [len(row["target"].split()) + 1 for row in phrases(9)]
    sums = np.stack(task.kept(own, tensors, labels))
    assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(own.loss.item(), abs=1e-6)
    smooth = task.losses(own, labels, 0.1)
    flat = torch.nn.functional.cross_entropy(own.logits[2], labels[2], label_smoothing=0.1)
    assert smooth[2].item() == pytest.approx(flat.item(), abs=1e-6)


def test_a_version_writes_what_transformers_writes_from_its_folder(version: Version) -> None:
    job, registered_version, engine = version
    folder = folder_of(job, registered_version)
    model, tokenizer = model_of(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert model.generation_config.max_new_tokens == 6
    for settings in ({}, {"num_beams": 3}, {"no_repeat_ngram_size": 1, "max_new_tokens": 4}):
        expected = []
        for sentence in SENTENCES:
            ids = torch.tensor([tokenizer(f"count: {sentence}").input_ids])
            expected.append(tokenizer.decode(model.generate(ids, **settings)[0], skip_special_tokens=True))
        answers = ask(engine, {"inputs": SENTENCES, "parameters": {"generate_parameters": settings}})
        assert answers == [{"translation_text": text} for text in expected]


def test_a_text_is_answered_the_same_alone_and_beside_others_whatever_they_ask(version: Version) -> None:
    _, _, engine = version
    asked: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"repetition_penalty": 1.5}, {"do_sample": True, "seed": 5}]
    task = engine.task
    rows = [row for each in asked for row in task.parse(SENTENCES, {"generate_parameters": each}).rows]
    features = [feature for row in engine.encode(rows) for feature in row]
    alone = [engine.forward([feature])[0].tolist() for feature in features]
    order = np.random.default_rng(0).permutation(len(features))
    together = engine.forward([features[number] for number in order])
    assert [ids.tolist() for ids in together] == [alone[number] for number in order]
    # Or the test would not tell one answer from another.
    assert len({tuple(ids) for ids in alone}) > 2


def test_the_version_was_scored_by_tokens_and_its_texts_are_scored_when_asked_for(version: Version) -> None:
    job, registered_version, engine = version
    folder = folder_of(job, registered_version)
    assert set(registered_version.metrics) == {"loss", "perplexity"} == set(engine.task.metrics)
    score, _ = score_folder(folder, job, "validation", texts=True)
    assert score.metrics["loss"] == pytest.approx(registered_version.metrics["loss"], abs=1e-5)
    assert score.metrics["perplexity"] == pytest.approx(np.exp(score.metrics["loss"]))
    held = phrases(60)[48:]
    written = [text["translation_text"] for text in ask(engine, {"inputs": [row["text"] for row in held]})]
    bleu = sacrebleu.corpus_bleu(written, [[row["target"] for row in held]]).score
    assert score.metrics["bleu"] == pytest.approx(bleu, abs=1e-9)


def test_the_texts_of_a_score_are_compared_as_the_reference_packages_do() -> None:
    written = ["a cat sat on the mats", "nothing here", "dogs are running fast today"]
    right = ["the cat sits on the mat", "something there", "the dog runs fast today"]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rouge = Summarization().compare(written, right)
    for name in ("rouge1", "rouge2", "rougeL"):
        own = [scorer.score(*pair)[name].fmeasure for pair in zip(right, written, strict=True)]
        assert rouge[name] == pytest.approx(np.mean(own), abs=1e-12)
    assert rouge["rouge1"] > rouge["rouge2"] > 0
    found = Translation().compare(written, right)
    assert found["bleu"] == sacrebleu.BLEU().corpus_score(written, [right]).score > 0
    assert found["chrf"] == sacrebleu.CHRF().corpus_score(written, [right]).score > 0


def test_a_model_learns_to_translate_words(tmp_path: Path) -> None:
    writer(tmp_path / "base", "bart", init_std=0.1)
    # Many rows and two epochs: a checkpoint, which follows every epoch, takes longer than these steps.
    rows = phrases(60, 2)[:48] * 10 + phrases(60, 2)[48:]
    changes: dict[str, Any] = {"train__epochs": 2, "train__learning_rate": 5e-3}
    job = writing_job(tmp_path, "translation", "bart", rows=rows, data__columns__text="translation.en", **changes)
    job = job.with_values({"data.columns.target": "translation.de"})
    found = registered(job)
    # By chance: ln(19) = 2.9.
    assert found.metrics["loss"] < 0.7
    score, _ = score_folder(folder_of(job, found), job, "validation", texts=True)
    assert score.metrics["chrf"] > 50
    assert ask(engine_of(job, found), {"inputs": "six five"}) == [{"translation_text": "sechs funf"}]


def job_on(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> JobConfig:
    file = write_rows(folder / "own.jsonl", rows)
    return writing_job(folder, "translation", "t5", data__files={"train": str(file)}, **changes)


def test_nested_columns_are_read_by_dotted_names(tmp_path: Path) -> None:
    dotted = {"data__columns__text": "translation.en", "data__columns__target": "translation.de"}
    job = job_on(tmp_path, phrases(20), **dotted)
    splits = Translation().splits(job)
    batch = next(splits.train.batches(3))
    assert [WORDS[text.split()[0]] for text in batch["text"]] == [text.split()[0] for text in batch["target"]]
    with pytest.raises(
        DataError, match=r"column 'translation.fr' not in own.jsonl; it has .*'translation.en'.*target=NAME"
    ):
        Translation().splits(job.with_values({"data.columns.target": "translation.fr"}))
    with pytest.raises(DataError, match=r"column 'a.b' not in own.jsonl; it has 'text', 'target', 'translation.en'"):
        Translation().splits(job.with_values({"data.columns.target": "a.b"}))
    rows = phrases(20)
    rows[4]["translation"]["de"] = None
    job_on(tmp_path, rows)
    with pytest.raises(DataError, match=r"own.jsonl row 5, column 'translation.de' holds nothing; needed text"):
        Translation().splits(job)


def test_a_hub_sets_translation_column_is_opened_and_other_columns_stay() -> None:
    import datasets

    from banjoray.data.sources import Source, _opened

    kinds = datasets.Features({"translation": datasets.Translation(["de", "en"]), "id": datasets.Value("string")})
    rows = datasets.Dataset.from_list([{"translation": {"de": "eins", "en": "one"}, "id": "7"}], features=kinds)
    found = _opened(Source(rows, "set:train"), {"text": "translation.en", "label": "id"}).rows
    assert found.column_names == ["translation", "id", "translation.en"]
    assert found[0]["translation.en"] == "one"
    same = Source(rows, "set:train")
    assert _opened(same, {"text": "id"}) is same


def test_bad_rows_are_named_before_anything_starts(tmp_path: Path) -> None:
    rows = phrases(20)
    rows[2]["target"] = "  "
    with pytest.raises(DataError, match=r"own.jsonl row 3, column 'target' holds only blanks; needed text"):
        prepare(job_on(tmp_path, rows))
    with pytest.raises(ConfigError, match=r"data.columns.target: found null; translation needs the column of what"):
        prepare(job_on(tmp_path, phrases(20), data__columns__target=None))


def test_long_targets_are_cut_and_counted(tmp_path: Path) -> None:
    job = writing_job(tmp_path, "summarization", "t5", data__max_target_length=3)
    ready = prepare(job)
    assert ready.rows.train.cut == sum(len(row["target"].split()) > 2 for row in phrases(48))
    assert ready.rows.train.target(3).tolist()[-1] == END
    assert len(ready.rows.train.target(3)) == 3
    assert "or their targets than data.max_target_length 3, and are cut" in ready.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data__src_lang": "en_XX"}, r"data.src_lang: found 'en_XX'; this model is not told languages by name"),
        ({"data__max_target_length": 200}, r"data.max_target_length: found 200; .* has 64 positions"),
        ({"registry__gate__metric": "bleu"}, r"registry.gate.metric: translation has no metric 'bleu'; it has loss"),
    ],
)
def test_jobs_that_a_model_can_not_do_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(writing_job(tmp_path, "translation", "bart", **change))


def test_a_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "base")
    with pytest.raises(ConfigError, match="is of kind bert, which has no encoder and decoder; summarization needs one"):
        prepare(writing_job(tmp_path, "summarization", "t5"))


def test_the_job_picks_by_loss_and_every_metric_can_be_asked_for(tmp_path: Path) -> None:
    for task in ("summarization", "translation"):
        job = writing_job(tmp_path, task, "t5")
        assert (job.train.metric, job.train.mode) == ("loss", "min")
        check_metrics(job.with_values({"train.metric": "perplexity"}))
        assert task_for(task).generates


TELLS: dict[str, tuple[str, Callable[[list[int], int], bool]]] = {
    "mbart": ("mbart", lambda ids, language: ids[-1] == language),
    "mbart50": ("mbart", lambda ids, language: ids[0] == language),
    "nllb": ("bart", lambda ids, language: ids[0] == language),
}


@pytest.mark.parametrize("kind", TELLS)
def test_models_that_are_told_languages_read_and_write_those_of_the_job_or_the_request(
    tmp_path: Path, kind: str
) -> None:
    architecture, tells = TELLS[kind]
    german, english = ("deu_Latn", "eng_Latn") if kind == "nllb" else ("de_DE", "en_XX")
    french = "fra_Latn" if kind == "nllb" else "fr_XX"
    tokenizer = language_tokenizer(kind)
    job = writing_job(tmp_path, "translation", architecture, tokenizer)
    with pytest.raises(ConfigError, match=r"data.src_lang: found null; needed a language that the model knows: "):
        prepare(job)
    job = job.with_values({"data.src_lang": english, "data.tgt_lang": german, "generation.min_new_tokens": 3})
    ids = {language: tokenizer.convert_tokens_to_ids(language) for language in (german, english, french)}
    tokens = prepare(job).rows.train
    assert tells(list(tokens.feature(0).inputs["input_ids"]), ids[english])
    assert tells(tokens.target(0).tolist(), ids[german])
    found = registered(job)
    engine, folder = engine_of(job, found), folder_of(job, found)
    model, saved = model_of(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (saved.src_lang, saved.tgt_lang) == (english, german)
    written = model.generate(**saved(["one two"], return_tensors="pt"))[0]
    own = str(saved.decode(written, skip_special_tokens=True)).strip()
    assert ask(engine, {"inputs": "one two"}) == [{"translation_text": own}]
    row = engine.task.parse("one two", {"src_lang": german, "tgt_lang": french}).rows
    asked = engine.encode(row)[0][0]
    assert tells(list(asked.inputs["input_ids"]), ids[german])
    name = "decoder_start_token_id" if kind == "mbart" else "forced_bos_token_id"
    assert dict(asked.settings.asked)[name] == ids[french]  # type: ignore[attr-defined]
    # The next request is read in the version's own language again.
    usual = engine.encode(engine.task.parse("one", {}).rows)[0][0]
    assert tells(list(usual.inputs["input_ids"]), ids[english])
    with pytest.raises(RequestError, match=r"parameters.tgt_lang: found 'xx'; needed a language that the model knows"):
        ask(engine, {"inputs": "one", "parameters": {"tgt_lang": "xx"}})


def test_languages_are_refused_by_models_without(version: Version) -> None:
    with pytest.raises(
        RequestError, match=r"parameters.src_lang: found 'en'; this model is not told languages by name"
    ):
        ask(version[2], {"inputs": "one", "parameters": {"src_lang": "en", "tgt_lang": "de"}})


def test_answers_are_lists_as_the_client_reads_them(version: Version) -> None:
    engine = version[2]
    answers = ask(engine, {"inputs": "one two"})
    assert len(TranslationOutput.parse_obj_as_list(json.dumps(answers).encode())) == 1
    assert len(ask(engine, {"inputs": ["one two", "six"]})) == 2
    seen = [type("S", (), {"outputs": [np.array([5, 6, END])]})()]
    body = Summarization().answer(Summarization().parse("x", {}), seen, (), words_tokenizer())
    assert SummarizationOutput.parse_obj_as_list(json.dumps(body).encode())[0]["summary_text"] == "two three"


def test_a_table_of_words_is_cut_only_where_the_decoder_has_its_own(tmp_path: Path) -> None:
    shared = model_of(writer(tmp_path / "shared", "marian"))
    assert narrow(shared, [np.array([4, 5])]) is None
    own = {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    model = model_of(writer(tmp_path / "own", "marian", **own))
    ids, decoder = torch.tensor([[4, 5, END]]), torch.tensor([[PAD, 9, 10]])
    before = model(input_ids=ids, decoder_input_ids=decoder).logits
    vocabulary = narrow(model, [np.array([4, 5, END])])
    assert vocabulary is not None
    assert "encoder" in vocabulary.name
    assert torch.equal(model(input_ids=ids, decoder_input_ids=decoder).logits, before)


def test_the_tokens_of_a_split_do_not_depend_on_the_languages_used_before(tmp_path: Path) -> None:
    tokenizer = language_tokenizer("mbart50")
    changes = {"data__src_lang": "en_XX", "data__tgt_lang": "de_DE"}
    job = writing_job(tmp_path, "translation", "mbart", tokenizer, **changes)
    split, task = Translation().splits(job).train, Translation()
    first = tokenise(split, task, tokenizer, job.data)
    again = tokenise(split, task, tokenizer, job.data)
    assert np.array_equal(first.streams["input_ids"], again.streams["input_ids"])
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", None)
