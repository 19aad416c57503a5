"""The fast objective against the definition, and the kept reference against the live one."""

import resource
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lib.reference
import train
from conftest import DEVICE, assert_near, fast_token_loss as fast, load_model, policy, tolerance
from data.chat import IGNORE, Example
from data.conversations import WORLD
from lib import fused
from lib.files import DataError
from lib.fused import response_states
from lib.reference import live_reference, n_bytes
from train import TrainConfig, blend, micro_batch_loss, open_reference

GOLDEN = Path(__file__).parent / "golden"


def tokens(n, m, dtype=torch.float32, vocabulary=50, size=12):
    """Return (hidden, weight, labels, alpha, beta, ref_hidden) of n tokens, the first m of which are pulled."""
    risk = torch.rand(n) * (torch.arange(n) < m)
    hidden, weight = torch.randn(n, size), torch.randn(vocabulary, size)
    ref_hidden = hidden[:m] + 0.1 * torch.randn(m, size)
    batch = hidden.to(dtype), weight.to(dtype), torch.randint(vocabulary, (n,)), 1 - risk, risk, ref_hidden.to(dtype)
    return tuple(tensor.to(DEVICE) for tensor in batch)


def value_and_grad(token_loss, hidden, *rest, **options):
    hidden = hidden.clone().requires_grad_()
    loss, nll, kl = token_loss(hidden, *rest, **options)
    (loss * torch.linspace(1, 2, len(loss), device=DEVICE)).sum().backward()
    return loss.detach(), nll, kl, hidden.grad


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(fused, "CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
class TestTokenLoss:
    @pytest.mark.parametrize("n, m", [(0, 0), (1, 0), (1, 1), (16, 16), (17, 16), (40, 0), (40, 20), (47, 47)])
    def test_it_equals_the_definition_in_float64(self, n, m):
        batch = tokens(n, m, torch.float64)
        results = value_and_grad(fast, *batch)
        for result, expected in zip(results, value_and_grad(train.token_loss, *batch), strict=True):
            torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
        assert results[3].shape == (n, 12) and (results[2] > -1e-12).all()

    def test_extreme_logits_stay_finite(self):
        hidden, weight, labels, alpha, beta, ref = tokens(20, 20)
        for result in value_and_grad(fast, hidden * 1e4, weight, labels, alpha, beta, ref * -1e4):
            assert result.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_policy_that_is_the_reference_has_no_kl_however_coarse_the_stored_vectors(self, dtype):
        hidden, weight, labels, alpha, beta, _ = tokens(40, 40, dtype)
        assert fast(hidden, weight, labels, alpha, beta, hidden, dtype=dtype)[2].abs().max() < tolerance()

    def test_the_error_of_bfloat16(self):
        """Oracle: float64 on the same bfloat16 numbers. Logits rounded to bfloat16 cost 1.7 % of the gradient here."""
        batch = tokens(64, 64, torch.bfloat16, vocabulary=2000, size=64)
        exact = value_and_grad(train.token_loss, *(t.double() if t.is_floating_point() else t for t in batch))

        def rounded(hidden, weight, labels, alpha, beta, ref):
            logits, ref_logits = hidden @ weight.T, ref @ weight.T
            kl = train.token_kl(ref_logits, logits)
            return alpha * train.token_nll(logits, labels) + beta * kl, kl, kl

        error = {}
        for name, result in {"live": value_and_grad(fast, *batch), "rounded": value_and_grad(rounded, *batch),
                             "kept": value_and_grad(fast, *batch, dtype=torch.bfloat16)}.items():
            gradient = ((result[3].double() - exact[3]).norm() / exact[3].norm()).item()
            error[name] = gradient, (result[2] - exact[2]).abs().max().item()
        p_is_rounded = fused.bfloat16_products_in_float32(batch[1].device)
        assert error["live"][0] < (0.0033 if p_is_rounded else 0.0026) and error["live"][1] < tolerance()
        assert error["kept"][0] < (0.004 if p_is_rounded else 0.0033) and error["kept"][1] < 0.01
        assert error["rounded"][0] > 0.01 and error["rounded"][1] > 0.03

    def test_both_forms_of_a_bfloat16_product_agree(self, monkeypatch):
        """Float32 results of bfloat16 matrices, as a GPU gives them, against float32 matrices of the same numbers."""
        batch, mm, dtypes = tokens(40, 20, torch.bfloat16), torch.mm, set()
        monkeypatch.setattr(fused, "bfloat16_products_in_float32", lambda device: False)
        plain = value_and_grad(fast, *batch)

        def mm_with_float32_results(a, b, out_dtype=None, out=None):
            dtypes.add((a.dtype, b.dtype))
            return mm(a.float(), b.float(), out=out)

        monkeypatch.setattr(torch, "mm", mm_with_float32_results)
        monkeypatch.setattr(fused, "bfloat16_products_in_float32", lambda device: True)
        loss, nll, kl, gradient = value_and_grad(fast, *batch)
        assert dtypes == {(torch.bfloat16, torch.bfloat16)}
        assert_near(loss, plain[0], torch.bfloat16)
        assert_near(nll, plain[1])
        assert_near(kl, plain[2], torch.bfloat16)
        assert (gradient - plain[3]).norm() / plain[3].norm() < 0.005  # p too is rounded to bfloat16, once

    def test_a_device_without_float32_results_copies_the_head_and_says_so_once(self, monkeypatch, capsys):
        """The meta device stands for a GPU: shapes and dtypes without numbers."""
        dtypes, has_kernel = [], False

        def mm(a, b, out, out_dtype=None):
            if out_dtype and not has_kernel:
                raise RuntimeError("no such product")
            dtypes.append(a.dtype)
            return out

        monkeypatch.setattr(torch, "mm", mm)
        batch = [t.to("meta") for t in tokens(40, 20, torch.bfloat16)]
        for has_kernel, dtype in ((False, torch.float32), (True, torch.bfloat16)):
            dtypes.clear()
            fused.bfloat16_products_in_float32.cache_clear()
            for _ in range(2):
                fast(*batch)
            assert set(dtypes) == {dtype} and capsys.readouterr().out.count("copied to float32") == (not has_kernel)
        fused.bfloat16_products_in_float32.cache_clear()

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
            value_and_grad(fast, *batch)
        assert largest.numbers == 1000 * 16

    def test_a_head_that_is_trained_is_refused(self):
        hidden, weight, *rest = tokens(4, 4)
        with pytest.raises(ValueError, match="frozen head"):
            fast(hidden, weight.requires_grad_(), *rest)


# ---------------------------------------------------------------- whole models


def definition(model, examples, alpha, beta):
    """Return (loss, Σ NLL, Σ KL) as written out: example by example, with all logits of both models."""
    sums, n_tokens = [0, 0, 0], sum(e.n_labels for e in examples)
    for example, a, b in zip(examples, alpha.to(DEVICE), beta.to(DEVICE)):
        hidden, labels, _ = response_states(model, [example])
        with torch.no_grad(), model.adapters_off():
            ref_hidden, _, _ = response_states(model, [example])
        pulled = len(labels) if b > 0 else 0
        parts = train.token_loss(hidden, model.lm_head.weight, labels, a, b, ref_hidden[:pulled])
        sums = [total + part.sum() for total, part in zip(sums, parts)]
    return sums[0] / n_tokens, sums[1], sums[2]


def values_and_gradients(model, loss, *sums):
    """Return the three numbers and the gradient of all adapters, as one vector."""
    model.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return [loss.item(), *(value.sum().item() for value in sums)], gradient


def kept_reference(folder, model, examples, batch_size=5):
    folder.mkdir(exist_ok=True)
    return lib.reference.kept_reference(folder / "reference.bin", model, examples, batch_size)


def expect_equal_to_the_definition(model, examples, risk, beta_range, folder):
    """Live and kept reference; the relative error of all adapter gradients together is at most 1e-5 (on a GPU 1e-4)."""
    alpha, beta = blend(risk, *beta_range)
    expected, expected_gradient = values_and_gradients(model, *definition(model, examples, alpha, beta))
    references = [live_reference(model)]
    if pulled := [e for e, b in zip(examples, beta) if b > 0]:
        references.append(kept_reference(folder, model, pulled))
    for reference in references:
        result = micro_batch_loss(model, reference, examples, alpha, beta, sum(e.n_labels for e in examples))
        values, gradient = values_and_gradients(model, *result)
        assert values == pytest.approx(expected, rel=tolerance(), abs=10 * tolerance())
        assert (gradient - expected_gradient).norm() / expected_gradient.norm() < tolerance()


@pytest.mark.parametrize("risk, beta_range", [(torch.linspace(0, 1, 8), (0.1, 0.9)), (torch.arange(8) % 2.0, (0.0, 1.0)),
                                              (torch.zeros(8), (0.0, 1.0)), (torch.ones(8), (0.0, 1.0))])
def test_a_micro_batch_equals_the_definition(model, examples, risk, beta_range, tmp_path):
    expect_equal_to_the_definition(model, examples[:8], risk, beta_range, tmp_path)


@pytest.mark.parametrize("family", sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists()))
def test_a_micro_batch_of_every_family_equals_the_definition(tmp_path, family):
    batch = [Example(i, list(range(3, 3 + n)), [IGNORE] * 4 + list(range(7, 3 + n))) for i, n in enumerate((10, 20, 14))]
    model = policy(GOLDEN / family, dtype=torch.float32)
    expect_equal_to_the_definition(model, batch, torch.tensor([0.0, 0.4, 1.0]), (0.1, 0.9), tmp_path)


