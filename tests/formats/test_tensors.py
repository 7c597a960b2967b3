"""The tensors of an adapter file: PEFT's, for every kind of layer that it adapts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from smartinit.errors import ArtefactError, ConfigError, VerificationError
from smartinit.factors import Factors
from smartinit.formats.tensors import Form, read_tensors, stored_tensors

FILE: Any = "adapter_model.safetensors"


class Layers(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.image = nn.Conv2d(8, 12, (3, 2), padding=1)
        self.sound = nn.Conv1d(8, 6, 3)
        self.volume = nn.Conv3d(4, 6, (1, 2, 3))
        self.lin = nn.Linear(8, 5)
        self.head = nn.Linear(5, 2)


def in_peft(**options: Any) -> dict[str, torch.Tensor]:
    """What PEFT saves of an adapter on all of them, random values."""
    peft = pytest.importorskip("peft")
    targets = ["emb", "image", "sound", "volume", "lin"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
    model = peft.get_peft_model(Layers(), config)
    return {key: tensor.detach().clone() for key, tensor in peft.get_peft_model_state_dict(model).items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["head"], "bias": "lora_only"}],
    ids=lambda options: ",".join(options) or "plain",
)
def test_reading_and_writing_gives_what_peft_wrote(options: dict[str, Any]) -> None:
    theirs = in_peft(**options)
    read = read_tensors(FILE, save(theirs))
    assert set(read.factors) == {"emb", "image", "sound", "volume", "lin"}
    assert all(pair.a.ndim == pair.b.ndim == 2 for pair in read.factors.values())
    assert read.forms["emb"] == Form(embedding=True)
    assert read.forms["image"] == Form(kernel=(3, 2))
    assert read.forms["volume"] == Form(kernel=(1, 2, 3))
    ours = stored_tensors(read.factors, forms=read.forms) | read.others
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].shape == tensor.shape, key
        assert torch.equal(ours[key], tensor), key


def test_a_convolutions_matrices_multiply_to_peft_s_update() -> None:
    """``B A`` of the flattened matrices is what PEFT adds to the flattened kernel."""
    peft = pytest.importorskip("peft")
    base = Layers()
    before = base.image.weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["image"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    pair = read_tensors(FILE, save(dict(peft.get_peft_model_state_dict(model)))).factors["image"]
    after = model.merge_and_unload().image.weight.detach()
    assert torch.allclose((after - before).flatten(1), pair.b @ pair.a, atol=1e-6)


def test_magnitudes_are_not_rounded_with_the_matrices() -> None:
    pair = Factors(torch.rand(2, 4), torch.rand(3, 2), magnitude=torch.rand(3))
    tensors = stored_tensors({"x": pair}, dtype=torch.bfloat16)
    assert tensors["base_model.model.x.lora_A.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["base_model.model.x.lora_magnitude_vector"], pair.magnitude)


def test_layers_that_share_memory_get_their_own() -> None:
    a = torch.rand(2, 4)
    tensors = stored_tensors({"x": Factors(a, torch.rand(3, 2)), "y": Factors(a, torch.rand(3, 2))}, dtype=None)
    assert load(save(tensors)).keys() == tensors.keys()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 4


def test_a_kernel_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"A of layer 'x' has 10 columns, which a kernel of \(3,\) does not divide"):
        stored_tensors({"x": Factors(torch.rand(2, 10), torch.rand(3, 2))}, forms={"x": Form(kernel=(3,))})


def test_a_magnitude_must_be_finite() -> None:
    pair = Factors(torch.rand(2, 4), torch.rand(3, 2), magnitude=torch.tensor([1.0, float("nan"), 2.0]))
    with pytest.raises(VerificationError, match=r"x\.lora_magnitude_vector' holds NaN or Inf as float32"):
        stored_tensors({"x": pair})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q.lora_A.weight": torch.zeros(2, 4), "q.lora_embedding_B": torch.zeros(4, 2)}, "only one of the two"),
        ({"q.lora_embedding_A": torch.zeros(2, 4, 3), "q.lora_embedding_B": torch.zeros(4, 2, 1)}, "A of shape"),
        ({"q.lora_A.weight": torch.zeros(4, 8, 3, 3), "q.lora_B.weight": torch.zeros(12, 1, 1, 1)}, "rank must be"),
        ({"q.lora_A.weight": torch.zeros(4, 8, 3, 3), "q.lora_B.weight": torch.zeros(12, 4)}, "A of shape"),
        ({"q.lora_A.weight": torch.zeros(4, 8, 3), "q.lora_B.weight": torch.zeros(12, 4, 2)}, "A of shape"),
        (
            {
                "q.lora_A.weight": torch.zeros(2, 4),
                "q.lora_B.weight": torch.zeros(3, 2),
                "q.lora_magnitude_vector": torch.zeros(4),
            },
            "a magnitude of shape",
        ),
    ],
)
def test_what_no_layer_has_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ArtefactError, match=rf"adapter_model\.safetensors' .*layer 'q'|{message}") as caught:
        read_tensors(FILE, save(tensors))
    assert message in str(caught.value)
