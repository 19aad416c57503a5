"""LoRA adapters of the linear layers (Hu et al. 2021, arXiv 2106.09685): added, merged, saved and loaded in PEFT's format.

The arithmetic is model.Linear's. r is the rank; the update is (alpha/r) B A.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data.checkpoint import ModelError, read_json
from data.ranks import is_sharded, on_first, whole
from model import Linear, Transformer


def add_lora(model: Transformer, r: int, alpha: float, targets=None, seed: int = 0) -> list[str]:
    """Put adapters (float32, A random as in PEFT, B zero) into every linear named in `targets`; returns the names.

    Default: every linear but the head. Raises ModelError for a name that matches no linear, or r < 1.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    names = sorted({name.rpartition(".")[2] for name in linears})
    targets = list(targets or [name for name in names if name != "lm_head"])
    if unknown := sorted(set(targets) - set(names)):
        raise ModelError(f"LoRA targets: expected some of {', '.join(names)}, found {', '.join(unknown)}")
    if "lm_head" in targets and model.config.tie_word_embeddings:
        raise ModelError("LoRA targets: lm_head shares its weight with the embeddings in this checkpoint, and cannot be adapted alone")
    if r < 1:
        raise ModelError(f"LoRA rank: expected at least 1, found {r}")
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        if name.rpartition(".")[2] in targets:
            bound = linear.in_features**-0.5  # Kaiming-uniform with a = √5
            A = (torch.rand(r, linear.in_features, generator=generator) * 2 - 1) * bound
            linear.lora_A = nn.Parameter(A.to(linear.weight.device))
            linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, r, device=linear.weight.device))
            linear.scaling = alpha / r
    return targets


def merge_lora(model: Transformer) -> None:
    """Add every adapter to its weight, in place, and remove it."""
    for module in model.modules():
        if isinstance(module, Linear) and module.lora_A is not None:
            module.weight.data = module.merged_weight().data
            module.lora_A = module.lora_B = None


@contextmanager
def merged_lora(model: Transformer):
    """Within it the weights hold their adapters, so that none is multiplied; after it they are what they were, to the bit.

    Adapters that are off, and weights spread over processes, stay as they are.
    """
    adapted = [m for m in model.modules() if isinstance(m, Linear) and m.lora_A is not None and m.adapter_on and not is_sharded(m.weight)]
    before = [linear.weight.detach().cpu().clone() for linear in adapted]  # not on a GPU, where there may be no room for both
    try:
        for linear in adapted:
            linear.weight.data.copy_(linear.merged_weight())
            linear.adapter_on = False
        yield
    finally:
        for linear, weight in zip(adapted, before):
            linear.weight.data.copy_(weight)
            linear.adapter_on = True


def save_adapter(model: Transformer, path) -> None:
    """Write the adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, Linear) and m.lora_A is not None}
    if not adapted:
        raise ModelError("save_adapter: expected a model with LoRA adapters, found none")
    path = Path(path)
    r, scaling = next((m.lora_A.shape[0], m.scaling) for m in adapted.values())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model.path.resolve()) if model.path else "",
              "r": r, "lora_alpha": scaling * r, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "target_modules": sorted({name.rpartition(".")[2] for name in adapted})}
    tensors = {f"base_model.model.{name}.lora_{which}.weight": whole(getattr(m, f"lora_{which}")).detach().cpu().contiguous()
               for name, m in adapted.items() for which in "AB"}

    def write():
        part = path.with_name(path.name + ".part")
        part.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        os.replace(part, path)

    on_first(write)


def load_adapter(model: Transformer, path) -> None:
    """Put the adapters of a PEFT folder into `model`. Raises ModelError where PEFT options or keys are not supported."""
    config = read_json(Path(path) / "adapter_config.json")
    plain = {"peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,), "lora_bias": (False,),
             "modules_to_save": (None,), "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (None,),
             "exclude_modules": (None,), "layer_replication": (None,), "target_parameters": (None,),
             "init_lora_weights": (True, False, "gaussian")}  # other initialisations change the base weights
    odd = [f"{key} = {config.get(key)!r}" for key, allowed in plain.items() if key in config and config[key] not in allowed]
    odd += [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    if odd or not isinstance(config["target_modules"], list):
        found = ", ".join(odd) or "a pattern"
        raise ModelError(f"{path}/adapter_config.json: expected plain LoRA with a list of target_modules, found {found}")
    add_lora(model, config["r"], config["lora_alpha"], config["target_modules"])
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    own = {f"base_model.model.{key}.weight": p for key, p in model.named_parameters() if ".lora_" in key}
    wrong = [key for key in set(own) | set(tensors) if key not in own or key not in tensors or own[key].shape != tensors[key].shape]
    if wrong:
        raise ModelError(f"{path}/adapter_model.safetensors: missing, unexpected or misshapen: {', '.join(sorted(wrong))}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(tensors[key])
