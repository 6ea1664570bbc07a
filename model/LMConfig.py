"""Every size of the network in one place."""

import inspect

from transformers import PretrainedConfig

from common.errors import UserError
from model.sizes import LANGUAGE_SIZES, VISION_SIZES, check_sizes

# One '@' stands for one image patch; its token id is 34 in the published tokenizer.
IMAGE_TOKEN = "@"


class LMConfig(PretrainedConfig):
    """Sizes of the MiniMind language model. UserError where they cannot work together.

    Edit the defaults below to train a model of another size: every script follows them. Flags
    (--dim, --n_layers) and the weights that a run starts from come first.

    Args:
        dim: width of an embedding.
        n_layers: number of transformer layers (8 for dim 512, 16 for dim 768).
        n_heads: query heads of attention; 8 if not given, fewer in models narrower than 256.
        n_kv_heads: key and value heads; each serves n_heads / n_kv_heads query heads.
        vocab_size: tokens of the tokenizer.
        hidden_dim: width inside the feed-forward block; if not given, 2/3 * 4 * dim, rounded up
            to a multiple of `multiple_of`.
        multiple_of: hidden_dim is rounded up to a multiple of this.
        norm_eps: what RMSNorm adds to the mean square before the root.
        max_seq_len: most tokens of a sequence, image tokens included.
        rope_theta: base of the rotary position frequencies.
        dropout: share of the activations that training sets to 0.
    """

    model_type = "minimind"

    def __init__(
        self,
        dim: int = 512,
        n_layers: int = 8,
        n_heads: int | None = None,
        n_kv_heads: int = 2,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float = 1e-5,
        max_seq_len: int = 8192,
        rope_theta: float = 1e6,
        dropout: float = 0.0,
        **kwargs,
    ):
        # PretrainedConfig would store a misspelled size without a word.
        unknown = sorted(kwargs.keys() - PretrainedConfig().to_dict().keys())
        if unknown:
            known = ", ".join(size_names(type(self)))
            raise UserError(f"{type(self).__name__} has no {', '.join(unknown)}: it has {known}")
        given = {name: size for name, size in locals().items() if size is not None}
        check_sizes(given, LANGUAGE_SIZES)

        # Heads of fewer than 32 dimensions cannot tell tokens apart (dev/LOG.md).
        if n_heads is None:
            n_heads = next(n for n in (8, 4, 2) if dim >= 32 * n or n == 2)
        if dim % n_heads or dim // n_heads % 2:
            raise UserError(
                f"dim {dim} does not split into {n_heads} heads of an even size: "
                "change dim or n_heads"
            )
        if n_heads % n_kv_heads:
            raise UserError(
                f"n_heads {n_heads} is not a multiple of n_kv_heads {n_kv_heads}: "
                "change one of them"
            )
        if hidden_dim is None:
            hidden_dim = -(-int(2 / 3 * 4 * dim) // multiple_of) * multiple_of

        self.dim = dim
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.vocab_size = vocab_size
        self.hidden_dim = hidden_dim
        self.multiple_of = multiple_of
        self.norm_eps = norm_eps
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.dropout = dropout
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def check_length(self, length: int) -> None:
        """UserError for more than max_seq_len tokens."""
        if length > self.max_seq_len:
            raise UserError(
                f"{length} tokens are more than the model's max_seq_len of {self.max_seq_len}: "
                "shorten the input"
            )

    def language_sizes(self) -> dict[str, int | float]:
        """The arguments that make the same language model again; plain numbers, for JSON."""
        return {name: getattr(self, name) for name in size_names(LMConfig)}


class VLMConfig(LMConfig):
    """LMConfig plus what joins it to a vision encoder.

    The defaults fit CLIP ViT-B/16 at 224 x 224: (224 / 16)^2 = 196 patches of 768 features.
    `for_vision_encoder` reads them off another encoder.

    Args:
        image_special_token: the text that stands for an image, one '@' a patch.
        image_ids: its token ids, one a patch, all the same.
        vision_dim: width of a patch feature.
    """

    model_type = "minimind-v"

    def __init__(
        self,
        image_special_token: str = IMAGE_TOKEN * 196,
        image_ids: list[int] | None = None,
        vision_dim: int = 768,
        **kwargs,
    ):
        image_ids = [34] * len(image_special_token) if image_ids is None else image_ids
        if len(image_special_token) != len(image_ids):
            raise UserError(
                f"image_special_token has {len(image_special_token)} characters but image_ids has "
                f"{len(image_ids)}: one id for each"
            )
        if len(set(image_ids)) != 1:
            raise UserError(f"image_ids must repeat one id, not {sorted(set(image_ids))}")
        self.image_special_token = image_special_token
        self.image_ids = image_ids
        self.vision_dim = vision_dim
        super().__init__(**kwargs)

    @classmethod
    def for_vision_encoder(cls, vision_encoder: object, **sizes) -> "VLMConfig":
        """Join a language model of these `sizes` (see LMConfig) to a vision encoder.

        Args:
            vision_encoder: see model/vision.py; or the configuration of a CLIP or SigLIP, which
                says as much.
        """
        n_patches, width = _read_shape(vision_encoder)
        return cls(image_special_token=IMAGE_TOKEN * n_patches, vision_dim=width, **sizes)

    def check_vision_encoder(self, vision_encoder: object) -> None:
        """UserError unless patches and width are those of this vision encoder."""
        n_patches, width = _read_shape(vision_encoder)
        if self.n_image_tokens != n_patches:
            raise UserError(
                f"an image has {self.n_image_tokens} tokens but the vision encoder makes "
                f"{n_patches} patches: use VLMConfig.for_vision_encoder(vision_encoder)"
            )
        if self.vision_dim != width:
            raise UserError(
                f"vision_dim is {self.vision_dim} but the vision encoder is {width} wide: use "
                "VLMConfig.for_vision_encoder(vision_encoder)"
            )

    @property
    def n_image_tokens(self) -> int:
        """Tokens, and patches, of one image."""
        return len(self.image_ids)

    @property
    def image_token_id(self) -> int:
        return self.image_ids[0]


def _read_shape(vision_encoder: object) -> tuple[int, int]:
    """(patches, width) of a vision encoder or of its configuration."""
    if not isinstance(vision_encoder, PretrainedConfig):
        return vision_encoder.n_patches, vision_encoder.width
    if not hasattr(vision_encoder, "patch_size") or not hasattr(vision_encoder, "hidden_size"):
        raise UserError(
            f"the configuration of a {vision_encoder.model_type} does not say how many patches it "
            "makes: pass the vision encoder itself"
        )
    return count_patches(vision_encoder), vision_encoder.hidden_size


def count_patches(vision_config: PretrainedConfig) -> int:
    """Patches of a picture of a CLIP or SigLIP; UserError for sizes that cannot be."""
    check_sizes(vision_config.to_dict(), VISION_SIZES, "the vision encoder's configuration")
    if vision_config.image_size < vision_config.patch_size:
        raise UserError(
            f"the vision encoder's image_size {vision_config.image_size} is smaller than its "
            f"patch_size {vision_config.patch_size}"
        )
    return (vision_config.image_size // vision_config.patch_size) ** 2


def size_names(config_class: type[LMConfig]) -> list[str]:
    """Names of the sizes that a configuration class takes, those of its base class too."""
    names = [name for name in inspect.signature(config_class).parameters if name != "kwargs"]
    return names if config_class is LMConfig else names + size_names(LMConfig)
