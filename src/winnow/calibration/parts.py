"""The part of the calibration windows that a job runs, where several share them."""

from __future__ import annotations


def part_of(count: int, part: str | None) -> slice:
    """The windows of a job, of `count` in all: all, or those of its `part`, such as `2-of-4`. Parts differ by one window."""
    if part is None:
        return slice(0, count)
    number, parts = map(int, part.split("-of-"))
    return slice((number - 1) * count // parts, number * count // parts)
