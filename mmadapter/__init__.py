"""A language model that sees: zero-gated adaption prompts and one image token on a frozen LLaMA.

Example:
    import mmadapter
    session = mmadapter.load(adapter="caption")
    print(session.caption("photo.jpg"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmadapter.session import Session, load

__version__ = "0.1.0"
__all__ = ["Session", "__version__", "load"]


def __getattr__(name: str) -> object:
    # torch takes seconds to import, and `python -m mmadapter --help` does not need it.
    if name in ("Session", "load"):
        from mmadapter import session

        return getattr(session, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
