import pytest
import torch
import torch.nn.functional as F
from peers import agree, literal, parameters, refuses, tiny_model, tokens, wide

import flatout.compat.cce as cce
from flatout.compat.cce import LinearCrossEntropy, LinearCrossEntropyImpl, linear_cross_entropy

DTYPES = [torch.float32, torch.bfloat16]
CCE = LinearCrossEntropyImpl.CCE
LATER = {  # 25.6.4
    linear_cross_entropy: "e,c,targets,bias=None,ignore_index=-100,softcap=None,reduction='mean',"
    "shift=0,return_lse=False,filter_eps='auto',accum_e_fp32=False,accum_c_fp32=False,"
    "filter_e_grad=True,filter_c_grad=True,impl=CCE,vocab_parallel_options=None",
    LinearCrossEntropy: "ignore_index=-100,softcap=None,reduction='mean',shift=0,"
    "filter_eps='auto',accum_e_fp32=False,accum_c_fp32=False,filter_e_grad=True,"
    "filter_c_grad=True,impl=CCE,return_lse=False",
    LinearCrossEntropy.forward: "self,e,c,targets,bias=None",
    cce.VocabParallelOptions: "start,stop,group=None,reduce_e_grad=True",
    cce.VocabParallelOptions.from_vocab: "vocab_size,group=None,reduce_e_grad=True",
}
RELEASED = (  # 25.1.1
    "e,c,targets,ignore_index=-100,softcap=None,reduction='mean',shift=False,filter_eps='high',"
    "impl=CCE"
)


@pytest.mark.parametrize("function", LATER, ids=lambda f: f.__qualname__)
def test_signature(function):
    assert parameters(function) == literal(LATER[function], CCE=CCE)


def test_signatures_of_the_installed_release():
    """The released order is what a positional call with an int as fourth argument goes to."""
    assert parameters(cce._released) == literal(RELEASED, CCE=CCE)
    peer = pytest.importorskip("cut_cross_entropy")
    listed = parameters(peer.linear_cross_entropy)
    assert listed == parameters(cce._released)  # IntEnum members compare as integers
    names = [name for name, *_ in parameters(peer.LinearCrossEntropy)]
    assert set(names) <= {name for name, *_ in parameters(LinearCrossEntropy)}


def test_patch_signature():
    pytest.importorskip("transformers")
    from flatout.compat.cce.transformers import cce_patch

    text = (
        "model_type_or_model,impl=CCE,reduction='mean',filter_eps='auto',accum_e_fp32=False,"
        "accum_c_fp32=False,filter_e_grad=True,filter_c_grad=True,train_only=False"
    )
    assert parameters(cce_patch) == literal(text, CCE=CCE)


def example(dtype, batch=(2, 9), hidden=24, vocabulary=37):
    e = torch.randn(*batch, hidden).to(dtype)
    c = (torch.randn(vocabulary, hidden) / hidden**0.5).to(dtype)
    bias = torch.randn(vocabulary).to(dtype)
    targets = torch.randint(0, vocabulary, batch)
    targets[0, :3] = -100
    targets[1, 5] = -100
    return e, c, bias, targets


