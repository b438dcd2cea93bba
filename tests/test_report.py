"""The page of a run in a real browser: nothing fetched, nothing complained about, readable on a desk and on a phone, light and dark; and bad or missing files"""
import json, shutil

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw

from chromium import chromium
from graftlab.files import write_json
from graftlab.host import GraftError
from graftlab.report import make_report
from graftlab.runs import SHAPES, ReportError, read
from graftlab.scores import wilson

TYPES = dict(shape=["circle", "rectangle", "triangle"], color=["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"])
ROWS = [("prior", "No picture", "The host answers from the question alone", "reference"), ("random", "Random encoder", "Untrained weights", "control"),
        ("surrogate", "Surrogate with its encoder", "25 of 30 layers", "method"), ("graft", "Zero-shot graft", "The same encoder in the untouched host", "method"),
        ("early", "Zero-shot graft of the early-phase control", "Cut where the paper says not to, the same number of layers", "control"),
        ("stage3", "Graft after stage 3", "On a tenth of the data", "method"), ("full", "Encoder trained on the full host", "The expensive way", "reference")]


def _answers(rng):
    "Random answers, scored: these numbers mean nothing"
    def score(n):
        p = float(rng.uniform(.05, .95)); half = 1.96*(p*(1-p)/n)**.5
        return dict(accuracy=p, low=max(p-half, 0.), high=min(p+half, 1.), n=n)
    return {t: dict(rank=score(300), exact=score(300)) for t in TYPES}


def _examples(run, rng):
    (run/"images").mkdir(exist_ok=True)
    for i in range(12):
        kind = list(TYPES)[i%2]
        tint,shape = (TYPES[k][rng.integers(len(TYPES[k]))] for k in ("color", "shape"))
        image = Image.new("RGB", (64, 64), "white")
        draw,box = ImageDraw.Draw(image),(12, 18, 52, 50)
        if shape=="triangle": draw.polygon([(12, 50), (52, 50), (32, 16)], tint)
        else: (draw.ellipse if shape=="circle" else draw.rectangle)(box, tint)
        image.save(run/"images"/f"{i}.png")
        right = dict(color=tint, shape=shape)[kind]
        pick = lambda: right if rng.random()<.5 else TYPES[kind][rng.integers(len(TYPES[kind]))]
        yield dict(image=f"images/{i}.png", type=kind, question=f"What {kind} is in the picture?", answer=right,
                   answers={name: dict(ranked=pick(), generated=pick() + ("" if rng.random()<.8 else " and something else")) for name,*_ in ROWS})


def _phases(run, rng):
    for name,title,steps in (("trajectory", "Trajectory", None), ("stage0", "Stage 0: the translator learns from the host", 300),
                             ("stage2", "Stage 2: encoder on the surrogate", 420), ("scores", "Scores", None)):
        if steps:
            (run/name).mkdir(exist_ok=True)
            loss = .4 + 5*np.exp(-np.arange(steps)/60) + .2*rng.standard_normal(steps)
            (run/name/"metrics.jsonl").write_text("".join(json.dumps(dict(step=i, loss=float(l), lr=1e-3)) + "\n" for i,l in enumerate(loss, 1)))
        yield dict(name=name, title=title, folder=name, seconds=float(rng.uniform(5, 300)), steps=steps, tokens=steps and 240*steps,
                   peak_memory_mb=float(rng.uniform(500, 4000)), trainable=steps and 12345678)


