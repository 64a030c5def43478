"""The picture input of every tab, and the sample pictures beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from PIL import Image

from app.tasks import examples

NAMES = {"astronaut": "Astronaut", "chelsea": "Cat", "coffee": "Coffee", "hopper": "Admiral", "rocket": "Rocket"}


class Refusal(gr.Error):
    """A sentence for whoever asked; it is no failure, and the log keeps no traceback of it."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, print_exception=False)


def picture_input(label: str, height: int = 330, **options: object) -> gr.Image:
    """Takes a picture by drop, paste, file or camera; handlers get the path of the upload.

    What was uploaded is handed on unopened: Gradio would decode it before our own limits are checked.
    """
    picture = gr.Image(
        label=label,
        type="filepath",
        format="png",  # a sample picture stays what it is, to the bit
        sources=["upload", "webcam", "clipboard"],
        height=height,
        buttons=[],
        placeholder="Drop a picture here\nor click to choose one",
        **options,
    )
    picture.preprocess = lambda payload: None if payload is None else payload.path
    return picture


def sample_buttons(picture: gr.Image) -> None:
    """One button a sample picture, which puts it into the input."""
    paths = examples()
    if not paths:
        return
    with gr.Row(elem_classes="samples"):
        for path in paths:
            button = gr.Button(NAMES.get(path.stem, path.stem.capitalize()), icon=path, size="sm")
            button.click(opener(path), None, picture, show_progress="hidden", api_visibility="private")


def opener(path: Path) -> Callable[[], Image.Image]:
    """Reads a picture of ours when it is asked for; as a path, Gradio would serve it only from its working folder."""

    def read() -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGB")

    return read


def keep_remote_out(page: gr.Blocks) -> None:
    """A request may name a URL in place of an uploaded file, and Gradio would fetch it: here nothing is fetched."""
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = _local_only(block.async_move_resource_to_block_cache)


def _local_only(move: Callable) -> Callable:
    async def local_only(path: str | Path | None) -> str | None:
        if str(path or "").lower().startswith(("http:", "https:")):
            raise Refusal("Pictures from the web are not fetched here; send the file itself.")
        return await move(path)

    return local_only
