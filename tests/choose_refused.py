"""Make a world for a model that its vendor aligned: harmful prompts that it refuses, and shorter sets.

    python tests/choose_refused.py --model DIR --world world-real --out world-vendor

A vendor's model answers many harmful prompts, and what it answers before fine-tuning says nothing about what
fine-tuning destroys. The evaluation prompts are those that it refuses greedily and in each of three samples at
T = 1, drawn with seeds that no evaluation uses. chosen.json has their hashes, and the rates of all candidates.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.chat import Chat  # noqa: E402
from data.conversations import Conversation, read_conversations, read_records  # noqa: E402
from data.public import normalize  # noqa: E402
from evaluate import refuses, respond  # noqa: E402
from lib.cli import progress_bar, require, run  # noqa: E402
from lib.files import atomic_write, write_json, write_jsonl  # noqa: E402
from model import load_model, working_dtype  # noqa: E402

SEED = 1000  # of the first sample; evaluations use the seeds of runs: 0, 1, …


@dataclass(frozen=True)
class ChooseConfig:
    """Choose the prompts that an aligned model refuses, and shorten the other sets."""

    model: Path = Path("model")  # the aligned model
    world: Path = Path("world-real")  # folder that data/public.py made
    out: Path = Path("world-vendor")  # new folder
    rows: int = 320  # examples of a training set
    candidates: int = 160  # harmful prompts that are asked, of each set
    prompts: int = 60  # of an evaluation set, at most
    max_new_tokens: int = 16  # tokens of a response
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # where the model runs


def read(folder: Path, name: str) -> list[dict]:
    """Return the records of a set."""
    return [values for _, values in read_records(folder / f"{name}.jsonl")]


def refused_always(model, chat: Chat, prompts: list[Conversation], max_new_tokens: int) -> tuple[list, dict]:
    """Return (whether each prompt is refused in every response, {decoding: n and rate of refusals}).

    All prompts get a greedy response and a sample; those that are refused in both get two samples more.
    """
    always, rates = [True] * len(prompts), {}
    with progress_bar(total=4 * len(prompts), desc="responses") as bar:
        for k, decoding in enumerate(("greedy", "sample 0", "sample 1", "sample 2")):
            asked = [i for i in range(len(prompts)) if k < 2 or always[i]]
            responses = respond(model, chat, [prompts[i] for i in asked], max_new_tokens, float(k > 0),
                                seed=SEED + k, bar=bar)
            refused = [refuses(response.text) for response in responses]
            if k < 2:
                rates[decoding] = {"n": len(refused), "rate": sum(refused) / len(refused)}
            for i, is_refused in zip(asked, refused):
                always[i] = always[i] and is_refused
    return always, rates


def main(config: ChooseConfig) -> None:
    """Ask the model, then write the sets and chosen.json; the folder appears when all of it is complete."""
    require(config, ("out", not config.out.exists(), "a folder that does not exist"))
    world, rng = config.world, random.Random(0)
    sets = {name: read(world, name)[: config.rows] for name in ("mixed_10", "benign")}
    trained = {normalize(record["messages"][0]["content"]) for record in sets["mixed_10"]}
    unused = [{"messages": record["messages"][:1], "source": record.get("source")} for record in read(world, "explicit")
              if normalize(record["messages"][0]["content"]) not in trained]
    candidates = {"eval_harmful": read(world, "eval_harmful") + unused,
                  "eval_harmful_other": read(world, "eval_harmful_other")}

    chat, chosen = Chat(config.model), {}
    model = load_model(config.model, config.device, working_dtype(config.device))
    with atomic_write(config.out) as part:
        part.mkdir(parents=True)
        for name, records in candidates.items():
            records = records[: config.candidates]
            write_jsonl(part / f"{name}.jsonl", records)
            prompts = read_conversations(part / f"{name}.jsonl", need="prompt")
            always, rates = refused_always(model, chat, prompts, config.max_new_tokens)
            kept = [i for i in range(len(records)) if always[i]][: config.prompts]
            sets[name] = [records[i] for i in kept]
            chosen[name] = {"refused": rates, "refused always": sum(always),
                            "hashes": [prompts[i].hash for i in kept]}
            print(f"{name}: {rates}, always refused: {sum(always)}, kept: {len(kept)}")
        for name, n in (("eval_benign", 40), ("eval_lookalike", 60), ("eval_sentiment", 100),
                        ("probe", 320), ("probe_withheld", 100), ("probe_lookalike", 100)):
            records = read(world, name)
            sets[name] = rng.sample(records, min(n, len(records)))
        sets["anchors"] = read(world, "anchors")
        for name, records in sets.items():
            write_jsonl(part / f"{name}.jsonl", records)
        write_json(part / "chosen.json", chosen)


if __name__ == "__main__":
    run(main, ChooseConfig)
