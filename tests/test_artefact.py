"""An artefact survives its folder bit for bit, and every trainer can load that folder."""

from __future__ import annotations

import hashlib
import json
import math
import resource
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

import smartinit as si
from smartinit.artefact import LayerSummary
from smartinit.errors import (
    ArtefactError,
    ConfigError,
    MissingFileError,
    ModelError,
    OutputError,
    SmartinitError,
    VerificationError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import nn

pytestmark = [
    # PEFT asks every transformers model for a property that transformers has renamed,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # and advises to keep adapters on the meta device until they are written.
    pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False"),
]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "smartinit.json"]


def make(*, layers: int = 8, seed: int = 0, width: int = 32, **changes: Any) -> si.Artefact:
    """Random orthonormal directions for q, k and v of a tiny Llama; some layers have rank 0, v is the widest."""
    generator = torch.Generator().manual_seed(seed)
    ranks = {
        f"model.layers.{i}.self_attn.{kind}_proj": (3 * i + j) % 6
        for i in range(layers)
        for j, kind in enumerate("qkv")
    }
    factors, summaries, sites = {}, {}, []
    for i in range(layers):
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.T  # q, k and v read one input
        site = [name for name in ranks if name.startswith(f"model.layers.{i}.")]
        sites.append(tuple(site))
        for name in site:
            out = width if name.endswith("q_proj") else width // 2
            factors[name] = si.Factors(basis[: ranks[name]], torch.zeros(out, ranks[name]))
            ratios = tuple(0.5**k for k in range(1, 9))
            summaries[name] = LayerSummary((out, width), ratios, si.Certificate(rows=99, captured=0.9, settled=True))
    artefact = si.Artefact(
        recipe=si.Recipe(
            "eva", {"whiten": False}, {"name": "variance"}, tuple(ranks), {"batches": 3}, {}, seed, "0.1.0"
        ),
        plan=si.Plan(ranks, {name: 2.0 * rank if rank else 8.0 for name, rank in ranks.items()}),
        config=si.LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj"],
            init_lora_weights="eva",
            task_type="CAUSAL_LM",
            eva_config=si.EvaConfig(rho=1.5),
        ),
        factors=factors,
        layers=summaries,
        sites=tuple(sites),
        provenance={"model": "LlamaForCausalLM", "model_class": "LlamaForCausalLM", "tokens_per_second": math.nan},
        timings={"activations": 1.25},
    )
    return replace(artefact, **changes)


def with_factors(artefact: si.Artefact, name: str, a: torch.Tensor, b: torch.Tensor, **more: Any) -> si.Artefact:
    """The same with one layer's factors replaced."""
    return replace(artefact, factors={**artefact.factors, name: si.Factors(a, b, **more)})


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of a causal language model."""
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.fixture
def artefact(seed: int) -> si.Artefact:
    """24 targets, four of them without adapter."""
    return make(seed=seed)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    """A batch of token ids, (2, 9)."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Every write that would make a file longer than this fails in the kernel, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- round trips ---------------------------------------------------------------------------------------------------


def test_saved_and_loaded_bit_for_bit(artefact: si.Artefact, tmp_path: Path) -> None:
    assert artefact.save(tmp_path / "adapter") == tmp_path / "adapter"
    assert names(tmp_path) == ["adapter"]
    assert names(tmp_path / "adapter") == FILES
    again = si.Artefact.load(tmp_path / "adapter")
    assert again.recipe == artefact.recipe
    assert again.plan == artefact.plan
    assert list(again.plan.ranks) == list(artefact.plan.ranks), "in model order"
    assert again.config == artefact.config
    assert again.layers == artefact.layers
    assert again.certificate == artefact.certificate
    assert again.sites == artefact.sites
    assert again.timings == artefact.timings
    assert again.provenance["tokens_per_second"] is None, "JSON has no NaN"
    assert list(again.factors) == list(artefact.factors)
    for name, pair in again.factors.items():
        assert torch.equal(pair.a, artefact.factors[name].a)
        assert torch.equal(pair.b, artefact.factors[name].b)
        assert pair.effect == "keeps"
    assert artefact.verify(tmp_path / "adapter") == again.verify(tmp_path / "adapter") == []


