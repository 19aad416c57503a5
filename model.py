"""A Llama-family transformer: the forward pass, checkpoints, LoRA adapters, and generation.

Families (config.json's `model_type`): llama (2, 3, 3.1, 3.2), mistral, qwen2, qwen3, phi3. Parameter names
are the checkpoint's keys. LoRA adapters are part of the linear layers and can be switched off: the reference
policy is the policy's own frozen weights.

Shapes: B batch, T tokens of this call, S keys attended to (with the cache), n tokens among the B·T that are
not padding; H hidden size, L blocks, V vocabulary, N query heads, K key/value heads, D head_dim, R rotary
dimensions, r LoRA rank.
"""

import json
import math
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.chat import batches_by_length, pad_left
from lib.checkpoint import (Config, checkpoint_files, read_config, read_tensors, tokenizer_files,
                            write_folder)
from lib.distributed import all_true, full_tensor, on_rank_zero, rank
from lib.files import ModelError, expect


# ---------------------------------------------------------------- the transformer


def rope_frequencies(rope: dict, head_dim: int):
    """Return inverse frequencies (1 or 2, R/2), radians per position in float32, and a factor on cos and sin.

    RoPE: Su et al. 2021, arXiv 2104.09864. `linear` divides all frequencies; `llama3` divides the long
    wavelengths, with a ramp (Llama 3.1); `longrope` has one set for short and one for long sequences (Ding
    et al. 2024, arXiv 2402.13753).
    """
    kind = rope["rope_type"]
    original = rope.get("original_max_position_embeddings")
    R = int(head_dim * rope["partial_rotary_factor"])
    exponent = torch.arange(0, R, 2, dtype=torch.float32) / R
    inv_freq = 1.0 / rope["rope_theta"] ** exponent  # (R/2,)
    if kind == "linear":
        inv_freq = inv_freq / rope["factor"]
    if kind == "llama3":
        turns = original * inv_freq / (2 * math.pi)  # in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        ramp = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, divided
        inv_freq = ramp * inv_freq + (1 - ramp) * inv_freq / rope["factor"]
    if kind == "longrope":
        factors = [rope["short_factor"], rope["long_factor"]]
        inv_freq = inv_freq / torch.tensor(factors, dtype=torch.float32)  # (2, R/2)
        growth = math.log(max(rope["factor"], 1)) / math.log(original)
        return inv_freq, rope.get("attention_factor") or math.sqrt(1 + growth)
    return inv_freq[None], 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor):
    """Rotate the first R of D dimensions of x (…, heads, D) by the angles of cos, sin (…, 1, R)."""
    R = cos.shape[-1]
    rotary, rest = x[..., :R], x[..., R:]
    first, second = rotary.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return torch.cat((rotary * cos + turned * sin, rest), -1)


def key_mask(attention_mask, window, slots: Tensor, S: int):
    """Return a mask (B or 1, 1, T, S), True at the keys to attend to, or None where it is causal and no more.

    attention_mask (B, S) is True at real tokens, or None if all are; slots (T,) are the indices of the
    queries among the S keys. A padding query attends to itself, so that no row is empty.
    """
    if attention_mask is None and S == len(slots) and (window is None or S <= window):
        return None
    query = slots[:, None]
    key = torch.arange(S, device=slots.device)
    mask = key <= query  # (T, S)
    if window is not None:
        mask = mask & (query - key < window)
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()  # (B, 1, T, S)
    return (mask | (key == query)).reshape(-1, 1, *mask.shape[-2:])


