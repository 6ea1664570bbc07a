"""Train the demo's stand-in for lm_512.pth: a small language model that has read about scenes.

    python -m scripts.demo.train_base      # 35 minutes on 2 cores; writes model/demo/lm_128.pth

It reads dialogues about scenes in words. A picture is a text of cells, most of them " ."; a cell
with a thing says all its words *at once*: " large red circle C5" at one position, as the sum of the
embeddings. So each thing is one position, as it is among the 196 patches of the vision encoder, and
the demo's pretraining has a dictionary to learn, nothing more. Cells are few at first, 196 in the
end. Only training combinations occur. Run scripts.demo.train_tokenizer first. Seeded: the same
machine and number of threads give the same file again.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common.errors import run_command
from common.files import write_text
from common.flags import MOST_SEED, check_options, option, parse_flags
from dataset.scenes.scene import GRID, Scene
from dataset.scenes.text import LANGUAGES, QUESTION_TYPES, describe_thing
from dataset.scenes.write import dialogue_row, eval_row, text_row
from model.files import info_path
from model.LMConfig import IMAGE_TOKEN, LMConfig, VLMConfig
from model.model_lm import MiniMindLM
from model.processing import IGNORE_INDEX, VLMProcessor, check_conversation, load_tokenizer
from model.weights import describe_config, save_atomically

DIM, N_LAYERS = 128, 6
TOKENIZER, VISION_MODEL = "model/demo/tokenizer", "model/demo/vision_model"
N_PATCHES = GRID * GRID
# Batches drawn together and sorted by length, so that little is padded.
POOL = 16
# Rows whose scenes are described in a sentence.
PLAIN_TEXT_SHARE = 0.1
# What is learned slowest is asked most: to find a thing by its shape, to count.
DIALOGUE_TYPES = (*QUESTION_TYPES, "color", "color", "count", "in_image")


class Lesson(NamedTuple):
    n_cells: int  # of a picture
    question_types: tuple[str, ...]
    n_steps: int


# To find a thing by what is known of it comes first: all other answers are built on that.
LESSONS = (
    Lesson(4, ("color", "color", "shape", "size"), 500),
    Lesson(16, DIALOGUE_TYPES, 3500),
    Lesson(N_PATCHES, DIALOGUE_TYPES, 1700),
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
    ) -> tuple[list[int], list[int], list[list[int]]]:
        """(input_ids, labels, token ids of each cell of all scenes)."""
        input_ids, labels = self.processor.encode_turns(check_conversation(row["conversations"]))
        return input_ids, labels, [cell for scene in scenes for cell in self._cells(rng, scene)]

    def _cells(self, rng: random.Random, scene: Scene) -> list[list[int]]:
        """The words of n_cells of the 196 cells: all that hold a thing, and some that do not."""
        things = {thing.patch: thing for thing in scene.things}
        empty = [cell for cell in range(N_PATCHES) if cell not in things]
        empty = rng.sample(empty, self.n_cells - len(things))
        words = {
            cell: self._word_ids(" " + describe_thing(thing, "en"))
            for cell, thing in things.items()
        }
        return [words.get(cell, self.nothing) for cell in sorted([*things, *empty])]

    def _word_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


class Batch(NamedTuple):
    """B dialogues, padded to T tokens."""

    input_ids: torch.Tensor  # int64[B, T]
    labels: torch.Tensor  # int64[B, T]
    cells: torch.Tensor  # int64[n, 5], 0: no word


def collate(samples: list[tuple[list[int], list[int], list[list[int]]]]) -> Batch:
    input_ids, labels, cells = (list(column) for column in zip(*samples))
    # A batch may be plain text throughout.
    cells = [cell for row in cells for cell in row] or [[0]]
    return Batch(
        pad_sequence([torch.tensor(row) for row in input_ids], batch_first=True),
        pad_sequence(
            [torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORE_INDEX
        ),
        pad_sequence([torch.tensor(cell) for cell in cells], batch_first=True),
    )


def sample_batches(
    reader: SceneReader, rng: random.Random, types: tuple[str, ...], batch_size: int
) -> Iterator[Batch]:
    """Dialogues without end.

    Args:
        reader: of the lesson.
        rng: draws scenes, questions and the order.
        types: of questions.
        batch_size: dialogues in a batch.
    """
    while True:
        samples = []
        for _ in range(POOL * batch_size):
            is_plain = rng.random() < PLAIN_TEXT_SHARE
            language = rng.choice(LANGUAGES)
            if is_plain:
                row, scenes = text_row(rng, language, DIALOGUE_TYPES)
            else:
                row, scenes = dialogue_row(rng, language, types)
            samples.append(reader.read(rng, row, scenes))
        samples.sort(key=lambda sample: len(sample[0]))
        starts = range(0, len(samples), batch_size)
        batches = [samples[start : start + batch_size] for start in starts]
        rng.shuffle(batches)
        yield from map(collate, batches)


def label_logits(
    model: MiniMindLM, config: VLMConfig, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits float[n, vocab_size], labels int64[n]) of the label tokens."""
    # a cell's words at once: (cells, dim)
    words = model.tok_embeddings.weight
    summed = F.embedding_bag(batch.cells, words, mode="sum", padding_idx=0)
    is_cell = (batch.input_ids == config.image_token_id).unsqueeze(-1)  # (B, T, 1)
    embeddings = model.tok_embeddings(batch.input_ids).masked_scatter(is_cell, summed)
    labels = batch.labels[:, 1:]
    is_label = labels != IGNORE_INDEX
    return model.output(model.run_layers(embeddings)[:, :-1][is_label]), labels[is_label]


