"""Anchors, and the baselines; test_golden.py has C-SFT's weight, loss and gradients, and Lisa's pull."""

import math
from dataclasses import replace

import pytest
import torch

import lib.baselines
import train
from conftest import DEVICE, assert_near, head, load_model, policy, read_rows, tolerance, write_rows
from data.chat import IGNORE, encode_examples
from data.conversations import WORLD, conversation_of, normalized, read_conversations
from data.order import step_examples
from evaluate import refuses
from lib.baselines import LISA_CYCLE, SBR, SBR_LAMBDA, SBR_PROMPTS, Baseline, ConstrainedSFT, Filter, Lisa, SafeGrad, project
from lib.files import DataError
from lib.fused import label_logp
from lib.reference import live_reference
from lib.run import State
from model import generate
from train import TrainConfig, anchor_prompts, anchor_records, main, micro_batch_loss

QUICK = TrainConfig(harmful=str(WORLD / "eval_harmful.jsonl"), benign="none", task="none", limit=2, samples=0, compile="off", lr=2e-3,
                    judge="none", device=DEVICE, epochs=1, eval_base=False, lora_r=4, batch_size=4)


@pytest.fixture(scope="module", name="examples")
def twelve_examples(examples):
    return examples[:12]


def make_anchors(model, chat, examples, max_length=256, **options):
    """Return anchors, encoded as train_and_evaluate does."""
    config = replace(QUICK, **({"anchor_share": 0.4} | options))
    with model.adapters_off():
        records = anchor_records(config, model, chat, anchor_prompts(config, examples, set()))
    encoded = encode_examples(chat, [conversation_of(record, "anchors", "answer") for record in records], max_length)
    return [replace(anchor, index=len(examples) + anchor.index, anchor=True) for anchor in encoded]


@pytest.fixture(scope="module")
def anchors(model, chat, examples):
    return make_anchors(model, chat, examples)


class TestFilter:
    def test_it_drops_examples_whose_risk_is_above_one_half(self, examples, capsys):
        risk = torch.tensor([0.0, 0.5, 0.501, 1.0] * 3)
        assert [e.index for e in Filter(0.0, 8, 100).select_examples(examples, risk)] == [0, 1, 4, 5, 8, 9]
        assert Filter(0.0, 8, 100).select_examples(examples, torch.ones(12)) == []
        assert "12 of 12 examples dropped, the model stays as it was" in capsys.readouterr().out
        assert Baseline(0.0, 8, 100).select_examples(examples, risk) is examples


class TestConstrainedSFT:
    def test_the_references_label_probabilities_are_those_of_each_example_alone(self, model, examples):
        logp = label_logp(model, examples[:7], batch_size=3)
        for example in examples[:7]:
            with torch.no_grad(), model.adapters_off():
                expected = model(torch.tensor([example.input_ids], device=DEVICE))[0].log_softmax(-1)
            expected = [expected[t - 1, label] for t, label in enumerate(example.labels) if label != IGNORE]
            assert_near(logp[example.index], torch.stack(expected))

    def test_it_is_sft_while_the_policy_is_the_reference(self, examples):
        model, ones, method, gradients = policy(adapter=0.0), torch.ones(6), ConstrainedSFT(0.0, 8, 100), []
        method.prepare(model, examples, 6)
        for token_weights in (None, method.token_weights):
            model.zero_grad()
            micro_batch_loss(model, None, examples[:6], ones, 0 * ones, 9, token_weights)[0].backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < tolerance()

    def test_it_runs_the_reference_once_before_the_loop(self, examples, tmp_path, monkeypatch):
        calls = []
        monkeypatch.setattr(lib.baselines, "label_logp", lambda *options: calls.append(1) or label_logp(*options))
        config = replace(QUICK, method="csft", batch_size=12, epochs=6)
        train.train(config, policy(adapter=0.0), None, config.baseline(6), examples, torch.zeros(12), tmp_path)  # None: no other reference is called
        rows = read_rows(tmp_path / "metrics.jsonl")
        assert len(calls) == 1 and len(rows) == 6
        assert (rows[0]["beta"], rows[0]["kl"], rows[0]["risk"]) == (0, None, None) and rows[-1]["nll"] < rows[0]["nll"]


