"""LoRA on bare parameters, such as the fused weights of experts: ``target_parameters``.

Mixture-of-experts models of transformers 5 keep the weights of all experts of a block in one parameter of three
dimensions, and no layer is called that could be wrapped. Here the module that owns the parameter is wrapped, and while
it runs the parameter reads as ``W + s·B A``. Two parameters of one module get two parts, one around the other.

Shapes, names and the order of the axes are PEFT's (0.21.2, ``ParamWrapper``), for E experts:

- the parameter: ``(E, out, in)``, or ``(E, in, out)`` where its module says ``is_transposed`` (gpt-oss); ``(out, in)``
  is E = 1
- ``lora_A.<adapter>.weight (E·r, in)``: row ``e·r + k`` is direction k of expert e
- ``lora_B.<adapter>.weight (out, r·E)``: column ``k·E + e`` is direction k of expert e, the other way round
- in files the inner of two parts has ``<module>.base_layer.lora_A.weight``, the outer ``<module>.lora_A.weight``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.func import functional_call

from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.start import start_of
from smartinit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

_WRAPPED = ".base_layer"


class ParameterLora(LoraLayer):
    """LoRA around a module, on one of its parameters.

    While the module runs, its parameter is replaced by ``W + s·B A``: one more tensor of the size of the parameter,
    E·out·in, which autograd keeps until the backward pass has used it, where its gradient is another one. Gradient
    checkpointing brings that down to one block at a time. Whoever reads the parameter from outside of the module's
    ``forward`` gets ``W``. The module's own ``_parameters`` hold the sum only during the call, whatever the call
    raises, so state dicts and copies never see it.

    Args:
        base_layer: the module as the model had it, or the part on another of its parameters.
        parameter_name: which of the module's own parameters.

    Attributes:
        parameter_name: its name in the module.
        experts: E, how many matrices it stacks; 1 for a parameter of two dimensions.
        transposed: whether it stores ``(in, out)``.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        self.parameter_name = self.merged_parameter = parameter_name  # `features` reads it
        super().__init__(base_layer)
        self.experts = self.weight.shape[0] if self.weight.ndim == 3 else 1  # noqa: PLR2004 - dimensions
        self.transposed = self._is_transposed(self.get_base_layer())

    def features(self, base_layer: nn.Module) -> tuple[int, int]:  # type: ignore[override]  # depends on the parameter
        """``(in_features, out_features)`` of one expert."""
        rows, columns = getattr(base_layer, self.parameter_name).shape[-2:]
        return (rows, columns) if self._is_transposed(base_layer) else (columns, rows)

    @property
    def weight(self) -> torch.Tensor:
        """The parameter, without adapters."""
        weight: torch.Tensor = getattr(self.get_base_layer(), self.parameter_name)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        """None: the module's bias is a parameter of its own."""
        return None

    def full_name(self, path: str) -> str:
        """The parameter's name in the model without adapters, by which patterns know it, for a part at ``path``."""
        return f"{path.replace(_WRAPPED, '')}.{self.parameter_name}"

    def new_matrices(self, adapter_name: str, r: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        """Make A ``(E·r, in)`` and B ``(out, r·E)`` of one adapter, without values."""
        super().new_matrices(adapter_name, r * self.experts, device=device, dtype=dtype)

    def factors_of(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``a (E·r, in)`` and ``b (out, r·E)`` expert by expert: views ``(E, r, in)`` and ``(E, out, r)``."""
        return a.unflatten(0, (self.experts, -1)), b.unflatten(1, (-1, self.experts)).permute(2, 0, 1)

    def stored_tensor(self) -> torch.Tensor:
        """The parameter."""
        return self.weight

    def stored_factors(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``left (E, rows, r)`` and ``right (E, r, columns)``, without E for a parameter of two dimensions."""
        left, right = self._product(a.detach(), b.detach())
        return (left, right) if self.weight.ndim == 3 else (left[0], right[0])  # noqa: PLR2004 - dimensions

    def adapted_weight(self, adapter_names: Sequence[str]) -> torch.Tensor:
        """``W + s·B A`` with several adapters, differentiable, in the parameter's dtype.

        The matrices are rounded to that dtype first, as in PEFT: the product is then summed inside one kernel, and
        no second tensor of the parameter's size is held. O(E·out·in·r) each.

        Raises:
            ModelError: the parameter is on the meta device and the adapter is not: it is offloaded, and would be
                fetched in place of the sum.
        """
        weight = self.weight
        if weight.is_meta and not self.matrices(adapter_names[0])[0].is_meta:
            raise ModelError(
                f"parameter '{self.parameter_name}' of a {type(self.get_base_layer()).__name__} is offloaded (on the "
                "meta device), so no adapter can be added to it; keep the modules with target_parameters in memory"
            )
        total = self._stacked(weight)
        # Under autocast the product would come in another dtype than the parameter's.
        with torch.autocast(device_type=weight.device.type, enabled=False):
            for number, name in enumerate(adapter_names):
                left, right = (factor.to(weight.dtype) for factor in self._product(*self.matrices(name)))
                start = start_of(self, name)
                if start is not None and start.base == "offset":
                    first, second = (factor.to(weight.dtype) for factor in self._product(start.a, start.b))
                    # The difference first: at the start it is exactly zero.
                    total = total + (left @ right * self.scaling[name] - first @ second * start.scaling)
                elif number:  # a tensor of our own, which no backward pass reads
                    total = total.baddbmm_(left, right, alpha=self.scaling[name])
                else:
                    total = torch.baddbmm(total, left, right, alpha=self.scaling[name])
        return total.reshape(weight.shape)

    def forward(
        self,
        *args: Any,  # noqa: ANN401
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """The module's output with the active adapters in its parameter.

        Args:
            *args: for the module.
            adapter_names: an adapter for every row of the batch, in place of the active ones.
            **kwargs: for the module.

        Raises:
            ConfigError: rows with different adapters: experts see tokens, not rows, and have one weight per call.
        """
        names = self._acting(adapter_names)
        if not names:
            return self.base_layer(*args, **kwargs)
        path, inner = self.parameter_name, self.base_layer
        while isinstance(inner, ParameterLora):
            path, inner = f"base_layer.{path}", inner.base_layer
        return functional_call(self.base_layer, {path: self.adapted_weight(names)}, args, kwargs, tie_weights=False)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows: several parts may be around one module."""
        return f"parameter_name={self.parameter_name!r}"

    def _acting(self, adapter_names: Sequence[str] | None) -> list[str]:
        """The adapters that this call adds to the parameter."""
        if self.disable_adapters:
            self.unmerge()
            return []
        if adapter_names is None:
            return [] if self.merged_adapters else [name for name in self.active_adapters if name in self.r]
        if self.merged_adapters:
            raise ConfigError(
                f"adapter_names cannot be used while {', '.join(self.merged_adapters)} is merged into the base "
                "weights: call unmerge_adapter() first"
            )
        wanted = set(adapter_names)
        here = [name for name in self.r if name in wanted]
        if here and len(wanted) > 1:
            raise ConfigError(
                f"adapter_names gives the rows different adapters ({', '.join(sorted(wanted))}), which "
                f"target_parameters cannot: parameter '{self.parameter_name}' has one value for the whole batch; "
                "run one batch per adapter"
            )
        return here

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two stacks whose product has the parameter's layout."""
        right, left = self.factors_of(a, b)
        return (right.transpose(1, 2), left.transpose(1, 2)) if self.transposed else (left, right)

    def _is_transposed(self, base_layer: nn.Module) -> bool:
        """As PEFT: a module says it of its stacked parameters; a matrix is ``(out, in)`` whatever it says."""
        stacked = getattr(base_layer, self.parameter_name).ndim == 3  # noqa: PLR2004 - dimensions
        return stacked and bool(getattr(base_layer, "is_transposed", False))

    @staticmethod
    def _stacked(weight: torch.Tensor) -> torch.Tensor:
        """``(E, rows, columns)``, a view."""
        return weight if weight.ndim == 3 else weight.unsqueeze(0)  # noqa: PLR2004 - dimensions


def parameter_names(root: nn.Module) -> dict[str, str]:
    """Module name of each part on a parameter -> name of the parameter in the model without adapters."""
    return {path: part.full_name(path) for path, part in root.named_modules() if isinstance(part, ParameterLora)}
