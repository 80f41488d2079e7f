"""A GPU rehearsal without a GPU: the real code of `loop/` on device "cuda", in the CPU wheel of torch.

What it is: torch's FakeTensorMode computes the shape, dtype and device of every operation and no value. A CPU wheel lacks
two things that autograd asks for, a device guard and the hooks that say "there is CUDA"; `install` puts both there. On
top lies `Watch`, which answers `.item()`, notes what would make the host wait for the GPU, and adds up what is alive.

What it finds: a tensor on another device than the rest, wrong dtypes under autocast("cuda"), each wait of the host with
its place, peak memory (workspaces of kernels are not in it, but for one that `_flash_workspace` knows).
What it cannot find: values, so every check that compares them passes; which kernel CUDA chooses beyond the rules written
down in `_attention`; launches, speed, alignment; what NCCL, cuBLAS or cuDNN refuse.

It patches torch for good, so it is for a process of its own, as in `test_gpu.py`."""

import collections
import contextlib
import ctypes
import sys
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALIVE: list[object] = []  # what C++ points to
_KNOWN = torch.__version__.startswith("2.13.") and torch.version.cuda is None
OTHER_TORCH = (
    None
    if _KNOWN and sys.platform == "linux"
    else f"it knows torch 2.13 for the CPU on Linux; this is {torch.__version__} on {sys.platform}"
)
"""Why the stand-in is not to be had here; None where it is."""


def install() -> None:
    """Once a process: torch has a device guard and hooks of CUDA, and so an accelerator."""
    assert OTHER_TORCH is None, OTHER_TORCH
    folder = Path(torch.__file__).parent / "lib"
    c10, cpu = (ctypes.CDLL(str(folder / name)) for name in ("libc10.so", "libtorch_cpu.so"))

    def returning(value: int) -> int | None:
        function = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)(lambda *_: value)
        _ALIVE.append(function)
        return ctypes.cast(function, ctypes.c_void_p).value

    # 1. torch has a guard for CUDA that does nothing, but puts it only in the place of one that counts 0 devices.
    registry = (ctypes.c_void_p * 21).in_dll(c10, "_ZN3c104impl26device_guard_impl_registryE")
    table = (ctypes.c_void_p * 64)(*[returning(0)] * 64)
    empty = (ctypes.c_void_p * 1)(ctypes.addressof(table))
    _ALIVE.extend([table, empty])
    registry[1] = ctypes.addressof(empty)  # 1 is DeviceType::CUDA
    torch._C._ensureCUDADeviceGuardSet()
    assert registry[1] != ctypes.addressof(empty), "torch kept the guard of 0 devices"
    # 2. autograd's engine asks CUDAHooksInterface which device has streams: slots of its table, in the header's order.
    get = cpu._ZN2at6detail12getCUDAHooksEv
    get.restype = ctypes.c_void_p
    hooks = ctypes.cast(get(), ctypes.POINTER(ctypes.c_void_p))
    old = ctypes.cast(hooks[0], ctypes.POINTER(ctypes.c_void_p))
    new = (ctypes.c_void_p * 64)(*[old[slot] for slot in range(64)])
    for slot in (2, 3, 4, 6, 16):  # isBuilt, isAvailable, hasPrimaryContext, deviceCount, hasCUDA
        new[slot] = returning(1)
    for slot in (5, 7, 8, 9, 10, 26):  # init; set, get, exchange, maybeExchange; current_device: 0
        new[slot] = returning(0)
    _ALIVE.append(new)
    hooks[0] = ctypes.addressof(new)
    assert str(torch.accelerator.current_accelerator()) == "cuda"


