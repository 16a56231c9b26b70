"""The tables of speed, from the result files alone: all into the README beside the files, a short
one into the project's."""

import json

from readme_text import README, between, markdown, shown, wrapped

from ops import OPS, plots, results, table, timing
from ops.optimizer import QWEN3_8B

BEGIN, END = "<!-- run_ops: begin -->", "<!-- run_ops: end -->"
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
VERSIONS = [("torch", "torch"), ("CUDA", "cuda"), ("cuDNN", "cudnn"), ("Triton", "triton"),
            ("Liger", "liger"), *((name, name) for name in results.PACKAGES)]  # fmt: skip
PEERS = {"torch": "torch", "torch.compile": "torch.compile", "liger": "Liger",
         "liger, fp32 sums": "Liger with fp32 sums", "quack": "QuACK",
         "cuDNN in torch": "cuDNN"}  # fmt: skip
OWN_COLUMN, OWN_CALL_COLUMN = ("torch", "torch.compile", "Liger"), ("torch", "Liger")
LATE = " (late)"  # the host was: results.timing_metrics
MARGIN = 0.02  # nearer than this is a draw

TITLE = "# Speed of every op"
GENERATED = """Generated from this folder's result files by `python benchmarks/run_ops.py --readme
{}`: do not edit."""
SPEED_TEXT = """GPU time: medians in µs with a cold L2 cache. "rate": TB/s, of attention and
linear_cross_entropy TFLOPS; attention's count only the pairs of q and k that the mask lets through.
"of ceiling": the share of a 1 GiB device copy's bandwidth or of a large matmul's TFLOPS; "of same
size": of a copy that moves as many bytes. Whole call: in a loop, host included, L2 warm. torch: the
faster of its functions and of eager code; other: the fastest of the peers without a column.
"(late)": the GPU waited for the host. Sizes: T tokens, H columns, V vocabulary; S sequence length,
B batch, Hq heads of q, Hk of k and v, D columns of a head; P parameters in N tensors.
{absent}{machine}"""
SPEED_HEAD = (
    "op|shape||flatout|rate|of ceiling|of same size|torch|torch.compile|Liger|other"
    "|whole call: flatout|torch|Liger|other"
).split("|")
HOST_TEXT = """Host: what a call costs it, in µs, on one row of 64 numbers (`--overhead`).
Statistic over batches of calls: {statistic}. `_C`: the extension module with outputs given, launch
included; without rows it launches nothing. {machine}"""
PLOTS_TEXT = """Over sizes (`make plots`): the rate of the GPU time, with the ceiling dashed, and
the memory that a call takes at its peak, results included. Bars: 20 % to 80 % quantiles."""
GEMM_TEXT = """cuBLASLt on the matrix products of one Qwen3-8B step of 2048 tokens (`--gemm`):
TFLOPS of the heuristic's first algorithm, of the best of the eight it is asked for here, and of the
best of these and of 400 drawn from so many configurations that the library accepts; of all of them
only those with the first one's bits. flatout chooses by itself (csrc/cublaslt.h)."""
HOST_HEAD = "op||`_C`, no rows|`_C`|flatout|torch|Liger|with grad: flatout|torch|Liger".split("|")
HOST = ["_C, no rows", "_C", "flatout", "torch", "liger", "flatout, grad", "torch, grad",
        "liger, grad"]  # fmt: skip

TWO = ("forward", "backward")
SHORT = {  # op -> the modes that the project's README shows
    "rms_norm": TWO, "add_rms_norm": TWO, "swiglu": TWO, "rope": TWO, "qk_norm_rope": TWO,
    "attention": TWO, "linear_cross_entropy": ("full",), "cross_entropy": ("full",),
    "embedding": ("backward",),
    "adamw": ("step",), "adamw_clip": ("step",), "global_norm": ("step",),
}  # fmt: skip
SHORT_HEAD = ["op", "shape", "flatout µs", "of ceiling", "fastest peer µs"]
SHORT_TEXT = """GPU time in bf16, forward / backward, of each op's largest shape that a peer ran
too: medians, L2 cache cold. "of ceiling": the share of a 1 GiB device copy's bandwidth, or of a
large matmul's TFLOPS for attention (visible pairs only) and linear_cross_entropy. Peers: {peers}.
{absent}"late": the GPU waited for the host. {machine}
All shapes, whole calls, the host's cost and plots over sizes stand in
[{folder}/README.md]({folder}/README.md)."""
ABSENT_TEXT = "Without figures, not installed there or not run: {}. "
HOST_LINE = """On one row a call of `rms_norm` costs the host ({} of batches of calls), without and
with grad: {}."""
BEHIND_TEXT = """Where flatout takes longer than the fastest peer, by {} or more (at so many tokens
or parameters; the first two count both passes of a loss together):"""


