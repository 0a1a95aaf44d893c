"softnce.vision.files: what lies in a folder or a zip file, grey levels, orientation, files that are no pictures."
import pickle, struct, zipfile, zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import jpeg, put, zipped
from softnce.vision.files import Files, UnreadableImage, read_bytes, scan


def both(folder, tmp_path): # the folder, and a zip file of what it holds
    path = tmp_path/'of.zip'
    with zipfile.ZipFile(path, 'w') as z:
        for f in sorted(folder.rglob('*')): z.write(f, f.relative_to(folder))
    return folder, path


def test_traces_of_systems_are_no_data(tmp_path):
    folder = tmp_path/'d'
    for name in ('cat/1.jpg', 'cat/2.JPEG', 'notes.txt', 'cat/.hidden.jpg', 'cat/._1.jpg', '__MACOSX/cat/._1.jpg',
                 '.ipynb_checkpoints/cat/1-checkpoint.jpg', '@eaDir/1.jpg', 'Thumbs.db', '.DS_Store'):
        put(folder/name, b'x')
    (folder/'dog').mkdir()
    for root in both(folder, tmp_path):
        found = scan(root)
        assert (found.images, found.others, found.empty) == (['cat/1.jpg', 'cat/2.JPEG'], ['notes.txt'], ['dog'])


def test_a_link_to_a_folder_above_is_followed_once(tmp_path):
    put(tmp_path/'d'/'cat'/'1.jpg')
    (tmp_path/'d'/'cat'/'again').symlink_to(tmp_path/'d', target_is_directory=True)
    assert scan(tmp_path/'d').images == ['cat/1.jpg']


@pytest.mark.parametrize('ending', 'jpg jpeg jfif jpe png gif bmp webp ppm pgm tif tiff'.split())
def test_endings_that_are_images(ending, tmp_path):
    kind = dict(jpg='JPEG', jfif='JPEG', jpe='JPEG', tif='TIFF', pgm='PPM', ppm='PPM').get(ending, ending.upper())
    put(tmp_path/f'1.{ending}', jpeg(1, ending=kind))
    assert scan(tmp_path).images == [f'1.{ending}'] and Files(tmp_path, [f'1.{ending}'])[0].size == (64, 64)


def test_zip_files_of_windows_and_home_folders(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path/'w.zip', 'w') as z:
        info = zipfile.ZipInfo('x'); info.filename = 'cat\\1.jpg' # what an archiver without the rule writes
        z.writestr(info, jpeg(1))
    assert scan(tmp_path/'w.zip').images == ['cat/1.jpg']
    monkeypatch.setenv('HOME', str(tmp_path))
    files = Files('~/w.zip', ['cat/1.jpg'])
    assert files[0].size == (64, 64) and read_bytes('~/w.zip', 'cat/1.jpg') == jpeg(1)
    assert pickle.loads(pickle.dumps(files))[0].tobytes() == files[0].tobytes()


def test_a_file_that_is_no_zip_file_is_refused(tmp_path):
    put(tmp_path/'d.tar.gz', b'\x1f\x8b tar')
    with pytest.raises(ValueError, match=r'root must be a folder or a zip file, .*d.tar.gz is neither'):
        scan(tmp_path/'d.tar.gz')


# ---- grey levels and orientation

RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize('name,levels,full', [
    ('u16.png', (RAMP*65535).astype('u2'), 65535), ('u12.png', (RAMP*4095).astype('u2'), 4095),
    ('u8.tif', (RAMP*255).astype('u2'), 255), ('u16.tif', (RAMP*65535).astype('u2'), 65535),
    ('share.tif', RAMP.astype('f4'), 1), ('f8.tif', (RAMP*255).astype('f4'), 255),
    ('f16.tif', (RAMP*65535).astype('f4'), 65535), ('i32.tif', (RAMP*65535).astype('i4'), 65535),
])
def test_grey_levels_are_scaled_and_not_clipped(name, levels, full, tmp_path):
    Image.fromarray(levels).save(tmp_path/name)
    got = np.asarray(Files(tmp_path, [name])[0])
    assert got.shape == (64, 64, 3) and abs(got[..., 0]-levels.astype('f8')*255/full).max() <= .51
    assert (got[..., :1] == got).all()


