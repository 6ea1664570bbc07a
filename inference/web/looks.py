"""Where the model looked: heat maps of one word of an answer, over the pictures it was shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import streamlit as st
from PIL import Image

from inference.web.parts import show_problem, show_text

if TYPE_CHECKING:
    import torch

    from inference.attention import Looks
    from inference.load import VLM
    from inference.web.visit import Visit
    from inference.web.worker import Task

WIDTH = 216  # pixels of a map on the page


class Watched(NamedTuple):
    """What an answer looked at.

    Args:
        looks: see inference/attention.py.
        pixel_values: float[k, 3, H, W] of the pictures.
        pixels: uint8[k, 3, H, W], the pictures as the model sees them.
    """

    looks: Looks
    pixel_values: torch.Tensor
    pixels: torch.Tensor


@dataclass
class Look:
    """The word of an answer that a visitor has clicked.

    Args:
        number: of the turn.
        place: the character that was clicked, counted from the answer's start.
        watching: its result is a Watched.
        occluding: its result is float[words, rows, cols] of each picture; None until wanted.
        n_done: patches that have been greyed out so far.
        n_patches: that will be.
    """

    number: int
    place: int
    watching: Task
    occluding: Task | None = None
    n_done: int = 0
    n_patches: int = 1

    @property
    def words(self) -> list[str]:
        """Of the answer; none while it is being watched."""
        watched = self.watching.result
        return watched.looks.words if watched else []

    def find_word(self) -> tuple[int, int, int]:
        """(index of the word, its first character, the one after its last); 0, 0, 0 if none."""
        start = 0
        for index, word in enumerate(self.words):
            if start <= self.place < start + len(word):
                # the spaces around it are not marked
                first = start + len(word) - len(word.lstrip())
                return index, first, start + len(word.rstrip())
            start += len(word)
        return 0, 0, 0


def start_look(visit: Visit, number: int, place: int) -> Look:
    """Watch an answer again, for the word at one of its characters.

    Args:
        visit: of the visitor who clicked.
        number: of the turn.
        place: of the character.
    """
    turns, pictures = visit.conversation.context(number)
    answer = visit.conversation.turns[number].answer
    worker = visit.service.worker

    def watch(vlm: VLM, pause: Callable[[], None]) -> Watched:
        from inference.attention import watch_answer

        features = worker.see(vlm, pictures)
        pixel_values = vlm.processor.preprocess([picture.image for picture in pictures])
        looks = watch_answer(vlm, turns, answer, features)
        return Watched(looks, pixel_values, vlm.processor.denormalize(pixel_values))

    entry = visit.find_entry(number)
    return Look(number, place, worker.run(visit.conversation, entry, watch, visit.is_here))


def start_occlusion(visit: Visit, look: Look) -> None:
    """Grey out patch after patch of each picture, for all words; others are answered meanwhile."""
    turns, _ = visit.conversation.context(look.number)
    answer = visit.conversation.turns[look.number].answer
    pixel_values = look.watching.result.pixel_values

    def occlude_all(vlm: VLM, pause: Callable[[], None]) -> list:
        from inference.attention import occlude

        def note(image: int, done: int, total: int) -> None:
            look.n_done, look.n_patches = image * total + done, len(pixels) * total
            pause()

        pixels = pixel_values.to(vlm.model.tok_embeddings.weight.device)
        return [
            occlude(vlm, turns, answer, pixels, image, None, progress=partial(note, image))
            for image in range(len(pixels))
        ]

    entry, worker = visit.find_entry(look.number), visit.service.worker
    look.occluding = worker.run(visit.conversation, entry, occlude_all, visit.is_here)


def show_look(visit: Visit, look: Look) -> None:
    """Draw the maps of the chosen word, or how far they are."""
    from inference.heat_map import draw_map, draw_picture

    say = visit.say
    with st.container(key="look", border=True):
        # the attention is still being watched, or cannot be
        task = look.watching
        if task.problem:
            show_problem(task.problem.say(visit.language), "look")
        if task.result is None:
            if not task.is_finished:
                show_text(say("reading"), "look-wait")
                visit.follow(lambda: not task.is_finished)
            return
        watched, (word, start, end) = task.result, look.find_word()

        # what it is about, and which part of the attention
        with st.container(horizontal=True, vertical_alignment="center"):
            answer = visit.conversation.turns[look.number].answer
            st.text(say("looked_at", word=answer[start:end]), width="stretch")
            st.button(
                say("close"), key="close-look", icon=":material/close:", type="tertiary",
                on_click=visit.forget_look,
            )  # fmt: skip
        layer, head = choose_part(visit, watched)

        # each picture and its maps, side by side
        falls = look.occluding.result if look.occluding else None
        for image, pixels in enumerate(watched.pixels):
            with st.container(horizontal=True, gap="small", key=f"maps-{image}"):
                attention = watched.looks.map(word, image, layer, head)
                title = say("picture", number=image + 1)
                show_map(title, say("seen"), draw_picture(pixels))
                show_map(say("attention"), say("attention_help"), draw_map(pixels, attention))
                if falls:
                    fall = draw_map(pixels, falls[image][word])
                    show_map(say("occlusion"), say("occlusion_help"), fall)
                elif image == 0:
                    offer_occlusion(visit, look)


def choose_part(visit: Visit, watched: Watched) -> tuple[int | None, int | None]:
    """(layer, head) of the attention; None is the mean of all."""

    def choose(name: str, n: int) -> int | None:
        names = [visit.say("average"), *(str(index + 1) for index in range(n))]
        chosen = st.selectbox(
            visit.say(name), range(n + 1), format_func=names.__getitem__, key=f"look-{name}"
        )
        return chosen - 1 if chosen else None

    with st.container(horizontal=True, width=320):
        return choose("layer", watched.looks.n_layers), choose("head", watched.looks.n_heads)


def show_map(title: str, meaning: str, picture: Image.Image) -> None:
    """A picture, with a map on it or without, and what it means."""
    with st.container(width=WIDTH, gap="small"):
        st.image(picture, width="stretch")
        st.caption(f"**{title}.** {meaning}")


def offer_occlusion(visit: Visit, look: Look) -> None:
    """A button that begins it, then a line that says how far it is."""
    task = look.occluding
    with st.container(width=WIDTH, gap="small"):
        place = st.empty()
        st.caption(f"**{visit.say('occlusion')}.** {visit.say('occlusion_help')}")

        # not begun, or it went wrong
        if task is None or task.is_finished:
            place.button(
                visit.say("occlude"), key="occlude", icon=":material/grid_on:", width="stretch",
                on_click=start_occlusion, args=(visit, look),
            )  # fmt: skip
            if task is not None and task.problem:
                show_problem(task.problem.say(visit.language), "occlusion")
            return

        def show_progress() -> bool:
            text = visit.say("occluding", done=look.n_done, total=look.n_patches)
            place.progress(look.n_done / look.n_patches, text if look.n_done else visit.say("next"))
            return not task.is_finished

        visit.follow(show_progress)
