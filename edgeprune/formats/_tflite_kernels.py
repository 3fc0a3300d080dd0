"""From the operations that TFLite's profiler sees to the traced nodes and the widths they depend on.

What the runtime timed (`device/runtimes/tflite.py`) is called `node:N`, operation N of the file, or `delegate:N`, the
N-th thing that XNNPACK does in one partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from edgeprune.core.records import Extent, Graph, Kernel, KernelTime, Node
from edgeprune.formats._tflite_graph import WEIGHTED, execution_order, read_tflite_graph
from edgeprune.formats._tflite_match import TRANSPOSED, align, match_nodes, same_work

PADS = frozenset({"PAD", "PADV2", "MIRROR_PAD"})
RESHAPES = frozenset({"RESHAPE", "EXPAND_DIMS", "SQUEEZE"})
CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})


class TfliteKernelMap:
    """Kernels of the dense artifact, and who pays for what is run at other widths."""

    def __init__(self, model: bytes, graph: Graph, times: Sequence[KernelTime] | None) -> None:
        self._file = read_tflite_graph(model)
        self._node_of = match_nodes(self._file, graph)
        self._nodes = {node.name: node for node in graph.nodes}
        self._parameters = {parameter.name: parameter for parameter in graph.parameters}
        self._located: dict[tuple[tuple[str, str], ...], list[int]] = {}
        mains = self._expect() if times is None else sorted(set(self._locate(times)))
        self._owner = self._assign(mains)
        chains: dict[int, list[int]] = {main: [] for main in mains}
        for place, main in sorted(self._owner.items()):
            chains[main].append(place)
        covered = self._cover(graph, chains)
        self.kernels: tuple[Kernel, ...] = tuple(
            self._describe(main, chain, covered[main]) for main, chain in chains.items()
        )

    def charge(self, times: Sequence[KernelTime]) -> dict[str, float]:
        """Seconds per kernel name; what cannot be placed is charged to the kernel next to it.

        times: in the order of execution.
        """
        charged: dict[str, float] = {}
        for time, place in zip(times, self._locate(times), strict=True):
            name = self._name(self._owner[place])
            charged[name] = charged.get(name, 0.0) + time.time_s
        return charged

    def _name(self, place: int) -> str:
        return f"{self._file.operations[place].kind.lower()}_{place}"

    def _expect(self) -> list[int]:
        """Operations that probably take time of their own."""
        operations = self._file.operations
        mains = []
        for place, operation in enumerate(operations):
            behind = [operations[reader].kind for reader in self._file.behind(place)]
            folded = operation.kind in PADS and behind and all(kind in WEIGHTED for kind in behind)
            computed = self._file.before(place) or operation.inputs[0] in self._file.inputs
            constant = operation.kind in CONVERSIONS and not computed
            if not (folded or constant or operation.kind in RESHAPES):
                mains.append(place)
        return mains or list(range(len(operations)))

    # --- what was timed -> operations ---------------------------------------------------------------

    def _locate(self, times: Sequence[KernelTime]) -> list[int]:
        """The operation that each of the times belongs to."""
        key = tuple((time.name, time.op) for time in times)
        if key not in self._located:
            self._located[key] = self._place(key)
        return self._located[key]

    def _place(self, timed: Sequence[tuple[str, str]]) -> list[int]:
        operations = self._file.operations
        found: list[int | None] = [None] * len(timed)
        alone = set()
        for position, (name, _) in enumerate(timed):
            kind, _, number = name.partition(":")
            if kind == "node" and number.isdigit() and int(number) < len(operations):
                found[position] = int(number)
                alone.add(int(number))
        delegated = [place for place in execution_order(self._file, alone) if place not in alone]
        inside = [position for position, place in enumerate(found) if place is None]

        def score(left: int, right: int) -> float:
            return same_work(operations[delegated[left]].kind, timed[inside[right]][1])

        for left, right in align(len(delegated), len(inside), score):
            found[inside[right]] = delegated[left]
        return self._fill(found, timed)

    @staticmethod
    def _fill(found: list[int | None], timed: Sequence[tuple[str, str]]) -> list[int]:
        """Times without an operation go to the one before; what prepares another's input, to the one behind."""
        filled = []
        for position, place in enumerate(found):
            before = next((p for p in reversed(found[:position]) if p is not None), None)
            behind = next((p for p in found[position:] if p is not None), None)
            prepares = timed[position][1].startswith(("Convert", "Constant Pad"))
            near = (behind, before) if prepares else (before, behind)
            filled.append(place if place is not None else next((p for p in near if p is not None), 0))
        return filled

    # --- operations -> kernels ----------------------------------------------------------------------

    def _assign(self, mains: list[int]) -> dict[int, int]:
        """The kernel, by its main operation, that every operation is computed in."""
        owner = {main: main for main in mains}
        places = range(len(self._file.operations))
        # Paddings and conversions go with what reads them, last first; all else with what it reads.
        for place in reversed(places):
            reader = next((reader for reader in self._file.behind(place) if reader in owner), None)
            if place not in owner and reader is not None and self._file.operations[place].kind in PADS | CONVERSIONS:
                owner[place] = owner[reader]
        for place in places:
            if place not in owner and (before := [owner[p] for p in self._file.before(place) if p in owner]):
                owner[place] = max(before)
        for place in places:
            if place not in owner:
                owner[place] = min(mains, key=lambda main: abs(main - place))
        return owner

    def _cover(self, graph: Graph, chains: dict[int, list[int]]) -> dict[int, tuple[str, ...]]:
        """Traced nodes of each kernel; those that left no operation go with the node they read."""
        kernel_of = {
            self._node_of[place].name: main
            for main, chain in chains.items()
            for place in chain
            if place in self._node_of
        }
        for node in graph.nodes:
            if node.name not in kernel_of and (readable := [name for name in node.inputs if name in kernel_of]):
                kernel_of[node.name] = kernel_of[readable[0]]
        return {main: tuple(n.name for n in graph.nodes if kernel_of.get(n.name) == main) for main in chains}

    def _describe(self, main: int, chain: list[int], nodes: tuple[str, ...]) -> Kernel:
        name, operation = self._name(main), self._file.operations[main]
        node = self._node_of.get(main) or self._near(main)
        ops = "+".join(
            self._file.operations[place].kind + _suffix(self._file.operations[place].activation) for place in chain
        )
        if node is None:
            return Kernel(name=name, nodes=nodes, signature=f"{ops} {name}", out_extent=Extent(fixed=1))
        size = _spatial(node.out_shape)
        weight = next((self._parameters[key] for key in node.parameters if key in self._parameters), None)
        if operation.kind in WEIGHTED and main in self._node_of and weight is not None and len(weight.shape) >= 2:
            groups = int(node.attributes.get("groups", 1) or 1)
            out, into = weight.extents[0], weight.extents[1]
            if node.op in TRANSPOSED:
                out, into = into, out
            depthwise = groups > 1 and weight.shape[1] == 1
            kind = "" if groups == 1 else " depthwise" if depthwise else f" groups={groups}"
            window = "x".join(map(str, weight.shape[2:]))
            stride = "x".join(map(str, operation.stride))
            return Kernel(
                name=name,
                nodes=nodes,
                signature=f"{ops}{kind} kernel={window} stride={stride} size={size}",
                out_extent=out,
                in_extent=None if depthwise else into,
                positions=prod(node.out_shape[2:]),
                taps=prod(weight.shape[2:]),
            )
        # A mean costs what it reads, a padding what it writes.
        read = next((self._nodes[key] for key in node.inputs if key in self._nodes), None)
        if main in self._node_of and read is not None and _spatial(read.out_shape) != size:
            size = f"{_spatial(read.out_shape)}->{size}"
        varying = next((extent for extent in node.out_extents if extent.groups), None)
        if varying is None:
            channels = node.out_shape[1] if len(node.out_shape) > 1 else 1
            varying = Extent(fixed=channels)
            size = f"{size} channels={channels}"
        return Kernel(
            name=name, nodes=nodes, signature=f"{ops} size={size}", out_extent=varying,
            positions=prod(node.out_shape[2:]),
        )  # fmt: skip

    def _near(self, place: int) -> Node | None:
        """The node of the nearest operation that has one: first of those it reads, then of its readers."""
        for step in (self._file.before, self._file.behind):
            queue, seen = [place], {place}
            while queue:
                at = queue.pop(0)
                if at in self._node_of:
                    return self._node_of[at]
                fresh = [other for other in step(at) if other not in seen]
                seen.update(fresh)
                queue += fresh
        return None


def _suffix(activation: str) -> str:
    return "" if activation == "NONE" else f"+{activation}"


def _spatial(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[2:]))
