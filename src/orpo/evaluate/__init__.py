"""Evaluation: held-out pairs, generation, IFEval, judged answers, retention. Everything calls the engine or the model's own generate."""

from __future__ import annotations

from typing import Any

from orpo.system.callables import make_callable


def _evaluate(target: str, **options: Any) -> dict[str, dict[str, Any]]:
    """Measure a run or model: `from orpo import evaluate; evaluate("runs/first")["pairs"]["result"]["model"]["margin"]`.

    Args:
        target: a run's folder, a model's, or a hub id.
        options: fields of `orpo.evaluate.options.EvalOptions`: `tasks`, `against`, `data`, `limit`, `output`, …

    Returns:
        Task -> what `<task>.json` in the output folder holds.

    Raises:
        UserError: the target or an option cannot be used, or a task that cannot be done.

    Example: `has_before=False`, since "model" is no run that came from another model.

        >>> from orpo import evaluate
        >>> found = evaluate("model", tasks=("pairs",), data="pairs.jsonl", output="scores", has_before=False)
        >>> found["pairs"]["result"]["model"]["num_pairs"]
        12
    """
    from orpo.evaluate.options import EvalOptions
    from orpo.evaluate.suite import Evaluation

    records, errors = Evaluation(EvalOptions(str(target), **options)).run()
    for error in errors.values() if isinstance(errors, dict) else errors:
        raise error
    return records


make_callable(__name__, _evaluate)
