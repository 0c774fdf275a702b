"""Forward and backward times of triflash beside SDPA's backends and FlexAttention, as full autograd calls."""

import argparse
import itertools
import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

import triflash

flex = torch.compile(flex_attention, dynamic=False)


def shapes(kind, args):
    """(head dim, length, causal): the grid without a bias, one length with."""
    dims, lengths = [int(x) for x in args.dims.split(",")], [int(x) for x in args.lengths.split(",")]
    if kind is None:
        yield from itertools.product(dims, lengths, (False, True))
    else:
        yield from itertools.product([d for d in dims if d < 256], (2048,), (False, True))


def providers(bias, want_db, causal):
    """name -> function of (q, k, v, bias), all (b, s, h, d)."""

    def sdpa(backend):
        def run(q, k, v, b):
            mask, is_causal = b, causal
            if b is not None and causal:
                hidden = torch.ones(q.shape[1], k.shape[1], device=q.device, dtype=torch.bool).triu(1)
                mask, is_causal = b.masked_fill(hidden, -torch.inf), False
            with sdpa_kernel([backend]):
                o = torch.nn.functional.scaled_dot_product_attention(
                    *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, is_causal=is_causal
                )
            return o.transpose(1, 2)

        return run

    def flexed(q, k, v, b):
        mod = (
            None
            if b is None
            else (lambda s, bi, h, i, j: s + b[0 if b.shape[0] == 1 else bi, 0 if b.shape[1] == 1 else h, i if b.shape[2] > 1 else 0, j])
        )
        block = create_block_mask_cached(q.shape[1], k.shape[1]) if causal else None
        return flex(*(x.transpose(1, 2) for x in (q, k, v)), score_mod=mod, block_mask=block).transpose(1, 2)

    yield "triflash", lambda q, k, v, b: triflash.flash_attn_func(q, k, v, b, causal)
    if bias is None:
        yield "fa2", sdpa(SDPBackend.FLASH_ATTENTION)
    yield "flex", flexed
    if not want_db:
        yield "cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)
    if bias is not None:
        yield "efficient", sdpa(SDPBackend.EFFICIENT_ATTENTION)


_masks = {}


def create_block_mask_cached(m, n):
    if (m, n) not in _masks:
        _masks[m, n] = create_block_mask(lambda b, h, i, j: i >= j, None, None, m, n, device="cuda")
    return _masks[m, n]


def measure(run, q, k, v, b, dout, flops):
    leaves = [x for x in (q, k, v, b) if x is not None and x.requires_grad]
    o = run(q, k, v, b)
    torch.autograd.grad(o, leaves, dout)
    with torch.no_grad():
        fwd = do_bench(lambda: run(q, k, v, b), warmup=10, rep=40, return_mode="median")
    o = run(q, k, v, b)
    bwd = do_bench(lambda: torch.autograd.grad(o, leaves, dout, retain_graph=True), warmup=10, rep=60, return_mode="median")
    return fwd, bwd, flops / fwd * 1e-9, 2.5 * flops / bwd * 1e-9


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--providers", default="triflash,fa2,flex,cudnn,efficient")
    parser.add_argument("--biases", default="none,1h1k,1hqk,bhqk,11qk")
    parser.add_argument("--dims", default="64,128,256")
    parser.add_argument("--lengths", default="512,2048,8192")
    args = parser.parse_args()
    chosen = args.providers.split(",")
    rows = []
    sets = [
        (None if kind == "none" else kind, db) for kind in args.biases.split(",") for db in ((False,) if kind == "none" else (False, True))
    ]
    for kind, db in sets:
        for d, s, causal in shapes(kind, args):
            h, b = (2048 // d, 16384 // s) if kind is None else (16, 4)
            q, k, v = (torch.randn(b, s, h, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
            dout = torch.randn_like(q)
            bias = None
            if kind:
                bias = torch.randn(
                    *(n if c in "bhqk" else 1 for c, n in zip(kind, (b, h, s, s), strict=True)), device="cuda", dtype=torch.bfloat16
                )
                bias.requires_grad_(db)
            flops = 4 * b * h * s * s * d / (2 if causal else 1)
            line = f"d{d} s{s} {'causal' if causal else 'full  '} {kind or '-'}{'+db' if db else ''}:"
            for name, run in providers(kind, db, causal):
                if name not in chosen:
                    continue
                try:
                    result = measure(run, q, k, v, bias, dout, flops)
                    rows.append({"d": d, "s": s, "causal": causal, "bias": kind, "db": db, "provider": name, "result": result})
                    line += f"  {name} {result[2]:.0f}/{result[3]:.0f}"
                except Exception as error:
                    line += f"  {name} -"
                    rows.append({"d": d, "s": s, "causal": causal, "bias": kind, "db": db, "provider": name, "error": str(error)[:200]})
            print(line, flush=True)
    json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}, open(args.out, "w"))


if __name__ == "__main__":
    main()
