"""The audit of a preference data set: what in it hurts ORPO, which rows, why, and what to do.

One pass over the rows keeps numbers and hashes (`inspect`, `table`); the findings are made of those. With a tokenizer, lengths and what the
template does to each row are added (`tokens`); with a model, the pairs it finds most surprising (`surprise`).
"""

from __future__ import annotations

from typing import Any

from orpo.audit.auditor import AuditOptions, run_audit
from orpo.audit.clean import write_clean
from orpo.audit.findings import KINDS, Finding
from orpo.audit.result import Audit
from orpo.audit.surprise import Surprise, as_it_stands, cross_fitted
from orpo.system.callables import make_callable

__all__ = ["KINDS", "Audit", "AuditOptions", "Finding", "Surprise", "as_it_stands", "cross_fitted", "run_audit", "write_clean"]


def _audit(source: Any, *, model: str | None = None, **options: Any) -> Audit:
    """Audit a source of preferences: `from orpo import audit; print(audit("pairs.jsonl"))`.

    Args:
        source: file, folder, hub id, `orpo-demo`, or rows.
        model: its tokenizer adds lengths in tokens, and what the template does to each row.
        options: fields of `AuditOptions`.

    Returns:
        What was found; `print` shows it line by line, a notebook as tables.

    Raises:
        UserError: the data or the tokenizer cannot be read, or a package of the extra `audit` is missing.

    Example:
        >>> from orpo import audit
        >>> found = audit("pairs.jsonl")
        >>> found.num_rows, found.num_pairs, found.is_clean
        (12, 12, True)
    """
    if model is not None:
        from orpo.data.template import TemplateEncoder
        from orpo.models.load import load_tokenizer

        tokenizer = load_tokenizer(model)
        options.setdefault("encoder", TemplateEncoder(tokenizer))
        options.setdefault("unlimited_encoder", TemplateEncoder(tokenizer, max_length=1 << 30))
    return run_audit(source, AuditOptions(**options))


make_callable(__name__, _audit)