def test_saving_twice_writes_the_same_bytes(artefact: si.Artefact, tmp_path: Path) -> None:
    artefact.save(tmp_path / "one")
    si.Artefact.load(tmp_path / "one").save(tmp_path / "two")
    for name in ["README.md", "adapter_config.json", "adapter_model.safetensors"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_once_to_the_saved_dtype(artefact: si.Artefact, dtype: torch.dtype, tmp_path: Path) -> None:
    artefact.save(tmp_path / "adapter", dtype=dtype)
    for name, pair in si.Artefact.load(tmp_path / "adapter").factors.items():
        if pair.rank:
            assert torch.equal(pair.a, artefact.factors[name].a.to(dtype))
    assert artefact.verify(tmp_path / "adapter") == []


def test_the_record_holds_the_digests(artefact: si.Artefact, tmp_path: Path) -> None:
    artefact.save(tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "smartinit.json").read_text())
    assert record["recipe_digest"] == artefact.recipe.digest
    assert record["plan_digest"] == artefact.plan.digest
    for name, digest in record["files"].items():
        assert digest == hashlib.sha256((tmp_path / "adapter" / name).read_bytes()).hexdigest()
    assert set(record["files"]) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_card_is_one_that_hubs_read(artefact: si.Artefact, tmp_path: Path) -> None:
    hostile = 'org/name": x\n---\nevil'
    for number, (base, expected) in enumerate([(None, None), ("org/base", "org/base"), (hostile, hostile)]):
        artefact.config.base_model_name_or_path = base
        artefact.save(tmp_path / str(number))
        _, front, text = (tmp_path / str(number) / "README.md").read_text().split("---\n", 2)
        meta = yaml.safe_load(front)
        assert meta.get("base_model") == expected
        assert meta["library_name"] == "peft"
        assert {"lora", "peft", "smartinit", "eva"} <= set(meta["tags"])
        assert "| `q_proj` | 8 |" in text
        assert f"{artefact.plan.total} ranks in 20 of 24 layers" in text


# --- in PEFT -------------------------------------------------------------------------------------------------------


def test_defect_08_rank_zero_layers_stay_away_on_reload(
    artefact: si.Artefact, tmp_path: Path, tiny_llama: Callable, tokens: torch.Tensor
) -> None:
    peft = pytest.importorskip("peft")
    artefact.save(tmp_path / "adapter")
    base = tiny_llama(num_hidden_layers=8)
    before = logits(base, tokens)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    kept = {name: rank for name, rank in artefact.plan.ranks.items() if rank}
    assert len(kept) == 20
    assert {name: layer.r["default"] for name, layer in layers.items()} == kept
    for name, layer in layers.items():
        assert layer.scaling["default"] == artefact.plan.scaling(name)
        assert torch.equal(layer.lora_A["default"].weight, artefact.factors[name].a)
        assert layer.lora_A["default"].weight.requires_grad
    assert torch.equal(logits(model, tokens), before), "B = 0: exactly the base model"


def test_peft_can_train_and_save_it_again(
    artefact: si.Artefact, tmp_path: Path, tiny_llama: Callable, tokens: torch.Tensor
) -> None:
    peft = pytest.importorskip("peft")
    artefact.save(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=8), tmp_path / "adapter", is_trainable=True)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimiser.step()
    model.save_pretrained(tmp_path / "trained")
    again = peft.PeftModel.from_pretrained(tiny_llama(num_hidden_layers=8), tmp_path / "trained")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    model.save_pretrained(tmp_path / "adapter")  # over the start, as some trainers do
    with pytest.raises(VerificationError, match=r"adapter_.*' is not the file that .* was written with"):
        si.Artefact.load(tmp_path / "adapter")


