# SPDX-License-Identifier: Apache-2.0
"""Shared experts run on the layer's GPU while other devices compute their parts of the routed ones.

A block calls both, one after the other, and adds what they give. Its forward stays its own; what is
covered is the `forward` of the block and of its shared experts, on the instances:

    shared after routed   the experts' call runs the shared ones too, on what the block was called
    (DeepSeek)            with; the block's own call gets that result if its argument is the same
                          memory in the same shape, and computes otherwise
    shared before routed  the block's call gets a tensor without values; the experts' call runs the
    (Qwen2)               shared ones and fills it

The second is right only if the block does not look at the values before it calls its experts, which
read_block() asks the block's source. Whatever it does not understand runs as ever, and all of it
with EXPERTYARD_SHARED_OVERLAP=0.
"""

import ast
import inspect
import os
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import virtual
from ..errors import KernelError
from .module import ExpertyardExperts

__all__ = ["SharedExperts", "SharedForm", "read_block", "run_beside"]

NAMES = ("shared_experts", "shared_expert", "shared_mlp")  # what families call them
SWITCH = "EXPERTYARD_SHARED_OVERLAP"
_MAYBE = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.comprehension)  # what is in it may not run


@dataclass(frozen=True)
class SharedForm:
    """How a block's forward calls its shared experts.

    name   of the module in the block
    first  before the routed ones, not after
    rows   their argument is the block's as [num_tokens, hidden_size], not as it is
    """

    name: str
    first: bool
    rows: bool


def run_beside(model: nn.Module, name: str, home: str) -> bool:
    """Has the shared experts beside the experts module `name` run meanwhile, where that can be.

    home  the layer's device in the plan
    """
    parent, _, leaf = name.rpartition(".")
    block, experts = model.get_submodule(parent), model.get_submodule(name)
    if not home.startswith("cuda") or not isinstance(experts, ExpertyardExperts):
        return False
    if os.environ.get(SWITCH, "1") == "0":
        return False
    form = read_block(block, leaf)
    if form is None or "forward" in block.__dict__:
        return False
    shared = block.get_submodule(form.name)
    places = {_place(tensor) for tensor in (*shared.parameters(), *shared.buffers())}
    if "forward" in shared.__dict__ or places - {home}:
        return False
    made = SharedExperts(block, shared, experts, form)
    experts.meanwhile = made.meanwhile
    block.__dict__["forward"] = made.of_block
    shared.__dict__["forward"] = made.of_shared
    return True


def _place(tensor: Tensor) -> str:
    return virtual.marked(tensor) or str(tensor.device)


class _Call:
    """One call of the block, in one thread."""

    __slots__ = ("argument", "given", "out", "version")

    def __init__(self, given: Tensor) -> None:
        self.given = given  # to the block
        self.argument: Tensor | None = None  # of the shared experts
        self.version = 0  # of the argument: how often it was written to
        self.out: Tensor | None = None  # what they give, or will give


