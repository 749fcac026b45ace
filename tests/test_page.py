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

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed"
)
from browser import (
    computed,
    drawn,
    element,
    gaussian,
    ink,
    marks,
    noise,
    numbers,
    opened,
    point,
    stroke,
    text,
)  # noqa: E402,I001
from selenium.webdriver.common.actions.action_builder import ActionBuilder  # noqa: E402
from selenium.webdriver.common.actions.pointer_input import PointerInput  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

TITLE = "Walk the plane of a variational autoencoder"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="Chromium and its driver are not installed"
)
ORANGE, RED, WHITE, GREY = (
    (255, 149, 0),
    (255, 48, 48),
    (255, 255, 255),
    (0x99, 0x99, 0x99),
)
BLUE, GREEN = (0x6A, 0xB7, 0xFF), (0x5F, 0xD3, 0x8D)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "window-size=1400,1200",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability(
        "goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"}
    )
    with webdriver.Chrome(
        options=options, service=webdriver.ChromeService(DRIVER)
    ) as driver:
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
    assert [
        entry["message"]
        for entry in browser.get_log("browser")
        if entry["level"] == "SEVERE"
    ] == []


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
    codes = computed(
        page,
        EACH_ROW
        + "encode(a.subarray(784 * n, 784 * n + 784)).flatMap(v => [...v])).flat()",
        x,
    )
    torch.testing.assert_close(
        codes.view(200, 4), torch.cat(trained.encode(x), dim=1), atol=1e-4, rtol=0
    )
    images = computed(
        page, EACH_ROW + "[...decode(a.subarray(2 * n, 2 * n + 2))]).flat()", z
    )
    torch.testing.assert_close(
        images.view(200, 784), trained.decode(z), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("beta", [1, 30])
def test_the_page_s_loss_is_loss_terms(page, trained, held_out, beta):
    x = held_out[0][torch.randperm(10_000)[:200]]
    mu, logvar = trained.encode(x)
    recon_x = trained.decode(mu)
    page.execute_script(f"run.beta = {beta}")
    images = "b.subarray(784 * n, 784 * n + 784), a.subarray(784 * n, 784 * n + 784)"
    script = f"{EACH_ROW} lossTerms({images}, c.subarray(4 * n, 4 * n + 2), c.subarray(4 * n + 2, 4 * n + 4))).flat()"
    terms = computed(page, script, x, recon_x, torch.cat((mu, logvar), dim=1)).view(
        200, 3
    )
    for row, got in enumerate(terms):
        expected = quest.loss_terms(
            *(part[row : row + 1] for part in (recon_x, x, mu, logvar)), beta
        )
        torch.testing.assert_close(got, torch.stack(expected), rtol=1e-3, atol=1e-3)


# The map --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cell", [(0, 0), (7, 9), (19, 19), (12, 3)])
def test_a_drag_on_the_map_decodes_the_point_under_the_pointer_which_the_white_ring_shows(
    page, path, cell
):
    column, row = cell
    stroke(page, "map", [(0, 0), ((column + 0.5) / 20 - 0.5, (row + 0.5) / 20 - 0.5)])
    z = torch.tensor([-3.8 + 0.4 * column, 3.8 - 0.4 * row])
    torch.testing.assert_close(point(page), z, atol=0.02, rtol=0)
    canvas = levels(path.with_name("dream_canvas.png"))[
        2 + 30 * row :, 2 + 30 * column :
    ][:28, :28]
    assert (drawn(page, "decoded", 28, 28)[..., 0] - canvas).abs().mean() < 3
    near = (marks(page, WHITE) - z).norm(dim=1)
    assert ((near > 0.38) & (near < 0.42)).sum() > 20


def test_the_views_are_the_gallery_s_canvas_and_codes_with_circles(page, path):
    stroke(page, "map", [(0.49, 0.49)])  # z out of the way
    element(page, "clear").click()
    for name in ("codes", "canvas"):
        element(page, name).click()
        picture = levels(path.with_name(f"dream_{name}.png"), "RGB")[1:-1, 1:-1]
        assert (drawn(page, "map", 600, 600)[..., :3] - picture)[
            40:550, 40:
        ].abs().mean() < 6  # but for the marks
        distances = marks(page, GREY).norm(dim=1)
        assert all(
            ((distances - radius).abs() < 0.03).sum() > 1 for radius in (1, 2, 3)
        )


def test_arrow_keys_move_the_point_and_shift_moves_it_by_a_cell(page):
    stroke(page, "map", [(0, 0)])
    start, expected = point(page), torch.zeros(2)
    for key, step in {
        "RIGHT": (0.08, 0),
        "UP": (0, 0.08),
        "LEFT": (-0.08, 0),
        "DOWN": (0, -0.08),
    }.items():
        for shift, times in (("", 1), (Keys.SHIFT, 5)):
            element(page, "map").send_keys(shift + getattr(Keys, f"ARROW_{key}"))
            expected += times * torch.tensor(step)
            torch.testing.assert_close(point(page) - start, expected, atol=1e-5, rtol=0)


def test_a_drag_that_leaves_the_map_goes_on_along_its_edge_and_does_not_draw(page):
    stroke(page, "map", [(-0.4, 0), (-0.7, 0)])
    assert point(page)[0] == -4 and not ink(page).any()


def test_dream_draws_points_from_the_standard_normal_distribution(page):
    element(page, "dream").click()
    first = point(page)
    element(page, "dream").send_keys(Keys.ENTER)
    assert not torch.equal(point(page), first) and text(
        page, "z"
    ) == "z = ({:.2f}, {:.2f})".format(*point(page))
    z = computed(page, "Array.from({length: 4000}, randn)")
    assert abs(z.mean()) < 0.08 and abs(z.std() - 1) < 0.06
    assert [(z.abs() < k).float().mean().item() for k in (1, 2)] == pytest.approx(
        [0.683, 0.954], abs=0.04
    )


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
def test_a_drawn_digit_lands_among_its_own_kind_and_all_that_is_shown_of_it_is_true(
    page, trained, held_out, digit
):
    stroke(page, "pad", STROKES[digit])
    x = computed(page, "prepare(ink)")[None]
    assert (
        ink(page) - 255 * computed(page, "ink").view(280, 280)
    ).abs().max() < 1  # what is seen is what is encoded
    mu, logvar, samples = gaussian(page)
    torch.testing.assert_close(
        torch.stack((mu, logvar)), torch.cat(trained.encode(x)), atol=1e-3, rtol=0
    )
    nearest = (
        (trained.encode(held_out[0])[0] - mu)
        .norm(dim=1)
        .topk(25, largest=False)
        .indices
    )
    assert (held_out[1][nearest] == digit).sum() > 12
    images, recon, std = (
        trained.decode(samples),
        trained.decode(mu),
        torch.exp(logvar / 2),
    )
    for name, shown in {"input": x[0], "recon": recon, "decoded": recon}.items():
        assert (
            drawn(page, name, 28, 28)[..., 0].flatten() - 255 * shown
        ).abs().max() < 1.1
    tiles = (
        drawn(page, "draws", 140, 56)[..., 0]
        .unfold(0, 28, 28)
        .unfold(1, 28, 28)
        .reshape(10, 784)
    )
    assert (tiles - 255 * images).abs().max() < 1.1
    bce, kld, total = numbers(page, "loss")
    assert [bce, kld] == pytest.approx(terms_of(x, mu, logvar, images)[1:], abs=0.06)
    assert total == pytest.approx(bce + kld, abs=1e-6)
    assert numbers(page, "copy") == pytest.approx(
        [terms_of(x, mu, logvar, x)[1]], abs=0.06
    )
    assert numbers(page, "code") == pytest.approx(
        [*mu.tolist(), *std.tolist()], abs=0.006
    )
    page.execute_script("goTo([-4, 4])")  # z out of the way
    apart = torch.cdist(samples, marks(page, RED))
    assert (
        apart.min(dim=0).values.max() < 0.04 and apart.min(dim=1).values.max() < 0.1
    )  # one may hide another
    noise(page, 2)  # rings that the draws leave free
    rings, width = (
        ((marks(page, ORANGE) - mu) / (4 * std)).norm(dim=1),
        0.03 / (4 * std).min(),
    )
    assert ((rings - 1).abs() < width).sum() > 5 < ((rings - 2).abs() < width).sum()
    assert ((rings - rings.round()).abs() < width).all() and rings.max() < 2.5


def test_the_slider_multiplies_std_and_rings_draws_and_loss_follow_and_new_draws_are_others(
    page, trained
):
    page.execute_script("showDigit(17)")
    (mu, logvar, _), eps, x = (
        gaussian(page),
        computed(page, "eps.flat()").view(10, 2),
        computed(page, "x")[None],
    )
    losses = {}
    for exponent, told in {
        -2: "x 1/4",
        -1: "x 1/2",
        0: "x 1",
        1.25: "x 2.4",
        2: "x 4",
    }.items():
        noise(page, exponent)
        noisy = logvar + 2 * exponent * math.log(2)
        samples = mu + torch.exp(noisy / 2) * eps
        torch.testing.assert_close(
            gaussian(page), (mu, noisy, samples), atol=1e-4, rtol=0
        )
        bce, kld, total = numbers(page, "loss")
        losses[exponent], *parts = terms_of(x, mu, noisy, trained.decode(samples))
        assert [bce, kld] == pytest.approx(
            parts, rel=1e-3, abs=0.06
        ) and total == pytest.approx(bce + kld, abs=1e-6)
        assert text(page, "times") == told
    assert min(losses, key=losses.get) == 0  # what the encoder has learned is best
    element(page, "noise").send_keys(Keys.ARROW_LEFT)
    assert text(page, "times") == "x 3.4"
    element(page, "sample").send_keys(Keys.ENTER)
    assert not torch.isin(computed(page, "eps.flat()"), eps).any()
    page.execute_script("run.beta = 30; answer()")
    bce, kld, total = numbers(page, "loss")
    assert text(page, "loss") == f"BCE {bce} + 30 x KLD {kld} = loss {total} nats"
    assert total == pytest.approx(bce + 30 * kld, abs=1e-6)


def test_the_curves_show_bce_kld_and_loss_at_each_noise_and_the_least_loss_near_the_encoder_s_own(
    page, trained
):
    page.execute_script("showDigit(17)")
    WebDriverWait(page, 10).until(
        lambda page: page.execute_script("return curve.length === 17")
    )
    (mu, logvar, _), eps, x = (
        gaussian(page),
        computed(page, "steady.flat()").view(-1, 2),
        computed(page, "x")[None],
    )
    noises = [logvar + 2 * math.log(2) * (step / 4 - 2) for step in range(17)]
    terms = torch.tensor(
        [
            terms_of(x, mu, noisy, trained.decode(mu + torch.exp(noisy / 2) * eps))
            for noisy in noises
        ]
    )
    torch.testing.assert_close(
        computed(page, "curve.flat()").view(17, 3), terms, rtol=1e-4, atol=0.01
    )
    changes, lines = terms - terms[8], drawn(page, "curve", 720, 300)[..., :3]
    heights = 260 - 235 * (changes - changes.min()) / (changes.max() - changes.min())
    for colour, line in zip((WHITE, BLUE, GREEN), heights.T, strict=True):
        for step in (1, 13, 15):  # where the curves are apart
            near = lines[
                :, 43 * step + 6 : 43 * step + 27
            ]  # as wide as a gap between dashes
            shown = (near == torch.tensor(colour)).all(dim=2).nonzero()[:, 0]
            assert (shown - line[step]).abs().min() < 3
    assert abs(terms[:, 0].argmin() - 8) <= 2


@pytest.mark.parametrize("digit", [0, 17, 42, 71])
def test_the_cloud_is_seen_inside_of_the_white_ring_and_its_rings_enlarged_to_the_scale_that_is_told(
    page, digit
):
    page.execute_script(f"showDigit({digit})")
    mu, logvar, _ = gaussian(page)
    std, wide = torch.exp(logvar / 2), numbers(page, "scale")[0]
    assert (marks(page, ORANGE) - mu).norm(dim=1).max() < 0.37
    assert wide == pytest.approx(18 * std.max().item(), rel=0.06)
    down, right = (
        (drawn(page, "cloud", 400, 400)[..., :3] == torch.tensor(ORANGE))
        .all(dim=2)
        .nonzero()
        .unbind(dim=1)
    )
    rings = (torch.stack((right - 199.5, 199.5 - down), dim=1) * wide / 400 / std).norm(
        dim=1
    )
    assert ((rings - rings.round()).abs() < 0.2).all() and set(
        rings.round().tolist()
    ) == {1, 2}


def test_a_held_out_digit_can_be_encoded_without_a_pointer_and_says_its_class(
    page, trained, held_out
):
    seen = set()
    for _ in range(8):
        element(page, "heldout").send_keys(Keys.ENTER)
        x = computed(page, "x")
        of_class = held_out[0][held_out[1] == int(text(page, "what")[-1])][:10]
        assert (of_class == x).all(dim=1).any()
        torch.testing.assert_close(
            point(page), trained.encode(x[None])[0][0].clamp(-4, 4), atol=1e-3, rtol=0
        )
        seen.add(text(page, "what"))
    assert len(seen) > 1


def test_digits_that_are_drawn_as_they_are_keep_their_place(page, trained, held_out):
    """Enlarged tenfold on the pad, 100 held-out digits come back through the page's own preparation."""
    x = held_out[0][torch.randperm(10_000)[:100]].view(100, 28, 28)
    put = """(() => { const codes = []; for (let n = 0; n < 100; n++) {
        const large = ink.map((_, i) => a[784 * n + 28 * Math.floor(i / 2800) + Math.floor(i % 280 / 10)]);
        codes.push(...encode(prepare(large))[0]);
    } return codes; })()"""
    distances = (
        computed(page, put, x).view(100, 2) - trained.encode(x.flatten(1))[0]
    ).norm(dim=1)
    assert distances.median() < 0.1


def test_a_stroke_begins_on_the_pad_alone_reaches_its_edge_and_is_never_joined_to_another(
    page,
):
    stroke(page, "pad", [(0, -0.7), (0, 0), (0.2, 0.2)])  # begins outside
    assert not ink(page).any()
    page.execute_script(
        "getSelection().selectAllChildren(document.body)"
    )  # which must not be dragged away
    stroke(page, "pad", [(-0.3, 0.3), (-0.3, -0.7)])
    stroke(page, "pad", [(0.3, 0.3), (0.3, 0.2)])
    spots = ink(page) > 0
    assert spots[0, 40:72].any() and spots[:, 200:].any() and not spots[:, 90:190].any()
    element(page, "clear").click()
    assert not ink(page).any() and not element(page, "answer").is_displayed()


def test_a_quick_stroke_keeps_all_of_its_points_also_on_a_slow_machine(page):
    circle, seen = (
        [(0.3 * math.cos(k / 8), 0.3 * math.sin(k / 8)) for k in range(51)],
        [],
    )
    for slower in (1, 6):
        element(page, "clear").click()
        page.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": slower})
        stroke(page, "pad", circle, seconds=0.4)
        page.execute_cdp_cmd("Emulation.setCPUThrottlingRate", {"rate": 1})
        seen.append(ink(page))
    from_middle = (
        torch.cartesian_prod(*[torch.arange(280) - 139.5] * 2)
        .norm(dim=1)
        .view(280, 280)
    )
    assert (
        torch.equal(*seen)
        and ((seen[0] == 255) == (abs(from_middle - 84) < 13)).float().mean() > 0.98
    )


def test_other_buttons_than_the_main_one_do_not_draw(page):
    for button in (1, 2):
        builder = ActionBuilder(page, duration=0)
        builder.pointer_action.move_to(element(page, "pad")).pointer_down(
            button
        ).move_by(20, 20).pointer_up(button)
        builder.perform()
    assert not ink(page).any()


@pytest.mark.parametrize("second", ["touch", "pen"])
def test_a_second_finger_does_not_draw_and_a_pen_takes_over_from_a_resting_hand_which_leaves_no_ink(
    page, second
):
    builder, other = (
        ActionBuilder(page, PointerInput("touch", "first"), duration=0),
        PointerInput(second, second),
    )
    builder.devices.append(other)
    for device, x, pauses in ((builder.pointer_action.source, -60, 0), (other, 60, 4)):
        for _ in range(pauses):  # the first has drawn by then, and is still down
            device.create_pause(0.05)
        device.create_pointer_move(duration=0, x=x, y=-60, origin=element(page, "pad"))
        device.create_pointer_down(button=0)
        device.create_pointer_move(duration=50, x=x, y=40, origin=element(page, "pad"))
    builder.perform()
    builder.clear_actions()  # both go up
    assert ink(page)[:, :120].any() == (second == "touch") != ink(page)[:, 160:].any()


# The window -----------------------------------------------------------------------------------------------------------
SIZES = "360x740 390x844 745x900 800x900 1024x768 1100x700 1245x900 1280x860 1400x900".split()
ITEMS = "canvas, button, #noise, h1, h2, label, output, #scale"
BOXES = f"""return Array.from(document.querySelectorAll("{ITEMS}"), item => {{
    const {{ left, right, top, bottom }} = item.getBoundingClientRect(); return [left, right, top, bottom]; }})"""


@pytest.mark.parametrize("size", SIZES)
def test_nothing_moves_is_cut_or_overlaps_and_the_answer_is_in_view_while_one_draws(
    page, size
):
    width, height = map(int, size.split("x"))
    screen = {
        "width": width,
        "height": height,
        "deviceScaleFactor": 1,
        "mobile": width < 400,
    }
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page.execute_script("element('encode').scrollIntoView()")
        before = page.execute_script(BOXES)
        for digit in STROKES:
            stroke(page, "pad", STROKES[digit])
            assert page.execute_script(BOXES) == before
        for name in ("dream", "sample", "heldout", "clear"):
            page.execute_script(f"element('{name}').click()")
            assert page.execute_script(BOXES) == before
        for top_of, seen in (
            ("encode", ("pad", "map", "decoded")),
            ("map", ("map", "noise")),
        ):
            page.execute_script(f"element('{top_of}').scrollIntoView()")
            scrolled, rects = (
                page.execute_script("return scrollY"),
                [element(page, name).rect for name in seen],
            )
            assert all(
                -1 <= rect["y"] - scrolled <= height - rect["height"] for rect in rects
            )
        assert (
            page.execute_script("return document.documentElement.scrollWidth") <= width
        )
        for (left, right, top, bottom), other in itertools.combinations(before, 2):
            assert (
                right <= other[0]
                or other[1] <= left
                or bottom <= other[2]
                or other[3] <= top
            )
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# Another model, none, no script, no network ---------------------------------------------------------------------------
OTHERS = {  # a change of the page, and what the only sentence then says
    "the template": (
        r"const run = .*;",
        "const run = null;",
        "python quest_12_1.py --device cpu --gallery",
    ),
    "tanh for ReLU": (
        r"value => Math.max\(value, 0\)",
        "Math.tanh",
        "the network of quest_12_1.py alone",
    ),
    "a tensor is missing": (
        r'"fc3.bias"',
        '"fc5.bias"',
        "the network of quest_12_1.py alone",
    ),
    "a strict policy": (
        "default-src 'unsafe-inline' data:",
        "default-src 'none'",
        "the page lacks JavaScript",
    ),
    "a number is NaN": (
        r'("fc1.bias": ").{16}',
        r"\1AADAfwAAwH8AAMB/",
        "the network of quest_12_1.py alone",
    ),
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
        assert re.fullmatch(
            TITLE + "\n.*the page lacks JavaScript.*", opened(browser, path)
        )
    finally:
        browser.execute_cdp_cmd(
            "Emulation.setScriptExecutionDisabled", {"value": False}
        )
        browser.get("about:blank")


def test_the_page_says_which_run_it_shows_asks_for_no_other_file_and_may_not(
    page, path, main_job, tmp_path
):
    alone = tmp_path / "alone.html"
    shutil.copy(path, alone)
    page.get_log("performance")
    shown = opened(page, alone)
    total = re.search(r"Held-out loss: (\S+)", main_job[1].stdout)[1]
    assert shown.startswith(
        f"{TITLE}\nThis neural network has learned from MNIST's 60,000 handwritten digits"
    )
    assert re.search(
        rf"Seed 0, epochs 10, averages: loss 1\d\d.\d\d, held-out loss {total}: BCE .*\.$",
        shown,
    )
    messages = [
        json.loads(entry["message"])["message"] for entry in page.get_log("performance")
    ]
    asked = {
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in asked if not url.startswith("data:")} - {"about:blank"} == {
        alone.as_uri()
    }
    refused = "return fetch('http://127.0.0.1:9').catch(error => error.message)"
    assert page.execute_script(refused) == "Failed to fetch"
    assert any(
        "Content Security Policy" in entry["message"]
        for entry in page.get_log("browser")
    )
