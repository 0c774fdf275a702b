"""Time of every kernel of one forward and backward pass, and of the very first call with a cold cache. For tuning by hand."""

import os
import tempfile
import time

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch

import triflash


def once(d, causal, kind, db, batch=4, heads=16, s=2048, ragged=0):
    s -= ragged
    q, k, v = (torch.randn(batch, s, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    sizes = dict(zip("bhqk", (batch, heads, s, s), strict=True))
    bias = None
    if kind is not None:
        bias = torch.randn([sizes.get(c, 1) for c in kind], device="cuda", dtype=torch.bfloat16, requires_grad=db)
    dout = torch.randn_like(q)
    leaves = [x for x in (q, k, v, bias) if x is not None and x.requires_grad]

    def step():
        return torch.autograd.grad(triflash.flash_attn_func(q, k, v, bias, causal), leaves, dout)

    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(5):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            step()
        torch.cuda.synchronize()
    flops = 4 * batch * heads * s * s * d / (2 if causal else 1)
    share = {"forward": 1.0, "dkdv": 2.0, "dq": 1.5, "dbias": 1.0}
    line = []
    for event in sorted(profile.key_averages(), key=lambda e: -e.device_time_total):
        mean = event.device_time_total / 10
        rate = f" {share[event.key] * flops / mean * 1e-6:.0f}TF" if event.key in share else ""
        line.append(f"{event.key[:14]} {mean:.0f}us{rate}")
    start = time.perf_counter()
    for _ in range(20):
        step()
    host = (time.perf_counter() - start) / 20 * 1e6
    torch.cuda.synchronize()
    mask = "causal" if causal else "full"
    name = f"d{d} s{s} b{batch} h{heads} {mask} {kind or '-'}{'+db' if db else ''}"
    print(f"{name}: first {first:.1f}s host {host:.0f}us | " + "; ".join(line[:6]))


for d in (64, 128):
    for causal in (False, True):
        for kind, db in ((None, False), ("1hqk", False), ("1hqk", True), ("1h1k", True)):
            once(d, causal, kind, db)
once(64, True, "1hqk", True, ragged=1)
once(128, True, "1hqk", True, ragged=1)
once(64, True, None, False, batch=1, s=128)
