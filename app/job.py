"""What the app's service takes and gives: jobs, updates, and its two ways to say no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mmadapter.checkpoint import AdapterFile


@dataclass(frozen=True)
class Job:
    """One text to write.

    Attributes:
        task: "caption", "answer" or "chat".
        image: What it is about; a caption needs one.
        messages: Of a chat: `role` and `content`, a system message first if any, the last from the user.
        question: Of an answer.
        adapter: Name of a known adapter, or "none" for the base.
        strength: Factor on the adapter's gates and tuning: 0 is the base model, 1 the adapter as trained.
        settings: Fields of `sampling.Sampling`; None or absent takes the adapter's default.
    """

    task: str
    image: Image.Image | None = None
    messages: tuple[Mapping[str, str], ...] = ()
    question: str = ""
    adapter: str = "caption"
    strength: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """How far one job of a run is.

    Attributes:
        index: Of the job in its run.
        state: "waiting", "writing" or "done".
        text: All of it so far.
        finish: "stop", "length" or "cancelled" once done, else None.
        prompt_tokens: Tokens that the model reads.
        tokens: Generated so far.
        ahead: While waiting: runs before this one.
        seconds: While waiting the estimate until it starts, later the time since it was submitted.
        probabilities: With choices, once done: of each of them; `text` is the likeliest.
    """

    index: int
    state: str
    text: str
    finish: str | None
    prompt_tokens: int
    tokens: int
    ahead: int
    seconds: float
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class AdapterInfo:
    """What the app says about an adapter.

    Attributes:
        name: As jobs name it; "none" is the base.
        title: A few words for people.
        tasks: What it is good for, its own task first.
        sees: Whether it takes images.
        about: Metadata of its file; None for the base.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    sees: bool
    about: AdapterFile | None


class Busy(Exception):  # noqa: N818 - it is no error
    """The queue is full.

    Attributes:
        seconds: After how long to try again, an estimate.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        super().__init__(f"Too many people are waiting; try again in about {max(1, round(seconds))} s.")


class Failure(Exception):  # noqa: N818 - the name that the page and the API know
    """Something broke; its text is a sentence for the page.

    Attributes:
        code: Stands in the log beside the traceback.
    """

    def __init__(self, code: str) -> None:
        self.code = code
        super().__init__(f"Something went wrong (code {code}); try again, or look for the code in the log.")
