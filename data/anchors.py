"""Anchors: prompts that the aligned model answers itself, a share of the examples of a run.

Data without anything harmful hold no refusal in place, however they are gated. Anchors do: to a method with
a pull they are examples of risk 1 (α = 0, β = 1), where the model says what it said before; to one without,
plain examples.
"""

import math
from dataclasses import replace

import torch
from tqdm import tqdm

from data.chat import IGNORE, Chat, Example, encode_examples
from data.conversations import conversation_of, is_embedded, read_conversations
from evaluate import refuses, respond
from lib.files import DataError
from model import Transformer

LISA_CYCLE = 50  # steps, of which --method lisa gives the first to anchors (the paper: 1,000, in longer runs)
ANCHOR_TOKENS = 24  # of an answer, at most: the first tokens decide between refusing and answering


def anchor_records(config, policy: Transformer, chat: Chat, examples: list[Example]) -> list[dict]:
    """Anchors for a run, no more than it draws: prompts that the data lack, with ref's greedy answers.

    A harmful prompt that it does not refuse anchors nothing, nor does a benign one ("harmful": false) that it
    refuses: both are left out. Of the probe's data only the harmful ones are taken: its benign ones may be
    the task that is to be learned. "cut": whether the answer was. Raises DataError for a `harmful` that is no
    boolean, and where no anchor is left.
    """
    if not config.anchors and is_embedded(config.probe_data) and not is_embedded(config.model):
        print("the anchors are the embedded prompts; your own (--anchors FILE) hold more in place")
    file = config.anchors or config.probe_data
    known = {str(prompt) for e in examples for c in (e.conversation, e.training_text) for prompt in c.prompts}
    found = [c for c in read_conversations(file) if str(c.prompts[-1]) not in known]
    harmful = [c.meta.get("harmful", True) for c in found]
    if odd := next((c for c, value in zip(found, harmful) if not isinstance(value, bool)), None):
        raise DataError(f"{odd.where}: harmful: expected true or false, found {odd.meta['harmful']!r}")
    found = [(c, value) for c, value in zip(found, harmful) if value or config.anchors]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(config.seed)).tolist()
    share = config.anchor_share / (1 - config.anchor_share)
    found = [found[i] for i in order][: math.ceil(config.epochs * len(examples) * share) + config.batch_size]
    options = replace(config, max_new_tokens=ANCHOR_TOKENS)
    with tqdm(total=len(found), desc="anchors", mininterval=0.5) as bar:
        said = respond(policy, chat, [c for c, _ in found], options, 0.0, 1, bar) if found else []
    kept = [c.meta | {"messages": [*c.prompts[-1], {"role": "assistant", "content": response}], "cut": cut}
            for (c, value), (_, response, cut) in zip(found, said)
            if response.strip() and not response.startswith("<think>") and refuses(response) == value]
    print(f"anchors: {len(kept)} of {file}; left out: {len(found) - len(kept)}, harmful and not refused, or "
          f"benign and refused")
    if not kept:
        raise DataError(f"{file}: expected prompts that {config.data} lacks, harmful and refused or benign "
                        f"ones (\"harmful\": false) that are answered, found none")
    return kept


def anchor_examples(records: list[dict], chat: Chat, first: int, longest: int) -> list[Example]:
    """Examples of `anchor_records`, numbered from `first`. An answer that was cut has no end to be learned.

    Raises DataError where there are none.
    """
    if not records:
        raise DataError("anchors.jsonl: expected the anchors of the run, found none")
    conversations = [conversation_of(record, f"anchors.jsonl:{i}", "answer")
                     for i, record in enumerate(records, 1)]
    anchors = encode_examples(chat, conversations, longest)
    for anchor in anchors:
        if anchor.conversation.meta.get("cut") and not anchor.cut:  # the model did not end its turn here
            anchor.labels[max(i for i, label in enumerate(anchor.labels) if label != IGNORE)] = IGNORE
    return [replace(anchor, index=first + anchor.index, anchor=True) for anchor in anchors]


def anchors_of_step(config, step: int) -> int:
    """How many of a step's examples are anchors: anchor_share of them in the long run, spread evenly.

    With Lisa all or none: each LISA_CYCLE steps begin with that share of them on anchors alone.
    """
    per_step, share = config.batch_size * config.accumulation, config.anchor_share
    if config.method == "lisa":
        return per_step * (step % LISA_CYCLE < round(share * LISA_CYCLE))
    return math.floor((step + 1) * share * per_step) - math.floor(step * share * per_step)
