"""Risk from activations, before generation: a logistic probe on the reference model's hidden state at the last prompt token.

    python probe.py                                             # the embedded model and probe data
    python probe.py --model DIR --data FILE --out FILE          # FILE: prompts with "harmful": true | false

x (H,)   = mean over the chosen layers of the residual stream at the last prompt token (or of its mean over the prompt)
s        = σ( w · (x − mean) / std + b ) ∈ [0, 1]               the risk of the prompt
w, b     = argmin  Σ_i log-loss_i + (l2 / 2) ‖w‖²               solved to convergence in float64

The layer (`--layers auto`) is chosen on a validation split; every figure is of a test split that nothing was chosen on.
"""

import json
import math
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import WORLD, Chat, Conversation, DataError, batches_by_length, is_embedded, pad, read_conversations, split_by_prompt
from data.checkpoint import fingerprint
from data.cli import comma_list, require, run
from model import Transformer, load_model, working_dtype


@dataclass(frozen=True)
class ProbeConfig:
    """Fit a logistic risk probe on a model's activations and report how well it separates harmful from benign prompts."""

    model: Path = WORLD / "model"  # checkpoint folder of the reference (aligned) model
    data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true | false, and optionally "source"
    held_out: str | None = None  # files to report on only, comma-separated (default: the embedded ones, for the embedded data)
    out: Path = Path("probe.safetensors")  # file to write
    layers: str = "all"  # all (mean over layers, as in the paper), auto (the best one on the validation split), or i,j,…
    pooling: Literal["last", "mean"] = "last"  # over prompt tokens: the last one, or their mean
    l2: float = 1.0  # weight of ‖w‖²/2 against the summed log-loss
    batch_size: int = 32  # prompts per forward pass
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the model runs
    seed: int = 0  # of the 60/20/20 split into train, validation and test prompts


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what its features depend on. `weight`, `mean`, `std` (H,), `bias` (), all float64."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    layers: tuple
    pooling: str
    model: str  # fingerprint of the checkpoint
    dtype: str  # that the model ran in
    template: str  # fingerprint of tokenizer and chat template

    def risk(self, features: torch.Tensor) -> torch.Tensor:
        """σ(w·(x − mean)/std + b) for features (N, H) → (N,) in [0, 1]. A non-finite logit is unknown, hence risky: 1; it is reported."""
        logit = (features.double() - self.mean) / self.std @ self.weight + self.bias
        if unknown := int((~logit.isfinite()).sum()):
            print(f"{unknown} of {len(logit)} risks are unknown (activations that are not finite): taken as 1")
        return torch.where(logit.isfinite(), torch.sigmoid(logit), 1.0)


# ---------------------------------------------------------------- features


