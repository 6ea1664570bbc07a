"""The published training recipe: one row of `python -m scripts.bench train`.

What it does on purpose: every sample is padded to --max_seq_len. All of CLIP is loaded, and its
vision half runs in every step. The head is computed at every position and masked afterwards. Image
features are spliced in sample by sample. Samples come in the order of the file. Loader processes
make float pixels through CLIP's processor. The dtype is float32 on a CPU and autocast on a GPU, and
nothing is compiled. --levers replaces single parts by ours. Prints one JSON object.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

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
from trainer.runtime import peak_process_memory
from trainer.schedule import cosine

LEVERS = ("bf16", "trim", "head", "vision_half", "cache")


class PublishedDataset(Dataset):
    """Rows held in memory as parsed JSON; a sample is tokenized when it is asked for.

    Args:
        path: of the .jsonl.
        args: max_seq_len and images_path.
        tokenizer: with its chat template.
        image_processor: CLIP's.
        config: of the model, for the text that stands for an image.
        n_beyond: labels after an answer's end; published is one, the line break.
    """

    def __init__(
        self, path: str, args, tokenizer, image_processor, config: VLMConfig, n_beyond: int = 1
    ):
        self.rows = list(map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()))
        self.args, self.tokenizer, self.image_processor = args, tokenizer, image_processor
        self.config, self.n_beyond = config, n_beyond
        self.bos = tokenizer("<s>assistant", add_special_tokens=False).input_ids
        self.eos = tokenizer("</s>", add_special_tokens=False).input_ids

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """(input_ids, targets, mask, pixels): int64[T - 1] each, float[images, 1, 3, H, W]."""
        # text
        row, image_text = self.rows[index], self.config.image_special_token
        contents = [turn["content"].replace("<image>", image_text) for turn in row["conversations"]]
        messages = [
            {"role": ("user", "assistant")[n % 2], "content": content}
            for n, content in enumerate(contents)
        ]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        input_ids = self.tokenizer(text).input_ids[: self.args.max_seq_len]
        input_ids += [0] * (self.args.max_seq_len - len(input_ids))
        mask = self._mask_answers(input_ids)

        # images
        pixels = []
        for name in row["image"].split(","):
            image = Image.open(f"{self.args.images_path}/{name.strip()}")
            pixels.append(self.image_processor(image, return_tensors="pt")["pixel_values"])
        shifted = input_ids[:-1], input_ids[1:], mask[1:]
        return (*map(torch.tensor, shifted), torch.stack(pixels))

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
            last = min(end + len(self.eos) + self.n_beyond, len(input_ids))
            for answer in range(start + 1, last):
                mask[answer] = 1
            position = end + len(self.eos)
        return mask


def build_model(args) -> tuple[MiniMindVLM, nn.Module, object]:
    """(model without a vision encoder, vision encoder, image processor)."""
    # vision encoder
    vision_encoder, image_processor = load_vision_encoder(args.vision_model)
    if "vision_half" not in args.levers:
        # The text half takes its place in memory too.
        vision_encoder.text_half = CLIPModel(CLIPConfig()).text_model.requires_grad_(False).eval()
    if "bf16" in args.levers:
        vision_encoder.to(torch.bfloat16)

    # language model
    vocab_size = len(load_tokenizer(args.tokenizer))
    config = VLMConfig.for_vision_encoder(
        vision_encoder, dim=args.dim, n_layers=args.n_layers, vocab_size=vocab_size
    )
    model = MiniMindVLM(config)
    if args.init_weights != "none":
        load_weights(model, read_weights(args.init_weights), args.init_weights, language_only=True)

    # what is trainable
    last_layer = f"layers.{args.n_layers - 1}."
    trainable = ("vision_proj.", last_layer) if args.stage == "pretrain" else ("",)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trainable))
    return model.to(args.device), vision_encoder.to(args.device), image_processor


class PublishedLoss:
    """The loss of a batch the published way, but for the parts in `args.levers`."""

    def __init__(self, args, model: MiniMindVLM, vision_encoder: nn.Module):
        self.args, self.model, self.vision_encoder = args, model, vision_encoder
        is_bf16 = args.device != "cpu" or "bf16" in args.levers
        self.dtype = torch.bfloat16 if is_bf16 else torch.float32
        self.cached: torch.Tensor | None = None

    def __call__(self, input_ids, targets, mask, pixels) -> torch.Tensor:
        """float[], the mean over the label tokens.

        Args:
            input_ids, targets, mask: int64[B, T] each.
            pixels: float[B, images, 1, 3, H, W].
        """
        levers, projector = self.args.levers, self.model.vision_proj
        is_bf16 = self.dtype == torch.bfloat16
        device = self.args.device.split(":")[0]
        with torch.autocast(device, self.dtype) if is_bf16 else nullcontext():
            if "trim" in levers:
                longest = int((input_ids != 0).sum(1).max())
                input_ids, targets, mask = (x[:, :longest] for x in (input_ids, targets, mask))

            # images
            pixels = pixels.flatten(0, 2)  # (B * images, 3, H, W)
            is_there = self.cached is not None and len(self.cached) == len(pixels)
            if "cache" not in levers or not is_there:
                self.cached = patch_features(self.vision_encoder, pixels)
            patches = projector(self.cached.to(projector.vision_proj[0].weight.dtype))
            patches = patches.unflatten(0, (len(input_ids), -1))  # (B, images, patches, dim)

            # language model and head
            embeddings = self._splice(self.model.tok_embeddings(input_ids), input_ids, patches)
            hidden = MiniMindLM.run_layers(self.model, embeddings)
            if "head" in levers:
                logits = self.model.output(hidden[mask > 0])  # (label tokens, vocab_size)
                return F.cross_entropy(logits.float(), targets[mask > 0])
            logits = self.model.output(hidden).flatten(0, 1)  # (B * T, vocab_size)
            losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
            return (losses * mask.flatten()).sum() / mask.sum()

    def _splice(
        self, embeddings: torch.Tensor, input_ids: torch.Tensor, patches: torch.Tensor
    ) -> torch.Tensor:
        """Put float[B, images, patches, dim] where image tokens are, by concatenation."""
        config, rows = self.model.config, []
        size, n_images = config.n_image_tokens, patches.shape[1]
        wanted = torch.tensor(config.image_ids, device=input_ids.device)
        matches = (input_ids.unfold(1, size, 1) == wanted).all(dim=2)  # (B, T - size + 1)
        for index, row in enumerate(embeddings):
            for number, start in enumerate(matches[index].nonzero()[:, 0].tolist()[:n_images]):
                row = torch.cat((row[:start], patches[index, number], row[start + size :]))
            rows.append(row)
        return torch.stack(rows)

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
    add = parser.add_argument
    add("--stage", choices=("pretrain", "sft"), required=True, help="what is trainable")
    add("--levers", nargs="*", choices=LEVERS, default=[], help="parts that are ours")
    add("--max_steps", type=int, default=10**9, help="optimizer steps, the first not counted")
    add("--num_workers", type=int, default=8, help="processes that read data")
    same = "as in the training scripts"
    for name in ("dim", "n_layers", "batch_size", "max_seq_len"):
        add(f"--{name}", type=int, required=True, help=same)
    for name in ("data_path", "images_path", "tokenizer", "vision_model", "device"):
        add(f"--{name}", required=True, help=same)
    add("--learning_rate", type=float, default=4e-4, help=same)
    add("--init_weights", default="none", help=same)
    add("--val_data", help="rows for a validation loss at the end, with images of --images_path")
    add("--seed", type=int, default=0, help="of random weights; the order is that of the file")
    return parser.parse_args()


def main() -> None:
    # model and data
    args = parse_args()
    torch.manual_seed(args.seed)
    model, vision_encoder, image_processor = build_model(args)
    tokenizer, is_cuda = load_tokenizer(args.tokenizer), args.device != "cpu"

    def open_rows(path: str, n_beyond: int = 1) -> DataLoader:
        data = PublishedDataset(path, args, tokenizer, image_processor, model.config, n_beyond)
        return DataLoader(data, args.batch_size, num_workers=args.num_workers, pin_memory=is_cuda)

    loader = open_rows(args.data_path)
    total_steps = min(args.max_steps, len(loader))
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate)
    loss_of, losses = PublishedLoss(args, model, vision_encoder), []

    # train
    model.train()
    n_images = n_labels = n_tokens = n_places = 0
    start = 0.0
    for step, batch in zip(range(total_steps), loader):
        # The first step fills allocators and waits for the workers, so it is not timed.
        if step == 1:
            if is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        input_ids, targets, mask, pixels = (tensor.to(args.device) for tensor in batch)
        optimizer.param_groups[0]["lr"] = cosine(step, total_steps, args.learning_rate)
        loss = loss_of(input_ids, targets, mask, pixels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step > 0:
            n_images += pixels.shape[:2].numel()
            n_labels += int(mask.sum())
            n_tokens += int((input_ids != 0).sum())
            n_places += input_ids.numel()
    if is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start

    # report
    result = {
        "images_per_second": n_images / seconds,
        "label_tokens_per_second": n_labels / seconds,
        "tokens_per_second": n_places / seconds,
        "padding_share": 1 - n_tokens / max(n_places, 1),
        "peak_memory_bytes": torch.cuda.max_memory_allocated()
        if is_cuda
        else peak_process_memory(),
        "dtype": str(loss_of.dtype).removeprefix("torch."),
        "losses": torch.stack(losses).tolist(),
    }
    if args.val_data:
        # The labels of ours.
        result["val_loss"] = loss_of.validate(open_rows(args.val_data, n_beyond=0))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
