"""The kinds of layers that can carry adapters, and what differs between them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from smartinit.adapters.dequantise import dequantised_weight, is_quantised
from smartinit.adapters.layer import LoraLayer
from smartinit.errors import ConfigError
from smartinit.targets.weight import Target, host_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from smartinit.config import LoraConfig
    from smartinit.targets.weight import Host

# By the number of dimensions of a weight.
_CONVOLUTIONS: Mapping[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_CONVOLVE: Mapping[int, Callable[..., torch.Tensor]] = {
    3: functional.conv1d,
    4: functional.conv2d,
    5: functional.conv3d,
}


class Linear(LoraLayer):
    """LoRA around `torch.nn.Linear`, whose weight is ``(out, in)``, or around a quantised layer that stands for one."""

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_features, out_features)``: of the weight where it is one, else what the layer says of itself."""
        target = Target.of(base_layer, "base_layer")
        return target.in_features, target.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's."""
        return getattr(self.get_base_layer(), "bias", None)

    def check_config(self, config: LoraConfig) -> None:
        """Warn of ``fan_in_fan_out``, which the layer itself answers, where it says something else."""
        super().check_config(config)
        if config.fan_in_fan_out and isinstance(self.get_base_layer(), nn.Linear):
            warnings.warn(
                "fan_in_fan_out=True is passed over: a torch.nn.Linear stores its weight as (out, in)", stacklevel=2
            )

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """``s·b a x`` of rows ``x (..., in)``."""
        return low_rank_product(self.get_base_layer(), x, a, b, scaling)

    def weight_matrix(self) -> torch.Tensor:
        """``W (out, in)``: the base weight itself, or what a quantised one stands for.

        Raises:
            ModelError: it is quantised in a way that nobody can read here.
        """
        base: Any = self.get_base_layer()
        return dequantised_weight(base) if _is_packed(base) else base.weight

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """``W x`` without the bias, for rows ``x (..., in)``."""
        base: Any = self.get_base_layer()
        if type(base).forward is nn.Linear.forward:
            return functional.linear(x, base.weight)
        product: torch.Tensor = base(x)  # a layer with a kernel of its own
        bias = self.bias
        return product if bias is None else product - bias


class Conv1D(Linear):
    """LoRA around transformers' ``Conv1D`` (GPT-2), a linear layer whose weight is stored as ``(in, out)``."""

    def check_config(self, config: LoraConfig) -> None:
        """Nothing to say: whatever ``fan_in_fan_out`` is, the layer knows better, and PEFT corrects it too."""

    def weight_matrix(self) -> torch.Tensor:
        """``W (out, in)``."""
        return self.weight.T

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """``W x`` without the bias, for rows ``x (..., in)``."""
        return torch.matmul(x, self.weight)


class Convolution(LoraLayer):
    """LoRA around `torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d`` without groups.

    A is a convolution like the base layer's, ``(r, in_channels, *kernel)``; B one of single points, ``(out, r, 1, …)``.
    PEFT's A lacks the base layer's dilation and padding mode; this one has them. As a matrix, ``W`` is the weight with
    all dimensions but the first as one, ``(out, in_channels·∏ kernel)``.
    """

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(in_channels, out_channels)``."""
        return base_layer.in_channels, base_layer.out_channels  # type: ignore[return-value]

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A and B of one adapter, without values."""
        base: Any = self.get_base_layer()
        kind: Any = _CONVOLUTIONS[base.weight.dim()]
        self.lora_A[adapter_name] = kind(
            base.in_channels,
            r,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
            padding_mode=base.padding_mode,
            device=device,
            dtype=dtype,
        )
        biased = self.lora_bias[adapter_name]
        self.lora_B[adapter_name] = kind(r, base.out_channels, 1, bias=biased, device=device, dtype=dtype)

    def magnitude_shape(self) -> tuple[int, ...]:
        """``(1, out, 1, …)``."""
        return (1, self.out_features, *(1 for _ in range(self.weight.dim() - 2)))

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """``s·b a x`` of ``x (batch, in_channels, …)``."""
        return low_rank_product(self.get_base_layer(), x, a, b, scaling)

    def weight_matrix(self) -> torch.Tensor:
        """``W (out, in_channels·∏ kernel)``."""
        return self.weight.flatten(1)

    def base_product(self, x: torch.Tensor) -> torch.Tensor:
        """``W x`` without the bias, for ``x (batch, in_channels, …)``."""
        base: Any = self.get_base_layer()
        product: torch.Tensor = base._conv_forward(x, base.weight, None)  # noqa: SLF001 - pads in the layer's mode
        return product


