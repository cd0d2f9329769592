"""How many int8 products this CPU multiplies and adds at most: a loop of VPDPBUSD on registers alone, written here.

The bound that int8 matrix products are measured against. The loop is machine code (x86-64, AVX-512 VNNI): no compiler
is needed, and no memory is touched while it runs.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import threading
import time

from ..engines.cpu import cpu_flags

_ACCUMULATORS = 24  # zmm0 to zmm23: more than the latency of an addition times the units there are
_TURNS = 4  # of all accumulators, in the loop's body
PRODUCTS = 64 * _ACCUMULATORS * _TURNS  # int8 multiply-adds of one pass: 16 sums of 4 products an instruction


def _vpdpbusd(accumulator: int, a: int, b: int) -> bytes:
    """VPDPBUSD zmm[accumulator], zmm[a], zmm[b] (EVEX.512.66.0F38.W0 50 /r); the prefix has register bits inverted."""
    high = [1 - (register >> 3 & 1) for register in (accumulator, b)]
    higher = [1 - (register >> 4 & 1) for register in (accumulator, b, a)]
    p0 = high[0] << 7 | higher[1] << 6 | high[1] << 5 | higher[0] << 4 | 0b010
    p1 = (~a & 15) << 3 | 0b101
    p2 = 0b10 << 5 | higher[2] << 3
    return bytes((0x62, p0, p1, p2, 0x50, 0xC0 | (accumulator & 7) << 3 | b & 7))


def _code() -> bytes:
    """void f(uint64_t passes): rdi is counted down; the registers hold whatever they hold, which costs nothing."""
    body = b"".join(_vpdpbusd(i, 30, 31) for _ in range(_TURNS) for i in range(_ACCUMULATORS))
    count = b"\x48\xff\xcf"  # dec rdi
    back = -(len(body) + len(count) + 6)
    jump = b"\x0f\x85" + back.to_bytes(4, "little", signed=True)  # jnz, to the beginning
    return body + count + jump + b"\xc5\xf8\x77\xc3"  # vzeroupper; ret


def vnni_peak(threads: int, seconds: float = 0.3) -> float | None:
    """int8 multiply-adds a second of so many threads at once.

    None where the CPU has no AVX-512 VNNI, or has AMX, whose tiles multiply more, or where the system forbids it.
    """
    flags = cpu_flags()
    if platform.machine() not in ("x86_64", "AMD64") or "avx512_vnni" not in flags or "amx_int8" in flags:
        return None
    code = _code()
    try:
        memory = mmap.mmap(-1, len(code), prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, AttributeError, TypeError):  # a system that lets nothing be written and run, or Windows
        return None
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    run = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(address)
    passes = 20_000
    while (once := _timed(run, passes, 1)) < seconds / 4:
        passes *= 2
    passes = max(1, int(passes * seconds / once))
    return max(threads * passes * PRODUCTS / _timed(run, passes, threads) for _ in range(3))


def _timed(run: ctypes._CFunctionType, passes: int, threads: int) -> float:
    """Seconds until all are through; ctypes lets go of the interpreter while each runs."""
    workers = [threading.Thread(target=run, args=(passes,)) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start
