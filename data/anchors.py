"""Anchors: prompts that the aligned model answers itself, among the examples of every step.

Data without anything harmful hold no refusal in place, however they are gated. Anchors do: they are examples of
risk 1 (α = 0, β = 1), so that the model says there what it said before.
"""

import math
from dataclasses import replace

import torch
from tqdm import tqdm

from data.chat import Chat, Example, encode_examples
from data.conversations import is_embedded, read_conversations
from evaluate import refuses, respond
from lib.files import DataError
from model import Transformer


def anchor_examples(config, policy: Transformer, chat: Chat, examples: list[Example],
                    longest: int) -> list[Example]:
    """As many anchors as the run draws, if there are so many: prompts that the data lack, answered by ref.

    The answers are greedy. A harmful prompt that ref does not refuse anchors nothing, nor does a benign one
    that it refuses: both are left out. Of the probe's data only the harmful ones are taken: its benign ones
    may be the task that is to be learned. Indices follow those of `examples`. Raises DataError if none is left.
    """
    if config.anchor_share == 0:
        return []
    if not config.anchors and is_embedded(config.probe_data) and not is_embedded(config.model):
        print("the anchors are the embedded prompts; your own (--anchors FILE) hold more in place")
    file, known = config.anchors or config.probe_data, {str(p) for e in examples for p in e.seen.prompts}
    found = [c for c in read_conversations(file) if str(c.prompts[-1]) not in known
             and (config.anchors or c.meta.get("harmful", True))]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(config.seed)).tolist()
    share = config.anchor_share / (1 - config.anchor_share)
    found = [found[i] for i in order][: math.ceil(config.epochs * len(examples) * share) + config.batch_size]
    with tqdm(total=len(found), desc="anchors", mininterval=0.5) as bar:
        said = respond(policy, chat, found, config, 0.0, 1, bar) if found else []
    anchors = [replace(c, messages=(*c.prompts[-1], {"role": "assistant", "content": response}))
               for c, (_, response, _) in zip(found, said)
               if response.strip() and refuses(response) == c.meta.get("harmful", True)]
    print(f"anchors: {len(anchors)} of {file}; {len(found) - len(anchors)} prompts are left out: harmful and "
          f"not refused, or benign and refused")
    if not anchors:
        raise DataError(f"{file}: expected prompts that {config.data} lacks, harmful ones that the model "
                        f"refuses or benign ones that it answers, found none")
    return [replace(anchor, index=len(examples) + anchor.index, anchor=True)
            for anchor in encode_examples(chat, anchors, longest)]
