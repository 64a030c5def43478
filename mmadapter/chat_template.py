"""A model's Jinja chat template, run in a sandbox: it is a program that came with downloaded weights.

The environment is the one that the templates on model hubs are written for: blocks are trimmed, loops can break, and
there are `raise_exception`, `strftime_now` and a `tojson` that escapes no HTML.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping


def render(template: str, messages: list, **variables: object) -> str:
    """The text of a conversation.

    Args:
        template: Jinja source.
        messages: Messages in order; only plain values (mappings, lists, strings, numbers) reach the template.
        **variables: What else the template may name, such as `bos_token` and `add_generation_prompt`.

    Raises:
        ValueError: The template is broken, or it refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    try:
        return _compiled(template).render(messages=_plain(messages), **variables)
    # A template is a program: on messages that it was not written for it fails in any of these.
    except (
        TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template refuses these messages: {reason}") from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> object:
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GuardedNamespace(Namespace):
        """The mutable object that templates assign to, without the names that reach into Python."""

        def __init__(*args: object, **items: object) -> None:  # a template may itself pass self=...
            attributes = dict(*args[1:], **items)
            for name in attributes:
                GuardedNamespace._check(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: object) -> None:
            GuardedNamespace._check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: str) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a name in a template's namespace must not begin with an underscore, got {name!r}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        dict=lambda *args, **items: dict(*args, **items),
        namespace=GuardedNamespace,
    )
    # {% generation %} only marks what the assistant said, for training; the text is the same without it.
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    return environment.from_string(source)


def _plain(value: object) -> object:
    """The value rebuilt from plain types: methods of an image or array are nothing for a template to call."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
