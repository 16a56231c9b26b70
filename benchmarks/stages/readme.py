"""The tables of the stage matrix, from the result files alone: a short one into the project's
README, every figure into STAGES.md beside the files."""

import json

from readme_text import README, between, markdown, shown, wrapped

from stages import parity, report
from stages.report import number, ordered
from stages.results import EXPANDABLE, PARITY, PROFILE, RAN, STAGES
from stages.rows import BY_NAME, PUBLISHED, ROWS

BEGIN, END = "<!-- run_stages: begin -->", "<!-- run_stages: end -->"
UNCOMPILED = "04_flatout_lce"  # the row that is to beat every compiled peer with nothing compiled

TEXT = """{what}: {machine} Medians of {timed} steps; MFU of the best 10 in a row. GiB: reserved at
the peak, parameters, gradients and optimizer included. "published": the public matrix (one H100
80GB, Qwen3-8B, 1 x 2048 tokens, 2025-08, in its own units). First step: seconds from the process's
start, without the model's creation and the import of its class. All figures stand in
[{folder}/STAGES.md]({folder}/STAGES.md)."""
SHORT_HEAD = ["row", "MFU %", "published", "GiB", "published", "step ms", "first step", "status"]
FULL_HEAD = [
    "row", "attention", "packages", "status", "MFU %", "TFLOPS", "published", "step ms", "IQR ms",
    "tokens/s", "reserved GiB", "allocated GiB", "first loss", "last loss", "from the reference",
    "first step s", "of it imports", "CUDA context",
    "patching", "model creation s", "compile s", "graphs", "CUDA graphs", "git", "ran",
]  # fmt: skip
EXPANDABLE_TEXT = "Reserved GiB with the allocator's expandable segments: {}."
PARITY_TEXT = """Losses over {steps} steps ({preset}, {data}): three runs of `{reference}` whose
first weights differ by one unit in the last place span what rounding alone does (their largest
distance, {window} steps around). A row must lie within that of the nearest of them in {inside:.0%}
of the steps, and within {farthest:g} times that everywhere; "worst" is its largest distance.
![losses]({folder}/parity.png)"""
PARITY_HEAD = ["row", "within", "of the steps", "worst", "at step"]
PROFILE_TEXT = "Milliseconds of a step by kernel group, under torch's profiler ({machine}):"
MACHINE = (("driver", "driver {}"), ("power_limit", "power cap {}"), ("torch", "torch {}"),
           ("cuda", "CUDA {}"), ("cudnn", "cuDNN {}"),
           ("transformers", "transformers {}"))  # fmt: skip


def machine(record):
    where = record.get("where", {})
    name = where.get("gpu") or where.get("cpu") or "unknown machine"
    return ", ".join([name, *(text.format(where[k]) for k, text in MACHINE if k in where)])


def sustained(records):
    """What a GEMM reached whenever run_stages.py began to run some of these rows."""
    found = sorted({r["where"]["gemm_tflops"] for r in records if "gemm_tflops" in r["where"]})
    text = " to ".join(map(str, dict.fromkeys([found[0], found[-1]]))) if found else ""
    return f", a sustained bf16 GEMM: {text} TFLOPS" if text else ""


def machines(results):
    """The machine of the rows, and which rows ran on which where they are several."""
    seen = {}
    for record in ordered(results["rows"]):
        seen.setdefault(machine(record), []).append({"where": {}} | record)
    text = {name + sustained(records): records for name, records in seen.items()}
    if len(text) == 1:
        return f"{next(iter(text))}."
    names = {name: ", ".join(f"`{r['row']}`" for r in records) for name, records in text.items()}
    return " ".join(f"{rows}: {name}." for name, rows in names.items())


def published(name):
    """MFU and memory of the public matrix, as text."""
    value = PUBLISHED.get(name)
    if value is None:
        return "-", "-"
    return (value, "-") if isinstance(value, str) else tuple(map(str, value))


def setting(results):
    s = results["settings"]
    return f"{s['preset']}, {s['batch']} x {s['seq']} tokens, {s['dtype']}"


def short_status(record):
    """The status, and of a reason what a line of the README holds."""
    reason = record["reason"]
    text = record["status"] + (f": {reason}" if reason else "")
    return text if len(text) <= 28 else text[:25] + "..."


def short_lines(results):
    for record in (results["rows"].get(row.name) for row in ROWS):
        if record is None:
            continue
        figures, (mfu, memory) = record["figures"], published(record["row"])
        ran = record["status"] in RAN
        yield [f"`{record['row']}`", number(figures["mfu"]), mfu,
               number(record.get("peak_gib"), 2) if ran else "-", memory,
               number(figures["step_ms"]),
               number(figures["first_step_s"]), short_status(record)]  # fmt: skip


def full_lines(results):
    for r in ordered(results["rows"]):
        f, compiler = r["figures"], r.get("compiler", {})
        compiled = BY_NAME[r["row"]].compile
        graphs = [str(compiler.get(k, "-")) if compiled else "-" for k in ("graphs", "cuda_graphs")]
        apart = r.get("loss_difference")
        yield [f"`{r['row']}`", r.get("attention", "-"), report.peers(r) or "-",
               r["status"] + (f": {r['reason']}".replace("|", "\\|") if r["reason"] else ""),
               number(f["mfu"]), number(f["tflops"]), report.published(r["row"]),
               number(f["step_ms"]), number(f["iqr_ms"], 2), number(f["tokens_per_s"], 0),
               number(r.get("peak_gib"), 2), number(r.get("allocated_gib"), 2),
               number(f["first_loss"], 3), number(f["last_loss"], 3),
               "-" if apart is None else f"{100 * apart:.2f} %", number(f["first_step_s"]),
               *(number(r.get(k)) for k in ("import_s", "context_s", "patch_s", "model_s")),
               number(f["compile_s"]), *graphs, (r.get("git") or "-")[:9],
               (r.get("ran") or "-")[:10]]  # fmt: skip


