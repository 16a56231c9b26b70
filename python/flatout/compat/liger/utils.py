"""liger_kernel.utils: what code written for Liger asks of the machine."""

import torch


def infer_device():
    """The device that flatout runs on: "cuda" where torch finds one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def infer_comm_backend():
    """The name of torch.distributed's backend for infer_device()'s device."""
    if torch.distributed.is_nccl_available():
        return "nccl"
    if torch.distributed.is_gloo_available():
        return "gloo"
    raise RuntimeError("torch.distributed has no backend here")


def is_npu_available():
    """False: flatout runs on CUDA and on the CPU."""
    return False


def is_hip():
    """Whether torch was built for AMD's GPUs."""
    return torch.version.hip is not None


def transformers_version_dispatch(
    required_version,
    before_fn,
    after_fn,
    before_args=(),
    after_args=(),
    before_kwargs=None,
    after_kwargs=None,
):
    """after_fn(*after_args, **after_kwargs) from that version of transformers on, else before_fn's
    call."""
    import transformers
    from packaging import version

    if version.parse(transformers.__version__) < version.parse(required_version):
        return before_fn(*before_args, **(before_kwargs or {}))
    return after_fn(*after_args, **(after_kwargs or {}))
