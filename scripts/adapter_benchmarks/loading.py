"""Loading an adapter with a rank for every layer, as plans by budget give: ours beside PEFT's.

The model has the layers of a large language model by name and number, but tiny ones: what is measured is all that
loading does besides copying numbers. Patterns are grouped by rank, as this package writes them, or separate, as others
do; PEFT's time for separate ones grows with the square of their number. With ``--quick`` there are fewer layers.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_benchmarks.rows import Row
from torch import nn

from smartinit.adapters import LoraModel
from smartinit.config import LoraConfig
from smartinit.formats.peft import CONFIG_FILE
from smartinit.targets.patterns import alpha_for, rank_for

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BLOCKS, QUICK_BLOCKS = 126, 20  # Llama 3.1 405B has 126: 882 layers
WIDTH = 8


class Block(nn.Module):
    """The linear layers of a transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for kind in KINDS:
            setattr(self.self_attn if kind in KINDS[:4] else self.mlp, kind, nn.Linear(WIDTH, WIDTH, bias=False))


class Model(nn.Module):
    """Blocks under the names of a transformers model."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(blocks))


def run(options: argparse.Namespace) -> list[Row]:
    """Grouped patterns, separate ones, each side's own way, and the search for patterns without the rest."""
    blocks = QUICK_BLOCKS if options.quick else BLOCKS
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        names = _save(folder, blocks)
        grouped = json.loads((folder / CONFIG_FILE).read_text())
        ranks = {name: 1 + number % WIDTH for number, name in enumerate(names)}
        separate = grouped | {"r": WIDTH, "rank_pattern": ranks, "alpha_pattern": dict(ranks)}
        rows = []
        for what, config in (("grouped", grouped), ("separate", separate)):
            (folder / CONFIG_FILE).write_text(json.dumps(config))
            repeats = options.repeats if what == "grouped" else 1
            ours = _milliseconds(blocks, lambda model: LoraModel.from_pretrained(model, folder), options.repeats)
            theirs = _milliseconds(blocks, lambda model: _peft(model, folder), repeats)
            setting = f"{len(names)} layers, {len(config['rank_pattern'])} patterns ({what})"
            rows.append(Row("load", setting, ours_ms=ours, theirs_ms=theirs, note="tiny layers"))
    ours_ms, theirs_ms = rows[0].ours_ms, rows[1].theirs_ms
    rows.append(
        Row("load", "ours grouped, PEFT's separate", ours_ms=ours_ms, theirs_ms=theirs_ms, note="as each is written")
    )
    rows.append(
        Row("load", "patterns alone, separate", ours_ms=_ours_matching(ranks), theirs_ms=_pefts_matching(ranks))
    )
    return rows


def _ours_matching(ranks: dict[str, int]) -> float:
    """Milliseconds for the rank and the alpha of every layer."""
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=dict(ranks))
    start = time.perf_counter()
    for find in (rank_for, alpha_for):
        _ = [find(config, name) for name in ranks]
    return 1000 * (time.perf_counter() - start)


def _pefts_matching(ranks: dict[str, int]) -> float:
    from peft.utils.other import get_pattern_key

    start = time.perf_counter()
    for _ in ("rank", "alpha"):
        _ = [ranks[get_pattern_key(ranks.keys(), name)] for name in ranks]
    return 1000 * (time.perf_counter() - start)


def _save(folder: Path, blocks: int) -> list[str]:
    """Write an adapter whose layers have ranks 1 to 8 in turn, and say their names."""
    model = Model(blocks)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ranks = {name: 1 + number % WIDTH for number, name in enumerate(names)}
    config = LoraConfig(target_modules=names, rank_pattern=ranks, alpha_pattern=dict(ranks))
    adapted = LoraModel(model, config)
    for parameter in adapted.parameters():
        nn.init.normal_(parameter)
    adapted.save_pretrained(folder)
    return names


def _peft(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder))


def _milliseconds(blocks: int, load: Callable[[nn.Module], object], repeats: int) -> float:
    """Of the fastest of some runs, each into a model of its own."""
    times = []
    for _ in range(max(1, repeats)):
        model = Model(blocks)
        start = time.perf_counter()
        load(model)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)
