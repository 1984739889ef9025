"""``python -m services.tolaria.export_process --folder DIR --formats LIST``: exports that need torch's compiler stack.

A process of its own: the exporters take seconds and hundreds of megabytes to import, change global state, and can hang
or crash on a user's network; the process that trained stays clean and can end this one. It knows nothing but the export
folder: the network is rebuilt from the files there, as its user would.

``torch_export``  ``model.pt2``   :func:`torch.export.export`, https://docs.pytorch.org/docs/stable/export.html
``onnx``          ``model.onnx``  :func:`torch.onnx.export`, https://docs.pytorch.org/docs/stable/onnx.html

Both take normalized inputs of float32 with any batch size and hold the network in evaluation mode. Each is loaded again
and compared with the network before it gets its name. Results go to standard output, one JSON object a line and format;
what the exporters print goes to standard error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from services.chassis import process
from services.tolaria import hosts, rebuild
from services.tolaria.errors import ExportError, FactoryError
from services.tolaria.export import GROWTH_FILE, check_outputs
from services.tolaria.factories import load_factory

_LOG: Final = logging.getLogger(__name__)
#: Batch sizes of the check; the programs are traced with two samples.
_CHECKED_BATCHES: Final = (1, 2, 5)
#: Files under way; they get their place once they are checked.
PARTIAL: Final = ".partial"
#: First lines of an exporter's complaint; the log has all of it.
_WORDS: Final = 300


class Exporter:
    """Writes one network, in evaluation mode and on the CPU, in several formats.

    ``growth`` is the content of ``growth.json``: it says what the inputs look like and how they are called.
    """

    def __init__(self, model: nn.Module, growth: Mapping[str, Any]) -> None:
        self._model = model.cpu().eval()
        self._input: str = growth["input"]["name"]
        self._output: str = growth["output"]["name"]
        self._shape: Sequence[int] = growth["host"]["input_shape"]
        # No data of the user: torch keeps the batch that a program was traced with in its file.
        self._generator = torch.Generator().manual_seed(0)

    @property
    def _dynamic_shapes(self) -> tuple[dict[int, Any]]:
        return ({0: torch.export.Dim("batch")},)

    @cached_property
    def program(self) -> torch.export.ExportedProgram:
        """The network as one graph of ATen operators, any batch size."""
        program = torch.export.export(self._model, (self._inputs(2),), dynamic_shapes=self._dynamic_shapes)
        # Both files would name this machine's folders, line by line of the network's source.
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)
        return program

    def torch_export(self, folder: Path) -> dict[str, Any]:
        """Write ``model.pt2`` into ``folder`` and check it; returns what is worth knowing of it.

        Raises what torch.export raises for a network it cannot trace; ExportError when the check fails.
        """
        path = folder / "model.pt2"
        torch.export.save(self.program, path)
        # Loading such a file runs code that is in it: this one was written a moment ago, by this process.
        loaded = torch.export.load(path).module()
        return {"largest_difference": self._check(loaded)}

    def onnx(self, folder: Path) -> dict[str, Any]:
        """Write ``model.onnx`` into ``folder`` and check it by onnxruntime; returns what is worth knowing of it.

        Raises what torch.onnx raises for an operator it cannot express; ExportError when the check fails.
        """
        import onnxruntime

        program = torch.onnx.export(
            self.program,
            dynamo=True,
            input_names=[self._input],
            output_names=[self._output],
            dynamic_shapes=self._dynamic_shapes,
            verbose=False,
        )
        assert program is not None, "without a path the exporter returns what it made"
        path = folder / "model.onnx"
        program.save(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(batch: Tensor) -> Tensor:
            return torch.from_numpy(session.run([self._output], {self._input: batch.numpy()})[0])

        return {"largest_difference": self._check(run), "opset": program.model.opset_imports[""]}

    def _check(self, found: Callable[[Tensor], Tensor]) -> float:
        return check_outputs(found, self._model, [self._inputs(size) for size in _CHECKED_BATCHES])

    def _inputs(self, count: int) -> Tensor:
        """Noise like normalized inputs, float32 [count, *input shape]."""
        return torch.randn(count, *self._shape, generator=self._generator)


#: What this process writes, by the name in the configuration.
FORMATS: Final[Mapping[str, Callable[[Exporter, Path], dict[str, Any]]]] = {
    "torch_export": Exporter.torch_export,
    "onnx": Exporter.onnx,
}


def rebuilt(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of an export and its ``growth.json``.

    Raises FactoryError for a user's factory, OSError, ValueError or RuntimeError for files that do not fit.
    """
    growth = json.loads((folder / GROWTH_FILE).read_text(encoding="utf-8"))
    host = growth["host"]
    if host["factory"] is None:
        model = hosts.build(host["name"], host["input_shape"], host["classes"], host["widths"])
    else:
        model = load_factory(host["factory"], "model.factory")(tuple(host["input_shape"]), host["classes"])
    return rebuild.load(model, folder), growth


def write(folder: Path, formats: Sequence[str], tell: Callable[[Mapping[str, Any]], None]) -> None:
    """Write the export in ``folder`` in all ``formats``; ``tell`` hears of each: files and figures, or a problem."""
    exporter: Exporter | None = None
    partial = folder / PARTIAL
    for name in formats:
        began = time.perf_counter()
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            if exporter is None:
                exporter = Exporter(*rebuilt(folder))
            told = FORMATS[name](exporter, partial)
            files = sorted(path.name for path in partial.iterdir())
            for file in files:
                (partial / file).replace(folder / file)
        except Exception as error:  # noqa: BLE001 - exporters raise anything, and a user's network runs under them
            _LOG.exception("%s failed", name)
            tell({"format": name, "problem": _problem(error)})
        else:
            tell({"format": name, "files": files, "seconds": time.perf_counter() - began, **told})
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _problem(error: Exception) -> str:
    if isinstance(error, (ExportError, FactoryError)):
        return error.message
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:_WORDS]}{'...' if len(words) > _WORDS else ''}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write exports. Returns the exit code: 0, also when a format could not be written and that was told."""
    parser = argparse.ArgumentParser(prog="python -m services.tolaria.export_process")
    parser.add_argument("--folder", type=Path, required=True, help="an export, with growth.json")
    parser.add_argument("--formats", required=True, help="torch_export, onnx, or both with a comma between")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args(argv)
    process.bind_to_parent(grace=1.0)
    # Exporters print; nobody but this function writes where the results go.
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(arguments.threads)
    with results:
        write(
            arguments.folder,
            arguments.formats.split(","),
            lambda told: print(json.dumps(told), file=results, flush=True),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
