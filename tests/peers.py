"""What the tests of flatout.compat share: signatures as data, the error rule on a whole function,
tiny models."""

import inspect

import pytest
import torch
from conftest import check


def parameters(function, skip=0):
    """[(name, kind, default)] without annotations; `skip` leading ones are left out."""
    listed = list(inspect.signature(function).parameters.values())[skip:]
    return [(p.name, p.kind, p.default) for p in listed]


def literal(text, **names):
    """parameters() of a signature written as text: "x,y=1"."""
    scope = dict(names)
    exec(f"def f({text}): pass", scope)
    return parameters(scope["f"])


def agree(f, plain, *inputs, **rule):
    """f and its gradients obey the error rule: plain is the same in torch, run once in the
    inputs' dtypes and once in float64. Floating-point inputs all get gradients."""
    grad = [t is not None and t.dtype.is_floating_point for t in inputs]

    def run(function, convert):
        args = [
            convert(t).detach().requires_grad_() if g else t
            for t, g in zip(inputs, grad, strict=True)
        ]
        out = function(*args)
        outs = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        douts = [torch.randn(o.shape).to(torch.bfloat16).to(o) for o in outs]
        # A scalar's is a power of two: a loss may scale gradients that it has rounded already.
        douts = [
            torch.full_like(o, 0.5) if o.ndim == 0 else d for o, d in zip(outs, douts, strict=True)
        ]
        leaves = [t for t, g in zip(args, grad, strict=True) if g]
        return outs, torch.autograd.grad(outs, leaves, douts)

    mine = run(f, torch.clone)
    base = run(plain, torch.clone)
    ref = run(plain, lambda t: t.double())
    for kind in (0, 1):
        for i, (got, torchs, exact) in enumerate(
            zip(mine[kind], base[kind], ref[kind], strict=True)
        ):
            assert got.dtype == torchs.dtype
            check(f"{('output', 'gradient')[kind]} {i}", got, exact, torchs, **rule)


def refuses(function, *args, **option):
    """Calling with `option` raises NotImplementedError that names it."""
    (name,) = option
    with pytest.raises(NotImplementedError, match=name):
        function(*args, **option)


def wide(t):
    """float32, or float64 as it is: what the formulas compute in."""
    return t if t.dtype == torch.float64 else t.float()


def tiny_model(name="Llama", **options):
    """A transformers NAMEForCausalLM of two small layers in fp32."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def tokens(seed=0):
    """ids and labels (2, 12), some labels ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 48, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels
