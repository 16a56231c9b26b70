"""The peers' names and signatures over flatout's ops: change the import, keep the code.

| instead of | write |
|---|---|
| `liger_kernel`, or `liger_kernel.transformers`, `liger_kernel.ops` | `flatout.compat.liger` |
| `cut_cross_entropy` | `flatout.compat.cce` |
| `flash_attn` (2.8) | `flatout.compat.flash_attn` |
| `flash_attn_interface` (FA3) | `flatout.compat.flash_attn_interface` |

The submodules have the peers' paths (`flatout.compat.flash_attn.bert_padding`). Those of
`liger_kernel.transformers` and `liger_kernel.ops` may be written without the middle part
(`flatout.compat.liger.rms_norm`), but for `transformers.auto_model` and `transformers.model`.
An option that flatout cannot serve raises NotImplementedError that names it; options that choose
between implementations of the same result are accepted. Two things are better than the originals
on purpose: no input and no incoming gradient is ever overwritten, and more dtypes are taken.
"""

import importlib
import pkgutil
import sys

_PEERS = {
    "liger_kernel": "flatout.compat.liger",
    "cut_cross_entropy": "flatout.compat.cce",
    "flash_attn": "flatout.compat.flash_attn",
    "flash_attn_interface": "flatout.compat.flash_attn_interface",
}
_LIGER_OPS = (
    "cross_entropy",
    "fused_add_rms_norm",
    "fused_linear_cross_entropy",
    "rms_norm",
    "rope",
    "swiglu",
)
# Where a peer spreads over many modules what is one module here: peer's path -> path here. The
# parent of a peer's path is no alias itself: it gets the module as an attribute.
_ALIASES = {
    "flatout.compat.liger": {
        **{f"transformers.{op}": "transformers.modules" for op in _LIGER_OPS},
        **{f"ops.{op}": "ops" for op in _LIGER_OPS},
        "ops.utils": "utils",
        "transformers.trainer_integration": "transformers.monkey_patch",
        # The same without `transformers` and `ops`.
        **{op: "" for op in _LIGER_OPS},
        "functional": "transformers.functional",
        "monkey_patch": "transformers.monkey_patch",
        "trainer_integration": "transformers.monkey_patch",
    },
    "flatout.compat.cce": {
        "constants": "",
        "linear_cross_entropy": "",
        "vocab_parallel.utils": "vocab_parallel",
    },
}


def alias_submodules(package):
    """Let the peer's submodule paths be imported below `package`, at the end of its import."""
    for path, target in _ALIASES[package].items():
        module = importlib.import_module(f"{package}.{target}".rstrip("."))
        sys.modules[f"{package}.{path}"] = module
        parent, _, name = f"{package}.{path}".rpartition(".")
        if not hasattr(sys.modules[parent], name):
            setattr(sys.modules[parent], name, module)


def refuse(function, **options):
    """Raise NotImplementedError that names the first of `options` that is true."""
    for name, given in options.items():
        if given:
            raise NotImplementedError(f"{function}: flatout does not support {name}")


def shadow(name):
    """Make `import NAME` give flatout's version of a peer, submodules included; return it.

    `name` is "liger_kernel", "cut_cross_entropy", "flash_attn" or "flash_attn_interface". Call it
    before anything imports the peer: RuntimeError if the real package is already imported, and
    ValueError for another name. `unshadow(name)` takes it back. It makes no installed distribution:
    transformers asks for one before it takes attn_implementation="flash_attention_2" (use "flatout"
    there), but not for its Trainer's use_liger_kernel=True.
    """
    if name not in _PEERS:
        raise ValueError(f"shadow: name must be one of {', '.join(_PEERS)}, got {name!r}")
    modules = _shadow_modules(name)
    for alias, module in modules.items():
        if sys.modules.get(alias, module) is not module:
            raise RuntimeError(f"shadow: the real {alias} is already imported")
    sys.modules.update(modules)
    return modules[name]


def unshadow(name):
    """Forget what `shadow(name)` put into sys.modules; what was imported from it stays valid."""
    for alias, module in _shadow_modules(name).items():
        if sys.modules.get(alias) is module:
            del sys.modules[alias]


def _shadow_modules(name):
    """{the peer's module name: our module}, everything imported."""
    root = importlib.import_module(_PEERS[name])
    found = {name: root}
    for info in pkgutil.walk_packages(getattr(root, "__path__", ()), root.__name__ + "."):
        try:
            found[name + info.name.removeprefix(root.__name__)] = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":  # what needs it is left out without it
                raise
    for path in _ALIASES.get(root.__name__, ()):
        found[f"{name}.{path}"] = sys.modules[f"{root.__name__}.{path}"]
    return found