class TestLisa:
    def test_each_cycle_begins_with_whole_steps_of_anchors(self, examples, anchors):
        before = Lisa(0.1, 8, 100).anchors_before
        steps = [step_examples(step, examples, anchors, before, 8, seed=0) for step in range(2 * LISA_CYCLE)]
        assert [sum(example.anchor for example in step) for step in steps] == ([8] * 5 + [0] * 45) * 2

    @pytest.mark.parametrize("n_steps, share, cycle", [(6, 0.5, 6), (25, 0.5, 25), (60, 0.1, 30), (101, 0.1, 34), (1667, 0.1, 50)])
    def test_short_runs_have_their_share_of_anchors(self, n_steps, share, cycle):
        method = Lisa(share, 8, n_steps)
        assert method.cycle == cycle and abs(method.anchors_before(n_steps) / (8 * n_steps) - share) <= 0.1
        assert 0 < method.anchors_before(n_steps) < 8 * n_steps

    @pytest.mark.parametrize("n_steps, share", [(1, 0.5), (4, 0.1), (4, 0.9)])
    def test_a_run_too_short_for_both_is_refused(self, n_steps, share):
        with pytest.raises(DataError, match="--anchor-share: expected a share .* or train for more steps: --epochs"):
            Lisa(share, 8, n_steps)

    def test_the_pull_is_to_the_parameters_at_the_first_step_of_a_phase(self):
        """Cycles of 50 steps, the first 5 on anchors. θ is the step's number, so the pull (ρ = 1) is the steps since."""
        theta, state, pulls = torch.nn.Parameter(torch.zeros(3)), State(), []
        for step in range(60):
            theta.data.fill_(step)
            theta.grad = torch.zeros(3)
            Lisa(0.1, 8, 100).adjust_gradients([theta], step, state)
            pulls.append(theta.grad[0].item())
        assert pulls == [*range(5), *range(45), *range(5), *range(5)]


class TestSafeGrad:
    def test_only_a_gradient_in_conflict_is_made_orthogonal(self):
        g, h = [torch.tensor([3.0, -1.0]), torch.tensor([[2.0]])], [torch.tensor([-1.0, 0.0]), torch.tensor([[0.5]])]
        projected = project(g, h)  # <g, h> = -3 + 1 = -2, |h|² = 1.25
        assert_near(projected[0], torch.tensor([3.0 - 1.6, -1.0]))
        assert_near(projected[1], torch.tensor([[2.0 + 0.8]]))
        assert abs(sum((a * b).sum().item() for a, b in zip(projected, h))) < 1e-6
        aligned = [-x for x in h]
        assert all(torch.equal(a, b) for a, b in zip(project(g, aligned), g))
        assert all(torch.equal(a, b) for a, b in zip(project(g, [0 * x for x in h]), g))  # at the first step KL has no gradient

    def test_a_step_adds_the_gradient_of_kl_on_its_own_batch_of_anchors(self, model, chat, examples, anchors):
        """The oracle is the definition of the loss, with autograd."""
        moved = policy(adapter=0.3)
        parameters = [parameter for parameter in moved.parameters() if parameter.requires_grad]
        method = SafeGrad(0.1, 2, 10)
        method.prepare(moved, examples + anchors, 2)
        step, batch = 1, [anchors[2 % len(anchors)], anchors[3 % len(anchors)]]
        _, _, kl = micro_batch_loss(moved, live_reference(moved), batch, torch.zeros(2), torch.ones(2), 1)
        assert (kl > 0).all()
        n_tokens = sum(example.n_labels for example in batch)
        loss = micro_batch_loss(moved, live_reference(moved), batch, torch.zeros(2), torch.ones(2), n_tokens)[0]
        of_anchors = torch.autograd.grad(loss, parameters)
        of_data = [-gradient + torch.ones_like(gradient) * 0.01 for gradient in of_anchors]  # in conflict
        for parameter, gradient in zip(parameters, of_data):
            parameter.grad = gradient.clone()
        method.adjust_gradients(parameters, step, State())
        for parameter, expected, gradient in zip(parameters, project(of_data, of_anchors), of_anchors):
            assert_near(parameter.grad, expected + gradient)

    def test_it_needs_anchors_and_adapters(self):
        for wrong, words in ((dict(), "--anchor-share: expected above 0"), (dict(anchor_share=0.1, lora_r=0), "--method: expected no safegrad")):
            with pytest.raises(DataError, match=words):
                train.complete_options(replace(QUICK, method="safegrad", **wrong))


