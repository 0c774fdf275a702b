"""A paged KV cache that serves three requests, which join and leave: one pool of pages, one call of attention for whoever is there.

    python examples/paged_cache.py

A request is a prompt and then one token at a time. Prompts and single tokens go through the same call, packed one behind the other. What
the requests got is compared with attention over each one's own keys at the end.
"""

import torch

from triflash import attention, attention_with_kvcache

PAGE, HEADS, KEY_HEADS, DIM = 4, 4, 2, 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PagedCache:
    """``pages`` pages of PAGE keys; each request owns some, in order, and gives them back when it leaves."""

    def __init__(self, pages: int, most: int) -> None:
        self.k, self.v = (torch.zeros(pages, PAGE, KEY_HEADS, DIM, device=DEVICE) for _ in "kv")
        self.free = list(range(pages))
        self.most = most  # pages of a request
        self.owned: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def join(self, name: str) -> None:
        self.owned[name], self.lengths[name] = [], 0

    def leave(self, name: str) -> None:
        self.free += self.owned.pop(name)
        del self.lengths[name]

    def attend(self, new: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """``new``: of each request q, k, v ``(tokens, heads, DIM)``. Appends k and v and gives what q sees of all keys so far."""
        counts = [len(q) for q, _, _ in new.values()]
        table = torch.zeros(len(new), self.most, dtype=torch.int32)
        for row, (name, count) in enumerate(zip(new, counts, strict=True)):
            pages = self.owned[name]
            while len(pages) * PAGE < self.lengths[name] + count:
                pages.append(self.free.pop())
            table[row, : len(pages)] = torch.tensor(pages)
        q, k, v = (torch.cat(parts) for parts in zip(*new.values(), strict=True))
        begins = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
        lengths = torch.tensor([self.lengths[name] for name in new], device=DEVICE)
        out = attention_with_kvcache(
            q, self.k, self.v, cache_lengths=lengths, page_table=table.to(DEVICE), k_new=k, v_new=v, cu_seqlens_q=begins,
            cu_seqlens_new=begins, max_seqlen_q=max(counts), causal=True,
        )  # fmt: skip
        for name, count in zip(new, counts, strict=True):
            self.lengths[name] += count
        return dict(zip(new, out.split(counts), strict=True))


def main() -> None:
    torch.manual_seed(0)
    tokens = {"ann": (7, 5), "bob": (3, 9), "cat": (10, 2)}  # of the prompt, and after it
    arrives = {"ann": 0, "bob": 2, "cat": 4}
    whole = {n: [torch.randn(sum(t), h, DIM, device=DEVICE) for h in (HEADS, KEY_HEADS, KEY_HEADS)] for n, t in tokens.items()}
    got: dict[str, list[torch.Tensor]] = {name: [] for name in tokens}
    cache, step = PagedCache(pages=10, most=4), 0
    while any(sum(map(len, got[name])) < sum(tokens[name]) for name in tokens):
        for name in tokens:
            if arrives[name] == step:
                cache.join(name)
        spans = {n: slice(at, at + (1 if at else tokens[n][0])) for n, at in cache.lengths.items()}
        for name, out in cache.attend({n: tuple(x[span] for x in whole[n]) for n, span in spans.items()}).items():
            got[name].append(out)
            if cache.lengths[name] == sum(tokens[name]):
                cache.leave(name)
                print(f"step {step}: {name} leaves, {len(cache.free)} of 10 pages are free")
        step += 1
    for name, (q, k, v) in whole.items():
        torch.testing.assert_close(torch.cat(got[name]), attention(q[None], k[None], v[None], causal=True)[0], rtol=1e-3, atol=1e-3)
    print("every request got what attention over its own keys gives")


if __name__ == "__main__":
    main()
