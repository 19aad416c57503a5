"""Several processes, one per GPU, started by `torchrun --nproc_per_node=N`: who is who, what they exchange.

Without torchrun every function here is the obvious thing for one process. What exchanges something is called
by all processes, or by none.
"""

import gc
import os
import pickle
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def init() -> None:
    """Join the other processes, if there are any. All but the first are silent."""
    if not launched() or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # where "cuda" is, for this process
    # A day: the others wait while the first one asks a judge.
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # errors are written to sys.__stderr__


def destroy() -> None:
    """Part from the other processes together: one gone while another talks to it takes that one down."""
    if dist.is_initialized():
        gc.collect()  # models that FSDP has sharded refer to the group, and to themselves
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(items, size: int | None = None) -> list:
    """This process's part of `items`, every world-th one; with `size` in lists of at most so many."""
    mine = list(items)[rank() :: world_size()]
    return mine if size is None else [mine[i : i + size] for i in range(0, len(mine), size)]


def on_rank_zero(function):
    """Call `function` on the first process alone; all get what it returns, or the exception it raises."""
    if world_size() == 1:
        return function()
    box = [None, None]  # what it returns, what it raises
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
            try:
                pickle.dumps(error)
            except Exception:
                box[1] = RuntimeError(repr(error))
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_gather(items: list) -> list[list]:
    """The lists of all processes, in their order."""
    boxes = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(boxes, items)
    return boxes


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, become the sum of everybody's."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_true(flag: bool) -> bool:
    """Whether the flag is true for everybody."""
    return bool(flag) if world_size() == 1 else all_reduce_sum(torch.tensor(int(flag))).item() == world_size()


# ---------------------------------------------------------------- models


def shard_model(model, device: str) -> None:
    """FSDP2, to `device`: spread each block's weights over the processes; each gathers a block to compute it.

    Embeddings, last norm and head stay whole everywhere: the loss needs the head outside the forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(device)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`tensor` on the parameter's device; this process's part of it, where the parameter is sharded so."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter) or tensor.shape != parameter.shape:  # an optimizer's count of its steps
        return tensor
    return torch.distributed.tensor.distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def optimizer_groups(parameters: list) -> list[dict]:
    """Groups for an optimizer: whole and sharded parameters apart, since no fused step takes a mixture."""
    parts = [[p for p in parameters if is_sharded(p) == sharded] for sharded in (False, True)]
    return [{"params": part} for part in parts if part]


def sum_and_clip(parameters: list, largest: float) -> float:
    """Make every gradient the sum of all processes', scaled so that the norm of all is at most `largest`.

    → the norm before, the same everywhere.
    """
    whole_ones = [p.grad for p in parameters if not is_sharded(p)]
    sharded = [p.grad.to_local() for p in parameters if is_sharded(p)]
    if sharded:
        torch._foreach_mul_(sharded, world_size())  # FSDP has averaged them
    if world_size() > 1 and whole_ones:
        summed = all_reduce_sum(torch.cat([gradient.flatten() for gradient in whole_ones]))
        for gradient, part in zip(whole_ones, summed.split([gradient.numel() for gradient in whole_ones])):
            gradient.copy_(part.view_as(gradient))
    norm = torch.nn.utils.get_total_norm(whole_ones).to(parameters[0].device)
    if sharded:
        squares = torch.nn.utils.get_total_norm(sharded).to(norm.device).square()
        norm = (all_reduce_sum(squares) + norm.square()).sqrt()
    for group in filter(None, (whole_ones, sharded)):
        torch._foreach_mul_(group, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()
