"""Evaluate a model: attack success, over-refusal and task accuracy, each with n and a 95 % interval.

    python evaluate.py RUN_OR_MODEL …     # on the embedded prompts, or --harmful a,b --benign c --task d
    python evaluate.py --compare runs/*   # one table of finished runs; NAME-0, NAME-1, … are pooled
    python evaluate.py --prompt "…" RUN_OR_MODEL …     # print the answer of each

ASR            share of responses to harmful prompts without a refusal phrase, greedy and at temperature T
ASR @k         share of harmful prompts for which at least one of k samples has none
judge ASR      the same by a judge's verdict (score 5 of 5, or unsafe) instead of the phrases (critic.py)
over-refusal   share of responses to benign prompts with a refusal phrase
task           share of answers that match the reference: the final number, the label, or the exact text
"""

import math
import os
import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from critic import JudgeOptions, expect_verdict, judge_pairs, open_judge
from data.chat import LONGEST, Chat, encode_prompts, rows_that_fit
from data.conversations import WORLD, Conversation, is_embedded, read_conversations, read_prompts
from lib import distributed
from lib.checkpoint import read_config
from lib.cli import comma_list, printable, progress_bar, require, run
from lib.files import DataError, new_folder, remove_if_unused, write_config, write_json, write_jsonl
from lib.options import METHODS_WITH_OPTION
from lib.report import KINDS, figures, lines_below, read_finished, read_run, summarize, table
from lib.run import stored_options
from lib.scores import is_correct, mark_garbled, metric_of, refuses
from model import Transformer, generate, load_model, sample_seed, working_dtype

EMBEDDED = {"judge": f"{WORLD}/judge", "harmful": f"{WORLD}/eval_harmful.jsonl",
            "benign": f"{WORLD}/eval_benign.jsonl,{WORLD}/eval_lookalike.jsonl",
            "task": f"{WORLD}/eval_arithmetic.jsonl,{WORLD}/eval_sentiment.jsonl"}
BATCH_SIZE = 64  # responses generated at a time
POOLED_ALIKE = ("samples", "temperature", "max_new_tokens",
                "judge", "judge_kind", "judge_model", "rubric")
SHORTER = ", or type a smaller --max-new-tokens"
UNREPORTED = {"seed", "out", "save_every", "eval_base", "sealed"}  # options that say nothing of a result


@dataclass(frozen=True)
class EvalOptions(JudgeOptions):
    """What is evaluated and how; shared by train.py and evaluate.py."""

    # evaluation (comma-separated files, or "none"; default: as the run did; else the embedded data's)
    harmful: str | None = None  # prompts that should be refused
    benign: str | None = None  # prompts that should be answered
    task: str | None = None  # prompts with reference answers
    limit: int = 0  # prompts of each file, from its start; 0: all
    samples: int = 10  # sampled responses per harmful prompt, in addition to the greedy one
    temperature: float = 1.0  # of the sampled responses
    max_new_tokens: int = 48  # longest response; longer ones are cut
    seed: int = 0  # of sampling (and of everything random in training)


@dataclass(frozen=True)
class EvalConfig(EvalOptions):
    """Evaluate checkpoints or training runs, or compare finished runs."""

    # what to do
    paths: tuple = ()  # run or checkpoint folders
    compare: bool = False  # evaluate nothing; print one table of finished runs
    prompt: str | None = None  # evaluate nothing; print each model's answer (greedy without --temperature)
    fluency: Path | None = None  # with --compare: model whose NLL tells answers from garbled text
    out: Path | None = None  # new folder for a single path (default: evaluations/NAME)
    given: tuple = ()


# ---------------------------------------------------------------- evaluation


def default_sets(options: EvalOptions, source: Path) -> EvalOptions:
    """Return `options` with the evaluation files and the judge filled in where they are None.

    The embedded prompts and judge are defaults only where `source`, a model or its data, is embedded too.
    """
    values = {"judge": "none"} | dict.fromkeys(KINDS, "none")
    if is_embedded(source):
        values |= EMBEDDED
        if (attack := WORLD / f"eval_harmful_{source.stem}.jsonl").exists():
            values["harmful"] += f",{attack}"
    chosen = {name: getattr(options, name) or value for name, value in values.items()}
    return replace(options, **chosen)


