"softnce.vision.labels: layouts of folders, tables of probabilities, votes and class names."
import numpy as np
import pytest

from pictures import put
from softnce.vision.labels import part_of, read_array, read_folders, read_table, to_probabilities


@pytest.mark.parametrize('part,names', [
    ('train', 'train Train TRAIN training training_set train-set trainset train2017 train1 images_train'),
    ('valid', 'val valid validation Validation val_images valset dev eval'),
    ('test', 'test Test testing test_set testset test1'),
    (None, 'cat tests trainer crash_test images 1 train_station'),
])
def test_usual_names_of_parts(part, names):
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


# ---- folders

def said(*names):
    "What the reader makes of these images: 'part/class name' of each."
    found = read_folders(list(names))
    parts = found.parts or ['-']*len(found.names)
    rows = zip(found.names, found.targets, parts)
    return sorted(f'{part}/{found.classes[k]} {n}' for n, k, part in rows), found.left_out


@pytest.mark.parametrize('top', ['', 'pets/', 'archive/pets/', 'train/'])
@pytest.mark.parametrize('layout', ['{part}/{cls}/1.jpg', '{part}/images/{cls}/1.jpg', '{part}/{part}/{cls}/1.jpg',
                                    '{cls}/{part}/1.jpg', '{part}/{cls}/images/1.jpg', 'pets_{part}/{cls}/1.jpg'])
@pytest.mark.parametrize('words', [('train', 'val', 'test'), ('Training', 'Validation', 'Testing'),
                                   ('train_set', 'dev_set', 'test_set')])
def test_layouts_with_parts(top, layout, words):
    parts = list(zip(words, ('train', 'valid', 'test')))
    names = {top+layout.format(part=w, cls=c): f'{part}/{c}' for w, part in parts for c in ('cat', 'dog')}
    assert said(*names) == (sorted(f'{want} {name}' for name, want in names.items()), [])


@pytest.mark.parametrize('top', ['', 'pets/', 'archive/pets/', 'data/images/'])
def test_layouts_without_parts(top):
    names = [f'{top}{c}/{i}.jpg' for c in ('cat', 'dog') for i in range(3)]
    assert said(*names) == (sorted(f"-/{n.split('/')[-2]} {n}" for n in names), [])


def test_a_training_part_alone_and_classes_called_like_parts():
    assert said('train/a/1.jpg', 'train/b/1.jpg')[0] == ['train/a train/a/1.jpg', 'train/b train/b/1.jpg']
    for names in (['car/1.jpg', 'bus/1.jpg', 'train/1.jpg'], ['control/1.jpg', 'test/1.jpg']):
        assert said(*names)[0] == sorted(f"-/{n.split('/')[0]} {n}" for n in names)


def test_what_is_left_out_is_named():
    many = [f'train/{c}/{i}.jpg' for c in 'ab' for i in range(20)]
    assert said(*many, 'extra/a/1.jpg', 'cover.jpg')[1] == ['extra/ (1 images)', '1 images beside the parts: cover.jpg']
    assert said(*many, 'test/1.jpg', 'test/2.jpg')[1] == ['2 images of the test part, without classes']
    assert said(*many, 'train/x.jpg')[1] == ['1 images in no class folder: train/x.jpg']
    assert said(*(f'pets/{n[6:]}' for n in many), 'cover.jpg')[1] == ['1 images in no class folder: cover.jpg']


@pytest.mark.parametrize('names,message', [
    (['train/cat.0.jpg', 'train/dog.0.jpg'], 'the images lie right in train/, without a folder a class'),
    (['train/cat.0.jpg', 'test/1.jpg'], 'the images lie right in train/'),
    (['train/1.jpg', 'car/1.jpg'], 'the images lie right in train/'), # two classes, or a part and something else?
    (['cat.0.jpg', 'dog.0.jpg'], '2 images without a folder a class: cat.0.jpg, dog.0.jpg'),
    (['pets/cat.0.jpg', 'pets/dog.0.jpg'], 'all 2 images are in one class, pets/'),
    (['val/a/1.jpg', 'test/b/1.jpg'], 'found test/, val/, but no part to train on'),
    (['a/1.jpg', 'b/1.jpg', 'test/a/1.jpg'], 'found a/, b/, test/, but no part to train on'),
    (['train/a/1.jpg', 'train/b/1.jpg', 'val/1.jpg'], '1 images without a folder a class: val/1.jpg'),
    (['train/a/1.jpg', 'train/b/1.jpg', 'val/a/1.jpg', 'valid/a/1.jpg'], 'found val/, valid/, 2 folders for one part'),
    (['train/a/1.jpg', 'train/b/1.jpg', 'train/c.jpg'], '1 images lie in no class folder: train/c.jpg'),
    (['train/a/1.jpg', 'train/b/1.jpg', 'x/1.jpg', 'y/2.jpg', 'z/3.jpg'], 'most images are outside of train/'),
    (['train/a/1.jpg', 'val/a/1.jpg'], 'all 2 images are in one class, a/'),
])
def test_layouts_that_would_be_guessed_are_refused(names, message):
    with pytest.raises(ValueError, match=f'^DIR: {message}.*; expected one folder a class'): read_folders(names, 'DIR')


