"""The guards, by themselves (their classes need no trainer)."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import orpo
from orpo.checkpoint import Ranks
from orpo.data.types import TokenGroup, Where
from orpo.errors import GuardStop, SignalStop
from orpo.objective import KINDS
from orpo.training.guards import DivergenceGuard, NonFiniteGuard, ProofOfLearning, SignalGuard
from orpo.training.guards.divergence import NUM_STOPPED

NAN, INF = float("nan"), float("inf")


def _groups(number: int = 2) -> list[TokenGroup]:
    ids = np.array([1, 2], dtype=np.int32)
    return [TokenGroup(ids, (ids, ids), ((0, 1),), (True, True), Where("data.jsonl", row, row + 1)) for row in range(number)]


# --- non-finite steps


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF), (torch.tensor(-INF), torch.tensor(2.0))])
def test_non_finite_loss_or_gradient_stops_and_names_step_and_rows(loss: float, norm: float) -> None:
    with pytest.raises(GuardStop) as caught:
        NonFiniteGuard().check(step=17, loss=loss, grad_norm=norm, groups=_groups())
    text = str(caught.value)
    assert "step 17" in text
    assert "data.jsonl:1, data.jsonl:2" in text
    assert ("loss is" in text) == (not math.isfinite(float(loss)))
    assert ("gradient norm is" in text) == (not math.isfinite(float(norm)))
    assert caught.value.exit_code == 3


def test_the_answer_that_is_not_finite_is_named() -> None:
    with pytest.raises(GuardStop, match=r"bad answers: data\.jsonl:2 answer 0 \(log-probability nan\)\."):
        NonFiniteGuard().check(step=1, loss=NAN, grad_norm=NAN, groups=_groups(), logp_sums=[-1.0, -2.0, NAN, -3.0])


def test_many_rows_are_not_all_listed() -> None:
    with pytest.raises(GuardStop, match=r"data\.jsonl:8 and 92 more\."):
        NonFiniteGuard().check(step=1, loss=NAN, grad_norm=1.0, groups=_groups(100))


@pytest.mark.parametrize("loss", [0.0, -1.0, 1e38, torch.tensor(3.0)])
def test_finite_steps_pass_without_looking_at_answers(loss: float) -> None:
    def never() -> object:
        pytest.fail("read")
        yield

    assert NonFiniteGuard().check(step=1, loss=loss, grad_norm=0.0, groups=_groups(), logp_sums=never())


def test_skipping_is_bounded_also_over_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    guard = NonFiniteGuard("skip", max_skips=2)
    assert not guard.check(step=1, loss=NAN, grad_norm=1.0, groups=_groups())
    assert "step 1 left out (1 of at most 2)" in caplog.text
    resumed = NonFiniteGuard("skip", max_skips=2)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.check(step=2, loss=1.0, grad_norm=1.0)
    assert not resumed.check(step=3, loss=1.0, grad_norm=INF)
    with pytest.raises(GuardStop, match="after 2 skipped steps"):
        resumed.check(step=4, loss=NAN, grad_norm=1.0)


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="ignore"):
        NonFiniteGuard("ignore")


class _Pair(Ranks):
    """Two ranks in one thread each, meeting at a barrier."""

    def __init__(self, rank: int, shared: dict[str, object]) -> None:
        super().__init__(rank, 2)
        self._shared = shared

    def gather(self, value: object) -> list[object]:
        self._shared["values"][self.rank] = value  # type: ignore[index]
        self._shared["barrier"].wait(10)  # type: ignore[attr-defined]
        values = list(self._shared["values"])  # type: ignore[call-overload]
        self._shared["barrier"].wait(10)  # type: ignore[attr-defined]
        return values

    def max(self, values: Sequence[int]) -> list[int]:
        return [max(column) for column in zip(*self.gather(list(values)), strict=True)]  # type: ignore[arg-type]


def test_a_bad_step_of_one_rank_stops_both_with_one_message() -> None:
    shared = {"values": [None, None], "barrier": threading.Barrier(2)}
    messages: list[str] = ["", ""]

    def run(rank: int) -> None:
        try:
            NonFiniteGuard(ranks=_Pair(rank, shared)).check(step=3, loss=NAN if rank else 1.0, grad_norm=1.0, groups=_groups(rank + 1))
        except GuardStop as stop:
            messages[rank] = str(stop)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(20) for thread in threads]
    assert messages[0] == messages[1]
    assert "rank 1: the loss is nan" in messages[0]
    assert "data.jsonl:2" in messages[0]


# --- signals


@pytest.fixture(autouse=True)
def _foreground() -> Iterator[None]:
    """A shell's background job begins with SIGINT ignored, and a guard leaves an ignored signal alone."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_training_raises_where_the_program_stands(signum: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(SignalStop) as caught, SignalGuard():  # noqa: PT012  (what follows the signal must not run)
        os.kill(os.getpid(), signum)
        pytest.fail("went on")
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


