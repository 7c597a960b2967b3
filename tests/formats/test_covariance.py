from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smartinit.errors import ArtefactError, MissingFileError, OutputError, VerificationError
from smartinit.formats.covariance import (
    load_second_moments,
    load_spectra,
    save_second_moments,
    save_spectra,
    tensors_digest,
)
from smartinit.methods.corda import Corda
from smartinit.methods.lora_null import LoraNull
from smartinit.statistics.gram import GramStatistic


@pytest.fixture
def sites(seed):
    generator = torch.Generator().manual_seed(seed)
    sites = []
    for names, d in ((["a.q", "a.k", "a.v"], 12), (["a.o"], 20)):
        statistic = GramStatistic(d, centred=False, moments_only=True)
        statistic.update(torch.randn(100, d, generator=generator))
        sites.append((names, statistic))
    return sites


@pytest.fixture
def weight(seed):
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(seed + 1))


def test_second_moments_come_back(sites, tmp_path):
    path = tmp_path / "new" / "covariance.safetensors"
    save_second_moments(path, sites, digest="d" * 64)
    found = load_second_moments(path, digest="d" * 64)
    assert [names for names, _ in found] == [("a.q", "a.k", "a.v"), ("a.o",)]
    for (_, before), (_, after) in zip(sites, found, strict=True):
        assert after.rows == before.rows
        assert torch.equal(after.second_moment(), before.second_moment())
    found[0][1].update(torch.randn(5, 12))
    assert found[0][1].rows == 105, "and can go on"


def test_a_site_is_kept_once_and_as_half_a_matrix(tmp_path):
    statistic = GramStatistic(600, centred=False, moments_only=True)
    statistic.update(torch.randn(10, 600))
    save_second_moments(tmp_path / "c.safetensors", [(["q", "k", "v"], statistic)], digest="d")
    assert (tmp_path / "c.safetensors").stat().st_size < 0.75 * 600 * 600 * 8


def test_spectra_come_back_and_give_the_same_factors(sites, weight, tmp_path):
    methods = {"a.q": Corda(), "a.k": LoraNull()}
    spectra = {name: method.spectrum(weight, sites[0][1], 6, (16, 12)) for name, method in methods.items()}
    spectra["a.v"] = spectra["a.q"].truncate(3)  # shares memory with the other
    save_spectra(tmp_path / "cache.safetensors", spectra, digest="e")
    found = load_spectra(tmp_path / "cache.safetensors", digest="e")
    assert list(found) == list(spectra)
    for name, before in spectra.items():
        after = found[name]
        assert (after.shape, after.total, after.certificate) == (before.shape, before.total, before.certificate)
        method = methods.get(name, Corda())
        first, second = (method.factors(s, len(before), 0.5) for s in (before, after))
        assert torch.equal(first.a, second.a)
        assert torch.equal(first.b, second.b)


def test_defect_22_corda_caches_are_refused_for_another_model_or_other_data(sites, weight, tmp_path):
    model, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    batch = torch.arange(6).reshape(2, 3)

    def digest(module, ids):
        return tensors_digest([*module.state_dict().items(), ("input_ids", ids)])

    path = tmp_path / "covariance.safetensors"
    save_second_moments(path, sites, digest=digest(model, batch))
    assert load_second_moments(path, digest=digest(model, batch))
    for wrong in (digest(other, batch), digest(model, batch + 1)):
        with pytest.raises(VerificationError, match="another model, other data"):
            load_second_moments(path, digest=wrong)
    cache = tmp_path / "cache.safetensors"
    save_spectra(cache, {"a.q": Corda().spectrum(weight, sites[0][1], 2, (16, 12))}, digest="ipm")
    with pytest.raises(VerificationError, match="other options"):
        load_spectra(cache, digest="kpm")


def test_defect_22_corda_caches_are_never_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    path = tmp_path / "cache.pt"
    path.write_bytes(pickle.dumps({"a.eigens.S_WC": Trap()}))
    for load in (load_spectra, load_second_moments):
        with pytest.raises(ArtefactError, match="pickled files"):
            load(path, digest="d")
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ArtefactError, match="pickled files"):
        load_spectra(path, digest="d")
    assert not (tmp_path / "ran").exists()


def test_broken_and_mistaken_files(sites, tmp_path):
    path = tmp_path / "covariance.safetensors"
    with pytest.raises(MissingFileError, match="there is no file"):
        load_second_moments(path, digest="d")
    save_second_moments(path, sites, digest="d")
    with pytest.raises(ArtefactError, match="smartinit spectra"):
        load_spectra(path, digest="d")
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) - 8):
        path.write_bytes(whole[:size])
        with pytest.raises(ArtefactError, match="no readable safetensors"):
            load_second_moments(path, digest="d")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        save_second_moments(tmp_path / "file" / "c.safetensors", sites, digest="d")


def test_a_failed_write_leaves_the_former_file(sites, tmp_path, monkeypatch):
    path = tmp_path / "covariance.safetensors"
    save_second_moments(path, sites, digest="d")
    before = load_file(path)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smartinit.formats.covariance.save_file", fail)
    with pytest.raises(OutputError, match="No space left"):
        save_second_moments(path, sites[:1], digest="other")
    assert load_file(path).keys() == before.keys()
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_sees_names_types_shapes_values_and_order():
    base = [("a", torch.tensor([1.0, 2.0])), ("b", torch.zeros(2, 2))]
    others = [
        [("c", base[0][1]), base[1]],
        [("a", torch.tensor([1.0, 2.5])), base[1]],
        [("a", torch.tensor([1.0, 2.0]).double()), base[1]],
        [("a", torch.tensor([[1.0, 2.0]])), base[1]],
        base[::-1],
        base[:1],
    ]
    digests = {tensors_digest(tensors) for tensors in [base, *others]}
    assert len(digests) == 7
    assert tensors_digest(base) in digests
    assert tensors_digest([("x", torch.ones(3, dtype=torch.bfloat16)), ("y", torch.tensor(3))])
    assert tensors_digest([("a", torch.ones(4)[::2])]) == tensors_digest([("a", torch.ones(2))])