class Watch(TorchDispatchMode):
    """Answers what needs a value, notes what would wait, and keeps account of what is alive on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # what, and where in loop/
        self.attention: collections.Counter[str] = collections.Counter()  # kernel, heads of q and k
        self.operations: collections.Counter[str] = collections.Counter()
        self.alive = self.peak = 0
        self.difference = 0.0  # the value of every number that is asked for
        self._known: set[int] = set()

    def note(self, what: str) -> None:
        """The host would wait here for the GPU."""
        ours = [call for call in traceback.extract_stack() if "/loop/" in call.filename]
        place = f"{Path(ours[-1].filename).name}: {ours[-1].line}" if ours else "not in loop/"
        self.waits.append(f"{what} at {place}")

    def answer(self, dtype: torch.dtype) -> float | bool | int:
        """Of that dtype, whatever was computed."""
        if dtype == torch.bool:
            return True
        return self.difference if dtype.is_floating_point else 1

    def borrow(self, size: int) -> None:
        """A workspace that a kernel takes and gives back."""
        self.peak = max(self.peak, self.alive + size)

    def attend(self, kernel: str, heads: int, key_heads: int) -> None:
        self.attention[f"{kernel}, {heads} and {key_heads} heads"] += 1

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            size = -(-storage.nbytes() // 512) * 512  # the caching allocator's rounding
            self.alive += size
            self.borrow(0)
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def __torch_dispatch__(
        self, func: Any, _kinds: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func.namespace != "aten" and func.namespace != "torch_attn":  # prim::device and the like
            return func(*args, **kwargs)
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        if name in ("_local_scalar_dense", "equal", "is_nonzero") and isinstance(
            given[0], FakeTensor
        ):
            if on_gpu:
                self.note(name)
            return self.answer(given[0].dtype) if name == "_local_scalar_dense" else True
        by_mask = name != "index" or any(tensor.dtype == torch.bool for tensor in given[1:])
        if on_gpu and torch.Tag.dynamic_output_shape in func.tags and by_mask:
            self.note(name)
        if name == "torch_attn::_varlen_attn":
            _refuse_what_flash_refuses(*args[:4])
            self.attend("packed", args[0].shape[1], args[1].shape[1])
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_"):
            self._note_copy(name, args, kwargs, made[0])
        if name == "torch_attn::_varlen_attn_backward":
            self.borrow(_flash_workspace(args[1], args[2], args[6]))
        self.operations[name] += on_gpu and not func.is_view
        for tensor in made:
            if tensor.device.type == "cuda":
                self._count(tensor.untyped_storage())
        return out

    def _note_copy(self, name: str, args: Any, kwargs: Any, made: Tensor) -> None:
        """A copy between host and GPU waits unless it goes to the GPU and is told not to."""
        source = args[0] if name == "_to_copy" else args[1]
        if {source.device.type, made.device.type} == {"cpu", "cuda"}:
            told = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if not (told and made.device.type == "cuda"):
                self.note(f"copy to {made.device.type}")


def _refuse_what_flash_refuses(query: Tensor, key: Tensor, value: Tensor, starts: Tensor) -> None:
    """A fake tensor is taken with anything."""
    (size,) = {tensor.shape[-1] for tensor in (query, key, value)}
    assert size % 8 == 0, f"head size {size}"
    assert size <= 256, f"head size {size}"
    assert {t.dtype for t in (query, key, value)} <= {torch.bfloat16, torch.float16}, query.dtype
    assert starts.dtype == torch.int32, starts.dtype
    assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "of another stride"


def _flash_workspace(query: Tensor, key: Tensor, starts: Tensor) -> int:
    """Bytes that FlashAttention 2's backward takes beside what it returns (csrc/flash_attn, mha_varlen_bwd)."""
    tokens, heads, size = query.shape
    tokens += 128 * (len(starts) - 1)
    rounded = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    grouped = 0 if key.shape[1] == heads else 2 * len(key) * heads * size * key.itemsize
    return tokens * heads * (rounded + 1) * 4 + grouped


def _attention(watch: Watch, major: int, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """SDPA as CUDA chooses it with cuDNN's off; on a fake device torch takes the kernel that keeps all scores.

    Source: torch 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp."""

    def sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda":
            return real(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )  # fmt: skip
        if torch.is_autocast_enabled("cuda"):
            low = torch.get_autocast_dtype("cuda")
            query, key, value = (tensor.to(low) for tensor in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(low)
        heads, key_heads = query.shape[1], key.shape[1]
        if major >= 8 and query.dtype.itemsize == 2 and attn_mask is None:
            watch.attend("flash", heads, key_heads)
            assert heads == key_heads or enable_gqa, "fewer heads of keys, and SDPA is not told"
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if heads != key_heads:
            watch.attend("all scores", heads, key_heads)
            return real(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=True)
        watch.attend("efficient", heads, key_heads)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
                attn_mask = zeros.masked_fill(~attn_mask, float("-inf"))
            assert attn_mask.dtype == query.dtype, f"mask {attn_mask.dtype}, query {query.dtype}"
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]

    return sdpa


@contextlib.contextmanager
def gpu(capability: tuple[int, int]) -> Iterator[tuple[Watch, FakeTensorMode]]:
    """`torch.cuda` says there is one, tensors on it are fake, and the watch sees all that is done with them."""
    watch, memory = Watch(), 80 << 30
    major, minor = capability
    properties = types.SimpleNamespace(
        name="fake", major=major, minor=minor, total_memory=memory, multi_processor_count=108
    )

    def nothing(*_: object, **__: object) -> None: ...

    def forget(*_: object) -> None:
        watch.peak = watch.alive

    def place(self: FakeTensor) -> int:
        return int(
            self.untyped_storage()._cdata + self.storage_offset() * self.element_size()
        )  # a name of its own, as an address would be

    def tolist(self: FakeTensor) -> Any:
        watch.note("tolist") if self.device.type == "cuda" else None
        answer = watch.answer(self.dtype)
        return [answer] * self.numel() if self.dim() == 1 else answer

    def pin(self: FakeTensor, *_: object) -> FakeTensor:
        self.pinned = True
        return self

    cuda = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": nothing,
        "is_bf16_supported": lambda including_emulation=True: major >= 8, "get_device_name": lambda *_: "fake",
        "get_device_properties": lambda *_: properties, "get_device_capability": lambda *_: capability,
        "get_arch_list": lambda: ["sm_75", "sm_80", "sm_90"], "is_initialized": lambda: True, "_lazy_init": nothing,
        "max_memory_allocated": lambda *_: watch.peak, "memory_allocated": lambda *_: watch.alive,
        "reset_peak_memory_stats": forget, "empty_cache": nothing, "synchronize": nothing, "_lazy_call": nothing,
        "manual_seed_all": nothing, "manual_seed": nothing, "mem_get_info": lambda *_: (memory, memory),
        "_is_in_bad_fork": lambda: False, "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
    }  # fmt: skip
    functional = torch.nn.functional
    real = functional.scaled_dot_product_attention
    with contextlib.ExitStack() as stack:
        for name, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        for name, method in (("data_ptr", place), ("tolist", tolist), ("pin_memory", pin)):
            stack.enter_context(mock.patch.object(FakeTensor, name, method, create=True))
        own = _attention(watch, major, real)
        stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", own))
        # else torch.tensor(..., device="cuda") would be made there before it is made fake
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        mode.cache_enabled = False
        yield watch, mode
