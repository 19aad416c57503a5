"""Fine-tune an aligned chat model with a pull towards its own refusals whose strength follows the risk of the data.

    python train.py                                                        # the embedded model, 10 % harmful data, the probe as risk
    python train.py --risk max                                             # the riskier of probe and critic
    python train.py --model DIR --data FILE --probe-data FILE --lr 2e-4    # your own checkpoint and conversations

The objective (Goel, Maji, Mazumder 2026, arXiv 2602.17546), over the response tokens t of the examples i of one optimizer step:

    L    = 1/N · Σ_i Σ_t [ α_i · NLL_it + β_i · KL_it ]          N response tokens in the step
    NLL  = −log π_θ(y_t | x, y_<t)
    KL   = Σ_v π_ref(v | x, y_<t) · log( π_ref(v | ·) / π_θ(v | ·) )        forward, the full vocabulary
    β_i  = β_min + (β_max − β_min) · s_i        α_i = 1 − β_i               s_i ∈ [0, 1]: the risk of example i

    NLL  token_nll      KL  token_kl      α, β  blend      s̃  smooth      [ … ]  token_loss      L  micro_batch_loss
    s    risk.py: probe.py (before generation), critic.py (after it)            C-SFT, the baseline  csft_weight
    π_θ  policy         π_ref  the policy before its first step: its adapters off, or what is kept of it (fused.ReferenceCache)

What follows: ∂L/∂logits = π_θ − (α·onehot(y) + β·π_ref), so the optimum is the mixture α·δ_y + β·π_ref. At β_max < 1 the gate leaks:
a harmful first token keeps probability 1 − β_max. `--beta-min 0 --beta-max 1` closes it.

Where this departs from the paper (P) or its authors' code (C):
 1. One risk per example, graded: the probe's probability, or (score − 1)/4 of the critic. C thresholds the one, clamps (score − 2)/3 of
    the other, and lets one example's score gate its batch (`--gate batch` is the paper's batch-level form, with `--ema` its smoothing).
 2. Risk is computed once per example before training, because neither ref nor the data change. C computes it in every epoch.
 3. NLL and KL share one denominator, the response tokens of the whole optimizer step. C divides them by different counts.
 4. ref is the policy's own frozen weights; what KL needs of it is computed once and kept on disk (`--ref live`: once per step, for examples
    with β > 0). C holds a second model and runs it twice per step.
 5. The head is frozen, in full fine-tuning too, so that policy and ref share it.
 6. What is unknown is risky: a missing or non-finite risk counts as 1, and is counted and printed. C lets it count as 0.
"""

import gc
import json
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

import fused
from critic import open_judge
from data import IGNORE, WORLD, Chat, DataError, Example, batches_by_length, encode_examples, is_embedded, pad, ranks, read_conversations
from data.checkpoint import read_json, write_json, write_jsonl
from data.cli import comma_list, new_folder, require, run
from evaluate import EvalOptions, default_sets, evaluate_model, evaluation_sets, judge_line, table
from lora import add_lora, save_adapter
from model import Transformer, compile_blocks, load_model, save_model, working_dtype
from probe import print_risk, save_probe
from risk import training_risk


