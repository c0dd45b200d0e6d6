"""Progress of long loops as plain log lines, readable in files, terminals and cluster logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

log = logging.getLogger(__name__)
SECONDS = 5.0
Item = TypeVar("Item")


def every(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Iterate over `items`; log progress every few seconds and at the end."""
    began = last = time.monotonic()
    total = len(items)
    for index, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - last > SECONDS or index + 1 == total:
            log.info("%d of %d %s, %.1f s", index + 1, total, what, now - began)
            last = now
