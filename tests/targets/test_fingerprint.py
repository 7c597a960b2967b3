"""One model, one fingerprint: whatever is around it. Another model, another one: whatever differs."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import smartinit
from smartinit.errors import ModelError
from smartinit.formats.safetensors_header import read_header
from smartinit.targets import tensor_digest as digests
from smartinit.targets.fingerprint import model_fingerprint
from smartinit.targets.tensor_digest import tensor_digest

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128,
]  # fmt: skip


def bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """A tensor of random bytes."""
    size = torch.empty(shape, dtype=dtype)
    count = size.numel() * size.element_size()
    raw = torch.randint(2 if dtype is torch.bool else 256, (count,), generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.uint8).view(dtype).reshape(shape)


# --- tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3)], ids=str)
def test_every_dtype_and_shape_has_a_digest_of_its_own(dtype, shape, seed):
    tensor = bits(dtype, shape, seed)
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    others = [other for other in DTYPES if other is not dtype and other.itemsize == dtype.itemsize]
    assert all(tensor_digest(tensor.view(other)) != tensor_digest(tensor) for other in others if other != torch.bool)
    assert tensor_digest(tensor.reshape(*shape, 1)) != tensor_digest(tensor)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d is not torch.complex128], ids=str)
def test_the_digest_is_that_of_the_file(dtype, seed, tmp_path):
    tensor = bits(dtype, (3, 4), seed)
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"x": tensor}))
    entry = read_header(path)["x"]
    content = path.read_bytes()[entry.start : entry.stop]
    assert tensor_digest(tensor) == hashlib.sha256(f"{entry.dtype} 3,4\n".encode() + content).hexdigest()


@settings(max_examples=40)
@given(data=st.data())
def test_one_bit_is_another_digest(data):
    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES if dtype is not torch.bool]))
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    tensor = bits(dtype, shape, data.draw(st.integers(0, 99)))
    before = tensor_digest(tensor)
    raw = tensor.reshape(-1).view(torch.uint8) if shape else tensor.reshape(1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert tensor_digest(tensor) != before


@pytest.mark.parametrize("piece", [8, 100, 7000, 1 << 23])
def test_the_layout_in_memory_does_not_matter(piece, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 30, 20, generator=generator)
    z = torch.randn(6, 5, generator=generator, dtype=torch.complex64)
    layouts = [
        x, x.transpose(0, 2), x[::2, 1:], x[:1].expand(7, 30, 20), x.flip(0), x[:, :1, :1].transpose(0, 2),
        z.conj(), z.conj().T, z.imag, z.conj().imag, z[:1, :1].T,
        x[:, :, None].to(memory_format=torch.channels_last).requires_grad_(),
    ]  # fmt: skip
    plain = [tensor_digest(tensor.detach().clone(memory_format=torch.contiguous_format)) for tensor in layouts]
    monkeypatch.setattr(digests, "_PIECE", piece)
    assert [tensor_digest(tensor) for tensor in layouts] == plain


class Subclass(torch.Tensor):
    pass


class Two(torch.Tensor):
    """A tensor that is stored as two, as torchao's are."""

    @staticmethod
    def __new__(cls, codes, scale, note=""):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale, note=""):
        self.codes, self.scale, self.note = codes, scale, note

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.note

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


class Hidden(Two):
    __tensor_flatten__ = None


def test_subclasses():
    x = torch.arange(6.0)
    assert tensor_digest(x.as_subclass(Subclass)) == tensor_digest(nn.Parameter(x)) == tensor_digest(x)
    codes, scale = torch.arange(6, dtype=torch.int8), torch.ones(1)
    two = tensor_digest(Two(codes, scale))
    assert two == tensor_digest(Two(codes.clone(), scale.clone()))
    others = [Two(codes + 1, scale), Two(codes, scale * 2), Two(codes, scale, "rounded")]
    assert len({two, *map(tensor_digest, others)}) == 4
    with pytest.raises(ModelError, match=r"Hidden of shape .* in its own way"):
        tensor_digest(Hidden(codes, scale))


def test_packed_weights_count_with_their_scales():
    def packed(codes, absmax, blocksize=64):
        weight = nn.Parameter(codes, requires_grad=False)
        state = {"absmax": absmax, "blocksize": blocksize, "dtype": torch.float16}
        weight.quant_state = SimpleNamespace(as_dict=lambda: state)
        return weight

    codes, scales = torch.arange(8, dtype=torch.uint8), torch.ones(2)
    variants = [packed(codes, scales), packed(codes + 1, scales), packed(codes, scales * 2), packed(codes, scales, 32)]
    assert len({tensor_digest(codes), *map(tensor_digest, variants)}) == 5
    assert tensor_digest(packed(codes.clone(), scales.clone())) == tensor_digest(variants[0])


