"""How a model writes: many texts in padded batches, each as its own settings say, whatever it stands beside.

What a version does unless it is asked otherwise stands in its generation_config.json, so that transformers' own
``generate`` writes the same.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from banjoray.config.generation import BEAMS, SAMPLING
from banjoray.config.job import JobConfig
from banjoray.data.batches import sorted_batches
from banjoray.data.tokens import Feature
from banjoray.errors import RequestError
from banjoray.tasks.chat import chatting, turn_end
from banjoray.tasks.languages import starting_in
from banjoray.tasks.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Rows x (longest prompt + what is written) x beams of one batch.
GENERATION_TOKENS = 8192
# What looks at the tokens before, padding included: in a decoder that continues prompts, rows of one length alone can
# share a batch where one of these is set (the value where it is not).
_SEES_PADDING = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


def set_generation(model: Any, tokenizer: Any, job: JobConfig) -> None:
    """Put a job's ``generation`` and languages into a model's generation config and its tokenizer, to be saved."""
    config = model.generation_config
    for name, value in job.generation.model_dump(exclude_none=True).items():
        setattr(config, name, value)
    # These also count the prompt; transformers warns where both are there.
    config.max_length = None
    config._from_model_config = False  # noqa: SLF001  it is a version's own from here on
    if job.generation.min_new_tokens is not None:
        config.min_length = None
    # What nothing would read: transformers refuses to save it.
    unread = () if config.do_sample else (*SAMPLING, "min_p", "typical_p")
    for name in (*unread, *(() if (config.num_beams or 1) > 1 else BEAMS)):
        setattr(config, name, None)
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if job.task == "text-generation" and chatting(job.data, tokenizer):
        # A template may end a turn with another token than the one that ends a text.
        ends = ending_ids(model)
        config.eos_token_id = [*ends, *(number for number in turn_end(tokenizer) if number not in ends)] or None
    if job.data.src_lang and job.data.tgt_lang:
        tokenizer.tgt_lang, tokenizer.src_lang = job.data.tgt_lang, job.data.src_lang
        for name, number in starting_in(tokenizer, job.data.tgt_lang).items():
            setattr(config, name, number)


@dataclass(frozen=True)
class _Plan:
    """What rows of one batch have in common. ``apart`` keeps rows apart that padding or a seed would mix."""

    asked: tuple[tuple[str, Any], ...]
    settings: Settings
    new: int
    beams: int
    apart: Hashable = None


def write(model: Any, features: Sequence[Feature], tokenizer: Any) -> list[np.ndarray]:
    """What the model writes for each feature, in their order: token ids (tokens,), up to and with the one that ends it.

    Where a feature's settings want log-probabilities: (2, tokens), the ids and these. An encoder-decoder reads what is
    written from the features; another model goes on with them, after their last tokens if its positions do not suffice.
    """
    groups: dict[_Plan, list[int]] = {}
    for number, feature in enumerate(features):
        groups.setdefault(_plan(model, feature, number), []).append(number)
    found: dict[int, np.ndarray] = {}
    for plan, numbers in groups.items():
        prompts = {number: _prompt(model, features[number], plan) for number in numbers}
        lengths = np.array([len(prompts[number]) + plan.new for number in numbers])
        for part in sorted_batches(lengths, max(1, GENERATION_TOKENS // plan.beams)):
            rows = [numbers[place] for place in part]
            answers = _batch(model, [prompts[row] for row in rows], plan, tokenizer)
            found |= dict(zip(rows, answers, strict=True))
    return [found[number] for number in range(len(features))]


@dataclass(frozen=True)
class Told:
    """A token as it is written: its id, the log-probability that the model gave it, and whether it is the last."""

    number: int
    logprob: float
    last: bool


def check_aloud(model: Any, feature: Feature) -> None:
    """Refuse, with a RequestError, what `write_aloud` can't write: beams are ranked when all of them have ended."""
    beams = _plan(model, feature, 0).beams
    if beams > 1:
        raise RequestError(
            f"parameters.num_beams: found {beams} (asked for, or what this version does) with stream: true; which beam "
            "is best is known at the end; needed num_beams: 1, or no stream"
        )


def write_aloud(model: Any, feature: Feature, tokenizer: Any, tell: Callable[[Told], None]) -> None:
    """`write` for one feature: ``tell`` is called with every token, before the pass for the next one begins.

    They are those that `write` gives. What ``tell`` raises ends the writing, without another pass, and is raised here.
    """
    plan = _plan(model, feature, 0)
    plan = replace(plan, settings=replace(plan.settings, logprobs=False))
    aloud = _Aloud(tell)
    with aloud.hearing(model):
        _batch(model, [_prompt(model, feature, plan)], plan, tokenizer, [aloud])
    aloud.end()


class _Aloud:
    """Tells the tokens of one row; whether one is the last is known when the next pass begins, or none does.

    It is a stopping criterion that stops nothing, and two hooks of the model.
    """

    def __init__(self, tell: Callable[[Told], None]) -> None:
        self._tell = tell
        self._waiting: Told | None = None
        self._scores: Tensor | None = None

    @contextmanager
    def hearing(self, model: Any) -> Iterator[None]:
        """While the block runs, the model's passes are heard."""
        hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, input_ids: "Tensor", scores: Any, **rest: Any) -> "Tensor":
        import torch

        assert self._scores is not None
        number = int(input_ids[0, -1])
        self._waiting = Told(number, float(torch.log_softmax(self._scores, dim=-1)[number]), last=False)
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

    def _before(self, *_: Any) -> None:
        if self._waiting is not None:
            told, self._waiting = self._waiting, None
            self._tell(told)

    def _after(self, _model: Any, _inputs: Any, outputs: Any) -> None:
        self._scores = outputs.logits[0, -1].float()

    def end(self) -> None:
        """Nothing follows."""
        if self._waiting is not None:
            self._tell(replace(self._waiting, last=True))