def fastest(results, ours, compiled=(True, False)):
    """The quickest record of the peers' rows or of flatout's, or None."""
    rows = [
        results["rows"][row.name] for row in ROWS
        if row.ours == ours and row.compile in compiled and row.name in results["rows"]
    ]  # fmt: skip
    rows = [r for r in rows if r["figures"]["step_ms"] is not None]
    return min(rows, key=lambda r: r["figures"]["step_ms"], default=None)


def beside(results):
    """flatout's best rows beside the best of the peers, in words."""

    def named(record):
        return f"`{record['row']}`, {number(record['figures']['step_ms'])} ms"

    found = [
        ("fastest peer", fastest(results, False)),
        ("fastest of flatout", fastest(results, True)),
        ("with nothing compiled", fastest(results, True, (False,))),
    ]
    plain = results["rows"].get(UNCOMPILED)
    if plain and plain["figures"]["step_ms"] is not None:
        found.append(("linear cross-entropy, torch's optimizer, nothing compiled", plain))
    text = "; ".join(f"{what}: {named(record)}" for what, record in found if record)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def compiling(results):
    """What torch.compile did in the rows that it ran in."""
    ran = [r for r in ordered(results["rows"]) if BY_NAME[r["row"]].compile and r["status"] in RAN]
    clean = [r for r in ran if not report.compiler_note(r)]
    if not ran:
        return ""
    names = {True: "none", False: ", ".join(f"`{r['row']}`" for r in clean)}
    text = "Compiled (every layer, fullgraph, max-autotune) with no graph break, no recompilation "
    text += f"after warm-up and no CUDA graph skipped: {names[not clean]}"
    odd = [f"`{r['row']}`: {report.compiler_note(r)}" for r in ran if r not in clean]
    return text + "".join(f"; {line}" for line in odd) + "."


# ---- Other files ----------------------------------------------------------------------------


def load(folder, kind):
    path = folder / f"{kind}.json"
    return json.loads(path.read_text()) if path.exists() else None


def expandable(results):
    found = [
        f"`{r['row']}` {number(r.get('peak_gib'))}" for r in ordered(results["rows"])
        if r["status"] in RAN
    ]  # fmt: skip
    return wrapped(EXPANDABLE_TEXT.format(", ".join(found) or "no row ran"))


def parity_part(results, folder):
    lines = [[f"`{c[0]}`", *c[1:5]] for c in map(parity.cells, parity.judged(results))]
    text = PARITY_TEXT.format(
        steps=results["settings"]["steps"], preset=setting(results), folder=folder,
        data=results["settings"]["data"].split(",")[0], reference=parity.NAMES[0],
        window=parity.WINDOW, inside=parity.INSIDE, farthest=parity.FARTHEST,
    )  # fmt: skip
    return [wrapped(text), "\n".join(markdown(PARITY_HEAD, lines))]


def profile_part(results):
    from stages.profiling import GROUPS

    found = [r for r in ordered(results["rows"]) if "profile" in r]
    lines = [
        [f"`{r['row']}`", *map(number, (r["figures"]["step_ms"], *r["profile"]["groups"].values()))]
        for r in found
    ]  # fmt: skip
    text = PROFILE_TEXT.format(machine=machines({"rows": {r["row"]: r for r in found}})[:-1])
    return [wrapped(text), "\n".join(markdown(["row", "step", *GROUPS], lines))]


def parts(folder, head, lines_of):
    """Paragraphs and tables of what the folder has; the matrix with this head and these lines."""
    out, name = [], shown(folder)
    if results := load(folder, STAGES):
        timed = results["settings"]["steps"] - results["settings"]["warmup"]
        text = TEXT.format(
            what=setting(results), machine=machines(results), timed=timed, folder=name
        )
        out += [wrapped(text), "\n".join(markdown(head, lines_of(results)))]
        out += [wrapped(text) for text in (beside(results), compiling(results)) if text]
    if results := load(folder, EXPANDABLE):
        out.append(expandable(results))
    if results := load(folder, PARITY):
        out += parity_part(results, name)
    if results := load(folder, PROFILE):
        out += profile_part(results)
    return out


def pages(folder):
    """file -> its text, of the two files that are made from the results in the folder."""
    short = parts(folder, SHORT_HEAD, short_lines)
    found = {README: between(README.read_text(), BEGIN, END, "".join(f"{x}\n\n" for x in short))}
    if short:
        made = (
            f"Generated by `python benchmarks/run_stages.py --readme {shown(folder)}`: do not edit."
        )
        full = ["# The stage matrix", made, *parts(folder, FULL_HEAD, full_lines)]
        found[folder / "STAGES.md"] = "\n\n".join(full) + "\n"
    return found


def update(folder):
    for path, text in pages(folder).items():
        path.write_text(text)
