"""Rows of the field's formats, read as they are: any JSON object becomes a `Row`, or a reason.

    format              text                                              pictures
    MiniMind-V          conversations: [{role, content}], also as text    image, image_bytes
    LLaVA, ShareGPT     conversations: [{from, value}]                    image, images
    messages            messages: [{role, content}], content a text       in the parts, or images
                        or parts {type: text | image | image_url, ...}
    question/answer     query and response, question and answer, ...      image, images
    captions            caption, text, ..., one or a list; or a list for  image, file_name, ...
                        each language: en, zh, ...; the question is drawn

Of several captions, or right answers, one is learned; an evaluation compares with all. Pictures
may stand under any key of `row_images.IMAGE_KEYS`.
"""

import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from common.errors import BadSampleError
from common.text import IMAGE_TAG
from dataset.language import is_chinese
from dataset.row_images import (
    IMAGE_KEYS,
    find_image_key,
    find_named_keys,
    is_name,
    read_images,
    read_list,
    simplify_key,
)

PUBLISHED = "conversations", "image", "image_bytes"
EMPTY = None, "", []
SHORT_NAME = 64  # shorter than any base64
# In a text that may be more than one name: several, a list, a URL.
SPECIAL = re.compile(r"[,:\[]")
# Names of repairs.
PUT_IN_FRONT = "<image> put in front"
SURPLUS_DROPPED = "surplus <image> dropped"

