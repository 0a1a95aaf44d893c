"""Look at the built site as a reader's browser does, and say what is wrong: `page: what`.

Every page, on a desktop (1280 x 800, light and dark) and a phone (375 x 800): no request to another host, no error in
the console, no raw TeX, text for every figure, nothing cut or covered, axe-core clean, not too heavy. Then the links
and the search.
`--sample` looks at one page of each section; names of pages look at these.
"""
import argparse, configparser, functools, http.server, json, os, re, shutil, subprocess, sys, threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from linking import broken
from rules import sidebar

ROOT = Path(__file__).resolve().parents[1]
DESKTOP, PHONE = dict(width=1280, height=800), dict(width=375, height=800)
MAX_PAGE = 700_000  # bytes of a page with its own pictures
PATIENCE = 60_000   # milliseconds for a page, and for what it must do: a machine may be busy
PART = 8            # pages of a process's turn: what they gave is shown then
SHOWN = 4           # findings of one kind on one page that are printed
PROBES = Path(__file__).with_name("probes.js")
# structure is the same in both themes: only what colours change is looked at twice
DARK_RULES = ["color-contrast", "link-in-text-block"]
# what code with a backslash does not hold
COMMANDS = re.compile(r"(?<!\\)\\(?:[dt]?frac|alpha|eta|epsilon|lambda|log|sum|math[a-z]+|langle)(?![a-zA-Z])|\$\$")
SEARCHES = {  # what a reader types, and the page that must come first
    "label smoothing": "guides/labels.html", "temperature": "guides/reading_probabilities.html",
    "lightning": "guides/lightning.html", "annotators": "guides/labels.html",
    "soft_target_info_nce": ("guides/", "api/", "losses/losses.html#soft_target_info_nce"),
}


# ---------------------------------------------------------------- a browser and a server

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def serve(folder):
    "The site's address on this machine while the process lives."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def chromium():
    "Path of a system's Chromium; None where Playwright must bring its own."
    return next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


def launch(playwright):
    "A headless Chromium: the system's, else Playwright's own."
    return playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])


def fetch():
    "Fetch a browser: the system's package where we may install one, for it brings its libraries; else Playwright's."
    if os.name == "posix" and os.geteuid() == 0 and shutil.which("apt-get"):
        quiet = dict(env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, stdout=subprocess.DEVNULL)
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        subprocess.run("apt-get install -y -qq --no-install-recommends chromium".split(), **quiet)
    if chromium() is None: subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"])


def ready():
    "Why no browser can be had; None where one starts."
    try: from playwright.sync_api import sync_playwright
    except ImportError: return "playwright is not installed: pip install -e '.[dev]'"
    def works():
        with sync_playwright() as p: launch(p).close()
    try: return works()
    except Exception: fetch()
    try: return works()
    except Exception as e:
        return f"no browser: apt-get install chromium, or playwright install chromium\n{str(e)[:500]}"


def axe():
    "The source of axe-core, from the wheel that brings it."
    import axe_playwright_python
    return (Path(axe_playwright_python.__file__).parent/"axe.min.js").read_text(encoding="utf-8")


# ---------------------------------------------------------------- one page

def settle(page):
    "Wait until equations are set and the theme is on."
    page.wait_for_load_state("load")
    page.evaluate("window.MathJax && window.MathJax.startup ? window.MathJax.startup.promise.then(() => null) : null")
    page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")


def contrast(page, rules=None):
    "What axe-core finds, by rule."
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    for v in page.evaluate("o => axe.run(document, o)", options)["violations"]:
        yield f"{v['id']} at {len(v['nodes'])} places, first: {v['nodes'][0]['html'][:110]}"


def ask(page, *probes):
    for name in probes:
        for o in page.evaluate(f"probes.{name}()"): yield o


# colours and the header are judged where they end, not on their way
STILL = """addEventListener('DOMContentLoaded', () => {
  const style = document.createElement('style');
  style.textContent = '*, ::before, ::after { transition: none !important; animation: none !important; }';
  document.head.append(style);
});"""


def dark(page):
    "Turn to the dark theme and wait for it."
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("!document.querySelector('.quarto-color-scheme-toggle') ||"
                           " document.querySelector('.quarto-dark')", timeout=10_000)
    settle(page)


def desktop(page, name, source):
    "Findings in a wide window."
    page.evaluate(source); page.evaluate(PROBES.read_text())
    yield from ask(page, "raw_tex", "images", "wider_than_the_window", "cut", "narrow_code")
    if re.fullmatch(r"experiments/\w+\.html", name): yield from ask(page, "code_before_the_answer")
    for o in contrast(page): yield f"axe, light: {o}"
    dark(page)
    for o in contrast(page, DARK_RULES): yield f"axe, dark: {o}"
    page.emulate_media(color_scheme="light")


def phone(page, patience=10_000):
    "Findings on a phone, where the list of pages must open."
    page.set_viewport_size(PHONE)
    page.evaluate("scrollTo({top: 0, behavior: 'instant'})")
    settle(page)
    page.wait_for_timeout(200)  # the header comes back when the page is at its top
    yield from ask(page, "wider_than_the_window", "cut", "covered", "no_contents")
    button = page.locator("#quarto-header .quarto-btn-toggle:visible").first
    if button.count():
        opened = "document.querySelector('#quarto-sidebar').getBoundingClientRect().left >= 0"
        try:
            button.click(timeout=patience)
            page.wait_for_function(opened, timeout=patience)
        except Exception: yield "phone: the list of pages does not open"
    else: yield "phone: no button opens the list of pages"


