"""The README and the pages in docs/: what they show is what happens, and nothing is left out."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import click
import pytest

from smartinit.cli.verbs import VERBS, group

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TOP = group.make_context("smartinit", [], resilient_parsing=True)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands():
    """Every command line of the README, as arguments."""
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    return [shlex.split(line, comments=True) for line in lines]


def block_with(text):
    return next(block for block in blocks("python") if text in block)


def demo_output():
    return README.partition("<!-- begin demo -->\n")[2].partition("<!-- end demo -->")[0]


@pytest.fixture(scope="module")
def generator():
    path = ROOT / "scripts" / "make_readme_tables.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_up_to_date(generator, capsys):
    assert generator.main(["--check"]) == 0, f"{capsys.readouterr().out}run scripts/make_readme_tables.py"


def test_the_check_notices_what_is_out_of_date(generator, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/eva.md", "docs/methods.md", "docs/cli.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    assert generator.main(["--check"]) == 0
    changed = README.replace("| 130 | interrupted |", "| 131 | interrupted |")
    assert changed != README
    (tmp_path / "README.md").write_text(changed)
    assert generator.main(["--check"]) == 1
    assert capsys.readouterr().out == "README.md is out of date\n"
    assert (tmp_path / "README.md").read_text() == changed, "--check writes nothing"
    assert generator.main([]) == 0
    assert (tmp_path / "README.md").read_text() == README
    (tmp_path / "README.md").write_text(README.replace("<!-- end methods -->", ""))
    with pytest.raises(ValueError, match="end methods"):
        generator.main(["--check"])


def test_a_session_stands_in_the_first_35_lines():
    first = "\n".join(README.splitlines()[:35])
    assert "$ scripts/demo" in first
    assert "$ scripts/test" in first
    assert f"<!-- begin demo -->\n{demo_output()}<!-- end demo -->" in first
    assert len(demo_output().splitlines()) > 10


def test_it_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 245  # with a line for every method


def test_commands_name_verbs_and_options_that_exist():
    own = [words for words in commands() if words[0] == "smartinit"]
    assert {words[1] for words in own} >= {"compute", "plan", "inspect", "doctor"}
    for words in own:
        verb = group.get_command(TOP, words[1])
        assert verb is not None, words
        verb.make_context(words[1], words[2:])  # raises for an option, a value or an argument that cannot be


def test_scripts_that_are_named_exist():
    named = {words[0] for words in commands() if "/" in words[0]}
    assert named == {"scripts/demo", "scripts/test"}
    assert all(os.access(ROOT / name, os.X_OK) for name in named)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_documented(verb):
    page = (ROOT / "docs" / "cli.md").read_text().partition(f"\n## {verb}\n")[2].partition("\n## ")[0]
    assert f"$ smartinit {verb} --help" in page
    for parameter in group.get_command(TOP, verb).params:
        if isinstance(parameter, click.Option):
            for name in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(?<!\S){re.escape(name)}(?!\S)", page), name
        else:
            assert parameter.human_readable_name in page


def test_every_method_and_every_column_is_listed():
    from smartinit.data import columns
    from smartinit.methods import available_methods

    for name, method in available_methods().items():
        assert f"| `{name}` | {method.summary} |" in README
    for choice in (*columns._CAUSAL, *columns._ENCODER):
        for name in (*choice.first, choice.second):
            assert name is None or f"`{name}`" in README, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_speak_of_this_project_alone(page):
    text = page.read_text()
    for word in ("/work", "shared/", "TODO"):
        assert word not in text, word


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_named_tests_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"
        assert (ROOT / path).is_file()


def test_the_figure_is_small_and_the_package_shows_the_readme():
    figure = ROOT / "docs" / "demo-figure.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 150_000
    assert "(docs/demo-figure.png)" in README
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text()


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def numbers(line):
    return [float(text.replace(",", "")) for text in NUMBER.findall(line)]


def stable(line):
    """Without what the clock says, and without what hangs on single ranks or on whether a cosine reaches ``tau``."""
    if line.startswith("seconds:"):
        return "seconds"
    return re.sub(r" \([\d,]+ per second\)|[\d.]+k adapter| +\d/\d$", "", line)


def test_the_demo_prints_what_the_readme_shows(tmp_path, monkeypatch, capfd, demo_model_folder):
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    from smartinit.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--quiet"]) == 0
    shown = demo_output().splitlines()[2:-1]
    printed = capfd.readouterr().out.rstrip().splitlines()
    assert len(printed) == len(shown)
    for was, now in zip(map(stable, shown), map(stable, printed), strict=True):
        assert NUMBER.sub("", now).split() == NUMBER.sub("", was).split()
        # Ranks and shares of a layer may differ a little on another machine; the totals may not.
        within = 1 if "%" in was else 0
        assert numbers(now) == pytest.approx(numbers(was), abs=within), (
            f"{now}: run scripts/make_readme_tables.py --run"
        )
    config = json.loads((tmp_path / "demo-output" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM", "Unsloth loads no folder without it"


@pytest.mark.parametrize("block", blocks("python"), ids=lambda text: text.split()[1])
def test_python_blocks_are_short_and_parse(block):
    ast.parse(block)
    assert len(block.splitlines()) <= 8


def test_trainers_take_five_lines_at_most():
    section = README.partition("## Using the folder")[2].partition("\n## ")[0]
    found = re.findall(r"^```\w+\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert len(found) == 6
    assert all(len(text.splitlines()) <= 5 for text in found)


@pytest.fixture
def namespace(tiny_llama, tmp_path, monkeypatch):
    """What the README's Python takes for granted; ``adapter/`` lies in the current folder after the last block."""
    pytest.importorskip("peft")
    import torch

    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 64, (6, 4, 16), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids]
    return {"base_model": tiny_llama(), "dataloader": batches}


