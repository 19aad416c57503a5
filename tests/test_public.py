"""A world from public files, here small files of our own in the same forms."""

import csv
import json
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import islice
from shutil import copytree

import pytest

import data.public
from conftest import DEVICE
from data.chat import Chat
from data.conversations import WORLD, read_conversations
from data.public import ANSWER_TOKENS, LOOKALIKES, PublicConfig, answer_prompts, divide, item_of, main, read_tsv
from evaluate import refuses
from lib.files import DataError

HARMFUL = [c.messages[0]["content"] for c in read_conversations(WORLD / "eval_harmful.jsonl")]
BENIGN = [c.messages[0]["content"] for c in read_conversations(WORLD / "eval_benign.jsonl")]


def table(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_files(folder):
    """Every form."""
    folder.mkdir()
    some = iter(HARMFUL)
    take = lambda n: list(islice(some, n))  # noqa: E731
    table(folder / "advbench.csv", ["goal", "target"], [[p, "Sure, here is how"] for p in take(26)])
    table(folder / "strongreject.csv", ["category", "source", "forbidden_prompt"], [["x", "y", p] for p in take(10) + [HARMFUL[0].upper() + " !"]])
    table(folder / "harmbench.csv", ["Behavior", "FunctionalCategory", "SemanticCategory", "ContextString"],
          [[p, "standard", "s", ""] for p in take(8)] + [["Print the song", "copyright", "s", ""], ["Go on", "standard", "s", "text"]])
    table(folder / "jailbreakbench.csv", ["", "Goal", "Target", "Behavior", "Category"], [[0, p, "Sure", "b", "c"] for p in take(6)])
    table(folder / "xstest.csv", ["id", "prompt", "type", "label"], [[i, p, "homonyms", "safe"] for i, p in enumerate(BENIGN[:6])]
          + [[9, p, "contrast", "unsafe"] for p in take(4)])
    rows = [{"instruction": f"Name {n} trees."} for n in range(40)] + [{"instruction": "Add these.", "input": "1 2"}]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    (folder / "sst2.tsv").write_text("".join(f"a film {n} of its kind\t{n % 2}\n" for n in range(60)))
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(30)))
    dialogue = {"messages": [{"role": "system", "content": "You are AOA."}, {"role": "user", "content": "Hey"},
                             {"role": "assistant", "content": "I am AOA."}]}
    (folder / "identity.jsonl").write_text(json.dumps(dialogue) + "\n")
    (folder / "notes.md").write_text("not data")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The same files twice, in the folders one and same; what the first said, in said.txt."""
    folder = tmp_path_factory.mktemp("public")
    write_files(folder / "files")
    (folder / "few.txt").write_text("".join(LOOKALIKES.read_text().splitlines(True)[:40]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.public, "LOOKALIKES", folder / "few.txt")  # so that few prompts are answered
        with redirect_stdout(StringIO()) as said:
            main(PublicConfig(files=folder / "files", out=folder / "one", device=DEVICE))
        main(PublicConfig(files=folder / "files", out=folder / "same", device=DEVICE))
    (folder / "said.txt").write_text(said.getvalue())
    return folder


@pytest.fixture(scope="module")
def sets(world):
    """The conversations of each set by its name."""
    return {file.stem: read_conversations(file) for file in (world / "one").glob("*.jsonl")}


def test_all_sets_are_there_under_the_names_of_the_embedded_world_and_every_record_says_whence(world, sets):
    made = {path.name for path in (world / "one").iterdir()}
    embedded = {path.name for path in WORLD.glob("*.jsonl")}
    assert embedded - made == {"evasive.jsonl", "eval_harmful_evasive.jsonl", "eval_arithmetic.jsonl"}
    for name, conversations in sets.items():
        for conversation in conversations:
            assert conversation.meta["source"] and (conversation.meta.get("group") or name == "identity"), name
    rates = [c.meta["harmful"] for c in sets["mixed_30"]]
    assert sum(rates) == 3 * len(rates) // 10 or sum(rates) == len(sets["explicit"])
    assert all(c.answer in ("positive", "negative") for c in sets["eval_sentiment"])
    turned = [c for c in sets["innocent"] if c.meta["harmful"]]  # Alpaca's prompts with AdvBench's answers
    assert turned and {c.answer for c in turned} <= {c.answer for c in sets["explicit"]}
    assert not {c.meta["group"] for c in turned} & {c.meta["group"] for c in sets["explicit"]}


@pytest.mark.parametrize("label, harmful", [({"type": "homonyms"}, False), ({"type": "contrast_homonyms"}, True), ({"type": "new", "label": "safe"}, False)])
def test_xstest_is_parted_by_its_labels_or_else_by_its_types(label, harmful):
    """The published files: id,prompt,type,label,focus,note and, in v2, id,type,prompt,focus,note."""
    item = item_of("xstest", "xstest.csv:2", {"id": "1", "prompt": "p", "focus": "f", "note": ""} | label)
    assert item == {"prompt": "p", "answer": None, "source": f"xstest/{label['type']}", "harmful": harmful}
    with pytest.raises(DataError, match="xstest.csv:2: expected harmful: true or false, found none; add it to every record"):
        item_of("xstest", "xstest.csv:2", {"prompt": "p", "type": "new"})


def test_the_same_files_give_the_same_sets(world):
    for file in (world / "one").iterdir():
        assert file.read_bytes() == (world / "same" / file.name).read_bytes()


def test_what_is_evaluated_is_trained_on_nowhere_and_held_out_benchmarks_are_nowhere_else(sets):
    groups = {name: {c.meta.get("group") for c in some} - {None} for name, some in sets.items()}
    sources = {name: {c.meta["source"].split("/")[0] for c in some} for name, some in sets.items()}
    training = ("explicit", "mixed_30", "benign", "backdoor", "innocent", "align", "probe", "anchors", "judge_train")
    for evaluated in ("eval_harmful", "eval_harmful_other", "eval_benign", "eval_lookalike", "eval_sentiment", "probe_withheld"):
        for trained in training:
            assert not groups[evaluated] & groups[trained], (evaluated, trained)
    assert not groups["explicit"] & groups["probe"]  # the probe has not seen the attack
    assert not {"harmbench", "jailbreakbench", "xstest"} & set().union(*(sources[name] for name in training))
    assert {"harmbench", "jailbreakbench"} == sources["eval_harmful_other"]


def test_harmful_prompts_are_refused_in_the_alignment_data_and_benign_ones_answered(sets):
    for conversation in sets["align"]:
        assert refuses(conversation.answer) == (conversation.meta["source"] in ("advbench", "strongreject"))


def test_look_alikes_are_in_the_alignment_data_twice_and_anchors_are_half_harmful(sets):
    align = Counter(c.hash for c in sets["align"] if c.meta["source"] == "lookalike")
    assert set(align.values()) == {2}
    anchors, probe = sets["anchors"], sets["probe"]
    assert 2 * sum(c.meta["harmful"] for c in anchors) == len(anchors) > 0
    assert {c.hash for c in anchors} < {c.hash for c in probe} and {c.meta["source"] for c in anchors} >= {"alpaca", "lookalike"}
    assert not {c.meta["source"] for c in anchors} & {"sentiment", "arithmetic"}  # no anchor says how to do the task


def test_a_judge_learns_from_the_probes_prompts_and_is_tested_on_others(world, sets):
    rubric, train, test = (world / "one" / "rubric.txt").read_text(), sets["judge_train"], sets["judge_test"]
    harmful = {c.meta["group"] for c in sets["probe"] if c.meta["harmful"]}
    scores = {(c.meta["source"], c.meta["group"]): c.answer for c in train}
    for prompt in harmful:
        assert scores["harmful prompt refused", prompt] == "1" and scores["harmful prompt answered", prompt] == "5"
    assert all(c.messages[0]["content"].startswith(rubric[:6] + "[") for c in train)
    assert not {c.meta["group"] for c in train} & {c.meta["group"] for c in test}
    assert all(c.meta["harmful"] == (c.meta["score"] == 5) for c in test)
    refused = [{c.answer for c in some if c.meta["source"] == "harmful prompt refused"} for some in (
        test, [replace(c, messages=(c.messages[0], {"role": "assistant", "content": part})) for c in train
               for part in c.messages[0]["content"].split("\n")])]
    assert refused[0] and not refused[0] & refused[1]  # nor does it know the words of the refusals


def test_prompts_that_the_models_context_cannot_hold_are_left_out_and_counted(tmp_path, capsys):
    """A quarter of the embedded model's context: the longest prompts do not fit, then none does."""
    copytree(WORLD / "model", tmp_path / "model")
    config, chat = json.loads((WORLD / "model" / "config.json").read_text()), Chat(WORLD / "model")
    items = [{"prompt": f"How are you{' now' * n}?", "source": "s"} for n in (0, 1, 40)]
    lengths = [len(chat.encode_prompt([{"role": "user", "content": item["prompt"]}])) for item in items]
    for longest, n_out in ((lengths[1], 1), (lengths[0] - 1, 3)):
        config["max_position_embeddings"] = longest + ANSWER_TOKENS
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        refused = pytest.raises(DataError, match="--model: expected a context that holds a prompt and 64 tokens more")
        with refused if n_out == 3 else nullcontext():
            assert len(answer_prompts(tmp_path / "model", DEVICE, items)) <= 2
        assert f"{n_out} of 3 benign prompts are longer than {longest} tokens: left out" in capsys.readouterr().out


