"""Checkpoints that survive any stop: stage, verify, publish, find, prune; state without pickle; one run per folder.

Knows nothing of the trainer. The order of calls in a run:

    with RunLock(run_dir, ranks=ranks):
        recover(run_dir, ranks=ranks)                       # these three are `orpo.run.hold.RunHold`
        newest = find_newest(run_dir, ranks=ranks)          # then require_same_facts(...), load_optimizer(...), load_rng(...), ...
        ...
        publish(run_dir, step, write, facts=facts, ranks=ranks)
        if ranks.is_first: prune(run_dir, keep=limit, best=best)
"""

from __future__ import annotations

from orpo.checkpoint.facts import MAY_CHANGE, Difference, compare_facts, refuse_differences, require_same_facts
from orpo.checkpoint.lock import RunLock
from orpo.checkpoint.manifest import MANIFEST_NAME, Manifest, is_verified, read_manifest, require_safe_weights, verify
from orpo.checkpoint.publish import PeerError, publish
from orpo.checkpoint.retain import checkpoint_name, find_newest, list_checkpoints, prune, recover, set_earlier_aside
from orpo.checkpoint.state import (
    load_optimizer,
    load_rng,
    load_scaler,
    load_scheduler,
    load_state,
    save_optimizer,
    save_rng,
    save_scaler,
    save_scheduler,
    save_state,
)
from orpo.system.ranks import ALONE, Ranks, TorchRanks, current_ranks

__all__ = [
    "ALONE",
    "MANIFEST_NAME",
    "MAY_CHANGE",
    "Difference",
    "Manifest",
    "PeerError",
    "Ranks",
    "RunLock",
    "TorchRanks",
    "checkpoint_name",
    "compare_facts",
    "current_ranks",
    "find_newest",
    "is_verified",
    "list_checkpoints",
    "load_optimizer",
    "load_rng",
    "load_scaler",
    "load_scheduler",
    "load_state",
    "prune",
    "publish",
    "read_manifest",
    "recover",
    "refuse_differences",
    "require_safe_weights",
    "require_same_facts",
    "save_optimizer",
    "save_rng",
    "save_scaler",
    "save_scheduler",
    "save_state",
    "set_earlier_aside",
    "verify",
]
