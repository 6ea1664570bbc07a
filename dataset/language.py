"""Which language a text is in."""

import re
from functools import cache

UNSURE = "und"  # ISO 639 for "undetermined": "red", "B2", 42 may be any language
LEAST_CONFIDENCE = 0.2  # below it short English captions are called Frisian and Polish
ENOUGH = 300  # characters; more change the verdict rarely and cost time
_IDEOGRAPHS = re.compile("[㐀-䶿一-鿿\U00020000-\U0003ffff]")
_KANA = re.compile("[ぁ-ゖァ-ヺ]")


def detect_language(text: str) -> str:
    """The ISO 639 code of the text's language, "en" or "zh" say, "und" where it is too short or no language.

    Every kind of Chinese is "zh". Mostly ideographs and no kana is Chinese: surer than statistics on short captions, and faster.
    """
    text = text[:ENOUGH]
    n_ideographs = len(_IDEOGRAPHS.findall(text))
    if n_ideographs and 2 * n_ideographs > sum(map(str.isalpha, text)) and not _KANA.search(text):
        return "zh"
    language, _ = _load_identifier().classify(text)
    if language in ("wuu", "yue"):
        return "zh"
    return UNSURE if language == "zxx" else language  # zxx: no linguistic content


@cache
def _load_identifier():
    """py3langid's model for 140 languages; it takes a second to load and comes with the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(
        MODEL_FILE, norm_probs=True, min_confidence=LEAST_CONFIDENCE
    )
