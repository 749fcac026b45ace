"""The page dreams/dream_plane.html in a real browser, with a real pointer and real keys, beside the model it shows."""

import itertools
import json
import math
import re
import shutil

import pytest
import torch
from harness import TEMPLATE, levels

import quest_12_1 as quest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from browser import computed, drawn, element, gaussian, ink, marks, move, noise, numbers, opened, point, stroke, text  # noqa: E402,I001
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and its driver are not installed")
ORANGE, RED, WHITE, GREY = (255, 149, 0), (255, 48, 48), (255, 255, 255), (0x99, 0x99, 0x99)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "window-size=1400,1200"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def path(main_job):
    return main_job[0] / "dreams" / "dream_plane.html"


RESET = """run.beta = 1; element("canvas").click(); element("noise").value = 0; scrollTo(0, 0);
eps = eps.map((_, k) => [1.5 * Math.sin(k + 1), 1.5 * Math.cos(3 * k)]); showDigit(0);"""  # the same ten draws always


@pytest.fixture
def page(browser, path):
    """The page of the main job as it opens; a test during which it reports an error fails."""
    if browser.current_url != path.as_uri():
        opened(browser, path)
    browser.execute_script(RESET)
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture(scope="module")
def trained(path):
    """The model that the page shows."""
    model = quest.VAE()
    model.load_state_dict(torch.load(path.with_name("dream_model.pt")))
    return model.requires_grad_(False)


# The model ------------------------------------------------------------------------------------------------------------
EACH_ROW = "Array.from({length: 200}, (_, n) => "  # of 200 digits or points


def test_the_page_encodes_and_decodes_as_pytorch_does(page, trained, held_out):
    x, z = held_out[0][torch.randperm(10_000)[:200]], torch.randn(200, 2)
    codes = computed(page, EACH_ROW + "encode(a.subarray(784 * n, 784 * n + 784)).flatMap(v => [...v])).flat()", x)
    torch.testing.assert_close(codes.view(200, 4), torch.cat(trained.encode(x), dim=1), atol=1e-4, rtol=0)
    images = computed(page, EACH_ROW + "[...decode(a.subarray(2 * n, 2 * n + 2))]).flat()", z)
    torch.testing.assert_close(images.view(200, 784), trained.decode(z), atol=1e-4, rtol=0)


@pytest.mark.parametrize("beta", [1, 30])
def test_the_page_s_loss_is_loss_terms(page, trained, held_out, beta):
    x = held_out[0][torch.randperm(10_000)[:200]]
    mu, logvar = trained.encode(x)
    recon_x = trained.decode(mu)
    page.execute_script(f"run.beta = {beta}")
    images = "b.subarray(784 * n, 784 * n + 784), a.subarray(784 * n, 784 * n + 784)"
    script = f"{EACH_ROW} lossTerms({images}, c.subarray(4 * n, 4 * n + 2), c.subarray(4 * n + 2, 4 * n + 4))).flat()"
    terms = computed(page, script, x, recon_x, torch.cat((mu, logvar), dim=1)).view(200, 3)
    for row, got in enumerate(terms):
        expected = quest.loss_terms(*(part[row : row + 1] for part in (recon_x, x, mu, logvar)), beta)
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-3, atol=1e-3)


# The map --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cell", [(0, 0), (7, 9), (19, 19), (12, 3)])
def test_a_drag_on_the_map_decodes_the_point_under_the_pointer_which_the_white_ring_shows(page, path, cell):
    column, row = cell
    stroke(page, "map", [(0, 0), ((column + 0.5) / 20 - 0.5, (row + 0.5) / 20 - 0.5)])
    z = torch.tensor([-3.8 + 0.4 * column, 3.8 - 0.4 * row])
    torch.testing.assert_close(point(page), z, atol=0.02, rtol=0)
    canvas = levels(path.with_name("dream_canvas.png"))[2 + 30 * row :, 2 + 30 * column :][:28, :28]
    assert (drawn(page, "decoded", 28, 28)[..., 0] - canvas).abs().mean() < 3
    near = (marks(page, WHITE) - z).norm(dim=1)
    assert ((near > 0.38) & (near < 0.42)).sum() > 20


