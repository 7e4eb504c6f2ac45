"""The arithmetic of a device: which half precision it computes natively, TF32, and cuDNN's search.

Only commands, training loops and the plan of sampling need this: networks compute in the dtype of
their tensors.
"""

from __future__ import annotations

import torch

_NATIVE_ON_CPU = {
    "bf16": (("avx512_bf16", "amx_bf16"), ("_is_avx512_bf16_supported", "_is_amx_tile_supported")),
    "fp16": (("avx512_fp16", "amx_fp16"), ("_is_amx_fp16_supported",)),
}
"""Capabilities by which a processor has a precision: their public names, which torch 2.6 lacks, and
the functions that it has instead."""


def is_native(precision: str, device: torch.device) -> bool:
    """Say whether a device computes bf16 or fp16 itself, instead of converting every value.

    CUDA devices have fp16, and bf16 from capability 8 on. A processor has bf16 with AVX512-BF16 or
    AMX, and fp16 with AVX512-FP16 or AMX-FP16. Other devices, such as Apple's, have not been
    measured: they are said to have fp16 alone.
    """
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return precision == "fp16"
    names, functions = _NATIVE_ON_CPU[precision]
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in names)
    return any(getattr(torch.cpu, name, bool)() for name in functions)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bf16 where the device has it, else fp32; other values are returned."""
    if precision != "auto":
        return precision
    return "bf16" if is_native("bf16", device) else "fp32"


def device_notes(precision: str, device: torch.device, *, tf32: bool) -> list[str]:
    """Say that a half precision is slower than fp32 on a device, and whether CUDA uses TF32."""
    notes = []
    if precision != "fp32" and not is_native(precision, device):
        what = {"cpu": "processor"}.get(device.type, "device")
        fast = "fp16" if device.type == "cuda" else resolve_precision("auto", device)
        notes.append(
            f"--precision {precision}: this {what} does not compute it itself, so a step can take "
            f"many times as long as in fp32; use --precision {fast}"
        )
    if device.type == "cuda":
        notes.append(f"TF32 in fp32 convolutions: {tf32} (--tf32), in matrix products: False")
    return notes


def set_up_kernels(device: torch.device, *, tf32: bool, one_size: bool) -> None:
    """Set what torch keeps for the whole process on CUDA devices; elsewhere do nothing.

    Args:
        device: that computes.
        tf32: fp32 convolutions round their inputs to 10 bits of mantissa, as torch does by itself.
            Matrix products do not: version 2 compares phases by them.
        one_size: all inputs have one size, so that cuDNN may measure which algorithm is fastest.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = one_size
