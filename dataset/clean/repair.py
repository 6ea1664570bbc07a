"""The text of one row: what can be repaired, and whether it may stay."""

import unicodedata

from ftfy import TextFixerConfig, fix_text

from common.errors import BadSampleError
from common.text import IMAGE_TAG
from dataset.clean.settings import Settings
from dataset.formats import PUT_IN_FRONT, SURPLUS_DROPPED
from dataset.language import UNSURE, detect_language
from model.processing import check_conversation, match_image_tags

# What goes wrong between files, not what people write: full-width letters, ligatures and curly
# quotes stay.
TEXT_FIXES = TextFixerConfig(
    fix_character_width=False, fix_latin_ligatures=False, uncurl_quotes=False
)
LOST = "\ufffd"  # stands for a lost character


def repair_conversation(conversations: list[dict], n_images: int) -> tuple[list[dict], list[str]]:
    """(turns with role and content that can be trained on, names of the repairs made).

    BadSampleError where the row cannot be repaired.
    """
    if not conversations:
        raise BadSampleError("no conversation")
    repairs: list[str] = []
    turns = [read_turn(turn, index, repairs) for index, turn in enumerate(conversations)]
    turns = match_tags(order_turns(turns, repairs), n_images, repairs)
    check_conversation(turns)
    return turns, sorted(set(repairs))


def read_turn(turn: dict, index: int, repairs: list[str]) -> dict:
    """{"role", "content"} of a turn with its text repaired; role "" if not given."""
    content = repair_text(turn["content"], repairs)
    if LOST in content:
        raise BadSampleError("lost characters", f"turn {index}: {content[:80]}")
    return {"role": turn.get("role") or "", "content": content}


def repair_text(text: str, repairs: list[str]) -> str:
    """Text without mojibake, escapes, control characters or outer space, in composed form (NFC)."""
    fixed = fix_text(text, TEXT_FIXES).strip()
    if fixed != text.strip():
        kinds = {unicodedata.category(letter) for letter in text if letter not in "\n\t"}
        has_control = bool(kinds & {"Cc", "Cs"})
        repairs.append("control characters removed" if has_control else "characters repaired")
    return fixed


def order_turns(turns: list[dict], repairs: list[str]) -> list[dict]:
    """Question and answer in turn, after at most one system turn."""
    # roles that are missing
    if any(turn["role"] == "" for turn in turns):
        n_system = turns[0]["role"] == "system"
        for index, turn in enumerate(turns):
            turn["role"] = turn["role"] or ("user", "assistant")[(index - n_system) % 2]
        repairs.append("roles filled in")

    # neighbors of one role, and a last question
    joined: list[dict] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            contents = filter(None, (joined[-1]["content"], turn["content"]))
            joined[-1]["content"] = "\n".join(contents)
            repairs.append("turns of one role joined")
        else:
            joined.append(turn)
    if joined[-1]["role"] == "user":
        joined.pop()
        repairs.append("last question without an answer left out")

    # blank pairs; their images belong to the next question
    n_system = int(joined[:1] != [] and joined[0]["role"] == "system")
    ordered, tags = joined[:n_system], ""
    for question, answer in zip(joined[n_system::2], joined[n_system + 1 :: 2]):
        if (question["role"], answer["role"]) != ("user", "assistant"):
            raise BadSampleError("wrong roles", f"{question['role']!r} before {answer['role']!r}")
        if not answer["content"] or not question["content"].replace(IMAGE_TAG, "").strip():
            tags += question["content"].count(IMAGE_TAG) * f"{IMAGE_TAG}\n"
            repairs.append("blank turns left out")
        else:
            ordered += [question | {"content": tags + question["content"]}, answer]
            tags = ""
    if len(ordered) == n_system:
        raise BadSampleError("no answer")
    return ordered


def match_tags(turns: list[dict], n_images: int, repairs: list[str]) -> list[dict]:
    """As many `<image>` as images: missing ones go before the first question, others go."""
    questions = [turn for turn in turns if turn["role"] == "user"]
    missing = n_images - sum(turn["content"].count(IMAGE_TAG) for turn in questions)
    if missing > 0:
        questions[0]["content"] = missing * f"{IMAGE_TAG}\n" + questions[0]["content"]
        repairs.append(PUT_IN_FRONT)
    pairs = [(turn["role"], turn["content"]) for turn in turns]
    matched, surplus = match_image_tags(pairs, n_images)
    if surplus:
        repairs.append(SURPLUS_DROPPED)
    return [{"role": role, "content": content.strip()} for role, content in matched]


def check_answers(turns: list[dict], settings: Settings) -> list[str]:
    """The answers; BadSampleError if they are too short, too long, or in another language."""
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    length = sum(map(len, answers))
    if length < settings.min_answer:
        raise BadSampleError("answer too short", f"{length} characters: {answers[0]}")
    if length > settings.max_answer:
        raise BadSampleError("answer too long", f"{length} characters")
    if settings.languages:
        language = detect_language(" ".join(answers))
        if language not in (*settings.languages, UNSURE):
            raise BadSampleError("other language", f"{language}: {answers[0][:80]}")
    return answers
