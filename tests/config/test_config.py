"""ORPOConfig: it runs anywhere with nothing set, two names for λ stay one number, and every problem is told at once."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo.config.checks import check_values
from orpo.config.options import ORPOConfig, field_defaults, field_types, fresh_run_dir
from orpo.errors import UserError, UserErrors

SNAPSHOT = Path(__file__).parents[1] / "snapshots" / "config_fields.json"


def problems_of(**options: object) -> str:
    with pytest.raises(UserErrors) as caught:
        ORPOConfig(**options)
    return str(caught.value)


def test_nothing_set_is_a_whole_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = ORPOConfig()
    assert (config.learning_rate, config.orpo_alpha, config.beta, config.orpo_beta) == (8e-6, 0.1, 0.1, 1.0)
    assert config.lr_scheduler_type == "cosine"
    assert config.get_warmup_steps(200) == 20
    assert config.output_dir is None
    assert config.report_to == []
    assert config.problems() == []
    assert list(tmp_path.iterdir()) == [], "a configuration must not create anything"


def test_the_example_of_the_tutorials() -> None:
    config = ORPOConfig(
        learning_rate=1e-5, per_device_train_batch_size=4, gradient_accumulation_steps=4, max_steps=1000, orpo_alpha=1.0, orpo_beta=0.1
    )
    assert (config.orpo_alpha, config.beta, config.orpo_beta, config.max_steps) == (1.0, 1.0, 0.1, 1000)


class TestTwoNamesForLambda:
    def test_beta_alone_sets_alpha(self) -> None:
        assert ORPOConfig(beta=0.5).orpo_alpha == 0.5

    def test_both_and_equal_is_fine(self) -> None:
        assert ORPOConfig(beta=0.5, orpo_alpha=0.5).beta == 0.5

    def test_both_and_different_is_refused(self) -> None:
        text = problems_of(beta=0.5, orpo_alpha=0.1)
        assert "beta" in text
        assert "keep orpo_alpha" in text

    def test_assigning_one_moves_the_other(self) -> None:
        config = ORPOConfig()
        config.beta = 0.7
        assert config.orpo_alpha == 0.7
        config.orpo_alpha = 0.2
        assert config.beta == 0.2

    @pytest.mark.parametrize("given", [{}, {"beta": 0.4}, {"orpo_alpha": 0.4}])
    def test_a_copy_can_change_alpha(self, given: dict[str, float]) -> None:
        copy = dataclasses.replace(ORPOConfig(**given), orpo_alpha=0.9)
        assert (copy.orpo_alpha, copy.beta) == (0.9, 0.9)

    def test_written_out_once(self) -> None:
        values = ORPOConfig(beta=0.4).to_dict()
        assert "beta" not in values
        assert ORPOConfig(orpo_alpha=values["orpo_alpha"]).beta == 0.4

    def test_argument_parser_of_transformers_may_set_either(self) -> None:
        from transformers import HfArgumentParser

        (config,) = HfArgumentParser((ORPOConfig,)).parse_args_into_dataclasses(["--beta", "0.3"])
        assert config.orpo_alpha == 0.3


class TestPrecision:
    def test_bf16_does_not_raise_without_a_gpu(self) -> None:
        config = ORPOConfig(bf16=True, use_cpu=True)
        assert config.compute_dtype == "bfloat16"
        assert config.mixed_precision == "no", "the engine chooses the dtype; accelerate must not wrap the model in autocast"

    def test_switched_off(self) -> None:
        assert ORPOConfig(bf16=False).compute_dtype == "float32"

    @pytest.mark.parametrize(("is_fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
    def test_unset_follows_the_device(self, is_fast: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("orpo.system.machine.bf16_is_fast", lambda device=None: is_fast)
        assert ORPOConfig().compute_dtype == dtype

    def test_fp16_needs_a_device_with_loss_scaling(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert ORPOConfig(fp16=True, use_cpu=True).compute_dtype == "float16"
        monkeypatch.setattr("orpo.config.checks._device_kind", lambda values: "mps")
        assert "fp16: torch scales no losses on mps" in problems_of(fp16=True)


def test_every_problem_in_one_go() -> None:
    text = problems_of(
        learning_rate="1e-5",
        orpo_alpha=-1,
        orpo_beta=0,
        lr_scheduler_type="cosin",
        engine="share",
        max_length=1,
        pairs="bestworst",
        trust_remote_code=True,
        generate_during_eval=True,
        label_smoothing_factor=0.1,
        load_best_model_at_end=True,
        save_stratgy="steps",
        warmup_ratio=0.1,
        warmup_steps=5,
    )
    expected = {
        "learning_rate: found the text '1e-5'",
        "orpo_alpha: found -1",
        "orpo_beta: found 0",
        "did you mean 'cosine'?",
        "did you mean 'shared'?",
        "max_length: found 1",
        "no pair policy 'bestworst'",
        "trust_remote_code: runs code",
        "generate_during_eval: True is refused",
        "label_smoothing_factor: 0.1 is refused",
        "load_best_model_at_end: needs an evaluation at every save",
        "did you mean 'save_strategy'",
        "warmup_ratio: found 0.1, while warmup_steps is 5",
    }
    assert {part for part in expected if part not in text} == set()
    assert f"has {len(expected)} problems" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orpo_alpha": float("nan")}, "orpo_alpha: found nan"),
        ({"learning_rate": float("inf")}, "learning_rate: found inf"),
        ({"learning_rate": True}, "learning_rate: found true"),
        ({"max_length": 512.5}, "max_length: found the number 512.5"),
        ({"max_length": 100, "max_prompt_length": 100}, "leaves no room for an answer"),
        ({"max_steps": 0}, "max_steps: found 0"),
        ({"max_steps": -5}, "max_steps: found -5"),
        ({"report_to": "wandbb"}, "did you mean 'wandb' or 'swanlab'?"),
        ({"report_to": ["none", 3, "weights"]}, "report_to: found 'weights'"),
        ({"column_map": "prompt=question"}, "column_map: found the text"),
        ({"trust_remote_code": True, "model_revision": "main"}, "trust_remote_code: runs code"),
        ({"fp16": True, "bf16": True}, "is on together with bf16"),
        ({"is_encoder_decoder": True}, "encoder-decoder models are not supported"),
        ({"train_sampling_strategy": "group_by_length"}, "'group_by_length' is refused"),
        ({"group_by_length": True}, "'group_by_length' is refused"),
    ],
)
def test_single_problems(options: dict[str, object], message: str) -> None:
    assert message in problems_of(**options)


def test_a_tracker_without_its_package_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers raises a RuntimeError for it, after the model has been loaded."""
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    text = problems_of(report_to=["wandb", "tensorboard"])
    assert "report_to: the package of wandb is not installed" in text
    assert "tensorboard" not in text
    assert ORPOConfig(report_to="none").report_to == []


