"""How well a model answers: its answers to questions of known answer, and its loss on all rows."""

import io
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.errors import BadSampleError
from common.files import hash_bytes, read_image_bytes
from inference.load import VLM
from inference.questions import LeftOut, Question, choose_images
from model.labels import IGNORE_INDEX, count_labels

# Tokens that an answer may have for each one of the right answer, and beyond them: enough to see
# that it is wrong, also where the same words are in capitals.
TIMES_TOKENS, SPARE_TOKENS = 2, 4
# Memory for the features of pictures, which are looked at several times.
FEATURE_BYTES = 2 * 10**9


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


class Size(NamedTuple):
    """Tokens of a question."""

    prompt: int
    answer: int  # at most


class Evaluation:
    """Asks a model what a dataset knows.

    Every question has limits of its own, so no row changes what another one gets: see
    `measure_question` and `make_batches`.

    Args:
        vlm: the model that is asked.
        dataset: a VLMDataset or MixedDataset.
        batch_size: questions, or rows, that go through the model together.
        sampling: options of `generate`; max_new_tokens bounds every answer. By default the
            likeliest tokens.

    Attributes:
        left_out: the rows and questions that could not be asked.
    """

    def __init__(self, vlm: VLM, dataset, batch_size: int, **sampling):
        self.vlm, self.dataset, self.batch_size = vlm, dataset, batch_size
        self.sampling = {"temperature": 0.0, "max_new_tokens": 512} | sampling
        self.pictures = PictureEncoder(vlm)
        self.left_out = LeftOut(dataset)

    def answer(self, questions: list[Question], images: str) -> Iterator[Question]:
        """Fill in `given[images]` of the questions; yields each one that has an answer.

        Args:
            questions: see `collect_questions`.
            images: see `choose_images`.
        """
        # limits of each question
        rows = choose_images(questions, images)
        sizes: dict[int, Size] = {}
        for index, question in enumerate(questions):
            try:
                sizes[index] = self.measure_question(question, rows[index] is not None)
            except BadSampleError as error:
                self.left_out.add(question.row, error)

        # The same answers again, also where tokens are drawn.
        torch.manual_seed(0)
        batches = make_batches(sizes, self.batch_size, self.vlm.model.config.max_seq_len)
        for batch in show_progress(batches, f"answer, {images} image", "question"):
            # those whose pictures can be read
            readable, keys = [], []
            for index in batch:
                try:
                    keys += self.open_pictures(rows[index])
                    readable.append(index)
                except BadSampleError as error:
                    self.left_out.add(rows[index], error)

            # their answers
            if readable:
                texts = self._generate(
                    [self.encode(questions[index], rows[index] is not None) for index in readable],
                    [sizes[index].answer for index in readable],
                    self.pictures.features(keys),
                )
                for index, text in zip(readable, texts):
                    questions[index].given[images] = text
                    yield questions[index]

    def encode(self, question: Question, with_images: bool) -> torch.Tensor:
        """int64[T]: the prompt of a question."""
        n_images = len(question.images) if with_images else 0
        return self.vlm.processor.encode_prompt(question.turns, n_images)[0]

    def measure_question(self, question: Question, with_images: bool) -> Size:
        """Tokens of its prompt, and of the longest answer that it can get.

        BadSampleError for a prompt that leaves no room for an answer.
        """
        most = self.vlm.model.config.max_seq_len
        n_prompt = len(self.encode(question, with_images))
        if n_prompt >= most:
            raise BadSampleError(
                "prompt too long", f"{n_prompt} tokens, the model takes {most} (--max_seq_len)"
            )
        n_right = len(self.vlm.processor.encode_content(question.answer))
        limit = TIMES_TOKENS * n_right + SPARE_TOKENS
        return Size(n_prompt, min(limit, self.sampling["max_new_tokens"], most - n_prompt))

    def open_pictures(self, row: int | None) -> list[bytes]:
        """Keys of the pictures of a row. BadSampleError where one cannot be read."""
        return [] if row is None else self.pictures.open(self.dataset.read(row)[1])

    def _generate(
        self, prompts: list[torch.Tensor], limits: list[int], features: torch.Tensor | None
    ) -> list[str]:
        """The answers to a batch of prompts, each within its own limit."""
        model, tokenizer = self.vlm.model, self.vlm.processor.tokenizer
        device = model.tok_embeddings.weight.device
        input_ids, attention_mask = pad_left(prompts)
        tokens = model.generate(
            input_ids.to(device),
            image_features=features,
            attention_mask=attention_mask.to(device),
            **self.sampling | {"max_new_tokens": max(limits)},
        )
        new_tokens = tokens[:, input_ids.shape[1] :]
        answers = [row[:limit] for row, limit in zip(new_tokens, limits)]
        return tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.no_grad()
    def measure_loss(self) -> float:
        """Mean loss over the label tokens of all rows that can be read."""
        device = self.vlm.model.tok_embeddings.weight.device
        loss_sum, n_labels = 0.0, 0
        lengths = self.dataset.lengths
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        starts = range(0, len(order), self.batch_size)
        batches = [order[start : start + self.batch_size] for start in starts]
        for batch in show_progress(batches, "loss", "row"):
            # a batch of those that can be read: `answer` has counted and named the others
            samples, keys = [], []
            for index in batch:
                try:
                    sample, images = self.dataset.read_text(index)
                    keys += self.pictures.open(images)
                    samples.append(sample)
                except BadSampleError:
                    continue
            if not samples:
                continue

            # its loss: a mean over its labels, of which a batch may have few or many
            input_ids, labels = (
                pad_sequence(
                    [sample[name] for sample in samples], batch_first=True, padding_value=padding
                )
                for name, padding in (("input_ids", 0), ("labels", IGNORE_INDEX))
            )  # each (B, T)
            output = self.vlm.model(
                input_ids.to(device),
                labels=labels.to(device),
                image_features=self.pictures.features(keys),
                return_logits=False,
            )
            count = count_labels(labels)
            loss_sum += float(output.loss) * count
            n_labels += count
        return loss_sum / max(n_labels, 1)


def make_batches(sizes: dict[int, Size], batch_size: int, max_seq_len: int) -> list[list[int]]:
    """Questions of similar size together; all of a batch have room for their longest answers.

    Args:
        sizes: of the questions, by index.
        batch_size: most questions of a batch.
        max_seq_len: most tokens of the longest prompt and the longest answer of a batch together.
    """
    # answers up to twice as long as others cost a batch little; padding of prompts costs more
    order = sorted(sizes, key=lambda index: (sizes[index].answer.bit_length(), sizes[index].prompt))
    batches: list[list[int]] = []
    longest = Size(0, 0)
    for index in order:
        size = sizes[index]
        longest = Size(max(longest.prompt, size.prompt), max(longest.answer, size.answer))
        is_full = not batches or len(batches[-1]) == batch_size
        if is_full or sum(longest) > max_seq_len:
            batches.append([])
            longest = size
        batches[-1].append(index)
    return batches


def show_progress(batches: Iterable[list[int]], title: str, unit: str) -> Iterator[list[int]]:
    """The batches, with a progress bar over what is in them."""
    with tqdm(total=sum(map(len, batches)), desc=title, unit=unit) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch))


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