def sample_run(run, seed=0, layers=30, samples=100):
    "A run folder with every file, of random numbers"
    rng = np.random.default_rng(seed)
    run.mkdir(parents=True, exist_ok=True)
    height = 2.2 + .7*rng.standard_normal((samples, 1)) + .1*rng.standard_normal((samples, layers)).cumsum(1)
    kl = np.abs(height)/(1 + np.exp(np.arange(layers) - .64*layers - .5*rng.standard_normal((samples, 1)))); kl[:,-1] = 0
    write_json(run/"trajectory.json", dict(model="SmolLM2-135M-Instruct", samples=samples, kl=kl.tolist(), transition=dict(layer=19, low=18, high=20)))
    cuts = [("late", "Surrogate", 23, 28), ("early", "Early-phase control", 1, 6)]
    write_json(run/"models.json", dict(host=dict(name="SmolLM2-135M-Instruct", layers=layers, parameters=134515008), surrogates=[
        dict(name=n, title=t, start=a, end=b, layers=layers-(b-a), parameters=116815040, share=116815040/134515008) for n,t,a,b in cuts]))
    write_json(run/"phases.json", list(_phases(run, rng)))
    write_json(run/"scores.json", dict(types={t: dict(n=300, candidates=c, chance=1/len(c)) for t,c in TYPES.items()},
        rows=[dict(name=n, title=t, about=a, group=g, scores=_answers(rng)) for n,t,a,g in ROWS]))
    for n,*_ in ROWS[:-1]: # the last one has not been asked yet
        write_json(run/"scores"/f"{n}.json", dict(types={t: {} for t in TYPES}, predictions=[dict(id=f"{t}{i}", type=t, answer=c[0], ranked=c[rng.integers(2)], generated="")
                                                                                            for t,c in TYPES.items() for i in range(30)]))
    write_json(run/"examples.json", list(_examples(run, rng)))
    claims = [dict(claim=f"A claim whose verdict is {v}", source="Grafting, Section 4", verdict=v, evidence="Random numbers are evidence of nothing.")
              for v in ("shown", "not shown", "undecided")]
    write_json(run/"run.json", dict(title="Sample run of random numbers", command="graftlab demo --seed 0 --out runs/demo", seed=seed, quick=False,
        commit="0123456789abcdef0123456789abcdef01234567", versions=dict(graftlab="0.1.0", torch="2.13.0"), started="2026-01-01 10:00:00", finished=None,
        machine=dict(cpu="a CPU with a rather long name @ 2.80GHz", cores=2, memory_gb=24.), departures=["One departure.", "Another one."], claims=claims, headline=None))
    return run


@pytest.fixture(scope="module")
def browser():
    with chromium() as page: yield page


@pytest.fixture
def run(tmp_path): return sample_run(tmp_path/"run")


# every text that can be seen: its size in pixels, and its contrast to the nearest background that is not transparent (WCAG 2.1)
TEXTS = """(() => {
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = rgb(c).map(v => (v /= 255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b };
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length==3 || c[3]>0) return getComputedStyle(e).backgroundColor } };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, s = getComputedStyle(e);
    if (!walk.currentNode.data.trim() || e.tagName=='title') continue;
    const [a, b] = [light(e instanceof SVGElement ? (s.stroke=='none' ? s.fill : s.stroke) : s.color), light(behind(e))];
    found.push([walk.currentNode.data.trim().slice(0, 40), parseFloat(s.fontSize), (Math.max(a, b)+.05)/(Math.min(a, b)+.05)]);
  }
  return found })()"""
SIZES = """[...document.querySelectorAll('svg:not(svg svg), img')].map(e => { const r = e.getBoundingClientRect();
  return [e.outerHTML.slice(0, 90), r.width, r.height, e.tagName=='IMG' ? e.naturalWidth : e.querySelectorAll('path, line, rect, circle, text').length] })"""


