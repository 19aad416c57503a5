"""tests/grid.py: finished cells are kept, and the tables show the cells' figures."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grid
import pytest
from grid import ATTACKS, METHODS, GridConfig, cell_options, changes_of, main

from data.conversations import WORLD, read_conversations
from lib.files import DataError


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
    assert "| judge ASR: greedy / T=1 / @1 | aligned model | sft | csft |" in text
    rates = [100 * results["backdoor"][1]["figures"][f"judge ASR harmful_backdoor {way}"]["rate"] for way in ("greedy", "T=1", "@1")]
    [line] = [line for line in text.split("\n\n")[0].splitlines() if line.startswith("| backdoor, as attacked |")]
    assert line.split(" | ")[2] == " / ".join(f"{rate:.0f}" if rate >= 9.95 else f"{rate:.1f}" for rate in rates)

    config = replace(config, fluency=WORLD / "model")
    main(config)
    assert "| answered: greedy / T=1 / @1 | aligned model | sft | csft |" in tables()[0]
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
    assert all((WORLD / f"{attack}.jsonl").exists() for attack in ATTACKS) and len(METHODS) == 13
    wrong_methods = [dict(methods=text) for text in ("sft,magic", "0..x", "0.5..0.1", "0..1.0", "0..1+1", "0..1.2.3")]
    for wrong in (*wrong_methods, dict(attacks="none_such"), dict(seeds=0)):
        with pytest.raises(DataError, match=f"--{next(iter(wrong))}: expected"):
            main(GridConfig(out=tmp_path / "g", **wrong))
