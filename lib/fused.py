"""NLL and KL of response tokens, without the logits of all tokens and without a second model.

    NLL(h) = logsumexp(W h) − ⟨w_y, h⟩
    KL(h)  = NLL(h) − NLL(h_ref) − ⟨g, h − h_ref⟩        g = ∇NLL(h_ref) = Wᵀ(p_ref − onehot(y))
           = NLL(h) − ⟨g, h⟩ + c                         c = ⟨g, h_ref⟩ − NLL(h_ref)

h is the policy's final hidden state before a response token y, h_ref the reference's, W the head that both
share. NLL is convex in h, and KL(π_ref ‖ π_θ) is what it exceeds its tangent at h_ref by: the Bregman
divergence of logsumexp(W h), from which NLL differs by a linear term. So a vector g and a number c per token
are all that KL needs of the reference, over the full vocabulary and exact but for the rounding of g. They never
change during training, as long as W is frozen and the temperature is 1.

Prior art: keeping Wᵀp_ref of a teacher for distillation (jonathanc.net/blog/kl-cache-trick, May 2026; it
says that DeepSeek-V4 keeps the teacher's hidden states); keeping its top-K logits (arXiv 2608.03796).

Shapes: N response tokens, the first M of them with β > 0; H hidden size, V vocabulary size.
"""

import functools

import torch

from data.chat import IGNORE, Example, batches_by_length, pad

CHUNK = 256  # tokens whose logits exist at the same time


# ---------------------------------------------------------------- the loss


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write a b into `out`, whose dtype is that of a and b, or float32 for bfloat16 factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


@functools.cache
def bfloat16_products_in_float32(device: torch.device) -> bool:
    """Try once whether torch multiplies bfloat16 matrices into a float32 result on this device."""
    if device.type == "cpu":
        return False
    ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        _matmul(ones, ones, ones.float())
    except (RuntimeError, TypeError):  # no such kernel; no such argument before torch 2.8
        print("this torch has no bfloat16 products with float32 results: the head is copied to float32")
        return False
    return True


@torch.no_grad()
def nll_and_gradient(hidden, weight, labels, with_gradient: bool = True) -> tuple:
    """Return NLL (N,) in nats and its gradient (softmax − onehot) W (N, H), or None, both float32 or wider.

    hidden (N, H); weight (V, H) the frozen head; labels (N,). The logits of CHUNK tokens exist at a time.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype != wide and not bfloat16_products_in_float32(weight.device):
        weight = weight.to(wide)
    N, (V, H) = len(hidden), weight.shape
    scores = torch.empty(min(N, CHUNK), V, device=hidden.device, dtype=wide)
    nll = torch.empty(N, device=hidden.device, dtype=wide)
    gradient = torch.empty(N, H, device=hidden.device, dtype=wide) if with_gradient else None
    for start in range(0, N, CHUNK):
        chunk = slice(start, start + CHUNK)
        y = labels[chunk, None]  # (C, 1)
        states = hidden[chunk].to(weight.dtype)  # (C, H)
        logits = _matmul(states, weight.t(), scores[: len(y)])  # (C, V)
        logp = torch.log_softmax(logits, -1, out=logits)
        nll[chunk] = -logp.gather(1, y)[:, 0]
        if with_gradient:
            p = logp.exp_()
            p.scatter_add_(1, y, p.new_full(y.shape, -1.0))
            _matmul(p.to(weight.dtype), weight, gradient[chunk])
    return nll, gradient


class LinearCrossEntropy(torch.autograd.Function):
    """NLL of each label from the hidden state before it; the forward pass also forms the gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        """Return NLL (N,) of hidden (N, H), weight (V, H), labels (N,). Raises ValueError for a trained head."""
        if weight.requires_grad:
            raise ValueError("LinearCrossEntropy: expected a frozen head, found one that is trained; "
                             "use train.token_loss")
        nll, gradient = nll_and_gradient(hidden, weight, labels, ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        """Return the gradient of `hidden` alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad_nll[:, None], None, None


def fused_token_loss(hidden, weight, labels, alpha, beta, reference) -> tuple:
    """Return the objective α·NLL + β·KL of each response token, NLL and KL: three (N,) in nats, float32.

    hidden (N, H); weight (V, H) the frozen head; labels, alpha, beta (N,). reference: `reference_terms`'
    (g, c) of the first M tokens, the caller puts those with β > 0 first; KL of the others is 0. Equal to
    train.token_loss, which is the definition; only the first result has a gradient.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    hidden = hidden.to(wide)  # so that the gradients of NLL and KL are summed before they are rounded
    nll = LinearCrossEntropy.apply(hidden, weight, labels)
    g, c = reference
    M = len(c)
    kl = nll[:M] - (g.to(wide) * hidden[:M]).sum(-1) + c
    kl = torch.nn.functional.pad(kl, (0, len(nll) - M))
    return alpha * nll + beta * kl, nll.detach(), kl.detach()


def reference_terms(ref_hidden, weight, labels, dtype: torch.dtype | None = None) -> tuple:
    """Return g = Wᵀ(p_ref − onehot(y)) (N, H) and c = ⟨g, h_ref⟩ − NLL(h_ref) (N,) in nats.

    dtype: of g; default: float32 or wider. c is formed with the rounded g, so that in every dtype KL is 0
    where the policy equals the reference.
    """
    nll, g = nll_and_gradient(ref_hidden, weight, labels)
    g = g.to(dtype or g.dtype)
    c = (g.to(nll.dtype) * ref_hidden.to(nll.dtype)).sum(-1) - nll
    return g, c


# ---------------------------------------------------------------- response tokens


def response_states(model, examples: list[Example]) -> tuple:
    """Return the hidden states (N, H) before the response tokens, these tokens (N,), the example of each (N,).

    Response tokens are those with a label: every assistant turn with its end. The result equals
    hidden[:, :-1][labels[:, 1:] != IGNORE] of padded states: labels are shifted here. Only
    attention computes padding. It stands on the right, where causal attention never looks, and needs no mask.
    """
    device = model.device
    labels = pad([e.labels for e in examples], IGNORE, "right")  # (B, T)
    is_token = pad([[True] * len(e.input_ids) for e in examples], False, "right")  # (B, T)
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # the state there predicts the next label
    index_of_token = is_token.flatten().cumsum(0) - 1  # among the real tokens
    index = index_of_token[row * labels.shape[1] + column]  # (N,)
    input_ids = pad([e.input_ids for e in examples], 0, "right", device)
    real = is_token.flatten().nonzero()[:, 0].to(device)
    longrope = model.config.rope["rope_type"] == "longrope"  # it alone depends on each row's length
    mask = is_token.to(device) if longrope else None
    hidden, _ = model.model(input_ids, mask, rows=real)
    labels = labels[row, column + 1].to(device)
    return hidden[index.to(device)], labels, row


@torch.no_grad()
def label_logp(model, examples: list[Example], batch_size: int) -> dict[int, torch.Tensor]:
    """Return {example.index: log-probabilities (n,) of its labels}, with the model's adapters off."""
    logp = {}
    for batch in batches_by_length([len(e.input_ids) for e in examples], batch_size):
        batch = [examples[i] for i in batch]
        with model.adapters_off():
            hidden, labels, _ = response_states(model, batch)
        nll = LinearCrossEntropy.apply(hidden, model.lm_head.weight, labels)
        n_labels = [example.n_labels for example in batch]
        for example, of_example in zip(batch, nll.split(n_labels)):
            logp[example.index] = -of_example
    return logp
