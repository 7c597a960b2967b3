"""Bases that have given a start up: the folder of the adapter keeps it, and the adapter comes back to the base."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from test_exported import FFN, GROUPS, HEADS, HIDDEN, ROWS, SHAPE, SIZE, Decoder, largest_gap, put_base
from torch import nn

import smartinit as si
from smartinit.convert import convert_adapter, save_residual_model
from smartinit.errors import ArtefactError, ConfigError, ModelError, VerificationError
from smartinit.export import export_adapter
from smartinit.formats.megatron_folder import ShardedFolder
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, load_adapter, save_adapter
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from ranks import Ranks

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in")
KINDS: dict[str, Any] = {"lora": LoRA, "dora": DoRA, "canonical": CanonicalLoRA}
MISMATCH = "given its start up"


def llama() -> nn.Module:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            head_dim=SIZE,
            intermediate_size=FFN,
            num_hidden_layers=2,
            vocab_size=32,
            initializer_range=0.3,
        )
    )


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """By the names that `put_base` knows."""
    state = model.state_dict()
    return {f"layers.{i}.{name}": state[f"model.layers.{i}.{name}.weight"].clone() for i in range(2) for name in ROWS}


def merged_by_peft(base: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    adapted = peft.PeftModel.from_pretrained(base.double(), folder, autocast_adapter_dtype=False)
    return weights_of(adapted.merge_and_unload())


def here() -> tuple[Any, int, int]:
    if not dist.is_initialized():
        return None, 0, 1
    return dist.group.WORLD, dist.get_rank(), dist.get_world_size()


def decoder(weights: dict[str, torch.Tensor]) -> nn.Module:
    group, rank, size = here()
    model = Decoder(group)
    put_base(model, weights, rank, size)
    return model


def train(model: nn.Module) -> None:
    """A few steps of Adam towards outputs that the base does not give."""
    _, rank, size = here()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for place, layer in adapted_layers(model):
            row = place.name.endswith(("linear_proj", "linear_fc2"))
            width = layer.to_wrap.weight.shape[1] * (size if row else 1)
            x = torch.randn(6, width, generator=generator)
            loss = loss + (layer(x.chunk(size, -1)[rank] if row else x)[0] - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def split_and_trained(kind: str, method: str, base: str, folder: str) -> float:
    """Split, train and save on every rank; what moved."""
    model = decoder(load_file(base))
    KINDS[kind](dim=4, alpha=8)(model)
    adapter = KINDS[kind](dim=4, alpha=8, lora_A_init_method=method)
    adapter.initialize(model, show_progress_bar=False).save(f"{folder}-artefact-{here()[1]}")
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train(model)
    after = [p.detach() for p in model.parameters() if p.requires_grad]
    save_adapter(model, folder, adapter)
    return max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))


def gap_to(kind: str, folder: Path, base: nn.Module, merged: dict[str, torch.Tensor]) -> float:
    """Outputs of the split model with the folder's adapter against merged weights."""
    model = decoder(weights_of(base))
    KINDS[kind](dim=4, alpha=8, lora_A_init_method="pissa" if "pissa" in folder.name else "olora")(model)
    load_adapter(model, folder)
    return largest_gap(model, merged, 0, 1)


