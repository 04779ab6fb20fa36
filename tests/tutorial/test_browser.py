"""Notebooks with an explorer in JupyterLab and a real browser: what it needs is run, and it answers the keyboard.

All other cells, and what is claimed, are nbval's to run: twice would take minutes.
"""

import ast
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"  # kept after the run, for people to look at
# Chromium's own calls home only fail on a machine without a network, many at a time.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
READY = """async () => {
    await window.jupyterapp.restored;
    const panel = window.jupyterapp.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    await panel.sessionContext.session.kernel.info;
}"""
RUN = """(cells) => {
    const run = async () => {
        for (const index of cells) {
            window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
            await window.jupyterapp.commands.execute('notebook:run-cell');
        }
        window.ran = 'done';
    };
    window.ran = run();
}"""
# What every kernel runs first: an explorer needs few samples and no removal in earnest; then nothing can be claimed.
QUICK = """
import functools
import smi
import smi.tutorial.exercises
quick = smi.defenses.IBAU(rounds=1)
smi.remove_backdoor = functools.partial(smi.remove_backdoor, per_class=4, inversion=smi.Latent(), defense=quick)
smi.invert = lambda *given, per_class, invert=smi.invert, **more: invert(*given, per_class=4, **more)
smi.defenses.IBAU = smi.defenses.Erasure = lambda **settings: quick
smi.tutorial.exercises.claim = lambda text, holds: None
"""
# Cells far from what is seen are not in the page; their outputs are in the model.
ERRORS = """() => Array.from(window.jupyterapp.shell.currentWidget.content.widgets).flatMap((cell, index) =>
    (cell.model.type === 'code' ? cell.model.outputs.toJSON() : []).filter(
        output => output.output_type === 'error').map(output => `cell ${index}: ${output.ename}: ${output.evalue}`))"""
SHOW = """async (index) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    notebook.activeCellIndex = index;
    await notebook.scrollToItem(index, 'start');
}"""


def explorer_cell(path):
    """Where a notebook shows its explorer; None where it has none."""
    for index, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code" and re.search(r"^explorer = \w+Explorer\(", cell.source, re.MULTILINE):
            return index
    return None


def needed_cells(path, last):
    """The code cells that the one at ``last`` needs, by the names that they bind and read, and itself."""
    cells = nbformat.read(path, as_version=4).cells
    chosen, wanted = [], set()
    for index in reversed(range(last + 1)):
        if cells[index].cell_type != "code":
            continue
        tree = ast.parse(cells[index].source)
        names = {(type(node.ctx), node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)}
        bound = {name for context, name in names if context is ast.Store}
        bound |= {alias.asname or alias.name.split(".")[0] for node in ast.walk(tree) for alias in imports(node)}
        bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if index == last or bound & wanted:
            chosen.insert(0, index)
            wanted = (wanted - bound) | {name for context, name in names if context is ast.Load} - bound
    return chosen


def imports(node):
    return node.names if isinstance(node, ast.Import | ast.ImportFrom) else []


CELLS = {path: explorer_cell(path) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
WITH_EXPLORER = [path for path, cell in CELLS.items() if cell is not None]


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on the path. On Debian: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield started
        started.close()


@pytest.fixture(scope="module")
def lab(chromium, tmp_path_factory):
    """The address of a JupyterLab of its own, on a copy of the notebooks, and its token."""
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(16)
    shutil.copytree(ROOT / "notebooks", home / "work" / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = home / "jupyter_config_dir" / "lab/user-settings" / "@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    # Or a question about news stands in every picture.
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    startup = home / "ipythondir" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "quick.py").write_text(QUICK)
    folders = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home / 'work'}",
        f"--LabApp.workspaces_dir={home / 'workspaces'}", "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with (home / "log").open("w") as log:
        own = os.environ | {name: str(home / name.lower()) for name in folders}
        server = subprocess.Popen(command, cwd=home, env=own, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=10).close()
                break
            except urllib.error.URLError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((home / "log").read_text())
                time.sleep(0.2)
        yield address, token
    finally:
        server.terminate()  # it ends its kernels first
        server.wait(60)


@pytest.fixture
def page(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    yield page
    page.evaluate("() => window.jupyterapp?.shell.currentWidget?.sessionContext.shutdown()")
    page.close()


def run_to_explorer(page, lab, path):
    """Open a notebook and run it up to its explorer; fails with what its cells raise."""
    address, token = lab
    page.goto(f"{address}/lab/tree/notebooks/{path.name}?reset&token={token}")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context", timeout=120_000)
    page.evaluate(READY)
    page.evaluate(RUN, needed_cells(path, CELLS[path]))
    page.wait_for_function("() => window.ran === 'done'", timeout=900_000, polling=250)  # a busy machine is slow
    assert page.evaluate(ERRORS) == []


def move_by_keyboard(view):
    """Change the first control, and press the button where the figure waits for one."""
    slider, button = view.locator(".noUi-handle").first, view.locator("button")
    before = slider.get_attribute("aria-valuetext")
    slider.focus()
    at_end = slider.get_attribute("aria-valuenow") == slider.get_attribute("aria-valuemax")
    slider.press("ArrowLeft" if at_end else "ArrowRight")
    assert slider.get_attribute("aria-valuetext") != before
    if button.count():
        button.first.focus()
        button.first.press("Enter")


def switch_theme(page, name):
    """Light or Dark; waits until the splash screen is gone."""
    page.evaluate("theme => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {name}")
    page.wait_for_function(
        "light => document.body.dataset.jpThemeLight === light && !document.querySelector('#jupyterlab-splash')",
        arg=str(name == "Light").lower(),
    )


@pytest.mark.parametrize("path", WITH_EXPLORER, ids=lambda path: path.stem)
def test_an_explorer_answers_the_keyboard(page, lab, path):
    run_to_explorer(page, lab, path)
    page.evaluate(SHOW, CELLS[path])
    view = page.locator(".jp-OutputArea-output .widget-vbox").first
    readout, picture = view.locator("figcaption"), view.locator("figure img")
    picture.wait_for()
    text, source = readout.inner_text(), picture.get_attribute("src")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{path.stem}.png")
    assert not view.locator("select, input[type=radio]").count(), "JupyterLab takes their arrow keys"
    move_by_keyboard(view)
    page.wait_for_function(
        "([view, text, source]) => view.querySelector('figcaption').innerText !== text "
        "&& view.querySelector('figure img').src !== source",
        arg=[view.element_handle(), text, source],
    )
    page.screenshot(path=SCREENSHOTS / f"{path.stem}_moved.png")
    switch_theme(page, "Dark")
    page.screenshot(path=SCREENSHOTS / f"{path.stem}_dark.png")
    switch_theme(page, "Light")  # for the next notebook
    assert not view.locator("[role=alert]").count()
    assert picture.get_attribute("alt")


def test_there_are_explorers():
    assert len(WITH_EXPLORER) >= 10
