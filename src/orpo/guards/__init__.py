"""Guards of a run: non-finite steps, stop signals, proof of learning, divergence, one cause for several processes.

Plain classes that know nothing of the trainer; `orpo.guards.callbacks` adapts some of them to transformers' Trainer.
"""

from __future__ import annotations

from orpo.guards.divergence import DivergenceGuard
from orpo.guards.learning import Finding, ProofOfLearning
from orpo.guards.nonfinite import NonFiniteGuard
from orpo.guards.peers import first_cause
from orpo.guards.signals import SignalGuard

__all__ = ["DivergenceGuard", "Finding", "NonFiniteGuard", "ProofOfLearning", "SignalGuard", "first_cause"]
