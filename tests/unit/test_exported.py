"""What the report says of exports."""

from __future__ import annotations

from services.tolaria.exported import exports_table


def test_each_format_is_told_with_its_check_or_its_problem() -> None:
    files = [
        {"name": "model.onnx", "bytes": 1200, "sha256": ""},
        {"name": "model.onnx.data", "bytes": 800, "sha256": ""},
    ]
    done = {"files": files, "largest_difference": 1.2e-7, "problem": None}
    failed: dict[str, object] = {"files": [], "largest_difference": None, "problem": "a <b> & c"}
    html = exports_table({"export": {"folder": "x", "formats": {"onnx": done, "torch_export": failed}}})
    assert "model.onnx, model.onnx.data</td><td class=n>2,000</td>" in html
    assert "outputs within 1e-07 of the network" in html
    assert "not exported: a &lt;b&gt; &amp; c" in html


def test_a_run_without_an_export_says_so() -> None:
    assert "nothing was exported" in exports_table({})
    assert "nothing was exported" in exports_table({"export": None})