class Embedding(LoraLayer):
    """LoRA around `torch.nn.Embedding`: ``A (r, num_embeddings)``, ``B (embedding_dim, r)``, parameters as in PEFT."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    @staticmethod
    def features(base_layer: nn.Module) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return base_layer.num_embeddings, base_layer.embedding_dim  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """None: embeddings have none."""
        return None

    def check_config(self, config: LoraConfig) -> None:
        """As PEFT, embeddings have no ``lora_bias``.

        Raises:
            ConfigError: the configuration has it.
        """
        if config.lora_bias:
            raise ConfigError(
                "lora_bias=True cannot be used with an embedding, whose adapter has no bias; leave the embedding out "
                "of target_modules, or set lora_bias=False"
            )

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A and B of one adapter, without values."""
        # Normal as in PEFT's: what the random generator gives afterwards is then the same.
        a = torch.randn(r, self.in_features, device=device, dtype=dtype)
        b = torch.randn(self.out_features, r, device=device, dtype=dtype)
        self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name] = nn.Parameter(a), nn.Parameter(b)

    def matrices(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``A (r, num_embeddings)`` and ``B (embedding_dim, r)``, the parameters themselves."""
        return self.lora_embedding_A[adapter_name], self.lora_embedding_B[adapter_name]

    @torch.no_grad()
    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str = True) -> None:
        """As PEFT: A zero and B normal; both normal with ``False``."""
        a, b = self.matrices(adapter_name)
        nn.init.normal_(b)
        if init_lora_weights is False:
            nn.init.normal_(a)
        else:
            nn.init.zeros_(a)

    def dropped(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself: numbers of tokens know no dropout."""
        del adapter_name
        return x

    def drops(self, adapter_name: str) -> bool:
        """Never."""
        del adapter_name
        return False

    def product(self, adapter_name: str, rows: torch.Tensor) -> torch.Tensor:
        """``s·B A`` times one-hot rows, given by their numbers."""
        return self.low_rank(rows, *self.matrices(adapter_name), self.scaling[adapter_name])

    def low_rank(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """``s·b a x`` of one-hot rows, given by their numbers."""
        return low_rank_product(self.get_base_layer(), x, a, b, scaling)

    def weight_matrix(self) -> torch.Tensor:
        """``W (embedding_dim, num_embeddings)``."""
        return self.weight.T


def low_rank_product(
    base_layer: nn.Module, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float = 1.0
) -> torch.Tensor:
    """``s·b a x`` as ``base_layer`` would multiply, in the dtype of ``a``; ``a (rank, in)`` and ``b (out, rank)``.

    Args:
        base_layer: a linear layer, transformers' ``Conv1D``, a convolution or an ``Embedding``.
        x: its input.
        a: first factor, as a matrix or in the layer's own shape.
        b: second factor, likewise.
        scaling: ``s``; it multiplies what ``a`` gives, of which there is least.
    """
    if isinstance(base_layer, nn.Embedding):
        picked = functional.embedding(
            x,
            a.T,
            padding_idx=base_layer.padding_idx,
            scale_grad_by_freq=base_layer.scale_grad_by_freq,
            sparse=base_layer.sparse,
        )
        rows = picked * scaling @ b.T
        scale = getattr(base_layer, "embed_scale", None)  # some models scale what their embeddings give
        if scale is None:
            return rows
        return rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)
    x = x.to(a.dtype)
    if isinstance(base_layer, tuple(_CONVOLUTIONS.values())):
        convolution: Any = base_layer
        kernel = a.reshape(-1, *convolution.weight.shape[1:])
        # The layer's own method pads in its own mode.
        inner = convolution._conv_forward(x, kernel, None)  # noqa: SLF001
        points = b.reshape(*b.shape[:2], *(1 for _ in kernel.shape[2:]))
        return _CONVOLVE[kernel.dim()](inner * scaling, points)
    return functional.linear(functional.linear(x, a) * scaling, b)


def _is_packed(base_layer: nn.Module) -> bool:
    """Whether the weight has to be unpacked to be read."""
    weight = getattr(base_layer, "weight", None)
    ordinary = type(weight) in (nn.Parameter, torch.Tensor) and weight.is_floating_point()  # type: ignore[union-attr]
    return not ordinary and is_quantised(base_layer)


_KINDS: Mapping[Host, type[LoraLayer]] = {
    "linear": Linear,
    "conv1d": Conv1D,
    "convolution": Convolution,
    "embedding": Embedding,
}


def wrap(name: str, module: nn.Module) -> LoraLayer:
    """The LoRA layer for one module of a model.

    Raises:
        ConfigError: a kind of module for which there is no layer here.
    """
    host = host_of(module)
    if host is None:
        raise ConfigError(
            f"target module '{name}' is a {type(module).__name__}; adapters exist for linear layers (also quantised), "
            "transformers' Conv1D, convolutions without groups and embeddings without max_norm, so narrow "
            "target_modules"
        )
    return _KINDS[host](module)
