"""Adapters beside Megatron-Core's own layers, on CPU and gloo, as far as megatron-core itself runs there.

Its rank processes are of this file only: megatron-core keeps its process groups in module globals.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import queue
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron import DoRA, LoRA
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="megatron-core is not installed; it has wheels for Linux on x86_64 and aarch64",
)

IN, OUT, RANK, TOKENS = 16, 24, 8, 12
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


@pytest.fixture(scope="module")
def core_ranks() -> Iterator[Ranks]:
    """Two processes with megatron-core in them."""
    from ranks import Ranks

    ranks = Ranks(2, keep_groups=True)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four_core_ranks() -> Iterator[Ranks]:
    """Four of them."""
    from ranks import Ranks

    ranks = Ranks(4, keep_groups=True)
    yield ranks
    ranks.stop()


def core(tensor: int, **sizes: int) -> Any:
    """megatron-core's parallel_state, with groups of these sizes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Apex and Transformer Engine are not there
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401
    # The only two things replaced: where tensors are made, and whose random numbers dropout draws (there is none).
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    tensor_parallel.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # its writers are processes
    sizes = {"tensor_model_parallel_size": tensor, **sizes}
    if getattr(core, "sizes", None) != sizes:
        from ranks import end_groups

        parallel_state.destroy_model_parallel()  # forgets its groups, but does not end them
        end_groups()
        parallel_state.initialize_model_parallel(**sizes)
        core.sizes = sizes  # type: ignore[attr-defined]
    return parallel_state


