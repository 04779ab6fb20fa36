"""The steps of a forward pass: layers with what folds and fuses into them, and calls without parameters in between.

    convolution or linear layer → BatchNorm → + residual → activation

becomes one `Layer`. The BatchNorm folds into the weights, y = γ/√(var + ε) (W x + b − mean) + β, so that a draw
perturbs all four of θ = (W, b, γ, β) as they are and folds afterwards; the rest is the epilogue of one kernel.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from smi_kernels.epilogues import epilogues
from smi_kernels.graph.layers import layers, zero_padding
from smi_kernels.graph.tracing import NotTraceable, trace

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.setitem)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution or linear layer with its BatchNorm, residual addition and activation.

    Attributes:
        output, source, residual: names of values; the residual may be None.
        module: name of the layer in the model; its type is `nn.Conv2d` or `nn.Linear` itself.
        norm: name of the BatchNorm, or None.
        epilogue: name in `smi_kernels.epilogues.epilogues`.
        is_end: whether it reads the image or makes features ``[N, F]`` of features: a small share of the work, and
            the place where rounding to bfloat16 hurts most. It moves a pixel by a few hundredths of a typical δ, and a
            logit of size 10 by 0.02, which is more than δ moves those of a stable image.
    """

    output: str
    source: str
    module: str
    norm: str | None = None
    residual: str | None = None
    epilogue: str = "identity"
    is_end: bool = False


@dataclass(frozen=True, kw_only=True)
class Call:
    """Anything else: a module, a function or a tensor method.

    Attributes:
        output: name of the value.
        op: ``call_module``, ``call_function`` or ``call_method``.
        target: module name, function or method name.
        args, kwargs: arguments, with `Value` in place of tensors.
        reads_parameters: whether the module has parameters, or an argument is one.
    """

    output: str
    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads_parameters: bool


@dataclass(frozen=True)
class Value:
    """A value computed earlier, or if ``is_state`` a parameter or buffer of the model, by name."""

    name: str
    is_state: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forward pass.

    Attributes:
        image: name of the input.
        steps: in order, each with the names of the values that are not needed after it.
        output: name of the logits, ``[N, C]`` if the model is a classifier.
        unknown: names of layers whose type is not registered.
        largest: elements of the largest value, for one image.
        by_image: whether every value has a row for each image that depends on that image alone.
    """

    image: str
    steps: tuple[tuple[Layer | Call, tuple[str, ...]], ...]
    output: str
    unknown: tuple[str, ...]
    largest: int
    by_image: bool

    @property
    def reads_parameters(self) -> bool:
        """Whether anything but a `Layer` reads a parameter."""
        return any(isinstance(step, Call) and step.reads_parameters for step, _ in self.steps)

    def feeds_layer(self, name: str) -> bool:
        """Whether a layer that is not an end reads a value, or what calls make of it."""
        return name in self._feeding

    @functools.cached_property
    def _feeding(self) -> set[str]:
        found: set[str] = set()
        for step, _ in reversed(self.steps):
            if step.output in found if isinstance(step, Call) else not step.is_end:
                found |= reads_of(step)
        return found

    def run(
        self,
        images: Tensor,
        layer: Callable[[Layer, Tensor, Tensor | None], Tensor],
        call: Callable[[Call, Mapping[str, Any]], Any],
    ) -> Any:
        """Walk the steps and return the output; values are freed when they are not needed any more.

        Args:
            images: the input.
            layer: runs a layer on its source and residual.
            call: runs a call, given the values by name; see `arguments`.
        """
        values: dict[str, Any] = {self.image: images}
        for step, dead in self.steps:
            if isinstance(step, Layer):
                residual = values[step.residual] if step.residual is not None else None
                values[step.output] = layer(step, values[step.source], residual)
            else:
                values[step.output] = call(step, values)
            for name in dead:
                del values[name]
        return values[self.output]


def arguments(step: Call, values: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Arguments of a call, positional and by name, with what each `Value` stands for."""

    def filled(item: Any) -> Any:
        return (state if item.is_state else values)[item.name] if isinstance(item, Value) else item

    args, kwargs = fx.node.map_aggregate((step.args, step.kwargs), filled)
    return args, kwargs


