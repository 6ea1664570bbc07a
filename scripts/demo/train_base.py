"""Train the demo's stand-in for lm_512.pth: a small language model that has read about scenes and never saw one.

    python -m scripts.demo.train_base             # about 35 minutes on 2 cores; writes model/demo/lm_128.pth

It reads dialogues about scenes in words. A picture is a text of cells, most of them " ."; a cell with a thing says all its
words *at once* (" large red circle C5" at one position: the sum of the embeddings). So each thing is one position,
as it is among the 196 patches of the vision encoder, and the demo's pretraining has a dictionary to learn, nothing more. Cells
are few at first, 196 in the end. Only training combinations occur. Run scripts/train_demo_tokenizer.py first. Seeded: the same
machine and number of threads give the same file again.
"""

import argparse
import random
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dataset.scenes.scene import GRID, Scene
from dataset.scenes.text import QUESTION_TYPES, describe_thing
from dataset.scenes.write import DIALOGUE_TYPES, dialogue_row, eval_row, text_row
from model.LMConfig import IMAGE_TOKEN, VLMConfig
from model.model_lm import MiniMindLM
from model.processing import IGNORE_INDEX, VLMProcessor, check_conversation, load_tokenizer
from model.weights import save_atomically
from scripts.demo.__main__ import DIM, N_LAYERS, STAND_INS

N_PATCHES = GRID * GRID


class Stage(NamedTuple):
    n_cells: int  # of a picture
    question_types: tuple[str, ...]
    steps: int


STAGES = (  # to find a thing by what is known of it comes first: all other answers are built on that
    Stage(4, ("color", "color", "shape", "size"), 500),
    Stage(16, DIALOGUE_TYPES, 3500),
    Stage(N_PATCHES, DIALOGUE_TYPES, 1700),
)
POOL = 16  # batches drawn together and sorted by length, so that little is padded
PLAIN_TEXT_SHARE = (
    0.1  # rows whose scenes are described in a sentence, as in the demo's lm_data.jsonl
)


