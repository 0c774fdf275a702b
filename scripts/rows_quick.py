"""Are the Hopper kernels dq and dbias right, and how fast? A line each, at b4 h16 s2048. Needs an sm90 GPU.

PYTHONPATH=src python3 scripts/rows_quick.py [head dims, 64 128 if none] [all: with other configurations than the plan's]
"""

import sys

import torch
from triton.testing import do_bench

from triflash.launch import hopper_rows as launch
from triflash.plan import hopper_rows as plan
from triflash.plan.hopper_rows import RowsConfig as Rows
from triflash.spec import spec_of

B, H, S, LIMIT = 4, 16, 2048, 232448
PROCESSORS = torch.cuda.get_device_properties(0).multi_processor_count
WIDE, SIMPLE = Rows(2, 128, 2, own_out=False, ahead=False), Rows(2, 64, 3, 2, v_stages=2, own_out=False, ahead=False)
OTHERS = {64: [Rows(2, 128, 3, 2, v_stages=2), Rows(2, 128, 2, 2, ahead=False), Rows(2, 64, 4, 3), SIMPLE], 128: [WIDE, SIMPLE]}
OTHERS[256] = [Rows(2, 64, 2, v_stages=1, own_out=False, ahead=False)]
RINGS = [Rows(2, 128, 3, chunk=128), Rows(2, 64, 8), Rows(2, 128, 5)]


def exact(q, k, v, bias, dout, spec, h):
    """(lse in base 2, delta, ds) of a head, dense in float32."""
    s = q[:, :, h].float() @ k[:, :, h].float().mT * spec.scale
    s = s if bias is None else s + bias[:, 0, h].float()
    s = s if spec.hi is None else s.masked_fill(torch.ones_like(s[0], dtype=torch.bool).triu(1), -torch.inf)
    p, dp = s.softmax(-1), dout[:, :, h].float() @ v[:, :, h].float().mT
    delta = (p * dp).sum(-1)
    return s.logsumexp(-1) * 1.4426950408889634, delta, p * (dp - delta[..., None])


def report(name, call, products, got, wanted):
    call.start()
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))
    first, differ = [x.clone() for x in got], 0
    for _ in range(50):
        call.start()
        differ += any(not torch.equal(a, b) for a, b in zip(got, first, strict=True))
    ms = do_bench(call.start, warmup=20, rep=80, return_mode="median")
    print(
        f"{name:24} {call.config!s:44} error {error:.4f}, differs {differ}/50, {ms:.3f} ms, {products / ms * 1e-9:.0f} TFLOP/s", flush=True
    )


def measure(d, hi, shape, others):
    q, k, v, dout, dq = (torch.randn(B, S, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(5))
    bias = torch.randn(B if shape == "bhqk" else 1, 1, H, S, S, device="cuda", dtype=torch.bfloat16) if shape else None
    spec = spec_of(q, k, v, bias, 1, None, hi, d**-0.5, "")
    stats, ds = torch.zeros(B, H, 3 if shape else 2, S, device="cuda"), {}
    for h in range(H):
        stats[:, h, 0], stats[:, h, 1], ds[h] = exact(q, k, v, bias, dout, spec, h)
        ds.pop(h - 2, None)  # the last two heads are compared
    stats, half = stats.flatten(0, 1), 1 if hi is None else 2
    full = torch.full_like(bias, torch.nan) if shape == "bhqk" else None
    name = f"d{d} {shape or '-'} {'full' if hi is None else 'causal'}"
    for config in dict.fromkeys([plan.dq_config(spec, LIMIT, full is not None), *(OTHERS[d] if others else [])]):
        if plan.dq_shared_memory(spec, config, full is not None) <= LIMIT:
            programs = plan.dq_programs(spec, config, PROCESSORS)
            call = launch.dq_call(spec, config, programs, q, k, v, bias, dout, stats, dq.fill_(torch.nan), full)
            got, wanted = [dq[:, :, h] for h in ds], [x @ k[:, :, h].float() * spec.scale for h, x in ds.items()]
            if full is not None:
                got, wanted = [*got, *(full[:, 0, h] for h in ds)], [*wanted, *ds.values()]
            report(f"dq {name}", call, 6 * B * H * S * S * d / half, got, wanted)
    for config in dict.fromkeys([plan.dbias_config(spec, LIMIT), *(RINGS if others else [])]) if plan.dbias_works(spec) else ():
        if plan.dbias_shared_memory(spec, config) <= LIMIT:
            dbias = torch.full((1, *bias.shape), torch.nan, device="cuda", dtype=bias.dtype)
            call = launch.dbias_call(spec, config, plan.dbias_programs(spec, config, 1, PROCESSORS), 1, q, k, v, bias, dout, stats, dbias)
            report(f"dbias {name}", call, 4 * B * H * S * S * d / half, [dbias[0, 0, 0, h] for h in ds], [x.sum(0) for x in ds.values()])


for d in [int(x) for x in sys.argv[1:] if x.isdigit()] or [64, 128]:
    for hi in (None, 0):
        for shape in ("", "1hqk", "bhqk"):
            measure(d, hi, shape, "all" in sys.argv)
