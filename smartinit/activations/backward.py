"""Gradients of layers' weights, as they pass by in the backward pass: no parameter ever gets a ``.grad``."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from smartinit.activations.forward import move_to_device
from smartinit.activations.rows import flatten_rows, layer_tensor
from smartinit.activations.state import evaluation_mode, model_device, preserved_rng, refuse_merged, trainable_flags
from smartinit.errors import ArgumentError, ConfigError, DataError, NonFiniteError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Self

    from smartinit.activations.selection import HookTarget
    from smartinit.statistics.gradient import GradientSketch

    Loss = Callable[[nn.Module, Any], object]

_FIRST_SCALE = 2.0**16
_SCALE_STEP = 2.0**4


class NonFiniteGradientError(NonFiniteError):
    """NaN or Inf in the gradient at a layer."""

    def __init__(self, layer: str, batch: int) -> None:
        super().__init__(layer, batch)
        said = (
            f"the gradient at layer '{layer}' holds NaN or Inf in batch {batch} (batches count from 0); check that "
            "batch and the model's weights, use a wider dtype, or skip such batches with skip_bad_batches=True "
            "(--skip-bad-batches)"
        )
        self.args = (said,)


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward shows input rows and output gradients to ``feed``.

    The input is saved the way autograd saves tensors, so that checkpointing may drop it and a change in place is seen.
    ``anchor`` requires a gradient: that is what makes a frozen model's graph reach back to the layer.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer_input: Tensor, _anchor: Tensor, feed: Any) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(layer_input)
        ctx.feed = feed
        ctx.mark_dirty(output)  # the same tensor goes on: no copy, and it may be changed in place later
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (layer_input,) = ctx.saved_tensors
        if ctx.feed is not None:
            ctx.feed(layer_input, gradients[0])
        return gradients[0], None, None, None


def _tap(output: Tensor, layer_input: Tensor, anchor: Tensor, feed: Callable[[Tensor, Tensor], None] | None) -> Tensor:
    if output.requires_grad and output.is_leaf:  # somebody's hook made it one, and no leaf is changed in place
        output = output.clone()
    tapped: Tensor = _Tap.apply(output, layer_input, anchor, feed)  # type: ignore[no-untyped-call]
    return tapped


class BackwardCapture:
    """Feeds the gradients of ``targets`` to sketches, one forward and backward pass at a time.

    Use as a context manager. Inside, the model is in eval mode (dropout would be noise), none of its parameters
    requires a gradient, adapters are switched off, and the targets carry our hooks; on leaving (also by an exception)
    all of that and the random streams are as before, and so is every ``.grad``. Layers that run several times in a
    pass add up; modules that share one weight each get the gradient of their own use of it.

    Gradient checkpointing is kept where the model has switched it on.

    Args:
        model: what ``loss`` is called with.
        targets: linear layers, Conv1D, convolutions, Embedding.
        sketches: one by target name.
        loss: ``(model, batch)`` to a scalar tensor.
        autocast: precision of the forward pass; None: the model's own.
        skip_bad_batches: count and skip batches with NaN or Inf in the loss or a gradient instead of raising.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[HookTarget],
        sketches: Mapping[str, GradientSketch],
        *,
        loss: Loss,
        autocast: torch.dtype | None = None,
        skip_bad_batches: bool = False,
    ) -> None:
        self.passes = 0
        self.bad_batches: list[int] = []
        self.ran: set[str] = set()
        self.sketches = dict(sketches)
        # DistributedDataParallel would wait for gradients of parameters.
        parallel = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        self._model = cast("nn.Module", model.module if parallel else model)
        self._targets = list(targets)
        self._loss = loss
        self._autocast = autocast
        self._skip_bad_batches = skip_bad_batches
        dtypes = {p.dtype for p in model.parameters()} | {autocast}
        self._scale = _FIRST_SCALE if torch.float16 in dtypes else 1.0
        self._scales = torch.float16 in dtypes
        self._failed: str | None = None
        self._anchor = torch.zeros((), requires_grad=True)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Freeze the model, put it into eval mode and attach the hooks."""
        model = self._model
        with ExitStack() as stack:  # undone at once if a later step fails
            stack.enter_context(preserved_rng(model))
            stack.enter_context(evaluation_mode(model))
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.enable_grad())
            # Compiled submodules would run past our hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(trainable_flags(model))
            disable_adapter = getattr(model, "disable_adapter", None)
            if callable(disable_adapter) and hasattr(model, "peft_config"):
                refuse_merged(model)
                stack.enter_context(disable_adapter())
            checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
            for module in checkpointing:
                if any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__):
                    module.training = True  # it asks for this flag; the modules inside stay in eval mode
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
            if checkpointing:
                self._reach_through_checkpoints(stack)
            for target in self._targets:
                hook = partial(self._observe, target)
                stack.callback(target.module.register_forward_hook(hook, with_kwargs=True).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Put everything back."""
        self._stack.close()

    def run(self, batch: Any) -> bool:  # noqa: ANN401 - whatever the data loader yields
        """One forward and backward pass.

        Returns:
            Whether the batch was used (False: skipped for NaN or Inf).

        Raises:
            NonFiniteError: NaN or Inf in a gradient, unless ``skip_bad_batches``.
            DataError: the same of the loss, or a loss that no target takes part in.
            ArgumentError: a loss that is no scalar.
        """
        device = model_device(self._model)
        batch = batch if device is None else move_to_device(batch, device)
        before = self._snapshot()
        while True:
            self._failed = None
            try:
                self._differentiate(batch)
            except _BadBatchError as error:
                # A half-precision gradient overflows long before it is wrong: a smaller loss scale may do.
                self.sketches = before
                if error.gradient and self._scale > 1.0:
                    self._scale = max(1.0, self._scale / _SCALE_STEP)
                    before = self._snapshot()
                    continue
                if not self._skip_bad_batches:
                    raise error.reason from None
                self.bad_batches.append(self.passes)
                self.passes += 1
                return False
            break
        for sketch in self.sketches.values():
            sketch.close_batch()
        self.passes += 1
        return True

    def _snapshot(self) -> dict[str, GradientSketch]:
        """What to go back to; where nothing can go wrong without ending the run, nothing is copied."""
        needed = self._skip_bad_batches or (self._scales and self._scale > 1.0)
        return {name: sketch.copy() for name, sketch in self.sketches.items()} if needed else self.sketches

    def _differentiate(self, batch: Any) -> None:  # noqa: ANN401
        device = model_device(self._model) or torch.device("cpu")
        precision = nullcontext() if self._autocast is None else torch.autocast(device.type, dtype=self._autocast)
        with precision:
            loss = self._loss(self._model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ArgumentError(f"the loss must be a scalar tensor, got {got}; check loss_fn")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise _BadBatchError(
                DataError(
                    f"the loss of batch {self.passes} is {value} (batches count from 0); check that its labels are not "
                    "all masked (-100) and that the model's weights are finite, or skip such batches with "
                    "skip_bad_batches=True (--skip-bad-batches)"
                )
            )
        if not loss.requires_grad:
            raise DataError(
                f"the loss of batch {self.passes} depends on none of the {len(self._targets)} target layers; check "
                "forward_fn, loss_fn and target_modules"
            )
        try:
            (loss.float() * self._scale).backward()
        except RuntimeError as error:
            if self._failed is None:
                raise
            raise self._bad_gradient() from error
        if self._failed is not None:
            raise self._bad_gradient()

    def _bad_gradient(self) -> _BadBatchError:
        return _BadBatchError(NonFiniteGradientError(self._failed or "?", self.passes), gradient=True)

    def _observe(
        self,
        target: HookTarget,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,  # noqa: ANN401
    ) -> Tensor | None:
        """The hook: what reaches the layer is shown to its sketch once the gradient at its output is known."""
        if not torch.is_grad_enabled():
            return None  # the first run of a checkpointed block; it runs again in the backward pass
        layer_input = layer_tensor(args or tuple(kwargs.values()), target.path)
        if not isinstance(output, Tensor):
            raise ArgumentError(
                f"the output of layer '{target.path}' is a {type(output).__name__}, not a tensor, so its gradient "
                "cannot be read; leave it out of target_modules"
            )
        self.ran.add(target.name)
        feed = partial(self._feed, target, module)
        anchor = self._anchor.to(output.device)
        return _tap(output, layer_input.detach(), anchor, feed)

    def _feed(self, target: HookTarget, module: nn.Module, layer_input: Tensor, gradient: Tensor) -> None:
        if self._failed is not None:
            return
        sketch = self.sketches[target.name]
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            rows, deltas = _as_matrix_product(module, layer_input.detach(), gradient.detach())
            if (deltas.shape[-1], rows.shape[-1] if rows.ndim > 1 else sketch.shape[1]) != sketch.shape:
                raise ConfigError(
                    f"layer '{target.path}' is {sketch.shape[0]} x {sketch.shape[1]}, but its gradient is "
                    f"{deltas.shape[-1]} x {rows.shape[-1]}"
                )
            try:
                sketch.update(rows, deltas, scale=1.0 / self._scale)
            except FloatingPointError:
                self._failed = target.path  # raised at the end: other ranks may wait for this one's layers below

    def _reach_through_checkpoints(self, stack: ExitStack) -> None:
        """A reentrant checkpoint differentiates its block only if the block's input requires a gradient."""
        find = getattr(self._model, "get_input_embeddings", None)
        embeddings = find() if callable(find) else None
        if isinstance(embeddings, nn.Module):

            def anchor(_module: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ANN401
                del args
                return _tap(output, output.detach()[:0], self._anchor.to(output.device), None)

            stack.callback(embeddings.register_forward_hook(anchor).remove)


class _BadBatchError(Exception):
    """A batch with NaN or Inf, in a gradient or else in the loss; `reason` is what the user is told."""

    def __init__(self, reason: DataError, *, gradient: bool = False) -> None:
        self.reason = reason
        self.gradient = gradient
        super().__init__()


def _as_matrix_product(module: nn.Module, layer_input: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x and δ with ``∂loss/∂W = δᵀ x``, W being ``(out, in)``: any layer as a linear one.

    An embedding's rows are one-hot, given as indices; a convolution's are its patches, ``in·∏ kernel`` wide.
    """
    if isinstance(module, nn.Embedding):
        index, deltas = layer_input.reshape(-1), flatten_rows(gradient)
        if module.padding_idx is not None:  # which is never trained
            kept = index != module.padding_idx
            index, deltas = index[kept], deltas[kept]
        return index, deltas
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if module.groups != 1:
            raise ConfigError(f"a convolution with groups={module.groups} is no single matrix product")
        padding = module._reversed_padding_repeated_twice  # noqa: SLF001 - numbers, whatever 'same' means here
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = nn.functional.pad(layer_input, list(padding), mode=mode)
        for axis, (size, step, gap) in enumerate(
            zip(module.kernel_size, module.stride, module.dilation, strict=True), 2
        ):
            patches = patches.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
        # (batch, in, *places, *kernel): the sizes of a patch come last.
        patches = patches.movedim(1, gradient.dim() - 1).flatten(gradient.dim() - 1)
        return patches.reshape(-1, patches.shape[-1]), gradient.movedim(1, -1).reshape(-1, gradient.shape[1])
    return flatten_rows(layer_input), flatten_rows(gradient)
