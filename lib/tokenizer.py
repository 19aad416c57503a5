"""A stranger's tokenizer.json: what could make the tokenizers library take memory is looked at first."""

import math
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from lib.files import DataError, read_json

SPARE = 64  # ids beyond the model's: of padding tokens that some add
MOST_GROWTH = 64  # of a text by a tokenizer's replacements


@contextmanager
def tokenizer_errors(file: Path):
    """Whatever the tokenizers library raises, told of the file: where it panics it is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, DataError):
        raise
    except BaseException as error:
        raise DataError(f"{file}: expected a tokenizer of the tokenizers library, "
                        f"found: {str(error)[:300]}") from None


def open_tokenizer(file: Path, vocab_size: int) -> tuple[Tokenizer, dict]:
    """(tokenizer without padding or truncation, what the file says). Raises DataError that names the file.

    Its ids must be the model's, but for SPARE ones that no text becomes, and its replacements must not make
    long texts of short ones.
    """
    raw = read_json(file)
    ids = ids_of(raw)  # before it is opened: the library takes memory by the largest one
    if growth(raw.get("normalizer")) * growth(raw.get("decoder")) > MOST_GROWTH:
        raise DataError(f"{file}: expected a normalizer and a decoder that make no long text of a short one, "
                        f"found others")
    most = vocab_size + SPARE
    if max(ids, default=0) < most:
        with tokenizer_errors(file):
            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            ids += tokenizer.get_added_tokens_decoder()  # some may have been numbered anew
    if (last := max(ids, default=0)) >= most:
        raise DataError(f"{file}: expected token ids under the model's vocab_size = {vocab_size}, "
                        f"found {last}")
    return tokenizer, raw


def ids_of(raw: dict) -> list[int]:
    """The token ids in tokenizer.json, whatever else its values are."""
    model, added = raw.get("model"), raw.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    ids += [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [i for i in ids if isinstance(i, int)]


def growth(part) -> float:
    """By how much the replacements in a part of tokenizer.json can lengthen a text, one after the other."""
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    own = str(part.get("content", "")) if isinstance(part, dict) and part.get("type") == "Replace" else ""
    return max(1.0, len(own)) * math.prod(map(growth, parts))
