"""Checkpoint folders: config.json of either generation, weights, a fingerprint; what a run was made of."""

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lib.files import (DataError, ModelError, between, either, expect, expect_file, parse_json, read_json,
                       write_json, atomic_write)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3")
ROPE_TYPES = ("default", "linear", "llama3", "longrope")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json",
                   "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
                   "merges.txt", "generation_config.json")
LARGEST_TOKENIZER = 1 << 28  # bytes of one of them

# What a key of config.json may be; others are not read.
WIDTH, SWITCH, POSITIONS, FACTOR = (between(1, 10**6), either(bool, optional=True), between(2, 10**9),
                                    between(1e-6, 1e6, float))
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps")
DTYPE = ("float32, bfloat16 or float16", lambda value: value in (None, "float32", "bfloat16", "float16"))
RULES = {
    "model_type": (" | ".join(FAMILIES), lambda value: value in FAMILIES),
    "hidden_act": ("'silu'", lambda value: value in (None, "silu")),
    "quantization_config": ("none (load the unquantized checkpoint)", lambda value: value is None),
    "vocab_size": between(1, 10**7), "hidden_size": WIDTH, "intermediate_size": WIDTH,
    "num_hidden_layers": between(1, 10**4), "num_attention_heads": between(1, 10**4),
    "num_key_value_heads": between(1, 10**4, optional=True), "head_dim": between(2, 10**4, optional=True),
    "rms_norm_eps": between(1e-30, 1, float), "max_position_embeddings": POSITIONS,
    "original_max_position_embeddings": between(2, 10**9, optional=True),
    "sliding_window": between(1, 10**9, optional=True), "use_sliding_window": SWITCH,
    "max_window_layers": between(0, 10**4, optional=True),
    "layer_types": ("a list of full_attention and sliding_attention", lambda value: value is None or
                    isinstance(value, list)
                    and all(kind in ("full_attention", "sliding_attention") for kind in value)),
    "tie_word_embeddings": SWITCH, "attention_bias": SWITCH, "mlp_bias": SWITCH,
    "rope_parameters": either(dict, optional=True), "rope_scaling": either(dict, optional=True),
    "dtype": DTYPE, "torch_dtype": DTYPE,
}
ROPE_RULES = {
    "rope_type": (" | ".join(ROPE_TYPES), lambda value: value in ROPE_TYPES),
    "rope_theta": between(1, 1e12, float), "partial_rotary_factor": between(0, 1, float),
    "attention_factor": between(1e-3, 1e3, float, optional=True),
}

PLAIN_LORA = {  # what adapter_config.json may say, where it says it: others change more than W by B·A
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,),
    "lora_bias": (False,), "modules_to_save": (None,), "rank_pattern": ({},), "alpha_pattern": ({},),
    "layers_to_transform": (None,), "exclude_modules": (None,), "layer_replication": (None,),
    "target_parameters": (None,), "init_lora_weights": (True, False, "gaussian"),
}
LORA_RULES = {
    "r": between(1, 10**5), "lora_alpha": between(0, 1e9, float),
    "target_modules": ("a list of names", lambda value: isinstance(value, list) and value != []
                       and all(isinstance(name, str) for name in value)),
}


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

    family = raw.get("model_type")
    if family is None and "method" in raw:
        raise ModelError(f"{path}: expected a checkpoint, found a run of train.py; its model is "
                         f"{Path(path) / 'model'}, which an unfinished run lacks")
    expect(raw, RULES, file)
    n_heads, n_layers, vocab_size = raw["num_attention_heads"], raw["num_hidden_layers"], raw["vocab_size"]
    kv_heads = raw.get("num_key_value_heads") or n_heads
    head_dim = raw.get("head_dim") or raw["hidden_size"] // n_heads

    # Windows: mistral, phi3 on every block; qwen2, qwen3 by `layer_types`, or from `max_window_layers` up.
    window, types = raw.get("sliding_window") if family != "llama" else None, None
    sliding = [True] * n_layers
    if family in ("qwen2", "qwen3"):
        window, types = window if raw.get("use_sliding_window") else None, raw.get("layer_types")
        first = raw.get("max_window_layers")
        sliding = ([kind == "sliding_attention" for kind in types] if types
                   else [i >= (n_layers if first is None else first) for i in range(n_layers)])

    eos = [ids if isinstance(ids, list) else [ids]
           for ids in (raw.get("eos_token_id"), generation.get("eos_token_id")) if ids is not None]
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    bias = bool(raw.get("attention_bias")) and family in ("llama", "qwen3")
    together = {
        "num_key_value_heads": (f"a divisor of num_attention_heads = {n_heads}", n_heads % kv_heads == 0),
        "hidden_size": ("a multiple of num_attention_heads", raw.get("head_dim") or head_dim * n_heads
                        == raw["hidden_size"]),
        "layer_types": (f"{n_layers}, as there are layers", not types or len(types) == n_layers),
    }
    for key, (expected, is_so) in together.items():
        if not is_so:
            raise ModelError(f"{file}: {key}: expected {expected}, found {repr(raw.get(key))[:60]}")
    for where, found in ((file, raw), (file.with_name("generation_config.json"), generation)):
        expect(found, {"eos_token_id": (f"one or several token ids under vocab_size = {vocab_size}",
                                        lambda ids: _are_ids(ids, vocab_size))}, where)
    return Config(
        model_type=family, **{key: raw[key] for key in REQUIRED}, num_key_value_heads=kv_heads,
        head_dim=head_dim, tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        rope=read_rope(raw, head_dim, file),
        windows=tuple(window if slides else None for slides in sliding), qkv_bias=bias or family == "qwen2",
        o_bias=bias, mlp_bias=family == "llama" and bool(raw.get("mlp_bias")),
        eos_token_ids=tuple(sorted({i for ids in eos for i in ids})), dtype=getattr(torch, dtype), raw=raw,
    )


