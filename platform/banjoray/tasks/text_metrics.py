"""What written texts are worth beside those that people wrote: ROUGE, BLEU and chrF, by their reference packages."""

from collections.abc import Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")
TRANSLATION = ("bleu", "chrf")


def rouge(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures from 0 to 1 (Lin 2004), by Google's rouge-score, words stemmed as in the field's scripts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    found = [scorer.score(right, text) for right, text in zip(references, written, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in found])) for name in ROUGE}


def bleu_and_chrf(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU and chrF2 from 0 to 100 (Post 2018), by sacrebleu with its defaults (13a tokens, exp smoothing)."""
    import sacrebleu

    return {
        "bleu": float(sacrebleu.corpus_bleu(list(written), [list(references)]).score),
        "chrf": float(sacrebleu.corpus_chrf(list(written), [list(references)]).score),
    }
