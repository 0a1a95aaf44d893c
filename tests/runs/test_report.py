"softnce.runs.report: what a run has to show, and many runs as one table."
import json, re

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure

from softnce.runs.report import collect, compare, show_report
from softnce.runs.run import Run
from softnce.runs.values import UsageError


@pytest.fixture
def shown(capsys):
    def text(run): show_report(run); return capsys.readouterr().out
    return text


def test_report_shows_tables_and_figures_in_order(tmp_path, shown):
    run = Run(tmp_path)
    run.save_table(pd.DataFrame({'loss': ['a'], 'acc': [1.]}), 'plain')
    run.save_table([], 'grouped')
    run.save_figure(Figure(), 'fig.1')
    text = shown(run)
    assert text.index('plain') < text.index('grouped') < text.index('fig.1.png') and 'grouped\n(none)\n' in text


def test_report_is_wide_and_falls_back_to_metrics(tmp_path, shown):
    run = Run(tmp_path)
    row = {f'column_{i}': i/7 for i in range(40)}
    (tmp_path/'metrics.json').write_text(json.dumps([row]))
    text = shown(run)
    assert text.startswith('metrics\n') and len(text.splitlines()[1].split()) == 40 and '5.5714' in text
    run.save_table([{'text': 'x'*300}], 'long')
    text = shown(run)
    assert 'metrics' not in text and 'x'*300 in text


def test_a_long_table_says_where_the_rest_is(tmp_path, shown):
    run = Run(tmp_path)
    run.save_table([{'row': i} for i in range(53)], 'long')
    lines = shown(run).splitlines()
    assert lines[:3] == ['long', ' row', '   0'] and lines[51:53] == ['  49', '... 3 more rows in long']


def finished(folder, params, metrics):
    folder.mkdir(parents=True)
    (folder/'params.yaml').write_text(yaml.safe_dump(params))
    if metrics is not None: (folder/'metrics.json').write_text(json.dumps(metrics))


def test_collect(tmp_path, capsys):
    finished(tmp_path/'gmm'/'a', {'lr': .1, 'seed': 5}, [{'seed': 0, 'loss': 1.}, {'seed': 1, 'loss': None}])
    finished(tmp_path/'gmm'/'b', {'lr': .2, 'seed': 6}, {'seed': 0, 'loss': 3., 'id': 'x'})
    finished(tmp_path/'gmm'/'c', {'lr': .3, 'seed': 7}, None)
    finished(tmp_path/'gmm'/'d', {'lr': .4, 'seed': 7}, None)
    finished(tmp_path/'images'/'e', {'net': 'cnn', 'seed': 8}, [])
    Run(tmp_path/'gmm'/'c').log_row(seed=0, epoch=3)
    Run(tmp_path/'gmm'/'c').log_row(seed=0, epoch=4)
    df = collect(tmp_path)
    err = capsys.readouterr().err
    assert re.search(r'unfinished: .*gmm/c, last row: seed=0 epoch=4\n', err)
    assert re.search(r'unfinished: .*gmm/d, last row: none\n', err)
    assert list(zip(df['experiment'], df['id'])) == [('gmm', 'a'), ('gmm', 'a'), ('gmm', 'b'), ('images', 'e')]
    assert df['param_seed'].tolist() == [5, 5, 6, 8] and df['seed'].tolist()[:3] == [0, 1, 0]
    assert df['lr'].tolist()[:3] == [.1, .1, .2]
    assert df['metric_id'][2] == 'x' and df['net'][3] == 'cnn' and np.isnan(df['loss'][1])
    assert len(collect(tmp_path/'gmm')) == 3 and collect(tmp_path/'gmm'/'b')['loss'].tolist() == [3.]
    assert collect(tmp_path/'gmm'/'c').empty
    with pytest.raises(UsageError, match="there is no run in 'nowhere'"): collect('nowhere')


def made(folder, **env):
    finished(folder, {'lr': .1}, {'nll': 1.})
    (folder/'env.json').write_text(json.dumps(env))


def test_collect_never_mixes(tmp_path):
    made(tmp_path/'gmm'/'a', code='1', package='p')
    made(tmp_path/'gmm'/'b', code='1', package='p')
    made(tmp_path/'images'/'c', code='2', package='q')
    assert list(collect(tmp_path)) == ['experiment', 'id', 'lr', 'nll']  # each experiment is of one piece
    made(tmp_path/'gmm'/'d', code='1', package='r')
    message = (r'the runs of gmm do not belong in one table: the code of softnce in 2 versions \(p: 2 runs, r: d\). '
               'Make them again with softnce run --restart, or take all with softnce collect --mixed')
    with pytest.raises(UsageError, match=message): collect(tmp_path)
    by = collect(tmp_path, mixed=True).set_index('id')['made_by']
    assert by['a'] == by['b'] != by['d'] and len(set(by)) == 3


@pytest.mark.parametrize('name, content', [('metrics.json', '[{"nll"'), ('params.yaml', ''), ('env.json', '[')])
def test_collect_names_a_damaged_file(tmp_path, name, content):
    made(tmp_path/'gmm'/'a', code='1')
    (tmp_path/'gmm'/'a'/name).write_text(content)
    with pytest.raises(UsageError, match=f'gmm/a/{name} is damaged'): collect(tmp_path)


def test_a_damaged_history_and_table_are_named(tmp_path, shown):
    run = Run(tmp_path)
    (tmp_path/'history.csv').write_bytes(b'a,b\n1,2\n\xff\xfe,3\n')
    with pytest.raises(UsageError, match='history.csv is damaged'): run.history()
    run.save_table([{'a': 1}], 'table1')
    (tmp_path/'table1.csv').write_text('a,b\n1,2\n1,2,3,4\n')
    with pytest.raises(UsageError, match='table1.csv is damaged'): shown(run)


def test_compare(tmp_path):
    "Per experiment; lists and None as parameters; a metric that is missing somewhere, or called like a parameter."
    finished(tmp_path/'n'/'a', {'xs': [1], 'k': None, 'seed': 5}, {'seed': 0, 'top1': .5, 'ece': .1})
    finished(tmp_path/'n'/'b', {'xs': [2], 'k': None, 'seed': 5}, {'seed': 0, 'top1': .9})
    finished(tmp_path/'n'/'c', {'xs': [2], 'k': 3, 'seed': 5}, {'seed': 0, 'top1': None})
    finished(tmp_path/'m'/'d', {'seed': 5}, {'note': 'no number'})
    (m, how_m), (n, how_n) = compare(tmp_path)
    assert how_n == 'n: best first by top1 (more is better)' and list(n) == ['id', 'k', 'xs', 'top1', 'ece']
    assert n['id'].tolist() == ['b', 'a', 'c'] and how_m == 'm: no metric' and list(m) == ['id', 'note']
    assert compare(tmp_path/'n', by='ece')[0][0]['id'].tolist()[0] == 'a'
    with pytest.raises(UsageError, match="there is no metric 'acc'; there are: top1, ece"):
        compare(tmp_path/'n', by='acc')
    with pytest.raises(UsageError, match="n has no rows of split 'test'; it has: no splits"):
        compare(tmp_path/'n', split='test')
