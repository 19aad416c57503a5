"""What a training step and generation cost: this project against itself and, where they are installed, against transformers and peft.

python tests/bench.py                     # one thread, CPU: a tiny and a small shape, and the loss alone with a 128k vocabulary
python tests/bench.py --shapes 8b         # CUDA: an 8B shape in bfloat16, compiled

"ours" is this project, "theirs" transformers and peft: plain SFT; the adaptive objective as one writes it, on the logits of all
positions, with a second model as the reference or with the adapter off; `generate` in batches of 8. Weights and tokens are random. All
that is compared runs in turn, round after round; a ratio is the median of the rounds' ratios, so that the machine's drift cancels. Peaks
are of one step, beyond what was allocated before it (weights, adapters, optimizer state).
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import train  # noqa: E402
from data.chat import IGNORE, Example, pad  # noqa: E402
from lib import fused  # noqa: E402
from lib.checkpoint import read_config  # noqa: E402
from lib.reference import kept_reference, live_reference  # noqa: E402
from lib.cli import comma_list, require, run  # noqa: E402
from model import Transformer, add_lora, compile_blocks, generate, save_model  # noqa: E402

SHAPES = {  # hidden size, layers, heads, key/value heads, inner size, vocabulary; LoRA rank, longest conversation; of 8 conversations
    "tiny": (256, 6, 4, 2, 704, 4096, 16, 128),
    "small": (576, 6, 9, 3, 1536, 49152, 16, 128),
    "8b": (4096, 32, 32, 8, 14336, 128256, 64, 512),
}
COMPARED = [("ours, adaptive, kept", "ours, sft"), ("ours, adaptive, live", "ours, sft"),
            ("theirs, two models", "ours, adaptive, kept"), ("theirs, adapter off", "ours, adaptive, kept"),
            ("theirs, sft", "ours, sft"), ("theirs, generate", "ours, generate")]
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class BenchConfig:
    """Time training steps, the loss and generation."""

    shapes: str = "8b" if torch.cuda.is_available() else "tiny,small,loss"  # some of tiny, small, 8b, loss
    rounds: int = 11  # how often each is timed, after two rounds of warm-up
    peak_tflops: float = 989.0  # of the GPU in bfloat16, for its utilisation (an H100's)


# ---------------------------------------------------------------- measuring


def interleaved(jobs: dict, rounds: int, device) -> dict[str, list[float]]:
    """{name: seconds of each round}. What does not fit into memory is left out, and said."""
    times = {name: [] for name in jobs}
    for number in range(-2, rounds):
        for name in list(times):
            try:
                start = time.perf_counter()
                jobs[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                print(f"{name}: does not fit into memory")
                del times[name]
                continue
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def peak(job, device) -> int:
    """Most bytes of tensors allocated at a time while `job` runs, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    now = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def ratio(times: dict, a: str, b: str) -> str:
    """Median over rounds of a's time to b's."""
    return f"{median(x / y for x, y in zip(times[a], times[b])):.2f}" if a in times and b in times else "–"


# ---------------------------------------------------------------- what is measured


def checkpoint(shape: str, folder: Path) -> Transformer:
    """A random Llama of the shape, saved to `folder` as well."""
    hidden, layers, heads, kv_heads, inner, vocabulary, _, _ = SHAPES[shape]
    on_gpu = shape == "8b"
    raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocabulary, "hidden_size": hidden,
           "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
           "head_dim": hidden // heads, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "rope_theta": 10000.0,
           "tie_word_embeddings": not on_gpu, "torch_dtype": "bfloat16" if on_gpu else "float32"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("cuda" if on_gpu else "cpu"):
        torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
        model = Transformer(read_config(folder)).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
    save_model(model, folder / "model")
    model.path = folder / "model"
    return model


