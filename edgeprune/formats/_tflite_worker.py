"""The converter's own process: torch.export archives in, .tflite files out.

Run as a script with one folder. For each `NUMBER.pt2` in it the result is `NUMBER.tflite`, or
`NUMBER.json` with the reason and the operation that was being converted. litert-torch takes 14 s to
import and prints its progress on stdout; here both harm nobody, and several models share the import.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Convert every archive of a folder."""
    import litert_torch  # type: ignore[import-untyped, unused-ignore]
    import torch

    for archive in sorted(folder.glob("*.pt2"), key=lambda path: int(path.stem)):
        try:
            program = torch.export.load(archive)
            inputs, _ = program.example_inputs or ((), {})
            litert_torch.convert(program.module(), inputs).export(str(archive.with_suffix(".tflite")))
        except Exception as error:  # the converter's errors share no base class
            report = {"reason": f"{type(error).__name__}: {error}", "place": _place(error)}
            archive.with_suffix(".json").write_text(json.dumps(report))


def _place(error: BaseException) -> str:
    """The label of the graph's operation that was being worked on, or ""."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        node: Any = trace.tb_frame.f_locals.get("node", trace.tb_frame.f_locals.get("n"))
        stack = getattr(node, "meta", {}).get("nn_module_stack") if node is not None else None
        if stack:
            found = str(list(stack.values())[-1][1])
        trace = trace.tb_next
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
