"""A layer's weight as out x in, whatever stores it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from smartinit.errors import ModelError
from smartinit.targets import Target
from smartinit.targets.weight import host_of


@pytest.fixture(autouse=True)
def _seeded(seed):
    torch.manual_seed(seed)


def conv1d(out_features: int, in_features: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out_features, in_features)


@pytest.fixture(params=["linear", "conv1d"])
def target(request):
    """A layer of 5 x 3 in both ways of storing it."""
    return Target.of(nn.Linear(3, 5) if request.param == "linear" else conv1d(5, 3), "fc")


def channels_last() -> nn.Module:
    return nn.Conv2d(4, 5, (2, 3), stride=(1, 2), padding=1, dilation=(1, 2)).to(memory_format=torch.channels_last)


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 5, (2, 3)),
    "strided": lambda: nn.Conv2d(4, 5, (2, 3), stride=2, padding=1, bias=False),
    "channels_last": channels_last,
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_multiplies_patches_by_its_matrix(kind):
    layer = CONVOLUTIONS[kind]()
    target = Target.of(layer, "conv")
    assert (target.host, target.shape, target.stored_shape) == ("convolution", (5, 24), (5, 4, 2, 3))
    x = torch.randn(2, 4, 7, 8)
    patches = nn.functional.unfold(x, (2, 3), layer.dilation, layer.padding, layer.stride)
    expected = layer(x).flatten(2) - (0 if layer.bias is None else layer.bias[:, None])
    torch.testing.assert_close(target.weight() @ patches, expected)


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (9,)), (nn.Conv3d, (5, 6, 7))])
def test_a_convolution_of_any_dimensions_has_a_matrix(kind, size, seed):
    torch.manual_seed(seed)
    layer = kind(4, 5, 3, bias=False)
    target = Target.of(layer, "conv")
    assert (target.host, target.shape) == ("convolution", (5, 4 * 3 ** len(size)))
    assert target.stored_shape == layer.weight.shape
    patch = torch.randn(1, 4, *size)[..., :3][(slice(None), slice(None), *(slice(3) for _ in size))]
    torch.testing.assert_close(target.weight() @ patch.flatten(), layer(patch).flatten())
    before, delta = target.weight().clone(), torch.randn(target.shape)
    target.subtract_(delta)
    torch.testing.assert_close(layer.weight.flatten(1), before - delta)
    assert Target.of(kind(4, 5, 3, device="meta"), "conv").shape == target.shape


def test_four_bit_codes_in_a_floating_point_tensor_are_no_weight():
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.bfloat16), requires_grad=False)
    layer.weight.quant_state = object()
    assert Target.of(layer, "fc").shape == (4, 6)
    assert not Target.of(layer, "fc").is_readable


def test_an_embedding_multiplies_one_hot_columns_by_its_matrix():
    layer = nn.Embedding(7, 4, padding_idx=0)
    target = Target.of(layer, "embed")
    assert (target.host, target.shape, target.stored_shape) == ("embedding", (4, 7), (7, 4))
    tokens = torch.tensor([3, 0, 6])
    one_hot = nn.functional.one_hot(tokens, 7).float()
    torch.testing.assert_close(one_hot @ target.weight().T, layer(tokens))
    assert target.weight().data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "embedding"])
def test_subtract_changes_convolutions_and_embeddings_in_place(kind):
    layer = nn.Embedding(24, 5) if kind == "embedding" else CONVOLUTIONS[kind]()
    target = Target.of(layer, "x")
    before, parameter, strides = target.weight().clone(), layer.weight, layer.weight.stride()
    delta = torch.randn(target.shape)
    target.subtract_(delta)
    assert layer.weight is parameter
    assert layer.weight.stride() == strides
    torch.testing.assert_close(target.weight(), before - delta)
    with pytest.raises(ModelError, match=r"what is to be subtracted is \(2, 2\)"):
        target.subtract_(torch.zeros(2, 2))


def test_what_is_packed_says_its_shape():
    assert Target.of(packed_parameter(), "fc").stored_shape == (4, 6)
    assert Target.of(nn.Embedding(7, 4, device="meta"), "e").shape == (4, 7)
    assert Target.of(nn.Conv2d(4, 5, (2, 3), device="meta"), "c").shape == (5, 24)
    assert Target.of(nn.Embedding(7, 4, device="meta"), "e").storage is None


def test_the_weight_multiplies_from_the_left(target):
    x = torch.randn(7, 3)
    assert target.shape == tuple(target.weight().shape) == (5, 3)
    torch.testing.assert_close(x @ target.weight().T + target.module.bias, target.module(x))


def test_the_weight_is_a_view_without_gradient(target):
    assert target.weight().data_ptr() == target.module.weight.data_ptr()
    assert not target.weight().requires_grad
    assert target.module.weight.requires_grad


def test_host_name_and_path(target):
    assert target.host == host_of(target.module)
    assert target.host == ("linear" if isinstance(target.module, nn.Linear) else "conv1d")
    assert (target.name, target.path, target.aliases) == ("fc", "fc", ())
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.name = "other"


def test_subtract_changes_the_stored_weight_in_place(target):
    before, delta = target.weight().clone(), torch.randn(5, 3)
    parameter, x = target.module.weight, torch.randn(2, 3)

    target.subtract_(delta)

    assert target.module.weight is parameter
    assert parameter.requires_grad
    torch.testing.assert_close(target.weight(), before - delta)
    torch.testing.assert_close(target.module(x), x @ (before - delta).T + target.module.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_subtract_rounds_once(dtype, delta_dtype):
    """The result is the exact difference, rounded to the stored dtype: not a difference of rounded numbers."""
    target = Target.of(nn.Linear(64, 48, dtype=dtype), "fc")
    weight = target.weight().double()
    delta = (torch.randn(48, 64, dtype=torch.float64) * 0.1).to(delta_dtype)

    target.subtract_(delta)

    exact = weight - delta.double()
    wide = torch.promote_types(dtype, delta_dtype)
    assert torch.equal(target.weight(), exact.to(wide).to(dtype))
    if torch.finfo(delta_dtype).eps < torch.finfo(dtype).eps:
        assert not torch.equal(target.weight(), weight.to(dtype) - delta.to(dtype))


def test_subtract_refuses_a_wrong_shape(target):
    with pytest.raises(ModelError, match=r"'fc' is \(5, 3\), but what is to be subtracted is \(3, 5\)"):
        target.subtract_(torch.zeros(3, 5))


def test_a_computed_weight_can_be_read_but_not_changed():
    layer = parametrizations.orthogonal(nn.Linear(4, 4))
    target = Target.of(layer, "fc")
    torch.testing.assert_close(target.weight(), layer.weight)
    with pytest.raises(ModelError, match=r"'fc'.*not a parameter but computed"):
        target.subtract_(torch.zeros(4, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_number_is_seen(bad, dtype):
    target = Target.of(nn.Linear(16, 16, dtype=dtype), "fc")
    assert target.has_finite_weight()
    with torch.no_grad():
        target.module.weight[7, 11] = bad
    assert not target.has_finite_weight()


def test_large_finite_halves_are_finite():
    target = Target.of(nn.Linear(8, 8, dtype=torch.float16), "fc")
    with torch.no_grad():
        target.module.weight.fill_(60000)
    assert target.has_finite_weight()


def test_dtype_and_device(target):
    assert (target.dtype, target.device) == (torch.float32, torch.device("cpu"))
    assert Target.of(nn.Linear(2, 2, dtype=torch.bfloat16, device="meta"), "m").device.type == "meta"


class PackedLinear(nn.Module):
    """As GPTQ, AWQ and HQQ write it: no `weight` matrix, sizes as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 6, 4
        self.register_buffer("qweight", torch.zeros(4, 3, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :4]


def packed_parameter() -> nn.Module:
    """As bitsandbytes writes it: an nn.Linear whose weight is a column of bytes."""
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    return layer


def float8() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 6).to(torch.float8_e4m3fn), requires_grad=False)
    return layer


