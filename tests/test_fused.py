"""The fast objective against the one that is written out, and the cached reference against the live one."""

import random
import threading
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from conftest import DEVICE, assert_near, load_model, policy, tolerance
from data.chat import IGNORE, Chat, Example, batches_by_length, encode_examples
from data.conversations import WORLD, read_conversations
from lib import fused
from lib.files import DataError
from lib.fused import reference_terms
from lib.response import response_states
from train import TrainConfig, blend, live_reference, micro_batch_loss, reference_of

GOLDEN = Path(__file__).parent / "golden"
CONFIG = TrainConfig(device=DEVICE)


def tokens(n, m, dtype=torch.float32, vocabulary=50, size=12):
    """(hidden, weight, labels, alpha, beta, ref_hidden) of n tokens, the first m of which are pulled."""
    risk = torch.rand(n) * (torch.arange(n) < m)
    hidden, weight = torch.randn(n, size), torch.randn(vocabulary, size)
    ref_hidden = hidden[:m] + 0.1 * torch.randn(m, size)
    batch = hidden.to(dtype), weight.to(dtype), torch.randint(vocabulary, (n,)), 1 - risk, risk, ref_hidden.to(dtype)
    return tuple(tensor.to(DEVICE) for tensor in batch)


def value_and_grad(token_loss, hidden, *rest, **more):
    hidden = hidden.clone().requires_grad_()
    loss, nll, kl = token_loss(hidden, *rest, **more)
    (loss * torch.linspace(1, 2, len(loss), device=DEVICE)).sum().backward()
    return loss.detach(), nll, kl, hidden.grad


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
class TestTokenLoss:
    @pytest.mark.parametrize("n, m", [(1, 0), (1, 1), (16, 16), (17, 16), (40, 0), (40, 5), (40, 20), (47, 47)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_live_and_cached_equal_the_definition(self, n, m, dtype):
        batch = tokens(n, m, dtype)
        definition = value_and_grad(train.token_loss, *batch)
        live = value_and_grad(fused.token_loss, *batch)
        terms = reference_terms(batch[-1], batch[1], batch[2][:m])
        cached = value_and_grad(fused.token_loss, *batch[:-1], terms)
        for found in (live, cached):
            for a, b in zip(found, definition, strict=True):
                assert_near(a, b)

    def test_no_tokens_no_loss(self):
        loss, _, _, gradient = value_and_grad(fused.token_loss, *tokens(0, 0))
        assert loss.shape == (0,) and gradient.shape == (0, 12)

    def test_extreme_logits_stay_finite(self):
        hidden, weight, labels, alpha, beta, ref = tokens(20, 20)
        for found in value_and_grad(fused.token_loss, hidden * 1e4, weight, labels, alpha, beta, ref * -1e4):
            assert found.isfinite().all()

    def test_the_policy_that_is_the_reference_has_no_kl(self):
        """Live exactly; cached to float32's rounding, however coarse the stored vector."""
        for dtype in (torch.float32, torch.bfloat16):
            hidden, weight, labels, alpha, beta, _ = tokens(40, 40, dtype)
            assert fused.token_loss(hidden, weight, labels, alpha, beta, hidden)[2].abs().max() == 0
            terms = reference_terms(hidden, weight, labels)
            assert fused.token_loss(hidden, weight, labels, alpha, beta, terms)[2].abs().max() < tolerance()

    def test_the_error_of_bfloat16(self):
        """Against float64 on the same bfloat16 numbers. Rounding a gradient once costs 2⁻⁹ = 0.2 %; rounding logits costs 1.7 % here."""
        batch = tokens(64, 64, torch.bfloat16, vocabulary=2000, size=64)
        hidden, weight, labels, alpha, beta, ref = batch
        exact = value_and_grad(train.token_loss, *(t.double() if t.is_floating_point() else t for t in batch))

        def rounded(hidden, weight, labels, alpha, beta, ref):
            logits, ref_logits = hidden @ weight.T, ref @ weight.T
            kl = train.token_kl(ref_logits, logits)
            return alpha * train.token_nll(logits, labels) + beta * kl, kl, kl

        error = {}
        terms = reference_terms(ref, weight, labels)
        for name, found in {"live": value_and_grad(fused.token_loss, *batch), "rounded": value_and_grad(rounded, *batch),
                            "cached": value_and_grad(fused.token_loss, *batch[:-1], terms)}.items():
            error[name] = ((found[3].double() - exact[3]).norm() / exact[3].norm()).item(), (found[2] - exact[2]).abs().max().item()
        live, cached = (0.0033, 0.004) if fused.products_in_float32(weight.device) else (0.0026, 0.0033)  # p is rounded too, or not
        assert error["live"][0] < live and error["cached"][0] < cached and error["rounded"][0] > 0.01  # of the gradient, relative
        assert error["live"][1] < tolerance() and error["cached"][1] < 0.01 and error["rounded"][1] > 0.03  # of KL, nats

    def test_both_forms_of_a_bfloat16_product_agree(self, monkeypatch):
        """Float32 results of bfloat16 matrices, as a GPU gives them, against float32 matrices of the same numbers."""
        batch, mm = tokens(40, 20, torch.bfloat16), torch.mm
        monkeypatch.setattr(fused, "products_in_float32", lambda device: False)
        plain = value_and_grad(fused.token_loss, *batch)
        kinds = []

        def mm_with_float32_results(a, b, out_dtype=None, out=None):
            kinds.append((a.dtype, b.dtype))
            return mm(a.float(), b.float(), out=out)

        monkeypatch.setattr(torch, "mm", mm_with_float32_results)
        monkeypatch.setattr(fused, "products_in_float32", lambda device: True)
        loss, nll, kl, gradient = value_and_grad(fused.token_loss, *batch)
        assert set(kinds) == {(torch.bfloat16, torch.bfloat16)}
        for found, expected in zip((loss, nll, kl), plain):
            assert_near(found, expected)
        assert (gradient - plain[3]).norm() / plain[3].norm() < 0.005  # p too is rounded to bfloat16, once

    def test_where_no_product_has_float32_results_the_head_is_widened_and_one_line_says_so(self, monkeypatch, capsys):
        """On the meta device, which stands for a GPU here: shapes and dtypes without numbers."""
        kinds, refuses = [], True

        def mm(a, b, out, out_dtype=None):
            if out_dtype and refuses:
                raise RuntimeError("no such product\nand much more")
            kinds.append(a.dtype)
            return out

        monkeypatch.setattr(torch, "mm", mm)
        said = ("bfloat16 products with float32 results: not on this torch and device (no such product); "
                "the head is held in float32 beside its weights\n")
        batch = [t.to("meta") for t in tokens(40, 20, torch.bfloat16)]
        for refuses, dtype, line in ((True, torch.float32, said), (False, torch.bfloat16, "")):
            kinds.clear()
            fused.products_in_float32.cache_clear()
            for _ in range(2):
                fused.token_loss(*batch)
            assert set(kinds) == {dtype} and capsys.readouterr().out == line
        fused.products_in_float32.cache_clear()
        assert not fused.products_in_float32(torch.device("cpu")) and not capsys.readouterr().out

    def test_logits_exist_for_one_chunk_only(self):
        class Largest(TorchDispatchMode):
            numbers = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, (tuple, list)) else [out]:
                    if isinstance(tensor, torch.Tensor):
                        self.numbers = max(self.numbers, tensor.numel())
                return out

        batch = tokens(100, 100, vocabulary=1000)
        with Largest() as largest:
            value_and_grad(fused.token_loss, *batch)
        assert largest.numbers == 1000 * 16  # a chunk's logits

    def test_a_head_that_is_trained_is_refused(self):
        hidden, weight, *rest = tokens(4, 4)
        with pytest.raises(ValueError, match="frozen head"):
            fused.token_loss(hidden, weight.requires_grad_(), *rest)


# ---------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def examples():
    chat = Chat(WORLD / "model")
    return encode_examples(chat, read_conversations(WORLD / "mixed_10.jsonl")[:24], 256)


def gradients(model, examples, alpha, beta, cache=None, **more):
    model.zero_grad()
    reference, n_tokens = cache.terms if cache else live_reference(model), sum(e.n_labels for e in examples)
    loss, nll, kl = micro_batch_loss(model, reference, examples, alpha, beta, n_tokens, **more)
    loss.backward()
    return (loss.item(), nll.item(), kl.item()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def new_cache(folder, model, examples, batch_size=5):
    batches = batches_by_length([len(e.input_ids) for e in examples], batch_size)
    return fused.ReferenceCache(folder, model, [[examples[i] for i in batch] for batch in batches])


def cache_of(folder, model, examples, batch_size=5, computed=None):
    """A cache that is filled; the examples of each batch that had to be computed are appended to `computed`."""
    def states(batch):
        if computed is not None:
            computed.append({e.index for e in batch})
        return response_states(model, batch)[:2]

    with torch.no_grad(), model.adapters_off():
        return new_cache(folder, model, examples, batch_size).fill(states, model.lm_head.weight)


class TestLoraGradients:
    """Relative error of all LoRA gradients together, in float32: at most 1e-5 (on a GPU 1e-4)."""

    def check(self, model, examples, risk, tmp_path, beta=(0.1, 0.9)):
        alpha, beta = blend(risk, *beta)
        values, definition = gradients(model, examples, alpha, beta, loss_fn=train.token_loss)
        pulled = [e for e, b in zip(examples, beta) if b > 0]
        for cache in (None, *([cache_of(tmp_path, model, pulled)] if pulled else [])):
            found, gradient = gradients(model, examples, alpha, beta, cache=cache)
            assert found == pytest.approx(values, rel=tolerance(), abs=10 * tolerance())
            assert (gradient - definition).norm() / definition.norm() < tolerance()

    @pytest.mark.parametrize("risk", ["graded", "closed gate", "sft", "all risky"])
    def test_of_the_embedded_model(self, examples, tmp_path, risk):
        s = {"graded": torch.rand(8), "closed gate": torch.arange(8) % 2.0, "sft": torch.zeros(8), "all risky": torch.ones(8)}[risk]
        self.check(policy(), examples[:8], s, tmp_path, (0.0, 1.0) if risk in ("closed gate", "sft", "all risky") else (0.1, 0.9))

    @pytest.mark.parametrize("family", sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists()))
    def test_of_every_family(self, tmp_path, family):
        batch = [Example(i, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n))) for i, n in enumerate((10, 20, 14))]
        self.check(policy(GOLDEN / family, dtype=torch.float32), batch, torch.tensor([0.0, 0.4, 1.0]), tmp_path)

    def test_of_a_row_without_a_response_are_finite(self, examples, tmp_path):
        masked = Example(99, examples[0].input_ids, [IGNORE] * len(examples[0].input_ids))
        model, alpha, beta = policy(), torch.full((3,), 0.5), torch.full((3,), 0.5)
        with_it = gradients(model, [examples[0], masked, examples[1]], alpha, beta)
        without = gradients(model, examples[:2], alpha[:2], beta[:2])
        assert with_it[0] == pytest.approx(without[0], rel=tolerance() / 10)
        assert torch.allclose(with_it[1], without[1], rtol=tolerance(), atol=tolerance() / 100)
        loss, _, _ = micro_batch_loss(model, live_reference(model), [masked], alpha[:1], beta[:1], 1)
        loss.backward()
        assert loss.item() == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def model():
    return policy()


