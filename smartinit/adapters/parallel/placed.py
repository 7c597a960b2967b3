"""An adapter beside a layer of PyTorch's own tensor parallelism, whose tensors are DTensors.

``parallelize_module`` gives a layer hooks that lay out its input before it computes and its output after. Between them
the layouts are facts, whatever was asked for outside: a column-parallel layer makes ``Shard(-1)`` of ``Replicate``, a
row-parallel one ``Partial`` of ``Shard(-1)``. There the adapter's update is added to the product, as addends beside a
row-parallel layer, and travels with it: nothing is sent but the shards of one factor.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from smartinit.adapters.parallel.dtensors import is_dtensor
from smartinit.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn
    from torch.distributed.tensor import Placement

    from smartinit.adapters.parallel.base import ParallelBase

    Adapted = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """``(output, input) -> output with the update``, of this rank's shards."""


def within(layer: nn.Module, base: ParallelBase, adapted: Adapted, x: torch.Tensor, name: str) -> torch.Tensor:
    """What the layer returns, with the update added before its output is laid out.

    Args:
        layer: a linear layer after ``parallelize_module``.
        base: what it does.
        adapted: adds the update.
        x: the layer's input, a DTensor or not, as the layer takes it.
        name: for messages.

    Raises:
        ModelError: it does not compute with DTensors.
    """

    def add(_layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:  # noqa: ANN401 - DTensors
        return _added(base, adapted, inputs[0], output, name)

    # For this call only, so that a copy of the model does not come back to this adapter. The first of its kind: before
    # the hook that lays out the output. Its input is the one that the hooks before the layer have laid out.
    handle = layer.register_forward_hook(add, prepend=True)
    try:
        returned: torch.Tensor = layer(x)
    finally:
        handle.remove()
    return returned


def check_whole(layer: nn.Module, name: str) -> None:
    """Whether a layer whose adapter knows nothing of ranks has still no shards.

    Raises:
        ModelError: it has.
    """
    if not is_dtensor(getattr(layer, "weight", None)):
        return
    if not is_data_parallel(layer):  # whose weight is whole while it computes
        raise ModelError(
            f"'{name}' was made tensor-parallel after its adapter was put beside it, which knows nothing of it; adapt "
            "a model after parallelize_module"
        )


def is_data_parallel(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has been here."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and hasattr(fsdp, "FSDPModule") and isinstance(module, fsdp.FSDPModule)


def _added(base: ParallelBase, adapted: Adapted, x: Any, output: Any, name: str) -> Any:  # noqa: ANN401 - DTensors
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    if not isinstance(x, DTensor) or not isinstance(output, DTensor) or x.device_mesh.ndim != 1:
        raise ModelError(
            f"the weight of '{name}' was a DTensor when its adapter was made, but it computes with a "
            f"{type(x).__name__}, not with DTensors of one tensor-parallel mesh; adapt a model after "
            "parallelize_module and before fully_shard"
        )
    mesh, last = x.device_mesh, Shard(x.dim() - 1)
    before: Placement = last if base.split == "row" else Replicate()
    after: Placement = {"column": last, "row": Partial(), "none": Replicate()}[base.split]
    # The gradients of a whole input of column-parallel shards are addends.
    inner: Placement = Partial() if base.split == "column" else before
    rows = x.redistribute(placements=[before]).to_local(grad_placements=[inner])
    if after.is_partial() and not output.placements[0].is_partial():  # torch makes no addends of anything
        product = output.redistribute(placements=[Replicate()]).to_local(grad_placements=[after]) / mesh.size()
    else:
        product = output.redistribute(placements=[after]).to_local()
    made = DTensor.from_local(adapted(product, rows), mesh, [after], run_check=False)
    return made.redistribute(placements=output.placements)
