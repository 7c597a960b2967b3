"""``smartinit plan``: what compute would do, from the configuration alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from smartinit.cli.layer_table import layer_type
from smartinit.cli.options import adapter_options, data_options, model_options, output_options
from smartinit.cli.output import Output, human_bytes, human_count, table
from smartinit.cli.request import read_request
from smartinit.data.source import find_source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from smartinit.cli.load_model import ModelSource
    from smartinit.cli.request import Request
    from smartinit.targets import Target

# Siblings with these names read one tensor in all architectures that have them.
_SHARING = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"query", "key", "value"}),
    frozenset({"q", "k", "v"}),
    frozenset({"q_lin", "k_lin", "v_lin"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"wi_0", "wi_1"}),
)
# Of the rate that a large product reaches; attention, norms and small matrices are slower.
_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Work:
    """How much there is to run.

    Attributes:
        rows: usable rows, an upper bound until all were read.
        batches: forward passes at most.
        tokens: tokens in them, from the mean of the first batches.
        sampled: batches which that mean is from.
    """

    rows: int
    batches: int
    tokens: int
    sampled: int


@click.command("plan")
@model_options()
@data_options(required=False)
@adapter_options()
@output_options()
def command(**options: Any) -> int:  # noqa: ANN401 - click's options
    """Say what compute would do, without loading weights: layers, sites, memory, time, and what would be refused.

    Sites are guessed from the layers' names; a run finds them by looking at the tensors. The exit code is 2 when
    compute would refuse the request.
    """
    output = Output(as_json=options["as_json"], quiet=options["quiet"])
    request = read_request(options)
    if options["data"] is not None:
        find_source(options["data"], split=request.sampling.split)
    with output.work():
        found = examine(request, options)
    output.result(found, _render(found))
    return 2 if found["refused"] else 0


def examine(request: Request, options: dict[str, Any]) -> dict[str, Any]:
    """The dry run as plain values."""
    from smartinit.cli.load_model import choose_device, find_model, meta_model
    from smartinit.targets import select_targets

    source = find_model(options["model"], trust_remote_code=options["trust_remote_code"], weights=False)
    model = meta_model(source)
    targets = select_targets(model, request.config)
    sites = expected_sites(targets)
    costs = [_statistic(request, site) for site in sites]
    work = None if options["data"] is None else _measure_data(request, options, source)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    device = choose_device(options["device"])
    dtype = _dtype(options["dtype"], source, device)
    memory = {
        "weights": parameters * dtype.itemsize,
        "statistics": sum(cost.bytes for cost in costs),
    }
    ranks = _ranks(request, targets)
    return {
        "model": options["model"],
        "model_class": type(model).__name__,
        "parameters": parameters,
        "method": request.config.method,
        "targets": {target.name: {"shape": list(target.shape), "rank": ranks[target.name]} for target in targets},
        "sites": {"count": len(sites), "guessed": True, "names": [[target.name for target in site] for site in sites]},
        "ranks": sum(ranks.values()),
        "memory_bytes": memory,
        "data": None if work is None else vars(work),
        "time": None if work is None else _estimate(_flops_per_token(model, costs) * work.tokens, device, dtype),
        "refused": _refusals(request, targets),
    }


def expected_sites(targets: Sequence[Target]) -> list[list[Target]]:
    """Group targets that will read one tensor, by their names."""
    groups: dict[tuple[str, object, int], list[Target]] = {}
    for target in targets:
        parent, _, name = target.name.rpartition(".")
        family: object = next((family for family in _SHARING if name in family), name)
        groups.setdefault((parent, family, target.in_features), []).append(target)
    return list(groups.values())


def _ranks(request: Request, targets: Sequence[Target]) -> dict[str, int]:
    from smartinit.targets import rank_for

    return {target.name: rank_for(request.config, target.name) for target in targets}


def _components(request: Request, target: Target) -> int:
    """Directions that the layer competes with, as in the run itself."""
    from smartinit.planning.variance import component_limit
    from smartinit.targets import rank_for

    eva = request.config.eva_config
    rho = eva.rho if eva is not None and request.planner in (None, "variance") else 1.0
    limit = component_limit(rank_for(request.config, target.name), rho, min(target.shape))
    return limit if request.limits.max_rank is None else min(limit, request.limits.max_rank)


def _statistic(request: Request, site: Sequence[Target]) -> Any:  # noqa: ANN401 - StatisticCost
    from smartinit.statistics.cost import plan_statistic

    return plan_statistic(site[0].in_features, max(_components(request, target) for target in site))


def _refusals(request: Request, targets: Sequence[Target]) -> list[str]:
    from smartinit.errors import ConfigError
    from smartinit.initialisation import resolve_method
    from smartinit.targets import check_ranks

    refused = []
    try:
        resolve_method(request.config)
        check_ranks(targets, request.config)
        for target in targets:
            request.limits.floor(target.name, _components(request, target))
    except ConfigError as error:
        refused.append(str(error))
    return refused


def _measure_data(request: Request, options: dict[str, Any], source: ModelSource) -> Work:
    """Count rows, and tokens of the first batches."""
    from dataclasses import replace
    from itertools import islice

    from smartinit.cli.load_model import load_tokenizer, longest_input
    from smartinit.data import read_batches

    tokenizer = load_tokenizer(source)
    longest = longest_input(source, tokenizer) or request.sampling.max_length
    sampling = replace(request.sampling, max_length=min(longest, request.sampling.max_length))
    batches = read_batches(options["data"], tokenizer, sampling, causal=source.causal, vocab_size=source.vocab_size)
    sizes = [batch["input_ids"].numel() for batch in islice(batches, 32)]
    count = min(len(batches), request.max_batches or len(batches))
    tokens = round(sum(sizes) / len(sizes) * count)
    return Work(rows=count * sampling.batch_size, batches=count, tokens=tokens, sampled=len(sizes))


def _dtype(name: str, source: ModelSource, device: torch.device) -> torch.dtype:
    import torch

    saved = getattr(source.config, "dtype", None) if name == "auto" else name
    dtype = getattr(torch, saved) if isinstance(saved, str) else saved
    if not isinstance(dtype, torch.dtype) or (name == "auto" and device.type == "cpu" and dtype == torch.float16):
        return torch.float32
    return dtype


def _flops_per_token(model: torch.nn.Module, statistics: Sequence[Any]) -> float:
    """Two per weight of the matrices that a token passes, and the statistics' own."""
    import torch

    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    looked_up = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Embedding))
    return float(2 * (matrices - looked_up) + sum(statistic.flops_per_row for statistic in statistics))


