"""A dialogue about pictures, behind the command line, the web page and `load_vlm` alike."""

import time
from collections.abc import Iterator

import torch

from common.errors import UserError
from common.text import IMAGE_TAG
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, match_image_tags

# Characters of a question; a book would be encoded for minutes before it is found too long.
MAX_QUESTION = 20_000
# Pixels of the longer side of a picture that is kept open: CLIP takes 224 of the shorter one.
PICTURE_SIDE = 1024


class Chat:
    """Turns and pictures of one conversation; two conversations share nothing but the model.

    It ends where the model's max_seq_len is full, so its memory is bounded.

    Attributes:
        turns: one {"role": ..., "content": ...} for each.
        n_images: how many pictures the model has been shown.
        tokens_per_second: of the last answer.
        seconds_to_first_token: of the last answer, without the time of the vision encoder.
    """

    def __init__(self, model: MiniMindVLM, processor: VLMProcessor):
        self.model, self.processor = model, processor
        self.turns: list[dict] = []
        self.n_images = 0
        # float[k, patches, vision_dim]: the vision encoder runs once for each picture.
        self.image_features: torch.Tensor | None = None
        self.tokens_per_second = 0.0
        self.seconds_to_first_token = 0.0

    def ask(self, prompt: str, images: list = (), **sampling) -> Iterator[str]:
        """Stream the answer, piece by piece.

        The conversation grows when the answer is complete, not before.

        Args:
            prompt: the question.
            images: new pictures (or their paths), which stay for the rest of the conversation.
            sampling: temperature, top_p, max_new_tokens, as `generate` takes them.

        BadSampleError for a picture that cannot be read, UserError for a question or conversation
        that is too long.
        """
        # the conversation as it would be; each new picture has its place in this question
        if len(prompt) > MAX_QUESTION:
            raise UserError(
                f"the question has {len(prompt)} characters but may have {MAX_QUESTION}: shorten it"
            )
        tags = f"{IMAGE_TAG}\n" * max(0, len(images) - prompt.count(IMAGE_TAG))
        ((_, question),), _ = match_image_tags([("user", tags + prompt)], len(images))
        turns = self.turns + [{"role": "user", "content": question}]
        n_images = self.n_images + len(images)
        input_ids = self.processor.encode_prompt(turns, n_images)
        n_tokens, max_seq_len = input_ids.shape[1], self.model.config.max_seq_len
        if n_tokens >= max_seq_len:
            raise UserError(
                f"the conversation has {n_tokens} tokens but the model takes {max_seq_len} "
                "(--max_seq_len): start a new one"
            )
        features = self._encode_images(list(images))

        # the answer
        input_ids = input_ids.to(self.model.tok_embeddings.weight.device)
        started, n_new, answer = time.perf_counter(), 0, ""
        for tokens in self.model.generate(
            input_ids, image_features=features, stream=True, **sampling
        ):
            n_new += 1
            if n_new == 1:
                self.seconds_to_first_token = time.perf_counter() - started
            text = self.processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
            # This sign means that the last character's other bytes are still to come.
            if not text.endswith("\ufffd"):
                yield text[len(answer) :]
                answer = text
        self.tokens_per_second = n_new / (time.perf_counter() - started)

        self.turns = turns + [{"role": "assistant", "content": answer}]
        self.n_images, self.image_features = n_images, features

    def _encode_images(self, new: list) -> torch.Tensor | None:
        """float[k, patches, vision_dim] of all pictures; only the new ones are encoded."""
        if not new:
            return self.image_features
        pixel_values = self.processor.preprocess(new).to(self.model.tok_embeddings.weight.device)
        features = self.model.encode_images(pixel_values)
        return (
            features if self.image_features is None else torch.cat((self.image_features, features))
        )
