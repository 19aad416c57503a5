"""The reference's terms of KL: kept in a file of the run, or computed in every step."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch

from data.chat import Example, batches_by_length
from lib.cli import progress_bar
from lib.distributed import on_rank_zero, rank
from lib.files import DataError, errors_name_path, write_text
from lib.fused import reference_terms, response_states


def live_reference(model):
    """Return a function examples → (g, c) that runs `model` without its adapters each time it is called."""

    @torch.no_grad()
    def terms(examples: list[Example]) -> tuple:
        with model.adapters_off():
            hidden, labels, _ = response_states(model, examples)
        return reference_terms(hidden, model.lm_head.weight, labels)

    return terms


class KeptReference:
    """g and c of every response token of some examples, in a memory-mapped file.

    A row of the file holds g, in the dtype of the model's head, and c. A second file beside it has the
    SHA-256 of all rows: a file that is cut, damaged or made of other examples is computed again.
    """

    def __init__(self, file: Path, model, examples: list[Example], batch_size: int):
        self.file, self.checksum_file = file, file.with_suffix(".sha256")
        self.dtype, self.device = model.lm_head.weight.dtype, model.device
        g = ("g", "u1", model.config.hidden_size * self.dtype.itemsize)  # bytes: numpy has no bfloat16
        self.row_format = np.dtype([g, ("c", "f4")])
        batches = batches_by_length([len(e.input_ids) for e in examples], batch_size)
        self.batches = [[examples[i] for i in batch] for batch in batches]
        self.rows, self.n_tokens = {}, 0  # example.index → its rows
        for batch in self.batches:
            for example in batch:
                self.rows[example.index] = slice(self.n_tokens, self.n_tokens + example.n_labels)
                self.n_tokens += example.n_labels
        self.n_bytes = self.n_tokens * self.row_format.itemsize

    def fits_half_the_disk(self) -> bool:
        """Return whether the file is there, of a run that resumes, or takes at most half of the free space."""
        return self.file.exists() or self.n_bytes <= shutil.disk_usage(self.file.parent).free / 2

    def compute(self, model) -> None:
        """Write the file, unless a whole one is there, and map it into memory.

        All processes compute, the first one writes. Raises DataError, before writing, where there is no room.
        """
        if not on_rank_zero(self.is_whole):
            on_rank_zero(self.expect_room)
            print(f"reference: {self.n_tokens} response tokens, {self.n_bytes / 1e6:.1f} MB in {self.file}")
            with errors_name_path(self.file), open(self.file if rank() == 0 else "/dev/null", "wb") as stream:
                for batch in progress_bar(self.batches, desc="reference"):
                    stream.write(self.rows_of(model, batch).tobytes())
            on_rank_zero(lambda: write_text(self.checksum_file, self.checksum()))
        self.data = np.memmap(self.file, self.row_format, "r")

    @torch.no_grad()
    def rows_of(self, model, batch: list[Example]) -> np.ndarray:
        """Run the reference on a batch. Returns its rows."""
        with model.adapters_off():
            hidden, labels, _ = response_states(model, batch)
        g, c = reference_terms(hidden, model.lm_head.weight, labels, self.dtype)
        rows = np.empty(len(c), self.row_format)
        rows["g"] = g.cpu().view(torch.uint8).numpy()
        rows["c"] = c.float().cpu().numpy()
        return rows

    def checksum(self) -> str:
        """Return the SHA-256 of the examples' tokens and labels and of the file's bytes."""
        digest = hashlib.sha256(repr(self.row_format).encode())
        for batch in self.batches:
            for example in batch:
                digest.update(repr((example.index, example.input_ids, example.labels)).encode())
        with open(self.file, "rb") as stream:
            while chunk := stream.read(1 << 24):
                digest.update(chunk)
        return digest.hexdigest()

    def is_whole(self) -> bool:
        """Return whether the file is there and its checksum holds."""
        if not (self.file.exists() and self.checksum_file.exists()):
            return False
        return self.checksum_file.read_text() == self.checksum()

    def expect_room(self) -> None:
        """Raise DataError where the disk has no room for the file."""
        free = shutil.disk_usage(self.file.parent).free
        if self.n_bytes > free:
            raise DataError(f"--ref keep: expected {self.n_bytes / 1e9:.1f} GB of room for {self.file}, "
                            f"found {free / 1e9:.1f}; use --ref live")

    def terms(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (g (M, H), c (M,)) of the response tokens of `examples`, in their order."""
        rows = np.concatenate([self.data[self.rows[e.index]] for e in examples])
        g = torch.from_numpy(np.ascontiguousarray(rows["g"])).view(self.dtype)
        c = torch.from_numpy(np.ascontiguousarray(rows["c"]))
        return g.to(self.device), c.to(self.device)

