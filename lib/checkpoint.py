"""Checkpoint folders: config.json of either generation, weights, a fingerprint; what a run was made of."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import DataError, ModelError, read_json, remove, write_json, written_whole

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
ROPE_TYPES = ("default", "linear", "llama3", "longrope")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
                   "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
                   "merges.txt", "generation_config.json")


@dataclass(frozen=True)
class Config:
    """What the forward pass needs of config.json, keys of both generations resolved. `raw`: the file read."""

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
    rope: dict  # rope_type, rope_theta, partial_rotary_factor, and what the type needs
    windows: tuple  # per block: length of the sliding window, or None for full attention
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple
    dtype: torch.dtype
    raw: dict


def read_config(path) -> Config:
    """Read `path`/config.json (and generation_config.json's EOS ids). ModelError on anything unsupported."""
    file = Path(path) / "config.json"
    raw, generation = read_json(file), read_json(file.with_name("generation_config.json"), default={})

    def require(key, expected, supported):
        if not supported:
            raise ModelError(f"{file}: {key}: expected {expected}, found {raw.get(key)!r}")

    family = raw.get("model_type")
    if family is None and "method" in raw:
        raise ModelError(f"{path}: expected a checkpoint, found a run of train.py; its model is "
                         f"{Path(path) / 'model'}, which an unfinished run lacks")
    require("model_type", " | ".join(FAMILIES), family in FAMILIES)
    require("hidden_act", "'silu'", raw.get("hidden_act", "silu") == "silu")
    require("quantization_config", "none (load the unquantized checkpoint)",
            raw.get("quantization_config") is None)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "max_position_embeddings", "rms_norm_eps")
    for key in required:
        require(key, "a positive number",
                isinstance(raw.get(key), float if key == "rms_norm_eps" else int) and raw[key] > 0)
    n_heads, n_layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    kv_heads = raw.get("num_key_value_heads") or n_heads
    require("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}", n_heads % kv_heads == 0)

    # Windows: mistral, phi3 on every block; qwen2, qwen3 by `layer_types`, or from `max_window_layers` up.
    window = raw.get("sliding_window") if family != "llama" else None
    sliding = [True] * n_layers
    if family in ("qwen2", "qwen3"):
        window = window if raw.get("use_sliding_window") else None
        types = raw.get("layer_types")
        first = raw.get("max_window_layers", n_layers)
        sliding = ([kind == "sliding_attention" for kind in types] if types
                   else [i >= first for i in range(n_layers)])

    eos = [ids if isinstance(ids, list) else [ids]
           for ids in (raw.get("eos_token_id"), generation.get("eos_token_id")) if ids is not None]
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    require("dtype" if "dtype" in raw else "torch_dtype", "float32, bfloat16 or float16",
            dtype in ("float32", "bfloat16", "float16"))
    bias = bool(raw.get("attention_bias")) and family in ("llama", "qwen3")
    return Config(
        model_type=family, **{key: raw[key] for key in required}, num_key_value_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // n_heads,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)), rope=read_rope(raw, file),
        windows=tuple(window if slides else None for slides in sliding), qkv_bias=bias or family == "qwen2",
        o_bias=bias, mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
        eos_token_ids=tuple(sorted({i for ids in eos for i in ids})), dtype=getattr(torch, dtype), raw=raw,
    )


def read_rope(raw: dict, file) -> dict:
    """RoPE settings from either generation of keys: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = "longrope" if kind == "su" else kind  # the name in the first Phi-3 checkpoints
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(f"{file}: rope_type: expected {' | '.join(ROPE_TYPES)}, found {kind!r}")
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0)
    if rope["rope_type"] == "longrope":
        original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or raw["max_position_embeddings"]
        rope.setdefault("factor", raw["max_position_embeddings"] / rope["original_max_position_embeddings"])
    needed = {"default": (), "linear": ("factor",), "longrope": ("short_factor", "long_factor"),
              "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    for key in needed[rope["rope_type"]]:
        if key not in rope:
            raise ModelError(f"{file}: rope_type {rope['rope_type']!r} needs {key!r}, found {sorted(rope)}")
    return rope


def open_safetensors(file: Path, device="cpu"):
    """safe_open with an error that names the file."""
    try:
        return safe_open(file, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: expected a safetensors file, found: {error}") from None


def checkpoint_files(path) -> list[Path]:
    """A folder's safetensors files. Raises ModelError where there are none, or one of the index is absent."""
    index = Path(path) / "model.safetensors.index.json"
    names = (sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists()
             else ["model.safetensors"])
    if not names:
        raise ModelError(f"{index}: expected a weight_map from keys to files, found none")
    if absent := [name for name in names if not (Path(path) / name).exists()]:
        raise ModelError(f"{path}: expected {', '.join(absent)}, "
                         f"found {', '.join(sorted(p.name for p in Path(path).glob('*')))}")
    return [Path(path) / name for name in names]


