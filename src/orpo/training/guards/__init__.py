"""Guards of a run: non-finite steps, stop signals, proof of learning, divergence, one cause for several processes.

Plain classes that know nothing of the trainer; `orpo.training.guards.callbacks` adapts some of them to transformers' Trainer.
"""

from __future__ import annotations

from orpo.training.guards.divergence import DivergenceGuard
from orpo.training.guards.learning import LearningFinding, ProofOfLearning
from orpo.training.guards.nonfinite import NonFiniteGuard
from orpo.training.guards.peers import first_cause
from orpo.training.guards.signals import SignalGuard

__all__ = ["DivergenceGuard", "LearningFinding", "NonFiniteGuard", "ProofOfLearning", "SignalGuard", "first_cause"]
