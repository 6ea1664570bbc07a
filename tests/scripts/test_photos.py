"""The vision encoder of `python -m scripts.bench photos` against the package's own network."""

import pytest
import torch

from model.vision import load_vision_encoder
from scripts.bench.photos_encoder import IMAGE_SIZE, PACKAGE, convert, read_package, write_encoder

oracle = pytest.importorskip("efficientnet_lite_pytorch", reason="requirements-dev.txt has it")


def test_the_converted_network_equals_the_package_s_own():
    weights = read_package()
    network = oracle.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(weights)
    pixels = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    with torch.no_grad():
        expected = network.extract_features(pixels)
        found = convert(weights)(pixels).last_hidden_state
    assert found.shape == (2, 1280, 7, 7)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