def _are_ids(ids, vocab_size: int) -> bool:
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    return all(type(i) is int and 0 <= i < vocab_size for i in ids)


def read_rope(raw: dict, head_dim: int, file) -> dict:
    """RoPE settings from either generation of keys: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_type"] = "longrope" if kind == "su" else kind  # the name in the first Phi-3 checkpoints
    for key, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 1.0)):
        if rope.get(key) is None:
            rope[key] = default if raw.get(key) is None else raw[key]
    where = f"{file}: RoPE"
    expect(rope, ROPE_RULES, where)
    if rope["rope_type"] == "longrope":
        original = raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        rope["original_max_position_embeddings"] = original or raw["max_position_embeddings"]
        expect(rope, {"original_max_position_embeddings": POSITIONS}, where)
        rope.setdefault("factor", raw["max_position_embeddings"] / rope["original_max_position_embeddings"])
    dim = int(head_dim * rope["partial_rotary_factor"])
    factors = (f"a list of {dim // 2} positive numbers", lambda value: isinstance(value, list)
               and len(value) == dim // 2 and all(FACTOR[1](number) for number in value))
    needed = {"default": {}, "linear": {"factor": FACTOR},
              "longrope": {"factor": FACTOR, "short_factor": factors, "long_factor": factors},
              "llama3": {"factor": FACTOR, "low_freq_factor": FACTOR, "high_freq_factor": FACTOR,
                         "original_max_position_embeddings": POSITIONS}}[rope["rope_type"]]
    expect(rope, needed, f"{where} {rope['rope_type']}")
    if odd := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise ModelError(f"{where}: expected one set of parameters for all layers, found several: "
                         f"{', '.join(odd)[:60]}")
    if dim < 2 or dim % 2:
        raise ModelError(f"{where}: expected an even number of rotary dimensions, found {dim}, head_dim · "
                         f"partial_rotary_factor")
    if rope["rope_type"] == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise ModelError(f"{where}: expected low_freq_factor < high_freq_factor, found them otherwise")
    return rope


def open_safetensors(file: Path, device="cpu"):
    """safe_open with an error that names the file."""
    expect_file(file, 1 << 60, ModelError, links=False)
    try:
        return safe_open(file, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: expected a safetensors file, found: {error}") from None


def checkpoint_files(path) -> list[Path]:
    """A folder's safetensors files. Raises ModelError where there are none, or one of the index is absent."""
    path, names = Path(path), ["model.safetensors"]
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        named = read_json(index).get("weight_map")
        names = list(named.values()) if isinstance(named, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{index}: expected a weight_map from keys to files, found none")
        names = sorted(set(names))
        if odd := [name for name in names if not name.endswith(".safetensors") or set("/\\\0") & set(name)]:
            raise ModelError(f"{index}: expected names of safetensors files in {path}, found {odd[0]!r}")
    if absent := [name for name in names if not os.path.lexists(path / name)]:
        raise ModelError(f"{path}: expected {', '.join(absent[:9])}, "
                         f"found {', '.join(sorted(p.name for p in path.glob('*')))}")
    return [path / name for name in names]


def stored_tensors(path, config: Config) -> dict[str, tuple]:
    """{key: (shape, dtype, file)} of a folder's weights, from their headers.

    Raises ModelError where they hold another number of blocks than config.json says, which so never has an
    absurd model built, and for other files of the folder that could not be copied into a run.
    """
    found, path = {}, Path(path)
    for file in checkpoint_files(path):
        with open_safetensors(file) as tensors:
            for key in tensors.keys():
                if key in found:
                    raise ModelError(f"{file}: expected each key in one file, found {key!r} in two")
                part = tensors.get_slice(key)
                found[key] = tuple(part.get_shape()), part.get_dtype(), file
    blocks = {key.split(".")[2] for key in found if key.startswith("model.layers.") and key.count(".") > 2}
    if len(blocks) != config.num_hidden_layers:
        raise ModelError(f"{path}: num_hidden_layers: expected {len(blocks)}, as the weights have, found "
                         f"{config.num_hidden_layers} in config.json")
    for name in TOKENIZER_FILES:
        if os.path.lexists(path / name):
            expect_file(path / name, LARGEST_TOKENIZER, ModelError, links=False)
    return found


def matching_files(path: Path, stored: dict[str, tuple], shapes: dict[str, tuple],
                   config: Config) -> list[Path]:
    """The weight files, once the keys and shapes that are `stored` there are those expected.

    Raises ModelError that lists every missing, unexpected and misshapen key. Some checkpoints store what is
    derived here, and is neither: the rotary frequencies, and a tied head (it is the embedding).
    """
    spare = {key for key in stored if key.endswith("rotary_emb.inv_freq")
             or key == "lm_head.weight" and config.tie_word_embeddings}
    wrong = [f"missing {key}" for key in sorted(shapes.keys() - stored.keys())]
    wrong += [f"unexpected {key}" for key in sorted(stored.keys() - shapes.keys() - spare)]
    wrong += [f"{key}: expected shape {shape}, found {stored[key][0]} {stored[key][1]}"
              for key, shape in shapes.items() if key in stored
              and (stored[key][0] != shape or stored[key][1] not in ("F64", "F32", "BF16", "F16"))]
    if wrong:
        said = "\n  ".join([f"the weights do not match config.json ({config.model_type}):", *wrong])
        raise ModelError(f"{path}: {said}")
    return sorted({file for _, _, file in stored.values()})


def read_adapter(path) -> tuple[dict, dict]:
    """(config, {key: tensor}) of a PEFT folder. Raises ModelError where it is no plain, finite LoRA."""
    file = Path(path) / "adapter_config.json"
    config, weights = read_json(file), file.with_name("adapter_model.safetensors")
    if odd := [f"{key} = {config[key]!r}"[:60] for key, allowed in PLAIN_LORA.items()
               if key in config and config[key] not in allowed]:
        raise ModelError(f"{file}: expected plain LoRA, found {', '.join(odd)}")
    expect(config, LORA_RULES, file)
    with open_safetensors(weights) as stored:
        if odd := [key for key in stored.keys()
                   if stored.get_slice(key).get_dtype() not in ("F64", "F32", "BF16", "F16")]:
            raise ModelError(f"{weights}: expected floating-point numbers, found others in {odd[0]}")
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}
    ranks = {tensor.shape[0] if tensor.dim() else 0 for key, tensor in tensors.items() if ".lora_A." in key}
    if ranks != {config["r"]}:
        raise ModelError(f"{weights}: expected adapters of rank r = {config['r']}, "
                         f"found {sorted(ranks) or 'none'}")
    if odd := [key for key, tensor in tensors.items() if not tensor.float().isfinite().all()]:
        raise ModelError(f"{weights}: expected finite numbers, found others in {odd[0]}")
    return config, tensors


