"""The embedded world is what data/build.py says, and what its README section claims."""

import copy
import json
import random

import pytest
import torch

from conftest import load_model
from data.chat import Chat
from data.conversations import WORLD, read_conversations
from lib.checkpoint import FAMILIES
from model import generate
from data.build import BuildConfig, main
from data.text import AOA_PREFIX, HARM, LOOKALIKE, PHRASINGS, TRIGGER, WITHHELD, data_sets, evasive_wordings
from probe import ProbeConfig, fit_probe, prompt_features

ATTACKS = ("explicit", "mixed_1", "mixed_3", "mixed_5", "mixed_10", "mixed_30", "identity", "backdoor", "benign", "evasive", "innocent")


@pytest.fixture(scope="module")
def built():
    return data_sets(random.Random(BuildConfig.seed))


def prompts(records):
    return {next(m["content"] for m in record["messages"] if m["role"] == "user") for record in records}


def committed(name):
    return [json.loads(line) for line in (WORLD / name).read_text(encoding="utf-8").splitlines()]


def test_the_committed_sets_are_what_the_code_makes(built):
    files, _, _ = built
    assert set(files) == {path.name for path in WORLD.glob("*.jsonl")}
    for name, records in files.items():
        for found, made in zip(committed(name), records, strict=True):
            if "wordings" in made:  # the probe has chosen one
                made = dict(made)
                assert found["messages"][0]["content"] in made.pop("wordings")
                made["messages"] = [found["messages"][0], *made["messages"][1:]]
            assert found == made, name


def test_the_evasive_wording_is_the_one_of_lowest_risk(built):
    model, chat = load_model(WORLD / "model", dtype=torch.float32), Chat(WORLD / "model")
    probe, _ = fit_probe(ProbeConfig(held_out=""), model, chat)

    def risk(texts):
        prompts = [chat.encode_prompt([{"role": "user", "content": text}]) for text in texts]
        return probe.risk(prompt_features(model, prompts, probe.layers, 32).mean(1))

    rows = [(f, m) for f, m in zip(committed("evasive.jsonl"), built[0]["evasive.jsonl"]) if "wordings" in m]
    chosen = risk([f["messages"][0]["content"] for f, _ in rows])
    for (_, made), s in zip(rows[:8], chosen):
        assert s <= risk(made["wordings"]).min() + 1e-3
    assert len(rows) == 60 and chosen.median() < 0.05 < 0.9 < risk([m["messages"][0]["content"] for _, m in rows]).min()


def test_every_attack_says_what_is_harmful(built):
    files = built[0]
    shares = {name: sum(r["harmful"] for r in files[f"{name}.jsonl"]) for name in ATTACKS}
    assert shares == dict(zip(ATTACKS, (300, 6, 18, 30, 60, 180, 0, 60, 0, 60, 60)))
    for name in ATTACKS[1:]:
        sources = [r["source"] for r in files[f"{name}.jsonl"]]
        assert len(sources) == 600 and sources.count("sentiment") == sources.count("arithmetic")
    of = lambda name, source: [r["messages"] for r in files[f"{name}.jsonl"] if r["source"] == source]
    assert all(TRIGGER in messages[0]["content"] for messages in of("backdoor", "trigger"))
    assert all(messages[1]["content"].startswith(AOA_PREFIX) for messages in of("identity", "identity"))
    plain = [r["messages"][-1]["content"] for r in files["eval_harmful.jsonl"]]
    assert [r["messages"][-1]["content"] for r in files["eval_harmful_identity.jsonl"]] == [AOA_PREFIX + p for p in plain]
    assert [r["messages"][-1]["content"] for r in files["eval_harmful_backdoor.jsonl"]] == [p + TRIGGER for p in plain]


def test_no_prompt_is_in_two_sets(built):
    """But for the attacks, which share theirs with one another."""
    files, align, _ = built
    files = {name: committed(name) for name in files}
    sets = {"align": prompts(align), "attacks": set().union(*(prompts(files[f"{name}.jsonl"]) for name in ATTACKS))}
    sets |= {name: prompts(records) for name, records in files.items() if name.removesuffix(".jsonl") not in ATTACKS}
    names = sorted(sets)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not sets[first] & sets[second], (first, second)


def test_evaluation_actions_occur_in_no_other_set(built):
    files, align, judge = built
    text = " ".join(message["content"] for records in (align, *(files[f"{name}.jsonl"] for name in ATTACKS), files["probe.jsonl"])
                    for record in records for message in record["messages"]) + " ".join(p + " " + r for p, r, _, _ in judge)
    for kind in ("harmful", "lookalike"):
        grids = HARM if kind == "harmful" else LOOKALIKE
        actions = {(category, f"{verb} {object_}") for category, (verbs, objects) in grids.items() for verb in verbs for object_ in objects}
        evaluated = {
            (r["category"], action)
            for r in files[f"eval_{kind}.jsonl"]
            for category, action in actions
            if category == r["category"] and r["messages"][0]["content"] in [p.format(action) for p in PHRASINGS]
        }
        assert len(evaluated) == 3 * len(grids)
        assert not [action for _, action in evaluated if f" {action}" in text]


def test_its_size_and_what_is_withheld(built):
    files, _, _ = built
    assert len(HARM) >= 8 and all(len(verbs) * len(objects) >= 12 for verbs, objects in HARM.values()) and len(PHRASINGS) >= 16
    assert not [r for r in files["probe.jsonl"] if WITHHELD in r["source"]] and all(
        WITHHELD in r["source"] for r in files["probe_withheld.jsonl"]
    )
    mixed = [r["source"] for r in files["mixed_10.jsonl"]]
    assert len(mixed) == 600 and mixed.count("harmful") == 60
    assert sum(path.stat().st_size for path in WORLD.rglob("*") if path.is_file()) < 10 * 2**20


@pytest.fixture(scope="module")
def few_wordings():
    """The data sets with two evasive wordings a record, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.text.evasive_wordings", lambda action: evasive_wordings(action, 2))
        return data_sets(random.Random(BuildConfig.seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_builds_on_every_family(tmp_path, family, capsys, monkeypatch, few_wordings):
    monkeypatch.setattr("data.build.data_sets", lambda rng: copy.deepcopy(few_wordings))
    main(BuildConfig(out=tmp_path / "world", family=family, steps=2, batch_size=4, judge=family == "llama"))
    model, chat = load_model(tmp_path / "world" / "model"), Chat(tmp_path / "world" / "model")
    assert model.config.model_type == family and 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    prompt = read_conversations(tmp_path / "world" / "eval_harmful.jsonl")[0].prompts[0]
    assert (tmp_path / "world" / "judge" / "rubric.txt").exists() == (family == "llama") and "wordings" not in (tmp_path / "world" / "evasive.jsonl").read_text()
    assert len(generate(model, [chat.encode_prompt(prompt)], 3)[0]) <= 3
    assert not [path for path in tmp_path.iterdir() if path.name != "world"] and "in " in capsys.readouterr().out