def plain(e, c, targets, bias=None, reduction="mean", shift=0, softcap=None, ignore=-100):
    """(loss, lse) in fp32 of logits in the input dtype."""
    e, targets = e[..., : e.shape[-2] - shift, :], targets[..., shift:]
    logits = wide(F.linear(e, c, bias))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), ignore_index=ignore, reduction=reduction
    )
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return loss, logits.logsumexp(-1).masked_fill(targets == ignore, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_loss(dtype, reduction, shift):
    e, c, bias, targets = example(dtype)
    options = {"reduction": reduction, "shift": shift}

    agree(
        lambda e, c, b: linear_cross_entropy(e, c, targets, b, softcap=4.0, **options),
        lambda e, c, b: plain(e, c, targets, b, softcap=4.0, **options)[0],
        e,
        c,
        bias,
        floor=2.0**-18,
    )
    loss = linear_cross_entropy(e, c, targets, **options)
    assert loss.dtype == torch.float32
    assert loss.shape == ((2, 9 - shift) if reduction == "none" else ())
    if reduction == "none":
        assert not loss[targets[:, shift:] == -100].any()


@pytest.mark.parametrize("shift", [0, 2])
def test_lse(shift):
    e, c, bias, targets = example(torch.float32)
    loss, lse = linear_cross_entropy(e, c, targets, bias, shift=shift, return_lse=True)
    want = plain(e, c, targets, bias, shift=shift)
    torch.testing.assert_close(loss, want[0])
    torch.testing.assert_close(lse, want[1])
    assert lse.shape == (2, 9 - shift)


def test_both_calling_forms():
    e, c, bias, targets = example(torch.float32)
    targets[targets == -100] = 5
    old = linear_cross_entropy(e, c, targets, 5, 3.0, "sum", True, "high", "torch_compile")
    new = linear_cross_entropy(e, c, targets, None, 5, 3.0, "sum", 1)
    want = plain(e, c, targets, None, "sum", 1, 3.0, 5)[0]
    torch.testing.assert_close(old, want)
    assert torch.equal(old, new)
    two = linear_cross_entropy(e, c, targets, 5, shift=2)  # a truth value in that release
    torch.testing.assert_close(two, plain(e, c, targets, None, shift=1, ignore=5)[0])
    with_bias = linear_cross_entropy(e, c, targets, bias, 5)
    torch.testing.assert_close(with_bias, plain(e, c, targets, bias, ignore=5)[0])
    with pytest.raises(TypeError, match="return_lse"):
        linear_cross_entropy(e, c, targets, 5, return_lse=True)


def test_module():
    e, c, bias, targets = example(torch.float32)
    want = plain(e, c, targets, bias, "sum", 1, 3.0)[0]
    module = LinearCrossEntropy(-100, 3.0, "sum", 1, "auto", True, True, False, False, "cce_exact")
    torch.testing.assert_close(module(e, c, targets, bias), want)
    old = LinearCrossEntropy(-100, 3.0, "sum", "high", True, "torch_compile")
    assert (old.shift, old.filter_eps, old.impl) == (True, "high", "torch_compile")
    torch.testing.assert_close(old(e, c, targets), plain(e, c, targets, None, "sum", 1, 3.0)[0])
    assert LinearCrossEntropy(-100, None, "mean", None).shift is False
    lse = LinearCrossEntropy(shift=1, return_lse=True)(e, c, targets)[1]
    torch.testing.assert_close(lse, plain(e, c, targets, shift=1)[1])


def test_options_that_change_nothing():
    e, c, _, targets = example(torch.float32)
    want = linear_cross_entropy(e, c, targets, shift=1)
    names = [impl.name.lower() for impl in LinearCrossEntropyImpl]
    for impl in [*names, *LinearCrossEntropyImpl]:
        assert torch.equal(linear_cross_entropy(e, c, targets, shift=1, impl=impl), want)
    flags = {"filter_eps": None, "accum_e_fp32": True, "filter_e_grad": False}
    assert torch.equal(linear_cross_entropy(e, c, targets, shift=True, **flags), want)


def test_accumulation_in_fp32():
    """accum_c_fp32 and the exact impls round dc once; both within torch's own error."""
    e, c, _, targets = example(torch.bfloat16, (4, 64))
    plain_c = lambda c: plain(e.to(c.dtype), c, targets)[0]  # noqa: E731
    for options in ({"accum_c_fp32": True}, {"impl": "cce_exact"}, {"impl": "cce_kahan_full_c"}):
        agree(lambda c, o=options: linear_cross_entropy(e, c, targets, **o), plain_c, c, floor=1e-5)


def test_errors():
    e, c, _, targets = example(torch.float32)
    for impl in ("cce_kahan", "liger"):
        with pytest.raises(NotImplementedError, match=impl):
            linear_cross_entropy(e, c, targets, impl=impl)
    with pytest.raises(ValueError, match="reduction"):
        linear_cross_entropy(e, c, targets, reduction="max")
    for shift in (9, -1):
        with pytest.raises(ValueError, match="shift"):
            linear_cross_entropy(e, c, targets, shift=shift)
    options = cce.VocabParallelOptions(0, 10)
    refuses(linear_cross_entropy, e, c, targets, vocab_parallel_options=options)


def test_all_ignored():
    e, c, _, targets = example(torch.float32)
    targets[:] = -100
    e.requires_grad_()
    assert linear_cross_entropy(e, c, targets).isnan()
    assert linear_cross_entropy(e, c, targets, reduction="sum") == 0


def test_helpers():
    """What code around the loss imports: shares of a vocabulary, the soft cap."""
    from flatout.compat.cce.utils import softcapping

    e, c, _, targets = example(torch.float32)
    capped = softcapping(e @ c.T, 3.0)
    assert capped.abs().max() < 3 and not torch.allclose(capped, e @ c.T)
    want = F.cross_entropy(capped.flatten(0, -2), targets.flatten())
    torch.testing.assert_close(linear_cross_entropy(e, c, targets, softcap=3.0), want)
    shares = [cce.vocab_parallel.partition_n_into_range(23, rank, 5) for rank in range(5)]
    assert shares == [(0, 5), (5, 10), (10, 15), (15, 19), (19, 23)]


def test_readme():
    embeddings, classifier, _, labels = example(torch.bfloat16)
    for shift in (True, 1):
        loss = linear_cross_entropy(embeddings, classifier, labels, shift=shift)
        want = plain(embeddings, classifier, labels, shift=1)[0]
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-4)


