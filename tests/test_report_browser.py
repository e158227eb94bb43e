"""The page in a real browser: no request, no error, and controls that work."""

import base64
import json
import os
import re
import shutil

import pytest

from swalp.report import page
from test_report_records import write_claim
from tiny_runs import finished

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJ"
    "AAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
BROWSER = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")


def skip_or_fail(reason):
    """Skip where a user has no browser; fail where one is demanded, as in CI."""
    if os.environ.get("SWALP_NEEDS_BROWSER"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        skip_or_fail("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        skip_or_fail("needs selenium: pip install 'swalp[dev]'")

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_window_size(1000, 900)
    driver.implicitly_wait(10)  # some events come after the call that causes them
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of a run of two seeds and of a claim."""
    folder = tmp_path_factory.mktemp("page")
    run = finished(folder / "tiny", seeds=2).path
    rows = [
        {"method": method, "seed": seed, "step": step, "error": (seed + 1) * size / step}
        for method, size in (("SGD", 3.0), ("SWALP", 1.0))
        for seed in (0, 1)
        for step in (1, 10, 100, 1000)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    claim = write_claim(folder / "claim", **{"rows.jsonl": lines})
    (run / "curves.png").write_bytes(base64.b64decode(PIXEL))
    return page.write([str(run), str(claim)], folder / "page.html").resolve().as_uri()


@pytest.fixture
def opened(browser, address):
    """The page, freshly loaded, with the messages of the loading."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(address)
    return browser


CURVES = "r1-errors"


def plot(driver, expression, identity=CURVES):
    """A value of a figure's plot object."""
    return driver.execute_script(
        f"const plot = document.getElementById({identity!r}).plot; return {expression}"
    )


def click(driver, selector, identity=CURVES):
    element = driver.find_element("css selector", f"#{identity} {selector}")
    driver.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element
    )
    element.click()
    return element


def keys(driver, *pressed, identity=CURVES):
    element = driver.find_element("css selector", f"#{identity} .plot")
    driver.execute_script("arguments[0].focus()", element)
    for key in pressed:
        element.send_keys(key)


def ticks(driver, identity=CURVES):
    return driver.execute_script(
        f"return [...document.querySelectorAll('#{identity} .ticks text')].map(t => t.textContent)"
    )


def test_no_request_and_no_error(opened):
    """Nothing but the file itself is loaded, and the console stays empty."""
    opened.execute_script("return new Promise(done => setTimeout(done, 300))")
    requests = []
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    assert [url for url in requests if not url.startswith("data:")] == [opened.current_url]
    assert opened.get_log("browser") == []


def test_the_policy_forbids_requests(opened):
    """Were there an address in the page, the browser would refuse to follow it."""
    failed = opened.execute_async_script(
        "const done = arguments[0];"
        "document.addEventListener('securitypolicyviolation', e => done(e.violatedDirective));"
        "document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/a.png'}))"
    )
    assert failed == "img-src"
    opened.get_log("browser")


def test_every_figure_is_drawn(opened):
    drawn = opened.execute_script(
        "return [...document.querySelectorAll('figure')].map(f => [f.id,"
        " f.querySelectorAll('.plot svg path, .plot svg circle').length,"
        " f.querySelector('.plot').getAttribute('aria-label')])"
    )
    assert len(drawn) == 6
    for identity, shapes, label in drawn:
        assert shapes >= 1, identity
        assert len(label) > 80
        assert "undefined" not in label
        assert "NaN" not in opened.execute_script(
            f"return document.querySelector('#{identity} svg').outerHTML"
        )


def test_curves_lie_where_their_numbers_are(opened):
    """Ends of a curve against the axis: read back from the drawing."""
    end = opened.execute_script(
        "const plot = document.getElementById('r2-claim').plot;"
        "const path = [...plot.plot.querySelectorAll('path.stroke.strong')][0];"
        "const place = path.getPointAtLength(path.getTotalLength());"
        "const {left, top, w, h} = plot.box;"
        "return [plot.scales.x.from((place.x - left) / w), "
        "plot.scales.y.from(1 - (place.y - top) / h)]"
    )
    assert end == [pytest.approx(1000, rel=0.01), pytest.approx(0.0015, rel=0.01)]
    assert plot(opened, "plot.logX && plot.logY", "r2-claim")


def test_zoom_by_buttons_and_back(opened):
    whole = plot(opened, "[plot.scales.x.low, plot.scales.x.high]")
    click(opened, "[aria-label='Zoom in']")
    low, high = plot(opened, "[plot.scales.x.low, plot.scales.x.high]")
    assert high - low == pytest.approx((whole[1] - whole[0]) / 2)
    click(opened, "[aria-label='Zoom out']")
    click(opened, "[aria-label='Zoom out']")
    assert plot(opened, "[plot.scales.x.low, plot.scales.x.high]") == whole
    click(opened, "[aria-label='Zoom in']")
    click(opened, "[aria-label='All: show the whole range']")
    assert plot(opened, "[plot.scales.x.low, plot.scales.x.high]") == whole
    assert opened.find_element(
        "css selector", f"#{CURVES} [aria-label='All: show the whole range']"
    ).get_attribute("disabled")


def test_zoom_by_dragging(opened):
    from selenium.webdriver import ActionChains

    element = opened.find_element("css selector", "#r2-claim .plot")
    opened.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element
    )
    ActionChains(opened).move_to_element_with_offset(element, -100, -20).click_and_hold(
    ).move_by_offset(120, 60).release().perform()  # fmt: skip
    view = plot(opened, "plot.view", "r2-claim")
    assert 1 < view["x0"] < view["x1"] < 1000
    assert view["y0"] < view["y1"]
    ActionChains(opened).double_click(element).perform()
    assert plot(opened, "plot.view", "r2-claim") is None