def attend(q, k, v, mask, grouped: bool):
    """Return softmax(q kᵀ / √D) v for q (B, N, T, D) and k, v (B, K, S, D), shape (B, T, N·D).

    Each key/value head serves a group of N / K query heads. mask None: causal. grouped: N is not K; it is
    passed, since torch.compile would make a symbol of a comparison of shapes.
    """
    B, N, T, D = q.shape
    K = k.shape[1]
    dtype = q.dtype
    if grouped and T == 1:  # the group's heads have the same keys: one head with as many queries
        q = q.reshape(B, K, N // K, D)
        grouped = False
    # CUDA's kernels for masks and for float32 know no groups; the fallback would hold (N, T, S) scores.
    if grouped and (mask is not None or q.is_cuda and dtype == torch.float32):
        k = k.repeat_interleave(N // K, 1)
        v = v.repeat_interleave(N // K, 1)
        grouped = False
    if dtype == torch.bfloat16 and not q.is_cuda and torch.is_grad_enabled():
        q, k, v = q.float(), k.float(), v.float()  # the CPU's backward pass takes half the time
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return y.to(dtype).reshape(B, N, T, D).transpose(1, 2).flatten(2)


def insert_padding(x: Tensor, shape: tuple, rows: Tensor):
    """Return tokens x (n, heads, D) at their indices `rows` (n,) in a batch of `shape` (B, T), else zeros."""
    B, T = shape
    padded = x.new_zeros(B * T, *x.shape[1:])
    return padded.index_copy(0, rows, x).unflatten(0, (B, T))


class Linear(nn.Linear):
    """Compute y = W x + b, with an adapter plus (alpha/r) B A x (LoRA: Hu et al. 2021, arXiv 2106.09685).

    A (r, in) and B (out, r) may be float32 over bfloat16 weights; the arithmetic is in the dtype of x.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.lora_A = self.lora_B = None
        self.scaling = 0.0  # alpha / r
        self.adapter_on = True

    def forward(self, x):
        """Return y (…, out) for x (…, in)."""
        y = F.linear(x, self.weight, self.bias)
        if self.lora_A is None or not self.adapter_on:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)  # (tokens, r)
        B = self.lora_B.to(x.dtype)
        return torch.addmm(y.flatten(0, -2), low, B.t(), alpha=self.scaling).view_as(y)

    def merged_weight(self):
        """Return W + (alpha/r) B A (out, in), summed in float32, in W's dtype."""
        weight = full_tensor(self.weight)
        if self.lora_A is None:
            return weight
        update = self.scaling * full_tensor(self.lora_B).float() @ full_tensor(self.lora_A).float()
        return (weight.float() + update).to(weight.dtype)


class RMSNorm(nn.Module):
    """Compute x / rms(x) · weight, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Normalize the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class KVCache:
    """Hold keys and values of the `length` tokens so far, preallocated: per block (2, B, K, capacity, D)."""

    def __init__(self, model, batch: int, capacity: int):
        config = model.config
        shape = (2, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.blocks = [model.lm_head.weight.new_zeros(shape) for _ in model.model.layers]
        self.length = 0

    def append(self, block: int, k, v):
        """Write k, v (B, K, T, D) after the previous tokens. Returns all keys and values (B, K, S, D)."""
        end = self.length + k.shape[2]
        keys, values = self.blocks[block][..., :end, :]
        keys[:, :, self.length :] = k
        values[:, :, self.length :] = v
        return keys, values

    def select(self, rows: Tensor) -> None:
        """Replace the batch by these of its rows, in this order; a row may come several times."""
        self.blocks = [block[:, rows] for block in self.blocks]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        N, K = config.num_attention_heads, config.num_key_value_heads
        D, H = config.head_dim, config.hidden_size
        self.block = block
        self.head_dim = D
        self.grouped = N != K
        self.sizes = [N * D, K * D, K * D]
        self.fused = config.model_type == "phi3"
        if self.fused:
            self.qkv_proj = Linear(H, sum(self.sizes), config.qkv_bias)
        else:
            self.q_proj = Linear(H, N * D, config.qkv_bias)
            self.k_proj = Linear(H, K * D, config.qkv_bias)
            self.v_proj = Linear(H, K * D, config.qkv_bias)
        self.o_proj = Linear(N * D, H, config.o_bias)
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = norm(D, config.rms_norm_eps)
        self.k_norm = norm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, mask, cache, grid):
        """Return the output (B, T, H) for x (B, T, H), or (n, H) for (n, H) if grid = ((B, T), rows (n,))."""
        if self.fused:
            q, k, v = self.qkv_proj(x).split(self.sizes, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # ([B, T] or n, heads, D)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if grid is not None:
            q, k, v = (insert_padding(t, *grid) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.block, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask, self.grouped)  # (B, T, N·D)
        if grid is not None:
            y = y.flatten(0, 1)[grid[1]]  # (n, N·D)
        return self.o_proj(y)


class MLP(nn.Module):
    """Compute down(silu(gate(x)) · up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        H = config.hidden_size
        inner = config.intermediate_size
        bias = config.mlp_bias
        self.fused = config.model_type == "phi3"
        if self.fused:
            self.gate_up_proj = Linear(H, 2 * inner, bias)
        else:
            self.gate_proj = Linear(H, inner, bias)
            self.up_proj = Linear(H, inner, bias)
        self.down_proj = Linear(inner, H, bias)

    def forward(self, x):
        """Return the output (…, H) for x (…, H)."""
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Compute x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, block)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *context):
        """Return the residual stream after this block, shaped as x. `context`: see Attention.forward."""
        x = x + self.self_attn(self.input_layernorm(x), *context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm: all parameters under the checkpoint's prefix `model.`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        with torch.device("cpu"):  # not on meta; and no buffer, so that no cast rounds it
            self.inv_freq, self.rope_scaling = rope_frequencies(config.rope, config.head_dim)

    def rotary_embedding(self, real: Tensor, slots: Tensor, dtype):
        """Return cos and sin (B, T, 1, R) at the slots (T,) of `real` (B, S), which is True at real tokens."""
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, slots]  # (B, T), padded on either side
        self.inv_freq = inv_freq = self.inv_freq.to(real.device)
        if len(inv_freq) == 2:  # longrope: chosen for each row by its own length, not by the batch's
            is_long = real.sum(-1) > self.config.rope["original_max_position_embeddings"]  # (B,)
            inv_freq = inv_freq[is_long.long()][:, None]  # (B, 1, R/2)
        angles = positions[..., None].float() * inv_freq  # (B, T, R/2)
        angles = angles.repeat(1, 1, 2)[:, :, None]  # (B, T, 1, R)
        cos = angles.cos() * self.rope_scaling
        sin = angles.sin() * self.rope_scaling
        return cos.to(dtype), sin.to(dtype)

    def forward(self, input_ids, attention_mask=None, cache=None, rows=None, pool=None):
        """Return the normed states (B, T, H), and [pool(residual stream)], [] without `pool`.

        The residual stream is that after the embeddings, then after each block. rows (n,): indices of the
        real tokens among the B·T. Then only attention computes padding, and states are (n, H).
        """
        B, T = input_ids.shape
        start = cache.length if cache else 0
        x = self.embed_tokens(input_ids)  # (B, T, H)
        real = torch.ones(B, start + T, device=x.device, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask.bool()
        slots = torch.arange(start, start + T, device=x.device)  # (T,)
        cos, sin = self.rotary_embedding(real, slots, x.dtype)
        mask = key_mask(attention_mask, self.config.window, slots, start + T)
        grid = None
        if rows is not None:
            grid = (B, T), rows
            x, cos, sin = (t.flatten(0, 1)[rows] for t in (x, cos, sin))  # (n, H), (n, 1, R)
        pooled = [pool(x)] if pool else []
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, cos, sin, mask, cache, grid)
            if pool:
                pooled.append(pool(x))
        if cache:
            cache.length += T
        return self.norm(x), pooled


class Transformer(nn.Module):
    """A causal language model. `path` is the folder it was loaded from, with tokenizer and template."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.path = None
        self.lora = None  # the adapters' settings in PEFT's names
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight that of the embedding, if the checkpoint says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self):
        """The device of the head, hence of the logits."""
        return self.lm_head.weight.device

    def forward(self, input_ids, attention_mask=None):
        """Return logits (B, T, V) in the model's dtype. `attention_mask` (B, T): True or 1 at real tokens."""
        return self.lm_head(self.model(input_ids, attention_mask)[0])

    @contextmanager
    def adapters_off(self):
        """Make the model the reference policy (arXiv 2602.17546), its frozen weights alone. Can be nested."""
        active = [layer for layer in linears(self).values() if layer.adapter_on]
        for layer in active:
            layer.adapter_on = False
        try:
            yield
        finally:
            for layer in active:
                layer.adapter_on = True


def linears(model: nn.Module) -> dict:
    """Return {name: layer} of all linear layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def compile_blocks(model: Transformer, when: str = "on", backend: str = "inductor") -> None:
    """Compile every block with torch.compile.

    All blocks share one graph, for any batch size and length; the first block, whose input has no gradient,
    has its own, and with adapters off there is one more. `when`: on, off, or auto, which is on for CUDA and
    more than 100 M parameters: a smaller model would compile longer than it trains.
    """
    if when == "auto":
        large = sum(parameter.numel() for parameter in model.parameters()) > 100e6
        when = "on" if large and model.device.type == "cuda" else "off"
    if when == "on":
        torch._dynamo.config.suppress_errors = True  # warn and go on where there is no compiler
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, dynamic=True, backend=backend)


# ---------------------------------------------------------------- checkpoints


def working_dtype(device, dtype: str = "auto") -> torch.dtype:
    """Return the dtype to compute in; for "auto" bfloat16 on CUDA cards that have it, else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    is_cuda = str(device).startswith("cuda")
    if is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def load_model(path, device="cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Load a Hugging Face folder (config.json with model.safetensors or its sharded index), weights frozen.

    The model is built on meta, and takes the tensors that are read. `dtype` None keeps the checkpoint's. Only
    safetensors are read: nothing is unpickled. Raises ModelError, for wrong tensors with every missing,
    unexpected and misshapen key.
    """
    path = Path(path)
    config = read_config(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error)[:60]
        raise ModelError(f"--device: expected one that this machine has, found {device} ({reason})") from None
    tensors = {}
    for file in checkpoint_files(path):
        tensors |= read_tensors(file, device, dtype or config.dtype)
    blocks = {key.split(".")[2] for key in tensors if key.startswith("model.layers.")}
    same_number = f"{len(blocks)}, as the weights have", lambda n: n == len(blocks)
    expect(config.raw, {"num_hidden_layers": same_number}, path)  # before an absurd number of blocks is built
    if config.tie_word_embeddings and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    for key in list(tensors):
        if key.endswith("rotary_emb.inv_freq"):  # some checkpoints store what is derived here
            del tensors[key]
    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{path}: {error}") from None
    model.tie_weights()
    model.path = path
    return model


def save_model(model: Transformer, path) -> None:
    """Write a folder that transformers opens: config, weights with adapters merged, tokenizer and template.

    All processes call it. The write is atomic. Raises FileExistsError for a `path` that exists.
    """
    layers = linears(model)
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        layer, _, kind = name.rpartition(".")
        merged = kind == "weight" and layer in layers
        tensor = layers[layer].merged_weight() if merged else full_tensor(parameter)
        if rank() == 0:
            tensors[name] = tensor.detach().cpu().contiguous()
    config = model.config.raw
    dtype_key = "dtype" if "dtype" in config else "torch_dtype"
    config = config | {dtype_key: str(model.lm_head.weight.dtype).removeprefix("torch.")}
    files = tokenizer_files(model.path) if model.path else []
    on_rank_zero(lambda: write_folder(Path(path), tensors, config, copies=files))


# ---------------------------------------------------------------- LoRA


def add_lora(model: Transformer, r: int, alpha: float, seed: int = 0) -> None:
    """Put adapters (float32, A random as in PEFT, B zero) into every linear layer but the head.

    The update is (alpha/r) B A of rank r (Hu et al. 2021, arXiv 2106.09685). The head is the reference's,
    too.
    """
    layers = linears(model)
    del layers["lm_head"]
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        bound = layer.in_features**-0.5  # Kaiming-uniform with a = √5
        A = (torch.rand(r, layer.in_features, generator=generator) * 2 - 1) * bound
        layer.lora_A = nn.Parameter(A.to(model.device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, device=model.device))
        layer.scaling = alpha / r
    targets = sorted({name.rpartition(".")[2] for name in layers})
    model.lora = {"r": r, "lora_alpha": alpha, "target_modules": targets}


def save_adapter(model: Transformer, path) -> None:
    """Write the adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    base = str(model.path.resolve()) if model.path else ""
    config = model.lora | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base}
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensors[f"base_model.model.{name}.weight"] = full_tensor(parameter).detach().cpu()
    on_rank_zero(lambda: write_folder(Path(path), tensors, config, "adapter_"))


# ---------------------------------------------------------------- generation


def sample(logits: Tensor, temperature: float, u: Tensor):
    """Return next tokens (B,): argmax of logits (B, V) at temperature 0, else drawn from softmax(logits / T).

    By inversion: the first token at which the cumulative probability exceeds u (B, 1), uniform in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits.double() / temperature).softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(total, u * total[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[1] - 1)


def sample_seed(seed: int, prompt: list[int], k: int) -> int:
    """Return the seed of the k-th sample of a prompt (token ids), independent of batches and processes."""
    content = json.dumps([seed, k, prompt])
    return int.from_bytes(sha256(content.encode()).digest()[:7])


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 0.0, seeds=None, batch_size: int = 64,
             progress=lambda n: None, end_token_ids=()) -> list[list[int]]:
    """Complete prompts (token ids). Returns the new tokens of each, without the end token.

    End tokens are the checkpoint's and `end_token_ids`, the chat's: some config.json names only others.
    A completion of max_new_tokens has no end token: it was cut. `seeds` (default: 0, 1, …), one per prompt:
    a sample depends on prompt and seed alone. progress(n) is called when n more are complete. All processes
    call it, with equally many prompts each. Raises ValueError for no or an empty prompt, and if a sequence
    exceeds `max_position_embeddings`.
    """
    lengths = [len(prompt) for prompt in prompts]
    limit = model.config.max_position_embeddings
    if min(lengths, default=0) == 0:
        raise ValueError("generate: expected at least one prompt, each of at least one token")
    if max(lengths) + max_new_tokens > limit:
        raise ValueError(f"generate: {max(lengths)} prompt tokens + {max_new_tokens} new ones exceed "
                         f"max_position_embeddings = {limit}")
    seeds = seeds or range(len(prompts))
    eos = {*model.config.eos_token_ids, *end_token_ids}
    completions = [[]] * len(prompts)
    for batch in batches_by_length(lengths, batch_size):
        u = []
        for i in batch:
            generator = torch.Generator().manual_seed(seeds[i])
            u.append(torch.rand(max_new_tokens, dtype=torch.float64, generator=generator))
        rows = [prompts[i] for i in batch]
        completed = complete(model, rows, max_new_tokens, temperature, torch.stack(u), eos)
        for i, ids in zip(batch, completed):
            completions[i] = ids
        progress(len(batch))
    return completions


def complete(model: Transformer, prompts: list, max_new_tokens: int, temperature: float, u: Tensor,
             eos: set) -> list:
    """Complete one batch with a cache of keys and values; finished rows are dropped on the way.

    u (B, max_new_tokens): a random number for each row and new token. eos: the end tokens.
    """
    device = model.device
    stop = torch.tensor(sorted(eos), device=device, dtype=torch.long)
    rope = model.config.rope
    is_longrope = rope["rope_type"] == "longrope"

    # Several samples of one prompt share the computation of its keys and values.
    unique = [prompt for i, prompt in enumerate(prompts) if prompt not in prompts[:i]]
    which = torch.tensor([unique.index(prompt) for prompt in prompts], device=device)
    ids, real = pad_left(unique, device)  # (unique prompts, T)
    T = ids.shape[1]
    end = T + max_new_tokens
    cache = KVCache(model, len(unique), end)
    logits = next_logits(model, ids, real, cache)[which]  # (B, V)
    cache.select(which)
    ids = F.pad(ids[which], (0, max_new_tokens))  # (B, end)
    real = F.pad(real[which], (0, max_new_tokens), value=True)

    live = torch.arange(len(prompts), device=device)  # the rows that are not dropped
    done = torch.zeros_like(live, dtype=torch.bool)
    u = u.to(device)
    for t in range(T, end):  # the index of the new token
        new = sample(logits, temperature, u[live, t - T, None])  # (rows,)
        ids[live, t] = new
        done |= torch.isin(new, stop)
        if t + 1 == end or all_true(done.all()):
            break
        if len(done) / 4 <= done.sum() < len(done):  # selecting copies the cache
            cache.select(~done)
            live, real, new, done = (rows[~done] for rows in (live, real, new, done))
        lengths = {len(prompt) + t - T for prompt in prompts}
        if is_longrope and rope["original_max_position_embeddings"] in lengths:
            cache.length = 0  # the frequencies change: cached keys are outdated
            new = ids[live, : t + 1]
        else:
            new = new[:, None]
        logits = next_logits(model, new, real[:, : t + 1], cache)
    completions = []
    for new in ids[:, T:].tolist():
        completions.append(list(takewhile(lambda token: token not in eos, new)))
    return completions


def next_logits(model: Transformer, ids: Tensor, real: Tensor, cache: KVCache):
    """Return logits (B, V) of the token after each row of ids (B, T), and add these tokens to the cache."""
    hidden, _ = model.model(ids, real, cache)
    return model.lm_head(hidden[:, -1])
