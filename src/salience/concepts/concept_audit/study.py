"""Audit C: the user-study kit. One page that works offline, and the scoring of the answers that come back."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jinja2
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from salience.concepts.concept_audit.explaining import LIMIT, Capacity, LinearExplanation
from salience.concepts.concept_audit.linear import classes_of, labels_of
from salience.errors import DataError, InputError, NothingToDo

ARMS = ("concepts", "examples")
_SIDE = 320  # pixels of the longer side of an embedded picture, at most
_FORMAT = "salience concept study 1"


class UserStudyKit:
    """Ask people what the paper asked them: concepts in a photo, the model's class of it, the number of concepts.

    `make_tasks` gives one HTML page with the pictures in it, which loads nothing; answers are saved from it as a JSON
    file and read by `score`. What is right stands in the key (`save`), not in the page.

    Parameters
    ----------
    arm : {"concepts", "examples"}
        People see the explanation, mark concepts and read its scores off; or, as the control group, they see pictures
        of each class and no concept.
    n_examples : int
        Pictures of a class, in the arm of examples.
    random_state : int
        Of the choice and the order of pictures.

    Attributes
    ----------
    key_ : dict
        Plain data: identity of the study, arm, concepts and classes that are shown, and of each task the row of its
        picture, the concepts in it and the model's class.

    Notes
    -----
    Source: section 6 of arXiv 2207.09615 and the authors' study pages and analysis. There, groups see examples, 8, 16
    or 32 concepts, with five people for each of five inputs; make a kit for each group.
    """

    def __init__(self, *, arm: str = "concepts", n_examples: int = 5, random_state: int = 0) -> None:
        if arm not in ARMS:
            raise InputError(f"arm: got {arm!r}; it must be one of {', '.join(ARMS)}")
        if n_examples < 1:
            raise InputError(f"n_examples: got {n_examples}; it must be at least 1")
        self.arm, self.n_examples, self.random_state = arm, n_examples, random_state

    def make_tasks(
        self,
        pictures: Sequence[UInt8[np.ndarray, "height width channel"]],
        concepts: Bool[np.ndarray, "n c"],
        predictions: Int[np.ndarray, " n"],
        explanation: LinearExplanation,
        n: int = 10,
        *,
        class_names: Mapping[int, str] | None = None,
        path: Iterable[Capacity] = (),
        title: str = "Concepts in photos",
    ) -> str:
        """Choose pictures, spread over the classes, and write the page.

        Parameters
        ----------
        pictures : sequence of uint8 arrays (height, width, 1 or 3), n of them
            Or what gives them by index.
        concepts : array (n, c) of bool
            Labels, in the order of `explanation.names`.
        predictions : array (n,) of int
            The model's classes.
        explanation : LinearExplanation
            Of a few classes (four in the paper); pictures of other classes are not asked about.
        n : int
            Tasks.
        class_names : dict of int to str, optional
        path : iterable of Capacity
            Numbers of concepts to choose between, with what each foretells; the question is left out without.
        title : str

        Returns
        -------
        str
            The page; every piece of text in it is escaped.

        Raises
        ------
        InputError
            Shapes that do not fit, or an explanation that uses no concept.
        NothingToDo
            No picture that the model predicts as one of the classes.
        """
        truth = labels_of("concepts", concepts, 2)
        predicted = classes_of(predictions, len(truth))
        if len(pictures) != len(truth) or truth.shape[1] != len(explanation.names) or n < 1:
            raise InputError(
                f"pictures ({len(pictures)}), concepts {truth.shape}, {len(explanation.names)} names and n = {n}: "
                "must fit each other, and n be at least 1"
            )
        shown = [explanation.names.index(name) for name in explanation.used]
        if not shown and self.arm == "concepts":
            raise InputError("explanation: uses no concept, so there is nothing to ask")
        rows, examples = self._choose(predicted, explanation.classes, n)
        names = class_names or {}
        classes = [{
            "id": int(c), "name": str(names.get(int(c), f"class {c}")), "intercept": float(explanation.intercept[i]),
            "weights": explanation.coef[i, shown].tolist(),
            "examples": [_embedded(pictures[row]) for row in examples[int(c)]],
        } for i, c in enumerate(explanation.classes)]  # fmt: skip
        titles = [explanation.names[i] for i in shown] if self.arm == "concepts" else []
        options = [{"k": one.k, "used": len(one.names), "fidelity": one.fidelity} for one in path]
        tasks = [{"row": int(row), "present": [name for name, i in zip(titles, shown) if truth[row, i]],
                  "class": int(predicted[row])} for row in rows]  # fmt: skip
        key: dict[str, Any] = {
            "format": _FORMAT, "arm": self.arm, "concepts": titles, "classes": [c["id"] for c in classes],
            "preferences": [one["k"] for one in options], "tasks": tasks,
        }  # fmt: skip
        key["study"] = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.key_ = key
        return _page(title, key["study"], self.arm, titles, classes, options,
                     [_embedded(pictures[int(row)]) for row in rows])  # fmt: skip

    def _choose(self, predicted: np.ndarray, classes: np.ndarray, n: int) -> tuple[list[int], dict[int, list[int]]]:
        """Rows to ask about, a class after the other and then shuffled, and the examples of each class."""
        rng = np.random.default_rng(self.random_state)
        piles = {int(c): rng.permutation(np.flatnonzero(predicted == c)).tolist() for c in classes}
        if not any(piles.values()):
            raise NothingToDo(f"pictures: none is predicted as one of the classes {', '.join(map(str, piles))}")
        examples: dict[int, list[int]] = {c: [] for c in piles}
        if self.arm == "examples":
            for c, pile in piles.items():  # of a class with few pictures half are left to ask about
                take = min(self.n_examples, len(pile) // 2)
                examples[c], piles[c] = pile[:take], pile[take:]
        rows: list[int] = []
        while len(rows) < n and any(piles.values()):
            for pile in piles.values():
                if pile and len(rows) < n:
                    rows.append(pile.pop())
        return rng.permutation(rows).tolist(), examples

    def save(self, path: str | Path) -> None:
        """Write the key, which `load` reads; keep it from the people who are asked."""
        Path(path).write_text(json.dumps(self.key_, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> UserStudyKit:
        """The kit of a key that was saved; a `DataError` if the file is none."""
        key = read_json(path)
        if not isinstance(key, dict) or key.get("format") != _FORMAT:
            raise DataError(f"{path}: is no key of a concept study")
        kit = cls(arm=key["arm"])
        kit.key_ = key
        return kit

    def score(self, answers: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """How well people recognise the concepts and foretell the model, and how long it takes.

        Parameters
        ----------
        answers : dict, or sequence of dicts
            What the page saves, one for each person: ``{"study": ..., "tasks": [{"task": 0, "marked": [names], "class":
            id, "seconds": 12.5}, ...], "preferred": k or None}``.

        Returns
        -------
        dict
            people, photos; recall (marked among those present, mean over photos that hold one), precision (present
            among those marked, mean over photos with a mark), simulation_accuracy (the model's class was foretold),
            seconds (a photo, mean), preferred (how often each number of concepts). NaN where nothing was asked.

        Raises
        ------
        InputError
            `make_tasks` has not been called.
        DataError
            Answers of another study, or that name a task, concept or class which it does not have.
        NothingToDo
            No answer.
        """
        if not hasattr(self, "key_"):
            raise InputError("kit: has no tasks yet; call make_tasks, or load a key")
        people = [answers] if isinstance(answers, Mapping) else list(answers)
        if not people or not any(person.get("tasks") for person in people if isinstance(person, Mapping)):
            raise NothingToDo("answers: there are none")
        recall, precision, right, seconds = [], [], [], []
        for number, person in enumerate(people):
            for task, marked, chosen, spent in self._checked(person, number):
                present = set(task["present"])
                hits = len(marked & present)
                recall += [hits / len(present)] if present else []
                precision += [hits / len(marked)] if marked else []
                right.append(chosen == task["class"])
                seconds.append(spent)
        preferred = Counter(person["preferred"] for person in people if person.get("preferred") is not None)
        return {
            "arm": self.arm, "people": len(people), "photos": len(right), "recall": _mean(recall),
            "precision": _mean(precision), "simulation_accuracy": _mean(right), "seconds": _mean(seconds),
            "preferred": dict(sorted(preferred.items())),
        }  # fmt: skip

    def _checked(self, person: Any, number: int) -> list[tuple[dict[str, Any], set[str], int, float]]:
        key, where = self.key_, f"answers of person {number + 1}"
        if not isinstance(person, Mapping) or person.get("study") != key["study"]:
            raise DataError(f"{where}: are not of study {key['study']}")
        if person.get("preferred") is not None and person["preferred"] not in key["preferences"]:
            raise DataError(f"{where}: prefer {person['preferred']!r} concepts, which was no choice")
        found: list[tuple[dict[str, Any], set[str], int, float]] = []
        seen: set[int] = set()
        for answer in person.get("tasks") or ():
            if not isinstance(answer, Mapping):
                raise DataError(f"{where}: hold {answer!r} in place of a task")
            at, marked, chosen = answer.get("task"), answer.get("marked", []), answer.get("class")
            if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < len(key["tasks"]) or at in seen:
                raise DataError(f"{where}: task {at!r} does not exist, or is answered twice")
            if not isinstance(marked, list) or not set(map(str, marked)) <= set(key["concepts"]):
                raise DataError(
                    f"{where}, task {at}: marks {marked!r}; the study asks for {', '.join(key['concepts'])}"
                )
            if chosen not in key["classes"] or isinstance(chosen, bool):
                raise DataError(f"{where}, task {at}: chooses class {chosen!r}, which was no choice")
            spent = answer.get("seconds")
            if not isinstance(spent, int | float) or isinstance(spent, bool) or not 0 <= spent < 1e7:
                raise DataError(f"{where}, task {at}: took {spent!r} seconds; it must be a number of at least 0")
            seen.add(at)
            found.append((key["tasks"][at], set(map(str, marked)), cast(int, chosen), float(spent)))
        return found


def read_json(path: str | Path) -> Any:
    """A JSON file's content; a `DataError` names what is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: is no readable JSON: {error}") from error


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _embedded(picture: UInt8[np.ndarray, "height width channel"]) -> str:
    """A picture as a data URI."""
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise InputError(f"pictures: must be uint8 (height, width, 1 or 3); got {array.dtype} {array.shape}")
    image = Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _page(title: str, study: str, arm: str, concepts: list[str], classes: list[dict[str, Any]],
          options: list[dict[str, Any]], pictures: list[str]) -> str:  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=_visible, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    style, script = (environment.get_template(f"study.{ending}").render() for ending in ("css", "js"))
    return environment.get_template("study.html.j2").render(
        title=title, study=study, arm=arm, concepts=concepts, classes=classes, options=options, pictures=pictures,
        limit=LIMIT, style_hash=_hash(style), script_hash=_hash(script),
    )  # fmt: skip


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")


def _visible(value: Any) -> str:
    """Plain text whatever claims to be markup, with characters that hide or turn the writing written out."""
    return "".join(c if c.isprintable() or c == "\n" else f"⟨U+{ord(c):04X}⟩" for c in str(value))