def pool_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """(B, T, H), left-padded → (B, H) float32: the last token's state, or the mean over real tokens."""
    if pooling == "last":
        return hidden[:, -1].float()
    mask = attention_mask[..., None].float()
    return (hidden.float() * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def prompt_features(model: Transformer, prompts: list[list[int]], layers, pooling: str, batch_size: int, desc: str = "") -> torch.Tensor:
    """Pooled residual stream (N, len(layers), H), float32 on the CPU, of token-id prompts; layer 0 is the embeddings.

    Each layer is pooled over tokens as it is computed: (layers, B, T, H) never exists. Batches hold prompts of similar length.
    """
    features = torch.empty(len(prompts), len(layers), model.config.hidden_size)
    for batch in tqdm(batches_by_length([len(ids) for ids in prompts], batch_size), desc=desc, disable=not desc):
        input_ids = pad([prompts[i] for i in batch], 0, "left", model.device)
        real = pad([[1] * len(prompts[i]) for i in batch], 0, "left", model.device)
        _, states = model.model(input_ids, real, layers=layers, pool=lambda hidden: pool_tokens(hidden, real, pooling))
        features[batch] = torch.stack(states, 1).cpu()
    return features


def conversation_risk(probe: Probe, model: Transformer, chat: Chat, conversations: list[Conversation], batch_size: int) -> torch.Tensor:
    """Risk (N,) in [0, 1] of each conversation: of its prompt, and with several assistant turns of the riskiest of their prompts."""
    prompts = [(i, chat.encode_prompt(messages, c.where)) for i, c in enumerate(conversations) for messages in c.prompts]
    features = prompt_features(model, [ids for _, ids in prompts], probe.layers, probe.pooling, batch_size, "risk of each example")
    risk = torch.zeros(len(conversations), dtype=torch.float64)
    owner = torch.tensor([i for i, _ in prompts])
    return risk.scatter_reduce(0, owner, probe.risk(features.mean(1)), "amax")


def print_risk(risk: torch.Tensor, conversations: list[Conversation]) -> None:
    """Mean risk by `source`, where the records have one: a probe that calls a whole benign task risky would keep it from being learned."""
    sources = [str(conversation.meta.get("source", "all examples")) for conversation in conversations]
    for source in sorted(set(sources)):
        values = risk[[s == source for s in sources]]
        print(f"  risk of {source}: mean {values.mean():.3f}, from {values.min():.3f} to {values.max():.3f} (n = {len(values)})")


# ---------------------------------------------------------------- logistic regression


def fit_logistic(x: torch.Tensor, y: torch.Tensor, l2: float, tolerance: float = 1e-6) -> tuple:
    """Minimise Σ log-loss + (l2/2)‖w‖² over standardised x (N, H), y (N,) in {0, 1}; the bias is free. → (weight, bias, mean, std).

    L-BFGS in float64 from zero: strictly convex, hence one solution, and deterministic. Raises DataError for l2 ≤ 0, a single class, or
    where the gradient (mean over examples) does not fall under `tolerance`.
    """
    if l2 <= 0 or y.min() == y.max():
        raise DataError(f"logistic regression: expected l2 > 0 and both classes, found l2 = {l2}, {int(y.sum())} harmful of {len(y)}")
    x, y = x.double(), y.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature carries nothing
    x = (x - mean) / std
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in (x.shape[1], ()))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=5000, tolerance_grad=tolerance / 10, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + l2 / (2 * len(y)) * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    gradient = max(weight.grad.abs().max(), bias.grad.abs()).item()
    if not gradient < tolerance:
        raise DataError(f"logistic regression did not converge: gradient {gradient:.1e}, expected under {tolerance:.0e}")
    return weight.detach(), bias.detach(), mean, std


