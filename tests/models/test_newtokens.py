"""Tokens that are new to a model are trained by an adapter, travel with it, and end turns; tokens and positions it lacks are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orpo import ORPOConfig, ORPOTrainer
from orpo.data.settings import DataSettings
from orpo.data.template import TemplateEncoder, make_encoder
from orpo.data.types import TokenGroup, Where
from orpo.errors import UserError
from orpo.inference.generate import generate
from orpo.inference.scores import choose_scoring_engine, score_groups
from orpo.models.adapters import text_layers_only
from orpo.models.export import export_adapter, export_merged
from orpo.models.load import load_model
from orpo.models.newtokens import with_new_tokens
from orpo.training.setup import check_rows
from tinymodels import build_tiny_model, build_tiny_tokenizer

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Is {number} even?"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no no"}],
    }
    for number in range(8)
]


def base_tokenizer() -> Any:
    """A base model's tokenizer: no chat template, none of ChatML's tokens, and an end of text that is no end of a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    raw.train_from_iterator(["Is this even? yes no"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def saved_base(folder: Path, architecture: str, *, extra_rows: int = 0, **overrides: Any) -> Path:
    tokenizer = base_tokenizer()
    build_tiny_model(architecture, vocab_size=len(tokenizer) + extra_rows, eos_token_id=1, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")


def trained(base: Path, out: Path, *, steps: int = 3, rate: float = 1e-2) -> ORPOTrainer:
    model, tokenizer, _ = load_model(base, device="cpu")
    args = ORPOConfig(
        output_dir=str(out),
        chat_template="chatml",
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = ORPOTrainer(model=model, args=args, train_dataset=ROWS, processing_class=tokenizer, peft_config=lora())
    trainer.train()
    return trainer


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("architecture", "extra_rows"), [("llama", 0), ("llama_tied", 0), ("llama", 40), ("llama_tied", 40), ("phi", 0), ("gpt_neox", 0)]
)
def test_new_rows_are_trained_and_travel(architecture: str, extra_rows: int, tmp_path: Path) -> None:
    """Every new row of either side moves, no old row does, and the folder gives the same logits on the base as it is stored."""
    base = saved_base(tmp_path / "base", architecture, extra_rows=extra_rows)
    trainer = trained(base, tmp_path / "run")
    model, tokenizer = trainer.model, trainer.processing_class
    new_ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    merged = export_merged(model, tokenizer, tmp_path / "merged", stop_token_ids=trainer.encoder.terminator_ids)
    plain, stored = load_model(merged, device="cpu").model, load_model(base, device="cpu").model
    before, after = stored.get_input_embeddings().weight.detach(), plain.get_input_embeddings().weight.detach()
    old = [row for row in range(before.shape[0]) if row not in new_ids]
    assert torch.equal(after[old], before[old])
    settings = model.peft_config["default"]
    assert all(sorted(ids) == sorted(new_ids) for ids in settings.trainable_token_indices.values())

    folder = export_adapter(model, tokenizer, tmp_path / "adapter", stop_token_ids=trainer.encoder.terminator_ids)
    again = load_model(folder, device="cpu")
    ids = torch.tensor([[3, 4, *new_ids, 5, new_ids[1]]])
    torch.testing.assert_close(logits(again.model, ids), logits(model.eval(), ids), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert (folder / "README.md").exists() == (extra_rows == 0)
    assert again.model.generation_config.eos_token_id == [1, new_ids[1]]


def test_both_sides_of_an_untied_head_move(tmp_path: Path) -> None:
    base = saved_base(tmp_path / "base", "llama", extra_rows=8)
    trainer = trained(base, tmp_path / "run")
    new_ids = trainer.processing_class.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    stored = load_model(base, device="cpu").model
    core = trainer.model.get_base_model()
    for now, before in ((core.get_input_embeddings(), stored.get_input_embeddings()), (core.get_output_embeddings(), stored.lm_head)):
        moved = (now.weight.detach() - before.weight.detach()).abs().amax(-1)
        assert (moved[new_ids] > 1e-3).any()
        assert set(moved.nonzero().flatten().tolist()) <= set(new_ids)


def test_the_notes_of_the_folder_work_with_peft_alone(tmp_path: Path) -> None:
    """What the adapter's README says is run as it stands."""
    import re

    trainer = trained(saved_base(tmp_path / "base", "llama"), tmp_path / "run")
    folder = export_adapter(trainer.model, trainer.processing_class, tmp_path / "adapter")
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(folder))), names)  # noqa: S102  (the folder's own note, written just above)
    ids = torch.tensor([[3, 4, *trainer.processing_class.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])]])
    torch.testing.assert_close(logits(names["model"].eval(), ids), logits(trainer.model.eval(), ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied"])
def test_a_base_with_chatml_and_lora_ends_its_answers(architecture: str, tmp_path: Path) -> None:
    from orpo.inference.generate import generate

    trainer = trained(saved_base(tmp_path / "base", architecture), tmp_path / "run", steps=60, rate=2e-2)
    folder = export_adapter(trainer.model, trainer.processing_class, tmp_path / "a", stop_token_ids=trainer.encoder.terminator_ids)
    model, tokenizer, _ = load_model(folder, device="cpu")
    encoder = make_encoder(tokenizer, DataSettings.of(vars(ORPOConfig(output_dir=str(tmp_path), use_cpu=True))))
    answers = generate(model, tokenizer, encoder, [row["prompt"] for row in ROWS], max_new_tokens=24)
    assert [answer.finish for answer in answers] == ["stop"] * len(ROWS)
    prompt = tokenizer.apply_chat_template(ROWS[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    assert written[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_what_the_user_named_stays(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = build_tiny_model("llama")
    for settings in ({"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [3]}):
        given = LoraConfig(target_modules=["q_proj"], **settings)
        made = with_new_tokens(given, model, [5, 6])
        assert made.trainable_token_indices == settings.get("trainable_token_indices")
        assert made.modules_to_save == settings.get("modules_to_save")
    half = with_new_tokens(LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), model, [5, 6])
    assert half.trainable_token_indices == {"model.embed_tokens": [5, 6]}


def test_an_adapter_stays_off_the_vision_tower() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": 64, **small},
        vision_config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **small},
        image_token_index=63,
    )
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        model = AutoModelForImageTextToText.from_config(config)
        adapted = get_peft_model(model, text_layers_only(LoraConfig(r=2, target_modules=targets), model))
        adapted(input_ids=torch.arange(6)[None]).logits.square().sum().backward()
        parameters = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        assert parameters
        assert not [name for name, parameter in parameters.items() if parameter.grad is None]


def group(prompt: list[int], answer: list[int]) -> TokenGroup:
    ids = [np.asarray(values, dtype=np.int32) for values in (prompt, answer)]
    return TokenGroup(ids[0], (ids[1],), (), (True,), Where("rows.jsonl", 0, 1))


def test_a_token_without_a_row_is_named_and_the_mend_works(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    mine = tokenizer.convert_tokens_to_ids("<|mine|>")
    model = build_tiny_model("llama", vocab_size=mine)
    rows = [group([3, 4], [5]), group([3, mine], [5])]
    for sets in ((rows, None), (rows[:1], rows), (rows[:1], {"one": rows})):
        with pytest.raises(UserError, match=rf"(?s)<\|mine\|>.*id {mine}.*{mine} rows.*resize_token_embeddings\({mine + 1}\)"):
            check_rows(model, tokenizer, *sets)
    model.resize_token_embeddings(mine + 1)
    check_rows(model, tokenizer, rows)


def test_a_model_that_is_asked_names_it_too() -> None:
    """Chat, evaluation and audit ask without a trainer that would have looked."""
    tokenizer = build_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|mine|>"]})
    mine = tokenizer.convert_tokens_to_ids("<|mine|>")
    model = build_tiny_model("llama", vocab_size=mine)
    encoder = TemplateEncoder(tokenizer)
    with pytest.raises(UserError, match=rf"(?s)the prompt: the token '<\|mine\|>' has id {mine}.*resize_token_embeddings\({mine + 1}\)"):
        generate(model, tokenizer, encoder, ["Hello", "say <|mine|>"], max_new_tokens=2)
    rows = [group([3, 4], [5]), group([3, 4], [mine])]
    for ask in (score_groups, choose_scoring_engine):
        with pytest.raises(UserError, match=rf"(?s)rows.jsonl:1: the token has id {mine}, the model's embeddings have {mine} rows"):
            ask(model, rows)
    assert len(generate(model, tokenizer, encoder, ["Hello"], max_new_tokens=2)) == len(score_groups(model, rows[:1])) == 1


@pytest.mark.parametrize(("architecture", "has_scaling"), [("gpt2", False), ("llama", False), ("llama", True)])
def test_rows_beyond_the_positions(architecture: str, has_scaling: bool, caplog: pytest.LogCaptureFixture) -> None:
    scaling = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}} if has_scaling else {}
    model = build_tiny_model(architecture, max_position_embeddings=8, **scaling)
    check_rows(model, None, [group([3] * 6, [4] * 2)])
    longer = [group([3] * 6, [4] * 3)]
    if has_scaling:
        check_rows(model, None, longer)
        assert "9 tokens, the model has 8 positions" in caplog.text
    else:
        with pytest.raises(UserError, match="9 tokens, the model has 8 positions") as caught:
            check_rows(model, None, longer)
        assert caught.value.mend == "max_length: 8"


def test_no_limit_means_the_smaller_of_both(tmp_path: Path) -> None:
    tokenizer = build_tiny_tokenizer()
    settings = DataSettings.of(vars(ORPOConfig(output_dir=str(tmp_path), max_length=None, use_cpu=True)))
    config = build_tiny_model("llama").config
    tokenizer.model_max_length = int(1e30)
    assert make_encoder(tokenizer, settings, num_positions=config.max_position_embeddings).max_length == 512
    tokenizer.model_max_length = 100
    assert make_encoder(tokenizer, settings, num_positions=config.max_position_embeddings).max_length == 100
