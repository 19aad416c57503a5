"""Estimate risk before generation: a logistic probe on the aligned model's hidden states.

    python probe.py                                             # the embedded model and probe data
    python probe.py --model DIR --data FILE --out FILE          # FILE: prompts with "harmful": true | false
    python probe.py --model DIR --probe FILE --score data.jsonl # the risk of your data, before you train on it

x (H,)   = mean over all layers of the residual stream at the last prompt token
s        = σ( w · (x − mean) / std + b ) ∈ [0, 1]               the risk of the prompt (arXiv 2602.17546)
w, b     = argmin  Σ_i log-loss_i + (l2 / 2) ‖w‖²               solved to convergence in float64

It is fitted on four fifths of the data. Every figure is of the last fifth, the test split, or of other files.
"""

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from data.chat import Chat, batches_by_length, encode_examples, encode_prompts, pad_left
from data.conversations import (WORLD, Conversation, group_of, is_embedded, read_conversations,
                                split_by_prompt)
from lib.checkpoint import fingerprint
from lib.cli import comma_list, printable, progress_bar, run
from lib.distributed import on_rank_zero
from lib.files import COUNT, DataError, atomic_write, either, expect, expect_file, parse_json, write_jsonl
from lib.report import probe_report, risk_metrics
from lib.risk import UNKNOWN, print_risk
from model import Transformer, load_model, working_dtype

WEAK_AUROC = 0.8  # training with a probe below it is refused: the gate would miss what the probe misses
L2 = 1.0  # weight of ‖w‖²/2 against the summed log-loss
BATCH_SIZE = 32  # prompts per forward pass
TENSORS = ("weight", "bias", "mean", "std")  # of a Probe


@dataclass(frozen=True)
class ProbeConfig:
    """Fit a logistic risk probe on activations; report how well it separates harmful from benign prompts."""

    model: Path = WORLD / "model"  # folder of the reference (aligned) model
    data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true | false, optionally "source"
    held_out: str | None = None  # files to report on only, comma-separated (default: embedded ones)
    out: Path | None = None  # file to write (default: probe.safetensors; with --score: NAME.risk.jsonl)
    score: Path | None = None  # conversations to rate instead of fitting; the file written is for --risk
    probe: Path | None = None  # with --score: the probe that rates them, as written by this script
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the model runs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on CUDA
    seed: int = 0  # of the split into 80 % to fit on and 20 % to test on


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what its features depend on. `weight`, `mean`, `std` (H,), `bias` (): float64."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    model: str  # fingerprint of the checkpoint
    dtype: str  # that the model ran in
    template: str  # fingerprint of tokenizer and chat template

    def risk(self, features: torch.Tensor) -> torch.Tensor:
        """Return σ(w·(x − mean)/std + b): (N, H) → (N,) in [0, 1]. Not finite counts as 1, and is printed."""
        logit = (features.double() - self.mean) / self.std @ self.weight + self.bias
        if unknown := int((~logit.isfinite()).sum()):
            print(f"{unknown} of {len(logit)} risks are unknown (activations not finite): taken as 1")
        return torch.where(logit.isfinite(), torch.sigmoid(logit), UNKNOWN)


# ---------------------------------------------------------------- features


@torch.no_grad()
def prompt_features(model: Transformer, prompts: list[list[int]], batch_size: int = BATCH_SIZE,
                    desc: str = "") -> torch.Tensor:
    """Return the residual stream at the last token of N token-id prompts: (N, L + 1, H), float32, CPU.

    Layer 0 is the embeddings. Each layer is reduced as it is computed: (L + 1, B, T, H) never exists.
    """
    features = torch.empty(len(prompts), model.config.num_hidden_layers + 1, model.config.hidden_size)
    batches = batches_by_length([len(ids) for ids in prompts], batch_size)
    for batch in progress_bar(batches, desc, disable=not desc):
        input_ids, real = pad_left([prompts[i] for i in batch], model.device)
        _, states = model.model(input_ids, real, pool=lambda hidden: hidden[:, -1].float())
        features[batch] = torch.stack(states, 1).cpu()
    return features


def conversation_risk(probe: Probe, model: Transformer, prompts: list[list[list[int]]],
                      batch_size: int = BATCH_SIZE) -> torch.Tensor:
    """Return the risk (N,) in [0, 1] of N conversations: that of the riskiest of its token-id prompts."""
    features = prompt_features(model, sum(prompts, []), batch_size, "risk of each example")
    risk = probe.risk(features.mean(1))
    sizes = [len(turns) for turns in prompts]
    return torch.stack([of_turns.max() for of_turns in risk.split(sizes)])


# ---------------------------------------------------------------- logistic regression