CHAT_KEYS = (
    *("conversations", "messages", "conversation", "dialogue", "dialog", "chat", "texts"),
    *("qas", "qapairs"),
)
QUESTION_KEYS = "query", "question", "instruction", "prompt", "problem", "user"
ANSWER_KEYS = (
    *("response", "answer", "output", "completion", "answers", "multiplechoiceanswer"),
    *("solution", "assistant", "chosen", "references"),
)
PAIR_KEYS = QUESTION_KEYS, ANSWER_KEYS
CAPTION_KEYS = (
    *("caption", "captions", "text", "txt", "description", "sentence", "sentences", "texts"),
    *("imagecaption", "comment", "alttext", "alt", "blipcaption", "prompt", "title", "raw"),
    *("captionstr", "references"),
)
# A key of captions in one language: its ISO 639 code, with a region or a script if need be. Codes
# that are words in other sets are left out: "id", "is", "it", "no", "or", "so", "to".
LANGUAGE_KEY = re.compile(
    "(?:en|zh|ja|ko|de|fr|es|pt|ru|uk|ar|fa|he|hi|bn|tr|vi|th|pl|cs|sv|da|fi|nl|el|hu|ro|hr|sw|mi|"
    "fil|te|ta)(?:[-_][A-Za-z]{2,4})?"
)
# Where the words of a caption, or an answer, are if it is an object.
INNER_TEXTS = "raw", "caption", "text", "answer"
# What nothing here can show to a model.
OTHER_MEDIA = {"video", "videos", "videopath", "audio", "audios", "audiopath"}
# Names of the two sides in other sets.
ROLES = {
    **dict.fromkeys(("user", "human", "usr", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "answer"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# What stands for a picture in the text of other sets.
OTHER_TAG = re.compile(
    r"<img>[^<>\n]{0,500}</img>"
    r"|(?:<\|vision_start\|>\s*)?(?:<\|image_pad\|>)+(?:\s*<\|vision_end\|>)?"
    r"|<\|?(?:image|img|picture)(?:[ _-]?(?:pad|placeholder|soft_token|token|here|\d{1,3}))*"
    r"\s?/?\|?>"
    r"|<start_of_image>|<ImageContent>|\[(?:IMG|IMAGE)\]",
    re.IGNORECASE,
)
# A picture that is named in the text itself, as Qwen-VL has it.
NAMED_TAG = re.compile(r"<img>([^<>\n]{1,500})</img>")
# Asked about a picture that comes with a caption only.
QUESTIONS = (
    "What is in this picture?",
    "Describe the picture.",
    "What does the image show?",
    "Give a short description of the image.",
    "What can you see here?",
    "Write a caption for this picture.",
)
CHINESE_QUESTIONS = (
    "图片里有什么？",
    "描述一下这张图片。",
    "这张图片展示了什么？",
    "请简要描述图像的内容。",
    "你在图中看到了什么？",
    "给这张图片写一句说明。",
)


@dataclass(slots=True)
class Row:
    """One row, whatever its format was.

    Args:
        conversations: [{"role", "content"}]; text only, pictures are `<image>` in user turns. The
            role is missing where the row has none.
        images: of each picture a name to look up, or its encoded file.
        other: the keys that are neither ("id", "type", ...).
        repairs: what had to be repaired, in words that can be counted.
        captions: of a row that has captions only, all of them by their language, "" where the row
            does not say it; the question in `conversations` was drawn.
        answers: all right answers to the question, if the row has a list of them.
    """

    conversations: list[dict]
    images: list[str | bytes]
    other: dict
    repairs: tuple[str, ...] = ()
    captions: dict[str, list[str]] | None = None
    answers: list[str] | None = None


class Text(NamedTuple):
    """The text of a record, and the pictures that stand in it; see `Row` for the rest."""

    format: str
    keys: tuple[str, ...]  # of the record, that it came from
    turns: list[dict]
    # One for each picture among the parts of turns; None: the next one that the record has.
    images: list[str | bytes | None]
    captions: dict[str, list[str]] | None = None
    answers: list[str] | None = None


def convert(record: dict) -> Row:
    """The row that a record of any of the formats stands for.

    BadSampleError says what is missing: "no conversation", "turn without text content", "<image>
    but no image", "image is a URL", ...
    """
    # the published sets are large: their rows take the short way
    row = _read_published(record)
    if row is not None:
        return row

    # text and pictures, wherever they are
    text = _read_text(record)
    rest = {name: value for name, value in record.items() if name not in text.keys}
    for name, value in rest.items():
        if value and (kind := simplify_key(name)) in OTHER_MEDIA:
            raise BadSampleError(f"{kind[:5]} is not supported", f"{name}: {value!r:.60}")
    key = find_image_key(rest, is_shown=_has_tag(text.turns))
    images = [] if key is None else read_images(record[key], key)
    if text.images:
        images = _fill_in(text.images, images)
    other = {name: value for name, value in rest.items() if name != key}

    # as many tags as pictures, as far as the format leaves no doubt
    turns, repairs = _match_tags(text.turns, images, record), ()
    if len(images) == 1 and not count_tags(turns):
        turns = _put_in_front(turns)
        repairs = () if text.format == "captions" else (PUT_IN_FRONT,)
    return Row(turns, images, other, repairs, text.captions, text.answers)


def _read_published(record: dict) -> Row | None:
    """A row of one picture as the published sets have it; None for any other one."""
    # the file of the picture, or its name
    image, turns, n_tags = record.get("image_bytes"), record.get("conversations"), 0
    if image is None:
        image = record.get("image")
        is_one_name = type(image) is str and image.isascii() and not SPECIAL.search(image)
        if not is_one_name or len(image) > SHORT_NAME:
            return None
    elif type(image) is not bytes:
        return None

    # turns of two roles, as a list or its JSON
    if type(turns) is str:
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            return None
    if type(turns) is not list:
        return None
    for turn in turns:
        if type(turn) is not dict or type(content := turn.get("content")) is not str:
            return None
        role = turn.get("role")
        if role == "user":
            n_tags += content.count(IMAGE_TAG)
        elif role != "assistant":
            return None
    if not image or not n_tags:
        return None
    other = {} if len(record) == 2 else {key: record[key] for key in record if key not in PUBLISHED}
    if not OTHER_MEDIA.isdisjoint(other):
        return None
    return Row(turns, [image], other)


def name_format(record: dict) -> str:
    """What a record's format is called: "MiniMind-V", "LLaVA", "messages", "captions", ..."""
    try:
        return _read_text(record).format
    except BadSampleError:
        return "unknown"


def has_text(names: list[str]) -> bool:
    """Whether columns of these names can hold the text of rows: "messages", "caption", ..."""
    simple = {*map(simplify_key, names)}
    is_asked = not simple.isdisjoint(QUESTION_KEYS) and not simple.isdisjoint(ANSWER_KEYS)
    is_told = not simple.isdisjoint((*CHAT_KEYS, *CAPTION_KEYS))
    return is_asked or is_told or any(map(LANGUAGE_KEY.fullmatch, names))


def _has_tag(turns: list[dict]) -> bool:
    """Whether the user's turns have a tag for a picture, of this set or another one."""
    texts = [turns[index]["content"] for index in _user_turns(turns)]
    return any(IMAGE_TAG in text or OTHER_TAG.search(text) for text in texts)


def count_tags(turns: list[dict]) -> int:
    """How many `<image>` the user turns have."""
    return sum(turns[index]["content"].count(IMAGE_TAG) for index in _user_turns(turns))


def _user_turns(turns: list[dict]) -> list[int]:
    """Indices of the user's turns; turns without a role alternate, after a system turn."""
    n_system = bool(turns) and turns[0].get("role") == "system"
    return [
        index
        for index, turn in enumerate(turns)
        if (turn.get("role") or ("user", "assistant")[(index - n_system) % 2]) == "user"
    ]


def _match_tags(turns: list[dict], images: list[str | bytes], record: dict) -> list[dict]:
    """The turns with the tags of other sets written as `<image>`.

    BadSampleError where a tag stands for a picture that is not there.
    """
    n_tags = count_tags(turns)
    if n_tags and not images:
        raise BadSampleError("<image> but no image", _explain_keys(record))
    if n_tags and n_tags >= len(images):
        return turns
    users = _user_turns(turns)
    tags = [tag for index in users for tag in OTHER_TAG.findall(turns[index]["content"])]
    if not images:
        # HTML has "<img>" and "<picture>", what people copy from pages "[Image]".
        if any(tag.lower().startswith(("<|", "<image", "<start")) for tag in tags):
            raise BadSampleError("<image> but no image", _explain_keys(record))
        return turns
    if not tags:
        return turns
    return [
        turn | {"content": OTHER_TAG.sub(IMAGE_TAG, turn["content"])} if index in users else turn
        for index, turn in enumerate(turns)
    ]


def _put_in_front(turns: list[dict]) -> list[dict]:
    """The turns with `<image>` before the first question."""
    users = _user_turns(turns)
    return [
        turn | {"content": f"{IMAGE_TAG}\n{turn['content']}"} if [index] == users[:1] else turn
        for index, turn in enumerate(turns)
    ]


def _explain_keys(record: dict) -> str:
    """What a record has in place of a picture, to be shown beside the reason."""
    named = find_named_keys(record)
    if len(named) > 1:
        return f"{' and '.join(named)} name pictures: write them as a list under image"
    empty = [key for key in record if simplify_key(key) in IMAGE_KEYS and not record[key]]
    if empty:
        return f"{empty[0]} is {json.dumps(record[empty[0]])}"
    return f"the row has the keys {', '.join(record)}"[:200]


def _fill_in(own: list, images: list[str | bytes]) -> list[str | bytes]:
    """The pictures of the parts; those that a part only announces come from the record."""
    left = iter(images)
    filled = [next(left, None) if image is None else image for image in own]
    if None in filled:
        n_missing = filled.count(None)
        raise BadSampleError("<image> but no image", f"{len(own)} in the text, {n_missing} missing")
    return filled


def _read_text(record: dict) -> Text:
    """The text of a record, by the first format that fits."""
    for read in (_read_chat, _read_question, _read_caption):
        text = read(record)
        if text is not None:
            return text
    raise BadSampleError("no conversation", f"the row has the keys {', '.join(record)}"[:200])


def _read_chat(record: dict) -> Text | None:
    """A list of turns: conversations, messages, ..."""
    key = _find_key(record, CHAT_KEYS)
    if key is None:
        answer = "completion" if "completion" in record else "chosen"
        if isinstance(record.get("prompt"), list) and isinstance(record.get(answer), list):
            turns = _read_turns(record["prompt"] + record[answer])
            return Text(f"prompt/{answer}", ("prompt", answer), *turns)
        return None
    value, name = record[key], simplify_key(key)
    if isinstance(value, str) and name != "texts":
        value = _read_json(value)
    # Captions, one for each of several pictures or languages.
    if not isinstance(value, list) or (name == "texts" and isinstance(value[0], str)):
        return None
    if not value:
        raise BadSampleError("no conversation", f"{key} is empty")
    turns, images = _read_turns(value)
    name = "MiniMind-V" if name == "conversations" else name
    if isinstance(value[0], dict) and "from" in value[0]:
        name = "LLaVA" if "image" in record else "ShareGPT"
    return Text(name, (key,), turns, images)


def _read_json(text: str) -> object:
    """A list that is written as text, as Parquet files and spreadsheets have it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        listed = read_list(text)
        if listed is None:
            raise BadSampleError("not a JSON object", f"{error}: {text[:60]}") from error
        return listed


def _read_turns(turns: list) -> tuple[list[dict], list]:
    """({"role", "content"} of each turn, the pictures among its parts)."""
    read, images = [], []
    for index, turn in enumerate(turns):
        for role, content in _split_turn(turn, index):
            text, shown = _read_content(content, index)
            role = ROLES.get(role.casefold(), role) if isinstance(role, str) else None
            if role != "assistant":
                # pictures that the turn has beside its text, or names in it
                own = _read_own_images(turn)
                text = f"{IMAGE_TAG}\n" * (len(own) - text.count(IMAGE_TAG)) + text
                shown += own + read_images([*filter(is_name, NAMED_TAG.findall(text))], "img")
                text = NAMED_TAG.sub(_name_to_tag, text)
            images += shown
            read.append({"role": role, "content": text} if role else {"content": text})
    return read, images


def _read_own_images(turn: object) -> list[str | bytes]:
    """The pictures that a turn has beside its content."""
    if not isinstance(turn, dict):
        return []
    key = next((key for key in ("image", "images") if turn.get(key)), None)
    return [] if key is None else read_images(turn[key], key)


def _name_to_tag(match: re.Match) -> str:
    return IMAGE_TAG if is_name(match[1]) else match[0]


def _split_turn(turn: object, index: int) -> Iterator[tuple[object, object]]:
    """(role, content) of a turn, or of the question and the answer that it holds."""
    if isinstance(turn, list | tuple) and len(turn) == 2:
        yield from zip(("user", "assistant"), turn)
        return
    if not isinstance(turn, dict):
        raise BadSampleError("turn without text content", f"turn {index}")
    content = next((key for key in ("content", "value", "text") if key in turn), None)
    if content is not None:
        yield turn.get("role") or turn.get("from") or turn.get("speaker"), turn[content]
        return
    pair = [next((key for key in keys if key in turn), None) for keys in PAIR_KEYS]
    if None in pair:
        raise BadSampleError("turn without text content", f"turn {index}")
    yield from zip(("user", "assistant"), (turn[key] for key in pair))


def _read_content(content: object, index: int) -> tuple[str, list]:
    """(text with a tag for each picture, the pictures) of a turn's content: a text, or parts."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list | dict) or not content:
        raise BadSampleError("turn without text content", f"turn {index}")
    lines, images = [], []
    for part in content if isinstance(content, list) else [content]:
        kind, text = _name_part(part) if isinstance(part, dict) else ("text", part)
        if isinstance(text, str) and kind in ("text", "input_text", "output_text", None):
            lines.append(text)
        elif isinstance(kind, str) and "image" in kind:
            value = {key: part[key] for key in part if key not in ("type", "text", "index")}
            images += (read_images(value, kind) if any(value.values()) else []) or [None]
            lines.append(IMAGE_TAG)
        else:
            raise BadSampleError("turn without text content", f"turn {index}: {kind!r:.60}")
    return "\n".join(lines), images


def _name_part(part: dict) -> tuple[object, object]:
    """(what kind a part of a turn is, its text); parts of Qwen-VL have no type."""
    key = next((key for key in ("text", "content", "value") if isinstance(part.get(key), str)), "")
    is_picture = "type" not in part and any("image" in name for name in part)
    return "image" if is_picture else part.get("type"), part.get(key)


def _find_key(record: dict, names: tuple[str, ...]) -> str | None:
    """The key of a record that is written in one of these ways and has a value."""
    simple = {simplify_key(key): key for key, value in record.items() if value not in EMPTY}
    return next((simple[name] for name in names if name in simple), None)


def _read_question(record: dict) -> Text | None:
    """One question and its answer, maybe after earlier ones."""
    question, answer = (_find_key(record, names) for names in PAIR_KEYS)
    if question is None or answer is None:
        return None
    keys = [question, answer]
    asked, given = record[question], choose_answer(record[answer])
    choices = record.get("choices") or record.get("options")
    if type(record[answer]) is int and isinstance(choices, list):
        # the number of the right one
        given = dict(enumerate(choices)).get(record[answer])
    if question == "instruction" and isinstance(record.get("input"), str) and record["input"]:
        asked, keys = f"{asked}\n{record['input']}", [*keys, "input"]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": given}]

    # what came before
    for key in ("history", "system"):
        keys += [key] * bool(record.get(key))
    if isinstance(record.get("history"), list):
        turns = record["history"] + turns
    if isinstance(record.get("system"), str) and record["system"]:
        turns = [{"role": "system", "content": record["system"]}, *turns]
    answers = list_texts(record[answer]) if isinstance(record[answer], list) else None
    turns, images = _read_turns(turns)
    return Text(f"{question}/{answer}", tuple(keys), turns, images, answers=answers)


def choose_answer(value: object) -> object:
    """The answer that most people gave, where a record has a list of them."""
    if isinstance(value, list):
        counts = Counter(list_texts(value))
        return max(counts, key=counts.get, default=None)
    return str(value) if isinstance(value, int | float) else value


def list_texts(value: object) -> list[str]:
    """The captions, or answers, that a value is: a text, an object that has one, a list of these.

    A table has lists as text. What is blank or something else is left out.
    """
    if isinstance(value, str):
        value = read_list(value) or value
    texts = []
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, dict):
            one = next((one[key] for key in INNER_TEXTS if key in one), None)
        if isinstance(one, str) and one.strip():
            texts.append(one)
    return texts


def _read_caption(record: dict) -> Text | None:
    """A picture and texts about it: caption and question are drawn, the same ones each time."""
    # by language, or in whatever key has them
    keys = tuple(filter(LANGUAGE_KEY.fullmatch, record))
    captions = {key: texts for key in keys if (texts := list_texts(record[key]))}
    if not captions:
        key = _find_key(record, CAPTION_KEYS)
        if key is None:
            return None
        keys, captions = (key,), {"": list_texts(record[key])}
    if find_image_key({name: record[name] for name in record if name not in keys}) is None:
        return None
    texts = [text for group in captions.values() for text in group]
    if not texts:
        shown = reprlib.repr(record[keys[0]])
        raise BadSampleError("turn without text content", f"{keys[0]} is {shown}")

    # one of them
    seed = zlib.crc32(repr(sorted(record)).encode())
    if len(texts) > 1:
        seed = zlib.crc32("\n".join(texts).encode("utf-8", "backslashreplace"), seed)
    caption = texts[seed % len(texts)]

    # a question in its language
    questions = CHINESE_QUESTIONS if is_chinese(caption) else QUESTIONS
    seed = zlib.crc32(caption.encode("utf-8", "backslashreplace"), seed)
    question = f"{IMAGE_TAG}\n{questions[seed % len(questions)]}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
    return Text("captions", keys, turns, [], captions)
