"""The web page that web_demo_vlm.py shows: a dialogue about uploaded pictures.

Streamlit runs `show_page` again for each click of a visitor; what has to last is in
`st.session_state`.

What people and the model write is shown by `st.text` and nothing else: as Markdown, a question
could make the browser of whoever reads it fetch an address, or carry a link.
"""

import streamlit as st
from PIL import Image

from common.errors import BadSampleError, UserError
from common.files import IMAGE_SUFFIXES
from common.text import IMAGE_TAG
from inference.chat import MAX_QUESTION, PICTURE_SIDE, Chat
from inference.config import WebConfig
from inference.load import VLM, load_vlm
from inference.paths import find_model
from model.image import load_image

MAX_PICTURES = 8  # of a conversation
WIDTH = 160  # of a picture on the page

# All visitors share the model; conversations are not shared.
load_once = st.cache_resource(load_vlm, show_spinner="Loading the model …")


def show_page(config: WebConfig) -> None:
    """Draw the page, and answer the question if there is a new one."""
    st.set_page_config(page_title="MiniMind-V", page_icon="👁️")
    st.title("MiniMind-V")
    st.caption(
        "A small vision-language model. Add one or several pictures on the left, then ask about "
        "them."
    )
    try:
        vlm = load_once(**find_model(config))
    except UserError as error:
        show_problem(str(error))
        return
    state = st.session_state
    if "chat" not in state:
        start_conversation(vlm)

    # on the left: pictures and options
    with st.sidebar:
        uploads = st.file_uploader(
            f"Pictures (up to {MAX_PICTURES})",
            type=IMAGE_SUFFIXES,
            accept_multiple_files=True,
            key=f"uploads-{state.conversation}",
        )
        sampling = choose_sampling(config)
        if st.button("New conversation", width="stretch"):
            start_conversation(vlm)
            st.rerun()

    # the pictures
    pictures = read_uploads(uploads)
    if not state.seen <= set(pictures):
        state.chat, state.seen = vlm.start_chat(), set()
        st.info("A picture of the conversation was taken away, so it starts anew.")
    names = {upload.file_id: upload.name for upload in uploads}
    with st.container(horizontal=True):
        for file_id, picture in pictures.items():
            with st.container(width=WIDTH):
                st.image(picture, width=WIDTH)
                st.text(names[file_id])

    # the conversation so far
    for turn in state.chat.turns:
        text = turn["content"].replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, "")
        st.chat_message(turn["role"]).text(text)

    # the new question
    prompt = st.chat_input("Ask about the pictures", max_chars=MAX_QUESTION)
    if prompt:
        st.chat_message("user").text(prompt)
        new_pictures = [pictures[file_id] for file_id in pictures if file_id not in state.seen]
        with st.chat_message("assistant"):
            if show_answer(state.chat, prompt, new_pictures, sampling):
                state.seen = set(pictures)


def start_conversation(vlm: VLM) -> None:
    """Forget turns and pictures."""
    state = st.session_state
    state.chat = vlm.start_chat()
    state.seen = set()  # ids of uploads the model has seen
    state.opened = {}  # id of an upload -> picture or error
    state.conversation = state.get("conversation", 0) + 1


def choose_sampling(config: WebConfig) -> dict[str, float]:
    """Three sliders, which begin with what the flags say."""
    temperature, top_p, longest = config.temperature, config.top_p, config.max_new_tokens
    help = "0 always takes the likeliest word."
    return {
        "temperature": st.slider(
            "Temperature", 0.0, max(1.5, temperature), temperature, 0.05, help=help
        ),
        "top_p": st.slider("Top-p", min(0.05, top_p), 1.0, top_p, 0.05),
        "max_new_tokens": st.slider(
            "Longest answer (tokens)", min(16, longest), max(1024, longest), longest, 16
        ),
    }


def read_uploads(uploads: list) -> dict[str, Image.Image]:
    """id -> picture of each upload; a line on the page for one that is no picture.

    An upload is decoded once, to a small picture, and not again at every click.
    """
    # decode the new ones, forget those that were taken away
    used, before = uploads[:MAX_PICTURES], st.session_state.opened
    opened = st.session_state.opened = {}
    for upload in used:
        opened[upload.file_id] = before.get(upload.file_id) or open_upload(upload)

    # say what cannot be used
    for upload in used:
        problem = opened[upload.file_id]
        if isinstance(problem, BadSampleError):
            show_problem(f"{upload.name}: {problem}")
    if len(uploads) > MAX_PICTURES:
        show_problem(f"{len(uploads)} pictures: only the first {MAX_PICTURES} are used.")
    return {key: it for key, it in opened.items() if isinstance(it, Image.Image)}


def open_upload(upload) -> Image.Image | BadSampleError:
    """The picture of an upload, or why there is none."""
    try:
        return load_image(upload, PICTURE_SIDE)
    except BadSampleError as error:
        return error


def show_answer(chat: Chat, prompt: str, pictures: list, sampling: dict[str, float]) -> bool:
    """Stream the answer to the page; returns whether there is one.

    Args:
        chat: the conversation.
        prompt: the question.
        pictures: PIL images that are new to the conversation.
        sampling: options of `generate`.
    """
    place, answer = st.empty(), ""
    try:
        for piece in chat.ask(prompt, pictures, **sampling):
            answer += piece
            place.text(answer)
    except UserError as error:
        show_problem(str(error))
        return False
    st.caption(f"{chat.tokens_per_second:.0f} tokens/s")
    return True


def show_problem(text: str) -> None:
    """What is wrong; it may hold the name of a file."""
    st.text(f"⚠️ {text}")