def test_the_views_are_the_gallery_s_canvas_and_codes_with_circles(page, path):
    element(page, "clear").click()
    stroke(page, "map", [(0.49, 0.49)])  # z out of the way
    for name in ("codes", "canvas"):
        element(page, name).click()
        picture = levels(path.with_name(f"dream_{name}.png"), "RGB")[1:-1, 1:-1]
        assert (drawn(page, "map", 600, 600)[..., :3] - picture)[40:550, 40:550].abs().mean() < 6  # but for the marks
        distances = marks(page, GREY).norm(dim=1)
        assert all(((distances - radius).abs() < 0.03).sum() > 1 for radius in (1, 2, 3))


def test_arrow_keys_move_the_point_and_shift_moves_it_by_a_cell(page):
    stroke(page, "map", [(0, 0)])
    start, expected = point(page), torch.zeros(2)
    for key, step in {"RIGHT": (0.08, 0), "UP": (0, 0.08), "LEFT": (-0.08, 0), "DOWN": (0, -0.08)}.items():
        for shift, times in (("", 1), (Keys.SHIFT, 5)):
            element(page, "map").send_keys(shift + getattr(Keys, f"ARROW_{key}"))
            expected += times * torch.tensor(step)
            torch.testing.assert_close(point(page) - start, expected, atol=1e-5, rtol=0)


def test_dream_draws_points_from_the_standard_normal_distribution(page):
    element(page, "dream").click()
    first = point(page)
    element(page, "dream").send_keys(Keys.ENTER)
    assert not torch.equal(point(page), first) and text(page, "z") == "z = ({:.2f}, {:.2f})".format(*point(page))
    z = computed(page, "Array.from({length: 4000}, randn)")
    assert abs(z.mean()) < 0.08 and abs(z.std() - 1) < 0.06
    assert [(z.abs() < k).float().mean().item() for k in (1, 2)] == pytest.approx([0.683, 0.954], abs=0.04)


# What is encoded ------------------------------------------------------------------------------------------------------
STROKES = {
    0: [(0.21 * math.cos(k / 4), 0.3 * math.sin(k / 4)) for k in range(27)],
    1: [(0.05, -0.32), (0.02, -0.1), (-0.02, 0.1), (-0.05, 0.32)],
}


def terms_of(x, mu, logvar, images):
    """Loss, BCE and KLD of x as `loss_terms` computes them, averaged over the images."""
    expanded = (part.expand(len(images), -1) for part in (x, mu, logvar))
    return [term.item() / len(images) for term in quest.loss_terms(images, *expanded)]


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawn_digit_lands_among_its_own_kind_and_all_that_is_shown_of_it_is_true(page, trained, held_out, digit):
    stroke(page, "pad", STROKES[digit])
    x = computed(page, "prepare(ink)")[None]
    mu, logvar, samples = gaussian(page)
    torch.testing.assert_close(torch.stack((mu, logvar)), torch.cat(trained.encode(x)), atol=1e-3, rtol=0)
    nearest = (trained.encode(held_out[0])[0] - mu).norm(dim=1).topk(25, largest=False).indices
    assert (held_out[1][nearest] == digit).sum() > 12
    images, recon, std = trained.decode(samples), trained.decode(mu), torch.exp(logvar / 2)
    for name, shown in {"input": x[0], "recon": recon, "decoded": recon}.items():
        assert (drawn(page, name, 28, 28)[..., 0].flatten() - 255 * shown).abs().max() < 1.1
    tiles = drawn(page, "draws", 140, 56)[..., 0].unfold(0, 28, 28).unfold(1, 28, 28).reshape(10, 784)
    assert (tiles - 255 * images).abs().max() < 1.1
    bce, kld, total = numbers(page, "loss")
    assert [bce, kld] == pytest.approx(terms_of(x, mu, logvar, images)[1:], abs=0.06) and total == round(bce + kld, 1)
    averages = page.execute_script("return [run.bce, run.kld]")
    assert numbers(page, "yardstick") == pytest.approx([terms_of(x, mu, logvar, x)[1], *averages], abs=0.06)
    assert numbers(page, "code") == pytest.approx([*mu.tolist(), *std.tolist()], abs=0.006)
    page.execute_script("goTo([-4, 4])")  # z out of the way
    apart = torch.cdist(samples, marks(page, RED))
    assert apart.min(dim=0).values.max() < 0.04 and apart.min(dim=1).values.max() < 0.1  # one may hide another
    noise(page, 2)  # rings that the draws leave free
    rings, width = ((marks(page, ORANGE) - mu) / (4 * std)).norm(dim=1), 0.03 / (4 * std).min()
    assert ((rings - 1).abs() < width).sum() > 5 < ((rings - 2).abs() < width).sum()
    assert ((rings - rings.round()).abs() < width).all() and rings.max() < 2.5


