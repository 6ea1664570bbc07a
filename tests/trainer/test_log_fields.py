"""docs/training.md explains every field that the log of a run has."""

import json
import re
from dataclasses import fields

from scripts.processes import as_flags
from tests.helpers import ROOT, run_script
from trainer.config import TrainConfig

EVENTS = {"start", "train", "validation", "sample", "end"}


def test_every_field_of_the_log_is_in_the_table_of_the_docs(options, tmp_path):
    flags = as_flags(**options, val_data=options["data_path"], out_dir=tmp_path, max_steps=2)
    finished = run_script("train_sft_vlm.py", *flags)
    assert finished.returncode == 0, finished.stdout
    text = (tmp_path / "sft_vlm_64.log.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    assert {record["event"] for record in records} == EVENTS
    # The first line repeats the options of the run: docs/flags.md explains them.
    flags_of_run = {field.name for field in fields(TrainConfig)}
    written = {name for record in records[1:] for name in record}
    written |= records[0].keys() - flags_of_run

    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    section = page.split("# What every field of the log means\n")[1].split("\n#")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    explained = set(re.findall(r"`(\w+)`", " ".join(cells)))
    assert sorted(written - explained) == []
    # Nothing is explained that no longer exists; this one needs --use_wandb.
    assert sorted(explained - written) == ["wandb_id"]
