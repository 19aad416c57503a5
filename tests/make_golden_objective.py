"""Make tests/golden/objective.safetensors: each equation of the method, its inputs, its results in float64.

    python tests/make_golden_objective.py [FILE]    # needs torch and safetensors, nothing of this project

Written from the equations in the most obvious way, gradients by autograd, the probe by Newton's method: an
oracle for train.py, probe.py, critic.py, lib/fused.py and what they are ported to. tests/golden/README.md
lists keys, shapes and equations. Weights, logits and features are multiples of 1/64, hence exact in float32.
The same torch on the same kind of machine gives the same bytes, others the same numbers to 1e-12.

The model is the smallest that shows all that the objective needs: token → row x of an embedding → one linear
layer with LoRA, h = W₀ x + (α_lora / r) B A x → head, logits = W h. It has no attention (tests/golden/FAMILY
has whole transformers), so that a prediction depends on one token. It has padding, labels that are to be
shifted, turns of one and of several response tokens, a reference that is the policy without its adapter, a
frozen head, and gradients that reach A and B through h.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

FILE = Path(__file__).parent / "golden" / "objective.safetensors"
GATES = [[0.1, 0.9], [0.02, 1.0], [0.0, 1.0]]  # (beta_min, beta_max): the paper's, sealed, closed
IGNORE = -100  # the label of what is not trained on


def numbers(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Random multiples of 1/64, about normal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale * 64).round() / 64


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- the objective


def nll_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log softmax(logits)[label]: (N, V), (N,) → (N,)."""
    return -logits.log_softmax(-1)[torch.arange(len(labels)), labels]