def check_options(options: EvalOptions) -> None:
    """Raise DataError for an option that is out of range."""
    require(options, ("temperature", 0 < options.temperature < math.inf, "above 0"),
            ("seed", 0 <= options.seed < 2**32, "0 to 2^32 − 1"),
            ("samples", 0 <= options.samples <= 10**4, "0 to 10,000"),
            ("limit", options.limit >= 0, "at least 0"),
            ("max_new_tokens", 1 <= options.max_new_tokens <= LONGEST, f"1 to {LONGEST}"))


def evaluation_sets(options: EvalOptions) -> dict[str, dict[str, list[Conversation]]]:
    """Read the evaluation files → {"harmful" | "benign" | "task": {name: conversations}}.

    A name is the file's without "eval_" and its ending. Raises DataError for options out of range, for two
    files of one name, and for files that are not conversations.
    """
    check_options(options)
    sets = {}
    names = set()
    for kind in KINDS:
        sets[kind] = {}
        for file in comma_list(getattr(options, kind)):
            name = Path(file).stem.removeprefix("eval_")
            require(options, (kind, name not in names, f"files of different names (two are {name})"),
                    (kind, os.path.isfile(file), f"files (check the path {file})"))
            names.add(name)
            if kind == "task":
                conversations = read_conversations(file, "answer")
            else:
                conversations = read_prompts(file, harmful=kind == "harmful")
            sets[kind][name] = conversations[: options.limit or None]
    for conversations in sets["task"].values():
        for conversation in conversations:
            metric_of(conversation)
    return sets


def all_conversations(sets: dict) -> list[Conversation]:
    """Return all conversations of `evaluation_sets`."""
    conversations = []
    for group in sets.values():
        for of_file in group.values():
            conversations += of_file
    return conversations


def expect_prompts_fit(model: Transformer, chat: Chat, conversations: list[Conversation],
                       max_new_tokens: int, hint: str = "") -> None:
    """Raise DataError, with a hint, for a prompt that leaves less than max_new_tokens to its response."""
    context = min(model.config.max_position_embeddings, LONGEST)
    for conversation in conversations:
        room = context - len(chat.encode_prompt(conversation.prompts[-1], conversation.where))
        if room < max_new_tokens:
            raise DataError(f"{conversation.where}: expected a prompt that leaves {max_new_tokens} of "
                            f"{context} tokens to its response, found one that leaves {room}: remove it "
                            f"from the file{hint}")


class Response(NamedTuple):
    """A response: the thought in a leading <think>…</think>, the text behind it, and whether it was cut.

    The <think> may be the last word of the prompt: some templates write it.
    """

    thought: str
    text: str
    cut: bool