@pytest.mark.parametrize(("kind", "method"), [("lora", "pissa"), ("canonical", "pissa"), ("lora", "olora")])
def test_a_split_in_megatron_comes_back_to_the_unmodified_base(kind: str, method: str, tmp_path: Path) -> None:
    save_file(weights_of(llama()), tmp_path / "base.safetensors")
    folder = tmp_path / f"trained-{method}"
    assert split_and_trained(kind, method, str(tmp_path / "base.safetensors"), str(folder)) > 0.02
    with pytest.raises(ConfigError, match="--heads, --groups, --head-size"):
        convert_adapter(folder, None, tmp_path / "plain")
    artefact = Path(f"{folder}-artefact-0")
    for start in (None, folder, artefact):
        convert_adapter(folder, start, tmp_path / "plain", force=True, **SHAPE)
        assert gap_to(kind, folder, llama(), merged_by_peft(llama(), tmp_path / "plain")) < 1e-4, start
    done = export_adapter(folder, tmp_path / "peft", to="peft", **SHAPE)
    assert done.base == "residual"
    assert any("goes with the residual base" in note for note in done.notes)
    convert_adapter(tmp_path / "peft", None, tmp_path / "plain", force=True)
    assert gap_to(kind, folder, llama(), merged_by_peft(llama(), tmp_path / "plain")) < 1e-4
    exported = export_adapter(artefact, tmp_path / "megatron", **SHAPE)
    assert exported.base == "residual"
    convert_adapter(folder, tmp_path / "megatron", tmp_path / "plain", force=True, **SHAPE)
    assert gap_to(kind, folder, llama(), merged_by_peft(llama(), tmp_path / "plain")) < 1e-4


@pytest.mark.parametrize("kind", ["lora", "canonical"])
def test_ranks_keep_the_start_that_one_process_keeps(kind: str, tmp_path: Path, two_ranks: Ranks) -> None:
    save_file(weights_of(llama()), tmp_path / "base.safetensors")
    folder = tmp_path / "trained-pissa"
    two_ranks.run(split_and_trained, kind, "pissa", str(tmp_path / "base.safetensors"), str(folder))
    split_and_trained(kind, "pissa", str(tmp_path / "base.safetensors"), str(tmp_path / "one"))
    ours, theirs = (ShardedFolder.open(path / "start") for path in (folder, tmp_path / "one"))
    assert list(ours.keys()) == list(theirs.keys())
    assert all(torch.equal(ours.read(key), theirs.read(key)) for key in ours.keys())  # noqa: SIM118 - not a dict
    convert_adapter(folder, None, tmp_path / "plain", **SHAPE)
    assert gap_to(kind, folder, llama(), merged_by_peft(llama(), tmp_path / "plain")) < 1e-4


def trained_from_export(folder: str, base: str, out: str) -> None:
    """Load what was exported, knowing that the base is the residual one; train and save."""
    model = decoder(load_file(base))
    config = ShardedFolder.open(folder).config
    kind = LoRA if config["peft_type"] == "lora" else CanonicalLoRA
    kind(**{name: config[name] for name in ("dim", "alpha", "target_modules")})(model)
    load_adapter(model, folder, residual_base=True)
    load_adapter(model, folder)  # now it is known
    assert not any("loaded_start" in key for key in model.state_dict())
    train(model)
    save_adapter(model, out)


@pytest.mark.parametrize("many", [False, True], ids=["one rank", "two ranks"])
def test_an_exported_start_is_kept_by_what_is_trained_from_it(many: bool, tmp_path: Path, two_ranks: Ranks) -> None:
    config = si.LoraConfig(
        r=4, lora_alpha=8, target_modules=[name.rpartition(".")[2] for name in ROWS], init_lora_weights="pissa"
    )
    artefact = si.compute(llama(), config, show_progress_bar=False)
    artefact.save(tmp_path / "start")
    save_residual_model(llama(), artefact, tmp_path / "residual")
    residual = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "residual")
    save_file(weights_of(residual), tmp_path / "residual.safetensors")
    export_adapter(tmp_path / "start", tmp_path / "megatron", **SHAPE)
    paths = [str(tmp_path / name) for name in ("megatron", "residual.safetensors", "trained")]
    if many:
        two_ranks.run(trained_from_export, *paths)
    else:
        trained_from_export(*paths)
    said(tmp_path / "trained", base_model="some/base")
    done = export_adapter(tmp_path / "trained", tmp_path / "peft", to="peft")
    assert done.base == "residual"
    convert_adapter(tmp_path / "trained", None, tmp_path / "plain")
    named = [
        json.loads((tmp_path / one / "adapter_config.json").read_text())["base_model_name_or_path"]
        for one in ("peft", "peft/start", "plain")
    ]
    assert named == [None, None, "some/base"]  # a loader that looked the base up by name would take the wrong one
    expected = merged_by_peft(residual, tmp_path / "peft")
    got = merged_by_peft(llama(), tmp_path / "plain")
    assert max(float((got[name] - expected[name]).abs().max()) for name in got) < 1e-5
    model = decoder(load_file(tmp_path / "residual.safetensors"))
    CanonicalLoRA(dim=4, alpha=8)(model)
    load_adapter(model, tmp_path / "trained", residual_base=True)
    assert largest_gap(model, got, 0, 1) < 1e-4
    split = decoder(weights_of(llama()))
    CanonicalLoRA(dim=4, alpha=8, lora_A_init_method="pissa")(split)
    with pytest.raises(ConfigError, match="have given up another one"):
        load_adapter(split, tmp_path / "trained")


