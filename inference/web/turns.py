"""A question and its answer on the page, and what can be done with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from inference.web.conversation import describe_speed
from inference.web.looks import show_look
from inference.web.parts import MAX_TYPED, show_problem, show_text, show_words

if TYPE_CHECKING:
    from inference.web.conversation import Turn
    from inference.web.visit import Visit

WIDTH = 150  # pixels of a picture in a question


def show_turn(visit: Visit, number: int) -> None:
    """Draw turn `number` of the visitor's conversation."""
    turn = visit.conversation.turns[number]
    with st.container(key=f"turn-{number}"):
        if visit.state.get("editing") == number:
            show_editor(visit, number)
        else:
            show_question(visit, number)
        for index, (name, problem) in enumerate(turn.refused):
            show_problem(f"{name}: {problem.say(visit.language)}", f"{number}-{index}")
        if turn.is_finished:
            show_answer(visit, number)
        else:
            show_growing_answer(visit, turn)


def show_question(visit: Visit, number: int) -> None:
    """Pictures and text in a bubble, with a button to change the text."""
    turn = visit.conversation.turns[number]
    with st.container(key=f"asked-{number}", horizontal_alignment="right", gap=None):
        with st.container(key=f"bubble-{number}", width="content"):
            if turn.pictures:
                with st.container(horizontal=True, gap="small"):
                    for picture in turn.pictures:
                        st.image(picture.thumbnail, width=WIDTH)
            st.text(turn.question)
        st.button(
            visit.say("edit"), key=f"edit-{visit.key}-{number}", icon=":material/edit:",
            type="tertiary", help=visit.say("edit_help"),
            on_click=visit.start_editing, args=(number,),
        )  # fmt: skip


def show_editor(visit: Visit, number: int) -> None:
    """The question as a text that can be changed."""
    turn = visit.conversation.turns[number]
    with st.form(f"form-{visit.key}-{number}", border=False):
        st.text_area(
            visit.say("question"), turn.question, max_chars=MAX_TYPED, height="content",
            key=f"edited-{visit.key}-{number}", label_visibility="collapsed",
        )  # fmt: skip
        with st.container(horizontal=True, horizontal_alignment="right"):
            st.form_submit_button(visit.say("cancel"), on_click=visit.stop_editing)
            st.form_submit_button(
                visit.say("send"), type="primary", on_click=visit.edit, args=(number,)
            )


def show_growing_answer(visit: Visit, turn: Turn) -> None:
    """What there is so far, or why it has not begun; rewritten until it is complete."""
    text = st.empty()
    with st.container(key="small-status"):
        status = st.empty()
    st.button(
        visit.say("stop"), key=f"stop-{visit.key}-{len(visit.conversation.turns)}",
        icon=":material/stop_circle:", on_click=turn.stop,
    )  # fmt: skip

    def rewrite() -> bool:
        if turn.answer:
            text.text(f"{turn.answer} ▍")
        status.text(describe_state(visit, turn))
        return not turn.is_finished

    visit.follow(rewrite)


def describe_state(visit: Visit, turn: Turn) -> str:
    """Where a question is, or how far its answer."""
    if turn.state == "waiting" and turn.place:
        return visit.say("place", place=turn.place)
    if turn.state == "loading":
        return visit.say("loading")
    return visit.say("growing", n=turn.n_tokens) if turn.answer else visit.say("reading")


def show_answer(visit: Visit, number: int) -> None:
    """An answer that is complete, stopped or failed."""
    turn = visit.conversation.turns[number]
    is_last = number == len(visit.conversation.turns) - 1
    # the text
    look = visit.state.get("look")
    look = look if look and look.number == number else None
    # onnxruntime tells nothing of what happens inside
    can_look = visit.service.config.backend == "torch"
    if turn.answer and not can_look:
        st.text(turn.answer)
    elif turn.answer:
        show_words(
            turn.answer,
            f"words-{visit.key}-{number}",
            visit.language,
            look.find_word()[1:] if look else (0, 0),
            lambda place: visit.look_at(number, place),
        )
    if turn.problem:
        show_problem(turn.problem.say(visit.language), f"{number}")

    # how fast it came, who answered
    lines = []
    if turn.n_tokens:
        lines.append(describe_speed(turn, visit.language))
    if turn.state == "stopped":
        lines.append(visit.say("stopped"))
    with st.container(key=f"below-{number}", horizontal=True, vertical_alignment="center"):
        if lines:
            show_text(" · ".join(lines), f"speed-{number}")
        # without any picture the answer would be the same line again
        if is_last and visit.conversation.pictures:
            st.button(
                visit.say("regenerate"), key=f"again-{visit.key}-{number}",
                icon=":material/refresh:", type="tertiary",
                on_click=visit.regenerate, args=(number,),
            )  # fmt: skip
    if note := visit.describe_entry(number):
        show_text(note, f"note-{number}")
    if look:
        show_look(visit, look)
    elif is_last and turn.answer and can_look and not visit.state.get("look"):
        show_text(visit.say("click_a_word"), "hint")
