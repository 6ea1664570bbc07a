"""How well a model answers: loss and exact-answer accuracy on rows whose answers are known."""

import io
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.errors import BadSampleError
from common.files import hash_bytes, read_image_bytes
from inference.load import VLM
from model.labels import IGNORE_INDEX, count_labels
from model.processing import check_conversation

# Tokens that an answer may have beyond the longest right one: enough to see that it is wrong.
SPARE_TOKENS = 4
# Memory for the features of pictures, which are looked at several times.
FEATURE_BYTES = 2 * 10**9


@dataclass
class Question:
    """An assistant turn that the model has to produce."""

    turns: list[dict]  # all turns before it
    images: list  # pictures of the row
    answer: str  # the right answer
    type: str  # accuracy is also given by type
    # The model's answers, by the images it was shown: "right", "wrong" or "none".
    given: dict[str, str] = field(default_factory=dict)

    def is_right(self, images: str) -> bool:
        """Whether the answer given with these images is exactly right, see `simplify_answer`."""
        return simplify_answer(self.given[images]) == simplify_answer(self.answer)


class PictureEncoder:
    """Features of pictures; a picture is encoded once, however often it is asked about.

    Args:
        vlm: its processor opens pictures, its vision encoder looks at them.
    """

    def __init__(self, vlm: VLM):
        self.vlm, config = vlm, vlm.model.config
        self.most = FEATURE_BYTES // (4 * config.n_image_tokens * config.vision_dim)
        self.pixels: dict[bytes, torch.Tensor] = {}  # opened, not yet encoded
        self.encoded: dict[bytes, torch.Tensor] = {}  # the newest come last

    def open(self, images: list) -> list[bytes]:
        """Keys of the pictures, for `features`. BadSampleError for one that cannot be read."""
        keys = []
        for image in images:
            content = read_image_bytes(image)
            key = hash_bytes(content)
            if key not in self.encoded and key not in self.pixels:
                self.pixels[key] = self.vlm.processor.preprocess([io.BytesIO(content)])
            keys.append(key)
        return keys

    def features(self, keys: list[bytes]) -> torch.Tensor | None:
        """float[k, patches, vision_dim] of pictures that were just opened; None without any."""
        # encode the new ones together
        if self.pixels:
            device = self.vlm.model.tok_embeddings.weight.device
            pixel_values = torch.cat(list(self.pixels.values())).to(device)
            self.encoded |= zip(self.pixels, self.vlm.model.encode_images(pixel_values))
            self.pixels = {}
        chosen = torch.stack([self.encoded[key] for key in keys]) if keys else None

        # forget the oldest
        for key in list(self.encoded)[: max(0, len(self.encoded) - self.most)]:
            del self.encoded[key]
        return chosen


def collect_questions(dataset) -> tuple[list[Question], Counter[str]]:
    """Make a question of each assistant turn, which is asked after the right turns before it.

    Args:
        dataset: `dataset.read(i)` gives (row, pictures), as VLMDataset's does.

    Returns (questions, how many rows cannot be read, by reason).
    """
    questions, unreadable = [], Counter()
    for index in range(len(dataset)):
        try:
            row, images = dataset.read(index)
        except BadSampleError as error:
            unreadable[error.args[0]] += 1
            continue
        conversation = check_conversation(row["conversations"])
        turns = [{"role": role, "content": content} for role, content in conversation]
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                type_ = row.get("type", "all")
                questions.append(Question(turns[:number], images, turn["content"], type_))
    return questions, unreadable


def choose_images(questions: list[Question], images: str, seed: int = 0) -> list[list]:
    """The pictures that come with each question.

    Args:
        questions: see `collect_questions`.
        images: "right", those of its row; "wrong", as many of another; "none".
        seed: which other one that is.
    """
    right = [question.images for question in questions]
    if images == "none":
        return [[] for _ in questions]
    return shuffle_images(right, seed) if images == "wrong" else right


def shuffle_images(images: list[list], seed: int) -> list[list]:
    """Give each row the pictures of another row that has as many, and other ones.

    A row keeps its own only if no other has as many.
    """
    by_count = defaultdict(list)
    for index, row_images in enumerate(images):
        by_count[len(row_images)].append(index)
    shuffled = list(images)
    for indices in by_count.values():
        random.Random(seed).shuffle(indices)
        # Rows that show the same pictures come one after the other (the order of the groups is
        # still random), and each gets those of the row that is half the way around.
        groups = defaultdict(list)
        for index in indices:
            groups[tuple(map(str, images[index]))].append(index)
        in_groups = [index for group in groups.values() for index in group]
        half = len(in_groups) // 2
        for index, other in zip(in_groups, in_groups[half:] + in_groups[:half]):
            shuffled[index] = images[other]
    return shuffled


