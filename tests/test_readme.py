"""README.md: the names in its table exist and give their source, and its commands have options that there are."""

import ast
import dataclasses
import importlib
import inspect
import re
import shlex
import sys
import typing
from pathlib import Path

import pytest

from critic import CriticConfig
from data.build import BuildConfig
from data.public import PublicConfig
from evaluate import EvalConfig
from lib.cli import parse
from probe import ProbeConfig
from train import TrainConfig

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from grid import GridConfig  # noqa: E402

MODULES = ["train", "probe", "critic", "evaluate", "model"]  # where names without a module are looked for
SOURCE = re.compile(r"arXiv \d{4}\.\d{5}|authors' code")
OPTIONS = {option.name: option for option in dataclasses.fields(TrainConfig)}
CONFIGS = {"train.py": TrainConfig, "probe.py": ProbeConfig, "critic.py": CriticConfig, "evaluate.py": EvalConfig,
           "data/public.py": PublicConfig, "data/build.py": BuildConfig, "tests/grid.py": GridConfig}


def table() -> list[tuple[str, list[str]]]:
    """(term of the paper, [all names in backticks]) of each row of the README's table."""
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = []
    for line in lines[lines.index("| paper | here |") + 2 :]:
        if not line.startswith("|"):
            return rows
        paper, here = line.strip("|").split(" | ")
        rows.append((paper.strip(), re.findall(r"`([^`]+)`", here)))


def resolve(name: str, before=None):
    """(module, object) of a dotted name: `train.blend`, `lib/report.summarize`, `Probe.risk`, or a neighbour of `before`'s module."""
    first, *rest = name.split(".")
    if (ROOT / f"{first}.py").exists():
        parts, candidates = rest, [importlib.import_module(first.replace("/", "."))]
    else:
        parts, candidates = [first, *rest], [before] if before else [importlib.import_module(module) for module in MODULES]
    for module in candidates:
        target = module
        for part in parts:
            target = getattr(target, part, None)
        if target is not None and inspect.getmodule(target) in (module, None):  # where it is defined, not where it is imported
            return module, target
    raise AssertionError(f"README.md names {name}, which is nowhere")


def choices(option) -> tuple:
    return typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else ()


def check_option(text: str):
    """Check `--gate batch --ema λ`: options of train.py with values that they take. Returns the last one."""
    for name, value in re.findall(r"--([\w-]+)(?: ([^\s-]\S*))?", text):
        option = OPTIONS[name.replace("-", "_")]
        assert not choices(option) or value in choices(option), text
    return option


@pytest.mark.parametrize("paper, names", table(), ids=lambda value: value if isinstance(value, str) else "")
def test_names_in_the_table_exist_and_give_their_source(paper, names):
    module = option = None
    for name in names:
        if name.startswith("--"):
            module, option = None, check_option(name)
        elif name.endswith(".py"):
            assert (ROOT / name).is_file() and ast.get_docstring(ast.parse((ROOT / name).read_text())), name
        elif option and "." not in name:  # another choice of the option before it
            assert name in choices(option), f"--{option.name} {name}"
        else:
            module, target = resolve(name, module if "." not in name else None)
            documented = (inspect.getdoc(target) or "") + (inspect.getdoc(module) or "")
            assert inspect.getdoc(target), f"{name} has no docstring"
            assert SOURCE.search(documented), f"neither {name} nor {module.__name__} names a source: an arXiv number, or the authors' code"


def test_a_wrong_name_or_choice_would_be_noticed():
    assert len(table()) >= 9 and {"train.token_kl", "Transformer.adapters_off", "--method filter"} <= {n for _, names in table() for n in names}
    for wrong in ("train.token_kl2", "Probe.rsk", "lib/report.summarise", "nowhere"):
        with pytest.raises(AssertionError, match="which is nowhere"):
            resolve(wrong)
    for wrong in ("--method magic", "--no-such-option"):
        with pytest.raises((AssertionError, KeyError)):
            check_option(wrong)


def commands(page: str) -> list[tuple[str, str]]:
    """(script, arguments) of each command in a page's indented blocks."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    return re.findall(r"^    .*?(train\.py|probe\.py|critic\.py|evaluate\.py|data/public\.py|data/build\.py|tests/grid\.py)\b([^#;\n]*)", text, re.M)


@pytest.mark.parametrize("page", ["README.md", "data/results/README.md"])
def test_every_option_that_a_page_names_exists(page):
    assert len(commands(page)) >= 8
    for script, arguments in commands(page):
        arguments = re.sub(r"\$(\w+)", lambda match: {"family": "qwen2"}.get(match[1], "1"), arguments)  # of a shell's loop
        words = [word for word in shlex.split(arguments) if word != "…"]
        parse(CONFIGS[script], words, "paths" if script == "evaluate.py" else None)
    names = {option.name for config in CONFIGS.values() for option in dataclasses.fields(config)}
    known = {"--nproc_per_node", "--device", "--resume"}
    for name in re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / page).read_text()):
        assert name in known or name[2:].replace("-", "_").removeprefix("no_") in names, name


def test_every_file_that_the_readme_names_exists():
    for page in ("README.md", "data/results/README.md"):
        for name in re.findall(r"`((?:lib|data|tests)/[\w/.]+\.(?:py|txt|json|md))`", (ROOT / page).read_text()):
            assert (ROOT / name).exists(), f"{page}: {name}"