@pytest.fixture(scope="module")
def whole(model, examples, tmp_path_factory):
    """(a filled cache, its file's bytes, each example's part of them)."""
    cache = cache_of(tmp_path_factory.mktemp("whole"), model, examples)
    parts = {index: slice(rows.start, rows.stop + 32) for index, rows in cache.place.items()}
    return cache, cache.file.read_bytes(), parts


@pytest.fixture
def check(model, whole, examples, tmp_path, capsys):
    """check(content, bad, damaged): a run that finds `content` computes the batches of the examples `bad`, and no others,
    says that `damaged` parts are, and has the same file and terms as a new one."""
    cache, expected, _ = whole

    def function(content, bad, damaged):
        (tmp_path / cache.file.name).write_bytes(content)
        computed = []
        capsys.readouterr()
        again = cache_of(tmp_path, model, examples, computed=computed)
        batches = [{e.index for e in batch} for batch in cache.batches]
        assert computed == [batch for batch in batches if batch & bad]
        assert again.file.read_bytes()[: cache.size] == expected
        assert all(torch.equal(a, b) for a, b in zip(again.terms(examples), cache.terms(examples)))
        lines = [f"{again.file}: {damaged} of 24 parts are damaged: computed again\n"] * (damaged > 0)
        lines += [f"reference cache: {cache.n_tokens} response tokens, {cache.size / 1e6:.1f} MB in {again.file}\n"] * (damaged < len(bad))
        assert capsys.readouterr().out == "".join(lines)

    return function


