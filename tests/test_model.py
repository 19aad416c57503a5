"""model.py against transformers (golden vectors), against itself (padding, cache, LoRA, files), and against broken checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_module
from conftest import DEVICE, assert_near, hidden_states, load_adapter, load_model, policy, tolerance
from data.chat import Chat
from data.conversations import WORLD
from lib.checkpoint import fingerprint
from lib.files import DataError, ModelError
from model import (add_lora, compile_blocks, generate, rope_frequencies, sample, save_adapter,
                   save_model, working_dtype)

GOLDEN = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/golden.safetensors"))
FAMILIES = {json.loads((path / "config.json").read_text())["model_type"]: path for path in GOLDEN}


def edited(source, target, config=None, tensors=None):
    """A copy of a checkpoint with some config keys (None: removed) and tensors (None: removed) changed."""
    shutil.copytree(source, target)
    raw = json.loads((target / "config.json").read_text()) | (config or {})
    (target / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    weights = load_file(target / "model.safetensors") | (tensors or {})
    save_file({key: value for key, value in weights.items() if value is not None}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
class TestParityWithTransformers:
    def test_hidden_states_logits_and_greedy_tokens(self, path):
        golden, model = load_file(path / "golden.safetensors"), load_model(path)
        ids, mask = golden["input_ids"].to(DEVICE), golden["attention_mask"].to(DEVICE)
        real = golden["attention_mask"].bool()
        assert_near(hidden_states(model, ids, mask).cpu()[:, real], golden["hidden_states"][:, real])
        assert_near(model(ids, mask).cpu()[real], golden["logits"][real])
        object.__setattr__(model.config, "eos_token_ids", ())  # the golden continuations run on past EOS
        longest = 14 if model.config.rope["rope_type"] == "longrope" else None
        prompts = [row[keep][:longest].tolist() for row, keep in zip(golden["input_ids"], real)]
        assert generate(model, prompts, 8) == golden["generated"].tolist()

    def test_padding_and_batch_mates_change_nothing(self, path):
        model = load_model(path)
        rows = [torch.randint(3, 96, (n,)) for n in (20, 3, 11)]
        alone = [model(row[None].to(DEVICE))[0] for row in rows]
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, 24, dtype=torch.long), torch.zeros(3, 24, dtype=torch.bool)
            for i, row in enumerate(rows):
                span = slice(24 - len(row), 24) if side == "left" else slice(0, len(row))
                ids[i, span], mask[i, span] = row, True
            logits = model(ids.to(DEVICE), mask.to(DEVICE)).cpu()
            for i, expected in enumerate(alone):
                assert_near(logits[i][mask[i]], expected)

    def test_models_and_lora_on_every_linear_round_trip(self, path, tmp_path):
        model, ids = load_model(path), torch.arange(3, 15, device=DEVICE)[None]
        save_model(model, tmp_path / "copy")
        saved, original = load_file(tmp_path / "copy" / "model.safetensors"), load_file(path / "model.safetensors")
        assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in saved)
        assert torch.equal(load_model(tmp_path / "copy")(ids), model(ids))
        before = model(ids)
        add_lora(model, r=4, alpha=8)
        assert torch.equal(model(ids), before)  # B starts at zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        adapted = model(ids)
        assert (adapted - before).abs().max() > 1e-2
        with model.adapters_off():
            assert torch.equal(model(ids), before)
        save_adapter(model, tmp_path / "adapter")
        keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
        assert len(keys) == 2 * 3 * len(model.lora["target_modules"]) and all(key.startswith("base_model.model.model.layers.") for key in keys)
        again = load_model(path)
        load_adapter(again, tmp_path / "adapter")
        assert torch.equal(again(ids), adapted)
        save_model(model, tmp_path / "merged")
        assert_near(load_model(tmp_path / "merged")(ids), adapted)


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_layers_are_pooled_one_by_one(self, family):
        model, ids = load_model(FAMILIES[family]), torch.randint(3, 96, (2, 9)).to(DEVICE)
        every = hidden_states(model, ids)
        assert every.shape == (4, 2, 9, 32)
        assert torch.equal(every[0], model.model.embed_tokens(ids))
        assert torch.equal(torch.stack(model.model(ids, pool=lambda x: x[:, -1])[1]), every[:, :, -1])

    def test_gradient_checkpointing_changes_no_gradient_and_runs_a_block_again_in_the_backward_pass(self, family):
        grads = []
        for checkpointing in (False, True):
            model, calls = load_model(FAMILIES[family]), []
            add_lora(model, r=2, alpha=4)
            model.model.gradient_checkpointing = checkpointing
            model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
            model(torch.arange(3, 12, device=DEVICE)[None]).square().mean().backward()
            grads.append([p.grad for _, p in sorted(model.named_parameters()) if p.requires_grad])
            assert calls.count(True) == (2 if checkpointing else 1)
        assert all(torch.equal(a, b) for a, b in zip(*grads)) and any(g.abs().max() > 0 for g in grads[0])

    def test_bfloat16_stays_near_float32(self, family):
        ids = torch.randint(3, 96, (2, 16)).to(DEVICE)
        wide, narrow = (load_model(FAMILIES[family], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        assert narrow.lm_head.weight.dtype == torch.bfloat16 and narrow.model.inv_freq.dtype == torch.float32
        assert (narrow(ids).float() - wide(ids)).norm() / wide(ids).norm() < tolerance(torch.bfloat16)


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_compiled_equals_eager(family):
    model, ids, mask = load_model(FAMILIES[family]), torch.randint(3, 96, (3, 11)).to(DEVICE), torch.ones(3, 11, device=DEVICE)
    mask[1, 7:] = 0
    add_lora(model, r=2, alpha=4)
    names, eager = list(model.state_dict()), model(ids, mask)
    compile_blocks(model, backend="eager")
    assert_near(model(ids, mask), eager)
    assert list(model.state_dict()) == names


class TestGenerate:
    def test_samples_follow_the_softmax_and_the_seed(self):
        logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=DEVICE).expand(20000, -1)
        for temperature in (0.5, 1.0):
            drawn = sample(logits, temperature, torch.rand(20000, 1, dtype=torch.float64).to(DEVICE)).bincount(minlength=4) / 20000
            torch.testing.assert_close(drawn, (logits[0] / temperature).softmax(-1), atol=0.01, rtol=0)
        assert sample(logits, 0.0, None).unique().tolist() == [0]
        model = load_model(GOLDEN[0])
        # The first token's share begins at 0, the last one's ends at 1.
        ends = torch.tensor([[0.0], [1 - 2**-53]], dtype=torch.float64, device=DEVICE)
        assert sample(logits[:2], 1.0, ends).tolist() == [0, 3] and sample(logits[:1, [3, 0]] - 2000, 1.0, ends[:1]).tolist() == [0]
        one, same, other = (generate(model, [[3, 4]] * 4, 6, temperature=2.0, seeds=seeds)
                            for seeds in ([1, 2, 3, 4], [1, 2, 3, 4], [5, 2, 1, 4]))
        assert one == same and one[1] == other[1] and one[0] == other[2] and one[0] != other[0]

    @pytest.mark.parametrize("prompts, new", [([], 3), ([[]], 3), ([[3] * 120], 20)])
    def test_impossible_prompts_are_refused(self, prompts, new):
        with pytest.raises(ValueError, match="generate:"):
            generate(load_model(GOLDEN[0]), prompts, new)

    def test_eos_ids_come_from_both_files(self, tmp_path):
        folder = edited(GOLDEN[0], tmp_path / "m")
        (folder / "generation_config.json").write_text('{"eos_token_id": [7, 2, 9]}')
        assert load_model(folder).config.eos_token_ids == (2, 7, 9)


class TestCheckpoints:
    def test_sharded_and_single_file_are_the_same_model(self, tmp_path):
        path = FAMILIES["qwen2"]
        shutil.copytree(path, tmp_path / "m")
        weights = load_file(path / "model.safetensors")
        os.remove(tmp_path / "m" / "model.safetensors")
        names = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(sorted(weights))}
        for file in set(names.values()):
            save_file({key: weights[key] for key in weights if names[key] == file}, tmp_path / "m" / file)
        index = tmp_path / "m" / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": names}))
        ids = torch.arange(9, device=DEVICE)[None]
        assert torch.equal(load_model(tmp_path / "m")(ids), load_model(path)(ids))
        os.remove(tmp_path / "m" / "model-1.safetensors")
        with pytest.raises(DataError, match="model-1.safetensors"):
            load_model(tmp_path / "m")

    def test_every_wrong_key_is_listed(self, tmp_path):
        wrong = {"model.norm.weight": None, "model.extra": torch.zeros(1), "lm_head.weight": torch.zeros(3, 3),
                 "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
        with pytest.raises(ModelError) as error:
            load_model(edited(FAMILIES["mistral"], tmp_path / "m", tensors=wrong))
        text = str(error.value)
        assert 'Missing key(s) in state_dict: "model.norm.weight"' in text and 'Unexpected key(s) in state_dict: "model.extra"' in text
        assert "lm_head.weight: copying a param with shape torch.Size([3, 3])" in text and "rotary_emb" not in text and str(tmp_path) in text
        whole = {"model.norm.weight": torch.zeros(32, dtype=torch.int8)}
        with pytest.raises(ModelError, match="model.safetensors: expected .* floats, found: model.norm.weight of torch.int8"):
            load_model(edited(FAMILIES["mistral"], tmp_path / "n", tensors=whole))

    @pytest.mark.parametrize("change, words", [
        ({"model_type": "gpt2"}, "llama | mistral | qwen2 | qwen3 | phi3, found 'gpt2'"),
        ({"hidden_act": "gelu"}, "hidden_act: expected None | silu, found 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size: expected an integer from 1 to 10,000,000, found None"),
        ({"num_key_value_heads": 3}, "a divisor of num_attention_heads"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "default | linear | llama3 | longrope, found 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2}}, "found 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "llama3: original_max_position_embeddings: expected an integer"),
        ({"layer_types": ["full_attention", "odd"]}, "layer_types: expected full_attention alone"),
        ({"use_sliding_window": True}, "use_sliding_window: expected None | False, found True"),
        ({"dtype": "float8_e4m3fn"}, "None | float32 | bfloat16 | float16, found")])
    def test_unsupported_configs_are_named(self, tmp_path, change, words):
        with pytest.raises(ModelError) as error:
            load_model(edited(GOLDEN[0], tmp_path / "m", config=change))
        assert words in str(error.value) and "config.json" in str(error.value)

    def test_nothing_is_unpickled_and_broken_files_are_named(self, tmp_path):
        folder = edited(GOLDEN[0], tmp_path / "m")
        os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
        with pytest.raises(DataError, match="model.safetensors: expected a file, found nothing"):
            load_model(folder)
        (folder / "model.safetensors").write_bytes(b"not a checkpoint")
        with pytest.raises(ModelError, match="model.safetensors: expected a safetensors file"):
            load_model(folder)
        with pytest.raises(ModelError, match="config.json: not found"):
            load_model(tmp_path / "nowhere")
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match="config.json: expected JSON"):
            load_model(folder)

    def test_training_in_place_never_reaches_the_file(self, tmp_path):
        folder = edited(GOLDEN[0], tmp_path / "m")
        before = (folder / "model.safetensors").read_bytes()
        for parameter in load_model(folder, device="cpu").parameters():  # on the CPU a file may be mapped
            parameter.data.add_(1)
        assert (folder / "model.safetensors").read_bytes() == before

    def test_a_model_is_never_written_over_another(self, tmp_path):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "file").touch()
        with pytest.raises(FileExistsError, match="exists already"):
            save_model(load_model(GOLDEN[0]), tmp_path / "x")
        assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]

    def test_the_fingerprint_follows_weights_and_config(self, tmp_path):
        original = fingerprint(GOLDEN[0])
        weight = load_file(GOLDEN[0] / "model.safetensors")["model.norm.weight"]
        weight[0] += 1e-6
        assert fingerprint(edited(GOLDEN[0], tmp_path / "a", tensors={"model.norm.weight": weight})) != original
        assert fingerprint(edited(GOLDEN[0], tmp_path / "b", config={"hidden_act": "silu", "unknown": 1})) != original
        assert fingerprint(GOLDEN[0]) == original

    def test_loading_needs_little_more_memory_than_the_checkpoint(self, tmp_path):
        """Peak resident set of a process that loads 64 MB, less that of one that loads 2 MB; on the CPU, whose memory this is."""
        root, folder = Path(__file__).parent.parent, tmp_path / "big"
        config = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64}
        shutil.copytree(WORLD / "model", folder)
        os.remove(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        model = model_module.Transformer(model_module.read_config(folder)).to(torch.bfloat16)
        save_model(model, tmp_path / "weights")
        os.rename(tmp_path / "weights" / "model.safetensors", folder / "model.safetensors")
        peaks = []
        for path in (WORLD / "model", folder):
            script = f"import resource; from model import load_model; load_model({str(path)!r}, 'cpu')\n"
            script += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
            peaks.append(int(subprocess.run([sys.executable, "-c", script], check=True, cwd=root, capture_output=True, text=True).stdout))
        assert peaks[1] - peaks[0] <= 1.1 * (folder / "model.safetensors").stat().st_size


class TestLoRA:
    def test_it_is_the_formula(self):
        model = load_model(GOLDEN[0])
        add_lora(model, r=3, alpha=6)
        linear, x = model.model.layers[1].self_attn.q_proj, torch.randn(5, 32).to(DEVICE)
        linear.lora_B.data.normal_()
        expected = x @ linear.weight.T + (6 / 3) * x @ linear.lora_A.T @ linear.lora_B.T
        assert_near(linear(x), expected)
        assert model.lm_head.lora_A is None and all(p.requires_grad == ("lora" in n) for n, p in model.named_parameters())

    def test_adapters_are_float32_over_bfloat16_weights(self):
        model = load_model(GOLDEN[0], dtype=torch.bfloat16)
        add_lora(model, r=2, alpha=2)
        assert all(p.dtype == (torch.float32 if "lora" in n else torch.bfloat16) for n, p in model.named_parameters())
        assert model(torch.arange(9, device=DEVICE)[None]).dtype == torch.bfloat16

    def test_an_adapter_is_never_written_over_another_and_is_no_checkpoint(self, tmp_path):
        model, folder = load_model(GOLDEN[0]), tmp_path / "adapter"
        add_lora(model, 2, 2)
        save_adapter(model, folder)
        with pytest.raises(FileExistsError, match="exists already"):
            save_adapter(model, folder)
        for read in (load_model, Chat):
            with pytest.raises(ModelError, match=r"found a PEFT adapter: merge it .* merge_and_unload\(\)"):
                read(folder)


def test_rope_default_is_the_closed_form():
    config = load_model(GOLDEN[0]).config
    inv_freq, scaling = rope_frequencies(config.rope, config.head_dim)
    expected = [config.rope["rope_theta"] ** (-2 * i / config.head_dim) for i in range(config.head_dim // 2)]
    torch.testing.assert_close(inv_freq[0].tolist(), expected, atol=1e-7, rtol=1e-6)
    assert scaling == 1.0


class TestDtype:
    def test_auto_is_float32_on_the_cpu_and_what_is_typed_holds(self):
        assert working_dtype("cpu") == torch.float32 and working_dtype("cpu", "bfloat16") == torch.bfloat16

    def test_gradients_in_bfloat16_are_float32s_to_its_rounding(self):
        """Attention's backward pass runs in float32 on the CPU: the same function, more exactly."""
        grads = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = policy(dtype=dtype)
            model(torch.arange(40, device=DEVICE)[None])[0].float().log_softmax(-1)[:, 7].sum().backward()
            grads[dtype] = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        assert torch.cosine_similarity(*grads.values(), dim=0) > 0.995


def test_a_snapshot_of_the_hubs_cache_is_a_checkpoint_and_so_is_a_linked_folder(tmp_path):
    """A snapshot holds links to files that are named by their hashes."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0f3a"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate((WORLD / "model").iterdir()):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        model, chat = load_model(path), Chat(path)
        assert torch.equal(model.lm_head.weight, load_model(WORLD / "model").lm_head.weight)
        assert fingerprint(path) == fingerprint(WORLD / "model") and chat.fingerprint == Chat(WORLD / "model").fingerprint
    save_model(model, tmp_path / "copy")
    assert not any(file.is_symlink() for file in (tmp_path / "copy").iterdir()) and (tmp_path / "copy" / "tokenizer.json").exists()
