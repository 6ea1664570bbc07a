"""A request for /v1/chat/completions, checked: an option that has no effect here is refused.

Only the detail of a picture is not looked at: a picture is seen in one size.
"""

import base64
import binascii
import json
import re
from typing import Any, NamedTuple

from common.errors import BadSampleError
from common.files import check_size
from common.flags import MOST_SEED
from inference.chat import MAX_QUESTION, TooLongError, add_image_tags, check_prompt
from model.processing import check_conversation
from scripts.serve_openai_api.config import ServeConfig
from scripts.serve_openai_api.errors import ApiError, check_model

MAX_MESSAGES = 200
# Characters of all messages; more would be encoded for seconds before they are found too many.
MAX_CHARACTERS = 20 * MAX_QUESTION
MAX_STOPS, MAX_STOP = 4, 200
MESSAGE_FIELDS = {"role", "content", "name"}
# Options that say who asks, which changes no answer.
NOTES = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Options of OpenAI that this server does not have, with the values that ask for nothing.
NEUTRAL = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(;[\w.+-]+=[\w.+-]*)*;base64,", re.ASCII)


class ChatRequest(NamedTuple):
    """What is asked.

    Args:
        turns: one {"role": ..., "content": ...} for each turn, with the tags of its pictures.
        pictures: their files, or URLs to fetch these from.
        stream: send pieces as they come.
        include_usage: and at the end how many tokens they were.
        stops: strings before which the answer ends.
        sampling: temperature, top_p, max_new_tokens, seed.
    """

    turns: list[dict[str, str]]
    pictures: list[bytes | str]
    stream: bool
    include_usage: bool
    stops: list[str]
    sampling: dict[str, Any]


def read_request(body: bytes, model_name: str, config: ServeConfig) -> ChatRequest:
    """Check the body of a request. ApiError says what is wrong.

    Args:
        body: JSON.
        model_name: the one model that there is.
        config: limits, and what is used where the request says nothing.
    """
    # options; null is the same as none
    fields = read_json(body)
    given = {name: value for name, value in fields.items() if value is not None}
    known = ("model", "messages", "stream", "stream_options", "stop", "temperature", "top_p")
    known += ("max_tokens", "max_completion_tokens", "seed")
    for name in given.keys() - {*known, *NOTES}:
        if name not in NEUTRAL or not any(same(given[name], value) for value in NEUTRAL[name]):
            raise refuse(f"{name!r:.60} is not supported here: leave it out", name)

    # the model
    check_model(take(given, "model", str, "a string"), model_name)

    # how to answer
    stream = take(given, "stream", bool, "true or false", False)
    options = take(given, "stream_options", dict, "an object", {})
    include_usage = take(options, "include_usage", bool, "true or false", False, "stream_options.")
    if options and not stream:
        raise refuse("stream_options is for stream: true, leave it out", "stream_options")
    turns, pictures = read_messages(given, config)
    return ChatRequest(
        turns, pictures, stream, include_usage, read_stops(given), read_sampling(given, config)
    )