def test_signal_in_training_waits_for_the_step_and_then_stops_once() -> None:
    steps = []
    with pytest.raises(SignalStop, match="saved checkpoint-3; the same command continues"), SignalGuard() as guard, guard.hold():  # noqa: PT012
        for step in range(10):
            steps.append(step)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if signum := guard.agreed():
                guard.stop(signum, saved="checkpoint-3")
    assert steps == [0, 1, 2, 3]


def test_signal_in_the_last_moment_of_a_run_is_not_lost() -> None:
    with pytest.raises(SignalStop), SignalGuard() as guard, guard.hold():
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_error_is_not_hidden_by_a_waiting_signal() -> None:
    with pytest.raises(ZeroDivisionError), SignalGuard() as guard, guard.hold():  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        _ = 1 / 0


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with SignalGuard():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with SignalGuard() as guard:
            seen.extend([signal.getsignal(signal.SIGTERM), guard.agreed()])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [before, 0]


def _signalled(body: str, numbers: list[int], **environment: str) -> tuple[int, str]:
    """Exit code and stderr of a process that is sent signals, each after it has written a line; then its stdin is closed."""
    code = f"import time, os, sys\nfrom orpo.training.guards.signals import SignalGuard\nwith SignalGuard() as guard, guard.hold():\n{body}"
    path = str(Path(orpo.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    assert process.stdout is not None
    for number in numbers:
        process.stdout.readline()
        process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


ONE_SEEN = "    print('at work', flush=True)\n    while not guard.pending:\n        time.sleep(0.01)\n    print('one seen', flush=True)\n"
"""The first signal is seen before the second is sent: two of a kind that wait together are one."""
STUCK = ONE_SEEN + "    while True:\n        time.sleep(0.01)\n"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_leaves_at_once(second: int) -> None:
    code, errors = _signalled(STUCK, [signal.SIGTERM, second])
    assert code == 128 + second
    assert "send it again to leave at once" in errors
    assert "leaving at once" in errors


def test_the_launchers_echo_of_a_signal_is_no_second_one() -> None:
    code, errors = _signalled(ONE_SEEN + "    sys.stdin.read()\n", [2, 2], TORCHELASTIC_RUN_ID="x")
    assert "leaving at once" not in errors.splitlines()[-1]
    assert code == 1  # the hold ended by itself and raised SignalStop
    assert "SignalStop" in errors


# --- proof of learning


def _codes(proof: ProofOfLearning) -> list[str]:
    return [finding.code for finding in proof.findings]


def _train(proof: ProofOfLearning, *, move: list[str], grad_norm: float | None, steps: int = 10, rate: float = 0.1) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    proof.begin(model)
    for step in range(1, steps + 1):
        for name, parameter in model.named_parameters():
            if name in move:
                parameter.data[0] += 1e-7
        proof.end_step(step, model, learning_rate=rate, grad_norm=grad_norm)


ALL = ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_moving_weights_are_not_worth_a_word() -> None:
    proof = ProofOfLearning()
    _train(proof, move=ALL, grad_norm=1.0)
    assert _codes(proof) == []


def test_model_without_trainable_weights_is_stopped_at_once() -> None:
    with pytest.raises(GuardStop, match="no weight of the model is trainable"):
        ProofOfLearning().begin(torch.nn.Linear(2, 2).requires_grad_(False))


def test_zero_gradient_and_still_weights_stop_the_run() -> None:
    with pytest.raises(GuardStop, match=r"step 10: nothing learns: the gradient is zero; 4 of 4"):
        _train(ProofOfLearning(), move=[], grad_norm=0.0)


def test_zero_gradient_with_decay_is_told() -> None:
    proof = ProofOfLearning()
    _train(proof, move=ALL, grad_norm=0.0)
    assert _codes(proof) == ["zero_gradient"]


def test_still_weights_with_a_gradient_are_told(caplog: pytest.LogCaptureFixture) -> None:
    proof = ProofOfLearning()
    _train(proof, move=[], grad_norm=1.0)
    assert _codes(proof) == ["unmoved_weights"]
    assert "nothing has learned yet" in caplog.text


def test_the_tensors_that_stand_still_are_named() -> None:
    proof = ProofOfLearning()
    _train(proof, move=["0.weight", "1.bias"], grad_norm=1.0)
    assert "2 of 4 trainable tensors" in proof.findings[0].message
    assert "0.bias, 1.weight" in proof.findings[0].message


@pytest.mark.parametrize(("num_steps", "codes"), [(1, []), (2, []), (3, ["unmoved_weights"])])
def test_a_part_that_stands_still_is_told_only_after_steps_enough_for_factors_that_start_at_zero(num_steps: int, codes: list[str]) -> None:
    proof, model = ProofOfLearning(), torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    proof.begin(model)
    for step in range(1, num_steps + 1):
        model[0].weight.data[0] += 1e-7
        proof.end_step(step, model, learning_rate=0.1, grad_norm=1.0)
    proof.close_window(num_steps, model)
    assert _codes(proof) == codes


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4])
def test_a_short_run_of_an_adapter_is_no_cause_for_alarm(max_steps: int, tmp_path: Path) -> None:
    """B of LoRA starts at zero, so that A cannot move in the first step that has a rate."""
    from peft import LoraConfig

    from randomgroups import random_groups
    from trainerruns import make_trainer

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, random_groups(8), arguments={"peft_config": lora}, max_steps=max_steps, warmup_steps=1)
    trainer.train()
    assert [code for code in _codes(trainer.learning) if code == "unmoved_weights"] == []


