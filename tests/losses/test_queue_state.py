"""The state of a `Queue`: plain bytes in every kind of file, older files, and queues that do not fit."""
import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn

from softnce import Queue, SoftTargetInfoNCE, SparseTargets, mix, smooth

K = 5
IDS = torch.tensor([0, 3, 1])
HARD = SparseTargets.from_labels(IDS, K)
FILLS = {
    'empty': None, 'ids': IDS, 'dense': torch.eye(K)[IDS]*.5 + .1, 'float64': torch.eye(K)[IDS].double(),
    'bfloat16': torch.eye(K)[IDS].bfloat16(), 'one class': HARD, 'smoothed': smooth(mix(HARD, .7), .1),
    'each epsilon': smooth(HARD, torch.tensor([.1, .2, .3])),
}


class Model(nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.head, self.loss = nn.Linear(3, K), SoftTargetInfoNCE(torch.full((K,), 1/K), noise_samples=Queue(size))
    @property
    def queue(self): return self.loss.noise_samples


def filled(fill):
    model = Model()
    if FILLS[fill] is not None: model.queue.push(FILLS[fill])
    return model


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, SparseTargets):
        assert torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)
        assert type(a.epsilon) is type(b.epsilon) and torch.as_tensor(a.epsilon == b.epsilon).all()
        assert a.num_classes == b.num_classes and a.dtype == b.dtype
    elif a is not None: assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize('fill', FILLS)
def test_safetensors(fill, tmp_path):
    model, other = filled(fill), Model()
    save_model(model, tmp_path/'m.safetensors')
    assert load_model(other, tmp_path/'m.safetensors') == (set(), [])
    assert_same(other.queue.targets, model.queue.targets)
    assert load_file(tmp_path/'m.safetensors')['loss.noise_samples._extra_state'].dtype == torch.uint8


@pytest.mark.parametrize('fill', FILLS)
def test_state_dict_and_copies(fill, tmp_path):
    model = filled(fill)
    torch.save(model.state_dict(), tmp_path/'m.pt')
    other = Model()
    other.load_state_dict(torch.load(tmp_path/'m.pt', weights_only=True))
    for got in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(got.queue.targets, model.queue.targets)
    assert all(isinstance(v, torch.Tensor) for v in model.state_dict().values())
    if fill == 'empty': return
    full = other.queue
    full.load_state_dict(Queue(4).state_dict())  # empties it
    assert full.targets is None


def test_a_queue_that_went_on_is_the_one_that_was_saved():
    "Value and gradient of the next step, with the queue and without it."
    torch.manual_seed(0)
    a, x = filled('smoothed'), torch.randn(3, 3)
    b = Model()
    b.load_state_dict(a.state_dict())
    t = smooth(HARD, .1)
    mine, other = a.loss(a.head(x), t), b.loss(b.head(x), t)
    assert torch.equal(mine, other) and (mine - SoftTargetInfoNCE()(a.head(x), t)).abs() > 1e-3


def test_only_the_last_rows_are_saved():
    queue = Queue(2)
    for i in range(4): queue.push(torch.tensor([i]))
    other = Queue(2)
    other.load_state_dict(queue.state_dict())
    assert other.targets.tolist() == [2, 3]


OLDER = {'empty': None, 'dense': FILLS['dense'], 'ids': IDS,
         'sparse': dict(indices=HARD.indices, weights=HARD.weights.contiguous(), epsilon=.1, num_classes=K)}


@pytest.mark.parametrize('kind', OLDER)
def test_older_files_are_read(kind):
    "As the state was before: None, rows, or a dict."
    model = Model()
    state = {**Model().state_dict(), 'loss.noise_samples._extra_state': OLDER[kind]}
    model.load_state_dict(state)
    wanted = SparseTargets(**OLDER[kind]) if kind == 'sparse' else OLDER[kind]
    assert_same(model.queue.targets, wanted)


def test_a_queue_of_another_size_or_other_classes():
    with pytest.raises(ValueError, match='size must be 4 as of the queue that was saved, got 8'):
        Model(8).load_state_dict(filled('ids').state_dict())
    for rows in (torch.eye(K + 1)[IDS], SparseTargets.from_labels(IDS, K + 1)):
        saved = Queue(4)
        saved.push(rows)
        with pytest.raises(ValueError, match=f'Queue over {K + 1} classes, got one with rows over {K}'):
            filled('dense').queue.load_state_dict(saved.state_dict())
        model = Model()
        model.queue.load_state_dict(saved.state_dict())  # an empty one does not know yet
        for grad in (True, False):
            with pytest.raises(ValueError, match=f'Queue over {K} classes, got one with rows over {K + 1} classes'), \
                 torch.set_grad_enabled(grad): model.loss(torch.randn(3, K), HARD)


def test_rows_move_with_the_module_and_keep_their_dtype():
    model = filled('smoothed').to(torch.float64).bfloat16()
    assert model.queue.targets.dtype == torch.float32 and model.head.weight.dtype == torch.bfloat16
    model.to('meta')
    assert model.queue.targets.device.type == 'meta'
    assert all(v.device.type == 'meta' for v in model.state_dict().values())
    Model().load_state_dict(model.state_dict(), assign=True)


@pytest.mark.slow
@pytest.mark.parametrize('fill', FILLS)
def test_save_pretrained_and_back(fill, tmp_path):
    "Slow for the import of transformers' models. The model is built on the meta device, and cast."
    from transformers import PretrainedConfig, PreTrainedModel
    class Pretrained(PreTrainedModel):
        config_class = PretrainedConfig
        def __init__(self, config):
            super().__init__(config)
            self.model = Model()
            self.model.loss = SoftTargetInfoNCE(torch.full((K,), 1/K), torch.tensor(2.), Queue(4))
            self.post_init()
        def forward(self, x, labels=None): return self.model.loss(self.model.head(x), labels)
    model = Pretrained(PretrainedConfig())
    if FILLS[fill] is not None: model.model.queue.push(FILLS[fill])
    with torch.no_grad(): model.model.loss.temperature.fill_(3.)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        other, said = Pretrained.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
        assert not said['missing_keys'] and not said['unexpected_keys'] and not said['mismatched_keys']
        assert_same(other.model.queue.targets, model.model.queue.targets)
        assert other.model.loss.temperature == 3 and 'temperature=3.0' in repr(other)
        assert torch.equal(other.model.head.weight, model.model.head.weight.to(dtype))
