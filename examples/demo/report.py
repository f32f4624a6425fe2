"""The report of a demo: everything as JSON, and one HTML page that needs nothing but itself."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from examples.demo.plot import Line, Plot, svg
from examples.demo.results import Burst, Episode, Moment, Summary, burst_of, comparison, moment, summarise

ELASTIC, HELD = "elastic", "held"
NAMES = {ELASTIC: "with the activation budget", HELD: "budget held at full"}

ROWS: Sequence[tuple[str, Callable[[Summary], str]]] = (
    ("requests", lambda s: f"{s.requests}"),
    ("failed", lambda s: f"{s.failed}"),
    ("connections tried again before any byte", lambda s: f"{s.retries}"),
    ("attainment: share that met both objectives", lambda s: _number(s.attainment, "{:.1%}")),
    ("time to first token, p50", lambda s: _number(s.ttft_p50_s, "{:.2f} s")),
    ("time to first token, p95", lambda s: _number(s.ttft_p95_s, "{:.2f} s")),
    ("time per output token, p50", lambda s: _number(s.tpot_p50_s, "{:.3f} s")),
    ("time per output token, p95", lambda s: _number(s.tpot_p95_s, "{:.3f} s")),
    ("mean relative quality, token-weighted", lambda s: _number(s.mean_relative_quality, "{:.4f}")),
    ("lowest activation budget of a pod", lambda s: "–" if s.lowest_budget is None else f"{s.lowest_budget / 10:g} %"),
    ("onset of the burst to the first lower point", lambda s: _number(s.onset_to_lower_s, "{:.1f} s")),
    ("onset of the burst to the second ready replica", lambda s: _number(s.onset_to_second_ready_s, "{:.1f} s")),
    ("end of the burst to all pods back at full", lambda s: _number(s.return_to_full_s, "{:.1f} s")),
    ("directive to acknowledgement, p99", lambda s: _number(s.ack_p99_s, "{:.3f} s")),
    ("lag: busy time by which steps missed their pace", lambda s: _number(s.lag_share, "{:.1%}")),
    ("most ready replicas", lambda s: f"{s.most_ready}"),
    ("replica-seconds", lambda s: f"{s.replica_seconds:.0f}"),
)

STYLE = """
:root { --ink: #1d2733; --soft: #5b6875; --rule: #dde3e8; --a: #0b6e99; --b: #c2571a; --shade: #f4e9c8; --page: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b3; --rule: #2c3742; --a: #54b8e6;
  --b: #f0935a; --shade: #3a3420; --page: #14191f } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 820px;
  margin: 2.5rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .3rem }
p.verdict { font-size: 1.15rem; border-left: 4px solid var(--a); padding: .2rem 0 .2rem .9rem; margin: 1.2rem 0 }
p, li { color: var(--ink) } .soft { color: var(--soft) }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--rule) }
th:first-child, td:first-child { text-align: left } thead th { font-weight: 600 }
th.elastic, .key.elastic { color: var(--a) } th.held, .key.held { color: var(--b) }
svg { width: 100%; height: auto } .grid { stroke: var(--rule) } .tick, .axis { fill: var(--soft); font-size: 12px }
polyline { fill: none; stroke-width: 2 } polyline.elastic { stroke: var(--a) } polyline.held { stroke: var(--b) }
polyline.dashed { stroke-dasharray: 5 4 } polyline.load { stroke: var(--ink) } .burst { fill: var(--shade) }
.burst-label, .limit-label { fill: var(--soft); font-size: 11px } .limit { stroke: var(--soft); stroke-dasharray: 2 3 }
.key { font-weight: 600; margin-right: 1.2rem } .key::before { content: "\\2501\\2501 " }
.key.dashed::before { content: "\\2504\\2504 " }
"""


def as_document(episodes: Mapping[str, Episode], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Figures, time series and the circumstances of a demo as one JSON-ready document."""
    summaries = {name: summarise(episode) for name, episode in episodes.items()}
    elastic, held = summaries.get(ELASTIC), summaries.get(HELD)
    return {
        "comparison": comparison(elastic, held) if elastic and held else None,
        "facts": dict(facts),
        "summaries": {name: asdict(summary) for name, summary in summaries.items()},
        "series": {name: [asdict(each) for each in series(episode)] for name, episode in episodes.items()},
        "answers": {name: [asdict(answer) for answer in episode.answers] for name, episode in episodes.items()},
    }


def series(episode: Episode) -> list[Moment]:
    """Every whole second from the start to the last record."""
    ends = [*(a.end_s for a in episode.answers), *(s.at_s for s in episode.samples)]
    return [moment(episode, float(second)) for second in range(int(max(ends, default=0.0)) + 1)]