def test_log_axes(opened):
    before = ticks(opened, "r2-claim")
    assert "100" in before
    button = click(opened, "[aria-label='log x: logarithmic horizontal axis']", "r2-claim")
    assert button.get_attribute("aria-pressed") == "false"
    after = ticks(opened, "r2-claim")
    assert {"200", "400", "600", "800"} <= set(after)
    button.click()
    assert ticks(opened, "r2-claim") == before


def test_hover_tells_the_values(opened):
    from selenium.webdriver import ActionChains

    element = opened.find_element("css selector", f"#{CURVES} .plot")
    opened.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element
    )
    ActionChains(opened).move_to_element(element).perform()
    tip = opened.find_element("css selector", f"#{CURVES} .tip")
    assert tip.is_displayed()
    assert re.match(r"epoch: 2\n", tip.text)
    assert "paper-small-block-8 SGD" in tip.text


def test_hiding_a_series(opened):
    count = "plot.plot.querySelectorAll('path.stroke:not(.marker)').length"
    before = plot(opened, count)
    box = click(opened, ".legend input")
    assert not box.is_selected()
    assert plot(opened, count) == before - 1
    assert plot(opened, "plot.visible().length") == 3
    box.click()
    assert plot(opened, count) == before


def test_bands(opened):
    bands = "plot.plot.querySelectorAll('.band').length"
    assert plot(opened, bands) == 2
    click(opened, "[aria-label^='bands']")
    assert plot(opened, bands) == 0


def test_everything_by_keyboard(opened):
    from selenium.webdriver import Keys

    status = f"#{CURVES} [role=status]"
    keys(opened, Keys.ARROW_RIGHT)
    said = opened.find_element("css selector", status).get_attribute("textContent")
    assert said.startswith("epoch: 1; ")
    assert re.search(r"float SGD [\d.]+ \([\d.]+ to [\d.]+\)", said)
    keys(opened, Keys.END)
    said = opened.find_element("css selector", status).get_attribute("textContent")
    assert said.startswith("epoch: 3; ")
    assert "float SWA" in said
    keys(opened, Keys.HOME, "+")
    assert plot(opened, "plot.view !== null")
    low = plot(opened, "plot.scales.x.low")
    keys(opened, Keys.SHIFT + Keys.ARROW_RIGHT)
    assert plot(opened, "plot.scales.x.low") > low
    keys(opened, "0")
    assert plot(opened, "plot.view") is None
    keys(opened, Keys.ESCAPE)
    assert plot(opened, "plot.cursor") is None