def test_the_slider_multiplies_std_and_rings_draws_loss_and_curve_follow_and_another_sample_is_another_draw(
    page, trained
):
    page.execute_script("showDigit(17)")
    (mu, logvar, _), eps, x = gaussian(page), computed(page, "eps.flat()").view(10, 2), computed(page, "x")[None]
    told, rises = {-2: "x 1/4", -1: "x 1/2", 0: "x 1", 1: "x 2", 2: "x 4"}, {}
    for exponent, times in told.items():
        noise(page, exponent)
        noisy = logvar + 2 * exponent * math.log(2)
        samples = mu + torch.exp(noisy / 2) * eps
        torch.testing.assert_close(gaussian(page), (mu, noisy, samples), atol=1e-4, rtol=0)
        bce, kld, total = numbers(page, "loss")
        rises[exponent] = terms_of(x, mu, noisy, trained.decode(samples))
        assert [bce, kld] == pytest.approx(rises[exponent][1:], rel=1e-3, abs=0.06) and total == round(bce + kld, 1)
        assert text(page, "times") == times
    page.execute_script("trace()")  # as it does by itself when the pen rests
    curve, shown = drawn(page, "curve", 720, 280)[..., :3], 0
    for exponent, terms in rises.items():
        for colour, of, before in zip((WHITE, (106, 183, 255), (95, 211, 141)), terms, rises[0]):
            row, column = round(280 * 2 / 3 * (1 - (of - before) / 6)), round(720 * (4 * exponent + 8.25) / 16.5)
            near = curve[max(row - 5, 0) : row + 6, max(column - 12, 0) : column + 13]
            shown += bool((near == torch.tensor(colour)).all(dim=2).any()) or not 0 < row < 280
    assert shown > 12  # of 15, since lines cross
    element(page, "noise").send_keys(Keys.ARROW_LEFT)
    assert text(page, "times") == "x 3.4"
    element(page, "sample").send_keys(Keys.ENTER)
    assert not torch.isin(computed(page, "eps.flat()"), eps).any()
    page.execute_script("run.beta = 30; answer()")
    bce, kld, total = numbers(page, "loss")
    assert text(page, "loss") == f"BCE {bce} + 30 x KLD {kld} = loss {total} nats"
    assert total == pytest.approx(bce + 30 * kld, abs=0.06)


def test_less_noise_is_more_kld_for_every_held_out_digit_and_the_cloud_is_told_apart_in_its_enlargement(
    page, trained, held_out
):
    mu, logvar = trained.encode(held_out[0])
    factors = torch.logspace(-2, 2, 17, base=2).square()[:, None, None]
    kld = 0.5 * (mu.square() + logvar.exp() * factors - 1 - logvar - factors.log()).sum(dim=2)
    assert (kld.diff(dim=0) < 0).all()
    narrow = logvar.amax(dim=1).argmin()
    page.execute_script("show(Float32Array.from(arguments[0]), 'narrow')", held_out[0][narrow].tolist())
    orange = (drawn(page, "cloud", 400, 400)[..., :3] == torch.tensor(ORANGE)).all(dim=2)
    right = orange[200, 200:].nonzero().flatten()  # along the row through mu: both rings
    inner, outer = right[right < 1.5 * right.min()], right[right >= 1.5 * right.min()]
    assert (
        15 < inner.min() and outer.min() - inner.max() > 10 and 1.8 < outer.float().mean() / inner.float().mean() < 2.2
    )
    wide = 8 / float(re.search(r"enlarged (\S+) times", text(page, "scale"))[1])
    assert outer.float().mean() / 400 * wide == pytest.approx(2 * math.exp(logvar[narrow, 0] / 2), rel=0.05)


