"""One row: what can be repaired in its text and turns, and whether it may stay."""

import unicodedata
from dataclasses import dataclass

from ftfy import TextFixerConfig, fix_text

from common.errors import BadSampleError
from dataset.language import UNSURE, detect_language
from model.processing import IMAGE_TAG, check_conversation, match_image_tags

# What goes wrong between files, not what people write: full-width letters, ligatures and curly quotes stay.
TEXT_FIXES = TextFixerConfig(
    fix_character_width=False, fix_latin_ligatures=False, uncurl_quotes=False
)
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}  # names other sets use
LOST = "\ufffd"  # stands where a character was lost for good


@dataclass
class Limits:
    """What a row's answers and pictures may be like."""

    min_answer: int = 2  # characters of a row's answers together
    max_answer: int = 4000
    min_side: int = 32  # pixels
    max_aspect: float = 5.0  # longer side over shorter side
    languages: tuple[str, ...] = ()  # of the answers; none: any


def repair_conversation(conversations: object, n_images: int) -> tuple[list[dict], list[str]]:
    """(turns with role and content that the model can learn from, names of the repairs made). BadSampleError where a row
    cannot be repaired."""
    if not isinstance(conversations, list) or not conversations:
        raise BadSampleError("no conversation")
    repairs: list[str] = []
    turns = [read_turn(turn, index, repairs) for index, turn in enumerate(conversations)]
    turns = order_turns(turns, repairs)
    turns = match_tags(turns, n_images, repairs)
    check_conversation(turns)
    return turns, sorted(set(repairs))


def read_turn(turn: object, index: int, repairs: list[str]) -> dict:
    """{"role": "user", "assistant", "system" or "", "content"} of a turn, also in the words of other sets ("from", "value")."""
    if isinstance(turn, dict) and "content" not in turn and "value" in turn:
        turn = {"role": turn.get("from"), "content": turn["value"]}
        repairs.append("turn named from and value")
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
        raise BadSampleError("turn without text content", f"turn {index}")
    role = turn.get("role") or ""
    if role in ROLES:
        role = ROLES[role]
        repairs.append("role renamed")
    content = repair_text(turn["content"], repairs)
    if LOST in content:
        raise BadSampleError("lost characters", f"turn {index}: {content[:80]}")
    return {"role": role, "content": content}


def repair_text(text: str, repairs: list[str]) -> str:
    """Text without mojibake, escapes, control characters or outer space, in composed form (NFC)."""
    fixed = fix_text(text, TEXT_FIXES).strip()
    if fixed != text.strip():
        has_control = any(
            unicodedata.category(character) in ("Cc", "Cs")
            for character in text
            if character not in "\n\t"
        )
        repairs.append("control characters removed" if has_control else "characters repaired")
    return fixed


def order_turns(turns: list[dict], repairs: list[str]) -> list[dict]:
    """Question and answer in turn: roles filled in, neighbours of one role joined, blank pairs and a last question left out."""
    if any(turn["role"] == "" for turn in turns):
        n_system = turns[0]["role"] == "system"
        for index, turn in enumerate(turns):
            turn["role"] = turn["role"] or ("user", "assistant")[(index - n_system) % 2]
        repairs.append("roles filled in")
    joined: list[dict] = []
    for turn in turns:
        if joined and joined[-1]["role"] == turn["role"]:
            joined[-1]["content"] = "\n".join(
                filter(None, (joined[-1]["content"], turn["content"]))
            )
            repairs.append("turns of one role joined")
        else:
            joined.append(turn)
    if joined[-1]["role"] == "user":
        joined = joined[:-1]
        repairs.append("last question without an answer left out")
    head = joined[:1] if joined and joined[0]["role"] == "system" else []
    ordered, tags = (
        list(head),
        "",
    )  # the images of a pair that is left out belong to the next question
    for question, answer in zip(joined[len(head) :: 2], joined[len(head) + 1 :: 2]):
        if (question["role"], answer["role"]) != ("user", "assistant"):
            raise BadSampleError("wrong roles", f"{question['role']!r} before {answer['role']!r}")
        if not answer["content"] or not question["content"].replace(IMAGE_TAG, "").strip():
            tags += question["content"].count(IMAGE_TAG) * f"{IMAGE_TAG}\n"
            repairs.append("blank turns left out")
            continue
        ordered += [question | {"content": tags + question["content"]}, answer]
        tags = ""
    if len(ordered) == len(head):
        raise BadSampleError("no answer")
    return ordered


def match_tags(turns: list[dict], n_images: int, repairs: list[str]) -> list[dict]:
    """As many `<image>` as images: missing ones are put before the first question, surplus ones dropped."""
    questions = [turn for turn in turns if turn["role"] == "user"]
    missing = n_images - sum(turn["content"].count(IMAGE_TAG) for turn in questions)
    if missing > 0:
        questions[0]["content"] = missing * f"{IMAGE_TAG}\n" + questions[0]["content"]
        repairs.append("<image> added")
    matched, surplus = match_image_tags(
        [(turn["role"], turn["content"]) for turn in turns], n_images
    )
    if surplus:
        repairs.append("surplus <image> dropped")
    return [{"role": role, "content": content.strip()} for role, content in matched]


def check_answers(turns: list[dict], limits: Limits) -> list[str]:
    """The answers of a row; BadSampleError where they are too short, too long, or in another language."""
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    length = sum(map(len, answers))
    if length < limits.min_answer:
        raise BadSampleError("answer too short", f"{length} characters: {answers[0]}")
    if length > limits.max_answer:
        raise BadSampleError("answer too long", f"{length} characters")
    if limits.languages:
        language = detect_language(" ".join(answers))
        if language not in (*limits.languages, UNSURE):
            raise BadSampleError("other language", f"{language}: {answers[0][:80]}")
    return answers