def test_the_order_of_the_tab_key(opened):
    """From the skip link on, Tab reaches everything that can be operated, and shows where it is."""
    from selenium.webdriver import ActionChains, Keys

    opened.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached = []
    for _ in range(40):
        ActionChains(opened).send_keys(Keys.TAB).perform()
        reached.append(
            opened.execute_script(
                "const e = document.activeElement; const s = getComputedStyle(e);"
                "return [e.className || e.id || e.tagName, s.outlineStyle, e.textContent.trim()]"
            )
        )
    assert reached[0][2] == "Skip to the content"
    assert reached[1][0] == "theme"
    assert any(name == "plot" for name, _, _ in reached)
    assert all(outline != "none" for _, outline, _ in reached)


def test_choosing_a_panel_and_its_table(opened):
    from selenium.webdriver.support.ui import Select

    identity = "r1-histograms"
    select = Select(opened.find_element("css selector", f"#{identity} select"))
    assert plot(opened, "plot.panel.group", identity) == "paper-small-block-8"
    select.select_by_index(0)
    assert plot(opened, "plot.panel.group", identity) == "float"
    click(opened, "details.numbers summary", identity)
    table = opened.find_element("css selector", f"#{identity} .numbers table")
    header = [cell.text for cell in table.find_elements("css selector", "thead th")]
    assert header == ["weight", "iterate (SGD)", "average (SWA)"]
    panel = plot(opened, "plot.panel.series.map(one => one.x.length)", identity)
    rows = table.find_elements("css selector", "tbody tr")
    assert len(rows) >= max(panel)
    assert opened.get_log("browser") == []


def luminance(colour):
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [
        part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# Colours of text with those behind it, of everything that has text of its own.
TEXTS = """
const found = [];
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const box = e.getBoundingClientRect();
  if (!own || !box.width) continue;
  if (e.closest('.unseen, noscript, script, style, :disabled, .off')) continue;
  let behind = e, colour = null;
  while (behind && !colour) {
    const c = getComputedStyle(behind).backgroundColor;
    if (!/, 0\\)$/.test(c) && c !== 'transparent') colour = c;
    behind = behind.parentElement;
  }
  const style = getComputedStyle(e);
  found.push([e.tagName + '.' + (e.className.baseVal ?? e.className),
              e instanceof SVGElement ? style.fill : style.color, colour]);
}
const paper = getComputedStyle(document.body).backgroundColor;
for (const e of document.querySelectorAll('.plot .stroke:not(.marker)')) {
  found.push(['curve', getComputedStyle(e).stroke, paper]);
}
return found
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    """WCAG 2.2 AA: 4.5 for text, 3 for curves, by the system's choice of colours."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        opened.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        texts = opened.execute_script(TEXTS)
        paper = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (luminance(paper) > 0.5) == (scheme == "light")
        assert len(texts) > 300
        for name, colour, behind in texts:
            wanted = 3 if name == "curve" else 4.5
            assert contrast(colour, behind) >= wanted, (name, colour, behind)
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_choosing_colours(opened):
    from selenium.webdriver.support.ui import Select

    paper = "return getComputedStyle(document.body).backgroundColor"
    select = Select(opened.find_element("id", "theme"))
    for choice, light in (("dark", False), ("light", True)):
        select.select_by_value(choice)
        assert (luminance(opened.execute_script(paper)) > 0.5) == light


@pytest.mark.parametrize("width", [320, 390, 768])
def test_narrow_windows(opened, width):
    """The page never scrolls sideways; wide tables do, in their own frames."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        opened.refresh()
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        drawn = plot(opened, "plot.width")
        assert 250 < drawn <= width
        small = opened.execute_script(
            "return [...document.querySelectorAll('button:not([hidden]), select, .legend label')]"
            ".filter(e => e.getBoundingClientRect().height < 24).length"
        )
        assert small == 0
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_print(opened):
    """Controls are left out, tables are whole, curves are drawn for the width of paper."""
    made = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(made["data"])
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 30
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        for selector in (".controls", "nav", ".legend input"):
            assert not opened.find_element("css selector", selector).is_displayed(), selector
        opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        assert plot(opened, "plot.width") == 690
        opened.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert plot(opened, "plot.width") != 690
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_without_scripts(browser, address):
    """Verdicts, tables and a picture are there, and a line says what is not."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(address)
        body = browser.find_element("css selector", "body").text
        assert "drawn by a script, which does not run here" in body
        assert "averaging brings back" in body
        picture = browser.find_element("css selector", "figure noscript img")
        assert picture.get_attribute("alt")
        assert not browser.find_element("css selector", "details.numbers").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
