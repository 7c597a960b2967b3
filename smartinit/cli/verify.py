"""Recompute layers of an adapter with scikit-learn in float64, and compare what is captured."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from tqdm import tqdm

from smartinit.activations.capture import Capture
from smartinit.artefact import Artefact
from smartinit.cli.load_model import find_model, load_tokenizer, load_weights
from smartinit.cli.output import table
from smartinit.data import Sampling, read_batches
from smartinit.data.source import find_source
from smartinit.errors import ConfigError, VerificationError
from smartinit.targets import select_targets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from smartinit.cli.output import Output
    from smartinit.targets import Target

PASSES_FROM = 0.99


class CollectedRows:
    """Keeps activation rows as they come, where the run itself keeps a summary of them.

    Attributes:
        limit: rows after the first so many are left out.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.components = 0
        self.rows = 0
        self._parts: list[torch.Tensor] = []

    def update(self, rows: torch.Tensor) -> None:
        """Add rows ``(b, d)``."""
        if not torch.isfinite(rows).all():
            raise FloatingPointError
        kept = rows[: self.limit - self.rows]
        if len(kept):
            self._parts.append(kept.to(device="cpu", dtype=torch.float32, copy=True))
            self.rows += len(kept)

    def matrix(self) -> NDArray[np.float64]:
        """``(rows, d)`` in float64."""
        return torch.cat(self._parts).double().numpy()


def verify(folder: Path, options: Mapping[str, Any], output: Output) -> dict[str, Any]:
    """Check an adapter of smartinit against its own data.

    Raises:
        VerificationError: a digest is wrong, in the folder or of the data.
        ConfigError: an adapter that this cannot recompute, or one that does not say what from.
    """
    artefact = Artefact.load(folder)
    provenance = artefact.provenance
    if artefact.recipe.method != "eva":
        raise ConfigError(f"--verify recomputes EVA only; {folder} was made with '{artefact.recipe.method}'")
    if "batches_of" not in provenance:
        raise ConfigError(
            f"{folder} does not say which batches it was computed from; only `smartinit compute` records that"
        )
    name, data = options["model"] or provenance["model"], options["data"] or provenance["data"]
    sampling = Sampling.from_dict(provenance["batches_of"])
    source = find_source(data, split=sampling.split)
    if provenance["data_sha256"] not in (None, source.sha256):
        raise VerificationError(
            f"{data} is not the data that {folder} was computed from: its sha256 differs; pass that file with --data"
        )
    model_source = find_model(name, trust_remote_code=options["trust_remote_code"])
    batches = read_batches(
        source, load_tokenizer(model_source), sampling, causal=model_source.causal, vocab_size=model_source.vocab_size
    )
    model = load_weights(model_source, dtype=options["dtype"], device=options["device"])
    targets = _sample(
        artefact, {target.name: target for target in select_targets(model, artefact.config)}, options["layers"]
    )
    passes = provenance["batches"] + len(provenance["bad_batches"])
    capture = Capture(
        model,
        targets,
        lambda *_: CollectedRows(options["max_rows"]),  # type: ignore[arg-type] # update is all it needs
        config=artefact.config,
        skip_bad_batches=bool(provenance["bad_batches"]),
    )
    with capture:
        for batch in tqdm(
            islice(batches, passes), total=passes, desc="activations", unit="batch", disable=output.quiet
        ):
            capture.run(batch)
    found: dict[str, Any] = {name: site.statistic for site in capture.sites for name in site.names}
    layers = [_compare(artefact, target.name, found[target.name].matrix()) for target in targets]
    return {
        "ok": all(layer["ok"] for layer in layers),
        "folder": str(folder),
        "model": name,
        "data": data,
        "layers": layers,
    }


def _sample(artefact: Artefact, targets: Mapping[str, Target], count: int) -> Sequence[Target]:
    """Layers with an adapter, evenly spread over the model, of different sites as far as there are enough."""
    leaders = [next((name for name in site if artefact.plan.ranks[name]), None) for site in artefact.sites]
    names = [name for name in leaders if name is not None]
    missing = [name for name in names if name not in targets]
    if missing:
        raise VerificationError(f"the model has no layer '{missing[0]}' of the adapter; is it for another model?")
    chosen = np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int))
    return [targets[names[i]] for i in chosen]


def _compare(artefact: Artefact, name: str, rows: NDArray[np.float64]) -> dict[str, Any]:
    """Variance that the adapter's rows capture against that of scikit-learn's components."""
    rank = artefact.plan.ranks[name]
    directions = np.linalg.qr(artefact.factors[name].a.double().numpy().T)[0]  # whitening must not matter
    centred = rows - rows.mean(0)
    total = float((centred**2).sum())
    captured = float(((centred @ directions) ** 2).sum()) / total if total else 1.0
    best = PCA(min(rank, *rows.shape)).fit(rows)
    optimum = float(best.explained_variance_ratio_.sum()) if total else 1.0
    share = captured / optimum if optimum else 1.0
    return {
        "layer": name,
        "rank": rank,
        "rows": len(rows),
        "captured": captured,
        "optimum": optimum,
        "share": share,
        "ok": share >= PASSES_FROM,
    }


def render(report: dict[str, Any]) -> str:
    """The comparison as a table and one sentence."""
    rows = [
        (
            layer["layer"],
            layer["rank"],
            layer["rows"],
            f"{layer['captured']:.5f}",
            f"{layer['optimum']:.5f}",
            f"{layer['share']:.5f}",
            "ok" if layer["ok"] else "too low",
        )
        for layer in report["layers"]
    ]
    failed = sum(not layer["ok"] for layer in report["layers"])
    verdict = (
        f"verified: every sampled layer captures at least {PASSES_FROM:.0%} of what scikit-learn's PCA captures"
        if report["ok"]
        else f"NOT verified: {failed} of {len(rows)} layers capture less than {PASSES_FROM:.0%} of the optimum"
    )
    return "\n".join([table(("layer", "rank", "rows", "captured", "optimum", "share", ""), rows), "", verdict])
