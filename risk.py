"""The risk s ∈ [0, 1] of every training conversation, once, before training: from the probe, the critic, the larger of both, or a file."""

import math
from pathlib import Path

import torch

from critic import agreement, conversation_verdicts
from data import Chat, Conversation, DataError, is_embedded, json_lines, ranks, read_text
from model import Transformer
from probe import ProbeConfig, conversation_risk, fit_probe, load_probe


def read_risk(path: Path, conversations: list[Conversation]) -> torch.Tensor:
    """Risk (N,) from a JSONL file with one {"risk": number in [0, 1] or null} per conversation, in their order; null and NaN become 1."""
    rows, risk = list(json_lines(read_text(path), path)), []
    if len(rows) != len(conversations):
        raise DataError(f"{path}: expected one risk for each of {len(conversations)} conversations, found {len(rows)}")
    for number, row in rows:
        try:
            value = row["risk"]
            risk.append(math.nan if value is None else float(value))
        except (ValueError, KeyError, TypeError, OverflowError):
            raise DataError(f'{path}:{number}: expected {{"risk": number from 0 to 1}}, found {str(row)[:60]}') from None
        if not (math.isnan(risk[-1]) or 0 <= risk[-1] <= 1):
            raise DataError(f"{path}:{number}: expected a risk from 0 to 1, found {value}")
    if unknown := sum(map(math.isnan, risk)):
        print(f"{unknown} of {len(risk)} risks are unknown: taken as 1")
    return torch.tensor(risk, dtype=torch.float64).nan_to_num(nan=1.0)


def probe_risk(config, model: Transformer, chat: Chat, conversations: list[Conversation]) -> tuple:
    """Risk (N,) in [0, 1] by the probe, and the (probe, report) if one was fitted for it."""
    fitted = None
    if config.probe:
        probe = load_probe(config.probe, model, chat)
    else:
        if is_embedded(config.probe_data) and not is_embedded(config.model):
            print("the probe is fitted on the embedded prompts; with prompts of your data's kinds (--probe-data FILE) it knows more")
        probe, report = fitted = fit_probe(ProbeConfig(model=config.model, data=config.probe_data, device=config.device), model, chat)
        test = report["test"]
        print(f"probe: AUROC {test['auroc']:.3f} on {test['n_harmful'] + test['n_benign']} held-out prompts of {config.probe_data}")
    return conversation_risk(probe, model, chat, conversations, ProbeConfig.batch_size), fitted


def training_risk(config, model: Transformer, chat: Chat, conversations: list[Conversation], judge) -> tuple:
    """Every conversation's {"risk": (N,), and what it was made of}, once, before training; and the (probe, report) if one was fitted."""
    if config.risk not in ("probe", "critic", "max"):
        return {"risk": read_risk(Path(config.risk), conversations)}, None
    parts, fitted = {}, None
    if config.risk != "critic":
        parts["probe"], fitted = probe_risk(config, model, chat, conversations)
    if config.risk != "probe":
        verdicts = ranks.on_first(lambda: conversation_verdicts(judge, conversations, config))
        parts["critic"] = torch.tensor([verdict.risk for verdict in verdicts], dtype=torch.float64)
    if config.risk == "max":
        both = agreement(parts["probe"], parts["critic"])
        print(f"probe and critic agree on {both['agree']:.1%}; risky to the probe alone: {both['only probe']}, "
              f"to the critic alone: {both['only critic']}")
    # One risk for all processes: what each runs depends on it.
    return ranks.on_first(lambda: {"risk": torch.stack(list(parts.values())).amax(0)} | parts), fitted
