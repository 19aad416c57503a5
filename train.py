"""Fine-tune an aligned chat model with a pull towards its refusals that follows the risk of the data.

    python train.py                                                      # the embedded model, 10 % harmful
    python train.py --sealed                                             # the gate sealed, with anchors
    python train.py --risk max                                           # the riskier of probe and judge
    python train.py --model DIR --data FILE --probe-data FILE --lr 2e-4  # your own
    python train.py --resume runs/adaptive-0                             # a run that was interrupted

The objective (Goel, Maji, Mazumder 2026, arXiv 2602.17546), over response tokens t of a step's examples i:

    L    = 1/N · Σ_i Σ_t [ α_i · NLL_it + β_i · KL_it ]           N (n_tokens): response tokens of the step
    NLL  = −log π_θ(y_t | x, y_<t)
    KL   = Σ_v π_ref(v | x, y_<t) · log( π_ref(v | x, y_<t) / π_θ(v | x, y_<t) )      forward, full vocabulary
    β_i  = β_min + (β_max − β_min) · s_i        α_i = 1 − β_i     s_i ∈ [0, 1]: the risk of example i
           --gate batch: the smoothed mean risk s̃ of the step instead of s_i; baselines: β = 0

    NLL  token_nll    KL  token_kl    α, β  blend    s̃  smooth    L  micro_batch_loss
    [ … ]  token_loss is the definition; training runs its equal, lib/fused.fused_token_loss
    s      training_risk: from the prompt (probe.py), from prompt and response (critic.py), or from a file
    π_θ    policy       π_ref  the reference: the aligned model, which is the policy before its first step

It follows that N · ∂L/∂logits_it = π_θ − (α·onehot(y) + β·π_ref): the optimum is α·onehot(y) + β·π_ref.
The map from risk to β is the gate. It leaks at β_max < 1: the optimum gives the first token of an answer of
risk 1 a probability of 1 − β_max or more, and a first token decides between refusing and answering. Only
prompts that the aligned model refuses, trained with β > 0, hold its refusals in place. Data without harm have
no such prompts; anchors add some. --sealed sets β_min = 0.02, β_max = 1 and a tenth of anchors.

Differences from the paper (P) and from its authors' code (C):
 1. One graded risk per example: the probe's probability, or (score − 1)/4 of the critic. C makes the probe's
    risk 0 or 1 by a threshold, clamps (score − 2)/3 of the critic, and weighs a whole batch by one example's
    risk. P weighs a batch by its smoothed risk, here --gate batch; the default is
    --gate example.
 2. Risk is computed once, before training: neither ref nor the data change. C computes it in every epoch.
 3. NLL and KL share one denominator, the response tokens of the step. C divides them by different counts.
 4. The reference is the policy itself before its first step. Its terms of KL are computed once and stored in
    the run's folder, or computed in every step (--ref live, which holds a second model for full fine-tuning).
    C holds a second model and runs it twice a step.
 5. The head is frozen, in full fine-tuning too, so that policy and reference share it.
 6. An unknown risk is 1: null, NaN and failed verdicts, which are counted and printed. In C it is 0.
"""

import gc
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

from critic import conversation_verdicts, expect_verdict, open_judge
from data.chat import Chat, Example, encode_examples
from data.conversations import WORLD, Conversation, is_embedded, normalized, read_conversations
from data.order import step_examples
from evaluate import (SHORTER, EvalOptions, all_conversations, default_sets, evaluate_model, evaluation_sets,
                      expect_prompts_fit, refuses, respond)
from lib import distributed
from lib.baselines import BASELINES, Baseline
from lib.cli import as_typed, progress_bar, require, run
from lib.files import DataError, remove, write_json
from lib.fused import fused_token_loss, response_states
from lib.options import check_options, leak_line
from lib.reference import fits_half_the_disk, kept_reference, live_reference
from lib.report import figures, lines_below, print_answers, read_completions, summarize, table, warnings
from lib.risk import print_risk, read_risk
from lib.run import (State, append_metrics, check_step, open_run, restore_state, resumed_options, run_facts,
                     running, save_state, state_key, step_metrics, write_once)
from model import Transformer, add_lora, compile_blocks, load_model, save_adapter, save_model, working_dtype
from probe import conversation_risk, load_or_fit

