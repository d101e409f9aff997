"""The processes of one run: the group that they make, and what they agree on before anything is loaded.

transformers and accelerate make no group on a machine without accelerator unless they are told `use_cpu`, and then every process trains
alone; they know nothing of srun; they ignore `ddp_timeout` on a CPU. So the group is made here, before they look.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from orpo.errors import OrpoError, ToldElsewhereError, UserError
from orpo.system.place import Place, adopt
from orpo.system.process import let_first_speak
from orpo.system.ranks import current_ranks, is_lost_contact

T = TypeVar("T")

JOIN_S = 300.0
"""Longest wait for processes that have not come yet. Launchers start all of them at once; loading Python takes seconds."""

SPEAK_S = 30.0
"""Longest wait for the others of a process that has to say why it stops before there is a group."""


def join(*, use_cpu: bool, backend: str | None, timeout_s: float) -> bool:
    """Make this process part of its group, unless an accelerator's group is wanted, which accelerate makes.

    Args:
        use_cpu: compute on the CPU though there is an accelerator.
        backend: of the collectives, as the user named it; None: chosen.
        timeout_s: of a collective.

    Returns:
        Whether to compute on the CPU.

    Raises:
        UserError: the environment contradicts itself or the group, or not all processes came.
    """
    import torch.distributed as dist

    place = adopt(os.environ)
    let_first_speak()
    group_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if backend not in (None, "gloo", "mpi") and (use_cpu or not _has_accelerator()):
        raise UserError(
            f"found {backend!r}, and there is no accelerator to use it on", where="ddp_backend", mend="leave it out: gloo is chosen"
        )
    if max(place.world_size, group_size) == 1:
        return use_cpu
    if dist.is_initialized() or (not use_cpu and _has_accelerator()):
        if not dist.is_initialized():
            _check_devices(place, backend)
            return False
        require_group(group_size, place)
        return use_cpu or not _has_accelerator()
    _meet(place, timeout_s, min(timeout_s, JOIN_S))
    return True


def _meet(place: Place, timeout_s: float, join_s: float) -> None:
    import torch.distributed as dist

    with _told_if_missing(place, join_s):
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=join_s)))
        store.set_timeout(timedelta(seconds=join_s))
        dist.init_process_group(
            "gloo", store=dist.PrefixStore("default_pg", store), rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
        )


def meet_in_store(place: Place, name: str) -> Any:
    """The store of the processes that a launcher has started, once all of them are there; no group is made.

    Args:
        place: this process's, adopted.
        name: what the keys of this use begin with.

    Raises:
        UserError: not all processes came.
    """
    import torch.distributed as dist

    with _told_if_missing(place, JOIN_S):
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
        store = dist.PrefixStore(name, store)
        store.set_timeout(timedelta(seconds=JOIN_S))
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{other}" for other in range(size)])
    return store


@contextmanager
def _told_if_missing(place: Place, join_s: float) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:  # DistError is a RuntimeError
        raise UserError(
            f"rank {place.rank}: not all of {place.world_size} processes met at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"within {join_s:.0f} s ({(str(error).splitlines() or [''])[0][:200]})",
            where=place.said_by,
            expected=f"{place.world_size} processes, each with its own RANK",
            mend=f"start all of them, or unset {place.said_by} to train with one process",
        ) from error


def require_group(world_size: int, place: Place | None = None) -> None:
    """Hold the group that there is against what the environment says.

    Raises:
        UserError: they differ; each process, or each part of them, would train a model of its own.
    """
    place = adopt(os.environ) if place is None else place
    if world_size == place.world_size:
        return
    if not place.said_by:
        raise UserError(
            f"there is a process group of {world_size}, and the environment does not say which of them this is",
            where="launch",
            expected="RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them",
            mend="start the script with torchrun, or set them before the group is made",
        )
    raise UserError(
        f"{place.said_by} is {place.world_size}, and the process group has {world_size}",
        where="launch",
        expected="one group of all processes",
        mend=f"start with torchrun --nproc_per_node {place.world_size}, or unset {place.said_by} to train with one process",
    )


def _has_accelerator() -> bool:
    """Whether there is one whose processes can talk to each other; MPS has one device and no collectives."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def _check_devices(place: Place, backend: str | None) -> None:
    import torch

    count = torch.accelerator.device_count()
    if place.local_world_size > count and backend != "gloo":
        raise UserError(
            f"{place.local_world_size} processes on this machine, and {count} device{'s' if count > 1 else ''} for them",
            where="launch",
            mend=f"start {count} per machine, or use_cpu: true",
        )