def test_an_example_without_a_response_changes_nothing_and_its_gradient_is_finite(model, examples):
    masked = Example(99, examples[0].input_ids, [IGNORE] * len(examples[0].input_ids))
    half, reference = torch.full((3,), 0.5), live_reference(model)
    values, gradient = values_and_gradients(
        model, *micro_batch_loss(model, reference, [examples[0], masked, examples[1]], half, half, 9))
    expected, expected_gradient = values_and_gradients(
        model, *micro_batch_loss(model, reference, examples[:2], half[:2], half[:2], 9))
    assert values == pytest.approx(expected, rel=tolerance() / 10)
    assert torch.allclose(gradient, expected_gradient, rtol=tolerance(), atol=tolerance() / 100)
    values, gradient = values_and_gradients(model, *micro_batch_loss(model, reference, [masked], half[:1], half[:1], 1))
    assert values[0] == 0 and gradient.isfinite().all()


class TestKeptReference:
    @pytest.fixture
    def kept(self, model, examples, tmp_path):
        return kept_reference(tmp_path, model, examples)

    def test_its_terms_are_those_of_the_live_reference_in_any_order(self, model, examples, kept):
        for batch in (examples[:5], examples[9:4:-1], [examples[7]]):
            for stored, live in zip(kept(batch), live_reference(model)(batch), strict=True):
                assert_near(stored, live)

    def test_its_file_has_the_vectors_alone(self, model, examples, tmp_path, capsys):
        kept_reference(tmp_path, model, examples)
        size = sum(e.n_labels for e in examples) * 4 * 128
        assert f"reference: {size / 1e6:.1f} MB in {tmp_path / 'reference.bin'}" in capsys.readouterr().out
        assert size == n_bytes(model, examples) == (tmp_path / "reference.bin").stat().st_size

    def test_a_file_of_an_interrupted_run_is_written_anew(self, model, examples, kept, tmp_path):
        content = (tmp_path / "reference.bin").read_bytes()
        (tmp_path / "reference.bin").write_bytes(b"cut" + content[: len(content) // 2])
        kept_reference(tmp_path, model, examples)
        assert (tmp_path / "reference.bin").read_bytes() == content

    def test_a_disk_that_is_full_after_all_is_an_error_that_names_the_file(self, model, examples, tmp_path):
        limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
            with pytest.raises(OSError, match="reference.bin"):
                kept_reference(tmp_path, model, examples)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert not list(tmp_path.iterdir())

    def test_no_room_is_an_error_before_anything_is_written(self, model, examples, tmp_path, monkeypatch):
        monkeypatch.setattr(lib.reference.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(DataError, match="--ref keep: expected .* GB of room .*; use --ref live"):
            kept_reference(tmp_path, model, examples)
        assert not list(tmp_path.iterdir())


class TestWhichReference:
    def choose(self, examples, folder, risk=None, model=None, **options):
        """Return the indices of the examples whose terms are kept, "live", or None."""
        folder.mkdir(exist_ok=True)
        config = replace(TrainConfig(device=DEVICE, out=folder, epochs=20), **options)
        risk = torch.ones(24) if risk is None else risk
        indices = []

        def kept_reference(file, model, examples, batch_size):
            indices.extend(e.index for e in examples)
            return live_reference(model)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "kept_reference", kept_reference)
            reference = open_reference(config, model or policy(), examples, risk)
        return (indices or "live") if reference else None

    def test_auto_keeps_what_several_epochs_use_and_half_the_free_disk_holds(self, examples, tmp_path, monkeypatch):
        assert self.choose(examples, tmp_path) == self.choose(examples, tmp_path, epochs=1, ref="keep") == list(range(24))
        assert self.choose(examples, tmp_path, epochs=1) == self.choose(examples, tmp_path, ref="live") == "live"
        size = n_bytes(policy(), examples)
        for free, kept in ((2 * size, True), (2 * size - 1000, False)):
            monkeypatch.setattr(lib.reference.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
            assert (self.choose(examples, tmp_path / str(free)) != "live") == kept

    def test_only_examples_that_can_be_pulled_are_kept(self, examples, tmp_path):
        risk = (torch.arange(24) % 4 == 0).double()
        closed = self.choose(examples, tmp_path, risk, beta_min=0.0, beta_max=1.0)
        assert closed == [0, 4, 8, 12, 16, 20] and len(self.choose(examples, tmp_path, risk)) == 24
        assert len(self.choose(examples, tmp_path, risk, beta_min=0.0, gate="batch")) == 24
        assert self.choose(examples, tmp_path, 0 * risk, beta_min=0.0) is None
        assert self.choose(examples, tmp_path, method="sft") is self.choose(examples, tmp_path, method="csft") is None

    def test_full_fine_tuning_holds_a_second_model_only_when_live(self, examples, tmp_path):
        model = load_model(WORLD / "model", dtype=torch.float32)
        assert self.choose(examples, tmp_path, model=model, lora_r=0) != "live"
        config = TrainConfig(device=DEVICE, out=tmp_path, lora_r=0, ref="live", epochs=20)
        reference = open_reference(config, model, examples, torch.ones(24))
        before = reference(examples[:3])
        for parameter in model.model.layers.parameters():
            parameter.data *= 1.1
        assert all(torch.equal(a, b) for a, b in zip(reference(examples[:3]), before))
