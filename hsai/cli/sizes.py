"""Sizes on the command line: a whole number of a unit."""

import re

from hsai.errors import InputError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_size(text: str, option: str) -> int:
    """Bytes of "500MB", which `option` was given; raises `InputError` for what is no size."""
    found = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if found is None or int(found[1]) == 0:
        raise InputError(f"{option} {text} is no size; give a whole number of {', '.join(UNITS)}, such as 500MB")
    return int(found[1]) * UNITS[found[2]]
