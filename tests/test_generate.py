"""Generation against the most obvious loop: one prompt at a time, no cache, the whole sequence through the model for every token."""

from itertools import takewhile
from pathlib import Path

import pytest
import torch

from conftest import DEVICE, load_model, policy
from data.chat import batches_by_length, Chat
from data.conversations import read_conversations, WORLD
from evaluate import respond
from model import generate

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/config.json"))


@torch.no_grad()
def simple(model, prompts, max_new_tokens):
    completions = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(max_new_tokens):
            token = model(torch.tensor([ids], device=DEVICE))[0, -1].argmax().item()
            if token in model.config.eos_token_ids:
                break
            ids.append(token)
        completions.append(ids[len(prompt) :])
    return completions


@pytest.fixture
def prompts():
    return [torch.randint(3, 96, (n,)).tolist() for n in (2, 9, 1, 14, 3, 14)]


@pytest.mark.parametrize("path", GOLDEN, ids=[path.name for path in GOLDEN])
def test_greedy_is_the_simple_loop(path, prompts):
    """Rows end at different steps and are dropped; the long-RoPE model switches its factors under way."""
    model = load_model(path, dtype=torch.float32)
    object.__setattr__(model.config, "eos_token_ids", ())
    often = sorted({tokens[5] for tokens in simple(model, prompts[::2], 6)})  # what the model often says becomes its end token
    object.__setattr__(model.config, "eos_token_ids", tuple(often[:2]))
    expected = simple(model, prompts, 10)
    assert len({len(tokens) for tokens in expected}) > 1
    for batch_size in (1, 4, 64):
        assert generate(model, prompts, 10, batch_size=batch_size) == expected


def test_the_embedded_model_says_the_same_alone_and_in_a_batch_with_adapters_on_and_off():
    chat, adapted, plain = Chat(WORLD / "model"), policy(), load_model(WORLD / "model", dtype=torch.float32)
    files = ("eval_harmful", "eval_benign", "eval_sentiment")
    encoded = [chat.encode_prompt(c.prompts[-1]) for name in files for c in read_conversations(WORLD / f"{name}.jsonl")[:2]]
    completions = generate(adapted, encoded, 24)
    assert completions == simple(adapted, encoded, 24)
    with adapted.adapters_off():
        assert generate(adapted, encoded, 24) == simple(plain, encoded, 24) != completions
    assert all(layer.adapter_on for layer in adapted.modules() if hasattr(layer, "adapter_on"))


def test_a_response_ends_at_the_end_tokens_of_the_checkpoint_and_of_the_chat(prompts):
    """A config.json without its template's end token, as of some Qwen2.5: the chat knows it."""
    model = load_model(GOLDEN[0], dtype=torch.float32)
    object.__setattr__(model.config, "eos_token_ids", ())
    endless = generate(model, prompts, 12)
    one, other = endless[0][4], endless[3][7]
    expected = [list(takewhile(lambda token: token not in (one, other), ids)) for ids in endless]
    object.__setattr__(model.config, "eos_token_ids", (one,))
    assert generate(model, prompts, 12, end_token_ids=(other,)) == expected != endless
    model, rows = load_model(WORLD / "model", dtype=torch.float32), read_conversations(WORLD / "eval_benign.jsonl")[:3]
    right = respond(model, Chat(WORLD / "model"), rows, 48)
    object.__setattr__(model.config, "eos_token_ids", (1000,))
    assert respond(model, Chat(WORLD / "model"), rows, 48) == right and not any(response.cut for response in right)


def test_progress_counts_every_prompt_once(prompts):
    counts = []
    generate(load_model(GOLDEN[0]), prompts, 3, batch_size=4, progress=counts.append)
    assert counts == [4, 2]


def test_batches_hold_every_sequence_once_in_order_of_length():
    lengths = torch.randint(1, 500, (300,)).tolist()
    batches = batches_by_length(lengths, 16)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths) and max(map(len, batches)) == 16
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert batches_by_length([], 8) == []