def said(folder: Path, **changes: object) -> None:
    """Write these values into a folder's JSON; None: there is none, and "null": null."""
    marker = folder / "megatron_adapter.json"
    content = {**json.loads(marker.read_text()), **changes}
    content = {name: None if value == "null" else value for name, value in content.items() if value is not None}
    marker.write_text(json.dumps(content))


def test_a_folder_of_others_is_a_start_that_splits_unless_it_says_otherwise(tmp_path: Path) -> None:
    model = split("pissa")
    train(model)
    save_adapter(model, tmp_path / "trained")
    shutil.copytree(tmp_path / "trained" / "start", tmp_path / "others")
    said(tmp_path / "others", start=None, effect=None)
    convert_adapter(tmp_path / "trained", tmp_path / "others", tmp_path / "plain", **SHAPE)
    assert largest_gap(model, merged_by_peft(llama(), tmp_path / "plain"), 0, 1) < 1e-4
    said(tmp_path / "others", start="null")
    said(tmp_path / "trained", start="null")  # else its own start contradicts the other
    convert_adapter(tmp_path / "trained", tmp_path / "others", tmp_path / "same", **SHAPE)
    ranks = [json.loads((tmp_path / one / "adapter_config.json").read_text())["r"] for one in ("plain", "same")]
    assert ranks == [8, 4]


