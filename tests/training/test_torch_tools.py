"""torch's own tools on our models: compilation, export, copies, state dicts, autocast, several processes."""

from __future__ import annotations

import copy
import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import smartinit as si

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEED = int(os.environ.get("SMARTINIT_TEST_SEED", "0"))
OPTIONS = [{}, {"use_rslora": True, "lora_bias": True}, {"use_dora": True}]
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=["lora", "rslora and bias", "dora"])


def perceptron(dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(SEED)
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model.to(dtype)


def adapted(dtype: torch.dtype = torch.float32, **options: object) -> si.LoraModel:
    """Every matrix random, so that the adapter does something."""
    torch.manual_seed(SEED)
    config = si.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False, **options)
    return si.LoraModel(perceptron(dtype), config)


def rows(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(SEED + 1))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def compiles_whole(backend: str, options: dict[str, object]) -> None:
    """Outputs and gradients of the compiled model are those of the same model without compilation."""
    model, twin = adapted(**options), adapted(**options)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    output, wanted = compiled(rows()), model(rows())
    torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    output.square().mean().backward()
    wanted.square().mean().backward()
    assert gradients(model)
    assert_equal(gradients(twin), gradients(model), rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@EACH_OPTION
def test_compiled_without_a_graph_break(backend, options):
    compiles_whole(backend, options)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_compiled_to_machine_code():
    compiles_whole("inductor", {})


@pytest.mark.parametrize("base", ["residual", "offset"])
def test_a_split_start_compiles_whole(base):
    artefact = si.compute(perceptron(), _config("pissa"), show_progress_bar=False)
    model = artefact.apply(si.LoraModel(perceptron(), _config(True)), base=base)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows()), perceptron()(rows()), rtol=1e-5, atol=1e-5)


def test_training_steps_do_not_compile_again():
    """Weights that change their values and batches of one size: one compilation serves all steps."""
    seen = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        seen.append(graph)
        return graph.forward

    model = adapted()
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        compiled(rows()).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    assert len(seen) == 1


def test_the_merged_model_can_be_exported():
    model = adapted()
    wanted = model(rows()).detach()
    merged = model.merge_and_unload().eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(merged, (rows(),), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(rows()), wanted, rtol=1e-5, atol=1e-5)
    assert program.module()(rows(9)).shape == (9, 5)
    assert not [name for name, _ in program.named_parameters() if "lora" in name]


def test_the_model_with_its_adapter_can_be_exported():
    model = adapted().eval()
    program = torch.export.export(model, (rows(),))
    torch.testing.assert_close(program.module()(rows()), model(rows()), rtol=1e-5, atol=1e-5)


@EACH_OPTION
def test_a_deep_copy_is_another_model(options):
    model = adapted(**options)
    wanted = model(rows()).detach()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(rows()), wanted, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert not torch.allclose(twin(rows()), wanted)
    torch.testing.assert_close(model(rows()), wanted, rtol=0, atol=0)
    twin.add_adapter("second", _config(True))
    assert list(model.peft_config) == ["default"]
    assert twin.unload() is not model.model


@EACH_OPTION
def test_a_state_dict_goes_into_a_fresh_model(options):
    model = adapted(**options)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(SEED + 5)
    fresh = si.LoraModel(
        nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5)),
        si.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **options),
    )
    assert not torch.allclose(fresh(rows()), model(rows()))
    assert not any(fresh.load_state_dict(state, strict=True))
    torch.testing.assert_close(fresh(rows()), model(rows()), rtol=0, atol=0)


@EACH_OPTION
def test_the_state_dict_has_pefts_keys(options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **options)
    wanted = peft.get_peft_model(perceptron(), config).state_dict()
    found = adapted(**options).state_dict()
    assert {f"base_model.{name}": value.shape for name, value in found.items()} == {
        name: value.shape for name, value in wanted.items()
    }


@EACH_OPTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 base", "bfloat16 base"])
def test_autocast_computes_what_peft_does(options, dtype):
    peft = pytest.importorskip("peft")
    ours = adapted(dtype, **options)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **options)
    theirs = peft.get_peft_model(perceptron(dtype), config)
    theirs.base_model.load_state_dict(ours.state_dict())
    outputs = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs.append(model(rows().to(dtype)))
        outputs[-1].float().square().mean().backward()
    assert outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2**-7, atol=2**-7)
    found = gradients(ours)
    wanted = {name.removeprefix("base_model."): value for name, value in gradients(theirs).items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype == torch.float32
        assert (found[name] - value).norm() <= 2**-6 * value.norm()


@EACH_OPTION
def test_accumulated_gradients_are_those_of_the_whole_batch(options):
    whole, parts = adapted(**options), adapted(**options)
    whole(rows(8)).square().mean().backward()
    for part in rows(8).chunk(4):
        (parts(part).square().mean() / 4).backward()
    assert_equal(gradients(parts), gradients(whole))


def test_only_adapters_are_trained():
    model = adapted()
    before = {name: value.clone() for name, value in perceptron().state_dict().items()}
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    assert sum(p.numel() for p in optimiser.param_groups[0]["params"]) == 3 * (12 + 24 + 24 + 16)
    for _ in range(3):
        model(rows()).square().mean().backward()
        optimiser.step()
    base = model.unload()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


_RANK = """
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(sys.argv[1]).parent))
from test_torch_tools import adapted, gradients, rows

rank, port, folder = int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = adapted()
if rank:  # the first process's weights are the ones that count
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
parallel = DistributedDataParallel(model)
parallel(rows(8).chunk(2)[rank]).square().mean().backward()
from safetensors.torch import save_file

save_file(gradients(model), folder / f"{rank}.safetensors")
torch.distributed.destroy_process_group()
"""


def test_two_processes_get_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = [
        subprocess.Popen([sys.executable, "-c", _RANK, __file__, str(rank), str(port), str(tmp_path)])
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    model = adapted()
    model(rows(8)).square().mean().backward()
    for rank in range(2):
        assert_equal(load_file(tmp_path / f"{rank}.safetensors"), gradients(model))


def _config(method: str | bool) -> si.LoraConfig:
    return si.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=method)
