from __future__ import annotations

import click
import pytest

from smartinit.cli.compute import command
from smartinit.cli.options import Count
from smartinit.cli.request import read_layers, read_modules, read_request
from smartinit.config import EvaConfig, LoraConfig
from smartinit.errors import ConfigError


def request(*arguments):
    needed = ["--model", "m", "--data", "d.jsonl", "--out", "o"]
    return read_request(command.make_context("compute", [*needed, *arguments]).params)


def test_defaults_are_those_of_the_configs():
    config = request().config
    assert config == LoraConfig(
        r=8, lora_alpha=8, init_lora_weights="eva", eva_config=EvaConfig(), base_model_name_or_path="m"
    )


def test_options_reach_the_config():
    found = request(
        *("--rank", "16", "--alpha", "32", "--rslora", "--rho", "1.5", "--tau", "0.9", "--whiten"),
        *("--no-adjust-scaling", "--no-label-mask", "--target-modules", "q_proj, v_proj", "--target-modules", "*_up"),
        *(
            "--exclude-modules",
            "lm_head",
            "--layers-to-transform",
            "0,2-4",
            "--budget",
            "2k",
            "--rank-multiple-of",
            "4",
        ),
        *("--min-rank", "4", "--max-rank", "32", "--planner", "uniform", "--max-batches", "3", "--batch-size", "2"),
        *("--prompt-column", "a", "--completion-column", "b", "--seed", "7"),
    )
    config = found.config
    assert (config.r, config.lora_alpha, config.use_rslora) == (16, 32, True)
    assert config.eva_config == EvaConfig(
        rho=1.5, tau=0.9, whiten=True, adjust_scaling_factors=False, use_label_mask=False
    )
    assert config.target_modules == {"q_proj", "v_proj", "*_up"}
    assert config.exclude_modules == {"lm_head"}
    assert config.layers_to_transform == [0, 2, 3, 4]
    assert found.planner_options() == {
        "planner": "uniform",
        "captured": None,
        "budget": 2000,
        "params": None,
        "rank_multiple_of": 4,
        "min_rank": 4,
        "max_rank": 32,
    }
    assert found.sampling.max_samples == 6, "rows beyond the last batch need no tokens"
    assert (found.sampling.columns.prompt, found.sampling.mask_prompt, found.sampling.seed) == ("a", False, 7)


def test_alpha_follows_the_rank():
    assert request("--rank", "32").config.lora_alpha == 32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((), None),
        (("q_proj",), ["q_proj"]),
        (("q_proj,v_proj", "o_proj"), ["q_proj", "v_proj", "o_proj"]),
        (("model.layers.*.q_proj",), ["model.layers.*.q_proj"]),
        (("all-linear",), "all-linear"),
        ((r".*\.(q|v)_proj",), r".*\.(q|v)_proj"),
        ((r"layers\.\d{1,2}\.mlp",), r"layers\.\d{1,2}\.mlp"),
    ],
)
def test_modules(given, expected):
    assert read_modules(given) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "--rank 0 cannot be: expected at least 1"),
        (["--rank", "-4"], "--rank -4 cannot be"),
        (["--method", "eav"], "unknown method 'eav'; known: .*closest: 'eva'"),
        (["--rho", "0.5"], "rho=0.5 cannot be"),
        (["--rho", "nan"], "rho=nan cannot be"),
        (["--tau", "1.5"], "tau=1.5 cannot be: expected a number from 0 to 1"),
        (["--tau", "-0.1"], "tau=-0.1 cannot be"),
        (["--alpha", "0"], "lora_alpha=0.0 cannot be"),
        (["--layers-to-transform", "a"], "'a' is no list of layers"),
        (["--target-modules", "(q", "--target-modules", "v"], "must stand alone"),
        (["--target-modules", "(q"], "not a regular expression"),
        (["--budget", "9", "--params", "9"], "not both"),
        (["--min-rank", "9", "--max-rank", "8"], "min_rank=9 is above max_rank=8"),
        (["--prompt-column", "a"], "give both"),
        (["--text-column", "a", "--messages-column", "b"], "give one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(arguments, message):
    with pytest.raises(ConfigError, match=message):
        request(*arguments)


def test_layers():
    assert read_layers("0, 4-6,2") == [0, 4, 5, 6, 2]


@pytest.mark.parametrize(
    ("text", "number"), [("20", 20), ("20k", 20_000), ("20M", 20_000_000), ("1.5G", 1_500_000_000), ("1_000", 1000)]
)
def test_counts(text, number):
    assert Count().convert(text, None, None) == number


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "0.0001k", "many", "k", "inf", "nan", ""])
def test_what_is_no_count(text):
    with pytest.raises(click.BadParameter):
        Count().convert(text, None, None)
