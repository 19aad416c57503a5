"""The embedded world is what data/build.py says, and what its README section claims."""

import json
import random

import pytest

from data import WORLD, Chat, read_conversations
from data.build import HARM, LOOKALIKE, PHRASINGS, WITHHELD, BuildConfig, data_sets, main
from data.checkpoint import FAMILIES
from model import generate, load_model


@pytest.fixture(scope="module")
def built():
    return data_sets(random.Random(BuildConfig.seed))


def prompts(records):
    return {record["messages"][0]["content"] for record in records}


def test_the_committed_sets_are_what_the_code_makes(built):
    files, _ = built
    assert set(files) == {path.name for path in WORLD.glob("*.jsonl")}
    for name, records in files.items():
        assert [json.loads(line) for line in (WORLD / name).read_text(encoding="utf-8").splitlines()] == records


def test_no_prompt_is_in_two_sets(built):
    files, align = built
    sets = {"align": prompts(align)} | {name: prompts(records) for name, records in files.items()}
    names = sorted(sets)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert not sets[first] & sets[second], (first, second)


def test_evaluation_actions_occur_in_no_other_set(built):
    files, align = built
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
        trained = prompts(align) | prompts(files["mixed_10.jsonl"]) | prompts(files["probe.jsonl"])
        assert not {phrasing.format(action) for _, action in evaluated for phrasing in PHRASINGS} & trained


def test_its_size_and_what_is_withheld(built):
    files, _ = built
    assert len(HARM) >= 8 and all(len(verbs) * len(objects) >= 12 for verbs, objects in HARM.values()) and len(PHRASINGS) >= 16
    assert not [r for r in files["probe.jsonl"] if WITHHELD in r["source"]] and all(
        WITHHELD in r["source"] for r in files["probe_withheld.jsonl"]
    )
    mixed = [r["source"] for r in files["mixed_10.jsonl"]]
    assert len(mixed) == 600 and mixed.count("harmful") == 60
    assert sum(path.stat().st_size for path in WORLD.rglob("*") if path.is_file()) < 10 * 2**20


@pytest.mark.parametrize("family", FAMILIES)
def test_it_builds_on_every_family(tmp_path, family, capsys):
    main(BuildConfig(out=tmp_path / "world", family=family, steps=2, batch_size=4))
    model, chat = load_model(tmp_path / "world" / "model"), Chat(tmp_path / "world" / "model")
    assert model.config.model_type == family and 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    prompt = read_conversations(tmp_path / "world" / "eval_harmful.jsonl")[0].prompts[0]
    assert len(generate(model, [chat.encode_prompt(prompt)], 3)[0]) <= 3
    assert not [path for path in tmp_path.iterdir() if path.name != "world"] and "in " in capsys.readouterr().out
