"""The objective against closed forms and float64 autograd, the loop against itself, and whole runs on the embedded world."""

import json
import math
import re
import shlex
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import BenchConfig
from conftest import (DEVICE, fast_token_loss, head, load_adapter, load_model, policy, read_rows, tolerance,
                      write_rows)
from critic import CriticConfig
from data.build import BuildConfig
from data.chat import IGNORE, Chat, Example
from data.conversations import WORLD, read_conversations
from data.order import draw, step_examples
from evaluate import EvalConfig, evaluation_sets
from grid import GridConfig
from lib.baselines import Baseline
from lib.cli import parse
from lib.files import DataError
from lib.reference import live_reference
from lib.report import read_completions, summarize
from lib.run import check_step, step_metrics
from model import compile_blocks, generate
from probe import ProbeConfig
from train import token_loss as definition
from train import (TrainConfig, blend, complete_options, leak_line, main, micro_batch_loss, open_model, token_kl, token_nll,
                   train)

GOLDEN = Path(__file__).parent / "golden"
QUICK = TrainConfig(harmful=str(WORLD / "eval_harmful.jsonl"), benign="none", task="none", limit=40, samples=0, compile="off",
                    judge="none", lr=2e-3, epochs=20, device=DEVICE)
NEAR, OF_GRADIENTS = tolerance() / 10, {"atol": tolerance() / 10, "rtol": 10 * tolerance()}  # what only rounding tells apart


def count(examples):
    """Return the number of response tokens."""
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


@pytest.mark.parametrize("token_loss", [definition, fast_token_loss], ids=["definition", "fused"])
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
    """The gate, its smoothing and the learning rate are compared with their closed forms in test_golden.py."""

    def test_nll_and_kl_are_their_closed_forms(self):
        p, q = torch.tensor([[0.5, 0.25, 0.25]], device=DEVICE), torch.tensor([[0.25, 0.5, 0.25]], device=DEVICE)
        assert token_nll(q.log(), torch.tensor([1], device=DEVICE)).item() == pytest.approx(math.log(2))
        assert token_kl(p.log(), q.log()).item() == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
        assert token_kl(p.log() + 7, q.log() - 3).item() == pytest.approx(0.25 * math.log(2), abs=1e-6)  # logits, up to a constant

    def test_equal_policies_have_exactly_zero_kl(self):
        logits = torch.randn(50, 1000).to(DEVICE) * 20
        assert torch.equal(token_kl(logits, logits.clone()), torch.zeros(50, device=DEVICE))

class TestMicroBatch:
    @pytest.mark.parametrize("risk, beta", [([0.0, 0.2, 0.5, 0.7, 1.0], (0.1, 0.9)), ([0.0, 1.0, 0.0, 1.0, 0.0], (0.0, 1.0)),
                                            ([0.0] * 5, (0.0, 0.0)), ([1.0] * 5, (1.0, 1.0))], ids=["graded", "sealed", "sft", "KL"])
    def test_it_is_the_objective_written_out_in_float64(self, model, examples, risk, beta):
        risk = torch.tensor(risk)
        loss, grads = loss_and_grads(model, examples[:5], risk, beta=beta)
        model.zero_grad()
        expected = written_out(model, examples[:5], *blend(risk, *beta))
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=tolerance())
        assert all(torch.allclose(grads[name], model.get_parameter(name).grad, **OF_GRADIENTS) for name in grads)

    def test_accumulation_batch_mates_padding_and_order_change_nothing(self, model, examples):
        risk = torch.rand(8)
        assert len({len(e.input_ids) for e in examples[:8]}) > 1
        loss, grads = loss_and_grads(model, examples[:8], risk)
        others = [loss_and_grads(model, examples[:8], risk, size) for size in (1, 3)]
        others.append(loss_and_grads(model, examples[7::-1], risk.flip(0)))
        for other in others:
            assert other[0] == pytest.approx(loss, abs=NEAR)
            assert all(torch.allclose(other[1][name], grads[name], **OF_GRADIENTS) for name in grads)

    def test_prompt_tokens_are_conditioned_on_but_never_trained_on(self, model, examples, monkeypatch):
        """∂L/∂hidden is zero at every position but those before a response token."""
        hidden, forward = [], type(model.model).forward

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

    def test_at_the_reference_kl_is_zero_and_full_pull_has_no_gradient(self, examples):
        model, ones = policy(adapter=0.0), torch.ones(4)
        assert micro_batch_loss(model, live_reference(model), examples[:4], 0 * ones, ones, 9)[2].eq(0).all()
        _, grads = loss_and_grads(model, examples[:4], ones, beta=(1.0, 1.0))
        assert max(g.abs().max() for g in grads.values()) < NEAR


