"""Parts of the page that Streamlit does not have: clickable words, cards, a watch on uploads.

Each is a file of JavaScript beside this one. They put what people and the model write into the page
as text, never as HTML.
"""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path

import streamlit as st

from inference.web.gallery import Example

HERE = Path(__file__).parent
BRAND = '<div class="brand">MiniMind-V</div>'
# Characters that a field takes: beyond them it drops what is typed, without a word. Far below them
# a question is refused with one.
MAX_TYPED = 1_000_000


def show_style() -> None:
    """The page's own style."""
    st.html(f"<style>{read('page.css')}</style>")


def show_text(text: str, key: str) -> None:
    """A small line; `key` names it on the page."""
    with st.container(key=f"small-{key}", width="content"):
        st.text(text)


def show_problem(text: str, key: str) -> None:
    """What is wrong; it may hold the name of a file."""
    with st.container(key=f"problem-{key}"):
        st.text(text)


def show_words(
    text: str, key: str, language: str, chosen: tuple[int, int], choose: Callable[[int], None]
) -> None:
    """An answer whose words can be clicked.

    Args:
        text: the answer.
        key: of this one on the page.
        language: tells where words end.
        chosen: first character of the chosen words and the one after their last.
        choose: called with the first character of the word that was clicked.
    """
    words = mount("answer_words", '<div class="answer"></div>', "words")
    start, end = chosen
    words(
        key=key,
        data={"text": text, "language": language, "start": start, "end": end},
        on_word_change=lambda: choose(int(st.session_state[key].word)),
    )


def show_cards(examples: Sequence[Example], key: str, choose: Callable[[Example], None]) -> None:
    """The examples as cards; `choose` is called with the one that was clicked."""
    cards = mount("example_cards", '<div class="gallery"></div>', "gallery")

    def choose_one() -> None:
        index = int(st.session_state[key].chosen)
        if 0 <= index < len(examples):
            choose(examples[index])

    shown = [
        {
            "question": example.question,
            "pictures": [as_address(picture.thumbnail) for picture in example.pictures],
        }
        for example in examples
    ]
    cards(key=key, data={"cards": shown}, on_chosen_change=choose_one)


def watch_attached(key: str) -> None:
    """Notice which files are beside the question, see `take_attached`."""
    with st.container(key="watch"):
        watch = mount("attached_files", "", "attached")
        watch(key=key, default={"files": None}, on_files_change=lambda: None)


def take_attached(key: str) -> list[str]:
    """Names of the files that were beside a question that is sent now; called once for each."""
    files = (st.session_state.get(key) or {}).get("files")
    # The browser tells of them a little longer than they are there.
    if not files or files["batch"] == st.session_state.get(f"{key}_taken"):
        return []
    st.session_state[f"{key}_taken"] = files["batch"]
    return [str(name) for name in files["names"]]


def mount(name: str, html: str, file: str):
    """A component of this folder."""
    style = HERE / f"{file}.css"
    return st.components.v2.component(
        name, html=html, css=read(style.name) if style.is_file() else None, js=read(f"{file}.js")
    )


def as_address(jpeg: bytes) -> str:
    """A picture inside its own address."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")
