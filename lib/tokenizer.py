"""Open tokenizer.json. Token ids that would make the tokenizers library allocate much memory are refused."""

from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

from lib.files import DataError, read_json

EXTRA_IDS = 64  # added ids beyond the model's vocabulary, for padding tokens that no text contains


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
    """Return the tokenizer, without padding or truncation, and its JSON.

    Raises DataError for a malformed file, and for token ids of vocab_size + EXTRA_IDS or more.
    """
    raw = read_json(file)
    with tokenizer_errors(file):
        ids = [token["id"] for token in raw.get("added_tokens", [])]
        vocabulary = raw["model"]["vocab"]
        # Unigram has a list, in which an id is the position.
        ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        if max(ids) >= vocab_size + EXTRA_IDS:
            raise ValueError(f"token id {max(ids)}, which is not under the model's vocab_size = {vocab_size}")
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return tokenizer, raw
