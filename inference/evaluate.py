"""How well a model answers: loss and exact-answer accuracy on rows whose answers are known."""

import random
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.errors import BadSampleError
from model.labels import count_labels
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, check_conversation

# Tokens that an answer may have beyond the longest right one: enough to see that it is wrong.
SPARE_TOKENS = 4


@dataclass
class Question:
    """An assistant turn that the model has to produce."""

    turns: list[dict]  # all turns before it
    images: list  # pictures of the row
    answer: str  # the right answer
    type: str  # accuracy is also given by type
    given: str = ""  # the model's answer


def collect_questions(
    dataset, images: str = "right", seed: int = 0
) -> tuple[list[Question], Counter[str]]:
    """Make a question of each assistant turn, which is asked after the right turns before it.

    Args:
        dataset: `dataset.read(i)` gives (row, pictures), as VLMDataset's does.
        images: "right", those of the row; "wrong", as many of another row; "none".
        seed: which other row that is.

    Returns (questions, how many rows cannot be read, by reason).
    """
    # read
    rows, unreadable = [], Counter()
    for index in range(len(dataset)):
        try:
            rows.append(dataset.read(index))
        except BadSampleError as error:
            unreadable[error.args[0]] += 1

    # choose the pictures
    shown = [row_images for _, row_images in rows]
    if images == "wrong":
        shown = shuffle_images(shown, seed)
    elif images == "none":
        shown = [[] for _ in rows]

    # ask
    questions = []
    for (row, _), row_images in zip(rows, shown):
        conversation = check_conversation(row["conversations"])
        turns = [{"role": role, "content": content} for role, content in conversation]
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                answer, type_ = turn["content"], row.get("type", "all")
                questions.append(Question(turns[:index], row_images, answer, type_))
    return questions, unreadable


def shuffle_images(images: list[list], seed: int) -> list[list]:
    """Give each row the pictures of another row that has as many.

    A row keeps its own only if no other has as many.
    """
    by_count = defaultdict(list)
    for index, row_images in enumerate(images):
        by_count[len(row_images)].append(index)
    shuffled = list(images)
    for indices in by_count.values():
        random.Random(seed).shuffle(indices)
        # Each gets those of the next: so none can draw its own.
        for index, other in zip(indices, indices[1:] + indices[:1]):
            shuffled[index] = images[other]
    return shuffled


def answer_questions(
    model: MiniMindVLM,
    processor: VLMProcessor,
    questions: list[Question],
    batch_size: int = 32,
    description: str = "answer",
) -> tuple[list[Question], Counter[str]]:
    """Fill in `given` of each question, with the likeliest tokens.

    Args:
        model: in eval mode.
        processor: that of the model.
        questions: see `collect_questions`.
        batch_size: questions answered together; they are of similar length, padded on the left.
        description: title of the progress bar.

    Returns (the questions that were asked, how many were not because a picture cannot be read, by
    reason).
    """
    device, tokenizer = model.tok_embeddings.weight.device, processor.tokenizer
    prompts = [
        processor.encode_prompt(question.turns, len(question.images))[0] for question in questions
    ]
    lengths = [len(tokenizer(question.answer)["input_ids"]) for question in questions]
    max_new_tokens = max(lengths, default=0) + SPARE_TOKENS
    # Similar lengths in a batch leave little padding.
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]))
    asked: list[int] = []
    unreadable: Counter[str] = Counter()

    with tqdm(total=len(questions), desc=description, unit="question") as progress:
        for start in range(0, len(order), batch_size):
            # a batch of those whose pictures can be read
            chosen = order[start : start + batch_size]
            batch, pixel_values = [], []
            for index in chosen:
                try:
                    pixel_values.append(processor.preprocess(questions[index].images))
                    batch.append(index)
                except BadSampleError as error:
                    unreadable[error.args[0]] += 1
            progress.update(len(chosen))
            if not batch:
                continue

            # its answers
            input_ids, attention_mask = pad_left([prompts[index] for index in batch])
            tokens = model.generate(
                input_ids.to(device),
                torch.cat(pixel_values).to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                temperature=0,
            )
            new_tokens = tokens[:, input_ids.shape[1] :]
            texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            for index, text in zip(batch, texts):
                questions[index].given = text
            asked += batch
    return [questions[index] for index in sorted(asked)], unreadable


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


def measure_accuracy(questions: list[Question]) -> dict[str, float]:
    """Share of answers that are exactly right, "overall" and by type of question."""
    by_type = defaultdict(list)
    for question in questions:
        is_right = simplify_answer(question.given) == simplify_answer(question.answer)
        by_type[question.type].append(is_right)
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
def measure_loss(model: MiniMindVLM, dataset) -> float:
    """Mean loss over the label tokens of all samples that can be read.

    Args:
        model: in eval mode.
        dataset: its items are samples, as VLMDataset's are.
    """
    device = model.tok_embeddings.weight.device
    loss_sum, n_labels = 0.0, 0
    for index in tqdm(range(len(dataset)), desc="loss", unit="row"):
        # `answer_questions` has counted and named these already.
        try:
            sample = {name: tensor.to(device) for name, tensor in dataset[index].items()}
        except BadSampleError:
            continue
        input_ids, labels = sample["input_ids"][None], sample["labels"][None]  # each (1, T)
        output = model(input_ids, sample["pixel_values"], labels, return_logits=False)
        # A sample's loss is a mean over its labels, and it may have few or many.
        count = count_labels(labels)
        loss_sum += float(output.loss) * count
        n_labels += count
    return loss_sum / max(n_labels, 1)
