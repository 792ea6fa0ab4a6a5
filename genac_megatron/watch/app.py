"""The pages' server side: addresses to pages and plots. It reads run folders and writes nowhere."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from werkzeug.exceptions import HTTPException, NotFound
from werkzeug.routing import Map, Rule
from werkzeug.utils import redirect
from werkzeug.wrappers import Request, Response

from genac_megatron.errors import GenacError
from genac_megatron.observe.report_canvas import DARK, LIGHT, Theme, png
from genac_megatron.observe.report_data import RunData, number, summarise
from genac_megatron.observe.report_page import STYLE, text_of
from genac_megatron.observe.report_plots import PLOTS
from genac_megatron.observe.report_suites import suite_summary
from genac_megatron.observe.runinfo import jsonable
from genac_megatron.watch import compare_plots, pages
from genac_megatron.watch.compare import Comparison
from genac_megatron.watch.conversation import conversation
from genac_megatron.watch.find import Query, search
from genac_megatron.watch.follow import Followed, Watched
from genac_megatron.watch.standing import standing

REDRAW_S = 8.0  # between two drawings of a run's plots, while it goes on, and
TIMES = 3.0  # ... times what the last ones took
RECENT = 20  # rows that a latest figure is the mean of
MOST_RUNS = 12  # that are compared; the page says where more are asked for
# No text of a run can do anything, were it ever to slip through unescaped.
POLICY = (
    "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
THEMES: dict[str, Theme] = {"light": LIGHT, "dark": DARK}
OWN_PLOTS: list[pages.Plotted] = [(id_, title, caption) for id_, title, caption, _, _ in PLOTS]
ALL_PLOTS: list[pages.Plotted] = [(id_, title, caption) for id_, title, caption, _, _ in compare_plots.PLOTS]
GET = ("GET",)
URLS = Map(
    [
        Rule("/", endpoint="overview", methods=GET),
        Rule("/favicon.ico", endpoint="icon", methods=GET),
        Rule("/page.css", endpoint="css", methods=GET),
        Rule("/page.js", endpoint="js", methods=GET),
        Rule("/compare", endpoint="compare", methods=GET),
        Rule("/compare/<name>", endpoint="compare_plot", methods=GET),
        Rule("/run/<key>", endpoint="run", methods=GET),
        Rule("/run/<key>/plot/<name>", endpoint="plot", methods=GET),
        Rule("/run/<key>/rollouts", endpoint="rollouts", methods=GET),
        Rule("/run/<key>/rollouts/<int:index>", endpoint="rollout", methods=GET),
    ]
)


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


class App:
    """A WSGI application over run folders. secret: what a visitor must show, in the address or a cookie."""

    def __init__(self, watched: Watched, secret: str, cookie: str = "genac-watch") -> None:
        self.watched, self.secret, self.cookie = watched, secret, cookie
        self._style, self._script = STYLE + _file("page.css"), _file("page.js")
        self._drawing = threading.Lock()  # matplotlib's settings are one for all threads
        self._drawn: dict[Any, tuple[str, bytes | None]] = {}
        self._drew = 0.0  # seconds, since a version was shown last
        self._versions: dict[str, tuple[str, float]] = {}  # by run: what its plots are of, and until when
        self._summaries: dict[str, tuple[str, dict[str, Any]]] = {}

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        response = self._answered(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers.setdefault("Cache-Control", "no-store")
        answered: Iterable[bytes] = response(environ, start_response)
        return answered

    def _answered(self, request: Request) -> Any:
        try:
            endpoint, values = URLS.bind_to_environ(request.environ).match(method=request.method)
            if (refused := self._admitted(request)) is not None:
                return refused
            handler: Callable[..., Response] = getattr(self, f"_{endpoint}")
            return handler(request, **values)
        except HTTPException as error:
            return error.get_response(request.environ)
        except (GenacError, OSError) as error:
            return _page(
                "cannot be shown", f"<h1>This cannot be shown</h1><pre>{escape(str(error))}</pre>", 500
            )

    def _admitted(self, request: Request) -> Any:
        """None for a visitor who has shown the secret; else what to answer."""
        if _same(request.cookies.get(self.cookie, ""), self.secret):
            return None
        if not _same(request.args.get("key", ""), self.secret):
            text = "This page needs the address with the key that `genac watch` has printed.\n"
            return Response(text, status=403, mimetype="text/plain")
        response = redirect(request.path)
        response.set_cookie(self.cookie, self.secret, httponly=True, samesite="Lax")
        return response

    # --- pages -----------------------------------------------------------------------------------

    def _overview(self, request: Request) -> Any:
        runs = self.watched.runs()
        if len(runs) == 1 and not self.watched.waiting() and "part" not in request.args:
            return redirect(pages.run_address(next(iter(runs))))
        cards = (self._card(run, linked=True) for run in runs.values())
        waiting = [str(path) for path in self.watched.waiting()]
        return _page("runs", pages.overview(cards, waiting), places=self._places("/"))

    def _run(self, request: Request, key: str) -> Response:
        run, data = self._of(key)
        summary = self._summary(run, data)
        part = request.args.get("part")
        if part == "live":
            return _part(pages.part("live", "", self._card(run, linked=False)))
        version = self._version(run)
        figures = pages.run_figures(run, data, summary, OWN_PLOTS, version)
        if part == "figures":
            return _part(pages.part("figures", version, figures))
        body = pages.run_page(run, data, summary, self._card(run, linked=False), figures, version)
        return _page(key, body, places=self._places(pages.run_address(key), key))

    def _rollouts(self, request: Request, key: str) -> Response:
        run, _ = self._of(key)
        query = Query.read(request.args)
        below = request.args.get("below", type=int)
        found = []
        for one in search(run, query, below):
            found.append(one)
            if len(found) > pages.PER_PAGE:
                break
        shown = found[: pages.PER_PAGE]
        more = shown[-1][0] if len(found) > pages.PER_PAGE else None
        body = pages.rollouts_page(run, query, shown, more, run.rollouts())
        here = pages.run_address(key, "rollouts")
        return _page(f"{key}: rollouts", body, places=self._places(here, key))

    def _rollout(self, request: Request, key: str, index: int) -> Response:
        run, _ = self._of(key)
        briefs = run.rollouts()
        row = run.rollout(briefs[index]) if index < len(briefs) else None
        if row is None:
            raise NotFound("There is no such rollout.")
        body = f"<h1>{escape(key)}: a rollout</h1>{conversation(row, index)}"
        return _page(f"{key}: a rollout", body, places=self._places("", key))

    def _compare(self, request: Request) -> Response:
        asked = self._asked(request)
        runs = asked[:MOST_RUNS]
        made, why = self._comparison(runs)
        if made is not None and len(asked) > len(runs):
            made.notes.append(f"{len(runs)} of {len(asked)} runs are compared; choose above.")
        version = "+".join(map(self._version, runs))
        if request.args.get("part") == "figures" and made is not None:
            body = pages.comparison_part(made, runs, OWN_PLOTS, ALL_PLOTS, version)
            return _part(pages.part("figures", version, body))
        body = pages.compare_page(made, why, runs, list(self.watched.runs()), OWN_PLOTS, ALL_PLOTS, version)
        return _page("compare", body, places=self._places("/compare"))

    # --- pictures and files ----------------------------------------------------------------------

    def _plot(self, request: Request, key: str, name: str) -> Response:
        run, data = self._of(key)
        id_, theme = _image_of(name)
        known = {plot[0]: (plot[3], plot[4]) for plot in PLOTS}
        if id_ not in known:
            raise NotFound("There is no such plot.")
        height, draw = known[id_]
        return self._picture((key, name), self._version(run), lambda: png(draw, data, theme, height))

    def _compare_plot(self, request: Request, name: str) -> Response:
        runs = self._asked(request)[:MOST_RUNS]
        id_, theme = _image_of(name)
        made, _ = self._comparison(runs)
        if made is None or id_ not in {plot[0] for plot in ALL_PLOTS}:
            raise NotFound("There is no such plot.")
        found = made
        version = "+".join(map(self._version, runs))
        place = (*(run.key for run in runs), name)
        return self._picture(place, version, lambda: compare_plots.draw(found, id_, theme))

    def _picture(self, place: Any, version: str, draw: Callable[[], bytes | None]) -> Response:
        """A plot, drawn anew where it is of another version."""
        with self._drawing:
            had, image = self._drawn.get(place, ("", None))
            if had != version:
                began = time.monotonic()
                image = draw()
                self._drawn[place] = version, image
                self._drew += time.monotonic() - began
        if image is None:
            raise NotFound("The run has no data for this plot yet.")
        return Response(image, mimetype="image/png")

    def _icon(self, request: Request) -> Response:
        return Response(status=204)

    def _css(self, request: Request) -> Response:
        return Response(self._style, mimetype="text/css")

    def _js(self, request: Request) -> Response:
        return Response(self._script, mimetype="text/javascript")

    # --- what they are made of -------------------------------------------------------------------

    def _of(self, key: str) -> tuple[Followed, RunData]:
        run = self.watched.runs().get(key)
        if run is None:
            raise NotFound("No such run is watched.")
        data = run.data()
        if data is None:
            raise GenacError(run.error)
        return run, data

    def _version(self, run: Followed) -> str:
        """What a run's plots are shown of: its version, but not every one while it goes on."""
        with self._drawing:
            shown, until = self._versions.get(run.key, ("", -1e9))
            now, version = time.monotonic(), run.version
            if version != shown and now >= until:
                self._versions[run.key] = version, now + max(REDRAW_S, TIMES * self._drew)
                self._drew = 0.0
            return self._versions.get(run.key, ("",))[0]

    def _summary(self, run: Followed, data: RunData) -> dict[str, Any]:
        version = run.version
        had, summary = self._summaries.get(run.key, ("", {}))
        if had != version:
            summary = jsonable({**summarise(data), **suite_summary(data)})
            self._summaries[run.key] = version, summary
        return summary

    def _card(self, run: Followed, *, linked: bool) -> str:
        data = run.data()
        if data is None:
            return pages.run_card(run, None, (), linked=linked)
        return pages.run_card(run, standing(data), latest(data), linked=linked)

    def _asked(self, request: Request) -> list[Followed]:
        """The runs that are asked for to be compared; all where none is."""
        runs = self.watched.runs()
        asked = [key for key in dict.fromkeys(request.args.getlist("run")) if key in runs]
        return [runs[key] for key in asked or runs]

    def _comparison(self, runs: Sequence[Followed]) -> tuple[Comparison | None, str]:
        found = [(run, run.data()) for run in runs]
        known = [(run.key, data) for run, data in found if data is not None]
        if len(known) < 2 or len(known) < len(found):
            errors = "; ".join(run.error for run, data in found if data is None)
            return None, errors or "Two runs or more can be compared."
        return Comparison([key for key, _ in known], [data for _, data in known]), ""

    def _places(self, here: str, key: str | None = None) -> list[tuple[str, str, bool]]:
        runs = self.watched.runs()
        places = [("/", "Runs")] if len(runs) != 1 else []
        if len(runs) > 1:
            places.append(("/compare", "Compare"))
        if key is not None:
            places += [(pages.run_address(key), key), (pages.run_address(key, "rollouts"), "Rollouts")]
        return [(address, words, address == here) for address, words in places]


