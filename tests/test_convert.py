"""A split start, trained for real in PEFT, computes the same as plain LoRA on the base model that nobody changed."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import smartinit as si
from smartinit.convert import convert_adapter, residual_weights, save_residual_model

sys.path.insert(0, str(Path(__file__).parent))
from split_models import gpt2, llama, llama_embedding, split_start, train, vision, weight_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from split_models import Case
    from torch import nn

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:.*invalid shape.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in some/base"),
]
CASES = [llama, llama_embedding, gpt2, vision]


def residual(case: Case, artefact: si.Artefact) -> nn.Module:
    """The base model with the changed weights in it."""
    model = case.make()
    missing = model.load_state_dict(residual_weights(model, artefact), strict=False)
    assert not missing.unexpected_keys
    return model


def trained_folder(case: Case, artefact: si.Artefact, folder: Path) -> torch.Tensor:
    """Save the start, train it on the residual base in PEFT, save that; the logits at the end."""
    artefact.save(folder / "start")
    model = peft.PeftModel.from_pretrained(residual(case, artefact), folder / "start", is_trainable=True)
    train(case, model)
    model.save_pretrained(folder / "trained")
    return case.outputs(model)


def on_the_base(case: Case, folder: Path) -> torch.Tensor:
    """Logits of the unmodified base with the adapter in a folder, in plain PEFT."""
    return case.outputs(peft.PeftModel.from_pretrained(case.make(), folder))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> bool:
    """Equal relative to the largest value."""
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A start and what was trained from it."""
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    artefact.save(tmp_path / "start")
    peft.PeftModel.from_pretrained(one.make(), tmp_path / "start").save_pretrained(tmp_path / "trained")
    return tmp_path


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_start_on_the_residual_base_is_the_base(case: Callable[[], Case], options: str, tmp_path: Path) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6, **OPTIONS[options]), [4, 2, 3])
    artefact.save(tmp_path / "start")
    model = peft.PeftModel.from_pretrained(residual(one, artefact), tmp_path / "start", is_trainable=True)
    assert close(one.outputs(model), one.outputs(one.make()))
    assert not close(on_the_base(one, tmp_path / "start"), one.outputs(one.make()), 0.01), "not on the base itself"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_converted_after_training_it_computes_the_same_on_the_base(
    case: Callable[[], Case], options: str, tmp_path: Path
) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6, **OPTIONS[options]), [4, 2, 3, 0])
    after = trained_folder(one, artefact, tmp_path)
    assert not close(after, one.outputs(one.make()), 0.05), "it has learnt something"
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain")
    assert close(on_the_base(one, tmp_path / "plain"), after)
    assert conversion.error == 0
    assert dict(conversion.plan.ranks) == {n: 2 * rank for n, rank in artefact.plan.ranks.items() if rank}
    for name in conversion.plan.ranks:
        assert conversion.plan.scaling(name) == pytest.approx(artefact.plan.scaling(name), rel=1e-12)
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["init_lora_weights"] is True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_doubled_folder_starts_where_the_base_does(case: Callable[[], Case], tmp_path: Path) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4, 0, 3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = artefact.save(tmp_path / str(dtype), dtype=dtype, base="doubled")
        assert close(on_the_base(one, folder), one.outputs(one.make()), 1e-6)
        again = si.Artefact.load(folder)
        assert again.plan == artefact.plan
        assert artefact.verify(folder) == again.verify() == []
        assert not (folder / "start").exists()


def test_a_rounded_start_is_subtracted_as_it_was_rounded(tmp_path: Path) -> None:
    """With bf16 factors and a residual of the unrounded ones the error is that of bf16, 2⁻⁹."""
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    artefact.save(tmp_path / "start", dtype=torch.bfloat16)
    model = one.make()
    model.load_state_dict(residual_weights(model, artefact, dtype=torch.bfloat16), strict=False)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "start")
    assert close(one.outputs(model), one.outputs(one.make()))
    loaded = residual_weights(one.make(), si.Artefact.load(tmp_path / "start"))
    for name, weight in residual_weights(one.make(), artefact, dtype=torch.bfloat16).items():
        assert torch.equal(weight, loaded[name])