def respond(model: Transformer, chat: Chat, conversations: list[Conversation],
            max_new_tokens: int, temperature: float = 0.0, n_samples: int = 1, seed: int = 0,
            bar: tqdm | None = None) -> list:
    """Return n_samples Responses to each conversation's last prompt, in order. All processes share the work.

    A thought without an end counts as cut. `bar` advances by the responses. Raises DataError for a prompt
    that leaves no room for a response.
    """
    longest = model.config.max_position_embeddings - max_new_tokens
    prompts = encode_prompts(chat, conversations, longest)
    batch_size = rows_that_fit(BATCH_SIZE, max(map(len, prompts)))  # the same in all processes
    jobs = []
    for ids in prompts:
        jobs += [(ids, sample_seed(seed, ids, k)) for k in range(n_samples)]
    n_processes = distributed.world_size()
    bar = bar or tqdm(disable=True)
    padded = math.ceil(len(jobs) / n_processes) * n_processes  # some jobs twice: shards are of one size
    my_prompts, my_seeds = zip(*distributed.shard((jobs * n_processes)[:padded]))
    completions = generate(model, list(my_prompts), max_new_tokens, temperature, my_seeds, batch_size,
                           lambda n: bar.update(n * n_processes), chat.end_token_ids)
    responses = []
    for prompt, ids in zip(my_prompts, completions):
        opened = "<think>" if chat.decode(prompt[-8:]).endswith("<think>") else ""
        parts = re.fullmatch(r"(?:<think>(.*?)</think>\s*)?(.*)", opened + chat.decode(ids), re.DOTALL)
        cut = len(ids) == max_new_tokens or parts[2].startswith("<think>")
        responses.append(Response(parts[1] or "", parts[2], cut))
    shards = distributed.all_gather(responses)
    return [shards[i % n_processes][i // n_processes] for i in range(len(jobs))]


def evaluate_model(model: Transformer, chat: Chat, sets: dict, options: EvalOptions, desc: str,
                   judge=None) -> list[dict]:
    """Respond to all prompts of `evaluation_sets` and score the responses.

    judge: open_judge's, on rank zero, or None. Returns a row for each response, as in completions.jsonl:
    prompt, response, and "correct" (tasks) or "refused", with a judge also "score" and "harmful".
    """
    jobs = []  # (kind, name of the set, conversations, samples of each, temperature)
    for kind, group in sets.items():
        for name, conversations in group.items():
            jobs.append((kind, name, conversations, 1, 0.0))
            if kind == "harmful" and options.samples:
                jobs.append((kind, name, conversations, options.samples, options.temperature))
    total = sum(len(conversations) * n_samples for _, _, conversations, n_samples, _ in jobs)
    rows = []
    with progress_bar(total=total, desc=f"evaluating {desc}", unit="responses",
                      disable=not total) as bar:
        for kind, name, conversations, n_samples, temperature in jobs:
            responses = respond(model, chat, conversations, options.max_new_tokens, temperature,
                                n_samples, options.seed, bar)
            for k in range(n_samples):
                decoding = f"sample {k}" if temperature else "greedy"
                row = {"kind": kind, "set": name, "decoding": decoding}
                for conversation, response in zip(conversations, responses[k::n_samples]):
                    rows.append(row | score_response(kind, conversation, response))
    return distributed.on_rank_zero(lambda: judge_rows(rows, judge, f"judging {desc}") if judge else rows)


def score_response(kind: str, conversation: Conversation, response: Response) -> dict:
    """Return the part of a row of completions.jsonl that a response decides: its text and its score."""
    row = {"group": str(conversation.meta.get("group", conversation.hash)),
           "prompt": conversation.prompts[-1][-1]["content"],
           "thought": response.thought, "response": response.text, "cut": response.cut}
    if kind == "task":
        answer = conversation.answer
        metric = metric_of(conversation)
        return row | {"answer": answer, "correct": is_correct(response.text, answer, metric)}
    return row | {"refused": refuses(response.text)}


def judge_rows(rows: list[dict], judge, desc: str) -> list[dict]:
    """Set the judge's "score" and "harmful" in all rows but tasks'; an invalid verdict is harmful."""
    judged = [row for row in rows if row["kind"] != "task"]
    pairs = []
    for row in judged:
        pairs.append((row["prompt"], row["thought"] + "\n" + row["response"]))
    for row, verdict in zip(judged, judge_pairs(judge, pairs, desc)):
        row["score"] = verdict.score
        row["harmful"] = verdict.risk >= judge.harmful_from
    return rows


# ---------------------------------------------------------------- finished runs


def differences(runs: dict[Path, dict], options) -> list[str]:
    """Return "option: value (run, …), …" for each option in which runs {path: config} with it differ."""
    lines = []
    for option in options:
        paths = defaultdict(list)  # value → runs
        for path, config in runs.items():
            if config.get("method") in METHODS_WITH_OPTION.get(option, [config.get("method")]):
                paths[str(config.get(option))[:60]].append(str(path))
        if len(paths) > 1:
            values = [f"{value} ({', '.join(of_value)})" for value, of_value in paths.items()]
            lines.append(printable(f"{option}: {', '.join(values)}"))
    return lines


def group_runs(runs: dict[Path, dict]) -> dict[str, dict]:
    """Return {row name: runs} of runs {path: config}: NAME-0, NAME-1, … are pooled, in the row NAME.

    Where they were not evaluated alike, or two have one seed, each is a row of its own.
    """
    groups = defaultdict(dict)
    rows = {}
    for path, config in runs.items():
        groups[path.resolve().name.removesuffix(f"-{config['seed']}")][path] = config
    for name, group in groups.items():
        seeds = {config["seed"] for config in group.values()}
        if len(seeds) == len(group) and not differences(group, POOLED_ALIKE):
            rows[name] = group
        else:
            rows |= {str(path): {path: config} for path, config in group.items()}
    return rows


def pool(name: str, which: str, runs: dict[Path, dict], fluency: tuple | None) -> dict:
    """Return {"name", "seeds", "figures"} of the completions of runs {path: config} taken together.

    which: "base" or "after" completions. fluency: (model, chat) for mark_garbled, or None. A figure has the
    "rates" of the runs, too.
    """
    config = next(iter(runs.values()))
    settings = config.get("temperature"), config.get("max_new_tokens")
    parts = [read_finished(path, which, *settings) for path in runs]
    rows = sum(parts, [])
    if fluency:
        mark_garbled(rows, *fluency)
    pooled = figures(summarize(rows, *settings))
    by_run = [figures(summarize(part, *settings)) for part in parts]
    for title, figure in pooled.items():
        figure["rates"] = [rates[title]["rate"] for rates in by_run if title in rates]
    seeds = [config["seed"] for config in runs.values()]
    return {"name": name, "seeds": seeds, "figures": pooled}


def compare(paths, fluency: tuple | None = None) -> tuple[str, list[dict]]:
    """Tabulate finished runs: the aligned model, then a row for each folder name without -SEED.

    fluency: (model, chat) for mark_garbled. Returns (text, rows of `pool`); the text names the options in
    which runs differ. Raises DataError where runs have other aligned models or other prompts.
    """
    runs = {}
    for path in map(Path, paths):
        if (path / "completions.jsonl").exists():
            print(f"skipped {path}: an evaluation, not a run; "
                  "python evaluate.py RUN RUN … evaluates several in one table")
        elif (path / "results.json").exists():
            runs[path] = read_run(path)
        else:
            print(f"skipped {path}: expected results.json, as a finished run has")
    if not runs:
        raise DataError("--compare: expected at least one finished run of train.py, found none")
    if different := differences(runs, ("model_sha256", "sets_sha256")):
        why = different + differences(runs, ("model", *KINDS, "limit"))
        raise DataError(f"--compare: expected one aligned model and the same prompts, found {'; '.join(why)}"
                        f"; compare each kind by itself: python evaluate.py --compare {next(iter(runs))}")
    groups = group_runs(runs)
    rows = [pool(name, "after", group, fluency) for name, group in groups.items()]
    for group in groups.values():
        based = {}
        for path, config in group.items():
            if (path / "completions_base.jsonl").exists():
                based[path] = config
        if based:  # one row's are enough: all runs have the same aligned model
            rows.insert(0, pool("aligned model", "base", based, fluency))
            break
    columns = {}
    for row in rows:
        seeds = f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""
        columns[row["name"] + seeds] = row["figures"]
    text = table(columns) + "\n\nper cent; seeds pooled, 95 % intervals over groups of prompts"
    text += "\nanswered: neither refused nor garbled (few words, or improbable to --fluency)" if fluency else ""
    options = {option for config in runs.values() for option in config}
    for line in differences(runs, sorted(options - UNREPORTED)):
        text += "\n" + textwrap.fill(f"runs differ in {line}", 100, break_on_hyphens=False)
    return text, rows


# ---------------------------------------------------------------- the script


def model_folder(path: Path) -> Path:
    """Return the folder of a run's model, or `path` where it is no run."""
    return path / "model" if (path / "model" / "config.json").exists() else path


def open_model(path: Path, options: EvalOptions) -> tuple[Transformer, Chat]:
    """Return a checkpoint's model and chat in the options' dtype, on their device."""
    dtype = working_dtype(options.device, options.dtype)
    return load_model(path, options.device, dtype), Chat(path)


def print_answer(config: EvalConfig, path: Path) -> None:
    """Print the answer of a run or checkpoint to --prompt."""
    check_options(config)
    model, chat = open_model(model_folder(path), config)
    conversation = Conversation(({"role": "user", "content": config.prompt},), "--prompt")
    temperature = config.temperature if "temperature" in config.given else 0.0
    [answer] = respond(model, chat, [conversation], config.max_new_tokens, temperature,
                       seed=config.seed)
    print(f"\n{path}:")
    for line in (answer.thought + answer.text).splitlines():
        print(printable(line))
    if answer.cut:
        print(f"(cut at --max-new-tokens {config.max_new_tokens})")


def evaluate_path(config: EvalConfig, path: Path) -> dict:
    """Evaluate a run or checkpoint; write options, completions, results to a new folder. Returns results."""
    model_path = model_folder(path)
    options = config
    if model_path != path:  # a run
        typed = {"out", "device", "dtype", *config.given}
        options = stored_options(config, path / "config.json", typed)
    read_config(model_path)  # is it a checkpoint?
    options = default_sets(options, model_path)
    sets = evaluation_sets(options)
    judge = open_judge(options) if distributed.rank() == 0 else None
    distributed.on_rank_zero(lambda: expect_verdict(judge))
    name = "evaluations/" + str(path).strip("./").replace("/", "-")
    out = distributed.on_rank_zero(lambda: new_folder(config.out, name))
    with remove_if_unused(out):
        model, chat = open_model(model_path, options)
        expect_prompts_fit(model, chat, all_conversations(sets), options.max_new_tokens, SHORTER)
        rows = evaluate_model(model, chat, sets, options, path.resolve().name, judge)
        results = summarize(rows, options.temperature, options.max_new_tokens)
        distributed.on_rank_zero(lambda: write_results(out, options, rows, results))
    print(f"wrote {out}/results.json, completions.jsonl and config.json")
    return results


def write_results(out: Path, options: EvalConfig, rows: list[dict], results: dict) -> None:
    """Write config.json, completions.jsonl and results.json."""
    write_config(out / "config.json", options)
    write_jsonl(out / "completions.jsonl", rows)
    write_json(out / "results.json", results)


def main(config: EvalConfig) -> None:
    """Evaluate each path, compare finished runs, or print answers to a prompt."""
    distributed.init()
    alone = len(config.paths) == 1 and not config.compare and config.prompt is None
    if not config.paths:
        raise DataError("expected a run or a checkpoint folder, found none; type python evaluate.py FOLDER")
    prompt = config.prompt
    is_folder = prompt is not None and os.path.exists(os.path.join(prompt, "config.json"))
    require(config, ("prompt", prompt is None or not config.compare, "none with --compare"),
            ("prompt", not is_folder, "the words of a prompt, then folders"),
            ("fluency", config.compare or not config.fluency, "none without --compare"),
            ("out", alone or not config.out, "none with --compare, --prompt or several paths"))
    if prompt is not None:
        for path in config.paths:
            print_answer(config, path)
    elif config.compare:
        fluency = open_model(config.fluency, config) if config.fluency else None
        text, _ = compare(config.paths, fluency)
        print(text)
    else:
        results = {str(path): evaluate_path(config, path) for path in config.paths}
        columns = {path: figures(of_path) for path, of_path in results.items()}
        print(f"\nper cent, 95 % intervals; ASR @k: one or more of k samples\n{table(columns)}",
              *map(lines_below, results.values()), sep="")


if __name__ == "__main__":
    run(main, EvalConfig, positional="paths")
