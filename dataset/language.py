"""Which language a text is in."""

import re
from functools import cache

UNSURE = "und"  # ISO 639: undetermined
# Below it short English captions are called Frisian and Polish.
LEAST_CONFIDENCE = 0.2
# Characters; more of them rarely change the verdict.
ENOUGH = 300
_IDEOGRAPHS = re.compile("[㐀-䶿一-鿿\U00020000-\U0003ffff]")
_KANA = re.compile("[ぁ-ゖァ-ヺ]")


def detect_language(text: str) -> str:
    """The ISO 639 code of a text's language, such as "en" or "zh".

    It is "und" for texts that are too short ("red", "B2") or in no language. Every kind of Chinese
    is "zh".
    """
    # Surer than statistics on short captions, and faster.
    text = text[:ENOUGH]
    if is_chinese(text):
        return "zh"
    language, _ = _load_identifier().classify(text)
    # zxx: no linguistic content
    return {"wuu": "zh", "yue": "zh", "zxx": UNSURE}.get(language, language)


def is_chinese(text: str) -> bool:
    """Whether a text is mostly ideographs, without kana."""
    text = text[:ENOUGH]
    n_ideographs = len(_IDEOGRAPHS.findall(text))
    is_most = n_ideographs and 2 * n_ideographs > sum(map(str.isalpha, text))
    return bool(is_most) and not _KANA.search(text)


@cache
def _load_identifier():
    """py3langid's model of 140 languages. It comes with the package and takes a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=LEAST_CONFIDENCE
    )
