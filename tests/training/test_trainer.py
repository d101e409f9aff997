"""What users may hand to `ORPOTrainer`, what it refuses, and what it leaves them with."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from orpo import ORPOConfig, ORPOTrainer
from orpo.errors import UserError
from orpo.objective import SFT
from randomgroups import random_groups
from tinymodels import build_tiny_model, build_tiny_tokenizer
from trainerruns import QUIET, logged, make_config, make_trainer, weights

WORDS = ("boat", "sea", "harbour", "storm", "wind", "password", "settings", "account")
ROWS = [
    {"prompt": f"Tell me about the {word}, please.", "chosen": f"The {word} is fine, thank you.", "rejected": f"No {word} {number}."}
    for number, word in enumerate(WORDS)
]
HELD_OUT = [
    {"prompt": f"And the {word} of today?", "chosen": f"The {word} is light.", "rejected": "I would rather not say."} for word in WORDS[:3]
]


def tiny_model(**options: Any) -> Any:
    return build_tiny_model("llama", vocab_size=384, num_layers=1, **options)


def trainer_of(
    folder: Path, rows: Any = None, *, model: Any = None, arguments: dict[str, Any] | None = None, **options: Any
) -> ORPOTrainer:
    """A trainer on rows of text."""
    return ORPOTrainer(
        model=tiny_model() if model is None else model,
        args=make_config(folder, **{"max_steps": 2, **options}),
        train_dataset=ROWS if rows is None else rows,
        **{"processing_class": build_tiny_tokenizer(), **(arguments or {})},
    )


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-llama"
    tiny_model().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    return folder


# --- what it is given ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer", "processing_class"])
def test_the_tokenizer_under_either_name(name: str, tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    trainer = ORPOTrainer(model=tiny_model(), args=make_config(tmp_path, max_steps=1), train_dataset=ROWS, **{name: tokenizer})
    assert trainer.processing_class is tokenizer
    trainer.train()
    assert trainer.state.global_step == 1


def test_the_same_tokenizer_under_both_names_is_one_and_two_are_refused(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    assert trainer_of(tmp_path, arguments={"tokenizer": tokenizer, "processing_class": tokenizer}).processing_class is tokenizer
    with pytest.raises(UserError, match="two different tokenizers"):
        trainer_of(tmp_path, arguments={"tokenizer": tokenizer, "processing_class": build_tiny_tokenizer()})


def test_a_model_by_name_brings_its_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    trainer = ORPOTrainer(model=str(model_folder), args=make_config(tmp_path / "run", max_steps=1), train_dataset=ROWS)
    trainer.train()
    assert len(trainer.processing_class) == len(build_tiny_tokenizer())
    assert trainer.state.global_step == 1


def test_a_loaded_model_knows_where_its_tokenizer_is(model_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = ORPOTrainer(model=model, args=make_config(tmp_path / "run"), train_dataset=ROWS)
    assert len(trainer.processing_class) == len(build_tiny_tokenizer())


def test_a_model_without_any_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        ORPOTrainer(model=tiny_model(), args=make_config(tmp_path), train_dataset=ROWS)


def test_model_init_kwargs_belong_to_a_name(model_folder: Path, tmp_path: Path) -> None:
    options = {"model_init_kwargs": {"attn_implementation": "eager"}}
    trainer = ORPOTrainer(model=str(model_folder), args=make_config(tmp_path / "run", **options), train_dataset=ROWS)
    assert trainer.model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="loaded already"):
        trainer_of(tmp_path, **options)


def test_model_init_makes_every_training_start_anew(tmp_path: Path) -> None:
    calls = 0

    def make() -> Any:
        nonlocal calls
        calls += 1
        return tiny_model(seed=3).bfloat16()

    trainer = ORPOTrainer(
        model_init=make, args=make_config(tmp_path, max_steps=3), train_dataset=ROWS, processing_class=build_tiny_tokenizer()
    )
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    runs = []
    for _ in range(2):
        trainer.train()
        runs.append((logged(trainer)[-3:], weights(trainer.model)))
    assert calls >= 2
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(weight, runs[1][1][name]) for name, weight in runs[0][1].items())


@pytest.mark.parametrize("kind", ["list", "dataset", "streamed", "file", "groups", "preferences"])
def test_rows_of_every_kind_are_the_same_training(kind: str, tmp_path: Path) -> None:
    import datasets

    from orpo.data.formats import load_preferences

    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows: Any = {
        "list": lambda: ROWS,
        "dataset": lambda: datasets.Dataset.from_list(ROWS),
        "streamed": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        "file": lambda: str(file),
        "groups": lambda: trainer_of(tmp_path / "other").train_dataset,
        "preferences": lambda: load_preferences(ROWS)[0],
    }[kind]()
    trainer = trainer_of(tmp_path / "run", rows)
    trainer.train()
    expected = trainer_of(tmp_path / "expected")
    expected.train()
    assert logged(trainer) == logged(expected)


def test_a_dataset_with_streaming_is_read_once(tmp_path: Path) -> None:
    import datasets

    passes = 0

    def rows() -> Any:
        nonlocal passes
        passes += 1
        yield from ROWS

    trainer = trainer_of(tmp_path, datasets.IterableDataset.from_generator(rows), num_train_epochs=3, max_steps=-1)
    trainer.train()
    assert trainer.state.global_step == 6
    assert passes <= 2  # a look at the columns, and the rows


def test_no_rows_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_dataset is missing"):
        ORPOTrainer(model=tiny_model(), args=make_config(tmp_path), processing_class=build_tiny_tokenizer())
    with pytest.raises(UserError):
        trainer_of(tmp_path, [])


def test_everything_dropped_stops_with_the_reasons(tmp_path: Path) -> None:
    """Everything dropped, or fewer rows than one step: stopped with the histogram of reasons."""
    with pytest.raises(UserError, match=r"(?s)no row.*empty"):
        trainer_of(tmp_path, [{**row, "chosen": " "} for row in ROWS])


def test_fewer_rows_than_one_step_stop_with_the_reasons(tmp_path: Path) -> None:
    rows = [*ROWS[:3], *({**row, "rejected": ""} for row in ROWS[3:])]
    with pytest.raises(UserError, match=r"(?s)3 of 8.*at least 4.*empty"):
        trainer_of(tmp_path, rows)
    assert len(trainer_of(tmp_path, rows, gradient_accumulation_steps=1).train_dataset) == 3


def test_dropped_rows_are_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guarantee 7: also to somebody who has set up no logging, so as a warning."""
    trainer = trainer_of(tmp_path, [*ROWS, {**ROWS[0], "chosen": ""}])
    assert trainer.train_report.dropped == {"empty_answer": 1}
    assert any("empty_answer" in record.message and record.levelno >= logging.WARNING for record in caplog.records)


