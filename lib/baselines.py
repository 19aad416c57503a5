"""The baselines of the adaptive method: filtering, C-SFT (constrained SFT), Lisa, SafeGrad, SBR.

`Baseline` is the default, also of sft and adaptive: all examples, anchors spread evenly, no change of losses or
gradients. A baseline overrides what it changes.
"""

import math

import torch
import torch.nn.functional as F

from data.chat import IGNORE, Example
from lib.distributed import world_size
from lib.files import DataError
from lib.fused import fused_token_loss, label_logp, response_states
from lib.reference import live_reference

FILTER_ABOVE = 0.5  # Filter drops examples with a higher risk
LISA_CYCLE = 50  # steps of a cycle of Lisa, at most (1,000 in the paper, whose runs are longer)
LISA_RHO = 1.0  # ρ of Lisa's proximal term
SBR_PROMPTS = 8  # this and λ as in its authors' code
SBR_LAMBDA = 50.0


class Baseline:
    """Plain fine-tuning (SFT), and the adaptive method, which differs from it by its loss alone."""

    draws_anchors = True  # a step's examples are data and, by their share, anchors: a run has more steps

    def __init__(self, anchor_share: float, per_step: int, n_steps: int):
        """anchor_share: of the examples; per_step: examples of a step; n_steps: of the run."""
        self.anchor_share = anchor_share
        self.per_step = per_step

    def select_examples(self, examples: list[Example], risk: torch.Tensor) -> list[Example]:
        """Return the examples to train on; risk (examples,) in [0, 1]."""
        return examples

    def prepare(self, policy, examples: list[Example], batch_size: int) -> None:
        """Compute what is needed of the policy before its first step."""

    def anchors_before(self, step: int) -> int:
        """Return how many anchors all steps before `step` draw: their share, spread evenly over the steps."""
        return math.floor(step * self.anchor_share * self.per_step) if self.draws_anchors else 0

    def token_weights(self, nll: torch.Tensor, examples: list[Example]) -> torch.Tensor | float:
        """Return the weights (N,) of the response tokens' losses; nll (N,) in nats."""
        return 1.0

    def adjust_gradients(self, parameters: list, step: int, state) -> None:
        """Change the gradients before they are clipped; state: lib.run.State, which is saved with the run."""


class Filter(Baseline):
    """Drop risky examples, then fine-tune."""

    def select_examples(self, examples, risk):
        """Return the examples whose risk is at most FILTER_ABOVE."""
        selected = [example for example in examples if risk[example.index] <= FILTER_ABOVE]
        print(f"filter: {len(examples) - len(selected)} of {len(examples)} examples dropped"
              + ", the model stays as it was" * (not selected))
        return selected


class ConstrainedSFT(Baseline):
    """Weigh each token's NLL by how far the policy has moved from the reference (Qi et al. 2024)."""

    def prepare(self, policy, examples, batch_size):
        """Compute the reference's log-probabilities of all labels."""
        self.ref_logp = label_logp(policy, examples, batch_size)

    def token_weights(self, nll, examples):
        """Return `csft_weight` of each token."""
        ref_logp = torch.cat([self.ref_logp[example.index] for example in examples])
        position = torch.cat([response_positions(example) for example in examples])
        return csft_weight(-nll, ref_logp, position.to(nll.device))


class Lisa(Baseline):
    """Alternate between steps on anchors and steps on the data, pulled to where each phase began.

    The run is divided into cycles of equal length, LISA_CYCLE steps or fewer. Each begins with the steps on
    anchors. Huang et al. 2024, arXiv 2405.18641.
    """

    def __init__(self, anchor_share, per_step, n_steps):
        """Raises DataError where a cycle would have no step on anchors, or none on the data."""
        super().__init__(anchor_share, per_step, n_steps)
        n_cycles = math.ceil(n_steps / LISA_CYCLE)
        self.cycle = math.ceil(n_steps / n_cycles)
        self.anchor_steps = round(anchor_share * self.cycle)
        if not 0 < self.anchor_steps < self.cycle:
            raise DataError(f"--anchor-share: expected a share of the {self.cycle} steps of a cycle of Lisa "
                            f"that is a step or more and not all of them, found {anchor_share}; give another "
                            f"share, or train for more steps: --epochs")

    def anchors_before(self, step):
        """Return how many anchors are drawn before `step`."""
        cycles, rest = divmod(step, self.cycle)
        return self.per_step * (cycles * self.anchor_steps + min(rest, self.anchor_steps))

    def adjust_gradients(self, parameters, step, state):
        """Add Lisa's proximal gradient; note the parameters at the first step of each phase."""
        if step % self.cycle in (0, self.anchor_steps):
            state.phase_start = [parameter.detach().clone() for parameter in parameters]
        lisa_pull(parameters, state.phase_start, LISA_RHO)


