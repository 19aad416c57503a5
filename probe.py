"""Risk from activations, before generation: a logistic probe on the reference model's hidden state.

    python probe.py                                             # the embedded model and probe data
    python probe.py --model DIR --data FILE --out FILE          # FILE: prompts with "harmful": true | false

x (H,)   = mean over the chosen layers of the residual stream at the last prompt token
s        = σ( w · (x − mean) / std + b ) ∈ [0, 1]               the risk of the prompt (arXiv 2602.17546)
w, b     = argmin  Σ_i log-loss_i + (l2 / 2) ‖w‖²               solved to convergence in float64

`--layers auto` chooses on a validation split; every figure is of a test split that nothing was chosen on.
"""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.chat import Chat, batches_by_length, encode_prompts, pad_left
from data.conversations import WORLD, Conversation, is_embedded, read_conversations, split_by_prompt
from lib.checkpoint import Config, fingerprint, load_checked, save_checked
from lib.cli import comma_list, require, run
from lib.files import COUNT, DataError, either, expect, expect_writable, parse_json
from lib.report import probe_report, risk_metrics
from lib.risk import UNKNOWN
from model import Transformer, load_model, working_dtype

WEAK_AUROC = 0.8  # a probe below it opens the gate to what it does not see


@dataclass(frozen=True)
class ProbeConfig:
    """Fit a logistic risk probe on activations; report how well it separates harmful from benign prompts."""

    model: Path = WORLD / "model"  # folder of the reference (aligned) model
    data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true | false, optionally "source"
    held_out: str | None = None  # files to report on only, comma-separated (default: embedded ones)
    out: Path = Path("probe.safetensors")  # file to write
    layers: str = "all"  # averaged: all, as in the paper; i,j,…; auto (best on validation)
    l2: float = 1.0  # weight of ‖w‖²/2 against the summed log-loss
    batch_size: int = 32  # prompts per forward pass
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the model runs
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where faster
    seed: int = 0  # of the 60/20/20 split into train, validation, test
    date: str | None = None  # YYYY-MM-DD, for chat templates that print the date (default: today)


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what its features depend on. `weight`, `mean`, `std` (H,), `bias` (): float64."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    layers: tuple
    model: str  # fingerprint of the checkpoint
    dtype: str  # that the model ran in
    template: str  # fingerprint of tokenizer and chat template
    date: str | None  # that the template printed

    def risk(self, features: torch.Tensor) -> torch.Tensor:
        """σ(w·(x − mean)/std + b): (N, H) → (N,) in [0, 1]; 1, and printed, where the logit is not finite."""
        logit = (features.double() - self.mean) / self.std @ self.weight + self.bias
        if unknown := int((~logit.isfinite()).sum()):
            print(f"{unknown} of {len(logit)} risks are unknown (activations not finite): taken as 1")
        return torch.where(logit.isfinite(), torch.sigmoid(logit), UNKNOWN)

    def fits(self, config: Config) -> bool:
        """Whether its numbers are finite and as many as the model's states have, its layers the model's."""
        H, L = (config.hidden_size,), range(config.num_hidden_layers + 1)
        tensors = zip((self.weight, self.mean, self.std, self.bias), (H, H, H, ()))
        sound = [t.shape == shape and t.dtype == torch.float64 and t.isfinite().all() for t, shape in tensors]
        known = [type(layer) is int and layer in L for layer in self.layers]
        return all(sound) and bool((self.std > 0).all()) and known != [] and all(known)


# ---------------------------------------------------------------- features


@torch.no_grad()
def prompt_features(model: Transformer, prompts: list[list[int]], layers, batch_size: int, desc: str = ""):
    """Residual stream at the last token (N, len(layers), H) of token-id prompts, float32 on the CPU.

    Layer 0 is the embeddings. (layers, B, T, H) never exists: each layer is reduced as it is computed.
    """
    features = torch.empty(len(prompts), len(layers), model.config.hidden_size)
    for batch in tqdm(batches_by_length([len(ids) for ids in prompts], batch_size), desc, disable=not desc):
        input_ids, real = pad_left([prompts[i] for i in batch], model.device)
        _, states = model.model(input_ids, real, layers=layers, pool=lambda hidden: hidden[:, -1].float())
        features[batch] = torch.stack(states, 1).cpu()
    return features


