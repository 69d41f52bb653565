"""What passes declined: logged, counted, kept in a bundle and read again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.helper import make_node

from hidiff_export.errors import BundleError, ExportError
from hidiff_export.graph.declined import collecting, lines, read_declined, write_declined
from hidiff_export.graph.passes.base import Declined, Operator, Outcome, RewritePass
from hidiff_export.graph.portable import run_passes
from hidiff_runtime.format.bundle_folder import BundleFolder
from tests.export.graph.small import graph

COUNTS = {"a.onnx": {"Refusing": {"it is called keep": 2, "it is not": 1}}, "b.onnx": {"Refusing": {"it is not": 3}}}


class Refusing(RewritePass):
    """Declines every node, for one of two reasons."""

    operators: ClassVar[frozenset[Operator]] = frozenset({("", "Neg")})

    def rewrite(self, node: ir.Node) -> Outcome:
        return Declined("it is called keep" if str(node.name).startswith("keep") else "it is not")


def negated(*names: str) -> ir.Model:
    values = ["x", *(f"v{index}" for index in range(len(names) - 1)), "y"]
    nodes = [make_node("Neg", [values[index]], [values[index + 1]], name=name) for index, name in enumerate(names)]
    return graph(nodes, {"x": [3]})


def test_what_is_declined_is_logged_and_counted_by_graph_pass_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hidiff_export"), collecting() as counts:
        run_passes(negated("keep", "other", "keep.2"), ir.passes.Sequential(Refusing()), "a.onnx")
        run_passes(negated("one"), ir.passes.Sequential(Refusing()), "b.onnx")
        run_passes(negated("two", "three"), ir.passes.Sequential(Refusing()), "b.onnx")
    run_passes(negated("one"), ir.passes.Sequential(Refusing()), "uncounted.onnx")
    assert counts == COUNTS
    assert caplog.messages[:3] == [
        "a.onnx: Refusing left 2 nodes as they were: it is called keep",
        "a.onnx: Refusing left 1 node as it was: it is not",
        "b.onnx: Refusing left 1 node as it was: it is not",
    ]


def test_counts_come_back_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    whole = tmp_path / "unet/graphs.declined.json"
    assert write_declined(COUNTS, whole) == (whole,)
    assert write_declined({"c.onnx": {"Refusing": {"it is not": 1}}}, tmp_path / "unet/engines.declined.json")
    assert write_declined({}, tmp_path / "unet/none.declined.json") == ()
    names = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(names) == 2
    found = read_declined(BundleFolder(tmp_path), ["unet/config.json", *names])
    assert found == {**COUNTS, "c.onnx": {"Refusing": {"it is not": 1}}}
    assert list(lines(found))[-2:] == [
        "b.onnx: Refusing left 3 nodes as they were: it is not",
        "c.onnx: Refusing left 1 node as it was: it is not",
    ]


@pytest.mark.parametrize("content", [{"a.onnx": 1}, {"a.onnx": {"Pass": 1}}, {"a.onnx": {"Pass": {"reason": "two"}}}])
def test_a_file_that_holds_something_else_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / "graphs.declined.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleError, match=r"graphs\.declined\.json"):
        read_declined(BundleFolder(tmp_path), ["graphs.declined.json"])


@pytest.mark.parametrize("inner", ["Neg", "Exp"])
def test_an_operator_in_a_branch_is_refused_where_the_pass_would_rewrite_it(inner: str) -> None:
    out = helper.make_tensor_value_info("b", TensorProto.FLOAT, [3])
    branch = helper.make_graph([make_node(inner, ["x"], ["b"], name="inside")], "branch", [], [out])
    chosen = make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="chosen")
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])]
    given += [helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    wanted = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])]
    model = ir.from_proto(helper.make_model(helper.make_graph([chosen], "main", given, wanted)))
    if inner == "Exp":
        run_passes(model, ir.passes.Sequential(Refusing()))
        return
    with pytest.raises(ExportError) as refused:
        run_passes(model, ir.passes.Sequential(Refusing()))
    assert "Refusing rewrites the main graph alone, and Neg inside is in a subgraph" in refused.value.given
