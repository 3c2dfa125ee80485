"""Products of groups of rows with a dense matrix each, in three ways.

Rows come sorted by group, and `ends` [E] (int32 or int64, on their device) says where each group
ends; the last end is the number of rows. `groups_of` picks the way. Only the one for CPUs reads the
ends on the host: on a GPU nothing waits, and shapes depend on shapes alone.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(Protocol):
    """Groups of S rows."""

    def product(self, rows: Tensor, stack: Tensor) -> Tensor:
        """rows_e stack[e] of every group e: [S, N] for rows [S, K] and a stack [E, K, N].

        The rows are contiguous, and so are the matrices or their transposes.
        """

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """left_e^T right_e of every group e: [E, L, R] for left [S, L] and right [S, R].

        Zero for a group without rows. Both are contiguous; the result's dtype may be wider.
        """


class HostGroups:
    """A product of torch for every group that has rows."""

    def __init__(self, ends: Tensor, rows: int) -> None:
        """Reads the ends.

        Raises:
            ValueError: they do not ascend from 0 to `rows`.
        """
        self.parts: list[tuple[int, slice]] = []
        start = 0
        for group, end in enumerate(ends.tolist()):
            if not start <= end <= rows:
                raise ValueError(f"group {group} ends at row {end}, after {start}, of {rows} rows")
            if end > start:
                self.parts.append((group, slice(start, end)))
            start = end
        if start != rows:
            raise ValueError(f"the last group ends at row {start} of {rows} rows")
        self.count = len(ends)

    def product(self, rows: Tensor, stack: Tensor) -> Tensor:
        """See `Groups`."""
        out = rows.new_empty(rows.shape[0], stack.shape[2])
        for group, part in self.parts:
            torch.mm(rows[part], stack[group], out=out[part])
        return out

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Groups`."""
        out = left.new_zeros(self.count, left.shape[1], right.shape[1])
        for group, part in self.parts:
            torch.mm(left[part].t(), right[part], out=out[group])
        return out


class TiledGroups:
    """Batched products of tiles, each of which has rows of one group.

    There are as many tiles as the worst division into groups needs; every tile takes a copy of its
    group's matrix.
    """

    def __init__(self, ends: Tensor, rows: int, rank: int) -> None:
        """Divides `rows` rows, more than none, for products with factors of this rank."""
        groups = len(ends)
        height = self.height(groups, rows, rank)
        # A group wastes less than a tile, and no more groups have rows than there are rows.
        tiles = (rows + min(groups, rows) * (height - 1)) // height
        ends = ends.to(torch.int64)
        sizes = torch.diff(ends, prepend=ends.new_zeros(1))
        starts = ends - sizes
        counts = (sizes + (height - 1)) // height
        first_tiles = counts.cumsum(0) - counts

        tile = torch.arange(tiles, device=ends.device)
        # Unused tiles, all at the end, are of a group that does not exist.
        self.group = torch.searchsorted(first_tiles + counts, tile, right=True)
        self.count = groups
        self.matrix = self.group.clamp(max=groups - 1)
        first_row = starts[self.matrix] + (tile - first_tiles[self.matrix]) * height
        row = first_row.unsqueeze(1) + torch.arange(height, device=ends.device)
        end = ends[self.matrix].unsqueeze(1)
        self.is_padding = (row >= end).unsqueeze(2)
        # What is not finite in one group's rows must not get into another's.
        self.row = torch.minimum(row, end - 1)

        row = torch.arange(rows, device=ends.device)
        group = torch.searchsorted(ends, row, right=True)
        self.place = row - starts[group] + first_tiles[group] * height

    @staticmethod
    def height(groups: int, rows: int, rank: int) -> int:
        """Rows of a tile: about as much is copied of matrices as tiles are padded."""
        return 1 << round(math.log2(max(rows * rank / groups, 1.0)) / 2)

    def product(self, rows: Tensor, stack: Tensor) -> Tensor:
        """See `Groups`."""
        return torch.bmm(rows[self.row], stack[self.matrix]).flatten(0, 1)[self.place]

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Groups`; the sums over tiles are in fp32, always in the same order."""
        tiles = left[self.row].masked_fill(self.is_padding, 0).transpose(1, 2)
        parts = torch.bmm(tiles, right[self.row]).float()
        sums = parts.new_zeros(self.count + 1, *parts.shape[1:])
        return sums.index_put((self.group,), parts, accumulate=True)[:-1]


class GroupedGemm:
    """torch's grouped product, where it is one launch."""

    def __init__(self, ends: Tensor) -> None:
        self.ends = ends.to(torch.int32)
        self.is_empty = torch.diff(self.ends, prepend=self.ends.new_zeros(1)) == 0

    @staticmethod
    def suits(x: Tensor, groups: int) -> bool:
        """Whether it runs for rows like `x`, without reading the ends on the host."""
        # Elsewhere torch loops over the groups; `ends` is read by a thread for each.
        return (
            x.dtype == torch.bfloat16
            and 0 < groups < 1024
            and torch.version.cuda is not None
            and torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0), (10, 3))
        )

    def product(self, rows: Tensor, stack: Tensor) -> Tensor:
        """See `Groups`."""
        out = _grouped_mm(_aligned(rows), _aligned(stack), offs=self.ends)
        return out[:, : stack.shape[2]]

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Groups`."""
        out = _grouped_mm(_aligned(left).t(), _aligned(right), offs=self.ends)
        # A sum of no products is not written.
        out.masked_fill_(self.is_empty.view(-1, 1, 1), 0)
        return out[:, : left.shape[1], : right.shape[1]]


def groups_of(x: Tensor, ends: Tensor, rank: int) -> Groups:
    """The groups of the rows of `x`, of which there are some, for products of this rank.

    Raises:
        ValueError: on a CPU, the ends do not ascend from 0 to the number of rows.
    """
    if x.device.type == "cpu":
        return HostGroups(ends, len(x))
    if GroupedGemm.suits(x, len(ends)):
        return GroupedGemm(ends)
    return TiledGroups(ends, len(x), rank)


# Its name before torch 2.10.
_grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm


def _aligned(matrices: Tensor) -> Tensor:
    """Rows of groups, or matrices in either order, padded by zeros to steps of 16 bytes."""
    step = 16 // matrices.itemsize
    cols = -matrices.shape[-1] % step
    rows = -matrices.shape[-2] % step if matrices.dim() == 3 else 0
    if rows or cols:
        return F.pad(matrices, (0, cols, 0, rows))
    # One row is contiguous whatever its stride is.
    if matrices.dim() == 2 and matrices.stride(0) != matrices.shape[1]:
        return matrices.clone(memory_format=torch.contiguous_format)
    return matrices if matrices.data_ptr() % 16 == 0 else matrices.clone()