class TestSBR:
    def test_a_step_adds_the_gradient_of_the_distance_from_the_references_state_at_the_last_prompt_token(self, anchors):
        """The oracle is a forward pass of each prompt alone, and autograd."""
        moved = policy(adapter=0.3)
        parameters = [parameter for parameter in moved.parameters() if parameter.requires_grad]
        benign = [replace(a, conversation=replace(a.conversation, meta={"harmful": False})) for a in anchors[:1]]
        method = SBR(0.1, 4, 10)
        method.prepare(moved, benign + anchors, 4)

        def last_states():
            return torch.cat([moved.model(torch.tensor([a.prompts[-1]]), None)[0][:, -1] for a in anchors[:SBR_PROMPTS]])

        with torch.no_grad(), moved.adapters_off():
            reference = last_states()
        distance = (last_states() - reference).square().mean()
        assert distance > 1e-3
        expected = torch.autograd.grad(SBR_LAMBDA * distance, parameters)
        for parameter, gradient in zip(parameters, expected):
            parameter.grad = gradient.clone()
        method.adjust_gradients(parameters, 0, State())
        for parameter, gradient in zip(parameters, expected):
            assert_near(parameter.grad / SBR_LAMBDA, 2 * gradient / SBR_LAMBDA)
        with pytest.raises(DataError, match="expected a harmful prompt among the anchors"):
            method.prepare(moved, benign, 4)


