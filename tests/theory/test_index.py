"""The index of equations: each number of the paper stands on one page, with a cell below it that checks it, and the
committed table leads there."""
import json
import os
import re
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[2]/'nbs'
NUMBERS = range(1, 54)


def notebook(cells): return {'cells': [{'cell_type': kind, 'source': source} for kind, source in cells]}


def pages(root=NBS):
    "Notebooks by their path below nbs/."
    return {p.relative_to(root).as_posix(): json.loads(p.read_text(encoding='utf-8'))
            for p in sorted(root.rglob('*.ipynb'))
            if not any(part[0] in '._' for part in p.relative_to(root).parts)}


def lines(cell): return ''.join(cell['source']).splitlines() if cell['cell_type'] == 'markdown' else []


def checks(cell):
    "Whether a code cell compares something: an assert, `assert_close` or a helper of that kind, in a cell that is run."
    source = ''.join(cell['source'])
    if cell['cell_type'] != 'code' or re.search(r'^#\|\s*eval:\s*false', source, re.MULTILINE): return False
    return bool(re.search(r'\bassert\b|\b(assert_close|close|same|vanishes)\(', source))


def anchor(heading):
    "A heading's identifier by Pandoc's rules."
    kept = ''.join(c for c in heading.lower() if c.isalnum() or c.isspace() or c in '_-.')
    return re.sub(r'^[^a-z]+', '', '-'.join(kept.split()))


def tags(nb):
    "(number, heading, whether a later cell of the section checks something) for every numbered equation of a notebook."
    cells, heading, depth = nb['cells'], None, 0
    for i, cell in enumerate(cells):
        for line in lines(cell):
            if match := re.match(r'(#+) (.*)', line): depth, heading = len(match[1]), match[2].strip()
            for n in re.findall(r'\\tag\{(\d+)\}', line):
                checked = False
                for later in cells[i+1:]:
                    if any((m := re.match(r'(#+) ', o)) and len(m[1]) <= depth for o in lines(later)): break
                    checked = checked or checks(later)
                yield int(n), heading, checked


def faults(books):
    "What keeps a reader from finding the cell that checks an equation."
    found = {}
    for name, nb in books.items():
        for n, heading, checked in tags(nb):
            found.setdefault(n, []).append(name)
            if heading is None: yield f'({n}) on {name} stands before any heading'
            if not checked: yield f'({n}) on {name} has no cell after it in its section that checks something'
            if n not in NUMBERS: yield f'({n}) on {name} is no equation of the paper'
    for n in NUMBERS:
        if n not in found: yield f'({n}) stands on no page'
        elif len(found[n]) > 1: yield f'({n}) stands on several pages: {", ".join(found[n])}'


def table_faults(books, table):
    "Rows of the index that are missing, doubled, or lead elsewhere than to the section with the equation."
    rows = [(int(n), link)
            for n, link in re.findall(r'^\| \((\d+)\) \|[^|]*\|[^|]*\]\(([^)]*)\) \|', table, re.MULTILINE)]
    if [n for n, _ in rows] != list(NUMBERS): yield f'rows {[n for n, _ in rows]}'
    path = lambda name: os.path.relpath(name, 'theory')
    wanted = {n: f'{path(name)}#{anchor(heading)}' for name, nb in books.items() for n, heading, _ in tags(nb)
              if heading}
    for n, link in rows:
        if link != wanted.get(n): yield f'({n}) leads to {link}, it stands at {wanted.get(n)}'


def committed_table():
    nb = json.loads((NBS/'theory'/'equations.ipynb').read_text(encoding='utf-8'))
    outputs = [''.join(o['data']['text/markdown']) for c in nb['cells'] for o in c.get('outputs', [])
               if 'text/markdown' in o.get('data', {})]
    assert len(outputs) == 1
    return outputs[0]


def test_every_equation_has_one_place_and_a_check(): assert list(faults(pages())) == []


def test_the_committed_table_leads_there(): assert list(table_faults(pages(), committed_table())) == []


def test_every_anchor_is_one_heading_of_its_page():
    for name, nb in pages().items():
        if not any(True for _ in tags(nb)): continue
        anchors = [anchor(line.lstrip('# ')) for c in nb['cells'] for line in lines(c) if re.match(r'##+ ', line)]
        for _, heading, _ in tags(nb): assert anchors.count(anchor(heading)) == 1, (name, heading)


# ---------------------------------------------------------------- errata
def errata(): return pages()['theory/errata.ipynb']
def sections(nb): # that an entry leads to
    found = [line[3:] for c in nb['cells'] for line in lines(c) if line.startswith('## ')]
    return [name for name in found if name != 'A question']


def named(text):
    "The equation numbers in a text: Eq. (5), Eqs. (7)-(9), (12)."
    return {n for first, last in re.findall(r'\((\d+)\)(?:-\((\d+)\))?', text)
            for n in range(int(first), int(last or first) + 1)}


def test_table_of_errata_and_sections_name_the_same_equations():
    rows = [re.match(r'\| ([^|]*) \|.*\]\(#([^)]*)\) \|$', line) for c in errata()['cells'] for line in lines(c)
            if re.match(r'\| [^|]*\|.*#', line)]
    assert all(rows) and len(rows) > 20
    by_section = {}
    for where, target in (row.groups() for row in rows): by_section.setdefault(target, set()).update(named(where))
    assert by_section.keys() == {anchor(s) for s in sections(errata())}
    for section in sections(errata()):
        assert by_section[anchor(section)] == named(section.split(':')[-1] if ':' in section else ''), section


def test_every_section_of_the_errata_computes_something():
    checked, heading = {}, None
    for cell in errata()['cells']:
        for line in lines(cell):
            if line.startswith('## '): heading = line
        if heading: checked[heading] = checked.get(heading, False) or (checks(cell) and bool(cell['outputs']))
    assert checked and all(checked.values()), [h for h, ok in checked.items() if not ok]


