"""The objective against closed forms and float64 autograd, the loop against itself, and whole runs on the embedded world."""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import BenchConfig
from conftest import DEVICE, load_model, policy, tolerance
from critic import CriticConfig
from data.build import BuildConfig
from data.chat import IGNORE, Chat, Example, encode_examples
from data.conversations import WORLD, read_conversations
from data.order import draw, step_examples
from evaluate import EvalConfig
from grid import GridConfig
from lib import fused
from lib.cli import parse
from lib.files import DataError
from lib.reference import live_reference
from model import add_lora, can_compile, compile_blocks, generate, load_adapter
from probe import ProbeConfig
from train import token_loss as definition
from train import (TrainConfig, blend, check, gated_risk, leak_line, lr_at, main, micro_batch_loss, open_model, open_reference, smooth,
                   token_kl, token_nll, train)

ROOT, GOLDEN = Path(__file__).parent.parent, Path(__file__).parent / "golden"
QUICK = TrainConfig(harmful=str(WORLD / "eval_harmful.jsonl"), benign="none", task="none", limit=40, samples=0, compile="off",
                    judge="none", device=DEVICE)
NEAR, OF_GRADIENTS = tolerance() / 10, {"atol": tolerance() / 10, "rtol": 10 * tolerance()}  # what only rounding tells apart


@pytest.fixture(scope="module")
def chat():
    return Chat(WORLD / "model")


@pytest.fixture(scope="module")
def examples(chat):
    return encode_examples(chat, read_conversations(WORLD / "mixed_10.jsonl")[:24], 256)


def count(examples):
    return sum(label != IGNORE for example in examples for label in example.labels[1:])


def loss_and_grads(model, examples, risk, size=None, beta=(0.1, 0.9), ref=None):
    """Loss and LoRA gradients of one optimizer step in micro-batches of `size`."""
    model.zero_grad()
    alpha, weights = blend(risk, *beta)
    size, total = size or len(examples), 0.0
    for start in range(0, len(examples), size):
        part = slice(start, start + size)
        loss, _, _ = micro_batch_loss(model, ref or live_reference(model), examples[part], alpha[part], weights[part], count(examples))
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def written_out(model, examples, alpha, beta, reference=None):
    """The objective in float64, token by token."""
    loss = 0.0
    for example, a, b in zip(examples, alpha.tolist(), beta.tolist()):
        ids = torch.tensor([example.input_ids], device=DEVICE)
        logp = model(ids)[0].double().log_softmax(-1)
        with torch.no_grad(), model.adapters_off():
            ref = (reference or model)(ids)[0].double().log_softmax(-1)
        for t, label in enumerate(example.labels):
            if label != IGNORE:
                loss = loss - a * logp[t - 1, label] + b * (ref[t - 1].exp() * (ref[t - 1] - logp[t - 1])).sum()
    return loss / count(examples)


def fast(hidden, weight, labels, alpha, beta, ref_hidden):
    """fused.token_loss with the arguments of the definition."""
    return fused.token_loss(hidden, weight, labels, alpha, beta, fused.reference_terms(ref_hidden, weight, labels, hidden.dtype))


@pytest.mark.parametrize("token_loss", [definition, fast], ids=["definition", "fused"])
class TestObjective:
    """With the identity as the head, hidden states are logits."""

    def test_gradient_is_softmax_minus_the_soft_target(self, token_loss):
        eye = torch.eye(11, dtype=torch.float64, device=DEVICE)
        logits, ref = (torch.randn(7, 11, dtype=torch.float64).to(DEVICE) for _ in range(2))
        targets, risk = torch.randint(11, (7,)).to(DEVICE), torch.rand(7, dtype=torch.float64).to(DEVICE)
        logits.requires_grad_()
        alpha, beta = blend(risk, 0.1, 0.9)
        token_loss(logits, eye, targets, alpha, beta, ref)[0].sum().backward()
        q = alpha[:, None] * torch.nn.functional.one_hot(targets, 11) + beta[:, None] * ref.softmax(-1)
        torch.testing.assert_close(logits.grad, logits.softmax(-1).detach() - q, atol=1e-12, rtol=1e-12)

    def test_the_minimiser_is_the_mixture(self, token_loss):
        """At β_max = 0.9 a harmful token keeps probability 0.1: the gate leaks."""
        eye = torch.eye(6, dtype=torch.float64, device=DEVICE)
        ref, targets = torch.randn(1, 6, dtype=torch.float64).to(DEVICE), torch.tensor([2], device=DEVICE)
        alpha, beta = blend(torch.ones(1, dtype=torch.float64, device=DEVICE), 0.1, 0.9)
        logits = (alpha[:, None] * torch.nn.functional.one_hot(targets, 6) + beta[:, None] * ref.softmax(-1)).log().requires_grad_()
        token_loss(logits, eye, targets, alpha, beta, ref)[0].sum().backward()
        assert logits.grad.abs().max() < 1e-12 and logits.softmax(-1)[0, 2] > 0.1


