"""Conversations by a chat template: what is read, what has to be found; a version is asked as it was taught."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers

from banjoray.config.data import DataConfig
from banjoray.data.conversations import unusable_conversations
from banjoray.data.sources import Source
from banjoray.data.splits import Split
from banjoray.data.tokens import IGNORED, cached_tokens
from banjoray.errors import ConfigError, DataError, ModelError
from banjoray.tasks.chat import conversation_ids, prompt_ids, turn_end
from banjoray.tasks.text_generation import TextGeneration
from banjoray.training.preflight import prepare, profiled
from engines import ask, engine_of, folder_of, registered
from writers import BEGIN, DECODERS, END, bytes_tokenizer, phrases, words_tokenizer, writer, writing_job

TASK = TextGeneration()
TURN = "{{ '<|start|>' + m.role + '\\n' + m.content + '<|end|>\\n' }}"
ASKING = "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASKING
# As Llama's: it begins with the token that the tokenizer would put before a text.
WITH_BEGIN = "{{ bos_token }}" + CHATML
MARKED_TURN = (
    "{{ '<|start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>\\n' }}"
)
MARKED = "{% for m in messages %}" + MARKED_TURN + "{% endfor %}" + ASKING
# What the assistant said before is left out.
SHOWN = "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}"
FORGETFUL = SHOWN + TURN + "{% endif %}{% endfor %}" + ASKING
THINKING = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")
WITHOUT_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML
TWO_ANSWERS = "system:six user:one two assistant:eins zwei user:two assistant:zwei"


def talking(template: str | None = CHATML, single: str = "$A", pads: bool = True) -> Any:
    """`words_tokenizer` with the tokens of a conversation, and a template."""
    tokenizer = words_tokenizer(single, pads)
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.add_tokens(["system", "user", "assistant", "<think>"])
    tokenizer.chat_template = template
    return tokenizer


def turns(told: str) -> list[dict[str, str]]:
    """A conversation from words, of which those before a colon are roles."""
    found: list[dict[str, str]] = []
    for word in told.split():
        role, colon, first = word.rpartition(":")
        if colon:
            found.append({"role": role, "content": first})
        else:
            found[-1]["content"] += f" {word}"
    return found


def words_of(ids: Sequence[int], tokenizer: Any) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


def data_of(**changes: Any) -> DataConfig:
    return DataConfig(source="-", columns={"messages": "messages"}, **changes)


def chat_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`phrases` as conversations."""
    return [{"messages": turns(f"user:{row['text']} assistant:{row['target']}")} for row in rows]


def encoded(told: str, tokenizer: Any, **changes: Any) -> tuple[str, str, int]:
    """What a model reads of a conversation, what it has to find after each token (_: nothing), and if it is cut."""
    features = TASK.encode({"messages": [turns(told)]}, tokenizer, data_of(**changes))
    assert features.targets is not None
    (read,), (targets,) = features.inputs["input_ids"], features.targets
    found = ["_" if number == IGNORED else words_of([number], tokenizer) for number in targets]
    return words_of([*map(int, read)], tokenizer), " ".join(found), features.cut


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_what_the_assistant_wrote_and_what_ends_its_turns_has_to_be_found(template: str) -> None:
    tokenizer = talking(template)
    assert encoded("user:one two assistant:eins zwei", tokenizer) == (
        "<|start|> user one two <|end|> <|start|> assistant eins zwei",
        "_ _ _ _ _ _ eins zwei <|end|>",
        0,
    )
    assert encoded(TWO_ANSWERS, tokenizer) == (
        "<|start|> system six <|end|> <|start|> user one two <|end|> <|start|> assistant eins zwei <|end|> "
        "<|start|> user two <|end|> <|start|> assistant zwei",
        "_ _ _ _ _ _ _ _ _ _ eins zwei <|end|> _ _ _ _ _ _ zwei <|end|>",
        0,
    )


