"""The two factors beside one parallel layer, under Megatron's names: ``linear_in`` is A, ``linear_out`` is B.

``h = W x + s·B A x`` with ``s = alpha / dim`` (arXiv 2106.09685, eq. 3). Of t tensor-parallel ranks each has,
of a column-parallel base, A ``(r/t, in)`` and B ``(out/t, r)``; of a row-parallel one, A ``(r, in/t)`` and
B ``(out/t, r)``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn import functional

from smartinit.adapters.parallel.collectives import first_of, gathered, spread
from smartinit.adapters.parallel.flow import low_rank
from smartinit.errors import ConfigError
from smartinit.formats.rows import join_rows, shard_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.flow import Product

DropoutPosition = Literal["pre", "post"]
Side = Literal["in", "out"]


def mark(parameter: nn.Parameter, partition_dim: int | None, *, expert: bool) -> None:
    """Tell Megatron's optimisers and data parallelism what a parameter is.

    Args:
        parameter: it.
        partition_dim: along which the tensor-parallel ranks share it; None: whole.
        expert: whether it is an expert's: those are not reduced over all data-parallel ranks.
    """
    marks = {
        "tensor_model_parallel": partition_dim is not None,
        "partition_dim": -1 if partition_dim is None else partition_dim,
        "partition_stride": 1,
        "allreduce": not expert,
    }
    for name, value in marks.items():
        setattr(parameter, name, value)


class Factor(nn.Module):
    """One matrix, or this rank's shard of it.

    Args:
        shape: of the shard.
        partition_dim: along which the ranks share it; None: whole. Megatron's optimisers read that of a parameter.
        expert: whether it is an expert's: those are not reduced over all data-parallel ranks.
        device: where it lies.
        dtype: of it.

    Attributes:
        trained: whether it is trained where its adapter is; False where a start says that it stays as it is.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        partition_dim: int | None,
        *,
        expert: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.partition_dim, self.expert = partition_dim, expert
        self.trained = True
        with torch.inference_mode(mode=False):  # tensors that are made in it can never train
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.mark()

    def mark(self) -> None:
        """Tell Megatron what the parameter is; to be called again after it has been replaced."""
        mark(self.weight, self.partition_dim, expert=self.expert)

    def _apply(self, fn: Any, recurse: bool = True) -> Factor:  # noqa: ANN401 - torch's
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's
        super()._load_from_state_dict(*args, **kwargs)
        self.mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies of parameters have lost their marks."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.mark()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        shared = "" if self.partition_dim is None else f", sharded along {self.partition_dim}"
        return f"{tuple(self.weight.shape)}{shared}"


