"""torchrun support: rank and world size, collectives, FSDP2. With one process the collectives do nothing.

A collective is called by all processes, or by none.
"""

import gc
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def launched() -> bool:
    """Return whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def init() -> None:
    """Join the process group, if torchrun started one. All ranks but the first print nothing."""
    if not launched() or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cuda:nccl,cpu:gloo"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend, timeout=timedelta(days=1))  # the others wait while rank 0 asks a judge
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def destroy() -> None:
    """Leave the process group together: a rank that is gone would break one that still talks to it."""
    if dist.is_initialized():
        gc.collect()  # FSDP's models refer to the group, and to themselves
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(items, batch_size: int | None = None) -> list:
    """Return every world_size-th item, starting at this rank; with `batch_size` as lists of at most so many."""
    mine = list(items)[rank() :: world_size()]
    if batch_size is None:
        return mine
    return [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]


def on_rank_zero(function):
    """Call `function` on rank 0. All ranks return its result, or raise its exception."""
    if world_size() == 1:
        return function()
    box = [None, None]  # result, exception
    if rank() == 0:
        try:
            box[0] = function()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1]
    return box[0]


def all_gather(items: list) -> list[list]:
    """Return the lists of all ranks, in their order."""
    boxes = [items] * world_size()
    if world_size() > 1:
        dist.all_gather_object(boxes, items)
    return boxes


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by the sum over all ranks, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_true(flag: bool) -> bool:
    """Return whether the flag is true on every rank."""
    return all_reduce_sum(torch.tensor(int(flag))).item() == world_size()


# ---------------------------------------------------------------- FSDP2


def shard_model(model, device: str) -> None:
    """Shard the weights over the ranks with FSDP2, and move the model to `device`.

    The head stays whole, with embeddings that are tied to it: the loss needs it outside the forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (world_size(),))
    for module in (*model.model.layers, model.model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params={model.lm_head.weight})
    model.to(device)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Return whether this rank holds a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a sharded tensor, any other tensor as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return `tensor` on the parameter's device, sharded as the parameter is if it has its shape."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter) or tensor.shape != parameter.shape:
        return tensor
    return torch.distributed.tensor.distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def sum_and_clip(parameters: list, max_norm: float) -> float:
    """Sum every gradient over the ranks, then scale all gradients so that their norm is at most `max_norm`.

    Returns the norm before clipping, the same on every rank.
    """
    for parameter in parameters:
        if is_sharded(parameter):
            parameter.grad.mul_(world_size())  # FSDP has averaged it
        else:
            all_reduce_sum(parameter.grad)
    return full_tensor(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
