"""Models of random weights are made once, equal everywhere, whole, and of use for what their kind is for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from banjoray.config.job import HubConfig, ModelConfig
from banjoray.data.sources import SHIPPED
from banjoray.errors import ModelError
from banjoray.models import tiny
from banjoray.models.loading import Base, find_base, load_tokenizer, weights_digest
from banjoray.models.tiny import FILES, NAMES, tiny_base

LOADERS = {
    "tiny-bart": "AutoModelForSeq2SeqLM",
    "tiny-bert": "AutoModelForMaskedLM",
    "tiny-gpt2": "AutoModelForCausalLM",
    "tiny-t5": "AutoModelForSeq2SeqLM",
}
TEXTS = ("Wo ist die nächste Kirche?", "I lent him   two books,\nand a hat.", "naïve café 😀")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def loaded(folder: Path, name: str) -> Any:
    return getattr(transformers, LOADERS[name]).from_pretrained(folder).eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_is_made_once_and_equal_in_another_place(name: str, bases: Path, tmp_path: Path) -> None:
    first = tiny_base(name, bases)
    written = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert tiny_base(name, bases) == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == written
    torch.rand(3)
    other = tiny_base(name, tmp_path)
    assert other.name == first.name
    assert {path.name: path.read_bytes() for path in other.iterdir()} == {
        path.name: path.read_bytes() for path in first.iterdir()
    }
    assert not [path for path in tmp_path.iterdir() if path != other]


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_model_is_small_and_loads_with_its_head_and_nothing_new(name: str, bases: Path) -> None:
    kind = getattr(transformers, LOADERS[name])
    model, told = kind.from_pretrained(tiny_base(name, bases), output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    assert len(load_tokenizer(Base(str(tiny_base(name, bases)), "", {}))) == model.config.vocab_size


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_made_of_known_tokens_and_comes_back(name: str, bases: Path) -> None:
    tokenizer = load_tokenizer(Base(str(tiny_base(name, bases)), "", {}))
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        assert len(ids) == len(tokenizer(text, add_special_tokens=False)["input_ids"]) + {
            "tiny-bart": 2,
            "tiny-bert": 2,
            "tiny-gpt2": 0,
            "tiny-t5": 1,
        }.get(name, -1)


def test_common_words_are_tokens_of_their_own_and_say_where_they_stand(bases: Path) -> None:
    tokenizer = load_tokenizer(Base(str(tiny_base("tiny-bert", bases)), "", {}))
    found = tokenizer("the children and the house", "in the garden", return_offsets_mapping=True)
    assert found["token_type_ids"] == [0] * (found["token_type_ids"].count(0)) + [1] * sum(found["token_type_ids"])
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
    assert [tokens[0], tokens[-1], tokens.count("[SEP]")] == ["[CLS]", "[SEP]", 2]
    place = tokens.index("Ġand")
    assert found["offset_mapping"][place] == (13, 16)


@pytest.mark.parametrize("name", NAMES)
def test_two_texts_get_unlike_outputs(name: str, bases: Path) -> None:
    folder = tiny_base(name, bases)
    tokenizer, model = load_tokenizer(Base(str(folder), "", {})), loaded(folder, name)
    outputs = []
    for text in ("A dog is in the water.", "The meeting is moved to Thursday."):
        inputs = tokenizer(text, return_tensors="pt")
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.inference_mode():
            outputs.append(model(**inputs).logits[0, -1])
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_making_one_leaves_the_callers_random_numbers_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    tiny_base("tiny-gpt2", tmp_path)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("lost", FILES)
def test_part_of_a_model_is_made_again(lost: str, bases: Path, tmp_path: Path) -> None:
    whole = tiny_base("tiny-gpt2", bases)
    part = tmp_path / whole.name
    shutil.copytree(whole, part)
    (part / lost).unlink()
    assert tiny_base("tiny-gpt2", tmp_path) == part
    assert weights_digest(part) == weights_digest(whole)
    assert list(tmp_path.iterdir()) == [part]


def test_a_process_that_comes_second_takes_what_the_first_has_made(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, make = tiny_base("tiny-gpt2", bases), tiny._make

    def beaten(kind: Any, folder: Path) -> None:
        make(kind, folder)
        shutil.copytree(whole, tmp_path / whole.name)
        (tmp_path / whole.name / "first").touch()

    monkeypatch.setattr(tiny, "_make", beaten)
    assert (tiny_base("tiny-gpt2", tmp_path) / "first").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / whole.name]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match=r"model\.base: banjoray:tiny-t5 is made in .*file, which can't be written"):
        tiny_base("tiny-t5", tmp_path / "file")


def test_a_job_finds_one_by_its_name_with_a_digest(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = find_base(ModelConfig(base="banjoray:tiny-bert"), HubConfig(offline=True))
    assert Path(found.path).parent == tmp_path / ".cache/banjoray/bases"
    assert found.digest == weights_digest(tiny_base("tiny-bert", bases))


def test_other_texts_or_libraries_are_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = tiny._key(tiny._KINDS["tiny-t5"])
    assert usual != tiny._key(tiny._KINDS["tiny-bart"])
    monkeypatch.setattr(tiny, "_texts_digest", lambda: "other")
    assert tiny._key(tiny._KINDS["tiny-t5"]) != usual
    monkeypatch.undo()
    assert tiny._key(tiny._KINDS["tiny-t5"]) == usual
    monkeypatch.setattr(tiny, "version", lambda name: f"{name} 99")
    assert tiny._key(tiny._KINDS["tiny-t5"]) != usual


def test_the_tokenizer_learns_from_every_set_that_ships() -> None:
    texts = set(tiny._texts())
    for folder in (path for path in SHIPPED.iterdir() if path.is_dir()):
        row = json.loads((folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
        assert texts.issuperset(tiny._strings(row)), folder.name
