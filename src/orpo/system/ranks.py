"""What a checkpoint or a guard needs to know of the other processes of a run: three small collectives, and nothing for one process."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from orpo.errors import OrpoError

_LOST_CONTACT = re.compile(r"gloo|nccl|processgroup|connection (closed|reset|refused)|broken pipe|socket|store|timed out", re.IGNORECASE)


class LostContactError(OrpoError):
    """Another process of the run was killed or cannot be reached. Its own error, where it had one, is the cause and is told there."""


def is_lost_contact(error: BaseException) -> bool:
    """Whether an error is only about the connection to other processes."""
    import torch.distributed as dist

    is_of_torch = isinstance(error, dist.DistError) or (type(error) is RuntimeError and bool(_LOST_CONTACT.search(str(error))))
    return is_of_torch or isinstance(error, LostContactError)


def lost_contact(rank: int, error: BaseException) -> LostContactError:
    """What to tell of such an error."""
    if isinstance(error, LostContactError):
        return error
    summary = (str(error).splitlines() or [type(error).__name__])[0]
    return LostContactError(f"rank {rank} lost contact with another process, which was killed or cannot be reached ({summary[:200]})")


@contextmanager
def _told_when_lost(rank: int) -> Iterator[None]:
    """Around a collective at any time, also before a run's own watch over its processes begins (`training.guards.peers`)."""
    try:
        yield
    except Exception as error:
        if is_lost_contact(error):
            raise lost_contact(rank, error) from None
        raise


class Ranks:
    """One process alone. `TorchRanks` is the same over torch.distributed."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    @property
    def is_first(self) -> bool:
        """Rank 0 publishes, prunes and locks; the others only write their own files."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Also a barrier."""
        return [value]

    def from_first(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self.gather(value)[0]

    def max(self, values: Sequence[int]) -> list[int]:
        """Elementwise maximum over ranks: how all come to one decision at one step, at the price of one small reduction."""
        return list(values)


class TorchRanks(Ranks):
    """The ranks of an initialised `torch.distributed` default group (gloo or NCCL)."""

    def __init__(self) -> None:
        import torch.distributed as dist

        super().__init__(dist.get_rank(), dist.get_world_size())

    def gather(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        with _told_when_lost(self.rank):
            dist.all_gather_object(values, value)
        return values

    def max(self, values: Sequence[int]) -> list[int]:
        import torch
        import torch.distributed as dist

        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        reduced = torch.tensor(list(values), dtype=torch.int64, device=device)
        with _told_when_lost(self.rank):
            dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
        return [int(value) for value in reduced.tolist()]


ALONE = Ranks()


def current_ranks() -> Ranks:
    """The ranks of this process: torch.distributed's where it is initialised with more than one process, else one process alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchRanks()
    return ALONE


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over the ranks of torch.distributed, or the values themselves in a single process."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """The largest over the ranks of torch.distributed, on the device: nobody waits for it before it is read."""
    import torch.distributed as dist

    values = values.clone()
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values