class TestEquations:
    def test_nll_and_kl_are_their_closed_forms(self):
        p, q = torch.tensor([[0.5, 0.25, 0.25]], device=DEVICE), torch.tensor([[0.25, 0.5, 0.25]], device=DEVICE)
        assert token_nll(q.log(), torch.tensor([1], device=DEVICE)).item() == pytest.approx(math.log(2))
        assert token_kl(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
        assert token_kl(p.log() + 7, q.log() - 3).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)  # logits, up to a constant

    def test_equal_policies_have_exactly_zero_kl(self):
        logits = torch.randn(50, 1000).to(DEVICE) * 20
        assert torch.equal(token_kl(logits, logits.clone()), torch.zeros(50, device=DEVICE))

    def test_extreme_logits_stay_finite(self):
        logits = torch.tensor([[1e4, -1e4, 0.0]], device=DEVICE, requires_grad=True)
        token_kl(torch.tensor([[-1e4, 1e4, 0.0]], device=DEVICE), logits).sum().backward()
        assert logits.grad.isfinite().all()

    def test_risk_to_alpha_and_beta(self):
        alpha, beta = blend(torch.tensor([0.0, 0.5, 1.0]), 0.1, 0.9)
        torch.testing.assert_close(beta, torch.tensor([0.1, 0.5, 0.9]))
        assert torch.equal(alpha, 1 - beta)

    def test_smoothing_starts_at_the_first_risk(self):
        assert smooth(None, 0.8, 0.9) == 0.8 and smooth(0.8, 0.0, 0.75) == pytest.approx(0.6)

    def test_learning_rate_warms_up_and_falls_to_zero(self):
        rates = [lr_at(step, 105, 5, 2.0) for step in range(105)]
        assert (
            rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
            and rates[5] == 2.0
            and rates[55] == pytest.approx(1.0)
            and 0 < rates[-1] < 0.001
        )
        assert lr_at(0, 1, 0, 2.0) == 2.0 and all(math.isfinite(lr_at(s, 3, 5, 1.0)) for s in range(3))


