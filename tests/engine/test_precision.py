"""bf16 for compute, float32 for what is trained: the copies, the gradients, the optimizer step, and fifty steps beside float32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TrainerCallback

from orpo import ORPOTrainer
from orpo.data.types import TokenGroup
from orpo.engine import precision
from orpo.engine.precision import MasterAdamW, WorkingWeights, autocast_to, total_norm
from orpo.system.allocator import forget_file_pages, keep_freed_memory, limit_kernel_cache, return_freed_memory
from randomgroups import random_groups
from tinymodels import build_tiny_model
from trainerruns import logged, make_trainer, weights


class Tied(nn.Module):
    """An embedding that is also the head, a norm, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(self.embedding(ids)))).float().square().mean()


def step(model: nn.Module, working: WorkingWeights, seed: int = 0) -> None:
    ids = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(seed))
    with working.active():
        model(ids).backward()


def bf16_gradients(model: Tied, seed: int = 0) -> dict[str, Tensor]:
    """What a model that is bf16 throughout gets."""
    copy = Tied()
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    copy(torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(seed))).backward()
    return {name: parameter.grad for name, parameter in copy.named_parameters() if parameter.grad is not None}


# --- working weights ---------------------------------------------------------------------------------------------------------------------


def test_inside_all_is_bf16_and_outside_float32() -> None:
    model = Tied()
    before = weights(model)
    working = WorkingWeights(model)
    with working.active():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name].bfloat16())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
    assert model.head.weight is model.embedding.weight


def test_an_exception_inside_leaves_the_masters_in_place() -> None:
    model = Tied()
    before = weights(model)
    with pytest.raises(KeyboardInterrupt), WorkingWeights(model).active():
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_one_micro_batch_gives_the_gradients_of_a_bf16_model() -> None:
    model = Tied()
    working = WorkingWeights(model)
    step(model, working)
    assert all(parameter.grad is None for parameter in model.parameters())
    working.release()
    expected = bf16_gradients(model)
    assert set(expected) == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad.float(), expected[name].float())
    assert model.frozen.weight.grad is None


def test_gradients_of_several_micro_batches_add_up_in_float32() -> None:
    """In bf16 the sum would depend on how a step is cut, and small ones would be lost."""
    model = Tied()
    working = WorkingWeights(model)
    for seed in range(4):
        step(model, working, seed)
    working.release()
    parts = [bf16_gradients(model, seed) for seed in range(4)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad, torch.stack([part[name].float() for part in parts]).sum(0), rtol=1e-6, atol=1e-9)


def test_gradients_are_handed_over_once() -> None:
    model = Tied()
    working = WorkingWeights(model)
    step(model, working)
    working.release()
    model.zero_grad()
    working.release()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("way", ["optimizer", "load_state_dict", "data"])
def test_copies_follow_their_masters_whoever_changes_them(way: str) -> None:
    """`.data` is how many optimizers outside torch write; it leaves no trace in a parameter's version."""
    model = Tied()
    working = WorkingWeights(model)
    step(model, working)
    working.release()
    if way == "optimizer":
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad.float()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    elif way == "load_state_dict":
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    else:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
    with working.active():
        inside = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, copy in zip(model.parameters(), inside, strict=True):
        assert torch.equal(copy, parameter.bfloat16())


def test_gradients_outside_are_left_alone() -> None:
    """A user's own backward after training, or between steps, must find its gradients where it looks for them."""
    model = Tied()
    WorkingWeights(model)
    model(torch.arange(5)).backward()
    assert model.norm.weight.grad is not None
    assert model.norm.weight.grad.dtype == torch.float32


def test_closed_it_watches_no_more() -> None:
    model = Tied()
    working = WorkingWeights(model)
    working.close()
    with working.active():
        model(torch.arange(5)).backward()
    assert model.norm.weight.grad is not None


# --- AdamW on masters --------------------------------------------------------------------------------------------------------------------

ADAMW: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    chance = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=chance)) for shape in ((5, 7), (13,), (2, 3, 4))]