def weight(docs, name):
    "Bytes of a page with its own pictures."
    text = (docs/name).read_text(encoding="utf-8")
    own = [(docs/name).parent/o for o in re.findall(r'<img\b[^>]*?\bsrc="([^":]+)"', text)]
    return (docs/name).stat().st_size + sum(p.stat().st_size for p in set(own) if p.exists())


def look(browser, base, docs, name, source):
    "Every finding on one page."
    bytes_ = weight(docs, name)
    if bytes_ > MAX_PAGE: yield f"{bytes_/1000:.0f} KB with its pictures, {MAX_PAGE/1000:.0f} at most"
    said, context = [], browser.new_context(viewport=DESKTOP, color_scheme="light")
    context.on("console", lambda m: m.type == "error" and said.append(f"console: {m.text[:200]}"))
    context.on("weberror", lambda e: said.append(f"script: {str(e.error)[:200]}"))
    def keep_home(route):
        if route.request.url.startswith((base, "data:", "blob:")): return route.continue_()
        said.append(f"asks another host: {route.request.url}")
        route.abort()
    context.route("**/*", keep_home)
    context.add_init_script(STILL)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(base+name)
    settle(page)
    yield from desktop(page, name, source)
    yield from phone(page)
    context.close()
    yield from said


def look_twice(browser, *args):
    "Every finding on one page; where the browser gives up, as on a busy machine, once more."
    for _ in range(2):
        try: return list(look(browser, *args))
        except Exception as e: said = f"the browser gave up: {str(e).splitlines()[0]}"
        for context in browser.contexts: context.close()
    return [said]


def look_at(docs, names):
    "Findings of some pages, as `page: what`, in one browser."
    from playwright.sync_api import sync_playwright
    base, source, found = serve(docs), axe(), []
    with sync_playwright() as p:
        browser = launch(p)
        for name in names: found += [f"{name}: {o}" for o in look_twice(browser, base, docs, name, source)]
        browser.close()
    return found


# ---------------------------------------------------------------- the search

def raw_tex_in_search(docs):
    "Results that would show TeX instead of letters."
    for o in json.loads((docs/"search.json").read_text(encoding="utf-8")):
        if o["href"].startswith("about/"): continue  # how equations are written is said there
        m = COMMANDS.search(o["title"] + " " + o["section"] + " " + o["text"])
        if m: yield f"{o['href']}: the search would show {o['text'][max(0, m.start()-30):m.start()+40]!r}"


def searches(docs, queries=SEARCHES):
    "Queries whose first result is another page."
    from playwright.sync_api import sync_playwright
    base = serve(docs)
    with sync_playwright() as p:
        browser = launch(p)
        page = browser.new_page(viewport=DESKTOP)
        page.goto(base+"index.html")
        for query, wanted in queries.items():
            box = page.locator("input[type=search]:visible").first
            box.fill("")
            box.fill(query)
            page.wait_for_selector(".search-result, .search-none, .aa-Item", timeout=20_000)
            page.wait_for_timeout(500)  # the box waits for the end of typing
            first = page.locator(".search-result, .aa-Item a").first
            href = first.get_attribute("href") if first.count() else "nothing"
            if not href.removeprefix("./").removeprefix(base).startswith(wanted):
                yield f"search for {query!r} finds {href} first, not {wanted}"
        browser.close()


# ---------------------------------------------------------------- all of it

def html_pages(docs): return sorted(str(p.relative_to(docs)) for p in docs.rglob("*.html"))


def sample(root=ROOT):
    "The first page that is no index of every section, and the home page."
    def first(o):
        if isinstance(o, str): return o
        return o.get("href") or first(next((c for c in o["contents"] if "index" not in str(c)), o["contents"][0]))
    return sorted({str(Path(first(o)).with_suffix(".html")) for o in sidebar(root)})


def browse(docs, names, workers=min(4, os.cpu_count() or 1)):
    parts = [names[i:i+PART] for i in range(0, len(names), PART)]
    with ProcessPoolExecutor(workers) as pool:
        for found in pool.map(look_at, [docs]*len(parts), parts): yield from found


def report(found):
    "Print the findings, the first few of a kind on a page; how many there are."
    seen = {}
    for o in found:
        key = re.sub(r"\d+|: [^:]*$", "", o)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= SHOWN: print(o, flush=True)
    for key, n in seen.items():
        if n > SHOWN: print(f"... and {n-SHOWN} more like: {key}")
    return sum(seen.values())


def address(root=ROOT):
    "The site's own, from settings.ini."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(root/"settings.ini")
    return settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"]


def whole(docs):
    "What is found on no single page: links that lead nowhere, and the search."
    yield from broken(docs, address())
    yield from raw_tex_in_search(docs)
    yield from searches(docs)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("pages", nargs="*", help="pages as they lie in the site: guides/labels.html")
    args.add_argument("--sample", action="store_true", help="one page of each section")
    args.add_argument("--docs", type=Path, default=ROOT/"_docs")
    args = args.parse_args()
    if why := ready():
        if not args.sample: sys.exit(why)
        return print(f"== NOT LOOKED AT: no page was opened, for there is {why}")  # a clean clone passes without one
    names = args.pages or (sample() if args.sample else html_pages(args.docs))
    n = report(browse(args.docs, names))
    if not args.pages: n += report(whole(args.docs))
    if n: sys.exit(f"=> {n} findings on {len(names)} pages")
    print(f"{len(names)} pages are as a reader needs them")


if __name__ == "__main__": main()
