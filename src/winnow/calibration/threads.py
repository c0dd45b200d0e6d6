"""Parts of a batch side by side, a thread each, where a model is so small that its operations keep one thread busy and no more.

Torch and BLAS share every operation out among threads of their own, which wait for each other after each, and for the other
library's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from winnow.numerics.products import one_thread_of_blas


class Lanes:
    """Runs parts and has them add in their order, since the last digits of a sum depend on it: sums are the same with any
    number of lanes. A thread that runs no part may add whenever it likes."""

    def __init__(self, most: int) -> None:
        """`most`: so many parts at a time, where torch has as many threads."""
        self.most = most
        self.own = threading.local()  # the number of the part that a thread runs
        self.changed = threading.Condition()
        self.added: set[tuple[int, Hashable]] = set()  # parts, and sums that they have added to
        self.ended: set[int] = set()
        self.failed = False

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run all; the first error of a part is raised when all have ended."""
        threads = torch.get_num_threads()
        lanes = min(self.most, threads, len(parts))
        if lanes == 1:
            for part in parts:
                part()
            return
        self.added, self.ended, self.failed = set(), set(), False

        def begin() -> None:
            torch.set_num_threads(threads // lanes)

        try:
            with one_thread_of_blas(), ThreadPoolExecutor(lanes, initializer=begin) as pool:
                ends = [pool.submit(self._part, number, part) for number, part in enumerate(parts)]
        finally:
            torch.set_num_threads(threads)  # torch keeps a number for the process beside that of each thread
        errors = [error for end in ends if (error := end.exception()) is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])

    def _part(self, number: int, part: Callable[[], None]) -> None:
        self.own.number = number
        try:
            part()
        except BaseException:
            self.failed = True
            raise
        finally:
            with self.changed:
                self.ended.add(number)
                self.changed.notify_all()

    @contextmanager
    def turn(self, name: Hashable) -> Iterator[None]:
        """Held while a part adds to the sum of that name, which it does once; begins when all parts before have or are over."""
        number = getattr(self.own, "number", None)
        if number is None:
            yield
            return
        with self.changed:
            self.changed.wait_for(lambda: self.failed or all((n, name) in self.added or n in self.ended for n in range(number)))
            if self.failed:
                raise threading.BrokenBarrierError
        yield
        with self.changed:
            self.added.add((number, name))
            self.changed.notify_all()