def fit_logistic(x: torch.Tensor, y: torch.Tensor, l2: float, tolerance: float = 1e-6) -> tuple:
    """Minimise Σ log-loss + (l2/2)‖w‖², x (N, H) standardised, y (N,) in {0, 1} → (weight, bias, mean, std).

    L-BFGS in float64 from zero. The objective is strictly convex in w, hence one solution; the bias is free.
    Raises DataError for l2 ≤ 0, a single class, or a mean gradient that stays above `tolerance`.
    """
    if l2 <= 0 or y.min() == y.max():
        raise DataError(f"logistic regression: expected l2 > 0 and both classes, found l2 = {l2}, "
                        f"{int(y.sum())} harmful of {len(y)}")
    x = x.double()
    y = y.double()
    mean = x.mean(0)
    std = x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature carries nothing
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=5000, tolerance_grad=tolerance / 10,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y)
        loss = loss + l2 / (2 * len(y)) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    gradient = torch.cat((weight.grad, bias.grad[None])).abs().max().item()
    if not gradient < tolerance:
        raise DataError(f"logistic regression: expected a gradient under {tolerance:g}, found {gradient:.1e}")
    return weight.detach(), bias.detach(), mean, std


def held_out_prompts(files: list[str],
                     fitted_on: list[Conversation]) -> dict[str, list[Conversation]]:
    """Return {"held out: NAME": the conversations of each file whose prompts are not among `fitted_on`}."""
    known = {group_of(c) for c in fitted_on}
    sets = {}
    for file in files:
        name = f"held out: {Path(file).stem}"
        rows = read_conversations(file, need="harmful")
        new = [c for c in rows if group_of(c) not in known]
        if len(new) < len(rows):
            print(f"{file}: {len(rows) - len(new)} of {len(rows)} prompts are in the probe's data: left out")
        if not new or name in sets:
            raise DataError(f"--held-out: expected files of different names with prompts that the probe data "
                            f"lacks, found {file}")
        sets[name] = new
    return sets


def fit_probe(model: Transformer, chat: Chat, data: Path, held_out: str | None = None,
              seed: int = 0) -> tuple[Probe, dict]:
    """Fit a probe on four fifths of `data`; report on the others, the test split, and on held-out files.

    held_out: comma-separated files; None: the embedded ones, for embedded data. A set with a single class is
    compared with the other class of the test split. Returns (probe, report).
    """
    if held_out is None and is_embedded(data):
        held_out = f"{WORLD / 'probe_withheld.jsonl'},{WORLD / 'probe_lookalike.jsonl'}"
    fitted_on, test = split_by_prompt(read_conversations(data, need="harmful"), seed)
    sets = {"fit": fitted_on, "test": test} | held_out_prompts(comma_list(held_out), fitted_on + test)
    prompts = encode_prompts(chat, sum(sets.values(), []), model.config.max_position_embeddings)
    features = prompt_features(model, prompts, desc="activations for the probe").mean(1)
    sizes = {name: len(conversations) for name, conversations in sets.items()}
    x = dict(zip(sets, features.split(list(sizes.values()))))
    y = {}
    groups = {}
    for name, conversations in sets.items():
        harmful = [c.meta["harmful"] for c in conversations]
        y[name] = torch.tensor(harmful, dtype=torch.float64)
        groups[name] = len({group_of(c) for c in conversations})
    fitted = fit_logistic(x["fit"], y["fit"], L2)
    probe = Probe(*fitted, **depends_on(model, chat))

    report = {"data": str(data), "n": sizes, "groups": groups}
    risk = {name: probe.risk(rows) for name, rows in x.items() if name != "fit"}
    by_source = defaultdict(list)
    for name in risk:
        has_one_class = y[name].min() == y[name].max()
        other = has_one_class & (y["test"] != y[name][0])
        risks = torch.cat((risk[name], risk["test"][other]))
        labels = torch.cat((y[name], y["test"][other]))
        report[name] = risk_metrics(risks, labels)
        for conversation, s in zip(sets[name], risk[name].tolist()):
            label = "harmful" if conversation.meta["harmful"] else "benign"
            source = conversation.meta.get("source", label)
            by_source[f"{name}: {source}"].append(s)
    means = {}
    for source, s in sorted(by_source.items()):
        means[source] = [sum(s) / len(s), len(s)]
    report["mean_risk_by_source"] = means
    return probe, report


def expect_strong(report: dict, where) -> None:
    """Print a probe's held-out AUROC. Raises DataError, naming `where`, if it is below WEAK_AUROC or NaN."""
    test = report["test"]
    n = test["n_harmful"] + test["n_benign"]
    print(f"probe: AUROC {test['auroc']:.3f} on {n} held-out prompts")
    if not test["auroc"] >= WEAK_AUROC:
        raise DataError(f"{where}: expected a probe with a held-out AUROC of at least {WEAK_AUROC}, found "
                        f"{test['auroc']:.3f}; improve the probe data, or give your own risks: --risk FILE")