@pytest.mark.parametrize('levels', [RAMP-.5, RAMP*1e6, np.where(RAMP > .5, np.nan, RAMP), np.full((2, 2), np.inf)])
def test_grey_levels_of_unknown_scale_are_refused(levels, tmp_path):
    Image.fromarray(levels.astype('f4')).save(tmp_path/'x.tif')
    with pytest.raises(UnreadableImage, match=r'x.tif \(ValueError: grey levels'): Files(tmp_path, ['x.tif'])[0]


@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_are_upright(orientation, tmp_path):
    turns = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
             5: lambda x: np.rot90(np.flipud(x), -1), 6: lambda x: np.rot90(x, 1),
             7: lambda x: np.rot90(np.flipud(x), 1), 8: lambda x: np.rot90(x, -1)}
    upright = np.asarray(Image.open(put(tmp_path/'a.png', jpeg(3, ending='PNG'))).crop((0, 0, 32, 64)))
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turns[orientation](upright))).save(tmp_path/'b.png', exif=exif)
    assert np.array_equal(np.asarray(Files(tmp_path, ['b.png'])[0]), upright)


# ---- files that are no pictures

def bomb(side=14000):
    "A PNG of 14,000 x 14,000 pixels in a few kilobytes."
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    lines = zlib.compress(b'\0'*(side//8+1)*side, 9)
    head = struct.pack('>IIBBBBB', side, side, 1, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', lines) + chunk(b'IEND', b'')


@pytest.mark.parametrize('data,reason', [
    (b'', 'UnidentifiedImageError'), (b'not an image', 'UnidentifiedImageError'),
    (jpeg(1)[:400], 'OSError: .*[Tt]runcated'),
    (jpeg(1, ending='PNG')[:60], 'OSError'), (bomb(), 'DecompressionBombError: Image size'),
])
def test_a_file_that_is_no_picture_is_named(data, reason, tmp_path):
    put(tmp_path/'d'/'x.png', data)
    for root in both(tmp_path/'d', tmp_path):
        with pytest.raises(UnreadableImage, match=rf'^x.png \({reason}'): Files(root, ['x.png'])[0]


def test_a_damaged_member_of_a_zip_file_is_named(tmp_path):
    put(tmp_path/'d'/'1.jpg', jpeg(1)); put(tmp_path/'d'/'2.jpg', jpeg(2))
    path = zipped(tmp_path/'d', tmp_path/'d.zip')
    raw = bytearray(path.read_bytes()); raw[raw.find(b'\xff\xd8')+100] ^= 255
    path.write_bytes(bytes(raw))
    files = Files(path, ['d/1.jpg', 'd/2.jpg', 'd/3.jpg'])
    with pytest.raises(UnreadableImage, match=r'd/1.jpg \(BadZipFile: Bad CRC-32'): files[0]
    assert files[1].size == (64, 64)
    with pytest.raises(UnreadableImage, match=r'd/3.jpg \(KeyError'): files[2]


def test_damaged_metadata_do_not_lose_a_picture(tmp_path):
    exif = b'Exif\0\0II*\0\x08\0\0\0\xff\xff' + bytes(range(20))
    Image.open(put(tmp_path/'a.png', jpeg(3, ending='PNG'))).save(tmp_path/'a.jpg', exif=exif)
    assert Files(tmp_path, ['a.jpg'])[0].size == (64, 64)


def test_relative_roots_are_below_the_current_directory(tmp_path, monkeypatch):
    put(tmp_path/'d'/'1.jpg', jpeg(1))
    monkeypatch.chdir(tmp_path)
    assert Files('d', scan(Path('d')).images)[0].size == (64, 64)