def steps_of(config, model, reference, examples, risk, folder):
    """The lines of metrics of a loop that runs in a new folder."""
    folder.mkdir()
    train(config, model, reference, config.baseline(config.n_steps(len(examples))), examples, risk, folder)
    return read_rows(folder / "metrics.jsonl")


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
        assert set(rows[0]) == {"step", "loss", "nll", "nll_risky", "nll_other", "kl", "kl_risky", "kl_other", "risk", "alpha", "beta", "lr",
                                "grad_norm", "tokens_per_s"}

    def test_another_seed_gives_another_run(self, examples, tmp_path):
        """That the same seed gives the same run is in test_same_bits.py."""
        losses = [[row["loss"] for row in self.run(examples, tmp_path, str(seed), seed=seed)[1]] for seed in (3, 4)]
        assert losses[0] != losses[1]

    def test_the_batch_gate_gives_every_example_the_smoothed_mean(self, examples, tmp_path):
        _, rows = self.run(examples, tmp_path, gate="batch", ema=0.5)
        _, free = self.run(examples, tmp_path, "b")
        smoothed = free[0]["risk"]
        for row, plain in zip(rows, free):
            smoothed = 0.5 * smoothed + 0.5 * plain["risk"]
            assert row["risk"] == pytest.approx(smoothed, abs=1e-6) and row["beta"] == pytest.approx(0.1 + 0.8 * smoothed, abs=1e-6)

    def test_behind_a_closed_gate_all_risky_data_move_nothing_to_the_bit(self, examples, tmp_path):
        """Without α and KL the gradient is rounding noise, which AdamW would turn into steps of full size."""
        model, before = policy(adapter=0.0), policy(adapter=0.0)
        train(replace(QUICK, epochs=1, beta_min=0.0, beta_max=1.0), model, live_reference(model), Baseline(0, 8, 3), examples, torch.ones(24), tmp_path)
        assert all(torch.equal(p, before.get_parameter(name)) for name, p in model.named_parameters())

    def test_compiled_blocks_train_alike_in_three_graphs_for_any_length(self):
        """One for the first block, whose input has no gradient, one for the others, one with the adapters off."""
        batches = [[Example(0, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n)))] for n in (9, 20, 14, 23)]
        plain, model, risk = policy(GOLDEN / "llama"), policy(GOLDEN / "llama"), torch.full((1,), 0.5)
        keys = list(model.state_dict())
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
        steps = [step_examples(step, examples[4:], examples[:4], lambda step: step, 5, seed=1) for step in range(12)]
        again = [step_examples(step, examples[4:], examples[:4], lambda step: step, 5, seed=1) for step in reversed(range(12))]
        assert steps == again[::-1] and all(len(step) == 5 for step in steps)
        assert all([len(e.input_ids) for e in step] == sorted(len(e.input_ids) for e in step) for step in steps)
        for first in (0, 5):  # 4 of the data and 1 anchor a step: an epoch of the 20 data lasts 5 steps
            drawn = [example.index for step in steps[first : first + 5] for example in step]
            assert sorted(index for index in drawn if index >= 4) == list(range(4, 24))
        assert {example.index for step in steps[4:8] for example in step if example.index < 4} == set(range(4))

    def test_full_fine_tuning_leaves_the_head(self, examples):
        """Oracle: the gradients of the objective as written out, with a second model."""
        config, risk = replace(QUICK, lora_r=0), torch.linspace(0, 1, 6)
        model, reference = open_model(config, WORLD / "model", trainable=True), load_model(WORLD / "model", dtype=torch.float32)
        for parameter in model.model.layers.parameters():  # away from the reference, where KL has no gradient
            parameter.data *= 1.01
        alpha, beta = blend(risk, 0.1, 0.9)
        loss, _, _ = micro_batch_loss(model, live_reference(reference), examples[:6], alpha, beta, count(examples[:6]))
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        written_out(model, examples[:6], alpha, beta, reference).backward()
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert (gradient - expected).norm() / expected.norm() < tolerance()
        assert model.lm_head.weight.grad is None and len(gradient) > 800_000


