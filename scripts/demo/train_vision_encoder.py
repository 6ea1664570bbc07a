"""Train the demo's stand-in for CLIP: a small CLIPVisionModel (patch 16, 224 x 224, 196 patches) taught patch by patch.

    python -m scripts.demo.train_vision_encoder            # about 40 minutes on 2 cores; writes model/demo/vision_model/

CLIP learned from 400 million captions that a patch "knows" what it shows. The demo has minutes, so its vision_encoder is told: of
every patch that holds the centre of a thing, which colour, shape, size, column and row; of every other patch,
"none". Only training combinations are drawn (dataset/scenes.py), so the held-out ones stay unseen. Seeded: the same machine and
number of threads give the same file again.
"""

import argparse
import copy
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataset.scenes.scene import (
    CELLS,
    COLORS,
    GRID,
    IMAGE_SIZE,
    PATCH_SIZE,
    RADII,
    SHAPES,
    draw_scene,
    sample_scene,
)

N_PATCHES = GRID * GRID
# One group of classes for each thing a patch is asked; class 0 of each means "no thing here".
N_CLASSES = {
    "color": len(COLORS),
    "shape": len(SHAPES),
    "size": len(RADII),
    "column": CELLS,
    "row": CELLS,
}
AUXILIARY_LAYER = (
    2  # its features answer for every patch that a thing covers, which guides the early layers
)


class LabelledScenes(Dataset):
    """Scene number i, drawn on the spot: the picture and, for each patch, its classes."""

    def __init__(self, n_scenes: int, seed: int, held_out: bool = False):
        self.n_scenes, self.seed, self.held_out = n_scenes, seed, held_out

    def __len__(self):
        return self.n_scenes

    def __getitem__(self, index):
        """(uint8[224, 224, 3], int64[2, 5, 196]): classes of covering things, and of centres only."""
        scene = sample_scene(random.Random(self.seed * 1_000_003 + index), self.held_out)
        centers = (np.arange(N_PATCHES) // GRID, np.arange(N_PATCHES) % GRID)
        rows, columns = (axis * PATCH_SIZE + PATCH_SIZE // 2 for axis in centers)
        classes = np.zeros((2, len(N_CLASSES), N_PATCHES), dtype=np.int64)
        for thing in scene.things:
            values = (
                list(COLORS).index(thing.color),
                SHAPES.index(thing.shape),
                list(RADII).index(thing.size),
            )
            values = np.array([value + 1 for value in values] + [thing.column, thing.row])
            covered = np.hypot(columns - thing.x, rows - thing.y) < RADII[thing.size]
            covered[thing.patch] = True
            classes[0][:, covered] = values[:, None]
            classes[1][:, thing.patch] = values
        return np.asarray(draw_scene(scene)), classes


class TaughtEncoder(nn.Module):
    """The vision encoder with one linear read-out at the auxiliary layer and one at the end (both thrown away afterwards)."""

    def __init__(self, vision_encoder: CLIPVisionModel):
        super().__init__()
        self.tower = vision_encoder
        width = vision_encoder.config.hidden_size
        self.readouts = nn.ModuleList(
            nn.Linear(width, sum(N_CLASSES.values()) + len(N_CLASSES)) for _ in range(2)
        )

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """float[B, 3, 224, 224] -> two float[B, 196, classes]."""
        output = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        features = output.hidden_states[AUXILIARY_LAYER], output.last_hidden_state
        return [readout(hidden[:, 1:]) for readout, hidden in zip(self.readouts, features)]


def split_by_question(scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return scores.split([n_classes + 1 for n_classes in N_CLASSES.values()], dim=-1)


def patch_loss(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the questions; things and background weigh alike though background patches are 50 times as many."""
    loss = 0.0
    for question, question_scores in enumerate(split_by_question(scores)):
        target = classes[:, question].flatten()
        losses = F.cross_entropy(question_scores.flatten(0, 1), target, reduction="none")
        loss = loss + losses[target > 0].mean() + 3 * losses[target == 0].mean()
    return loss


def sincos_positions(width: int) -> torch.Tensor:
    """float[1 + 196, width]: 2-D sine-cosine start for the learned positions (Chen et al., MoCo v3); row 0 is the class token."""
    frequencies = 1.0 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies  # (14, width / 4)
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)  # (14, width / 2)
    rows, columns = axis.repeat_interleave(GRID, 0), axis.repeat(GRID, 1)  # (196, width / 2) each
    return torch.cat((torch.zeros(1, width), torch.cat((rows, columns), dim=1)))


def normalise(images: torch.Tensor, processor: CLIPImageProcessorPil) -> torch.Tensor:
    """uint8[B, 224, 224, 3] -> float[B, 3, 224, 224], as CLIPImageProcessor does (no resizing is due at 224 pixels)."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2)


@torch.no_grad()
def accuracies(model: TaughtEncoder, processor: CLIPImageProcessorPil, n_scenes: int) -> str:
    """On held-out combinations: share of things named right by their centre patch, and of patches rightly "none"."""
    model.eval()
    right, things, false_alarms = torch.zeros(len(N_CLASSES)), 0, 0
    for images, classes in DataLoader(
        LabelledScenes(n_scenes, seed=999, held_out=True), batch_size=50
    ):
        scores = split_by_question(model(normalise(images, processor))[1])
        guesses = torch.stack([question.argmax(-1) for question in scores], dim=1)  # (B, 5, 196)
        is_center = (classes[:, 1, :1] > 0).expand_as(guesses)
        right += ((guesses == classes[:, 1]) & is_center).sum(dim=(0, 2))
        things += int(is_center[:, 0].sum())
        false_alarms += int(((guesses[:, 0] > 0) & ~is_center[:, 0]).sum())
    model.train()
    named = ", ".join(
        f"{name} {100 * n / things:.1f} %" for name, n in zip(N_CLASSES, right.tolist())
    )
    return f"held-out centres: {named}; false centres {false_alarms / n_scenes:.2f} an image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out_dir",
        type=Path,
        default=Path("model/demo/vision_model"),
        help="where the vision encoder is written",
    )
    parser.add_argument("--steps", type=int, default=2600, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=64, help="scenes in a step")
    parser.add_argument(
        "--learning_rate",
        type=float,
        default=1e-3,
        help="highest learning rate (warm-up, then cosine)",
    )
    parser.add_argument("--seed", type=int, default=1337, help="seed of the weights and the scenes")
    parser.add_argument(
        "--eval_scenes",
        type=int,
        default=400,
        help="held-out scenes it is measured on every 200 steps",
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    vision_encoder = CLIPVisionModel(config)
    with torch.no_grad():
        vision_encoder.embeddings.position_embedding.weight.copy_(
            0.3 * sincos_positions(config.hidden_size)
        )
    model = TaughtEncoder(vision_encoder)
    processor = CLIPImageProcessorPil()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    scenes = LabelledScenes(args.steps * args.batch_size, args.seed)
    progress = tqdm(DataLoader(scenes, args.batch_size, num_workers=1), desc="tower", unit="step")
    for step, (images, classes) in enumerate(progress, start=1):
        early, final = model(normalise(images, processor))
        loss = patch_loss(final, classes[:, 1]) + 0.5 * patch_loss(early, classes[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 200 == 0 or step == args.steps:
            progress.write(
                f"step {step}: loss {loss.item():.3f}; {accuracies(model, processor, args.eval_scenes)}"
            )
            copy.deepcopy(vision_encoder).half().save_pretrained(
                args.out_dir
            )  # half precision: 1.8 MB
    processor.save_pretrained(args.out_dir)


if __name__ == "__main__":
    main()