def test_a_start_that_is_lost_or_another_is_not_loaded(tmp_path: Path) -> None:
    save_adapter(split("pissa"), tmp_path / "split")
    model = split("pissa")
    file = next((tmp_path / "split" / "start").glob("shard-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(VerificationError, match="is not the file that"):
        load_adapter(model, tmp_path / "split")
    file.unlink()
    with pytest.raises(ArtefactError, match="has lost its start"):
        load_adapter(model, tmp_path / "split")
    said(tmp_path / "split", start={"../../secret": "0"})
    with pytest.raises(ArtefactError, match="expected its files and their digests"):
        load_adapter(model, tmp_path / "split")


def split(method: str, seed: int = 1) -> nn.Module:
    weights = {name: weight * (1 + 0.5 * (seed - 1)) for name, weight in weights_of(llama()).items()}
    model = decoder(weights)
    LoRA(dim=4, alpha=8, lora_A_init_method=method.partition(",")[0])(model)
    if "less one" in method:
        del next(layer for _, layer in adapted_layers(model))._modules["given_up"]
    return model


def warned(method: str, folder: str, *, seed: int = 1) -> list[str]:
    """What a rank is told when it loads."""
    model = split(method, seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapter(model, folder)
    return [str(one.message) for one in caught]


def saved_as(method: str, folder: str) -> None:
    save_adapter(split(method), folder)


def test_another_base_than_the_adapters_is_told(tmp_path: Path, two_ranks: Ranks) -> None:
    saved_as("pissa", str(tmp_path / "split"))
    saved_as("xavier", str(tmp_path / "plain"))
    for run in (lambda f, *a, **k: [f(*a, **k)], two_ranks.run):
        for method, folder, words in (
            ("pissa", "split", ""),
            ("pissa, less one", "split", "gave up another start"),
            ("xavier", "plain", ""),
            ("xavier", "split", MISMATCH),
            ("pissa", "plain", "have given up a start"),
            ("olora", "split", "gave up another start"),
        ):
            for found in run(warned, method, str(tmp_path / folder)):
                assert len(found) == bool(words)
                assert all(words in one for one in found)


def test_a_base_of_two_starts_is_not_saved(tmp_path: Path) -> None:
    save_adapter(split("pissa"), tmp_path / "split")
    model = split("xavier")
    load_adapter(model, tmp_path / "split", residual_base=True)
    LoRA(dim=4, alpha=8, lora_A_init_method="olora").initialize(model, show_progress_bar=False)
    with pytest.raises(ModelError, match="several starts"):
        save_adapter(model, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_base_that_was_given_back_is_the_original(tmp_path: Path) -> None:
    lora = LoRA(dim=4, alpha=8, lora_A_init_method="pissa")
    model = decoder(weights_of(llama()))
    lora(model)
    lora.restore_base(model)
    save_adapter(model, tmp_path / "plain", lora)
    assert ShardedFolder.open(tmp_path / "plain").config["start"] is None
    assert export_adapter(tmp_path / "plain", tmp_path / "peft", to="peft", **SHAPE).base == "unmodified"


def test_a_quantised_base_takes_no_other_adapter(tmp_path: Path) -> None:
    model = decoder(weights_of(llama()))
    lora = LoRA(dim=4, alpha=4, lora_A_init_method="loftq")
    lora(model)
    save_adapter(model, tmp_path / "trained", lora)
    with pytest.raises(ConfigError, match="quantised the base"):
        export_adapter(tmp_path / "trained", tmp_path / "peft", to="peft", **SHAPE)
    with pytest.raises(ConfigError, match="quantises"):
        convert_adapter(tmp_path / "trained", None, tmp_path / "plain", **SHAPE)


def test_a_start_that_keeps_the_base_has_nothing_to_subtract(tmp_path: Path) -> None:
    model = decoder(weights_of(llama()))
    lora = LoRA(dim=4, alpha=8, lora_A_init_method="orthogonal")
    lora(model)
    lora.initialize(model, show_progress_bar=False).save(tmp_path / "start")
    train(model)
    save_adapter(model, tmp_path / "trained", lora)
    convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain", **SHAPE)
    assert largest_gap(model, merged_by_peft(llama(), tmp_path / "plain"), 0, 1) < 1e-4


def test_dora_comes_back_with_its_magnitudes(tmp_path: Path) -> None:
    model = decoder(weights_of(llama()))
    dora = DoRA(dim=4, alpha=8, lora_A_init_method="pissa")
    dora(model)
    train(model)
    save_adapter(model, tmp_path / "trained", dora)
    convert_adapter(tmp_path / "trained", None, tmp_path / "plain", **SHAPE)
    assert largest_gap(model, merged_by_peft(llama(), tmp_path / "plain"), 0, 1) < 1e-4


def test_alphas_of_single_projections_are_checked(tmp_path: Path) -> None:
    model = decoder(weights_of(llama()))
    canonical = CanonicalLoRA(dim=4, alpha=8)
    canonical(model)
    save_adapter(model, tmp_path / "folder", canonical)
    marker = tmp_path / "folder" / "megatron_adapter.json"
    content = json.loads(marker.read_text())
    name = "decoder.layers.0.self_attention.linear_qkv.adapter_q"
    content["layers"] = {name: {"dim": 4, "alpha": 32}}
    marker.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=rf"'{name}' has alpha 32 in .*, and 8 in the model"):
        load_adapter(model, tmp_path / "folder")
    content["layers"] = {name.rpartition(".")[0]: {"dim": 4, "alpha": 32}, name: {"dim": 4, "alpha": 8}}
    marker.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"adapter_k' has alpha 32"):
        load_adapter(model, tmp_path / "folder")


class Gated:
    gated_linear_unit = True


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "sequential"])
def test_experts_of_their_own_come_back(grouped: bool, tmp_path: Path) -> None:
    def mlp(**more: Any) -> nn.ModuleDict:
        fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, stride=2, config=Gated(), **more)
        return nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": RowParallelLinear(FFN, HIDDEN, config=Gated(), **more)})

    each = nn.ModuleDict({"local_experts": nn.ModuleList(mlp() for _ in range(3))})
    experts = mlp(is_expert=True, num_gemms=3) if grouped else each
    experts.num_local_experts, experts.ep_group = 3, None
    layer = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    model = nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
    names = ["linear_fc1", "linear_fc2"]
    LoRA(names, dim=4, alpha=8, share_expert_adapters=False)(model)
    pissa = LoRA(names, dim=4, alpha=8, share_expert_adapters=False, lora_A_init_method="pissa")
    pissa.initialize(model, show_progress_bar=False).save(tmp_path / "artefact")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    save_adapter(model, tmp_path / "trained", pissa)
    export_adapter(tmp_path / "trained", tmp_path / "peft", to="peft", experts="modules")
    found = []
    for trained, start in (("trained", None), ("trained", "artefact"), ("peft", None)):
        convert_adapter(tmp_path / trained, start and tmp_path / start, tmp_path / "plain", force=True)
        tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
        config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
        key = "base_model.model.model.layers.0.mlp.experts.2.down_proj.lora_{}.weight"
        a, b = (tensors[key.format(side)].double() for side in "AB")
        found.append(config["lora_alpha"] / config["r"] * b @ a)
        assert len(tensors) == 3 * 3 * 2
    start = load_file(tmp_path / "artefact" / "start" / "adapter_model.safetensors")
    key = "linear_fc2.weight2" if grouped else "local_experts.2.linear_fc2"
    whole = f"base_model.model.decoder.layers.0.mlp.experts.{key}.lora_{{}}.weight"
    product = 2.0 * start[whole.format("B")].double() @ start[whole.format("A")].double()
    assert all(torch.allclose(one, (1.1**2 - 1) * product, atol=1e-5) for one in found)