class SafeGrad(Baseline):
    """Project the data's gradient off the gradient of KL on anchors where they conflict, and add the latter.

    Each step has as many anchors beside its data. Yi et al. 2025, arXiv 2508.07172.
    """

    draws_anchors = False

    def prepare(self, policy, examples, batch_size):
        """Keep the policy and the anchors."""
        self.policy = policy
        self.reference = live_reference(policy)
        self.batch_size = batch_size
        self.anchors = [example for example in examples if example.anchor]

    def adjust_gradients(self, parameters, step, state):
        """Project the gradient of all parameters together; add that of the anchors' mean KL per token."""
        of_data = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        first = step * self.per_step
        drawn = range(first, first + self.per_step)
        anchors = [self.anchors[i % len(self.anchors)] for i in drawn]
        n_tokens = sum(anchor.n_labels for anchor in anchors)
        for start in range(0, len(anchors), self.batch_size):
            batch = anchors[start : start + self.batch_size]
            hidden, labels, _ = response_states(self.policy, batch)
            alpha = torch.zeros(len(labels), device=hidden.device)
            beta = torch.ones_like(alpha)
            head = self.policy.lm_head.weight
            terms = self.reference(batch)
            loss, _, _ = fused_token_loss(hidden, head, labels, alpha, beta, terms)
            (loss.sum() / n_tokens).backward()
        of_anchors = [parameter.grad for parameter in parameters]
        projected = project(of_data, of_anchors)
        for parameter, g, h in zip(parameters, projected, of_anchors):
            parameter.grad = g + h


class SBR(Baseline):
    """Safety bottleneck regularization: hold the hidden states from which answers to harmful prompts begin.

    Each step adds the gradient of λ·mean((h − h_ref)²): h is the final hidden state at the last prompt token
    of SBR_PROMPTS harmful anchors. Lu et al. 2026, arXiv 2605.05995.
    """

    draws_anchors = False

    def prepare(self, policy, examples, batch_size):
        """Compute the reference's hidden states. Raises DataError where no anchor is harmful."""
        anchors = [example for example in examples if example.anchor]
        anchors = [anchor for anchor in anchors if anchor.conversation.is_harmful]
        self.policy = policy
        self.anchors = anchors[:SBR_PROMPTS]
        if not anchors:
            raise DataError("--method sbr: expected a harmful prompt among the anchors, found none")
        with torch.no_grad(), policy.adapters_off():
            self.ref_states = self.states()

    def states(self) -> torch.Tensor:
        """Return the hidden states (SBR_PROMPTS, H), float32, that predict each response's first token."""
        hidden, _, row = response_states(self.policy, self.anchors)
        is_first = row.diff(prepend=row.new_tensor([-1])) > 0
        return hidden[is_first.to(hidden.device)].float()

    def adjust_gradients(self, parameters, step, state):
        """Add the penalty's gradient."""
        (SBR_LAMBDA * F.mse_loss(self.states(), self.ref_states)).backward()


BASELINES = {"filter": Filter, "csft": ConstrainedSFT, "lisa": Lisa, "safegrad": SafeGrad, "sbr": SBR}


def project(gradient: list[torch.Tensor], onto: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return `gradient` without its part against `onto`: g − min(0, ⟨g, h⟩)/‖h‖²·h, over all tensors at once.

    SafeGrad, arXiv 2508.07172; the result is orthogonal to h where ⟨g, h⟩ < 0, and g elsewhere.
    """
    product = 0.0
    square = 0.0
    for g, h in zip(gradient, onto):
        product += (g.double() * h.double()).sum().item()
        square += h.double().square().sum().item()
    scale = min(product, 0.0) / max(square, 1e-30)
    return [g - scale * h for g, h in zip(gradient, onto)]


def csft_weight(logp: torch.Tensor, ref_logp: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return C-SFT's weights w (N,) of the tokens' NLL, at least 0.001 and without gradient.

    w = 2·(1 − σ(τ·(log π_θ(y) − log π_ref(y)))), where τ is 0.5 at position 1 of a turn, 2 at positions
    2 … 5, then 0.1: a label that became likelier than under the reference is pushed less, above all there.
    logp, ref_logp, position (N,). Qi et al. 2024, arXiv 2406.05946.
    """
    tau = torch.where(position == 1, 0.5, torch.where(position <= 5, 2.0, 0.1))
    weight = 2 * (1 - torch.sigmoid(tau * (logp - ref_logp)))
    return weight.clamp_min(1e-3).detach()


def response_positions(example: Example) -> torch.Tensor:
    """Return 1, 2, … for the response tokens (n,) of each assistant turn."""
    is_label = torch.tensor([label != IGNORE for label in example.labels])
    count = is_label.cumsum(0)
    count_before_turn = (count * ~is_label).cummax(0).values
    return (count - count_before_turn)[1:][is_label[1:]]


def lisa_pull(parameters: list[torch.nn.Parameter], start: list[torch.Tensor], rho: float) -> None:
    """Add the gradient of ρ/2·‖θ − θ_start‖² to each parameter's gradient.

    The gradients of all processes are summed later, so each adds its share. Huang et al. 2024.
    """
    for parameter, origin in zip(parameters, start):
        parameter.grad.add_(parameter.detach() - origin, alpha=rho / world_size())
