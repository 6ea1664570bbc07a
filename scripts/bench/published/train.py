"""The published recipe of early 2025, in our own words, to measure against: one row of `scripts/bench.py train`.

What it does on purpose: every sample is padded to --max_seq_len, all of CLIP is loaded and its vision half run in every step, the
head is computed at every position and masked afterwards, pictures are spliced in one sample at a time, samples come in
the order of the file, worker processes make float pixels through CLIPProcessor, numbers are float32 on a CPU and
autocast on a GPU, nothing is compiled. `--levers` replaces single parts by ours. Prints one JSON object.
"""

import argparse
import json
import resource
import time
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).parents[3]

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPConfig, CLIPModel

from model.LMConfig import VLMConfig
from model.model_lm import MiniMindLM
from model.model_vlm import MiniMindVLM
from model.processing import load_tokenizer
from model.vision import load_vision_encoder, patch_features
from model.weights import load_weights, read_weights
from trainer.loop import learning_rate

LEVERS = ("bf16", "trim", "head", "vision_half", "cache")


class PublishedDataset(Dataset):
    """Rows held in memory as parsed JSON; each sample tokenised by the chat template and padded to max_length when asked for."""

    def __init__(
        self, path: str, args, tokenizer, image_processor, config: VLMConfig, n_beyond: int = 1
    ):
        self.n_beyond = n_beyond  # tokens learned after an answer's end: published, the line break
        self.rows = [
            json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()
        ]
        self.args, self.tokenizer, self.image_processor, self.config = (
            args,
            tokenizer,
            image_processor,
            config,
        )
        self.bos = tokenizer("<s>assistant", add_special_tokens=False).input_ids
        self.eos = tokenizer("</s>", add_special_tokens=False).input_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        row, placeholder = self.rows[index], self.config.image_special_token
        messages = [
            {
                "role": ("user", "assistant")[n % 2],
                "content": turn["content"].replace("<image>", placeholder),
            }
            for n, turn in enumerate(row["conversations"])
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        input_ids = self.tokenizer(text).input_ids[: self.args.max_seq_len]
        input_ids += [0] * (self.args.max_seq_len - len(input_ids))
        mask = self._mask_answers(input_ids)
        images = [
            self.image_processor(
                Image.open(f"{self.args.images_path}/{name.strip()}"), return_tensors="pt"
            )["pixel_values"]
            for name in row["image"].split(",")
        ]
        return (
            torch.tensor(input_ids[:-1]),
            torch.tensor(input_ids[1:]),
            torch.tensor(mask[1:]),
            torch.stack(images),
        )

    def _mask_answers(self, input_ids: list[int]) -> list[int]:
        """1 at the tokens of answers and their end, found by going through the ids one by one."""
        mask, position = [0] * len(input_ids), 0
        while position < len(input_ids):
            if input_ids[position : position + len(self.bos)] != self.bos:
                position += 1
                continue
            start = end = position + len(self.bos)
            while end < len(input_ids) and input_ids[end : end + len(self.eos)] != self.eos:
                end += 1
            for answer in range(
                start + 1, min(end + len(self.eos) + self.n_beyond, len(input_ids))
            ):
                mask[answer] = 1
            position = end + len(self.eos)
        return mask


def splice(
    embeddings: torch.Tensor, input_ids: torch.Tensor, patches: torch.Tensor, config: VLMConfig
) -> torch.Tensor:
    """Replace runs of placeholders sample by sample, by concatenation; patches float[B, images, n_image_tokens, dim]."""
    size, rows = config.n_image_tokens, []
    wanted = torch.tensor(config.image_ids, device=input_ids.device)
    matches = (input_ids.unfold(1, size, 1) == wanted).all(dim=2)
    for index, row in enumerate(embeddings):
        for number, start in enumerate(matches[index].nonzero()[:, 0].tolist()[: patches.shape[1]]):
            row = torch.cat((row[:start], patches[index, number], row[start + size :]))
        rows.append(row)
    return torch.stack(rows)


def build(args) -> tuple[MiniMindVLM, nn.Module, object, VLMConfig]:
    """(model without a vision encoder, vision_encoder, image processor, config) with random weights and what the stage learns."""
    vision_encoder, image_processor = load_vision_encoder(args.vision_model)
    if "vision_half" not in args.levers:  # the text half takes its place in memory too
        vision_encoder.text_half = CLIPModel(CLIPConfig()).text_model.requires_grad_(False).eval()
    tokenizer = load_tokenizer(args.tokenizer)
    config = VLMConfig.for_vision_encoder(
        vision_encoder.config, dim=args.dim, n_layers=args.n_layers, vocab_size=len(tokenizer)
    )
    model = MiniMindVLM(config)
    if args.init_weights != "none":
        load_weights(model, read_weights(args.init_weights), args.init_weights, language_only=True)
    learned = (
        ("vision_proj.", f"layers.{args.n_layers - 1}.") if args.stage == "pretrain" else ("",)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(learned))
    return model.to(args.device), vision_encoder.to(args.device), image_processor, config


class PublishedLoss:
    """The loss of a batch the published way, with the levers that are pulled."""

    def __init__(self, args, model: MiniMindVLM, vision_encoder: nn.Module, config: VLMConfig):
        self.args, self.model, self.tower, self.config = args, model, vision_encoder, config
        uses_bf16 = args.device != "cpu" or "bf16" in args.levers
        if "bf16" in args.levers:
            vision_encoder.to(torch.bfloat16)
        self.dtype = torch.bfloat16 if uses_bf16 else torch.float32
        self.cached: torch.Tensor | None = None

    def __call__(self, input_ids, targets, mask, pixel_values) -> torch.Tensor:
        """float[]: mean over the label tokens. int64[B, T] each, pixel_values float[B, images, 1, 3, H, W]."""
        uses_bf16 = self.dtype == torch.bfloat16
        with (
            torch.autocast(self.args.device.split(":")[0], self.dtype)
            if uses_bf16
            else nullcontext()
        ):
            if "trim" in self.args.levers:
                longest = int((input_ids != 0).sum(1).max())
                input_ids, targets, mask = (
                    input_ids[:, :longest],
                    targets[:, :longest],
                    mask[:, :longest],
                )
            pixels = pixel_values.flatten(0, 2)  # (B * images, 3, H, W)
            if (
                "cache" not in self.args.levers
                or self.cached is None
                or len(self.cached) != len(pixels)
            ):
                self.cached = patch_features(self.tower, pixels)
            patches = self.model.vision_proj(
                self.cached.to(self.model.vision_proj.vision_proj[0].weight.dtype)
            )
            patches = patches.unflatten(0, (len(input_ids), -1))  # (B, images, patches, dim)
            embeddings = splice(
                self.model.tok_embeddings(input_ids), input_ids, patches, self.config
            )
            hidden = MiniMindLM.run_layers(self.model, embeddings)
            if "head" in self.args.levers:
                return F.cross_entropy(
                    self.model.output(hidden[mask > 0]).float(), targets[mask > 0]
                )
            losses = F.cross_entropy(
                self.model.output(hidden).flatten(0, 1), targets.flatten(), reduction="none"
            )
            return (losses * mask.flatten()).sum() / mask.sum()

    @torch.no_grad()
    def validate(self, loader: DataLoader) -> float:
        """Mean over all label tokens of the loader."""
        total = n_labels = 0.0
        for batch in loader:
            count = int(batch[2].sum())
            total, n_labels = total + self(*batch).item() * count, n_labels + count
        return total / n_labels


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("pretrain", "sft"), required=True, help="what learns")
    parser.add_argument(
        "--levers", nargs="*", choices=LEVERS, default=[], help="parts that are ours"
    )
    parser.add_argument(
        "--max_steps", type=int, default=10**9, help="optimizer steps, the first not counted"
    )
    parser.add_argument("--num_workers", type=int, default=8, help="processes that read data")
    for name, kind in (("dim", int), ("n_layers", int), ("batch_size", int), ("max_seq_len", int), ("data_path", str),
                       ("images_path", str), ("tokenizer", str), ("vision_model", str), ("device", str)):  # fmt: skip
        parser.add_argument(
            f"--{name}", type=kind, required=True, help="as in the training scripts"
        )
    parser.add_argument(
        "--learning_rate", type=float, default=4e-4, help="as in the training scripts"
    )
    parser.add_argument("--init_weights", default="none", help="as in the training scripts")
    parser.add_argument(
        "--val_data", help="rows for a validation loss at the end, with pictures of --images_path"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of fresh weights; rows come in the order of the file",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    model, vision_encoder, image_processor, config = build(args)
    tokenizer, is_cuda = load_tokenizer(args.tokenizer), args.device != "cpu"

    def open_rows(path: str, n_beyond: int = 1) -> DataLoader:
        dataset = PublishedDataset(path, args, tokenizer, image_processor, config, n_beyond)
        return DataLoader(
            dataset, args.batch_size, num_workers=args.num_workers, pin_memory=is_cuda
        )

    loader = open_rows(args.data_path)
    total_steps = min(args.max_steps, len(loader))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.learning_rate
    )
    loss_of, curve = PublishedLoss(args, model, vision_encoder, config), []
    model.train()
    n_images = n_labels = n_tokens = n_places = 0
    start = 0.0
    for step, batch in zip(range(total_steps), loader):
        if step == 1:  # the first one fills allocators and waits for the workers
            if is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        input_ids, targets, mask, pixel_values = (tensor.to(args.device) for tensor in batch)
        optimizer.param_groups[0]["lr"] = learning_rate(step, total_steps, args.learning_rate)
        loss = loss_of(input_ids, targets, mask, pixel_values)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.append(loss.detach())
        if step > 0:
            n_images, n_labels = (
                n_images + pixel_values.shape[:2].numel(),
                n_labels + int(mask.sum()),
            )
            n_tokens += int((input_ids != 0).sum())
            n_places += input_ids.numel()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = (
        torch.cuda.max_memory_allocated()
        if is_cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    result = {
        "images_per_second": n_images / seconds,
        "label_tokens_per_second": n_labels / seconds,
        "tokens_per_second": n_places / seconds,
        "padding_share": 1 - n_tokens / n_places,
        "peak_memory_bytes": peak,
        "dtype": str(loss_of.dtype).removeprefix("torch."),
        "losses": torch.stack(curve).tolist(),
    }
    if args.val_data:
        result["val_loss"] = loss_of.validate(
            open_rows(args.val_data, n_beyond=0)
        )  # the labels of ours
    print(json.dumps(result))


if __name__ == "__main__":
    main()
