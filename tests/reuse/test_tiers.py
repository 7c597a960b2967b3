"""`smartinit.compute` with a store: what is there is not computed again, and what comes out of it is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from reuse_cases import assert_equal, hit, lora, new_batches, new_model

import smartinit as si
from smartinit.methods import available_methods

if TYPE_CHECKING:
    from pathlib import Path

QUIET = dict(show_progress_bar=False)


@pytest.mark.parametrize("method", sorted(available_methods()))
def test_the_same_request_is_a_hit_and_the_same_artefact(
    method: str, model: Any, batches: list, forward: list, tmp_path: Path
) -> None:
    fresh = si.compute(model, lora(method), batches, **QUIET)
    first = si.compute(model, lora(method), batches, store=tmp_path / "s", **QUIET)
    assert hit(first) is None
    assert_equal(first, fresh)
    forward.clear()
    second = si.compute(model, lora(method), batches, store=tmp_path / "s", **QUIET)
    assert hit(second) == "artefact"
    assert not forward
    assert_equal(second, fresh)
    assert second.layers == fresh.layers
    assert second.sites == fresh.sites
    assert second.provenance["store"]["key"] == first.provenance["store"]["key"]


@pytest.mark.parametrize(
    "other",
    [
        dict(rank=2),
        dict(eva=dict(rho=1.0)),
        dict(eva=dict(tau=0.9)),
        dict(eva=dict(tau=0.9999)),  # all the rows were read: there is nothing more to settle
        dict(use_dora=True),
        dict(lora_alpha=16),
        dict(target_modules=["q_proj", "k_proj"]),
    ],
    ids=str,
)
def test_another_request_of_the_same_statistics_runs_no_model(
    other: dict, model: Any, batches: list, forward: list, tmp_path: Path
) -> None:
    si.compute(model, lora(), batches, store=tmp_path / "s", **QUIET)
    fresh = si.compute(model, lora(**other), batches, **QUIET)
    forward.clear()
    found = si.compute(model, lora(**other), batches, store=tmp_path / "s", **QUIET)
    assert not forward
    assert hit(found) == "spectra"
    for name, pair in found.factors.items():
        projector = pair.a.double().mT @ pair.a.double()
        wanted = fresh.factors[name].a.double()
        assert (projector - wanted.mT @ wanted).norm() < 1e-3 * max(1.0, wanted.norm())


@pytest.mark.parametrize("method", ["corda", "output_pca", "lora_null", "eva"])
def test_second_moments_serve_every_method_that_reads_activations(
    method: str, model: Any, batches: list, forward: list, tmp_path: Path
) -> None:
    first = "lora_null" if method != "lora_null" else "corda"
    si.compute(model, lora(first), batches, store=tmp_path / "s", **QUIET)
    fresh = si.compute(model, lora(method), batches, **QUIET)
    forward.clear()
    found = si.compute(model, lora(method), batches, store=tmp_path / "s", **QUIET)
    assert not forward
    assert hit(found) == "spectra"
    assert dict(found.plan.ranks) == dict(fresh.plan.ranks)
    for name, pair in found.factors.items():
        wanted = fresh.factors[name]
        torch.testing.assert_close(pair.b @ pair.a, wanted.b @ wanted.a, rtol=1e-3, atol=1e-4)


def test_a_larger_request_extends_what_is_there_and_says_why(
    model: Any, batches: list, forward: list, tmp_path: Path
) -> None:
    class Wide(torch.nn.Module):
        """Wide enough for a sketch in place of the whole moment."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q_proj = torch.nn.Linear(1536, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            forward.append(1)
            return self.q_proj(x)

    wide, rows = Wide(), [dict(x=torch.randn(2, 64, 1536)) for _ in range(4)]
    options = dict(prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, **QUIET)
    small = lora(rank=2, eva=dict(rho=1.0), target_modules=["q_proj"])
    large = lora(rank=8, eva=dict(rho=1.0), target_modules=["q_proj"])
    si.compute(wide, small, rows, store=tmp_path / "s", **options)
    forward.clear()
    found = si.compute(wide, large, rows, store=tmp_path / "s", **options)
    assert forward
    assert hit(found) is None
    assert "holds 2 directions, and 8 are wanted" in found.provenance["store"]["missed"]
    forward.clear()
    again = si.compute(
        wide, lora(rank=4, eva=dict(rho=2.0), target_modules=["q_proj"]), rows, store=tmp_path / "s", **options
    )
    assert not forward
    assert hit(again) == "spectra"


@pytest.mark.parametrize("method", ["pissa", "olora", "milora", "loftq"])
def test_weights_that_models_share_are_decomposed_once(method: str, model: Any, tmp_path: Path) -> None:
    other = new_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1  # another model; the target's weights are the same
    first = si.compute(model, lora(method), store=tmp_path / "s", **QUIET)
    second = si.compute(other, lora(method), store=tmp_path / "s", **QUIET)
    assert hit(second) == "spectra"
    assert_equal(first, second)