def latest(run: RunData) -> list[tuple[str, str]]:
    """The figures that a person looks at first, as they are now."""
    found: list[tuple[str, str]] = []
    if run.acted():
        found.append(("held-out accuracy", text_of(run.acted()[-1]["actor"].get("accuracy"), per_cent=True)))
    rewards = run.series("rollout/outcome_mean")[1][-RECENT:]
    if rewards.size:
        found.append(("training reward", text_of(float(rewards.mean()), per_cent=True)))
    if run.judged():
        critic = run.judged()[-1]["critic"]
        own, base = (number(critic.get(name)) for name in ("brier", "brier_constant"))
        found.append(("critic's Brier", f"{text_of(own, 4)}, best constant {text_of(base, 4)}"))
    return found


def _image_of(name: str) -> tuple[str, Theme]:
    """Of an image's name: the plot and the colours."""
    id_, _, theme = name.removesuffix(".png").rpartition("-")
    if theme not in THEMES or not name.endswith(".png"):
        raise NotFound("There is no such picture.")
    return id_, THEMES[theme]


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _page(title: str, body: str, status: int = 200, places: Sequence[tuple[str, str, bool]] = ()) -> Response:
    return Response(pages.document(title, body, places=places), status=status, mimetype="text/html")


def _part(body: str) -> Response:
    return Response(body, mimetype="text/html")
