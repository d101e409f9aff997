"""The audit of a preference data set: what in it hurts ORPO, which rows, why, and what to do.

One pass over the rows keeps numbers and hashes (`inspect`, `table`); the findings are made of those. With a tokenizer, lengths and what the
template does to each row are added (`tokens`); with a model, the pairs it finds most surprising (`surprise`).
"""

from __future__ import annotations

from orpo.audit.auditor import AuditOptions, run_audit
from orpo.audit.clean import write_clean
from orpo.audit.findings import KINDS, Finding
from orpo.audit.result import Audit
from orpo.audit.surprise import Surprise, as_it_stands, cross_fitted

__all__ = ["KINDS", "Audit", "AuditOptions", "Finding", "Surprise", "as_it_stands", "cross_fitted", "run_audit", "write_clean"]
