"""How `smartinit.megatron.LoRA` may be called, and what the model is afterwards."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import ConfigError, ModelError, TargetError
from smartinit.megatron import LoRA, LoRAMerge
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from ranks import Ranks

WIDTH, DIM = 8, 2


class Layer(nn.Module):
    """As one of Megatron's transformer layers is named; ``layer_number`` counts from one, over all chunks."""

    def __init__(self, number: int, tp_group: Any = None) -> None:
        super().__init__()
        self.layer_number = number
        make = {"generator": torch.Generator().manual_seed(number), "tp_group": tp_group}
        self.self_attention = nn.ModuleDict(
            {
                "linear_qkv": ColumnParallelLinear(WIDTH, 12, **make),
                "linear_proj": RowParallelLinear(12, WIDTH, **make),
            }
        )
        self.mlp = nn.ModuleDict(
            {"linear_fc1": ColumnParallelLinear(WIDTH, 16, **make), "linear_fc2": RowParallelLinear(16, WIDTH, **make)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention["linear_proj"](torch.tanh(self.self_attention["linear_qkv"](x)[0]))[0]
        return x + self.mlp["linear_fc2"](torch.tanh(self.mlp["linear_fc1"](x)[0]))[0]


class Model(nn.Module):
    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(number) for number in numbers)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.decoder.layers:
            x = layer(x)
        return self.norm(x)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def adapters(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NAMES = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
PATHS = [f"decoder.layers.{{}}.{part}" for part in ("self_attention.linear_qkv", "self_attention.linear_proj")]
PATHS += [f"decoder.layers.{{}}.mlp.{name}" for name in NAMES[2:]]


def test_a_module_with_all_defaults() -> None:
    model = Model(1, 2)
    x = numbers(3, WIDTH)
    before = model(x)
    lora = LoRA()
    assert lora(model) is model
    assert adapters(model) == [path.format(i) for i in range(2) for path in PATHS]
    assert all(".adapter." in name for name in trained(model))
    assert len(trained(model)) == 16
    assert model.training
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    adapter = model.decoder.layers[0].mlp["linear_fc1"].adapter
    assert adapter.linear_in.weight.shape == (32, WIDTH)
    assert adapter.scaling == 1
    assert not adapter.linear_out.weight.any()


@pytest.mark.parametrize("wrap", [Wrapper, lambda m: Wrapper(Wrapper(m))])
def test_wrappers_stay(wrap: Callable[[nn.Module], nn.Module]) -> None:
    inner = Model(1)
    wrapped = wrap(inner)
    assert LoRA(dim=DIM)(wrapped) is wrapped
    assert len(adapters(inner)) == 4


def test_chunks_stay_a_list_and_have_other_numbers() -> None:
    """Two chunks, each with its layer 0: the whole names, and with them the starts, are those of the whole model."""
    chunks = [Wrapper(Model(1)), Model(2)]
    torch.manual_seed(3)
    found = LoRA(dim=DIM)(chunks)
    assert isinstance(found, list)
    assert found[0] is chunks[0]
    assert found[1] is chunks[1]
    torch.manual_seed(3)
    whole = LoRA(dim=DIM)(Model(1, 2))
    for i, chunk in enumerate((chunks[0].module, chunks[1])):
        for path in PATHS:
            own = chunk.get_submodule(path.format(0)).adapter.linear_in.weight
            torch.testing.assert_close(
                own, whole.get_submodule(path.format(i)).adapter.linear_in.weight, rtol=0, atol=0
            )


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, lambda m: [m], lambda m: [Wrapper(m)]])
def test_a_root_that_is_a_target_is_replaced(wrap: Callable[[Any], Any]) -> None:
    layer = nn.Linear(3, 4)
    found = LoRA(target_modules=[], dim=DIM)(wrap(layer))
    found = found[0] if isinstance(found, list) else found
    inner = found.module if isinstance(found, Wrapper) else found
    assert isinstance(inner, AdaptedLayer)
    assert inner.to_wrap is layer
    assert trained(inner) == ["adapter.linear_in.weight", "adapter.linear_out.weight"]


def test_without_training_nothing_is_trained() -> None:
    model = LoRA(dim=DIM)(Model(1), training=False)
    assert not trained(model)
    assert not any(module.training for module in model.modules())


def test_twice_keeps_the_first_adapters_trainable_and_as_they_are() -> None:
    lora = LoRA(dim=DIM)
    model = lora(Model(1))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    names = trained(model)
    lora(model)
    assert trained(model) == names
    assert len(names) == 8
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    model.decoder.layers[0].mlp["linear_fc1"].adapter.linear_in.weight.requires_grad_(False)
    lora(model)
    assert len(trained(model)) == 7, "what was frozen by hand stays frozen"


