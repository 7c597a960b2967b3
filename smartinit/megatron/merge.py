"""Adapters into the base weights, in Megatron Bridge's words, and out again."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.collectives import gathered, size_of, summed
from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.adapters.parallel.merging import Change, Product, changes_of, check_writable, put_in, take_out
from smartinit.adapters.parallel.weights import weight_names
from smartinit.config import checks
from smartinit.errors import ConfigError, ModelError
from smartinit.megatron.agreement import failing_together
from smartinit.megatron.recompute import keep_gradients_out
from smartinit.megatron.walk import adapted_layers, chunks_of, install, places

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.distributed import ProcessGroup

    from smartinit.megatron.walk import Model

M = TypeVar("M", nn.Module, list[nn.Module])


class LoRAMerge:
    """Merges adapters (of LoRA, DoRA and CanonicalLoRA) into the weights beside which they are trained.

    ``LoRAMerge()(model)`` merges all adapters of a model, also those that are switched off: the layers then compute
    with one weight, and the adapters add nothing. `unmerge` brings the weights back bit for bit, `unload` removes the
    adapters and leaves the weights as they are, merged or not. The keys of state dicts stay what they were until then.
    """

    @torch.no_grad()
    def merge(
        self,
        base_weight: torch.Tensor,
        linear_out: torch.Tensor,
        linear_in: torch.Tensor,
        alpha: float,
        dim: int,
        *,
        tp_size: int = 1,
        tp_group: ProcessGroup | None = None,
    ) -> torch.Tensor:
        """``W + alpha/dim·B A``, or this rank's shard of it; collective if there are several ranks.

        Which factor is gathered follows from the shapes: beside a column-parallel weight ``(out/t, in)`` A is
        ``(dim/t, in)`` and B ``(out/t, dim)``; beside a row-parallel one ``(out, in/t)`` A is ``(dim, in/t)`` and B
        ``(out/t, dim)``.

        Args:
            base_weight: W or this rank's shard.
            linear_out: B, or this rank's rows of it.
            linear_in: A, or this rank's shard.
            alpha: numerator of the scaling.
            dim: rank of the whole update.
            tp_size: t, the tensor-parallel size.
            tp_group: those ranks; None: all ranks, if they are t.

        Returns:
            A new tensor in the shape, the dtype and on the device of ``base_weight``. The sum is made in float32 at
            least, and rounded once.

        Raises:
            ConfigError: shapes that do not go together, a weight that is not of floating-point numbers, or a group of
                another size.
        """
        checks.integer("dim", dim, 1)
        checks.finite("alpha", alpha)
        group = _group_of(checks.integer("tp_size", tp_size, 1), tp_group)
        if not base_weight.is_floating_point():
            raise ConfigError(
                f"base_weight holds {base_weight.dtype}; expected floating-point numbers: dequantise it first"
            )
        device = base_weight.device
        a, b = linear_in.detach().to(device), linear_out.detach().to(device)
        shapes = [tuple(t.shape) for t in (base_weight, a, b)]
        w_shape, a_shape, b_shape = shapes
        sound = all(len(shape) == 2 for shape in shapes)  # noqa: PLR2004 - matrices
        if sound and (a_shape[0] * tp_size, b_shape[1]) == (dim, dim) and w_shape == (b_shape[0], a_shape[1]):
            a = gathered(a, 0, group)
        elif sound and (a_shape[0], b_shape[1]) == (dim, dim) and w_shape == (b_shape[0] * tp_size, a_shape[1]):
            b = gathered(b, 0, group)
        else:
            raise ConfigError(
                f"linear_out {b_shape} and linear_in {a_shape} do not fit base_weight {w_shape} with dim={dim} and "
                f"tp_size={tp_size}: expected (out, in) = (rows of linear_out, columns of linear_in), with "
                "linear_in (dim/tp_size, in) beside a column-parallel weight, or tp_size times the rows of linear_out, "
                "with linear_in (dim, in), beside a row-parallel one"
            )
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return Change((Product(a.to(wide), b.to(wide), alpha / dim),)).of(base_weight.detach())

    def __call__(self, model: M, training: bool = True) -> M:
        """Merge all adapters of a model that are not merged yet, in place.

        Every rank of the default process group must call this: if one of them fails, all do, and the model is on every
        rank as it was. The base weights are kept in the host's memory until `unmerge` or `unload`.

        Args:
            model: a module, a list of chunks, or either in a data-parallel wrapper.
            training: False sets the model to evaluation; True leaves it in the mode that it is in.

        Returns:
            The model itself.

        Raises:
            ModelError: a weight that cannot be written, that other modules use as well, or that would not be finite.

        Cost: ``2·r·out·in`` for each layer; see `smartinit.adapters.parallel.merging` for what is sent.
        """
        layers = [layer for _, layer in adapted_layers(model) if not layer.merged]
        layers = list({id(layer): layer for layer in layers}.values())
        with failing_together():
            _check_shared(model, layers)
            for layer in layers:
                check_writable(layer)
        try:
            with failing_together():
                _put_all_in(layers)
        except BaseException:
            for layer in layers:
                take_out(layer)
            raise
        if not training:
            for chunk in chunks_of(model):
                chunk.eval()
        return model

    def transform(self, module: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        """Merge the adapter of one layer, in place; the ranks that share it must call this together.

        Args:
            module: it; any other module, and a merged one, is left as it is.
            name: its own name, for messages.
            prefix: the full name of what it is in.

        Returns:
            The module itself.

        Raises:
            ModelError: the weight cannot be written, or would not be finite. It is then as it was, on all ranks.
        """
        if not isinstance(module, AdaptedLayer) or module.merged:
            return module
        module.name = module.name or ".".join(part for part in (prefix, name) if part)
        failed: Exception | None = None
        try:
            check_writable(module)
        except ModelError as error:
            failed = error
        _agree(module, failed)
        changes = changes_of(module)
        try:
            put_in(module, changes)
        except Exception as error:  # noqa: BLE001 - raised below, when no rank waits for this one
            failed = error
        try:
            _agree(module, failed)
        except BaseException:
            take_out(module)
            raise
        return module

    def unmerge(self, model: M) -> M:
        """Bring the base weights back, bit for bit; the adapters add their updates again.

        Args:
            model: see `__call__`; layers that are not merged stay as they are.

        Returns:
            The model itself.
        """
        for _, layer in adapted_layers(model):
            take_out(layer)
        return model

    def unload(self, model: M) -> M:
        """Remove the adapters: each base layer where it was, with the weight that it has, merged or not.

        Args:
            model: see `__call__`.

        Returns:
            The model: another object only if it was an adapted layer itself.
        """
        whole: Model = model
        for chunk in chunks_of(model):
            for place in list(places(chunk)):
                if isinstance(place.module, AdaptedLayer):
                    whole = install(whole, chunk, place, place.module.unwrapped())
        keep_gradients_out(whole)
        return cast("M", whole)


def _group_of(size: int, group: ProcessGroup | None) -> ProcessGroup | None:
    """The group of so many ranks; None for one rank.

    Raises:
        ConfigError: it has another size, or this process is not in it.
    """
    if group is None and size > 1 and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if size_of(group) != size:
        has = "there is no process group" if group is None else f"the group has {size_of(group)} ranks"
        raise ConfigError(f"tp_size={size}, but {has}; give the tensor-parallel group as tp_group, and its size")
    return group


def _check_shared(model: Model, layers: Iterable[AdaptedLayer]) -> None:
    """A weight that others use as well must not change.

    Raises:
        ModelError: there is one.
    """
    users: dict[int, dict[int, str]] = {}
    for chunk in chunks_of(model):
        for path, module in chunk.named_modules():
            for parameter in module._parameters.values():  # noqa: SLF001 - without those of its children
                if parameter is not None:
                    users.setdefault(id(parameter), {})[id(module)] = path.removesuffix(".to_wrap")
    seen: dict[int, AdaptedLayer] = {}
    for layer in layers:
        names = weight_names(layer.base)
        for parameter in (layer.to_wrap._parameters.get(name) for name in names):  # noqa: SLF001 - as above
            others = users.get(id(parameter), {})
            other = next((path for key, path in others.items() if key != id(layer.to_wrap)), "")
            other = other or (seen[id(parameter)].name if id(parameter) in seen else "")
            if parameter is not None and other:
                raise ModelError(
                    f"'{layer.name}' shares its weight with '{other}', which would change as well, so nothing is "
                    "merged; adapt only layers that have a weight of their own"
                )
            seen[id(parameter)] = layer


def _put_all_in(layers: Iterable[AdaptedLayer]) -> None:
    """Merge; collective, also on a rank that has failed: the others wait for its factors.

    Raises:
        ModelError: the first that was met.
    """
    failed: Exception | None = None
    for layer in layers:
        changes = changes_of(layer)
        if failed is None:
            try:
                put_in(layer, changes)
            except Exception as error:  # noqa: BLE001 - raised below
                failed = error
    if failed is not None:
        raise failed


def _agree(layer: AdaptedLayer, failed: Exception | None) -> None:
    """Raise on all ranks that share a layer if one has failed; collective.

    Raises:
        ModelError: another one has; or what this one has met.
    """
    device = next(layer.adapter.parameters()).device
    count = summed(torch.tensor(float(failed is not None), device=device), layer.base.group)
    if failed is not None:
        raise failed
    if count:
        raise ModelError(
            f"the adapter of '{layer.name}' could not be merged on another of the {layer.base.size} ranks that share "
            "it, so it is merged on none; see the error there"
        )
