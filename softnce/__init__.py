"""Train and judge classifiers whose targets are soft.

Targets are soft where labels are smoothed, mixed (MixUp, CutMix), voted on by annotators or given by a teacher. The
losses, cross-entropies and noise contrastive ones, take such rows as they are, at any number of classes; `probs` says
how the logits are to be read afterwards, or that they cannot be.

>>> import torch
>>> from softnce import SoftTargetInfoNCE, one_hot, smooth
>>> logits = torch.zeros(8, 10, requires_grad=True)  # any classifier's output
>>> targets = smooth(one_hot(torch.arange(8), 10), epsilon=.1)  # label smoothing
>>> loss = SoftTargetInfoNCE(noise_probs=torch.full((10,), .1))  # label frequencies
>>> print(f"{loss(logits, targets):.4f}")  # equal scores: each row is one of eight, log 8
2.0794
>>> loss.probs(logits, epsilon=.1, targets='labels').shape  # what the logits mean
torch.Size([8, 10])
"""
import sys as _sys
from types import ModuleType as _Module

__version__ = "0.1.0"


def _lazy(package, *modules):
    """`__getattr__` and `__dir__` of a package that offers its modules' public names, each imported on first use.

    Of a module and a name in it that are called alike, the package has the name."""
    from importlib import import_module
    def load(name): return import_module(f"{package}.{name}")
    def names(): return sorted({n for m in modules for n in load(m).__all__})
    def __getattr__(name):
        if name in modules: return _name_in(load(name), name)
        if name == "__all__": return names()
        if not name.startswith("_"):
            for m in map(load, modules):
                if name in m.__all__: return getattr(m, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    def __dir__(): return sorted({*modules, *names(), "__version__"} if package == __name__ else {*modules, *names()})
    if package in _sys.modules: _sys.modules[package].__class__ = _Front  # not while its notebook runs as a page
    return __getattr__, __dir__


def _name_in(module, name):
    "What a module offers under its own name, or the module; a folder is not asked, which would load all it has."
    return getattr(module, name) if name in vars(module).get("__all__", ()) else module


class _Front(_Module):
    "A package whose names come before its modules: Python sets a module, once imported, as attribute of its package."
    def __setattr__(self, name, value):
        ours = isinstance(value, _Module) and value.__name__ == f"{self.__name__}.{name}"
        super().__setattr__(name, _name_in(value, name) if ours else value)


__getattr__, __dir__ = _lazy(__name__, "sparse", "targets", "noise", "losses")  # the command line need not wait for torch
