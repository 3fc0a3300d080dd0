"""Peak activation memory as ONNX Runtime allocates it: fused kernels, buffers, and the arena they come from.

What lives at once in the graph is a lower bound. The runtime's arena grows by doubling regions and gives
nothing back; after a first run it places all buffers anew, in one block (its memory pattern), beside what
the first run left. So the peak jumps with the widths, and is followed here step by step.

Source: ONNX Runtime's documentation (memory arena, memory pattern, graph optimizations) and what 1.31 does,
observed by logging its allocations.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Generic, TypeVar

from edgeprune.core.records import AVX512, Graph, Node, Widths

FLOAT_BYTES = 4
BLOCK, WIDE_BLOCK = 8, 16
"""Of how many channels are the blocks in which convolutions store them on x86, and there with AVX-512."""
ALIGNMENT = 4
"""A convolution of input channels that are no multiple of this, and not fewer than a block, knows no blocks."""
ROUNDING = 256
"""An allocation is a multiple of this many bytes."""
FIRST_REGION = 1 << 20
SPLIT_REST = 128 << 20
"""A free chunk is split when it is twice what is asked, or leaves as much as this."""
HANDLE_SHARE = 32
"""The arena keeps 8 bytes for each 256 of a region."""
PAGE = 4096
COLUMNS = 128 * 128
"""Numbers of the input that each thread of a convolution without blocks unrolls at once."""
MACS_PER_THREAD = 1 << 16
"""A convolution takes one more thread for so many multiply-adds."""
COPY = " in the other layout"

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution"})
POOLS = frozenset({"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"})
# fmt: off
ELEMENTWISE = frozenset((
    "abs", "add", "batch_norm", "celu", "clamp", "clip", "div", "elu", "exp", "gelu", "hardsigmoid", "hardswish",
    "hardtanh", "leaky_relu", "mish", "mul", "neg", "pow", "prelu", "relu", "relu6", "selu", "sigmoid", "silu",
    "softplus", "sqrt", "sub", "tanh",
))
# fmt: on

Shape = tuple[int, ...]
S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One step of the runtime: the values it reads, the shape it makes, the inputs it may write over.

    workspace: numbers it needs besides, while it runs.
    """

    reads: tuple[str, ...]
    shape: Shape
    over: tuple[str, ...] = ()
    workspace: int = 0


@dataclass(slots=True)
class Buffer(Generic[S]):
    """Memory of one or more values of one shape, from the kernel that first writes it to the last that reads it."""

    shape: S
    born: int
    dies: int


def channel_block(arch: str, cpu: str = "") -> int:
    """Of how many channels are the blocks in which the runtime's convolutions store them; 1: there are none.

    arch, cpu: of the machine, as `Conditions` has them.
    """
    if arch != "x86_64":
        return 1
    return WIDE_BLOCK if cpu.endswith(AVX512) else BLOCK


def peak_memory_bytes(graph: Graph, widths: Widths, block: int = BLOCK, threads: int = 1) -> int:
    """Peak of the runtime's activation memory over several runs, in bytes; without what a process takes anyway.

    block: see `channel_block`. threads: of the runtime.
    """
    kernels, outputs = lower(graph, widths, block, threads)
    buffers = place(kernels, outputs, {name: kernel.shape for name, kernel in kernels.items()})
    workspaces: list[Buffer[Shape]] = [
        Buffer((kernel.workspace,), index, index) for index, kernel in enumerate(kernels.values()) if kernel.workspace
    ]
    arena = Arena()
    held: dict[int, Chunk] = {}
    # A workspace is the last to be taken of what a kernel needs.
    first_run = [*buffers, *workspaces]
    for born, index in _events(first_run):
        if born:
            held[index] = arena.take(_bytes(first_run[index]))
        else:
            arena.give(held.pop(index))
    for chunk in held.values():
        arena.give(chunk)
    # From the second run on: one block, and the outputs, which the caller keeps.
    end = len(kernels)
    inner = [buffer for buffer in buffers if buffer.dies < end]
    for size in (pattern_bytes(inner), *(_bytes(buffer) for buffer in buffers if buffer.dies == end)):
        arena.take(size)
    for workspace in workspaces:
        arena.give(arena.take(_bytes(workspace)))
    return arena.touched_bytes


