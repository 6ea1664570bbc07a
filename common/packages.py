"""Packages that only some commands need: requirements-data.txt, requirements-export.txt ..."""

from importlib.util import find_spec

from common.errors import UserError


def check_packages(requirements: str, *names: str) -> None:
    """UserError with what to type where one of these is not installed. None is imported.

    Args:
        requirements: the file that lists them.
        names: as they are imported.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: pip install -r {requirements}")
