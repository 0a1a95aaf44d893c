"softnce.runs.values: types, ranges, and what a text on the command line means."
import json

import numpy as np
import pytest
import torch
import yaml

from softnce.runs.experiment import Parameter
from softnce.runs.values import UsageError, check_allowed, check_value, parse_overrides, read_number, read_yaml, to_yaml


@pytest.mark.parametrize('value, default, want', [
    (3, 1, 3), (3, 1., 3.), ('1e-3', 1., .001), ('-2E+4', 1., -2e4), (True, False, True), ('a', 'b', 'a'),
    ([3], [0, 1], [3]), ([], [0], []), ([2, .5], [.1, 1], [2., .5]), ((3, 4), [0], [3, 4]), (np.int64(3), 1, 3),
    (np.float32(.5), 1., .5), (torch.tensor(3), 1, 3), (np.arange(2), [5], [0, 1]), ('x', None, 'x'),
    ([1, 'a', None], None, [1, 'a', None]), (None, None, None), ([1, 'a'], [], [1, 'a']),
    ([[1, 2], [3]], [[0]], [[1, 2], [3]]), ([None, 2], [None, .5], [None, 2])])
def test_check_value_accepts(value, default, want):
    got = check_value('x', value, default)
    assert got == want and type(got) is type(want)
    if isinstance(want, list): assert list(map(type, got)) == list(map(type, want))


@pytest.mark.parametrize('value, default, message', [
    (True, 1, r'x must be int, like its default 1; got True \(bool\)'), (1, False, 'x must be bool'),
    (1., 1, 'x must be int'), ('1e3', 1, 'x must be int'), (True, 1., 'x must be float'),
    ('fast', 1., r"x must be float, like its default 1.0; got 'fast' \(str\)"), (3, 'nll', 'x must be str'),
    (None, 1, r'x must be int, like its default 1; got None \(NoneType\)'), (3, [0], 'x must be list'),
    ('0,1', [0], 'x must be list'), ([0, 'one'], [0], r"x\[1\] must be int"),
    ([[1, .5]], [[0]], r'x\[0\]\[1\] must be int'), ([True], [.1], r'x\[0\] must be float'),
    ({'a': 1}, None, 'x must be an int, float, str, bool, list or None'), (10**400, 1., 'x must be float'),
    (float('nan'), 1., 'x must be float, like its default 1.0; got nan'), ('nan', 1., 'got .nan.'),
    ([.1, float('nan')], None, 'x must be an int')])
def test_check_value_refuses(value, default, message):
    with pytest.raises(UsageError, match=message): check_value('x', value, default)


def test_parse_overrides():
    got = parse_overrides(['a=1', 'b = [1, x]', 'c=null', "d='3'", 'e=x=y', 'f=1e-3'])
    assert got == {'a': 1, 'b': [1, 'x'], 'c': None, 'd': '3', 'e': 'x=y', 'f': .001}


@pytest.mark.parametrize('pairs, message', [
    (['steps'], "-p takes key=value, got 'steps'"), (['=3'], '-p takes key=value'), (['a b=3'], '-p takes key=value'),
    (['a=[1,'], r'the value is not YAML; quote it'), (['a=1', 'a=2'], '-p a was given twice')])
def test_parse_overrides_refuses(pairs, message):
    with pytest.raises(UsageError, match=message): parse_overrides(pairs)


# ---- ranges

@pytest.mark.parametrize('comment, good, bad', [
    ('[int >= 1] passes', [1, 7, None, [1, 2]], [0, 1.5, True, 'one', [1, 0]]),
    ('[float > 0, <= 1]', [.5, 1, 1e-9], [0, 1.1, '0.5']), ('[> -1e-1]', [0, 5.], [-.1, 'a', True]),
    ('[nll | info_nce]', ['nll', None], ['nl', 3]), ('[16 | 32 | auto]', [16, '32', 'auto'], [17, '']),
    ('[str]', ['a'], [3, False]), ('[bool]', [True], [1, 'yes']), ('the share', [0, 'x', []], []),
    ('[0, 1] or more', [5], []), ('see [int]', ['x'], [])])
def test_a_bracket_says_what_is_allowed(comment, good, bad):
    for value in good: check_allowed('x', value, comment)
    for value in bad:
        with pytest.raises(UsageError, match=r'^x(\[\d\])? must be .*; got '): check_allowed('x', value, comment)


