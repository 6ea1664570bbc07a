"""Quantized weights: close to the float32 model, with few rows (the kernel) and with many."""

import copy

import pytest
import torch

from inference.quantize import FEW_ROWS, count_weights, quantize
from tests.helpers import picture, small_model, user


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("int8", 3e-2)])
def test_quantized_weights_give_nearly_the_same_logits(model, processor, dtype, tolerance):
    quantized = copy.deepcopy(model)
    quantize(quantized, dtype)
    input_ids = processor.encode_prompt([user("<image>\nWhat color is the circle?")], 1)
    pixels = processor.preprocess([picture(1)])
    with torch.no_grad():
        for ids, images in ((input_ids, pixels), (input_ids[:, -FEW_ROWS + 1 :], None)):
            expected, given = model(ids, images).logits, quantized(ids, images).logits
            assert (given - expected).norm() < tolerance * expected.norm()
    assert not torch.equal(given, expected), "the weights have another dtype"
    assert count_weights(model.config) == sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if not name.startswith("vision_encoder.")
    )


def test_quantized_models_generate():
    model = small_model()
    quantize(model, "int8")
    tokens = model.generate(
        torch.tensor([[1, 5, 6]]), max_new_tokens=4, temperature=0, eos_token_id=-1
    )
    assert tokens.shape == (1, 7)
