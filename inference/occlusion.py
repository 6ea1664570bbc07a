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

# Memory for the pictures that go through the model together. A CPU is hardly faster with more, and
# has to look up from its work often: `progress` may stop it.
CPU_BYTES, GPU_BYTES = 2**25, 2**31


@torch.inference_mode()
def occlude(
    vlm: VLM,
    turns: list[dict],
    answer: str,
    pixel_values: torch.Tensor,
    image: int,
    word: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """How much less likely a word is when a patch of a picture is grey.

    Args:
        vlm, turns, answer: see `watch_answer`.
        pixel_values: float[k, 3, H, W] of all pictures of the conversation.
        image: index of the picture whose patches are greyed out.
        word: index of the word, see `Looks.words`; None for all words, in about the same time.
        progress: is called with (patches that are done, all patches) after each batch; an error
            that it raises stops the work.

    Returns float32[rows, cols], or float32[words, rows, cols]: the fall of the log-probability of
    a word's tokens, in nats; negative where the word becomes likelier.
    """
    # what the model reads: nothing behind the last token that is asked for, which is only predicted
    model = vlm.model
    input_ids, image_tokens, n_prompt, words = encode_answer(vlm, turns, answer, len(pixel_values))
    chosen = words if word is None else [words[word]]
    first, last = (n_prompt + token for token in (chosen[0].tokens[0], chosen[-1].tokens[-1]))
    targets = input_ids[0, first : last + 1].cpu()
    pixel_values = pixel_values.to(input_ids.device)
    features = model.encode_images(pixel_values)
    embeddings = model.embed(input_ids, None, features, image_tokens)[:, :last]

    # What comes before the picture is the same for all: it is read once, and stays in the cache.
    n_patches = model.config.n_image_tokens
    start = int(image_tokens[image * n_patches])
    batch_size = choose_batch_size(model, last, len(targets))
    cache = KVCache(model.config, batch_size, last, input_ids.device, embeddings.dtype)
    if start > 0:
        model.run_layers(embeddings[:, :start].expand(batch_size, -1, -1), None, cache)
    following = embeddings[:, start:].repeat(batch_size, 1, 1)

    # log-probability of each token: with the picture as it is, then with each patch grey
    log_probabilities, n_done = [], -1
    for variants in occluded_pictures(pixel_values[image], find_grid(model), batch_size):
        following[:, :n_patches] = model.vision_proj(model.encode_images(variants))
        cache.rewind(start)
        hidden = model.run_layers(following, None, cache)[:, -len(targets) :]
        # float64: a word that is certain has a log-probability that is nearly 0
        every = model.output(hidden).cpu().double().log_softmax(dim=-1)
        log_probabilities.append(every[:, range(len(targets)), targets])  # (batch_size, targets)
        n_done = min(n_done + batch_size, n_patches)
        if progress:
            progress(n_done, n_patches)

    # the falls, summed over the tokens of each word
    clean, greyed = torch.cat(log_probabilities)[: n_patches + 1].split((1, n_patches))
    of_tokens = clean - greyed  # (patches, targets)
    of_tokens = of_tokens.split([len(word.tokens) for word in chosen], dim=1)
    falls = torch.stack([tokens.sum(dim=1) for tokens in of_tokens])  # (words, patches)
    falls = falls.unflatten(1, find_grid(model)).float().numpy()  # (words, rows, cols)
    return falls if word is None else falls[0]


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


def choose_batch_size(model: MiniMindVLM, n_tokens: int, n_targets: int) -> int:
    """How many pictures go through the model together; it divides them evenly.

    Args:
        model: see above.
        n_tokens: that it reads of each row.
        n_targets: of how many of them it predicts the next one.
    """
    config = model.config
    # floats of one picture: MLP of the vision encoder; MLP and cache of the language model; logits
    n_floats = config.n_image_tokens * config.vision_dim * 12
    n_floats += n_tokens * (config.hidden_dim * 4 + config.n_layers * config.dim)
    n_floats += n_targets * config.vocab_size * 5
    is_cpu = model.tok_embeddings.weight.device.type == "cpu"
    most = max(1, (CPU_BYTES if is_cpu else GPU_BYTES) // (4 * n_floats))
    n_pictures = config.n_image_tokens + 1
    return math.ceil(n_pictures / math.ceil(n_pictures / most))