# --- what else was trained ------------------------------------------------------------------------------------------


def peft_pissa(case: Case, folder: Path, **options: Any) -> torch.Tensor:
    """PEFT's own workflow: PiSSA, saved, trained, saved."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(case.targets), **options)
    config.init_lora_weights = "pissa"
    torch.manual_seed(0)
    model = peft.get_peft_model(case.make(), config)
    model.save_pretrained(folder / "start")
    train(case, model)
    model.save_pretrained(folder / "trained")
    return case.outputs(model)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (llama, {"modules_to_save": ["lm_head"]}),
        (llama, {"bias": "all"}),
        (llama, {"bias": "lora_only"}),
        (llama, {"use_dora": True, "modules_to_save": ["lm_head"], "bias": "lora_only"}),
        (llama, {"trainable_token_indices": [3, 5, 7]}),
        (llama, {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.*v_proj": 5}}),
        (gpt2, {"bias": "all", "fan_in_fan_out": True}),
        (gpt2, {"use_rslora": True, "fan_in_fan_out": True}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value.__name__,
)
def test_defect_26_conversion_keeps_whatever_was_trained(
    case: Callable[[], Case], options: dict[str, Any], tmp_path: Path
) -> None:
    one = case()
    after = peft_pissa(one, tmp_path, **options)
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain")
    assert close(on_the_base(one, tmp_path / "plain"), after, 5e-5)
    assert conversion.error == 0


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # the biases of B, which start at zero
def test_biases_of_b_are_kept(tmp_path: Path) -> None:
    one = llama()
    one = replace(one, targets=one.targets[:4])  # the last target has no bias
    after = trained_folder(one, split_start(one, si.LoraConfig(r=4, lora_alpha=6, lora_bias=True), [4, 2]), tmp_path)
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain")
    assert len(conversion.others) == 4
    assert close(on_the_base(one, tmp_path / "plain"), after)


@pytest.mark.parametrize("folder", ["start", "trained"])
def test_frozen_embeddings_that_peft_saves_do_not_come_along(folder: str, tmp_path: Path) -> None:
    """They are of the residual base: loaded onto the base itself they would change it."""
    one = llama_embedding()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    after = trained_folder(one, artefact, tmp_path)
    path = tmp_path / "trained" / "adapter_model.safetensors"
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(path)
    tensors[key] = residual(one, artefact).get_submodule("model.embed_tokens").weight.detach().clone()
    tensors["base_model.model.lm_head.weight"] = tensors[key].clone()  # as a tied head is saved
    save_file(tensors, path)
    start = tmp_path / folder
    if folder == "trained":  # a trainer that saved over the start
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / "start" / name).write_bytes((tmp_path / "trained" / name).read_bytes())
        start = tmp_path / "start"
        conversion = convert_adapter(start, None, tmp_path / "plain")
    else:
        conversion = convert_adapter(tmp_path / "trained", start, tmp_path / "plain")
    assert conversion.dropped == ("base_model.model.lm_head.weight", key)
    assert close(on_the_base(one, tmp_path / "plain"), after)


# --- a smaller rank -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [llama, vision], ids=lambda case: case.__name__)
@pytest.mark.parametrize("rank", [1, 4, 7, 99])
def test_recompressed_is_the_best_of_its_rank_and_states_its_error(
    case: Callable[[], Case], rank: int, tmp_path: Path
) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4, 2, 3])
    trained_folder(one, artefact, tmp_path)
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain", rank=rank)
    stored = si.LoraModel and load_file(tmp_path / "trained" / "adapter_model.safetensors")
    missing = total = 0.0
    for name, layer in artefact.layers.items():
        ends = ("_embedding_A", "_embedding_B") if layer.kind == "embedding" else ("_A.weight", "_B.weight")
        a, b = (stored[f"base_model.model.{name}.lora{end}"].double().flatten(1) for end in ends)
        start = artefact.factors[name]
        dense = b @ a - start.b.double() @ start.a.double()  # the oracle may be dense
        values = torch.linalg.svdvals(dense)
        best = float(values[rank:].norm() / values.norm()) if rank < 2 * start.rank else 0.0
        assert conversion.errors[name] == pytest.approx(best, abs=1e-6)
        ours = conversion.factors[name]
        found = (ours.b.double() @ ours.a.double() - dense).norm() / dense.norm()
        assert conversion.errors[name] == pytest.approx(float(found), abs=1e-6)
        assert conversion.plan.ranks[name] == min(rank, 2 * start.rank)
        scaling = artefact.plan.scaling(name)
        missing += (scaling * best * float(values.norm())) ** 2
        total += (scaling * float(values.norm())) ** 2
    assert conversion.error == pytest.approx((missing / total) ** 0.5, abs=1e-6)
    report = json.loads((tmp_path / "plain" / "conversion.json").read_text())
    assert report["error"] == conversion.error
    assert report["errors"] == conversion.errors
    on_the_base(one, tmp_path / "plain")


def test_rounding_is_an_error_too(tmp_path: Path) -> None:
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    trained_folder(one, artefact, tmp_path)
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain", dtype=torch.bfloat16)
    assert 1e-4 < conversion.error < 0.1
    tensors = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_was_not_trained_has_no_error(folders: Path) -> None:
    conversion = convert_adapter(folders / "trained", folders / "start", folders / "plain", rank=2)
    assert set(conversion.errors.values()) == {0.0}
    assert conversion.error == 0.0


def test_an_alpha_that_was_changed_since_counts(tmp_path: Path) -> None:
    """The base gave up the start with the start's scaling, whatever the trained one's is."""
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    artefact.save(tmp_path / "start")
    model = peft.PeftModel.from_pretrained(residual(one, artefact), tmp_path / "start", is_trainable=True)
    train(one, model, steps=3)
    model.save_pretrained(tmp_path / "trained")
    path = tmp_path / "trained" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"lora_alpha": 9, "alpha_pattern": {}}))
    after = one.outputs(peft.PeftModel.from_pretrained(residual(one, artefact), tmp_path / "trained"))
    convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain")
    assert close(on_the_base(one, tmp_path / "plain"), after)


# --- what is not a split --------------------------------------------------------------------------------------------


def test_a_start_that_keeps_the_base_has_nothing_to_subtract(tmp_path: Path) -> None:
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    keeping = {name: si.Factors(pair.a, pair.b * 0) for name, pair in artefact.factors.items()}
    kept = replace(artefact, factors=keeping)
    kept.save(tmp_path / "start")
    assert not (tmp_path / "start" / "start").exists()
    model = peft.PeftModel.from_pretrained(one.make(), tmp_path / "start", is_trainable=True)
    train(one, model)
    model.save_pretrained(tmp_path / "trained")
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain")
    assert conversion.plan == kept.plan
    assert torch.equal(on_the_base(one, tmp_path / "plain"), one.outputs(model))


def test_a_doubled_start_was_trained_on_the_base_already(tmp_path: Path) -> None:
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    artefact.save(tmp_path / "start", base="doubled")
    model = peft.PeftModel.from_pretrained(one.make(), tmp_path / "start", is_trainable=True)
    train(one, model)
    model.save_pretrained(tmp_path / "trained")
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "plain", rank=16)
    assert set(conversion.plan.ranks.values()) == {8}
    assert close(on_the_base(one, tmp_path / "plain"), one.outputs(model))


# --- the residual model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [llama, gpt2], ids=lambda case: case.__name__)
def test_the_residual_model_is_written_and_the_base_stays(case: Callable[[], Case], tmp_path: Path) -> None:
    one = case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4, 2])
    artefact.save(tmp_path / "start")
    model = one.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_residual_model(model, artefact, tmp_path / "residual")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    base = type(model).from_pretrained(tmp_path / "residual")
    for name in one.targets:
        theirs, ours = weight_of(base.get_submodule(name))[0], weight_of(one.make().get_submodule(name))[0]
        pair = artefact.factors[name]
        exact = ours - artefact.plan.scaling(name) * pair.b.double() @ pair.a.double()
        assert float((theirs - exact).abs().max()) < 1e-7
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "start")
    assert close(one.outputs(loaded), one.outputs(model))


def test_a_shared_weight_is_not_split_behind_its_other_users_back(tmp_path: Path) -> None:
    """GPT-2's embedding is its head as well."""
    one = gpt2()
    tied = replace(one, targets=["transformer.wte"])
    artefact = split_start(tied, si.LoraConfig(r=4, lora_alpha=6), [4])
    with pytest.raises(si.errors.ConfigError, match=r"shares its weight with 'lm_head\.weight'.*base='doubled'"):
        save_residual_model(one.make(), artefact, tmp_path / "residual")
    assert not (tmp_path / "residual").exists()
    folder = artefact.save(tmp_path / "start", base="doubled")
    assert close(on_the_base(tied, folder), one.outputs(one.make()), 1e-6)


