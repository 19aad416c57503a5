"""The transformer: a Llama-family decoder written out, its checkpoints, its LoRA adapters, and generation.

Families (config.json's `model_type`): llama (2, 3, 3.1, 3.2), mistral, qwen2, qwen3, phi3. Parameter names
are the checkpoint's keys. LoRA adapters live inside the linear layers and can be switched off, so that the
reference policy is the policy's own frozen weights.

Shapes: B batch, T tokens of this call, S attended to (cache included), n real ones among the B·T; H hidden
size, L blocks, V vocabulary, N query heads, K key/value heads, D head_dim, R rotary dimensions, r LoRA rank.
"""

import json
import math
import time
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.chat import batches_by_length
from lib.checkpoint import (Config, matching_files, open_safetensors, read_adapter, read_config,
                            stored_tensors, write_adapter, write_checkpoint)
from lib.files import ModelError
from lib.distributed import all_true, full_tensor, on_rank_zero, rank, world_size

POLL = {"cuda": 8}  # tokens between looks at which rows are finished (elsewhere 1): a look waits for the GPU


# ---------------------------------------------------------------- the transformer


def rope_frequencies(config: Config) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (1 or 2, R/2) in radians per position, float32, and the factor on cos and sin.

    RoPE: Su et al. 2021, arXiv 2104.09864. `linear` divides all; `llama3` the long wavelengths, with a ramp
    (Llama 3.1); `longrope` has sets for short and for long sequences (Ding et al. 2024, arXiv 2402.13753).
    """
    rope, dim = config.rope, int(config.head_dim * config.rope["partial_rotary_factor"])
    inv_freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # (R/2,)
    if rope["rope_type"] == "linear":
        inv_freq = inv_freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # in the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, unchanged; 0: long, divided
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]
    if rope["rope_type"] == "longrope":
        factors = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32)  # (2, R/2)
        original = math.log(rope["original_max_position_embeddings"])
        scaling = math.sqrt(1 + math.log(max(rope["factor"], 1)) / original)
        return inv_freq / factors, rope.get("attention_factor") or scaling
    return inv_freq[None], 1.0


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R of D dimensions of x (…, heads, D) by the angles of cos, sin (…, 1, R)."""
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat((rotary * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def attention_masks(attention_mask, windows, slots: torch.Tensor, S: int) -> dict:
    """{window: boolean (B or 1, 1, T, S), True where the query may look, or None for plain causal attention}.

    `attention_mask` (B, S) is True at real tokens, or None where all are; slots (T,): where the queries stand
    among the S keys. A padding query sees itself, so that no row is empty.
    """
    masks, T = {}, len(slots)
    for window in set(windows):
        if attention_mask is None and S == T and (window is None or T <= window):
            masks[window] = None
            continue
        query, key = slots[:, None], torch.arange(S, device=slots.device)[None]
        allowed = (key <= query) if window is None else (key <= query) & (query - key < window)  # (T, S)
        if attention_mask is not None:
            allowed = allowed & attention_mask[:, None, None, :].bool()  # (B, 1, T, S)
        masks[window] = (allowed | (key == query)).reshape(-1, 1, T, S)
    return masks


class Linear(nn.Linear):
    """y = W x + b, and with an adapter + (alpha/r) B A x (LoRA: Hu et al. 2021, arXiv 2106.09685).

    A (r, in) and B (out, r) may be float32 over bfloat16 weights; the arithmetic is in the dtype of x.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling, self.adapter_on = 0.0, True

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.lora_A is not None and self.adapter_on:
            low = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)  # (tokens, r)
            y = torch.addmm(y.flatten(0, -2), low, self.lora_B.to(x.dtype).t(), alpha=self.scaling).view_as(y)
        return y

    def merged_weight(self) -> torch.Tensor:
        """W + (alpha/r) B A (out, in), summed in float32, in W's dtype; W alone where no adapter is on."""
        weight = full_tensor(self.weight)
        if self.lora_A is None or not self.adapter_on:
            return weight
        update = self.scaling * full_tensor(self.lora_B).float() @ full_tensor(self.lora_A).float()
        return (weight.float() + update).to(weight.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class KVCache:
    """Keys and values of the `length` tokens seen so far, preallocated: per block (B, K, capacity, D)."""

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        blocks = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in blocks]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in blocks]
        self.length = 0

    def append(self, block: int, k, v):
        """Write k, v (B, K, T, D) behind what is there and return all that is attended to, (B, K, S, D)."""
        keys, values, end = self.keys[block], self.values[block], self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows only, in this order, each as often as it occurs."""
        self.keys, self.values = ([tensor[rows] for tensor in tensors]
                                  for tensors in (self.keys, self.values))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        N, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        H, self.block, self.window = config.hidden_size, block, config.windows[block]
        self.heads, self.head_dim, self.sizes = (N, K, K), D, (N * D, K * D, K * D)
        self.grouped = N != K  # decided here: of a comparison in forward torch.compile would make a symbol
        self.fused, self.qk_norm = config.model_type == "phi3", config.model_type == "qwen3"
        if self.fused:
            self.qkv_proj = Linear(H, sum(self.sizes), config.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (Linear(H, size, config.qkv_bias) for size in self.sizes)
        self.o_proj = Linear(N * D, H, config.o_bias)
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, masks, cache, grid):
        qkv = self.qkv_proj(x).split(self.sizes, -1) if self.fused else (
            self.q_proj(x), self.k_proj(x), self.v_proj(x))
        # (B, T, heads, D), or (n, heads, D) where padding is left out
        q, k, v = (t.unflatten(-1, (heads, self.head_dim)) for t, heads in zip(qkv, self.heads))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if grid is not None:
            (B, T), rows = grid
            q, k, v = (t.new_zeros(B * T, *t.shape[1:]).index_copy(0, rows, t).unflatten(0, (B, T))
                       for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.block, k, v)  # (B, K, S, D)
        mask, (N, K, _), grouped = masks[self.window], self.heads, self.grouped
        if grouped and q.shape[2] == 1:  # a group's heads see the same keys: as one head with as many queries
            q, grouped = q.reshape(q.shape[0], K, N // K, self.head_dim), False
        elif grouped and (mask is not None or q.is_cuda and q.dtype == torch.float32):
            # k, v (B, N, S, D): CUDA's kernels for masks and for float32 know no groups; the fallback holds
            # (N, T, S) scores
            k, v, grouped = k.repeat_interleave(N // K, 1), v.repeat_interleave(N // K, 1), False
        if q.dtype == torch.bfloat16 and not q.is_cuda and torch.is_grad_enabled():
            q, k, v = q.float(), k.float(), v.float()  # the CPU's backward pass is twice as fast so
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
        y = y.to(x.dtype)
        y = y.reshape(y.shape[0], N, -1, self.head_dim).transpose(1, 2).flatten(2)  # (B, T, N·D)
        return self.o_proj(y if grid is None else y.flatten(0, 1)[rows])


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        H, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.fused = config.model_type == "phi3"
        if self.fused:
            self.gate_up_proj = Linear(H, 2 * inner, bias)
        else:
            self.gate_proj, self.up_proj = Linear(H, inner, bias), Linear(H, inner, bias)
        self.down_proj = Linear(inner, H, bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, block)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, masks, cache, grid):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, masks, cache, grid)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm: everything under the checkpoint's `model.` prefix."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        with torch.device("cpu"):  # also when weights are built on meta; a plain tensor: no cast rounds it
            self.inv_freq, self.rope_scaling = rope_frequencies(config)

    def forward(self, input_ids, attention_mask=None, cache=None, layers=(), pool=lambda x: x, rows=None):
        """Final states after the norm (B, T, H), and [pool(residual stream after block i) for i in layers].

        rows (n,): the real tokens' places among the B·T. Only attention then sees padding; states are (n, H).
        """
        B, T = input_ids.shape
        start = cache.length if cache is not None else 0
        S, x = start + T, self.embed_tokens(input_ids)  # (B, T, H)
        slots = torch.arange(start, S, device=x.device)  # (T,): where these tokens stand among the S
        real = (torch.ones(B, S, device=x.device, dtype=torch.bool) if attention_mask is None
                else attention_mask.bool())
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, slots]  # (B, T), whichever side is padded
        if self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        inv_freq = self.inv_freq
        if len(inv_freq) == 2:  # longrope: each row by its own length, so that no batch mate changes it
            long = real.sum(-1) > self.config.rope["original_max_position_embeddings"]  # (B,)
            inv_freq = inv_freq[long.long()][:, None]  # (B, 1, R/2)
        angles = positions[..., None].float() * inv_freq  # (B, T, R/2)
        angles, grid = angles.repeat(1, 1, 2)[:, :, None], None  # (B, T, 1, R)
        if rows is not None:
            x, grid = x.flatten(0, 1)[rows], ((B, T), rows)  # (n, H)
            angles = angles.expand(B, T, 1, -1).flatten(0, 1)[rows]  # (n, 1, R)
        cos, sin = ((angles.cos() * self.rope_scaling).to(x.dtype),
                    (angles.sin() * self.rope_scaling).to(x.dtype))
        masks = attention_masks(attention_mask, self.config.windows, slots, S)
        states = {0: pool(x)} if 0 in layers else {}
        for i, block in enumerate(self.layers, start=1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, masks, cache, grid, use_reentrant=False)
            else:
                x = block(x, cos, sin, masks, cache, grid)
            if i in layers:
                states[i] = pool(x)
        if cache is not None:
            cache.length = S
        return self.norm(x), [states[i] for i in layers]


class Transformer(nn.Module):
    """A causal language model; `path` is the folder it came from (tokenizer and template stay there)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config, self.path = config, None
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """The head is the embedding, where the checkpoint says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, input_ids, attention_mask=None) -> torch.Tensor:
        """Logits (B, T, V) in the model's dtype. `attention_mask` (B, T): True or 1 at real tokens."""
        return self.lm_head(self.model(input_ids, attention_mask)[0])

    def hidden_states(self, input_ids, attention_mask=None, layers=None) -> torch.Tensor:
        """Residual stream (len(layers), B, T, H), not normed; of all L + 1 by default: 0 the embeddings."""
        layers = range(self.config.num_hidden_layers + 1) if layers is None else layers
        return torch.stack(self.model(input_ids, attention_mask, layers=tuple(layers))[1])

    @contextmanager
    def adapters_off(self):
        """Within it the model is the reference policy (arXiv 2602.17546): the frozen weights alone."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        before = [linear.adapter_on for linear in linears]
        try:
            for linear in linears:
                linear.adapter_on = False
            yield self
        finally:
            for linear, on in zip(linears, before):
                linear.adapter_on = on


def compile_blocks(model: Transformer, when: str = "on", backend: str = "inductor") -> None:
    """torch.compile every block: all share one graph, for any batch size and length.

    The first block, whose input has no gradient, has its own; with adapters off there is one more. `when`:
    on, off, or auto: on CUDA above 100 M parameters; a smaller model would compile longer than it trains.
    """
    large = model.device.type == "cuda" and sum(parameter.numel() for parameter in model.parameters()) > 100e6
    if (when == "on" or when == "auto" and large) and can_compile(model.device.type, backend):
        for block in model.model.layers:
            block.forward = torch.compile(block.forward, dynamic=True, backend=backend)


@cache
def can_compile(device: str, backend: str) -> bool:
    """Whether torch.compile works here, tried on one function; where it does not, a printed line says why."""
    try:
        torch.compile(torch.sin, backend=backend)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no Triton, a torch that is too old for the card, …
        why = str(error).strip().splitlines()[0][:100]
        print(f"torch.compile does not work here ({why}): going on without")
        return False
    return True


# ---------------------------------------------------------------- checkpoints


def working_dtype(path, device, dtype: str = "auto") -> torch.dtype:
    """What the scripts compute the checkpoint `path` in: `dtype`, or for "auto" what is faster there.

    bfloat16 on CUDA; on the CPU as a product of the model's size says, but float32 for small models, which
    gain nothing, and for several processes, which have to agree.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if str(device).startswith("cuda"):
        return _cuda_dtype()
    config = read_config(Path(path))
    small = config.hidden_size < 512
    return torch.float32 if small or world_size() > 1 else _cpu_dtype(config.hidden_size, config.intermediate_size)


@cache
def _cuda_dtype() -> torch.dtype:
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        print("this card has no bfloat16: computing in float32")
        return torch.float32
    return torch.bfloat16


@cache
def _cpu_dtype(*sizes: int) -> torch.dtype:
    """The faster one for products (512, H) × (H, inner), timed once; bfloat16 has to gain a quarter."""
    speed = {}  # GFLOP/s
    for dtype in (torch.float32, torch.bfloat16):
        a, b, seconds = torch.ones(512, sizes[0], dtype=dtype), torch.ones(sizes, dtype=dtype), []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - start)
        speed[dtype] = 2 * 512 * math.prod(sizes) / min(seconds) / 1e9
    chosen = torch.bfloat16 if speed[torch.bfloat16] > 1.25 * speed[torch.float32] else torch.float32
    print(f"computing in {str(chosen).removeprefix('torch.')}: products run at {speed[torch.bfloat16]:.0f} "
          f"GFLOP/s in bfloat16, {speed[torch.float32]:.0f} in float32 (--dtype)")
    return chosen


