"""Reading, splitting, rendering, masks and truncation."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from data.chat import batches_by_length, Chat, encode_examples, encode_prompts, IGNORE, LONGEST, pad, rows_that_fit
from data.conversations import Conversation, read_conversations, read_prompts, split_by_prompt, WORLD
from evaluate import EvalOptions, evaluation_sets
from lib.files import DataError, ModelError
from lib.template import render_template


def conversation(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    head = [{"role": "system", "content": system}] if system else []
    return Conversation(tuple(head + [{"role": r, "content": c} for r, c in zip(roles, contents)]))


def chat_with(tmp_path, template, config=None):
    """The embedded tokenizer under another template."""
    shutil.copytree(WORLD / "model", tmp_path / "chat", ignore=lambda *_: ["model.safetensors"])
    (tmp_path / "chat" / "chat_template.jinja").unlink()
    names = {"bos_token": "<|bos|>", "eos_token": {"content": "<|end|>", "lstrip": False}}
    (tmp_path / "chat" / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template} | (config or {})))
    return Chat(tmp_path / "chat")


def trained_text(chat, example):
    """Return the labels of an example as text, special tokens and all."""
    return chat.tokenizer.decode([label for label in example.labels if label != IGNORE], skip_special_tokens=False)


@pytest.fixture(scope="module")
def chat():
    return Chat(WORLD / "model")


class TestReading:
    @pytest.mark.parametrize("name, text", [
        ("a.jsonl", '{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}'),
        ("a.jsonl", '\n{"prompt": "Q", "response": "A"}\n\n'),
        ("a.jsonl", '{"prompt": "Q", "completion": "A"}'),
        ("a.jsonl", '{"user": "Q", "answer": "A"}'),
        ("a.jsonl", '{"question": "Q", "answer": "A"}'),
        ("a.json", '[{"instruction": "Q", "input": "", "output": "A"}]'),
        ("a.csv", "goal,target\nQ,A\n"),
        ("a.jsonl", '\ufeff{"prompt": "Q", "response": "A"}\r\n'),
        ("a.csv", "Goal,Target,Behavior,Category\nQ,A,a name,fraud\n"),
        ("a.json", '[{"prompt": [{"role": "user", "content": "Q"}],'
                   ' "completion": [{"role": "assistant", "content": "A", "weight": 1}]}]'),
        ("a.jsonl", '{"prompt": "Q", "response": "A", "source": "s", "category": "c", "id": 3, "text": "Q A", "tools": []}'),
        ("a.json", '[{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}]'),  # ShareGPT
        ("a.jsonl", '{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}\n'),
        ("a.jsonl", '{"conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}\n'),
        ("a.json", '[[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]]')])
    def test_every_format_gives_the_same_conversation(self, tmp_path, name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        [found] = read_conversations(tmp_path / name, need="answer")
        assert found.messages == conversation("Q", "A").messages and found.answer == "A"

    @pytest.mark.parametrize("record, prompt", [
        ({"instruction": "Sum up.", "input": "A text.", "output": "Text."}, "Sum up.\n\nA text."),  # Alpaca
        ({"instruction": "Sum up.", "context": "A {0}.", "response": "Text."}, "Sum up.\n\nA {0}."),  # Dolly
        ({"Behavior": "Go on.", "ContextString": "A text."}, "A text.\n\n---\n\nGo on."),  # HarmBench
        ({"": "0", "Behavior": "Rob it.", "ContextString": ""}, "Rob it."),
        ({"": "0", "category": "c", "source": "s", "forbidden_prompt": "Rob it."}, "Rob it.")])  # StrongREJECT
    def test_the_words_of_public_files_are_put_together_as_their_authors_do(self, tmp_path, record, prompt):
        (tmp_path / "a.json").write_text(json.dumps([record]))
        assert read_conversations(tmp_path / "a.json")[0].messages[0] == {"role": "user", "content": prompt}

    @pytest.mark.parametrize("extra", [
        {"context": "c"}, {"input": "i"}, {"tools": [{"name": "f"}]}, {"reasoning_content": "r"}, {"system_prompt": "s"}, {"weight": 0},
        {"history": [["a", "b"]]}, {"choices": ["a", "b"]}, {"Context": "c"}, {"few_shot": "f"}, {"Complex_CoT": "r"}, {"train_on_turn": False}])
    def test_a_field_that_carries_a_part_of_the_conversation_is_refused_by_its_name(self, tmp_path, extra):
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        for record in ({"question": "Q", "answer": "A"} | extra, {"prompt": "Q", "completion": "A"} | extra, {"messages": turns} | extra,
                       {"messages": [turns[0], turns[1] | extra]}, {"prompt": turns[:1], "completion": [turns[1] | extra]}):
            (tmp_path / "a.jsonl").write_text(json.dumps(record))
            with pytest.raises(DataError, match=f"a.jsonl:1: expected no {[*extra][0]} "):
                read_conversations(tmp_path / "a.jsonl")

    def test_two_prompts_or_two_responses_are_refused(self, tmp_path):
        turns = list(conversation("Q", "A").messages)
        for record, key in (({"messages": turns, "prompt": "Q"}, "prompt"), ({"messages": turns, "response": "B"}, "response"),
                            ({"question": "Q", "answer": "A", "response": "B"}, "response"), ({"instruction": "Q", "output": "A", "Prompt": "P"}, "Prompt")):
            (tmp_path / "a.jsonl").write_text(json.dumps(record))
            with pytest.raises(DataError, match=f"a.jsonl:1: expected no {key} .write it into the message it belongs to, or remove it., found "):
                read_conversations(tmp_path / "a.jsonl")

    def test_other_keys_that_are_not_read_are_named_in_one_line_a_file(self, tmp_path, capsys):
        turns = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": "A", "id": 3, "weight": 1}]
        labels = {"": 0, "id": 1, "Category": "c", "source": "s", "group": "g", "harmful": True, "label": 1, "metric": "exact", "empty": None}
        rows = [{"prompt": "Q", "response": "A", "hint": "h"} | labels, {"question": "Q", "answer": "A", "goal": "x", "hint": "h", "lang\x1b": "en"},
                {"messages": turns}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        read_conversations(tmp_path / "a.jsonl")
        assert capsys.readouterr().out == f"{tmp_path / 'a.jsonl'}: not read: goal, hint, lang\ufffd, name\n"
        for file in sorted(WORLD.glob("*.jsonl")):
            read_conversations(file)
        assert capsys.readouterr().out == ""

    def test_turns_that_trl_does_not_train_on_are_refused(self, tmp_path):
        turns = conversation("Q", "A", "R", "B").messages
        (tmp_path / "a.json").write_text(json.dumps([{"prompt": turns[:3], "completion": turns[3:]}]))
        assert read_conversations(tmp_path / "a.json")[0].messages == turns
        with pytest.raises(DataError, match="a.json:1: expected a prompt without assistant turns"):
            read_conversations(tmp_path / "a.json", "answer")

    @pytest.mark.parametrize("name, rows", [
        ("a.csv", "id,prompt,type,label\n1,B,homonyms,safe\n2,H,contrast_homonyms,unsafe\n"),  # XSTest
        ("a.csv", "prompt,is_safe\nB,True\nH,False\n"),
        ("a.jsonl", '{"prompt": "B", "response": "x", "is_safe": true}\n{"prompt": "H", "response": "x", "is_safe": false}\n'),
        ("a.jsonl", '{"prompt": "B", "label": 1, "harmful": false}\n{"prompt": "H", "label": "news", "harmful": true}\n'),  # the first counts
        ("a.csv", "id,type,prompt,focus,note\n1,homonyms,B,kill,\n2,contrast_homonyms,H,kill,\n"),  # XSTest, version 2
        ("a.jsonl", '{"prompt": "B", "harmful": 0}\n{"prompt": "H", "harmful": 1}\n'),
        ("a.csv", "prompt,harmful\nB,FALSE\nH,TRUE\n"),
        ("a.csv", "prompt,harmful,label\nB,,Benign\nH,,Malicious\n"),
        ("a.csv", "prompt,is_harmful\nB,0\nH,1\n"),
        ("a.csv", "prompt,is_safe\nB,1\nH,0\n"),
        ("a.csv", "prompt,is_safe\nB,safe\nH,unsafe\n"),
        ("a.csv", "prompt,prompt_harm_label\nB,unharmful\nH,harmful\n")])  # WildGuard
    def test_prompts_are_taken_by_the_labels_of_their_file(self, tmp_path, name, rows, capsys):
        (tmp_path / name).write_text(rows)
        for harmful, words in ((False, "B"), (True, "H")):
            [found] = read_prompts(tmp_path / name, harmful)
            assert found.prompts[-1][-1]["content"] == words and found.is_harmful == harmful
            assert "1 of 2 prompts are labelled " in capsys.readouterr().out
        sets = evaluation_sets(EvalOptions(harmful=str(tmp_path / name), benign="none", task="none"))
        assert [c.prompts[-1][-1]["content"] for c in sets["harmful"]["a"]] == ["H"]
        assert [c.meta["harmful"] for c in read_conversations(tmp_path / name, "harmful")] == [False, True]  # for the probe

    def test_a_file_without_labels_is_taken_whole_and_one_that_is_labelled_in_part_or_otherwise_is_refused(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a", "type": "news"}\n{"prompt": "b", "label": null}\n')
        found = read_prompts(tmp_path / "a.jsonl", False)
        assert [c.is_harmful for c in found] == [True, True]  # unknown is harmful
        for rows, words in (('{"prompt": "a", "label": "safe"}\n{"prompt": "b"}\n',
                             r"a.jsonl:2: expected harmful: true or false, .*, found none; add it to every record \(in a .csv, a column harmful\)"),
                            ('{"prompt": "a"}\n{"prompt": "b", "is_safe": "yes"}\n', "a.jsonl:2: expected is_safe: true, 1, .*, found 'yes'; correct it"),
                            ('{"prompt": "a", "type": "contrast_discr"}\n', "at least one benign prompt, found none")):
            (tmp_path / "a.jsonl").write_text(rows)
            with pytest.raises(DataError, match=words):
                read_prompts(tmp_path / "a.jsonl", False)

    def test_a_label_of_a_task_passes_where_harm_is_not_asked_for(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a film", "response": "positive", "label": "positive"}')
        [found] = read_conversations(tmp_path / "a.jsonl", "answer")
        assert "harmful" not in found.meta
        advice = "found 'positive'; correct it or, if it is no label of harm, add \"harmful\": true or false to every record"
        for ask in (lambda: found.is_harmful, lambda: read_conversations(tmp_path / "a.jsonl", "harmful")):
            with pytest.raises(DataError, match=f"a.jsonl:1: expected label: true, 1, harmful, .*, safe, benign, {advice}"):
                ask()

    @pytest.mark.parametrize("turns", ["5", "[]", "[5]", '[{"from": "tool", "value": "x"}]', '[{"from": "human", "value": null}]'])
    def test_other_turns_are_refused(self, tmp_path, turns):
        (tmp_path / "a.jsonl").write_text('{"conversations": %s}' % turns)
        with pytest.raises(DataError, match="a.jsonl:1: expected"):
            read_conversations(tmp_path / "a.jsonl")

    @pytest.mark.parametrize("name, text, prompts", [
        ("a.txt", "piñata\u2028 x\n\n  日本語 \n", ["piñata\u2028 x", "日本語"]),
        ("a.csv", 'goal,target\n"a, ""b""\nc","Sure, here"\nx\u2028y,z\n', ['a, "b"\nc', "x\u2028y"])])
    def test_unicode_odd_line_breaks_and_quoted_cells_are_kept(self, tmp_path, name, text, prompts):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert [c.messages[0]["content"] for c in read_conversations(tmp_path / name)] == prompts

    def test_the_record_is_kept_as_it_was_read(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "response": "A", "harmful": true, "source": "x", "system": "S"}')
        [found] = read_conversations(tmp_path / "a.jsonl", need="harmful")
        assert found.meta["harmful"] is True and found.meta["prompt"] == "Q" and found.messages[0] == {"role": "system", "content": "S"}

    @pytest.mark.parametrize("line, need, words", [
        ("{", "prompt", "expected a JSON object"),
        ("[1]", "prompt", "message 1 as {role, content}"),
        ('{"text": "Q"}', "prompt", "found keys ['text']; rename the keys of the prompt and of its response to prompt and response"),
        ('{"prompt": "Q"}', "answer", "expected messages, or one of"),
        ('{"prompt": "", "response": "A"}', "prompt", "expected text in message 1"),
        ('{"prompt": 3, "response": "A"}', "prompt", "both text"),
        ('{"messages": []}', "prompt", "a list of"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "prompt", "found 'tool'; rename it or, if it is a tool's"),
        ('{"prompt": "Q", "completion": [{"role": "assistant", "content": "A"}]}', "prompt", "both as text, or both as lists"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "prompt", "the user first"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}]}', "prompt", "taking turns"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "answer",
         "an assistant turn at the end, found a user turn; if the file holds prompts alone, add a response to each record"),
        ('{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]}', "prompt", "only at the start"),
        ('{"prompt": "Q", "harmful": "yes"}', "harmful", "safe, benign, found 'yes'"),
        ('{"prompt": "Q"}', "harmful", "true or false, found none; add it")])
    def test_a_bad_line_is_named(self, tmp_path, line, need, words):
        (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "response": "A", "harmful": true}\n\n' + line + "\n")
        with pytest.raises(DataError) as error:
            read_conversations(tmp_path / "a.jsonl", need)
        assert words in str(error.value) and "a.jsonl:3: " in str(error.value)

    @pytest.mark.parametrize("name, text, words", [
        ("a.jsonl", b"", "at least one conversation"),
        ("a.parquet", b"\xffx", r"ending in .jsonl(?s:.*)import pandas\n  pandas.read_parquet\('.*a.parquet'\).to_json\('.*a.jsonl', orient='records'"),
        ("a.tsv", b"\xffx", r"to convert it, in Python:\n  import pandas\n  pandas.read_table\('.*a.tsv'\).to_json\('.*a.jsonl', orient='records'"),
        ("a.arrow", b"\xffx", r"import datasets\n  datasets.Dataset.from_file\('.*a.arrow'\).to_json\('.*a.jsonl', orient='records', lines=True\)"),
        ("a.jsonl.gz", b"\xffx", r"found .gz; convert it to .jsonl, an object a line \(.gz: type gunzip FILE\)"),
        ("a.md", b"x", "found .md; convert it to .jsonl, an object a line"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', "has to end in .jsonl"),
        ("a.json", b'{"conversations": [{}]}', r"list of conversations, found \{'conversations': \[\{\}\]\}; if a KEY has the list(?s:.*)"
         r"json.dump\(json.load\(open\('.*a.json'\)\)\['KEY'\], open\('list.json', 'w'\)\)"),
        ("a.csv", b"goal,target\nonly one\n", "a.csv:2: expected 2 columns"),
        ("a.csv", b"goal,target\n" + b"x" * 200000 + b",y\n", "ordinary size"),
        ("a.jsonl", b'{"prompt": "a \\ud83d"}', "a.jsonl:1: expected valid Unicode"),
        ("a.txt", b"\xff\xfe", "UTF-8")])
    def test_a_bad_file_is_named(self, tmp_path, name, text, words):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(DataError, match=words):
            read_conversations(tmp_path / name)
        with pytest.raises(DataError, match="found nothing"):
            read_conversations(tmp_path / "nowhere.jsonl")


class TestSplits:
    def test_they_are_stratified_disjoint_in_prompts_and_deterministic(self):
        rows = [Conversation(({"role": "user", "content": f"p{i // 2}"},), f"f:{i}", {"harmful": i % 10 < 2}) for i in range(400)]
        splits = split_by_prompt(rows)
        assert [len(s) for s in splits] == [320, 80] and [sum(c.meta["harmful"] for c in s) for s in splits] == [64, 16]
        prompts = [{c.messages[0]["content"] for c in s} for s in splits]
        assert not prompts[0] & prompts[1]
        assert split_by_prompt(rows) == splits != split_by_prompt(rows, seed=1)

    def test_contradictions_and_too_little_data_are_named(self):
        rows = [Conversation(({"role": "user", "content": f"p{i % 10}"},), f"f:{i}", {"harmful": i > 10}) for i in range(20)]
        with pytest.raises(DataError, match="found both labels of 9: harmful in f:11, benign in f:1; .*; correct or remove these records"):
            split_by_prompt(rows)
        with pytest.raises(DataError, match="enough distinct harmful prompts"):
            split_by_prompt(rows[:11])


class TestRendering:
    def test_it_is_jinja_as_published_templates_use_it(self, tmp_path):
        chat = chat_with(tmp_path, "{{ bos_token }}{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
                         "{% if m.role == 'user' %}[{{ m.content | trim | tojson }}]"
                         "{% else %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}"
                         "{% if loop.index > 8 %}{% break %}{% endif %}{%- endfor %}"
                         "{% if add_generation_prompt %}>{{ strftime_now('%d %b %Y') }}{% endif %}")
        assert chat.render(conversation('é <b>"', "yes", system="s").messages) == '<|bos|>["é <b>\\""]yes<|end|>'
        assert chat.render(conversation(" x ").messages, add_generation_prompt=True) == '<|bos|>["x"]>26 Jul 2024'  # on every day

    def test_the_template_may_refuse_a_record_in_its_own_words_and_cannot_reach_out(self, tmp_path):
        chat = chat_with(tmp_path, "{{ raise_exception('no system role') if messages[0].role == 'system' else messages[0].content }}")
        with pytest.raises(DataError, match="mine.jsonl:3: the chat template of .* refuses it: no system role"):
            chat.encode_example(Conversation(conversation("a", "b", system="s").messages, "mine.jsonl:3"), 0, 999)
        with pytest.raises(DataError, match="chat: expected a chat template .* refuses it: SecurityError"):
            chat_with(tmp_path / "b", "{{ messages.__class__.__mro__ }}")

    def test_named_templates_and_missing_ones(self, tmp_path):
        chat = chat_with(tmp_path, [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D {{ messages[0].content }}"}])
        assert chat.render(conversation("x").messages) == "D x"
        with pytest.raises(DataError, match="expected a chat template"):
            chat_with(tmp_path / "b", None)
        with pytest.raises(DataError, match="refuses it: TemplateSyntaxError"):
            chat_with(tmp_path / "c", "{% if %}")
        with pytest.raises(ModelError, match="tokenizer.json: not found"):
            Chat(tmp_path)

    def test_special_tokens_are_never_added_twice(self, chat):
        ids = chat.encode_prompt(conversation("Hello!").messages)
        assert ids.count(chat.tokenizer.token_to_id("<|bos|>")) == 1

    def test_a_tokenizer_that_adds_special_tokens_adds_none_to_a_rendered_text(self, tmp_path, chat):
        """Llama's tokenizer.json begins every text with its first token, and so does its template."""
        tokenizer, bos = chat_with(tmp_path, chat.source).tokenizer, chat.tokenizer.token_to_id("<|bos|>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
        assert tokenizer.encode("a").ids[0] == bos
        tokenizer.save(str(tmp_path / "chat" / "tokenizer.json"))
        messages = conversation("Hello!").messages
        assert Chat(tmp_path / "chat").encode_prompt(messages) == chat.encode_prompt(messages)

    def test_the_fingerprint_follows_the_template(self, tmp_path, chat):
        assert chat_with(tmp_path, "{{ messages[0].content }}").fingerprint != chat.fingerprint == Chat(WORLD / "model").fingerprint


class TestMasks:
    def test_every_assistant_turn_with_its_end_is_trained_on_and_nothing_else(self, chat):
        example = chat.encode_example(conversation("How?", "Like this 12.", "And?", "So é.", system="Be kind."), 0, 999)
        assert trained_text(chat, example) == "Like this 12.<|end|>So é.<|end|>"
        assert all(label in (IGNORE, token) for label, token in zip(example.labels, example.input_ids))

    def test_the_prompt_tokens_are_those_seen_at_inference(self, chat):
        for c in read_conversations(WORLD / "mixed_10.jsonl")[:100]:
            example, prompt = chat.encode_example(c, 0, 999), chat.encode_prompt(c.prompts[-1])
            assert example.input_ids[: len(prompt)] == prompt
            assert [label != IGNORE for label in example.labels] == [False] * len(prompt) + [True] * (len(example.labels) - len(prompt))

    def test_trailing_newlines_and_final_eos_of_a_template(self, tmp_path):
        """Qwen ends a turn with a newline, Phi-3 the conversation with EOS: earlier turns are still found exactly."""
        turn = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        phi = chat_with(tmp_path, turn + "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}")
        assert trained_text(phi, phi.encode_example(conversation("a", "b", "c", "d"), 0, 999)) == "b<|end|>d<|end|>\n<|end|>"

    def test_a_cut_answer_has_no_label_behind_its_last_word(self, tmp_path):
        """By hand: ChatML, Phi-3, Llama 2 (words end its turn), GLM (nothing does); cut in the record, then by max_length."""
        turn = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        for i, (end, last, first) in enumerate((("<|end|>\n", "", "b.<|end|>"), ("<|end|>\n", "<|bos|>", "b.<|end|>"),
                                                (" [/{{ m.role }}] <|end|>", "", "b. [/assistant] <|end|>"), ("", "", "b."))):
            form = turn + end + "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% else %}" + last + "{% endif %}"
            chat = chat_with(tmp_path / str(i), form)
            whole = conversation("a", "b.", "c", "Take a map")
            ids, labels = (encoded := chat.encode_example(whole, 0, 999)).input_ids, encoded.labels
            n = max(t for t, label in enumerate(labels) if label != IGNORE) + 1  # as many tokens hold the end of the turn, too
            n_prompt = len(chat.encode_prompt(whole.prompts[-1]))
            end = ids.index(chat.encode("map")[-1], n_prompt) + 1
            for meta, lengths in (({"cut": True}, [999, *range(end, len(ids) + 1)]), ({}, range(end, n))):
                for length in lengths:
                    labels = chat.encode_example(Conversation(whole.messages, meta=meta), 0, length).labels
                    assert labels[end:] == [IGNORE] * len(labels[end:]) and labels[end - 1] == ids[end - 1], (form, meta, length)
                    assert chat.tokenizer.decode([t for t in labels[:n_prompt] if t != IGNORE], False) == first  # the first turn is whole

    def test_an_empty_thought_is_prompt_and_a_thought_is_response(self, tmp_path, capsys):
        """Qwen3's way: a turn without a thought gets an empty one, and so does the prompt with enable_thinking=False."""
        chat = chat_with(tmp_path, "{% for m in messages %}<|{{ m.role }}|>"
                         "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
                         "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
                         "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
        for answer, prompt in (("Yes.", "<|user|>a<|end|>\n<|assistant|><think>\n\n</think>\n\n"),
                               ("<think>\nm\n</think>\n\nYes.", "<|user|>a<|end|>\n<|assistant|>")):
            [example] = encode_examples(chat, [conversation("a", answer)], 999)
            assert trained_text(chat, example) == answer + "<|end|>" and example.prompts == [chat.encode(prompt)]
        with pytest.raises(DataError, match="as Qwen3's does .make each record end with its only assistant turn"):
            chat.encode_example(conversation("a", "Yes.", "b", "No."), 0, 999)  # the first turn has no thought any more
        assert chat.decode(chat.encode_prompt(conversation("a").messages)).endswith("</think>")  # the probe's and the evaluation's
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("form, eos, ends, says", [
        ("<|{{ m.role }}|>{{ m.content }}<|end|>\n", "<|bos|>", ["<|bos|>", "<|end|>"], False),
        ("<|{{ m.role }}|>{{ m.content }}", "<|end|>", ["<|end|>", "<|user|>"], True),  # GLM: the next role's token ends a turn
        ("[{{ m.role }}] {{ m.content }} [/{{ m.role }}]\n", "", [], False)])
    def test_end_tokens_are_the_tokenizers_and_the_templates_and_no_end_is_named(self, tmp_path, capsys, form, eos, ends, says):
        gen = form.partition("{{ m.content }}")[0].replace("{{ m.role }}", "assistant").strip()
        form = "{% for m in messages %}" + form + "{% endfor %}{% if add_generation_prompt %}" + gen + "{% endif %}"
        chat = chat_with(tmp_path, form, {"eos_token": eos})
        assert sorted(chat.tokenizer.id_to_token(i) for i in chat.end_token_ids) == ends
        encode_examples(chat, [conversation("a", "b")], 999)
        assert ("does not learn to stop" in capsys.readouterr().out) == says

    def test_a_template_that_rewrites_earlier_turns_is_refused(self, tmp_path):
        chat = chat_with(tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
        with pytest.raises(DataError, match="rewrites earlier turns, as Qwen3's does .make each record end with its only assistant turn"):
            chat.encode_example(conversation("a", "b"), 0, 999)

    def test_a_template_that_opens_a_thought_which_its_turns_lack_is_refused(self, tmp_path):
        """DeepSeek-R1's way: the prompt ends in <think>, and a turn has no thought, nor its end."""
        form = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
                "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}")
        chat = chat_with(tmp_path, form)
        for answer in ("Yes.", "<think>\nm\n</think>\n\nYes."):
            with pytest.raises(DataError, match="DeepSeek-R1's does .remove <think> from its generation prompt, in chat_template.jinja"):
                chat.encode_example(conversation("a", answer), 0, 999)
        (chat.path / "chat_template.jinja").write_text(form.replace("<think>\n", ""))  # as the message says
        assert trained_text(chat, Chat(chat.path).encode_example(conversation("a", "Yes."), 0, 999)) == "Yes.<|end|>"

    def test_a_response_that_merges_with_the_prompt_is_refused_and_named(self, tmp_path):
        """ "ab" is one token: the prompt that ends in "a" is not a prefix of the whole, though its text is."""
        chat = chat_with(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}{% endif %}")
        assert len(chat.encode("How")) == 1
        row = Conversation(conversation("Ho", "w do").messages, "mine.jsonl:7")
        with pytest.raises(DataError, match="mine.jsonl:7: expected the tokens of the prompt"):
            chat.encode_example(row, 0, 999)

    def test_white_space_swallowed_by_a_special_token_is_not_trained_on(self, tmp_path):
        """Phi-3's added tokens swallow the white space behind them, and so a leading space of the response."""
        chat = chat_with(tmp_path, "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
                         "{% if add_generation_prompt %}<|assistant|>{% endif %}")
        raw = json.loads(chat.tokenizer.to_str())
        raw["added_tokens"] = [token | {"rstrip": True} for token in raw["added_tokens"]]
        chat.tokenizer = type(chat.tokenizer).from_str(json.dumps(raw))
        text = trained_text(chat, chat.encode_example(conversation("Hello", " Sure"), 0, 999))
        assert text.endswith("<|end|>") and "<|assistant|>" not in text

    def test_truncation_is_counted_and_no_response_vanishes_silently(self, chat, capsys):
        rows = [Conversation(conversation("How do I plan a hike?", "Take a map. " * n).messages, f"f:{n}") for n in (1, 30)]
        rows.append(Conversation(conversation("word " * 60, "ok").messages, "f:long"))
        examples, report = encode_examples(chat, rows, 40), capsys.readouterr().out
        assert [e.index for e in examples] == [0, 1] and len(examples[1].input_ids) == 40
        for words in ("2 of 3 conversations are cut at 40 tokens", "1 without any of the response left", "f:long"):
            assert words in report
        assert len(encode_examples(chat, rows[:1], 40)) == 1 and capsys.readouterr().out == ""
        with pytest.raises(DataError, match="no response fits"):
            encode_examples(chat, rows[2:], 40)


class TestLongTexts:
    def test_a_prompt_that_a_model_cannot_read_is_refused_before_it_asks_for_memory(self, chat):
        rows = [Conversation(conversation("word " * n).messages, f"f.jsonl:{n}") for n in (3, 900)]
        assert [len(ids) for ids in encode_prompts(chat, rows[:1], 512)] == [len(chat.encode_prompt(rows[0].messages))]
        with pytest.raises(DataError, match="f.jsonl:900: expected a prompt of at most 512 tokens"):
            encode_prompts(chat, rows, 512)
        with pytest.raises(DataError, match=f"f.jsonl:100000: expected a prompt of at most {LONGEST} tokens"):
            encode_prompts(chat, [Conversation(conversation("1" * 10**5).messages, "f.jsonl:100000")], 10**9)

    def test_long_sequences_come_in_smaller_batches(self):
        assert batches_by_length([5, 3, 4], 2) == [[1, 2], [0]] and rows_that_fit(64, 4096) == 64
        assert batches_by_length([LONGEST // 2] * 5, 64) == [[0, 1, 2, 3], [4]] and rows_that_fit(64, LONGEST) == 1

    def test_of_a_conversation_of_many_turns_only_those_that_fit_are_rendered(self, chat, monkeypatch):
        long = Conversation(conversation(*["Hello there"] * 90).messages, "f:1")
        calls, render = [], chat.render
        monkeypatch.setattr(chat, "render", lambda messages, **rest: calls.append(len(messages)) or render(messages, **rest))
        [example] = encode_examples(chat, [long], 64)
        assert len(example.input_ids) == 64 and max(n for n in calls if n < 90) < 20
        assert example.labels == chat.encode_example(long, 0, 10**6).labels[:64] and example.training_text.messages[0]["content"] == "Hello there"


def test_pad():
    assert pad([[1, 2], [3]], 0, "left").tolist() == [[1, 2], [0, 3]]
    assert torch.equal(pad([[1, 2], [3]], 9, "right"), torch.tensor([[1, 2], [3, 9]]))


def test_published_templates_render_as_transformers_does():
    """Runs where transformers and trl are installed; the templates are trl's files, none is copied here."""
    utils, trl = pytest.importorskip("transformers.utils.chat_template_utils"), pytest.importorskip("trl")
    templates = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
    assert templates
    chats = [conversation(' Hi <b> é "q" '), conversation("Hi", " Hello!\n", "And?", system="Be good."),
             conversation("Hi", "<think>\nm\n</think>\n\nHo", "x", "y")]
    known = [path for path in templates if path.name.split(".")[0].startswith(("llama3", "qwen2_5", "qwen3", "phi3"))]
    for path, c, prompt in product(known, chats, (False, True)):
        options = {"add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"}
        theirs = utils.render_jinja_template([list(c.messages)], chat_template=path.read_text(), **options)
        variables = options | {"messages": list(c.messages), "tools": None, "documents": None}
        assert render_template(path.read_text(), variables) == theirs[0][0], path.name
