"""Runs parts of a batch in parallel threads, for models so small that their operations cannot keep more than one thread busy.

Torch and BLAS each distribute every operation over their own threads, which wait for each other after every operation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from winnow.numerics.products import one_thread_of_blas


class Lanes:
    """Runs parts in parallel and makes them add to sums in a fixed order, so that sums are bit-identical with any number of
    lanes. A thread that runs no part may add at any time."""

    def __init__(self, most: int) -> None:
        """`most`: the largest number of parallel parts, at most torch's number of threads."""
        self.most = most
        self.own = threading.local()  # the part that a thread runs
        self.changed = threading.Condition()
        self.added: set[tuple[int, Hashable]] = set()  # (part, sum it has added to)
        self.ended: set[int] = set()
        self.failed = False

    def run(self, parts: Sequence[Callable[[], None]]) -> None:
        """Run all parts; the first error is raised when all have ended."""
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
            torch.set_num_threads(threads)  # torch has a number per process and one per thread
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
        """Context manager in which a part adds, once, to the sum `name`; waits until all earlier parts have added or ended."""
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
