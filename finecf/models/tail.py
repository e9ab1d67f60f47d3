"""The rest of a model behind one of its layers, run without the layers before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}


class _AncestorTracer(fx.Tracer):
    """Traces the forwards that contain the layer, and those alone: every other module stays one call.

    So control flow on shapes or values (padding that depends on the input, say) hinders only where it stands in a
    forward that contains the layer.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self._layer = layer

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._layer.startswith(module_qualified_name + ".")


class Tail:
    """From a layer's output to the model's output.

    The forward is traced (torch.fx) from the layer on, so that the trunk does not run. Where it cannot be traced the
    model runs whole on a zero image and a hook puts the given tensor in place of the layer's output: the same result
    at the price of the trunk.

    Attributes:
        layer: name of the layer.
        traced: whether the trunk is skipped.
        reason: why not, where it is not.
        needs_image: whether the tail reads the input image's shape.
        relu_follows: whether the layer's output goes through a functional ReLU and nowhere else (DenseNet).
        calls: the leaf modules of the tail by name, in the order of their calls; empty where it was not traced.
    """

    def __init__(self, model: nn.Module, layer: str) -> None:
        self.layer = layer
        self.traced = False
        self.reason = ""
        self.needs_image = True
        self.relu_follows = False
        self.calls: list[str] = []
        self._model = model
        self._run: Callable[[Tensor, Tensor | None], object] = self._run_with_hook
        try:
            graph = _AncestorTracer(layer).trace(model)
        except Exception as error:  # a user's forward may refuse to be traced in any way; the reason is kept
            self.reason = f"the forward cannot be traced ({type(error).__name__}: {str(error).splitlines()[0]})"
            return
        self._cut(graph)

    def _cut(self, graph: fx.Graph) -> None:
        sites = [node for node in graph.nodes if node.op == "call_module" and node.target == self.layer]
        if len(sites) != 1:
            raise ValueError(_call_count_message(self.layer, len(sites)))
        site = sites[0]
        needed = _ancestors(next(node for node in graph.nodes if node.op == "output"), stop=site)
        if site not in needed:
            raise ValueError(f"the model's output does not depend on layer {self.layer!r}: name another layer")
        tail = fx.Graph()
        copies = {site: tail.placeholder("features")}
        image = tail.placeholder("image")
        seen_input = False
        for node in graph.nodes:
            if node not in needed or node is site:
                continue
            if node.op == "placeholder":
                if not seen_input:
                    copies[node], seen_input = image, True
                elif node.args:
                    copies[node] = node.args[0]
                else:
                    self.reason = f"the forward needs a second input, {node.target!r}"
                    return
            elif node.op == "output":
                tail.output(fx.map_arg(node.args[0], lambda n: copies[n]))
            else:
                copies[node] = tail.node_copy(node, lambda n: copies[n])
        module = fx.GraphModule(self._model, tail)
        users = list(copies[site].users)
        self.relu_follows = len(users) == 1 and (
            (users[0].op == "call_function" and users[0].target in _RELU_FUNCTIONS)
            or (users[0].op == "call_method" and users[0].target in _RELU_METHODS)
        )
        self.calls = [str(node.target) for node in tail.nodes if node.op == "call_module"]
        self.needs_image = seen_input
        self.traced = True
        # Layers may work in place, and the caller's tensor is not theirs.
        self._run = lambda features, image: module(features.clone(), image)

    def __call__(self, features: Tensor, image: Tensor | None) -> object:
        """The model's output for the layer's output `features`; `image`: zeros of the input's shape, where needed."""
        return self._run(features, image)

    def _run_with_hook(self, features: Tensor, image: Tensor | None) -> object:
        calls = 0

        def replace(_module: nn.Module, _inputs: object, _output: object) -> Tensor:
            nonlocal calls
            calls += 1
            return features.clone()

        handle = self._model.get_submodule(self.layer).register_forward_hook(replace)
        try:
            output = self._model(image)
        finally:
            handle.remove()
        if calls != 1:
            raise ValueError(_call_count_message(self.layer, calls))
        return output


def _call_count_message(layer: str, calls: int) -> str:
    if calls == 0:
        return f"layer {layer!r} is never called in the model's forward: name a layer that is"
    return f"layer {layer!r} is called {calls} times in one forward, so its output is not one map: name another layer"


def _ancestors(node: fx.Node, stop: fx.Node) -> set[fx.Node]:
    """`node` and what it is computed from, without going past `stop`."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        found.add(current)
        if current is not stop:
            stack.extend(current.all_input_nodes)
    return found