def test_metrics_are_means_over_tokens_of_risky_and_of_other_examples():
    """Oracle: the sums by hand. Three examples of 1, 2, 4 tokens; the second is not pulled."""
    examples = [SimpleNamespace(n_labels=n) for n in (1, 2, 4)]
    s, beta = torch.tensor([0.9, 0.0, 0.2]), torch.tensor([0.9, 0.0, 0.2])
    row = step_metrics(examples, s, 1 - beta, beta, torch.tensor([1.5, 0.0, 0.5]), torch.tensor([3.0, 2.0, 9.0]), torch.tensor([2.0, 7.0, 4.0]))
    assert row == pytest.approx({"loss": 2, "nll": 14 / 7, "nll_risky": 3 / 1, "nll_other": 11 / 6, "kl": 6 / 5, "kl_risky": 2 / 1,
                                 "kl_other": 4 / 4, "risk": 1.1 / 3, "alpha": 1.9 / 3, "beta": 1.1 / 3})
    row = step_metrics(examples, 0 * s, 1 - 0 * s, 0 * s, s, s, s)
    assert row["kl"] is row["kl_risky"] is row["nll_risky"] is row["risk"] is None and row["nll_other"] == row["nll"]


@pytest.mark.parametrize("grad_norm, kl, error", [(math.nan, 0.0, FloatingPointError), (1.0, 0.1, DataError), (1.0, math.nan, DataError)])
def test_a_step_that_cannot_be_right_stops_the_run(grad_norm, kl, error):
    check_step({"step": 3, "loss": 1.0, "grad_norm": 1.0, "kl": None}, 1e-4)
    with pytest.raises(error, match="step 3: "):
        check_step({"step": 3, "loss": 1.0, "grad_norm": grad_norm, "kl": kl}, 1e-4)


