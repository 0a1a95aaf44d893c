"softnce.training.tracking: the line of an epoch, and what trackers are told."
import json, os, subprocess, sys
from pathlib import Path

import pytest
import torch
from training_jobs import job

import softnce.training.tracking as tracking
from softnce.training.config import TrainConfig
from softnce.training.loop import fit
from softnce.training.tracking import epoch_line, follow


def test_the_line_by_hand():
    "20 of 50 steps in 40 s, of them 10 since it resumed: 4 s a step, 120 s left here and 2 epochs of 200 s."
    assert epoch_line(1, 3, 20, 50, 40., 640, 'rows', begun=10) == \
        'epoch 1/3, step 20/50, 16 rows/s, 2:00 left of the epoch, 8:40 of the training'
    assert epoch_line(2, 2, 1, 2000, 10., 2048, 'images').endswith('5:33:10 left of the epoch, 5:33:10 of the training')
    assert '0:00 left of the epoch, 0:00 of the training' in epoch_line(1, 1, 1, 1, 0., 8, 'rows')


def test_the_line_is_written_and_the_batches_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, 'EVERY', 0.)
    images = [(torch.zeros(4, 3, 2, 2), torch.zeros(4))]*3
    lines = []
    for batch in follow(images, tmp_path/'line', (1, 2, 0, 3), ranks=2):
        assert batch[0] is images[0][0]
        lines += [(tmp_path/'line').read_text()] if (tmp_path/'line').exists() else []
    assert [line.split(',')[1] for line in lines] == [' step 1/3', ' step 2/3'] and all(' images/s' in s for s in lines)
    assert (tmp_path/'line').read_text() == 'epoch 1/2, evaluation' and len(list(tmp_path.iterdir())) == 1
    assert len(list(follow(images, tmp_path/"no"/"folder", (1, 2, 0, 3)))) == 3  # a line that is lost stops nothing
    rows = [(torch.zeros(4, 2), torch.zeros(4))]
    for _ in follow(rows+rows, tmp_path/'line', (1, 1, 0, 2)): pass


def test_a_training_says_where_it_is(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, 'EVERY', 0.)
    seen = []
    def note(row): seen.append((tmp_path/'line').read_text())
    plain = fit(*job('hard', splits), TrainConfig(epochs=2, checkpoint_dir=tmp_path/'a'))
    said = fit(*job('hard', splits), TrainConfig(epochs=2, checkpoint_dir=tmp_path/'b', progress=tmp_path/'line'), note)
    assert said == plain and seen == ['epoch 1/2, evaluation', 'epoch 2/2, evaluation']


def test_a_bar(splits, tmp_path):
    code = ("import torch; from softnce.training.tracking import follow; import time\n"
            "for _ in follow([(torch.zeros(4, 3, 2, 2), torch.zeros(4))]*3, True, (1, 2, 0, 3)): time.sleep(.02)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert 'epoch 1/2' in done.stderr and '0/3' in done.stderr and not done.stdout


def test_tensorboard_goes_on_in_the_same_run(splits, tmp_path):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    class Stop(Exception): pass
    def once(row):
        if row['epoch'] == 2 and not (tmp_path/'stopped').exists():
            (tmp_path/'stopped').touch()
            raise Stop
    config = TrainConfig(epochs=3, checkpoint_dir=tmp_path, trackers=('tensorboard',), run_name='images-1',
                         described=dict(dataset='digits', crop=[.3, 1.]))
    with pytest.raises(Stop): fit(*job('hard', splits), config, once)
    fit(*job('hard', splits), config, once)
    found = events.EventAccumulator(str(tmp_path/'softnce'))
    found.Reload()
    assert [e.step for e in found.Scalars('top1')] == [1, 2, 3]  # epoch 2 was done, and not yet logged
    settings = [p.read_text() for p in (tmp_path/'softnce').rglob('hparams.yml')]
    assert len(settings) == 2 and all('dataset: digits' in s and 'epochs: 3' in s and "crop: '[0.3, 1.0]'" in s
                                      for s in settings)


FAKES = {
    'wandb': '''
import json, os
def _say(**kw): open(os.environ['SAID'], 'a').write(json.dumps(kw)+'\\n')
class _Config:
    def update(self, values, **kw): _say(config=values)
config = _Config()
class _Run:
    def log(self, values, step=None, **kw): _say(log=values, step=step)
    def finish(self): _say(finish=1)
def init(**kw): _say(init=kw); return _Run()
''',
    'mlflow': '''
import json, os
from types import SimpleNamespace as N
def _say(**kw): open(os.environ['SAID'], 'a').write(json.dumps(kw)+'\\n')
utils = N(validation=N(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
def search_experiments(**kw): return []
def create_experiment(**kw): return '7'
def start_run(**kw): _say(init=kw); return N(info=N(run_id=kw.get('run_id') or 'id-of-mlflow'))
def log_params(values): _say(config=values)
def log_metrics(values, step=None): _say(log=values, step=step)
def end_run(): _say(finish=1)
'''}


@pytest.mark.slow
@pytest.mark.parametrize('name', list(FAKES))
def test_trackers_get_everything_and_resume(name, tmp_path):
    "Stand-ins for the packages that write down what they are told."
    (tmp_path/f'{name}.py').write_text(FAKES[name])
    (tmp_path/f'{name}-1.0.dist-info').mkdir()
    (tmp_path/f'{name}-1.0.dist-info'/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    code = ("import sys\nfrom training_jobs import job\nfrom softnce.vision import digits\n"
            "from softnce.training import TrainConfig, fit\n"
            f"config = TrainConfig(epochs=2, checkpoint_dir={str(tmp_path/'c')!r}, trackers=({name!r},), "
            "run_name='images-1', described=dict(dataset='digits'))\n"
            "fit(*job('hard', digits()), config)\n")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    env = os.environ | dict(PYTHONPATH=path, SAID=str(tmp_path/'said'))
    for _ in range(2): subprocess.run([sys.executable, '-c', code], env=env, check=True, capture_output=True)
    said = [json.loads(line) for line in (tmp_path/'said').read_text().splitlines()]
    inits, configs = [s['init'] for s in said if 'init' in s], [s['config'] for s in said if 'config' in s]
    if name == 'wandb':
        assert inits == [dict(project='softnce', name='images-1', id='images-1', resume='allow')]*2
    else:
        assert [i['run_name'] for i in inits] == ['images-1']*2
        assert [i['run_id'] for i in inits] == [None, 'id-of-mlflow']
    assert all(c['dataset'] == 'digits' and c['epochs'] == 2 and 'lr' in c for c in configs) and len(configs) == 2
    assert [s['step'] for s in said if 'log' in s] == [1, 2] and {'finish': 1} in said
