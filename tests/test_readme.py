"""README.md: the names in its table exist and give their source, its commands have options that there are, its snippet runs."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
import shlex
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import conftest
from critic import CriticConfig
from data.build import BuildConfig
from data.public import PublicConfig
from evaluate import EvalConfig
from lib.cli import parse
from probe import ProbeConfig
from train import TrainConfig, token_kl, token_nll

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


ROWS = {"aligned model": "aligned model", "plain fine-tuning": "sft", "the paper's setting": "adaptive-probe", "sealed": "sealed-anchors"}
COLUMNS = ("answered harmful greedy", "answered harmful T=1", "over-refusal lookalike", "task sentiment")


def test_the_first_table_has_the_committed_numbers():
    text = (ROOT / "README.md").read_text()
    vendor, results, small = (json.loads((ROOT / f"data/results/{name}.json").read_text()) for name in ("qwen", "smollm2", "smollm2-small"))
    figures = {row["name"]: row["figures"] for row in vendor["mixed_10"]}
    lines = re.split(r"\n(?=\| \| harmful prompts answered )", text)[1].split("\n\n")[0].splitlines()[2:]
    for line, (title, name) in zip(lines, ROWS.items(), strict=True):
        first, *cells = line.replace("*", "").strip("| ").split(" | ")
        assert first.startswith(title)
        assert cells == [f"{100 * figures[name][column]['rate']:.1f}" for column in COLUMNS], line
    widths, sizes = [], []
    for column in COLUMNS:
        shown = [figures[name][column] for name in ROWS.values()]
        widths.append(100 * max(abs(end - value["rate"]) for value in shown for end in value["ci95"]))
        sizes.append({value["n"] for value in shown})
    caption = " ".join(text.split())
    assert "the widest of each column: ±{:.1f}, ±{:.1f}, ±{:.1f} and ±{:.1f} points".format(*widths) in caption
    assert sizes == [{93}, {93}, {180}, {300}] and "31 AdvBench" in caption and "60 safe XSTest" in caption and "100 SST-2" in caption
    chosen = json.loads((ROOT / "data/results/qwen-chosen.json").read_text())
    assert len(chosen["eval_harmful"]["hashes"]) == 31

    def rate(attack, name, column="answered harmful T=1", results=results):
        return next(100 * row["figures"][column]["rate"] for row in results[attack] if row["name"] == name)

    for sentence, *rates in (
        ("with anchors but no gate {:.1f} % are answered, with the sealed gate alone {:.1f} %",
         *(rate("mixed_10", name, "answered harmful greedy", vendor) for name in ("sft-anchors", "sealed"))),
        ("after SST-2 alone plain fine-tuning answers {:.1f} %, the sealed gate {:.1f} %, each with anchors {:.1f} %.",
         *(rate("benign", name, "answered harmful greedy", vendor) for name in ("sft", "sealed", "sft-anchors"))),
        ("the sealed gate {:.1f} %, each with anchors {:.1f} %.",
         *(rate("benign", name, "answered harmful greedy", vendor) for name in ("sealed", "sealed-anchors"))),
        ("Of Alpaca's prompts, plain with anchors refuses {:.1f} %, sealed with anchors {:.1f} % ({:.1f} % before)",
         *(rate("benign", name, "over-refusal benign", vendor) for name in ("sft-anchors", "sealed-anchors", "aligned model"))),
        ("{:.1f} % answered ({:.1f} % sampled), {:.1f} % refused, task {:.1f}.",
         *(rate("mixed_10", "sbr", column, vendor) for column in COLUMNS)),
        ("On harmful data alone it answers {:.1f} %, sealed + anchors {:.1f} %.",
         *(rate("explicit", name, "answered harmful greedy", vendor) for name in ("sbr", "sealed-anchors"))),
        ("data with 1 % harm our aligned SmolLM2 answers {:.1f} % at T = 1, sealed with anchors", rate("mixed_1", "sealed-anchors", results=small)),
        ("it answers {:.1f} % after 10 % harm ({:.1f} % with a weight for each example)",
         *(rate(attack, "adaptive-probe", results=small) for attack in ("mixed_10, --gate batch --ema 0.5", "mixed_10"))),
        ("SmolLM2 answers {:.0f} % of two benchmarks ({:.1f} % before)",
         *(rate("identity", name, "answered harmful_other T=1") for name in ("sealed-anchors", "aligned model"))),
    ):
        assert sentence.format(*rates) in caption


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


class PeftLike:
    """This project's transformer with the methods of a model of peft that the snippet calls."""

    def __init__(self, path):
        policy = conftest.policy(path)
        self.named_parameters, self.disable_adapter = policy.named_parameters, policy.adapters_off
        self.get_output_embeddings = lambda: policy.lm_head
        decoder = lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=policy.model(input_ids, attention_mask)[0])
        self.get_base_model = lambda: SimpleNamespace(model=decoder)

    def __call__(self, **batch):
        return SimpleNamespace(logits=self.get_output_embeddings()(self.get_base_model().model(**batch).last_hidden_state))


def peft_model(path):
    """Return a model of transformers with adapters of peft that already do something."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    return peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).to(conftest.DEVICE)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # the latter ties its head
@pytest.mark.parametrize("make", [PeftLike, peft_model])
def test_the_loss_for_ones_own_trainer_as_printed(make, family):
    block = (ROOT / "README.md").read_text().split("## The loss in your own trainer")[1].split("\n    ", 1)[1].split("\n\nThe logits")[0]
    snippet = inspect.cleandoc("\n    " + block)
    assert len(snippet.splitlines()) <= 15
    exec(snippet, namespace := {})
    model, length, trained = make(ROOT / "tests/golden" / family), (5, 8, 7), (range(3, 5), range(1, 8), (2, 3, 6))
    input_ids = torch.randint(3, 96, (3, 8))
    labels = torch.full_like(input_ids, -100)
    for i in range(3):
        labels[i, list(trained[i])] = input_ids[i, list(trained[i])]
    mask = (torch.arange(8) < torch.tensor(length)[:, None]).long()
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "risk": torch.tensor([0.0, 1.0, 0.4])}
    batch = {key: value.to(conftest.DEVICE) for key, value in batch.items()}
    adapters = [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]
    loss = namespace["risk_weighted_loss"](model, batch)
    gradients = torch.autograd.grad(loss, adapters)

    expected = 0
    for i in range(3):  # each example alone, by the definition
        alone = {key: batch[key][i : i + 1, : length[i]] for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), model.disable_adapter():
            ref_logits = model(**alone).logits[0]
        logits = model(**alone).logits[0]
        before, y = [t - 1 for t in trained[i]], alone["input_ids"][0, list(trained[i])]
        beta = 0.02 + 0.98 * (0.0, 1.0, 0.4)[i]
        expected = expected + ((1 - beta) * token_nll(logits[before], y) + beta * token_kl(ref_logits[before], logits[before])).sum() / 12
    conftest.assert_near(loss.detach(), expected.detach())
    assert len(gradients) == 3 * 7 * 2
    for found, wanted in zip(gradients, torch.autograd.grad(expected, adapters)):
        conftest.assert_near(found, wanted)
