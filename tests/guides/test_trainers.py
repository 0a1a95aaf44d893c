"The clients that own the loop: Lightning, Hugging Face Trainer, Keras and fastai, each against a plain loop of torch."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from clients import (Whole, closed_form, cross_entropy, in_batch, network, parameters, plain_steps, problem, ran,
                     unsmoothed, with_state)
from test_frameworks import bf16_and_exact, same
from torch.testing import assert_close
from trainers import hugging_face_model, hugging_face_trainer, lightning_module, lightning_trainer, rows_of_step

import softnce

HERE = Path(__file__).resolve().parent
pytestmark = [pytest.mark.filterwarnings('ignore')]


@pytest.fixture(autouse=True)
def accelerate_forgets():
    "Accelerate keeps one state for the process: precision and device of the first that asks."
    yield
    if 'accelerate' in sys.modules:
        from accelerate.state import AcceleratorState
        AcceleratorState._reset_state(True)


def two_ranks(client, tmp_path, *launch):
    "The parameters that each of two processes ends with."
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = os.environ | {'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, *launch, str(HERE/'trainers.py'), client, str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=400, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return [torch.load(tmp_path/f'{rank}.pt') for rank in range(2)]


# ---------------------------------------------------------------- Lightning
@pytest.mark.slow
@ran('Lightning', 'single')
def test_lightning():
    pytest.importorskip('lightning')
    module = lightning_module(softnce.SoftTargetInfoNCE(problem()[2]))
    lightning_trainer().fit(module)
    same(parameters(module.whole.net), plain_steps(in_batch))


@pytest.mark.slow
@ran('Lightning', 'DDP')
def test_lightning_in_two_processes(tmp_path):
    pytest.importorskip('lightning')
    for found in two_ranks('lightning', tmp_path): same(found, plain_steps(cross_entropy))


@pytest.mark.slow
@ran('Lightning', 'bf16')
def test_lightning_bf16():
    pytest.importorskip('lightning')
    module = lightning_module(closed_form(), watch=True)
    lightning_trainer(precision='bf16-mixed').fit(module)
    assert len(module.seen) == 4
    for logits, value, targets in module.seen: bf16_and_exact(logits, value, targets)


@pytest.mark.slow
@ran('Lightning', 'compile')
def test_lightning_compiled():
    pytest.importorskip('lightning')
    module = lightning_module(closed_form())
    module.whole.compile(fullgraph=True, backend='aot_eager')
    lightning_trainer().fit(module)
    same(parameters(module.whole.net), plain_steps(cross_entropy))


@pytest.mark.slow
@ran('Lightning', 'save/load')
def test_lightning_checkpoint(tmp_path):
    pytest.importorskip('lightning')
    straight, first, second = (lightning_module(with_state()) for _ in range(3))
    lightning_trainer(max_epochs=2).fit(straight)
    trainer = lightning_trainer()
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path/'first.ckpt')
    lightning_trainer(max_epochs=2).fit(second, ckpt_path=tmp_path/'first.ckpt')
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@ran('Lightning', 'predict')
def test_lightning_predicts_probabilities():
    pytest.importorskip('lightning')
    module, points = lightning_module(closed_form()), problem()[0]
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(points), 8)
    same(torch.cat(lightning_trainer().predict(module, data)), unsmoothed(network()(points)).detach())


# ---------------------------------------------------------------- Hugging Face Trainer
@pytest.mark.slow
@ran('Hugging Face Trainer', 'single')
@pytest.mark.parametrize('kind', ['soft', 'ids'])
@pytest.mark.parametrize('batch, accumulate', [(8, 1), (4, 2), (3, 3)])
def test_hugging_face_accumulates(tmp_path, kind, batch, accumulate):
    pytest.importorskip('transformers')
    points, targets, _ = problem()
    labels = targets if kind == 'soft' else targets.argmax(1)
    model = hugging_face_model(closed_form)
    trainer = hugging_face_trainer(model, tmp_path, rows_of_step(closed_form(reduction='sum')),
                                   [{'x': x, 'labels': t} for x, t in zip(points, labels)],
                                   per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate)
    trainer.train()
    def value(logits, soft): return cross_entropy(logits, soft if kind == 'soft' else soft.argmax(1))
    same(parameters(model.whole.net), plain_steps(value, rows=batch*accumulate))


@pytest.mark.slow
@ran('Hugging Face Trainer', 'DDP')
def test_hugging_face_in_two_processes(tmp_path):
    pytest.importorskip('transformers')
    launch = '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'
    for found in two_ranks('hugging_face', tmp_path, *launch): same(found, plain_steps(cross_entropy))


@pytest.mark.slow
@ran('Hugging Face Trainer', 'bf16')
def test_hugging_face_bf16(tmp_path):
    pytest.importorskip('transformers')
    loss, seen = closed_form(), []
    def compute(outputs, labels, num_items_in_batch=None):
        # accelerate gives the outputs back in 32 bits: what they are rounded to shows that they were computed in 16
        assert torch.equal(outputs['logits'], outputs['logits'].bfloat16().float())
        value = loss(outputs['logits'].bfloat16(), labels)
        seen.append((outputs['logits'].detach().bfloat16(), value.detach(), labels))
        return value
    hugging_face_trainer(hugging_face_model(closed_form), tmp_path, compute, bf16=True).train()
    assert len(seen) == 4
    for logits, value, targets in seen: bf16_and_exact(logits, value, targets)


