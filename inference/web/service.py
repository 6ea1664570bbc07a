"""What lasts as long as the page runs, and serves all visitors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import streamlit as st
from streamlit.runtime import exists, get_instance
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.uploaded_file_manager import UploadedFileManager, UploadedFileRec

from common.errors import UserError
from inference.config import WebConfig
from inference.web.gallery import Example, Galleries
from inference.web.models import ModelEntry, ModelShelf
from inference.web.store import ConversationStore
from inference.web.worker import Worker

# Of all pictures that were added to questions and not sent yet.
MOST_UPLOADED = 2**30
# Files of one visitor that wait to be sent.
MOST_WAITING = 24


@dataclass(frozen=True)
class Service:
    """One model in memory, one queue; a conversation for each visitor.

    Args:
        config: what the command line says.
        shelf: the models.
        worker: answers.
        store: the conversations.
        galleries: examples by model.
    """

    config: WebConfig
    shelf: ModelShelf
    worker: Worker
    store: ConversationStore
    galleries: Galleries


@st.cache_resource(show_spinner=False)
def _open_service(key: str, _config: WebConfig, _find_examples: Callable) -> Service:
    shelf = ModelShelf(_config)
    worker = Worker(shelf)
    bound_uploads(get_script_run_ctx().uploaded_file_mgr)
    galleries = Galleries(worker, lambda entry: _find_examples(_config, entry))
    return Service(_config, shelf, worker, ConversationStore(), galleries)


def open_service(
    config: WebConfig, find_examples: Callable[[WebConfig, ModelEntry], Iterable[Example]]
) -> Service:
    """The service of these options, the same for all visitors."""
    return _open_service(repr(config), config, find_examples)


def is_here(session_id: str) -> bool:
    """Whether the visitor still has the page open."""
    # Without a server, in a test, there is nobody to leave.
    return not exists() or get_instance().is_active_session(session_id)


def watch_visitor() -> Callable[[], bool]:
    """A function that says, from any thread, whether this visitor still has the page open."""
    session_id = get_script_run_ctx().session_id
    return lambda: is_here(session_id)


def bound_uploads(manager: UploadedFileManager) -> None:
    """Refuse uploads beyond what memory is meant for; a single file is bound by Streamlit.

    Args:
        manager: what Streamlit keeps the files with that were added to questions and not sent yet.
    """
    if not isinstance(manager, MemoryUploadedFileManager):
        return
    add_file = manager.add_file

    def add_if_room(session_id: str, file: UploadedFileRec) -> None:
        files = [list(own.values()) for own in list(manager.file_storage.values())]
        n_bytes = sum(len(it.data) for own in files for it in own) + len(file.data)
        n_own = len(manager.file_storage.get(session_id, ()))
        if n_own >= MOST_WAITING or n_bytes > MOST_UPLOADED:
            raise UserError(f"no room for another upload: {n_own} of this visitor wait")
        add_file(session_id, file)

    manager.add_file = add_if_room
