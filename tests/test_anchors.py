"""Anchors: prompts with the aligned model's own answers, added to the data."""

import json
import math
from dataclasses import replace

import pytest
import torch

import train
from conftest import DEVICE, load_model, policy
from data.chat import IGNORE, Chat, encode_examples
from data.conversations import WORLD, read_conversations
from evaluate import refuses
from lib.baselines import Baseline
from lib.files import DataError
from lib.reference import live_reference
from model import generate
from train import ANCHOR_TOKENS, TrainConfig, anchor_examples, anchor_records, main, micro_batch_loss

QUICK = TrainConfig(harmful=str(WORLD / "eval_harmful.jsonl"), benign="none", task="none", limit=4, samples=0, compile="off",
                    judge="none", device=DEVICE, epochs=1, eval_base=False, lora_r=4)


@pytest.fixture(scope="module")
def model():
    return policy()


@pytest.fixture(scope="module")
def chat():
    return Chat(WORLD / "model")


@pytest.fixture(scope="module")
def examples(chat):
    return encode_examples(chat, read_conversations(WORLD / "mixed_10.jsonl")[:40], 256)


@pytest.mark.parametrize("share", (0.0, 0.01, 0.03, 0.1, 0.5))
def test_anchors_are_their_share_of_any_stretch_of_steps_to_within_one(share):
    before = Baseline(share, per_step=8).anchors_before
    for start, end in ((0, 300), (7, 100), (150, 151)):
        assert abs(before(end) - before(start) - share * 8 * (end - start)) <= 1


def anchors_of(config, model, chat, examples, longest):
    return anchor_examples(anchor_records(config, model, chat, examples), chat, len(examples), longest)


def run(tmp_path, monkeypatch, chat, examples, **options):
    """The (anchor?, α, β) of every example that a run's steps were given, in the order of the steps."""
    config, model = replace(QUICK, batch_size=4, **options), policy(adapter=0.0)
    with model.adapters_off():
        anchors = anchors_of(config, model, chat, examples, 256)
    seen = []

    def spy(model, reference, examples, alpha, beta, *rest):
        seen.append([(e.anchor, round(a, 4), round(b, 4)) for e, a, b in zip(examples, alpha.tolist(), beta.tolist())])
        return micro_batch_loss(model, reference, examples, alpha, beta, *rest)

    monkeypatch.setattr(train, "micro_batch_loss", spy)
    risk = torch.cat((torch.linspace(0, 1, len(examples)), torch.ones(len(anchors))))
    folder = tmp_path / f"{config.method} {config.gate}"
    folder.mkdir()
    train.train(config, model, live_reference(model), examples + anchors, risk, folder)
    return seen, anchors, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_anchor_is_a_pure_pull_whatever_the_gate_and_for_sft_a_plain_example(tmp_path, monkeypatch, chat, examples):
    for options, weights in (({}, (0.0, 1.0)), ({"method": "sft"}, (1.0, 0.0)),
                             ({"gate": "batch", "ema": 0.5}, (0.0, 1.0))):
        seen, anchors, rows = run(tmp_path, monkeypatch, chat, examples, anchor_share=0.25, **options)
        flat = [item for step in seen for item in step]
        assert len(seen) == math.ceil(40 / 0.75 / 4) and [sum(a for a, _, _ in step) for step in seen] == [1] * len(seen)
        assert {item[1:] for item in flat if item[0]} == {weights}
        assert len(rows) == len(seen) and all(row["loss"] is not None for row in rows)


def test_the_batch_gate_smooths_the_risk_of_the_data_alone(tmp_path, monkeypatch, chat, examples):
    seen, _, _ = run(tmp_path, monkeypatch, chat, examples, anchor_share=0.25, gate="batch")
    for step in seen:
        assert len({beta for anchor, _, beta in step if not anchor}) == 1 and max(b for a, _, b in step if not a) < 0.9


def test_anchors_are_the_references_own_refusals_of_prompts_that_the_data_lack(model, chat, examples):
    config = replace(QUICK, anchor_share=0.1)
    with model.adapters_off():
        anchors = anchors_of(config, model, chat, examples, 256)
    known = {str(c.prompts[-1]) for c in read_conversations(config.data)}
    harmful = {str(c.prompts[-1]) for c in read_conversations(config.probe_data) if c.meta["harmful"]}
    assert [a.index for a in anchors] == list(range(len(examples), len(examples) + len(anchors)))
    reference = load_model(WORLD / "model", dtype=torch.float32)
    for anchor in anchors[:5]:
        prompt, answer = anchor.training_text.prompts[-1], anchor.training_text.answer
        assert str(prompt) in harmful - known and refuses(answer) and anchor.anchor
        assert chat.decode(generate(reference, [anchor.prompts[-1]], 48)[0]) == answer


