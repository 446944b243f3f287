"""Questions with contexts as windows: those of the tokenizer itself, and every answer at its tokens."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest

from banjoray.config.data import DataConfig
from banjoray.data.contexts import NO_ANSWER, context_windows
from banjoray.data.tokens import IGNORED, Features
from banjoray.errors import ConfigError, RequestError

TEXTS = (
    "The river Aar rises in the Alps, at 2,310 m, and joins the Rhine (near Koblenz).  It's 288 km long.",
    "Zürich's café “Odeon”\topened in 1911;\nmany émigrés, e.g. Lenin, came — naïvely — for coffee at 0.25 €.",
    "東京は日本の首都です。 Tokyo 🗼 has 13,960,000 people and 👩‍🔬 many scientists.",
)
KINDS = ("wordpiece", "bytes", "metaspace", "plain")


@cache
def tokenizer(kind: str) -> Any:
    """A tokenizer of a family, trained on the texts: BERT's, RoBERTa's, ALBERT's, GPT-2's without special tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<cls>", "<sep>"]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    trainer: Any
    match kind:
        case "wordpiece":
            made = Tokenizer(models.WordPiece(unk_token="<unk>"))
            made.normalizer = normalizers.BertNormalizer()
            made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            trainer = trainers.WordPieceTrainer(vocab_size=120, **options)
        case "metaspace":
            made = Tokenizer(models.Unigram())
            made.pre_tokenizer = pre_tokenizers.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **options)
        case _:
            made = Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **options)
    made.train_from_iterator(TEXTS, trainer)
    if kind == "plain":
        made.post_processor = processors.ByteLevel(trim_offsets=False)
        return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    types = 1 if kind == "wordpiece" else 0
    middle = "<sep> <sep>" if kind == "bytes" else "<sep>"
    made.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair=f"<cls> $A {middle} $B:{types} <sep>:{types}",
        special_tokens=[("<cls>", 2), ("<sep>", 3)],
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **named
    )


def data(max_length: int = 40, stride: int = 8) -> DataConfig:
    return DataConfig(source="x", max_length=max_length, stride=stride)


def rows(*answers: tuple[str, str], question: str = "Where is it?") -> dict[str, Any]:
    """Columns of contexts, each with an answer; "" for none."""
    told: list[dict[str, Any]] = [
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
        for context, answer in answers
    ]
    contexts = [context for context, _ in answers]
    return {"question": [question] * len(contexts), "context": contexts, "answers": told}


def lists(cells: Any) -> list[list[int]]:
    return [np.asarray(part).tolist() for part in cells]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("max_length", "stride"), [(40, 8), (32, 0), (64, 24), (400, 32)])
def test_windows_are_those_of_the_tokenizer(kind: str, max_length: int, stride: int) -> None:
    cut = tokenizer(kind)
    contexts = [" ".join(TEXTS[: count + 1]) for count in range(3)]
    found = context_windows({"question": ["Where?"] * 3, "context": contexts}, cut, data(max_length, stride))
    expected = cut(
        ["Where?"] * 3,
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
    )
    cut.backend_tokenizer.no_truncation()
    assert lists(found.inputs["input_ids"]) == expected["input_ids"]
    if kind == "wordpiece":
        assert lists(found.inputs["token_type_ids"]) == expected["token_type_ids"]
    elif kind != "plain":
        # Where its template says 0 for both, tokenizers 0.23 says 1 for the context from the second window on.
        assert {number for window in lists(found.inputs["token_type_ids"]) for number in window} == {0}
    assert list(found.rows) == expected["overflow_to_sample_mapping"]
    assert (found.targets, found.cut) == (None, 0)


