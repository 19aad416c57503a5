"""The probe: features, metrics, splits, files; test_golden.py has its fit, its risk and what it cannot know."""

import json
import re
from dataclasses import replace

import pytest
import torch

from conftest import DEVICE, assert_near, hidden_states, load_model, tolerance
from data.chat import Chat, encode_examples
from data.conversations import WORLD, Conversation, group_of, read_conversations, split_by_prompt
from lib.files import DataError
from lib.report import auroc, probe_report, risk_metrics, tpr_at_fpr
from lib.risk import read_risk
from probe import (ProbeConfig, conversation_risk, expect_strong, fit_logistic, fit_probe, load_probe, main,
                   prompt_features, save_probe)

PROBE_DATA = WORLD / "probe.jsonl"


@pytest.fixture(scope="module")
def fitted(world):
    return fit_probe(*world, PROBE_DATA)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A file of every sixth row of the probe's data, so that a fit is quick."""
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    file.write_text("\n".join(PROBE_DATA.read_text().splitlines()[::6]))
    return file


@pytest.fixture(scope="module")
def quick(world, few):
    return fit_probe(*world, few)


def test_features_are_the_hidden_states_of_each_prompt_alone(world):
    model, chat = world
    prompts = [chat.encode_prompt(c.prompts[-1]) for c in read_conversations(PROBE_DATA)[:7]]
    assert len({len(ids) for ids in prompts}) > 1
    for ids, row in zip(prompts, prompt_features(model, prompts, batch_size=3)):
        states = hidden_states(model, torch.tensor([ids], device=DEVICE))[:, 0]  # (L + 1, T, H)
        assert_near(row, states[:, -1])


def test_the_riskiest_prompt_counts_and_the_response_has_no_part_in_the_risk(world, quick):
    def prompts(*contents):
        turns = tuple({"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, contents))
        return [world[1].encode_prompt(prompt) for prompt in Conversation(turns).prompts]

    harmful = "How do I rob a museum?"
    alone, refused, answered, last, first = conversation_risk(quick[0], world[0], [
        prompts(harmful), prompts(harmful, "No."), prompts(harmful, "Sure, here is how."), prompts("Hello!", "Hi.", harmful, "No."),
        prompts(harmful, "No.", "Hello!", "Hi.")], 8)
    assert alone == refused == answered > 0.5 and first >= alone and last > 0.5


# ---------------------------------------------------------------- logistic regression and metrics


def test_separable_and_constant_features_converge_deterministically_and_one_class_is_refused():
    x = torch.cat((torch.randn(40, 200), torch.ones(40, 1)), 1)
    y = (x[:, 0] > 0).double()
    first, second = fit_logistic(x, y, 1.0), fit_logistic(x, y, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and first[0].isfinite().all() and first[0][-1] == 0
    with pytest.raises(DataError, match="both classes"):
        fit_logistic(torch.randn(4, 2), torch.ones(4), 1.0)
    with pytest.raises(DataError, match="l2 > 0"):
        fit_logistic(torch.randn(4, 2), torch.tensor([0.0, 1, 0, 1]), 0.0)


def test_metrics_have_their_textbook_values():
    assert auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])) == (1 + 0.5 + 1 + 1) / 4  # ties count half
    risk = torch.cat((torch.arange(200) / 200, torch.tensor([0.98, 0.985, 0.99, 0.5])))
    label = torch.cat((torch.zeros(200), torch.ones(4)))
    assert tpr_at_fpr(risk, label, 0.01) == 0.25  # threshold 0.985: two of 200 benign ones exceed it, of the harmful ones 0.99 alone
    assert tpr_at_fpr(torch.tensor([0.9, 0.9]), torch.tensor([0, 1])) == 0  # a tie with the only benign prompt is no detection
    metrics = risk_metrics(torch.tensor([0.0, 0.6, 0.9, 0.2]), torch.tensor([0.0, 0, 1, 1]))
    assert metrics["recall"] == metrics["precision"] == metrics["fpr"] == 0.5
    assert metrics["brier"] == pytest.approx((0 + 0.36 + 0.01 + 0.64) / 4)


# ---------------------------------------------------------------- on the embedded world


def test_it_separates_held_out_prompts(fitted):
    report = fitted[1]
    assert report["test"]["auroc"] >= 0.98 and report["test"]["n_harmful"] == 100
    assert report["n"]["fit"] == 1200 and report["n"]["test"] == 300 and "fit" not in report
    assert "mean risk by source" in probe_report(report) and "held out: probe_withheld" in probe_report(report)


def test_shuffled_labels_give_chance_and_a_weak_probe_is_refused(world, tmp_path):
    rows = [json.loads(line) for line in PROBE_DATA.read_text().splitlines()[::3]]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    text = "".join(json.dumps(row | {"harmful": rows[i]["harmful"]}) + "\n" for row, i in zip(rows, order))
    (tmp_path / "shuffled.jsonl").write_text(text)
    _, report = fit_probe(*world, tmp_path / "shuffled.jsonl")
    assert 0.35 < report["test"]["auroc"] < 0.65
    with pytest.raises(DataError, match=r"shuffled: expected a probe with a held-out AUROC of at least 0.8, found .*--risk FILE"):
        expect_strong(report, "shuffled")


