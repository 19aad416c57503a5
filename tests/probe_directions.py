"""What a probe looks at: its direction beside the refusal direction, layer by layer, and its risks by source.

python tests/probe_directions.py --model DIR --data probe.jsonl --score held_out.jsonl,benign.jsonl --out FILE

The refusal direction is the difference of the mean activations of harmful and harmless prompts (Arditi et al.
2024, arXiv 2406.11717). Both are measured on the split of `data` that probe.py fits on.
"""

import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.chat import Chat, encode_prompts  # noqa: E402
from data.conversations import WORLD, read_conversations, split_by_prompt  # noqa: E402
from lib.checkpoint import fingerprint  # noqa: E402
from lib.cli import comma_list, run  # noqa: E402
from lib.files import write_json  # noqa: E402
from lib.report import auroc, shown, tpr_at_fpr  # noqa: E402
from model import load_model, working_dtype  # noqa: E402
from probe import L2, Probe, depends_on, fit_logistic, prompt_features  # noqa: E402

BINS = 10  # of the histograms, from 0 to 1


@dataclass(frozen=True)
class DirectionConfig:
    """Compare the probe's direction with the refusal direction; count risks by source."""

    model: Path = WORLD / "model"  # the aligned model
    data: Path = WORLD / "probe.jsonl"  # prompts with "harmful": true | false
    score: str = ""  # further files of prompts, of which the risks are counted, comma-separated
    out: Path = Path("directions.json")  # file to write
    device: str = "cpu"  # where the model runs


def cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return the cosine of two vectors; None where one is 0."""
    norms = a.norm() * b.norm()
    return (a @ b / norms).item() if norms else None


def directions(x: torch.Tensor, y: torch.Tensor, test: torch.Tensor, test_y: torch.Tensor) -> dict:
    """Compare w and Δμ of activations x (N, H) with labels y (N,) in {0, 1}; measure both on `test`.

    Returns the cosine in the space of the activations, where the logit's gradient is w/std, the cosine in
    standardised coordinates, where w is penalised, and the AUROC of each direction on the test split.
    """
    weight, _, mean, std = fit_logistic(x, y, L2)
    x, test = x.double(), test.double()
    refusal = x[y == 1].mean(0) - x[y == 0].mean(0)
    risk = (test - mean) / std @ weight
    return {"cosine": cosine(weight / std, refusal), "cosine standardised": cosine(weight, refusal / std),
            "auroc probe": auroc(risk, test_y), "tpr at 1 % fpr": tpr_at_fpr(risk, test_y),
            "auroc refusal": auroc(test @ refusal, test_y)}


def main(config: DirectionConfig) -> None:
    """Fit on each layer and on their mean; write {"layers", "mean", "histogram"}."""
    model = load_model(config.model, config.device, working_dtype(config.device))
    chat = Chat(config.model)
    fitted_on, test = split_by_prompt(read_conversations(config.data, need="harmful"))
    scored = {"test": test}
    for file in comma_list(config.score):
        scored[Path(file).stem] = read_conversations(file, need="prompt")
    everything = fitted_on + sum(scored.values(), [])
    prompts = encode_prompts(chat, everything, model.config.max_position_embeddings)
    features = prompt_features(model, prompts, desc="activations")
    n, n_test = len(fitted_on), len(test)
    x, x_test = features[:n], features[n : n + n_test]
    y, y_test = (torch.tensor([float(c.meta["harmful"]) for c in rows]) for rows in (fitted_on, test))
    by_layer = [directions(x[:, i], y, x_test[:, i], y_test) for i in range(features.shape[1])]
    probe = Probe(*fit_logistic(x.mean(1), y, L2), **depends_on(model, chat))
    risks = probe.risk(features[n:].mean(1)).tolist()
    histogram = defaultdict(lambda: [0] * BINS)
    names = [name for name, conversations in scored.items() for _ in conversations]
    for name, conversation, risk in zip(names, everything[n:], risks):
        histogram[f"{name}: {conversation.meta.get('source', name)}"][min(BINS - 1, int(risk * BINS))] += 1
    write_json(config.out, {"model_sha256": fingerprint(config.model), "n": {"fit": n, "test": n_test}, "layers": by_layer,
                            "mean": directions(x.mean(1), y, x_test.mean(1), y_test), "histogram": histogram})
    for i, row in enumerate(by_layer):
        print(f"layer {i}: " + ", ".join(f"{name} {shown(value)}" for name, value in row.items()))
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run(main, DirectionConfig)
