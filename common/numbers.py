"""The one check of a number that comes from outside."""

import math

from common.errors import UserError


def check_number(
    name: str, value: object, least: float, most: float, is_whole: bool = False
) -> None:
    """UserError unless `value` is a number within its bounds; nan and infinity never are.

    Args:
        name: what it is called where it was given.
        value: what was given.
        least, most: the bounds.
        is_whole: only an int will do.
    """
    kind = "a whole number " if is_whole else "a number "
    if isinstance(value, int if is_whole else int | float) and not isinstance(value, bool):
        # Written so that nan is refused too.
        if least <= value <= most and abs(value) != math.inf:
            return
        kind = ""
    # Digits without end would fill the screen.
    raise UserError(f"{name} is {value!r:.40}: it has to be {kind}from {least:,} to {most:,}")
