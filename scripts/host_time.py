"""Wall time of one eager forward and backward step on a problem so small that only the host's work counts, beside SDPA's."""

import cProfile
import pstats
import time

import torch

import triflash


def wall(step, repeats=300):
    for _ in range(20):
        step()
    torch.cuda.synchronize()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return sorted(samples)[repeats // 2] * 1e6


def main():
    q, k, v = (torch.randn(1, 128, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    functions = {
        "triflash": lambda: triflash.flash_attn_func(q, k, v, None, True),
        "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2),
    }
    for name, function in functions.items():
        forward = wall(lambda function=function: function().detach())
        step = wall(lambda function=function: torch.autograd.grad(function(), (q, k, v), dout))
        print(f"{name}: forward {forward:.0f} us, forward and backward {step:.0f} us")
    with cProfile.Profile() as profile, torch.no_grad():
        for _ in range(300):
            functions["triflash"]()
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