# ---- What the files hold --------------------------------------------------------------------


def grouped(path, metric):
    """(op, sizes, dtype, mode) -> provider -> median, in the order of the ops."""
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


CEILINGS = {"TB/s": ("a 1 GiB copy", "{:.2f}"), "TFLOPS": ("a large matmul", "{:.0f}")}


def named(seen):
    """Of text -> the ops that it holds for, one text: the ops stand first if they differ."""
    return ". ".join(f"{', '.join(o)}: " * (len(seen) > 1) + text for text, o in seen.items())


def measured(path, names):
    """From when to when these ops were."""
    rows = [row for row in results.read(path) if row["kernel_name"] in names]
    minutes = sorted(row["timestamp"][:16] for row in rows)
    first, last = minutes[0], minutes[-1]
    return first if first == last else f"{first} to {last.removeprefix(first[:11])}"


def statistic(path, names):
    """Of the batches that overhead.py times; its first files do not name it."""
    seen = {}
    for name, where in environments(path).items():
        if name in names:
            seen.setdefault(where.get("statistic", "median"), []).append(name)
    return named(seen)


def ceilings(wheres):
    """The ceilings of some ops: from the lowest to the highest of their runs."""
    for unit, (what, digits) in CEILINGS.items():
        found = [where[unit] for where in wheres if unit in where]
        if found:
            ends = dict.fromkeys(digits.format(x) for x in (min(found), max(found)))
            yield f"{what}: {' to '.join(ends)} {unit}"


def machines(path, names):
    """The machine, the versions, the ceilings and the times of these ops, once for each machine
    and versions that differ."""
    seen = {}
    for name, where in environments(path).items():
        power = f", power cap {where['power.limit']}" if "power.limit" in where else ""
        driver = f", driver {where['driver_version']}" if "driver_version" in where else ""
        text = f"{where['device']}{driver}{power}; "
        text += ", ".join(f"{what} {where[key]}" for what, key in VERSIONS if where.get(key))
        if name in names:
            seen.setdefault(text, {})[name] = where
    return named({"; ".join([text, *ceilings(ops.values()), f"runs of {measured(path, ops)}"]): ops
                  for text, ops in seen.items()}) + "."  # fmt: skip


def peer(provider):
    """The peer that a provider belongs to, as the tables call it: torch has several functions for
    some ops. None for flatout and the copy."""
    if provider == timing.COPY or provider.startswith("flatout"):
        return None
    return PEERS.get(provider) or ("torch" if provider.startswith("torch") else provider)


def fastest(found, *names):
    """(time, provider) of the quickest peer, of these alone if any are named; None where none
    ran."""
    peers = [(t, n) for n, t in found.items() if peer(n)]
    return min([(t, n) for t, n in peers if not names or peer(n) in names], default=None)


def peers_in(path):
    """Those that ran in what the project's README shows, torch and Liger first."""
    every = [n for key, found in grouped(path, "speed").items() if key[0] in SHORT for n in found]
    names = list(dict.fromkeys(peer(n) for n in every if peer(n)))
    return [n for n in PEERS.values() if n in names] + [n for n in names if n not in PEERS.values()]


def absent(path, names):
    """A sentence on the peers of these ops without figures; of which ops, if others have some."""
    ran, missing = {}, {}
    for key, found in grouped(path, "speed").items():
        if key[0] in names:
            ran.setdefault(key[0], set()).update(peer(n) for n in found)
    for name, there in ran.items():
        for who in dict.fromkeys(peer(n) for n in table.providers(OPS[name])):
            if who and who not in there:
                missing.setdefault(who, []).append(name)
    anywhere = set().union(*ran.values())
    texts = [who + f" (of {', '.join(ops)})" * (who in anywhere) for who, ops in missing.items()]
    return ABSENT_TEXT.format(", ".join(texts)) if texts else ""


def notes(path):
    """What the ops say of themselves, each text once."""
    seen = {}
    for name in dict.fromkeys(key[0] for key in grouped(path, "speed")):
        if OPS[name].note:
            seen.setdefault(OPS[name].note, []).append(f"`{name}`")
    return "\n".join(wrapped(f"- {', '.join(o)}: {text}", "  ") for text, o in seen.items())


# ---- Cells and lines ------------------------------------------------------------------------


def number(value, scale=1.0):
    if value is None:
        return "-"
    value *= scale
    return f"{value:.1f}" if value < 999.95 else f"{value:.0f}"


def percent(value):
    return "-" if value is None else f"{100 * value:.0f} %"


def time_cell(found, name, late=()):
    best = fastest(found, name)
    return "-" if best is None else number(best[0], 1e3) + LATE * (best[1] in late)


