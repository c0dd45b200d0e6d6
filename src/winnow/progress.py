"""Progress of long loops as plain log lines: readable in a file, in a terminal and in a cluster's log alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sized
from typing import Any

log = logging.getLogger(__name__)
SECONDS = 5.0


def every(items: Any, what: str) -> Iterator[Any]:
    """Iterate over `items` (sized); log how far it is every few seconds, and once at the end."""
    assert isinstance(items, Sized)
    began = last = time.monotonic()
    total = len(items)
    for index, item in enumerate(items):  # type: ignore[call-overload, var-annotated]
        yield item
        now = time.monotonic()
        if now - last > SECONDS or index + 1 == total:
            log.info("%d of %d %s, %.1f s", index + 1, total, what, now - began)
            last = now
