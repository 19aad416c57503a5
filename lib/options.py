"""Check the options of train.py: their ranges, and which of them go together."""

import math
from dataclasses import fields
from pathlib import Path

import torch

from lib.cli import require
from lib.distributed import world_size
from lib.run import is_unstarted

MINIMUM = {"epochs": 1, "batch_size": 1, "accumulation": 1, "max_length": 2, "lr": 1e-9,
           "lora_alpha": 1e-9, "warmup_steps": 0, "lora_r": 0, "save_every": 0}
METHODS_WITH_OPTION = {
    "beta_min": ("adaptive",),
    "beta_max": ("adaptive",),
    "gate": ("adaptive",),
    "ref": ("adaptive",),
    "risk": ("adaptive", "filter"),
    "probe": ("adaptive", "filter"),
}


def check_options(config) -> None:
    """Raise DataError for the first option of a TrainConfig that is out of range or has no effect."""
    for option in fields(config):
        methods = METHODS_WITH_OPTION.get(option.name, (config.method,))
        valid = config.method in methods or getattr(config, option.name) == option.default
        require(config, (option.name, valid, f"none without --method {' or '.join(methods)}"))
    for name, least in MINIMUM.items():
        require(config, (name, least <= getattr(config, name) < math.inf, f"at least {least}"))
    share = config.anchor_share
    per_step = config.batch_size * config.accumulation
    processes = world_size()
    adds_gradients = config.method in ("safegrad", "sbr")
    require(
        config,
        ("out", config.resume or not (config.out and config.out.exists()) or is_unstarted(config.out),
         f"a folder that does not exist (type --out OTHER, or --resume {config.out} to go on with a run)"),
        ("beta_min", 0 <= config.beta_min <= 1, "0 to 1"),
        ("beta_max", config.beta_min <= config.beta_max <= 1, "beta-min to 1"),
        ("ema", 0 <= config.ema < 1, "0 to under 1"),
        ("ema", config.ema == 0 or config.gate == "batch", "0 unless --gate batch"),
        ("risk", config.risk in ("probe", "critic", "max") or Path(config.risk).is_file(),
         "probe, critic, max, or a file"),
        ("probe", config.risk in ("probe", "max") or not config.probe, "none unless --risk probe or max"),
        ("dtype", config.lora_r or config.dtype != "bfloat16", "float32 with --lora-r 0"),
        ("anchor_share", 0 <= share < 1, "0 to under 1"),
        ("anchor_share", share > 0 or not (adds_gradients or config.method == "lisa"),
         f"above 0 with --method {config.method} (type --anchor-share 0.5)"),
        ("method", not adds_gradients or config.lora_r and processes == 1,
         f"no {config.method} with --lora-r 0 or several processes"),
        ("anchors", share or not config.anchors, "none without --anchor-share"),
        ("batch_size", per_step % processes == 0, f"times --accumulation a multiple of the {processes} processes"),
        ("fsdp", not config.fsdp or processes > 1, "several processes: torchrun --nproc_per_node=N train.py …"),
        ("fsdp", not config.fsdp or torch.__version__ >= (2, 8), "torch 2.8, which shards two dtypes"),
        ("ref", not config.fsdp or config.ref != "live", "auto or keep with --fsdp"),
        ("device", processes == 1 or config.device in ("cpu", "cuda"), "cpu or cuda for several processes"),
    )
    for name in ("data", "probe_data", "probe", "anchors", "rubric"):
        file = getattr(config, name)
        require(config, (name, file is None or file.is_file(), "a file (check the path)"))


def leak_line(config) -> str:
    """Return a line on what a gate that is not closed lets through, "" where nothing leaks."""
    if config.method != "adaptive" or config.gate == "example" and config.beta_max == 1:
        return ""
    if config.gate == "batch":
        return "\nthe gate leaks: a risky example has its batch's mean risk; --gate example closes it"
    return ("\nthe gate leaks: an answer of risk 1 is still learned, its first token to probability "
            f"{1 - config.beta_max:.2g}; to seal it, type --sealed")