def run(text, namespace):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's and transformers' about each other
        exec(compile(block_with(text), "README.md", "exec"), namespace)  # noqa: S102 - that is the test


def test_the_functions_of_peft_run_as_shown(namespace):
    import torch

    run("get_eva_state_dict", namespace)
    for name, directions in namespace["state_dict"].items():
        layer = namespace["model"].get_submodule(name)
        if len(directions):
            assert torch.equal(layer.lora_A["default"].weight, directions)


def test_the_artefact_runs_as_shown_and_peft_loads_it(namespace, tiny_llama):
    import torch

    before = {name: value.clone() for name, value in namespace["base_model"].state_dict().items()}
    run("si.compute", namespace)
    artefact = namespace["artefact"]
    assert all(torch.equal(value, tiny_llama().state_dict()[name]) for name, value in before.items())
    assert artefact.plan.total == 16 * len(artefact.plan.ranks)
    batch = namespace["dataloader"][0]
    namespace["base_model"] = tiny_llama()
    expected = tiny_llama()(**batch).logits
    assert torch.equal(namespace["model"](**batch).logits, expected)
    run("is_trainable=True", namespace)
    assert torch.equal(namespace["model"](**batch).logits, expected)
    assert any(parameter.requires_grad for parameter in namespace["model"].parameters())


@pytest.mark.filterwarnings("ignore")
def test_trl_trains_the_folder(namespace, tmp_path, monkeypatch, demo_model_folder):
    trl = pytest.importorskip("trl", reason="TRL is not among the test tools; install it to run this")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from smartinit.cli import main
    from smartinit.demo import data_file

    assert main(["demo", "--quiet", "--max-batches", "2", "--out", str(tmp_path)]) == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    namespace |= {
        "base_model": AutoModelForCausalLM.from_pretrained(demo_model_folder),
        "args": trl.SFTConfig("out", max_steps=2, report_to=[], save_strategy="no", bf16=False, use_cpu=True),
        "rows": datasets.Dataset.from_json(str(data_file()), cache_dir=str(tmp_path / "cache")).select(range(32)),
        "tokenizer": AutoTokenizer.from_pretrained(demo_model_folder),
    }
    run("is_trainable=True", namespace)
    trained = [(name, value) for name, value in namespace["model"].named_parameters() if value.requires_grad]
    before = [value.detach().clone() for _, value in trained]
    run("SFTTrainer", namespace)
    namespace["trainer"].train()
    assert all("lora_" in name for name, _ in trained)
    assert any((value != was).any() for (_, value), was in zip(trained, before, strict=True))
