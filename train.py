"""Fine-tune an aligned chat model with a pull towards its refusals that follows the risk of the data.

    python train.py                                                      # the embedded model, 10 % harmful
    python train.py --risk max                                           # the riskier of probe and critic
    python train.py --model DIR --data FILE --probe-data FILE --lr 2e-4  # your own
    python train.py --resume runs/adaptive-0                             # one that was interrupted, killed, …

The objective (Goel, Maji, Mazumder 2026, arXiv 2602.17546), over response tokens t of a step's examples i:

    L    = 1/N · Σ_i Σ_t [ α_i · NLL_it + β_i · KL_it ]           N (n_tokens): response tokens of the step
    NLL  = −log π_θ(y_t | x, y_<t)
    KL   = Σ_v π_ref(v | x, y_<t) · log( π_ref(v | x, y_<t) / π_θ(v | x, y_<t) )      forward, full vocabulary
    β_i  = β_min + (β_max − β_min) · s_i        α_i = 1 − β_i     s_i ∈ [0, 1]: the risk of example i
           --gate batch: s̃, the smoothed mean of the step; sft, filter, csft: β = 0; kl: one β for all

    NLL  token_nll    KL  token_kl    α, β  blend    s̃  smooth    [ … ]  token_loss    L  micro_batch_loss
    s    training_risk: by probe.py (before generation), critic.py (after it); C-SFT, a baseline: csft_weight
    π_θ  policy       π_ref  reference: the policy before its first step, or what lib/fused.py keeps of it

What follows: N · ∂L/∂logits_it = π_θ − (α·onehot(y) + β·π_ref); the optimum is the mixture α·δ_y + β·π_ref.
At β_max < 1 the gate leaks: at risk 1 a first token keeps 1 − β_max; --beta-max 1 closes it. What holds
refusals in place is β > 0 on prompts that are refused: data/anchors.py (--anchor-share) adds some.

Where this departs from the paper (P) or its authors' code (C):
 1. One risk per example, graded: the probe's probability, or (score − 1)/4 of the critic. C thresholds one,
    clamps (score − 2)/3 of the other, and lets an example gate its batch. P smooths a batch's: --gate batch.
 2. Risk is computed once, before training: neither ref nor the data change. C computes it in every epoch.
 3. NLL and KL share one denominator, the response tokens of the step. C divides them by different counts.
 4. ref is the policy itself before its first step; what KL needs is computed once and kept on disk, or run in
    every step where β > 0 (--ref live). C holds a second model and runs it twice per step.
 5. The head is frozen, in full fine-tuning too, so that policy and ref share it.
 6. What is unknown is risky: null, NaN, a verdict that fails count as 1, and are printed. In C: as 0.
"""

import gc
import math
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm

from critic import conversation_verdicts, open_judge
from data.anchors import LISA_CYCLE, anchor_examples, anchor_records, anchors_of_step
from data.chat import Chat, Example, batches_by_length, encode_examples
from data.conversations import WORLD, Conversation, is_embedded, read_conversations
from data.risks import read_risk, risks_of_rows
from evaluate import EvalOptions, default_sets, evaluate_model, evaluation_sets
from lib import distributed, fused
from lib.cli import comma_list, require, run
from lib.files import DataError, remove, write_json
from lib.report import agreement, figures, lines_below, read_completions, summarize, table
from lib.response import label_logp, response_positions, response_states
from lib.resume import Progress, in_run, keep_rows, kept_rows, options_of_run, run_folder
from lib.risk import expect_risks, print_risk
from model import Transformer, add_lora, compile_blocks, load_model, save_adapter, save_model, working_dtype
from probe import (ProbeConfig, conversation_risk, expect_strong, fit_probe, load_probe, save_probe)

RISK_FLOOR = 0.01  # with --beta-min 0 --gate example a lower risk counts as 0: plain SFT, no reference
FILTER_ABOVE = 0.5  # risk above which --method filter drops an example
LISA_RHO = 1.0  # ρ of its proximal term
AT_START = {4: 1e-4, 2: 1e-2}  # largest KL per token of a policy that has not moved, by bytes of its dtype