WITHOUT_NUMBERS = {
    "meta device": lambda: torch.empty(2, 3, device="meta"),
    "first batch": lambda: nn.LazyLinear(3).weight,
    "sparse": lambda: torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize(("text", "make"), WITHOUT_NUMBERS.items(), ids=WITHOUT_NUMBERS)
def test_what_has_no_numbers_has_no_digest(text, make):
    with pytest.raises(ModelError, match=text):
        tensor_digest(make())


# --- the same model ------------------------------------------------------------------------------------------------

MUCH = {
    "target_modules": ["q_proj", "down_proj"],
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "r": 4,
}


def compiled_inside(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    return model


def after_training_settings(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.requires_grad_(False)
    return model.train()


def after_a_pass(model):
    model(torch.ones(1, 5, dtype=torch.long), labels=torch.ones(1, 5, dtype=torch.long)).loss.backward()
    return model


def injected(model):
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    return model


def trained_biases(model):
    config = smartinit.LoraConfig(target_modules=["q_proj"], bias="all")
    model = smartinit.LoraModel(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(1)
    return model


def elsewhere(model):
    model.config._name_or_path = model.name_or_path = "somewhere/else"
    model.config.transformers_version = "0"
    return model


AROUND = {
    "a copy": copy.deepcopy,
    "modes": after_training_settings,
    "after a pass": after_a_pass,
    "another folder": elsewhere,
    "PEFT": lambda model: peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **MUCH)),
    "PEFT on a parameter": lambda model: peft.get_peft_model(
        model, peft.LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
    ),
    "PEFT injected": injected,
    "LoraModel": lambda model: smartinit.LoraModel(model, smartinit.LoraConfig(**MUCH)),
    "LoraModel in PEFT's place": lambda model: torch.compile(
        smartinit.LoraModel(model, smartinit.LoraConfig(target_modules=["q_proj"]))
    ),
    "LoraModel with biases that were trained": trained_biases,
    "compiled": torch.compile,
    "compiled inside": compiled_inside,
    "checkpointed": checkpointed,
    "DataParallel": nn.DataParallel,
}


@pytest.mark.filterwarnings("ignore")  # of PEFT, about tied weights
@pytest.mark.parametrize("wrap", AROUND.values(), ids=AROUND)
def test_what_is_around_a_model_does_not_matter(tiny_llama, wrap):
    options = {"attention_bias": True, "tie_word_embeddings": False}
    plain = model_fingerprint(tiny_llama(**options))
    assert model_fingerprint(wrap(tiny_llama(**options))) == plain
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.rotary_emb.inv_freq"} < set(plain.tensors)


def test_factors_that_were_trained_are_no_part_of_the_base(tiny_llama):
    plain = model_fingerprint(tiny_llama())
    model = smartinit.LoraModel(tiny_llama(), smartinit.LoraConfig(**MUCH))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert model_fingerprint(model) == plain


def test_saved_and_loaded(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    model.save_pretrained(tmp_path / "one", max_shard_size="10KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", attn_implementation="eager")
    assert model_fingerprint(loaded) == model_fingerprint(model)


def test_threads_change_nothing(tiny_llama):
    model = tiny_llama()
    assert model_fingerprint(model, threads=1) == model_fingerprint(model, threads=7) == model_fingerprint(model)


def test_data_parallel_and_sharded_in_one_process(tiny_llama, tmp_path):
    from torch.distributed.fsdp import fully_shard

    plain = model_fingerprint(tiny_llama())
    place = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", place, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        assert model_fingerprint(nn.parallel.DistributedDataParallel(tiny_llama())) == plain
        sharded = tiny_llama()
        fully_shard(sharded.model.layers[0])
        fully_shard(sharded)
        assert model_fingerprint(sharded) == plain
    finally:
        torch.distributed.destroy_process_group()


RANK = """
import sys, torch
from datetime import timedelta
from torch import nn
from torch.distributed.fsdp import fully_shard
from smartinit.targets.fingerprint import model_fingerprint
rank, place = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
print(model_fingerprint(model).root)
torch.distributed.init_process_group("gloo", place, rank=rank, world_size=2, timeout=timedelta(seconds=60))
try:
    fully_shard(model[0])
    fully_shard(model)
    print(model_fingerprint(model).root)
finally:
    torch.distributed.destroy_process_group()
"""


def test_sharded_over_two_processes(tmp_path):
    arguments = [sys.executable, "-c", RANK]
    place = f"file://{tmp_path / 'meeting'}"
    ranks = [
        subprocess.Popen([*arguments, str(rank), place], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    roots = {root for out, _ in said for root in out.split()}
    assert [len(out.split()) for out, _ in said] == [2, 2], said
    assert len(roots) == 1


# --- another model -------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(data=st.data())
def test_one_bit_of_any_weight_or_buffer(tiny_llama, data):
    model = tiny_llama()
    before = model_fingerprint(model)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    name = data.draw(st.sampled_from(sorted(named)))
    raw = named[name].detach().reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    after = model_fingerprint(model)
    assert (after.root != before.root, after.weights != before.weights) == (True, True)
    assert after.structure == before.structure
    assert name in {key for key in after.tensors if after.tensors[key] != before.tensors[key]}


def replaced_activation(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def rescaled_attention(model):
    model.model.layers[1].self_attn.scaling *= 2


CHANGES = {
    "an activation": replaced_activation,
    "a setting of a module": rescaled_attention,
    "the configuration": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "the dtype": lambda model: model.to(torch.bfloat16),
    "a layer less": lambda model: model.model.layers.__delitem__(1),
    "a buffer more": lambda model: model.register_buffer("extra", torch.zeros(1), persistent=False),
    "a tensor that is no buffer": lambda model: setattr(model.model, "table", {"of": [torch.zeros(2)]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_computes_something_else_is_something_else(tiny_llama, change):
    model = tiny_llama()
    before = model_fingerprint(model).root
    change(model)
    assert model_fingerprint(model).root != before


def test_tensors_that_are_no_buffers_count_by_their_values():
    model = nn.Linear(2, 2)
    model.scales = [torch.ones(2)]
    before = model_fingerprint(model)
    model.scales[0][1] = 2
    assert model_fingerprint(model).root != before.root
    assert "scales.0" in before.tensors


def model_of(code: str) -> nn.Module:
    names: dict = {"nn": nn, "__name__": "typed_in"}
    exec(f"class Net(nn.Linear):\n    def forward(self, x):\n        return (lambda y: {code})(x)\n", names)  # noqa: S102
    torch.manual_seed(0)
    return names["Net"](2, 2)


def test_the_code_of_ones_own_classes_counts(tmp_path, monkeypatch):
    typed = [model_fingerprint(model_of(code)).root for code in ("y + 1", "y + 2", "y + 1")]
    assert (typed[0] == typed[2], typed[0] != typed[1]) == (True, True)
    roots = []
    monkeypatch.syspath_prepend(tmp_path)
    for folder, factor in (("one", 2), ("two", 3), ("three", 2)):
        text = f"from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return x * {factor}\n"
        (tmp_path / f"net_{folder}.py").write_text(text)
        torch.manual_seed(0)
        roots.append(model_fingerprint(__import__(f"net_{folder}").Net(2, 2)).root)
    assert (roots[0] == roots[2], roots[0] != roots[1]) == (True, True)


def test_a_users_own_base_layer_is_no_adapter():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer, self.more = nn.Linear(2, 2), nn.Linear(2, 2)

    assert set(model_fingerprint(Own()).tensors) == {
        "base_layer.weight", "base_layer.bias", "more.weight", "more.bias",
    }  # fmt: skip


# --- shapes of models ----------------------------------------------------------------------------------------------


def test_shared_weights_are_hashed_once_and_stand_under_all_names(tiny_llama, monkeypatch):
    from smartinit.targets import fingerprint

    hashed = []
    monkeypatch.setattr(fingerprint, "tensor_digest", lambda tensor: hashed.append(tensor) or tensor_digest(tensor))
    model = tiny_llama(tie_word_embeddings=True)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    found = model_fingerprint(model, threads=1).tensors
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert found["model.layers.0.mlp.up_proj.weight"] == found["model.layers.1.mlp.up_proj.weight"]
    assert len(found) - len(hashed) == 1 + 3  # the head and three matrices


def test_two_parameters_in_one_memory(monkeypatch):
    from smartinit.targets import fingerprint

    hashed = []
    monkeypatch.setattr(fingerprint, "tensor_digest", lambda tensor: hashed.append(tensor) or tensor_digest(tensor))
    model = nn.Module()
    model.one = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    model.same = nn.Parameter(model.one.detach())
    model.turned = nn.Parameter(model.one.detach().T)
    model.part = nn.Parameter(model.one.detach()[:1])
    model.bits = nn.Parameter(model.one.detach().view(torch.int32), requires_grad=False)
    found = model_fingerprint(model, threads=1).tensors
    assert (len(hashed), found["same"]) == (4, found["one"])
    assert len(set(found.values())) == 4


def test_the_class_of_a_module_counts():
    def root(*inner):
        return model_fingerprint(nn.Sequential(*inner)).root

    assert root(nn.Tanh()) == root(nn.Tanh()) != root(nn.Sigmoid())
    assert root(nn.Tanh(), nn.Sigmoid()) != root(nn.Sigmoid(), nn.Tanh())


def test_a_module_that_holds_its_own_holder_ends():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].owner = model
    assert set(model_fingerprint(model).tensors) == {"0.weight", "0.bias"}


def test_meta_tensors_are_named(tiny_llama):
    model = tiny_llama()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.gate_proj.weight' \(and 2 more tensors\) lies on the"):
        model_fingerprint(model)


def test_a_tensor_that_cannot_be_seen_is_named():
    model = nn.Linear(2, 2)
    model.register_buffer("odd", Hidden(torch.zeros(2), torch.zeros(1)))
    with pytest.raises(ModelError, match=r"because of 'odd': a Hidden"):
        model_fingerprint(model)
