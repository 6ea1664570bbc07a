"""Conversations by their id, so that a reload finds its own again."""

import secrets
from collections import OrderedDict
from threading import Lock

from inference.web.conversation import Conversation

# Beyond either the conversation that was looked at longest ago is forgotten.
MOST_CONVERSATIONS = 500
MOST_BYTES = 2**30  # of their pictures


class ConversationStore:
    """Conversations of all visitors, in memory only.

    Args:
        most: how many are kept.
        most_bytes: of all of them together.
    """

    def __init__(self, most: int = MOST_CONVERSATIONS, most_bytes: int = MOST_BYTES):
        self.most, self.most_bytes = most, most_bytes
        self._by_id: OrderedDict[str, Conversation] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, id: str | None) -> Conversation | None:
        """The conversation of that id, if it is still here."""
        with self._lock:
            if id in self._by_id:
                self._by_id.move_to_end(id)
            return self._by_id.get(id)

    def keep(self, conversation: Conversation, id: str | None = None) -> str:
        """Keep a conversation that is new or has grown; returns its id, which nobody can guess."""
        id = id or secrets.token_urlsafe(12)
        with self._lock:
            self._by_id[id] = conversation
            self._by_id.move_to_end(id)
            self._forget(keep=id)
        return id

    def _forget(self, keep: str) -> None:
        """Drop the oldest ones while there is too much; one that is being answered stays."""
        total = sum(conversation.n_bytes for conversation in self._by_id.values())
        for id, conversation in list(self._by_id.items()):
            if len(self._by_id) <= self.most and total <= self.most_bytes:
                return
            if id != keep and not conversation.is_busy:
                total -= conversation.n_bytes
                del self._by_id[id]
