"""The chat page: a real Chromium, driven through the DevTools protocol, against real relays.

What a relay does not do when asked to, as some close codes and odd frames, a scripted one does with the same page.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import websocket
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

from imrelay.app import page_policy
from tests.conftest import RelayFactory
from tests.support.browser import Browser, wait_until_ready
from tests.support.harness import RelayProcess, VirtualHost, eventually, plain_environment
from tests.support.proxy import Proxy

#: Seconds until something that should happen counts as not happening.
_PATIENCE = 15.0
_PAGE = resources.files("imrelay").joinpath("static/chat.html").read_text(encoding="utf-8")
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = [
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--disable-sync",
    ),
    *("--no-first-run", "--no-proxy-server", "--disable-background-networking", "--disable-component-update"),
    *("--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--remote-debugging-port=0"),
]

#: Runs in each tab before the page: what the tests read, all that the page said of its connection, and the delays
#: of its timers; these run as `runTimer` has them run.
_SPY = """\
window.delays = [];
window.told = [];
new MutationObserver(() => {
  const words = document.querySelector("[role=status]")?.textContent;
  if (words && words !== told.at(-1)) told.push(words);
}).observe(document, { subtree: true, childList: true });
window.runTimer = window.setTimeout.bind(window);
window.setTimeout = (what, delay) => { delays.push(delay); return runTimer(what, delay); };
window.messages = () => [...document.querySelectorAll("[role=log] > *")].map((item) => ({
  body: item.querySelector(".body").textContent,
  about: [...item.querySelectorAll(".about")].map((line) => line.textContent).join(" · "),
  mine: item.classList.contains("mine"), state: item.dataset.state ?? "" }));
window.has = ({ about = "", ...wanted }) => messages().some((message) => message.about.includes(about) &&
  Object.entries(wanted).every(([key, value]) => message[key] === value));
