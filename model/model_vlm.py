"""MiniMind-V: image -> frozen CLIP -> one linear projector -> rows of the language model's input embeddings."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionModel

from inference.generate import generate
from model.labels import find_labels
from model.LMConfig import VLMConfig
from model.model_lm import KVCache, MiniMindLM
from model.vision import patch_features


class VLMOutput(NamedTuple):
    logits: torch.Tensor | None  # float[B, T, vocab_size]
    loss: torch.Tensor | None  # float[], mean over the label tokens


class VisionProj(nn.Module):
    """One linear map from a patch feature to an embedding; the nesting is that of the published key names."""

    def __init__(self, vision_dim: int, dim: int):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_dim, dim))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """float[k, patches, vision_dim] -> float[k, patches, dim]."""
        return self.vision_proj(image_features)


def find_image_tokens(
    input_ids: torch.Tensor, image_token_id: int, n_image_tokens: int
) -> torch.Tensor:
    """int64[k * n_image_tokens]: where in int64[B, T], counted over B * T, the tokens are that stand for patches.

    A run of exactly k * n_image_tokens placeholder ids stands for k images; a run of any other length is text (an
    e-mail address has a run of one). Runs end at the row's end.
    """
    is_token = input_ids == image_token_id
    starts = is_token.clone()
    starts[:, 1:] &= ~is_token[:, :-1]
    run = starts.flatten().cumsum(
        0
    )  # (B * T,) number of the run that a token belongs to, or of the last one before it
    run_length = torch.bincount(run[is_token.flatten()], minlength=run.numel() + 1)
    is_patch = is_token.flatten() & (run_length[run] % n_image_tokens == 0)  # (B * T,)
    return is_patch.nonzero().squeeze(-1)


class MiniMindVLM(MiniMindLM):
    """The language model with eyes. `vision_encoder` may be None for text, or where `image_features` are given."""

    def __init__(self, config: VLMConfig, vision_encoder: CLIPVisionModel | None = None):
        super().__init__(config)
        if vision_encoder is not None:
            config.check_vision_encoder(vision_encoder.config)
            vision_encoder.requires_grad_(False)
        self.vision_encoder = vision_encoder
        self.vision_proj = VisionProj(config.vision_dim, config.dim)
        self.train(self.training)

    def train(self, mode: bool = True) -> "MiniMindVLM":
        super().train(mode)
        if self.vision_encoder is not None:
            self.vision_encoder.eval()
        return self

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[k, 3, H, W] -> float[k, patches, vision_dim], without gradient."""
        if self.vision_encoder is None:
            raise ValueError(
                f"{len(pixel_values)} images but no vision encoder: pass vision_encoder to MiniMindVLM"
            )
        return patch_features(self.vision_encoder, pixel_values)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_token_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """int64[B, T] -> float[B, T, dim], with the rows of the placeholders replaced by the projected patches.

        `image_token_indices` are what `find_image_tokens` gives; found here where missing, which a GPU's host has to wait for.
        Raises ValueError where the images, in order over the batch, are not as many as the placeholders.
        """
        if image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.encode_images(pixel_values)
        embeddings = self.tok_embeddings(input_ids)
        n_image_tokens = self.config.n_image_tokens
        if image_token_indices is None:
            image_token_indices = find_image_tokens(
                input_ids, self.config.image_token_id, n_image_tokens
            )
        n_placeholders = len(image_token_indices) // n_image_tokens
        n_images = 0 if image_features is None else len(image_features)
        if n_placeholders != n_images:
            raise ValueError(
                f"the text has {n_placeholders} image placeholders of {n_image_tokens} tokens but {n_images} images "
                "came with it: give one image for each placeholder"
            )
        if n_images:
            patches = self.vision_proj(
                image_features.to(self.vision_proj.vision_proj[0].weight.dtype)
            )
            rows = patches.flatten(0, 1).to(embeddings.dtype)  # (k * n_image_tokens, dim)
            return (
                embeddings.flatten(0, 1)
                .index_copy(0, image_token_indices, rows)
                .view_as(embeddings)
            )  # (B, T, dim)
        if self.training:  # a batch of text only: the projector still takes part, so that DDP ranks wait for no one
            return (
                embeddings
                + 0.0 * self.vision_proj(embeddings.new_zeros(1, self.config.vision_dim)).sum()
            )
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        cache: KVCache | None = None,
        return_logits: bool = True,
        image_token_indices: torch.Tensor | None = None,
        label_indices: torch.Tensor | None = None,
    ) -> VLMOutput:
        """Next-token logits and, with `labels`, their loss.

        input_ids: int64[B, T]; pixel_values: float[k, 3, H, W], all images of the batch in order, or image_features
        float[k, patches, vision_dim] in their place; labels: int64[B, T] aligned with input_ids, -100 where nothing is
        learned; attention_mask: [B, S], for left padding. `return_logits=False` computes the head only where there is
        a label: at 6,400 words it is a third of a pretraining step. `image_token_indices` and `label_indices`, from
        `find_image_tokens` and `find_labels`, spare the host a wait for the device.
        """
        embeddings = self.embed(input_ids, pixel_values, image_features, image_token_indices)
        hidden = self.run_layers(embeddings, attention_mask, cache)
        logits = self.output(hidden) if return_logits else None
        return VLMOutput(
            logits, None if labels is None else self.loss(hidden, labels, label_indices)
        )

    def loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, label_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy over the label tokens (0 where there are none). The one place where labels are shifted."""
        if label_indices is None:
            label_indices = find_labels(labels)
        logits = self.output(hidden.flatten(0, 1)[label_indices - 1])  # (label tokens, vocab_size)
        total = F.cross_entropy(logits.float(), labels.flatten()[label_indices], reduction="sum")
        return total / max(len(label_indices), 1)

    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **options
    ):
        """See model.generation.generate."""
        return generate(self, input_ids, pixel_values, **options)
