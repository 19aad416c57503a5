"""Generation against the most obvious loop: one prompt at a time, no cache, the whole sequence through the model for every token."""

from pathlib import Path

import pytest
import torch

from data import WORLD, Chat, batches_by_length, read_conversations
from generate import generate
from lora import add_lora, merge_lora
from model import load_model

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/config.json"))


@torch.no_grad()
def simple(model, prompts, max_new_tokens):
    found = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens and (token := model(torch.tensor([ids]))[0, -1].argmax().item()) not in (
            model.config.eos_token_ids
        ):
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


def test_static_and_compiled_is_the_simple_loop_in_one_graph(prompts):
    """What CUDA runs: every step has the same shapes, whatever the lengths; rows are not dropped, and the last batch is filled up."""
    model = golden(Path(__file__).parent / "golden" / "llama", prompts, 12)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert generate(model, prompts, 12, batch_size=4, static=True) == simple(model, prompts, 12)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_static_long_rope_switches_under_way(prompts):
    model = golden(Path(__file__).parent / "golden" / "phi3_longrope", prompts, 12)
    assert generate(model, prompts, 12, static=True) == simple(model, prompts, 12)


def test_the_embedded_model_says_the_same_alone_and_in_a_batch():
    model, chat = load_model(WORLD / "model", dtype=torch.float32), Chat(WORLD / "model")
    files = ("eval_harmful", "eval_benign", "eval_sentiment")
    encoded = [chat.encode_prompt(c.prompts[-1]) for name in files for c in read_conversations(WORLD / f"{name}.jsonl")[:12]]
    assert generate(model, encoded, 40) == simple(model, encoded, 40)


def test_adapters_are_merged_for_the_duration_and_the_weights_come_back_to_the_bit(prompts):
    model = load_model(GOLDEN[0])
    add_lora(model, 4, 8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = generate(model, prompts, 10)
    with model.adapters_off():
        assert generate(model, prompts, 10) == simple(load_model(GOLDEN[0]), prompts, 10) != adapted
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(linear.adapter_on for linear in model.modules() if hasattr(linear, "adapter_on"))
    merge_lora(model)
    assert generate(model, prompts, 10) == adapted


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

    @pytest.mark.parametrize("most", [1, 64, 2000, 100_000])
    def test_with_a_limit_on_tokens_padding_stays_under_a_tenth(self, most):
        lengths = torch.randint(1, 500, (300,)).tolist() + [1, 500, 500, 1]
        batches = batches_by_length(lengths, 64, most)
        for batch in batches:
            padded = len(batch) * max(lengths[i] for i in batch)
            assert padded <= most or len(batch) == 1
            assert sum(lengths[i] for i in batch) >= 0.9 * padded
        assert sorted(i for batch in batches for i in batch) == list(range(304))

    def test_nothing_makes_no_batch(self):
        assert batches_by_length([], 8) == []