# --- from the graph to kernels and buffers -------------------------------------------------------


def lower(graph: Graph, widths: Widths, block: int = 1, threads: int = 1) -> tuple[dict[str, Kernel], set[str]]:
    """The kernels in the order of execution, by the name of what they make; the names of the model's outputs.

    Normalisation is folded into the convolution before it, an addition is done by the convolution that it
    reads. Convolutions, and what follows them channel by channel, keep channels in blocks; where another
    operation reads that, or a convolution reads something else, a copy in the other layout is made,
    named after the value and COPY.
    """
    return _Lowering(graph, widths, block, threads).run()


class _Lowering:
    def __init__(self, graph: Graph, widths: Widths, block: int, threads: int) -> None:
        self._graph = graph
        self._block = block
        self._threads = threads
        self._weights = {parameter.name: parameter.shape for parameter in graph.parameters}
        units = graph.units
        self._shape = {n.name: tuple(e.size(widths, units) for e in n.out_extents) for n in graph.nodes}
        self._readers: dict[str, int] = dict.fromkeys(self._shape, 0)
        for name in (*(name for node in graph.nodes for name in node.inputs), *graph.outputs):
            self._readers[name] += 1
        self._kernels: dict[str, Kernel] = {}
        self._value: dict[str, str] = {}
        """Node -> the kernel or copy whose memory holds it."""
        self._blocked: set[str] = set()
        self._convolutions: set[str] = set()
        """Values of convolutions that nobody else has read so far."""
        self._given: set[str] = set()
        """The model's inputs."""

    def run(self) -> tuple[dict[str, Kernel], set[str]]:
        for node in self._graph.nodes:
            self._add(node)
        outputs = [self._value[name] for name in self._graph.outputs]
        return {name: self._kernels[name] for name in self._in_order(outputs)}, set(outputs)

    def _add(self, node: Node) -> None:
        op, name = node.op.removesuffix("_"), node.name
        reads = [self._value[source] for source in node.inputs]
        if op == "input":
            self._value[name] = name
            self._given.add(name)
            return
        if reads and self._is_alias(node, op, reads[0]):
            self._value[name] = reads[0]
            return
        blocked = self._is_blocked(node, op, reads)
        shape = self._in_blocks(self._shape[name]) if blocked else self._shape[name]
        if op == "add" and len(reads) == 2 and (fused := self._fuse(node, shape, blocked)) is not None:
            kernel = fused
        else:
            reads = [self._in_layout(source, blocked, op) for source in node.inputs]
            over = tuple(reads) if op in ELEMENTWISE else ()
            # Where there are blocks, what is left without them was measured to take no more than its values.
            unrolls = op in CONVOLUTIONS and self._block == 1
            kernel = Kernel(tuple(reads), shape, over, self._unrolled(node) if unrolls else 0)
        self._kernels[name] = kernel
        self._value[name] = name
        if blocked:
            self._blocked.add(name)
        if op in CONVOLUTIONS and self._readers[name] == 1:
            self._convolutions.add(name)

    def _is_alias(self, node: Node, op: str, source: str) -> bool:
        if not node.out_shape:
            return True
        if op == "batch_norm" and source in self._convolutions and node.inputs:
            if self._readers[node.name] != 1:
                self._convolutions.discard(source)
            return True
        return node.view and op not in ELEMENTWISE and prod(self._shape[node.name]) == prod(self._shape[node.inputs[0]])

    def _is_blocked(self, node: Node, op: str, reads: list[str]) -> bool:
        if len(self._shape[node.name]) != 4 or self._block == 1:
            return False
        if op in CONVOLUTIONS:
            channels = self._channels(node.inputs[0])
            return channels < self._block or channels % ALIGNMENT == 0
        whole = op in ELEMENTWISE or (
            (op in POOLS or op == "cat") and self._channels(node.inputs[0]) % self._block == 0
        )
        return whole and all(read in self._blocked for read in reads)

    def _in_blocks(self, shape: Shape) -> Shape:
        return (shape[0], -(-shape[1] // self._block) * self._block, *shape[2:])

    def _channels(self, name: str) -> int:
        return self._shape[name][1]

    def _fuse(self, node: Node, shape: Shape, blocked: bool) -> Kernel | None:
        """The convolution that does this addition too, writing over the other addend; None where there is none."""
        first, second = (self._value[source] for source in node.inputs)
        for conv, other in ((first, second), (second, first)):
            same_layout = blocked == (conv in self._blocked) == (other in self._blocked)
            if conv in self._convolutions and conv != other and same_layout and self._kernels[other].shape == shape:
                self._convolutions.discard(conv)
                done = self._kernels.pop(conv)
                return Kernel((*done.reads, other), shape, (other,), done.workspace)
        return None

    def _unrolled(self, node: Node) -> int:
        """Numbers that a convolution without blocks unrolls its input into, so that it becomes a matrix product."""
        if not node.parameters:
            return 0  # weights that are computed: how large the kernel is nobody says
        _, filters, *out = self._shape[node.name]
        _, channels, *into = self._shape[node.inputs[0]]
        _, of_group, *kernel = self._weights[node.parameters[0]]
        groups = int(node.attributes.get("groups", 1))
        if groups > 1 and of_group == 1:
            groups = channels  # of a depthwise one a group goes with its channel
        pixels, per_filter = prod(out), channels // groups * prod(kernel)
        filters //= groups
        if prod(kernel) == 1 and into == out:
            return 0  # it is a matrix product already
        if groups == channels > 1 and filters == 1 and kernel == [3, 3] and into == out:
            return into[-1] + 2  # has an algorithm of its own there
        if filters > pixels:
            return pixels * per_filter
        if groups > 1:
            at_once = max(pixels * per_filter, filters * pixels, COLUMNS)
            return at_once * min(self._threads, groups)
        return COLUMNS * min(self._threads, filters * pixels * per_filter // MACS_PER_THREAD + 1)

    def _in_layout(self, source: str, blocked: bool, op: str) -> str:
        """The value itself, or its copy in the layout that the reader needs, made when it is first asked for."""
        read = self._value[source]
        if op in CONVOLUTIONS and self._channels(source) < self._block:
            blocked = False  # so few channels are read as they are
        if blocked == (read in self._blocked):
            return read
        shape = self._shape[read]
        if prod(shape[2:]) == 1:
            return read  # both layouts are one
        copy = read + COPY
        self._kernels.setdefault(copy, Kernel((read,), self._in_blocks(shape) if blocked else shape))
        return copy

    def _in_order(self, outputs: Iterable[str]) -> Iterator[str]:
        """Depth first: a kernel right after the last of its inputs, those in the order it reads them."""
        done = set(self._given)
        stack = list(outputs)
        while stack:
            name = stack[-1]
            waiting = [] if name in done else [read for read in self._kernels[name].reads if read not in done]
            if waiting:
                stack.append(waiting[0])
                continue
            stack.pop()
            if name not in done:
                done.add(name)
                yield name


def place(
    kernels: Mapping[str, Kernel], outputs: set[str], shapes: Mapping[str, S], *, reuse: bool = True
) -> list[Buffer[S]]:
    """Buffers by birth. A kernel writes over an input of its own shape that dies there, else takes the free
    buffer of its shape that was used last, else gets a new one. reuse: whether there is the second way."""
    last: dict[str, int] = {}
    for index, (name, kernel) in enumerate(kernels.items()):
        last |= dict.fromkeys((name, *kernel.reads), index)
    last |= dict.fromkeys(outputs, len(kernels))
    buffers: list[Buffer[S]] = []
    owner: dict[str, Buffer[S]] = {}
    for index, (name, kernel) in enumerate(kernels.items()):
        over = (owner[read] for read in kernel.over if read in owner)
        usable = [buffer for buffer in over if buffer.dies <= index]
        if reuse and name not in outputs:  # what the caller gets is its own
            usable += sorted((buffer for buffer in buffers if buffer.dies < index), key=lambda buffer: -buffer.dies)
        found = next((buffer for buffer in usable if buffer.shape == shapes[name]), None)
        if found is None:
            found = Buffer(shapes[name], index, index)
            buffers.append(found)
        found.dies = last[name]
        owner[name] = found
    return buffers


def _events(buffers: list[Buffer[S]]) -> list[tuple[bool, int]]:
    """(born, index of the buffer) in order; a kernel's output comes before its inputs go."""
    births = [(buffer.born, 0, index) for index, buffer in enumerate(buffers)]
    deaths = [(buffer.dies, 1, index) for index, buffer in enumerate(buffers)]
    return [(kind == 0, index) for _, kind, index in sorted(births + deaths)]


# --- the arena -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Region:
    """One allocation of the arena. free: (start, size) of its holes, ascending. high: end of what was ever used."""

    size: int
    free: list[tuple[int, int]]
    high: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a region."""

    region: Region
    start: int
    size: int


@dataclass(slots=True)
class Arena:
    """Best fit within regions; a new region, each twice the one before, where nothing fits."""

    regions: list[Region] = field(default_factory=list)
    next_region: int = FIRST_REGION

    def take(self, size: int) -> Chunk:
        """Allocate bytes."""
        needed = _rounded(size)
        # Of equals the one in the youngest region: its addresses are the lowest.
        fitting = [
            (hole[1], -number, hole) for number, region in enumerate(self.regions) for hole in region.free
            if hole[1] >= needed
        ]  # fmt: skip
        if fitting:
            _, number, hole = min(fitting)
            region = self.regions[-number]
        else:
            region = self._grow(needed)
            hole = region.free[0]
        start, room = hole
        taken = needed if room >= 2 * needed or room - needed >= SPLIT_REST else room
        region.free.remove(hole)
        if taken < room:
            region.free = sorted([*region.free, (start + taken, room - taken)])
        region.high = max(region.high, start + size)
        return Chunk(region, start, taken)

    def give(self, chunk: Chunk) -> None:
        """Free it and join it with the holes beside it."""
        joined: list[tuple[int, int]] = []
        for start, size in sorted([*chunk.region.free, (chunk.start, chunk.size)]):
            if joined and sum(joined[-1]) == start:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            else:
                joined.append((start, size))
        chunk.region.free = joined

    @property
    def touched_bytes(self) -> int:
        """Pages that were ever used: of a region only what was written to counts."""
        return sum(-(-region.high // PAGE) * PAGE + region.size // HANDLE_SHARE for region in self.regions)

    def _grow(self, needed: int) -> Region:
        size = self.next_region
        while size < needed:
            size *= 2
        # One that had to be larger than planned does not move the plan on.
        self.next_region = size * 2 if size == self.next_region else size
        region = Region(size, [(0, size)])
        self.regions.append(region)
        return region


def pattern_bytes(buffers: Iterable[Buffer[Shape]]) -> int:
    """Size of one block that holds all buffers, each placed where the least gap is left."""
    placed: dict[int, tuple[int, int]] = {}
    kept = list(buffers)
    end = 0
    for born, index in _events(kept):
        if not born:
            del placed[index]
            continue
        size = _rounded(_bytes(kept[index]))
        gaps, reached = [], 0
        for start, length in sorted(placed.values()):
            if start - reached >= size:
                gaps.append((start - reached, reached))
            reached = max(reached, start + length)
        start = min(gaps)[1] if gaps else reached
        placed[index] = (start, size)
        end = max(end, start + size)
    return end


def _bytes(buffer: Buffer[Shape]) -> int:
    return FLOAT_BYTES * prod(buffer.shape)


def _rounded(size: int) -> int:
    return -(-size // ROUNDING) * ROUNDING