def test_classes_of_held_out_parts_are_those_of_training():
    with pytest.raises(ValueError, match=r"DIR: classes without training images: \['c'\]"):
        read_folders(['train/a/1.jpg', 'train/b/1.jpg', 'val/c/1.jpg'], 'DIR')


def test_classes_may_be_listed():
    listed = {'v1.jpg': 'b', 'v2.jpg': 'a'}
    found = read_folders(['train/a/1.jpg', 'train/b/1.jpg', 'val/images/v1.jpg', 'val/images/v2.jpg'], 'DIR', listed)
    assert found.parts[2:] == ['valid']*2 and [found.classes[k] for k in found.targets[2:]] == ['b', 'a']


# ---- tables

IMAGES = ['1.jpg', '2.jpg', '3.jpg']


def table(tmp_path, text, images=IMAGES, encoding='utf-8', **kw):
    return read_table(put(tmp_path/'l.csv', text.encode(encoding)), images, 'DIR', **kw)


@pytest.mark.parametrize('text,encoding', [
    ('file,cat,dog\n1.jpg,.5,.5\n2.jpg,1,0\n3.jpg,.25,.75\n', 'utf-8'),
    ('file,cat,dog\r\n1.jpg,.5,.5\r\n\r\n2.jpg,1,0\r\n3.jpg,.25,.75', 'utf-8-sig'),   # Windows, BOM, an empty line
    ('file;cat;dog\n1.jpg;0,5;0,5\n2.jpg;1;0\n3.jpg;0,25;0,75\n', 'utf-8'),           # Excel in half of Europe
    ('file\tcat\tdog\n1.jpg\t.5\t.5\n2.jpg\t1\t0\n3.jpg\t.25\t.75\n', 'utf-16'),      # Excel's "Unicode text"
    ('file, cat, dog\n1.jpg, .5, .5\n2.jpg, 1, 0\n3.jpg, .25, .75\n', 'utf-8'),
    ('file,cat,dog\n1.jpg,5,5\n2.jpg,3,0\n3.jpg,1,3\n', 'utf-8'),                     # votes
    ('"file","cat","dog"\n"1.jpg",".5",".5"\n"2.jpg","1","0"\n"3.jpg",".25",".75"\n', 'utf-8'),
])
def test_tables_as_programs_write_them(text, encoding, tmp_path):
    found = table(tmp_path, text, encoding=encoding)
    assert found.names == IMAGES and found.classes == ['cat', 'dog'] and found.parts is None and not found.left_out
    np.testing.assert_allclose(found.targets, [[.5, .5], [1, 0], [.25, .75]], rtol=0, atol=1e-15)


@pytest.mark.parametrize('written,images', [
    (['1', '2', '3'], IMAGES), (['./1.jpg', './2.jpg', './3.jpg'], IMAGES),
    (['1.jpg', '2.jpg', '3.jpg'], ['pets/cat/1.jpg', 'pets/2.jpg', 'pets/dog/3.jpg']),
    (['cat/1.jpg', 'cat/2.jpg', 'dog/3.jpg'], ['pets/cat/1.jpg', 'pets/cat/2.jpg', 'pets/dog/3.jpg']),
    (['/data/me/1.jpg', '/data/me/2.jpg', '/data/me/3.jpg'], IMAGES),
    ([r'C:\x\1.jpg', r'C:\x\2.jpg', r'C:\x\3.jpg'], IMAGES),
    (['cat/1', 'cat/2', 'dog/3'], ['pets/cat/1.jpg', 'pets/cat/2.png', 'pets/dog/3.jpg']),
])
def test_file_names_as_people_write_them(written, images, tmp_path):
    assert table(tmp_path, 'file,a,b\n'+''.join(f'{n},1,0\n' for n in written), images).names == images


