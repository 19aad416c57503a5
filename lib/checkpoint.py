"""Read and write checkpoint folders, and name what a run was made of."""

import functools
import hashlib
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import (ModelError, atomic_write, between, either, expect, expect_file, read_json,
                       write_json)

ROOT = Path(__file__).parent.parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
                   "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
                   "merges.txt", "generation_config.json")


# ---------------------------------------------------------------- config.json


def one_of(*values) -> tuple:
    """Return a rule for `expect`: one of these values."""
    return " | ".join(map(str, values)), lambda value: value in values


def are_names(value) -> bool:
    """Return whether this is a list of str."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# Rules for the keys of config.json and its RoPE settings. Other keys are not read.
SIZE = between(1, 10**7)
OPTIONAL_SIZE = between(1, 10**7, optional=True)
FACTOR = between(1e-6, 1e6, float)
DTYPE = one_of(None, "float32", "bfloat16", "float16")
SWITCH = either(bool, optional=True)
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "max_position_embeddings")
RULES = dict.fromkeys(SIZES, SIZE) | {
    "model_type": one_of(*FAMILIES),
    "rms_norm_eps": between(1e-30, 1, float),
    "tie_word_embeddings": SWITCH,
    "attention_bias": SWITCH,
    "mlp_bias": SWITCH,
    "hidden_act": one_of(None, "silu"),
    "quantization_config": ("none: load the unquantized checkpoint", lambda value: value is None),
    "num_key_value_heads": OPTIONAL_SIZE,
    "head_dim": OPTIONAL_SIZE,
    "sliding_window": OPTIONAL_SIZE,
    "use_sliding_window": one_of(None, False),  # Qwen's, in some layers
    "layer_types": ("full_attention alone", lambda types: types is None or are_names(types)
                    and set(types) <= {"full_attention"}),
    "original_max_position_embeddings": OPTIONAL_SIZE,
    "rope_parameters": either(dict, optional=True),
    "rope_scaling": either(dict, optional=True),
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
ROPE_TYPES = {  # further rules of each type
    "default": {},
    "linear": {"factor": FACTOR},
    "llama3": {"factor": FACTOR, "original_max_position_embeddings": SIZE, "low_freq_factor": FACTOR},
    "longrope": {"factor": FACTOR, "original_max_position_embeddings": between(2, 10**7)},
}
ROPE_RULES = {
    "rope_type": one_of(*ROPE_TYPES),
    "rope_theta": between(1, 1e12, float),
    "partial_rotary_factor": between(0, 1, float),
    "original_max_position_embeddings": OPTIONAL_SIZE,
    "attention_factor": between(1e-3, 1e3, float, optional=True),
    "full_attention": ("one set of parameters for all layers", lambda value: value is None),
}


@dataclass(frozen=True)
class Config:
    """The settings of the forward pass. `raw` is the content of config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: dict  # rope_type, rope_theta, partial_rotary_factor, and further parameters of the type
    window: int | None  # length of the sliding window; None: full attention
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple
    dtype: torch.dtype
    raw: dict