class TestMicroBatch:
    def test_beta_zero_is_sft(self, examples):
        model, batch = policy(), examples[:6]
        loss, grads = loss_and_grads(model, batch, torch.zeros(6), beta=(0.0, 0.0))
        model.zero_grad()
        nll = sum(
            torch.nn.functional.cross_entropy(
                model(torch.tensor([e.input_ids], device=DEVICE))[0, :-1],
                torch.tensor(e.labels[1:], device=DEVICE),
                ignore_index=IGNORE,
                reduction="sum",
            )
            for e in batch
        ) / count(batch)  # the loss as one would write it, example by example
        nll.backward()
        assert loss == pytest.approx(nll.item(), abs=NEAR)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(grads[name], parameter.grad, **OF_GRADIENTS)

    def test_the_whole_objective_is_the_one_written_out_in_float64(self, examples):
        model, batch = policy(), examples[:5]
        risk = torch.rand(5)
        loss, _ = loss_and_grads(model, batch, risk)
        assert loss == pytest.approx(written_out(model, batch, *blend(risk, 0.1, 0.9)).item(), rel=tolerance())

    def test_accumulation_changes_nothing(self, examples):
        model, risk = policy(), torch.rand(8)
        whole = loss_and_grads(model, examples[:8], risk)
        for size in (1, 3):
            parts = loss_and_grads(model, examples[:8], risk, size)
            assert parts[0] == pytest.approx(whole[0], abs=NEAR)
            assert all(torch.allclose(parts[1][name], whole[1][name], **OF_GRADIENTS) for name in whole[1])

    def test_batch_mates_padding_and_order_change_nothing(self, examples):
        model, risk, batch = policy(), torch.tensor([0.2, 0.9, 0.5]), sorted(examples[:9], key=lambda e: len(e.input_ids))[::4]
        assert len({len(e.input_ids) for e in batch}) > 1
        whole = loss_and_grads(model, batch, risk)
        backward = loss_and_grads(model, batch[::-1], risk.flip(0))
        alone = loss_and_grads(model, batch, risk, size=1)
        for other in (backward, alone):
            assert other[0] == pytest.approx(whole[0], abs=NEAR)
            assert all(torch.allclose(other[1][name], whole[1][name], **OF_GRADIENTS) for name in whole[1])

    def test_prompt_tokens_are_conditioned_on_but_never_trained_on(self, examples, monkeypatch):
        """∂L/∂hidden is zero at every position but those before a response token."""
        model, hidden = policy(), []
        forward = type(model.model).forward

        def recording(self, *args, **kwargs):
            out = forward(self, *args, **kwargs)
            if out[0].requires_grad:
                out[0].retain_grad()
                hidden.append(out[0])
            return out

        monkeypatch.setattr(type(model.model), "forward", recording)
        loss_and_grads(model, examples[:3], torch.full((3,), 0.5))
        before_response = [t + 1 < len(e.labels) and e.labels[t + 1] != IGNORE for e in examples[:3] for t in range(len(e.labels))]
        assert [bool(g.abs().max() > 0) for g in hidden[0].grad] == before_response

    def test_longrope_rows_keep_their_own_length(self):
        """Phi-3 switches factors at 16 tokens here: a long batch mate must not switch the short row."""
        model = load_model(GOLDEN / "phi3_longrope")
        add_lora(model, 4, 4)
        batch = [Example(i, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n))) for i, n in enumerate((10, 20))]
        risk = torch.tensor([0.5, 1.0])
        assert loss_and_grads(model, batch, risk)[0] == pytest.approx(loss_and_grads(model, batch, risk, size=1)[0], abs=tolerance())

    def test_examples_without_pull_never_run_the_reference(self, examples):
        micro_batch_loss(policy(), lambda pulled: pytest.fail("the reference ran"), examples[:2], torch.ones(2), torch.zeros(2), 9)

    def test_the_reference_sees_only_examples_with_pull(self, examples):
        model, reference, seen = policy(), load_model(WORLD / "model", dtype=torch.float32), []
        reference.model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
        beta = torch.tensor([0.0, 0.5, 0.0, 1.0])
        loss, nll, kl = micro_batch_loss(model, live_reference(reference), examples[:4], 1 - beta, beta, count(examples[:4]))
        assert seen == [2]
        own = micro_batch_loss(model, live_reference(model), examples[:4], 1 - beta, beta, count(examples[:4]))
        assert loss.item() == pytest.approx(own[0].item(), abs=NEAR) and kl.item() == pytest.approx(own[2].item(), abs=10 * tolerance())

    def test_a_fresh_adapter_has_zero_kl(self, examples):
        model = policy(adapter=0.0)
        _, _, kl = micro_batch_loss(model, live_reference(model), examples[:4], torch.zeros(4), torch.ones(4), 9)
        assert kl.item() == 0

    def test_full_pull_alone_leaves_the_reference_a_fixed_point(self, examples):
        _, grads = loss_and_grads(policy(adapter=0.0), examples[:4], torch.ones(4), beta=(1.0, 1.0))
        assert max(g.abs().max() for g in grads.values()) < NEAR


