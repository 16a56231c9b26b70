"""check_cuda.py MODULE LOG...: print the kernels' resources; fail where one is not compiled clean.

The module's machine code, read by cuobjdump, is the source: a kernel of any architecture must have
no stack (so it neither spills nor has a local array), and must say by __launch_bounds__ how many
threads it takes and fit an SM's registers with them. In the logs, nvcc's with -Xptxas=-v, ptxas
must have seen every one of these kernels and drawn no C75xx line (serialized wgmma, ignored
setmaxnreg), which it calls mere information, and no warning.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

REGISTERS = 64 * 1024  # of an SM
REPORTED = "sm_90a"  # the architecture whose table is printed


class Kernel(NamedTuple):
    registers: int
    stack: int  # bytes: spills and local arrays
    shared: int  # bytes, static; from sm_90 on with the driver's own 1024
    threads: int  # __launch_bounds__; 0: none

    def blocks(self):
        """Resident on an SM by their registers, which a warp gets in units of 256."""
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256
        return min(32, 64 // warps, REGISTERS // registers // warps)

    def faults(self):
        if self.stack:
            yield f"{self.stack} bytes of stack: a spill or a local array"
        if not self.threads:
            yield "no __launch_bounds__"
        elif not self.blocks():
            yield f"{self.registers} registers do not fit an SM {self.threads} times"


def cuobjdump(*arguments):
    tools = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin"))
    env = {**os.environ, "PATH": os.pathsep.join([*map(str, tools), os.environ["PATH"]])}
    command = ["cuobjdump", *arguments]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


def kernels_of(module):
    """{(architecture, mangled name): Kernel}"""
    threads, arch, name = {}, "?", "?"
    for line in cuobjdump("--dump-elf", module).splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r"\.nv\.info\.(\S+)", line):
            name = found[1]
        elif "EIATTR_MAX_THREADS" in line:
            threads[arch, name] = None
        elif threads.get((arch, name), 0) is None and "Value:" in line:
            x, y, z = (int(size, 16) for size in line.split()[1:4])
            threads[arch, name] = x * y * z
    kernels = {}
    for line in cuobjdump("--dump-resource-usage", module).splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        elif found := re.match(r" Function (\S+):", line):
            name = found[1]
        elif "REG:" in line:
            use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            kernels[arch, name] = Kernel(
                use["REG"], use["STACK"] + use["LOCAL"], use["SHARED"], threads.get((arch, name), 0)
            )
    return kernels


def check_attention(module):
    """Attention's main kernels: products on the tensor cores by wgmma, loads and stores by TMA, and
    no access to local memory. A whole module has both directions."""
    used, name = {}, "?"
    for line in cuobjdump("--dump-sass", module).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name = found[1]
        elif re.search(r"attention_(fwd|bwd)_kernel", name):
            opcodes = used.setdefault(name, set())
            opcodes.update(re.findall(r"\b(HGMMA|UTMALDG|UTMASTG|UTMAREDG|LDL|STL)\b", line))
    wanted = {"fwd": {"HGMMA", "UTMALDG", "UTMASTG"}}
    wanted["bwd"] = wanted["fwd"] | {"UTMAREDG"}
    for kernel in ("attention_fwd_kernel", "attention_bwd_kernel"):
        if Path(module).suffix == ".so" and not any(kernel in name for name in used):
            yield f"{module}: no {kernel}"
    for name, opcodes in used.items():
        if opcodes != wanted["bwd" if "bwd_kernel" in name else "fwd"]:
            yield f"{name}: uses {' '.join(sorted(opcodes)) or 'neither wgmma nor TMA'}"


def check_log(path):
    """What ptxas said, and of which kernels."""
    compiled, faults, kernel = set(), [], "?"
    for line in path.read_text().splitlines():
        if named := re.search(r"entry function '(\S+)' for '(\S+)'", line):
            kernel = (named[2], named[1])
            compiled.add(kernel)
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)
        if sizes and any(map(int, sizes.groups())) or re.search(r"C75\d\d|[Ww]arning", line):
            faults.append(f"{path.name}: {' '.join(kernel)}: {line.strip()}")
    return compiled, faults


def short_names(mangled):
    """Without their parameters."""
    names = "\n".join(mangled)
    done = subprocess.run(["c++filt"], input=names, check=True, capture_output=True, text=True)
    return [re.sub(r"^void |\(.*", "", name) for name in done.stdout.splitlines()]


def table(kernels):
    rows = [(name, kernel) for (arch, name), kernel in kernels.items() if arch == REPORTED]
    print(f"{REPORTED}: registers, static shared memory, threads, blocks an SM by registers")
    for name, (_, kernel) in sorted(zip(short_names(n for n, _ in rows), rows, strict=True)):
        size = f"{kernel.registers:4} {kernel.shared:6} {kernel.threads:5} {kernel.blocks():3}"
        print(f"{size}  {name}")


def main(module, *logs):
    kernels = kernels_of(module)
    faults = [f"{arch} {name}: {f}" for (arch, name), k in kernels.items() for f in k.faults()]
    faults += check_attention(module)
    compiled = set()
    for log in map(Path, logs):
        more, said = check_log(log)
        compiled |= more
        faults += said
    faults += [f"{arch} {name}: in no log" for arch, name in kernels.keys() - compiled]
    if not faults:
        table(kernels)
    archs = sorted({arch for arch, _ in kernels})
    print(f"{len(kernels)} kernels of {' '.join(archs) or 'no architecture'}")
    print("\n".join(faults) or "no spill, no local memory, no C75xx line")
    return bool(faults) or not kernels


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
