"""MiniMind-V: image -> frozen vision encoder -> one linear projector -> rows of the LM's input.

pixel_values ── encode_images ──> image_features ── vision_proj ──> patch embeddings
input_ids    ── tok_embeddings ─> embeddings, those of the image tokens replaced by patches
             ── run_layers ─────> hidden states ── output ──> logits
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from model.labels import find_labels
from model.LMConfig import VLMConfig
from model.model_lm import KVCache, MiniMindLM
from model.vision import VisionEncoder, as_vision_encoder, patch_features

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class VLMOutput(NamedTuple):
    """What a forward pass returns."""

    logits: torch.Tensor | None  # float[B, T, vocab_size]
    loss: torch.Tensor | None  # float[]


class VisionProj(nn.Module):
    """One linear map from a patch feature to an embedding; published names need the nesting."""

    def __init__(self, vision_dim: int, dim: int):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(vision_dim, dim))

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """float[k, patches, vision_dim] -> float[k, patches, dim]."""
        return self.vision_proj(image_features)


def find_image_tokens(
    input_ids: torch.Tensor, image_token_id: int, n_image_tokens: int
) -> torch.Tensor:
    """Flat indices (into B*T) of the image tokens.

    A run of k * n_image_tokens times `image_token_id` stands for k images; a run of any other
    length is text (an e-mail address has a run of one). A run ends with its row.

    Args:
        input_ids: int64[B, T].
        image_token_id: id of '@'.
        n_image_tokens: tokens of one image, one a patch.

    Returns int64[k * n_image_tokens].
    """
    is_candidate = input_ids == image_token_id  # (B, T)
    # number the runs: a token that is no candidate has the number of the run before it
    starts = is_candidate.clone()
    starts[:, 1:] &= ~is_candidate[:, :-1]
    run = starts.flatten().cumsum(0)  # (B * T,)

    # measure the runs
    is_candidate = is_candidate.flatten()  # (B * T,)
    run_length = torch.bincount(run[is_candidate], minlength=run.numel() + 1)
    is_image = is_candidate & (run_length[run] % n_image_tokens == 0)  # (B * T,)
    return is_image.nonzero().squeeze(-1)


def locate_images(
    input_ids: torch.Tensor,
    n_images: int,
    config: VLMConfig,
    image_token_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """Flat indices (into B*T) of the tokens of `n_images` images.

    Args:
        input_ids: int64[B, T].
        n_images: that came with the text.
        config: says which tokens, and how many for an image.
        image_token_indices: what `find_image_tokens` found, if it was called already.

    UserError if the text has tokens for more or fewer images.
    """
    n_image_tokens = config.n_image_tokens
    if image_token_indices is None:
        image_token_indices = find_image_tokens(input_ids, config.image_token_id, n_image_tokens)
    n_expected = len(image_token_indices) // n_image_tokens
    if n_expected != n_images:
        raise UserError(
            f"the text has tokens for {n_expected} images ({n_image_tokens} each) but "
            f"{n_images} images came with it: give one image for each"
        )
    return image_token_indices


def insert_patches(
    embeddings: torch.Tensor, patches: torch.Tensor, image_token_indices: torch.Tensor
) -> torch.Tensor:
    """Put projected patches in the place of image tokens, one write for all images.

    Args:
        embeddings: float[B, T, dim].
        patches: float[k, n_image_tokens, dim].
        image_token_indices: int64[k * n_image_tokens], see `locate_images`.

    Returns float[B, T, dim].
    """
    rows = patches.flatten(0, 1).to(embeddings.dtype)  # (k * n_image_tokens, dim)
    flat = embeddings.flatten(0, 1)  # (B * T, dim)
    return flat.index_copy(0, image_token_indices, rows).view_as(embeddings)  # (B, T, dim)


class MiniMindVLM(MiniMindLM):
    """The language model with eyes.

    Args:
        config: sizes of both.
        vision_encoder: see model/vision.py; it is frozen. A network of transformers, such as
            a CLIPVisionModel, is made one. None if the model only gets text, or `image_features`
            instead of pictures.
    """

    def __init__(
        self, config: VLMConfig, vision_encoder: VisionEncoder | PreTrainedModel | None = None
    ):
        super().__init__(config)
        if vision_encoder is not None:
            vision_encoder = as_vision_encoder(vision_encoder)
            config.check_vision_encoder(vision_encoder)
        self.vision_encoder = vision_encoder
        self.vision_proj = VisionProj(config.vision_dim, config.dim)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """float[k, 3, H, W] -> float[k, patches, vision_dim], without gradient."""
        if self.vision_encoder is None:
            raise UserError(
                f"{len(pixel_values)} images but no vision encoder: pass vision_encoder to "
                "MiniMindVLM"
            )
        return patch_features(self.vision_encoder, pixel_values)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_token_indices: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed the tokens, those of an image as its projected patches.

        Args:
            input_ids: int64[B, T].
            pixel_values: float[k, 3, H, W], all images of the batch in order.
            image_features: float[k, patches, vision_dim], instead of pixel_values.
            image_token_indices: see `find_image_tokens`; found here if not given, for which the
                host has to wait for a GPU.

        Returns float[B, T, dim]. UserError if there are more or fewer images than runs of image
        tokens.
        """
        # what the model sees, and what it reads
        if image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.encode_images(pixel_values)
        embeddings = self.tok_embeddings(input_ids)

        # count the images on both sides
        n_images = 0 if image_features is None else len(image_features)
        indices = locate_images(input_ids, n_images, self.config, image_token_indices)
        if n_images == 0:
            # The projector takes part in text-only batches too: DDP waits for all its gradients.
            if self.training:
                no_patch = embeddings.new_zeros(1, self.config.vision_dim)
                embeddings = embeddings + 0.0 * self.vision_proj(no_patch).sum()
            return embeddings

        projector = self.vision_proj.vision_proj[0]
        patches = self.vision_proj(image_features.to(projector.weight.dtype))
        return insert_patches(embeddings, patches, indices)

    def predict(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
        n_last: int | None = None,
    ) -> torch.Tensor:
        """Logits of what comes after embedded tokens.

        Args:
            embeddings, attention_mask, cache: see `run_layers`.
            n_last: only those after so many of the last tokens; all if not given.

        Returns float[B, n_last or T, vocab_size].
        """
        hidden = self.run_layers(embeddings, attention_mask, cache)
        return self.output(hidden if n_last is None else hidden[:, -n_last:])

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
        """Logits of the next tokens and, with labels, their loss.

        Args:
            input_ids: int64[B, T].
            pixel_values: float[k, 3, H, W], all images of the batch in order.
            labels: int64[B, T], aligned with input_ids; -100 for tokens that the loss leaves out.
            attention_mask: int64[B, S], see `run_layers`.
            image_features: float[k, patches, vision_dim], instead of pixel_values.
            cache: see `run_layers`.
            return_logits: False computes the output head for label tokens only; with 6,400 tokens
                the whole is a third of a pretraining step.
            image_token_indices: see `find_image_tokens`.
            label_indices: see `find_labels`. With both indices given, the host never waits for a
                GPU.
        """
        embeddings = self.embed(input_ids, pixel_values, image_features, image_token_indices)
        hidden = self.run_layers(embeddings, attention_mask, cache)
        logits = self.output(hidden) if return_logits else None
        loss = None if labels is None else self.loss(hidden, labels, label_indices)
        return VLMOutput(logits, loss)

    def loss(
        self, hidden: torch.Tensor, labels: torch.Tensor, label_indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy over the label tokens; 0 if there are none.

        Args:
            hidden: float[B, T, dim], see `run_layers`.
            labels: int64[B, T].
            label_indices: see `find_labels`; found here if not given.
        """
        if label_indices is None:
            label_indices = find_labels(labels)
        # The one place where labels are shifted: a token is predicted by the one before it.
        predictors = hidden.flatten(0, 1)[label_indices - 1]  # (label tokens, dim)
        logits = self.output(predictors)  # (label tokens, vocab_size)
        # The softmax over 6,400 tokens needs float32, whatever dtype the model is in.
        total = F.cross_entropy(logits.float(), labels.flatten()[label_indices], reduction="sum")
        return total / max(len(label_indices), 1)

    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, **options
    ) -> torch.Tensor | Iterator[torch.Tensor]:
        """Continue prompts: see `generate` in inference/generate.py for the options."""
        # The one import from outside: the network itself needs no decoder.
        from inference.generate import generate

        return generate(self, input_ids, pixel_values, **options)
