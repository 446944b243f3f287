"""Several versions in one replica: one copy of what they have in common, one pass over it, every answer as alone."""

import asyncio
import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from banjoray.serving.batching import Batcher
from banjoray.serving.costs import FREE
from banjoray.serving.engine import Engine
from banjoray.serving.limits import Entry
from banjoray.serving.replica import Slot
from banjoray.serving.served import Served
from banjoray.serving.sharing import Owned
from banjoray.tasks.task import Ask
from engines import engine_of, near, registered
from factories import DEPTH, make_job, sample_rows
from kin import kin, many
from replicas import InProcess, talker

TEXTS = ["joy", *(row["text"] for row in sample_rows("test")[:12]), "i am so happy " * 12]
PATIENCE_S = 60.0
# Name -> its task, how many of the lowest blocks are those of all others, and where its own weights come from.
FAMILY: dict[str, tuple[str, int, int]] = {
    "mood": ("text-classification", DEPTH, 1),
    "tone": ("text-classification", DEPTH, 2),
    "tags": ("token-classification", DEPTH, 3),
    "words": ("fill-mask", 2, 4),
    "twin": ("feature-extraction", 2, 4),
    "reader": ("question-answering", 1, 5),
    "vectors": ("feature-extraction", DEPTH, 6),
}


@pytest.fixture
def family(tmp_path: Path) -> dict[str, Engine]:
    return {name: kin(tmp_path / name, name, task, same, seed) for name, (task, same, seed) in FAMILY.items()}


def asks(engine: Engine, texts: Sequence[str]) -> list[Ask]:
    """What is asked of a version: each of some texts, in the shape of its task."""
    if engine.task.name == "fill-mask":
        engine.tokenizer.mask_token = "[UNK]"
        engine.task = engine.task.for_tokenizer(engine.tokenizer)
        return [engine.task.parse(f"{text} [UNK]", {}) for text in texts]
    if engine.task.name == "question-answering":
        return [engine.task.parse({"question": "who is happy", "context": text}, {}) for text in texts]
    return [engine.task.parse(text, {}) for text in texts]


def alone(engine: Engine, ask: Ask) -> list[np.ndarray]:
    """What a version that nobody shares with keeps of the outputs for a request, feature by feature."""
    features = [feature for row in engine.encode(ask.rows) for feature in row]
    return [output for feature in features for output in engine.forward([feature])]


class Passes:
    """The batches of a group: how many versions had rows in each, and how many different rows there were."""

    def __init__(self, served: Served) -> None:
        self.versions: list[int] = []
        self.rows: list[int] = []
        batcher: Any = served._batcher
        forward = batcher._forward

        def told(entries: Sequence[Entry[Owned]]) -> Any:
            self.versions.append(len({entry.row.member for entry in entries}))
            self.rows.append(len(entries))
            return forward(entries)

        batcher._forward = told


def together(asked: InProcess, requests: Sequence[tuple[str, Ask]]) -> list[Any]:
    """What is kept for requests that come at once, each for a model by its name."""

    async def scene(_: object) -> list[Any]:
        calls = [asked.replica.slots[name].production.answer(ask) for name, ask in requests]
        return list(await asyncio.wait_for(asyncio.gather(*calls), PATIENCE_S))

    found: list[Any] = asked.run(scene)
    return found


