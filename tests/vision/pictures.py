"Made-up images in the layouts in which data sets are delivered."
import io, pickle, zipfile

import numpy as np
from PIL import Image


def jpeg(seed, size=64, mode='RGB', ending='JPEG'):
    "Bytes of a made-up image; greyscale with mode L."
    g = np.random.default_rng(seed)
    grey = mode == 'L'
    blocks = np.ones((size//4, size//4) if grey else (size//4, size//4, 1))
    x = np.kron(g.integers(0, 255, (4, 4) if grey else (4, 4, 3)), blocks).astype('uint8')
    out = io.BytesIO()
    Image.fromarray(x).save(out, ending)
    return out.getvalue()


def put(path, data=b''):
    "A file with its folders; text is encoded."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def tiny(root, classes=('n03', 'n01', 'n02'), train=10, val=4):
    """Tiny ImageNet's layout with made-up images: unsorted wnids, some files greyscale, val labels in a text file,
    boxes and an unlabelled test folder."""
    top, said, n = root/'tiny-imagenet-200', [], 0
    for k, w in enumerate(classes):
        for i in range(train): put(top/f'train/{w}/images/{w}_{i}.JPEG', jpeg(100*k+i, mode='L' if i == 3 else 'RGB'))
        put(top/f'train/{w}/{w}_boxes.txt')
        for i in range(val):
            put(top/f'val/images/val_{n}.JPEG', jpeg(900+n))
            said.append(f'val_{n}.JPEG\t{w}\t0\t0\t63\t63'); n += 1
        put(top/f'test/images/test_{k}.JPEG', jpeg(k))
    put(top/'val/val_annotations.txt', '\n'.join(said[::-1])+'\n')
    put(top/'wnids.txt', '\n'.join(classes)+'\n')
    put(top/'words.txt', 'n01\tgoldfish, Carassius auratus\nn02\ttoad\n')
    return root


def zipped(folder, path):
    "A zip file with this folder at its top."
    with zipfile.ZipFile(path, 'w') as z:
        for f in sorted(folder.rglob('*')):
            z.write(f, f.relative_to(folder.parent))
    return path


def tree(root, parts, classes='abc', each=6, size=48):
    "One folder a class below each part."
    for p in parts:
        for k, c in enumerate(classes):
            for i in range(each):
                put(root/p/c/f'{i}.png', jpeg(hash((len(p), k, i)) % 2**31, size, ending='PNG'))
    return root


def cifar_rows(rows, classes=5, seed=0):
    "A part of CIFAR-100 as a dict: class ids that a fifth of the rows share."
    data = np.random.default_rng(seed).integers(0, 255, (rows, 3072), dtype=np.uint8)
    return dict(data=data, fine_labels=[i % classes for i in range(rows)], coarse_labels=[0]*rows,
                filenames=[f'{i}.png' for i in range(rows)], batch_label='made up')


def cifar(root, rows=60, classes=5, dump=lambda v: pickle.dumps(v, protocol=2)):
    "Pickles as in cifar-100-python."
    folder = root/'cifar-100-python'
    put(folder/'train', dump(cifar_rows(rows, classes)))
    put(folder/'test', dump(cifar_rows(rows//3, classes, seed=1)))
    names = [f'class {k}' for k in range(classes)]
    put(folder/'meta', dump(dict(fine_label_names=names, coarse_label_names=['all'])))
    return root
