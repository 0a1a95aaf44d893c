"""Links of the built site that lead nowhere: a file that is not there, an anchor that its page does not have.

Pages of this site only, so that no other host is asked; a link to the site's own address counts as one of them.
"""
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ADDRESSES = {"a": "href", "link": "href", "img": "src", "script": "src"}


class Links(HTMLParser):
    "What a page links to, and the anchors that it has."
    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], {"top"}
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.anchors.add(found.get("id"))
        if ADDRESSES.get(tag) in found: self.links.append(found[ADDRESSES[tag]] or "")


def wrong(link, path, docs, pages):
    "What is wrong with one link of the page at `path`; None where it leads somewhere or to another host."
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return None
    target = (path.parent/unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir(): target = target/"index.html"
    if not target.is_file() or docs not in target.parents: return f"{link} is no file of the site"
    if not parts.fragment or target not in pages: return None
    if unquote(parts.fragment) not in pages[target].anchors: return f"{link} names no place on its page"


def broken(docs, site=None):
    "Every broken link, as `page: what`; `site` is the site's own address."
    docs = Path(docs).resolve()
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in sorted(docs.rglob("*.html"))}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            own = site and link.startswith(site) and re.sub(r"^/", "", link[len(site):])
            said = wrong(own, docs/"index.html", docs, pages) if own else wrong(link, path, docs, pages)
            if said: yield f"{path.relative_to(docs)}: a link that leads nowhere: {said}"
