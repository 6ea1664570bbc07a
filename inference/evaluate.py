"""How well a model answers: its answers to questions of known answer, and its loss on these."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.errors import BadSampleError
from common.files import hash_bytes, read_image_bytes
from inference.generate import prefill
from inference.load import VLM
from inference.questions import (
    Question,
    Reasons,
    choose_images,
    choose_requests,
    collect_questions,
    name_choice,
)
from model.labels import IGNORE_INDEX
from model.model_lm import KVCache

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


class Asked(NamedTuple):
    """A question with the pictures that come with it, and its limits.

    Args:
        question: see `collect_questions`.
        row: whose pictures come with it; None for no pictures.
        n_prompt: tokens of the prompt.
        n_answer: most tokens of the answer, or of a right one.
    """

    question: Question
    row: int | None
    n_prompt: int
    n_answer: int


class Evaluation:
    """Asks a model what a dataset knows.

    Every question has limits of its own, so no row changes what another one gets: see `plan` and
    `make_batches`.

    Args:
        vlm: the model that is asked.
        dataset: a VLMDataset or MixedDataset.
        batch_size: questions that go through the model together.
        requests: what asks for a caption, see `choose_requests`.
        sampling: options of `generate`; max_new_tokens bounds every answer. By default the
            likeliest tokens.

    Attributes:
        left_out: the rows and questions that could not be asked.
        untyped: the rows whose type could not be used.
    """

    def __init__(
        self, vlm: VLM, dataset, batch_size: int, requests: dict[str, str] | None = None, **sampling
    ):
        self.vlm, self.dataset, self.batch_size = vlm, dataset, batch_size
        self.requests = requests or choose_requests(None, None)
        self.sampling = {"temperature": 0.0, "max_new_tokens": 512} | sampling
        self.pictures = PictureEncoder(vlm)
        self.left_out, self.untyped = Reasons(dataset), Reasons(dataset)

    def collect(self) -> list[Question]:
        """The questions of all rows that can be read."""
        found = collect_questions(self.dataset, self.left_out, self.untyped, self.requests)
        return list(found)

    def answer(self, questions: list[Question], images: str) -> Iterator[Question]:
        """Fill in `given` and `shown` of the questions; yields each one that has an answer.

        Args:
            questions: see `collect_questions`.
            images: see `choose_images`.
        """
        # pictures and limits of each question
        asked = []
        for question, row in zip(questions, choose_images(questions, images)):
            try:
                asked.append(self.plan(question, row))
            except BadSampleError as error:
                self.left_out.add(question.row, error)

        # The same answers again, also where tokens are drawn.
        torch.manual_seed(0)
        batches = make_batches(asked, self.batch_size, self.vlm.model.config.max_seq_len)
        for batch in show_progress(batches, f"answer, {name_choice(images)}", "question"):
            readable, keys = self._open_batch(batch)
            for one, text in zip(readable, self._generate(readable, keys)):
                one.question.given[images], one.question.shown[images] = text, one.row
                yield one.question

    def plan(self, question: Question, row: int | None) -> Asked:
        """Find the limits of a question that comes with the pictures of `row`.

        BadSampleError for a prompt that leaves no room for an answer.
        """
        n_prompt, n_right = self._count(question, row)
        most = self.vlm.model.config.max_seq_len
        if n_prompt >= most:
            raise BadSampleError(
                "prompt too long", f"{n_prompt} tokens, the model takes {most} (--max_seq_len)"
            )
        limit = TIMES_TOKENS * n_right + SPARE_TOKENS
        limit = min(limit, self.sampling["max_new_tokens"], most - n_prompt)
        return Asked(question, row, n_prompt, limit)

    def _count(self, question: Question, row: int | None) -> tuple[int, int]:
        """Tokens of (the prompt, the longest right answer)."""
        encode = self.vlm.processor.encode_content
        n_right = max(len(encode(answer)) for answer in question.right_answers)
        return len(self._encode(question, row)), n_right

    def _encode(self, question: Question, row: int | None) -> torch.Tensor:
        """int64[T]: the prompt of a question."""
        n_images = 0 if row is None else len(question.images)
        return self.vlm.processor.encode_prompt(question.turns, n_images)[0]

    def _open_batch(self, batch: list[Asked]) -> tuple[list[Asked], list[bytes]]:
        """(the questions whose pictures can be read, keys of all these pictures in order)."""
        readable, keys = [], []
        for one in batch:
            try:
                if one.row is not None:
                    _, images = self.dataset.read(one.row)
                    keys += self.pictures.open(images[: len(one.question.images)])
                readable.append(one)
            except BadSampleError as error:
                self.left_out.add(one.row, error)
        return readable, keys

    def _generate(self, batch: list[Asked], keys: list[bytes]) -> list[str]:
        """The answers to a batch, each within its own limit; `keys` are of all its pictures."""
        if not batch:
            return []
        model, tokenizer = self.vlm.model, self.vlm.processor.tokenizer
        device = model.tok_embeddings.weight.device
        input_ids, attention_mask = pad_left([self._encode(one.question, one.row) for one in batch])
        tokens = model.generate(
            input_ids.to(device),
            image_features=self.pictures.features(keys),
            attention_mask=attention_mask.to(device),
            **self.sampling | {"max_new_tokens": max(one.n_answer for one in batch)},
        )
        new_tokens = tokens[:, input_ids.shape[1] :]
        answers = [row[: one.n_answer] for row, one in zip(new_tokens, batch)]
        return tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.inference_mode()
    def measure_loss(self, questions: list[Question], images: str) -> None:
        """Fill in `loss` of questions that have been answered with these images."""
        most, asked = self.vlm.model.config.max_seq_len, []
        for question in questions:
            n_prompt, n_right = self._count(question, question.shown[images])
            n_label = min(n_right + 1, most - n_prompt)
            asked.append(Asked(question, question.shown[images], n_prompt, n_label))
        batches = make_batches(asked, self.batch_size, most)
        for batch in show_progress(batches, f"loss, {name_choice(images)}", "question"):
            readable, keys = self._open_batch(batch)
            for one, loss in zip(readable, self._sum_losses(readable, keys)):
                one.question.loss[images] = loss

    def _sum_losses(self, batch: list[Asked], keys: list[bytes]) -> list[tuple[float, int]]:
        """(nats, label tokens) over all right answers of each question.

        The prompt goes through the model once, and each right answer after it.
        """
        if not batch:
            return []
        # the prompts
        model = self.vlm.model
        device, dtype = model.tok_embeddings.weight.device, model.tok_embeddings.weight.dtype
        input_ids, attention_mask = pad_left([self._encode(one.question, one.row) for one in batch])
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        n_prompt, n_answer = input_ids.shape[1], max(one.n_answer for one in batch)
        # the longest of each question go together, then the next ones: little padding
        answers = [
            sorted(map(self._encode_label, one.question.right_answers), key=len, reverse=True)
            for one in batch
        ]
        cache = KVCache(model.config, len(batch), n_prompt + n_answer, device, dtype)
        first = prefill(model, input_ids, None, self.pictures.features(keys), attention_mask, cache)
        attention_mask = F.pad(attention_mask, (0, n_answer), value=1)

        # one right answer of each question after the other
        nats, n_labels = torch.zeros(len(batch), device=device), [0] * len(batch)
        for number in range(max(map(len, answers))):
            # (B, T), -100 where there is nothing to predict
            labels = pad_sequence(
                [
                    group[number][: one.n_answer] if number < len(group) else group[0][:0]
                    for one, group in zip(batch, answers)
                ],
                batch_first=True,
                padding_value=IGNORE_INDEX,
            )
            logits = first[:, None]  # (B, 1, vocab_size)
            if labels.shape[1] > 1:
                embeddings = model.tok_embeddings(labels[:, :-1].clamp(min=0).to(device))
                after = model.predict(embeddings, attention_mask, cache)
                logits = torch.cat((logits, after), dim=1)  # (B, T, vocab_size)
            for row, label in enumerate(labels):
                label = label[label != IGNORE_INDEX]
                own = logits[row, : len(label)].float()
                nats[row] += F.cross_entropy(own, label.to(device), reduction="sum")
                n_labels[row] += len(label)
            cache.rewind(n_prompt)
        return list(zip(nats.tolist(), n_labels))

    def _encode_label(self, answer: str) -> torch.Tensor:
        """int64[T]: an answer and the token that ends it."""
        processor = self.vlm.processor
        return torch.tensor(processor.encode_content(answer) + [processor.tokenizer.eos_token_id])


def make_batches(asked: list[Asked], batch_size: int, max_seq_len: int) -> list[list[Asked]]:
    """Questions of similar size together; a batch has room for its longest prompt and answer.

    Args:
        asked: the questions.
        batch_size: most questions of a batch.
        max_seq_len: most tokens of the longest prompt and the longest answer of a batch together.
    """
    batches: list[list[Asked]] = []
    n_prompt = n_answer = 0
    # An answer up to twice as long as the others costs a batch little, so prompts decide then.
    for one in sorted(asked, key=lambda one: (one.n_answer.bit_length(), one.n_prompt)):
        n_prompt, n_answer = max(n_prompt, one.n_prompt), max(n_answer, one.n_answer)
        is_full = not batches or len(batches[-1]) == batch_size
        if is_full or n_prompt + n_answer > max_seq_len:
            batches.append([])
            n_prompt, n_answer = one.n_prompt, one.n_answer
        batches[-1].append(one)
    return batches


def show_progress(batches: list[list], title: str, unit: str) -> Iterator[list]:
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
