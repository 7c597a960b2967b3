"""One rank of data-parallel runs; started by test_reduce.py with rank, world size, folder and the cases to run."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import smartinit as si
from smartinit.errors import SmartinitError

RANK, WORLD, FOLDER, CASES = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]


def share(case: str) -> list[dict[str, torch.Tensor]]:
    """This rank's part of the same twelve batches; two fewer on the last rank if the case says so."""
    ids = torch.randint(3, 64, (12, 8, 40), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids][RANK::WORLD]
    batches = batches[:-2] if case == "uneven" and RANK == WORLD - 1 else batches
    return batches * (4 if case == "more" else 1)


def scatters(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Exact centred second moments of what reaches each linear layer."""
    rows: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            keep = rows.setdefault(f"scatter.model.{name}", [])
            module.register_forward_pre_hook(lambda _m, a, keep=keep: keep.append(a[0].flatten(0, 1).double()))
    with torch.no_grad():
        for batch in share("plain"):
            model(**batch)
    centred = {name: torch.cat(parts) - torch.cat(parts).mean(0) for name, parts in rows.items()}
    return {name: x.mT @ x for name, x in centred.items()}


def main() -> None:
    """Run EVA for each case; save what this rank got and how much it sent."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 160, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **tokens)).eval()
    sent = []
    if WORLD > 1:
        place = f"file://{FOLDER}/rendezvous"
        dist.init_process_group("gloo", init_method=place, rank=RANK, world_size=WORLD, timeout=timedelta(seconds=60))
        gather = dist.all_gather
        dist.all_gather = lambda out, tensor, **kw: (sent.append(tensor.numel()), gather(out, tensor, **kw))
    eva = si.EvaConfig(tau=1.0, rho=1.0)
    config = si.LoraConfig(r=8, target_modules="all-linear", init_lora_weights="eva", eva_config=eva)
    for case in CASES:
        if case == "nan" and RANK == 1:
            with torch.no_grad():
                model.model.embed_tokens.weight.fill_(float("nan"))
        sent.clear()
        data = share(case)
        if case == "skip" and RANK == 1:
            data[0]["input_ids"][0, 0] = 2  # the token whose embedding is NaN
        try:
            if case == "skip":
                with torch.no_grad():
                    model.model.embed_tokens.weight[2] = float("nan")
                artefact = si.compute(model, config, data, skip_bad_batches=True, show_progress_bar=False)
                state = {name: factors.a for name, factors in artefact.factors.items()}
            else:
                state = si.get_eva_state_dict(model, data, config, show_progress_bar=False)
        except SmartinitError as error:
            sys.stdout.write(f"{type(error).__name__}: {error}\n")
            sys.stdout.flush()
            os._exit(3)  # a group that is torn down while its peers wait may abort the process
        state["sent"] = torch.tensor(sum(sent))
        if WORLD == 1:
            state |= scatters(model)
        save_file(state, FOLDER / f"{case}-{RANK}-of-{WORLD}.safetensors")


if __name__ == "__main__":
    main()
