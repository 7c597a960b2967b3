"""One rank of a data-parallel run of gradients; started by test_gradients_of_ranks.py."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from smartinit.config import LoraConfig
from smartinit.errors import SmartinitError
from smartinit.gradients import collect_gradients
from smartinit.targets.select import select_targets

RANK, WORLD, FOLDER, CASE = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]


def main() -> None:
    """Sketch this rank's share; save the triplets and how much was sent."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **tokens)).eval()
    ids = torch.randint(3, 64, (6, 4, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "labels": part} for part in ids][RANK::WORLD]
    if CASE == "nan" and RANK == 1:
        batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    sent = []
    if WORLD > 1:
        place = f"file://{FOLDER}/rendezvous"
        dist.init_process_group("gloo", init_method=place, rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60))
        gather = dist.all_gather
        dist.all_gather = lambda out, tensor, **kw: (sent.append(tensor.numel()), gather(out, tensor, **kw))
    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    try:
        found = collect_gradients(model, targets, batches, {t.name: 3 for t in targets}, show_progress_bar=False)
    except SmartinitError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")
        sys.exit(3)
    state = {"sent": torch.tensor(sum(sent)), "batches": torch.tensor(found.batches)}
    for name, sketch in found.sketches.items():
        triplets = sketch.triplets(6)
        state[name] = (triplets.u.double() * triplets.s) @ triplets.v.double()
    save_file(state, FOLDER / f"{CASE}-{RANK}-of-{WORLD}.safetensors")


if __name__ == "__main__":
    main()
