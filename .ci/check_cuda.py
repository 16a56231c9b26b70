"""check_cuda.py MODULE LOG...: fail where a kernel spills, uses local memory or draws a C75xx line.

The logs are nvcc's with -Xptxas=-v; the module is disassembled by cuobjdump. ptxas reports
serialized wgmma and ignored setmaxnreg as mere information (C75xx), and calls a dynamically
indexed array no spill: so both the logs and the machine code are read.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path


def check_log(path):
    """ptxas prints a kernel's name, then its properties."""
    kernel, found, kernels = "?", [], 0
    for line in path.read_text().splitlines():
        if named := re.search(r"Function properties for (\S+)|entry function '(\S+)'", line):
            kernel = named[1] or named[2]
        sizes = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line)
        kernels += bool(sizes)
        if sizes and any(int(size) for size in sizes.groups()):
            found.append(f"{path.name}: {kernel}: {line.strip()}")
        if re.search(r"C75\d\d|[Ww]arning", line):
            found.append(f"{path.name}: {kernel}: {line.strip()}")
    return found, kernels


def check_sass(module):
    tools = sorted(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin"))
    path = os.pathsep.join([*map(str, tools), os.environ["PATH"]])
    command = ["cuobjdump", "--dump-sass", module]
    env = {**os.environ, "PATH": path}
    sass = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    kernel, local, kernels = "?", Counter(), 0
    for line in sass.splitlines():
        if named := re.search(r"Function : (\S+)", line):
            kernel, kernels = named[1], kernels + 1
        if re.search(r"\b(LDL|STL)\b", line):
            local[kernel] += 1
    return [f"{name}: {n} LDL or STL instructions" for name, n in local.items()], kernels


def main(module, *logs):
    found, sass_kernels = check_sass(module)
    log_kernels = 0
    for log in map(Path, logs):
        more, kernels = check_log(log)
        found += more
        log_kernels += kernels
    print(f"{sass_kernels} kernels disassembled, {log_kernels} in the logs of ptxas")
    print("\n".join(found) or "no spill, no local memory, no C75xx line")
    return bool(found) or not sass_kernels or log_kernels < sass_kernels


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