def test_two_objects_with_different_targets_add_up() -> None:
    model = LoRA(["linear_qkv"], dim=DIM)(Model(1))
    model = LoRA(["linear_fc1"], dim=4)(model)
    layer = model.decoder.layers[0]
    assert layer.self_attention["linear_qkv"].adapter.dim == DIM
    assert layer.mlp["linear_fc1"].adapter.dim == 4
    assert len(trained(model)) == 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["linear_fc1"]}, [PATHS[2].format(i) for i in range(11)]),
        ({"target_modules": ["*.layers.1.*.linear_qkv"]}, [PATHS[0].format(1)]),
        ({"target_modules": ["decoder*1.mlp.linear_fc2"]}, [PATHS[3].format(1)]),
        ({"target_modules": ["*.layers.1.*linear_proj", "linear_fc2"]}, None),
        ({"target_modules": ["*.linear_*"]}, [path.format(i) for i in range(11) for path in PATHS]),
        (
            {"target_modules": [], "exclude_modules": ["*.mlp.*", "linear_proj"]},
            [PATHS[0].format(i) for i in range(11)],
        ),
    ],
)
def test_names_wildcards_and_exclusion(options: dict[str, Any], expected: list[str] | None) -> None:
    model = LoRA(**options, dim=DIM)(Model(*range(1, 12)))
    if expected is None:
        expected = [p for i in range(11) for p in ([PATHS[1].format(1)] if i == 1 else []) + [PATHS[3].format(i)]]
    assert adapters(model) == expected


def test_the_first_pattern_that_fits_wins() -> None:
    lora = LoRA(["*.layers.0.*.linear_fc1", "linear_fc1"])
    layer = nn.Linear(2, 2)
    assert lora.match(layer, "linear_fc1", "decoder.layers.0.mlp") == (
        "*.layers.0.*.linear_fc1",
        "decoder.layers.0.mlp.linear_fc1",
    )
    assert lora.match(layer, "linear_fc1", "decoder.layers.1.mlp") == ("linear_fc1", "decoder.layers.1.mlp.linear_fc1")
    assert lora.match(layer, "linear_fc2", "decoder.layers.1.mlp") is None


def test_transform_alone() -> None:
    layer, lora = ColumnParallelLinear(WIDTH, 16), LoRA(["*.mlp.linear_fc1"], dim=DIM)
    assert lora.transform(layer, "linear_fc1", "decoder.other") is layer
    found = lora.transform(layer, "linear_fc1", "decoder.mlp")
    assert isinstance(found, AdaptedLayer)
    assert found.to_wrap is layer
    assert layer.weight.requires_grad, "not frozen"
    assert lora.transform(found, "linear_fc1", "decoder.mlp") is found
    assert lora.transform(layer) is layer