def test_a_held_out_digit_can_be_encoded_without_a_pointer_and_says_its_class(page, trained, held_out):
    seen = set()
    for _ in range(8):
        element(page, "heldout").send_keys(Keys.ENTER)
        x = computed(page, "x")
        of_class = held_out[0][held_out[1] == int(text(page, "what")[-1])][:10]
        assert (of_class == x).all(dim=1).any()
        torch.testing.assert_close(point(page), trained.encode(x[None])[0][0].clamp(-4, 4), atol=1e-3, rtol=0)
        seen.add(text(page, "what"))
    assert len(seen) > 1


def test_digits_that_are_drawn_as_they_are_keep_their_place(page, trained, held_out):
    """Enlarged tenfold on the pad, 100 held-out digits come back through the page's own preparation."""
    x = held_out[0][torch.randperm(10_000)[:100]]
    pixel = "a[784 * n + 28 * Math.floor(i / 2800) + Math.floor(i % 280 / 10)]"
    drawn_large = f"Float32Array.from({{length: 78400}}, (_, i) => {pixel})"
    codes = computed(page, f"Array.from({{length: 100}}, (_, n) => [...encode(prepare({drawn_large}))[0]]).flat()", x)
    assert (codes.view(100, 2) - trained.encode(x)[0]).norm(dim=1).median() < 0.1


def test_a_stroke_begins_on_the_pad_ends_at_its_edge_and_a_drag_on_the_map_never_draws(page):
    stroke(page, "pad", [(0.3, 0), (0.3, 0.2), (0.9, 0.2)])  # on to the map
    stroke(page, "pad", [(-0.3, 0), (-0.3, 0.2)])
    spots = ink(page)
    assert spots[:, :90].any() and spots[:, 190:].any() and not spots[:, 120:160].any()  # two strokes, never joined
    assert spots[185:205, -5:].all()  # up to the edge
    element(page, "clear").click()
    assert not ink(page).any() and not element(page, "draws").is_displayed()
    over = move(ActionChains(page, duration=0), element(page, "map"), 0, 0).click_and_hold()
    move(move(over, element(page, "pad"), 0, 0), element(page, "pad"), 0.3, 0).release().perform()
    assert not ink(page).any() and point(page)[0] == -4  # z goes on, to the edge of the map


def test_a_ring_drawn_quickly_on_a_slow_machine_leaves_the_ink_and_the_loss_of_one_drawn_slowly(page):
    ring, left = [(0.3 * math.cos(k / 8), 0.35 * math.sin(k / 8)) for k in range(51)], []
    for rate in (1, 4):  # how much slower
        page.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": rate})
        stroke(page, "pad", ring)
        page.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 1})
        left.append((computed(page, "ink"), text(page, "loss")))
        element(page, "clear").click()
    assert torch.equal(left[0][0], left[1][0]) and left[0][1] == left[1][1] and (left[0][0] > 0).sum() > 15_000


def test_other_buttons_than_the_main_one_and_a_second_finger_do_not_draw(page):
    pad = element(page, "pad")
    for button in (1, 2):
        builder = ActionBuilder(page, duration=0)
        builder.pointer_action.move_to(pad).pointer_down(button).move_to(pad, 20, 20).pointer_up(button)
        builder.perform()
    assert not ink(page).any()
    builder, second = ActionBuilder(page, PointerInput("touch", "1"), duration=0), PointerInput("touch", "2")
    builder.devices.append(second)
    for finger, x in ((builder.pointer_action.source, -60), (second, 60)):
        finger.create_pause(0.01 * (x > 0))
        finger.create_pointer_move(duration=0, x=x, y=-60, origin=pad)
        finger.create_pointer_down(button=0)
        finger.create_pointer_move(duration=50, x=x, y=40, origin=pad)
        finger.create_pointer_up(0)
    builder.perform()
    assert ink(page)[:, :120].any() and not ink(page)[:, 160:].any()


def test_a_pen_beats_a_resting_hand_and_what_the_hand_has_drawn_goes(page):
    pad, pen = element(page, "pad"), PointerInput("pen", "3")
    builder = ActionBuilder(page, PointerInput("touch", "4"), duration=0)
    builder.devices.append(pen)
    hand = builder.pointer_action.source
    hand.create_pointer_move(duration=0, x=-80, y=80, origin=pad)
    hand.create_pointer_down(button=0)
    for _ in range(3):
        hand.create_pause(0.05)
    pen.create_pause(0.1)
    pen.create_pointer_move(duration=0, x=60, y=-60, origin=pad)
    pen.create_pointer_down(button=0)
    pen.create_pointer_move(duration=20, x=60, y=0, origin=pad)
    pen.create_pointer_up(0)
    builder.perform()
    assert ink(page)[:, 160:].any() and not ink(page)[:, :120].any()