@pytest.mark.parametrize('comment', ['[int >= a]', '[float between 0 and 1]', '[> ]', '[int, often]', '[int > 1-2]'])
def test_a_bracket_that_says_nothing(comment):
    with pytest.raises(UsageError, match=r'the comment of x begins with \['): check_allowed('x', 1, comment)


# ---- texts

@pytest.mark.parametrize('text, want', [
    ('1e-3', .001), ('1E3', 1000.), ('.5', .5), ('5.', 5.), ('-2', -2), ('+5', 5), ('1_000', 1000), ('0x1F', 31),
    ('[1e-3, 1e-2]', [.001, .01]), ('true', True), ('null', None), ('~', None), ('', None), ('.inf', float('inf')),
    *((t, t) for t in ('010', '-007', '1:30', '1:30:00', '1_00', '0b11', '0o10', 'no', 'Yes', 'on', '2024-01-01', '=')),
    *((t, t) for t in ('<<', '1e', 'e3', '12.5.1', 'a: b', '# x', 'x # y', '@x', '*x', '!x', '%x', '-', 'C:/a', '~/a')),
    ('[010, 1:30, no]', ['010', '1:30', 'no']), ('"1e-3"', '1e-3'), ("'010'", '010'), ('"\\u00fc"', 'ü')])
def test_a_text_is_a_number_only_where_it_looks_like_one(text, want):
    got = parse_overrides([f'x={text}'])['x']
    want = want.strip() if isinstance(want, str) else want
    assert got == want and type(got) is type(want)


def test_where_the_default_is_text_values_are():
    known = {'a': Parameter('nll'), 'b': Parameter(['x']), 'c': Parameter(1), 'd': Parameter(False)}
    got = parse_overrides(['a=010', 'b=[1e-3, no, "8"]', 'c=5', 'd=off'], known)
    assert got == {'a': '010', 'b': ['1e-3', 'no', '8'], 'c': 5, 'd': False}
    assert parse_overrides(['d=maybe'], known) == {'d': 'maybe'} and parse_overrides(['a=null'], known) == {'a': None}


def test_numbers_of_an_older_reader():
    got = [read_number(t) for t in ('1e-3', '-1e-3', ' 7 ', '010', '[1]', '', 'true', '~', '- 1')]
    assert got == [.001, -.001, 7, '010', '[1]', '', 'true', '~', '- 1']


# ---- files

def test_a_file_of_parameters(tmp_path):
    path = tmp_path/'a=b.yaml'
    path.write_bytes(b'\xef\xbb\xbflr: 1e-3\nseeds: [0, 1]\nname: 010\n<<: {epochs: 30}\n')
    known = {'name': Parameter('x')}
    want = {'lr': .001, 'seeds': [0, 1], 'name': '010', 'epochs': 30}
    assert parse_overrides([f'@{path}'], known) == want
    assert parse_overrides(['lr=2', f'@{path}'], known) == want | {'lr': 2}  # the command line wins
    with pytest.raises(UsageError, match='-p epochs was given twice'): parse_overrides([f'@{path}', f'@{path}'])


@pytest.mark.parametrize('content, message', [
    (b'a: [1,', 'x.yaml is not YAML: '), (b'- 1', 'must hold a mapping, a `name: value` a line; it holds list'),
    (b'', 'it holds NoneType'), (b'a: 1\nb: 2\na: 3', "x.yaml has 'a' twice"), (b'a: \xff', 'x.yaml: not UTF-8 text'),
    (None, 'x.yaml: No such file or directory')])
def test_a_file_that_is_none(tmp_path, content, message):
    if content is not None: (tmp_path/'x.yaml').write_bytes(content)
    with pytest.raises(UsageError, match=message) as e: parse_overrides([f"@{tmp_path/'x.yaml'}"])
    assert '\n' not in str(e.value)


def test_what_is_written_is_read_by_both(tmp_path):
    values = dict(a=1e-3, b='1e-3', c='010', d=[1, .5, 'no'], e=None, f=True, g='1:30', h=1e-7, i='x: y', j='0x1F')
    (tmp_path/'p.yaml').write_text(to_yaml(values))
    assert read_yaml(tmp_path/'p.yaml') == values and list(read_yaml(tmp_path/'p.yaml')) == list(values)
    assert json.dumps(yaml.safe_load(to_yaml(values))) == json.dumps(values)
    assert to_yaml(dict(lr=.5, name='nll')) == 'lr: 0.5\nname: nll\n'  # as it always was