def set_gradients(items: Iterable[nn.Parameter], number: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> None:
    chance = torch.Generator().manual_seed(100 + number)
    for parameter in items:
        parameter.grad_dtype = None
        parameter.grad = (torch.randn(parameter.shape, generator=chance).to(dtype).float() * scale).to(dtype)


@pytest.fixture(params=["piece by piece", "together"])
def update(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU: many weights in one call."""
    if request.param == "together":
        monkeypatch.setattr(MasterAdamW, "PIECEWISE", ())
        monkeypatch.setattr(MasterAdamW, "LAUNCH", 40)


@pytest.mark.usefixtures("update")
@pytest.mark.parametrize("piece", [1, 4, 2**19])
@pytest.mark.parametrize(
    "options", [ADAMW, {**ADAMW, "maximize": True}, {**ADAMW, "weight_decay": 0.0}], ids=["decay", "maximize", "plain"]
)
def test_master_adamw_is_torchs_adamw(options: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MasterAdamW, "PIECE", piece)
    own, peer = parameters(), parameters()
    optimizer, reference = MasterAdamW(own, **options), torch.optim.AdamW(peer, fused=True, **options)
    for number in range(5):
        for items in (own, peer):
            set_gradients(items, number)
        optimizer.step()
        reference.step()
    for parameter, other in zip(own, peer, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("update")
def test_bf16_gradients_count_as_their_float32_values() -> None:
    own, peer = parameters(), parameters()
    optimizer, reference = MasterAdamW(own, **ADAMW), torch.optim.AdamW(peer, fused=True, **ADAMW)
    for number in range(5):
        set_gradients(own, number, torch.bfloat16)
        set_gradients(peer, number, torch.bfloat16)
        for parameter in peer:
            assert parameter.grad is not None
            parameter.grad = parameter.grad.float()
        optimizer.step()
        reference.step()
    for parameter, other in zip(own, peer, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("update")
def test_the_gradient_scale_holds_for_one_step() -> None:
    own, peer = parameters(), parameters()
    optimizer, reference = MasterAdamW(own, **ADAMW), torch.optim.AdamW(peer, fused=True, **ADAMW)
    for number, scale in enumerate((0.25, 1.0)):
        set_gradients(own, number)
        set_gradients(peer, number, scale=scale)
        optimizer.gradient_scale = scale
        optimizer.step()
        assert optimizer.gradient_scale == 1.0
        reference.step()
    for parameter, other in zip(own, peer, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("update")
def test_its_state_is_adamws() -> None:
    """A checkpoint of one can be resumed by the other."""
    own, peer = parameters(), parameters()
    optimizer, reference = MasterAdamW(own, **ADAMW), torch.optim.AdamW(peer, fused=True, **ADAMW)
    for items, stepper in ((own, optimizer), (peer, reference)):
        set_gradients(items, 0)
        stepper.step()
    one, other = optimizer.state_dict(), reference.state_dict()
    assert one["state"].keys() == other["state"].keys()
    assert one["param_groups"][0].keys() == other["param_groups"][0].keys()
    for key in one["state"]:
        assert one["state"][key].keys() == other["state"][key].keys()
    reference.load_state_dict(one)
    optimizer.load_state_dict(other)
    for items, stepper in ((own, optimizer), (peer, reference)):
        set_gradients(items, 1)
        stepper.step()
    for parameter, twin in zip(own, peer, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("update")
def test_it_keeps_up_the_working_copies() -> None:
    model = Tied()
    working = WorkingWeights(model)
    optimizer = MasterAdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    optimizer.working = working
    for _ in range(3):
        step(model, working)
        working.release()
        optimizer.step()
        optimizer.zero_grad()
        with working.active():
            inside = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter, copy in zip(model.parameters(), inside, strict=True):
            assert torch.equal(copy, parameter.bfloat16())


def test_parameters_without_a_gradient_stay() -> None:
    items = parameters()
    optimizer = MasterAdamW(items, **ADAMW)
    set_gradients(items[:1], 0)
    before = [parameter.detach().clone() for parameter in items]
    optimizer.step()
    assert not torch.equal(items[0], before[0])
    assert torch.equal(items[1], before[1])


# --- the rest ----------------------------------------------------------------------------------------------------------------------------


def test_total_norm_is_torchs_whatever_the_dtypes() -> None:
    tensors = [torch.randn(50), torch.randn(3, 4).bfloat16(), torch.randn(7)]
    expected = torch.cat([tensor.double().flatten() for tensor in tensors]).norm().item()
    assert total_norm(tensors) == pytest.approx(expected, rel=1e-6)
    assert total_norm([]) == 0.0
    # Of numbers whose squares no float16 could hold.
    assert total_norm([torch.full((4,), 300.0, dtype=torch.float16)]) == pytest.approx(600.0)


def test_a_norm_that_is_not_a_number_is_told() -> None:
    assert total_norm([torch.tensor([1.0, float("nan")])]) != total_norm([torch.tensor([1.0, float("nan")])])


def test_autocast_is_nothing_for_float32() -> None:
    with autocast_to(torch.device("cpu"), torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with autocast_to(torch.device("cpu"), torch.bfloat16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")


def test_an_allocator_without_the_setting_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def missing(_: Any) -> Any:
        raise OSError("no libc here")

    assert isinstance(keep_freed_memory(), bool)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert keep_freed_memory() is False
    assert return_freed_memory() is False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux")
def test_freed_memory_is_given_back() -> None:
    """Blocks of the size that glibc keeps, freed below one that stays: held until asked for."""
    program = (
        "import torch\n"
        "from orpo.system.allocator import keep_freed_memory, return_freed_memory\n"
        "def resident(): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')) / 1000\n"
        "assert keep_freed_memory()\n"
        "start = resident()\n"
        "blocks = [torch.ones(2**20) for _ in range(50)]\n"
        "stays = torch.ones(1000)\n"
        "del blocks\n"
        "kept = resident() - start\n"
        "assert return_freed_memory()\n"
        "print(kept, resident() - start)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    kept, left = map(float, run.stdout.split())
    assert kept > 150
    assert left < 50


def resident_of(file: Path) -> int:
    """KiB of a mapped file that this process holds."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(str(file))]
    return sum(int(next(line.split()[1] for line in lines[start:] if line.startswith("Rss:"))) for start in starts)


needs_pagemap = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="what pages are in memory is asked of Linux")


@needs_pagemap
def test_pages_of_a_file_are_let_go_and_what_was_written_to_them_stays(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    kept = torch.randn(4_000_000)
    save_file({"weight": kept}, file)
    mapped = load_file(file)["weight"]
    mapped[1_000_000:1_100_000] = 3.0
    kept[1_000_000:1_100_000] = 3.0
    assert torch.equal(mapped, kept)
    assert resident_of(file) > 15_000
    assert 15_000_000 < forget_file_pages([(mapped.data_ptr(), mapped.nbytes)]) < 15_700_000
    assert resident_of(file) < 1_000
    assert torch.equal(mapped, kept)
    assert forget_file_pages([(kept.data_ptr(), kept.nbytes)]) == 0  # of no file
    assert torch.equal(mapped, kept)


@needs_pagemap
def test_a_frozen_base_is_not_held_twice(tmp_path: Path) -> None:
    """LoRA in bf16 on a float32 file: once its copies are made nothing of the file stays in memory, after an evaluation neither."""
    build_tiny_model("llama", vocab_size=16384, hidden_size=128).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    base = load_file(file)
    held: list[int] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            held.append(resident_of(file))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    groups = random_groups(8)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"bf16": True, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path / "run", groups, model=model, arguments={"eval_dataset": groups, "peft_config": adapter}, **options)
    trainer.add_callback(Look())
    trainer.train()
    assert len(held) == 4
    assert max(held) < file.stat().st_size / 1024 / 4
    assert torch.equal(trainer.model.get_base_model().get_input_embeddings().weight, base["model.embed_tokens.weight"])


def test_a_limit_of_the_kernel_cache_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    limit_kernel_cache()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "256"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    limit_kernel_cache()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


class _FirstProduct(TorchDispatchMode):
    """Notes the limit of the kernel cache as it stands at the first bf16 product, which is when the library reads it."""

    limit: str | None = "no product"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_product = func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "_addmm_activation", "linear")
        if is_product and args[-1].dtype == torch.bfloat16 and self.limit == "no product":
            self.limit = os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["train", "score", "evaluate"])