def matching_files(path: Path, shapes: dict[str, tuple], config: Config) -> list[Path]:
    """The weight files, once their keys and shapes are those expected.

    Raises ModelError that lists every missing, unexpected and misshapen key. Some checkpoints store what is
    derived here, and is neither: the rotary frequencies, and a tied head (it is the embedding).
    """
    found, files = {}, checkpoint_files(path)
    for file in files:
        with open_safetensors(file) as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}
            found |= {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    spare = {key for key in found if key.endswith("rotary_emb.inv_freq")
             or key == "lm_head.weight" and config.tie_word_embeddings}
    wrong = [f"missing {key}" for key in sorted(shapes.keys() - found.keys())]
    wrong += [f"unexpected {key}" for key in sorted(found.keys() - shapes.keys() - spare)]
    wrong += [f"{key}: expected shape {shape}, found {found[key][0]} {found[key][1]}"
              for key, shape in shapes.items() if key in found
              and (found[key][0] != shape or found[key][1] not in ("F64", "F32", "BF16", "F16"))]
    if wrong:
        said = "\n  ".join([f"the weights do not match config.json ({config.model_type}):", *wrong])
        raise ModelError(f"{path}: {said}")
    return files


def write_checkpoint(path: Path, raw: dict, tensors: dict, tokenizer: Path | None) -> None:
    """A folder of config.json, weights, and the tokenizer and template of `tokenizer`; whole or not at all.

    Raises FileExistsError for a `path` that exists, OSError that names it where it cannot be written.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists already; a model is never written over another")
    with written_whole(path) as part:
        part.mkdir(parents=True)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", raw)
        for name in TOKENIZER_FILES:
            if tokenizer and (tokenizer / name).exists():
                shutil.copy(tokenizer / name, part / name)


def write_adapter(path: Path, config: dict, tensors: dict) -> None:
    """A folder in PEFT's format: adapter_config.json and adapter_model.safetensors; whole or not at all."""
    remove(path)  # of an attempt that ended before its model was saved
    with written_whole(path) as part:
        part.mkdir(parents=True)
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(part / "adapter_config.json", config)


# ---------------------------------------------------------------- tensors with a checksum


def save_checked(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all, with a checksum beside its metadata."""
    text = json.dumps(metadata | {"sha256": checksum(tensors, metadata)})
    with written_whole(Path(path)) as part:
        save_file(tensors, part, {"checked": text})  # one key: several would come in any order


def load_checked(path: Path, what: str) -> tuple[dict, dict]:
    """(tensors, metadata) of `save_checked`. Raises DataError, that expected `what`, for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("checked", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.pop("sha256", None) != checksum(tensors, metadata):
            raise ValueError("another checksum than the file says: it is damaged, or of an older form")
    except Exception as error:
        raise DataError(f"{path}: expected {what}, found: {error}") from None
    return tensors, metadata


def checksum(tensors: dict, metadata: dict) -> str:
    """SHA-256 (hex) of tensors, bit by bit, and of metadata."""
    digest = hashlib.sha256(json.dumps([metadata[key] for key in sorted(metadata)]).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(path) -> str:
    """SHA-256 (hex) of config.json and every weight file of a folder: what a probe's features depend on."""
    digest = hashlib.sha256((Path(path) / "config.json").read_bytes())
    for file in checkpoint_files(path):
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- provenance


def commit(folder: Path = Path(__file__).parent.parent, seconds: float = 10.0) -> str | None:
    """The commit that `folder`, the project's, has checked out, with -dirty where a tracked file differs.

    None where it is no checkout of its own (a copy inside another one is not that one's), or git is absent,
    fails, or takes longer than `seconds`.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.resolve().parent)  # git looks no further up
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode().strip() or None


def provenance(model, data) -> dict:
    """What a run was made of, for its config.json: this code, what it ran on, the model and the data.

    "commit": see `commit`; "versions" of python, torch, tokenizers; "model_sha256": `fingerprint` of the
    folder; "data_sha256": of the file's bytes.
    """
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "tokenizers": tokenizers.__version__}
    with open(data, "rb") as stream:
        data_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"commit": commit(), "versions": versions, "model_sha256": fingerprint(model),
            "data_sha256": data_sha256}
