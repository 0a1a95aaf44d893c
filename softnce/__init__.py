"Noise contrastive estimation with soft targets: losses that take hard, smoothed, mixed and sparse targets."
__version__ = "0.1.0"

from importlib import import_module

_modules = "targets", "noise", "losses"  # their public names are softnce's own


def __getattr__(name):
    "Public names on first use: the command line need not wait for torch."
    if name in _modules: return import_module(f"softnce.{name}")
    if name == "__all__": return [n for m in _modules for n in import_module(f"softnce.{m}").__all__]
    if not name.startswith("_"):
        for m in map(import_module, (f"softnce.{m}" for m in _modules)):
            if name in m.__all__: return getattr(m, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__(): return [*globals(), *__getattr__("__all__"), *_modules]
