"""Run the data through the model, forwards and backwards, and keep a sketch of every target's mean gradient."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from smartinit.activations.backward import BackwardCapture
from smartinit.activations.forward import unwrap, without_cache
from smartinit.activations.rows import forward_fn_dict, token_masks
from smartinit.activations.state import model_device
from smartinit.distributed.passes import RanksInStep, expected_passes, length_of, most_passes
from smartinit.distributed.reduce import any_rank, is_first_rank, merge_over_ranks, world_size
from smartinit.errors import ArgumentError, ConfigError, DataError
from smartinit.statistics.gradient import GradientSketch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import nn

    from smartinit.activations.rows import ForwardFn
    from smartinit.statistics.base import Statistic
    from smartinit.targets.weight import Target

LossFn = Callable[[Any, Any], Tensor]
"""``(output, batch)`` to a scalar."""

# LoRA-GA takes twice as many singular triplets as it has ranks.
TRIPLETS_PER_RANK = 2
_MASKED = -100
# Residual of the directions with which a pass began; those with which it ends miss about its fourth power of the
# energy: 5e-4 at most.
_SETTLED = 0.15


@dataclass
class CollectedGradients:
    """What the passes over the data left behind.

    Attributes:
        sketches: of every target that took part in a loss, by name.
        idle: targets that never ran, or that no loss depends on; they have no sketch.
        batches: losses that were differentiated in the last pass, on this rank.
        tokens: tokens of those batches that are no padding; 0 where that cannot be told.
        bad_batches: indices of batches skipped for NaN or Inf.
        seconds: wall time of the passes.
        passes: passes over the data.
    """

    sketches: dict[str, GradientSketch]
    idle: tuple[str, ...] = ()
    batches: int = 0
    tokens: int = 0
    bad_batches: list[int] = field(default_factory=list)
    seconds: float = 0.0
    passes: int = 0


@torch.inference_mode(mode=False)
def collect_gradients(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Any],
    components: Mapping[str, int],
    *,
    max_batches: int | None = None,
    loss_fn: LossFn | None = None,
    forward_fn: ForwardFn = forward_fn_dict,
    seed: int = 0,
    passes: int = 3,
    autocast: torch.dtype | None = None,
    skip_bad_batches: bool = False,
    merge_ranks: bool = True,
    show_progress_bar: bool = True,
) -> CollectedGradients:
    """Sketch the mean gradient of the loss with respect to every target's weight.

    No parameter gets a ``.grad`` and no gradient is ever formed as a matrix, except where one is no larger than its
    sketch. The first pass sees gradients through random matrices; every further one through the singular directions
    found so far, which makes them much more accurate: what a pass leaves out is squared by the next.

    Args:
        model: run as is, in eval mode, with its parameters frozen; left as it was.
        targets: whose gradients are wanted.
        batches: iterated once per pass; what can be iterated only once (a generator) gets a single pass.
        components: by target name, ranks that will be asked for, at most; twice as many triplets are kept.
        max_batches: bound on the batches of one pass; None: all, of a stream without a length at most 10,000.
        loss_fn: ``(output of forward_fn, batch)`` to a scalar; None: the model's own loss, which needs ``labels`` in
            the batch. For a causal language model without them they are the input tokens, padding left out.
        forward_fn: ``(model, batch)`` to the model's output.
        seed: of the random matrices.
        passes: passes over the data, at most; a layer leaves once its directions moved little (see `_SETTLED`), and
            the passes end with the last of them. Usually two or three.
        autocast: run the forward pass under `torch.autocast` with this dtype.
        skip_bad_batches: count and skip batches with NaN or Inf in the loss or a gradient.
        merge_ranks: with several ranks, the gradient is the mean over all of them.
        show_progress_bar: tqdm on stderr, on the first rank only.

    Raises:
        ConfigError: ``passes`` below 1.
        DataError: no batch, no usable one, no loss, a loss that is NaN or depends on no target, gradients that are all
            zero.
        NonFiniteError: NaN or Inf in a gradient.

    Warns:
        UserWarning: some targets got no gradient.

    Cost: per pass and batch a forward and backward pass without weight gradients, two thirds of a training step's
    work, plus ``2 (in + out)(p + q)`` flops per token and target, see `GradientSketch`.
    """
    if passes < 1:
        raise ConfigError(f"passes={passes}: expected at least 1")
    once = isinstance(batches, Iterator)
    device = model_device(model) or torch.device("cpu")
    ranks = RanksInStep(device, merge_ranks and world_size() > 1)
    with ranks.failing_together():
        if length_of(batches) == 0:
            raise DataError("the dataloader is empty: it has no batch to compute gradients from")
    started = time.perf_counter()
    out = CollectedGradients(
        {
            target.name: GradientSketch(
                target.out_features,
                target.in_features,
                TRIPLETS_PER_RANK * components[target.name],
                seed=seed,
                device=target.device if target.device.type != "meta" else device,
            )
            for target in targets
        }
    )
    once = isinstance(batches, Iterator) or all(sketch.exact for sketch in out.sketches.values())
    if ranks.exchange:
        once = any_rank([once], device)[0]
    planned = 1 if once else passes
    expected = expected_passes(batches, max_batches)
    progress = tqdm(
        total=None if expected is None else expected * planned,
        desc="gradients",
        unit="batch",
        disable=not (show_progress_bar and is_first_rank()),
    )
    loss = _ModelLoss(forward_fn, loss_fn)
    with progress:
        for number in range(planned):
            wanted = list(targets)
            if number:
                with ranks.failing_together():
                    wanted = [target for target in targets if _refine(out.sketches, target.name)]
            if not wanted:
                break
            capture = BackwardCapture(
                model,
                wanted,
                {t.name: out.sketches[t.name] for t in wanted},
                loss=loss,
                autocast=autocast,
                skip_bad_batches=skip_bad_batches,
            )
            stream = ranks.together(batches, most_passes(batches, max_batches))
            with capture:
                out.batches, out.tokens = _one_pass(capture, stream, ranks, progress)
            out.sketches |= capture.sketches
            out.bad_batches = capture.bad_batches
            out.passes += 1
            with ranks.failing_together():
                _check_usable(out, capture.passes)
            if ranks.exchange:
                _merge(out.sketches, wanted, device)
            del capture  # it holds the sums that the next pass replaces
    _set_idle_apart(out)
    out.seconds = time.perf_counter() - started
    return out


def _refine(sketches: dict[str, GradientSketch], name: str) -> bool:
    """Ready a layer for another pass, if it needs one. One by one, so that old sums are freed as new ones begin."""
    residual = sketches[name].triplets(sketches[name].components).certificate.residual
    if residual is not None and residual <= _SETTLED:
        return False
    sketches[name] = sketches[name].refined()
    return True


def _one_pass(
    capture: BackwardCapture, batches: Iterable[Any], ranks: RanksInStep, progress: tqdm[Any]
) -> tuple[int, int]:
    """Batches and tokens that were used."""
    used = tokens = 0
    for batch in batches:
        with ranks.failing_together():
            if capture.run(batch):
                used += 1
                tokens += _tokens(batch)
        progress.update()
    return used, tokens


def _set_idle_apart(out: CollectedGradients) -> None:
    """Leave only sketches that saw something, and refuse gradients that have no direction at all."""
    ran = [name for name, sketch in out.sketches.items() if sketch.rows]
    if not ran:
        raise DataError(
            f"no target layer took part in a loss in {out.batches} batches; check forward_fn, loss_fn and "
            "target_modules"
        )
    alive = {name: out.sketches[name] for name in ran if not out.sketches[name].is_zero}
    if not alive:
        raise DataError(
            f"the gradients of all {len(ran)} target layers are zero in all {out.batches} batches, so there is no "
            "direction to start from; check that the loss depends on what the layers compute"
        )
    out.idle = tuple(name for name in out.sketches if name not in alive)
    if out.idle:
        warnings.warn(
            f"{len(out.idle)} of {len(out.sketches)} layers got no gradient from {out.batches} batches (the first: "
            f"'{out.idle[0]}'), because they never ran or the loss does not depend on them; they start as LoRA does "
            "by default",
            stacklevel=4,
        )
    out.sketches = alive


def _merge(sketches: dict[str, GradientSketch], targets: Sequence[Target], device: torch.device) -> None:
    names = [target.name for target in targets]
    # It asks for `settle`, `state`, `merge` and `from_state` only, which sketches have.
    mine = cast("list[Statistic]", [sketches[name] for name in names])
    merged = cast("list[GradientSketch]", merge_over_ranks(mine, names, device, [t.counts for t in targets]))
    sketches.update(zip(names, merged, strict=True))


@dataclass(frozen=True)
class _ModelLoss:
    """The loss of a batch: the caller's, or the model's own."""

    forward_fn: ForwardFn
    loss_fn: LossFn | None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401
        if self.forward_fn is forward_fn_dict:
            batch = without_cache(model, batch)
        if self.loss_fn is not None:
            return self.loss_fn(self.forward_fn(model, batch), batch)
        if self.forward_fn is forward_fn_dict:
            batch = _with_labels(model, batch)
        output = self.forward_fn(model, batch)
        if isinstance(output, Tensor) and output.numel() == 1:
            return output
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        raise DataError(
            f"the model's output ({type(output).__name__}) holds no loss; put 'labels' into the batches, or pass "
            "loss_fn(output, batch)"
        )


def _with_labels(model: nn.Module, batch: Any) -> Any:  # noqa: ANN401
    """The batch, of a causal language model with the labels that trainers give it: its tokens, padding masked."""
    if not isinstance(batch, Mapping):
        raise ArgumentError(
            f"a batch must be a mapping of names to tensors, got {type(batch).__name__}; pass forward_fn and loss_fn "
            "for other batches"
        )
    tokens = batch.get("input_ids")
    if "labels" in batch or not isinstance(tokens, Tensor) or not _is_causal(model):
        return batch
    attended = batch.get("attention_mask")
    labels = tokens.clone()
    if isinstance(attended, Tensor) and attended.shape == labels.shape:
        labels[attended == 0] = _MASKED
    return {**batch, "labels": labels}


def _is_causal(model: nn.Module) -> bool:
    inner = unwrap(model)
    can_generate = getattr(inner, "can_generate", None)
    generates = callable(can_generate) and bool(can_generate())
    return generates and not getattr(getattr(inner, "config", None), "is_encoder_decoder", False)


def _tokens(batch: Any) -> int:  # noqa: ANN401
    if not isinstance(batch, Mapping):
        return 0
    masks = token_masks(batch, use_label_mask=False)
    return int(masks[0].sum()) if masks else 0


def _check_usable(collected: CollectedGradients, seen: int) -> None:
    if seen == 0 and collected.passes > 1:
        raise DataError(
            f"the dataloader gave no batch in pass {collected.passes}; pass something that can be iterated again, or "
            "passes=1"
        )
    if seen == 0:
        raise DataError("the dataloader gave no batch to compute gradients from")
    if not collected.batches:
        raise DataError(
            f"all {seen} batches have NaN or Inf in the loss or a gradient; check the data and the model's weights"
        )
