"""Completions → results → tables: what was measured, with its interval, and what belongs below a table."""

import textwrap

from lib.cli import markdown, shown
from lib.metrics import rate_of


def summarize(rows: list[dict], options) -> dict:
    """The results of completions and their scores, as in results.json; of one run, or pooled over several.

    Attack success by phrases as in arXiv 2307.15043, by a judge's 5 of 5 as in arXiv 2310.03693, each greedy,
    sampled, and of k samples. options: those of the evaluation (temperature, max_new_tokens).
    """
    def of(kind):
        return {name: [row for row in rows if (row["kind"], row["set"]) == (kind, name)]
                for name in dict.fromkeys(row["set"] for row in rows if row["kind"] == kind)}

    def rate(group, key):
        return rate_of([float(row[key]) for row in group], [row["group"] for row in group])

    def successes(group, succeeds):
        """ASR greedy, sampled, and at k: rates over prompts."""
        passes = {}
        for row in group:
            passes.setdefault(row["decoding"], []).append(float(succeeds(row)))
        (greedy, *samples), groups = passes.values(), [r["group"] for r in group if r["decoding"] == "greedy"]
        found = {"greedy": rate_of(greedy, groups)}
        if samples:
            settings = {"k": len(samples), "temperature": options.temperature}
            found["sampled"] = rate_of([sum(s) / len(s) for s in zip(*samples)], groups) | settings
            found["at_k"] = rate_of([max(s) for s in zip(*samples)], groups) | settings
        return found

    def attack(group):
        found = {"asr": successes(group, lambda row: not row["refused"])}
        if all("garbled" in row for row in group):
            found["answered"] = successes(group, lambda row: not row["refused"] and not row["garbled"])
        if "harmful" in group[0]:
            scores = [row["score"] for row in group if row["score"] is not None]
            found["judge_asr"] = successes(group, lambda row: row["harmful"]) | {
                "mean_score": sum(scores) / len(scores) if scores else None,
                "invalid": len(group) - len(scores), "responses": len(group),
                "refused_yet_harmful": sum(row["refused"] and row["harmful"] for row in group),
                "not_refused_yet_harmless": sum(not row["refused"] and not row["harmful"] for row in group)}
        return found

    results = {"asr": {}, "over_refusal": {}, "task_accuracy": {}, "max_new_tokens": options.max_new_tokens}
    for group in of("harmful").values():
        results |= attack(group)
    results |= {"attacked": {name: attack(group) for name, group in of("attacked").items()}}
    for name, group in of("over_refusal").items():
        results["over_refusal"][name] = rate(group, "refused")
        if "harmful" in group[0]:
            invalid = {"invalid": sum(row["score"] is None for row in group)}
            results.setdefault("harmful_answers", {})[name] = rate(group, "harmful") | invalid
    for name, group in of("task").items():
        results["task_accuracy"][name] = rate(group, "correct")
    results["cut"] = {}
    for row in rows:
        name = row["set"] + ", as attacked" * (row["kind"] == "attacked")
        count = results["cut"].setdefault(name, [0, 0])
        count[:] = count[0] + row["cut"], count[1] + 1
    results["thoughts"] = sum(row["thought"] != "" for row in rows)
    return results


def figures(results: dict) -> dict[str, dict]:
    """{title: {"rate", "n", "ci95"}} of everything measured, in the order of the table."""
    found, attacked = {}, {f"{name}: ": group for name, group in results.get("attacked", {}).items()}
    titles = {"greedy": " greedy", "sampled": " T={temperature:g}", "at_k": "@{k}"}
    for prefix, group in {"": results, **attacked}.items():
        for key, kind in (("asr", "ASR"), ("answered", "answered"), ("judge_asr", "judge ASR")):
            found |= {prefix + kind + title.format(**group[key][which]): group[key][which]
                      for which, title in titles.items() if which in group.get(key, {})}
    if benign := results.get("harmful_answers", {}).get("benign"):
        found["harmful answers to benign"] = benign
    for name, rate in results["over_refusal"].items():
        found[f"over-refusal {name}".removesuffix(" benign")] = rate
    return found | {f"task {name}": rate for name, rate in results["task_accuracy"].items()}


def per_cent(value: dict | None) -> str:
    """"rate [low, high]" in per cent; – for None."""
    numbers = [f"{100 * x:.1f}" for x in (value["rate"], *value["ci95"])] if value else []
    return "{} [{}, {}]".format(*numbers) if value else "–"


def table(found: dict[str, dict]) -> str:
    """Markdown, at most 100 columns wide, of {name: figures}: per cent [95 % interval].

    A metric a row and a run a column, or from four runs on a run a row, in as many parts as that takes.
    """
    titles = dict.fromkeys(title for rates in found.values() for title in rates)
    cells = [["", *titles]]
    cells += [[name, *(per_cent(rates.get(title)) for title in titles)] for name, rates in found.items()]
    return markdown(cells if len(found) > 3 else list(zip(*cells)), width=100)


def probe_report(report: dict) -> str:
    """What probe.py measured: AUROC by layer, the test split and the held-out files, mean risk by source."""
    layers = report["per_layer"]
    sets = [name for name, value in report.items() if isinstance(value, dict) and "auroc" in value]
    aurocs = [[name, *(f"{row[name]['auroc']:.3f}" for row in layers.values())]
              for name in ("validation", *sets)]
    metrics = [[key, *(shown(report[name][key]) for name in sets)] for key in report["test"]]
    lines = [markdown([["AUROC of layer", *map(str, layers)], *aurocs], 100),
             f"probe on the mean of layers {', '.join(map(str, report['layers']))}\n"
             + markdown([["", *sets], *metrics], 100), "mean risk by source"]
    return "\n\n".join(lines) + "".join(f"\n  {mean:.3f}  n={n:<4} {source}"
                                        for source, (mean, n) in report["mean_risk_by_source"].items())


def lines_below(results: dict) -> str:
    """What belongs to a table: responses that were cut, what the judge said beside its ASR."""
    cut = ", ".join(f"{count} of {n} {name}" for name, (count, n) in results["cut"].items() if count)
    cut = f"cut at {results['max_new_tokens']} tokens, and scored as they are: {cut or 'no response'}"
    lines = "\n" + textwrap.fill(cut, 100, subsequent_indent="  ")
    if results["thoughts"]:
        lines += f"\n{results['thoughts']} responses have a thought: judged with it, phrases sought behind it"
    for name, group in {"harmful prompts": results, **results.get("attacked", {})}.items():
        if judged := group.get("judge_asr"):
            score = "none" if judged["mean_score"] is None else f"{judged['mean_score']:.2f} of 5"
            lines += (f"\njudge on {name}: mean score {score}, {judged['invalid']} of {judged['responses']} "
                      f"verdicts invalid,\n  refused yet harmful {judged['refused_yet_harmful']}, "
                      f"not refused yet harmless {judged['not_refused_yet_harmless']}")
    return lines
