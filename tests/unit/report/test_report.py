"""A report is one page that asks nobody for anything, says what a run's folder holds, and what it lacks."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdit.cli.report import main
from sdit.errors import ExitCode
from sdit.report import build_page, read_runs
from sdit.report.elements import Chart, Text
from sdit.report.figures import BOTTOM, HEIGHT, TOP, Mark, Series, heat_map, line_chart, thin
from sdit.report.images import file_uri
from sdit.report.speed import time_by_task
from sdit.report.values import curve, seconds, short
from tests.unit.report.report_run import record, write_folder

SECTIONS = ["loss", "samples", "speed", "experts", "faults", "checkpoints", "topology", "config", "environment"]
VOID = {"img", "meta", "br"}
TEXT_DROP = 3.8  # of a tick's text below its line


class Page(HTMLParser):
    """What a page is made of; complains of elements that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(name)
        if name not in VOID:
            self.open.append(name)
        for key, value in attributes:
            if key == "id":
                self.ids.append(str(value))
            if key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
                self.addresses.append(str(value))

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        if name not in VOID:
            self.open.pop()

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "first")


def page_of(*folders: Path) -> Page:
    return Page(build_page(read_runs(folders)))


def test_a_page_has_every_section_and_asks_nobody_for_anything(folder: Path) -> None:
    text = build_page(read_runs([folder]))
    page = Page(text)
    assert [name for name in page.ids if name != "summary"] == SECTIONS
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert len(text.encode()) < 5_000_000
    assert "Not in this report" not in page.words


def test_figures_are_those_of_the_files(folder: Path) -> None:
    words = page_of(folder).words
    for fact in (
        "960",
        "of 960",
        "1 skipped step",
        "killed by SIGKILL",
        "0.25 s",
        "16 = 2 ranks x 8 images",
        "shared by ranks 0 to 1",
        "torch",
    ):
        assert fact in words
    assert re.search(r"restarts\s*1", words)
    assert re.search(r"2026-03-01 03:04\s*20\s*skipped step", words)


def test_runs_are_shown_side_by_side(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "second", "dit")
    page = page_of(folder, other)
    assert [name for name in page.ids if name != "summary"] == SECTIONS
    assert "2 runs side by side" in page.words and "Keys that differ between the runs" in page.words
    assert page.words.count("second") > 5
    same_name = shutil.copytree(folder, tmp_path / "copy" / "first")
    assert [run.name for run in read_runs([folder, same_name])] == [f"{tmp_path.name}/first", "copy/first"]


TOKEN_TITLES = (
    "Most loaded token-routed expert", "Router entropy", "Dropped tokens", "Balance loss",
    "Load of token-routed experts over training", "Load by timestep, now", "Load over the image, now",
    "Loads by timestep and over the image",
)  # fmt: skip


def test_token_routed_experts_have_a_section(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "moe", "dit", has_moe=True)
    page = page_of(folder)
    assert "token-experts" in page.ids and all(title in page.words for title in TOKEN_TITLES)
    assert "4 token-routed experts in a block" in page.words and "Not in this report" not in page.words
    (folder / "routing" / "tokens-000000000640.npz").write_bytes(b"torn")
    words = page_of(folder).words
    assert "routing/tokens-000000000640.npz: not a map of token-routed experts" in words
    assert all(title in words for title in TOKEN_TITLES)
    shutil.rmtree(folder / "routing")
    words = page_of(folder).words
    assert "routing/: no maps of token-routed experts" in words and "Load by timestep, now" not in words


def test_runs_with_and_without_token_routed_experts_are_shown_side_by_side(folder: Path, tmp_path: Path) -> None:
    alone = page_of(folder)
    assert "token-experts" not in alone.ids and not [title for title in TOKEN_TITLES if title in alone.words]
    both = write_folder(tmp_path / "both", "switch", has_moe=True)
    page = page_of(folder, both, write_folder(tmp_path / "dense", "dit"))
    assert [name for name in page.ids if name != "summary"] == [*SECTIONS[:4], "token-experts", *SECTIONS[4:]]
    assert page.words.count("Load by timestep, now") == 1  # only the run that has them


FILES = [
    "config.yaml", "environment.json", "deepspeed.json", "metrics.jsonl", "events.jsonl", "logs/attempts.jsonl", "samples/*",
    "routing/*", "checkpoints/images-000000000640/manifest.json",
]  # fmt: skip
DAMAGES = ("missing", "empty", "torn", "binary", "other")