class SceneReader:
    """Turns dialogues about scenes into token ids and the words of every cell."""

    def __init__(self, tokenizer, n_cells: int):
        self.config = VLMConfig(image_special_token=IMAGE_TOKEN * n_cells)
        self.processor = VLMProcessor(tokenizer, None, self.config)
        self.tokenizer, self.n_cells = tokenizer, n_cells
        self.nothing = self._word_ids(" .")

    def read(
        self, rng: random.Random, row: dict, scenes: tuple[Scene, ...]
    ) -> tuple[list[int], list[int], list]:
        """(input_ids, labels, cells of all scenes as lists of token ids)."""
        input_ids, labels = self.processor.encode_turns(check_conversation(row["conversations"]))
        return input_ids, labels, [cell for scene in scenes for cell in self._cells(rng, scene)]

    def _cells(self, rng: random.Random, scene: Scene) -> list[list[int]]:
        """The words of n_cells of the 196 cells, in reading order: all that hold a thing, and some that do not."""
        things = {thing.patch: thing for thing in scene.things}
        empty = rng.sample(
            [cell for cell in range(N_PATCHES) if cell not in things], self.n_cells - len(things)
        )
        said = {
            cell: self._word_ids(" " + describe_thing(thing, "en"))
            for cell, thing in things.items()
        }
        return [said.get(cell, self.nothing) for cell in sorted([*things, *empty])]

    def _word_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def collate(
    samples: list[tuple[list[int], list[int], list]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids int64[B, T], labels int64[B, T], cells int64[n, 5] with 0 where a cell says less than five words."""
    columns = list(zip(*samples))
    cells = [cell for cells in columns[2] for cell in cells] or [
        [0]
    ]  # a batch may be plain text throughout
    return (
        pad_sequence([torch.tensor(input_ids) for input_ids in columns[0]], batch_first=True),
        pad_sequence(
            [torch.tensor(labels) for labels in columns[1]],
            batch_first=True,
            padding_value=IGNORE_INDEX,
        ),
        pad_sequence([torch.tensor(cell) for cell in cells], batch_first=True),
    )


def label_scores(
    model: MiniMindLM,
    config: VLMConfig,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    cells: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores float[N, vocab], labels int64[N]) at the positions before a label."""
    words = model.tok_embeddings.weight
    spoken = F.embedding_bag(
        cells, words, mode="sum", padding_idx=0
    )  # (n, dim): a cell's words at once
    is_cell = (input_ids == config.image_token_id).unsqueeze(-1)  # (B, T, 1)
    embeddings = model.tok_embeddings(input_ids).masked_scatter(is_cell, spoken)
    is_label = labels[:, 1:] != IGNORE_INDEX
    return model.output(model.run_layers(embeddings)[:, :-1][is_label]), labels[:, 1:][is_label]


def sample_batches(
    reader: SceneReader, rng: random.Random, types: tuple[str, ...], batch_size: int
):
    while True:
        samples = []
        for index in range(POOL * batch_size):
            is_plain = rng.random() < PLAIN_TEXT_SHARE
            samples.append(
                reader.read(
                    rng, *(text_row(rng, index) if is_plain else dialogue_row(rng, index, types))
                )
            )
        samples.sort(key=lambda sample: len(sample[0]))
        batches = [
            samples[start : start + batch_size] for start in range(0, len(samples), batch_size)
        ]
        rng.shuffle(batches)
        yield from map(collate, batches)


@torch.no_grad()
def accuracies(model: MiniMindLM, reader: SceneReader, n_rows: int) -> str:
    """Exact answers about held-out scenes, given the right words so far."""
    rng = random.Random(999)
    right = dict.fromkeys(QUESTION_TYPES, 0)
    for index in range(n_rows):
        row, scenes = eval_row(rng, index)
        scores, labels = label_scores(
            model, reader.config, *collate([reader.read(rng, row, scenes)])
        )
        right[row["type"]] += bool((scores.argmax(-1) == labels).all())
    shares = ", ".join(f"{name} {100 * len(right) * n / n_rows:.0f}" for name, n in right.items())
    return (
        f"held-out, {reader.n_cells} cells: {100 * sum(right.values()) / n_rows:.1f} % ({shares})"
    )


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """Up in 50 steps, level, down to nearly nothing in the last sixth."""
    return peak * min(1, (step + 1) / 50, max(0.02, 6 * (total_steps - step) / total_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out_file",
        type=Path,
        default=STAND_INS / "lm_128.pth",
        help="where the weights are written",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="dialogues in a step")
    parser.add_argument(
        "--learning_rate", type=float, default=2e-3, help="of AdamW; Muon's is 1.5 times that"
    )
    parser.add_argument("--max_steps", type=int, default=None, help="stop after this many steps")
    parser.add_argument("--seed", type=int, default=7, help="seed of the rows and the weights")
    parser.add_argument(
        "--eval_rows", type=int, default=320, help="held-out questions after each 500 steps"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = load_tokenizer(STAND_INS / "tokenizer")
    model = MiniMindLM(VLMConfig(dim=DIM, n_layers=N_LAYERS, vocab_size=len(tokenizer)))
    # Muon (Jordan et al. 2024) for the layers' matrices: with it the layers learn a little faster than with AdamW (dev/LOG.md).
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    others = [
        weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)
    ]
    optimizers = {
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"): 1.5
        * args.learning_rate,
        torch.optim.AdamW(others, weight_decay=0.01, fused=True): args.learning_rate,
    }
    total_steps = min(sum(stage.steps for stage in STAGES), args.max_steps or 10**9)
    plan = (
        (reader, batch)
        for stage in STAGES
        for reader in [SceneReader(tokenizer, stage.n_cells)]
        for _, batch in zip(
            range(stage.steps), sample_batches(reader, rng, stage.question_types, args.batch_size)
        )
    )
    mean_loss = 0.0
    progress = tqdm(range(total_steps), desc="base", unit="step")
    for step, (reader, batch) in zip(progress, plan):
        loss = F.cross_entropy(*label_scores(model, reader.config, *batch))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, peak)
            optimizer.step()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        progress.set_postfix(loss=f"{mean_loss:.3f}")
        if (step + 1) % 500 == 0 or step + 1 == total_steps:
            progress.write(
                f"step {step + 1}: loss {mean_loss:.3f}; {accuracies(model, reader, args.eval_rows)}"
            )
            save_atomically(
                {name: weight.half() for name, weight in model.state_dict().items()}, args.out_file
            )
    print(f"{args.out_file}: {args.out_file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