def other_cell(found, columns, late=()):
    """The fastest of the peers that have no column of their own, and its name."""
    rest = {peer(n) for n in found} - {None, *columns}
    best = fastest(found, *rest) if rest else None
    return "-" if best is None else f"{time_cell(found, peer(best[1]), late)} ({peer(best[1])})"


def sizes_cell(op, shape, dtype, first):
    """The first of an op names its sizes."""
    names = f" ({op.dims.replace(' ', ' x ')})" if first else ""
    return " x ".join(map(str, shape)) + names + ("" if dtype == "bf16" else f", {dtype}")


def rate_cells(key, provider, found, where):
    """The rate, its share of the ceiling, and of a copy of the same size."""
    name, shape, dtype, mode = key
    if not OPS[name].has_rate(provider, mode):
        return ["-"] * 3
    amount, unit = OPS[name].work(shape, mode, SIZES[dtype])
    rate, ceiling, copy = amount / found[provider] / 1e9, where.get(unit), found.get(timing.COPY)
    same = copy and rate / (min(amount, timing.COPY_MOST) / copy / 1e9)
    return [f"{rate:.3g}", percent(ceiling and rate / ceiling), percent(same)]


def speed_lines(path):
    speeds, calls, late = (grouped(path, metric) for metric in ("speed", "call", "host late"))
    where, seen = environments(path), set()
    for key, found in speeds.items():
        (name, shape, dtype, mode), op = key, OPS[key[0]]
        called, waited = calls.get(key, {}), late.get(key, ())
        own = [n for n in found if n.startswith("flatout") and op.is_timed(n, mode)]
        for provider in sorted(own):
            ms = found[provider]
            yield [f"`{name}`" + provider.removeprefix("flatout"),
                   sizes_cell(op, shape, dtype, name not in seen), mode,
                   number(ms, 1e3) + LATE * (provider in waited),
                   *rate_cells(key, provider, found, where[name]),
                   *(time_cell(found, n, waited) for n in OWN_COLUMN),
                   other_cell(found, OWN_COLUMN, waited),
                   number(called.get(provider), 1e3),
                   *(time_cell(called, n) for n in OWN_CALL_COLUMN),
                   other_cell(called, OWN_CALL_COLUMN)]  # fmt: skip
            seen.add(name)


def host_lines(path):
    for (name, shape, _, mode), found in grouped(path, "host").items():
        many = f", {shape[1]} tensors" if OPS[name].updates and shape[1] > 1 else ""
        yield [f"`{name}`", mode + many, *(number(found.get(column)) for column in HOST)]


def count(n):
    return str(n) if n < 1e6 else f"{n:.3g}".replace("e+0", "e")


def in_words(op, shape):
    sizes = dict(zip(op.dims.split(), shape, strict=True))
    if op.updates:
        whose = "Qwen3-8B's " if shape == QWEN3_8B else ""
        return f"{whose}{count(shape[0])} parameters in {sizes['N']} tensors"
    if "Hq" in sizes:
        heads = f"({sizes['Hq']} + {sizes['Hk']} heads)"
        return f"{shape[0] * sizes.get('B', 1)} tokens x {heads} x {sizes['D']}"
    if op.dims == "T V H":
        return f"{sizes['T']} tokens, {sizes['V']} x {sizes['H']}"
    return " x ".join([f"{shape[0]} tokens", *map(str, shape[1:])])


def peer_cells(best, waited):
    """The time of what fastest() found, and whose it is."""
    if best is None:
        return "-", ""
    return number(best[0], 1e3), peer(best[1]) + ", late" * (best[1] in waited)


def short_lines(path):
    speeds, late, where = grouped(path, "speed"), grouped(path, "host late"), environments(path)
    for name, modes in SHORT.items():
        shapes = [key[1] for key, found in speeds.items()
                  if (key[0], key[2]) == (name, "bf16") and fastest(found)]  # fmt: skip
        keys = [(name, max(shapes), "bf16", mode) for mode in modes] if shapes else []
        cells = []
        for key in keys:
            found, waited = speeds.get(key, {}), late.get(key, ())
            if "flatout" not in found:
                continue
            ms, best = found["flatout"], fastest(found)
            amount, unit = OPS[name].work(key[1], key[3], SIZES["bf16"])
            ceiling = where[name].get(unit)
            cells.append((number(ms, 1e3) + LATE * ("flatout" in waited),
                          percent(ceiling and amount / ms / 1e9 / ceiling),
                          *peer_cells(best, waited)))  # fmt: skip
        if cells:
            title = f"`{name}`" + {"full": ", both", "backward": ", backward"}.get(modes[0], "")
            own, share, peers, whose = zip(*cells, strict=True)
            if len(set(whose)) == 1:  # named once
                peers, whose = [" / ".join(peers)], whose[:1]
            peers = [f"{t} ({who})" if who else t for t, who in zip(peers, whose, strict=True)]
            yield [title, in_words(OPS[name], keys[0][1]), *map(" / ".join, (own, share, peers))]


