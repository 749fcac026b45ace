"""What a person does with the page in a real browser, and what can be read off it: numbers, pixels, marks."""

import base64
import contextlib
import json
import re
import time
import urllib.request

import torch
import websocket


def opened(browser, path):
    """Open the page at `path` anew; return the text that it shows."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(path.as_uri())
    return browser.find_element("tag name", "body").text


def element(page, name):
    return page.find_element("id", name)


def text(page, name):
    return element(page, name).get_property("textContent")


def numbers(page, name):
    return [float(number) for number in re.findall(r"-?\d+\.\d+", text(page, name))]


def computed(page, script, *tensors, dtype=torch.float32):
    """What JavaScript makes of tensors: it sees each as a Float32Array `a`, `b`, ... and returns one, flat."""
    sent = [
        base64.b64encode(tensor.contiguous().numpy()).decode() for tensor in tensors
    ]
    bytes_of = (
        "arguments[0].map(text => new Float32Array(Uint8Array.fromBase64(text).buffer))"
    )
    kind = "Float32Array" if dtype == torch.float32 else "Uint8Array"
    script = f"const [a, b, c] = {bytes_of}; return new Uint8Array({kind}.from({script}).buffer).toBase64()"
    return torch.frombuffer(
        bytearray(base64.b64decode(page.execute_script(script, sent))), dtype=dtype
    )


def drawn(page, name, width, height):
    """The pixels of a canvas, from 0 to 255: (height, width, 4)."""
    script = (
        f"element('{name}').getContext('2d').getImageData(0, 0, {width}, {height}).data"
    )
    return computed(page, script, dtype=torch.uint8).view(height, width, 4).float()


def marks(page, colour):
    """The middle of each pixel of the map that has this colour, in the plane: (N, 2)."""
    same = (drawn(page, "map", 600, 600)[..., :3] == torch.tensor(colour)).all(dim=2)
    down, right = (same.nonzero() + 0.5).unbind(dim=1)
    return torch.stack((right / 75 - 4, 4 - down / 75), dim=1)


def point(page):
    """The point z of the page: (2,)."""
    return computed(page, "z")


def gaussian(page):
    """mu and logvar of what is encoded, with the noise as the slider says, and the ten draws: (2,), (2,), (10, 2)."""
    mu, logvar, *samples = computed(
        page, "[...q, ...samples].flatMap(v => [...v])"
    ).view(12, 2)
    return mu, logvar, torch.stack(samples)


def stroke(page, name, points, seconds=0.0):
    """Drag through points, in shares of an element's width from its middle, as a hand does: without waiting."""
    address = page.capabilities["goog:chromeOptions"]["debuggerAddress"]
    with urllib.request.urlopen(f"http://{address}/json") as answer:
        url = next(
            target["webSocketDebuggerUrl"]
            for target in json.load(answer)
            if target["type"] == "page"
        )
    middle = "const { x, y, width } = element(arguments[0]).getBoundingClientRect(); return [x, y, width]"
    left, top, width = page.execute_script(middle, name)
    ways = [
        {"x": left + (0.5 + x) * width, "y": top + (0.5 + y) * width} for x, y in points
    ]
    events = [
        ("mousePressed", ways[0]),
        *(("mouseMoved", way) for way in ways[1:]),
        ("mouseReleased", ways[-1]),
    ]
    with contextlib.closing(
        websocket.create_connection(url, suppress_origin=True)
    ) as socket:
        for number, (kind, way) in enumerate(events):
            params = {
                "type": kind,
                "button": "left",
                "buttons": int(kind != "mouseReleased"),
                "clickCount": 1,
                **way,
            }
            socket.send(
                json.dumps(
                    {
                        "id": number,
                        "method": "Input.dispatchMouseEvent",
                        "params": params,
                    }
                )
            )
            time.sleep(seconds / len(events))
        while json.loads(socket.recv()).get("id") != number:
            pass  # the last event has not been answered


def noise(page, exponent):
    page.execute_script(
        f"element('noise').value = {exponent}; element('noise').dispatchEvent(new Event('input'))"
    )


def ink(page):
    """What the pad shows, from 0 to 255: (280, 280)."""
    return drawn(page, "pad", 280, 280)[..., 3]
