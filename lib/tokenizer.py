"""Open tokenizer.json. Files that would make the tokenizers library allocate much memory are refused."""

import math
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from lib.files import DataError, read_json

EXTRA_IDS = 64  # added ids beyond the model's vocabulary, for padding tokens that no text contains
MAX_GROWTH = 64  # factor by which a tokenizer's replacements may lengthen a text


@contextmanager
def tokenizer_errors(file: Path):
    """Raise any error of the tokenizers library as a DataError. Its panics are no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, DataError):
        raise
    except BaseException as error:
        raise DataError(f"{file}: expected a tokenizer of the tokenizers library, "
                        f"found: {str(error)[:300]}") from None


def open_tokenizer(file: Path, vocab_size: int) -> tuple[Tokenizer, dict]:
    """Return the tokenizer, without padding or truncation, and its JSON. Raises DataError.

    Token ids must be below vocab_size + EXTRA_IDS. Replacements must not lengthen a text much.
    """
    raw = read_json(file)
    if growth(raw.get("normalizer")) * growth(raw.get("decoder")) > MAX_GROWTH:
        raise DataError(f"{file}: expected a normalizer and a decoder that lengthen a text at most "
                        f"{MAX_GROWTH} times, found longer replacements")
    expect_ids(file, ids_of(raw), vocab_size)  # first: the library allocates memory by the largest id
    with tokenizer_errors(file):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = tokenizer.get_added_tokens_decoder()  # the library may have renumbered some
    expect_ids(file, added, vocab_size)
    return tokenizer, raw


def expect_ids(file: Path, ids, vocab_size: int) -> None:
    """Check the largest token id. Raises DataError."""
    largest = max(ids, default=0)
    if largest >= vocab_size + EXTRA_IDS:
        raise DataError(f"{file}: expected token ids under the model's vocab_size = {vocab_size}, "
                        f"found {largest}")


def ids_of(raw: dict) -> list[int]:
    """Return the token ids in tokenizer.json, which may be malformed."""
    model, added = raw.get("model"), raw.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = []
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    if isinstance(vocabulary, list):  # Unigram: the id is the position
        ids.append(len(vocabulary) - 1)
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    return [i for i in ids if isinstance(i, int)]


def growth(part) -> float:
    """Return the factor by which the replacements in a part of tokenizer.json can lengthen a text."""
    if isinstance(part, list):
        return math.prod(map(growth, part))
    if not isinstance(part, dict):
        return 1.0
    replacement = len(str(part.get("content", ""))) if part.get("type") == "Replace" else 1
    return max(1.0, replacement) * growth([*part.values()])
