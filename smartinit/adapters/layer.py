"""LoRA around one layer: ``h = W x + s·B A x``, ``s = alpha / r`` (arXiv 2106.09685, eq. 3).

Attribute and state-key names are PEFT's, so that code written for its layers works on these:
``base_layer``, ``lora_A.<adapter>.weight`` ``(r, in)``, ``lora_B.<adapter>.weight`` ``(out, r)``. What differs between
kinds of layers is in `smartinit.adapters.kinds`, weight decomposition in `smartinit.adapters.dora`, merging into the
base weight in `smartinit.adapters.merging`, batches whose rows have different adapters in `smartinit.adapters.mixed`.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from smartinit.adapters.dora import Magnitude, decomposed_update
from smartinit.adapters.filling import fill_tensors
from smartinit.adapters.mixed import mixed_update
from smartinit.adapters.scaling import Scaled
from smartinit.adapters.start import start_of
from smartinit.adapters.weight_change import LowRankChange, Shift
from smartinit.adapters.wrapped_layer import WrappedLayer
from smartinit.errors import ConfigError
from smartinit.targets.weight import host_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smartinit.adapters.start import OriginalWeight
    from smartinit.adapters.weight_change import WeightChange
    from smartinit.config import LoraConfig
    from smartinit.factors import Trains


class _Unfilled(nn.Linear):
    """A linear layer that draws no numbers when it is made."""

    def reset_parameters(self) -> None:
        """Nothing."""


def _linear(
    in_features: int, out_features: int, *, bias: bool, device: torch.device | str, dtype: torch.dtype
) -> nn.Linear:
    """A new `torch.nn.Linear`; on the meta device, which has no numbers, none are drawn: that takes long there."""
    if torch.device(device).type != "meta":
        return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    made: nn.Linear = _Unfilled(in_features, out_features, bias=bias, device=device, dtype=dtype)
    made.__class__ = nn.Linear  # what it is but for that
    return made


class LoraLayer(Scaled, WrappedLayer):
    """A layer with any number of named low-rank adapters beside it.

    Args:
        base_layer: the layer as the model had it; it is called, never copied.

    Attributes:
        lora_A: adapter -> ``nn.Linear(in_features, r)`` without bias.
        lora_B: adapter -> ``nn.Linear(r, out_features)``, with a bias if the configuration has ``lora_bias``.
        lora_magnitude_vector: adapter -> `Magnitude`, for the adapters with ``use_dora``.
        scaling: adapter -> ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv 2312.03732).
        start: adapter -> `Start`: what its matrices were, if its base was split. With ``base="offset"`` the layer
            subtracts their product: ``h = W x + s·B A x - s₀·B₀ A₀ x``.
        original_weight: the base weight from before it was split (or quantised) for an adapter; see `Start`.
        trains: adapter -> which of its matrices are trained; the other stays frozen even while it is active.
    """

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    lora_bias: dict[str, bool]
    trains: dict[str, Trains]
    original_weight: OriginalWeight | None

    adapter_layer_names: tuple[str, ...] = ("lora_A", "lora_B", "lora_magnitude_vector")
    other_param_names = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "trains",
        "start",
    )
    merged_parameter = "weight"
    """The parameter of the base layer that `get_delta_weight` is for."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.start = nn.ModuleDict()
        # Past torch, which would look at each whether it is a module or a tensor, for thousands of layers.
        values = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "trains")
        vars(self).update({name: {} for name in values}, original_weight=None)

    def adapters(self) -> list[str]:
        """The adapters that have matrices here."""
        return list(self.r)

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
            config: dropout, rank stabilisation, DoRA, bias, kind of start.
            device: where its weights lie; None: where the base layer's do.

        Raises:
            ConfigError: the rank is not positive, or the configuration has an option that this kind of layer has not.
        """
        if r <= 0:
            raise ConfigError(f"the rank of adapter '{adapter_name}' must be at least 1, not {r}")
        self.check_config(config)
        base = self.any_tensor()
        # Half precision cannot hold the small updates of A and B: PEFT trains them in float32 as well.
        dtype = base.dtype if base.dtype in (torch.float32, torch.float64) else torch.float32
        where = base.device if device is None else device
        self.lora_bias[adapter_name] = bool(config.lora_bias)
        self.new_matrices(adapter_name, r, device=where, dtype=dtype)
        dropout = float(config.lora_dropout)
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.r[adapter_name] = r
        self.use_rslora[adapter_name] = bool(config.use_rslora)
        self.trains[adapter_name] = "both"
        self.set_alpha(adapter_name, lora_alpha)
        # New matrices are random; drawn once, they are PEFT's for one seed. On the meta device nothing is drawn.
        if config.init_lora_weights is not False and torch.device(where).type != "meta":
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.use_dora[adapter_name] = bool(config.use_dora)
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = Magnitude(self, adapter_name)
        for part in (*self.adapter_layer_names, "lora_dropout"):
            modules = getattr(self, part)
            if isinstance(modules, nn.ModuleDict) and adapter_name in modules:
                made = modules[adapter_name]
                if made.training != self.training:  # it tells every module inside, one by one
                    made.train(self.training)

    def check_config(self, config: LoraConfig) -> None:
        """Refuse, or warn of, options that do not go with this layer.

        Raises:
            ConfigError: this kind of layer does not have such an option.
        """
        if config.lora_bias and self.bias is None:
            warnings.warn(
                f"lora_bias=True gives a bias to the adapter of a {type(self.get_base_layer()).__name__} that has "
                "none itself, so the adapter cannot be merged into it",
                stacklevel=2,
            )

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A and B of one adapter, without values."""
        biased = self.lora_bias[adapter_name]
        self.lora_A[adapter_name] = _linear(self.in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B[adapter_name] = _linear(r, self.out_features, bias=biased, device=device, dtype=dtype)

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of one adapter, the parameters themselves: ``(r, in)`` and ``(out, r)``, see the kinds of layers."""
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight  # type: ignore[return-value]

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """Give one adapter its start without data.

        ``True``: A uniform in ±1/√in (Kaiming with a = √5), B zero. ``"gaussian"``: A normal with deviation 1/r, B
        zero. ``False``: B random too, so that the adapter is not neutral (for tests). The name of a data-driven
        method: as ``True``; its factors are written later. A bias is zero, with ``False`` uniform in ±1/√r.
        """
        a, b = self.matrices(adapter_name)
        if isinstance(init_lora_weights, str) and init_lora_weights.lower() == "gaussian":
            nn.init.normal_(a, std=1 / self.r[adapter_name])
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init_lora_weights is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        else:
            nn.init.zeros_(b)
        if self.lora_bias.get(adapter_name):
            bias: torch.Tensor = self.lora_B[adapter_name].bias  # type: ignore[assignment]
            if init_lora_weights is False:
                bound = 1 / math.sqrt(self.r[adapter_name])
                nn.init.uniform_(bias, -bound, bound)
            else:
                nn.init.zeros_(bias)

    def set_adapter(self, adapter_names: Sequence[str], *, inference_mode: bool = False) -> None:
        """Make these adapters the active ones and, unless ``inference_mode``, the trainable ones."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        for name in self.r:
            trained = self.trains.get(name, "both")
            if trained != "both":
                a, b = self.matrices(name)
                (b if trained == "a" else a).requires_grad_(False)

    def forward(
        self, x: torch.Tensor, *args: object, adapter_names: Sequence[str] | None = None, **kwargs: object
    ) -> torch.Tensor:
        """The base layer's output plus the active adapters'.

        Args:
            x: what the base layer takes, ``(..., in_features)`` for a linear one.
            *args: for the base layer.
            adapter_names: an adapter for every row of ``x``, in place of the active ones.
            **kwargs: for the base layer.

        Returns:
            The shape of the base layer's output, in its dtype; the sum is made in the adapter's.
        """
        if self.disable_adapters or self.merged_adapters:
            return self.merged_forward(x, *args, adapter_names=adapter_names, **kwargs)
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return mixed_update(self, x, result, adapter_names)
        dtype = result.dtype
        for name in self.active_adapters:
            if name in self.r:
                result = self.update(name, x, result)
        return result.to(dtype)

    def merged_forward(
        self, x: torch.Tensor, *args: object, adapter_names: Sequence[str] | None, **kwargs: object
    ) -> torch.Tensor:
        """`forward` of a layer that adds nothing to its base: disabled, or merged into it.

        Raises:
            ConfigError: rows are to have adapters of their own while others are merged.
        """
        if self.disable_adapters:
            self.unmerge()
        elif adapter_names is not None:
            raise ConfigError(
                f"adapter_names cannot be used while {', '.join(self.merged_adapters)} is merged into the base "
                "weights: call unmerge_adapter() first"
            )
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def update(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """``result`` with one adapter's contribution added, in the wider of the two dtypes.

        Args:
            adapter_name: which one; it must be here.
            x: the layer's input.
            result: what the base layer, and adapters before this one, made of it.
        """
        if adapter_name in self.lora_magnitude_vector:
            return decomposed_update(self, adapter_name, x, result)
        update = self.product(adapter_name, self.dropped(adapter_name, x))
        start = start_of(self, adapter_name)
        if start is not None and start.base == "offset":
            # Before the base's output is added: at the start the difference is exactly zero.
            update = update - self.low_rank(x, start.a, start.b, start.scaling)
        return result + update

    def dropped(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """The input of one adapter: ``x`` in the dtype of its matrices, with its dropout."""
        rows: torch.Tensor = self.lora_dropout[adapter_name](x.to(self.matrices(adapter_name)[0].dtype))
        return rows

    def drops(self, adapter_name: str) -> bool:
        """Whether dropout changes the input of one adapter now."""
        dropout = self.lora_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training

    def product(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """``s·(B A x + b)`` of one adapter for what `dropped` gave; b is there with ``lora_bias`` only."""
        inner: torch.Tensor = self.lora_A[adapter_name](rows)
        scaling = self.scaling[adapter_name]
        if self.lora_bias[adapter_name]:
            product: torch.Tensor = self.lora_B[adapter_name](inner) * scaling
        else:  # scaling the r numbers of a row costs less than scaling its out_features
            product = self.lora_B[adapter_name](inner * scaling)
        return product

    def other_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The bias of one adapter's B, with ``lora_bias``."""
        biased = self.lora_bias.get(adapter_name) and adapter_name in self.lora_B
        return {"lora_B.bias": cast("torch.Tensor", self.lora_B[adapter_name].bias)} if biased else {}

    def load_others(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `other_tensors`, in place."""
        device = self.any_tensor().device
        fill_tensors(self.other_tensors(adapter_name), tensors, f"adapter '{adapter_name}'", device)

    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of a magnitude, which broadcasts against the layer's output: ``(out,)``."""
        return (self.out_features,)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """``s·B A`` of one adapter, less its start with ``base="offset"``, in the shape in which the base stores W.

        Without the magnitude of DoRA, as in PEFT; in the dtype of B, multiplied in at least float32.

        Cost: ``2·r·out·in``.
        """
        left, right = self.delta_factors(adapter_name)
        kept = self.matrices(adapter_name)[1].dtype
        wide = torch.promote_types(kept, torch.float32)
        delta = (left.to(wide) @ right.to(wide)).to(kept)
        stored = getattr(self.get_base_layer(), self.merged_parameter, None)  # that of a packed weight is no guide
        return delta.reshape(stored.shape) if stored is not None and stored.numel() == delta.numel() else delta

    def changes(self, adapter_name: str) -> list[WeightChange]:
        """What merging one adapter does to the base layer: its weight, and with ``lora_bias`` its bias.

        Raises:
            ConfigError: the adapter has a bias and the base layer has none; the adapter has no values yet.
        """
        base = self.get_base_layer()
        if any(matrix.is_meta for matrix in self.parameters_of(adapter_name)):
            raise ConfigError(
                f"adapter '{adapter_name}' is on the meta device (low_cpu_mem_usage), without values: load it first"
            )
        left, right = self.delta_factors(adapter_name)
        magnitude = None
        if adapter_name in self.lora_magnitude_vector:
            magnitude = cast("torch.Tensor", self.lora_magnitude_vector[adapter_name].weight).detach()
        columns = host_of(base) in ("conv1d", "embedding")
        found: list[WeightChange] = [
            LowRankChange(base, self.merged_parameter, adapter_name, left, right, magnitude, columns)
        ]
        if self.lora_bias.get(adapter_name):
            if getattr(base, "bias", None) is None:
                raise ConfigError(
                    f"adapter '{adapter_name}' has a bias (lora_bias=True), but the {type(base).__name__} that it is "
                    "on has none to merge it into; use the adapter unmerged, or train it with lora_bias=False"
                )
            bias = cast("torch.Tensor", self.lora_B[adapter_name].bias).detach()
            found.append(Shift(base, "bias", adapter_name, bias.double() * self.scaling[adapter_name]))
        return found

    @torch.no_grad()
    def delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``left, right`` whose product is the delta, see `stored_factors`; ``s`` is in ``left``, which is wider.

        With ``base="offset"`` both have the start at their ends, so that one product gives the difference.
        """
        left, right = self.stored_factors(*self.matrices(adapter_name))
        wide = torch.float32 if left.device.type == "mps" else torch.float64
        left, right = left.to(wide) * self.scaling[adapter_name], right.to(wide)
        start = start_of(self, adapter_name)
        if start is not None and start.base == "offset":
            first, second = self.stored_factors(start.a, start.b)
            left = torch.cat([left, first.to(left) * -start.scaling], dim=-1)
            right = torch.cat([right, second.to(right)], dim=-2)
        return left, right

    def stored_factors(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``b a`` as ``left (rows, r) @ right (r, columns)`` in the order of the stored weight's dimensions."""
        a, b = a.detach().flatten(1), b.detach().flatten(1)
        return (a.T, b.T) if host_of(self.get_base_layer()) in ("conv1d", "embedding") else (b, a)

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """``s·b a x`` as this kind of layer multiplies: see `smartinit.adapters.kinds.low_rank_product`."""
        raise NotImplementedError
