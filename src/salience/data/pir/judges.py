"""Judges of steps without a marker: a chat endpoint, or a language model on this machine.

The paper asks an LLM which pattern a step has and which progressive step a functional one relates to (arXiv 2505.19187,
section 3.1 and appendix A); the wording of the question is ours.
"""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from salience.data.pir.steps import PATTERNS, Judge, Judgement
from salience.errors import DataError, InputError

_MEANINGS = {
    "progressive": "moves the solution on: sets up, computes, derives or concludes",
    "verification": "checks something that an earlier step has established",
    "multi_method": "gets to something established earlier in another way",
    "error_correction": "finds or repairs a mistake of an earlier step",
}
_MOST_BYTES = 4 << 20  # of a reply
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for


def chat_judge(
    url: str, model: str, *, key: str | None = None, timeout: float = 60.0, attempts: int = 4,
    sleep: Callable[[float], None] = time.sleep,
) -> Judge:  # fmt: skip
    """Judge steps by an OpenAI-compatible chat endpoint, one request per trace. Sends the steps of the trace there.

    Parameters
    ----------
    url : str
        Such as ``http://localhost:8000/v1``; ``/chat/completions`` is added where it is missing.
    model : str
        Its name at the endpoint.
    key : str, optional
        Sent as a bearer token, over https or to this machine only. Redirects are refused.
    timeout : float
        Seconds to wait for a reply.
    attempts : int
        Requests at most for one trace: after a time-out, a lost connection, an overloaded or failing server (with
        growing pauses), and after an answer that cannot be used (the next request says what was wrong).
    sleep : callable
        Takes the seconds between two attempts.

    Raises
    ------
    InputError
        The URL is none, or would send the key in the clear; the endpoint refuses the request.
    DataError
        No usable answer came in all attempts.
    """
    address = _address(url, key)
    if attempts < 1 or not (timeout > 0 and math.isfinite(timeout)):
        raise InputError(f"attempts must be at least 1 and timeout positive; got {attempts} and {timeout}")

    def judge(steps: Sequence[str], unmarked: Sequence[int]) -> list[Judgement]:
        messages = [{"role": "user", "content": question_of(steps, unmarked)}]
        trouble, pause = "", 0.0
        for attempt in range(attempts):
            if pause:
                sleep(pause)
            try:
                text = _asked(address, {"model": model, "messages": messages, "temperature": 0}, key, timeout)
            except _Again as error:
                trouble, pause = str(error), min(max(error.wait, 0.5 * 2**attempt), _LONGEST_WAIT)
                continue
            try:
                return parse_judgements(text, unmarked, len(steps))
            except DataError as error:
                trouble, pause = f"{error}; it answered {text[:80]!r}", 0.0
                again = f"That cannot be used: {error}. Answer with the JSON alone."
                messages = [messages[0], {"role": "assistant", "content": text[:4000]},
                            {"role": "user", "content": again}]  # fmt: skip
        raise DataError(f"judge {address}: no usable answer in {attempts} attempts; the last one: {trouble}")

    return judge


def model_judge(model: Any, tokenizer: Any) -> Judge:
    """Judge steps by a causal language model: the pattern whose letter it finds likeliest after the question.

    Parameters
    ----------
    model : transformers causal language model
    tokenizer : PreTrainedTokenizerFast
    """
    from salience.model.text import span_log_probs

    letters = [f" {letter}" for letter in "ABCD"]
    choices = "\n".join(f"{letter.strip()}. {name}: {_MEANINGS[name]}" for letter, name in zip(letters, PATTERNS))

    def judge(steps: Sequence[str], unmarked: Sequence[int]) -> list[Judgement]:
        found = []
        for number in unmarked:
            before = "".join(steps[:number]).strip()[-2000:]
            prompt = (f"A solution goes on with one more step. What is the step for?\n{choices}\n\nSolution so far:\n"
                      f"{before}\n\nStep:\n{steps[number].strip()}\n\nAnswer:")  # fmt: skip
            spans = span_log_probs(model, tokenizer, prompt, letters)
            scores = [float(span.sum()) for span in spans]
            found.append(Judgement(PATTERNS[scores.index(max(scores))]))
        return found

    return judge