def test_defect_07_a_half_precision_model_loads_one_dtype(
    artefact: si.Artefact, tmp_path: Path, tiny_llama: Callable
) -> None:
    peft = pytest.importorskip("peft")
    artefact.save(tmp_path / "adapter")
    base = tiny_llama(num_hidden_layers=8, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# --- applying ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["residual", "offset"])
@pytest.mark.parametrize("host", ["native", "peft"])
def test_applying_is_loading(
    host: str, base: str, artefact: si.Artefact, tmp_path: Path, tiny_llama: Callable, tokens: torch.Tensor
) -> None:
    model = tiny_llama(num_hidden_layers=8)
    before = logits(model, tokens)
    if host == "native":
        model = si.LoraModel(model, artefact.config)
    else:
        model = pytest.importorskip("peft").get_peft_model(model, artefact.config.to_peft())
    assert artefact.apply(model, base=base) is model
    assert torch.equal(logits(model, tokens), before)
    model.save_pretrained(tmp_path / "applied")
    again = si.LoraModel.from_pretrained(tiny_llama(num_hidden_layers=8), tmp_path / "applied")
    kept = {name: rank for name, rank in artefact.plan.ranks.items() if rank}
    assert {name: layer.r["default"] for name, layer in again.lora_layers().items()} == kept
    for name, layer in again.lora_layers().items():
        assert torch.equal(layer.matrices("default")[0], artefact.factors[name].a)
        assert layer.scaling["default"] == artefact.plan.scaling(name)


def test_a_loaded_artefact_can_be_applied(artefact: si.Artefact, tmp_path: Path, tiny_llama: Callable) -> None:
    artefact.save(tmp_path / "adapter")
    model = si.LoraModel(tiny_llama(num_hidden_layers=8), artefact.config, adapter_name="first")
    si.Artefact.load(tmp_path / "adapter").apply(model, adapter_name="first")
    assert len(model.lora_layers()) == 20


def test_what_cannot_be_applied(artefact: si.Artefact, tiny_llama: Callable) -> None:
    with pytest.raises(ModelError, match="wrap it first"):
        artefact.apply(tiny_llama(num_hidden_layers=8))
    model = si.LoraModel(tiny_llama(num_hidden_layers=8), artefact.config)
    with pytest.raises(ConfigError, match="choose 'residual' or 'offset'"):
        artefact.apply(model, base="both")
    with pytest.raises(SmartinitError, match=r"no layer 'model\.layers\.8"):
        make(layers=9).apply(model)
    assert len(model.lora_layers()) == 24


@pytest.mark.parametrize("base", ["residual", "offset"])
def test_a_split_is_applied_as_the_caller_says(artefact: si.Artefact, base: str, tiny_llama: Callable) -> None:
    name, pair = next(iter((n, p) for n, p in artefact.factors.items() if p.rank))
    splitting = with_factors(artefact, name, pair.a, torch.ones_like(pair.b), effect="splits")
    model = tiny_llama(num_hidden_layers=8)
    before = model.get_submodule(name).weight.detach().clone()
    model = si.LoraModel(model, artefact.config)
    assert splitting.apply(model, base=base) is model
    after = model.lora_layers()[name].weight
    scaling = artefact.plan.scaling(name)
    lost = splitting.factors[name].delta(scaling) if base == "residual" else torch.zeros_like(before)
    torch.testing.assert_close(before - after, lost, rtol=1e-4, atol=1e-6)


# --- verifying -----------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_named_and_never_saved(artefact: si.Artefact, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj"
    pair = artefact.factors[name]
    nan = pair.a.clone()
    nan[0, 0] = math.nan
    fewer = {key: value for key, value in artefact.factors.items() if key != name}
    for broken, message in [
        (with_factors(artefact, name, nan, pair.b), f"A of layer '{name}' holds NaN or Inf"),
        (with_factors(artefact, name, pair.a[:, :5], pair.b), rf"A of layer '{name}' has shape \(3, 5\)"),
        (with_factors(artefact, name, pair.a, pair.b.T), rf"B of layer '{name}' has shape \(3, 32\)"),
        (with_factors(artefact, name, pair.a, pair.b + 1), f"layer '{name}' is said to keep the base model"),
        (replace(artefact, factors=fewer), f"layer '{name}' is in the plan but has no factors"),
        (with_factors(artefact, "more", pair.a, pair.b), "layer 'more' has factors but is not in the plan"),
    ]:
        (problem,) = broken.verify()
        with pytest.raises(VerificationError, match=message) as caught:
            broken.save(tmp_path / "out")
        assert problem in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_with_another_artefact_is_told(artefact: si.Artefact, tmp_path: Path) -> None:
    make(seed=5).save(tmp_path / "other")
    problems = artefact.verify(tmp_path / "other")
    assert any("another recipe" in problem for problem in problems)
    assert any("other values of" in problem for problem in problems)
    assert artefact.verify(tmp_path / "nowhere") == [
        f"there is no folder '{tmp_path / 'nowhere'}'; name a folder with adapter_config.json in it"
    ]


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_byte_is_noticed(name: str, artefact: si.Artefact, tmp_path: Path) -> None:
    artefact.save(tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerificationError, match=f"{name}' is not the file"):
        si.Artefact.load(tmp_path / "adapter")
    (problem,) = artefact.verify(tmp_path / "adapter")
    assert name in problem


LAYER = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (["plan", "ranks", LAYER], 5, VerificationError, "its plan has another digest"),
        (["recipe", "seed"], 77, VerificationError, "its recipe has another digest"),
        (["layers", LAYER], None, ArtefactError, "incomplete or broken"),
        (["layers", LAYER, "certificate", "trust"], 1, ArtefactError, "incomplete or broken"),
        (["layers", LAYER, "shape"], [32, 33], VerificationError, "has shape"),
        (["targets"], ["more"], ArtefactError, "incomplete or broken"),
        (["recipe"], None, ArtefactError, "incomplete or broken"),
        (["config"], {"r": -1}, ArtefactError, "incomplete or broken"),
        (["effects"], [], ArtefactError, "incomplete or broken"),
        (["format"], 99, ArtefactError, "format 99, but this version reads formats up to 2"),
        (["files"], None, ArtefactError, "no digests"),
    ],
)
def test_an_edited_record_is_refused(
    place: list[str], value: object, error: type[Exception], message: str, artefact: si.Artefact, tmp_path: Path
) -> None:
    artefact.save(tmp_path / "adapter")
    path = tmp_path / "adapter" / "smartinit.json"
    record = json.loads(path.read_text())
    inner = record
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    path.write_text(json.dumps(record))
    with pytest.raises(error, match=message):
        si.Artefact.load(tmp_path / "adapter")


