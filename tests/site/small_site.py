"A site of a few small notebooks, built as the real one is."
import base64, json, shutil, struct, subprocess, sys, zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
META = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def png(width=3, height=2, shade=128):
    "A grey picture, as a notebook stores it."
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind+data))
    rows = zlib.compress((b"\0" + bytes([shade])*width)*height)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def picture(**kw): return {"output_type": "display_data", "metadata": {}, "data": {"image/png": png(**kw)}}


def said(text): return {"output_type": "stream", "name": "stdout", "text": [text]}


def html(text): return {"output_type": "display_data", "metadata": {}, "data": {"text/html": text}}


def cell(source, *outputs, code=True):
    c = {"cell_type": "code" if code else "markdown", "metadata": {}, "source": source.splitlines(True)}
    c["id"] = f"{zlib.crc32(source.encode()):08x}"
    return {**c, "outputs": list(outputs), "execution_count": None} if code else c


def text(source): return cell(source, code=False)


def notebook(path, title, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nb = {"cells": [text(f"# {title}\n\n> What it is about"), *cells], "metadata": META}
    path.write_text(json.dumps({**nb, "nbformat": 4, "nbformat_minor": 5}))


def build(root, sidebar, **pages):
    "Write the notebooks, named by their path with `__` for `/`, and build the site; its folder."
    for name in ["settings.ini", "_quarto.yml"]: (root/name).write_text((ROOT/name).read_text())
    for name, cells in pages.items(): notebook(root/"nbs"/f"{name.replace('__', '/')}.ipynb", *cells)
    (root/"nbs"/"_quarto.yml").symlink_to("../_quarto.yml")
    (root/"nbs"/"styles.css").write_text((ROOT/"nbs"/"styles.css").read_text())
    shutil.copytree(ROOT/"nbs"/"scripts", root/"nbs"/"scripts")
    (root/"nbs"/"sidebar.yml").write_text(sidebar)
    (root/"softnce").mkdir()
    done = subprocess.run([sys.executable, ROOT/"tools"/"docs.py"], cwd=root, text=True, capture_output=True)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    return root/"_docs"