class TestReferenceCache:
    def test_parts_follow_each_other(self, whole):
        cache, expected, parts = whole
        starts, stops = [part.start for part in parts.values()], [part.stop for part in parts.values()]
        assert [*starts, cache.size] == [0, *stops] and len(expected) == cache.size

    def test_a_file_that_was_cut_anywhere_is_finished_to_the_same_bytes(self, check, whole):
        cache, expected, parts = whole
        for size in (0, 1, 5000, cache.size // 2 + 3, parts[cache.batches[2][0].index].start, cache.size - 1, cache.size):
            check(expected[:size], {index for index, part in parts.items() if part.stop > size}, 0)

    def test_a_file_of_zeros_is_computed_again(self, check, whole):
        check(bytes(whole[0].size), set(whole[2]), 24)

    def test_a_page_of_zeros_is_computed_again(self, check, whole):
        _, expected, parts = whole
        torn = {index for index, part in parts.items() if part.start < 20480 and part.stop > 16384}
        check(expected[:16384] + bytes(4096) + expected[20480:], torn, len(torn))

    def test_one_flipped_bit_anywhere_is_noticed(self, check, whole):
        cache, expected, parts = whole
        draw, rows, sums = random.Random(0), list(parts.items())[::2], list(parts.items())[1::2]
        places = [(index, draw.randrange(part.start, part.stop - 32)) for index, part in rows]
        places += [(index, draw.randrange(part.stop - 32, part.stop)) for index, part in sums]
        for index, place in [*places, (rows[0][0], 0), (sums[-1][0], cache.size - 1)]:
            flipped = bytearray(expected)
            flipped[place] ^= 1 << draw.randrange(8)
            check(flipped, {index}, 1)

    def test_damage_in_an_unfinished_file_is_said_too(self, check, whole):
        cache, expected, parts = whole
        flipped = bytearray(expected[: cache.size // 2])
        flipped[100] ^= 1
        check(flipped, {index for index, part in parts.items() if part.start <= 100 or part.stop > len(flipped)}, 1)

    def test_what_is_behind_the_last_part_is_not_read(self, check, whole):
        check(whole[1] + b"more", set(), 0)

    def test_parts_of_one_size_that_changed_places_are_noticed(self, check, whole):
        _, expected, parts = whole
        a, b = next((a, b) for a, b in combinations(parts, 2) if len(expected[parts[a]]) == len(expected[parts[b]]))
        swapped = bytearray(expected)
        swapped[parts[a]], swapped[parts[b]] = expected[parts[b]], expected[parts[a]]
        check(swapped, {a, b}, 2)

    def test_the_content_of_another_file_is_noticed(self, check, model, whole, examples, tmp_path_factory):
        """One token of one prompt is another: as many rows everywhere, and most of them the same."""
        cache, expected, parts = whole
        changed = replace(examples[0], input_ids=[examples[0].input_ids[0] + 1, *examples[0].input_ids[1:]])
        other = cache_of(tmp_path_factory.mktemp("other"), model, [changed, *examples[1:]])
        content, last = other.file.read_bytes(), parts[cache.batches[-1][-1].index]
        assert other.file.name != cache.file.name and content[last][:-32] == expected[last][:-32]
        check(content, set(parts), 24)

    def test_batches_of_any_size_share_a_file(self, model, whole, examples, tmp_path):
        cache, expected, _ = whole
        tmp_path.joinpath(cache.file.name).write_bytes(bytes([expected[0] ^ 1]) + expected[1:])
        computed = []
        again = cache_of(tmp_path, model, examples, batch_size=3, computed=computed)
        assert computed == [{e.index for e in again.batches[0]}]
        for found, wanted in zip(again.terms(examples), cache.terms(examples)):
            torch.testing.assert_close(found, wanted, rtol=0.13 * tolerance(), atol=tolerance())
        cache_of(tmp_path, model, examples, batch_size=7, computed=computed)
        assert len(computed) == 1

    def test_an_example_without_a_response_has_a_part_without_rows(self, model, examples, tmp_path):
        masked, computed = Example(99, examples[0].input_ids, [IGNORE] * len(examples[0].input_ids)), []
        for _ in range(2):
            cache = cache_of(tmp_path, model, [*examples[:3], masked], 2, computed)
        assert len(computed) == 2 and cache.terms([masked])[0].shape == (0, 128)
        assert len(cache.terms([examples[1], masked])[1]) == examples[1].n_labels

    def test_an_interrupted_fill_goes_on_where_it_ended(self, model, examples, tmp_path):
        calls = []

        def states(batch):
            calls.append(len(batch))
            if len(calls) == 3:
                raise KeyboardInterrupt
            with torch.no_grad(), model.adapters_off():
                return response_states(model, batch)[:2]

        with pytest.raises(KeyboardInterrupt):
            cache = new_cache(tmp_path, model, examples, 5)
            cache.fill(states, model.lm_head.weight)
        assert 0 < cache.file.stat().st_size < cache.size
        new_cache(tmp_path, model, examples, 5).fill(states, model.lm_head.weight)
        assert len(calls) == 6 and cache.file.stat().st_size == cache.size  # 24 examples: 5 batches, one of them tried twice

    def test_a_finished_file_is_never_computed_again(self, model, examples, tmp_path):
        first = cache_of(tmp_path, model, examples)
        again = new_cache(tmp_path, policy(adapter=0.0), examples, 3)
        assert again.file == first.file
        again.fill(lambda batch: pytest.fail("computed again"), model.lm_head.weight)
        assert all(torch.equal(a, b) for a, b in zip(again.terms(examples[3:5]), first.terms(examples[3:5])))

    def test_a_second_run_waits_for_the_first_and_computes_nothing(self, examples, tmp_path, capsys):
        model, weight = policy(), load_model(WORLD / "model", dtype=torch.float32).lm_head.weight
        started, go_on, calls = threading.Event(), threading.Event(), []

        def states(batch):
            started.set()
            go_on.wait(20)
            calls.append(len(batch))
            n = sum(e.n_labels for e in batch)
            return torch.randn(n, 128).to(DEVICE), torch.ones(n, dtype=torch.long, device=DEVICE)

        def forbidden(batch):
            calls.append("the second run computes")

        caches = [new_cache(tmp_path, model, examples, 5) for _ in range(2)]
        threads = [threading.Thread(target=cache.fill, args=(function, weight)) for cache, function in zip(caches, (states, forbidden))]
        threads[0].start()
        assert started.wait(20)
        threads[1].start()
        while "waiting for another run" not in capsys.readouterr().out and threads[1].is_alive():
            time.sleep(0.01)
        assert threads[1].is_alive()
        go_on.set()
        for thread in threads:
            thread.join(20)
        assert sum(calls) == 24 and len(list(tmp_path.iterdir())) == 1
        assert torch.equal(caches[0].terms(examples)[0], caches[1].terms(examples)[0])

    def test_model_data_and_truncation_make_another_file(self, examples, tmp_path):
        model = policy()
        shorter = [replace(e, input_ids=e.input_ids[:-1], labels=e.labels[:-1]) for e in examples]
        masked = [replace(examples[0], labels=[IGNORE] + examples[0].labels[1:-1] + [IGNORE]), *examples[1:]]
        others = [(model, examples), (model, shorter), (model, masked), (model, examples[:-1]), (policy(GOLDEN / "llama"), examples)]
        assert len({new_cache(tmp_path, m, e, 5).file for m, e in others}) == 5

    def test_no_room_is_an_error_before_anything_is_written(self, examples, tmp_path, monkeypatch):
        monkeypatch.setattr(fused.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(DataError, match="--ref cache: expected .* GB of room"):
            cache_of(tmp_path / "new", policy(), examples)
        assert not (tmp_path / "new").exists()

    def test_what_a_file_occupies_is_room_for_it(self, whole, examples, tmp_path, monkeypatch):
        cache, expected, _ = whole
        file = tmp_path / cache.file.name
        for missing, room in ((0, True), (900, True), (1100, False)):  # a file of its size is written in place
            monkeypatch.setattr(fused.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000 * (missing > 0)}))
            file.write_bytes(expected[: cache.size - missing])
            if room:
                cache_of(tmp_path, policy(), examples)
            else:
                with pytest.raises(DataError, match="--ref cache: expected"):
                    cache_of(tmp_path, policy(), examples)
        assert file.read_bytes() == expected[: cache.size - 1100]

    def test_the_size_is_printed_before_it_is_written(self, examples, tmp_path, capsys):
        cache = cache_of(tmp_path, policy(), examples)
        n_tokens = sum(e.n_labels for e in examples)
        assert cache.size == n_tokens * 4 * 129 + 24 * 32
        assert f"{n_tokens} response tokens, {cache.size / 1e6:.1f} MB" in capsys.readouterr().out


class TestWhichReference:
    def choose(self, examples, tmp_path, risk=None, model=None, **options):
        """The cache, "live", or None."""
        config = replace(CONFIG, ref_cache=tmp_path, **options)
        reference = reference_of(config, model or policy(), examples, torch.ones(24) if risk is None else risk)
        return getattr(reference, "__self__", "live") if reference else None

    def test_auto_keeps_what_several_epochs_use_and_half_the_free_disk_holds(self, examples, tmp_path, monkeypatch, capsys):
        size = self.choose(examples, tmp_path).size
        assert self.choose(examples, tmp_path, epochs=1) == self.choose(examples, tmp_path, ref="live") == "live"
        assert self.choose(examples, tmp_path, epochs=1, ref="cache").size == size
        for free, kept in ((2 * size, True), (2 * size - 1000, False)):
            monkeypatch.setattr(fused.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
            assert (self.choose(examples, tmp_path / str(free)) != "live") == kept
        assert "are over half of the free disk" in capsys.readouterr().out
        monkeypatch.setattr(fused.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
        assert self.choose(examples, tmp_path) != "live"  # what is there needs no room

    def test_only_what_is_pulled_is_kept(self, examples, tmp_path):
        risk = (torch.arange(24) % 4 == 0).double()
        closed = self.choose(examples, tmp_path, risk, beta_min=0.0, beta_max=1.0)
        assert set(closed.place) == {0, 4, 8, 12, 16, 20} and len(self.choose(examples, tmp_path, risk).place) == 24
        assert len(self.choose(examples, tmp_path, risk, beta_min=0.0, gate="batch").place) == 24
        assert self.choose(examples, tmp_path, 0 * risk, beta_min=0.0) is None
        assert self.choose(examples, tmp_path, method="sft") is self.choose(examples, tmp_path, method="csft") is None

    def test_full_fine_tuning_holds_a_second_model_only_when_live(self, examples, tmp_path):
        model = load_model(WORLD / "model", dtype=torch.float32)
        assert self.choose(examples, tmp_path, model=model, lora_r=0) != "live"
        reference = reference_of(replace(CONFIG, ref_cache=tmp_path, lora_r=0, ref="live"), model, examples, torch.ones(24))
        before = reference(examples[:3])
        for parameter in model.model.layers.parameters():
            parameter.data *= 1.1
        assert torch.equal(reference(examples[:3]), before)