def loss_and_grad(model, **options):
    ids, labels = tokens()
    model.zero_grad()
    output = model(input_ids=ids, labels=labels, **options)
    output.loss.sum().backward()
    return output, model.lm_head.weight.grad.clone()


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_patched_model(name):
    from flatout.compat.cce.transformers import cce_patch

    model = tiny_model(name)
    want, want_grad = loss_and_grad(model)
    cls, forward = type(model), type(model).forward
    assert cce_patch(model) is model and cls.forward is forward and isinstance(model, cls)
    for train in (True, False):
        output, grad = loss_and_grad(model.train(train))
        assert output.logits is None
        torch.testing.assert_close(output.loss, want.loss)
        torch.testing.assert_close(grad, want_grad)
    full, grad = loss_and_grad(model, skip_logits=False)
    assert torch.equal(full.logits, want.logits) and torch.equal(grad, want_grad)
    by_items, _ = loss_and_grad(model, num_items_in_batch=torch.tensor(7))
    count = (tokens()[1][:, 1:] != -100).sum()
    torch.testing.assert_close(by_items.loss, want.loss * count / 7)
    ids, labels = tokens()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, want.loss)
    assert model(ids).logits.shape == (2, 12, 48)
    as_tuple = model(ids, labels=labels, return_dict=False)
    torch.testing.assert_close(as_tuple[0], want.loss)
    cce_patch(model, reduction="none", train_only=True)
    assert loss_and_grad(model.train())[0].loss.shape == (2, 11)
    assert loss_and_grad(model.eval())[0].logits is not None
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, skip_logits=True)


def test_patched_type():
    transformers = pytest.importorskip("transformers")
    from flatout.compat.cce.transformers import cce_patch

    cls = transformers.MistralForCausalLM
    original = cls.forward
    want, _ = loss_and_grad(tiny_model("Mistral"))
    try:
        assert cce_patch("mistral") is None
        cce_patch(transformers.MistralConfig())
        output, _ = loss_and_grad(tiny_model("Mistral"))
        assert output.logits is None
        torch.testing.assert_close(output.loss, want.loss)
    finally:
        cls.forward = original
    with pytest.raises(RuntimeError, match="gpt2"):
        cce_patch("gpt2")
    with pytest.raises(ValueError, match="cce_kahan"):
        cce_patch("mistral", "cce_kahan")