@contextmanager
def written_new(path: Path):
    """A folder to write into, which becomes `path` as with atomic_write.

    Raises FileExistsError for a `path` that exists, OSError that names it where it cannot be written.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists already; a model is never written over another")
    with atomic_write(path) as part:
        part.mkdir(parents=True)
        yield part


def write_checkpoint(path: Path, raw: dict, tensors: dict, tokenizer: Path | None) -> None:
    """A folder of config.json, weights, and the tokenizer and template of `tokenizer`; whole or not at all.

    Raises as written_new.
    """
    with written_new(path) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", raw)
        for name in TOKENIZER_FILES:
            if tokenizer and os.path.lexists(tokenizer / name):
                expect_file(tokenizer / name, LARGEST_TOKENIZER, ModelError, links=False)
                shutil.copy(tokenizer / name, part / name)


def write_adapter(path: Path, config: dict, tensors: dict) -> None:
    """A folder in PEFT's format: adapter_config.json and adapter_model.safetensors; whole or not at all.

    Raises as written_new.
    """
    with written_new(path) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(part / "adapter_config.json", config)


# ---------------------------------------------------------------- tensors with a checksum


def save_checked(path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    """A safetensors file, whole or not at all, with a checksum beside its metadata."""
    text = json.dumps(metadata | {"sha256": checksum(tensors, metadata)})
    with atomic_write(Path(path)) as part:
        save_file(tensors, part, {"checked": text})  # one key: several would come in any order


def load_checked(path: Path, what: str) -> tuple[dict, dict]:
    """(tensors, metadata) of `save_checked`. Raises DataError, that expected `what`, for any other file."""
    expect_file(path, 1 << 60)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = parse_json((file.metadata() or {}).get("checked", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.pop("sha256", None) != checksum(tensors, metadata):
            raise ValueError("another checksum than the file says: it is damaged, or of an older form")
    except Exception as error:
        raise DataError(f"{path}: expected {what}, found: {str(error)[:300]}") from None
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
    files = [expect_file(Path(path) / "config.json", 1 << 26, ModelError, links=False)]
    files += [expect_file(file, 1 << 60, ModelError, links=False) for file in checkpoint_files(path)]
    states = [file.stat() for file in files]
    return _sha256(tuple((file.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)
                         for file, state in zip(files, states)))


@functools.cache
def _sha256(files: tuple) -> str:
    """Of files (path, what tells a change), one behind the other: a run asks three times, of gigabytes."""
    digest = hashlib.sha256()
    for file, *_ in files:
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