def fit_probe(config: ProbeConfig, model: Transformer, chat: Chat) -> tuple[Probe, dict]:
    """Fit on train + validation what was chosen on validation; report on test and on the held-out files. → (probe, report)"""
    splits = split_by_prompt(read_conversations(config.data, need="harmful"), seed=config.seed)
    embedded = [str(WORLD / f"probe_{name}.jsonl") for name in ("withheld", "lookalike")] if is_embedded(config.data) else []
    files = embedded if config.held_out is None else comma_list(config.held_out)
    seen, held_out = {str(c.prompts[-1]) for split in splits for c in split}, {}
    for file in files:
        rows = read_conversations(file, need="harmful")
        new = [c for c in rows if str(c.prompts[-1]) not in seen]
        if len(new) < len(rows):
            print(f"{file}: {len(rows) - len(new)} of {len(rows)} prompts are in {config.data} too, and not counted as held out")
        if not new or f"held out: {Path(file).stem}" in held_out:
            raise DataError(f"--held-out: expected files of different names with prompts that {config.data} lacks, found {file}")
        held_out[f"held out: {Path(file).stem}"] = new
    groups = dict(zip(("train", "validation", "test"), splits)) | held_out
    layers = tuple(range(model.config.num_hidden_layers + 1))
    prompts = [chat.encode_prompt(c.prompts[-1], c.where) for group in groups.values() for c in group]
    x = prompt_features(model, prompts, layers, config.pooling, config.batch_size, "activations for the probe")
    y = torch.tensor([c.meta["harmful"] for group in groups.values() for c in group], dtype=torch.float64)
    sizes = [len(group) for group in groups.values()]
    x, y = dict(zip(groups, x.split(sizes))), dict(zip(groups, y.split(sizes)))

    origin = depends_on(model, chat)

    def probe_of(chosen, names):
        fitted = fit_logistic(torch.cat([x[name][:, chosen].mean(1) for name in names]), torch.cat([y[name] for name in names]), config.l2)
        return Probe(*fitted, tuple(chosen), config.pooling, *origin.values())

    per_layer = {}
    for layer in layers:
        probe = probe_of([layer], ["train"])
        per_layer[layer] = {name: auroc(probe.risk(x[name][:, layer]), y[name]) for name in ("validation", "test")}
    chosen = choose_layers(config.layers, {layer: row["validation"] for layer, row in per_layer.items()})
    probe = probe_of(chosen, ["train", "validation"])
    risk = {name: probe.risk(x[name][:, chosen].mean(1)) for name in groups}
    report = {"data": str(config.data), "n": dict(zip(groups, sizes)), "layers": list(chosen), "pooling": config.pooling,
              "per_layer_auroc": per_layer, "test": risk_metrics(risk["test"], y["test"])}
    for name in held_out:  # a file with one class only is set against the other class of the test split
        other = y["test"] != y[name][0] if y[name].min() == y[name].max() else torch.zeros(len(y["test"]), dtype=torch.bool)
        report[name] = risk_metrics(torch.cat((risk[name], risk["test"][other])), torch.cat((y[name], y["test"][other])))
    by_source = defaultdict(list)
    for name in ("test", *held_out):
        for conversation, s in zip(groups[name], risk[name].tolist()):
            by_source[f"{name}: {conversation.meta.get('source', 'harmful' if conversation.meta['harmful'] else 'benign')}"].append(s)
    report["mean_risk_by_source"] = {source: [sum(values) / len(values), len(values)] for source, values in sorted(by_source.items())}
    return probe, report


def choose_layers(layers: str, validation: dict[int, float]) -> list[int]:
    """`all`, `auto` (highest validation AUROC, the deepest on a tie) or `i,j,…`. Raises DataError for anything else."""
    if layers == "all":
        return list(validation)
    if layers == "auto":
        return [max(validation, key=lambda layer: (validation[layer], layer))]
    try:
        chosen = [int(layer) for layer in layers.split(",")]
    except ValueError:
        chosen = []
    if not chosen or any(layer not in validation for layer in chosen):
        raise DataError(f"--layers: expected all, auto, or numbers from 0 to {max(validation)}, found {layers!r}")
    return chosen


# ---------------------------------------------------------------- metrics


def auroc(risk: torch.Tensor, harmful: torch.Tensor) -> float:
    """P(risk of a harmful prompt > risk of a benign one), ties counted half. NaN where a class is absent."""
    positive, negative = risk[harmful == 1], risk[harmful == 0]
    wins = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2
    return wins.mean().item()


def tpr_at_fpr(risk: torch.Tensor, harmful: torch.Tensor, fpr: float = 0.01) -> float:
    """Largest share of harmful prompts above a threshold that at most the share `fpr` of the benign ones exceeds."""
    negative = risk[harmful == 0].sort(descending=True).values
    if not len(negative):
        return math.nan
    threshold = negative[int(fpr * len(negative))]
    return (risk[harmful == 1] > threshold).double().mean().item()


