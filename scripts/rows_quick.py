"""Are the Hopper kernels dq and dbias right, and how fast? rows_quick.py [head dims] [all: other configurations than the plan's, too]"""

import sys

import torch
from triton.testing import do_bench

from triflash.launch import hopper_rows as launch
from triflash.plan import hopper_rows as plan
from triflash.plan.hopper_rows import RowsConfig as Rows
from triflash.spec import spec_of

B, H, S, LIMIT, PROCESSORS = 4, 16, 2048, 232448, torch.cuda.get_device_properties(0).multi_processor_count
SIMPLE, TURNS = Rows(2, 64, 3, 2, v_stages=2, own_out=False, ahead=False), Rows(2, 64, 3, 2, v_stages=2, turns=True)
DQ = {64: [Rows(2, 128, 3, 2, v_stages=2, turns=True), Rows(2, 128, 2, 2, ahead=False), SIMPLE, TURNS]}
DQ |= {128: [Rows(2, 128, 2, own_out=False, ahead=False), SIMPLE, TURNS], 256: [Rows(2, 64, 2, v_stages=1, own_out=False, ahead=False)]}
DBIAS = [Rows(2, 128, 6, turns=True), Rows(2, 128, 3, chunk=128), Rows(2, 64, 8), Rows(2, 128, 5)]


def exact(q, k, v, bias, dout, spec, h):
    """(lse in base 2, delta, ds) of a head, dense in float32."""
    s = q[:, :, h].float() @ k[:, :, h].float().mT * spec.scale + (0 if bias is None else bias[:, 0, h].float())
    s = s if spec.hi is None else s.masked_fill(torch.ones_like(s[0], dtype=torch.bool).triu(1), -torch.inf)
    p, dp = s.softmax(-1), dout[:, :, h].float() @ v[:, :, h].float().mT
    delta = (p * dp).sum(-1)
    return s.logsumexp(-1) * 1.4426950408889634, delta, p * (dp - delta[..., None])


def report(name, call, products, got, wanted):
    call.start()
    error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True))
    first = [x.clone() for x in got]
    differ = sum(call.start() is None and any(not torch.equal(a, b) for a, b in zip(got, first, strict=True)) for _ in range(50))
    ms = do_bench(call.start, warmup=20, rep=80, return_mode="median")
    print(
        f"{name:24} {call.config!s:46} error {error:.4f}, differs {differ}/50, {ms:.3f} ms, {products / ms * 1e-9:.0f} TFLOP/s", flush=True
    )


dims = [int(x) for x in sys.argv[1:] if x.isdigit()] or [64, 128]
for d, hi, shape in [(d, hi, shape) for d in dims for hi in (None, 0) for shape in ("", "1hqk", "bhqk")]:
    name, work = f"d{d} {shape or '-'} {'full' if hi is None else 'causal'}", 2 * B * H * S * S * d / (1 if hi is None else 2)
    q, k, v, dout, dq = (torch.randn(B, S, H, d, device="cuda", dtype=torch.bfloat16) for _ in range(5))
    bias = torch.randn(B if shape == "bhqk" else 1, 1, H, S, S, device="cuda", dtype=torch.bfloat16) if shape else None
    spec = spec_of(q, k, v, bias, 1, None, hi, d**-0.5, "")
    stats, ds = torch.zeros(B, H, 3 if shape else 2, S, device="cuda"), {}
    for h in range(H):
        stats[:, h, 0], stats[:, h, 1], ds[h] = exact(q, k, v, bias, dout, spec, h)
        ds.pop(h - 2, None)  # the last two heads are compared
    stats, full = stats.flatten(0, 1), torch.full_like(bias, torch.nan) if shape == "bhqk" else None
    for config in dict.fromkeys([plan.dq_config(spec, LIMIT, full is not None), *(DQ[d] if "all" in sys.argv else [])]):
        if plan.dq_shared_memory(spec, config, full is not None) <= LIMIT:
            grid, dq = plan.dq_programs(spec, config, PROCESSORS), dq.fill_(torch.nan)
            got, wanted = [dq[:, :, h] for h in ds], [x @ k[:, :, h].float() * spec.scale for h, x in ds.items()]
            got, wanted = (got, wanted) if full is None else ([*got, *(full[:, 0, h] for h in ds)], [*wanted, *ds.values()])
            report(f"dq {name}", launch.dq_call(spec, config, grid, q, k, v, bias, dout, stats, dq, full), 3 * work, got, wanted)
    for config in dict.fromkeys([plan.dbias_config(spec, LIMIT), *(DBIAS if "all" in sys.argv else [])]) if shape == "1hqk" else ():
        if plan.dbias_shared_memory(spec, config) <= LIMIT:
            grid, dbias = plan.dbias_programs(spec, config, 1, PROCESSORS), torch.full_like(bias[None], torch.nan)
            call = launch.dbias_call(spec, config, grid, 1, q, k, v, bias, dout, stats, dbias)
            report(f"dbias {name}", call, 2 * work, [dbias[0, 0, 0, h] for h in ds], [x.sum(0) for x in ds.values()])
