"""A tensor that says it lies on cuda:0, and the rules by which operations treat it.

Inside is a CPU tensor, so that values are real, or a meta tensor, so that a Stable Diffusion of true shapes takes no
memory. Autograd and autocast take CUDA's paths. An operation that mixes devices raises as on a card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils.flop_counter import flop_registry

from tests.card.descriptions import aliases, described
from tests.card.watch import WATCH

CARD = torch.device("cuda", 0)
aten: Any = torch.ops.aten

# The host waits for the value, or for the shape of the result.
WAITED_FOR = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._linalg_check_errors.default,
    aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
# More than a shape depends on the arguments: something is counted, or integers are computed, which have values.
COUNTED = WAITED_FOR | INDEXED | {aten._to_copy.default}
# CUDA's kernels take no CPU tensor of 0 dimensions here, as they do for arithmetic.
STRICT = {"addmm", "bmm", "cat", "convolution", "embedding", "mm", "stack"}


SMALL = 2**20  # numbers

# Without values: operation and arguments -> result and FLOPs. PyTorch's meta kernels take a millisecond each.
_known: dict[Any, tuple[Any, Counter[str]]] = {}


class MixedDevices(RuntimeError):
    """An operation got tensors of the card and of the CPU."""


class OnCard(Tensor):
    """A tensor on the pretended card."""

    held: Tensor  # of the CPU, or meta
    description: tuple[Any, ...]  # see descriptions.py

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CARD,
        )
        made.held = inner
        made.description = (OnCard, tuple(inner.shape), inner.stride(), inner.dtype, inner.device)
        WATCH.hold(inner)
        return made

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __repr__(self, **options: Any) -> str:
        return f"OnCard({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:  # torch's own reads the storage
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        return run(func, args, kwargs or {})


class Machine(TorchDispatchMode):
    """Within it "cuda" is a device.

    Args:
        meta: what is made on the card or copied to it has a shape and no values, unless it holds integers.
    """

    meta = False  # of the machine that is entered now

    def __init__(self, meta: bool) -> None:
        super().__init__()
        self._meta = meta

    def __enter__(self) -> Machine:
        Machine.meta = self._meta
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        Machine.meta = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: Mapping | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.is_pinned.default:
            return False
        if func is aten._pin_memory.default:
            return args[0].clone()
        if any(isinstance(x, OnCard) for x in _tensors_in(args, kwargs)) or _is_card(kwargs.get("device")):
            return run(func, args, kwargs)
        return func(*args, **kwargs)


def run(func: Any, args: Sequence, kwargs: Mapping) -> Any:
    """One operation of torch that has to do with the card."""
    WATCH.counts.calls += 1
    if not Machine.meta or aliases(func) or func in COUNTED:
        return _run(func, args, kwargs)
    key = func, described(args), described(kwargs)
    if key not in _known:
        before = WATCH.counts.flops.copy()
        answer = _run(func, args, kwargs)
        made = _tensors_in(answer if isinstance(answer, (list, tuple)) else [answer], {})
        if made and all(isinstance(x, OnCard) and x.held.is_meta for x in made):
            _known[key] = described(answer), WATCH.counts.flops - before
        return answer
    result, flops = _known[key]
    WATCH.counts.flops.update(flops)
    return _made(result)


def _run(func: Any, args: Sequence, kwargs: Mapping) -> Any:
    if func is aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    if func is aten.copy_.default:
        return _copy_into(*args, **kwargs)
    tensors = _tensors_in(args, kwargs)
    ours = [x for x in tensors if isinstance(x, OnCard)]
    if not ours:
        return _made_on_card(func, args, kwargs)
    _check_devices(func, args, tensors)
    if not _is_card(kwargs.get("device", CARD)):  # such as new_zeros(device="cpu")
        return func(*_mapped(_as_cpu, args), **_mapped(_as_cpu, {**kwargs, "device": torch.device("cpu")}))
    if func in WAITED_FOR or (func in INDEXED and any(x.dtype == torch.bool for x in _tensors_in(args[1], {}))):
        WATCH.wait(func.overloadpacket.__name__)
    return _computed(func, args, kwargs, ours)


def _made(description: Any) -> Any:
    """A result of this description."""
    kind, *inside = description
    if kind is OnCard:
        shape, stride, dtype, _ = inside
        return OnCard(torch.empty_strided(shape, stride, dtype=dtype, device="meta"))
    return kind(_made(one) for one in inside) if kind in (list, tuple) else inside[0]


def _computed(func: Any, args: Sequence, kwargs: Mapping, ours: Sequence[OnCard]) -> Any:
    """The operation on the tensors inside."""
    without_values = any(x.held.is_meta for x in ours)
    if without_values and (known := _known_without_values(func, ours[0])) is not None:
        return known[0]

    def inside(x: Any) -> Any:
        inner = x.held if isinstance(x, OnCard) else x
        return _as_meta(inner) if without_values else inner

    inner_args, inner_kwargs = _mapped(inside, args), _mapped(inside, kwargs)
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("meta" if without_values else "cpu")
    answer = func(*inner_args, **inner_kwargs)
    if func.overloadpacket in flop_registry:
        count = flop_registry[func.overloadpacket](*inner_args, **inner_kwargs, out_val=answer)
        WATCH.counts.flops[str(ours[0].dtype).removeprefix("torch.")] += count
    answer = _mapped(_on_card, answer)
    return return_and_correct_aliasing(func, args, kwargs, answer) if aliases(func) else answer


def _known_without_values(func: Any, x: OnCard) -> tuple[Any] | None:
    """What an operation that reads values answers where there are none; None: it reads none."""
    if func is aten._local_scalar_dense.default:
        return (1.0 if x.dtype.is_floating_point else 1,)
    if func is aten._linalg_check_errors.default:
        return (None,)
    if func in (aten.equal.default, aten.is_nonzero.default):
        return (True,)
    return None


def _to_copy(x: Tensor, *, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    """`Tensor.to`, within the card, or across."""
    kwargs.pop("pin_memory", None)
    here = isinstance(x, OnCard)
    there = here if device is None else _is_card(device)
    inner = x.held if here else x
    if here != there:
        # A copy to memory of the host that is not pinned always ends before its call returns.
        WATCH.copy("to the card" if there else "to the host", blocking=here or not non_blocking)
    if there and not here and Machine.meta and inner.is_floating_point():
        inner = _as_meta(inner)
    if not there and inner.is_meta:
        return _zeros(inner.shape, kwargs.get("dtype") or inner.dtype)
    answer = aten._to_copy.default(inner, **kwargs)
    return OnCard(answer) if there else answer


def _copy_into(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`Tensor.copy_`, within the card, or across."""
    if isinstance(target, OnCard) != isinstance(source, OnCard):
        to_card = isinstance(target, OnCard)
        WATCH.copy("to the card" if to_card else "to the host", blocking=not (to_card and non_blocking))
    inner, values = (x.held if isinstance(x, OnCard) else x for x in (target, source))
    if not (inner.is_meta or values.is_meta):
        inner.copy_(values)
    return target