@dataclass(frozen=True)
class TrainConfig(EvalOptions):
    """Fine-tune a chat model: with a KL pull to the aligned model that follows the risk, or a baseline."""

    # what to train
    model: Path = WORLD / "model"  # folder of the aligned model
    data: Path = WORLD / "mixed_10.jsonl"  # conversations to train on
    out: Path | None = None  # new folder of the run (default: runs/METHOD-SEED)
    method: Literal["sft", "filter", "kl", "csft", "lisa", "adaptive"] = "adaptive"  # or a baseline
    eval_base: bool = True  # evaluate the aligned model before training
    resume: Path | None = None  # unfinished run to go on with, by its own options
    save_every: float = 10.0  # minutes between the states that it can go on from; 0: none
    # risk
    risk: str = "probe"  # probe, critic, max of both, or a JSONL file of risks
    risk_by_line: bool = False  # take that file's rows in their order, without conversations
    probe: Path | None = None  # a file of probe.py (default: one is fitted on --probe-data)
    probe_data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true | false
    weak_probe: bool = False  # train with a probe whose held-out AUROC is under 0.8
    beta_min: float = 0.1  # KL weight at risk 0
    beta_max: float = 0.9  # KL weight at risk 1
    beta: float = 0.5  # KL weight of --method kl
    gate: Literal["example", "batch"] = "example"  # each by its own risk, or a step by its mean
    ema: float = 0.0  # smoothing λ of the batch's risk over steps, in [0, 1)
    # anchors: prompts with the reference's own answers; held to it, or without a pull trained on
    anchor_share: float = 0.0  # of the examples (lisa: of the steps)
    anchors: Path | None = None  # prompts, "harmful": true | false (default: the probe data's harmful)
    # optimization (the paper's settings, with a learning rate for the embedded model)
    epochs: int = 20  # passes over the data
    batch_size: int = 8  # examples per forward pass, at most
    accumulation: int = 1  # batches per step; processes share the step's examples
    lr: float = 2e-3  # peak; cosine to 0 (the paper: 2e-4 and below)
    warmup_steps: int = 5  # linear warm-up
    weight_decay: float = 0.01  # AdamW's
    clip: float = 1.0  # largest norm of the gradient
    max_length: int = 2048  # tokens of a conversation; the rest is cut, and counted
    lora_r: int = 64  # LoRA rank; 0: full fine-tuning
    lora_alpha: float = 16.0  # LoRA α; the update is scaled by α/r
    lora_targets: str = ""  # linears to adapt, comma-separated (default: all but the head)
    # machine
    ref: Literal["auto", "cache", "live"] = "auto"  # keep it, if it is used twice and fits, or run it
    ref_cache: Path = Path("ref_cache")  # folder of kept references, which runs share
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA above 100 M parameters
    gradient_checkpointing: bool = False  # recompute activations, to save memory
    fsdp: bool = False  # shard the blocks over the processes (torchrun, torch 2.8)
    given: tuple = field(default=(), compare=False)


