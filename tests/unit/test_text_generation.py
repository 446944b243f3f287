"""Text generation: blocks and prompts that a decoder learns from, and how it goes on over HTTP."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import TextGenerationOutput

from banjoray.config.job import JobConfig
from banjoray.data.tokens import IGNORED
from banjoray.errors import ConfigError, RequestError
from banjoray.models.vocabulary import narrow
from banjoray.registry import ModelVersion
from banjoray.serving.engine import Engine
from banjoray.tasks.text_generation import TextGeneration
from banjoray.training.preflight import prepare
from banjoray.training.scoring import Feed, outputs
from engines import ask, engine_of, folder_of, registered
from factories import tiny_model
from writers import DECODERS, END, PAD, phrases, words_tokenizer, writer, writing_job

Version = tuple[JobConfig, ModelVersion, Engine]
PROMPTS = ["one two", "three", "six five four two one one", "two two", "five one six"]
TASK = TextGeneration()


@pytest.fixture(scope="module", params=DECODERS)
def version(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """A registered decoder of each architecture, and its engine; its random weights are wide, so that texts differ."""
    folder = tmp_path_factory.mktemp(request.param)
    writer(folder / "base", request.param, initializer_range=0.3)
    changes: dict[str, Any] = {"data__columns__target": None, "generation__min_new_tokens": 3}
    job = writing_job(folder, "text-generation", request.param, **changes)
    found = registered(job)
    return job, found, engine_of(job, found)


def model_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_texts_are_cut_into_blocks_and_every_token_but_the_first_is_found_once(tmp_path: Path) -> None:
    tokenizer, data = words_tokenizer("$A"), writing_job(tmp_path, "text-generation", "gpt2", data__max_length=4).data
    for text in ("one two three four five", "one two three four", "one two three", "one"):
        features = TASK.encode({"text": [text]}, tokenizer, data)
        whole = [*tokenizer(text).input_ids, END]
        read = [number for ids in features.inputs["input_ids"] for number in ids]
        assert read == whole[:-1]
        assert features.targets is not None
        assert [number for ids in features.targets for number in ids] == whole[1:]
        assert [len(ids) for ids in features.inputs["input_ids"]] == [len(ids) for ids in features.targets]
        assert max(map(len, features.inputs["input_ids"])) <= 4
    both = TASK.encode({"text": ["one two three four five", "six"]}, tokenizer, data)
    assert list(both.rows) == [0, 0, 1]


def test_tokens_of_a_prompt_are_no_targets_and_the_start_of_a_long_one_is_left_out(tmp_path: Path) -> None:
    tokenizer, data = words_tokenizer("$A"), writing_job(tmp_path, "text-generation", "gpt2", data__max_length=4).data
    rows = {
        "text": ["one two", "one two three four", "one"],
        "target": ["eins", "eins zwei", "eins zwei drei vier funf"],
    }
    found = TASK.encode(rows, tokenizer, data)
    known = "one two three four eins zwei drei vier"
    ids = dict(zip(known.split(), tokenizer(known).input_ids, strict=True))
    assert found.targets is not None
    assert [[*map(int, read)] for read in found.inputs["input_ids"]] == [
        [ids["one"], ids["two"], ids["eins"]],
        [ids["three"], ids["four"], ids["eins"], ids["zwei"]],
        [ids["one"], ids["eins"], ids["zwei"], ids["drei"]],
    ]
    assert list(found.targets) == [
        [IGNORED, ids["eins"], END],
        [IGNORED, ids["eins"], ids["zwei"], END],
        [ids["eins"], ids["zwei"], ids["drei"], ids["vier"]],
    ]
    assert found.cut == 2


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_loss_of_a_batch_is_the_models_own(tmp_path: Path, architecture: str) -> None:
    job = writing_job(tmp_path, "text-generation", architecture, data__columns__target=None)
    ready = prepare(job)
    model, tokens = model_of(Path(job.model.base)), ready.rows.validation
    inputs, targets = Feed(tokens, PAD, torch.device("cpu")).batch(np.arange(6))
    # transformers shifts labels itself: a label stands where its token is read.
    whole = [[*tokens.feature(row).inputs["input_ids"], END] for row in range(6)]
    width = max(map(len, whole))
    labels = torch.tensor([[*ids, *[IGNORED] * (width - len(ids))] for ids in whole])
    with torch.no_grad():
        own = model(input_ids=labels.clamp(min=0), attention_mask=(labels != IGNORED).long(), labels=labels).loss
        losses = TASK.losses(model(**inputs), torch.from_numpy(targets), 0.0)
    weights = torch.from_numpy(TASK.weights(tokens, job)[:6])
    assert torch.dot(losses, weights / weights.sum()).item() == pytest.approx(own.item(), abs=1e-6)
    kept = outputs(model, Feed(tokens, PAD, torch.device("cpu")), TASK)
    metrics = TASK.score(kept, tokens, ready.rows.held, ()).metrics
    assert tuple(metrics) == TASK.metrics
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    alone = [outputs(model, Feed(tokens, PAD, torch.device("cpu")), TASK)[row] for row in (0, 5)]
    assert np.allclose(alone, [kept[0], kept[5]], atol=1e-5)


def test_a_version_goes_on_as_transformers_does_from_its_folder(version: Version) -> None:
    job, registered_version, engine = version
    folder = folder_of(job, registered_version)
    model, tokenizer = model_of(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for settings in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3, "max_new_tokens": 4}):
        expected = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt).input_ids])
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :]
            expected.append({"generated_text": tokenizer.decode(written, skip_special_tokens=True)})
        assert ask(engine, {"inputs": PROMPTS, "parameters": settings}) == expected


def test_a_prompt_is_answered_the_same_alone_and_beside_others_whatever_they_ask(version: Version) -> None:
    engine = version[2]
    asked: list[dict[str, Any]] = [
        {},
        {"num_beams": 3},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"temperature": 1.5, "seed": 5},
        {"stop": ["eins", "two"]},
        {"details": True, "min_new_tokens": 3},
    ]
    rows = [row for each in asked for row in engine.task.parse(PROMPTS, each).rows]
    features = [feature for row in engine.encode(rows) for feature in row]
    alone = [engine.forward([feature])[0] for feature in features]
    order = np.random.default_rng(0).permutation(len(features))
    together = engine.forward([features[number] for number in order])
    for place, number in enumerate(order):
        assert together[place].shape == alone[number].shape
        assert np.allclose(together[place], alone[number], atol=1e-5)
    # Or the test would not tell one answer from another.
    assert len({tuple(ids.ravel()) for ids in alone}) > 10


def test_the_same_seed_draws_the_same_text_and_another_seed_another(version: Version) -> None:
    engine = version[2]

    def drawn(seed: int | None) -> Any:
        parameters = {"do_sample": True, "temperature": 3.0, "seed": seed, "min_new_tokens": 6}
        return ask(engine, {"inputs": ["one two", "one two"], "parameters": parameters})

    state = torch.get_rng_state()
    assert drawn(3) == drawn(3)
    assert drawn(3)[0] == drawn(3)[1]
    assert len({json.dumps(drawn(seed)) for seed in range(5)}) > 3
    assert len({json.dumps(drawn(None)) for _ in range(5)}) > 1
    assert torch.equal(torch.get_rng_state(), state)


def test_details_tell_every_token_and_its_log_probability(version: Version) -> None:
    job, registered_version, engine = version
    parameters = {"details": True, "max_new_tokens": 5, "return_full_text": True}
    (answer,) = ask(engine, {"inputs": "one two", "parameters": parameters})
    parsed = TextGenerationOutput.parse_obj_as_list(json.dumps([answer]).encode())[0]
    assert parsed.details is not None
    told = answer["details"]
    model = model_of(folder_of(job, registered_version))
    ids = torch.tensor([[*words_tokenizer("$A")("one two").input_ids, *(token["id"] for token in told["tokens"])]])
    with torch.no_grad():
        scores = torch.log_softmax(model(ids).logits[0], dim=-1)
    expected = [scores[place + 1, token["id"]].item() for place, token in enumerate(told["tokens"])]
    assert [token["logprob"] for token in told["tokens"]] == pytest.approx(expected, abs=1e-5)
    assert told["generated_tokens"] == len(told["tokens"])
    last = told["tokens"][-1]
    assert told["finish_reason"] == ("eos_token" if last["id"] == END else "length")
    assert last["special"] == (last["id"] == END)
    text = "".join(token["text"] for token in told["tokens"] if not token["special"])
    assert answer["generated_text"] == "one two" + text


def test_writing_ends_after_a_stop_text_and_says_so(version: Version) -> None:
    engine = version[2]
    (whole,) = ask(engine, {"inputs": "one two", "parameters": {"min_new_tokens": 6}})
    words = whole["generated_text"].split()
    assert len(words) == 6
    stop = words[2]
    parameters = {"min_new_tokens": 6, "stop": [stop], "details": True}
    (answer,) = ask(engine, {"inputs": "one two", "parameters": parameters})
    assert answer["generated_text"].split() == words[: words.index(stop) + 1]
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["generated_tokens"] == words.index(stop) + 1


def test_the_end_of_a_long_prompt_is_read_and_there_is_room_for_what_is_written(version: Version) -> None:
    engine = version[2]
    long = " ".join(["one two three four five six"] * 20)
    (feature,) = engine.encode(engine.task.parse(long, {}).rows)[0]
    assert len(feature) == 16
    end = ask(engine, {"inputs": " ".join(long.split()[-16:])})
    assert ask(engine, {"inputs": long}) == end
    truncated = ask(engine, {"inputs": long, "parameters": {"truncate": 3}})
    assert truncated == ask(engine, {"inputs": "four five six"})
    # 64 positions: what is asked for and one token to start from; never an index error.
    body = {"inputs": long, "parameters": {"max_new_tokens": 4000, "min_new_tokens": 4000, "details": True}}
    assert ask(engine, body)[0]["details"]["generated_tokens"] == 63


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 0}, "parameters.max_new_tokens: found 0; needed a whole number from 1 to 4096"),
        ({"max_new_tokens": True}, "parameters.max_new_tokens: found True"),
        ({"temperature": 0}, "parameters.temperature: found 0; needed a number from 0.001 to 100"),
        ({"top_p": 1.5}, "parameters.top_p: found 1.5; needed a number from 1e-06 to 1"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "found at least 9 new tokens and at most 3"),
        ({"stop": [""]}, "parameters.stop: found .*; needed a list of texts, none of them empty"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "parameters.stop: found 5 texts; needed at most 4"),
        ({"details": "yes"}, "parameters.details: found 'yes'; needed true or false"),
        ({"stream": "yes"}, "parameters.stream: found 'yes'; needed true or false"),
        ({"max_length": 9}, r"parameters: unknown \['max_length'\]; text-generation has max_new_tokens"),
        ({"truncate": 0}, "parameters.truncate: found 0"),
    ],
)
def test_wrong_parameters_are_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as refused:
        TASK.parse("one", parameters)
    assert "model_kwargs" not in str(refused.value)


def test_wrong_inputs_are_named() -> None:
    for inputs, message in (([], "an empty list"), ([1], r"inputs\[0\]: found int"), (" ", "nothing but blanks")):
        with pytest.raises(RequestError, match=message):
            TASK.parse(inputs, {})


def test_models_that_look_ahead_are_refused(tmp_path: Path) -> None:
    for kind, base in (("bert", tiny_model), ("t5", writer)):
        base(tmp_path / kind / "base", kind)
        with pytest.raises(
            ConfigError, match=rf"is of kind {kind}, which does not go on with a text from left to right"
        ):
            prepare(writing_job(tmp_path / kind, "text-generation", "gpt2"))


def test_a_decoders_table_of_words_is_cut_where_it_is_not_its_output_too(tmp_path: Path) -> None:
    own = model_of(writer(tmp_path / "own", "llama", tie_word_embeddings=False))
    shared = model_of(writer(tmp_path / "shared", "llama", tie_word_embeddings=True))
    streams = [np.array([PAD, 4, 5, END])]
    assert narrow(shared, streams) is None
    ids = torch.tensor([[4, 5, END]])
    before = own(ids).logits
    assert narrow(own, streams) is not None
    assert torch.equal(own(ids).logits, before)


def test_a_model_learns_to_answer_prompts(tmp_path: Path) -> None:
    writer(tmp_path / "base", "gpt2", initializer_range=0.1)
    # Many rows and two epochs: a checkpoint, which follows every epoch, takes longer than these steps.
    rows = phrases(60, 2)[:48] * 10 + phrases(60, 2)[48:]
    job = writing_job(tmp_path, "text-generation", "gpt2", rows=rows, train__epochs=2, train__learning_rate=5e-3)
    assert (job.train.metric, job.train.mode) == ("perplexity", "min")
    found = registered(job)
    # By chance: 19.
    assert found.metrics["perplexity"] < 2
    answers = ask(engine_of(job, found), {"inputs": [row["text"] for row in rows[-12:]]})
    right = sum(answer["generated_text"] == row["target"] for answer, row in zip(answers, rows[-12:], strict=True))
    assert right >= 8


@pytest.mark.parametrize("target", [None, "target"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_texts_that_share_a_block_have_the_losses_and_gradients_that_they_have_alone(
    tmp_path: Path, architecture: str, target: str | None
) -> None:
    writer(tmp_path / "base", architecture, initializer_range=0.3)
    model, cpu = model_of(tmp_path / "base"), torch.device("cpu")
    found: list[tuple[Any, list[float], list[Any]]] = []
    for packing in (False, True):
        job = writing_job(
            tmp_path, "text-generation", architecture, data__packing=packing, data__columns__target=target
        )
        ready = prepare(job)
        tokens, collate = ready.rows.train, TASK.collate(job, ready.start.tokenizer, model.config)
        kept = outputs(model, Feed(tokens, ready.rows.pad_id, cpu, collate=collate), TASK)
        feed = Feed(tokens, ready.rows.pad_id, cpu, collate=collate)
        inputs, targets = feed.batch(np.arange(len(tokens)), 0)
        losses, weights = TASK.losses(model(**inputs), torch.from_numpy(targets), 0.0), TASK.weights(tokens, job)
        loss = torch.dot(losses, torch.from_numpy(weights / weights.sum()))
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        scored = TASK.score(kept, tokens, ready.rows.held, ()).metrics["loss"]
        found.append((tokens, [scored, loss.item()], gradients))
    (alone, numbers, own), (shared, others, theirs) = found
    assert len(shared) < len(alone) / 2
    assert shared.lengths.max() <= 16
    assert shared.streams["input_ids"].tolist() == alone.streams["input_ids"].tolist()
    assert numbers == pytest.approx(others, abs=1e-5)
    for one, other in zip(own, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_packed_texts_are_trained_and_scored_and_the_version_answers(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__packing": True, "data__columns__target": None, "freeze": {"layers": 1}}
    job = writing_job(tmp_path, "text-generation", "llama", cache__prefix="auto", **changes)
    found = registered(job)
    assert found.metrics["perplexity"] == pytest.approx(np.exp(found.metrics["loss"]))
    assert len(ask(engine_of(job, found), {"inputs": ["one", "two three"]})) == 2


def test_a_decoder_whose_texts_would_see_each_other_is_not_packed(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 30}
    transformers.BloomForCausalLM(transformers.BloomConfig(**sizes)).save_pretrained(tmp_path / "base")
    words_tokenizer("$A").save_pretrained(tmp_path / "base")
    job = writing_job(tmp_path, "text-generation", "gpt2", data__columns__target=None)
    assert prepare(job).warnings == ()
    with pytest.raises(ConfigError, match=r"data.packing: .* is of kind bloom, whose texts would see each other"):
        prepare(job.with_values({"data.packing": True}))


def test_what_nothing_would_read_is_no_setting_of_a_version(tmp_path: Path) -> None:
    base = writer(tmp_path / "base", "gpt2")
    (base / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 33, "eos_token_id": [3, 5]})
    )
    job = writing_job(tmp_path, "text-generation", "gpt2", generation__do_sample=False)
    folder = folder_of(job, registered(job))
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["do_sample"] is False
    assert saved["max_new_tokens"] == 6
    assert saved["eos_token_id"] == [3, 5]
    assert not {"temperature", "top_p", "max_length"} & set(saved)
    for wrong, message in (
        ({"generation__temperature": 0.5}, "found temperature without do_sample: true"),
        ({"generation__min_new_tokens": 7}, "found min_new_tokens 7, which is more than max_new_tokens 6"),
    ):
        with pytest.raises(ConfigError, match=message):
            writing_job(tmp_path, "text-generation", "gpt2", **wrong)
