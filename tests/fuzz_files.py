"""For test_fuzz.py: sound files of every kind, the code that reads them, and what is done to them."""

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path

# ---------------------------------------------------------------- mutations

RAW = {"@huge": "1" * 10**5, "@inf": "1e999", "@deep": "[" * 10**5 + "]" * 10**5, "@objects": '{"a":' * 200 + "1" + "}" * 200,
       "@nan": "NaN", "@half": '"\\ud83d"', "@nul": '"\\u0000"', "@twice": '{"a": 1, "a": 2}'}  # text of JSON that no value gives
ODD = [None, True, False, 0, -1, 1, 7, 10**9, 2**63, -(10**30), 0.5, -0.5, 1e308, 5e-324, "", "x", "0", "128", "yes", "../x", "/etc/passwd",
       "a" * 10**5, [], [None], [[1]], [-1, "x"], {}, {"a": 1}, {"content": 3}, "\n", "{{ 1/0 }}", "<|end|>", "\u2028é", *RAW]


def slots_of(value, slots):
    """Append (container, key) of every value inside a JSON value to `slots`, and return it."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        slots.append((value, key))
        slots_of(part, slots)
    return slots


def mutated(value, rng) -> str:
    """Return the text of a JSON value with some of its parts replaced, deleted, renamed or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 2, 3])):
        slots = slots_of(value, [])
        if not slots:
            break
        keyed = [slot for slot in slots if not isinstance(slot[1], int)] or slots  # without the items of long lists
        container, key = rng.choice(keyed if rng.random() < 0.7 else slots)
        how = rng.random()
        if how < 0.65:
            container[key] = rng.choice(ODD)
        elif how < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[str(rng.choice(ODD))[:50]] = container[key] if rng.random() < 0.5 else rng.choice(ODD)
        else:
            container.append(rng.choice([container[key], rng.choice(ODD)]))
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text