def test_rows_with_one_answer_are_taken_if_asked_for(tmp_path: Path) -> None:
    rows = [*ROWS, {"prompt": "And the sea?", "chosen": "The sea is light."}]
    assert len(trainer_of(tmp_path, rows, sft_rows=True).train_dataset) == 9
    assert len(trainer_of(tmp_path, rows).train_dataset) == 8


def test_prompts_in_training_and_evaluation_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A script has chosen its rows itself, and ran with TRL; `orpo train`, which chooses them, stops."""
    for eval_dataset in (HELD_OUT + ROWS[:1], {"clean": HELD_OUT, "leaky": ROWS[:1]}):
        caplog.clear()
        trainer_of(tmp_path, arguments={"eval_dataset": eval_dataset})
        assert [record for record in caplog.records if record.levelno >= logging.WARNING and "also trained on" in record.message]


def test_two_trainings_go_on_from_each_other(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.train()
    first = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 3
    assert any(not torch.equal(weight, first[name]) for name, weight in weights(trainer.model).items())


@pytest.mark.parametrize("between", ["configuration", "refused", "trained"])
def test_a_trainer_goes_on_whatever_was_configured_since(between: str, tmp_path: Path) -> None:
    """As in a notebook, where the next run is written down before this one is started."""
    expected = make_trainer(tmp_path / "expected", random_groups(8), max_steps=2)
    expected.train()
    trainer = make_trainer(tmp_path / "run", random_groups(8), max_steps=2)

    def other() -> None:
        if between == "refused":
            with pytest.raises(UserError, match="trains on cuda alone"):
                make_trainer(tmp_path / "other", random_groups(8), attention_kernel="flex")
        else:
            assert make_config(tmp_path / "other").device.type == "cpu"
        if between == "trained":
            make_trainer(tmp_path / "other", random_groups(8), max_steps=1, bf16=True).train()

    other()
    trainer.train()
    assert logged(trainer) == logged(expected)
    evaluation = expected.evaluate(random_groups(2))
    other()
    assert trainer.evaluate(random_groups(2))["eval_loss"] == evaluation["eval_loss"]


def test_callbacks_are_called_and_may_stop(tmp_path: Path) -> None:
    events: list[str] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            events.append(f"step {state.global_step}")
            assert isinstance(kwargs["model"], nn.Module)
            control.should_training_stop = state.global_step == 2
            return control

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            events.append("log" if "nll_loss" in logs else "end")

    trainer_of(tmp_path, arguments={"callbacks": [Watch()]}, max_steps=5).train()
    assert events == ["step 1", "log", "step 2", "log", "end"]


def test_optimizers_are_used_as_they_are(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = trainer_of(tmp_path, model=model, arguments={"optimizers": (optimizer, schedule)}, max_steps=3)
    trainer.train()
    assert getattr(trainer.optimizer, "optimizer", trainer.optimizer) is optimizer
    assert logged(trainer, "learning_rate") == [0.5, 0.25, 0.125]


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, arguments={"objective": SFT()}, orpo_alpha=1.0)
    trainer.train()
    assert logged(trainer) == pytest.approx(logged(trainer, "nll_loss"), rel=1e-5)


# --- adapters -------------------------------------------------------------------------------------------------------------------------


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.mark.parametrize("bf16", [False, True])
def test_adapters_train_and_the_base_stays(bf16: bool, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, arguments={"peft_config": lora()}, bf16=bf16, learning_rate=1e-2, max_steps=4)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "training_args.bin").exists()


def test_an_adapter_on_an_adapter_is_refused(tmp_path: Path) -> None:
    from peft import get_peft_model

    with pytest.raises(UserError, match="adapter already"):
        trainer_of(tmp_path, model=get_peft_model(tiny_model(), lora()), arguments={"peft_config": lora()})


def test_a_model_with_an_adapter_is_taken_as_it_is(tmp_path: Path) -> None:
    from peft import get_peft_model

    trainer = trainer_of(tmp_path, model=get_peft_model(tiny_model(), lora()))
    trainer.train()
    assert trainer.engine.name == "shared"
    assert trainer.state.global_step == 2


def test_prompt_learning_is_refused_rather_than_trained_on_shifted_positions(tmp_path: Path) -> None:
    """Virtual tokens move every position by their number; the logits would be read one prompt too early."""
    from peft import PromptTuningConfig

    with pytest.raises(UserError, match=r"(?i)prompt"):
        trainer_of(tmp_path, arguments={"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}).train()


def test_gradient_checkpointing_with_an_adapter_learns(tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = trainer_of(
            tmp_path / str(checkpointing),
            arguments={"peft_config": lora()},
            gradient_checkpointing=checkpointing,
            learning_rate=1e-2,
            max_steps=4,
        )
        trainer.train()
        runs.append(logged(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[0][-1] != runs[0][0]


# --- dtypes and dropout -----------------------------------------------------------------------------------------------------------------


def test_a_bf16_model_is_upcast_and_the_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_of(tmp_path, model=tiny_model().bfloat16())
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert any("float32" in record.message and record.levelno >= logging.WARNING for record in caplog.records)
    trainer.train()


def test_a_frozen_bf16_base_stays_bf16_under_an_adapter(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model=tiny_model().bfloat16(), arguments={"peft_config": lora()}, learning_rate=1e-2)
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    trainer.train()
    assert trainer.state.global_step == 2


def test_dropout_is_off_unless_asked_for_and_then_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def model() -> Any:
        made = build_tiny_model("gpt2", vocab_size=384, num_layers=1)
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
        return made

    def rates(trainer: ORPOTrainer) -> set[float]:
        return {module.p for module in trainer.model.modules() if isinstance(module, nn.Dropout)}

    assert rates(trainer_of(tmp_path / "off", model=model())) == {0.0}
    assert not any("dropout" in record.message for record in caplog.records)
    trainer = trainer_of(tmp_path / "on", model=model(), disable_dropout=False)
    assert rates(trainer) == {0.3}
    assert any("dropout is on" in record.message for record in caplog.records)
    trainer.train()
    assert trainer.engine.name == "padded"


def test_an_adapters_dropout_is_not_dropped_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(tmp_path / "off", arguments={"peft_config": lora(lora_dropout=0.05)})
    assert any("lora_dropout of 0.05 is off" in record.message for record in caplog.records)
    caplog.clear()
    trainer = trainer_of(tmp_path / "on", arguments={"peft_config": lora(lora_dropout=0.05)}, disable_dropout=False)
    assert not any("lora_dropout" in record.message for record in caplog.records)
    trainer.train()
    assert trainer.engine.name == "shared"  # dropout outside attention is no obstacle


def test_dropout_rates_kept_as_numbers_are_off_too(tmp_path: Path) -> None:
    for architecture in ("opt", "llama"):
        model = build_tiny_model(
            architecture, vocab_size=384, num_layers=1, attention_dropout=0.2, **({"dropout": 0.2} if architecture == "opt" else {})
        )
        trainer = trainer_of(tmp_path / architecture, model=model)
        assert trainer.engine.name == "shared"
        trainer.train()


# --- refusals ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics", "preprocess_logits_for_metrics"])
def test_arguments_without_meaning_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name):
        trainer_of(tmp_path, arguments={name: lambda *_: None})


@pytest.mark.parametrize("args", [{"learning_rate": 1e-5}, "config.yaml"])
def test_args_of_another_type_are_refused(args: Any) -> None:
    with pytest.raises(UserError, match="ORPOConfig"):
        ORPOTrainer(model=tiny_model(), args=args, train_dataset=ROWS, processing_class=build_tiny_tokenizer())


def test_plain_training_arguments_are_refused(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(UserError, match="TrainingArguments"):
        ORPOTrainer(model=tiny_model(), args=args, train_dataset=ROWS, processing_class=build_tiny_tokenizer())  # type: ignore[arg-type]


def test_encoder_decoder_models_are_refused(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=384, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(UserError, match="encoder-decoder"):
        trainer_of(tmp_path, model=model)


def test_a_model_without_trainable_weights_stops_before_the_first_step(tmp_path: Path) -> None:
    from orpo.errors import OrpoError

    with pytest.raises(OrpoError, match="trainable"):
        trainer_of(tmp_path, model=tiny_model().requires_grad_(False)).train()


# --- with nothing set -------------------------------------------------------------------------------------------------------------------


def test_nothing_set_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's raises here: bf16 without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = ORPOTrainer(model=tiny_model(), args=ORPOConfig(), train_dataset=ROWS, processing_class=build_tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 3  # eight rows a step, three epochs
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "metrics.jsonl").exists()


def test_no_args_are_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ORPOTrainer(model=tiny_model(), train_dataset=ROWS, processing_class=build_tiny_tokenizer())
    assert (trainer.args.orpo_alpha, trainer.args.learning_rate) == (0.1, 8e-6)


def test_alpha_and_beta_reach_the_objective(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, orpo_alpha=1.0, orpo_beta=0.1)
    assert (trainer.training_objective.orpo_alpha, trainer.training_objective.orpo_beta) == (1.0, 0.1)
    from orpo.config.options import ORPOConfig as Config

    by_trls_name = ORPOTrainer(
        model=tiny_model(),
        args=Config(output_dir=str(tmp_path), beta=0.25, **QUIET),
        train_dataset=ROWS,
        processing_class=build_tiny_tokenizer(),
    )
    assert (by_trls_name.training_objective.orpo_alpha, by_trls_name.training_objective.orpo_beta) == (0.25, 1.0)


def test_a_template_with_new_tokens_grows_the_embeddings(tmp_path: Path) -> None:
    """ORPO is one-stage: a base model without a template is trained straight from here."""
    from chattemplates import build_tokenizer

    tokenizer = build_tokenizer(template=None)
    tokenizer.add_tokens([])
    vocab = len(tokenizer)
    plain = build_tiny_tokenizer(chat_template=None)
    model = build_tiny_model("llama", vocab_size=len(plain), num_layers=1)
    trainer = trainer_of(tmp_path, model=model, arguments={"processing_class": plain}, chat_template="chatml")
    trainer.train()
    assert trainer.model.get_input_embeddings().weight.shape[0] >= len(trainer.processing_class)
    assert trainer.processing_class.chat_template is not None
    assert vocab


def test_several_gpus_in_one_process_are_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers would cut a packed row along a batch dimension that it does not have."""
    args = make_config(tmp_path, max_steps=2)
    _ = args.device
    args._n_gpu = 2
    trainer = ORPOTrainer(model=tiny_model(), args=args, train_dataset=ROWS, processing_class=build_tiny_tokenizer())
    trainer.train()
    assert args.n_gpu == 1
    assert any("torchrun" in record.message for record in caplog.records)
    assert not any(isinstance(module, nn.DataParallel) for module in (trainer.model_wrapped, trainer.model))