def test_a_file_name_that_may_mean_two_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match='row 2: labels name files that are not below DIR: 1.jpg'):
        table(tmp_path, 'file,a,b\n1.jpg,1,0\n', ['cat/1.jpg', 'dog/1.jpg'])


def test_class_names_and_votes_of_annotators(tmp_path):
    found = table(tmp_path, 'file,label\n1.jpg,dog\n2.jpg,cat\n3.jpg,dog\n')
    assert found.classes == ['cat', 'dog'] and found.targets.tolist() == [1, 0, 1]
    assert table(tmp_path, 'file,label\n1.jpg,10\n2.jpg,2\n3.jpg,10\n').classes == ['2', '10']
    found = table(tmp_path, 'file,Annotator,label\n1.jpg,x,dog\n2.jpg,x,cat\n1.jpg,y,cat\n1.jpg,z,dog\n')
    assert found.names == ['1.jpg', '2.jpg'] and found.left_out == ['1 images without a row: 3.jpg']
    np.testing.assert_allclose(found.targets, [[1/3, 2/3], [1, 0]])
    found = table(tmp_path, 'file,annotator,cat,dog\n1.jpg,x,.25,.75\n1.jpg,y,.5,.5\n')
    assert found.targets.tolist() == [[.375, .625]]


def test_a_column_may_name_the_part(tmp_path):
    found = table(tmp_path, 'file,cat,Split,dog\n1.jpg,1,Train,0\n2.jpg,0, VAL ,1\n3.jpg,0,test set,1\n')
    assert found.classes == ['cat', 'dog'] and found.parts == ['train', 'valid', 'test']


@pytest.mark.parametrize('rows', [[[33.3, 66.7], [12.5, 87.5]], [[.33, .66], [.5, .5]], [[99.5, 0], [1, 98]]])
def test_percent_and_rounded_rows_are_an_option(rows, tmp_path):
    text = 'file,cat,dog\n' + ''.join(f'{n},{a},{b}\n' for n, (a, b) in zip(IMAGES, rows))
    with pytest.raises(ValueError, match=r'row 2 \(1.jpg\) sums to .*; rescale=True \(dataset rescaled_labels\)'):
        table(tmp_path, text)
    want = np.array(rows)/np.sum(rows, 1, keepdims=True)
    np.testing.assert_allclose(table(tmp_path, text, rescale=True).targets, want, rtol=1e-12)
    text = text.replace(f'2.jpg,{rows[1][0]}', '2.jpg,7.5') # no rounding explains that
    with pytest.raises(ValueError, match='labels must be counts, or probabilities'): table(tmp_path, text, rescale=True)


