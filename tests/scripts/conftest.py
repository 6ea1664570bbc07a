"""What tests of several commands ask for."""

import pytest

from inference import VLM, load_vlm
from tests.helpers import DEMO


@pytest.fixture(scope="session")
def demo() -> VLM:
    """The demo's model, as it is shipped."""
    return load_vlm(DEMO, device="cpu")
