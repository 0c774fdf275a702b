"""Forward and backward times of triflash beside SDPA's backends and FlexAttention, as full autograd calls."""

import argparse
import itertools
import json
import pathlib

import torch
import torch._functorch.config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton.testing import do_bench

import triflash

torch._functorch.config.donated_buffer = False  # FlexAttention's backward is timed with retain_graph=True
flex = torch.compile(flex_attention, dynamic=False)


def shapes(kind):
    """(head dim, length, causal): the grid without a bias, one length with."""
    if kind is None:
        return itertools.product((64, 128, 256), (512, 2048, 8192), (False, True))
    return itertools.product((64, 128), (2048,), (False, True))


_hidden, _folded = {}, {}


def folded(bias, m, n):
    """The bias with the causal mask in it, as SDPA wants it; made once where no gradient has to pass through."""
    if (m, n) not in _hidden:
        _hidden[m, n] = torch.ones(m, n, device=bias.device, dtype=torch.bool).triu(1)
    if bias.requires_grad:
        return bias.masked_fill(_hidden[m, n], -torch.inf)
    if _folded.get("of") is not bias:
        _folded.update(of=bias, mask=bias.masked_fill(_hidden[m, n], -torch.inf))
    return _folded["mask"]


def providers(bias, want_db, causal):
    """name -> function of (q, k, v, bias), all (b, s, h, d)."""

    def sdpa(backend):
        def run(q, k, v, b):
            mask, is_causal = b, causal
            if b is not None and causal:
                mask, is_causal = folded(b, q.shape[1], k.shape[1]), False
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


def measure(run, q, k, v, b, dout, flops, warm):
    """(forward ms, backward ms, forward TFLOP/s, backward TFLOP/s); None after the first step if only warming caches."""
    leaves = [x for x in (q, k, v, b) if x is not None and x.requires_grad]
    o = run(q, k, v, b)
    torch.autograd.grad(o, leaves, dout)
    if warm:
        with torch.no_grad():
            run(q, k, v, b)
        return None
    with torch.no_grad():
        fwd = do_bench(lambda: run(q, k, v, b), warmup=10, rep=40, return_mode="median")
    o = run(q, k, v, b)
    bwd = do_bench(lambda: torch.autograd.grad(o, leaves, dout, retain_graph=True), warmup=10, rep=60, return_mode="median")
    return fwd, bwd, flops / fwd * 1e-9, 2.5 * flops / bwd * 1e-9


def table(rows):
    """The rows as markdown: forward / backward TFLOP/s of every provider, and triflash's ratios to the fastest of the others."""
    cells = {}
    for row in rows:
        cells.setdefault((row["d"], row["s"], row["causal"], row["bias"], row["db"]), {})[row["provider"]] = row.get("result")
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["| case | " + " | ".join(names) + " | ratio to best other |", "| --- " * (len(names) + 2) + "|"]
    for (d, s, causal, bias, db), found in cells.items():
        case = f"d{d} s{s} {'causal' if causal else 'full'}" + (f" {bias}" if bias else "") + (" +db" if db else "")
        shown = [f"{found[n][2]:.0f} / {found[n][3]:.0f}" if found.get(n) else "-" for n in names]
        others = [found[n] for n in names[1:] if found.get(n)]
        ours = found.get(names[0])
        ratios = [f"{min(o[i] for o in others) / ours[i]:.2f}" if others and ours else "-" for i in (0, 1)]
        lines.append(f"| {case} | " + " | ".join(shown) + f" | {' / '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="JSON file; a markdown table goes beside it")
    parser.add_argument("--biases", default="none,1h1k,1hqk,bhqk,11qk")
    parser.add_argument("--flex", default="none,1hqk", help="bias kinds for which FlexAttention, which compiles for long, is timed")
    parser.add_argument("--warm", metavar="I/N", help="only compile the I-th of N parts of the cells, timing nothing")
    args = parser.parse_args()
    rows = []
    cells = [
        (None if kind == "none" else kind, db, *shape)
        for kind in args.biases.split(",")
        for db in ((False,) if kind == "none" else (False, True))
        for shape in shapes(None if kind == "none" else kind)
    ]
    if args.warm:
        part, parts = map(int, args.warm.split("/"))
        cells = cells[part - 1 :: parts]
    for kind, db, d, s, causal in cells:
        h, b = (2048 // d, 16384 // s) if kind is None else (16, 4)
        q, k, v = (torch.randn(b, s, h, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
        dout = torch.randn_like(q)
        bias = None
        if kind:
            sizes = dict(zip("bhqk", (b, h, s, s), strict=True))
            bias = torch.randn([sizes.get(c, 1) for c in kind], device="cuda", dtype=torch.bfloat16).requires_grad_(db)
        flops = 4 * b * h * s * s * d / (2 if causal else 1)
        torch._dynamo.reset()  # FlexAttention is compiled per shape, which would soon reach the limit of recompilations
        for name, run in providers(bias, db, causal):
            row = {"d": d, "s": s, "causal": causal, "bias": kind, "db": db, "provider": name}
            if name == "flex" and ((kind or "none") not in args.flex.split(",") or s == 512 or d == 256):
                row["error"] = "not timed"
            else:
                try:
                    row["result"] = measure(run, q, k, v, bias, dout, flops, args.warm)
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            rows.append(row)
        print(
            kind, db, d, s, causal, [[round(x) for x in row["result"][2:]] if row.get("result") else None for row in rows[-5:]], flush=True
        )
    if args.warm:
        return
    pathlib.Path(args.out).write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}))
    pathlib.Path(args.out).with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
