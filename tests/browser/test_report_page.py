"""The page of ``report --html`` in a real Chromium: wide and narrow, light and dark, with hostile traces."""

from pathlib import Path

import pytest

from mmu import report

DATA = Path(__file__).parents[1] / "data"
HOSTILE = """</pre><script>document.title = "run"</script><img src=x onerror="document.title='run'">"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of a hostile trace, a storm and two recorded runs."""
    folder = tmp_path_factory.mktemp("report")
    evil = folder / f"{HOSTILE.replace('/', '%')}.txt"
    evil.write_text(f" {HOSTILE}-7 [1] ..... 1.5: kvm_exit: vcpu 0 reason {HOSTILE} rip 0x1 info1 0x0 info2 0x0\n")
    paths = [evil, next((DATA / "public-traces").glob("01*"))]
    paths += [DATA / "kvm-traces" / f"{name}.trace.gz" for name in ("npt1_tdp1_C", "npt1_tdp1_D")]
    page = folder / "report.html"
    page.write_text(report.page([(str(path), report.report(path)) for path in paths]), encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def opened(chromium, address, request):
    """The page in one width and colour scheme, with what Chromium complained of."""
    width, scheme = request.param
    page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints = []
    page.on("console", lambda line: complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url != address else None)
    page.goto(address)
    yield page, complaints
    page.close()


@pytest.mark.parametrize("opened", [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")], indirect=True)
def test_page_fits_loads_nothing_and_runs_nothing(opened):
    """No width overflows, nothing else is asked for, and a script in a trace's name or text stays text."""
    page, complaints = opened
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert complaints == [] and page.title() == "Trace report"
    assert page.evaluate("document.scripts.length + document.images.length") == 0
    assert page.locator("h2").first.inner_text().count("<script>") == 1
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert colours in (["rgb(27, 31, 36)", "rgb(255, 255, 255)"], ["rgb(230, 233, 236)", "rgb(20, 24, 28)"])


@pytest.mark.parametrize("opened", [(390, "light")], indirect=True)
def test_arrow_keys_step_through_an_spte_history(opened):
    """In an spte's history the arrow keys choose a change, whose words are then shown as ribbons of 64 cells."""
    page, _ = opened
    player = page.locator("fieldset", has_text="gfn 0x1006").first
    player.locator("input").last.focus()
    seen = []
    for _ in range(3):
        step = player.locator(".step:visible")
        assert step.count() == 1 and step.locator(".ribbon").last.locator("i").count() == 64
        seen.append(step.inner_text().split(":")[0])
        page.keyboard.press("ArrowLeft")
    assert seen == ["line 4,024", "line 3,705", "line 3,463"]