def question_of(steps: Sequence[str], unmarked: Sequence[int]) -> str:
    """What the endpoint is asked about a trace."""
    meanings = "\n".join(f"- {name}: {meaning}" for name, meaning in _MEANINGS.items())
    listed = "\n".join(f"[{number}] {step.strip()}" for number, step in enumerate(steps))
    return (
        f"Below are the numbered steps of a solution. Classify the steps {', '.join(map(str, unmarked))}, each with "
        f"exactly one pattern:\n{meanings}\n\nFor a step that is not progressive also give the number of the "
        "progressive step that it relates to. Answer with JSON alone, a list such as "
        '[{"step": 3, "pattern": "verification", "relates_to": 2}], one entry per step asked for; relates_to is null '
        "for a progressive step."
        f"\n\n{listed}"
    )


def parse_judgements(text: str, unmarked: Sequence[int], steps: int) -> list[Judgement]:
    """The judgements of a reply, in the order of `unmarked`.

    Raises
    ------
    DataError
        The reply holds no JSON list, lacks a step or has one twice, or a pattern or number is not valid.
    """
    start, stop = text.find("["), text.rfind("]")
    try:
        entries = json.loads(text[start : stop + 1]) if 0 <= start < stop else None
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list):
        raise DataError("there is no JSON list")
    found: dict[int, Judgement] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            raise DataError(f"entry {entry!r:.60} has no number of a step")
        number, pattern, about = entry["step"], entry.get("pattern"), entry.get("relates_to")
        if number in found:
            raise DataError(f"step {number} is judged twice")
        if pattern not in PATTERNS:
            raise DataError(f"step {number} has the pattern {pattern!r:.40}; allowed: {', '.join(PATTERNS)}")
        if about is not None and (isinstance(about, bool) or not isinstance(about, int) or not 0 <= about < steps):
            raise DataError(f"step {number} relates to {about!r:.40}; the steps are 0 to {steps - 1}")
        found[number] = Judgement(pattern, None if about == number or pattern == "progressive" else about)
    if missing := [number for number in unmarked if number not in found]:
        raise DataError(f"step {missing[0]} is not judged")
    return [found[number] for number in unmarked]


class _Again(Exception):
    """A request that may be repeated, after `wait` seconds if the server says so."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key and the traces to somewhere that nobody named."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _address(url: str, key: str | None) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"judge: {url!r} is no http(s) address, such as http://localhost:8000/v1")
    if parts.query or parts.fragment or parts.username:
        raise InputError("judge: give the address alone, without a query, a fragment or a password in it")
    if key is not None and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise InputError(f"judge: {url} is not encrypted; the key is sent over https, or to this machine, only")
    path = parts.path.rstrip("/")
    return parts._replace(path=path if path.endswith("/chat/completions") else f"{path}/chat/completions").geturl()


def _asked(address: str, payload: dict[str, Any], key: str | None, timeout: float) -> str:
    """The text of the reply to one request."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(payload).encode(), headers)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as reply:
            raw = reply.read(_MOST_BYTES + 1)
    except urllib.error.HTTPError as error:
        said = error.read(300).decode("utf-8", "replace").strip()
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise _Again(f"status {error.code}: {said}", _seconds(error.headers.get("Retry-After"))) from None
        raise InputError(f"judge {address}: refused the request with status {error.code}: {said}") from None
    except (urllib.error.URLError, TimeoutError, OSError, ValueError) as error:
        raise _Again(f"no reply: {getattr(error, 'reason', error)}") from None
    if len(raw) > _MOST_BYTES:
        raise _Again("a reply of more than 4 MB")
    try:
        text = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Again(f"no chat reply: {raw[:80]!r}") from None
    if not isinstance(text, str):
        raise _Again("a reply without text")
    return text


def _seconds(header: str | None) -> float:
    try:
        value = float(header or 0)
    except ValueError:  # a date
        return 0.0
    return value if math.isfinite(value) and value > 0 else 0.0
