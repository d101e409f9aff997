"""What one stage of a comparison is told, and where it leaves its result: the file between the comparison's process and the stage's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orpo.compare.data import Split
from orpo.compare.methods import method_of
from orpo.config.objectives import find, option_keys
from orpo.errors import UserError
from orpo.system.files import write_atomically
from orpo.system.plugins import load_plugins

if TYPE_CHECKING:
    from orpo.run.config import RunConfig

RESULT = "stage.json"
FORMAT = 1
ORIGIN = "orpo compare"


@dataclass(frozen=True)
class StageSpec:
    """Everything that a stage's process needs to know.

    Attributes:
        configuration: the comparison's, key -> value and origin.
        split: how rows are parted.
        method, number: the method and which of its stages; "start" measures the starting weights and trains nothing.
        options: learning_rate and the objective's.
        seed: of data order and adapters.
        start: model to start from.
        is_trial: trains on `tune_rows`, without a curve.
        num_points: evaluations on the validation rows along the way.
        folder: where the stage's run goes.
        date: what a template that asks for today gets; None where it asks for none.
        num_processes: that train it together.
    """

    configuration: dict[str, dict[str, Any]]
    split: Split
    method: str
    number: int
    options: dict[str, float]
    seed: int
    start: str
    is_trial: bool
    num_points: int
    folder: str
    date: str | None = None
    num_processes: int = 1

    @classmethod
    def read(cls, path: Path) -> StageSpec:
        """From the file that the comparison has written.

        Raises:
            UserError: it cannot be read, or is no such file.
        """
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**facts, "split": Split(**facts["split"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            what = f"cannot be read as a stage: {error}"
            raise UserError(what, where=str(path), expected="a spec.json that `orpo compare` has written") from error

    def write(self, path: Path) -> None:
        """For the stage's process."""
        write_atomically(path, (json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n").encode())

    @property
    def objective_name(self) -> str:
        """`sft`, `dpo`, … or `start`."""
        return "start" if self.method == "start" else method_of(self.method).stages[self.number]

    def run_config(self, **changes: Any) -> RunConfig:
        """The run's configuration: the comparison's, with what this stage sets itself."""
        from orpo.run.config import RunConfig
        from orpo.run.keys import key_defaults

        values = {key: item["value"] for key, item in self.configuration.items()}
        origins = {key: item["origin"] for key, item in self.configuration.items()}
        own = {"model_name_or_path": self.start, "seed": self.seed, "output_dir": self.folder, **changes}
        load_plugins(values.get("plugins"))
        if self.method != "start":
            own |= {"objective": self.objective_name, **self._objective_options(values), **self.options}
        if self.number and Path(self.start).name == "adapter":
            own["use_peft"] = False  # the adapter of the stage before is there already, and is trained on
        foreign = {option.key for option in option_keys().values()} - own.keys()
        values |= {key: default for key, default in key_defaults().items() if key in foreign}
        origins |= dict.fromkeys(foreign & values.keys(), "default")
        return RunConfig({**values, **own}, {**origins, **dict.fromkeys(own, ORIGIN)}, name="compare")

    def _objective_options(self, values: dict[str, Any]) -> dict[str, Any]:
        """Options of the stage's objective as the comparison's configuration has them; what it tries itself comes on top."""
        return {option.key: values.get(option.key, option.default) for option in find(self.objective_name).options}
