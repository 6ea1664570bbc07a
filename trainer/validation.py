"""The loss on rows that are not learned from, and answers that show what this loss means."""

import itertools
from collections import Counter
from typing import NamedTuple

import torch

from common.errors import BadSampleError, UserError, list_reasons
from common.text import IMAGE_TAG
from model.model_vlm import MiniMindVLM
from model.processing import check_conversation
from trainer.collate import TrainSamples, make_loader
from trainer.image_encoder import ImageEncoder
from trainer.runtime import Runtime
from trainer.sampler import StepSampler

N_SAMPLES = 3
MAX_NEW_TOKENS = 64  # of an answer


class SampleAnswer(NamedTuple):
    """The first question of a validation row, and what the model says."""

    row: int  # index in the validation set
    question: str
    answer: str  # the right one
    given: str  # the model's


class Validation(NamedTuple):
    """What a validation found."""

    loss: float  # mean over all label tokens
    samples: list[SampleAnswer]  # none outside the main process
    skipped: Counter[str]  # rows that could not be used, by reason


@torch.no_grad()
def validate(
    model: MiniMindVLM, images: ImageEncoder, val_data, batch_size: int, runtime: Runtime
) -> Validation:
    """Loss and sample answers; the model is in training mode before and after.

    UserError where not a single row can be used.

    Args:
        model: what is trained.
        images: gives it the features of pictures.
        val_data: a VLMDataset or MixedDataset.
        batch_size: samples of a batch, on each device.
        runtime: its ranks share the rows out; the main process answers.
    """
    model.eval()
    loss, skipped = measure_loss(model, images, val_data, batch_size, runtime)
    samples = answer_samples(model, images, val_data, runtime) if runtime.is_main else []
    model.train()
    return Validation(loss, samples, skipped)


def measure_loss(
    model: MiniMindVLM, images: ImageEncoder, val_data, batch_size: int, runtime: Runtime
) -> tuple[float, Counter[str]]:
    """Mean loss over all label tokens of `val_data`, which the ranks share out; rows left out."""
    sampler = StepSampler(
        val_data.lengths,
        batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        shuffle=False,
    )
    loss_sum, n_labels = torch.zeros((), device=runtime.device), 0
    skipped: Counter[str] = Counter()
    for batch in make_loader(val_data, sampler, num_workers=0, cache=images.cache):
        batch, count = batch.to(runtime.device), batch.n_labels
        with runtime.autocast():
            features = images.features(batch)
            loss = model(**batch.model_inputs(), image_features=features).loss
        loss_sum, n_labels = loss_sum + loss * count, n_labels + count
        skipped.update(batch.skipped)

    # of all ranks
    loss_sum, n_labels = runtime.sum_over_ranks(loss_sum.item(), n_labels)
    skipped = sum(runtime.gather(skipped), Counter())
    if not n_labels:
        raise UserError(f"no row of the validation set could be used ({list_reasons(skipped)})")
    return loss_sum / n_labels, skipped


def answer_samples(
    model: MiniMindVLM, images: ImageEncoder, val_data, runtime: Runtime
) -> list[SampleAnswer]:
    """Answers to N_SAMPLES rows spread over `val_data`, the same ones each time.

    A row that cannot be read gives its place to the next one.
    """
    starts = [len(val_data) * k // N_SAMPLES for k in range(N_SAMPLES + 1)]
    samples = []
    for start, end in itertools.pairwise(starts):
        for row in range(start, end):
            try:
                samples.append(answer_row(model, images, val_data, row, runtime))
                break
            except BadSampleError:
                continue
    return samples


def answer_row(
    model: MiniMindVLM, images: ImageEncoder, val_data, row: int, runtime: Runtime
) -> SampleAnswer:
    """The likeliest tokens after the first question of a row.

    BadSampleError where the row cannot be read.
    """
    # the words
    turns = check_conversation(val_data.read(row)[0].conversations)
    place = [role for role, _ in turns].index("assistant")
    (_, question), (_, answer) = turns[place - 1 : place + 1]

    # the tokens before the first answer, and the images among them
    samples = TrainSamples(val_data, images.cache)
    batch = samples.collate([samples[row]])
    if batch.skipped:
        raise BadSampleError(*batch.skipped)
    n_tokens = int(batch.label_indices[0])
    n_images = int((batch.image_token_indices < n_tokens).sum()) // model.config.n_image_tokens
    batch = batch.to(runtime.device)
    with runtime.autocast():
        features = images.features(batch)
    if features is not None:
        features = features[:n_images]

    # In float32, as eval_vlm.py answers, and not compiled: each token has a length of its own.
    with torch.compiler.set_stance("force_eager"):
        tokens = model.generate(
            batch.input_ids[:, :n_tokens],
            image_features=features,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=0,
        )
    given = val_data.processor.tokenizer.decode(tokens[0, n_tokens:], skip_special_tokens=True)
    return SampleAnswer(row, question.replace(IMAGE_TAG, "").strip(), answer, given)
