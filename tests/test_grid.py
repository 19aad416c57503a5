"""The grid of the README: cells are kept, and the tables are of what the cells say."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grid
import pytest
from grid import ATTACKS, METHODS, GridConfig, changes_of, main, train_group

from data.conversations import WORLD
from lib.files import DataError


def test_a_finished_cell_is_kept_an_unfinished_one_is_made_again_and_the_base_is_measured_once(tmp_path, monkeypatch, device):
    quick = {"epochs": 1, "lora_r": 2, "limit": 2, "samples": 1, "eval_base": False, "device": device}
    monkeypatch.setattr(grid, "SETTINGS", quick)
    config = GridConfig(out=tmp_path, attacks="explicit", methods="filter,sft", seeds=1)
    assert "base" in train_group(replace(config, methods="filter"), "explicit", 0)
    base, first = ((tmp_path / "explicit" / name / "results.json").read_bytes() for name in ("base-0", "filter-0"))
    (tmp_path / "explicit" / "sft-0").mkdir()
    (tmp_path / "explicit" / "sft-0" / "config.json").write_text("half written")
    again = train_group(config, "explicit", 0)
    assert "sft" in again and "filter" not in again and "base" not in again
    assert (tmp_path / "explicit" / "filter-0" / "results.json").read_bytes() == first
    assert set(json.loads((tmp_path / "explicit" / "sft-0" / "results.json").read_text())) == {"after"}
    assert json.loads(base)["after"]["asr"]["greedy"]["n"] == 2
    assert train_group(config, "explicit", 0).endswith("kept")
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    main(config)
    text, found = (tmp_path / "grid.md").read_text(), json.loads((tmp_path / "grid.json").read_text())
    assert "| judge ASR: greedy / T=1 / @1 | aligned model | sft | filter |" in text and text.count("| explicit |") == 3
    assert [row["name"] for row in found["explicit"]] == ["aligned model", "sft", "filter"]
    rates = [100 * found["explicit"][1]["figures"][f"judge ASR{way}"]["rate"] for way in (" greedy", " T=1", "@1")]
    assert f"{' / '.join(f'{rate:.0f}' if rate >= 9.95 else f'{rate:.1f}' for rate in rates)} |" in text.splitlines()[2]


def test_a_method_may_be_a_range_of_beta_with_a_share_of_anchors():
    gate = {"risk": "max", "beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.03, "anchors": "anchors.jsonl"}
    assert changes_of("0.02..1+0.03") == gate
    assert changes_of("0.02..1") == {"risk": "max", "beta_min": 0.02, "beta_max": 1.0, "anchor_share": 0.0} and changes_of("0..0.5")["beta_max"] == 0.5


def test_tables_are_of_all_that_is_finished_and_marked_once_a_model(tmp_path, monkeypatch, device, capsys):
    quick = {"epochs": 1, "lora_r": 2, "limit": 2, "samples": 1, "eval_base": False, "device": device}
    monkeypatch.setattr(grid, "SETTINGS", quick)
    monkeypatch.setattr(grid, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
    (tmp_path / "benign" / "sft-0").mkdir(parents=True)  # nothing is finished here
    config = GridConfig(out=tmp_path, attacks="mixed_1", methods="sft", seeds=1, epochs=1)
    main(config)  # of an attack that the default grid has not
    assert "answered" not in (tmp_path / "grid.md").read_text()
    main(replace(config, methods="0.02..1", fluency=WORLD / "model"))
    found, text = json.loads((tmp_path / "grid.json").read_text()), (tmp_path / "grid.md").read_text()
    assert [row["name"] for row in found["mixed_1"]] == ["aligned model", "sft", "0.02..1"] and list(found) == ["mixed_1"]
    assert "| answered: greedy / T=1 / @1 | aligned model | sft | 0.02..1 |" in text
    marked = (tmp_path / "mixed_1" / "sft-0" / "completions_after.jsonl").stat().st_mtime_ns
    main(replace(config, fluency=WORLD / "model"))
    assert (tmp_path / "mixed_1" / "sft-0" / "completions_after.jsonl").stat().st_mtime_ns == marked
    main(replace(config, seeds=2))  # new cells, and a row of two seeds, of which one is marked
    text, found = (tmp_path / "grid.md").read_text(), json.loads((tmp_path / "grid.json").read_text())
    assert "| mixed_1 | – | – | 0.0 / 0.0 / 0.0 |" in text and len(found["mixed_1"][1]["seeds"]) == 2
    with pytest.raises(DataError, match="base-0: expected lr 0.1, found a cell of 0.002; another --out, or delete it"):
        main(replace(config, lr=0.1))


def test_every_attack_has_its_data_and_unknown_names_are_refused(tmp_path):
    assert all((WORLD / f"{attack}.jsonl").exists() for attack in ATTACKS) and len(METHODS) == 13
    for wrong in (dict(methods="sft,magic"), dict(methods="0..x"), dict(methods="0.5..0.1"), dict(methods="0..1.0"), dict(methods="0..1+1"), dict(methods="0..1.2.3"), dict(attacks="none_such"), dict(seeds=0)):
        with pytest.raises(DataError, match=f"--{next(iter(wrong))}: expected"):
            main(GridConfig(out=tmp_path / "g", **wrong))
