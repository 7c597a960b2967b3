"""Bad input is one clear sentence, on every rank, and leaves the model as it was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import ArgumentError, ConfigError, ModelError, TargetError
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, LoRAMerge, VLMLoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from ranks import Ranks

    from smartinit.errors import SmartinitError

WIDTH = 8
TARGETS = ["linear_fc1", "linear_fc2"]


class Config:
    gated_linear_unit = False


class Topk(Config):
    moe_router_topk = 3


def model(config: Any = None, tp_group: Any = None) -> nn.Module:
    made = nn.ModuleDict(
        {
            "mlp": nn.ModuleDict(
                {
                    "experts": nn.ModuleDict(
                        {
                            "linear_fc1": ColumnParallelLinear(WIDTH, 12, config=config, tp_group=tp_group),
                            "linear_fc2": RowParallelLinear(12, WIDTH, config=config, tp_group=tp_group),
                        }
                    )
                }
            ),
            "norm": nn.LayerNorm(WIDTH),
        }
    )
    made["norm"].bias.requires_grad_(False)
    return made.eval()


def state(of: nn.Module) -> dict[str, Any]:
    """All that a refused call could have changed."""
    return {
        "modules": [(name, type(module), module.training) for name, module in of.named_modules()],
        "flags": [(name, parameter.requires_grad) for name, parameter in of.named_parameters()],
        "numbers": [float(parameter.detach().sum()) for parameter in of.parameters()],
        "hooks": [len(module._forward_hooks) for module in of.modules()],
    }


def refused(peft: Any, of: nn.Module, error: type[SmartinitError]) -> str:
    """What is said; the model is as it was."""
    before = state(of)
    with pytest.raises(error) as told:
        peft(of)
    assert state(of) == before
    message = str(told.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


OPTIONS: list[tuple[dict[str, Any], type[SmartinitError], str]] = [
    ({"exclude_modules": ["linear_fc1"]}, ConfigError, "exclude_modules=['linear_fc1']"),
    ({"dim": 0}, ConfigError, "dim=0"),
    ({"dim": -4}, ConfigError, "dim=-4"),
    ({"dim": "8"}, ConfigError, "dim='8'"),
    ({"dim": 2.5}, ConfigError, "dim=2.5"),
    ({"dim": True}, ConfigError, "dim=True"),
    ({"alpha": 0}, ConfigError, "alpha=0"),
    ({"alpha": -1}, ConfigError, "alpha=-1"),
    ({"alpha": math.nan}, ConfigError, "alpha=nan"),
    ({"alpha": "32"}, ConfigError, "alpha='32'"),
    ({"dropout": 1.0}, ConfigError, "dropout=1.0"),
    ({"dropout": -0.1}, ConfigError, "dropout=-0.1"),
    ({"dropout": None}, ConfigError, "dropout=None"),
    ({"dropout_position": "middle"}, ConfigError, "dropout_position='middle'"),
    ({"lora_A_init_method": "xavierr"}, ConfigError, "lora_A_init_method"),
    ({"lora_B_init_method": "ones"}, ConfigError, "lora_B_init_method='ones'"),
    ({"target_modules": ["linear_cf1"]}, TargetError, "closest: 'linear_fc1'"),
    ({"target_modules": [*TARGETS, "*.experts.linear_fc3"]}, TargetError, "'*.experts.linear_fc3'"),
    ({"target_modules": ["norm"]}, ModelError, "'norm' is a LayerNorm"),
    ({"target_modules": [], "exclude_modules": TARGETS}, TargetError, "exclude_modules"),
    ({"target_modules": [], "exclude_modules": ["linear_cf1"]}, TargetError, "closest: 'linear_fc1'"),
    ({"target_modules": "linear_fc1"}, ArgumentError, "write ['linear_fc1']"),
]
LORA_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"lora_dtype": "bf16"}, "lora_dtype='bf16'"),
    ({"lora_dtype": torch.int8}, "lora_dtype=torch.int8"),
    ({"share_expert_adapters": "yes"}, "share_expert_adapters='yes'"),
    ({"a2a_experimental": 1}, "a2a_experimental=1"),
]
KINDS: list[Callable[..., Any]] = [LoRA, DoRA]


@pytest.mark.parametrize(("options", "error", "said"), OPTIONS, ids=[str(options) for options, _, _ in OPTIONS])
@pytest.mark.parametrize("kind", KINDS)
def test_options_that_cannot_be(
    kind: Callable[..., Any], options: dict[str, Any], error: type[SmartinitError], said: str
) -> None:
    assert said in refused(kind(**{"target_modules": TARGETS, "dim": 4, **options}), model(), error)


@pytest.mark.parametrize(("options", "said"), LORA_OPTIONS)
def test_options_of_lora_alone(options: dict[str, Any], said: str) -> None:
    assert said in refused(LoRA(TARGETS, dim=4, **options), model(), ConfigError)


def test_dora_drops_before_only() -> None:
    assert "dropout_position" in refused(DoRA(TARGETS, dim=4, dropout_position="post"), model(), ConfigError)


@pytest.mark.parametrize("options", [{"freeze_vision_model": 0}, {"freeze_language_model": None}])
def test_flags_that_are_neither(options: dict[str, Any]) -> None:
    assert "expected True or False" in refused(VLMLoRA(TARGETS, **options), model(), ConfigError)


@pytest.mark.parametrize(
    ("config", "said"), [(None, "moe_router_topk"), (Config(), "moe_router_topk"), (Topk(), "moe_router_topk=3")]
)
@pytest.mark.parametrize("share", [True, False])
def test_experts_without_their_number_or_with_one_that_does_not_divide(config: Any, said: str, share: bool) -> None:
    lora = LoRA(TARGETS, dim=4, normalize_moe_lora=True, share_expert_adapters=share)
    message = refused(lora, model(config), ConfigError)
    assert said in message
    assert "mlp.experts.linear_fc1" in message


def test_separate_projections_that_do_not_exist() -> None:
    """Of a layer that is not fused there is no gate; a fused name is none of the separate ones."""
    with pytest.raises(ConfigError):
        CanonicalLoRA(["linear_qkv"])(model())
    with pytest.raises(TargetError):
        CanonicalLoRA(["linear_q"])(model())


def test_factors_that_do_not_fit() -> None:
    made = LoRA(TARGETS, dim=4)(model())
    adapter = made["mlp"]["experts"]["linear_fc1"].adapter
    before = adapter.whole()
    for a, b in (((4, 9), (12, 4)), ((4, WIDTH), (11, 4)), ((3, WIDTH), (12, 3)), ((WIDTH, 4), (4, 12))):
        with pytest.raises(ConfigError, match=r"expected \(\(4, 8\), \(12, 4\)\)"):
            adapter.set_whole(torch.zeros(a), torch.zeros(b))
    torch.testing.assert_close(adapter.whole(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "shapes",
    [
        ((6, 5), (6, 4), (3, 5)),  # ranks differ
        ((6, 5), (7, 4), (4, 5)),  # rows
        ((6, 5), (6, 4), (4, 6)),  # columns
        ((6, 5), (6, 2), (2, 5)),  # not dim
    ],
)
def test_merging_what_does_not_fit(shapes: tuple[tuple[int, ...], ...]) -> None:
    w, b, a = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ConfigError):
        LoRAMerge().merge(w, b, a, 8, 4)
    assert (w == 1).all()


def on_all_ranks(case: str) -> str:
    """Each is refused on every rank, or this would hang."""
    group, rank = dist.group.WORLD, dist.get_rank()
    if case == "dim":
        return refused(LoRA(TARGETS, dim=5), model(tp_group=group), ConfigError)
    if case == "outputs":  # B of a row-parallel layer is shared by its rows
        odd = nn.ModuleDict({"linear_fc2": RowParallelLinear(12, 7, tp_group=group)})
        return refused(LoRA(["linear_fc2"], dim=4), odd, ConfigError)
    if case == "no group":
        lost = model(tp_group=group)
        lost["mlp"]["experts"]["linear_fc1"].tp_group = None
        return refused(LoRA(TARGETS, dim=4), lost, ConfigError)
    if case == "another group":
        alone = [dist.new_group([i]) for i in range(dist.get_world_size())][rank]
        other = model(tp_group=group)
        other["mlp"]["experts"]["linear_fc1"].tp_group = alone
        return refused(LoRA(TARGETS, dim=4), other, ConfigError)
    if case == "misspelt":
        return refused(LoRA(["linear_fc3"], dim=4), model(tp_group=group), TargetError)
    if case == "one rank":  # only the last one has a layer that cannot be adapted
        there = nn.ModuleDict({"linear_fc1": nn.LayerNorm(3) if rank == dist.get_world_size() - 1 else nn.Linear(3, 3)})
        return refused(LoRA(["linear_fc1"], dim=4), there, ModelError)
    raise KeyError(case)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("dim", "dim=5 cannot be shared evenly by the 2 tensor-parallel ranks"),
        ("outputs", "the 7 outputs of the layer"),
        ("no group", "no tensor-parallel group"),
        ("another group", "a tensor-parallel group of 1 ranks"),
        ("misspelt", "'linear_fc3'"),
        ("one rank", "'linear_fc1' is a LayerNorm"),
    ],
)
def test_every_rank_is_told(two_ranks: Ranks, case: str, said: str) -> None:
    for message in two_ranks.run(on_all_ranks, case):
        assert said in message


def test_a_layer_without_a_weight_of_its_own() -> None:
    tied = model()
    del tied["mlp"]["experts"]["linear_fc1"].weight
    tied["mlp"]["experts"]["linear_fc1"].weight = None
    assert "no weight of its own" in refused(LoRA(TARGETS, dim=4), tied, ModelError)


def test_an_output_that_is_no_tensor() -> None:
    class Odd(ColumnParallelLinear):
        def forward(self, x: torch.Tensor, m_splits: Any = None) -> Any:
            return {"output": super().forward(x, m_splits)}

    made = LoRA(["linear_fc1"], dim=4)(nn.ModuleDict({"linear_fc1": Odd(WIDTH, 12)}))
    assert isinstance(made["linear_fc1"], AdaptedLayer)
    with pytest.raises(ModelError, match="'linear_fc1' returned a dict"):
        made["linear_fc1"](torch.ones(2, WIDTH))
