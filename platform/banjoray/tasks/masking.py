"""Which tokens of a text are hidden, and behind what: BERT's way to make texts that ask something of a model.

A feature's drawing is a function of (seed, epoch, its number) alone: not of the batch that it is in, nor of how many
workers there are. How many of its tokens have to be found depends on its length alone, so that what it counts in a
batch is known before anything is drawn.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from banjoray.config.train import MaskingConfig
from banjoray.data.tokens import IGNORED

# Of the chosen tokens, the share that is hidden behind the mask token, and with it those behind another word; the rest
# stand as they are (Devlin et al. 2019, arXiv:1810.04805, section 3.1).
MASKED, CHANGED = 0.8, 0.9
# Seeds evaluation, whose epoch is 0: training's begin with 1, so no drawing is both. Not of the job's seed, so that
# runs with other seeds are asked for the same words.
EVALUATION = 15


def how_many(words: np.ndarray, share: float) -> np.ndarray:
    """How many of so many tokens have to be found, int64 in the shape of ``words``: at least one of any."""
    return np.where(words > 0, np.maximum(1, np.rint(share * words)), 0).astype(np.int64)


@dataclass(frozen=True)
class Masks:
    """A `Collate`: its targets come in as the word that each token is part of, `IGNORED` where none may be chosen.

    They go out as the ids that have to be found, (rows, width), `IGNORED` elsewhere. ``mask_id`` is the mask token's;
    ``vocabulary`` holds the ids of all ordinary words.

    With ``whole_words``, words are taken in an order that is drawn, each with all its tokens, or passed by where it has
    more tokens than are still wanted. Where all that is left is too long, the first one that was passed by gives as
    many of its tokens, from its first on. So the number is exact, and one word of a text at most is cut.
    """

    masking: MaskingConfig
    seed: int
    mask_id: int
    vocabulary: np.ndarray = field(repr=False)

    def __call__(
        self, inputs: dict[str, np.ndarray], targets: np.ndarray, rows: np.ndarray, epoch: int | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs with words hidden, and the ids behind them."""
        ids = inputs["input_ids"].copy()
        wanted = np.full_like(targets, IGNORED)
        for place, number in enumerate(rows):
            begin = [EVALUATION, 0] if epoch is None else [self.seed, epoch + 1]
            draws = np.random.default_rng([*begin, int(number)])
            chosen = self._chosen(targets[place], draws)
            wanted[place, chosen] = ids[place, chosen]
            fate = draws.random(len(chosen))
            others = self.vocabulary[draws.integers(len(self.vocabulary), size=len(chosen))]
            hidden = np.where(fate < MASKED, self.mask_id, others)
            ids[place, chosen] = np.where(fate < CHANGED, hidden, ids[place, chosen])
        return inputs | {"input_ids": ids}, wanted

    def _chosen(self, words: np.ndarray, draws: np.random.Generator) -> np.ndarray:
        """Places of the tokens that have to be found."""
        places = np.flatnonzero(words != IGNORED)
        count = int(how_many(np.array(len(places)), self.masking.share))
        if not self.masking.whole_words:
            return draws.choice(places, count, replace=False) if count else places
        _, word_of, sizes = np.unique(words[places], return_inverse=True, return_counts=True)
        taken: list[int] = []
        passed: list[int] = []
        for word in draws.permutation(len(sizes)).tolist():
            fits = sizes[word] <= count
            (taken if fits else passed).append(word)
            count -= int(sizes[word]) if fits else 0
        found = np.flatnonzero(np.isin(word_of, taken))
        if count:
            found = np.concatenate([found, np.flatnonzero(word_of == passed[0])[:count]])
        return places[found]


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of a tokenizer that stand for no word: all that it calls special, the unknown word too."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {number for number, token in added.items() if token.special}


def ordinary_ids(tokenizer: Any, size: int) -> np.ndarray:
    """The ids of all other words, rising, as far as a table of ``size`` rows has them."""
    ids = np.fromiter(set(tokenizer.get_vocab().values()) - special_ids(tokenizer), dtype=np.int64)
    return np.sort(ids[ids < size])