def our_steps(model: Transformer, examples: list, folder: Path) -> dict:
    """{name: a training step as in train.train}: SFT, and adaptive with the kept and with the live reference; risks are graded."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    folder.mkdir()
    kept = kept_reference(folder / "reference.bin", model, examples, len(examples))
    n_tokens, graded = sum(e.n_labels for e in examples), train.blend(torch.linspace(0, 1, len(examples)), 0.1, 0.9)

    def step(alpha, beta, reference=live_reference(model)):
        loss, _, _ = train.micro_batch_loss(model, reference, examples, alpha, beta, n_tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"ours, sft": lambda: step(torch.ones(len(examples)), torch.zeros(len(examples))),
            "ours, adaptive, kept": lambda: step(*graded, kept), "ours, adaptive, live": lambda: step(*graded)}


def their_models(folder: Path, rank: int, device, compiled: bool):
    """(a transformers model with peft's adapters, a second one as the reference), or None where they are not installed."""
    try:
        import peft
        import transformers
    except ImportError:
        return None
    print(f"transformers {transformers.__version__}, peft {peft.__version__}")
    transformers.logging.set_verbosity_error()
    base, ref = (transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device) for _ in range(2))
    ref.requires_grad_(False)
    policy = peft.get_peft_model(base, peft.LoraConfig(r=rank, lora_alpha=16, target_modules=LORA, lora_dropout=0.0))
    if compiled:
        policy.compile()
        ref.compile()
    return policy, ref


