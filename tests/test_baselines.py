"""The baselines against closed forms: constrained SFT and Lisa. tests/test_train.py runs the filter."""

import json
import math
from dataclasses import replace

import pytest
import torch

import lib.baselines
from conftest import DEVICE, assert_near, policy, tolerance
from data.chat import IGNORE, Chat, encode_examples
from data.conversations import WORLD, Conversation, read_conversations
from data.order import step_examples
from lib.baselines import LISA_CYCLE, Baseline, ConstrainedSFT, Lisa, csft_weight, lisa_pull, response_positions
from lib.fused import label_logp
from lib.run import State
from train import TrainConfig, micro_batch_loss, train


@pytest.fixture(scope="module")
def chat():
    return Chat(WORLD / "model")


@pytest.fixture(scope="module")
def examples(chat):
    return encode_examples(chat, read_conversations(WORLD / "mixed_10.jsonl")[:24], 256)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


class TestConstrainedSFT:
    def test_the_weight_is_its_closed_form(self):
        ratio, position = torch.tensor([0.0, 2.0, 2.0, 2.0, 2.0, 40.0, -40.0]), torch.tensor([3, 1, 2, 5, 6, 3, 3])
        expected = [1.0, *(2 * (1 - sigmoid(tau * 2)) for tau in (0.5, 2, 2, 0.1)), 1e-3, 2.0]
        weight = csft_weight((ratio - 7).requires_grad_(), torch.full((7,), -7.0), position)
        assert weight.tolist() == pytest.approx(expected, abs=1e-6) and not weight.requires_grad

    def test_the_references_label_probabilities_are_those_of_each_example_alone(self, examples):
        model = policy()
        logp = label_logp(model, examples[:7], batch_size=3)
        for example in examples[:7]:
            with torch.no_grad(), model.adapters_off():
                alone = model(torch.tensor([example.input_ids], device=DEVICE))[0].log_softmax(-1)
            expected = [alone[t - 1, label] for t, label in enumerate(example.labels) if label != IGNORE]
            assert_near(logp[example.index], torch.stack(expected))

    def test_it_is_sft_while_the_policy_is_the_reference(self, examples):
        model, results = policy(adapter=0.0), []
        for method in (Baseline(0.0, 8), ConstrainedSFT(0.0, 8)):
            method.prepare(model, examples[:6], 6)
            model.zero_grad()
            loss, _, _ = micro_batch_loss(model, None, examples[:6], torch.ones(6), torch.zeros(6), 9, method.token_weights)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance() / 10, rtol=10 * tolerance())

    def test_the_loss_is_the_one_written_out_and_positions_restart_with_each_turn(self, chat):
        texts = ["Hello!", "Hello! I am here to help.", "Say 4 and 5.", "The numbers are 4."]
        messages = tuple({"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts))
        example, model = chat.encode_example(Conversation(messages), 0, 256), policy()
        ids = torch.tensor([example.input_ids], device=DEVICE)
        with torch.no_grad(), model.adapters_off():
            ref = model(ids)[0].double().log_softmax(-1)
        logp = model(ids)[0].double().log_softmax(-1)
        expected, position, positions = 0.0, 0, []
        for t, label in enumerate(example.labels):
            position = position + 1 if label != IGNORE else 0
            if position:
                tau = 0.5 if position == 1 else 2.0 if position <= 5 else 0.1
                ratio = (logp[t - 1, label] - ref[t - 1, label]).item()
                expected -= max(1e-3, 2 * (1 - sigmoid(tau * ratio))) * logp[t - 1, label].item()
                positions.append(position)
        method = ConstrainedSFT(0.0, 1)
        method.prepare(model, [example], 1)
        loss, _, _ = micro_batch_loss(model, None, [example], torch.ones(1), torch.zeros(1), 1, method.token_weights)
        assert loss.item() == pytest.approx(expected, rel=tolerance())
        assert response_positions(example).tolist() == positions and positions.count(1) == 2

    def test_it_runs_the_reference_once_before_the_loop(self, examples, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(lib.baselines, "label_logp", lambda *options: calls.append(1) or label_logp(*options))
        config = TrainConfig(method="csft", batch_size=24, epochs=6, device=DEVICE)
        train(config, policy(adapter=0.0), None, examples, torch.zeros(24), tmp_path)
        rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert len(calls) == 1 and len(rows) == 6 and rows[-1]["nll"] < rows[0]["nll"]
        assert rows[0]["beta"] == 0 and rows[0]["kl"] is None and rows[0]["risk"] is None


class TestLisa:
    def test_each_cycle_begins_with_whole_steps_of_anchors(self, examples):
        marked = [replace(e, anchor=e.index < 4) for e in examples]
        before = Lisa(0.1, per_step=8).anchors_before
        steps = [step_examples(step, marked[4:], marked[:4], before, 8, seed=0) for step in range(2 * LISA_CYCLE)]
        assert [sum(e.anchor for e in step) for step in steps] == ([8] * 5 + [0] * 45) * 2

    def test_the_pull_is_the_gradient_of_its_proximal_term(self):
        """Oracle: autograd of loss + ρ/2·‖θ − θ_start‖²."""
        theta, start = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
        (expected,) = torch.autograd.grad(theta.pow(3).sum() + 0.7 / 2 * (theta - start).square().sum(), theta)
        theta.pow(3).sum().backward()
        lisa_pull([theta], [start], 0.7)
        torch.testing.assert_close(theta.grad, expected)

    def test_the_pull_is_to_where_the_phase_began(self):
        theta, state, method = torch.nn.Parameter(torch.zeros(2)), State(), Lisa(0.1, 8)
        for step, origin in ((0, 0.0), (1, 0.0), (4, 0.0), (5, 5.0), (49, 5.0), (50, 50.0)):
            theta.data.fill_(float(step))
            theta.grad = torch.zeros(2)
            method.adjust_gradients([theta], step, state)
            assert theta.grad.tolist() == [step - origin] * 2
