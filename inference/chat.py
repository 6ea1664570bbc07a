"""A dialogue about images that streams its answers: behind the command line and the web page alike."""

import time
from collections.abc import Iterator

import torch

from common.errors import UserError
from model.model_vlm import MiniMindVLM
from model.processing import IMAGE_TAG, VLMProcessor


class Chat:
    """Turns and images of one conversation. Nothing is shared between two of them but the model."""

    def __init__(self, model: MiniMindVLM, processor: VLMProcessor):
        self.model, self.processor = model, processor
        self.turns: list[dict] = []
        self.images: list = []
        self.image_features: torch.Tensor | None = (
            None  # float[k, patches, width]: the vision encoder runs once a picture
        )
        self.tokens_per_second = 0.0
        self.seconds_to_first_token = 0.0

    def ask(self, prompt: str, images: list = (), **sampling) -> Iterator[str]:
        """Stream the answer to `prompt`, piece by piece; new `images` stay for the rest of the conversation.

        `sampling`: temperature, top_p, max_new_tokens. BadSampleError for an image that cannot be read, UserError for
        a conversation that no longer fits. The conversation grows when the answer is complete, not before.
        """
        device = self.model.tok_embeddings.weight.device
        tags = f"{IMAGE_TAG}\n" * max(0, len(images) - prompt.count(IMAGE_TAG))
        turns = self.turns + [{"role": "user", "content": tags + prompt}]
        images = self.images + list(images)
        input_ids = self.processor.encode_prompt(turns, len(images)).to(device)
        if input_ids.shape[1] >= self.model.config.max_seq_len:
            raise UserError(
                f"the conversation has {input_ids.shape[1]} tokens but the model takes "
                f"{self.model.config.max_seq_len} (--max_seq_len): start a new one"
            )
        features = self._features(images)

        started, n_tokens, said = time.perf_counter(), 0, ""
        for tokens in self.model.generate(
            input_ids, image_features=features, stream=True, **sampling
        ):
            n_tokens += 1
            if n_tokens == 1:
                self.seconds_to_first_token = time.perf_counter() - started
            text = self.processor.tokenizer.decode(tokens[0], skip_special_tokens=True)
            if not text.endswith(
                "\ufffd"
            ):  # else the last character's other bytes are still to come
                yield text[len(said) :]
                said = text
        self.tokens_per_second = n_tokens / (time.perf_counter() - started)
        self.turns = turns + [{"role": "assistant", "content": said}]
        self.images, self.image_features = images, features

    def _features(self, images: list) -> torch.Tensor | None:
        new = images[len(self.images) :]
        if not new:
            return self.image_features
        pixel_values = self.processor.preprocess(new).to(self.model.tok_embeddings.weight.device)
        features = self.model.encode_images(pixel_values)
        return (
            features if self.image_features is None else torch.cat((self.image_features, features))
        )