def their_steps(policy, ref, examples: list, device) -> dict:
    """{name: the same step as one writes it with transformers and peft}: logits of every position, KL on all of them, a mask."""
    ids, labels = pad([e.input_ids for e in examples], 0, "right", device), pad([e.labels for e in examples], IGNORE, "right", device)
    mask = pad([[1] * len(e.input_ids) for e in examples], 0, "right", device)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    beta = 0.1 + 0.8 * torch.linspace(0, 1, len(examples), device=device)[:, None]
    real, targets = labels[:, 1:] != IGNORE, labels[:, 1:].clamp_min(0)

    def step(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def adaptive(ref_logits):
        logp = policy(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
        ref_logp = ref_logits[:, :-1].float().log_softmax(-1)
        nll = -logp.gather(-1, targets[..., None])[..., 0]
        kl = (ref_logp.exp() * (ref_logp - logp)).sum(-1)
        step((((1 - beta) * nll + beta * kl) * real).sum() / real.sum())

    @torch.no_grad()
    def reference(model):
        return model(input_ids=ids, attention_mask=mask).logits

    def adapter_off():
        with policy.disable_adapter():
            return reference(policy)

    return {"theirs, sft": lambda: step(policy(input_ids=ids, attention_mask=mask, labels=labels).loss),
            "theirs, two models": lambda: adaptive(reference(ref)), "theirs, adapter off": lambda: adaptive(adapter_off())}


def generation(ours: Transformer, theirs, vocabulary: int, device, new: int = 32) -> dict:
    """{name: 32 prompts of 8 to 64 tokens, `new` tokens each, greedy}: transformers in batches of 8 as they come, ours as it likes."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 65, (32,), generator=generator).tolist()
    prompts = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]

    def own():
        with ours.adapters_off():
            generate(ours, prompts, new)

    def other():
        for start in range(0, 32, 8):
            batch = prompts[start : start + 8]
            ids, mask = pad(batch, 0, "left", device), pad([[1] * len(p) for p in batch], 0, "left", device)
            theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)

    return {"ours, generate": own} | ({"theirs, generate": other} if theirs is not None else {})


def measure_shape(shape: str, config: BenchConfig) -> list[tuple[str, str]]:
    """Rows (what, figure) of one shape."""
    hidden, _, _, _, _, vocabulary, rank, longest = SHAPES[shape]
    device, generator = torch.device("cuda" if shape == "8b" else "cpu"), torch.Generator().manual_seed(0)
    examples = []
    for i, n in enumerate([longest - longest // 16 * k for k in range(8)]):
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        examples.append(Example(i, ids, [IGNORE] * (n // 2) + ids[n // 2 :]))
    with tempfile.TemporaryDirectory() as folder:
        model = checkpoint(shape, Path(folder) / "made")
        add_lora(model, rank, 16)
        if device.type == "cuda":
            compile_blocks(model)
        steps = our_steps(model, examples, Path(folder) / "ref")
        theirs = their_models(model.path, rank, device, device.type == "cuda")
        if theirs:
            steps |= their_steps(*theirs, examples, device)
        times = interleaved(steps, config.rounds, device)
        peaks = {name: peak(steps[name], device) for name in times}
        for block in model.model.layers:
            vars(block).pop("forward", None)  # generation is not compiled, here or there
        if theirs:
            theirs[1]._compiled_call_impl = None
        times |= interleaved(generation(model, theirs[1] if theirs else None, vocabulary, device), max(3, config.rounds // 3), device)

    n_input, n_labels = sum(len(e.input_ids) for e in examples), sum(e.n_labels for e in examples)
    frozen = sum(p.numel() for p in model.model.layers.parameters() if not p.requires_grad)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = n_input * (4 * frozen + 6 * adapters) + n_labels * 4 * hidden * vocabulary  # frozen weights: forward, and back to their input
    own = median(times["ours, sft"])
    rows = [(f"{a} / {b}: time", ratio(times, a, b)) for a, b in COMPARED]
    rows += [(f"{a} / {b}: peak memory", f"{peaks[a] / peaks[b]:.2f}" if a in peaks and b in peaks else "–") for a, b in COMPARED[:-1]]
    rows += [("ours, sft: tokens/s", f"{n_input / own:,.0f}"), ("ours, sft: peak memory", f"{peaks['ours, sft'] / 1e6:,.0f} MB")]
    if device.type == "cuda":
        rows += [("ours, sft: model FLOPs per second / the GPU's", f"{flops / own / config.peak_tflops / 1e12:.1%}")]
    return rows


def measure_loss(config: BenchConfig) -> list[tuple[str, str]]:
    """The loss alone, forward and backward: 1024 response tokens, H 1024, V 128k, all pulled."""
    N, H, V = 1024, 1024, 128000
    hidden, weight, labels, risk = torch.randn(N, H), torch.randn(V, H) * 0.02, torch.randint(V, (N,)), torch.rand(N)
    ref_hidden = hidden + 0.1 * torch.randn(N, H)
    terms = fused.reference_terms(ref_hidden, weight, labels)

    def job(token_loss, *ref):
        token_loss(hidden.clone().requires_grad_(), weight, labels, 1 - risk, risk, *ref)[0].sum().backward()

    def live():
        job(fused.fused_token_loss, fused.reference_terms(ref_hidden, weight, labels))

    jobs = {"definition": lambda: job(train.token_loss, ref_hidden), "live": live, "kept": lambda: job(fused.fused_token_loss, terms)}
    cpu = torch.device("cpu")
    times, peaks = interleaved(jobs, max(1, config.rounds // 4), cpu), {name: peak(job, cpu) for name, job in jobs.items()}
    return [(f"{name} / definition: {what}", f"{value:.3f}") for name in ("kept", "live") for what, value in (
        ("time", median(x / y for x, y in zip(times[name], times["definition"]))), ("peak memory", peaks[name] / peaks["definition"]))]


def main(config: BenchConfig) -> None:
    """Measure each shape, and print Markdown tables."""
    shapes = comma_list(config.shapes)
    require(config, ("shapes", set(shapes) <= {*SHAPES, "loss"}, f"some of {', '.join(SHAPES)}, loss"),
            ("rounds", config.rounds > 0, "at least 1"),
            ("shapes", "8b" not in shapes or torch.cuda.is_available(), "no 8b without CUDA"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    machine = torch.cuda.get_device_name() if "8b" in shapes else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"torch {torch.__version__}, {machine}, {config.rounds} rounds")
    found = {shape: measure_shape(shape, config) for shape in shapes if shape != "loss"}
    if found:
        lines = [["median of the rounds' ratios", *found], ["---"] * (1 + len(found))]
        lines += [[row[0][0], *(value for _, value in row)] for row in zip(*found.values())]
        print("\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    if "loss" in shapes:
        print("\n| loss, 1024 tokens, H 1024, V 128k | |\n| --- | --- |\n" + "\n".join(f"| {a} | {b} |" for a, b in measure_loss(config)))


if __name__ == "__main__":
    run(main, BenchConfig)
