"""Estimate a run before it is started: memory, disk and time, from the configuration alone: orpo plan CONFIG.yaml [--key value …]

No weights are loaded. With data that is here, its real lengths are counted (--no_data does not); `orpo check` then measures one real step.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orpo.config.options import ORPOConfig
    from orpo.data.types import TokenGroup
    from orpo.run.config import RunConfig
    from orpo.training.hardware import Hardware, RankPlan
    from orpo.training.planning import Plan

NAME = "plan"
HELP = "estimate memory, disk and time of a run from its configuration"
TAKES_KEYS = True

SAMPLE_ROWS = 2000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that are no keys of the configuration."""
    parser.usage = "orpo plan [CONFIG.yaml] [--key value …] [--hardware 8xH100] [--json] [--no_data]"
    parser.add_argument("--hardware", metavar="[MACHINESx]NUMBERxDEVICE", help="plan for these: 8xH100, 2x8xA100, L4, cpu, 4xcpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--no_data", action="store_true", help="do not read the data; take every row as long as max_length allows")


def run(args: argparse.Namespace) -> int:
    """Print the estimate."""
    from orpo.cli.doctor import matmul_flops
    from orpo.run.config import given_facts, resolve
    from orpo.system.console import print_json, report_console, say
    from orpo.system.machine import memory_facts
    from orpo.system.process import quiet_libraries
    from orpo.training.hardware import parse_hardware
    from orpo.training.planning import make_plan

    quiet_libraries()
    config = resolve(None, args.keys, is_launch=False)
    training = config.training_args()
    import torch

    hardware = None if args.hardware is None else parse_hardware(args.hardware)
    lengths, rows = ({}, {}) if args.no_data else sample_lengths(config, training)
    flops = matmul_flops(training.device, getattr(torch, training.compute_dtype))
    plan = make_plan(config, training, flops=flops, **lengths)
    if hardware is not None:
        return _tell_ranks(config, training, lengths, hardware, flops, is_json=args.json)
    disk = plan.disk_bytes(training.save_total_limit, training.save_steps, has_checkpoints=training.save_strategy != "no")
    if args.json:
        facts = {
            **plan.to_dict(),
            "values": given_facts(config),
            "disk_bytes": disk,
            "data": {**lengths, **rows} or None,
            "device": str(training.device),
        }
        print_json({**facts, "device_memory": memory_facts(training.device)})
        return 0
    console = report_console(is_json=False)
    if "absent" in rows:
        say(console, f"data         lengths are guessed: {rows['absent']}")
    for line in plan_lines(plan, disk, training, has_data=bool(lengths)):
        say(console, line)
    return 0


def _tell_ranks(
    config: RunConfig, args: ORPOConfig, lengths: dict[str, Any], hardware: Hardware, flops: float | None, *, is_json: bool
) -> int:
    """The plan for hardware that is not here: what each process needs, for every way of spreading."""
    from orpo.config.options import CUDA_MICROBATCH_TOKENS
    from orpo.system.console import print_json, report_console, say
    from orpo.training.hardware import plan_ranks
    from orpo.training.planning import make_plan, model_shape
    from orpo.training.recompute import GIB, SHARE_OF_FREE_MEMORY

    dtype = args.compute_dtype if hardware.device is None else "float32" if args.bf16 is False else "bfloat16"
    args.bf16 = dtype == "bfloat16"
    if hardware.device is not None:
        args.max_tokens_per_microbatch = args.max_tokens_per_microbatch or CUDA_MICROBATCH_TOKENS
        args.memory_budget_gib = args.memory_budget_gib or hardware.device.memory_bytes * SHARE_OF_FREE_MEMORY / GIB
    plan = make_plan(config, args, **lengths)
    shape = model_shape(config, dtype)
    ranks = plan_ranks(plan, shape, config, args, hardware, dtype=dtype, flops=flops)
    if is_json:
        print_json({"hardware": hardware.name, "dtype": dtype, "ranks": [rank.to_dict() for rank in ranks], "plan": plan.to_dict()})
        return 0
    console = report_console(is_json=False)
    for line in rank_lines(plan, ranks, hardware, dtype):
        say(console, line)
    return 0


