"softnce.graphs.files: whether the specimens are there, by their names and first bytes."
import pytest

from softnce.graphs.files import RAW, STAGES, check_graphs

WHOLE = b'\x89HDF\r\n\x1a\n and more'


def specimens(root, content=WHOLE, leave_out=()):
    for stage, stacks in STAGES.items():
        for stack in stacks:
            path = root/RAW/stage/f'{stack}_ds1.h5'
            path.parent.mkdir(parents=True, exist_ok=True)
            if stack not in leave_out: path.write_bytes(content)
    return root


def test_the_benchmark_is_whole(tmp_path, capsys, monkeypatch):
    found = check_graphs(specimens(tmp_path), [0, 4], None)
    assert list(found['data']) == [str(tmp_path/RAW)] and found['data'][str(tmp_path/RAW)].startswith('84 files')
    assert not capsys.readouterr().out
    monkeypatch.setenv('HOME', str(tmp_path.parent))
    assert check_graphs(f'~/{tmp_path.name}', [0], None) == found
    monkeypatch.chdir(tmp_path.parent)
    assert check_graphs(tmp_path.name, [0], None) == found


def test_what_is_missing_is_named(tmp_path, capsys):
    check_graphs(specimens(tmp_path, leave_out=('419', '756')), [0], None)
    said = capsys.readouterr().out
    assert said.startswith(f'2 of the 84 specimens have no file in {tmp_path/RAW}: 2-V/419, 3-VI/756')
    with pytest.raises(FileNotFoundError, match='does not: there is no such folder; -p download=true'):
        check_graphs(tmp_path/'nowhere', [0], None)
    assert check_graphs(tmp_path/'nowhere', [0], None, download=True) == dict(data={}, space=3e9)
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'notes.txt').touch()
    with pytest.raises(FileNotFoundError, match='does not: it holds notes.txt'):
        check_graphs(tmp_path/'other', [0], None)


@pytest.mark.parametrize('content', [b'', b'\x89HDF', b'<html>', b'version https://git-lfs'])
def test_a_file_that_is_no_specimen(tmp_path, content):
    (specimens(tmp_path)/RAW/'2-V'/'419_ds1.h5').write_bytes(content)
    with pytest.raises(ValueError, match=rf'419_ds1.h5 is no HDF5 file \({len(content)} bytes\): fetch it again'):
        check_graphs(tmp_path, [0], None)


@pytest.mark.parametrize('folds, per_stage, cells, message', [
    ([0, 3], 3, (20, 60), r'folds must be below per_stage=3 on synthetic tissue, got \[0, 3\]'),
    ([0], 3, (10, 60), r'20 <= fewest <= most, got \[10, 60\]'), ([0], 3, (60, 20), r'got \[60, 20\]'),
    ([0], 3, (20,), r'got \[20\]')])
def test_synthetic_tissue(folds, per_stage, cells, message):
    with pytest.raises(ValueError, match=message): check_graphs(None, folds, per_stage, cells)
    assert check_graphs(None, [0, 4], None) == check_graphs(None, [0, 2], 3) == dict(data={}, space=2e8)