# The window -----------------------------------------------------------------------------------------------------------
SIZES = "360x740 390x844 745x900 800x900 1024x768 1100x700 1245x900 1280x860 1400x900".split()
BOXES = """return [...document.querySelectorAll('canvas, button, h1, h2, fieldset label, .line')].map(item => {
    const { left, right, top, bottom } = item.getBoundingClientRect();
    return [left, right, top + scrollY, bottom + scrollY]; })"""


@pytest.mark.parametrize("size", SIZES)
def test_nothing_moves_is_cut_or_overlaps_and_the_answer_is_in_view_while_one_draws(page, size):
    width, height = map(int, size.split("x"))
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 400}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page.execute_script("element('plane').scrollIntoView()")
        before = page.execute_script(BOXES)
        for digit in STROKES:
            stroke(page, "pad", STROKES[digit])
            assert page.execute_script(BOXES) == before
        for name in ("dream", "sample", "heldout", "clear"):
            page.execute_script(f"element('{name}').click()")
            assert page.execute_script(BOXES) == before
        beside = ("map", "decoded", "pad") if width > 992 else ("map", "pad") if width > 688 else ("map", "noise")
        bottoms = [element(page, name).rect for name in beside]  # in view together
        page.execute_script("element('plane').scrollIntoView()")
        scrolled = page.execute_script("return scrollY")
        assert max(rect["y"] + rect["height"] for rect in bottoms) - scrolled <= height
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        for (left, right, top, bottom), other in itertools.combinations(before, 2):
            assert right <= other[0] or other[1] <= left or bottom <= other[2] or other[3] <= top
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# Another model, none, no script, no network ---------------------------------------------------------------------------
OTHERS = {  # a change of the page, and what the only sentence then says
    "the template": (r"const run = .*;", "const run = null;", "python quest_12_1.py --device cpu --gallery"),
    "tanh for ReLU": (r"value => Math.max\(value, 0\)", "Math.tanh", "the network of quest_12_1.py alone"),
    "a tensor is missing": (r'"fc3.bias"', '"fc5.bias"', "the network of quest_12_1.py alone"),
    "a policy without scripts": ("'unsafe-inline' data:", "'none'", "JavaScript is off"),
    "a number is NaN": (r'("fc1.bias": ").{16}', r"\1AADAfwAAwH8AAMB/", "the network of quest_12_1.py alone"),
}


@pytest.mark.parametrize(("found", "other", "said"), OTHERS.values(), ids=OTHERS)
def test_without_a_model_or_with_a_network_that_it_does_not_know_the_page_is_one_sentence(
    browser, path, tmp_path, found, other, said
):
    changed, count = re.subn(found, other, path.read_text())
    (tmp_path / "page.html").write_text(changed)
    shown = opened(browser, tmp_path / "page.html")
    assert count == 1 and said in shown and len(shown.splitlines()) == 2
    assert said != OTHERS["the template"][2] or changed == TEMPLATE.read_text()


def test_without_script_the_page_is_one_sentence(browser, path):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        assert re.fullmatch("Walk the plane .*\nThe model is being read.*JavaScript is off.*", opened(browser, path))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
        browser.get("about:blank")


def test_the_page_says_which_run_it_shows_asks_for_no_other_file_and_may_not(page, path, main_job, tmp_path):
    alone = tmp_path / "alone.html"
    shutil.copy(path, alone)
    page.get_log("performance")
    shown = opened(page, alone)
    total = re.search(r"Held-out loss: (\S+)", main_job[1].stdout)[1]
    assert shown.startswith(
        "Walk the plane of a variational autoencoder\nThis neural network has learned from the 60,000 "
    )
    assert "Seed 0, epochs 10: loss 1" in shown and f"held-out loss {total} nats per image." in shown
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} - {"about:blank"} == {alone.as_uri()}
    refused = "return fetch('http://127.0.0.1:9').catch(error => error.message)"
    assert page.execute_script(refused) == "Failed to fetch"
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))
