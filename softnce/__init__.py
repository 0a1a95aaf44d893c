"Noise contrastive estimation with soft targets: losses that take hard, smoothed, mixed and sparse targets."
__version__ = "0.1.0"


def _lazy(package, *modules):
    "`__getattr__` and `__dir__` of a package that offers its modules' public names, each imported on first use."
    from importlib import import_module
    def load(name): return import_module(f"{package}.{name}")
    def names(): return sorted({n for m in modules for n in load(m).__all__})
    def __getattr__(name):
        if name in modules: return load(name)
        if name == "__all__": return names()
        if not name.startswith("_"):
            for m in map(load, modules):
                if name in m.__all__: return getattr(m, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    def __dir__(): return sorted({*modules, *names(), "__version__"} if package == __name__ else {*modules, *names()})
    return __getattr__, __dir__


__getattr__, __dir__ = _lazy(__name__, "targets", "noise", "losses")  # the command line need not wait for torch
