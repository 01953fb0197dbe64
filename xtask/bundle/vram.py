#!/usr/bin/env python3
"""Takes VRAM as another process would, by the driver's own allocations.

    vram.py leave BYTES     takes all of the card but BYTES, says so, and keeps it until it is killed
    vram.py take BYTES S    takes BYTES in pieces of 256 MB, trying again every 20 ms, keeps them for S
                            seconds, and writes what happened when as JSON
"""
import ctypes
import json
import signal
import sys
import time

PIECE = 256_000_000
cuda = ctypes.CDLL("libcuda.so.1")


def check(result, what):
    if result != 0:
        sys.exit(f"{what}: CUDA error {result}")


def context():
    device, handle = ctypes.c_int(), ctypes.c_void_p()
    check(cuda.cuInit(0), "cuInit")
    check(cuda.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    check(cuda.cuCtxCreate_v2(ctypes.byref(handle), 0, device), "cuCtxCreate")


def free():
    left, total = ctypes.c_size_t(), ctypes.c_size_t()
    check(cuda.cuMemGetInfo_v2(ctypes.byref(left), ctypes.byref(total)), "cuMemGetInfo")
    return left.value


def take(size):
    """Whether so many bytes could be had."""
    place = ctypes.c_uint64()
    return cuda.cuMemAlloc_v2(ctypes.byref(place), ctypes.c_size_t(size)) == 0


def main():
    what, size = sys.argv[1], int(float(sys.argv[2]))
    started = time.time()
    context()
    if what == "leave":
        while (more := free() - size) > 2 << 20:
            if not take(min(more, 8 << 30) // (2 << 20) * (2 << 20)):
                break
        print(f"{free()} bytes are left", flush=True)
        signal.pause()
    begun = time.time()
    pieces = []
    while sum(p["bytes"] for p in pieces) < size:
        if take(PIECE):
            pieces.append({"at": time.time(), "bytes": PIECE})
        elif time.time() - begun > 60:
            break
        else:
            time.sleep(0.02)
    had = time.time()
    time.sleep(float(sys.argv[3]))
    story = {"started": started, "begun": begun, "had": had, "ended": time.time()}
    story |= {"wanted": size, "pieces": pieces}
    print(json.dumps(story), flush=True)


main()
