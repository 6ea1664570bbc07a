"""From rows of a dataset to batches of tensors; and where the way of an image's features begins.

loader process (here)                      training process (image_encoder.py)
─────────────────────                      ──────────────────────────────────
bytes of the picture's file
  │ hash = its key
  ▼
feature cache ── found ── features ──────► batch.cached_features ─────────────┐
  │ not found                                                                 ▼
  └► decode, resize ──── pixels ─────────► batch.pixels ─► vision encoder ─► joined in order
                                                              │               │
                                    feature cache ◄── store ──┘               ▼
                                                                    model.vision_proj
"""

import io
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from common.errors import BadSampleError
from common.files import hash_bytes, read_image_bytes
from common.owner import live_with_parent
from model.labels import IGNORE_INDEX, find_labels
from model.model_vlm import find_image_tokens
from trainer.feature_cache import FeatureCache
from trainer.sampler import StepSampler

# What the model's forward pass takes, but for the image features.
_MODEL_INPUTS = ("input_ids", "labels", "image_token_indices", "label_indices")
_TENSORS = (*_MODEL_INPUTS, "pixels", "cached_features")
# Of each loader process: batches that it makes before they are needed.
BATCHES_AHEAD = 2
# How many processes read is the user's choice; PyTorch would rather have one for each core.
warnings.filterwarnings("ignore", "This DataLoader will create")


@dataclass
class Batch:
    """B samples, padded on the right to the longest of them, T tokens; k images in order.

    Args:
        input_ids: int64[B, T].
        labels: int64[B, T], IGNORE_INDEX where the loss does not look.
        indices: which samples of the dataset these are.
        keys: of the k images, see FeatureCache.
        is_cached: bool[k] on the host, whose features come from the cache; None without images.
        pixels: uint8[m, 3, H, W], the images that the vision encoder has to see.
        cached_features: bfloat16 or float16[k - m, patches, vision_dim], of the others.
        image_token_indices: int64[k * n_image_tokens], see find_image_tokens.
        label_indices: int64[n], see find_labels.
        n_tokens: tokens without padding.
        skipped: samples that were left out, by reason.
        n_damaged: images whose cached features were damaged.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    indices: list[int]
    keys: list[bytes] = field(default_factory=list)
    is_cached: torch.Tensor | None = None
    pixels: torch.Tensor | None = None
    cached_features: torch.Tensor | None = None
    image_token_indices: torch.Tensor | None = None
    label_indices: torch.Tensor | None = None
    n_tokens: int = 0
    skipped: Counter = field(default_factory=Counter)
    n_damaged: int = 0

    @property
    def n_labels(self) -> int:
        """Label tokens that the loss is a mean over."""
        return 0 if self.label_indices is None else len(self.label_indices)

    @property
    def n_padding(self) -> int:
        return self.input_ids.numel() - self.n_tokens

    def model_inputs(self) -> dict:
        """What the model's forward pass takes to give a loss, but for the image features."""
        return {name: getattr(self, name) for name in _MODEL_INPUTS} | {"return_logits": False}

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Called by DataLoader, so that `to` does not have to wait."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        tensors = {name: getattr(self, name) for name in _TENSORS}
        changed = {name: change(one) for name, one in tensors.items() if one is not None}
        return replace(self, **changed)


