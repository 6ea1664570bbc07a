"""Train the demo's stand-in for CLIP: a small CLIPVisionModel that is taught patch by patch.

    python -m scripts.demo.train_vision_encoder    # an hour on 2 cores; model/demo/vision_model/

CLIP learned from 400 million captions that a patch "knows" what it shows. The demo has minutes, so
its vision encoder is told, in two lessons. First, of every patch that holds the center of a thing:
which color, shape, size, column and row; of every other patch: "none". Then to say it in plain
terms: the features of such a patch become the sum of five directions, one for each attribute, and
those of every other patch become equal. So one linear layer, the projector, can translate them.
Only training combinations are drawn (dataset/scenes/scene.py), so the held-out ones stay unseen.
Seeded: the same machine and number of threads give the same file again.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from common.digest import write_digest
from common.errors import run_command
from common.flags import MOST_SEED, check_options, option, parse_flags
from dataset.scenes import scene as scenes
from dataset.scenes.scene import CELLS, COLORS, GRID, PATCH_SIZE, RADII, SHAPES
from model.vision import load_vision_encoder, normalize_pixels

N_PATCHES = GRID * GRID
# What is asked of a patch, and the number of answers; answer 0 of each means "no thing here".
QUESTIONS = {
    "color": len(COLORS),
    "shape": len(SHAPES),
    "size": len(RADII),
    "column": CELLS,
    "row": CELLS,
}
# Its features answer for every patch that a thing covers, which guides the early layers.
AUXILIARY_LAYER = 2
# Lengths of the directions: those that the first lesson left short are hard to learn from.
LEAST_LENGTH, MOST_LENGTH = 25, 60
SHRINK = 0.1
# Weight of the patches without a thing.
BACKGROUND_WEIGHT = 10


class LabeledScenes(Dataset):
    """Scene number i, drawn on the spot: the picture and, for each patch, its answers."""

    def __init__(self, n_scenes: int, seed: int, held_out: bool = False):
        self.n_scenes, self.seed, self.held_out = n_scenes, seed, held_out

    def __len__(self) -> int:
        return self.n_scenes

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(uint8[224, 224, 3], int64[2, 5, 196]): for covered patches, and for centers only."""
        scene = scenes.sample_scene(random.Random(self.seed * 1_000_003 + index), self.held_out)
        # centers of the patches, in pixels: (196,) each
        patches = np.arange(N_PATCHES)
        rows, columns = (
            axis * PATCH_SIZE + PATCH_SIZE // 2 for axis in (patches // GRID, patches % GRID)
        )
        answers = np.zeros((2, len(QUESTIONS), N_PATCHES), dtype=np.int64)
        for thing in scene.things:
            looks = (
                list(COLORS).index(thing.color),
                SHAPES.index(thing.shape),
                list(RADII).index(thing.size),
            )
            values = np.array([*(look + 1 for look in looks), thing.column, thing.row])
            is_covered = np.hypot(columns - thing.x, rows - thing.y) < RADII[thing.size]
            is_covered[thing.patch] = True
            answers[0][:, is_covered] = values[:, None]
            answers[1][:, thing.patch] = values
        return np.array(scenes.draw_scene(scene)), answers


class TaughtEncoder(nn.Module):
    """The vision encoder with a linear read-out at the auxiliary layer and one at the end.

    Both read-outs are thrown away afterwards.
    """

    def __init__(self, vision_encoder: CLIPVisionModel):
        super().__init__()
        self.vision_encoder = vision_encoder
        width, n_answers = vision_encoder.config.hidden_size, sum(QUESTIONS.values())
        self.readouts = nn.ModuleList(
            nn.Linear(width, n_answers + len(QUESTIONS)) for _ in range(2)
        )

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """float[B, 3, 224, 224] -> two float[B, 196, answers of all questions]."""
        output = self.vision_encoder(pixel_values=pixel_values, output_hidden_states=True)
        features = output.hidden_states[AUXILIARY_LAYER], output.last_hidden_state
        return [readout(hidden[:, 1:]) for readout, hidden in zip(self.readouts, features)]


