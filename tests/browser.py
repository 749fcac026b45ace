"""What a person does with the page in Chromium, and what can be seen and heard of it.

`Page` is the page in the hands of a person. It presses, draws, walks and types as the
browser's own devices do, by the DevTools protocol. It is read by what is in sight: the
pixels of a canvas, words, boxes, and by the functions that the page has for tests.
"""

import base64
import contextlib
import io
import json
import math
import re
import shutil
import urllib.request

import torch
import websocket
from PIL import Image
from selenium import webdriver
from torchvision.transforms.functional import pil_to_tensor

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
WINDOW = (1366, 650)  # where a test is not about sizes; small, to be quick
SCRIPT_LIMIT = 600  # seconds for one script in the page; a slow machine is no failure

PICTURES = ("pad", "map", "redrawn")
SIDE = 28  # pixels of a picture's side, in the model


@contextlib.contextmanager
def chromium():
    """Start Chromium without a window; yield the Page in it."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "no-proxy-server",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(DRIVER)
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.set_script_timeout(SCRIPT_LIMIT)
        driver.set_page_load_timeout(SCRIPT_LIMIT)
        with contextlib.closing(devtools_of(driver)) as devtools:
            yield Page(driver, devtools)


def devtools_of(driver):
    """Connect to the DevTools of the driver's only page, without any proxy."""
    address = driver.capabilities["goog:chromeOptions"]["debuggerAddress"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{address}/json") as answer:
        targets = json.load(answer)
    url = next(
        each["webSocketDebuggerUrl"] for each in targets if each["type"] == "page"
    )
    return websocket.create_connection(
        url,
        suppress_origin=True,
        http_no_proxy=["127.0.0.1", "localhost"],
        skip_utf8_validation=True,  # it is in Python: a second for 4 MB
    )


def as_text(tensor):
    """Encode the bytes of a tensor for JavaScript."""
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def from_text(text, dtype):
    """Decode the bytes of a tensor that JavaScript has sent: flat."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)


# What is read off each piece of text: its colour on those that lie below it.
CONTRASTS = """
const canvas = document.createElement("canvas");
canvas.width = canvas.height = 1;
const on = canvas.getContext("2d", { willReadFrequently: true });
const over = colours => {  // what is seen of colours with their opacity, the last on top
    on.clearRect(0, 0, 1, 1);
    for (const [colour, alpha] of colours) {
        on.globalAlpha = alpha;
        on.fillStyle = colour;
        on.fillRect(0, 0, 1, 1);
    }
    return on.getImageData(0, 0, 1, 1).data;
};
const light = data => {
    const [r, g, b] = [...data].map(byte => {
        const share = byte / 255;
        return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = {};
for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    const text = node.textContent.trim(), owner = node.parentElement;
    const seen = owner.checkVisibility({ visibilityProperty: true });
    if (!text || !seen || owner.closest(".unseen, :disabled, script, style")) continue;
    let alpha = 1;
    const grounds = [];
    for (let each = owner; each; each = each.parentElement) {
        const style = getComputedStyle(each);
        alpha *= style.opacity;
        grounds.unshift([style.backgroundColor, 1]);
    }
    const colour = getComputedStyle(owner).color;
    const [a, b] = [light(over([...grounds, [colour, alpha]])), light(over(grounds))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found[text] = Math.min(ratio, found[text] ?? 21);
}
return found;
"""


class Page:
    """The page in the browser, in the hands of a person who asks for less motion.

    Places on an element are shares of its width and height from its upper left corner.
    """

    def __init__(self, driver, devtools):
        self.driver = driver
        self.devtools = devtools
        self.path = None
        self.sent = 0
        self.set = {}
        self.set_media()
        self.set_size(*WINDOW)

    # ---- Opening ---------------------------------------------------------------------
    def load(self, path):
        """Load the file at `path`; return the text that is in sight then."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(path.as_uri())
        self.path = None  # not open before it shows its map
        return self.words()

    def open(self, path):
        """Load the page at `path`, or say in words that it did not open."""
        words = self.load(path)
        opened = self.script("return document.getElementById('map')?.checkVisibility()")
        assert opened, f"{path.name} did not open. It says: {words!r} {self.errors()}"
        self.path = path
        self.frame()

    def reset(self, path):
        """Show `path` with an empty pad, step 1 and the whole map; open it if need be.

        What stays from before: the last dreams, and which digit of a class is next.
        """
        self.set_media()
        self.set_size(*WINDOW)
        if self.path != path:
            self.open(path)
        self.move_away()
        self.wait(
            """for (const id of ["clear", "step-1"]) document.getElementById(id).click();
            document.querySelector("details").open = false;
            scrollTo(0, 0);
            document.activeElement.blur();
            await frame();
            await frame();"""
        )

    def errors(self):
        """Return the errors that the page has reported since this was last asked."""
        entries = self.driver.get_log("browser")
        return [each["message"] for each in entries if each["level"] == "SEVERE"]

    # ---- The machine that shows the page ---------------------------------------------
    def send(self, *commands):
        """Send DevTools commands, (method, parameters) each, without waiting between
        them; return their results when all have been answered."""
        first = self.sent + 1
        for method, parameters in commands:
            self.sent += 1
            message = {"id": self.sent, "method": method, "params": parameters}
            self.devtools.send(json.dumps(message))
        answers = {}
        while len(answers) < len(commands):
            answer = json.loads(self.devtools.recv())
            if answer.get("id", 0) < first:
                continue  # an event, or the answer to an earlier command
            assert "error" not in answer, f"DevTools refused: {answer}, {commands}"
            answers[answer["id"]] = answer["result"]
        return [answers[number] for number in sorted(answers)]

    def set_once(self, method, parameters):
        """Send a setting, unless it is set already."""
        if self.set.get(method) != parameters:
            self.send((method, parameters))
            self.set[method] = parameters

    def set_media(self, motion="reduce", scheme="dark"):
        """Set what the system asks of pages: motion "reduce" or "no-preference"."""
        features = {"prefers-reduced-motion": motion, "prefers-color-scheme": scheme}
        named = [{"name": name, "value": value} for name, value in features.items()]
        self.set_once("Emulation.setEmulatedMedia", {"features": named})

    def set_size(self, width, height, sharp=1):
        """Set the window's size in CSS pixels, and device pixels for one of them."""
        screen = {"width": width, "height": height, "deviceScaleFactor": sharp}
        self.set_once("Emulation.setDeviceMetricsOverride", {**screen, "mobile": False})

    def set_slowness(self, times):
        """Let the processor be so many times as slow."""
        self.send(("Emulation.setCPUThrottlingRate", {"rate": times}))

    def set_script(self, allowed):
        """Allow or forbid JavaScript to the pages that are loaded from now on."""
        self.send(("Emulation.setScriptExecutionDisabled", {"value": not allowed}))

    def skip(self, seconds):
        """Let the page's clock jump ahead."""
        self.script(
            """const [ahead, now] = [1000 * arguments[0], performance.now];
            const later = requestAnimationFrame;
            performance.now = () => now.call(performance) + ahead;
            window.requestAnimationFrame = act => later(time => act(time + ahead));""",
            seconds,
        )

    # ---- Scripts ---------------------------------------------------------------------
    def script(self, text, *arguments):
        """Return what JavaScript returns; `await` may be in it.

        By DevTools, which answers within a millisecond or two; the driver takes ten.
        """
        expression = f"(async function () {{ {text} }})(...{json.dumps(arguments)})"
        given = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        (answer,) = self.send(("Runtime.evaluate", given))
        failed = answer.get("exceptionDetails")
        assert failed is None, f"a script failed in the page: {failed}"
        return answer["result"].get("value")

    def wait(self, text, *arguments):
        """Run JavaScript that awaits frame() or seconds(s); return what it returns."""
        return self.script(
            f"""const frame = () => new Promise(requestAnimationFrame);
            const seconds = s => new Promise(act => setTimeout(act, 1000 * s));
            {text}""",
            *arguments,
        )

    def frame(self):
        """Wait until what was asked for has been drawn."""
        self.wait("await frame(); await frame();")

    def settle(self):
        """Wait until the map has not changed for 0.3 seconds."""
        self.wait(
            """const map = document.getElementById("map");
            let last = "", since = performance.now();
            while (performance.now() - since < 300) {
                await frame();
                const now = map.toDataURL();
                if (now !== last) [last, since] = [now, performance.now()];
            }"""
        )

    def compute(self, expression, **tensors):
        """Return what JavaScript makes of float tensors, as a flat float tensor.

        `expression` finds each under its name, as a Float32Array, row(x, n) as a row of
        x, and gives numbers.
        """
        given = "".join(
            f"const {name} = read(arguments[{k}]);" for k, name in enumerate(tensors)
        )
        widths = "".join(f"[{n}, {t.shape[-1]}]," for n, t in tensors.items())
        text = self.script(
            f"""const read = text =>
                new Float32Array(Uint8Array.fromBase64(text).buffer);
            {given}
            const widths = new Map([{widths}]);
            const row = (tensor, n) => {{
                const width = widths.get(tensor);
                return tensor.subarray(width * n, width * (n + 1));
            }};
            const numbers = Float32Array.from({expression});
            return new Uint8Array(numbers.buffer).toBase64();""",
            *map(as_text, tensors.values()),
        )
        return from_text(text, torch.float32)

    # ---- The functions that the page has for tests -----------------------------------
    def encode(self, x):
        """Return what the page encodes x: (N, PIXELS) as: mu and logvar, (N, 4)."""
        pairs = "encode(row(x, n)).flatMap(pair => [...pair])"
        return self.rows(pairs, x=x).view(len(x), 4)

    def decode(self, z):
        """Return what the page decodes z: (N, 2) into: (N, PIXELS)."""
        return self.rows("[...decode(row(z, n))]", z=z).view(len(z), -1)

    def loss_terms(self, recon, x, mu, logvar):
        """Return loss, BCE and KLD of each row of four tensors: (N, 3)."""
        terms = "lossTerms(row(recon, n), row(x, n), row(mu, n), row(logvar, n))"
        named = {"recon": recon, "x": x, "mu": mu, "logvar": logvar}
        return self.rows(terms, **named).view(len(x), 3)

    def rows(self, expression, **tensors):
        """Return the numbers that JavaScript makes of each row n of tensors, flat."""
        count = len(next(iter(tensors.values())))
        each = f"Array.from({{ length: {count} }}, (_, n) => {expression}).flat()"
        return self.compute(each, **tensors)

    def shown(self):
        """Return x, mu and logvar in hand, three tensors."""
        values = self.script("return shown()")
        return [torch.tensor(values[name]) for name in ("x", "mu", "logvar")]

    def costs(self):
        """Return the costs in nats against the encoder's choice: {name: number}."""
        self.frame()
        return {
            name: float(self.text(f"cost-{name}").replace("\u2212", "-"))
            for name in ("picture", "cloud", "together")
        }

    # ---- Seeing and hearing ----------------------------------------------------------
    def text(self, name):
        """Return the text of the element with this id."""
        return self.script(
            "return document.getElementById(arguments[0]).textContent", name
        )

    def words(self):
        """Return the text that is in sight, a piece a line."""
        return self.script(
            """const walk = document.createTreeWalker(document, NodeFilter.SHOW_TEXT);
            const pieces = [];
            for (let node = walk.nextNode(); node; node = walk.nextNode()) {
                const text = node.textContent.trim().replace(/\\s+/g, " ");
                const seen = node.parentElement.checkVisibility(
                    { visibilityProperty: true, opacityProperty: true });
                const range = document.createRange();
                range.selectNodeContents(node);
                const { width, height } = range.getBoundingClientRect();
                const box = node.parentElement.getBoundingClientRect();
                const clipped = box.width <= 1 && box.height <= 1;
                if (text && seen && width && height && !clipped) pieces.push(text);
            }
            return pieces.join("\\n");"""
        )

    def all_words(self):
        """Return all words, in sight or not, with those for who does not see."""
        return self.script(
            """const words = [document.title];
            for (const each of document.querySelectorAll("*:not(script, style)")) {
                for (const name of ["aria-label", "title", "alt"]) {
                    words.push(each.getAttribute(name) ?? "");
                }
                for (const child of each.childNodes) {
                    if (child.nodeType === Node.TEXT_NODE) words.push(child.data);
                }
            }
            return words.join(" ").replace(/\\s+/g, " ");"""
        )

    def bars(self):
        """Return the bars of the costs: {name: (length from 0 to 1, pointed)}."""
        return self.script(
            """const bars = {};
            for (const name of ["picture", "cloud", "together"]) {
                const bar = document.getElementById(`bar-${name}`);
                const half = bar.parentElement.getBoundingClientRect().width / 2;
                bars[name] = [bar.getBoundingClientRect().width / half,
                    getComputedStyle(bar).clipPath !== "none"];
            }
            return bars;"""
        )

    def contrasts(self):
        """Return how much each piece of text stands out: {text: ratio from 1 to 21}."""
        return self.script(CONTRASTS)

    def ground(self):
        """Return how light the page's ground is, from 0 to 255."""
        colour = self.script(
            "return getComputedStyle(document.documentElement).backgroundColor"
        )
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    def pixels(self, name):
        """Return the pixels of a canvas, from 0 to 255: (height, width, 4)."""
        width, height, text = self.script(
            """const canvas = document.getElementById(arguments[0]);
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            return [width, height, new Uint8Array(data.buffer).toBase64()];""",
            name,
        )
        return from_text(text, torch.uint8).view(height, width, 4).float()

    def seen(self, name):
        """Return what is seen of an element, from 0 to 255: (height, width, 3)."""
        left, top, width, height = self.script(
            """const box = document.getElementById(arguments[0]).getBoundingClientRect();
            return [box.left, box.top, box.width, box.height];""",
            name,
        )
        box = {"x": left, "y": top, "width": width, "height": height, "scale": 1}
        (shot,) = self.send(("Page.captureScreenshot", {"clip": box}))
        picture = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
        return pil_to_tensor(picture.convert("RGB")).permute(1, 2, 0).float()

    def small_pictures(self, name):
        """Return the small pictures of a row, from 0 to 1: (count, PIXELS)."""
        texts = self.script(
            """return [...document.querySelectorAll(`#${arguments[0]} canvas`)].map(
                canvas => new Uint8Array(canvas.getContext("2d").getImageData(
                    0, 0, canvas.width, canvas.height).data.buffer).toBase64());""",
            name,
        )
        pixels = torch.stack([from_text(text, torch.uint8) for text in texts])
        return pixels.view(len(texts), -1, 4)[..., 0].float() / 255

    def image(self, name):
        """Return the grey picture of a canvas, from 0 to 1: (PIXELS,).

        A larger canvas shows each pixel as a square: its middle is taken.
        """
        grey = self.pixels(name)[..., 0] / 255
        step = len(grey) // SIDE
        return grey[step // 2 :: step, step // 2 :: step].flatten()

    def ink(self):
        """Return how much ink there is on the pad, from 0 to 1: (height, width)."""
        return self.pixels("pad")[..., 3] / 255

    def written(self, name):
        """Return where words are written on a canvas when the window's size is told:
        {words: [right, down]}, as shares of its width and height."""
        return self.wait(
            """const canvas = document.getElementById(arguments[0]), places = {};
            const on = canvas.getContext("2d"), { width, height } = canvas;
            on.fillText = (words, left, top) => {
                const point = new DOMPoint(left, top);
                const { x, y } = on.getTransform().transformPoint(point);
                places[words] = [x / width, y / height];
            };
            dispatchEvent(new Event("resize"));
            await frame();
            await frame();
            delete on.fillText;
            dispatchEvent(new Event("resize"));
            await frame();
            return places;""",
            name,
        )

    def listen(self):
        """Begin to count how often something is said to a person who does not see."""
        self.script(
            """window.sayings = 0;
            for (const each of document.querySelectorAll("[aria-live]")) {
                new MutationObserver(() => sayings++).observe(
                    each, { childList: true, characterData: true, subtree: true });
            }"""
        )

    def heard(self):
        """Wait until nothing more is said; return what was said last, and how often
        something was said since this was last asked."""
        return self.wait(
            """const live = () => [...document.querySelectorAll("[aria-live]")]
                .map(each => each.textContent).join(" ").trim();
            let last = live();
            for (let quiet = 0; quiet < 5; quiet++) {
                await seconds(0.1);
                if (live() !== last) [last, quiet] = [live(), 0];
            }
            const count = window.sayings;
            window.sayings = 0;
            return [last, count];"""
        )

    def refused(self):
        """Try to load something by fetch, as a picture and as a script; return of which
        kinds the page's own policy has refused it."""
        refused = self.wait(
            """const refused = [], away = "http://127.0.0.1:9/";
            document.addEventListener("securitypolicyviolation",
                event => refused.push(event.effectiveDirective));
            await fetch(away).catch(() => 0);
            new Image().src = away;
            const script = document.createElement("script");
            script.src = away;
            document.head.append(script);
            await seconds(0.1);
            script.remove();
            return refused;"""
        )
        self.errors()  # they tell of what was refused
        return {each.partition("-src")[0] for each in refused}

    def buttons(self, within="page"):
        """Return the buttons within an element that can be pressed: ids, or else what
        is written on them."""
        return self.script(
            """const buttons = document.querySelectorAll(`#${arguments[0]} button`);
            return [...buttons].filter(each =>
                !each.disabled && each.checkVisibility({ visibilityProperty: true })
            ).map(each => each.id || each.textContent);""",
            within,
        )

    def names(self):
        """Return what a screen reader tells of what can be used: [(role, name), ...]"""
        (tree,) = self.send(("Accessibility.getFullAXTree", {}))
        told = []
        for node in tree["nodes"]:
            if node["ignored"]:
                continue
            properties = {
                each["name"]: each["value"].get("value")
                for each in node.get("properties", [])
            }
            role = node["role"]["value"]
            if properties.get("focusable") and role != "RootWebArea" or role == "image":
                told.append((role, node.get("name", {}).get("value", "")))
        return told

    def tabbed(self, times):
        """Press the Tab key so often; return the controls in sight, those that the
        focus came to, and those of them on which it cannot be seen: three sets."""
        self.script(
            """document.activeElement.blur();
            getSelection().removeAllRanges();
            const name = each => each.id || each.tagName.toLowerCase();
            window.tabbed = { name, reached: [], unseen: [] };
            tabbed.note = ({ target }) => {
                tabbed.reached.push(name(target));
                if (getComputedStyle(target).outlineStyle === "none") {
                    tabbed.unseen.push(name(target));
                }
            };
            document.addEventListener("focusin", tabbed.note);"""
        )
        self.type(*["Tab"] * times)
        return map(
            set,
            self.script(
                """document.removeEventListener("focusin", tabbed.note);
                const controls = "button, summary, a, input";
                const wanted = [...document.querySelectorAll(controls)].filter(each =>
                    !each.disabled && each.checkVisibility({ visibilityProperty: true }));
                return [wanted.map(tabbed.name), tabbed.reached, tabbed.unseen];"""
            ),
        )

    def layout(self):
        """Return how the page lies in the window: a dict.

        boxes: {id: [left, top, width, height]} of the pictures and controls in sight.
        covered: ids of controls in the window that something lies over.
        cut: ids or words of what is wider than its box.
        width, height: of all of the page, with what one would have to scroll to.
        """
        return self.script(
            """const boxes = {}, covered = [], cut = [];
            const seen = each => each.checkVisibility({ visibilityProperty: true });
            for (const each of document.querySelectorAll("canvas, button, summary")) {
                if (!each.id && each.tagName !== "SUMMARY" || !seen(each)) continue;
                const { left, top, width, height } = each.getBoundingClientRect();
                const name = each.id || "summary";
                boxes[name] = [left, top, width, height];
                const over = document.elementFromPoint(left + width / 2, top + height / 2);
                if (over && !each.contains(over)) covered.push(name);
            }
            for (const each of document.querySelectorAll("h1, h2, button, p, summary")) {
                if (!seen(each) || each.clientWidth <= 1) continue;
                if (each.scrollWidth <= each.clientWidth + 1) continue;
                cut.push(each.id || each.textContent.trim());
            }
            const { scrollWidth, scrollHeight } = document.documentElement;
            return { boxes, covered, cut, width: scrollWidth, height: scrollHeight };"""
        )

    # ---- Acting ----------------------------------------------------------------------
    def at(self, name, place):
        """Return where a place on an element is in the window: {x, y}."""
        left, top, width, height = self.script(
            """const { left, top, width, height } = document
                .getElementById(arguments[0]).getBoundingClientRect();
            return [left, top, width, height];""",
            name,
        )
        return {"x": left + width * place[0], "y": top + height * place[1]}

    def dreams(self):
        """Return the places of the dreams in the row: (count, 2)."""
        return torch.tensor(self.script("return state.dreams.map(z => [...z]);"))

    def headings(self):
        """Return the headings that a screen reader tells of."""
        (tree,) = self.send(("Accessibility.getFullAXTree", {}))
        return [
            node.get("name", {}).get("value", "")
            for node in tree["nodes"]
            if not node["ignored"] and node["role"]["value"] == "heading"
        ]

    def press(self, *names):
        """Press buttons with the mouse, one after another; return the page.

        A button is named by its id, or by what is written on it.
        """
        for name in names:
            x, y, hindrance = self.script(
                """const named = document.getElementById(arguments[0]);
                const button = named ?? [...document.querySelectorAll("button")]
                    .filter(each => each.checkVisibility({ visibilityProperty: true }))
                    .find(each => each.textContent === arguments[0]);
                if (!button) return [0, 0, "there is none"];
                button.scrollIntoView({ block: "nearest" });
                const box = button.getBoundingClientRect();
                const x = box.left + box.width / 2, y = box.top + box.height / 2;
                const over = document.elementFromPoint(x, y);
                const free = button.contains(over) ? null
                    : `${over?.outerHTML.slice(0, 80)} lies over it`;
                return [x, y, button.disabled ? "it is disabled" : free];""",
                name,
            )
            assert hindrance is None, f"'{name}' cannot be pressed: {hindrance}"
            place = {"x": x, "y": y}
            self.mouse(("mousePressed", place), ("mouseReleased", place))
        return self

    def click(self, *names):
        """Press buttons wherever they are, as if nothing could lie over them."""
        for name in names:
            self.script("document.getElementById(arguments[0]).click()", name)

    def mouse(self, *events, kind="mouse", button="left", wait=False):
        """Do what a mouse or a pen does: (type of DevTools' mouse event, {x, y}) each.

        They are sent as a hand does, without waiting, or with `wait` one by one.
        """
        buttons = {"none": 0, "left": 1, "right": 2, "middle": 4}[button]
        commands = [
            (
                "Input.dispatchMouseEvent",
                {
                    "type": type_of,
                    **place,
                    "button": button,
                    "buttons": 0 if type_of == "mouseReleased" else buttons,
                    "clickCount": 1,
                    "pointerType": kind,
                },
            )
            for type_of, place in events
        ]
        for group in [[each] for each in commands] if wait else [commands]:
            self.send(*group)

    def finger(self, what, *places):
        """Let fingers "Start", "Move", "End" or "Cancel", at {x, y} each."""
        points = [{"id": number, **place} for number, place in enumerate(places)]
        parameters = {"type": f"touch{what}", "touchPoints": points}
        self.send(("Input.dispatchTouchEvent", parameters))

    def drag(self, name, places, kind="mouse", button="left", wait=False):
        """Drag through places of an element: kind "mouse", "pen" or "touch"."""
        first, *ways = [self.at(name, place) for place in places]
        if kind == "touch":
            self.finger("Start", first)
            for way in ways:
                self.finger("Move", way)
            self.finger("End")
        else:
            down = ("mousePressed", first)
            moves = [("mouseMoved", way) for way in ways]
            up = ("mouseReleased", (ways or [first])[-1])
            self.mouse(down, *moves, up, kind=kind, button=button, wait=wait)
        self.frame()

    def hover(self, name, place):
        """Move the mouse to a place, without pressing."""
        self.mouse(("mouseMoved", self.at(name, place)), button="none")
        self.frame()

    def open_symbols(self):
        """Open what is folded; reset() folds it again."""
        self.script("document.querySelector('details').open = true")

    def move_away(self):
        """Move the mouse into the window's corner."""
        self.mouse(("mouseMoved", {"x": 1, "y": 1}), button="none")

    def wheel(self, name, place, down):
        """Turn the wheel over a place by so many pixels: above 0 is down."""
        turn = {"type": "mouseWheel", **self.at(name, place), "deltaX": 0}
        self.send(("Input.dispatchMouseEvent", {**turn, "deltaY": down}))
        self.frame()

    def type(self, *keys, shift=False):
        """Press keys, "ArrowLeft", "Enter" or "+" each, where the focus is."""
        commands = []
        for key in keys:
            common = {"key": key, "modifiers": 8 if shift else 0}
            common |= KEYS.get(key, {})
            text = {"text": key} if len(key) == 1 else {}
            text = {"text": "\r"} if key == "Enter" else text
            commands.append(
                ("Input.dispatchKeyEvent", common | {"type": "keyDown"} | text)
            )
            commands.append(("Input.dispatchKeyEvent", common | {"type": "keyUp"}))
        self.send(*commands)

    def focus(self, name):
        """Give an element the focus, as the Tab key does."""
        self.script("document.getElementById(arguments[0]).focus()", name)


KEYS = {
    key: {"code": key, "windowsVirtualKeyCode": number}
    for key, number in {
        "Tab": 9,
        "Enter": 13,
        "Escape": 27,
        "ArrowLeft": 37,
        "ArrowUp": 38,
        "ArrowRight": 39,
        "ArrowDown": 40,
    }.items()
}


def ring(radius, turns=1.03, points=32):
    """Return places on a circle around the middle of the pad, a bit more than once."""
    angles = [2 * math.pi * turns * k / (points - 1) for k in range(points)]
    return [(0.5 + radius * math.cos(a), 0.5 + radius * math.sin(a)) for a in angles]
