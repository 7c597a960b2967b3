"""DoRA in Megatron Bridge's words (arXiv 2402.09353)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.parallel.base import describe
from smartinit.adapters.parallel.decomposed import DecomposedAdapter, DecomposedExperts, DecomposedLayer
from smartinit.adapters.parallel.experts import check_expert_group, is_expert
from smartinit.adapters.parallel.initial import fill
from smartinit.config import checks
from smartinit.errors import ConfigError, ModelError
from smartinit.megatron.agreement import everyone, failing_together
from smartinit.megatron.startable import Startable
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smartinit.megatron.walk import Model, Place
    from smartinit.methods.base import Method


@dataclass
class DoRA(Startable):
    """Weight-decomposed adapters: the update turns the rows of ``W``, a magnitude m sets their length.

    ``h = m ⊙ (W + s·B A) x / ‖W + s·B A‖ + bias`` (eq. 5; norms by rows, without gradient, sec. 4.3). At the start m is
    that norm, so that the model computes what it did before. ``DoRA(dim=16)(model)`` freezes the model and adapts it,
    in place; see `PEFT.__call__`.

    Layers of experts have a magnitude for each expert, as the norms of their weights differ, and hence also factors for
    each: beside a grouped layer A ``[E, r, in]``, B ``[E, out, r]`` and ``weight_magnitude`` ``[E, out]``.

    The norms of the base weights are kept between steps, and follow all writes to them but those through ``.data``:
    after such writes call ``layer.adapter.forget()``, or ``model.train()``. Base weights that are loaded after the
    model was adapted are followed by magnitudes that are still at their start, with a warning where only
    `reset_magnitudes` can do that.

    Args:
        target_modules: see `ModuleMatcher`.
        exclude_modules: see `ModuleMatcher`.
        dim: rank of the update; a multiple of the tensor-parallel size for column-parallel layers.
        alpha: the update is scaled by ``alpha / dim``.
        dropout: probability of dropout of the layer's input, in ``[0, 1)``; it costs the product with W a second time.
        dropout_position: ``"pre"``, and nothing else: the update is no addend that could be dropped from.
        lora_A_init_method: see `LoRA`.
        lora_B_init_method: see `LoRA`.
    """

    dim: int = 32
    alpha: float = 64
    dropout: float = 0.0
    dropout_position: str = "pre"
    lora_A_init_method: str | Method = "xavier"
    lora_B_init_method: str = "zero"

    def check(self) -> None:
        """Whether the options go together.

        Raises:
            ConfigError: they do not.
        """
        self.patterns()
        checks.integer("dim", self.dim, 1)
        checks.positive("alpha", self.alpha)
        if self.dropout_position != "pre":
            raise ConfigError(
                f"dropout_position={self.dropout_position!r} cannot be with DoRA, whose update is no addend: "
                "expected 'pre'; use LoRA for 'post'"
            )
        checks.number("dropout", self.dropout, "a probability below 1", 0, math.nextafter(1, 0))
        self.check_starts(self.lora_B_init_method)

    def start(self, layers: Sequence[tuple[Place, nn.Module]], *, seed: int) -> None:
        """See `PEFT.start`. The magnitudes are set here, once all ranks know that all layers can be adapted."""
        for _, layer in layers:
            if isinstance(layer, DecomposedLayer):
                layer.adapter.reset(layer.weights())
        super().start(layers, seed=seed)

    def adapted(self, place: Place, pattern: str, *, seed: int, shared: dict[str, nn.Module]) -> nn.Module:
        """See `PEFT.adapted`."""
        del pattern, shared  # no magnitude fits two weights
        expert = is_expert(place.name, place.module)
        if expert:
            check_expert_group(place.module, place.name, place.ep_group)
        base = describe(place.module, place.name, expert=expert)
        weight = next(t for t in (*place.module.parameters(), *place.module.buffers()))
        adapter = (DecomposedExperts if base.experts else DecomposedAdapter)(
            base,
            self.dim,
            self.alpha,
            dropout=self.dropout,
            device=weight.device,
            dtype=weight.dtype if weight.is_floating_point() else torch.float32,
            name=place.name,
            expert=expert,
        )
        methods = self.a_initial, self.lora_B_init_method
        fill(adapter, *methods, seed=seed, name=place.whole_name, first_expert=place.first_expert)
        return DecomposedLayer(place.module, adapter, base, place.name)


def reset_magnitudes(model: Model) -> None:
    """Set all magnitudes, trained ones too, to the row norms of what base weights and adapters hold now.

    For base weights that came after ``DoRA(...)(model)``. Every rank of the default process group must call this.

    Args:
        model: adapted with `DoRA`; a module or chunks.

    Raises:
        ModelError: an adapter is merged, or no layer has a magnitude on any rank; nothing has changed then.

    Cost: see `DecomposedAdapter.row_norms`, for each layer.
    """
    layers = [layer for _, layer in adapted_layers(model) if isinstance(layer, DecomposedLayer)]
    with failing_together():
        for layer in layers:
            if layer.merged:
                raise ModelError(
                    f"'{layer.name}' is merged, so its weight is not that of the base; take the adapter out first: "
                    "LoRAMerge().unmerge(model)"
                )
            layer.weights()
    if not any(int(count) for count in everyone(str(len(layers)))):
        raise ModelError("the model has no layer with a magnitude; adapt it with DoRA first")
    for layer in layers:
        layer.adapter.forget()
        layer.adapter.reset(layer.weights())
