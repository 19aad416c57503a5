"""The order of the training data: which examples a step draws, as a function of the step's number."""

import functools

import torch

from data.chat import Example


@functools.lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of n examples in an epoch (0, 1, …): the seed's permutation number `epoch`."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch + 1):
        order = torch.randperm(n, generator=generator)
    return order.tolist()


def draw(examples: list[Example], seed: int, first: int, count: int) -> list[Example]:
    """Return draws number first … first + count − 1 from the examples, shuffled anew in every epoch."""
    n = len(examples)
    drawn = []
    for i in range(first, first + count):
        order = epoch_order(n, seed, i // n)
        drawn.append(examples[order[i % n]])
    return drawn


def step_examples(step: int, data: list[Example], anchors: list[Example], anchors_before,
                  per_step: int, seed: int) -> list[Example]:
    """Return the `per_step` examples of a step, the shortest first so that batches pad little.

    anchors_before(step): how many anchors all earlier steps draw; the rest of a step is data. Data and
    anchors are shuffled apart, each anew for every pass over them.
    """
    first_anchor = anchors_before(step)
    n_anchors = anchors_before(step + 1) - first_anchor
    drawn = draw(anchors, seed, first_anchor, n_anchors)
    drawn += draw(data, seed, step * per_step - first_anchor, per_step - n_anchors)
    return sorted(drawn, key=lambda example: len(example.input_ids))