def kl_of(ref_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Σ_v p_ref(v) · (log p_ref(v) − log p(v)): (N, V), (N, V) → (N,)."""
    ref_logp, logp = ref_logits.log_softmax(-1), logits.log_softmax(-1)
    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)


def gate() -> dict:
    """Risk → β = β_min + (β_max − β_min) · s, α = 1 − β, at each of GATES."""
    ranges, risk = double(GATES), double([0.0, 1.0, 0.5, 0.25, 0.37, 1e-9, 1 - 1e-9])
    beta = ranges[:, :1] + (ranges[:, 1:] - ranges[:, :1]) * risk
    return {"range": ranges, "risk": risk, "alpha": 1 - beta, "beta": beta}


def smoothing() -> dict:
    """s̃_t = λ · s̃_{t−1} + (1 − λ) · s_t, s̃_1 = s_1, for each λ."""
    ema, risk = double([0.0, 0.5, 0.9]), double([0.25, 1.0, 0.0, 0.0, 0.625, 1.0, 0.03125])
    smoothed = risk[:1].expand(3)
    result = [smoothed]
    for s in risk[1:]:
        smoothed = ema * smoothed + (1 - ema) * s
        result.append(smoothed)
    return {"ema": ema, "risk": risk, "smoothed": torch.stack(result, 1)}


def edges() -> dict:
    """Single tokens at their edges: NLL, KL, and ∂(α·NLL + β·KL)/∂logits.

    Rows: 0 any; 1 equal to the reference, 2 but for a constant; 3 all logits equal; 4 ±1000, the reference
    the other way round; 5 ±1000, the reference undecided; 6 a label of probability near 0; 7 a reference
    that is nearly sure; 8 one that is sure of what the policy thinks impossible.
    """
    plain, ref = numbers(1, 5, seed=1), numbers(1, 5, seed=2)
    large, flat = double([[1000.0, -1000.0, 0.0, 0.5, -1000.0]]), torch.zeros(1, 5, dtype=torch.float64)
    tiny = double([[30.0, -30.0, 0.0, 1.0, -12.0]])
    logits = torch.cat((plain, ref, ref + 7, flat, large, large, tiny, plain, tiny))
    ref_logits = torch.cat((ref, ref, ref, flat, -large, flat, ref, tiny, tiny.flip(-1)))
    labels = torch.tensor([3, 0, 1, 4, 1, 0, 1, 2, 0])
    beta = double([0.25, 0.1, 0.9, 0.5, 0.9, 0.5, 0.0, 1.0, 0.75])
    logits.requires_grad_()
    nll, kl = nll_of(logits, labels), kl_of(ref_logits, logits)
    loss = (1 - beta) * nll + beta * kl
    gradient, = torch.autograd.grad(loss.sum(), logits)
    return {"logits": logits, "ref_logits": ref_logits, "labels": labels, "alpha": 1 - beta, "beta": beta,
            "nll": nll, "kl": kl, "loss": loss, "grad_logits": gradient}


def model() -> dict:
    """Weights: vocabulary 11, embedding 5, hidden size 6, LoRA of rank 2 and α 3."""
    return {"embedding": numbers(11, 5, seed=3), "linear": numbers(6, 5, seed=4, scale=0.4),
            "lora_A": numbers(2, 5, seed=5, scale=0.4), "lora_B": numbers(6, 2, seed=6, scale=0.4),
            "lora_alpha": double(3.0), "head": numbers(11, 6, seed=7, scale=0.6)}


def batch() -> dict:
    """A micro-batch of four examples, right-padded; its step has 17 response tokens, of which it holds 12.

    Labels stand at the tokens that are to be predicted; the first example has one, the third two turns.
    """
    trained = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0, 0],
                            [0, 0, 1, 1, 0, 0, 0, 0, 0],
                            [0, 0, 1, 0, 0, 1, 1, 0, 0],
                            [0, 0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    length = torch.tensor([4, 4, 7, 9])
    input_ids = torch.randint(1, 11, (4, 9), generator=torch.Generator().manual_seed(8))
    input_ids = torch.where(torch.arange(9) < length[:, None], input_ids, 0)
    return {"input_ids": input_ids, "labels": torch.where(trained, input_ids, IGNORE), "length": length,
            "risk": double([0.0, 1.0, 0.37, 0.5]), "n_tokens": torch.tensor(17)}


def forward(m: dict, b: dict) -> tuple:
    """Of each response token: h (N, H), h_ref (N, H), label, example, its place 1, 2, … in its turn (N,)."""
    before, labels, rows, places = [], [], [], []
    for i, (ids, own) in enumerate(zip(b["input_ids"].tolist(), b["labels"].tolist())):
        place = 0
        for t, label in enumerate(own):
            place = place + 1 if label != IGNORE else 0
            if label != IGNORE:
                before.append(ids[t - 1])  # what it is predicted from
                labels.append(label)
                rows.append(i)
                places.append(place)
    x = m["embedding"][before]
    ref_hidden = x @ m["linear"].T
    scaling = m["lora_alpha"] / len(m["lora_A"])
    hidden = ref_hidden + scaling * (x @ m["lora_A"].T @ m["lora_B"].T)
    return hidden, ref_hidden, torch.tensor(labels), torch.tensor(rows), torch.tensor(places)


def objective(m: dict, b: dict) -> dict:
    """L = 1/N · Σ_i Σ_t [ α_i · NLL_it + β_i · KL_it ] of a micro-batch, its gradients, at each of GATES."""
    m = m | {name: m[name].clone().requires_grad_() for name in ("lora_A", "lora_B")}
    hidden, ref_hidden, labels, rows, place = forward(m, b)
    logits, ref_logits = hidden @ m["head"].T, ref_hidden @ m["head"].T
    nll, kl = nll_of(logits, labels), kl_of(ref_logits, logits)
    found = {"hidden": hidden, "ref_hidden": ref_hidden, "label": labels, "example": rows, "position": place,
             "nll": nll, "kl": kl}
    stacked = {name: [] for name in ("token_loss", "loss", "grad_logits", "grad_hidden", "grad_lora_A",
                                     "grad_lora_B")}
    for beta_min, beta_max in GATES:
        beta = (beta_min + (beta_max - beta_min) * b["risk"])[rows]
        token_loss = (1 - beta) * nll + beta * kl
        loss = token_loss.sum() / b["n_tokens"]
        of = [logits, hidden, m["lora_A"], m["lora_B"]]
        values = token_loss, loss, *torch.autograd.grad(loss, of, retain_graph=True)
        for name, value in zip(stacked, values, strict=True):
            stacked[name].append(value)
    return found | {name: torch.stack(values) for name, values in stacked.items()}


def kept(m: dict, found: dict) -> dict:
    """What KL needs of the reference: g = Wᵀ(p_ref − onehot(y)), c = ⟨g, h_ref⟩ − NLL(h_ref).

    And what it is used for: KL = NLL(h) − ⟨g, h⟩ + c.
    """
    ref_logits = found["ref_hidden"] @ m["head"].T
    p_ref = ref_logits.softmax(-1)
    onehot = torch.nn.functional.one_hot(found["label"], p_ref.shape[-1])
    g = (p_ref - onehot) @ m["head"]
    c = (g * found["ref_hidden"]).sum(-1) - nll_of(ref_logits, found["label"])
    return {"g": g, "c": c, "kl": found["nll"] - (g * found["hidden"]).sum(-1) + c}


# ---------------------------------------------------------------- baselines


def csft(m: dict, b: dict) -> dict:
    """L = 1/N · Σ w · NLL of the micro-batch, w = 2(1 − σ(τ_j · (log π_θ(y) − log π_ref(y)))) held constant.

    And w at its edges: 1 at the reference, the places at which τ changes, the floor, the ceiling 2.
    """
    m = m | {name: m[name].clone().requires_grad_() for name in ("lora_A", "lora_B")}
    hidden, ref_hidden, labels, _, place = forward(m, b)
    logits = hidden @ m["head"].T
    logp, ref_logp = -nll_of(logits, labels), -nll_of(ref_hidden @ m["head"].T, labels)
    weight = csft_weight(logp, ref_logp, place)
    loss = -(weight * logp).sum() / b["n_tokens"]
    of = {"grad_logits": logits, "grad_lora_A": m["lora_A"], "grad_lora_B": m["lora_B"]}
    edge_logp = double([-3.0, -1.0, -1.0, -1.0, -1.0, -0.125, -50.0, -0.25])
    edge_ref_logp = double([-3.0, -3.0, -3.0, -3.0, -3.0, -40.0, -0.125, -0.5])
    edge_position = torch.tensor([1, 1, 2, 5, 6, 3, 3, 40])
    return {"logp": logp, "ref_logp": ref_logp, "weight": weight, "loss": loss,
            **dict(zip(of, torch.autograd.grad(loss, of.values()))),
            "edge_logp": edge_logp, "edge_ref_logp": edge_ref_logp, "edge_position": edge_position,
            "edge_weight": csft_weight(edge_logp, edge_ref_logp, edge_position)}


def csft_weight(logp, ref_logp, position) -> torch.Tensor:
    """τ_1 = 0.5, τ_2 … τ_5 = 2, then 0.1; at least 0.001; no gradient."""
    tau = double([0.5 if j == 1 else 2.0 if j <= 5 else 0.1 for j in position.tolist()])
    return torch.clamp(2 * (1 - torch.sigmoid(tau * (logp - ref_logp))), min=1e-3).detach()


def lisa() -> dict:
    """ρ/2 · ‖θ − θ_switch‖², its gradient, and that gradient on top of another one."""
    theta, start, before = (numbers(3, 4, seed=seed) for seed in (9, 10, 11))
    theta, rho = theta.requires_grad_(), double(1.5)
    term = rho / 2 * (theta - start).square().sum()
    gradient, = torch.autograd.grad(term, theta)
    return {"theta": theta, "at_switch": start, "rho": rho, "term": term, "grad": gradient,
            "grad_before": before, "grad_after": before + gradient}


def learning_rate() -> dict:
    """Linear up to the peak over `warmup` steps, then half a cosine towards 0: every step of four runs."""
    rows = []
    for n_steps, warmup, peak in ((23, 5, 2e-3), (8, 0, 2e-4), (3, 5, 1.0), (1, 0, 0.5)):
        for step in range(n_steps):
            part = (step - warmup) / (n_steps - warmup) if step >= warmup else None
            rate = peak * (step + 1) / warmup if part is None else peak * (1 + math.cos(math.pi * part)) / 2
            rows.append((step, n_steps, warmup, peak, rate))
    step, n_steps, warmup, peak, rate = zip(*rows)
    return {"step": torch.tensor(step), "n_steps": torch.tensor(n_steps), "peak": double(peak),
            "warmup_steps": torch.tensor(warmup), "lr": double(rate)}


# ---------------------------------------------------------------- the two estimators of risk


def probe() -> dict:
    """Logistic regression on standardised features: w, b = argmin Σ log-loss + (l2/2)‖w‖², for each l2.

    The last feature is constant: its std counts as 1. Risk of new features: σ(w·(x − mean)/std + b), and 1
    where the logit is not finite, as in the last three rows: NaN, +∞, −∞.
    """
    x = numbers(60, 4, seed=12, scale=2.0) + double([0.0, 3.0, -1.0, 0.0])
    x[:, 3] = 0.5
    y = (x[:, 0] - 0.5 * x[:, 1] + numbers(60, seed=13, scale=2.0) > -1).double()
    mean, std = x.mean(0), (x - x.mean(0)).square().mean(0).sqrt()
    std[std == 0] = 1.0
    z = torch.cat(((x - mean) / std, torch.ones(60, 1, dtype=torch.float64)), 1)  # the last weight: the bias
    l2, solutions = double([1.0, 0.0625, 100.0]), []
    for strength in l2.tolist():
        ridge, theta = torch.diag(double([strength] * 4 + [0.0])), torch.zeros(5, dtype=torch.float64)
        for _ in range(50):  # Newton's method; the bias is not penalised
            p = torch.sigmoid(z @ theta)
            hessian = z.T @ ((p * (1 - p))[:, None] * z) + ridge
            theta = theta - torch.linalg.solve(hessian, z.T @ (p - y) + ridge @ theta)
        solutions.append(theta)
    weight, bias = torch.stack(solutions)[:, :4], torch.stack(solutions)[:, 4]
    odd = double([[1000.0, -1000.0, 0, 0], [math.nan, 0, 0, 0], [math.inf, 0, 0, 0],
                  [0, math.inf, 0, 0]])
    new = torch.cat((numbers(5, 4, seed=14, scale=2.0), odd))
    logit = weight @ ((new - mean) / std).T + bias[:, None]  # (3, 9)
    risk = torch.where(logit.isfinite(), 1 / (1 + torch.exp(-logit)), 1.0)
    return {"x": x, "y": y, "l2": l2, "weight": weight, "bias": bias, "mean": mean, "std": std, "new_x": new,
            "risk": risk}


def rubric_judge() -> dict:
    """Score = Σ_k k·p(k) / Σ_k p(k), k = 1 … 5, p(k) summed over the tokens of a digit; s = (score − 1)/4.

    A verdict is valid where at least half of the probability is on digits; else its risk is 1. A digit is a
    token, or two where a leading space makes another (`digits`, −1 for none); the vocabulary has 14.
    """
    digits = torch.tensor([[2, 9], [3, 10], [4, -1], [5, 12], [6, 13]])
    logits = numbers(8, 14, seed=15)
    logits[:5, 2:7] += 4
    logits[1, 6] += 1000.0  # surely 5
    logits[2, 2] += 40.0  # nearly surely 1
    logits[3] = 0.0  # all alike
    logits[5, 0] += 40.0  # almost nothing on digits
    logits[6, [3, 10, 0]] = double([20.0, 20.0, 20.5])  # both tokens of 2 and another: little more than half
    logits[7, [3, 10, 0]] = double([20.0, 20.0, 21.0])  # a little less
    p = logits.softmax(-1)
    of_digit = torch.stack([p[:, [i for i in row if i >= 0]].sum(-1) for row in digits.tolist()], 1)  # (8, 5)
    mass = of_digit.sum(-1)
    score = (of_digit * torch.arange(1.0, 6.0, dtype=torch.float64)).sum(-1) / mass
    risk, valid = (score - 1) / 4, mass >= 0.5
    return {"logits": logits, "digits": digits, "probs": p, "mass": mass, "score": score, "risk": risk,
            "valid": valid.long(), "verdict": torch.where(valid, risk, 1.0)}


def guard_judge() -> dict:
    """P(word) = p_0(word) + P(line) · p_behind(word | line); s = P(unsafe) / (P(safe) + P(unsafe)).

    The blank line that the judge may write first is one token (risk_1, mass_1), or the same token twice
    (risk_2, mass_2): then P(line) is a product. Probabilities are read at each place along it. A verdict is
    valid where the mass P(safe) + P(unsafe) is at least a half, as the rubric judge's.
    """
    logits = numbers(4, 3, 7, seed=16)
    logits[:, 1:, 1:3] += 4.0
    logits[0, 0, 4] += 40.0  # the line comes first
    logits[1, 0, 1] += 40.0  # safe at once
    logits[2, :2, 4] += 40.0
    logits[3, :, 5] += 30.0  # neither
    p, safe, unsafe, line = logits.softmax(-1), 1, 2, 4
    tokens = {"safe": torch.tensor(safe), "unsafe": torch.tensor(unsafe), "line": torch.tensor(line)}
    found = {"logits": logits, "probs": p} | tokens
    for n in (1, 2):
        lead = p[:, 0, line] if n == 1 else p[:, 0, line] * p[:, 1, line]  # P(line)
        p_safe, p_unsafe = (p[:, 0, word] + lead * p[:, n, word] for word in (safe, unsafe))
        found |= {f"risk_{n}": p_unsafe / (p_safe + p_unsafe), f"mass_{n}": p_safe + p_unsafe}
    return found


# ---------------------------------------------------------------- sampling


def sampling() -> dict:
    """The first token at which the cumulative softmax(logits / T) exceeds u ∈ [0, 1); at T = 0: argmax."""
    plain, equal, last = numbers(8, seed=17), double([0.0] * 8), 1 - 2**-53
    uneven = double([-1000.0, 0.0, -1000.0, 0.0, 0.0, 0.0, -1000.0, -1000.0])
    cases = [(plain, 0.0, 0.5)]
    cases += [(plain, T, u) for T in (0.5, 1.0, 2.0) for u in (0.0, 0.125, 0.5, 0.75, last)]
    cases += [(equal, 1.0, u) for u in (0.0, 0.125, 0.25, 0.875, last)]  # u on the boundaries
    cases += [(uneven, 1.0, u) for u in (0.0, 0.25, 0.5, last)]  # a token without probability is never drawn
    tokens = []
    for logits, T, u in cases:
        if T == 0:
            tokens.append(int(logits.argmax()))
            continue
        p = (logits / T).softmax(-1).tolist()
        tokens.append(next(i for i in range(8) if sum(p[: i + 1]) > u * sum(p)))
    logits, T, u = zip(*cases)
    return {"logits": torch.stack(logits), "temperature": double(T), "u": double(u),
            "token": torch.tensor(tokens)}


def main(file: Path = FILE) -> None:
    """Write all of it."""
    m, b = model(), batch()
    found = objective(m, b)
    sections = {"gate": gate(), "smooth": smoothing(), "edge": edges(), "model": m, "batch": b,
                "objective": found, "kept": kept(m, found), "csft": csft(m, b), "lisa": lisa(),
                "lr": learning_rate(), "probe": probe(), "rubric": rubric_judge(), "guard": guard_judge(),
                "sample": sampling()}
    tensors = {f"{section}.{name}": tensor.detach().clone().contiguous()
               for section, group in sections.items() for name, tensor in group.items()}
    made_by = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"  # to these bits
    save_file(tensors, file, {"made_by": made_by})
    print(f"{file}: {len(tensors)} tensors, {file.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if sys.argv[1:] else FILE)
