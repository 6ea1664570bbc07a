"""Flags made from a dataclass: read, checked, listed."""

import re
import runpy
from dataclasses import FrozenInstanceError, asdict, dataclass, replace
from typing import ClassVar, Literal

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
    size: int | Literal["auto"] = option(4, "a size", least=1)
    share: float | None = option(None, "a share; none if not given", least=0)
    kind: Literal["red", "blue"] = option("red", "a color")
    again: Literal["yes", "auto"] | None = option(None, "whether to continue", group="y")
    loud: bool = option(False, "print more")

    def __post_init__(self):
        check_options(self)


def read(*arguments: str) -> dict:
    return asdict(parse_flags(Options(), "What it does.\n\nMore.", list(arguments)))


def test_each_type_is_read():
    defaults = asdict(Options())
    assert read() == defaults
    given = ["--n", "x", "y", "--size", "auto", "--share", "0.5", "--kind", "blue", "--again"]
    values = dict(names=["x", "y"], size="auto", share=0.5, kind="blue", again="yes", loud=True)
    assert read(*given, "--loud") == values
    assert read("--names", "x", "--n", "y")["names"] == ["x", "y"]
    assert read("--again", "auto", "--size", "7") == defaults | {"again": "auto", "size": 7}


def test_what_cannot_be_is_refused_from_a_command_line_and_in_python(capsys):
    for arguments in (["--size", "many"], ["--kind", "green"], ["--colour"], ["--loud", "yes"]):
        with pytest.raises(SystemExit):
            read(*arguments)
        assert capsys.readouterr().err.count("error: ") == 1
    with pytest.raises(UserError, match="--size is 0: it has to be at least 1"):
        read("--size", "0")
    with pytest.raises(UserError, match="--share is nan"):
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
    assert [flag.group for flag in flags] == ["x"] * 4 + ["y"] * 2
    assert flags[0].names == ("--names", "--n") and flags[0].help.startswith("some names")
    defaults = [describe_default(flag.default) for flag in flags]
    assert defaults == [" (default: a b)", " (default: 4)", "", " (default: red)", "", ""]


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


@given(st.sampled_from(["batch_size", "epochs", "log_interval", "val_interval"]), st.integers())
def test_a_config_takes_a_number_or_names_it(name, value):
    if value >= 1:
        assert getattr(replace(TrainConfig(), **{name: value}), name) == value
    else:
        with pytest.raises(UserError, match=f"--{name} is {value}: it has to be at least 1"):
            replace(TrainConfig(), **{name: value})