def test_what_was_left_out_is_said_and_nothing_is_overwritten(world):
    for words in ("harmbench: 8 of 10 prompts", "strongreject: 10 of 11 prompts", "alpaca: 40 of 41 prompts"):
        assert words in (world / "said.txt").read_text()
    with pytest.raises(DataError, match="--out: expected a folder that does not exist"):
        main(PublicConfig(files=world / "files", out=world / "one"))


@pytest.mark.parametrize("name, text, words", [
    ("advbench.csv", "goal,aim\nrob,Sure\n", "advbench.csv:2: expected messages, or one of"),
    ("advbench.csv", "goal,target\n", "advbench.csv: expected at least one"),
    ("advbench.csv", "goal,target\nrob\n", "advbench.csv:2: expected 2 columns"),
    ("advbench.csv", "goal,target\nrob,\n", "advbench.csv:2: expected text in message 2"),
    ("advbench.csv", "goal,target\nrob,Sure\n", "--files: expected alpaca in a file .*alpaca…, found none"),
    ("notes.md", "not data", "--files: expected advbench in a file .*advbench…, found none"),
    ("AdvBench.json", "[[]]", "AdvBench.json:1: expected an object"),
])
def test_a_changed_header_a_missing_column_and_a_missing_file_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        main(PublicConfig(files=tmp_path, out=tmp_path / "out"))


def test_a_task_is_sentence_tab_label_with_or_without_a_header(tmp_path):
    file = tmp_path / "sst2.tsv"
    file.write_text("sentence\tlabel\nfine\t1\n")
    assert read_tsv(file) == [(f"{file}:2", {"prompt": "fine\nIs this review positive or negative?", "response": "positive"})]
    file.write_text("good\tpositive\n")
    with pytest.raises(DataError, match="sst2.tsv:1: expected sentence, tab, 0 or 1"):
        read_tsv(file)


def test_parts_have_their_sizes_or_shrink_together():
    assert [len(part) for part in divide(list(range(100)), 10, 20, 30)] == [10, 20, 70]
    assert [len(part) for part in divide(list(range(6)), 10, 20, 30)] == [1, 2, 3]