# ---------------------------------------------------------------- files


def depends_on(model: Transformer, chat: Chat) -> dict[str, str | None]:
    """Return what features depend on: checkpoint, dtype, template with tokenizer."""
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return {"model": fingerprint(model.path), "dtype": dtype, "template": chat.fingerprint}


def save_probe(probe: Probe, report: dict, path) -> None:
    """Write the probe, what it depends on and its report as one safetensors file, atomically."""
    values = vars(probe) | {"report": report}
    tensors = {name: values.pop(name) for name in TENSORS}
    with atomic_write(Path(path)) as part:
        save_file(tensors, part, {"probe": json.dumps(values)})  # several keys would be written in any order


def load_probe(path, model: Transformer, chat: Chat) -> tuple[Probe, dict]:
    """Read (probe, report) of a file. Raises DataError if it is damaged or was fitted on something else."""
    try:
        with safe_open(expect_file(path), framework="pt") as file:
            values = parse_json(file.metadata()["probe"])
            tensors = {name: file.get_tensor(name) for name in TENSORS}
        report = values.pop("report")
        probe = Probe(**tensors, **values)
        probe.risk(torch.zeros(1, model.config.hidden_size)).item()  # are the shapes the model's?
        rules = {"auroc": either(int, float), "n_harmful": COUNT, "n_benign": COUNT}
        expect(report["test"], rules, "test")
    except Exception as error:
        raise DataError(f"{path}: expected a probe written by probe.py, found {str(error)[:300]}") from None
    for key, here in depends_on(model, chat).items():
        if (there := getattr(probe, key)) != here:
            option = f", or --{key} {there}" if key == "dtype" else ""
            raise DataError(f"{path}: expected a probe fitted with {key} {str(here)[:12]}, found one fitted "
                            f"with {str(there)[:12]}; fit it again{option}")
    return probe, report


def load_or_fit(file: Path | None, data: Path, model: Transformer, chat: Chat,
                save_to: Path) -> Probe:
    """Return the probe of a file, or fit one on `data` and save it. Raises DataError for a weak probe."""
    if file:
        probe, report = load_probe(file, model, chat)
    else:
        if is_embedded(data) and not is_embedded(model.path):
            print("the probe is fitted on the embedded prompts; your own (--probe-data FILE) teach it more")
        probe, report = fit_probe(model, chat, data)
    expect_strong(report, file or data)
    if not file:
        on_rank_zero(lambda: save_probe(probe, report, save_to))
    return probe


def score_file(probe: Probe, model: Transformer, chat: Chat, data: Path) -> list[dict]:
    """Print the risk of conversations by source, a histogram and the riskiest. Returns rows for --risk."""
    conversations = read_conversations(data, need="answer")
    examples = encode_examples(chat, conversations, model.config.max_position_embeddings)
    risk = conversation_risk(probe, model, [example.prompts for example in examples])
    print_risk(risk, [example.training_text for example in examples])
    counts = torch.histc(risk, bins=10, min=0, max=1).int().tolist()
    for i, count in enumerate(counts):
        bar = "#" * math.ceil(60 * count / max(counts))
        print(f"  {i / 10:.1f} to {(i + 1) / 10:.1f}  {count:>7}  {bar}")
    print(f"the riskiest of {len(examples)} conversations:")
    for i in risk.argsort(descending=True)[:20].tolist():
        message = examples[i].training_text.prompts[-1][-1]
        prompt = " ".join(message["content"].split())
        print(printable(f"  {risk[i]:.3f}  {examples[i].conversation.where}  {prompt[:60]}"))
    return [{"risk": s, "hash": example.training_text.hash, "where": example.conversation.where}
            for s, example in zip(risk.tolist(), examples)]


def main(config: ProbeConfig) -> None:
    """Fit, report and save a probe; or rate conversations with one."""
    if bool(config.score) != bool(config.probe):
        raise DataError(f"expected --probe together with --score, found one of them; type python probe.py "
                        f"--probe {config.probe or 'PROBE'} --score {config.score or 'DATA'}")
    default = config.score.with_suffix(".risk.jsonl") if config.score else Path("probe.safetensors")
    out = config.out or default
    if out.is_dir() or config.score and out.exists():
        raise DataError(f"--out: expected a new file, found {out}; remove it, or type --out OTHER")
    chat = Chat(config.model)
    model = load_model(config.model, config.device, working_dtype(config.device, config.dtype))
    if config.score:
        probe, report = load_probe(config.probe, model, chat)
        expect_strong(report, config.probe)
        write_jsonl(out, score_file(probe, model, chat, config.score))
    else:
        probe, report = fit_probe(model, chat, config.data, config.held_out, config.seed)
        print(probe_report(report))
        save_probe(probe, report, out)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    run(main, ProbeConfig)