def test_the_verdicts_of_the_index_are_the_errata():
    "Corrected with its links where an entry is about the equation; exact where entries are about the text alone."
    wanted = {n: [] for n in NUMBERS}
    for line in (line for c in errata()['cells'] for line in lines(c)):
        if not (entry := re.match(r'\| ([^|]*) \|.*\]\(#([^)]*)\) \|$', line)): continue
        if any(word in entry[1] for word in ('after', 'between', 'text', 'footnote')): continue
        for n in named(entry[1]): wanted[n] += [entry[2]] if entry[2] not in wanted[n] else []
    found = re.findall(r'^\| \((\d+)\) \|[^|]*\|[^|]*\|(.*)\|$', committed_table(), re.MULTILINE)
    assert len(found) == len(NUMBERS)
    for n, verdict in found:
        assert re.findall(r'\]\(errata\.ipynb#([^)]*)\)', verdict) == wanted[int(n)], n
        assert verdict.strip().startswith('corrected: ' if wanted[int(n)] else 'exact'), n
    assert sum(not links for links in wanted.values()) > 20


# ---------------------------------------------------------------- the checks can fail
GOOD = [('markdown', '## A\n\n$$ x \\tag{1} $$'), ('code', 'assert x == 1')]


@pytest.mark.parametrize('cells, fault', [
    (GOOD[:1], '(1) on a has no cell after it'),
    ([GOOD[1], GOOD[0]], '(1) on a has no cell after it'),
    ([GOOD[0], ('markdown', '## B'), GOOD[1]], '(1) on a has no cell after it'),
    ([GOOD[0], ('code', 'x = 1')], '(1) on a has no cell after it'),
    ([GOOD[0], ('code', '#| eval: false\nassert x')], '(1) on a has no cell after it'),
    ([('markdown', '$$ x \\tag{1} $$'), GOOD[1]], '(1) on a stands before any heading'),
    ([('markdown', '## A\n\n$$ x \\tag{54} $$'), GOOD[1]], '(54) on a is no equation'),
    (GOOD + GOOD, '(1) stands on several pages'),
    ([('markdown', '## A'), GOOD[1]], '(1) stands on no page')])
def test_a_fault_is_found(cells, fault): assert any(o.startswith(fault) for o in faults({'a': notebook(cells)}))


def test_good_pages_have_no_fault():
    assert not [o for o in faults({'a': notebook(GOOD)}) if o.startswith('(1)')]
    assert not [o for o in faults({'a': notebook([GOOD[0], ('markdown', '### deeper'), GOOD[1]])})
                if o.startswith('(1)')]


def test_a_faulty_table_is_found():
    table, books = committed_table(), pages()
    assert any('rows' in o for o in table_faults(books, table.replace('| (17) |', '| (18) |')))
    assert any(o.startswith('(7) leads to')
               for o in table_faults(books, re.sub(r'(\| \(7\) .*)#which', r'\1#what', table)))


# ---------------------------------------------------------------- the pages of the theory
THEORY = sorted(p for p in (NBS/'theory').glob('[!._]*.ipynb') if p.stem != 'index')


def source(cell): return ''.join(cell['source'])


def figure_faults(cells):
    "Figures without text for those who do not see them, without a caption, or wider than a page."
    for cell in cells:
        if cell['cell_type'] != 'code' or re.search(r'^#\|\s*eval:\s*false', source(cell), re.MULTILINE): continue
        drawn = any('image/png' in o.get('data', {}) for o in cell['outputs'])
        for width in re.findall(r'figsize=\(([\d.]+)', source(cell)):
            if float(width) > 6.4: yield f'{width} inches wide'
        for option in ('fig-alt', 'fig-cap'):
            if drawn and not re.search(rf'^#\| {option}: "[^"]+"$', source(cell), re.MULTILINE): yield f'no {option}'


def question_faults(cells):
    "It ends with a question, and an answer that is computed and folded."
    text, answer = cells[-2:]
    if '## A question' not in source(text) or '?' not in source(text).split('## A question')[-1]: yield 'no question'
    if not source(answer).startswith('#| code-fold: true\n#| code-summary: Answer\n'): yield 'the answer is not folded'
    if not answer.get('outputs'): yield 'the answer was not computed'


@pytest.mark.parametrize('path', THEORY, ids=lambda p: p.stem)
def test_a_page_of_theory(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert list(figure_faults(cells)) == [] and list(question_faults(cells)) == []
    if path.stem != 'notation': assert any('notation.ipynb' in source(c) for c in cells if c['cell_type'] == 'markdown')


def test_faults_of_a_page_are_found():
    def cell(kind, text, outputs=()): return dict(cell_type=kind, source=text, outputs=list(outputs))
    picture = dict(data={'image/png': ''})
    drawn = cell('code', 'fig, ax = plt.subplots(figsize=(6.5, 3))', [picture])
    assert list(figure_faults([drawn])) == ['6.5 inches wide', 'no fig-alt', 'no fig-cap']
    good = '#| fig-alt: "seen"\n#| fig-cap: "said"\nfig, ax = plt.subplots(figsize=(6.4, 3))'
    assert list(figure_faults([cell('code', good, [picture])])) == []
    asked, answer = cell('markdown', '## A question\n\nWhy?'), cell('code', '1 + 1')
    assert list(question_faults([asked, answer])) == ['the answer is not folded', 'the answer was not computed']
    assert list(question_faults([answer, asked]))[0] == 'no question'
    folded = '#| code-fold: true\n#| code-summary: Answer\n1 + 1'
    assert list(question_faults([asked, cell('code', folded, ['2'])])) == []