def faults(page, url):
    "What is wrong with a page as it is open now, in words; an empty list for a page as it should be"
    found = [f"asked for {r[:80]}" for r in page.requests if r!=url and not r.startswith("data:")] + page.complaints
    wide,width = page.js("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    if wide>width: found.append(f"the page is {wide} px wide on a screen of {width}")
    found += [f"{w:.0f} x {h:.0f} px with {n} parts: {what}" for what,w,h,n in page.js(SIZES) if w<10 or h<10 or not n]
    texts = page.js(TEXTS)
    if len(texts)<5: found.append(f"only {len(texts)} texts on the page")
    return found + [f"letters of {size} px: {t}" for t,size,_ in texts if size<11] + [f"contrast {c:.1f}: {t}" for t,_,c in texts if c<4.5]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_page_is_whole_and_readable(browser, run, width, dark):
    url = make_report(run).as_uri()
    browser.open(url, width, dark=dark)
    assert faults(browser, url)==[]
    assert browser.js("document.querySelectorAll('img').length")==12 and browser.js("document.querySelectorAll('svg.plot').length")==3
    assert browser.js("[...document.querySelectorAll('svg.plot')].every(e => e.getBoundingClientRect().width > 180)")
    assert (browser.js("getComputedStyle(document.body).backgroundColor")=="rgb(19, 21, 24)")==dark


def test_each_model_is_compared_with_the_graft(browser, run):
    "One row a model that has answered, but the graft; a damaged file of answers is named"
    browser.open(make_report(run).as_uri())
    rows = browser.js("[...document.querySelectorAll('p.about')].find(p => p.innerText.includes('paired difference')).nextElementSibling.innerText").splitlines()
    assert [title in [r.split('\t')[0] for r in rows] for _,title,*_ in ROWS]==[n not in ("graft", ROWS[-1][0]) for n,*_ in ROWS]
    (run/"scores"/"prior.json").write_text("{")
    with pytest.raises(ReportError, match="prior.json: not a JSON text"): make_report(run)


def test_faults_are_seen(browser, tmp_path):
    "The check above must be able to fail: a page with every fault it looks for"
    bad = tmp_path/"bad.html"
    bad.write_text("""<meta name="viewport" content="width=device-width"><title>bad</title><body style="background: white"><p style="color: #ddd">pale</p><p style="font-size: 6px">small</p><div style="width: 2000px">wide</div>
        <img src="https://example.org/x.png"><svg width="100" height="40"></svg><svg width="90" height="90"><path d="M0 nan"/></svg><script>console.log("hello"); missing()</script>""")
    browser.open(bad.as_uri(), 375)
    found = "\n".join(faults(browser, bad.as_uri()))
    for fault in ("asked for https://example.org", "px wide on a screen of 375", "contrast 1.", "letters of 6 px", "with 0 parts", "console.log", "Uncaught", "attribute d", "ERR_NAME_NOT_RESOLVED"):
        assert fault in found, f"{fault!r} was not seen in:\n{found}"


def test_policy_stops_what_slips_through(browser, run):
    "Even a page into which an address and a script were smuggled fetches and runs nothing"
    page = make_report(run)
    page.write_text(page.read_text().replace("</main>", '<img src="https://example.org/x.png"><script>document.title = "taken"</script></main>'))
    browser.open(page.as_uri())
    assert browser.blocked==[r for r in browser.requests if r.startswith("http")]==["https://example.org/x.png"] and browser.js("document.title")=="Sample run of random numbers"
    assert any("Content Security Policy" in c for c in browser.complaints)


def _replace_texts(value, text):
    "The same JSON with every free text replaced"
    if isinstance(value, dict): return {k: v if k in ("verdict", "group", "name", "image", "folder") else _replace_texts(v, text) for k,v in value.items()}
    if isinstance(value, list): return [_replace_texts(v, text) for v in value]
    return text if isinstance(value, str) else value


def test_hostile_and_long_texts(browser, run):
    "Markup, quotes, other scripts and words without a space stay text and stay on the page"
    text = """<script>alert(1)</script>"'&amp;\u05d0\u4e2d\U0001f600 """ + "longword"*40
    for name in SHAPES: write_json(run/name, _replace_texts(json.loads((run/name).read_text()), text))
    url = make_report(run).as_uri()
    browser.open(url, 375)
    assert faults(browser, url)==[] and browser.js("document.querySelectorAll('script').length")==0
    assert browser.js("document.title")==text.strip() and browser.js("document.querySelector('img').alt").endswith(text.strip())


@pytest.mark.parametrize("name", sorted(set(SHAPES)-{"run.json"}))
def test_run_stopped_before_a_file(browser, run, name):
    (run/name).unlink()
    url = make_report(run).as_uri()
    browser.open(url, 375)
    assert faults(browser, url)==[] and f"has not written {name}" in browser.js("document.body.innerText")


def test_only_run_json(browser, run):
    for name in set(SHAPES)-{"run.json"}: (run/name).unlink()
    url = make_report(run).as_uri()
    browser.open(url)
    assert faults(browser, url)==[] and browser.js("document.body.innerText").count("Not there yet")==6
    (run/"run.json").unlink()
    with pytest.raises(ReportError, match="no run.json there"): make_report(run)


@pytest.mark.parametrize("layers,samples", [(2, 1), (80, 300)])
def test_other_sizes(browser, run, layers, samples):
    "The smallest trajectory there is, and that of a 70B model"
    kl = np.random.default_rng(0).random((samples, layers)).tolist()
    write_json(run/"trajectory.json", dict(model="m", samples=samples, kl=kl, transition=dict(layer=layers-1, low=0, high=layers-1)))
    write_json(run/"models.json", dict(host=dict(name="m", layers=layers, parameters=1), surrogates=[]))
    url = make_report(run).as_uri()
    browser.open(url, 375)
    assert faults(browser, url)==[] and browser.js("document.querySelectorAll('rect.kept').length")==layers+1 # one in the key


def test_same_files_same_page(run):
    assert make_report(run).read_bytes()==make_report(run).read_bytes()
    assert not list(run.glob("*.tmp")) and not list(run.glob(".report*"))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_cut_file_is_named_and_old_page_stays(run, name):
    old,file = make_report(run).read_bytes(),run/name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ReportError, match=name): make_report(run)
    assert (run/"report.html").read_bytes()==old


