"""The page: a head, three tabs, and the named endpoints."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app.ask_tab import build_ask_tab
from app.caption_tab import build_caption_tab
from app.chat_tab import build_chat_tab
from app.endpoints import add_endpoints
from app.picture import keep_remote_out
from app.tasks import Current, Tasks

TITLE = "mmadapter"
TABS = {"caption": ("Caption", build_caption_tab), "ask": ("Ask", build_ask_tab), "chat": ("Chat", build_chat_tab)}
THREADS = 256  # many more than the service takes: it has the queue, and says when it is full
TIDY, KEEP_UPLOADS = 300, 3300  # seconds: how often uploads are looked through, and after how long they go
HEADING = """
<div class="top"><div class="grow"><h1>mmadapter</h1>
<p>A language model that sees. Switch adapters and turn their strength while one base model stays loaded.</p></div>
<button type="button" data-do="theme" aria-label="Light or dark" title="Light or dark"><i aria-hidden="true"></i>
</button></div>
"""


def build_page(tasks: Tasks) -> gr.Blocks:
    """Builds the page; `app.style` has its theme, CSS and head, for whoever serves it.

    `?tab=ask` in the address opens that tab.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(TIDY, KEEP_UPLOADS)) as page:
        gr.HTML(HEADING)
        with gr.Tabs(elem_id="tabs") as tabs:
            for name, (title, build) in TABS.items():
                with gr.Tab(title, id=name, elem_id=f"tab-{name}"):
                    build(tasks)
        add_endpoints(tasks)

        def opened(request: gr.Request) -> Any:
            wanted = request.query_params.get("tab", "")
            return gr.Tabs(selected=wanted) if wanted in TABS else gr.skip()  # whoever clicked meanwhile stays there

        def closed(request: gr.Request) -> None:
            """Ends what a tab that was closed has running: captions, answers and looks inside."""
            session = page.state_holder.session_data.get(request.session_hash)
            for value in [*session.state_data.values()] if session else ():
                if isinstance(value, Current):
                    value.leave()

        page.load(opened, None, tabs, queue=False, show_progress="hidden", api_visibility="private")
        page.unload(closed)
    page.max_threads = THREADS  # each answer that is waited for holds one, and Stop needs one, too
    page.queue(default_concurrency_limit=None, max_size=None)
    keep_remote_out(page)
    page.has_launched = page.is_running = True  # else Gradio lets a request name any file of the server's as an upload
    return page
