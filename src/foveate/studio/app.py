"""The page: what is on it, and what happens where. Gradio is imported when it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError
from foveate.studio import view
from foveate.studio.errors import StudioError
from foveate.studio.pictures import Example, examples, opened
from foveate.studio.session import Answer, Session, written

if TYPE_CHECKING:
    from PIL import Image

#: What is compared until somebody chooses otherwise: a method and its budget.
FIRST = (("evocut", 64), ("adav", 64))
#: The end of a budget's scale until a picture is there.
TOKENS = 576
PLACES = ("a", "b")
#: Everything that needs the model waits in one line.
_LINE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A question that was asked, and what was said.

    Args:
        picture: What it is about.
        question: The question.
        specs: The methods of the two places, with their budgets.
        shown: What all tokens said, and the two methods.
    """

    picture: Image.Image
    question: str
    specs: tuple[str, str]
    shown: tuple[view.Shown, view.Shown, view.Shown] = (None, None, None)

    def told(self, which: int, shown: view.Shown) -> Asked:
        """Return it with one answer more, or another one."""
        first, second, third = (shown if i == which else each for i, each in enumerate(self.shown))
        return dataclasses.replace(self, shown=(first, second, third))


class Studio:
    """What the page does: from what its fields hold to what it shows.

    Args:
        session: Who answers.
        crop: The processor cuts pictures to their central square.
    """

    def __init__(self, session: Session, crop: bool) -> None:
        self._session, self._crop = session, crop

    def ask(self, path: str | None, question: str, *fields: Any) -> Iterator[tuple[Asked | None, str]]:
        """Ask all three, one after another; what was asked and said so far, and what is wrong with the question.

        Args:
            path: The picture's file.
            question: The question.
            fields: Method and budget of each place.
        """
        try:
            if not path:
                raise StudioError("there is no picture", "choose one of those below, or drop a file on the frame")
            if not (question or "").strip():
                raise StudioError("there is no question", "type one, or choose one of those below it")
            asked = Asked(opened(path), question, _specs(fields))
        except FoveateError as reason:
            yield None, view.error(reason)
            return
        for which in range(3):
            asked = asked.told(which, self._answer(asked, which))
            yield asked, ""

    def again(self, place: str, asked: Asked | None, *fields: Any) -> Asked | None:
        """Ask one place again, about the picture and the question of last time; None where nothing was asked yet."""
        if asked is None:
            return None
        asked = dataclasses.replace(asked, specs=_specs(fields))
        which = 1 + PLACES.index(place)
        return asked.told(which, self._answer(asked, which))

    def tokens(self, path: str | None) -> int:
        """Return the visual tokens of a picture, or the usual number where it does not tell."""
        try:
            return (self._session.tokens(opened(path)) if path else None) or TOKENS
        except FoveateError:  # said when the question is asked
            return TOKENS

    def page(self, asked: Asked) -> list[Any]:
        """Return what the parts of the page show: cards, pictures, numbers, the difference, in words, and layers."""
        one, other = asked.shown[1:]
        names = (asked.specs[0], asked.specs[1])
        cards = [view.card(name, shown) for name, shown in zip(("all tokens", *names), asked.shown, strict=True)]
        pictures = [view.kept(asked.picture, shown, self._crop) for shown in asked.shown]
        apart, words = view.difference(asked.picture, (one, other), names, self._crop)
        numbers = view.numbers(("all tokens", *names), asked.shown)
        return [*cards, *pictures, numbers, apart, view.caption(words), view.layers((one, other))]

    def _answer(self, asked: Asked, which: int) -> Answer | FoveateError:
        try:
            if which == 0:
                return self._session.plain(asked.picture, asked.question)
            return self._session.answer(PLACES[which - 1], asked.specs[which - 1], asked.picture, asked.question)
        except FoveateError as reason:
            return reason