def _made_on_card(func: Any, args: Sequence, kwargs: Mapping) -> Any:
    """A new tensor: zeros, arange and the like."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    kind = "meta" if Machine.meta and dtype.is_floating_point else "cpu"
    options = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory")}
    return _mapped(_on_card, func(*args, **options, device=torch.device(kind)))


def _check_devices(func: Any, args: Sequence, tensors: Sequence[Tensor]) -> None:
    """Raise MixedDevices where CUDA would; a CPU tensor of 0 dimensions may take part in arithmetic."""
    plain = [x for x in tensors if not isinstance(x, OnCard)]
    if func in INDEXED and isinstance(args[0], OnCard):
        for _ in [x for x in _tensors_in(args[1], {}) if not isinstance(x, OnCard)]:
            WATCH.copy("to the card", blocking=True)  # torch copies indices of the CPU itself
        plain = [x for x in _tensors_in(args[2:], {}) if not isinstance(x, OnCard)]
    if func.overloadpacket.__name__ not in STRICT:
        plain = [x for x in plain if x.dim() > 0]
    if plain:
        shapes = ", ".join(f"{tuple(x.shape)} {x.device}" for x in tensors)
        raise MixedDevices(f"{func} got tensors of several devices: {shapes}")


def _tensors_in(args: Sequence, kwargs: Mapping) -> list[Tensor]:
    """Those among the arguments and in their lists."""
    found: list[Tensor] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += [one for one in x if isinstance(one, Tensor)]
    return found


def _mapped(change: Callable[[Any], Any], x: Any) -> Any:
    """x with every tensor in it changed."""
    if isinstance(x, Tensor):
        return change(x)
    if type(x) in (list, tuple):
        return type(x)(_mapped(change, one) for one in x)
    if isinstance(x, dict):
        return {key: _mapped(change, one) for key, one in x.items()}
    return x


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _on_card(x: Tensor) -> Tensor:
    return x if isinstance(x, OnCard) else OnCard(x)


def _as_cpu(x: Tensor) -> Tensor:
    if not isinstance(x, OnCard):
        return x
    return _zeros(x.shape, x.dtype) if x.held.is_meta else x.held


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """What is copied to the CPU where there are no values. A whole U-Net would take gigabytes, were it not one 0."""
    return torch.zeros(shape, dtype=dtype) if shape.numel() < SMALL else torch.zeros((), dtype=dtype).expand(shape)


def _as_meta(x: Any) -> Any:
    """Without values; numbers and tensors of 0 dimensions on the CPU stay."""
    if isinstance(x, Tensor) and x.device.type == "cpu" and x.dim() > 0:
        x = x if 0 not in x.stride() else torch.empty(x.shape, dtype=x.dtype, device="meta")
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
    return x