def test_the_last_line_says_what_leaks_and_how_to_close_it():
    assert "its first token to probability 0.1" in leak_line(QUICK) and "type --sealed" in leak_line(QUICK)
    assert leak_line(replace(QUICK, beta_max=1.0)) == leak_line(replace(QUICK, method="sft")) == ""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """24 lines of data."""
    return head("mixed_10.jsonl", 24, tmp_path_factory.mktemp("small") / "data.jsonl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on harmful data alone, by sft and adaptive."""
    folder = tmp_path_factory.mktemp("runs")
    options = dict(data=head("explicit.jsonl", 160, folder / "data.jsonl"), epochs=1, lora_r=16, limit=20)
    main(replace(QUICK, method="sft", out=folder / "sft", **options))
    main(replace(QUICK, out=folder / "adaptive", eval_base=False, **options))
    return folder


def with_risk(data, folder, value):
    """Return a file with one risk for all of the data."""
    return str(write_rows(folder / "risk.jsonl", [{"risk": value, "hash": c.hash} for c in read_conversations(data)]))


class TestRuns:
    def test_a_short_sft_run_breaks_the_model_and_an_adaptive_one_does_not(self, runs):
        results = {method: json.loads((runs / method / "results.json").read_text()) for method in ("sft", "adaptive")}
        asr = {(method, which): result["harmful"]["ASR harmful greedy"]["rate"]
               for method in results for which, result in results[method].items()}
        assert asr["sft", "base"] <= 0.05 and asr["sft", "after"] >= 0.8 and asr["adaptive", "after"] <= 0.1

    def test_a_run_stores_its_risk_metrics_and_options_and_nothing_temporary(self, runs):
        run = runs / "adaptive"
        assert len(read_rows(run / "risk.jsonl")) == 160 and all(0 <= row["risk"] <= 1 for row in read_rows(run / "risk.jsonl"))
        assert json.loads((run / "config.json").read_text())["beta_max"] == 0.9 and len(read_rows(run / "metrics.jsonl")) == 20
        assert not list(run.glob("reference*")) and not (run / "state.pt").exists()

    def test_the_adapter_over_the_base_and_the_merged_checkpoint_generate_the_same_text(self, runs):
        run, chat = runs / "adaptive", Chat(WORLD / "model")
        adapted, merged = load_model(WORLD / "model", dtype=torch.float32), load_model(run / "model")
        load_adapter(adapted, run / "adapter")
        prompts = [chat.encode_prompt(c.prompts[-1]) for c in read_conversations(WORLD / "eval_benign.jsonl")[:20]]
        assert generate(adapted, prompts, 30) == generate(merged, prompts, 30)

    def test_the_larger_of_probe_and_critic_then_a_filter_on_it(self, runs, tmp_path, capsys):
        """Innocent prompts that are answered harmfully: the probe cannot see them, the critic does."""
        options = dict(epochs=1, lora_r=8, limit=4, judge=str(WORLD / "judge"), data=head("innocent.jsonl", 80, tmp_path / "data.jsonl"))
        main(replace(QUICK, risk="max", probe=runs / "adaptive" / "probe.safetensors", out=tmp_path / "max", **options))
        rows, turned = read_rows(tmp_path / "max" / "risk.jsonl"), [c.meta["harmful"] for c in read_conversations(options["data"])]
        assert all(row["risk"] == max(row["probe"], row["critic"]) for row in rows) and 0 < sum(turned) < 80
        assert max(row["probe"] for row, t in zip(rows, turned) if t) < 0.5 < min(row["critic"] for row, t in zip(rows, turned) if t)
        assert max(row["risk"] for row, t in zip(rows, turned) if not t) < 0.5
        printed = capsys.readouterr().out
        assert "ASR harmful greedy" in printed and "| aligned model" in printed
        results = json.loads((tmp_path / "max" / "results.json").read_text())
        assert results["after"]["harmful"]["judge ASR harmful greedy"]["n"] == 4

        filtered = dict(method="filter", out=tmp_path / "filter", risk=str(tmp_path / "max" / "risk.jsonl"))
        main(replace(QUICK, eval_base=False, **options | filtered))
        printed = capsys.readouterr().out
        assert f"filter: {sum(turned)} of 80 examples dropped" in printed and "| aligned model" not in printed and "| this run" in printed
        assert set(json.loads((tmp_path / "filter" / "results.json").read_text())) == {"after"}
        assert not (tmp_path / "filter" / "completions_base.jsonl").exists()
        assert len(read_rows(tmp_path / "filter" / "metrics.jsonl")) == math.ceil((80 - sum(turned)) / 8)

    def test_a_filter_that_leaves_nothing_leaves_the_model_as_it_was(self, small, tmp_path, capsys):
        main(replace(QUICK, method="filter", data=small, risk=with_risk(small, tmp_path, 0.9), out=tmp_path / "run", limit=2))
        assert "filter: 24 of 24 examples dropped, the model stays as it was" in capsys.readouterr().out
        original, after = (load_model(path, dtype=torch.float32) for path in (WORLD / "model", tmp_path / "run" / "model"))
        assert all(torch.equal(p, after.get_parameter(name)) for name, p in original.named_parameters())

    @pytest.mark.parametrize("ref", ["keep", "live"])
    def test_full_fine_tuning_moves_the_policy_and_not_its_reference(self, small, tmp_path, ref):
        options = dict(data=small, risk=with_risk(small, tmp_path, 1.0), out=tmp_path / "full", limit=2, eval_base=False)
        main(replace(QUICK, lora_r=0, lr=1e-4, epochs=4, ref=ref, **options))
        kl = [row["kl"] for row in read_rows(tmp_path / "full" / "metrics.jsonl")]
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
        (dict(out=WORLD), f"--out: expected a folder that does not exist .type --out OTHER, or --resume {WORLD} to go on with a run., found"),
        (dict(probe_data=Path("no")), "--probe-data: expected a file .check the path., found no"),
        (dict(task="no.jsonl"), "--task: expected files .check the path no.jsonl., found no.jsonl"),
        (dict(method="sft", beta_max=1.0), "--beta-max"),
        (dict(epochs=0), "--epochs"),
        (dict(lr=0.0), "--lr"),
        (dict(ref="live", method="sft"), "--ref: expected none without --method adaptive"),
        (dict(anchor_share=1.0), "--anchor-share: expected 0 to under 1"),
        (dict(method="lisa"), "--anchor-share: expected above 0 with --method lisa .type --anchor-share 0.5., found 0.0"),
        (dict(anchors=WORLD / "probe.jsonl"), "--anchors: expected none without")])
    def test_wrong_options_fail_at_once(self, wrong, words):
        with pytest.raises(DataError, match=words):
            evaluation_sets(complete_options(replace(QUICK, **wrong)))

    @pytest.mark.parametrize("options, words", [
        (dict(max_new_tokens=255), "eval_harmful.jsonl:1: expected a prompt that leaves 255 of 256 tokens to its response, "
         "found one that leaves 2.*: remove it from the file, or type a smaller --max-new-tokens"),
        (dict(anchors="none.jsonl"), "--anchors: expected a file .check the path., found .*none.jsonl"),
        (dict(anchors="odd.jsonl"), "odd.jsonl:1: expected harmful: true, 1, "),
        (dict(anchors="long.jsonl"), "long.jsonl:1: expected a prompt that leaves 24 of 256 tokens to its response, "
         ".*: remove it from the file$"),
        (dict(judge="http://127.0.0.1:9/v1", judge_model="m"),
         "--judge: expected valid verdicts, found 0 of 1 .*refused.*; check --judge, --judge-model and"),
        (dict(data="bad.jsonl"), "bad.jsonl:2: expected")])
    def test_what_cannot_be_used_is_named_before_a_folder_is_made(self, small, tmp_path, monkeypatch, options, words):
        monkeypatch.setattr("lib.endpoint.ATTEMPTS", 1)
        write_rows(tmp_path / "odd.jsonl", [{"prompt": "a", "harmful": "yes"}])
        write_rows(tmp_path / "long.jsonl", [{"prompt": "word " * 233}])
        write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}])
        options = {name: tmp_path / value if str(value).endswith("jsonl") else value for name, value in options.items()}
        share = 0.2 if "anchors" in options else 0.0
        with pytest.raises(DataError, match=words):
            main(replace(QUICK, **{"data": small, "anchor_share": share, "out": tmp_path / "run"} | options))
        assert not (tmp_path / "run").exists()

    def test_a_dry_run_prints_the_plan_and_keeps_nothing(self, small, tmp_path, capsys):
        main(replace(QUICK, data=small, risk=with_risk(small, tmp_path, 0.5), dry_run=True, anchor_share=0.2, out=tmp_path / "run"))
        printed = capsys.readouterr().out
        for words in ("24 examples, ", r"\(drawn 120 times\)", "75 steps of 8 examples", r"\nlengths: median \d+ tokens, longest \d+\n",
                      "to expect: about"):
            assert re.search(words, printed), words
        assert not (tmp_path / "run").exists()

    def test_your_own_model_and_data_have_their_own_defaults(self, small, tmp_path, capsys):
        shutil.copytree(WORLD / "model", tmp_path / "model")
        own = complete_options(TrainConfig(model=tmp_path / "model", data=small, risk=with_risk(small, tmp_path, 0.5)))
        assert (own.lr, own.judge, own.harmful, own.benign, own.task) == (2e-4, "none", "none", "none", "none")
        assert "by default: --lr 0.0002 --epochs 20" in capsys.readouterr().out
        embedded = complete_options(TrainConfig(sealed=True, anchor_share=0.3, given=("sealed", "anchor_share")))
        assert (embedded.beta_min, embedded.beta_max, embedded.anchor_share, embedded.sealed) == (0.02, 1.0, 0.3, True)
        assert embedded.lr == 2e-3 and embedded.harmful.endswith("eval_harmful.jsonl") and embedded.judge.endswith("judge")
        main(replace(own, out=tmp_path / "run", epochs=1, lora_r=2, eval_base=False))
        printed = " ".join(capsys.readouterr().out.split())
        assert "attack success is not measured without --harmful FILE; over-refusal is not" in printed
        with pytest.raises(DataError, match="--sealed: expected --method adaptive, found sft; leave --sealed out"):
            complete_options(TrainConfig(sealed=True, method="sft", given=("sealed", "method")))

    @pytest.mark.parametrize("sealed", [False, True])
    def test_without_options_plain_fine_tuning_is_trained_and_shown_too(self, sealed, tmp_path, capsys, monkeypatch):
        quoted = shlex.quote("It's harm?")

        def trained(config):
            out = tmp_path / config.method
            out.mkdir()
            for which in ("base", "after"):
                row = {"kind": "harmful", "set": "harmful", "decoding": "greedy", "group": "a", "prompt": "It's harm?", "thought": "",
                       "response": f"{config.method} {which}", "cut": False, "refused": which == "base"}
                (out / f"completions_{which}.jsonl").write_text(json.dumps(row) + "\n")
            results = {which: summarize(read_completions(out, which), 1.0, 8) for which in ("base", "after")}
            return replace(config, out=out), results

        monkeypatch.setattr(sys.modules["train"], "train_and_evaluate", trained)
        main(TrainConfig(sealed=sealed))
        printed = capsys.readouterr().out
        assert "| aligned model" in printed and "| plain fine-tuning" in printed and "| this run" in printed
        assert "aligned model: adaptive base\n  plain fine-tuning: sft after\n  this run: adaptive after\n" in printed
        assert f"python evaluate.py --prompt {quoted} {tmp_path / 'sft'} {tmp_path / 'adaptive'}" in printed


