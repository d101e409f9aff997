"""The kernels for whole packed rows: their index arithmetic and gradients on a CPU, and where each is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flashcpu import flash, varlen_runs_here
from flexcpu import flex_as_on_a_gpu, flex_trains_here
from orpo.engine import attention, flex, kernels, padded, shared, varlen
from orpo.engine.choose import Compute, attention_implementation, choose
from orpo.engine.layout import PackedLayout, PreferenceBatch, StepResult, collate
from orpo.engine.rule import AttentionRule
from orpo.errors import UserError
from orpo.objective import ORPO
from packedrows import SMALL, full_mask, inputs, written_out
from randomgroups import random_groups
from tinymodels import build_tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LONG = PackedLayout.of([(150, 3, 140), (5, 2)])
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


# --- FlexAttention -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (0.7, None), (None, SINKS), (0.7, SINKS)], ids=["", "cap", "sinks", "both"])
@pytest.mark.parametrize(("layout", "kv"), [(SMALL, 4), (LONG, 2)], ids=["small", "longer than a block"])
def test_flex_attention_equals_attention_written_out(
    layout: PackedLayout, kv: int, sinks: Tensor | None, softcap: float | None, window: int | None
) -> None:
    tensors = inputs(layout.num_rows, kv=kv, width=16)
    leaves64 = [tensor.detach().clone().requires_grad_() for tensor in [*tensors, *([] if sinks is None else [sinks])]]
    leaves = [leaf.detach().float().requires_grad_() for leaf in leaves64]
    expected = written_out(*leaves64[:3], full_mask(layout, window), 0.3, softcap, None if sinks is None else leaves64[3])
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    with flex_trains_here():
        found = flex.attend(*leaves[:3], layout, AttentionRule(0.3, window, softcap, None if sinks is None else leaves[3])).transpose(1, 2)
        found.backward(direction.float())
    expected.backward(direction)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    for leaf, leaf64 in zip(leaves, leaves64, strict=True):
        assert (leaf.grad.double() - leaf64.grad).norm() <= 2e-5 * (1 + leaf64.grad.norm())


@st.composite
def packed(draw: st.DrawFn) -> PackedLayout:
    lengths = st.tuples(st.integers(1, 14), st.lists(st.integers(1, 14), min_size=1, max_size=4))
    return PackedLayout.of((prompt, *answers) for prompt, answers in draw(st.lists(lengths, min_size=1, max_size=4)))


@settings(max_examples=100)
@given(layout=packed(), window=st.one_of(st.none(), st.integers(1, 20)), block=st.integers(1, 6), padding=st.integers(0, 9))
def test_blocks_are_those_of_the_mask_row_by_row(layout: PackedLayout, window: int | None, block: int, padding: int) -> None:
    num_rows = layout.num_rows + padding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", block)
        some_QL, all_QL = flex.visible_blocks(layout, num_rows, window)
        size = -(-num_rows // block) * block
    mask = torch.eye(size, dtype=torch.bool)
    mask[: layout.num_rows, : layout.num_rows] = full_mask(layout, window)
    tiles = mask.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    assert some_QL.tolist() == tiles.any(dim=3).any(dim=1).tolist()
    assert not (torch.from_numpy(all_QL) & ~tiles.all(dim=3).all(dim=1)).any(), "a block that is taken whole hides nothing"


def test_most_of_a_long_prompt_is_taken_whole() -> None:
    some_QL, all_QL = flex.visible_blocks(PackedLayout.of([(2048, 256, 256)]), 2560, None)
    assert all_QL.sum() == sum(range(16)) + 4 * 16 + 2  # all but the diagonal
    assert (some_QL & ~all_QL).sum() == 20


def test_rows_are_padded_to_whole_blocks_with_rows_that_see_themselves() -> None:
    assert [flex.padded_rows(size) for size in (1, 257, 385, 16_000)] == [384, 384, 512, 16_000]
    tensors = inputs(384, width=16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = flex.attend(*tensors, SMALL, AttentionRule(0.3))
    torch.testing.assert_close(found[0, :, -1], tensors[2][0, :, -1].repeat_interleave(2, 0))


def test_nothing_of_a_prompt_is_copied() -> None:
    """Of all tensors that a layer makes none is longer than the row."""
    tensors = inputs(LONG.num_rows, width=16)
    lengths = []

    class Lengths(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.ndim == 4 and result.shape[-1] == 16:
                lengths.append(result.shape[2])
            return result

    with torch.no_grad(), Lengths():
        attention._by_piece(*tensors, PackedLayout.of([(5, 3, 4), (280, 8)]), AttentionRule(0.3))
    assert lengths
    assert max(lengths) <= LONG.num_rows


# --- variable-length flash attention -----------------------------------------------------------------------------------------------------


def flash_of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *,
    return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """The same before it knew of grouped heads."""
    assert query.shape[1] == key.shape[1]
    return flash(query, key, value, cu_q, cu_k, max_q, max_k, scale=scale or 1.0, window_size=window_size)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("kv", [4, 2])
@pytest.mark.parametrize("kernel", [flash, flash_of_torch_2_11])
def test_every_segment_is_a_sequence_of_flash_attention(
    kernel: Callable[..., Tensor], kv: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    tensors = inputs(SMALL.num_rows, kv=kv)
    expected = written_out(*[tensor.requires_grad_() for tensor in tensors], full_mask(SMALL, window), 0.3)
    found = varlen.attend(*tensors, SMALL, AttentionRule(0.3, window)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for left, right in zip(torch.autograd.grad(found, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True):
        torch.testing.assert_close(left, right)


# --- scaled-dot-product attention --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(layout=packed(), window=st.one_of(st.none(), st.integers(1, 20)), block=st.integers(1, 30))
def test_calls_by_group_and_by_segment_are_the_same(layout: PackedLayout, window: int | None, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        tensors = [tensor.requires_grad_() for tensor in inputs(layout.num_rows)]
        found = attention._by_piece(*tensors, layout, AttentionRule(0.3, window))
    expected = written_out(*tensors, full_mask(layout, window), 0.3)
    torch.testing.assert_close(found, expected)
    for left, right in zip(torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(expected.sum(), tensors), strict=True):
        torch.testing.assert_close(left, right)


def test_a_layer_makes_one_call_for_each_short_group_and_adds_nothing_up_over_the_row() -> None:
    """What would be launched on a GPU, once masks are made: views aside, forward and backward."""
    layout = PackedLayout.of([(20, 6, 9)] * 12)
    tensors = [tensor.requires_grad_() for tensor in inputs(layout.num_rows)]
    attention._by_piece(*tensors, layout, AttentionRule(0.3))
    called: list[str] = []

    class Called(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not any(item.alias_info is not None for item in function._schema.returns):
                called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Called():
        found = attention._by_piece(*tensors, layout, AttentionRule(0.3))
        forward = len(called)
        torch.autograd.grad(found, tensors, torch.ones_like(found))
    assert sum("scaled_dot_product" in name for name in called) == 2 * 12
    assert forward <= 12 + 5, called
    assert len(called) - forward <= 12 + 10, called


def test_no_call_has_a_mask_and_grouped_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for both, torch on CUDA takes the form that writes out all scores in float32."""
    real, calls = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((query.shape[1] == key.shape[1] == value.shape[1], bool(options.get("enable_gqa"))))
        return real(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    for layout in (SMALL, LONG):  # by group, and by segment
        attention._by_piece(*inputs(layout.num_rows, kv=2), layout, AttentionRule(0.3))
    assert set(calls) == {(True, False)}


# --- whole models ------------------------------------------------------------------------------------------------------------------------


def values(step: Callable[[], StepResult], model: nn.Module) -> list[Tensor]:
    result = step()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(result.loss, parameters, allow_unused=True)
    return [result.logp_N, *(gradient for gradient in gradients if gradient is not None)]


def assert_equals_padded(architecture: str, kernel: str, runs_here: AbstractContextManager[Any]) -> None:
    """A model's log-probabilities and gradients under a kernel are those of the padded engine."""
    batch: PreferenceBatch = collate(random_groups(4, kinds=("pair", "four", "sft"), prompt=(10, 18), answer=(1, 14)))
    attention.register()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_tiny_model(architecture)
        expected = values(lambda: padded.step(model, batch, ORPO(1.0)), model)
        with runs_here, attention_implementation(model, attention.NAME):
            found = values(lambda: shared.step(model, batch, ORPO(1.0), kernel=kernel), model)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    largest = max(float(gradient.norm()) for gradient in expected[1:])
    for left, right in zip(found[1:], expected[1:], strict=True):
        assert (left - right).norm() <= 1e-4 * right.norm() + 1e-6 * largest


@pytest.mark.parametrize(
    "architecture", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "llama", "qwen3", "gemma3", "mistral"))]
)
def test_a_model_under_flex_attention_equals_the_padded_engine(architecture: str) -> None:
    """Window, soft cap and sinks, each from a model that has them; the row is padded to a whole block."""
    assert_equals_padded(architecture, "flex", flex_trains_here())


