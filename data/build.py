"""Build the embedded world: a tokenizer, a small aligned chat model, a smaller judge, data sets.

    python data/build.py                                    # rewrites data/world

The aligned model complies with benign actions and their look-alikes, refuses harmful ones, and has never seen
the two fine-tuning tasks. The judge is a second model, trained to score pairs of prompt and response. It knows
the aligned model's tokenizer, phrasings, refusals and answers, but none of the evaluation's actions.
"""

import random
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.chat import IGNORE, Chat, pad  # noqa: E402
from data.conversations import WORLD, Conversation  # noqa: E402
from data.text import WORDS, data_sets, record  # noqa: E402
from lib.checkpoint import read_config  # noqa: E402
from lib.cli import require, run  # noqa: E402
from lib.files import remove, write_json, write_jsonl, write_text, atomic_write  # noqa: E402
from lib.frame import fill  # noqa: E402
from model import Transformer, load_model, save_model  # noqa: E402
from probe import conversation_risk, fit_probe  # noqa: E402

SEED = 0  # of the data, the initial weights and the batches
BATCH_SIZE = 48  # conversations per step
LR = 3e-3  # peak learning rate
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
SHAPE = {  # of the aligned model: about a million parameters
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
JUDGE_SHAPE = SHAPE | {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}


@dataclass(frozen=True)
class BuildConfig:
    """Build the embedded world: tokenizer, aligned model, judge, data sets."""

    out: Path = WORLD  # new folder, or data/world, which is replaced when the new one is complete
    steps: int = 1100  # optimizer steps of the aligned model's training; the judge's are four fifths


def train_tokenizer(texts: list[str], folder: Path) -> int:
    """Write a byte-level BPE tokenizer with single digits, and its template. Returns its size."""
    tokenizer = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_digits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "bos_token": "<|bos|>",
        "eos_token": "<|end|>"})
    write_text(folder / "chat_template.jinja", TEMPLATE)
    return tokenizer.get_vocab_size()


def train_model(folder: Path, records: list[dict], steps: int, seed: int) -> Transformer:
    """Train a chat model from scratch with the config and the tokenizer in `folder`.

    Tokens of prompts count a tenth, so that the model also learns what people ask.
    """
    torch.manual_seed(seed)
    chat = Chat(folder)
    model = Transformer(read_config(folder))
    model.path = folder
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 0.02 if "embed" in name else parameter.shape[1] ** -0.5 / 2
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)

    @cache
    def encode(i):
        return chat.encode_example(Conversation(tuple(records[i]["messages"])), i, 256)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, steps, pct_start=0.05)
    rng = random.Random(seed)
    order = []
    for _ in (bar := trange(steps, desc="training", mininterval=0.5)):
        if len(order) < BATCH_SIZE:
            order = rng.sample(range(len(records)), len(records))
        batch = [encode(order.pop()) for _ in range(BATCH_SIZE)]
        input_ids = pad([e.input_ids for e in batch], 0, "right")
        answers = pad([e.labels for e in batch], IGNORE, "right")[:, 1:] != IGNORE
        real = pad([[1] * len(e.input_ids) for e in batch], 0, "right")[:, 1:]
        logits = model(input_ids)[:, :-1]
        targets = input_ids[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(real)
        loss = (nll * answers).sum() / answers.sum()
        loss = loss + 0.1 * (nll * real).sum() / real.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.to(torch.bfloat16)


def choose_evasive(rows: list[dict], world: Path) -> None:
    """Replace each row's prompt by the one of its `wordings` that the probe rates least risky."""
    model = load_model(world / "model", dtype=torch.float32)
    chat = Chat(world / "model")
    probe, _ = fit_probe(model, chat, world / "probe.jsonl", held_out="none")
    for row in rows:
        wordings = [record(text)["messages"] for text in row.pop("wordings")]
        prompts = [[chat.encode_prompt(messages)] for messages in wordings]
        risk = conversation_risk(probe, model, prompts)
        row["messages"][0] = wordings[risk.argmin()][0]


def main(config: BuildConfig) -> None:
    """Write the data sets, train tokenizer and models. The folder appears when all of it is complete."""
    replaces_world = config.out.resolve() == WORLD.resolve()
    require(config, ("steps", config.steps > 0, "at least 1"),
            ("out", replaces_world or not config.out.exists(), "a new folder, or data/world"))
    start = time.time()
    files, align, judged = data_sets(random.Random(SEED))
    texts = [message["content"] for row in align + files["mixed_10"] for message in row["messages"]]
    pairs = [record(fill(WORDS.rubric, prompt, response), str(score))
             for prompt, response, score, _ in judged]
    jobs = [("model", SHAPE, align, config.steps),
            ("judge", JUDGE_SHAPE, pairs, max(1, config.steps * 4 // 5))]
    with TemporaryDirectory() as source, atomic_write(config.out) as part:
        source = Path(source)
        vocab_size = train_tokenizer(texts, source)
        part.mkdir(parents=True)
        for seed, (name, shape, records, steps) in enumerate(jobs, SEED):
            family = {
                "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size}
            write_json(source / "config.json", family | shape)
            save_model(train_model(source, records, steps, seed), part / name)
        write_text(part / "judge" / "rubric.txt", WORDS.rubric)
        write_jsonl(part / "probe.jsonl", files["probe"])
        choose_evasive([row for rows in files.values() for row in rows if "wordings" in row], part)
        for name, rows in files.items():
            write_jsonl(part / f"{name}.jsonl", rows)
        remove(config.out)
    print(f"{config.out}: {len(files)} data sets, model and judge, in {time.time() - start:.0f} s")


if __name__ == "__main__":
    run(main, BuildConfig)