def test_the_devices_cache_is_emptied_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    monkeypatch.setattr("orpo.training.trainer.clear_device_cache", count)
    trainer_of(tmp_path, max_steps=5, torch_empty_cache_steps=2).train()
    assert calls == 3  # before steps 1, 3 and 5, as in transformers


# --- what is left behind ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
def test_after_training_the_model_saves_loads_and_generates(bf16: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trainer = trainer_of(tmp_path / "run", bf16=bf16)
    trainer.train()
    folder = tmp_path / "model"
    trainer.save_model(str(folder))
    assert "orpo_shared" not in (folder / "config.json").read_text()
    again, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["The sea", "Tell me about the wind, please."], return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    found, expected = (
        model.eval().generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=2) for model in (trainer.model, again)
    )
    assert found.tolist() == expected.tolist()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_the_users_arguments_are_as_before(tmp_path: Path) -> None:
    """Training hides some of them from transformers' loop."""
    args = make_config(tmp_path, max_steps=2, gradient_accumulation_steps=4, save_total_limit=3, save_strategy="steps", save_steps=1)
    before = args.to_dict()
    trainer = ORPOTrainer(model=tiny_model(), args=args, train_dataset=ROWS, processing_class=build_tiny_tokenizer())
    trainer.train()
    assert args.to_dict() == before