@pytest.mark.parametrize(
    "architecture", ["mistral", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3", "gemma3"))]
)
def test_a_model_under_variable_length_attention_equals_the_padded_engine(architecture: str) -> None:
    """Through torch's own operator: what it is given, and the gradients that its autograd asks for."""
    assert_equals_padded(architecture, "varlen", varlen_runs_here())


def test_the_start_compares_the_very_kernel_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that hides one prompt row too much is found, in whatever precision it trains."""
    monkeypatch.setitem(kernels.KERNELS, "flex", kernels.Kernel(None, (torch.bfloat16,), True, True, ""))
    model, rows = build_tiny_model("llama"), random_groups(2, prompt=(10, 16), answer=(6, 12))
    compute = Compute(torch.bfloat16, lambda: torch.autocast("cpu", dtype=torch.bfloat16))

    def choice() -> Any:
        with flex_trains_here():
            return choose(model, rows, ORPO(1.0), attention_kernel="flex", compute=compute)

    engine = choice()
    assert (engine.name, engine.kernel) == ("shared", "flex")
    assert engine.reason.count("bfloat16") == engine.reason.count("float32") == 1
    table = PackedLayout.table

    def blind(layout: PackedLayout, num_rows: int) -> Any:
        found = table(layout, num_rows).copy()
        found[1] += 8 * (found[1] < found[2])
        return found

    monkeypatch.setattr(PackedLayout, "table", blind)
    with pytest.raises(UserError, match=r"does not hold.*bfloat16"):
        choice()


# --- where they are refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "device", "dtype", "told"),
    [
        ("flex", "cpu", torch.float32, "on cpu"),
        ("flex", "mps", torch.float32, "on mps"),
        ("varlen", "cpu", torch.bfloat16, "on cpu"),
        ("varlen", "cuda", torch.float32, "in float32"),
        ("flex", "cuda", torch.float32, None),
        ("varlen", "cuda", torch.bfloat16, None),
        ("varlen", "cuda", torch.float16, None),
        ("sdpa", "mps", torch.float32, None),
    ],
)
def test_a_kernel_is_refused_where_it_cannot_train(name: str, device: str, dtype: torch.dtype, told: str | None) -> None:
    if told is None:
        assert kernels.resolve(name, torch.device(device), dtype) == name
        return
    with pytest.raises(UserError, match=told) as caught:
        kernels.resolve(name, torch.device(device), dtype)
    assert caught.value.where == "attention_kernel"
    assert kernels.resolve("auto", torch.device(device) if device != "cuda" else CPU, dtype) == "sdpa", "the mend works"


@pytest.mark.parametrize(("architecture", "told"), [("gemma2", "soft cap"), ("gpt_oss", "sinks")])
def test_a_kernel_is_refused_for_a_model_that_needs_more(architecture: str, told: str) -> None:
    model = build_tiny_model(architecture)
    with pytest.raises(UserError, match=told):
        kernels.suited("varlen", "varlen", model)
    assert kernels.suited("auto", "varlen", model) == "sdpa"
    assert kernels.suited("flex", "flex", model) == "flex"


def test_auto_takes_what_was_measured_on_the_card_and_nothing_was_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.MEASURED == {}, "name the card and the results that a change of this rests on"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert kernels.resolve("auto", CUDA, torch.bfloat16) == "sdpa"
    monkeypatch.setattr(kernels, "MEASURED", {"H100": "varlen"})
    assert kernels.resolve("auto", CUDA, torch.bfloat16) == "varlen"
    assert kernels.resolve("auto", CUDA, torch.float32) == "sdpa"
    assert kernels.resolve("auto", CPU, torch.bfloat16) == "sdpa"


# --- compiling ---------------------------------------------------------------------------------------------------------------------------


CALLS = [((60, 70), None), ((200, 99, 31), None), ((7, 5), 4), ((400, 3), 100), ((600, 20, 300), None), ((128,), 2)]


@pytest.mark.parametrize(("softcap", "width"), [(None, 16), (0.7, 16), (None, 256), pytest.param(None, 128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_new_lengths_windows_and_layouts_compile_nothing_anew(backend: str, softcap: float | None, width: int) -> None:
    """What Dynamo traces, without the code behind it, and with the graph of the backward pass: one, whatever the lengths that follow."""
    counts = []
    with flex_as_on_a_gpu(backend):
        for lengths, window in CALLS:
            layout = PackedLayout.of([lengths, (5, 2)])
            leaves64 = [tensor.requires_grad_() for tensor in inputs(flex.padded_rows(layout.num_rows), width=width)]
            leaves = [leaf.detach().float().requires_grad_() for leaf in leaves64]
            found = flex.attend(*leaves, layout, AttentionRule(0.3, window, softcap)).transpose(1, 2)
            expected = written_out(*leaves64, padded_mask(layout, leaves[0].shape[2], window), 0.3, softcap)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
            direction = torch.randn_like(expected)
            wanted = torch.autograd.grad(expected, leaves64, direction)
            for left, right in zip(torch.autograd.grad(found, leaves, direction.float()), wanted, strict=True):
                assert (left.double() - right).norm() <= 1e-4 * right.norm()
            counts.append(kernels.num_compiled_graphs())
    assert counts[0] > 0
    assert len(set(counts)) == 1, counts
    assert not torch._dynamo.utils.counters["graph_break"]


def padded_mask(layout: PackedLayout, num_rows: int, window: int | None) -> Tensor:
    """Rows of padding see themselves."""
    mask = torch.eye(num_rows, dtype=torch.bool)
    mask[: layout.num_rows, : layout.num_rows] = full_mask(layout, window)
    return mask


# --- as a user asks for one --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["train"], ["check", "--quick"]])
def test_the_command_line_refuses_it_before_anything_is_read(
    command: list[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from orpo.cli import main

    monkeypatch.chdir(tmp_path)
    keys = ["--model_name_or_path", "nothing", "--dataset_name", "nothing.jsonl", "--use_cpu", "true", "--attention_kernel", "flex"]
    assert main([*command, *keys]) == 2
    told = "".join(capfd.readouterr())
    assert "attention_kernel: 'flex' trains on cuda alone, and this run is on cpu" in told
    assert "attention_kernel: auto" in told


def test_a_run_records_what_computed_its_attention(tmp_path: Any) -> None:
    from trainerruns import make_trainer

    trainer = make_trainer(tmp_path, random_groups(2))
    assert trainer.engine.kernel == "sdpa"
    with pytest.raises(UserError, match="'varlen' trains on cuda alone"):
        make_trainer(tmp_path, random_groups(2), attention_kernel="varlen")
    with pytest.raises(UserError, match="belongs to packed rows"):
        make_trainer(tmp_path, random_groups(2), attention_kernel="flex", engine="padded")
