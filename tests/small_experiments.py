"Small experiments for the tests of runs: notebooks written on the spot, and the command that runs them."
import os, subprocess, sys, time
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPO = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name('softnce')
COMMAND = [sys.executable, '-c', 'from softnce.runs.cli import main; main()']
PARAMS = ("alignment = 40    # in percent\nlr = .5  # step size\nloss = 'nll'\nseeds = [0, 1]\nrates = [.1, 1]\n"
          "debug = False\npath = None")
START = "from softnce.runs import this_run\nrun = this_run()"


def notebook(path, *cells, params=PARAMS, tags=('parameters',), runs=None):
    """A title, a cell of parameters per tag, then the cells (text after '#md ' is Markdown).
    `runs` becomes a cell tagged so, after the first cell."""
    made = [new_markdown_cell('# Test\n\n> A subtitle')]
    made += [new_code_cell(params, metadata={'tags': [t] if t else []}) for t in tags]
    made += [new_markdown_cell(c[4:]) if c.startswith('#md ') else new_code_cell(c) for c in cells]
    if runs: made.insert(3, new_code_cell(runs, metadata={'tags': ['runs']}))
    nbformat.write(new_notebook(cells=made), path)
    return path


def cli(*args, cwd, **env):
    command, env = [SCRIPT, *map(str, args)], {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)


def start(*args, cwd):
    "The command, in the background."
    command, pipe = [SCRIPT, *map(str, args)], subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, stdout=pipe, stderr=pipe, text=True)


def wait_for(condition, seconds=240):
    "Wait until the condition holds: for a process to get somewhere, never to measure it."
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic() < end, 'the run never got there'
        time.sleep(.02)
