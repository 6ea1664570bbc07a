"""Questions whose answers are known: where they come from, their pictures, what a right answer is.

Text is kept, and of pictures only their names: the set may have a million rows.
"""

import random
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import BadSampleError, UserError, list_reasons
from common.files import hash_bytes
from common.text import IMAGE_TAG, simplify_answer
from inference.metrics import name_language
from model.processing import check_conversation

# Characters of the name of a type: it is a word or two in a printed line.
MAX_TYPE = 60
# The type of questions without one; and the name of the line for all questions together.
NO_TYPE, OVERALL = "all", "overall"
# What is asked about a picture that comes with captions only, as the published data asks it. Other
# languages are asked in English.
REQUESTS = {
    "en": "Describe the image concisely.",
    "zh": "简要描述这张图片。",
    "ja": "この画像を簡潔に説明してください。",
}


@dataclass
class Question:
    """An assistant turn that the model has to produce.

    Args:
        row: of the dataset.
        turns: all turns before it.
        images: names of the row's pictures up to here; equal names are equal pictures.
        answer: the right answer, or the first one of several.
        references: all of them, or all captions; () where there is only one answer.
        language: of the captions, as the row says it. Captions of one language are compared.
        type: accuracy is also given by type; that of captions is their language.
        given: the model's answers, by the images it was shown: "right", "wrong" or "none".
        shown: the row whose pictures came with it, by the same names; None for no pictures.
        loss: (nats, label tokens) of all right answers, likewise.
    """

    row: int
    turns: list[dict]
    images: tuple[str, ...]
    answer: str
    type: str = NO_TYPE
    given: dict[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ()
    language: str = ""
    shown: dict[str, int | None] = field(default_factory=dict)
    loss: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def right_answers(self) -> tuple[str, ...]:
        """All answers that are right."""
        return self.references or (self.answer,)

    def is_right(self, images: str) -> bool:
        """Whether the answer given with these images is exactly a right one, by its words."""
        given = simplify_answer(self.given[images])
        return any(given == simplify_answer(answer) for answer in self.right_answers)


class Reasons:
    """Why rows or questions could not be used as they are: how many by reason, with an example.

    Args:
        dataset: a VLMDataset or MixedDataset, which names the example's place.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.reasons: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, row: int, error: BadSampleError) -> None:
        """Count a row, or a question of it."""
        reason = error.args[0]
        self.reasons[reason] += 1
        if reason not in self.examples:
            self.examples[reason] = f"{name_row(self.dataset, row)}: {error!s:.200}"

    def __str__(self) -> str:
        """The reasons by their counts, and a line for each example."""
        return "\n  ".join([list_reasons(self.reasons), *self.examples.values()])


def name_row(dataset, index: int) -> str:
    """ "line 7 of rows.jsonl"."""
    if hasattr(dataset, "parts"):
        part = dataset.parts[dataset.part[index]]
        return name_row(part, dataset.row[index])
    (place,) = dataset.rows.name_places([int(dataset.keys[index])])
    return f"{place} of {dataset.data_path.name}"


def collect_questions(
    dataset, left_out: Reasons, untyped: Reasons, requests: dict[str, str]
) -> Iterator[Question]:
    """A question for each assistant turn, which is asked after the right turns before it.

    Captions are asked for once in each of their languages.

    Args:
        dataset: `dataset.read(i)` gives (row, pictures), as VLMDataset's does.
        left_out: counts the rows that cannot be read.
        untyped: counts the rows whose type cannot be used.
        requests: what asks for a caption, by language; "en" stands for all that are not there.
    """
    for index in range(len(dataset)):
        # a row
        try:
            row, images = dataset.read(index)
            conversation = check_conversation(row.conversations)
            check_answers(row)
        except BadSampleError as error:
            left_out.add(index, error)
            continue
        try:
            type_ = read_type(row.other.get("type"))
        except BadSampleError as error:
            untyped.add(index, error)
            type_ = NO_TYPE
        names = name_images(row.images, images)

        # its captions
        for language, captions in (row.captions or {}).items():
            request = requests.get(name_language(language, captions), requests["en"])
            turns = [{"role": "user", "content": f"{IMAGE_TAG}\n" * len(names) + request}]
            yield Question(
                index,
                turns,
                names,
                captions[0],
                language or type_,
                references=tuple(captions),
                language=language,
            )
        if row.captions:
            continue

        # its questions; a picture comes with the turn that has its tag, and with those after it
        turns = [{"role": role, "content": content} for role, content in conversation]
        n_tags = 0
        for number, turn in enumerate(turns):
            if turn["role"] == "user":
                n_tags += turn["content"].count(IMAGE_TAG)
            if turn["role"] == "assistant":
                is_last = number == len(turns) - 1
                references = tuple(row.answers or ()) if is_last else ()
                yield Question(
                    index,
                    turns[:number],
                    names[:n_tags],
                    turn["content"],
                    type_,
                    references=references,
                )


def check_answers(row) -> None:
    """BadSampleError where one of a row's captions, or right answers, is no text for a model."""
    groups = [*(row.captions or {}).values(), row.answers or []]
    for answer in (answer for group in groups for answer in group):
        check_conversation([{"content": "?"}, {"content": answer}])


def choose_requests(prompt: str | None, question: str | None) -> dict[str, str]:
    """What asks for a caption, by language.

    Args:
        prompt: the user's, for every language; None or "" if not given.
        question: that the model was trained on; it comes before that of REQUESTS in its language.

    UserError for a prompt without a word.
    """
    if prompt:
        request = prompt.replace(IMAGE_TAG, "").strip()
        if not request:
            raise UserError(f"--prompt is {prompt!r}: type a question, or leave it out")
        return dict.fromkeys(REQUESTS, request)
    return REQUESTS | ({name_language("", [question]): question} if question else {})


def name_images(names: list[str | bytes], images: list) -> tuple[str, ...]:
    """A name for each picture of a row: its path, its name in an archive, or a hash of its file.

    Args:
        names: as the row has them, or the encoded files themselves.
        images: where they were found: paths, or open files.
    """
    found = []
    for name, image in zip(names, images):
        if isinstance(image, Path):
            found.append(str(image))
        else:
            found.append(hash_bytes(name).hex() if isinstance(name, bytes) else name)
    return tuple(found)


def read_type(value: object) -> str:
    """The type that a row gives, NO_TYPE for none.

    BadSampleError for one that cannot be the name of a line of the report.
    """
    if value is None:
        return NO_TYPE
    is_name = isinstance(value, str) and value.strip() and len(value) <= MAX_TYPE
    if not is_name or not value.isprintable() or value == OVERALL:
        raise BadSampleError("type is no short text", reprlib.repr(value))
    return value


def choose_images(questions: list[Question], images: str, seed: int = 0) -> list[int | None]:
    """The row whose pictures come with each question; None for no pictures.

    Args:
        questions: see `collect_questions`.
        images: "right", those of its own row; "wrong", as many of another; "none".
        seed: which other one that is.
    """
    if images == "none":
        return [None for _ in questions]
    chosen = range(len(questions))
    if images == "wrong":
        chosen = shuffle_images([question.images for question in questions], seed)
    return [questions[index].row for index in chosen]


def name_choice(images: str) -> str:
    """ "right image", "wrong image" or "no image"."""
    return f"{'no' if images == 'none' else images} image"


def count_unmoved(questions: list[Question]) -> int:
    """How many questions got their own pictures as the wrong ones, since there are no others."""
    # the last question of a row comes with all its pictures
    of_row = {question.row: question.images for question in questions}
    return sum(
        of_row.get(question.shown["wrong"], ())[: len(question.images)] == question.images != ()
        for question in questions
    )


def shuffle_images(images: list[tuple[str, ...]], seed: int) -> list[int]:
    """For each row the index of another that has as many pictures, and other ones.

    A row keeps its own only if no other has as many.
    """
    by_count = defaultdict(list)
    for index, row_images in enumerate(images):
        by_count[len(row_images)].append(index)
    shuffled = list(range(len(images)))
    for indices in by_count.values():
        random.Random(seed).shuffle(indices)
        # Rows that show the same pictures come one after the other (the order of the groups is
        # still random), and each gets those of the row that is half the way around.
        groups = defaultdict(list)
        for index in indices:
            groups[images[index]].append(index)
        in_groups = [index for group in groups.values() for index in group]
        half = len(in_groups) // 2
        for index, other in zip(in_groups, in_groups[half:] + in_groups[:half]):
            shuffled[index] = other
    return shuffled


def measure_accuracy(questions: list[Question], images: str = "right") -> dict[str, float]:
    """Share of answers that are exactly right, overall and by type of question.

    Args:
        questions: answered with these images.
        images: "right", "wrong" or "none".
    """
    by_type = defaultdict(list)
    for question in questions:
        by_type[question.type].append(question.is_right(images))
    # Each question counts once, whatever its type.
    groups = {OVERALL: [is_right for group in by_type.values() for is_right in group]}
    if set(by_type) != {NO_TYPE}:
        groups |= by_type
    return {name: sum(group) / len(group) for name, group in groups.items()}