def test_remote_code_with_a_revision_is_accepted() -> None:
    assert ORPOConfig(trust_remote_code=True, model_revision="4f1b2c3").trust_remote_code
    assert ORPOConfig(trust_remote_code=True, model_init_kwargs={"revision": "4f1b2c3"}).trust_remote_code


def test_checks_of_transformers_are_user_errors_too() -> None:
    with pytest.raises(UserError, match="torch_empty_cache_steps"):
        ORPOConfig(torch_empty_cache_steps=-1)


def test_older_names_are_mapped() -> None:
    config = ORPOConfig(truncation_mode="keep_end", warmup_ratio=0.2, evaluation_strategy="no", no_cuda=True)
    assert (config.truncation, config.warmup_steps, config.use_cpu) == ("keep_end", 0.2, True)


def test_options_without_effect_say_so_and_do_nothing() -> None:
    with pytest.warns(UserWarning, match="bf16_full_eval has no effect"):
        assert not ORPOConfig(bf16_full_eval=True).bf16_full_eval
    with pytest.warns(UserWarning, match="label_pad_token_id has no effect"):
        ORPOConfig(label_pad_token_id=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ORPOConfig(label_pad_token_id=-100, remove_unused_columns=True, gradient_checkpointing=True)


def test_gradient_checkpointing_under_its_old_name() -> None:
    assert ORPOConfig(gradient_checkpointing=True).gradient_checkpointing is True
    assert ORPOConfig().gradient_checkpointing is False


class TestOutputDir:
    def test_fresh_names_differ_and_nothing_is_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert len({fresh_run_dir() for _ in range(50)}) == 50
        config = ORPOConfig()
        assert config.ensure_output_dir() == config.ensure_output_dir()
        assert not Path("runs").exists()

    def test_given_one_is_kept(self) -> None:
        assert ORPOConfig(output_dir="~/runs/a").output_dir == str(Path("~/runs/a").expanduser())


@given(
    st.dictionaries(st.sampled_from(sorted(field_types())), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5))
)
def test_checking_never_raises(values: dict[str, object]) -> None:
    assert all(problem.where in values for problem in check_values(values, field_types()))


def test_the_defaults_have_no_problem() -> None:
    assert check_values(field_defaults(), field_types()) == []


def test_names_and_defaults_of_our_own_options_are_frozen() -> None:
    """An option neither appears, vanishes nor changes its default by accident. To change one on purpose, edit the snapshot."""
    # Inherited fields and their defaults are transformers' and differ between its versions; what we set ourselves does not.
    own = set(ORPOConfig.__annotations__) - {"_VALID_DICT_FIELDS"}
    defaults = field_defaults()
    ours = {
        name: {"type": str(hint).replace("typing.", ""), "default": defaults[name]} for name, hint in field_types().items() if name in own
    }
    assert json.loads(json.dumps(ours)) == json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_report_to_may_be_null() -> None:
    """`report_to: null` and `--report_to none` both arrive as None; transformers would ask for a tracker of that name."""
    assert list(ORPOConfig(report_to=None).report_to) == []


def test_the_logits_take_their_share_of_a_gpu_unless_someone_says_how_much() -> None:
    from orpo.config.options import default_logits_bytes

    assert [default_logits_bytes(memory * 2**30) // 2**20 for memory in (0, 8, 24, 80, 141)] == [256, 256, 614, 2048, 2048]
    assert ORPOConfig(use_cpu=True).logits_budget_bytes == 256 * 2**20
    assert ORPOConfig(logits_budget_mb=3).logits_budget_bytes == 3 * 2**20
