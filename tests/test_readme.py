"""The README's table from paper to code: what it names is there, and says where it comes from."""

import ast
import dataclasses
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

from train import TrainConfig

ROOT = Path(__file__).parent.parent
MODULES = ["train", "probe", "critic", "evaluate", "model"]  # where names without a module are looked for
SOURCE = re.compile(r"arXiv \d{4}\.\d{5}|authors' code")
OPTIONS = {option.name: option for option in dataclasses.fields(TrainConfig)}


def table() -> list[tuple[str, list[str]]]:
    """(what the paper calls it, [all that is in backticks beside it]) of each row of the README's table."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = lines.index("| paper | here |") + 2
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            return rows
        paper, here = line.strip("|").split(" | ")
        rows.append((paper.strip(), re.findall(r"`([^`]+)`", here)))


def resolve(name: str, before=None):
    """(module, object) of a dotted name: `train.blend`, `lib/report.summarize`, `Probe.risk`, or a neighbour of `before`'s module."""
    first, *rest = name.split(".")
    path = first.replace("/", ".")
    if (ROOT / f"{first}.py").exists():
        found, candidates = rest, [importlib.import_module(path)]
    else:
        found, candidates = [first, *rest], [before] if before else [importlib.import_module(module) for module in MODULES]
    for module in candidates:
        target = module
        for part in found:
            target = getattr(target, part, None)
        if target is not None and inspect.getmodule(target) in (module, None):  # where it is defined, not where it is imported
            return module, target
    raise AssertionError(f"README.md names {name}, which is nowhere")


def choices(option) -> tuple:
    return typing.get_args(option.type) if typing.get_origin(option.type) is typing.Literal else ()


def check_option(text: str):
    """`--gate batch --ema λ`: options there are, with values that they take; → the last one."""
    for name, value in re.findall(r"--([\w-]+)(?: ([^\s-]\S*))?", text):
        option = OPTIONS[name.replace("-", "_")]
        assert not choices(option) or value in choices(option), text
    return option


CELLS = [(paper, name) for paper, names in table() for name in names]


def test_the_table_is_the_one_that_is_meant():
    assert len(table()) >= 9 and len(CELLS) >= 20 and {"train.token_kl", "Transformer.adapters_off", "--method filter"} <= {n for _, n in CELLS}


@pytest.mark.parametrize("paper, names", table(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_it_names_exists_and_tells_its_source(paper, names):
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
            own = (inspect.getdoc(target) or "") + (inspect.getdoc(module) or "")
            if isinstance(target, type(lambda: 0)) or inspect.isclass(target):
                assert target.__doc__, f"{name} has no docstring"
            assert SOURCE.search(own), f"neither {name} nor {module.__name__} names a source: an arXiv number, or the authors' code"


def test_a_name_that_is_nowhere_or_a_choice_that_is_none_is_noticed():
    for wrong in ("train.token_kl2", "Probe.rsk", "lib/report.summarise", "nowhere"):
        with pytest.raises(AssertionError, match="which is nowhere"):
            resolve(wrong)
    for wrong in ("--method magic", "--no-such-option"):
        with pytest.raises((AssertionError, KeyError)):
            check_option(wrong)