def test_steps_at_a_rate_of_zero_do_not_count() -> None:
    proof = ProofOfLearning()
    _train(proof, move=[], grad_norm=0.0, rate=0.0, steps=9)
    assert _codes(proof) == []


@pytest.mark.parametrize("num_steps", [4, 30])
def test_a_rate_that_is_never_above_zero_is_told_once(num_steps: int) -> None:
    """By the end of the window, or at the end of a shorter run; one step at zero is a warm-up's beginning."""
    proof, model = ProofOfLearning(window_steps=10), torch.nn.Linear(2, 2)
    proof.begin(model)
    for step in range(1, num_steps + 1):
        proof.end_step(step, model, learning_rate=0.0, grad_norm=1.0)
    proof.close_window(num_steps, model)
    (finding,) = proof.findings
    assert (finding.code, finding.step) == ("zero_rate", min(num_steps, 10))
    assert "the learning rate was 0" in finding.message


def test_a_run_shorter_than_the_window_is_judged_at_its_end() -> None:
    proof = ProofOfLearning()
    model = torch.nn.Linear(2, 2)
    proof.begin(model)
    proof.end_step(1, model, learning_rate=1.0, grad_norm=0.0)
    with pytest.raises(GuardStop):
        proof.close_window(1, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_smallest_change_of_one_weight_is_seen(dtype: torch.dtype) -> None:
    from orpo.training.guards.learning import weight_checksums

    model = torch.nn.Linear(50, 50).to(dtype)
    before = weight_checksums(model)
    weight = model.weight.data.view(-1)
    weight[1234] = torch.nextafter(weight[1234].float(), torch.tensor(INF)).to(dtype) if dtype == torch.float32 else weight[1234] * 1.01
    after = weight_checksums(model)
    assert after["weight"] != before["weight"]
    assert after["bias"] == before["bias"]


@pytest.mark.parametrize(
    ("shares", "codes"),
    [
        ([1e-5, 1e-5, 1e-4], ["odds_ratio_negligible"]),
        ([1.0, 0.99999, 1.0], ["nll_negligible"]),
        ([0.1, 0.4, 0.6], []),
        ([1e-5, 1e-5], []),
        ([1e-5, 0.2, 1e-5], []),
    ],
)
def test_a_term_without_weight_in_the_gradient_is_told_where_there_are_two(shares: list[float], codes: list[str]) -> None:
    proof = ProofOfLearning()
    for step, share in enumerate(shares, start=1):
        proof.observe(step, {"grad_share/odds_ratio": share})
    assert _codes(proof) == codes
    other = ProofOfLearning(kind=KINDS["dpo"])  # DPO has no next-token loss, and is not told to weigh it more
    for step, share in enumerate(shares):
        other.observe(step, {"grad_share/odds_ratio": share})
    assert _codes(other) == []


def _observe(proof: ProofOfLearning, key: str, values: list[float]) -> list[str]:
    for step, value in enumerate(values, start=1):
        proof.observe(step, {key: value})
    return _codes(proof)


def test_collapse_of_the_chosen_answers_is_told_once() -> None:
    assert _observe(ProofOfLearning(), "logps/chosen", [-1.5] * 3 + [-4.0] * 20) == ["chosen_collapse"]


@pytest.mark.parametrize("values", [[-1.5] * 3 + [-1.8] * 30, [-1.5] * 3 + [-4.0, -1.4] * 2 + [-1.4] * 9, [-3.0, -2.0, -1.0, -0.5] * 3])
def test_noise_and_improvement_are_no_collapse(values: list[float]) -> None:
    assert _observe(ProofOfLearning(), "logps/chosen", values) == []


def test_drift_in_length_is_told() -> None:
    assert _observe(ProofOfLearning(), "answer_tokens", [100, 120, 90, 210]) == ["length_drift"]
    assert _observe(ProofOfLearning(), "answer_tokens", [100, 49]) == ["length_drift"]
    assert _observe(ProofOfLearning(), "answer_tokens", [100, 190, 55]) == []
    assert _observe(ProofOfLearning(), "logps/end", [-0.5] * 3 + [-6.0] * 10) == ["length_drift"]


def test_drift_that_a_callback_logs_is_told_by_the_run(tmp_path: Path) -> None:
    """As docs/reliability.md says: lengths are looked at where somebody generates answers and logs their mean."""
    from transformers import TrainerCallback

    from randomgroups import random_groups
    from trainerruns import make_trainer

    class Lengths(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer.log({"answer_tokens": 100.0 * state.global_step})

    trainer = make_trainer(tmp_path, random_groups(12), max_steps=3, arguments={"callbacks": [Lengths()]})
    trainer.train()
    assert [(finding.code, finding.step) for finding in trainer.learning.findings if finding.code == "length_drift"] == [
        ("length_drift", 3)
    ]


def test_the_trainer_gives_the_ends_of_chosen_answers_that_have_one() -> None:
    from orpo.engine.layout import collate
    from orpo.training.metrics import end_logps

    def ids(length: int) -> np.ndarray:
        return np.arange(3, 3 + length, dtype=np.int32)

    # Chosen and ended: 0 of the first row, 1 of the second; the third is cut, the fourth has no pair.
    rows = [
        TokenGroup(ids(4), (ids(3), ids(2)), ((0, 1),), (True, True), Where("a", 0)),
        TokenGroup(ids(2), (ids(5), ids(4), ids(1)), ((1, 0), (1, 2)), (True, True, False), Where("a", 1)),
        TokenGroup(ids(1), (ids(2), ids(2)), ((1, 0),), (True, False), Where("a", 2)),
        TokenGroup(ids(3), (ids(6),), (), (True,), Where("a", 3)),
    ]
    batch = collate(rows, "sequence")
    logp_N = -torch.arange(1.0, 1.0 + len(batch.index.response_N))
    ends = [int((batch.index.response_N == response).nonzero().max()) for response in (0, 3)]
    assert end_logps(batch, logp_N).tolist() == [float(logp_N[end]) for end in ends]


def test_collapse_is_found_across_a_resume() -> None:
    proof = ProofOfLearning()
    _observe(proof, "logps/chosen", [-1.5] * 5)
    resumed = ProofOfLearning()
    resumed.load_state_dict(proof.state_dict())
    assert _observe(resumed, "logps/chosen", [-4.0] * 10) == ["chosen_collapse"]


# --- divergence (a loss that leaves what a language model can have)

VOCABULARY = 1000
GUESS = math.log(VOCABULARY)


def _losses(guard: DivergenceGuard, losses: Sequence[float | None], *, is_ended: bool = False, first: int = 1) -> None:
    for step, loss in enumerate(losses, start=first):
        guard.end_step(step, loss, is_last=is_ended and step == first + len(losses) - 1)


def _guard() -> DivergenceGuard:
    return DivergenceGuard(VOCABULARY, learning_rate=5.0)


@pytest.mark.parametrize("start", [0.3, 2.0, GUESS, 20.0])
@pytest.mark.parametrize("num_sound", [1, 2, 10])
def test_a_loss_that_stays_far_above_is_told_and_then_stops(start: float, num_sound: int, caplog: pytest.LogCaptureFixture) -> None:
    guard, above = _guard(), max(2 * start, GUESS) * 1.01
    _losses(guard, [start] * num_sound + [above] * 2)
    assert caplog.text == ""
    _losses(guard, [above], first=num_sound + 3)
    assert f"step {num_sound + 3}: the next-token loss is" in caplog.text
    with pytest.raises(GuardStop, match=rf"(?s)step {num_sound + NUM_STOPPED}: .*before step {num_sound} are sound") as caught:
        _losses(guard, [above] * 100, first=num_sound + 4)
    assert caught.value.exit_code == 3
    assert "learning_rate (it is 5)" in str(caught.value)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 5 + [500.0] * 2 + [2.0] * 5,  # a spike
        ([2.0] * 3 + [GUESS * 3] * 2) * 20,  # many of them
        [2.0] * 3 + [GUESS * 0.99] * 200,  # far above the start: a collapse perhaps, but another guard's
        [GUESS * 1.05] * 3 + [GUESS * 1.9] * 50,  # a model from scratch that finds it hard
        [60.0] * 10 + [100.0] * 50,  # weights that were drawn too large
        [0.01] * 3 + [5.0] * 50,  # rows that were known by heart, then others
        [2.0, None, None, math.nan, 2.0],  # steps with nothing to learn from
        [None] * 40,
    ],
)
def test_spikes_scratch_and_hard_rows_are_no_divergence(losses: list[float | None], caplog: pytest.LogCaptureFixture) -> None:
    _losses(_guard(), losses, is_ended=True)
    assert caplog.text == ""


