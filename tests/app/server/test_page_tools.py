"""Thoughts, tool calls and JSON answers on the browser page, in a real Chromium with a stub for the server."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install jaxpaged[test-clients]")

from browser import Page, needs_chromium
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from stub_server import ANSWER, CALLS, THOUGHTS, Refusal

pytestmark = [pytest.mark.slow, needs_chromium]

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}


def paste(page: Page, name: str, text: str) -> None:
    """Puts a text into a setting, which the user then leaves."""
    script = """
        const field = document.querySelector(`#settings [name=${arguments[0]}]`);
        field.value = arguments[1];
        for (const type of ["input", "change"]) field.dispatchEvent(new Event(type, { bubbles: true }));
    """
    page.js(script, name, text)


def pres(call: WebElement) -> list[str]:
    """The blocks of a call that are shown: arguments and result."""
    return [found.text for found in call.find_elements("css selector", "pre") if found.is_displayed()]


def test_thoughts_are_open_while_they_stream_and_fold_when_the_answer_begins(page: Page) -> None:
    page.stub.thoughts, page.stub.pause = THOUGHTS, 0.05
    page.ask("What is a page?")
    page.until(lambda: "tool knows" in page(".assistant .thought").text)
    assert page(".assistant .thoughts summary").text.startswith("Thinking… ")
    assert page(".assistant .body").text == ""
    page.until(lambda: "A page" in page(".assistant .body").text)
    assert not page(".assistant .thought").is_displayed()
    page.until(page.ended)
    assert re.fullmatch(r"Thought for \d+\.\d s", page(".assistant .thoughts summary").text)
    assert "33 tokens" in page(".assistant .note").text
    page(".assistant .thoughts summary").send_keys(Keys.ENTER)
    page.until(lambda: page(".assistant .thought").text == THOUGHTS)

    page.stub.thoughts, page.stub.pause = "", 0
    page.answered("And now?")
    assert page.stub.bodies[-1][1]["messages"][1] == {
        "role": "assistant",
        "content": ANSWER,
        "reasoning_content": THOUGHTS,
    }
    assert page(".assistant .thought").text == THOUGHTS, "what the reader opened stays open"
    assert not page.all(".assistant .thoughts")[1].is_displayed()
    page.driver.refresh()
    page.until(lambda: page.texts(".assistant .thought") == [THOUGHTS, ""])
    assert not page(".assistant .thought").is_displayed()


def test_thoughts_without_an_answer_stay_open_and_are_not_sent(page: Page) -> None:
    page.stub.thoughts, page.stub.answer = THOUGHTS, ""
    page.answered("hello")
    assert page(".assistant .thought").text == THOUGHTS
    page.answered("again")
    assert page.stub.bodies[-1][1]["messages"] == [{"role": "user", "content": "hello\n\nagain"}]


def test_tool_calls_are_carried_through_by_hand(page: Page) -> None:
    page("#settings-button").click()
    paste(page, "tools", json.dumps([TOOL]))
    page("#settings-button").click()
    page.stub.thoughts, page.stub.answer, page.stub.calls = THOUGHTS, "", CALLS
    page.answered("Where is it warmer?")
    body = page.stub.bodies[-1][1]
    assert (body["tools"], body["tool_choice"]) == ([TOOL], "auto")
    assert not page(".assistant .thought").is_displayed()
    assert [pres(call) for call in page.all(".call")] == [
        [json.dumps(json.loads(text), indent=2)] for _, text in CALLS
    ]
    assert [call.accessible_name for call in page.all(".call")] == ["Call of get_weather"] * 2
    page.until(
        lambda: page.texts("#announcer") == ["The model calls get_weather. The model calls get_weather."]
    )

    fields = page.all(".call textarea")
    assert [field.accessible_name for field in fields] == ["Result of get_weather"] * 2
    fields[0].send_keys('{"degrees": 7}', Keys.ENTER)
    page.until(lambda: page.driver.switch_to.active_element == fields[1])  # it is required
    assert len(page.stub.bodies) == 1
    page.stub.answer = "In Rome."
    page.press("it", Keys.SHIFT + Keys.ENTER, "burns", Keys.ENTER)
    page.until(lambda: page.ended() and page.texts(".assistant .body")[-1] == "In Rome.")
    _, called, *results = page.stub.bodies[-1][1]["messages"]
    functions = [{"name": name, "arguments": arguments} for name, arguments in CALLS]
    calls = [{"id": f"call_{i}", "type": "function", "function": call} for i, call in enumerate(functions)]
    assert called == {"role": "assistant", "content": "", "reasoning_content": THOUGHTS, "tool_calls": calls}
    assert results == [
        {"role": "tool", "tool_call_id": "call_0", "content": '{"degrees": 7}'},
        {"role": "tool", "tool_call_id": "call_1", "content": "it\nburns"},
    ]
    shown = [text for call in page.all(".call") for text in pres(call)]
    whole = [json.dumps(json.loads(text), indent=2) for _, text in CALLS]
    assert shown == [whole[0], '{\n  "degrees": 7\n}', whole[1], "it\nburns"]
    assert not any(field.is_displayed() for field in page.all(".call textarea"))

    page.driver.refresh()
    page.until(lambda: [text for call in page.all(".call") for text in pres(call)] == shown)
    page.button("Regenerate").click()
    page.until(lambda: len(page.stub.bodies) == 3 and page.ended())
    assert page.stub.bodies[-1] == page.stub.bodies[-2]


def test_a_call_that_was_cut_off_is_shown_and_not_sent(page: Page) -> None:
    page.stub.answer, page.stub.calls = "Let me see.", CALLS[:1]
    page.stub.cut_after = 7
    page.answered("hello")
    assert pres(page(".call")) == ['{\n  "city": "Os']
    assert not page(".call textarea").is_displayed() and not page(".calls .buttons").is_displayed()
    assert "ended before the answer" in page(".assistant .error").text
    page.stub.cut_after, page.stub.calls = None, []
    page.answered("again")
    messages = page.stub.bodies[-1][1]["messages"]
    assert [set(message) for message in messages] == [{"role", "content"}] * 3


def test_a_tool_is_chosen_by_name(page: Page) -> None:
    page("#settings-button").click()
    choice = page("[name=tool_choice]")
    assert not choice.is_enabled()
    paste(page, "tools", json.dumps([TOOL]))
    assert [option.text for option in choice.find_elements("tag name", "option")] == [
        "auto",
        "none",
        "required",
        "get_weather",
    ]
    choice.send_keys("get")
    page.driver.refresh()
    page.until(lambda: page("#settings-button").text == "Settings (tools)")
    page.answered("hello")
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert page.stub.bodies[-1][1]["tool_choice"] == named
    paste(page, "tools", "")
    page.answered("hello")
    assert not {"tools", "tool_choice", "response_format"} & set(page.stub.bodies[-1][1])
    assert page("#settings-button").text == "Settings"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("schema", '{"type": "object"', "This is not JSON: "),
        ("schema", "[1]", "This must be a JSON schema"),
        ("tools", "{}", "This must be an array"),
        ("tools", '[{"type": "function"}]', "This must be an array"),
        ("tools", "[null]", "This must be an array"),
    ],
)
def test_wrong_json_is_shown_at_its_field_before_anything_is_sent(
    page: Page, name: str, text: str, words: str
) -> None:
    page("#settings-button").click()
    page(f"[name={name}]").send_keys(text)
    assert page(f"#{name}-problem").text == "", "nothing is said while it is being typed"
    page("#settings-button").click()
    page.ask("hello")
    page.until(lambda: words in page(f"#{name}-problem").text)
    field = page(f"[name={name}]")
    assert field.get_attribute("aria-invalid") == "true" and page.driver.switch_to.active_element == field
    assert page.stub.bodies == [] and not page.all(".message")
    field.clear()
    assert page(f"#{name}-problem").text == ""
    page("#send").click()
    page.until(lambda: page.ended() and "all." in page(".assistant .body").text)


def test_an_answer_of_json_is_printed_in_a_block_when_it_is_complete(page: Page) -> None:
    page("#settings-button").click()
    paste(page, "schema", json.dumps(SCHEMA))
    page.stub.answer = (
        ' {"city": "Oslo, {Norway}", "id": 12345678901234567890, "10": [], "9": [{"a": null}] }'
    )
    page.stub.pause = 0.1
    page.ask("Which city?")
    page.until(lambda: "Norway" in page(".assistant .body").text)
    assert not page.all(".assistant pre")
    page.until(page.ended)
    assert page.texts(".assistant .body pre") == [json.dumps(json.loads(page.stub.answer), indent=2)]
    assert page.texts(".assistant .code-head span") == ["json"]
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert page.stub.bodies[-1][1]["response_format"] == wanted

    page.stub.answer = "[1, 2 is no JSON"
    page.answered("And now?")
    assert page.texts(".assistant .body")[1] == page.stub.answer


def test_what_the_server_says_of_a_schema_is_shown(page: Page) -> None:
    paste(page, "schema", '{"type": "town"}')
    page.stub.refusals = [Refusal(400, "response_format: the template 'town' is no type of JSON schema")]
    page.answered("hello")
    assert page(".assistant .error").text == "response_format: the template 'town' is no type of JSON schema"
    paste(page, "schema", "")
    page.button("Try again").click()
    page.until(lambda: page.ended() and "all." in page(".assistant .body").text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_calls_thoughts_and_settings_fit_and_can_be_read(
    page: Page, width: int, height: int, scheme: str
) -> None:
    page.size(width, height)
    page.scheme(scheme)
    page.stub.calls = [("a" * 64, json.dumps({"b" * 200: "c" * 200}))]
    page.stub.thoughts = "d" * 200
    page.answered("hello")
    page(".assistant .thoughts summary").click()
    paste(page, "tools", json.dumps([TOOL] * 20, indent=2))
    paste(page, "schema", "[" + "1" * 200)
    page.ask("again")
    page.until(lambda: page("#schema-problem").text)
    problem, settings = page("#schema-problem").rect, page("#settings").rect
    assert problem["y"] + problem["height"] <= settings["y"] + settings["height"]
    assert page.js("return document.documentElement.scrollWidth") == width
    assert page("#send").rect["y"] + page("#send").rect["height"] <= height
    for selector in ("#messages", "#settings"):
        node = page(selector)
        assert node.get_property("scrollWidth") == node.get_property("clientWidth")
    assert page.hard_to_read() == set() and page.nameless() == []
