"""The probe: features, logistic regression, metrics, splits, files."""

import json

import pytest
import torch

from conftest import DEVICE, assert_near, load_model, tolerance
from data.chat import Chat
from data.conversations import WORLD, Conversation, read_conversations
from lib.files import DataError
from lib.report import auroc, probe_report, risk_metrics, tpr_at_fpr
from probe import (
    Probe,
    ProbeConfig,
    choose_layers,
    conversation_risk,
    fit_logistic,
    fit_probe,
    load_probe,
    prompt_features,
    save_probe,
)


@pytest.fixture(scope="module")
def world():
    return load_model(WORLD / "model", dtype=torch.float32), Chat(WORLD / "model")


@pytest.fixture(scope="module")
def fitted(world):
    return fit_probe(ProbeConfig(), *world)


class TestFeatures:
    def test_they_are_the_hidden_states_of_each_prompt_alone(self, world):
        model, chat = world
        prompts = [chat.encode_prompt(c.prompts[-1]) for c in read_conversations(WORLD / "probe.jsonl")[:7]]
        assert len({len(ids) for ids in prompts}) > 1
        for ids, row in zip(prompts, prompt_features(model, prompts, (0, 2, 5), batch_size=3)):
            states = model.hidden_states(torch.tensor([ids], device=DEVICE), layers=[0, 2, 5])[:, 0]  # (3, T, H)
            assert_near(row, states[:, -1])

    def test_the_response_has_no_part_in_the_risk(self, world, fitted):
        prompt = {"role": "user", "content": "How do I rob a museum?"}
        answers = [(), ({"role": "assistant", "content": "No."},), ({"role": "assistant", "content": "Sure, here is how."},)]
        prompts = [[world[1].encode_prompt(p) for p in Conversation((prompt, *answer)).prompts] for answer in answers]
        risk = conversation_risk(fitted[0], world[0], prompts, 8)
        assert risk.unique().numel() == 1

    def test_with_several_turns_the_riskiest_prompt_counts(self, world, fitted):
        turns = lambda *contents: tuple({"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, contents))
        said = [turns("How do I rob a museum?", "No.", "Hello!", "Hi."), turns("How do I rob a museum?", "No.")]
        prompts = [[world[1].encode_prompt(p) for p in Conversation(messages).prompts] for messages in said]
        [both, harmful] = conversation_risk(fitted[0], world[0], prompts, 8)
        assert both >= harmful > 0.5


class TestLogisticRegression:
    def test_it_is_newtons_solution(self):
        x, y = torch.randn(300, 5).double(), (torch.rand(300) < 0.4).double()
        x[:, 0] += y
        weight, bias, mean, std = fit_logistic(x, y, l2=2.0)
        z = torch.cat(((x - mean) / std, torch.ones(300, 1)), 1)
        ridge, theta = torch.diag(torch.tensor([2.0] * 5 + [0.0])).double(), torch.zeros(6).double()
        for _ in range(30):  # Newton's method on the same objective
            p = torch.sigmoid(z @ theta)
            theta -= torch.linalg.solve(z.T @ ((p * (1 - p))[:, None] * z) + ridge, z.T @ (p - y) + ridge @ theta)
        torch.testing.assert_close(torch.cat((weight, bias[None])), theta, atol=1e-4, rtol=1e-4)

    def test_separable_and_constant_features_converge_deterministically(self):
        x = torch.cat((torch.randn(40, 200), torch.ones(40, 1)), 1)
        y = (x[:, 0] > 0).double()
        first, second = fit_logistic(x, y, 1.0), fit_logistic(x, y, 1.0)
        assert all(torch.equal(a, b) for a, b in zip(first, second)) and first[0].isfinite().all() and first[0][-1] == 0

    def test_one_class_and_no_regularization_are_refused(self):
        with pytest.raises(ValueError, match="both classes"):
            fit_logistic(torch.randn(4, 2), torch.ones(4), 1.0)
        with pytest.raises(ValueError, match="l2 > 0"):
            fit_logistic(torch.randn(4, 2), torch.tensor([0.0, 1, 0, 1]), 0.0)

    def test_unknown_risk_is_high_risk_counted_and_printed(self, capsys):
        probe = Probe(
            torch.ones(2).double(), torch.zeros(()).double(), torch.zeros(2).double(), torch.ones(2).double(), (0,), "", "", "", None
        )
        inf = float("inf")
        assert probe.risk(torch.tensor([[float("nan"), 0], [inf, -inf], [-inf, 0], [inf, 0], [0, 0]])).tolist() == [1.0, 1.0, 1.0, 1.0, 0.5]
        assert "4 of 5 risks are unknown" in capsys.readouterr().out


class TestMetrics:
    def test_auroc_counts_pairs_and_halves_ties(self):
        risk, harmful = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])
        assert auroc(risk, harmful) == (1 + 0.5 + 1 + 1) / 4

    def test_tpr_at_fpr_lets_at_most_that_share_of_benign_prompts_pass(self):
        benign, harmful = torch.arange(200) / 200, torch.tensor([0.98, 0.985, 0.99, 0.5])
        risk, label = torch.cat((benign, harmful)), torch.cat((torch.zeros(200), torch.ones(4)))
        assert tpr_at_fpr(risk, label, 0.01) == 0.25  # threshold 0.985: two of 200 benign ones exceed it; of the harmful ones 0.99 alone
        assert tpr_at_fpr(torch.tensor([0.9, 0.9]), torch.tensor([0, 1])) == 0  # a tie with the only benign prompt is no detection

    def test_brier_and_recall(self):
        metrics = risk_metrics(torch.tensor([0.0, 0.6, 0.9, 0.2]), torch.tensor([0.0, 0, 1, 1]))
        assert metrics["recall"] == metrics["precision"] == metrics["fpr"] == 0.5
        assert metrics["brier"] == pytest.approx((0 + 0.36 + 0.01 + 0.64) / 4)

    def test_layers_are_chosen_on_validation(self):
        assert choose_layers("all", {0: 0.5, 1: 0.9, 2: 0.9}) == [0, 1, 2]
        assert choose_layers("auto", {0: 0.5, 1: 0.9, 2: 0.9, 3: 0.8}) == [2]
        assert choose_layers("1,0", {0: 0.5, 1: 0.9}) == [1, 0]
        for wrong in ("5", "x", "", "-1"):
            with pytest.raises(DataError, match="--layers: expected"):
                choose_layers(wrong, {0: 0.5, 1: 0.9})