class Coded(torch.Tensor):
    """As torchao writes it: a float tensor by its dtype, whose numbers are elsewhere."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)

    def __init__(self, codes) -> None:
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Coded(args[0].codes)
        raise NotImplementedError(func)


def tensor_subclass() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(Coded(torch.zeros(4, 6, dtype=torch.int8)), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    "make", [PackedLinear, packed_parameter, float8, tensor_subclass, lambda: nn.Linear(6, 4, device="meta")]
)
def test_a_weight_that_is_no_matrix_of_numbers_is_a_target_but_not_readable(make):
    target = Target.of(make(), "model.fc")
    assert target.shape == (4, 6)
    assert not target.is_readable
    assert target.has_finite_weight()
    for use in (target.weight, lambda: target.subtract_(torch.zeros(4, 6))):
        with pytest.raises(ModelError, match=r"the weight of 'model\.fc' \(\w+\) cannot be read as a matrix"):
            use()


def test_a_pruned_layer_has_the_shape_of_its_weight():
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(layer.weight[:3].detach().clone())
    assert Target.of(layer, "fc").shape == (3, 6)


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(4, 3, max_norm=1.0),
        nn.Conv1d(4, 4, 1, groups=4),
        nn.Conv2d(4, 4, 1, groups=2),
        nn.ConvTranspose2d(4, 4, 1),
        nn.LayerNorm(3),
        nn.Bilinear(2, 3, 4),
        nn.MultiheadAttention(4, 2),
    ],
)
def test_other_modules_are_no_targets(module):
    assert host_of(module) is None
    with pytest.raises(
        ModelError,
        match=r"'x' is a .*: expected a linear layer, a Conv1D, a convolution without groups or an Embedding",
    ):
        Target.of(module, "x")


def test_subclasses_are_recognised():
    class MyLinear(nn.Linear):
        pass

    assert host_of(MyLinear(2, 2)) == "linear"
    assert host_of(type("MyConv1D", (type(conv1d(2, 3)),), {})(5, 3)) == "conv1d"
