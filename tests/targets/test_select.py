"""Which layers get an adapter, on real models and on each host."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from smartinit.config import LoraConfig
from smartinit.errors import ConfigError, TargetError
from smartinit.targets import check_ranks, match_module, rank_for, select_targets

# PEFT 0.21.2 reads an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


@pytest.fixture
def llama(tiny_llama):
    return tiny_llama()


def names(targets):
    return [target.name for target in targets]


def adapted_by_peft(peft, model, **options):
    """The layers that PEFT itself gives a LoRA layer, by their names in the base model, in model order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of tied output layers
        adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, **options))
    return [
        name.removeprefix("base_model.model.")
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    ]


# -- plain models, with PEFT as the oracle


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.1\..*_proj"},
        {"target_modules": ["up_proj", "q_proj"], "layers_to_transform": 1},
        {"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-LINEAR", "exclude_modules": r".*mlp.*"},
        {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_gets_the_layers_that_peft_adapts(peft, tiny_llama, options, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    assert names(select_targets(model, LoraConfig(**options))) == adapted_by_peft(peft, model, **options)


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"target_modules": ["mlp.c_proj", "c_fc"]}])
def test_gpt2_gets_the_layers_that_peft_adapts(peft, gpt2, options):
    targets = select_targets(gpt2, LoraConfig(**options))

    assert names(targets) == adapted_by_peft(peft, gpt2, fan_in_fan_out=True, **options)
    for target in targets:
        assert target.host == "conv1d"
        assert target.shape == tuple(target.module.weight.T.shape) == tuple(target.weight().shape)


@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear"}, {"target_modules": ["dense"]}])
def test_bert_gets_the_layers_that_peft_adapts(peft, bert, options):
    assert names(select_targets(bert, LoraConfig(**options))) == adapted_by_peft(peft, bert, **options)


def test_a_classifier_keeps_its_head_out_of_all_linear(peft, bert):
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(bert.config)
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    assert names(select_targets(model, LoraConfig(**options))) == adapted_by_peft(peft, model, **options)
    assert "classifier" in names(select_targets(model, LoraConfig(target_modules="all-linear")))


def test_a_roberta_head_of_several_layers_is_left_out_whole(peft, bert):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    shape = {key: value for key, value in bert.config.to_dict().items() if key in ("vocab_size", "hidden_size")}
    model = RobertaForSequenceClassification(
        RobertaConfig(**shape, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0)
    )
    options = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    assert names(select_targets(model, LoraConfig(**options))) == adapted_by_peft(peft, model, **options)


def test_defect_16_all_linear_on_a_plain_model(peft, llama):
    """PEFT's get_eva_state_dict finds nothing there."""
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(target_modules="all-linear")
    assert not any(check_target_module_exists(theirs, name) for name, _ in llama.named_modules())  # the defect

    targets = select_targets(llama, LoraConfig.from_peft(theirs))
    assert len(targets) == 2 * 7
    assert "lm_head" not in names(targets)

    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2)))
    assert names(select_targets(plain, LoraConfig(target_modules="all-linear"))) == ["0", "2.0"]


def test_none_can_mean_all_as_in_pefts_eva(llama):
    every = select_targets(llama, LoraConfig(), none_means="all")
    assert len(every) == 2 * 7 + 1
    assert every[-1].name == "lm_head"
    assert len(select_targets(llama, LoraConfig(exclude_modules=["lm_head"]), none_means="all")) == 2 * 7


def test_wildcards_in_entries(llama):
    config = LoraConfig(target_modules=["*.layers.0.*.q_proj", "*down*"])
    assert names(select_targets(llama, config)) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
    ]


def test_targets_are_the_models_own_modules(llama):
    for target in select_targets(llama, LoraConfig()):
        assert llama.get_submodule(target.path) is llama.get_submodule(target.name) is target.module


def test_selecting_changes_neither_model_nor_config(llama):
    config = LoraConfig()
    before = copy.deepcopy(config)
    state = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    select_targets(llama, config)
    assert config == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in llama.state_dict().items())


# -- wrappers and hosts


