"""Scores of texts against several right ones: BLEU-4, ROUGE-L and CIDEr-D; and their intervals.

The formulas are those of the COCO caption evaluation (Chen et al. 2015, arXiv:1504.00325), by the
classes of the package pycocoevalcap. Its tokenizer is a Java program: `tokenize` does what that one
does to captions, without Java.
"""

import re
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np

from common.errors import UserError

# What is written without spaces: ideographs, kana, and ideographs beyond the first 65,536 codes.
CJK = re.compile("[぀-ヿㇰ-ㇿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff]")
KANA = re.compile("[ぁ-ゖァ-ヺ]")
# A part of a word: letters and digits of any script, with the marks that belong to them.
PART = r"(?:[^\W_]|[\u0300-\u036f\u064b-\u065f\u0900-\u0963\u0966-\u0eff])+"
TOKEN = re.compile(
    # what is left of "it's" in texts that have spaces everywhere: "it 's"
    r"(?<!\w)(?:'(?:s|m|d|re|ve|ll)|n't)(?!\w)"
    # a.m., u.s.
    r"|(?<!\w)(?:[^\W\d_]\.){2,}(?!\w)"
    # words: long-haired, o'clock, 3,000, 10:30, and/or
    rf"|{PART}(?:(?:[-'/&.@]|(?<=\d)[,:](?=\d)){PART})*"
    # signs that count as words
    r"|[&%$#@+=*]"
)
# Two words in one: "isn't" is "is n't".
CONTRACTION = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll))")
TWO_WORDS = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na"}
# The longest runs of words that BLEU and CIDEr compare.
N = 4
# Columns of what BLEU is computed from, see `compute_bleu`.
BLEU_COLUMNS = 2 * N + 2
# How often units are drawn for an interval, and its ends in percent.
RESAMPLES, INTERVAL = 1000, (2.5, 97.5)


def check_package() -> None:
    """UserError with what to type where the package is not installed. It is not imported."""
    if find_spec("pycocoevalcap") is None:
        raise UserError("--metrics needs pycocoevalcap: pip install -r requirements-metrics.txt")


def name_language(code: str, texts: list[str]) -> str:
    """The language of texts: "zh" of the code "zh-CN"; without a code "zh", "ja" or "en".

    "en" stands for all that is written with spaces.
    """
    if code:
        return re.split("[-_]", code)[0]
    text = "".join(texts)
    if not CJK.search(text):
        return "en"
    return "ja" if KANA.search(text) else "zh"


def tokenize(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation; Chinese and Japanese characters.

    As the Penn Treebank has it, "isn't" is two words and "long-haired" one.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    words = []
    for word in TOKEN.findall(CJK.sub(r" \g<0> ", text)):
        if match := CONTRACTION.fullmatch(word):
            words += match.groups()
        else:
            words += TWO_WORDS.get(word, word).split()
    return words


class TextScores(NamedTuple):
    """Scores of n texts, of which each is better the larger it is.

    Args:
        cider: float[n], CIDEr-D (Vedantam et al. 2015), 0 to 10.
        rouge: float[n], ROUGE-L (Lin 2004) as an F-measure, 0 to 1.
        bleu: int[n, BLEU_COLUMNS], what `compute_bleu` takes, also summed over texts.
    """

    cider: np.ndarray
    rouge: np.ndarray
    bleu: np.ndarray


def score_texts(given: list[str], references: list[tuple[str, ...]]) -> TextScores:
    """Compare texts with those that are right, of one language.

    How much a run of words counts in CIDEr-D depends on how many of the n have it in their
    references: the rarer the more. A single text has no CIDEr-D: it is NaN.

    Args:
        given: n texts.
        references: of each of them, one or more.
    """
    # None of the three imports the parts that need Java.
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    # words with spaces between them; a reference without a word says nothing
    candidates = {n: [" ".join(tokenize(text))] for n, text in enumerate(given)}
    right = {}
    for n, texts in enumerate(references):
        words = [" ".join(tokenize(text)) for text in texts]
        right[n] = [text for text in words if text] or [""]

    # scores
    cider = np.full(len(given), np.nan)
    if len(given) > 1 and any(texts != [""] for texts in right.values()):
        _, cider = Cider(n=N).compute_score(right, candidates)
    rouge = Rouge().compute_score(right, candidates)[1]
    bleu = np.zeros((len(given), BLEU_COLUMNS), np.int64)
    for n, (text,) in candidates.items():
        counts = cook_test(text, cook_refs(right[n], n=N), eff="closest", n=N)
        bleu[n] = *counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]
    return TextScores(cider, rouge, bleu)


def compute_bleu(counts: np.ndarray) -> np.ndarray:
    """BLEU-4 (Papineni et al. 2002) of a corpus: 0 to 1.

    Args:
        counts: int or float[..., BLEU_COLUMNS], sums over its texts: runs of 1 to 4 words that a
            reference has too, all runs of 1 to 4 words, words, words of the closest references.

    Returns float[...].
    """
    correct, all_runs = counts[..., :N], counts[..., N : 2 * N]
    n_words, n_right = counts[..., -2], counts[..., -1]
    precision = correct / np.maximum(all_runs, 1)  # (..., N)
    # A text that is too short would have it too easy.
    brevity = np.exp(np.minimum(0, 1 - n_right / np.maximum(n_words, 1)))
    return brevity * precision.prod(-1) ** (1 / N)


class Score(NamedTuple):
    """A score and its 95 % interval; None for both ends where there is only one unit."""

    value: float
    low: float | None
    high: float | None


def resample(
    statistics: np.ndarray,
    units: np.ndarray,
    scores: dict[str, Callable[[np.ndarray], np.ndarray]],
    seed: int = 0,
) -> dict[str, Score]:
    """Scores with the interval that drawing other pictures would give (bootstrap, Efron 1979).

    Args:
        statistics: float[n, columns] of the n questions.
        units: int[n], what a question belongs to: all those of a picture are drawn together.
        scores: by name, what makes a score of sums over questions: float[..., columns] ->
            float[...].
        seed: of the draws.
    """
    # sums over the questions of a unit
    names, unit = np.unique(units, return_inverse=True)
    sums = np.zeros((len(names), statistics.shape[1]))
    np.add.at(sums, unit, statistics)

    # each time as many units as there are; one may come twice, another one never
    rng, drawn = np.random.default_rng(seed), np.empty((RESAMPLES, sums.shape[1]))
    if len(names) > 1:
        for n in range(RESAMPLES):
            chosen = rng.integers(len(names), size=len(names))
            drawn[n] = np.bincount(chosen, minlength=len(names)) @ sums

    # a score of all, and of each draw
    found = {}
    for name, compute in scores.items():
        ends = (None, None)
        # the perplexity of a broken model may be more than a float holds
        with np.errstate(over="ignore"):
            value = float(compute(sums.sum(0)))
            if len(names) > 1:
                ends = map(float, np.percentile(compute(drawn), INTERVAL))
        found[name] = Score(value, *ends)
    return found
