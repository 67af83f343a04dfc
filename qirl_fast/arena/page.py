"""The page: Gradio's tabs, buttons and events; page.js adds keys, history and what a click sends.

Gradio's own queue is not used: a vote is one POST, and the answer is the next question.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from qirl_fast.arena.desk import SIDES, Desk

HERE = Path(__file__).parent
LABELS = {"left": "Left  [1]", "right": "Right  [2]", "tie": "Tie  [3]", "bad": "Both bad  [4]"}
REFRESH_S = 5
HELP = (
    "<p class='help'>Keys: 1 or left arrow, 2 or right arrow, 3 or T tie, 4 or B both bad, "
    "Backspace or Z back, N forward.</p>"
)
BEFORE_RESULTS = (
    "<p>Results can sway your votes. Whoever asks for them is noted, and the report says how many "
    "votes came after that.</p>"
)


def build(desk: Desk) -> tuple[Any, dict[str, Any]]:
    """The page, and how it is to be mounted."""
    plain: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title="Arena", analytics_enabled=False) as page:
        wire = gr.Textbox(visible=False)  # page.js fills in what is sent
        with gr.Tabs():
            with gr.Tab("Vote", elem_id="arena-vote"):
                with gr.Row(elem_id="arena-who"):
                    name = gr.Textbox(
                        label="Your name",
                        max_lines=1,
                        elem_id="arena-name",
                        scale=4,
                        autofocus=True,
                    )
                    start = gr.Button("Start", elem_id="arena-start", scale=1)
                view = gr.HTML(elem_id="arena-view")
                with gr.Row(elem_id="arena-buttons"):
                    votes = {
                        side: gr.Button(LABELS[side], elem_id=f"arena-{side}", min_width=90)
                        for side in SIDES
                    }
                with gr.Row(elem_id="arena-moves"):
                    back = small("Back", "back")
                    forward = small("Forward", "forward")
                    leave = small("Another rater", "leave")
                    go = small("Go", "go")  # page.js presses it
                gr.HTML(HELP)
            with gr.Tab("Results", elem_id="arena-show"):
                _results(desk, wire, plain)
        moves = ((back, "back"), (forward, "forward"), (go, "go"), (leave, "leave"))
        for side, button in votes.items():
            button.click(desk.vote, wire, view, js=f"() => arena.vote('{side}')", **plain)
        for button, word in moves:
            button.click(desk.show, wire, view, js=f"() => arena.{word}()", **plain)
        for event in (start.click, name.submit):
            event(desk.show, wire, view, js="() => arena.start()", **plain)
        page.load(desk.show, wire, view, js="() => arena.load()", **plain)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    style = (HERE / "page.css").read_text(encoding="utf-8")
    how = {
        # in the head, as Gradio would confine `css` to what lies inside its margins
        "head": f"<script>{script}</script><style>{style}</style>",
        # fonts of the system: the page asks no other server for anything
        "theme": gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "footer_links": [],
        "show_error": False,
        "ssr_mode": False,
    }
    return page, how


def small(text: str, word: str) -> Any:
    """A button of page.js's `word`."""
    return gr.Button(text, elem_id=f"arena-{word}", size="sm", min_width=90)


def _results(desk: Desk, wire: Any, plain: dict[str, Any]) -> None:
    models = list(desk.study.models)
    gr.HTML(BEFORE_RESULTS)
    with gr.Row():
        model = gr.Dropdown(models, value=models[1], label="Model", elem_id="arena-model")
        other = gr.Dropdown(models, value=models[0], label="against", elem_id="arena-other")
        show = gr.Button("Show results", elem_id="arena-ask")
    found = gr.HTML(elem_id="arena-found")
    timer = gr.Timer(REFRESH_S, active=False)

    def asked(sent: str, one: str, two: str) -> tuple[str, Any]:
        return desk.results(sent, one, two), gr.Timer(active=True)

    show.click(
        asked, [wire, model, other], [found, timer], js="(_, a, b) => arena.look(a, b)", **plain
    )
    timer.tick(lambda one, two: desk.results("", one, two), [model, other], found, **plain)
