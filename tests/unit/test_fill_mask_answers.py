"""Fill-mask over HTTP: answers are those of a plain forward pass and of a pipeline of transformers; refusals."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from banjoray.config.job import JobConfig
from banjoray.errors import RequestError
from banjoray.serving.engine import Engine
from banjoray.tasks.fill_mask import FillMask
from banjoray.tasks.task import Ask
from engines import ask, engine_of, folder_of, registered
from masked import FAMILIES, MASKS, masked_base, masked_job, pieces_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TASK = FillMask()
# {0} is the model's mask.
TEXTS = (
    "the {0} smells stronger now",
    "he sprang out of {0} with a whoop, thrilled to be seven years old at last!",
    "{0}",
    "who {0} across my {0} again?",
)
Served = tuple[JobConfig, Engine, Path, str]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    """Makes, once for each family, a trained and registered model: its job, engine, folder, and mask token."""
    made: dict[str, Served] = {}

    def make(family: str) -> Served:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            masked_base(folder / "base", family)
            job = masked_job(folder, train__epochs=1)
            version = registered(job)
            made[family] = (job, engine_of(job, version), folder_of(job, version), MASKS.get(family, "[MASK]"))
        return made[family]

    return make


def scores(answer: Any) -> list[float]:
    """All scores of an answer, however deep they lie."""
    if isinstance(answer, dict):
        return [answer["score"]]
    return [score for part in answer for score in scores(part)]


def words(answer: Any) -> Any:
    """An answer without its scores."""
    if isinstance(answer, dict):
        return {key: value for key, value in answer.items() if key != "score"}
    return [words(part) for part in answer]


def same(found: Any, expected: Any) -> None:
    assert words(found) == words(expected)
    assert scores(found) == pytest.approx(scores(expected), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_a_plain_forward_pass(served: Callable[[str], Served], family: str) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    _, engine, folder, mask = served(family)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    for text in (TEXTS[0].format(mask), TEXTS[1].format(mask)):
        encoded = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            logits = model(**encoded).logits[0]
        ((place,),) = (encoded["input_ids"][0] == tokenizer.mask_token_id).nonzero(as_tuple=True)[0][None].tolist()
        best = logits[place].softmax(-1).topk(3)
        found = ask(engine, {"inputs": text, "parameters": {"top_k": 3}})
        assert [one["token"] for one in found] == best.indices.tolist()
        assert [one["score"] for one in found] == pytest.approx(best.values.tolist(), abs=1e-5)
        for one in found:
            word = tokenizer.decode([one["token"]])
            assert one["token_str"] == word
            # What a hand would write into the gap; pieces of words attach themselves.
            written = str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])).split(mask)
            assert one["sequence"].startswith(written[0].strip())
            assert one["sequence"].endswith(written[1].strip())


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_answers_are_those_of_transformers_pipeline(served: Callable[[str], Served], family: str) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

    _, engine, folder, mask = served(family)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    texts = [text.format(mask) for text in TEXTS]
    parameters: list[dict[str, Any]] = [{}, {"top_k": 2}, {"targets": ["bed", "lake", "The", "##ine"]}]
    parameters += [{"targets": "lake"}, {"targets": ["lake", "bed", "lake"], "top_k": 1}, {"top_k": 10_000}]
    for options in parameters:
        # The pipeline can't give more words than there are.
        plain = options | ({"top_k": len(tokenizer)} if options.get("top_k") == 10_000 else {})
        for text in texts:
            same(ask(engine, {"inputs": text, "parameters": options}), theirs(text, **plain))
        same(ask(engine, {"inputs": texts, "parameters": options}), theirs(texts, **plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_alone_is_the_answer_in_any_batch(served: Callable[[str], Served], family: str) -> None:
    _, engine, _, mask = served(family)
    texts = [text.format(mask) for text in TEXTS]
    alone = [ask(engine, {"inputs": text}) for text in texts]
    same(ask(engine, {"inputs": texts}), alone)
    same(ask(engine, {"inputs": texts[::-1]}), alone[::-1])
    same(ask(engine, {"inputs": texts}, together=False), alone)


def test_shapes_are_one_list_a_list_per_mask_and_a_list_per_text(served: Callable[[str], Served]) -> None:
    _, engine, _, mask = served("bert")
    one, many = f"a {mask} on the lake", f"a {mask} on the {mask}"
    found = ask(engine, {"inputs": one})
    assert len(found) == 5
    assert all(set(entry) == {"score", "token", "token_str", "sequence"} for entry in found)
    assert scores(found) == sorted(scores(found), reverse=True)
    assert found[0]["sequence"] == f"a {found[0]['token_str']} on the lake"
    assert [len(part) for part in ask(engine, {"inputs": many, "parameters": {"top_k": 2}})] == [2, 2]
    assert ask(engine, {"inputs": [one]}) == [found]
    everything = ask(engine, {"inputs": one, "parameters": {"top_k": 10_000}})
    assert len(everything) == len(pieces_tokenizer())
    assert sum(scores(everything)) == pytest.approx(1, abs=1e-5)


def test_every_mask_of_a_text_in_several_windows_is_answered_in_order(served: Callable[[str], Served]) -> None:
    _, engine, _, mask = served("bert")
    long = " ".join(["the lake at dawn"] * 12)
    text = f"{mask} {long} {mask} {long} {mask}"
    found = ask(engine, {"inputs": text, "parameters": {"top_k": 1}})
    assert [len(part) for part in found] == [1, 1, 1]
    tokenizer = pieces_tokenizer()
    ids = tokenizer(text)["input_ids"]
    places = [place for place, number in enumerate(ids) if number == tokenizer.mask_token_id]
    assert places == [1, 50, 99]
    for (one,), place in zip(found, places, strict=True):
        # As if the model had seen it all at once: special tokens at the ends alone.
        assert one["sequence"] == tokenizer.decode([*ids[:place], one["token"], *ids[place + 1 :]])
    # One mask in the second window, and no special token in between.
    (alone,) = ask(engine, {"inputs": f"{long} {mask} {long}", "parameters": {"targets": ["bed"]}})
    assert alone["sequence"] == f"{long} bed {long}"


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_text_without_the_models_own_mask_is_refused(served: Callable[[str], Served], family: str) -> None:
    _, engine, _, mask = served(family)
    others = {"[MASK]", "<mask>", "<mask_token>"} - {mask}
    for text in ("no gap at all", *(f"the {other} of another model" for other in others)):
        with pytest.raises(RequestError) as caught:
            ask(engine, {"inputs": text})
        assert str(caught.value) == f"inputs: found no {mask}; needed at least one, this model's mask"
        assert caught.value.status == 422
    with pytest.raises(RequestError, match=r"^inputs\[1\]: found no "):
        ask(engine, {"inputs": [f"a {mask}", "none"]})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"targets": ["bed", "sausages"]},
            "parameters.targets[1]: 'sausages' is 2 tokens of this model (saus, ##ages); n",
        ),
        ({"targets": ["zzz"]}, "parameters.targets[0]: 'zzz' is not in the model's vocabulary; needed words that are"),
        ({"targets": []}, "parameters.targets: an empty list; needed a word, or a list of words"),
        ({"targets": [7]}, "parameters.targets[0]: found int; needed text"),
        ({"targets": {"a": 1}}, "parameters.targets[0]: found dict; needed text"),
        ({"targets": " "}, "parameters.targets[0]: found nothing but blanks; needed text"),
        ({"top_k": 0}, "parameters.top_k: found 0; needed a whole number >= 1"),
        ({"topk": 3}, "parameters: unknown ['topk']; fill-mask has top_k, targets"),
    ],
)
def test_wrong_parameters_are_refused(
    served: Callable[[str], Served], parameters: dict[str, Any], message: str
) -> None:
    _, engine, _, mask = served("bert")
    with pytest.raises(RequestError) as caught:
        ask(engine, {"inputs": f"a {mask}", "parameters": parameters})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "inputs: an empty list; needed a text with a mask, or a list of such texts"),
        (None, "inputs: found NoneType; needed text"),
        (7, "inputs: found int; needed text"),
        ({"text": "a [MASK]"}, "inputs: found dict; needed text"),
        ("  ", "inputs: found nothing but blanks; needed text"),
        (["a [MASK]", 7], "inputs[1]: found int; needed text"),
        (["a [MASK]", ["b [MASK]"]], "inputs[1]: found list; needed text"),
        (["half \ud83d"], "inputs[0]: found half a character (a lone surrogate); needed text"),
    ],
)
def test_inputs_of_another_shape_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        TASK.parse(inputs, {})
    assert str(caught.value) == message


def test_inputs_become_rows() -> None:
    assert TASK.parse("a [MASK]", {"top_k": 1}) == Ask([{"text": "a [MASK]"}], {"top_k": 1}, single=True)
    assert TASK.parse(["a", "b"], {}) == Ask([{"text": "a"}, {"text": "b"}], {})


def test_of_a_forward_pass_the_masks_alone_are_kept(served: Callable[[str], Served]) -> None:
    _, engine, _, mask = served("bert")
    rows = engine.encode([{"text": text} for text in (f"a {mask}", "none", f"{mask} a {mask}")])
    outputs = engine.forward([feature for row in rows for feature in row])
    size = len(pieces_tokenizer())
    assert [table.shape for table in outputs] == [(1, size), (0, size), (2, size)]
    assert all(table.dtype == np.float32 for table in outputs)
    assert np.exp(outputs[2]).sum(1) == pytest.approx(1, abs=1e-5)