@pytest.mark.parametrize(("base", "named"), [("residual", None), ("doubled", "org/base")])
def test_only_an_adapter_for_the_base_names_it(base: str, named: str | None, tmp_path: Path) -> None:
    """Who loads an adapter of the residual by the base's name would get a wrong model without a word."""
    artefact = split_start(llama(), si.LoraConfig(r=4, lora_alpha=6, base_model_name_or_path="org/base"), [4])
    folder = artefact.save(tmp_path / "start", base=base)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == named
    assert si.Artefact.load(folder).base_model == "org/base"
    card = (folder / "README.md").read_text()
    assert ("save_residual_model" in card) == (base == "residual")


def test_what_has_no_residual(tmp_path: Path) -> None:
    one, other = llama(), vision()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    with pytest.raises(si.errors.UnknownNameError, match=r"no layer 'model\.layers\.0.*another model"):
        residual_weights(other.make(), artefact)
    with pytest.raises(si.errors.ModelError, match=r"has no save_pretrained; put residual_weights"):
        save_residual_model(other.make(), split_start(other, si.LoraConfig(r=4), [3]), tmp_path / "x")
    adapted = peft.get_peft_model(one.make(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(si.errors.ModelError, match="carries adapters already"):
        residual_weights(adapted, artefact)
    keeping = {name: si.Factors(pair.a, pair.b * 0) for name, pair in artefact.factors.items()}
    with pytest.raises(si.errors.ConfigError, match="keeps the base model"):
        save_residual_model(one.make(), replace(artefact, factors=keeping), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_base_is_stored_with_the_adapter(tmp_path: Path) -> None:
    one = llama()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    factors = {}
    for name, pair in artefact.factors.items():
        weight = weight_of(one.make().get_submodule(name))[0].float()
        coarse = (weight * 20).round() / 20
        factors[name] = replace(pair, effect="quantises", base=coarse)
    quantised = replace(artefact, factors=factors)
    folder = quantised.save(tmp_path / "start")
    again = si.Artefact.load(folder)
    assert quantised.verify(folder) == []
    for name, pair in again.factors.items():
        assert pair.effect == "quantises"
        assert torch.equal(pair.base, factors[name].base)
    save_residual_model(one.make(), again, tmp_path / "quantised")
    base = type(one.make()).from_pretrained(tmp_path / "quantised")
    for name in one.targets:
        assert torch.equal(base.get_submodule(name).weight, factors[name].base)
    other = replace(quantised, factors=factors | {name: replace(factors[name], base=factors[name].base + 1)})
    assert any("another quantised base" in problem for problem in other.verify(folder))
    with pytest.raises(si.errors.ConfigError, match="quantised base, which no adapter of twice the rank"):
        quantised.save(tmp_path / "doubled", base="doubled")
    with pytest.raises(si.errors.ConfigError, match=r"quantises the base of layer 'model\.layers\.0"):
        convert_adapter(folder, folder, tmp_path / "plain")
    shard = next(folder.glob("base-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(si.errors.VerificationError, match=r"base-00001-of-00001\.safetensors' is not the file"):
        si.Artefact.load(folder)
    shard.unlink()
    with pytest.raises(si.errors.ArtefactError, match=r"base-00001-of-00001\.safetensors' is missing"):
        si.Artefact.load(folder)


def test_dora_on_a_residual_base_needs_its_norms(tmp_path: Path) -> None:
    artefact = split_start(llama(), si.LoraConfig(r=4, use_dora=True), [4])
    bare = {name: replace(pair, magnitude=None) for name, pair in artefact.factors.items()}
    with pytest.raises(si.errors.ConfigError, match=r"use_dora=True needs the row norms of layer 'model\.layers\.0"):
        replace(artefact, factors=bare).save(tmp_path / "start")
    assert list(tmp_path.iterdir()) == []


# --- refusals -------------------------------------------------------------------------------------------------------


def test_starts_of_another_model_are_refused(folders: Path) -> None:
    one = llama()
    fewer = replace(one, targets=one.targets[:3])
    more = split_start(replace(one, targets=[*one.targets, "lm_head"]), si.LoraConfig(r=4), [4])
    more.save(folders / "more")
    split_start(fewer, si.LoraConfig(r=4), [4]).save(folders / "fewer")
    split_start(gpt2(), si.LoraConfig(r=4), [4]).save(folders / "gpt2")
    artefact = split_start(one, si.LoraConfig(r=4), [4])
    name, pair = next(iter(artefact.factors.items()))
    wider = replace(
        artefact,
        factors=artefact.factors | {name: replace(pair, a=torch.cat([pair.a, pair.a], dim=1))},
        layers=artefact.layers | {name: replace(artefact.layers[name], shape=(32, 64))},
    )
    wider.save(folders / "wider")
    for start, message in [
        ("more", "layer 'lm_head' is in '.*more' but not in '.*trained'"),
        ("fewer", r"layer 'model\.layers\.[01]\.[a-z_.]+' is in '.*trained' but not in '.*fewer'"),
        ("gpt2", "was not trained from '.*gpt2'"),
        ("wider", r"layer 'model\.layers\.0\.self_attn\.q_proj' is \(32, 32\) in one and \(32, 64\) in the other"),
    ]:
        with pytest.raises(si.errors.ArtefactError, match=message):
            convert_adapter(folders / "trained", folders / start, folders / "plain")
    assert not (folders / "plain").exists()


def test_a_start_that_is_not_the_one_that_was_written_is_refused(folders: Path) -> None:
    path = folders / "start" / "start" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(si.errors.VerificationError, match=r"adapter_model\.safetensors' is not the file"):
        convert_adapter(folders / "trained", folders / "start", folders / "plain")
    path.unlink()
    with pytest.raises(si.errors.ArtefactError, match="is missing"):
        convert_adapter(folders / "trained", folders / "start", folders / "plain")
    assert not (folders / "plain").exists()


def test_other_things_that_cannot_be_converted(folders: Path) -> None:
    with pytest.raises(si.errors.MissingFileError, match="there is no folder"):
        convert_adapter(folders / "trained", folders / "nowhere", folders / "plain")
    with pytest.raises(si.errors.ConfigError, match="keeps no start of its own"):
        convert_adapter(folders / "trained", None, folders / "plain")
    with pytest.raises(si.errors.ConfigError, match="rank=0"):
        convert_adapter(folders / "trained", folders / "start", folders / "plain", rank=0)
    with pytest.raises(si.errors.OutputError, match="exists already"):
        convert_adapter(folders / "trained", folders / "start", folders / "start")
    path = folders / "trained" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    for rank in (None, 2):
        with pytest.raises(si.errors.VerificationError, match="holds NaN or Inf"):
            convert_adapter(folders / "trained", folders / "start", folders / "plain", rank=rank)
    assert not (folders / "plain").exists()
