"""trace --html: the lanes of the drawing, what the page says, and the page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest
import torch
from small_nets import NETS, ResNet20
from torch import nn

from edgeprune.core.records import Graph
from edgeprune.draw import group_colours, lanes, render_drawing, write_drawing
from edgeprune.trace import trace_graph

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def resnet() -> Graph:
    return trace_graph(ResNet20(), (torch.randn(1, 3, 32, 32),))


def check_lanes(graph: Graph) -> None:
    drawn = lanes(graph)
    wanted = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    for node, row, following in zip(graph.nodes, drawn, [*drawn[1:], None], strict=True):
        assert set(node.inputs) <= set(row.above), f"'{node.name}' reads what is in no lane"
        assert (node.name in row.below) == (node.name in wanted)
        if node.name in row.below:
            assert row.below[row.lane] == node.name
        held = [name for name in row.below if name is not None]
        assert len(held) == len(set(held))
        assert following is None or following.above == row.below, "a lane changes between two rows"
    assert set(filter(None, drawn[-1].below)) == set(graph.outputs)


@pytest.mark.parametrize("name", ["transposed", "skip_and_cut", "lstm", "one_head", "outlook", "shared"])
def test_every_tensor_has_a_lane_until_its_last_reader(name: str) -> None:
    check_lanes(trace_graph(NETS[name](), (torch.randn(1, 3, 8, 8),)))


def test_a_residual_stream_stays_beside_its_branch(resnet: Graph) -> None:
    check_lanes(resnet)
    drawn = dict(zip((node.name for node in resnet.nodes), lanes(resnet), strict=True))
    assert max(lane for row in drawn.values() for lane in row.used) == 1
    sums = [node for node in resnet.nodes if node.op == "add"]
    assert len(sums) == 9 and all(drawn[node.name].lane == 0 for node in sums)


def test_the_page_names_groups_sizes_and_reasons(resnet: Graph) -> None:
    page = unescape(render_drawing(resnet, "a <b>net</b>"))
    assert "a <b>net</b>" in page and "a <b>net</b>" not in render_drawing(resnet, "a <b>net</b>")
    assert "12 groups can be pruned; 100.0% of the multiply-adds are in them" in page
    assert re.search(r"270 k parameters, 40\.\d M multiply-adds", page)
    for group in resnet.groups:
        assert f"{group.name}: {group.units} units" in page
        assert group.frozen_because is None or f"frozen: it {group.frozen_because}" in page
    assert not re.search(r"https?://", page), "it needs no network"


def test_colours_tell_prunable_groups_apart(resnet: Graph) -> None:
    colours = group_colours(resnet)
    prunable = [colours[group.name] for group in resnet.prunable]
    assert len(set(prunable)) == len(prunable)
    assert {colours[group.name] for group in resnet.groups if group.frozen_because} == {"var(--frozen)"}


def test_a_model_that_cannot_be_pruned_is_drawn_too() -> None:
    graph = trace_graph(nn.Linear(4, 3), (torch.randn(1, 4),))
    assert "Nothing can be pruned" in render_drawing(graph, "linear")


@pytest.mark.parametrize("folded", [False, True])
def test_a_browser_shows_it_and_folds_modules(resnet: Graph, tmp_path: Path, folded: bool) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium: apt-get install chromium")
    path = tmp_path / "graph.html"
    write_drawing(path, resnet, "ResNet-20")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
         "--enable-logging=stderr", "--dump-dom", path.as_uri() + ("#folded" if folded else "")],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"CONSOLE.*", done.stderr), done.stderr
    rows = re.findall(r"<tr [^>]*data-within[^>]*>", done.stdout)
    assert f'data-ready="{len(rows)}"' in done.stdout and len(rows) > len(resnet.nodes)
    shown = [row for row in rows if "hidden" not in row]
    assert len(shown) == len(rows) if not folded else 5 < len(shown) < 20
    assert done.stdout.count("<circle") == len(resnet.nodes)
