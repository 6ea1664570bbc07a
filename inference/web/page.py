"""The web page that web_demo_vlm.py shows: a conversation about pictures.

Streamlit runs `show_page` again for each click of a visitor. What one visitor does lasts in
`st.session_state` and in the conversation, what serves all of them in service.py. Answers grow in
the background (worker.py), so nothing that is clicked meanwhile can lose one.

What people and the model write is shown by `st.text`, or as text by the components of parts.py, and
by nothing else: as Markdown, a question could make the browser of whoever reads it fetch an
address, or carry a link. So names and texts are in no label, tooltip or caption.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import streamlit as st

from common.errors import BadSampleError, UserError
from inference.config import MAX_UPLOAD_MB, WebConfig
from inference.web.conversation import MAX_PICTURES, Picture
from inference.web.gallery import Example
from inference.web.models import ModelEntry
from inference.web.parts import (
    MAX_TYPED,
    show_cards,
    show_problem,
    show_style,
    show_text,
    take_attached,
    watch_attached,
)
from inference.web.service import open_service
from inference.web.settings import show_top
from inference.web.turns import show_turn
from inference.web.visit import Visit
from inference.web.words import Problem, describe_problem


def show_page(
    config: WebConfig, find_examples: Callable[[WebConfig, ModelEntry], Iterable[Example]]
) -> None:
    """Draw the page, and follow what grows: an answer that is on its way, examples.

    Args:
        config: what the command line says.
        find_examples: examples to try with a model.
    """
    # who is here, and what was said so far
    st.set_page_config(page_title="MiniMind-V", page_icon="👁️", layout="centered")
    show_style()
    watch_attached("attached")
    visit = Visit(open_service(config, find_examples))
    visit.name_in_address()

    try:
        visit.choices = show_top(
            visit.service, visit.language, visit.conversation, visit.start_anew
        )
    except UserError as error:
        show_problem(describe_problem(error).say(visit.language), "model")
        return
    if visit.choices.entry.knows == "scenes":
        show_text(visit.say("knows_scenes"), "knows")

    for number in range(len(visit.conversation.turns)):
        show_turn(visit, number)
    if not visit.conversation.turns:
        show_welcome(visit)
    show_notice(visit)
    show_composer(visit)
    visit.follow_to_the_end()


def show_composer(visit: Visit) -> None:
    """The line to write in, always the same one, so that what is in it stays.

    A question is taken in a callback: Streamlit may end a run at any call that draws, and what was
    sent would be lost with it.
    """
    # Each run says it until the next question, for a browser may skip what one run draws; it writes
    # the same text only once, so that what the visitor changes stays.
    if (draft := visit.state.get("draft")) is not None:
        visit.state["question"] = draft
    st.chat_input(
        visit.say("ask"),
        key="question",
        max_chars=MAX_TYPED,
        accept_file="multiple",
        max_upload_size=MAX_UPLOAD_MB,
        on_submit=send,
        args=(visit,),
    )


def send(visit: Visit) -> None:
    """Ask what was written, with the pictures that came with it."""
    sent = st.session_state["question"]
    visit.ask(sent.text, *open_uploads(sent.files, take_attached("attached")))


def open_uploads(files: list, attached: list[str]) -> tuple[list[Picture], list]:
    """(pictures, [(name, problem)] of what is none), see MAX_PICTURES and MAX_UPLOAD_MB.

    Args:
        files: uploads.
        attached: names of what was beside the question; what did not arrive is among them.
    """
    missing = Counter(attached) - Counter(file.name for file in files)
    problem = Problem("not_uploaded", most=MAX_UPLOAD_MB)
    pictures, problems = [], [(name, problem) for name in missing.elements()]
    for file in files[:MAX_PICTURES]:
        try:
            pictures.append(Picture.open(file.name, file))
        except BadSampleError as error:
            problems.append((file.name, describe_problem(error)))
    for file in files[MAX_PICTURES:]:
        problems.append((file.name, Problem("first_pictures", most=MAX_PICTURES)))
    return pictures, problems


def show_notice(visit: Visit) -> None:
    """Why the last question was not sent, and the pictures that wait for the next one."""
    if notice := visit.state.get("notice"):
        show_problem(notice.say(visit.language), "notice")
    if waiting := visit.state.get("waiting"):
        with st.container(horizontal=True):
            for picture in waiting:
                st.image(picture.thumbnail, width=100)


def show_welcome(visit: Visit) -> None:
    """What a visitor sees first: examples that are known to work, as they are found."""
    with st.container(key="welcome"):
        st.subheader(visit.say("tagline"), anchor=False)
    gallery = visit.service.galleries.open(visit.choices.entry)
    with st.container(key="small-examples"):
        title = st.empty()
    cards, drawn = st.empty(), [[]]

    def draw_new() -> bool:
        is_complete, examples = gallery.is_complete, gallery.choose(visit.language)
        if examples:
            title.text(f"{visit.say('examples')} {visit.say('examples_checked')}")
        elif not is_complete:
            title.text(visit.say("examples_tried"))
        # in their place, with a key of their own: the rest of the page is not drawn again
        if examples != drawn[-1]:
            drawn.append(examples)
            with cards:
                show_cards(examples, f"gallery-{len(drawn)}", visit.ask_example)
        return not is_complete

    if draw_new():
        visit.follow(draw_new)