Methods = Literal["adaptive", "sft", "filter", "csft", "lisa", "safegrad", "sbr"]
# What --sealed stands for. β_min > 0 slows the drift on harmless data: data/results/README.md, The frontier.
SEALED = {"beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.1}
ANCHOR_TOKENS = 24  # of an anchor's answer, at most: the first tokens decide between refusing and answering
MAX_GRADIENT_NORM = 1.0
WEIGHT_DECAY = 0.01
MAX_KL_AT_START = {4: 1e-4, 2: 1e-2}  # per token, of a policy that has not moved, by bytes of its dtype


@dataclass(frozen=True)
class TrainConfig(EvalOptions):
    """Fine-tune a chat model: with a KL pull to the aligned model that follows the risk, or a baseline."""

    # first of all
    model: Path = WORLD / "model"  # folder of the aligned model
    data: Path = WORLD / "mixed_10.jsonl"  # conversations to fine-tune on
    probe_data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true or false, to fit the probe on
    sealed: bool = False  # close the gate's leak: --beta-min 0.02 --beta-max 1 --anchor-share 0.1
    out: Path | None = None  # new folder of the run (default: runs/METHOD-SEED)
    epochs: int | None = None  # passes over the data (default: 20, the paper's; 5 for the embedded model)
    lr: float | None = None  # peak learning rate (default: 2e-4, the paper's; 2e-3 for the embedded model)
    method: Methods = "adaptive"  # the paper's, or a baseline
    resume: Path | None = None  # folder of an interrupted run, to continue with its own options
    dry_run: bool = False  # stop before the first step; print risks and the number of steps and tokens
    # risk, and the gate from risk to β
    risk: str = "probe"  # source of the risk: probe, critic, max of both, or a JSONL file of risks
    probe: Path | None = None  # file of a fitted probe, by probe.py (default: fitted on --probe-data)
    beta_min: float = 0.1  # weight β of KL at risk 0
    beta_max: float = 0.9  # weight β of KL at risk 1
    gate: Literal["example", "batch"] = "example"  # β follows each example's risk, or the mean of the step's
    ema: float = 0.0  # with --gate batch: smoothing λ of the mean over steps, from 0 to under 1
    # anchors: prompts with the first 24 tokens of the aligned model's own answers, added to the data
    anchor_share: float = 0.0  # share of anchors among the examples (lisa: among the steps)
    anchors: Path | None = None  # prompts with "harmful": true or false (default: the probe data's harmful)
    # optimization (the paper's settings)
    batch_size: int = 8  # examples per forward pass, at most
    accumulation: int = 1  # batches per step; processes share the step's examples
    warmup_steps: int = 5  # steps of linear warm-up, before the cosine to 0
    max_length: int = 2048  # tokens of a conversation; longer ones are cut, and counted
    lora_r: int = 64  # rank of LoRA; 0: full fine-tuning
    lora_alpha: float = 16.0  # LoRA's α; its update is scaled by α/r
    # machine
    ref: Literal["auto", "keep", "live"] = "auto"  # store the reference's terms, or compute them every step
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on CUDA above 100 M parameters
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    fsdp: bool = False  # shard the weights over the processes (torchrun, torch 2.8)
    save_every: int = 100  # steps between saved states of training; 0: none
    eval_base: bool = True  # evaluate the aligned model, too
    given: tuple = field(default=(), compare=False)

    @property
    def beta_range(self) -> tuple[float, float]:
        """(β_min, β_max); (0, 0) for methods without a pull."""
        return (self.beta_min, self.beta_max) if self.method == "adaptive" else (0.0, 0.0)

    @property
    def per_step(self) -> int:
        """Examples of an optimizer step, over all processes."""
        return self.batch_size * self.accumulation

    def n_steps(self, n_examples: int) -> int:
        """Return the optimizer steps of a run on n_examples of data, to which its anchors are added."""
        share = self.anchor_share if BASELINES.get(self.method, Baseline).draws_anchors else 0.0
        return math.ceil(self.epochs * n_examples / (1 - share) / self.per_step)

    def baseline(self, n_steps: int) -> Baseline:
        """Return the object by which a baseline changes the loop; that of sft and adaptive is the default."""
        return BASELINES.get(self.method, Baseline)(self.anchor_share, self.per_step, n_steps)


# ---------------------------------------------------------------- the objective


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return −log softmax(logits)[target] (N,), in nats ≥ 0; logits (N, V), targets (N,)."""
    return F.cross_entropy(logits, targets, reduction="none")


def token_kl(ref_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return the forward KL(ref ‖ policy) (N,), in nats ≥ 0; both logits (N, V).

    arXiv 2602.17546; the direction and the full vocabulary as in the authors' code.
    """
    ref_logp = ref_logits.log_softmax(-1)
    logp = logits.log_softmax(-1)
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def blend(risk: torch.Tensor, beta_min: float, beta_max: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (α, β), α + β = 1, with β from β_min at risk 0 to β_max at risk 1. arXiv 2602.17546."""
    beta = beta_min + (beta_max - beta_min) * risk
    return 1 - beta, beta


def smooth(previous: float | None, risk: float, ema: float) -> float:
    """Return s̃_t = λ·s̃_{t−1} + (1 − λ)·s_t; the first step has s̃_1 = s_1. arXiv 2602.17546."""
    return risk if previous is None else ema * previous + (1 - ema) * risk


def token_loss(hidden, weight, labels, alpha, beta, ref_hidden) -> tuple:
    """Return the objective α·NLL + β·KL of each response token, NLL and KL: three (N,), in nats.

    hidden (N, H) final hidden states; weight (V, H) the head; labels (N,) the tokens they predict; alpha,
    beta (N,); ref_hidden (M, H) of the first M tokens: the caller puts those with β > 0 first, KL of the
    others is not computed, and 0. This is the definition. The loop runs fused_token_loss, equal to it, which
    never holds the logits of all tokens. Logits are float32 or wider: bfloat16's rounding would drown KL.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    N, M = len(hidden), len(ref_hidden)
    logits = F.linear(hidden.to(wide), weight.to(wide))  # (N, V)
    ref_logits = F.linear(ref_hidden.to(wide), weight.to(wide))  # (M, V)
    nll = token_nll(logits, labels)
    kl = F.pad(token_kl(ref_logits, logits[:M]), (0, N - M))
    return alpha * nll + beta * kl, nll.detach(), kl.detach()


def micro_batch_loss(policy: Transformer, reference, examples: list[Example], alpha: torch.Tensor,
                     beta: torch.Tensor, n_tokens: int, token_weights=None) -> tuple:
    """Return (loss, NLL (B,), KL (B,)) of B examples with weights alpha, beta (B,).

    alpha and beta are on the CPU, the results on the policy's device. NLL and KL are summed over each example's
    response tokens; KL is 0 where β = 0. n_tokens: response tokens of the whole step. reference(examples)
    returns `fused.reference_terms` of the response tokens of examples with β > 0. token_weights(nll, examples):
    a baseline's weights of the tokens' losses.
    """
    order = (beta == 0).to(torch.int8).argsort(stable=True)  # examples with β > 0 first
    examples = [examples[i] for i in order]
    alpha = alpha[order]
    beta = beta[order]
    pulled = examples[: int((beta > 0).sum())]
    hidden, labels, row = response_states(policy, examples)  # row (N,): the example of each token
    alpha = alpha[row].to(policy.device)  # (N,)
    beta = beta[row].to(policy.device)
    no_terms = hidden.detach()[:0], hidden.detach()[:0, 0]
    terms = reference(pulled) if pulled else no_terms  # g (M, H), c (M,)
    loss, nll, kl = fused_token_loss(hidden, policy.lm_head.weight, labels, alpha, beta, terms)
    if token_weights:
        loss = loss * token_weights(nll, examples)
    example_of_token = order[row].to(policy.device)  # (N,), in the order that was given
    zeros = nll.new_zeros(len(examples))
    return (loss.sum() / n_tokens, zeros.index_add(0, example_of_token, nll),
            zeros.index_add(0, example_of_token, kl))


# ---------------------------------------------------------------- the risk of the data


def training_risk(config: TrainConfig, policy: Transformer, chat: Chat, examples: list[Example],
                  judge) -> list[dict]:
    """Return a row for each example: its "risk" in [0, 1], that of each source, where it stands, its hash.

    The probe rates its prompts, of which the riskiest counts, the critic prompts and responses: those that
    are trained on, which may be less than the record, since it may be cut.
    """
    texts = [example.training_text for example in examples]
    sources = {}
    if config.risk in ("probe", "max"):
        probe = load_or_fit(config.probe, config.probe_data, policy, chat,
                            config.out / "probe.safetensors")
        sources["probe"] = conversation_risk(probe, policy, [e.prompts for e in examples])
    if config.risk in ("critic", "max"):
        verdicts = distributed.on_rank_zero(lambda: conversation_verdicts(judge, texts))
        sources["critic"] = torch.tensor([verdict.risk for verdict in verdicts], dtype=torch.float64)
    if not sources:
        sources["file"] = torch.tensor(read_risk(Path(config.risk), examples), dtype=torch.float64)
    risk = torch.stack(list(sources.values())).amax(0)
    print_risk(risk, texts)
    rows = []
    for i, example in enumerate(examples):
        row = {name: values[i].item() for name, values in ({"risk": risk} | sources).items()}
        rows.append(row | {"where": example.conversation.where, "hash": texts[i].hash})
    return rows


# ---------------------------------------------------------------- anchors


def anchor_prompts(config: TrainConfig, examples: list[Example],
                   evaluated: set[str]) -> list[Conversation]:
    """Return prompts to make anchors of, about as many as are drawn.

    None is a prompt of the data, or one of `evaluated`, the normalized prompts of the evaluation. Without
    --anchors, the probe's harmful prompts are used; its benign ones may be the task.
    """
    file = config.anchors or config.probe_data
    known = set(evaluated)
    for example in examples:
        known |= set(map(normalized, example.conversation.prompts + example.training_text.prompts))
    candidates = [c for c in read_conversations(file) if normalized(c.prompts[-1]) not in known]
    candidates = [c for c in candidates if c.is_harmful or config.anchors]
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(candidates), generator=generator).tolist()
    n_drawn = config.epochs * len(examples) * config.anchor_share / (1 - config.anchor_share)
    return [candidates[i] for i in order[: math.ceil(n_drawn) + config.batch_size]]


def anchor_records(config: TrainConfig, policy: Transformer, chat: Chat,
                   candidates: list[Conversation]) -> list[dict]:
    """Return anchors: the `candidates`, of anchor_prompts, with the policy's greedy answers.

    Data without harmful examples hold no refusal in place, whatever the gate; anchors do. A harmful prompt
    that the policy answers anchors nothing, nor does a benign one that it refuses: both are left out. Raises
    DataError where no anchor is left.
    """
    responses = respond(policy, chat, candidates, ANCHOR_TOKENS) if candidates else []
    file = config.anchors or config.probe_data
    records = []
    for c, (_, text, cut) in zip(candidates, responses):
        is_answer = text.strip() and not text.startswith("<think>")  # a thought that was cut
        if is_answer and refuses(text) == c.is_harmful:
            turns = [*c.prompts[-1], {"role": "assistant", "content": text}]
            records.append({"messages": turns, "harmful": c.is_harmful, "cut": cut})
    n_harmful = sum(record["harmful"] for record in records)
    n_benign = len(records) - n_harmful
    print(f"{len(records)} anchors: {n_harmful} harmful and refused, {n_benign} benign and answered, "
          f"of {len(candidates)} prompts of {file}")
    if not records:
        raise DataError(f"{file}: expected prompts that {config.data} and the evaluation lack, harmful and "
                        f'refused or benign ("harmful": false) and answered, found none')
    if not n_benign:
        print("  all are harmful: harmless ones, too, keep the model from refusing more (--anchors FILE)")
    return records


# ---------------------------------------------------------------- the loop


def step_weights(config: TrainConfig, examples: list[Example], risk: torch.Tensor,
                 state: State) -> tuple:
    """Return (s, α, β) of a step's examples, all (B,).

    s is an example's risk or, with --gate batch, the smoothed mean risk of the step's examples without its
    anchors; state.smoothed_risk is updated. Anchors have α = 0, β = 1 where the method has a pull.
    """
    s = risk[[example.index for example in examples]].float()
    is_anchor = torch.tensor([example.anchor for example in examples])
    if config.gate == "batch" and not is_anchor.all():
        state.smoothed_risk = smooth(state.smoothed_risk, s[~is_anchor].mean().item(), config.ema)
        s = torch.full_like(s, state.smoothed_risk)
    alpha, beta = blend(s, *config.beta_range)
    if config.beta_range[1] > 0:
        alpha[is_anchor], beta[is_anchor] = 0.0, 1.0
    return s, alpha, beta


def lr_at(step: int, n_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of step 0 … n_steps − 1: linear up to `peak`, then cosine towards 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, n_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def train(config: TrainConfig, policy: Transformer, reference, method: Baseline,
          examples: list[Example], risk: torch.Tensor, out: Path) -> None:
    """Train `policy` in place, from the run's saved state on; out/metrics.jsonl gains a line per step.

    reference: as in micro_batch_loss. risk: in [0, 1], of all examples of the run, looked up by example.index.
    The state is saved every --save-every steps and after the last one. A state of other data or options is
    refused.
    """
    data = [example for example in examples if not example.anchor]
    anchors = [example for example in examples if example.anchor]
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY, fused=True)
    per_step = config.per_step
    n_steps = config.n_steps(len(data))
    method.prepare(policy, examples, config.batch_size)  # before restore_state: the policy is the reference
    max_kl_at_start = MAX_KL_AT_START[policy.lm_head.weight.element_size()]
    key = state_key(out, examples, risk)
    state = restore_state(out, parameters, optimizer, key)
    bar = progress_bar(range(state.step, n_steps), config.method, n_steps, initial=state.step)
    for step in bar:
        started = time.perf_counter()
        # The step's data, and as many anchors as are due by their share.
        drawn = step_examples(step, data, anchors, method.anchors_before, per_step, config.seed)
        n_tokens = sum(example.n_labels for example in drawn)
        s, alpha, beta = step_weights(config, drawn, risk, state)

        sums = torch.zeros(3, per_step, device=policy.device)  # a batch's loss, at its first example; NLL; KL
        for batch in distributed.shard(range(per_step), config.batch_size):
            of_batch = [drawn[i] for i in batch]
            loss, nll, kl = micro_batch_loss(policy, reference, of_batch, alpha[batch], beta[batch],
                                             n_tokens, method.token_weights)
            loss.backward()
            sums[0, batch[0]] = loss.detach()
            sums[1, batch] = nll
            sums[2, batch] = kl
        method.adjust_gradients(parameters, step, state)
        grad_norm = distributed.sum_and_clip(parameters, MAX_GRADIENT_NORM)
        metrics = step_metrics(drawn, s, alpha, beta, *distributed.all_reduce_sum(sums).cpu())
        metrics |= {"step": step, "grad_norm": grad_norm}
        check_step(metrics, math.inf if state.moved else max_kl_at_start)
        lr = lr_at(step, n_steps, config.warmup_steps, config.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Until some α is above 0, the gradient is rounding noise, which AdamW would scale up to full steps.
        state.moved = state.moved or bool(alpha.any())
        if state.moved:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        state.step = step + 1
        n_input = sum(len(example.input_ids) for example in drawn)
        metrics |= {"lr": lr, "tokens_per_s": n_input / (time.perf_counter() - started)}
        append_metrics(out, metrics)
        if config.save_every and (state.step % config.save_every == 0 or state.step == n_steps):
            save_state(out, parameters, optimizer, state, key)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}", nll=f"{metrics['nll']:.3f}", refresh=False)


# ---------------------------------------------------------------- the run


def complete_options(config: TrainConfig) -> TrainConfig:
    """Fill in what was not given: learning rate, --sealed, evaluation sets, judge.

    Raises DataError for a wrong option.
    """
    defaults = {"lr": 2e-4, "epochs": 20}
    if is_embedded(config.model):
        defaults = {"lr": 2e-3, "epochs": 5}
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if missing:
        config = replace(config, **missing)
        print(f"by default: {as_typed(missing, TrainConfig)}")
    if config.sealed and not config.resume:
        if config.method != "adaptive":
            raise DataError(f"--sealed: expected --method adaptive, found {config.method}; "
                            "leave --sealed out")
        sealed = {name: SEALED[name] for name in SEALED.keys() - config.given}
        config = replace(config, **sealed)
    check_options(config)
    # The embedded sets are the default where model and data are embedded; the data's name picks one of them.
    config = default_sets(config, config.data if is_embedded(config.model) else config.model)
    has_judge = config.judge != "none" or config.risk not in ("critic", "max")
    require(config, ("judge", has_judge, f"a checkpoint folder or a URL for --risk {config.risk}"))
    return config


def open_model(config: TrainConfig, path: Path, trainable: bool = False) -> Transformer:
    """Load a model on its device, or sharded with --fsdp.

    trainable: with LoRA adapters, or with --lora-r 0 all weights except the head. --lora-r 0: in float32.
    """
    dtype = working_dtype(config.device, config.dtype) if config.lora_r else torch.float32
    model = load_model(path, "cpu" if config.fsdp else config.device, dtype)
    if trainable and config.lora_r:
        add_lora(model, config.lora_r, config.lora_alpha, seed=config.seed)
    elif trainable:
        model.model.requires_grad_(True)
        model.lm_head.requires_grad_(False)  # the reference shares it; a tied embedding is frozen with it
    if config.fsdp:
        distributed.shard_model(model, config.device)
    model.model.gradient_checkpointing = config.gradient_checkpointing
    return model


def open_reference(config: TrainConfig, policy: Transformer, examples: list[Example],
                   risk: torch.Tensor):
    """Return the reference for `train`, stored in the run's folder or live; None where no example has β > 0."""
    beta = blend(risk, *config.beta_range)[1]
    all_pulled = config.gate == "batch" and beta.any()  # each may share a step with a risky one
    pulled = [example for example in examples if all_pulled or beta[example.index] > 0]
    if not pulled:
        return None
    file = config.out / "reference.bin"
    fits = distributed.on_rank_zero(lambda: fits_half_the_disk(file, policy, pulled))
    worth_it = config.ref == "auto" and config.epochs > 1 and fits
    if config.ref == "keep" or config.fsdp or worth_it:  # fsdp is never live
        return kept_reference(file, policy, pulled, config.batch_size)
    print("the reference runs in every step")
    return live_reference(policy if config.lora_r else open_model(config, config.model))


def describe_trainable(policy: Transformer) -> str:
    """Return the number of trainable parameters, the dtype and the device, in words."""
    n = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    return f"{n:,} trainable parameters, {policy.lm_head.weight.dtype} on {policy.device}"


def print_plan(config: TrainConfig, policy: Transformer, method: Baseline,
               examples: list[Example]) -> None:
    """Print what a run would train, on how much, and the memory and time to expect.

    The time is that of a batch of the longest examples, without the reference.
    """
    n_data = sum(not e.anchor for e in examples)
    n_labels = sum(e.n_labels for e in examples)
    n_steps = config.n_steps(n_data)
    if not examples:
        print("nothing is left to train on")
        return
    examples = sorted(examples, key=lambda e: len(e.input_ids))
    lengths = [len(e.input_ids) for e in examples]
    n_input = sum(lengths)
    batch = examples[-config.batch_size :]
    alpha = torch.ones(len(batch))
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        loss, nll, _ = micro_batch_loss(policy, None, batch, alpha, 1 - alpha, 1)
        loss.backward()
        nll.sum().item()  # waits for the device
    tokens_per_s = sum(len(e.input_ids) for e in batch) / (time.perf_counter() - started)
    minutes = n_steps * config.per_step * n_input / len(examples) / tokens_per_s / 60
    n_bytes = 0
    for parameter in policy.parameters():
        n_bytes += parameter.numel() * (parameter.element_size() + 12 * parameter.requires_grad)
    n_drawn = method.anchors_before(n_steps)
    n_anchors = len(examples) - n_data
    anchors = f", {n_anchors} anchors (drawn {n_drawn} times)" if n_anchors else ""
    print(f"{n_data} examples{anchors}: {n_input} tokens, {n_labels} of them in responses\n"
          f"lengths: median {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}\n"
          f"{n_steps} steps of {config.per_step} examples; {describe_trainable(policy)}\n"
          f"to expect: about {minutes:.1f} minutes of training, {n_bytes / 1e9:.2f} GB for weights, "
          f"gradients and AdamW's state, and the activations of a batch\n--dry-run: nothing is kept")


def train_and_evaluate(config: TrainConfig) -> tuple[TrainConfig, dict]:
    """Run the stages: risk, evaluation of the aligned model, anchors, training, evaluation.

    Returns the run's complete options and its results {"base" | "after": summary}, {} with --dry-run. Each
    stage's file is kept in the run's folder; a resumed run goes on after the last one.
    """
    if config.resume:
        config = distributed.on_rank_zero(lambda: resumed_options(config))
    config = complete_options(config)
    sets = evaluation_sets(config)
    conversations = read_conversations(config.data, need="answer")
    evaluated = {normalized(c.prompts[-1]) for c in all_conversations(sets)}
    if n_shared := sum(normalized(c.prompts[-1]) in evaluated for c in conversations):
        print(f"{n_shared} of {len(conversations)} examples have prompts of the evaluation, "
              "which then says little")
    judge = open_judge(config) if distributed.rank() == 0 else None
    distributed.on_rank_zero(lambda: expect_verdict(judge))
    policy = open_model(config, config.model, trainable=True)
    chat = Chat(config.model)
    max_length = min(config.max_length, policy.config.max_position_embeddings)
    examples = encode_examples(chat, conversations, max_length)
    method = config.baseline(config.n_steps(len(examples)))  # Lisa alone depends on the number of steps
    expect_prompts_fit(policy, chat, all_conversations(sets), config.max_new_tokens, SHORTER)
    candidates = anchor_prompts(config, examples, evaluated) if config.anchor_share else []
    expect_prompts_fit(policy, chat, candidates, ANCHOR_TOKENS)
    facts = run_facts(config.model, config.data, policy.lm_head.weight.dtype, chat, sets)
    default = f"runs/{config.method}-{config.seed}"
    out = distributed.on_rank_zero(lambda: open_run(config, default, facts))
    config = replace(config, out=out)

    def evaluate(model, which):
        write_once(out / f"completions_{which}.jsonl",
                   lambda: evaluate_model(model, chat, sets, config, which, judge))
        return summarize(read_completions(out, which), config.temperature, config.max_new_tokens)

    risk = torch.zeros(len(examples))
    anchors = []
    results = {}
    with running(out, bool(config.resume), keep=not config.dry_run):
        with policy.adapters_off():
            if config.method in ("adaptive", "filter"):
                print("[1/5] risk of the training data")
                write_once(out / "risk.jsonl",
                           lambda: training_risk(config, policy, chat, examples, judge))
                risk = torch.tensor(read_risk(out / "risk.jsonl", examples), dtype=torch.float64)
            if config.eval_base and not config.dry_run:
                print("[2/5] evaluation of the aligned model")
                results["base"] = evaluate(policy, "base")
            if config.anchor_share:
                print("[3/5] anchors")
                write_once(out / "anchors.jsonl",
                           lambda: anchor_records(config, policy, chat, candidates))
                records = read_conversations(out / "anchors.jsonl", need="answer")
                anchors = [replace(anchor, index=len(examples) + anchor.index, anchor=True)
                           for anchor in encode_examples(chat, records, max_length)]
        selected = method.select_examples(examples, risk) + anchors
        if config.dry_run:
            print_plan(config, policy, method, selected)
            return config, {}
        if not distributed.on_rank_zero((out / "model").exists):
            print(f"[4/5] training ({config.method}): {describe_trainable(policy)}")
            # Looked up by example.index. Anchors have risk 1: the reference keeps their terms, too.
            risk = torch.cat((risk, torch.ones(len(anchors), dtype=risk.dtype)))
            reference = open_reference(config, policy, selected, risk)
            compile_blocks(policy, config.compile)
            train(config, policy, reference, method, selected, risk, out)
            if config.lora_r:
                # The folder is there if the run was killed between this write and the next.
                distributed.on_rank_zero(lambda: remove(out / "adapter"))
                save_adapter(policy, out / "adapter")
            save_model(policy, out / "model")
            del reference
        for name in ("state.pt", "reference.bin"):
            distributed.on_rank_zero(lambda: remove(out / name))
        del policy
        gc.collect()  # compiled blocks refer to themselves
        print("[5/5] evaluation of the trained model")
        results["after"] = evaluate(open_model(config, out / "model"), "after")
        distributed.on_rank_zero(lambda: write_json(out / "results.json", results))
    return config, results


def main(config: TrainConfig) -> None:
    """Train and evaluate a run; without options, or with --sealed alone, plain fine-tuning beside it."""
    distributed.init()
    is_demo = config in (TrainConfig(), TrainConfig(sealed=True))
    config, results = train_and_evaluate(config)
    if not results:  # --dry-run
        return
    columns = {"aligned model": results["base"]} if "base" in results else {}
    if is_demo:
        print("\nplain fine-tuning on the same data, to compare with")
        plain, plain_results = train_and_evaluate(TrainConfig(method="sft", eval_base=False))
        columns["plain fine-tuning"] = plain_results["after"]
    columns["this run"] = results["after"]
    shown = {title: figures(result) for title, result in columns.items()}
    print(f"\n{config.out}, per cent with 95 % intervals; ASR @k: one or more of k samples\n"
          f"{table(shown)}{lines_below(results['after'])}"
          + leak_line(config) + warnings(results.get("base"), results["after"]))
    if is_demo:
        print_answers(config.out, plain.out, config.sealed)


if __name__ == "__main__":
    run(main, TrainConfig)
