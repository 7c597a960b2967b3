"""What configurations have whose adapters can start by smartinit's methods."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smartinit.activations.rows import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from smartinit.adapters.parallel.initial import INITIAL
from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import ConfigError, TargetError
from smartinit.megatron.agreement import failing_together
from smartinit.megatron.peft import PEFT
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from smartinit.activations.rows import ForwardFn, PrepareLayerInputs, PrepareModelInputs
    from smartinit.artefact import Artefact
    from smartinit.factors import Factors
    from smartinit.megatron.sharded_target import ShardedTarget
    from smartinit.megatron.walk import Model, Place
    from smartinit.methods.base import Method


class Startable(PEFT):
    """`PEFT` with ``lora_A_init_method``, which may be one of smartinit's methods.

    Those that need no data start adapters as they are made; for the others there is `initialize`. What a method changes
    in base weights is in no adapter checkpoint: to resume from one, save what `initialize` returns (after a start at
    once too: it then tells that one), and `apply` it to the adapted model before the checkpoint is loaded; for the
    original base `smartinit convert` makes an adapter of it.
    """

    lora_A_init_method: str | Method
    dropout: float

    @property
    def a_initial(self) -> str:
        """How A starts when its layer is adapted: one of Megatron's words."""
        word = self.lora_A_init_method
        return word if isinstance(word, str) and word in INITIAL else "xavier"

    def check_starts(self, b_method: str) -> None:
        """Whether A and B can start in this way.

        Raises:
            ConfigError: unknown methods, or such as do not go together.
        """
        from smartinit.megatron.start import check_methods

        check_methods(self.lora_A_init_method, b_method)

    def start(self, layers: Sequence[tuple[Place, nn.Module]], *, seed: int) -> None:
        """See `PEFT.start`.

        Warns:
            UserWarning: the method needs data: `initialize` is still to be called.
        """
        if self.a_initial == self.lora_A_init_method:
            return
        from smartinit.megatron.start import method_of

        method = method_of(self.lora_A_init_method)
        if method is None:
            return
        if method.needs is not None and not layers:
            return
        if method.needs is not None:
            name = type(self).__name__.lower()
            warnings.warn(
                f"lora_A_init_method='{method.name}' reads data: until {name}.initialize(model, dataloader) is called, "
                "A is as by 'xavier' and B is zero",
                stacklevel=3,
            )
            return
        with failing_together():
            targets = self._start_targets([(place, m) for place, m in layers if isinstance(m, AdaptedLayer)])
        # A split is found again whatever random numbers a program has drawn before.
        options = {"seed": 0 if method.needs_weight else seed, "show_progress_bar": False}
        self._started(method, targets, layers[0][1] if layers else None, 1, None, options)

    def initialize(
        self,
        model: Model,
        dataloader: Iterable[Any] | None = None,
        *,
        max_batches: int | None = None,
        seed: int = 0,
        skip_bad_batches: bool = False,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        forward_fn: ForwardFn = forward_fn_dict,
        prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
        prepare_layer_inputs_fn: (
            PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
        ) = prepare_layer_inputs_fn_language_modeling,
        provenance: Mapping[str, Any] | None = None,
        show_progress_bar: bool = True,
    ) -> Artefact:
        """Compute the start of all adapters by ``lora_A_init_method``, and write it; collective.

        Where the adapters hold this very start already, as after ``lora(model)`` by a method that splits weights and
        needs no data, nothing changes, and it is returned. Weights that have given up another start, which the adapters
        still hold, first have it back, to a rounding.

        Args:
            model: adapted by this configuration. What data pass through is its base, whatever the adapters hold.
            dataloader: for methods that read data; ranks that share a layer must get the same batches, data-parallel
                ranks get other ones, and what they see is merged.
            max_batches: bound on forward passes; None: one pass over the data.
            seed: of random sketches.
            skip_bad_batches: count and skip batches with NaN or Inf in some layer's input.
            loss_fn: ``(outputs, batch)`` -> scalar, for methods that read gradients; None: the model's own loss. It
                must be the same number on all ranks that share layers.
            forward_fn: ``(model, batch)``; by default ``model(**batch)``.
            prepare_model_inputs_fn: see `smartinit.compute`. By the default tokens that are padding, or masked by
                ``labels``, do not count.
            prepare_layer_inputs_fn: likewise. It is given ``(batch, tokens, features)``, with the features and the
                tokens of all ranks, where Megatron has ``(tokens, batch, features)``.
            provenance: recorded in the artefact next to what is known here.
            show_progress_bar: tqdm on stderr.

        Returns:
            What was computed, with the names of the whole model; the same on all ranks. `smartinit.Artefact.save`
            keeps it.

        Raises:
            ConfigError: a method of Megatron's own, no data for a method that needs it, or layers that it cannot start.
            DataError: data that cannot be used.
            TargetError: a model without adapters.
            ModelError: weights that cannot be read or changed; or that have given up an earlier start to adapters that
                were trained since. The model is as it was after each of these.

        Cost: that of `smartinit.compute` on every rank, for whole layers: a weight is gathered while it is decomposed,
        and of the layers' inputs what other ranks have of them. Where weights have something back first, a copy of them
        is in the CPU's memory meanwhile.
        """
        from smartinit.megatron.again import earlier, given_back
        from smartinit.megatron.start import method_of

        method = method_of(self.lora_A_init_method)
        if method is None:
            raise ConfigError(
                f"lora_A_init_method={self.lora_A_init_method!r} is a start that adapters have as they are made; "
                "choose one of smartinit's methods, such as 'eva', to initialize them anew"
            )
        options = {
            "max_batches": max_batches,
            "seed": seed,
            "skip_bad_batches": skip_bad_batches,
            "loss_fn": loss_fn,
            "forward_fn": forward_fn,
            "prepare_model_inputs_fn": prepare_model_inputs_fn,
            "prepare_layer_inputs_fn": prepare_layer_inputs_fn,
            "provenance": provenance or {},
            "show_progress_bar": show_progress_bar,
        }
        chunks, targets = model if isinstance(model, list) else [model], self._adapters(model)
        if method.needs is None and (known := earlier(targets, method, seed, provenance or {})) is not None:
            return known
        with given_back(targets):
            artefact = self._started(method, targets, chunks[0], len(chunks), dataloader, options)
        assert artefact is not None  # noqa: S101 - there are adapters
        return artefact

    def apply(self, model: Model, artefact: Artefact) -> None:
        """Write a start that was computed before, or elsewhere, into the adapters; collective.

        Weights that have given up an earlier start, which the adapters still hold, first have it back, to a rounding;
        if it is this very start, nothing changes.

        Args:
            model: adapted by this configuration.
            artefact: what `initialize` has returned or `smartinit.Artefact.load` reads; its names are those of the
                whole model.

        Raises:
            ArtefactError: it is for other layers, ranks or scalings.
            TargetError, ModelError: see `initialize`. The model is as it was after each of these.
        """
        from smartinit.megatron.again import given_back, has_this_start, remember
        from smartinit.megatron.start import agreed, check_fit, known_names, same_names

        targets = self._adapters(model)
        names = known_names(targets)
        with failing_together():
            check_fit(targets, artefact.factors, artefact.plan, names)
        factors = agreed(targets, artefact.factors, everywhere=same_names(targets))
        if has_this_start(targets, factors):
            return
        # A base weight that comes with the start takes the place of whatever is there.
        with given_back([target for target in targets if factors[target.name].base is None]):
            self._write(targets, factors)
        remember(targets, artefact)

    def restore_base(self, model: Model) -> None:
        """Give base weights back what a splitting method took from them, to a rounding; adapters stay; collective.

        The model then computes ``W x + s·B A x``: to go on with what was trained, subtract the start from the adapters
        (``smartinit convert``).

        Trained magnitudes of `DoRA` stay as well.

        Raises:
            ModelError: a weight that a method has quantised; the model is as it was.
        """
        from smartinit.megatron.writing import check_restorable, give_back

        with failing_together():
            targets = self._start_targets(adapted_layers(model))
            check_restorable(targets)
        give_back(targets)

    def _adapters(self, model: Model) -> list[ShardedTarget]:
        """The adapters of a model, whose base weights are the original ones, or can be so again."""
        from smartinit.megatron.again import check_as_started

        with failing_together():
            targets = self._start_targets(adapted_layers(model))
            if not targets:
                raise TargetError(
                    f"the model has no adapters to start; adapt it first: {type(self).__name__}(...)(model)"
                )
            check_as_started(targets)
        return targets

    def _start_targets(self, layers: Iterable[tuple[Place, AdaptedLayer]]) -> list[ShardedTarget]:
        from smartinit.megatron.sharded_target import targets_of

        return targets_of(layers, share_experts=bool(getattr(self, "share_expert_adapters", False)))

    def _started(
        self,
        method: Method,
        targets: Sequence[ShardedTarget],
        model: nn.Module | None,
        chunks: int,
        dataloader: Iterable[Any] | None,
        options: Mapping[str, Any],
    ) -> Artefact | None:
        """Compute and write; None if this rank has no layer (it takes part in what is exchanged)."""
        from smartinit.megatron.again import remember
        from smartinit.megatron.start import agreed, check_layers, compute_start, same_names

        everywhere, artefact = same_names(targets), None
        with failing_together():
            check_layers(method, targets, pieces=chunks > 1 or not everywhere)
        with failing_together():
            if targets and model is not None:
                artefact = compute_start(model, targets, method, dataloader, dropout=self.dropout, **options)
        if artefact is None:
            factors: Mapping[str, Factors] = agreed((), {}, everywhere=everywhere)
        else:
            factors = agreed(targets, artefact.factors, everywhere=everywhere)
        self._write(targets, factors)
        if artefact is None:
            return None
        remember(targets, artefact)
        return replace(artefact, factors=factors)

    def _write(self, targets: Sequence[ShardedTarget], factors: Mapping[str, Factors]) -> None:
        from smartinit.megatron.writing import check_writable, write

        with failing_together():
            check_writable(targets, factors)
        write(targets, factors)
