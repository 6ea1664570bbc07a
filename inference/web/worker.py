"""The one thread that works with the models, for all visitors, one request after the other.

A page only looks: it may be interrupted, reloaded or closed at any time, and the answer grows in
its Turn all the same, until it is stopped or nobody wants it any more.
"""

import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch

from inference.chat import MAX_QUESTION, AnswerStream, encode_turns
from inference.load import VLM
from inference.web.conversation import (
    MAX_PICTURES,
    MAX_TURNS,
    Conversation,
    Picture,
    Task,
    Ticket,
    Turn,
)
from inference.web.models import ModelEntry, ModelShelf
from inference.web.words import Problem, describe_problem

# Seconds after which it is asked again whether somebody still wants an answer.
PATIENCE = 0.1
# Random seeds are shown, so they are short.
SHORT_SEED = 10**6


class StoppedError(Exception):
    """Leaves the work of a request that has been stopped."""


class Job(NamedTuple):
    """A request in the queue."""

    ticket: Ticket
    conversation: Conversation
    entry: ModelEntry
    work: Callable[[VLM], None]
    is_wanted: Callable[[], bool]


class Worker:
    """Answers questions, first come, first served; a visitor has one at a time.

    Args:
        shelf: opens the models.
    """

    def __init__(self, shelf: ModelShelf):
        self.shelf = shelf
        self._waiting: deque[Job] = deque()
        # More than one where a task lets a question go first: the last one is at work.
        self._running: list[Job] = []
        # Held while the queue or a conversation changes; notified when there is something to do.
        self._changed = threading.Condition(threading.RLock())
        self._is_closed = threading.Event()
        for run in (self._serve, self._watch):
            threading.Thread(target=run, name=run.__name__, daemon=True).start()

    # What the page calls.

    def ask(
        self,
        conversation: Conversation,
        entry: ModelEntry,
        question: str,
        pictures: list[Picture],
        sampling: dict[str, Any],
        is_wanted: Callable[[], bool],
        refused: list[tuple[str, Problem]] = (),
        instead_of: int | None = None,
    ) -> Turn:
        """Add a question to a conversation; returns its turn at once, the answer grows in it.

        Args:
            conversation: of this visitor.
            entry: the model to ask.
            question: as it was typed.
            pictures: that come with it.
            sampling: temperature, top_p, max_new_tokens and seed (None for a random one).
            is_wanted: whether the visitor is still there; asked by other threads, many times.
            refused: name of a file that came too, and why it is none of the pictures.
            instead_of: number of a turn that goes away, with all behind it.

        Problem for a question that cannot be part of the conversation, which stays as it was. What
        goes wrong later is the turn's.
        """
        settings = dict(sampling)
        if settings.get("seed") is None:
            settings["seed"] = secrets.randbelow(SHORT_SEED)
        turn = Turn(question, pictures, refused, entry.name, settings)
        with self._changed:
            # into the conversation
            number = len(conversation.turns) if instead_of is None else instead_of
            check_question(conversation.turns[:number], turn)
            conversation.cut(number)
            conversation.turns.append(turn)
            if not conversation.pictures:
                turn.change(state="failed", problem=Problem("no_picture"))
                return turn

            # into the queue
            context = conversation.context(number)
            job = Job(
                turn, conversation, entry, lambda vlm: self._answer(vlm, turn, *context), is_wanted
            )
            return self._submit(job)

    def regenerate(
        self,
        conversation: Conversation,
        entry: ModelEntry,
        number: int,
        sampling: dict[str, Any],
        is_wanted: Callable[[], bool],
    ) -> Turn:
        """Ask the question of turn `number` again; all behind it goes away. See `ask`."""
        question = conversation.find(number).question
        return self.edit(conversation, entry, number, question, sampling, is_wanted)

    def edit(
        self,
        conversation: Conversation,
        entry: ModelEntry,
        number: int,
        question: str,
        sampling: dict[str, Any],
        is_wanted: Callable[[], bool],
    ) -> Turn:
        """Ask another question about the pictures of turn `number`, instead of it. See `ask`."""
        old = conversation.find(number)
        return self.ask(
            conversation,
            entry,
            question,
            old.pictures,
            sampling,
            is_wanted,
            refused=old.refused,
            instead_of=number,
        )

    def run(
        self,
        conversation: Conversation,
        entry: ModelEntry,
        work: Callable[[VLM, Callable[[], None]], Any],
        is_wanted: Callable[[], bool],
    ) -> Task:
        """Do other work with a model, in the same queue; a conversation has one task at a time.

        Args:
            conversation: of this visitor; a task of it that is not done yet is stopped.
            entry: the model.
            work: gets the model and a function to call now and then: it lets a waiting question go
                first, and does not return if the task is stopped. What `work` returns is the
                task's result.
            is_wanted: see `ask`.
        """
        task = Task()

        def work_and_keep(vlm: VLM) -> None:
            with interruptible(vlm.model, self._check):
                result = work(vlm, self._pause)
            task.change(result=result, state="done")

        with self._changed:
            for job in [*self._running, *self._waiting]:
                if job.conversation is conversation and isinstance(job.ticket, Task):
                    job.ticket.stop()
            return self._submit(Job(task, conversation, entry, work_and_keep, is_wanted))

    def see(self, vlm: VLM, pictures: list[Picture]) -> torch.Tensor:
        """float[k, patches, vision_dim] of pictures; a model's vision encoder sees each once.

        Only for the worker's own thread: for `_answer`, and for the work of a task.
        """
        device = vlm.model.tok_embeddings.weight.device
        for picture in pictures:
            if vlm not in picture.features:
                pixel_values = vlm.processor.preprocess([picture.image]).to(device)
                picture.features[vlm] = vlm.model.encode_images(pixel_values)
        return torch.cat([picture.features[vlm] for picture in pictures])

    def close(self) -> None:
        """Stop all requests, and the threads."""
        with self._changed:
            self._is_closed.set()
            for job in [*self._running, *self._waiting]:
                job.ticket.stop()
            self._changed.notify_all()

    # The queue.

    def _submit(self, job: Job) -> Ticket:
        job.ticket.find_place = lambda: self._count_before(job.ticket)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
        return job.ticket

    def _count_before(self, ticket: Ticket) -> int:
        """How many requests are served before this one; 0 when it is served itself."""
        with self._changed:
            if any(job.ticket is ticket for job in self._running):
                return 0
            before = list(self._running)
            for job in self._waiting:
                if job.ticket is ticket:
                    break
                before.append(job)
        return sum(not job.ticket.is_finished for job in before)

    def _watch(self) -> None:
        """Look after the visitors, whatever the model is doing meanwhile."""
        while not self._is_closed.wait(PATIENCE):
            self._drop_unwanted()

    def _drop_unwanted(self) -> None:
        """Stop what nobody waits for any more; the queue moves up."""
        with self._changed:
            jobs = [*self._running, *self._waiting]
        for job in jobs:
            if not is_wanted(job):
                job.ticket.stop()
        with self._changed:
            for job in list(self._waiting):
                if job.ticket.is_finished:
                    self._waiting.remove(job)
                    job.ticket.find_place = None

    def _serve(self) -> None:
        """Do one job after the other."""
        while True:
            with self._changed:
                while not self._waiting and not self._is_closed.is_set():
                    self._changed.wait()
                if self._is_closed.is_set():
                    return
                job = self._take(self._waiting[0])
            self._do(job)
            # An idle worker holds on to no conversation.
            del job

    def _take(self, job: Job) -> Job:
        self._waiting.remove(job)
        self._running.append(job)
        return job

    def _do(self, job: Job) -> None:
        """Do a job; whatever goes wrong is the end of this one only."""
        ticket = job.ticket
        try:
            if not is_wanted(job):
                raise StoppedError
            if not self.shelf.is_open(job.entry):
                ticket.change(state="loading")
            with self.shelf.using(job.entry) as vlm:
                ticket.change(state="answering")
                job.work(vlm)
        except StoppedError:
            ticket.stop()
        # The tokenizers library panics, which is no Exception.
        except BaseException as error:
            problem = describe_problem(error)
            if problem.key == "unknown_problem":
                traceback.print_exc(file=sys.stderr)
            ticket.change(state="failed", problem=problem)
        finally:
            with self._changed:
                self._running.remove(job)
            ticket.find_place = None

    # At work.

    def _answer(self, vlm: VLM, turn: Turn, turns: list[dict], pictures: list[Picture]) -> None:
        """Answer a question: the vision encoder sees new pictures, then token by token.

        Args:
            vlm: the model.
            turn: grows.
            turns, pictures: see `Conversation.context`.
        """
        # what costs little is checked before the vision encoder
        started, longest = time.perf_counter(), vlm.model.config.max_seq_len
        input_ids = encode_turns(vlm.processor, turns, len(pictures), longest)

        # The pictures and the whole prompt may take seconds, a token more never does.
        with interruptible(vlm.model, self._check):
            features = self.see(vlm, pictures)
            stream = AnswerStream(
                vlm.model, vlm.processor, input_ids, features, started=started, **turn.settings
            )
            pieces = iter(stream)
            first = next(pieces)

        # token by token
        for _ in chain([first], pieces):
            turn.change(
                answer=stream.text,
                n_tokens=stream.n_tokens,
                tokens_per_second=stream.tokens_per_second,
                seconds_to_first_token=stream.seconds_to_first_token,
            )
            self._check()
        turn.change(state="done")

    def _check(self) -> None:
        """StoppedError if the job at work has been stopped."""
        if self._running[-1].ticket.is_finished:
            raise StoppedError

    def _pause(self) -> None:
        """Let the question that waits longest go first; StoppedError if the task was stopped."""
        self._check()
        with self._changed:
            questions = (job for job in self._waiting if isinstance(job.ticket, Turn))
            job = next(questions, None)
            if job is None:
                return
            self._take(job)
        self._do(job)
        self._check()


def check_question(before: list[Turn], turn: Turn) -> None:
    """Problem for a question that cannot follow these turns."""
    n_pictures = sum(len(other.pictures) for other in [*before, turn])
    if not turn.question.strip():
        raise Problem("blank")
    if len(turn.question) > MAX_QUESTION:
        raise Problem("question_too_long")
    if not all(other.is_finished for other in before):
        raise Problem("busy")
    if len(before) >= MAX_TURNS:
        raise Problem("too_many_turns", most=MAX_TURNS)
    if n_pictures > MAX_PICTURES:
        raise Problem("too_many_pictures", most=MAX_PICTURES)


def is_wanted(job: Job) -> bool:
    """Whether somebody waits for it; one of whom nothing can be learned has left."""
    if job.ticket.is_finished:
        return False
    try:
        return bool(job.is_wanted())
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return False


@contextmanager
def interruptible(model: torch.nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Call `check` before each module of `model` runs, in this thread: what it raises ends the run.

    A vision encoder may take seconds, and so may the prompt of a long conversation.
    """
    thread = threading.get_ident()

    def check_here(*_) -> None:
        if threading.get_ident() == thread:
            check()

    handles = [module.register_forward_pre_hook(check_here) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
