"""The adapter of one parallel layer into its base weights, and the weights back.

Each rank adds its shard of the update to its shard of the weight: in float32 at least, rounded once to the dtype of the
weight. What the weight was is kept in the host's memory. The steps are separate, as several ranks must go through them
together: `check_writable`, then `changes_of` (collective), then `put_in`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from smartinit.adapters.finite import is_finite
from smartinit.adapters.parallel.adapter import LowRankAdapter
from smartinit.adapters.parallel.decomposed import DecomposedLayer
from smartinit.adapters.parallel.dtensors import to_local
from smartinit.adapters.parallel.split import SplitAdapter
from smartinit.adapters.parallel.weights import is_ordinary, weight_names
from smartinit.errors import ModelError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from smartinit.adapters.parallel.layer import AdaptedLayer
    from smartinit.adapters.parallel.split import Interleaving


@dataclass(frozen=True)
class Product:
    """``s·B A``, added to some rows of one weight.

    Attributes:
        a: ``(r, in)``, or this rank's columns of it.
        b: ``(rows, r)``.
        scaling: ``s``.
        part: the projection whose rows these are; empty: all rows.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    part: str = ""


@dataclass(frozen=True)
class Change:
    """What becomes of one weight: ``q ⊙ (W + Σ s·B A)``.

    Attributes:
        products: what is added.
        rows: where the rows of a product's part are.
        magnitude: ``m (out,)`` and the norms of ``W + s·B A``, whose quotient is q; None: one.
    """

    products: tuple[Product, ...]
    rows: Interleaving | None = None
    magnitude: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight, in the dtype and on the device of ``weight``, which stays as it is.

        Cost: ``2·r·out·in`` a product; two temporaries of the weight's size in float32.
        """
        device = weight.device
        wide = torch.promote_types(torch.promote_types(weight.dtype, self.products[0].a.dtype), torch.float32)
        made = weight.to(wide, copy=True)
        for product in self.products:
            a, b = product.a.to(device, wide), product.b.to(device, wide)
            if self.rows is None:
                made.addmm_(b, a, alpha=product.scaling)
                continue
            units = self.rows.parts[product.part]
            place = self.rows.view(made, 0)[:, units.start : units.stop]
            place += (b @ a).mul_(product.scaling).view(place.shape)
        if self.magnitude is not None:
            m, norms = (values.to(device) for values in self.magnitude)
            made.mul_((m / norms).to(wide)[:, None])  # the norms may be in float64
        return made.to(weight.dtype)


def check_writable(layer: AdaptedLayer) -> None:
    """Whether the base weights of a layer can be written to.

    Raises:
        ModelError: they are no parameters of floating-point numbers, not here, or not in the shape that the adapter
            was made for.
    """
    base, module = layer.base, layer.to_wrap
    rows = base.out_features // (base.size if base.split == "column" else 1)
    columns = base.in_features // (base.size if base.split == "row" else 1)
    for name in weight_names(base):
        parameter = module._parameters.get(name)  # noqa: SLF001 - torch has no public way to ask
        local = None if parameter is None else to_local(parameter.detach())
        why = ""
        if local is None:
            why = "is not a parameter but computed (a parametrisation?)"
        elif not is_ordinary(local):
            why = f"is stored as {type(local).__name__} of shape {tuple(local.shape)}, {local.dtype} (quantised?)"
        elif local.is_meta:
            why = "is on the meta device, without values"
        elif local.is_inference():
            why = "was made in torch's inference mode"
        elif tuple(local.shape) != (rows, columns):
            why = f"has {tuple(local.shape)} numbers on this rank, not {(rows, columns)} (shared by fully_shard?)"
        if why:
            raise ModelError(
                f"the {name} of '{layer.name}' ({type(module).__name__}) {why}, so no adapter can be merged into it; "
                "merge into a model that is loaded whole and unquantised"
            )


@torch.no_grad()
def changes_of(layer: AdaptedLayer) -> list[Change]:
    """What the adapter makes of each of the layer's weights; collective over the ranks that share the layer.

    Cost: it gathers the factors that are in shards, ``r·(in + out)`` numbers at most.
    """
    count = max(1, layer.base.experts)
    with without_autocast(layer):
        if isinstance(layer.adapter, SplitAdapter):
            adapters: dict[str, nn.Module] = dict(layer.adapter.items())
            rows: Interleaving | None = layer.adapter.rows
        else:
            adapters, rows = {"": layer.adapter}, None
        products: list[list[Product]] = [[] for _ in range(count)]
        for part, adapter in adapters.items():
            if not isinstance(adapter, LowRankAdapter):
                raise ModelError(f"'{layer.name}' has an adapter of another kind, {type(adapter).__name__}")
            a, b = adapter.product_factors()
            for i, own in enumerate(products):
                one = (a, b) if a.dim() == 2 else (a[i], b[i])  # noqa: PLR2004 - one matrix for all, or one for each
                own.append(Product(*one, adapter.scaling, part))
        if not isinstance(layer, DecomposedLayer):
            return [Change(tuple(own), rows) for own in products]
        norms = layer.adapter.row_norms(layer.weights())
        m = layer.adapter.weight_magnitude.detach()
        pairs = zip(m, norms, strict=True) if layer.base.experts else [(m, norms)]
        return [Change(tuple(own), None, pair) for own, pair in zip(products, pairs, strict=True)]


@torch.inference_mode(mode=False)
@torch.no_grad()
def put_in(layer: AdaptedLayer, changes: list[Change]) -> None:
    """Write the changed weights; the adapter adds nothing from now on.

    Raises:
        ModelError: NaN or Inf in one of them. The layer is then as it was.
    """
    originals: dict[str, torch.Tensor] = {}
    try:
        with without_autocast(layer):
            for name, change in zip(weight_names(layer.base), changes, strict=True):
                weight = _local(layer, name)
                changed = change.of(weight)
                _require_finite(changed, name, layer.name)
                originals[name] = weight.to("cpu", copy=True)
                weight.copy_(changed)
    except BaseException:
        _restore(layer, originals)
        raise
    layer.originals, layer.merged = originals, True


@torch.inference_mode(mode=False)
@torch.no_grad()
def take_out(layer: AdaptedLayer) -> None:
    """Put the original weights back, bit for bit; the adapter adds its update again. Nothing if it is not merged."""
    if layer.merged:
        _restore(layer, layer.originals)
        layer.originals, layer.merged = {}, False


def without_autocast(layer: AdaptedLayer) -> AbstractContextManager[object]:
    """Autocast would round the products."""
    device = _local(layer, weight_names(layer.base)[0]).device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _require_finite(weight: torch.Tensor, name: str, layer_name: str) -> None:
    if not is_finite(weight):
        raise ModelError(
            f"the {name} of '{layer_name}' would hold NaN or Inf with its adapter merged into it, so nothing is "
            "merged; load an adapter (and a base model) whose values are finite"
        )


def _restore(layer: AdaptedLayer, originals: dict[str, torch.Tensor]) -> None:
    for name, values in originals.items():
        _local(layer, name).copy_(values)


def _local(layer: AdaptedLayer, name: str) -> torch.Tensor:
    """This rank's numbers of a base weight: the very memory."""
    parameter: torch.Tensor = getattr(layer.to_wrap, name)
    return to_local(parameter.detach())