class TrainSamples(Dataset):
    """Samples whose images are (key, cached features or uint8 pixels).

    A bad sample comes out as (index, reason), so that it costs its row and not the run.

    Args:
        dataset: has `read_text(index)` and `processor`, as VLMDataset.
        cache: where the features of images are looked up; None without a cache.
    """

    def __init__(self, dataset, cache: FeatureCache | None = None):
        self.dataset, self.cache = dataset, cache

    def __getitem__(self, index: int) -> tuple[int, dict | str]:
        try:
            sample, images = self.dataset.read_text(index)
            return index, sample | {"images": [self._read_image(image) for image in images]}
        except BadSampleError as error:
            return index, error.args[0]

    def _read_image(self, image: Path | io.BytesIO) -> tuple[bytes, torch.Tensor]:
        encoded = read_image_bytes(image)
        key = hash_bytes(encoded)
        features = self.cache.find(key) if self.cache else None
        if features is not None:
            return key, features
        return key, self.dataset.processor.resize(io.BytesIO(encoded))

    def collate(self, samples: list[tuple[int, dict | str]]) -> Batch:
        """Pad and join samples.

        Without a single good one, a blank row that has no label and so teaches nothing.
        """
        skipped = Counter(sample for _, sample in samples if isinstance(sample, str))
        n_damaged = self.cache.take_damaged() if self.cache else 0
        good = [(index, sample) for index, sample in samples if not isinstance(sample, str)]
        if not good:
            blank = torch.zeros(1, 2, dtype=torch.long)
            labels = torch.full_like(blank, IGNORE_INDEX)
            return Batch(blank, labels, [], skipped=skipped, n_damaged=n_damaged)

        # text: (B, T)
        all_ids = [sample["input_ids"] for _, sample in good]
        all_labels = [sample["labels"] for _, sample in good]
        input_ids = pad_sequence(all_ids, batch_first=True, padding_value=0)
        labels = pad_sequence(all_labels, batch_first=True, padding_value=IGNORE_INDEX)

        # images: pixels are uint8, cached features are not
        images = [image for _, sample in good for image in sample["images"]]
        is_cached = torch.tensor([image.dtype != torch.uint8 for _, image in images])
        pixels = [image for _, image in images if image.dtype == torch.uint8]
        cached = [image for _, image in images if image.dtype != torch.uint8]

        config = self.dataset.processor.config
        return Batch(
            input_ids=input_ids,
            labels=labels,
            indices=[index for index, _ in good],
            keys=[key for key, _ in images],
            is_cached=is_cached if images else None,
            pixels=torch.stack(pixels) if pixels else None,
            cached_features=torch.stack(cached) if cached else None,
            image_token_indices=find_image_tokens(
                input_ids, config.image_token_id, config.n_image_tokens
            ),
            label_indices=find_labels(labels),
            n_tokens=sum(map(len, all_ids)),
            skipped=skipped,
            n_damaged=n_damaged,
        )

    def pack(self, samples: list[tuple[int, dict | str]]) -> "Parcel":
        """The same, to be sent through a pipe."""
        return Parcel(self.collate(samples))


class Parcel:
    """A batch on its way through a pipe: pickled as plain bytes, it comes out as the batch.

    Tensors that are pickled themselves go through shared memory.
    """

    def __init__(self, batch: Batch):
        self.batch = batch

    def __reduce__(self):
        values = {field.name: getattr(self.batch, field.name) for field in fields(Batch)}
        tensors = {name: one for name, one in values.items() if isinstance(one, torch.Tensor)}
        # NumPy has no bfloat16.
        plain = {
            name: (one.contiguous().flatten().view(torch.uint8).numpy(), one.dtype, one.shape)
            for name, one in tensors.items()
        }
        return _open_parcel, (plain, {name: values[name] for name in values.keys() - tensors})


def _open_parcel(
    plain: dict[str, tuple[np.ndarray, torch.dtype, torch.Size]], others: dict
) -> Batch:
    tensors = {
        name: torch.from_numpy(array).view(dtype).view(shape)
        for name, (array, dtype, shape) in plain.items()
    }
    return Batch(**tensors, **others)


def make_loader(
    dataset,
    sampler: StepSampler,
    num_workers: int,
    cache: FeatureCache | None = None,
    pin_memory: bool = False,
    through_pipes: bool = False,
) -> DataLoader:
    """Batches of `dataset` in the order of `sampler`.

    Args:
        dataset: see TrainSamples.
        sampler: which samples make a batch.
        num_workers: processes that read; 0 reads in this one.
        cache: of image features.
        pin_memory: for a GPU, so that copies to it need no wait.
        through_pipes: how batches come from these processes, see shared_memory.py.
    """
    samples = TrainSamples(dataset, cache)
    return DataLoader(
        samples,
        batch_sampler=sampler,
        collate_fn=samples.pack if through_pipes and num_workers else samples.collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
        persistent_workers=num_workers > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    live_with_parent()
    torch.set_num_threads(1)
