"""Tools for chat templates that know none: described in the system message, called as text.

The format is that of Nous Research's Hermes models, which many other models were trained on, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_SYSTEM = """You can call these functions, each described by a JSON schema, one a line:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON between these marks, once for each call:
<tool_call>
{{"name": "function", "arguments": {{"argument": "value"}}}}
</tool_call>"""

TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}{{ '\\n' }}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{%- if tools %}{{ tools | tojson }}{% endif %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template whose calls have this format."""


def write_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Messages without tools, calls and results: all of them are text.

    Args:
        messages: as `render_chat` takes them; arguments of calls are objects.
        tools: OpenAI's form.
    """
    text = _SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    written: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if written and written[-1]["role"] == "user":
                written[-1]["content"] += "\n" + content
            else:
                written.append({"role": "user", "content": content})
            continue
        plain = {name: value for name, value in message.items() if name != "tool_calls"}
        calls = [_call(call["function"]) for call in message.get("tool_calls", ())]
        plain["content"] = "\n".join(filter(None, [message["content"], *calls]))
        written.append(plain)
    if tools:
        begins = written[0]["role"] == "system"
        if begins:
            text = f"{written.pop(0)['content']}\n\n{text}"
        written.insert(0, {"role": "system", "content": text})
    return written


def _call(function: Mapping[str, Any]) -> str:
    text = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{text}\n</tool_call>"