def test_the_loss_is_there_for_callers_of_transformers_interface(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    inputs = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    loss.backward()
    assert len(outputs["logp_N"]) == len(inputs.microbatches)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("engine", ["auto", "shared", "padded"])
def test_the_engine_asked_for_is_the_one_that_runs(engine: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, random_groups(4), engine=engine, max_steps=1)
    trainer.train()
    assert trainer.engine.name == ("padded" if engine == "padded" else "shared")


def test_a_model_that_cannot_share_trains_padded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(tmp_path, random_groups(4), model=build_tiny_model("mamba", num_layers=1), max_steps=2)
    trainer.train()
    assert trainer.engine.name == "padded"
    assert any("MambaForCausalLM" in record.message for record in caplog.records)
    with pytest.raises(UserError, match="MambaForCausalLM"):
        make_trainer(tmp_path, random_groups(4), model=build_tiny_model("mamba", num_layers=1), engine="shared").train()


# --- methods of one's own -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("compute_loss", "objective="),
        ("get_batch_loss_metrics", "objective="),
        ("odds_ratio_loss", "objective="),
        ("concatenated_forward", "objective="),
        ("get_batch_logps", "objective="),
        ("compute_loss_context_manager", "objective="),
        ("tokenize_row", "column_map"),
        ("build_tokenized_answer", "column_map"),
        ("concatenated_inputs", "column_map"),
        ("_get_train_sampler", "data_seed"),
        ("_prepare_inputs", "training_step"),
        ("prediction_step", "evaluation_loop"),
        ("generate_from_model", "evaluation_loop"),
        ("store_metrics", "on_log"),
        ("_save_optimizer_and_scheduler", "on_save"),
    ],
)
@pytest.mark.parametrize("how", ["subclass", "mixin", "instance"])
def test_a_method_that_nothing_would_call_is_refused(name: str, mend: str, how: str, tmp_path: Path) -> None:
    mixin = type("Own", (), {name: lambda self, *args, **keywords: pytest.fail("called")})
    bases = {"subclass": (mixin, ORPOTrainer), "mixin": (ORPOTrainer, mixin), "instance": (ORPOTrainer,)}[how]
    if how == "mixin" and hasattr(ORPOTrainer, name):
        return  # ours comes first: the mixin's overrides nothing
    kind = type("Mine", bases, {})

    def make_and_train() -> None:
        trainer = kind(tiny_model(), make_config(tmp_path), train_dataset=ROWS, processing_class=build_tiny_tokenizer())
        assert how == "instance"
        setattr(trainer, name, lambda *args: None)
        trainer.train()

    with pytest.raises(UserError, match=f"(?s)overrides what has no effect.*{name}: is overridden.*{mend}"):
        make_and_train()