@pytest.mark.parametrize('text,message', [
    ('file,cat,dog\n1.jpg,1,0\n2.jpg,,1\n', r"row 3 \(2.jpg\), column 'cat': the cell is empty"),
    ('file,cat,dog\n1.jpg,1,0\n2.jpg,1,cat\n', r"row 3 \(2.jpg\), column 'dog': 'cat' is no number"),
    ('file,cat,dog\n1.jpg,1,0\n\n2.jpg,1.5,-.5\n', r"row 4 \(2.jpg\), column 'dog': '-.5' is no number that is finite"),
    ('file,cat,dog\n1.jpg,nan,1\n', r"row 2 \(1.jpg\), column 'cat': 'nan'"),
    ('file,cat,dog\n1.jpg,1\n', r'row 2 \(1.jpg\): 2 columns, the header has 3'),
    ('file,cat,dog\n1.jpg,1,0,0\n', r'row 2 \(1.jpg\): 4 columns, the header has 3'),
    ('file,cat,dog\n1.jpg,.5,.2\n2.jpg,.5,.6\n', r'row 2 \(1.jpg\) sums to 0.7; 2 such rows$'),
    ('file,cat,dog\n1.jpg,0,0\n2.jpg,3,1\n', r'row 2 \(1.jpg\) sums to 0; 1 such rows'),
    ('1.jpg,.5,.5\n2.jpg,1,0\n', r"has no header: it begins with \['1.jpg', '.5', '.5'\]"),
    ('1,.5,.4\n2,1,0\n', r"has no header: it begins with \['1', '.5', '.4'\]"),
    ('file,cat,cat\n1.jpg,1,0\n', "row 1: two columns 'cat'"),
    ('file,cat,\n1.jpg,1,0\n', 'row 1: column 3 has no name'),
    ('file\n1.jpg\n', 'row 1: no column of classes'), ('file,cat,dog\n', 'has 1 rows'), ('', 'has 0 rows'),
    ('file,dog\n1.jpg,.7\n2.jpg,.2\n', "column 'dog': one column of numbers says nothing of a second class"),
    ('file,label\n1.jpg,cat\n2.jpg,\n', r"row 3 \(2.jpg\), column 'label': the cell is empty"),
    ('file,cat,dog\n1.jpg,1,0\n2.jpg,1,0\n1.jpg,0,1\n', 'rows 2 and 4: two rows for 1.jpg; one is expected, or a col'),
    ('file,annotator,label\n1.jpg,x,cat\n1.jpg,x,dog\n', "row 3: annotator 'x' has 1.jpg twice"),
    ('file,annotator,split,label\n1.jpg,x,train,cat\n1.jpg,y,test,dog\n', 'row 3: 1.jpg is in two parts'),
    ('file,cat,dog,split\n1.jpg,1,0,train\n2.jpg,1,0,\n', r"row 3 \(2.jpg\), column 'split': '' is none of train"),
    ('file,cat,dog,split\n1.jpg,1,0,3\n', r"row 2 \(1.jpg\), column 'split': '3' is none of"),
    ('file,cat,dog,split\n1.jpg,1,0,val\n', "column 'split': no row of the training part"),
    ('file,cat,dog\n1.jpg,1,0\nx.jpg,1,0\ny.jpg,1,0\n', 'row 3: labels name files that are not below DIR: x.jpg, y'),
    ('id,file,cat,dog\n7,1.jpg,1,0\n8,2.jpg,1,0\n', "row 2: labels .*: 7, 8; column 'file' does: make it the first"),
    ('file,cat,dog,fold\n1.jpg,1,0,3\n', "row 1: 'fold' would be a class: remove the column, or rename it"),
    ('file,cat,dog,all\n1.jpg,1,2,3\n2.jpg,0,2,2\n', "column 'all' is in every row the sum of the others: remove it"),
    ('file,anna,bert\n1.jpg,cat,dog\n2.jpg,dog,dog\n', "column 'anna': words, such as 'cat', where numbers are expec"),
    ('file,cat,dog\n1.jpg,1,0\n2.jpg,1,cat\n', r"row 3 \(2.jpg\), column 'dog': 'cat' is no number that is"),
])
def test_every_error_has_file_row_and_column(text, message, tmp_path):
    with pytest.raises(ValueError, match=f'l.csv.*{message}'): table(tmp_path, text)


@pytest.mark.parametrize('data,message', [
    ('file,Kätzchen\n1.jpg,1\n'.encode('latin1'), r'l.csv, row 1: the encoding is not UTF-8 \(byte 0xe4\)'),
    (b'PK\x03\x04 a workbook', 'l.csv is no text table: save it as CSV'), (b'\x93NUMPY\1\0v\0', 'is no text table'),
])
def test_other_encodings_and_other_files_are_named(data, message, tmp_path):
    with pytest.raises(ValueError, match=message): read_table(put(tmp_path/'l.csv', data), IMAGES)


# ---- arrays

def test_arrays_of_probabilities_and_counts(tmp_path):
    want = [[.25, .75], [1, 0], [.5, .5]]
    for rows in (want, [[2, 6], [1, 0], [3, 3]]):
        np.save(tmp_path/'l.npy', rows)
        found = read_array(tmp_path/'l.npy', IMAGES)
        assert found.targets.tolist() == want and found.classes == ['0', '1'] and found.names == IMAGES


