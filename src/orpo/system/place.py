"""Which of a run's processes this one is, as torchrun, accelerate, srun or mpirun say it in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from orpo.errors import UserError

# How launchers name (number of processes, own number, own number on this machine, number on this machine). PyTorch's names come first:
# torchrun and `accelerate launch` inside an srun or mpirun set them.
_NAMES = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher has started.

    Attributes:
        rank, world_size: its number and how many there are, on all machines.
        local_rank, local_world_size: the same on this machine.
        said_by: the variable that says how many; empty where none does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    said_by: str = ""


def read_place(environ: Mapping[str, str]) -> Place:
    """What the environment says of this process.

    Raises:
        UserError: it contradicts itself, or says that several processes were asked for and one was started.
    """
    for size_name, rank_name, local_name, local_size_name in _NAMES:
        if size_name not in environ:
            continue
        size = _number(environ, size_name)
        if size == 1 and size_name.startswith("SLURM"):
            return Place()
        if size > 1 and size_name == "SLURM_NTASKS" and "SLURM_STEP_ID" not in environ and environ.get("SLURM_PROCID", "0") == "0":
            raise UserError(
                f"{size_name} is {size}, and this process was not started by srun",
                where="launch",
                expected="one process per task",
                mend="start it with srun; for one process: orpo train --num_processes 1 …, or WORLD_SIZE=1 in the environment",
            )
        return _checked(environ, size_name, rank_name, local_name, local_size_name)
    if environ.get("MASTER_ADDR") and environ.get("ACCELERATE_MIXED_PRECISION") and "RANK" not in environ:
        # Without GPUs `accelerate launch --num_processes N` sets an address to meet at and starts one process.
        raise UserError(
            "accelerate was asked for several processes and has started one; on a CPU it starts no more",
            where="accelerate launch",
            mend="orpo train --num_processes N …, or torchrun --nproc_per_node N -m orpo train …; for one process leave --num_processes "
            "out (and MASTER_ADDR unset)",
        )
    return Place()


def _checked(environ: Mapping[str, str], size_name: str, rank_name: str, local_name: str, local_size_name: str) -> Place:
    size = _number(environ, size_name)
    if size > 1 and rank_name not in environ:
        raise UserError(
            f"{size_name} is {size}, and {rank_name} is not set",
            where="launch",
            expected="both, as torchrun sets them",
            mend=f"torchrun --nproc_per_node {size} …, or unset {size_name} to train with one process",
        )
    rank = _number(environ, rank_name) if rank_name in environ else 0
    if not 0 <= rank < max(size, 1) or size < 1:
        raise UserError(f"{rank_name} is {rank} of {size_name} {size}", where="launch", expected=f"{rank_name} from 0 to {size_name} - 1")
    local_size = _number(environ, local_size_name) if environ.get(local_size_name) else _tasks_here(environ, size)
    local_rank = _number(environ, local_name) if environ.get(local_name) else rank % local_size
    return Place(rank, size, local_rank, local_size, size_name)


def _tasks_here(environ: Mapping[str, str], size: int) -> int:
    """Tasks on this machine, where no variable counts them; Slurm has them as `2(x3),1`, by node."""
    if "SLURM_PROCID" not in environ:
        return size
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(size)
    each = [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    node = int(environ.get("SLURM_NODEID") or 0)
    return each[node] if node < len(each) else size


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name} is {environ[name]!r}", where="launch", expected="a whole number") from None


def own_rank() -> int:
    """This process's number, for who speaks; 0 where the environment cannot be understood."""
    try:
        return read_place(os.environ).rank
    except UserError:
        return int(os.environ["RANK"]) if os.environ.get("RANK", "").isdigit() else 0


def adopt(environ: MutableMapping[str, str]) -> Place:
    """The place, with PyTorch's names set for it, which torch, accelerate and trackers read.

    Raises:
        UserError: as `read_place`; or nothing says where processes on several machines meet.
    """
    place = read_place(environ)
    if place.world_size == 1:
        return place
    if not environ.get("MASTER_ADDR"):
        environ["MASTER_ADDR"] = _meeting_host(environ, place)
    if not environ.get("MASTER_PORT"):
        # Tasks of one step must name the same port, and two jobs on one machine different ones; below Linux's ephemeral ports.
        step = [int(environ[name]) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if environ.get(name, "").isdigit()]
        environ["MASTER_PORT"] = str(20_000 + (sum(step) % 12_000 if step else 9_500))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, number in zip(names, (place.rank, place.world_size, place.local_rank, place.local_world_size), strict=True):
        environ.setdefault(name, str(number))
    return place


def _meeting_host(environ: Mapping[str, str], place: Place) -> str:
    if place.local_world_size == place.world_size and place.said_by != "WORLD_SIZE":
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    first = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\])?", nodes)  # node[01-03,07],other
    if place.said_by.startswith("SLURM") and first is not None:
        return first[1] + (first[2] or "")
    raise UserError(
        f"{place.said_by} is {place.world_size}, and nothing says where the processes meet",
        where="MASTER_ADDR",
        expected="the name of process 0's machine, the same for all",
        mend="export MASTER_ADDR and MASTER_PORT, or start it with torchrun, which does",
    )
