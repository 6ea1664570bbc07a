"""Which samples come together, and how they become tensors."""

import io
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import BadSampleError
from common.files import hash_bytes, read_image_bytes
from model.model_vlm import find_image_tokens
from model.processing import IGNORE_INDEX, find_labels
from trainer.sampler import StepBatches


@dataclass
class Batch:
    """Samples padded on the right to the longest of them."""

    input_ids: torch.Tensor  # int64[B, T]
    labels: torch.Tensor  # int64[B, T]
    indices: list[int]  # which samples these are
    digests: list[bytes] = field(default_factory=list)  # of the files of the k images, in order
    is_cached: torch.Tensor | None = (
        None  # bool[k] on the host: whose features came from the cache; None without images
    )
    pixels: torch.Tensor | None = (
        None  # uint8[m, 3, H, W] of the images that the vision encoder has to see
    )
    cached_features: torch.Tensor | None = None  # 16 bits [k - m, patches, width] of the others
    image_token_indices: torch.Tensor | None = (
        None  # int64[k * n_image_tokens], see find_image_tokens
    )
    label_indices: torch.Tensor | None = None  # int64[n], see find_labels
    n_tokens: int = 0  # without padding
    skipped: Counter = field(default_factory=Counter)  # samples left out, by reason

    @property
    def n_labels(self) -> int:
        """Label tokens that the loss is a mean over."""
        return 0 if self.label_indices is None else len(self.label_indices)

    @property
    def n_padding(self) -> int:
        return self.input_ids.numel() - self.n_tokens

    def model_inputs(self) -> dict:
        """What the model's forward takes to give a loss, but for the image features."""
        names = ("input_ids", "labels", "image_token_indices", "label_indices")
        return {name: getattr(self, name) for name in names} | {"return_logits": False}

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        names = (
            "input_ids",
            "labels",
            "image_token_indices",
            "label_indices",
            "pixels",
            "cached_features",
        )
        tensors = {name: getattr(self, name) for name in names}
        return replace(
            self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None}
        )

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader, so that `to` need not wait."""
        return self._map(torch.Tensor.pin_memory)


class TrainSamples(Dataset):
    """Samples with each image as (digest, cached features or uint8 pixels); a bad one comes out as (index, reason) in
    place of stopping the run."""

    def __init__(self, dataset, find_features: Callable[[bytes], torch.Tensor | None]):
        self.dataset, self.find_features = dataset, find_features

    def __getitem__(self, index: int) -> tuple[int, dict | str]:
        try:
            sample, images = self.dataset.read_text(index)
            return index, sample | {"images": [self._read_image(image) for image in images]}
        except BadSampleError as error:
            return index, error.args[0]

    def _read_image(self, image: Path | io.BytesIO) -> tuple[bytes, torch.Tensor]:
        encoded = read_image_bytes(image)
        digest = hash_bytes(encoded)
        features = self.find_features(digest)
        return digest, self.dataset.processor.resize(
            io.BytesIO(encoded)
        ) if features is None else features

    def collate(self, samples: list[tuple[int, dict | str]]) -> Batch:
        """Pad and join; without a single good sample, a blank row that has no label and so teaches nothing."""
        skipped = Counter(sample for _, sample in samples if isinstance(sample, str))
        good = [(index, sample) for index, sample in samples if not isinstance(sample, str)]
        if not good:
            blank = torch.zeros(1, 2, dtype=torch.long)
            return Batch(blank, torch.full_like(blank, IGNORE_INDEX), [], skipped=skipped)
        pad, config = torch.nn.utils.rnn.pad_sequence, self.dataset.processor.config
        input_ids = pad(
            [sample["input_ids"] for _, sample in good], batch_first=True, padding_value=0
        )
        labels = pad(
            [sample["labels"] for _, sample in good], batch_first=True, padding_value=IGNORE_INDEX
        )
        images = [image for _, sample in good for image in sample["images"]]
        pixels = [image for _, image in images if image.dtype == torch.uint8]
        cached = [image for _, image in images if image.dtype != torch.uint8]
        return Batch(
            input_ids=input_ids,
            labels=labels,
            indices=[index for index, _ in good],
            digests=[digest for digest, _ in images],
            is_cached=torch.tensor([image.dtype != torch.uint8 for _, image in images])
            if images
            else None,
            image_token_indices=find_image_tokens(
                input_ids, config.image_token_id, config.n_image_tokens
            ),
            label_indices=find_labels(labels),
            pixels=torch.stack(pixels) if pixels else None,
            cached_features=torch.stack(cached) if cached else None,
            n_tokens=sum(len(sample["input_ids"]) for _, sample in good),
            skipped=skipped,
        )


def find_nothing(digest: bytes) -> None:
    """`find_features` where there is no cache."""


def make_loader(
    dataset,
    batches: StepBatches,
    num_workers: int,
    find_features=find_nothing,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of `dataset`, which has `read_text`, `processor` and `lengths`, in the order that `batches` gives."""
    samples = TrainSamples(dataset, find_features)
    return DataLoader(
        samples,
        batch_sampler=batches,
        collate_fn=samples.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_main,
    )


def _leave_signals_to_main(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the loader's workers go on until the main process has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
