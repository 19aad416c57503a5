"""The transformer: a Llama-family decoder written out, loading and saving Hugging Face safetensors checkpoints.

Families (config.json's `model_type`): llama (2, 3, 3.1, 3.2), mistral, qwen2, qwen3, phi3. Parameter names are the
checkpoint's keys. LoRA adapters live inside the linear layers and can be switched off, so the reference policy is the
policy's own frozen weights.

Shapes: B batch, T tokens of this call, S tokens attended to (cache included), H hidden size, L blocks, V vocabulary,
N query heads, K key/value heads, D head_dim, R rotary dimensions, r LoRA rank.
"""

import json
import math
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.checkpoint import Config, ModelError, checkpoint_files, open_safetensors, read_config
from data.ranks import on_first, rank, whole

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json", "special_tokens_map.json",
                   "added_tokens.json", "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json")


def rope_frequencies(config: Config) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (1 or 2, R/2) in radians per position, float32, and the factor on cos and sin.

    RoPE: Su et al. 2021, arXiv 2104.09864; `linear` divides all of them; `llama3` divides the long wavelengths, with a ramp
    (Llama 3.1); `longrope` has one set for short and one for long sequences (Ding et al. 2024, arXiv 2402.13753).
    """
    rope, dim = config.rope, int(config.head_dim * config.rope["partial_rotary_factor"])
    inv_freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # (R/2,)
    if rope["rope_type"] == "linear":
        inv_freq = inv_freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # rotations within the original context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelength, unchanged; 0: long wavelength, divided
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / rope["factor"]
    if rope["rope_type"] == "longrope":
        factors = torch.tensor([rope["short_factor"], rope["long_factor"]], dtype=torch.float32)  # (2, R/2)
        scaling = math.sqrt(1 + math.log(max(rope["factor"], 1)) / math.log(rope["original_max_position_embeddings"]))
        return inv_freq / factors, rope.get("attention_factor") or scaling
    return inv_freq[None], 1.0


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R of D dimensions of x (…, heads, D) by the angles of cos, sin (…, 1, R); the rest passes."""
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat((rotary * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def attention_masks(attention_mask, windows, slots: torch.Tensor, S: int) -> dict:
    """{window: boolean (B or 1, 1, T, S), True where the query may look, or None for plain causal attention}.

    `attention_mask` (B, S) is True at real tokens, or None where all are; slots (T,): where the queries stand among the S keys. A padding
    query sees itself, so that no row is empty.
    """
    masks, T = {}, len(slots)
    for window in set(windows):
        if attention_mask is None and S == T and (window is None or T <= window):
            masks[window] = None
            continue
        query, key = slots[:, None], torch.arange(S, device=slots.device)[None]
        allowed = (key <= query) if window is None else (key <= query) & (query - key < window)  # (T, S)
        allowed = allowed[None, None] if attention_mask is None else allowed & attention_mask[:, None, None, :].bool()
        masks[window] = allowed | (key == query)
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
        """W + (alpha/r) B A (out, in), summed in float32, in the dtype of W; just W without an adapter or with it off."""
        weight = whole(self.weight)
        if self.lora_A is None or not self.adapter_on:
            return weight
        return (weight.float() + self.scaling * whole(self.lora_B).float() @ whole(self.lora_A).float()).to(weight.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class KVCache:
    """Keys and values of the tokens seen so far, preallocated: per block (B, K, capacity, D). `length`: how many tokens they are.

    Where `slot` (1,) is set the cache is static: the next token goes there, all of the capacity is attended to under a mask, and so every
    step has the same shapes.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device, dtype):
        shape = (batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length, self.capacity, self.slot = 0, capacity, None

    def append(self, block: int, k, v):
        """Write k, v (B, K, T, D) behind what is there and return all that is attended to, (B, K, S, D)."""
        keys, values = self.keys[block], self.values[block]
        if self.slot is not None:
            return keys.index_copy_(2, self.slot, k), values.index_copy_(2, self.slot, v)
        end = self.length + k.shape[2]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows only, in this order, each as often as it occurs."""
        self.keys, self.values = ([tensor[rows] for tensor in tensors] for tensors in (self.keys, self.values))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config, block: int):
        super().__init__()
        N, K, D, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        self.block, self.head_dim, self.window, self.heads, self.sizes = block, D, config.windows[block], (N, K, K), (N * D, K * D, K * D)
        self.fused, self.qk_norm, self.grouped = config.model_type == "phi3", config.model_type == "qwen3", N != K
        if self.fused:
            self.qkv_proj = Linear(H, sum(self.sizes), config.qkv_bias)
        else:
            self.q_proj, self.k_proj, self.v_proj = (Linear(H, size, config.qkv_bias) for size in self.sizes)
        self.o_proj = Linear(N * D, H, config.o_bias)
        if self.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.rms_norm_eps), RMSNorm(D, config.rms_norm_eps)

    def forward(self, x, cos, sin, masks, cache, grid):
        q, k, v = self.qkv_proj(x).split(self.sizes, -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        # (B, T, heads, D), or (n, heads, D) where padding is left out
        q, k, v = (t.unflatten(-1, (heads, self.head_dim)) for t, heads in zip((q, k, v), self.heads))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if grid is not None:
            (B, T), rows = grid
            q, k, v = (t.new_zeros(B * T, *t.shape[1:]).index_copy(0, rows, t).unflatten(0, (B, T)) for t in (q, k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.append(self.block, k, v)  # (B, K, S, D)
        mask, (N, K, _), grouped = masks[self.window], self.heads, self.grouped
        if grouped and q.shape[2] == 1:  # heads of a group look at the same keys: as one head with as many queries
            q, grouped = q.reshape(q.shape[0], K, N // K, self.head_dim), False
        elif grouped and mask is not None:  # on CUDA, the kernel for masks knows no groups, and the fallback would hold (T, S) per head
            k, v, grouped = k.repeat_interleave(N // K, 1), v.repeat_interleave(N // K, 1), False  # (B, N, S, D)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)  # (B, N, T, D)
        y = y.reshape(y.shape[0], N, -1, self.head_dim).transpose(1, 2).flatten(2)  # (B, T, N·D)
        return self.o_proj(y if grid is None else y.flatten(0, 1)[rows])


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x)) (SwiGLU: Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        H, inner = config.hidden_size, config.intermediate_size
        self.fused = config.model_type == "phi3"
        if self.fused:
            self.gate_up_proj = Linear(H, 2 * inner, config.mlp_bias)
        else:
            self.gate_proj, self.up_proj = Linear(H, inner, config.mlp_bias), Linear(H, inner, config.mlp_bias)
        self.down_proj = Linear(inner, H, config.mlp_bias)

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
        with torch.device("cpu"):  # also when the weights are built on meta; a plain tensor, so that no cast rounds it
            self.inv_freq, self.rope_scaling = rope_frequencies(config)

    def forward(self, input_ids, attention_mask=None, cache=None, layers=(), pool=lambda x: x, rows=None):
        """Final hidden states after the norm (B, T, H), and [pool(residual stream after block i) for i in layers], in order.

        rows (n,): the real tokens' places among the B·T. With them only attention sees the padding, and all states are (n, H).
        """
        B, T = input_ids.shape
        static = cache is not None and cache.slot is not None
        start = cache.slot if static else cache.length if cache is not None else 0
        S = cache.capacity if static else start + T
        x = self.embed_tokens(input_ids)  # (B, T, H)
        slots = torch.arange(T, device=x.device) + start  # (T,): where these tokens stand among the S
        real = torch.ones(B, S, device=x.device, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        positions = (real.cumsum(-1) - 1).clamp_min(0)[:, slots]  # (B, T): padding on either side shifts nothing
        if self.inv_freq.device != x.device:
            self.inv_freq = self.inv_freq.to(x.device)
        inv_freq = self.inv_freq
        if len(inv_freq) == 2:  # longrope: each row by its own length, so that a batch mate never changes a row
            long = real.sum(-1) > self.config.rope["original_max_position_embeddings"]  # (B,)
            inv_freq = inv_freq[long.long()][:, None]  # (B, 1, R/2)
        angles, grid = (positions[..., None].float() * inv_freq).repeat(1, 1, 2)[:, :, None], None  # (B, T, 1, R)
        if rows is not None:
            x, angles, grid = x.flatten(0, 1)[rows], angles.expand(B, T, 1, -1).flatten(0, 1)[rows], ((B, T), rows)  # (n, H), (n, 1, R)
        cos, sin = (angles.cos() * self.rope_scaling).to(x.dtype), (angles.sin() * self.rope_scaling).to(x.dtype)
        masks = attention_masks(attention_mask, self.config.windows, slots, S)
        states = {0: pool(x)} if 0 in layers else {}
        for i, block in enumerate(self.layers, start=1):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, masks, cache, grid, use_reentrant=False)
            else:
                x = block(x, cos, sin, masks, cache, grid)
            if i in layers:
                states[i] = pool(x)
        if cache is not None and not static:
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
        """Logits (B, T, V) in the model's dtype. `attention_mask` (B, T): True or 1 at real tokens; padding on either side."""
        return self.lm_head(self.model(input_ids, attention_mask)[0])

    def hidden_states(self, input_ids, attention_mask=None, layers=None) -> torch.Tensor:
        """Residual stream (len(layers), B, T, H), of all L + 1 layers by default: 0 the embeddings, i after block i, before the norm."""
        layers = range(self.config.num_hidden_layers + 1) if layers is None else layers
        return torch.stack(self.model(input_ids, attention_mask, layers=tuple(layers))[1])

    @contextmanager
    def adapters_off(self):
        """Within it the model is the reference policy: the frozen weights it was loaded with."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        try:
            for linear in linears:
                linear.adapter_on = False
            yield self
        finally:
            for linear in linears:
                linear.adapter_on = True


def compile_blocks(model: Transformer, backend: str = "inductor") -> None:
    """torch.compile every block: all share one graph, for any batch size and length (the first, whose input has no gradient, has its own).

    With the adapters off there is one more.
    """
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)


# ---------------------------------------------------------------- checkpoints


def load_model(path, device="cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Load a Hugging Face folder (config.json with model.safetensors or its sharded index), weights frozen.

    Built on meta, each tensor read once into place. `dtype` None keeps the checkpoint's. Raises ModelError that lists every
    missing, unexpected and misshapen key. Only safetensors are read: nothing is ever unpickled.
    """
    path, config = Path(path), read_config(path)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device: expected one that this machine has, found {device!r} ({str(error).splitlines()[0]})") from None
    with torch.device("meta"):
        model = Transformer(config).requires_grad_(False)
    expected = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    found, files = {}, checkpoint_files(path)
    for file in files:
        with open_safetensors(file) as tensors:
            found |= {key: (tuple(tensors.get_slice(key).get_shape()), tensors.get_slice(key).get_dtype()) for key in tensors.keys()}
    # Stored by some checkpoints and derived here: the rotary frequencies, and a tied head (it is the embedding).
    spare = {key for key in found if key.endswith("rotary_emb.inv_freq") or key == "lm_head.weight" and config.tie_word_embeddings}
    wrong = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    wrong += [f"unexpected {key}" for key in sorted(found.keys() - expected.keys() - spare)]
    wrong += [f"{key}: expected shape {shape}, found {found[key][0]} {found[key][1]}" for key, shape in expected.items()
              if key in found and (found[key][0] != shape or found[key][1] not in ("F64", "F32", "BF16", "F16"))]
    if wrong:
        raise ModelError(f"{path}: the weights do not match config.json ({config.model_type}):\n  " + "\n  ".join(wrong))
    for file in files:
        with open_safetensors(file, device) as tensors:
            shard = {key: tensors.get_tensor(key).to(dtype or config.dtype) for key in tensors.keys() if key in expected}
        model.load_state_dict(shard, assign=True, strict=False)
    model.tie_weights()
    model.path = path
    return model


def working_dtype(device) -> torch.dtype:
    """What the scripts compute in: bfloat16 on CUDA, float32 on the CPU, where bfloat16 is slow."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def save_model(model: Transformer, path) -> None:
    """Write a folder that transformers opens: config, weights (adapters merged in), tokenizer and template.

    Written beside `path` and renamed when complete; raises FileExistsError for a `path` that exists.
    """
    path, tensors = Path(path), {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if ".lora_" not in name:
            merge = isinstance(owner, Linear) and name.endswith(".weight")
            tensor = owner.merged_weight() if merge else whole(parameter)
            tensors[name] = tensor.detach().cpu().contiguous() if rank() == 0 else None

    def write():
        if path.exists():
            raise FileExistsError(f"{path}: exists already; a model is never written over another")
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        dtype_key = "dtype" if "dtype" in model.config.raw else "torch_dtype"
        raw = model.config.raw | {dtype_key: str(model.lm_head.weight.dtype).removeprefix("torch.")}
        (part / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for name in TOKENIZER_FILES:
            if model.path and (model.path / name).exists():
                shutil.copy(model.path / name, part / name)
        os.replace(part, path)

    on_first(write)
