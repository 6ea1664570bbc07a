"""A number is within its bounds or refused in one line."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.numbers import check_number

ANYTHING = st.one_of(
    st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.lists(st.integers())
)


@given(ANYTHING, st.booleans())
def test_what_passes_is_a_number_within_the_bounds(value, is_whole):
    try:
        check_number("size", value, 1, 1000, is_whole)
    except UserError as error:
        assert str(error).startswith("size is ") and str(error).endswith("from 1 to 1,000")
        assert "\n" not in str(error) and len(str(error)) < 120
    else:
        assert type(value) in ((int,) if is_whole else (int, float)) and 1 <= value <= 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_bound_lets_what_is_not_finite_pass(value):
    with pytest.raises(UserError, match=f"size is {value}: it has to be from -inf to inf"):
        check_number("size", value, -math.inf, math.inf)


def test_the_kind_is_named_where_it_is_wrong():
    with pytest.raises(UserError, match="size is '64': it has to be a whole number from 1 to 9$"):
        check_number("size", "64", 1, 9, is_whole=True)
    with pytest.raises(UserError, match="size is True: it has to be a number from 0 to 1$"):
        check_number("size", True, 0, 1)
