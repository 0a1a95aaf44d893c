"Package metadata from settings.ini, the one place for the version and the dependencies."
import shlex, shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(root/"settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

status = "Planning Pre-Alpha Alpha Beta Production/Stable Mature Inactive".split()
spdx = {"apache2": "Apache-2.0", "mit": "MIT", "bsd3": "BSD-3-Clause"}
suffix = "_requirements"
extras = {k.removesuffix(suffix): shlex.split(v) for k, v in cfg.items() if k.endswith(suffix)}
extras["all"] = sorted({r for k, v in extras.items() if k != "dev" for r in v})


class build_with_experiments(build_py):
    "A wheel carries the experiments' notebooks beside their modules; an editable install reads them in nbs/."
    def run(self):
        super().run()
        if self.editable_mode: return
        dest = Path(self.build_lib)/cfg["lib_path"]/"experiments"
        dest.mkdir(parents=True, exist_ok=True)  # where there are no modules of the experiments
        for nb in dest.glob("*.ipynb"): nb.unlink()  # of an earlier build: the experiment may be gone; the modules stay
        for nb in sorted((root/cfg["nbs_path"]/"experiments").glob("*.ipynb")): shutil.copy(nb, dest)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license=spdx[cfg["license"]],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Development Status :: {cfg['status']} - {status[int(cfg['status'])-1]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
    ],
    project_urls={"Source": cfg["git_url"], "Documentation": cfg["doc_host"]+cfg["doc_baseurl"]},
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"]+".*"]),
    package_data={"": ["py.typed", "*.pyi"]},
    cmdclass={"build_py": build_with_experiments},
    python_requires=">="+cfg["min_python"],
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
        "console_scripts": shlex.split(cfg["console_scripts"]),
    },
)