def risk_metrics(risk: torch.Tensor, harmful: torch.Tensor) -> dict:
    """AUROC, TPR at 1 % FPR; recall, precision and false-positive rate at s > 0.5; Brier score, mean risk of each class; n of each.

    NaN where a class that a figure needs is absent.
    """
    positive, negative = risk[harmful == 1], risk[harmful == 0]
    hits, alarms = (positive > 0.5).double(), (negative > 0.5).double()
    return {"auroc": auroc(risk, harmful), "tpr_at_1%_fpr": tpr_at_fpr(risk, harmful), "recall": hits.mean().item(),
            "precision": (hits.sum() / (hits.sum() + alarms.sum())).item(), "fpr": alarms.mean().item(),
            "brier": (risk - harmful).square().mean().item(),
            "mean_risk_harmful": positive.mean().item(), "mean_risk_benign": negative.mean().item(),
            "n_harmful": len(positive), "n_benign": len(negative)}


def print_report(report: dict) -> None:
    """The report as text: AUROC by layer, the test split and the held-out files, mean risk by source."""
    layers, sets = report["per_layer_auroc"], [name for name, value in report.items() if isinstance(value, dict) and "auroc" in value]
    print(f"AUROC of each layer\n{'':<20}" + "".join(f"{layer:>7}" for layer in layers))
    for split in ("validation", "test"):
        print(f"{split:<20}" + "".join(f"{row[split]:>7.3f}" for row in layers.values()))
    pooled = "last prompt token" if report["pooling"] == "last" else "mean over prompt tokens"
    print(f"\nprobe on the mean of layers {', '.join(map(str, report['layers']))}, {pooled}")
    print(" " * 20 + "".join(f"{name:>28}" for name in sets))
    for key in report["test"]:
        values = [report[name][key] for name in sets]
        print(f"{key:<20}" + "".join(f"{value:>28.3f}" if isinstance(value, float) else f"{value:>28}" for value in values))
    print("\nmean risk by source")
    for source, (mean, n) in report["mean_risk_by_source"].items():
        print(f"  {mean:.3f}  n={n:<4} {source}")


# ---------------------------------------------------------------- files


def depends_on(model: Transformer, chat: Chat) -> dict[str, str]:
    """What a probe's features depend on beside its own settings: weights and config, dtype, tokenizer and template."""
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return {"model": fingerprint(model.path), "dtype": dtype, "template": chat.fingerprint}


def save_probe(probe: Probe, report: dict, path) -> None:
    """Write the probe, what it depends on and its report as one safetensors file."""
    values = asdict(probe)
    tensors = {name: values.pop(name) for name in ("weight", "bias", "mean", "std")}
    part = Path(path).with_name(Path(path).name + ".part")
    save_file(tensors, part, metadata={"probe": json.dumps(values), "report": json.dumps(report)})
    os.replace(part, path)


def load_probe(path, model: Transformer, chat: Chat) -> Probe:
    """Read a probe. Raises DataError where it was fitted on another model, tokenizer or template: its risks would mean nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()["probe"])
            tensors = {name: file.get_tensor(name) for name in ("weight", "bias", "mean", "std")}
    except Exception as error:
        raise DataError(f"{path}: expected a probe written by probe.py, found: {error}") from None
    for key, here in depends_on(model, chat).items():
        if values[key] != here:
            raise DataError(f"{path}: expected a probe fitted with {key} {here[:12]}, found one fitted with {values[key][:12]}; "
                            f"fit it again")
    return Probe(**tensors, **(values | {"layers": tuple(values["layers"])}))


def main(config: ProbeConfig) -> None:
    """Fit, report, save."""
    require(config, ("batch_size", config.batch_size > 0, "at least 1"), ("out", not config.out.is_dir(), "a file"))
    config.out.parent.mkdir(parents=True, exist_ok=True)
    model, chat = load_model(config.model, config.device, working_dtype(config.device)), Chat(config.model)
    probe, report = fit_probe(config, model, chat)
    print_report(report)
    save_probe(probe, report, config.out)
    print(f"\nwrote {config.out}")


if __name__ == "__main__":
    run(main, ProbeConfig)