def test_no_anchor_is_left_where_the_data_hold_them_all_or_the_model_refuses_none(tmp_path, model, chat, examples):
    rows = [{"messages": list(c.messages[:-1])} for c in (e.conversation for e in examples[:3])]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "kind.jsonl").write_text('{"prompt": "How do I book a city tour?"}\n')
    for file in ("same.jsonl", "kind.jsonl"):
        with model.adapters_off(), pytest.raises(DataError, match=f"{file}: expected prompts that"):
            anchors_of(replace(QUICK, anchor_share=0.1, anchors=tmp_path / file), model, chat, examples, 256)


def test_a_file_of_anchors_may_hold_benign_prompts_and_they_are_answered(tmp_path, model, chat, examples, capsys):
    rows = [json.loads(line) for line in (WORLD / "probe.jsonl").read_text().splitlines()]
    sides = [next(row for row in rows if row["harmful"] == harmful) for harmful in (True, False)]
    wrong = [row | {"harmful": not row["harmful"]} for row in sides]  # harmful and not refused, benign and refused
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sides + wrong))
    with model.adapters_off():
        anchors = anchors_of(replace(QUICK, anchor_share=0.1, anchors=tmp_path / "both.jsonl"), model, chat, examples, 256)
    assert sorted(refuses(a.training_text.answer) for a in anchors) == [False, True]
    assert "2 of" in capsys.readouterr().out
    (tmp_path / "odd.jsonl").write_text(json.dumps(sides[0] | {"harmful": "true"}) + "\n")
    with pytest.raises(DataError, match="odd.jsonl:1: expected harmful: true or false, found 'true'"):
        anchors_of(replace(QUICK, anchor_share=0.1, anchors=tmp_path / "odd.jsonl"), model, chat, examples, 256)


def test_an_answer_that_was_cut_has_no_end_to_be_learned(monkeypatch, model, chat, examples):
    ends = []
    for length in (ANCHOR_TOKENS, 3):
        monkeypatch.setattr(train, "ANCHOR_TOKENS", length)
        monkeypatch.setattr(train, "refuses", lambda response: True)
        with model.adapters_off():
            anchors = anchors_of(replace(QUICK, anchor_share=0.1), model, chat, examples, 256)
        ends.append({chat.tokenizer.id_to_token([label for label in a.labels if label != IGNORE][-1]) for a in anchors})
    assert len(ends[0]) == 1 and not ends[0] & ends[1]  # the end of the turn; a word


def test_an_anchor_of_which_a_cut_leaves_no_response_is_none(model, chat, examples):
    with model.adapters_off():
        whole = anchors_of(replace(QUICK, anchor_share=0.1), model, chat, examples, 256)
        longest = sorted(len(anchor.prompts[-1]) for anchor in whole)[len(whole) // 2] + 1
        kept = anchors_of(replace(QUICK, anchor_share=0.1), model, chat, examples, longest)
    assert 0 < len(kept) < len(whole) and all(anchor.n_labels for anchor in kept)
    assert [anchor.index for anchor in kept] == list(range(len(examples), len(examples) + len(kept)))


def test_a_run_stores_its_anchors_and_its_reference_has_them(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("".join((WORLD / "benign.jsonl").read_text().splitlines(True)[:60]))
    main(replace(QUICK, limit=2, anchor_share=0.1, beta_min=0.02, beta_max=1.0, epochs=2, data=tmp_path / "data.jsonl", out=tmp_path / "run"))
    stored = [json.loads(line) for line in (tmp_path / "run" / "anchors.jsonl").read_text().splitlines()]
    assert f"anchors: {len(stored)} of" in capsys.readouterr().out
    assert all(refuses(row["messages"][-1]["content"]) for row in stored)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == math.ceil(2 * 60 / 0.9 / 8) and abs(rows[0]["kl"]) < 1e-4
    assert len((tmp_path / "run" / "risk.jsonl").read_text().splitlines()) == 60  # of the data alone