def split_by_question(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return logits.split([n_answers + 1 for n_answers in QUESTIONS.values()], dim=-1)


def patch_loss(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the questions.

    Things and background weigh alike, though background patches are 50 times as many.

    Args:
        logits: float[B, 196, answers of all questions].
        answers: int64[B, 5, 196].
    """
    loss = 0.0
    for number, question_logits in enumerate(split_by_question(logits)):
        target = answers[:, number].flatten()  # (B * 196,)
        losses = F.cross_entropy(question_logits.flatten(0, 1), target, reduction="none")
        loss = loss + losses[target > 0].mean() + 3 * losses[target == 0].mean()
    return loss


def sincos_positions(width: int) -> torch.Tensor:
    """Two-dimensional sine-cosine start for the trainable positions (Chen et al. 2021, MoCo v3).

    Returns float[1 + 196, width]; row 0 is the class token's.
    """
    frequencies = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies  # (14, width / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (14, width / 2)
    rows, columns = axis.repeat_interleave(GRID, 0), axis.repeat(GRID, 1)  # (196, width / 2)
    return torch.cat((torch.zeros(1, width), torch.cat((rows, columns), dim=1)))


def prepare_images(images: torch.Tensor, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """uint8[B, 224, 224, 3] -> float[B, 3, 224, 224], as CLIP does; their size is right already."""
    statistics = torch.tensor([processor.image_mean, processor.image_std])
    mean, std = statistics.view(2, 3, 1, 1)
    return normalize_pixels(images.permute(0, 3, 1, 2), mean, std)


@torch.no_grad()
def describe_accuracy(model: TaughtEncoder, processor: CLIPImageProcessorPil, n_scenes: int) -> str:
    """On held-out scenes: things named right by their center patch, and centers seen elsewhere."""
    model.eval()
    right, n_things, n_false = torch.zeros(len(QUESTIONS)), 0, 0
    held_out = LabeledScenes(n_scenes, seed=999, held_out=True)
    for images, answers in DataLoader(held_out, batch_size=50):
        logits = split_by_question(model(prepare_images(images, processor))[1])
        guesses = torch.stack([question.argmax(-1) for question in logits], dim=1)  # (B, 5, 196)
        is_center = (answers[:, 1, :1] > 0).expand_as(guesses)
        right += ((guesses == answers[:, 1]) & is_center).sum(dim=(0, 2))
        n_things += int(is_center[:, 0].sum())
        n_false += int(((guesses[:, 0] > 0) & ~is_center[:, 0]).sum())
    model.train()
    shares = zip(QUESTIONS, (100 * right / n_things).tolist())
    named = ", ".join(f"{name} {share:.1f} %" for name, share in shares)
    return f"held-out centers: {named}; false centers {n_false / n_scenes:.2f} an image"


def one_hot(answers: torch.Tensor) -> torch.Tensor:
    """int64[B, 5, 196] -> float[B, 196, all answers]: 1 for each answer, nothing for "none"."""
    hot = [
        F.one_hot(answers[:, number], n_answers + 1)[..., 1:]
        for number, n_answers in enumerate(QUESTIONS.values())
    ]
    return torch.cat(hot, dim=-1).float()


@torch.no_grad()
def find_directions(
    vision_encoder: CLIPVisionModel, processor: CLIPImageProcessorPil, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(float[all answers, width], float[width]): a direction for each answer, and the background.

    They are near to what the encoder says already, and close to right angles to one another.
    """
    # what it says now
    answers, features, backgrounds = [], [], []
    for images, labels in DataLoader(LabeledScenes(10 * batch_size, seed=5), batch_size):
        says = encode(vision_encoder, images, processor)
        is_center = labels[:, 1, 0] > 0  # (B, 196)
        answers.append(one_hot(labels[:, 1])[is_center])
        features.append(says[is_center])
        backgrounds.append(says[~is_center].mean(0))
    hot, said, background = (
        torch.cat(answers),
        torch.cat(features),
        torch.stack(backgrounds).mean(0),
    )

    # the mean of each answer, by least squares with a little ridge; in float64 and rounded,
    # since the last bits of such a solution differ from run to run
    n_answers, width = hot.shape[1], said.shape[1]
    ridge = torch.cat([hot, 1e-2 * torch.eye(n_answers)]).double()
    wanted = torch.cat([said - background, torch.zeros(n_answers, width)]).double()
    means = torch.linalg.lstsq(ridge, wanted).solution
    # Of five answers each thing has one, so four directions are free: a little noise decides them,
    # the same in each run.
    noise = torch.randn(means.shape, generator=torch.Generator().manual_seed(0))
    means = means + 1e-3 * noise

    # with lengths that do not differ much
    left, lengths, right = torch.linalg.svd(means, full_matrices=False)
    directions = left @ torch.diag(lengths.clamp(LEAST_LENGTH, MOST_LENGTH)) @ right
    return directions.round(decimals=3).float(), background


@torch.no_grad()
def shrink_features(
    vision_encoder: CLIPVisionModel, processor: CLIPImageProcessorPil, batch_size: int
) -> None:
    """Features a tenth as long, and about 0 where there is no thing.

    A projector with fresh weights then begins with rows of the size of word embeddings, and a step
    of the optimizer moves them by a part of that size.
    """
    # the mean of what it says of an empty patch
    backgrounds = []
    for images, labels in DataLoader(LabeledScenes(10 * batch_size, seed=5), batch_size):
        is_empty = labels[:, 1, 0] == 0
        backgrounds.append(encode(vision_encoder, images, processor)[is_empty].mean(0))
    background = torch.stack(backgrounds).mean(0)

    # Each block normalizes what it reads: so the sum of what they add can be scaled as a whole.
    added = ("pre_layrnorm", "out_proj", "mlp.fc2")
    for name, parameter in vision_encoder.named_parameters():
        if any(part in name for part in added):
            parameter.mul_(SHRINK)
    vision_encoder.encoder.layers[-1].mlp.fc2.bias.sub_(SHRINK * background)


def encode(
    vision_encoder: CLIPVisionModel, images: torch.Tensor, processor: CLIPImageProcessorPil
) -> torch.Tensor:
    """uint8[B, 224, 224, 3] -> float[B, 196, width], the features that the projector will get."""
    pixel_values = prepare_images(images, processor)
    return vision_encoder(pixel_values=pixel_values).last_hidden_state[:, 1:]


@dataclass(frozen=True)
class Settings:
    """Options of `python -m scripts.demo.train_vision_encoder`."""

    out_dir: str = option("model/demo/vision_model", "where it is written")
    start: str | None = option(
        None, "vision encoder that has had the first lesson; skips it if given"
    )
    steps: int = option(2600, "optimizer steps of lesson 1", least=1, most=1_000_000_000)
    plain_steps: int = option(800, "those of lesson 2", least=1, most=1_000_000_000)
    batch_size: int = option(64, "scenes in a step", least=1, most=4096)
    learning_rate: float = option(
        1e-3,
        "highest of lesson 1, between warm-up and cosine; half of it in lesson 2",
        least=0,
        most=1000,
    )
    seed: int = option(1337, "of random weights and scenes", least=0, most=MOST_SEED)
    eval_scenes: int = option(
        400, "held-out scenes it is measured on now and then", least=1, most=1_000_000
    )

    def __post_init__(self):
        check_options(self)


def teach_answers(
    vision_encoder: CLIPVisionModel, processor: CLIPImageProcessorPil, args: Settings
) -> None:
    """Lesson 1: each patch knows what it shows, as far as a linear read-out can tell."""
    model = TaughtEncoder(vision_encoder)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    data = LabeledScenes(args.steps * args.batch_size, args.seed)
    progress = tqdm(DataLoader(data, args.batch_size, num_workers=1), desc="answers", unit="step")
    for step, (images, answers) in enumerate(progress, start=1):
        # gradients
        early, final = model(prepare_images(images, processor))
        loss = patch_loss(final, answers[:, 1]) + 0.5 * patch_loss(early, answers[:, 0])
        optimizer.zero_grad()
        loss.backward()

        # clip and update
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        # now and then: show
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 200 == 0 or step == args.steps:
            accuracy = describe_accuracy(model, processor, args.eval_scenes)
            progress.write(f"step {step}: loss {loss.item():.3f}; {accuracy}")


def teach_plain_words(
    vision_encoder: CLIPVisionModel, processor: CLIPImageProcessorPil, args: Settings
) -> None:
    """Lesson 2: its features are a sum of directions, one for each answer."""
    directions, background = find_directions(vision_encoder, processor, args.batch_size)
    scale = directions.pow(2).sum(-1).mean()
    highest = args.learning_rate / 2
    optimizer = torch.optim.AdamW(
        vision_encoder.parameters(), lr=highest, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, highest, total_steps=args.plain_steps, pct_start=0.05, cycle_momentum=False
    )

    def errors(images: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squared error at centers and elsewhere, in squared lengths of a direction."""
        wanted = one_hot(answers[:, 1]) @ directions + background
        error = (encode(vision_encoder, images, processor) - wanted).pow(2).sum(-1) / scale
        is_center = answers[:, 1, 0] > 0
        return error[is_center].mean(), error[~is_center].mean()

    data = LabeledScenes(args.plain_steps * args.batch_size, args.seed + 687)
    progress = tqdm(DataLoader(data, args.batch_size), desc="plain words", unit="step")
    for step, (images, answers) in enumerate(progress, start=1):
        # gradients
        at_centers, elsewhere = errors(images, answers)
        optimizer.zero_grad()
        (at_centers + BACKGROUND_WEIGHT * elsewhere).backward()

        # clip and update
        nn.utils.clip_grad_norm_(vision_encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        # now and then: show
        progress.set_postfix(error=f"{at_centers.item():.3f}")
        if step % 100 == 0 or step == args.plain_steps:
            held_out = LabeledScenes(args.eval_scenes, seed=999, held_out=True)
            with torch.no_grad():
                batches = [errors(*batch) for batch in DataLoader(held_out, 50)]
            shown = [f"{torch.stack(column).mean():.4f}" for column in zip(*batches)]
            progress.write(f"step {step}: held-out error at centers {shown[0]}, else {shown[1]}")


def main() -> None:
    args = parse_flags(Settings(), __doc__)
    torch.manual_seed(args.seed)
    processor = CLIPImageProcessorPil()

    # lesson 1, saved in half precision (1.8 MB)
    if args.start is None:
        config = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=scenes.IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )
        vision_encoder = CLIPVisionModel(config)
        with torch.no_grad():
            positions = 0.3 * sincos_positions(config.hidden_size)
            vision_encoder.embeddings.position_embedding.weight.copy_(positions)
        teach_answers(vision_encoder, processor, args)
        save(vision_encoder, processor, Path(args.out_dir))

    # lesson 2, which starts from that file
    vision_encoder = load_vision_encoder(args.start or args.out_dir)[0].network.requires_grad_(True)
    teach_plain_words(vision_encoder.train(), processor, args)
    shrink_features(vision_encoder.half().float(), processor, args.batch_size)
    save(vision_encoder, processor, Path(args.out_dir))


def save(vision_encoder: CLIPVisionModel, processor: CLIPImageProcessorPil, folder: Path) -> None:
    """In half precision, with the digest that tells whether a bit of it has changed."""
    vision_encoder.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    write_digest(folder / "model.safetensors")


if __name__ == "__main__":
    run_command(main)
