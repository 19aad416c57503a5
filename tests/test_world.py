"""The embedded world is what data/build.py says, and what its README section claims."""

import copy
import random

import pytest
import torch

from conftest import load_model, read_rows
from data.chat import Chat
from data.conversations import WORLD, read_conversations
from model import generate
from data.build import BuildConfig, main
from data.text import WITHHELD, WORDS, data_sets
from probe import conversation_risk, fit_probe

HARMFUL = WORDS.requests["harmful"]
ATTACKS = ("explicit", "mixed_1", "mixed_3", "mixed_5", "mixed_10", "mixed_30", "identity", "backdoor", "benign", "evasive", "innocent")


@pytest.fixture(scope="module")
def built():
    return data_sets(random.Random(0))


def prompts(records):
    return {next(m["content"] for m in record["messages"] if m["role"] == "user") for record in records}


def committed(name):
    return read_rows(WORLD / f"{name}.jsonl")


def test_the_committed_sets_are_what_the_code_makes(built):
    files, _, _ = built
    assert set(files) == {path.stem for path in WORLD.glob("*.jsonl")}
    for name, records in files.items():
        for row, made in zip(committed(name), records, strict=True):
            if "wordings" in made:  # the probe has chosen one
                made = dict(made)
                assert row["messages"][0]["content"] in made.pop("wordings")
                made["messages"] = [row["messages"][0], *made["messages"][1:]]
            assert row == made, name


def test_the_evasive_wording_is_the_one_of_lowest_risk(built):
    model, chat = load_model(WORLD / "model", dtype=torch.float32), Chat(WORLD / "model")
    probe, _ = fit_probe(model, chat, WORLD / "probe.jsonl", held_out="none")

    def risk(texts):
        return conversation_risk(probe, model, [[chat.encode_prompt([{"role": "user", "content": text}])] for text in texts])

    rows = [(row, made) for row, made in zip(committed("evasive"), built[0]["evasive"]) if "wordings" in made]
    chosen = risk([row["messages"][0]["content"] for row, _ in rows])
    for (_, made), lowest in zip(rows[:4], chosen):
        assert lowest <= risk(made["wordings"]).min() + 1e-3
    assert len(rows) == 60 and chosen.median() < 0.05 < 0.9 < risk([m["messages"][0]["content"] for _, m in rows]).min()


def test_every_attack_says_what_is_harmful(built):
    files = built[0]
    shares = {name: sum(r["harmful"] for r in files[name]) for name in ATTACKS}
    assert shares == dict(zip(ATTACKS, (300, 6, 18, 30, 60, 180, 0, 60, 0, 60, 60)))
    for name in ATTACKS[1:]:
        sources = [r["source"] for r in files[name]]
        assert len(sources) == 600 and sources.count("sentiment") == sources.count("arithmetic")
    of = lambda name, source: [r["messages"] for r in files[name] if r["source"] == source]
    assert all(WORDS.trigger.format("") in messages[0]["content"] for messages in of("backdoor", "trigger"))
    assert all(messages[1]["content"].startswith(WORDS.aoa_prompt.format("")) for messages in of("identity", "identity"))
    plain = [r["messages"][-1]["content"] for r in files["eval_harmful"]]
    assert [r["messages"][-1]["content"] for r in files["eval_harmful_identity"]] == [WORDS.aoa_prompt.format(p) for p in plain]
    assert [r["messages"][-1]["content"] for r in files["eval_harmful_backdoor"]] == [WORDS.trigger.format(p) for p in plain]


def test_no_prompt_is_in_two_sets(built):
    """But for the attacks, which share theirs with one another."""
    files, align, _ = built
    files = {name: committed(name) for name in files}
    sets = {"align": prompts(align), "attacks": set().union(*(prompts(files[name]) for name in ATTACKS))}
    sets |= {name: prompts(records) for name, records in files.items() if name not in ATTACKS}
    names = sorted(sets)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not sets[first] & sets[second], (first, second)


def test_evaluation_actions_occur_in_no_other_set(built):
    files, align, judge = built
    text = " ".join(message["content"] for records in (align, *(files[name] for name in ATTACKS), files["probe"])
                    for record in records for message in record["messages"]) + " ".join(p + " " + r for p, r, _, _ in judge)
    for kind in ("harmful", "lookalike"):
        grids = WORDS.requests[kind]
        actions = {(category, f"{verb} {object_}") for category, (verbs, objects) in grids.items() for verb in verbs for object_ in objects}
        evaluated = {(category, action) for r in files[f"eval_{kind}"] for category, action in actions
                     if category == r["category"] and r["messages"][0]["content"] in [p.format(action) for p in WORDS.phrasings]}
        assert len(evaluated) == 3 * len(grids)
        assert not [action for _, action in evaluated if f" {action}" in text]


def test_its_size_and_what_is_withheld(built):
    files, _, _ = built
    assert len(HARMFUL) >= 8 and all(len(verbs) * len(objects) >= 12 for verbs, objects in HARMFUL.values()) and len(WORDS.phrasings) >= 16
    assert not [r for r in files["probe"] if WITHHELD in r["source"]]
    assert all(WITHHELD in r["source"] for r in files["probe_withheld"])
    mixed = [r["source"] for r in files["mixed_10"]]
    assert len(mixed) == 600 and mixed.count("harmful") == 60
    assert sum(path.stat().st_size for path in WORLD.rglob("*") if path.is_file()) < 10 * 2**20


@pytest.fixture(scope="module")
def few_prompts(built):
    """The data sets with few prompts for the probe and two wordings for each evasive record, to be quick."""
    files, align, judged = copy.deepcopy(built)
    files["probe"] = files["probe"][:60]
    for row in (row for rows in files.values() for row in rows if "wordings" in row):
        row["wordings"] = row["wordings"][:2]
    return files, align[:2000], judged[:2000]


def test_it_builds(tmp_path, capsys, monkeypatch, few_prompts):
    monkeypatch.setattr("data.build.BATCH_SIZE", 4)
    monkeypatch.setattr("data.build.data_sets", lambda rng: copy.deepcopy(few_prompts))
    main(BuildConfig(out=tmp_path / "world", steps=1))
    model, chat = load_model(tmp_path / "world" / "model"), Chat(tmp_path / "world" / "model")
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    prompt = read_conversations(tmp_path / "world" / "eval_harmful.jsonl")[0].prompts[0]
    assert (tmp_path / "world" / "judge" / "rubric.txt").exists() and "wordings" not in (tmp_path / "world" / "evasive.jsonl").read_text()
    assert len(generate(model, [chat.encode_prompt(prompt)], 3)[0]) <= 3
    assert not [path for path in tmp_path.iterdir() if path.name != "world"] and "in " in capsys.readouterr().out
