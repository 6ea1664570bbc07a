"""A conversation to take along: as JSON, or as one HTML page that needs nothing else.

What people and the model wrote is text in both: in the page each character that could be markup is
escaped, and there is no script, link or address in it.
"""

import base64
import json
from html import escape
from typing import Any

from inference.web.conversation import Conversation, Picture, Turn, describe_speed
from inference.web.words import DEFAULT_LANGUAGE, LANGUAGES, say

# Changes when what a program finds in the JSON does.
FORMAT = "minimind-v conversation 1"
STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 1rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; }
article { margin: 1.5rem 0; }
.question, .answer { padding: .6rem .9rem; border-radius: .7rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.question { background: #8882; margin-left: 10%; }
.answer { margin-top: .5rem; border: 1px solid #8884; }
figure { display: inline-block; margin: .5rem .5rem 0 0; max-width: 100%; vertical-align: top; }
figure img { display: block; max-width: min(20rem, 100%); border-radius: .5rem; }
figcaption, .note { font-size: .8rem; opacity: .7; overflow-wrap: anywhere; }
.note { margin: .3rem .9rem 0; }
"""


def to_json(conversation: Conversation) -> str:
    """An object with `format` and `turns`; pictures are JPEG thumbnails in base64."""
    content = {"format": FORMAT, "turns": [_describe(turn) for turn in conversation.turns]}
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def _describe(turn: Turn) -> dict[str, Any]:
    return {
        "model": turn.model,
        "settings": turn.settings,
        "pictures": [{"name": picture.name, "jpeg": _encode(picture)} for picture in turn.pictures],
        "refused": [{"name": name, "problem": str(problem)} for name, problem in turn.refused],
        "question": turn.question,
        "answer": turn.answer,
        "state": turn.state,
        "problem": turn.problem and str(turn.problem),
        "n_tokens": turn.n_tokens,
        "tokens_per_second": round(turn.tokens_per_second, 2),
        "seconds_to_first_token": round(turn.seconds_to_first_token, 3),
    }


def _encode(picture: Picture) -> str:
    return base64.b64encode(picture.thumbnail).decode()


def to_html(conversation: Conversation, language: str = DEFAULT_LANGUAGE) -> str:
    """A page for phones and larger screens, light or dark as its reader likes it."""
    language = language if language in LANGUAGES else DEFAULT_LANGUAGE
    title = escape(say("conversation_title", language))
    turns = "\n".join(_draw(turn, language) for turn in conversation.turns)
    return f"""<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
{turns}
</body>
</html>
"""


def _draw(turn: Turn, language: str) -> str:
    """A question with its pictures, its answer, and how it came."""
    # the question
    pictures = "".join(
        f'<figure><img src="data:image/jpeg;base64,{_encode(picture)}" alt="">'
        f"<figcaption>{escape(picture.name)}</figcaption></figure>"
        for picture in turn.pictures
    )
    parts = [_label("question", f"{escape(turn.question)}\n{pictures}".strip(), language)]

    # the answer, and what there is to say about it
    if turn.answer:
        parts.append(_label("answer", escape(turn.answer), language))
    notes = [f"{name}: {problem.say(language)}" for name, problem in turn.refused]
    if turn.problem:
        notes.append(turn.problem.say(language))
    if turn.state == "stopped":
        notes.append(say("stopped", language))
    if turn.n_tokens:
        speed = describe_speed(turn, language)
        settings = ", ".join(f"{name} {value}" for name, value in turn.settings.items())
        notes.append(" · ".join(filter(None, (turn.model, speed, settings))))
    parts += [f'<div class="note">{escape(note)}</div>' for note in notes]
    return "\n".join(["<article>", *parts, "</article>"])


def _label(kind: str, content: str, language: str) -> str:
    """A question or an answer, whose kind a screen reader says."""
    name = escape(say(kind, language))
    return f'<div class="{kind}" role="group" aria-label="{name}">{content}</div>'