def answer_questions(
    vlm: VLM, questions: list[Question], images: str, batch_size: int, pictures: PictureEncoder
) -> Counter[str]:
    """Fill in `given[images]` of each question, with the likeliest tokens.

    Args:
        vlm: the model that is asked.
        questions: see `collect_questions`.
        images: see `choose_images`.
        batch_size: questions answered together; they are of similar length, padded on the left.
        pictures: looks at them.

    Returns how many were not asked because a picture cannot be read, by reason.
    """
    # prompts; similar lengths in a batch leave little padding
    model, tokenizer = vlm.model, vlm.processor.tokenizer
    device = model.tok_embeddings.weight.device
    shown = choose_images(questions, images)
    prompts = [
        vlm.processor.encode_prompt(question.turns, len(its_images))[0]
        for question, its_images in zip(questions, shown)
    ]
    lengths = [len(tokenizer(question.answer)["input_ids"]) for question in questions]
    max_new_tokens = max(lengths, default=0) + SPARE_TOKENS
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]))

    unreadable: Counter[str] = Counter()
    for chosen in split(order, batch_size, f"answer, {images} image", "question"):
        # a batch of those whose pictures can be read
        batch, keys = [], []
        for index in chosen:
            try:
                keys += pictures.open(shown[index])
                batch.append(index)
            except BadSampleError as error:
                unreadable[error.args[0]] += 1
        if not batch:
            continue

        # its answers
        input_ids, attention_mask = pad_left([prompts[index] for index in batch])
        tokens = model.generate(
            input_ids.to(device),
            image_features=pictures.features(keys),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            temperature=0,
        )
        new_tokens = tokens[:, input_ids.shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for index, text in zip(batch, texts):
            questions[index].given[images] = text
    return unreadable


def split(indices: Iterable[int], batch_size: int, title: str, unit: str) -> Iterator[list[int]]:
    """Batches of `indices`, with a progress bar over the single ones."""
    indices = list(indices)
    with tqdm(total=len(indices), desc=title, unit=unit) as progress:
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
            progress.update(len(indices[start : start + batch_size]))


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64[B, T] input_ids, int64[B, T] attention_mask) of rows of unequal length."""
    # Padding goes to the left: the new tokens of all rows then have the same place.
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = row
        attention_mask[index, length - len(row) :] = 1
    return input_ids, attention_mask


def measure_accuracy(questions: list[Question], images: str = "right") -> dict[str, float]:
    """Share of answers that are exactly right, "overall" and by type of question.

    Args:
        questions: answered with these images.
        images: "right", "wrong" or "none".
    """
    by_type = defaultdict(list)
    for question in questions:
        by_type[question.type].append(question.is_right(images))
    # Each question counts once, whatever its type.
    overall = [is_right for group in by_type.values() for is_right in group]
    groups = {"overall": overall}
    # Rows without types are all of type "all".
    if set(by_type) != {"all"}:
        groups |= by_type
    return {name: sum(group) / len(group) for name, group in groups.items()}


def simplify_answer(answer: str) -> str:
    """What "exactly right" looks at: no case, no outer space, no full stop at the end."""
    text = unicodedata.normalize("NFKC", answer).casefold().strip()
    return text.rstrip(".。!！ ")


@torch.no_grad()
def measure_loss(vlm: VLM, dataset, batch_size: int, pictures: PictureEncoder) -> float:
    """Mean loss over the label tokens of all samples that can be read.

    Args:
        vlm: the model that is measured.
        dataset: a VLMDataset or MixedDataset.
        batch_size: samples that go through the model together, padded on the right.
        pictures: looks at them.
    """
    device = vlm.model.tok_embeddings.weight.device
    loss_sum, n_labels = 0.0, 0
    order = sorted(range(len(dataset)), key=lambda index: dataset.lengths[index])
    for chosen in split(order, batch_size, "loss", "row"):
        # a batch of those that can be read: `answer_questions` has counted and named the others
        samples, keys = [], []
        for index in chosen:
            try:
                sample, images = dataset.read_text(index)
                keys += pictures.open(images)
                samples.append(sample)
            except BadSampleError:
                continue
        if not samples:
            continue

        # its loss: a mean over its labels, of which a batch may have few or many
        input_ids, labels = (
            pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=pad)
            for name, pad in (("input_ids", 0), ("labels", IGNORE_INDEX))
        )  # each (B, T)
        output = vlm.model(
            input_ids.to(device),
            labels=labels.to(device),
            image_features=pictures.features(keys),
            return_logits=False,
        )
        count = count_labels(labels)
        loss_sum += float(output.loss) * count
        n_labels += count
    return loss_sum / max(n_labels, 1)
