"""docs/flags.md, written from the code, so that it cannot be wrong."""

import runpy
from itertools import groupby

from common.flags import Flag, list_flags, list_published
from inference.config import EvalConfig
from model.files import ROOT
from scripts.docs.published import write_table
from scripts.export.config import ExportConfig
from scripts.serve_openai_api.config import ServeConfig

FLAGS_PATH = ROOT / "docs" / "flags.md"
INTRODUCTION = """\
# Flags

This page is written from the code by `python -m scripts.docs`; `--help` of each script says the
same. Where no default is shown, the flag is off if not given, or the text says what happens.
"""


def write_flags() -> str:
    """The whole page."""
    training = "`train_pretrain_vlm.py` and `train_sft_vlm.py`"
    stages = [read_defaults(name) for name in ("train_pretrain_vlm.py", "train_sft_vlm.py")]
    return "\n".join(
        [
            INTRODUCTION,
            *write_section(training, "what it is (defaults: pretraining / SFT)", *stages),
            *write_section("`eval_vlm.py`", "what it is", EvalConfig()),
            *write_section("`web_demo_vlm.py`", "what it is", read_defaults("web_demo_vlm.py")),
            *write_section("`python -m scripts.export`", "what it is", ExportConfig()),
            *write_section("`python -m scripts.serve_openai_api`", "what it is", ServeConfig()),
            *write_table(),
        ]
    )


def read_defaults(script: str):
    """The DEFAULTS of a root script."""
    return runpy.run_path(str(ROOT / script))["DEFAULTS"]


def write_section(title: str, heading: str, *defaults) -> list[str]:
    """Lines of one script's flags, a table for each group."""
    columns = zip(*map(list_flags, defaults))
    lines = [f"## {title}", ""]
    for group, rows in groupby(columns, key=lambda row: row[0].group):
        lines += [f"### {group.capitalize()}", "", f"| flag | {heading} |"]
        lines += ["|---|---|", *map(write_row, rows), ""]
    published = ", ".join(f"`{flag.names[0]}`" for flag in list_published(defaults[0]))
    if not published:
        return lines
    link = "[published flags](#flags-of-the-published-scripts)"
    return [*lines, f"Accepted too: the {link} {published}.", ""]


def write_row(flags: tuple[Flag, ...]) -> str:
    """One flag, with its default in each stage."""
    names = " ".join(f"`{name}`" for name in flags[0].names)
    shown = dict.fromkeys(filter(None, (show_default(flag.default) for flag in flags)))
    default = f" (default: {' / '.join(shown)})" if shown else ""
    return f"| {names} | {flags[0].help.replace('|', '/')}{default} |"


def show_default(default) -> str:
    if default is None or default is False or default == []:
        return ""
    return f"`{' '.join(default) if isinstance(default, list) else default}`"