class TestCommandLine:
    @pytest.mark.parametrize("config", [TrainConfig, ProbeConfig, CriticConfig, EvalConfig, BuildConfig, GridConfig, BenchConfig])
    def test_help_shows_every_option_on_a_narrow_terminal_and_typos_are_refused(self, config, capsys):
        with pytest.raises(SystemExit) as ended:
            parse(config, ["--help"], "paths" if config is EvalConfig else None)
        shown = capsys.readouterr().out
        assert ended.value.code == 0 and max(map(len, shown.splitlines())) <= 100 and len(shown.splitlines()) <= 85
        for option in fields(config):
            name = "--" + option.name.replace("_", "-")
            assert option.name in ("paths", "given") or re.search(rf"{name}\b[^\n]*\s\s?\n?\s+\w", shown), name  # with a text
        with pytest.raises(SystemExit) as ended:
            parse(config, ["--no-such-option"])
        assert ended.value.code == 2 and "--no-such-option" in capsys.readouterr().err

    def test_it_becomes_the_configuration(self):
        config = parse(TrainConfig, ["--no-eval-base", "--fsdp", "--lr", "1e-3", "--data", "d", "--judge-kind", "guard"])
        assert (config.eval_base, config.fsdp, config.lr, config.data, config.judge_kind) == (False, True, 1e-3, Path("d"), "guard")
        assert parse(TrainConfig, ["--compile", "auto"]) == parse(TrainConfig, []) == TrainConfig()
        assert parse(EvalConfig, ["a", "b", "--compare"], positional="paths") == EvalConfig(
            paths=(Path("a"), Path("b")), compare=True, given=("paths", "compare"))