def test_a_text_and_its_target_are_a_turn_of_the_user_and_one_of_the_assistant() -> None:
    tokenizer = talking()
    data = DataConfig(source="-", columns={"target": "target"})
    found = TASK.encode({"text": ["one two"], "target": ["eins zwei"]}, tokenizer, data)
    expected = TASK.encode({"messages": [turns("user:one two assistant:eins zwei")]}, tokenizer, data_of())
    assert (found.inputs, found.targets) == (expected.inputs, expected.targets)


def test_turns_after_the_last_answer_are_left_out() -> None:
    tokenizer = talking()
    assert encoded(f"{TWO_ANSWERS} user:six", tokenizer) == encoded(TWO_ANSWERS, tokenizer)


def test_special_tokens_are_those_of_the_template_and_none_is_added() -> None:
    tokenizer = talking(WITH_BEGIN, "<s> $A </s>")
    read, targets, _ = encoded("user:one assistant:eins", tokenizer)
    assert read == "<s> <|start|> user one <|end|> <|start|> assistant eins"
    assert targets == "_ _ _ _ _ _ eins <|end|>"
    (ids,) = prompt_ids(["one"], tokenizer)
    assert words_of(ids, tokenizer) == "<s> <|start|> user one <|end|> <|start|> assistant"
    assert ids.count(BEGIN) == 1
    assert END not in ids


@pytest.mark.parametrize(
    ("length", "told", "read", "targets"),
    [
        (
            8,
            "user:one assistant:eins user:two assistant:zwei",
            "<|end|> <|start|> user two <|end|> <|start|> assistant zwei",
            "_ _ _ _ _ _ zwei <|end|>",
        ),
        (4, "user:one assistant:eins user:two assistant:zwei", "<|end|> <|start|> assistant zwei", "_ _ zwei <|end|>"),
        (4, "user:one assistant:eins zwei drei vier", "assistant eins zwei drei", "eins zwei drei vier"),
    ],
)
def test_a_conversation_that_is_too_long_loses_its_start_and_then_the_end_of_its_last_answer(
    length: int, told: str, read: str, targets: str
) -> None:
    assert encoded(told, talking(), max_length=length) == (read, targets, 1)


def test_conversations_share_blocks() -> None:
    tokenizer = talking()
    rows = {"messages": [turns(told) for told in ("user:one assistant:eins", "user:two assistant:zwei", TWO_ANSWERS)]}
    alone = TASK.encode(rows, tokenizer, data_of(max_length=24))
    shared = TASK.encode(rows, tokenizer, data_of(max_length=24, packing=True))
    assert alone.targets is not None
    assert shared.targets is not None
    assert len(shared.targets) == 2
    for name in ("inputs", "targets"):
        pair = [part.inputs["input_ids"] if name == "inputs" else part.targets for part in (alone, shared)]
        one, other = ([int(number) for ids in part or () for number in ids] for part in pair)
        assert one == other
    assert [*shared.inputs["position_ids"][0]] == [*range(7), *range(7)]


def test_no_token_reaches_over_the_beginning_of_an_answer() -> None:
    tokenizer = bytes_tokenizer([("Ċ", "Ċ")])
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    said = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "\nho\n"},
        {"role": "user", "content": "oh"},
        {"role": "assistant", "content": "ah"},
    ]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    ids, wrote = conversation_ids(said, tokenizer)
    (prompt,) = prompt_ids(["hi"], tokenizer)
    assert ids[: len(prompt)] == prompt
    # Or the test would show nothing: the tokenizer by itself makes one token of both line breaks.
    assert tokenizer(whole).input_ids[: len(prompt)] != prompt
    assert tokenizer.decode(ids) == whole
    answers = "".join(tokenizer.decode([number]) for number, own in zip(ids, wrote, strict=True) if own)
    assert answers == "\nho\n<|end|>\nah<|end|>\n"