def test_wrappers_around_and_inside_a_model_do_not_matter(llama):
    config = LoraConfig(target_modules=r"model\.layers\..*\.q_proj")
    plain = names(select_targets(llama, config))
    assert len(plain) == 2

    compiled = partial(torch.compile, backend="eager")
    llama.model.layers[0] = compiled(llama.model.layers[0])
    llama.model.layers[1].self_attn.q_proj = compiled(llama.model.layers[1].self_attn.q_proj)
    for wrapped in (llama, compiled(llama), nn.DataParallel(compiled(llama))):
        targets = select_targets(wrapped, config)
        assert names(targets) == plain
        for target in targets:
            assert wrapped.get_submodule(target.path) is target.module
            assert type(target.module) is nn.Linear


def test_an_attribute_called_module_is_no_wrapper():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Linear(2, 2))
            self.fc = nn.Linear(2, 2)

    config = LoraConfig(target_modules="all-linear", rank_pattern={r"^module\.0": 2})
    targets = select_targets(Holder(), config)
    assert names(targets) == ["module.0", "fc"]
    assert [rank_for(config, name) for name in names(targets)] == [2, 8]


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: m.base_model, lambda m: m.base_model.model])
def test_a_peft_model_says_itself_which_layers(peft, llama, wrap):
    expected = names(select_targets(llama, LoraConfig()))
    base_layers = [llama.get_submodule(name) for name in expected]
    model = wrap(peft.get_peft_model(llama, peft.LoraConfig(r=2)))

    targets = select_targets(model)

    assert names(targets) == expected
    for target, base in zip(targets, base_layers, strict=True):
        assert target.module is base
        assert model.get_submodule(target.path).base_layer is base


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_our_adapter_model_says_itself_which_layers(llama, wrap):
    from smartinit import LoraModel

    base_layers = {name: llama.get_submodule(name) for name in names(select_targets(llama, LoraConfig()))}
    model = wrap(LoraModel(llama, LoraConfig(r=2)))

    targets = select_targets(model)

    assert {target.name: target.module for target in targets} == base_layers
    assert all(model.get_submodule(target.path).base_layer is target.module for target in targets)


def test_adapters_around_embeddings_convolutions_and_attention_are_left_out(peft):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.conv = nn.Conv1d(4, 4, 1)
            self.attention = nn.MultiheadAttention(4, 2)
            self.fc = nn.Linear(4, 4)
            self.head = nn.Linear(4, 4)

    config = peft.LoraConfig(r=2, target_modules=["embed", "conv", "attention", "fc"], modules_to_save=["head"])
    model = peft.get_peft_model(Mixed(), config)
    assert names(select_targets(model, LoraConfig.from_peft(config))) == ["fc"]


def test_adapters_without_any_linear_layer(peft):
    model = peft.get_peft_model(nn.Sequential(nn.Embedding(8, 4)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(TargetError, match="none of the model's 1 adapter layers is around a linear layer"):
        select_targets(model)


def test_one_adapter_of_several(peft, llama):
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    assert {name.split(".")[-1] for name in names(select_targets(model))} == {"q_proj", "v_proj"}
    assert {name.split(".")[-1] for name in names(select_targets(model, adapter_name="other"))} == {"v_proj"}
    with pytest.raises(TargetError, match="with an adapter 'third'"):
        select_targets(model, adapter_name="third")


def test_adapters_injected_by_transformers(peft, llama):
    llama.add_adapter(peft.LoraConfig(r=2))
    assert names(select_targets(llama))[0] == "model.layers.0.self_attn.q_proj"


def test_a_peft_model_without_adapters_is_not_taken_for_a_plain_one(peft, llama):
    model = peft.get_peft_model(llama, peft.LoraConfig(r=2))
    for layer in llama.model.layers:
        layer.self_attn.q_proj = layer.self_attn.q_proj.base_layer
        layer.self_attn.v_proj = layer.self_attn.v_proj.base_layer
    with pytest.raises(TargetError, match="0 adapter layers"):
        select_targets(model, LoraConfig())


# -- modules that stand in several places


def test_a_shared_layer_appears_once_and_lists_its_other_names():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(shared), "middle": nn.Linear(4, 4), "decoder": nn.Sequential(shared)}
    )
    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    assert [(t.name, t.aliases) for t in targets] == [("encoder.0", ("decoder.0",)), ("middle", ())]
    # Also when only its second name is asked for: PEFT would find nothing.
    assert names(select_targets(model, LoraConfig(target_modules=["decoder.0"]))) == ["encoder.0"]


def test_a_module_that_holds_its_holder_ends():
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.parent = parent

    model = nn.Module()
    model.child = Child(model)
    assert names(select_targets(model, LoraConfig(target_modules=["fc"]))) == ["child.fc"]


