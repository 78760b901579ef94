"""When something is to happen by itself: cron expressions, checked when they are read."""

from __future__ import annotations

import re

from personalize_core.errors import shown

FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of the month", 1, 31), ("month", 1, 12), ("day of the week", 0, 7))
NAMES: dict[str, list[str]] = {
    "month": ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"],
    "day of the week": ["sun", "mon", "tue", "wed", "thu", "fri", "sat"],
}
_PART = re.compile(r"(?P<first>\*|\w+)(-(?P<last>\w+))?(/(?P<step>\d{1,4}))?")
EXAMPLE = "write five fields, such as '0 2 * * *' for every night at two o'clock"


def check_cron(expression: str) -> str:
    """The same expression, if it is one of five fields: minute, hour, day of the month, month, day of the week.

    Raises:
        ValueError: it is none; the message says which field is wrong.
    """
    fields = expression.split()
    if len(fields) != len(FIELDS):
        raise ValueError(f"it is no cron expression, which has five fields; {EXAMPLE}")
    for field, (name, lowest, highest) in zip(fields, FIELDS, strict=True):
        for part in field.split(","):
            if not _is_good(part, name, lowest, highest):
                raise ValueError(f"{shown(part)} is no {name} of a cron expression ({lowest} to {highest}); {EXAMPLE}")
    return expression


def _is_good(part: str, name: str, lowest: int, highest: int) -> bool:
    match = _PART.fullmatch(part)
    if not match or (match["first"] == "*" and match["last"]):
        return False
    if match["step"] and (int(match["step"]) == 0 or (match["first"] != "*" and not match["last"])):
        return False
    ends = [_number(end, name, lowest) for end in (match["first"], match["last"]) if end and end != "*"]
    return all(lowest <= end <= highest for end in ends) and ends == sorted(ends)


def _number(written: str, name: str, lowest: int) -> int:
    """A number or a month's or day's name; -1 for anything else."""
    if written.lower() in NAMES.get(name, []):
        return NAMES[name].index(written.lower()) + lowest
    return int(written) if written.isascii() and written.isdecimal() and len(written) < 3 else -1
