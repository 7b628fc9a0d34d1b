"""The page as a reader has it: drawn from real runs and looked at in headless Chromium, narrow and wide, light and
dark."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distill.reporting.run import Run
from distill.storage.checkpoint import CheckpointFolder, unit_name
from distill.storage.files import read_commented, read_json, write_commented, write_json
from distill.storage.run_directory import RunDirectory
from tests.documents import fenced
from tests.e2e.command import LIMIT_S, SMALL, environment
from tests.run_directories import energy, huge, metrics, planned, run_directory, traced

pytestmark = pytest.mark.jobs

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
DRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not here")
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update")  # fmt: skip

NAMES = ("finished", "stopped", "full", "huge", "comparison")

# Every drawing with its size and how many marks in it have an extent. What is folded away is opened first.
DRAWINGS = """
document.querySelectorAll('details').forEach(d => d.open = true);
return [...document.querySelectorAll('svg.plot, svg.bar')].map(svg => {
  const box = svg.getBoundingClientRect();
  const marks = [...svg.querySelectorAll('path, rect, circle, line, use')].filter(mark => {
    const b = mark.getBoundingClientRect(); return b.width > 0 || b.height > 0; });
  return {label: svg.getAttribute('aria-label'), width: box.width, height: box.height, marks: marks.length}; });
"""
TABLES = """
return [...document.querySelectorAll('table')].map(table => [...table.querySelectorAll('tbody tr')].map(
  row => [...row.querySelectorAll('td')].map(cell => cell.innerText.trim() || (cell.querySelector('svg') && 'svg'))));
"""
# WCAG 2.1, "contrast ratio": of every element with text of its own against the nearest background that is painted.
CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function rgb(colour) { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; }
function luminance(c) { const l = c.slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 :
  ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; }
const found = [];
for (const e of document.querySelectorAll('main *')) {
  if (!['svg', 'circle', 'rect', 'title'].includes(e.tagName) &&
      [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.getClientRects().length) {
    const style = getComputedStyle(e);
    const ink = rgb(e.namespaceURI.endsWith('svg') ? style.fill : style.color);
    let place = e, paper = [0, 0, 0, 0];
    while (place && paper[3] === 0) {
      paper = rgb(getComputedStyle(place).backgroundColor); place = place.parentElement; }
    const [a, b] = [luminance(ink), luminance(paper)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), e.textContent.trim().slice(0, 40), parseFloat(style.fontSize)]); } }
return found;
"""

# Every block's line: its contrast with the page (WCAG 2.1 asks 3 of what is drawn), and the least distance in OKLab
# to another one of the same legend (0.02 is just noticeable).
LINES = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function linear(colour) { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255).map(
    v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); }
