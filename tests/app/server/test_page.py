"""The browser page in a real Chromium, with a stub for the server: what a user sees, and what is sent."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("selenium", reason="selenium is not installed: pip install jaxpaged[test-clients]")

from browser import Page, needs_chromium
from selenium.webdriver.common.keys import Keys
from stub_server import ANSWER, Refusal

pytestmark = [pytest.mark.slow, needs_chromium]


def test_an_answer_streams_in_and_is_shown_as_text(page: Page) -> None:
    page.stub.pause = 0.03
    page.ask("What is a page?")
    page.until(lambda: page("#stop").is_displayed() and "page" in page(".assistant .body").text)
    assert "all." not in page(".assistant .body").text
    page.until(page.ended)
    assert page.texts(".assistant pre") == ["for page in pages:\n    print(page)"]
    assert "That <b>is</b> all." in page(".assistant .body").text
    assert not page.all(".assistant .body b")
    assert (
        "17 tokens" in page(".assistant .note").text and "6 of them cached" in page(".assistant .note").text
    )
    page.until(lambda: page.texts("#announcer") == [ANSWER])
    path, body = page.stub.bodies[0]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "What is a page?"}]
    assert body["stream"] is True and body["model"] == "models/tiny-q8_0.gguf"


def test_stop_ends_the_request(page: Page) -> None:
    page.stub.pause = 0.05
    page.stub.answer = "word " * 1000
    page.ask("Go on")
    page.until(lambda: "word word" in page(".assistant .body").text)
    page("#stop").click()
    page.until(page.ended)
    page.until(lambda: page.stub.aborted == 1)
    assert "stopped" in page(".assistant .note").text
    kept = page(".assistant .body").text
    page.driver.refresh()
    page.until(lambda: page.all(".assistant .body"))
    assert page(".assistant .body").text == kept


def test_regenerate_and_edit_replace_what_follows(page: Page) -> None:
    page.answered("first")
    page.answered("second")
    page.stub.answer = "another"
    page.button("Regenerate").click()
    page.until(lambda: page.ended() and page.texts(".assistant .body")[1:] == ["another"])
    assert len(page.stub.bodies[-1][1]["messages"]) == 3
    page.button("Edit").click()
    assert page("#prompt").get_property("value") == "second"
    page("#prompt").clear()
    page.ask("third")
    page.until(lambda: page.ended() and page.texts(".user .body") == ["first", "third"])
    assert [m["content"] for m in page.stub.bodies[-1][1]["messages"]] == ["first", ANSWER, "third"]


def test_conversations_are_kept_renamed_and_deleted(page: Page) -> None:
    page.answered("about pages")
    page("#new").click()
    page.answered("about tables")
    page.driver.refresh()
    page.until(lambda: page.texts(".user .body") == ["about tables"])
    assert page.texts("#conversations .open") == ["about tables", "about pages"]
    page.all("#conversations .open")[1].click()
    assert page.texts(".user .body") == ["about pages"]
    page("[aria-label='Rename about pages']").click()
    page.press(Keys.CONTROL + "a", "Leaves", Keys.ENTER)
    page.until(lambda: "Leaves" in page.texts("#conversations .open"))
    page("[aria-label='Delete Leaves']").click()
    page.until(lambda: page.texts("#conversations .open") == ["about tables"])
    page.button("Undo").click()
    page.until(lambda: sorted(page.texts("#conversations .open")) == ["Leaves", "about tables"])
    page("[aria-label='Delete Leaves']").click()
    page.driver.refresh()
    page.until(lambda: page.texts("#conversations .open") == ["about tables"])


def test_an_answer_goes_on_while_another_conversation_is_open(page: Page) -> None:
    page.stub.pause = 0.03
    page.ask("slow")
    page.until(lambda: page("#stop").is_displayed())
    page("#new").click()
    assert page("#send").is_displayed() and not page.all(".message")
    page.until(lambda: not page.all("#conversations .busy"))
    page("#conversations .open").click()
    assert "all." in page(".assistant .body").text


def test_storage_is_bounded(page: Page) -> None:
    full = "x" * 1_000_000
    script = "localStorage.setItem('jaxpaged.conversation.' + arguments[0].id, JSON.stringify(arguments[0]))"
    for i in range(4):
        message = {"role": "user", "content": full}
        page.js(script, {"id": f"old{i}", "title": f"old{i}", "updated": i, "messages": [message]})
    page.driver.refresh()
    page("#new").click()
    page.stub.answer = "y" * 2_000_000
    page.answered("new")
    assert "old0" not in page.texts("#conversations .open")
    page.driver.refresh()
    page.until(lambda: page.texts("#conversations .open")[0] == "new")


def test_settings_are_sent_kept_and_checked(page: Page) -> None:
    page("#settings-button").click()
    page("[name=system]").send_keys("Be brief.")
    page("[name=temperature]").send_keys("0.5")
    page("[name=seed]").send_keys("7")
    page.driver.refresh()
    page.answered("hello")
    body = page.stub.bodies[-1][1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.5, 7, 512) and "top_p" not in body
    page("#settings-button").click()
    page("[name=top_p]").send_keys("3")
    page.ask("again")
    assert page("[name=top_p]").get_attribute("aria-invalid") == "true"
    assert len(page.stub.bodies) == 1


def test_a_model_without_a_template_continues_text(page: Page) -> None:
    page.stub.chat_template = ""
    page.driver.refresh()
    page.until(lambda: page("#mode [value=text]").is_selected())
    page.stub.answer = " in pages:"
    page.answered("for page")
    page("#send").click()
    page.until(lambda: len(page.all(".assistant")) == 2 and page.ended())
    assert [path for path, _ in page.stub.bodies] == ["/v1/completions"] * 2
    assert [body["prompt"] for _, body in page.stub.bodies] == ["for page", "for page in pages:"]


def test_a_missing_template_offers_text(page: Page) -> None:
    page.stub.refusals = [Refusal(400, "the model has no chat template")]
    page.answered("def f():")
    assert "no chat template" in page(".assistant .error").text
    page.button("Switch to Text").click()
    page.until(lambda: page.ended() and page.texts(".assistant .body") == [ANSWER])
    assert page.stub.bodies[-1][0] == "/v1/completions"


def test_a_full_server_is_asked_again_when_it_says(page: Page) -> None:
    page.stub.refusals = [
        Refusal(429, "full", {"Retry-After": "1"}),
        Refusal(503, "full", {"Retry-After": "1"}),
    ]
    start = time.monotonic()
    page.ask("hello")
    page.until(lambda: "next try in 1 s" in page(".assistant .note").text)
    page.until(lambda: page.ended() and "all." in page(".assistant .body").text)
    assert 2 <= time.monotonic() - start < 5
    page.stub.refusals = [Refusal(429, "full", {"Retry-After": "50"})]
    page.ask("again")
    page.until(lambda: "next try in" in page.all(".assistant .note")[-1].text)
    page.press(Keys.ESCAPE)
    page.until(page.ended)
    page.answered("and again")  # what was never answered goes with it: roles take turns
    asked = [message["content"] for message in page.stub.bodies[-1][1]["messages"]]
    assert asked == ["hello", ANSWER, "again\n\nand again"]


@pytest.mark.parametrize(("how", "words"), [("fail", "the engine died"), ("cut", "ended before the answer")])
def test_what_came_before_a_failure_stays(page: Page, how: str, words: str) -> None:
    setattr(page.stub, f"{how}_after", 4)
    page.answered("hello")
    assert words in page(".assistant .error").text
    assert page(".assistant .body").text.startswith("A page is a")
    setattr(page.stub, f"{how}_after", None)
    page.button("Try again").click()
    page.until(lambda: page.ended() and "all." in page(".assistant .body").text)
    assert not page(".assistant .error").is_displayed()


def test_a_server_that_is_gone_is_told(page: Page) -> None:
    page.stub.down = True
    page.answered("hello")
    assert "cannot be reached" in page(".assistant .error").text
    page.until(lambda: "cannot be reached" in page("#pool-problem").text)
    page.stub.down = False
    page.button("Try again").click()
    page.until(lambda: page.ended() and "all." in page(".assistant .body").text)
    page.until(lambda: not page("#pool-problem").is_displayed())


def test_the_key_is_asked_for_and_kept_for_the_session(page: Page) -> None:
    page.stub.key = "secret"
    page.driver.refresh()
    page.until(lambda: page("#key-dialog").is_displayed())
    page.press("wrong", Keys.ENTER)
    page.until(lambda: page("#key-wrong").is_displayed())
    page.press(Keys.ESCAPE)
    assert not page("#key-dialog").is_displayed()
    page.ask("hello")
    page.until(lambda: page("#key-wrong").is_displayed())
    page.press("secret", Keys.ENTER)
    page.until(lambda: page.ended() and "all." in page(".assistant .body").text)
    page.until(lambda: not page("#pool-problem").is_displayed())
    assert page.js("return JSON.stringify(localStorage).includes('secret')") is False
    page.open()
    assert not page("#key-dialog").is_displayed()


def test_the_pool_is_drawn_page_by_page(page: Page) -> None:
    page.stub.num_pages = 8
    page.stub.fixed_pool = ("11230000", [0, 1, 0, -1, -1, -1, -1, -1])
    page.until(lambda: page("#pages").get_attribute("data-pages") == "8")
    assert [page.pixel(i) for i in (0, 1, 2, 4)] == [
        (0x00, 0x72, 0xB2),
        (0xE6, 0x9F, 0x00),
        (0x00, 0x72, 0xB2),
        (0xE7, 0xEB, 0xF0),
    ]
    assert (
        page.pixel(2, 0.02, 0.5) == (0x1F, 0x23, 0x28) != page.pixel(0, 0.02, 0.5)
    )  # the edge of a shared one
    hatching = {page.pixel(3, i / 20, 0.5) for i in range(16)}
    assert hatching == {(0xE7, 0xEB, 0xF0), (0x7D, 0x85, 0x90)}
    assert page.texts("#kinds b") == ["2", "1", "1", "4"]
    assert page("#numbers .pages_used dd").text == "3" and "576 KiB" in page("#numbers .pages_used dt").text
    assert page("#numbers .waste dd").text == "3.1 %" and page("#numbers .waiting dd").text == "2"

    page.js("document.getElementById('pages').focus()")
    page.press(Keys.ARROW_RIGHT)
    assert page("#page-words").text.startswith("Page 1: slot 1 (cmpl-1f3")
    page.press(Keys.ARROW_RIGHT)
    assert "shared by slot 0" in page("#page-words").text
    page.press(Keys.END)
    assert page("#page-words").text == "Page 7: free."

    page.stub.fixed_pool = ("11230001", [0, 1, 0, -1, -1, -1, -1, 2])
    page.until(lambda: page.pixel(7) == (0x00, 0x9E, 0x73))
    page("#sequences [data-slot='1'] button").click()
    assert page.pixel(1) == (0xE6, 0x9F, 0x00) and page.pixel(0) != (0x00, 0x72, 0xB2)


@pytest.mark.parametrize("num_pages", [1, 65_536])
def test_pools_of_any_size_fit(page: Page, num_pages: int) -> None:
    page.stub.num_pages = num_pages
    owner = [i % 9 for i in range(num_pages)]
    page.stub.fixed_pool = ("1" * num_pages, owner)
    page.until(lambda: page("#pages").get_attribute("data-pages") == str(num_pages))
    assert page.pixel(num_pages - 1) == ((0x00, 0x72, 0xB2) if num_pages == 1 else page.pixel(num_pages - 10))
    canvas, pool = page("#pages").rect, page("#pool").rect
    assert canvas["width"] <= pool["width"] and canvas["height"] <= 800
    page.stub.fixed_pool = ("0" + "1" * (num_pages - 1), owner)
    page.until(lambda: page.pixel(0) == (0xE7, 0xEB, 0xF0))
    assert page("#pages").get_attribute("data-changed") in ("0", "1")
    milliseconds = page.js(
        "const one = document.querySelector('#sequences [data-slot=\"0\"] button');"
        "const start = performance.now(); one.click(); return performance.now() - start"
    )
    assert milliseconds < 300  # type: ignore[operator]


def test_a_hidden_page_does_not_ask(page: Page) -> None:
    page.js(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    time.sleep(0.2)
    asked = page.stub.pool_asked
    time.sleep(1.2)
    assert page.stub.pool_asked == asked
    page.js("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    page.until(lambda: page.stub.pool_asked > asked + 1)


def test_the_keyboard_is_enough(page: Page) -> None:
    page.js("document.activeElement.blur()")
    visited = []
    for _ in range(14):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        visited.append(page.js("return document.activeElement.id || document.activeElement.name"))
        outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or visited[-1] in ("mode", "")
        if visited[-1] == "prompt":
            break
    assert visited == ["", "theme", "new", "mode", "settings-button", "messages", "prompt"]
    page.press("two", Keys.SHIFT + Keys.ENTER, "lines")
    page.stub.pause = 0.05
    page.press(Keys.ENTER)
    page.until(lambda: page.stub.bodies and page("#stop").is_displayed())
    assert page.stub.bodies[0][1]["messages"][0]["content"] == "two\nlines"
    page.press(Keys.ESCAPE)
    page.until(page.ended)
    assert page.js("return document.activeElement.id") == "prompt"


def test_every_control_has_a_name(page: Page) -> None:
    page.answered("hello")
    page("#settings-button").click()
    assert page.nameless() == []


def test_nothing_foreign_runs(page: Page) -> None:
    script = """
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.foreign = 1";
        document.body.append(script);
    """
    assert page.driver.execute_async_script(script) == "script-src-elem"
    assert page.js("return window.foreign") is None
    page.driver.get_log("browser")  # the violation that was wanted
    origins = "return performance.getEntriesByType('resource').map((entry) => new URL(entry.name).origin)"
    assert set(page.js(origins)) == {page.stub.url.rstrip("/")}  # type: ignore[call-overload]


def test_a_phone_shows_all_without_scrolling_sideways(page: Page) -> None:
    page.size(360, 740)
    page.stub.answer = "a" * 200 + "\n```\n" + "b" * 200 + "\n```\n"
    page.answered("c" * 200)
    page("#settings-button").click()
    assert page.js("return document.documentElement.scrollWidth") == 360
    assert page("#prompt").rect["width"] > 300
    page("#menu").click()
    assert page("#new").is_displayed()
    page.press(Keys.ESCAPE)
    assert not page("#new").is_displayed()
    page.js("document.getElementById('pages').scrollIntoView()")
    page.until(lambda: page("#pages").rect["width"] <= 340)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(page: Page, scheme: str) -> None:
    page.scheme(scheme)
    page.stub.fail_after = 12
    page.answered("hello")
    page("#settings-button").click()
    assert page.hard_to_read() == set()
    dark = (0x15, 0x18, 0x1D)
    page.until(lambda: (page.pixel(0, 0.99, 0.99) == dark) == (scheme == "dark"))
    page.button("◐ auto").click()
    page.button("◐ light").click()
    page.until(lambda: page.pixel(0, 0.99, 0.99) == dark)
    page.driver.refresh()
    assert page.js("return getComputedStyle(document.documentElement).backgroundColor") == "rgb(21, 24, 29)"