def test_methods_that_are_called_may_be_overridden(tmp_path: Path) -> None:
    """Each of these has its effect; and who has a step of one's own may call a loss of one's own in it."""
    called = set()

    def noting(name: str) -> Any:
        def method(self: Any, *args: Any, **keywords: Any) -> Any:
            called.add(name)
            return getattr(ORPOTrainer, name)(self, *args, **keywords)

        return method

    names = {
        "training_step",
        "evaluation_loop",
        "log",
        "create_optimizer",
        "create_scheduler",
        "get_train_dataloader",
        "evaluate",
        "save_model",
    }
    kind = type("Mine", (ORPOTrainer,), {**{name: noting(name) for name in names}, "compute_loss": noting("compute_loss")})
    args = make_config(tmp_path, max_steps=2, eval_strategy="epoch", save_strategy="steps", save_steps=2)
    trainer = kind(tiny_model(), args, train_dataset=ROWS, eval_dataset=HELD_OUT, processing_class=build_tiny_tokenizer())
    trainer.train()
    assert called == names


# --- search for hyperparameters -----------------------------------------------------------------------------------------------------------


def test_a_search_gives_its_values_to_every_trial_s_objective(tmp_path: Path) -> None:
    """What a trial logs is what a run of its own with the same values logs, alpha, beta, rate, rows of a step and seed alike."""
    pytest.importorskip("optuna")
    values = [
        {"orpo_alpha": 0.5, "orpo_beta": 1.0, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        {"orpo_alpha": 3.0, "orpo_beta": 2.0, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ]

    def search(folder: Path, **options: Any) -> ORPOTrainer:
        args = make_config(folder, num_train_epochs=1, **options)
        kinds: dict[str, Any] = {"train_dataset": ROWS, "eval_dataset": HELD_OUT, "processing_class": build_tiny_tokenizer()}
        return ORPOTrainer(args=args, model_init=lambda: tiny_model(), **kinds)

    trainer = search(tmp_path / "search", save_strategy="epoch")
    before = trainer.args.to_dict()

    def space(trial: Any) -> dict[str, Any]:
        return values[trial.number] | {"seed": trial.suggest_int("seed", 3, 3)}

    best = trainer.hyperparameter_search(space, n_trials=2, backend="optuna", direction="minimize")
    losses = []
    for number, chosen in enumerate(values):
        alone = search(tmp_path / f"alone-{number}", seed=3, **chosen)
        alone.train()
        losses.append(alone.evaluate()["eval_loss"])
        folder = tmp_path / "search" / f"run-{number}"
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["loss"] for line in lines if "nll_loss" in line] == logged(alone)
        assert lines[-1]["eval_loss"] == losses[-1]
        assert len(list(folder.glob("checkpoint-*"))) == 1
    assert best.objective == min(losses)
    assert trainer.args.to_dict() == before
    for name, value in values[0].items():  # as transformers' own documentation goes on
        setattr(trainer.args, name, value)
    trainer.args.seed = 3
    trainer.train()
    first = [json.loads(line) for line in (tmp_path / "search" / "run-0" / "metrics.jsonl").read_text().splitlines()]
    assert logged(trainer) == [line["loss"] for line in first if "nll_loss" in line]


def test_a_trial_that_is_destroyed_is_pruned_and_the_search_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("optuna")
    args = make_config(tmp_path, max_steps=8)
    rows: dict[str, Any] = {"train_dataset": ROWS, "eval_dataset": HELD_OUT, "processing_class": build_tiny_tokenizer()}
    trainer = ORPOTrainer(args=args, model_init=lambda: tiny_model(), **rows)
    rates = [5.0, 1e-3]
    best = trainer.hyperparameter_search(
        lambda trial: {"learning_rate": rates[trial.number], "orpo_alpha": trial.suggest_float("orpo_alpha", 0.1, 1.0)},
        lambda metrics: metrics["eval_rewards/accuracies"],
        n_trials=2,
        direction="maximize",
        backend="optuna",
    )
    assert best.run_id == "1"
    assert "trial 0: step 8: the next-token loss is" in caplog.text
