"""tests/golden: its objective against closed forms, this project's functions, and made again; its trajectory; its chats.

Functions that compute in float64 give its numbers to 1e-10, in float32 to 1e-5: absolutely, or relatively where larger.
Two do not go so far in float64, and say so below: C-SFT's weight (1e-8) and the probe's solver (1e-8; as it is used, 1e-6).
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

import make_golden_objective
import train
from conftest import DEVICE, adapter_parameters, fast_token_loss as fast, read_rows, tolerance
from critic import GuardJudge, RubricJudge
from data.chat import Chat, Example
from data.conversations import Conversation
from data.order import step_examples
from lib import fused
from lib.baselines import ConstrainedSFT, csft_weight, lisa_pull, response_positions
from lib.fused import response_states
from lib.reference import live_reference
from model import Linear, Transformer, add_lora, linears, load_model, sample
from probe import Probe, fit_logistic

FILE = Path(__file__).parent / "golden" / "objective.safetensors"
G = load_file(FILE, DEVICE)
GATES = range(len(G["gate.range"]))
DTYPES = [torch.float64, torch.float32]
NEAR = {torch.float64: 1e-10, torch.float32: tolerance()}
N_TOKENS = int(G["batch.n_tokens"])


def of(section: str, dtype=torch.float64) -> SimpleNamespace:
    """A section's tensors by name, floating ones in `dtype`."""
    group = {key.split(".")[1]: value for key, value in G.items() if key.split(".")[0] == section}
    return SimpleNamespace(**{key: value.to(dtype) if value.is_floating_point() else value for key, value in group.items()})