def steps_of(config, model, reference, examples, risk, folder):
    """The lines of metrics of a loop that runs in a new folder."""
    folder.mkdir()
    train(config, model, reference, examples, risk, folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TestLoop:
    def run(self, examples, tmp_path, name="a", **options):
        config = replace(QUICK, **({"epochs": 1, "batch_size": 4} | options))
        model = policy(adapter=0.0)
        return model, steps_of(config, model, live_reference(model), examples, torch.linspace(0, 1, 24), tmp_path / name)

    def test_the_reference_is_unchanged_to_the_bit(self, examples, tmp_path):
        model, rows = self.run(examples, tmp_path)
        original = load_model(WORLD / "model", dtype=torch.float32)
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in original.named_parameters())
        with model.adapters_off():
            ids = torch.arange(9, device=DEVICE)[None]
            assert torch.equal(model(ids), original(ids))
        assert [row["step"] for row in rows] == list(range(6)) and rows[0]["kl"] == 0 < rows[-1]["kl"]
        assert set(rows[0]) == {"step", "loss", "nll", "kl", "risk", "alpha", "beta", "lr", "grad_norm", "tokens_per_s"}

    def test_accumulating_one_by_eight_is_eight_by_one(self, examples, tmp_path):
        wide = self.run(examples, tmp_path, "8x1", batch_size=8)[1]
        narrow = self.run(examples, tmp_path, "1x8", batch_size=1, accumulation=8)[1]
        for x, y in zip(wide, narrow):
            assert x["loss"] == pytest.approx(y["loss"], abs=tolerance()) and x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)

    def test_the_same_seed_gives_the_same_run_and_another_another(self, examples, tmp_path):
        losses = [[row["loss"] for row in self.run(examples, tmp_path, str(i), seed=seed)[1]] for i, seed in enumerate((3, 3, 4))]
        assert losses[0] == losses[1] != losses[2]

    def test_the_batch_gate_gives_every_example_the_smoothed_mean(self, examples, tmp_path):
        _, rows = self.run(examples, tmp_path, gate="batch", ema=0.5)
        _, free = self.run(examples, tmp_path, "b")
        smoothed = free[0]["risk"]
        for row, plain in zip(rows, free):
            smoothed = 0.5 * smoothed + 0.5 * plain["risk"]
            assert row["risk"] == pytest.approx(smoothed, abs=1e-6) and row["beta"] == pytest.approx(0.1 + 0.8 * smoothed, abs=1e-6)

    def test_behind_a_closed_gate_all_risky_data_move_nothing_to_the_bit(self, examples, tmp_path):
        """Without α and KL the gradient is rounding noise, which AdamW would turn into steps of full size."""
        model = policy(adapter=0.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        train(replace(QUICK, epochs=1, beta_min=0.0, beta_max=1.0), model, live_reference(model), examples, torch.ones(24), tmp_path)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_a_non_finite_gradient_stops_the_run(self, examples, tmp_path):
        model = policy()
        model.model.norm.weight.data[0] = float("nan")
        with pytest.raises(FloatingPointError, match="step 0"):
            train(QUICK, model, live_reference(model), examples, torch.zeros(24), tmp_path)

    def test_gradient_checkpointing_trains_alike(self, examples, tmp_path):
        _, plain = self.run(examples[:8], tmp_path, "plain")
        model, calls = policy(adapter=0.0), []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        model.model.gradient_checkpointing = True
        self.same(plain, model, examples[:8], tmp_path)
        assert calls.count(True) == 2 * len(plain)  # forward, and again in the backward pass

    def test_compiled_blocks_train_alike_in_three_graphs_for_any_length(self):
        """One for the first block, whose input has no gradient, one for the others, one with the adapters off; graphs are never broken."""
        batches = [[Example(0, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n)))] for n in (9, 20, 14, 17, 23, 12)]
        plain, model, risk = policy(GOLDEN / "llama"), policy(GOLDEN / "llama"), torch.full((1,), 0.5)
        keys = list(model.state_dict())
        assert can_compile(torch.device(DEVICE).type, "aot_eager")  # compiles a little function, once
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compile_blocks(model, backend="aot_eager")
        for batch in batches:
            (loss, grads), (expected, expected_grads) = loss_and_grads(model, batch, risk), loss_and_grads(plain, batch, risk)
            assert loss == pytest.approx(expected, abs=tolerance())
            assert all(torch.allclose(grads[name], expected_grads[name], **OF_GRADIENTS) for name in grads)
        counters = torch._dynamo.utils.counters
        assert list(model.state_dict()) == keys and counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]

    def test_every_step_is_full_and_every_epoch_a_permutation(self, examples, tmp_path):
        """24 examples in steps of 5 for 2 epochs: 10 steps, the fifth of which ends one epoch and begins the next."""
        _, rows = self.run(examples, tmp_path, batch_size=5, epochs=2)
        assert len(rows) == math.ceil(2 * 24 / 5)
        epochs = [[example.index for example in draw(examples, 0, 24 * epoch, 24)] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
        drawn = (epochs[0] + epochs[1] + epochs[2])[:50]
        risk = torch.linspace(0, 1, 24)
        assert [row["risk"] for row in rows] == pytest.approx([risk[drawn[i : i + 5]].mean().item() for i in range(0, 50, 5)])

    def test_a_step_draws_the_same_wherever_a_run_resumes_and_the_shortest_first(self, examples):
        steps = [step_examples(step, examples[4:], examples[:4], lambda step: step // 2, 5, seed=1) for step in range(12)]
        again = [step_examples(step, examples[4:], examples[:4], lambda step: step // 2, 5, seed=1) for step in reversed(range(12))]
        assert steps == again[::-1] and all(len(step) == 5 for step in steps)
        assert all([len(e.input_ids) for e in step] == sorted(len(e.input_ids) for e in step) for step in steps)
        data = [e.index for step in steps for e in step if e.index >= 4]
        assert len(data) == 54 and set(data) == set(range(4, 24))  # 60 draws, 6 of them of examples[:4]

    def same(self, plain, model, examples, tmp_path):
        config, risk = replace(QUICK, epochs=1, batch_size=4), torch.linspace(0, 1, 24)
        other = steps_of(config, model, live_reference(model), examples, risk, tmp_path / "other")
        for a, b in zip(plain, other, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=10 * tolerance()) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-2)

    def test_the_kept_reference_is_the_live_one(self, examples, tmp_path):
        _, live = self.run(examples, tmp_path, "live", epochs=2)
        (tmp_path / "run").mkdir()
        model, config, risk = policy(adapter=0.0), replace(QUICK, epochs=2, batch_size=4, out=tmp_path / "run"), torch.linspace(0, 1, 24)
        kept = steps_of(config, model, open_reference(config, model, examples, risk), examples, risk, tmp_path / "kept")
        for a, b in zip(live, kept, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=10 * tolerance()) and a["kl"] == pytest.approx(b["kl"], abs=10 * tolerance())

    def test_full_fine_tuning_leaves_the_head(self, examples, tmp_path):
        """Oracle: the gradients of the objective as written out, with a second model."""
        config, risk = replace(QUICK, lora_r=0, ref="live"), torch.linspace(0, 1, 24)
        model, reference = open_model(config, WORLD / "model", trainable=True), load_model(WORLD / "model", dtype=torch.float32)
        for parameter in model.model.layers.parameters():  # away from the reference, where KL has no gradient
            parameter.data *= 1.01
        alpha, beta = blend(risk, 0.1, 0.9)
        loss, _, _ = micro_batch_loss(model, live_reference(reference), examples, alpha, beta, count(examples))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        written_out(model, examples, alpha, beta, reference).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert (gradient - expected).norm() / expected.norm() < tolerance()
        assert model.lm_head.weight.grad is None and len(gradient) > 800_000


class TestTheGate:
    def test_a_risk_under_the_floor_counts_as_none_where_beta_min_is_0_and_what_is_no_risk_is_refused(self, examples):
        risk = torch.tensor([0.0, 0.009, 0.01, 1.0])
        assert gated_risk(replace(QUICK, beta_min=0.0, beta_max=1.0), risk, 1).tolist() == pytest.approx([0, 0, 0.01, 1, 1])
        for wrong in (math.nan, -0.1, 1.1, math.inf):
            with pytest.raises(DataError, match="expected risks from 0 to 1"):
                gated_risk(QUICK, torch.tensor([0.0, wrong]), 0)
        assert gated_risk(QUICK, risk, 0).tolist() == risk.tolist()

    def test_the_last_line_says_what_leaks_and_how_to_close_it(self):
        assert "keeps probability 0.1" in leak_line(QUICK) and "--beta-min 0.02 --beta-max 1" in leak_line(QUICK)
        assert leak_line(replace(QUICK, beta_max=1.0)) == leak_line(replace(QUICK, method="sft")) == ""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """24 lines of data, and the risks of a run's probe."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "data.jsonl").write_text("".join((WORLD / "mixed_10.jsonl").read_text().splitlines(True)[:24]))
    return folder / "data.jsonl"


def with_risk(data, folder, value):
    """A file with one risk for all of the data."""
    rows = [{"risk": value, "hash": c.hash} for c in read_conversations(data)]
    (folder / "risk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "risk.jsonl")


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class TestRuns:
    def test_a_short_sft_run_breaks_the_model_and_an_adaptive_one_does_not(self, tmp_path, capsys):
        rates = {}
        for method in ("sft", "adaptive"):
            main(replace(QUICK, data=WORLD / "mixed_30.jsonl", method=method, epochs=1, lora_r=16, out=tmp_path / method))
            results = json.loads((tmp_path / method / "results.json").read_text())
            base, after = (results[which]["harmful"]["harmful"]["asr"]["greedy"]["rate"] for which in ("base", "after"))
            rates[method] = after
            assert base <= 0.02
        assert rates["sft"] >= 0.8 and rates["adaptive"] <= 0.05
        assert "ASR harmful greedy" in capsys.readouterr().out
        run = tmp_path / "adaptive"
        assert len(lines(run / "risk.jsonl")) == 600 and all(0 <= row["risk"] <= 1 for row in lines(run / "risk.jsonl"))
        assert json.loads((run / "config.json").read_text())["beta_max"] == 0.9 and len(lines(run / "metrics.jsonl")) == 75
        assert not list(run.glob("reference*")) and not (run / "state.safetensors").exists()

        # The adapter over the base and the merged checkpoint generate the same text, as the run itself did.
        adapted, merged, chat = load_model(WORLD / "model", dtype=torch.float32), load_model(run / "model"), Chat(run / "model")
        load_adapter(adapted, run / "adapter")
        prompts = [chat.encode_prompt(c.prompts[-1]) for c in read_conversations(WORLD / "eval_benign.jsonl")[:20]]
        assert generate(adapted, prompts, 30) == generate(merged, prompts, 30)

    def test_risks_read_from_a_file_are_the_same_run(self, small, tmp_path):
        options = dict(data=small, epochs=2, limit=1, eval_base=False)
        main(replace(QUICK, out=tmp_path / "first", **options))
        main(replace(QUICK, out=tmp_path / "again", risk=str(tmp_path / "first" / "risk.jsonl"), **options))
        first, again = (lines(tmp_path / name / "metrics.jsonl")[-1]["loss"] for name in ("first", "again"))
        assert first == pytest.approx(again, abs=1e-6)

    def test_the_larger_of_probe_and_critic_then_a_filter_on_it(self, tmp_path, capsys):
        """Innocent prompts that are answered harmfully: the probe cannot see them, the critic does."""
        (tmp_path / "data.jsonl").write_text("".join((WORLD / "innocent.jsonl").read_text().splitlines(True)[:80]))
        options = dict(epochs=1, lora_r=8, limit=4, judge=str(WORLD / "judge"), data=tmp_path / "data.jsonl")
        main(replace(QUICK, risk="max", out=tmp_path / "max", **options))
        rows, turned = lines(tmp_path / "max" / "risk.jsonl"), [c.meta["harmful"] for c in read_conversations(options["data"])]
        assert all(row["risk"] == max(row["probe"], row["critic"]) for row in rows) and 0 < sum(turned) < 80
        assert max(row["probe"] for row, t in zip(rows, turned) if t) < 0.5 < min(row["critic"] for row, t in zip(rows, turned) if t)
        assert max(row["risk"] for row, t in zip(rows, turned) if not t) < 0.5
        assert f"to the critic alone: {sum(turned)}" in capsys.readouterr().out
        results = json.loads((tmp_path / "max" / "results.json").read_text())
        assert results["after"]["harmful"]["harmful"]["judge_asr"]["greedy"]["n"] == 4

        filtered = dict(method="filter", out=tmp_path / "filter", risk=str(tmp_path / "max" / "risk.jsonl"))
        main(replace(QUICK, eval_base=False, **options | filtered))
        printed = capsys.readouterr().out
        assert f"filter: {sum(turned)} of 80 examples dropped" in printed and "| base" not in printed and "| after" in printed
        assert set(json.loads((tmp_path / "filter" / "results.json").read_text())) == {"after"}
        assert not (tmp_path / "filter" / "completions_base.jsonl").exists()
        assert len(lines(tmp_path / "filter" / "metrics.jsonl")) == math.ceil((80 - sum(turned)) / 8)

    def test_a_filter_that_leaves_nothing_leaves_the_model_as_it_was(self, small, tmp_path, capsys):
        main(replace(QUICK, method="filter", data=small, risk=with_risk(small, tmp_path, 0.9), out=tmp_path / "run", limit=2))
        assert "filter: 24 of 24 examples dropped, the model stays as it was" in capsys.readouterr().out
        original, after = (load_model(path, dtype=torch.float32) for path in (WORLD / "model", tmp_path / "run" / "model"))
        assert all(torch.equal(p, after.get_parameter(name)) for name, p in original.named_parameters())

    @pytest.mark.parametrize("ref", ["keep", "live"])
    def test_full_fine_tuning_moves_the_policy_and_not_its_reference(self, small, tmp_path, ref):
        options = dict(data=small, risk=with_risk(small, tmp_path, 1.0), out=tmp_path / "full", limit=2, eval_base=False)
        main(replace(QUICK, lora_r=0, lr=1e-4, epochs=4, ref=ref, **options))
        kl = [row["kl"] for row in lines(tmp_path / "full" / "metrics.jsonl")]
        assert not (tmp_path / "full" / "adapter").exists() and abs(kl[0]) < 1e-5 < max(kl) < 0.5

    @pytest.mark.parametrize("wrong, words", [
        (dict(beta_min=0.9, beta_max=0.1), "--beta-max: expected beta-min to 1, found 0.1"),
        (dict(beta_max=1.1), "--beta-max"),
        (dict(ema=0.5), "--ema: expected 0 unless"),
        (dict(risk="judge"), "--risk: expected probe, critic, max, or a file, found judge"),
        (dict(risk="critic"), "--judge: expected a checkpoint folder or a URL for --risk critic, found none"),
        (dict(risk="critic", probe=Path("p")), "--probe: expected none unless"),
        (dict(dtype="bfloat16", lora_r=0), "--dtype: expected float32 with --lora-r 0"),
        (dict(batch_size=0), "--batch-size: expected at least 1, found 0"),
        (dict(method="csft", risk="max"), "--risk: expected none without --method adaptive or filter"),
        (dict(out=WORLD), "--out"),
        (dict(method="sft", beta_max=1.0), "--beta-max"),
        (dict(epochs=0), "--epochs"),
        (dict(lr=0.0), "--lr"),
        (dict(lora_targets="q_proj,lm_head"), "--lora-targets: expected no lm_head"),
        (dict(ref="live", method="sft"), "--ref: expected none without --method adaptive"),
        (dict(anchor_share=1.0), "--anchor-share: expected 0 to under 1"),
        (dict(method="lisa"), "--anchor-share: expected with --method lisa some"),
        (dict(method="lisa", anchor_share=0.01), "--anchor-share: expected with --method lisa some"),
        (dict(anchors=WORLD / "probe.jsonl"), "--anchors: expected none without")])
    def test_wrong_options_fail_at_once(self, wrong, words):
        with pytest.raises(DataError, match=words):
            check(replace(QUICK, **wrong))

    def test_a_bad_risk_file_or_target_leaves_nothing_behind(self, small, tmp_path):
        (tmp_path / "risk.jsonl").write_text('{"risk": 1}\n')
        for wrong in (dict(risk=str(tmp_path / "risk.jsonl")), dict(lora_targets="q_prj", method="sft")):
            with pytest.raises(ValueError, match="expected"):
                main(replace(QUICK, data=small, limit=2, out=tmp_path / "run", **wrong))
            assert not (tmp_path / "run").exists()

    def test_a_bad_line_trains_nothing_and_leaves_nothing(self, tmp_path):
        (tmp_path / "data.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
        command = [sys.executable, "train.py", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run", "--device", DEVICE]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1 and "data.jsonl:2: expected" in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


class TestCommandLine:
    @pytest.mark.parametrize("config", [TrainConfig, ProbeConfig, CriticConfig, EvalConfig, BuildConfig, GridConfig, BenchConfig])
    def test_help_shows_every_option_on_a_narrow_terminal_and_typos_are_refused(self, config, capsys):
        with pytest.raises(SystemExit) as ended:
            parse(config, ["--help"])
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and max(map(len, shown.splitlines())) <= 100 and len(shown.splitlines()) <= 85
        for option in fields(config):
            assert option.name in ("paths", "given") or f"--{option.name}".replace("_", "-") in shown
        with pytest.raises(SystemExit) as ended:
            parse(config, ["--no-such-option"])
        assert ended.value.code == 2 and "--no-such-option" in capsys.readouterr().err

    def test_it_becomes_the_configuration(self):
        config = parse(TrainConfig, ["--no-eval-base", "--fsdp", "--lr", "1e-3", "--data", "d", "--judge-kind", "guard"])
        assert (config.eval_base, config.fsdp, config.lr, config.data, config.judge_kind) == (False, True, 1e-3, Path("d"), "guard")
        assert parse(TrainConfig, ["--compile", "auto"]) == parse(TrainConfig, []) == TrainConfig()
        assert parse(EvalConfig, ["a", "b", "--compare"], positional="paths") == EvalConfig(
            paths=(Path("a"), Path("b")), compare=True, given=("paths", "compare"))
