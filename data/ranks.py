"""Several processes, one per GPU, started by `torchrun --nproc_per_node=N`: who is who, and the few things they exchange.

Without torchrun every function here is the obvious thing for one process. What exchanges something is called by all processes, or by none.
"""

import gc
import os
import pickle
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def started() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def join() -> None:
    """Join the other processes, if there are any. All but the first are silent."""
    if not started() or dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # where "cuda" is, for this process
    # A day: the others wait while the first one asks a judge.
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=timedelta(days=1))
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # errors are written to sys.__stderr__


def leave() -> None:
    """Part from the other processes, together: a process that is gone while another still talks to it takes that one down."""
    if dist.is_initialized():
        gc.collect()  # models that FSDP has sharded refer to the group, and to themselves
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first(function):
    """Call `function` on the first process alone; all of them get what it returns, or the exception that it raises."""
    if world() == 1:
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


def gather(items: list) -> list[list]:
    """The lists of all processes, in their order."""
    boxes = [items] * world()
    if world() > 1:
        dist.all_gather_object(boxes, items)
    return boxes


def total(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, become the sum of everybody's."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_true(flag: bool) -> bool:
    """Whether the flag is true for everybody."""
    return bool(flag) if world() == 1 else total(torch.tensor(int(flag))).item() == world()


# ---------------------------------------------------------------- models


def shard(model, device: str) -> None:
    """FSDP2, to `device`: spread the weights of every block over the processes; each gathers a block while it computes it.

    The embeddings, the last norm and the head stay whole everywhere, because the loss needs the head outside the forward pass.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(device, (world(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(device)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def average_gradients(parameters: list) -> None:
    """Mean over the processes of the gradients of whole parameters; FSDP has done it for the sharded ones."""
    gradients = [parameter.grad for parameter in parameters if not is_sharded(parameter)]
    if world() > 1 and gradients:
        mean = total(torch.cat([gradient.flatten() for gradient in gradients])) / world()
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient))


def clip_gradients(parameters: list, largest: float) -> torch.Tensor:
    """Scale all gradients together so that their norm is at most `largest`; → the norm before, the same number everywhere."""
    groups = [[p.grad.to_local() for p in parameters if is_sharded(p)], [p.grad for p in parameters if not is_sharded(p)]]
    sharded, own = (torch.nn.utils.get_total_norm(group).to(parameters[0].device) for group in groups)
    norm = (total(sharded.square()) + own.square()).sqrt() if groups[0] else own
    for group in filter(None, groups):
        torch._foreach_mul_(group, (largest / (norm + 1e-6)).clamp(max=1.0))
    return norm
