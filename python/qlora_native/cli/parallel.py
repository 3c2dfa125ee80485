"""Several processes that train together, started by torchrun or `accelerate launch`.

Each is a rank with a device of its own. Rank 0 alone writes files and speaks; the others do what it
does wherever tensors are exchanged.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from qlora_native.cli.errors import InputError, RankLostError, require
from qlora_native.cli.progress import stderr, stdout
from qlora_native.hf.optimizers import OPTIMIZERS

OPTIMIZER_SHARDS = "optimizer_shards"
"""The folder of a checkpoint with the states of an optimizer that is split over ranks."""


class Ranks:
    """This process's place among those that train together; a lone one is rank 0 of 1."""

    def __init__(self, rank: int, size: int, timeout: datetime.timedelta | None = None) -> None:
        self.rank, self.size = rank, size
        # Of its own, so that agreeing on something does not wait for a GPU.
        self._host_group = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None

    @property
    def is_main(self) -> bool:
        """Whether it is rank 0."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.size > 1:
            dist.barrier(self._host_group)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the body before the others do."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._host_group)
        return bool(found.item())

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the ranks, in fp64."""
        if self.size == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found, group=self._host_group)
        return found.tolist()


@contextlib.contextmanager
def ranks(device: str, timeout_seconds: int) -> Iterator[Ranks]:
    """Joins the other processes that a launcher started with this one, if it did.

    Args:
        device: what --device says: with "cpu" the ranks talk over gloo, else over NCCL, and each
            takes the GPU of its number on its machine.
        timeout_seconds: how long a rank waits for the others.

    Raises:
        InputError: there are fewer GPUs than ranks on this machine.
        RankLostError: in place of what torch raises in the body when another rank is gone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(0, 1)
        return
    rank = int(os.environ["RANK"])
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        local = int(os.environ.get("LOCAL_RANK", rank))
        count = torch.cuda.device_count()
        require(local < count, f"{count} GPUs for at least {local + 1} processes on this machine")
        torch.cuda.set_device(local)
    if rank > 0:
        stdout.quiet = stderr.quiet = True
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
        yield Ranks(rank, size, timeout)
        dist.destroy_process_group()
    except InputError:
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise RankLostError(
            f"rank {rank} of {size} lost another one: {str(error).strip().splitlines()[0]}"
        ) from error


def check_run(ranks: Ranks, sharded: bool, optimizer: str, checkpoint: Path | None) -> None:
    """Refuses what ranks cannot do together, and checkpoints that others of another kind wrote.

    Raises:
        InputError: an optimizer that does not save split states; another number of ranks, which
            would make other batches; a checkpoint with whole states, which are not split.
    """
    require(
        not sharded or optimizer in OPTIMIZERS,
        f"--optim {optimizer}: with --fsdp it is one of {', '.join(OPTIMIZERS)}",
    )
    if checkpoint is None:
        return
    before = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    require(
        before == ranks.size,
        f"--resume: {checkpoint.name} is of {before} processes, and now there are {ranks.size}: "
        "their batches would be other ones",
    )
    require(
        not sharded or (checkpoint / OPTIMIZER_SHARDS).is_dir(),
        f"--resume: {checkpoint.name} was written without --fsdp; go on without it",
    )


def accelerate_asks_for_fsdp() -> bool:
    """Whether `accelerate launch` was told to use FSDP; from then on it is not told to itself.

    The command shards by itself, so that it is the same under every launcher and on a CPU.
    """
    return os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1", "yes")


def is_lost(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other ranks are gone or late."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text
        for sign in ("Connection closed by peer", "Connection reset by peer", "gloo/transport",
                     "Timed out waiting", "Broken pipe", "Connection refused")
    )  # fmt: skip