def read_json(body: bytes) -> dict[str, Any]:
    """An object of JSON."""

    def no_number(text: str):
        raise ValueError(f"{text} is no number")

    try:
        fields = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else f"{error!s:.100}"
        raise ApiError(f"the body is no JSON ({reason})", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError("the body has to be a JSON object", code="invalid_json")
    return fields


# Options.


def take(
    fields: dict[str, Any], name: str, kind: type, what: str, default: Any = None, place: str = ""
) -> Any:
    """An option of that type; ApiError where it is another, or missing without a default."""
    value = fields.get(name)
    if value is None:
        if default is None:
            raise refuse(f"{place}{name} is missing: give {what}", f"{place}{name}")
        return default
    # True is a number to Python
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise refuse(f"{place}{name} has to be {what}", f"{place}{name}")
    return value


def read_sampling(given: dict[str, Any], config: ServeConfig) -> dict[str, Any]:
    """temperature, top_p, max_new_tokens and seed."""
    defaults = config.sampling
    sampling = {
        "temperature": take_number(given, "temperature", 0, 100, defaults["temperature"]),
        "top_p": take_number(given, "top_p", 0, 1, defaults["top_p"]),
        "seed": take_number(given, "seed", 0, MOST_SEED, None, whole=True),
    }
    if sampling["top_p"] == 0:
        raise refuse("top_p is 0: it has to be above 0 and at most 1", "top_p")

    # the newer name comes first
    lengths = ("max_completion_tokens", "max_tokens")
    name = next((name for name in lengths if name in given), lengths[0])
    most = defaults["max_new_tokens"]
    sampling["max_new_tokens"] = take_number(given, name, 1, 10**9, most, whole=True)
    return sampling


def take_number(
    given: dict[str, Any],
    name: str,
    least: float,
    most: float,
    default: float | None,
    whole: bool = False,
) -> float | None:
    """A number from `least` to `most`."""
    if name not in given:
        return default
    value, what = given[name], f"a {'whole ' * whole}number from {least} to {most}"
    is_number = isinstance(value, int | (int if whole else float)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise refuse(f"{name} is {value!r:.40}: it has to be {what}", name)
    return value


def read_stops(given: dict[str, Any]) -> list[str]:
    """Up to four strings."""
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    is_right = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_right or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP for one in stops):
        raise refuse(
            f"stop has to be a string of 1 to {MAX_STOP} characters, or up to {MAX_STOPS} of them",
            "stop",
        )
    return stops


# Messages.


def read_messages(
    given: dict[str, Any], config: ServeConfig
) -> tuple[list[dict[str, str]], list[bytes | str]]:
    """(turns, pictures)."""
    # as many as can be
    messages = take(given, "messages", list, "a list of messages")
    if not messages:
        raise refuse("messages is empty: the last message has to be a question", "messages")
    if len(messages) > MAX_MESSAGES:
        raise refuse(
            f"messages has {len(messages)} of them: at most {MAX_MESSAGES} may be", "messages"
        )

    # each
    turns, pictures = [], []
    for index, message in enumerate(messages):
        role, text, new = read_message(message, f"messages[{index}]", config)
        pictures += new
        if len(pictures) > config.max_images:
            raise refuse(
                f"more than {config.max_images} pictures in a conversation: send fewer", "messages"
            )
        if role == "user":
            text = add_image_tags(text, len(new))
        turns.append({"role": role, "content": text})

    # all together
    n_characters = sum(len(turn["content"]) for turn in turns)
    if n_characters > MAX_CHARACTERS:
        limit = f"may have {MAX_CHARACTERS}"
        raise TooLongError("conversation", f"{n_characters} characters", limit)
    try:
        check_conversation(turns, blank_answers=True)
    except BadSampleError as error:
        raise refuse(f"messages cannot be a conversation: {error}", "messages") from None
    if turns[-1]["role"] != "user":
        raise refuse("the last message has to be by the user", "messages")
    return turns, pictures


def read_message(
    message: Any, place: str, config: ServeConfig
) -> tuple[str, str, list[bytes | str]]:
    """(role, text, pictures) of a message."""
    # the role
    if not isinstance(message, dict):
        raise refuse(f"{place} has to be an object with role and content", place)
    role = take(message, "role", str, "system, user or assistant", None, f"{place}.")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        raise refuse(
            f"{place}.role is {role!r:.40}: it has to be system, user or assistant", f"{place}.role"
        )
    for name in message.keys() - MESSAGE_FIELDS:
        # an answer of OpenAI's client has many empty ones
        if message[name]:
            here = f"{place}.{name:.60}"
            raise refuse(f"{here!r} is not supported here: leave it out", here)

    # the text, or a list of texts and pictures
    place = f"{place}.content"
    content = message.get("content")
    # an answer that ended at once
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        text, pictures = content, []
    elif isinstance(content, list):
        text, pictures = read_parts(content, place, role, config)
    else:
        raise refuse(f"{place} has to be a string, or a list of parts", place)

    # its length
    if role == "user":
        check_prompt(text)
    elif len(text) > MAX_QUESTION:
        raise refuse(f"{place} has {len(text)} characters but may have {MAX_QUESTION}", place)
    return role, text, pictures


def read_parts(
    parts: list, place: str, role: str, config: ServeConfig
) -> tuple[str, list[bytes | str]]:
    """(text, pictures) of a content that is a list."""
    texts, pictures = [], []
    for index, part in enumerate(parts):
        here = f"{place}[{index}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            texts.append(take(part, "text", str, "a string", None, f"{here}."))
        elif kind == "image_url" and role == "user":
            image = take(part, "image_url", dict, "an object with url", None, f"{here}.")
            url = take(image, "url", str, "a data URL", None, f"{here}.image_url.")
            pictures.append(read_url(url, f"{here}.image_url.url", config))
        elif kind == "image_url":
            raise refuse(f"{here} is a picture by the {role}: only the user can send one", here)
        else:
            raise refuse(f"{here}.type has to be text or image_url", f"{here}.type")
    return "".join(texts), pictures


def read_url(url: str, place: str, config: ServeConfig) -> bytes | str:
    """The file of a data URL; a URL that may be fetched as it is. Files are never opened."""
    # a URL
    if re.match(r"https?://", url, re.IGNORECASE):
        if not config.allow_urls:
            raise refuse(
                f"{place} names a picture elsewhere, and this server fetches none: send it inside "
                "of the request, as data:image/png;base64,...",
                place,
            )
        return url

    # a picture
    header = DATA_URL.match(url[:200])
    if header is None:
        raise refuse(
            f"{place} begins with {url[:20]!r}: it has to be data:image/png;base64,... (files are "
            "never opened)",
            place,
        )
    encoded = url[header.end() :]
    check_size(len(encoded) * 3 // 4, "image", config.max_image_mb * 2**20, place)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(f"{place} is broken base64 ({error})", place) from None


def same(one: Any, other: Any) -> bool:
    """Equal and of the same type: False is no 0; 0.0 is."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def refuse(message: str, param: str) -> ApiError:
    return ApiError(message, param=param)
