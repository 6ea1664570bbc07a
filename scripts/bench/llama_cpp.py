"""Decoding speed of llama.cpp, from GGUF files."""

import json
from pathlib import Path
from urllib.request import Request, urlopen

from scripts.export.ask_gguf import LlamaCpp

# Longest time of an answer.
SECONDS = 600


def decode_speed(
    folder: str | Path, precision: str, prompt_tokens: int, new_tokens: int, n_threads: int = 1
) -> tuple[float, float]:
    """(tokens/s after the first, seconds to the first), as llama.cpp's own clock has them.

    The vision encoder's time is not in them, nor is that of loading.

    Args:
        folder: see `LlamaCpp`, like precision and n_threads.
        precision: F16, Q8_0 or Q4_0.
        prompt_tokens: length of the prompt; its tokens are any.
        new_tokens: length of the answer, which nothing ends earlier.
        n_threads: that compute.
    """
    model = LlamaCpp(folder, precision, n_threads)
    question = {
        "prompt": [100 + n % 500 for n in range(prompt_tokens)],
        "n_predict": new_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "cache_prompt": False,
    }
    request = Request(f"{model.address}/completion", json.dumps(question).encode())
    with urlopen(request, timeout=SECONDS) as response:
        times = json.load(response)["timings"]
    return times["predicted_per_second"], times["prompt_ms"] / 1000