@pytest.mark.parametrize(
    ("template", "told", "message"),
    [
        (
            FORGETFUL,
            TWO_ANSWERS,
            "writes turn 3 of a conversation of system, user, assistant, user, assistant that begins with 'six' "
            "otherwise once other turns follow, so what the assistant wrote can't be told from the rest",
        ),
        (
            THINKING,
            "user:one assistant:eins",
            "writes turn 2 of .* after another beginning than its",
        ),
        (WITHOUT_SYSTEM, TWO_ANSWERS, r"refuses a conversation of system, .* \(no system turn\); needed turns in"),
        (MARKED.replace("'assistant' %}", "'model' %}"), "user:one assistant:eins", r"outside its \{% generation %\}"),
    ],
)
def test_a_template_by_which_nobody_knows_what_the_assistant_wrote_is_refused(
    template: str, told: str, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        conversation_ids(turns(told), talking(template))


def test_a_template_that_changes_earlier_turns_will_do_for_one_answer_or_with_marks() -> None:
    assert encoded("user:one assistant:eins", talking(FORGETFUL)) == encoded("user:one assistant:eins", talking())
    marked = talking(SHOWN + MARKED_TURN + "{% endif %}{% endfor %}")
    assert encoded("user:one assistant:eins user:two assistant:zwei", marked) == (
        "<|start|> user one <|end|> <|start|> user two <|end|> <|start|> assistant zwei",
        "_ _ _ _ _ _ _ _ _ zwei <|end|>",
        0,
    )


def test_what_ends_a_turn_is_the_templates_own_token() -> None:
    tokenizer = talking()
    assert words_of(turn_end(tokenizer), tokenizer) == "<|end|>"
    assert turn_end(talking(CHATML.replace("<|end|>", " . "))) == []


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("one", "holds 'one'; needed a list of {role, content}"),
        (None, "holds None; needed a list of {role, content}"),
        ([], "holds no turns; needed one of the assistant"),
        (["one"], "holds 'one' in turn 1; needed {role, content}"),
        ([{"role": "user", "content": "one"}], "holds turns of user; needed one of the assistant"),
        (turns("user:one robot:six"), "holds role 'robot' in turn 2; needed one of system, user, assistant"),
        ([{"role": "user"}], "holds no content in turn 1; needed text"),
        ([{"role": "user", "content": 3}], "holds content 3 in turn 1; needed text"),
        ([{"role": "user", "content": " "}], "holds only blanks in turn 1; needed text"),
        (turns("user:one assistant:"), "holds no content in turn 2; needed text"),
        (turns("assistant:eins"), "begins with a turn of the assistant; needed one of the user before it"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_with_the_reason(cell: Any, message: str) -> None:
    good = turns("user:one assistant:eins")
    # A column has one kind of cell.
    rows = [cell] if isinstance(cell, str) or cell in (["one"], [{"role": "user", "content": 3}]) else [good, cell]
    source = Source(datasets.Dataset.from_list([{"talk": row} for row in rows]), "talks.jsonl")
    with pytest.raises(DataError) as refused:
        source.without(unusable_conversations(source, "talk"))
    assert str(refused.value).startswith(f"data: talks.jsonl row {rows.index(cell) + 1}, column 'talk' {message}")


def job_of(folder: Path, architecture: str, tokenizer: Any, kind: str, rows: Any = None, **changes: Any) -> Any:
    """A job on conversations (``messages``), or on texts with targets."""
    rows = phrases(60) if rows is None else rows
    if kind == "messages":
        rows = chat_rows(rows)
        changes |= {"data__columns__target": None, "data__columns__messages": "messages"}
    return writing_job(folder, "text-generation", architecture, tokenizer, rows, **changes)


@pytest.mark.parametrize("kind", ["messages", "target"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_a_version_is_asked_as_it_was_taught(tmp_path: Path, architecture: str, kind: str) -> None:
    template = WITH_BEGIN if architecture == "llama" else CHATML
    tokenizer = talking(template, "<s> $A" if architecture == "llama" else "$A", pads=architecture != "gpt2")
    job = job_of(tmp_path, architecture, tokenizer, kind)
    found = registered(job)
    engine, folder, tokens = engine_of(job, found), folder_of(job, found), prepare(job).rows.train
    saved = transformers.AutoTokenizer.from_pretrained(folder)
    assert saved.chat_template == template
    for row in (0, 7, 31):
        read, targets = np.asarray(tokens.feature(row).inputs["input_ids"]), tokens.target(row)
        taught = read[: int(np.argmax(targets != IGNORED)) + 1].tolist()
        (feature,) = engine.encode(engine.task.parse(phrases(60)[row]["text"], {}).rows)[0]
        assert list(feature.inputs["input_ids"]) == taught
        assert words_of(taught, saved).endswith("<|end|> <|start|> assistant")
    (end,) = turn_end(saved)
    assert end in transformers.GenerationConfig.from_pretrained(folder).eos_token_id


def test_a_model_learns_to_answer_a_turn_and_to_end_it(tmp_path: Path) -> None:
    rows = phrases(60, 2)[:48] * 10 + phrases(60, 2)[48:]
    writer(tmp_path / "base", "gpt2", talking(pads=False), initializer_range=0.1)
    job = job_of(tmp_path, "gpt2", None, "messages", rows, train__epochs=3, train__learning_rate=1e-2)
    found = registered(job)
    assert found.metrics["perplexity"] < 2
    asked = {"inputs": [row["text"] for row in rows[-12:]], "parameters": {"details": True}}
    answers = ask(engine_of(job, found), asked)
    right = [
        answer["details"]["finish_reason"]
        for answer, row in zip(answers, rows[-12:], strict=True)
        if answer["generated_text"] == row["target"]
    ]
    assert len(right) >= 8
    assert set(right) == {"eos_token"}


def test_never_leaves_texts_as_they_are_and_texts_alone_always_are(tmp_path: Path) -> None:
    rows = {"text": ["one two"], "target": ["eins zwei"]}
    plain, tokenizer = talking(None), talking()
    never = job_of(tmp_path, "gpt2", tokenizer, "target", data__chat_template="never").data
    auto = never.model_copy(update={"chat_template": "auto"})
    assert TASK.encode(rows, tokenizer, never) == TASK.encode(rows, plain, auto) != TASK.encode(rows, tokenizer, auto)
    alone = DataConfig(source="-")
    for asked in ({"text": ["one two"]}, {"text": ["one two"], "settings": [TASK.parse("a", {}).rows[0]["settings"]]}):
        assert TASK.encode(asked, tokenizer, alone) == TASK.encode(asked, plain, alone)


def test_a_tokenizer_without_a_template_is_refused_where_one_is_needed(tmp_path: Path) -> None:
    for kind, changes, message in (
        ("messages", {}, "data.columns.messages: found messages; the tokenizer of '.*' has no chat template"),
        ("target", {"data__chat_template": "always"}, "data.chat_template: found always; the tokenizer of '.*' has no"),
    ):
        job = job_of(tmp_path / kind, "gpt2", talking(None), kind, **changes)
        for look in (prepare, profiled):
            with pytest.raises(ModelError, match=message):
                look(job)
    assert prepare(job_of(tmp_path / "auto", "gpt2", talking(None), "target")).warnings == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__columns__messages": "m"}, "data: found columns.messages with columns.target"),
        (
            {"data__columns__messages": "m", "data__columns__target": None, "data__chat_template": "never"},
            "data: found columns.messages with chat_template never",
        ),
        (
            {"data__columns__target": None, "data__chat_template": "always"},
            "data: found chat_template always with texts alone; needed columns.messages or columns.target",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        writing_job(tmp_path, "text-generation", "gpt2", **changes)


def test_a_changed_template_or_key_never_reads_old_tokens(tmp_path: Path) -> None:
    columns = {"text": "text", "target": "target"}
    split = Split("train", datasets.Dataset.from_list([{"text": "one", "target": "eins"}] * 3), columns)
    found = []
    for template, wanted in ((CHATML, "auto"), (WITH_BEGIN, "auto"), (CHATML, "never")):
        data = DataConfig(source="-", columns={"target": "target"}, chat_template=wanted)
        found.append(cached_tokens(split, TASK, talking(template), data, tmp_path))
    assert len({tokens.digest for tokens in found}) == 3
    assert len({tuple(tokens.streams["input_ids"].tolist()) for tokens in found}) == 3