def conversation_risk(probe: Probe, model: Transformer, prompts: list[list[list[int]]],
                      batch_size: int) -> torch.Tensor:
    """Risk (N,) in [0, 1] of N conversations: of the riskiest of each one's prompts (token ids)."""
    owner = torch.tensor([i for i, own in enumerate(prompts) for _ in own])
    features = prompt_features(model, sum(prompts, []), probe.layers, batch_size, "risk of each example")
    risk = torch.zeros(len(prompts), dtype=torch.float64)
    return risk.scatter_reduce(0, owner, probe.risk(features.mean(1)), "amax")


# ---------------------------------------------------------------- logistic regression


def fit_logistic(x: torch.Tensor, y: torch.Tensor, l2: float, tolerance: float = 1e-6) -> tuple:
    """Minimise Σ log-loss + (l2/2)‖w‖², x (N, H) standardised, y (N,) in {0, 1} → (weight, bias, mean, std).

    L-BFGS in float64 from zero: strictly convex, hence one solution; the bias is free. Raises DataError for
    l2 ≤ 0, a single class, or where the mean gradient does not fall under `tolerance`.
    """
    if l2 <= 0 or y.min() == y.max():
        raise DataError(f"logistic regression: expected l2 > 0 and both classes, found l2 = {l2}, "
                        f"{int(y.sum())} harmful of {len(y)}")
    x, y = x.double(), y.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature carries nothing
    x = (x - mean) / std
    weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in (x.shape[1], ()))
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
    gradient = max(weight.grad.abs().max(), bias.grad.abs()).item()
    if not gradient < tolerance:
        raise DataError(f"logistic regression: expected a gradient under {tolerance:g}, found {gradient:.1e}")
    return weight.detach(), bias.detach(), mean, std


def held_out_prompts(config: ProbeConfig, fitted_on: list[Conversation]) -> dict[str, list[Conversation]]:
    """{"held out: NAME": the conversations of a --held-out file whose prompts are not among `fitted_on`}."""
    embedded = [str(WORLD / f"probe_{name}.jsonl") for name in ("withheld", "lookalike")]
    files = embedded if is_embedded(config.data) and config.held_out is None else comma_list(config.held_out)
    seen, found = {str(c.prompts[-1]) for c in fitted_on}, {}
    for file in files:
        rows, name = read_conversations(file, need="harmful"), f"held out: {Path(file).stem}"
        new = [c for c in rows if str(c.prompts[-1]) not in seen]
        if len(new) < len(rows):
            print(f"{file}: {len(rows) - len(new)} of {len(rows)} prompts are in {config.data} too: left out")
        if not new or name in found:
            raise DataError(f"--held-out: expected files of different names with prompts that {config.data} "
                            f"lacks, found {file}")
        found[name] = new
    return found


def fit_probe(config: ProbeConfig, model: Transformer, chat: Chat) -> tuple[Probe, dict]:
    """Fit on train + validation what validation chose; report on test and held-out files: (probe, report)."""
    splits = split_by_prompt(read_conversations(config.data, need="harmful"), seed=config.seed)
    held_out = held_out_prompts(config, sum(splits, []))
    groups = dict(zip(("train", "validation", "test"), splits)) | held_out
    every, sizes = sum(groups.values(), []), list(map(len, groups.values()))
    layers = tuple(range(model.config.num_hidden_layers + 1))
    prompts = encode_prompts(chat, every, model.config.max_position_embeddings)
    x = prompt_features(model, prompts, layers, config.batch_size, "activations for the probe").split(sizes)
    y = torch.tensor([c.meta["harmful"] for c in every], dtype=torch.float64).split(sizes)
    x, y, origin = dict(zip(groups, x)), dict(zip(groups, y)), depends_on(model, chat)

    def probe_of(chosen, names):
        features = torch.cat([x[name][:, chosen].mean(1) for name in names])
        fitted = fit_logistic(features, torch.cat([y[name] for name in names]), config.l2)
        return Probe(*fitted, tuple(chosen), *origin.values())

    def measure(risk):
        """{set: metrics}; one with a single class is set against the other class of the test split."""
        found = {}
        for name in ("validation", "test", *held_out):
            other = (y["test"] != y[name][0]) & (y[name].min() == y[name].max())
            s, label = torch.cat((risk[name], risk["test"][other])), torch.cat((y[name], y["test"][other]))
            found[name] = risk_metrics(s, label)
        return found

    per_layer = {}
    for layer in layers:
        probe = probe_of([layer], ["train"])
        row = measure({name: probe.risk(x[name][:, layer]) for name in groups})
        keys = ("auroc", "tpr_at_1%_fpr")
        per_layer[layer] = {name: {key: found[key] for key in keys} for name, found in row.items()}
    chosen = choose_layers(config.layers, {n: row["validation"]["auroc"] for n, row in per_layer.items()})
    probe = probe_of(chosen, ["train", "validation"])
    risk = {name: probe.risk(x[name][:, chosen].mean(1)) for name in groups}
    report = {"data": str(config.data), "n": dict(zip(groups, sizes)), "layers": list(chosen),
              "per_layer": per_layer} | measure(risk)
    del report["validation"]  # it was fitted on
    by_source = defaultdict(list)
    for name in ("test", *held_out):
        for c, s in zip(groups[name], risk[name].tolist()):
            source = c.meta.get("source", "harmful" if c.meta["harmful"] else "benign")
            by_source[f"{name}: {source}"].append(s)
    report["mean_risk_by_source"] = {key: [sum(s) / len(s), len(s)] for key, s in sorted(by_source.items())}
    return probe, report


