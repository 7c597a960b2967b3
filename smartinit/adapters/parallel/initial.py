"""The starts that Megatron Bridge has: random numbers for whole factors, of which each rank takes its shard.

So a layer starts from the same numbers however many ranks share it (Megatron's own depend on that number).
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.experts import ExpertAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from smartinit.adapters.parallel.adapter import LowRankAdapter

INITIAL: Mapping[str, Callable[[torch.Tensor, torch.Generator], torch.Tensor]] = {
    "xavier": lambda matrix, generator: nn.init.xavier_normal_(matrix, generator=generator),
    "normal": lambda matrix, generator: nn.init.normal_(matrix, 0.0, 0.2, generator=generator),
    "kaiming": lambda matrix, generator: nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator),
    # What Megatron Bridge calls so is kaiming's: U(±1/√in).
    "uniform": lambda matrix, generator: nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator),
    "zero": lambda matrix, _: nn.init.zeros_(matrix),
}
"""Init method -> what fills a matrix ``(out, in)``, in place."""


@torch.no_grad()
def fill(adapter: LowRankAdapter, a_method: str, b_method: str, *, seed: int, name: str, first_expert: int = 0) -> None:
    """Start the factors of one adapter.

    Args:
        adapter: its factors are written.
        a_method: of A, one of `INITIAL`.
        b_method: of B, likewise.
        seed: the same on all ranks.
        name: of the layer in the whole model; another one has other numbers.
        first_expert: number of this rank's first expert among all; another expert has other numbers.

    Cost: O(r·(in + out)) on the CPU, in float32.
    """
    (*experts, _, _), _ = adapter.whole_shapes()
    count = experts[0] if isinstance(adapter, ExpertAdapter) else 1
    pairs = [
        _pair(adapter, a_method, b_method, _seed_of(seed, f"{name}#{first_expert + i}" if experts else name))
        for i in range(count)
    ]
    a, b = (torch.stack(side) if experts else side[0] for side in zip(*pairs, strict=True))
    adapter.set_whole(a, b)


def common_seed() -> int:
    """A seed from torch's default generator, the same on every rank of the default process group; collective.

    It draws one number, so that the next adapters have others.
    """
    seed = torch.randint(2**62, (1,), dtype=torch.int64)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        seed = seed.to(collective_device())
        dist.broadcast(seed, src=0)
    return int(seed)


def collective_device() -> torch.device:
    """Where tensors must lie for the default process group to send them."""
    backends = dist.get_backend()
    if "gloo" in backends or "cpu" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _pair(adapter: LowRankAdapter, a_method: str, b_method: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    (*_, rank, columns), (*_, rows, _) = adapter.whole_shapes()
    generator = torch.Generator().manual_seed(seed)
    a = torch.empty(rank, columns, dtype=torch.float32, device="cpu")
    b = torch.empty(rows, rank, dtype=torch.float32, device="cpu")
    return INITIAL[a_method](a, generator), INITIAL[b_method](b, generator)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
