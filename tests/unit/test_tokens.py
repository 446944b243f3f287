"""Token ids of a split: they are the tokenizer's own, and the cache never gives those of another question."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import banjoray.data.tokens
from banjoray.config.data import DataConfig
from banjoray.data import tokens as made_by
from banjoray.data.batches import padded
from banjoray.data.splits import Split
from banjoray.data.tokens import Tokens, tokenizer_digest
from banjoray.tasks.task import task_for
from banjoray.training.preflight import prepare
from factories import make_job, sample_rows, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

TEXTS = tuple(row["text"] for row in sample_rows("train")[:120])
MAX_LENGTH = 16
TASK = task_for("text-classification")


def split_of(texts: Sequence[str], pairs: Sequence[str] = (), targets: Sequence[int] | None = None) -> Split:
    columns = {"first": list(texts)} | ({"second": list(pairs)} if pairs else {})
    labels = np.arange(len(texts)) if targets is None else np.asarray(targets)
    named = dict(zip(("text", "text_pair"), columns, strict=False))
    return Split("train", datasets.Dataset.from_dict(columns), named, labels)


def tokenise(split: Split, tokenizer: Any, max_length: int) -> Tokens:
    return made_by.tokenise(split, TASK, tokenizer, DataConfig(source="-", max_length=max_length))


def cached_tokens(split: Split, tokenizer: Any, max_length: int, cache: Path) -> Tokens:
    return made_by.cached_tokens(split, TASK, tokenizer, DataConfig(source="-", max_length=max_length), cache)


def rows_of(tokens: Tokens) -> Iterator[dict[str, list[int]]]:
    for start, end in zip(tokens.offsets, tokens.offsets[1:], strict=False):
        yield {name: stream[start:end].tolist() for name, stream in tokens.streams.items()}


def same(left: Tokens, right: Tokens) -> bool:
    """Whether two have the same rows, targets and count of cut rows."""
    facts = (list(rows_of(left)), left.targets.tolist(), left.cut)
    return facts == (list(rows_of(right)), right.targets.tolist(), right.cut)


def marking() -> Any:
    """A tokenizer that also says which text of a pair a token belongs to."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_the_tokens_of_every_row_are_the_tokenizers_own() -> None:
    # More rows than go through the tokenizer at once.
    texts = [f"{text} {number}" for number, text in enumerate(TEXTS * 10)]
    tokens, tokenizer = tokenise(split_of(texts), tiny_tokenizer(), MAX_LENGTH), tiny_tokenizer()
    own = [tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"] for text in texts]
    assert [row["input_ids"] for row in rows_of(tokens)] == own
    assert tokens.lengths.tolist() == [len(ids) for ids in own]
    assert len(tokens) == len(texts)
    assert tokens.targets.tolist() == list(range(len(texts)))


def test_rows_longer_than_max_length_are_cut_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    whole = [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    for limit in (4, MAX_LENGTH, max(whole) - 1, max(whole)):
        tokens = tokenise(split_of(TEXTS), tiny_tokenizer(), limit)
        assert tokens.cut == sum(length > limit for length in whole)
        assert tokens.lengths.tolist() == [min(length, limit) for length in whole]


def test_pairs_say_which_text_a_token_belongs_to_where_the_tokenizer_does() -> None:
    first, second = TEXTS[:20], TEXTS[20:40]
    tokens = tokenise(split_of(first, second), marking(), MAX_LENGTH)
    tokenizer = marking()
    encoded = [tokenizer(*pair, truncation=True, max_length=MAX_LENGTH) for pair in zip(first, second, strict=True)]
    assert list(rows_of(tokens)) == [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in encoded]
    assert {kind for row in rows_of(tokens) for kind in row["token_type_ids"]} == {0, 1}
    assert list(tokenise(split_of(first, second), tiny_tokenizer(), MAX_LENGTH).streams) == ["input_ids"]


@pytest.mark.parametrize("pairs", [(), TEXTS[20:40]], ids=["texts", "pairs"])
def test_padded_rows_are_what_the_tokenizer_pads(pairs: Sequence[str]) -> None:
    tokens, tokenizer = tokenise(split_of(TEXTS[:20], pairs), marking(), MAX_LENGTH), marking()
    for rows in ([0], [3, 1, 17], list(range(20))):
        encoded = [dict(list(rows_of(tokens))[row]) for row in rows]
        own = tokenizer.pad(encoded, return_tensors="np")
        found = padded(tokens, np.asarray(rows), tokenizer.pad_token_id)
        assert set(found) == set(own)
        for name, array in found.items():
            assert array.dtype == np.int64
            np.testing.assert_array_equal(array, own[name])


def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, a tokenizer that is called fails the test."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tiny_tokenizer()), "__call__", called)


def test_a_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    made = cached_tokens(split_of(TEXTS), tokenizer, MAX_LENGTH, tmp_path)
    assert same(made, tokenise(split_of(TEXTS), tiny_tokenizer(), MAX_LENGTH))
    deaf(monkeypatch)
    for again in (tokenizer, tiny_tokenizer()):
        assert same(cached_tokens(split_of(TEXTS), again, MAX_LENGTH, tmp_path), made)


def test_a_worker_finds_warm_what_the_driver_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's tokenizer is fresh at the validation rows, the driver's was used on the train rows before."""
    job = make_job(tmp_path)
    prepared = prepare(job).rows
    deaf(monkeypatch)
    again = prepare(job).rows
    assert same(again.train, prepared.train)
    assert same(again.validation, prepared.validation)


def other_words() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["i feel"])
    return tokenizer


def cuts_left() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.truncation_side = "left"
    return tokenizer


def keeps_case() -> Any:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    return tokenizer


BASE = (split_of(TEXTS), tiny_tokenizer, MAX_LENGTH)


@pytest.mark.parametrize(
    ("split", "tokenizer", "max_length"),
    [
        (BASE[0], tiny_tokenizer, MAX_LENGTH - 1),
        (BASE[0], other_words, MAX_LENGTH),
        (BASE[0], cuts_left, MAX_LENGTH),
        (BASE[0], keeps_case, MAX_LENGTH),
        (BASE[0], marking, MAX_LENGTH),
        (split_of((*TEXTS[:-1], "other words")), tiny_tokenizer, MAX_LENGTH),
        (split_of(TEXTS, targets=[0] * len(TEXTS)), tiny_tokenizer, MAX_LENGTH),
        (split_of(TEXTS[::-1], targets=range(len(TEXTS))[::-1]), tiny_tokenizer, MAX_LENGTH),
        (split_of(TEXTS, TEXTS), tiny_tokenizer, MAX_LENGTH),
    ],
    ids=["max_length", "words", "side", "normalizer", "inputs", "text", "target", "order", "pairs"],
)
def test_another_question_never_gets_the_old_answer(
    tmp_path: Path, split: Split, tokenizer: Callable[[], Any], max_length: int
) -> None:
    old = cached_tokens(BASE[0], BASE[1](), BASE[2], tmp_path)
    new = cached_tokens(split, tokenizer(), max_length, tmp_path)
    assert same(new, tokenise(split, tokenizer(), max_length))
    assert not same(new, old)
    assert same(cached_tokens(BASE[0], BASE[1](), BASE[2], tmp_path), old)


def test_another_chat_template_is_another_tokenizer() -> None:
    plain, talking, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    talking.chat_template = "{{ messages[0].content }}"
    other.chat_template = "{{ messages[-1].content }}"
    assert len({tokenizer_digest(tokenizer) for tokenizer in (plain, talking, other)}) == 3


def test_the_digest_of_a_tokenizer_does_not_depend_on_what_it_was_used_for() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(list(TEXTS), truncation=True, max_length=5, padding=True)
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(tiny_tokenizer())


FILES = ("tokens.json", "input_ids.npy", "token_type_ids.npy", "offsets.npy", "targets.npy", "rows.npy")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [None, 0, 0.5], ids=["missing", "empty", "half"])
def test_half_an_entry_is_rebuilt(tmp_path: Path, name: str, keep: float | None) -> None:
    split = split_of(TEXTS)
    whole = cached_tokens(split, marking(), MAX_LENGTH, tmp_path)
    expected = tokenise(split, marking(), MAX_LENGTH)
    del whole
    (entry,) = tmp_path.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == sorted(FILES)
    content = (entry / name).read_bytes()
    (entry / name).unlink()
    if keep is not None:
        (entry / name).write_bytes(content[: int(len(content) * keep)])
    assert same(cached_tokens(split, marking(), MAX_LENGTH, tmp_path), expected)
    assert (entry / name).read_bytes() == content
    assert list(tmp_path.iterdir()) == [entry]


def test_many_that_make_the_same_entry_at_once_all_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = 6
    everybody, plainly = threading.Barrier(many, timeout=60), made_by.tokenise

    def together(*arguments: Any) -> Tokens:
        tokens = plainly(*arguments)
        everybody.wait()
        return tokens

    expected = tokenise(BASE[0], tiny_tokenizer(), MAX_LENGTH)
    monkeypatch.setattr(banjoray.data.tokens, "tokenise", together)
    cache = tmp_path / "not" / "there" / "yet"
    with ThreadPoolExecutor(many) as pool:
        calls = [pool.submit(cached_tokens, BASE[0], tiny_tokenizer(), MAX_LENGTH, cache) for _ in range(many)]
        found = [call.result() for call in calls]
    assert all(same(tokens, expected) for tokens in found)
    assert len(list(cache.iterdir())) == 1


def test_cached_tokens_are_mapped_and_cannot_be_written(tmp_path: Path) -> None:
    cached_tokens(BASE[0], tiny_tokenizer(), MAX_LENGTH, tmp_path)
    tokens = cached_tokens(BASE[0], tiny_tokenizer(), MAX_LENGTH, tmp_path)
    assert isinstance(tokens.streams["input_ids"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens.streams["input_ids"][0] = 1


def test_tokens_are_kept_beside_the_runs_or_at_home_where_those_are_behind_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for storage, cache in {
        "runs": Path("runs/cache/tokens"),
        str(tmp_path): tmp_path / "cache/tokens",
        "s3://bucket/runs": tmp_path / "home/.cache/banjoray/tokens",
        "memory://runs": tmp_path / "home/.cache/banjoray/tokens",
    }.items():
        assert banjoray.data.tokens.token_cache(make_job(tmp_path, storage=storage)) == cache