# -- what cannot be


def test_no_match_names_the_number_of_candidates_and_the_closest(gpt2):
    with pytest.raises(TargetError) as refused:
        select_targets(gpt2, LoraConfig(target_modules=["c_atn"]))
    assert str(refused.value) == "target_modules=['c_atn'] matched none of 9 linear layers; closest: 'c_attn'"
    with pytest.raises(TargetError, match=r"closest: 'mlp\.c_proj'"):
        select_targets(gpt2, LoraConfig(target_modules=["mpl.c_proj"]))


def test_no_match_of_a_string_says_that_it_is_a_regular_expression(llama):
    with pytest.raises(TargetError, match=r"target_modules='q_proj' matched none of 15.*for the whole name.*'q_proj'"):
        select_targets(llama, LoraConfig(target_modules="q_proj"))


@pytest.mark.parametrize("entries", [[], ["zzz"]])
def test_no_match_at_all(llama, entries):
    with pytest.raises(TargetError, match=r"matched none of 15 linear layers$"):
        select_targets(llama, LoraConfig(target_modules=entries))


@pytest.mark.parametrize("target_modules", [["q_proj"], None, "all-linear", r".*q_proj"])
def test_no_match_because_all_is_excluded(llama, target_modules):
    config = LoraConfig(target_modules=target_modules, exclude_modules=r".*")
    with pytest.raises(TargetError, match="exclude_modules or modules_to_save excludes all"):
        select_targets(llama, config)


def test_no_match_because_of_the_layers_numbers(llama):
    config = LoraConfig(target_modules=["q_proj"], layers_to_transform=[7])
    with pytest.raises(TargetError, match=r"layers_to_transform=\[7\] leaves none of the 2"):
        select_targets(llama, config)


