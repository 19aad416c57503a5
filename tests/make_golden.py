"""Make the golden vectors of transformers and peft: tiny checkpoints of each family, six training steps, chats.

    pip install transformers==5.23.0 peft==0.21.2
    python tests/make_golden.py [NAME …]    # rewrites these folders of tests/golden, or all; nothing else needs transformers

tests/golden/README.md lists the files and their keys. Nothing of this project is used.
"""

import copy
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent / "golden"
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LENGTHS = {"original_max_position_embeddings": 16, "max_position_embeddings": 64}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
OLD_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
LONG_OF_3 = {name: factors[:3] for name, factors in LONG.items()}
CASES = {  # name: (model_type, settings); `old` keys are written in the first generation of config.json
    "llama": ("llama", {}),
    "llama_old_keys": ("llama", {"rope_theta": 500.0, "old": True}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}),
    "llama3_tied": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}, "tie_word_embeddings": True}),
    "llama3_old_keys": ("llama", {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}, "old": True}),
    "llama_bias_head_dim": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "num_key_value_heads": 1}),
    "mistral_window": ("mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_bias": ("qwen3", {"attention_bias": True, "head_dim": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "phi3_partial": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}),
    "phi3_longrope": ("phi3", LENGTHS | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, **LONG}}),
    "phi3_longrope_old_keys": ("phi3", LENGTHS | {"rope_theta": 100.0, "rope_scaling": {"type": "longrope", **LONG}, "old": True}),
    "phi4_mini": ("phi3", LENGTHS | {"rope_theta": 100.0, "rope_scaling": {"type": "longrope", **LONG_OF_3}, "old": True,
                                     "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "sliding_window": 128}),
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
        raw |= {key: CASES[name][1][key] for key in OLD_KEYS if key in CASES[name][1]}
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


# ---------------------------------------------------------------- six steps


RESPONSES = ["00011", "001110000", "0001111", "001011", "00000111", "010111011"]  # 1: a response token
RISK = [0.0, 1.0, 0.375, 0.5, 0.875, 0.0625]
BETA_RANGE = (0.0, 1.0)
N_STEPS, WARMUP, PEAK = 6, 2, 0.02


def trajectory():
    """Write trajectory.safetensors: AdamW steps of LoRA on the checkpoint llama, each example alone, unpadded."""
    torch.manual_seed(7)
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"])
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(HERE / "llama", dtype=torch.float64), lora)
    for p in policy.parameters():
        p.data = p.data.float().double()  # every number at the start is one of float32
    parameters = {name.replace(".default", ""): p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.01)
    length = torch.tensor([len(mask) for mask in RESPONSES])
    input_ids = torch.randint(3, 96, (len(length), max(length)))
    input_ids[torch.arange(max(length)) >= length[:, None]] = 0
    trained = torch.tensor([[int(c) for c in mask.ljust(max(length), "0")] for mask in RESPONSES]).bool()
    labels = torch.where(trained, input_ids, -100)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(length), generator=generator) for _ in range(4)]).view(N_STEPS, 4).tolist()

    records, adapters = [], {name: [p.detach().clone()] for name, p in parameters.items()}
    for step, drawn in enumerate(order):
        drawn = sorted(drawn, key=lambda i: length[i])
        n_tokens = trained[drawn].sum()
        risk = torch.tensor(RISK, dtype=torch.float64)[drawn]
        beta = BETA_RANGE[0] + (BETA_RANGE[1] - BETA_RANGE[0]) * risk
        alpha = 1 - beta
        nll, kl = [], []
        for i in drawn:
            ids, mask = input_ids[i : i + 1, : length[i]], trained[i, 1 : length[i]]
            logp = policy(ids).logits[0, :-1][mask].log_softmax(-1)  # (response tokens, V)
            with torch.no_grad(), policy.disable_adapter():
                ref_logp = policy(ids).logits[0, :-1][mask].log_softmax(-1)
            nll.append(-logp.gather(1, ids[0, 1:][mask][:, None]).sum())
            kl.append((ref_logp.exp() * (ref_logp - logp)).sum())
        nll, kl = torch.stack(nll), torch.stack(kl)
        loss = (alpha * nll + beta * kl).sum() / n_tokens
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        lr = PEAK * (step + 1) / WARMUP if step < WARMUP else PEAK * (1 + math.cos(math.pi * (step - WARMUP) / (N_STEPS - WARMUP))) / 2
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        lr, drawn = torch.tensor(lr, dtype=torch.float64), torch.tensor(drawn)
        records.append({"order": drawn, "n_tokens": n_tokens, "alpha": alpha, "beta": beta, "nll": nll, "kl": kl, "loss": loss,
                        "grad_norm": grad_norm, "lr": lr})
        for name, p in parameters.items():
            adapters[name].append(p.detach().clone())
    tensors = {key: torch.stack([record[key] for record in records]).detach() for key in records[0]}
    tensors |= {"input_ids": input_ids, "labels": labels, "length": length, "risk": torch.tensor(RISK, dtype=torch.float64)}
    tensors |= {name: torch.stack(values) for name, values in adapters.items()}
    save_file(tensors, HERE / "trajectory.safetensors")
    print(f"trajectory: loss {loss:.6f} in the last step")


