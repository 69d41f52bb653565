"""An engine's session: tensors in, tensors out, everything asked of one stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from hidiff_runtime.backends.device_tensors import DeviceTensors
from hidiff_runtime.backends.protocol import DeviceArray, check_tensors
from hidiff_runtime.backends.tensorrt.cuda_graphs import CudaGraphs
from hidiff_runtime.backends.tensorrt.gpu_memory import CudaMemory, address_of
from hidiff_runtime.backends.tensorrt.plan_record import PlanRecord
from hidiff_runtime.backends.tensorrt.plans import Plan, PlanContext, Plans
from hidiff_runtime.errors import EngineError
from hidiff_runtime.format.manifest import GraphRecord


class TensorRtSession:
    """One graph's engine.

    Entering loads the plan, from any thread, and touches neither stream nor tensors; the rest is for the thread that
    runs.

    Args:
        place: where it runs.
        plans: that are open there.
        memory: for tensors of its own.
        path: of the plan's record.
        plan: the record.
        record: of the graph.
        cuda_graph: whether to launch recorded work.
    """

    def __init__(
        self,
        place: PlanContext,
        plans: Plans,
        memory: CudaMemory,
        path: Path,
        plan: PlanRecord,
        record: GraphRecord,
        cuda_graph: bool,
    ) -> None:
        self._place = place
        self._plans = plans
        self._memory = memory
        self._path = path
        self._plan_record = plan
        self._record = record
        self._cuda_graph = cuda_graph
        self._opened: tuple[Plan, CudaGraphs] | None = None
        self._own = DeviceTensors(memory)

    def __enter__(self) -> TensorRtSession:
        """Loads the engine. Raises EngineError if it does not fit this machine, or there is too little memory."""
        plan, place = self._plans.acquire(self._path, self._plan_record), self._place
        self._opened = plan, CudaGraphs(place.library.cuda, place.stream, self._cuda_graph, plan.capturable)
        return self

    def __exit__(self, *_: object) -> None:
        opened, self._opened = self._opened, None
        self._place.library.cuda.set_device(self._place.gpu.index)
        if opened is None:
            return
        plan, graphs = opened
        try:
            graphs.drop()
        finally:
            self._plans.release(plan)
            self._own = DeviceTensors(self._memory)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Evaluates the engine on the host's arrays; raises as `execute` does."""
        check_tensors("inputs", self._record.inputs, inputs)
        self._own.put(self._record.inputs, inputs)
        outputs = self._own.pick(self._record.outputs)
        self.execute(self._own.pick(self._record.inputs), outputs)
        return {name: self._memory.download(array) for name, array in outputs.items()}

    def execute(self, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Asks for one evaluation, recorded as a CUDA graph when it repeats.

        Raises:
            EngineError: a tensor is not of the record, or the library refuses.
        """
        if self._opened is None:
            raise EngineError("The engine is not open.", given=self._path, advice="Run it inside 'with session:'.")
        plan, graphs = self._opened
        check_tensors("inputs", self._record.inputs, inputs)
        check_tensors("outputs", self._record.outputs, outputs)
        self._place.library.cuda.set_device(self._place.gpu.index)
        addresses = {name: address_of(array) for name, array in (*inputs.items(), *outputs.items())}
        order = (spec.name for spec in (*self._record.inputs, *self._record.outputs))
        moves = plan.prepare()
        graphs.run(tuple(addresses[name] for name in order), moves, lambda: plan.enqueue(addresses))
