"""What all tests share: no network, seeds as a dial, real models and data where there are some."""

from __future__ import annotations

import itertools
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from hypothesis import settings

# Before any test imports one of these libraries.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
)

# The same examples in every run, unless a seed asks for others; no deadline, since machines may be loaded.
settings.register_profile("smartinit", deadline=None, derandomize="SMARTINIT_TEST_SEED" not in os.environ)
settings.load_profile("smartinit")

ROOT = Path(__file__).parents[1]

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import LlamaForCausalLM

    class TinyLlama(Protocol):
        """Makes a Llama with random weights; keywords go to its LlamaConfig."""

        def __call__(
            self, *, seed: int = ..., dtype: torch.dtype | None = ..., **config: object
        ) -> LlamaForCausalLM: ...


@pytest.fixture(scope="session", autouse=True)
def _one_thread_per_worker() -> None:
    """Under xdist the workers share the cores: threads within torch would only wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the stores of all tests lie; a fixture of wider scope than a test uses one there that is its own."""
    folder = tmp_path_factory.mktemp("stores")
    before = os.environ.get("SMARTINIT_CACHE")
    os.environ["SMARTINIT_CACHE"] = str(folder / "of-the-session")
    yield folder
    if before is None:
        del os.environ["SMARTINIT_CACHE"]
    else:
        os.environ["SMARTINIT_CACHE"] = before


@pytest.fixture(autouse=True)
def _own_store(_stores: Path) -> Iterator[None]:
    """Every test has its own default store, so that none finds what another one has computed."""
    of_the_session = os.environ["SMARTINIT_CACHE"]
    os.environ["SMARTINIT_CACHE"] = str(_stores / str(next(_numbers)))  # made when something is put in
    yield
    os.environ["SMARTINIT_CACHE"] = of_the_session


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of everything random in a test; tests must pass for any."""
    return int(os.environ.get("SMARTINIT_TEST_SEED", "0"))


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; the test is skipped where there is none."""
    folder = Path(os.environ.get("SMARTINIT_ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"no real models and data at {folder}; name their folder in SMARTINIT_ASSETS")
    return folder


@pytest.fixture(scope="session")
def demo_model_folder() -> Path:
    """The embedded model; it is part of the package, so its absence is a failure."""
    folder = Path(str(resources.files("smartinit.demo"))) / "model"
    assert (folder / "config.json").is_file(), f"the package has no demo model at {folder}"
    return folder


@pytest.fixture(scope="session")
def tiny_llama(seed: int) -> TinyLlama:
    """Factory of Llamas with random weights: two layers of width 32 unless told otherwise, in eval mode."""

    def make(*, seed: int = seed, dtype: torch.dtype | None = None, **config: object) -> LlamaForCausalLM:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
        return model.to(dtype or torch.float32).eval()

    return make
