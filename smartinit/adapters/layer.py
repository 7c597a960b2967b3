"""LoRA around one layer: ``h = W x + s·B A x``, ``s = alpha / r`` (arXiv 2106.09685, eq. 3).

Attribute and state-key names are PEFT's, so that code written for its layers works on these:
``base_layer``, ``lora_A.<adapter>.weight`` ``(r, in)``, ``lora_B.<adapter>.weight`` ``(out, r)``. What differs between
kinds of layers is in `smartinit.adapters.kinds`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from smartinit.adapters.start import start_of
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smartinit.config import LoraConfig
    from smartinit.factors import Trains


class LoraLayer(nn.Module):
    """A layer with any number of named low-rank adapters beside it.

    Args:
        base_layer: the layer as the model had it; it is called, never copied.

    Attributes:
        lora_A: adapter -> ``nn.Linear(in_features, r)`` without bias.
        lora_B: adapter -> ``nn.Linear(r, out_features)`` without bias.
        scaling: adapter -> ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv 2312.03732).
        start: adapter -> `Start`: what its matrices were, if its base was split. With ``base="offset"`` the layer
            subtracts their product: ``h = W x + s·B A x - s₀·B₀ A₀ x``.
        trains: adapter -> which of its matrices are trained; the other stays frozen even while it is active.
        active_adapters: the adapters that `forward` adds; names this layer does not have are passed over.
        disable_adapters: while true, `forward` is the base layer's.
    """

    # What belongs to one adapter, by where it is kept: the same two names as on PEFT's layers.
    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "trains", "start")

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
        self.trains: dict[str, Trains] = {}
        self.start = nn.ModuleDict()
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
        self.new_matrices(adapter_name, r, device=where, dtype=dtype)
        dropout = float(config.lora_dropout)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.r[adapter_name] = r
        self.use_rslora[adapter_name] = bool(config.use_rslora)
        self.trains[adapter_name] = "both"
        self.set_alpha(adapter_name, lora_alpha)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        for modules in (self.lora_A, self.lora_B, self.lora_dropout):
            if adapter_name in modules:
                modules[adapter_name].train(self.training)

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A and B of one adapter, without values."""
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False, device=device, dtype=dtype)

    def has(self, adapter_name: str) -> bool:
        """Whether this layer has an adapter of that name."""
        return adapter_name in self.r

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of one adapter, the parameters themselves: ``(r, in)`` and ``(out, r)``, see the kinds of layers."""
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
        for name in self.r:
            trained = name in self.active_adapters and not inference_mode
            for one, matrix in zip(("a", "b"), self.matrices(name), strict=True):
                matrix.requires_grad_(trained and self.trains.get(name, "both") in (one, "both"))

    def remove(self, adapter_name: str) -> None:
        """Forget one adapter; the others, and which names are active, stay."""
        for part in (*self.adapter_layer_names, *self.other_param_names):
            kept = getattr(self, part)
            if adapter_name in kept:
                del kept[adapter_name]

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The base layer's output plus the active adapters'.

        Args:
            x: what the base layer takes, ``(..., in_features)`` for a linear one.
            *args: for the base layer.
            **kwargs: for the base layer.

        Returns:
            The shape of the base layer's output, in its dtype; the sum is made in the adapter's.
        """
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if not self.has(name):
                continue
            update = self.product(name, x) * self.scaling[name]
            start = start_of(self, name)
            if start is not None and start.base == "offset":
                # Before the base's output is added: at the start the difference is exactly zero.
                update = update - self.low_rank(x, start.a, start.b) * start.scaling
            result = result + update
        return result.to(dtype)

    def product(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """``B A x`` of one adapter, with its dropout."""
        rows = self.lora_dropout[adapter_name](x.to(self.matrices(adapter_name)[0].dtype))
        product: torch.Tensor = self.lora_B[adapter_name](self.lora_A[adapter_name](rows))
        return product

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``b a x`` as this kind of layer multiplies: see `smartinit.adapters.kinds.low_rank_product`."""
        raise NotImplementedError


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