def test_a_run_that_ends_above_is_not_done() -> None:
    with pytest.raises(GuardStop, match="none were saved as the run's outcome"):
        _losses(_guard(), [2.0, 800.0, 900.0, 800.0], is_ended=True)
    _losses(_guard(), [2.0, 800.0, 900.0, 2.0], is_ended=True)


def test_divergence_is_counted_across_a_resume() -> None:
    guard, resumed = _guard(), _guard()
    _losses(guard, [2.0] * 4 + [50.0] * 20)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(GuardStop, match=f"step {4 + NUM_STOPPED}"):
        _losses(resumed, [50.0] * 10, first=25)


class _TwoRanks(Ranks):
    """One of two ranks whose other has a loss of 3 nats per token."""

    def max(self, values: Sequence[int]) -> list[int]:
        return [max(values[0], -3_000_000)]


def test_one_rank_alone_does_not_stop_the_run() -> None:
    guard = DivergenceGuard(VOCABULARY, learning_rate=1.0, ranks=_TwoRanks(0, 2))
    _losses(guard, [2.0] * 3 + [500.0] * 60, is_ended=True)


@pytest.mark.parametrize(("rate", "max_steps", "step"), [(5.0, 40, None), (5.0, 9, 9), (5e-3, 40, 0)])
def test_a_real_run_at_a_rate_that_destroys_it_stops(rate: float, max_steps: int, step: int | None, tmp_path: Path) -> None:
    """A rate that a tiny model trained from scratch stands is left alone; a short run stops at its end."""
    from randomgroups import random_groups
    from trainerruns import make_trainer

    trainer = make_trainer(tmp_path, random_groups(16), max_steps=max_steps, learning_rate=rate, logging_steps=5)
    if step == 0:
        trainer.train()
        return
    with pytest.raises(GuardStop, match="The weights are destroyed" if step is None else f"step {step}: .*destroyed"):
        trainer.train()
    assert NUM_STOPPED <= trainer.state.global_step <= NUM_STOPPED + 5 or trainer.state.global_step == step
