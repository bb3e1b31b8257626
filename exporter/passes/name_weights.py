"""Give every weight the name it has in the checkpoint, and take its values away: what is written is the store's."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


class NameWeightsPass(ir.passes.InPlacePass):
    """Rename initializers by `names` (traced name -> our name), whatever module path the trace saw them under.

    They have no values from here on: rewrites that go by values (a bias of zeros is left out of its Gemm) would decide
    by those of the base, where an adapter brings others, or by reserved memory that nobody has filled.
    Requires: every traced name that is an initializer maps to a name no other value has.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names

    def requires(self, model: ir.Model) -> None:
        present = [self.names[name] for name in model.graph.initializers if name in self.names]
        if len(set(present)) != len(present):
            raise ir.passes.PreconditionError("two weights of the trace have one name")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        renamed = [(value, self.names[name]) for name, value in model.graph.initializers.items() if name in self.names]
        for value, name in renamed:
            value.name = name
            value.const_value = None
        return ir.passes.PassResult(model, modified=bool(renamed))