def _plan(model: Any, feature: Feature, number: int) -> _Plan:
    settings = feature.settings if isinstance(feature.settings, Settings) else Settings()
    usual, asked = model.generation_config, dict(settings.asked)

    def having(name: str, otherwise: Any) -> Any:
        value = asked.get(name, getattr(usual, name, None))
        return otherwise if value is None else value

    new = having("max_new_tokens", 20)
    positions = _positions(model.config)
    if positions is not None:
        # One for what it starts from.
        new = min(new, positions - 1)
    asked |= {"max_new_tokens": new, "min_new_tokens": min(having("min_new_tokens", 0), new)}
    apart: Hashable = None
    if having("do_sample", False) and settings.seed is not None:
        apart = number
    elif not model.config.is_encoder_decoder and any(having(name, off) != off for name, off in _SEES_PADDING.items()):
        apart = ("length", len(feature))
    if asked["min_new_tokens"] == 0:
        del asked["min_new_tokens"]
    return _Plan(tuple(sorted(asked.items())), settings, new, having("num_beams", 1), apart)


def _positions(config: Any) -> int | None:
    """How many positions a decoder has; None where it has no bound (T5)."""
    text = config.get_text_config(decoder=True)
    found: int | None = getattr(text, "max_decoder_position_embeddings", None)
    return found or getattr(text, "max_position_embeddings", None)


def _prompt(model: Any, feature: Feature, plan: _Plan) -> np.ndarray:
    """What is read: all of a feature, or its end where a decoder has no room for more."""
    ids = np.asarray(feature.inputs["input_ids"], dtype=np.int64)
    positions = None if model.config.is_encoder_decoder else _positions(model.config)
    return ids if positions is None else ids[-max(1, positions - plan.new) :]


def _batch(
    model: Any, prompts: Sequence[np.ndarray], plan: _Plan, tokenizer: Any, criteria: Sequence[Any] = ()
) -> list[np.ndarray]:
    """What is written for some rows in one call; they are padded on the left unless an encoder reads them."""
    import torch

    encoder = model.config.is_encoder_decoder
    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if encoder else slice(width - len(prompt), width)
        ids[row, place], mask[row, place] = prompt, 1
    start = 1 if encoder else width
    stop = plan.settings.stop
    criteria = [*criteria, *([_Stop(stop, start, tokenizer)] if stop else [])]
    asked = dict(plan.asked) | ({"stopping_criteria": criteria} if criteria else {})
    tensors = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    with torch.inference_mode(), _drawing(plan.settings.seed, model.device):
        inputs: Mapping[str, Tensor] = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        rows = model.generate(**inputs, **asked, num_return_sequences=1, return_dict_in_generate=False)
        written = [_ended(row, model, stop, tokenizer) for row in rows[:, start:].cpu().numpy()]
        if plan.settings.logprobs:
            pairs = zip(prompts, written, strict=True)
            return [np.stack([own, _logprobs(model, prompt, own)]) for prompt, own in pairs]
    return written


@contextmanager
def _drawing(seed: int | None, device: "torch.device") -> Iterator[None]:
    """torch draws from ``seed`` while the block runs, or as nobody can foretell; then it goes on as before."""
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if seed is None:
            torch.seed()
        else:
            torch.manual_seed(seed)
        yield


class _Stop:
    """Ends a row as soon as what is written holds one of some texts."""

    def __init__(self, stop: Sequence[str], start: int, tokenizer: Any) -> None:
        self._stop, self._start, self._tokenizer = stop, start, tokenizer

    def __call__(self, input_ids: "Tensor", scores: Any, **rest: Any) -> "Tensor":
        import torch

        texts = self._tokenizer.batch_decode(input_ids[:, self._start :])
        ended = [any(found in text for found in self._stop) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def _ended(row: np.ndarray, model: Any, stop: Sequence[str], tokenizer: Any) -> np.ndarray:
    """A row up to and with the token that ended it: what follows was written while others went on."""
    ends = np.flatnonzero(np.isin(row, ending_ids(model)))
    written = row[: ends[0] + 1] if len(ends) else row
    if stop:
        for length in range(1, len(written) + 1):
            text = tokenizer.decode(written[:length])
            if any(found in text for found in stop):
                return written[:length]
    return written


def ending_ids(model: Any) -> list[int]:
    """The ids of the tokens that end a text."""
    found = model.generation_config.eos_token_id
    ends: list[int] = [] if found is None else np.atleast_1d(found).tolist()
    return ends


def _logprobs(model: Any, prompt: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Of every written token, the log-probability that the model gave it, (tokens,); of a decoder alone."""
    import torch

    whole = torch.from_numpy(np.concatenate([prompt, written]))[None].to(model.device)
    scores = torch.log_softmax(model(input_ids=whole).logits[0, len(prompt) - 1 : -1].float(), dim=-1)
    chosen: np.ndarray = scores.gather(1, whole[0, len(prompt) :, None])[:, 0].cpu().numpy()
    return chosen.astype(np.float64)
