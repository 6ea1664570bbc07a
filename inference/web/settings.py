"""The top of the page: a new chat, what can be set, the download."""

from dataclasses import dataclass
from functools import partial

import streamlit as st

from inference.config import AskConfig
from inference.web.conversation import Conversation
from inference.web.models import ModelEntry
from inference.web.parts import BRAND, show_text
from inference.web.service import Service
from inference.web.words import LANGUAGES, say

MOST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Choices:
    """What a visitor has set.

    Args:
        entry: the model.
        is_automatic: nobody chose another one than the flags name.
        sampling: options of an answer.
    """

    entry: ModelEntry
    is_automatic: bool
    sampling: dict


def find_language() -> str:
    """The visitor's language: chosen, or else the browser's, or English."""
    chosen = st.session_state.get("language") or st.query_params.get("lang")
    if chosen in LANGUAGES:
        return chosen
    locale = (st.context.locale or "en").lower()
    return next((language for language in LANGUAGES if locale.startswith(language)), "en")


def show_top(service: Service, language: str, conversation: Conversation, start_anew) -> Choices:
    """Draw the top of the page; returns what is set there.

    Args:
        service: has the models.
        language: of the page.
        conversation: what can be downloaded.
        start_anew: called for a new chat.
    """
    word = partial(say, language=language)
    alignment = {"horizontal_alignment": "distribute", "vertical_alignment": "center"}
    with st.container(key="top", horizontal=True, **alignment):
        st.html(BRAND, width="content")
        with st.container(key="tools", horizontal=True, gap="small", width="content"):
            # what is only there once there is something to keep
            if conversation.turns:
                st.button(
                    word("new_chat"), key="new", icon=":material/add:", type="tertiary",
                    on_click=start_anew,
                )  # fmt: skip
                with st.popover(word("download"), icon=":material/download:", type="tertiary"):
                    show_downloads(conversation, language)
            with st.popover(word("settings"), icon=":material/tune:", type="tertiary"):
                return show_settings(service, language)


def show_downloads(conversation: Conversation, language: str) -> None:
    """The conversation as JSON or HTML, made when it is asked for."""
    from inference.web.share import to_html, to_json

    formats = {
        "JSON": ("json", "application/json", lambda: to_json(conversation)),
        "HTML": ("html", "text/html", lambda: to_html(conversation, language)),
    }
    for name, (suffix, mime, make) in formats.items():
        st.download_button(
            name,
            make,
            f"minimind-v-chat.{suffix}",
            mime,
            key=f"download-{suffix}",
            on_click="ignore",
            width="stretch",
        )


def show_settings(service: Service, language: str) -> Choices:
    """Language, model, and how it answers."""
    word = partial(say, language=language)
    st.selectbox(
        word("language"),
        list(LANGUAGES),
        index=list(LANGUAGES).index(language),
        format_func=LANGUAGES.get,
        key="language",
        on_change=remember_language,
    )

    # the model, and what is known of it
    listed = service.shelf.list()
    entries = {str(entry.path): entry for entry in listed if not entry.problem}
    default = service.shelf.default()
    entries.setdefault(str(default.path), default)
    paths = list(entries)
    path = st.selectbox(
        word("model"),
        paths,
        index=paths.index(str(default.path)),
        format_func=lambda path: entries[path].name,
        key="model",
    )
    entry = entries[path]
    show_text("\n".join(describe(entry, language)), "model")
    unusable = [other.name for other in listed if other.problem]
    if unusable:
        show_text(word("unusable", names=", ".join(unusable)), "unusable")

    # how it answers; each model begins with its own temperature
    config = service.config
    temperature = config.temperature
    if temperature is None:
        temperature = 0.0 if entry.knows == "scenes" else AskConfig.temperature
    longest = config.max_new_tokens
    sampling = {
        "temperature": st.slider(
            word("temperature"), 0.0, max(1.5, temperature), temperature, 0.05,
            help=word("temperature_help"), key=f"temperature-{temperature}",
        ),
        "top_p": st.slider(
            word("top_p"), min(0.05, config.top_p), 1.0, config.top_p, 0.05,
            help=word("top_p_help"), key="top_p",
        ),
        "max_new_tokens": st.slider(
            word("max_new_tokens"), min(16, longest), max(1024, longest), longest, 8,
            key="max_new_tokens",
        ),
        "seed": st.number_input(
            word("seed"), 0, MOST_SEED, None, 1, placeholder=word("seed_random"), key="seed"
        ),
    }  # fmt: skip
    return Choices(entry, entry.path == default.path, sampling)


def describe(entry: ModelEntry, language: str) -> list[str]:
    """Lines about a model: size, when it was trained, stage, score; as far as they are known."""
    word = partial(say, language=language)
    lines = []
    if entry.n_parameters:
        n = f"{entry.n_parameters / 1e6:.1f}"
        lines.append(word("parameters", n=n, size=f"{entry.n_bytes / 1e6:.1f}"))
    if entry.trained_at:
        date = entry.trained_at.strftime("%Y-%m-%d %H:%M")
        lines.append(word("trained", stage=entry.stage or "", date=date))
    if entry.score:
        lines.append(word("score", score=describe_score(entry.score, language)))
    return lines


def describe_score(score: dict, language: str) -> str:
    """What `read_scores` has found, in a line."""
    parts = [score["data"]] if "data" in score else []
    if "exact" in score:
        parts.append(say("exact", language, percent=f"{100 * score['exact']:.1f}"))
    if "cider" in score:
        parts.append(f"CIDEr-D {100 * score['cider']:.1f}")
    return " · ".join(parts)


def remember_language() -> None:
    """Keep a chosen language in the address, so that a reload finds it."""
    st.query_params["lang"] = st.session_state.language
