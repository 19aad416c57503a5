"""Make the golden vectors: tiny random checkpoints of every family and RoPE type, and what transformers computes on them.

    pip install transformers==5.23.0 && python tests/make_golden.py     # rewrites tests/golden; nothing else needs transformers

Each folder: a checkpoint (config.json, model.safetensors) and golden.safetensors with
  input_ids (B, T), attention_mask (B, T), hidden_states (L+1, B, T, H) before the final norm, logits (B, T, V),
  generated (B, 8): greedy continuations, each made alone from the row without its padding.
"""

import copy
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent / "golden"
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LENGTHS = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
CASES = {  # name: (model_type, settings); `old` keys are written in the first generation of config.json
    "llama": ("llama", {}),
    "llama_old_keys": ("llama", {"rope_theta": 500.0, "old": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}),
    "llama3_tied": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}, "tie_word_embeddings": True}),
    "llama3_old_keys": ("llama", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "old": True}),
    "llama_bias_head_dim": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1}),
    "mistral_window": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_mixed_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_bias": ("qwen3", {"attention_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3_partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "phi3_longrope": ("phi3", LENGTHS | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **LONG}}),
    "phi3_longrope_old_keys": ("phi3", LENGTHS | {"rope_theta": 100.0, "rope_scaling": {"type": "longrope", **LONG}, "old": True}),
}


def randomize(model, seed):
    """Random values everywhere, so that no bias, norm weight or projection could be forgotten without a difference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread + (1.0 if "norm" in name else 0.0))


@torch.no_grad()
def make(name, family, settings, seed):
    """Write one folder."""
    settings = copy.deepcopy(TINY | settings)  # transformers completes rope dicts in place
    old = settings.pop("old", False)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomize(model, seed)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if old:
        raw = json.loads((folder / "config.json").read_text())
        raw.pop("rope_parameters")
        raw["torch_dtype"] = raw.pop("dtype")
        raw |= {key: CASES[name][1][key] for key in ("rope_theta", "rope_scaling") if key in CASES[name][1]}
        (folder / "config.json").write_text(json.dumps(raw, indent=2))
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

    rope = model.config.rope_parameters
    lengths = (12, 9) if rope["rope_type"] != "longrope" else (20, 20)  # longrope: transformers lets the longest row of a batch decide
    generator = torch.Generator().manual_seed(seed + 1)
    input_ids = torch.randint(3, TINY["vocab_size"], (2, max(lengths)), generator=generator)
    attention_mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()  # left-padded
    positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
    residual = []  # transformers gives the last hidden state after the norm: record what each block and the embeddings put out
    record = lambda module, args, out: residual.append(out[0] if isinstance(out, tuple) else out)
    hooks = [module.register_forward_hook(record) for module in (model.model.embed_tokens, *model.model.layers)]
    logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits
    hidden_states = torch.stack(residual)
    for hook in hooks:
        hook.remove()
    generated = []
    for row, mask in zip(input_ids, attention_mask):
        ids = row[mask.bool()][None]
        if rope["rope_type"] == "longrope":
            ids = ids[:, :14]  # crosses the switch at 16 while generating
        for _ in range(8):
            ids = torch.cat((ids, model(input_ids=ids).logits[:, -1:].argmax(-1)), 1)
        generated.append(ids[0, -8:])
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "hidden_states": hidden_states.contiguous(),
               "logits": logits.contiguous(), "generated": torch.stack(generated)}
    save_file(tensors, folder / "golden.safetensors")
    print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1000:.0f} kB")


if __name__ == "__main__":
    for i, (name, (family, settings)) in enumerate(CASES.items()):
        make(name, family, settings, seed=100 + i)