def damaged(data: bytes, rng) -> bytes:
    """Return bytes that are cut, flipped, doubled, or have others inserted."""
    at, data = rng.randrange(len(data) + 1), bytearray(data)
    how = rng.randrange(6)
    if how == 0:
        del data[at:]
    elif how == 1:
        data[at : at + 1] = bytes([rng.randrange(256)])
    elif how == 2:
        data[at:at] = rng.choice([b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\xbd", b'"', b"\n", b"\r", b",", b"}", b"]", b"\\u0000", b"{%"])
    elif how == 3:
        data[at:at] = data[at : at + rng.randrange(99)]
    elif how == 4:
        del data[at : at + rng.randrange(9)]
    else:
        data[:8] = rng.randrange(2**64).to_bytes(8, "little")
    return bytes(data)


def mutate(file: Path, rng) -> None:
    """Change a file: its values where it is JSON, else its bytes; or replace it by a folder, pipe or link."""
    data, how = file.read_bytes(), rng.random()
    if how < 0.04:
        file.unlink()
        rng.choice([file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file.name),
                    lambda: file.symlink_to("/etc/passwd"), lambda: None])()
    elif file.suffix == ".safetensors" and how < 0.6:
        size = int.from_bytes(data[:8], "little")
        header = mutated(json.loads(data[8 : 8 + size]), rng).encode("utf-8", "replace")
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    elif file.suffix == ".jsonl" and how < 0.8:
        lines = data.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = mutated(json.loads(lines[i]), rng)
        file.write_text("\n".join(lines), errors="surrogatepass")
    elif file.suffix == ".json" and how < 0.85:
        file.write_text(mutated(json.loads(data), rng), errors="surrogatepass")
    else:
        file.write_bytes(damaged(data, rng))


# ---------------------------------------------------------------- sound files, and the code that reads them

PIECES = ("{{ m.content }}", "{{ m['role'] }}", "<|end|>", "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x }}", "{{ x }}",
          "{% set ns.x = ns.x + ns.x %}", "{{ ns.x * 10**9 }}", "{{ 10 ** 10**8 }}", "{{ 1/0 }}", "{{ nope|tojson }}", "{{ '%99999999d' % 1 }}",
          "{{ messages|tojson(indent=9**9) }}", "{{ 'x'|center(999999999) }}", "{{ 'x'.ljust(999999999) }}", "{{ nope.nope }}", "{{ loop.index }}",
          "{{ f(1) }}{{ f(1) }}", "{{ messages }}", "{{ range(10**9)|list }}", "{{ raise_exception(messages) }}", "{{ strftime_now('%99999999d') }}",
          "{{ ns.x|join(ns.x) }}", "{{ ns.x.replace('', ns.x) }}", "{{ ''.__class__ }}", "{{ dict(x=messages) }}", "{{ messages[::-1][0] }}", "{{", "%}",
          "{{ bos_token }}", "{{ messages|map(attribute='content')|join(' ') }}", "{{ m.content.split(' ')|last|trim }}", "{{ ns.x|length }}")
AROUND = (("{% for m in messages %}", "{% endfor %}"), ("{% for i in range(9999) %}", "{% endfor %}"), ("{% macro f(n) %}", "{% endmacro %}"),
          ("{% if m.role == 'user' %}", "{% endif %}"), ("{% generation %}", "{% endgeneration %}"), ("{% set y %}", "{% endset %}"),
          ("{% filter upper %}", "{% endfilter %}"), ("{% set ns = namespace(x='ab') %}", ""), ("", "{% break %}"))


def lines(rows) -> str:
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def prepare():
    """Return {kind: (make(folder, rng) → files that may be mutated, read(folder))}. Imports the project's modules."""
    import torch
    from safetensors.torch import load_file, save_file

    from data.chat import Chat, Example, encode_examples
    from data.conversations import WORLD, Conversation, read_conversations
    from evaluate import compare
    from lib.files import DataError, write_config, write_jsonl
    from lib.report import summarize
    from lib.risk import read_risk
    from lib.run import restore_state, resumed_options
    from model import load_model
    from probe import Probe, depends_on, load_probe
    from train import TrainConfig, complete_options

    golden = sorted(path.parent for path in (Path(__file__).parent / "golden").glob("*/golden.safetensors"))
    world, chat = load_model(WORLD / "model"), Chat(WORLD / "model")
    pairs = [{"prompt": "Hello there", "response": "Good day.", "harmful": False, "source": "x"},
             {"instruction": "Add them", "input": "1 2", "output": "3", "harmful": True},
             {"messages": [{"role": r, "content": c} for r, c in zip(("system", "user", "assistant"), "abc")], "harmful": True}]

    def records(folder, rng):
        texts = {"rows.jsonl": lines(pairs), "rows.json": json.dumps(pairs), "rows.txt": "Hello\n\nthere\n",
                 "rows.csv": 'goal,target,harmful\n"a, ""b""\nc",Sure,1\nx,y,0\n'}
        name = rng.choice(list(texts))
        (folder / name).write_text(texts[name])
        return [folder / name]

    def read_records(folder):
        for file in folder.glob("rows.*"):
            need = "prompt" if file.suffix == ".txt" else "answer"
            found = read_conversations(file, need)
            write_jsonl(folder / "out.jsonl", [c.meta for c in found])  # as critic.py --out does: it must not be lost
            if need == "answer":
                assert [c.hash for c in read_conversations(folder / "out.jsonl", need)] == [c.hash for c in found]
                encode_examples(chat, found, 64)

    def talk(prompt, response, where="?"):
        return Conversation(({"role": "user", "content": prompt}, {"role": "assistant", "content": response}), where)

    def risks(folder, rng):
        rows = [talk(f"a{i}", f"b{i}") for i in range(4)]
        said = [{"hash": c.hash, "risk": 0.5} if i % 2 else {"prompt": f"a{i}", "response": f"b{i}", "risk": 1, "valid": True}
                for i, c in enumerate(rows)]
        (folder / "risk.jsonl").write_text(lines(said))
        return [folder / "risk.jsonl"]

    def read_risks(folder):
        rows = [talk(f"a{i}", f"b{i}", f"{folder}:{i}") for i in range(4)]
        assert all(0 <= s <= 1 for s in read_risk(folder / "risk.jsonl", encode_examples(chat, rows, 64)))

    def model(folder, rng):
        shutil.copytree(rng.choice(golden), folder, dirs_exist_ok=True, ignore=lambda *_: ["golden.safetensors"])
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
        files = [folder / name for name in ("config.json", "generation_config.json", "model.safetensors")]
        if rng.random() < 0.3:
            weights = load_file(files.pop())
            os.replace(folder / "model.safetensors", folder / "a.safetensors")
            files.append(folder / "model.safetensors.index.json")
            files[-1].write_text(json.dumps({"weight_map": dict.fromkeys(weights, "a.safetensors")}))
        return [rng.choice([files[0], *files])]

    def read_model(folder):
        found = load_model(folder)
        assert found(torch.tensor([[3, 4, 5]])).shape == (1, 3, found.config.vocab_size)

    def tokenizer(folder, rng):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(WORLD / "model" / name, folder)
        named = rng.random() > 0.4
        if named:
            source, file = (folder / "chat_template.jinja").read_text(), folder / "tokenizer_config.json"
            (folder / "chat_template.jinja").unlink()
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": [{"name": "default", "template": source}]}))
        return [folder / ("tokenizer_config.json" if named else "tokenizer.json")]

    def template(folder, rng):
        tokenizer(folder, random.Random(1))
        sound = (WORLD / "model" / "chat_template.jinja").read_text()
        new = ""
        for _ in range(rng.randrange(1, 6)):
            before, behind = rng.choice(AROUND)
            new = before + new + "".join(rng.choices(PIECES, k=rng.randrange(3))) + behind
        at = sound.index("{{ m.content") if "{{ m.content" in sound else len(sound)
        (folder / "chat_template.jinja").write_text(rng.choice([new, sound + new, new + sound, sound[:at] + new + sound[at:]]))
        return []

    def read_chat(folder):
        found = Chat(folder)
        rows = [talk("Hello!", "Yes 12.", f"{folder}/x.jsonl:0"), talk("<|end|>é", "x\n", f"{folder}/x.jsonl:1")]
        assert max(found.encode_prompt(rows[0].prompts[-1], f"{folder}")) < world.config.vocab_size
        encode_examples(found, rows, 64)

    def probe(folder, rng):
        h, double = world.config.hidden_size, torch.float64
        values = Probe(torch.ones(h, dtype=double), torch.zeros((), dtype=double), torch.zeros(h, dtype=double), torch.ones(h, dtype=double),
                       *depends_on(world, chat).values())
        values = asdict(values) | {"report": {"test": {"auroc": 0.9, "n_harmful": 3, "n_benign": 3}}}
        tensors = {name: values.pop(name) for name in ("weight", "bias", "mean", "std")}
        name, text = rng.choice(list(tensors)), json.dumps(values)
        if rng.random() < 0.4:
            text = mutated(values, rng).encode("utf-8", "replace").decode()
        elif rng.random() < 0.6:
            tensors[name] = rng.choice([tensors[name] * float("nan"), -tensors[name], tensors[name].float(), tensors[name][None], torch.ones(3)])
        save_file(tensors, folder / "probe.safetensors", {"probe": text})
        return [folder / "probe.safetensors"] * (rng.random() < 0.4)

    def read_probe(folder):
        found, _ = load_probe(folder / "probe.safetensors", world, chat)
        assert 0 <= found.risk(torch.zeros(1, world.config.hidden_size)).item() <= 1

    def run(folder, rng):
        common = {"group": "g", "cut": False, "thought": "", "prompt": "p", "response": "r"}
        harmful = common | {"kind": "harmful", "set": "harmful", "refused": True, "score": 2.0, "harmful": False}
        rows = [harmful | {"decoding": decoding} for decoding in ("greedy", "sample 0", "sample 1") for _ in range(3)]
        rows.append(harmful | {"kind": "benign", "set": "benign", "decoding": "greedy", "score": None, "harmful": True})
        rows.append(common | {"kind": "task", "set": "task", "decoding": "greedy", "correct": True, "answer": "3"})
        for name in ("mine-0", "mine-1"):
            (folder / name).mkdir()
            config = {"model": "m", "seed": int(name[-1]), "temperature": 1.0, "max_new_tokens": 48, "samples": 2,
                      "model_sha256": "a", "sets_sha256": "b"}
            (folder / name / "config.json").write_text(json.dumps(config))
            (folder / name / "results.json").write_text(json.dumps(dict.fromkeys(("base", "after"), summarize(rows, 1.0, 48))))
            for which in ("base", "after"):
                (folder / name / f"completions_{which}.jsonl").write_text(lines(rows))
        return [folder / "mine-1" / rng.choice(["config.json", "results.json", "completions_after.jsonl", "completions_base.jsonl"])]

    def read_run(folder):
        compare([folder / "mine-0", folder / "mine-1"])

    asked = Conversation(({"role": "user", "content": "a"},))
    example = Example(0, [1], [1], asked, asked)

    def resume(folder, rng):
        out = folder / "stopped"
        out.mkdir()
        write_config(out / "config.json", TrainConfig(judge="none"), computed_in="float32")
        (out / "metrics.jsonl").write_text(lines([{"step": 0, "loss": 1.0}]))
        (out / "risk.jsonl").write_text(lines([{"risk": 0.5, "hash": example.training_text.hash}]))
        tensors, how = [{"parameter": torch.ones(2, 2)}, {"parameter": torch.ones(2)}], rng.random()
        saved = {"key": "the key", "state": {"step": 1, "smoothed_risk": None, "moved": True}, "tensors": tensors}
        if how < 0.2:
            tensors[0]["parameter"] = rng.choice([torch.ones(()), torch.ones(3), torch.ones(2, 2).long(), torch.ones(2, 2) / 0, None])
        elif how < 0.3:
            saved[rng.choice(list(saved))] = rng.choice(["", "x", None, [1], {}])
        torch.save(saved, out / "state.pt")
        return [out / rng.choice(["config.json", "risk.jsonl", "metrics.jsonl", "state.pt"])] * (how >= 0.3)

    def read_resume(folder):
        out = folder / "stopped"
        options = resumed_options(TrainConfig(resume=out))
        try:
            complete_options(options)
        except DataError as error:  # a value out of range: the options have been printed with their file
            if str(error).startswith("--"):
                return
            raise
        [risk] = read_risk(out / "risk.jsonl", [example])
        assert 0 <= risk <= 1
        parameters = list(torch.nn.Linear(2, 2).parameters())
        assert restore_state(out, parameters, torch.optim.AdamW(parameters), "the key").step in (0, 1)

    return {"records": (records, read_records), "risks": (risks, read_risks), "model": (model, read_model), "tokenizer": (tokenizer, read_chat),
            "template": (template, read_chat), "probe": (probe, read_probe),
            "run": (run, read_run), "resume": (resume, read_resume)}