def choose_layers(layers: str, validation: dict[int, float]) -> list[int]:
    """`all`, `auto` (highest validation AUROC, deepest on a tie) or `i,j,…`. Raises DataError for others."""
    if layers == "all":
        return list(validation)
    if layers == "auto":
        return [max(validation, key=lambda layer: (validation[layer], layer))]
    chosen = [int(layer) if layer.strip().isdecimal() else -1 for layer in layers.split(",")]
    if not set(chosen) <= set(validation):
        raise DataError(f"--layers: expected all, auto, or numbers up to {max(validation)}, found {layers!r}")
    return chosen


def expect_strong(report: dict, where, weak: bool = False) -> None:
    """Print a probe's held-out AUROC. Raises DataError where it is low or NaN; with `weak`, says so only."""
    test = report["test"]
    print(f"probe: AUROC {test['auroc']:.3f} on {test['n_harmful'] + test['n_benign']} held-out prompts")
    if not test["auroc"] >= WEAK_AUROC:
        found = f"expected a probe with a held-out AUROC of at least {WEAK_AUROC}, found {test['auroc']:.3f}"
        if not weak:
            raise DataError(f"{where}: {found}; --weak-probe trains all the same")
        print(f"WEAK PROBE: {found}; the gate does not see what it misses")


# ---------------------------------------------------------------- files


def depends_on(model: Transformer, chat: Chat) -> dict[str, str | None]:
    """What features depend on beside the probe's settings: weights, config, dtype, tokenizer, template."""
    dtype = str(model.lm_head.weight.dtype).removeprefix("torch.")
    return {"model": fingerprint(model.path), "dtype": dtype, "template": chat.fingerprint, "date": chat.date}


def save_probe(probe: Probe, report: dict, path) -> None:
    """Write the probe, what it depends on, its report and a checksum as one safetensors file."""
    values = asdict(probe)
    tensors = {name: values.pop(name) for name in ("weight", "bias", "mean", "std")}
    save_checked(path, tensors, {"probe": json.dumps(values), "report": json.dumps(report)})


def load_probe(path, model: Transformer, chat: Chat) -> tuple[Probe, dict]:
    """(probe, report) of a file. Raises DataError for none, a damaged one, one fitted on something else."""
    what = "a probe written by probe.py"
    tensors, metadata = load_checked(path, what)
    try:
        values, report = parse_json(metadata["probe"]), parse_json(metadata["report"])
        probe = Probe(**tensors, **(values | {"layers": tuple(values["layers"])}))
        if not probe.fits(model.config):
            raise ValueError("numbers that are not finite, of another shape, or of layers that are none here")
        expect(report["test"], {"auroc": either(int, float), "n_harmful": COUNT, "n_benign": COUNT}, "test")
    except Exception as error:
        raise DataError(f"{path}: expected {what}, found: {str(error)[:300]}") from None
    for key, here in depends_on(model, chat).items():
        if (there := getattr(probe, key)) != here:
            again = "fit it again" + f", or --{key}" * (key in ("date", "dtype"))
            raise DataError(f"{path}: expected a probe fitted with {key} {str(here)[:12]}, found one fitted "
                            f"with {str(there)[:12]}; {again}")
    return probe, report


def main(config: ProbeConfig) -> None:
    """Fit, report, save."""
    require(config, ("batch_size", config.batch_size > 0, "at least 1"),
            ("out", not config.out.is_dir(), "a file"))
    expect_writable(config.out)
    dtype = working_dtype(config.model, config.device, config.dtype)
    model = load_model(config.model, config.device, dtype)
    probe, report = fit_probe(config, model, Chat(config.model, config.date))
    print(probe_report(report))
    save_probe(probe, report, config.out)
    print(f"\nwrote {config.out}")


if __name__ == "__main__":
    run(main, ProbeConfig)