"""

#: Settles when the expression is true, after a change of the document or at once.
_WAIT = """\
new Promise((settle) => {
  const look = () => { const value = (%s); if (value) { observer.disconnect(); settle(value); } };
  const observer = new MutationObserver(look);
  observer.observe(document, { subtree: true, childList: true, characterData: true, attributes: true });
  look();
})
"""


class Chromium:
    """A headless Chromium with a profile of its own, and the one connection to its DevTools."""

    def __init__(self, program: str, directory: Path) -> None:
        log = directory / "chromium.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [program, *_FLAGS, f"--user-data-dir={directory / 'profile'}", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

        def address() -> re.Match[str] | None:
            assert self._process.poll() is None, log.read_text(errors="replace")
            return re.search(r"DevTools listening on (ws://\S+)", log.read_text(errors="replace"))

        try:
            self._socket = websocket.create_connection(
                eventually(address, 30)[1], timeout=_PATIENCE, suppress_origin=True, http_no_proxy=["127.0.0.1"]
            )
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self._count = 0
        self.events: list[dict[str, Any]] = []
        self.call("Target.setDiscoverTargets", discover=True)

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol, of the browser or of a tab's session, and return its result."""
        self._count += 1
        number = self._count
        call = {"id": number, "method": method, "params": parameters}
        self._socket.send(json.dumps(call | ({"sessionId": session} if session else {})))
        while (answer := json.loads(self._socket.recv())).get("id") != number:
            if "method" in answer:
                self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def wait_for_event(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the oldest event that matches, and forget it; wait for one where there is none."""
        for event in self.events:
            if matches(event):
                self.events.remove(event)
                return event
        while not matches(event := json.loads(self._socket.recv())):
            if "method" in event:
                self.events.append(event)
        return event

    def close(self) -> None:
        """Have it end, and wait until it has."""
        try:
            self.call("Browser.close")
            self._process.wait(_PATIENCE)
        finally:
            self._socket.close()
            self._process.kill()
            self._process.wait()


class Tab:
    """A tab of the browser."""

    def __init__(self, chromium: Chromium, target: str) -> None:
        self._chromium = chromium
        self.session = chromium.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        self.before_page(_SPY)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the DevTools protocol in this tab."""
        return self._chromium.call(method, self.session, **parameters)

    def before_page(self, script: str) -> None:
        """Run a script in every page that comes, before its own."""
        self.call("Page.addScriptToEvaluateOnNewDocument", source=script)

    def open(self, url: str) -> Tab:
        """Go to an address and wait until its page has loaded."""
        self.call("Page.navigate", url=url)
        self.wait_for_event("Page.loadEventFired")
        return self

    def wait_for_event(self, method: str) -> dict[str, Any]:
        """Wait for an event of this tab and return its parameters."""
        event = self._chromium.wait_for_event(
            lambda event: event.get("method") == method and event.get("sessionId") == self.session
        )
        return event["params"]

    def events(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of the events of this tab so far."""
        self.evaluate("0")  # what happened until now has been told before its answer
        events = self._chromium.events
        return [
            event["params"]
            for event in events
            if (event["method"], event.get("sessionId")) == (method, self.session)
        ]

    def evaluate(self, expression: str, **parameters: Any) -> Any:
        """Evaluate JavaScript in the page and return the value; with a user's gesture, as after a click."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, userGesture=True, **parameters
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until a JavaScript expression about the document is true, and return its value."""
        try:
            return self.evaluate(_WAIT % expression, awaitPromise=True)
        except websocket.WebSocketTimeoutException:
            page = self.evaluate("document.body.innerText")
            raise AssertionError(f"not within {_PATIENCE:g} s: {expression}; the page says:\n{page}") from None

    def wait_for_state(self, state: str, words: str = "") -> None:
        """Wait until the page says that the connection is so."""
        status = "document.querySelector('[role=status]')"
        self.wait(f"{status}.dataset.state === '{state}' && {status}.textContent.includes({json.dumps(words)})")

    def wait_for_message(self, **wanted: object) -> None:
        """Wait for a message with this `body`, this in its `about`, this `state`, `mine` or not."""
        self.wait(f"has({json.dumps(wanted)})")

    def messages(self) -> list[dict[str, Any]]:
        """Return what the conversation shows now."""
        shown: list[dict[str, Any]] = self.evaluate("messages()")
        return shown

    def focus(self, label: str) -> None:
        """Focus the field with this label and select what is in it."""
        labels = "[...document.querySelectorAll('label')]"
        self.evaluate(f"{labels}.find((one) => one.textContent === {json.dumps(label)}).control.select()")

    def type(self, text: str) -> None:
        """Type where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release Enter or Tab where the focus is."""
        code, text = {"Enter": (13, "\r"), "Tab": (9, "")}[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, words: str) -> None:
        """Click the button or link that shows these words."""
        choice = "[...document.querySelectorAll('button, a')]"
        self.evaluate(f"{choice}.find((one) => one.textContent === {json.dumps(words)}).click()")

    def write(self, to: str, text: str) -> None:
        """Write a message to somebody and send it with Enter."""
        self.focus("To")
        self.type(to)
        self.focus("Text")
        self.type(text)
        self.press("Enter")


@pytest.fixture(scope="module")
def url(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a relay for those tests that need no own; each has users of its own."""
    settings = [f"--broker-url={broker_url}", "--server-host=127.0.0.1", "--server-port=0"]
    process = RelayProcess(tmp_path_factory.mktemp("relay"), ["serve", *settings], plain_environment())
    try:
        process.wait_until_listening()
        yield process.url
        assert process.stop() == 0
        assert "Traceback" not in process.log, process.log
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """A Chromium for the module. Without one: skipped here, a failure where CI is set."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("the tests of the page need Chromium: apt-get install chromium", pytrace=False)
        pytest.skip("needs Chromium: apt-get install chromium")
    browser = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def tab(chromium: Chromium) -> Iterator[Callable[..., Tab]]:
    """Open tabs: `tab(url)`, or `tab(target=…)` for one that is there; no script may have failed in them.

    They go, with all their connections, at the end of the test; so what they connect to is to be set up before.
    """
    opened: list[Tab] = []
    context = chromium.call("Target.createBrowserContext")["browserContextId"]

    def open_tab(url: str = "", *, target: str = "") -> Tab:
        if not target:
            new = chromium.call("Target.createTarget", url="about:blank", browserContextId=context)
            target = new["targetId"]
        opened.append(Tab(chromium, target))
        return opened[-1].open(url) if url else opened[-1]

    try:
        yield open_tab
        for each in opened:
            assert each.events("Runtime.exceptionThrown") == []
    finally:
        chromium.call("Target.disposeBrowserContext", browserContextId=context)
        chromium.events.clear()


def _serve_page(connection: ServerConnection, request: Request) -> Response | None:
    if "Upgrade" in request.headers:
        return None
    fields = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": page_policy(_PAGE),
        "Connection": "close",
    }
    body = _PAGE.encode()
    return Response(200, "OK", Headers(fields | {"Content-Length": str(len(body))}), body)


def _listen(connection: ServerConnection) -> None:
    """Be a relay that takes everything and says nothing, until the page goes."""
    for _ in connection:
        pass


@pytest.fixture
def scripted() -> Iterator[Callable[[Callable[[ServerConnection], None]], str]]:
    """Serve the page and, to its sockets, a script: `scripted(script)` returns the address."""
    servers: list[tuple[Server, threading.Thread]] = []

    def start(script: Callable[[ServerConnection], None]) -> str:
        server = serve(script, "127.0.0.1", 0, process_request=_serve_page)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.socket.getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()


def test_two_tabs_talk(url: str, tab: Callable[..., Tab]) -> None:
    """What one tab writes the other shows with its sender and the time; the first shows the broker's ack."""
    one, two = tab(f"{url}/1"), tab(f"{url}/2")
    one.wait_for_state("connected")
    one.write("2", "hello\nfrom 1")
    one.wait_for_message(body="hello\nfrom 1", mine=True, state="taken", about="taken by the broker")
    two.wait_for_message(body="hello\nfrom 1", mine=False, about="from 1 · ")
    assert re.search(r"\d+:\d\d:\d\d", two.messages()[0]["about"])
    two.click("1")
    two.type("hello yourself")
    two.press("Enter")
    one.wait_for_message(body="hello yourself", mine=False, about="from 2 · ")
    assert [len(each.messages()) for each in (one, two)] == [2, 2]
    assert "You are 1" in one.evaluate("document.body.innerText")


@pytest.mark.parametrize("user", ["Ann B. Smith", " 王小明 ", "ann@example.org", "100%25?a=b&c#d\\'+", "…😀"])
def test_any_id_may_be_used(user: str, url: str, tab: Callable[..., Tab]) -> None:
    """Any id can be typed there, leads to its percent-encoded address, and writes and reads there."""
    me, other = tab(f"{url}/"), f"not {user}"
    me.type(user)
    me.press("Enter")
    me.wait_for_event("Page.loadEventFired")
    assert me.evaluate("location.pathname") == "/" + quote(user, safe="!'()*~")
    me.write(other, "to the other")
    them = tab(f"{url}/{quote(other, safe='')}#to={quote(user, safe='')}")
    them.wait_for_message(body="to the other", about=f"from {user} · ")
    them.type("and back")
    them.press("Enter")
    me.wait_for_message(body="and back", about=f"from {other} · ")


@pytest.mark.parametrize(
    ("user", "says"),
    [("", "at least one"), ("a/b", "“/”"), ("..", "“..”"), ("a\x7f", "control"), ("王" * 43, "129")],
)
def test_what_is_no_id_is_refused_on_the_landing_page(
    user: str, says: str, scripted: Callable[..., str], tab: Callable[..., Tab]
) -> None:
    """An id that breaks the rules is refused where it is typed, with the rule that it breaks."""
    landing = tab(scripted(_listen) + "/")
    landing.evaluate(f"document.activeElement.value = {json.dumps(user)}")
    landing.press("Enter")
    assert says in landing.evaluate("document.activeElement.validationMessage")
    assert landing.evaluate("location.pathname") == "/"


def test_an_address_that_is_no_id_leads_to_the_landing_page(
    scripted: Callable[..., str], tab: Callable[..., Tab]
) -> None:
    """An address whose bytes are no UTF-8 is explained, and the page asks who one is."""
    landing = tab(scripted(_listen) + "/%ff")
    assert "not UTF-8" in landing.evaluate("document.querySelector('[role=alert]').innerText")
    assert landing.evaluate("document.activeElement.labels[0].textContent") == "Who are you?"


def test_a_message_to_somebody_away_is_there_when_they_come(url: str, tab: Callable[..., Tab]) -> None:
    """What was written to somebody whose tab is closed shows when it is opened, in order."""
    one = tab(f"{url}/writer")
    one.write("away", "first")
    one.write("away", "second")
    one.wait_for_message(body="second", state="taken")
    away = tab(f"{url}/away")
    away.wait_for_message(body="second", about="from writer · ")
    assert [message["body"] for message in away.messages()] == ["first", "second"]


def test_markup_stays_text(url: str, tab: Callable[..., Tab]) -> None:
    """Markup in a content, in a sender's id and in one's own is shown as the text that it is, and does nothing."""
    evil = "<img src=x onerror=window.hacked=1>"
    me = tab(f"{url}/{quote(evil)}")
    me.write(evil, f"<b>{evil}</b><script>window.hacked=1</script>")
    me.wait_for_message(body=f"<b>{evil}</b><script>window.hacked=1</script>", mine=False, about=f"from {evil} · ")
    sender = websocket.create_connection(f"{url.replace('http', 'ws')}/evil", timeout=_PATIENCE)
    sender.send(json.dumps({"to": {"id": evil}, "content": {"html": evil}}))
    sender.send(json.dumps({"to": {"id": evil}, "html": evil}))
    sender.close()
    me.wait_for_message(body=json.dumps({"html": evil}, separators=(",", ":")), about="from evil · ")
    me.wait_for_message(about="from evil · of an unknown shape · ")
    assert evil in me.messages()[-1]["body"]
    assert me.evaluate("document.querySelectorAll('img, b, main script').length") == 0
    assert me.evaluate("window.hacked === undefined")


def test_the_relay_goes_and_comes_back(relay: RelayFactory, tab: Callable[..., Tab]) -> None:
    """A stop of the relay is told with its code; what is written meanwhile is kept, and sent when it is back."""
    first = relay()
    one, two = tab(f"{first.url}/1"), tab(f"{first.url}/2")
    for each in (one, two):
        each.wait_for_state("connected")
    first.stop()
    one.wait("told.some((words) => words.includes('the relay is stopping (1012)'))")
    two.wait("told.some((words) => words.includes('the relay is stopping (1012)'))")
    one.write("2", "kept one")
    one.write("2", "kept two")
    assert {message["state"] for message in one.messages()} == {"kept"}
    assert "waits in this tab" in one.messages()[0]["about"]
    relay(server_port=first.port)
    one.wait_for_message(body="kept two", state="taken")
    two.wait_for_message(body="kept two", about="from 1 · ")
    assert [message["body"] for message in two.messages()] == ["kept one", "kept two"]
    one.wait_for_state("connected")


def test_a_refusal_of_the_relay_is_shown_at_the_message(relay: RelayFactory, tab: Callable[..., Tab]) -> None:
    """A message that the relay refuses says so with the relay's sentence, and the next one goes through."""
    one = tab(f"{relay(inbox_unknown_recipient='refuse').url}/1")
    one.wait_for_state("connected")
    one.write("nobody", "hello?")
    one.wait_for_message(body="hello?", state="failed", about="failed: ")
    assert "nobody" in one.messages()[0]["about"].split("failed: ")[1]
    one.write("1", "hello me")
    one.wait_for_message(body="hello me", state="taken")


def test_too_long_a_message_ends_the_connection_for_good(relay: RelayFactory, tab: Callable[..., Tab]) -> None:
    """A message beyond the relay's limit is not confirmed; the page does not reconnect but by its button."""
    one = tab(f"{relay(websocket_max_message_size=1024).url}/1")
    one.wait_for_state("connected")
    one.write("1", "x" * 1024)
    one.wait_for_state("disconnected", "1009")
    assert one.messages()[0]["state"] == "unsure"
    assert one.evaluate("delays") == []
    one.click("Connect now")
    one.wait_for_state("connected")


def test_the_keyboard_is_enough(url: str, tab: Callable[..., Tab]) -> None:
    """A person without a mouse goes from the landing page to a sent message by typing, Tab and Enter."""
    one = tab(f"{url}/")
    one.type("keys")
    one.press("Enter")
    one.wait_for_event("Page.loadEventFired")
    one.type("keys")
    one.press("Tab")
    one.type("line 1")
    one.press("Enter", shift=True)
    one.type("line 2")
    one.press("Tab")
    assert one.evaluate("document.activeElement.textContent") == "Send"
    one.press("Enter")
    one.wait_for_message(body="line 1\nline 2", mine=False)
    one.type("at once")
    one.press("Enter")
    one.wait_for_message(body="at once", mine=False)


def test_enter_in_an_input_method_sends_nothing(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """Enter that ends a word of an input method, as Chinese is typed, does not send the message."""
    one = tab(scripted(_listen) + "/1#to=1")
    one.type("你")
    pressed = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: %s, bubbles: true, cancelable: true })"
    assert one.evaluate(f"document.activeElement.dispatchEvent({pressed % 'true'})")
    assert one.messages() == []
    assert not one.evaluate(f"document.activeElement.dispatchEvent({pressed % 'false'})")
    assert [message["body"] for message in one.messages()] == ["你"]


def test_one_click_opens_the_second_tab(url: str, chromium: Chromium, tab: Callable[..., Tab]) -> None:
    """From the landing page it takes two clicks to have two tabs that are addressed to each other."""
    one = tab(f"{url}/")
    one.click("be 1 in this tab")
    one.wait_for_event("Page.loadEventFired")
    one.click("open a second tab as 2")
    opened = chromium.wait_for_event(
        lambda event: (
            event.get("method") == "Target.targetInfoChanged"
            and event["params"]["targetInfo"]["url"] == f"{url}/2#to=1"
        )
    )
    two = tab(target=opened["params"]["targetInfo"]["targetId"])
    two.wait("document.readyState === 'complete' && document.activeElement.id === 'text'")
    two.type("hello 1")
    two.press("Enter")
    one.wait_for_message(body="hello 1", about="from 2 · ")
    one.focus("Text")
    one.type("hello 2")
    one.press("Enter")
    two.wait("document.body.innerText.includes('hello 2')")


def _close_as_asked(connection: ServerConnection) -> None:
    """Close with the code that the path names."""
    assert connection.request is not None
    connection.close(int(connection.request.path[1:]), "because")


def test_some_close_codes_are_for_good(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """After a close code that says so the page tells it with its reason, and comes back by its button alone."""
    url, one = scripted(_close_as_asked), tab()
    for code in (1000, 1001, 1002, 1003, 1007, 1009, 4500, 4501, 4999):
        one.open(f"{url}/{code}")
        one.wait_for_state("disconnected", f"because ({code}). This page does not try again by itself")
        one.click("Connect now")
        one.wait("told.filter((words) => words.startsWith('Disconnected')).length === 2")
        assert one.evaluate("delays") == []


def test_other_close_codes_say_when_to_come_back(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """After any other close code the page tells it with its reason, and comes back soon or after a pause."""
    url, one = scripted(_close_as_asked), tab()
    one.before_page("window.runTimer = () => 0;")
    soon, paused = (250, 500), (10_000, 20_000)
    bounds = {
        1011: soon,
        1012: (0, 1000),
        1013: paused,
        4000: soon,
        4401: soon,
        4408: soon,
        4429: paused,
        4499: soon,
    }
    for code, (least, most) in bounds.items():
        one.open(f"{url}/{code}")
        one.wait_for_state("disconnected", f"because ({code}). Trying again in ")
        (delay,) = one.evaluate("delays")
        assert least <= delay <= most, code


def test_attempts_become_rarer(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """While the relay ends every connection the pauses double up to half a minute, by chance shorter."""
    url = scripted(lambda connection: connection.close(1011))
    tabs = [tab(), tab()]
    for one in tabs:
        one.before_page("window.runTimer = (what) => { if (delays.length < 9) queueMicrotask(what); };")
        one.open(f"{url}/1")
    first, second = (one.wait("delays.length === 9 && delays") for one in tabs)
    for delay, most in zip(first, (500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000), strict=True):
        assert most / 2 <= delay <= most
    assert first != second


def test_an_unanswered_message_is_sent_again_by_its_button_alone(
    scripted: Callable[..., str], tab: Callable[..., Tab]
) -> None:
    """A connection that ends before the answer leaves its message unconfirmed; only its button sends it again."""
    seen: list[list[str]] = []

    def script(connection: ServerConnection) -> None:
        seen.append([])
        for frame in connection:
            message = json.loads(frame)
            seen[-1].append(message["content"])
            if len(seen) == 1:
                return connection.close(1011)
            connection.send(json.dumps({"ack": {"id": message["id"], "mid": "M", "time": 0}}))

    one = tab(scripted(script) + "/1#to=2")
    one.wait_for_state("connected")
    one.type("one")
    one.press("Enter")
    one.wait_for_message(body="one", state="unsure", about="not confirmed")
    one.wait_for_state("connected")
    one.type("two")
    one.press("Enter")
    one.wait_for_message(body="two", state="taken")
    assert one.messages()[0]["state"] == "unsure"
    one.click("Send again")
    one.wait_for_message(body="one", state="taken")
    assert seen == [["one"], ["two", "one"]]


def test_a_temporary_failure_can_be_tried_again(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """A message that failed for a temporary reason has a button that sends it again; a refused one has none."""

    def script(connection: ServerConnection) -> None:
        for number, frame in enumerate(connection):
            error = {"code": "c", "message": "no room" if number else "wrong", "id": json.loads(frame)["id"]}
            connection.send(json.dumps({"error": error | ({"temporary": True} if number else {})}))

    one = tab(scripted(script) + "/1#to=2")
    one.wait_for_state("connected")
    for words, has_button in (("wrong", False), ("no room", True)):
        one.type("hello")
        one.press("Enter")
        one.wait_for_message(state="failed", about=f"failed: {words}")
        assert (
            one.evaluate("document.querySelector('[role=log] > :last-child .progress button') !== null")
            is has_button
        )


def test_what_may_have_arrived_is_not_shown_twice(
    relay: RelayFactory, broker: VirtualHost, tab: Callable[..., Tab]
) -> None:
    """A message whose end the relay does not know is said to be so; its button makes no second message of it."""
    with Proxy(broker.url) as proxy:
        host, away = relay(broker_url=proxy.url, broker_publish_timeout=1), relay()
        wait_until_ready(host)
        with Browser(away, "page reader") as reader:
            one = tab(host.url + "/writer#to=page%20reader")
            one.wait_for_state("connected")
            one.type("before")
            one.press("Enter")
            one.wait_for_message(body="before", state="taken")
            proxy.stall()
            one.type("uncertain")
            one.press("Enter")
            one.wait_for_message(body="uncertain", state="unsure", about="may have arrived: ")
            proxy.heal()
            one.click("Send again")
            one.wait_for_message(body="uncertain", state="taken")
            one.type("after")
            one.press("Enter")
            assert reader.contents_until("after") == ["before", "uncertain", "after"]


#: A frame to the page, and what it shows: the text, and what it says about it.
_FRAMES: list[tuple[str | bytes, str, str]] = [
    ("not JSON", "not JSON", "from an unknown sender · of an unknown shape"),
    ("null", "null", "of an unknown shape"),
    ('["a"]', '["a"]', "of an unknown shape"),
    ('{"from":null,"content":"a"}', '{"from":null,"content":"a"}', "from an unknown sender · of an unknown shape"),
    ('{"from":{"id":{"id":1}},"content":1}', '{"from":{"id":{"id":1}},"content":1}', "of an unknown shape"),
    ('{"from":{"id":"1"},"x":2}', '{"from":{"id":"1"},"x":2}', "from 1 · of an unknown shape"),
    ('{"from":{"id":7,"toString":null},"content":""}', "", "from 7 · "),
    ('{"from":{"id":12345678901234567890},"content":null}', "null", "from 12345678901234567890 · "),
    ('{"from":{"id":"\u202e1"},"content":{"a":[1.5]}}', '{"a":[1.5]}', "from \u202e1 · "),
    ('{"from":{"id":"1"},"to":{"id":"2"},"ack":{"id":"c1"},"content":"x"}', "x", "from 1 · "),
    ('{"to":{"id":"2"},"error":{"id":"c1","message":"x"}}', "", "of an unknown shape"),
    ('{"ack":{"id":"c99"}}', '{"ack":{"id":"c99"}}', "of an unknown shape"),
    ('{"error":{"code":"bad_json","message":"not JSON: x"}}', "not JSON: x", "from the relay · "),
    ('{"from":{"id":"1"},"content":' + "[" * 50_000 + "]" * 50_000 + "}", "", "of an unknown shape"),
    (b'{"from":{"id":"1"},"content":"binary"}', "binary", "from 1 · binary, 38 bytes · "),
    (b"\x00\xff", "00 ff", "from an unknown sender · binary, 2 bytes · of an unknown shape"),
    (b"\xff" * 65, "ff " * 64 + "…", "binary, 65 bytes · of an unknown shape"),
]


def test_whatever_comes_in_is_shown(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """Frames of any shape are shown, binary ones named so, and none passes for an answer to what is on its way."""
    written = threading.Event()

    def script(connection: ServerConnection) -> None:
        connection.recv()
        for frame, _, _ in _FRAMES:
            connection.send(frame)
        connection.send('{"from":{"id":"1"},"content":"the last"}')
        written.wait(_PATIENCE)

    one = tab(scripted(script) + "/1#to=2")
    one.wait_for_state("connected")
    one.type("on its way")
    one.press("Enter")
    one.wait_for_message(body="the last")
    mine, *shown, _ = one.messages()
    assert mine["state"] == "sent"
    assert len(shown) == len(_FRAMES)
    for (_, body, about), message in zip(_FRAMES, shown, strict=True):
        assert about in message["about"]
        assert message["body"] == body or (not body and about.endswith("shape"))
    written.set()


def test_the_page_needs_nothing_but_itself(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """The page asks nobody for anything but itself and its socket, and works under the strictest policy."""
    url = scripted(_listen)
    one = tab(f"{url}/1")
    one.wait_for_state("connected")
    one.write("2", "hello")
    one.wait_for_message(body="hello", state="sent")
    requested = [event["request"]["url"] for event in one.events("Network.requestWillBeSent")]
    assert [address for address in requested if not address.startswith("data:")] == [f"{url}/1"]
    assert [event["url"] for event in one.events("Network.webSocketCreated")] == [f"{url}/1".replace("http", "ws")]
    assert [entry["entry"]["text"] for entry in one.events("Log.entryAdded")] == []
    assert one.evaluate("getComputedStyle(document.querySelector('[role=log]')).overflowY") == "auto"


def test_a_screen_reader_finds_its_way(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """Everything to write in or press has a name, and the state and the messages are regions that speak up."""
    one = tab(scripted(_listen) + "/1#to=2")
    one.wait_for_state("connected")
    tree = [node for node in one.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree]
    assert all(name for role, name in named if role in ("textbox", "button", "link", "heading"))
    assert {("textbox", "To"), ("textbox", "Text"), ("button", "Send"), ("heading", "You are 1")} <= set(named)
    live = {
        node["role"]["value"]: {entry["name"]: entry["value"].get("value") for entry in node["properties"]}
        for node in tree
        if node["role"]["value"] in ("log", "status")
    }
    assert {role: entry["live"] for role, entry in live.items()} == {"log": "polite", "status": "polite"}


def test_a_phone_shows_all_of_it(scripted: Callable[..., str], tab: Callable[..., Tab]) -> None:
    """On a screen of 320 by 480 long names and words are not cut off, and the field to write in is in view."""
    name = "W" * 128
    message = json.dumps({"from": {"id": name}, "content": "M" * 500})

    def script(connection: ServerConnection) -> None:
        connection.send(message)
        _listen(connection)

    url = scripted(script)
    one = tab()
    one.call("Emulation.setDeviceMetricsOverride", width=320, height=480, deviceScaleFactor=1, mobile=True)
    for address in (f"{url}/", f"{url}/1", f"{url}/{name}"):
        one.open(address)
        if address != f"{url}/":
            one.wait_for_message(body="M" * 500)
            one.write(name, "W" * 500)
        right = "Math.max(...[...document.querySelectorAll('body *')].map((e) => e.getBoundingClientRect().right))"
        assert one.evaluate(right) <= 320
        assert one.evaluate("document.documentElement.scrollWidth") == 320
        assert one.evaluate("document.activeElement.getBoundingClientRect().bottom <= visualViewport.height")
