"""Flags made from a dataclass: read, checked, listed."""

import dataclasses
import importlib
import math
import re
import runpy
from dataclasses import FrozenInstanceError, asdict, dataclass, replace
from typing import ClassVar, Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.flags import (
    PublishedFlag,
    check_options,
    describe_default,
    list_flags,
    option,
    parse_flags,
)
from inference.config import EvalConfig
from tests.helpers import ROOT
from trainer.config import TrainConfig


@dataclass(frozen=True)
class Options:
    """One option of each type."""

    published: ClassVar = (
        PublishedFlag(("--old", "--o-l-d"), "not needed, 100 %"),
        PublishedFlag(("--few",), "use --size", sets={"1": {}, "2": {"size": 9, "loud": True}}),
    )
    names: list[str] = option(["a", "b"], "some names, 100 % of them", aliases=("--n",), group="x")
    size: int | Literal["auto"] = option(4, "a size", least=1, most=99, aliases=("--s",))
    share: float | None = option(None, "a share; none if not given", least=0, most=1)
    kind: Literal["red", "blue"] = option("red", "a color")
    turns: Literal[1, 2] = option(1, "turns")
    colors: list[Literal["red", "blue"]] = option(["red"], "colors")
    again: Literal["yes", "auto"] | None = option(None, "whether to continue", group="y")
    loud: bool = option(False, "print more")

    def __post_init__(self):
        check_options(self)


def read(*arguments: str) -> dict:
    return asdict(parse_flags(Options(), "What it does.\n\nMore.", list(arguments)))


def test_each_type_is_read():
    defaults = asdict(Options())
    assert read() == defaults
    given = ["--n", "x", "y", "--size", "auto", "--share", "0.5", "--kind", "blue", "--turns", "2"]
    values = dict(names=["x", "y"], size="auto", share=0.5, kind="blue", turns=2, loud=True)
    assert read(*given, "--again", "--loud") == defaults | values | {"again": "yes"}
    assert read("--names", "x", "--n", "y")["names"] == ["x", "y"]
    assert read("--again", "auto", "--size", "7") == defaults | {"again": "auto", "size": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "--size many": "--size/--s: 'many' is no whole number",
        "--size 1.5": "--size/--s: '1.5' is no whole number",
        f"--size {'9' * 5000}": "--size/--s: '9999999999.* is no whole number",
        "--share half": "--share: 'half' is no number",
        "--kind green": "--kind is green: choose from red, blue",
        "--turns 3": "--turns is 3: choose from 1, 2",
        "--colors red green": "--colors is green: choose from red, blue",
        "--again maybe": "--again is maybe: choose from yes, auto",
        "--colour": "unrecognized arguments: --colour",
        "--loud yes": "unrecognized arguments: yes",
        "--size": "--size/--s: expected one argument",
    }.items(),
)
def test_what_cannot_be_read_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        read(*arguments.split())
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 150


def test_what_cannot_be_is_refused_from_a_command_line_and_in_python():
    with pytest.raises(UserError, match="--size is 0: it has to be from 1 to 99$"):
        read("--size", "0")
    with pytest.raises(UserError, match="--share is nan: it has to be from 0 to 1$"):
        Options(share=float("nan"))
    with pytest.raises(UserError, match="--kind is green: choose from red, blue"):
        Options(kind="green")
    with pytest.raises(FrozenInstanceError):
        Options().size = 3


def test_a_published_flag_says_what_to_use_now(capsys, monkeypatch):
    # it may set options, and those that are given come first
    assert read("--few", "2") == asdict(Options(size=9, loud=True))
    assert capsys.readouterr().out == "--few (of the published scripts): use --size\n"
    assert read("--few", "2", "--size", "3") == asdict(Options(size=3, loud=True))
    assert read("--few", "1", "--old") == read("--o-l-d=7") == asdict(Options())
    assert capsys.readouterr().out.count("not needed, 100 %\n") == 2

    # it is told by one of many processes, and refused where it means nothing
    monkeypatch.setenv("RANK", "1")
    assert read("--old", "1") == asdict(Options()) and not capsys.readouterr().out
    with pytest.raises(UserError, match="--few 3 cannot be used here: use --size"):
        read("--few", "3")