# ---------------------------------------------------------------- chats


# In the manner of each family. transformers labels what is inside of {% generation %}.
CHATML = """{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA3_CHAT = """{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}
{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL_CHAT = """{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.index <= 2 else '') + m.content + ' [/INST]' }}
{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
PHI3_CHAT = """{% for m in messages %}{{ '<|' + m.role + '|>\n' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>\n' }}
{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}{% endgeneration %}
{% else %}{{ m.content + '<|end|>\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
LLAMA2_CHAT = """{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if messages[0].role == 'system' else '' %}
{% for m in messages %}
{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.index <= 2 else '') + m.content + ' [/INST]' }}
{% elif m.role == 'assistant' %}{% generation %}{{ ' ' + m.content + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"""
QWEN3_CHAT = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' if loop.last else '' }}
{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
PHI4_CHAT = """{% for m in messages %}{{ '<|' + m.role + '|>' }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}
{% if loop.last and not add_generation_prompt %}{{ eos_token }}{% endif %}{% endgeneration %}
{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
CHATS = {  # family: (template with a line break where it is split, control tokens, special tokens, SentencePiece's kind)
    "qwen2": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, False),
    "llama3": (LLAMA3_CHAT, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
               {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, False),
    "mistral": (MISTRAL_CHAT, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, True),
    "phi3": (PHI3_CHAT, ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
             {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, True),
    "llama2": (LLAMA2_CHAT, ["<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, True),
    "qwen3": (QWEN3_CHAT, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"], {"eos_token": "<|im_end|>"}, False),
    "phi4_mini": (PHI4_CHAT, ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
                  {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, False),
}
CONVERSATIONS = [[("user", "What is 3 + 4?"), ("assistant", "It is 7.")],
                 [("system", "Be brief."), ("user", "Where is the river?"), ("assistant", "In the north."),
                  ("user", "And the sea?\nIs it near?"), ("assistant", "No.\n\nIt is in the other direction.")],
                 [("user", "Grüße!"), ("assistant", "日本 🙂")]]
MERGES = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "in"), ("e", "r"), ("i", "s"), ("▁", "is"), ("I", "t"), ("▁", "It")]


def tiny_tokenizer(control: list, sentencepiece: bool) -> Tokenizer:
    """Make a tokenizer of ten merges: of bytes (GPT-2's kind), or of characters, ▁ for a space and before a text (Llama 2's)."""
    merges = [tuple(part if sentencepiece else part.replace("▁", "Ġ") for part in pair) for pair in MERGES]
    words = [content for conversation in CONVERSATIONS for _, content in conversation if content.isascii()]
    characters = sorted(set("".join(words)) | set("[]/INST▁") - {" ", "\n"})
    alphabet = [f"<0x{i:02X}>" for i in range(256)] + characters if sentencepiece else sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<unk>"] + alphabet + ["".join(pair) for pair in merges]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    if sentencepiece:
        tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    rstrip = "<|end|>" in control  # Phi-3's swallow the white space behind them
    tokenizer.add_special_tokens([AddedToken(token, rstrip=rstrip, normalized=False) for token in control])
    return tokenizer


def chat(family: str):
    """Write chat/FAMILY: tokenizer.json, tokenizer_config.json with the template, vectors.json."""
    template, control, special, sentencepiece = CHATS[family]
    template = template.replace("\n{%", "{%")
    folder = HERE / "chat" / family
    folder.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer(control, sentencepiece).save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"chat_template": template}, indent=1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=template, **special)
    vectors, as_prompt = [], {"add_generation_prompt": True, "enable_thinking": False}
    for conversation in CONVERSATIONS:
        if family == "qwen3":  # which has one answer a conversation
            conversation = conversation[:3]
        messages = [{"role": role, "content": content} for role, content in conversation]
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        vectors.append({"messages": messages, "text": tokenizer.apply_chat_template(messages, tokenize=False), "input_ids": ids,
                        "labels": [i if trained else -100 for i, trained in zip(ids, mask)],
                        "prompt": tokenizer.apply_chat_template(messages[:-1], tokenize=False, **as_prompt),
                        "prompt_ids": tokenizer.apply_chat_template(messages[:-1], **as_prompt)["input_ids"]})
    (folder / "vectors.json").write_text("[" + ",\n".join(json.dumps(vector, ensure_ascii=False) for vector in vectors) + "]\n")
    print(f"chat/{family}: {len(vectors)} conversations, {tokenizer.vocab_size} tokens")


if __name__ == "__main__":
    for i, (name, (family, settings)) in enumerate(CASES.items()):
        if name in (sys.argv[1:] or CASES):
            make(name, family, settings, seed=100 + i)
    if "trajectory" in (sys.argv[1:] or ["trajectory"]):
        trajectory()
    if "chat" in (sys.argv[1:] or ["chat"]):
        for family in CHATS:
            chat(family)
