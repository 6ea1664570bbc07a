"""One visitor: what was said so far, and what can be done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import streamlit as st

from inference.web.conversation import MAX_PICTURES, Conversation, Picture
from inference.web.gallery import Example
from inference.web.looks import start_look
from inference.web.models import ModelEntry
from inference.web.service import Service, watch_visitor
from inference.web.settings import find_language
from inference.web.words import Problem, say

if TYPE_CHECKING:
    from inference.web.settings import Choices

SECONDS_BETWEEN_LOOKS = 0.1  # at an answer that grows


class Visit:
    """One visitor, in one run of the script.

    Args:
        service: for all visitors.

    Attributes:
        language: of the page.
        key: id of the conversation; None before its first question.
        conversation: what was said so far.
        is_here: says whether the visitor still has the page open.
        choices: model and options of an answer.
    """

    choices: Choices

    def __init__(self, service: Service):
        self.service, self.language = service, find_language()
        self.is_here = watch_visitor()
        self._followed: list[Callable[[], bool]] = []
        # The address names the conversation, so that a reload finds it again; "" is a new one. It
        # is another one than was written there after Back and Forward.
        address = st.query_params.get("c")
        if address and address != self.state.get("address"):
            self.state["c"] = address
        self.key = self.state.get("c")
        self.conversation = service.store.find(self.key)
        if self.conversation is None:
            self.key, self.conversation = None, self.state.setdefault("unsent", Conversation())

    def name_in_address(self) -> None:
        """Write the conversation's id into the address. Not in a callback, which this may end."""
        if self.key and st.query_params.get("c") != self.key:
            st.query_params["c"] = self.key
        elif not self.key and "c" in st.query_params:
            del st.query_params["c"]
        self.state["address"] = self.key

    @property
    def state(self):
        """What lasts from one run to the next."""
        return st.session_state

    def say(self, key: str, **values: object) -> str:
        """A text of the page in the visitor's language."""
        return say(key, self.language, **values)

    # What a visitor does.

    def ask(self, question: str, pictures: list[Picture], refused: list = ()) -> None:
        """Send a question; what cannot be sent is told, and stays in the line to write in."""
        self.stop()
        self.state.pop("notice", None)
        # A browser is told of a text once, so the same one comes back a space longer.
        draft = question + " " * (question == self.state.pop("draft", None))
        pictures = self.state.pop("waiting", []) + pictures
        n_pictures = len(self.conversation.pictures) + len(pictures)
        try:
            self.service.worker.ask(
                self.conversation,
                self.choose_entry(n_pictures),
                question,
                pictures,
                self.choices.sampling,
                self.is_here,
                refused,
            )
        except Problem as problem:
            self.state.update(notice=problem, waiting=pictures[:MAX_PICTURES], draft=draft)
            return
        if not self.conversation.pictures:
            self.state["draft"] = draft
        self.forget_look()
        self.stop_editing()
        self.key = self.service.store.keep(self.conversation, self.key)
        self.state["c"] = self.key

    def ask_example(self, example: Example) -> None:
        """Ask what a card says."""
        self.ask(example.question, list(example.pictures))

    def regenerate(self, number: int) -> None:
        """Answer a question again."""
        self._ask_again(self.service.worker.regenerate, number)

    def edit(self, number: int) -> None:
        """Ask another question in the place of one."""
        question = self.state[f"edited-{self.key}-{number}"]
        self._ask_again(self.service.worker.edit, number, question)

    def _ask_again(self, ask: Callable, number: int, *question: str) -> None:
        self.stop()
        self.state.pop("notice", None)
        pictures = [it for turn in self.conversation.turns[: number + 1] for it in turn.pictures]
        entry, sampling = self.choose_entry(len(pictures)), self.choices.sampling
        try:
            ask(self.conversation, entry, number, *question, sampling, self.is_here)
        except Problem as problem:
            self.state["notice"] = problem
            return
        self.forget_look()
        self.stop_editing()

    def stop(self) -> None:
        """End an answer that is on its way; what there is of it stays."""
        for turn in self.conversation.turns:
            turn.stop()

    def start_anew(self) -> None:
        """A conversation without turns; the old one stays at its address."""
        self.stop()
        for name in ("unsent", "waiting", "notice"):
            self.state.pop(name, None)
        self.state["c"] = ""
        self.forget_look()
        self.stop_editing()

    def start_editing(self, number: int) -> None:
        self.state["editing"] = number

    def stop_editing(self) -> None:
        self.state.pop("editing", None)

    def look_at(self, number: int, place: int) -> None:
        """See where the model looked, for the word at a character of an answer."""
        look = self.state.get("look")
        # All words of an answer are watched at once, and hidden patches are for all of them too.
        if look and look.number == number and look.watching.state not in ("stopped", "failed"):
            look.place = place
            return
        try:
            self.state["look"] = start_look(self, number, place)
        except Problem as problem:
            self.state["notice"] = problem

    def forget_look(self) -> None:
        look = self.state.pop("look", None)
        for task in (look.watching, look.occluding) if look else ():
            if task:
                task.stop()

    # Which model.

    def choose_entry(self, n_pictures: int) -> ModelEntry:
        """The model for so many pictures."""
        chosen = None if self.choices.is_automatic else self.choices.entry
        return self.service.shelf.choose_for(n_pictures, chosen)[0]

    def find_entry(self, number: int) -> ModelEntry:
        """The model that answered a turn."""
        name = self.conversation.turns[number].model
        entries = [self.choices.entry, *self.service.shelf.list()]
        return next((entry for entry in entries if entry.name == name), entries[0])

    def describe_entry(self, number: int) -> str | None:
        """A line where a turn has several pictures, and another model is for that."""
        n_pictures = len(self.conversation.context(number)[1])
        if n_pictures < 2:
            return None
        chosen, model = self.choices.entry, self.conversation.turns[number].model
        if self.choices.is_automatic and model != chosen.name:
            return self.say("answered_by", model=model)
        _, better = self.service.shelf.choose_for(n_pictures, chosen)
        if better:
            return self.say("better_beside", model=better.name)
        is_single = self.find_entry(number).stage == "sft"
        return self.say("one_picture_only", model=model) if is_single else None

    # What grows.

    def follow(self, redraw: Callable[[], bool]) -> None:
        """Call `redraw` again and again, after all is drawn, until it returns False."""
        self._followed.append(redraw)

    def follow_to_the_end(self) -> None:
        """Redraw what grows; when something is complete, the page is drawn anew."""
        if not self._followed:
            return
        # each is redrawn, also where one before it is complete
        while False not in [redraw() for redraw in self._followed]:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        st.rerun()
