"""What the benches share: where they work, and how they read what a training left."""

import json
from pathlib import Path

WORK = Path("out/bench")
TRAIN_SCRIPTS = {"pretrain": "train_pretrain_vlm.py", "sft": "train_sft_vlm.py"}


def read_result(printed: str) -> dict:
    """The JSON object in the last line that a script printed."""
    return json.loads(printed.splitlines()[-1])


def read_log(path: Path, event: str) -> list[dict]:
    """The records of one kind in a training log: "train", "validation", "end"."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [record for record in records if record["event"] == event]
