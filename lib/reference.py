"""The reference's terms of KL: kept in a file of the run, or computed in every step."""

import hashlib
import shutil
from pathlib import Path

import torch

from data.chat import Example, batches_by_length
from lib.checkpoint import write_tensors
from lib.cli import progress_bar
from lib.distributed import on_rank_zero, rank
from lib.files import DataError, write_text
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
    """Return a function examples → (g, c) that reads the terms from `file`, where they are stored first.

    The file is {"g": (n_tokens, H), "c": (n_tokens,)} of all response tokens, g in the dtype of the head. All
    processes compute, rank 0 writes. A second file beside it has a checksum: a file that is cut, damaged or
    made of other examples is computed again. Raises DataError, before writing, where there is no room.
    """
    checksum_file = file.with_suffix(".sha256")
    n_labels = [example.n_labels for example in examples]
    n_tokens = sum(n_labels)
    rows = dict(zip([example.index for example in examples], torch.arange(n_tokens).split(n_labels)))

    def rows_of(batch: list[Example]) -> torch.Tensor:
        return torch.cat([rows[example.index] for example in batch])

    def is_whole() -> bool:
        there = file.exists() and checksum_file.exists()
        return there and checksum_file.read_text() == checksum(file, examples)

    def write(stored: dict) -> None:
        write_tensors(file, stored)
        write_text(checksum_file, checksum(file, examples))

    if not on_rank_zero(is_whole):
        on_rank_zero(lambda: expect_room(file, model, examples))
        dtype = model.lm_head.weight.dtype
        g, c = torch.empty(n_tokens, model.config.hidden_size, dtype=dtype), torch.empty(n_tokens)
        reference = live_reference(model, dtype)
        batches = batches_by_length([len(e.input_ids) for e in examples], batch_size)
        for batch in progress_bar(batches, desc="reference"):
            batch = [examples[i] for i in batch]
            new = [term.cpu() for term in reference(batch)]
            if rank() == 0:
                g[rows_of(batch)], c[rows_of(batch)] = new
        on_rank_zero(lambda: write({"g": g, "c": c}))
    stored = torch.load(file, mmap=True, weights_only=True)

    def terms(examples: list[Example]) -> tuple:
        return tuple(stored[name][rows_of(examples)].to(model.device) for name in ("g", "c"))

    return terms


def checksum(file: Path, examples: list[Example]) -> str:
    """Return the SHA-256 of the examples' tokens and labels and of the file's bytes."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.index, example.input_ids, example.labels)).encode())
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, lambda: digest).hexdigest()


def n_bytes(model, examples: list[Example]) -> int:
    """Return the size of the stored terms: a vector g and a float32 c for each response token."""
    n_tokens = sum(example.n_labels for example in examples)
    return n_tokens * (model.config.hidden_size * model.lm_head.weight.itemsize + 4)


def fits_half_the_disk(file: Path, model, examples: list[Example]) -> bool:
    """Return whether the file is there, of a run that resumes, or takes at most half of the free space."""
    return file.exists() or n_bytes(model, examples) <= shutil.disk_usage(file.parent).free / 2


def expect_room(file: Path, model, examples: list[Example]) -> None:
    """Print the size of the file. Raises DataError where the disk has no room for it."""
    size, free = n_bytes(model, examples), shutil.disk_usage(file.parent).free
    print(f"reference: {size / 1e6:.1f} MB in {file}")
    if size > free:
        raise DataError(f"--ref keep: expected {size / 1e9:.1f} GB of room for {file}, "
                        f"found {free / 1e9:.1f}; use --ref live")
