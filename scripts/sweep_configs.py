"""Times every feasible tile configuration of the portable kernels on this GPU and checks each result. For whoever fills plan/tables.py.

    python3 scripts/sweep_configs.py OUT.json [--dims 64,128] [--kernels forward,dkdv,dq,dbias] [--seqlen 2048]

The environment variables HEADS and BATCH replace the default of 16,384 tokens and heads * d = 2048. Kernels are
compiled first, on all cores; configurations that spill more than --spills words or exceed shared memory are not timed.
A configuration whose result differs from a float32 reference counts as WRONG. The table at the end lists the best few per case.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys

import torch
from triton.testing import do_bench

from triflash.launch.ahead import compile_for, resources
from triflash.launch.triton import backward_calls, forward_calls
from triflash.plan.configs import TileConfig
from triflash.plan.device import KNOWN_DEVICES
from triflash.plan.override import override_configs
from triflash.plan.select import plan_backward, plan_forward
from triflash.spec import Needs, spec_of

GRID = {
    "forward": [(64, n, 4, s) for n in (32, 64, 128) for s in (2, 3, 4)]
    + [(128, n, w, s) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3, 4)]
    + [(256, n, 8, s) for n in (32, 64) for s in (2, 3)],
    "dkdv": [(m, n, w, s) for n in (64, 128) for m in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "dq": [(m, n, w, s) for m in (64, 128) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)],
    "dbias": [
        (m, n, w, s) for m, n in ((64, 64), (128, 64), (64, 128), (128, 128), (256, 64), (64, 256)) for w in (4, 8) for s in (1, 2, 3, 4)
    ],
}


def tensors(d, biased, seqlen, device):
    heads, batch = int(os.environ.get("HEADS", 2048 // d)), int(os.environ.get("BATCH", 16384 // seqlen))
    generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
    make = lambda *shape: torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)  # noqa: E731
    q, k, v, dout = (make(batch, seqlen, heads, d) for _ in range(4))
    return q, k, v, dout, make(1, 1, heads, seqlen, seqlen) if biased else None


def the_call(kernel, config, d, biased, causal, seqlen, data, outputs):
    """The launch of one kernel with one configuration."""
    q, k, v, dout, bias = data
    spec = spec_of(q, k, v, bias, 1, None, 0 if causal else None, d**-0.5, "")
    arch = f"sm{''.join(map(str, torch.cuda.get_device_capability()))}" if outputs is not None else "sm90"
    facts = KNOWN_DEVICES[arch]
    out, lse, delta, grads = outputs or (
        torch.empty_like(q),
        q.new_empty(q.shape[0], q.shape[2], seqlen, dtype=torch.float32),
        None,
        (q, k, v, bias),
    )
    rest = None if bias is None else torch.zeros_like(lse)
    with override_configs(**{kernel: TileConfig(*config)}):
        if kernel == "forward":
            return forward_calls(plan_forward(spec, facts, "triton"), spec, q, k, v, bias, out, lse, rest)[0]
        plan = plan_backward(spec, Needs(True, True, True, biased), facts, "triton")
        calls = backward_calls(plan, spec, dout, None, q, k, v, bias, out, lse, rest, *grads)
        at = [step.kernel for step in plan.steps].index(kernel)
        if delta is not None:
            calls[0].start()
        return calls[at]


def build(case):
    """Compile one configuration ahead of time, in a worker process; the launch later finds it in the cache."""
    kernel, config, d, biased, causal, seqlen = case
    try:
        used = resources(compile_for(the_call(kernel, config, d, biased, causal, seqlen, tensors(d, biased, seqlen, "meta"), None), "sm90"))
        return case, used.registers, used.spills, used.shared_memory
    except Exception as error:
        return case, 0, 10**6, f"{type(error).__name__}: {str(error)[:80]}"


def reference(q, k, v, dout, bias, causal):
    """out, lse, dq, dk, dv, dbias in float32, one batch entry at a time."""
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, q, k, v)] + [
        None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    ]
    out, dq, dk, dv, dbias = grads
    for b in range(q.shape[0]):
        leaves = [x[b].float().transpose(0, 1).requires_grad_() for x in (q, k, v)]
        s = leaves[0] @ leaves[1].transpose(1, 2) * q.shape[3] ** -0.5
        if bias is not None:
            leaves.append(bias[0, 0].float().requires_grad_())
            s = s + leaves[3]
        if causal:
            s = s.masked_fill(torch.ones(s.shape[1:], device=s.device, dtype=torch.bool).triu(1), -torch.inf)
        o = s.softmax(-1) @ leaves[2]
        g = torch.autograd.grad(o, leaves, dout[b].float().transpose(0, 1))
        out[b], dq[b], dk[b], dv[b] = (x.detach().transpose(0, 1) for x in (o, *g[:3]))
        if bias is not None:
            dbias += g[3]
    return {"forward": (out,), "dkdv": (dk, dv), "dq": (dq,), "dbias": (dbias,)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--kernels", default="forward,dkdv,dq,dbias")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--spills", type=int, default=64)
    args = parser.parse_args()
    dims = [int(d) for d in args.dims.split(",")]
    cases = [
        (kernel, config, d, biased, causal, args.seqlen)
        for kernel in args.kernels.split(",")
        for d, biased, causal in itertools.product(dims, (False, True), (False, True))
        if biased or kernel != "dbias"
        for config in GRID[kernel]
    ]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(16, os.cpu_count())) as pool:
        built = pool.map(build, cases, chunksize=1)
    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    ready = {case: rest for case, *rest in built if rest[1] <= args.spills and rest[2] <= limit}
    print(f"{len(cases)} configurations, {len(ready)} feasible", file=sys.stderr, flush=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for d, biased, causal in itertools.product(dims, (False, True), (False, True)):
        mine = [case for case in ready if case[2:5] == (d, biased, causal)]
        if not mine:
            continue
        data = tensors(d, biased, args.seqlen, "cuda")
        right = reference(*data, causal)
        q, k, v, _, bias = data
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[0], q.shape[2], args.seqlen, dtype=torch.float32)
        grads = tuple(None if x is None else torch.empty_like(x) for x in (q, k, v, bias))
        results = {"forward": (out,), "dkdv": grads[1:3], "dq": grads[:1], "dbias": grads[3:]}
        default = (128, 64, 8, 2) if d < 256 else (64, 64, 8, 2)
        the_call("forward", default, d, biased, causal, args.seqlen, data, (out, lse, None, grads)).start()
        scratch = (out.clone(), lse.clone())
        for case in mine:
            kernel, config = case[:2]
            outputs = (out, lse, None, grads) if kernel == "forward" else (*scratch, True, grads)
            row = {"kernel": kernel, "config": config, "d": d, "bias": biased, "causal": causal, "built": ready[case]}
            try:
                call = the_call(kernel, config, d, biased, causal, args.seqlen, data, outputs)
                for result in results[kernel]:
                    result.fill_(torch.nan)
                call.start()
                error = max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(results[kernel], right[kernel], strict=True))
                row["error"] = error
                row["ms"] = do_bench(call.start, warmup=4, rep=16, return_mode="median") if error < 1e-2 else None
            except Exception as problem:
                row["error"] = f"{type(problem).__name__}: {str(problem)[:80]}"
                row["ms"] = None
            rows.append(row)
    with open(args.out, "w") as file:
        json.dump({"gpu": torch.cuda.get_device_name(), "seqlen": args.seqlen, "rows": rows}, file)
    for (kernel, d, biased, causal), group in itertools.groupby(
        sorted(rows, key=lambda r: (r["kernel"], r["d"], r["bias"], r["causal"])), lambda r: (r["kernel"], r["d"], r["bias"], r["causal"])
    ):
        group = list(group)
        best = sorted((r for r in group if r["ms"]), key=lambda r: r["ms"])[:6]
        wrong = [(r["config"], r["error"]) for r in group if not r["ms"]]
        flops = {"forward": 2, "dkdv": 4, "dq": 3, "dbias": 2}[kernel] * 2 * args.seqlen**2 * d / (2 if causal else 1)
        flops *= int(os.environ.get("HEADS", 2048 // d)) * int(os.environ.get("BATCH", 16384 // args.seqlen))
        shown = "  ".join(f"{'x'.join(map(str, r['config']))}:{flops / r['ms'] * 1e-9:.0f}({r['built'][1]})" for r in best)
        print(
            f"{kernel:8s} d{d:<3d} {'bias' if biased else '    '} {'causal' if causal else 'full  '} {shown}"
            + (f"  WRONG {wrong[:3]}" if wrong else "")
        )


if __name__ == "__main__":
    main()