def told_together(work: Callable[[], T]) -> T:
    """Do what every rank does before there is a group; where it fails on all of them alike, rank 0 alone says so.

    Raises:
        OrpoError: whatever `work` raised.
        ToldElsewhereError: another rank says it.
    """
    try:
        return work()
    except OrpoError as error:
        if current_ranks().world_size == 1 and not _met_to_speak():
            raise
        _exchange(None, error)
        raise


def _met_to_speak() -> bool:
    import torch.distributed as dist

    try:
        place = adopt(os.environ)
        if place.world_size == 1 or dist.is_initialized():
            return False
        _meet(place, SPEAK_S, SPEAK_S)
    except UserError:
        return False
    return True


def on_all(work: Callable[[], T]) -> T:
    """Do `work` on every rank and go on only if it went well on all of them. All ranks call it; no collective inside `work`.

    Raises:
        Exception: what `work` raised on this rank; an `OrpoError` is raised by rank 0 alone, whichever rank had it.
        ToldElsewhereError: another rank says it.
    """
    if current_ranks().world_size == 1:
        return work()
    try:
        result = work()
    except Exception as error:
        _exchange(None, error)
        raise
    _exchange(None, None)
    return result


def alike(work: Callable[[], T]) -> T:
    """Do what goes wrong on every rank or on none, such as what all ranks come to together; rank 0 alone says why. All ranks call it.

    Raises:
        Exception: what `work` raised; an `OrpoError` on rank 0 alone.
        ToldElsewhereError: rank 0 says it.
    """
    try:
        return work()
    except OrpoError as error:
        if current_ranks().is_first or is_lost_contact(error):
            raise
        raise _elsewhere(str(error).splitlines()[0], error.exit_code) from error


def agree(facts: Mapping[str, Any]) -> None:
    """Go on only if every rank has the same facts. All ranks call it.

    Raises:
        UserError: on rank 0, naming what differs and between whom.
        ToldElsewhereError: on the others.
    """
    ranks = current_ranks()
    if ranks.world_size == 1:
        return
    every = _exchange({name: _shown(value) for name, value in facts.items()}, None)
    differences = []
    for name in dict.fromkeys(name for one in every for name in one):
        values = [one.get(name, "nothing") for one in every]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            differences.append(f"    {name}: rank 0 has {values[0]}, rank {other} has {values[other]}")
    if not differences:
        return
    if not ranks.is_first:
        raise _elsewhere("the ranks differ", UserError.exit_code)
    raise UserError(
        "the processes would not train the same:\n" + "\n".join(differences[:8]),
        where="launch",
        mend="start every process with the same command, files, packages and environment",
    )


def _shown(value: Any) -> str:
    from orpo.system.redact import redact_text

    text = redact_text(repr(getattr(value, "value", value)))
    return text if len(text) <= 100 else text[:80] + f"… ({len(text)} characters, hash {hash_of(text)})"


def hash_of(text: str) -> str:
    """Eight characters that tell two long texts apart."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _exchange(payload: Any, error: Exception | None) -> list[Any]:
    """Every rank's payload, if no rank has an error; this rank's own `error` is the caller's to raise, unless another says it."""
    ranks = current_ranks()
    failure = None if error is None else (str(error), getattr(error, "exit_code", 1), isinstance(error, OrpoError))
    every = ranks.gather((failure, payload))
    failures = [(rank, found) for rank, (found, _) in enumerate(every) if found is not None]
    if not failures:
        return [one for _, one in every]
    rank, (text, exit_code, is_told_by_first) = failures[0]
    _raise_as(rank, text, exit_code, error, is_told_by_first=is_told_by_first, is_first=ranks.is_first)


def _raise_as(rank: int, text: str, exit_code: int, error: Exception | None, *, is_told_by_first: bool, is_first: bool) -> NoReturn:
    is_own = error is not None and not isinstance(error, OrpoError)
    if error is not None and (is_own or (is_first and rank == 0)):
        raise error  # with its traceback, which no other rank can show
    if is_told_by_first and is_first:
        told = OrpoError(f"rank {rank}: {text}")
        told.exit_code = exit_code
        raise told
    raise _elsewhere(f"rank {rank}: {(text.splitlines() or [''])[0]}", exit_code)


def _elsewhere(why: str, exit_code: int) -> ToldElsewhereError:
    error = ToldElsewhereError(f"stops with the other processes, which say why ({why})")
    error.exit_code = exit_code
    return error
