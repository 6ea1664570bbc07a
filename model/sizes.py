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
# Sizes of vision encoders, in the words of their config.json. Bounds are a few times what there is.
VISION_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": Bounds(1, 131_072),
    "num_hidden_layers": Bounds(1, 256),
    "num_attention_heads": COUNT,
    "image_size": Bounds(1, 2048),
    "patch_size": Bounds(1, 2048),
    "layer_norm_eps": SHARE,
    # DINO
    "mlp_ratio": Bounds(1, 64),
    "num_register_tokens": Bounds(0, 256),
    "rope_theta": Bounds(1, 10**12, is_whole=False),
    # CNNs
    "num_stages": Bounds(1, 8),
    "embedding_size": WIDTH,
    "groups_width": WIDTH,
    "layer_scale_init_value": SHARE,
    "width_coefficient": Bounds(0.1, 16, is_whole=False),
    "depth_coefficient": Bounds(0.1, 4, is_whole=False),
    "depth_divisor": COUNT,
    "hidden_dim": WIDTH,
    "squeeze_expansion_ratio": SHARE,
    "batch_norm_eps": SHARE,
    "depth_multiplier": Bounds(0.1, 16, is_whole=False),
    "depth_divisible_by": COUNT,
    "min_depth": COUNT,
    "expand_ratio": Bounds(1, 16, is_whole=False),
    "output_stride": Bounds(1, 64),
}
# Sizes of each stage of a CNN.
VISION_LISTS = {
    "hidden_sizes": WIDTH,
    "depths": Bounds(1, 64),
    "kernel_sizes": Bounds(1, 31),
    "in_channels": WIDTH,
    "out_channels": WIDTH,
    "depthwise_padding": Bounds(0, 1024),
    "strides": Bounds(1, 4),
    "num_block_repeats": Bounds(1, 16),
    "expand_ratios": Bounds(1, 16),
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
