"""What sizes may be, wherever they come from: an edited file, the JSON beside weights, a folder.

They are checked before anything of that size is made.
"""

from collections.abc import Mapping
from typing import NamedTuple

from common.numbers import check_number


class Bounds(NamedTuple):
    least: float
    most: float
    is_whole: bool = True


WIDTH, COUNT, SHARE = Bounds(1, 16_384), Bounds(1, 1024), Bounds(0, 1, is_whole=False)
# Sizes of LMConfig, and what joins it to a vision encoder.
LANGUAGE_SIZES = {
    "dim": WIDTH,
    "n_layers": Bounds(1, 256),
    "n_heads": COUNT,
    "n_kv_heads": COUNT,
    "vocab_size": Bounds(1, 1_000_000),
    "hidden_dim": Bounds(1, 131_072),
    "multiple_of": WIDTH,
    "norm_eps": SHARE,
    "max_seq_len": Bounds(1, 131_072),
    "rope_theta": Bounds(1, 10**12, is_whole=False),
    "dropout": SHARE,
    "vision_dim": WIDTH,
    "n_image_tokens": Bounds(1, 16_384),
}
# Sizes of a CLIP vision encoder, in the words of its config.json.
VISION_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": Bounds(1, 131_072),
    "num_hidden_layers": Bounds(1, 256),
    "num_attention_heads": COUNT,
    "image_size": Bounds(1, 2048),
    "patch_size": Bounds(1, 2048),
    "layer_norm_eps": SHARE,
}


def check_sizes(sizes: Mapping[str, object], bounds: Mapping[str, Bounds], where: str = "") -> None:
    """UserError for a size that is no number within its bounds; unknown names are passed over.

    Args:
        sizes: name -> what was found.
        bounds: one of the tables above.
        where: the file they are from, for the message.
    """
    for name, size in sizes.items():
        if name in bounds:
            check_number(f"{name} in {where}" if where else name, size, *bounds[name])