def test_switching_adapters_off_and_on() -> None:
    model = Model(1)
    x = numbers(3, WIDTH)
    model.eval()
    before = model(x)
    lora = LoRA(dim=DIM, lora_B_init_method="normal")
    model = lora(model).eval()
    changed = model(x)
    assert not torch.allclose(before, changed)
    lora.disable_adapter_layers(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    lora.enable_adapter_layers(model)
    torch.testing.assert_close(model(x), changed, rtol=0, atol=0)
    with lora.disable_adapter(model):
        with lora.disable_adapter(model):
            torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    torch.testing.assert_close(model(x), changed, rtol=0, atol=0)
    with pytest.raises(KeyError), lora.disable_adapter(model):
        raise KeyError
    torch.testing.assert_close(model(x), changed, rtol=0, atol=0)
    one = model.decoder.layers[0].mlp["linear_fc1"]
    one.disable_adapter_layers()
    with lora.disable_adapter([model]):
        pass
    assert not one.adapter_enabled, "as it was before"
    assert model.decoder.layers[0].mlp["linear_fc2"].adapter_enabled


def test_what_is_saved() -> None:
    lora = LoRA(["linear_fc1"], dim=DIM)
    model = Wrapper(lora(Model(1)))
    assert lora.adapter_key_filter("a.adapter.linear_in.weight"), "before the names are known"
    lora.set_params_to_save(model)
    kept = {key for key in model.state_dict() if lora.adapter_key_filter(key)}
    adapter = {f"module.{PATHS[2].format(0)}.adapter.linear_{side}.weight" for side in ("in", "out")}
    running = {f"module.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert kept == adapter | running
    model.module.norm.weight.requires_grad_(True)
    lora.set_params_to_save([model])
    assert "module.norm.weight" in lora.params_to_save
    assert not lora.adapter_key_filter(f"module.{PATHS[2].format(0)}.weight")
    layer = model.module.decoder.layers[0].mlp["linear_fc1"]
    layer.bias.requires_grad_(True)
    lora.set_params_to_save(model)
    assert lora.adapter_key_filter(f"module.{PATHS[2].format(0)}.bias"), "under its name in the state dict"
    assert lora.adapter_key_filter("decoder.adapters")
    assert not lora.adapter_key_filter("decoder.adapterless.weight")
    for name, parameter in model.named_parameters():
        assert lora.adapter_key_filter((name, parameter)) == parameter.requires_grad


def test_copies_and_state_dicts() -> None:
    model = LoRA(dim=DIM, lora_B_init_method="normal")(Model(1))
    x = numbers(3, WIDTH)
    model.eval()
    expected = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert trained(twin) == trained(model)
    weight = twin.decoder.layers[0].mlp["linear_fc1"].adapter.linear_in.weight
    assert weight.partition_dim == -1
    with torch.no_grad():
        weight.zero_()
    assert not torch.allclose(twin(x), expected)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    bare = Model(1)
    missing = bare.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys, "the base model's own names stay"


def test_attributes_are_those_of_the_base_layer() -> None:
    model = LoRA(dim=DIM)(Model(1))
    layer = model.decoder.layers[0].mlp["linear_fc1"]
    assert layer.output_size == 16
    assert layer.weight is layer.to_wrap.weight
    with pytest.raises(AttributeError):
        _ = layer.no_such_thing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_have_the_dtype_that_is_asked_for(dtype: torch.dtype) -> None:
    x = numbers(3, WIDTH)
    for layer in (nn.Linear(WIDTH, 4), ColumnParallelLinear(WIDTH, 4)):
        model = LoRA(["linear_fc1"], dim=DIM, lora_dtype=dtype)(nn.ModuleDict({"linear_fc1": layer}))
        assert {p.dtype for p in model["linear_fc1"].adapter.parameters()} == {dtype}
        found = model["linear_fc1"](x)
        assert (found if isinstance(found, torch.Tensor) else found[0]).dtype == torch.float32


@pytest.mark.parametrize("position", ["pre", "post"])
def test_dropout_where_it_is_asked_for(position: str) -> None:
    """The oracle drops by hand, from the same generator."""
    model = LoRA(["linear_fc1"], dim=DIM, dropout=0.5, dropout_position=position, lora_B_init_method="normal")(
        nn.ModuleDict({"linear_fc1": nn.Linear(WIDTH, 6)})
    )
    layer, x = model["linear_fc1"], numbers(5, WIDTH)
    a, b, scale = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight, layer.adapter.scaling
    torch.manual_seed(4)
    found = layer(x)
    torch.manual_seed(4)
    if position == "pre":
        update = nn.functional.dropout(x, 0.5) @ a.T @ b.T * scale
    else:
        update = nn.functional.dropout(x @ a.T @ b.T * scale, 0.5)
    torch.testing.assert_close(found, layer.to_wrap(x) + update)
    model.eval()
    torch.testing.assert_close(layer(x), layer.to_wrap(x) + x @ a.T @ b.T * scale)


def wrapped_after() -> dict[str, torch.Tensor]:
    """Adapted, then in DistributedDataParallel: each rank with half of the batch."""
    from torch.nn.parallel import DistributedDataParallel

    rank, size = dist.get_rank(), dist.get_world_size()
    model = LoRA(dim=DIM, lora_B_init_method="normal")(Model(1))
    del model.norm
    model.norm = nn.Identity()
    model = DistributedDataParallel(model)
    model(numbers(4, WIDTH).chunk(size)[rank]).sum().backward()
    return {name: p.grad for name, p in model.module.named_parameters() if p.requires_grad}


def test_in_data_parallelism_gradients_are_means_over_ranks(two_ranks: Ranks) -> None:
    torch.manual_seed(0)
    model = LoRA(dim=DIM, lora_B_init_method="normal")(Model(1))
    model.norm = nn.Identity()
    model(numbers(4, WIDTH)).sum().div(2).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for found in two_ranks.run(wrapped_after):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def wrapped_before() -> tuple[list[str], bool, str]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(Model(1))
    with pytest.warns(UserWarning, match="DistributedDataParallel") as told:
        found = LoRA(["linear_fc1"], dim=DIM)(model)
    found.eval()
    found(numbers(3, WIDTH))
    again = DistributedDataParallel(found.module)
    again(numbers(3, WIDTH)).sum().backward()
    return trained(model), found is model, str(told[0].message)


def test_a_wrapper_made_before_is_adapted_inside_and_told_of(two_ranks: Ranks) -> None:
    for names, same, message in two_ranks.run(wrapped_before):
        assert names == [f"module.{PATHS[2].format(0)}.adapter.linear_{side}.weight" for side in ("in", "out")]
        assert same
        assert "wrap" in message


def copied() -> None:
    model = LoRA(["linear_fc1"], dim=DIM)(nn.ModuleDict({"linear_fc1": nn.Linear(WIDTH, 8)}))
    layer = LoRA(["linear_fc1"], dim=DIM).transform(
        ColumnParallelLinear(WIDTH, 8, tp_group=dist.group.WORLD), "linear_fc1"
    )
    adapter = copy.deepcopy(layer.adapter)
    assert adapter.base.group is dist.group.WORLD
    assert adapter.linear_in.weight.partition_dim == 0
    copy.deepcopy(model)


def test_adapters_of_parallel_layers_can_be_copied(two_ranks: Ranks) -> None:
    two_ranks.run(copied)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ["linear_qkx"]},
            TargetError,
            "'linear_qkx' is the name of no module.*closest: 'linear_qkv'",
        ),
        ({"target_modules": ["linear_qkv"], "exclude_modules": ["linear_fc1"]}, ConfigError, "empty target_modules"),
    ],
)
def test_refused_calls_leave_the_model_as_it_was(options: dict[str, Any], error: type, message: str) -> None:
    model = Model(1)
    model.norm.weight.requires_grad_(False)
    model.eval()
    names = trained(model)
    with pytest.raises(error, match=message):
        LoRA(**options)(model)
    assert trained(model) == names
    assert not adapters(model)
    assert not model.training


