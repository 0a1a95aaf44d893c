"""Trainings by the clients that own the loop, for the tests and, as a script, for a rank of two.

`python trainers.py lightning OUT` starts the second rank by itself; `torchrun ... trainers.py hugging_face OUT`.
"""
import logging
import sys

import torch
from clients import Whole, closed_form, network, parameters, problem
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset


# ---------------------------------------------------------------- Lightning
def lightning_module(loss, watch=False):
    "With `watch` it keeps logits, values and targets of its steps."
    import lightning
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.whole, self.seen = Whole(loss), []
        def train_dataloader(self):
            rank, world = self.global_rank, self.trainer.world_size
            points, targets, _ = problem()
            return DataLoader(TensorDataset(points[rank::world], targets[rank::world]), 8//world)
        def training_step(self, batch, index):
            if not watch: return self.whole(*batch)
            logits = self.whole.net(batch[0])
            value = self.whole.loss(logits, batch[1])
            self.seen.append((logits.detach(), value.detach(), batch[1]))
            return value
        def predict_step(self, batch, index):
            return self.whole.loss.probs(self.whole.net(batch[0]), epsilon=.2, targets='votes')
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .5)
    return Module()


def lightning_trainer(**options):
    import lightning
    for name in ('lightning.pytorch', 'lightning.fabric'): logging.getLogger(name).setLevel(logging.ERROR)
    return lightning.Trainer(**dict(accelerator='cpu', devices=1, logger=False, enable_progress_bar=False,
                                    enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
                                    use_distributed_sampler=False) | options)


# ---------------------------------------------------------------- Hugging Face
def hugging_face_model(loss):
    "A model that holds what `loss()` makes, and uses it where `forward` gets labels."
    from transformers import PretrainedConfig, PreTrainedModel
    class Config(PretrainedConfig): model_type = 'points'
    class Points(PreTrainedModel):
        config_class = Config
        def __init__(self, config):
            super().__init__(config)
            self.whole = Whole(loss())
            self.post_init()
        def forward(self, x, labels=None):
            logits = self.whole.net(x)
            return {'logits': logits} if labels is None else {'loss': self.whole.loss(logits, labels), 'logits': logits}
    model = Points(Config())
    model.whole.net.load_state_dict(network().state_dict())  # `post_init` draws weights of its own
    return model


def hugging_face_trainer(model, folder, compute_loss_func=None, data=None, **options):
    import transformers
    from transformers import PrinterCallback, Trainer, TrainingArguments
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs): return SequentialSampler(self.train_dataset)
    points, targets, _ = problem()
    data = data or [{'x': x, 'labels': t} for x, t in zip(points, targets)]
    options = dict(per_device_train_batch_size=8, num_train_epochs=1, learning_rate=.5, optim='sgd', max_grad_norm=0.,
                   lr_scheduler_type='constant', save_strategy='no', logging_strategy='no') | options
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, report_to='none', **options)
    trainer = InOrder(model, arguments, train_dataset=data, compute_loss_func=compute_loss_func)
    trainer.remove_callback(PrinterCallback)
    return trainer


def rows_of_step(loss):
    "The `compute_loss_func` of the guide."
    def compute(outputs, labels, num_items_in_batch=None):
        soft = labels.is_floating_point()
        return loss(outputs['logits'], labels)/(num_items_in_batch/labels.shape[-1] if soft else num_items_in_batch)
    return compute


# ---------------------------------------------------------------- a rank
def main(client, out):
    if client == 'lightning':
        module = lightning_module(closed_form())
        lightning_trainer(devices=2, strategy='ddp').fit(module)
        rank, whole = module.global_rank, module.whole
    else:
        model = hugging_face_model(closed_form)
        trainer = hugging_face_trainer(model, out, rows_of_step(closed_form(reduction='sum')), ddp_backend='gloo',
                                       per_device_train_batch_size=2, gradient_accumulation_steps=2)
        trainer.train()
        rank, whole = trainer.args.process_index, model.whole
    torch.save(parameters(whole.net), f'{out}/{rank}.pt')


if __name__ == '__main__': main(*sys.argv[1:])
