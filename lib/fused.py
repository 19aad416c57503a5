"""train.py's objective, cheaper: no logits of all tokens, no reference forward, no reference in memory.

    α·NLL + β·KL = (α + β)·NLL(h) − β·⟨g, h⟩ + β·c          exact, full vocabulary
    g = Wᵀ(p_ref − onehot(y)),   c = ⟨g, h_ref⟩ − NLL(h_ref)

h is the policy's final hidden state of a response token y, h_ref the reference's, W the head that they share.
With A(h) = logsumexp(W h), NLL(h) = A(h) − ⟨w_y, h⟩ and KL = A(h) − A(h_ref) − ⟨Wᵀp_ref, h − h_ref⟩, a
Bregman divergence: all that KL needs of the reference is a vector g and a number c per response token, which
never change. This holds while W is frozen (LoRA not on the head) and T = 1.

Prior art: keeping Wᵀp_ref of a teacher for distillation (jonathanc.net/blog/kl-cache-trick, May 2026; it
says that DeepSeek-V4 keeps the teacher's hidden states); keeping its top-K logits (arXiv 2608.03796).
Here the vector is merged with NLL into one cross-entropy, over the full vocabulary, and the constant makes
KL itself exact, so that it can be logged and checked.

    token_loss        the same function as train.token_loss, logits existing for CHUNK tokens at a time
    reference_terms   g and c
    ReferenceCache    g and c of every response token of a data set, in one memory-mapped, checked file

Shapes: N response tokens, the first M pulled to the reference; C of a chunk, H hidden size, V vocabulary.
"""

import functools
import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lib.checkpoint import fingerprint
from lib.files import DataError, errors_name_path
from lib.distributed import on_rank_zero

CHUNK = 256  # tokens whose logits exist at a time
CHECKSUM = hashlib.sha256().digest_size  # 32 bytes


# ---------------------------------------------------------------- the loss


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """a b, written into `out`, whose dtype is that of a and b or float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)  # products of bfloat16 numbers are exact in float32


@functools.cache
def products_in_float32(device: torch.device) -> bool:
    """Whether torch has products of bfloat16 matrices with float32 results there: tried once."""
    if device.type == "cpu":
        return False
    ones = torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        _product(ones, ones, ones.float())
    except (RuntimeError, TypeError) as error:  # no such kernel; no such argument, before torch 2.8
        reason = str(error).partition("\n")[0][:100]
        print(f"bfloat16 products with float32 results: not on this torch and device ({reason}); "
              f"the head is held in float32 beside its weights")
        return False
    return True


@torch.no_grad()
def _nll_kl_gradient(hidden, weight, labels, alpha, beta, ref, with_gradient: bool = True) -> tuple:
    """NLL (N,), KL (N,) (0 behind the first M), ∂(α·NLL + β·KL)/∂hidden (N, H) or None, chunk by chunk."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype != wide and not products_in_float32(weight.device):
        weight = weight.to(wide)
    ref_hidden, (g, c) = (hidden[:0], ref) if isinstance(ref, tuple) else (ref, (hidden[:0], None))
    N, M, (V, H), dtype = len(hidden), len(ref_hidden), weight.shape, weight.dtype
    scores, ref_scores, p_ref = (torch.empty(min(n, CHUNK), V, device=hidden.device, dtype=wide)
                                 for n in (N, M, M))
    product = torch.empty(min(N, CHUNK), H, device=hidden.device, dtype=wide)
    nll, kl = hidden.new_zeros(N, dtype=wide), hidden.new_zeros(N, dtype=wide)
    gradient = torch.empty_like(hidden) if with_gradient else None
    for start in range(0, N, CHUNK):
        chunk, y = slice(start, start + CHUNK), labels[start : start + CHUNK, None]  # y (C, 1)
        a, b = alpha[chunk, None].to(wide, copy=True), beta[chunk, None].to(wide)  # (C, 1)
        logp = _product(hidden[chunk].to(dtype), weight.t(), scores[: len(y)])  # (C, V)
        torch.log_softmax(logp, -1, out=logp)
        nll[chunk] = -logp.gather(1, y)[:, 0]
        if live := len(ref_hidden[chunk]):
            ref_logp = _product(ref_hidden[chunk].to(dtype), weight.t(), ref_scores[:live])
            torch.log_softmax(ref_logp, -1, out=ref_logp)
            torch.exp(ref_logp, out=p_ref[:live])
            log_ratio = ref_logp.sub_(logp[:live])
            kl[start : start + live] = torch.bmm(p_ref[:live, None], log_ratio[..., None]).flatten()
        if cached := len(g[chunk]):
            pulled = slice(start, start + cached)
            kl[pulled] = nll[pulled] - (g[pulled].to(wide) * hidden[pulled].to(wide)).sum(-1) + c[pulled]
        if with_gradient:  # ((α + β)·p − α·onehot(y) − β·p_ref) W, subtracted in float32 before any cast
            p = logp.exp_().mul_(a + b)
            p[:live] -= p_ref[:live].mul_(b[:live])
            a[:cached] += b[:cached]  # g, subtracted below, has −onehot(y) in it
            grad = _product(p.scatter_add_(1, y, -a).to(dtype), weight, product[: len(y)])  # (C, H)
            grad[:cached] -= b[:cached] * g[chunk].to(wide)
            gradient[chunk] = grad
    return nll, kl, gradient


