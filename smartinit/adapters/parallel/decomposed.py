"""Weight-decomposed adapters beside parallel layers (DoRA, arXiv 2402.09353, eq. 5).

``h = m ⊙ (W + s·B A) x / ‖W + s·B A‖ + bias``, norms by rows and without gradient (sec. 4.3). The norm is that of whole
rows: where ranks share the columns of ``W``, their sums of squares are added up. No ``W + s·B A`` is made for it, see
`smartinit.adapters.dora`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.adapters.dora import BaseNorms, norms_from, squared_sums
from smartinit.adapters.parallel.adapter import LowRankAdapter, mark
from smartinit.adapters.parallel.base_product import base_product
from smartinit.adapters.parallel.call import argument, called, counts_of
from smartinit.adapters.parallel.collectives import gather, spread, summed
from smartinit.adapters.parallel.dtensors import to_local
from smartinit.adapters.parallel.experts import ExpertAdapter
from smartinit.adapters.parallel.flow import low_rank
from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.adapters.parallel.weights import bias_names, local_weights, weight_names
from smartinit.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.weights import LocalWeight


class DecomposedAdapter(LowRankAdapter):
    """A, B and the magnitude m beside one layer.

    Args:
        base: the layer.
        dim: rank of the whole update.
        alpha: numerator of the scaling.
        options: see `LowRankAdapter`; dropout is of the input.

    Attributes:
        weight_magnitude: ``(out/t,)`` beside a column-parallel layer, ``(out,)`` beside others; with one weight for
            each expert ``(E, …)``. Without values until `reset`.
        started: what `reset` made of it, in the host's memory; None: nothing yet.
    """

    def __init__(self, base: ParallelBase, dim: int, alpha: float, **options: Any) -> None:  # noqa: ANN401
        super().__init__(base, dim, alpha, **options)
        b = self.linear_out.weight
        shape = self.whole_shapes()[1][:-1] if base.split == "row" else b.shape[:-1]
        with torch.inference_mode(mode=False):
            self.weight_magnitude = nn.Parameter(torch.empty(shape, device=b.device, dtype=b.dtype))
        self.started: torch.Tensor | None = None
        self.base_norms = [BaseNorms() for _ in range(max(1, base.experts))]
        self.mark()

    def mark(self) -> None:
        """Tell Megatron what the magnitude is; its factors tell of themselves."""
        m = self.weight_magnitude
        parallel = self.base.split == "column" and self.base.size > 1
        mark(m, m.dim() - 1 if parallel else None, expert=self.expert)

    def __deepcopy__(self, memo: dict[int, Any]) -> LowRankAdapter:
        """Copies of parameters have lost their marks."""
        made = super().__deepcopy__(memo)
        assert isinstance(made, DecomposedAdapter)  # noqa: S101 - for the type checker
        made.mark()
        return made

    def train(self, mode: bool = True) -> DecomposedAdapter:
        """As torch's; what is kept of the base weight is forgotten."""
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> DecomposedAdapter:  # noqa: ANN401 - torch's
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.mark()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - torch's
        super()._load_from_state_dict(*args, **kwargs)
        self.mark()

    def forget(self) -> None:
        """Compute the norms of the base weight anew: to be called after writes to it through ``.data``."""
        for norms in self.base_norms:
            norms.forget()

    @torch.no_grad()
    def reset(self, weights: Sequence[LocalWeight]) -> None:
        """Set m to the norms of what base layer and adapter hold now; collective.

        They are those by which the forward pass divides, bit for bit, so that the layer then computes what it would
        without decomposition. Nothing while there are no values (meta device).
        """
        self._set(weights, self.row_norms)

    @torch.no_grad()
    def reset_alone(self, weights: Sequence[LocalWeight]) -> bool:
        """As `reset`, where B is zero and this rank has whole rows, so that nothing is sent; False: not done."""
        b = self.linear_out.weight
        if (self.base.split == "row" and self.base.size > 1) or b.is_meta or bool(b.any()):
            return False
        a = b.new_zeros(self.whole_shapes()[0])  # what B = 0 is multiplied by does not matter
        self._set(weights, lambda weights: self.row_norms(weights, (a, b)))
        return True

    def is_as_started(self) -> bool:
        """Whether the magnitude is still what `reset` made of it."""
        m = self.weight_magnitude.detach()
        if self.started is None or m.is_meta or type(m) is not torch.Tensor:  # a DTensor of fully_shard
            return False
        return torch.equal(m.cpu(), self.started.to(m.dtype))

    def _set(self, weights: Sequence[LocalWeight], norms: Callable[[Sequence[LocalWeight]], torch.Tensor]) -> None:
        m = self.weight_magnitude
        if not m.is_meta and not weights[0].matrix.is_meta:
            m.copy_(norms(weights))
            self.started = m.detach().to("cpu", copy=True)

    @torch.no_grad()
    def row_norms(
        self, weights: Sequence[LocalWeight], factors: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Norms of the rows of ``W + s·B A``, in the shape of the magnitude, float64 where the device has it.

        Collective. Never zero; without gradient.

        Args:
            weights: of the base layer, on this rank.
            factors: A and B; None: as `product_factors` gathers them.

        Cost: O(r·out·in / t); sent are A of a column-parallel base, or B and ``2·out`` numbers of a row-parallel one.
        """
        factors = self.product_factors() if factors is None else factors
        wide = torch.promote_types(factors[0].dtype, weights[0].matrix.dtype)
        a, b = (factor.to(wide) for factor in factors)
        pairs = zip(a, b, strict=True) if self.base.experts else [(a, b)]
        sums = []
        for (one, other), weight, norms in zip(pairs, weights, self.base_norms, strict=True):
            matrix = weight.matrix.detach()
            own = squared_sums(one, other, matrix, norms.squared(weight.stored, matrix), self.scaling)
            sums.append(torch.stack(own))
        both = torch.stack(sums, dim=1) if self.base.experts else sums[0]
        if self.base.split == "row":
            both = summed(both, self.base.group)
        return norms_from(both[0], both[1], wide)

    def quotient(self, weights: Sequence[LocalWeight], base: ParallelBase | None = None) -> torch.Tensor:
        """``m / ‖W + s·B A‖``, one number for each row of the output on this rank; its gradient goes to m alone.

        Collective. Cost: see `row_norms`.
        """
        m: torch.Tensor = self.weight_magnitude
        base = self.base if base is None else base
        norms = self.row_norms(weights).to(m.dtype)
        if base.split != "column" and (base.sequence or base.partial):
            m = spread(m, base.group)  # ranks with other tokens, or other addends
        q = m / norms
        return gather(q, -1, base.group, gradient="slice") if base.whole_output else q

    def decomposed(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        weights: Sequence[LocalWeight],
        bias: torch.Tensor | None,
        counts: torch.Tensor | list[int] | None,
        base: ParallelBase | None = None,
    ) -> torch.Tensor:
        """What the base layer returned, with the adapter.

        With dropout only what the adapter changes sees the dropped input x':
        ``h = W x + (q - 1) ⊙ W x' + q ⊙ s·B A x' + bias``, with ``q = m / ‖W + s·B A‖``.

        Args:
            output: of the base layer, ``(..., rows)``.
            x: its input (after its norm, if it has one).
            weights: of it.
            bias: what of `output` is bias ``(rows,)`` or a multiple for each expert ``(E, rows)``.
            counts: see `ExpertAdapter`.
            base: what the layer does in this call; None: as it was described.

        Returns:
            The shape and the dtype of ``output``.

        Cost: besides plain LoRA's, that of `row_norms`; with dropout the base layer's product a second time.
        """
        base, product = self.base if base is None else base, self.product(counts)
        a, b = self.factors()
        apart = base.sequence if base.split != "row" else not base.whole_input
        rows = self.dropped(x.to(a.dtype), "pre", apart=apart)
        update = low_rank(base, rows, a, b, self.scaling, product)
        q = self._for_rows(self.quotient(weights, base), output, counts)
        update = update.to(q.dtype)  # autocast would add in half precision
        if self.training and self.dropout:
            matrices = [weight.matrix for weight in weights]
            matrix = torch.stack(matrices) if base.experts else matrices[0]
            again = base_product(base, rows.to(matrix.dtype), matrix, product)
            made = torch.addcmul(torch.addcmul(output, q - 1, again), q, update)
        elif bias is None:
            made = (output + update) * q
        else:
            # At the start q is one: nothing is added, and the base layer's output is not rounded again.
            constant = self._for_rows(bias, output, counts) * (1 - q)
            made = torch.addcmul(constant, output + update, q)
        return made.to(output.dtype)

    def _for_rows(
        self, values: torch.Tensor, output: torch.Tensor, counts: torch.Tensor | list[int] | None
    ) -> torch.Tensor:
        """Numbers of each expert ``(E, rows)`` for its own tokens; any others as they are."""
        if values.dim() == 1:
            return values
        repeats = torch.as_tensor(counts, device=values.device)
        values = values.repeat_interleave(repeats, 0, output_size=output.shape[0])
        return values.view(output.shape[0], *[1] * (output.dim() - 2), values.shape[-1])

    @torch.no_grad()
    def whole_magnitude(self) -> torch.Tensor:
        """M ``(out,)`` or ``(E, out)`` as a single process has it, detached; collective over the group."""
        m = self.weight_magnitude
        return self.joined(m, "out") if self.base.split == "column" else m.detach()

    @torch.no_grad()
    def set_whole_magnitude(self, whole: torch.Tensor) -> None:
        """Write this rank's part of a whole magnitude, of any dtype and device.

        Raises:
            ConfigError: another shape.
        """
        shape = self.whole_shapes()[1][:-1]
        if whole.shape != shape:
            raise ConfigError(f"a magnitude {tuple(whole.shape)} does not fit '{self.name}': expected {shape}")
        self.weight_magnitude.copy_(self.own(whole, "out") if self.base.split == "column" else whole)


class DecomposedExperts(DecomposedAdapter, ExpertAdapter):
    """A ``(E, r, in)``, B ``(E, out, r)`` and m ``(E, out)`` for each of this rank's experts."""


class DecomposedLayer(AdaptedLayer):
    """A base layer whose weight is decomposed into magnitude and direction.

    The magnitude has no values until `DecomposedAdapter.reset`, which all ranks of the layer must call.
    """

    adapter: DecomposedAdapter

    def __init__(self, to_wrap: nn.Module, adapter: DecomposedAdapter, base: ParallelBase, name: str = "") -> None:
        local_weights(to_wrap, base, name)  # first: one that cannot be read leaves the layer alone
        super().__init__(to_wrap, adapter, base, name)
        self._new_base = False
        self.register_load_state_dict_pre_hook(_note_new_base)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_follow_new_base)  # type: ignore[no-untyped-call]

    def weights(self) -> list[LocalWeight]:
        """Of the base layer, on this rank."""
        return local_weights(self.to_wrap, self.base, self.name)

    def adapted(self, output: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """The base layer's output with its weight decomposed.

        Raises:
            ModelError: the layer was given another weight than its own.
        """
        given = argument(self.to_wrap, "weight", args, kwargs)
        if given is not None and given is not self.to_wrap.weight:
            raise ModelError(
                f"'{self.name}' was called with another weight than its own, whose norms DoRA's magnitude has; call it "
                "without, or adapt it with LoRA"
            )
        base = called(self.to_wrap, self.base, args, kwargs)
        counts = counts_of(base, args, kwargs)
        return self.adapter.decomposed(output, rows, self.weights(), self._bias(base), counts, base)

    def _bias(self, base: ParallelBase) -> torch.Tensor | None:
        """What of the base layer's output on this rank is bias."""
        biases = [to_local(getattr(self.to_wrap, name)) for name in bias_names(self.to_wrap, self.base)]
        if not biases:
            return None
        bias = torch.stack(biases) if len(biases) > 1 else biases[0]
        if base.whole_output:
            return gather(bias, -1, base.group, gradient="slice")
        if base.placed and base.split == "row":
            # It is in the sum of all addends once, whatever of it is in each.
            return bias / base.size
        return bias


def _note_new_base(layer: DecomposedLayer, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Whether a state brings base weights, but no magnitude, to one that has not been trained."""
    arrive = any(f"{prefix}to_wrap.{name}" in state for name in weight_names(layer.base))
    without = f"{prefix}adapter.weight_magnitude" not in state
    layer._new_base = arrive and without and layer.adapter.is_as_started()  # noqa: SLF001


def _follow_new_base(layer: DecomposedLayer, _keys: object) -> None:
    """A magnitude that is of the base weights before would scale the new ones from the first step on.

    Warns:
        UserWarning: it cannot be set by this rank alone.
    """
    if not layer._new_base:  # noqa: SLF001
        return
    layer._new_base = False  # noqa: SLF001
    layer.adapter.forget()
    if not layer.adapter.reset_alone(layer.weights()):
        warnings.warn(
            f"base weights of '{layer.name}' were loaded without its magnitude, which is still that of the weights "
            "before: call smartinit.megatron.reset_magnitudes(model) on all ranks, or load the magnitude too",
            stacklevel=2,
        )
