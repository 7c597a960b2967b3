"""LoRA around one linear layer: ``h = W x + s·B A x``, ``s = alpha / r`` (arXiv 2106.09685, eq. 3).

Attribute and state-key names are PEFT's, so that code written for its layers works on these:
``base_layer``, ``lora_A.<adapter>.weight`` ``(r, in)``, ``lora_B.<adapter>.weight`` ``(out, r)``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as TransformersConv1D

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smartinit.config import LoraConfig


class LoraLayer(nn.Module):
    """A linear layer with any number of named low-rank adapters beside it.

    Args:
        base_layer: the layer as the model had it; it is called, never copied.

    Attributes:
        lora_A: adapter -> ``nn.Linear(in_features, r)`` without bias.
        lora_B: adapter -> ``nn.Linear(r, out_features)`` without bias.
        scaling: adapter -> ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv 2312.03732).
        active_adapters: the adapters that `forward` adds; names this layer does not have are passed over.
        disable_adapters: while true, `forward` is the base layer's.
    """

    # What belongs to one adapter, by where it is kept: the same two names as on PEFT's layers.
    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = self.features(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.active_adapters: list[str] = []
        self.disable_adapters = False

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)`` of a layer of this kind."""
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's: some models read the weight of a layer instead of calling it."""
        weight: torch.Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's."""
        bias: torch.Tensor | None = self.get_base_layer().bias  # type: ignore[assignment]
        return bias

    def get_base_layer(self) -> nn.Module:
        """The wrapped layer."""
        return self.base_layer

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: LoraConfig,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        """Create (or re-create, with another rank) one adapter with its default start.

        Args:
            adapter_name: which one; an adapter of that name is replaced.
            r: its rank.
            lora_alpha: the numerator of its scaling.
            config: dropout, rank stabilisation, kind of start.
            device: where its weights lie; None: where the base layer's do.

        Raises:
            ConfigError: the rank is not positive.
        """
        if r <= 0:
            raise ConfigError(f"the rank of adapter '{adapter_name}' must be at least 1, not {r}")
        base = self.weight
        # Half precision cannot hold the small updates of A and B: PEFT trains them in float32 as well.
        dtype = base.dtype if base.dtype in (torch.float32, torch.float64) else torch.float32
        where = base.device if device is None else device
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False, device=where, dtype=dtype)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False, device=where, dtype=dtype)
        dropout = float(config.lora_dropout)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.r[adapter_name] = r
        self.use_rslora[adapter_name] = bool(config.use_rslora)
        self.set_alpha(adapter_name, lora_alpha)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        for modules in (self.lora_A, self.lora_B, self.lora_dropout):
            modules[adapter_name].train(self.training)

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``(r, in)`` and B ``(out, r)`` of one adapter, the parameters themselves."""
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight  # type: ignore[return-value]

    def set_alpha(self, adapter_name: str, lora_alpha: float) -> None:
        """Change one adapter's alpha, and with it its scaling."""
        rank = self.r[adapter_name]
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(rank) if self.use_rslora[adapter_name] else rank)

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Give one adapter its start without data.

        ``True``: A uniform in ±1/√in (Kaiming with a = √5), B zero. ``"gaussian"``: A normal with deviation 1/r, B
        zero. ``False``: B random too, so that the adapter is not neutral (for tests). The name of a data-driven
        method: as ``True``; its factors are written later.
        """
        a, b = self.matrices(adapter_name)
        if init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)

    def set_adapter(self, adapter_names: Sequence[str], *, inference_mode: bool = False) -> None:
        """Make these adapters the active ones and, unless ``inference_mode``, the trainable ones."""
        self.active_adapters = list(adapter_names)
        for modules in (self.lora_A, self.lora_B):
            for name, module in modules.items():
                module.requires_grad_(name in self.active_adapters and not inference_mode)

    def remove(self, adapter_name: str) -> None:
        """Forget one adapter; the others, and which names are active, stay."""
        for part in (*self.adapter_layer_names, *self.other_param_names):
            kept = getattr(self, part)
            if adapter_name in kept:
                del kept[adapter_name]

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The base layer's output plus the active adapters'.

        Args:
            x: ``(..., in_features)``.
            *args: for the base layer.
            **kwargs: for the base layer.

        Returns:
            ``(..., out_features)`` in the base layer's output dtype; the sum is made in the adapter's.
        """
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.lora_A:
                rows = self.lora_dropout[name](x.to(self.matrices(name)[0].dtype))
                result = result + self.lora_B[name](self.lora_A[name](rows)) * self.scaling[name]
        return result.to(dtype)


class Linear(LoraLayer):
    """LoRA around `torch.nn.Linear`; its weight is ``(out, in)``."""

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``, from the layer's fields: a quantised weight has another shape."""
        return base_layer.in_features, base_layer.out_features  # type: ignore[return-value]


class Conv1D(LoraLayer):
    """LoRA around transformers' ``Conv1D`` (GPT-2), a linear layer whose weight is stored as ``(in, out)``."""

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``."""
        in_features, out_features = base_layer.weight.shape  # type: ignore[misc]
        return in_features, out_features


def is_lora_layer(module: nn.Module) -> bool:
    """Whether a module is a LoRA layer, of this package or of PEFT."""
    parts = module._modules  # noqa: SLF001  (hasattr would ask modules that answer for the one they wrap)
    return "base_layer" in parts and "lora_A" in parts


def bare_module_names(root: nn.Module) -> list[str]:
    """Names of a model's modules as they were before wrapping: nothing from inside its LoRA layers."""
    names = []
    inside: str | None = None
    for name, module in root.named_modules():  # depth first: what is inside a layer follows it at once
        if name and not (inside is not None and name.startswith(inside)):
            names.append(name)
            inside = f"{name}." if is_lora_layer(module) else None
    return names


def wrap(name: str, module: nn.Module) -> LoraLayer:
    """The LoRA layer for one module of a model.

    Raises:
        ConfigError: a kind of module for which there is no layer here.
    """
    if isinstance(module, TransformersConv1D):
        return Conv1D(module)
    if isinstance(module, nn.Linear):
        return Linear(module)
    raise ConfigError(
        f"target module '{name}' is a {type(module).__name__}; adapters exist for torch.nn.Linear and "
        "transformers' Conv1D, so narrow target_modules"
    )
