"""Chat templates: their output, the language, the sandbox and its limits."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from jaxpaged_model.text.chat import BUILTIN_TEMPLATES, ChatTemplateError, render_chat

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]


def render(template: str, messages: list[dict[str, str]] | None = None, **options: Any) -> str:
    options = {"bos_token": "<s>", "eos_token": "</s>"} | options
    return render_chat(template, CONVERSATION if messages is None else messages, **options)


class TestBuiltin:
    @pytest.mark.parametrize(
        ("name", "prompt"),
        [
            (
                "chatml",
                "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
                "<|im_start|>assistant\n",
            ),
            (
                "llama2-sys",
                "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]Hello!</s>[INST] Bye [/INST]",
            ),
            ("llama2", "[INST] Be brief.\nHi [/INST]Hello!</s>[INST] Bye [/INST]"),
            (
                "llama3",
                "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            ("mistral-v1", " [INST] Be brief.\n\nHi [/INST] Hello!</s> [INST] Bye [/INST]"),
            ("mistral-v3", "[INST] Be brief.\n\nHi[/INST] Hello!</s>[INST] Bye[/INST]"),
            ("mistral-v3-tekken", "[INST]Be brief.\n\nHi[/INST]Hello!</s>[INST]Bye[/INST]"),
            (
                "mistral-v7",
                "[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hi[/INST] Hello!</s>[INST] Bye[/INST]",
            ),
            (
                "zephyr",
                "<|system|>\nBe brief.<|endoftext|>\n<|user|>\nHi<|endoftext|>\n"
                "<|assistant|>\nHello!<|endoftext|>\n<|user|>\nBye<|endoftext|>\n<|assistant|>\n",
            ),
            (
                "phi3",
                "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n"
                "<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
            ),
            (
                "gemma",
                "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n"
                "<start_of_turn>model\nHello!<end_of_turn>\n"
                "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
            ),
        ],
    )  # fmt: skip
    def test_a_conversation_is_written_as_llama_cpp_writes_it(self, name: str, prompt: str) -> None:
        assert render(BUILTIN_TEMPLATES[name]) == prompt

    @pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
    def test_every_word_is_there_once_and_in_order(self, name: str) -> None:
        text = render(BUILTIN_TEMPLATES[name])
        assert re.findall(r"Be brief\.|\bHi|Hello!|Bye", text) == ["Be brief.", "Hi", "Hello!", "Bye"]

    @pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
    def test_a_message_is_text_and_no_template(self, name: str) -> None:
        words = "a {{ 7 * 7 }} {% raw %} <b>&amp;</b> {# 👩‍👧 #}"
        assert words in render(BUILTIN_TEMPLATES[name], [{"role": "user", "content": words}])

    @pytest.mark.parametrize("name", sorted(BUILTIN_TEMPLATES))
    def test_the_generation_prompt_only_adds_at_the_end(self, name: str) -> None:
        whole = render(BUILTIN_TEMPLATES[name], add_generation_prompt=True)
        assert whole.startswith(render(BUILTIN_TEMPLATES[name], add_generation_prompt=False))


class TestLanguage:
    def test_blocks_take_their_line_with_them(self) -> None:
        template = "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}"
        assert render(template) == "system\nuser\nassistant\nuser\n"

    def test_line_ends_and_a_byte_order_mark_are_those_of_the_writers_system(self) -> None:
        template = "{% for m in messages %}\n{{ m.role }}\n{% endfor %}\n"
        assert render("\ufeff" + template.replace("\n", "\r\n")) == render(template)

    def test_json_is_plain(self) -> None:
        tools = [{"name": "größe<&>", "b": 1, "a": None}]
        assert render("{{ tools | tojson }}", tools=tools) == json.dumps(tools, ensure_ascii=False)
        assert render("{{ tools | tojson(indent=2) }}", tools=tools) == json.dumps(
            tools, ensure_ascii=False, indent=2
        )

    def test_names_that_transformers_provides(self) -> None:
        template = (
            "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
            "{% generation %}{{ m['content'][:2] }}{% endgeneration %}{% endfor %}{{ eos_token }}"
            "{{ strftime_now('%Y') | length }}{{ thinking is defined }}"
        )
        assert render(template) == "<s>BeHi</s>4False"

    def test_operators_have_jinjas_meaning(self) -> None:
        template = (
            "{{ 'a' ~ 1 ~ none }}{{ 'ab' * 2 }}{{ 2 ** 5 }}{{ 7 % 4 }}{{ '%s-%d' % ('x', 3) }}{{ [1] + [2] }}"
        )
        assert render(template) == "a1Noneabab323x-3[1, 2]"
        assert render("{{ 'x'.center(5) }}|{{ 'x' | center(3) }}|{{ '%02d' | format(7) }}") == "  x  | x |07"

    def test_macros_and_namespaces(self) -> None:
        template = (
            "{% macro wrap(text) %}<{{ text }}>{% endmacro %}{% set ns = namespace(n=0) %}"
            "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ wrap(m.role) }}{% endfor %}{{ ns.n }}"
        )
        assert render(template) == "<system><user><assistant><user>4"


class TestRefusals:
    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("line\n{% for %}", "line 2"),
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
            ("{{ messages[9].content.x }}", "chat template: "),
            ("{{ 1 / 0 }}", "ZeroDivisionError"),
            ("{{ 'a' + 1 }}", "TypeError"),
            ("{{ messages | nothing }}", "nothing"),
            ("{{ ''.__class__.__mro__ }}", "unsafe"),
            ("{{ render.__globals__ }}{{ messages.append(1) }}", "unsafe|undefined"),
            ("{{ messages.clear() }}", "unsafe"),
            ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
            ("{% include 'other' %}", "chat template"),
        ],
    )
    def test_a_wrong_template_is_one_line(self, template: str, message: str) -> None:
        with pytest.raises(ChatTemplateError, match=message) as caught:
            render(template)
        assert "\n" not in str(caught.value)

    def test_a_sandboxed_template_leaves_the_messages_alone(self) -> None:
        messages = [dict(message) for message in CONVERSATION]
        for call in ("messages.append(1)", "messages.pop()", "messages[0].update(role='x')"):
            with pytest.raises(ChatTemplateError, match="unsafe"):
                render("{{ " + call + " }}", messages)
        assert messages == CONVERSATION

    @pytest.mark.parametrize(
        "template",
        [
            "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
            "{% for a in range(90000) %}{{ range(90000) | sum }}{% endfor %}",
            "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "{% set n = namespace(t='ab') %}{% for a in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
            "{% set n = namespace(t='ab') %}{% for a in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "{% for a in range(99999) %}{{ 'words ' * 1000 }}{% endfor %}",
            "{{ 'a' * 10 ** 10 }}",
            "{{ 10 ** (10 ** 10) }}",
            "{{ [0] * 10 ** 10 }}",
            "{{ 'a'.ljust(10 ** 10) }}",
            "{{ 'a' | center(9999999999) }}",
            "{{ '%9999999999d' % 1 }}",
            "{{ '%9999999999d' | format(1) }}",
            "{{ '{:9999999999d}'.format(1) }}",
            "{{ '{:{}d}'.format(1, 10 ** 10) }}",
            "{{ range(10 ** 10) | list }}",
            "{{ messages | tojson(indent=9999999999) }}",
        ],
    )
    def test_a_runaway_template_is_stopped(self, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("jaxpaged_model.text.chat.MAX_SECONDS", 0.3)
        with pytest.raises(ChatTemplateError):
            render(template)

    def test_the_budget_starts_anew_with_each_rendering(self) -> None:
        template = "{% for a in range(60000) %}{% endfor %}"
        assert [render(template) for _ in range(5)] == [""] * 5
