"""Blockwise quantisation: bitsandbytes' numbers, and a float64 oracle for every book."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartinit.errors import ConfigError, ModelError
from smartinit.linalg.nf4 import NF4, code_book, dequantise, pack, quantise, unpack
from smartinit.linalg.quantisers import Quantiser, dynamic_code_book, round_scales
from tests.oracles import loftq as oracle

ALL = [(bits, name) for name in ("bitsandbytes", "normal", "uniform") for bits in (2, 4, 8)]


def normal(*shape: int, seed: int, scale: float = 0.02) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def expected(weight: torch.Tensor, bits: int, name: str, block: int = 64) -> torch.Tensor:
    """The oracle's quantisation of this format."""
    if name == "bitsandbytes" and bits == 8:
        return oracle.quantise_rows(weight)
    if name == "uniform":
        return oracle.quantise_blocks(weight, oracle.uniform_book(bits), block, spread=True)
    nf4 = name == "bitsandbytes" and bits == 4
    return oracle.quantise_blocks(weight, oracle.NF4 if nf4 else oracle.normal_book(bits), block)


def off_ties(weight: torch.Tensor, got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference relative to the weight, but for numbers that lie between two entries to the last digit."""
    differs = (got.double() - want).abs() > 1e-5 * weight.abs().max()
    tie = ((got.double() - weight.double()).abs() - (want - weight.double()).abs()).abs() < 1e-5 * weight.abs().max()
    return float((got.double() - want)[~(differs & tie)].abs().max() / weight.abs().max())


def test_nf4_is_the_published_book():
    assert list(NF4) == oracle.NF4
    assert torch.equal(code_book("nf4", 4), torch.tensor(oracle.NF4))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_books_follow_their_definition(bits):
    for name, values in (("normal", oracle.normal_book(bits)), ("uniform", oracle.uniform_book(bits))):
        book = code_book(name, bits)
        assert len(book) == 2**bits
        torch.testing.assert_close(book.double(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=3e-7)
        assert (book.diff() > 0).all()


def test_the_normal_book_of_4_bits_is_nf4():
    torch.testing.assert_close(code_book("normal", 4), code_book("nf4", 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "name", "shape"),
    # Zeros fill up the last block, which matters to a spread and not to a largest size.
    [
        (*pair, shape)
        for pair in ALL
        for shape in [(32, 64), (5, 128), (3, 50), (1, 1)]
        if pair[1] != "uniform" or shape[1] % 64 == 0
    ],
)
def test_every_format_is_the_oracles(bits, name, shape, seed):
    weight = normal(*shape, seed=seed)
    before = weight.clone()
    got = Quantiser(bits, name)(weight)
    assert got.dtype == torch.float32
    assert got.shape == weight.shape
    assert torch.equal(weight, before)
    assert off_ties(weight, got, expected(weight, bits, name)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("block", [32, 64, 48])
def test_other_dtypes_and_block_sizes(dtype, block, seed):
    weight = normal(24, 40, seed=seed).to(dtype)
    got = Quantiser(4, block_size=block)(weight)
    assert off_ties(weight.double(), got, expected(weight, 4, "bitsandbytes", block)) < 1e-6


@pytest.mark.parametrize(("bits", "name"), ALL)
def test_a_batch_is_quantised_matrix_by_matrix(bits, name, seed):
    stack = normal(3, 7, 30, seed=seed)  # 210 numbers: the last block of each is not full
    quantiser = Quantiser(bits, name, double=name == "normal")
    together = quantiser(stack)
    for one, alone in zip(stack, together, strict=True):
        assert torch.equal(quantiser(one), alone)


@pytest.mark.parametrize(("bits", "name"), [pair for pair in ALL if pair[1] != "uniform"])
def test_quantising_twice_changes_nothing(bits, name, seed):
    """A base that was written as q(W) can be stored in the format afterwards."""
    quantiser = Quantiser(bits, name)
    once = quantiser(normal(48, 64, seed=seed))
    # int8 rows pass through float16: the codes stay, the step is rounded.
    torch.testing.assert_close(quantiser(once), once, rtol=1e-6 if bits != 8 else 2e-5, atol=0)


def test_more_bits_lose_less(seed):
    weight = normal(64, 64, seed=seed)
    for name in ("bitsandbytes", "normal", "uniform"):
        lost = [float((Quantiser(bits, name)(weight) - weight).norm()) for bits in (2, 4, 8)]
        # 8 uniform bits still cut off what is beyond 2.5 deviations
        assert lost[0] > 3 * lost[1] > 3 * lost[2]


def test_halfway_values_get_the_lower_entry():
    """As bitsandbytes' decision tree, which asks whether a number is greater than the bound."""
    book = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    codes, _ = quantise(torch.tensor([[1.0, 0.25, 0.75, -0.5]]), book, 4)
    assert codes.tolist() == [[3, 1, 2, 0]]


def test_zeros_stay_zeros_and_tiny_numbers_finite():
    for bits, name in ALL:
        weight = torch.zeros(2, 64)
        weight[1] = 1e-42
        got = Quantiser(bits, name)(weight)
        assert got.isfinite().all()
        assert not got[0].any()
        assert got.abs().max() <= 2e-42
    codes, _ = quantise(torch.zeros(1, 64), code_book("nf4", 4))
    assert (codes == 7).all()  # the code of zero, as in bitsandbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bad_number_is_refused(bits, bad):
    weight = torch.ones(4, 64)
    weight[2, 3] = bad
    with pytest.raises(ModelError, match=r"\(4, 64\) holds NaN or Inf"):
        Quantiser(bits)(weight)


def test_int8_rows_beyond_float16_take_its_bound():
    got = Quantiser(8)(torch.tensor([[1e6, 1.0], [1.0, 0.5]]))
    assert got[0, 0] == 65504.0
    assert got[1, 0] == 1.0


@given(bits=st.sampled_from([2, 4, 8]), count=st.integers(0, 70), seed=st.integers(0, 99))
def test_packing_is_undone_by_unpacking(bits, count, seed):
    codes = torch.randint(0, 2**bits, (2, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (2, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits)[:, :count], codes)


def test_the_first_code_is_in_the_highest_bits():
    assert pack(torch.tensor([0xA, 0x3], dtype=torch.uint8), 4).tolist() == [0xA3]
    assert pack(torch.tensor([1, 0, 3, 2], dtype=torch.uint8), 2).tolist() == [0b01001110]


def test_options_are_checked():
    for wrong in (dict(bits=3), dict(format="fp4"), dict(block_size=0), dict(block_size=True), dict(bits=16)):
        with pytest.raises(ConfigError):
            Quantiser(**wrong)
    with pytest.raises(ConfigError, match="nf4 code book has 4 bits, not 8"):
        code_book("nf4", 8)
    with pytest.raises(ConfigError, match="int8 rows"):
        _ = Quantiser(8).book
    with pytest.raises(ConfigError, match="at least one number"):
        quantise(torch.ones(2, 2), code_book("nf4", 4), 0)


def test_double_quantisation_rounds_the_scales_a_little(seed):
    scales = 0.05 + normal(2, 1000, seed=seed, scale=0.003)
    rounded = round_scales(scales)
    error = (rounded - scales).abs()
    assert error.max() > 0
    # The dynamic type's coarsest step is 1.8 % of the largest centred number, and the first, 1.0, is alone.
    centred = (scales - scales.mean(1, keepdim=True)).abs()
    assert (error.amax(1) < 0.01 * centred.amax(1)).all()
    book = dynamic_code_book()
    assert len(book) == 256
    assert (book.diff() > 0).all()
    assert {0.0, 1.0} <= set(book.tolist())
    assert book[0] > -1


def test_double_quantisation_is_the_oracles(seed):
    """600 scales: two whole blocks of 256 and a part."""
    weight = normal(150, 256, seed=seed)
    torch.testing.assert_close(
        dynamic_code_book().double(), torch.tensor(oracle.dynamic_book(), dtype=torch.float64), rtol=1e-6, atol=1e-12
    )
    got, want = Quantiser(double=True)(weight).double(), oracle.quantise_twice(weight)
    differs = ((got - want).abs() > 1e-6 * weight.abs().max()).reshape(-1, 64).any(1)
    assert differs.double().mean() < 0.01  # blocks with a number, or a scale, between two entries to the last digit
    assert not torch.equal(Quantiser(double=True)(weight), Quantiser()(weight))


def test_codes_and_scales_of_any_shape_come_back(seed):
    weight = normal(2, 3, 11, 13, seed=seed)
    book = code_book("normal", 8)
    codes, scales = quantise(weight, book, 64)
    assert codes.shape == (2, 3, 3, 64)
    assert scales.shape == (2, 3, 3)
    torch.testing.assert_close(dequantise(codes, scales, book, weight.shape), weight, rtol=0, atol=2e-3)


class TestAgainstBitsandbytes:
    """The library itself, where it is installed: it also runs on CPUs."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", [(64, 128), (3, 50)])
    def test_nf4_is_stored_bit_by_bit_alike(self, dtype, shape, seed):
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = normal(*shape, seed=seed).to(dtype)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        codes, scales = Quantiser().encode(weight)
        assert torch.equal(pack(codes.reshape(-1), 4)[: packed.numel()], packed.reshape(-1))
        assert torch.equal(scales, state.absmax)
        assert torch.equal(Quantiser()(weight).to(dtype), functional.dequantize_4bit(packed, state))

    def test_int8_rows(self, seed):
        functional = pytest.importorskip("bitsandbytes.functional")
        weight = normal(40, 72, seed=seed)
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        ours, our_scales = Quantiser(8).encode(weight)
        assert torch.equal(ours, codes)
        assert torch.equal(our_scales, scales)

    def test_double_quantisation(self, seed):
        functional = pytest.importorskip("bitsandbytes.functional")
        torch.testing.assert_close(dynamic_code_book(), functional.create_dynamic_map(), rtol=0, atol=0)
        _, scales = Quantiser().encode(normal(256, 256, seed=seed))
        offset = scales.mean()
        theirs = (
            functional.dequantize_blockwise(*functional.quantize_blockwise(scales - offset, blocksize=256)) + offset
        )
        ours = round_scales(scales)
        # Its search on CPUs misses the nearest entry now and then; ours is never farther away.
        assert (ours != theirs).double().mean() < 0.01
        assert ((ours - scales).abs() <= (theirs - scales).abs() + 1e-7).all()