def load_model(path, device="cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Load a Hugging Face folder (config.json with model.safetensors or its sharded index), weights frozen.

    Built on meta, each tensor read once into place. `dtype` None keeps the checkpoint's. Raises ModelError
    that lists every missing, unexpected and misshapen key. Only safetensors are read: nothing is unpickled.
    """
    path, config = Path(path), read_config(path)
    try:
        device = torch.empty(0, device=device).device  # "cuda" with its number: to safetensors it is GPU 0
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"device: expected one that this machine has, found {device!r} ({said})") from None
    stored = stored_tensors(path, config)
    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    for file in matching_files(path, stored, shapes, config):
        with open_safetensors(file, device) as tensors:
            shard = {key: tensors.get_tensor(key) for key in tensors.keys() if key in shapes}
        shard = {key: tensor.to(dtype or config.dtype) for key, tensor in shard.items()}
        model.load_state_dict(shard, assign=True, strict=False)
    model.tie_weights()
    model.path = path
    return model


def save_model(model: Transformer, path) -> None:
    """Write a folder that transformers opens: config, weights (adapters merged in), tokenizer and template.

    Written beside `path` and renamed when complete. Raises FileExistsError for a `path` that exists.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            owner = model.get_submodule(name.rpartition(".")[0])
            merged = isinstance(owner, Linear) and name.endswith(".weight")
            tensor = owner.merged_weight() if merged else full_tensor(parameter)
            tensors[name] = tensor.detach().cpu().contiguous() if rank() == 0 else None
    dtype_key = "dtype" if "dtype" in model.config.raw else "torch_dtype"
    raw = model.config.raw | {dtype_key: str(model.lm_head.weight.dtype).removeprefix("torch.")}
    on_rank_zero(lambda: write_checkpoint(Path(path), raw, tensors, tokenizer=model.path))


# ---------------------------------------------------------------- LoRA


def add_lora(model: Transformer, r: int, alpha: float, targets=None, seed: int = 0) -> list[str]:
    """Put adapters (float32, A random as in PEFT, B zero) into every linear in `targets`; returns the names.

    Rank r, update (alpha/r) B A (Hu et al. 2021, arXiv 2106.09685). Default: every linear but the head.
    Raises ModelError for a name that matches no linear, or r < 1.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    names = sorted({name.rpartition(".")[2] for name in linears})
    targets = list(targets or [name for name in names if name != "lm_head"])
    if unknown := sorted(set(targets) - set(names)):
        raise ModelError(f"LoRA targets: expected some of {', '.join(names)}, found {', '.join(unknown)}")
    if "lm_head" in targets and model.config.tie_word_embeddings:
        raise ModelError("LoRA targets: lm_head shares its weight with the embeddings here, "
                         "and cannot be adapted alone")
    if r < 1:
        raise ModelError(f"LoRA rank: expected at least 1, found {r}")
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if name.rpartition(".")[2] in targets:
            bound, device = linear.in_features**-0.5, linear.weight.device  # Kaiming-uniform with a = √5
            A = (torch.rand(r, linear.in_features, generator=generator) * 2 - 1) * bound
            linear.lora_A = nn.Parameter(A.to(device))
            linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=device))
            linear.scaling = alpha / r
    return targets


def save_adapter(model: Transformer, path) -> None:
    """Write the adapters as PEFT does: adapter_config.json and adapter_model.safetensors. Needs adapters."""
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}
    if not adapted:
        raise ModelError("save_adapter: expected a model with LoRA adapters, found none")
    r, scaling = next((m.lora_A.shape[0], m.scaling) for m in adapted.values())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": scaling * r,
              "lora_dropout": 0.0, "base_model_name_or_path": str(model.path.resolve()) if model.path else "",
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "target_modules": sorted({name.rpartition(".")[2] for name in adapted})}
    tensors = {f"base_model.model.{name}.lora_{which}.weight":
               full_tensor(getattr(m, f"lora_{which}")).detach().cpu()
               for name, m in adapted.items() for which in "AB"}
    on_rank_zero(lambda: write_adapter(Path(path), config, tensors))


def load_adapter(model: Transformer, path) -> None:
    """Put a PEFT folder's adapters, e.g. a run's, into `model`. Raises ModelError where they do not fit."""
    config, tensors = read_adapter(path)
    try:
        add_lora(model, config["r"], config["lora_alpha"], config["target_modules"])
    except ModelError as error:
        raise ModelError(f"{path}/adapter_config.json: {error}") from None
    own = {f"base_model.model.{key}.weight": p for key, p in model.named_parameters() if ".lora_" in key}
    misshapen = {k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape}
    wrong = own.keys() ^ tensors.keys() | misshapen
    if wrong:
        raise ModelError(f"{path}/adapter_model.safetensors: missing, unexpected or misshapen: "
                         f"{', '.join(sorted(wrong))}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])


# ---------------------------------------------------------------- generation


def sample(logits: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    """Next tokens (B,): argmax of logits (B, V) at temperature 0, else from softmax(logits / temperature).

    By inversion: the first token at which the cumulative probability exceeds u (B, 1), uniform in [0, 1).
    """
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits.double() / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(total, u * total[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def sample_seed(seed: int, prompt: list[int], k: int) -> int:
    """Of the k-th sample of a prompt (token ids): whatever else is evaluated, and by how many processes."""
    return int.from_bytes(sha256(json.dumps([seed, k, prompt]).encode()).digest()[:7])


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0,
             seeds: list[int] | None = None, batch_size: int = 64,
             progress=lambda n: None) -> list[list[int]]:
    """Complete prompts (token ids): the new tokens of each, without the checkpoint's EOS id that ends it.

    A completion of max_new_tokens has no such end: it was cut. seeds (default: 0, 1, …): one per prompt; what
    is sampled depends on prompt and seed, not on what is beside it. progress(n): n more are complete. All
    processes call it, with equally many prompts each. Raises ValueError if one is empty or exceeds
    `max_position_embeddings`.
    """
    lengths = [len(prompt) for prompt in prompts]
    if not prompts or min(lengths) == 0:
        raise ValueError("generate: expected at least one prompt, each of at least one token")
    longest, limit = max(lengths), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(f"generate: {longest} prompt tokens + {max_new_tokens} new ones exceed "
                         f"max_position_embeddings = {limit}")
    seeds, completions = seeds or list(range(len(prompts))), [[]] * len(prompts)
    for batch in batches_by_length(lengths, batch_size):
        u = torch.stack([torch.rand(max_new_tokens, dtype=torch.float64,
                                    generator=torch.Generator().manual_seed(seeds[i])) for i in batch])
        completed = _complete(model, [prompts[i] for i in batch], max_new_tokens, temperature, u)
        for i, ids in zip(batch, completed):
            completions[i] = ids
        progress(len(batch))
    return completions


def _complete(model, prompts: list[list[int]], max_new_tokens: int, temperature: float,
              u: torch.Tensor) -> list[list[int]]:
    """One left-padded batch: keys, values cached, head on the last position only, finished rows dropped.

    u (B, max_new_tokens): the random number of each row and place.
    """
    B, T, device, ends = len(prompts), max(map(len, prompts)), model.device, model.config.eos_token_ids
    stop, poll = torch.tensor(ends, device=device, dtype=torch.long), POLL.get(device.type, 1)
    ids = torch.zeros(B, T + max_new_tokens, device=device, dtype=torch.long)
    real = torch.zeros(B, T + max_new_tokens, device=device, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, T - len(prompt) : T] = torch.tensor(prompt, device=device)
        real[row, T - len(prompt) : T] = True
    rope = model.config.rope
    switch = rope["original_max_position_embeddings"] if rope["rope_type"] == "longrope" else math.inf

    # Several samples of one prompt: its keys and values are computed once.
    number = {}  # prompt → its number among the different ones
    which = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    first = [which.index(n) for n in range(len(number))]
    first, which = (torch.tensor(i, device=device) for i in (first, which))
    cache = KVCache(model.config, len(first), T + max_new_tokens, device, model.lm_head.weight.dtype)
    logits = _prefill(model, ids[first, :T], real[first, :T], cache)[which]  # (B, V)
    cache.keep(which)

    u, live = u.to(device), torch.arange(B, device=device)  # the rows that are kept
    done = torch.zeros(B, device=device, dtype=torch.bool)
    for end in range(T, T + max_new_tokens):  # tokens so far, padding included
        new = sample(logits, temperature, u[live, end - T, None])  # (rows,)
        ids[live, end], real[:, end] = new, True
        done |= torch.isin(new, stop)
        if end + 1 == T + max_new_tokens:
            break
        if (end - T) % poll == poll - 1:
            if all_true(done.all()):
                break
            if len(done) / 4 <= done.sum() < len(done):  # copies the cache: worth it for a quarter of rows
                keep = ~done
                cache.keep(keep)
                live, real, done, new = live[keep], real[keep], done[keep], new[keep]
        if any(len(prompt) + end - T == switch for prompt in prompts):  # long RoPE: cached keys are outdated
            cache.length = 0
            logits = _prefill(model, ids[live, : end + 1], real[:, : end + 1], cache)
        else:
            logits = model.lm_head(model.model(new[:, None], real[:, : end + 1], cache)[0][:, -1])
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
            for row in ids[:, T:].tolist()]


def _prefill(model, tokens: torch.Tensor, real: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) of the next token, after tokens (B, T), left-padded, with which the cache is filled."""
    hidden, _ = model.model(tokens, real, cache, rows=real.flatten().nonzero()[:, 0])  # (n, H)
    return model.lm_head(hidden[real.sum(-1).cumsum(0) - 1])
