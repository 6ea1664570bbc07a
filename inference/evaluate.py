"""How well a model answers: loss and exact-answer accuracy on rows whose answers are known."""

import random
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.errors import BadSampleError
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, check_conversation, count_labels

IMAGE_CHOICES = ("right", "wrong", "none")


@dataclass
class Question:
    """One assistant turn to be produced: the turns before it, the row's images, the answer wanted."""

    turns: list[dict]
    images: list
    answer: str
    type: str
    given: str = ""  # the model's answer


def collect_questions(
    dataset, images: str = "right", seed: int = 0
) -> tuple[list[Question], Counter[str]]:
    """(every assistant turn of every row, after the true turns before it; how many rows cannot be read, by reason).

    `dataset.read(i)` gives (row, images). `images`: "right"; "wrong", those of another row with as many; or "none".
    """
    rows, unreadable = [], Counter()
    for index in range(len(dataset)):
        try:
            rows.append(dataset.read(index))
        except BadSampleError as error:  # a damaged entry of an archive
            unreadable[error.args[0]] += 1
    shown = [row_images for _, row_images in rows]
    if images == "wrong":
        shown = _shuffle_images(shown, seed)
    elif images == "none":
        shown = [[] for _ in rows]
    questions = []
    for (row, _), row_images in zip(rows, shown):
        turns = [
            {"role": role, "content": content}
            for role, content in check_conversation(row["conversations"])
        ]
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                questions.append(
                    Question(turns[:index], row_images, turn["content"], row.get("type", "all"))
                )
    return questions, unreadable


def _shuffle_images(images: list[list], seed: int) -> list[list]:
    """Each row gets the images of another row that has as many; none keeps its own where two rows have that number."""
    by_count = defaultdict(list)
    for index, row_images in enumerate(images):
        by_count[len(row_images)].append(index)
    shuffled = list(images)
    for indices in by_count.values():
        random.Random(seed).shuffle(indices)
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
    """Fill in `given` of every question, greedily, in left-padded batches of similar length. Returns (the questions that were
    asked, how many were not since a picture cannot be read, by reason)."""
    device = model.tok_embeddings.weight.device
    unreadable: Counter[str] = Counter()
    prompts = [
        processor.encode_prompt(question.turns, len(question.images))[0] for question in questions
    ]
    longest = max(
        (len(processor.tokenizer(question.answer)["input_ids"]) for question in questions),
        default=0,
    )
    order, asked = sorted(range(len(questions)), key=lambda index: len(prompts[index])), []
    with tqdm(total=len(questions), desc=description, unit="question") as progress:
        for start in range(0, len(order), batch_size):
            chosen, batch, pixel_values = order[start : start + batch_size], [], []
            for index in chosen:
                try:
                    pixel_values.append(processor.preprocess(questions[index].images))
                    batch.append(index)
                except BadSampleError as error:
                    unreadable[error.args[0]] += 1
            progress.update(len(chosen) - len(batch))
            if not batch:
                continue
            asked += batch
            input_ids, attention_mask = pad_left([prompts[index] for index in batch])
            tokens = model.generate(
                input_ids.to(device),
                torch.cat(pixel_values).to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=longest + 4,
                temperature=0,
            )
            texts = processor.tokenizer.batch_decode(
                tokens[:, input_ids.shape[1] :], skip_special_tokens=True
            )
            for index, text in zip(batch, texts):
                questions[index].given = text
            progress.update(len(batch))
    return [questions[index] for index in sorted(asked)], unreadable


def pad_left(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64[B, T] input_ids, int64[B, T] attention_mask) of rows of unequal length."""
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        input_ids[index, length - len(row) :] = row
        attention_mask[index, length - len(row) :] = 1
    return input_ids, attention_mask


def accuracy(questions: list[Question]) -> dict[str, float]:
    """Share of answers that are exactly right, "overall" and by question type."""
    by_type = defaultdict(list)
    for question in questions:
        by_type[question.type].append(
            simplify_answer(question.given) == simplify_answer(question.answer)
        )
    overall = [right for rights in by_type.values() for right in rights]
    scores = {"overall": overall, **(by_type if set(by_type) != {"all"} else {})}
    return {name: sum(rights) / len(rights) for name, rights in scores.items()}


def simplify_answer(answer: str) -> str:
    """What "exact" looks at: letters and digits, without case, outer space and final punctuation."""
    text = unicodedata.normalize("NFKC", answer).casefold().strip()
    return text.rstrip(".。!！ ")


@torch.no_grad()
def mean_loss(model: MiniMindVLM, dataset) -> float:
    """The mean loss over the label tokens of the samples that can be read."""
    device = model.tok_embeddings.weight.device
    loss_sum, n_labels = 0.0, 0
    for index in tqdm(range(len(dataset)), desc="loss", unit="row"):
        try:
            sample = {name: tensor.to(device) for name, tensor in dataset[index].items()}
        except BadSampleError:
            continue
        labels = sample["labels"][None]
        count = count_labels(labels)
        loss = model(
            sample["input_ids"][None], sample["pixel_values"], labels, return_logits=False
        ).loss
        loss_sum, n_labels = loss_sum + float(loss) * count, n_labels + count
    return loss_sum / max(n_labels, 1)
