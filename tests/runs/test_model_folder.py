"softnce.runs.model_folder: written whole or as it was, and one line for what is wrong."
import json

import pytest
from small_experiments import cli

from softnce.runs.model_folder import find_model, write_config, write_folder
from softnce.runs.values import UsageError


def filled(text='weights'):
    def fill(part):
        (part/'model.safetensors').write_text(text)
        write_config(part, dict(family='vision', weights=dict(used='last', last=dict(file='model.safetensors'))),
                     dict(architecture='x'))
    return fill


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    write_folder(tmp_path/'model', filled())
    def killed(part):
        (part/'model.safetensors').write_text('half')
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): write_folder(tmp_path/'model', killed)
    find_model(tmp_path/'model').check()
    for left in ('.model.tmp', '.model.old'): (tmp_path/left).mkdir(); (tmp_path/left/'x').write_text('of a kill')
    write_folder(tmp_path/'model', filled('others'))
    assert [p.name for p in tmp_path.iterdir()] == ['model']
    assert (tmp_path/'model'/'model.safetensors').read_text() == 'others'


def test_entries_of_others_stay(tmp_path):
    write_folder(tmp_path/'m', filled())
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    assert config['architecture'] == 'x' and config['softnce']['format'] == 1
    import hashlib
    assert config['softnce']['files'] == {'model.safetensors': hashlib.sha256(b'weights').hexdigest()}
    model = find_model(tmp_path/'m')
    assert model.run is None and model.weights() == model.weights('last') == 'model.safetensors'
    with pytest.raises(UsageError, match="weights must be last, got 'best'"): model.weights('best')


def test_the_folder_of_a_run_has_its_run(tmp_path):
    write_folder(tmp_path/'model', filled())
    (tmp_path/'params.yaml').write_text('{}')
    with pytest.raises(UsageError, match='is not finished'): find_model(tmp_path)
    (tmp_path/'metrics.json').write_text('[]')
    assert find_model(tmp_path).run == tmp_path and find_model(tmp_path/'model').run == tmp_path


@pytest.mark.parametrize('args, message', [
    (['predict', 'nowhere', 'x.jpg'], "there is no folder 'nowhere'; softnce status"),
    (['export', 'nowhere', '--to', 'x'], "there is no folder 'nowhere'"),
    (['export', '.'], "Missing option '--to'. softnce export --help  shows how"),
    (['predict', '.'], "Missing argument 'FILES...'. softnce predict --help  shows how"),
    (['predict', '.', 'x', '--top', '0'], "Invalid value for '--top'"), (['predict', '.', 'x', '--cvs', 'y'], '--cvs'),
    (['perdict', '.'], "softnce --help  shows how")])
def test_the_command_refuses(tmp_path, args, message):
    done = cli(*args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1