# ---- Where a peer is ahead ------------------------------------------------------------------


def host_times(path):
    """Of the calls that both have: as grouped(), the mode with "with grad" where it has one."""
    found = {}
    for (name, shape, dtype, mode), times in grouped(path, "host").items():
        for grad in ("", ", grad"):
            own = {n: times[n + grad] for n in ("flatout", *PEERS) if n + grad in times}
            label = mode + (" with grad" if grad and mode == "forward" else "")
            found[name, shape, dtype, label] = found.get((name, shape, dtype, label), {}) | own
    return found


def behind(found, sizes=True):
    """Where flatout takes longer than the fastest peer. Where both passes together are timed, they
    alone count: a peer may make the gradients in the forward pass."""
    places = {}
    for (name, shape, dtype, mode), times in found.items():
        both = (name, shape, dtype, "full")
        best = fastest(times)
        if (both in found and mode != "full") or not best or "flatout" not in times:
            continue
        share = times["flatout"] / best[0] - 1
        if share >= MARGIN:
            place = f"`{name}`" + (f" at {count(shape[0])}:" if sizes else "")
            digits = 0 if share >= 0.1 else 1
            text = f"{mode} {100 * share:.{digits}f} % ({peer(best[1])})"
            places.setdefault(place, []).append(text)
    return "; ".join(f"{place} {', '.join(texts)}" for place, texts in places.items()) or "nowhere"


def short_host(path):
    own = [t for key, t in host_times(path).items()
           if key[0] == "rms_norm" and key[3].startswith("forward")]  # fmt: skip
    names = {"flatout": "flatout"} | PEERS
    each = [names[n] + " " + " and ".join(number(t.get(n)) for t in own) + " µs"
            for n in names if any(n in t for t in own)]  # fmt: skip
    return HOST_LINE.format(statistic(path, ["rms_norm"]), ", ".join(each)) if each else ""


# ---- Files ----------------------------------------------------------------------------------


def names_in(path):
    return {key[0] for metric in ("speed", "host") for key in grouped(path, metric)}


def every_line(folder):
    """The README beside the result files."""
    speed, host = folder / "ops.csv", folder / "overhead.csv"
    out = [TITLE, wrapped(GENERATED.format(shown(folder)))]
    if speed.exists():
        machine = machines(speed, names_in(speed))
        text = SPEED_TEXT.format(absent=absent(speed, OPS), machine=machine)
        out += [wrapped(text), "\n".join(markdown(SPEED_HEAD, speed_lines(speed))), notes(speed)]
    if host.exists():
        names = names_in(host)
        text = HOST_TEXT.format(statistic=statistic(host, names), machine=machines(host, names))
        out += [wrapped(text), "\n".join(markdown(HOST_HEAD, host_lines(host)))]
    if (gemm := folder / "gemm.txt").exists():
        out += [wrapped(GEMM_TEXT), f"```text\n{gemm.read_text().strip()}\n```"]
    drawn = [name for name in OPS if (folder / plots.FOLDER / f"{name}.png").exists()]
    if drawn:
        out += [wrapped(PLOTS_TEXT)]
        out += ["\n".join(f"![{name}]({plots.FOLDER}/{name}.png)" for name in drawn)]
    return "\n\n".join(text for text in out if text) + "\n"


def block(folder):
    """The text between the markers of the project's README; empty without result files."""
    speed, host = folder / "ops.csv", folder / "overhead.csv"
    out, peers_ahead = ["## Speed"], []
    if speed.exists():
        machine, peers = machines(speed, SHORT), ", ".join(peers_in(speed))
        text = SHORT_TEXT.format(
            machine=machine, peers=peers, absent=absent(speed, SHORT), folder=shown(folder)
        )
        out += [wrapped(text), "\n".join(markdown(SHORT_HEAD, short_lines(speed)))]
        for title, metric in (("GPU time", "speed"), ("a whole call, host included", "call")):
            peers_ahead.append(f"- {title}: {behind(grouped(speed, metric))}.")
    if host.exists():
        out.append(wrapped(short_host(host)))
        times = behind(host_times(host), sizes=False)
        peers_ahead.append(f"- the host's time on one row: {times}.")
    if not peers_ahead:
        return ""
    out.append(wrapped(BEHIND_TEXT.format(percent(MARGIN))))
    out.append("\n".join(wrapped(x, "  ") for x in peers_ahead))
    return "\n\n".join(text for text in out if text) + "\n"


def pages(folder):
    """file -> its text, of the two files that are made from the results in the folder."""
    project = between(README.read_text(), BEGIN, END, block(folder))
    return {README: project, folder / "README.md": every_line(folder)}


def update(folder):
    for path, text in pages(folder).items():
        path.write_text(text)
