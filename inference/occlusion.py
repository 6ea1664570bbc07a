"""What a word depends on: grey out a patch of a picture, and see how much less likely it becomes.

Attention says where a model looks, not what follows from it. This is the test of it (Zeiler &
Fergus 2014): slower, since the vision encoder sees a picture again for each of its patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from inference.answer_tokens import encode_answer, find_grid
from model.model_lm import KVCache
from model.model_vlm import MiniMindVLM

if TYPE_CHECKING:
    from inference.load import VLM

# Memory for the pictures that go through the model together. A CPU is no faster with more, and is
# to look up from its work often.
CPU_BYTES, GPU_BYTES = 2**26, 2**31


@torch.inference_mode()
def occlude(
    vlm: VLM,
    turns: list[dict],
    answer: str,
    pixel_values: torch.Tensor,
    image: int,
    word: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """How much less likely a word is when a patch of a picture is grey.

    Args:
        vlm, turns, answer: see `watch_answer`.
        pixel_values: float[k, 3, H, W] of all pictures of the conversation.
        image: index of the picture whose patches are greyed out.
        word: index of the word, see `Looks.words`.
        progress: is called with (patches that are done, all patches), about once a second.

    Returns float32[rows, cols]: the fall of the log-probability of the word's tokens, in nats;
    negative where the word becomes likelier.
    """
    # what the model reads, up to the word's last token, which is only predicted
    model = vlm.model
    input_ids, image_tokens, n_prompt, words = encode_answer(vlm, turns, answer, len(pixel_values))
    tokens = words[word].tokens
    targets = input_ids[0, n_prompt + tokens.start : n_prompt + tokens.stop].cpu()
    n_read = n_prompt + tokens.stop - 1
    pixel_values = pixel_values.to(input_ids.device)
    features = model.encode_images(pixel_values)
    embeddings = model.embed(input_ids, None, features, image_tokens)[:, :n_read]

    # What comes before the picture is the same for all: it is read once, and stays in the cache.
    n_patches = model.config.n_image_tokens
    start = int(image_tokens[image * n_patches])
    batch_size = choose_batch_size(model, n_read)
    cache = KVCache(model.config, batch_size, n_read, input_ids.device, embeddings.dtype)
    if start > 0:
        model.run_layers(embeddings[:, :start].expand(batch_size, -1, -1), None, cache)
    following = embeddings[:, start:].repeat(batch_size, 1, 1)

    # the picture as it is, then with each patch grey
    log_probabilities, n_done = [], -1
    for variants in occluded_pictures(pixel_values[image], find_grid(model), batch_size):
        shown = model.vision_proj(model.encode_images(variants))  # (batch_size, patches, dim)
        following[:, :n_patches] = shown
        cache.rewind(start)
        hidden = model.run_layers(following, None, cache)[:, -len(targets) :]
        # float64: a word that is certain has a log-probability that is nearly 0
        every = model.output(hidden).cpu().double().log_softmax(dim=-1)
        of_word = every[:, range(len(targets)), targets].sum(dim=1)  # (batch_size,)
        log_probabilities.append(of_word)
        n_done = min(n_done + batch_size, n_patches)
        if progress:
            progress(n_done, n_patches)

    clean, greyed = torch.cat(log_probabilities)[: n_patches + 1].split((1, n_patches))
    return (clean - greyed).view(find_grid(model)).float().numpy()  # (rows, cols)


def occluded_pictures(
    pixels: torch.Tensor, grid: tuple[int, int], batch_size: int
) -> Iterator[torch.Tensor]:
    """float[3, H, W] -> batches float[batch_size, 3, H, W]: as it is, then each patch grey.

    The last batch is filled up with the picture as it is.
    """
    (rows, cols), (height, width) = grid, pixels.shape[1:]
    # None stands for no patch.
    patches = [None, *((row, col) for row in range(rows) for col in range(cols))]
    for begin in range(0, len(patches), batch_size):
        variants = pixels.repeat(batch_size, 1, 1, 1)
        for variant, patch in zip(variants, patches[begin : begin + batch_size]):
            if patch is not None:
                top, bottom = (height * edge // rows for edge in (patch[0], patch[0] + 1))
                left, right = (width * edge // cols for edge in (patch[1], patch[1] + 1))
                # 0 is the vision encoder's mean color: pixels are normalized.
                variant[:, top:bottom, left:right] = 0
        yield variants


def choose_batch_size(model: MiniMindVLM, n_tokens: int) -> int:
    """How many pictures go through the model together; it divides them evenly."""
    config = model.config
    # floats of one picture: an MLP of the vision encoder, one of the language model, the cache
    n_floats = config.n_image_tokens * config.vision_dim * 12
    n_floats += n_tokens * (config.hidden_dim * 4 + config.n_layers * config.dim)
    is_cpu = model.tok_embeddings.weight.device.type == "cpu"
    most = max(1, (CPU_BYTES if is_cpu else GPU_BYTES) // (4 * n_floats))
    n_pictures = config.n_image_tokens + 1
    return math.ceil(n_pictures / math.ceil(n_pictures / most))
