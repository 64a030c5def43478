"""How the page looks: a theme with the system's own fonts, the page's CSS, and the little script in its head.

Nothing is fetched from anywhere. Colours are the theme's variables, so that light and dark follow from it.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

FOLDER = Path(__file__).resolve().parent
CSS = (FOLDER / "page.css").read_text(encoding="utf-8")
HEAD = f"<script>\n{(FOLDER / 'page.js').read_text(encoding='utf-8')}</script>"

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
FONTS_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """The theme, for `gradio.mount_gradio_app` and `Blocks.launch`."""
    look = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_lg,
        font=[gr.themes.Font(name) for name in FONTS],
        font_mono=[gr.themes.Font(name) for name in FONTS_MONO],
    )
    # White on teal-700 has a contrast of 5.5; on the theme's teal-500 it would be 2.5.
    return look.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        color_accent="*primary_600",
        link_text_color="*secondary_700",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
        block_shadow="none",
        block_border_width="1px",
    )
