"""Where a step's time goes, by groups of kernels (--profile)."""

import re

from stages.report import number, ordered, text_table

STEPS = 5  # that are profiled, and as many before them that are timed without a profiler
KEPT = 60  # kernels of a row that the file names, the longest first
GROUPS = ("gemm", "attention", "norm", "rope", "swiglu", "loss", "optimizer", "clip", "other")

# The first that a kernel's name matches. A kernel that Inductor fused is named after its ops; of
# those of eager PyTorch (vectorized_elementwise_kernel, ...) the name does not tell: "other".
RULES = [(group, re.compile(pattern)) for group, pattern in (
    ("attention", r"attention_|sdpa|flash_?(fwd|bwd|attn)|flash::|fmha"),
    ("optimizer", r"adamw|Adam"),
    ("clip", r"global_norm|[Ll]p_?[Nn]orm|multi_tensor_apply|foreach"),
    ("loss", r"cross_entropy|cce_|_neg_dot_|soft_?max|SoftMax|nll|log_?sum_?exp|scale_kernel"
             r"|round_kernel|checksum_kernel|column_sums"),
    ("gemm", r"gemm|gemv|nvjet|xmma|splitK|triton_tem_|cutlass|aten::(mm|addmm|bmm|linear)"),
    ("swiglu", r"swiglu|silu|sigmoid"),
    ("rope", r"rope|rotary|triton_.*_(cat|neg)_"),
    ("norm", r"rms_?norm|layer_?norm|LayerNorm|triton_.*(rsqrt|_pow_|_mean_)"),
)]  # fmt: skip


def group(kernel):
    """The group of a kernel of this name; q and k norms fused with the rotation are in "rope"."""
    return next((name for name, rule in RULES if rule.search(kernel)), "other")


def measure(step, device):
    """Run step() STEPS times under torch's profiler: {"busy_ms", "groups", "kernels"}, a step."""
    import torch  # here alone: the process that shows the table needs none

    activity = torch.profiler.ProfilerActivity
    # Not the host's ops too: recording those slows the host, and the GPU would wait for it.
    only = [activity.CUDA if device == "cuda" else activity.CPU]
    with torch.profiler.profile(activities=only) as profiler:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == (device == "cuda"):
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found.append((event.key, event.count / STEPS, us / 1e3 / STEPS))
    return summary(found)


def summary(kernels):
    """(name, calls, ms) of every kernel -> what the file keeps."""
    kernels = sorted(kernels, key=lambda kernel: -kernel[2])
    groups = dict.fromkeys(GROUPS, 0.0)
    for name, _, ms in kernels:
        groups[group(name)] += ms
    names = [
        {"name": name[:200], "group": group(name), "calls": calls, "ms": ms}
        for name, calls, ms in kernels[:KEPT]
    ]
    return {"busy_ms": sum(groups.values()), "groups": groups, "kernels": names}


def table(results):
    """Milliseconds of a step in each group. idle: what no kernel ran in, of a step without the
    profiler; below 0 where the profiler slowed the kernels by more than that."""
    rows = [["Config", "step ms", *GROUPS, "idle"]]
    for record in ordered(results["rows"]):
        if found := record.get("profile"):
            step = record["figures"]["step_ms"]
            times = [step, *found["groups"].values(), step and step - found["busy_ms"]]
            rows.append([record["row"], *map(number, times)])
    return text_table(rows)