def build(session: Session, about: str, crop: bool) -> Any:
    """Return the page, not yet served.

    Args:
        session: Who answers.
        about: The model, and what times depend on.
        crop: The processor cuts pictures to their central square.
    """
    import gradio as gr

    studio, offered, methods = Studio(session, crop), examples(), session.methods()
    session.warm_up(offered[0].image, offered[0].questions[0])
    with gr.Blocks(title="Foveate studio", analytics_enabled=False, fill_width=True) as page:
        state = gr.State(None)
        gr.HTML(f'<div class="fv-head"><h1>Foveate studio</h1><p>{escape(about)}</p></div>')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture, gallery = _pictures(offered)
                question = gr.Textbox(offered[0].questions[0], label="Question", max_lines=3, elem_id="question")
                ideas = gr.Dataset(
                    label="Questions to try", components=[question], samples=_samples(offered[0]), elem_id="ideas"
                )
                fields = [*_choice("a", FIRST[0], methods), *_choice("b", FIRST[1], methods)]
                button = gr.Button("Ask", variant="primary", elem_id="ask")
                problem = gr.HTML(elem_id="problem")
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    columns = [_column(name) for name in ("all", *PLACES)]
                numbers = gr.HTML(elem_id="numbers")
                apart = gr.Image(
                    show_label=False, interactive=False, format="png", buttons=["download", "fullscreen"],
                    elem_id="apart", alt_text="What two methods kept, and what only one of them kept",
                )  # fmt: skip
                words = gr.HTML(elem_id="words")
                layers = gr.HTML(elem_id="layers")
        parts = [*(card for card, _ in columns), *(image for _, image in columns), numbers, apart, words, layers]

        def ask(*values: Any) -> Iterator[list[Any]]:
            for asked, wrong in studio.ask(*values):
                shown = [gr.skip()] * len(parts) if asked is None else studio.page(asked)
                yield [gr.skip() if asked is None else asked, wrong, *shown]

        def again(place: str) -> Callable[..., list[Any]]:
            def moved(*values: Any) -> list[Any]:
                asked = studio.again(place, *values)
                return [gr.skip()] * (1 + len(parts)) if asked is None else [asked, *studio.page(asked)]

            return moved

        def chosen(event: gr.SelectData) -> list[Any]:
            example = offered[event.index]
            return [example.image, example.questions[0], gr.Dataset(samples=_samples(example))]

        def sized(path: str | None, *keeps: int) -> list[Any]:
            most = studio.tokens(path)
            return [gr.update(maximum=most, value=min(keep, most)) for keep in keeps]

        chosen.__annotations__["event"] = gr.SelectData  # Gradio looks for it, by the class
        sliders = [fields[1], fields[3]]
        waited = {"show_progress_on": [problem], "show_progress": "minimal", **_LINE}
        unseen = {"trigger_mode": "always_last", "show_progress": "hidden", **_LINE}
        gr.on([button.click, question.submit], ask, [picture, question, *fields], [state, problem, *parts], **waited)
        for i, field in enumerate(fields):
            place = PLACES[i // 2]
            event = field.input if field in sliders else field.change
            event(again(place), [state, *fields], [state, *parts], **unseen)
        gallery.select(chosen, None, [picture, question, ideas], show_progress="hidden", api_visibility="private")
        picture.change(sized, [picture, *sliders], sliders, show_progress="hidden", **_LINE)
        ideas.click(lambda sample: sample[0], ideas, question, show_progress="hidden", api_visibility="private")
    return page


def _pictures(offered: Sequence[Example]) -> tuple[Any, Any]:
    import gradio as gr

    picture = gr.Image(
        offered[0].image, type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"],
        label="Picture", height=300, buttons=[], elem_id="picture", alt_text="The picture that is asked about",
    )  # fmt: skip
    picture.preprocess = _path  # Gradio's own opens the file, and where that is broken nobody learns why
    gallery = gr.Gallery(
        [example.image for example in offered], label="Pictures to try", show_label=False, columns=len(offered),
        height="auto", format="png", allow_preview=False, interactive=False, buttons=[], elem_id="gallery",
    )  # fmt: skip
    return picture, gallery


def _path(payload: Any) -> str | None:
    return None if payload is None else payload.path


def _choice(place: str, first: tuple[str, int], methods: Sequence[str]) -> tuple[Any, Any]:
    import gradio as gr

    name = first[0] if first[0] in methods or not methods else methods[0]
    with gr.Group():
        method = gr.Dropdown(
            list(methods), value=name, label=f"Method {place.upper()}", allow_custom_value=True,
            elem_id=f"method-{place}",
        )  # fmt: skip
        keep = gr.Slider(
            1, TOKENS, first[1], step=1, precision=0, label=f"Budget {place.upper()} (tokens)", buttons=[],
            elem_id=f"keep-{place}",
        )  # fmt: skip
    return method, keep


def _column(name: str) -> tuple[Any, Any]:
    import gradio as gr

    title = "all tokens" if name == "all" else f"method {name.upper()}"
    with gr.Column(min_width=200):
        card = gr.HTML(view.card(title, None), elem_id=f"card-{name}")
        image = gr.Image(
            interactive=False, show_label=False, format="png", buttons=["download", "fullscreen"],
            elem_id=f"kept-{name}", alt_text=f"The picture with the tokens that {title} kept",
        )  # fmt: skip
    return card, image


def _samples(example: Example) -> list[list[str]]:
    return [[question] for question in example.questions]


def _specs(fields: Sequence[Any]) -> tuple[str, str]:
    method_a, keep_a, method_b, keep_b = fields
    return written(method_a or "", int(keep_a)), written(method_b or "", int(keep_b))
