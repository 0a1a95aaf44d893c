"Package metadata from settings.ini, the one place for the version and the dependencies."
import json, re, shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(root/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

status = "Planning Pre-Alpha Alpha Beta Production/Stable Mature Inactive".split()
spdx = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
suffix = "_requirements"
extras = {k.removesuffix(suffix): shlex.split(v) for k, v in cfg.items() if k.endswith(suffix)}
extras["all"] = sorted({r for k, v in extras.items() if k != "dev" for r in v})


def page_of_the_index(readme):
    "The README for a page outside the repository: links into it become links to its site."
    def absolute(link):
        view = "raw" if link[1].startswith("![") else "blob"
        return f"{link[1]}{cfg['git_url']}/{view}/{cfg['branch']}/{link[2]}"
    return re.sub(r"(!?\[[^\]]*\]\()(?![a-z]+:|[#/])([^)\s]+)", absolute, readme)


def classifiers():
    "Of the package index. The licence is not among them: it has a field of its own (PEP 639)."
    yield f"Development Status :: {cfg['status']} - {status[int(cfg['status'])-1]}"
    for name in cfg["audience"].split(", "): yield f"Intended Audience :: {name}"
    yield f"Natural Language :: {cfg['language']}"
    yield "Operating System :: OS Independent"
    for version in ("3", "3 :: Only", *cfg["python_versions"].split()):
        yield f"Programming Language :: Python :: {version}"
    yield "Topic :: Scientific/Engineering :: Artificial Intelligence"
    if (root/cfg["lib_path"]/"py.typed").exists(): yield "Typing :: Typed"


def copy_without_outputs(source, dest):
    "A notebook as `softnce run` needs it: outputs, pictures above all, are nine tenths of it."
    nb = json.loads(source.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell |= dict(outputs=[], execution_count=None)
    dest.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class build_with_experiments(build_py):
    "A wheel carries the experiments' notebooks beside their modules; an editable install reads them in nbs/."
    def run(self):
        super().run()
        if self.editable_mode: return
        dest = Path(self.build_lib)/cfg["lib_path"]/"experiments"
        dest.mkdir(parents=True, exist_ok=True)  # where there are no modules of the experiments
        for nb in dest.glob("*.ipynb"): nb.unlink()  # of an earlier build: the experiment may be gone; the modules stay
        for nb in sorted((root/cfg["nbs_path"]/"experiments").glob("*.ipynb")): copy_without_outputs(nb, dest/nb.name)


class sdist_with_experiments(sdist):
    "So does what a wheel is built from."
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        for nb in Path(base_dir, cfg["nbs_path"], "experiments").rglob("*.ipynb"):
            nb.unlink()  # it may be a hard link to the source
            copy_without_outputs(root/nb.relative_to(base_dir), nb)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=page_of_the_index((root/"README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=spdx[cfg["license"]],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=list(classifiers()),
    project_urls={
        "Source": cfg["git_url"],
        "Documentation": cfg["doc_host"]+cfg["doc_baseurl"],
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Issues": cfg["git_url"]+"/issues",
    },
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"]+".*"]),
    package_data={"": ["py.typed", "*.pyi"]},
    cmdclass={"build_py": build_with_experiments, "sdist": sdist_with_experiments},
    python_requires=">="+cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "console_scripts": shlex.split(cfg["console_scripts"]),
    },
)