def test_a_killed_run_leaves_the_spectra_that_it_had_finished(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import smartinit.decomposition as module

    monkeypatch.setattr(module, "_TOGETHER", 1)
    kind = available_methods()["pissa"]
    whole, calls = kind.spectra, []

    def killed(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, *args, **options)

    monkeypatch.setattr(kind, "spectra", killed)
    with pytest.raises(KeyboardInterrupt):
        si.compute(model, lora("pissa"), store=tmp_path / "s", **QUIET)
    monkeypatch.setattr(kind, "spectra", lambda self, *a, **o: calls.append(1) or whole(self, *a, **o))
    calls.clear()
    si.compute(model, lora("pissa"), store=tmp_path / "s", **QUIET)
    assert len(calls) == 8 - 3


def test_a_killed_decomposition_leaves_the_statistics(
    model: Any, batches: list, forward: list, tmp_path: Path, monkeypatch: Any
) -> None:
    kind = available_methods()["corda"]
    whole = kind.spectrum

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "spectrum", killed)
    with pytest.raises(KeyboardInterrupt):
        si.compute(model, lora("corda"), batches, store=tmp_path / "s", **QUIET)
    assert forward
    monkeypatch.setattr(kind, "spectrum", whole)
    forward.clear()
    found = si.compute(model, lora("corda"), batches, store=tmp_path / "s", **QUIET)
    assert not forward
    assert_equal(found, si.compute(model, lora("corda"), batches, **QUIET))


def test_a_refresh_computes_again(model: Any, batches: list, forward: list, tmp_path: Path) -> None:
    first = si.compute(model, lora(), batches, store=tmp_path / "s", **QUIET)
    forward.clear()
    second = si.compute(model, lora(), batches, store=tmp_path / "s", refresh=True, **QUIET)
    assert forward
    assert hit(second) is None
    assert_equal(first, second)


def test_a_refresh_decomposes_again(model: Any, tmp_path: Path, monkeypatch: Any) -> None:
    kind, calls = available_methods()["pissa"], []
    whole = kind.spectra
    monkeypatch.setattr(kind, "spectra", lambda self, *a, **o: calls.append(1) or whole(self, *a, **o))
    for refresh, expected in ((False, True), (False, False), (True, True), (False, False)):
        calls.clear()
        si.compute(model, lora("pissa"), store=tmp_path / "s", refresh=refresh, **QUIET)
        assert bool(calls) == expected


def test_a_sweep_finds_each_of_its_requests(model: Any, batches: list, forward: list, tmp_path: Path) -> None:
    requests = [lora("eva"), lora("corda"), lora("pissa"), lora("lora_ga"), lora("eva", rank=2)]
    first = si.compute_many(model, requests, batches, store=tmp_path / "s", **QUIET)
    forward.clear()
    second = si.compute_many(model, [*requests, lora("eva", rank=3)], batches, store=tmp_path / "s", **QUIET)
    assert [hit(one) for one in second] == ["artefact"] * 5 + ["spectra"]
    assert not forward
    for one, two in zip(first, second, strict=False):
        assert_equal(one, two)


def test_the_model_and_its_random_numbers_are_left_as_they_were(model: Any, batches: list, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    wanted = torch.rand(3)
    for _ in range(2):
        torch.manual_seed(7)
        si.compute(model, lora(), batches, store=tmp_path / "s", **QUIET)
        assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_wrapped_model_finds_what_the_plain_one_left(
    model: Any, batches: list, forward: list, tmp_path: Path
) -> None:
    si.compute(model, lora(), batches, store=tmp_path / "s", **QUIET)
    wrapped = si.LoraModel(new_model(), lora())
    found = si.compute(wrapped, None, batches, store=tmp_path / "s", **QUIET)
    assert hit(found) == "artefact"


def test_the_two_functions_of_peft_take_a_store(model: Any, batches: list, forward: list, tmp_path: Path) -> None:
    first = si.get_eva_state_dict(model, batches, lora(), show_progress_bar=False, store=tmp_path / "s")
    forward.clear()
    second = si.get_eva_state_dict(model, batches, lora(), show_progress_bar=False, store=si.Store(tmp_path / "s"))
    assert not forward
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    wrapped = si.LoraModel(new_model(), lora())
    si.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False, store=tmp_path / "s")
    for name, rows in first.items():
        assert torch.equal(wrapped.get_submodule(f"model.{name}").lora_A["default"].weight, rows)


def test_another_batch_size_of_the_same_rows_is_a_hit(model: Any, forward: list, tmp_path: Path) -> None:
    small = new_batches(6, 4)
    pairs = zip(small[::2], small[1::2], strict=True)
    large = [{name: torch.cat([one[name], two[name]]) for name in one} for one, two in pairs]
    si.compute(model, lora(), small, store=tmp_path / "s", **QUIET)
    forward.clear()
    assert hit(si.compute(model, lora(), large, store=tmp_path / "s", **QUIET)) == "artefact"
    assert not forward
