"""The command, from files to a table, JSON and a page; and the study behind it."""

import json
from pathlib import Path

import pytest

from prism_operator.simulate import cli, ramp
from prism_operator.simulate.policies import POLICIES
from prism_operator.simulate.score import changes, flaps, quantiles
from prism_operator.simulate.study import interval
from prism_operator.simulate.world import World

ROOT = Path(__file__).parents[2]
EXAMPLE = [
    "--trace",
    str(ROOT / "examples/traces/azure2023_code_burst_fast.csv"),
    "--service",
    str(ROOT / "examples/prismservice.yaml"),
    "--model",
    str(ROOT / "examples/prismmodel.yaml"),
    "--profile",
    str(ROOT / "runtime/prism_runtime/profiles/demo.json"),
    "--start-seconds",
    "20",
]


def test_every_policy_plays_the_example_and_every_output_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    assert cli.main([*EXAMPLE, "--all", "--seeds", "1", *files]) == 0
    table = capsys.readouterr().out
    document = json.loads((tmp_path / "out.json").read_text())
    html = (tmp_path / "out.html").read_text()
    for name in POLICIES:
        assert name in table
        assert name in document["mean_low_high"]
        assert f"<h3>{name}</h3>" in html
    assert {run["requests"] for run in document["runs"]} == {105}
    assert "http" not in html.replace("http://www.w3.org", ""), "the page needs nothing from elsewhere"


def with_(flag: str, value: str) -> list[str]:
    """The example's arguments with another value of one flag, or with one flag more."""
    if flag not in EXAMPLE:
        return [*EXAMPLE, flag, value]
    place = EXAMPLE.index(flag) + 1
    return [*EXAMPLE[:place], value, *EXAMPLE[place + 1 :]]


def of_service(folder: Path, name: str) -> list[str]:
    """The example under another name, with its trace."""
    text = (ROOT / "examples/prismservice.yaml").read_text().replace("name: chat\n", f"name: {name}\n", 1)
    (folder / f"{name}.yaml").write_text(text)
    return ["--service", str(folder / f"{name}.yaml"), "--trace", EXAMPLE[1]]


def test_services_that_share_accelerators_are_played_together_and_stay_within_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [*of_service(tmp_path, "chat"), *of_service(tmp_path, "code"), *EXAMPLE[4:]]
    files = ["--json", str(tmp_path / "out.json"), "--html", str(tmp_path / "out.html")]
    most = []
    for cap in (["--max-accelerators", "3"], []):
        assert cli.main([*both, *cap, *files, "--seeds", "1", "--factor", "3"]) == 0
        table = capsys.readouterr().out
        assert "demo/chat" in table
        assert "demo/code" in table
        document = json.loads((tmp_path / "out.json").read_text())
        assert {run["requests"] for runs in document["services"].values() for run in runs} == {3 * 105}
        most.append(document["of"]["most_accelerators"])
        html = (tmp_path / "out.html").read_text()
        assert ("dashed: the cap" in html) is bool(cap)
        assert [f"<h3>demo/{name}</h3>" in html for name in ("chat", "code")] == [True, True]
        assert html.count("<polygon") == 2, "one area for each service"
    assert most[0] <= 3 < most[1], "without the cap they would have taken more"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--service", EXAMPLE[3]], "--service is given 2 times and --trace 1 times"),
        (["--service", EXAMPLE[3], "--trace", EXAMPLE[1]], "the same PrismService, demo/chat"),
        (["--profile", EXAMPLE[7], "--profile", EXAMPLE[7]], "once for each of the 1 services"),
        (["--max-accelerators", "4", "--all"], "simulate each service by itself"),
    ],
)
def test_services_that_cannot_be_played_together_say_why(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main([*EXAMPLE, *arguments])
    assert said in capsys.readouterr().err


def test_the_help_names_every_policy_and_profile(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    told = capsys.readouterr().out
    for name in (*POLICIES, *cli.shipped()):
        assert name in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (with_("--profile", "no-such"), "known names: cpu-small-moe, h100-olmoe"),
        (with_("--profile", "l4-olmoe"), "--speed-up"),
        (with_("--trace", "nowhere.csv"), "cannot be read"),
        (with_("--model", str(ROOT / "examples/prismservice.yaml")), "no PrismModel 'small-moe'"),
    ],
)
def test_input_that_cannot_be_simulated_is_refused_with_what_would_work(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_profile_of_full_alone_gets_the_models_points_by_a_speed_up() -> None:
    fitted = cli.fitted(cli.load_profile("l4-olmoe"), ramp.model(), 2.0)
    steps = [fitted.points[name].step_seconds(8, 1000, 100) for name in ramp.model().ladder.names]
    assert steps == sorted(steps)
    assert steps[-1] / steps[0] == pytest.approx(2.0, rel=1e-4)


def test_flags_about_the_pool_change_the_world_that_is_played() -> None:
    def world(*flags: str) -> World:
        return cli.members(cli.parser().parse_args([*EXAMPLE, *flags]))[0].study.world

    assert world() == World()
    channel = world("--report-lag", "3", "--report-loss", "0.1", "--never-ready", "0.2", "--crashes-per-hour", "4")
    assert channel == World(report_lag_s=3.0, report_loss=0.1, never_ready=0.2, crashes_per_hour=4.0)
    pods = world("--routing", "random", "--order", "deadline", "--governors")
    assert pods == World(random_routing=True, by_deadline=True, governors=True)


def test_shipped_profiles_say_whether_they_are_estimates() -> None:
    for name in cli.shipped():
        said = "measured on" if name.startswith("cpu") else "ESTIMATE, measured on nothing"
        assert cli.load_profile(name).provenance.startswith(said), name


def test_shipped_measurement_prices_every_point_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--profile", "cpu-small-moe", "--longest-prompt", "256", "--longest-output", "64", "--seeds", "1"]
    assert cli.main([*EXAMPLE[:6], *short]) == 0
    assert "prism" in capsys.readouterr().out


def test_flaps_are_turns_within_the_time() -> None:
    series = [(0.0, 3), (10.0, 2), (50.0, 3), (100.0, 4), (200.0, 3)]
    assert changes(series) == [(10.0, -1), (50.0, 1), (100.0, 1), (200.0, -1)]
    assert flaps(changes(series), 60.0) == 1
    assert flaps(changes(series), 100.0) == 2


def test_quantiles_and_intervals_of_few_values() -> None:
    assert quantiles([]) == (None, None, None)
    assert quantiles([1.0, 2.0, 3.0, 4.0]) == (2.0, 4.0, 4.0)
    assert interval([5.0]) == (5.0, 5.0, 5.0)
    mean, low, high = interval([1.0, 2.0, 3.0])
    assert (mean, round(high - low, 3)) == (2.0, 4.969)
