"""The chat judge against a server on this machine that fails in the ways that servers fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from salience.data import chat_judge, classify_steps
from salience.data.pir.judges import parse_judgements
from salience.errors import DataError, InputError

STEPS = ["3 + 5 is 8.", " It is 8 indeed.", " Wait, no.", " So 8."]
GOOD = [{"step": 0, "pattern": "progressive", "relates_to": None}, {"step": 1, "pattern": "verification", "relates_to": 0},
        {"step": 3, "pattern": "progressive", "relates_to": None}]  # fmt: skip


def chat(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class Fake:
    """A chat endpoint that answers by a script: each entry is (status, body, headers), or a function that is called."""

    def __init__(self) -> None:
        fake = self
        self.script: list = []
        self.asked: list[dict] = []
        self.headers: list[dict] = []
        self.paths: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.asked.append(json.loads(body))
                fake.headers.append(dict(self.headers))
                fake.paths.append(self.path)
                step = fake.script.pop(0)
                if callable(step):
                    step()
                    return
                status, content, headers = step
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def fake():
    server = Fake()
    yield server
    server.close()


def ok(text: object) -> tuple:
    return 200, chat(text), {}


def test_one_request_classifies_the_unmarked_steps(fake: Fake) -> None:
    fake.script = [ok("Here it is:\n```json\n" + json.dumps(GOOD) + "\n```")]
    found = classify_steps(STEPS, chat_judge(fake.url, "judge-1", key="secret"))
    assert [step.pattern for step in found] == ["progressive", "verification", "verification", "progressive"]
    assert found[1].relates_to == 0
    assert fake.paths == ["/v1/chat/completions"] and fake.asked[0]["model"] == "judge-1"
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    asked = fake.asked[0]["messages"][0]["content"]
    assert "steps 0, 1, 3," in asked and "[2] Wait, no." in asked


def test_nothing_is_asked_where_every_step_has_a_marker(fake: Fake) -> None:
    classify_steps(["Wait, no.", "Then 8."], chat_judge(fake.url, "m"))
    assert not fake.asked


def test_an_answer_that_cannot_be_used_is_asked_for_again(fake: Fake) -> None:
    wrong = [{**GOOD[0], "pattern": "checking"}, *GOOD[1:]]
    fake.script = [ok("I would rather not."), ok(json.dumps(wrong)), ok(json.dumps(GOOD))]
    pauses: list[float] = []
    found = classify_steps(STEPS, chat_judge(fake.url, "m", sleep=pauses.append))
    assert found[1].pattern == "verification" and not pauses
    assert "there is no JSON list" in fake.asked[1]["messages"][-1]["content"]
    assert "'checking'; allowed: progressive" in fake.asked[2]["messages"][-1]["content"]


def test_an_overloaded_server_is_asked_again_after_growing_pauses(fake: Fake) -> None:
    fake.script = [
        (429, b"slow down", {"Retry-After": "7"}),
        (503, b"", {}),
        (200, b"<html>", {}),
        ok(json.dumps(GOOD)),
    ]
    pauses: list[float] = []
    classify_steps(STEPS, chat_judge(fake.url, "m", sleep=pauses.append))
    assert pauses == [7.0, 1.0, 2.0]


def test_a_server_that_hangs_times_out(fake: Fake) -> None:
    fake.script = [lambda: time.sleep(1.0), ok(json.dumps(GOOD))]
    pauses: list[float] = []
    classify_steps(STEPS, chat_judge(fake.url, "m", timeout=0.2, sleep=pauses.append))
    assert pauses == [0.5] and len(fake.asked) == 2


def test_it_gives_up_and_says_what_came_last(fake: Fake) -> None:
    fake.script = [ok("no"), (500, b"down", {})]
    with pytest.raises(DataError, match="no usable answer in 2 attempts; the last one: status 500: down"):
        classify_steps(STEPS, chat_judge(fake.url, "m", attempts=2, sleep=lambda seconds: None))
    fake.script = [ok(None)]
    with pytest.raises(DataError, match="a reply without text"):
        classify_steps(STEPS, chat_judge(fake.url, "m", attempts=1))


def test_no_server_at_all() -> None:
    with pytest.raises(DataError, match="no reply: "):
        classify_steps(STEPS, chat_judge("http://127.0.0.1:9/v1", "m", attempts=2, sleep=lambda seconds: None))


def test_a_refusal_is_final_and_redirects_are_not_followed(fake: Fake) -> None:
    fake.script = [(401, b"wrong key", {})]
    with pytest.raises(InputError, match="refused the request with status 401: wrong key"):
        classify_steps(STEPS, chat_judge(fake.url, "m"))
    for status in (301, 302, 307, 308):
        fake.script = [(status, b"", {"Location": f"{fake.url}/elsewhere"})]
        with pytest.raises(InputError, match=f"status {status}"):
            classify_steps(STEPS, chat_judge(fake.url, "m", key="secret"))
    assert len(fake.asked) == 5


@pytest.mark.parametrize(
    ("url", "options", "told"),
    [
        ("localhost:8000", {}, "is no http"), ("ftp://host/v1", {}, "is no http"), ("file:///etc/passwd", {}, "is no http"),
        ("http://far.example/v1", {"key": "k"}, "is not encrypted"), ("http://u:p@localhost/v1", {}, "address alone"),
        ("http://localhost/v1?key=1", {}, "address alone"), ("http://localhost/v1", {"attempts": 0}, "attempts"),
        ("http://localhost/v1", {"timeout": float("inf")}, "timeout"),
    ],
)  # fmt: skip
def test_addresses_and_parameters(url: str, options: dict, told: str) -> None:
    with pytest.raises(InputError, match=told):
        chat_judge(url, "m", **options)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda rows: rows[:2], "step 3 is not judged"), (lambda rows: [*rows, rows[0]], "judged twice"),
        (lambda rows: [{**rows[0], "relates_to": 9, "pattern": "verification"}, *rows[1:]], "relates to 9"),
        (lambda rows: [{"pattern": "progressive"}], "has no number"), (lambda rows: [1], "has no number"),
        (lambda rows: [{**rows[0], "pattern": ["progressive"]}], "has the pattern"),
    ],
)  # fmt: skip
def test_replies_that_are_refused(change: Callable, told: str) -> None:
    with pytest.raises(DataError, match=told):
        parse_judgements(json.dumps(change(GOOD)), [0, 1, 3], 4)
    assert len(parse_judgements(json.dumps(GOOD), [0, 1, 3], 4)) == 3
    with pytest.raises(DataError, match="no JSON list"):
        parse_judgements("[" * 100_000 + "]" * 100_000, [0], 4)
