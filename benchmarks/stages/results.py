"""The files of a run: one JSON a kind of run, written after every row, resumed and merged."""

import json
import os

SCHEMA = 2
RAN = ("Success!", "Loss off")
SETTLED = (*RAN, "CUDA OOM", "Host OOM", "Compile Issue")  # another run would say the same
STAGES, EXPANDABLE, PARITY, PROFILE = "stages", "stages_expandable", "parity", "profile"


class Mismatch(ValueError):
    """Results that cannot stand in one table."""


def write_atomically(path, write, mode="w"):
    """write(file) into a temporary file beside path, then rename: readers never see half a file."""
    part = path.with_name(path.name + ".part")
    with open(part, mode, newline=None if "b" in mode else "") as file:
        write(file)
    os.replace(part, path)


def compact(value, depth=0):
    """JSON with a line an entry down to a row's members, so that a curve takes one line."""
    if depth == 3 or not isinstance(value, dict) or not value:
        return json.dumps(value)
    pad = " " * (depth + 1)
    members = (f"{pad}{json.dumps(k)}: {compact(v, depth + 1)}" for k, v in value.items())
    return "{\n" + ",\n".join(members) + "\n" + " " * depth + "}"


def save(results, path):
    write_atomically(path, lambda file: file.write(compact(results) + "\n"))


def load(path, settings=None):
    """The results in a file; Mismatch where its rows were made with other settings."""
    found = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise Mismatch(f"{path} has schema {found.get('schema')}, not {SCHEMA}")
    for key, value in (settings or {}).items():
        was = found["settings"].get(key)
        if was != value:
            raise Mismatch(f"{path} was made with {key} {was}, not {value}: use another --out")
    return found


def merge(files):
    """One run of several with the same settings; of a row in several, one that ran, the last."""
    found = [load(path) for path in files]
    for path, other in zip(files[1:], found[1:], strict=True):
        load(path, found[0]["settings"])
        if other["kind"] != found[0]["kind"]:
            raise Mismatch(f"{path} holds {other['kind']}, {files[0]} {found[0]['kind']}")
        for name, record in other["rows"].items():
            old = found[0]["rows"].get(name)
            if old is None or record["status"] in SETTLED or old["status"] not in SETTLED:
                found[0]["rows"][name] = record
    return found[0]
