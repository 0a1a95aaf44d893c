"Pages that no notebook makes, from files at the top of the repository: changes, contributing, how to cite; llms.txt."
import re

import yaml

FILES = {"changes": ("CHANGELOG.md", "What changed, version by version"),
         "contributing": ("CONTRIBUTING.md", "How the project is built, tested and changed")}


def page(title, what, text): return f'---\ntitle: "{title}"\ndescription: "{what}"\n---\n\n{text}\n'


def from_file(text, cfg):
    "A Markdown file without its title, which the page has; links to files of the repository lead there."
    title, _, text = text.strip().partition("\n")
    def link(m): return m[0] if re.match(r"[a-z]+:|#", m[1]) else f"]({cfg.git_url}/blob/{cfg.branch}/{m[1]})"
    return title.lstrip("# "), re.sub(r"\]\(([^)\s]+)\)", link, text)


def entry(kind, key, fields):
    lines = ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items() if v)
    return f"```bibtex\n@{kind}{{{key},\n{lines}\n}}\n```"


def names(authors):
    return " and ".join(o.get("name") or f"{o['given-names']} {o['family-names']}" for o in authors)


def citation(cff):
    "CITATION.cff as BibTeX: the software, and the paper whose losses it implements."
    own = dict(title=cff["title"], author=names(cff["authors"]), version=cff["version"], url=cff["repository-code"])
    parts = [cff["message"], entry("software", "softnce", own)]
    for o in cff.get("references", []):
        fields = dict(title=o["title"], author=names(o["authors"]), **{k: o.get(k) for k in ("year", "doi", "url")})
        parts.append(entry("article", "paper", fields))
    return "\n\n".join(parts)


def write(root, proc, cfg):
    "The pages, into `_proc/about/`."
    made = {}
    for name, (file, what) in FILES.items():
        if not (root/file).exists(): continue
        title, text = from_file((root/file).read_text(encoding="utf-8"), cfg)
        made[name] = page(title, what, text)
    if (root/"CITATION.cff").exists():
        cff = yaml.safe_load((root/"CITATION.cff").read_text(encoding="utf-8"))
        made["cite"] = page("How to cite", "The software and the paper, as BibTeX", citation(cff))
    (proc/"about").mkdir(parents=True, exist_ok=True)
    for name, text in made.items(): (proc/"about"/f"{name}.md").write_text(text, encoding="utf-8")


def llms(docs, cfg, found):
    "llms.txt: every page with its one line, for programs that read the site."
    lines = [f"# {cfg.title}", "", f"> {cfg.description}", ""]
    lines += [f"- [{title}]({cfg.doc_host}{cfg.doc_baseurl}/{href}): {what}" for href, (title, what) in found.items()]
    (docs/"llms.txt").write_text("\n".join(lines)+"\n", encoding="utf-8")
