"""Train the demo's stand-in for CLIP: a small CLIPVisionModel (patch 16, 224 x 224, 196 patches) taught patch by patch.

    python scripts/train_demo_tower.py            # about 40 minutes on 2 cores; writes model/demo/vision_model/

CLIP learned from 400 million captions that a patch "knows" what it shows. The demo has minutes, so its tower is told. It
learns to *spell*: the five patches around a thing's centre, from left to right, stand for its size, colour, shape, column
and row; every other patch stands for "nothing". The 196 patches in reading order then say what the language model's text
says in words, and a linear projector has a dictionary to learn, nothing more. Only training combinations are drawn
(dataset/scenes.py), so the held-out ones stay unseen. Seeded: the same machine and number of threads give the same file again.
"""

import argparse
import copy
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dataset.scenes import COLORS, GRID, IMAGE_SIZE, PATCH_SIZE, SHAPES, SIZES, draw_scene, sample_scene

N_PATCHES = GRID * GRID
WORDS = ("nothing", *SIZES, *COLORS, *SHAPES, *"ABCDEFG", *"1234567")  # what a patch can stand for at the last layer
ATTRIBUTES = {"size": list(SIZES), "color": list(COLORS), "shape": list(SHAPES)}
WORD_KIND = torch.tensor([0] + [1] * len(SIZES) + [2] * len(COLORS) + [3] * len(SHAPES) + [4] * 7 + [5] * 7)
AUXILIARY_LAYER = 2  # its features answer for every patch that a thing covers, which guides the early layers


class LabelledScenes(Dataset):
    """Scene number i, drawn on the spot: the picture and what each patch is to know."""

    def __init__(self, n_scenes: int, seed: int, held_out: bool = False):
        self.n_scenes, self.seed, self.held_out = n_scenes, seed, held_out

    def __len__(self):
        return self.n_scenes

    def __getitem__(self, index):
        """(uint8[224, 224, 3], int64[3, 196] attributes of the thing that covers a patch, int64[196] its word); 0: none."""
        scene = sample_scene(random.Random(self.seed * 1_000_003 + index), self.held_out)
        rows, columns = (axis * PATCH_SIZE + PATCH_SIZE // 2 for axis in np.divmod(np.arange(N_PATCHES), GRID))
        covering, words = np.zeros((3, N_PATCHES), dtype=np.int64), np.zeros(N_PATCHES, dtype=np.int64)
        for thing in scene.things:
            covered = np.hypot(columns - thing.x, rows - thing.y) < SIZES[thing.size]
            covered[thing.patch] = True
            values = [names.index(getattr(thing, attribute)) + 1 for attribute, names in ATTRIBUTES.items()]
            covering[:, covered] = np.array(values)[:, None]
            for patch, word in thing.spelled.items():
                words[patch] = WORDS.index(word)
        return np.asarray(draw_scene(scene)), covering, words


class TaughtTower(nn.Module):
    """The tower with a linear read-out for each attribute at the auxiliary layer and one for words at the end (both
    thrown away afterwards)."""

    def __init__(self, tower: CLIPVisionModel):
        super().__init__()
        self.tower = tower
        width = tower.config.hidden_size
        self.attributes = nn.ModuleList(nn.Linear(width, 1 + len(names)) for names in ATTRIBUTES.values())
        self.words = nn.Linear(width, len(WORDS))

    def forward(self, pixel_values: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """float[B, 3, 224, 224] -> scores float[B, 196, classes] of each attribute, and of the words."""
        output = self.tower(pixel_values=pixel_values, output_hidden_states=True)
        early = output.hidden_states[AUXILIARY_LAYER][:, 1:]
        return [readout(early) for readout in self.attributes], self.words(output.last_hidden_state[:, 1:])


def patch_loss(scores: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of float[B, 196, classes] against int64[B, 196]; things count as much as the ground, which has 10 to 50
    times as many patches."""
    target = classes.flatten()
    losses = F.cross_entropy(scores.flatten(0, 1), target, reduction="none")
    return losses[target > 0].mean() + 3 * losses[target == 0].mean()


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
def accuracies(model: TaughtTower, processor: CLIPImageProcessorPil, n_scenes: int) -> str:
    """On held-out combinations: share of words spelled right, and of empty patches taken for a word, an image."""
    model.eval()
    right, spelled, false_words = torch.zeros(5), torch.zeros(5), 0
    for images, _, words in DataLoader(LabelledScenes(n_scenes, seed=999, held_out=True), batch_size=50):
        guesses = model(normalise(images, processor))[1].argmax(-1)  # (B, 196)
        right += torch.bincount(WORD_KIND[words[guesses == words]], minlength=6)[1:]
        spelled += torch.bincount(WORD_KIND[words].flatten(), minlength=6)[1:]
        false_words += int(((guesses > 0) & (words == 0)).sum())
    model.train()
    kinds = (*ATTRIBUTES, "column", "row")
    shares = ", ".join(f"{kind} {share:.1f} %" for kind, share in zip(kinds, (100 * right / spelled).tolist()))
    return f"held-out words spelled: {shares}; false words {false_words / n_scenes:.2f} an image"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out_dir", type=Path, default=Path("model/demo/vision_model"), help="where the tower is written"
    )
    parser.add_argument("--steps", type=int, default=2200, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=64, help="scenes in a step")
    parser.add_argument(
        "--learning_rate", type=float, default=1e-3, help="highest learning rate (warm-up, then cosine)"
    )
    parser.add_argument("--seed", type=int, default=1337, help="seed of the weights and the scenes")
    parser.add_argument(
        "--eval_scenes", type=int, default=400, help="held-out scenes it is measured on every 200 steps"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    config = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.copy_(0.3 * sincos_positions(config.hidden_size))
    model = TaughtTower(tower)
    processor = CLIPImageProcessorPil()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.1, cycle_momentum=False
    )
    scenes = LabelledScenes(args.steps * args.batch_size, args.seed)
    progress = tqdm(DataLoader(scenes, args.batch_size, num_workers=1), desc="tower", unit="step")
    for step, (images, covering, words) in enumerate(progress, start=1):
        attribute_scores, word_scores = model(normalise(images, processor))
        loss = 3 * patch_loss(word_scores, words)
        for index, scores in enumerate(attribute_scores):
            loss = loss + 0.5 * patch_loss(scores, covering[:, index])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % 200 == 0 or step == args.steps:
            progress.write(f"step {step}: loss {loss.item():.3f}; {accuracies(model, processor, args.eval_scenes)}")
            copy.deepcopy(tower).half().save_pretrained(args.out_dir)  # half precision: 1.8 MB
    processor.save_pretrained(args.out_dir)


if __name__ == "__main__":
    main()