def test_the_kernel_cache_is_limited_before_the_first_product(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes first: training, the trainer's own evaluation, or a scoring of a model without a trainer (demo and compare)."""
    from orpo.evaluate.pairs import score_groups

    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    rows, model = random_groups(4), build_tiny_model("llama", num_layers=1)
    with _FirstProduct() as first:
        if what == "score":
            score_groups(model, rows, compute_dtype=torch.bfloat16)
        else:
            trainer = make_trainer(tmp_path, rows, model=model, arguments={"eval_dataset": rows}, bf16=True, max_steps=1)
            getattr(trainer, what)()
    assert first.limit == "256"


# --- fifty steps beside float32 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups() -> list[TokenGroup]:
    return random_groups(64, kinds=("pair", "pair", "four", "sft"), prompt=(4, 16), answer=(4, 12))


def run(tmp_path: Path, groups: list[TokenGroup], **options: Any) -> ORPOTrainer:
    """Fifty steps of 8 rows in two micro-batches."""
    defaults = {"per_device_train_batch_size": 4, "max_steps": 50, "learning_rate": 3e-4}
    trainer = make_trainer(
        tmp_path, groups, model=build_tiny_model("llama", num_layers=2, initializer_range=0.05), **{**defaults, **options}
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory, groups: list[TokenGroup]) -> Tensor:
    losses = logged(run(tmp_path_factory.mktemp("float32"), groups))
    assert losses[-1] < losses[0] - 0.1
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bf16_weights": False},
        pytest.param({"optim": "adafactor"}, marks=pytest.mark.slow),
        {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    ],
    ids=str,
)
def test_fifty_steps_in_bf16_do_not_drift_from_float32(
    options: dict[str, Any], tmp_path: Path, groups: list[TokenGroup], float32: Tensor
) -> None:
    """Mean residual with its sign: rounding cancels over steps, an update that does not reach the forward does not."""
    trainer = run(tmp_path, groups, bf16=True, **options)
    expected = float32
    if "optim" in options:
        expected = torch.tensor(logged(run(tmp_path / "float32", groups, **options)), dtype=torch.float64)
    residuals = (torch.tensor(logged(trainer), dtype=torch.float64) - expected) / expected
    assert residuals.abs().max() < 5e-3
    assert residuals.mean().abs() < 5e-4
    assert residuals[-10:].mean().abs() < 1e-3
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_steps_too_small_for_bf16_are_not_lost(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """At a rate of 1e-6 no step reaches half the spacing of bf16 at 0.05 (1e-4); fifty of them do, in the master."""
    moved = {}
    for dtype in (False, True):
        trainer = run(tmp_path / str(dtype), groups, bf16=dtype, learning_rate=1e-6, lr_scheduler_type="constant")
        start = weights(build_tiny_model("llama", num_layers=2, initializer_range=0.05))
        moved[dtype] = torch.cat([(weight - start[name]).flatten() for name, weight in weights(trainer.model).items()])
    assert moved[True].norm() == pytest.approx(moved[False].norm().item(), rel=0.05)
    assert torch.nn.functional.cosine_similarity(moved[True], moved[False], dim=0) > 0.9


class Foreign(torch.optim.Optimizer):
    """Plain gradient descent as many packages write it: through `.data`."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param_group in self.param_groups:
            for parameter in param_group["params"]:
                assert parameter.grad.dtype == torch.float32
                parameter.data.add_(parameter.grad, alpha=-param_group["lr"])


def test_an_optimizer_that_writes_through_data_learns_too(tmp_path: Path, groups: list[TokenGroup]) -> None:
    runs = []
    for bf16 in (False, True):
        model = build_tiny_model("llama", num_layers=2, initializer_range=0.05)
        optimizer = Foreign(model.parameters())
        arguments = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))}
        trainer = make_trainer(tmp_path / str(bf16), groups, model=model, bf16=bf16, max_steps=20, arguments=arguments)
        trainer.train()
        runs.append(torch.tensor(logged(trainer)))
    assert runs[0][-1] < runs[0][0] - 0.1
    assert ((runs[1] - runs[0]) / runs[0]).abs().max() < 5e-3


def test_after_training_a_model_is_an_ordinary_one(tmp_path: Path, groups: list[TokenGroup]) -> None:
    """The user's own loop goes on where the trainer stopped: gradients arrive, and in float32."""
    trainer = run(tmp_path, groups, bf16=True, max_steps=2)
    ids = torch.randint(3, 128, (2, 8))
    trainer.model(input_ids=ids, labels=ids).loss.backward()
    for parameter in trainer.model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


def test_a_run_is_the_same_with_many_weights_in_one_call(tmp_path: Path, groups: list[TokenGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for piecewise in (("cpu",), ()):
        monkeypatch.setattr(MasterAdamW, "PIECEWISE", piecewise)
        trainer = make_trainer(tmp_path / str(len(runs)), groups, bf16=True, bf16_weights=True, max_steps=4, max_grad_norm=0.5)
        trainer.train()
        runs.append(weights(trainer.model))
    for name, weight in runs[0].items():
        torch.testing.assert_close(runs[1][name], weight, rtol=1e-6, atol=1e-8)


def test_runs_of_parameters_are_bounded() -> None:
    sizes = [3, 50, 4, 5, 60, 1]
    found = [[one.numel() for one in several] for several in precision._launches([nn.Parameter(torch.zeros(size)) for size in sizes], 10)]
    assert found == [[3], [50], [4, 5], [60], [1]]


def test_pieces_cover_everything_once() -> None:
    array = torch.arange(10)
    found = [piece for piece, _ in precision._pieces((array, None), 4)]
    assert torch.cat(found).tolist() == array.tolist()
    assert [len(piece) for piece in found] == [4, 4, 2]