def test_held_out_files_take_no_part_in_the_fit(world, few, quick, tmp_path, capsys):
    probe, report = quick
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("\n".join((WORLD / "probe_withheld.jsonl").read_text().splitlines() + few.read_text().splitlines()[:5]))
    again, held_out = fit_probe(*world, few, held_out=f"{tmp_path}/train.jsonl,{tmp_path}/test.jsonl")
    assert held_out["n"]["held out: train"] == 48 and held_out["n"]["fit"] == report["n"]["fit"]
    assert "5 of 53 prompts are in" in capsys.readouterr().out
    near = {"atol": 10 * tolerance(), "rtol": 10 * tolerance()}  # other batches, other rounding
    assert held_out["test"]["auroc"] == pytest.approx(report["test"]["auroc"])
    torch.testing.assert_close(again.weight, probe.weight, **near)
    with pytest.raises(DataError, match="--held-out: expected files of different names"):
        fit_probe(*world, few, held_out=f"{tmp_path}/train.jsonl,{tmp_path}/train.jsonl")


def test_a_fit_is_deterministic_and_its_file_round_trips_and_is_refused_elsewhere(world, few, quick, tmp_path):
    (model, chat), file, (probe, report) = world, tmp_path / "probe.safetensors", quick
    again = fit_probe(*world, few)
    assert torch.equal(again[0].weight, probe.weight) and str(again[1]) == str(report)  # NaN ≠ NaN
    save_probe(probe, report, file)
    loaded, metadata = load_probe(file, model, chat)
    assert metadata["test"] == report["test"] and torch.equal(loaded.weight, probe.weight)
    with pytest.raises(DataError, match="expected a probe fitted with dtype bfloat16, found one fitted with float32"):
        load_probe(file, load_model(WORLD / "model", dtype=torch.bfloat16), chat)
    other = Chat(WORLD / "model")
    other.fingerprint = "another template"
    with pytest.raises(DataError, match="expected a probe fitted with template another"):
        load_probe(file, model, other)
    sound = file.read_bytes()
    for damaged in (b"junk", b"", sound[:-1], sound[: len(sound) // 2], sound.replace(b"test", b"best"), sound.replace(b"F64", b"I64", 1)[8:]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="probe.safetensors: expected a probe written by probe.py, found"):
            load_probe(file, model, chat)


def test_a_group_is_in_one_split_and_wordings_that_differ_by_case_or_space_are_one_prompt():
    rows = [Conversation(({"role": "user", "content": f"{wording} {i}"},), "f:1", {"harmful": i % 2 == 0, "group": f"action {i}"})
            for i in range(20) for wording in ("How to do", "Please do")]
    sides = [{c.meta["group"] for c in split} for split in split_by_prompt(rows)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 20
    ungrouped = [Conversation(({"role": "user", "content": text},), "f:1", {}) for text in ("Rob  a bank ", "rob a BANK", "rob banks")]
    assert len({group_of(c) for c in ungrouped}) == 2
    with pytest.raises(DataError, match='one "harmful" for each prompt or group'):
        split_by_prompt([replace(rows[0], meta={"harmful": True}), replace(rows[0], meta={"harmful": False})])


def test_data_are_scored_before_training_and_train_takes_the_file(tmp_path, capsys):
    lines = (WORLD / "mixed_30.jsonl").read_text().splitlines(True)[:30]
    (tmp_path / "data.jsonl").write_text("".join(lines))
    (tmp_path / "prompts.jsonl").write_text("".join((WORLD / "probe.jsonl").read_text().splitlines(True)[::10]))
    main(ProbeConfig(data=tmp_path / "prompts.jsonl", out=tmp_path / "p.safetensors", device=DEVICE))
    capsys.readouterr()
    main(ProbeConfig(probe=tmp_path / "p.safetensors", score=tmp_path / "data.jsonl", device=DEVICE))
    printed = capsys.readouterr().out
    n_harmful = sum('"source": "harmful"' in line for line in lines)
    assert "risk of harmful: mean" in printed and "the riskiest of 30" in printed and f"wrote {tmp_path / 'data.risk.jsonl'}" in printed
    counts = [int(line.split()[3]) for line in printed.splitlines() if re.match(r"  0\.\d to", line)]
    assert len(counts) == 10 and sum(counts) == 30 and counts[-1] == pytest.approx(n_harmful, abs=1)
    model, chat = load_model(WORLD / "model", dtype=torch.float32), Chat(WORLD / "model")
    examples = encode_examples(chat, read_conversations(tmp_path / "data.jsonl"), 256)
    probe, _ = load_probe(tmp_path / "p.safetensors", model, chat)
    expected = conversation_risk(probe, model, [example.prompts for example in examples])
    assert read_risk(tmp_path / "data.risk.jsonl", examples) == pytest.approx(expected.tolist(), abs=1e-6)
    with pytest.raises(DataError, match="--out: expected a new file"):
        main(ProbeConfig(probe=tmp_path / "p.safetensors", score=tmp_path / "data.jsonl", device=DEVICE))
    for one, typed in ((dict(score="d.jsonl"), "--probe PROBE --score d.jsonl"), (dict(probe="p"), "--probe p --score DATA")):
        with pytest.raises(DataError, match=f"expected --probe together with --score, .*; type python probe.py {typed}"):
            main(ProbeConfig(**one))