_plans: WeakKeyDictionary[nn.Module, tuple[Any, Plan | str]] = WeakKeyDictionary()


def plan_of(model: nn.Module, images: Tensor) -> Plan:
    """The plan of a model in eval mode; made once, and again when anything but the values of its tensors changed.

    Raises:
        NotTraceable: if the forward pass cannot be recorded.
    """
    signature = (tuple(images.shape[1:]), images.device, tuple(_signature(model)))
    known = _plans.get(model)
    if known is None or known[0] != signature:
        try:
            made: Plan | str = _Builder(model, trace(model, images)).plan()
        except NotTraceable as error:
            made = str(error)
        known = _plans[model] = (signature, made)
    if isinstance(known[1], str):
        raise NotTraceable(known[1])
    return known[1]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PLAIN = (int, float, str, bool, type(None), tuple, list, dict)


def _signature(model: nn.Module) -> Iterator[Any]:
    """What a forward pass may depend on besides values of tensors: types, shapes and attributes of all modules."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, type(module), id(module)
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for own, tensor in value.items():
                    yield own, None if tensor is None else (id(tensor), tensor.shape, tensor.dtype)
            elif key in _HOOKS:
                yield key, len(value)
            elif not key.startswith("_"):
                yield key, repr(value) if isinstance(value, _PLAIN) else id(value)


class _Builder:
    """Makes a plan of a graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._nodes = [n for n in graph.nodes if n.users or (n.op, n.target) != ("call_method", "size")]
        self._users = {n: [u for u in self._nodes if n in u.all_input_nodes] for n in self._nodes}
        self._layers: dict[fx.Node, Layer] = {}
        self._fused: set[fx.Node] = set()

    def plan(self) -> Plan:
        inputs = [n for n in self._nodes if n.op == "placeholder" and n.users]
        (output,) = (n for n in self._nodes if n.op == "output")
        if len(inputs) != 1 or not isinstance(output.args[0], fx.Node):
            raise NotTraceable("the forward pass is not a function of one tensor that gives one tensor")
        if any(self._changes_a_shared_value(n) for n in self._nodes):
            raise NotTraceable("a value is changed in place while others still read it")
        for node in self._nodes:
            if node not in self._fused and self._is_plain_layer(node):
                self._fuse(node, inputs[0])
        steps = [self._step(n) for n in self._nodes if n.op.startswith("call_") and n not in self._fused]
        result = output.args[0].name
        unknown = tuple(n.target for n in self._nodes if n.op == "call_module" and self._is_unknown(n.target))
        sizes = [v.numel() for n in self._nodes if isinstance(v := n.meta.get("value"), Tensor) and n.op != "get_attr"]
        return Plan(
            image=inputs[0].name,
            steps=tuple(_with_dead(steps, result)),
            output=result,
            unknown=unknown,
            largest=max(sizes) // len(inputs[0].meta["value"]),
            by_image=all(n.meta.get("by_image", True) for n in self._nodes if n.op.startswith("call_")),
        )

    def _changes_a_shared_value(self, node: Any) -> bool:
        """Whether a node works in place on what another node reads too; a layer that is run later would see it."""
        if node.op == "call_module":
            changes = getattr(self._modules[node.target], "inplace", False)
        elif node.op == "call_method":
            changes = node.target.endswith("_") and not node.target.endswith("__")
        else:
            changes = node.target in _IN_PLACE
        if not (changes or node.kwargs.get("inplace")) or not node.all_input_nodes:
            return False
        return len(self._users[node.all_input_nodes[0]]) > 1 or not node.users

    def _module(self, node: fx.Node, *types: type[nn.Module]) -> nn.Module | None:
        """The module that a node calls with one tensor, if its type is one of those."""
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self._modules[node.target]
        return module if type(module) in types else None

    def _is_plain_layer(self, node: fx.Node) -> bool:
        module = self._module(node, nn.Conv2d, nn.Linear)
        if isinstance(module, nn.Conv2d):
            return zero_padding(module) is not None and node.meta["value"].ndim == 4
        return module is not None and node.meta["value"].ndim == 2

    def _fuse(self, node: Any, image: fx.Node) -> None:
        """Follow the only users of a layer's output, as far as they fuse; the layer runs where the last one stood."""
        module, (source,) = self._modules[node.target], node.args
        epilogue, end = "identity", node
        norm: Any = None  # torch.fx types a node's target and arguments as a union of twenty types
        user: Any
        residual: str | None = None
        while (user := self._only_user(end)) is not None:
            if norm is None and residual is None and self._foldable(user, module):
                norm = user.target
            elif residual is None and (other := self._added(user, end)) is not None:
                residual = other.name
            elif (name := self._activation(user)) is not None:
                epilogue = name
            else:
                break
            self._fused.add(end)
            end = user
            if epilogue != "identity":
                break
        is_end = isinstance(module, nn.Linear) or module.in_channels == image.meta["value"].shape[1]
        self._layers[end] = Layer(
            output=end.name, source=source.name, module=node.target, norm=norm, residual=residual, epilogue=epilogue,
            is_end=is_end,
        )  # fmt: skip

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = self._users[node]
        return users[0] if len(users) == 1 and users[0] not in self._fused | self._layers.keys() else None

    def _foldable(self, node: fx.Node, layer: nn.Module) -> bool:
        kind = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm1d
        norm = self._module(node, kind)
        return norm is not None and norm.running_mean is not None

    def _added(self, node: fx.Node, end: fx.Node) -> fx.Node | None:
        """What a node adds to the value ``end``, if it is another value of the same shape."""
        if node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
            return None
        others = [a for a in node.args if a is not end]
        if len(others) != 1 or not isinstance(others[0], fx.Node) or others[0].op == "get_attr":
            return None
        same = others[0].meta["value"].shape == end.meta["value"].shape == node.meta["value"].shape
        return others[0] if same else None

    def _activation(self, node: Any) -> str | None:
        if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
            return None
        meaning = type(self._modules[node.target]) if node.op == "call_module" else node.target
        return next((name for name in epilogues if meaning in epilogues[name].matches), None)

    def _is_unknown(self, name: str) -> bool:
        module = self._modules[name]
        return type(module) not in layers and any(True for _ in module.parameters())

    def _step(self, node: fx.Node) -> Layer | Call:
        if node in self._layers:
            return self._layers[node]
        reads = any(n.op == "get_attr" and n.target in self._parameters for n in node.all_input_nodes)
        if node.op == "call_module":
            reads = reads or any(True for _ in self._modules[node.target].parameters())
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), _value)
        target = node.target
        if (node.op, target) == ("call_method", "view") and not kwargs and not isinstance(args[1], torch.dtype):
            target = "reshape"  # values are channels_last, which the model's own were not: a view may not exist
        return Call(output=node.name, op=node.op, target=target, args=args, kwargs=dict(kwargs), reads_parameters=reads)


def _value(node: Any) -> Any:
    return Value(node.target, is_state=True) if node.op == "get_attr" else Value(node.name)


def reads_of(step: Layer | Call) -> set[str]:
    """Names of the values that a step reads."""
    if isinstance(step, Layer):
        return {step.source} | ({step.residual} if step.residual is not None else set())
    found: set[str] = set()

    def look(item: Any) -> None:
        if isinstance(item, Value) and not item.is_state:
            found.add(item.name)

    fx.node.map_aggregate((step.args, step.kwargs), look)
    return found


def _with_dead(steps: list[Layer | Call], result: str) -> Iterator[tuple[Layer | Call, tuple[str, ...]]]:
    """Each step with the values that no later step reads."""
    last = {name: i for i, step in enumerate(steps) for name in (step.output, *reads_of(step))}
    for i, step in enumerate(steps):
        names = {step.output, *reads_of(step)} - {result}
        yield step, tuple(sorted(name for name in names if last[name] == i))
