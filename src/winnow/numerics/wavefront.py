"""Rounding with errors fed back along rows and columns, many entries at once.

With C = R R^T and F = S S^T, both roots upper triangular, the objective tr(F D C D^T) is ||S^T D R||^2. Its entry (i, j) is
S_ii R_jj (D_ij + a term of the entries to its left and above it), which is made as small as the grid allows. All entries of an
antidiagonal can be rounded at once, but each depends on whole rows and columns. The matrix is therefore divided into tiles, and
all tiles of an antidiagonal of tiles are rounded together, one antidiagonal of each after the other. Products of matrices apply a
tile to the other tiles of its block, and whole blocks to all that follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from winnow.numerics.feedback import Grids

TILE = 32  # rows and columns of a tile
BLOCK = 128  # rows and columns of a block, a multiple of TILE
SIZES = 4  # sizes of the buffers for the tiles of an antidiagonal, of which there are few at its ends


def upper_root(metric: Tensor) -> Tensor:
    """R (n, n), upper triangular, with R R^T = metric."""
    return torch.linalg.cholesky(metric.flip(0, 1)).flip(0, 1)


def pull_of(root: Tensor) -> Tensor:
    """(n, n), strictly upper triangular: entry (i, j) is how much a change of number i adds to the target of number j."""
    return -(root / root.diagonal()).triu(1)


def both_feedback(weight: Tensor, grids: Grids, rows: Tensor, columns: Tensor) -> Tensor:
    """Changes D (S, m, n) of a matrix (m, n) that is rounded with errors fed back along rows and columns, for F = `rows` (m, m)
    and C = `columns` (n, n), both positive definite."""
    count, m, n = grids.scales.shape
    down, across = -(-m // TILE), -(-n // TILE)
    left, above = _Side(pull_of(upper_root(columns)), down, count, -1), _Side(pull_of(upper_root(rows)), across, count, 1)
    short = (0, across * TILE - n, 0, down * TILE - m)
    weights, scales, zeros = (
        functional.pad(part, short).contiguous() for part in (weight[None], grids.scales, grids.zeros)
    )  # (S or 1, TILE down, TILE across)
    left.found[:, :, : across * TILE] = weights.expand(count, -1, -1).unflatten(1, (down, TILE)).transpose(0, 1).flatten(1, 2)
    longest, buffers = min(down, across), {}
    for wave in range(down + across - 1):
        first, last = max(0, wave - across + 1), min(down - 1, wave)
        i, j, strip, own = first, wave - first, across - 1 - wave + first, last - first + 1  # of the first tile of `own`
        size = -(-own * SIZES // longest)
        if size not in buffers:
            buffers[size] = _Tiles(-(-longest * size // SIZES), grids)
        tiles = buffers[size]
        parts = [_diagonal(part, i, j, own) for part in (weights, scales, zeros)]
        into = left.enter(i, j, own), above.enter(strip, i, own).mT
        tiles.fill(parts, *into, (left.band(j, own).flip(1), above.band(i, own)))
        tiles.round()
        for kept, buffer in zip(into, (tiles.change, tiles.rest), strict=True):
            kept.copy_(tiles.entries(buffer)[..., :own].permute(3, 2, 0, 1))
        left.apply(i, j, own)
        above.apply(strip, i, own)
    return left.found[:, :, :n].unflatten(1, (count, TILE)).permute(1, 0, 2, 3).flatten(1, 2)[:, :m]


def _diagonal(matrix: Tensor, i: int, j: int, own: int) -> Tensor:
    """(own, S, TILE, TILE): a view of the tiles (i, j), (i + 1, j - 1), ... of (S, m, n)."""
    count, strides = len(matrix), matrix.stride()
    begin = matrix.storage_offset() + TILE * (i * strides[1] + j)
    return matrix.as_strided((own, count, TILE, TILE), (TILE * (strides[1] - 1), *strides), begin)


class _Side:
    """What entries contribute to the targets of later ones in the same row (or column). A strip is a row (column) of tiles. In
    consecutive strips, the tiles that are rounded together are one further back (`turn` -1) or further on (1)."""

    def __init__(self, pull: Tensor, strips: int, count: int, turn: int):
        self.tiles, self.turn = -(-len(pull) // TILE), turn
        self.window = 2 * (BLOCK // TILE) - 1  # tiles to which a tile is applied at once
        width, reach = self.tiles * TILE, self.window * TILE
        wide = functional.pad(pull, (0, width + reach - len(pull), 0, width - len(pull)))
        # Targets, until they are known; then changes. The last columns are never read.
        self.found = pull.new_zeros(strips, count * TILE, width + reach)
        begins = range(0, width, TILE)[::turn]
        self.near = torch.stack([wide[k : k + TILE, k + TILE : k + TILE + reach] for k in begins])
        own = functional.pad(torch.stack([wide[k : k + TILE, k : k + TILE] for k in begins]), (0, TILE))
        band = own.as_strided((self.tiles, TILE, TILE - 1), (2 * TILE * TILE, 2 * TILE + 1, 1), 1)
        self.bands = band.permute(2, 1, 0).contiguous()  # (distance - 1, number, tile): to later numbers of the same tile
        for k in begins:
            wide[k : k + TILE, k : k + TILE + reach] = 0
        self.far = wide

    def enter(self, strip: int, at: int, own: int) -> Tensor:
        """(own, S, TILE, TILE): the targets of the tiles `at`, `at` + turn, ... of strips from `strip` on."""
        per = BLOCK // TILE
        for lane in range(own):
            tile, number = at + self.turn * lane, strip + lane
            leads = number % per == (0 if self.turn < 0 else per - 1) or number == (len(self.found) - 1 if self.turn > 0 else 0)
            if leads and tile % per == 0 and tile > per:
                # The others of these strips are up to `per` - 1 tiles behind, so that all changes before this are known.
                known, begin, group = (tile - per) * TILE, tile * TILE, self.found[number - number % per :][:per]
                part = self.far[:known, begin : begin + BLOCK]
                group[:, :, begin : begin + part.shape[1]] += (group[:, :, :known].flatten(0, 1) @ part).unflatten(
                    0, group.shape[:2]
                )
        return self._lanes(strip, at, own, TILE).unflatten(1, (-1, TILE))

    def apply(self, strip: int, at: int, own: int) -> None:
        """Apply the changes of these tiles to the targets behind them."""
        self._lanes(strip, at + 1, own, self.window * TILE).baddbmm_(
            self._lanes(strip, at, own, TILE), self.near[self._tiles(at, own)]
        )

    def band(self, at: int, own: int) -> Tensor:
        return self.bands[:, :, self._tiles(at, own)]

    def _tiles(self, at: int, own: int) -> slice:
        begin = at if self.turn > 0 else self.tiles - 1 - at
        return slice(begin, begin + own)

    def _lanes(self, strip: int, at: int, own: int, width: int) -> Tensor:
        """(own, S TILE, width): a view from the tiles on."""
        high, row = self.found.shape[1:]
        return self.found.as_strided((own, high, width), (high * row + self.turn * TILE, row, 1), strip * high * row + at * TILE)


class _Tiles:
    """Tiles that are rounded together. Buffers (2 TILE - 1, TILE, S, tiles) store them by antidiagonals: the second axis is the
    row of an entry or, in `above`, its column from the right, so that the entries of an antidiagonal are slices of both."""

    def __init__(self, size: int, grids: Grids):
        like, shape = grids.scales, (2 * TILE - 1, TILE, len(grids.scales), size)
        self.left, self.above, self.scale, self.divisor, self.zero, self.change, self.rest = like.new_zeros(7, *shape)
        self.weight = like.new_zeros(*shape[:2], 1, size)
        self.bands = like.new_zeros(2, TILE - 1, TILE, 1, size)
        target, value = like.new_zeros(2, *shape[1:])
        self.ends = grids.low[:, None], grids.high[:, None]
        self.steps = []
        for step in range(2 * TILE - 1):
            first, many = max(0, step - TILE + 1), TILE - abs(step - TILE + 1)
            here, mirrored = slice(first, first + many), slice(max(0, TILE - 1 - step), max(0, TILE - 1 - step) + many)
            later = slice(step + 1, step + TILE)
            reach = min(TILE - 1, 2 * TILE - 2 - step)
            buffers = (self.left, self.zero, self.divisor, self.scale, self.weight, self.change, self.rest)
            self.steps.append((
                *(buffer[step, here] for buffer in buffers), self.above[step, mirrored], target[here], value[here],
                self.left[later, here], self.bands[0, :reach, mirrored], self.above[later, mirrored], self.bands[1, :reach, here],
            ))  # fmt: skip

    def round(self) -> None:
        """Set `change`, and `rest`: the change without what the entries to its left ask for."""
        for (
            left, zero, divisor, scale, weight, change, rest, above, target, value, right, from_left, below, from_above,
        ) in self.steps:  # fmt: skip
            torch.add(left, above, out=target)
            torch.addcdiv(zero, target, divisor, out=value).round_().clamp_(*self.ends).sub_(zero).mul_(scale)
            torch.sub(value, weight, out=change)
            torch.sub(value, left, out=rest)
            right.addcmul_(from_left, change)
            below.addcmul_(from_above, rest)

    def fill(self, parts: list[Tensor], left: Tensor, above: Tensor, bands: tuple[Tensor, Tensor]) -> None:
        """From weights, scales, zero points and both parts of the targets, all (tiles, S, TILE, TILE)."""
        own = len(left)
        self.left.zero_()
        self.above.zero_()
        for buffer, part in zip((self.weight, self.scale, self.zero, self.left), (*parts, left), strict=True):
            self.entries(buffer)[..., :own].copy_(part.permute(2, 3, 1, 0))
        self.entries(self.above, mirrored=True)[..., :own].copy_(above.permute(2, 3, 1, 0))
        self.divisor.copy_(self.scale).masked_fill_(self.scale == 0, math.inf)  # the code is then the zero point
        for buffer, band in zip(self.bands, bands, strict=True):
            buffer[:, :, 0, :own] = band

    @staticmethod
    def entries(buffer: Tensor, mirrored: bool = False) -> Tensor:
        """(TILE, TILE, S, tiles): a view of a buffer by rows and columns."""
        count, size = buffer.shape[2:]
        row, column, begin = (TILE, TILE - 1, TILE - 1) if mirrored else (TILE + 1, TILE, 0)
        numbers = count * size
        strides = (row * numbers, column * numbers, size, 1)
        return buffer.as_strided((TILE, TILE, count, size), strides, buffer.storage_offset() + begin * numbers)