def test_an_unknown_architecture_needs_target_modules(llama):
    llama.config.model_type = "brand-new"
    with pytest.raises(ConfigError, match="no default target_modules are known for the architecture 'brand-new'"):
        select_targets(llama, LoraConfig())
    with pytest.raises(ConfigError, match=r"for a model without config\.model_type: set target_modules"):
        select_targets(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_a_plain_model_needs_a_config(llama):
    with pytest.raises(ConfigError, match="needs a config"):
        select_targets(llama)


class Everything(nn.Module):
    """One of each kind that a name may hit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norm = nn.LayerNorm(4)
        self.block = nn.Sequential(nn.Linear(4, 4))
        self.fc = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("embed", "'embed' is an embedding"),
        ("conv", "'conv' is a convolution"),
        ("attention", r"'attention' is nn\.MultiheadAttention"),
        ("out_proj", r"'attention\.out_proj' is part of nn\.MultiheadAttention"),
        ("norm", "'norm' is a LayerNorm"),
        ("block", r"'block' is a Sequential \(name the linear layers inside it\)"),
    ],
)
def test_a_match_that_is_no_linear_layer_is_refused_with_the_reason(entry, reason):
    with pytest.raises(TargetError, match=f"matched modules that are no linear layers: {reason}"):
        select_targets(Everything(), LoraConfig(target_modules=["fc", entry]))


ALL = frozenset({"linear", "conv1d", "convolution", "embedding"})


def test_other_kinds_of_layers_when_they_are_asked_for():
    model = Everything()
    targets = select_targets(model, LoraConfig(target_modules=["embed", "conv", "fc"]), hosts=ALL)
    assert [(t.name, t.host, t.shape) for t in targets] == [
        ("embed", "embedding", (4, 8)),
        ("conv", "convolution", (4, 4)),
        ("fc", "linear", (4, 4)),
    ]
    for everything in (LoraConfig(target_modules="all-linear"), LoraConfig()):
        assert names(select_targets(model, everything, hosts=ALL, none_means="all")) == ["block.0", "fc"]


@pytest.mark.parametrize("wrap", ["plain", "peft", "native"])
def test_adapters_of_other_kinds_when_they_are_asked_for(peft, wrap):
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.conv = nn.Conv2d(4, 4, 1)
            self.fc = nn.Linear(4, 4)

    from smartinit import LoraModel

    config = {"r": 2, "target_modules": ["embed", "conv", "fc"]}
    model = Mixed()
    if wrap != "plain":
        model = (
            LoraModel(model, LoraConfig(**config))
            if wrap == "native"
            else peft.get_peft_model(model, peft.LoraConfig(**config))
        )
        assert names(select_targets(model)) == ["fc"]
        assert names(select_targets(model, adapter_name="default", hosts=frozenset({"embedding"}))) == ["embed"]
        with pytest.raises(TargetError, match="none of the model's 3 adapter layers is around one of conv1d"):
            select_targets(model, hosts=frozenset({"conv1d"}))
    targets = select_targets(model, LoraConfig(**config), adapter_name=None, hosts=ALL)
    assert names(targets) == ["embed", "conv", "fc"]
    assert [t.shape for t in targets] == [(4, 8), (4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(4, 4, 1, groups=2), "a convolution with groups=2"),
        (nn.Conv1d(4, 4, 1, groups=4), "a convolution with groups=4"),
        (nn.Embedding(8, 4, max_norm=1.0), "an embedding with max_norm"),
        (nn.LayerNorm(4), "a LayerNorm"),
    ],
)
def test_a_kind_that_cannot_be_is_named(module, reason):
    model = nn.ModuleDict({"odd": module, "fc": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match=rf"none of conv1d, convolution, embedding, linear: 'odd' is {reason}"):
        select_targets(model, LoraConfig(target_modules=["odd", "fc"]), hosts=ALL)


def test_a_kind_that_the_method_has_no_mathematics_for_is_named():
    with pytest.raises(TargetError, match=r"none of embedding: 'conv' is a convolution; 'fc' is a Linear"):
        select_targets(Everything(), LoraConfig(target_modules=["embed", "conv", "fc"]), hosts=frozenset({"embedding"}))


def test_all_linear_takes_only_layers_that_are_called():
    """The projection inside nn.MultiheadAttention never sees a forward call, so an adapter there would do nothing."""
    assert names(select_targets(Everything(), LoraConfig(target_modules="all-linear"))) == ["block.0", "fc"]


def test_many_matches_that_are_no_linear_layers_are_counted(llama):
    with pytest.raises(TargetError, match=r"; and \d+ more; leave them out"):
        select_targets(llama, LoraConfig(target_modules=".*"))


def test_an_idle_entry_is_named_with_the_closest(llama):
    with pytest.warns(UserWarning, match="entry 'k_prj' matched no module; closest: 'k_proj'") as caught:
        targets = select_targets(llama, LoraConfig(target_modules=["q_proj", "k_prj", "*v_proj"]))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(targets) == 4
    with pytest.warns(UserWarning, match=r"entry '\*x_proj' matched no module"):
        select_targets(llama, LoraConfig(target_modules=["q_proj", "*x_proj"]))


def test_an_excluded_entry_is_not_idle(llama):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"], layers_to_transform=[0])
    assert names(select_targets(llama, config)) == ["model.layers.0.self_attn.q_proj"]


def test_what_changes_the_models_layers_is_refused(llama):
    with pytest.raises(TargetError, match="layer_replication"):
        select_targets(llama, LoraConfig(layer_replication=[(0, 2), (1, 2)]))
    with pytest.raises(TargetError, match=r"target_parameters=\['x'\] are no layers.*name linear layers"):
        select_targets(llama, LoraConfig(target_parameters=["x"]))
    with pytest.warns(UserWarning, match="only the layers of target_modules"):
        assert len(select_targets(llama, LoraConfig(target_parameters=["x"], target_modules=["q_proj"]))) == 2


# -- ranks


def test_a_rank_that_a_layer_cannot_have_is_refused_with_its_shape(llama):
    config = LoraConfig(r=16, target_modules=["q_proj", "k_proj"], rank_pattern={r"^model\.layers\.1\..*k_proj": 17})
    targets = select_targets(llama, config)
    sentence = r"rank 17 of 'model\.layers\.1\.self_attn\.k_proj' is above min\(out, in\) = 16 of its weight, 16 x 32"
    with pytest.raises(ConfigError, match=sentence):
        check_ranks(targets, config)
    with pytest.raises(ConfigError, match=r"rank 33 of '.*' \(and of 3 more layers\)"):
        check_ranks(targets, LoraConfig(r=33))
    check_ranks(targets, LoraConfig(r=16))


def test_matching_is_consistent_with_match_module(llama):
    config = LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[1])
    expected = [name for name, _ in llama.named_modules() if name and match_module(config, name)]
    assert names(select_targets(llama, config)) == expected
