"""The reference's terms of KL: kept in a file of the run, or computed in every step."""

import os
import shutil
from pathlib import Path

import torch

from data.chat import Example, batches_by_length
from lib.cli import progress_bar
from lib.distributed import on_rank_zero, rank
from lib.files import DataError, errors_name_path
from lib.fused import reference_terms, response_states


def live_reference(model, dtype: torch.dtype | None = None):
    """Return a function examples → (g, c) that runs `model` without its adapters; dtype: of g."""

    @torch.no_grad()
    def terms(examples: list[Example]) -> tuple:
        with model.adapters_off():
            hidden, labels, _ = response_states(model, examples)
        return reference_terms(hidden, model.lm_head.weight, labels, dtype)

    return terms


def kept_reference(file: Path, model, examples: list[Example], batch_size: int):
    """Compute the terms of all examples. Returns a function examples → (g, c) that looks them up.

    g (n_tokens, H) of all response tokens, in the dtype of the head, is written to `file` and read from there;
    c (n_tokens,) stays in memory. All processes compute, rank 0 writes. A run that resumes computes the terms
    again. Raises DataError, before writing, where the disk has no room.
    """
    on_rank_zero(lambda: expect_room(file, model, examples))
    dtype = model.lm_head.weight.dtype
    device = model.device
    reference = live_reference(model, dtype)
    rows = {}  # example.index → its rows of g and c
    n_tokens = 0
    c = []
    with errors_name_path(file), open(os.devnull if rank() else file, "wb") as stream:
        batches = batches_by_length([len(e.input_ids) for e in examples], batch_size)
        for batch in progress_bar(batches, "reference"):
            batch = [examples[i] for i in batch]
            batch_g, batch_c = reference(batch)
            stream.write(batch_g.cpu().view(torch.uint8).numpy().tobytes())
            c.append(batch_c.cpu())
            for example in batch:
                rows[example.index] = torch.arange(n_tokens, n_tokens + example.n_labels)
                n_tokens += example.n_labels
    H = model.config.hidden_size
    on_rank_zero(lambda: None)  # the others wait for the file
    g = torch.from_file(str(file), size=n_tokens * H, dtype=dtype)  # memory-mapped
    g = g.view(n_tokens, H)
    c = torch.cat(c)

    def terms(examples: list[Example]) -> tuple:
        which = torch.cat([rows[example.index] for example in examples])
        return g[which].to(device), c[which].to(device)

    return terms


def n_bytes(model, examples: list[Example]) -> int:
    """Return the size of the file: a vector g for each response token."""
    n_tokens = sum(example.n_labels for example in examples)
    return n_tokens * model.config.hidden_size * model.lm_head.weight.itemsize


def fits_half_the_disk(file: Path, model, examples: list[Example]) -> bool:
    """Return whether the file takes at most half of the free space."""
    return n_bytes(model, examples) <= shutil.disk_usage(file.parent).free / 2


def expect_room(file: Path, model, examples: list[Example]) -> None:
    """Print the size of the file. Raises DataError where the disk has no room for it."""
    size = n_bytes(model, examples)
    free = shutil.disk_usage(file.parent).free
    print(f"reference: {size / 1e6:.1f} MB in {file}")
    if size > free:
        raise DataError(f"--ref keep: expected {size / 1e9:.1f} GB of room for {file}, "
                        f"found {free / 1e9:.1f}; use --ref live")
