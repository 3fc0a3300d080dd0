"""Record what a board says of itself, as a test fixture: for a board whose facts or power come out wrong.

    python tools/record_board.py TARGET FOLDER [--meter tegrastats] [--meter ina3221] ...

FOLDER gets a text file for each source of the board's kind, `meter-NAME.txt` for its meters, and
`expected.json`: what the parsers make of them now. Send the folder with a bug report; or correct
`expected.json`, move it below tests/fixtures/KIND/, and the test of the fixtures fails until the parser is right.
Serial numbers, host names, MAC and IP addresses are taken out; look through it all the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edgeprune.core.errors import DeviceError, EdgepruneError
from edgeprune.core.family import load_member
from edgeprune.device.meters import Meter, Reading, open_meter
from edgeprune.device.sources import section_script, split_sections
from edgeprune.device.targets import connect_target, load_target
from edgeprune.device.transports import Transport

READINGS = 5
STREAM_S = 2
MARK = "@@ "

SECRETS = (
    (re.compile(r"^(Serial\s*:).*$", re.MULTILINE), r"\1 0000000000000000"),
    (re.compile(r"\b(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}\b"), "00:00:00:00:00:00"),
    (re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b"), "192.0.2.1"),
)


def scrub(text: str, names: Sequence[str]) -> str:
    """The text without serial numbers, addresses and these names."""
    for pattern, instead in SECRETS:
        text = pattern.sub(instead, text)
    for name in names:
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "board", text)
    return text


def record_facts(kind: str, transport: Transport) -> dict[str, str]:
    """Raw text of every fact of a board kind, and its host name."""
    scripts = {name: fact.source.script() for name, fact in load_member("device.boards", kind).FACTS.items()}
    done = transport.run(["sh", "-s"], stdin=section_script({**scripts, "host": "uname -n"}))
    raw = split_sections(done.stdout, "the board")
    return {name: raw[name] for name in (*scripts, "host")}


def record_meter(meter: Meter, transport: Transport) -> str:
    """Some readings, each after a line `@@ SECONDS`; the lines of a stream as they are."""
    if meter.stream:
        # It would go on for ever, so it is ended there.
        done = transport.run(["timeout", str(STREAM_S), *meter.source.argv])
        return done.stdout.decode("utf-8", "replace")
    began, parts = time.monotonic(), []
    for _ in range(READINGS):
        done = transport.run(["sh", "-s"], stdin=section_script({"power": meter.source.script()}))
        text = split_sections(done.stdout, "the board")["power"]
        parts.append(f"{MARK}{time.monotonic() - began:.3f}\n{text}\n")
        time.sleep(meter.interval_s)
    return "".join(parts)


def split_readings(text: str, interval_s: float) -> list[Reading]:
    """What `record_meter` wrote."""
    if not text.startswith(MARK):
        return [(interval_s * place, line) for place, line in enumerate(text.splitlines())]
    parts = [part.partition("\n") for part in f"\n{text}".split(f"\n{MARK}")[1:]]
    return [(float(seconds), body) for seconds, _, body in parts]


def parse_folder(folder: Path, kind: str, meters: Sequence[str]) -> dict[str, Any]:
    """What the parsers make of a recorded folder: facts, and watts by meter; an error is its message."""
    board = load_member("device.boards", kind)
    texts = {name: _read(folder / f"{name}.txt") for name in board.FACTS}
    facts = {name: fact.parse(texts[name]) for name, fact in board.FACTS.items()}
    facts["throttled"] = board.find_throttling(texts["throttled"], texts["throttled"])
    watts: dict[str, Any] = {}
    for text in meters:
        meter = open_meter(text)
        if meter is None:
            continue
        readings = split_readings(_read(folder / f"meter-{text.partition(':')[0]}.txt"), meter.interval_s)
        try:
            watts[text] = [round(value, 6) for _, value in meter.watts(readings)]
        except DeviceError as error:
            watts[text] = str(error)
    return {"board": kind, "facts": facts, "meters": watts}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def record(target_name: str, folder: Path, meters: Sequence[str]) -> dict[str, Any]:
    """Fill FOLDER and return what `expected.json` holds."""
    target = load_target(target_name)
    meters = list(dict.fromkeys([*meters, target.meter]))
    folder.mkdir(parents=True, exist_ok=True)
    with closing(connect_target(target)) as transport:
        raw = record_facts(target.board, transport)
        names = [name for name in (raw.pop("host"), str(target.address.get("host", ""))) if len(name) > 1]
        for name, text in raw.items():
            (folder / f"{name}.txt").write_text(scrub(text, names) + "\n", encoding="utf-8")
        for text in meters:
            if (meter := open_meter(text)) is not None:
                path = folder / f"meter-{text.partition(':')[0]}.txt"
                path.write_text(scrub(record_meter(meter, transport), names), encoding="utf-8")
    expected = parse_folder(folder, target.board, meters)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return expected


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--meter", action="append", default=[], help="also record this meter; may be repeated")
    options = parser.parse_args(argv)
    try:
        expected = record(options.target, options.folder, options.meter)
    except EdgepruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(expected, indent=1, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