@pytest.mark.parametrize("name", FILES[1:])
def test_truncated_and_missing_files(name: str, artefact: si.Artefact, tmp_path: Path) -> None:
    artefact.save(tmp_path / "adapter")
    path = tmp_path / "adapter" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises((ArtefactError, VerificationError), match=name):
        si.Artefact.load(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(ArtefactError, match=f"{name}' is missing"):
        si.Artefact.load(tmp_path / "adapter")
    with pytest.raises(MissingFileError):
        si.Artefact.load(tmp_path / "nowhere")


def test_an_edited_card_is_fine(artefact: si.Artefact, tmp_path: Path) -> None:
    artefact.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("my own words")
    si.Artefact.load(tmp_path / "adapter")


# --- all or nothing ------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_kept_unless_forced(artefact: si.Artefact, tmp_path: Path) -> None:
    artefact.save(tmp_path / "adapter")
    other = make(seed=5)
    with pytest.raises(OutputError, match="exists already"):
        other.save(tmp_path / "adapter")
    assert artefact.verify(tmp_path / "adapter") == []
    other.save(tmp_path / "adapter", force=True)
    assert other.verify(tmp_path / "adapter") == []
    assert names(tmp_path) == ["adapter"]


def test_force_spares_folders_that_are_no_adapters(artefact: si.Artefact, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds other files and no adapter_config\.json"):
        artefact.save(tmp_path, force=True)
    assert names(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("limit", [500, 3000, 12000])
@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_what_was_there(limit: int, force: bool, artefact: si.Artefact, tmp_path: Path) -> None:
    if force:
        artefact.save(tmp_path / "adapter")
    with full_disk(limit), pytest.raises(OutputError, match="File too large"):
        make(seed=5).save(tmp_path / "adapter", force=force)
    assert names(tmp_path) == ["adapter"] * force
    if force:
        assert artefact.verify(tmp_path / "adapter") == []


@pytest.mark.parametrize("step", range(1, 12))
@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_at_any_step_leaves_all_or_nothing(
    step: int, force: bool, artefact: si.Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    if force:
        artefact.save(tmp_path / "adapter")
    flush, calls = os.fsync, []

    def interrupted(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == step:
            raise KeyboardInterrupt
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    other = make(seed=5)
    try:
        other.save(tmp_path / "adapter", force=force)
    except KeyboardInterrupt:
        assert len(calls) == step
    monkeypatch.undo()
    left = names(tmp_path)
    assert left in ([], ["adapter"])
    if force or left:
        assert left == ["adapter"]
        assert other.verify(tmp_path / "adapter") == [] or artefact.verify(tmp_path / "adapter") == []


def test_a_place_that_cannot_be_written_is_named(artefact: si.Artefact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target, message in [
        ("file", "is a file"),
        ("file/adapter", "cannot write folder"),
        ("x" * 300, "cannot write"),
    ]:
        with pytest.raises(OutputError, match=message):
            artefact.save(tmp_path / target, force=True)
    assert names(tmp_path) == ["file"]


def test_an_artefact_is_a_value(artefact: si.Artefact) -> None:
    for mapping in (artefact.factors, artefact.layers, artefact.provenance, artefact.timings, artefact.certificate):
        with pytest.raises(TypeError):
            mapping["x"] = None
    assert artefact.base_model is None
    assert replace(artefact, provenance={"model": "org/base", "model_class": "Llama"}).base_model == "org/base"
