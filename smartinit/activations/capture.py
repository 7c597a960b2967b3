"""Hooks in a with-block: every forward pass feeds the statistics of its sites, and ends as soon as it can."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smartinit.activations.forward import move_to_device, trunk_below_head, unwrap, without_cache
from smartinit.activations.rows import (
    RowFilter,
    flatten_rows,
    forward_fn_dict,
    label_mask_options,
    layer_tensor,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
    token_masks,
)
from smartinit.activations.selection import reads_decoder, row_selectors
from smartinit.activations.sites import Site, TensorIdentity
from smartinit.activations.state import evaluation_mode, model_device, preserved_rng, refuse_merged, trainable_flags
from smartinit.errors import ArgumentError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn
    from typing_extensions import Self

    from smartinit.activations.rows import (
        ForwardFn,
        PrepareLayerInputs,
        PrepareModelInputs,
    )
    from smartinit.activations.selection import HookTarget
    from smartinit.statistics.base import Statistic


class _PassComplete(BaseException):
    """Ends a forward pass: nothing after this point is needed. Not an `Exception`: no model may swallow it."""


class Capture:
    """Feeds activation rows of ``targets`` to statistics, one forward pass at a time.

    Use as a context manager. Inside, the model is in eval mode without gradients and carries our hooks; on leaving
    (also by an exception) hooks, training flags of every submodule, adapter state and random streams are as before.

    Args:
        model: what ``forward_fn`` is called with.
        targets: the layers to look at.
        new_statistic: makes an empty statistic for a target, on a device.
        components: directions that each target will be asked for, by name.
        config: LoRA configuration; its ``eva_config`` says how labels mask, and it is handed to
            ``prepare_model_inputs_fn``.
        forward_fn: ``(model, batch)``; the default calls ``model(**batch)`` and lets the pass end early.
        prepare_model_inputs_fn: ``(batch, config)`` once per batch; its result is handed to the next.
        prepare_layer_inputs_fn: ``(layer_input, prepared, layer_name) -> (rows, features)``, one callable or a
            mapping from module names (others: all rows); None: all rows.
        skip_bad_batches: count and skip batches with NaN or Inf instead of raising.

    Raises:
        UnknownNameError: the mapping names a module that is no target.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[HookTarget],
        new_statistic: Callable[[HookTarget, torch.device], Statistic],
        *,
        components: Mapping[str, int] | None = None,
        config: Any = None,  # noqa: ANN401 - ours or PEFT's
        forward_fn: ForwardFn = forward_fn_dict,
        prepare_model_inputs_fn: PrepareModelInputs | None = prepare_model_inputs_fn_language_modeling,
        prepare_layer_inputs_fn: (
            PrepareLayerInputs | Mapping[str, PrepareLayerInputs] | None
        ) = prepare_layer_inputs_fn_language_modeling,
        skip_bad_batches: bool = False,
    ) -> None:
        self.sites: list[Site] = []
        self.passes = 0
        self.bad_batches: list[int] = []
        self.tokens = 0
        self._model = model
        self._targets = list(targets)
        self._new_statistic = new_statistic
        self._components = dict(components or {})
        self._config = config
        self._forward_fn = forward_fn
        self._prepare_model_inputs_fn = prepare_model_inputs_fn
        self._skip_bad_batches = skip_bad_batches
        self._selectors = row_selectors(self._targets, prepare_layer_inputs_fn, prepare_model_inputs_fn)
        self._default_forward = forward_fn is forward_fn_dict
        self._encoder_decoder = bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))
        self._site_of: dict[str, Site] = {}
        self._position: dict[str, int] = {}
        self._irregular: set[str] = set()
        self._identity = TensorIdentity()
        self._stop_at: str | None = None
        self._stack = ExitStack()
        self._begin_pass(None)

    def __enter__(self) -> Self:
        """Put the model into eval mode and attach the hooks."""
        with ExitStack() as stack:  # undone at once if a later step fails
            stack.enter_context(preserved_rng(self._model))
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(torch.no_grad())
            # Compiled submodules would run past our hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(trainable_flags(self._model))
            disable_adapter = getattr(self._model, "disable_adapter", None)
            if callable(disable_adapter) and hasattr(self._model, "peft_config"):
                refuse_merged(self._model)
                stack.enter_context(disable_adapter())
            for target in self._targets:
                hook = partial(self._observe, target)
                stack.enter_context(_removed(target.module.register_forward_pre_hook(hook, with_kwargs=True)))
            end = trunk_below_head(self._model, self._targets) if self._default_forward else None
            if end is not None:
                stack.enter_context(_removed(end.register_forward_hook(_complete)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Put everything back."""
        self._stack.close()
        self._begin_pass(None)

    def run(self, batch: Any) -> bool:  # noqa: ANN401 - whatever the data loader yields
        """One forward pass. Sites that are not `Site.open` are left alone, and nothing after the last open one runs.

        Returns:
            Whether the batch was used (False: skipped for NaN or Inf).

        Raises:
            NonFiniteError: NaN or Inf in a layer's input, unless ``skip_bad_batches``.
            ArgumentError: a batch or a layer's input that cannot be turned into rows.
        """
        device = model_device(self._model)
        batch = batch if device is None else move_to_device(batch, device)
        self._begin_pass(batch)
        self._stop_at = self._last_needed()
        before = [copy.deepcopy(site) for site in self.sites] if self._skip_bad_batches else []
        complete = False
        try:
            self._forward_fn(self._model, without_cache(self._model, batch) if self._default_forward else batch)
            complete = True
        except _PassComplete:
            pass
        except NonFiniteError:
            if not self._skip_bad_batches:
                raise
            self._roll_back(before)
            self.bad_batches.append(self.passes)
            self.passes += 1
            return False
        self._learn_order(complete=complete or self._stop_at is None)
        self.tokens += self._filter.tokens
        self.passes += 1
        return True

    # -- one pass -----------------------------------------------------------------------------------------------------

    def _begin_pass(self, batch: Any) -> None:  # noqa: ANN401
        self._identity.clear()
        self._calls: Counter[str] = Counter()
        self._fed: dict[tuple[object, ...], list[Site]] = {}
        self._born: set[int] = set()
        self._custom_rows: dict[int, Tensor] = {}
        self._prepared: Any = None
        self._filter = self._decoder_filter = RowFilter([])
        if batch is None:
            return
        if self._prepare_model_inputs_fn is prepare_model_inputs_fn_language_modeling:
            masks = token_masks(batch, encoder_decoder=self._encoder_decoder, **label_mask_options(self._config))
            self._filter = RowFilter(masks)
            self._decoder_filter = RowFilter(masks[::-1]) if self._encoder_decoder else self._filter
        prepare = self._prepare_model_inputs_fn
        custom = prepare is not prepare_model_inputs_fn_language_modeling
        if custom or any(callable(selector) for selector in self._selectors.values()):
            self._prepared = batch if prepare is None else prepare(batch, self._config)

    def _observe(self, target: HookTarget, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook: find the site of what reaches this target, and feed it once."""
        name = target.name
        self._calls[name] += 1
        self._position.setdefault(name, len(self._position))
        site = self._site_of.get(name)
        if site is None or site.open:
            given = args or tuple(kwargs.values())
            tensor = layer_tensor(given, target.path)
            key = self._identity(tensor)
            sites = self._fed.setdefault(key, [])
            site, rows = self._find_site(target, site, sites, given)
            if site not in sites:
                self._feed(site, target, self._rows(target, given) if rows is None else rows)
                sites.append(site)
        if name == self._stop_at:
            raise _PassComplete

    def _find_site(
        self, target: HookTarget, site: Site | None, sites: list[Site], given: tuple[Any, ...]
    ) -> tuple[Site, Tensor | None]:
        """The target's site, and its rows if they had to be made. A new or deviating target founds its own."""
        name = target.name
        if site is not None and (site in sites or site.names[0] == name):
            return site, None
        rows = None
        custom = callable(self._selectors[name])
        if site is None:
            rows = self._rows(target, given) if custom else None
            for other in sites:
                if id(other) not in self._born or self._selectors[other.names[0]] != self._selectors[name]:
                    continue
                if other.statistic.components < self._components.get(name, 0):
                    continue  # it could not give this target all its directions
                # A callable sees the layer's name: only equal rows prove that it treats both alike.
                if rows is None or torch.equal(rows, self._custom_rows[id(other)]):
                    other.names.append(name)
                    self._site_of[name] = other
                    return other, rows
        else:
            site.names.remove(name)  # it no longer reads what the others read
        device = layer_tensor(given, target.path).device
        fresh = Site([name], target.in_features, self._new_statistic(target, device))
        self.sites.append(fresh)
        self._born.add(id(fresh))
        self._site_of[name] = fresh
        if rows is not None:
            self._custom_rows[id(fresh)] = rows
        return fresh, rows

    def _rows(self, target: HookTarget, given: tuple[Any, ...]) -> Tensor:
        selector = self._selectors[target.name]
        if selector is None:
            return flatten_rows(layer_tensor(given, target.path))
        if not callable(selector):
            rows_of = self._decoder_filter if reads_decoder(target.path) else self._filter
            return rows_of(layer_tensor(given, target.path))
        rows: object = selector(given, self._prepared, target.path)
        if isinstance(rows, Tensor) and rows.ndim == 2:  # noqa: PLR2004 - the contract
            return rows
        got = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ArgumentError(
            f"prepare_layer_inputs_fn must return a 2-D tensor (rows, features) for layer '{target.path}', got {got}"
        )

    def _feed(self, site: Site, target: HookTarget, rows: Tensor) -> None:
        if rows.shape[-1] != site.features:
            msg = f"layer '{target.path}' has {site.features} input features, but its rows have {rows.shape[-1]}"
            raise ArgumentError(msg)
        if rows.shape[0] == 0:
            return
        try:
            with torch.autocast(rows.device.type, enabled=False):  # the model's own precision is not ours
                site.statistic.update(rows)
        except FloatingPointError:
            raise NonFiniteError(target.path, self.passes) from None

    # -- what is known about the order ---------------------------------------------------------------------------------

    def _learn_order(self, *, complete: bool) -> None:
        """Targets that do not run exactly once per pass (experts, shared layers) cannot end a pass."""
        reach = None if complete or self._stop_at is None else self._position[self._stop_at]
        for target in self._targets:
            position = self._position.get(target.name)
            expected = position is not None and (reach is None or position <= reach)
            if expected and self._calls[target.name] != 1:
                self._irregular.add(target.name)

    def _last_needed(self) -> str | None:
        """The target at which a pass can end; None when it must run on."""
        if not self._default_forward or not self.passes or len(self._site_of) < len(self._targets):
            return None
        # Followers too: one that stops reading what its site reads must be seen.
        needed = [name for site in self.sites if site.open for name in site.names]
        if not needed or self._irregular.intersection(needed):
            return None
        return max(needed, key=self._position.__getitem__)

    def _roll_back(self, before: list[Site]) -> None:
        """Undo a pass: sites and their statistics as before it, those that it founded forgotten."""
        self.sites = before
        self._site_of = {name: site for site in before for name in site.names}


def _complete(*_arguments: object) -> None:
    raise _PassComplete


class _removed(ExitStack):  # noqa: N801 - reads as a verb in a with-statement
    """Removes a hook's handle on leaving."""

    def __init__(self, handle: Any) -> None:  # noqa: ANN401 - torch's RemovableHandle
        super().__init__()
        self.callback(handle.remove)
