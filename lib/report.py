"""Results as tables: what was measured, in per cent with its interval, and what belongs below a table."""

import textwrap

from lib.cli import markdown


def figures(results: dict) -> dict[str, dict]:
    """{title: {"rate", "n", "ci95"}} of everything measured, in the order of the table."""
    found, attacked = {}, {f"{name}: ": group for name, group in results.get("attacked", {}).items()}
    titles = {"greedy": " greedy", "sampled": " T={temperature:g}", "at_k": "@{k}"}
    for prefix, group in {"": results, **attacked}.items():
        for key, kind in (("asr", "ASR"), ("judge_asr", "judge ASR")):
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