@pytest.mark.parametrize("method", ["safegrad", "sbr"])
def test_a_run_with_gradients_of_anchors_trains_and_draws_none_of_them(method, tmp_path):
    data = head("mixed_10.jsonl", 24, tmp_path / "data.jsonl")
    main(replace(QUICK, method=method, anchor_share=0.2, epochs=3, data=data, out=tmp_path / "run"))
    nll = [row["nll"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(nll) == 3 * 24 / 4 and sum(nll[-6:]) < 0.7 * sum(nll[:6])


class TestAnchors:
    @pytest.mark.parametrize("share", (0.0, 0.01, 0.03, 0.1, 0.5))
    def test_they_are_their_share_of_any_stretch_of_steps_to_within_one(self, share):
        before = [Baseline(share, 8, 300).anchors_before(step) for step in range(301)]
        for start, end in ((0, 300), (7, 100), (150, 151)):
            assert abs(before[end] - before[start] - share * 8 * (end - start)) <= 1
        counts = [b - a for a, b in zip(before, before[1:])]
        assert max(counts) - min(counts) <= 1

    @pytest.mark.parametrize("options, weights", [({}, (0.0, 1.0)), ({"gate": "batch", "ema": 0.5}, (0.0, 1.0)),
                                                  ({"method": "sft"}, (1.0, 0.0)), ({"method": "csft"}, (1.0, 0.0))])
    def test_an_anchor_is_a_pure_pull_whatever_the_gate_and_for_sft_a_plain_example(self, tmp_path, monkeypatch, examples, anchors,
                                                                                   options, weights):
        config, model, steps = replace(QUICK, anchor_share=0.25, **options), policy(adapter=0.0), []

        def spy(model, reference, examples, alpha, beta, *rest):
            steps.append([(e.anchor, round(a, 4), round(b, 4)) for e, a, b in zip(examples, alpha.tolist(), beta.tolist())])
            return micro_batch_loss(model, reference, examples, alpha, beta, *rest)

        monkeypatch.setattr(train, "micro_batch_loss", spy)
        risk = torch.cat((torch.linspace(0, 1, 12), torch.ones(len(anchors))))
        train.train(config, model, live_reference(model), Baseline(0.25, 4, 4), examples + anchors, risk, tmp_path)
        assert [sum(anchor for anchor, _, _ in step) for step in steps] == [1] * math.ceil(12 / 0.75 / 4)
        assert {tuple(rest) for step in steps for anchor, *rest in step if anchor} == {weights}
        if "gate" in options:  # smoothed over the data alone
            assert all(len({beta for anchor, _, beta in step if not anchor}) == 1 for step in steps)
            assert max(beta for step in steps for anchor, _, beta in step if not anchor) < 0.9

    def test_they_are_the_references_own_refusals_of_prompts_that_the_data_lack(self, chat, examples, anchors):
        known = {str(e.conversation.prompts[-1]) for e in examples}
        harmful = {str(c.prompts[-1]) for c in read_conversations(QUICK.probe_data) if c.meta["harmful"]}
        assert [a.index for a in anchors] == list(range(12, 12 + len(anchors))) and len(anchors) > 5
        reference = load_model(WORLD / "model", dtype=torch.float32)
        for anchor in anchors[:4]:
            prompt, answer = anchor.training_text.prompts[-1], anchor.training_text.answer
            assert str(prompt) in harmful - known and refuses(answer) and anchor.anchor
            assert chat.decode(generate(reference, [anchor.prompts[-1]], 48)[0]) == answer

    def test_none_is_left_where_the_data_hold_them_all_or_the_model_refuses_none(self, tmp_path, model, chat, examples):
        rows = [{"messages": list(e.conversation.messages[:-1])} for e in examples[:3]]  # without a label: harmful
        same = write_rows(tmp_path / "same.jsonl", rows)
        kind = write_rows(tmp_path / "kind.jsonl", [{"prompt": "How do I book a city tour?"}])
        for file in (same, kind):
            with pytest.raises(DataError, match=f"{file.name}: expected prompts that"):
                make_anchors(model, chat, examples, anchors=file)

    def test_no_prompt_of_the_evaluation_is_an_anchor(self, tmp_path, model, chat, examples):
        rows = read_rows(WORLD / "probe.jsonl")
        file = write_rows(tmp_path / "both.jsonl", [row for row in rows if row["harmful"]][:3])
        first, *others = read_conversations(file)
        evaluated = {normalized(c.prompts[-1]) for c in others}
        assert anchor_prompts(replace(QUICK, anchor_share=0.4, anchors=file), examples, evaluated) == [first]

    def test_a_file_of_anchors_may_hold_benign_prompts_and_they_are_answered(self, tmp_path, model, chat, examples, capsys):
        rows = read_rows(WORLD / "probe.jsonl")
        right = [next(row for row in rows if row["harmful"] == harmful) for harmful in (True, False)]
        wrong = [row | {"harmful": not row["harmful"]} for row in right]  # harmful and not refused, benign and refused
        anchors = make_anchors(model, chat, examples, anchors=write_rows(tmp_path / "both.jsonl", right + wrong))
        assert sorted(refuses(anchor.training_text.answer) for anchor in anchors) == [False, True]
        assert "2 anchors: 1 harmful and refused, 1 benign and answered, of 4 prompts" in capsys.readouterr().out
        with pytest.raises(DataError, match="odd.jsonl:1: expected harmful: .*, found 'yes'"):
            make_anchors(model, chat, examples, anchors=write_rows(tmp_path / "odd.jsonl", [right[0] | {"harmful": "yes"}]))

    def test_an_answer_that_was_cut_has_no_end_to_be_learned(self, monkeypatch, model, chat, examples, anchors):
        def last_labels(anchors):
            return {chat.tokenizer.id_to_token([label for label in a.labels if label != IGNORE][-1]) for a in anchors}

        monkeypatch.setattr(train, "ANCHOR_TOKENS", 3)
        monkeypatch.setattr(train, "refuses", lambda response: True)
        end, words = last_labels(anchors), last_labels(make_anchors(model, chat, examples))
        assert len(end) == 1 and not end & words

    def test_one_of_which_a_cut_leaves_no_response_is_none(self, model, chat, examples, anchors):
        max_length = sorted(len(anchor.prompts[-1]) for anchor in anchors)[len(anchors) // 2] + 1
        shorter = make_anchors(model, chat, examples, max_length)
        assert 0 < len(shorter) < len(anchors) and all(anchor.n_labels for anchor in shorter)
        assert [anchor.index for anchor in shorter] == list(range(12, 12 + len(shorter)))

    def test_anchors_may_come_in_any_form_of_record(self, tmp_path, model, chat, examples):
        harmful = [row["messages"] for row in read_rows(WORLD / "probe.jsonl") if row["harmful"]]
        prompts = [turns[0]["content"] for turns in harmful if len(turns) == 1][:4]
        rows = [{"instruction": prompt, "input": "", "output": "ignored"} for prompt in prompts[:2]]
        rows += [{"goal": prompt, "target": "Sure"} for prompt in prompts[2:]]
        anchors = make_anchors(model, chat, examples, anchors=write_rows(tmp_path / "forms.jsonl", rows), anchor_share=0.5)
        assert sorted(a.training_text.prompts[-1][-1]["content"] for a in anchors) == sorted(prompts)

    def test_a_run_stores_its_anchors_and_its_reference_holds_them(self, tmp_path, capsys):
        data = head("benign.jsonl", 24, tmp_path / "data.jsonl")
        risk = write_rows(tmp_path / "risk.jsonl", [{"risk": 0.1, "hash": c.hash} for c in read_conversations(data)])
        main(replace(QUICK, anchor_share=0.1, beta_min=0.02, beta_max=1.0, epochs=2, data=data, risk=str(risk), out=tmp_path / "run"))
        anchors, rows, risks = (read_rows(tmp_path / "run" / f"{name}.jsonl") for name in ("anchors", "metrics", "risk"))
        printed = capsys.readouterr().out
        assert f"{len(anchors)} anchors: {len(anchors)} harmful and refused, 0 benign" in printed and "all are harmful" in printed
        assert anchors and all(refuses(row["messages"][-1]["content"]) for row in anchors)
        assert len(rows) == math.ceil(2 * 24 / 0.9 / 4) and rows[0]["kl"] == pytest.approx(0, abs=1e-4)
        assert len(risks) == 24  # of the data alone