@pytest.mark.slow
@ran('Hugging Face Trainer', 'compile')
def test_hugging_face_compiled(tmp_path):
    pytest.importorskip('transformers')
    model = hugging_face_model(closed_form)
    hugging_face_trainer(model, tmp_path, torch_compile_backend='aot_eager').train()
    same(parameters(model.whole.net), plain_steps(cross_entropy))


@pytest.mark.slow
@ran('Hugging Face Trainer', 'save/load')
def test_hugging_face_model_holds_the_loss(tmp_path):
    pytest.importorskip('transformers')
    straight, first = hugging_face_model(with_state), hugging_face_model(with_state)
    hugging_face_trainer(straight, tmp_path, num_train_epochs=2).train()
    hugging_face_trainer(first, tmp_path).train()
    first.save_pretrained(tmp_path)
    second = type(first).from_pretrained(tmp_path)
    hugging_face_trainer(second, tmp_path).train()
    assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
@ran('Hugging Face Trainer', 'predict')
def test_hugging_face_predicts(tmp_path):
    pytest.importorskip('transformers')
    points, targets, _ = problem()
    model, loss = hugging_face_model(closed_form), closed_form(reduction='sum')
    trainer = hugging_face_trainer(model, tmp_path, rows_of_step(loss))
    found = trainer.predict(trainer.train_dataset)
    probs = loss.probs(torch.from_numpy(found.predictions), epsilon=.2, targets='votes')
    same(probs, unsmoothed(network()(points)).detach())
    assert_close(torch.from_numpy(found.label_ids), targets)


# ---------------------------------------------------------------- Keras
def keras_model(loss):
    os.environ['KERAS_BACKEND'] = 'torch'
    keras = pytest.importorskip('keras')
    if keras.backend.backend() != 'torch': pytest.skip('Keras was imported with another backend')
    class KerasLoss(keras.losses.Loss):
        def call(self, y_true, y_pred): return y_pred[:, 0] if y_pred.is_meta else loss(y_pred, y_true)
    model, net = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3)]), network()
    model.set_weights([net.weight.detach().T.numpy(), net.bias.detach().numpy()])
    model.compile(keras.optimizers.SGD(.5), KerasLoss())
    return model


def keras_fit(model):
    points, targets, _ = problem()
    model.fit(points.numpy(), targets.numpy(), batch_size=8, epochs=1, shuffle=False, verbose=0)
    weight, bias = map(torch.from_numpy, model.get_weights())
    return torch.cat([weight.T.flatten(), bias])


@pytest.mark.slow
@ran('Keras', 'single')
def test_keras():
    loss = softnce.SoftTargetInfoNCE(problem()[2], reduction='none')
    same(keras_fit(keras_model(loss)), plain_steps(in_batch))


@pytest.mark.slow
@ran('Keras', 'save/load')
def test_keras_model_comes_back(tmp_path):
    model = keras_model(closed_form(reduction='none'))
    import keras
    keras_fit(model)
    model.save(tmp_path/'model.keras')
    again = keras.models.load_model(tmp_path/'model.keras', compile=False)
    again.compile(keras.optimizers.SGD(.5), model.loss)
    assert_close(keras_fit(again), keras_fit(model), rtol=0, atol=0)


@pytest.mark.slow
@ran('Keras', 'predict')
def test_keras_predicts():
    loss, points = closed_form(reduction='none'), problem()[0]
    logits = torch.from_numpy(keras_model(loss).predict(points.numpy(), verbose=0))
    same(loss.probs(logits, epsilon=.2, targets='votes'), unsmoothed(network()(points)).detach())


# ---------------------------------------------------------------- fastai
class FastaiLoss:
    "As the guide has it."
    def __init__(self, loss): self.loss = loss
    def __call__(self, logits, targets): return self.loss(logits, targets)
    def activation(self, logits): return self.loss.probs(logits, epsilon=.2, targets='votes')
    def decodes(self, probs): return probs.argmax(-1)
    @property
    def reduction(self): return self.loss.reduction
    @reduction.setter
    def reduction(self, value): self.loss.reduction = value
    def to(self, device): return self


def learner(whole, **options):
    try: from fastai.learner import Learner
    except ImportError as error: pytest.skip(f'fastai does not import: {error}')
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.optimizer import SGD
    points, targets, _ = problem()
    rows = list(zip(points, targets))
    data = DataLoaders(DataLoader(rows, bs=8), DataLoader(rows, bs=8))
    return Learner(data, whole.net, loss_func=FastaiLoss(whole.loss), opt_func=SGD, wd=0., **options)


def quietly(learn, epochs=1):
    with learn.no_logging(): learn.fit(epochs, .5)
    return parameters(learn.model)


@pytest.mark.slow
@ran('fastai', 'single')
def test_fastai():
    same(quietly(learner(Whole(softnce.SoftTargetInfoNCE(problem()[2])))), plain_steps(in_batch))


@pytest.mark.slow
@ran('fastai', 'save/load')
def test_fastai_checkpoint(tmp_path):
    first, second = (learner(Whole(closed_form()), path=tmp_path) for _ in range(2))
    quietly(first)
    first.save('first')
    second.load('first')
    assert_close(quietly(second), quietly(first), rtol=0, atol=0)


@pytest.mark.slow
@ran('fastai', 'predict')
def test_fastai_predicts():
    learn, points = learner(Whole(closed_form())), problem()[0]
    probs, _, classes, losses = learn.get_preds(with_decoded=True, with_loss=True)
    same(probs, unsmoothed(network()(points)).detach())
    assert torch.equal(classes, probs.argmax(1)) and losses.shape == (len(points),)
    assert learn.loss_func.reduction == 'mean'