# ---------------------------------------------------------------- the objective


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """−log softmax(logits)[target], in nats ≥ 0: logits (N, V), targets (N,) → (N,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def token_kl(ref_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Forward KL(ref ‖ policy), full vocabulary, in nats ≥ 0, 0 for equal logits: (N, V), (N, V) → (N,).

    arXiv 2602.17546; the direction and the full vocabulary as in the authors' code.
    """
    ref_logp, logp = ref_logits.log_softmax(-1), logits.log_softmax(-1)
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def blend(risk: torch.Tensor, beta_min: float, beta_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Risk in [0, 1] → (α, β), α + β = 1, β from β_min at risk 0 to β_max at risk 1. arXiv 2602.17546."""
    beta = beta_min + (beta_max - beta_min) * risk
    return 1 - beta, beta


def beta_range(config: TrainConfig) -> tuple[float, float]:
    """(β_min, β_max) of the method: constant KL has one β, the baselines without a pull have none."""
    ranges = {"kl": (config.beta, config.beta), "adaptive": (config.beta_min, config.beta_max)}
    return ranges.get(config.method, (0.0, 0.0))


def smooth(previous: float | None, risk: float, ema: float) -> float:
    """s̃_t = λ·s̃_{t−1} + (1 − λ)·s_t; the first step has no past: s̃_1 = s_1. arXiv 2602.17546."""
    return risk if previous is None else ema * previous + (1 - ema) * risk


def token_loss(hidden, weight, labels, alpha, beta, ref_hidden) -> tuple:
    """The objective α·NLL + β·KL of each response token, with NLL and KL beside it: → three (N,), in nats.

    hidden (N, H) final hidden states; weight (V, H) the head; labels (N,) the tokens they predict; alpha,
    beta (N,); ref_hidden (M, H) of the first M, those with β > 0: the caller puts them first; KL of others is
    not computed, and 0. This is the definition. The loop runs fused.token_loss, equal to it, which never
    holds the logits of all tokens. Logits are float32 or wider: bfloat16's rounding would drown KL.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    N, M = len(hidden), len(ref_hidden)
    logits, ref_logits = (F.linear(h.to(wide), weight.to(wide)) for h in (hidden, ref_hidden))  # (N or M, V)
    nll = token_nll(logits, labels)
    kl = F.pad(token_kl(ref_logits, logits[:M]), (0, N - M))
    return alpha * nll + beta * kl, nll.detach(), kl.detach()


def lisa_pull(parameters: list[torch.nn.Parameter], at_switch: list[torch.Tensor], rho: float) -> None:
    """Add the gradient of ρ/2·‖θ − θ_switch‖² to each parameter's: Lisa's pull to where its phase began.

    Huang et al. 2024, arXiv 2405.18641. All processes' gradients are summed later: each adds its share.
    """
    for parameter, start in zip(parameters, at_switch):
        parameter.grad.add_(parameter.detach() - start, alpha=rho / distributed.world_size())


def csft_weight(logp: torch.Tensor, ref_logp: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """C-SFT's weight w of a label's NLL, L = 1/N Σ w·NLL: all (N,), no gradient; position 1 begins a turn.

    w = 2·(1 − σ(τ_j·(log π_θ(y_j) − log π_ref(y_j)))), at least 0.001; τ_1 = 0.5, τ_2…5 = 2, then 0.1: a
    label that became likelier than under ref is pushed less, at first most. Qi et al. 2024, arXiv 2406.05946.
    """
    tau = torch.where(position == 1, 0.5, torch.where(position <= 5, 2.0, 0.1))
    return (2 * (1 - torch.sigmoid(tau * (logp - ref_logp)))).clamp_min(1e-3).detach()


# ---------------------------------------------------------------- the risk of the data


def probe_risk(config: TrainConfig, model: Transformer, chat: Chat, examples: list[Example]) -> torch.Tensor:
    """Risk (examples,) in [0, 1] by the probe: config.probe, or one that is fitted, and kept in the run."""
    if config.probe:
        probe, report = load_probe(config.probe, model, chat)
    else:
        if is_embedded(config.probe_data) and not is_embedded(config.model):
            print("the probe is fitted on the embedded prompts; your own (--probe-data FILE) teach it more")
        options = ProbeConfig(model=config.model, data=config.probe_data, device=config.device)
        probe, report = fit_probe(options, model, chat)
    expect_strong(report, config.probe or config.probe_data, config.weak_probe)
    if not config.probe:
        distributed.on_rank_zero(lambda: save_probe(probe, report, config.out / "probe.safetensors"))
    return conversation_risk(probe, model, [e.prompts for e in examples], ProbeConfig.batch_size)


def training_risk(config: TrainConfig, model: Transformer, chat: Chat, examples: list[Example],
                  conversations: list[Conversation], judge) -> list[dict]:
    """A row for each example: its "risk" in [0, 1], the parts, where it stands, the hash of what was judged.

    Probe and critic see the tokens that are trained on, and what they say; a record may say something else.
    """
    parts, seen = {}, [example.training_text for example in examples]
    if config.risk in ("probe", "max"):
        parts["probe"] = probe_risk(config, model, chat, examples)
    if config.risk in ("critic", "max"):
        verdicts = distributed.on_rank_zero(lambda: conversation_verdicts(judge, seen))
        parts["critic"] = torch.tensor([verdict.risk for verdict in verdicts], dtype=torch.float64)
    if config.risk == "max":
        both = agreement(parts["probe"], parts["critic"])
        print(f"probe and critic agree on {both['agree']:.1%}; risky to the probe alone: "
              f"{both['only probe']}, to the critic alone: {both['only critic']}")
    if not parts:
        risks = read_risk(Path(config.risk), conversations, examples, config.risk_by_line)
        parts["file"] = torch.tensor(risks, dtype=torch.float64)
    risk = expect_risks(torch.stack(list(parts.values())).amax(0))
    print_risk(risk, seen)
    columns = {name: values.tolist() for name, values in ({"risk": risk} | parts).items()}
    columns |= {"where": [e.conversation.where for e in examples], "hash": [text.hash for text in seen]}
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


# ---------------------------------------------------------------- one micro-batch


def live_reference(model: Transformer):
    """The reference run whenever it is asked: examples → hidden states (M, H) of `model` without adapters."""
    @torch.no_grad()
    def ref_hidden(examples: list[Example]) -> torch.Tensor:
        with model.adapters_off():
            return response_states(model, examples)[0]

    return ref_hidden


def micro_batch_loss(policy: Transformer, reference, examples: list[Example], alpha: torch.Tensor,
                     beta: torch.Tensor, n_tokens: int, ref_logp=None, loss_fn=fused.token_loss) -> tuple:
    """Loss of some examples with weights alpha, beta (B,; CPU) → (loss, Σ nll, Σ kl); n_tokens: of the step.

    reference(those with β > 0) → their reference hidden states, where it runs live; where it is kept, what
    reference_terms made of them. ref_logp (of label_logp): weigh labels as C-SFT. loss_fn may be token_loss.
    """
    order = (beta == 0).to(torch.int8).argsort(stable=True)  # those with pull first, as token_loss expects
    examples, alpha, beta = [examples[i] for i in order], alpha[order], beta[order]
    pulled, device = examples[: int((beta > 0).sum())], policy.device
    hidden, labels, row = response_states(policy, examples)
    alpha, beta = alpha[row].to(device), beta[row].to(device)  # of each token
    ref = reference(pulled) if pulled else hidden[:0].detach()
    loss, nll, kl = loss_fn(hidden, policy.lm_head.weight, labels, alpha, beta, ref)
    if ref_logp is not None:
        position = torch.cat([response_positions(e) for e in examples]).to(device)
        loss = loss * csft_weight(-nll, torch.cat([ref_logp[e.index] for e in examples]), position)
    return loss.sum() / n_tokens, nll.sum(), kl.sum()


# ---------------------------------------------------------------- the loop


def lr_at(step: int, n_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of step 0 … n_steps − 1: linear up to `peak` over warmup_steps, then cosine towards 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))


def shuffled_forever(examples: list[Example], seed: int):
    """Every example once per epoch, epoch after epoch, each in a new order: no step is ever short."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (examples[i] for i in torch.randperm(len(examples), generator=generator).tolist())


def train(config: TrainConfig, policy: Transformer, reference, examples: list[Example], risk: torch.Tensor,
          run: Path) -> None:
    """Train `policy` in place; run/metrics.jsonl gains a line per step. Goes on where run/steps/ ends.

    reference: as in micro_batch_loss. risk (examples,) in [0, 1], looked up by an example's index. Raises
    FloatingPointError where the gradient is not finite, DataError where the reference is not the policy.
    """
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = distributed.optimizer_groups(parameters)
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    ref_logp = label_logp(policy, examples, config.batch_size) if config.method == "csft" else None
    data, anchors = ([e for e in examples if e.anchor == which] for which in (False, True))
    per_step, pulls = config.batch_size * config.accumulation, beta_range(config)[1] > 0
    n_steps = math.ceil(config.epochs * len(data) / (1 - config.anchor_share) / per_step)
    data, anchors = shuffled_forever(data, config.seed), shuffled_forever(anchors, config.seed)
    with Progress(run, policy, optimizer, config.save_every, examples, risk) as progress:
        first, (smoothed, moved), at_switch = progress.restore((None, False))
        for step in (bar := tqdm(range(n_steps), desc=config.method, mininterval=0.5)):
            started = time.perf_counter()
            n_held = anchors_of_step(config, step)
            drawn = [next(anchors if i < n_held else data) for i in range(per_step)]
            if step < first:
                continue  # done before the run was interrupted
            drawn.sort(key=lambda e: len(e.input_ids))
            n_tokens = sum(example.n_labels for example in drawn)

            s = risk[[example.index for example in drawn]].float()  # (examples of the step,)
            anchor = torch.tensor([example.anchor for example in drawn])
            if config.gate == "batch" and n_held < per_step:
                smoothed = smooth(smoothed, s[~anchor].mean().item(), config.ema)
                s = torch.full_like(s, smoothed)
            alpha, beta = blend(s, *beta_range(config))
            if pulls:
                alpha[anchor], beta[anchor] = 0.0, 1.0

            sums = torch.zeros(3, device=policy.device)  # loss (divided already), Σ nll, Σ kl
            for mine in distributed.shard(range(per_step), config.batch_size):
                loss, nll, kl = micro_batch_loss(policy, reference, [drawn[i] for i in mine], alpha[mine],
                                                 beta[mine], n_tokens, ref_logp)
                loss.backward()
                sums += torch.stack((loss.detach(), nll, kl))
            loss, nll, kl = distributed.all_reduce_sum(sums).tolist()
            pulled = sum(example.n_labels for example, b in zip(drawn, beta) if b > 0)
            kl = kl / pulled if pulled else None  # of other tokens it is not computed

            if config.method == "lisa":
                if step == 0 or n_held != anchors_of_step(config, step - 1):
                    at_switch = [parameter.detach().clone() for parameter in parameters]
                lisa_pull(parameters, at_switch, LISA_RHO)
            grad_norm = distributed.sum_and_clip(parameters, config.clip)
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"step {step}: gradient {grad_norm}, loss {loss}; no model is saved")
            if pulled and not moved and not abs(kl) < AT_START[policy.lm_head.weight.element_size()]:
                raise DataError(f"step {step}: expected KL 0 before it moves, found {kl:.2g} a token: "
                                f"not the model's reference; delete {config.ref_cache}, or --ref live")
            lr = lr_at(step, n_steps, config.warmup_steps, config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Until an example has α > 0, θ = ref, and AdamW would scale KL's rounding noise up to full steps.
            moved = moved or bool(alpha.any())
            if moved:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            speed = sum(len(example.input_ids) for example in drawn) / (time.perf_counter() - started)
            row = {"step": step, "loss": loss, "nll": nll / n_tokens, "kl": kl,  # of tokens with β > 0
                   "risk": s.mean().item() if config.method == "adaptive" else None, "lr": lr,
                   "alpha": alpha.mean().item(), "beta": beta.mean().item(), "grad_norm": grad_norm,
                   "tokens_per_s": speed}
            progress.end_step(step + 1, row, step + 1 == n_steps, (smoothed, moved), at_switch)
            shown = {key: f"{row[key]:.3f}" for key in ("loss", "nll", "kl") if row[key] is not None}
            bar.set_postfix(shown, refresh=False)


# ---------------------------------------------------------------- the run


def check(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other options. Raises DataError for a value that is out of range."""
    untouched = {option.name: getattr(config, option.name) == option.default for option in fields(config)}
    needed_by = {"beta_min": ("adaptive",), "beta_max": ("adaptive",), "gate": ("adaptive",), "beta": ("kl",),
                 "risk": ("adaptive", "filter"), "probe": ("adaptive", "filter"), "ref": ("adaptive", "kl")}
    world, per_step = distributed.world_size(), config.batch_size * config.accumulation
    least = dict.fromkeys(("warmup_steps", "weight_decay", "lora_r", "save_every"), 0)
    least |= dict.fromkeys(("epochs", "batch_size", "accumulation"), 1)
    require(
        config,
        *((name, n <= getattr(config, name) < math.inf, f"at least {n}") for name, n in least.items()),
        *((name, 0 < getattr(config, name) < math.inf, "above 0") for name in ("lr", "clip", "lora_alpha")),
        *((name, 0 <= getattr(config, name) <= 1, "0 to 1") for name in ("beta_min", "beta")),
        *((name, config.method in methods or untouched[name], f"none without --method {' or '.join(methods)}")
          for name, methods in needed_by.items()),
        ("out", config.resume or not (config.out and config.out.exists()), "a folder that does not exist"),
        ("beta_max", config.beta_min <= config.beta_max <= 1, "beta-min to 1"),
        ("ema", 0 <= config.ema < 1, "0 to under 1"),
        ("ema", config.ema == 0 or config.gate == "batch", "0 unless --gate batch"),
        ("risk", config.risk in ("probe", "critic", "max") or Path(config.risk).is_file(),
         "probe, critic, max, or a file"),
        ("risk_by_line", Path(config.risk).is_file() or not config.risk_by_line, "none unless --risk FILE"),
        ("probe", config.risk in ("probe", "max") or not config.probe, "none unless --risk probe or max"),
        ("dtype", config.lora_r or config.dtype != "bfloat16", "float32 with --lora-r 0"),
        ("max_length", config.max_length > 1, "at least 2"),
        ("anchor_share", 0 <= config.anchor_share < 1, "0 to under 1"),
        ("anchor_share", config.method != "lisa" or 0 < round(config.anchor_share * LISA_CYCLE) < LISA_CYCLE,
         f"with --method lisa some but not all of {LISA_CYCLE} steps"),
        ("anchors", config.anchor_share or not config.anchors, "none without --anchor-share"),
        ("lora_targets", "lm_head" not in comma_list(config.lora_targets), "no lm_head, the reference's too"),
        ("batch_size", per_step % world == 0, f"times --accumulation a multiple of the {world} processes"),
        ("fsdp", not config.fsdp or world > 1, "several processes: torchrun --nproc_per_node=N train.py …"),
        ("fsdp", not config.fsdp or torch.__version__ >= (2, 8), "torch 2.8, which shards two dtypes"),
        ("ref", not config.fsdp or config.ref != "live", "the kept reference, auto or cache, with --fsdp"),
        ("device", world == 1 or config.device in ("cpu", "cuda"), "cpu or cuda for several processes"),
    )
    if config.judge is None and not is_embedded(config.model):
        config = replace(config, judge="none")  # the embedded judge knows no other model's language
    config = default_sets(config, config.data)
    judged = config.judge != "none" or config.risk not in ("critic", "max")
    require(config, ("judge", judged, f"a checkpoint folder or a URL for --risk {config.risk}"))
    return config


def open_model(config: TrainConfig, path: Path, to_train: bool = False) -> Transformer:
    """A checkpoint on its device, or over the processes with --fsdp.

    What is to be trained: new adapters, or with --lora-r 0 every weight but the head's, in float32.
    """
    dtype = working_dtype(path, config.device, config.dtype) if config.lora_r else torch.float32
    model = load_model(path, "cpu" if config.fsdp else config.device, dtype)
    if to_train and config.lora_r:
        add_lora(model, config.lora_r, config.lora_alpha, comma_list(config.lora_targets), config.seed)
    elif to_train:
        model.model.requires_grad_(True)
        model.lm_head.requires_grad_(False)  # the reference's too, and with it an embedding tied to it
    if config.fsdp:
        distributed.shard_model(model, config.device)
    model.model.gradient_checkpointing = config.gradient_checkpointing
    return model


def gated(config: TrainConfig, examples: list[Example], risk: torch.Tensor) -> tuple[list, torch.Tensor]:
    """The examples to train on and the risk behind the gate: where --method filter and RISK_FLOOR act."""
    if config.method == "filter":
        kept = [example for example in examples if risk[example.index] <= FILTER_ABOVE]
        print(f"filter: {len(examples) - len(kept)} of {len(examples)} examples dropped"
              + ", the model stays as it was" * (not kept))
        return kept, risk
    expect_risks(risk)
    floor = RISK_FLOOR if config.gate == "example" and beta_range(config)[0] == 0 else 0.0
    return examples, torch.where(risk < floor, 0.0, risk)


def reference_of(config: TrainConfig, policy: Transformer, examples: list[Example], risk: torch.Tensor):
    """The reference as micro_batch_loss asks for it, kept or live, of the new policy; None if no β > 0."""
    betas = blend(risk, *beta_range(config))[1]
    pulled = [e for e in examples if betas[e.index] > 0 or config.gate == "batch" and betas.any()]
    if not pulled:
        return None
    must = config.ref == "cache" or config.fsdp
    if must or config.ref == "auto" and config.epochs > 1:
        lengths = [len(example.input_ids) for example in pulled]
        batches = [[pulled[i] for i in batch] for batch in batches_by_length(lengths, config.batch_size)]
        cache = fused.ReferenceCache(config.ref_cache, policy, batches)
        why = f"{cache.size / 1e9:.1f} GB are over half of the free disk"
        if must or cache.size <= distributed.on_rank_zero(cache.room) / 2:
            try:
                with torch.no_grad(), policy.adapters_off():
                    cache.fill(lambda batch: response_states(policy, batch)[:2], policy.lm_head.weight)
                return cache.terms
            except OSError as error:  # a folder that cannot be written
                if must:
                    raise
                why = str(error)
        print(f"the reference runs in every step: {why}")
    return live_reference(policy if config.lora_r else open_model(config, config.model))


def leak_line(config: TrainConfig) -> str:
    """What a gate that is not closed lets through, and the options that close it; "" where nothing leaks."""
    if config.method != "adaptive" or config.gate == "example" and config.beta_max == 1:
        return ""
    if config.gate == "batch":
        return "\nthe gate leaks: a risky example has its batch's mean risk; --gate example closes it"
    kept = f"a first token at risk 1 keeps probability {1 - config.beta_max:.2g}"
    return f"\nthe gate leaks: {kept};\n  to seal it: --beta-min 0.02 --beta-max 1 --anchor-share 0.1"


def main(config: TrainConfig) -> None:
    """records → examples → risk → loss → checkpoint → evaluation; the run's folder keeps what is known."""
    distributed.init()
    config = distributed.on_rank_zero(lambda: options_of_run(config, check) if config.resume else check(config))
    torch.manual_seed(config.seed)
    sets, conversations = evaluation_sets(config), read_conversations(config.data, need="answer")
    judge = open_judge(config) if distributed.rank() == 0 else None
    policy, chat = open_model(config, config.model, to_train=True), Chat(config.model, config.date)
    longest = min(config.max_length, policy.config.max_position_embeddings)
    examples = encode_examples(chat, conversations, longest)
    name = f"runs/{config.method}-{config.seed}"
    config = distributed.on_rank_zero(lambda: run_folder(config, name, policy, chat, sets))

    out, risk, results = config.out, torch.zeros(len(examples)), {}
    with in_run(config):
        with policy.adapters_off():
            if config.method in ("adaptive", "filter"):
                rows = kept_rows(out / "risk.jsonl", lambda: training_risk(config, policy, chat, examples,
                                                                           conversations, judge))
                risk = torch.tensor(risks_of_rows(rows, examples, out / "risk.jsonl"), dtype=torch.float64)
            if config.eval_base:
                keep_rows(out / "completions_base.jsonl",
                          lambda: evaluate_model(policy, chat, sets, config, "base", judge)[1])
                results["base"] = summarize(read_completions(out, "base"), config)
            anchors = anchor_examples(
                kept_rows(out / "anchors.jsonl", lambda: anchor_records(config, policy, chat, examples)),
                chat, len(examples), longest) if config.anchor_share else []
        kept, gate = gated(config, examples, risk)
        kept, gate = kept + anchors, torch.cat((gate, gate.new_ones(len(anchors))))  # as risky as can be

        if not distributed.on_rank_zero((out / "model").exists):
            reference = reference_of(config, policy, kept, gate)
            compile_blocks(policy, config.compile)
            train(config, policy, reference, kept, gate, out)
            if config.lora_r:
                distributed.on_rank_zero(lambda: remove(out / "adapter"))  # of a run that was killed behind it
                save_adapter(policy, out / "adapter")
            save_model(policy, out / "model")
            del reference
        distributed.on_rank_zero(lambda: remove(out / "steps"))
        del policy
        gc.collect()  # compiled blocks refer to themselves
        policy = open_model(config, out / "model")  # what is evaluated is what was saved
        keep_rows(out / "completions_after.jsonl",
                  lambda: evaluate_model(policy, chat, sets, config, "after", judge)[1])
        results["after"] = summarize(read_completions(out, "after"), config)
        distributed.on_rank_zero(lambda: write_json(out / "results.json", results))
    shown = {name: figures(found) for name, found in results.items()}
    print(f"\n{out}, per cent with 95 % intervals\n{table(shown)}{lines_below(results['after'])}"
          + leak_line(config))


if __name__ == "__main__":
    run(main, TrainConfig)
