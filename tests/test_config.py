"""Configs: PEFT's fields, defaults and refusals, and translations to and from PEFT."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import typing
import warnings

import pytest

from smartinit.config import (
    INIT_METHODS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)
from smartinit.errors import ArgumentError, ConfigError, MissingDependencyError

OURS_ONLY = ("lora_one", "milora", "lora_null", "loram", "output_pca")


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


# -- fields and defaults


def test_to_dict_of_the_defaults_is_pefts(peft):
    theirs = peft.LoraConfig().to_dict()
    ours = LoraConfig().to_dict()

    assert ours == {key: theirs[key] for key in ours}
    assert LoraConfig.from_peft(peft.LoraConfig()).to_dict() == theirs


@pytest.mark.parametrize("kind", [EvaConfig, CordaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig])
def test_method_configs_have_pefts_fields_and_defaults(peft, kind):
    from peft.tuners.lora import config

    assert dataclasses.asdict(kind()) == dataclasses.asdict(getattr(config, kind.__name__)())


def test_every_option_of_peft_is_a_field_a_record_or_refused(peft):
    """A field that a newer PEFT adds must be decided on, not overlooked."""
    from smartinit.config import lora

    ours = {f.name for f in dataclasses.fields(LoraConfig)} - {"extra"}
    theirs = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    assert theirs - ours == {*lora._OTHER_LAYERS, *lora._RECORDS}


def test_the_annotations_can_be_read_at_run_time():
    assert typing.get_type_hints(LoraConfig)["eva_config"] == EvaConfig | None


def test_importing_the_configs_imports_neither_torch_nor_peft():
    code = "import sys, smartinit.config; print(sorted({'torch', 'peft', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_collections_are_copied():
    names, ranks = ["q_proj"], {"q_proj": 4}
    config = LoraConfig(target_modules=names, rank_pattern=ranks)
    config.target_modules.add("v_proj")
    config.rank_pattern["v_proj"] = 2

    assert names == ["q_proj"]
    assert ranks == {"q_proj": 4}


# -- method and its options


@pytest.mark.parametrize("name", INIT_METHODS)
def test_every_method_is_known_by_its_name(name):
    assert LoraConfig(init_lora_weights=name).method == name


def test_the_method_of_booleans_and_of_pissa_with_steps():
    assert LoraConfig().method == "kaiming"
    assert LoraConfig(init_lora_weights=False).method == "random"
    stepped = LoraConfig(init_lora_weights="pissa_niter_16")
    assert (stepped.method, stepped.pissa_iterations) == ("pissa", 16)
    assert LoraConfig(init_lora_weights="pissa").pissa_iterations is None


def test_an_unknown_method_is_refused_with_the_known_ones_and_the_closest():
    with pytest.raises(ConfigError, match=r"init_lora_weights='pisa' is not known.*'lora_one'.*closest: 'pissa'"):
        LoraConfig(init_lora_weights="pisa")
    with pytest.raises(ConfigError, match="pissa_niter_x"):
        LoraConfig(init_lora_weights="pissa_niter_x")
    with pytest.raises(ArgumentError, match="init_lora_weights=None is a NoneType"):
        LoraConfig(init_lora_weights=None)


@pytest.mark.parametrize(
    ("method", "field", "kind"),
    [
        ("eva", "eva_config", EvaConfig),
        ("corda", "corda_config", CordaConfig),
        ("loftq", "loftq_config", LoftQConfig),
        ("lora_ga", "lora_ga_config", LoraGAConfig),
    ],
)
def test_defect_21_stray_config(method, field, kind):
    """One option for another method must not cost a method its own defaults."""
    strays = {"eva_config": EvaConfig(rho=1.5), "corda_config": CordaConfig(), "loftq_config": LoftQConfig()}
    strays.pop(field, None)
    for name, stray in strays.items():
        with pytest.warns(UserWarning, match=f"{name} has no effect") as caught:
            config = LoraConfig(init_lora_weights=method, **{name: stray})
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert getattr(config, field) == kind()
        assert getattr(config, name) == stray


def test_defect_21_stray_config_from_peft(peft):
    with pytest.warns(UserWarning, match="eva_config"):
        theirs = peft.LoraConfig(init_lora_weights="corda", eva_config=peft.EvaConfig())
    assert theirs.corda_config is None  # the defect
    with pytest.warns(UserWarning, match="eva_config has no effect"):
        assert LoraConfig.from_peft(theirs).corda_config == CordaConfig()


def test_no_config_for_a_method_that_needs_none():
    assert LoraConfig(init_lora_weights="olora").eva_config is None


def test_method_configs_may_be_dicts():
    assert LoraConfig(init_lora_weights="eva", eva_config={"rho": 1}).eva_config == EvaConfig(rho=1)
    assert LoraConfig(loftq_config={}).loftq_config is None
    with pytest.raises(ConfigError, match=r"'roh' is not known.*closest: 'rho'"):
        LoraConfig(init_lora_weights="eva", eva_config={"roh": 1})
    with pytest.raises(ArgumentError, match="eva_config is a float"):
        LoraConfig(init_lora_weights="eva", eva_config=1.0)


def test_the_authors_names_of_lora_gas_scales():
    assert LoraGAConfig(scale="gd").scale == "gd_scale"
    assert LoraGAConfig(scale="weightS").scale == "weight_svd"


# -- refusals


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"r": 0}, "r=0 cannot be: expected an integer of at least 1"),
        ({"r": True}, "r=True"),
        ({"r": 8.0}, "r=8.0"),
        ({"lora_alpha": 0}, "lora_alpha=0 cannot be: expected a finite number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_dropout": 1}, r"lora_dropout=1 cannot be: expected a number from 0 to below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
        ({"bias": "lora"}, "bias='lora' is not known.*closest: 'lora_only'"),
        ({"task_type": "CAUSAL"}, "task_type='CAUSAL' is not known.*closest: 'CAUSAL_LM'"),
        ({"peft_type": "ADALORA"}, "peft_type='ADALORA'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]=-1"),
        ({"rank_pattern": {"(q": 4}}, r"rank_pattern: '\(q' is not a regular expression"),
        ({"target_modules": "*q_proj"}, r"is not a regular expression.*goes in a list"),
        ({"target_modules": ".*q", "layers_to_transform": [1]}, "layers_to_transform cannot be used when"),
        ({"target_modules": ".*q", "layers_pattern": "h"}, "layers_pattern cannot be used when"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern='h' has no meaning without"),
        ({"layers_to_transform": [-1]}, "an entry of layers_to_transform=-1"),
        ({"use_dora": True, "megatron_config": {"a": 1}}, "use_dora cannot be used with megatron_config"),
        ({"use_dora": True, "lora_bias": True}, "use_dora cannot be used with lora_bias"),
        ({"lora_bias": True, "init_lora_weights": "olora"}, "lora_bias cannot be used with"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence) as refused:
        LoraConfig(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        (EvaConfig, {"rho": 0.99}, "rho=0.99 cannot be: expected a finite number of at least 1"),
        (EvaConfig, {"rho": float("nan")}, "rho=nan"),
        (EvaConfig, {"tau": 1.01}, "tau=1.01 cannot be: expected a number from 0 to 1"),
        (EvaConfig, {"tau": -0.01}, "tau"),
        (CordaConfig, {"corda_method": "imp"}, "corda_method='imp' is not known.*closest: 'ipm'"),
        (LoftQConfig, {"loftq_bits": 3}, "loftq_bits=3 is not known: expected one of 2, 4, 8"),
        (LoftQConfig, {"loftq_iter": 0}, "loftq_iter=0"),
        (LoraGAConfig, {"direction": "BrAr"}, "direction"),
        (LoraGAConfig, {"scale": "none"}, "scale"),
        (LoraGAConfig, {"stable_gamma": 0}, "stable_gamma"),
    ],
)
def test_a_method_option_that_cannot_be_is_refused(kind, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        kind(**options)


def test_bounds_are_allowed():
    EvaConfig(rho=1, tau=0)
    EvaConfig(tau=1.0)
    LoraConfig(r=1, lora_alpha=0.5, lora_dropout=0)


@pytest.mark.parametrize("field", ["modules_to_save", "target_parameters"])
def test_a_string_where_a_list_belongs_is_refused(field):
    with pytest.raises(ArgumentError, match=rf"{field}='score' is a string.*\['score'\]"):
        LoraConfig(**{field: "score"})


@pytest.mark.parametrize("entries", [[1], [""], {"q": 1}, 3])
def test_target_modules_must_be_names(entries):
    with pytest.raises(ArgumentError, match="target_modules"):
        LoraConfig(target_modules=entries)


def test_peft_refuses_the_same_combinations(peft):
    for options in (
        {"target_modules": ".*q", "layers_to_transform": [1]},
        {"target_modules": ".*q", "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_pattern": "h"},
        {"use_dora": True, "megatron_config": {"a": 1}},
        {"use_dora": True, "lora_bias": True},
        {"lora_bias": True, "init_lora_weights": "olora"},
    ):
        for kind in (peft.LoraConfig, LoraConfig):
            with pytest.raises(ValueError, match=" "):
                kind(**options)


# -- dict, PEFT and back

RICH = {
    "r": 4,
    "lora_alpha": 12,
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "init_lora_weights": "eva",
    "eva_config": {"rho": 1.5, "tau": 0.9},
    "rank_pattern": {"^model.layers.1.self_attn.q_proj": 2},
    "alpha_pattern": {"v_proj": 6},
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "task_type": "CAUSAL_LM",
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "base_model_name_or_path": "some/model",
    "layer_replication": [(0, 2), (1, 2)],
}


def test_a_config_survives_json():
    config = LoraConfig(**RICH)
    data = json.loads(json.dumps(config.to_dict()))

    assert data["target_modules"] == ["q_proj", "v_proj"]
    assert "runtime_config" not in data
    assert "extra" not in data
    assert LoraConfig.from_dict(data).to_dict() == config.to_dict()


def test_a_config_survives_peft(peft):
    config = LoraConfig(**RICH)
    theirs = config.to_peft()

    assert isinstance(theirs, peft.LoraConfig)
    assert theirs.target_modules == {"q_proj", "v_proj"}
    assert theirs.eva_config == peft.EvaConfig(rho=1.5, tau=0.9)
    back = LoraConfig.from_peft(theirs)
    assert {**back.to_dict(), "peft_version": None} == {
        **theirs.to_dict(),
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": sorted(theirs.exclude_modules),
        "layer_replication": [[0, 2], [1, 2]],
        "peft_version": None,
    }


def test_what_peft_saved_can_be_read(peft, tmp_path):
    theirs = peft.LoraConfig(**{**RICH, "eva_config": peft.EvaConfig(rho=1.5)})
    theirs.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "adapter_config.json").read_text())

    config = LoraConfig.from_dict(data)

    assert config.eva_config == EvaConfig(rho=1.5)
    assert config.extra["peft_version"] == peft.__version__
    assert {**config.to_dict(), "target_modules": 0, "exclude_modules": 0} == {
        **data,
        "target_modules": 0,
        "exclude_modules": 0,
    }


def test_peft_reads_what_we_write(peft, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LoraConfig(**RICH).to_dict()))
    assert peft.LoraConfig.from_pretrained(tmp_path).rank_pattern == RICH["rank_pattern"]


@pytest.mark.parametrize("method", ["corda", "loftq", "lora_ga", "pissa_niter_4", "orthogonal", True, False])
def test_starts_that_peft_has_stay(peft, method):
    theirs = LoraConfig(init_lora_weights=method).to_peft()
    assert theirs.init_lora_weights == method
    assert LoraConfig.from_peft(theirs).to_dict()["loftq_config"] == theirs.to_dict()["loftq_config"]


@pytest.mark.parametrize("method", OURS_ONLY)
def test_starts_that_peft_lacks_become_its_own(peft, method):
    assert LoraConfig(init_lora_weights=method).to_peft().init_lora_weights is True


def test_to_peft_leaves_out_configs_without_effect(peft):
    with pytest.warns(UserWarning, match="eva_config has no effect"):
        config = LoraConfig(init_lora_weights="corda", eva_config=EvaConfig())
    theirs = config.to_peft()  # without a warning, hence without the defect
    assert theirs.eva_config is None
    assert theirs.corda_config == peft.tuners.lora.config.CordaConfig()


def test_wildcards_become_a_regular_expression_for_peft(peft):
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(target_modules=["*.layers.0.*.q_proj", "v_proj"], exclude_modules=["layers.1.*"]).to_peft()
    matched = {
        f"model.layers.{i}.self_attn.{name}"
        for i in range(3)
        for name in ("q_proj", "k_proj", "v_proj")
        if check_target_module_exists(theirs, f"model.layers.{i}.self_attn.{name}")
    }
    assert matched == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.2.self_attn.v_proj",
    }
    with pytest.raises(ConfigError, match="holds wildcards"):
        LoraConfig(target_modules=["*.q_proj"], layers_to_transform=[0]).to_peft()


def test_to_peft_without_peft_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"smartinit\[peft\]"):
        LoraConfig().to_peft()


@pytest.mark.parametrize(
    "options",
    [
        {"use_qalora": True},
        {"alora_invocation_tokens": [1, 2]},
        {"velora_config": {}},
        {"kasa_config": {}},
        {"arrow_config": {}},
        {"monteclora_config": {}},
        {"use_bdlora": {}},
    ],
)
def test_options_that_make_another_layer_are_refused(peft, options):
    (name,) = options
    from peft.tuners.lora import config as classes

    kinds = {"use_bdlora": "BdLoraConfig"} | {
        f"{kind.lower()}_config": f"{kind}Config" for kind in ("Velora", "Kasa", "Arrow", "Monteclora")
    }
    value = getattr(classes, kinds[name])() if name in kinds else options[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remark that aLoRA wants a task type
        theirs = peft.LoraConfig(**{name: value})
    for make in (lambda: LoraConfig.from_peft(theirs), lambda: LoraConfig.from_dict({name: value})):
        with pytest.raises(ConfigError, match=f"{name}=.* not supported here"):
            make()


def test_another_kind_of_adapter_is_refused(peft):
    with pytest.raises(ConfigError, match="'ADALORA'"):
        LoraConfig.from_peft(peft.AdaLoraConfig(total_step=1))
    with pytest.raises(ConfigError, match="'IA3'"):
        LoraConfig.from_any(peft.IA3Config())


def test_keys_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"'lora_aplha' is no option of a LoRA config; closest: 'lora_alpha'"):
        LoraConfig.from_dict({"lora_aplha": 4})
    with pytest.warns(UserWarning, match="brand_new=True in a saved LoRA config"):
        config = LoraConfig.from_dict({"peft_type": "LORA", "brand_new": True, "brand_new_config": None})
    assert config.to_dict()["brand_new"] is True


def test_from_any_takes_all_three_and_writes_to_none(peft):
    theirs = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="eva", eva_config=peft.EvaConfig())
    ours = LoraConfig(target_modules=["q_proj"], init_lora_weights="eva")
    before = theirs.to_dict()
    for given in (theirs, ours, {"target_modules": ["q_proj"], "init_lora_weights": "eva"}):
        config = LoraConfig.from_any(given)
        assert config is not given
        assert (config.target_modules, config.eva_config) == ({"q_proj"}, EvaConfig())
        config.target_modules.add("v_proj")
        config.eva_config.rho = 1.0
    assert theirs.to_dict() == before
    assert (ours.target_modules, ours.eva_config.rho) == ({"q_proj"}, 2.0)
    with pytest.raises(ArgumentError, match="the config is a list"):
        LoraConfig.from_any([1])


def test_from_any_checks_what_was_assigned_and_warns_no_second_time():
    with pytest.warns(UserWarning, match="eva_config has no effect"):
        config = LoraConfig(eva_config=EvaConfig())
    assert LoraConfig.from_any(config) == config
    config.init_lora_weights = "corda"
    assert LoraConfig.from_any(config).corda_config == CordaConfig()
    config.eva_config.rho = 0.5
    with pytest.raises(ConfigError, match=r"rho=0\.5"):
        LoraConfig.from_any(config)
    config.eva_config = None
    config.r = 0
    with pytest.raises(ConfigError, match="r=0"):
        LoraConfig.from_any(config)