@dataclass(frozen=True)
class TrainConfig(EvalOptions):
    """Fine-tune a chat model: with a KL pull to the aligned model that follows the risk (adaptive), or a baseline."""

    # what to train
    model: Path = WORLD / "model"  # checkpoint folder of the aligned model
    data: Path = WORLD / "mixed_10.jsonl"  # conversations to train on
    out: Path | None = None  # run folder, must not exist (default: runs/METHOD-SEED, numbered where taken)
    method: Literal["sft", "filter", "kl", "csft", "adaptive"] = "adaptive"  # filter: sft without risky data; csft: see csft_weight
    base_of: Path | None = None  # a finished run on the same model, evaluated alike: its figures of the aligned model are taken over
    # risk
    risk: str = "probe"  # probe, critic (--judge), max (the larger of the two), or a JSONL file with one {"risk": s} per conversation
    probe: Path | None = None  # a probe written by probe.py (default: one is fitted on --probe-data)
    probe_data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true | false
    beta_min: float = 0.1  # KL weight at risk 0
    beta_max: float = 0.9  # KL weight at risk 1
    beta: float = 0.5  # KL weight of --method kl
    filter_above: float = 0.5  # risk above which --method filter drops an example
    risk_floor: float = 0.01  # with --beta-min 0: a lower risk counts as 0, and the example is plain SFT without a reference
    gate: Literal["example", "batch"] = "example"  # each example by its own risk, or all of a step by their mean
    ema: float = 0.0  # smoothing λ of the batch's risk over steps, in [0, 1); with --gate batch
    # optimization: the paper's settings, with a learning rate for the embedded model
    epochs: int = 20  # passes over the data
    batch_size: int = 8  # examples per forward pass
    accumulation: int = 1  # batches per optimizer step; several processes share the step's examples
    lr: float = 2e-3  # peak learning rate, cosine to 0 (the paper's models: 2e-4 and below)
    warmup_steps: int = 5  # linear warm-up
    weight_decay: float = 0.01  # AdamW's
    clip: float = 1.0  # largest norm of the gradient
    max_length: int = 2048  # tokens of a conversation; longer ones are cut, counted and reported
    lora_r: int = 64  # LoRA rank; 0: full fine-tuning
    lora_alpha: float = 16.0  # LoRA α; the update is scaled by α/r
    lora_targets: str = ""  # linears to adapt, comma-separated (default: all but the head)
    # machine
    ref: Literal["auto", "cache", "live"] = "auto"  # the reference: computed once and kept on disk, or in every step
    ref_cache: Path = Path("ref_cache")  # folder of kept references; runs on the same model and data share them
    ref_cache_gb: float = 20.0  # with --ref auto: keep it if there are several epochs and it is no larger
    max_tokens_per_batch: int = 0  # tokens of a forward pass, padding (then at most 10 %) included; 0: no limit but --batch-size
    compile: bool = torch.cuda.is_available()  # torch.compile the blocks (default: where there is CUDA)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    fsdp: bool = False  # under torchrun: spread the weights over the processes (default: each has all of them)


