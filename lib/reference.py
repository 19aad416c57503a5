"""The reference's terms of KL: kept in a file of the run, or computed in every step."""

import shutil
from pathlib import Path

import torch

from data.chat import Example, batches_by_length
from lib.cli import progress_bar
from lib.distributed import on_rank_zero, rank
from lib.files import DataError, errors_name_path, remove
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
    on_rank_zero(lambda: remove(file))  # of a run that was killed
    on_rank_zero(lambda: expect_room(file, model, examples))
    dtype, device = model.lm_head.weight.dtype, model.device
    reference = live_reference(model, dtype)
    rows = {}  # example.index → its rows of g and c
    n_tokens = 0
    c = []
    batches = batches_by_length([len(e.input_ids) for e in examples], batch_size)
    try:
        for batch in progress_bar(batches, "reference"):
            batch = [examples[i] for i in batch]
            batch_g, batch_c = reference(batch)
            on_rank_zero(lambda: append(file, batch_g))
            c.append(batch_c.cpu())
            for example in batch:
                rows[example.index] = torch.arange(n_tokens, n_tokens + example.n_labels)
                n_tokens += example.n_labels
    except BaseException:
        if rank() == 0:
            remove(file)
        raise
    c = on_rank_zero(lambda: torch.cat(c))  # rank 0's, as g is: their rounding belongs together
    H = model.config.hidden_size
    with errors_name_path(file):
        g = torch.from_file(str(file), shared=True, size=n_tokens * H, dtype=dtype)  # memory-mapped
    g = g.view(n_tokens, H)

    def terms(examples: list[Example]) -> tuple:
        which = torch.cat([rows[example.index] for example in examples])
        return g[which].to(device), c[which].to(device)

    return terms


def append(file: Path, g: torch.Tensor) -> None:
    """Append the bytes of a tensor to a file."""
    content = g.cpu().view(torch.uint8).numpy().tobytes()  # numpy has no bfloat16
    with errors_name_path(file), open(file, "ab") as stream:
        stream.write(content)


def n_bytes(model, examples: list[Example]) -> int:
    """Return the size of the file: a vector g for each response token."""
    n_tokens = sum(example.n_labels for example in examples)
    return n_tokens * model.config.hidden_size * model.lm_head.weight.itemsize


def fits_half_the_disk(file: Path, model, examples: list[Example]) -> bool:
    """Return whether the file is there, of a run that resumes, or takes at most half of the free space."""
    return file.exists() or n_bytes(model, examples) <= shutil.disk_usage(file.parent).free / 2


def expect_room(file: Path, model, examples: list[Example]) -> None:
    """Print the size of the file. Raises DataError where the disk has no room for it."""
    size = n_bytes(model, examples)
    free = shutil.disk_usage(file.parent).free
    print(f"reference: {size / 1e6:.1f} MB in {file}")
    if size > free:
        raise DataError(f"--ref keep: expected {size / 1e9:.1f} GB of room for {file}, "
                        f"found {free / 1e9:.1f}; use --ref live")