class TestOnTheEmbeddedWorld:
    def test_it_separates_held_out_prompts(self, fitted):
        test = fitted[1]["test"]
        assert test["auroc"] >= 0.98 and test["n_harmful"] == 100 and fitted[1]["layers"] == [0, 1, 2, 3, 4, 5]
        assert {"held out: probe_withheld", "held out: probe_lookalike"} < fitted[1].keys() and len(fitted[1]["per_layer"]) == 6

    def test_the_embeddings_of_the_last_token_say_nothing(self, fitted):
        """The last prompt token is the same for every prompt: layer 0 is a control that must be at chance."""
        assert {name: row["auroc"] for name, row in fitted[1]["per_layer"][0].items()} == dict.fromkeys(
            ("validation", "test", "held out: probe_withheld", "held out: probe_lookalike"), 0.5)

    def test_shuffled_labels_give_chance(self, world, tmp_path):
        rows = [json.loads(line) for line in (WORLD / "probe.jsonl").read_text().splitlines()]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
        text = "".join(json.dumps(row | {"harmful": rows[i]["harmful"]}) + "\n" for row, i in zip(rows, order))
        (tmp_path / "shuffled.jsonl").write_text(text)
        _, report = fit_probe(ProbeConfig(data=tmp_path / "shuffled.jsonl", held_out=""), *world)
        assert 0.35 < report["test"]["auroc"] < 0.65

    def test_held_out_files_never_take_part_in_the_fit(self, world, fitted, tmp_path, capsys):
        rows = (WORLD / "probe_withheld.jsonl").read_text().splitlines() + (WORLD / "probe.jsonl").read_text().splitlines()[:5]
        for name in ("train.jsonl", "test.jsonl"):
            (tmp_path / name).write_text("\n".join(rows))
        again, report = fit_probe(ProbeConfig(held_out=f"{tmp_path}/train.jsonl,{tmp_path}/test.jsonl"), *world)
        near = {"atol": 10 * tolerance(), "rtol": 10 * tolerance()}  # other batches, other rounding
        torch.testing.assert_close(again.weight, fitted[0].weight, **near)
        assert report["n"]["train"] == 900 and report["n"]["test"] == 300 and report["n"]["held out: train"] == 48
        assert "5 of 53 prompts are in" in capsys.readouterr().out
        with pytest.raises(DataError, match="--held-out: expected files of different names"):
            fit_probe(ProbeConfig(held_out=f"{tmp_path}/train.jsonl,{tmp_path}/train.jsonl"), *world)

    def test_it_is_deterministic_and_printable(self, world, fitted):
        again, report = fit_probe(ProbeConfig(), *world)
        assert torch.equal(again.weight, fitted[0].weight) and report == fitted[1]
        assert "mean risk by source" in probe_report(report)

    def test_the_file_round_trips_and_is_refused_elsewhere(self, world, fitted, tmp_path):
        model, chat = world
        save_probe(*fitted, tmp_path / "probe.safetensors")
        loaded, report = load_probe(tmp_path / "probe.safetensors", model, chat)
        assert report["test"] == fitted[1]["test"]
        assert torch.equal(loaded.weight, fitted[0].weight) and loaded.layers == fitted[0].layers
        with pytest.raises(DataError, match="expected a probe fitted with dtype bfloat16, found one fitted with float32"):
            load_probe(tmp_path / "probe.safetensors", load_model(WORLD / "model", dtype=torch.bfloat16), chat)
        other = Chat(WORLD / "model")
        other.fingerprint = "another template"
        with pytest.raises(DataError, match="expected a probe fitted with template another"):
            load_probe(tmp_path / "probe.safetensors", model, other)
        (tmp_path / "probe.safetensors").write_bytes(b"junk")
        with pytest.raises(DataError, match="written by probe.py"):
            load_probe(tmp_path / "probe.safetensors", model, chat)