def test_every_answer_of_a_mixed_batch_is_that_of_the_version_alone(family: dict[str, Engine]) -> None:
    wanted = [
        (name, ask, alone(copy.deepcopy(engine), ask)) for name, engine in family.items() for ask in asks(engine, TEXTS)
    ]
    order = np.random.default_rng(1).permutation(len(wanted))
    with many(*family.values(), pass_target_ms=10_000.0) as asked:
        passes = Passes(asked.served)
        found = together(asked, [wanted[number][:2] for number in order])
    for number, answered in zip(order, found, strict=True):
        for one, other in zip(answered.outputs, wanted[number][2], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    assert max(passes.versions) == len(FAMILY)
    assert len(passes.rows) < len(wanted) / 2


def test_what_is_shared_is_told_by_how_many_blocks_are_the_same(family: dict[str, Engine]) -> None:
    with many(*family.values()) as asked:
        told = {model["model"]: model["shares"] for model in asked.request("GET", "/").json()["models"]}
        assert told["mood"] == {"tone@1": 3, "tags@1": 2, "words@1": 2, "twin@1": 2, "reader@1": 1, "vectors@1": 2}
        # The top block of those that read the first position alone is another one than that of those that read all.
        assert told["tags"]["vectors@1"] == 3
        # Their third blocks are the same as well, whatever is above them.
        assert told["words"]["twin@1"] == 3
        assert asked.request("GET", "/models/reader").json()["shares"] == dict.fromkeys(
            ("mood@1", "tone@1", "tags@1", "words@1", "twin@1", "vectors@1"), 1
        )


def test_equal_rows_of_several_versions_are_computed_once_below(family: dict[str, Engine]) -> None:
    three = [family[name] for name in ("mood", "tone", "tags")]
    seen: list[int] = []

    def counted(up: Callable[..., Any]) -> Callable[..., Any]:
        def counting(inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
            seen.append(len(inputs["input_ids"]))
            return up(inputs, *rest)

        return counting

    with many(*three, pass_target_ms=10_000.0) as asked:
        for engine in three:
            member = asked.replica.slots[engine.version.model].production._member
            sections: Any = member.sections
            sections.up = counted(sections.up)
        requests = [(engine.version.model, ask) for engine in three for ask in asks(engine, TEXTS[:4])]
        together(asked, [*requests[:1], *requests])
    # The first row goes alone; of the rest the bottom has four rows for twelve, and the top block those of two heads.
    assert seen == [4, 4]


def test_one_copy_of_equal_weights_is_held_and_the_others_go_with_their_version(tmp_path: Path) -> None:
    engine, other = kin(tmp_path / "a", "a"), kin(tmp_path / "b", "b", same=2, seed=2)
    with many(engine) as asked:
        weights, slots = asked.replica._shares._weights, asked.replica.slots
        held = len(weights)
        slots["b"] = Slot(asked.replica.serve(other))
        one, two = engine.model.bert, other.model.bert
        assert one.embeddings.word_embeddings.weight is two.embeddings.word_embeddings.weight
        assert [_same(one.encoder.layer[number], two.encoder.layer[number]) for number in range(DEPTH)] == [1, 1, 0]
        assert not _same(one.pooler, two.pooler)
        # Block 2 with its 16 weights; pooler and head of two each.
        assert len(weights) - held == 20
        del other, two, slots["b"]
        gc.collect()
        assert len(weights) == held
        assert slots["a"].production.shares() == {}
        assert asked.post("/models/a", {"inputs": TEXTS[1]}, "a@1")


def _same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_version_comes_and_another_goes_while_requests_wait(tmp_path: Path) -> None:
    old, stays, new = (kin(tmp_path / name, name, seed=seed) for seed, name in enumerate(("old", "stays", "new")))
    wanted = {
        engine.version.model: [alone(copy.deepcopy(engine), ask) for ask in asks(engine, TEXTS)]
        for engine in (old, stays, new)
    }
    asked_of = {engine.version.model: asks(engine, TEXTS) for engine in (old, stays, new)}
    with many(old, stays, max_batch_tokens=64) as asked:

        async def scene(_: object) -> dict[str, list[Any]]:
            slots = asked.replica.slots
            calls: dict[str, list[asyncio.Task[Any]]] = {name: [] for name in asked_of}

            def begin(name: str) -> None:
                answers = [slots[name].production.answer(ask) for ask in asked_of[name]]
                calls[name] = [asyncio.create_task(answer) for answer in answers]

            begin("old")
            begin("stays")
            await calls["old"][0]
            # Beside the event loop and the passes that run, as a version is loaded that takes another one's place.
            slots["new"] = Slot(await asyncio.to_thread(asked.replica.serve, new))
            begin("old")
            del slots["old"]
            begin("new")
            return {name: await asyncio.wait_for(asyncio.gather(*each), PATIENCE_S) for name, each in calls.items()}

        found = asked.run(scene)
        assert asked.replica.slots["stays"].production.shares().keys() >= {"new@1"}
    for name, answers in found.items():
        for answered, outputs in zip(answers, wanted[name], strict=True):
            np.testing.assert_allclose(answered.outputs, outputs, atol=1e-5)


def test_a_version_that_fails_fails_alone(tmp_path: Path) -> None:
    good, bad = kin(tmp_path / "good", "good"), kin(tmp_path / "bad", "bad", seed=2)
    (ask,) = asks(good, TEXTS[1:2])
    wanted = alone(copy.deepcopy(good), ask)
    with many(good, bad) as asked:
        passes = Passes(asked.served)
        sections: Any = asked.replica.slots["bad"].production._member.sections
        sections.top = _broken

        async def scene(_: object) -> list[Any]:
            names = ("good", "good", "bad", "good", "bad")
            calls = [asked.replica.slots[name].production.answer(ask) for name in names]
            return list(await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE_S))

        found = asked.run(scene)
        assert 2 in passes.versions
        for number in (0, 1, 3):
            np.testing.assert_allclose(found[number].outputs, wanted, atol=1e-5)
        assert [str(found[number]) for number in (2, 4)] == ["it broke", "it broke"]
        assert asked.post("/models/good", {"inputs": TEXTS[1]}, "good@1")


def _broken(*_: object) -> None:
    raise RuntimeError("it broke")


@pytest.mark.parametrize("other", ["another base", "another config", "other inputs", "bf16", "texts"])
def test_a_version_whose_bottom_differs_goes_alone_and_says_so(other: str, tmp_path: Path) -> None:
    engine, strange = kin(tmp_path / "a", "a"), kin(tmp_path / "b", "b", seed=2)
    match other:
        case "another base":
            with torch.no_grad():
                strange.model.bert.embeddings.LayerNorm.bias[0] += 1e-3
        case "another config":
            strange.model.config.layer_norm_eps = 1e-3
        case "other inputs":
            strange.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        case "bf16":
            strange.model.to(torch.bfloat16)
        case "texts":
            strange = talker(tmp_path / "texts")
            strange.version = replace(strange.version, model="b")
    with many(engine, strange) as asked:
        told = [model["shares"] for model in asked.request("GET", "/").json()["models"]]
        assert told == [{}, {}]
        slots = asked.replica.slots
        assert slots["a"].production._batcher is not slots["b"].production._batcher
        assert asked.post("/models/b", {"inputs": TEXTS[1] if other != "texts" else "one two"}, "b@1")


def test_versions_in_bf16_share_too(tmp_path: Path) -> None:
    one, other = kin(tmp_path / "a", "a"), kin(tmp_path / "b", "b", seed=2)
    for engine in (one, other):
        engine.model.to(torch.bfloat16)
    with many(one, other) as asked:
        assert asked.replica.slots["b"].production.shares() == {"a@1": DEPTH}
        assert one.model.bert.encoder.layer[0].attention.self.query.weight.dtype == torch.bfloat16


def test_every_protocol_names_a_version_of_several(family: dict[str, Engine]) -> None:
    shown = {"mood": family["mood"], "tone": family["tone"], "vectors": family["vectors"]}
    wanted = {name: alone(copy.deepcopy(shown[name]), asks(shown[name], TEXTS[1:2])[0])[0] for name in shown}
    scores = {name: np.exp(wanted[name]) / np.exp(wanted[name]).sum() for name in ("mood", "tone")}
    with many(*shown.values()) as asked:
        for name in ("mood", "tone"):
            body = {"inputs": TEXTS[1], "parameters": {"top_k": 3}}
            ((*told,),) = asked.post(f"/models/{name}", body, f"{name}@1")
            assert sorted(each["score"] for each in told) == near(sorted(scores[name].tolist()))
            tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXTS[1]]}
            outputs = asked.post(f"/v2/models/{name}/infer", {"inputs": [tensor]}, f"{name}@1")["outputs"]
            assert outputs[2]["data"] == near(scores[name].tolist())
        for named in ("vectors", "vectors@1"):
            body = {"model": named, "input": TEXTS[1]}
            vector = asked.post("/v1/embeddings", body, "vectors@1")["data"][0]["embedding"]
            assert vector == near((wanted["vectors"] / np.linalg.norm(wanted["vectors"])).tolist())


