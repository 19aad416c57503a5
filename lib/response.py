"""Response tokens: the final hidden states before them, their places, their log-probabilities."""

import torch

from data.chat import IGNORE, Example, batches_by_length, pad
from lib import fused


def response_states(model, examples: list[Example]) -> tuple:
    """Final hidden states (N, H) before the response tokens, these tokens (N,), the example of each (N,).

    Response tokens are those with a label: every assistant turn with its end. The only place where labels are
    shifted; of padded states it would be hidden[:, :-1][labels[:, 1:] != IGNORE]. Here only the n real tokens
    are computed. Right padding needs no mask: causal attention never looks there.
    """
    labels, device = pad([e.labels for e in examples], IGNORE, "right"), model.device
    real = pad([[True] * len(e.input_ids) for e in examples], False, "right")  # (B, T)
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # the state there predicts the next label
    place = (real.flatten().cumsum(0) - 1)[row * labels.shape[1] + column]  # where that state is among the n
    longrope = model.config.rope["rope_type"] == "longrope"  # alone has to know how long each row is
    hidden, _ = model.model(pad([e.input_ids for e in examples], 0, "right", device),
                            real.to(device) if longrope else None,
                            rows=real.flatten().nonzero()[:, 0].to(device))  # (n, H)
    return hidden[place.to(device)], labels[row, column + 1].to(device), row


def response_positions(example: Example) -> torch.Tensor:
    """1, 2, … for the response tokens (n,) of each assistant turn."""
    is_target = torch.tensor([label != IGNORE for label in example.labels])
    count = is_target.cumsum(0)
    return (count - (count * ~is_target).cummax(0).values)[1:][is_target[1:]]


@torch.no_grad()
def label_logp(model, examples: list[Example], batch_size: int) -> dict[int, torch.Tensor]:
    """{example.index: log-probabilities (n,) of its labels by the model, its adapters off}."""
    found = {}
    for batch in batches_by_length([len(e.input_ids) for e in examples], batch_size):
        batch = [examples[i] for i in batch]
        with model.adapters_off():
            hidden, labels, _ = response_states(model, batch)
        ones = torch.ones(len(labels), device=model.device)
        _, nll, _ = fused.token_loss(hidden, model.lm_head.weight, labels, ones, 0 * ones, hidden[:0])
        found |= dict(zip((e.index for e in batch), (-nll).split([e.n_labels for e in batch])))
    return found
