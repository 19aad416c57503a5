"""Generation against the most obvious loop: one prompt at a time, no cache, the whole sequence through the model for every token."""

from pathlib import Path

import pytest
import torch

from conftest import DEVICE, load_model
from data.chat import batches_by_length, Chat
from data.conversations import read_conversations, WORLD
from model import add_lora, generate

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/config.json"))


@torch.no_grad()
def simple(model, prompts, max_new_tokens):
    found = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens and (
            token := model(torch.tensor([ids], device=DEVICE))[0, -1].argmax().item()
        ) not in model.config.eos_token_ids:
            ids.append(token)
        found.append(ids[len(prompt) :])
    return found


def golden(path, prompts, n):
    """A golden model that stops: what it often says becomes its end token."""
    model = load_model(path, dtype=torch.float32)
    object.__setattr__(model.config, "eos_token_ids", ())
    said = sorted({tokens[n // 2] for tokens in simple(model, prompts[::2], n)})
    object.__setattr__(model.config, "eos_token_ids", tuple(said[:2]))
    return model


@pytest.fixture
def prompts():
    return [torch.randint(3, 96, (n,)).tolist() for n in (2, 9, 1, 5, 14, 3, 14, 7, 4)]


@pytest.mark.parametrize("path", GOLDEN, ids=[path.name for path in GOLDEN])
def test_greedy_is_the_simple_loop(path, prompts):
    """Rows end at different steps and are dropped; the long-RoPE model switches its factors under way."""
    model = golden(path, prompts, 12)
    expected = simple(model, prompts, 12)
    assert len({len(tokens) for tokens in expected}) > 1
    for batch_size in (1, 4, 64):
        assert generate(model, prompts, 12, batch_size=batch_size) == expected


@pytest.mark.parametrize("poll", [2, 3, 8])
def test_looking_for_finished_rows_every_few_steps_changes_nothing(prompts, poll, monkeypatch):
    """As on CUDA, where looking waits for the GPU: rows run on past their end, and are cut there."""
    monkeypatch.setattr("model.POLL", {torch.device(DEVICE).type: poll})
    for family in ("llama", "phi3_longrope"):
        model = golden(Path(__file__).parent / "golden" / family, prompts, 12)
        assert generate(model, prompts, 12, batch_size=4) == simple(model, prompts, 12)


def test_the_embedded_model_says_the_same_alone_and_in_a_batch():
    model, chat = load_model(WORLD / "model", dtype=torch.float32), Chat(WORLD / "model")
    files = ("eval_harmful", "eval_benign", "eval_sentiment")
    encoded = [chat.encode_prompt(c.prompts[-1]) for name in files for c in read_conversations(WORLD / f"{name}.jsonl")[:12]]
    assert generate(model, encoded, 40) == simple(model, encoded, 40)


def test_adapters_count_and_can_be_off(prompts):
    model = load_model(GOLDEN[0])
    add_lora(model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    adapted = generate(model, prompts, 10)
    assert adapted == simple(model, prompts, 10)
    with model.adapters_off():
        assert generate(model, prompts, 10) == simple(load_model(GOLDEN[0]), prompts, 10) != adapted
    assert all(linear.adapter_on for linear in model.modules() if hasattr(linear, "adapter_on"))


def test_progress_counts_every_prompt_once(prompts):
    counts = []
    generate(load_model(GOLDEN[0]), prompts, 3, batch_size=4, progress=counts.append)
    assert counts == [4, 4, 1]


class TestBatches:
    def test_every_sequence_once_in_order_of_length(self):
        lengths = torch.randint(1, 500, (300,)).tolist()
        batches = batches_by_length(lengths, 16)
        assert [lengths[i] for batch in batches for i in batch] == sorted(lengths) and max(map(len, batches)) == 16
        assert sorted(i for batch in batches for i in batch) == list(range(300))

    def test_nothing_makes_no_batch(self):
        assert batches_by_length([], 8) == []