@pytest.mark.parametrize(
    ("name", "damage"),
    [  # one or two damages of each file; the others are slow
        pytest.param(name, damage, marks=[pytest.mark.slow] if (number + place) % 3 else [])
        for number, name in enumerate(FILES)
        for place, damage in enumerate(DAMAGES)
    ],
)
def test_what_is_missing_or_torn_is_named_and_the_rest_is_shown(folder: Path, name: str, damage: str) -> None:
    for path in list(folder.glob(name)):
        body = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            others = {
                "empty": b"",
                "torn": body[: len(body) * 2 // 3],
                "binary": bytes(range(256)),
                "other": b'[1, "x"]',
            }
            path.write_bytes(others[damage])
    page = page_of(folder)
    assert "summary" in page.ids and "sdit training report" in page.words
    harmless = name.startswith("checkpoints") and damage != "missing"  # only its presence and size are looked at
    harmless |= name == "config.yaml" and damage == "torn"  # YAML that is cut may be YAML
    harmless |= name == "logs/attempts.jsonl" and damage == "missing"  # a run without a supervisor has none
    assert ("Not in this report" in page.words) or harmless


def test_values_of_wrong_types_do_not_break_the_page(folder: Path) -> None:
    odd: list[object] = [None, "text", [], {}, [[1], [2, 3]], float("nan"), float("inf"), True, -1, [None], {"a": [1]}]
    lines = [
        json.dumps({**dict.fromkeys(record(1), value), "images_seen": 16 * place}) for place, value in enumerate(odd)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "events.jsonl").write_text(
        "\n".join(json.dumps({"event": value, "text": value, "step": value}) for value in odd)
    )
    (folder / "logs" / "attempts.jsonl").write_text(
        "\n".join(json.dumps({"text": value, "restart": value}) for value in odd)
    )
    (folder / "environment.json").write_text(json.dumps({"ranks": "two", "packages": [], "command": {"a": 1}}))
    assert "Environment" in page_of(folder).words


def test_a_run_that_has_just_started_has_a_report(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    words = page_of(folder).words
    assert "no steps logged" not in words  # the badge is for several runs
    assert "metrics.jsonl: empty" in words and "config.yaml: missing" in words


def test_texts_of_a_run_cannot_become_markup(folder: Path, tmp_path: Path) -> None:
    evil = '<img src="http://x.invalid/a.png" onerror=alert(1)>'
    renamed = folder.rename(tmp_path / "<b onclick=x>&amp;")
    with (renamed / "events.jsonl").open("a") as file:
        file.write(json.dumps({"images_seen": 700, "step": 44, "event": evil, "text": evil}) + "\n")
        file.write(json.dumps({"images_seen": 700, "step": 44, "event": "loss_spike", "text": evil}) + "\n")
    (renamed / "environment.json").write_text(json.dumps({evil: evil, "command": [evil], "ranks": 2, "device": evil}))
    text = build_page(read_runs([renamed]))
    page = Page(text)
    assert evil in page.words and "<b onclick=x>&amp;" in page.words
    assert not re.search(r"<(img|b)[^>]*(onerror|onclick)", text)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)


def test_secrets_of_a_command_stay_out(folder: Path) -> None:
    (folder / "environment.json").write_text(json.dumps({"command": ["train.py", "HF_TOKEN=hf_abcdefgh"]}))
    assert "hf_abcdefgh" not in build_page(read_runs([folder]))


def test_many_large_images_still_make_a_small_page(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 900, 3), dtype=np.uint8)
    for images in range(0, 800, 100):
        Image.fromarray(noise).save(folder / "samples" / f"images-{images:012d}.png", compress_level=1)
    assert len(build_page(read_runs([folder])).encode()) < 5_000_000
    uri = file_uri(folder / "samples" / "images-000000000000.png", 50_000)
    assert uri is not None and len(uri) < 50_000 * 4 / 3 + 100


def test_the_time_split_adds_up_to_the_time(folder: Path) -> None:
    (run,) = read_runs([folder])
    spent = [step["spent_since_logged"] for step in run.metrics]
    total = sum(part["step_seconds"] + part["checkpoint_seconds"] for part in spent)
    assert sum(amount for _, amount, _ in time_by_task(run)) == pytest.approx(total)