def config_of(tensor: int, **options: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    values: dict[str, Any] = dict(num_layers=2, hidden_size=IN, num_attention_heads=4, num_query_groups=2)
    values |= dict(ffn_hidden_size=OUT, gated_linear_unit=True, activation_func=torch.nn.functional.silu)
    values |= dict(add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True)
    values |= dict(masked_softmax_fusion=False, bias_dropout_fusion=False, gradient_accumulation_fusion=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(tensor_model_parallel_size=tensor, **{**values, **options})


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers() -> dict[str, torch.Tensor]:
    shapes = dict(w=(OUT, IN), a=(RANK, IN), b=(OUT, RANK), x=(TOKENS, 2, IN), dy=(TOKENS, 2, OUT))
    return {name: numbers(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def dense() -> dict[str, torch.Tensor]:
    """``W x + s·B A x`` and its gradients on one process, in float64."""
    t = {name: value.double() for name, value in whole_numbers().items()}
    for name in "abx":
        t[name].requires_grad_()
    y = t["x"] @ t["w"].T + (32 / RANK) * (t["x"] @ t["a"].T @ t["b"].T)
    y.backward(t["dy"])
    return {"y": y.detach(), **{f"d{name}": t[name].grad for name in "xab"}}


def gathered(t: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    if size == 1:
        return t
    parts = [torch.empty_like(t) for _ in range(size)]
    dist.all_gather(parts, t.contiguous())
    return join_rows(parts, dim=dim)


CASES = [("column", dict()), ("column", dict(gather_output=True)), ("column", dict(sequence_parallel=True))]
CASES += [("row", dict()), ("row", dict(input_is_parallel=False)), ("row", dict(sequence_parallel=True))]
CASES += [("row", dict(sequence_parallel=True, a2a=True))]
CASES += [("column", dict(runtime=True)), ("column", dict(gather_output=True, runtime=False))]
CASES += [
    ("column", dict(disable_grad_reduce=True)),
    ("column", dict(disable_grad_reduce=True, sequence_parallel=True)),
]


def base_layer(kind: str, size: int, options: dict[str, Any]) -> Any:
    """Megatron-Core's layer with this rank's shard of W."""
    from megatron.core import tensor_parallel

    options = {name: value for name, value in options.items() if name != "runtime"}
    config = config_of(size, sequence_parallel=options.pop("sequence_parallel", False) and size > 1)
    same: dict[str, Any] = dict(config=config, init_method=torch.nn.init.normal_, bias=False, skip_bias_add=False)
    if kind == "column":
        layer = tensor_parallel.ColumnParallelLinear(IN, OUT, **same, **{"gather_output": False, **options})
    else:
        layer = tensor_parallel.RowParallelLinear(IN, OUT, **same, **{"input_is_parallel": True, **options})
    rank = dist.get_rank() if size > 1 else 0
    layer.weight.data.copy_(shard_rows(whole_numbers()["w"], rank, size, dim=int(kind == "row")))
    return layer


def gathers(options: dict[str, Any]) -> bool:
    """Whether a column-parallel layer is to gather its output."""
    return bool(options.get("runtime", options.get("gather_output", False)))


def inputs(kind: str, size: int, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of x, and of the gradient of the output."""
    rank = dist.get_rank() if size > 1 else 0
    t = whole_numbers()
    by_tokens = options.get("sequence_parallel", False)

    def cut(t: torch.Tensor, dim: int) -> torch.Tensor:
        return shard_rows(t, rank, size, dim=dim)

    if kind == "column":
        x = cut(t["x"], 0) if by_tokens else t["x"]
        dy = t["dy"] if gathers(options) else cut(t["dy"], 2)
    else:
        x = t["x"] if options.get("input_is_parallel") is False else cut(t["x"], 2)
        dy = cut(t["dy"], 0) if by_tokens else t["dy"]
    return x.clone().requires_grad_(), dy


def whole_results(
    kind: str, size: int, options: dict[str, Any], y: torch.Tensor, x: torch.Tensor, a: Any, b: Any
) -> dict[str, torch.Tensor]:
    by_tokens = options.get("sequence_parallel", False)
    if kind == "column":
        y = y if gathers(options) else gathered(y, 2, size)
        dx = gathered(x.grad, 0, size) if by_tokens else x.grad
        if options.get("disable_grad_reduce") and not by_tokens and size > 1:
            dist.all_reduce(dx)
    else:
        y = gathered(y, 0, size) if by_tokens else y
        dx = x.grad if options.get("input_is_parallel") is False else gathered(x.grad, 2, size)
    da = gathered(a.grad, 0 if kind == "column" else 1, size)
    return {"y": y, "dx": dx, "da": da, "db": gathered(b.grad, 0, size)}


def ours(kind: str, size: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    core(size)
    options = dict(options)
    lora = LoRA(["linear_fc9"], dim=RANK, a2a_experimental=options.pop("a2a", False))
    layer: Any = lora(torch.nn.ModuleDict({"linear_fc9": base_layer(kind, size, options)}))["linear_fc9"]
    t = whole_numbers()
    layer.adapter.set_whole(t["a"], t["b"])
    x, dy = inputs(kind, size, options)
    y, bias = layer(x, **({"runtime_gather_output": options["runtime"]} if "runtime" in options else {}))
    assert bias is None
    y.backward(dy)
    a, b = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight
    return whole_results(kind, size, options, y.detach(), x, a, b)


def reference(kind: str, size: int, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The adapter as Megatron Bridge's documentation describes it, made of Megatron-Core's own layers."""
    from megatron.core import tensor_parallel as tp

    core(size)
    options = {name: value for name, value in options.items() if name != "a2a"}
    layer = base_layer(kind, size, options)
    layer.weight.requires_grad_(False)
    by_tokens = options.get("sequence_parallel", False) and size > 1
    same: dict[str, Any] = dict(config=config_of(size), init_method=torch.nn.init.normal_, bias=False)
    if kind == "column":
        linear_in = tp.ColumnParallelLinear(IN, RANK, gather_output=True, **same)
        linear_out = tp.ColumnParallelLinear(RANK, OUT, gather_output=gathers(options), **same)
    else:
        whole = options.get("input_is_parallel") is False
        linear_in = tp.RowParallelLinear(IN, RANK, input_is_parallel=not whole, skip_bias_add=True, **same)
        linear_out = tp.ColumnParallelLinear(RANK, OUT, gather_output=True, **same)
    rank, t = dist.get_rank() if size > 1 else 0, whole_numbers()
    linear_in.weight.data.copy_(shard_rows(t["a"], rank, size, dim=int(kind == "row")))
    linear_out.weight.data.copy_(shard_rows(t["b"], rank, size))
    x, dy = inputs(kind, size, options)
    y, _ = layer(x, **({"runtime_gather_output": options["runtime"]} if "runtime" in options else {}))
    rows = x
    if by_tokens and kind == "column":  # the layers of the adapter sum up the gradient themselves
        rows = tp.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
    update, _ = linear_out(linear_in(rows)[0])
    if by_tokens and kind == "row":
        update = tp.scatter_to_sequence_parallel_region(update)
    y = y + (32 / RANK) * update
    y.backward(dy)
    return whole_results(kind, size, options, y.detach(), x, linear_in.weight, linear_out.weight)


def both(kind: str, options: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Ours on one and two ranks, and the reference on two (whose layers add up what the base leaves as addends)."""
    found = [ours(kind, 1, options), ours(kind, 2, options)]
    return found if options.get("disable_grad_reduce") else [*found, reference(kind, 2, options)]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_adapters_beside_its_layers_compute_what_one_process_does(
    core_ranks: Ranks, kind: str, options: dict[str, Any]
) -> None:
    expected = dense()
    for found in core_ranks.run(both, kind, options):
        for which, values in zip(("1 rank", "2 ranks", "its own layers"), found, strict=False):
            for name, value in values.items():
                torch.testing.assert_close(
                    value.double(),
                    expected[name],
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda m, n=name, w=which: f"{w}, {n}: {m}",
                )


def gpt(tensor: int, lora: LoRA | None, **options: Any) -> Any:
    """A two-layer decoder of Megatron-Core's, adapted; the same numbers however many ranks there are."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    torch.manual_seed(1)
    config = config_of(tensor, **options)
    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPTModel(config, spec, vocab_size=32, max_sequence_length=8, position_embedding_type="rope")
    if lora is None:
        return model
    torch.manual_seed(2)
    return lora(model)


def loss_of(model: Any, step: int = 0) -> torch.Tensor:
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
    mask = torch.ones(8, 8, dtype=torch.bool).triu(1)[None, None]
    loss: torch.Tensor = model(ids, torch.arange(8).expand(2, 8), mask, labels=ids.roll(1, 1)).mean()
    return loss


def adapter_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of whole factors, by the name in the whole model."""
    out = {}
    for place, layer in adapted_layers(model):
        for side in ("in", "out"):
            grad = getattr(layer.adapter, f"linear_{side}").weight.grad
            out[f"{place.whole_name}.{side}"] = layer.adapter.joined(grad, side)
    return out


def train(tensor: int, options: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor], list[str]]:
    """Losses of a few steps, the first gradients, and the keys of the state dict."""
    core(tensor)
    model = gpt(tensor, LoRA(TARGETS, dim=RANK, lora_B_init_method="normal"), **options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses, first = [], {}
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        losses.append(float(loss))
        first = first or adapter_gradients(model)
        optimizer.step()
    return losses, first, sorted(model.state_dict())


def trainings(options: dict[str, Any]) -> Any:
    return [train(1, options), train(2, options)]


def test_a_whole_model_trains_alike_on_one_rank_and_on_two(core_ranks: Ranks) -> None:
    for one, two in core_ranks.run(trainings, {}):
        torch.testing.assert_close(two[0], one[0], rtol=1e-5, atol=1e-5)
        assert one[0][-1] != one[0][0]
        assert two[1].keys() == one[1].keys()
        assert len(one[1]) == 2 * 4 * 2
        for name, gradient in one[1].items():
            torch.testing.assert_close(two[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_keys_are_those_that_megatron_bridge_reads(core_ranks: Ranks) -> None:
    layers = [
        f"decoder.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    ]
    added = {f"{layer}.adapter.{side}.weight" for layer in layers for side in ("linear_in", "linear_out")}
    for base, adapted in core_ranks.run(keys):
        assert adapted - base == added
        assert base <= adapted


def keys() -> tuple[set[str], set[str]]:
    core(2)
    return set(gpt(2, None).state_dict()), set(gpt(2, LoRA(TARGETS, dim=RANK)).state_dict())


def set_random(model: Any) -> None:
    for place, layer in adapted_layers(model):
        generator = torch.Generator().manual_seed(sum(map(ord, place.whole_name)))
        layer.adapter.set_whole(*(torch.randn(shape, generator=generator) for shape in layer.adapter.whole_shapes()))


def adapted_gpt(kind: str, tensor: int) -> Any:
    core(tensor)
    peft = DoRA(TARGETS, dim=RANK) if kind == "dora" else LoRA(TARGETS, dim=RANK)
    model = gpt(tensor, peft, num_query_groups=4)
    set_random(model)
    return model


def save_distributed(folder: str, kind: str, tensor: int) -> list[str]:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    model = adapted_gpt(kind, tensor)
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    filesystem_async._results_queue = queue.Queue()  # its own is another process, which would outlive this one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = model.sharded_state_dict()
        dist_checkpointing.save(state, folder)
    return sorted(state)


def load_distributed(folder: str, kind: str, tensor: int) -> list[str]:
    """The keys that were compared, all bitwise equal."""
    from megatron.core import dist_checkpointing

    model = adapted_gpt(kind, tensor)
    expected = {key: t.clone() for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    for parameter in model.parameters():
        parameter.data.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
    found = model.state_dict()
    for key, tensor_ in expected.items():
        assert torch.equal(found[key], tensor_), key
    return sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_its_distributed_checkpoints_load_at_another_number_of_ranks(
    four_core_ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "saved").mkdir()
    saved = four_core_ranks.run(save_distributed, str(tmp_path / "saved"), kind, 2)
    adapters = 2 * 4 * (3 if kind == "dora" else 2)
    assert sum(".adapter." in key for key in saved[0]) == adapters
    for tensor in (1, 2, 4):
        for loaded in four_core_ranks.run(load_distributed, str(tmp_path / "saved"), kind, tensor):
            assert sum(".adapter." in key for key in loaded) == adapters


def test_the_package_imports_neither_megatron_nor_transformer_engine() -> None:
    code = (
        "import sys, torch\n"
        "from smartinit.megatron import LoRA\n"
        "from smartinit.megatron.stand_ins import ColumnParallelLinear\n"
        "model = LoRA(['linear_fc1'], dim=2)(torch.nn.ModuleDict({'linear_fc1': ColumnParallelLinear(4, 4)}))\n"
        "model['linear_fc1'](torch.ones(2, 4))[0].sum().backward()\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('megatron', 'transformer_engine')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout.strip() == "[]"


def recompute(options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """First gradients without and with recompute, and with it but without the input that requires gradients."""
    core(1)
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)  # there is none to put back
    random._set_cuda_rng_state = lambda *_, **__: None
    lora = LoRA(TARGETS, dim=RANK, lora_B_init_method="normal")
    found = []
    for more in ({}, options, options):
        model = gpt(1, lora, **more)
        lora(model)  # a second time adds nothing
        assert len(model.decoder._forward_pre_hooks) == bool(more)
        if len(found) == 2:
            model.decoder._forward_pre_hooks.clear()
        loss = loss_of(model)
        if loss.requires_grad:
            loss.backward()
        grads = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        found.append({name: grad for name, grad in grads if grad is not None})
    return tuple(found)


def test_adapters_train_under_its_recompute(core_ranks: Ranks) -> None:
    options = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    for plain, recomputed, without in core_ranks.run(recompute, options):
        assert len(plain) == 16
        assert not without  # what is avoided
        assert recomputed.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-7)


def wrapped() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of two data-parallel ranks with other batches: averaged by hand, and by Megatron's wrapper."""
    core(1)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    plain = gpt(1, LoRA(TARGETS, dim=RANK, lora_B_init_method="normal"))
    loss_of(plain, dist.get_rank()).backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    for gradient in expected.values():
        dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
        gradient.div_(dist.get_world_size())
    model = gpt(1, LoRA(TARGETS, dim=RANK, lora_B_init_method="normal"))
    options = DistributedDataParallelConfig(overlap_grad_reduce=False, use_distributed_optimizer=False)
    parallel = DistributedDataParallel(model.config, options, model)
    loss_of(parallel, dist.get_rank()).backward()
    parallel.finish_grad_sync()
    return expected, {name: p.main_grad for name, p in model.named_parameters() if p.requires_grad}


def test_its_data_parallel_wrapper_averages_the_gradients(core_ranks: Ranks) -> None:
    for expected, found in core_ranks.run(wrapped):
        assert len(found) == 16
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def experts_of(tensor: int, expert: int, shared: bool) -> Any:
    """Four gated experts of Megatron-Core's (its router does not run without Transformer Engine), adapted."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.experts import SequentialMLP

    core(tensor, expert_tensor_parallel_size=tensor, expert_model_parallel_size=expert)
    config = config_of(tensor, num_moe_experts=4, expert_model_parallel_size=expert, moe_ffn_hidden_size=OUT)
    spec = get_moe_module_spec(use_te=False, num_experts=4, moe_grouped_gemm=False).submodules.experts
    local = 4 // expert
    experts = SequentialMLP(
        local, config, spec.submodules, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"experts": experts})})
    model = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, share_expert_adapters=shared)(model)
    for place, layer in adapted_layers(model):
        name = place.experts_name if shared else place.whole_name
        generator = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(name)))
        layer.adapter.set_whole(*(torch.randn(shape, generator=generator) for shape in layer.adapter.whole_shapes()))
        row = place.attribute == "linear_fc2"
        whole = numbers(*((IN, OUT) if row else (2 * OUT, IN)), seed=place.first_expert + 10 * row)
        rank, size = layer.base.rank, layer.base.size
        layer.to_wrap.weight.data.copy_(shard_rows(whole, rank, size, gated=not row, dim=int(row)))
    return model["mlp"]["experts"]


def expert_outputs(shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """On one rank, and the sum over two expert-tensor-parallel ranks: what a token dispatcher makes of it."""
    out = []
    for tensor in (1, 2):
        experts = experts_of(tensor, 1, shared)
        y, _ = experts(numbers(10, IN, seed=3), torch.tensor([3, 0, 5, 2]), numbers(10, seed=4))
        y = y.detach()
        if tensor == 2:
            dist.all_reduce(y)
        out.append(y)
    return out[0], out[1]


@pytest.mark.parametrize("shared", [True, False])
def test_its_experts_in_tensor_parallel_shards_compute_what_whole_ones_do(core_ranks: Ranks, shared: bool) -> None:
    for whole, shards in core_ranks.run(expert_outputs, shared):
        torch.testing.assert_close(shards, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


def expert_checkpoints(folder: str, shared: bool) -> int:
    """Saved by two expert-parallel ranks, loaded by one and by two tensor-parallel ones."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    filesystem_async._results_queue = queue.Queue()
    compared = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(experts_of(1, 2, shared).sharded_state_dict(), folder)
        for sizes in ((1, 1), (2, 1), (1, 2)):
            model = experts_of(*sizes, shared)
            expected = {key: t.clone() for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
            for parameter in model.parameters():
                parameter.data.zero_()
            model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))
            for key, t in model.state_dict().items():
                assert not isinstance(t, torch.Tensor) or torch.equal(t, expected[key]), key
                compared += ".adapter." in key
    return compared


@pytest.mark.parametrize("shared", [True, False])
def test_its_experts_checkpoints_load_at_other_numbers_of_ranks(
    core_ranks: Ranks, tmp_path: Path, shared: bool
) -> None:
    assert core_ranks.run(expert_checkpoints, str(tmp_path), shared) == [4 * 4 * 2 + 2 * 4] * 2
