"""Debian's Chromium over its DevTools protocol: open a page, and see what it asked for, what it complained about and how it looks"""
import base64, contextlib, json, shutil, subprocess, tempfile, time
from pathlib import Path

from websocket import create_connection # websocket-client, which jupyterlab brings along

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
         "--host-resolver-rules=MAP * ~NOTFOUND"]


class Connection:
    "A line to Chromium: commands go out, answers and events come in"
    def __init__(self, address): self.socket,self.n = create_connection(address, timeout=30),0

    def event(self, name, params): "Called for every event; here nobody listens"

    def receive(self):
        message = json.loads(self.socket.recv())
        if "method" in message: self.event(message["method"], message["params"])
        return message

    def __call__(self, method, **params):
        "Send a command and take in events until its answer comes"
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (m := self.receive()).get("id")!=self.n: pass
        if "error" in m: raise RuntimeError(f"{method}: {m['error']}")
        return m["result"]


class Page(Connection):
    "One tab. `requests` are the addresses it asked for, `blocked` those that the page's own policy held back, `complaints` what its console would show"
    def __init__(self, address):
        super().__init__(address)
        self.clear()
        for domain in ("Page", "Runtime", "Log", "Network"): self(f"{domain}.enable")

    def clear(self): self.requests,self.blocked,self.complaints,self.urls,self.loaded = [],[],[],{},False

    def event(self, name, p):
        if name=="Network.requestWillBeSent":
            self.requests.append(p["request"]["url"]); self.urls[p["requestId"]] = p["request"]["url"]
        if name=="Network.loadingFailed" and p.get("blockedReason")=="csp": self.blocked.append(self.urls[p["requestId"]])
        if name=="Runtime.exceptionThrown": self.complaints.append(p["exceptionDetails"]["text"])
        if name=="Log.entryAdded": self.complaints.append(f"{p['entry']['level']}: {p['entry']['text']}")
        if name=="Runtime.consoleAPICalled": self.complaints.append(f"console.{p['type']}: {p['args']}")
        if name=="Page.loadEventFired": self.loaded = True

    def open(self, url, width=1280, height=900, dark=False, settle=.1):
        "Load a page at a width, in light or dark, from a clean slate"
        self.clear()
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width<600)
        self("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark" if dark else "light")])
        self("Page.navigate", url=url)
        while not self.loaded: self.receive()
        end = time.monotonic()+settle
        while time.monotonic()<end: self.js("1") # takes in what comes after the load event
        return self

    def js(self, code):
        "The value of an expression in the page"
        answer = self("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer: raise RuntimeError(f"{code[:80]}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def screenshot(self, path):
        "The whole page, from top to bottom, as PNG"
        Path(path).write_bytes(base64.b64decode(self("Page.captureScreenshot", captureBeyondViewport=True)["data"]))


@contextlib.contextmanager
def chromium():
    "A fresh Chromium with a profile of its own and no name that resolves; yields its tab"
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    if not binary: raise FileNotFoundError("the tests of the page want Chromium: apt-get update && apt-get install -y chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = Path(profile)/"DevToolsActivePort"
            end = time.monotonic()+60
            while not (port.exists() and port.read_text().count("\n")):
                if process.poll() is not None or time.monotonic()>end: raise RuntimeError(f"{binary} did not start (exit code {process.poll()})")
                time.sleep(.05)
            number,browser = port.read_text().split()[:2]
            control = Connection(f"ws://127.0.0.1:{number}{browser}")
            tab = next(t for t in control("Target.getTargets")["targetInfos"] if t["type"]=="page")
            yield Page(f"ws://127.0.0.1:{number}/devtools/page/{tab['targetId']}")
            control("Browser.close")
            process.wait(30)
        finally:
            if process.poll() is None: process.kill(); process.wait()
