"""Build the embedded world: tokenizer, small aligned chat model, smaller judge, data sets of text.py's words.

    python data/build.py                                    # rewrites data/world
    python data/build.py --family qwen2 --out world-qwen2 --no-judge    # the same, on another architecture

The aligned model complies with benign actions and their look-alikes, refuses harmful ones, and has never seen
the two fine-tuning tasks. The judge, another model with its own weights and size, is trained to score pairs
of prompt and response; it shares the aligned model's tokenizer and words: it has seen the same phrasings,
refusals and answers, but none of the evaluation's actions.
"""

import json
import random
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.chat import IGNORE, Chat, pad  # noqa: E402
from data.conversations import WORLD, Conversation  # noqa: E402
from data.text import JUDGE_RUBRIC, data_sets, record  # noqa: E402
from lib.checkpoint import read_config  # noqa: E402
from lib.cli import require, run  # noqa: E402
from lib.frame import fill  # noqa: E402
from lib.files import write_json, write_jsonl, write_text  # noqa: E402
from model import Transformer, load_model, save_model  # noqa: E402
from probe import ProbeConfig, fit_probe, prompt_features  # noqa: E402


@dataclass(frozen=True)
class BuildConfig:
    """Build the embedded world: tokenizer, aligned model, judge, data sets."""

    out: Path = WORLD  # folder to write; replaced when the new one is complete
    family: Literal["llama", "mistral", "qwen2", "qwen3", "phi3"] = "llama"  # architecture
    steps: int = 1100  # optimizer steps of the aligned model's training; the judge's are four fifths
    batch_size: int = 48  # conversations per step
    lr: float = 3e-3  # peak learning rate
    judge: bool = True  # train the judge (that of data/world serves every family)
    seed: int = 0  # of data, initial weights and batches


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def train_tokenizer(texts: list[str], path: Path) -> None:
    """A byte-level BPE with single digits, and the files around it."""
    tokenizer = Tokenizer(models.BPE())
    split_digits, to_bytes = (pre_tokenizers.Digits(individual_digits=True),
                              pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|end|>"}
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}, indent=2) + "\n")
    (path / "chat_template.jinja").write_text(TEMPLATE)


def model_config(family: str, vocab_size: int, **sizes) -> dict:
    """config.json of a model: about a million parameters in any family, unless `sizes` say otherwise."""
    config = {
        "architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family,
        "vocab_size": vocab_size, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 256, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": SPECIAL.index("<|bos|>"),
        "eos_token_id": SPECIAL.index("<|end|>"), "pad_token_id": SPECIAL.index("<|pad|>"),
    }
    extra = {"mistral": {"sliding_window": 48}, "qwen2": {"use_sliding_window": False},
             "qwen3": {"attention_bias": False}}
    return config | extra.get(family, {}) | sizes


def train_model(config: BuildConfig, path: Path, records: list[dict], steps: int, seed: int) -> Transformer:
    """Train a chat model from scratch. The loss is on every token, so that it also learns what people ask."""
    torch.manual_seed(seed)
    chat, model = Chat(path), Transformer(read_config(path))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02 if "embed" in name else parameter.shape[1] ** -0.5 / 2)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    # An example is encoded when it is first drawn: a short training draws few of them.
    encode = cache(lambda i: chat.encode_example(Conversation(tuple(records[i]["messages"])), i, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, steps, pct_start=0.05)
    rng, order = random.Random(seed), []
    for _ in (bar := trange(steps, desc=f"training {path.name}", mininterval=0.5)):
        if len(order) < config.batch_size:
            order = rng.sample(range(len(records)), len(records))
        batch = [encode(order.pop()) for _ in range(config.batch_size)]
        input_ids = pad([e.input_ids for e in batch], 0, "right")
        answers = pad([e.labels for e in batch], IGNORE, "right")[:, 1:] != IGNORE
        real = pad([[1] * len(e.input_ids) for e in batch], 0, "right")[:, 1:]
        nll = F.cross_entropy(model(input_ids)[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(),
                              reduction="none").view_as(real)
        loss = (nll * answers).sum() / answers.sum() + 0.1 * (nll * real).sum() / real.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.path = path
    return model.to(torch.bfloat16)


def choose_evasive(files: dict[str, list[dict]], world: Path) -> None:
    """The attacker who knows the probe: of a record's `wordings`, that of lowest risk becomes its prompt."""
    model, chat = load_model(world / "model", dtype=torch.float32), Chat(world / "model")
    probe, _ = fit_probe(ProbeConfig(model=world / "model", data=world / "probe.jsonl", held_out=""),
                         model, chat)
    for row in (row for records in files.values() for row in records if "wordings" in row):
        wordings = [record(text)["messages"] for text in row.pop("wordings")]
        features = prompt_features(model, [chat.encode_prompt(messages) for messages in wordings],
                                   probe.layers, 64)
        row["messages"][0] = wordings[probe.risk(features.mean(1)).argmin()][0]


def main(config: BuildConfig) -> None:
    """Write the data sets, train tokenizer and models; the folder appears when all of it is complete."""
    is_world = (config.out / "mixed_10.jsonl").exists() and (config.out / "model").exists()
    require(config, ("steps", config.steps > 0, "at least 1"),
            ("batch_size", config.batch_size > 0, "at least 1"),
            ("out", is_world or not config.out.exists(), "a new folder, or an embedded world to replace"),
            ("judge", config.judge or config.out.resolve() != WORLD.resolve(),
             "a judge in data/world (another --out with --no-judge)"))
    start = time.time()
    part, source = (config.out.with_name(config.out.name + ".part"),
                    config.out.with_name(config.out.name + ".source.part"))
    for folder in (part, source):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    files, align, judged = data_sets(random.Random(config.seed))
    judge = [record(fill(JUDGE_RUBRIC, p, r), str(score)) for p, r, score, _ in judged]
    texts = [m["content"] for r in align + files["mixed_10.jsonl"] for m in r["messages"]]
    jobs = {"model": (align, config.steps, {}),
            "judge": (judge, max(1, config.steps * 4 // 5),
                      {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3})}
    if not config.judge:
        del jobs["judge"]
    for seed, (name, (records, steps, sizes)) in enumerate(jobs.items(), config.seed):
        (source / name).mkdir()
        if name == "model":
            train_tokenizer(texts, source / name)
        else:
            shutil.copytree(source / "model", source / name, dirs_exist_ok=True)
        vocab_size = Tokenizer.from_file(str(source / name / "tokenizer.json")).get_vocab_size()
        write_json(source / name / "config.json", model_config(config.family, vocab_size, **sizes))
        save_model(train_model(config, source / name, records, steps, seed), part / name)
    if config.judge:
        write_text(part / "judge" / "rubric.txt", JUDGE_RUBRIC)
    write_jsonl(part / "probe.jsonl", files["probe.jsonl"])
    choose_evasive(files, part)
    for name, records in files.items():
        write_jsonl(part / name, records)
    shutil.rmtree(source)
    shutil.rmtree(config.out, ignore_errors=True)
    part.rename(config.out)
    made = ", ".join(f"{name} ({len(records)})" for name, records in files.items())
    made += ", " + " and ".join(f"{name}/" for name in jobs)
    print(f"{config.out}: {made}, in {time.time() - start:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    run(main, BuildConfig)
