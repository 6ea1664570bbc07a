"""How well a model answers: loss and exact-answer accuracy on rows whose answers are known."""

import random
import unicodedata
from collections import defaultdict
from dataclasses import dataclass

import torch
from tqdm import tqdm

from model.model_vlm import MiniMindVLM
from model.processing import BadSampleError, VLMProcessor, check_conversation, count_labels

IMAGE_CHOICES = ("right", "wrong", "none")


@dataclass
class Question:
    """One assistant turn to be produced: the turns before it, the row's images, the answer wanted."""

    turns: list[dict]
    images: list
    answer: str
    type: str
    given: str = ""  # the model's answer


def collect_questions(dataset, images: str = "right", seed: int = 0) -> list[Question]:
    """Every assistant turn of every row, after the true turns before it.

    `dataset.read(i)` gives (row, images). `images`: "right"; "wrong", those of another row with as many; or "none".
    """
    rows = [dataset.read(index) for index in range(len(dataset))]
    shown = [row_images for _, row_images in rows]
    if images == "wrong":
        shown = _shuffle_images(shown, seed)
    elif images == "none":
        shown = [[] for _ in rows]
    questions = []
    for (row, _), row_images in zip(rows, shown):
        turns = [{"role": role, "content": content} for role, content in check_conversation(row["conversations"])]
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                questions.append(Question(turns[:index], row_images, turn["content"], row.get("type", "all")))
    return questions


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
) -> None:
    """Fill in `given` of every question, greedily, in left-padded batches of similar length."""
    device = model.tok_embeddings.weight.device
    prompts = [processor.encode_prompt(question.turns, len(question.images))[0] for question in questions]
    longest = max(len(processor.tokenizer(question.answer)["input_ids"]) for question in questions)
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]))
    with tqdm(total=len(questions), desc=description, unit="question") as progress:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            input_ids, attention_mask = pad_left([prompts[index] for index in batch])
            images = [image for index in batch for image in questions[index].images]
            tokens = model.generate(
                input_ids.to(device),
                processor.preprocess(images).to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=longest + 4,
                temperature=0,
            )
            texts = processor.tokenizer.batch_decode(tokens[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts):
                questions[index].given = text
            progress.update(len(batch))


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
        by_type[question.type].append(normalise(question.given) == normalise(question.answer))
    overall = [right for rights in by_type.values() for right in rights]
    scores = {"overall": overall, **(by_type if set(by_type) != {"all"} else {})}
    return {name: sum(rights) / len(rights) for name, rights in scores.items()}


def normalise(answer: str) -> str:
    """What "exact" looks at: letters and digits, without case, outer space and final punctuation."""
    text = unicodedata.normalize("NFKC", answer).casefold().strip()
    return text.rstrip(".。!！ ")


@torch.no_grad()
def mean_loss(model: MiniMindVLM, dataset) -> tuple[float, int]:
    """(mean loss over the label tokens, samples that could not be read)."""
    device = model.tok_embeddings.weight.device
    loss_sum, n_labels, n_bad = 0.0, 0, 0
    for index in tqdm(range(len(dataset)), desc="loss", unit="row"):
        try:
            sample = {name: tensor.to(device) for name, tensor in dataset[index].items()}
        except BadSampleError:
            n_bad += 1
            continue
        labels = sample["labels"][None]
        count = count_labels(labels)
        loss = model(sample["input_ids"][None], sample["pixel_values"], labels, return_logits=False).loss
        loss_sum, n_labels = loss_sum + float(loss) * count, n_labels + count
    return loss_sum / max(n_labels, 1), n_bad