def test_published_flags_stand_apart_from_the_others(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    usage, own, published = re.split("options:|published flags", capsys.readouterr().out)
    assert "--few" in usage and "--few" not in own and "--size" in own
    assert "--few [VALUE]" in published and "100 %" in published


def test_the_list_has_every_field_with_its_group():
    flags = list(list_flags(Options()))
    assert [flag.group for flag in flags] == ["x"] * 6 + ["y"] * 2
    assert flags[0].names == ("--names", "--n") and flags[0].help.startswith("some names")
    defaults = [describe_default(flag.default) for flag in flags]
    assert defaults == [" (default: a b)", " (default: 4)", "", " (default: red)"] + [
        " (default: 1)",
        " (default: red)",
        "",
        "",
    ]


def test_help_shows_percent_signs(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    printed = capsys.readouterr().out
    assert "100 % of them (default: a b)" in printed and "What it does." in printed
    assert "More." not in printed


PUBLISHED_FLAGS = {
    "--out_dir", "--epochs", "--batch_size", "--learning_rate", "--device", "--dtype",
    "--use_wandb", "--wandb_project", "--num_workers", "--data_path", "--images_path", "--ddp",
    "--accumulation_steps", "--grad_clip", "--warmup_iters", "--log_interval", "--save_interval",
    "--dim", "--n_layers", "--max_seq_len",
}  # fmt: skip


@pytest.mark.parametrize("script", ["train_pretrain_vlm.py", "train_sft_vlm.py"])
def test_training_has_the_published_flags_and_every_field_says_what_it_is(script):
    flags = list(list_flags(runpy.run_path(str(ROOT / script))["DEFAULTS"]))
    names = {name for flag in flags for name in flag.names}
    assert names >= PUBLISHED_FLAGS | {"--data", "--images", "--keep_checkpoints"}
    assert all(len(flag.help) > 15 and flag.group for flag in flags)


def numeric_fields(options) -> list:
    """Fields whose flag takes a number."""
    types = get_type_hints(type(options))
    return [
        field
        for field in dataclasses.fields(options)
        if {int, float} & {types[field.name], *get_args(types[field.name])}
    ]


SCRIPTS = {
    script: runpy.run_path(str(ROOT / script)).get("DEFAULTS", EvalConfig())
    for script in ("train_pretrain_vlm.py", "train_sft_vlm.py", "eval_vlm.py", "web_demo_vlm.py")
}
NUMBERS = [
    (script, field.name, text)
    for script, options in SCRIPTS.items()
    for field in numeric_fields(options)
    for text in ("0", "-1", "nan", "inf", "1e9", "text")
]


def test_there_are_numbers_to_try():
    assert len(NUMBERS) > 250


@pytest.mark.parametrize(("script", "name", "text"), NUMBERS)
def test_every_number_is_accepted_or_refused_in_one_line(script, name, text):
    """What is accepted is finite and within the bounds; what is refused names the flag."""
    try:
        options = parse_flags(SCRIPTS[script], "-", [f"--{name}", text])
    except UserError as error:
        assert str(error).startswith(f"--{name}") and "\n" not in str(error)
    else:
        assert math.isfinite(getattr(options, name)) and text not in ("-1", "nan", "inf", "text")


OTHERS = [
    importlib.import_module(name).Settings()
    for name in (
        "dataset.clean.settings",
        "dataset.preview.settings",
        "dataset.scenes.__main__",
        "scripts.docs.__main__",
        "scripts.demo.train_base",
        "scripts.demo.train_tokenizer",
        "scripts.demo.train_vision_encoder",
    )
]


@pytest.mark.parametrize("options", [*SCRIPTS.values(), *OTHERS])
def test_every_number_has_bounds(options):
    for field in numeric_fields(options):
        least, most = field.metadata["least"], field.metadata["most"]
        assert least >= 0 and most < math.inf, f"{type(options).__module__}: {field.name}"


MOST = {"batch_size": 4096, "epochs": 10**6, "log_interval": 10**9, "val_interval": 10**9}


@given(st.sampled_from(list(MOST)), st.integers())
def test_a_config_takes_a_number_or_names_it(name, value):
    if 1 <= value <= MOST[name]:
        assert getattr(replace(TrainConfig(), **{name: value}), name) == value
    else:
        with pytest.raises(
            UserError, match=f"--{name} is .*: it has to be from 1 to {MOST[name]:,}"
        ):
            replace(TrainConfig(), **{name: value})
