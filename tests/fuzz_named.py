"""For test_fuzz.py: files that were once accepted, or ended in a traceback or a hang: (kind, change, words of the error)."""

import json
import os

from fuzz_files import RAW


def edit(name, **values):
    """Return a change that sets values of a JSON file. A value that is one of RAW becomes its text."""
    def change(folder):
        text = json.dumps(json.loads((folder / name).read_text()) | values)
        for key, raw in RAW.items():
            text = text.replace(json.dumps(key), raw)
        (folder / name).write_text(text)
    return change


def put(name, text):
    """Return a change that writes a file, in place of all others of its kind."""
    return lambda folder: (clear(folder / name), (folder / name).write_text(text))


def link(name, target):
    """Return a change that makes a file a link."""
    return lambda folder: (clear(folder / name), (folder / name).symlink_to(target))


def pipe(name):
    """Return a change that makes a file a pipe."""
    return lambda folder: (clear(folder / name), os.mkfifo(folder / name))


def clear(file):
    """Delete a file, and a data file of any ending."""
    for other in file.parent.glob("rows.*" if file.stem == "rows" else file.name):
        other.unlink()


def jinja(text):
    """Return a change that writes the chat template."""
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


HELLO = '{"prompt": "Hello", "response": "Yes"'
OVER = "s of processor time or"
NAMED = [
    *(("model", edit("config.json", **{key: value}), f"{key}: expected") for key, value in [
        ("rope_parameters", True), ("num_key_value_heads", -1), ("num_key_value_heads", "128"), ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2), ("num_hidden_layers", True), ("vocab_size", 2**63), ("hidden_size", "32"), ("hidden_size", 32.0),
        ("head_dim", 0), ("head_dim", -2), ("sliding_window", 0), ("sliding_window", "9"), ("rms_norm_eps", "@nan"), ("rms_norm_eps", 0),
        ("max_position_embeddings", 10**30), ("tie_word_embeddings", "yes"), ("attention_bias", 1), ("dtype", ["float32"]),
        ("eos_token_id", "2"), ("eos_token_id", -1), ("eos_token_id", 96), ("eos_token_id", [[2]]), ("eos_token_id", True),
        ("model_type", []), ("hidden_act", {}), ("intermediate_size", "@inf")]),
    *(("model", edit("config.json", rope_parameters={"rope_type": "default", "rope_theta": 1e4} | rope), words) for rope, words in [
        ({"rope_theta": 0}, "rope_theta: expected"), ({"rope_theta": -1.0}, "rope_theta: expected"), ({"rope_theta": "@nan"}, "rope_theta"),
        ({"rope_theta": "@inf"}, "rope_theta: expected"), ({"partial_rotary_factor": 2}, "partial_rotary_factor: expected"),
        ({"partial_rotary_factor": 0.1}, "an even number of rotary dimensions"), ({"rope_type": "linear", "factor": "2"}, "factor: expected"),
        ({"rope_type": "longrope", "factor": 1, "short_factor": [1.0], "long_factor": [1.0]}, "short_factor: expected a list of 4"),
        ({"rope_type": ["linear"]}, "rope_type: expected"), ({"full_attention": {"rope_theta": 1}}, "one set of parameters")]),
    *(("model", edit("generation_config.json", eos_token_id=odd), "eos_token_id: expected") for odd in ("@huge", [7, 10**6], [True], {})[1:]),
    ("model", edit("config.json", x="@deep"), "levels"), ("model", edit("config.json", x="@huge"), "limit"),
    ("model", pipe("config.json"), "expected a file"), ("model", pipe("model.safetensors"), "expected a file"),
    ("model", link("model.safetensors", "/etc/passwd"), "expected a safetensors file"),
    ("model", link("config.json", "config.json"), "expected a file"),
    *(("model", put("model.safetensors.index.json", json.dumps({"weight_map": odd})), "weight_map: expected names of safetensors files")
      for odd in (3, [], {}, {"a": 3}, {"a": []})),
    ("template", jinja(""), "expected a chat template"), ("template", jinja("x"), "renders what a user says, found: other text"),
    ("template", jinja("{% if not add_generation_prompt %}{{ messages }}{% endif %}"), "found: nothing"),
    *(("template", jinja(text), words) for text, words in [
        ("{{ 1/0 }}", "ZeroDivisionError"), ("{{ range(10**9) }}", "Range too big"), ("{{ nope|tojson }}", "not JSON serializable"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"), ("{{ 10**(10**8) }}", OVER), ("{{ 'x' * 10**10 }}", "MemoryError"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "MemoryError"),
        ("{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}", OVER),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", OVER),
        ("{% for a in range(99999) %}{{ messages }}{% endfor %}", "characters of text"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('a\x1b[31m\nb') }}", "refuses it: a [31m b"), ("{% if %}", "TemplateSyntaxError"), ("{{ " + "(" * 9999, "RecursionError"),
        ("{{ messages[0].content }}{{ '\\ud83d' }}", "expected a tokenizer")]),
    ("template", pipe("chat_template.jinja"), "expected a file"),
    ("template", edit("config.json", vocab_size=50), "not under the model's vocab_size = 50"), ("template", put("tokenizer.json", "{}"), "a tokenizer"),
    *(("tokenizer", edit("tokenizer_config.json", chat_template=odd), "expected a chat template")
      for odd in (3, {"a": 1}, [3], [{"template": "x"}], [[]], None)),
    *(("records", put("rows.jsonl", HELLO + "}\n" + text), f"rows.jsonl:2: {words}") for text, words in [
        ('{"instruction": null, "input": "x", "output": "y"}', "expected text as instruction"), 
        ('{"instruction": "x", "input": 3, "output": "y"}', "expected text as instruction and input"), (HELLO + ', "system": []}', "expected message 1 as {role, content}"),
        ('{"prompt": ["x"], "response": "y"}', "expected message 1"), ('{"prompt": "\\ud800", "response": "y"}', "expected valid Unicode"),
        (HELLO + f', "x": {RAW["@huge"]}}}', "expected a JSON object"), (HELLO + f', "x": {RAW["@deep"]}}}', "expected a JSON object"),
        (json.dumps({"prompt": "x" * 2**21, "response": "y"}), "expected at most 1,048,576 characters"),
        (json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "assistant") * 9999]}), "expected at most 1000 messages")]),
    *(("records", put(name, text), words) for name, text, words in [
        ("rows.csv", "goal,target,goal\na,b,c\n", "rows.csv:1: expected each column once"), ("rows.csv", "goal,target\na,b\n" + "x" * 200000 + ",y", "csv:3: "),
        ("rows.json", RAW["@deep"], "levels"), ("rows.json", RAW["@huge"], "limit")]),
    ("records", pipe("rows.jsonl"), "expected a file"), ("records", link("rows.jsonl", "/dev/zero"), "expected a file"),
    ("records", lambda folder: (clear(folder / "rows.x"), (folder / "rows.txt").mkdir()), "expected a file"),
    *(("risks", put("risk.jsonl", json.dumps(row) + "\n"), "risk.jsonl:1: ") for row in (
        {"risk": 0.1, "hash": 3}, {"risk": True, "hash": "x"}, {"risk": "0"}, {"risk": 10**300, "prompt": "a0", "response": "b0"}, [1])),
    ("risks", put("risk.jsonl", RAW["@deep"]), "risk.jsonl:1: "), ("risks", pipe("risk.jsonl"), "expected a file"),
    ("probe", pipe("probe.safetensors"), "expected a file"), ("probe", put("probe.safetensors", "x"), "written by probe.py"),
    *(("run", edit(f"mine-1/{name}", **{key: value}), words) for name, key, value, words in [
        ("config.json", "seed", "1", "seed: expected"), ("config.json", "temperature", "@nan", "results.json to follow"),
        ("config.json", "max_new_tokens", [], "results.json to follow"), ("results.json", "after", 3, "to follow from completions_after"),
        ("results.json", "after", {"harmful": {"ASR harmful greedy": {"rate": 7}}}, "to follow"), ("results.json", "base", {}, "to follow")]),
    *(("run", lambda folder, row=row: (folder / "mine-1" / "completions_after.jsonl").write_text(row), words) for row, words in [
        ("3\n", "after.jsonl:1: expected an object"), ("{}\n", "to follow from completions_after"), ("", "to follow from completions_after")]),
]
