"""PNG plots over sizes from result files alone: one an op, its modes side by side; above the rate,
below the memory. Needs matplotlib."""

import json

from ops import OPS, results, timing

FOLDER = "plots"  # beside the result files
FILES = ("ops.csv", "sweep.csv")
LOSSES = ("cross_entropy", "linear_cross_entropy")  # a peer may make the gradients in the forward
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
COLORS = {
    "flatout": "tab:green", "torch": "tab:gray", "torch.compile": "tab:orange",
    "torch F.rms_norm": "tab:olive", "liger": "tab:blue", "quack": "tab:purple",
    "cut-cross-entropy": "tab:red", "cuDNN in torch": "tab:cyan", "flash-attn 3": "tab:blue",
    "flash-attn 2 in torch": "tab:purple", "flash-attn": "tab:brown", "flash-attn 4": "tab:pink",
    timing.COPY: "lightgray",
}  # fmt: skip
UNNAMED = ["tab:pink", "tab:brown", "tab:cyan", "tab:olive", "black"]


def curves(folder):
    """(op, dtype, sizes but the first) -> (mode, metric) -> provider -> [(size, low, median, high)]
    by size; of all result files, the later replacing the earlier."""
    kept = {}
    for name in FILES:
        for row in results.read(folder / name):
            kept[tuple(row[k] for k in results.KEY)] = row
    found = {}
    for row in kept.values():
        config = json.loads(row["extra_benchmark_config_str"])
        key = row["kernel_name"], config.pop("dtype"), tuple(config.values())
        point = [int(row["x_value"]), *(float(row[f"y_value_{q}"]) for q in (20, 50, 80))]
        curve = found.setdefault(key, {}).setdefault(
            (row["kernel_operation_mode"], row["metric_name"]), {}
        )
        curve.setdefault(row["kernel_provider"], []).append(tuple(point))
    for panels in found.values():
        for panel in panels.values():
            for points in panel.values():
                points.sort()
    return found


def chosen(found):
    """Of each op the key with the most sizes, bf16 before others; ops of which nothing is known
    here any more are left out."""

    def sizes(key):
        panels = found[key].values()
        return len({point[0] for panel in panels for points in panel.values() for point in points})

    best = {}
    for key in found:
        if key[0] in OPS:
            rank = key[1] == "bf16", sizes(key)
            best[key[0]] = max(best.get(key[0], (rank, key)), (rank, key), key=lambda x: x[0])
    return {name: best[name][1] for name in OPS if name in best}


def rates(op, mode, dtype, rest, points, copy=False):
    """[(size, low, median, high)] in the op's unit from milliseconds."""
    out = []
    for size, *times in points:
        amount, _ = op.work((size, *rest), mode, SIZES[dtype])
        amount = min(amount, timing.COPY_MOST) if copy else amount
        high, median, low = (amount / ms / 1e9 for ms in times)
        out.append((size, low, median, high))
    return out


def draw_curve(axis, provider, points, color):
    size, low, median, high = zip(*points, strict=True)
    below = [m - x for m, x in zip(median, low, strict=True)]
    above = [x - m for m, x in zip(median, high, strict=True)]
    own = provider.startswith("flatout")
    axis.errorbar(
        size, median, yerr=[below, above], label=provider, color=color, capsize=2, marker="o",
        markersize=4, linewidth=2.5 if own else 1.2, zorder=3 if own else 2,
        linestyle=":" if provider == timing.COPY else "-",
    )  # fmt: skip


def draw_rates(axis, key, mode, panel, colors, where):
    name, dtype, rest = key
    unit = OPS[name].work((1, *rest), mode, SIZES[dtype])[1]
    for provider, points in panel.items():
        points = rates(OPS[name], mode, dtype, rest, points, provider == timing.COPY)
        draw_curve(axis, provider, points, colors[provider])
    if unit in where:
        axis.axhline(where[unit], color="black", linewidth=0.8, linestyle="--")
    axis.set(title=mode, ylabel=unit)
    axis.set_ylim(bottom=0)


def draw_memory(axis, panel, colors):
    for provider, points in panel.items():
        if provider != timing.COPY:
            draw_curve(axis, provider, points, colors.get(provider))
    axis.set(ylabel="MiB", yscale="symlog", ylim=(0, None if axis.get_ylim()[1] > 1 else 1))


def size_axis(axis, sizes, label):
    axis.set_xscale("log", base=2)
    axis.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axis.set_xticks(sizes, [f"{n:.3g}" if n >= 1e6 else str(n) for n in sizes], fontsize=7)
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def modes_of(name, panels):
    """What is drawn: of a loss both passes together, where they were timed."""
    modes = [m for m in OPS[name].modes if (m, "speed") in panels]
    return ["full"] if name in LOSSES and "full" in modes else modes


def figure_of(key, panels, where):
    """A matplotlib figure of one op; `where`: its environment, with the ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    op, modes = OPS[key[0]], modes_of(key[0], panels)
    rows = 1 + any((m, "memory") in panels for m in modes)
    figure, axes = plt.subplots(
        rows, len(modes), figsize=(max(6, 4 * len(modes)), 3 * rows + 0.8), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    names = dict.fromkeys(p for mode in modes for p in panels[mode, "speed"])
    unnamed = [p for p in names if p not in COLORS]
    colors = COLORS | {p: UNNAMED[i % len(UNNAMED)] for i, p in enumerate(unnamed)}
    points = [x for mode in modes for curve in panels[mode, "speed"].values() for x in curve]
    sizes = sorted({point[0] for point in points})
    for column, mode in enumerate(modes):
        draw_rates(axes[0][column], key, mode, panels[mode, "speed"], colors, where)
        if rows == 2:
            draw_memory(axes[1][column], panels.get((mode, "memory"), {}), colors)
        for axis in axes[:, column]:
            size_axis(axis, sizes, results.LABELS[op.dims.split()[0]])
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(title(op, *key, where), fontsize=9)
    return figure


def title(op, name, dtype, rest, where):
    sizes = ", ".join(f"{d} = {n}" for d, n in zip(op.dims.split()[1:], rest, strict=True))
    return f"{name}: {sizes}, {dtype}; {where.get('device', '')} {where.get('date', '')}".strip()


def draw(folder):
    """Writes FOLDER/plots/OP.png for every op in the folder's result files; returns their paths."""
    try:
        import matplotlib.pyplot as plt
        from PIL import Image  # matplotlib needs it too
    except ImportError:
        raise SystemExit("--plots needs matplotlib: pip install 'flatout[bench]'") from None
    where = {}
    for name in FILES:
        beside = (folder / name).with_suffix(".json")
        where |= json.loads(beside.read_text()) if beside.exists() else {}
    found, paths = curves(folder), []
    for name, key in chosen(found).items():
        if not any(metric == "speed" for _, metric in found[key]):
            continue
        figure = figure_of(key, found[key], where.get(name, {}))
        path = folder / FOLDER / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=100)
        plt.close(figure)
        with Image.open(path) as image:  # few colours: a quarter of the bytes
            small = image.convert("RGB").quantize(64)
        small.save(path, optimize=True)
        paths.append(path)
    print(f"{len(paths)} plots in {folder / FOLDER}")
    return paths