# ---------------------------------------------------------------- the objective


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log softmax(logits)[target], in nats ≥ 0: logits (N, V), targets (N,) → (N,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def token_kl(ref_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Forward KL(ref ‖ policy) over the full vocabulary, in nats ≥ 0, exactly 0 for equal logits: (N, V), (N, V) → (N,).

    arXiv 2602.17546; the direction and the full vocabulary as in the authors' code.
    """
    ref_logp, logp = ref_logits.log_softmax(-1), logits.log_softmax(-1)
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def blend(risk: torch.Tensor, beta_min: float, beta_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Risk in [0, 1] → (α, β), α + β = 1, β from β_min at risk 0 to β_max at risk 1. Same shape. arXiv 2602.17546."""
    beta = beta_min + (beta_max - beta_min) * risk
    return 1 - beta, beta


def csft_weight(logp: torch.Tensor, ref_logp: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """C-SFT's weight of each label's NLL in [0.001, 2), a constant for the gradient: all (N,); position 1 is a response's first token.

    w = 2·(1 − σ(β_j·(log π_θ(y_j) − log π_ref(y_j)))), β_1 = 0.5, β_2…5 = 2, then 0.1: a label that has become likelier than under ref
    is pushed less, most of all at the start. 1 where θ = ref. Qi et al. 2024, arXiv 2406.05946.
    """
    beta = torch.where(position == 1, 0.5, torch.where(position <= 5, 2.0, 0.1))
    return (2 * (1 - torch.sigmoid(beta * (logp - ref_logp)))).clamp_min(1e-3).detach()


def smooth(previous: float | None, risk: float, ema: float) -> float:
    """s̃_t = λ·s̃_{t−1} + (1 − λ)·s_t; the first step has no past: s̃_1 = s_1. arXiv 2602.17546."""
    return risk if previous is None else ema * previous + (1 - ema) * risk


def token_loss(hidden, weight, labels, alpha, beta, ref_hidden) -> tuple:
    """The objective α·NLL + β·KL of each response token, with NLL and KL beside it: → three (N,), in nats.

    hidden (N, H) final hidden states; weight (V, H) the head; labels, alpha, beta (N,); ref_hidden (M, H) of the first M tokens, which have
    β > 0. This is the definition. The loop runs fused.token_loss, which equals it without ever holding logits of all tokens. Logits are
    float32 or wider: rounding them to bfloat16 would drown the KL.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits, ref_logits = (F.linear(h.to(wide), weight.to(wide)) for h in (hidden, ref_hidden))  # (N, V), (M, V)
    nll = token_nll(logits, labels)
    kl = F.pad(token_kl(ref_logits, logits[: len(ref_logits)]), (0, len(nll) - len(ref_logits)))
    return alpha * nll + beta * kl, nll.detach(), kl.detach()


# ---------------------------------------------------------------- one micro-batch


def response_states(model: Transformer, examples: list) -> tuple:
    """Final hidden states (N, H) before the response tokens of `examples`, these tokens (N,), and the example of each (N,).

    The only place where labels are shifted. Right padding needs no mask: causal attention never looks there; only longrope has to know
    how long each row is.
    """
    labels, device = pad([e.labels for e in examples], IGNORE, "right"), model.device
    real = pad([[True] * len(e.input_ids) for e in examples], False, "right")  # (B, T)
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    before = (real.flatten().cumsum(0) - 1)[row * labels.shape[1] + column]  # among the real tokens
    longrope = model.config.rope["rope_type"] == "longrope"
    hidden, _ = model.model(pad([e.input_ids for e in examples], 0, "right", device), real.to(device) if longrope else None,
                            rows=real.flatten().nonzero()[:, 0].to(device))  # (n, H)
    return hidden[before.to(device)], labels[row, column + 1].to(device), row


def micro_batch_loss(policy: Transformer, ref: Transformer | None, examples: list, alpha: torch.Tensor, beta: torch.Tensor, n_tokens: int,
                     cache: fused.ReferenceCache | None = None, ref_logp: dict | None = None, run_ref: bool = False,
                     loss_fn=fused.token_loss) -> tuple:
    """Loss of some examples with weights alpha, beta (B,), on the CPU → (loss, Σ nll, Σ kl); n_tokens counts those of the whole step.

    The reference of examples with β > 0 comes from `cache`, else from running `ref`, or where that is None the policy without its adapters;
    run_ref: run it even if no example here needs it, since another process does. ref_logp (of label_logp): weigh each label as C-SFT does.
    loss_fn: token_loss, or its equal in fused.py.
    """
    order = (beta == 0).to(torch.int8).argsort(stable=True)  # those with pull first
    examples, alpha, beta = [examples[i] for i in order], alpha[order], beta[order]
    pulled, device = examples[: int((beta > 0).sum())], policy.device
    hidden, labels, row = response_states(policy, examples)
    ref_hidden, more = hidden[:0].detach(), {}
    if cache is not None and pulled:
        more = {"ref_terms": cache.terms(pulled, device)}
    elif pulled or run_ref:
        with torch.no_grad(), nullcontext() if ref is not None else policy.adapters_off():
            states = response_states(ref or policy, pulled or examples[:1])[0]
        ref_hidden = states if pulled else ref_hidden
    loss, nll, kl = loss_fn(hidden, policy.lm_head.weight, labels, alpha[row].to(device), beta[row].to(device), ref_hidden, **more)
    if ref_logp is not None:
        position = torch.cat([response_positions(e) for e in examples]).to(device)
        loss = loss * csft_weight(-nll, torch.cat([ref_logp[e.index] for e in examples]), position)
    return loss.sum() / n_tokens, nll.sum(), kl.sum()


def response_positions(example: Example) -> torch.Tensor:
    """1, 2, … for the response tokens (n,) of each assistant turn."""
    is_target = torch.tensor([label != IGNORE for label in example.labels])
    count = is_target.cumsum(0)
    return (count - (count * ~is_target).cummax(0).values)[1:][is_target[1:]]


@torch.no_grad()
def label_logp(model: Transformer, examples: list, batch_size: int) -> dict[int, torch.Tensor]:
    """{example.index: log-probabilities (n,) of its labels}: all that C-SFT needs of the reference, once before training."""
    found = {}
    for batch in batches_by_length([len(e.input_ids) for e in examples], batch_size):
        batch = [examples[i] for i in batch]
        hidden, labels, _ = response_states(model, batch)
        ones = torch.ones(len(labels), device=model.device)
        nll = fused.token_loss(hidden, model.lm_head.weight, labels, ones, 0 * ones, hidden[:0])[1]
        found |= dict(zip((e.index for e in batch), (-nll).split([e.n_labels for e in batch])))
    return found


# ---------------------------------------------------------------- the loop


def beta_range(config: TrainConfig) -> tuple[float, float]:
    """(β_min, β_max) of the method: constant KL has one β, the baselines without a pull have none."""
    return {"kl": (config.beta, config.beta), "adaptive": (config.beta_min, config.beta_max)}.get(config.method, (0.0, 0.0))


def lr_at(step: int, n_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of step 0 … n_steps − 1: linear up to `peak` over warmup_steps, then cosine towards 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))


def micro_batches(examples: list, batch_size: int, max_tokens: int, n_processes: int) -> list[list[int]]:
    """The step's examples (their positions) in micro-batches of similar length, as many for every process; the missing ones are empty."""
    share = min(batch_size, math.ceil(len(examples) / n_processes))
    batches = batches_by_length([len(e.input_ids) for e in examples], share, max_tokens)
    return batches + [[]] * (-len(batches) % n_processes)


def train(config: TrainConfig, policy: Transformer, ref: Transformer | None, examples: list, risk: torch.Tensor, metrics_file,
          cache: fused.ReferenceCache | None = None) -> None:
    """Train `policy` in place; metrics_file gains one line per step. `risk` (conversations,) is looked up by an example's index.

    The reference is the `cache`, or `ref`, or where both are None the policy without its adapters. Raises FloatingPointError where the
    gradient is not finite.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [[p for p in parameters if ranks.is_sharded(p) == sharded] for sharded in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups if group], weight_decay=config.weight_decay, fused=True)
    per_step = config.batch_size * config.accumulation
    n_steps = config.epochs * math.ceil(len(examples) / per_step)
    shuffle, order, smoothed, moved = torch.Generator().manual_seed(config.seed), [], None, False
    ref_logp = None
    if config.method == "csft":
        with policy.adapters_off():
            ref_logp = label_logp(policy, examples, config.batch_size)
    with open(metrics_file if ranks.rank() == 0 else os.devnull, "w", buffering=1) as metrics:
        for step in (bar := tqdm(range(n_steps), desc=config.method, mininterval=0.5)):
            started = time.perf_counter()
            order = order or torch.randperm(len(examples), generator=shuffle).tolist()
            chosen, order = [examples[i] for i in order[:per_step]], order[per_step:]
            n_tokens = sum(example.n_labels for example in chosen)

            s = risk[[example.index for example in chosen]].float()  # (examples of the step,)
            if config.gate == "batch":
                smoothed = smooth(smoothed, s.mean().item(), config.ema)
                s = torch.full_like(s, smoothed)
            alpha, beta = blend(s, *beta_range(config))

            # Every process knows the whole step and takes one micro-batch of each round: all run the same passes, whatever their examples.
            sums = torch.zeros(3, device=policy.device)  # loss, Σ nll, Σ kl
            batches = micro_batches(chosen, config.batch_size, config.max_tokens_per_batch, ranks.world())
            for first in range(0, len(batches), ranks.world()):
                together = batches[first : first + ranks.world()]
                mine = together[ranks.rank()]
                weight = float(len(mine) > 0)  # a process without examples runs one that counts nothing
                mine = mine or together[0]
                run_ref = bool((beta[sum(together, [])] > 0).any()) and cache is None
                loss, nll, kl = micro_batch_loss(policy, ref, [chosen[i] for i in mine], weight * alpha[mine], weight * beta[mine],
                                                 n_tokens, cache, ref_logp, run_ref)
                (loss * ranks.world()).backward()  # gradients are averaged over processes, losses summed
                sums += weight * torch.stack((loss.detach(), nll, kl))
            ranks.average_gradients(parameters)
            loss, nll, kl = ranks.total(sums).tolist()
            grad_norm = ranks.clip_gradients(parameters, config.clip).item()
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"step {step}: the gradient is {grad_norm}, the loss {loss}; no model is saved")
            lr = lr_at(step, n_steps, config.warmup_steps, config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # While the policy is still the reference, KL alone has no gradient but rounding noise, and AdamW would make full steps of it.
            moved = moved or bool(alpha.any())
            if moved:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            n_input = sum(len(example.input_ids) for example in chosen)
            row = {"step": step, "loss": loss, "nll": nll / n_tokens, "kl": kl / n_tokens,
                   "risk": s.mean().item() if config.method == "adaptive" else None, "alpha": alpha.mean().item(),
                   "beta": beta.mean().item(), "lr": lr, "grad_norm": grad_norm, "tokens_per_s": n_input / (time.perf_counter() - started)}
            metrics.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=f"{row['loss']:.3f}", nll=f"{row['nll']:.3f}", kl=f"{row['kl']:.3f}", refresh=False)


def check(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other options. Raises DataError for a value that is out of range."""
    untouched = {option.name: getattr(config, option.name) == option.default for option in fields(config)}
    needed_by = {"beta_min": ("adaptive",), "beta_max": ("adaptive",), "gate": ("adaptive",), "risk": ("adaptive", "filter"),
                 "probe": ("adaptive", "filter"), "beta": ("kl",), "filter_above": ("filter",), "ref": ("adaptive", "kl"),
                 "risk_floor": ("adaptive",)}
    require(
        config, ("beta_min", 0 <= config.beta_min <= 1, "0 to 1"), ("beta_max", config.beta_min <= config.beta_max <= 1, "beta-min to 1"),
        *((name, 0 <= getattr(config, name) <= 1, "0 to 1") for name in ("beta", "filter_above")),
        *((name, config.method in methods or untouched[name], f"none without --method {' or '.join(methods)}")
          for name, methods in needed_by.items()),
        ("ema", 0 <= config.ema < 1, "0 to under 1"), ("ema", config.ema == 0 or config.gate == "batch", "0 unless --gate batch"),
        ("risk", config.risk in ("probe", "critic", "max") or Path(config.risk).is_file(), "probe, critic, max, or a file"),
        ("probe", config.risk in ("probe", "max") or not config.probe, "none unless --risk probe or max"),
        ("max_length", config.max_length > 1, "at least 2"),
        ("risk_floor", 0 <= config.risk_floor <= 1, "0 to 1"),
        ("risk_floor", untouched["risk_floor"] or config.beta_min == 0 and config.gate == "example", "none without --beta-min 0"),
        ("ref_cache_gb", untouched["ref_cache_gb"] or config.ref == "auto", "none without --ref auto"),
        ("lora_targets", "lm_head" not in comma_list(config.lora_targets), "no lm_head: the policy's head is the reference's"),
        ("fsdp", not config.fsdp or ranks.world() > 1, "several processes: torchrun --nproc_per_node=N train.py …"),
        ("fsdp", not config.fsdp or torch.__version__ >= (2, 8), "torch 2.8 or newer, which shards weights of two dtypes"),
        ("device", ranks.world() == 1 or config.device in ("cpu", "cuda"), "cpu or cuda, without a number, for several processes"),
        *((name, getattr(config, name) >= 1, "at least 1") for name in ("epochs", "batch_size", "accumulation")),
        *((name, 0 < getattr(config, name) < math.inf, "above 0") for name in ("lr", "clip", "lora_alpha")),
        *((name, 0 <= getattr(config, name) < math.inf, "at least 0")
          for name in ("warmup_steps", "weight_decay", "lora_r", "ref_cache_gb", "max_tokens_per_batch")),
    )
    out = new_folder(config.out, f"runs/{config.method}-{config.seed}")
    if config.judge is None and not is_embedded(config.model):
        config = replace(config, judge="none")  # the embedded judge knows no other model's language
    config = replace(default_sets(config, config.data, {}), out=out)
    judged = config.risk in ("critic", "max")
    require(config, ("judge", not judged or config.judge != "none", f"a checkpoint folder or a URL for --risk {config.risk}"))
    return config


def as_json(config: TrainConfig) -> dict:
    """The configuration as config.json holds it."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()}


def base_results(config: TrainConfig) -> dict:
    """The aligned model's results in the finished run --base-of. Raises DataError where that run was evaluated otherwise."""
    theirs, ours = read_json(config.base_of / "config.json"), as_json(config)
    matter = {"model", *(option.name for option in fields(EvalOptions))} - {"verdicts", "judge_requests", "judge_timeout"}
    for option in sorted(matter):
        if ours[option] != theirs.get(option):
            raise DataError(f"--base-of: expected a run with {option} = {ours[option]}, found {theirs.get(option)} in {config.base_of}")
    return read_json(config.base_of / "results.json")["base"]


def open_model(config: TrainConfig, path, dtype=None, adapters: bool = False) -> Transformer:
    """A checkpoint, with new adapters or without, on its device; with --fsdp spread over the processes."""
    model = load_model(path, "cpu" if config.fsdp else config.device, dtype)
    if adapters:
        add_lora(model, config.lora_r, config.lora_alpha, comma_list(config.lora_targets), config.seed)
    if config.fsdp:
        ranks.shard(model, config.device)
    return model


def reference_of(config: TrainConfig, policy: Transformer, examples: list, risk: torch.Tensor) -> tuple:
    """(ref, cache) as `train` takes them, for an untrained policy: it is the reference now, and keeps it if adapters are all that moves."""
    pulled = [e for e in examples if config.gate == "batch" or blend(risk[e.index], *beta_range(config))[1] > 0]
    if not pulled or beta_range(config)[1] == 0:
        return None, None
    if config.ref == "cache" or config.ref == "auto" and config.epochs > 1:
        cache = fused.ReferenceCache(config.ref_cache, policy, pulled, config.batch_size)
        if config.ref == "cache" or cache.size <= min(config.ref_cache_gb * 1e9, ranks.on_first(cache.room)):
            with torch.no_grad(), policy.adapters_off():
                return None, cache.fill(lambda batch: response_states(policy, batch)[:2], policy.lm_head.weight)
        print(f"the reference runs in every step: kept, it would be {cache.size / 1e9:.1f} GB (--ref-cache-gb, or what the disk has free)")
    return (None if config.lora_r else open_model(config, config.model, torch.float32)), None


def main(config: TrainConfig) -> None:
    """records → examples → risk → loss → checkpoint → evaluation"""
    ranks.join()
    config = ranks.on_first(lambda: check(config))
    torch.manual_seed(config.seed)
    sets, judge = evaluation_sets(config), open_judge(config) if ranks.rank() == 0 else None
    conversations = read_conversations(config.data, need="answer")
    full = config.lora_r == 0
    policy, chat = open_model(config, config.model, working_dtype(config.device), adapters=not full), Chat(config.model)
    examples, report = encode_examples(chat, conversations, min(config.max_length, policy.config.max_position_embeddings))
    if report:
        print(report)
    risk, fitted, completions = {"risk": torch.zeros(len(conversations))}, None, None
    base = base_results(config) if config.base_of else None
    with policy.adapters_off():  # the reference
        if config.method in ("adaptive", "filter"):
            risk, fitted = training_risk(config, policy, chat, conversations, judge)
            print_risk(risk["risk"], conversations)
        if not base:
            base, completions = evaluate_model(policy, chat, sets, config, "base", judge)
    gate = risk["risk"]
    if config.method == "filter":
        kept = [example for example in examples if gate[example.index] <= config.filter_above]
        print(f"filter: {len(examples) - len(kept)} of {len(examples)} examples dropped" + ", the model stays as it was" * (not kept))
        examples = kept
    if config.method == "adaptive" and config.gate == "example" and config.beta_min == 0:
        gate = gate.where(gate >= config.risk_floor, 0.0)

    if full:  # every weight but the head's moves, in float32
        del policy
        gc.collect()  # before the next is loaded: two would be in memory
        policy = open_model(config, config.model, torch.float32)
    ref, cache = reference_of(config, policy, examples, gate)

    def write_before():
        config.out.mkdir(parents=True)
        write_json(config.out / "config.json", as_json(config))
        if completions:
            write_jsonl(config.out / "completions_base.jsonl", completions)
        if config.method in ("adaptive", "filter"):
            values = zip(*(values.tolist() for values in risk.values()))
            write_jsonl(config.out / "risk.jsonl", [dict(zip(risk, row)) | {"where": c.where} for row, c in zip(values, conversations)])
        if fitted:
            save_probe(*fitted, config.out / "probe.safetensors")

    ranks.on_first(write_before)

    if full:
        policy.model.requires_grad_(True)
        policy.lm_head.requires_grad_(False)  # the reference's, too; where it is the embedding, that one stays as well
    policy.model.gradient_checkpointing = config.gradient_checkpointing
    if config.compile:
        compile_blocks(policy)
    train(config, policy, ref, examples, gate, config.out / "metrics.jsonl", cache)

    if not full:
        save_adapter(policy, config.out / "adapter")
    save_model(policy, config.out / "model")
    del policy, ref
    gc.collect()  # compiled blocks refer to themselves
    policy = open_model(config, config.out / "model")  # what is evaluated is what was saved
    after, completions = evaluate_model(policy, chat, sets, config, "after", judge)

    def write_after():
        write_jsonl(config.out / "completions_after.jsonl", completions)
        write_json(config.out / "results.json", {"base": base, "after": after})

    ranks.on_first(write_after)
    print(f"\n{config.out}, per cent with 95 % intervals\n" + table({"base": [base], f"after {config.method}": [after]})
          + judge_line(after))


if __name__ == "__main__":
    run(main, TrainConfig)