def near(found, expected, limit: float = NEAR[torch.float64]):
    """Within `limit`, absolutely or relatively, as float64."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in (found, expected))
    torch.testing.assert_close(found, expected, atol=limit, rtol=limit, equal_nan=True)


# ---------------------------------------------------------------- this project's functions


class OneLayer(torch.nn.Module):
    """The file's model, made of this project's linear layers, in the form that the objective asks of a Transformer."""

    config, device, adapters_off = SimpleNamespace(rope={"rope_type": "default"}), torch.device(DEVICE), Transformer.adapters_off

    def __init__(self, dtype):
        super().__init__()
        m = of("model", dtype)
        self.embedding, self.linear, self.lm_head = m.embedding, Linear(5, 6), Linear(6, 11)
        self.linear.weight, self.lm_head.weight = (torch.nn.Parameter(w, requires_grad=False) for w in (m.linear, m.head))
        self.linear.lora_A, self.linear.lora_B = torch.nn.Parameter(m.lora_A), torch.nn.Parameter(m.lora_B)
        self.linear.scaling = m.lora_alpha.item() / 2

    def model(self, input_ids, attention_mask=None, rows=None):
        return self.linear(self.embedding[input_ids].flatten(0, 1)[rows]), None


EXAMPLES = [Example(i, ids[:n], labels[:n]) for i, (ids, labels, n) in enumerate(
    zip(*(G[f"batch.{name}"].tolist() for name in ("input_ids", "labels", "length"))))]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


class TestFunctions:
    def test_nll_and_kl(self, dtype):
        v = of("edge", dtype)
        near(train.token_nll(v.logits, v.labels), of("edge").nll, NEAR[dtype])
        near(train.token_kl(v.ref_logits, v.logits), of("edge").kl, NEAR[dtype])
        assert (train.token_kl(v.ref_logits, v.logits)[[1, 3]] == 0).all()

    @pytest.mark.parametrize("token_loss", [train.token_loss, fast], ids=["definition", "fused"])
    def test_token_loss_at_the_edges_and_its_gradient(self, token_loss, dtype):
        """With the identity as the head, hidden states are logits. Float32 terms lose the rows of ±1000: their sums cancel."""
        v, expected, eye = of("edge", dtype), of("edge"), torch.eye(5, device=DEVICE, dtype=dtype)
        rows = [i for i in range(9) if token_loss != fast or dtype == torch.float64 or i not in (4, 5)]
        logits, ref = v.logits[rows].requires_grad_(), v.ref_logits[rows]
        loss, nll, kl = token_loss(logits, eye, v.labels[rows], v.alpha[rows], v.beta[rows], ref)
        loss.sum().backward()
        for found, name in ((loss, "loss"), (nll, "nll"), (kl, "kl"), (logits.grad, "grad_logits")):
            near(found.detach(), getattr(expected, name)[rows], NEAR[dtype])

    def test_risk_to_alpha_and_beta(self, dtype):
        v = of("gate", dtype)
        for (low, high), alpha, beta in zip(G["gate.range"].tolist(), of("gate").alpha, of("gate").beta):
            near(torch.stack(train.blend(v.risk, low, high)), torch.stack((alpha, beta)), NEAR[dtype])

    def test_smoothing(self):
        v = of("smooth")
        for ema, row in zip(v.ema.tolist(), v.smoothed.tolist()):
            smoothed = None
            for risk, expected in zip(v.risk.tolist(), row):
                smoothed = train.smooth(smoothed, risk, ema)
                assert smoothed == pytest.approx(expected, abs=1e-14)

    def test_learning_rate(self):
        v = of("lr")
        found = [train.lr_at(*row) for row in zip(*(getattr(v, k).tolist() for k in ("step", "n_steps", "warmup_steps", "peak")))]
        near(found, v.lr, 1e-14)

    def test_a_linear_with_its_adapter_on_off_and_merged(self, dtype):
        policy, v = OneLayer(dtype), of("objective")
        hidden, labels, row = response_states(policy, EXAMPLES)
        near(hidden.detach(), v.hidden, NEAR[dtype])
        assert labels.tolist() == v.label.tolist() and row.tolist() == v.example.tolist()
        assert torch.cat([response_positions(e) for e in EXAMPLES]).tolist() == v.position.tolist()
        with policy.adapters_off():
            near(response_states(policy, EXAMPLES)[0], v.ref_hidden, NEAR[dtype])
        x = policy.embedding[G["batch.input_ids"][:, :-1][G["batch.labels"][:, 1:] != -100]]  # before each label
        near((x @ policy.linear.merged_weight().T).detach(), v.hidden, NEAR[torch.float32])  # merged in float32

    @pytest.mark.parametrize("gate", GATES)
    def test_the_loss_of_a_micro_batch_and_its_gradients(self, gate, dtype):
        policy, v, asked = OneLayer(dtype), of("objective"), []
        live = live_reference(policy)

        def reference(examples):
            asked.extend(e.index for e in examples)
            return live(examples)

        alpha, beta = train.blend(of("batch", dtype).risk.cpu(), *G["gate.range"][gate].tolist())
        loss, nll, kl = train.micro_batch_loss(policy, reference, EXAMPLES, alpha, beta, N_TOKENS)
        loss.backward()
        assert asked == [i for i in range(4) if beta[i] > 0]  # an example without pull needs no reference
        near(loss.detach(), v.loss[gate], NEAR[dtype])
        near(nll.sum(), v.nll.sum(), NEAR[dtype])
        per_example = [v.kl[v.example == i].sum() if beta[i] > 0 else v.kl.new_zeros(()) for i in range(4)]
        near(kl, torch.stack(per_example), NEAR[dtype])  # in the order of EXAMPLES
        near(policy.linear.lora_A.grad, v.grad_lora_A[gate], NEAR[dtype])
        near(policy.linear.lora_B.grad, v.grad_lora_B[gate], NEAR[dtype])

    def test_what_is_kept_of_the_reference(self, dtype):
        v = of("objective", dtype)
        g, c = fused.reference_terms(v.ref_hidden, G["model.head"].to(dtype), v.label, dtype)
        near(g, of("kept").g, NEAR[dtype])
        near(c, of("kept").c, NEAR[dtype])

    def test_csft(self, dtype):
        """Its τ = 0.1 is rounded to float32 whatever the dtype, hence 1e-8."""
        policy, v, limit = OneLayer(dtype), of("csft"), max(NEAR[dtype], 1e-8)
        method, ones = ConstrainedSFT(0.0, 4, 1), torch.ones(4, dtype=dtype)
        method.prepare(policy, EXAMPLES, 2)
        near(torch.cat([method.ref_logp[i] for i in range(4)]), v.ref_logp, NEAR[dtype])
        loss, nll, _ = train.micro_batch_loss(policy, None, EXAMPLES, ones, 0 * ones, N_TOKENS, method.token_weights)
        loss.backward()
        near(loss.detach(), v.loss, limit)
        near(policy.linear.lora_A.grad, v.grad_lora_A, limit)
        near(policy.linear.lora_B.grad, v.grad_lora_B, limit)
        position, w = of("objective").position, of("csft", dtype)
        weight = csft_weight(w.logp.clone().requires_grad_(), w.ref_logp, position)
        assert not weight.requires_grad
        near(weight, v.weight, limit)
        near(csft_weight(w.edge_logp, w.edge_ref_logp, v.edge_position), v.edge_weight, limit)

    def test_lisas_pull(self, dtype):
        v = of("lisa", dtype)
        parameter = torch.nn.Parameter(v.theta)
        parameter.grad = v.grad_before.clone()
        lisa_pull([parameter], [v.at_switch], v.rho.item())
        near(parameter.grad, of("lisa").grad_after, NEAR[dtype])

    @pytest.mark.parametrize("i", range(3))
    @pytest.mark.parametrize("tolerance, limit", [(1e-6, 1e-6), (1e-9, 1e-8)])
    def test_the_probe_as_near_as_its_solver_goes(self, i, tolerance, limit):
        """As it is used, to a mean gradient under 1e-6, and as far as a line search in float64 can tell values of the loss apart."""
        v = of("probe")
        weight, bias, mean, std = fit_logistic(v.x, v.y, v.l2[i].item(), tolerance)
        near(weight, v.weight[i], limit)
        near(bias, v.bias[i], limit)
        near(mean, v.mean)
        near(std, v.std)

    def test_the_probes_risk_and_what_it_cannot_know(self, dtype, capsys):
        v = of("probe")
        for weight, bias, risk in zip(v.weight, v.bias, v.risk):
            probe = Probe(weight, bias, v.mean, v.std, "", "", "")
            near(probe.risk(of("probe", dtype).new_x), risk)  # float32 features are exact here, the rest is float64
            assert "3 of 9 risks are unknown" in capsys.readouterr().out

    def test_the_rubric_judges_reading_and_verdicts(self):
        v = of("rubric", torch.float32)
        judge = stand_in(RubricJudge, v.logits[:, None])
        judge.answers = [[token for token in row if token >= 0] for row in G["rubric.digits"].tolist()]
        risk, mass, _ = judge.read(v.probs[:, None])
        near(risk, of("rubric").risk, NEAR[torch.float32])
        near(mass, of("rubric").mass, NEAR[torch.float32])
        verdicts = {int(k): v for batch in judge([(str(i), "") for i in range(8)]) for (k, _), v in batch.items()}
        near([verdicts[i].risk for i in range(8)], of("rubric").verdict, NEAR[torch.float32])
        assert [verdicts[i].valid for i in range(8)] == G["rubric.valid"].bool().tolist()
        near([verdicts[i].score for i in range(8) if verdicts[i].valid], of("rubric").score[G["rubric.valid"] == 1], NEAR[torch.float32])

    @pytest.mark.parametrize("n", [1, 2])
    def test_the_guards_reading_and_verdicts(self, n, dtype):
        v, expected = of("guard", dtype), of("guard")
        mass, risk = (getattr(expected, f"{name}_{n}") for name in ("mass", "risk"))
        judge = stand_in(GuardJudge, of("guard", torch.float32).logits[:, : 1 + n])
        judge.answers, judge.lead = [[v.safe.item()], [v.unsafe.item()]], [v.line.item()] * n
        found = judge.read(v.probs[:, : 1 + n])
        near(found[0], risk, NEAR[dtype])
        near(found[1], mass, NEAR[dtype])
        verdicts = {int(k): v for batch in judge([(str(i), "") for i in range(4)]) for (k, _), v in batch.items()}
        near([verdicts[i].risk for i in range(4)], torch.where(mass >= 0.5, risk, 1.0), NEAR[torch.float32])

    def test_sampling(self, dtype):
        v = of("sample", dtype)
        for logits, T, u, token in zip(v.logits, v.temperature.tolist(), G["sample.u"], v.token):
            assert sample(logits[None], T, u.view(1, 1)) == token


def stand_in(kind, logits):
    """A judge of a class whose model says logits (pairs, places, V) to the pairs ("0", ""), ("1", ""), …"""
    judge = object.__new__(kind)
    judge.tokens = lambda prompt, response: (prompt, [int(prompt)])
    judge.chat = SimpleNamespace(tokenizer=SimpleNamespace(id_to_token=str))
    judge.model = SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=8), device=torch.device(DEVICE),
        model=lambda input_ids, real: (logits[input_ids[:, 0]], None),
        lm_head=SimpleNamespace(weight=torch.eye(logits.shape[-1], device=DEVICE)))
    return judge


# ---------------------------------------------------------------- six steps of transformers and peft


STEPS = load_file(FILE.with_name("trajectory.safetensors"))


@pytest.mark.parametrize("ref", ["live", "keep"])
def test_training_takes_the_steps_of_transformers_and_peft(tmp_path, ref):
    config = train.TrainConfig(model=FILE.with_name("llama"), out=tmp_path, epochs=4, batch_size=2, accumulation=2, lr=0.02, warmup_steps=2,
                               beta_min=0.0, beta_max=1.0, lora_r=2, lora_alpha=3.0, save_every=0, ref=ref)
    policy = load_model(config.model, DEVICE)
    add_lora(policy, config.lora_r, config.lora_alpha)
    for name, layer in linears(policy).items():
        if not name.endswith(("q_proj", "v_proj", "down_proj")):
            layer.lora_A = layer.lora_B = None
    adapters = adapter_parameters(policy)
    assert adapters.keys() == {key for key in STEPS if "lora_" in key}
    for name, parameter in adapters.items():
        parameter.data.copy_(STEPS[name][0])
    examples = [Example(i, ids[:n], labels[:n]) for i, (ids, labels, n) in enumerate(
        zip(*(STEPS[name].tolist() for name in ("input_ids", "labels", "length"))))]
    assert [[e.index for e in step_examples(step, examples, [], lambda _: 0, 4, 0)] for step in range(6)] == STEPS["order"].tolist()

    after = []
    hook = register_optimizer_step_post_hook(
        lambda *_: after.append({name: parameter.detach().clone() for name, parameter in adapters.items()}))
    try:
        train.train(config, policy, train.open_reference(config, policy, examples, STEPS["risk"]), config.baseline(6), examples, STEPS["risk"], tmp_path)
    finally:
        hook.remove()
    rows = read_rows(tmp_path / "metrics.jsonl")
    for key, expected in {key: STEPS[key] for key in ("loss", "grad_norm", "lr")}.items():
        near([row[key] for row in rows], expected, NEAR[torch.float32])
    n_tokens = (STEPS["labels"] != -100).sum(1)[STEPS["order"]]  # of each example drawn
    pulled = STEPS["beta"] > 0  # the log's KL is of these alone
    expected = {"alpha": STEPS["alpha"].mean(1), "beta": STEPS["beta"].mean(1), "nll": STEPS["nll"].sum(1) / STEPS["n_tokens"],
                "kl": (STEPS["kl"] * pulled).sum(1) / (n_tokens * pulled).sum(1)}
    for key, values in expected.items():
        near([row[key] for row in rows], values, NEAR[torch.float32])
    for name in adapters:
        near(torch.stack([values[name] for values in after]), STEPS[name][1:], NEAR[torch.float32])


# ---------------------------------------------------------------- chats of transformers


@pytest.mark.parametrize("folder", sorted((FILE.parent / "chat").iterdir()), ids=lambda folder: folder.name)
def test_text_ids_and_labels_are_those_of_transformers(folder):
    chat, vectors = Chat(folder), json.loads((folder / "vectors.json").read_text())
    assert len(vectors) == 3
    for v in vectors:
        example = chat.encode_example(Conversation(tuple(v["messages"])), 0, 1000)
        assert (chat.render(v["messages"]), example.input_ids, example.labels) == (v["text"], v["input_ids"], v["labels"])
        prompt = v["messages"][:-1]
        assert (chat.render(prompt, add_generation_prompt=True), chat.encode_prompt(prompt)) == (v["prompt"], v["prompt_ids"])


# ---------------------------------------------------------------- the files


class TestTheFile:
    def test_made_again_it_has_the_same_bytes(self, tmp_path):
        """With another torch or processor the same numbers to 1e-12."""
        make_golden_objective.main(tmp_path / "again.safetensors")
        made_by = []
        for file in (FILE, tmp_path / "again.safetensors"):
            with safe_open(file, "pt") as stored:
                made_by.append(stored.metadata()["made_by"])
        again, kept = load_file(tmp_path / "again.safetensors"), load_file(FILE)
        assert again.keys() == kept.keys()
        for key, tensor in kept.items():
            assert again[key].dtype == tensor.dtype
            near(again[key], tensor, 1e-12)
        assert made_by[0] != made_by[1] or (tmp_path / "again.safetensors").read_bytes() == FILE.read_bytes()

    def test_it_is_small_and_every_key_is_explained(self):
        said = (FILE.parent / "README.md").read_text()
        assert FILE.stat().st_size < 200_000
        for key, tensor in (G | STEPS).items():
            shape = "×".join(map(str, tensor.shape)) or "–"
            assert f"| `{re.sub('layers.[0-2]', 'layers.I', key)}` | {shape} |" in said, key
        for folder in FILE.parent.glob("*/golden.safetensors"):
            assert folder.parent.name == "llama" or f"`{folder.parent.name}`" in said.replace(",", "").split(), folder
            assert all(f"\n| `{key}` | {'(L+1)×' * (key == 'hidden_states')}B×" in said for key in load_file(folder)), folder
        for vectors in FILE.parent.glob("chat/*/vectors.json"):
            assert all(f"\n| `{key}` | " in said for key in json.loads(vectors.read_text())[0]), vectors