def test_every_interval_of_ours_is_accepted(run):
    "No score that `wilson` can give, 0 and n of n among them, is taken for a fault"
    scores = json.loads((run/"scores.json").read_text())
    for n in (1, 2, 3, 7, 49, 50, 299, 300, 1000):
        scores["rows"] = []
        for k in {0, 1, n//3, n-1, n}:
            low,high = wilson(k, n)
            score = dict(accuracy=k/n, low=low, high=high, n=n)
            scores["rows"].append(dict(name=str(k), title=str(k), about="", group="method", scores=dict(shape=dict(rank=score, exact=None))))
        write_json(run/"scores.json", scores)
        assert read(run, "scores.json")==scores


def test_bad_pictures_are_named(run):
    (run/"images"/"3.png").write_bytes(b"not a picture")
    with pytest.raises(GraftError, match="3.png"): make_report(run)
    (run/"images"/"3.png").unlink()
    with pytest.raises(GraftError, match="3.png"): make_report(run)


def _places(value, path=()):
    "Every place in a JSON value"
    yield path
    for k,v in (value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()): yield from _places(v, (*path, k))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory): return sample_run(tmp_path_factory.mktemp("small")/"run", layers=30, samples=2)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_wrong_kind_anywhere_is_an_error_that_names_the_file(small_run, data):
    "Whatever place of whatever file holds a value of another kind, the error is ours and names the file"
    name = data.draw(st.sampled_from(sorted(SHAPES)))
    file = small_run/name
    good = file.read_text()
    value = json.loads(good)
    path = data.draw(st.sampled_from(list(_places(value))))
    old = value
    for k in path: old = old[k]
    new = data.draw(st.sampled_from([v for v in (True, [True], {"x": True}) if type(v) is not type(old)])) # nothing holds true but `quick`
    if not path: value = new
    else:
        holder = value
        for k in path[:-1]: holder = holder[k]
        holder[path[-1]] = new
    try:
        file.write_text(json.dumps(value))
        with pytest.raises(ReportError, match=name): make_report(small_run)
    finally: file.write_text(good)


def test_chromium_missing_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="apt-get install -y chromium"):
        with chromium(): pass
