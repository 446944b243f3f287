"""Text generation: a model that learns to go on with texts, or to answer prompts, one token after another.

``loss`` and ``perplexity`` are per token, over every token that has to be found: of texts all but the first, of prompts
with a target those of the target and the token that ends it, of conversations those that the assistant wrote. No metric
needs what the model writes by itself.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from banjoray.config.data import DataConfig
from banjoray.config.job import JobConfig
from banjoray.data.conversations import unusable_conversations
from banjoray.data.splits import Splits, named_columns, plain_splits
from banjoray.data.tokens import IGNORED, Feature, Features
from banjoray.errors import ConfigError, RequestError
from banjoray.tasks.chat import chatting, conversation_ids, conversations, prompt_ids, turns_ids
from banjoray.tasks.generation import check_aloud, write_aloud
from banjoray.tasks.packing import apart, check_packing, packed
from banjoray.tasks.pieces import Events, details, text_of_ids
from banjoray.tasks.settings import MOST_NEW_TOKENS, WRITING, Settings, read_asked, settled
from banjoray.tasks.task import Ask, Collate, Seen, only_known, text_of, true_or_false, whole_number
from banjoray.tasks.writer import Writer

# max_length and min_length would count the prompt, with whatever padding stands beside it.
_WRITING = tuple(name for name in WRITING if name not in ("max_length", "min_length"))
_PARAMETERS = (*_WRITING, "return_full_text", "stop", "stop_sequences", "details", "truncate", "stream")
# Texts that end a request's writing: as many as text-generation-inference takes.
MOST_STOPS = 4
# Who may speak in a request's conversation.
ROLES = ("system", "user", "assistant")


class TextGeneration(Writer):
    """Texts that go on, by ``AutoModelForCausalLM``.

    Rows are data.columns.text, and data.columns.target if named; or data.columns.messages.
    """

    name = "text-generation"
    auto_model = "AutoModelForCausalLM"

    def splits(self, job: JobConfig, token: str | None = None) -> Splits:
        """Texts to go on with, prompts and what should follow, or conversations."""
        if (column := job.data.columns.messages) is not None:
            return plain_splits(job, ("messages",), (), token, lambda source: unusable_conversations(source, column))
        return plain_splits(job, (), tuple(named_columns(job.data, ("text", "target"))), token)

    def check(self, job: JobConfig, tokenizer: Any, config: Any) -> None:
        """Refuse a model that reads what comes after a token, which would find it by looking; a missing template."""
        from transformers.models.auto import modeling_auto as known

        kind, own = config.model_type, getattr(config, "auto_map", None) or {}
        masked = kind in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        decoder = kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or self.auto_model in own
        if config.is_encoder_decoder or masked or not decoder:
            raise ConfigError(
                f"model.base: {job.model.base} is of kind {kind}, which does not go on with a text from left "
                f"to right; {self.name} needs a decoder such as GPT-2, Llama, Qwen or Mistral"
            )
        chatting(job.data, tokenizer)
        if job.data.packing:
            check_packing(job, config)

    def encode(self, rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
        """Texts as blocks of data.max_length tokens, each token's target being the next one, across blocks too.

        With targets or conversations, a feature per row, of which the tokens that are given are no targets; too long,
        it loses its start up to the last answer, then the end of that. With data.packing, several features in one.
        Rows that a request asks for carry ``settings``: a feature per row, its last data.max_length tokens, written as
        training wrote prompts; of ``messages``, as the chat template writes them.
        """
        if "settings" in rows:
            return _prompts(rows, tokenizer, data)
        if "text" in rows and "target" not in rows:
            found = _blocks(_ids(rows["text"], tokenizer), tokenizer, data)
        elif chatting(data, tokenizer):
            found = _answered((conversation_ids(turns, tokenizer) for turns in conversations(rows)), data)
        else:
            prompts, answers = _ids(rows["text"], tokenizer), _ids(rows["target"], tokenizer, first=False)
            found = _answered(_joined(prompts, answers, tokenizer), data)
        return packed(found, data.max_length) if data.packing else found

    def collate(self, job: JobConfig, tokenizer: Any, config: Any) -> Collate | None:
        """Where texts share blocks: a mask by which every token sees those before it of its own text."""
        return apart if job.data.packing else None

    def parse(self, inputs: Any, parameters: Mapping[str, Any]) -> Ask:
        """A prompt or a list of prompts, with the parameters of text-generation-inference that have a meaning here.

        A prompt is a text, or {"messages": [{"role", "content"}, ...]}, a conversation that waits for its next turn.
        """
        prompts = inputs if isinstance(inputs, list) else [inputs]
        if not prompts:
            raise RequestError("inputs: an empty list; needed a prompt or a list of prompts")
        only_known(parameters, _PARAMETERS, self.name)
        stream = true_or_false(parameters, "stream", False)
        if stream and len(prompts) > 1:
            raise RequestError(f"inputs: found {len(prompts)} prompts with stream: true; needed one, or no stream")
        true_or_false(parameters, "return_full_text", False)
        asked = read_asked(parameters, _WRITING, "parameters")
        settings = settled(
            asked,
            stop=_stops(parameters),
            logprobs=true_or_false(parameters, "details", False),
            truncate=whole_number(parameters, "truncate", MOST_NEW_TOKENS),
        )
        rows = [
            _row(found, f"inputs[{number}]" if prompts is inputs else "inputs") | {"settings": settings}
            for number, found in enumerate(prompts)
        ]
        return Ask(rows, parameters, prompts is not inputs, stream)

    def answer(self, ask: Ask, seen: Sequence[Seen], labels: Sequence[str], tokenizer: Any) -> Any:
        """A list with an object per prompt, also for a single one; what was written alone, unless asked otherwise."""
        full = true_or_false(ask.parameters, "return_full_text", False)
        answers: list[dict[str, Any]] = []
        for row, asked in zip(seen, ask.rows, strict=True):
            found = row.outputs[0]
            ids = (found[0] if found.ndim == 2 else found).astype(np.int64).tolist()
            answers.append({"generated_text": asked["text"] * full + text_of_ids(ids, tokenizer)})
            if found.ndim == 2:
                answers[-1]["details"] = details(ids, found[1].tolist(), asked["settings"], tokenizer)
        return answers

    def check_stream(self, model: Any, feature: Feature) -> None:
        """Refuse beams, whether the request names them or the version has them."""
        check_aloud(model, feature)

    def stream(self, model: Any, ask: Ask, feature: Feature, tokenizer: Any, tell: Callable[[Any], None]) -> None:
        """An object per token, with the tokens and the text that a whole answer has."""
        (asked,) = ask.rows
        prompt = asked["text"] * true_or_false(ask.parameters, "return_full_text", False)
        events = Events(tokenizer, asked["settings"], prompt, len(feature), asked["settings"].logprobs)
        write_aloud(model, feature, tokenizer, lambda told: tell(events.event(told)))


def _row(found: Any, where: str) -> dict[str, Any]:
    """A prompt of a request; a conversation has no ``text`` of its own that could be given back."""
    if not isinstance(found, dict):
        return {"text": text_of(found, where)}
    turns = found["messages"] if set(found) == {"messages"} else None
    if not isinstance(turns, list) or not turns:
        raise RequestError(f"{where}: found keys {sorted(map(str, found))}; needed messages, a list of turns")
    return {"text": "", "messages": [_turn(turn, f"{where}.messages[{n}]") for n, turn in enumerate(turns)]}


def _turn(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or set(found) != {"role", "content"}:
        shown = f"keys {sorted(map(str, found))}" if isinstance(found, dict) else type(found).__name__
        raise RequestError(f"{where}: found {shown}; needed role and content")
    if found["role"] not in ROLES:
        raise RequestError(f"{where}.role: found {found['role']!r}; needed {', '.join(ROLES)}")
    return {"role": found["role"], "content": text_of(found["content"], f"{where}.content")}


def _stops(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts that end the writing; old clients call them stop_sequences."""
    key = "stop" if parameters.get("stop") is not None else "stop_sequences"
    found = parameters.get(key)
    found = [found] if isinstance(found, str) else found or []
    if not isinstance(found, list) or not all(isinstance(text, str) and text for text in found):
        raise RequestError(f"parameters.{key}: found {found!r}; needed a list of texts, none of them empty")
    if len(found) > MOST_STOPS:
        raise RequestError(f"parameters.{key}: found {len(found)} texts; needed at most {MOST_STOPS}")
    return tuple(found)