def test_metrics_count_a_mixed_batch_once_with_all_of_its_rows(family: dict[str, Engine]) -> None:
    with many(*family.values()) as asked:
        requests = [(name, ask) for name, engine in family.items() for ask in asks(engine, TEXTS[1:5])]
        together(asked, requests)
        lines = asked.request("GET", "/metrics").text.splitlines()
    told = {
        line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("banjoray_batch")
    }
    assert told["banjoray_batch_rows_sum"] == len(requests)
    assert told["banjoray_batch_rows_count"] < len(requests)


def test_a_row_that_fails_alone_leaves_its_batch_alone() -> None:
    async def scene() -> list[Any]:
        batcher: Batcher[str, str] = Batcher(
            lambda rows: [ValueError(row) if row == "bad" else row for row in rows], 99
        )
        calls = [batcher.outputs([row]) for row in ("first", "bad", "good")]
        return list(await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE_S))

    first, bad, good = asyncio.run(scene())
    assert (first, str(bad), good) == (["first"], "bad", ["good"])


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"freeze": "backbone"}, DEPTH),
        ({"freeze": {"layers": 2}}, 2),
        ({"freeze": {"layers": 1}, "adapter": {"type": "lora", "r": 2}}, 1),
        ({"adapter": {"type": "lora", "r": 2}}, 0),
    ],
    ids=["backbone", "layers", "lora above a block", "lora"],
)
def test_trained_versions_share_what_was_frozen(changes: dict[str, Any], blocks: int, tmp_path: Path) -> None:
    values = {"train__epochs": 1, "registry__gate__at_least": 0.0} | changes
    jobs = [
        make_job(tmp_path, name=name, storage=str(tmp_path / name), train__seed=seed, **values)
        for seed, name in enumerate("ab")
    ]
    engines = [engine_of(job, registered(job)) for job in jobs]
    for engine in engines:
        vars(engine)["cost"] = lambda: FREE
    with many(*engines) as asked:
        assert asked.replica.slots["a"].production.shares() == ({"b@1": blocks} if blocks else {})
        tables = [engine.model.bert.embeddings.word_embeddings.weight for engine in engines]
        # What no adapter was put into is the same in both, wherever it stands.
        assert tables[0] is tables[1]