def read_config(path) -> Config:
    """Read config.json and the end tokens of generation_config.json. Raises ModelError with file and key."""
    file = Path(path) / "config.json"
    if not file.exists() and file.with_name("adapter_config.json").exists():
        raise ModelError(f"{path}: expected a checkpoint, found a PEFT adapter: merge it into its model with "
                         "peft's merge_and_unload(), and save the model with its tokenizer")
    raw = read_json(file)
    if "model_type" not in raw and "method" in raw:
        raise ModelError(f"{path}: expected a checkpoint, found a run of train.py; its model is "
                         f"{path}/model, which an unfinished run lacks")
    expect(raw, RULES, file)
    values = {key: value for key, value in raw.items() if value is not None}
    family = values["model_type"]
    n_heads = values["num_attention_heads"]
    n_kv_heads = values.get("num_key_value_heads", n_heads)
    head_dim = values.get("head_dim", values["hidden_size"] // n_heads)
    expect(values, {
        "num_key_value_heads": (f"a divisor of num_attention_heads = {n_heads}",
                                lambda _: n_heads % n_kv_heads == 0),
        "hidden_size": (f"a multiple of num_attention_heads = {n_heads}",
                        lambda size: "head_dim" in values or size % n_heads == 0),
    }, file)
    bias = family in ("llama", "qwen3") and values.get("attention_bias", False)
    return Config(
        model_type=family,
        **{key: values[key] for key in SIZES},
        rms_norm_eps=values["rms_norm_eps"],
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        rope=read_rope(values, head_dim, file),
        window=values.get("sliding_window") if family in ("mistral", "phi3") else None,
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=family == "llama" and values.get("mlp_bias", False),
        eos_token_ids=read_eos_token_ids(file, values["vocab_size"]),
        dtype=getattr(torch, values.get("dtype") or values.get("torch_dtype", "float32")),
        raw=raw,
    )


def read_eos_token_ids(file: Path, vocab_size: int) -> tuple:
    """Return the end tokens of config.json and generation_config.json, sorted."""
    eos = set()
    for source in (file, file.with_name("generation_config.json")):
        ids = read_json(source, default={}).get("eos_token_id", [])
        ids = ids if isinstance(ids, list) else [ids]
        if not all(i is None or type(i) is int and 0 <= i < vocab_size for i in ids):
            raise ModelError(f"{source}: eos_token_id: expected one or several token ids under "
                             f"vocab_size = {vocab_size}, found {repr(ids)[:60]}")
        eos.update(ids)
    return tuple(sorted(eos - {None}))


def read_rope(values: dict, head_dim: int, file: Path) -> dict:
    """Return the RoPE settings of `rope_parameters`, or of the older `rope_theta` and `rope_scaling`."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    rope = {key: value for key, value in rope.items() if value is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = "longrope" if kind == "su" else kind  # "su" in the first Phi-3 checkpoints
    rope.setdefault("rope_theta", values.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    expect(rope, ROPE_RULES, f"{file}: RoPE")

    kind = rope["rope_type"]
    dim = int(head_dim * rope["partial_rotary_factor"])
    rules = {"partial_rotary_factor": (f"an even number of rotary dimensions of {head_dim}",
                                       lambda _: dim >= 2 and dim % 2 == 0)}
    if kind == "llama3":
        rules["high_freq_factor"] = ("a number above low_freq_factor", lambda high: FACTOR[1](high)
                                     and rope["low_freq_factor"] < high)  # which is checked before
    if kind == "longrope":
        longest = values["max_position_embeddings"]
        key = "original_max_position_embeddings"
        rope[key] = values.get(key) or rope.get(key, longest)
        rope.setdefault("factor", longest / rope[key])
        rules["short_factor"] = rules["long_factor"] = (
            f"a list of {dim // 2} positive numbers", lambda factors: isinstance(factors, list)
            and len(factors) == dim // 2 and all(map(FACTOR[1], factors)))
    expect(rope, ROPE_TYPES[kind] | rules, f"{file}: RoPE {kind}")
    return rope


# ---------------------------------------------------------------- weights


def checkpoint_files(path) -> list[Path]:
    """Return a folder's weight files: those of its index, or model.safetensors."""
    index = Path(path) / "model.safetensors.index.json"
    if not index.exists():
        return [index.with_name("model.safetensors")]
    table = read_json(index).get("weight_map")
    names = [*table.values()] if isinstance(table, dict) else []
    if not names or not are_names(names) or not all(Path(name).name == name != "" for name in names):
        raise ModelError(f"{index}: weight_map: expected names of safetensors files by key, "
                         f"found {str(table)[:60]}")
    return [index.with_name(name) for name in sorted(set(names))]


def tokenizer_files(path: Path) -> list[Path]:
    """Return the tokenizer and template files of a folder."""
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def read_tensors(file: Path, device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto a device, in a dtype. Raises ModelError."""
    expect_file(file)
    tensors = {}
    try:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():
                tensor = stored.get_tensor(key)
                if tensor.dtype not in FLOATS:
                    raise ValueError(f"{key} of {tensor.dtype}")
                tensors[key] = tensor.to(device, dtype)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: expected a safetensors file of floats, found: "
                         f"{str(error)[:300]}") from None
    return tensors


def write_tensors(path: Path, values: dict) -> None:
    """Write tensors and plain values with torch.save, atomically; torch.load(weights_only=True) reads them."""
    with atomic_write(path) as part, open(part, "wb") as stream:
        torch.save(values, stream)  # to a path, it would hide that a disk is full


def write_folder(path: Path, tensors: dict, config: dict, kind: str = "", copies=()) -> None:
    """Write a new folder with model.safetensors, config.json, and copies of files, atomically.

    kind="adapter_" is the prefix of both names in PEFT's format. Raises FileExistsError for a `path` that
    exists.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists already; a model is never written over another")
    with atomic_write(path) as part:
        part.mkdir(parents=True)
        save_file(tensors, part / f"{kind}model.safetensors", metadata={"format": "pt"})
        write_json(part / f"{kind}config.json", config)
        for file in copies:
            shutil.copyfile(file, part / file.name)  # without its mode: it may be read-only


# ---------------------------------------------------------------- provenance


@functools.cache  # a run asks three times
def fingerprint(path) -> str:
    """Return the SHA-256 (hex) of config.json and every weight file of a folder, one behind the other."""
    digest = hashlib.sha256()
    for file in (Path(path) / "config.json", *checkpoint_files(path)):
        with open(expect_file(file), "rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def commit(folder: Path = ROOT) -> str | None:
    """Return the commit checked out in `folder`, with -dirty if a tracked file differs.

    Returns None for a folder without its own .git, and if git fails.
    """
    command = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "describe", "--always",
               "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def provenance(model, data) -> dict:
    """Return the commit, library versions and checksums of model and data, for a run's config.json."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "tokenizers": tokenizers.__version__}
    with open(data, "rb") as stream:
        data_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"commit": commit(), "versions": versions, "model_sha256": fingerprint(model),
            "data_sha256": data_sha256}