class LowRankAdapter(nn.Module):
    """A and B beside one layer.

    Args:
        base: the layer.
        dim: rank of the whole update.
        alpha: numerator of the scaling.
        dropout: probability, in ``[0, 1)``.
        dropout_position: ``"pre"``: of the layer's input; ``"post"``: of the update.
        a2a_experimental: see `smartinit.adapters.parallel.flow`; for row-parallel layers with sequence parallelism.
        device: where the factors lie.
        dtype: of the factors.
        name: of the layer, for messages.
        expert: whether the layer belongs to an expert.
        shared_over: ranks that have other experts and the same factors: their gradients are summed.

    Raises:
        ConfigError: ``dim``, or the rows of a row-parallel layer's weight, cannot be shared evenly.
    """

    def __init__(
        self,
        base: ParallelBase,
        dim: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        dropout_position: DropoutPosition = "pre",
        a2a_experimental: bool = False,
        device: torch.device,
        dtype: torch.dtype,
        name: str = "",
        expert: bool = False,
        shared_over: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.base, self.name = base, name
        self.dim, self.alpha = dim, alpha
        self.dropout, self.dropout_position = float(dropout), dropout_position
        self.a2a_experimental = a2a_experimental
        self.expert, self.shared_over = expert, shared_over
        a_dim, b_dim = self.partition_dims()
        a_shape, b_shape = list(self.whole_shapes()[0]), list(self.whole_shapes()[1])
        for shape, at in ((a_shape, a_dim), (b_shape, b_dim)):
            if at is None:
                continue
            if shape[at] % base.size:
                what = f"dim={dim}" if shape is a_shape else f"the {shape[at]} outputs of the layer"
                raise ConfigError(
                    f"{what} cannot be shared evenly by the {base.size} tensor-parallel ranks of '{name}'; expected a "
                    f"multiple of {base.size}"
                )
            shape[at] //= base.size
        self.linear_in = Factor(tuple(a_shape), a_dim, expert=expert, device=device, dtype=dtype)
        self.linear_out = Factor(tuple(b_shape), b_dim, expert=expert, device=device, dtype=dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankAdapter:
        """A copy among the same ranks: a process group cannot be copied."""
        memo[id(self.shared_over)] = self.shared_over
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    @property
    def scaling(self) -> float:
        """``s``."""
        return self.alpha / self.dim

    def whole_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A ``(r, in)`` and B ``(out, r)`` on a single process."""
        return (self.dim, self.base.in_features), (self.base.out_features, self.dim)

    def partition_dims(self) -> tuple[int | None, int | None]:
        """Along which dimension the tensor-parallel ranks share A and B; None: whole."""
        if self.base.split == "none" or self.base.size == 1:
            return None, None
        first = len(self.whole_shapes()[0]) - 2  # after the experts'
        return (first if self.base.split == "column" else first + 1), first

    def forward(
        self, x: torch.Tensor, base: ParallelBase | None = None, counts: torch.Tensor | list[int] | None = None
    ) -> torch.Tensor:
        """``s·B A x`` in the state of the base layer's output, in the dtype of the factors.

        Args:
            x: the base layer's input on this rank ``(..., in)``.
            base: what the layer does in this call; None: what it was described to do.
            counts: rows of each of this rank's experts, one after another in ``x``; only for `ExpertAdapter`.

        Cost: O(r·(in + out)) a token; see `smartinit.adapters.parallel.flow` for what is sent.
        """
        base = self.base if base is None else base
        a, b = self.factors()
        rows = self.dropped(x.to(a.dtype), "pre", apart=base.sequence if base.split != "row" else not base.whole_input)
        y = low_rank(base, rows, a, b, self.scaling, self.product(counts), all_to_all=self.a2a_experimental)
        return self.dropped(y, "post", apart=base.sequence if base.split != "column" else not base.whole_output)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's shards of A and B, for use: with the gradient that they must have."""
        a, b = self.linear_in.weight, self.linear_out.weight
        if self.shared_over is not None:
            return spread(a, self.shared_over), spread(b, self.shared_over)
        return a, b

    def product(self, counts: torch.Tensor | list[int] | None) -> Product:
        """How rows are multiplied by one of the factors."""
        del counts  # one matrix for all rows
        return functional.linear

    def dropped(self, x: torch.Tensor, position: DropoutPosition, *, apart: bool) -> torch.Tensor:
        """``x`` after dropout, if it is its turn.

        Ranks that have the same numbers (or addends of them) drop the same ones: they agree on a seed, which costs one
        small broadcast and, on a GPU, a wait for it.

        Args:
            x: numbers to drop from.
            position: before or after the product.
            apart: whether the ranks have different tokens or features.
        """
        if not self.training or self.dropout == 0 or position != self.dropout_position:
            return x
        if apart or self.base.size == 1:
            return functional.dropout(x, self.dropout)
        # From the default generator, which activation checkpoints restore.
        seed = first_of(torch.randint(2**62, (1,), device=x.device), self.base.group)
        generator = torch.Generator(x.device).manual_seed(int(seed))
        kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return x * kept / (1 - self.dropout)

    @torch.no_grad()
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``(r, in)`` and B ``(out, r)`` as a single process has them, detached; collective over the group."""
        return self.joined(self.linear_in.weight, "in"), self.joined(self.linear_out.weight, "out")

    @torch.no_grad()
    def set_whole(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Write this rank's shards of whole factors, of any dtype and device.

        Raises:
            ConfigError: other shapes.
        """
        shapes = (tuple(a.shape), tuple(b.shape))
        if shapes != self.whole_shapes():
            raise ConfigError(
                f"factors {shapes[0]} and {shapes[1]} do not fit '{self.name}': expected {self.whole_shapes()}"
            )
        self.linear_in.weight.copy_(self.own(a, "in"))
        self.linear_out.weight.copy_(self.own(b, "out"))

    def own(self, whole: torch.Tensor, side: Side) -> torch.Tensor:
        """This rank's shard of a whole A (``"in"``) or B (``"out"``), or of anything with the same rows and columns."""
        dim = self.partition_dims()[side == "out"]
        if dim is None:
            return whole
        gated = self.base.gated and side == "out"
        return shard_rows(whole, self.base.rank, self.base.size, gated=gated, dim=dim)

    def joined(self, shard: torch.Tensor, side: Side) -> torch.Tensor:
        """The inverse of `own`; collective over the group, without gradient."""
        dim = self.partition_dims()[side == "out"]
        if dim is None:
            return shard.detach()
        gated = self.base.gated and side == "out"
        shards = gathered(shard, dim, self.base.group).chunk(self.base.size, dim)
        return join_rows(shards, gated=gated, dim=dim)

    @torch.no_grad()
    def product_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B whose product is this rank's shard of ``B A``, detached, float32 at least; collective.

        Of a row-parallel layer A ``(r, in/t)`` and B ``(out, r)``, of a column-parallel one A ``(r, in)`` and B
        ``(out/t, r)``.
        """
        a, b = self.linear_in.weight.detach(), self.linear_out.weight.detach()
        if self.base.split == "column":
            a = gathered(a, -2, self.base.group)
        elif self.base.split == "row":
            b = gathered(b, -2, self.base.group)
        wide = torch.promote_types(a.dtype, torch.float32)
        return a.to(wide), b.to(wide)

    @torch.no_grad()
    def delta(self) -> torch.Tensor:
        """This rank's shard of ``s·B A``, in the shape of its shard of the base weight, float32 at least; collective.

        Of a row-parallel layer ``(out, in/t)``, of a column-parallel one ``(out/t, in)``.
        """
        a, b = self.product_factors()
        return (b @ a).mul_(self.scaling)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        dropout = f", dropout={self.dropout} ({self.dropout_position})" if self.dropout else ""
        return f"dim={self.dim}, alpha={self.alpha}{dropout}"
