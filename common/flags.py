"""Command-line flags made from a typed dataclass: an option is documented where it is typed.

The field's name is the flag's name, its type says how the value is read, and `option` adds the
rest: what it means, its bounds, other names. `parse_flags` reads a command line into a copy of the
dataclass; `list_flags` gives the same facts to the documentation. Flags of the published scripts
that have no field here are listed in the class as `published`, see PublishedFlag.
"""

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from types import UnionType
from typing import (
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from common.errors import UserError
from common.numbers import check_number

Options = TypeVar("Options")
MOST_SEED = 2**63 - 1  # that every generator takes


def option(
    default: Any,
    help: str,
    least: float = -math.inf,
    most: float = math.inf,
    aliases: tuple[str, ...] = (),
    group: str = "",
    positional: bool = False,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: its value if not given; a list is copied for each object.
        help: what it is, its unit, and what happens if it is not given.
        least: the smallest number allowed.
        most: the largest number allowed: beyond it a run would fill memory until it is killed.
        aliases: other names of the flag, such as "--data".
        group: title of the flags that begin with this one.
        positional: given by its place, without a name.
    """
    facts = dict(
        help=help, least=least, most=most, aliases=aliases, group=group, positional=positional
    )
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=facts)
    return dataclasses.field(default=default, metadata=facts)


class Flag(NamedTuple):
    """What the documentation shows of a flag."""

    names: tuple[str, ...]
    help: str
    default: Any
    group: str


class PublishedFlag(NamedTuple):
    """A flag of the published scripts that is no option here; it takes a value, as it did there.

    When it is given, a line says what to use now.

    Args:
        names: what was typed, such as ("--use_multi",).
        use_now: what to use now, or why nothing is needed.
        sets: value given -> options that it sets; other values are refused. Without it every value
            is taken and sets nothing.
    """

    names: tuple[str, ...]
    use_now: str
    sets: dict[str, dict[str, Any]] | None = None


# Of the training scripts, eval_vlm.py and web_demo_vlm.py alike.
NO_MOE = PublishedFlag(
    ("--use_moe",),
    "leave it out, there is no mixture of experts here; False is accepted, True is refused",
    sets={"False": {}, "false": {}, "0": {}},
)


def list_flags(defaults: Any) -> Iterator[Flag]:
    """The flags of an options object, in the order of its fields."""
    group = ""
    for field in dataclasses.fields(defaults):
        group = field.metadata["group"] or group
        name = field.name if field.metadata["positional"] else f"--{field.name}"
        names = (name, *field.metadata["aliases"])
        yield Flag(names, field.metadata["help"], getattr(defaults, field.name), group)


def parse_flags(defaults: Options, description: str, arguments: list[str] | None = None) -> Options:
    """Read a command line (sys.argv if not given) into a copy of `defaults`.

    The options check themselves when the copy is made, see `check_options`.
    """
    # the options of the class, and what was called otherwise in the published scripts
    parser = Parser(program_name(), description=description.splitlines()[0])
    types = get_type_hints(type(defaults))
    group = parser
    for flag, field in zip(list_flags(defaults), dataclasses.fields(defaults)):
        if field.metadata["group"]:
            group = parser.add_argument_group(flag.group)
        group.add_argument(
            *flag.names,
            default=argparse.SUPPRESS,
            help=_escape(flag.help + describe_default(flag.default)),
            **_how_to_read(types[field.name], field.name),
        )
    published = list_published(defaults)
    if published:
        group = parser.add_argument_group("published flags (so that old commands still work)")
        for flag in published:
            how = dict(nargs="?", const="", metavar="VALUE", default=argparse.SUPPRESS)
            group.add_argument(*flag.names, dest=flag.names[0], help=_escape(flag.use_now), **how)

    # options that are given come before those that a published flag sets
    given = vars(parser.parse_args(arguments))
    options: dict[str, Any] = {}
    for flag in published:
        if flag.names[0] in given:
            options |= _read_published(flag, given.pop(flag.names[0]))
    return dataclasses.replace(defaults, **options | given)


class Parser(argparse.ArgumentParser):
    """argparse, but what it cannot read is a UserError: one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the flags)")


def list_published(defaults: Any) -> tuple[PublishedFlag, ...]:
    """The published flags that an options object accepts beside its own."""
    return getattr(defaults, "published", ())


def _read_published(flag: PublishedFlag, value: str) -> dict[str, Any]:
    """The options that a published flag sets; UserError for a value that means nothing here."""
    name = flag.names[0]
    if flag.sets is not None and value not in flag.sets:
        raise UserError(f"{name} {value}".rstrip() + f" cannot be used here: {flag.use_now}")
    # torchrun and deepspeed start this once for each GPU: one line is enough.
    if os.environ.get("RANK", "0") == "0":
        print(f"{name} (of the published scripts): {flag.use_now}", flush=True)
    return {} if flag.sets is None else flag.sets[value]


def program_name() -> str:
    """What a user typed: "train_sft_vlm.py" or "python -m dataset.clean"."""
    main = sys.modules["__main__"].__spec__
    if main is None:
        return os.path.basename(sys.argv[0])
    return f"python -m {main.name.removesuffix('.__main__')}"


def describe_default(default: Any) -> str:
    """ " (default: 16)"; nothing for flags that are off or whose help says what happens."""
    if default is None or default is False or default in ("", []):
        return ""
    return f" (default: {' '.join(default) if isinstance(default, list) else default})"


def _escape(help: str) -> str:
    """argparse reads "%" as the start of a format."""
    return help.replace("%", "%%")


def _how_to_read(type_: Any, name: str) -> dict[str, Any]:
    """What argparse has to know about a field's type; `check_options` does the rest."""
    if type_ is bool:
        return {"action": "store_true"}
    words = _allowed_values(type_)
    kinds = [kind for kind in _members(type_) if kind in _READERS]
    metavar = name.upper() if kinds else f"{{{','.join(map(str, words))}}}"
    read_other = _READERS[kinds[0] if kinds else type(words[0])]

    def read(text: str) -> Any:
        """One of the words, such as "auto", or a value of the type."""
        return text if text in words else read_other(text)

    how = {"type": read, "metavar": metavar}
    if get_origin(type_) is list:
        # --image a.jpg b.jpg and --image a.jpg --image b.jpg are the same.
        return how | {"action": "extend", "nargs": "+"}
    # --resume alone means yes.
    return how | ({"nargs": "?", "const": "yes"} if "yes" in words else {})


def read_whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no whole number") from None


def read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is no number") from None


_READERS = {int: read_whole_number, float: read_number, str: str}


def _members(type_: Any) -> tuple:
    """The types that a union joins, or that a list holds; the type itself otherwise."""
    return get_args(type_) if get_origin(type_) in (Union, UnionType, list) else (type_,)


def _allowed_values(type_: Any) -> list:
    """The words, or numbers, that a Literal allows."""
    literals = [kind for kind in _members(type_) if get_origin(kind) is Literal]
    return [word for literal in literals for word in get_args(literal)]


def check_options(options: Any) -> None:
    """UserError for a number out of its bounds, or a word that is not among those allowed."""
    types = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value, facts = getattr(options, field.name), field.metadata
        if isinstance(value, int | float) and not isinstance(value, bool):
            check_number(f"--{field.name}", value, facts["least"], facts["most"])
        words = _allowed_values(types[field.name])
        others = tuple(kind for kind in _members(types[field.name]) if isinstance(kind, type))
        for word in value if isinstance(value, list) else [value]:
            if words and word not in words and not isinstance(word, others):
                choices = ", ".join(map(str, words))
                raise UserError(f"--{field.name} is {word!s:.60}: choose from {choices}")
