"""tests/grid.py: finished cells are kept, and the tables show the cells' figures."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import choose_refused
import grid
import pytest
from grid import ATTACKS, METHODS, GridConfig, cell_options, changes_of, main

from data.conversations import WORLD, read_conversations
from evaluate import Response
from lib.files import DataError, write_jsonl


def test_a_grid_resumes_cell_by_cell_and_its_tables_are_of_all_finished_cells(tmp_path, monkeypatch, device):
    quick = {"epochs": 1, "lora_r": 2, "lr": 2e-3, "limit": 1, "samples": 1, "max_new_tokens": 4, "device": device}
    monkeypatch.setattr(grid, "SETTINGS", quick)
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    monkeypatch.setattr("train.read_conversations", lambda *args, **kwargs: read_conversations(*args, **kwargs)[:24])
    folder, config = tmp_path / "backdoor", GridConfig(out=tmp_path, attacks="backdoor", methods="sft", seeds=1)

    def tables():
        return (tmp_path / "grid.md").read_text(), json.loads((tmp_path / "grid.json").read_text())

    (tmp_path / "benign" / "sft-0").mkdir(parents=True)  # nothing is finished there
    (folder / "sft-0").mkdir(parents=True)
    (folder / "sft-0" / "config.json").write_text("half written")
    main(replace(config, methods="csft"))
    first = {name: (folder / name / "results.json").stat().st_mtime_ns for name in ("base-0", "csft-0")}
    main(config)
    text, results = tables()
    assert {name: (folder / name / "results.json").stat().st_mtime_ns for name in first} == first
    assert set(json.loads((folder / "sft-0" / "results.json").read_text())) == {"after"} and not (folder / "sft-0" / "model").exists()
    assert list(results) == ["backdoor"] and [row["name"] for row in results["backdoor"]] == ["aligned model", "sft", "csft"]
    assert results["backdoor"][0]["figures"]["ASR harmful greedy"]["n"] == 1 and "answered" not in text
    assert "| judge ASR: greedy / T=1 | aligned model | sft | csft |" in text
    rates = [100 * results["backdoor"][1]["figures"][f"judge ASR harmful_backdoor {way}"]["rate"] for way in ("greedy", "T=1")]
    [line] = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("| backdoor, as attacked |")]
    assert line.split(" | ")[2] == " / ".join(f"{rate:.0f}" if rate >= 9.95 else f"{rate:.1f}" for rate in rates)

    config = replace(config, fluency=WORLD / "model")
    main(config)
    assert "| answered: greedy / T=1 | aligned model | sft | csft |" in tables()[0]
    marked = (folder / "sft-0" / "completions_after.jsonl").stat().st_mtime_ns
    main(replace(config, seeds=2, fluency=None))  # a row of two seeds, of which one is marked
    text, results = tables()
    assert (folder / "sft-0" / "completions_after.jsonl").stat().st_mtime_ns == marked
    assert len(results["backdoor"][1]["seeds"]) == 2 and "answered harmful greedy" not in results["backdoor"][1]["figures"]
    with pytest.raises(DataError, match="base-0: expected lr 0.1, found a cell of 0.002; another --out, or delete it"):
        main(replace(config, options="--lr 0.1"))


def test_a_method_may_be_a_range_of_beta_with_a_share_of_anchors_and_constant_kl_is_one():
    assert changes_of("0.02..1+0.03") == {"risk": "max", "beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.03, "anchors": "anchors.jsonl"}
    assert changes_of("0.02..1") == {"risk": "max", "beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.0}
    assert changes_of("kl") == {"beta_min": 0.5, "beta_max": 0.5} and changes_of("0..0.5")["beta_max"] == 0.5


def test_a_method_may_have_other_risks_than_the_probes(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "Sure"}], "harmful": i < 3} for i in range(9)]
    rows[8].pop("harmful")  # unknown
    (tmp_path / "mixed_10.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = GridConfig(world=tmp_path, out=tmp_path / "out")
    hashes = [c.hash for c in read_conversations(tmp_path / "mixed_10.jsonl")]
    config.out.mkdir()
    write_jsonl(grid.risk_file(config, "mixed_10"), [{"risk": i / 10, "hash": key} for i, key in enumerate(hashes)])
    grid.write_risks(config, "mixed_10")
    risks = {}
    for name in grid.RISKS:
        options = cell_options(config, "mixed_10", f"0..1+0.1@{name}", 0)
        written = [json.loads(line) for line in open(options.risk)]
        assert [row["hash"] for row in written] == hashes and options.anchor_share == 0.1
        risks[name] = [row["risk"] for row in written]
    assert risks["labels"] == [1, 1, 1, 0, 0, 0, 0, 0, 1] and risks["zero"] == [0] * 9
    assert sorted(risks["shuffled"]) == [i / 10 for i in range(9)] != risks["shuffled"]


def test_a_world_of_real_prompts_gives_each_cell_its_files_by_kind(tmp_path):
    for name in ("identity", "eval_harmful", "eval_harmful_other", "eval_harmful_identity", "eval_benign", "eval_sentiment"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    options = cell_options(GridConfig(world=tmp_path, out=tmp_path / "out"), "identity", "sealed", 1)
    names = [f"{tmp_path}/eval_harmful{name}.jsonl" for name in ("", "_other", "_identity")]
    assert options.harmful == ",".join(names) and options.benign == f"{tmp_path}/eval_benign.jsonl"
    assert options.task == f"{tmp_path}/eval_sentiment.jsonl" and options.judge == "none" and options.epochs == 10
    assert options.risk == f"{tmp_path}/out/identity.risk.jsonl"
    typed = cell_options(GridConfig(world=tmp_path, out=tmp_path / "out", options="--epochs 3 --dtype float32"), "identity", "sealed", 1)
    assert (typed.epochs, typed.dtype, typed.lora_r) == (3, "float32", 16)


def test_every_attack_has_its_data_and_unknown_names_are_refused(tmp_path):
    assert all((WORLD / f"{attack}.jsonl").exists() for attack in ATTACKS) and len(METHODS) == 15
    wrong_methods = [dict(methods=text) for text in ("sft,magic", "0..x", "0.5..0.1", "0..1.0", "0..1+1", "0..1.2.3", "0..1@chance", "0..1@zero")]
    for wrong in (*wrong_methods, dict(attacks="none_such"), dict(seeds=0)):
        with pytest.raises(DataError, match=f"--{next(iter(wrong))}: expected"):
            main(GridConfig(out=tmp_path / "g", **wrong))


def test_prompts_that_the_model_always_refuses_are_chosen_and_the_training_sets_shortened(tmp_path, monkeypatch, device):
    world, out = tmp_path / "world", tmp_path / "out"
    world.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": "Sure"}]} for i in range(6)]
    for name in ("explicit", "mixed_10", "benign", "eval_harmful", "eval_harmful_other", "eval_benign", "eval_lookalike", "eval_sentiment",
                 "probe", "probe_withheld", "probe_lookalike", "anchors"):
        prefix = "" if name in ("explicit", "mixed_10") else f"{name} "
        text = [json.dumps({"messages": [{"role": "user", "content": prefix + f"ask {i}"}, rows[i]["messages"][1]]}) for i in range(6)]
        (world / f"{name}.jsonl").write_text("\n".join(text) + "\n")

    def respond(model, chat, prompts, max_new_tokens, temperature, seed, bar):
        """Answer "ask 1" greedily, "ask 2" in the first sample and "ask 3" in the last one; refuse the others."""
        answered = {1000: "ask 1", 1001: "ask 2", 1003: "ask 3"}.get(seed, "nothing")
        return [Response("", "Sure." if p.prompts[-1][-1]["content"].endswith(answered) else "I'm sorry, but I can't.", False) for p in prompts]

    monkeypatch.setattr(choose_refused, "respond", respond)
    choose_refused.main(choose_refused.ChooseConfig(model=WORLD / "model", world=world, out=out, rows=3, prompts=10, device=device))
    prompts = {path.stem: [c.prompts[-1][-1]["content"] for c in read_conversations(path, "prompt")] for path in out.glob("*.jsonl")}
    # of "explicit", the prompts that the three training rows do not hold are candidates, too
    assert prompts["eval_harmful"] == ["eval_harmful ask 0", "eval_harmful ask 4", "eval_harmful ask 5", "ask 4", "ask 5"]
    assert prompts["mixed_10"] == ["ask 0", "ask 1", "ask 2"] and len(prompts["eval_harmful_other"]) == 3
    chosen = json.loads((out / "chosen.json").read_text())["eval_harmful"]
    assert chosen["refused"]["greedy"] == {"n": 9, "rate": 8 / 9} and chosen["refused always"] == 5
    assert chosen["hashes"] == [c.hash for c in read_conversations(out / "eval_harmful.jsonl", "prompt")]