def _ids(texts: Sequence[str], tokenizer: Any, first: bool = True) -> list[list[int]]:
    """The ids of texts that go on: what the tokenizer puts before them, but not what it puts after them.

    ``first`` false: of texts that follow others, without what stands before.
    """
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=first)["input_ids"]
    if not first:
        return found
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    found = [ids[:-1] if ids and ids[-1] in ends else ids for ids in found]
    # Of a text that has no token (letters that a normalizer drops), its end is read: a model can't start from nothing.
    return [ids or [tokenizer.pad_token_id] for ids in found]


def _end(tokenizer: Any) -> list[int]:
    """What ends a text, so that a model learns to end; nothing where the tokenizer has no such token."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _shifted(whole: list[int]) -> tuple[list[int], list[int]]:
    """What a model reads of some ids, and what it has to find after each."""
    return (whole[:-1], whole[1:]) if len(whole) > 1 else (whole, [IGNORED])


def _blocks(ids: Sequence[list[int]], tokenizer: Any, data: DataConfig) -> Features:
    """Texts and their ends, cut into blocks; the targets are the next tokens, across blocks too."""
    blocks: list[list[int]] = []
    targets: list[list[int]] = []
    numbers: list[int] = []
    end = _end(tokenizer)
    for row, text in enumerate(ids):
        read, following = _shifted(text + end)
        for start in range(0, len(read), data.max_length):
            blocks.append(read[start : start + data.max_length])
            targets.append(following[start : start + data.max_length])
            numbers.append(row)
    return Features({"input_ids": blocks}, numbers, targets=targets)


def _joined(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], tokenizer: Any
) -> Iterable[tuple[list[int], list[bool]]]:
    """Prompts, what follows them and its end as ids, and of each whether it has to be found."""
    for prompt, answer in zip(prompts, answers, strict=True):
        target = answer + _end(tokenizer)
        yield prompt + target, [False] * len(prompt) + [True] * len(target)


def _answered(rows: Iterable[tuple[list[int], list[bool]]], data: DataConfig) -> Features:
    """A feature per row of ids; the targets are those ids that have to be found."""
    ids: list[list[int]] = []
    targets: list[list[int]] = []
    cut = 0
    for whole, wanted in rows:
        # The last token is a target alone: the model does not read it.
        spare = len(whole) - (data.max_length + 1)
        cut += spare > 0
        # Where the last answer begins; one token before it stays, from which its first one is found.
        answer = next((place for place in range(len(whole) - 1, 0, -1) if wanted[place] > wanted[place - 1]), 1)
        kept = slice(min(max(0, spare), answer - 1), None)
        begin, asked = whole[kept][: data.max_length + 1], wanted[kept][: data.max_length + 1]
        read, following = _shifted(begin)
        ids.append(read)
        marked = zip(following, asked[1:] or asked, strict=True)
        targets.append([number if found else IGNORED for number, found in marked])
    return Features({"input_ids": ids}, range(len(ids)), targets=targets, cut=cut)


def _prompts(rows: Mapping[str, Sequence[Any]], tokenizer: Any, data: DataConfig) -> Features:
    """A feature per prompt, its last tokens if it is too long."""
    if "messages" in rows:
        whole = [turns_ids(turns, tokenizer) for turns in rows["messages"]]
    else:
        whole = prompt_ids(rows["text"], tokenizer) if chatting(data, tokenizer) else _ids(rows["text"], tokenizer)
    settings: Sequence[Settings] = rows["settings"]
    found = []
    for ids, asked in zip(whole, settings, strict=True):
        found.append(ids[-min(asked.truncate or data.max_length, data.max_length) :])
    return Features({"input_ids": found}, range(len(found)), settings=settings)