def as_page(episodes: Mapping[str, Episode], facts: Mapping[str, Any], not_shown: Sequence[str]) -> str:
    """The HTML page. `facts` are printed as they are; `not_shown` says what the demo does not prove."""
    summaries = {name: summarise(episode) for name, episode in episodes.items()}
    elastic, held = summaries.get(ELASTIC), summaries.get(HELD)
    verdict = comparison(elastic, held) if elastic and held else "One replay only: nothing to compare."
    keys = "".join(f'<span class="key {name}">{escape(NAMES[name])}</span>' for name in episodes)
    facts_list = "".join(f"<li>{escape(name)}: {escape(str(value))}</li>" for name, value in facts.items())
    limits = "".join(f"<li>{escape(text)}</li>" for text in not_shown)
    pictures = "".join(f"<h2>{escape(plot.title)}</h2>{svg(plot)}" for plot in plots(episodes))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>MoE-Prism demo</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>MoE-Prism: the same burst twice</h1>"
        f'<p class="verdict">{escape(verdict)}</p>{_table(summaries)}'
        f'<h2>Over time</h2><p>{keys}<span class="key dashed">replicas desired</span></p>'
        f"{pictures}<h2>How it was measured</h2><ul>{facts_list}</ul>"
        f"<h2>What this does not show</h2><ul>{limits}</ul></body></html>"
    )


def _table(summaries: Mapping[str, Summary]) -> str:
    head = "".join(f'<th class="{name}">{escape(NAMES[name])}</th>' for name in summaries)
    body = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td>{escape(show(s))}</td>' for s in summaries.values())}</tr>"
        for label, show in ROWS
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def plots(episodes: Mapping[str, Episode]) -> list[Plot]:
    """The live table's quantities over time, both replays in one picture each."""
    runs = {name: series(episode) for name, episode in episodes.items()}
    any_episode = next(iter(episodes.values()))
    x_max = max([1.0, *(each[-1].at_s for each in runs.values())])
    burst = burst_of(any_episode.arrivals_s)
    objectives = any_episode.objectives

    def picture(title: str, y_label: str, lines: Sequence[Line], **options: Any) -> Plot:
        return Plot(title, y_label, lines, x_max, shaded=_span(burst), **options)

    def lines(of: Callable[[Moment], float | None], *, step: bool = False, style: str = "") -> list[Line]:
        return [
            Line(NAMES[name], f"{name}{style}", [(m.at_s, of(m)) for m in moments], step)
            for name, moments in runs.items()
        ]

    def lowest_budget(moment: Moment) -> float | None:
        known = [any_episode.ladder.budget[p] for p in moment.points.values() if p in any_episode.ladder.budget]
        return min(known) / 10 if known else None

    arrivals = Line("arrivals", "load", [(m.at_s, m.arrivals_per_s) for m in next(iter(runs.values()))])
    replicas = [*lines(lambda m: m.ready, step=True), *lines(lambda m: m.desired, step=True, style=" dashed")]
    return [
        picture("Arrivals", "requests/s", [arrivals]),
        picture("Lowest activation budget of a pod", "budget, %", lines(lowest_budget, step=True), ceiling=100),
        picture("Replicas: ready (solid), desired (dashed)", "replicas", replicas, ceiling=3),
        picture("Requests that wait for a first token", "requests", lines(lambda m: m.waiting)),
        picture(
            "Time to first token, p95 of the last 5 s",
            "s",
            lines(lambda m: m.ttft_p95_s),
            limit=_limit(objectives.ttft_s),
        ),
        picture(
            "Time per output token, p95 of the last 5 s",
            "s",
            lines(lambda m: m.tpot_p95_s),
            limit=_limit(objectives.tpot_s),
        ),
        picture("Attainment since the start", "%", lines(_attainment_percent), ceiling=100),
        picture("Cost of all pods", "$/h", lines(lambda m: m.per_hour, step=True)),
    ]


def _attainment_percent(moment: Moment) -> float | None:
    return None if moment.attainment is None else 100 * moment.attainment


def _span(burst: Burst | None) -> tuple[float, float] | None:
    return None if burst is None else (burst.onset_s, burst.end_s)


def _limit(objective_s: float | None) -> tuple[float, str] | None:
    return None if objective_s is None else (objective_s, f"objective {objective_s:g} s")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def write(folder: Path, episodes: Mapping[str, Episode], facts: Mapping[str, Any], not_shown: Sequence[str]) -> Path:
    """Write report.json and report.html; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(as_document(episodes, facts), indent=1) + "\n")
    page = folder / "report.html"
    page.write_text(as_page(episodes, facts, not_shown))
    return page
