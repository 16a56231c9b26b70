"""README's tables of speed, from the result files alone."""

import json
from pathlib import Path

from ops import OPS, results, timing

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- run_ops: begin -->", "<!-- run_ops: end -->"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
SPEED_HEAD = (
    "op|shape||flatout µs|TB/s|of copy|of same size|torch µs|torch.compile µs|Liger µs"
    "|whole call µs: flatout|torch|Liger"
).split("|")
HOST_HEAD = "op||`_C`, no rows|`_C`|flatout|torch|Liger|with grad: flatout|torch|Liger".split("|")
SPEED_TEXT = """## Speed

`python benchmarks/run_ops.py`, files in `{}`. Medians of the GPU's time with a cold L2 cache. "of
copy": the share of a 1 GiB device copy's bandwidth; "of same size": of a copy that moves as many
bytes. Whole call: in a loop, host included, L2 warm. torch: the faster of its functions and of
eager code. {}
"""
HOST_TEXT = """What a call costs the host, in µs, on one row of 64 numbers (`--overhead`). `_C`: the
extension module with outputs given, launch included; without rows it launches nothing. {}
"""
HOST = ["_C, no rows", "_C", "flatout", "torch", "liger", "flatout, grad", "torch, grad",
        "liger, grad"]  # fmt: skip


def grouped(path, metric):
    """(op, sizes, dtype, mode) -> provider -> median, in the order of the file."""
    found = {}
    for row in results.read(path):
        if row["metric_name"] != metric:
            continue
        config = json.loads(row["extra_benchmark_config_str"])
        dtype, name = config.pop("dtype"), row["kernel_name"]
        shape = (int(row["x_value"]), *config.values())
        key = name, shape, dtype, row["kernel_operation_mode"]
        found.setdefault(key, {})[row["kernel_provider"]] = float(row["y_value_50"])
    order = list(OPS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))


def environments(path):
    beside = path.with_suffix(".json")
    return json.loads(beside.read_text()) if beside.exists() else {}


def markdown(head, lines):
    return ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *lines]]


def number(value, scale=1.0):
    if value is None:
        return "-"
    value *= scale
    return f"{value:.1f}" if value < 999.95 else f"{value:.0f}"


def percent(value):
    return "-" if value is None else f"{100 * value:.0f} %"


def best(found, name):
    """The quickest of torch's own, or one provider's figure."""
    if name != "torch":
        return found.get(name)
    own = [t for n, t in found.items() if n.startswith("torch") and n != "torch.compile"]
    return min(own, default=None)


def speed_lines(path):
    speeds, calls, late = (grouped(path, metric) for metric in ("speed", "call", "host late"))
    where = environments(path)
    for key, found in speeds.items():
        name, shape, dtype, mode = key
        amount, unit = OPS[name].work(shape, mode, SIZES[dtype])
        ceiling, copy = where[name].get(unit), found.get(timing.COPY)
        for provider in sorted(n for n in found if n.startswith("flatout")):
            ms, called = found[provider], calls.get(key, {})
            rate = amount / ms / 1e9
            same = copy and rate / (min(amount, timing.COPY_MOST) / copy / 1e9)
            peers = [best(found, n) for n in ("torch", "torch.compile", "liger")]
            wholes = [best(called, n) for n in (provider, "torch", "liger")]
            title = "`" + name + "`" + provider.removeprefix("flatout")
            title += " (the GPU waited for the host)" if provider in late.get(key, ()) else ""
            sizes = " x ".join(map(str, shape)) + ("" if dtype == "bf16" else f", {dtype}")
            yield [title, sizes, mode, number(ms, 1e3), f"{rate:.2f}",
                   percent(ceiling and rate / ceiling), percent(same),
                   *(number(t, 1e3) for t in (*peers, *wholes))]  # fmt: skip


def host_lines(path):
    for (name, shape, _, mode), found in grouped(path, "host").items():
        many = f", {shape[1]} tensors" if OPS[name].updates and shape[1] > 1 else ""
        yield [f"`{name}`", mode + many, *(number(found.get(column)) for column in HOST)]


def machines(path):
    """The machine, the versions and the ceilings, once for each that differs."""
    seen = {}
    for name, where in environments(path).items():
        power = f", power cap {where['power.limit']}" if "power.limit" in where else ""
        driver = f", driver {where['driver_version']}" if "driver_version" in where else ""
        text = f"{where['device']}{driver}{power}, {where['date']}; "
        text += ", ".join(f"{what} {where[key]}" for what, key in VERSIONS if where.get(key))
        if "TB/s" in where:
            text += f"; a 1 GiB copy: {where['TB/s']:.2f} TB/s"
        seen.setdefault(text, []).append(name)
    if len(seen) == 1:
        return f"{next(iter(seen))}."
    return ". ".join(f"{', '.join(names)}: {text}" for text, names in seen.items()) + "."


VERSIONS = [("torch", "torch"), ("CUDA", "cuda"), ("Triton", "triton"), ("Liger", "liger")]


def block(folder):
    """The text between the markers; empty where there are no result files."""
    speed, host = folder / "ops.csv", folder / "overhead.csv"
    out = []
    if speed.exists():
        out += [SPEED_TEXT.format(shown(folder), machines(speed))]
        out += [*markdown(SPEED_HEAD, speed_lines(speed)), ""]
    if host.exists():
        out += [HOST_TEXT.format(machines(host))]
        out += [*markdown(HOST_HEAD, host_lines(host)), ""]
    return "\n".join(out)


def shown(folder):
    folder = folder.resolve()
    root = README.parent
    return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.name


def replaced(text, folder):
    """README's text with the block of the folder between the markers."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{block(folder)}{END}{tail}"


def update(folder):
    README.write_text(replaced(README.read_text(), folder))