def rank_lines(plan: Plan, ranks: Sequence[RankPlan], hardware: Hardware, dtype: str) -> list[str]:
    """For a terminal: a line for each way of spreading, and of what the memory is."""
    from orpo.system.console import human_bytes, human_seconds

    room = None if hardware.device is None else hardware.device.memory_bytes
    lines = [
        f"parameters   {plan.num_parameters / 1e6:,.1f} M, {plan.num_trainable / 1e6:,.1f} M trained, {dtype}",
        f"step         {plan.tokens_per_step:,} packed tokens"
        + (f" of each of {hardware.num_ranks} processes, " if hardware.num_ranks > 1 else ", ")
        + f"micro-batches of at most {plan.tokens_per_microbatch:,}",
    ]
    for rank in ranks:
        fits = "" if room is None else f" of {human_bytes(room)}" + ("" if rank.memory_bytes <= 0.95 * room else ": DOES NOT FIT")
        time = "" if rank.seconds_per_step is None else f", roughly {human_seconds(rank.seconds_per_step)} a step"
        note = "  (needs DeepSpeed)" if rank.kind.startswith("zero") else ""
        lines.append(f"{rank.kind:<12} {human_bytes(rank.memory_bytes)} a process{fits}{time}{note}")
        parts = {"weights": rank.weights_bytes, "gradients": rank.gradients_bytes, "optimizer": rank.optimizer_bytes}
        parts |= {"gathered": rank.gathered_bytes, "activations": rank.activations_bytes, "logits": rank.logits_bytes}
        parts |= {"freed blocks": rank.freed_bytes, "libraries": rank.runtime_bytes}
        apart = f"; {human_bytes(rank.apart_bytes)} of it never at the same moment" if rank.apart_bytes else ""
        lines.append("             " + ", ".join(f"{part} {human_bytes(size)}" for part, size in parts.items() if size) + apart)
    loading = human_bytes(ranks[0].loading_bytes)
    lines.append(f"loading      {loading} of host memory: for each process (ddp, zero2), for a machine (fsdp2, zero3)")
    lines.append(f"checkpoint   {human_bytes(plan.checkpoint_bytes)} each")
    return lines


def _budget_note(args: ORPOConfig) -> str:
    return "" if args.memory_budget_gib is None else f", for a budget of {args.memory_budget_gib:g} GiB"


def sample_lengths(config: RunConfig, args: ORPOConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """(packed tokens of the first rows to train on, and their number where that is all of them; facts about those rows).

    Raises:
        UserError: what training would stop at: a source that is here and cannot be read, or holds nothing usable.
    """
    from itertools import islice

    from orpo.data.dataset import fingerprint, prepare_groups
    from orpo.data.reading.sources import AbsentDataError
    from orpo.run.data import load_encoder, open_run_rows, split_by_prompt
    from orpo.training.planning import packed_lengths

    try:
        first = list(islice(open_run_rows(config).train, SAMPLE_ROWS + 1))
    except AbsentDataError as error:
        return {}, {"absent": f"{error.where} is not at hand ({error.what})"}
    is_all = len(first) <= SAMPLE_ROWS
    groups: Sequence[TokenGroup]
    groups, report = prepare_groups(first[:SAMPLE_ROWS], load_encoder(config))
    if not groups and not is_all:
        return {}, {"absent": f"none of the first {SAMPLE_ROWS:,} rows can be trained on"}
    report.check(1, name="the training data")
    if config["eval_fraction"] is not None and is_all:
        groups, _ = split_by_prompt(groups, config["eval_fraction"])
    return {**packed_lengths(groups, args), "num_rows": len(groups) if is_all else None}, {"fingerprint": fingerprint(groups)}


def plan_lines(plan: Plan, disk_bytes: int, args: ORPOConfig, *, has_data: bool) -> list[str]:
    """The estimate for a terminal."""
    from orpo.system.console import human_bytes, human_seconds
    from orpo.system.machine import memory_facts

    free = memory_facts(args.device)["free_bytes"]
    lines = [
        f"parameters   {plan.num_parameters / 1e6:,.1f} M, {plan.num_trainable / 1e6:,.1f} M trained",
        f"step         about {plan.tokens_per_step:,} packed tokens, micro-batches of at most {plan.tokens_per_microbatch:,}"
        + ("" if has_data else " (rows as long as max_length allows)"),
        f"memory       {human_bytes(plan.memory_bytes)} on {args.device}" + (f", {human_bytes(free)} free" if free else ""),
    ]
    parts = {"weights": plan.weights_bytes, "gradients": plan.gradients_bytes, "optimizer": plan.optimizer_bytes}
    parts |= {"activations": plan.activations_bytes, "logits": plan.logits_bytes, "libraries": plan.runtime_bytes}
    lines += [f"  {part:<12}{human_bytes(num_bytes)}" for part, num_bytes in parts.items() if num_bytes]
    if args.gradient_checkpointing == "auto":
        lines.append(f"recomputed   {plan.recomputed_layers} of {plan.num_layers} layers, in the backward pass{_budget_note(args)}")
    lines.append(f"checkpoint   {human_bytes(plan.checkpoint_bytes)} each, {human_bytes(disk_bytes)} of disk at most")
    if plan.seconds_per_step is None:
        return lines
    lines.append(f"time         roughly {human_seconds(plan.seconds_per_step)} a step")
    if plan.total_seconds is not None:
        lines[-1] += f", {human_seconds(plan.total_seconds)} for {plan.num_steps:,} steps"
    return lines
