"""A web page to talk with the model about pictures: `python web_demo_vlm.py`, then http://localhost:8000."""

import argparse
import subprocess
import sys

import streamlit as st

from common.errors import UserError
from inference.chat import Chat
from inference.load import add_model_flags, load_vlm
from model.image import load_image

PORT = 8000
MAX_UPLOAD_MB = 20  # a picture
MAX_PICTURES = 8  # a conversation


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--port", type=int, default=PORT, help="port on this machine")
    add_model_flags(parser)
    return parser.parse_args()


def serve(args: argparse.Namespace) -> int:
    """Start Streamlit on this very file, reachable from this machine only."""
    options = {
        "server.address": "localhost",
        "server.port": args.port,
        "server.headless": "true",
        "server.maxUploadSize": MAX_UPLOAD_MB,
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    print(f"starting on http://localhost:{args.port} (Ctrl-C ends it)", flush=True)
    try:
        return subprocess.call(
            [sys.executable, "-m", "streamlit", "run", *flags, __file__, "--", *sys.argv[1:]]
        )
    except KeyboardInterrupt:
        return 0


@st.cache_resource(show_spinner="Loading the model …")
def load_once(arguments: tuple[str, ...]):
    """The model is shared by all visitors; conversations are not."""
    return load_vlm(parse_args())


def page(args: argparse.Namespace) -> None:
    st.set_page_config(page_title="MiniMind-V", page_icon="👁️")
    st.title("MiniMind-V")
    st.caption(
        "A small vision-language model. Add one or several pictures on the left, then ask about them."
    )
    try:
        model, processor = load_once(tuple(sys.argv[1:]))
    except UserError as error:
        st.error(str(error))
        return
    state = st.session_state
    if "chat" not in state:
        start_conversation(model, processor)

    with st.sidebar:
        uploads = st.file_uploader(
            f"Pictures (up to {MAX_PICTURES})",
            type=["jpg", "jpeg", "png", "webp", "bmp", "gif", "tiff"],
            accept_multiple_files=True,
            key=f"uploads-{state.conversation}",
        )
        sampling = {
            "temperature": st.slider(
                "Temperature", 0.0, 1.5, 0.65, 0.05, help="0 always takes the likeliest word."
            ),
            "top_p": st.slider("Top-p", 0.05, 1.0, 0.85, 0.05),
            "max_new_tokens": st.slider("Longest answer (tokens)", 16, 1024, 256, 16),
        }
        if st.button("New conversation", width="stretch"):
            start_conversation(model, processor)
            st.rerun()

    pictures = read_uploads(uploads)
    if not state.seen <= {file_id for file_id, _, _ in pictures}:
        state.chat, state.seen = Chat(model, processor), set()
        st.info("A picture of the conversation was taken away, so it starts anew.")
    if pictures:
        st.image(
            [picture for _, _, picture in pictures],
            width=160,
            caption=[name for _, name, _ in pictures],
        )
    for turn in state.chat.turns:
        st.chat_message(turn["role"]).write(
            turn["content"].replace("<image>\n", "").replace("<image>", "")
        )
    prompt = st.chat_input("Ask about the pictures")
    if prompt:
        st.chat_message("user").write(prompt)
        new_pictures = [picture for file_id, _, picture in pictures if file_id not in state.seen]
        with st.chat_message("assistant"):
            if answer(state.chat, prompt, new_pictures, sampling):
                state.seen = {file_id for file_id, _, _ in pictures}


def start_conversation(model, processor) -> None:
    st.session_state.chat = Chat(model, processor)
    st.session_state.seen = set()  # ids of the uploads that the conversation is about
    st.session_state.conversation = st.session_state.get("conversation", 0) + 1


def read_uploads(uploads: list) -> list[tuple]:
    """(id, name, picture) of the uploads that are pictures; a line on the page for each that is not."""
    pictures = []
    for upload in uploads[:MAX_PICTURES]:
        try:
            pictures.append((upload.file_id, upload.name, load_image(upload)))
        except UserError as error:
            st.error(f"{upload.name}: {error.args[0]}")
    if len(uploads) > MAX_PICTURES:
        st.warning(f"{len(uploads)} pictures: only the first {MAX_PICTURES} are used.")
    return pictures


def answer(chat: Chat, prompt: str, pictures: list, sampling: dict) -> bool:
    """Stream the answer to the page; whether there is one."""
    try:
        st.write_stream(chat.ask(prompt, pictures, **sampling))
        st.caption(f"{chat.tokens_per_second:.0f} tokens/s")
        return True
    except UserError as error:
        st.error(str(error))
        return False


if __name__ == "__main__":
    if st.runtime.exists():
        page(parse_args())
    else:
        sys.exit(serve(parse_args()))