def test_default_targets_that_a_model_lacks_are_passed_over_but_some_must_be_there() -> None:
    class NoAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear_fc1, self.linear_fc2 = nn.Linear(8, 8), nn.Linear(8, 8)

    model = LoRA(dim=4)(NoAttention())
    assert isinstance(model.linear_fc1, AdaptedLayer)
    with pytest.raises(TargetError, match="'linear_qkv' is the name of no module"):
        LoRA(dim=4)(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(TargetError, match="'linear_qkv' is the name of no module"):
        LoRA(["linear_fc1", "linear_qkv"], dim=4)(NoAttention())


def test_a_module_in_two_places_has_one_adapter() -> None:
    layer = nn.Linear(WIDTH, WIDTH)
    model = nn.ModuleDict(
        {"first": nn.ModuleDict({"linear_fc1": layer}), "second": nn.ModuleDict({"linear_fc1": layer})}
    )
    LoRA(["linear_fc1"], dim=DIM)(model)
    one, other = model["first"]["linear_fc1"], model["second"]["linear_fc1"]
    assert one is other
    twice = nn.Module()
    twice.linear_fc1 = twice.linear_fc2 = nn.Linear(WIDTH, WIDTH)
    LoRA(["linear_fc1"], dim=DIM)(twice)
    assert isinstance(twice.linear_fc1, AdaptedLayer)
    assert isinstance(twice.linear_fc2, nn.Linear)  # its name is no target
    assert one.to_wrap is layer
    assert len([p for p in model.parameters() if p.requires_grad]) == 2


def test_all_but_some_layers_twice_is_once() -> None:
    lora = LoRA(target_modules=[], exclude_modules=["c"], dim=DIM)
    model = lora(nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "abc"}))
    before = list(model.named_parameters())
    assert list(lora(model).named_parameters()) == before


def test_what_was_frozen_for_use_is_trained_when_asked_again_and_others_stay() -> None:
    model = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "ab"})
    LoRA(["a"], dim=DIM)(model, training=False)
    LoRA(["b"], dim=DIM)(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "b.adapter.linear_in.weight",
        "b.adapter.linear_out.weight",
    }
    LoRA(["a"], dim=DIM)(model)
    assert sum(p.requires_grad for p in model.parameters()) == 4


def test_a_merged_layer_keeps_the_others_as_they_are_when_adapters_cannot_be_disabled() -> None:
    lora = LoRA(["a", "b"], dim=DIM)
    model = lora(nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "ab"}))
    LoRAMerge().transform(model["b"])
    with pytest.raises(ModelError, match="merged"), lora.disable_adapter(model):
        pass
    assert model["a"].adapter_enabled


def test_adapters_without_values_are_a_warning() -> None:
    with pytest.warns(UserWarning, match="adapters of 1 layers .* on the meta device"):
        LoRA(["a"], dim=DIM)(nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH, device="meta")}))