class _TokenLoss(torch.autograd.Function):
    """α·NLL + β·KL of each token; the forward pass makes its gradient, so no logits wait for the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, alpha, beta, ref):
        nll, kl, gradient = _nll_kl_gradient(hidden, weight, labels, alpha, beta, ref,
                                             ctx.needs_input_grad[0])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(nll, kl)
        return alpha * nll + beta * kl, nll, kl

    @staticmethod
    def backward(ctx, grad_loss, grad_nll, grad_kl):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None]).to(gradient.dtype), None, None, None, None, None


def token_loss(hidden, weight, labels, alpha, beta, ref) -> tuple:
    """The objective α·NLL + β·KL of each response token, NLL and KL beside it → three (N,), float32, in nats.

    hidden (N, H); weight (V, H) the frozen head; labels, alpha, beta (N,). ref: of the first M tokens, which
    have β > 0, the reference's hidden states (M, H), or `reference_terms`' (g, c). Equal to train.token_loss,
    the definition; only the first of the three has a gradient. Raises ValueError for a trained head.
    """
    if weight.requires_grad:
        raise ValueError("fused.token_loss: expected a frozen head, found one that is trained; "
                         "use train.token_loss")
    return _TokenLoss.apply(hidden, weight, labels, alpha, beta, ref)


def reference_terms(ref_hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple:
    """g = Wᵀ(p_ref − onehot(y)) (N, H), ref_hidden's dtype; c = ⟨g, h_ref⟩ − NLL(h_ref) (N,) float32, nats.

    c is formed with g as stored, so that KL is 0 where the policy is the reference, however coarse the dtype.
    """
    ones = torch.ones(len(labels), device=labels.device)
    nll, _, g = _nll_kl_gradient(ref_hidden, weight, labels, ones, 0 * ones, ref_hidden[:0])
    return g, (g.to(nll.dtype) * ref_hidden.to(nll.dtype)).sum(-1) - nll


# ---------------------------------------------------------------- the reference, computed once


class ReferenceCache:
    """g and c of every response token of some examples, in a memory-mapped file that runs share.

    The file's name is a SHA-256 of the model's files, the dtype, each example's tokens and labels: template,
    tokenizer, truncation and data show in those. An example's part is a row of H + 1 numbers per response
    token, then a checksum. `fill` checks them all, and computes what is not there as it was once written:
    new, cut, damaged, all the same.
    """

    def __init__(self, folder, model, batches: list[list]):
        self.dtype, self.batches = model.lm_head.weight.dtype, batches
        g = ("g", "u1", model.config.hidden_size * self.dtype.itemsize)  # bytes: numpy has no bfloat16
        self.form = np.dtype([g, ("c", "f4")])
        files = on_rank_zero(lambda: fingerprint(model.path))
        key = hashlib.sha256(f"2 {files} {self.dtype}".encode())  # 2: of the form
        self.n_tokens, self.size, self.stream = 0, 0, None  # size in bytes
        self.place = {}  # example.index → the bytes of its rows; its checksum is behind them
        for example in (example for batch in batches for example in batch):
            key.update(np.array([len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
            start, end = self.size, self.size + example.n_labels * self.form.itemsize
            self.place[example.index] = slice(start, end)
            self.n_tokens, self.size = self.n_tokens + example.n_labels, end + CHECKSUM
        self.key = key.hexdigest()
        self.file = Path(folder) / f"{self.key[:32]}.ref"

    def room(self) -> float:
        """Bytes that the file may have: what is free, and what there is of it; any, where it has its size."""
        written = self.file.stat().st_size if self.file.exists() else 0
        if written >= self.size:
            return float("inf")
        folder = next(path for path in self.file.absolute().parents if path.exists())
        return shutil.disk_usage(folder).free + written

    def fill(self, states, weight: torch.Tensor) -> "ReferenceCache":
        """Write what is missing, then map the file. Raises DataError, before writing, where there is no room.

        states(examples) → the reference's (h_ref (N, H), labels (N,)); all processes compute, the first one
        reads and writes. A second run that needs the same file waits for the first.
        """
        try:
            missing = on_rank_zero(self._open)
            for batch in tqdm([self.batches[i] for i in missing], desc="reference", disable=not missing):
                hidden, labels = states(batch)
                terms = reference_terms(hidden, weight, labels)
                on_rank_zero(lambda: self._write(batch, *terms))
            on_rank_zero(lambda: os.fsync(self.stream.fileno()))  # before anybody maps it
        finally:
            if self.stream:
                self.stream.close()  # and its lock is gone
        self.bytes, self.device = np.memmap(self.file, mode="r"), weight.device
        return self

    def _write(self, batch: list, g: torch.Tensor, c: torch.Tensor) -> None:
        """Write the parts of a batch of examples. Raises OSError that names the file."""
        rows = np.empty(len(c), self.form)
        rows["g"], rows["c"] = g.cpu().view(torch.uint8).numpy(), c.cpu().numpy()
        ends = np.cumsum([example.n_labels for example in batch])
        with errors_name_path(self.file):
            for example, own in zip(batch, np.split(rows, ends[:-1])):
                start = self.stream.seek(self.place[example.index].start)
                self.stream.write(self._part(start, own.tobytes()))
            self.stream.flush()

    def _part(self, start: int, rows: bytes) -> bytes:
        """Rows and their checksum, which is another in another file or place."""
        return rows + hashlib.sha256(f"{self.key} {start} ".encode() + rows).digest()

    def _open(self) -> list[int]:
        """Open and lock the file, check every part. → numbers of the batches in which some are missing."""
        import fcntl  # which Windows lacks

        if self.size > self.room():
            raise DataError(f"--ref cache: expected {self.size / 1e9:.1f} GB of room for {self.file}, "
                            f"found {self.room() / 1e9:.1f}; use --ref live, or another --ref-cache folder")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        self.stream = open(self.file, "r+b")
        try:
            fcntl.flock(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until closed, or this process dies
        except BlockingIOError:
            print("reference cache: waiting for another run, which is writing it")
            fcntl.flock(self.stream, fcntl.LOCK_EX)
        written, missing, damaged = self.stream.seek(0, os.SEEK_END), set(), 0
        for index, place in self.place.items():
            end = place.stop + CHECKSUM
            part = os.pread(self.stream.fileno(), end - place.start, place.start)
            if part != self._part(place.start, part[:-CHECKSUM]):
                missing.add(index)
                damaged += end <= written  # an interruption leaves no whole part that is wrong
        if damaged:
            print(f"{self.file}: {damaged} of {len(self.place)} parts are damaged: computed again")
        if damaged < len(missing):
            print(f"reference cache: {self.n_tokens} response tokens, "
                  f"{self.size / 1e6:.1f} MB in {self.file}")
        return [i for i, batch in enumerate(self.batches) if any(e.index in missing for e in batch)]

    def terms(self, examples: list) -> tuple[torch.Tensor, torch.Tensor]:
        """(g (M, H), c (M,)) of the response tokens of `examples`, in their order."""
        rows = np.concatenate([self.bytes[self.place[e.index]] for e in examples]).view(self.form)
        g, c = (torch.from_numpy(np.ascontiguousarray(rows[name])) for name in "gc")
        return g.view(self.dtype).to(self.device), c.to(self.device)
