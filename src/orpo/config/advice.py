"""Where to start: lambda and the learning rate by the model's size, each with its source.

`orpo init` writes these numbers and their sources into its file, and the documents' table of hyperparameters is made from them, so that
neither says what the other does not.
"""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "the ORPO paper (arXiv 2403.07691)"
ADVICE = "the paper's first author: 0.5 to 1.0 for small models, 0.05 to 0.1 at 7B (xfactlab/orpo issue 5)"
OWN = "measured here on SmolLM2-135M-Instruct, three seeds (docs/performance.md, the demo)"
_NOTHING = "nothing is published for this size"
LORA_FACTOR = 10.0
LORA_SOURCE = "ten times the rate of full fine-tuning, as Schulman et al. found for supervised LoRA (LoRA Without Regret, 2025)"
LORA_MEASURED = "measured here for ORPO on SmolLM2-135M-Instruct, one seed (docs/guides/hyperparameters.md, the rate of an adapter)"
_LORA_UNKNOWN = "for ORPO measured here at 135M alone"


@dataclass(frozen=True, slots=True)
class Advice:
    """A place to start for models up to a size.

    Attributes:
        most_parameters: the largest model it is meant for.
        orpo_alpha, learning_rate: of full fine-tuning with AdamW.
        alpha_source, rate_source: where each number comes from, as a phrase.
    """

    most_parameters: float
    orpo_alpha: float
    learning_rate: float
    alpha_source: str
    rate_source: str

    def rate(self, *, is_lora: bool) -> float:
        """The learning rate, of an adapter or of all weights."""
        return float(f"{self.learning_rate * (LORA_FACTOR if is_lora else 1.0):.1e}")

    def source_of_rate(self, *, is_lora: bool) -> str:
        """Where that rate comes from."""
        if not is_lora:
            return self.rate_source
        measured = LORA_MEASURED if self.rate_source == OWN else _LORA_UNKNOWN
        return f"{LORA_SOURCE}; {measured}. Full fine-tuning: {self.rate_source}"


ADVICE_BY_SIZE = (
    Advice(1e9, 1.0, 5e-5, f"{OWN}; {ADVICE}", OWN),
    Advice(4e9, 0.25, 8e-6, f"{PAPER}: 0.25 for Phi-2 (2.7B)", f"{PAPER}: 8e-6 for Phi-2"),
    Advice(
        15e9,
        0.1,
        8e-6,
        f"{PAPER}: 0.1 for Mistral-7B, 0.2 for Llama-2-7B",
        f"{PAPER}: 8e-6; the authors' script for Mistral-ORPO-beta took 5e-6",
    ),
    Advice(float("inf"), 0.1, 5e-6, f"as at 7B; {_NOTHING}", f"the authors' script at 7B; {_NOTHING}"),
)


def advice_for(num_parameters: float) -> Advice:
    """The place to start for a model of so many parameters."""
    return next(advice for advice in ADVICE_BY_SIZE if num_parameters <= advice.most_parameters)