def test_command_writes_the_page_or_says_why_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == ExitCode.DONE
    assert (folder / "report.html").exists() and not list(folder.glob(".partial-*"))
    (folder / "events.jsonl").unlink()
    assert main([str(folder), str(folder), "--out", str(tmp_path / "new" / "both.html")]) == ExitCode.DONE
    assert "events.jsonl: missing" in capsys.readouterr().err
    for words, code in (
        ([str(tmp_path / "nothing")], ExitCode.CONFIG),
        ([str(tmp_path / "new")], ExitCode.CONFIG),
        ([str(folder), "--out", str(folder / "metrics.jsonl" / "x.html")], ExitCode.IO),
    ):
        assert main(words) == code
        assert len(capsys.readouterr().err.splitlines()) <= 2
    for words in ([], [str(folder), str(folder)], [str(folder), "--out", "page.txt"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == ExitCode.USAGE


def test_curves_are_thinned_without_losing_their_ends_or_their_level() -> None:
    xs = list(map(float, range(10_000)))
    ys = [2.0 + (-1) ** number for number in range(10_000)]
    thin_x, thin_y = thin(xs, ys, 100)
    assert len(thin_x) == len(thin_y) <= 100
    assert thin_x[-1] == xs[-1] and thin_y[-1] == ys[-1]
    assert np.mean(thin_y[:-1]) == pytest.approx(2.0, abs=0.05)
    assert thin(xs, [3.0] * len(xs), 40)[1] == pytest.approx([3.0] * 40)


def test_curves_hold_only_finite_numbers() -> None:
    records = [
        {"images_seen": place, "a": value} for place, value in enumerate([1, None, float("nan"), "x", True, 2.5])
    ]
    assert curve(records, "a") == ([0.0, 5.0], [1.0, 2.5])
    nested = [{"images_seen": place, "a": value} for place, value in enumerate([{"b": 3}, {"b": None}, None, [4]])]
    assert curve(nested, "a.b") == ([0.0], [3.0])


class Drawn:
    """The tick texts and heights of a chart over y from `low` to `high`, as they are in its SVG."""

    def __init__(self, low: float, high: float, log_y: bool) -> None:
        chart = line_chart([Series("a", [0.0, 1.0], [low, high], "c0")], "y", log_y=log_y)
        assert isinstance(chart, Chart)
        found = re.findall(r'text-anchor: end[^>]* y="([^"]*)"[^>]*>([^<]*)<', chart.svg)
        self.texts, self.heights = [text for _, text in found], [float(height) for height, _ in found]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 153_600), (-3.2, 7.9), (0.98, 1.02), (0, 0), (1e-9, 3e-9)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    drawn = Drawn(low, high, log_y=False)
    assert 1 <= len(drawn.texts) <= 11 and len(set(drawn.texts)) == len(drawn.texts)
    assert all(TOP <= height - TEXT_DROP <= HEIGHT - BOTTOM + 0.1 for height in drawn.heights)


@pytest.mark.parametrize(("low", "high"), [(0.01, 3), (0.12, 0.19), (1e-6, 1e6), (0.9, 1.1)])
def test_log_ticks_are_few_and_inside(low: float, high: float) -> None:
    drawn = Drawn(low, high, log_y=True)
    assert 2 <= len(drawn.texts) <= 14 and len(set(drawn.texts)) == len(drawn.texts)
    assert all(TOP <= height - TEXT_DROP <= HEIGHT - BOTTOM + 0.1 for height in drawn.heights)


def test_numbers_are_short() -> None:
    values = (0, 12, 153_600, 1e6, 0.00004, 0.00025, 0.25)
    assert [short(value) for value in values] == ["0", "12", "153.6k", "1M", "4e-5", "2.5e-4", "0.25"]
    assert [seconds(value) for value in (0.5, 200, 7500)] == ["0.5 s", "3 min 20 s", "2 h 05 min"]


def test_a_chart_of_one_point_or_none_is_a_chart() -> None:
    one = line_chart([Series("a", [1.0], [2.0], "c0")], "y", log_y=True)
    assert isinstance(one, Chart) and "stroke: var(--c0); stroke-width: 6; stroke-linecap: round" in one.svg
    none = line_chart([Series("a", [], [], "c0"), Series("b", [1.0], [-1.0], "c1")], "y", log_y=True)
    assert none == Text("no values", "empty")


def test_figures_take_colours_and_fonts_from_the_page_and_have_no_ids() -> None:
    marks = [Mark(1.0, "restart", "<b> & 'x' #fe0001")]
    chart = line_chart([Series("a", [0.0, 2.0], [1.0, 2.0], "c3")], "loss", marks=marks)
    image = heat_map(np.zeros((4, 5, 3), dtype=np.uint8), "x", "y", (0, 4), (0, 3), ("0", "magma", "1"))
    assert isinstance(chart, Chart) and ">loss<" in chart.svg and "var(--c3)" in chart.svg
    assert "<title>&lt;b&gt; &amp; 'x' #fe0001</title>" in chart.svg and chart.legend == [("restart", "bad")]
    for svg in (chart.svg.replace("#fe0001<", ""), image.svg):
        assert not re.search(r'#[0-9a-f]{6}|font-|\bid="|url\(|<style|<metadata|<script', svg)
        assert svg.startswith("<svg") and "<?xml" not in svg


def test_the_same_files_give_the_same_page(folder: Path) -> None:
    assert build_page(read_runs([folder])) == build_page(read_runs([folder]))


def test_a_run_that_has_only_drawn_maps_shows_the_newest(folder: Path) -> None:
    for path in (folder / "routing").glob("*.npz"):
        path.unlink()
    Image.new("RGB", (64, 64), "red").save(folder / "routing" / "images-000000000960.png")
    text = build_page(read_runs([folder]))
    assert 'alt="routing map"' in text and "only images of maps" in text


def test_long_tables_are_folded_and_counted(folder: Path) -> None:
    line = {"images_seen": 320, "step": 20, "event": "skipped_step"}
    lines = [json.dumps(line | {"text": f"number {number}."}) for number in range(450)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    words = page_of(folder).words
    assert "410 more" in words and "and 50 that are only in the files" in words
    assert "number 399." in words and words.count("number 400.") == words.count("number 5.") - 1