const luminance = ([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b;
const dot = (m, v) => m.map(row => row.reduce((sum, x, i) => sum + x * v[i], 0));
const oklab = c => dot([[0.21045, 0.79362, -0.00407], [1.978, -2.42859, 0.45059], [0.0259, 0.78277, -0.80868]],
  dot([[0.41222, 0.53633, 0.05145], [0.2119, 0.6807, 0.1074], [0.0883, 0.28172, 0.62998]], c).map(Math.cbrt));
const paper = luminance(linear(getComputedStyle(document.body).backgroundColor));
const lines = [...document.querySelectorAll('.wide path.line')].map(e => linear(getComputedStyle(e).stroke));
const named = [...document.querySelectorAll('.legend path.line')].map(e => linear(getComputedStyle(e).stroke));
const apart = (a, b) => Math.hypot(...oklab(a).map((v, i) => v - oklab(b)[i]));
return {contrast: lines.map(luminance).map(l => (Math.max(l, paper) + 0.05) / (Math.min(l, paper) + 0.05)),
  apart: lines.flatMap((a, i) => lines.slice(i + 1).map(b => apart(a, b))),
  astray: lines.map((line, i) => apart(line, named[i]))};
"""

# What the box at the cursor says, by rows; which lines of the blocks' plot are not dimmed.
TOLD = "return [...document.querySelectorAll('.tip.shown p')].map(p => [...p.childNodes].map(n => n.textContent))"
LIT = "return [...document.querySelectorAll('.wide path.line:not(.dim)')].map(line => line.dataset.name)"
COLUMN = """
const [anchor, number] = arguments;
return [...document.querySelectorAll(`#${anchor} tbody tr`)].map(row => row.cells[number].innerText);
"""
STRANGERS = """
const script = document.createElement('script'); script.textContent = 'window.stranger = true';
document.body.append(script);
const button = document.createElement('div'); button.setAttribute('onclick', 'window.stranger = true');
document.body.append(button); button.click();
return window.stranger === undefined;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*QUIET, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped while its blocks trained, in the default directory: going on needs its cwd."""
    cwd = tmp_path_factory.mktemp("stopped")
    more = ("distill.steps=100000", "distill.log_every=2", "checkpoint.every=20", "run.name=stopped")
    command = [sys.executable, "-m", "distill", *SMALL, *more]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=cwd, env=environment(), start_new_session=True, **quiet)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not list(cwd.glob("outputs/stopped/*/checkpoints/[0-9]*.safetensors")):
            assert process.poll() is None, "the run ended before it was stopped"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    (run,) = cwd.glob("outputs/stopped/*")
    return run


def report(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distill", "report", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def pages(finished: tuple[Path, str], stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages that are looked at: of real runs, of made-up ones for what they lack, and a comparison."""
    made = tmp_path_factory.mktemp("made")
    full = run_directory(made / "full", metrics(energy=energy()))
    traced(planned(full, blocks=3, ranks=2), ranks=2, steps=90)
    runs = {"finished": [finished[0]], "stopped": [stopped], "full": [full], "huge": [huge(made / "huge")]}
    found = {name: made / f"{name}.html" for name in NAMES}
    for name, these in (runs | {"comparison": [finished[0], stopped, full]}).items():
        done = report(*these, "--output", found[name], cwd=made)
        assert (done.returncode, done.stderr) == (0, "")
    return found


def show(browser: Any, page: Path, *, width: int = 1440, scheme: str = "light") -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    view = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", view)
    browser.get(page.as_uri())


@needs_chromium
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [390, 1440])
def test_drawings_are_drawn_tables_are_filled_and_nothing_overflows(
    browser: Any, pages: dict[str, Path], name: str, width: int
) -> None:
    show(browser, pages[name], width=width)
    drawings = browser.execute_script(DRAWINGS)
    assert len(drawings) >= 3
    assert [d for d in drawings if d["width"] < 20 or d["height"] < 3 or not d["marks"] or not d["label"]] == []
    tables = browser.execute_script(TABLES)
    assert tables
    assert all(rows and all(any(row) and row[0] for row in rows) for rows in tables)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []


@needs_chromium
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_are_legible_in_light_and_dark(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    show(browser, pages[name], width=390, scheme=scheme)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = browser.execute_script(CONTRAST)
    assert len(found) > 50
    assert [words for words in found if words[0] < 4.5] == []
    assert [words for words in found if words[2] < 11] == []
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_blocks_are_told_apart_by_their_colours(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    show(browser, pages["finished"], scheme=scheme)
    found = browser.execute_script(LINES)
    assert len(found["contrast"]) == 9
    assert min(found["contrast"]) >= 3
    assert min(found["apart"]) > 0.08
    assert max(found["astray"]) < 0.01, "the legend has other colours than the lines"


@needs_chromium
def test_the_page_of_a_real_run_shows_all_that_it_promises(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["finished"])
    labels = [drawing["label"] for drawing in browser.execute_script(DRAWINGS)]
    for start in ("relative error by step of 9 blocks", "share of time by kind of 2 ranks", "the first", "makespan:",
                  "Fine-tuning: loss", "Fine-tuning, validation accuracy: top-1", "top-1 accuracy against milliseconds",
                  "Training the teacher: loss", "rank 1:"):  # fmt: skip
        assert any(label.startswith(start) for label in labels), start
    titles = browser.execute_script("return [...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert {"Accuracy against latency", "Answers, class by class"} <= set(titles)
    assert {"Teacher against student", "Energy", "Ledger", "Run", "Configuration"} <= set(titles)


def at(browser: Any, selector: str, across: float = 0.5, down: float = 0.5) -> None:
    """Move the cursor to a place of an element."""
    from selenium.webdriver.common.action_chains import ActionChains

    element = browser.find_element("css selector", selector)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    width, height = element.rect["width"], element.rect["height"]
    offset = int((across - 0.5) * width), int((down - 0.5) * height)
    ActionChains(browser).move_to_element_with_offset(element, *offset).perform()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1440])
def test_the_cursor_tells_the_nearest_point_of_every_line(
    browser: Any, finished: tuple[Path, str], pages: dict[str, Path], width: int
) -> None:
    run = Run(finished[0])
    show(browser, pages["finished"], width=width)
    at(browser, "#errors-of-the-blocks .wide svg.plot", across=0.9)
    (first, *lines) = browser.execute_script(TOLD)
    step = int(first[0].removeprefix("step "))
    told = {name: float(value) for name, value, *_ in lines}
    known = {unit.name: dict(unit.course)[step] for unit in run.units}
    assert told == pytest.approx(known, rel=2e-3)
    assert list(told.values()) == sorted(told.values(), reverse=True)
    box = browser.find_element("css selector", ".tip").rect
    assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    at(browser, "h1")
    assert browser.execute_script(TOLD) == []


@needs_chromium
def test_the_cursor_tells_what_a_point_is(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["comparison"])
    at(browser, "#accuracy-against-latency circle.reference")
    ((words,),) = browser.execute_script(TOLD)
    assert re.fullmatch(r"teacher: [0-9.]+ %, [0-9.]+ ms", words)


@needs_chromium
def test_a_legend_highlights_its_line_while_the_cursor_is_on_it_and_after_a_click(
    browser: Any, pages: dict[str, Path]
) -> None:
    show(browser, pages["finished"])
    assert len(browser.execute_script(LIT)) == 9
    at(browser, '.legend [data-s="b2"] button')
    (name,) = browser.execute_script(LIT)
    assert browser.find_element("css selector", '.legend [data-s="b2"]').text == name
    at(browser, "h1")
    assert len(browser.execute_script(LIT)) == 9
    browser.find_element("css selector", '.legend [data-s="b4"] button').click()
    at(browser, "h1")
    assert len(browser.execute_script(LIT)) == 1
    pressed = browser.find_elements("css selector", '.legend button[aria-pressed="true"]')
    assert [button.text for button in pressed] == browser.execute_script(LIT)
    pressed[0].click()
    at(browser, "h1")
    assert len(browser.execute_script(LIT)) == 9


@needs_chromium
def test_a_click_on_a_heading_sorts_by_size_or_by_name(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["finished"])
    heads = browser.find_elements("css selector", "#ledger th button")
    for column in (0, 5, 6):  # names, errors, seconds with their units
        for way in ("ascending", "descending"):
            heads[column].click()
            assert browser.find_element("css selector", "#ledger th[aria-sort]").get_attribute("aria-sort") == way
            cells = browser.execute_script(COLUMN, "ledger", column)
            values = cells if column == 0 else [float(cell.split()[0]) / 1000 ** cell.endswith("ms") for cell in cells]
            assert values == sorted(values, reverse=way == "descending")
            assert len(values) == 9


@needs_chromium
def test_the_policy_lets_nothing_run_that_is_not_the_page_s(browser: Any, pages: dict[str, Path]) -> None:
    show(browser, pages["finished"])
    assert len(browser.find_elements("css selector", ".legend button")) >= 9, "its own script has run"
    assert browser.get_log("browser") == []
    assert browser.execute_script(STRANGERS)
    assert len(browser.get_log("browser")) == 2


def test_the_page_drawn_again_is_the_one_that_the_run_drew(finished: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "copy")
    assert report("copy", cwd=tmp_path).stdout == "copy/report.html\n"
    page = (tmp_path / "copy" / "report.html").read_text()
    assert "finished" in page
    assert len(page.encode()) < 1_000_000
    assert page.count('<path id="c') == 9


def test_a_stopped_run_shows_how_far_it_got(stopped: Path) -> None:
    assert report(stopped, cwd=stopped).returncode == 0
    page = (stopped / "report.html").read_text()
    assert "unfinished: distill" in page
    assert "0 of 9 blocks finished" in page


def test_the_command_of_a_stopped_run_s_page_goes_on(stopped: Path) -> None:
    run = shutil.copytree(stopped, stopped.with_name("copy"))
    checkpoints = CheckpointFolder(run, generation=2, origin=RunDirectory(run).origin("teacher.safetensors"))
    begun = [checkpoint for block in range(10) if (checkpoint := checkpoints.load(unit_name(block)))]
    near = 20 + max(checkpoint.step for checkpoint in begun)  # its end is 100000 steps away
    settings = read_commented(run / "resolved.yaml").replace("100000", str(near))
    write_commented(run / "resolved.yaml", settings)
    write_json(run / "identity.json", read_json(run / "identity.json") | {"distill.steps": near})
    of_near = CheckpointFolder(run, generation=2, origin=RunDirectory(run).origin("teacher.safetensors"))
    for checkpoint in begun:
        of_near.save(checkpoint)
    assert report(run, cwd=run).returncode == 0
    (command,) = re.findall(r"<pre[^>]*>(cd [^<]*python -m distill[^<]*)</pre>", (run / "report.html").read_text())
    command = command.replace("python", sys.executable)
    done = subprocess.run(
        command, shell=True, cwd="/", env=environment(), capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(attempt 2)" in done.stdout
    assert (run / "student.safetensors").exists()


def test_the_commands_of_the_documentation_run(finished: tuple[Path, str], stopped: Path, tmp_path: Path) -> None:
    """The page of docs/report.md, with these runs in the places of its examples."""
    shutil.copytree(finished[0], tmp_path / "outputs" / "demo" / "700b8f7af7f7d2c2")
    shutil.copytree(stopped, tmp_path / "outputs" / "demo" / "91b0c2a4d6e8f013")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "distill").write_text(f'#!/bin/sh\nexec {sys.executable} -m distill "$@"\n')
    (folder / "distill").chmod(0o755)
    env = environment() | {"PATH": f"{folder}:{os.environ['PATH']}"}
    for script in fenced("docs/report.md", "sh"):
        command = ["bash", "-euc", script]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / "demo" / "comparison.html").exists()
    assert (tmp_path / "compared.html").exists()