@pytest.mark.parametrize('rows,message', [
    (np.ones((2, 2)), 'labels must have one row per image, 3, got 2'),
    (np.ones(3), r'\(N, K\), K of two or more, got float64 \(3,\)'),
    (np.ones((3, 1)), 'K of two or more'), (np.full((3, 2), 'a'), r'got <U1 \(3, 2\)'),
    ([[1, 0], [1, 0], [1.5, -.5]], r'row 2 \(3.jpg\), column 1: -0.5 is negative'),
    ([[1, 0], [np.nan, 1], [1, 0]], r'row 1 \(2.jpg\), column 0'),
    (np.array([[{}, 1]]*3), 'is no npy file of numbers: Object arrays'),
])
def test_arrays_that_are_no_labels(rows, message, tmp_path):
    np.save(tmp_path/'l.npy', rows, allow_pickle=True)
    with pytest.raises(ValueError, match=f'l.npy.*{message}'): read_array(tmp_path/'l.npy', IMAGES)


def test_exact_probabilities_are_left_as_they_are():
    rows = np.random.default_rng(0).dirichlet([1, 1, 1], 5)*(1+5e-5)
    assert np.array_equal(to_probabilities(rows, range(5)), rows)


# ---- what goes round beside the usual

@pytest.mark.parametrize('layout', ['seg_{part}/seg_{part}/{cls}/1.jpg', '{part}_data/{part}_data/{cls}/1.jpg'])
def test_a_part_in_a_folder_of_its_own_name(layout):
    names = {layout.format(part=p, cls=c): f'{p}/{c}' for p in ('train', 'test') for c in ('cat', 'dog')}
    assert said(*names) == (sorted(f'{v} {n}' for n, v in names.items()), [])
    more = [f'seg_pred/seg_pred/{i}.jpg' for i in range(3)]
    if layout.startswith('seg'): assert said(*names, *more)[1] == ['seg_pred/ (3 images)']


@pytest.mark.parametrize('tops', [('trainA', 'trainB'), ('fold1', 'fold2', 'fold3'), ('learn', 'test')])
def test_the_same_folders_in_every_folder_are_no_guess(tops):
    names = [f'{top}/{c}/{i}.jpg' for top in tops for c in ('cat', 'dog') for i in range(3)]
    with pytest.raises(ValueError, match='in each of them cat/, dog/: either may be the classes'): read_folders(names)
    assert read_folders([n.replace('/cat/', '/') for n in names]).classes == sorted(tops)  # not in every one
    assert read_folders([n.replace('/dog/', '/cat/') for n in names]).classes == sorted(tops)  # one folder more each


def test_folders_above_and_held_out_ones():
    assert said('../x/cat/1.jpg', '../x/dog/1.jpg') == (['-/cat ../x/cat/1.jpg', '-/dog ../x/dog/1.jpg'], [])
    assert {part_of(w) for w in ('holdout', 'held_out'.replace('_', ''), 'hold-out'.replace('-', ''))} == {'test'}


@pytest.mark.parametrize('text', [
    'file|cat|dog\n1.jpg|1|3\n2.jpg|1|0\n3.jpg|2|2\n', ',file,cat,dog\n0,1.jpg,1,3\n1,2.jpg,1,0\n2,3.jpg,2,2\n',
    'file,cat,dog\n1.JPG,1,3\n2.JPG,1,0\n3.Jpg,2,2\n', 'file,cat,dog\r1.jpg,1,3\r2.jpg,1,0\r3.jpg,2,2\r',
    'file,worker,label\n'+''.join(f'{i}.jpg,{w},{c}\n' for i, cs in enumerate(('cddd', 'c', 'cd'), 1)
                                  for w, c in enumerate({'c': 'cat', 'd': 'dog'}[x] for x in cs))])
def test_other_forms_of_the_same_table(text, tmp_path):
    found = table(tmp_path, text)
    assert found.classes == ['cat', 'dog'] and dict(zip(found.names, found.targets.tolist())) == {
        '1.jpg': [.25, .75], '2.jpg': [1, 0], '3.jpg': [.5, .5]}


@pytest.mark.parametrize('name', ['set', 'Subset', 'phase', 'partition'])
def test_a_column_of_parts_by_another_name(name, tmp_path):
    found = table(tmp_path, f'file,cat,dog,{name}\n1.jpg,1,0,Train\n2.jpg,1,0,dev\n3.jpg,1,0,TEST\n')
    assert found.parts == ['train', 'valid', 'test'] and found.classes == ['cat', 'dog']
    found = table(tmp_path, f'file,cat,{name}\n1.jpg,1,3\n2.jpg,1,0\n3.jpg,2,2\n')  # a class of that name
    assert not found.parts and found.classes == ['cat', name]
