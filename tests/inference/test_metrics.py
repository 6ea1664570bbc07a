"""Scores of texts, against their formulas and against values that were worked out by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.metrics import N, compute_bleu, name_language, resample, score_texts, tokenize

# What CoreNLP's PTBTokenizer, which the COCO evaluation uses, makes of these, without the
# punctuation that it drops.
PENN_TREEBANK = {
    "Don't do that, he said.": "do n't do that he said",
    "A man's dog (brown) isn't here!": "a man 's dog brown is n't here",
    "The U.S. flag - 3,000 people; 3.5% & more": "the u.s. flag 3,000 people 3.5 % & more",
    'He can\'t cannot gonna "go" ...': "he ca n't can not gon na go",
    "long-haired dog's toy/ball": "long-haired dog 's toy/ball",
    "The dogs' bowls are #1.": "the dogs bowls are # 1",
    "it's a re-enactment -- really": "it 's a re-enactment really",
    "A man, who's 50-years-old, wears a T-shirt": "a man who 's 50-years-old wears a t-shirt",
    "$5 at 10:30 a.m.": "$ 5 at 10:30 a.m.",
    "don’t “quote” me": "do n't quote me",
    "I'm you're we've he'll she'd": "i 'm you 're we 've he 'll she 'd",
    "a building that 's under construction .": "a building that 's under construction",
}
OTHER = {
    "一只黑色的狗，在跑。": "一 只 黑 色 的 狗 在 跑",
    "小女孩穿着T恤。": "小 女 孩 穿 着 t 恤",
    "イヌが３匹、走っている。": "イ ヌ が 3 匹 走 っ て い る",
    "Ein Mädchen läuft.": "ein mädchen läuft",
    "एक लड़की दौड़ रही है।": "एक लड़की दौड़ रही है",
    " ...!? 🙂": "",
}
WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9).map(" ".join)
CORPUS = st.lists(
    st.tuples(WORDS, st.lists(WORDS.filter(bool), min_size=1, max_size=4)), min_size=2, max_size=5
)


@pytest.mark.parametrize(("text", "words"), [*PENN_TREEBANK.items(), *OTHER.items()])
def test_words_are_those_of_the_penn_treebank_or_characters(text, words):
    assert tokenize(text) == words.split()


@given(st.text())
def test_any_text_has_words_without_spaces(text):
    assert all(word and not any(map(str.isspace, word)) for word in tokenize(text))


def runs(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(candidate: str, references: list[str], corpus: list[list[str]]) -> float:
    """CIDEr-D as in section 3 and 7 of Vedantam et al. 2015."""
    total = 0.0
    for n in range(1, N + 1):
        seen = Counter(run for refs in corpus for run in {r for ref in refs for r in runs(ref, n)})

        def weigh(text, n=n, seen=seen):
            rarity = {run: math.log(len(corpus) / max(1, seen[run])) for run in runs(text, n)}
            return {run: count * rarity[run] for run, count in runs(text, n).items()}

        c = weigh(candidate)
        for reference in references:
            r = weigh(reference)
            lengths = math.hypot(*c.values()) * math.hypot(*r.values())
            overlap = sum(min(c[run], r[run]) * r[run] for run in c.keys() & r.keys())
            far = len(candidate.split()) - len(reference.split())
            if lengths:
                total += overlap / lengths * math.exp(-(far**2) / (2 * 6**2)) / len(references)
    return 10 * total / N


def rouge_l(candidate: str, references: list[str]) -> float:
    """The best precision and the best recall of a common subsequence, recall weighing more."""

    def common(x: list[str], y: list[str]) -> int:
        if not x or not y:
            return 0
        shorter = max(common(x[1:], y), common(x, y[1:]))
        return max(shorter, 1 + common(x[1:], y[1:])) if x[0] == y[0] else shorter

    pairs = [(common(candidate.split(), ref.split()), len(ref.split())) for ref in references]
    precision = max(n for n, _ in pairs) / max(1, len(candidate.split()))
    recall = max(n / length for n, length in pairs)
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0


def bleu_4(corpus: list[tuple[str, list[str]]]) -> float:
    """BLEU of a corpus as in section 2 of Papineni et al. 2002."""
    product, n_words, n_right = 1.0, 0, 0
    for n in range(1, N + 1):
        hits = sum(
            min(count, max(runs(ref, n)[run] for ref in refs))
            for text, refs in corpus
            for run, count in runs(text, n).items()
        )
        product *= hits / max(1, sum(runs(text, n).total() for text, _ in corpus))
    for text, refs in corpus:
        length = len(text.split())
        n_words += length
        n_right += min((abs(len(ref.split()) - length), len(ref.split())) for ref in refs)[1]
    return product ** (1 / N) * min(1, math.exp(1 - n_right / max(1, n_words)))


@settings(max_examples=60, deadline=None)
@given(CORPUS)
def test_scores_are_those_of_the_papers(corpus):
    given_texts, references = [text for text, _ in corpus], [refs for _, refs in corpus]
    scores = score_texts(given_texts, references)
    assert scores.cider == pytest.approx([cider_d(c, r, references) for c, r in corpus], abs=1e-9)
    assert scores.rouge == pytest.approx([rouge_l(c, r) for c, r in corpus], abs=1e-9)
    assert compute_bleu(scores.bleu.sum(0)) == pytest.approx(bleu_4(corpus), abs=1e-9)


def test_values_worked_out_by_hand():
    """Two pictures, "a red dog" and "a blue cat".

    "a" is in both, so it weighs log(2/2) = 0; all other runs of words weigh log 2. The right text
    has similarity 1 for runs of one, two and three words, and there is none of four: 10 * 3/4.
    """
    references = [("a red dog",), ("a blue cat",)]
    assert score_texts(["A red dog.", "a"], references).cider == pytest.approx([7.5, 0])
    assert score_texts(["a blue cat", "a red dog"], references).cider == pytest.approx([0, 0])
    # "a dog": of one word (0, log 2) and (0, log 2, log 2): 1/sqrt(2); of two, none; a word is
    # missing: exp(-1/72)
    (short, _) = score_texts(["a dog", "a"], references).cider
    assert short == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))

    # ROUGE-L of "a dog" and "a red dog": precision 1, recall 2/3
    (rouge, _) = score_texts(["a dog", "a"], references).rouge
    assert rouge == pytest.approx(2.44 * (2 / 3) / (2 / 3 + 1.44))

    # BLEU-4 of "the cat sat on the mat" and "the cat sat on a mat": 5/6, 3/5, 2/4, 1/3; as long
    bleu = score_texts(["the cat sat on the mat"], [("the cat sat on a mat",)]).bleu
    assert bleu.tolist() == [[5, 3, 2, 1, 6, 5, 4, 3, 6, 6]]
    assert compute_bleu(bleu)[0] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # of its first five words, with the same runs but the last: too short by one
    bleu = score_texts(["the cat sat on a"], [("the cat sat on a mat",)]).bleu
    assert compute_bleu(bleu)[0] == pytest.approx(math.exp(1 - 6 / 5))


def test_chinese_is_compared_by_characters():
    """ "一只狗" and "一只猫" share one character of three, and "一只"."""
    scores = score_texts(["一只狗。", "人"], [("一只猫",), ("人在跑",)])
    assert scores.rouge[0] == pytest.approx(2 / 3)
    assert scores.bleu[0].tolist() == [2, 1, 0, 0, 3, 2, 1, 0, 3, 3]


def test_what_has_no_words_scores_nothing():
    scores = score_texts(["", "..."], [("a dog", "!"), ("a cat",)])
    assert not scores.cider.any() and not scores.rouge.any() and not compute_bleu(scores.bleu).any()
    assert not score_texts(["a", "b"], [("!",), ("?",)]).rouge.any()
    assert np.isnan(score_texts(["a dog"], [("a dog",)]).cider).all(), "nothing to weigh words by"


def mean_score(sums: np.ndarray) -> np.ndarray:
    return sums[..., 1] / sums[..., 0]


def test_an_interval_is_that_of_the_mean():
    """For many questions it is the mean and 1.96 standard errors to both sides."""
    values = np.random.default_rng(1).normal(3, 2, 400)
    statistics = np.stack([np.ones(400), values], axis=1)
    score = resample(statistics, np.arange(400), {"mean": mean_score})["mean"]
    error = 1.96 * values.std() / math.sqrt(400)
    assert score.value == pytest.approx(values.mean())
    assert (score.low, score.high) == pytest.approx(
        (values.mean() - error, values.mean() + error), abs=0.15 * error
    )
    assert resample(statistics, np.arange(400), {"mean": mean_score})["mean"] == score


def test_questions_of_one_picture_are_drawn_together():
    """Asked three times each, pictures say no more than asked once."""
    values = np.random.default_rng(1).normal(3, 2, 50)
    statistics, units = np.stack([np.ones(50), values], axis=1), np.arange(50)
    once = resample(statistics, units, {"mean": mean_score})["mean"]
    thrice = resample(np.tile(statistics, (3, 1)), np.tile(units, 3), {"mean": mean_score})["mean"]
    assert thrice == pytest.approx(once)
    assert resample(statistics, np.zeros(50), {"mean": mean_score})["mean"][1:] == (None, None)


@pytest.mark.parametrize(
    ("code", "texts", "language"),
    [
        ("zh-CN", ["a"], "zh"),
        ("en_US", ["a"], "en"),
        ("", ["A dog.", "A cat."], "en"),
        ("", ["一只狗。"], "zh"),
        ("", ["一匹の犬。"], "ja"),
    ],
)
def test_the_language_of_captions(code, texts, language):
    assert name_language(code, texts) == language