class SharedExperts:
    """The shared experts of one block, and where its calls are."""

    def __init__(
        self, block: nn.Module, shared: nn.Module, experts: ExpertyardExperts, form: SharedForm
    ) -> None:
        self.block, self.shared, self.experts, self.form = block, shared, experts, form
        self._read = type(block).forward  # what `form` was read from
        self._calls: dict[int, _Call] = {}  # thread -> its call
        self._dtypes: dict[torch.dtype, torch.dtype] = {}  # of the argument -> of the result
        self.off = False  # the block passes something else than was read

    def of_block(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward."""
        forward = type(self.block).forward
        if torch.compiler.is_compiling() or not self._can(args):
            return forward(self.block, *args, **kwargs)
        thread = threading.get_ident()
        self._calls[thread] = _Call(args[0])
        try:
            return forward(self.block, *args, **kwargs)
        finally:
            del self._calls[thread]

    def _can(self, args: tuple[Any, ...]) -> bool:
        """Whether this call may overlap: there is something to wait for, and nothing that looks at
        what modules do (a gradient, mixed precision, a forward that somebody has replaced)."""
        experts = self.experts.experts
        return (
            experts is not None
            and experts.overlaps
            and not self.off
            and len(args) > 0
            and isinstance(args[0], Tensor)
            and not torch.is_grad_enabled()
            and not self.block.training
            and not torch.is_autocast_enabled(args[0].device.type)
            and type(self.block).forward is self._read
            and self.shared.__dict__.get("forward") == self.of_shared
            and threading.get_ident() not in self._calls
        )

    def of_shared(self, *args: Any, **kwargs: Any) -> Any:
        """The shared experts' forward."""
        if torch.compiler.is_compiling():
            return self._compute(*args, **kwargs)
        call = self._calls.get(threading.get_ident())
        if call is None or len(args) != 1 or kwargs:
            return self._compute(*args, **kwargs)
        return self._later(call, args[0]) if self.form.first else self._taken(call, args[0])

    def _compute(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.shared).forward(self.shared, *args, **kwargs)

    def _later(self, call: _Call, argument: Tensor) -> Any:
        dtype = self._dtypes.get(argument.dtype)
        if dtype is None:  # the first call shows what comes out
            out = self._compute(argument)
            if isinstance(out, Tensor) and out.shape == argument.shape and out.is_contiguous():
                self._dtypes[argument.dtype] = out.dtype
            else:
                self.off = True
            return out
        out = argument.new_empty(argument.shape, dtype=dtype)
        call.argument, call.version, call.out = argument, _version(argument), out
        return out

    def _taken(self, call: _Call, argument: Tensor) -> Any:
        before, out = call.argument, call.out
        call.argument = call.out = None
        if out is None or before is None:
            return self._compute(argument)
        if _is_same(before, argument) and _version(before) == call.version:
            return out
        self.off = True  # else every call would compute twice
        return self._compute(argument)

    def meanwhile(self) -> Callable[[], None] | None:
        """For the experts' call that comes now: what is to be done in it, if anything."""
        call = self._calls.get(threading.get_ident())
        if call is None or (self.form.first and call.out is None):
            return None
        return lambda: self._fill(call) if self.form.first else self._ahead(call)

    def _fill(self, call: _Call) -> None:
        argument, out = call.argument, call.out
        call.argument = call.out = None
        if argument is None or out is None:
            return  # the block calls its experts twice
        if _version(argument) != call.version:
            raise KernelError(
                f"{type(self.block).__name__}: expected the argument of its shared experts to stay "
                "what it is until its experts run, but it was written to. Set "
                f"{SWITCH}=0, and please report this block."
            )
        values = self._compute(argument)
        if values.shape != out.shape or values.dtype != out.dtype:
            raise KernelError(
                f"{type(self.shared).__name__}: expected {out.dtype} {list(out.shape)}, as in "
                f"its first call, got {values.dtype} {list(values.shape)}."
            )
        out.copy_(values)

    def _ahead(self, call: _Call) -> None:
        if call.out is None:
            given = call.given
            # kept until the block's own call, so that no other tensor gets this memory
            call.argument = given.reshape(-1, given.shape[-1]) if self.form.rows else given
            call.version = _version(call.argument)
            call.out = self._compute(call.argument)


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are alive are the same memory in the same shape."""
    return (a.data_ptr(), a.shape, a.stride(), a.dtype, a.device) == (
        b.data_ptr(), b.shape, b.stride(), b.dtype, b.device,
    )  # fmt: skip


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count


def read_block(block: nn.Module, experts: str) -> SharedForm | None:
    """The form of a block's call of its shared experts, by the source of its class; None: there are
    none, or it is not one of those that this file knows.

    experts  name of the experts module in the block
    """
    try:
        source = textwrap.dedent(inspect.getsource(type(block).forward))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):  # no file, no Python
        return None
    names = [name for name in NAMES if isinstance(block._modules.get(name), nn.Module)]
    if not isinstance(function, ast.FunctionDef) or len(function.args.args) < 2 or len(names) != 1:
        return None
    (name,) = names
    own, given = (argument.arg for argument in function.args.args[:2])
    body = list(_taken_for_granted(function.body, f"{own}.{name} is not None"))
    routed, shared = list(_calls(body, own, experts)), list(_calls(body, own, name))
    if len(routed) != 1 or not shared:
        return None
    (routed_at, other), (shared_at, call) = routed[0], shared[0]
    first = shared_at < routed_at
    if first and len(shared) > 1:
        return None
    between = body[min(shared_at, routed_at) : max(shared_at, routed_at) + 1]
    if any(_writes(node) for statement in between for node in ast.walk(statement)):
        return None
    if first and not _waits(between, call):
        return None
    if shared_at == routed_at and not _comes_after(call, other):
        return None
    if len(call.args) != 1 or call.keywords:
        return None
    return SharedForm(name, first, _is_rows(call.args[0], body[:shared_at], given))


def _taken_for_granted(body: list[ast.stmt], condition: str) -> Iterator[ast.stmt]:
    """The statements; of `if condition:` those in it, in its place."""
    for statement in body:
        if isinstance(statement, ast.If) and ast.unparse(statement.test) == condition:
            yield from statement.body
        else:
            yield statement


def _calls(body: list[ast.stmt], own: str, name: str) -> Iterator[tuple[int, ast.Call]]:
    """(number of the statement, call) of self.name(...)."""
    for number, statement in enumerate(body):
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                if node.func.attr == name and isinstance(owner, ast.Name) and owner.id == own:
                    yield number, node


def _writes(node: ast.AST) -> bool:
    """Whether it may change a tensor in place: `x += y`, `x[0] = y`, x.add_(y)."""
    if isinstance(node, ast.AugAssign):
        return True
    if isinstance(node, ast.Assign):
        return not all(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr.endswith("_")


def _waits(between: list[ast.stmt], call: ast.Call) -> bool:
    """Whether the block keeps the shared experts' result in a variable, unread, until its experts
    have run, which they do in any case: statements from the one call to the other."""
    begin, *others = between
    if not isinstance(begin, ast.Assign) or not isinstance(others[-1], ast.Assign | ast.Return):
        return False
    if len(begin.targets) != 1 or not isinstance(begin.targets[0], ast.Name):
        return False
    value = begin.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value is not call:
        if value.func.attr not in ("view", "reshape"):
            return False
        value = value.func.value
    if any(isinstance(node, _MAYBE) for node in ast.walk(others[-1])):
        return False
    variable = begin.targets[0].id
    read = (n.id for s in others for n in ast.walk(s) if isinstance(n, ast.Name))
    return value is call and variable not in read


def _comes_after(call: ast.Call, other: ast.Call) -> bool:
    return (call.lineno, call.col_offset) > (other.lineno, other.col_offset)


def _is_rows(argument: ast.expr, before: list[ast.stmt], given: str) -> bool:
    """Whether the argument is the block's, brought into rows. A wrong answer is found when it runs
    (_is_same)."""
    rows: dict[str, bool] = {given: False}
    for statement in before:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            rows[statement.targets[0].id] = _gives_rows(statement.value, rows)
    return _gives_rows(argument, rows)


def _gives_rows(value: ast.expr, rows: dict[str, bool]) -> bool:
    if isinstance(value, ast.Name):
        return rows.get(value.id, False)
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return False
    if value.func.attr not in ("view", "reshape") or not isinstance(value.func.value, ast.Name):
        return False
    known = value.func.value.id in rows
    return known and len(value.args) == 2 and ast.unparse(value.args[0]) == "-1"
