"""The chat page, in a real browser."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from hsai.infer import Engine
from hsai.infer.service import Busy, Service
from hsai.serve.app import read_page
from tests.needs import needs
from tests.serve.browser import PROGRAM, Browser
from tests.serve.scripted import RunningServer, ScriptedService, eventually, fail, speak, wait_for_cancel

needs_browser = needs(PROGRAM is not None, "no Chromium here (on Debian: apt-get install chromium-headless-shell)")
STATUS = "document.querySelector('#status').textContent"
IDLE = "document.querySelector('#stop').disabled"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, server: RunningServer, service: ScriptedService) -> Iterator[Browser]:
    """The page of `server`, anew; at the end, nothing was complained of."""
    browser.open(server.url + "/")
    browser.until("document.title === 'tiny'")
    browser.complaints.clear()
    yield browser
    assert browser.complaints == []


def shown(page: Browser) -> list[list[str]]:
    """The classes and texts of the log."""
    return page.evaluate("[...document.querySelectorAll('.message')].map(e => [e.className, e.textContent])")


def asked(server: RunningServer, number: int) -> str:
    """The text of a prompt that came to the service."""
    tokenizer = server.engine.tokenizer
    tokens = server.service.tickets[number].request.tokens
    return b"".join(tokenizer.decode_bytes([token]) or tokenizer.name(token).encode() for token in tokens).decode()


@needs_browser
def test_a_conversation(page: Browser, server: RunningServer, service: ScriptedService) -> None:
    """It streams, and each turn brings those before it."""
    service.script = speak("né", "e 😀", pause=0.02)
    page.type("x")  # the focus is there from the beginning
    page.press("Enter")
    page.until(f"{STATUS} === 'Answered.' && {IDLE}")
    assert shown(page) == [["message user", "x"], ["message assistant", "née 😀"]]
    service.script = speak("b", reason="max_tokens")
    page.type("y")
    page.press("Enter", shift=True)
    page.type("z")
    page.click("#send")
    page.until(f"{STATUS}.startsWith('The answer is cut') && {IDLE}")
    assert shown(page)[2:] == [["message user", "y\nz"], ["message assistant", "b"]]
    assert asked(server, 1) == "<|user|>x<|assistant|>née 😀<|user|>y\nz<|assistant|>"
    page.click("#new")
    assert shown(page) == [] and page.evaluate("document.activeElement.id") == "prompt"
    page.type("w")
    page.press("Enter")
    page.until(f"{STATUS}.startsWith('The answer is cut')")
    assert asked(server, 2) == "<|user|>w<|assistant|>"


@needs_browser
def test_a_model_answers(browser: Browser, engine: Engine) -> None:
    """What the engine makes of it, until the context is full; then there is no room for a second turn."""
    expected = engine.chat([{"role": "user", "content": "def main"}], max_tokens=48)
    assert expected.text.strip() and expected.finish_reason == "context"
    with RunningServer(engine, Service(engine)) as server:
        browser.open(server.url + "/")
        browser.type("def main")
        browser.press("Enter")
        browser.until(f"{STATUS}.startsWith('The answer is cut') && {IDLE}")
        assert shown(browser) == [["message user", "def main"], ["message assistant", expected.text]]
        browser.type("y")
        browser.press("Enter")
        browser.until("document.querySelector('[role=alert]')?.textContent.includes('48')")
        assert server.service.stats().finished["context"] == 1


@needs_browser
def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(
    page: Browser, server: RunningServer, service: ScriptedService
) -> None:
    service.script = wait_for_cancel
    page.type("x")
    page.press("Enter")
    page.until("document.querySelector('.assistant')?.textContent === 'once'")
    assert page.evaluate("document.querySelector('#log').getAttribute('aria-busy')") == "true"
    assert page.evaluate("document.querySelector('#send').disabled") and not page.evaluate(IDLE)
    page.type("y")
    page.press("Enter")  # has no say while an answer comes
    page.click("#stop")
    page.until(f"{STATUS} === 'Stopped.' && {IDLE}")
    eventually(lambda: service.ended == {"cancelled": 1})
    service.script = speak("b")
    page.press("Enter")
    page.until(f"{STATUS} === 'Answered.'")
    assert asked(server, 1) == "<|user|>x<|assistant|>once<|user|>y<|assistant|>"
    assert shown(page)[1] == ["message assistant", "once"]


@needs_browser
def test_a_new_chat_ends_the_answer(page: Browser, server: RunningServer, service: ScriptedService) -> None:
    service.script = wait_for_cancel
    page.type("x")
    page.press("Enter")
    page.until("document.querySelector('.assistant')?.textContent === 'once'")
    page.click("#new")
    eventually(lambda: service.ended == {"cancelled": 1})
    service.script = speak("b")
    page.type("y")
    page.press("Enter")
    page.until(f"{STATUS} === 'Answered.'")
    assert asked(server, 1) == "<|user|>y<|assistant|>"
    assert shown(page) == [["message user", "y"], ["message assistant", "b"]]


@needs_browser
def test_errors_are_told_and_the_message_is_kept(
    browser: Browser, server: RunningServer, service: ScriptedService
) -> None:
    browser.open(server.url + "/")
    service.refusal = Busy(7, 1.0)
    browser.type("x")
    browser.press("Enter")
    browser.until("document.querySelector('[role=alert]')?.textContent.includes('7 requests are waiting')")
    assert browser.evaluate("document.querySelector('#prompt').value") == "x"
    service.refusal = None
    browser.press("Enter")
    browser.until(f"{STATUS} === 'Answered.'")
    assert asked(server, 0) == "<|user|>x<|assistant|>"
    service.script = fail
    browser.type("y")
    browser.press("Enter")
    browser.until("[...document.querySelectorAll('[role=alert]')].at(-1).textContent.includes('the server failed')")
    assert ["message assistant", "so far "] in shown(browser)


@needs_browser
def test_a_key_is_asked_for(browser: Browser, engine: Engine) -> None:
    with RunningServer(engine, ScriptedService(), api_key="open sesame") as server:
        browser.open(server.url + "/")
        browser.until("!document.querySelector('#key-row').classList.contains('hidden')")
        browser.until("document.activeElement.id === 'key'")
        browser.type("open sesame")
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.id") == "prompt"
        browser.type("x")
        browser.press("Enter")
        browser.until(f"{STATUS} === 'Answered.' && document.title === 'tiny'")


MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&amp;"


@needs_browser
def test_an_answer_is_text(page: Browser, service: ScriptedService) -> None:
    service.script = speak(MARKUP)
    page.type("x")
    page.press("Enter")
    page.until(f"{STATUS} === 'Answered.'")
    assert shown(page)[1] == ["message assistant", MARKUP]
    assert page.evaluate("document.querySelectorAll('#log *').length") == 2
    assert page.evaluate("document.title") == "tiny"


WATCH = """
window.forbidden = [];
window.insert = html => document.body.insertAdjacentHTML("beforeend", html);
document.addEventListener("securitypolicyviolation", event => forbidden.push(event.effectiveDirective));
"""


@needs_browser
@pytest.mark.parametrize(
    ("attempt", "directive"),
    [
        (
            "s = document.createElement('script'); s.textContent = 'owned = 1'; document.body.append(s)",
            "script-src-elem",
        ),
        ("insert('<i onclick=\"owned = 1\">'); document.body.lastElementChild.click()", "script-src-attr"),
        ("insert('<img src=\"http://127.0.0.1:9/a.png\">')", "img-src"),
        ("fetch('http://127.0.0.1:9/').catch(() => 0)", "connect-src"),
        ("insert('<iframe src=\"/\"></iframe>')", "frame-src"),
    ],
)
def test_what_the_policy_forbids(attempt: str, directive: str, browser: Browser, server: RunningServer) -> None:
    """Even if a text became markup, it could neither run nor tell anyone."""
    browser.open(server.url + "/")
    browser.until("document.title === 'tiny'")
    browser.evaluate(WATCH)
    browser.evaluate(f"(() => {{ {attempt} }})()")
    browser.until("forbidden.length")
    assert set(browser.evaluate("forbidden")) == {directive}
    assert browser.evaluate("window.owned") is None


@needs_browser
def test_light_and_dark(page: Browser) -> None:
    """Texts stand out from their grounds by 4.5 to 1, as WCAG 2.2 has it."""
    grounds = []
    page.evaluate("show('user', 'x'), show('error', 'y')")
    for scheme in ("light", "dark"):
        page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for selector in ("h1", ".user", ".error", "label", "#send", "#new"):
            ink, ground = page.evaluate(GROUND % selector)
            assert contrast(ink, ground) >= 4.5, (scheme, selector)
        grounds.append(page.evaluate(GROUND % "body")[1])
    assert min(grounds[0][:3]) > 200 and max(grounds[1][:3]) < 60


GROUND = """(() => {
  const read = text => text.match(/[\\d.]+/g).map(Number);
  let element = document.querySelector("%s");
  const ink = read(getComputedStyle(element).color);
  for (;; element = element.parentElement) {
    const ground = read(getComputedStyle(element).backgroundColor);
    if (ground.length === 3 || ground[3] > 0) return [ink, ground];
  }
})()"""


def contrast(first: list[float], second: list[float]) -> float:
    """WCAG 2.2's ratio of two colours."""

    def luminance(color: list[float]) -> float:
        parts = [part / 255 for part in color[:3]]
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_what_assistive_technology_is_told(page: Browser) -> None:
    nodes = page.command("Accessibility.getFullAXTree")["nodes"]

    def value(node: dict[str, Any], name: str) -> str:
        return str(node.get(name, {}).get("value", ""))

    named = {(value(node, "role"), value(node, "name")) for node in nodes if not node.get("ignored")}
    buttons = {name for role, name in named if role == "button"}
    assert buttons == {"New chat", "Stop", "Send"}
    assert [name for role, name in named if role == "textbox"] == [
        "Message (Enter sends, Shift and Enter begin a line)"
    ]
    assert {("heading", "tiny"), ("main", "Conversation")} <= named
    assert {"log", "status"} <= {role for role, _ in named}
    assert page.evaluate("document.documentElement.lang") == "en"


@needs_browser
def test_a_narrow_screen_needs_no_scrolling_aside(page: Browser, service: ScriptedService) -> None:
    page.command("Emulation.setDeviceMetricsOverride", width=320, height=480, deviceScaleFactor=1, mobile=True)
    service.script = speak("w" * 500)
    page.type("x")
    page.press("Enter")
    page.until(f"{STATUS} === 'Answered.'")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    page.command("Emulation.clearDeviceMetricsOverride")


def test_the_page_asks_nobody_else() -> None:
    page, headers = read_page()
    assert not re.search(rb"https?:|//[a-z]", page.replace(b"// ", b""))
    assert b"innerHTML" not in page and len(page) < 20_000
    rules = headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"} <= set(rules)
    assert not re.search("unsafe|\\*", headers["content-security-policy"])
