"""LoRA with adapters of their own for q, k, v, gate and up, in Megatron Bridge's words (arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from smartinit.adapters.parallel.base import describe
from smartinit.adapters.parallel.experts import check_expert_group, is_expert
from smartinit.adapters.parallel.initial import fill
from smartinit.adapters.parallel.split import SplitAdapter, SplitLayer, attention_rows, gated_rows, part_of
from smartinit.config import checks
from smartinit.errors import ConfigError
from smartinit.megatron.lora import LoRA
from smartinit.megatron.startable import Startable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from smartinit.adapters.parallel.split import Interleaving
    from smartinit.megatron.walk import Place
    from smartinit.methods.base import Method

# Projection -> the layer that computes it, and the name of its adapter there.
_FUSED = {
    "linear_q": ("linear_qkv", "adapter_q"),
    "linear_k": ("linear_qkv", "adapter_k"),
    "linear_v": ("linear_qkv", "adapter_v"),
    "linear_fc1_gate": ("linear_fc1", "adapter_gate"),
    "linear_fc1_up": ("linear_fc1", "adapter_up"),
}
_LAYERS = {layer for layer, _ in _FUSED.values()}


@dataclass
class CanonicalLoRA(Startable):
    """LoRA as models with separate projections have it: q, k, v, gate and up each with an A and a B of its own.

    Their adapters stand beside the fused layers, as ``….linear_qkv.adapter.adapter_q.linear_in.weight`` and so on; a
    layer computes its base once. Linear layers of experts have an adapter for each expert.

    Args:
        target_modules: names of projections (``"linear_q"``, ``"linear_fc1_up"``), of other layers, or patterns for
            full names (``"*.layers.0.*.linear_q"``). What several of them ask of one layer adds up.
        exclude_modules: see `ModuleMatcher`; a fused layer that is left gets all adapters that it can have.
        canonical_mapping: layer or pattern -> projections of it; made from ``target_modules``, or given instead of
            them.
        dim: rank of each update; a multiple of the tensor-parallel size for column-parallel layers.
        alpha: updates are scaled by ``alpha / dim``.
        dropout: see `LoRA`.
        dropout_position: see `LoRA`.
        lora_A_init_method: see `LoRA`. Each projection starts as a layer of its own would, with the rows of the fused
            weight that are its; methods that quantise weights cannot do that. In what `initialize` returns it has the
            name of its layer and its adapter, ``….linear_qkv.adapter_q``.
        lora_B_init_method: see `LoRA`.

    Raises:
        ConfigError: a fused layer itself (``linear_qkv``, ``linear_fc1``) as a target; another mapping than that of the
            targets.
    """

    target_modules: list[str] = field(
        default_factory=lambda: [
            "linear_q",
            "linear_k",
            "linear_v",
            "linear_proj",
            "linear_fc1_up",
            "linear_fc1_gate",
            "linear_fc2",
        ]
    )
    dim: int = 32
    alpha: float = 32
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "pre"
    lora_A_init_method: str | Method = "xavier"
    lora_B_init_method: str = "zero"

    def __post_init__(self) -> None:
        """Translate the targets: where their adapters stand, and which of them."""
        if not self.target_modules:
            return
        mapping = _mapping(checks.names("target_modules", self.target_modules))
        if self.canonical_mapping not in ({}, mapping):
            raise ConfigError(
                f"canonical_mapping={self.canonical_mapping} is not what target_modules={self.target_modules} say; "
                "give one of the two, and an empty one of the other"
            )
        self.canonical_mapping = mapping

    def check(self) -> None:
        """Whether the options go together.

        Raises:
            ConfigError: they do not.
        """
        self.patterns()
        self._plain().check()

    def adapted(self, place: Place, pattern: str, *, seed: int, shared: dict[str, nn.Module]) -> nn.Module:
        """See `PEFT.adapted`."""
        plain = self._plain()
        asked = self._asked(place)
        rows = self._rows(place, asked)
        if rows is None:
            return plain.adapted(place, pattern, seed=seed, shared=shared)
        expert = is_expert(place.name, place.module)
        if expert:
            check_expert_group(place.module, place.name, place.ep_group)
        base = describe(place.module, place.name, expert=expert)
        adapters = {}
        for part in rows.parts:
            if asked and part not in asked:
                continue
            adapter = adapters[part] = plain.adapter(place, part_of(base, rows, part), expert=expert)
            methods = self.a_initial, self.lora_B_init_method
            name = f"{place.whole_name}.{part}"
            fill(adapter, *methods, seed=seed, name=name, first_expert=place.first_expert)
        return SplitLayer(place.module, SplitAdapter(adapters, rows), base, place.name)

    def _plain(self) -> LoRA:
        """What adapts a layer, or a projection, that is one."""
        return LoRA(
            dim=self.dim,
            alpha=self.alpha,
            dropout=self.dropout,
            dropout_position=self.dropout_position,
            lora_A_init_method=self.lora_A_init_method,
            lora_B_init_method=self.lora_B_init_method,
            share_expert_adapters=False,
        )

    def _asked(self, place: Place) -> set[str]:
        """Adapters of projections in a layer that are asked for by name; empty: none is, but the layer.

        Raises:
            ConfigError: a projection that it has not.
        """
        asked = set()
        for pattern in self.fitting(place.attribute or None, place.prefix):
            for name in sorted(self.canonical_mapping.get(pattern, ())):
                layer, adapter = _FUSED.get(name, ("", ""))
                if layer and place.attribute.endswith(layer):
                    asked.add(adapter)
                elif name != pattern:
                    known = [name for name, (layer, _) in _FUSED.items() if place.attribute.endswith(layer)]
                    raise ConfigError(
                        f"canonical_mapping: {name!r} is no projection of '{place.name}'; expected some of {known}"
                    )
        return asked

    def _rows(self, place: Place, asked: set[str]) -> Interleaving | None:
        """How the projections lie in a layer; None: it is one.

        Raises:
            ConfigError: projections are asked of it that it has not.
        """
        if not place.attribute.endswith(tuple(_LAYERS)):
            return None
        config = getattr(place.module, "config", None) or place.config
        base = describe(place.module, place.name, expert=is_expert(place.name, place.module))
        if place.attribute.endswith("linear_qkv"):
            return attention_rows(base, *_heads(config, place.name), place.name)
        if not base.gated and not getattr(config, "gated_linear_unit", False):
            if not asked:
                return None
            raise ConfigError(
                f"linear_fc1_gate and linear_fc1_up were asked of '{place.name}', whose config has no "
                "gated_linear_unit=True, so its rows are one projection's; leave the two out of target_modules, and "
                "adapt the layer with LoRA(target_modules=['linear_fc1'])"
            )
        return gated_rows(base, place.name)


def _mapping(targets: Iterable[str]) -> dict[str, set[str]]:
    """Layer or pattern -> the projections of it, or the layer's own name.

    Raises:
        ConfigError: a fused layer.
    """
    mapping: dict[str, set[str]] = {}
    for target in targets:
        for layer in _LAYERS:
            if target.endswith(layer):
                parts = [name for name, (fused, _) in _FUSED.items() if fused == layer]
                raise ConfigError(
                    f"target {target!r} is a fused layer, which CanonicalLoRA adapts by its projections: name some of "
                    f"{', '.join(parts)} instead, or use LoRA for one adapter beside the whole layer"
                )
        fused = next((name for name in _FUSED if target.endswith(name)), None)
        if fused is None:
            mapping.setdefault(target, set()).add(target)
        else:
            mapping.setdefault(target.removesuffix(fused) + _FUSED[fused][0], set()).add(fused)
    return mapping


def _heads(config: Any, name: str) -> tuple[int, int, int]:  # noqa: ANN401 - Megatron's is a class of its own
    """Heads, query groups and the size of a head.

    Raises:
        ConfigError: the config does not say.
    """
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_query_groups", None) or heads
    width = getattr(config, "kv_channels", None)
    hidden = getattr(config, "hidden_size", None)
    if not width and heads and hidden:
        width = hidden // heads
    if not heads or not groups or not width:
        raise ConfigError(
            f"which rows of '{name}' are those of q, k and v is for its config to say, which has no "
            f"{'num_attention_heads' if not heads else 'kv_channels and no hidden_size'}; give the layer, or a module "
            "around it, a config with num_attention_heads, num_query_groups and kv_channels"
        )
    return int(heads), int(groups), int(width)