@torch.no_grad()
def describe_accuracy(model: MiniMindLM, reader: SceneReader, n_rows: int) -> str:
    """Exact answers about held-out scenes, given the right words so far."""
    rng = random.Random(999)
    right = dict.fromkeys(QUESTION_TYPES, 0)
    for index in range(n_rows):
        language = LANGUAGES[index // len(QUESTION_TYPES) % len(LANGUAGES)]
        row, scenes = eval_row(rng, language, QUESTION_TYPES[index % len(QUESTION_TYPES)])
        batch = collate([reader.read(rng, row, scenes)])
        logits, labels = label_logits(model, reader.config, batch)
        right[row["type"]] += bool((logits.argmax(-1) == labels).all())
    shares = ", ".join(f"{name} {100 * len(right) * n / n_rows:.0f}" for name, n in right.items())
    overall = 100 * sum(right.values()) / n_rows
    return f"held-out, {reader.n_cells} cells: {overall:.1f} % ({shares})"


def trapezoid(step: int, total_steps: int) -> float:
    """Factor of the learning rate: up in 50 steps, level, down in the last sixth."""
    return min(1, (step + 1) / 50, max(0.02, 6 * (total_steps - step) / total_steps))


def save(model: MiniMindLM, path: Path, step: int) -> None:
    """Half of save_weights' size: float16. The JSON says what it says of a training's weights."""
    info = {
        "config": describe_config(model.config),
        "tokenizer": TOKENIZER,
        "vision_model": VISION_MODEL,
        "stage": "lm",
        "data": [],
        "step": step,
        "val_loss": None,
    }
    write_text(info_path(path), json.dumps(info, indent=1) + "\n")
    save_atomically({name: weight.half() for name, weight in model.state_dict().items()}, path)


@dataclass(frozen=True)
class Settings:
    """Options of `python -m scripts.demo.train_base`."""

    out_file: str = option(f"model/demo/lm_{DIM}.pth", "where the weights go")
    batch_size: int = option(16, "dialogues in a step", least=1, most=4096)
    learning_rate: float = option(
        2e-3, "highest, of AdamW; Muon's is 1.5 times that", least=0, most=1000
    )
    max_steps: int | None = option(
        None, "stop after this many steps; after all if not given", least=1, most=1_000_000_000
    )
    seed: int = option(7, "of the rows and the random weights", least=0, most=MOST_SEED)
    eval_rows: int = option(
        320, "held-out questions asked every 500 steps", least=1, most=1_000_000
    )

    def __post_init__(self):
        check_options(self)


def main() -> None:
    args = parse_flags(Settings(), __doc__)
    path = Path(args.out_file)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = load_tokenizer(TOKENIZER)
    model = MiniMindLM(LMConfig(dim=DIM, n_layers=N_LAYERS, vocab_size=len(tokenizer)))

    # Muon (Jordan et al. 2024) for the layers' matrices: with it the layers learn a little faster
    # than with AdamW (dev/LOG.md).
    matrices = [weight for weight in model.layers.parameters() if weight.ndim == 2]
    is_matrix = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in is_matrix]
    muon = torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, weight_decay=0.01, fused=True)
    # Each with its highest learning rate.
    optimizers = {muon: 1.5 * args.learning_rate, adamw: args.learning_rate}

    def batches() -> Iterator[tuple[SceneReader, Batch]]:
        """One lesson after the other."""
        for lesson in LESSONS:
            reader = SceneReader(tokenizer, lesson.n_cells)
            drawn = sample_batches(reader, rng, lesson.question_types, args.batch_size)
            for _, batch in zip(range(lesson.n_steps), drawn):
                yield reader, batch

    # train
    total_steps = min(sum(lesson.n_steps for lesson in LESSONS), args.max_steps or 10**9)
    mean_loss = 0.0
    progress = tqdm(range(total_steps), desc="base", unit="step")
    for step, (reader, batch) in zip(progress, batches()):
        # gradients
        loss = F.cross_entropy(*label_logits(model, reader.config, batch))
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        # update
        for optimizer, highest in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = highest * trapezoid(step, total_steps)
            optimizer.step()

        # now and then: show and save
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 50)
        progress.set_postfix(loss=f"{mean_loss:.3f}")
        if (step + 1) % 500 == 0 or step + 1 == total_steps:
            accuracy = describe_accuracy(model, reader, args.eval_rows)
            progress.write(f"step {step + 1}: loss {mean_loss:.3f}; {accuracy}")
            save(model, path, step + 1)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