def test_another_start_than_the_kept_one_is_refused(tmp_path: Path) -> None:
    save_file(weights_of(llama()), tmp_path / "base.safetensors")
    for method in ("pissa", "olora"):
        split_and_trained("lora", method, str(tmp_path / "base.safetensors"), str(tmp_path / method))
    for start in (tmp_path / "olora", Path(f"{tmp_path / 'olora'}-artefact-0")):
        with pytest.raises(
            VerificationError, match=r"is not the one that .*pissa' was trained from and keeps .they differ"
        ):
            convert_adapter(tmp_path / "pissa", start, tmp_path / "plain", **SHAPE)
    assert not (tmp_path / "plain").exists()


def test_base_weights_that_arrive_after_a_split_are_noticed(tmp_path: Path) -> None:
    base = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("linear_fc1", "linear_fc2")})
    original = {name: t.clone() for name, t in base.state_dict().items()}
    lora = LoRA(["linear_fc1", "linear_fc2"], dim=4, lora_A_init_method="pissa")
    model = lora(base)
    model.load_state_dict(model.state_dict())  # the same weights: nothing is said
    with pytest.warns(UserWarning, match="'linear_fc1' had given up its adapter's start, and other base weights"):
        model.load_state_dict({"linear_fc1.weight": original["linear_fc1.weight"]}, strict=False)
    lora.restore_base(model)
    state = model.state_dict()
    torch.testing.assert_close(state["linear_fc1.weight"], original["linear_fc1.weight"], rtol=0, atol=0)
    torch.testing.assert_close(state["linear_fc2.weight"], original["linear_fc2.weight"])


def test_what_is_trained_besides_adapters_is_not_left_out_without_a_word(tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("linear_fc1", "linear_fc2")})
    LoRA(["linear_fc1"], dim=4)(model)
    model["linear_fc2"].requires_grad_(True)
    with pytest.warns(
        UserWarning, match="2 parameters that are trained besides the adapters .the first: 'linear_fc2.weight'"
    ):
        save_adapter(model, tmp_path / "adapter")