def _estimate(flops: float, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Upper bound: every batch is run, no layer settles."""
    rate = _matmul_rate(device, dtype)
    return {
        "seconds": round(flops / (rate * _EFFICIENCY), 1),
        "assumption": f"{_EFFICIENCY:.0%} of the {human_count(rate)}FLOP/s that a large product reaches on {device}; "
        "less when layers settle early",
    }


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of a square product, measured for about a fifth of a second."""
    import torch

    size = 4096 if device.type == "cuda" else 768
    a = torch.ones(size, size, dtype=dtype, device=device)
    done, begun = 0, 0.0
    for step in range(1000):
        if step == 1:  # the first one warms up
            begun, done = time.perf_counter(), 0
        (a @ a)[0, 0].item()  # waits for an accelerator
        done += 1
        if step > 1 and time.perf_counter() - begun > 0.2:  # noqa: PLR2004 - seconds
            break
    return float(2 * size**3 * done / (time.perf_counter() - begun))


def _render(found: dict[str, Any]) -> str:
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, target in found["targets"].items():
        out, inner = target["shape"]
        kinds.setdefault((layer_type(name), f"{out} x {inner}"), []).append(target["rank"])
    rows = [(kind, len(ranks), shape, max(ranks)) for (kind, shape), ranks in kinds.items()]
    memory = found["memory_bytes"]
    lines = [
        f"{found['method']} on {found['model']}: {found['model_class']}, {human_count(found['parameters'])} parameters",
        "",
        table(("layers", "count", "out x in", "rank"), rows),
        "",
        (
            f"layers: {len(found['targets'])} on about {found['sites']['count']} sites (guessed from names), "
            f"{found['ranks']:,} ranks asked for"
        ),
        (
            f"memory: {human_bytes(memory['weights'])} of weights, {human_bytes(memory['statistics'])} of statistics, "
            "and one batch's activations"
        ),
    ]
    if found["data"] is not None:
        data = found["data"]
        lines.append(
            f"data:   {data['rows']:,} rows in {data['batches']:,} batches, about {data['tokens']:,} tokens "
            f"(padding included, mean of {data['sampled']} batches)"
        )
        lines.append(f"time:   at most about {found['time']['seconds']} s, assuming {found['time']['assumption']}")
    lines += [f"refused: {sentence}" for sentence in found["refused"]]
    return "\n".join(lines)