def pieces() -> Iterator[tuple[str, str]]:
    """Every run of one to three words of the texts, but those that stand in front of it already."""
    for text in TEXTS:
        words = [match.span() for match in re.finditer(r"\w+", text)]
        for count in (1, 2, 3):
            for first, last in zip(words, words[count - 1 :], strict=False):
                if text.index(text[first[0] : last[1]]) == first[0]:
                    yield text, text[first[0] : last[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_every_answer_cover_it_and_no_blank_beside_it(kind: str) -> None:
    wanted = list(pieces())
    found = context_windows(rows(*wanted), tokenizer(kind), data(400))
    assert list(found.rows) == list(range(len(wanted)))
    assert len(wanted) > 100
    for (context, answer), target, starts, ends in zip(
        wanted, found.targets or [], found.aside["starts"], found.aside["ends"], strict=True
    ):
        first, last, length = target
        assert length == len(starts)
        piece = context[starts[first] : ends[last]]
        assert answer in piece
        assert piece == piece.strip()
        # A metaspace tokenizer may join a word and the punctuation next to it, and no more.
        assert len(piece.split()) == len(answer.split())
        if kind == "wordpiece":
            assert piece == answer


@pytest.mark.parametrize("kind", KINDS)
def test_every_window_that_holds_all_of_an_answer_has_it_and_the_others_have_none(kind: str) -> None:
    context = " ".join(TEXTS)
    for answer in ("Alps", "Odeon", "joins the Rhine", "13,960,000", "scientists"):
        found = context_windows(rows((context, answer)), tokenizer(kind), data(40, 12))
        assert len(found.rows) > 3
        holding = 0
        start = context.index(answer)
        whole = context_windows(rows((context, answer)), tokenizer(kind), data(4000))
        (target,) = whole.targets or []
        covered = whole.aside["starts"][0][target[0]], whole.aside["ends"][0][target[1]]
        assert covered[0] <= start < covered[1]
        for (first, last, _), starts, ends in zip(
            found.targets or [], *(lists(found.aside[name]) for name in ("starts", "ends")), strict=True
        ):
            if covered[0] in starts and covered[1] in ends:
                holding += 1
                assert (starts[first], ends[last]) == covered
            else:
                assert first == last == starts.index(NO_ANSWER)
        assert holding


@pytest.mark.parametrize("kind", KINDS)
def test_only_tokens_of_the_context_can_be_answers_and_one_stands_for_none(kind: str) -> None:
    found = context_windows(rows((" ".join(TEXTS), "")), tokenizer(kind), data())
    encoded = tokenizer(kind)("Where is it?", add_special_tokens=False)["input_ids"]
    before = {"wordpiece": 2, "metaspace": 2, "bytes": 3, "plain": 0}[kind] + len(encoded)
    for starts, target in zip(lists(found.aside["starts"]), found.targets or [], strict=True):
        assert starts.count(NO_ANSWER) == 1
        assert starts.index(NO_ANSWER) == 0
        assert max(starts[:before]) < 0 <= max(starts[before : before + 3])
        assert starts[-1] < 0 or kind == "plain"
        assert list(target) == [0, 0, len(starts)]


def test_an_answer_that_the_tokenizer_drops_is_not_learned() -> None:
    found = context_windows(rows(("a\ufffdb \u200b river", "\u200b")), tokenizer("wordpiece"), data())
    assert [target[:2] for target in found.targets or []] == [[IGNORED, IGNORED]]


def test_the_first_of_several_answers_is_learned() -> None:
    told = rows((TEXTS[0], "Alps"))
    told["answers"][0] = {"text": ["Alps", "Aar"], "answer_start": [TEXTS[0].index("Alps"), TEXTS[0].index("Aar")]}
    assert context_windows(told, tokenizer("bytes"), data(200)).targets == (
        context_windows(rows((TEXTS[0], "Alps")), tokenizer("bytes"), data(200)).targets
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_that_is_too_long_is_cut_and_counted(kind: str) -> None:
    told = rows((TEXTS[0], "Alps"), (TEXTS[0], "Alps"), question="Where is it? " * 40)
    told["question"][1] = "Where?"
    found = context_windows(told, tokenizer(kind), data(40, 8))
    assert found.cut == 1
    assert max(map(len, found.inputs["input_ids"])) <= 40
    first = lists(found.inputs["input_ids"])[0]
    question = tokenizer(kind)("Where is it? " * 40, add_special_tokens=False)["input_ids"]
    special = 0 if kind == "plain" else 1
    fixed = {"wordpiece": 3, "metaspace": 3, "bytes": 4, "plain": 0}[kind]
    kept = (40 - fixed) // 2
    assert first[special : special + kept] == question[:kept]
    assert first[special + kept] != question[kept]


def test_a_job_whose_windows_share_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data\.stride: found 32; with data\.max_length 64 windows of 64 tokens"):
        context_windows(rows((TEXTS[0], "Alps")), tokenizer("wordpiece"), data(64, 32))
    context_windows(rows((TEXTS[0], "Alps")), tokenizer("wordpiece"), data(64, 30))


def asked(**options: int) -> Features:
    told: dict[str, list[Any]] = {"question": ["Where is it?"], "context": [" ".join(TEXTS)]}
    return context_windows(told | {key: [value] for key, value in options.items()}, tokenizer("bytes"), data())


def test_a_request_may_cut_its_rows_otherwise() -> None:
    usual = asked()
    assert len(asked(doc_stride=4).rows) < len(usual.rows) < len(asked(doc_stride=15).rows)
    assert max(map(len, asked(max_seq_len=30).inputs["input_ids"])) == 30
    assert len(asked(max_seq_len=30).rows) > len(usual.rows)
    shorter = asked(max_question_len=3).inputs["input_ids"][0]
    question = tokenizer("bytes")("Where is it?", add_special_tokens=False)["input_ids"]
    assert list(shorter[:6]) == [2, *question[:3], 3, 3]
    # More than there is room for is cut to that.
    assert lists(asked(max_question_len=1000).inputs["input_ids"]) == lists(usual.inputs["input_ids"])


def test_a_request_whose_windows_can_not_be_made_is_refused() -> None:
    with pytest.raises(RequestError, match=r"parameters\.max_seq_len: found 41; .* windows of 40 tokens"):
        asked(max_seq_len=41)
    with pytest.raises(RequestError, match=r"max_seq_len 40 with doc_stride 18; .* have 18 for the context"):
        asked(doc_stride=18)
    with pytest.raises(RequestError, match=r"max_seq_len 5 with doc_stride 0"):
        asked(max_seq_len=5)
    long = {"question": ["Where is it? " * 9], "context": [TEXTS[0]]}
    with pytest.raises(RequestError, match=r"a question of \d+ tokens \('Where.*room for 18\. With parameters\.max_q"):
        context_windows(long, tokenizer("bytes"), data())


def test_requests_at_the_same_time_do_not_change_each_others_windows() -> None:
    sizes = [28, 30, 32, 34, 36, 40] * 20
    alone = {size: lists(asked(max_seq_len=size).inputs["input_ids"]) for size in sizes}
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda size: lists(asked(max_seq_len=size).inputs["input_ids"]), sizes))
    assert together == [alone[size] for size in sizes]


def test_a_tokenizer_that_does_not_know_where_its_tokens_stand_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"model\.base: Slow can't say where .* fast tokenizer"):
        context_windows(rows((TEXTS[0], "")), Slow(), data())
